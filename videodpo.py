"""VideoDPO: align a video model by preferences (Liu et al., arXiv 2412.14167).

    L = -w log sigmoid(z),  z = -beta/2 [(e(x_w) - e_ref(x_w)) - (e(x_l) - e_ref(x_l))]
    e(x) = mean |net(x_t, t, text) - target|^2        (Diffusion-DPO, 2311.12908, eq. 14)
    w = (0.72 / score)^alpha,  score = OmniScore(x_w) OmniScore(x_l)

Four stages. generate: N clips per prompt. score: the OmniScore of each, seven dimensions
of VBench in one number. pair: a prompt's best clip x_w and its worst x_l. train: fit
winners better and losers worse than the reference (the network before training) does.

    python videodpo.py --base tiny                      # all stages, minutes on 2 CPU cores
    python videodpo.py --weights W --prompts P --score-weights S      # VideoCrafter2
    torchrun --nproc_per_node=4 videodpo.py --weights W --pairs vidpro --accum 2
    python videodpo.py --base t2v-turbo --weights W --pairs vidpro --rank 16 --lr 1e-4
    python videodpo.py ... --resume                     # continue in the same stage
    python sample.py --ckpt out/videodpo --prompts vbench.txt --n 5 --vbench

Writes to --out: train and held-out (clips, scores and pairs, laid out as released),
ckpt.safetensors, log.jsonl, curve.png, eval.jsonl, before.png and after.png with clips.

Memory: --rank 0 holds policy, gradients and AdamW's two moments in fp32 and the reference
in --dtype: 18 bytes per parameter in bf16. LoRA needs no second network.

Differences from the original code (the others: docs/differences/videodpo.md)
 - One logistic term per video. (Released: one per latent column.)
 - No dropout in the network. (Released: with it policy and reference differ from the start.)
"""
from common import Parser, Run, generator, run_command, trained, warn  # first: for signals
import argparse
from functools import partial

import torch
import torch.nn.functional as F

import omniscore
import pipeline
from bases import choose_sampling, start_base
from diffusion import noised, randn
from models import add_lora, frozen_copy, parallelize, without_lora

# The released configs/vc2_dpo (all weights of VideoCrafter2) and four clips per prompt
PAPER = dict(
    base="videocrafter2", out="out/videodpo", samples=4, beta_dpo=5000.0, drop_text=0.2,
    steps=2000, accum=8, lr=6e-6, wd=0.01, rank=0, save_every=499)
TINY = dict(  # without guidance clips take half the time, score higher and differ more
    sample_steps=5, cfg=1.0, share_noise=True,
    beta_dpo=100.0, steps=40, batch=8, accum=1, lr=2e-3, lr_schedule="cosine", rank=16,
    eval_n=128, workers=0, save_every=40, log_every=10, grad_ckpt=False)
PRESETS = {"tiny": TINY, "tiny-wan": TINY}


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base")
    p.add_argument("--stage", choices=("generate", "score", "pair", "train"),
                   help="run this stage alone (default: all four; with --pairs: train)")
    p.add_argument("--prompts", help="file of prompts to generate from (tiny: 376 captions)")
    p.add_argument("--samples", type=p.COUNT, help="clips generated per prompt")
    p.add_argument("--score-weights", help="folder of OmniScore's networks (tiny: none needed)")
    p.add_argument("--flow-weights", metavar="FILE",
                   help="file of torchvision's RAFT weights (default: RAFT large, downloaded)")
    p.add_argument("--drop-pairs", type=p.SHARE, default=0.0,
                   help="share of pairs to leave out, those whose clips score most alike")
    p.add_argument("--pairs", nargs="+", metavar="FOLDER", help="train on these ready pairs")
    p.add_argument("--eval-pairs", nargs="+", metavar="FOLDER", help="held-out pairs for --pairs")
    p.options("pixels sampling")
    p.add_argument("--train-fps", type=p.COUNT,
                   help="frame rate given to the network in training (default: its own, 16)")
    p.add_argument("--beta-dpo", type=p.POSITIVE,
                   help="beta: how closely the policy is tied to the reference")
    p.add_argument("--reweight", type=p.UNSIGNED, default=0.0, metavar="ALPHA",
                   help="alpha of the pairs' weights; 0, as released: all pairs weigh the same")
    p.add_argument("--share-noise", action=argparse.BooleanOptionalAction, default=False,
                   help="one step t and one noise for both clips of a pair (released: two)")
    p.add_argument("--max-step", type=p.SHARE, default=1.0,
                   help="noisiest step to train on, as a share of all steps")
    p.options("data", only=("--workers", "--drop-text"))
    p.options("optimisation lora machine evaluation run")
    return p.parse(argv, PAPER, PRESETS)


