"""Speed and memory at real sizes, beside the peers that are installed; random weights, nothing to
download.

    python bench.py forward                            # a call of ModelScope's network, and of diffusers'
    python bench.py forward --frames 4 --height 128 --width 128
    python bench.py train --grad-ckpt                  # forward and backward; diffusers' UNets recompute not
    python bench.py train --base cogvideox-5b-i2v --trained lora --optimizer --grad-ckpt
    python bench.py train --base das --trained branch --optimizer --grad-ckpt
    python bench.py vader --base videocrafter2         # rollout, one frame, reward of HPS's size, backward
    python bench.py sample --sample-steps 50           # a clip from noise to pixels, its text encoded before
    python bench.py decode --base cogvideox-5b
    python bench.py tracks --base das                  # drawing a tracking video

Sizes are the base's own on a GPU; a CPU gets the largest whose weights fit into half of the free
memory and whose step takes about --budget seconds, and as many blocks of a transformer; the table
says so. Ours and diffusers' (UNet3DConditionModel, I2VGenXLUNet, CogVideoXTransformer3DModel) run
in processes of their own, in turn: A B A B for --rounds 2, each warming up once, then --repeats
timed steps, with the same weights and inputs. "difference" compares the predictions (train: a
gradient) relative to the largest number. Seconds are medians (least to most); "over" is the peak
of a process's first step less weights and gradients (train: of a second one, that adds to the
gradients of the first; in the first they come as activations go). Utilisation: the networks'
FLOPs (torch.utils.flop_counter; what is recomputed counts once) over time and peak: the data
sheet's, or a large matmul's on this machine (CPU: both in CPU seconds, since other jobs may run
beside it). (Over the budget of 330 lines: three families of networks, each with a peer that wants
its weights otherwise.)
"""
import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bases import AUTOENCODERS, BASES, NETWORKS, Base, base_row, fill, latent_shape
from common import (
    COUNT,
    POSITIVE,
    Parser,
    UserError,
    clip_gradients,
    device_name,
    generator,
    peak_memory,
    run_command,
    setup,
    versions,
    write_atomic,
)
from diffusion import make_schedule, randn
from dit import TRACK_BRANCH, CogVideoXConfig, STDiT3Config, rope_positions
from models import UNetConfig, add_lora, unet_diffusers_name
from pipeline import decode, generate, rollout
from text_encoders import CLIPConfig, OpenCLIPVision, T5Config
from tracks import draw_tracks, grid_colours, grid_points
from vae import Tiles

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense FLOP/s in half precision, of the data sheets


def get_args(argv=None):
    p = Parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    p.add_argument("question", choices=QUESTIONS, help="what to time")
    p.add_argument("--base", default="modelscope", choices=BASES, help="base network")
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--layers", type=COUNT, help="blocks of a transformer (default: the base's)")
    p.add_argument("--batch", type=COUNT, default=1, help="clips")
    p.add_argument("--sample-steps", type=COUNT, default=25, help="sampler steps of vader and sample")
    p.add_argument("--trained", choices=("all", "lora", "branch"), default="all",
                   help="train: all weights, LoRA of rank 16 on q, k, v, or Diffusion as Shader's branch")
    p.add_argument("--optimizer", action="store_true", help="train: clipping and AdamW in the step, too")
    p.add_argument("--grad-ckpt", action=yes_no, default=False, help="train: recompute blocks backward")
    p.add_argument("--compile", action="store_true", help="torch.compile our blocks, refusing graph breaks")
    p.add_argument("--peer", action=yes_no, default=True, help="diffusers' network in turn with ours")
    p.add_argument("--rounds", type=COUNT, default=2, help="processes of each side")
    p.add_argument("--repeats", type=COUNT, default=3, help="timed steps of a process")
    p.add_argument("--budget", type=POSITIVE, default=30.0, help="seconds of a step on a CPU, about")
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on GPU, fp32 on CPU")
    p.add_argument("--threads", type=COUNT, default=torch.get_num_threads(), help="CPU threads")
    p.add_argument("--out", default="results", help="folder of bench_*.json")
    p.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)  # of a process that measures
    p.add_argument("--answer", help=argparse.SUPPRESS)                          # its file
    p.set_defaults(seed=0)
    args, own = p.parse_args(argv), base_row(p.parse_args(argv).base).sample
    args.clip = args.frames or own["frames"], args.height or own["height"], args.width or own["width"]
    return args


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
            parts = {name.replace("to_qkv", f"to_{c}"): rows for c, rows in zip("qkv", value.chunk(3))}
        for part, rows in parts.items():
            state[part].copy_(rows.view(state[part].shape))
    return net


