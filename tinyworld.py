"""The tiny world: procedural captioned clips, the judge that reads them, the scorer that rewards
them.

Everything about it is here: scenes, captions, data sets, the judge, the learned scorer, the text
encoder and the training of its small autoencoders. Clips are 8 frames of 32x32 with one coloured
shape on a plain background that moves, grows, shrinks or stands still.

The judge reads shape, colour, background, motion, speed and smoothness off a clip. It learns
nothing and shares no code with the scorer, and it is never a reward, so it can tell when a reward
is hacked.

    python tinyworld.py --train scorer           # trains assets/tiny-scorer.safetensors
    python tinyworld.py --train autoencoder      # trains the autoencoder in assets/tiny.safetensors
    python tinyworld.py --train autoencoder --flawed --steps 800    # goes on, on flawed clips, too
"""
from common import Parser, UserError, run_command  # first: for signals
import copy
import time
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from data import Few, to_uint8
from text_encoders import Transformer, insert_vectors
from tracks import dense_colours, draw_tracks, to_video
from vae import AutoencoderKL, CogVideoXVAE, CogVideoXVAEConfig, VAEConfig
from weights import load_safetensors, load_weights, replace_part

# ---- scenes and captions

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (230, 40, 40), "green": (60, 220, 80), "blue": (60, 100, 255), "yellow": (240, 220, 50),
    "purple": (180, 80, 230), "orange": (245, 140, 30), "cyan": (60, 210, 220),
    "white": (250, 250, 250)}
BACKGROUNDS = {"black": (15, 15, 20), "gray": (70, 70, 75), "brown": (95, 55, 30)}
MOTIONS = (
    "moving left", "moving right", "moving up", "moving down", "growing", "shrinking",
    "standing still")
DIRECTIONS = {
    "moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
NEW_MOTIONS = ("zigzagging", "circling")  # no base is trained on them: for fine-tuning
NEW_COLOURS = {"salmon": (245, 150, 130), "pink": (250, 110, 170)}
TINY_WORDS = sorted({
    w for part in (SHAPES, COLOURS, BACKGROUNDS, MOTIONS, ("a on background",))
    for p in part for w in p.split()})
TINY_SIZE, TINY_FRAMES, TINY_FPS = 32, 8, 8


@dataclass(frozen=True)
class Scene:
    """Ground truth of one tiny clip; lengths in pixels of a 32 x 32 frame."""
    shape: str
    colour: str
    background: str
    motion: str
    x: np.ndarray       # (f,) centre
    y: np.ndarray       # (f,)
    radius: np.ndarray  # (f,) of the circle of the same area
    stripe: str | None = None  # colour of a band across the middle

    def caption(self, with_background=True):
        tail = f" on a {self.background} background" if with_background else ""
        return f"a {self.colour} {self.shape} {self.motion}{tail}"


def tiny_captions():
    """All 504 captions with a background, in a fixed order."""
    return [f"a {c} {s} {m} on a {b} background"
            for s in SHAPES for c in COLOURS for m in MOTIONS for b in BACKGROUNDS]


def parse(caption) -> dict:
    """A tiny-world prompt -> {attribute: word} for the attributes that it mentions."""
    choices = {"shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS,
               "motion": MOTIONS + NEW_MOTIONS}
    text = f" {caption.lower()} "
    return {attribute: word for attribute, words in choices.items() for word in words
            if f" {word} " in text}


def tiny_prompts(held_out=False, n=64):
    """The captions that alignment trains on, or the n that it never sees (the base has seen all
    504)."""
    captions = tiny_captions()
    order = np.random.default_rng(0).permutation(len(captions))
    return [captions[i] for i in (order[-n:] if held_out else order[:-n])]


def new_path(rng, motion, travel, time):
    """Path of one of NEW_MOTIONS about its middle, (x, y) in pixels; time (f,) from -0.5 to
    0.5."""
    if motion == "circling":  # once around, clockwise, from anywhere
        radius, angle = rng.uniform(4.5, 5.5), rng.uniform(0, 2 * np.pi) + 2 * np.pi * time
        return radius * np.cos(angle), radius * np.sin(angle)
    # from one side to the other, in three strokes up and down
    side, first, height = rng.choice((-1, 1)), rng.choice((-1, 1)), rng.uniform(3.5, 4.5)
    strokes = 1 - 2 * abs(3 * (time + 0.5) % 2 - 1)  # -1, 1, -1, 1
    return side * travel * time, first * height * strokes


TRAVEL = 10, 13  # how far a shape moves in a clip, in pixels: from, to


def tiny_scene(rng, shape=None, colour=None, background=None, motion=None, frames=TINY_FRAMES,
               travel=TRAVEL):
    """A random Scene from a numpy Generator; what is given is kept. The shape stays inside the
    frame."""
    def pick(given, choices):
        # drawn in any case: the rest of the scene does not depend on what is given
        drawn = choices[rng.integers(len(choices))]
        return given or drawn
    shape, colour = pick(shape, SHAPES), pick(colour, tuple(COLOURS))
    background, motion = pick(background, tuple(BACKGROUNDS)), pick(motion, MOTIONS)
    time = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    # The words say nearly all. What is drawn at random here is what the noise can tell: with wide
    # random positions a small network learns to read the path from the noise and ignores the
    # words.
    ranges = ((4.8, 6.2), travel, (2.0, 2.4), (-2, 2), (-2, 2))
    radius, travel, ratio, u, v = (rng.uniform(*r) for r in ranges)
    dx, dy = DIRECTIONS.get(motion, (0, 0))
    growth = {"growing": 1, "shrinking": -1}.get(motion, 0) * np.log(ratio)
    r = radius * np.exp(growth * time)
    # a triangle's corner is 1.56 radii away, but it never points sideways and down at once
    reach = 1.35 * r.max()
    u, v = (np.clip(offset, -room, room) for offset, d in ((u, dx), (v, dy))
            for room in [max(0.0, TINY_SIZE / 2 - reach - travel / 2 * abs(d))])
    x = TINY_SIZE / 2 + u + dx * travel * time
    y = TINY_SIZE / 2 + v + dy * travel * time
    if motion in NEW_MOTIONS:  # drawn last: the other motions' scenes stay as they were
        paths = new_path(rng, motion, travel, time)
        rooms = [max(0.0, TINY_SIZE / 2 - reach - abs(path).max()) for path in paths]
        x, y = (TINY_SIZE / 2 + np.clip(offset, -room, room) + path
                for offset, room, path in zip((u, v), rooms, paths))
    return Scene(shape, colour, background, motion, x, y, np.broadcast_to(r, x.shape))


def signed_distance(shape, x, y, r):
    """Pixels from points (x, y), relative to the centre, to the shape's edge; negative inside.

    The shape has the area of a disc of radius r.
    """
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        half = r * np.sqrt(np.pi) / 2
        return np.maximum(np.abs(x), np.abs(y)) - half
    if shape == "star":
        return star_distance(x / r, y / r) * r
    inner = r * np.sqrt(np.pi / (3 * np.sqrt(3)))  # inradius of the equilateral triangle (point up)
    return np.maximum(y - inner, (np.abs(x) * np.sqrt(3) - y) / 2 - inner)


def star_distance(x, y):
    """signed_distance of a star of five points, point up, with the area of the unit disc."""
    angle, reach = np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, 0.5, 1.0)
    # it is made of ten triangles of area 0.5 sin(pi / 5) / 2
    reach = reach * np.sqrt(np.pi / (2.5 * np.sin(np.pi / 5)))
    corners = np.stack([reach * np.sin(angle), -reach * np.cos(angle)], 1)
    distance, inside = np.inf, False
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0)):
        dx, dy = bx - ax, by - ay
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        distance = np.minimum(distance, np.hypot(x - ax - along * dx, y - ay - along * dy))
        crossed = ((ay > y) != (by > y)) & (x < ax + dx * (y - ay) / dy)  # by a ray to the right
        inside = inside ^ crossed
    return np.where(inside, -distance, distance)


