"""GRPO: align a video model by policy gradients, with any reward (DDPO, arXiv 2305.13301;
Flow-GRPO, 2505.05470; DanceGRPO, 2505.07818; noise as in CPS, 2509.05952, too).

    pi(x' | x, text) = N(mean_theta(x, t), std^2)        a sampler update that draws noise
    A     = (r - mean of r) / std of r                   r: of a group, clips of one prompt
    ratio = pi_theta(x' | x) / pi_old(x' | x)
    loss  = mean of max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) + beta KL(pi_theta, base)

Sample groups of clips with noise, score them, and make the updates that led to the better
clips of a group likelier. No gradient passes through the sampler, the decoder or the
reward, so a reward may run any code: a detector, a language model, the size of a file.

    python grpo.py --base tiny                             # 2 CPU cores, minutes
    python grpo.py --base tiny --reward my_reward.py:fn    # plain numbers, by any code
    python grpo.py --reward hps:1,aesthetic:0.5 --weights W     # VideoCrafter2 on one GPU
    torchrun --nproc_per_node=8 grpo.py --base opensora --weights W --prompts P
    python grpo.py ... --noise cps --steps-trained window-3 --best-of 8
    python grpo.py ... --resume                            # continue, bit for bit
    python sample.py --ckpt out/grpo --prompt "a red circle moving left"

Writes to --out: ckpt.safetensors (the LoRA), log.jsonl, curve.png, eval.jsonl (rewards of
held-out prompts, always from the same noise, and the judge's verdict on tiny bases),
before.png and after.png with their clips. Memory: one network call with gradient (two with
guidance), and the states of the rollouts, 16 MB per clip for VideoCrafter2 in 25 steps.

Differences from the original codes (the others: docs/differences/grpo.md)
 - The last update draws no noise and is never trained: the rewarded clip is clean.
 - With --even-steps all updates count alike. (One near DDIM's end counts 10 times.)
 - Several rewards are normalised one by one, so that their scales do not matter.
"""
from common import Parser, Run, UserError, run_command, trained  # first: for signals
from dataclasses import replace

import torch
from torch.utils.data import default_collate

from bases import choose_sampling, start_base
from diffusion import FLOW_SAMPLERS, log_prob, policy, sampler_updates
from models import add_lora, lora_strength, parallelize
from pipeline import evaluate_reward, guided_net, read_items, recorded_rollout
from rewards import get_reward

# Stable Diffusion's: LoRA as in DDPO, groups as in DanceGRPO. Nobody published a run on
# VideoCrafter2 or ModelScope, which are built on it.
PAPER = dict(
    base="videocrafter2", out="out/grpo", reward="hps", sample_steps=50, cfg=5.0,
    group=16, steps_trained=("share", 1.0), updates=2, steps=300, accum=64, lr=3e-4, wd=1e-4,
    save_every=25, rank=4, alpha=4.0)
# DanceGRPO's for FLUX with LoRA. (HunyuanVideo: all weights, --eta 0.25, best 8 of 24.)
OPENSORA = dict(
    noise="dance", sample_steps=16, cfg=None, group=12, steps_trained=("share", 0.6),
    same_noise=True, even_steps=False, accum=24, rank=128, alpha=256.0,
    lora_targets=["qkv", "q_linear", "kv_linear"])
# Flow-GRPO's for Wan, with its usual noise. (Its Wan script has a rule of its own.)
WAN = dict(
    noise="flow", sample_steps=20, cfg=4.5, group=8, steps_trained=("share", 0.99),
    clip_ratio=1e-3, kl=0.004, even_steps=False, frames=33, height=240, width=416, accum=16,
    lr=1e-4, rank=32, alpha=64.0)
TINY = dict(  # the gradients of later updates are all noise, see docs/differences/grpo.md
    reward="tiny", sample_steps=5, cfg=1.0, group=8, steps_trained=("first", 2), updates=1,
    steps=20, batch=16, accum=4, lr=3e-3, rank=8, alpha=8.0, eval_n=64, grad_ckpt=False)
