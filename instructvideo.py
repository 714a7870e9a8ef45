"""InstructVideo: reward fine-tuning as editing (Yuan et al., arXiv 2312.12490).

    J(theta) = E_{clip, text, eps} mean_s [ exp(-lambda |i_s - f/2|) r(frame i_s of decode(x_0), text) ]
    x_0 = x_0(theta): the clip noised part-way, brought back by the rest of the sampler  (the released form)

Sampling a whole clip for one reward is dear. Instead noise a real clip to the step where 0.6 of DDIM is left,
let that rest bring it back with guidance, decode a random frame of each of 4 segments, and go back through
the last update into LoRA weights. The farther a frame is from the middle of the clip, the less it counts:
full marks for every frame would reward a slide show of one.

    python instructvideo.py --base tiny                       # 2 CPU cores: minutes and result in RESULTS.md
    python instructvideo.py --base tiny --reward size         # a hand-written reward of single frames
    python instructvideo.py --weights W --data clips.csv --reward-weights R    # HPS v2.0, 1 GPU
    torchrun --nproc_per_node=4 instructvideo.py --weights W --data clips.csv
    python instructvideo.py --lora instructvideo.pth --weights W --data clips.csv --reward hps,aesthetic:0.1
    python instructvideo.py ... --resume                      # goes on bit for bit
    python sample.py --ckpt out/instructvideo --prompt "a red circle moving left"

Leaves in --out what vader.py leaves (eval.jsonl: held-out prompts from pure noise, always the same), and
rewards.jsonl: each sample's (attenuated) reward and its advantage, by how many standard deviations it beats
its caption's last ones. Captions differ by more than training changes: a mean advantage above 0 is progress.
A reward that judges whole clips gets all frames, unweighted.

Differences from the original code
 - Dropout is off in the chain, as in sampling. Gradients are clipped to a norm of --clip.
 - Each process reads clips of its own, shuffled (original: all the same ones, in order, but for --debug), of
   exactly the frames asked for. All randomness is keyed by the sample's number: resume is exact.
 - The reward resizes frames as it does everywhere (original: HPS without antialiasing).
 - Statistics of rewards go by caption. Left out: the two objectives they were for (reward-weighted, policy
   gradient; no training loop), the weight by the denoising loss (off), the moving average (never saved).
"""
import argparse
from collections import defaultdict, deque
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from bases import base_row, fill, latent_shape, load_base, start_from_lora
from common import (
    COUNT,
    DECAY,
    NATURAL,
    POSITIVE,
    REAL,
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
    gather_rows,
    generator,
    keep_lines,
    load_state,
    lr_at,
    memory_advice,
    read_lines,
    run_command,
    save_checkpoint,
    setup,
    trained,
)
from data import VideoDataset, contact_sheet, read_batches, read_prompts, write_video
from diffusion import ddim_updates, offset_noise, randn
from models import add_lora, parallelize, sync_gradients
from pipeline import generate_split, lora_file, rollout
from rewards import get_reward, score, statistics
from tinyworld import TinyWorld, judge_captions, tiny_prompts

TINY = dict(
    steps=100, batch=8, lr=4e-3, warmup=0, reward="tiny", sample_steps=5, rank=8, alpha=8.0, offset_noise=0.0,
    min_history=2, workers=0, eval_n=64, save_every=25, log_every=5, grad_ckpt=False)
# a reward that does not read the prompt pulls every clip the same way: far more effect for a step
TINY_SIMPLE = TINY | dict(steps=30, lr=3e-4)


