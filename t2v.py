"""Train a text-to-video base by plain denoising: from scratch, full fine-tuning or LoRA (VGen / ModelScopeT2V, arXiv 2308.06571).

    L = E_{x0, text, eps, t} || net(x_t, t, text) - target ||^2,   x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps
    (Ho et al., arXiv 2006.11239, eq. 14; target = eps, or v = sqrt(ab) eps - sqrt(1 - ab) x0, as the base predicts)

What it does beside: caption dropout (for guidance), batches of single images among the videos (their content is better captioned and
keeps the spatial layers sharp), offset noise, an exponential moving average of the weights, latents encoded once and kept.

    python t2v.py --base tiny --scratch --out out/tiny                    # how assets/tiny.safetensors was made: see README for minutes
    python t2v.py --base tiny --steps 50                                  # fine-tune the tiny base a little
    python t2v.py --base modelscope --weights W --data clips.csv --rank 16 --lr 1e-4                # LoRA on your clips, 1 GPU
    torchrun --nproc_per_node=4 t2v.py --base modelscope --weights W --data clips.csv --rank 0 --parallel fsdp   # all weights
    python t2v.py ... --resume                                            # goes on bit for bit
    python sample.py --ckpt out/t2v --prompt "..."

Differences from the original code
 - Images and videos mix by --image-share on any number of GPUs; VGen mixes them by rank, so one GPU trains on images alone.
 - Data order is shuffled, each clip has exactly the frames asked for (VGen's loader is off by one and fills with grey).
 - Dropped captions become --negative, as VGen has it (its negative prompt; "" by default). No hidden gradient scale: AdamW cancels it.
 - The moving average is one file, not one shard a GPU.
"""
import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from bases import load_base
from common import (FiniteGuard, Log, UserError, agree_to_stop, apply_defaults, check_out, draw_curve, generator, load_state, lr_at,
                    memory_advice, save_checkpoint, seed_of, setup, trained)
from data import TinyWorld, VideoDataset, batch_indices, contact_sheet, read_prompts
from diffusion import diffusion_loss
from models import add_lora, parallelize, sync_gradients
from sample import generate

TINY = dict(steps=4000, batch=16, lr=1.5e-3, lr_schedule="cosine", warmup=50, betas=(0.9, 0.99), wd=0.01, clip=1.0, ema=0.995, rank=0,
            image_share=0.0, offset_noise=0.0, cache_latents=True, save_every=500, preview_every=1000, grad_ckpt=False, log_every=50)
PREVIEWS = ["a red circle moving left on a gray background", "a blue square moving up on a black background",
            "a yellow triangle growing on a brown background", "a white circle standing still on a black background"]


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    p.add_argument("--fps", type=int, help="frame rate at which clips are read (default: every frame)")
    p.add_argument("--image-share", type=float, default=0.125, help="share of steps that train on single frames")
    p.add_argument("--cache-latents", action=argparse.BooleanOptionalAction, default=False, help="encode each clip once, keep the latents in memory")
    p.add_argument("--workers", type=int, default=4, help="processes that read clips")
    p.add_argument("--negative", help="text of dropped captions and of the unconditional branch (default: the base's)")
    p.add_argument("--drop-text", type=float, default=0.1, help="share of captions dropped")
    # optimisation
    p.add_argument("--steps", type=int, default=10000, help="optimizer steps")
    p.add_argument("--batch", type=int, default=1, help="clips a process and micro-step")
    p.add_argument("--accum", type=int, default=1, help="micro-steps a step")
    p.add_argument("--lr", type=float, default=3e-5, help="learning rate")
    p.add_argument("--wd", type=float, default=0.0, help="weight decay")
    p.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999), help="AdamW betas")
    p.add_argument("--lr-schedule", choices=("constant", "cosine", "cosine-restarts"), default="constant", help="after the warm-up")
    p.add_argument("--warmup", type=int, default=10, help="steps of linear warm-up")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=float, default=0.0, help="decay of the moving average of the weights; 0 is off")
    p.add_argument("--rank", type=int, default=16, help="LoRA rank; 0 trains all weights")
    p.add_argument("--alpha", type=float, default=16.0, help="LoRA alpha: the branch is scaled by alpha / rank")
    p.add_argument("--lora-targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="names of the Linear layers")
    p.add_argument("--offset-noise", type=float, default=0.1, help="strength of the noise that is equal over a frame's pixels (VGen: 0.1)")
    # machine
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on GPU, fp32 on CPU")
    p.add_argument("--grad-ckpt", action=argparse.BooleanOptionalAction, default=True, help="recompute blocks in the backward pass: less memory")
    p.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="on several processes: full copies, or shards")
    # run
    p.add_argument("--seed", type=int, default=0, help="seed")
    p.add_argument("--prompts", help="file of preview prompts")
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


