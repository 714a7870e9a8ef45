"""DEMO: motion gets its own text encoder and its own conditioning (Ruan et al., arXiv 2410.05097).

    L = L_diffusion + 0.1 L_video-motion + 0.1 L_text-motion + 0.1 L_regularization
        diffusion        | net(x_t, t) - target |^2,            target: the noise, or the base's own
        video motion     | D(net(x_t, t)) - D(target) |^2,      D(u)[f] = |u[f+1] - u[f]|
        text motion      - cos(flow of the attention to the end-of-text token, flow of the clip)
        regularization   - cos(motion encoder's end-of-text feature, image embedding of the middle frame)

Behind each spatial transformer, which reads the frozen content encoder, stands a motion block: a copy of it,
turned to attend over the frames and to a second encoder. These blocks (274 M) and that encoder (164 M) train.

    python demo.py --base tiny-weak                          # tiny, its text encoder blind to motions
    python demo.py --base modelscope --weights W --data clips.csv                  # as published, 1 GPU
    torchrun --nproc_per_node=4 demo.py --base modelscope --weights W --data clips.csv --parallel fsdp
    python demo.py --base demo --weights W --data clips.csv  # go on from the public DEMO
    python demo.py ... --resume                              # goes on bit for bit
    python sample.py --ckpt out/demo --prompt "a red circle moving left" --sequential --decode-chunk 2

Differences from the original code
 - The gradient of the text-motion loss arrives (there, activation checkpointing cuts it off). --as-published
   leaves it out, and takes DeepSpeed's OneCycle, which there overrides both learning rates.
 - What is frozen has no gradients: there the rest of the network, RAFT and lower layers pile them up unread.
 - RAFT sees all pairs of frames of a batch at once, not one by one; --cache-latents keeps the clip's flow.
 - The frame for the image embedding is scaled to [0, 1]; the published uint8 cast folds its dark half.
 - Sampling reads the negative prompt's motion tokens, training never did: --drop-motion (tiny: 0.1) does.
 - ZeRO-2 is --parallel fsdp with --zero 2: gradients and moments in shards, weights whole until backward.
"""
import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from bases import BASES, NEGATIVE, base_row, fill, load_base
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
    onecycle,
    run_command,
    save_checkpoint,
    seed_of,
    setup,
    trained,
    using_average,
)
from data import (
    VideoDataset,
    clip_frames,
    contact_sheet,
    encode_once,
    frame_flow,
    lucas_kanade,
    raft,
    read_batches,
    read_prompts,
    resize_flow,
)
from diffusion import diffusion_loss, randn
from models import MotionBlock, parallelize, sync_gradients
from pipeline import draw_latents, generate_split, moments
from tinyworld import TinyWorld, judge_captions, tiny_image_embedding, tiny_prompts

EXTRA = "video_motion", "text_motion", "regularization"
TINY = dict(
    steps=240, batch=16, accum=1, lr=2e-3, encoder_lr=5e-3, lr_schedule="cosine", warmup=20,
    betas=(0.9, 0.99), wd=0.01, ema=0.98, encoder_from=0, drop_motion=0.1, cache_latents=True, workers=0,
    grad_ckpt=False, log_every=20, eval_n=64)


