"""VADER: align a video model by the gradient of a reward (Prabhudesai et al., arXiv 2407.08737).

    J(theta) = E_{text, x_T} [ r(decode(x_0(theta)), text) ],   theta += lr dJ/dtheta   (eq. 1; algorithm 1)

Sample a prompt and noise, run the whole sampler with guidance, decode some frames, ask the reward how good
they are, and go back through the autoencoder and the last K sampler steps into LoRA weights. No data, no
reference model, no KL term: stop early. One loop for every base, with a first frame or without.

    python vader.py --base tiny                               # 2 CPU cores: minutes and result in RESULTS.md
    python vader.py --base tiny --reward size                 # a hand-written reward
    python vader.py --base tiny-i2v                           # clips 3 times as long, a reward over time
    # trained for too long: look at it
    python vader.py --base tiny --reward brightness --lr 1e-3 --steps 60 --preview-every 15 --out out/hacked
    python vader.py --reward hps --weights W --accum 32       # VideoCrafter2, 1 GPU; rewards fetched, or:
    torchrun --nproc_per_node=4 vader.py --reward hps:1.5,aesthetic:0.1 --weights W --reward-weights R
    python vader.py --base modelscope --weights W --prompts P --reward my_reward.py:fn
    torchrun --nproc_per_node=4 vader.py --reward hps --preview-every 50 --watch pickscore --patience 2
    python vader.py --reward pickscore --lora vader_videocrafter_pickscore.pt   # goes on from a public LoRA
    python vader.py ... --resume                              # goes on bit for bit
    python sample.py --ckpt out/vader --prompt "a red circle moving left"

Leaves in --out: ckpt.safetensors (the LoRA), log.jsonl, curve.png, eval.jsonl (rewards of the held-out
prompts, same noise each time, and on the tiny world the judge's word), before.png and after.png,
before/*.mp4 and after/*.mp4, sweep.png (strength of the LoRA against reward and damage), and with --patience
best.safetensors.

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
 - Open-Sora: a frame is decoded in its place. (The original takes one latent out of the middle and decodes
   it as if a clip began there, which the autoencoder has never seen.) ModelScope: LoRA on the attentions (the
   original's injector skips them with the libraries it pins, and takes the convolutions).
 - With a first frame, longer clips (--continue) and rewards over time: in the paper, not in its code.

This file is longer than the other methods' (320 lines): it serves bases with and without a first frame.
"""
import argparse
import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from bases import NETWORKS, base_row, fill, latent_shape, load_base, read_peft_lora
from common import (
    COUNT, DECAY, NATURAL, POSITIVE, REAL, SHARE, UNSIGNED, FiniteGuard, Log, MySamples, Parser,
    UserError, agree_to_stop, append_line, apply_defaults, catch_signals, check_out, draw_curve,
    generator, keep_lines, load_state, lr_at, memory_advice, on_any, read_lines, run_command,
    save_checkpoint, setup, trained, write_atomic)
from data import (
    batch_indices, contact_sheet, open_image, prompt_grid, read_image_prompts, read_prompts,
    write_video)
from diffusion import ddim_updates, randn
from models import add_lora, parallelize, sync_gradients
from pipeline import (
    SAMPLERS, check_sampler, conditions, decode, frame_picture, generate_split, lora_file,
    lora_strengths, rollout)
from rewards import get_reward, score, statistics
from tinyworld import judge_captions, tiny_pairs, tiny_prompts

PROMPTS = Path(__file__).parent / "assets" / "prompts"

# the original's scripts, which name no numbers for CogVideoX and I2VGen-XL
VIDEOCRAFTER2 = dict(frames=12, fps=24, alpha=8.0, wd=0.01, accum=8)
MODELSCOPE = dict(height=384, width=384, sampler="dpmpp", accum=16)
OPENSORA = dict(height=276, width=368, sample_steps=30, alpha=8.0, wd=0.01, accum=8, steps=800,
                lora_targets=["qkv", "q_linear", "kv_linear"])
TINY = dict(
    steps=100, batch=8, accum=1, lr=4e-3, reward="tiny", decode="all", sample_steps=5, rank=8, alpha=8.0,
    eval_n=64, save_every=25, log_every=5, grad_ckpt=False, sweep=16)
# a reward that does not read the prompt pulls every clip the same way: far more effect for a step
TINY_SIMPLE = TINY | dict(steps=30, lr=3e-4, sample_steps=10)
TINY_I2V = TINY | dict(steps=20, lr=2e-3, reward="temporal", more=2, batch=4, eval_n=32, sweep=4)
PRESETS = {
    "videocrafter2": VIDEOCRAFTER2, "opensora": OPENSORA, "tiny-i2v": TINY_I2V, "tiny-cogvideox": TINY_I2V,
    "modelscope": MODELSCOPE, "modelscope-v1.4": MODELSCOPE, "modelscope-v1.5": MODELSCOPE}