def render(scene, with_mask=False, flaws=None):
    """Scene -> video (3,f,32,32) float32 in [-1,1], edges anti-aliased over one pixel.

    with_mask: (video, mask (1,f,32,32): 1 where the object is). flaws: Flaws that spoil it.
    """
    if flaws:
        scene = replace(scene, x=scene.x + flaws.shake[0], y=scene.y + flaws.shake[1])
    centre = np.arange(TINY_SIZE) + 0.5
    gx = centre[None, None, :] - scene.x[:, None, None]  # f 1 w
    gy = centre[None, :, None] - scene.y[:, None, None]  # f h 1
    gx, gy = np.broadcast_arrays(gx, gy)
    alpha = np.clip(0.5 - signed_distance(scene.shape, gx, gy, scene.radius[:, None, None]), 0, 1)
    palette = COLOURS | NEW_COLOURS | BACKGROUNDS
    front, back, stripe = (np.array(palette[c], dtype=np.float32)[:, None, None, None] / 127.5 - 1
                           for c in (scene.colour, scene.background, scene.stripe or scene.colour))
    if scene.stripe:
        band = np.clip(0.5 + 0.45 * scene.radius[:, None, None] - np.abs(gy), 0, 1)
        front = front + (stripe - front) * band
    video = back + (front - back) * alpha
    if flaws:
        video = (video + 1) * flaws.brightness[:, None, None] - 1
        for rows, columns in MARK:
            video[..., rows, columns] += flaws.mark * (1 - video[..., rows, columns])
    video = torch.from_numpy(video.astype(np.float32))
    return (video, torch.from_numpy((alpha[None] > 0.5).astype(np.float32))) if with_mask else video


def tiny_batch(seed, n, frames=TINY_FRAMES, drop_background=0.2, motion=None, travel=TRAVEL,
               flawed=False):
    """-> (videos (n,3,f,32,32) in [-1,1], captions, scenes), from the seed (int or tuple of ints)
    alone. flawed: some are spoiled, see tiny_flaws()."""
    rng = np.random.default_rng(seed)
    scenes = [tiny_scene(rng, motion=motion, frames=frames, travel=travel) for _ in range(n)]
    captions = [s.caption(with_background=rng.random() >= drop_background) for s in scenes]
    flaws = [tiny_flaws(rng, frames) if flawed else None for _ in range(n)]
    videos = [render(scene, flaws=spoiled) for scene, spoiled in zip(scenes, flaws)]
    return torch.stack(videos), captions, scenes


# ---- flaws: what clips scraped from the web look like

# a stock footage company's mark: five light blocks in a row, (rows, columns)
MARK = tuple((slice(20, 25), slice(left, left + 4)) for left in (3, 9, 15, 21, 27))
FLAW_SHARES = {"marked": 0.6, "flickering": 0.3, "shaking": 0.3}  # of the clips of base "tiny"


@dataclass(frozen=True)
class Flaws:
    """What spoils a clip of f frames. No caption tells of it."""
    mark: float             # opacity of the mark, 0 to 1
    brightness: np.ndarray  # (f,) factor of each frame
    shake: np.ndarray       # (2,f) by which an unsteady hand moves the picture, in pixels

    def times(self, strength):
        """The same flaws, weaker: strength 0 to 1."""
        return Flaws(strength * self.mark, 1 - strength * (1 - self.brightness),
                     strength * self.shake)

    def amount(self):
        """How bad all flaws are together; each one at its full strength is about 1."""
        return (self.mark / 0.5 + (1 - self.brightness.min()) / 0.5
                + np.abs(self.shake).mean() / 1.25)


def tiny_flaws(rng, frames=TINY_FRAMES, **has):
    """Random Flaws from a numpy Generator. has: {name of FLAW_SHARES: bool}; others are drawn."""
    drawn = {name: rng.random() < share for name, share in FLAW_SHARES.items()} | has
    brightness, shake = rng.uniform(0.45, 1, frames), rng.uniform(-2.5, 2.5, (2, frames))
    return Flaws(0.5 if drawn["marked"] else 0.0,
                 brightness if drawn["flickering"] else np.ones(frames),
                 shake if drawn["shaking"] else np.zeros((2, frames)))


TRAINING, HELD_OUT = 10 ** 6, 10 ** 6 + 1  # in the seeds of clips: the two never meet


# ---- data sets

class TinyWorld(torch.utils.data.Dataset):
    """`n` fixed clips of the tiny world: item (i, _) -> {"video" (3,f,32,32), "text"}; f = 1
    gives images.

    motion: of all clips; None: any of MOTIONS. replay: share of clips with any of MOTIONS all the
    same. captions: what the clips show in turn, such as those that a test does not hold out. depth:
    with "depth" (1,f,32,32), 1 where the object is, which is in front. flawed: some clips are
    spoiled, see tiny_flaws().
    """

    def __init__(self, n, frames=TINY_FRAMES, seed=0, motion=None, captions=None, travel=TRAVEL,
                 depth=False, flawed=False, replay=0.0):
        self.n, self.frames, self.seed = n, frames, seed
        self.motion, self.replay, self.captions = motion, replay, captions
        self.travel, self.depth, self.flawed = travel, depth, flawed

    def __len__(self):
        return self.n

    def __getitem__(self, item):
        i, _ = item
        if self.captions:
            text = self.captions[i % len(self.captions)]
            rng = np.random.default_rng((self.seed, TRAINING, i))
            scene = tiny_scene(rng, **parse(text), frames=self.frames)
            flaws = tiny_flaws(rng, self.frames) if self.flawed else None
            return {"video": render(scene, flaws=flaws), "text": text}
        motion = None if i < self.replay * self.n else self.motion
        video, captions, scenes = tiny_batch(
            (self.seed, TRAINING, i), 1, self.frames, motion=motion, travel=self.travel,
            flawed=self.flawed)
        depth = {"depth": render(scenes[0], with_mask=True)[1]} if self.depth else {}
        return {"video": video[0], "text": captions[0], **depth}