def get_args(argv=None):
    p = Parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--base", default="modelscope", help="base network (python bases.py lists them)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--flow-weights", help="file of torchvision's raft_small (default: its hub; tiny: none)")
    p.add_argument("--out", default="out/demo", help="run folder")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    # method
    p.add_argument("--video-motion", type=UNSIGNED, default=0.1, help="weight of that loss")
    p.add_argument("--text-motion", type=UNSIGNED, default=0.1, help="weight of that loss; 0: no flow")
    p.add_argument("--regularization", type=UNSIGNED, default=0.1, help="weight of that loss")
    p.add_argument("--encoder-from", type=NATURAL, default=10, help="its first block to train; 0: all of it")
    p.add_argument("--drop-text", type=SHARE, default=0.1, help="share of captions dropped")
    p.add_argument("--drop-motion", type=SHARE, default=0.0, help="share that the motion blocks do not see")
    p.add_argument("--as-published", action="store_true", help="text-motion loss without gradient; OneCycle")
    # data
    p.add_argument("--data", help="clips and captions: folder, csv, jsonl or VGen list (tiny: procedural)")
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--read-fps", type=POSITIVE, default=3.0, help="rate at which clips are read")
    p.add_argument("--cache-latents", action=yes_no, default=False, help="encode once, into --out")
    p.add_argument("--negative", help="text of dropped captions and of the unconditional branch")
    # optimisation
    p.add_argument("--steps", type=COUNT, default=20000, help="optimizer steps")
    p.add_argument("--batch", type=COUNT, default=4, help="clips a process and micro-step")
    p.add_argument("--accum", type=COUNT, default=4, help="micro-steps a step")
    p.add_argument("--lr", type=POSITIVE, default=5e-5, help="learning rate of the motion blocks")
    p.add_argument("--encoder-lr", type=POSITIVE, default=1e-6, help="learning rate of the motion encoder")
    p.add_argument("--wd", type=UNSIGNED, default=0.0, help="weight decay")
    p.add_argument("--betas", type=DECAY, nargs=2, default=(0.9, 0.999), help="AdamW betas")
    p.add_argument("--lr-schedule", choices=("constant", "cosine", "cosine-restarts"), default="constant")
    p.add_argument("--warmup", type=NATURAL, default=10, help="steps of linear warm-up")
    p.add_argument("--clip", type=POSITIVE, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=DECAY, default=0.0, help="decay of the weights' moving average; 0: off")
    # machine
    p.add_argument("--workers", type=NATURAL, default=2, help="processes that read clips")
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on GPU, fp32 on CPU")
    p.add_argument("--grad-ckpt", action=yes_no, default=True, help="recompute blocks backward: less memory")
    p.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="full copies, or shards")
    p.add_argument("--zero", type=int, choices=(2, 3), default=2, help="fsdp: 3 shards whole weights, too")
    p.add_argument("--offload", action="store_true", help="activations (fsdp: weights too) wait on the CPU")
    # run
    p.add_argument("--seed", type=NATURAL, default=0, help="seed")
    p.add_argument("--prompts", help="file of prompts to evaluate on (default: a caption; tiny: held-out)")
    p.add_argument("--eval-n", type=COUNT, default=4, help="prompts used for evaluation")
    p.add_argument("--save-every", type=COUNT, default=500, help="steps between checkpoints")
    p.add_argument("--keep", type=COUNT, default=1, help="checkpoints kept")
    p.add_argument("--preview-every", type=NATURAL, default=0, help="steps between evaluations; 0: two only")
    p.add_argument("--log-every", type=COUNT, default=1, help="steps between log lines on the screen")
    p.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    p.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    args = apply_defaults(p, argv, {n: dict(negative=NEGATIVE) if r.text else TINY for n, r in BASES.items()})
    if base_row(args.base).text and not args.data:
        raise UserError("--data: give a folder, csv, jsonl or list of clips with captions")
    return args


# ---- the losses, all per sample, unweighted

def video_motion_loss(out, target):
    """Mean of (D(out) - D(target))^2, D the size of the change from frame to frame. (b,c,f,h,w) -> (b,)."""
    change = [x.float().diff(dim=2).abs() for x in (out, target)]
    return (change[0] - change[1]).square().flatten(1).mean(1)


def text_motion_loss(maps, real, flow):
    """-cos(flow of the attention maps [(b,h,w,f)], flow of the clip), mean over their resolutions -> (b,).

    Maps of one resolution are averaged, and enlarged where they are smaller than real (b,f-1,2,H,W).
    """
    groups, cosines = {}, []
    for m in maps:
        groups.setdefault(m.shape[1:3], []).append(m.float())
    for size, group in groups.items():
        grey = torch.stack(group).mean(0).permute(0, 3, 1, 2)[:, None]  # b 1 f h w
        grey = resize_flow(grey, max(min(size), min(real.shape[-2:])))
        moved = frame_flow(flow, grey.expand(-1, 3, -1, -1, -1))
        wanted = resize_flow(real.float(), moved.shape[-2:])
        cosines.append(F.cosine_similarity(moved.flatten(1), wanted.flatten(1), eps=1e-8))
    return -torch.stack(cosines).mean(0)


def regularization_loss(feature, image):
    """-cos(motion encoder's end-of-text feature, image embedding), both (b,d) -> (b,)."""
    # as published the feature is not projected into CLIP's joint space: that the sizes agree is luck
    return -F.cosine_similarity(feature.float(), image.float(), eps=1e-8)


