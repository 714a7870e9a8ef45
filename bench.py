"""Speed and memory at real sizes, beside the peers that are installed. Random weights, no
downloads.

    python bench.py forward                      # a call of ModelScope's network, and diffusers'
    python bench.py forward --frames 4 --height 128 --width 128
    python bench.py train --grad-ckpt            # forward and backward
    python bench.py train --base cogvideox-5b-i2v --trained lora --optimizer --grad-ckpt
    python bench.py train --base das --trained branch --optimizer --grad-ckpt
    python bench.py vader --base videocrafter2   # rollout, one frame, a reward of HPS's size
    python bench.py sample --sample-steps 50     # a clip from noise to pixels, its text encoded
    python bench.py decode --base cogvideox-5b
    python bench.py tracks --base das            # drawing a tracking video
    python bench.py fit --method vader --base wan2.1-t2v-14b --gpus 8 --gb 80 --frames 33
    python bench.py fit --table                  # which method fits which card

Sizes are the base's own on a GPU. A CPU gets the largest clip, and as many blocks of a
transformer, whose weights fit into half of the free memory and whose step takes about --budget
seconds; the table says which. Ours and diffusers' (UNet3DConditionModel, I2VGenXLUNet,
CogVideoXTransformer3DModel, WanTransformer3DModel) run in processes of their own, in turn (A B A B
for --rounds 2). Each warms up once and then makes --repeats timed steps, with the same weights and
inputs.

The columns: "seconds" are medians (least to most). "over" is the peak of a process's first step
without weights and gradients (train: of a second step, which adds to the gradients of the first).
"utilisation" is the networks' FLOPs (torch.utils.flop_counter; what is recomputed counts once) over
time and peak, where the peak is the data sheet's or a large matmul's on this machine (CPU: both in
CPU seconds, since other jobs may run beside it). "difference" compares the predictions (train: a
gradient), relative to the largest number.

fit estimates the memory of a method's training on each GPU; the method's own options follow. It
makes the method's own training step on tensors without numbers (torch's FakeTensorMode) and counts
the bytes that are alive. A transformer's step is made with one block and with two, and extended.
Assumed: attention keeps no L x L matrix; norms are float32 under autocast, as on CUDA; gradients
are there from the start; fsdp holds two whole blocks beside its shards. Not counted: CUDA's context
and workspaces, fragments (for these 10 % of the card are left free), and encoding the prompts.
"""
from common import (  # first: for signals
    DTYPES, Env, Parser, UserError, clip_gradients, device_name, generator, peak_memory,
    run_command, setup, versions, write_atomic)
import argparse
import contextlib
import ctypes
import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from argparse import Namespace
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from bases import (
    AUTOENCODERS, BASES, NETWORKS, Base, Row, Sampling, base_row, choose_sampling,
    latent_shape, text_tower)
from diffusion import make_schedule, randn, sampler_updates
from dit import (
    PATCH, TRACK_BRANCH, CogVideoXConfig, STDiT3Config, WanConfig, rope_positions,
    wan_diffusers_name)
from models import (
    UNetConfig, add_lora, compile_blocks, frozen_copy, seed_dropout, unet_diffusers_name,
    without_lora)
from pipeline import conditions, decode, generate, rollout
from rewards import WeightedSum, get_reward, text_reward
from text_encoders import CLIPConfig, OpenCLIP, OpenCLIPVision, T5Config
from tracks import draw_tracks, grid_colours, grid_points
from vae import Tiles

# dense FLOP/s in half precision, from the data sheets
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Case:
    """What is timed: a base's row, perhaps with fewer blocks, and the sampling of clips of one
    size."""
    args: Namespace
    row: Row
    sampling: Sampling

    @property
    def clip(self):
        """(frames, height, width)."""
        return self.sampling.size


def get_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("question", choices=QUESTIONS, help="what to time")
    p.add_argument("--base", default="modelscope", choices=BASES, help="base network to time")
    p.options("pixels sampling", without=("--fps", "--eta", "--negative", "--cfg"))
    p.add_argument("--layers", type=p.COUNT, help="blocks of a transformer (default: the base's)")
    p.add_argument("--batch", type=p.COUNT, default=1, help="clips per step")
    p.add_argument("--trained", choices=("all", "lora", "branch"), default="all",
                   help="train: all weights, LoRA of rank 16 on q, k and v, or Diffusion as "
                        "Shader's branch")
    p.add_argument("--optimizer", action="store_true",
                   help="train: clipping and AdamW belong to the step")
    p.add_argument("--grad-ckpt", action=argparse.BooleanOptionalAction, default=False,
                   help="train: recompute blocks in the backward pass")
    p.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True,
                   help="time diffusers' network in turn with ours")
    p.add_argument("--rounds", type=p.COUNT, default=2, help="processes per side")
    p.add_argument("--repeats", type=p.COUNT, default=3, help="timed steps per process")
    p.add_argument("--budget", type=p.POSITIVE, default=30.0,
                   help="about the seconds per CPU step")
    p.options("machine", without=("--grad-ckpt", "--parallel", "--shard-group", "--offload"))
    p.add_argument("--threads", type=p.COUNT, default=torch.get_num_threads(), help="CPU threads")
    p.add_argument("--out", default="results", help="folder of the bench_*.json to write")
    p.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)  # of one process
    p.add_argument("--answer", help=argparse.SUPPRESS)                          # the file it writes
    p.set_defaults(sample_steps=25)
    return p.parse_args(argv)


