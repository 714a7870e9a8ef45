"""Train a text-to-video base by plain denoising: from scratch, full fine-tuning or LoRA.

As VGen trains ModelScopeT2V (arXiv 2308.06571):

    L = E_{x0, text, eps, t} || net(x_t, t, text) - target ||^2,      x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps
    (Ho et al., arXiv 2006.11239, eq. 14; target: the base's, eps or v = sqrt(ab) eps - sqrt(1 - ab) x0)

What it does beside: caption dropout (for guidance), steps on single images among the videos (they keep the
spatial layers sharp), offset noise, a moving average of the weights, latents and texts encoded once.
--text-free is TF-T2V (arXiv 2312.15770): only images have captions, clips teach motion without; its networks
see the middle frame's CLIP embedding instead, and --coherence adds || d net - d target ||^2, d the difference
of neighbouring frames. HiGen (2312.04483) is told how much each clip moves and changes, and its middle frame;
VideoComposer (2306.02018) depth, sketches and motion, some of them dropped (sample.told).

    python t2v.py --base tiny --scratch --out out/tiny      # made assets/tiny.safetensors; minutes in README
    python t2v.py --base tiny --steps 50                    # fine-tune the tiny base a little
    python t2v.py --base tiny-higen --out out/higen         # HiGen's factors; tiny-vcomposer: maps
    python t2v.py --base modelscope --weights W --data clips.csv --rank 16 --lr 1e-4            # LoRA, 1 GPU
    torchrun --nproc_per_node=8 t2v.py --base modelscope --weights W --data clips.csv --rank 0 --mixture
    python t2v.py --base tft2v --weights W --data clips --images pictures.csv --text-free --coherence 0.1
    torchrun --nproc_per_node=4 t2v.py --base modelscope --weights W --data clips.csv --rank 0 --parallel fsdp
    python t2v.py ... --resume                              # goes on bit for bit
    python sample.py --ckpt out/t2v --prompt "..."

Memory: LoRA on ModelScope, 16 frames of 256x256, bf16, batch 1: at most 7.4 GB on an H100. Full fine-tuning
keeps 4 fp32 copies of its 1.41 G parameters (22.6 GB) and the activations of one block (not measured).

Differences from the original code
 - Images and videos mix by --image-share on any number of GPUs. VGen mixes by rank, so one GPU trains on
   images alone: with --mixture 8 processes have its clip lengths and rates, on fewer they take turns at them
   (of --batch clips each: VGen has 32 images, 4 clips of 16 frames, 2 of 32).
 - Data order is shuffled; clips have the frames asked for (VGen's loader is off by one, fills with grey).
 - Dropped captions become --negative ("" by default; VGen: its negative prompt). VGen halves the gradients
   of what its image model had (--grad-scale 0.5), which AdamW cancels; --spatial-lr is what it meant.
 - Of TF-T2V, HiGen and VideoComposer no training code is public: what the papers say, HiGen's scale of motion
   ours (diffusion.motion_factors); sketches are Sobel's edges; no masks are trained.
 - The moving average is one file, not one shard a GPU.
"""
import argparse
from pathlib import Path

import torch
import torch.distributed as dist

from bases import base_row, fill, fit_resampler, forget_motion, load_base, spatial_parameters
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
    apply_defaults,
    catch_signals,
    check_out,
    draw_curve,
    generator,
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
    Mixed,
    VideoDataset,
    contact_sheet,
    encode_once,
    lucas_kanade,
    raft,
    read_batches,
    read_prompts,
)
from diffusion import diffusion_loss, make_schedule, offset_noise, randn
from models import add_lora, parallelize, sync_gradients
from pipeline import draw_latents, frame_rate, generate_split, moments, observed, told
from tinyworld import TRAVEL, TinyWorld

TINY = dict(
    steps=2000, batch=16, lr=1.5e-3, lr_schedule="cosine", warmup=50, betas=(0.9, 0.99), wd=0.01, ema=0.995,
    rank=0, image_share=0.0, offset_noise=0.0, cache_latents=True, workers=0, preview_every=500,
    grad_ckpt=False, log_every=50)
FINE = TINY | dict(steps=600, batch=16, lr=1e-3, warmup=20, ema=0.99, preview_every=300)
HIGEN = FINE | dict(image_share=0.25)  # it makes an image first
# frames and frames a second of VGen's processes 0 to 7
MIXTURE = [(1, 1), (16, 8), (16, 16), (16, 16), (16, 16), (32, 8), (32, 16), (32, 16)]
PREVIEWS = [
    "a red circle moving left on a gray background", "a blue square moving up on a black background",
    "a yellow triangle growing on a brown background", "a white circle standing still on a black background"]


