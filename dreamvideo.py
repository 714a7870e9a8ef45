"""DreamVideo: your subject, your motion, or both, by small adapters (Wei et al., arXiv 2312.04433).

    L = E_{x0, eps, t} || m * (net(x_t, t, text [, image]) - eps) ||^2
    A(x) = x + up(gelu(down(x + strength * cond(image)))),   an adapter (models.Adapter)

A subject is learned from a few pictures in two steps: first a word, "*" (textual inversion: a vector, all
else frozen), then adapters beside the attention to the text, the word frozen (m: the subject's masks). A
motion is learned apart, from one or some clips, by adapters in the layers over time. The CLIP embedding of
one of the clip's frames tells these how things look, so that they need not learn it. Sampling puts both in.

    python dreamvideo.py --base tiny --stage token --out out/token          # minutes: RESULTS.md
    python dreamvideo.py --base tiny --stage identity --learned out/token --out out/identity
    python dreamvideo.py --base tiny --stage motion --out out/motion        # --motion zigzagging: another one
    python sample.py --ckpt out/identity --ckpt out/motion --subject-below 300 --prompt "a * moving"
    python dreamvideo.py --weights W --stage token --data dog --init dog --out out/token     # dog/masks/*.png
    python dreamvideo.py --weights W --stage identity --data dog --learned out/token --out out/identity
    torchrun --nproc_per_node=4 dreamvideo.py --weights W --stage motion --data clips --drop-image 0
    python dreamvideo.py ... --resume                                       # goes on bit for bit
    python sample.py --ckpt out/identity:500 --ckpt out/motion:1000 --appearance-image dog.png --prompt "a *"
    python bases.py --export-adapters F --ckpt out/motion:500  # DreamVideo's own file; sample.py --lora reads

Differences from the original code
 - The first update has a learning rate; a step's number is that of the updates done.
 - A picture's mask is its own or an error; clips start at the right frame, too short ones are refused.
 - Left out: div loss, latents of the last batch on disk, previews with other conditions than training.
 - The tiny base never saw single frames: pictures stand still for 8. Its word is two vectors, not one.
 - Ours is sample.py's --subject-below: the motion lays out the path before the subject's adapters join in.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from bases import base_row, fill, latent_shape, load_base, read_words
from common import (
    COUNT,
    DECAY,
    NATURAL,
    POSITIVE,
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
    generator,
    keep_lines,
    load_state,
    lr_at,
    memory_advice,
    run_command,
    save_checkpoint,
    seed_of,
    setup,
    trained,
)
from data import (
    IMAGES,
    Few,
    VideoDataset,
    natural_order,
    center_crop_wide,
    contact_sheet,
    encode_once,
    image_tensor,
    open_image,
    read_batches,
    read_image_prompts,
    write_video,
)
from diffusion import diffusion_loss, offset_noise, randn
from models import SpatialTransformer, TemporalTransformer, parallelize, sync_gradients
from pipeline import frame_picture, generate_split, read_image_pairs, tower_image
from tinyworld import (
    MOTIONS,
    NEW_MOTIONS,
    path_error,
    subject_likeness,
    tiny_motion,
    tiny_previews,
    tiny_subject,
)
from weights import LEARNED

ADAPTED = {"tiny": "tiny-dreamvideo", "modelscope-v1.5": "dreamvideo"}  # a base -> itself with adapters
STAGES = {"token": dict(steps=3000, batch=4, lr=1e-4, save_every=200),
          "identity": dict(steps=1000, batch=4, lr=1e-5, save_every=100),
          "motion": dict(steps=1000, batch=1, lr=1e-5, save_every=100, drop_text=0.5, drop_image=0.5)}
TINY = dict(batch=4, betas=(0.9, 0.99), picture_frames=8, vectors=2, init="white circle", masked_loss=False,
            offset_noise=0.0, lr_schedule="cosine", cache_latents=True, workers=0, grad_ckpt=False,
            log_every=50)
TINY_STAGES = {"token": dict(steps=200, lr=2e-2), "identity": dict(steps=1000, lr=4e-3),
               "motion": dict(steps=500, lr=3e-3, drop_text=0.0, drop_image=1.0)}


def get_args(argv=None):
    p = Parser(__doc__)
    yes_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--base", default="dreamvideo", help="base network (python bases.py lists them)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--stage", choices=STAGES, default="token", help="what is learned (default: token)")
    p.add_argument("--out", default="out/dreamvideo", help="run folder")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    # data
    p.add_argument("--data", help="folder of pictures (and masks/), or their list; motion: as for t2v.py")
    p.add_argument("--motion", choices=MOTIONS + NEW_MOTIONS, help="tiny world: motion of all clips")
    p.add_argument("--learned", metavar="FILE", help="identity: its word, a run's folder or a public file")
    p.add_argument("--init", help="token: words from whose embeddings it starts (default: random)")
    p.add_argument("--vectors", type=COUNT, default=1, help="token: vectors that the word consists of")
    p.add_argument("--masked-loss", action=yes_no, default=True, help="only the subject's pixels count")
    p.add_argument("--picture-frames", type=COUNT, default=1, help="frames for which a picture stands still")
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--read-fps", type=POSITIVE, help="rate at which clips are read (default: every frame)")
    p.add_argument("--cache-latents", action=yes_no, default=False, help="encode once, into --out")
    p.add_argument("--negative", help="text of dropped captions and of the unconditional branch")
    p.add_argument("--drop-text", type=SHARE, default=0.0, help="share of captions dropped (motion: 0.5)")
    p.add_argument("--drop-image", type=SHARE, default=0.0, help="share of images dropped (one clip: 0.5)")
    # optimisation
    p.add_argument("--steps", type=COUNT, help="optimizer steps (default: 3000, 1000, 1000)")
    p.add_argument("--batch", type=COUNT, help="clips a process and micro-step (default: 4, 4, 1)")
    p.add_argument("--accum", type=COUNT, default=1, help="micro-steps a step")
    p.add_argument("--lr", type=POSITIVE, help="learning rate (default: 1e-4, 1e-5, 1e-5)")
    p.add_argument("--wd", type=UNSIGNED, default=0.0, help="weight decay")
    p.add_argument("--betas", type=DECAY, nargs=2, default=(0.9, 0.999), help="AdamW betas")
    p.add_argument("--lr-schedule", choices=("constant", "cosine", "cosine-restarts"), default="constant")
    p.add_argument("--warmup", type=NATURAL, default=10, help="steps of linear warm-up")
    p.add_argument("--clip", type=POSITIVE, default=1e9, help="largest gradient norm (published: none)")
    p.add_argument("--offset-noise", type=UNSIGNED, default=0.1, help="noise shared by a frame (VGen: 0.1)")
    # machine
    p.add_argument("--workers", type=NATURAL, default=2, help="processes that read clips")
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on GPU, fp32 on CPU")
    p.add_argument("--grad-ckpt", action=yes_no, default=True, help="recompute blocks backward: less memory")
    p.add_argument("--offload", action="store_true", help="activations (fsdp: weights too) wait on the CPU")
    # run
    p.add_argument("--seed", type=NATURAL, default=0, help="seed")
    p.add_argument("--prompts", help="file of preview prompts, or image|||prompt lines (default: a caption)")
    p.add_argument("--save-every", type=COUNT, help="steps between checkpoints (default: 200, 100, 100)")
    p.add_argument("--keep", type=COUNT, default=10, help="checkpoints kept")
    p.add_argument("--preview-every", type=NATURAL, default=0, help="steps between evaluations; 0: two only")
    p.add_argument("--log-every", type=COUNT, default=1, help="steps between log lines on the screen")
    p.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    p.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")
    stage = p.parse_known_args(argv)[0].stage
    p.set_defaults(**STAGES[stage])
    args = apply_defaults(p, argv, dict.fromkeys(("tiny", ADAPTED["tiny"]), TINY | TINY_STAGES[stage]))
    args.base = ADAPTED.get(args.base, args.base)
    tiny = base_row(args.base).text is None
    if not tiny and not args.data:
        raise UserError("--data: give a folder or list of pictures, for --stage motion of captioned clips")
    if args.motion and (not tiny or stage != "motion" or args.motion not in NEW_MOTIONS):
        raise UserError(f"--motion {args.motion}: --base tiny --stage motion has {', '.join(NEW_MOTIONS)}")
    if args.learned and stage != "identity":
        raise UserError("--learned: only --stage identity goes on from a word")
    if args.init and len(args.init.split()) not in (1, args.vectors):
        raise UserError(f"--init {args.init!r}: give one word, or one for each of the {args.vectors} vectors")
    return args


# ---- the method

def adapter_loss(net, schedule, x0, noise, t, text, mask=None, **cond):
    """L, (b,): x0 (b,c,f,h,w) latents, mask (b,1,f,h,w) of 0 and 1. The mean runs over all positions."""
    return diffusion_loss(lambda x, t: net(x, t, text, **cond), schedule, x0, noise, t, mask)


def draw_loss(net, base, x0, batch, generators, args):
    """adapter_loss of a batch, its steps, noise and dropped conditions drawn; generators: one a sample."""
    luck = torch.stack([torch.rand(4, generator=g) for g in generators])
    t = (luck[:, 0] * len(base.schedule.alpha_bar)).long().to(x0.device)
    shared = randn((*x0.shape[:3], 1, 1), generators)
    noise = offset_noise(randn(x0.shape, generators), shared, args.offset_noise).to(x0.device)
    captions = [args.negative if d else c for c, d in zip(batch["text"], luck[:, 1] < args.drop_text)]
    text, cond = base.encode_text(captions), {}
    if args.stage == "motion":  # how any of the clip's frames looks; dropped, it is zeros (as published)
        pictures = torch.stack([p[int(u * len(p))] for p, u in zip(batch["pictures"], luck[:, 2])])
        image = base.image_encoder(pictures.to(next(base.image_encoder.parameters()).dtype))
        keep = (luck[:, 3] >= args.drop_image).to(image)
        cond["appearance"] = (image * keep[:, None])[:, None].float()  # b 1 d
    return adapter_loss(net, base.schedule, x0, noise, t, text, batch.get("mask"), **cond)


def first_vectors(base, args):
    """Where the word starts, (N, width): the embeddings of the words --init, else uniform in 0..1."""
    table = base.text_encoder.token_embedding.weight
    if not args.init:
        return torch.rand(args.vectors, table.shape[1], generator=generator(args.seed, "token"))
    # of each word its first token; CLIP's texts begin with a start token
    tokens = base.tokenize(args.init.split())[:, 1 if base.row.text else 0]
    return table[tokens.to(table.device)].float().expand(args.vectors, -1).clone()


def choose_trained(base, args, env):
    """-> {key: parameter} for the checkpoint: what the stage trains, and the word that it goes on from."""
    if args.stage == "token":
        base.learned = {base.token_of("*"): nn.Parameter(first_vectors(base, args).to(env.device))}
    elif args.learned:
        base.learn(read_words(base, args.learned), f"--learned {args.learned}")
    kind = {"identity": SpatialTransformer, "motion": TemporalTransformer}.get(args.stage, ())
    for module in base.net.modules():
        for name, p in module.named_parameters() if isinstance(module, kind) else ():
            if "_adapter." in name:  # trained weights are kept in fp32
                p.data = p.data.float()
                p.requires_grad_(True)
    return {f"{LEARNED}*": vectors for vectors in base.learned.values()}


@memory_advice("--grad-ckpt", "--batch 1", "--offload", "fewer --frames", "smaller --height and --width")
def main(argv=None):
    args = get_args(argv)
    settings = fill(args, args.base, method="dreamvideo")
    data, previews, truth = read_data(args)
    captions = [row[2] for row in data.rows]
    state = check_out(args, "dreamvideo")
    env = setup(args)
    base = load_base(args.base, args.weights, env.device, env.dtype)
    params = choose_trained(base, args, env)
    texts = [*captions, args.negative, *(prompt for _, prompt in previews)]
    base.tokenize(texts)  # a word that the tiny world does not know is refused now
    if args.stage == "identity" and not params and any("*" in text.split() for text in captions):
        raise UserError("--learned: the captions hold *; give the word that --stage token learned")
    base.net.grad_ckpt = args.grad_ckpt
    base.net.train()
    net = base.net if args.stage == "token" else parallelize(base.net, "ddp", env.device)
    params = trained({"": net}) | params
    learning = [p for p in params.values() if p.requires_grad]
    opt = torch.optim.AdamW(learning, args.lr, args.betas, weight_decay=args.wd)
    scaler = torch.amp.GradScaler(env.device.type, enabled=env.dtype == torch.float16)
    start, seen = load_state(args, env, state, params, opt, scaler=scaler)
    meta = dict(method="dreamvideo", base=args.base, rank=0, stage=args.stage, sample=settings)
    log = Log(args, env, base.parts() | {"word": nn.ParameterList(base.learned.values())}, start)
    if args.stage != "token":  # the text tower is done
        with torch.no_grad(), env.autocast():
            base.remember(texts)
    if args.cache_latents:
        about = {k: getattr(args, k) for k in (
            "base", "weights", "data", "motion", "frames", "height", "width", "read_fps", "picture_frames",
            "masked_loss", "seed")}
        data = encode_once(Path(args.out, "latents"), data, lambda batch: {
            k: v.half() for k, v in encode(base, batch, env, args).items()}, about, env, args.workers)
    numbers = MySamples(args, env, start, seen)
    batches = read_batches(data, numbers, args.seed, args.workers)
    guard = FiniteGuard(env)
    catch_signals(env)
    if env.main:
        keep_lines(Path(args.out, "eval.jsonl"), min(start + 1, args.steps) if state else 0)
    if not state:
        evaluate(args, env, base, previews, truth, 0)

    for step in range(start, args.steps):
        for group in opt.param_groups:
            group["lr"] = lr_at(step, args)
        total = 0.0
        for micro in range(args.accum):
            batch, mine = next(batches), numbers[(step - start) * args.accum + micro]
            generators = [generator(args.seed, "sample", i) for i in mine]  # of all that is random
            torch.manual_seed(seed_of(args.seed, "dropout", mine[0]))
            x0, batch = draw_latents(base, batch, generators, env, args)
            with sync_gradients(net, micro == args.accum - 1), env.autocast():
                loss = draw_loss(net, base, x0, batch, generators, args).mean()
                scaler.scale(loss / args.accum).backward()
            total += loss.detach() / args.accum
        if args.stage == "token" and env.world > 1:  # no wrapped network averages the word's gradient
            dist.all_reduce(learning[0].grad.div_(env.world))
        norm = guard.step(opt, scaler, learning, args.clip, loss=total)
        seen += args.batch * args.accum * env.world
        log.step(step, loss=total, grad=norm, lr=opt.param_groups[0]["lr"])

        done, stop = step + 1, agree_to_stop(env)
        if stop or done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args, env, done, seen, params, meta, opt, scaler=scaler)
        if stop:
            break
        if args.preview_every and done % args.preview_every == 0 and done < args.steps:
            evaluate(args, env, base, previews, truth, done)
    else:  # not stopped
        evaluate(args, env, base, previews, truth, args.steps)
    if env.main:
        draw_curve(log.path, Path(args.out, "curve.png"), ["loss", "grad"], f"dreamvideo, {args.stage}")
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- data

def read_data(args):
    """-> data set, previews [(appearance image or None, prompt)], truth: what the tiny world is judged by."""
    if args.learned and not Path(args.learned).exists():
        raise UserError(f"--learned {args.learned}: no such file, nor a run's folder")
    size, motion, truth = (args.height, args.width), args.stage == "motion", None
    previews = tiny_previews(not motion)
    if motion and args.data:
        data = VideoDataset(args.data, args.frames, *size, args.read_fps, args.seed)
        previews = [(frame_picture(data[0, 0]["video"][:, 0]), data.rows[0][2])]
    elif motion:
        data, truth = tiny_motion(args.seed, 3, args.motion or NEW_MOTIONS[1], args.frames)
    else:
        cells = latent_shape(args.base, 1, *size)[2:]
        if args.data:
            items = read_subject(args.data, size, cells, args.masked_loss)
            previews = [(None, items[0]["text"])]
        else:
            items = truth = tiny_subject(args.seed, 4)
        data = stand_still(items, args.picture_frames, cells if args.masked_loss else None)
    return data, read_image_pairs(args.prompts, base_row(args.base)) if args.prompts else previews, truth


@torch.no_grad()
def encode(base, batch, env, args):
    """A batch of clips -> {"mean", "std"} (b,c,f,h,w) of their latents, "mask", and for a motion "pictures"
    (b,f,3,s,s), each frame as the image tower reads it; on the CPU."""
    parts = [base.vae.moments(clip.transpose(0, 1).to(env.device, env.dtype)) for clip in batch["video"]]
    mean, logvar = (torch.stack([m.transpose(0, 1).cpu() for m in column]) for column in zip(*parts))
    found = {"mean": mean, "std": (0.5 * logvar).exp()} | {k: v for k, v in batch.items() if k == "mask"}
    if args.stage == "motion":
        side = (base.row.image or base.row.text).image_size
        frames = batch["video"].transpose(1, 2).flatten(0, 1)
        pictures = [tower_image(frame_picture(frame), args.width, side) for frame in frames]
        found["pictures"] = torch.stack(pictures).unflatten(0, (len(batch["video"]), -1))
    return found


def draw_latents(base, batch, generators, env, args):
    """A batch, encoded already or not -> samples of the encoder's Gaussian, the batch (mask, pictures)."""
    found = batch if "mean" in batch else encode(base, batch, env, args)
    found = {k: v.float().to(env.device) for k, v in found.items() if k != "text"}
    z = found["mean"] + found["std"] * randn(found["mean"].shape, generators, env.device)
    return z * base.vae.cfg.scale, found | {"text": batch["text"]}


