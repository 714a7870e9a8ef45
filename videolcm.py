"""VideoLCM: distil a text-to-video base into a student that samples in 1 to 8 steps (arXiv 2312.09109).

Latent consistency distillation (Luo et al., arXiv 2310.04378, algorithm 1, eq. 15-17). A consistency function
jumps from any noise to the clean clip; two neighbouring points of one path must jump to the same place:

    L = E || f(x_t, t; theta) - f(x_s, s; theta-) ||,  f(x, t) = c_skip(t) x + c_out(t) x0(net(x, t, text))

x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps is a noised clip, x_s one DDIM step of the base (the teacher) with
guidance u + cfg (c - u) from t to s = t - 1000 / origin, ||.|| a pseudo-Huber distance, theta- a moving
average of the student (the target). Guidance thus goes into the student: a clip costs 4 network calls and not
2 x 50. With --cfg-range the student is told the scale and --cfg still turns it (T2V-Turbo, arXiv 2405.18750).
With --reward the student's own jump f is decoded as well and its reward raised (T2V-Turbo, eq. 13):
L - E r(decode(f), text).

    python videolcm.py --base tiny                             # 2 CPU cores: minutes and result in RESULTS.md
    python videolcm.py --base tiny --rank 16 --lr 1e-3 --reward tiny:0.1
    python videolcm.py --base tft2v --weights W --data clips.csv --batch 1 --accum 16           # 1 GPU
    torchrun --nproc_per_node=4 videolcm.py --base modelscope --weights W --data clips.csv --parallel fsdp
    # T2V-Turbo's recipe: LoRA, the scale as an input, a reward
    torchrun --nproc_per_node=4 videolcm.py --base videocrafter2 --weights W --data clips.csv --reward hps
    python videolcm.py ... --resume                              # goes on bit for bit
    python sample.py --ckpt out/videolcm --prompt "a red circle moving left" --sample-steps 4

Leaves in --out: ckpt.safetensors (the target: the average, as consistency models are sampled), log.jsonl,
curve.png, preview-<step>.png: the same noise in 1, 2, 4 and 8 steps.

Memory: all weights of ModelScope's 1.41 G parameters: student, gradients, two moments and target in fp32, the
teacher in bf16, 31 GB, and the activations of one recomputed block (not measured). LoRA: the base twice in
bf16 and the branches; the teacher is the student with its branches off.

Differences from the original code
 - No dropout, in teacher and target (left in training mode there, by an oversight) as in the student.
 - The target is what is saved and sampled from; VideoLCM's files are the student, some 20 updates ahead.
 - The scale is --cfg, u + cfg (c - u), everywhere: VideoLCM's w = 9 and T2V-Turbo's w in 5..15 are 10 and
   6..16, and --cfg-range embeds this number. VideoLCM embeds w, too, but its network ignores it.
 - VideoCrafter2's x_t keep the scale of their clean part as the teacher knows it (T2V-Turbo leaves it out).
 - The learning rate is constant: VideoLCM's cosine of a million updates was left after 32,000. No gradient
   scale for spatial layers: AdamW cancels it.
 - The rewards are one sum on one set of frames: --reward-frames random ones, or the whole clip if one of the
   rewards judges clips (T2V-Turbo: two sets of frames, on different GPUs). LoRA is on the attentions and,
   with --cfg-range, on the scale's new layer, zero before (T2V-Turbo: on all layers, that one from a random
   start).
"""
import argparse
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from bases import add_guidance, base_row, fill, load_base
from common import (
    COUNT,
    DECAY,
    NATURAL,
    POSITIVE,
    REAL,
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
)
from data import VideoDataset, contact_sheet, encode_once, read_batches, read_prompts
from diffusion import consistency, guided, lcm_timesteps, pseudo_huber, randn
from models import (
    add_lora,
    frozen_copy,
    guidance_embedding,
    parallelize,
    sync_gradients,
    without_lora,
)
from pipeline import decode, draw_latents, frame_rate, generate_split, moments
from rewards import get_reward, score
from tinyworld import TinyWorld, tiny_prompts

