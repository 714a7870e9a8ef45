"""Sample videos from a base, or from one of our runs on top of it.

    python sample.py --base tiny --prompt "a red circle moving left on a gray background"
    python sample.py --ckpt out/vader --prompts prompts.txt --n 4
    torchrun --nproc_per_node=4 sample.py --base modelscope --weights weights/modelscope --prompts prompts.txt

Writes OUT/0000.mp4 ..., OUT/sheet.png (contact sheet) and OUT/index.jsonl (file, prompt, seed, base, adapters, settings).
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

from bases import BASES, base_row, load_base
from common import Env, UserError, generator, load_checkpoint, memory_advice, setup, write_atomic
from data import contact_sheet, read_prompts, read_video, tiny_captions, write_video
from diffusion import ddim, guided, randn
from metrics import judge_captions
from models import add_lora, merge_lora


@torch.no_grad()
def generate(base, env: Env, prompts, seeds, size, negative="", cfg=None, sample_steps=None, eta=None, fps=None, batch=8, progress=False):
    """Prompts -> videos (n,3,f,h,w) in [-1,1] on the CPU; clip i from noise keyed by seeds[i]. size: (frames, height, width).

    What is None takes the base's default. Training previews and evaluations call this too: what they show is what one gets.
    """
    row = base.row.sample
    cfg, eta, steps = (row[k] if v is None else v for k, v in (("cfg", cfg), ("eta", eta), ("sample_steps", sample_steps)))
    shape, videos = base.latent_shape(*size), []
    for i in range(0, len(prompts), batch):
        part = prompts[i:i + batch]
        generators = [generator("sample", s) for s in seeds[i:i + batch]]
        cond = {} if fps is None else {"fps": torch.full((len(part),), fps, device=env.device)}
        with env.autocast():
            text, null = base.encode_text(part), base.encode_text([negative] * len(part))
            x_T = randn((len(part), *shape), generators, env.device)
            latents = ddim(guided(base.net, text, null, cfg, **cond), x_T, base.schedule, steps, eta, generators,
                           spacing=row["spacing"], progress=tqdm if progress else None)
            videos.append(base.vae.decode(latents).float().clamp(-1, 1).cpu())
    return torch.cat(videos)


def generate_split(base, env: Env, prompts, seeds, size, **options):
    """generate(), the prompts shared out over the processes; each must call it, and each gets all videos back."""
    per = -(-len(prompts) // env.world)  # the same number on each process (FSDP needs it): the last one may repeat some
    mine = [i % len(prompts) for i in range(env.rank * per, (env.rank + 1) * per)]
    videos = generate(base, env, [prompts[i] for i in mine], [seeds[i] for i in mine], size, **options)
    if env.world == 1:
        return videos
    parts = [None] * env.world
    dist.all_gather_object(parts, videos)
    return torch.cat(parts)[:len(prompts)]


def load_run(path, weights=None, env=None):
    """A run of ours (folder) -> (its base with the trained tensors put in, LoRA merged; meta)."""
    tensors, meta = load_checkpoint(path)
    base = load_base(meta["base"], weights or meta["args"].get("weights"), env.device, torch.float32)
    apply_checkpoint(base, tensors, meta, path)
    base.net.to(env.dtype)
    return base, meta


def apply_checkpoint(base, tensors, meta, path):
    """Put the trained tensors of a run into a base: LoRA (merged afterwards), network and text encoder weights."""
    if meta["base"] != base.name:
        raise UserError(f"--ckpt {path}: was trained on base {meta['base']}, not {base.name}")
    text = {k.removeprefix("text_encoder."): v for k, v in tensors.items() if k.startswith("text_encoder.")}
    net = {k: v for k, v in tensors.items() if not k.startswith("text_encoder.")}
    if meta.get("rank"):
        add_lora(base.net, meta["rank"], meta["alpha"], meta["lora_targets"])
    for module, state in ((base.net, net), (base.text_encoder, text)):
        unexpected = module.load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            raise UserError(f"--ckpt {path}: does not fit base {base.name}: unexpected {unexpected[0]}")
    merge_lora(base.net)
    base.net.requires_grad_(False)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what
    p.add_argument("--base", help=f"base to sample from: {', '.join(BASES)} (default: the run's)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--ckpt", help="folder of one of our runs")
    p.add_argument("--out", default="out/sample", help="folder to write")
    p.add_argument("--prompt", help="one prompt")
    p.add_argument("--prompts", help="file of prompts: txt, csv, jsonl or json")
    p.add_argument("--judge", type=int, metavar="N", help="tiny world: N random captions, and the judge says how many clips are right")
    p.add_argument("--negative", help="negative prompt (default: the base's or the run's)")
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
    if args.judge:
        captions, rng = tiny_captions(), np.random.default_rng(args.seed)
        prompts = [captions[i] for i in rng.integers(len(captions), size=args.judge)]
    else:
        prompts = [args.prompt] if args.prompt else read_prompts(args.prompts)
    env = setup(args)
    if args.ckpt:
        base, meta = load_run(args.ckpt, args.weights, env)
        if args.base and args.base != base.name:
            raise UserError(f"--ckpt {args.ckpt}: was trained on base {base.name}, not {args.base}")
        defaults = {**base.row.sample, **{k: v for k, v in meta["sample"].items() if v is not None}}
    else:
        defaults = base_row(args.base).sample
        base = load_base(args.base, args.weights, env.device, env.dtype)
    chosen = {k: defaults.get(k) if getattr(args, k) is None else getattr(args, k)
              for k in ("frames", "height", "width", "fps", "save_fps", "sample_steps", "eta", "cfg", "negative")}
    size = chosen["frames"], chosen["height"], chosen["width"]
    base.latent_shape(*size)  # a size that does not fit is refused here

    jobs = [(prompt, f"{args.seed}-{i}-{k}") for i, prompt in enumerate(prompts) for k in range(args.n)]
    out, start = Path(args.out), time.time()
    mine = list(range(env.rank, len(jobs), env.world))
    with memory_advice("--batch 1", "--dtype bf16", "fewer --frames", "a smaller --height and --width"):
        for i in range(0, len(mine), args.batch):
            part = mine[i:i + args.batch]
            videos = generate(base, env, [jobs[j][0] for j in part], [jobs[j][1] for j in part], size, chosen["negative"], chosen["cfg"],
                              chosen["sample_steps"], chosen["eta"], chosen["fps"], args.batch, progress=env.main and env.device.type == "cuda")
            for j, video in zip(part, videos):
                write_video(out / f"{j:04d}.mp4", video, chosen["save_fps"])
            if env.main:
                print(f"{min(len(jobs), (i + len(part)) * env.world)}/{len(jobs)} clips, {time.time() - start:.1f} s", flush=True)
    if env.world > 1:
        dist.barrier()
    if env.main:
        rows = [dict(file=f"{j:04d}.mp4", prompt=prompt, seed=seed, base=base.name, adapters=[args.ckpt] if args.ckpt else [], **chosen)
                for j, (prompt, seed) in enumerate(jobs)]
        write_atomic(out / "index.jsonl", lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in rows)))
        shown = rows[:32]
        contact_sheet([read_video(out / r["file"])[0] for r in shown], out / "sheet.png", [r["prompt"] for r in shown])
        if args.judge:  # on the files, as one would look at them
            verdict = judge_captions([read_video(out / r["file"])[0] for r in rows], [r["prompt"] for r in rows])
            write_atomic(out / "judge.json", lambda p: p.write_text(json.dumps(dict(n=len(rows), seed=args.seed, **verdict), indent=1)))
            print("judge:", " ".join(f"{k} {v:.3f}" for k, v in verdict.items()))
        print(f"{out}: {len(rows)} clips, sheet.png, index.jsonl")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
