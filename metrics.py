"""Metrics. For real videos: cosines of encoder features (DreamVideo, arXiv 2312.04433).

    CLIP-T  cosine(CLIP of the frames, CLIP of the prompt)            temporal_consistency(CLIP of the frames)
    CLIP-I  cosine(CLIP of the frames, CLIP of the subject's pictures)
    DINO-I  cosine(DINO of the frames, DINO of the subject's pictures)

    python metrics.py out/sample --references dog          # prompts: of out/sample/index.jsonl, or --prompts
    python metrics.py clips.txt                            # lines clip|||folder of references|||prompt
    python metrics.py out/sample --clip-weights ViT-B-32.pt --dino-weights dino_deitsmall16_pretrain.pth

Every clip's scores and their means are printed and go to scores.json beside the clips.

The tiny world's judge reads shape, colour, background, motion, speed and smoothness off a clip.

The judge learns nothing and shares no code with the rewards: it is never a reward, so it can tell when a
reward is hacked. One exception, and said so there: VideoDPO's OmniScore of tiny clips is made of it.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import (Parser, UserError, append_line, finish, load_weights, read_lines, rename,
                    write_atomic)
from data import (BACKGROUNDS, COLOURS, IMAGES, SHAPES, clip_normalize, list_videos, open_image, parse,
                  prompts_of, quick_files, raft, read_clips, read_triples, read_video, to_uint8)
from text_encoders import DINO, dino_name

ATTRIBUTES = ("shape", "colour", "background", "motion")

# ---- features

def cosine(frames, targets):
    """Features (f, d) of a video's frames and (n, d) of texts or pictures -> mean cosine over all pairs.

    Need not be normalised. 0 without targets, as the published script reports it.
    """
    if not len(targets):
        return 0.0
    return float((F.normalize(frames, dim=-1) @ F.normalize(targets, dim=-1).T).mean())


def temporal_consistency(frames):
    """Features (f, d) of a video's frames, f > 1 -> mean cosine of neighbouring frames."""
    return float(F.cosine_similarity(frames[:-1], frames[1:], dim=-1).mean())


DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"


def clip_towers(weights=None, device="cpu", name="ViT-B-32-quickgelu"):
    """OpenAI's CLIP, by open_clip -> images(list of Pillow), texts(list of str): features (n, d).

    weights: its file ViT-B-32.pt; None: open_clip's hub.
    """
    import open_clip  # slow to import
    try:
        net, _, prepare = open_clip.create_model_and_transforms(name, pretrained=weights or "openai")
    except Exception as e:  # offline, no such file, another network's: all mean the same to the user
        raise UserError(f"--clip-weights {weights or ''}: cannot load CLIP {name} ({type(e).__name__}); "
                        "download ViT-B-32.pt elsewhere and give it with --clip-weights") from None
    net.eval().requires_grad_(False).to(device)
    words = open_clip.get_tokenizer(name)

    def images(pictures):
        parts = [torch.stack([prepare(p) for p in pictures[i:i + 32]]) for i in range(0, len(pictures), 32)]
        return torch.cat([net.encode_image(part.to(device)).float().cpu() for part in parts])
    return images, lambda texts: net.encode_text(words(texts).to(device)).float().cpu()


