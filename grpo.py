"""GRPO: align a video model by policy gradients, with any reward (Flow-GRPO, Liu et al., arXiv
2505.05470; DanceGRPO, Xue et al., 2505.07818; after DDPO, Black et al., 2305.13301).

    pi(x' | x, text) = N(mean_theta(x, t), std^2)             each sampler update that draws noise
    A_i  = (r_i - mean of its group's r) / std of r           a group: clips of one prompt
    loss = mean of max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) + beta KL(pi || pi of the base)
    ratio = pi_theta(x' | x) / pi_old(x' | x)                 with c = --clip-ratio, beta = --kl

Sample groups of clips with noise and without gradient, score them, and make the updates that led
to the better clips of a group more likely. Each needs one call of the network, at the state that
was stored. No gradient passes through the sampler, the decoder or the reward, so a reward may be
any code: a detector, a language model, the size of a file.

    python grpo.py --base tiny                             # 2 CPU cores, minutes
    python grpo.py --base tiny --reward my_reward.py:fn    # a number per frame, by any code
    python grpo.py --reward hps --weights W                # VideoCrafter2 on one GPU
    torchrun --nproc_per_node=8 grpo.py --base opensora --reward hps --weights W --prompts P
    python grpo.py ... --reward hps:1,aesthetic:0.5        # each normalised by itself
    python grpo.py ... --noise cps --steps-trained window-3 --best-of 8
    python grpo.py ... --resume                            # continue, bit for bit
    python sample.py --ckpt out/grpo --prompt "a red circle moving left"

Writes to --out: ckpt.safetensors (the LoRA), log.jsonl, curve.png, eval.jsonl (rewards of
held-out prompts by the base's own sampler, always from the same noise, and the judge's verdict on
tiny bases), before.png and after.png with their clips.

Memory: one network call with gradient (two with guidance), and the states of the rollouts:
VideoCrafter2, 25 steps: 16 MB per clip.

Differences from the original codes (the others: docs/differences/grpo.md)
 - The last update draws no noise and is never trained, so that the decoded clip is clean.
 - --even-steps divides each update's loss by how strongly the network moves its mean. (In the
   originals a DDIM step near the end counts 10 times as much as the others.)
 - Groups are keyed by number, not by decoded prompt; the processes may share a group.
"""
from common import Parser, Run, UserError, run_command, trained  # first: for signals
import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bases import choose_sampling, load_base
from diffusion import FLOW_SAMPLERS, full_step, gaussian_step, randn, sampler_updates
from models import add_lora, lora_strength, parallelize
from pipeline import conditions, decode, evaluate_reward, guided_net, read_items
from rewards import get_reward

# DDPO's and DanceGRPO's settings for Stable Diffusion, the image model inside VideoCrafter2 and
# ModelScope: LoRA as DDPO; groups as DanceGRPO. Nobody published a run on these two.
PAPER = dict(
    base="videocrafter2", out="out/grpo", reward="hps", sample_steps=50, cfg=5.0,
    group=16, steps_trained=1.0, updates=2, clip_ratio=1e-4, kl=0.0, same_noise=False,
    steps=300, accum=64, lr=3e-4, wd=1e-4, save_every=25,
    rank=4, alpha=4.0, lora_targets=["to_q", "to_k", "to_v", "to_out.0"])
# DanceGRPO's for flow matching (FLUX with LoRA; HunyuanVideo's are the same but for eta 0.25).
DANCE = dict(
    noise="dance", sample_steps=16, cfg=None, group=12, steps_trained=0.6, updates=2,
    same_noise=True, even_steps=False, accum=24, rank=128, alpha=256.0)
OPENSORA = DANCE | dict(lora_targets=["qkv", "q_linear", "kv_linear"])
# Flow-GRPO's for Wan 2.1, except for the noise: its script has a rule of its own for Wan.
WAN = dict(
    noise="flow", sample_steps=20, cfg=4.5, group=8, steps_trained=0.99, updates=2,
    clip_ratio=1e-3, kl=0.004, even_steps=False, frames=33, height=240, width=416, accum=16,
    lr=1e-4, rank=32, alpha=64.0, lora_targets=["q", "k", "v", "o"])