def tiny_pairs(seed, n, frames=TINY_FRAMES, motion=None):
    """Held-out (first frame, caption) pairs -> (clips (n,3,f,32,32), captions); no TinyWorld
    holds them."""
    return tiny_batch((seed, HELD_OUT), n, frames, drop_background=0.0, motion=motion)[:2]


def tiny_subject(seed, n):
    """n pictures of a star with a stripe, in colours that no word names -> items as
    read_subject() has."""
    rng, items = np.random.default_rng((seed, TRAINING)), []
    for i in range(n):
        x, y = rng.uniform(13.5, 18.5, 2)
        back = tuple(BACKGROUNDS)[i % len(BACKGROUNDS)]
        scene = Scene("star", "pink", back, "standing still", np.array([x]), np.array([y]),
                      rng.uniform(6.0, 7.0, 1), stripe="salmon")
        video, mask = render(scene, with_mask=True)
        text = f"a * standing still on a {back} background"
        items.append({"video": video, "mask": mask, "text": text})
    return items


def moved_pictures(items, frames, travel=9):
    """Items of tiny_subject() -> clips of them: each stands still, and moves in each of DIRECTIONS.

    A picture is shifted by up to travel / 2 pixels to either side, and what it uncovers looks like
    the picture's edge. The caption says which way it moves.
    """
    clips, time = [], torch.linspace(-0.5, 0.5, frames)
    for item in items:
        for motion, (dx, dy) in ({"standing still": (0, 0)} | DIRECTIONS).items():
            shift = torch.eye(2, 3).repeat(frames, 1, 1)
            shift[:, :, 2] = -travel * time[:, None] * torch.tensor([dx, dy]) / (TINY_SIZE / 2)
            clip = {"text": item["text"].replace("standing still", motion)}
            for name in ("video", "mask"):
                still = item[name][:, 0].expand(frames, -1, -1, -1)
                grid = F.affine_grid(shift, still.shape, align_corners=False)
                moved = F.grid_sample(still, grid, padding_mode="border", align_corners=False)
                clip[name] = moved.transpose(0, 1)
            clips.append(clip)
    return clips


def tiny_motion(seed, n, motion, frames=TINY_FRAMES):
    """n clips of different objects on one path of NEW_MOTIONS -> Few, the path (f,2) in pixels."""
    rng, items = np.random.default_rng((seed, TRAINING)), []
    path = np.stack(new_path(rng, motion, 11.5, np.linspace(-0.5, 0.5, frames)), 1)
    colours = rng.permutation(list(COLOURS))
    for i in range(n):
        shape, back = SHAPES[i % len(SHAPES)], tuple(BACKGROUNDS)[i % len(BACKGROUNDS)]
        scene = tiny_scene(rng, shape, str(colours[i]), back, "standing still", frames)
        # a little off the middle, so that the whole path fits
        x, y = (TINY_SIZE / 2 + 0.5 * (v - TINY_SIZE / 2) + p
                for v, p in zip((scene.x, scene.y), path.T))
        scene = replace(scene, x=x, y=y, motion="moving")
        items.append({"video": render(scene), "text": scene.caption()})
    return Few(items), torch.from_numpy(path).float()


def tiny_previews(subject):
    """[(picture or None, prompt)]: "a *" and known motions, or known objects that are just
    "moving"."""
    if subject:
        words = ("moving left on a gray", "moving up on a black", "growing on a brown",
                 "standing still on a gray")
        return [(None, f"a * {w} background") for w in words]
    objects = (("circle", "red", "gray"), ("square", "blue", "black"),
               ("triangle", "yellow", "brown"), ("circle", "white", "black"))
    pairs = []
    for words in objects:
        scene = tiny_scene(np.random.default_rng(0), *words, "standing still", 1)
        picture = Image.fromarray(to_uint8(render(scene))[0])
        pairs.append((picture, replace(scene, motion="moving").caption()))
    return pairs


TINY_TRACKS = ("wandering", "zigzagging", "camera")  # das.py trains on the first alone


def tiny_track_scene(rng, motion, frames):
    """A Scene for das.py: "wandering" (a smooth path, at most 1.2 waves across and down),
    "zigzagging" (1.5, with corners), or "camera": as if the camera wandered. No words tell the
    path, only tracks do."""
    known = "zigzagging" if motion == "zigzagging" else "standing still"
    scene = tiny_scene(rng, motion=known, frames=frames)
    if motion == "zigzagging":
        return scene
    reach, places, time = 1.35 * scene.radius.max(), [], np.linspace(0, 1, frames)
    for _ in "xy":
        size, turns, start = rng.uniform(3, 8), rng.uniform(0.2, 1.2), rng.uniform(0, 1)
        p = size * np.sin(2 * np.pi * (turns * time + start))
        middle, room = (p.max() + p.min()) / 2, max(0.0, TINY_SIZE / 2 - reach - np.ptp(p) / 2)
        places.append(TINY_SIZE / 2 + p - middle + rng.uniform(-room, room))
    return Scene(scene.shape, scene.colour, scene.background, motion, *places, scene.radius)


def tiny_tracks(scene):
    """The true tracks of a Scene, drawn: (3,f,32,32) in [-1,1].

    The object is nearer than the background, which stands still, or for the motion "camera" moves
    with it.
    """
    size, centre = (TINY_SIZE, TINY_SIZE), np.arange(TINY_SIZE) + 0.5
    x, y = (g.reshape(-1) for g in np.meshgrid(centre, centre))
    own = signed_distance(scene.shape, x - scene.x[0], y - scene.y[0], scene.radius[0]) < 0
    moves = own | (scene.motion == "camera")
    points = np.stack([x, y, np.where(own, 1.0, 2.0)], axis=-1)
    shifts = np.stack([scene.x - scene.x[0], scene.y - scene.y[0], 0 * scene.x], axis=-1)
    frames = (points + moves[:, None] * shift for shift in shifts)
    return to_video(draw_tracks(frames, dense_colours(points[:, 2], size), size))


def tiny_track_clip(seed, motion, frames):
    """-> {"video", "tracks", "text"} and its Scene, from the seed alone; the caption names no
    motion."""
    scene = tiny_track_scene(np.random.default_rng(seed), motion, frames)
    text = f"a {scene.colour} {scene.shape} on a {scene.background} background"
    return {"video": render(scene), "tracks": tiny_tracks(scene), "text": text}, scene


class TinyTracks(torch.utils.data.Dataset):
    """`n` fixed clips of the tiny world with their tracks; item (i, _)."""

    def __init__(self, n, frames, seed=0, motion="wandering"):
        self.n, self.frames, self.seed, self.motion = n, frames, seed, motion

    def __len__(self):
        return self.n

    def __getitem__(self, item):
        return tiny_track_clip((self.seed, TRAINING, item[0]), self.motion, self.frames)[0]


def held_out_tracks(n, frames, seed=0):
    """n clips of each of TINY_TRACKS -> [{"video", "tracks", "text", "motion", "scene"}]."""
    clips = []
    for m, motion in enumerate(TINY_TRACKS):
        for i in range(n):
            clip, scene = tiny_track_clip((seed, HELD_OUT, m, i), motion, frames)
            clips.append(clip | {"motion": motion, "scene": scene})
    return clips