def t2v_loss(net, base, x0, text, g, offset=0.0):
    """One value a clip (b,): the denoising loss at random steps. x0 (b,c,f,h,w) latents, text (b,n,d), g a CPU generator."""
    t = torch.randint(len(base.schedule.alpha_bar), (len(x0),), generator=g).to(x0.device)
    noise = torch.randn(x0.shape, generator=g)
    # offset noise: one more value a frame and channel, so that the mean brightness is noised too (VGen: noise_strength)
    noise = (noise + offset * torch.randn(*x0.shape[:3], 1, 1, generator=g)).to(x0.device)
    return diffusion_loss(lambda x, t: net(x, t, text), base.schedule, x0, noise, t)


@torch.no_grad()
def encode_all(dataset, vae, env):
    """Every clip of the data set through the encoder once -> (mean, std) of the unscaled latents in fp16, captions."""
    means, stds, texts = [], [], []
    for i in tqdm(range(len(dataset)), desc="latents", disable=not env.main):
        item = dataset[i]
        mean, logvar = vae.moments(item["video"].transpose(0, 1).to(env.device, env.dtype))  # f c h w: frames are the batch
        means.append(mean.transpose(0, 1).half().cpu())
        stds.append((0.5 * logvar).exp().transpose(0, 1).half().cpu())
        texts.append(item["text"])
    return torch.stack(means), torch.stack(stds), texts