def get_args(argv=None):
    p = Parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--base", default="modelscope-v1.4", help="base network (python bases.py lists them)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--lora", metavar="FILE[:SCALE]", help="start from InstructVideo's public file")
    p.add_argument("--out", default="out/instructvideo", help="run folder")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    # data
    p.add_argument("--data", help="clips and captions: folder, csv, jsonl or VGen list (tiny: procedural)")
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--fps", type=COUNT, help="frame rate as a condition, for bases that take one")
    p.add_argument("--read-fps", type=POSITIVE, default=8.0, help="rate at which clips are read")
    p.add_argument("--eval-prompts", help="file of held-out prompts (default: captions; tiny: 64 others)")
    p.add_argument("--eval-n", type=COUNT, default=8, help="held-out prompts used")
    p.add_argument("--negative", help="text of the unconditional branch (default: the base's)")
    # method
    p.add_argument("--reward", help="of rewards.py (default: hps=v2.0), a sum a:1.5,b:0.1, or my_file.py:fn")
    p.add_argument("--reward-weights", help="folder with the rewards' public files (default: their hub)")
    p.add_argument("--sample-steps", type=COUNT, default=20, help="DDIM steps of a whole chain")
    p.add_argument("--partial", type=SHARE, default=0.6, help="share of these steps that is run")
    p.add_argument("--grad-last", type=COUNT, default=1, help="last steps that record gradients")
    p.add_argument("--eta", type=SHARE, default=0.0, help="DDIM noise, 0 deterministic to 1")
    p.add_argument("--cfg", type=REAL, help="guidance u + cfg (c - u) (default: the base's)")
    p.add_argument("--offset-noise", type=UNSIGNED, default=0.1, help="noise shared by a frame (VGen: 0.1)")
    p.add_argument("--segments", type=COUNT, default=4, help="segments of a clip, one frame of each rewarded")
    p.add_argument("--attenuation", type=UNSIGNED, default=1.0, help="lambda: how fast the weight falls")
    p.add_argument("--history", type=COUNT, default=16, help="rewards of a caption kept for its statistics")
    p.add_argument("--min-history", type=COUNT, default=16, help="with fewer, the step's own are taken")
    # optimisation
    p.add_argument("--steps", type=COUNT, default=20000, help="optimizer steps")
    p.add_argument("--batch", type=COUNT, default=2, help="clips a process and micro-step")
    p.add_argument("--accum", type=COUNT, default=1, help="micro-steps a step")
    p.add_argument("--lr", type=POSITIVE, default=1e-5, help="learning rate")
    p.add_argument("--wd", type=UNSIGNED, default=0.0, help="weight decay")
    p.add_argument("--betas", type=DECAY, nargs=2, default=(0.9, 0.999), help="AdamW betas")
    p.add_argument("--lr-schedule", choices=("constant", "cosine", "cosine-restarts"), default="constant")
    p.add_argument("--warmup", type=NATURAL, default=10, help="steps of linear warm-up")
    p.add_argument("--clip", type=POSITIVE, default=1.0, help="largest gradient norm")
    p.add_argument("--rank", type=NATURAL, default=4, help="LoRA rank")
    p.add_argument("--alpha", type=POSITIVE, default=4.0, help="LoRA branches are scaled by alpha / rank")
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
    p.add_argument("--save-every", type=COUNT, default=500, help="steps between checkpoints")
    p.add_argument("--keep", type=COUNT, default=1, help="checkpoints kept")
    p.add_argument("--preview-every", type=NATURAL, default=0, help="steps between evaluations (0: two)")
    p.add_argument("--log-every", type=COUNT, default=1, help="steps between log lines on the screen")
    p.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    p.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    simple = p.parse_known_args(argv)[0].reward not in (None, "tiny")
    args = apply_defaults(p, argv, {"tiny": TINY_SIMPLE if simple else TINY})
    args.reward = args.reward or "hps=v2.0"
    if base_row(args.base).text and not args.data:
        raise UserError("--data: give a folder, csv, jsonl or list of clips with captions")
    if args.rank < 1:
        raise UserError("--rank 0: InstructVideo trains LoRA weights; give a rank of 1 or more")
    return args


# ---- the method

def partial_chain(args, num):
    """-> the step, of `num`, that clips are noised to, and the number of DDIM updates from there on."""
    updates, last = ddim_updates(args.sample_steps, num, args.spacing), int(args.partial * args.sample_steps)
    if not args.grad_last <= last:
        raise UserError(f"--partial {args.partial:g} of {args.sample_steps} steps is {last}: "
                        f"--grad-last {args.grad_last} needs as many")
    return updates[-last][0], last


def segment_frames(frames, segments, g):
    """A random frame of each segment; as published those past segments * (frames // segments) never come."""
    span = frames // segments
    return [s * span + int(torch.randint(span, (), generator=g)) for s in range(segments)]


