"""Train a text-to-video base by plain denoising: from scratch, full fine-tuning or LoRA.

As VGen trains ModelScopeT2V (arXiv 2308.06571):

    L = E_{x0, text, eps, t} || net(x_t, t, text) - target ||^2,      x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps
    (Ho et al., arXiv 2006.11239, eq. 14; target: the base's, eps or v = sqrt(ab) eps - sqrt(1 - ab) x0)

What it does beside: caption dropout (for guidance), steps on single images among the videos (they keep the
spatial layers sharp), offset noise, a moving average of the weights, latents encoded once and kept.

    python t2v.py --base tiny --scratch --out out/tiny      # made assets/tiny.safetensors; minutes in README
    python t2v.py --base tiny --steps 50                    # fine-tune the tiny base a little
    python t2v.py --base modelscope --weights W --data clips.csv --rank 16 --lr 1e-4            # LoRA, 1 GPU
    torchrun --nproc_per_node=4 t2v.py --base modelscope --weights W --data clips.csv --rank 0 --parallel fsdp
    python t2v.py ... --resume                              # goes on bit for bit
    python sample.py --ckpt out/t2v --prompt "..."

Memory at real sizes: not measured yet (no GPU at hand); full fine-tuning of ModelScope keeps 4 fp32 copies
of 1.41 G parameters (weights, gradients, two moments: 22.6 GB) plus the activations of one recomputed block.

Differences from the original code
 - Images and videos mix by --image-share on any number of GPUs; VGen mixes by rank, so one GPU trains on
   images alone.
 - Data order is shuffled; each clip has exactly the frames asked for (VGen's loader is off by one and fills
   with grey).
 - Dropped captions become --negative ("" by default; VGen: its negative prompt). No gradient scale: AdamW
   cancels it.
 - The moving average is one file, not one shard a GPU.
"""
import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from bases import fill, load_base
from common import (
    FiniteGuard, Log, UserError, agree_to_stop, apply_defaults, catch_signals, check_out, clip_gradients,
    draw_curve, generator, load_state, lr_at, memory_advice, save_checkpoint, seed_of, setup, trained)
from data import TinyWorld, VideoDataset, batch_indices, contact_sheet, read_prompts
from diffusion import diffusion_loss, offset_noise
from models import add_lora, parallelize, sync_gradients
from sample import frame_rate, generate

TINY = dict(
    steps=2000, batch=16, lr=1.5e-3, lr_schedule="cosine", warmup=50, betas=(0.9, 0.99), wd=0.01, ema=0.995,
    rank=0, image_share=0.0, offset_noise=0.0, cache_latents=True, workers=0, preview_every=500,
    grad_ckpt=False, log_every=50)
PREVIEWS = [
    "a red circle moving left on a gray background", "a blue square moving up on a black background",
    "a yellow triangle growing on a brown background", "a white circle standing still on a black background"]


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    yes_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--base", default="modelscope", help="base network (python bases.py lists them)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--scratch", action="store_true", help="start from random weights (needs --rank 0)")
    p.add_argument("--out", default="out/t2v", help="run folder")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    # data
    p.add_argument("--data", help="clips and captions: folder, csv, jsonl or VGen list (tiny: procedural)")
    p.add_argument("--frames", type=int, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=int, help="pixels (default: the base's)")
    p.add_argument("--width", type=int, help="pixels (default: the base's)")
    p.add_argument("--fps", type=int, help="frame rate as a condition, for bases that take one")
    p.add_argument("--read-fps", type=float, help="frame rate at which clips are read (default: every frame)")
    p.add_argument("--image-share", type=float, default=0.125, help="share of steps on single frames")
    p.add_argument("--cache-latents", action=yes_no, default=False, help="encode once, keep in memory")
    p.add_argument("--negative", help="text of dropped captions and of the unconditional branch")
    p.add_argument("--drop-text", type=float, default=0.1, help="share of captions dropped")
    # optimisation
    p.add_argument("--steps", type=int, default=10000, help="optimizer steps")
    p.add_argument("--batch", type=int, default=1, help="clips a process and micro-step")
    p.add_argument("--accum", type=int, default=1, help="micro-steps a step")
    p.add_argument("--lr", type=float, default=3e-5, help="learning rate")
    p.add_argument("--wd", type=float, default=0.0, help="weight decay")
    p.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999), help="AdamW betas")
    p.add_argument("--lr-schedule", choices=("constant", "cosine", "cosine-restarts"), default="constant")
    p.add_argument("--warmup", type=int, default=10, help="steps of linear warm-up")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=float, default=0.0, help="decay of the weights' moving average; 0: off")
    p.add_argument("--rank", type=int, default=16, help="LoRA rank; 0 trains all weights")
    p.add_argument("--alpha", type=float, default=16.0, help="LoRA branches are scaled by alpha / rank")
    p.add_argument("--lora-targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="layers")
    p.add_argument("--offset-noise", type=float, default=0.1, help="noise shared by a frame (VGen: 0.1)")
    # machine
    p.add_argument("--workers", type=int, default=2, help="processes that read clips")
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on GPU, fp32 on CPU")
    p.add_argument("--grad-ckpt", action=yes_no, default=True, help="recompute blocks backward: less memory")
    p.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="full copies, or shards")
    # run
    p.add_argument("--seed", type=int, default=0, help="seed")
    p.add_argument("--prompts", help="file of preview prompts (default: the first clip's caption)")
    p.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    p.add_argument("--keep", type=int, default=1, help="checkpoints kept")
    p.add_argument("--preview-every", type=int, default=500, help="steps between previews; 0: none")
    p.add_argument("--log-every", type=int, default=1, help="steps between log lines on the screen")
    p.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    p.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    args = apply_defaults(p, argv, {"tiny": TINY})
    if args.scratch and args.rank:
        raise UserError("--scratch: LoRA on random weights cannot learn; add --rank 0")
    if args.base != "tiny" and not args.data:
        raise UserError("--data: give a folder, csv, jsonl or list of clips with captions")
    return args