# ---- the method

def select_pair(totals):
    """OmniScores of one prompt's clips -> index of the best, of the worst, the pair's score."""
    best, worst = totals.index(max(totals)), totals.index(min(totals))
    return best, worst, totals[best] * totals[worst]


def choose_pairs(prompts, drop=0.0):
    """Each prompt's clips [(row in metadata.json, caption, OmniScore)] -> rows of pair.json.

    Left out: pairs of equal scores, and the share `drop` whose scores differ least.
    """
    pairs = []
    for clips in prompts:
        best, worst, score = select_pair([total for _, _, total in clips])
        (winner, caption, high), (loser, _, low) = clips[best], clips[worst]
        pairs.append(dict(video1=winner, video2=loser, label=0, frame_caption=[caption],
                          score=max(score, 1e-3), diff_score=high - low))  # w is finite
    alike = sorted(pairs, key=lambda pair: pair["diff_score"])[:int(drop * len(pairs))]
    return [pair for pair in pairs if pair["diff_score"] > 0 and pair not in alike]


def pair_weight(score, alpha, numerator=0.72):
    """w = (0.72 / score)^alpha: 0.72 is about the largest score; low scores are rare."""
    return (numerator / score) ** alpha


def draw_noise(generators, shape, max_step, share_noise, drop_text):
    """What is random about pairs of latents `shape` (p,2,c,f,h,w), a generator each.

    -> steps u (p,2) in 0..max_step, as shares of the schedule; noise (p,2,c,f,h,w); whose
    caption is dropped (p,), for both clips and both networks.
    """
    u_winner, u_loser, coin = torch.stack([torch.rand(3, generator=g) for g in generators]).T
    noise = randn(shape, generators)
    if share_noise:
        u_loser, noise[:, 1] = u_winner, noise[:, 0]
    return max_step * torch.stack([u_winner, u_loser], dim=1), noise, coin < drop_text


def dpo_loss(pred, ref, target, weight, beta, reduce="video"):
    """-> losses (p,) and z (p,); sigmoid(z) is how sure the policy is of the winner.

    pred, ref, target (2p,c,f,h,w): p winners, then their losers; weight (p,). reduce
    "column": a logistic term per latent column, as released; then z is (p,w).
    """
    dims = (1, 2, 3, 4) if reduce == "video" else (1, 2, 3)
    error = (pred - target).square().mean(dims) - (ref - target).square().mean(dims)
    winners, losers = error.chunk(2)  # below 0: the policy is better than the reference
    z = -beta / 2 * (winners - losers)
    return -weight * F.logsigmoid(z).reshape(len(z), -1).mean(1), z