PRESETS = {"opensora": OPENSORA, "wan2.1-t2v-1.3b": WAN, "tiny": TINY, "tiny-clean": TINY,
           "tiny-wan": TINY | dict(noise="cps", steps_trained=("first", 3))} | (
    dict.fromkeys(("tiny-i2v", "tiny-cogvideox"), TINY | dict(reward="temporal", eval_n=32)))
LEVELS = {"ddim": 1.0, "cps": 0.8, "flow": 0.7, "dance": 0.3}  # published, of --eta


def trained_part(text):
    """An argparse type: "0.6" -> ("share", 0.6), "first-2" -> ("first", 2), or ("window", 2)."""
    kind, dash, k = text.rpartition("-")
    if dash and kind in ("first", "window"):
        return kind, Parser.COUNT(k)
    return "share", Parser.SHARE(text)


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base reward prompts")
    p.add_argument("--group", type=p.COUNT, help="clips per prompt, which are compared")
    p.add_argument("--best-of", type=p.COUNT, metavar="N",
                   help="train on the N best and worst clips per group (default: all)")
    p.add_argument("--steps-trained", type=trained_part, metavar="SHARE|first-K|window-K",
                   help="sampler updates to train: a share, drawn per step; the first K; or K "
                        "in a row anywhere, and then the others draw no noise")
    p.add_argument("--noise", choices=tuple(LEVELS),
                   help="how updates draw noise of level --eta: ddim or cps; with flow "
                        "matching cps, flow (Flow-GRPO) or dance (default: ddim, or dance)")
    p.add_argument("--even-steps", action=p.YES_NO, default=True,
                   help="updates count alike, however strongly the network moves them")
    p.add_argument("--same-noise", action=p.YES_NO, default=False,
                   help="the clips of a group start from the same noise")
    p.add_argument("--std-of", choices=("batch", "group"), default="batch",
                   help="rewards whose standard deviation divides the advantages")
    p.add_argument("--updates", type=p.COUNT,
                   help="optimizer updates per step, each on a part of the sampler updates")
    p.add_argument("--clip-ratio", type=p.POSITIVE, default=1e-4,
                   help="c: beyond 1 - c and 1 + c a ratio stops training its update")
    p.add_argument("--kl", type=p.UNSIGNED, default=0.0,
                   help="beta: weight of the divergence from the base; 0: none, faster")
    p.options("pixels sampling optimisation lora machine evaluation run")
    args = p.parse(argv, PAPER, PRESETS)
    if args.rank < 1:
        raise UserError("--rank 0: GRPO trains LoRA weights; give a rank of 1 or more")
    if args.group < 2:
        raise UserError("--group 1: clips of a prompt are compared; give 2 or more")
    if not 2 <= (args.best_of or 2) <= args.group:
        raise UserError(f"--best-of {args.best_of}: choose 2 to {args.group} (--group)")
    if args.eta == 0:
        raise UserError("--eta 0: rollouts need noise; give a number above 0")
    return args


# ---- the method

def steps_to_train(part, n, g):
    """Of n sampler updates, those that draw noise and those that train: never the last.

    part: see trained_part(); what is random is drawn from g.
    """
    kind, k = part
    if kind == "window":
        first = int(torch.randint(n - k, (), generator=g))
        return range(first, first + k), range(first, first + k)
    order = torch.randperm(n - 1, generator=g).tolist()[:max(1, int(k * (n - 1)))]
    return range(n - 1), range(k) if kind == "first" else order


def group_advantages(rewards, groups, over="batch", eps=1e-4, correction=0):
    """(r - mean of its group) / (std + eps), (n,); the std is the "batch"'s or the "group"'s.

    rewards (n,); groups: a key for each. A clip without a score (NaN) gets 0.
    """
    known, advantages = rewards.isfinite(), torch.zeros_like(rewards)
    for group in dict.fromkeys(groups):
        own = known & torch.tensor([g == group for g in groups])
        if own.sum() > 1:
            std = rewards[known if over == "batch" else own].std(correction=correction)
            advantages[own] = (rewards[own] - rewards[own].mean()) / (std + eps)
    return advantages


