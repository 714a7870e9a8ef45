"""Videos, pictures, prompt files and data sets: reading, checking, writing.

`python data.py --check LIST --frames 16 --height 256 --width 256` reads every clip once and names
the bad ones.
"""
import atexit
import csv
import gc
import io
import json
import math
import os
import re
import signal
import struct
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common import (
    Parser, UserError, batch_indices, check_file, generator, read_lines, run_command, seed_of, warn,
    write_atomic)
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


def leave_signals(worker):
    """A reading process ignores SIGTERM and Ctrl-C: both go to the whole group, and only the run
    answers."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)


def load(data, order, workers=0):
    """Batches of a data set, read by `workers` processes; order: a list of items for each batch."""
    # a generator of its own: a loader draws a seed, which must not shift the run's dropout
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=order, num_workers=workers, prefetch_factor=2 if workers else None,
        worker_init_fn=leave_signals, generator=torch.Generator())
    batches = iter(loader)
    # workers would not heed the SIGTERM of Python's exit
    close = getattr(batches, "_shutdown_workers", None)
    if close:
        atexit.register(close)
    try:
        yield from batches
    except (RuntimeError, UserError) as e:
        if not workers:
            raise
        reason = str(e).strip().splitlines()[-1]  # the lines before it are the worker's traceback
        reason = reason.rpartition("UserError: ")[2]
        raise UserError(f"{reason} (in a process that reads clips; --workers 0 avoids it)") from e
    finally:
        if close:
            close()
            atexit.unregister(close)


def read_batches(data, numbers, seed=0, workers=0):
    """Samples by their numbers in a run, ranges for each batch -> batches {"video" (b,3,f,h,w),
    "text" list}.

    data[i, number] is item i, its random part drawn for that number.
    """
    order = (list(zip(batch_indices(len(data), part[0], len(part), seed), part))
             for part in numbers)
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
    if env.world > 1:
        torch.distributed.barrier()
    absent = [file for file in files if not whole(file)]
    if absent:
        raise UserError(f"--cache-latents: {absent[0]} is not there; --out must be a folder that "
                        "all nodes share")
    return EncodedClips(files, len(data))


# ---- pixels

VIDEOS = (".mp4", ".avi", ".mov", ".webm", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FAR = 300         # frames ahead from which a film of constant rate is searched by time
FOLDER_FPS = 8.0  # a folder of pictures has no rate of its own
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
    return pixels.float().div(127.5).sub(1)


def _rgb(image):
    """Pillow image -> uint8 (h, w, 3), turned as its EXIF says; transparent parts are laid on
    white."""
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{image.filename}: a 16-bit or float picture; save it with 8 bits")
    image = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


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
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", path.name)]


def _gif_timeline(image):
    """-> (stored frame of each shown frame, fps). Writers merge equal neighbours into one longer
    frame, so a stored frame stands for as many as its duration holds."""
    durations = []
    for i in range(image.n_frames):
        image.seek(i)
        durations.append(image.info.get("duration") or 100)
    timeline = [i for i, d in enumerate(durations) for _ in range(round(d / min(durations)))]
    return timeline, 1000 * len(timeline) / sum(durations)


def _turns(matrix):
    """Display matrix of a frame (phones film lying down) -> counter-clockwise quarter turns for
    np.rot90."""
    a, b = struct.unpack("=2i", matrix[:8])
    return (0 if a > 0 else 2) if abs(a) > abs(b) else (-1 if b > 0 else 1)


def _count(file):
    """Frames of a container whose header does not tell (webm): decoded once, without converting
    colours."""
    n = 0
    try:
        while True:
            file.metadata(index=n, constant_framerate=False)
            n += 1
    except StopIteration:
        return n


@contextmanager
def _opened(path):
    """Yields (frames, fps, (h, w), get) of a video file, a gif or a folder of pictures; get(i) ->
    uint8 (h, w, 3), cheap for ascending i. Whatever goes wrong with the file, here or in get, is
    a UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such video")
    if not path.is_dir() and path.suffix.lower() not in VIDEOS:
        raise UserError(f"{path}: not a video; known are {', '.join(VIDEOS)} and a folder of "
                        "pictures")
    try:
        if path.is_dir():
            files = [p for p in path.iterdir() if p.suffix.lower() in IMAGES]
            files.sort(key=natural_order)
            if not files:
                raise UserError(f"{path}: no pictures in this folder ({', '.join(IMAGES)})")

            def get(i):
                with Image.open(files[i]) as image:
                    return _rgb(image)
            yield len(files), FOLDER_FPS, get(0).shape[:2], get
        elif path.suffix.lower() == ".gif":
            with Image.open(path) as image:
                timeline, fps = _gif_timeline(image)

                def get(i):
                    image.seek(timeline[i])
                    return _rgb(image)
                yield len(timeline), fps, (image.height, image.width), get
        else:
            with iio.imopen(path, "r", plugin="pyav") as file:
                count, h, w = file.properties().shape[:3]
                fps = file.metadata()["fps"]
                count = count or _count(file)
                # The matrix hangs on the frame. constant_framerate=False: count frames, don't
                # seek by time.
                first = file.metadata(index=0, constant_framerate=False) if count else {}
                turns = _turns(first["DISPLAYMATRIX"]) if "DISPLAYMATRIX" in first else 0

                # one thread converts a frame: starting several takes longer, on a busy machine 50
                # times so
                unpack = file._unpack_frame

                def unpack_alone(frame, format):
                    return unpack(frame.reformat(format=format, threads=1))
                file._unpack_frame = unpack_alone
                stream, at = file._video_stream, 0
                # only where a frame's time tells its number
                constant = stream.start_time in (0, None)
                constant &= stream.guessed_rate == stream.average_rate

                def get(i):
                    nonlocal at
                    far, at = constant and i - at > FAR, i
                    # far ahead: from the key frame before it
                    return np.rot90(file.read(index=i, constant_framerate=far), turns)
                yield count, fps, (w, h) if turns % 2 else (h, w), get
    except ImportError:
        raise UserError(f"{path}: reading needs PyAV (a .gif does not): pip install av") from None
    except UserError:
        raise
    except Exception as e:  # decoders raise everything there is
        raise UserError(f"{path}: cannot be decoded ({reason_of(e)})") from None