def get_args(argv=None):
    p = Parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--base", default="modelscope", help="base network (python bases.py lists them)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--scratch", action="store_true", help="start from random weights (needs --rank 0)")
    p.add_argument("--train-text", action="store_true", help="tiny: its text encoder, too (--scratch does)")
    p.add_argument("--forget-motion", action="store_true", help="layers over time start as passing on")
    p.add_argument("--zero-snr", action="store_true", help="train for v and zero terminal SNR (2305.08891)")
    p.add_argument("--out", default="out/t2v", help="run folder")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    # data
    p.add_argument("--data", help="clips and captions: folder, csv, jsonl or VGen list (tiny: procedural)")
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--fps", type=COUNT, help="frame rate as a condition, for bases that take one")
    p.add_argument("--read-fps", type=POSITIVE, help="rate at which clips are read (default: every frame)")
    p.add_argument("--image-share", type=SHARE, default=0.125, help="share of steps on single frames")
    p.add_argument("--images", help="pictures and captions for these steps (default: frames of --data)")
    p.add_argument("--mixture", action="store_true", help="VGen's mixture of images and clip lengths")
    p.add_argument("--text-free", action="store_true", help="clips have no captions, only images (TF-T2V)")
    p.add_argument("--flow-weights", help="VideoComposer's motion: torchvision's raft_large (tiny: none)")
    p.add_argument("--cache-latents", action=yes_no, default=False, help="encode once, into --out")
    p.add_argument("--negative", help="text of dropped captions and of the unconditional branch")
    p.add_argument("--drop-text", type=SHARE, default=0.1, help="share of captions dropped")
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
    p.add_argument("--ema", type=DECAY, default=0.0, help="decay of the weights' moving average; 0: off")
    p.add_argument("--rank", type=NATURAL, default=16, help="LoRA rank; 0 trains all weights")
    p.add_argument("--alpha", type=POSITIVE, default=16.0, help="LoRA branches are scaled by alpha / rank")
    p.add_argument("--lora-targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="layers")
    p.add_argument("--offset-noise", type=UNSIGNED, default=0.1, help="noise shared by a frame (VGen: 0.1)")
    p.add_argument("--coherence", type=UNSIGNED, default=0.0, help="weight of frames' differences (0.1)")
    p.add_argument("--grad-scale", type=UNSIGNED, default=1.0, help="of gradients of layers within a frame")
    p.add_argument("--spatial-lr", type=UNSIGNED, default=1.0, help="times --lr for these layers; 0: frozen")
    # machine
    p.add_argument("--workers", type=NATURAL, default=2, help="processes that read clips")
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on GPU, fp32 on CPU")
    p.add_argument("--grad-ckpt", action=yes_no, default=True, help="recompute blocks backward: less memory")
    p.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="full copies, or shards")
    p.add_argument("--offload", action="store_true", help="activations (fsdp: weights too) wait on the CPU")
    # run
    p.add_argument("--seed", type=NATURAL, default=0, help="seed")
    p.add_argument("--prompts", help="file of preview prompts (default: the first clip's caption)")
    p.add_argument("--save-every", type=COUNT, default=500, help="steps between checkpoints")
    p.add_argument("--keep", type=COUNT, default=1, help="checkpoints kept")
    p.add_argument("--preview-every", type=NATURAL, default=500, help="steps between previews; 0: none")
    p.add_argument("--log-every", type=COUNT, default=1, help="steps between log lines on the screen")
    p.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    p.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    tiny = {"tiny": TINY, "tiny-weak": TINY, "tiny-higen": HIGEN, "tiny-vcomposer": FINE}
    args = apply_defaults(p, argv, tiny)
    for flag in ("scratch", "forget_motion"):
        if getattr(args, flag) and args.rank:
            raise UserError(f"--{flag.replace('_', '-')}: LoRA on random weights cannot learn; add --rank 0")
    if base_row(args.base).text and not args.data:
        raise UserError("--data: give a folder, csv, jsonl or list of clips with captions")
    if args.mixture and (base_row(args.base).text is None or args.cache_latents):
        raise UserError("--mixture: reads real clips, each time anew: no tiny base, no --cache-latents")
    if args.images and not (args.data and (args.image_share or args.mixture)):
        raise UserError("--images: goes with --data, for the steps of --image-share or --mixture")
    if args.text_free and not (args.image_share or args.mixture):
        raise UserError("--text-free: no caption would be left: give --image-share or --mixture")
    if args.train_text and (base_row(args.base).text or args.rank):
        raise UserError("--train-text: only the tiny world's text encoder can be trained, with --rank 0")
    return args


