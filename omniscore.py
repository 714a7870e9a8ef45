"""OmniScore (VideoDPO, arXiv 2412.14167): seven dimensions of VBench (arXiv 2311.17982) as one
number.

clip_scorer() gives the function that scores a clip. The last section reads and writes the files of
a VideoDPO folder: clips with metadata.json, scores.jsonl, pair.json.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bases import base_row
from common import UserError, append_line, finish, read_lines, write_lines
from data import PairDataset, clip_normalize, lucas_kanade, raft, read_clips, read_video
from metrics import cosine
from text_encoders import DINO, dino_name, tokenize
from tinyworld import check_tiny_size, load_scorer
from weights import load_strict, load_weights, rename

# {dimension: (lowest value, highest value, weight)}, as released
OMNISCORE = {
    "subject_consistency": (0.1462, 1.0, 1.0), "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0), "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0), "dynamic_degree": (0.0, 1.0, 0.5),
    "overall_consistency": (0.0, 0.364, 1.0)}
# The tiny world's own ranges: from its worst clips, with every flaw, to clean ones.
OMNISCORE_TINY = {
    "subject_consistency": (0.4, 0.875, 1.0), "temporal_flickering": (0.9, 1.0, 1.0),
    "motion_smoothness": (0.9, 1.0, 1.0), "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0), "dynamic_degree": (0.0, 1.0, 0.5),
    "overall_consistency": (0.3, 0.96, 1.0)}
DIMENSIONS = tuple(OMNISCORE)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def total_score(values: dict, table=None, semantic=("overall_consistency",), shares=(4, 1)) -> dict:
    """{dimension: value} -> {"quality", "semantic", "total"}, each about 0..1.

    quality and semantic: weighted means of (value - low) / (high - low). total = (4 quality +
    semantic) / 5, so visual quality counts for more than agreement with the prompt.
    """
    table, means = table or OMNISCORE, []
    for is_semantic in (False, True):
        names = [name for name in table if (name in semantic) == is_semantic]
        weighted = 0.0
        for name in names:
            low, high, weight = table[name]
            weighted += weight * (values[name] - low) / (high - low)
        means.append(weighted / sum(table[name][2] for name in names))
    total = (shares[0] * means[0] + shares[1] * means[1]) / sum(shares)
    return {"quality": means[0], "semantic": means[1], "total": total}


# ---- the seven dimensions, of a clip (3,f,h,w) in [-1,1] or of features of its frames

def subject_consistency(features):
    """DINO features (f,d) of the frames: cosine to the frame before and to the first one, averaged.

    As released, the sum of f - 1 terms is divided by f, so 1 - 1 / f is the largest value.
    """
    x = F.normalize(features.float(), dim=-1)
    to_previous, to_first = ((a * x[1:]).sum(1).clamp(min=0) for a in (x[:-1], x[:1]))
    return float(((to_previous + to_first) / 2).sum() / len(x))


def temporal_flickering(video):
    """1 - the mean difference of neighbouring frames, where black to white is 1. No network."""
    return 1 - float(video.float().diff(dim=1).abs().mean() / 2)


def motion_smoothness(video, flow):
    """How well every second frame is predicted from its neighbours: 1 - the mean difference.

    flow: of data.raft. Both neighbours are moved half-way along the flow between them. (VBench
    uses AMT, an interpolation network that no package provides.)
    """
    frames = video.float().transpose(0, 1)
    before, after, middle = frames[:-2:2], frames[2::2], frames[1:-1:2]
    if not len(middle):
        return 1.0
    predicted = (moved(before, flow(after, before) / 2) + moved(after, flow(before, after) / 2)) / 2
    return 1 - float((predicted - middle).abs().mean() / 2)


def moved(frames, flow):
    """Frames (n,3,h,w) looked up at (x, y) + flow (n,2,h,w), in pixels."""
    h, w = frames.shape[2:]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    position = torch.stack([x, y]).to(flow) + flow
    grid = (2 * position.permute(0, 2, 3, 1) + 1) / flow.new_tensor([w, h]) - 1
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False)


def dynamic_degree(video, flow, fps=8):
    """Share of frame pairs, at about 8 per second, that move.

    A pair moves if the strongest 5 % of its flow is longer than 6 pixels on average, in a clip
    whose shorter side is 256. (As released; VBench itself answers yes or no per clip.)
    """
    frames = video.float().transpose(0, 1)[::max(1, round(fps / 8))]
    if len(frames) < 2:
        return 0.0
    length = flow(frames[:-1], frames[1:]).norm(dim=1).flatten(1)
    strongest = length.topk(max(1, int(0.05 * length.shape[1])), dim=1).values.mean(1)
    return float((strongest > 6 * min(frames.shape[2:]) / 256).float().mean())


def aesthetic_quality(features, head):
    """CLIP ViT-L/14 features (f,d) of the frames, LAION's linear head: its mean, 0..10 as 0..1."""
    return float(head(F.normalize(features.float(), dim=-1)).mean() / 10)


