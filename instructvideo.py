"""InstructVideo: reward fine-tuning as editing (Yuan et al., arXiv 2312.12490).

    J(theta) = E_{clip, eps} [ mean_s w(i_s) r(frame i_s of decode(x_0(theta)), text) ]
    w(i) = exp(-lambda |i - f/2|),   loss = 1 - J

Sampling a whole clip for a single reward is expensive. Instead, add noise to a real clip
up to the step where 0.6 of the sampler's updates are left, let these updates edit it with
guidance, decode a random frame from each of 4 segments (SegVR), and backpropagate through
the last update into LoRA weights. The farther a frame is from the middle, the less it
counts (TAR): with equal weights, a clip of one repeated picture would score best.

    python instructvideo.py --base tiny                    # 2 CPU cores, minutes
    python instructvideo.py --base tiny --reward size      # a hand-written reward
    python instructvideo.py --weights W --data clips.csv --reward-weights R   # one GPU
    torchrun --nproc_per_node=4 instructvideo.py --weights W --data clips.csv
    python instructvideo.py --lora instructvideo.pth --weights W --data clips.csv
    python instructvideo.py ... --resume                   # continue, bit for bit
    python sample.py --ckpt out/instructvideo --prompt "a red circle moving left"

Writes to --out: ckpt.safetensors (the LoRA), log.jsonl, curve.png, eval.jsonl (rewards
of held-out prompts, always from the same pure noise, and the judge's verdict on tiny
bases), before.png and after.png with their clips, and rewards.jsonl (every sample's
reward, and its advantage: by how many standard deviations it beats its caption's recent
rewards). Rewards vary more across captions than over training: watch the mean advantage.

Differences from the original code (the others: docs/differences/instructvideo.md)
 - Dropout is off in the chain, as in sampling, and gradients are clipped (--clip).
 - Each process reads its own clips, shuffled, of exactly --frames frames. (The original's
   processes all read the same clips, in order.)
 - Randomness is keyed by the sample's number, not the clock, so runs repeat and resume
   exactly.
"""
from common import Parser, Run, UserError, run_command, trained  # first: for signals
from collections import defaultdict, deque
from dataclasses import replace

import numpy as np
import torch

from bases import choose_sampling, start_base
from data import read_batches
from diffusion import randn, sampler_updates
from models import add_lora, parallelize, start_from_lora
from pipeline import decode, evaluate_reward, read_captioned, rollout
from rewards import get_reward, score
from weights import lora_file

# The published run: 16 frames of 256x256 from 880 clips of animals.
PAPER = dict(
    base="modelscope-v1.4", out="out/instructvideo", reward="hps=v2.0", read_fps=8.0,
    sample_steps=20, partial=0.6, eta=0.0, offset_noise=0.1, segments=4, attenuation=1.0,
    steps=20000, batch=2, lr=1e-5, warmup=10, rank=4, alpha=4.0, history=16, min_history=16)
TINY = dict(
    reward="tiny", sample_steps=5, offset_noise=0.0, steps=40, batch=8, lr=2e-3, warmup=0,
    rank=8, alpha=8.0, eval_n=64, save_every=25, log_every=5, grad_ckpt=False, workers=0,
    min_history=2)
# A reward that ignores the prompt pulls every clip the same way: each step does far more.
TINY_PROMPTLESS = dict(steps=30, lr=3e-4)
# ours: nobody published a run on flow matching
OPENSORA = dict(offset_noise=0.0, read_fps=24.0, lora_targets=["qkv", "q_linear", "kv_linear"])
WAN = dict(frames=33, offset_noise=0.0, read_fps=16.0, lora_targets=["q", "k", "v", "o"])
PRESETS = {
    "opensora": OPENSORA, "wan2.1-t2v-1.3b": WAN, "wan2.1-t2v-14b": WAN,
    "wan2.2-ti2v-5b": WAN | dict(read_fps=24.0)}


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base")
    p.add_argument("--lora", metavar="FILE[:SCALE]",
                   help="start from InstructVideo's public LoRA file")
    p.options("reward")
    p.add_argument("--backprop", type=p.BACKPROP, default=1,
                   help="sampler updates that record gradients: last, last-K, or rand (1 to all) "
                        "(default: last; rand is refused here)")
    p.add_argument("--partial", type=p.SHARE,
                   help="share of --sample-steps left where clips are noised to")
    p.add_argument("--offset-noise", type=p.UNSIGNED,
                   help="strength of noise that all pixels of a frame share: it teaches brightness")
    p.add_argument("--segments", type=p.COUNT,
                   help="equal parts of a clip; one random frame of each is rewarded")
    p.add_argument("--attenuation", type=p.UNSIGNED,
                   help="lambda in exp(-lambda |i - f/2|), the weight of frame i")
    p.add_argument("--history", type=p.COUNT,
                   help="recent rewards kept per caption, for advantages")
    p.add_argument("--min-history", type=p.COUNT,
                   help="captions with fewer rewards are compared with the whole step")
    p.options("data", without=("--cache-latents", "--drop-text"))
    p.options("pixels sampling optimisation lora machine evaluation run")

    promptless = p.parse_known_args(argv)[0].reward not in (None, "tiny")
    tiny = TINY | TINY_PROMPTLESS if promptless else TINY
    tiny_wan = tiny | dict(lora_targets=WAN["lora_targets"])
    args = p.parse(argv, PAPER, PRESETS | {"tiny": tiny, "tiny-wan": tiny_wan})
    if args.rank < 1:
        raise UserError("--rank 0: InstructVideo trains LoRA weights; give a rank of 1 or more")
    if args.backprop == "rand":
        raise UserError("--backprop rand: InstructVideo takes last or last-K")
    return args