def video_info(path):
    """-> (frames, fps, (h, w)) from the header; a container that does not count its frames is
    decoded."""
    with _opened(path) as (count, fps, size, _):
        return count, fps, size


def read_video(path, frames=None, fps=None, start=0, size=None):
    """-> ((3, f, h, w) in [-1, 1], its fps). frames: exactly so many (None: all), with a stride
    of round(file fps / fps) from `start`, an index or a torch.Generator that draws one. A clip
    that is too short raises (VGen pads it with grey)."""
    with _opened(path) as (count, rate, shape, get):
        stride = max(1, round(rate / fps)) if fps else 1
        last = count - 1 - ((frames or 1) - 1) * stride  # last possible start
        if isinstance(start, torch.Generator):
            start = int(torch.randint(max(last, 0) + 1, (), generator=start))
        if start > last:
            raise UserError(f"{path}: {count} frames at {rate:.4g} fps are too few for "
                            f"{frames or 1} with stride {stride} from frame {start}")
        clip = []
        for i in range(start, start + frames * stride if frames else count, stride):
            frame = get(i)
            if frame.shape[:2] != tuple(shape):
                raise UserError(f"{path}: frame {i} has size {frame.shape[:2]}, the first one "
                                f"{tuple(shape)}")
            frame = torch.from_numpy(frame.copy()).permute(2, 0, 1)
            # at once, so that long clips stay small
            clip.append(resize_crop(frame.float(), size) if size else frame)
    return _to_float(torch.stack(clip, 1)), rate / stride