def demo_losses(net_fn, schedule, x0, noise, t, real, flow, feature, image, detach=False):
    """The four terms {name: (b,)}. net_fn(x_t, t) -> (prediction, maps), with flow None the prediction alone.

    maps, real, flow: of text_motion_loss(); feature, image: of regularization_loss(). A term without
    its teacher, flow or image, is left out. detach: cut the maps from the graph, as published.
    """
    answer = net_fn(schedule.add_noise(x0, noise, t), t)
    out, maps = answer if flow else (answer, ())
    terms = dict(diffusion=diffusion_loss(lambda *_: out, schedule, x0, noise, t),
                 video_motion=video_motion_loss(out, schedule.target(x0, noise, t)))
    if flow:
        maps = [m.detach() for m in maps] if detach else maps
        terms["text_motion"] = text_motion_loss(maps, real, flow)
    if image is not None:
        terms["regularization"] = regularization_loss(feature, image)
    return terms


def demo_step(net, base, batch, x0, generators, args, flow):
    """demo_losses() of a batch of encode(); x0 (b,c,f,h,w); generators: one a clip, of all its randomness."""
    luck = torch.stack([torch.rand(3, generator=g) for g in generators])
    t = (luck[:, 0] * len(base.schedule.alpha_bar)).long().to(x0.device)
    noise = randn(x0.shape, generators).to(x0.device)
    words, motion_words = (
        [args.negative if dropped else text for text, dropped in zip(batch["text"], column < share)]
        for column, share in zip(luck.T[1:], (args.drop_text, args.drop_motion)))
    text, motion = base.encode_text(words), base.encode_text(motion_words, motion=True)
    eot = base.end_of_text(motion_words).to(x0.device)
    real, image = (batch[k].to(x0.device) if k in batch else None for k in ("flow", "image"))
    return demo_losses(
        lambda x, t: net(x, t, text, motion_text=motion, eot=eot if flow else None), base.schedule, x0, noise,
        t, real, flow, motion[range(len(eot)), eot], image, args.as_published)


@memory_advice("--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp", "smaller --height and --width")
def main(argv=None):
    args = get_args(argv)
    settings = fill(args, args.base, method="demo")
    tiny, size = base_row(args.base).text is None, (args.frames, args.height, args.width)
    data = VideoDataset(args.data, *size, args.read_fps, args.seed) if args.data else (
        TinyWorld(2048, args.frames, args.seed))
    rows = data.rows if args.data else ()
    prompts = (read_prompts(args.prompts) if args.prompts else [rows[0][2]] if rows else
               tiny_prompts(held_out=True))[:args.eval_n]
    state = check_out(args, "demo")
    env = setup(args)
    weights = {"diffusion": 1.0} | {k: vars(args)[k] for k in EXTRA}
    flow = None if not args.text_motion else lucas_kanade if tiny else raft(
        "small", args.flow_weights, env.device)
    base = load_base(args.base, args.weights, env.device, torch.float32, motion=True,
                     image=args.regularization > 0)
    if tiny:  # a word that the tiny world does not know is refused now
        base.tokenize([*prompts, args.negative, *(row[2] for row in rows)])
    train_motion(base, args.encoder_from, env.dtype)
    image = None if not args.regularization else tiny_image_embedding(env.device) if tiny else (
        lambda frames: base.image_encoder(
            clip_frames(frames, base.row.text.image_size).to(env.device, env.dtype)))
    base.net.grad_ckpt = args.grad_ckpt
    base.net.train()
    shards = dict(mode=args.parallel, device=env.device, offload=args.offload, reshard=args.zero == 3)
    net = parallelize(base.net, **shards)
    base.motion_encoder = encoder = parallelize(base.motion_encoder, **shards)
    params = trained({"": base.net, "motion_encoder.": encoder})
    groups = [[p for k, p in params.items() if k.startswith("motion_encoder.") == on] for on in (False, True)]
    opt = torch.optim.AdamW([{"params": g} for g in groups], args.lr, args.betas, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    ema = {k: p.detach().clone() for k, p in params.items()} if args.ema else None
    start, seen = load_state(args, env, state, params, opt, ema, scaler)
    meta = dict(method="demo", base=args.base, rank=0, sample=settings)
    log = Log(args, env, base.parts(), start)
    if args.cache_latents:
        about = dict(base=args.base, weights=args.weights, size=size, fps=args.read_fps, seed=args.seed,
                     rows=seed_of(rows), flow=bool(flow), image=bool(image))
        data = encode_once(Path(args.out, "latents"), data, lambda batch: {
            k: v.half() for k, v in encode(base, batch, flow, image, env).items()}, about, env, args.workers)
        with torch.no_grad(), env.autocast():  # teachers and content encoder are done
            base.remember([*data.texts(), args.negative, *prompts], motion_too=False)
        base.image_encoder = image = None
    numbers, guard = MySamples(args, env, start, seen), FiniteGuard(env)
    batches = read_batches(data, numbers, args.seed, args.workers)
    catch_signals(env)
    if env.main:
        keep_lines(Path(args.out, "eval.jsonl"), min(start + 1, args.steps) if state else 0)
    if not state:
        evaluate(args, env, base, prompts, params, ema, 0)

    for step in range(start, args.steps):
        for group, rate in zip(opt.param_groups, (args.lr, args.encoder_lr)):
            group["lr"] = lr_at(step, args) / args.lr * rate
            if args.as_published:
                group["lr"], *betas = onecycle(step)
                group["betas"] = tuple(betas)
        total = {}
        for micro in range(args.accum):
            batch, mine = next(batches), numbers[(step - start) * args.accum + micro]
            generators = [generator(args.seed, "sample", i) for i in mine]  # of all that is random
            torch.manual_seed(seed_of(args.seed, "dropout", mine[0]))
            batch |= {} if args.cache_latents else encode(base, batch, flow, image, env)
            x0 = draw_latents(base.vae, batch, generators, env)
            last = micro == args.accum - 1
            with sync_gradients(net, last), sync_gradients(encoder, last), env.autocast():
                terms = demo_step(net, base, batch, x0, generators, args, flow)
                loss = sum(weights[k] * v.mean() for k, v in terms.items())
                scaler.scale(loss / args.accum).backward()
            for k, v in ({"loss": loss} | terms).items():
                total[k] = total.get(k, 0) + v.detach().mean() / args.accum
        norm = guard.step(opt, scaler, params.values(), args.clip, **total)
        seen += args.batch * args.accum * env.world
        if ema:  # warmed up, so that the start is forgotten
            move_average(ema, params, min(args.ema, (step + 1) / (step + 10)))
        log.step(step, **total, grad=norm, lr=opt.param_groups[0]["lr"])

        done, stop = step + 1, agree_to_stop(env)
        if stop or done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, env, done, seen, params, meta, opt, ema, scaler)
        if stop:
            break
        if args.preview_every and done % args.preview_every == 0 and done < args.steps:
            evaluate(args, env, base, prompts, params, ema, done)
    else:  # not stopped
        evaluate(args, env, base, prompts, params, ema, args.steps)
    if env.main:
        draw_curve(log.path, Path(args.out, "curve.png"), ["loss", *weights], f"DEMO on {args.base}")
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- what is trained, teachers, latents

