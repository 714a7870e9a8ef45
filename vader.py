"""VADER: align a video model by the gradient of a reward (Prabhudesai et al., arXiv 2407.08737).

    J(theta) = E_{text, x_T} [ r(decode(x_0(theta)), text) ],   theta += lr dJ/dtheta   (eq. 1; algorithm 1)

Sample a prompt and noise, run the whole sampler with guidance, decode some frames, ask the reward how good
they are, and go back through the autoencoder and the last K sampler steps into LoRA weights. No data, no
reference model, no KL term: stop early.

    python vader.py --base tiny                               # 2 CPU cores: minutes and result in RESULTS.md
    python vader.py --base tiny --reward size                 # a hand-written reward
    # trained for too long: look at it
    python vader.py --base tiny --reward brightness --lr 1e-3 --steps 60 --preview-every 15 --out out/hacked
    python vader.py --base modelscope --weights W --prompts P --reward my_reward.py:fn --accum 16
    torchrun --nproc_per_node=4 vader.py --base modelscope --weights W --prompts P --reward my_reward.py:fn
    python vader.py ... --resume                              # goes on bit for bit
    python sample.py --ckpt out/vader --prompt "a red circle moving left"

Leaves in --out: ckpt.safetensors (the LoRA), log.jsonl, curve.png, eval.jsonl (reward of the held-out
prompts, same noise each time, and on the tiny world the judge's word), before.png and after.png,
before/*.mp4 and after/*.mp4.

Memory: with --backprop last and one decoded frame, one network call (both guidance branches) and one
decoder call hold activations; blocks are recomputed (--grad-ckpt). Peak on an H100, bf16, batch 1, the text
tower gone: ModelScope, 16 frames of 256x256, at most 7.4 GB; VideoCrafter2, 16 of 320x512, 8.7 GB.

Differences from the original code
 - Gradients are averaged over GPUs. (The original samples through `.module`, so DDP never sees a backward
   pass: each GPU trains its own LoRA and rank 0's is saved.) We call the wrapped network;
   tests/test_dist.py compares with one process.
 - Noise and prompts are keyed by (seed, step, sample), not by the clock: runs repeat, and resume is exact.
 - `last` keeps the last solver step, also when the number of steps does not divide 1000 (the original then
   keeps two).
 - Dropout is off in the rollout, as in sampling; the original leaves the UNet in training mode even there.
 - Evaluation is before, after and every --preview-every optimizer steps: once, not once per micro-step.
"""
import argparse
from pathlib import Path

import torch
import torch.distributed as dist

from bases import fill, latent_shape, load_base
from common import (
    COUNT, DECAY, NATURAL, POSITIVE, REAL, SHARE, UNSIGNED, FiniteGuard, Log, MySamples, Parser, UserError,
    agree_to_stop, append_line, apply_defaults, catch_signals, check_out, draw_curve, generator, keep_lines,
    load_state, lr_at, memory_advice, save_checkpoint, setup, trained)
from data import batch_indices, contact_sheet, read_prompts, tiny_prompts, write_video
from diffusion import ddim, ddim_timesteps, guided, randn
from metrics import judge_captions
from models import add_lora, parallelize, sync_gradients
from rewards import get_reward, score
from sample import frame_rate, generate_split

TINY = dict(
    steps=100, batch=8, accum=1, lr=4e-3, reward="tiny", decode="all", sample_steps=5, rank=8, alpha=8.0,
    eval_n=64, save_every=25, log_every=5, grad_ckpt=False)
# a reward that does not read the prompt pulls every clip the same way: far more effect for a step
TINY_SIMPLE = TINY | dict(steps=30, lr=3e-4, sample_steps=10)