# ---- the method

def t2v_loss(net, schedule, x0, text, g, offset=0.0, **cond):
    """The denoising loss at random steps, (b,). x0 (b,c,f,h,w) latents, text (b,n,d), g: CPU generator.

    cond: other conditions of the network, such as fps (b,).
    """
    t = torch.randint(len(schedule.alpha_bar), (len(x0),), generator=g).to(x0.device)
    noise = torch.randn(x0.shape, generator=g)
    # the mean brightness is noised too (VGen: noise_strength)
    noise = offset_noise(noise, torch.randn(*x0.shape[:3], 1, 1, generator=g), offset).to(x0.device)
    return diffusion_loss(lambda x, t: net(x, t, text, **cond), schedule, x0, noise, t)


def main(argv=None):
    args = get_args(argv)
    settings = fill(args, args.base, method="t2v")
    size = args.frames, args.height, args.width
    if args.data:
        data = VideoDataset(args.data, *size, args.read_fps, args.seed)
    else:
        data = TinyWorld(4096, args.frames, args.seed)
    state = check_out(args, "t2v")
    env = setup(args)
    dtype = env.dtype if args.rank else torch.float32  # trained weights are kept in fp32
    base = load_base(args.base, args.weights, env.device, dtype, scratch=args.scratch)

    # ---- what is trained: LoRA branches, or the network; from scratch the tiny text encoder as well
    if args.rank:
        add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    else:
        base.net.requires_grad_(True)
        base.text_encoder.requires_grad_(args.scratch and args.base == "tiny")
    base.vae.to(env.dtype)
    base.net.grad_ckpt = args.grad_ckpt
    base.net.train()
    parts = {"": base.net, "text_encoder.": base.text_encoder}
    net = parallelize(base.net, args.parallel, env.device)
    if any(p.requires_grad for p in base.text_encoder.parameters()):
        base.text_encoder = parallelize(base.text_encoder, "ddp", env.device)
    params = trained(parts)
    opt = torch.optim.AdamW(params.values(), args.lr, args.betas, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    ema = {k: p.detach().clone() for k, p in params.items()} if args.ema else None
    start = load_state(state, params, opt, ema, scaler) if state else 0
    meta = dict(
        method="t2v", base=args.base, rank=args.rank, alpha=args.alpha, lora_targets=args.lora_targets,
        sample=settings)
    batches = load_batches(args, env, data, base.vae, start)
    log = Log(args, env, {"net": base.net, "text encoder": base.text_encoder, "vae": base.vae}, start)
    guard = FiniteGuard()
    catch_signals(env)

    for step in range(start, args.steps):
        torch.manual_seed(seed_of(args.seed, env.rank, step, "dropout"))
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args)
        total = 0.0
        for micro in range(args.accum):
            g = generator(args.seed, step, micro * env.world + env.rank)
            x0, captions = next(batches)(g)
            # drawn from the step alone: all processes train on images, or all on videos
            if torch.rand((), generator=generator(args.seed, step, "image")).item() < args.image_share:
                frame = int(torch.randint(args.frames, (), generator=g))
                x0 = x0[:, :, frame:frame + 1]
            dropped = torch.rand(len(captions), generator=g) < args.drop_text
            captions = [args.negative if d else c for c, d in zip(captions, dropped)]
            advice = memory_advice("--grad-ckpt", "--batch 1", "--parallel fsdp")
            with sync_gradients(net, micro == args.accum - 1), env.autocast(), advice:
                text = base.encode_text(captions)
                cond = frame_rate(args, len(x0), env.device)
                loss = t2v_loss(net, base.schedule, x0, text, g, args.offset_noise, **cond).mean()
                scaler.scale(loss / args.accum).backward()
            total += loss.detach() / args.accum
        scaler.unscale_(opt)
        norm = clip_gradients(params.values(), args.clip)
        if guard.ok(env, loss=total, gradient=norm):
            scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if ema:  # warmed up, so that the random start is forgotten
            decay = min(args.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()], 1 - decay)
        log.step(step, loss=total, grad=norm, lr=opt.param_groups[0]["lr"])

        done, stop = step + 1, agree_to_stop(env)
        if stop or done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, env, done, params, meta, opt, ema, scaler)
        if args.preview_every and (done % args.preview_every == 0 or done == args.steps):
            preview(args, env, base, params, ema, done, data)
        if stop:
            break
    if env.main:
        draw_curve(log.path, Path(args.out, "curve.png"), ["loss", "grad"], f"t2v on {args.base}")
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- batches of latents, previews