def network(row):
    return NETWORKS[type(row.net)](row.net)


def draw(batch, *size, device="cpu"):
    return randn((batch, *size), [generator("bench", i) for i in range(batch)], device)


def inputs(args, row, device):
    """(x, t, text), conditions of a base's network; the numbers are those of the CPU on every
    device."""
    cfg, b, (c, f, h, w) = row.net, args.batch, latent_shape(args.base, *args.clip)
    d = getattr(cfg, "text_dim", 0) or cfg.context_dim
    length = row.text.length if isinstance(row.text, T5Config) else 77 if row.text else 10
    call, cond = (draw(b, c, f, h, w), torch.full((b,), 500), draw(b, length, d)), {}
    if isinstance(cfg, STDiT3Config):
        sizes = zip(("height", "width", "fps"), (*args.clip[1:], 24))
        cond = {k: torch.full((b,), float(v)) for k, v in sizes}
    elif isinstance(cfg, UNetConfig):
        cond |= {"image": draw(b, 1, d), "first_frame": draw(b, c, h, w)} if cfg.image_to_video else {}
        cond |= {"fps": torch.full((b,), row.sample["fps"])} if row.sample["fps"] else {}
        cond |= {"motion_text": call[2]} if cfg.motion_blocks else {}
    else:
        cond |= {"first_frame": draw(b, c, 1, h, w)} if row.first_frame else {}
        cond |= {"tracks": draw(b, c, f, h, w), "first_track": draw(b, c, 1, h, w)} if row.tracks else {}
    return [v.to(device) for v in call], {k: v.to(device) for k, v in cond.items()}


def peer_of(row):
    """Name of diffusers' class of the same network, or None."""
    if isinstance(row.net, CogVideoXConfig):
        plain = not row.tracks and "rope" in row.net.positions
        return "CogVideoXTransformer3DModel" if plain else None
    i2v = UNetConfig(image_to_video=True, concat_dim=4, use_fps_condition=True)
    return {UNetConfig(): "UNet3DConditionModel", i2v: "I2VGenXLUNet"}.get(row.net)