def dino_tower(weights=None, device="cpu", net=None):
    """DINO ViT-S/16 -> images(list of Pillow): features (n, 384). weights: its file; None: its authors' site.
    """
    from torchvision import transforms  # slow to import
    if weights is None:
        try:
            state = torch.hub.load_state_dict_from_url(DINO_URL, map_location="cpu", progress=False)
        except Exception as e:  # offline
            raise UserError(f"cannot get {DINO_URL} ({type(e).__name__}); download it elsewhere and give it "
                            "with --dino-weights") from None
    else:
        state = load_weights(weights)
    net = net or DINO()
    net.load_state_dict(rename(state, net, dino_name, weights or DINO_URL))
    net.eval().requires_grad_(False).to(device)
    prepare = transforms.Compose([
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def images(pictures):
        parts = [torch.stack([prepare(p) for p in pictures[i:i + 32]]) for i in range(0, len(pictures), 32)]
        return torch.cat([net(part.to(device)).cpu() for part in parts])
    return images


def score_clip(frames, prompt, references, clip, dino) -> dict:
    """Frames and reference pictures, lists of Pillow images, and the prompt -> the four scores.

    clip, dino: of clip_towers() and dino_tower(). A clip of one frame has no consistency over time.
    """
    images, texts = clip
    seen = images(frames)
    scores = {"clip_t": cosine(seen, texts([prompt])),
              "clip_i": cosine(seen, images(references) if references else []),
              "dino_i": cosine(dino(frames), dino(references)) if references else 0.0}
    return scores | ({"temporal_consistency": temporal_consistency(seen)} if len(frames) > 1 else {})


def psnr(a, b):
    """Peak signal-to-noise ratio of two pictures or clips in [-1,1], in dB."""
    return float(10 * (4 / (a.float() - b.float()).square().mean().clamp(min=1e-10)).log10())


# ---- the tiny world's judge

def _nearest(rgb, palette):
    names = list(palette)
    return names[int(np.argmin([np.sum((rgb - np.array(palette[n])) ** 2) for n in names]))]


def _coverage(shape, size, cx, cy, area, sub=4):
    """(size, size) share of each pixel that the shape covers, counted on sub x sub points a pixel."""
    p = (np.arange(size * sub) + 0.5) / sub
    x, y = np.meshgrid(p - cx, p - cy)
    if shape == "circle":
        inside = x * x + y * y < area / np.pi
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) < np.sqrt(area) / 2
    else:  # point up; the centroid is a third of the height above the base
        side = np.sqrt(4 * area / np.sqrt(3))
        height = side * np.sqrt(3) / 2
        inside = (y < height / 3) & (y > abs(x) * np.sqrt(3) - 2 * height / 3)
    return inside.reshape(size, sub, size, sub).mean((1, 3))


def _enclosed(x, y):
    """Area in square pixels that a path, closed by the line back to its start, goes around."""
    return abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2


def _turns(path):
    """How often a path (f,) turns back, by steps of more than half a pixel."""
    steps = [d for d in np.diff(path) if abs(d) > 0.5]
    return sum(a * b < 0 for a, b in zip(steps, steps[1:]))


def _object(video):
    """(3,f,h,w) in [-1,1] -> frames (f,h,w,3) 0..255, the background's colour, the object's distance from it,
    its mask (f,h,w) from 0 to 1."""
    pixels = ((video.detach().float().cpu().numpy() + 1) * 127.5).clip(0, 255)
    frames = pixels.transpose(1, 2, 3, 0)  # f h w c
    f = frames.shape[0]
    edges = [frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]]
    back = np.median(np.concatenate(edges, axis=1).reshape(-1, 3), axis=0)
    distance = np.sqrt(((frames - back) ** 2).sum(-1))                 # f h w
    level = np.percentile(distance.reshape(f, -1), 97, axis=1)         # the object's distance, in each frame
    strong = np.median(level)
    mask = np.clip((distance / max(strong, 1e-6) - 0.25) / 0.5, 0, 1)  # soft: 0.5 half-way to the background
    return frames, back, strong, mask


def _centres(mask):
    """Masks (f,h,w) -> x (f,), y (f,) of their centroids, in pixels."""
    grid, area = np.arange(mask.shape[1]) + 0.5, np.maximum(mask.sum((1, 2)), 1e-6)
    return (mask.sum(1) * grid).sum(1) / area, (mask.sum(2) * grid).sum(1) / area


def position_error(video, x, y):
    """Clip (3,f,h,w) in [-1,1], true centre x (f,), y (f,) in pixels -> mean distance, in frame widths.

    Half a width for a frame in which there is no object.
    """
    _, _, strong, mask = _object(video)
    cx, cy = _centres(mask)
    area, size = mask.sum((1, 2)), mask.shape[2]
    shown = (area > 4) & (area < 0.8 * size * size) & (strong > 25)
    return float(np.where(shown, np.hypot(cx - x, cy - y) / size, 0.5).mean())