def changed_defaults(args):
    """What the log must say where --reward changed other defaults (TINY_PROMPTLESS), or None."""
    if args.base not in ("tiny", "tiny-wan") or args.reward == "tiny":
        return None
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in TINY_PROMPTLESS.items()]
    return f"--reward {args.reward}: defaults for rewards other than tiny: {', '.join(flags)}"


# ---- the method

def partial_chain(schedule, chain, partial):
    """-> (t, n): the step that clips are noised to, and the number of updates from there."""
    n = int(partial * chain.sample_steps)
    updates = sampler_updates(
        schedule, chain.sample_steps, chain.size, chain.spacing, chain.sampler)
    return updates[-n][0], n


def noise_clips(base, env, video, generators, chain, t, offset):
    """Clips (b,3,f,h,w) in [-1,1] -> x_t, their latents (b,c,f',h',w') noised to step t.

    offset: strength of the noise that all pixels of a latent frame share.
    """
    shape = len(video), *base.latent_shape(chain)
    encoder_noise = randn(shape, generators, env.device)
    with torch.no_grad():  # x_0 is a sample of the encoder's Gaussian, not its mean
        x_0 = base.vae.encode(video.to(env.device, env.dtype), encoder_noise).float()
    noise = randn(shape, generators)
    noise = noise + offset * randn((*shape[:3], 1, 1), generators)
    return base.schedule.add_noise(x_0, noise.to(x_0), t)


def segment_frames(frames, segments, g):
    """i_s: a random frame of each segment, drawn from g. As published, a segment has
    frames // segments frames; those left over at the end are never drawn."""
    span = frames // segments
    return [s * span + int(torch.randint(span, (), generator=g)) for s in range(segments)]