TINY = dict(
    reward="tiny", sample_steps=5, cfg=1.0, group=8, updates=1, steps=60, batch=16, accum=4,
    lr=2e-3, rank=8, alpha=8.0, eval_n=64, log_every=5, grad_ckpt=False)
PRESETS = {"opensora": OPENSORA, "wan2.1-t2v-1.3b": WAN} | dict.fromkeys(
    ("tiny", "tiny-clean", "tiny-i2v", "tiny-cogvideox"), TINY)
LEVELS = {"ddim": 1.0, "cps": 0.8, "flow": 0.7, "dance": 0.3}  # --noise -> the published --eta


def share_or_window(text):
    """An argparse type: "0.6" -> 0.6; "window-3" -> 3, a number of updates in a row."""
    if text.removeprefix("window-").isdigit() and text.startswith("window-") and text[7:] > "0":
        return int(text[7:])
    return Parser.SHARE(text)


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base reward")
    p.add_argument("--prompts",
                   help="file of training prompts (with a first frame: image|||caption lines)")
    p.add_argument("--activities",
                   help="file of activities; --prompts then holds nouns, and prompts are a NOUN "
                        "ACTIVITY")
    p.add_argument("--group", type=p.COUNT,
                   help="clips per prompt, whose rewards are compared")
    p.add_argument("--best-of", type=p.COUNT, metavar="N",
                   help="train only the better and the worse half of N clips per group (default: "
                        "all)")
    p.add_argument("--steps-trained", type=share_or_window, metavar="SHARE|window-K",
                   help="share of the noisy sampler updates that is trained, drawn per step; or K "
                        "in a row, while the others draw no noise")
    p.add_argument("--noise", choices=tuple(LEVELS),
                   help="how an update draws its noise: ddim or cps; with flow matching cps, flow "
                        "(Flow-GRPO) or dance (DanceGRPO) (default: ddim, or dance)")
    p.add_argument("--even-steps", action=p.YES_NO, default=True,
                   help="let all updates count alike, however strongly the network moves them")
    p.add_argument("--same-noise", action=p.YES_NO, default=False,
                   help="the clips of a group start from the same noise")
    p.add_argument("--std-of", choices=("batch", "group"), default="batch",
                   help="advantages are divided by the standard deviation of the rewards of the "
                        "whole step, or of each group")
    p.add_argument("--updates", type=p.COUNT,
                   help="optimizer steps per step, each on a part of the trained updates")
    p.add_argument("--clip-ratio", type=p.POSITIVE, default=1e-4,
                   help="c: ratios beyond 1 - c and 1 + c stop to train; with --updates 1 all are "
                        "1")
    p.add_argument("--kl", type=p.UNSIGNED, default=0.0,
                   help="beta, weight of the divergence from the base; 0: none, which is faster")
    p.options("pixels sampling optimisation lora machine evaluation run")

    args = p.parse(argv, PAPER, PRESETS)
    if args.rank < 1:
        raise UserError("--rank 0: GRPO trains LoRA weights; give a rank of 1 or more")
    if args.group < 2:
        raise UserError("--group 1: a clip is compared with others of its prompt; give 2 or more")
    if not 2 <= (args.best_of or 2) <= args.group:
        raise UserError(f"--best-of {args.best_of}: choose 2 to {args.group} clips of a --group")
    if args.eta == 0:
        raise UserError("--eta 0: without noise all clips are equally likely; give an --eta above "
                        "0, such as 1")
    return args


# ---- the method

@dataclass
class Clip:
    """A rollout: what its training needs."""
    number: int          # within the whole run
    prompt: str
    cond: list           # conditions of the two branches, {name: (1, ...)} each
    states: Tensor       # x_T ... x_0: (n + 1, c, f', h', w'), fp32
    log_probs: Tensor    # of the n updates under the policy that drew them; 0 without noise
    scores: Tensor       # of each reward