def best_and_worst(scores, n):
    """Numbers of the ceil(n / 2) highest and floor(n / 2) lowest scores, each sorted."""
    order = torch.as_tensor(scores).argsort(descending=True, stable=True).tolist()
    return sorted(order[:(n + 1) // 2]), sorted(order[len(order) - n // 2:])


def policy_loss(new, old, advantage, clip_ratio):
    """max(-A ratio, -A clip(ratio)) and the ratio, (b,) each; new, old: log-probabilities."""
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio


def gaussian_kl(mean, mean_ref, std):
    """KL of two Gaussians with the same std, (b,): the mean over a clip's elements."""
    return (mean - mean_ref).square().flatten(1).mean(1) / (2 * std ** 2)


def pull(schedule, *step):
    """By how many std the mean moves where the network's output moves by 1."""
    x, one = torch.zeros(1), torch.ones(1)  # the mean is linear in both
    mean, std = policy(lambda x, t: one, schedule, x, *step)
    return mean.abs().item() / std


def grpo_loss(net, base, sampling, clips, i, step, args):
    """Loss, |ratio - 1| and KL, (b,) each, of update i of these clips; step: its (t, t_next,
    noise, eta)."""
    x, x_next = clips["states"][:, i], clips["states"][:, i + 1]
    branches = clips["cond"], clips["null_cond"]
    fn = guided_net(net, base, clips["prompt"], sampling, *branches)
    mean, std = policy(fn, base.schedule, x, *step)
    new = log_prob(x_next, mean, std)
    # with one optimizer update, the policy is the one that drew the clips: the ratio is 1
    old = clips["log_probs"][:, i] if args.updates > 1 else new.detach()
    loss, ratio = policy_loss(new, old, clips["advantage"].to(new), args.clip_ratio)
    if args.even_steps:
        loss = loss / pull(base.schedule, *step)
    kl = torch.zeros_like(loss)
    if args.kl:
        with torch.no_grad(), lora_strength(base.net, 0.0):
            mean_ref, _ = policy(fn, base.schedule, x, *step)
        kl = gaussian_kl(mean, mean_ref, std)
    return loss + args.kl * kl, (ratio - 1).abs(), kl


def make_clips(run, net, base, reward, items, sampling, numbers, noise, noisy):
    """Roll out and score the samples with these numbers -> recorded_rollout()'s clips."""
    groups = [number // run.args.group for number in numbers]
    images, prompts = zip(*(items[run.pick(len(items), [g])[0]] for g in groups))
    generators = run.generators(numbers)
    starts = [run.generator("group", g) for g in groups] if run.args.same_noise else generators
    with torch.no_grad(), run.forward():
        video, clips = recorded_rollout(net, base, run.env, prompts, images, starts,
                                        generators, sampling, noise, noisy)
        scores = reward.each(video, prompts).T
    return [clip | dict(number=n, scores=r) for clip, n, r in zip(clips, numbers, scores)]


def choose_clips(run, clips, weights):
    """Compare the clips of all processes -> those to train on here, with their "advantage",
    and figures for the log. weights: of the rewards; each is normalised by itself."""
    args = run.args
    numbers, scores = zip(*run.gather([(c["number"], c["scores"].tolist()) for c in clips]))
    groups = [number // args.group for number in numbers]
    scores = torch.tensor(scores, dtype=torch.float64).T  # rewards x clips
    parts = [w * group_advantages(r, groups, args.std_of) for w, r in zip(weights, scores)]
    advantages, chosen = sum(parts).clamp(-5, 5), []
    for first in range(0, len(groups), args.group):
        own = advantages[first:first + args.group]
        best, worst = best_and_worst(own, args.best_of or args.group)
        chosen += [first + k for k in best + worst]
    mine = run.share_out(clips, {numbers[i]: advantages[i].item() for i in chosen}, "advantage")
    total = scores.new_tensor(weights) @ scores.nan_to_num(0.0)
    return mine, dict(reward=total.mean(), reward_sd=total.std(correction=0))


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="grpo")
    items, held_out = read_items(args, sampling)
    run = Run(args, "grpo")
    rollouts, noise = check_rollouts(args, sampling, run.env.world)
    reward = get_reward(args.reward, run.device, args.reward_weights, run.out, gradient=False)
    prompts = [prompt for _, prompt in (*items, *held_out)]
    reward.check(prompts)

    # a frozen base, LoRA branches on its attentions
    base = start_base(run, run.dtype, frozen=args.frozen)
    texts = [*(prompt + sampling.suffix for prompt in prompts), sampling.negative]
    base.tokenize(texts)  # refuses words that the tiny world does not know
    add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    base.net.grad_ckpt = args.grad_ckpt
    net = parallelize(base.net, args, run.device)
    params = trained({"": net})
    opt = run.adamw(params.values())
    sampling = replace(sampling, eta=base.row.sample.eta)
    run.attach(opt, params, [net], base.parts(), dict(sample=sampling.metadata()))
    base.remember(texts, run.env)  # every text is encoded once; then the text tower goes
    updates = sampler_updates(base.sampling_schedule(rollouts), rollouts.sample_steps,
                              rollouts.size, rollouts.spacing)

    def evaluate(name):
        evaluate_reward(run, base, sampling, reward, held_out, name)
    if not run.resumed:
        evaluate("before")
    for step in run.steps():
        noisy, chosen = steps_to_train(
            args.steps_trained, len(updates), run.generator(step, "steps"))
        clips = []
        for numbers in run.micro_steps():
            clips += make_clips(
                run, net, base, reward, items, rollouts, numbers, noise, noisy)
        clips, figures = choose_clips(run, clips, reward.weights)
        firsts = range(0, len(clips), args.batch)
        batches = [default_collate(clips[k:k + args.batch]) for k in firsts]
        for k in range(args.updates):
            calls = [(batch, i) for batch in batches for i in chosen[k::args.updates]]
            for batch, i in run.turns(calls):
                with run.forward():
                    loss, ratio, kl = grpo_loss(
                        net, base, rollouts, batch, i, (*updates[i], *noise), args)
                run.backward(loss, len(calls), ratio=ratio, kl=kl)
            if k + 1 < args.updates:
                run.optimize()
        run.update(**figures)
        if run.preview_due:
            evaluate(f"step-{run.done}")
    if not run.stopped:
        evaluate("after")
    run.finish("reward", "grad")


# ---- what is checked before any work

def check_rollouts(args, sampling, processes):
    """-> settings of rollouts, (kind, level) of their noise; refuses what cannot be."""
    flow = sampling.sampler in FLOW_SAMPLERS
    noise = args.noise or ("dance" if flow else "ddim")
    if noise in (("ddim",) if flow else ("flow", "dance")):
        raise UserError(f"--noise {noise}: does not fit base {args.base}; choose "
                        f"{'cps, flow or dance' if flow else 'ddim or cps'}")
    if sampling.sampler not in ("ddim", *FLOW_SAMPLERS):  # CogVideoX-5B's looks back a step
        sampling = replace(sampling, sampler="ddim", spacing="cogvideox")
    n, (kind, count) = sampling.updates, args.steps_trained
    count = max(1, int(count * (n - 1))) if kind == "share" else count
    if not args.updates <= count < n:
        raise UserError(f"--steps-trained: {count} of {n - 1} updates before the last, with "
                        f"--updates {args.updates}; change one of these or --sample-steps")
    clips = args.batch * args.accum * processes
    if clips % args.group:
        raise UserError(f"--group {args.group}: no divisor of a step's {clips} clips "
                        "(--batch x --accum x processes)")
    return sampling, (noise, LEVELS[noise] if args.eta is None else args.eta)


if __name__ == "__main__":
    run_command(main, "--batch 1", "--grad-ckpt", "--offload", "--cfg 1",
                "smaller --height and --width")
