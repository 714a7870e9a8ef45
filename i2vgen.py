"""Train image to video by denoising: I2VGen-XL (arXiv 2311.04145), whose trainer was never released, and
CogVideoX-I2V (arXiv 2408.06072); LoRA, full fine-tuning, or from scratch.

    L = E_{x0, eps, t} || net(x_t, t, text, image) - v ||^2,      v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0
    (arXiv 2202.00512; x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps; the image is the clip's own first frame)

I2VGen-XL sees the image as a latent beside the noise, 64 tokens of it and 4 of its CLIP embedding; CogVideoX
as a latent of slightly noised pixels (log sigma ~ N(-3, 0.5)); |x0_pred - x0|^2 / (1 - ab_t), its loss, is L.

    python i2vgen.py --base tiny-i2v                                          # learns to zigzag
    python i2vgen.py --base tiny-i2v --scratch --out out/tiny-i2v             # made the tiny base (README)
    python i2vgen.py --base i2vgen-xl --weights W --data clips.csv --lr 1e-4  # LoRA, 1 GPU
    torchrun --nproc_per_node=4 i2vgen.py --weights W --data clips.csv --rank 0 --parallel fsdp
    python i2vgen.py --base cogvideox-5b-i2v --weights W --data clips.csv     # LoRA as published
    python i2vgen.py ... --resume                                             # goes on bit for bit
    python sample.py --ckpt out/i2vgen --image first.png --prompt "a red circle zigzagging" --continue 2

With ModelScope's files as --weights and --rank 0, I2VGen-XL starts from them: what reads the image is new.

Differences from the original code
 - I2VGen-XL's configuration names a trainer that is not in the code; lr, schedule, offset noise and moving
   average are the configuration's. It drops nothing, but its sampler's second branch (negative prompt, image
   embedding of zeros) must have been taught: 0.1 each. Clips are read at --fps, which the network is told.
 - CogVideoX: sigma and the image's dropout are drawn for each clip, not for each batch.
"""
import argparse
from pathlib import Path

import torch
import torch.distributed as dist

from bases import BASES, base_row, fill, load_base
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
from data import (
    VideoDataset,
    center_crop_wide,
    contact_sheet,
    encode_once,
    image_tensor,
    open_image,
    read_batches,
    read_image_prompts,
    write_video,
)
from diffusion import diffusion_loss, offset_noise, randn
from dit import CogVideoXConfig
from models import add_lora, parallelize, sync_gradients
from pipeline import (
    first_frame_kept,
    frame_picture,
    frame_rate,
    generate_split,
    noised_first_frame,
    tower_image,
)
from tinyworld import MOTIONS, NEW_MOTIONS, TinyWorld, judge_captions, tiny_pairs

# CogVideo's finetune/; its SAT: --rank 0 --lr 1e-5 --betas 0.9 0.95 --wd 1e-4 --clip 0.1 --drop-text 0.1
COGVIDEOX = dict(rank=128, alpha=64.0, lr=2e-5, warmup=100, ema=0.0, drop_text=0.0, drop_image=0.05,
                 image_share=0.0, offset_noise=0.0, read_fps=8.0)
TINY = dict(
    steps=200, batch=16, lr=5e-4, lr_schedule="cosine", warmup=20, betas=(0.9, 0.99), wd=0.01, ema=0.99,
    rank=0, motion="zigzagging", image_share=0.0, offset_noise=0.0, drop_text=0.1, read_fps=None,
    cache_latents=True, workers=0, grad_ckpt=False, log_every=20, eval_n=64)
SCRATCH = TINY | dict(steps=1200, batch=64, lr=1.5e-3, warmup=50, ema=0.995, motion=None, preview_every=1000,
                      log_every=50)
TINY_CLIPS = {False: 2048, True: 8192}  # --scratch: what is encoded once