def judge(video: Tensor) -> dict:
    """One clip (3,f,h,w) in [-1,1] -> what it shows: shape, colour, background, motion (words), and numbers:

    speed (pixels a frame, of the straight line through the centroids), size (mean area, pixels), smoothness
    (root mean square distance of the centroids from that line, pixels; 0 is perfectly smooth), visible (share
    of frames with an object).
    """
    frames, back, strong, mask = _object(video)
    f, size = frames.shape[0], frames.shape[1]
    area = mask.sum((1, 2))
    shown = (area > 4) & (strong > 25)
    seen = {"background": _nearest(back, BACKGROUNDS), "visible": float(shown.mean())}
    if shown.mean() < 0.75 or area.max() > 0.8 * size * size:
        return seen | {"shape": "none", "colour": "none", "motion": "none",
                       "speed": 0.0, "size": float(area.mean()), "smoothness": 99.0}
    core = mask > 0.95
    seen["colour"] = _nearest(np.median(frames[core], axis=0), COLOURS) if core.any() else "none"
    cx, cy = _centres(mask)

    # motion: straight lines through centroids and log radius, over the frames that show the object
    # (the new motions bend: round a closed area, or to and fro across the line)
    k = np.arange(f)[shown]
    slope = [np.polyfit(k, y, 1) for y in (cx[shown], cy[shown], 0.5 * np.log(np.maximum(area[shown], 1e-6)))]
    dx, dy, growth = (s[0] * (f - 1) for s in slope)
    residual = [np.polyval(s, k) - y for s, y in zip(slope[:2], (cx[shown], cy[shown]))]
    bend = float(np.sqrt(np.mean(np.square(residual).sum(0))))
    if _enclosed(cx[shown], cy[shown]) > 20:
        seen["motion"] = "circling"
    elif bend > 1.5 and _turns((cy if abs(dx) > abs(dy) else cx)[shown]) >= 2:
        seen["motion"] = "zigzagging"
    elif max(abs(dx), abs(dy)) > 4:
        horizontal = "moving right" if dx > 0 else "moving left"
        vertical = "moving down" if dy > 0 else "moving up"
        seen["motion"] = horizontal if abs(dx) > abs(dy) else vertical
    else:
        seen["motion"] = "growing" if growth > 0.35 else "shrinking" if growth < -0.35 else "standing still"

    # shape: the template that fits best at the measured centre and area, summed over the frames
    errors = {s: sum(np.abs(_coverage(s, size, cx[i], cy[i], area[i]) - mask[i]).sum() for i in k)
              for s in SHAPES}
    best = min(errors, key=errors.get)
    seen["shape"] = best if errors[best] < 0.6 * area[k].sum() else "none"  # noise fits no template

    # how well it is drawn
    colours = np.array([np.median(frames[i][core[i]], axis=0) for i in k if core[i].any()])
    off = [min(np.linalg.norm(rgb - np.array(named)) for named in palette.values())
           for rgb, palette in ((np.median(frames[core], axis=0), COLOURS), (back, BACKGROUNDS))
           ] if core.any() else [255]
    drift = np.linalg.norm(colours - colours.mean(0), axis=1).mean() / 255 if len(colours) else 1.0
    radius = 0.5 * np.log(np.maximum(area[shown], 1e-6))
    empty = (mask[1:] < 0.02) & (mask[:-1] < 0.02)
    moved = np.hypot(np.diff(cx[shown]), np.diff(cy[shown])) > 0.5
    seen |= dict(
        off_palette=float(sum(off)), misfit=float(errors[best] / area[k].sum()),
        unsteady=float(drift + np.sqrt(np.mean((np.polyval(slope[2], k) - radius) ** 2))),
        flicker=float(np.abs(np.diff(frames, axis=0)).mean(-1)[empty].mean()) if empty.any() else 255.0,
        moving=float(np.mean(moved | (abs(np.diff(radius)) > 0.03))) if len(k) > 1 else 0.0)
    return seen | {"speed": float(np.hypot(slope[0][0], slope[1][0])), "size": float(area.mean()),
                   "smoothness": bend}


def judge_captions(videos, captions) -> dict:
    """Clips (n,3,f,h,w) in [-1,1] and tiny-world captions -> share of clips that are right, per attribute.

    "joint": all that the caption mentions is right. A caption without a background is not judged on it.
    """
    hits = {a: [] for a in (*ATTRIBUTES, "joint")}
    for video, caption in zip(videos, captions):
        seen, asked = judge(video), parse(caption)
        right = {a: seen[a] == asked[a] for a in asked}
        for a, ok in right.items():
            hits[a].append(ok)
        hits["joint"].append(all(right.values()))
    return {a: float(np.mean(v)) for a, v in hits.items() if v}


# ---- OmniScore (VideoDPO, arXiv 2412.14167): seven dimensions of VBench (2311.17982) in one number

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


def omniscore(values: dict, table=None, semantic=("overall_consistency",), shares=(4, 1)) -> dict:
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


# the seven dimensions, each a number near 0..1 for one clip. A clip is (3,f,h,w) in [-1,1]; features (f,d).

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
        return values | omniscore(values, OMNISCORE_TINY if tiny else OMNISCORE)
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


# ---- scores and pairs of a folder of clips, in the layout of VideoDPO's released data (data.read_clips)

def select_pair(totals):
    """OmniScores of one prompt's clips -> indices of the best and of the worst, the product of the two."""
    best, worst = (pick(range(len(totals)), key=totals.__getitem__) for pick in (max, min))
    return best, worst, totals[best] * totals[worst]