def segmental_reward(reward, vae, latents, prompts, frames, numbers, attenuation):
    """mean_s exp(-attenuation |i_s - frames // 2|) reward(frame i_s), (b,), of latents (b,c,f',h,w).

    frames: of a whole clip; numbers: the i_s of each clip, a list of lists. A reward that judges whole clips
    gets them, unweighted.
    """
    if getattr(reward, "clip", False):
        return score(reward, vae.decode(latents), prompts)
    shown = torch.cat([vae.decode(z[None], frames=i) for z, i in zip(latents, numbers)])  # b 3 s h w
    b, s = shown.shape[0], shown.shape[2]
    alone = shown.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (b s) 3 1 h w: each frame for itself
    rewards = score(reward, alone, [p for p in prompts for _ in range(s)]).view(b, s)
    distance = (torch.tensor(numbers, device=rewards.device) - frames // 2).abs()
    return (torch.exp(-attenuation * distance) * rewards).mean(1)


def instructvideo_loss(net, base, reward, video, prompts, generators, args):
    """1 - the reward of real clips, video (b,3,f,h,w) in [-1,1], edited by the network: (b,)."""
    t, last = partial_chain(args, len(base.schedule.alpha_bar))
    shape = len(video), *latent_shape(base.name, args.frames, args.height, args.width)
    weight = next(base.vae.parameters())
    with torch.no_grad():  # latents are a sample of the encoder's, not its mean
        x0 = base.vae.encode(video.to(weight), randn(shape, generators, weight.device)).float()
    noise = offset_noise(randn(shape, generators), randn((*shape[:3], 1, 1), generators), args.offset_noise)
    x_t = base.schedule.add_noise(x0, noise.to(x0), t)
    numbers = [segment_frames(args.frames, args.segments, g) for g in generators]
    latents = rollout(net, base, prompts, x_t, args, generators, grad_last=args.grad_last, last=last)
    return 1 - segmental_reward(
        reward, base.vae, latents, prompts, args.frames, numbers, args.attenuation)


class PromptStatistics:
    """Advantages of rewards over the last ones of the same prompt (Black et al., arXiv 2305.13301)."""

    def __init__(self, history, min_history):
        self.least, self.past = min_history, defaultdict(lambda: deque(maxlen=history))

    def update(self, prompts, rewards):
        """Rewards of a step -> (reward - mean) / sd for each, of its prompt's history, this step included.

        A prompt with fewer than min_history rewards takes mean and sd of the whole step.
        """
        for prompt, value in zip(prompts, rewards):
            self.past[prompt].append(value)
        known = [self.past[p] if len(self.past[p]) >= self.least else rewards for p in prompts]
        return [float((r - np.mean(past)) / (np.std(past) + 1e-6)) for r, past in zip(rewards, known)]


@memory_advice("--segments 1", "--grad-last 1", "--batch 1", "--grad-ckpt", "--offload",
               "smaller --height --width", "fewer --frames")
def main(argv=None):
    args = get_args(argv)
    settings = fill(args, args.base, method="instructvideo")
    chain = argparse.Namespace(**vars(args))
    if args.sampler == "dpm":  # CogVideoX-5B's, which starts from pure noise alone
        chain.sampler, chain.spacing = "ddim", "cogvideox"
    partial_chain(chain, 1000)  # a wrong number is refused now, not at the first step
    if args.segments > args.frames:
        raise UserError(f"--segments {args.segments}: a clip has {args.frames} frames")
    data = (VideoDataset(args.data, args.frames, args.height, args.width, args.read_fps, args.seed)
            if args.data else TinyWorld(880, args.frames, args.seed, captions=tiny_prompts()))
    captions = list(dict.fromkeys(row[2] for row in data.rows)) if args.data else tiny_prompts()
    others = captions if args.data else tiny_prompts(held_out=True)
    held_out = (read_prompts(args.eval_prompts) if args.eval_prompts else others)[:args.eval_n]
    lora = lora_file(args.lora) if args.lora else None
    state = check_out(args, "instructvideo")
    env = setup(args)
    reward = get_reward(args.reward, env.device, args.reward_weights)
    reward.check([*captions, *held_out])

    # ---- a frozen base, LoRA branches on its attentions
    base = load_base(args.base, args.weights, env.device, env.dtype)
    add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    for key, p in base.net.named_parameters():
        if key.endswith("lora_A.weight"):  # as published: far larger than peft's, so that --lr can be small
            torch.nn.init.normal_(p, std=1 / args.rank)
    if lora:
        start_from_lora(base.net, *lora)
    base.net.grad_ckpt = args.grad_ckpt
    net = parallelize(base.net, args.parallel, env.device, args.offload)
    params = trained({"": net})
    opt = torch.optim.AdamW(params.values(), args.lr, args.betas, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    start, seen = load_state(args, env, state, params, opt, scaler=scaler)
    meta = {k: getattr(args, k) for k in ("base", "rank", "alpha", "lora_targets")}
    meta |= dict(method="instructvideo", sample=settings)
    texts = [*(p + args.suffix for p in (*captions, *held_out)), args.negative]
    base.tokenize(texts)  # a word that the tiny world does not know is refused now
    log = Log(args, env, base.parts(), start)
    with torch.no_grad(), env.autocast():  # every text once; then the text tower goes
        base.remember(texts)
    numbers = MySamples(args, env, start, seen)
    batches = read_batches(data, numbers, args.seed, args.workers)
    history, path = PromptStatistics(args.history, args.min_history), Path(args.out, "rewards.jsonl")
    for _, past in groupby([r for r in read_lines(path) if r["step"] < start], lambda row: row["step"]):
        history.update(*zip(*((row["prompt"], row["reward"]) for row in past)))
    guard = FiniteGuard(env)
    catch_signals(env)
    if env.main:
        keep_lines(path, start)
        keep_lines(Path(args.out, "eval.jsonl"), min(start + 1, args.steps) if state else 0)
    if not state:
        evaluate(args, env, base, reward, held_out, 0, "before")

    # ---- algorithm 1
    for step in range(start, args.steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args)
        total, rows = torch.zeros((), device=env.device), []
        for micro in range(args.accum):
            # all that is random about a sample comes from its number in the run: however the samples are
            # dealt to processes and micro-steps, the run is the same
            batch, mine = next(batches), numbers[(step - start) * args.accum + micro]
            generators = [generator(args.seed, "sample", i) for i in mine]
            with sync_gradients(net, micro == args.accum - 1), env.autocast():
                loss = instructvideo_loss(net, base, reward, batch["video"], batch["text"], generators, chain)
                scaler.scale(loss.mean() / args.accum).backward()
            total += loss.detach().mean() / args.accum
            rows += zip(mine, batch["text"], (1 - loss.detach()).tolist())
        norm = guard.step(opt, scaler, params.values(), args.clip, reward=total)
        seen += args.batch * args.accum * env.world
        values, advantage = note_rewards(path, env, step, rows, history)
        log.step(step, reward=values.mean(), reward_sd=values.std(), advantage=advantage, grad=norm,
                 lr=opt.param_groups[0]["lr"])

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
        title, keys = f"InstructVideo on {args.base}, reward {args.reward}", ["reward", "advantage", "grad"]
        draw_curve(log.path, Path(args.out, "curve.png"), keys, title)
    if dist.is_initialized():
        dist.destroy_process_group()


def note_rewards(path, env, step, rows, history):
    """A step's (number, caption, reward) of this process -> all processes' rewards, their mean advantage.

    A line for each goes into rewards.jsonl, from which a resumed run fills its statistics again.
    """
    numbers, prompts, values = zip(*sorted(gather_rows(rows, env)))
    advantages = history.update(prompts, values)
    for number, prompt, value, advantage in zip(numbers, prompts, values, advantages) if env.main else ():
        append_line(path, dict(step=step, sample=number, prompt=prompt, reward=value, advantage=advantage))
    return np.array(values), float(np.mean(advantages))


@torch.no_grad()
def evaluate(args, env, base, reward, prompts, step, name):
    """Held-out prompts, always from the same noise -> a line in eval.jsonl, NAME.png and NAME/*.mp4."""
    videos = generate_split(base, env, prompts, [f"eval-{i}" for i in range(len(prompts))], args)
    if not env.main:
        return
    row = dict(step=step, **statistics(reward, videos, prompts, env.device))
    if base.row.text is None:
        row["judge"] = judge_captions(videos, prompts)
    append_line(Path(args.out, "eval.jsonl"), row)
    words = " ".join(f"{k} {v:.3f}" for k, v in row.get("judge", {}).items())
    print(f"held-out, {name}: reward {row['reward']:.4f} (sd {row['reward_sd']:.4f}) {words}", flush=True)
    contact_sheet(list(videos[:16]), Path(args.out, f"{name}.png"), prompts[:16])
    for i, video in enumerate(videos[:16]):
        write_video(Path(args.out, name, f"{i:04d}.mp4"), video, args.save_fps)


if __name__ == "__main__":
    run_command(main)