def list_videos(path):
    """A clip, or a folder of clips -> their paths in natural order. A folder of pictures is one
    clip.

    If the folder has an index.jsonl (sample.py writes it), its clips are those that the index
    lists, in that order: others are left over from an earlier run.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    clips = sorted((p for p in path.iterdir() if p.suffix.lower() in VIDEOS), key=natural_order)
    present = {clip.name: clip for clip in clips}
    rows = [row for row in read_lines(path / "index.jsonl") if isinstance(row, dict)]
    names = dict.fromkeys(str(row.get("file")) for row in rows)
    listed = [present[name] for name in names if name in present]
    if listed and len(listed) < len(clips):
        left_out = len(clips) - len(listed)
        warn(f"{path}: clips that index.jsonl does not list are left out ({left_out})")
    return listed or clips or [path]


def prompts_of(clips, file=None, prompt=None):
    """A prompt for each of the clips (paths): lines of a file, or one for all, or sample.py's
    index.jsonl."""
    if file:
        prompts = read_prompts(file)
        if len(prompts) != len(clips):
            raise UserError(f"{file}: {len(prompts)} prompts for {len(clips)} clips")
        return prompts
    index = clips[0].parent / "index.jsonl"
    known = {row.get("file"): row.get("prompt", "") for row in read_lines(index)}
    return [prompt or known.get(clip.name, "") for clip in clips]


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


ARRAY_MILLIONS = 250  # largest array, or archive of arrays, in millions of numbers


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
    limit = float(os.environ.get("NANOVIDEO_ARRAY_MILLIONS", ARRAY_MILLIONS))
    try:
        archive = zipfile.is_zipfile(path)
        with zipfile.ZipFile(path) if archive else path.open("rb") as file:
            if not archive:
                count = array_header(file, path.stat().st_size, path)
            for member in file.infolist() if archive else ():
                with file.open(member) as part:
                    count += array_header(part, member.file_size, f"{path}: {member.filename}")
        if count > limit * 1e6:
            raise UserError(f"{path}: {count / 1e6:.0f} million numbers; the limit is {limit:g} "
                            "(NANOVIDEO_ARRAY_MILLIONS=N in the environment raises it)")
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

    def gif(tmp):
        # A gif counts in 1/100 s: rounding the end of each frame, not its length, keeps the mean
        # rate.
        ends = [round(100 * i / fps) * 10 for i in range(len(frames) + 1)]
        first, *rest = [Image.fromarray(x) for x in frames]
        first.save(tmp, save_all=True, append_images=rest, loop=0, duration=np.diff(ends).tolist())

    def mp4(tmp):
        h, w = frames.shape[1:3]
        with iio.imopen(tmp, "w", plugin="pyav") as file:
            file.init_video_stream("libx264", fps=fps, pixel_format="yuv420p")
            options = {"crf": MP4_CRF}
            if max(h, w) < 128:  # x264's fast code reads past so small a picture: files would vary
                options["x264-params"] = "asm=0"
            file._video_stream.options = options  # the plugin has no argument for it
            even = (0, 0), (0, h % 2), (0, w % 2), (0, 0)  # 4:2:0 has even sides
            file.write(np.pad(frames, even, mode="edge"))
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
VIDEO_KEYS = ("video", "path", "file", "file_name")
CAPTION_KEYS = ("caption", "text", "prompt", "en_caption")


def _read_text(path):
    """The whole file; a missing, not UTF-8 or empty one is refused."""
    path = check_file(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start}); save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def numbered_lines(path, comments="#"):
    """-> [(row, stripped line)] without blank lines and comments; rows count from 1 as in an
    editor."""
    # split, not splitlines: that one also cuts at U+2028 and others, which may stand inside a
    # caption or JSON
    rows = [(n, s.strip()) for n, s in enumerate(_read_text(path).split("\n"), 1)]
    rows = [(n, s) for n, s in rows if s and not (comments and s.startswith(comments))]
    if not rows:
        raise UserError(f"{path}: only comments and blank lines")
    return rows


def _json(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not valid JSON ({e})") from None


def read_table(path):
    """.csv with a header, or .jsonl -> [(row, dict)]. A csv row with surplus or missing fields is
    refused: an unquoted comma would cut the caption silently, as in 17 of the 51 rows of DEMO's
    own prompt file."""
    if Path(path).suffix.lower() == ".jsonl":
        rows = [(n, _json(s, f"{path} row {n}")) for n, s in numbered_lines(path, comments=None)]
        for n, row in rows:
            if not isinstance(row, dict):
                raise UserError(f'{path} row {n}: not an object such as {{"prompt": "..."}}')
        return rows
    reader, rows = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True), []
    try:
        header = [name.strip() for name in next(reader)]
        if len(set(header)) != len(header):
            raise UserError(f"{path} row 1: a column name stands twice ({', '.join(header)})")
        for row in reader:
            if row and len(row) != len(header):
                raise UserError(f"{path} row {reader.line_num}: {len(row)} fields, the header "
                                f"{len(header)}; "
                                'a text with a comma needs "double quotes"')
            if row:
                rows.append((reader.line_num, dict(zip(header, row))))
    except csv.Error as e:
        raise UserError(f"{path} row {reader.line_num}: not valid csv ({e})") from None
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
    return row[key].strip()


def _pairs(path, what):
    """.txt of `path|||caption` lines -> [(row, path, caption)]."""
    rows = [(n, [s.strip() for s in line.split("|||")]) for n, line in numbered_lines(path)]
    for n, parts in rows:
        if len(parts) != 2 or not all(parts):
            raise UserError(f"{path} row {n}: wanted {what}|||caption, found "
                            f"{'|||'.join(parts)[:60]!r}")
    return [(n, *parts) for n, parts in rows]


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


def read_prompts(path):
    """-> list of prompts. .txt: a line each, # comments; .csv or .jsonl: `prompt` (or caption,
    en_caption, prompt_en, text) of each row; .json: see _json_prompts."""
    kind = Path(path).suffix.lower()
    if kind == ".json":
        return _json_prompts(_json(_read_text(path), path), path)
    if kind in (".csv", ".jsonl"):
        return [field_of(row, PROMPT_KEYS, f"{path} row {n}") for n, row in read_table(path)]
    if kind != ".txt":
        raise UserError(f"{path}: prompt files are .txt, .csv, .jsonl or .json")
    for n, line in numbered_lines(path):
        if "|||" in line:
            raise UserError(f"{path} row {n}: image|||caption is for image-to-video; keep the "
                            "caption alone")
    return [line for _, line in numbered_lines(path)]


def prompt_grid(nouns, activities):
    """Two files of prompts, a line each -> "a NOUN ACTIVITY" for every pair (VADER's
    nouns_activities)."""
    rows = read_prompts(activities)
    named = [f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in read_prompts(nouns)]
    return [f"{noun} {activity}" for noun in named for activity in rows]


def read_triples(path):
    """.txt of lines `clip|||folder|||prompt` -> [(clip, folder, prompt)]."""
    rows = [(n, [s.strip() for s in line.split("|||")]) for n, line in numbered_lines(path)]
    for n, parts in rows:
        if len(parts) != 3 or not all(parts):
            raise UserError(f"{path} row {n}: wanted clip|||folder of references|||prompt")
    return [tuple(parts) for _, parts in rows]


def read_image_prompts(path):
    """.txt of `image|||caption` lines -> [(image path, caption)]; paths relative to the file, and
    checked."""
    rows = [(n, Path(path).parent / image, caption) for n, image, caption in _pairs(path, "image")]
    for n, image, _ in rows:
        if not image.is_file():
            raise UserError(f"{path} row {n}: {image}: no such picture")
    return [(image, caption) for _, image, caption in rows]


# ---- data sets of clips with captions

def _folder_rows(folder, captions=True):
    """Clips with a same-named .txt beside them -> [(row, path, caption)]; also sub-folders of
    pictures."""
    clips = [p for p in folder.iterdir() if not p.name.startswith(".") and
             (p.suffix.lower() in VIDEOS + IMAGES
              or (p.is_dir() and p.with_name(p.name + ".txt").is_file()))]
    rows = []
    for n, clip in enumerate(sorted(clips, key=natural_order), 1):
        text = clip.with_name((clip.name if clip.is_dir() else clip.stem) + ".txt")
        if not captions:
            rows.append((n, clip, ""))
            continue
        if not text.is_file():
            raise UserError(f"{clip}: no caption beside it; write {text.name}, or metadata.csv for "
                            "all")
        rows.append((n, clip, " ".join(_read_text(text).split())))
    if not rows:
        raise UserError(f"{folder}: no clips in this folder ({', '.join(VIDEOS)})")
    return rows


def clip_rows(source, captions=True):
    """Any source of VideoDataset -> (file that lists the clips, [(row, path, caption)]).

    captions False: none are looked for, all are "".
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such folder or list of clips")
    if source.is_dir():
        listed = [p for p in (source / "metadata.csv", source / "metadata.jsonl") if p.is_file()]
        if not listed:
            return source, _folder_rows(source, captions)
        source = listed[0]
    kind = source.suffix.lower()
    if kind in (".csv", ".jsonl"):
        table = [(n, row, f"{source} row {n}") for n, row in read_table(source)]
        rows = [(n, field_of(row, VIDEO_KEYS, w),
                 field_of(row, CAPTION_KEYS, w) if captions else "")
                for n, row, w in table]
    elif kind == ".txt" and not captions:
        rows = [(n, line.split("|||")[0].strip(), "") for n, line in numbered_lines(source)]
    elif kind == ".txt":
        rows = _pairs(source, "video")
    else:
        raise UserError(f"{source}: wanted a folder, .csv, .jsonl, or .txt with video|||caption "
                        "lines")
    return source, [(n, source.parent / clip, caption) for n, clip, caption in rows]