def get_args(argv=None):
    p = Parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--base", default="videocrafter2", help="base network (python bases.py lists them)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--lora", metavar="FILE[:SCALE]", help="start from a LoRA (VADER's public files, peft's)")
    p.add_argument("--out", default="out/vader", help="run folder")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    # method
    p.add_argument("--reward", help="of rewards.py, or a sum hps:1.5,aesthetic:0.1, or my_file.py:function")
    p.add_argument("--reward-weights", help="folder with the rewards' public files (default: their hub)")
    p.add_argument("--backprop", default="last", help="sampler steps with gradient: last, last-K, or rand")
    p.add_argument("--decode", default="random",
                   help="frames to reward: random (one), first-middle-last, alt (every 2nd), all, a number")
    p.add_argument("--continue", dest="more", type=NATURAL, default=0, metavar="K",
                   help="with a first frame: K further clips, each from the last frame of the one before")
    p.add_argument("--prompts", help="file of training prompts; with a first frame: image|||caption lines")
    p.add_argument("--activities", help="file of activities; --prompts then holds nouns: a NOUN ACTIVITY")
    p.add_argument("--eval-prompts", help="file of held-out prompts (default: the training ones; tiny: 64)")
    p.add_argument("--eval-n", type=COUNT, default=8, help="held-out prompts used")
    p.add_argument("--negative", help="text of the unconditional branch (default: the base's)")
    # pixels and sampling
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--fps", type=COUNT, help="frame rate as a condition, for bases that take one")
    p.add_argument("--sampler", choices=SAMPLERS, help="default: the base's")
    p.add_argument("--sample-steps", type=COUNT, default=25, help="sampler steps of a rollout")
    p.add_argument("--eta", type=SHARE, help="DDIM noise, 0 deterministic to 1 (default: the base's)")
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
    p.add_argument("--lora-targets", nargs="+", default=["to_q", "to_k", "to_v"], help="layers")
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
    p.add_argument("--watch", metavar="REWARD", help="another reward, only to evaluate the held-out prompts")
    p.add_argument("--patience", type=NATURAL, default=0, metavar="K",
                   help="end when --watch (else --reward) has not risen for K evaluations (0: never)")
    p.add_argument("--sweep", type=NATURAL, default=4, help="held-out prompts of the last picture (0: none)")
    p.add_argument("--log-every", type=COUNT, default=1, help="steps between log lines on the screen")
    p.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    p.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    simple = p.parse_known_args(argv)[0].reward not in (None, "tiny")
    args = apply_defaults(p, argv, PRESETS | {"tiny": TINY_SIMPLE if simple else TINY})
    args.reward = args.reward or "hps"
    if args.rank < 1:
        raise UserError("--rank 0: VADER trains LoRA weights; give a rank of 1 or more")
    if args.patience and not args.preview_every:
        raise UserError("--patience: counts evaluations; give --preview-every STEPS")
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
    if mode == "first-middle-last":
        return sorted({0, frames // 2, frames - 1})
    if mode == "random":
        return [int(torch.randint(frames, (), generator=g))]
    if not mode.isdigit() or int(mode) >= frames:
        raise UserError(f"--decode {mode}: choose random, first-middle-last, alt, all, or a frame number "
                        f"0..{frames - 1}")
    return [int(mode)]


def vader_loss(net, base, env, reward, prompts, images, generators, args, grad_last, frames):
    """-r(decode(x_0), prompt), (b,). images: first frames or Nones; generators: of noise; frames: decoded.

    With --continue the clips make one video: each begins with the last frame of the one before, taken as
    given, and has all but that frame to add.
    """
    shape, videos = latent_shape(base.name, args.frames, args.height, args.width), []
    for k in range(args.more + 1):
        cond, null_cond = conditions(base, env, args, images)
        x_T = randn((len(prompts), *shape), generators, env.device)
        x_0 = rollout(net, base, prompts, x_T, args, generators, cond, null_cond, grad_last=grad_last)
        first = k * (args.frames - 1)  # the clip's place in the video
        chosen = [i - first for i in frames if first + (k > 0) <= i < first + args.frames]
        if chosen:
            videos.append(decode(base, x_0, args.frames, chosen=chosen))
        if k < args.more:
            with torch.no_grad():
                last = decode(base, x_0, args.frames, chosen=[args.frames - 1])
            images = [frame_picture(video[:, 0]) for video in last]
    return -score(reward, torch.cat(videos, dim=2), prompts)


@memory_advice("--decode random", "--backprop last", "--grad-ckpt", "--offload", "smaller --height --width")
def main(argv=None):
    args = get_args(argv)
    settings = fill(args, args.base, method="vader")
    check_sampler(args, base_row(args.base))
    if args.sampler == "lcm":
        raise UserError("--sampler lcm: VADER goes back through ddim, dpmpp, dpm or rflow")
    items, held_out = read_items(args)
    length = args.frames + args.more * (args.frames - 1)
    spacing = {"ddim": args.spacing, "dpm": "cogvideox"}.get(args.sampler)
    updates = len(ddim_updates(args.sample_steps, spacing=spacing)) if spacing else args.sample_steps
    backprop_steps(args.backprop, updates, generator(0))  # a wrong word is refused now, not at the first step
    pick_frames(args.decode, length, generator(0))
    if args.lora:
        with torch.device("meta"):
            net = NETWORKS[type(base_row(args.base).net)](base_row(args.base).net)
        file, strength = lora_file(args.lora)
        lora, args.rank, args.alpha, args.lora_targets = read_peft_lora(net, file)
        lora = {k: v * strength if "lora_B" in k else v for k, v in lora.items()}
    state = check_out(args, "vader")
    env = setup(args)
    reward = get_reward(args.reward, env.device, args.reward_weights)
    watch = get_reward(args.watch, env.device, args.reward_weights) if args.watch else None
    for asked in filter(None, (reward, watch)):
        asked.check([prompt for _, prompt in (*items, *held_out)])
    if reward.clip and args.decode not in ("all", "alt"):
        raise UserError(f"--decode {args.decode}: reward {args.reward} judges whole clips; add --decode all")

    # ---- a frozen base, LoRA branches on its attentions
    base = load_base(args.base, args.weights, env.device, env.dtype)
    add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    if args.lora:
        base.net.load_state_dict(lora, strict=False)
    base.net.grad_ckpt = args.grad_ckpt
    net = parallelize(base.net, args.parallel, env.device, args.offload)
    params = trained({"": net})
    opt = torch.optim.AdamW(params.values(), args.lr, args.betas, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    start, seen = load_state(args, env, state, params, opt, scaler=scaler)
    meta = dict(
        method="vader", base=args.base, rank=args.rank, alpha=args.alpha, lora_targets=args.lora_targets,
        sample=settings)
    texts = [*(p + args.suffix for _, p in (*items, *held_out)), args.negative]
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
        evaluate(args, env, base, reward, watch, held_out, 0, "before")

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
            frames = pick_frames(args.decode, length, generator(args.seed, "frame", mine[0]))
            picked = batch_indices(len(items), mine[0], args.batch, args.seed)
            images, texts = zip(*(items[i] for i in picked))
            generators = [generator(args.seed, "sample", i) for i in mine]
            with sync_gradients(net, micro == args.accum - 1), env.autocast():
                loss = vader_loss(net, base, env, reward, texts, images, generators, args, grad_last, frames)
                scaler.scale(loss.mean() / args.accum).backward()
            total += loss.detach().mean() / args.accum
        norm = guard.step(opt, scaler, params.values(), args.clip, reward=total)
        seen += args.batch * args.accum * env.world
        log.step(step, reward=-total, grad=norm, lr=opt.param_groups[0]["lr"])

        done, stop = step + 1, agree_to_stop(env)
        look = args.preview_every and done % args.preview_every == 0 and done < args.steps
        if stop or done % args.save_every == 0 or done == args.steps or (look and args.patience):
            save_checkpoint(args, env, done, seen, params, meta, opt, scaler=scaler)
        if stop:
            break
        if look and evaluate(args, env, base, reward, watch, held_out, done, f"step-{done}"):
            break
    else:  # not stopped
        evaluate(args, env, base, reward, watch, held_out, args.steps, "after")
    if args.sweep and not stop:
        sweep(args, env, base, reward, held_out[:args.sweep])
    if env.main:
        title = f"VADER on {args.base}, reward {args.reward}"
        draw_curve(log.path, Path(args.out, "curve.png"), ["reward", "grad"], title)
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- prompts and evaluation

def read_items(args):
    """-> training items and held-out items, each (first frame or None, prompt)."""
    row, tiny = base_row(args.base), base_row(args.base).text is None
    if args.more and not row.first_frame:
        raise UserError("--continue: only a base that makes video from a first frame goes on from a frame")
    if args.activities and (row.first_frame or not args.prompts):
        raise UserError("--activities: goes with a file of nouns, --prompts, on a base without a first frame")

    def read(path):
        if not row.first_frame:
            return [(None, prompt) for prompt in read_prompts(path)]
        return [(open_image(image), caption) for image, caption in read_image_prompts(path)]

    def drawn(seed, n):
        clips, captions = tiny_pairs(seed, n, args.frames)
        return [(frame_picture(clip[:, 0]), caption) for clip, caption in zip(clips, captions)]
    if args.activities:
        items = [(None, prompt) for prompt in prompt_grid(args.prompts, args.activities)]
    elif args.prompts:
        items = read(args.prompts)
    elif row.first_frame and not tiny:
        raise UserError("--prompts: give a file of image|||caption lines; this base needs first frames")
    elif row.first_frame:
        items = drawn(1, 256)
    else:
        prompts = tiny_prompts() if tiny else prompt_grid(PROMPTS / "animals.txt", PROMPTS / "activities.txt")
        items = [(None, prompt) for prompt in prompts]
    if args.eval_prompts:
        held_out = read(args.eval_prompts)
    elif args.prompts or not tiny:
        held_out = items[::max(1, len(items) // args.eval_n)]  # from all over the file
    elif row.first_frame:
        held_out = drawn(0, args.eval_n)
    else:
        held_out = [(None, prompt) for prompt in tiny_prompts(held_out=True)]
    return items, held_out[:args.eval_n]


def measured(args, env, reward, videos, prompts):
    """Videos -> their mean reward and its deviation, those of a sum's parts, and the judge's word."""
    row = statistics(reward, videos, prompts, env.device)
    if base_row(args.base).text is None:
        row["judge"] = judge_captions(videos[:, :, :args.frames], prompts)
    return row


@torch.no_grad()
def evaluate(args, env, base, reward, watch, items, step, name):
    """Held-out prompts, always from the same noise -> a line in eval.jsonl, NAME.png and NAME/*.mp4.

    -> True if it is time to end, on every process: no better score for --patience evaluations.
    """
    images, prompts = (list(column) for column in zip(*items))
    seeds = [f"eval-{i}" for i in range(len(prompts))]
    videos = generate_split(base, env, prompts, seeds, args, images, args.more)
    if not env.main:
        return on_any(False, env)
    row = dict(step=step, **measured(args, env, reward, videos, prompts))
    if args.more:  # what is beyond the length that the base was trained to make
        beyond = torch.cat([videos[:, :, :1], videos[:, :, args.frames:]], dim=2)  # after the first frame
        later = statistics(reward, beyond, prompts, env.device)
        row |= {"later": later["reward"], "later_sd": later["reward_sd"]}
    row["watch"] = statistics(watch or reward, videos, prompts, env.device)["reward"]
    file = Path(args.out, "eval.jsonl")
    append_line(file, row)
    words = " ".join(f"{k} {v:.3f}" for k, v in row.get("judge", {}).items())
    print(f"held-out, {name}: reward {row['reward']:.4f} (sd {row['reward_sd']:.4f}) {words}", flush=True)
    contact_sheet(list(videos[:16]), Path(args.out, f"{name}.png"), prompts[:16])
    for i, video in enumerate(videos[:16]):
        write_video(Path(args.out, name, f"{i:04d}.mp4"), video, args.save_fps)
    scores = [r["watch"] for r in read_lines(file)]
    best = max(range(len(scores)), key=scores.__getitem__)
    if args.patience and best == len(scores) - 1 and Path(args.out, "ckpt.safetensors").exists():
        write_atomic(Path(args.out, "best.safetensors"),
                     lambda p: shutil.copy(Path(args.out, "ckpt.safetensors"), p))
    ended = bool(args.patience) and len(scores) - 1 - best >= args.patience
    if ended:
        found = "best.safetensors is the best" if best else "none was better than the base"
        print(f"no better held-out score for {args.patience} evaluations: {found}", flush=True)
    return on_any(ended, env)


def sweep(args, env, base, reward, items):
    """Held-out prompts with the LoRA weaker and stronger than trained -> sweep.jsonl, sweep.png.

    Where the reward still rises but the judge falls (real bases: where the clips leave the base's far
    behind), the reward is being fooled.
    """
    images, prompts = (list(column) for column in zip(*items))
    seeds, file = [f"eval-{i}" for i in range(len(prompts))], Path(args.out, "sweep.jsonl")
    rows, base_videos = [], None
    for strength, videos in lora_strengths(base, env, prompts, seeds, args, images, args.more):
        base_videos = videos if base_videos is None else base_videos  # the first has none of the LoRA
        row = dict(strength=strength, distance=(videos - base_videos).square().mean().sqrt().item())
        row |= measured(args, env, reward, videos, prompts)
        rows.append(row | row.pop("judge", {}))
    if env.main:
        write_atomic(file, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows)))
        damage = "joint" if "joint" in rows[0] else "distance"
        draw_curve(file, Path(args.out, "sweep.png"), ["reward", damage], "strength of the LoRA", "strength")


if __name__ == "__main__":
    run_command(main)
