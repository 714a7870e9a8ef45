"""OmniScore (VideoDPO, arXiv 2412.14167): seven dimensions of VBench (arXiv 2311.17982) in one number."""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError, append_line, finish, read_lines, write_atomic
from data import clip_normalize, quick_files, raft, read_clips, read_video
from metrics import cosine
from text_encoders import DINO, dino_name
from tinyworld import judge, parse
from weights import load_weights, rename

# dimension: lowest and highest value, weight (as released)
OMNISCORE = {
    "subject_consistency": (0.1462, 1.0, 1.0), "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0), "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0), "dynamic_degree": (0.0, 1.0, 0.5),
    "overall_consistency": (0.0, 0.364, 1.0)}
# the tiny world's own range: the lowest is a clip badly drawn, the highest is out of its autoencoder's reach
OMNISCORE_TINY = {
    "subject_consistency": (0.9, 1.0, 1.0), "temporal_flickering": (0.98, 1.0, 1.0),
    "motion_smoothness": (0.5, 1.0, 1.0), "aesthetic_quality": (0.88, 1.0, 1.0),
    "imaging_quality": (0.8, 1.0, 1.0), "dynamic_degree": (0.0, 1.0, 0.5),
    "overall_consistency": (0.0, 1.0, 1.0)}


def total_score(values: dict, table=None, semantic=("overall_consistency",), shares=(4, 1)) -> dict:
    """{dimension: value} -> {"quality", "semantic", "total"}, weighted means of (value - low) / (high - low).

    total = (4 quality + semantic) / 5: how well it is made counts for more than what it shows.
    """
    table, parts = table or OMNISCORE, []
    for is_semantic in (False, True):
        names = [n for n in table if (n in semantic) == is_semantic]
        scaled = [table[n][2] * (values[n] - table[n][0]) / (table[n][1] - table[n][0]) for n in names]
        parts.append(sum(scaled) / sum(table[n][2] for n in names))
    total = (shares[0] * parts[0] + shares[1] * parts[1]) / sum(shares)
    return {"quality": parts[0], "semantic": parts[1], "total": total}


def subject_consistency(features):
    """DINO features of the frames: cosine to the frame before and to the first, halved and summed over f.

    As released the sum of f - 1 terms is divided by f (16), so that 1 - 1 / f is the most.
    """
    x = F.normalize(features.float(), dim=-1)
    before, first = ((a * x[1:]).sum(1).clamp(min=0) for a in (x[:-1], x[:1]))
    return float(((before + first) / 2).sum() / len(x))


def temporal_flickering(video):
    """No network: 1 - the mean difference of neighbouring frames, white to black being 1."""
    return 1 - float(video.float().diff(dim=1).abs().mean() / 2)


def motion_smoothness(video, flow):
    """RAFT (torchvision; flow: of data.raft): how well every second frame is foretold from its neighbours.

    Each is made by moving half-way along the flow between its two neighbours; 1 - the mean difference.
    (VBench asks AMT, an interpolation network that no package brings.)
    """
    frames = video.float().transpose(0, 1)
    a, b, middle = frames[:-2:2], frames[2::2], frames[1:-1:2]
    if not len(middle):
        return 1.0
    halves = [_pulled(x, flow(y, x) / 2) for x, y in ((a, b), (b, a))]
    return 1 - float((sum(halves) / 2 - middle).abs().mean() / 2)


def _pulled(frames, flow):
    """frames (n,3,h,w) looked up at (x, y) + flow (n,2,h,w)."""
    h, w = frames.shape[2:]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    at = torch.stack([x, y]).to(flow) + flow
    grid = (2 * at.permute(0, 2, 3, 1) + 1) / flow.new_tensor([w, h]) - 1
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False)