# ---- the method

def t2v_loss(net, schedule, x0, text, generators, offset=0.0, coherence=0.0, **cond):
    """The denoising loss at random steps, (b,). x0 (b,c,f,h,w) latents, text (b,n,d).

    generators: a CPU generator a sample, for its step and noise; cond: other conditions of the network, such
    as fps (b,).
    """
    t = torch.stack([torch.randint(len(schedule.alpha_bar), (), generator=g) for g in generators])
    # the mean brightness is noised too (VGen: noise_strength)
    noise = offset_noise(randn(x0.shape, generators), randn((*x0.shape[:3], 1, 1), generators), offset)
    return diffusion_loss(
        lambda x, t: net(x, t, text, **cond), schedule, x0, noise.to(x0.device), t.to(x0.device),
        coherence=coherence)


def read_data(args):
    """-> the data sets that steps read in turn, [clips], [clips, images], or those of MIXTURE's kinds."""
    unet, size = base_row(args.base).unet, (args.height, args.width)
    if not args.data:
        travel = (4, 18) if unet.text_resampler else TRAVEL  # HiGen: slow and fast
        return [TinyWorld(4096, args.frames, args.seed, travel=travel, depth="depth" in unet.maps)]
    kinds = sorted(set(MIXTURE), reverse=True) if args.mixture else [(args.frames, args.read_fps)]
    kinds += [(1, None)] if args.images and not args.mixture else []
    return [VideoDataset(args.images if args.images and f == 1 else args.data, f, *size, fps, args.seed,
                         captions=not args.text_free or f == 1 or not (args.images or args.mixture))
            for f, fps in kinds]


def turns(args, env, start, seen):
    """-> (which of read_data() each turn reads, samples a turn). By default a turn is a step: all processes
    train on images, or all on videos."""
    if args.mixture:
        kinds, first = sorted(set(MIXTURE), reverse=True), seen // args.batch
        last = first + (args.steps - start) * args.accum * env.world
        return [kinds.index(MIXTURE[k % 8]) for k in range(first, last)], args.batch
    luck = [torch.rand((), generator=generator(args.seed, s, "image")) for s in range(start, args.steps)]
    return [int(x.item() < args.image_share) for x in luck], args.batch * args.accum * env.world