def load_batches(args, env, data, vae, start):
    """For each micro-step from step `start` on: a function(generator) -> latents (b,c,f,h,w), captions.

    Latents are samples of the encoder's Gaussian (as VGen trains), drawn by that generator.
    """
    order = [batch_indices(len(data), i, args.batch, env.rank, env.world, args.seed)
             for i in range(start * args.accum, args.steps * args.accum)]

    def sampled(mean, std, captions):
        def draw(g):
            z = mean.float() + std.float() * torch.randn(mean.shape, generator=g)
            return z.to(env.device) * vae.cfg.scale, captions
        return draw

    @torch.no_grad()
    def moments(video):  # (b,3,f,h,w) -> mean, std (b,c,f,h,w) on the CPU
        # each clip as (f,3,h,w): its frames are the batch
        parts = [vae.moments(clip.transpose(0, 1).to(env.device, env.dtype)) for clip in video]
        return (torch.stack([x.transpose(0, 1).cpu() for x in column]) for column in
                zip(*((mean, (0.5 * logvar).exp()) for mean, logvar in parts)))

    def read(sampler):
        workers = dict(num_workers=args.workers, prefetch_factor=2 if args.workers else None)
        loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, **workers)
        return ((torch.as_tensor(x["video"]), x["text"]) for x in loader)

    if not args.cache_latents:
        return (sampled(*moments(video), captions) for video, captions in read(order))
    means, stds, texts = [], [], []
    chunks = [list(range(i, min(i + 8, len(data)))) for i in range(0, len(data), 8)]
    for video, captions in tqdm(read(chunks), "latents", len(chunks), disable=not env.main, mininterval=5):
        mean, std = moments(video)
        means.append(mean.half())
        stds.append(std.half())
        texts += captions
    means, stds = torch.cat(means), torch.cat(stds)
    return (sampled(means[i], stds[i], [texts[k] for k in i]) for i in order)


def preview(args, env, base, params, ema, done, data):
    """Sample the preview prompts (averaged weights, always the same noise) -> out/preview-<step>.png."""
    if args.prompts:
        prompts = read_prompts(args.prompts)
    else:
        prompts = PREVIEWS if args.base == "tiny" else [data[0]["text"]]
    base.net.eval()
    kept = {k: p.detach().clone() for k, p in params.items()} if ema else {}
    for k in kept:
        params[k].data.copy_(ema[k])
    videos = generate(base, env, prompts, [f"preview-{i}" for i in range(len(prompts))], args)
    for k, weights in kept.items():
        params[k].data.copy_(weights)
    base.net.train()
    if env.main:
        contact_sheet(list(videos), Path(args.out, f"preview-{done}.png"), prompts)


if __name__ == "__main__":
    main()