def imaging_quality(video, quality):
    """MUSIQ (arXiv 2108.05997), from the package pyiqa: its 0..100 as 0..1, averaged over frames.

    quality(frames (n,3,h,w) in [0,1]) -> (n,) or (n,1). Frames with a side over 512 are reduced.
    """
    frames = video.float().transpose(0, 1).clamp(-1, 1) / 2 + 0.5
    if max(frames.shape[2:]) > 512:
        scale = 512 / max(frames.shape[2:])
        frames = F.interpolate(frames, scale_factor=scale, mode="bilinear", antialias=True)
    return float(quality(frames.clamp(0, 1)).float().mean() / 100)


def overall_consistency(features, text):
    """CLIP ViT-L/14 features of frames (f,d) and prompt (1,d): cosine of the prompt and the frames'
    mean direction.

    (VBench uses ViCLIP, which no package provides; its values have a similar range.)
    """
    return cosine(F.normalize(features.float(), dim=-1).mean(0, keepdim=True), text.float())


# ---- the networks

# file or folder in --score-weights: where it can be downloaded
SCORE_FILES = {
    "dino_vitbase16_pretrain.pth": "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain",
    "clip-vit-large-patch14": "hf openai/clip-vit-large-patch14",
    "sa_0_4_vit_l_14_linear.pth": "github LAION-AI/aesthetic-predictor",
    "musiq_spaq_ckpt-358bb6af.pth": "hf chaofengc/IQA-PyTorch-Weights"}


def check_score_files(folder):
    """Refuse, before any work, a folder of OmniScore's networks in which a file is missing."""
    if folder is None:
        raise UserError("--score-weights: OmniScore needs a folder with " + ", ".join(SCORE_FILES))
    for name, source in SCORE_FILES.items():
        if not Path(folder, name).exists():
            raise UserError(f"--score-weights {folder}: {name} is missing; it is from {source}")
    try:
        import pyiqa  # noqa: F401
    except ImportError:
        raise UserError("OmniScore's imaging quality needs the package pyiqa: pip install "
                        "pyiqa") from None


def clip_scorer(base, size, folder=None, flow_weights=None, device="cpu", required=False):
    """The function score_clip(video (3,f,h,w), prompt, fps) -> {name: float}: the dimensions,
    "quality", "semantic" and "total".

    base: name of the base; tiny ones are scored by the tiny world's scorer, if size (f,h,w) fits
    it. Else folder holds the networks and flow_weights is a file of RAFT large; they are loaded
    when the first clip is scored. Without a folder: None, or an error if `required`.
    """
    if base_row(base).tiny:
        check_tiny_size(f"--base {base}: its OmniScore", *size)
        table, dimensions = OMNISCORE_TINY, tiny_dimensions(device)
    elif folder is None and not required:
        return None
    else:
        check_score_files(folder)
        table, dimensions = OMNISCORE, None

    def score_clip(video, prompt, fps=8):
        nonlocal dimensions
        if dimensions is None:
            dimensions = real_dimensions(folder, flow_weights, device)
        values = dimensions(video, prompt, fps)
        return values | total_score(values, table)
    return score_clip


