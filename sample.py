"""Sample videos from a base, or from one of our runs on top of it.

    python sample.py --base tiny --prompt "a red circle moving left on a gray background"
    python sample.py --ckpt out/vader --prompts prompts.txt --n 4
    python sample.py --base tiny --judge 256               # 256 random captions, and how many clips are right
    torchrun --nproc_per_node=4 sample.py --base modelscope --weights weights/modelscope --prompts prompts.txt

Writes OUT/0000.mp4 ..., OUT/sheet.png (contact sheet), OUT/index.jsonl (file, prompt, seed, base, adapters,
settings).
A clip depends on its prompt, its number and --seed alone: not on --batch, nor on the number of processes.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from bases import BASES, base_row, fill, latent_shape, load_base
from common import (Env, UserError, generator, load_checkpoint, memory_advice, net_and_text, setup,
                    write_atomic)
from data import contact_sheet, read_prompts, read_video, tiny_captions, write_video
from diffusion import ddim, guided, randn
from metrics import judge_captions
from models import add_lora, merge_lora


@torch.no_grad()
def generate(base, env: Env, prompts, seeds, args, batch=8, progress=False):
    """Prompts -> videos (n,3,f,h,w) in [-1,1] on the CPU; clip i from noise keyed by seeds[i].

    args: sampling options, filled by bases.fill(): frames, height, width, negative, cfg, sample_steps, eta,
    fps. Training previews and evaluations call this too: what they show is what one gets.
    """
    shape, videos = latent_shape(base.name, args.frames, args.height, args.width), []
    for i in range(0, len(prompts), batch):
        part, generators = prompts[i:i + batch], [generator("sample", s) for s in seeds[i:i + batch]]
        cond = {} if args.fps is None else {"fps": torch.full((len(part),), args.fps, device=env.device)}
        with env.autocast():
            text, null = base.encode_text(part), base.encode_text([args.negative] * len(part))
            x_T = randn((len(part), *shape), generators, env.device)
            latents = ddim(
                guided(base.net, text, null, args.cfg, **cond), x_T, base.schedule, args.sample_steps,
                args.eta, generators, spacing=args.spacing, progress=tqdm if progress else None)
            videos.append(base.vae.decode(latents).float().clamp(-1, 1).cpu())
    return torch.cat(videos)


def generate_split(base, env: Env, prompts, seeds, args):
    """generate(), the prompts shared out over the processes: each must call it, and each gets all videos."""
    per = -(-len(prompts) // env.world)  # the same number on each (FSDP needs it): the last may repeat some
    mine = [i % len(prompts) for i in range(env.rank * per, (env.rank + 1) * per)]
    videos = generate(base, env, [prompts[i] for i in mine], [seeds[i] for i in mine], args)
    if env.world == 1:
        return videos
    parts = [None] * env.world
    dist.all_gather_object(parts, videos)
    return torch.cat(parts)[:len(prompts)]


def load_run(path, tensors, meta, weights, env):
    """What load_checkpoint(path) gave -> the run's base with its trained tensors put in, LoRA merged."""
    base = load_base(meta["base"], weights or meta["args"].get("weights"), env.device, torch.float32)
    net, text = net_and_text(tensors)
    if meta["rank"]:
        add_lora(base.net, meta["rank"], meta["alpha"], meta["lora_targets"])
    for module, state in ((base.net, net), (base.text_encoder, text)):
        unexpected = module.load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            raise UserError(f"--ckpt {path}: does not fit base {base.name}: unexpected {unexpected[0]}")
    merge_lora(base.net)
    for module in (base.net, base.vae, base.text_encoder):
        module.requires_grad_(False).to(env.dtype)
    return base


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what
    p.add_argument("--base", help=f"base to sample from: {', '.join(BASES)} (default: the run's)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--ckpt", help="folder of one of our runs")
    p.add_argument("--out", default="out/sample", help="folder to write")
    p.add_argument("--prompt", help="one prompt")
    p.add_argument("--prompts", help="file of prompts: txt, csv, jsonl or json")
    p.add_argument("--judge", type=int, metavar="N", help="tiny world: N random captions, judged")
    p.add_argument("--negative", help="negative prompt (default: the run's or the base's)")
    # pixels
    p.add_argument("--frames", type=int, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=int, help="pixels (default: the base's)")
    p.add_argument("--width", type=int, help="pixels (default: the base's)")
    p.add_argument("--fps", type=int, help="frame rate as a condition, for bases that take one")
    p.add_argument("--save-fps", type=int, help="frame rate of the files")
    # sampling
    p.add_argument("--sample-steps", type=int, help="sampler steps (default: the base's)")
    p.add_argument("--eta", type=float, help="DDIM noise, 0 deterministic to 1 (default: the base's)")
    p.add_argument("--cfg", type=float, help="guidance u + cfg (c - u); 1 is off (default: the base's)")
    p.add_argument("--n", type=int, default=1, help="clips a prompt")
    p.add_argument("--batch", type=int, default=4, help="clips at a time on each process")
    p.add_argument("--seed", type=int, default=0, help="seed")
    # machine
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on GPU, fp32 on CPU")
    args = p.parse_args(argv)
    if not args.base and not args.ckpt:
        raise UserError("give --base NAME or --ckpt FOLDER")
    if sum(bool(x) for x in (args.prompt, args.prompts, args.judge)) != 1:
        raise UserError("give one of --prompt TEXT, --prompts FILE, --judge N")
    return args