def pair_weight(score, alpha, numerator=0.72):
    """(0.72 / score)^alpha: 0.72 was about the largest product, so that rarer, lower pairs weigh more."""
    return (numerator / score) ** alpha


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


def pair_folder(env, folder, score="product", drop=0.0, split_average=False):
    """Best against worst of each prompt's clips -> folder/pair.json.

    score: "product" of the two OmniScores, as released; "histogram": the product of their shares among all
    clips, as in the paper, 0.72 for the commonest pair. drop: share of pairs left out, those most alike;
    split_average: keep those with the mean of all clips in between.
    """
    clips, prompts, rows = read_clips(folder), {}, []
    totals = {row["clip"]: row["total"] for row in read_lines(Path(folder, "scores.jsonl"))}
    absent = [path.name for path, _ in clips if path.name not in totals]
    if absent:
        raise UserError(f"{folder}: {absent[0]} has no score yet: --stage score first")
    totals = [totals[path.name] for path, _ in clips]
    for i, (path, _) in enumerate(clips):
        prompts.setdefault(path.stem.rsplit("-", 1)[0], []).append(i)
    counts, edges = np.histogram(totals, bins=20)
    share = counts[np.searchsorted(edges[1:-1], totals, side="right")] / len(totals)
    for mine in prompts.values():
        best, worst, product = select_pair([totals[i] for i in mine])
        best, worst = mine[best], mine[worst]
        rows.append(dict(
            video1=best, video2=worst, label=0, frame_caption=[clips[best][1]],
            score=max(product, 1e-3) if score == "product" else float(share[best] * share[worst]),
            diff_score=totals[best] - totals[worst]))
    if score == "histogram":
        most = max(row["score"] for row in rows)
        rows = [row | {"score": 0.72 * row["score"] / most} for row in rows]
    alike, mean = sorted(rows, key=lambda row: row["diff_score"])[:int(drop * len(rows))], np.mean(totals)
    kept = [row for row in rows if row["diff_score"] > 0 and row not in alike and (
        not split_average or totals[row["video1"]] > mean > totals[row["video2"]])]
    if not kept:
        raise UserError(f"{folder}: no pair is left; give a smaller --drop-pairs, or more clips: --samples")
    finish(env, Path(folder, "pair.json"), lambda: json.dumps(kept, indent=1))
    if env.main:
        print(f"{folder}: {len(kept)} pairs of {len(prompts)} prompts, mean OmniScore {mean:.4f}", flush=True)


def wins(out, name, judged, prompts):
    """OmniScore of out/NAME/0000.mp4 ... -> means of its parts; "wins": share that beat theirs in before/."""
    scores, first = [], Path(out, "before.json")
    for i, prompt in enumerate(prompts):
        video, fps = read_video(Path(out, name, f"{i:04d}.mp4"))
        scores.append(judged(video, prompt, fps))
    if name == "before":
        write_atomic(first, lambda p: p.write_text(json.dumps(scores)))
    better = [a["total"] > b["total"] for a, b in zip(scores, json.loads(first.read_text()))]
    return {k: float(np.mean([s[k] for s in scores])) for k in scores[0]} | {"wins": float(np.mean(better))}


# ---- the tiny world's subject and motion (DreamVideo)

def _histogram(frame, mask, bins=4):
    """Colours of the pixels (h,w,3) in 0..255 where mask (h,w) is, (bins^3,), sum 1; shared out linearly."""
    place = frame.reshape(-1, 3) / 255 * (bins - 1)
    low = np.minimum(place.astype(int), bins - 2)
    count = np.zeros((bins,) * 3)
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, place - low, 1 - place + low).prod(1) * mask.reshape(-1)
        np.add.at(count, tuple((low + corner).T), weight)
    return count.reshape(-1) / max(count.sum(), 1e-6)


def _aligned(mask, side=24):
    """Mask (h,w) -> (side, side): centred, and scaled so that all areas are alike."""
    (x,), (y,) = _centres(mask[None])
    span = (np.arange(side) + 0.5) / side * 2 - 1
    reach = 1.1 * np.sqrt(max(mask.sum(), 1e-6)) * span
    rows, columns = np.meshgrid(y + reach, x + reach, indexing="ij")
    grid = np.stack([columns / mask.shape[1], rows / mask.shape[0]], -1) * 2 - 1
    mask, grid = torch.from_numpy(mask)[None, None].double(), torch.from_numpy(grid)[None]
    return F.grid_sample(mask, grid, align_corners=False)[0, 0].numpy()