GUIDANCE_DIM = 256  # numbers that tell the scale, T2V-Turbo's
SHOWN = 1, 2, 4, 8  # steps of the previews
TINY = dict(
    steps=300, batch=8, accum=1, lr=5e-4, origin=20, lr_schedule="cosine", warmup=20, cfg=1.5,
    cache_latents=True, workers=0, preview_every=100, save_every=100, grad_ckpt=False, log_every=25)
PRESETS = {
    "tiny": TINY, "tiny-weak": TINY, "tft2v": dict(cfg=10.0),
    "videocrafter2": dict(steps=10000, accum=2, lr=1e-5, rank=64, alpha=64.0, ema=0.0, warmup=0, fps=16,
                          cfg=8.5, cfg_range=(6.0, 16.0))}
PREVIEWS = [
    "a red circle moving left on a gray background", "a blue square moving up on a black background",
    "a yellow triangle growing on a brown background", "a white circle standing still on a black background"]


def get_args(argv=None):
    p = Parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--base", default="tft2v", help="base network (python bases.py lists them)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--out", default="out/videolcm", help="run folder")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    # data
    p.add_argument("--data", help="clips and captions: folder, csv, jsonl or VGen list (tiny: procedural)")
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--fps", type=COUNT, help="frame rate as a condition, for bases that take one")
    p.add_argument("--read-fps", type=POSITIVE, help="rate at which clips are read (default: every frame)")
    p.add_argument("--cache-latents", action=yes_no, default=False, help="encode once, into --out")
    p.add_argument("--negative", help="text of the unconditional branch (default: the base's)")
    # method
    p.add_argument("--origin", type=COUNT, default=50, help="steps of the teacher's solver from end to end")
    p.add_argument("--cfg", type=REAL, help="guidance u + cfg (c - u) (default: the base's)")
    p.add_argument("--cfg-range", type=REAL, nargs=2, metavar=("LOW", "HIGH"),
                   help="draw the scale from here and tell it to the student (default: always --cfg)")
    p.add_argument("--reward", help="of rewards.py, or a sum hps:1.5,aesthetic:0.1, or my_file.py:function")
    p.add_argument("--reward-weights", help="folder with the rewards' public files (default: their hub)")
    p.add_argument("--reward-frames", type=COUNT, default=5, help="random frames that a reward sees")
    p.add_argument("--sample-steps", type=COUNT, default=4, help="sampler steps (sample.py's default, too)")
    # optimisation
    p.add_argument("--steps", type=COUNT, default=32000, help="optimizer steps")
    p.add_argument("--batch", type=COUNT, default=1, help="clips a process and micro-step")
    p.add_argument("--accum", type=COUNT, default=16, help="micro-steps a step")
    p.add_argument("--lr", type=POSITIVE, default=3e-5, help="learning rate")
    p.add_argument("--wd", type=UNSIGNED, default=0.0, help="weight decay")
    p.add_argument("--betas", type=DECAY, nargs=2, default=(0.9, 0.999), help="AdamW betas")
    p.add_argument("--lr-schedule", choices=("constant", "cosine", "cosine-restarts"), default="constant")
    p.add_argument("--warmup", type=NATURAL, default=10, help="steps of linear warm-up")
    p.add_argument("--clip", type=POSITIVE, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=DECAY, default=0.95, help="decay of the weights' moving average; 0: off")
    p.add_argument("--rank", type=NATURAL, default=0, help="LoRA rank; 0 trains all weights")
    p.add_argument("--alpha", type=POSITIVE, default=16.0, help="LoRA branches are scaled by alpha / rank")
    p.add_argument("--lora-targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="layers")
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
    p.set_defaults(sampler="lcm", spacing="even")
    args = apply_defaults(p, argv, PRESETS)
    if 1000 % args.origin:
        raise UserError(f"--origin {args.origin}: must divide the 1000 steps of the noise, such as 50 or 20")
    lcm_timesteps(args.sample_steps, origin=args.origin)
    if args.cfg_range and args.cfg_range[0] > args.cfg_range[1]:
        raise UserError("--cfg-range: the first is the lower one")
    if args.cfg_range and args.rank:
        args.lora_targets = [*args.lora_targets, "time_cond_proj"]
    if base_row(args.base).text and not args.data:
        raise UserError("--data: give a folder, csv, jsonl or list of clips with captions")
    return args


# ---- the method

def distillation(student, teacher, target, schedule, x0, noise, n, origin=50, c=0.001):
    """-> loss (b,) of consistency distillation, and the student's jumps to clean latents, like x0.

    student, teacher, target: fn(x, t (b,)) -> prediction; teacher with guidance, it and target without
    gradient. x0, noise (b,c,f,h,w); n (b,): which of the solver's `origin` steps, 0 the one that ends at x0.
    """
    length = len(schedule.alpha_bar) // origin
    t = length * (n + 1) - 1
    s = (t - length).clamp(min=0)  # f(x, 0) = x: there the loss meets the data
    x_t = schedule.add_noise(x0, noise, t)
    with torch.no_grad():  # one DDIM step along the teacher's path
        out = teacher(x_t, t).float()
        x_s = schedule.add_noise(schedule.to_x0(out, x_t, t), schedule.to_eps(out, x_t, t), s)
        aim = consistency(schedule, target(x_s, s).float(), x_s, s)
    jump = consistency(schedule, student(x_t, t).float(), x_t, t)
    return pseudo_huber(jump, aim, c), jump


def reward_of(reward, base, jump, prompts, generators, frames):
    """Rewards (b,) of clean latents (b,c,f,h,w): of each clip so many random frames, or of whole clips."""
    if not reward.clip:
        order = [torch.randperm(jump.shape[2], generator=g) for g in generators]
        jump = torch.stack([x[:, i[:frames].sort().values] for x, i in zip(jump, order)])
    return score(reward, decode(base, jump, jump.shape[2]), prompts)


@memory_advice("--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp", "smaller --height and --width")
def main(argv=None):
    args = get_args(argv)
    settings = fill(args, args.base, method="videolcm")
    low, high = args.cfg_range or (args.cfg, args.cfg)
    if not low <= args.cfg <= high:
        raise UserError(f"--cfg {args.cfg:g}: outside of --cfg-range {low:g} {high:g}")
    size = args.frames, args.height, args.width
    if args.data:
        data = VideoDataset(args.data, *size, args.read_fps, args.seed)
        rows, previews = data.rows, [data.rows[0][2]]
    else:
        data = TinyWorld(1024, args.frames, args.seed, captions=tiny_prompts())
        rows, previews = "tiny", PREVIEWS
    if args.prompts:
        previews = read_prompts(args.prompts)
    state = check_out(args, "videolcm")
    env = setup(args)
    reward = get_reward(args.reward, env.device, args.reward_weights) if args.reward else None
    dtype = env.dtype if args.rank else torch.float32  # trained weights are kept in fp32
    base = load_base(args.base, args.weights, env.device, dtype)
    texts = [*previews, args.negative, *(row[2] for row in rows if args.data)]
    if reward:
        reward.check(texts)
    base.tokenize(texts)  # a word that the tiny world does not know is refused now

    # ---- teacher, student and target, the moving average of the student
    if args.cfg_range:
        add_guidance(base, GUIDANCE_DIM)
    if args.rank:
        add_lora(base.net, args.rank, args.alpha, args.lora_targets)
        base.freeze(env.dtype, but=["net"])
    else:
        teacher = frozen_copy(base.net, env.dtype, args.parallel, env.device, args.offload)
        base.freeze(env.dtype, but=["net"])
        base.net.requires_grad_(True)
        if base.row.unet.style_image:  # of TF-T2V: not used, and so without a gradient
            base.net.pre_image_condition.requires_grad_(False)
    target = frozen_copy(base.net, None, args.parallel, env.device, args.offload)
    base.net.grad_ckpt = args.grad_ckpt
    net = parallelize(base.net, args.parallel, env.device, args.offload)
    if args.rank:
        teacher = without_lora(net)
    params = trained({"": base.net})
    ema = {k: p for k, p in target.named_parameters() if k in params}
    opt = torch.optim.AdamW(params.values(), args.lr, args.betas, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    start, seen = load_state(args, env, state, params, opt, ema, scaler)
    meta = dict(
        method="videolcm", base=args.base, rank=args.rank, alpha=args.alpha, lora_targets=args.lora_targets,
        guidance_dim=base.row.unet.guidance_dim, sample=settings)
    log = Log(args, env, base.parts(), start)
    if args.cache_latents:
        about = dict(base=args.base, weights=args.weights, size=size, fps=args.read_fps, seed=args.seed,
                     rows=seed_of(rows))
        data = encode_once(Path(args.out, "latents"), data, lambda batch: {
            k: v.half() for k, v in moments(base.vae, batch["video"], env).items()}, about, env, args.workers)
        with torch.no_grad(), env.autocast():
            base.remember([*data.texts(), args.negative, *(p + args.suffix for p in previews)])
    numbers = MySamples(args, env, start, seen)
    batches = read_batches(data, numbers, args.seed, args.workers)
    guard = FiniteGuard(env)
    catch_signals(env)

    for step in range(start, args.steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args)
        total, gained = (torch.zeros((), device=env.device) for _ in range(2))
        for micro in range(args.accum):
            batch = next(batches)
            # all that is random about a sample comes from its number: however the samples are dealt to
            # processes and micro-steps, the run is the same
            mine = numbers[(step - start) * args.accum + micro]
            generators = [generator(args.seed, "sample", i) for i in mine]
            x0 = draw_latents(base.vae, batch, generators, env)
            n = torch.stack([torch.randint(args.origin, (), generator=g) for g in generators])
            noise = randn(x0.shape, generators, env.device)
            scale = torch.stack([low + (high - low) * torch.rand((), generator=g) for g in generators])
            scale = scale.to(env.device)
            with sync_gradients(net, micro == args.accum - 1), env.autocast():
                with torch.no_grad():
                    text, null = base.encode_text(batch["text"]), base.encode_null(args.negative, len(x0))
                told = cond = frame_rate(args, len(x0), env.device)
                if args.cfg_range:
                    told = cond | {"guidance": guidance_embedding(scale, GUIDANCE_DIM)}
                loss, jump = distillation(
                    lambda x, t: net(x, t, text, **told),
                    guided(teacher, text, null, lambda t: scale.view(-1, 1, 1, 1, 1), **cond),
                    lambda x, t: target(x, t, text, **told), base.schedule, x0, noise, n.to(env.device),
                    args.origin)
                gain = torch.zeros_like(loss)
                if reward:
                    gain = reward_of(reward, base, jump, batch["text"], generators, args.reward_frames)
                scaler.scale((loss - gain).mean() / args.accum).backward()
            total += loss.detach().mean() / args.accum
            gained += gain.detach().mean() / args.accum
        norm = guard.step(opt, scaler, params.values(), args.clip, loss=total, reward=gained)
        move_average(ema, params, args.ema)
        seen += args.batch * args.accum * env.world
        log.step(step, loss=total, **({"reward": gained} if reward else {}), grad=norm,
                 lr=opt.param_groups[0]["lr"])

        done, stop = step + 1, agree_to_stop(env)
        if stop or done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, env, done, seen, params, meta, opt, ema, scaler)
        if stop:
            break
        if args.preview_every and (done % args.preview_every == 0 or done == args.steps):
            preview(args, env, base, target, previews, done)
    if env.main:
        keys = ["loss", "reward"] if reward else ["loss", "grad"]
        draw_curve(log.path, Path(args.out, "curve.png"), keys, f"videolcm on {args.base}")
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- previews

def preview(args, env, base, target, prompts, done):
    """The preview prompts by the target in a few steps, always from the same noise -> preview-<step>.png."""
    seeds, clips = [f"preview-{i}" for i in range(len(prompts))], []
    for steps in (k for k in SHOWN if k <= args.origin):
        now = argparse.Namespace(**vars(args) | {"sample_steps": steps})
        clips.append(generate_split(replace(base, net=target), env, prompts, seeds, now))
    if env.main:
        headers = [f"{k} step{'s' * (k > 1)}" for k in SHOWN[:len(clips)]]
        contact_sheet([list(row) for row in zip(*clips)], Path(args.out, f"preview-{done}.png"), prompts,
                      headers=headers)


if __name__ == "__main__":
    run_command(main)