def main(argv=None):
    args = get_args(argv)
    if args.base:
        base_row(args.base)  # an unknown name is refused before anything is read
    if args.judge:
        captions, rng = tiny_captions(), np.random.default_rng(args.seed)
        prompts = [captions[i] for i in rng.integers(len(captions), size=args.judge)]
    else:
        prompts = [args.prompt] if args.prompt else read_prompts(args.prompts)
    tensors, meta = load_checkpoint(args.ckpt) if args.ckpt else ({}, {"base": args.base, "sample": {}})
    if args.base and args.base != meta["base"]:
        raise UserError(f"--ckpt {args.ckpt}: was trained on base {meta['base']}, not {args.base}")
    settings = fill(args, meta["base"], meta["sample"])
    env = setup(args)
    if args.ckpt:
        base = load_run(args.ckpt, tensors, meta, args.weights, env)
    else:
        base = load_base(args.base, args.weights, env.device, env.dtype)

    jobs = [(prompt, f"{args.seed}-{i}-{k}") for i, prompt in enumerate(prompts) for k in range(args.n)]
    out, start = Path(args.out), time.time()
    mine = list(range(env.rank, len(jobs), env.world))
    with memory_advice("--batch 1", "--dtype bf16", "fewer --frames", "a smaller --height and --width"):
        for i in range(0, len(mine), args.batch):
            part = mine[i:i + args.batch]
            videos = generate(
                base, env, [jobs[j][0] for j in part], [jobs[j][1] for j in part], args, args.batch,
                progress=env.main and env.device.type == "cuda")
            for j, video in zip(part, videos):
                write_video(out / f"{j:04d}.mp4", video, args.save_fps)
            if env.main:
                done = min(len(jobs), (i + len(part)) * env.world)
                print(f"{done}/{len(jobs)} clips, {time.time() - start:.1f} s", flush=True)
    if env.world > 1:
        dist.barrier()
    if env.main:
        adapters = [args.ckpt] if args.ckpt else []
        rows = [dict(file=f"{j:04d}.mp4", prompt=prompt, seed=seed, base=base.name, adapters=adapters,
                     **settings) for j, (prompt, seed) in enumerate(jobs)]
        write_atomic(out / "index.jsonl", lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in rows)))
        shown = rows[:32]
        clips = [read_video(out / r["file"])[0] for r in shown]
        contact_sheet(clips, out / "sheet.png", [r["prompt"] for r in shown])
        if args.judge:  # on the files, as one would look at them
            files = [read_video(out / r["file"])[0] for r in rows]
            verdict = judge_captions(files, [r["prompt"] for r in rows])
            print("judge:", " ".join(f"{k} {v:.3f}" for k, v in verdict.items()))
            text = json.dumps(dict(clips=len(rows), **settings, **verdict), indent=1)
            write_atomic(out / "judge.json", lambda p: p.write_text(text))
        print(f"{out}: {len(rows)} clips, sheet.png, index.jsonl")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