def peer_network(args, row, env):
    """diffusers' network with our weights -> it, and a function to be called as ours is."""
    import diffusers
    cfg, kind = row.net, getattr(diffusers, peer_of(row))
    with torch.device("meta"):
        like = network(row)
    if isinstance(cfg, CogVideoXConfig):
        (f, h, w), (_, frames, rows, columns) = cfg.size, latent_shape(args.base, *args.clip)
        peer = built(lambda: kind(
            in_channels=cfg.in_channels, out_channels=cfg.out_channels, num_layers=cfg.num_layers,
            num_attention_heads=cfg.heads, attention_head_dim=cfg.head_dim, time_embed_dim=cfg.time_dim,
            text_embed_dim=cfg.text_dim, max_text_seq_length=cfg.text_length, sample_frames=4 * f - 3,
            sample_height=h, sample_width=w, use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=cfg.positions == "rope+learned"), env, str, like)
        angles = rope_positions(frames, rows // 2, columns // 2, h // 2, w // 2, cfg.head_dim)
        rope = [y.repeat_interleave(2, dim=1).to(env.device) for y in angles]  # one a number

        def call(x, t, text, first_frame=None):
            if first_frame is not None:
                x = torch.cat([x, F.pad(first_frame, (0, 0, 0, 0, 0, frames - 1))], dim=1)
            return peer(x.transpose(1, 2), text, t, image_rotary_emb=rope).sample.transpose(1, 2)
        return peer, call
    peer = built(lambda: kind(attention_head_dim=cfg.head_dim), env, unet_diffusers_name, like)
    if not cfg.image_to_video:
        return peer, lambda x, t, text: peer(x, t, text).sample
    peer.conv_in.weight.data[:, 4:8] *= 2  # ours adds the image's channels twice, as the original does

    def call(x, t, text, image, first_frame, fps):
        planes = [torch.full_like(first_frame, k / (x.shape[2] - 1)) for k in range(1, x.shape[2])]
        return peer(x, t, fps, torch.stack([first_frame, *planes], dim=2), image[:, 0], text).sample
    return peer, call


# ---- sizes, FLOPs, seconds, memory

def work(args, row):
    """(FLOPs, bytes of fp32 weights) of one call of our network, without running it."""
    with torch.device("meta"):
        net = network(row)
    call, cond = inputs(args, row, "meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*call, **cond)
    return counter.get_total_flops(), 4 * sum(p.numel() for p in net.parameters())


def fitted(args, row, env):
    """Cut args.clip, and a transformer's blocks, to what the CPU can do. -> the base's row so
    cut."""
    depth = {CogVideoXConfig: "num_layers", STDiT3Config: "depth"}.get(type(row.net))
    layers = args.layers or (getattr(row.net, depth) if depth else 1)

    def cut(n):
        blocks = {"tracking_blocks": min(n, row.net.tracking_blocks)} if row.tracks else {}
        return replace(row, net=replace(row.net, **{depth: n}, **blocks)) if depth else row
    latent_shape(args.base, *args.clip)  # a size that the base does not take is refused here
    calls = {"forward": 1, "train": 3}.get(args.question, 2 * args.sample_steps)
    given = args.frames or args.height or args.width
    cuts = env.device.type == "cpu" and not args.side and args.question not in ("decode", "tracks")
    while cuts:
        flops, weights = work(args, cut(layers))
        weights *= 2 if args.question == "train" else 1  # and their gradients
        heavy = weights > memory("MemAvailable", "/proc/meminfo") / 2
        less = None if given else smaller(args.base, args.clip)
        if not heavy and calls * flops < args.budget * rate(env):
            break
        if layers > 1 and not args.layers and (heavy or not less):
            layers //= 2
        elif less:
            args.clip = less
        else:
            break  # there is nothing smaller
    args.layers = layers if depth else None
    return cut(layers)


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
    """Peak FLOP/s: of PEAK for half precision, else of a large matmul; on a CPU per second of its
    time, which other jobs do not change."""
    known = [v for k, v in PEAK.items() if k in device_name(env.device) and env.dtype != torch.float32]
    n = 8192 if env.device.type == "cuda" else 1024
    a = torch.randn(n, n, device=env.device, dtype=env.dtype)
    clock = int(env.device.type == "cpu")
    return known[0] if known else 2 * n ** 3 / min(timed(lambda: a @ a, env)[clock] for _ in range(5))


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
    return 1024 * int(Path(file).read_text().split(f"{field}:")[1].split()[0])


def restart_peak(env):
    """Peak memory counts from now on. -> bytes in use."""
    if env.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what comes
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


# ---- the questions: each (args, row, env) -> what to time, the network, its FLOPs in units of one call

def denoiser(args, row, env):
    if args.side == "peer":
        return peer_network(args, row, env)
    net = built(lambda: network(row), env)
    for block in net.blocks() if args.compile else ():
        block.compile(fullgraph=True)
    return net, net


def forward(args, row, env):
    net, call = denoiser(args, row, env)
    given, cond = inputs(args, row, env.device)

    def step():
        with torch.no_grad(), env.autocast():
            return call(*given, **cond)
    return step, net, 1


def lora(net, row):
    names = "qkv q_linear kv_linear" if isinstance(row.net, STDiT3Config) else "to_q to_k to_v"
    add_lora(net, 16, 16.0, names.split())


def train(args, row, env):
    net, call = denoiser(args, row, env)
    if args.trained == "lora":
        lora(net, row)
    part = {"all": ("",), "lora": (".lora_",), "branch": TRACK_BRANCH}[args.trained]
    for key, p in net.named_parameters():
        if any(word in key for word in part):
            p.data = p.data.float()  # trained weights are fp32, as in every method
            p.requires_grad_(True)
    if args.side == "peer" and args.grad_ckpt and net._supports_gradient_checkpointing:  # some of them do not
        net.enable_gradient_checkpointing()
    net.grad_ckpt = args.grad_ckpt
    trained = [p for p in net.parameters() if p.requires_grad]
    if not trained:
        raise UserError(f"--trained {args.trained}: {args.base} has none")
    opt = torch.optim.AdamW(trained, 1e-6)
    given, cond = inputs(args, row, env.device)
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
    return step, net, 3 if args.trained == "all" else 2  # frozen weights need no gradient of their own


def loaded(args, row, env):
    """A base with random weights whose texts are encoded, and its network's conditions."""
    net, vae = denoiser(args, row, env)[0], built(lambda: AUTOENCODERS[type(row.vae)](row.vae), env)
    if row.text and isinstance(row.net, CogVideoXConfig):
        vae.tiles = Tiles()
    schedule = None if row.schedule is None else make_schedule(**row.schedule)
    base = Base(args.base, row, net, vae, None, schedule, lambda texts: torch.ones(len(texts), 300))
    args.frames, args.height, args.width = args.clip
    fill(args, args.base)
    (_, _, text), cond = inputs(args, row, env.device)
    for prompt in ("a" + args.suffix, args.negative):
        base.encoded |= {(prompt, motion): text[0] for motion in (False, True)}
    return base, {k: v for k, v in cond.items() if k not in ("fps", "height", "width", "motion_text")}


def sample(args, row, env):
    base, cond = loaded(args, row, env)

    def step():
        with torch.no_grad():
            generate(base, env, ["a"] * args.batch, range(args.batch), args, args.batch, cond=cond)
    return step, base.net, args.sample_steps * (2 if args.cfg != 1 and args.sampler != "lcm" else 1)


def vader(args, row, env):
    base, cond = loaded(args, row, env)
    lora(base.net, row)
    base.net.grad_ckpt = True
    tower = CLIPConfig() if row.text else BASES["tiny-i2v"].image  # HPS's network
    reward = built(lambda: OpenCLIPVision(tower), env)

    def step():
        x_T, noise = inputs(args, row, env.device)[0][0], [generator(i) for i in range(args.batch)]
        with env.autocast():
            x_0 = rollout(base.net, base, ["a"] * args.batch, x_T, args, noise, cond, {}, grad_last=1)
            frame = decode(base, x_0, args.frames, chosen=[0])[:, :, 0]
            frame = F.interpolate(frame, size=(tower.image_size,) * 2, mode="bilinear", antialias=True)
            reward(frame).float().mean().backward()
    return step, base.net, 2 * (args.sample_steps + 1)  # both branches of guidance; the last step backward


def decoding(args, row, env):
    base, _ = loaded(args, row, env)
    latents = inputs(args, row, env.device)[0][0]

    def step():
        with torch.no_grad(), env.autocast():
            decode(base, latents, args.frames)
    return step, base.vae, 0


def tracks(args, row, env):
    (f, h, w), start = args.clip, grid_points(*args.clip[1:])
    start = np.concatenate([start, np.ones((len(start), 1))], axis=1)
    path = [start + np.array([2 * k, k, 0.01 * k]) for k in range(f)]

    def step():
        draw_tracks(path, grid_colours(start, (h, w)), (h, w), half=(4, 4))
    return step, None, 0


QUESTIONS = {"forward": forward, "train": train, "vader": vader, "sample": sample, "decode": decoding,
             "tracks": tracks}


def measure(args, row, env):
    """What a process of one side does -> a dict for the first, with the result to compare."""
    step, net, calls = QUESTIONS[args.question](args, row, env)
    before = restart_peak(env)
    result = step()
    if args.question == "train":  # gradients are there while activations are, as when micro-steps add up
        step(add=True)
    top = peak_memory(env.device) * 1e9 if env.device.type == "cuda" else memory("VmHWM")
    grads = sum(p.grad.nbytes for p in net.parameters() if p.grad is not None) if net else 0
    times = [timed(step, env) for _ in range(args.repeats)]
    seconds, cpu = zip(*times)
    found = dict(seconds=seconds, cpu=cpu, peak=top, over=top - before - grads, result=result, calls=calls)
    torch.save(found, args.answer)


def main(argv=None):
    args = get_args(argv)
    torch.set_num_threads(args.threads)
    env = setup(args)
    row = fitted(args, base_row(args.base), env)
    if args.side:
        return measure(args, row, env)
    sides, asked = ["ours"], list(argv or sys.argv[1:])
    comparable = args.question in ("forward", "train") and args.trained == "all" and peer_of(row)
    if args.peer and comparable and find_spec("diffusers"):
        sides += ["peer"]
    size = [f"--{k}={v}" for k, v in zip(("frames", "height", "width"), args.clip)]
    size += [f"--layers={args.layers}"] if args.layers else []
    runs = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for side in sides * args.rounds:
            file = Path(folder, side)
            words = [sys.executable, __file__, *asked, *size, "--side", side, "--answer", str(file)]
            if subprocess.run(words).returncode:
                raise UserError(f"bench.py {args.question}: the process of {side} ended with an error")
            runs[side].append(torch.load(file, weights_only=True))
    flops, best = work(args, row)[0] * runs["ours"][0]["calls"], rate(env)
    what = "{} x {}x{}".format(*args.clip) + (f", {args.layers} blocks" if args.layers else "")
    rows, table = {}, []
    for side in sides:
        seconds, cpu = ([t for run in runs[side] for t in run[k]] for k in ("seconds", "cpu"))
        r = dict(seconds=statistics.median(seconds), least=min(seconds), most=max(seconds),
                 cpu=statistics.median(cpu))
        r |= {k: min(run[k] for run in runs[side]) / 1e9 for k in ("peak", "over")}
        rows[side] = r | {"utilisation": flops / best / r["cpu" if env.device.type == "cpu" else "seconds"]}
        who = "ours" if side == "ours" else f"diffusers' {peer_of(row)}"
        table.append(
            f"| {args.question} | {args.base}, {what} | {who} | {r['seconds']:.3g} s ({r['least']:.3g} to "
            f"{r['most']:.3g}) | {r['cpu']:.3g} s | {r['peak']:.2f} GB | {r['over']:.2f} GB | "
            f"{100 * rows[side]['utilisation']:.0f} % |")
    about = dict(command=" ".join(["python bench.py", *asked]), versions=versions(),
                 device=device_name(env.device), cores=os.cpu_count(), dtype=str(env.dtype), peak_flops=best)
    if len(sides) == 2:
        ours, theirs = (runs[side][0]["result"].float() for side in sides)
        about["difference"] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        about["ratio"] = {k: rows["ours"][k] / rows["peer"][k] for k in ("seconds", "least", "cpu", "over")}
    print("| question | base | who | seconds | CPU seconds | peak | over | utilisation |", *table, sep="\n")
    print(json.dumps(about, indent=1))
    name = "_".join(["bench", args.question, args.base, "x".join(map(str, args.clip))])
    text = json.dumps(dict(table=table, **about, rows=rows, clip=args.clip, layers=args.layers), indent=1)
    write_atomic(Path(args.out, f"{name}.json"), lambda path: path.write_text(text + "\n"))


if __name__ == "__main__":
    run_command(main)