def pair_loss(net, reference, base, sampling, args, pairs, captions, u, noise, weight):
    """dpo_loss() of latents (p,2,c,f,h,w), winner first; captions: p texts, or None.

    Of a network that predicts v, e(x) = |v - v'|^2 = |eps - eps'|^2 / ab_t; of flow
    matching, |v - v'|^2 = |x0 - x0'|^2 / sigma^2.
    """
    # 2p c f h w: p winners, then their losers
    x0, u, noise = (x.transpose(0, 1).flatten(0, 1) for x in (pairs, u, noise))
    origin = sampling.origin if base.row.unet.guidance_dim else None  # T2V-Turbo's steps
    schedule = base.sampling_schedule(sampling)
    x_t, t, target = noised(schedule, x0, noise, u, sampling.size, origin)
    texts = [sampling.negative if c is None else c + sampling.suffix for c in captions]
    text, null = base.encode_text(texts), base.encode_null(sampling.negative, len(texts))
    text = torch.stack([n if c is None else x for c, x, n in zip(captions, text, null)])
    cond = pipeline.training_conditions(base, sampling, texts + texts, t, args.train_fps)
    inputs = x_t, t, torch.cat([text, text])
    with torch.no_grad():  # first: blocks recomputed in the backward pass must find LoRA on
        ref = reference(*inputs, **cond).float()
    pred = net(*inputs, **cond).float()
    return dpo_loss(pred, ref, target.float(), weight, args.beta_dpo)


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="videodpo")
    stages, prompts = pipeline.plan_stages(args)
    folders = [args.pairs, args.eval_pairs] if args.pairs else [[name] for name in prompts]
    ready = stages == ["train"]  # then faults of the files show before any work
    pairs = omniscore.read_pairs(folders, sampling.size, args.seed) if ready else ()
    run = Run(args, "videodpo", trains="train" in stages)
    score_clip = omniscore.clip_scorer(args.base, sampling.size, args.score_weights,
                                       args.flow_weights, run.device, "score" in stages)
    base = None  # scoring and pairing need no network of the base
    if "generate" in stages or "train" in stages:
        dtype = run.dtype if args.rank else torch.float32  # what trains is fp32
        base = start_base(run, dtype, frozen=args.frozen)
        base.freeze(run.dtype, but=[] if args.rank else ["net"])
        texts = [row[-1] for part in pairs if part for row in part.rows]
        texts = [text + sampling.suffix for text in sum(prompts.values(), texts)]
        base.tokenize([*texts, sampling.negative])  # tiny refuses words it does not know
        base.remember([*texts, sampling.negative], run.env)  # then the text tower goes

    # each clip, score and pair depends on its own number alone, and what is there is kept
    run.own()
    for folder, texts in prompts.items():
        if "generate" in stages:
            pipeline.generate_folder(base, run.env, folder, texts, args.samples, sampling,
                            args.batch, args.seed, args.resume)
        if "score" in stages:
            omniscore.score_folder(run.env, folder, score_clip)
        if "pair" in stages:
            chosen = choose_pairs(omniscore.read_scores(folder), args.drop_pairs)
            omniscore.write_pairs(run.env, folder, chosen)
    if "train" in stages:
        pairs = pairs or omniscore.read_pairs(folders, sampling.size, args.seed)
        train(run, base, sampling, score_clip, *pairs)
    else:
        run.finish()


def train(run, base, sampling, score_clip, pairs, held_out):
    """pairs, held_out: PairDatasets to learn from and to be tested on (or None)."""
    args = run.args
    prompts = [row[-1] for row in (held_out or pairs).rows][:args.eval_n]
    if args.rank:  # the reference is the network without LoRA, or a copy
        add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    else:
        frozen = frozen_copy(base.net, run.dtype, args, run.device)
        base.net.requires_grad_(True)
    base.net.grad_ckpt = args.grad_ckpt
    net = parallelize(base.net, args, run.device)
    reference = without_lora(net) if args.rank else frozen
    params = trained({"": net})
    opt = run.adamw(params.values())
    run.attach(opt, params, [net], base.parts(), dict(sample=sampling.metadata()))
    weights = torch.tensor([pair_weight(score, args.reweight) for score in pairs.scores])
    pairs = encode_pairs(run, base, sampling, pairs, "train")
    held_out = held_out and encode_pairs(run, base, sampling, held_out, "held-out")
    loss_of = partial(pair_loss, net, reference, base, sampling, args)
    evaluate = partial(evaluate_policy, run, loss_of, base, sampling, held_out, prompts, score_clip)
    if not run.resumed:
        check_reference(run, loss_of, held_out or pairs)
        evaluate("before")
    for _ in run.steps():
        for numbers in run.micro_steps():
            picked = run.pick(len(pairs), numbers)  # each epoch in its own order
            items = [pairs[i, i] for i in picked]
            x0 = torch.stack([item["latents"] for item in items]).float()  # p 2 c f h w
            u, noise, dropped = draw_noise(
                run.generators(numbers), x0.shape, args.max_step, args.share_noise, args.drop_text)
            captions = [None if d else item["text"] for d, item in zip(dropped, items)]
            x0, u, noise, weight = (x.to(run.device) for x in (x0, u, noise, weights[picked]))
            with run.forward():
                loss, z = loss_of(x0, captions, u, noise, weight)
            run.backward(loss, loss=loss, accuracy=(z > 0).float(), margin=z)
        run.update()
        if run.preview_due:
            evaluate(f"step-{run.done}")
    if not run.stopped:
        evaluate("after")
    run.finish("loss", "accuracy", "margin")