def train_motion(base, first, dtype):
    """Gradients, in fp32, for the motion blocks and the motion encoder's blocks from `first` on (0: all)."""
    encoder, blocks = base.motion_encoder, base.motion_encoder.blocks()
    if first >= len(blocks):
        raise UserError(f"--encoder-from {first}: the motion encoder has the blocks 0..{len(blocks) - 1}")
    base.freeze(dtype, but=("net", "motion encoder"))
    for module in [m for m in base.net.modules() if isinstance(m, MotionBlock)] + (
            blocks[first:] if first else [encoder]):
        module.requires_grad_(True)
    for p in base.net.parameters():
        p.data = p.data if p.requires_grad else p.data.to(dtype)


@torch.no_grad()
def encode(base, batch, flow, image, env):
    """Clips' latents as of moments(), and what their teachers say: "flow", "image"; all on the CPU."""
    video = batch["video"].to(env.device)
    found = moments(base.vae, video, env)
    if flow:  # compared at 128 pixels, as published, or at the size of smaller clips
        found["flow"] = frame_flow(flow, video, min(128, *video.shape[3:])).cpu()
    if image:
        found["image"] = image(video[:, :, video.shape[2] // 2]).float().cpu()
    return found


@torch.no_grad()
def evaluate(args, env, base, prompts, params, ema, step):
    """Clips of the averaged weights, always from the same noise -> NAME.png; tiny: eval.jsonl."""
    name = {0: "before", args.steps: "after"}.get(step, f"step-{step}")
    base.net.eval()
    with using_average(params, ema):
        videos = generate_split(base, env, prompts, [f"eval-{i}" for i in range(len(prompts))], args)
    base.net.train()
    if env.main:
        contact_sheet(list(videos[:16]), Path(args.out, f"{name}.png"), prompts[:16])
    if env.main and base.row.text is None and not args.data:
        seen = judge_captions(videos, prompts)
        append_line(Path(args.out, "eval.jsonl"), dict(step=step, judge=seen))
        print(f"held-out, {name}:", " ".join(f"{k} {v:.3f}" for k, v in seen.items()), flush=True)


if __name__ == "__main__":
    run_command(main)
