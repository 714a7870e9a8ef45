"""VADER: align a video model by the gradient of a reward (Prabhudesai et al., arXiv
2407.08737).

    J(theta) = E_{text, x_T} [ r(decode(x_0(theta)), text) ],  theta += lr dJ/dtheta  (eq. 1)

Algorithm 1: sample a prompt and noise, run the whole sampler with guidance, decode some
frames, score them with the reward, and backpropagate through the decoder and the
last K sampler updates into LoRA weights. There is no data, no reference model and no KL
term: stop early.

    python vader.py --base tiny                            # 2 CPU cores, minutes
    python vader.py --base tiny --reward size              # a hand-written reward
    python vader.py --base tiny-i2v                        # from a first frame, longer clips
    python vader.py --base tiny --reward tiny-raw --lr 2e-3 --sample-steps 5 --steps 60
                                      # a reward blind to the prompt, too long: all collapses
    python vader.py --reward hps --weights W --accum 32    # VideoCrafter2 on one GPU
    torchrun --nproc_per_node=4 vader.py --reward hps:1.5,aesthetic:0.1 --weights W
    python vader.py --base modelscope --weights W --prompts P --reward my_reward.py:fn
    python vader.py --reward hps --preview-every 50 --watch pickscore --patience 2
    python vader.py --reward pickscore --lora vader_videocrafter_pickscore.pt
    python vader.py ... --resume                           # continue, bit for bit
    python sample.py --ckpt out/vader --prompt "a red circle moving left"

Writes to --out: ckpt.safetensors (the LoRA), log.jsonl, curve.png, eval.jsonl (rewards
of held-out prompts, always from the same noise, and the judge's verdict on tiny bases),
before.png and after.png with their clips, sweep.png (LoRA strength against reward and
damage), and with --patience best.safetensors.

Memory: with --backprop last and one decoded frame, one sampler update and one decoder
call hold activations. Peak on an H100 in bf16, batch 1, without the text tower: ModelScope,
16 frames of 256x256: 7.4 GB or less; VideoCrafter2, 16 frames of 320x512: 8.7 GB.

Differences from the original code (the others: docs/differences/vader.md)
 - Gradients are averaged over the GPUs. (The original samples through `.module`, so DDP
   never sees a backward pass: each GPU trains its own LoRA, and rank 0's is saved.)
 - Randomness is keyed by the sample's number, not the clock, so runs repeat and resume
   exactly.
 - Dropout is off during the rollout, as in sampling.
 - First frames, --continue and rewards over time are in the paper but not in its code.
"""
from common import Parser, Run, UserError, run_command, trained  # first: for signals
import torch

from bases import choose_sampling, read_lora, start_base
from diffusion import randn
from models import add_lora, parallelize
from pipeline import (
    conditions, decode, evaluate_reward, frame_picture, read_items, rollout, sweep_lora)
from rewards import get_reward, score

# The published scripts (VADER-VideoCrafter, VADER-ModelScope, VADER-Open-Sora), which
# give no numbers for CogVideoX and I2VGen-XL.
PAPER = dict(
    base="videocrafter2", out="out/vader", reward="hps", sample_steps=25,
    steps=450, accum=16, lr=2e-4, save_every=50,
    rank=16, alpha=16.0, lora_targets=["to_q", "to_k", "to_v"])
VIDEOCRAFTER2 = dict(frames=12, fps=24, alpha=8.0, wd=0.01, accum=8)
MODELSCOPE = dict(height=384, width=384, sampler="dpmpp")
OPENSORA = dict(
    height=276, width=368, sample_steps=30, steps=800, accum=8, wd=0.01,
    alpha=8.0, lora_targets=["qkv", "q_linear", "kv_linear"])
TINY = dict(
    reward="tiny", decode="all", sample_steps=5, steps=40, batch=8, accum=1, lr=2e-3,
    rank=8, alpha=8.0, eval_n=64, sweep=16, save_every=25, log_every=5, grad_ckpt=False)
TINY_I2V = TINY | dict(
    steps=20, lr=2e-3, reward="temporal", continuations=2, batch=4, eval_n=32, sweep=4)
