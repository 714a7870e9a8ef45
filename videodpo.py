"""VideoDPO: from prompts to preference pairs to an aligned video model (Liu et al., arXiv 2412.14167).

    L = -w log sigmoid(-beta/2 [(e(x_w) - e_ref(x_w)) - (e(x_l) - e_ref(x_l))]),  e(x) = mean |out - target|^2
    (Diffusion-DPO, arXiv 2311.12908, eq. 14, times the pair's weight w = (0.72 / score)^alpha)

Four stages: generate N clips a prompt; score each by OmniScore (metrics.py); pair the best with the worst of
each prompt; train the network to be better on winners, worse on losers, than its frozen reference is.

e(x) is the error of what the network predicts. v: |v - v'|^2 = |eps - eps'|^2 / ab_t, x_t as for eps.
Rectified flow (Open-Sora): v = x0 - eps and x_t = (1 - t) x0 + t eps: |v - v'|^2 = |x0 - x0'|^2 / t^2.

    python videodpo.py --base tiny                            # all stages; minutes and result in RESULTS.md
    python videodpo.py --base tiny --reweight 1 --out out/weighted                   # rare pairs count more
    torchrun --nproc_per_node=4 videodpo.py --base videocrafter2 --weights W --pairs vidpro --accum 2
    python videodpo.py --base t2v-turbo --weights W --pairs vidpro --rank 16 --lr 1e-4
    python videodpo.py --base videocrafter2 --weights W --prompts P --score-weights S --flow-weights F
    python videodpo.py ... --resume                           # goes on in the stage that it was in, exactly
    python sample.py --ckpt out/videodpo --prompts vbench.txt --n 5 --vbench

Leaves in --out: train and held-out (clips, metadata.json, scores.jsonl, pair.json: the layout of the released
data, which --pairs reads), ckpt.safetensors, log.jsonl, curve.png, eval.jsonl, before.png, after.png.

Differences from the original code
 - Scoring and pairing are here. OmniScore's networks differ from VBench's in two places, see metrics.py.
 - One logistic term a video (--reduce column: one a latent column, as released), weights for any batch.
 - --share-noise: one step and noise for both clips, as Diffusion-DPO (released: two); --max-step is ours.
 - No dropout in either network (there it makes them differ before any training).
 - T2V-Turbo: LoRA on top of the loaded weights (there they were not matched and stayed random), guidance
   embedding given; steps of its distillation and an undamped signal, as released.
 - Gradients are clipped; a clip is encoded, and a long one cut, once; a bad one is an error with its row.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from bases import base_row, fill, load_base
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
    check_writable,
    draw_curve,
    finish,
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
    write_atomic,
)
from data import (
    PairDataset,
    batch_indices,
    contact_sheet,
    read_batches,
    read_clips,
    read_prompts,
    read_video,
    write_video,
)
from diffusion import noised, randn
from models import add_lora, frozen_copy, parallelize, sync_gradients, without_lora
from omniscore import check_score_files, score_folder, scorer
from pipeline import encode_pairs, generate_folder, generate_split, training_conditions
from tinyworld import judge_captions, tiny_prompts

# what a stage begins with, in its folders
NEEDS = {"generate": None, "score": "metadata.json", "pair": "scores.jsonl", "train": "pair.json"}
TINY = dict(  # no guidance: half the work, clips that score higher and differ more (RESULTS.md)
    steps=120, batch=8, accum=1, lr=3e-4, lr_schedule="cosine", rank=16, sample_steps=5, cfg=1.0, eval_n=128,
    drop_pairs=0.5, max_step=0.3, share_noise=True, workers=0, save_every=40, log_every=10, grad_ckpt=False)


def get_args(argv=None):
    p = Parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--base", default="videocrafter2", help="base network (python bases.py lists them)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--stage", choices=NEEDS, help="this stage alone (default: all; with --pairs: train)")
    p.add_argument("--out", default="out/videodpo", help="run folder")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    # clips, scores, pairs
    p.add_argument("--prompts", help="file of prompts to generate from (tiny: 376 captions)")
    p.add_argument("--eval-prompts", help="file of held-out prompts (default: the training ones; tiny: 128)")
    p.add_argument("--eval-n", type=COUNT, default=8, help="held-out prompts used")
    p.add_argument("--samples", type=COUNT, default=4, help="clips a prompt")
    p.add_argument("--score-weights", help="folder of OmniScore's networks (tiny: none are needed)")
    p.add_argument("--flow-weights", help="file of torchvision's RAFT large (default: PyTorch's hub)")
    p.add_argument("--pair-score", choices=("product", "histogram"), default="product", help="see metrics.py")
    p.add_argument("--drop-pairs", type=SHARE, default=0.0, help="share of pairs left out, the most alike")
    p.add_argument("--split-average", action="store_true", help="only pairs with the mean score in between")
    p.add_argument("--pairs", nargs="+", metavar="FOLDER", help="pairs made before: train on them")
    p.add_argument("--eval-pairs", nargs="+", metavar="FOLDER", help="held-out pairs that go with --pairs")
    # pixels and sampling
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--fps", type=COUNT, help="frame rate as a condition, for bases that take one")
    p.add_argument("--train-fps", type=COUNT, help="the same in training (default: the network's own, 16)")
    p.add_argument("--negative", help="text of dropped captions and of the unconditional branch")
    p.add_argument("--sample-steps", type=COUNT, help="sampler steps (default: the base's)")
    p.add_argument("--eta", type=SHARE, help="DDIM noise, 0 deterministic to 1 (default: the base's)")
    p.add_argument("--cfg", type=REAL, help="guidance u + cfg (c - u) (default: the base's)")
    # method
    p.add_argument("--beta-dpo", type=POSITIVE, default=5000.0, help="strength of the tie to the reference")
    p.add_argument("--reduce", choices=("video", "column"), default="video", help="terms of the loss")
    p.add_argument("--share-noise", action=yes_no, default=False, help="one step and noise for both clips")
    p.add_argument("--reweight", type=UNSIGNED, default=0.0, help="alpha of the pairs' weights; 0: all alike")
    p.add_argument("--max-step", type=SHARE, default=1.0, help="noisiest step trained on, a share of all")
    p.add_argument("--drop-text", type=SHARE, default=0.2, help="share of captions dropped, pair by pair")
    # optimisation
    p.add_argument("--steps", type=COUNT, default=2000, help="optimizer steps")
    p.add_argument("--batch", type=COUNT, default=1, help="pairs a process and micro-step")
    p.add_argument("--accum", type=COUNT, default=8, help="micro-steps a step")
    p.add_argument("--lr", type=POSITIVE, default=6e-6, help="learning rate")
    p.add_argument("--wd", type=UNSIGNED, default=0.01, help="weight decay")
    p.add_argument("--betas", type=DECAY, nargs=2, default=(0.9, 0.999), help="AdamW betas")
    p.add_argument("--lr-schedule", choices=("constant", "cosine", "cosine-restarts"), default="constant")
    p.add_argument("--warmup", type=NATURAL, default=0, help="steps of linear warm-up")
    p.add_argument("--clip", type=POSITIVE, default=1.0, help="largest gradient norm")
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
    p.add_argument("--save-every", type=COUNT, default=499, help="steps between checkpoints")
    p.add_argument("--keep", type=COUNT, default=1, help="checkpoints kept")
    p.add_argument("--preview-every", type=NATURAL, default=0, help="steps between evaluations (0: two)")
    p.add_argument("--log-every", type=COUNT, default=1, help="steps between log lines on the screen")
    p.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    p.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    return apply_defaults(p, argv, {"tiny": TINY})


# ---- the method

def dpo_loss(pred, ref, target, weight, beta, reduce="video"):
    """-> losses (p,), z (p,) or (p,w); sigmoid(z) is how sure the network is of the winner.

    pred, ref, target (2p,c,f,h,w): p winners, then their losers; weight (p,). reduce "column": a term for
    each latent column, as released.
    """
    dims = (1, 2, 3, 4) if reduce == "video" else (1, 2, 3)
    error = (pred - target).square().mean(dims) - (ref - target).square().mean(dims)  # below 0: better
    winners, losers = error.chunk(2)
    z = -beta / 2 * (winners - losers)
    return -weight * F.logsigmoid(z).reshape(len(z), -1).mean(1), z


def pair_step(net, reference, base, pairs, captions, noise, u, weight, args):
    """dpo_loss of pairs (p,2,c,f,h,w), winner first, with their noise, at steps u (p,2) in 0..1.

    reference: called as `net` is; captions: p texts, None where dropped; weight (p,).
    """
    x0, noise, u = (v.transpose(0, 1).flatten(0, 1) for v in (pairs, noise, u))  # (2 p): winners, then losers
    turbo = args.origin if base.row.unet.guidance_dim else None
    x_t, t, target = noised(base.schedule, x0, noise, u, (args.frames, args.height, args.width), turbo)
    texts = [args.negative if c is None else c + args.suffix for c in captions]
    text, null = base.encode_text(texts), base.encode_null(args.negative, len(texts))
    text = torch.stack([n if c is None else x for c, x, n in zip(captions, text, null)])
    inputs = x_t, t, torch.cat([text, text])
    cond = training_conditions(base, args, texts + texts, t, args.train_fps)
    with torch.no_grad():  # first: what is recomputed backward must find the LoRA branches as it left them
        ref = reference(*inputs, **cond)[:, :x0.shape[1]].float()
    pred = net(*inputs, **cond)[:, :x0.shape[1]].float()
    return dpo_loss(pred, ref, target.float(), weight, args.beta_dpo, args.reduce)


@memory_advice("--grad-ckpt", "--batch 1", "--rank 16", "--offload", "--parallel fsdp", "fewer --frames")
def main(argv=None):
    args = get_args(argv)
    settings = fill(args, args.base, method="videodpo")
    stages, sets = plan(args)
    state = check_out(args, "videodpo") if "train" in stages else None
    folders = [args.pairs, args.eval_pairs] if args.pairs else [[folder] for folder in sets]
    read = lambda: [f and PairDataset(f, args.frames, args.height, args.width, args.seed) for f in folders]
    pairs = read() if stages == ["train"] else []
    env, base = setup(args), None
    if {"generate", "train"} & set(stages):
        base = load_base(args.base, args.weights, env.device, env.dtype if args.rank else torch.float32)
        base.freeze(env.dtype, but=[] if args.rank else ["net"])
        texts = sum(sets.values(), [row[-1] for data in pairs if data for row in data.rows])
        texts = [*(text + args.suffix for text in texts), args.negative]
        base.tokenize(texts)  # a word that the tiny world does not know is refused now
        with torch.no_grad(), env.autocast():  # every text once; then the text tower goes
            base.remember(texts)

    # ---- each clip, score and pair depends on its own number alone, and what is there is kept
    judge = scorer(base_row(args.base).text is None, args.score_weights, args.flow_weights, env.device)
    for folder, prompts in sets.items():
        if "generate" in stages:
            generate_folder(base, env, args, folder, prompts, args.samples, settings)
        if "score" in stages:
            score_folder(env, folder, judge)
        if "pair" in stages:
            pair_folder(env, folder, args.pair_score, args.drop_pairs, args.split_average)
    if "train" in stages:
        train(args, env, base, *(pairs or read()), judge, state, settings)
    if dist.is_initialized():
        dist.destroy_process_group()


def train(args, env, base, data, held, judge, state, settings):
    """data, held: pairs to learn from and to be tested by (or None); judge: of scorer(), or None."""
    prompts = [row[-1] for row in (held or data).rows][:args.eval_n]
    if args.rank:
        add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    else:
        frozen = frozen_copy(base.net, env.dtype, args.parallel, env.device, args.offload)
        base.net.requires_grad_(True)
    base.net.grad_ckpt = args.grad_ckpt
    net = parallelize(base.net, args.parallel, env.device, args.offload)
    reference = without_lora(net) if args.rank else frozen
    params = trained({"": net})
    opt = torch.optim.AdamW(params.values(), args.lr, args.betas, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    start, seen = load_state(args, env, state, params, opt, scaler=scaler)
    meta = dict(
        method="videodpo", base=args.base, rank=args.rank, alpha=args.alpha, lora_targets=args.lora_targets,
        sample=settings)
    log = Log(args, env, base.parts(), start)
    weights = torch.tensor([pair_weight(score, args.reweight) for score in data.scores])
    data, held = encode_pairs(base, env, args, data, "train"), encode_pairs(base, env, args, held, "held-out")
    numbers = MySamples(args, env, start, seen)
    batches = read_batches(data, numbers, args.seed, args.workers)
    guard = FiniteGuard(env)
    catch_signals(env)
    if env.main:
        keep_lines(Path(args.out, "eval.jsonl"), min(start + 1, args.steps) if state else 0)
    if not state:
        evaluate(args, env, base, net, reference, held, prompts, judge, 0)

    for step in range(start, args.steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args)
        total = torch.zeros(3, device=env.device)
        for micro in range(args.accum):
            batch, mine = next(batches), numbers[(step - start) * args.accum + micro]
            generators = [generator(args.seed, "sample", i) for i in mine]  # of all that is random
            luck = torch.stack([torch.rand(3, generator=g) for g in generators]).to(env.device)
            luck[:, :2] *= args.max_step
            x0 = batch["latents"].float().to(env.device)
            noise = randn(x0.shape, generators, env.device)
            if args.share_noise:
                luck[:, 1], noise[:, 1] = luck[:, 0], noise[:, 0]
            captions = [None if d else text for d, text in zip(luck[:, 2] < args.drop_text, batch["text"])]
            weight = weights[batch_indices(len(data), mine[0], args.batch, args.seed)].to(env.device)
            with sync_gradients(net, micro == args.accum - 1), env.autocast():
                loss, z = pair_step(net, reference, base, x0, captions, noise, luck[:, :2], weight, args)
                scaler.scale(loss.mean() / args.accum).backward()
            z = z.detach().reshape(len(z), -1).mean(1)  # of each video, with --reduce column too
            total += torch.stack([loss.detach().mean(), (z > 0).float().mean(), z.mean()]) / args.accum
        norm = guard.step(opt, scaler, params.values(), args.clip, loss=total[0])
        seen += args.batch * args.accum * env.world
        log.step(step, loss=total[0], accuracy=total[1], margin=total[2], grad=norm,
                 lr=opt.param_groups[0]["lr"])

        done, stop = step + 1, agree_to_stop(env)
        if stop or done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, env, done, seen, params, meta, opt, scaler=scaler)
        if stop:
            break
        if done == args.steps or (args.preview_every and done % args.preview_every == 0):
            evaluate(args, env, base, net, reference, held, prompts, judge, done)
    if env.main:
        draw_curve(log.path, Path(args.out, "curve.png"), ["loss", "accuracy", "margin"], "VideoDPO")


def plan(args):
    """-> stages to run, {folder: prompts} to make clips of; what cannot work is refused here."""
    check_writable(args.out)
    tiny, out = base_row(args.base).text is None, Path(args.out)
    if args.pairs and args.stage not in (None, "train"):
        raise UserError(f"--stage {args.stage}: --pairs brings pairs that are made; leave one of the two")
    if args.eval_pairs and not args.pairs:
        raise UserError("--eval-pairs: goes with --pairs; else held-out pairs are made from --eval-prompts")
    stages = [args.stage or "train"] if args.pairs or args.stage else list(NEEDS)
    prompts = read_prompts(args.prompts) if args.prompts else tiny_prompts(n=128) if tiny else []
    held_out = tiny_prompts(True, 128) if tiny and not args.prompts else prompts
    held_out = read_prompts(args.eval_prompts) if args.eval_prompts else held_out
    sets = {} if args.pairs else {out / "train": prompts, out / "held-out": held_out[:args.eval_n]}
    if "generate" in stages and not prompts:
        raise UserError("--prompts: give a file of prompts to generate from, or ready pairs with --pairs")
    if not tiny and ("score" in stages or args.score_weights):
        check_score_files(args.score_weights)
    absent = [folder / need for folder in sets if (need := NEEDS[stages[0]]) and not (folder / need).exists()]
    if absent:
        raise UserError(f"--stage {stages[0]}: no {absent[0]}; run the stage before it first")
    return stages, sets


@torch.no_grad()
def held_out_margins(args, env, base, net, reference, held, draws=4):
    """z of each held-out pair (n,): the mean over steps spread evenly, one noise for both clips."""
    z = []
    for i in range(min(len(held), args.eval_n)):
        x0, texts = held[i, i]["latents"].float().to(env.device)[None], [held[i, i]["text"]]
        for k in range(draws):
            noise = randn(x0[:, :1].shape, [generator("held-out", i, k)], env.device).expand_as(x0)
            u = torch.full((1, 2), args.max_step * (k + 0.5) / draws, device=env.device)
            with env.autocast():
                z.append(pair_step(net, reference, base, x0, texts, noise, u, 1.0, args)[1].mean())
    return torch.stack(z).view(-1, draws).mean(1)


def evaluate(args, env, base, net, reference, held, prompts, judge, step):
    """Held-out pairs and prompts, always from the same noise -> eval.jsonl, NAME.png and NAME/*.mp4."""
    name, row = {0: "before", args.steps: "after"}.get(step, f"step-{step}"), {"step": step}
    if held is not None and step:  # on every process alike; before training all are 0
        z = held_out_margins(args, env, base, net, reference, held)
        row |= dict(accuracy=(z > 0).float().mean().item(), margin=z.mean().item())
    videos = generate_split(base, env, prompts, [f"eval-{i}" for i in range(len(prompts))], args)
    if not env.main:
        return
    for i, video in enumerate(videos):
        write_video(Path(args.out, name, f"{i:04d}.mp4"), video, args.save_fps)
    if judge:  # on the files, as the pairs were
        row |= wins(Path(args.out), name, judge, prompts)
    if base.row.text is None:
        row["judge"] = judge_captions(videos, prompts)
    append_line(Path(args.out, "eval.jsonl"), row)
    shown = {k: round(v, 3) for k, v in (row | row.get("judge", {})).items() if isinstance(v, float)}
    print(f"held-out, {name}:", " ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    contact_sheet(list(videos[:16]), Path(args.out, f"{name}.png"), prompts[:16])


def select_pair(totals):
    """OmniScores of one prompt's clips -> indices of the best and of the worst, the product of the two."""
    best, worst = (pick(range(len(totals)), key=totals.__getitem__) for pick in (max, min))
    return best, worst, totals[best] * totals[worst]


def pair_weight(score, alpha, numerator=0.72):
    """(0.72 / score)^alpha: 0.72 was about the largest product, so that rarer, lower pairs weigh more."""
    return (numerator / score) ** alpha


def pair_folder(env, folder, score="product", drop=0.0, split_average=False):
    """Best against worst of each prompt's clips -> folder/pair.json.

    score: "product" of the two OmniScores, as released; "histogram": the product of their shares among all
    clips, as in the paper, 0.72 for the commonest pair. drop: share of pairs left out, those most alike;
    split_average: keep those with the mean of all clips in between.
    """
    clips, prompts, rows = read_clips(folder), {}, []
    totals = {row["clip"]: row["total"] for row in read_lines(Path(folder, "scores.jsonl"))}
    absent = [path.name for path, _ in clips if path.name not in totals]
    if absent:
        raise UserError(f"{folder}: {absent[0]} has no score yet: --stage score first")
    totals = [totals[path.name] for path, _ in clips]
    for i, (path, _) in enumerate(clips):
        prompts.setdefault(path.stem.rsplit("-", 1)[0], []).append(i)
    counts, edges = np.histogram(totals, bins=20)
    share = counts[np.searchsorted(edges[1:-1], totals, side="right")] / len(totals)
    for mine in prompts.values():
        best, worst, product = select_pair([totals[i] for i in mine])
        best, worst = mine[best], mine[worst]
        rows.append(dict(
            video1=best, video2=worst, label=0, frame_caption=[clips[best][1]],
            score=max(product, 1e-3) if score == "product" else float(share[best] * share[worst]),
            diff_score=totals[best] - totals[worst]))
    if score == "histogram":
        most = max(row["score"] for row in rows)
        rows = [row | {"score": 0.72 * row["score"] / most} for row in rows]
    alike, mean = sorted(rows, key=lambda row: row["diff_score"])[:int(drop * len(rows))], np.mean(totals)
    kept = [row for row in rows if row["diff_score"] > 0 and row not in alike and (
        not split_average or totals[row["video1"]] > mean > totals[row["video2"]])]
    if not kept:
        raise UserError(f"{folder}: no pair is left; give a smaller --drop-pairs, or more clips: --samples")
    finish(env, Path(folder, "pair.json"), lambda: json.dumps(kept, indent=1))
    if env.main:
        print(f"{folder}: {len(kept)} pairs of {len(prompts)} prompts, mean OmniScore {mean:.4f}", flush=True)


def wins(out, name, judged, prompts):
    """OmniScore of out/NAME/0000.mp4 ... -> means of its parts; "wins": share that beat theirs in before/."""
    scores, first = [], Path(out, "before.json")
    for i, prompt in enumerate(prompts):
        video, fps = read_video(Path(out, name, f"{i:04d}.mp4"))
        scores.append(judged(video, prompt, fps))
    if name == "before":
        write_atomic(first, lambda p: p.write_text(json.dumps(scores)))
    better = [a["total"] > b["total"] for a, b in zip(scores, json.loads(first.read_text()))]
    return {k: float(np.mean([s[k] for s in scores])) for k in scores[0]} | {"wins": float(np.mean(better))}


if __name__ == "__main__":
    run_command(main)