# ---- evaluation

@torch.no_grad()
def evaluate(args, env, base, previews, truth, step):
    """Clips of the previews, always from the same noise -> NAME.png, NAME/*.mp4, on tiny eval.jsonl."""
    name = {0: "before", args.steps: "after"}.get(step, f"step-{step}")
    images, prompts = zip(*previews)
    base.net.eval()
    videos = generate_split(base, env, list(prompts), [f"eval-{i}" for i in range(len(images))], args, images)
    base.net.train()
    if not env.main:
        return
    if truth is not None:
        row = path_error(videos, truth) if args.stage == "motion" else subject_likeness(videos, truth)
        append_line(Path(args.out, "eval.jsonl"), dict(step=step, **row))
        print(f"previews, {name}:", " ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
    contact_sheet(list(videos[:16]), Path(args.out, f"{name}.png"), prompts[:16])
    for i, video in enumerate(videos[:16]):
        write_video(Path(args.out, name, f"{i:04d}.mp4"), video, args.save_fps)


def read_subject(source, size, cells, masked=True, caption="a *"):
    """Pictures of one subject -> items {"video" (3,1,h,w) in [-1,1], "text", "mask" (1,1,*cells), 1: subject}

    source: a folder of pictures, or a .txt of DreamVideo's lines `picture|||caption` ({} in a caption stands
    for *). size, cells: (h, w) in pixels, in latents. Masks: masks/NAME.png beside the pictures, white where
    the subject is.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such folder or list of pictures")
    if source.is_dir():
        files = sorted((p for p in source.iterdir() if p.suffix.lower() in IMAGES), key=natural_order)
        rows = [(p, caption) for p in files]
    else:
        rows = [(p, text.replace("{}", "*")) for p, text in read_image_prompts(source)]
    if not rows:
        raise UserError(f"{source}: no pictures in this folder ({', '.join(IMAGES)})")
    items = []
    for path, text in rows:
        item = {"video": image_tensor(center_crop_wide(open_image(path), size))[:, None], "text": text}
        if masked:
            file = path.parent / "masks" / f"{path.stem}.png"
            if not file.is_file():
                raise UserError(f"{file}: no mask for {path.name}; --no-masked-loss trains without masks")
            grey = open_image(file).convert("L")
            if grey.size != open_image(path).size:
                raise UserError(f"{file}: {grey.width}x{grey.height} pixels, the picture has another size")
            mask = np.array(center_crop_wide(grey, cells, Image.NEAREST))
            if not np.isin(mask, (0, 255)).all():
                raise UserError(f"{file}: grey pixels; a mask is white where the subject is, black elsewhere")
            item["mask"] = torch.from_numpy(mask / 255).float()[None, None]
        items.append(item)
    return items


def stand_still(items, frames, cells):
    """Pictures -> clips of so many equal frames; cells (h, w): the latents that masks are brought to.

    A cell counts if any of it is the subject's. None: the masks are left out.
    """
    clips = []
    for item in items:
        clip = {"video": item["video"].expand(-1, frames, -1, -1), "text": item["text"]}
        if cells:
            clip["mask"] = F.adaptive_max_pool2d(item["mask"], cells).expand(-1, frames, -1, -1)
        clips.append(clip)
    return Few(clips)


if __name__ == "__main__":
    run_command(main)
