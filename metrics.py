"""Metrics. For real videos: cosines of encoder features (DreamVideo, arXiv 2312.04433).

    CLIP-T  cosine(CLIP of the frames, CLIP of the prompt)            temporal_consistency(CLIP of the frames)
    CLIP-I  cosine(CLIP of the frames, CLIP of the subject's pictures)
    DINO-I  cosine(DINO of the frames, DINO of the subject's pictures)

The tiny world's judge reads shape, colour, background, motion, speed and smoothness off a clip.

The judge learns nothing and shares no code with the rewards: it is never a reward, so it can tell when a
reward is hacked.
"""
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from data import BACKGROUNDS, COLOURS, SHAPES, parse

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