def subject_likeness(videos, subject) -> dict:
    """Clips (n,3,f,h,w) in [-1,1], items of tiny_subject() -> means over all frames and pictures, 0 to 1:

    "colours": intersection of the colour histograms of the two objects; "shape": intersection over union of
    their masks, brought to one centre and area.
    """
    known = []
    for item in subject:
        frame = (item["video"][:, 0].permute(1, 2, 0).numpy() + 1) * 127.5
        mask = item["mask"][0, 0].numpy()
        known.append((_histogram(frame, mask), _aligned(mask)))
    colours, shape = [], []
    for video in videos:
        frames, _, _, masks = _object(video)
        for frame, mask in zip(frames, masks):
            histogram, aligned = _histogram(frame, mask), _aligned(mask)
            colours += [np.minimum(histogram, h).sum() for h, _ in known]
            shape += [np.minimum(aligned, m).sum() / np.maximum(aligned, m).sum() for _, m in known]
    return {"colours": float(np.mean(colours)), "shape": float(np.mean(shape))}


def path_error(videos, path) -> dict:
    """Clips (n,3,f,h,w) in [-1,1], path (f,2) in pixels -> {"path_error"}: root mean square distance of the
    object's centroid from the path, each about its own middle, mean over the clips."""
    target, errors = (path - path.mean(0)).numpy(), []
    for video in videos:
        found = np.stack(_centres(_object(video)[3]), 1)
        errors.append(np.sqrt(((found - found.mean(0) - target) ** 2).sum(1).mean()))
    return {"path_error": float(np.mean(errors))}


# ---- the command

def read_rows(args):
    """-> [(clip, folder of references or None, prompt)], all checked."""
    source = Path(args.clips)
    if source.suffix == ".txt":
        rows = [(source.parent / clip, source.parent / folder, prompt)
                for clip, folder, prompt in read_triples(source)]
    else:
        clips = list_videos(source)
        prompts = prompts_of(clips, args.prompts)
        if "" in prompts:
            raise UserError(f"{clips[prompts.index('')]}: no prompt in index.jsonl beside it; give --prompts "
                            "FILE, a line a clip in the order of their names")
        rows = [(clip, args.references and Path(args.references), p) for clip, p in zip(clips, prompts)]
    for clip, folder, _ in rows:
        if not clip.exists():
            raise UserError(f"{clip}: no such clip")
        if folder and not references(folder):
            raise UserError(f"{folder}: no pictures of the subject there ({', '.join(IMAGES)})")
    return rows


def references(folder):
    """Picture files in a folder, in order."""
    return sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGES)


@torch.no_grad()
def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("clips", help="folder of clips, or .txt of lines clip|||folder of references|||prompt")
    p.add_argument("--references", metavar="FOLDER", help="pictures of the subject, for CLIP-I and DINO-I")
    p.add_argument("--prompts", help="file of prompts, a line a clip (default: index.jsonl of the folder)")
    p.add_argument("--clip-weights", metavar="FILE", help="OpenAI's ViT-B-32.pt (default: open_clip's hub)")
    p.add_argument("--clip-model", default="ViT-B-32-quickgelu", help="open_clip's name of the CLIP")
    p.add_argument("--dino-weights", metavar="FILE", help="dino_deitsmall16_pretrain.pth (default: its site)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = p.parse_args(argv)
    rows, scores = read_rows(args), []
    clip = clip_towers(args.clip_weights, args.device, args.clip_model)
    dino = dino_tower(args.dino_weights, args.device) if any(folder for _, folder, _ in rows) else None
    for path, folder, prompt in rows:
        frames = [Image.fromarray(frame) for frame in to_uint8(read_video(path)[0])]
        pictures = [open_image(file) for file in references(folder)] if folder else []
        scores.append(score_clip(frames, prompt, pictures, clip, dino))
        print(path.name, " ".join(f"{k} {v:.4f}" for k, v in scores[-1].items()), flush=True)
    names = dict.fromkeys(k for s in scores for k in s)
    mean = {k: float(np.mean([s[k] for s in scores if k in s])) for k in names}
    print(f"mean of {len(rows)} clips:", " ".join(f"{k} {v:.4f}" for k, v in mean.items()))
    clips = [dict(clip=str(path), prompt=prompt, **s) for (path, _, prompt), s in zip(rows, scores)]
    text = json.dumps(dict(mean=mean, clips=clips), indent=1)
    write_atomic(rows[0][0].parent / "scores.json", lambda p: p.write_text(text))


if __name__ == "__main__":
    main()