def quick_files():
    """Before many clips: imageio collects garbage at every close, 0.5 s each when transformers is
    loaded."""
    gc.freeze()  # what is here now is no garbage
    atexit.register(gc.unfreeze)


class VideoDataset(torch.utils.data.Dataset):
    """Items {"video": (3, frames, height, width) in [-1, 1], "text": str, "path": str}. source: a
    folder (clips with same-named .txt, or a metadata.csv / .jsonl), a .csv with the columns
    `video,caption` (or path, file, file_name; text, prompt, en_caption), .jsonl with these keys,
    or .txt with VGen's lines `video|||caption`; paths are relative to the list. The list is
    checked here, a clip when it is read: a bad one (corrupt, empty, too short, changing size) is
    named, counted, and replaced by the next row; past 1 % of the rows, and more than one, the run
    stops. Pictures count as clips when frames == 1. Item (i, number) is row i, its start drawn
    for `number` alone: a clip that comes again starts elsewhere."""

    def __init__(self, source, frames, height, width, fps=None, seed=0, rows=None, captions=True):
        # rows: already read, [(row, path, caption)]
        self.source, self.rows = clip_rows(source, captions) if rows is None else (source, rows)
        self.frames, self.size, self.fps, self.seed = frames, (height, width), fps, seed
        known = {}
        twice = [n for n, *clip in self.rows if known.setdefault(tuple(clip), n) != n]
        if twice:
            warn(f"{self.source} row {twice[0]}: clip and caption stand in an earlier row, too "
                 f"({len(twice)} such rows): they count double")
        for n, path, _ in self.rows:
            if not path.exists():
                raise UserError(f"{self.source} row {n}: {path}: no such clip")
            if path.suffix.lower() in IMAGES and frames != 1:
                raise UserError(f"{self.source} row {n}: {path}: a picture is one frame; use "
                                "--frames 1")
        # in shared memory: the workers of a loader count their bad clips together
        self.bad = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()
        quick_files()

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