@memory_advice("--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp", "smaller --height and --width")
def main(argv=None):
    args = get_args(argv)
    args.spacing = "trailing" if args.zero_snr else None  # sampling starts where the noise is pure
    settings = fill(args, args.base, method="t2v")
    parts = read_data(args)
    rows = [part.rows for part in parts] if args.data else ["tiny"]
    own = [rows[-1][0][2]] if args.data else PREVIEWS
    previews = read_prompts(args.prompts) if args.prompts else own
    state = check_out(args, "t2v")
    env = setup(args)
    dtype = env.dtype if args.rank else torch.float32  # trained weights are kept in fp32
    unet = base_row(args.base).unet
    clip = bool(unet.text_resampler or unet.style_image)  # these are told what the CLIP tower sees
    base = load_base(args.base, args.weights, env.device, dtype, args.scratch, image=clip)
    if base.row.text is None:  # a word that the tiny world does not know is refused now
        base.tokenize([*previews, args.negative, *(row[2] for part in rows if args.data for row in part)])
    if args.forget_motion:  # a resumed run's weights are put in later
        forget_motion(base.net)
    if unet.text_resampler and base.row.text is None and not (state or args.rank):
        fit_resampler(base)
    schedule = base.row.schedule | dict(prediction="v", zero_snr=True) if args.zero_snr else None
    base.schedule = make_schedule(**schedule) if schedule else base.schedule
    flow = args.flow_weights and raft("large", args.flow_weights, env.device)
    flow = flow if base.row.text else lucas_kanade

    # ---- what is trained: LoRA branches, or the network; from scratch the tiny text encoder as well
    if args.rank:
        add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    else:
        base.net.requires_grad_(True)
        base.text_encoder.requires_grad_(base.row.text is None and (args.scratch or args.train_text))
    taught = [k for k, m in base.parts().items() if any(p.requires_grad for p in m.parameters())]
    base.freeze(env.dtype, but=taught)  # what is frozen takes half the room
    base.net.grad_ckpt = args.grad_ckpt
    base.net.train()
    leaves_out = bool(unet.text_resampler or unet.concat_dim)  # images: layers over time, or maps
    net = parallelize(base.net, args.parallel, env.device, args.offload, unused=leaves_out)
    if any(p.requires_grad for p in base.text_encoder.parameters()):
        base.text_encoder = parallelize(base.text_encoder, "ddp", env.device)
    params = trained({"": base.net, "text_encoder.": base.text_encoder})
    within = [params[k] for k in spatial_parameters(base.net) if k in params]  # a frame
    others = [p for p in params.values() if all(p is not q for q in within)]
    opt = torch.optim.AdamW([dict(params=within, times=args.spatial_lr), dict(params=others, times=1.0)],
                            args.lr, args.betas, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    ema = {k: p.detach().clone() for k, p in params.items()} if args.ema else None
    start, seen = load_state(args, env, state, params, opt, ema, scaler)
    meta = dict(
        method="t2v", base=args.base, rank=args.rank, alpha=args.alpha, lora_targets=args.lora_targets,
        sample=settings, schedule=schedule)
    log = Log(args, env, base.parts(), start)

    def encode(batch):
        found = moments(base.vae, batch["video"], env) | observed(base, batch, env, flow)
        return {k: v.half() for k, v in found.items()} if args.cache_latents else found
    if args.cache_latents:
        about = dict(base=args.base, weights=args.weights, size=(args.frames, args.height, args.width),
                     fps=args.read_fps, seed=args.seed)
        parts = [encode_once(Path(args.out, "latents", *["images"] * k), part, encode,
                 about | {"rows": seed_of(rows[k])}, env, args.workers) for k, part in enumerate(parts)]
        if "text encoder" not in taught:  # it is done, too
            with torch.no_grad(), env.autocast():
                base.remember([text for part in parts for text in part.texts()] + [args.negative, *previews])
    numbers = MySamples(args, env, start, seen)
    turn, size = turns(args, env, start, seen)
    data = Mixed(parts, [min(k, len(parts) - 1) for k in turn], size, seen)
    batches = read_batches(data, numbers, args.seed, args.workers)
    guard = FiniteGuard(env)
    catch_signals(env)

    for step in range(start, args.steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args) * group["times"]
        total = 0.0
        for micro in range(args.accum):
            batch = next(batches)
            # all that is random comes from a sample's number: the run is the same however they are dealt out
            mine = numbers[(step - start) * args.accum + micro]
            generators = [generator(args.seed, "sample", i) for i in mine]
            torch.manual_seed(seed_of(args.seed, "dropout", mine[0]))
            batch = batch if "mean" in batch else batch | encode(batch)
            x0 = draw_latents(base.vae, batch, generators, env)
            if not args.mixture and turn[step - start] and x0.shape[2] > 1:  # one frame of each clip
                frame = [int(torch.randint(args.frames, (), generator=g)) for g in generators]
                x0 = torch.stack([x[:, i:i + 1] for x, i in zip(x0, frame)])
            free = args.text_free and x0.shape[2] > 1
            captions = [args.negative if torch.rand((), generator=g) < args.drop_text or free else caption
                        for caption, g in zip(batch["text"], generators)]
            with sync_gradients(net, micro == args.accum - 1), env.autocast():
                text = base.encode_text(captions)
                cond = frame_rate(args, len(x0), env.device) | told(base, x0, batch, generators)
                how = args.offset_noise, args.coherence
                loss = t2v_loss(net, base.schedule, x0, text, generators, *how, **cond).mean()
                scaler.scale(loss / args.accum).backward()
            total += loss.detach() / args.accum
        for p in within if args.grad_scale != 1 else ():
            p.grad = None if p.grad is None else p.grad * args.grad_scale
        norm = guard.step(opt, scaler, params.values(), args.clip, loss=total)
        seen += args.batch * args.accum * env.world
        if ema:  # warmed up, so that the random start is forgotten
            decay = min(args.ema, (step + 1) / (step + 10))
            move_average(ema, params, decay)
        log.step(step, loss=total, grad=norm, lr=opt.param_groups[0]["lr"])

        done, stop = step + 1, agree_to_stop(env)
        if stop or done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, env, done, seen, params, meta, opt, ema, scaler)
        if stop:
            break
        if args.preview_every and (done % args.preview_every == 0 or done == args.steps):
            preview(args, env, base, params, ema, done, previews)
    if env.main:
        draw_curve(log.path, Path(args.out, "curve.png"), ["loss", "grad"], f"t2v on {args.base}")
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- previews

def preview(args, env, base, params, ema, done, prompts):
    """Sample the preview prompts (averaged weights, always the same noise) -> out/preview-<step>.png."""
    base.net.eval()
    with using_average(params, ema):
        videos = generate_split(base, env, prompts, [f"preview-{i}" for i in range(len(prompts))], args)
    base.net.train()
    if env.main:
        contact_sheet(list(videos), Path(args.out, f"preview-{done}.png"), prompts)


if __name__ == "__main__":
    run_command(main)