def get_args(argv=None):
    p = Parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--base", default="modelscope", help="base network (python bases.py lists them)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--out", default="out/vader", help="run folder")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    # method
    p.add_argument("--reward", help="a reward of rewards.py (default: brightness), or my_file.py:function")
    p.add_argument("--backprop", default="last", help="sampler steps with gradient: last, last-K, or rand")
    p.add_argument("--decode", default="random", help="frames to reward: random (one), all, alt, or a number")
    p.add_argument("--prompts", help="file of training prompts (tiny: 440 captions)")
    p.add_argument("--eval-prompts", help="file of held-out prompts (default: the training ones; tiny: 64)")
    p.add_argument("--eval-n", type=COUNT, default=8, help="held-out prompts used")
    p.add_argument("--negative", help="text of the unconditional branch (default: the base's)")
    # pixels and sampling
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--fps", type=COUNT, help="frame rate as a condition, for bases that take one")
    p.add_argument("--sample-steps", type=COUNT, default=25, help="sampler steps of a rollout")
    p.add_argument("--eta", type=SHARE, default=0.0, help="DDIM noise, 0 deterministic to 1")
    p.add_argument("--cfg", type=REAL, help="guidance u + cfg (c - u) (default: the base's)")
    # optimisation
    p.add_argument("--steps", type=COUNT, default=450, help="optimizer steps")
    p.add_argument("--batch", type=COUNT, default=1, help="prompts a process and micro-step")
    p.add_argument("--accum", type=COUNT, default=16, help="micro-steps a step")
    p.add_argument("--lr", type=POSITIVE, default=2e-4, help="learning rate")
    p.add_argument("--wd", type=UNSIGNED, default=0.0, help="weight decay")
    p.add_argument("--betas", type=DECAY, nargs=2, default=(0.9, 0.999), help="AdamW betas")
    p.add_argument("--lr-schedule", choices=("constant", "cosine", "cosine-restarts"), default="constant")
    p.add_argument("--warmup", type=NATURAL, default=0, help="steps of linear warm-up")
    p.add_argument("--clip", type=POSITIVE, default=1.0, help="largest gradient norm")
    p.add_argument("--rank", type=NATURAL, default=16, help="LoRA rank")
    p.add_argument("--alpha", type=POSITIVE, default=16.0, help="LoRA branches are scaled by alpha / rank")
    p.add_argument("--lora-targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="layers")
    # machine
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on GPU, fp32 on CPU")
    p.add_argument("--grad-ckpt", action=yes_no, default=True, help="recompute blocks backward: less memory")
    p.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="full copies, or shards")
    p.add_argument("--offload", action="store_true", help="activations (fsdp: weights too) wait on the CPU")
    # run
    p.add_argument("--seed", type=NATURAL, default=0, help="seed")
    p.add_argument("--save-every", type=COUNT, default=50, help="steps between checkpoints")
    p.add_argument("--keep", type=COUNT, default=1, help="checkpoints kept")
    p.add_argument("--preview-every", type=NATURAL, default=0, help="steps between evaluations (0: two)")
    p.add_argument("--log-every", type=COUNT, default=1, help="steps between log lines on the screen")
    p.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    p.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    simple = p.parse_known_args(argv)[0].reward not in (None, "tiny")
    args = apply_defaults(p, argv, {"tiny": TINY_SIMPLE if simple else TINY})
    args.reward = args.reward or "brightness"
    if args.base != "tiny" and not args.prompts:
        raise UserError("--prompts: give a file of training prompts, a line each")
    if args.rank < 1:
        raise UserError("--rank 0: VADER trains LoRA weights; give a rank of 1 or more")
    return args


# ---- the method

def backprop_steps(mode, updates, g):
    """How many of the last sampler updates carry gradient: "last" 1, "last-K" K, "rand" any of 1..updates."""
    if mode == "rand":
        return int(torch.randint(1, updates + 1, (), generator=g))
    k = "1" if mode == "last" else mode.removeprefix("last-")
    if not k.isdigit() or not 1 <= int(k) <= updates:
        raise UserError(f"--backprop {mode}: choose last, rand, or last-K with K in 1..{updates}")
    return int(k)


def pick_frames(mode, frames, g):
    """Numbers of the frames to decode and reward."""
    if mode in ("all", "alt"):
        return list(range(0, frames, 2 if mode == "alt" else 1))
    if mode == "random":
        return [int(torch.randint(frames, (), generator=g))]
    if not mode.isdigit() or int(mode) >= frames:
        raise UserError(f"--decode {mode}: choose random, all, alt, or a frame number 0..{frames - 1}")
    return [int(mode)]


def vader_loss(net, base, reward, prompts, x_T, generators, args, grad_last, frames):
    """-r(decode(x_0), prompt), (b,). x_T (b,c,f,h,w) noise, generators: DDIM's noise, frames: to decode."""
    with torch.no_grad():
        text, null = base.encode_text(prompts), base.encode_text([args.negative] * len(prompts))
    fn = guided(net, text, null, args.cfg, **frame_rate(args, len(x_T), x_T.device))
    x_0 = ddim(fn, x_T, base.schedule, args.sample_steps, args.eta, generators, grad_last, args.spacing)
    return -score(reward, base.vae.decode(x_0, frames=frames), prompts)