def dynamic_degree(video, flow, fps=8):
    """RAFT: share of frame pairs, at about 8 a second, whose strongest 5 % of motion exceeds a threshold.

    6 pixels on a side of 256 (as released; VBench's own answer is yes or no).
    """
    frames = video.float().transpose(0, 1)[::max(1, round(fps / 8))]
    if len(frames) < 2:
        return 0.0
    length = flow(frames[:-1], frames[1:]).norm(dim=1).flatten(1)
    strongest = length.topk(max(1, int(0.05 * length.shape[1])), dim=1).values.mean(1)
    return float((strongest > 6 * min(frames.shape[2:]) / 256).float().mean())


def aesthetic_quality(features, head):
    """CLIP ViT-L/14 features of the frames, LAION's linear head (a Linear): its 0..10 as 0..1, averaged."""
    return float(head(F.normalize(features.float(), dim=-1)).mean() / 10)


def imaging_quality(video, quality):
    """MUSIQ (arXiv 2108.05997) of the package pyiqa, a maintained no-reference model: its 0..100 as 0..1.

    quality(frames (n,3,h,w) in [0,1]) -> (n,) or (n,1). Frames of a side over 512 are scaled down to it.
    """
    frames = video.float().transpose(0, 1).clamp(-1, 1) / 2 + 0.5
    if max(frames.shape[2:]) > 512:
        scale = 512 / max(frames.shape[2:])
        frames = F.interpolate(frames, scale_factor=scale, mode="bilinear", antialias=True)
    return float(quality(frames.clamp(0, 1)).float().mean() / 100)


def overall_consistency(features, text):
    """CLIP ViT-L/14: cosine of the frames' mean direction and the prompt's (1,d). (VBench asks ViCLIP, which
    no package brings; the ranges of the two are alike.)"""
    return cosine(F.normalize(features.float(), dim=-1).mean(0, keepdim=True), text.float())


DIMENSIONS = tuple(OMNISCORE)


def tiny_dimensions(video, caption, fps=None):
    """The seven for a clip of the tiny world, off the judge: here alone is it a training signal.

    Consistency: of the object's colour and size; aesthetics: colours near the named ones; imaging: the
    shape's outline; overall consistency: share of the caption's words that are true. No object: the lowest
    values.
    """
    seen, asked = judge(video), parse(caption)
    if "misfit" not in seen:
        return {name: OMNISCORE_TINY[name][0] for name in DIMENSIONS}
    values = dict(
        subject_consistency=1 - seen["unsteady"], temporal_flickering=1 - seen["flicker"] / 255,
        motion_smoothness=1 - seen["smoothness"], dynamic_degree=seen["moving"],
        aesthetic_quality=1 - seen["off_palette"] / 255, imaging_quality=1 - seen["misfit"],
        overall_consistency=float(np.mean([seen[a] == word for a, word in asked.items()])) if asked else 1.0)
    return {name: max(values[name], OMNISCORE_TINY[name][0]) for name in DIMENSIONS}


# what the real dimensions need: file or folder below --score-weights -> where it is from
SCORE_FILES = {
    "dino_vitbase16_pretrain.pth": "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain",
    "clip-vit-large-patch14": "hf openai/clip-vit-large-patch14",
    "sa_0_4_vit_l_14_linear.pth": "github LAION-AI/aesthetic-predictor",
    "musiq_spaq_ckpt-358bb6af.pth": "hf chaofengc/IQA-PyTorch-Weights"}


def check_score_files(folder):
    """Refuse, before any work, a folder of OmniScore's networks in which one is missing."""
    if folder is None:
        raise UserError("--score-weights: OmniScore needs a folder with " + ", ".join(SCORE_FILES))
    for name, source in SCORE_FILES.items():
        if not Path(folder, name).exists():
            raise UserError(f"--score-weights {folder}: {name} is missing; it is from {source}")
    try:
        import pyiqa  # noqa: F401
    except ImportError:
        raise UserError("OmniScore's imaging quality needs the package pyiqa: pip install pyiqa") from None


