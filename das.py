"""Diffusion as Shader: video that follows 3-D tracks (arXiv 2501.03847), trained on top of CogVideoX.

    L = E_{x0, eps, t} || net(x_t, t, text, image, tracks) - v ||^2,  v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0
    (x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps; |x0_pred - x0|^2 / (1 - ab_t), the code's loss, is the same)

A tracking video (tracks.py) says where each point of the first frame goes. Copies of the base's first blocks
read its latents and add their answers, through linear layers that start at zero, to the frozen base's tokens:
at step 0 the network is the base, exactly. Image and first tracking frame stand beside these latents.

    python das.py --base tiny-cogvideox                                      # learns to follow tracks
    python das.py --make-tracks clips.csv --out tracked                      # clips -> a data set with tracks
    python das.py --make-tracks first.png --depth d.npy --camera "rot y 20"  # a camera move for sample.py
    torchrun --nproc_per_node=8 das.py --base cogvideox-5b-i2v --weights W --data tracked --parallel fsdp
    python das.py --weights W --data tracked --resume                        # goes on bit for bit
    python sample.py --ckpt out/das --image first.png --tracks tracks.mp4 --prompt "a red circle"

--base das goes on from the public branch, or starts one if --weights holds CogVideoX-5B-I2V; cogvideox-2b and
-5b are the text-to-video variant (no image, no first tracking frame). Default: the published run, 8 GPUs.

Differences from the original code
 - the branch is copied from the base by its keys (there: unset memory with recent diffusers); what trains is
   kept in fp32 (there: bf16), and its weights never go through fp16;
 - epochs are shuffled, the clips of an update from one bucket (there: in fixed order); clips are cropped, not
   squeezed; no flips, which were drawn for each frame anew, and for its tracks once more;
 - image noise and dropout are drawn for each clip, not for each batch; tracks are in [-1,1] in sampling, too
   (its demo: [0,1]), with the mean of their latents (there: a sample from a generator that nobody seeds).
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import tinyworld
import tracks
from bases import BASES, base_row, fill, latent_shape, load_base
from common import (
    COUNT,
    DECAY,
    NATURAL,
    POSITIVE,
    SHARE,
    UNSIGNED,
    FiniteGuard,
    Log,
    MySamples,
    Parser,
    UserError,
    agree_to_stop,
    append_line,
    apply_defaults,
    catch_signals,
    check_out,
    draw_curve,
    generator,
    keep_lines,
    load_state,
    lr_at,
    memory_advice,
    move_average,
    run_command,
    save_checkpoint,
    seed_of,
    setup,
    trained,
    using_average,
)
from data import contact_sheet, encode_once, write_video
from diffusion import diffusion_loss, randn
from dit import TRACK_BRANCH
from models import parallelize, sync_gradients
from pipeline import encode_tracks, frame_picture, generate_split, noised_first_frame
from tinyworld import HELD_OUT, position_error

TINY = dict(
    steps=500, batch=16, accum=1, lr=1e-3, warmup=20, betas=(0.9, 0.99), wd=0.01, ema=0.99, tracking_blocks=6,
    cache_latents=True, workers=0, grad_ckpt=False, log_every=20, eval_n=48)
TINY_CLIPS = 2048


def get_args(argv=None):
    if "--make-tracks" in (sys.argv[1:] if argv is None else argv):
        return tracks.get_args(argv)
    p = Parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--base", default="das", help="base network (python bases.py lists them)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--tracking-blocks", type=COUNT, default=18, help="the first so many blocks get a copy")
    p.add_argument("--out", default="out/das", help="run folder")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    # data
    p.add_argument("--data", help="folder with prompt.txt, videos.txt, trackings.txt; csv, jsonl (tiny: own)")
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--buckets", type=tracks.bucket, nargs="+", default=[], metavar="FxHxW",
                   help="further sizes of clips, such as 25x480x720")
    p.add_argument("--cache-latents", action=yes_no, default=False, help="encode once, into --out")
    p.add_argument("--drop-image", type=SHARE, default=0.05, help="share of images dropped")
    # optimisation
    p.add_argument("--steps", type=COUNT, default=2000, help="optimizer steps")
    p.add_argument("--batch", type=COUNT, default=2, help="clips a process and micro-step")
    p.add_argument("--accum", type=COUNT, default=4, help="micro-steps a step")
    p.add_argument("--lr", type=POSITIVE, default=1e-4, help="learning rate")
    p.add_argument("--wd", type=UNSIGNED, default=1e-3, help="weight decay")
    p.add_argument("--betas", type=DECAY, nargs=2, default=(0.9, 0.95), help="AdamW betas")
    p.add_argument("--lr-schedule", choices=("constant", "cosine", "cosine-restarts"), default="cosine",
                   help="published: one cycle, which is cosine")
    p.add_argument("--warmup", type=NATURAL, default=100, help="steps of linear warm-up")
    p.add_argument("--clip", type=POSITIVE, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=DECAY, default=0.0, help="decay of the weights' moving average; 0: off")
    # machine
    p.add_argument("--workers", type=NATURAL, default=2, help="processes that read clips")
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on GPU, fp32 on CPU")
    p.add_argument("--grad-ckpt", action=yes_no, default=True, help="recompute blocks backward: less memory")
    p.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="full copies, or shards")
    p.add_argument("--offload", action="store_true", help="activations (fsdp: weights too) wait on the CPU")
    # run
    p.add_argument("--seed", type=NATURAL, default=0, help="seed")
    p.add_argument("--eval-n", type=COUNT, default=2, help="clips for evaluation (tiny: of each motion)")
    p.add_argument("--save-every", type=COUNT, default=500, help="steps between checkpoints")
    p.add_argument("--keep", type=COUNT, default=1, help="checkpoints kept")
    p.add_argument("--preview-every", type=NATURAL, default=0, help="steps between evaluations; 0: two only")
    p.add_argument("--log-every", type=COUNT, default=1, help="steps between log lines on the screen")
    p.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    p.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    args = apply_defaults(p, argv, {name: {} if row.text else TINY for name, row in BASES.items()})
    if base_row(args.base).text and not args.data:
        raise UserError("--data: give a folder with prompt.txt, videos.txt, trackings.txt, a csv or a jsonl")
    return args


# ---- the method

def train_branch(net, dtype):
    """Only the branch that reads the tracks trains, in fp32; the base is frozen, in `dtype`."""
    for name, part in net.named_children():
        branch = name in TRACK_BRANCH
        part.requires_grad_(branch).to(torch.float32 if branch else dtype)


def branch_loss(net, schedule, x0, noise, t, text, cond):
    """The denoising loss (b,); cond: latents first_frame, first_track (b,c,1,h,w), tracks (b,c,f,h,w)."""
    return diffusion_loss(lambda x, t: net(x, t, text, **cond), schedule, x0, noise, t)


def das_loss(net, base, latents, picture, captions, generators, args):
    """The loss of clips (b,). latents, picture: of draw_latents(); generators: one a clip."""
    x0 = latents["video"]
    luck = torch.stack([torch.rand(2, generator=g) for g in generators])
    t = (luck[:, 0] * len(base.schedule.alpha_bar)).long().to(x0.device)
    noise = randn(x0.shape, generators).to(x0.device)
    cond = {"tracks": latents["tracks"]}
    if base.row.first_frame:  # image and first tracking frame are dropped together, the tracks never
        keep = (luck[:, 1] >= args.drop_image).float().to(x0.device)
        cond["first_frame"] = noised_first_frame(base, picture, keep, x0.shape, generators)
        cond["first_track"] = latents["first_track"] * keep.view(-1, 1, 1, 1, 1)
    return branch_loss(net, base.schedule, x0, noise, t, base.encode_text(captions), cond)


@memory_advice("--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp", "fewer --frames")
def main(argv=None):
    args = get_args(argv)
    if "make_tracks" in args:
        return tracks.make(args)
    settings = fill(args, args.base, method="das")
    if base_row(args.base).tracks:  # its own branch
        args.tracking_blocks = base_row(args.base).net.tracking_blocks
    base_row(args.base, args.tracking_blocks)  # too many blocks are refused before anything is loaded
    for size in args.buckets:
        latent_shape(args.base, *size)
    buckets = dict.fromkeys([(args.frames, args.height, args.width), *args.buckets])
    parts = (tracks.in_buckets(args.data, buckets, args.seed) if args.data else
             [tinyworld.TinyTracks(TINY_CLIPS, args.frames, args.seed)])
    state = check_out(args, "das")
    env = setup(args)
    # as in the files: bf16 weights that train go to fp32 without a detour through fp16
    base = load_base(args.base, args.weights, env.device, None, tracks=args.tracking_blocks)
    base.freeze(env.dtype, but=["net"])
    train_branch(base.net, env.dtype)
    base.net.grad_ckpt = args.grad_ckpt
    base.net.train()
    pairs = held_out(args, parts)
    if base.row.text is None and args.data:  # a word that the tiny world does not know is refused now
        base.tokenize([row[-1] for part in parts for row in part.rows])
    net = parallelize(base.net, args.parallel, env.device, args.offload)
    params = trained({"": base.net})
    opt = torch.optim.AdamW(params.values(), args.lr, args.betas, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    ema = {k: p.detach().clone() for k, p in params.items()} if args.ema else None
    start, seen = load_state(args, env, state, params, opt, ema, scaler)
    meta = dict(method="das", base=args.base, rank=0, tracking_blocks=args.tracking_blocks, sample=settings)
    log = Log(args, env, base.parts(), start)
    if args.cache_latents:
        parts = cached(args, env, base, parts, pairs)
    numbers = MySamples(args, env, start, seen)
    together = args.batch * args.accum * env.world
    batches = tracks.read_buckets(parts, numbers, together, args.seed, args.workers)
    guard = FiniteGuard(env)
    catch_signals(env)
    if env.main:
        keep_lines(Path(args.out, "eval.jsonl"), min(start + 1, args.steps) if state else 0)
    if not state:
        evaluate(args, env, base, pairs, params, ema, 0)

    for step in range(start, args.steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args)
        total = 0.0
        for micro in range(args.accum):
            batch, mine = next(batches), numbers[(step - start) * args.accum + micro]
            generators = [generator(args.seed, "sample", i) for i in mine]  # of all that is random
            latents, picture = draw_latents(base, batch, generators, env)
            with sync_gradients(net, micro == args.accum - 1), env.autocast():
                loss = das_loss(net, base, latents, picture, batch["text"], generators, args).mean()
                scaler.scale(loss / args.accum).backward()
            total += loss.detach() / args.accum
        norm = guard.step(opt, scaler, params.values(), args.clip, loss=total)
        seen += together
        if ema:  # warmed up, so that the start is forgotten
            move_average(ema, params, min(args.ema, (step + 1) / (step + 10)))
        log.step(step, loss=total, grad=norm, lr=opt.param_groups[0]["lr"])

        done, stop = step + 1, agree_to_stop(env)
        if stop or done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, env, done, seen, params, meta, opt, ema, scaler)
        if stop:
            break
        if args.preview_every and done % args.preview_every == 0 and done < args.steps:
            evaluate(args, env, base, pairs, params, ema, done)
    else:  # not stopped
        evaluate(args, env, base, pairs, params, ema, args.steps)
    if env.main:
        draw_curve(log.path, Path(args.out, "curve.png"), ["loss", "grad"], f"das on {args.base}")
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- data and latents

@torch.no_grad()
def encode(base, batch, env):
    """Clips and tracking videos (b,3,f,h,w) -> {"PART.mean", "PART.std"} of their latents, on the CPU.

    And "picture" (b,3,h,w), the first frame: its noise is new each time.
    """
    parts = {"video": batch["video"], "tracks": batch["tracks"]}
    if base.row.first_frame:
        parts["first_track"] = batch["tracks"][:, :, :1]
    found = {"picture": batch["video"][:, :, 0]}
    for name, video in parts.items():
        x = video.to(env.device, env.dtype)  # clip by clip, but for tiny ones
        moments = [base.vae.moments(x)] if base.row.text is None else [base.vae.moments(v[None]) for v in x]
        mean, logvar = torch.cat(moments).chunk(2, dim=1)
        found[f"{name}.mean"] = mean.cpu()
        found[f"{name}.std"] = (0.5 * logvar.clamp(-30, 20)).exp().cpu()
    return found


def draw_latents(base, batch, generators, env):
    """A batch, encoded already or not -> {part: a sample of the encoder's Gaussian, scaled}, the pictures."""
    m = batch if "picture" in batch else encode(base, batch, env)
    latents = {}
    for name in (k.removesuffix(".mean") for k in m if k.endswith(".mean")):
        mean, std = m[f"{name}.mean"].float(), m[f"{name}.std"].float()
        latents[name] = (mean + std * randn(mean.shape, generators)).to(env.device) * base.vae.cfg.scale
    return latents, m["picture"].float().to(env.device)


def cached(args, env, base, parts, pairs):
    """Every clip encoded once, below --out; the text tower is done, too. -> the data sets of these files."""
    encoded = []
    for k, part in enumerate(parts):
        about = dict(base=args.base, weights=args.weights, seed=args.seed, size=getattr(part, "size", None),
                     frames=part.frames, rows=seed_of(getattr(part, "rows", part.__dict__)))
        encoded.append(encode_once(Path(args.out, "latents", str(k)), part, lambda batch: {
            k: v.half() for k, v in encode(base, batch, env).items()}, about, env, args.workers))
    with torch.no_grad(), env.autocast():
        texts = [text for part in encoded for text in part.texts()]
        base.remember([*texts, *(text for _, text, *_ in pairs), args.negative])
    return encoded


# ---- evaluation

def held_out(args, parts):
    """-> [(clip, caption, tracking video, motion, true x, true y)] to evaluate on; x, y: tiny's own."""
    if args.data:
        size = args.frames, args.height, args.width
        part = next((p for p in parts if (p.frames, *p.size) == size), None)
        if part is None:
            raise UserError(f"--data {args.data}: no clip has the {args.frames} frames to evaluate on; give "
                            "a smaller --frames")
        items = [part[i, i] for i in range(min(args.eval_n, len(part)))]
        return [(item["video"], item["text"], item["tracks"], "clips", None, None) for item in items]
    pairs = []
    for m, motion in enumerate(tinyworld.TINY_TRACKS):
        for i in range(args.eval_n):
            item, scene = tinyworld.tiny_track_clip((args.seed, HELD_OUT, m, i), motion, args.frames)
            pairs.append((item["video"], item["text"], item["tracks"], motion, scene.x, scene.y))
    return pairs


@torch.no_grad()
def evaluate(args, env, base, pairs, params, ema, step):
    """Clips that should follow their tracks, always from the same noise -> eval.jsonl, NAME.png, NAME/*.mp4.

    Tiny: "position" is the object's mean distance from where it should be, in frame widths, for each motion.
    """
    name = {0: "before", args.steps: "after"}.get(step, f"step-{step}")
    clips, captions, tracking, motions, xs, ys = zip(*pairs)
    base.net.eval()
    seeds = [f"eval-{i}" for i in range(len(pairs))]
    with using_average(params, ema):
        images = [frame_picture(clip[:, 0]) if base.row.first_frame else None for clip in clips]
        with env.autocast():
            latents = [encode_tracks(base, env, video) for video in tracking]
        maps = {k: torch.cat([x[k] for x in latents]) for k in latents[0]}
        videos = generate_split(base, env, list(captions), seeds, args, images, maps=maps)
    base.net.train()
    if not env.main:
        return
    row = dict(step=step, position={})
    for motion in dict.fromkeys(motions) if xs[0] is not None else ():
        errors = [position_error(v, x, y) for v, m, x, y in zip(videos, motions, xs, ys) if m == motion]
        row["position"][motion] = sum(errors) / len(errors)
    append_line(Path(args.out, "eval.jsonl"), row)
    words = " ".join(f"{k} {100 * v:.1f} %" for k, v in row["position"].items())
    print(f"held-out, {name}: off the track, in frame widths: {words or 'see the sheet'}", flush=True)
    shown = [i for m in dict.fromkeys(motions) for i in [k for k in range(len(pairs)) if motions[k] == m][:4]]
    contact_sheet([[clips[i], tracking[i], videos[i]] for i in shown], Path(args.out, f"{name}.png"),
                  [f"{captions[i]} ({motions[i]})" for i in shown], headers=["clip", "tracks", "result"])
    for i in shown:
        side = torch.cat([clips[i], tracking[i], videos[i]], dim=3)
        write_video(Path(args.out, name, f"{i:04d}.mp4"), side, args.save_fps)


if __name__ == "__main__":
    run_command(main)