@torch.no_grad()
def real_dimensions(folder, flow_weights=None, device="cpu"):
    """Load OmniScore's networks -> dimensions(video (3,f,h,w) in [-1,1], prompt, fps) -> {name:
    value}."""
    import pyiqa
    from transformers import AutoTokenizer, CLIPModel
    dino_file, clip_folder, head_file, musiq_file = (Path(folder, name) for name in SCORE_FILES)
    dino = DINO(width=768, heads=12)
    load_strict(dino, rename(load_weights(dino_file), dino, dino_name, dino_file), dino_file)
    clip = CLIPModel.from_pretrained(clip_folder)
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    head = torch.nn.Linear(clip.config.projection_dim, 1)
    load_strict(head, load_weights(head_file), head_file)
    load_weights(musiq_file)  # pyiqa would run code in it; this refuses any
    for module in (dino, clip, head):
        module.eval().requires_grad_(False).to(device)
    quality = pyiqa.create_metric("musiq-spaq", device=torch.device(device),
                                  pretrained_model_path=str(musiq_file))
    flow, side = raft("large", flow_weights, device), clip.config.vision_config.image_size

    @torch.no_grad()
    def dimensions(video, prompt, fps=8):
        video = video.to(device).float()
        frames = video.transpose(0, 1).clamp(-1, 1) / 2 + 0.5
        # the shorter side becomes 224: DINO reads the whole frame, CLIP the square in its middle
        scale = side / min(frames.shape[2:])
        size = [max(side, round(scale * n)) for n in frames.shape[2:]]
        small = F.interpolate(frames, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((n - side) // 2 for n in size)
        mean, std = (small.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        square = clip_normalize(small[:, :, top:top + side, left:left + side])
        features = clip.visual_projection(clip.vision_model(pixel_values=square).pooler_output)
        tokenize(prompt)  # says what is cut
        ids = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt").to(device)
        text = clip.text_projection(clip.text_model(**ids).pooler_output)
        return dict(
            subject_consistency=subject_consistency(dino((small - mean) / std)),
            temporal_flickering=temporal_flickering(video),
            motion_smoothness=motion_smoothness(video, flow),
            dynamic_degree=dynamic_degree(video, flow, fps),
            aesthetic_quality=aesthetic_quality(features, head),
            imaging_quality=imaging_quality(video, quality),
            overall_consistency=overall_consistency(features, text))
    return dimensions


@torch.no_grad()
def tiny_dimensions(device="cpu"):
    """-> dimensions(video (3,8,32,32) in [-1,1], caption, fps) -> {name: value}, of the tiny world.

    Its learned scorer takes the place of DINO (subject), of LAION's head (aesthetics: the clip), of
    MUSIQ (imaging: each frame as a still clip) and of CLIP. The judge has no part in it.
    """
    scorer = load_scorer(device)

    @torch.no_grad()
    def dimensions(video, caption, fps=8):
        video = video.to(device).float().clamp(-1, 1)
        clip = video[None] / 2 + 0.5
        still = clip[0].transpose(0, 1)[:, :, None].expand(-1, -1, clip.shape[2], -1, -1)
        shown, quality = scorer.look(clip)
        features, qualities = scorer.look(still)
        return dict(
            subject_consistency=subject_consistency(features),
            temporal_flickering=temporal_flickering(video),
            motion_smoothness=motion_smoothness(video, lucas_kanade),
            dynamic_degree=dynamic_degree(video, lucas_kanade, fps),
            aesthetic_quality=float(quality.sigmoid()),
            imaging_quality=float(qualities.sigmoid().mean()),
            overall_consistency=cosine(shown, scorer.read([caption])))
    return dimensions


# ---- VideoDPO's folders: clips with metadata.json, scores.jsonl, pair.json

def score_folder(env, folder, score_clip):
    """OmniScore of every clip of FOLDER/metadata.json -> FOLDER/scores.jsonl.

    The processes split the clips. Existing scores are kept. score_clip: from clip_scorer().
    """
    clips = read_clips(folder)

    def scored():
        parts = sorted(Path(folder).glob("scores*.jsonl"))
        return {row["clip"]: row for part in parts for row in read_lines(part)}
    known, own = scored(), Path(folder, f"scores-{env.rank}.jsonl")
    if own.exists():  # a kill may have cut off its last line: the next one would be lost with it
        write_lines(own, read_lines(own))
    for path, caption in clips[env.rank::env.world]:
        if path.name not in known:
            video, fps = read_video(path)
            append_line(own, {"clip": path.name, **score_clip(video, caption, fps)})

    def all_lines():
        rows = scored()
        return "".join(json.dumps(rows[path.name]) + "\n" for path, _ in clips)
    finish(env, Path(folder, "scores.jsonl"), all_lines)


def read_scores(folder):
    """FOLDER -> each prompt's clips, [(row in metadata.json, caption, OmniScore)].

    Files are called PROMPT-K.mp4.
    """
    totals = {row["clip"]: row["total"] for row in saved(folder)}
    clips, prompts = read_clips(folder), {}
    for number, (path, caption) in enumerate(clips):
        if path.name not in totals:
            raise UserError(f"{folder}: {path.name} has no score yet: --stage score first")
        prompt = path.stem.rsplit("-", 1)[0]
        prompts.setdefault(prompt, []).append((number, caption, totals[path.name]))
    return list(prompts.values())


def write_pairs(env, folder, pairs):
    """Rows of a pair.json -> FOLDER/pair.json."""
    if not pairs:
        raise UserError(f"{folder}: no pair is left; give a smaller --drop-pairs, or more clips: "
                        "--samples")
    finish(env, Path(folder, "pair.json"), lambda: json.dumps(pairs, indent=1))
    if env.main:
        apart = sum(pair["diff_score"] for pair in pairs) / len(pairs)
        print(f"{folder}: {len(pairs)} pairs, OmniScores {apart:.4f} apart on average", flush=True)


def read_pairs(folders, size, seed=0):
    """Folders of training pairs and of held-out pairs (or None) -> a PairDataset (or None) each.

    size: (frames, height, width).
    """
    return [part and PairDataset(part, *size, seed) for part in folders]


def score_videos(folder, prompts, score_clip):
    """FOLDER/0000.mp4 ..., one clip per prompt -> FOLDER/scores.jsonl and its rows, in order.

    As for pairs, the compressed files are scored, not the videos in memory.
    """
    rows = []
    for i, prompt in enumerate(prompts):
        path = Path(folder, f"{i:04d}.mp4")
        video, fps = read_video(path)
        rows.append({"clip": path.name, **score_clip(video, prompt, fps)})
    write_lines(Path(folder, "scores.jsonl"), rows)
    return rows


def saved(folder):
    """Rows of FOLDER/scores.jsonl, {"clip", dimension: value, ..., "total"}."""
    path = Path(folder, "scores.jsonl")
    rows = read_lines(path)
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not {"clip", "total"} <= row.keys():
            raise UserError(f"{path} row {n}: no score of a clip; delete it and run --stage score")
    return rows


def means(rows):
    """Rows of scores -> {dimension: mean}."""
    return {k: float(np.mean([row[k] for row in rows])) for k in rows[0] if k != "clip"}