def policy(fn, schedule, x, t, t_next, noise, eta):
    """Mean and standard deviation of pi(x' | x, text): x at step t, x' at t_next; fn(x, t)."""
    out = fn(x, full_step(x, t)).float()
    return gaussian_step(schedule, out, x, t, t_next, noise, eta)


def log_prob(x_next, mean, std):
    """log N(x'; mean, std^2), (b,): the mean over a clip's elements, not their sum."""
    z = (x_next - mean) / std
    return -z.square().flatten(1).mean(1) / 2 - math.log(std) - math.log(2 * math.pi) / 2


@torch.no_grad()
def roll_out(fn, schedule, x_T, updates, noisy, noise, eta, generators):
    """Noise x_T (b,...) -> the states (b,n+1,...) and log-probabilities (b,n) of its n updates.

    updates: [(t, t_next)]; noisy: numbers of those that draw noise, from a generator per clip.
    All in fp32: rounded to bf16, a state's log-probability is off by more than --clip-ratio.
    """
    states, log_probs = [x_T], []
    for i, (t, t_next) in enumerate(updates):
        x = states[-1]
        mean, std = policy(fn, schedule, x, t, t_next, noise, eta if i in noisy else 0.0)
        x_next = mean + std * randn(x.shape, generators, x.device) if std else mean
        states.append(x_next)
        log_probs.append(log_prob(x_next, mean, std) if std else x.new_zeros(len(x)))
    return torch.stack(states, 1), torch.stack(log_probs, 1)


def steps_to_train(rule, n, g):
    """Of a sampler's n updates -> those that draw noise, those that are trained; drawn from g.

    The last one does neither. rule: a share of the others, or a window of so many in a row.
    """
    if isinstance(rule, int):
        first = int(torch.randint(n - rule, (), generator=g))
        window = list(range(first, first + rule))
        return window, window
    order = torch.randperm(n - 1, generator=g).tolist()
    return list(range(n - 1)), order[:max(1, int(rule * (n - 1)))]


def group_advantages(rewards, groups, over="batch", eps=1e-4, correction=0):
    """(r - mean of its group) / (std + eps), (n,): the std over the whole batch or over the group.

    rewards (n,); groups: a key per reward. A clip without a score, NaN, gets 0; so does a whole
    group that has only one score. Where all of a group score alike nothing is to be learned.
    """
    known, advantages = rewards.isfinite(), torch.zeros_like(rewards)
    for group in dict.fromkeys(groups):
        own = known & torch.tensor([g == group for g in groups])
        if own.sum() > 1:
            std = rewards[known if over == "batch" else own].std(correction=correction)
            advantages[own] = (rewards[own] - rewards[own].mean()) / (std + eps)
    return advantages