# ---- the judge

ATTRIBUTES = ("shape", "colour", "background", "motion")
# a flaw counts from here on: opacity of the mark, share by which the darkest frame is darker,
# distance from a straight path in pixels
MARKED, FLICKERING, SHAKING = 0.1, 0.15, 0.8


def _nearest(rgb, palette):
    names = list(palette)
    return names[int(np.argmin([np.sum((rgb - np.array(palette[n])) ** 2) for n in names]))]


def _coverage(shape, size, cx, cy, area, sub=4):
    """(size, size) share of each pixel that the shape covers, counted on sub x sub points a
    pixel."""
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


def _edges(frames):
    """Frames (f,h,w,3) -> the pixels along their four sides (f,n,3)."""
    sides = [frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]]
    return np.concatenate(sides, axis=1)


def _mark_opacities(frames, back):
    """Frames (f,32,32,3) in 0..255, their backgrounds (f,3) -> opacity (5,) of each block of MARK.

    A block is measured where its surroundings are background; nan if they never are.
    """
    back, opacities = back[:, None, None], []
    covered = np.sqrt(((frames - back) ** 2).sum(-1)) > 30  # f h w
    light = ((frames - back) / (255 - back)).mean(-1)
    for rows, columns in MARK:
        around = np.zeros(frames.shape[1:3], bool)
        around[rows.start - 2:rows.stop + 2, columns.start - 2:columns.stop + 2] = True
        around[rows, columns] = False
        clear = covered[:, around].mean(1) < 0.2
        block = light[:, rows, columns].mean((1, 2))
        opacities.append(np.median(block[clear]) if clear.any() else np.nan)
    return np.array(opacities)


def _brightness(frames, back):
    """Frames (f,h,w,3), their backgrounds (f,3) -> (f,) brightness, 1 for the brightest frame.

    By the colours of background and object together: a black background alone tells little.
    """
    distance = np.sqrt(((frames - back[:, None, None]) ** 2).sum(-1)).reshape(len(frames), -1)
    level = np.percentile(distance, 98, axis=1)
    colours = []
    for k, frame in enumerate(frames):
        core = distance[k] > 0.8 * level[k]
        shown = np.median(frame.reshape(-1, 3)[core], axis=0) if level[k] > 25 else 0 * back[k]
        colours.append([*back[k], *shown])
    colours = np.array(colours)
    brightest = colours[np.argmax((colours ** 2).sum(1))]
    return colours @ brightest / max(brightest @ brightest, 1e-6)


def _without_flaws(video):
    """Clip (3,f,h,w) in [-1,1] -> frames (f,h,w,3) in 0..255 without mark and flicker, and how
    much there was: {"mark": opacity, "flicker": how much darker the darkest frame is}, 0 to 1."""
    pixels = ((video.detach().float().cpu().numpy() + 1) * 127.5).clip(0, 255)
    frames, mark = pixels.transpose(1, 2, 3, 0).copy(), 0.0  # f h w c
    back = np.median(_edges(frames), axis=1)
    if frames.shape[1:3] == (TINY_SIZE, TINY_SIZE):
        opacities = _mark_opacities(frames, back)
        known = opacities[~np.isnan(opacities)]
        mark = float(known.mean()) if len(known) else 0.0
        if mark > MARKED:
            opacities = np.nan_to_num(opacities, nan=mark).clip(0, 0.9)
            for (rows, columns), opacity in zip(MARK, opacities):
                block = frames[:, rows, columns]
                frames[:, rows, columns] = (block - 255 * opacity).clip(0) / (1 - opacity)
    brightness = _brightness(frames, back)
    flicker = 1 - float(brightness.min())
    if flicker > FLICKERING:
        frames = (frames / brightness.clip(0.2)[:, None, None, None]).clip(0, 255)
    return frames, {"mark": max(mark, 0.0), "flicker": flicker}


def _object(video):
    """(3,f,h,w) in [-1,1] -> frames (f,h,w,3) 0..255 without flaws, the background's colour, the
    object's distance from it, its mask (f,h,w) from 0 to 1, the flaws."""
    frames, flaws = _without_flaws(video)
    f = frames.shape[0]
    back = np.median(_edges(frames).reshape(-1, 3), axis=0)
    distance = np.sqrt(((frames - back) ** 2).sum(-1))                 # f h w
    level = np.percentile(distance.reshape(f, -1), 97, axis=1)         # of the object, per frame
    strong = np.median(level)
    mask = np.clip((distance / max(strong, 1e-6) - 0.25) / 0.5, 0, 1)  # soft, 0.5 half-way
    return frames, back, strong, mask, flaws


def _centres(mask):
    """Masks (f,h,w) -> x (f,), y (f,) of their centroids, in pixels."""
    grid, area = np.arange(mask.shape[1]) + 0.5, np.maximum(mask.sum((1, 2)), 1e-6)
    return (mask.sum(1) * grid).sum(1) / area, (mask.sum(2) * grid).sum(1) / area


def position_error(video, x, y):
    """Clip (3,f,h,w) in [-1,1], true centre x (f,), y (f,) in pixels -> mean distance, in frame
    widths.

    Half a width for a frame in which there is no object.
    """
    _, _, strong, mask, _ = _object(video)
    cx, cy = _centres(mask)
    area, size = mask.sum((1, 2)), mask.shape[2]
    shown = (area > 4) & (area < 0.8 * size * size) & (strong > 25)
    return float(np.where(shown, np.hypot(cx - x, cy - y) / size, 0.5).mean())


def judge_tracked(videos, clips):
    """Videos made from the tracks of held_out_tracks() -> {"position", "shape", "misfit": {motion:
    mean}}: position_error(), share of right shapes, misfit of the outline (see judge())."""
    rows = {}
    for video, clip in zip(videos, clips):
        seen, scene = judge(video), clip["scene"]
        row = (position_error(video, scene.x, scene.y), seen["shape"] == scene.shape,
               seen.get("misfit", 1.0))  # there is none where there is no object
        rows.setdefault(clip["motion"], []).append(row)
    means = {motion: np.mean(values, 0).tolist() for motion, values in rows.items()}
    return {name: {motion: mean[k] for motion, mean in means.items()}
            for k, name in enumerate(("position", "shape", "misfit"))}