def get_args(argv=None):
    p = Parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--base", default="i2vgen-xl", help="base network (python bases.py lists them)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--scratch", action="store_true", help="start from random weights (needs --rank 0)")
    p.add_argument("--out", default="out/i2vgen", help="run folder")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    # data
    p.add_argument("--data", help="clips and captions: folder, csv, jsonl or VGen list (tiny: procedural)")
    p.add_argument("--motion", choices=MOTIONS + NEW_MOTIONS, help="tiny world: motion of all clips")
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--fps", type=COUNT, help="frame rate as a condition, for bases that take one")
    p.add_argument("--read-fps", type=POSITIVE, help="rate at which clips are read (default: --fps, or all)")
    p.add_argument("--image-share", type=SHARE, default=0.125, help="share of steps on single frames")
    p.add_argument("--cache-latents", action=yes_no, default=False, help="encode once, into --out")
    p.add_argument("--negative", help="text of dropped captions and of the unconditional branch")
    p.add_argument("--drop-text", type=SHARE, default=0.1, help="share of captions dropped")
    p.add_argument("--drop-image", type=SHARE, default=0.1, help="share of images dropped")
    # optimisation
    p.add_argument("--steps", type=COUNT, default=10000, help="optimizer steps")
    p.add_argument("--batch", type=COUNT, default=1, help="clips a process and micro-step")
    p.add_argument("--accum", type=COUNT, default=1, help="micro-steps a step")
    p.add_argument("--lr", type=POSITIVE, default=3e-5, help="learning rate")
    p.add_argument("--wd", type=UNSIGNED, default=0.0, help="weight decay")
    p.add_argument("--betas", type=DECAY, nargs=2, default=(0.9, 0.999), help="AdamW betas")
    p.add_argument("--lr-schedule", choices=("constant", "cosine", "cosine-restarts"), default="constant")
    p.add_argument("--warmup", type=NATURAL, default=10, help="steps of linear warm-up")
    p.add_argument("--clip", type=POSITIVE, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=DECAY, default=0.9999, help="decay of the weights' moving average; 0: off")
    p.add_argument("--rank", type=NATURAL, default=16, help="LoRA rank; 0 trains all weights")
    p.add_argument("--alpha", type=POSITIVE, default=16.0, help="LoRA branches are scaled by alpha / rank")
    p.add_argument("--lora-targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="layers")
    p.add_argument("--offset-noise", type=UNSIGNED, default=0.1, help="noise shared by a frame (VGen: 0.1)")
    # machine
    p.add_argument("--workers", type=NATURAL, default=2, help="processes that read clips")
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on GPU, fp32 on CPU")
    p.add_argument("--grad-ckpt", action=yes_no, default=True, help="recompute blocks backward: less memory")
    p.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="full copies, or shards")
    p.add_argument("--offload", action="store_true", help="activations (fsdp: weights too) wait on the CPU")
    # run
    p.add_argument("--seed", type=NATURAL, default=0, help="seed")
    p.add_argument("--prompts", help="image|||caption lines to evaluate on (default: a clip; tiny: held-out)")
    p.add_argument("--eval-n", type=COUNT, default=4, help="first frames and captions used for evaluation")
    p.add_argument("--save-every", type=COUNT, default=500, help="steps between checkpoints")
    p.add_argument("--keep", type=COUNT, default=1, help="checkpoints kept")
    p.add_argument("--preview-every", type=NATURAL, default=0, help="steps between evaluations; 0: two only")
    p.add_argument("--log-every", type=COUNT, default=1, help="steps between log lines on the screen")
    p.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    p.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    tiny = SCRATCH if p.parse_known_args(argv)[0].scratch else TINY
    args = apply_defaults(p, argv, {
        name: (COGVIDEOX if isinstance(row.net, CogVideoXConfig) else {}) | ({} if row.text else tiny)
        for name, row in BASES.items()})
    if args.scratch and args.rank:
        raise UserError("--scratch: LoRA on random weights cannot learn; add --rank 0")
    if base_row(args.base).text and not args.data:
        raise UserError("--data: give a folder, csv, jsonl or list of clips with captions")
    if base_row(args.base).text and args.motion:
        raise UserError(f"--motion {args.motion}: only the tiny world's own clips have motions by name")
    return args


# ---- the method

def image_condition(base, x0, picture, keep, generators):
    """What the network is told of the first frame, {name: tensor}; keep (b,): 1, or 0 where it is dropped."""
    if base.row.unet.image_to_video:  # dropped: the embedding alone, as in the second branch of guidance
        image = base.image_encoder(picture)[:, None].float() * keep.view(-1, 1, 1)
        return {"first_frame": x0[:, :, 0], "image": image}
    return {"first_frame": noised_first_frame(base, picture, keep, x0.shape, generators)}