# A reward that does not read the prompt pulls every clip the same way, so each step has
# far more effect.
TINY_PROMPTLESS = dict(steps=30, lr=3e-4, sample_steps=10)
WAN = dict(frames=33, lora_targets=["q", "k", "v", "o"])  # ours: there is no published script
PRESETS = {
    "wan2.1-t2v-1.3b": WAN, "wan2.1-t2v-14b": WAN, "wan2.1-i2v-14b-480p": WAN,
    "wan2.1-i2v-14b-720p": WAN, "wan2.2-ti2v-5b": WAN,
    "tiny-wan": TINY | dict(steps=20, lora_targets=WAN["lora_targets"]),
    "videocrafter2": VIDEOCRAFTER2, "opensora": OPENSORA, "modelscope": MODELSCOPE,
    "modelscope-v1.4": MODELSCOPE, "modelscope-v1.5": MODELSCOPE,
    "tiny": TINY, "tiny-clean": TINY, "tiny-i2v": TINY_I2V, "tiny-cogvideox": TINY_I2V}


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base")
    p.add_argument("--lora", metavar="FILE[:SCALE]",
                   help="start from a LoRA file: one of VADER's public ones, or peft's")
    p.options("reward")
    p.add_argument("--backprop", type=p.BACKPROP, default=1,
                   help="sampler updates that record gradients: last, last-K, or rand (1 to all)")
    p.add_argument("--decode", default="random",
                   help="frames to decode and reward: random (one), first-middle-last, alt (every "
                        "second), all, or a frame number")
    p.add_argument("--continue", dest="continuations", type=p.NATURAL, default=0, metavar="K",
                   help="with a first frame: K further clips, each from the last frame of the one "
                        "before")
    p.options("prompts")
    p.add_argument("--watch", metavar="REWARD", help="a second reward, used only to evaluate")
    p.add_argument("--patience", type=p.NATURAL, default=0, metavar="K",
                   help="stop when --watch (else --reward) has not risen for K evaluations; 0: "
                        "never")
    p.add_argument("--sweep", type=p.NATURAL, default=4,
                   help="held-out prompts used for sweep.png; 0: no sweep")
    p.options("pixels sampler sampling optimisation lora machine evaluation run")

    reward, presets = p.parse_known_args(argv)[0].reward, PRESETS
    promptless = reward not in (None, "tiny")
    if promptless:
        presets = PRESETS | dict.fromkeys(("tiny", "tiny-clean"), TINY | TINY_PROMPTLESS)
    args = p.parse(argv, PAPER, presets)
    if args.rank < 1:
        raise UserError("--rank 0: VADER trains LoRA weights; give a rank of 1 or more")
    if args.patience and not args.preview_every:
        raise UserError("--patience: counts evaluations; give --preview-every STEPS")
    return args


def changed_defaults(args):
    """What the log must say where --reward changed other defaults (TINY_PROMPTLESS), or None."""
    if args.base not in ("tiny", "tiny-clean") or args.reward == "tiny":
        return None
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in TINY_PROMPTLESS.items()]
    return f"--reward {args.reward}: defaults for rewards other than tiny: {', '.join(flags)}"


# ---- the method

def updates_with_gradient(backprop, updates, g):
    """K, how many of the last sampler updates record gradients; "rand" draws 1..updates from g."""
    if backprop == "rand":
        return int(torch.randint(1, updates + 1, (), generator=g))
    return backprop