def judge(video: Tensor) -> dict:
    """What one clip (3,f,h,w) in [-1,1] shows: shape, colour, background, motion (words), its flaws
    marked, flickering, shaking (bool), which are taken off before the words are read, and numbers:

    mark: opacity; flicker: share by which the darkest frame is darker than the brightest; speed:
    pixels per frame along the straight line through the object's centroids; size: mean area in
    pixels; smoothness: root mean square distance of the centroids from that line, in pixels (0 is
    perfectly smooth); visible: share of frames with an object; misfit: of the outline and the best
    template, as a share of the area; off_palette: distance of the two colours from the named ones.
    """
    frames, back, strong, mask, flaws = _object(video)
    size, area = frames.shape[1], mask.sum((1, 2))
    shown = (area > 4) & (strong > 25)
    verdict = {"background": _nearest(back, BACKGROUNDS), "visible": float(shown.mean())} | flaws
    verdict |= {"marked": flaws["mark"] > MARKED, "flickering": flaws["flicker"] > FLICKERING}
    if shown.mean() < 0.75 or area.max() > 0.8 * size * size:
        return verdict | {"shape": "none", "colour": "none", "motion": "none",
                          "shaking": False, "speed": 0.0, "size": float(area.mean()),
                          "smoothness": 99.0}
    core = mask > 0.95
    colour = np.median(frames[core], axis=0) if core.any() else None
    if colour is not None and verdict["flickering"]:
        colour = colour * 240 / max(colour.max(), 1)  # the brightest frame is dark, too
    verdict["colour"] = "none" if colour is None else _nearest(colour, COLOURS)
    cx, cy = _centres(mask)

    # straight lines through centroids and log radius, over the frames that show the object
    k, radius = np.arange(len(area))[shown], 0.5 * np.log(np.maximum(area[shown], 1e-6))
    lines = [np.polyfit(k, y, 1) for y in (cx[shown], cy[shown], radius)]
    residual = [np.polyval(s, k) - y for s, y in zip(lines, (cx[shown], cy[shown]))]
    bend = float(np.sqrt(np.mean(np.square(residual).sum(0))))
    changes = [s[0] * (len(area) - 1) for s in lines]
    verdict["motion"] = _motion_word(cx[shown], cy[shown], *changes, bend)
    verdict["shaking"] = bend > SHAKING and verdict["motion"] not in NEW_MOTIONS
    verdict["shape"], misfit = _shape_word(mask, cx, cy, area, k)

    verdict |= {"misfit": misfit, "off_palette": _off_palette(colour, back)}
    return verdict | {"speed": float(np.hypot(lines[0][0], lines[1][0])),
                      "size": float(area.mean()), "smoothness": bend}


def _motion_word(cx, cy, dx, dy, growth, bend):
    """Centroids (f,), change of place (pixels) and of log radius over the clip, and bend -> a
    motion."""
    if _enclosed(cx, cy) > 35:
        return "circling"
    across = cy if abs(dx) > abs(dy) else cx
    if bend > 1.5 and np.ptp(across) > 6 and _turns(across) >= 2:
        return "zigzagging"
    if max(abs(dx), abs(dy)) > (6 if bend > SHAKING else 4):
        if abs(dx) > abs(dy):
            return "moving right" if dx > 0 else "moving left"
        return "moving down" if dy > 0 else "moving up"
    if abs(growth) > 0.35:
        return "growing" if growth > 0 else "shrinking"
    return "standing still"


def _shape_word(mask, cx, cy, area, k):
    """The template that fits best at the measured centres and areas of frames k -> shape,
    misfit."""
    size = mask.shape[1]
    errors = {s: sum(np.abs(_coverage(s, size, cx[i], cy[i], area[i]) - mask[i]).sum() for i in k)
              for s in SHAPES}
    best = min(errors, key=errors.get)
    misfit = float(errors[best] / area[k].sum())
    return (best if misfit < 0.6 else "none"), misfit  # noise fits no template


def _off_palette(colour, back):
    """Distance of the object's colour (3,) or None and of the background's from the named ones."""
    if colour is None:
        return 255.0
    return float(sum(min(np.linalg.norm(rgb - np.array(named)) for named in palette.values())
                     for rgb, palette in ((colour, COLOURS), (back, BACKGROUNDS))))


def judge_captions(videos, captions) -> dict:
    """Clips (n,3,f,h,w) in [-1,1] and tiny-world captions -> share of clips that are right, per
    attribute, and of those with each flaw.

    "joint": all that the caption mentions is right. A caption without a background is not judged
    on it.
    """
    hits = {a: [] for a in (*ATTRIBUTES, "joint", *FLAW_SHARES)}
    for video, caption in zip(videos, captions):
        seen, asked = judge(video), parse(caption)
        right = {a: seen[a] == asked[a] for a in asked}
        for a, ok in right.items():
            hits[a].append(ok)
        hits["joint"].append(all(right.values()))
        for flaw in FLAW_SHARES:
            hits[flaw].append(seen[flaw])
    return {a: float(np.mean(v)) for a, v in hits.items() if v}


def _histogram(frame, mask, bins=4):
    """Colours of the pixels (h,w,3) in 0..255 where mask (h,w) is, (bins^3,), sum 1; shared out
    linearly."""
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


def _looks(frames, masks):
    """Frames (f,h,w,3) in 0..255, masks (f,h,w) of the object -> its colours and shape in each."""
    return [(_histogram(frame, mask), _aligned(mask)) for frame, mask in zip(frames, masks)]


def _alike(a, b):
    """Two of _looks() -> colours: intersection of the histograms; shape: intersection over union of
    the masks, brought to one centre and area. 0 to 1."""
    (colours, shape), (other_colours, other_shape) = a, b
    union = np.maximum(shape, other_shape).sum()
    return np.minimum(colours, other_colours).sum(), np.minimum(shape, other_shape).sum() / union


def subject_likeness(videos, subject) -> dict:
    """Clips (n,3,f,h,w) in [-1,1], items of tiny_subject() -> means over all frames and pictures,
    0 to 1: {"colours", "shape"}, see _alike()."""
    known = []
    for item in subject:
        pixels = (item["video"].permute(1, 2, 3, 0).numpy() + 1) * 127.5
        known += _looks(pixels, item["mask"][0].numpy())
    pairs = []
    for video in videos:
        frames, _, _, masks, _ = _object(video)
        pairs += [_alike(look, k) for look in _looks(frames, masks) for k in known]
    return dict(zip(("colours", "shape"), np.mean(pairs, 0).tolist()))


def steadiness(videos) -> dict:
    """Clips (n,3,f,h,w) in [-1,1] -> {"steady"}: how alike a clip's frames are, the sum of both of
    _alike(), 0 to 2, mean over all pairs of frames of a clip."""
    pairs = []
    for video in videos:
        frames, _, _, masks, _ = _object(video)
        pairs += [_alike(a, b) for a, b in combinations(_looks(frames, masks), 2)]
    return {"steady": float(np.sum(pairs) / len(pairs))}


def path_error(videos, path) -> dict:
    """Clips (n,3,f,h,w) in [-1,1], path (f,2) in pixels -> {"path_error"}: root mean square
    distance of the object's centroid from the path, each about its own middle, mean over the
    clips."""
    target, errors = (path - path.mean(0)).numpy(), []
    for video in videos:
        found = np.stack(_centres(_object(video)[3]), 1)
        errors.append(np.sqrt(((found - found.mean(0) - target) ** 2).sum(1).mean()))
    return {"path_error": float(np.mean(errors))}