def main(argv=None):
    args = get_args(argv)
    state = check_out(args, method="t2v")
    env = setup(args)
    base = load_base(args.base, args.weights, env.device, torch.float32 if args.rank == 0 else env.dtype, scratch=args.scratch)
    size = tuple(base.row.sample[k] if getattr(args, k) is None else getattr(args, k) for k in ("frames", "height", "width"))
    base.latent_shape(*size)
    negative = base.row.sample["negative"] if args.negative is None else args.negative
    dataset = VideoDataset(args.data, *size, fps=args.fps, seed=args.seed) if args.data else TinyWorld(8192, size[0], args.seed)

    # ---- what is trained: LoRA branches, or the network; from scratch the tiny text encoder as well
    if args.rank:
        add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    else:
        base.net.requires_grad_(True)
        base.text_encoder.requires_grad_(args.scratch)
    base.vae.to(env.dtype)
    base.net.grad_ckpt = args.grad_ckpt
    base.net.to(env.device).train()
    parts = {"": base.net, "text_encoder.": base.text_encoder}
    net = parallelize(base.net, args.parallel, env.device)
    if args.scratch:
        base.text_encoder = parallelize(base.text_encoder, "ddp", env.device)
    params = trained(parts)
    opt = torch.optim.AdamW(params.values(), args.lr, args.betas, weight_decay=args.wd, fused=env.device.type == "cuda")
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    ema = {k: p.detach().clone() for k, p in params.items()} if args.ema else None
    start = load_state(state, params, opt, ema, scaler) if state else 0
    meta = dict(method="t2v", base=args.base, rank=args.rank, alpha=args.alpha, lora_targets=args.lora_targets,
                sample=dict(zip(("frames", "height", "width"), size), negative=negative))
    previews = read_prompts(args.prompts) if args.prompts else PREVIEWS if args.base == "tiny" else [dataset.rows[0].caption]
    cache = encode_all(dataset, base.vae, env) if args.cache_latents else None
    log, guard = Log(args, env, {"net": base.net, "text encoder": base.text_encoder, "vae": base.vae}, start), FiniteGuard()

    for step in range(start, args.steps):
        torch.manual_seed(seed_of(args.seed, env.rank, step, "dropout"))
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args)
        total = 0.0
        for micro in range(args.accum):
            g = generator(args.seed, env.rank, step, micro)
            picked = batch_indices(len(dataset), step * args.accum + micro, args.batch, env.rank, env.world, args.seed)
            # the kind of batch is drawn from the step alone: all processes do the same amount of work
            image = torch.rand((), generator=generator(args.seed, step, "image")).item() < args.image_share
            x0, captions = clips(cache, dataset, base.vae, picked, image, env, g)
            dropped = torch.rand(len(captions), generator=g) < args.drop_text
            with sync_gradients(net, micro == args.accum - 1), env.autocast(), memory_advice("--batch 1", "--grad-ckpt", "--parallel fsdp"):
                text = base.encode_text([negative if d else c for c, d in zip(captions, dropped)])
                loss = t2v_loss(net, base, x0, text, g, args.offset_noise).mean()
                scaler.scale(loss / args.accum).backward()
            total += loss.detach() / args.accum
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(params.values(), args.clip)
        if guard.ok(env, loss=total):
            scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if ema:  # a short warm-up, so that the random start is forgotten
            decay = min(args.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()], 1 - decay)
        log.step(step, loss=total, grad=norm, lr=opt.param_groups[0]["lr"])

        done, stop = step + 1, agree_to_stop(env)
        if stop or done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, env, done, params, meta, opt, ema, scaler)
        if args.preview_every and (done % args.preview_every == 0 or done == args.steps):
            preview(args, env, base, net, params, ema, previews, size, negative, done)
        if stop:
            break
    if env.main:
        draw_curve(log.path, Path(args.out, "curve.png"), ["loss", "grad"], f"t2v on {args.base}")
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def clips(cache, dataset, vae, picked, image, env, g):
    """The picked clips as sampled latents (b,c,f,h,w) and their captions; image: one random frame of each."""
    if cache:
        mean, std = (x[picked].float() for x in cache[:2])
        captions = [cache[2][i] for i in picked]
        x0 = (mean + std * torch.randn(mean.shape, generator=g)).to(env.device) * vae.cfg.scale
    else:
        items = [dataset[i] for i in picked]
        captions, video = [x["text"] for x in items], torch.stack([x["video"] for x in items]).to(env.device, env.dtype)
        noise = torch.randn(len(items), vae.cfg.z_channels, video.shape[2], *(n // vae.cfg.factor for n in video.shape[3:]), generator=g)
        x0 = vae.encode(video, noise.to(env.device, env.dtype)).float()
    if image:
        frame = torch.randint(x0.shape[2], (), generator=g)
        x0 = x0[:, :, frame:frame + 1]
    return x0, captions


def preview(args, env, base, net, params, ema, prompts, size, negative, done):
    """Sample the preview prompts with the (averaged) weights from the same noise as ever -> out/preview-<step>.png."""
    base.net.eval()
    kept = {k: p.detach().clone() for k, p in params.items()} if ema else {}
    for k in kept:
        params[k].data.copy_(ema[k])
    videos = generate(base, env, prompts, [f"preview-{i}" for i in range(len(prompts))], size, negative)
    for k, p in kept.items():
        params[k].data.copy_(p)
    base.net.train()
    if env.main:
        contact_sheet(list(videos), Path(args.out, f"preview-{done}.png"), prompts)


if __name__ == "__main__":
    main()