def i2v_loss(net, base, x0, picture, captions, generators, args):
    """The denoising loss (b,). x0 (b,c,f,h,w) latents, picture: of encode(), generators: one a clip."""
    luck = torch.stack([torch.rand(3, generator=g) for g in generators])
    t = (luck[:, 0] * len(base.schedule.alpha_bar)).long().to(x0.device)
    shared = randn((*x0.shape[:3], 1, 1), generators)  # noise of the brightness (VGen: noise_strength)
    noise = offset_noise(randn(x0.shape, generators), shared, args.offset_noise).to(x0.device)
    dropped = luck[:, 1] < args.drop_text
    text = base.encode_text([args.negative if d else c for c, d in zip(captions, dropped)])
    keep = (luck[:, 2] >= args.drop_image).float().to(x0.device)
    cond = image_condition(base, x0, picture, keep, generators) | frame_rate(args, len(x0), x0.device)
    return diffusion_loss(lambda x, t: net(x, t, text, **cond), base.schedule, x0, noise, t)


@memory_advice("--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp", "smaller --height and --width")
def main(argv=None):
    args = get_args(argv)
    settings = fill(args, args.base, method="i2vgen")
    size = args.frames, args.height, args.width
    args.read_fps = args.read_fps or args.fps
    data = (VideoDataset(args.data, *size, args.read_fps, args.seed) if args.data else
            TinyWorld(TINY_CLIPS[args.scratch], args.frames, args.seed, args.motion))
    pairs = read_pairs(args, data)
    state = check_out(args, "i2vgen")
    env = setup(args)
    dtype = env.dtype if args.rank else torch.float32  # trained weights are kept in fp32
    base = load_base(args.base, args.weights, env.device, dtype, args.scratch, start=not args.rank)
    if base.row.text is None:  # a word that the tiny world does not know is refused now
        base.tokenize([row[-1] for row in (*pairs, *(data.rows if args.data else ()))] + [args.negative])

    # what is trained: LoRA branches, or the network; from scratch the tiny encoders as well
    encoders = {k: getattr(base, k) for k in ("text_encoder", "image_encoder") if getattr(base, k)}
    jointly = args.scratch and base.row.text is None
    if args.rank:
        add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    else:
        base.net.requires_grad_(True)
    base.freeze(env.dtype, but=["net", *(["text encoder", "image encoder"] if jointly else [])])
    base.net.grad_ckpt = args.grad_ckpt
    base.net.train()
    net = parallelize(base.net, args.parallel, env.device, args.offload)
    for k, module in encoders.items():
        module.requires_grad_(jointly)
        if jointly:
            setattr(base, k, parallelize(module, "ddp", env.device))
    params = trained({"": base.net} | {f"{k}.": module for k, module in encoders.items()})
    opt = torch.optim.AdamW(params.values(), args.lr, args.betas, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    ema = {k: p.detach().clone() for k, p in params.items()} if args.ema else None
    start, seen = load_state(args, env, state, params, opt, ema, scaler)
    meta = dict(
        method="i2vgen", base=args.base, rank=args.rank, alpha=args.alpha, lora_targets=args.lora_targets,
        sample=settings)
    log = Log(args, env, base.parts(), start)
    del encoders, module  # remember() lets the text tower go
    if args.cache_latents:
        about = dict(base=args.base, weights=args.weights, size=size, fps=args.read_fps, seed=args.seed,
                     rows=seed_of(data.rows if args.data else args.motion))
        data = encode_once(Path(args.out, "latents"), data, lambda batch: {
            k: v.half() for k, v in encode(base, batch["video"], env).items()}, about, env, args.workers)
        if not jointly:  # the text tower is done, too
            with torch.no_grad(), env.autocast():
                base.remember([*data.texts(), args.negative, *(caption for _, caption in pairs)])
    numbers = MySamples(args, env, start, seen)
    batches = read_batches(data, numbers, args.seed, args.workers)
    guard = FiniteGuard(env)
    catch_signals(env)
    if env.main:
        keep_lines(Path(args.out, "eval.jsonl"), min(start + 1, args.steps) if state else 0)
    if not state and not args.scratch:
        evaluate(args, env, base, pairs, params, ema, 0)

    for step in range(start, args.steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args)
        # drawn from the step alone: all clips of a step are videos, or all are images
        images = torch.rand((), generator=generator(args.seed, step, "image")).item() < args.image_share
        total = 0.0
        for micro in range(args.accum):
            batch, mine = next(batches), numbers[(step - start) * args.accum + micro]
            generators = [generator(args.seed, "sample", i) for i in mine]  # of all that is random
            torch.manual_seed(seed_of(args.seed, "dropout", mine[0]))
            x0, picture = draw_latents(base, batch, generators, env)
            x0 = x0[:, :, :1] if images else x0
            with sync_gradients(net, micro == args.accum - 1), env.autocast():
                loss = i2v_loss(net, base, x0, picture, batch["text"], generators, args).mean()
                scaler.scale(loss / args.accum).backward()
            total += loss.detach() / args.accum
        norm = guard.step(opt, scaler, params.values(), args.clip, loss=total)
        seen += args.batch * args.accum * env.world
        if ema:  # warmed up, so that the start is forgotten
            decay = min(args.ema, (step + 1) / (step + 10))
            move_average(ema, params, decay)
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
        draw_curve(log.path, Path(args.out, "curve.png"), ["loss", "grad"], f"i2vgen on {args.base}")
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- latents

@torch.no_grad()
def encode(base, video, env):
    """video (b,3,f,h,w) -> {"mean", "std"} (b,c,f',h',w') of its latents and "picture", on the CPU.

    picture: what else of the first frame is needed: the image tower's input (b,3,s,s), CogVideoX: its pixels.
    """
    row, x = base.row, video.to(env.device, env.dtype)
    if isinstance(row.net, CogVideoXConfig):
        mean, logvar = torch.cat([base.vae.moments(clip[None]) for clip in x]).chunk(2, dim=1)
        picture = video[:, :, 0]
    else:  # each clip as (f,3,h,w): its frames are the batch
        parts = [base.vae.moments(clip.transpose(0, 1)) for clip in x]
        mean, logvar = (torch.stack([m.transpose(0, 1) for m in column]) for column in zip(*parts))
        size, width = (row.image or row.text).image_size, video.shape[4]
        picture = torch.stack([tower_image(frame_picture(clip[:, 0]), width, size) for clip in video])
    std = (0.5 * logvar.clamp(-30, 20)).exp()
    return {"mean": mean.cpu(), "std": std.cpu(), "picture": picture}


def draw_latents(base, batch, generators, env):
    """A batch of clips, encoded already or not -> samples of the encoder's Gaussian, the pictures."""
    m = batch if "mean" in batch else encode(base, batch["video"], env)
    z = m["mean"].float() + m["std"].float() * randn(m["mean"].shape, generators)
    return z.to(env.device) * base.vae.cfg.scale, m["picture"].float().to(env.device)


# ---- evaluation

def read_pairs(args, data):
    """-> [(first frame, a Pillow image; its caption)] to evaluate on."""
    if args.prompts:
        rows = read_image_prompts(args.prompts)[:args.eval_n]
        return [(open_image(path), caption) for path, caption in rows]
    clips, captions = (([data[0, 0][k]] for k in ("video", "text")) if args.data else
                       tiny_pairs(args.seed, args.eval_n, args.frames, args.motion))
    return [(frame_picture(clip[:, 0]), caption) for clip, caption in zip(clips, captions)]


@torch.no_grad()
def evaluate(args, env, base, pairs, params, ema, step):
    """Clips of the averaged weights, always from the same noise -> eval.jsonl, NAME.png, NAME/*.mp4."""
    name = {0: "before", args.steps: "after"}.get(step, f"step-{step}")
    images, captions = zip(*pairs)
    base.net.eval()
    seeds = [f"eval-{i}" for i in range(len(pairs))]
    with using_average(params, ema):
        videos = generate_split(base, env, list(captions), seeds, args, images)
    base.net.train()
    if not env.main:
        return
    pictures = [image_tensor(center_crop_wide(image, (args.height, args.width))) for image in images]
    row = dict(step=step, **first_frame_kept(videos, pictures))
    if base.row.text is None and not args.data:
        row["judge"] = judge_captions(videos, captions)
    append_line(Path(args.out, "eval.jsonl"), row)
    words = " ".join(f"{k} {v:.3f}" for k, v in row.get("judge", {}).items())
    print(f"held-out, {name}: first frame {row['psnr']:.1f} dB {words}", flush=True)
    contact_sheet(list(videos[:16]), Path(args.out, f"{name}.png"), captions[:16])
    for i, video in enumerate(videos[:16]):
        write_video(Path(args.out, name, f"{i:04d}.mp4"), video, args.save_fps)


if __name__ == "__main__":
    run_command(main)