# ---- the learned scorer: a preference model, as HPS is (arXiv 2306.09341), for whole clips

SCORER_FILE = Path(__file__).parent / "assets" / "tiny-scorer.safetensors"


class TinyScorer(nn.Module):
    """Which clips would a person keep? Fewer flaws and the right caption win.

    caption: cosine of the clip's and the caption's embedding, as in CLIP (arXiv 2103.00020).
    quality: how clean the clip is, whatever it shows. Both see the whole clip, so motion counts.
    """

    def __init__(self, dim=64):
        super().__init__()
        def conv(cin, cout, stride):
            layer = nn.Conv3d(cin, cout, 3, stride, padding=1)
            return nn.Sequential(layer, nn.GroupNorm(8, cout), nn.SiLU())
        self.trunk = nn.Sequential(
            conv(3, 24, (1, 2, 2)), conv(24, 48, (2, 2, 2)), conv(48, 64, (1, 1, 1)),
            conv(64, 96, (2, 2, 2)), nn.Flatten())
        features = 96 * 2 * 4 * 4  # 2 frames of 4x4 are left of 8 of 32x32
        self.video = nn.Linear(features, dim)
        self.quality = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, 1))
        # a sum over the words: their order carries nothing in the tiny world
        self.words = nn.EmbeddingBag(len(TINY_WORDS) + 1, 64, mode="sum", padding_idx=0)
        self.text = nn.Sequential(nn.SiLU(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, dim))
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        self.index = {w: i + 1 for i, w in enumerate(TINY_WORDS)}

    def look(self, clips):
        """clips (b,3,8,32,32) in [0,1] -> embeddings (b,dim) of unit length, raw quality (b,)."""
        features = self.trunk(clips * 2 - 1)
        return F.normalize(self.video(features), dim=1), self.quality(features)[:, 0]

    def read(self, prompts):
        """-> embeddings (b,dim) of unit length."""
        ids = [[self.index[w] for w in p.split()] for p in prompts]
        ids = torch.tensor([row + [0] * (12 - len(row)) for row in ids],
                           device=self.log_scale.device)
        return F.normalize(self.text(self.words(ids)), dim=1)

    def forward(self, clips, prompts):
        """-> score (b,), -1 to 1. Both parts are bounded: exaggerating wins nothing."""
        video, quality = self.look(clips)
        caption = (video * self.read(prompts)).sum(1)
        return (caption + quality.tanh()) / 2


def load_scorer(device) -> TinyScorer:
    """The scorer in assets/, frozen."""
    if not SCORER_FILE.exists():
        raise UserError(f"{SCORER_FILE} is missing: check out the repository whole, "
                        "or run python tinyworld.py --train scorer")
    scorer = TinyScorer()
    scorer.load_state_dict(load_safetensors(SCORER_FILE)[0])
    return scorer.requires_grad_(False).eval().to(device)


def check_tiny_size(what, frames, height, width, remedy="leave --frames, --height and --width"):
    """The scorer reads clips (b,3,8,32,32) alone."""
    if (frames, height, width) != (TINY_FRAMES, TINY_SIZE, TINY_SIZE):
        raise UserError(f"{what} judges clips of 8 frames of 32x32, not {frames} of "
                        f"{height}x{width}: {remedy}")


TINY_REMEDY = "use it with --base tiny and --decode all"


def tiny_scorer(files):
    """-> judge(clips, captions) and check(captions), from which rewards.py makes `tiny`."""
    scorer = load_scorer(files.device)

    def check(prompts):
        for prompt in prompts:
            unknown = [w for w in prompt.split() if w not in scorer.index] or prompt.split()[12:]
            if unknown:
                raise UserError(f"--reward tiny: prompt {prompt!r} is no caption of the tiny world "
                                f"({unknown[0]!r})")

    def judge(clips, prompts):
        check(prompts)
        check_tiny_size("--reward tiny", *clips.shape[2:], TINY_REMEDY)
        return scorer(clips, prompts)
    return judge, check


def tiny_raw_quality(files):
    """-> judge(clips, captions) from which rewards.py makes `tiny-raw`: the quality alone, without
    a bound and blind to the caption. It is there to be hacked."""
    scorer = load_scorer(files.device)

    def judge(clips, prompts):
        check_tiny_size("--reward tiny-raw", *clips.shape[2:], TINY_REMEDY)
        return scorer.look(clips)[1]
    return judge


def tiny_image_embedding(device):
    """-> embed(frames (b,3,h,w) in [-1,1]) -> (b,64): the scorer's embeddings of still clips of
    them."""
    scorer = load_scorer(device)

    def embed(frames):
        frames = F.interpolate(frames, (32, 32), mode="bilinear", align_corners=False)
        still = frames[:, :, None].expand(-1, -1, 8, -1, -1)
        return scorer.video(scorer.trunk(still))
    return embed


def two_unlike(rng):
    """-> two random Flaws of random strengths, the smaller first, at least 0.25 apart."""
    while True:
        pair = [tiny_flaws(rng).times(rng.uniform(0, 1)) for _ in range(2)]
        pair.sort(key=Flaws.amount)
        if pair[1].amount() - pair[0].amount() > 0.25:
            return pair


def spoiled_pairs(seed, n, flaw=None):
    """n pairs for the scorer: clips (n,3,8,32,32) in [0,1] that win, those that lose, captions, the
    amounts of flaws (2n,) of winners and losers.

    Both show the same scene. The loser has more flaws, or stronger ones: all drawn at random, the
    two at least a quarter of a flaw apart, or one `flaw` of FLAW_SHARES against none.
    """
    rng = np.random.default_rng(seed)
    winners, losers, captions, amounts = [], [], [], ([], [])
    for _ in range(n):
        scene = tiny_scene(rng)
        captions.append(scene.caption(with_background=rng.random() >= 0.2))
        if flaw:
            pair = [tiny_flaws(rng, **{name: name == flaw for name in FLAW_SHARES})]
            pair.insert(0, pair[0].times(0))
        else:
            pair = two_unlike(rng)
        for side, amount, flaws in zip((winners, losers), amounts, pair):
            side.append(render(scene, flaws=flaws) / 2 + 0.5)
            amount.append(flaws.amount())
    return torch.stack(winners), torch.stack(losers), captions, torch.tensor(sum(amounts, []))