# ---- weights and inputs, the same on both sides

def random_like(key, shape):
    """Weights for a key of ours, alike in every process and quick to make; no layer is silent."""
    n, start = int(np.prod(shape)), crc32(key.encode()) % 4096
    noise = torch.randn(1 << 16, generator=generator("bench"))
    noise = noise.repeat(1 + (n + start) // len(noise))[start:start + n].view(shape)
    if len(shape) > 1:
        return noise / max(1, n // shape[0]) ** 0.5
    return 0.1 * noise + float("norm" in key and key.endswith("weight"))


@torch.no_grad()
def built(make, env, rename=None, like=None):
    """make() -> a network in env.dtype with random_like's weights, never in memory twice.

    rename, like: for a peer, our keys to its own and our network on meta.
    """
    with torch.device("meta"):
        net = make()
    net = net.to(env.dtype).to_empty(device=env.device).eval().requires_grad_(False)
    state = net.state_dict()
    for key, old in (like or net).state_dict().items():
        name, value = rename(key) if rename else key, random_like(key, old.shape)
        parts = {name: value}
        if name not in state:  # I2VGen-XL's q, k, v are apart in diffusers
            rows = value.chunk(3)
            parts = {name.replace("to_qkv", f"to_{c}"): part for c, part in zip("qkv", rows)}
        for part, rows in parts.items():
            state[part].copy_(rows.view(state[part].shape))
    return net


def network(row):
    return NETWORKS[type(row.net)](row.net)


def draw(batch, *size, device="cpu"):
    return randn((batch, *size), [generator("bench", i) for i in range(batch)], device)


def inputs(case, device):
    """(x, t, text), conditions of a base's network; the same numbers on every device."""
    row, cfg, b = case.row, case.row.net, case.args.batch
    c, f, h, w = latent_shape(case.args.base, *case.clip)
    width = cfg.text_dim if isinstance(cfg, CogVideoXConfig | WanConfig) else cfg.context_dim
    length = row.text.length if isinstance(row.text, T5Config) else 10 if row.tiny else 77
    call, cond = (draw(b, c, f, h, w), torch.full((b,), 500), draw(b, length, width)), {}
    if isinstance(cfg, STDiT3Config):
        sizes = zip(("height", "width", "fps"), (*case.clip[1:], 24))
        cond = {k: torch.full((b,), float(v)) for k, v in sizes}
    elif isinstance(cfg, UNetConfig):
        if cfg.image_to_video:
            cond |= {"image": draw(b, 1, width), "first_frame": draw(b, c, h, w)}
        if row.sample.fps:
            cond["fps"] = torch.full((b,), row.sample.fps)
        if cfg.motion_blocks:
            cond["motion_text"] = call[2]
    elif isinstance(cfg, WanConfig):
        if row.first_frame:
            cond["first_frame"] = draw(b, cfg.in_channels - cfg.out_channels, f, h, w)
        if cfg.image_dim:
            cond["image"] = draw(b, 257, cfg.image_dim)
    else:
        if row.first_frame:
            cond["first_frame"] = draw(b, c, 1, h, w)
        if row.tracks:
            cond |= {"tracks": draw(b, c, f, h, w), "first_track": draw(b, c, 1, h, w)}
    return [v.to(device) for v in call], {k: v.to(device) for k, v in cond.items()}


def peer_of(row):
    """Name of diffusers' class of the same network, or None."""
    if isinstance(row.net, WanConfig):
        return "WanTransformer3DModel"
    if isinstance(row.net, CogVideoXConfig):
        plain = not row.tracks and "rope" in row.net.positions
        return "CogVideoXTransformer3DModel" if plain else None
    i2v = UNetConfig(image_to_video=True, concat_dim=4, use_fps_condition=True)
    return {UNetConfig(): "UNet3DConditionModel", i2v: "I2VGenXLUNet"}.get(row.net)


def peer_network(case, env):
    """diffusers' network with our weights -> it, and a function to be called as ours is."""
    import diffusers
    kind = getattr(diffusers, peer_of(case.row))
    with torch.device("meta"):
        like = network(case.row)
    if isinstance(case.row.net, CogVideoXConfig):
        return peer_cogvideox(case, env, kind, like)
    cfg = case.row.net
    if isinstance(cfg, WanConfig):
        peer = built(lambda: kind(
            num_attention_heads=cfg.heads, attention_head_dim=cfg.dim // cfg.heads,
            in_channels=cfg.in_channels, out_channels=cfg.out_channels, text_dim=cfg.text_dim,
            freq_dim=cfg.freq_dim, ffn_dim=cfg.ffn_dim, num_layers=cfg.num_layers,
            image_dim=cfg.image_dim or None, added_kv_proj_dim=cfg.dim if cfg.image_dim else None),
            env, wan_diffusers_name, like)
        # its tables of positions are no weights
        peer.rope = type(peer.rope)(cfg.dim // cfg.heads, (1, PATCH, PATCH), 1024)
        peer.rope.to(env.device)

        def answer(x, t, text, first_frame=None, image=None):
            x = x if first_frame is None else torch.cat([x, first_frame], dim=1)
            return peer(x, t, text, image).sample
        return peer, answer
    peer = built(lambda: kind(attention_head_dim=cfg.head_dim), env, unet_diffusers_name, like)
    if not cfg.image_to_video:
        return peer, lambda x, t, text: peer(x, t, text).sample
    # ours adds the image's channels twice, as the original does
    peer.conv_in.weight.data[:, 4:8] *= 2

    def call(x, t, text, image, first_frame, fps):
        planes = [torch.full_like(first_frame, k / (x.shape[2] - 1)) for k in range(1, x.shape[2])]
        image_latents = torch.stack([first_frame, *planes], dim=2)
        return peer(x, t, fps, image_latents, image[:, 0], text).sample
    return peer, call


def peer_cogvideox(case, env, kind, like):
    """peer_network() for CogVideoX."""
    cfg, (f, h, w) = case.row.net, case.row.net.size
    _, frames, rows, columns = latent_shape(case.args.base, *case.clip)
    peer = built(lambda: kind(
        in_channels=cfg.in_channels, out_channels=cfg.out_channels, num_layers=cfg.num_layers,
        num_attention_heads=cfg.heads, attention_head_dim=cfg.head_dim, time_embed_dim=cfg.time_dim,
        text_embed_dim=cfg.text_dim, max_text_seq_length=cfg.text_length, sample_frames=4 * f - 3,
        sample_height=h, sample_width=w, use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=cfg.positions == "rope+learned"), env, str, like)
    angles = rope_positions(frames, rows // 2, columns // 2, h // 2, w // 2, cfg.head_dim)
    rope = [y.repeat_interleave(2, dim=1).to(env.device) for y in angles]  # one per number

    def call(x, t, text, first_frame=None):
        if first_frame is not None:
            x = torch.cat([x, F.pad(first_frame, (0, 0, 0, 0, 0, frames - 1))], dim=1)
        out = peer(x.transpose(1, 2), text, t, image_rotary_emb=rope).sample
        return out.transpose(1, 2)
    return peer, call


# ---- sizes, FLOPs, seconds, memory

def work(case):
    """(FLOPs, bytes of fp32 weights) of one call of our network, without running it."""
    with torch.device("meta"):
        net = network(case.row)
    call, cond = inputs(case, "meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*call, **cond)
    return counter.get_total_flops(), 4 * sum(p.numel() for p in net.parameters())


# what a transformer's number of blocks is called
DEPTH = {CogVideoXConfig: "num_layers", STDiT3Config: "depth", WanConfig: "num_layers"}


def fewer_blocks(row, n):
    """The row of a transformer with n blocks."""
    changes = {DEPTH[type(row.net)]: n}
    if row.tracks:
        changes["tracking_blocks"] = min(n, row.net.tracking_blocks)
    return replace(row, net=replace(row.net, **changes))


def fitted(args, env):
    """The Case to time; on a CPU its clip and a transformer's blocks are cut to what it can do."""
    row, sampling = base_row(args.base), choose_sampling(args.base, args)
    case, layers = Case(args, row, sampling), 1
    if type(row.net) in DEPTH:
        layers = args.layers or getattr(row.net, DEPTH[type(row.net)])
        case = replace(case, row=fewer_blocks(row, layers))
    calls = {"forward": 1, "train": 3}.get(args.question, 2 * args.sample_steps)
    fixed = args.frames or args.height or args.width
    cuts = env.device.type == "cpu" and not args.side and args.question not in ("decode", "tracks")
    while cuts:
        flops, weights = work(case)
        weights *= 2 if args.question == "train" else 1  # and their gradients
        heavy = weights > memory("MemAvailable", "/proc/meminfo") / 2
        if not heavy and calls * flops < args.budget * rate(env):
            break
        less = None if fixed else smaller(args.base, case.clip)
        if layers > 1 and not args.layers and (heavy or not less):
            layers //= 2
            case = replace(case, row=fewer_blocks(row, layers))
        elif less:
            size = dict(zip(("frames", "height", "width"), less))
            case = replace(case, sampling=replace(case.sampling, **size))
        else:
            break  # there is nothing smaller
    return case


def smaller(name, clip):
    """Half of the picture or, where the base takes no other, of the frames; None: nothing is
    smaller."""
    frames, h, w = clip
    fewer = (frames - 1) // 16 * 8 + 1 if frames % 8 == 1 else frames // 2
    for less in ((frames, h // 2, w // 2), (fewer, h, w)):
        try:
            if less != clip and less[0] and min(less[1:]) >= 64:
                latent_shape(name, *less)
                return less
        except UserError:
            pass
    return None


def rate(env):
    """Peak FLOP/s: PEAK's in half precision, else a large matmul's (on a CPU per second of its
    time)."""
    known = [v for k, v in PEAK.items() if k in device_name(env.device)]
    if known and env.dtype != torch.float32:
        return known[0]
    n = 8192 if env.device.type == "cuda" else 1024
    a = torch.randn(n, n, device=env.device, dtype=env.dtype)
    clock = int(env.device.type == "cpu")
    return 2 * n ** 3 / min(timed(lambda: a @ a, env)[clock] for _ in range(5))


def timed(fn, env):
    """(seconds, CPU seconds of all threads) of fn()."""
    wait = torch.cuda.synchronize if env.device.type == "cuda" else lambda: None
    wait()
    start, cpu = time.perf_counter(), time.process_time()
    fn()
    wait()
    return time.perf_counter() - start, time.process_time() - cpu


def memory(field, file="/proc/self/status"):
    """Bytes in one of Linux's tables."""
    return 1024 * int(Path(file).read_text("utf-8").split(f"{field}:")[1].split()[0])


def restart_peak(env):
    """Peak memory counts from now on. -> bytes in use."""
    if env.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what comes
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return memory("VmRSS")


# ---- the questions: each (case, env) -> what to time, the network, its FLOPs in units of one call

def denoiser(case, env):
    """-> the network of this process's side, and a function to call it."""
    if case.args.side == "peer":
        return peer_network(case, env)
    net = compile_blocks(built(lambda: network(case.row), env), case.args, env.device)
    return net, net


def forward(case, env):
    net, call = denoiser(case, env)
    given, cond = inputs(case, env.device)

    def step():
        with torch.no_grad(), env.autocast():
            return call(*given, **cond)
    return step, net, 1


def lora_targets(row):
    names = {STDiT3Config: "qkv q_linear kv_linear", WanConfig: "q k v"}
    return names.get(type(row.net), "to_q to_k to_v").split()


def lora(net, row):
    add_lora(net, 16, 16.0, lora_targets(row))


def train(case, env):
    args, (net, call) = case.args, denoiser(case, env)
    if args.trained == "lora":
        lora(net, case.row)
    parts = {"all": ("",), "lora": (".lora_",), "branch": TRACK_BRANCH}[args.trained]
    for key, p in net.named_parameters():
        if any(word in key for word in parts):
            p.data = p.data.float()  # trained weights are fp32, as in every method
            p.requires_grad_(True)
    # not all of diffusers' networks can recompute
    if args.side == "peer" and args.grad_ckpt and net._supports_gradient_checkpointing:
        net.enable_gradient_checkpointing()
    net.grad_ckpt = args.grad_ckpt
    trained = [p for p in net.parameters() if p.requires_grad]
    if not trained:
        raise UserError(f"--trained {args.trained}: {args.base} has none")
    opt = torch.optim.AdamW(trained, 1e-6)
    given, cond = inputs(case, env.device)
    given[0].requires_grad_(args.trained == "all")  # its gradient is what is compared

    def step(add=False):
        given[0].grad = None
        if not add:
            opt.zero_grad()
        with env.autocast():
            call(*given, **cond).float().square().mean().backward()
        if args.optimizer:
            clip_gradients(trained, 1.0)
            opt.step()
        return given[0].grad
    return step, net, 3 if args.trained == "all" else 2  # frozen weights need no gradient


def loaded(case, env):
    """A base with random weights whose texts are encoded, and its network's conditions."""
    row, net = case.row, denoiser(case, env)[0]
    vae = built(lambda: AUTOENCODERS[type(row.vae)](row.vae), env)
    if row.text and isinstance(row.net, CogVideoXConfig):
        vae.tiles = Tiles()
    base = Base(case.args.base, row, net, vae, None, make_schedule(**row.schedule),
                lambda texts: torch.ones(len(texts), 300))
    (_, _, text), cond = inputs(case, env.device)
    for prompt in ("a" + case.sampling.suffix, case.sampling.negative):
        base.encoded |= {(prompt, motion): text[0] for motion in (False, True)}
    own = ("fps", "height", "width", "motion_text")  # what the rollout adds itself
    return base, {k: v for k, v in cond.items() if k not in own}


def sample(case, env):
    (base, cond), sampling, n = loaded(case, env), case.sampling, case.args.batch

    def step():
        with torch.no_grad():
            generate(base, env, ["a"] * n, range(n), sampling, n, cond=cond)
    branches = 2 if sampling.cfg != 1 and sampling.sampler != "lcm" else 1
    return step, base.net, sampling.sample_steps * branches


def vader(case, env):
    (base, cond), sampling, n = loaded(case, env), case.sampling, case.args.batch
    lora(base.net, case.row)
    base.net.grad_ckpt = True
    tower = BASES["tiny-i2v"].image if case.row.tiny else CLIPConfig()  # HPS's network
    reward = built(lambda: OpenCLIPVision(tower), env)

    def step():
        x_T, noise = inputs(case, env.device)[0][0], [generator(i) for i in range(n)]
        with env.autocast():
            x_0 = rollout(base.net, base, ["a"] * n, x_T, sampling, noise, cond, {}, grad_last=1)
            frame = decode(base, x_0, sampling.frames, chosen=[0])[:, :, 0]
            size = (tower.image_size,) * 2
            frame = F.interpolate(frame, size=size, mode="bilinear", antialias=True)
            reward(frame).float().mean().backward()
    return step, base.net, 2 * (sampling.sample_steps + 1)  # two branches; the last step backward


def decoding(case, env):
    base, _ = loaded(case, env)
    latents = inputs(case, env.device)[0][0]

    def step():
        with torch.no_grad(), env.autocast():
            decode(base, latents, case.sampling.frames)
    return step, base.vae, 0


def tracks(case, env):
    (f, h, w), start = case.clip, grid_points(*case.clip[1:])
    start = np.concatenate([start, np.ones((len(start), 1))], axis=1)
    path = [start + np.array([2 * k, k, 0.01 * k]) for k in range(f)]

    def step():
        draw_tracks(path, grid_colours(start, (h, w)), (h, w), half=(4, 4))
    return step, None, 0


QUESTIONS = {"forward": forward, "train": train, "vader": vader, "sample": sample,
             "decode": decoding, "tracks": tracks}


def measure(case, env):
    """What a process of one side does; its figures go to the file --answer."""
    args = case.args
    step, net, calls = QUESTIONS[args.question](case, env)
    before = restart_peak(env)
    result = step()
    if args.question == "train":  # gradients are there already, as when micro-steps add up
        step(add=True)
    top = memory("VmHWM") if env.device.type == "cpu" else peak_memory(env.device) * 1e9
    grads = sum(p.grad.nbytes for p in net.parameters() if p.grad is not None) if net else 0
    seconds, cpu = zip(*(timed(step, env) for _ in range(args.repeats)))
    figures = dict(seconds=seconds, cpu=cpu, peak=top, over=top - before - grads, result=result,
                   calls=calls)
    torch.save(figures, args.answer)


def run_sides(case, sides, asked):
    """Run a process per side and round -> {side: [what measure() wrote]}."""
    size = [f"--{k}={v}" for k, v in zip(("frames", "height", "width"), case.clip)]
    if type(case.row.net) in DEPTH:
        size.append(f"--layers={getattr(case.row.net, DEPTH[type(case.row.net)])}")
    runs = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for side in sides * case.args.rounds:
            file = Path(folder, side)
            words = [*asked, *size, "--side", side, "--answer", str(file)]
            if subprocess.run([sys.executable, __file__, *words]).returncode:
                raise UserError(f"bench.py {case.args.question}: the process of {side} ended with "
                                "an error")
            runs[side].append(torch.load(file, weights_only=True))
    return runs


def figures_of(runs, flops, best, clock):
    """What the processes of one side wrote -> seconds, memory in GB and utilisation."""
    seconds, cpu = ([t for run in runs for t in run[k]] for k in ("seconds", "cpu"))
    row = dict(seconds=statistics.median(seconds), least=min(seconds), most=max(seconds),
               cpu=statistics.median(cpu))
    row |= {k: min(run[k] for run in runs) / 1e9 for k in ("peak", "over")}
    return row | {"utilisation": flops / best / row[clock]}


# ---- fit: the memory of a method's training, counted on tensors without numbers

FIT_METHODS = ("t2v", "vader", "grpo", "videodpo")
# rewards without files; a published one is counted as HPS's network, the largest CLIP among them
OWN_REWARDS = ("tiny", "tiny-raw", "brightness", "redness", "size", "temporal")
# CUDA's autocast computes these in float32, a CPU's does not
FLOAT32_ON_CUDA = ("layer_norm", "group_norm", "rms_norm", "normalize", "interpolate")
USABLE = 0.9  # share of a card's memory; the rest is CUDA's context, workspaces and fragments
DEVICE_OF = torch.ops.prim.device.default  # an operation that makes no tensor


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made since: `now` alive, and `top`, the most so far.

    Views share a storage, which counts once. What an operation needs only inside is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = self.top = 0
        self.seen, self.elsewhere = weakref.WeakSet(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out) if func is not DEVICE_OF else ():
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.seen:
                self.seen.add(storage)
                if not self.elsewhere:
                    weakref.finalize(storage, self.freed, storage.nbytes()).atexit = False
                    self.now += storage.nbytes()
                    self.top = max(self.top, self.now)
        return out

    def freed(self, size):
        self.now -= size

    def most(self, fn):
        """Bytes that are alive at most while fn() runs, beyond those before."""
        gc.collect()
        before = self.top = self.now
        fn()
        return self.top - before

    def offload(self):
        """Context of --offload: saved activations are copies that do not count."""
        def pack(x):
            self.elsewhere = True
            copy = x.detach().clone()
            self.elsewhere = False
            return copy
        return torch.autograd.graph.saved_tensors_hooks(pack, torch.clone)


def cuda_norms():
    """Context in which autocast on fake CPU tensors treats norms as CUDA's does."""
    def in_float32(function):
        def called(*args, **options):
            if torch.is_autocast_enabled("cpu"):
                args, options = tree_map_only(torch.Tensor, torch.Tensor.float, (args, options))
            with torch.autocast("cpu", enabled=False):
                return function(*args, **options)
        return called
    return patch.multiple(F, **{name: in_float32(getattr(F, name)) for name in FLOAT32_ON_CUDA})


def size_of(*modules):
    """Bytes of their parameters and buffers."""
    return sum(x.nbytes for m in modules if m for x in (*m.parameters(), *m.buffers()))


def blank(module, mode):
    """A network on meta -> on the CPU, full of zeros, or fake tensors where mode makes these."""
    with mode:
        module.to_empty(device="cpu")
        for x in (*module.parameters(), *module.buffers()):
            x.data.zero_()
    return module


@functools.cache
def text_bytes(name, dtype):
    with torch.device("meta"):
        return size_of(text_tower(base_row(name)).to(dtype))


def blank_base(args, env, layers, mode):
    """-> a Base as a method's main() has it once texts are encoded and their tower is gone."""
    row = base_row(args.base)
    row = fewer_blocks(row, layers) if layers else row
    with torch.device("meta"):
        net, vae = network(row), AUTOENCODERS[type(row.vae)](row.vae)
        tower = OpenCLIPVision(row.image or row.text) if row.image else None
    base = Base(args.base, row, net, vae, None, make_schedule(**row.schedule),
                lambda texts: torch.ones(len(texts), 300), tower)
    base.freeze(env.dtype, but=[] if args.rank else ["net"])
    for part in base.parts().values():
        blank(part, mode)
    with mode:
        if args.frozen == "int8":
            base.freeze_int8()
        if args.rank:
            add_lora(base.net, args.rank, args.alpha, args.lora_targets)
        base.net.requires_grad_(not args.rank)
        for key, p in base.net.named_parameters():
            p.requires_grad_(not args.rank or ".lora_" in key)
    base.net.grad_ckpt = args.grad_ckpt
    return base


def reward_for(spec, mode):
    """-> the reward, bytes of its networks."""
    if spec in OWN_REWARDS:
        return get_reward(spec, "cpu"), 0
    with torch.device("meta"):
        net = OpenCLIP(CLIPConfig()).requires_grad_(False)
    width = CLIPConfig().embed_dim
    judge = text_reward(blank(net, mode).visual, lambda prompts: torch.zeros(len(prompts), width))
    return WeightedSum([(spec, 1.0, judge)]), size_of(net)


def loss_of(name, args, base, sampling, env, gpus, reward, mode):
    """-> fn() -> the loss (b,) of a micro-step of method `name`, bytes that it keeps beside."""
    method, n = import_module(name), args.batch
    picture = Image.new("RGB", (sampling.width, sampling.height)) if base.row.first_frame else None
    net, prompts, images = base.net, ["a"] * n, [picture] * n
    shape, cuts = base.latent_shape(sampling), [generator(i) for i in range(n)]

    def zeros(*size):
        with mode:
            return torch.zeros(size)
    if name == "t2v":
        net.train()
        seed_dropout(net, 0, range(n))
        x0 = zeros(n, *shape)
        return lambda: method.t2v_loss(net, base, sampling, x0, prompts, cuts, args), 0
    if name == "vader":
        length = method.check_lengths(args, sampling)
        k = sampling.updates if args.backprop == "rand" else args.backprop
        one = method.frames_to_reward(args.decode, length, torch.Generator())
        chosen = [length - 1] if args.decode == "random" else one
        last = replace(sampling, sample_steps=k)  # those before record nothing
        return lambda: method.vader_loss(net, base, env, reward, prompts, images, cuts, last, k,
                                         args.continuations, [chosen] * n), 0
    if name == "grpo":
        rollouts, noise = method.check_rollouts(args, sampling, gpus)
        updates = sampler_updates(base.sampling_schedule(rollouts), rollouts.sample_steps,
                                  rollouts.size, rollouts.spacing)
        cond, null = conditions(base, env, sampling, images)
        clips = dict(prompt=prompts, cond=cond, null_cond=null, advantage=zeros(n),
                     states=zeros(n, len(updates) + 1, *shape), log_probs=zeros(n, len(updates)))
        return lambda: method.grpo_loss(net, base, rollouts, clips, 0, (*updates[0], *noise),
                                        args)[0], args.accum * clips["states"].nbytes
    reference, kept = without_lora(net), 0
    if not args.rank:
        with torch.device("meta"):
            like = network(base.row)
        alone = Namespace(parallel="ddp", compile=False)
        reference = blank(frozen_copy(like, env.dtype, alone, env.device), mode)
        kept = size_of(reference)
    pairs = zeros(n, 2, *shape)
    return lambda: method.pair_loss(
        net, reference, base, sampling, args, pairs, prompts, torch.full((n, 2), 0.5),
        torch.zeros_like(pairs), torch.ones(n))[0], kept


def count(name, args, gpus, layers=None, real=False, step_only=False):
    """-> bytes of a method's networks on one device, and of what else is alive in each phase.

    real: of the step alone, on this machine's tensors: counted, and measured by the profiler.
    """
    sampling, mode = choose_sampling(args.base, args, method=name), contextlib.nullcontext()
    env = Env(0, 1, torch.device("cpu"), DTYPES[args.dtype or "bf16"])
    norms = contextlib.nullcontext() if args.device == "cpu" else cuda_norms()
    if not real:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    with Alive() as alive, norms:
        base = blank_base(args, env, layers, mode)
        tokens = inputs(Case(args, base.row, sampling), "cpu")[0][2]
        for prompt in ("a" + sampling.suffix, sampling.negative):
            base.encoded |= {(prompt, motion): tokens[0] for motion in (False, True)}
        reward, judge = (None, 0) if name in ("t2v", "videodpo") else reward_for(args.reward, mode)
        loss, kept = loss_of(name, args, base, sampling, env, gpus, reward, mode)
        trained = [p for p in base.net.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)

        def step():
            with env.autocast(), alive.offload() if args.offload else contextlib.nullcontext():
                value = loss().mean()
            value.backward()
        if real:
            return dict(counted=alive.most(step), measured=allocated(step))
        found = dict(net=size_of(base.net), trained=4 * sum(p.numel() for p in trained), kept=kept,
                     step=alive.most(step))
        if step_only:
            return found
        found |= without_gradient(name, base, sampling, env, alive, mode)
    return found | dict(block=max(map(size_of, base.net.units())), reward=judge,
                        rest=size_of(base.vae, base.image_encoder),
                        text=text_bytes(args.base, env.dtype))


@torch.no_grad()
def without_gradient(name, base, sampling, env, alive, mode):
    """-> bytes of encoding clips (of pairs, two at a time) and of decoding one, which evaluations
    do."""
    found, size = {}, (2 if name == "videodpo" else 1, 3, *sampling.size)
    with mode:
        x, video = torch.zeros(1, *base.latent_shape(sampling)), torch.zeros(size, dtype=env.dtype)
    if name in ("t2v", "videodpo"):
        found["encode"] = alive.most(lambda: base.vae.moments(video)) + video.nbytes
    with env.autocast():
        found["decode"] = alive.most(lambda: decode(base, x, sampling.frames))
    return found


def allocated(step):
    """-> peak of the bytes that the CPU's allocator gives out during step(), by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


def whole_count(name, args, gpus):
    """count(); for a transformer from 1 and 2 blocks: all is linear in their number."""
    row = base_row(args.base)
    layers = getattr(row.net, DEPTH[type(row.net)]) if type(row.net) in DEPTH else 0
    if layers <= 2:
        return count(name, args, gpus)
    one, two = count(name, args, gpus, 1), count(name, args, gpus, 2, step_only=True)
    return one | {k: one[k] + (two[k] - one[k]) * (layers - 1) for k in two}


def phases(args, gpus, found):
    """count() -> [(phase, weights, gradients, optimizer, the rest)], bytes on each of the GPUs."""
    fsdp, net, trained = args.parallel == "fsdp", found["net"], found["trained"]
    start = net + found["text"] + found["rest"] + found["reward"]
    gradients = trained * (1 if gpus == 1 else 2)  # DDP: and buckets
    if fsdp:  # two blocks are gathered, and one's gradients
        share = 0 if args.offload else 1 / gpus
        net = share * net + found["block"] * (2 if args.rank else 3)
        trained = gradients = share * trained
    moments = trained / 2 if args.optim == "adamw8bit" else 2 * trained  # a byte each, or four
    held = net + found["rest"] + found["reward"] + found["kept"]
    if "cache_latents" in args and not args.cache_latents:
        held += found["text"]  # t2v encodes the captions in each step
    rows = [("load", start, 0, 0, 0)]
    for phase in ("encode", "step"):
        if phase in found:
            rows.append((phase, held, gradients, moments, found[phase]))
    rows.append(("optimizer", held, gradients, moments, trained))
    rows.append(("decode", held, 0, moments, found["decode"]))
    return rows


def advice(args, gpus, phase):
    """The options that make a phase smaller, most effective first, without those already given."""
    smaller = ["smaller --height and --width", "fewer --frames"]
    if phase == "load":
        return ["a smaller --base (every GPU loads the whole network and its text tower first)"]
    sharded = {"--parallel fsdp": gpus > 1 and args.parallel == "ddp", "--rank 16": not args.rank}
    saved = {"--grad-ckpt": not args.grad_ckpt, "--batch 1": args.batch > 1,
             "--offload": not args.offload, "--frozen int8": args.rank and not args.frozen}
    dials = sharded if phase == "optimizer" else saved | sharded if phase == "step" else {}
    return [dial for dial, helps in dials.items() if helps] + smaller * (phase != "optimizer")


# bases of docs/hardware.md, with a smaller size to try
TABLE = {
    "wan2.1-t2v-14b": "--frames 17 --height 240 --width 416",
    "wan2.1-t2v-1.3b": "--frames 17 --height 240 --width 416",
    "wan2.2-ti2v-5b": "--frames 17 --height 352 --width 640",
    "cogvideox-5b": "--frames 17 --height 240 --width 368",
    "cogvideox-2b": "--frames 17 --height 240 --width 368",
    "opensora": "--frames 17 --height 144 --width 256",
    "modelscope": "--frames 8",
    "videocrafter2": "--frames 8 --height 256 --width 256",
    "i2vgen-xl": "--frames 8 --height 256 --width 448"}


def fit_table(only):
    """Print what LoRA training holds: all methods on the bases of TABLE, or on those in `only`."""
    print("| base | method | clip | one GPU, GB | most in | 8 GPUs with fsdp, GB | smallest card | "
          "options |", "|---|---|---|---|---|---|---|---|", sep="\n")
    for base in only or TABLE:
        row = base_row(base)
        for name in (m for m in FIT_METHODS if m in row.methods):
            for more in ("", TABLE.get(base, "")):
                words = ["--rank", "16", "--lora-targets", *lora_targets(row), *more.split()]
                words += ["--cache-latents"] if name == "t2v" else []
                args = import_module(name).get_args(["--base", base, *words])
                found = whole_count(name, args, 1)
                size = choose_sampling(base, args, method=name).size
                one, phase = max((sum(x), k) for k, *x in phases(args, 1, found))
                args.parallel = "fsdp"
                eight = max(sum(x) for _, *x in phases(args, 8, found))
                cards = [gb for gb in (12, 24, 48, 80) if one <= USABLE * gb * 2 ** 30]
                print(f"| {base} | {name} |", "{} x {}x{}".format(*size), f"| {one / 1e9:.1f} | "
                      f"{phase} | {eight / 1e9:.1f} | {(cards or ['none'])[0]} | {more} |",
                      flush=True)


def fit_args(argv):
    p = Parser(__doc__)
    p.add_argument("question", choices=("fit",), help="how much memory a method's training needs")
    p.add_argument("--method", choices=FIT_METHODS, help="method; its own options may follow")
    p.add_argument("--gpus", type=p.COUNT, default=1, help="processes, one per GPU")
    p.add_argument("--gb", type=p.POSITIVE, default=80, help="memory of a GPU in GiB")
    p.add_argument("--table", action="store_true",
                   help="print the table of docs/hardware.md; names of bases may follow")
    options, words = p.parse_known_args(argv)
    if not options.table and not options.method:
        p.error("--method: give one of " + ", ".join(FIT_METHODS))
    return options, words


def fit(argv):
    """Print what a method's training holds on each GPU, phase by phase, and whether it fits."""
    options, words = fit_args(argv)
    if options.table:
        return fit_table(words)
    name, gpus = options.method, options.gpus
    args = import_module(name).get_args(words)
    rows = phases(args, gpus, whole_count(name, args, gpus))
    print("| phase | weights | gradients | optimizer | activations and others | all, GB |",
          "|---|---|---|---|---|---|", sep="\n")
    for phase, *sizes in rows:
        print(f"| {phase} |", " | ".join(f"{x / 1e9:.2f}" for x in (*sizes, sum(sizes))), "|")
    phase, *sizes = max(rows, key=lambda row: sum(row[1:]))
    fits = sum(sizes) <= USABLE * options.gb * 2 ** 30
    print(f"{'fits' if fits else 'does not fit'} {options.gb:g} GiB (an estimate; "
          f"{100 * (1 - USABLE):.0f} % are left to CUDA); most memory: {phase}")
    if not fits:
        print("try, in this order:", ", ".join(advice(args, gpus, phase)))
    return fits


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["fit"]:
        fit(argv)
        return
    args = get_args(argv)
    torch.set_num_threads(args.threads)
    env = setup(args.device, args.dtype)
    case = fitted(args, env)
    if args.side:
        measure(case, env)
        return
    sides, asked = ["ours"], argv
    comparable = args.question in ("forward", "train") and args.trained == "all"
    if args.peer and comparable and peer_of(case.row) and find_spec("diffusers"):
        sides.append("peer")
    runs = run_sides(case, sides, asked)

    flops, best = work(case)[0] * runs["ours"][0]["calls"], rate(env)
    kind = type(case.row.net)
    layers = getattr(case.row.net, DEPTH[kind]) if kind in DEPTH else None
    what = "{} x {}x{}".format(*case.clip) + (f", {layers} blocks" if layers else "")
    rows, table, clock = {}, [], "cpu" if env.device.type == "cpu" else "seconds"
    for side in sides:
        r = rows[side] = figures_of(runs[side], flops, best, clock)
        who = "ours" if side == "ours" else f"diffusers' {peer_of(case.row)}"
        table.append(
            f"| {args.question} | {args.base}, {what} | {who} | {r['seconds']:.3g} s "
            f"({r['least']:.3g} to {r['most']:.3g}) | {r['cpu']:.3g} s | {r['peak']:.2f} GB | "
            f"{r['over']:.2f} GB | {100 * r['utilisation']:.0f} % |")
    about = dict(
        command=" ".join(["python bench.py", *asked]), versions=versions(), cores=os.cpu_count(),
        device=device_name(env.device), dtype=str(env.dtype), peak_flops=best)
    if len(sides) == 2:
        ours, theirs = (runs[side][0]["result"].float() for side in sides)
        about["difference"] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        about["ratio"] = {k: rows["ours"][k] / rows["peer"][k]
                          for k in ("seconds", "least", "cpu", "over")}
    print("| question | base | who | seconds | CPU seconds | peak | over | utilisation |", *table,
          sep="\n")
    print(json.dumps(about, indent=1))
    name = "_".join(["bench", args.question, args.base, "x".join(map(str, case.clip))])
    answer = dict(table=table, **about, rows=rows, clip=case.clip, layers=layers)
    text = json.dumps(answer, indent=1)
    write_atomic(Path(args.out, f"{name}.json"), lambda path: path.write_text(text + "\n", "utf-8"))


if __name__ == "__main__":
    run_command(main, "--batch 1", "fewer --frames", "a smaller --height and --width")