# ---- encoding and evaluation

def encode_pairs(run, base, sampling, pairs, name):
    """A PairDataset -> items {"latents" (2,c,f,h,w), "text"}, encoded once, to --out."""
    def encode(batch):
        video = batch["video"].flatten(0, 1).to(run.device, run.dtype)  # 2b 3 f h w
        generators = [run.generator("posterior", int(i)) for i in batch["number"]]
        noise = randn((len(generators), 2, *base.latent_shape(sampling)), generators)
        with torch.no_grad():  # a sample of the encoder's Gaussian
            latents = base.vae.encode(video, noise.flatten(0, 1).to(video))
        return {"latents": latents.unflatten(0, (-1, 2))}
    return pipeline.cache_latents(
        run, pairs, encode, dict(size=sampling.size, rows=pairs.fingerprint), name)


@torch.no_grad()
def margins(run, loss_of, pairs, draws=4):
    """z of the first --eval-n pairs, (n,): the mean over steps, both clips noised alike."""
    z = []
    for i in range(min(len(pairs), run.args.eval_n)):
        x0 = pairs[i, i]["latents"].float().to(run.device)[None]  # 1 2 c f h w
        for k in range(draws):
            noise = randn(x0[:, :1].shape, [generator("held-out", i, k)], run.device)
            u = torch.full((1, 2), run.args.max_step * (k + 0.5) / draws, device=run.device)
            with run.forward():
                z.append(loss_of(x0, [pairs[i, i]["text"]], u, noise.expand_as(x0), 1.0)[1])
    return torch.cat(z).view(-1, draws).mean(1)


def check_reference(run, loss_of, pairs):
    """z must be 0 before training: beta would multiply any difference in numerics."""
    largest = margins(run, loss_of, pairs, draws=1).abs().max().item()
    if run.main:
        print(f"before training: largest |z| is {largest:.2g} (must be 0)", flush=True)
    if not largest < 0.01:
        warn("policy and reference differ before training; try --dtype fp32")


def evaluate_policy(run, loss_of, base, sampling, held_out, prompts, score_clip, name):
    """Held-out pairs and prompts -> a line of eval.jsonl, NAME.png, NAME/*.mp4.

    accuracy: share of the pairs with z > 0; wins: share of the prompts whose clip scores
    higher than before training. Every process must call it.
    """
    row = pipeline.sample_held_out(run, base, sampling, prompts, name)
    if held_out and run.done:
        z = margins(run, loss_of, held_out)
        row |= dict(accuracy=(z > 0).float().mean().item(), margin=z.mean().item())
    if not run.main:
        return
    if score_clip:
        now = omniscore.score_videos(run.out / name, prompts, score_clip)
        was = omniscore.saved(run.out / "before")
        better = [a["total"] > b["total"] for a, b in zip(now, was)]
        row |= omniscore.means(now) | {"wins": sum(better) / len(better)}
    pipeline.record(run, name, row)


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--rank 16", "--offload",
                "--parallel fsdp", "fewer --frames")