def with_another_word(rng, caption):
    """A tiny-world caption with one of its attributes changed."""
    asked = parse(caption)
    attribute = list(asked)[rng.integers(len(asked))]
    choices = {"shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS, "motion": MOTIONS}
    others = [word for word in choices[attribute] if word != asked[attribute]]
    return caption.replace(asked[attribute], others[rng.integers(len(others))])


def scorer_loss(scorer, winners, losers, captions, amounts, others, shuffled):
    """Bradley-Terry: -log sigmoid of how much higher the winner scores, over three questions.

    Of two clips with one caption, the cleaner one wins. Of any two clips, the cleaner one has the
    higher quality, whatever they show: else clips of what happens to score high would win. Of two
    captions (n), the right one wins over `others` (n), for clean and for spoiled clips. Over the
    whole batch, CLIP's contrastive loss. shuffled: a permutation of 2n, which pairs the clips.
    """
    scale = scorer.log_scale.exp()
    n, clips = len(captions), torch.cat([winners, losers])
    clips = (clips + 0.05 * torch.rand(()) * torch.randn_like(clips)).clamp(0, 1)  # a decoder's
    video, quality = scorer.look(clips)
    right, wrong = scorer.read(captions).repeat(2, 1), scorer.read(others).repeat(2, 1)
    agrees, differs = (video * right).sum(1), (video * wrong).sum(1)
    score = (agrees + quality.tanh()) / 2
    logits = scale * video @ right[:n].T
    # captions that occur twice in the batch are right for each other's clips
    same = torch.tensor([[a == b for b in captions] for a in captions], dtype=torch.float32)
    target = (same / same.sum(1, keepdim=True)).repeat(2, 1)
    cleaner = (amounts[shuffled] - amounts).sign() * ((amounts[shuffled] - amounts).abs() > 0.25)
    gap = (quality - quality[shuffled]) * cleaner
    return (-F.logsigmoid(scale * (score[:n] - score[n:])).mean()
            - F.logsigmoid(gap).mean() + 0.01 * quality.mean() ** 2
            - F.logsigmoid(scale * (agrees - differs)).mean()
            + F.cross_entropy(logits, target))


@torch.no_grad()
def scorer_agreement(scorer, seed=HELD_OUT, n=256):
    """Share of held-out pairs in which the right clip wins -> {flaw, "caption", "both": share}.

    "caption": a clean clip with the right caption against the same clip with one word wrong.
    """
    agreement = {}
    for k, flaw in enumerate((*FLAW_SHARES, None)):
        winners, losers, captions, _ = spoiled_pairs((seed, k), n, flaw)
        right = scorer(winners, captions) > scorer(losers, captions)
        agreement[flaw or "all"] = right.float().mean().item()
    rng = np.random.default_rng(seed)
    clips, captions, _ = tiny_batch((seed, 9), n)
    clips = clips / 2 + 0.5
    others = [with_another_word(rng, caption) for caption in captions]
    agreement["caption"] = (scorer(clips, captions) > scorer(clips, others)).float().mean().item()
    return agreement


def train_scorer(out, steps, batch=32, lr=2e-3, seed=0):
    """Train TinyScorer on pairs of rendered clips, print its agreement with held-out pairs."""
    torch.manual_seed(seed)
    scorer, start = TinyScorer(), time.time()
    opt = torch.optim.AdamW(scorer.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        winners, losers, captions, amounts = spoiled_pairs((seed, 7, step), batch)
        rng = np.random.default_rng((seed, 8, step))
        others = [with_another_word(rng, caption) for caption in captions]
        shuffled = torch.from_numpy(rng.permutation(2 * batch))
        loss = scorer_loss(scorer, winners, losers, captions, amounts, others, shuffled)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}/{steps} | loss {loss:.4f} | {time.time() - start:.0f} s",
                  flush=True)
    agreement = scorer_agreement(scorer)
    print("held-out pairs right:", ", ".join(f"{k} {v:.3f}" for k, v in agreement.items()))
    save_file({k: v.half().contiguous() for k, v in scorer.state_dict().items()}, out)


# ---- the text encoder

def tiny_tokenize(numbers, length, texts):
    """List of str -> (b, length) long, by {word: number}; a word without one is refused."""
    ids = torch.zeros(len(texts), length, dtype=torch.long, device="cpu")
    for i, text in enumerate(texts):
        words = text.lower().replace(",", " ").split()
        unknown = [w for w in words if w not in numbers]
        if unknown:
            raise UserError(f"prompt {text!r}: the tiny world does not know {unknown[0]!r}; "
                            f"its words: {' '.join(numbers)}")
        if len(words) > length:
            raise UserError(f"prompt {text!r}: {len(words)} words, "
                            f"the tiny world's captions have at most {length}")
        ids[i, :len(words)] = torch.tensor([numbers[w] for w in words], dtype=torch.long)
    return ids


class TinyText(nn.Module):
    """A word a token, one transformer block, trained with the tiny network; see
    tiny_tokenize()."""

    def __init__(self, words, width=64, heads=2, layers=1, context_length=10):
        super().__init__()
        self.words = {w: i + 1 for i, w in enumerate(words)}  # 0 is the padding
        self.context_length = context_length
        self.token_embedding = nn.Embedding(len(words) + 1, width)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(context_length, width))
        self.transformer = Transformer(width, heads, layers)
        self.ln_final = nn.LayerNorm(width)

    def units(self):
        """The modules to shard one by one (models.parallelize)."""
        return list(self.transformer.resblocks)

    def forward(self, ids, learned=None):
        """ids (b, n) -> token features (b, n, width); learned: as in OpenCLIPText."""
        x = self.token_embedding(ids)
        for placeholder, vectors in (learned or {}).items():
            ids, x = insert_vectors(ids, x, placeholder, vectors)
        return self.ln_final(self.transformer(x + self.positional_embedding))


# ---- training the autoencoders

# what the rows of bases.py hold, but for the scale of the latents
TINY_VAE = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, patch=2, scale=1.0)
TINY_COGVIDEOX_VAE = CogVideoXVAEConfig(
    widths=(16, 24), layers=1, z_channels=8, groups=8, scale=1.0)
TINY_VAES = {"tiny": (AutoencoderKL, TINY_VAE),
             "tiny-cogvideox": (CogVideoXVAE, TINY_COGVIDEOX_VAE)}
TINY_CLIP = 9  # frames of a clip of tiny-cogvideox


def wild_clip(rng, frames):
    """What the tiny world's words do not say -> video (3,f,32,32): fast crooked paths, tracking
    videos.

    Half of them a shape on a random path. Half as Diffusion as Shader draws tracks: each point's
    colour is its place in the first frame (R: x, G: y) and its nearness (B), in marks of some
    pixels on black, the object and the camera moving on paths of their own.
    """
    time = np.linspace(0, 1, frames)

    def path(most):  # a wave of up to two turns: nearly straight, bent, circling, to and fro
        size, turns, start = rng.uniform(0, most), rng.uniform(0, 2.2), rng.uniform(0, 1)
        wave = np.sin(2 * np.pi * (turns * time + start))
        return size * (wave if rng.random() < 0.5 else 2 / np.pi * np.arcsin(wave))
    scene = tiny_scene(rng, frames=frames)
    scene = replace(scene, x=TINY_SIZE / 2 + path(9), y=TINY_SIZE / 2 + path(9))
    if rng.random() < 0.5:
        return render(scene)
    gy, gx = np.mgrid[:TINY_SIZE, :TINY_SIZE] + 0.5
    pan, still, near = (path(6), path(6)), rng.random() < 0.5, rng.uniform(0.5, 1)
    spacing, mark = ((1, 1), (3, 2), (4, 2), (4, 3))[rng.integers(4)]

    def points(dx, dy, depth):  # the first frame's points, moved by (dx, dy)
        x, y = gx - dx, gy - dy
        inside = (x >= 0) & (x < TINY_SIZE) & (y >= 0) & (y < TINY_SIZE)
        shown = inside & (x.astype(int) % spacing < mark) & (y.astype(int) % spacing < mark)
        return np.stack([x / TINY_SIZE, y / TINY_SIZE, np.full_like(x, depth)]) * shown
    video = []
    for k in range(frames):
        back = points(0, 0, 0) if still else points(pan[0][k] - pan[0][0], pan[1][k] - pan[1][0], 0)
        front = points(scene.x[k] - scene.x[0], scene.y[k] - scene.y[0], near)
        x, y = gx - scene.x[k], gy - scene.y[k]
        covered = signed_distance(scene.shape, x, y, scene.radius[k]) < 0
        video.append(np.where(covered, front, back))
    return torch.from_numpy(np.stack(video, 1).astype(np.float32)) * 2 - 1


