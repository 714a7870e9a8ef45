"""Tracking videos of Diffusion as Shader (arXiv 2501.03847): cameras, drawing, sources of tracks,
data sets.

In a tracking video every point of the first frame has the colour of its place there (red: x,
green: y, blue: nearness) and is drawn wherever it is now, near points over far ones, on black.
`python das.py --make-tracks SOURCE` makes such videos from

    clip.mp4    [--camera | --object]            the clip's own motion: optical flow or --tracker
    photo.png   --depth d.npy --camera "rot y 20; trans 0 0 -0.3 10 40"     a camera that moves
    photo.png   --depth d.npy --mask dog.png --object "right 0.3"           an object that moves
    tracks.npy                                   tracks (f,n,2) or (f,n,3): x, y, depth
    mesh/ or mesh.npz                            a moving mesh: .obj files, or vertices and faces
    clips/, clips.csv                            a data set: prompt.txt, videos.txt, trackings.txt

Under torchrun the processes share the clips of a data set.

Here x points right, y down, z away from the camera. Matrices are world-to-camera, X_cam = P
X_world, so "trans 1 0 0" moves what is seen to the right: the camera goes left. Points are (x, y,
depth), x and y in pixels; a depth of 0 means no point.
"""
import copy
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from common import (
    Parser, UserError, check_writable, gather_rows, meet, own_folder, read_text, release_folders,
    setup, warn, write_atomic)
from data import (
    IMAGES, TABLES, VIDEOS, VideoDataset, by_size, center_crop_wide, contact_sheet, cover_and_crop,
    list_clips, list_folder, open_image, raft, read_array, read_image, read_video, reason_of,
    video_info, write_video)
from weights import load_weights, rename

# ---- commands: what moves, from which frame to which

CAMERA = {"trans": "dx dy dz", "rot": "axis degrees", "spiral": "radius"}
DIRECTIONS = {"up": (0, -1, 0), "down": (0, 1, 0), "left": (-1, 0, 0), "right": (1, 0, 0),
              "front": (0, 0, 1), "back": (0, 0, -1)}  # as published: front is away from the camera
OBJECT = {name: "distance" for name in DIRECTIONS} | {"rot": "degrees"}


def _commands(text, known, frames):
    """"name values [first last]; ..." -> [(name, its values, progress (f,) from 0 to 1)]."""
    forms = ", ".join(f"{name} {values} [first last]" for name, values in known.items())
    commands = []
    for part in filter(None, (part.strip() for part in text.lower().split(";"))):
        name, *values = part.split()
        if name not in known:
            raise UserError(f"command {part!r}: unknown; known are {forms}")
        wanted = known[name].split()
        if len(values) not in (len(wanted), len(wanted) + 2):
            raise UserError(f"command {part!r}: {len(values)} values; expected {name} "
                            f"{known[name]} [first last]")
        if wanted[0] == "axis" and values[0] not in "xyz":
            raise UserError(f"command {part!r}: the axis is x, y or z")
        try:
            numbers = [v if w == "axis" else float(v) for v, w in zip(values, wanted)]
            first_last = [int(v) for v in values[len(wanted):]] or [0, frames - 1]
        except ValueError:
            raise UserError(f"command {part!r}: expected numbers, whole ones for first and last: "
                            f"{name} {known[name]} [first last]") from None
        if not all(np.isfinite(v) for v in numbers if not isinstance(v, str)):
            raise UserError(f"command {part!r}: expected finite numbers")
        first, last = sorted(min(max(k, 0), frames - 1) for k in first_last)
        if first == last:
            raise UserError(f"command {part!r}: first and last are the same frame ({first} of 0 to "
                            f"{frames - 1})")
        progress = np.clip((np.arange(frames) - first) / (last - first), 0, 1)
        commands.append((name, numbers, progress))
    if not commands:
        raise UserError(f"command {text!r}: empty; known are {forms}")
    return commands


def _translations(vectors):
    """(f,3) -> (f,4,4)."""
    m = np.tile(np.eye(4), (len(vectors), 1, 1))
    m[:, :3, 3] = vectors
    return m


def _rotations(axis, radians):
    """Right-handed rotations about an axis by the angles (f,) -> (f,4,4)."""
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    m = np.tile(np.eye(4), (len(radians), 1, 1))
    m[:, i, i] = m[:, j, j] = np.cos(radians)
    m[:, j, i] = np.sin(radians)
    m[:, i, j] = -m[:, j, i]
    return m


def _spiral(radius, frames):
    """One round about the start, looking at a point ahead -> (f,4,4).

    As published it is built like a camera's pose in the world but used as world-to-camera.
    """
    if radius == 0:
        raise UserError("command 'spiral 0': the radius must not be 0")
    t = np.linspace(0, 1, frames)
    r, angle = np.sin(np.pi * t) * radius * 0.1, 2 * np.pi * t
    place = np.stack([r * np.sin(angle), 0.3 * r * np.cos(angle), -0.5 * r], axis=1)
    ahead = np.array([0, 0, radius * 0.5]) - place
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
    right = np.cross([0, 1, 0], ahead)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    m = _translations(place)
    m[:, :3, :3] = np.linalg.inv(np.stack([right, np.cross(ahead, right), ahead], axis=1))
    return m


def camera_path(commands, frames=49):
    """"trans dx dy dz; rot axis degrees; spiral radius", each with an optional first and last frame
    -> poses (f,4,4).

    World-to-camera, the product in the order written. Before its first frame a command does
    nothing, after its last one it stays complete.
    """
    poses = np.tile(np.eye(4), (frames, 1, 1))
    for name, values, progress in _commands(commands, CAMERA, frames):
        if name == "trans":
            m = _translations(progress[:, None] * values)
        elif name == "rot":
            m = _rotations(values[0], np.radians(values[1]) * progress)
        else:
            m = _spiral(values[0], frames)[(progress * (frames - 1)).astype(int)]
        poses = poses @ m
    return poses


def object_path(commands, frames=49, unit=1.0):
    """"right 0.3; rot 50 0 24" -> (f,4,4), of an object about its centre; a distance of 1 is
    `unit`.

    The unit is the same on all axes. (Published: 50 units, divided by width and height for x and y,
    but not for z.)
    """
    path = np.tile(np.eye(4), (frames, 1, 1))
    for name, (value,), progress in _commands(commands, OBJECT, frames):
        if name == "rot":
            path = path @ _rotations("y", np.radians(value) * progress)
        else:
            shift = progress[:, None] * value * unit * np.array(DIRECTIONS[name])
            path = path @ _translations(shift)
    return path