def _list_file(path, what):
    """A JSON file that holds a list of objects."""
    rows = _json(_read_text(path), path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: not a list of {what}")
    return rows


def read_clips(folder):
    """FOLDER/metadata.json of VideoDPO's layout -> [(path of a clip, its caption)], all of them."""
    path, rows = Path(folder, "metadata.json"), []
    for i, row in enumerate(_list_file(path, "clips")):
        try:
            clip, caption = row["basic"]["clip_path"], row["misc"]["frame_caption"][0]
            rows.append((Path(folder, clip), caption))
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
            if not Path(folder).is_dir():
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
        if not isinstance(score, (int, float)) or not 0 < score < float("inf"):
            raise UserError(f"{where}: score {score} is no number above 0")
        for clip in (winner, loser):
            if not clip.exists():
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
                count, rate, _ = video_info(path)
                fps = rate / 4 if count > 4 * (self.frames - 1) else None
                start = generator(self.seed, "clip", number, k)
                clips.append(read_video(path, self.frames, fps, start, self.size)[0])
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


def check_dataset(source, frames, height, width, fps=None):
    """Read every clip once, print the bad rows and a summary -> number of bad rows."""
    dataset, bad = VideoDataset(source, frames, height, width, fps), 0
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
    args = p.parse_args(argv)
    sys.exit(1 if check_dataset(args.check, args.frames, args.height, args.width, args.fps) else 0)


if __name__ == "__main__":
    run_command(main)
