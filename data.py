"""Videos, pictures, prompt files and data sets: reading, checking, writing.

`python data.py --check LIST --frames 16 --height 256 --width 256` reads every clip once and names
the bad ones.
"""
from common import (  # first: for signals
    SEED, Parser, UserError, batch_indices, check_file, check_folder, check_limit, check_text,
    generator, meet, parse_json, read_text, run_command, seed_of, warn, warn_once, write_atomic)
import atexit
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import sys
import unicodedata
from argparse import ArgumentTypeError
from collections import Counter, deque
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache, partial
from itertools import chain
from multiprocessing.connection import wait
import zipfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import signals
from signals import MAIN
from weights import hub_weights, load_strict

# ---- which clips make which batch

class Mixed(torch.utils.data.Dataset):
    """Several data sets that take turns: item (i, number) is the i-th (or i - len-th ...) of
    parts[turn].

    turns: a part for each `size` samples of the run, from the one of number `first` on.
    """

    def __init__(self, parts, turns, size, first=0):
        self.parts, self.turns, self.size, self.first = parts, turns, size, first

    def __len__(self):
        return max(map(len, self.parts))

    def __getitem__(self, item):
        index, number = item
        part = self.parts[self.turns[(number - self.first) // self.size]]
        return part[index % len(part), number]


class Buckets(torch.utils.data.Dataset):
    """Data sets of one clip size each, side by side. Item (i, number) is the i-th of all their
    items, each counted as often as its list repeats it, with the "size" of its clip.

    like: the Buckets of which these parts hold the encoded clips.
    """

    def __init__(self, parts, like=None):
        self.parts = parts
        self.sizes = like.sizes if like else [(part.frames, *part.size) for part in parts]
        self.repeats = like.repeats if like else [part.repeats for part in parts]
        self.items = [(k, i) for k, often in enumerate(self.repeats)
                      for i in np.repeat(np.arange(len(often)), often).tolist()]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, item):
        index, number = item
        k, i = self.items[index]
        return self.parts[k][i, number] | {"size": torch.tensor(self.sizes[k])}

    @property
    def rows(self):
        """Those of all parts, see VideoDataset."""
        return [row for part in self.parts for row in part.rows]

    def texts(self):
        """All captions, once the clips are encoded."""
        return [text for part in self.parts for text in part.texts()]


def bucket_indices(lengths, first, batch, group, seed=0):
    """Samples number first .. first + batch - 1 of a run -> indices into the items of all buckets,
    side by side; lengths: the items of each.

    The `group` samples of one update come from one bucket, so they have one size however they are
    split over processes. An epoch has as many groups of a bucket as hold all its clips, in shuffled
    order; each bucket is read in epochs of its own (batch_indices).
    """
    groups = np.repeat(np.arange(len(lengths)), [-(-n // group) for n in lengths])
    picked = []
    for i in range(first, first + batch):
        update, place = divmod(i, group)
        epoch, k = divmod(update, len(groups))
        order = np.random.default_rng((seed, epoch)).permutation(groups)
        bucket = order[k]
        before = epoch * (groups == bucket).sum() + (order[:k] == bucket).sum()
        number = int(before) * group + place
        within = batch_indices(lengths[bucket], number, 1, seed)[0]
        picked.append(sum(lengths[:bucket]) + within)
    return picked


def start_reader(worker):
    """A reading process ignores signals, which go to the whole group: only the run answers. It
    ends with the run."""
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signals.end_with_parent(signal.SIGKILL)


def load(data, order, workers=0):
    """Batches of a data set, read by `workers` processes; order: a list of items for each batch.

    If such a process is killed, a training run finishes its step, saves and ends with an error;
    until then this process reads.
    """
    order, waiting = iter(order), deque()  # waiting: batches that are being read

    def given():
        for items in order:
            waiting.append(items)
            yield items
    # a generator of its own: a loader draws a seed, which must not shift the run's dropout
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=given(), num_workers=workers, prefetch_factor=2 if workers else None,
        worker_init_fn=start_reader, generator=torch.Generator())
    close = None
    try:
        batches = iter(loader)
        # torch's own handler would raise in the middle of an update
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # workers would not heed the SIGTERM of Python's exit
        close = getattr(batches, "_shutdown_workers", None)
        if close:
            atexit.register(close)
        for batch in batches:
            waiting.popleft()
            yield batch
    except (RuntimeError, UserError, OSError, EOFError) as e:
        if not workers:
            raise
        # what the loss of a process looks like here depends on what it was doing
        killed = close and wait([reader.sentinel for reader in batches._workers], timeout=1)
        lost = why_lost(e, killed)
        # its last line: those before it are the worker's traceback
        reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
        reason = reason.rpartition("UserError: ")[2]
        advice = "in a process that reads clips; --workers 0 avoids it"
        if not lost or not signals.stop.training:
            raise UserError(lost or f"{reason} ({advice})") from e
        signals.stop.give_up(lost)
        for items in chain(waiting, order):
            yield torch.utils.data.default_collate([data[item] for item in items])
    finally:
        if close:
            close()
            atexit.unregister(close)


def why_lost(e, killed):
    """Why a process that reads clips was lost, in a line, after its error e; None: its data are at
    fault."""
    if re.search(r"</torch_|shared memory|\[Errno 28\]", str(e)):
        free = shutil.disk_usage("/dev/shm").free / 1e6 if Path("/dev/shm").exists() else 0
        return ("the processes that read clips need more shared memory than /dev/shm has "
                f"({free:.0f} MB free); enlarge it (docker run --shm-size), or give --workers 0")
    return killed and ("a process that reads clips was killed (memory or /dev/shm may be full; "
                       "--workers 0 reads without one)")


def read_batches(data, numbers, seed=0, workers=0):
    """Samples by their numbers in a run, ranges for each batch -> batches {"video" (b,3,f,h,w),
    "text" list}.

    data[i, number] is item i, its random part drawn for that number. Of Buckets an update reads
    one; numbers: then a run's SampleNumbers.
    """
    sizes = len(data.parts) if isinstance(data, Buckets) else 1
    if sizes > 1 and numbers.samples_read % numbers.per_update:
        raise UserError("--resume: with clips of several sizes, --batch x --accum x processes must "
                        "stay as it was")

    def picked(part):
        if isinstance(data, Buckets):
            lengths = [sum(often) for often in data.repeats]
            return bucket_indices(lengths, part[0], len(part), numbers.per_update, seed)
        return batch_indices(len(data), part[0], len(part), seed)
    order = (list(zip(picked(part), part)) for part in numbers)
    return load(data, order, workers)


SHARD = 64  # clips a file of encoded clips


class EncodedClips(torch.utils.data.Dataset):
    """A data set encoded once (--cache-latents): files of SHARD clips, read as needed, not kept
    in memory.

    item (i, _) -> {"text", NAME: tensor ...}, what `encode` made of clip i.
    """

    def __init__(self, files, n):
        self.files, self.n, self.open = files, n, {}

    def __getstate__(self):  # for processes that are not forked
        return self.__dict__ | {"open": {}}

    def __len__(self):
        return self.n

    def texts(self):
        """All captions, in order."""
        return [text for k in range(len(self.files)) for text in self.shard(k)[1]]

    def shard(self, k):
        if k not in self.open:
            file = safe_open(self.files[k], "pt")  # memory-mapped
            self.open[k] = file, json.loads(file.metadata()["texts"]), sorted(file.keys())
        return self.open[k]

    def __getitem__(self, item):
        k, i = divmod(item[0], SHARD)
        file, texts, names = self.shard(k)
        return {"text": texts[i], **{name: file.get_slice(name)[i] for name in names}}


def encode_once(folder, data, encode, about, env, workers=0):
    """Encode every clip of `data` once, into files below `folder` -> EncodedClips.

    encode({"video": (b,3,f,h,w), "text": list}) -> {name: tensor (b, ...)}; about: plain values
    that tell whether files of an earlier run are the same. Processes share the work; what is
    there already is kept.
    """
    files = [Path(folder, f"{k:06d}.safetensors") for k in range(-(-len(data) // SHARD))]
    about = json.dumps([about, len(data)], default=str)

    def whole(file):
        try:
            with safe_open(file, "pt") as f:
                return f.metadata()["about"] == about
        except (OSError, SafetensorError, KeyError, TypeError):
            return False
    mine = [k for k in range(env.rank, len(files), env.world) if not whole(files[k])]
    for k in tqdm(mine, "encoding clips", disable=not env.main or not mine, mininterval=5):
        parts, texts = {}, []
        rows = range(k * SHARD, min((k + 1) * SHARD, len(data)))
        order = [[(i, i) for i in rows[j:j + 8]] for j in range(0, len(rows), 8)]
        for batch in load(data, order, workers):
            texts += batch["text"]
            for name, value in encode(batch).items():
                parts.setdefault(name, []).append(value.cpu())
        tensors = {name: torch.cat(values).contiguous() for name, values in parts.items()}
        text = {"texts": json.dumps(texts), "about": about}
        write_atomic(files[k], lambda p: save_file(tensors, p, text))
    meet()
    absent = [file for file in files if not whole(file)]
    if absent:
        raise UserError(f"--cache-latents: {absent[0]} is not there; --out must be a folder that "
                        "all nodes share")
    return EncodedClips(files, len(data))


# ---- pixels

# endings of files that PyAV reads
VIDEOS = tuple(
    ".mp4 .m4v .mov .qt .avi .divx .mkv .webm .gif .apng .mpg .mpeg .mpe .mpv .m1v .m2v .ts .mts "
    ".m2t .m2ts .vob .wmv .asf .flv .f4v .3gp .3g2 .ogv .ogg .ogm .mxf .nut .dv .mjpeg .mjpg .y4m "
    ".rm .rmvb .amv .wtv .ivf .h264 .264 .h265 .265 .hevc".split())
IMAGES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
Image.MAX_IMAGE_PIXELS = None  # check_size() says what may be opened
FAR = 300         # frames ahead from which a film is searched by time
FILM = 1000       # frames from which a file is not decoded only to count them
FOLDER_FPS = 8.0  # a folder of pictures has no rate of its own
FRAME_PIXELS = 60e6   # of a picture; 8K has 33 million
CLIP_PIXELS = 135e6   # of all frames read at once: 1.6 GB, 64 frames at 1080p
NARROW = 100      # times that a side may be longer than the other
GIF_FRAMES = 100_000  # that a gif may stand for
# codecs that stamp every packet and put one frame in each; files of others are decoded once more
ONE_FRAME = ("h264", "hevc", "av1", "vp9", "mjpeg", "prores", "dnxhd", "ffv1", "png")
PLAYLISTS = ("hls", "dash", "concat", "imf", "sdp", "rtsp")  # formats that name other files
BT709, UNTAGGED, BT601 = 1, 2, 6  # matrices, as H.264 numbers them
HDR = 16, 18      # PQ and HLG, the transfer functions of HDR
HD_LINES = 720    # from here on, a file without a tag is shown as BT.709
MP4_CRF = "12"    # x264's default, 23, cost 8 dB on a real 256x256 clip

# what Open-Sora calls the sizes of its clips: frames, pixels of a frame
OPENSORA_FRAMES = {"2s": 51, "4s": 102, "8s": 204, "16s": 408}
OPENSORA_PIXELS = {"144p": 144 * 256, "240p": 240 * 426, "360p": 360 * 640, "480p": 480 * 854,
                   "720p": 720 * 1280}


def opensora_size(length="2s", resolution="240p", aspect="9:16"):
    """Open-Sora's names -> (frames, height, width), e.g. ("4s", "240p", "3:4") -> (102, 276, 368).

    aspect is height:width. Tall sizes are the wide ones turned (its own table has 1108x834, not
    1110x832, for 720p 4:3).
    """
    for name, known in ((length, OPENSORA_FRAMES), (resolution, OPENSORA_PIXELS)):
        if name not in known:
            raise UserError(f"clip size {name}: unknown; choose from {', '.join(known)}")
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", aspect):
        raise UserError(f"aspect {aspect}: give height:width, such as 9:16")
    h, w = map(int, aspect.split(":"))
    ratio = min(h, w) / max(h, w)
    short = 2 * round((OPENSORA_PIXELS[resolution] * ratio) ** 0.5 / 2)  # even
    long = 2 * round(short / ratio / 2)
    return OPENSORA_FRAMES[length], *((short, long) if h < w else (long, short))


def check_size(path, width, height, frames=1):
    """Refuse pictures and clips that would fill the memory, when read or when scaled to cover a
    frame."""
    if max(width, height) > NARROW * min(width, height):
        raise UserError(f"{path}: {width}x{height} pixels, one side is over {NARROW} times the "
                        "other; crop it")
    over = width * height * max(1 / FRAME_PIXELS, frames / CLIP_PIXELS)
    check_limit("MEDIA", over, 1, f"{path}: {frames} frame(s) of {width}x{height} pixels are too "
                "large")


def resize_crop(video, size):
    """(3, h, w) or (3, f, h, w) float -> the same at size (h, w): scaled to cover it, then
    centre-cropped."""
    (h, w), (H, W) = video.shape[-2:], size
    if (h, w) == (H, W):
        return video
    # Integer ceiling: VGen's float floor can end one pixel short, which gives a black column.
    cover = (H, -(-w * H // h)) if H * w >= W * h else (-(-h * W // w), W)
    x = video if video.dim() == 4 else video[None]
    x = F.interpolate(x, cover, mode="bilinear", antialias=True, align_corners=False)
    top, left = (cover[0] - H) // 2, (cover[1] - W) // 2
    x = x[..., top:top + H, left:left + W].contiguous()
    return x if video.dim() == 4 else x[0]


def cover_and_crop(w, h, size):
    """Picture of w x h -> ((w, h) that just covers size = (h, w), (left, top) of the crop in it),
    as VGen.

    In whole numbers: VGen's float floor can end one pixel short, which gives a black line (24 ->
    23.9999).
    """
    H, W = size
    cover = (W, h * W // w) if w * H <= h * W else (w * H // h, H)
    return cover, ((cover[0] - W) // 2, (cover[1] - H) // 2)


def center_crop_wide(image, size, filter=Image.BOX):
    """Pillow image -> Pillow image of size (h, w): scaled to cover it, then centre-cropped (VGen).

    The weights of I2VGen-XL and DreamVideo were trained on Pillow's box filter; NEAREST is for
    masks.
    """
    cover, (left, top) = cover_and_crop(*image.size, size)
    return image.resize(cover, filter).crop((left, top, left + size[1], top + size[0]))


def lanczos_cover(image, size):
    """Pillow image -> Pillow image of size (h, w): scaled to cover it, sides rounded, then
    centre-cropped, as Wan2.2 TI2V prepares a first frame."""
    H, W = size
    scale = max(W / image.width, H / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.LANCZOS)
    left, top = (image.width - W) // 2, (image.height - H) // 2
    return image.crop((left, top, left + W, top + H))


def image_tensor(image):
    """8-bit RGB Pillow image -> (3, h, w) in [-1, 1]."""
    return _to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1))


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_normalize(images):
    """(..., 3, h, w) in [0, 1] -> CLIP's mean and standard deviation."""
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def clip_frames(frames, size=224):
    """(n,3,h,w) in [-1,1] -> (n,3,size,size) as open_clip prepares pictures: bicubic,
    centre-cropped."""
    pictures = [Image.fromarray(to_uint8(frame[:, None])[0]) for frame in frames]
    pictures = [image_tensor(center_crop_wide(p, (size, size), Image.BICUBIC)) for p in pictures]
    return clip_normalize(torch.stack(pictures) / 2 + 0.5)


def clip_square(images, size=224):
    """(n,3,h,w) in [-1,1] -> (n,3,size,size) as Wan2.1 prepares pictures for CLIP: squeezed into a
    square by PyTorch's bicubic without antialiasing."""
    images = F.interpolate(images, (size, size), mode="bicubic", align_corners=False)
    return clip_normalize(images / 2 + 0.5)


def clip_image(image, crop, size=(224, 224)):
    """Pillow image -> (3, *size), what the image tower of I2VGen-XL and DreamVideo reads.

    crop: (h, w) that it is cropped to first; VGen's is a square, as wide as the video but at
    least 224.
    """
    image = center_crop_wide(image, crop).resize((size[1], size[0]), Image.BILINEAR)
    return clip_normalize(image_tensor(image) / 2 + 0.5)


def to_uint8(video):
    """(3, f, h, w) in [-1, 1] -> numpy (f, h, w, 3), rounded and clamped. NaN raises: it would
    look black."""
    video = video.detach().float().cpu()
    if video.dim() != 4 or video.shape[0] != 3 or not video.numel():
        raise UserError(f"a video is (3, frames, height, width), this one is {tuple(video.shape)}")
    if not torch.isfinite(video).all():
        raise UserError("the video holds NaN or infinity: nothing to save")
    return (video.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def _to_float(pixels):
    """uint8, or float in 0..255 -> [-1, 1]."""
    return pixels.to(torch.float32, copy=True).div_(127.5).sub_(1)


def _rgb(image):
    """Pillow image -> uint8 (h, w, 3), turned as its EXIF says; transparent parts are laid on
    white."""
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{image.filename}: a 16-bit or float picture; save it with 8 bits")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def reason_of(e):
    """One line of an exception."""
    text = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
    return text.splitlines()[0][:300]


def open_image(path):
    """Picture file -> 8-bit RGB Pillow image, turned as its EXIF says. Transparency is laid on
    white."""
    check_file(path, "picture")
    try:
        with Image.open(path) as image:
            check_size(path, *image.size)
            return Image.fromarray(_rgb(image))
    except UserError:
        raise
    except Exception as e:  # Pillow raises everything there is
        raise UserError(f"{path}: not a readable picture ({reason_of(e)})") from None


def read_mask(path, picture_size, size):
    """Mask of a picture of (w, h) pixels, white on black -> (1, *size) of 1 and 0."""
    grey = open_image(path).convert("L")
    if grey.size != picture_size:
        raise UserError(f"{path}: {grey.width}x{grey.height} pixels, the picture has another size")
    mask = np.array(center_crop_wide(grey, size, Image.NEAREST))
    if not np.isin(mask, (0, 255)).all():
        raise UserError(f"{path}: grey pixels; a mask is white where the subject is, black "
                        "elsewhere")
    return torch.from_numpy(mask / 255).float()[None]


def read_image(path, size=None):
    """-> (3, h, w) in [-1, 1]; size = (h, w) scales and centre-crops, see resize_crop."""
    pixels = torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1).float()
    return _to_float(resize_crop(pixels, size) if size else pixels)


# ---- optical flow

RAFT = {"small": "raft_small_C_T_V2-01064c6d.pth", "large": "raft_large_C_T_SKHT_V2-ff5fadd5.pth"}


def raft(size="small", weights=None, device="cpu"):
    """torchvision's RAFT (arXiv 2003.12039), frozen -> flow(a, b): frames (n,3,h,w) in [-1,1] ->
    (n,2,h,w).

    The flow is in pixels, x then y: what is at (x, y) in a is at (x, y) + flow in b.
    Differentiable in a, b. weights: local file of torchvision's weights (None: PyTorch's hub).
    Frames of which a side is no multiple of 8, or below 128, are enlarged for the network.
    """
    from torchvision.models import optical_flow
    network = getattr(optical_flow, f"raft_{size}")()
    url = f"https://download.pytorch.org/models/{RAFT[size]}"
    state = hub_weights(url, weights, "--flow-weights")
    load_strict(network, state, weights or f"RAFT {size}")
    network.requires_grad_(False).eval().to(device)

    @torch.autocast(torch.device(device).type, enabled=False)  # in float32
    def flow(a, b):
        a, b, (h, w) = a.to(device), b.to(device), a.shape[2:]
        large = [max(128, -(-side // 8) * 8) for side in (h, w)]
        if large != [h, w]:
            a, b = (F.interpolate(x, large, mode="bilinear", align_corners=False) for x in (a, b))
        found = network(a, b)[-1]  # the last of 12 refinements
        if large != [h, w]:
            found = F.interpolate(found, (h, w), mode="bilinear", align_corners=False)
            found = found * found.new_tensor([w / large[1], h / large[0]]).view(2, 1, 1)
        return found
    return flow


def lucas_kanade(a, b):
    """Flow without a network, for motions of a pixel or two (Lucas & Kanade 1981): (n,c,h,w) ->
    (n,2,h,w).

    As of raft(): in pixels, x then y, differentiable. Least squares over a soft window; zero
    where a picture is flat. Contrast does not matter, so that faint pictures (attention maps)
    flow like bright ones.
    """
    def soft(x, times=1):
        for _ in range(times):
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return x
    a, b = soft(a, 2), soft(b, 2)
    mean, it = F.pad((a + b) / 2, (1, 1, 1, 1), mode="replicate"), b - a
    ix = (mean[:, :, 1:-1, 2:] - mean[:, :, 1:-1, :-2]) / 2
    iy = (mean[:, :, 2:, 1:-1] - mean[:, :, :-2, 1:-1]) / 2
    xx, xy, yy, xt, yt = (soft((p * q).sum(1, keepdim=True), 4) for p, q in (
        (ix, ix), (ix, iy), (iy, iy), (ix, it), (iy, it)))
    # edges and flat places tell too little
    damp = 0.1 * (xx + yy).mean((2, 3), keepdim=True) + 1e-8
    xx, yy = xx + damp, yy + damp
    return torch.cat([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / (xx * yy - xy ** 2)


def edges(video):
    """Sketch of a clip (3,f,h,w) in [-1,1] without a network -> (1,f,h,w) in 0..1: Sobel's
    filter, soft."""
    grey = F.pad(video.mean(0)[:, None], (1, 1, 1, 1), mode="replicate")
    across = grey.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4
    steep = F.conv2d(grey, torch.stack([across, across.T])[:, None]).norm(dim=1)
    return (steep / 0.5).clamp(max=1)[None]


def video_maps(video, names, depth=None, flow=None, block=1):
    """VideoComposer's maps of a clip (3,f,h,w) in [-1,1] -> {name: (c,f,h,w)}, those of `names`
    it tells.

    depth(video) -> (1,f,h,w); flow as of raft(): motion is that from the frame before, in pixels,
    zero for the first. block: in the middle of every block of so many pixels, zero between, as
    codec_motion() has it.
    """
    f, found = video.shape[1], {}
    if "depth" in names and depth:
        found["depth"] = depth(video)
    if "sketch" in names:
        found["sketch"] = edges(video)
    if "single_sketch" in names:
        found["single_sketch"] = edges(video[:, :1]).expand(-1, f, -1, -1)
    if "local_image" in names:
        found["local_image"] = (video[:, :1] / 2 + 0.5).expand(-1, f, -1, -1)
    if "motion" in names and flow:
        moved = -frame_flow(flow, video[None].flip(2))[0].flip(0).transpose(0, 1)  # seen from here
        found["motion"] = torch.zeros(2, *video.shape[1:])
        dots = (..., slice(block // 2, None, block), slice(block // 2, None, block))
        found["motion"][:, 1:][dots] = moved.cpu()[dots]
    return found


def frame_flow(flow, video, side=None):
    """Flow of each frame to the next, in one batch: video (b,3,f,h,w) in [-1,1] -> (b,f-1,2,h,w).

    side: shorter side of the answer, by resize().
    """
    before, after = (x.transpose(1, 2).flatten(0, 1) for x in (video[:, :, :-1], video[:, :, 1:]))
    found = flow(before, after).unflatten(0, (len(video), -1))
    return found if side is None else resize(found, side)


def resize(x, size):
    """(..., h, w) -> the same at size (h, w), or of that shorter side; bilinear, not antialiased.

    The numbers stay as they are: a flow is then in pixels of the size that it was found at.
    """
    h, w = x.shape[-2:]
    if isinstance(size, int):
        size = [round(size / min(h, w) * length) for length in (h, w)]
    flat = F.interpolate(x.reshape(-1, 1, h, w), size, mode="bilinear", align_corners=False)
    return flat.reshape(*x.shape[:-2], *size)


# ---- reading videos

def natural_order(path):
    """Sorting key by which frame_2 comes before frame_10."""
    parts = [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", path.name)]
    return parts, path.name  # 1.png and 01.png, too, have an order


def _is_gif(path):
    """By its content: a video may be called .gif."""
    with open(path, "rb") as file:
        return file.read(3) == b"GIF"


def _gif_timeline(path, image):
    """-> (stored frame of each shown frame, fps). Writers merge equal neighbours into one longer
    frame, so a stored frame stands for as many as its duration holds."""
    check_size(path, *image.size)
    check_size(path, *image.size, image.n_frames)  # all are decoded
    durations = []
    for i in range(image.n_frames):
        image.seek(i)
        durations.append(image.info.get("duration") or 100)
    if sum(durations) > GIF_FRAMES * min(durations):
        raise UserError(f"{path}: some frames are shown {max(durations) / 1000:g} s, others "
                        f"{min(durations) / 1000:g} s; convert it to .mp4")
    timeline = [i for i, d in enumerate(durations) for _ in range(round(d / min(durations)))]
    return timeline, 1000 * len(timeline) / sum(durations)


@contextmanager
def _stream(path):
    """Opens a container -> (file, the video stream that a player shows): not the cover of an
    album, the default one first. A list of other files is refused, and nothing but files read."""
    import av
    from av.stream import Disposition
    with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as file:
        if file.format.name in PLAYLISTS:
            raise UserError(f"{path}: a list of other files, not a video")
        streams = [s for s in file.streams.video
                   if s.codec_context and not s.disposition & Disposition.attached_pic]
        if not streams:
            raise UserError(f"{path}: no picture stream: only sound, a cover or an unknown codec")
        stream = min(streams, key=lambda s: not s.disposition & Disposition.default)
        check_size(path, stream.width, stream.height)
        yield file, stream


def _packets(file, stream):
    """The whole packets of a stream, up to where a file is cut off, and the one that flushes."""
    import av
    with suppress(av.InvalidDataError, av.EOFError):
        for packet in file.demux(stream):
            if not packet.is_corrupt:
                yield packet


def _decoded(path, key=None):
    """Yields (time stamp, frame, its stream) of a container, from the key frame stamped `key` on.

    Stamps grow: a frame without one is a frame's length later than the one before. Left out are
    frames that come too late, whose packets are damaged, and that an edit list hides.
    """
    import av
    with _stream(path) as (file, stream):
        if key is not None:
            file.seek(key, stream=stream)
        step, decoder = 1 / ((stream.guessed_rate or FOLDER_FPS) * stream.time_base), stream
        if stream.metadata.get("alpha_mode") == "1":  # FFmpeg's own decoders see no alpha in webm
            name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[stream.codec_context.name]
            decoder = av.CodecContext.create(name, "r")
        last = -math.inf
        for packet in _packets(file, stream):
            frames = []
            with suppress(av.InvalidDataError):
                frames = decoder.decode(packet)
            for frame in frames:
                stamp = frame.pts
                if stamp is None:
                    stamp = 0 if last == -math.inf else last + step
                if stamp > last:
                    last = stamp
                    yield stamp, frame, stream


def _time_stamps(path, exact):
    """-> ([stamp of each frame that is shown], [stamps of key frames], seconds per stamp unit,
    frames per second), all by the presentation time stamps. exact: decode the file to see which
    frames are whole (a film would take minutes: its packets are believed)."""
    with _stream(path) as (file, stream):
        packets = [(p.pts, p.duration, p.is_keyframe, p.is_discard)
                   for p in _packets(file, stream) if p.size]
        stamps = [pts for pts, _, _, hidden in packets if not hidden]  # by an edit list
        keys = [pts for pts, _, key, _ in packets if key]
        one_frame = stream.codec_context.name in ONE_FRAME and keys and None not in stamps + keys
        if not one_frame or exact and len(stamps) < FILM:
            n, stamps, keys = len(stamps), [stamp for stamp, _, _ in _decoded(path)], []
            if one_frame and 0 < len(stamps) < n:
                warn(f"{path}: {n - len(stamps)} of {n} frames cannot be decoded and are left out")
        # what precedes the first key frame cannot be decoded
        stamps = sorted({s for s in stamps if not keys or s >= keys[0]})
        if "mp4" in file.format.name:  # its time starts at 0: earlier frames are hidden
            stamps = [s for s, after in zip(stamps, [*stamps[1:], math.inf]) if after > 0]
        if not stamps:
            raise UserError(f"{path}: no frame can be decoded")
        length = next((length for pts, length, _, _ in packets if pts == stamps[-1]), None)
        return stamps, keys, float(stream.time_base), _frame_rate(stamps, length, stream)


def _frame_rate(stamps, length, stream):
    """Frames per second by their stamps; length: of the last frame, None if unknown.

    Stamps are rounded: where all agree with a rate that the header states, it is that rate.
    """
    tick, n = float(stream.time_base), len(stamps)
    times = (np.array(stamps, float) - stamps[0]) * tick
    stated = [float(r) for r in (stream.guessed_rate, stream.average_rate) if r] or [FOLDER_FPS]
    for rate in stated if n > 1 else ():
        if np.abs(times - np.arange(n) / rate).max() <= min(tick, 0.002):
            return rate
    last = length * tick if length else times[-1] / (n - 1) if n > 1 else 1 / stated[0]
    return float(n / (times[-1] + last))


@cache  # once per file
def _warn_hdr(path):
    warn(f"{path}: HDR; its colours are read as they are stored and look flat: convert it to SDR")


def _shown(path, frame, stream):
    """Decoded frame -> uint8 (h, w, 3) as a player shows it: colours by their tags (HD without a
    tag is BT.709), alpha on white, square pixels, upright, one field of an interlaced frame."""
    if frame.colorspace == UNTAGGED and (frame.height >= HD_LINES or frame.width >= 1280):
        frame.colorspace = BT709
    if stream.codec_context.color_trc in HDR:
        _warn_hdr(path)
    alpha = any(part.is_alpha for part in frame.format.components) or frame.format.name == "pal8"
    width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
    check_size(path, width, frame.height)
    # one thread: starting several takes longer, on a busy machine 50 times so
    pixels = frame.reformat(width, format="rgba" if alpha else "rgb24", threads=1).to_ndarray()
    if alpha:
        pixels = _rgb(Image.fromarray(pixels))
    if frame.interlaced_frame and len(pixels) > 2:  # the lower field is of another moment
        upper = pixels[::2].astype(np.uint16)
        below = np.concatenate([upper[1:], upper[-1:]])[:len(pixels) // 2]
        pixels[1::2] = (upper[:len(below)] + below) // 2
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])  # (x, y) -> (a x + c y, b x + d y)
        sideways = abs(b) > abs(a)
        pixels = pixels.transpose(1, 0, 2) if sideways else pixels
        across, down = (c, b) if sideways else (a, d)
        pixels = pixels[::-1 if down < 0 else 1, ::-1 if across < 0 else 1]
    return pixels


@contextmanager
def _container(path, exact):
    """_opened() for what PyAV reads."""
    stamps, keys, tick, rate = _time_stamps(path, exact)
    frames, at, now = _decoded(path), -1, (-math.inf, None, None)

    def get(i):
        nonlocal frames, at, now
        before = [key for key in keys if key <= stamps[i]] if i - at > FAR else None
        if before:  # far ahead: from the key frame before it
            frames.close()
            frames, now = _decoded(path, before[-1]), (-math.inf, None, None)
            now = next(frames, now)
            if now[0] > stamps[i]:  # the index of the file is wrong
                frames, now = _decoded(path), (-math.inf, None, None)
        at = i
        while now[0] < stamps[i]:
            now = next(frames, (math.inf, None, None))
        if now[0] != stamps[i]:
            raise UserError(f"{path}: frame {i} of {len(stamps)} cannot be decoded")
        return _shown(path, *now[1:])
    try:
        times = [(stamp - stamps[0]) * tick for stamp in stamps]
        yield times, rate, get(0).shape[:2], get
    finally:
        frames.close()


@contextmanager
def _opened(path, exact=False):
    """Yields (times, fps, (h, w), get) of a video file, a gif or a folder of pictures: when each
    frame is shown, in seconds from the first one; get(i) -> uint8 (h, w, 3), for ascending i.
    exact: only frames that can be decoded count; else get may raise for some of a damaged file.
    Whatever goes wrong with the file, here or in get, is a UserError."""
    path, folder = Path(path), os.path.isdir(path)
    if not folder:
        check_file(path, "video")
        if path.suffix.lower() not in VIDEOS:
            raise UserError(f"{path}: not a video; known are {', '.join(VIDEOS)} and a folder of "
                            "pictures")
    try:
        if folder:
            files = list_pictures(path)

            def get(i):
                return np.array(open_image(files[i]))
            times = [i / FOLDER_FPS for i in range(len(files))]
            yield times, FOLDER_FPS, get(0).shape[:2], get
        elif _is_gif(path):
            with Image.open(path) as image:
                timeline, fps = _gif_timeline(path, image)

                def get(i):
                    image.seek(timeline[i])
                    return _rgb(image)
                times = [i / fps for i in range(len(timeline))]
                yield times, fps, (image.height, image.width), get
        else:
            with _container(path, exact) as clip:
                yield clip
    except ImportError:
        raise UserError(f"{path}: reading needs PyAV (a .gif does not): pip install av") from None
    except UserError:
        raise
    except Exception as e:  # decoders raise everything there is
        raise UserError(f"{path}: cannot be decoded ({reason_of(e)})") from None


def video_info(path):
    """-> (frames, fps, (h, w)), as read_video() reads it: by the time stamps, upright."""
    with _opened(path, exact=True) as (times, fps, size, _):
        return len(times), fps, size


def read_video(path, frames=None, fps=None, start=0, size=None, stride=1):
    """-> ((3, f, h, w) in [-1, 1], its fps). frames: exactly so many (None: all) from `start` on,
    an index or a torch.Generator that draws one. fps: the frames that are shown at this rate,
    by their times; at most the file's own. Without it, every stride-th frame. A clip that is too
    short raises (VGen pads it with grey)."""
    with _opened(path, exact=not frames) as (times, own, shape, get):
        count = len(times)
        times, rate, left = _at_rate(times, own, fps, stride)
        starts = int((left >= (frames or 1)).sum())
        if isinstance(start, torch.Generator):
            start = int(torch.randint(max(starts, 1), (), generator=start))
        if start >= starts:
            raise UserError(f"{path}: {count} frames at {own:.4g} fps are too few for "
                            f"{frames or 1} at {rate:.4g} fps from frame {start}")
        wanted = times[start] + np.arange(frames or left[start]) / rate
        nearest = np.searchsorted((times[1:] + times[:-1]) / 2, wanted - 1e-6).tolist()
        h, w = size or shape
        check_size(path, w, h, len(nearest))
        clip = torch.empty(3, len(nearest), h, w)
        for k, i in enumerate(nearest):
            frame = get(i)
            if frame.shape[:2] != tuple(shape):
                raise UserError(f"{path}: frame {i} has size {frame.shape[:2]}, the first one "
                                f"{tuple(shape)}")
            frame = torch.from_numpy(frame.copy()).permute(2, 0, 1).float()
            clip[:, k] = _to_float(resize_crop(frame, size) if size else frame)
    return clip, float(rate)


def _at_rate(times, own, fps, stride=1):
    """Times and rate of _opened(), and how read_video() is asked to read -> times (f,), the rate it
    reads at, and how many frames there are at that rate from each one to the end (f,)."""
    count, usual = len(times), own
    if fps and count > 1:
        usual = 1 / np.median(np.diff(times))  # of a variable rate, not the mean
        usual = usual if usual > 1.05 * own else own
    times = np.array(times) if fps else np.arange(count) / own
    rate = min(fps, usual) if fps else own / stride
    # a quarter of a frame may be a stamp that was rounded
    left = np.ceil((count / own - times) * rate - 0.25 * min(1, rate / own)).astype(int)
    return times, rate, left


def is_clip(path):
    """Is this a video, a gif or a folder of pictures, by its name?"""
    return Path(path).suffix.lower() in VIDEOS or Path(path).is_dir()


def codec_motion(video):
    """Motion vectors by which H.264 stores a clip (3,f,h,w) in [-1,1] -> (2,f,h,w) in pixels, x
    then y.

    How far each block came since the frame before, as one dot in its middle, as VideoComposer
    reads them; zero elsewhere, in the first frame, and where a block was stored anew. The clip is
    encoded for it: a file's own vectors point to frames that they do not name.
    """
    try:
        import av
    except ImportError:
        raise UserError("motion vectors need PyAV: pip install av, or --flow-weights") from None
    (f, h, w), stored = video.shape[1:], io.BytesIO()
    with av.open(stored, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = w + w % 2, h + h % 2, "yuv420p"
        one_before = "bframes=0:ref=1:keyint=infinite:scenecut=0:weightp=0"
        stream.options = {"crf": MP4_CRF, "x264-params": one_before}
        even = (0, 0), (0, h % 2), (0, w % 2), (0, 0)
        for pixels in np.pad(to_uint8(video), even, mode="edge"):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    maps = torch.zeros(2, f, h, w)
    with av.open(io.BytesIO(stored.getvalue())) as file:
        file.streams.video[0].codec_context.options = {"flags2": "+export_mvs"}
        for i, frame in enumerate(file.decode(video=0)):
            side = frame.side_data.get("MOTION_VECTORS")
            for v in () if side is None else side.to_ndarray():
                x, y = min(max(v["dst_x"], 0), w - 1), min(max(v["dst_y"], 0), h - 1)  # its middle
                moved = torch.tensor([-v["motion_x"], -v["motion_y"]])
                maps[:, i, y, x] = moved / float(v["motion_scale"])
    return maps


ARRAY_NUMBERS = 250e6  # in the largest array, or archive of arrays


def array_header(file, length, source) -> int:
    """Refuse a .npy stream of `length` bytes that lacks what its header promises. -> numbers"""
    version = np.lib.format.read_magic(file)
    header = np.lib.format
    read = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
    shape, _, kind = read(file)
    if kind.kind not in "biuf":
        raise UserError(f"{source}: an array of {kind}, not of numbers")
    if math.prod(shape) * kind.itemsize > length - file.tell():
        raise UserError(f"{source}: cut off: its header promises {math.prod(shape)} numbers, the "
                        f"file has {length} bytes")
    return math.prod(shape)


def read_array(path, name) -> dict:
    """.npy -> {name: array}; .npz -> its arrays, `name` among them.

    Arrays hold numbers or booleans. Nothing is allocated before the header was checked.
    """
    path, count = check_file(path), 0
    try:
        archive = zipfile.is_zipfile(path)
        with zipfile.ZipFile(path) if archive else path.open("rb") as file:
            if not archive:
                count = array_header(file, path.stat().st_size, path)
            for member in file.infolist() if archive else ():
                with file.open(member) as part:
                    count += array_header(part, member.file_size, f"{path}: {member.filename}")
        check_limit("ARRAY", count, ARRAY_NUMBERS, f"{path}: {count / 1e6:.0f} million numbers")
        content = np.load(path)
        arrays = dict(content) if archive else {name: content}
    except UserError:
        raise
    except Exception as e:  # zip, header and MemoryError alike mean one thing to the user
        raise UserError(f"{path}: not a .npy or .npz file of numbers ({reason_of(e)})") from None
    if name not in arrays:
        raise UserError(f"{path}: holds no array {name!r}, only {', '.join(arrays)}")
    return arrays


def read_map(path, frames, size, channels):
    """A condition of VideoComposer -> (channels, f, h, w) float32: .npy as it is, a video or
    picture in 0..1.

    frames: exactly so many (None: all; a picture is one); size (h, w). .npy: (f,h,w) or
    (channels,f,h,w).
    """
    kind = Path(path).suffix.lower()
    if kind == ".npy":
        value = torch.from_numpy(read_array(path, "map")["map"].astype(np.float32))
        value = value[None] if value.dim() == 3 else value
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: holds NaN or infinity")
    elif kind in IMAGES:
        value = read_image(path, size)[:, None] / 2 + 0.5
    else:
        value = read_video(path, frames, size=size)[0] / 2 + 0.5
    if kind != ".npy" and channels == 1:
        value = value.mean(0, keepdim=True)
    if value.dim() != 4 or value.shape[0] != channels:
        raise UserError(f"{path}: shape {tuple(value.shape)}; expected {channels} channel(s): "
                        f"({channels}, frames, height, width)")
    if not value.numel() or (frames is not None and value.shape[1] != frames):
        raise UserError(f"{path}: {value.shape[1]} frame(s) instead of {frames}, or empty frames")
    if tuple(value.shape[2:]) == tuple(size):
        return value
    return F.interpolate(value, size, mode="bilinear")


# ---- writing

def write_video(path, video, fps=8):
    """video (3, f, h, w) in [-1, 1] -> .mp4 (H.264 yuv420p; odd sides gain one repeated pixel) or
    .gif."""
    frames, kind = to_uint8(video), Path(path).suffix.lower()
    if kind not in (".mp4", ".gif"):
        raise UserError(f"{path}: videos are written as .mp4 or .gif")
    if not 0.001 <= fps <= 1000:  # a player of such an mp4 shows nothing
        raise UserError(f"{path}: {fps:g} fps; files are written at 0.001 to 1000")

    def gif(tmp):
        # A gif counts in 1/100 s: rounding the end of each frame, not its length, keeps the mean
        # rate.
        ends = [round(100 * i / fps) * 10 for i in range(len(frames) + 1)]
        lengths = np.diff(ends).tolist()
        duration = lengths if len(lengths) > 1 else lengths[0]
        iio.imwrite(tmp, frames, extension=".gif", loop=0, duration=duration)

    def mp4(tmp):
        import av
        h, w = frames.shape[1:3]
        even = (0, 0), (0, h % 2), (0, w % 2), (0, 0)  # 4:2:0 has even sides
        hd = h + h % 2 >= HD_LINES
        with av.open(str(tmp), "w") as file:
            rate = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
            stream = file.add_stream("libx264", rate, {"crf": MP4_CRF})
            if max(h, w) < 128:  # x264's fast code reads past so small a picture: files would vary
                stream.options |= {"x264-params": "asm=0"}
            stream.width, stream.height, stream.pix_fmt = w + w % 2, h + h % 2, "yuv420p"
            context = stream.codec_context
            context.color_primaries = context.color_trc = BT709  # as sRGB's, near enough
            context.colorspace, context.color_range = BT709 if hd else BT601, 1
            for i, pixels in enumerate(np.pad(frames, even, mode="edge")):
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(
                    format="yuv420p", dst_colorspace="ITU709" if hd else "ITU601", threads=1)
                frame.pts = i
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    try:
        write_atomic(path, gif if kind == ".gif" else mp4)
    except ImportError:
        raise UserError(f"{path}: writing .mp4 needs PyAV: pip install av, or write .gif") from None


def _strip(video, frames, scale):
    """`frames` evenly spaced frames side by side -> uint8 (h, w, 3). scale None: about 96 to 256
    pixels."""
    picks = torch.linspace(0, video.shape[1] - 1, min(frames, video.shape[1])).round().long()
    video = video.detach().float().cpu()[:, picks]
    h, w = video.shape[2:]
    if scale is None and max(h, w) > 256:
        video = resize_crop(video, (round(h * 256 / max(h, w)), round(w * 256 / max(h, w))))
    scale = scale or max(1, -(-96 // max(h, w)))
    tiles = to_uint8(video).repeat(scale, 1).repeat(scale, 2)  # nearest: pixels stay pixels
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    return np.concatenate(list(tiles), 1)[:, :-2]


def _wrap(text, font, width):
    """Words -> list of lines at most `width` pixels long (a longer word stands alone)."""
    lines = [""]
    for word in str(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def contact_sheet(videos, path, captions=None, frames=8, scale=None, headers=None):
    """PNG with a row a video, or videos side by side (before, after) under `headers`; captions
    above. videos: list of (3, f, h, w) in [-1, 1], or list of such lists; small ones are enlarged
    by an integer."""
    rows = [row if isinstance(row, (list, tuple)) else [row] for row in videos]
    rows = [[_strip(video, frames, scale) for video in row] for row in rows]
    if not rows or (captions and len(captions) != len(rows)):
        raise UserError(f"{path}: {len(rows)} rows of videos and {len(captions or [])} captions")
    font, line, margin, gap = ImageFont.load_default(14), 18, 12, 20
    columns = [max(row[j].shape[1] for row in rows if j < len(row))
               for j in range(max(map(len, rows)))]
    lefts = [margin + sum(columns[:j]) + gap * j for j in range(len(columns))]
    width = max(lefts[-1] + columns[-1] + margin, 240)
    texts = [_wrap(c, font, width - 2 * margin) for c in captions] if captions else [[]] * len(rows)
    heights = [line * len(text) + max(s.shape[0] for s in row) + gap // 2
               for text, row in zip(texts, rows)]
    top = margin + (line if headers else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) - gap // 2 + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for left, header in zip(lefts, headers or []):
        draw.text((left, margin - 2), header, "black", font)
    for text, row, height in zip(texts, rows, heights):
        for i, words in enumerate(text):
            draw.text((margin, top + i * line - 2), words, (60, 60, 60), font)
        for left, strip in zip(lefts, row):
            sheet.paste(Image.fromarray(strip), (left, top + line * len(text)))
        top += height
    write_atomic(path, lambda tmp: sheet.save(tmp, "PNG"))


# ---- prompt files and lists

# Spellings in use for the same field; the first is ours, an earlier one wins where a row has
# several.
PROMPT_KEYS = ("prompt", "caption", "en_caption", "prompt_en", "text")
VIDEO_KEYS = ("video", "path", "file", "file_name", "video_path", "file_path", "image_path")
CAPTION_KEYS = ("caption", "text", "prompt", "en_caption")
TRACK_KEYS = ("tracking", "tracks")
TABLES = (".csv", ".tsv", ".jsonl", ".json")


def numbered_lines(path, comments="#"):
    """-> [(row, stripped line)] without blank lines and comments; rows count from 1 as in an
    editor."""
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    # not splitlines: that one also cuts at U+2028 and others, which may stand inside a caption or
    # JSON
    rows = [(n, check_text(s.strip(), f"{path} row {n}"))
            for n, s in enumerate(text.split("\n"), 1)]
    rows = [(n, s) for n, s in rows if s and not (comments and s.startswith(comments))]
    if not rows:
        raise UserError(f"{path}: only comments and blank lines")
    return rows


def read_table(path):
    """.csv or .tsv with a header, .jsonl or .json (a list) of objects -> [(row, dict)].

    A csv row with surplus or missing fields is refused: an unquoted comma would cut the caption
    silently, as in 17 of the 51 rows of DEMO's own prompt file.
    """
    kind = Path(path).suffix.lower()
    if kind in (".csv", ".tsv"):
        return _csv_rows(path)
    if kind == ".json":
        rows = list(enumerate(_list_file(path, "objects"), 1))
    else:
        rows = [(n, parse_json(s, f"{path} row {n}"))
                for n, s in numbered_lines(path, comments=None)]
    for n, row in rows:
        if not isinstance(row, dict):
            raise UserError(f'{path} row {n}: not an object such as {{"prompt": "..."}}')
    return rows


def _csv_rows(path):
    """read_table() of a .csv or .tsv; fields are parted by what parts the header's: tab, comma, or
    the semicolon of Excel in many countries."""
    text = read_text(path)
    parted = next((mark for mark in "\t,;" if mark in text.lstrip().splitlines()[0]), ",")
    text = io.StringIO(text, newline="")
    reader, rows = csv.reader(text, strict=True, delimiter=parted), []
    try:
        header = [name.strip() for name in next(reader)]
        if len(set(header)) != len(header):
            raise UserError(f"{path} row 1: a column name stands twice ({', '.join(header)})")
        for row in reader:
            row = row if any(map(str.strip, row)) else []  # Excel's empty rows
            if row and len(row) != len(header):
                raise UserError(f"{path} row {reader.line_num}: {len(row)} fields, the header "
                                f"{len(header)}; put a text with a comma in \"double quotes\", or "
                                "save a .txt with a prompt per line")
            if row:
                rows.append((reader.line_num, dict(zip(header, row))))
    except csv.Error as e:
        raise UserError(f"{path} row {reader.line_num}: not valid csv ({e}); a quote within quotes "
                        "is doubled") from None
    if not rows:
        raise UserError(f"{path}: a header without rows")
    return rows


def field_of(row, keys, where):
    """The first of `keys` in the row: a text which is not empty."""
    key = next((k for k in keys if k in row), None)
    if key is None:
        found = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{where}: no `{keys[0]}` (nor {', '.join(keys[1:])}), only {found}")
    if not isinstance(row[key], str) or not row[key].strip():
        raise UserError(f"{where}: `{key}` is empty or not a text")
    return check_text(row[key].strip(), f"{where}: `{key}`")


def _bar_rows(path, *names):
    """.txt of lines such as `path|||caption` -> [(row, path, caption)]; names: of the fields."""
    rows = [(n, *map(str.strip, line.split("|||"))) for n, line in numbered_lines(path)]
    for n, *fields in rows:
        if len(fields) != len(names) or not all(fields):
            raise UserError(f"{path} row {n}: wanted {'|||'.join(names)}, found "
                            f"{'|||'.join(fields)[:60]!r}")
    return rows


def listed_path(source, n, text, what, root=None):
    """The file `text` of row n of a list, a `what`: below `root` if given, else below the list's
    folder or the working directory. A Path stays as it is. Raises UserError if it is not there.

    Where no file is spelt so, other spellings are tried: macOS writes an accent as a letter of its
    own, Windows \\ for /."""
    places, found = [Path(root)] if root else [Path(source).parent, Path()], []
    places, name = ([Path()], str(text)) if isinstance(text, Path) else (places, text)
    accents = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    for spelling in (name, *accents, name.replace("\\", "/")):
        found = found or [p / spelling for p in places if os.path.exists(p / spelling)]
    if len(found) > 1 and not os.path.samefile(*found):
        raise UserError(f"{source} row {n}: {text} is both in the list's folder and in the working "
                        "directory; --data-root FOLDER says which is meant")
    path = found[0] if found else places[0] / name
    try:
        return path if os.path.isfile(path) or os.path.isdir(path) else check_file(path, what)
    except UserError as e:
        raise UserError(f"{source} row {n}: {e}") from None


def _json_prompts(data, path):
    """The JSON forms in use: {file: prompt}, a list of prompts, of {"prompt": ...} or of {file:
    prompt}, and any of these under "prompts" (VideoDPO)."""
    if isinstance(data, dict) and isinstance(data.get("prompts"), (dict, list)):
        data = data["prompts"]
    if isinstance(data, dict):
        data = list(data.values())
    if not isinstance(data, list) or not data:
        raise UserError(f'{path}: wanted {{file: prompt}}, a list of prompts or a list of '
                        '{"prompt": ...}')
    prompts = []
    for n, row in enumerate(data, 1):
        if isinstance(row, dict) and len(row) == 1 and not set(row) & set(PROMPT_KEYS):
            row = next(iter(row.values()))  # {"000001.mp4": prompt}
        row = row if isinstance(row, dict) else {"prompt": row}
        prompts.append(field_of(row, PROMPT_KEYS, f"{path} entry {n}"))
    return prompts


def _seeded_line(n, line, path):
    """A line `prompt` or `prompt|seed` -> (row n, prompt, seed or "")."""
    if "|||" in line:
        raise UserError(f"{path} row {n}: image|||caption is for image-to-video; keep the "
                        "caption alone")
    seeded = re.fullmatch(r"(.*\S)\s*\|\s*(-?\d+)", line)
    return n, *(seeded.groups() if seeded else (line, ""))


def read_seeded_prompts(path):
    """-> [(prompt, seed or None)]. .txt: a line each, # comments, VGen's lines `prompt|seed`;
    .csv, .tsv or .jsonl: `prompt` (or caption, en_caption, prompt_en, text) and `seed` of each row;
    .json: see _json_prompts."""
    kind = Path(path).suffix.lower()
    if kind == ".json":
        prompts = _json_prompts(parse_json(read_text(path), path), path)
        return [(prompt, None) for prompt in prompts]
    if kind in TABLES:
        rows = [(n, field_of(row, PROMPT_KEYS, f"{path} row {n}"), str(row.get("seed") or ""))
                for n, row in read_table(path)]
    elif kind == ".txt":
        rows = [_seeded_line(n, line, path) for n, line in numbered_lines(path)]
    else:
        raise UserError(f"{path}: prompt files are .txt, .csv, .tsv, .jsonl or .json")
    prompts = []
    for n, prompt, seed in rows:
        if not seed or re.fullmatch(r"\d+(-\d+)+", seed):  # none, or that of a clip of index.jsonl
            prompts.append((prompt, None))
            continue
        try:
            prompts.append((prompt, SEED(seed)))
        except ArgumentTypeError as e:
            raise UserError(f"{path} row {n}: seed {e}") from None
    return prompts


def read_prompts(path):
    """Prompts of read_seeded_prompts(), for uses without a seed per prompt."""
    rows = read_seeded_prompts(path)
    if any(seed is not None for _, seed in rows):
        warn_once(f"{path}: its seeds are not used here")
    return [prompt for prompt, _ in rows]


def prompt_grid(nouns, activities):
    """Two files of prompts, a line each -> "a NOUN ACTIVITY" for every pair (VADER's
    nouns_activities)."""
    rows = read_prompts(activities)
    named = [f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in read_prompts(nouns)]
    return [f"{noun} {activity}" for noun in named for activity in rows]


def read_triples(path):
    """.txt of lines `clip|||folder|||prompt` -> [(clip, folder, prompt)]; see listed_path()."""
    rows = _bar_rows(path, "clip", "folder of references", "prompt")
    return [(listed_path(path, n, clip, "clip"), listed_path(path, n, folder, "folder"), prompt)
            for n, clip, folder, prompt in rows]


def read_image_prompts(path, root=None):
    """.txt of `image|||caption` lines -> [(image path, caption)]; paths: see listed_path()."""
    return [(listed_path(path, n, image, "picture", root), caption)
            for n, image, caption in _bar_rows(path, "image", "caption")]


# ---- which clips a folder or a list holds

# names of hidden files, and of files that an editor, a browser or a killed writer leaves behind
TEMPORARY = re.compile(r"^[.~]|~$|\.te?mp(\.|$)|\.(part|crdownload)$", re.IGNORECASE)
LISTS = ("index.jsonl", *(f"metadata{kind}" for kind in (".csv", ".tsv", ".jsonl")))
# lists that belong together line by line (CogVideoX, DaS, finetrainers)
COLUMNS = {"caption": ("prompt.txt", "prompts.txt"), "video": ("videos.txt",),
           "tracking": ("trackings.txt",), "image": ("images.txt",)}


def list_folder(folder, temporary=False):
    """What is in a folder, in natural order; hidden and temporary files only if asked for."""
    check_folder(folder)
    try:
        entries = sorted(Path(folder).iterdir(), key=natural_order)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{folder}: cannot be read ({reason}); check its name and permissions"
                        ) from None
    return [p for p in entries if temporary or not TEMPORARY.search(p.name)]


def list_pictures(folder):
    """Pictures in a folder, in natural order; none is a UserError."""
    files = [p for p in list_folder(folder) if p.suffix.lower() in IMAGES]
    if not files:
        raise UserError(f"{folder}: no pictures in this folder ({', '.join(IMAGES)})")
    return files


def list_clips(source, captions="needed", tracks=False, root=None):
    """Clips of any source -> (the file or folder that lists them, [(row, clip, caption)]).

    source: a clip; a .csv, .tsv, .jsonl or .json list, WebVid's csv, a .txt of video|||caption
    lines; or a folder with one of LISTS, with COLUMNS (matched line by line), with videos/ and
    labels/, or with clips and same-named .txt. captions: "needed"; "empty" ("" where there is
    none, with a warning); "found" (None where there is none, and pictures are no clips); "ignored"
    (all are ""). tracks: rows are (row, clip, tracking video, caption). root: see listed_path(). A
    row stands there as often as its `repeats` says, except where captions are "found". Two lists in
    a folder, texts that fit two clips, and clips that are not there are refused; what a folder
    holds besides is left out with a warning.
    """
    source = Path(source)
    if not os.path.isdir(source):
        check_file(source, "folder or list of clips")
    if os.path.isdir(source):
        rows, source = _folder_rows(source, captions, tracks)
    elif source.suffix.lower() in VIDEOS and not tracks:
        rows = _single_clip(source, captions)
    elif source.suffix.lower() in TABLES:
        rows = _table_rows(source, captions, tracks)
    elif source.suffix.lower() == ".txt" and not tracks:
        rows = _text_rows(source, captions)
    else:
        files, lines = (("a folder with prompt.txt, videos.txt and trackings.txt",
                         "a list with video, tracking, caption") if tracks else
                        ("a folder", ".txt with video|||caption lines"))
        raise UserError(f"{source}: wanted {files}, {', '.join(TABLES)}, or {lines}")
    found = []
    for n, clip, track, caption in rows:
        paths = [listed_path(source, n, clip, "clip", root)]
        if tracks:
            paths.append(listed_path(source, n, track, "tracking video", root))
        found.append((n, *paths, "" if captions == "ignored" else caption))
    if captions != "found":
        _count_bare(source, found, captions)
        found = [(*row[:-1], row[-1] or "") for row in found]
    if source.name in LISTS or source.name in COLUMNS["video"]:
        used = [path for row in found for path in row[1:2 + tracks]]
        _say_left_out(source, used, [source.parent, *(path.parent for path in used)], VIDEOS)
    return source, found


def _count_bare(source, rows, captions):
    """Refuse rows without a caption, or warn of them, with their number; rows: of list_clips()."""
    rows = dict.fromkeys(rows)  # a repeated row counts once
    bare = [row for row in rows if row[-1] is None]
    if not bare:
        return
    n, clip = bare[0][:2]
    where = f"{clip}: no caption beside it; write {clip.stem}.txt, or metadata.csv for all"
    if source.suffix.lower() in TABLES:
        where = f"{source} row {n}: `caption` is empty or missing"
    elif source.suffix.lower() == ".txt":
        where = f"{source} row {n}: wanted video|||caption"
    count = f"{len(bare)} of {len(rows)} clips have no caption"
    if captions == "needed":
        raise UserError(f"{where} ({count}; --empty-captions trains them on an empty one)")
    warn(f"{source}: {count} and are trained on an empty one, the first is {clip}")


def _say_left_out(source, used, folders, kinds=None):
    """Warn of what lies in `folders` and is not in `used`; kinds: only files with these endings."""
    used = set(map(os.path.abspath, used))
    others = [p for folder in dict.fromkeys(map(os.path.abspath, folders))
              for p in list_folder(folder, temporary=True)
              if os.path.abspath(p) not in used and (not kinds or p.suffix.lower() in kinds)]
    if others:
        names = ", ".join(p.name for p in others[:3]) + ", ..." * (len(others) > 3)
        warn_once(f"{source}: files that it does not list or that are no clips are left out "
                  f"({len(others)}): {names}")


def _folder_rows(folder, captions, tracks):
    """-> [(row, clip, tracking video or None, caption or None)], the list or folder they are of."""
    entries = list_folder(folder)
    names = {p.name for p in entries}
    listed = [name for name in LISTS if name in names]
    columns = [name for column in COLUMNS.values() for name in column if name in names]
    clips_here = any(p.suffix.lower() in VIDEOS + IMAGES for p in entries)
    paired = {*columns} & {*COLUMNS["video"], *COLUMNS["tracking"]}
    if paired or (columns and (tracks or not clips_here)):
        listed.append(", ".join(columns))
    labels = all(os.path.isdir(folder / name) for name in ("videos", "labels"))
    listed += ["labels/"] * labels + ["clips beside it"] * (labels and clips_here)
    if len(listed) > 1:
        raise UserError(f"{folder}: clips are listed twice, in {' and in '.join(listed)}; give the "
                        "list that counts, or keep only that one")
    if listed and listed[0] in LISTS:
        source = folder / listed[0]
        return _table_rows(source, captions, tracks), source
    if listed and not labels:
        return _column_rows(folder, columns, captions, tracks), folder / COLUMNS["video"][0]
    if tracks:
        raise UserError(f"{folder}: prompt.txt: no such file; clips with tracking videos need "
                        "prompt.txt, videos.txt and trackings.txt, or a metadata.csv")
    clips = folder / "videos" if labels else folder
    return _clips_beside(clips, folder / "labels" if labels else folder, captions), clips


def _column_rows(folder, names, captions, tracks):
    """_folder_rows() of lists that belong together line by line."""
    needed = {"video": True, "caption": captions == "needed", "tracking": tracks}
    columns = {}
    for column, spellings in COLUMNS.items():
        found = [name for name in spellings if name in names]
        if len(found) > 1:
            raise UserError(f"{folder}: {' and '.join(found)} are both there; keep one")
        if needed.get(column) and not found:
            raise UserError(f"{folder}: {spellings[0]}: no such file, but {', '.join(names)}")
        if found:
            columns[column] = dict(numbered_lines(folder / found[0], comments=None))
    if len(set(map(len, columns.values()))) > 1:
        counts = ", ".join(f"{name} {len(columns[key])}" for key in columns
                           for name in COLUMNS[key] if name in names)
        raise UserError(f"{folder}: the lists differ in length ({counts}), but belong together "
                        "line by line")
    apart = [n for lines in zip(*columns.values()) for n in lines if n != lines[0]]
    if apart:
        raise UserError(f"{folder}: row {apart[0]} of a list is an empty line of another "
                        f"({', '.join(names)}); they belong together line by line")
    if "image" in columns:
        warn_once(f"{folder}/images.txt: is not read; the first frame of a clip is its picture")
    tracking, caption = (columns.get(column, {}) for column in ("tracking", "caption"))
    return [(n, clip, tracking.get(n), caption.get(n)) for n, clip in columns["video"].items()]


def _table_rows(source, captions, tracks):
    """_folder_rows() of a .csv, .tsv, .jsonl or .json."""
    rows = []
    index = source.name == LISTS[0]  # `video` and others are there what sample.py was given
    for n, row in read_table(source):
        where, text = f"{source} row {n}", None
        if {"videoid", "name", "page_dir"} <= row.keys():  # WebVid
            row = {"video": f"{row['page_dir']}/{row['videoid']}.mp4", "caption": row["name"]}
        clip = field_of(row, ("file", "path") if index else VIDEO_KEYS, where)
        track = field_of(row, TRACK_KEYS, where) if tracks else None
        given = any(str(row.get(key) or "").strip() for key in CAPTION_KEYS)
        if index and captions == "found" and row.get("prompt") == "":
            text = ""  # a prompt, too
        elif captions != "ignored" and given:
            text = field_of(row, CAPTION_KEYS, where)
        often = 1 if captions == "found" else _repeats(row, where)
        rows += [(n, clip, track, text)] * often
    return rows


def _repeats(row, where):
    """How often an epoch shows the clip of a row."""
    value = row.get("repeats")
    text = "" if value is None else str(value).strip()
    if not re.fullmatch(r"([1-9][0-9]{0,3})?", text):
        raise UserError(f"{where}: `repeats` is {text[:20]!r}; give a whole number from 1 to 9999")
    return int(text or 1)


def _text_rows(source, captions):
    """_folder_rows() of a .txt: video|||caption, or without captions a clip per line."""
    rows = [(n, *map(str.strip, line.partition("|||"))) for n, line in numbered_lines(source)]
    prompts = captions == "needed" and not any(row[3] for row in rows)  # hardly a list of clips
    for n, clip, _, caption in rows:
        if prompts or (captions in ("needed", "empty") and (not clip or "|||" in caption)):
            raise UserError(f"{source} row {n}: wanted video|||caption")
    return [(n, clip, None, caption or None) for n, clip, _, caption in rows]


def _single_clip(path, captions):
    """_folder_rows() of a clip; its caption: of an index.jsonl or a .txt beside it."""
    index, text = path.parent / LISTS[0], path.with_suffix(".txt")
    caption = None
    if captions == "found" and os.path.isfile(index):
        rows = _table_rows(index, captions, tracks=False)
        caption = next((row[3] for row in rows if row[1] == path.name), None)
    elif captions != "ignored" and os.path.isfile(text):
        caption = _caption_file(text)
    return [(1, path, None, caption)]


def _caption_file(text):
    """The caption in a .txt file; None if it is blank."""
    if os.path.isfile(text) and os.path.getsize(text) < 100 and not text.read_bytes().strip():
        return None
    return check_text(" ".join(read_text(text).split()), text)


def _clips_beside(folder, texts, captions):
    """_folder_rows() of clips, and sub-folders of pictures, with a same-named .txt in `texts`."""
    normal = partial(unicodedata.normalize, "NFC")  # macOS writes an accent as a letter of its own
    entries, files = list_folder(folder), {}
    for p in list_folder(texts):
        if p.suffix.lower() == ".txt":
            files.setdefault(normal(p.stem), []).append(p)
    kinds = VIDEOS + (() if captions == "found" else IMAGES)
    clips = {p: normal(p.name if os.path.isdir(p) else p.stem) for p in entries
             if (normal(p.name) in files if os.path.isdir(p) else p.suffix.lower() in kinds)}
    if not clips and captions == "found" and any(p.suffix.lower() in IMAGES for p in entries):
        return [(1, folder, None, None)]  # one clip, as pictures
    if not clips:
        raise UserError(f"{folder}: no clips in this folder ({', '.join(VIDEOS[:9])} ...)")
    rows, owner = [], {}
    for n, (clip, stem) in enumerate(clips.items(), 1):
        if os.path.isdir(clip):
            list_pictures(clip)
        found = files.get(stem, [])
        if captions != "ignored" and len(found) > 1 or (found and stem in owner):
            both = [p.name for p in found] if len(found) > 1 else [owner[stem].name, clip.name]
            raise UserError(f"{folder}: {' and '.join(both)} share a name, so that clips and "
                            "captions cannot be matched; rename one")
        owner[stem], caption = clip, None
        if captions != "ignored" and found:
            caption = _caption_file(found[0])
        rows.append((n, clip, None, caption))
    used = [*clips, *(p for stem in owner for p in files.get(stem, []))]
    _say_left_out(folder, used, [folder, texts])
    return rows


def clips_with_prompts(path, file=None, prompt=None):
    """Clips to score or to enlarge -> [(clip, prompt or None)].

    The prompts are those of a file (in the order of the clips, or a .json by their names), one for
    all, or those that list_clips() finds.
    """
    rows = list_clips(path, "found")[1]
    if not file:
        return [(clip, caption if prompt is None else prompt) for _, clip, caption in rows]
    if Path(file).suffix.lower() == ".json":
        named = parse_json(read_text(file), file)
        prompts = _json_prompts(named, file)
        named = named.get("prompts", named) if isinstance(named, dict) else {}
    else:
        prompts, named = read_prompts(file), {}
    if isinstance(named, dict) and any(clip.name in named for _, clip, _ in rows):
        by_name = dict(zip(named, prompts))
        prompts = [by_name[clip.name] for _, clip, _ in rows if clip.name in by_name]
    if len(prompts) != len(rows):
        raise UserError(f"{file}: {len(prompts)} prompts for {len(rows)} clips")
    return [(clip, text) for (_, clip, _), text in zip(rows, prompts)]


# ---- data sets of clips with captions

class VideoDataset(torch.utils.data.Dataset):
    """Items {"video": (3, frames, height, width) in [-1, 1], "text": str, "path": str}. source,
    root: see list_clips(). The list is checked here, a clip when it is read: a bad one (corrupt,
    empty, too short, changing size) is named, counted, and replaced by the next row; past 1 % of
    the rows, and more than one, the run stops. Pictures count as clips when frames == 1. Item (i,
    number) is row i, its start drawn for `number` alone: a clip that comes again starts
    elsewhere. repeats: how often an epoch of Buckets shows each row."""

    def __init__(self, source, frames, height, width, fps=None, seed=0, root=None, rows=None,
                 captions=True):
        # rows: already read, [(row, path, caption)]
        if rows is None:
            source, rows = list_clips(source, "needed" if captions else "ignored", root=root)
        often = Counter(rows)  # a row stands there as often as its list repeats it
        self.source, self.rows, self.repeats = source, list(often), list(often.values())
        self.frames, self.size, self.fps, self.seed = frames, (height, width), fps, seed
        known = {}
        twice = [n for n, *clip in self.rows if known.setdefault(tuple(clip), n) != n]
        if twice:
            warn(f"{self.source} row {twice[0]}: clip and caption stand in an earlier row, too "
                 f"({len(twice)} such rows): they count double")
        for n, path, _ in self.rows:
            if path.suffix.lower() in IMAGES and frames != 1:
                raise UserError(f"{self.source} row {n}: {path}: a picture is one frame; use "
                                "--frames 1, or a size for it such as --buckets 1x256x256")
        # in shared memory: the workers of a loader count their bad clips together
        self.bad = torch.zeros(len(self.rows), dtype=torch.bool)
        with suppress(RuntimeError):  # none is left: readers will say so
            self.bad.share_memory_()

    def __len__(self):
        return len(self.rows)

    def load(self, row, number):
        """The clip of rows[row], its start drawn for `number`. A bad clip raises UserError."""
        _, path, text = self.rows[row]
        if path.suffix.lower() in IMAGES:
            video = read_image(path, self.size)[:, None]
        else:
            start = generator(self.seed, "clip", number)
            video, _ = read_video(path, self.frames, self.fps, start, self.size)
        return {"video": video, "text": text, "path": str(path)}

    def __getitem__(self, item):
        index, number = item
        for later in range(len(self)):  # the next row stands in for a bad one
            row = (index + later) % len(self)
            if self.bad[row]:
                continue
            try:
                return self.load(row, number)
            except UserError as e:
                self.bad[row] = True
                print(f"bad clip: {self.source} row {self.rows[row][0]}: {reason_of(e)}",
                      file=sys.stderr)
            if int(self.bad.sum()) > max(1, len(self) // 100):
                break
        raise UserError(f"{self.source}: {int(self.bad.sum())} of {len(self)} clips are bad, over "
                        "1 %; "
                        + self.advice())

    def advice(self):
        """How to find all bad clips."""
        h, w = self.size
        command = f"python data.py --check {self.source} --frames {self.frames}"
        fps = f" --fps {self.fps:g}" if self.fps else ""
        return f"see {command} --height {h} --width {w}{fps}"


def open_clips(source, sizes, fps=None, seed=0, root=None, captions="needed"):
    """Clips of a list, see list_clips(), each read at one of `sizes` (frames, height, width) -> a
    VideoDataset; Buckets of them if there are several sizes, or rows that repeat."""
    source, rows = list_clips(source, captions, root=root)
    parts = [VideoDataset(source, *size, fps, seed, rows=part)
             for size, part in by_size(source, rows, sizes, fps).items()]
    plain = len(sizes) == 1 and set(parts[0].repeats) == {1}
    return parts[0] if plain else Buckets(parts)


def by_size(source, rows, sizes, fps=None):
    """Rows of list_clips() -> {size (frames, height, width): its rows}, sorted, of the sizes that
    get any. Several sizes are told how many clips they get."""
    if len(sizes) == 1:
        return {sizes[0]: rows}
    parts = {size: [] for size in sorted(sizes)}
    often = tqdm(Counter(rows).items(), "sizes of clips", disable=not MAIN, delay=5)
    for row, times in often:
        parts[nearest_size(row[1], sizes, fps)] += [row] * times
    if MAIN:
        counts = [f"{len(set(part))} as {f}x{h}x{w}" for (f, h, w), part in parts.items()]
        print(f"{source}: clips are read in sizes: {', '.join(counts)}", flush=True)
    return {size: part for size, part in parts.items() if part}


def nearest_size(path, sizes, fps=None):
    """The one of `sizes` (frames, height, width) at which to read a clip at `fps`.

    Of those whose frames the clip has, the nearest in aspect, then the longest, then the nearest in
    height and width. One frame is for pictures, and for clips too short for the others. Clips that
    are too short for all, or cannot be opened, get a shortest one: when read, they count as bad.
    """
    try:
        if path.suffix.lower() in IMAGES:
            count, (w, h) = 1, open_image(path).size
        else:
            with _opened(path) as (times, own, (h, w), _):
                count = _at_rate(times, own, fps)[2][0]
    except UserError:
        return min(sizes)
    least = min(sizes)[0]
    fitting = ([size for size in sizes if 1 < size[0] <= count]
               or [size for size in sizes if size[0] == least])
    return min(fitting, key=lambda size: (
        abs(math.log(size[1] * w / (size[2] * h))), -size[0], abs(size[1] - h) + abs(size[2] - w)))


def _list_file(path, what):
    """A JSON file that holds a list of objects."""
    rows = parse_json(read_text(path), path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: not a list of {what}; wanted [{{...}}, ...]")
    return rows


def read_clips(folder):
    """FOLDER/metadata.json of VideoDPO's layout -> [(path of a clip, its caption)], all of them."""
    path, rows = Path(folder, "metadata.json"), []
    for i, row in enumerate(_list_file(path, "clips")):
        try:
            clip, caption = row["basic"]["clip_path"], row["misc"]["frame_caption"][0]
            rows.append((Path(folder, clip), check_text(caption, f"{path} row {i}")))
        except (KeyError, IndexError, TypeError):
            raise UserError(f'{path} row {i}: wanted {{"basic": {{"clip_path": ...}}, "misc": '
                            '{"frame_caption": [...]}}') from None
    return rows


class PairDataset(torch.utils.data.Dataset):
    """VideoDPO's pairs: folders with metadata.json (clips) and pair.json (video1 won, video2 lost).

    Items {"video": (2, 3, frames, height, width) in [-1,1], winner first, "text", "number"};
    scores: one per pair, 1 where none is given. Rows count from 0 within their folder. A missing
    clip is an error now, a corrupt or short one when it is read: no other clip can stand in for
    half a pair. Clips that are long enough are read with stride 4, from a start drawn for `number`.
    """

    def __init__(self, folders, frames, height, width, seed=0):
        self.frames, self.size, self.seed = frames, (height, width), seed
        self.rows, self.scores = [], []
        for folder in folders:
            if not os.path.isdir(folder):
                raise UserError(f"{folder}: no such folder of pairs (metadata.json, pair.json and "
                                "clips)")
            clips, path = read_clips(folder), Path(folder, "pair.json")
            for i, row in enumerate(_list_file(path, "pairs")):
                self.add(f"{path} row {i}", row, clips)

    def add(self, where, row, clips):
        """Check a row of pair.json and add it; clips: of read_clips()."""
        pair = [row.get(k) for k in ("video1", "video2")]
        if not all(type(k) is int and 0 <= k < len(clips) for k in pair) or pair[0] == pair[1]:
            raise UserError(f"{where}: video1 and video2 must be two of the {len(clips)} rows of "
                            f"metadata.json, counted from 0, not {pair[0]} and {pair[1]}")
        winner, loser = (clips[k][0] for k in pair)
        text, score = row.get("frame_caption", clips[pair[0]][1]), row.get("score", 1.0)
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str):
            raise UserError(f"{where}: frame_caption is no text")
        check_text(text, where)
        if not isinstance(score, (int, float)) or not 0 < score < float("inf"):
            raise UserError(f"{where}: score {score} is no number above 0")
        for clip in (winner, loser):
            if not os.path.exists(clip):
                raise UserError(f"{where}: {clip}: no such clip")
        self.rows.append((where, winner, loser, text))
        self.scores.append(float(score))

    @property
    def fingerprint(self):
        """A number that changes with the pairs, to tell whether their latents are up to date."""
        return seed_of(self.rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        index, number = item
        where, *paths, text = self.rows[index]
        try:
            clips = []
            for k, path in enumerate(paths):
                count = video_info(path)[0]
                stride = 4 if count > 4 * (self.frames - 1) else 1
                start = generator(self.seed, "clip", number, k)
                clips.append(read_video(path, self.frames, None, start, self.size, stride)[0])
        except UserError as e:
            raise UserError(f"{where}: {reason_of(e)}") from None
        return {"video": torch.stack(clips), "text": text, "number": number}


class Few(torch.utils.data.Dataset):
    """A handful of items, kept in memory: item (i, _) is items[i]; rows: as VideoDataset's."""

    def __init__(self, items):
        self.items, self.rows = items, [(i, None, item["text"]) for i, item in enumerate(items)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, item):
        return self.items[item[0]]


def check_dataset(source, frames, height, width, fps=None, root=None, empty_captions=False):
    """Read every clip once, print the bad rows and a summary -> number of bad rows."""
    source, rows = list_clips(source, "empty" if empty_captions else "needed", root=root)
    dataset, bad = VideoDataset(source, frames, height, width, fps, rows=rows), 0
    for i, (n, _, _) in enumerate(dataset.rows):
        try:
            dataset.load(i, i)
        except UserError as e:
            bad += 1
            print(f"{dataset.source} row {n}: {reason_of(e)}")
    print(f"{dataset.source}: {len(dataset)} clips, {bad} bad, read as {frames} frames of "
          f"{height}x{width}")
    return bad


def main(argv=None):
    p = Parser("Read every clip of a data set once and name the bad ones.")
    p.add_argument("--check", metavar="LIST", required=True,
                   help="folder, .csv, .jsonl or .txt list")
    p.add_argument("--frames", type=p.COUNT, default=16, help="frames a clip")
    p.add_argument("--height", type=p.COUNT, default=256, help="pixels")
    p.add_argument("--width", type=p.COUNT, default=256, help="pixels")
    p.add_argument("--fps", type=p.POSITIVE, help="wanted sampling rate (default: every frame)")
    p.options("data", only=["--data-root", "--empty-captions"])
    args = p.parse_args(argv)
    size = args.frames, args.height, args.width
    bad = check_dataset(args.check, *size, args.fps, args.data_root, args.empty_captions)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    run_command(main)