def tiny_frames(seed, n, flawed=False):
    """-> (n, 3, 32, 32): 4 frames each of n / 4 clips, for the autoencoder that takes frame by
    frame."""
    video, _, _ = tiny_batch(seed, n // 4, flawed=flawed)
    return rearrange(video[:, :, torch.randperm(video.shape[2])[:4]], "b c f h w -> (b f) c h w")


def tiny_clips(seed, n):
    """-> (n, 3, TINY_CLIP, 32, 32): half of the tiny world, half wild_clip."""
    rng = np.random.default_rng((*seed, 1))
    wild = [wild_clip(rng, TINY_CLIP) for _ in range(n // 2)]
    return torch.cat([tiny_batch(seed, n - n // 2, TINY_CLIP)[0], torch.stack(wild)])


def autoencoder_loss(images, mean, logvar, decode):
    """-> loss, {name: 0-d tensor} to print: L1 + MSE + 1e-4 KL, errors relative to a frame's
    contrast.

    In units of each frame's own contrast, because blue on gray costs little and would stay
    blurred.
    """
    error = decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float() - images
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
    centred = images - images.mean((-2, -1), keepdim=True)
    contrast = centred.square().mean((1, -2, -1), keepdim=True).sqrt()
    scaled = error * (0.3 / contrast).clamp(max=5)
    loss = scaled.abs().mean() + scaled.square().mean() + 1e-4 * kl
    return loss, {"mse": error.square().mean(), "kl": kl, "latent std": mean.std()}


def train_autoencoder(base, out, steps, decoder_steps, batch, flawed=False, seed=0,
                      device="cpu"):
    """Train a tiny base's autoencoder on rendered clips, then its decoder alone, and put it into
    `out`.

    The second stage leaves the latents as they are, since a base may already be trained on them;
    with steps 0 it starts from the file's autoencoder. So it does with `flawed`: five of
    eight frames may have flaws, and the others keep their latents, on which bases are trained.
    """
    torch.manual_seed(seed)
    build, cfg = TINY_VAES[base]
    vae, start, lr = build(cfg).to(device), time.time(), 1.5e-3 if flawed else 2e-3
    if base == "tiny":
        draw, moments, decode = tiny_frames, vae.image_moments, vae.decode_images
    else:
        draw, moments, decode = tiny_clips, vae.moments, vae.decode_latents
    if flawed or not steps:
        state = {k.removeprefix("vae."): v.float() for k, v in load_weights(out).items()
                 if k.startswith("vae.")}
        vae.load_state_dict(state)
    before = copy.deepcopy(vae).requires_grad_(False)
    for part, n, first in (("all", steps, 0), ("decoder", decoder_steps, steps)):
        for key, p in vae.named_parameters():
            p.requires_grad_(part == "all" or key.startswith(("decoder.", "post_quant_conv.")))
        trained = [p for p in vae.parameters() if p.requires_grad]
        opt = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            opt, lr, total_steps=max(n, 1), pct_start=0.05)
        for step in range(n):
            images = draw((seed, first + step), batch).to(device)
            if flawed:
                clean = images[:batch * 3 // 8]
                spoiled = draw((seed, 1, first + step), batch * 5 // 8, flawed=True)
                images = torch.cat([clean, spoiled.to(device)])
            # 3-D convolutions in bf16 take half the time on a CPU that has it, too
            kind = torch.device(device).type
            with torch.autocast(kind, torch.bfloat16, enabled=base != "tiny"):
                with torch.set_grad_enabled(part == "all"):
                    mean, logvar = moments(images)
                loss, terms = autoencoder_loss(images, mean.float(), logvar.float(), decode)
                if flawed:
                    kept = before.image_moments(clean)[0]
                    terms["moved"] = (mean[:len(clean)] - kept).square().mean()
                    loss = loss + terms["moved"]
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            opt.step()
            schedule.step()
            if step % 100 == 0 or step == n - 1:
                words = " | ".join(f"{name} {value:.5f}" for name, value in terms.items())
                print(f"{part} {step:5d}/{n} | {words} | {time.time() - start:.0f} s", flush=True)
        replace_part(out, "vae", vae.state_dict())


# ---- the command that trained the files in assets/

def get_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--train", choices=("scorer", "autoencoder"), required=True,
                   help="what to train")
    p.add_argument("--base", choices=TINY_VAES, default="tiny",
                   help="tiny base whose autoencoder is trained")
    p.add_argument("--flawed", action="store_true",
                   help="autoencoder of tiny: go on from the file's one, on flawed frames as well; "
                        "clean ones keep their latents")
    p.add_argument("--out", help="file to write (default: the one in assets/)")
    p.add_argument("--steps", type=p.NATURAL,
                   help="optimizer steps (scorer: 800, autoencoder: 2000; 0: its decoder alone)")
    p.add_argument("--decoder-steps", type=p.NATURAL, default=1000,
                   help="further steps of the autoencoder in which the encoder is frozen")
    p.add_argument("--batch", type=p.COUNT,
                   help="frames (tiny: 64) or clips (tiny-cogvideox: 8) per step")
    p.add_argument("--device", default="cpu", help="cuda or cpu")
    args = p.parse_args(argv)
    if args.flawed and (args.train, args.base) != ("autoencoder", "tiny"):
        raise UserError("--flawed: goes with --train autoencoder --base tiny")
    least = 4 if args.base == "tiny" else 2
    if args.batch and args.batch < least:
        raise UserError(f"--batch {args.batch}: {args.base} needs {least} or more")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: PyTorch sees no GPU; try --device cpu")
    return args


def main(argv=None):
    args = get_args(argv)
    if args.train == "scorer":
        train_scorer(args.out or SCORER_FILE, 800 if args.steps is None else args.steps)
        return
    batch = args.batch or (64 if args.base == "tiny" else 8)
    train_autoencoder(
        args.base, args.out or f"assets/{args.base}.safetensors",
        2000 if args.steps is None else args.steps, args.decoder_steps, batch, args.flawed,
        device=args.device)


if __name__ == "__main__":
    run_command(main)