def best_and_worst(scores, n):
    """Numbers of the ceil(n / 2) highest and of the floor(n / 2) lowest scores, each sorted."""
    order = torch.as_tensor(scores).argsort(descending=True, stable=True).tolist()
    return sorted(order[:(n + 1) // 2]), sorted(order[len(order) - n // 2:])


def policy_loss(log_prob, old, advantage, clip_ratio):
    """max(-A ratio, -A clip(ratio)) and the ratio, (b,) each."""
    ratio = (log_prob - old).exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio


def gaussian_kl(mean, mean_ref, std):
    """KL of two Gaussians with the same std, (b,): the mean over a clip's elements."""
    return (mean - mean_ref).square().flatten(1).mean(1) / (2 * std ** 2)


def pull(schedule, *step):
    """How far the mean moves, in std, where the output moves by 1; step: as policy() takes it."""
    x, one = torch.zeros(1), torch.ones(1)  # the mean is linear in both
    mean, std = policy(lambda x, t: one, schedule, x, *step)
    return mean.abs().item() / std


def grpo_loss(net, base, sampling, batch, i, step, args):
    """Loss, ratio and KL, (b,) each, of update i. batch: [(clip, advantage)]; step: its (t, t_next,
    noise, eta)."""
    clips, advantages = zip(*batch)
    x, x_next = (torch.stack([clip.states[k] for clip in clips]) for k in (i, i + 1))
    cond = ({k: torch.cat([clip.cond[b][k] for clip in clips]) for k in clips[0].cond[b]}
            for b in (0, 1))
    fn = guided_net(net, base, [clip.prompt for clip in clips], sampling, *cond)
    mean, std = policy(fn, base.schedule, x, *step)
    new = log_prob(x_next, mean, std)
    old = new.detach()  # while the policy is the one that drew the clips
    if args.updates > 1:
        old = torch.stack([clip.log_probs[i] for clip in clips])
    loss, ratio = policy_loss(new, old, x.new_tensor(advantages), args.clip_ratio)
    if args.even_steps:
        loss = loss / pull(base.schedule, *step)
    kl = torch.zeros_like(loss)
    if args.kl:
        with torch.no_grad(), lora_strength(base.net, 0.0):
            mean_ref, _ = policy(fn, base.schedule, x, *step)
        kl = gaussian_kl(mean, mean_ref, std)
    return loss + args.kl * kl, ratio.detach(), kl.detach()


def make_clips(run, net, base, reward, items, sampling, numbers, updates, noisy, noise):
    """Roll out the samples with these numbers of the whole run, and score them -> Clips.

    items: (first frame or None, prompt) to train on; noise: its kind and level.
    """
    groups = [number // run.args.group for number in numbers]
    images, prompts = zip(*(items[run.pick(len(items), [g])[0]] for g in groups))
    generators = run.generators(numbers)
    starts = [run.generator("group", g) for g in groups] if run.args.same_noise else generators
    with torch.no_grad(), run.forward():
        cond = conditions(base, run.env, sampling, images)
        fn = guided_net(net, base, prompts, sampling, *cond)
        x_T = randn((len(prompts), *base.latent_shape(sampling)), starts, run.device)
        states, log_probs = roll_out(fn, base.schedule, x_T, updates, noisy, *noise, generators)
        video = decode(base, states[:, -1], sampling.frames)
        scores = reward.each(video, prompts).T
    own = [[{k: v[i:i + 1] for k, v in branch.items()} for branch in cond]
           for i in range(len(prompts))]
    return [Clip(*row) for row in zip(numbers, prompts, own, states, log_probs, scores)]


def choose_clips(run, clips, weights):
    """Compare all processes' clips -> [(clip, advantage)] to train on here, figures for the log.

    Every process gets as many, in whole batches, as one of them needs; a spare one has advantage
    0. Several rewards are normalised one by one, so that their scales do not matter.
    """
    args = run.args
    rows = run.gather([(clip.number, run.env.rank, clip.scores.tolist()) for clip in clips])
    numbers, ranks, scores = zip(*rows)
    scores = torch.tensor(scores, dtype=torch.float64)             # clips x rewards
    groups = [number // args.group for number in numbers]
    advantages = sum(weight * group_advantages(r, groups, args.std_of)
                     for weight, r in zip(weights, scores.T)).clamp(-5, 5)
    chosen = []
    for group in dict.fromkeys(groups):
        own = [i for i, g in enumerate(groups) if g == group]
        best, worst = best_and_worst(advantages[own], args.best_of or args.group)
        chosen += [own[k] for k in best + worst]
    most = max(Counter(ranks[i] for i in chosen).values())
    most = -(-most // args.batch) * args.batch
    even = run.env.world * most / len(chosen)  # the mean is over the chosen ones
    counted = {numbers[i]: even * advantages[i].item() for i in chosen}
    mine = sorted(clips, key=lambda clip: clip.number not in counted)[:most]
    total = scores @ torch.tensor(weights, dtype=torch.float64)
    known = total[total.isfinite()]
    figures = dict(reward=known.mean(), reward_sd=known.std(correction=0),
                   unscored=1 - len(known) / len(total))
    return [(clip, counted.get(clip.number, 0.0)) for clip in mine], figures


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="grpo")
    rollouts, noise = check_rollouts(args, sampling)
    items, held_out = read_items(args, sampling)
    run = Run(args, "grpo")
    check_groups(args, run)
    reward = get_reward(args.reward, run.device, args.reward_weights, run.out, gradient=False)
    prompts = [prompt for _, prompt in (*items, *held_out)]
    reward.check(prompts)

    # a frozen base, LoRA branches on its attentions
    base = load_base(args.base, args.weights, run.device, run.dtype)
    texts = [*(prompt + sampling.suffix for prompt in prompts), sampling.negative]
    base.tokenize(texts)  # refuses words that the tiny world does not know
    add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    base.net.grad_ckpt = args.grad_ckpt
    net = parallelize(base.net, args.parallel, run.device, args.offload)
    params = trained({"": net})
    opt = torch.optim.AdamW(params.values(), args.lr, args.betas, weight_decay=args.wd)
    own = base.row.sample  # evaluations are without the rollouts' noise, in the base's own steps
    sampling = replace(sampling, sample_steps=own.sample_steps, eta=own.eta)
    run.attach(opt, params, [net], base.parts(), dict(sample=sampling.metadata()))
    base.remember(texts, run.env)  # every text is encoded once; then the text tower goes
    updates = sampler_updates(
        base.schedule, rollouts.sample_steps, rollouts.size, rollouts.spacing)
    weights = [weight for _, weight, _ in reward.parts]

    def evaluate(name):
        evaluate_reward(run, base, sampling, reward, held_out, name)
    if not run.resumed:
        evaluate("before")
    for step in run.steps():
        noisy, trained_steps = steps_to_train(
            args.steps_trained, len(updates), run.generator(step, "steps"))
        clips = []
        for numbers in run.micro_steps():
            clips += make_clips(
                run, net, base, reward, items, rollouts, numbers, updates, noisy, noise)
        chosen, figures = choose_clips(run, clips, weights)
        batches = [chosen[k:k + args.batch] for k in range(0, len(chosen), args.batch)]
        for k in range(args.updates):
            calls = [(batch, i) for batch in batches for i in trained_steps[k::args.updates]]
            for turn in run.turns(len(calls)):
                batch, i = calls[turn]
                with run.forward():
                    loss, ratio, kl = grpo_loss(
                        net, base, rollouts, batch, i, (*updates[i], *noise), args)
                run.backward(loss, len(calls), ratio=(ratio - 1).abs(), kl=kl)
            if k + 1 < args.updates:
                run.optimize()
        run.update(**figures)
        if run.preview_due:
            evaluate(f"step-{run.done}")
    if not run.stopped:
        evaluate("after")
    run.finish("reward", "grad")


# ---- what is checked before any work

def check_rollouts(args, sampling):
    """-> settings of the rollouts, and the (kind, level) of their noise; refuses what does not
    fit."""
    flow = sampling.sampler in FLOW_SAMPLERS
    noise = args.noise or ("dance" if flow else "ddim")
    if noise in (("ddim",) if flow else ("flow", "dance")):
        raise UserError(f"--noise {noise}: base {args.base} is sampled by {sampling.sampler}; "
                        f"choose {'cps, flow or dance' if flow else 'ddim or cps'}")
    if sampling.sampler == "dpm":  # CogVideoX-5B's, which looks back at the step before
        sampling = replace(sampling, sampler="ddim", spacing="cogvideox")
    n, rule = sampling.updates, args.steps_trained
    count = rule if isinstance(rule, int) else max(1, int(rule * (n - 1)))
    if not args.updates <= count < n:
        raise UserError(f"--steps-trained: {count} updates to train, of a rollout's {n} without "
                        f"the last, for {args.updates} --updates; change one of them or "
                        "--sample-steps")
    return sampling, (noise, LEVELS[noise] if args.eta is None else args.eta)


def check_groups(args, run):
    """Refuse a step that does not hold whole groups."""
    together = args.batch * args.accum * run.env.world
    if together % args.group:
        raise UserError(f"--group {args.group}: a step has {together} clips (--batch x --accum x "
                        "processes), no multiple of it")


if __name__ == "__main__":
    run_command(main, "--batch 1", "--grad-ckpt", "--offload", "--cfg 1",
                "smaller --height and --width")