def frames_to_reward(mode, frames, g):
    """Numbers of the frames to decode and reward, of so many; "random" draws from g."""
    if mode in ("all", "alt"):
        return list(range(0, frames, 2 if mode == "alt" else 1))
    if mode == "first-middle-last":
        return sorted({0, frames // 2, frames - 1})
    if mode == "random":
        return [int(torch.randint(frames, (), generator=g))]
    if not mode.isdigit() or int(mode) >= frames:
        raise UserError(f"--decode {mode}: choose random, first-middle-last, alt, all, or a frame "
                        f"number 0..{frames - 1}")
    return [int(mode)]


def roll_out(net, base, env, prompts, images, generators, sampling, k, continuations):
    """Prompts and noise -> x_0, the latents (b,c,f',h',w') of each clip of a video, in a
    list.

    The gradient is cut here: of a sampler's n updates the first n - k run without
    recording, so the state they end in is a constant, and dx_0/dtheta reaches back
    through the last k updates only; each calls the network twice, for guidance. The
    conditions are constants, too: a continuation starts from the last frame of the clip
    before it, as a picture (8-bit pixels), so no gradient flows from clip to clip.

    images: a first frame (Pillow) or None per prompt; generators: one per video, for its
    noise.
    """
    shape, clips = base.latent_shape(sampling), []
    for number in range(continuations + 1):
        cond, null_cond = conditions(base, env, sampling, images)
        x_T = randn((len(prompts), *shape), generators, env.device)
        x_0 = rollout(net, base, prompts, x_T, sampling, generators, cond, null_cond,
                      grad_last=k)
        clips.append(x_0)
        if number < continuations:
            with torch.no_grad():
                last = decode(base, x_0, sampling.frames, chosen=[sampling.frames - 1])
            images = [frame_picture(frame[:, 0]) for frame in last]  # frame: 3 1 h w
    return clips


def decode_frames(base, clips, chosen, f):
    """Latents of a video's clips -> its frames `chosen` (b,3,n,h,w), pixels in about
    [-1,1].

    A clip has f frames. Clip k shows the video's frames k (f - 1) to (k + 1)(f - 1); its
    first frame is the last one of clip k - 1.
    """
    parts = []
    for k, x_0 in enumerate(clips):
        first = k * (f - 1)
        own = [n - first for n in chosen if first + (k > 0) <= n < first + f]
        if own:
            parts.append(decode(base, x_0, f, chosen=own))
    return torch.cat(parts, dim=2)


def vader_loss(net, base, env, reward, prompts, images, generators, sampling, k,
               continuations, frames):
    """-r(decode(x_0), prompt), (b,): eq. 1 with its sign turned, for gradient descent.

    frames: the numbers of the frames to reward, a list per video; k: see roll_out().
    """
    clips = roll_out(net, base, env, prompts, images, generators, sampling, k, continuations)
    if all(numbers == frames[0] for numbers in frames):
        video = decode_frames(base, clips, frames[0], sampling.frames)
    else:
        videos = []
        for i, numbers in enumerate(frames):
            one = [x_0[i:i + 1] for x_0 in clips]
            videos.append(decode_frames(base, one, numbers, sampling.frames))
        video = torch.cat(videos)
    return -score(reward, video, prompts)  # score: pixels in [-1,1] -> rewards (b,) in fp32


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="vader")
    items, held_out = read_items(args, sampling, args.continuations)
    length = check_lengths(args, sampling)
    start = read_lora(args.base, args.lora) if args.lora else None
    run = Run(args, "vader")
    reward, watch = read_rewards(args, run, [prompt for _, prompt in (*items, *held_out)])

    run.say(changed_defaults(args))
    # a frozen base, LoRA branches on its attentions
    base = start_base(run, run.dtype, frozen=args.frozen)
    texts = [prompt + sampling.suffix for _, prompt in (*items, *held_out)]
    texts.append(sampling.negative)
    base.tokenize(texts)  # refuses words that the tiny world does not know
    weights, *lora = start or (None, args.rank, args.alpha, args.lora_targets)
    add_lora(base.net, *lora)
    if weights:
        base.net.load_state_dict(weights, strict=False)
    base.net.grad_ckpt = args.grad_ckpt
    net = parallelize(base.net, args, run.device)
    params = trained({"": net})
    opt = run.adamw(params.values())
    meta = dict(zip(("rank", "alpha", "lora_targets"), lora), sample=sampling.metadata())
    run.attach(opt, params, [net], base.parts(), meta)
    base.remember(texts, run.env)  # every text is encoded once; then the text tower goes

    def evaluate(name):
        evaluate_reward(run, base, sampling, reward, held_out, name, watch or reward,
                        args.continuations)
    if not run.resumed:
        evaluate("before")
    for step in run.steps():
        k = updates_with_gradient(
            args.backprop, sampling.updates, run.generator(step, "depth"))
        for numbers in run.micro_steps():
            images, prompts = zip(*(items[i] for i in run.pick(len(items), numbers)))
            frames = [frames_to_reward(args.decode, length, run.generator("frame", i))
                      for i in numbers]
            with run.forward():
                loss = vader_loss(
                    net, base, run.env, reward, prompts, images, run.generators(numbers),
                    sampling, k, args.continuations, frames)
            run.backward(loss, reward=-loss)
        run.update()
        if run.preview_due:
            evaluate(f"step-{run.done}")
            if args.patience:
                run.save()
                if run.out_of_patience("watch"):
                    break
    if not run.stopped:
        evaluate("after")
        if args.patience:  # the last may be the best
            run.save()
            run.out_of_patience("watch")
        sweep_lora(run, base, sampling, reward, held_out[:args.sweep], args.continuations)
    run.finish("reward", "grad")


# ---- what is checked and read before any work

def check_lengths(args, sampling):
    """-> frames of a video; refuses --backprop and --decode that do not fit the rollout."""
    if sampling.sampler == "lcm":
        raise UserError("--sampler lcm: VADER backpropagates through ddim and dpmpp here")
    if args.backprop != "rand" and args.backprop > sampling.updates:
        raise UserError(f"--backprop last-{args.backprop}: choose last, rand, or last-K with K in "
                        f"1..{sampling.updates}")
    length = sampling.frames + args.continuations * (sampling.frames - 1)
    frames_to_reward(args.decode, length, torch.Generator())
    return length


def read_rewards(args, run, prompts):
    """-> the reward to climb and the one to watch (or None), both of which can read the
    prompts."""
    reward = get_reward(args.reward, run.device, args.reward_weights, run.out)
    watch = get_reward(args.watch, run.device, args.reward_weights, run.out) if args.watch else None
    for asked in filter(None, (reward, watch)):
        asked.check(prompts)
    if reward.clip and args.decode not in ("all", "alt"):
        raise UserError(f"--decode {args.decode}: reward {args.reward} judges whole clips; add "
                        "--decode all")
    return reward, watch


if __name__ == "__main__":
    run_command(main, "--decode random", "--backprop last", "--grad-ckpt", "--offload",
                "smaller --height and --width")