@memory_advice("--decode random", "--backprop last", "--grad-ckpt", "--offload", "smaller --height --width")
def main(argv=None):
    args = get_args(argv)
    prompts = read_prompts(args.prompts) if args.prompts else tiny_prompts()
    if args.eval_prompts:
        held_out = read_prompts(args.eval_prompts)
    else:
        held_out = prompts if args.prompts else tiny_prompts(held_out=True)
    settings = fill(args, args.base, method="vader")
    shape = latent_shape(args.base, args.frames, args.height, args.width)
    updates = len(ddim_timesteps(args.sample_steps, spacing=args.spacing))
    backprop_steps(args.backprop, updates, generator(0))  # a wrong word is refused now, not at the first step
    pick_frames(args.decode, args.frames, generator(0))
    state = check_out(args, "vader")
    env = setup(args)
    reward = get_reward(args.reward, env.device)
    if getattr(reward, "clip", False) and args.decode != "all":
        raise UserError(f"--decode {args.decode}: reward {args.reward} judges whole clips; add --decode all")

    # ---- a frozen base, LoRA branches on its attentions
    base = load_base(args.base, args.weights, env.device, env.dtype)
    add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    base.net.grad_ckpt = args.grad_ckpt
    net = parallelize(base.net, args.parallel, env.device, args.offload)
    params = trained({"": net})
    opt = torch.optim.AdamW(params.values(), args.lr, args.betas, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    start, seen = load_state(args, env, state, params, opt, scaler=scaler)
    meta = dict(
        method="vader", base=args.base, rank=args.rank, alpha=args.alpha, lora_targets=args.lora_targets,
        sample=settings)
    texts = [*prompts, *(p + args.suffix for p in held_out[:args.eval_n]), args.negative]
    base.tokenize(texts)  # a word that the tiny world does not know is refused now
    log = Log(args, env, base.parts(), start)
    with torch.no_grad(), env.autocast():  # every text once; then the text tower goes
        base.remember(texts)
    numbers = MySamples(args, env, start, seen)
    guard = FiniteGuard(env)
    catch_signals(env)
    if env.main:
        keep_lines(Path(args.out, "eval.jsonl"), min(start + 1, args.steps) if state else 0)
    if not state:
        evaluate(args, env, base, reward, held_out, 0, "before")

    # ---- algorithm 1
    for step in range(start, args.steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args)
        total = torch.zeros((), device=env.device)
        for micro in range(args.accum):
            # prompts, noise and the frame by the sample's number in the run: however the samples are dealt to
            # processes and micro-steps, the run is the same
            mine = numbers[(step - start) * args.accum + micro]
            grad_last = backprop_steps(args.backprop, updates, generator(args.seed, step, "depth"))
            frames = pick_frames(args.decode, args.frames, generator(args.seed, "frame", mine[0]))
            texts = [prompts[i] for i in batch_indices(len(prompts), mine[0], args.batch, args.seed)]
            generators = [generator(args.seed, "sample", i) for i in mine]
            x_T = randn((args.batch, *shape), generators, env.device)
            with sync_gradients(net, micro == args.accum - 1), env.autocast():
                loss = vader_loss(net, base, reward, texts, x_T, generators, args, grad_last, frames)
                scaler.scale(loss.mean() / args.accum).backward()
            total += loss.detach().mean() / args.accum
        norm = guard.step(opt, scaler, params.values(), args.clip, reward=total)
        seen += args.batch * args.accum * env.world
        log.step(step, reward=-total, grad=norm, lr=opt.param_groups[0]["lr"])

        done, stop = step + 1, agree_to_stop(env)
        if stop or done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, env, done, seen, params, meta, opt, scaler=scaler)
        if stop:
            break
        if args.preview_every and done % args.preview_every == 0 and done < args.steps:
            evaluate(args, env, base, reward, held_out, done, f"step-{done}")
    else:  # not stopped
        evaluate(args, env, base, reward, held_out, args.steps, "after")
    if env.main:
        title = f"VADER on {args.base}, reward {args.reward}"
        draw_curve(log.path, Path(args.out, "curve.png"), ["reward", "grad"], title)
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def evaluate(args, env, base, reward, prompts, step, name):
    """Held-out prompts, always from the same noise -> a line in eval.jsonl, NAME.png and NAME/*.mp4."""
    prompts = prompts[:args.eval_n]
    videos = generate_split(base, env, prompts, [f"eval-{i}" for i in range(len(prompts))], args)
    if not env.main:
        return
    parts = [score(reward, videos[i:i + 8].to(env.device), prompts[i:i + 8])
             for i in range(0, len(videos), 8)]
    rewards = torch.cat(parts).cpu()
    row = dict(step=step, reward=rewards.mean().item(), reward_sd=rewards.std(unbiased=False).item())
    if args.base == "tiny":
        row["judge"] = judge_captions(videos, prompts)
    append_line(Path(args.out, "eval.jsonl"), row)
    words = " ".join(f"{k} {v:.3f}" for k, v in row.get("judge", {}).items())
    print(f"held-out, {name}: reward {row['reward']:.4f} (sd {row['reward_sd']:.4f}) {words}", flush=True)
    contact_sheet(list(videos[:16]), Path(args.out, f"{name}.png"), prompts[:16])
    for i, video in enumerate(videos[:16]):
        write_video(Path(args.out, name, f"{i:04d}.mp4"), video, args.save_fps)


if __name__ == "__main__":
    main()