def segmental_reward(reward, base, latents, prompts, frames, chosen, attenuation):
    """mean_s w(i_s) r(frame i_s), (b,), with w(i) = exp(-attenuation |i - frames // 2|).

    latents: x_0 (b,c,f',h',w'); frames: of a clip; chosen: the i_s of each clip, a list
    of lists. A reward that judges whole clips gets them, with weight 1.
    """
    if reward.clip:
        return score(reward, decode(base, latents, frames), prompts)
    shown = torch.cat([decode(base, z[None], frames, chosen=i)
                       for z, i in zip(latents, chosen)])
    b, s = shown.shape[0], shown.shape[2]                     # shown: b 3 s h w
    alone = shown.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (b s) 3 1 h w
    each_prompt = [prompt for prompt in prompts for _ in range(s)]
    rewards = score(reward, alone, each_prompt).view(b, s)
    distance = (torch.tensor(chosen, device=rewards.device) - frames // 2).abs()
    return (torch.exp(-attenuation * distance) * rewards).mean(1)


def instructvideo_loss(net, base, env, reward, video, prompts, generators, chain, args):
    """1 - mean_s w(i_s) r(frame i_s of decode(x_0(theta))), (b,), of real clips.

    The gradient is cut here: of the n updates that edit x_t into x_0, the first n - k run
    without recording (k: --backprop), so the state they end in is a constant, and
    dx_0/dtheta reaches back through the last k network calls only.

    video (b,3,f,h,w) in [-1,1], with its captions as prompts; generators: one per clip.
    """
    f, h, w = video.shape[2:]
    chain = replace(chain, frames=f, height=h, width=w)  # --buckets
    t, n = partial_chain(base.sampling_schedule(chain), chain, args.partial)
    x_t = noise_clips(base, env, video, generators, chain, t, args.offset_noise)
    chosen = [segment_frames(chain.frames, args.segments, g) for g in generators]
    x_0 = rollout(net, base, prompts, x_t, chain, generators, grad_last=args.backprop,
                  last=n)
    return 1 - segmental_reward(
        reward, base, x_0, prompts, chain.frames, chosen, args.attenuation)


class PromptStatistics:
    """Advantages of rewards over the recent ones of the same prompt (Black et al., arXiv
    2305.13301)."""

    def __init__(self, history, min_history, rows=()):
        """rows: of rewards.jsonl, if a run is resumed."""
        self.min_history = min_history
        self.past = defaultdict(lambda: deque(maxlen=history))
        for row in rows:
            self.past[row["prompt"]].append(row["reward"])

    def update(self, prompts, rewards):
        """Add a step's rewards. -> (reward - mean) / sd for each, over its prompt's past.

        A prompt with fewer than min_history rewards takes the mean and sd of the step.
        """
        for prompt, value in zip(prompts, rewards):
            self.past[prompt].append(value)
        own = [self.past[prompt] for prompt in prompts]
        pasts = [past if len(past) >= self.min_history else rewards for past in own]
        return [float((value - np.mean(past)) / (np.std(past) + 1e-6))
                for value, past in zip(rewards, pasts)]


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="instructvideo")
    chain = editing_chain(args, sampling)
    data, captions, held_out = read_captioned(args, sampling)
    lora = lora_file(args.lora) if args.lora else None
    run = Run(args, "instructvideo")
    reward = get_reward(args.reward, run.device, args.reward_weights, run.out)
    prompts = [*captions, *(prompt for _, prompt in held_out)]
    reward.check(prompts)

    run.say(changed_defaults(args))

    # a frozen base, LoRA branches on its attentions
    base = start_base(run, run.dtype, frozen=args.frozen)
    texts = [*(prompt + sampling.suffix for prompt in prompts), sampling.negative]
    base.tokenize(texts)  # refuses words that the tiny world does not know
    add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    for key, p in base.net.named_parameters():
        if key.endswith("lora_A.weight"):  # larger than peft's, so that --lr can be small
            torch.nn.init.normal_(p, std=1 / args.rank)
    if lora:
        start_from_lora(base.net, *lora)
    base.net.grad_ckpt = args.grad_ckpt
    net = parallelize(base.net, args, run.device)
    params = trained({"": net})
    opt = run.adamw(params.values())
    meta = dict(sample=sampling.metadata())
    run.attach(opt, params, [net], base.parts(), meta)
    base.remember(texts, run.env)  # every text is encoded once; then the text tower goes
    batches = read_batches(data, run.numbers, args.seed, args.workers)
    past = run.earlier("rewards.jsonl")
    statistics = PromptStatistics(args.history, args.min_history, past)

    def evaluate(name):
        evaluate_reward(run, base, sampling, reward, held_out, name)
    if not run.resumed:
        evaluate("before")
    for _ in run.steps():
        rows = []
        for numbers in run.micro_steps():
            batch = next(batches)
            with run.forward():
                loss = instructvideo_loss(
                    net, base, run.env, reward, batch["video"], batch["text"],
                    run.generators(numbers), chain, args)
            run.backward(loss, reward=1 - loss)
            rows += zip(numbers, batch["text"], (1 - loss.detach()).tolist())
        run.update(**note_rewards(run, rows, statistics))
        if run.preview_due:
            evaluate(f"step-{run.done}")
    if not run.stopped:
        evaluate("after")
    run.finish("reward", "advantage", "grad")


# ---- what is checked before any work, and what is logged

def editing_chain(args, sampling):
    """-> the settings of the chain that edits clips; refuses options that do not fit it."""
    chain = sampling
    if sampling.sampler == "dpm":  # CogVideoX-5B's, which can only start from pure noise
        chain = replace(sampling, sampler="ddim", spacing="cogvideox")
    n = int(args.partial * chain.sample_steps)
    if args.backprop > n:
        raise UserError(f"--partial {args.partial:g} of {chain.sample_steps} steps is {n}: "
                        f"--backprop last-{args.backprop} needs as many")
    if args.segments > chain.frames:
        raise UserError(f"--segments {args.segments}: a clip has {chain.frames} frames")
    return chain


def note_rewards(run, rows, statistics):
    """A step's (sample, caption, reward) of this process -> figures of all samples, to be
    logged. Every sample becomes a line of rewards.jsonl."""
    samples, prompts, rewards = zip(*run.gather(rows))
    advantages = statistics.update(prompts, rewards)
    columns = dict(sample=samples, prompt=prompts, reward=rewards, advantage=advantages)
    lines = [dict(zip(columns, row)) for row in zip(*columns.values())]
    run.append("rewards.jsonl", lines)
    return dict(reward_sd=np.std(rewards), advantage=np.mean(advantages))


if __name__ == "__main__":
    run_command(main, "--segments 1", "--backprop last", "--batch 1", "--grad-ckpt", "--offload",
                "smaller --height and --width", "fewer --frames")