# ---- cameras

def intrinsics(height, width, fov=55.0):
    """K (3,3) in pixels of a camera with a horizontal field of view of `fov` degrees."""
    focal = width / 2 / np.tan(np.radians(fov) / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def lift(points, K, camera):
    """Points (..., n, 3), K (..., 3, 3), world-to-camera (..., 4, 4) -> world points (..., n, 3).

    (0,0,0) where depth <= 0.
    """
    depth = points[..., 2:]
    pixels = np.concatenate([points[..., :2], np.ones_like(depth)], axis=-1)
    x = depth * (pixels @ np.swapaxes(np.linalg.inv(K), -1, -2)) - camera[..., None, :3, 3]
    return (x @ camera[..., :3, :3]) * (depth > 0)  # R is orthonormal: its inverse is its transpose


def project(world, K, camera):
    """World points (..., n, 3) as a camera sees them, see lift() -> points; (0,0,0) behind it."""
    # coordinates first, points last: four times faster for the pixels of a picture
    x = camera[..., :3, :3] @ np.swapaxes(world, -1, -2) + camera[..., :3, 3:]
    depth = x[..., 2:, :]
    in_front = depth > 0
    pixels = (K @ x)[..., :2, :] / np.where(in_front, depth, 1)
    return np.swapaxes(np.concatenate([pixels, depth], axis=-2) * in_front, -1, -2)


def view(poses, cameras, mode="append"):
    """The camera of each frame (f,4,4), from a path `poses` (None: the first camera stays) and the
    clip's own `cameras` (f,4,4).

    append: the path follows the clip's own camera; override: the path alone.
    """
    if poses is None:
        return np.tile(cameras[:1], (len(cameras), 1, 1))
    return poses if mode == "override" else poses @ cameras


def move_object(points, selected, matrix):
    """Points (n,3) of one frame -> the same, those of `selected` (n,) moved by matrix (4,4)."""
    moved = points.copy()
    moved[selected] = points[selected] @ matrix[:3, :3].T + matrix[:3, 3]
    return moved


def in_mask(points, mask):
    """Which points (n,3) of the first frame lie in the mask (h,w), by their rounded pixel ->
    (n,)."""
    h, w = mask.shape
    finite = np.isfinite(points).all(-1)
    x = np.where(finite, points[:, 0], 0).round().astype(int).clip(0, w - 1)
    y = np.where(finite, points[:, 1], 0).round().astype(int).clip(0, h - 1)
    return mask[y, x] & finite


def about_centre(path, points, selected):
    """A path (f,4,4) of object_path() about the centre of the selected finite points (n,3)."""
    chosen = points[selected & np.isfinite(points).all(-1)]
    centre = _translations(chosen.mean(0, keepdims=True))
    return centre @ path @ np.linalg.inv(centre)


# ---- colours and drawing

def track_colours(red, green, depth, small=0.0):
    """Colours uint8 (n,3): red and green (n,) 0..255 as given, blue by nearness.

    Nearness is 1 / depth, from 0 at its 2nd percentile to 255 at its 98th; half blue if all points
    are at one depth. small: added to denominators (1e-10 in CoTracker's drawing).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        near = 1 / (depth + small)
        low = high = 0
        if not np.isnan(near).all():
            low, high = np.percentile(near[~np.isnan(near)], (2, 98))
        flat = not high - low > 1e-6 * abs(high)
        blue = np.full_like(near, 0.5) if flat else (near - low) / (high - low + small)
    levels = np.stack([red, green, 255 * np.clip(np.nan_to_num(blue), 0, 1)], axis=-1)
    return np.floor(np.clip(levels, 0, 255)).astype(np.uint8)


def dense_colours(depth, size):
    """Colours of all pixels of the first frame, row by row; depth (h w,)."""
    h, w = size
    green, red = np.meshgrid(np.linspace(0, 255, h), np.linspace(0, 255, w), indexing="ij")
    return track_colours(red.reshape(-1), green.reshape(-1), depth)


def grid_colours(points, size):
    """Colours of points (n,3) anywhere in the first frame."""
    h, w = size
    x, y, depth = points.T
    return track_colours(255 * (x / w), 255 * (y / h), depth, small=1e-10)


def draw_tracks(points, colours, size, visible=None, half=(1, 1)):
    """Points (n,3) of each frame -> frames uint8 (f,h,w,3): marks in `colours` (n,3) on black, near
    ones on top.

    points: (f,n,3) or an iterable; visible (f,n) bool; half: pixels (x, y) that a mark reaches to
    each side. A point outside the frame, behind the camera (depth <= 0) or not finite is not drawn.
    """
    (h, w), frames = size, []
    colours = np.concatenate([np.zeros((1, 3), np.uint8), colours])  # 0: black
    for k, p in enumerate(points):
        with np.errstate(invalid="ignore"):
            shown = (p[:, 2] > 0) & (p[:, 0] > -1) & (p[:, 0] < w) & (p[:, 1] > -1) & (p[:, 1] < h)
        if visible is not None:
            shown = shown & visible[k]
        index = np.flatnonzero(shown)
        x, y, depth = (p[index, i] for i in range(3))
        # A pixel shows the nearest of the points whose mark covers it: the one with the largest
        # key. The key's upper half holds the bits of a positive float, which are in the order of
        # its value; its lower half holds the point's number + 1.
        bits = np.float32(np.inf).view(np.int32) - depth.astype(np.float32).view(np.int32)
        nearest = np.zeros(h * w, np.int64)
        place = y.astype(np.int64) * w + x.astype(np.int64)
        np.maximum.at(nearest, place, bits.astype(np.int64) << 32 | index + 1)
        nearest = _largest(_largest(nearest.reshape(h, w), half[0], 1), half[1], 0)
        frames.append(colours[nearest & 0xffffffff])
    return np.stack(frames)


def _largest(a, reach, axis):
    """Running maximum of a (h,w) over 2 reach + 1 neighbours along an axis."""
    out = a.copy()
    for i in range(1, reach + 1):
        ahead, behind = [slice(None)] * 2, [slice(None)] * 2
        ahead[axis], behind[axis] = slice(i, None), slice(None, -i)
        ahead, behind = tuple(ahead), tuple(behind)
        np.maximum(out[ahead], a[behind], out=out[ahead])
        np.maximum(out[behind], a[ahead], out=out[behind])
    return out


def to_video(frames):
    """uint8 (f,h,w,3) -> (3,f,h,w) in [-1,1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


# ---- tracks of a clip

def grid_points(height, width, grid=70):
    """(grid^2, 2): where DaS puts the points that a clip's tracks start from, x and y in pixels."""
    margin = width / 64
    x, y = np.linspace(margin, width - margin, grid), np.linspace(margin, height - margin, grid)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def look_up(maps, xy):
    """maps (f,c,h,w) at positions xy (f,n,2) in pixels, bilinear -> (f,n,c)."""
    h, w = maps.shape[-2:]
    where = 2 * xy[:, None] / xy.new_tensor([w - 1, h - 1]) - 1
    values = F.grid_sample(maps, where, padding_mode="border", align_corners=True)  # f c 1 n
    return values[:, :, 0].transpose(1, 2)


@torch.no_grad()
def follow(video, queries, flow):
    """Chain optical flow: video (3,f,h,w) in [-1,1], queries (n,2) in its first frame -> xy
    (f,n,2), visible (f,n). flow: see data.raft().

    A point is lost for good where it leaves the frame, or where the flow back does not lead back by
    the usual test: |a + b|^2 > 0.01 (|a|^2 + |b|^2) + 0.5.
    """
    h, w = video.shape[2:]
    xy = [torch.as_tensor(queries, dtype=torch.float32, device=video.device)]
    visible = [torch.ones(len(queries), dtype=torch.bool, device=video.device)]
    frames = video.transpose(0, 1)[:, None]  # f 1 3 h w
    for a, b in zip(frames[:-1], frames[1:]):
        ahead = look_up(flow(a, b), xy[-1][None])[0]
        there = xy[-1] + ahead
        back = look_up(flow(b, a), there[None])[0]
        limit = 0.01 * (ahead.square().sum(-1) + back.square().sum(-1)) + 0.5
        inside = (there >= 0).all(-1) & (there[:, 0] <= w - 1) & (there[:, 1] <= h - 1)
        visible.append(visible[-1] & inside & ((ahead + back).square().sum(-1) <= limit))
        xy.append(there)
    return torch.stack(xy).cpu().numpy(), torch.stack(visible).cpu().numpy()


def users_tracker(name):
    """"file.py:function" -> the user's function(video (3,f,h,w) in [-1,1], queries (n,2)) -> xy,
    visible."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise UserError(f"--tracker {name}: no such file; give my_tracker.py:function")
    spec = importlib.util.spec_from_file_location("user_tracker", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # the user's own code
        raise UserError(f"--tracker {name}: {file} cannot be imported ({reason_of(e)})") from e
    if not callable(getattr(module, function, None)):
        raise UserError(f"--tracker {name}: {file} has no function {function}(video, queries)")
    return getattr(module, function)


def checked_tracks(xy, visible, frames, where):
    """What a tracker or a file gave -> float32 (f,n,2 or 3), bool (f,n); other shapes are
    refused."""
    try:
        xy = np.asarray(xy, dtype=np.float32)
        visible = None if visible is None else np.asarray(visible).astype(bool)
    except (ValueError, TypeError, RuntimeError) as e:  # rows of different lengths, words
        raise UserError(f"{where}: tracks are no arrays of numbers ({reason_of(e)})") from None
    if xy.ndim != 3 or xy.shape[0] != frames or xy.shape[2] not in (2, 3) or not xy.shape[1]:
        raise UserError(f"{where}: tracks of shape {xy.shape}; expected ({frames}, points, 2 or 3)")
    visible = np.ones(xy.shape[:2], bool) if visible is None else visible
    if visible.shape != xy.shape[:2]:
        raise UserError(f"{where}: visibility of shape {visible.shape}; expected {xy.shape[:2]}")
    return xy, visible & np.isfinite(xy).all(-1)


# ---- depth by a network

def depth_estimator(model, device="cpu", inverse=False):
    """A depth network -> a function: video (3,f,h,w) in [-1,1] -> depth (f,h,w), on the CPU.

    model: a depth network of transformers (its name on huggingface.co or its folder), or MiDaS's
    public file. Metric networks (ZoeDepth, DepthPro) give distances as they are. Relative ones,
    MiDaS among them, give nearness without a scale, which becomes distances from 1 to 10.
    inverse: VideoComposer's maps instead: MiDaS / 20 within 0..10 as published; by other networks
    1 / distance, scaled to a maximum of 2, which is about MiDaS's range.
    """
    midas = Path(model).is_file()
    network, metric = midas_network(model, device) if midas else depth_network(model, device)

    @torch.no_grad()
    def estimate(video):
        maps = torch.stack([network(frame).cpu() for frame in video.transpose(0, 1)])
        if midas and inverse:
            return (maps / 20).clamp(0, 10)
        distance = maps
        if not metric:
            distance = 1 / (0.1 + 0.9 * (maps / maps.max().clamp(min=1e-6)).clamp(min=0))
        if not inverse:
            return distance
        near = 1 / distance.float()
        return 2 * near / near.max()
    return estimate


def depth_network(name, device):
    """A network of transformers -> (fn: frame (3,h,w) in [-1,1] -> map (h,w), does it give
    distances)."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation
    try:
        prepare = AutoImageProcessor.from_pretrained(name)
        net = AutoModelForDepthEstimation.from_pretrained(name).eval().to(device)
    except (OSError, ValueError) as e:
        raise UserError(f"--depth-model {name}: cannot be loaded ({reason_of(e)}); give a depth "
                        "network's name on huggingface.co, its folder, MiDaS's file, or depth maps "
                        "with --depth") from None
    kind = getattr(net.config, "depth_estimation_type", "relative")
    metric = net.config.model_type in ("zoedepth", "depth_pro") or kind == "metric"

    def network(frame):
        pixels = ((frame + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        out = net(**prepare(images=pixels, return_tensors="pt").to(device))
        result = prepare.post_process_depth_estimation(out, target_sizes=[frame.shape[1:]])
        return result[0]["predicted_depth"].double()
    return network, metric


def midas_network(path, device):
    """MiDaS's public file, in float32 (published: float16), as depth_network()."""
    with torch.device("meta"):  # no time for random weights
        net = MiDaS()
    net = net.from_public(load_weights(path), path).to(device, torch.float32)

    def network(frame):
        size = frame.shape[1:]
        allowed = [max(32, round(side / 32) * 32) for side in size]
        pixels = frame[None].to(device)
        if allowed == list(size):
            return net(pixels)[0]
        pixels = F.interpolate(pixels, allowed, mode="bilinear", antialias=True)
        return F.interpolate(net(pixels)[None], size, mode="bilinear")[0, 0]
    return network, False


class MiDaS(nn.Module):
    """Relative inverse depth of pictures: MiDaS v3 (arXiv 1907.01341), DPT-Large (2103.13413) by
    default.

    The network is transformers'; from_public() takes the public file's tensors
    (midas_v3_dpt_large.pth).
    """

    def __init__(self, dim=1024, layers=24, heads=16, patch=16, image_size=384,
                 neck=(256, 512, 1024, 1024), fusion=256):
        super().__init__()
        from transformers import DPTConfig, DPTForDepthEstimation
        self.patch = patch
        self.taps = [(k + 1) * layers // 4 - 1 for k in range(4)]  # the last block of each quarter
        self.dpt = DPTForDepthEstimation(DPTConfig(
            hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * dim, hidden_act="gelu", layer_norm_eps=1e-5,
            image_size=image_size, patch_size=patch, is_hybrid=False, readout_type="project",
            backbone_out_indices=self.taps, neck_hidden_sizes=list(neck),
            fusion_hidden_size=fusion))
        self.dpt.dpt.layernorm = nn.Identity()  # of the last block's output, which nothing reads

    def from_public(self, state, source):
        """Take the public file's tensors: none missing, none left over. -> self, in eval mode."""
        split = {}
        for key, value in state.items():
            if ".to_qkv." in key:  # rows: q, then k, then v
                split |= {key.replace("qkv", c): rows for c, rows in zip("qkv", value.chunk(3))}
            else:
                split[key] = value
        # rename reshapes: the head's last layer is (32,1,1,1) there, a transposed convolution
        self.dpt.load_state_dict(rename(split, self.dpt, midas_name, source), assign=True)
        return self.eval()

    def forward(self, images):
        """images (n,3,h,w) in [-1,1], sides multiples of 32 (2 patches) -> inverse depth (n,h,w)
        >= 0."""
        rows, columns = (side // self.patch for side in images.shape[2:])
        states = self.dpt.dpt(images, output_hidden_states=True).hidden_states  # embeddings, blocks
        # part by part: called as a whole it takes square pictures only
        return self.dpt.head(self.dpt.neck([states[i + 1] for i in self.taps], rows, columns))


MIDAS_NAMES = {
    "dpt.embeddings.cls_token": "cls_embedding",
    "dpt.embeddings.position_embeddings": "pos_embedding",
    "dpt.embeddings.patch_embeddings.projection": "patch_embedding",
    "dpt.encoder.layer": "blocks", "layernorm_before": "norm1", "layernorm_after": "norm2",
    "attention.attention.query": "attn.to_q", "attention.attention.key": "attn.to_k",
    "attention.attention.value": "attn.to_v", "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.0", "output.dense": "mlp.2",
    **{f"neck.reassemble_stage.readout_projects.{k}": f"fc{k + 1}" for k in range(4)},
    **{f"neck.reassemble_stage.layers.{k}.projection": f"conv{k + 1}.0" for k in range(4)},
    **{f"neck.reassemble_stage.layers.{k}.resize": f"conv{k + 1}.1" for k in range(4)},
    # the third has no resize
    **{f"neck.convs.{k}": f"conv{k + 1}.{1 if k == 2 else 2}" for k in range(4)},
    **{f"neck.fusion_stage.layers.{k}": f"fusion{4 - k}" for k in range(4)},
    "residual_layer": "layer", "convolution1": "residual.1", "convolution2": "residual.3",
    "projection": "conv_out", "head.head": "head"}


def midas_name(key):
    """transformers' key of DPTForDepthEstimation -> the public file's, q, k and v apart."""
    for theirs, public in MIDAS_NAMES.items():
        key = key.replace(theirs, public)
    return key


# ---- files: arrays, depth, masks, poses, meshes

def read_depth(path, size):
    """.npy of depth, larger is farther, (h,w) or (f,h,w) -> (1 or f, h, w) of `size`, cropped as
    the clip is.

    By nearest neighbour: no points between near and far. A value that is not finite or not above 0
    is no point.
    """
    depth = read_array(path, "depth")["depth"].astype(np.float64)
    depth = depth[None] if depth.ndim == 2 else depth
    if depth.ndim != 3:
        raise UserError(f"--depth {path}: shape {depth.shape}; expected (height, width) or "
                        "(frames, height, width)")
    if not (np.isfinite(depth) & (depth > 0)).any():
        raise UserError(f"--depth {path}: no value above 0; expected distances from the camera")
    (w, h), (left, top) = cover_and_crop(depth.shape[2], depth.shape[1], size)
    rows = ((np.arange(h) + 0.5) * depth.shape[1] / h).astype(int)[top:top + size[0]]
    columns = ((np.arange(w) + 0.5) * depth.shape[2] / w).astype(int)[left:left + size[1]]
    return depth[:, rows[:, None], columns]


def read_mask(path, size):
    """Picture, white on the object -> bool (h,w), cropped as the clip is."""
    mask = np.array(center_crop_wide(open_image(path), size, filter=0).convert("L")) > 127
    if not mask.any():
        raise UserError(f"--mask {path}: empty: no pixel is white (above 127), so nothing would "
                        "move")
    return mask


def read_poses(path, frames):
    """World-to-camera matrices of 12 or 16 numbers: .npy, .npz ("extrinsics") or .txt ->
    (f,4,4)."""
    if Path(path).suffix.lower() == ".txt":
        try:
            poses = np.loadtxt(read_text(path).splitlines(), ndmin=2)
        except ValueError as e:
            raise UserError(f"{path}: not a text file of 12 or 16 numbers per line ({reason_of(e)})"
                            ) from None
    else:
        poses = read_array(path, "extrinsics")["extrinsics"].astype(np.float64)
    if poses.ndim < 2 or not poses.size or poses[0].size not in (12, 16):
        raise UserError(f"{path}: shape {poses.shape}; expected (frames, 3 or 4, 4): "
                        "world-to-camera matrices")
    if len(poses) < frames:
        raise UserError(f"{path}: {len(poses)} poses for {frames} frames")
    poses = poses[:frames].reshape(frames, -1, 4)
    turn = poses[:, :3, :3]
    if not (np.isfinite(poses).all()
            and np.allclose(turn @ np.swapaxes(turn, 1, 2), np.eye(3), atol=1e-2)
            and (np.linalg.det(turn) > 0).all()):
        raise UserError(f"{path}: the left 3 x 3 part of a pose is no rotation (or a mirror), or a "
                        "number is not finite")
    return np.concatenate([poses[:, :3], np.tile([[[0.0, 0, 0, 1]]], (frames, 1, 1))], axis=1)


def read_mesh(path):
    """.npz with vertices (f,v,3) and faces (t,3), or a folder of .obj files, one per frame
    -> vertices, faces."""
    path = Path(path)
    if not path.is_dir():
        arrays = read_array(path, "vertices")
        vertices, faces = arrays["vertices"].astype(np.float64), arrays.get("faces", np.zeros(0))
        if vertices.ndim != 3 or faces.ndim != 2 or (vertices.shape[2], faces.shape[1]) != (3, 3):
            raise UserError(f"{path}: expected the arrays vertices (frames, v, 3) and faces (t, 3)")
    else:
        parts = [_read_obj(p) for p in list_folder(path) if p.suffix.lower() == ".obj"]
        if len({len(v) for v, _ in parts}) != 1:
            raise UserError(f"{path}: wanted .obj files, all with the same number of vertices")
        vertices, faces = np.stack([v for v, _ in parts]), parts[0][1]
    if not (np.isfinite(vertices).all() and np.isfinite(faces).all()):
        raise UserError(f"{path}: vertices or faces are NaN or infinite")
    faces = faces.astype(int)
    if not len(faces) or faces.min() < 0 or faces.max() >= vertices.shape[1]:
        raise UserError(f"{path}: a face names a vertex that is not there, or there are no faces")
    return vertices, faces


def _read_obj(path):
    """Vertices (v,3) and triangles (t,3) of a Wavefront file; polygons become fans."""
    vertices, faces = [], []
    try:
        for line in read_text(path).splitlines():
            kind, *fields = line.split() or [""]
            if kind == "v":
                vertices.append([float(x) for x in fields[:3]])
            elif kind == "f":
                corners = [int(x.split("/")[0]) for x in fields]
                corners = [i - 1 if i > 0 else len(vertices) + i for i in corners]
                faces += [(corners[0], a, b) for a, b in zip(corners[1:], corners[2:])]
        vertices = np.array(vertices, dtype=np.float64).reshape(-1, 3)
        faces = np.array(faces, dtype=int).reshape(-1, 3)
    except (OSError, ValueError, OverflowError) as e:
        raise UserError(f"{path}: not a .obj file ({reason_of(e)})") from None
    return vertices, faces


# ---- meshes

def mesh_colours(vertices, K, size):
    """Colours float (v,3) 0..255 of a mesh's vertices (v,3) in the first camera's frame.

    As in DaS's Blender script: blue by the distance, not by depth; black where a vertex is not in
    the frame.
    """
    p = project(vertices, K, np.eye(4))
    h, w = size
    inside = (p[:, 2] > 0) & (p[:, 0] >= 0) & (p[:, 0] < w) & (p[:, 1] >= 0) & (p[:, 1] < h)
    distance = np.linalg.norm(vertices, axis=1)
    colours = track_colours(255 * p[:, 0] / w, 255 * p[:, 1] / h, distance)
    return colours * inside[:, None].astype(float)


def rasterise(vertices, faces, colours, K, size):
    """Triangles of vertices (v,3) in the camera's frame, colours (v,3) -> uint8 (h,w,3) on black.

    The nearest is on top; triangles that reach behind the camera are left out. Triangles of like
    size are drawn together, all pixels of their boxes at once.
    """
    h, w = size
    p = project(vertices, K, np.eye(4))
    faces = faces[(p[faces, 2] > 1e-6).all(1)]
    corners = p[faces]                                                          # t 3 3
    low = np.floor(corners[:, :, :2].min(1)).clip(0, [w, h]).astype(int)
    high = np.ceil(corners[:, :, :2].max(1)).clip(0, [w, h]).astype(int)
    a, b, c = np.moveaxis(corners, 1, 0)                                        # t 3
    area = _edge(a, b, c[:, 0], c[:, 1])
    drawn = (high > low).all(1) & (abs(area) > 1e-9)
    level = np.where(drawn, np.ceil(np.log2(np.maximum((high - low).max(1), 1))), -1)
    image, nearest = np.zeros((h * w, 3)), np.zeros(h * w)
    for k in range(int(level.max(initial=-1)) + 1):
        s, group = 2 ** k, np.flatnonzero(level == k)
        for chosen in np.array_split(group, -(-len(group) * s * s // 2 ** 20) or 1):
            x = low[chosen, 0, None, None] + np.arange(s)                       # t 1 s
            y = low[chosen, 1, None, None] + np.arange(s)[:, None]              # t s 1
            a, b, c = (corners[chosen, i, :, None, None] for i in range(3))
            middle = x + 0.5, y + 0.5
            weights = [_edge(b, c, *middle), _edge(c, a, *middle), _edge(a, b, *middle)]
            weights = np.stack(weights, -1) / area[chosen, None, None, None]    # t s s 3
            weights = weights / corners[chosen, None, None, :, 2]               # 1 / z is linear
            inside = (weights >= 0).all(-1) & (x < w) & (y < h)
            t, row, column = np.nonzero(inside)
            place, near = y[t, row, 0] * w + x[t, 0, column], weights[inside].sum(-1)
            order = np.argsort(near, kind="stable")
            order = order[near[order] > nearest[place[order]]]
            place, near = place[order], near[order]
            shade = weights[inside][order, :, None] * colours[faces[chosen[t[order]]]]
            # of several at one pixel the last, the nearest, stays
            nearest[place], image[place] = near, shade.sum(1) / near[:, None]
    return image.reshape(h, w, 3).round().clip(0, 255).astype(np.uint8)


def _edge(p, q, x, y):
    """Twice the signed area of the triangles p, q, (x, y); p, q (t,2 or more,...)."""
    return (q[:, 0] - p[:, 0]) * (y - p[:, 1]) - (x - p[:, 0]) * (q[:, 1] - p[:, 1])


# ---- data sets: clips with tracking videos

class TrackDataset(VideoDataset):
    """Items {"video", "tracks": (3, frames, height, width) in [-1, 1], "text"}.

    Frames are evenly spaced over the whole clip. rows: those of list_clips() to read at one size; a
    bad clip is replaced by another of these rows.
    """

    def __init__(self, source, rows, frames, height, width, seed=0):
        clips = [(n, video, text) for n, video, _, text in rows]
        super().__init__(source, frames, height, width, seed=seed, rows=clips)
        self.tracks = [track for _, _, track, _ in dict.fromkeys(rows)]  # without repeated rows

    def load(self, row, number):
        _, path, text = self.rows[row]
        track = self.tracks[row]
        count, tracked = video_info(path)[0], video_info(track)[0]
        if count != tracked:
            raise UserError(f"{path}: {count} frames, but its tracking video {track.name} has "
                            f"{tracked}")
        stride = max(1, count // self.frames)
        video, tracks = (read_video(p, self.frames, size=self.size, stride=stride)[0]
                         for p in (path, track))
        return {"video": video, "tracks": tracks, "text": text}

    def advice(self):
        return "the lines before name them and say why"

    def split(self, k):
        """-> two data sets: its first k clips, and the others."""
        parts = copy.copy(self), copy.copy(self)
        for part, chosen in zip(parts, (slice(None, k), slice(k, None))):
            part.rows, part.tracks = self.rows[chosen], self.tracks[chosen]
            part.repeats = self.repeats[chosen]
            part.bad = self.bad[chosen]  # a view: still in shared memory
        return parts


def in_buckets(source, sizes, seed=0, root=None, captions="needed"):
    """A list of clips -> a TrackDataset for each of `sizes` (frames, height, width) that gets any,
    see data.by_size()."""
    if not source:
        raise UserError("--data: give a folder with prompt.txt, videos.txt, trackings.txt, a csv "
                        "or a jsonl")
    source, rows = list_clips(source, captions, tracks=True, root=root)
    parts = by_size(source, rows, sizes)
    return [TrackDataset(source, part, *size, seed) for size, part in parts.items()]


def hold_out(parts, size, n, others=None):
    """Set clips aside to evaluate on -> (the training data sets, a TrackDataset whose first n clips
    are held out).

    parts: of in_buckets(), and so are `others`, the data sets of --eval-data. Without `others` the
    last n clips that are read at `size` (frames, height, width) are held out; with them, none are.
    """
    sizes = [(part.frames, *part.size) for part in others or parts]
    if size not in sizes:
        raise UserError(f"{(others or parts)[0].source}: no clip has the {size[0]} frames to "
                        "evaluate on; give a smaller --frames, or --eval-data")
    k = sizes.index(size)
    if others:
        return parts, others[k]
    if len(parts[k]) > n:
        training, held_out = parts[k].split(len(parts[k]) - n)
        return [*parts[:k], training, *parts[k + 1:]], held_out
    warn(f"--eval-n {n}: too few clips to hold any out ({len(parts[k])} of {size[0]} frames): the "
         "evaluation is on training clips; --eval-data gives others")
    return parts, parts[k]


# ---- making tracks: the options of  python das.py --make-tracks SOURCE

def asked_for(argv):
    """Does the command line hold --make-tracks? Then das.py has the options below and does not
    train."""
    words = sys.argv[1:] if argv is None else argv
    return any(word.partition("=")[0] == "--make-tracks" for word in words)


def get_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--make-tracks", required=True, metavar="SOURCE",
                   help="picture, clip, tracks, mesh or list of clips, see above")
    p.options("data", only=["--data-root"])
    p.add_argument("--out", default="out/tracks", help="folder to write")
    p.add_argument("--frames", type=p.COUNT, default=49,
                   help="frames of a tracking video, evenly spaced over a clip")
    p.add_argument("--height", type=p.COUNT, default=480, help="height in pixels")
    p.add_argument("--width", type=p.COUNT, default=720, help="width in pixels")
    p.add_argument("--save-fps", type=p.POSITIVE,
                   help="frame rate of the files (default: the clip's, or 8)")
    p.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: cuda if there is one)")
    # tracks of a clip
    p.add_argument("--tracker", metavar="FILE.py:FN",
                   help="your tracker, fn(video (3,f,h,w) in [-1,1], queries (n,2)) -> xy "
                        "(f,n,2 or 3), visible (f,n) (default: RAFT)")
    p.add_argument("--flow-weights", metavar="FILE",
                   help="torchvision's RAFT weights (default: download them)")
    p.add_argument("--flow-size", choices=("small", "large"), default="large", help="size of RAFT")
    p.add_argument("--grid", type=p.COUNT, default=70,
                   help="points tracked per row and column (default: as published)")
    # depth and cameras
    p.add_argument("--depth", metavar="FILE",
                   help=".npy of distances from the camera: (h,w), or (f,h,w) for a clip")
    p.add_argument("--depth-model", metavar="NAME",
                   help="network that estimates the depth: a name on huggingface.co or a folder of "
                        "transformers, such as apple/DepthPro-hf, or MiDaS's .pth file")
    p.add_argument("--fov", type=p.POSITIVE, default=55.0,
                   help="horizontal field of view in degrees")
    p.add_argument("--intrinsics", type=p.REAL, nargs=4, metavar=("FX", "FY", "CX", "CY"),
                   help="instead of --fov, in shares of width and height")
    p.add_argument("--source-poses", metavar="FILE",
                   help="the clip's own cameras, world-to-camera: .npy, .npz or .txt")
    p.add_argument("--camera", metavar="COMMANDS",
                   help="trans dx dy dz; rot axis degrees; spiral radius: each with an optional "
                        "first and last frame")
    p.add_argument("--poses", metavar="FILE", help="instead of --camera: world-to-camera matrices")
    p.add_argument("--camera-mode", choices=("append", "override"), default="append",
                   help="append the path to the clip's own cameras, or use it alone")
    # an object
    p.add_argument("--mask", metavar="FILE", help="picture, white on the object in the first frame")
    p.add_argument("--object", metavar="COMMANDS",
                   help="up, down, left, right, front or back with a distance (1: as far as the "
                        "object is away), rot degrees; each with an optional first and last frame")
    return checked(p.parse_args(argv))


def checked(args):
    """Refuse options that do not go together. -> args"""
    if args.camera and args.poses:
        raise UserError("--camera and --poses both give the path of the camera: leave one out")
    if args.depth and args.depth_model:
        raise UserError("--depth and --depth-model both give the depth: leave one out")
    if bool(args.mask) != bool(args.object):
        raise UserError("--mask and --object belong together: the object, and how it moves")
    # commands are read now, before any long work
    if args.camera:
        camera_path(args.camera, args.frames)
    if args.object:
        object_path(args.object, args.frames)
    return args


def kind_of(source):
    """What --make-tracks is given: image, clip, tracks, mesh or clips."""
    path = Path(source)
    if not os.path.exists(path):
        raise UserError(f"--make-tracks {source}: no such file or folder")
    if os.path.isdir(path / "videos"):
        return "clips"
    lists = {*TABLES, ".txt"}
    if path.is_dir():
        suffixes = {p.suffix.lower() for p in list_folder(path)}
        kinds = {"mesh": {".obj"}, "clips": {*VIDEOS} | lists, "clip": {*IMAGES}}
    else:
        suffixes = {path.suffix.lower()}
        kinds = {"image": {*IMAGES}, "clip": {*VIDEOS}, "tracks": {".npy"}, "mesh": {".npz"},
                 "clips": lists}
    kind = next((kind for kind, known in kinds.items() if suffixes & known), None)
    if kind is None:
        raise UserError(f"--make-tracks {source}: wanted a picture, a clip, .npy tracks, a mesh "
                        "(.npz, folder of .obj), or clips (folder, .csv, .jsonl)")
    return kind


def check_kind(args, kind):
    """Refuse options that do not go with this kind of source."""
    moving = bool(args.camera or args.poses or args.object)
    if kind == "image" and not moving:
        raise UserError("--make-tracks of a picture: say what moves, with --camera, --poses, or "
                        "--mask and --object")
    if kind == "clips" and moving:
        raise UserError("--make-tracks of a data set: clips are tracked as they are; leave "
                        "--camera, --poses and --object out")
    needs_depth = kind == "image" or (kind == "clip" and moving)
    if needs_depth and not (args.depth or args.depth_model):
        raise UserError("moving a camera or an object needs depth: --depth FILE.npy, or "
                        "--depth-model NAME such as apple/DepthPro-hf")
    if kind == "mesh" and args.object:
        raise UserError("--object: move the mesh itself; --camera and --poses move the camera")


# ---- making tracks: from a source to its tracking video

def camera_matrix(args):
    """K (3,3) in pixels, of --intrinsics or --fov."""
    h, w = args.height, args.width
    if not args.intrinsics:
        return intrinsics(h, w, args.fov)
    fx, fy, cx, cy = args.intrinsics
    if max(abs(cx), abs(cy)) > 2 or min(fx, fy) <= 0:
        raise UserError("--intrinsics: wanted FX FY CX CY in shares of width and height (CX about "
                        "0.5), FX and FY above 0")
    return np.array([[fx * w, 0, cx * w], [0, fy * h, cy * h], [0, 0, 1]])


def read_camera_path(args):
    """Poses (f,4,4) of --poses or --camera, else None."""
    if args.poses:
        return read_poses(args.poses, args.frames)
    return camera_path(args.camera, args.frames) if args.camera else None


def even_frames(path, frames, size):
    """`frames` of a clip, evenly spaced from its first -> (3,f,h,w) in [-1,1], their rate."""
    count = video_info(path)[0]
    if count < frames:
        fitting = f"--frames {(count - 1) // 8 * 8 + 1}" if count > 8 else "a longer clip"
        raise UserError(f"{path}: {count} frames instead of {frames}; try {fitting}")
    stride = (count - 1) // max(1, frames - 1) or 1
    return read_video(path, frames, size=size, stride=stride)


def read_tracks(args, kind, path, video, tracker):
    """Tracks of a clip or of a file -> xy (f,n,2) or with depth (f,n,3), visible (f,n)."""
    if kind == "clip":
        result = tracker(video, grid_points(args.height, args.width, args.grid))
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise UserError(f"--tracker {args.tracker}: gave no pair (xy, visible)")
        return checked_tracks(*result, args.frames, f"--tracker {args.tracker}")
    xy = read_array(path, "tracks")["tracks"].astype(np.float64)
    if not xy.ndim or len(xy) < args.frames:
        raise UserError(f"{path}: {len(np.atleast_1d(xy))} frames instead of {args.frames}")
    return checked_tracks(xy[:args.frames], None, args.frames, path)


def with_depth(xy, depth):
    """xy (f,n,2 or 3), depth maps (1 or f, h, w) or None -> points (f,n,3).

    Tracks that have a depth keep it; without any, all points are at depth 1. Of a single map: the
    depth that a point starts with.
    """
    if xy.shape[2] == 3:
        return xy
    z = np.ones(xy.shape[:2])
    if depth is not None:
        h, w = depth.shape[1:]
        at = np.repeat(xy[:1], len(xy), 0) if len(depth) == 1 else xy
        at = np.nan_to_num(at).round().astype(int).clip(0, [w - 1, h - 1])
        z = depth[np.arange(len(xy))[:, None] % len(depth), at[..., 1], at[..., 0]]
    return np.concatenate([xy, z[..., None]], axis=-1)


def moved(args, points, K):
    """Points under the camera and object commands -> a generator of frames (n,3).

    points (1 or f, n, 3): pixels and depth as seen by the clip's own cameras; one frame means a
    still scene.
    """
    cameras = np.tile(np.eye(4), (args.frames, 1, 1))
    if args.source_poses:
        cameras = read_poses(args.source_poses, args.frames)
    valid = (points[..., 2] > 0) & np.isfinite(points).all(-1)
    points = np.where(valid[..., None], points, 0).astype(points.dtype)
    world = lift(points, K, cameras[:len(points)]).astype(points.dtype)
    path = selected = None
    if args.object:
        mask = read_mask(args.mask, (args.height, args.width))
        dense = points.shape[:2] == (1, mask.size)  # all pixels of a picture, row by row
        selected = (mask.reshape(-1) if dense else in_mask(points[0], mask)) & valid[0]
        if not selected.any():
            raise UserError(f"--mask {args.mask}: no point with a depth lies in it: nothing would "
                            "move")
        unit = float(points[0, selected, 2].mean())
        path = about_centre(object_path(args.object, args.frames, unit), world[0], selected)
    # without a path of the camera it goes as the clip's own does
    poses = read_camera_path(args)
    views = cameras if poses is None else view(poses, cameras, args.camera_mode)
    K = K.astype(points.dtype)
    for k in range(args.frames):
        i = min(k, len(world) - 1)
        now = world[i] if path is None else move_object(world[i], selected, path[k])
        yield project(now, K, views[k].astype(points.dtype)) * valid[i, :, None]


def draw_mesh(args, path, K):
    """A moving mesh in the first camera's colours -> uint8 (f,h,w,3)."""
    vertices, faces = read_mesh(path)
    if len(vertices) < args.frames:
        raise UserError(f"{path}: {len(vertices)} frames of a mesh instead of {args.frames}")
    poses = read_camera_path(args)
    views = np.tile(np.eye(4), (args.frames, 1, 1)) if poses is None else poses
    seen = [vertices[k] @ m[:3, :3].T + m[:3, 3] for k, m in enumerate(views)]
    size = args.height, args.width
    colours = mesh_colours(seen[0], K, size)
    return np.stack([rasterise(v, faces, colours, K, size) for v in seen])


def tracking_video(args, kind, path, tracker=None, estimate=None):
    """-> the source's frames (3,f,h,w) in [-1,1] or None, its tracking video (3,f,h,w), frames per
    second.

    tracker: as of users_tracker(); estimate: of depth_estimator(), or None.
    """
    size, K = (args.height, args.width), camera_matrix(args)
    video, fps, depth = None, 8, None
    if kind == "mesh":
        return None, to_video(draw_mesh(args, path, K)), fps
    if kind == "image":
        video = read_image(path, size)[:, None]
    elif kind == "clip":
        video, fps = even_frames(path, args.frames, size)
    if args.depth:
        depth = read_depth(args.depth, size)
    elif estimate and kind != "tracks":
        depth = estimate(video).numpy()
    if depth is not None and kind != "image" and len(depth) not in (1, args.frames):
        raise UserError(f"--depth {args.depth}: {len(depth)} maps; expected 1 or {args.frames}")

    if kind == "image":  # every pixel is a point
        visible, half = None, (1, 1)
        y, x = np.mgrid[:size[0], :size[1]] + 0.5
        points = np.stack([x, y, depth[0]], axis=-1).reshape(1, -1, 3).astype(np.float32)
        first_depth = np.where(points[0, :, 2] > 0, points[0, :, 2], np.inf)
        colours = dense_colours(first_depth, size)
    else:
        xy, visible = read_tracks(args, kind, path, video, tracker)
        points = with_depth(xy, depth)
        # as in DaS's training data: marks of 7 x 5 pixels for 70 x 70 points on 480 x 720
        half = tuple(min(round(0.3 * side / xy.shape[1] ** 0.5), 1 + side // 100)
                     for side in size[::-1])
        colours = grid_colours(np.nan_to_num(points[0]), size)
    moving = args.camera or args.poses or args.object
    frames = moved(args, points, K) if moving else points
    return video, to_video(draw_tracks(frames, colours, size, visible, half)), fps


def make(args):
    """python das.py --make-tracks: write OUT/tracks.mp4, first.png, sheet.png, or a data set."""
    kind = kind_of(args.make_tracks)
    check_kind(args, kind)
    check_writable(args.out)
    env = setup(args.device)
    if kind == "clips" or env.main:
        tracker = estimate = None
        if kind in ("clip", "clips") and args.tracker:
            tracker = users_tracker(args.tracker)
        elif kind in ("clip", "clips"):
            tracker = flow_tracker(args, env.device)
        if args.depth_model:
            estimate = depth_estimator(args.depth_model, env.device)
        own_folder(args.out)
        if kind == "clips":
            make_dataset(args, env, tracker, estimate)
        else:
            make_one(args, kind, tracker, estimate)
    meet()
    release_folders()
    if dist.is_initialized():
        dist.destroy_process_group()


def flow_tracker(args, device):
    """RAFT as a tracker, see users_tracker()."""
    flow = raft(args.flow_size, args.flow_weights, device)

    def tracker(video, queries):
        return follow(video.to(device), queries, flow)
    return tracker


def make_one(args, kind, tracker, estimate):
    """The tracking video of one source -> OUT/tracks.mp4, sheet.png, first.png (for --image)."""
    out = Path(args.out)
    video, tracks, fps = tracking_video(args, kind, args.make_tracks, tracker, estimate)
    lit = (tracks > -1).any(0).float().mean((1, 2))  # share of pixels that are not black
    if lit.min() < 0.01:
        warn(f"frame {int(lit.argmin())} shows nearly no points ({100 * lit.min():.1f} % of its "
             "pixels)")
    write_video(out / "tracks.mp4", tracks, args.save_fps or fps)
    if video is None:
        contact_sheet([[tracks]], out / "sheet.png", headers=["tracks"])
        print(f"{out}: tracks.mp4, sheet.png")
        return
    contact_sheet([[video, tracks]], out / "sheet.png", headers=["input", "tracks"])
    first = ((video[:, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    write_atomic(out / "first.png", Image.fromarray(first).save)
    print(f"{out}: tracks.mp4, sheet.png, first.png (for --image)")


def make_dataset(args, env, tracker, estimate):
    """Clips with captions -> OUT/videos, OUT/tracking and the three lists.

    The processes share the clips. Tracking videos that exist are kept; bad clips are named and left
    out.
    """
    out = Path(args.out)
    source, rows = list_clips(args.make_tracks, root=args.data_root)
    rows = list(dict.fromkeys(rows))  # what a list repeats is tracked once
    mine, kept = rows[env.rank::env.world], []
    for n, path, text in tqdm(mine, "tracking clips", disable=not env.main, mininterval=5):
        names = f"videos/{n:05d}.mp4", f"tracking/{n:05d}_tracking.mp4"
        if not all((out / name).exists() for name in names):
            try:
                video, tracks, fps = tracking_video(args, "clip", path, tracker, estimate)
            except UserError as e:
                print(f"bad clip: {source} row {n}: {reason_of(e)}; left out", file=sys.stderr,
                      flush=True)
                continue
            for name, clip in zip(names, (video, tracks)):
                write_video(out / name, clip, args.save_fps or fps)
        kept.append((n, " ".join(text.split()), *names))  # a caption is one line in the list
    kept = sorted(gather_rows(kept, env))
    if not kept:
        raise UserError(f"{source}: none of the {len(rows)} clips could be tracked")
    if env.main:
        _, *columns = zip(*kept)
        for name, column in zip(("prompt.txt", "videos.txt", "trackings.txt"), columns):
            write_list(out / name, column)
        left_out = f", {len(rows) - len(kept)} left out" if len(kept) < len(rows) else ""
        print(f"{out}: {len(kept)} clips with tracks{left_out}")


def write_list(path, lines):
    """A text file with these lines."""
    write_atomic(path, lambda p: p.write_text("".join(f"{line}\n" for line in lines), "utf-8"))