def scorer(tiny, folder=None, flow_weights=None, device="cpu"):
    """-> fn(video, prompt, fps) -> {dimension: value, "quality", "semantic", "total"}, None without networks.

    tiny: of the tiny world. Else the networks below `folder` are loaded at the first clip.
    """
    if not tiny and folder is None:
        return None
    loaded = [tiny_dimensions] if tiny else []

    def judged(video, prompt, fps=8):
        if not loaded:
            loaded.append(real_dimensions(folder, flow_weights, device))
        values = loaded[0](video, prompt, fps)
        return values | total_score(values, OMNISCORE_TINY if tiny else OMNISCORE)
    return judged


@torch.no_grad()
def real_dimensions(folder, flow_weights=None, device="cpu"):
    """Load OmniScore's networks -> fn(video (3,f,h,w) in [-1,1], prompt, fps) -> {dimension: value}."""
    import pyiqa
    from transformers import AutoTokenizer, CLIPModel
    check_score_files(folder)
    files = {name: Path(folder, name) for name in SCORE_FILES}
    dino_file, clip_folder, head_file, musiq_file = files.values()
    dino = DINO(width=768, heads=12)
    dino.load_state_dict(rename(load_weights(dino_file), dino, dino_name, dino_file))
    clip, words = CLIPModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
    head = torch.nn.Linear(clip.config.projection_dim, 1)
    head.load_state_dict(load_weights(head_file))
    for module in (dino, clip, head):
        module.eval().requires_grad_(False).to(device)
    quality = pyiqa.create_metric("musiq-spaq", device=torch.device(device),
                                  pretrained_model_path=str(musiq_file))
    flow, side = raft("large", flow_weights, device), clip.config.vision_config.image_size

    @torch.no_grad()
    def dimensions(video, prompt, fps=8):
        video = video.to(device).float()
        frames = video.transpose(0, 1).clamp(-1, 1) / 2 + 0.5
        # the shorter side to 224; DINO reads the whole, CLIP the middle
        scale = side / min(frames.shape[2:])
        size = [max(side, round(scale * n)) for n in frames.shape[2:]]
        small = F.interpolate(frames, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((n - side) // 2 for n in size)
        mean, std = (small.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        crop = clip_normalize(small[:, :, top:top + side, left:left + side])
        seen = clip.visual_projection(clip.vision_model(pixel_values=crop).pooler_output)
        ids = words([prompt], truncation=True, max_length=77, return_tensors="pt").to(device)
        text = clip.text_projection(clip.text_model(**ids).pooler_output)
        return dict(
            subject_consistency=subject_consistency(dino((small - mean) / std)),
            temporal_flickering=temporal_flickering(video),
            motion_smoothness=motion_smoothness(video, flow), dynamic_degree=dynamic_degree(video, flow, fps),
            aesthetic_quality=aesthetic_quality(seen, head), imaging_quality=imaging_quality(video, quality),
            overall_consistency=overall_consistency(seen, text))
    return dimensions


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def score_folder(env, folder, judged):
    """OmniScore of each clip -> folder/scores.jsonl; judged: of scorer().

    Processes share the clips; one that has its score already keeps it.
    """
    clips = read_clips(folder)

    def scores():
        parts = sorted(Path(folder).glob("scores*.jsonl"))
        return {row["clip"]: row for part in parts for row in read_lines(part)}
    known, mine = scores(), Path(folder, f"scores-{env.rank}.jsonl")
    if mine.exists():  # a kill may have cut its last line off: the next would be lost with it
        text = "".join(json.dumps(row) + "\n" for row in read_lines(mine))
        write_atomic(mine, lambda p: p.write_text(text))
    quick_files()
    for path, caption in clips[env.rank::env.world]:
        if path.name not in known:
            video, fps = read_video(path)
            append_line(mine, {"clip": path.name, **judged(video, caption, fps)})
    finish(env, Path(folder, "scores.jsonl"),
           lambda: "".join(json.dumps(known[path.name]) + "\n" for known in [scores()] for path, _ in clips))
