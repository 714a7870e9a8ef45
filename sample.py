"""Sample videos from a base, or from one of our runs on top of it.

    python sample.py --base tiny --prompt "a red circle moving left on a gray background"
    python sample.py --ckpt out/vader --prompts prompts.txt --n 4
    python sample.py --base tiny --judge 256               # 256 random captions, and how many clips are right
    python sample.py --ckpt out/vader --prompts prompts.txt --reward hps,aesthetic   # and a table of scores
    torchrun --nproc_per_node=4 sample.py --base modelscope --weights weights/modelscope --prompts prompts.txt
    python sample.py --base i2vgen-xl --image dog.png --prompt "a dog runs"  # or --prompts: image|||caption
    python sample.py --base vcomposer --depth depth.npy --style-image painting.png --prompt "a red car"
    python sample.py --base vcomposer --depth drive.mp4 --midas midas_v3_dpt_large.pth --prompt "a red car"
    python sample.py --base vcomposer --follow drive.mp4 --take sketch motion style --prompt "a red car"
    python sample.py --base tft2v --prompt "a fox in the snow" --then sr600     # enlarged: OUT/sr600
    python sample.py --base tiny-i2v --image frame.png --prompt "a red circle moving left" --continue 2
    python sample.py --base tiny-i2v --judge 256           # 256 held-out first frames and captions
    python sample.py --ckpt out/das --image first.png --tracks tracks.mp4 --prompt "a dog"  # and -side.mp4
    python sample.py --base sr600 --video out/sample       # every clip there, at 720x1280
    python sample.py --base modelscope-v1.4 --lora instructvideo.pth:0.8 --prompt "a fox in the snow"
    python sample.py --ckpt out/identity:500 --ckpt out/motion --appearance-image dog.png --prompt "a * turns"

Writes OUT/0000.mp4 ..., OUT/sheet.png (contact sheet), OUT/index.jsonl (file, prompt, seed, base, adapters,
settings, and with --reward its scores).
A clip depends on its prompt, its number and --seed alone: not on --batch, nor on the number of processes.
Memory: texts are encoded first and the text towers freed before the networks move to the GPU; then --batch 1,
--sequential, --decode-chunk 1.
"""
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from bases import (BASES, LEARNED, add_guidance, base_row, fill, latent_shape, load_base, merge_public_lora,
                   public_files, read_words, run_parts)
from common import (COUNT, NATURAL, REAL, SHARE, UNSIGNED, Env, Parser, UserError, check_writable, finish,
                    gather_rows, generator, load_checkpoint, load_weights, memory_advice, rename, run_file,
                    seed_of, setup, write_atomic)
from data import (MOTIONS, NEW_MOTIONS, center_crop_wide, clip_frames, clip_image, codec_motion,
                  contact_sheet, encode_once, image_tensor, list_videos, lucas_kanade, open_image,
                  opensora_size, parse, prompts_of, quick_files, raft, read_image_prompts, read_map,
                  read_prompts, read_video, tiny_captions, tiny_pairs, to_uint8, video_info, video_maps,
                  write_video)
from diffusion import (appearance_matrix, appearance_rows, cogvideox_dpm, ddim, ddim_invert, dpmpp_2m,
                       dpmpp_2m_sde, dynamic_guidance, guided, lcm, make_schedule, mix_noise, motion_factors,
                       offset_noise, randn, rflow)
from metrics import judge_captions, psnr
from models import (
    Adapter, SpatialTransformer, STDiT3Config, UNetConfig, add_lora, guidance_embedding, lora_strength,
    merge_lora)
from rewards import get_reward, print_scores, score_files
from text_encoders import CLIPConfig
from tracks import estimate_depth as distances

SAMPLERS = ("ddim", "lcm", "dpmpp", "dpm", "rflow", "higen", "sr600")


# ---- samplers that are more than one loop

def higen(net, schedule, text, null, image_noise, video_noise, steps, cfg, eta=0.0, motion_factor=500,
          appearance_factor=1.0, sequential=False, progress=None, spacing="leading"):
    """HiGen's two passes of one network (arXiv 2312.04483): an image, then the clip around it.

    image_noise (b,c,1,h,w), video_noise (b,c,f,h,w), published f = 32 -> (image, video) latents.
    """
    b, c, f, h, w = video_noise.shape
    device = video_noise.device

    def run(noise, prior, motion, appearance):
        fn = guided(net, text, null, cfg, sequential=sequential, image_prior=prior, motion_factor=motion,
                    appearance_factor=appearance)
        return ddim(fn, noise, schedule, steps, eta, progress=progress, spacing=spacing)
    prior = torch.zeros(b, c, h, w, device=device)
    image = run(image_noise, prior, torch.zeros(b, device=device), torch.ones(b, 1, 32, device=device))
    motion = torch.full((b, f - 1), float(motion_factor), device=device)
    appearance = appearance_rows(appearance_matrix(f, appearance_factor).to(device).expand(b, -1, -1))
    return image, run(video_noise, image[:, :, 0], motion, appearance)


def sr600(net, schedule, text, null, latents, steps, cfg, generators=None, levels=700, inversion_steps=30,
          rescale=0.3, sequential=False, progress=None):
    """SR600: invert the enlarged clip's latents, then sample from there with other words (VGen).

    Inversion runs on the cosine schedule with the negative prompt; sampling (on `schedule`) starts with the
    noise that it ends in, so that the clip's layout stays.
    """
    cosine = make_schedule("cosine", schedule.prediction)
    noise = ddim_invert(lambda x, t: net(x, t, null), latents, cosine, inversion_steps, levels)
    fn = guided(net, text, null, cfg, rescale, sequential)
    return dpmpp_2m_sde(fn, noise, schedule, steps, generators, levels, progress)


# ---- prompts to videos

def rollout(net, base, prompts, x_T, args, generators, cond=None, null_cond=None, sequential=False,
            grad_last=0, progress=None, last=None):
    """Prompts and noise x_T (n,c,f,h,w) -> latents, by the sampler and the guidance of args (bases.fill()).

    net: base.net, or what DDP or FSDP made of it. cond, null_cond: {condition of the network: tensor (n,
    ...)}, the second replacing some in the unconditional branch. generators: one a clip, for what the sampler
    draws. grad_last: the last K updates record gradients (VADER), which texts and conditions have none of.
    last: as in ddim(), the only sampler that has it.
    """
    texts, n, device = [prompt + args.suffix for prompt in prompts], len(prompts), x_T.device
    cond, null_cond = dict(cond or {}) | frame_rate(args, n, device), dict(null_cond or {})
    with torch.no_grad():
        text, null = base.encode_text(texts), base.encode_null(args.negative, n)
        if base.row.unet.motion_blocks:
            cond["motion_text"] = base.encode_text(texts, motion=True)
            null_cond["motion_text"] = base.encode_text([args.negative] * n, motion=True)
    if args.sampler == "lcm":
        return lcm(distilled(net, text, cond, args), x_T, base.schedule, args.sample_steps, generators,
                   args.origin, args.spacing, progress)
    if args.sampler == "rflow":
        cond |= {k: torch.full((n,), float(getattr(args, k)), device=device) for k in ("height", "width")}
        cond["text_mask"] = (base.tokenize(texts) != 0).to(device)  # in both branches, as published
    cfg, rule = args.cfg, getattr(args, "dynamic_cfg", None) or "off"
    if rule != "off":
        cfg = dynamic_guidance(cfg, args.sample_steps, as_published=rule == "published")
    fn = guided(net, text, null, cfg, sequential=sequential, null_cond=null_cond, **cond)
    if getattr(args, "subject_below", None) is not None:
        fn = late_subject(fn, net, args.subject_below)
    many = dict(grad_last=grad_last, progress=progress)
    if args.sampler == "rflow":
        size = args.frames, args.height, args.width
        return rflow(fn, x_T, args.sample_steps, size, generators=generators, **many)
    if args.sampler == "dpm":
        return cogvideox_dpm(fn, x_T, base.schedule, args.sample_steps, generators, **many)
    if args.sampler == "dpmpp":
        return dpmpp_2m(fn, x_T, base.schedule, args.sample_steps, **many)
    return ddim(fn, x_T, base.schedule, args.sample_steps, args.eta, generators, spacing=args.spacing,
                last=last, **many)


def late_subject(fn, net, below):
    """fn(x, t) with DreamVideo's subject adapters off at steps t >= below: there the path is laid out, and a
    subject that was learned from pictures which stand still holds it back."""
    adapters = [a for m in net.modules() if isinstance(m, SpatialTransformer)
                for a in m.modules() if isinstance(a, Adapter)]

    def late(x, t):
        for adapter in adapters:
            adapter.on = bool(t.max() < below)
        try:
            return fn(x, t)
        finally:
            for adapter in adapters:
                adapter.on = True
    return late


@torch.no_grad()
def generate(base, env: Env, prompts, seeds, args, batch=8, progress=False, cond=None, null_cond=None,
             video=None, sequential=False, chunk=16, inverted=None):
    """Prompts -> videos (n,3,f,h,w) in [-1,1] on the CPU; clip i from noise keyed by seeds[i].

    args: sampling options, filled by bases.fill(): frames, height, width, negative, cfg, sample_steps, eta,
    fps, sampler, ... cond, null_cond: as for rollout(); video (n,3,f,h,w): what SR600 enlarges; inverted
    (1,c,f,h,w): noise to mix into all clips', of invert_clip(). Training previews and evaluations call this
    too: what they show is what one gets.
    """
    shape, videos = latent_shape(base.name, args.frames, args.height, args.width), []
    bar = tqdm if progress else None
    for i in range(0, len(prompts), batch):
        part = slice(i, i + batch)
        n = len(prompts[part])
        generators = [generator("sample", s) for s in seeds[part]]
        with env.autocast():
            if args.sampler in ("sr600", "higen"):
                text = base.encode_text([prompt + args.suffix for prompt in prompts[part]])
                null = base.encode_null(args.negative, n)
            if args.sampler == "sr600":
                latents = base.vae.encode(video[part].to(env.device), chunk=chunk)
                latents = sr600(base.net, base.schedule, text, null, latents, args.sample_steps, args.cfg,
                                generators, sequential=sequential, progress=bar)
                videos.append(base.vae.decode(latents, chunk=chunk).float().clamp(-1, 1).cpu())
                continue
            if args.sampler == "higen":
                image_noise = randn((n, shape[0], 1, *shape[2:]), generators, env.device)
            x_T = randn((n, *shape), generators, env.device)
            if getattr(args, "start_offset", None):
                shared = randn((n, *shape[:2], 1, 1), generators, env.device)
                x_T = offset_noise(x_T, shared, args.start_offset)
            if inverted is not None:
                x_T = mix_noise(inverted, x_T, args.inverse_noise)

            if args.sampler == "higen":
                _, latents = higen(
                    base.net, base.schedule, text, null, image_noise, x_T, args.sample_steps, args.cfg,
                    args.eta, args.motion_factor, args.appearance_factor, sequential, bar, args.spacing)
            else:
                c, u = ({k: v[part].to(env.device) for k, v in (d or {}).items()} for d in (cond, null_cond))
                latents = rollout(base.net, base, prompts[part], x_T, args, generators, c, u, sequential,
                                  progress=bar)
            videos.append(decode(base, latents, args.frames, chunk).float().clamp(-1, 1).cpu())
    return torch.cat(videos)


def generate_from(base, env: Env, prompts, images, seeds, args, batch=8, more=0, maps=None, **options):
    """generate() from images, a path or Pillow image each (None: words alone), and maps, see conditions().

    more: each clip goes on so often, from its last frame, and is joined: (n,3,f + more (f - 1),h,w).
    """
    videos = []
    for k in range(more + 1):
        with env.autocast():
            cond, null = conditions(base, env, args, images, maps)
        later = seeds if k == 0 else [f"{s}-{k}" for s in seeds]
        made = generate(base, env, prompts, later, args, batch, cond=cond, null_cond=null, **options)
        videos.append(made if k == 0 else made[:, :, 1:])  # a later clip's first frame is there already
        images = [frame_picture(video[:, -1]) for video in made] if k < more else None
    return torch.cat(videos, dim=2)


def generate_folder(base, env: Env, args, folder, prompts, n, settings):
    """n clips a prompt -> folder/clips/PROMPT-K.mp4 and metadata.json, VideoDPO's layout (data.read_clips).

    Processes share the clips; those that are there are kept, and those that a kill took come out the same.
    """
    if Path(folder, "clips").exists() and not args.resume:
        raise UserError(f"{folder} already holds clips: --resume goes on, --out FOLDER starts anew")
    about = Path(folder, "settings.json")
    wanted = dict(settings, base=base.name, n=n, seed=args.seed, batch=args.batch, prompts=prompts)
    wanted = json.dumps(wanted, indent=1)
    if about.exists() and about.read_text() != wanted:
        raise UserError(f"{folder}: its clips were made with other options or prompts: give the same, or "
                        "another --out")
    finish(env, about, lambda: wanted)
    quick_files()
    jobs = [(f"clips/{i:06d}-{k}.mp4", prompt, f"{args.seed}-{Path(folder).name}-{i}-{k}")
            for i, prompt in enumerate(prompts) for k in range(n)]
    size, start = 2 * args.batch, time.time()  # whole batches: else a resumed run would differ by rounding
    batches = [jobs[j:j + size] for j in range(0, len(jobs), size)][env.rank::env.world]
    for number, batch in enumerate(batches, 1):
        if not all(Path(folder, file).exists() for file, _, _ in batch):
            videos = generate(base, env, [b[1] for b in batch], [b[2] for b in batch], args, size)
            for (file, _, _), video in zip(batch, videos):
                write_video(Path(folder, file), video, args.save_fps)
        if env.main and (number % 20 == 0 or number == len(batches)):
            done = min(len(jobs), number * size * env.world)
            print(f"{folder}: {done}/{len(jobs)} clips, {time.time() - start:.0f} s", flush=True)
    rows = [{"basic": {"clip_duration": args.frames / args.save_fps, "clip_path": file, "globalidx": j},
             "misc": {"frame_caption": [prompt]}} for j, (file, prompt, _) in enumerate(jobs)]
    finish(env, Path(folder, "metadata.json"), lambda: json.dumps(rows, indent=1))


def encode_pairs(base, env: Env, args, data, name):
    """A PairDataset (None: none) -> items {"latents" (2,c,f,h,w) half, "text"}, encoded once, into --out.

    A sample of the encoder's Gaussian, drawn for each pair.
    """
    if data is None:
        return None
    quick_files()
    shape = latent_shape(base.name, args.frames, args.height, args.width)

    def encode(batch):
        x = batch["video"].flatten(0, 1).to(env.device, next(base.vae.parameters()).dtype)
        generators = [generator(args.seed, "posterior", int(i)) for i in batch["number"]]
        noise = randn((len(generators), 2, *shape), generators).flatten(0, 1).to(x)
        with torch.no_grad():
            return {"latents": base.vae.encode(x, noise).half().unflatten(0, (-1, 2))}
    about = dict(base=base.name, weights=args.weights, shape=shape, seed=args.seed, rows=seed_of(data.rows))
    return encode_once(Path(args.out, "latents", name), data, encode, about, env, args.workers)


def decode(base, latents, frames, chunk=16, chosen=None):
    """Latents -> video; chosen: numbers of the only frames to decode.

    Open-Sora's latents do not tell how many frames their last one stands for: frames, of the whole clip.
    """
    more = {"num_frames": frames} if base.row.schedule is None else {}
    return base.vae.decode(latents, chosen, chunk, **more)


def invert_clip(base, env, args, video):
    """The noise (1,c,f,h,w) that DDIM would turn into a clip (3,f,h,w): without words, guidance or image."""
    latents = base.vae.encode(video[None].to(env.device, env.dtype)).float()
    null = base.encode_null("", 1)
    return ddim_invert(lambda x, t: base.net(x, t, null), latents, base.schedule, args.sample_steps)


def frame_rate(args, n, device) -> dict:
    """{"fps": (n,)} for a base that takes the frame rate as a condition, else {}."""
    return {} if args.fps is None else {"fps": torch.full((n,), args.fps, device=device)}


def training_conditions(base, args, texts, t, fps=None) -> dict:
    """What a text-to-video network is told in training beside step and words, {name: tensor (n, ...)}.

    t (n,) steps. fps None: of the network's own default (VideoCrafter2: 16). T2V-Turbo: its guidance scale,
    Open-Sora: the clip's size.
    """
    unet, n = base.row.unet, len(t)
    cond = {} if fps is None else {"fps": torch.full((n,), fps, device=t.device)}
    if base.schedule is None:
        cond = {k: torch.full((n,), float(getattr(args, k)), device=t.device)
                for k in ("fps", "height", "width")}
        cond["text_mask"] = (base.tokenize(texts) != 0).to(t.device)
    if unet.guidance_dim:
        scale = torch.full((n,), float(args.cfg), device=t.device)
        cond["guidance"] = guidance_embedding(scale, unet.guidance_dim)
    if unet.motion_guidance_dim:  # in the first steps only, as distilled() has it
        early = t >= 1000 * (1 - args.motion_share)
        cond["motion_guidance"] = guidance_embedding(args.motion_cfg * early, unet.motion_guidance_dim)
    return cond


def distilled(net, text, cond, args):
    """A consistency model's fn(x, t): no second branch, the guidance scale is a condition (T2V-Turbo)."""
    def embedded(scale):
        return guidance_embedding(torch.full((len(text),), scale, device=text.device), net.cfg.guidance_dim)
    if net.cfg.guidance_dim:
        cond = cond | {"guidance": embedded(args.cfg)}

    def fn(x, t):
        if not net.cfg.motion_guidance_dim:
            return net(x, t, text, **cond)
        early = t[0] >= 1000 * (1 - args.motion_share)  # motion is decided in the first steps
        return net(x, t, text, motion_guidance=embedded(args.motion_cfg if early else 0.0), **cond)
    return fn


def generate_split(base, env: Env, prompts, seeds, args, images=None, more=0, maps=None):
    """generate_from(), the prompts shared out over the processes: each must call it, and gets all videos.

    maps: {name: tensor (n, ...)}, of each clip its own.
    """
    per = -(-len(prompts) // env.world)  # the same number on each (FSDP needs it): the last may repeat some
    mine = [i % len(prompts) for i in range(env.rank * per, (env.rank + 1) * per)]
    given = [None] * len(prompts) if images is None else images
    videos = generate_from(base, env, *([x[i] for i in mine] for x in (prompts, given, seeds)), args,
                           args.batch, more, {k: v[mine] for k, v in (maps or {}).items()})
    return torch.cat(gather_rows([videos], env))[:len(prompts)]


def lora_strengths(base, env, prompts, seeds, args, images=None, more=0):
    """Yield (strength, videos): the same clips with the network's LoRA branches off (0), weaker, stronger."""
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0):
        with lora_strength(base.net, strength):
            videos = generate_split(base, env, prompts, seeds, args, images, more)
        yield strength, videos


# ---- latents of clips to train on

@torch.no_grad()
def moments(vae, video, env):
    """video (b,3,f,h,w) -> {"mean", "std"} (b,c,f,h,w) of the encoder's Gaussian, on the CPU."""
    # each clip as (f,3,h,w): its frames are the batch
    parts = [vae.moments(clip.transpose(0, 1).to(env.device, env.dtype)) for clip in video]
    mean, logvar = (torch.stack([x.transpose(0, 1).cpu() for x in column]) for column in zip(*parts))
    return {"mean": mean, "std": (0.5 * logvar).exp()}


@torch.no_grad()
def observed(base, batch, env, flow=None):
    """What HiGen, TF-T2V and VideoComposer are told of a clip in training -> {name: (b, ...)}, on the CPU.

    batch {"video" (b,3,f,h,w)}, "depth" (b,1,f,h,w) where it is known. alike (b,f,f): cosines of the frames'
    CLIP embeddings, in the tiny world of their coarse colours; image (b,1,d): the middle frame's; maps: see
    data.video_maps.
    """
    unet, tower, found = base.row.unet, base.image_encoder, {}
    for clip in batch["video"] if unet.text_resampler or unet.style_image or unet.maps else ():
        f, one = clip.shape[1], {}
        frames = clip.transpose(0, 1)

        def embedded(frames):
            return tower(clip_frames(frames).to(env.device, env.dtype)).float().cpu()
        if unet.text_resampler:
            looks = embedded(frames) if tower else F.adaptive_avg_pool2d(frames, 4).flatten(1)
            looks = F.normalize(looks, dim=-1)
            one["alike"] = (looks @ looks.T).clamp(0, 1)
        if unet.style_image and tower:
            one["image"] = embedded(frames[f // 2:f // 2 + 1])
        if unet.maps:
            one |= video_maps(clip, unet.maps, flow=flow, block=16 if base.row.text else 1)
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    known = {"depth": batch["depth"]} if "depth" in batch else {}
    return {name: torch.stack(values) for name, values in found.items()} | known


def told(base, x0, seen, generators):
    """observed() of a batch, or none of it for single images, and x0 -> conditions of the network.

    HiGen: factors, and the middle frame as image (a pass for images has zeros there). Of maps and
    image a tenth of the clips sees none, four tenths one alone, else each is dropped for half. (VGen: none,
    all, a tenth each, else each for half. But one alone is what is sampled with, and a map that tells less,
    such as motion, is not learned beside others.)
    """
    unet, (b, _, f), cond = base.row.unet, x0.shape[:3], {}
    if unet.text_resampler:
        alike = seen["alike"].float() if f > 1 else torch.ones(b, 1, 1)
        cond["appearance_factor"] = appearance_rows(alike).to(x0.device)
        cond["motion_factor"] = torch.zeros(b, device=x0.device)
        if f > 1:  # of the means: x0 is a sample, its noise would count as motion
            cond["motion_factor"] = motion_factors(seen["mean"].to(x0) * base.vae.cfg.scale)
        cond["image_prior"] = x0[:, :, f // 2] * (f > 1)
    names = [k for k in seen if k in (*unet.maps, "image")] if f > 1 else []
    if not names:
        return cond
    case, *coins = torch.stack([torch.rand(1 + len(names), generator=g) for g in generators]).T
    alone, turn = case >= 0.6, ((case - 0.6) / 0.4 * len(names)).floor()  # whose turn it is to be alone
    for k, (name, coin) in enumerate(zip(names, coins)):
        keep = torch.where(alone, turn == k, (case > 0.1) & (coin > 0.5)).float().to(x0.device)
        cond[name] = seen[name].float().to(x0.device)
        if name == "image":
            cond[name] = cond[name] * keep.view(-1, 1, 1)
        else:
            cond.setdefault("map_keep", {})[name] = keep
    return cond


def draw_latents(vae, batch, generators, env):
    """A batch of clips, encoded already or not -> samples of the encoder's Gaussian, as VGen trains."""
    m = batch if "mean" in batch else moments(vae, batch["video"], env)
    z = m["mean"].float() + m["std"].float() * randn(m["mean"].shape, generators)
    return z.to(env.device) * vae.cfg.scale


# ---- conditions from files

FILE_FLAGS = ("image", "tracks", "video", "mask", "depth", "midas", "sketch", "motion_vectors", "style_image",
              "appearance_image", "follow", "flow_weights")
TAKE = "depth", "sketch", "single_sketch", "motion", "local_image", "style"  # what --follow is followed in


def check_sampler(args, row):
    """Refuse a sampler that cannot sample this base."""
    own, unet = row.sample["sampler"], isinstance(row.net, UNetConfig)
    if args.sampler != own and (not unet or {args.sampler, own} - {"ddim", "lcm", "dpmpp"}):
        raise UserError(f"--sampler {args.sampler}: this base is sampled by {own}")


def check_conditions(args, row):
    """Refuse what the base has no use for, and ask for what it needs, before anything is loaded."""
    takes = set()
    if row.first_frame:
        takes |= {"image"}
    if row.tracks:
        takes |= {"tracks"}
    if row.unet.super_resolution:
        takes |= {"video"}
    if row.unet.maps:
        takes |= {"image", "video", "mask", "depth", "midas", "sketch", "motion_vectors", "style_image",
                  "follow", "flow_weights"}
    if row.unet.adapter_image_dim:
        takes |= {"appearance_image", "video"}
    if args.learned and not Path(args.learned).exists():
        raise UserError(f"--learned {args.learned}: no such file, nor a run's folder")
    if args.learned and row.text is not None and not isinstance(row.text, CLIPConfig):
        raise UserError("--learned: this base's text encoder knows no learned words")
    for flag in FILE_FLAGS:
        value, option = getattr(args, flag), f"--{flag.replace('_', '-')}"
        if value and flag not in takes:
            known = ", ".join(f"--{f.replace('_', '-')}" for f in sorted(takes)) or "words alone"
            raise UserError(f"{option}: this base has no such condition; it takes {known}")
        if value and not Path(value).exists():
            raise UserError(f"{option} {value}: no such file")
    if args.subject_below is not None and not row.unet.adapter_image_dim:
        raise UserError("--subject-below: this base has no adapters of a subject")
    for flag in ("motion_factor", "appearance_factor", "motion_cfg", "dynamic_cfg"):
        if getattr(args, flag) is not None and flag not in row.sample:
            raise UserError(f"--{flag.replace('_', '-')}: this base has no such condition")
    check_sampler(args, row)
    if args.judge and row.text is not None:
        raise UserError("--judge: only clips of the tiny world can be judged; give --prompt or --prompts")
    if args.more and (not row.first_frame or row.tracks):
        raise UserError("--continue: only a base that makes video from an image alone goes on from a frame")
    if row.first_frame and args.judge and args.image:
        raise UserError("--judge: brings its own first frames; leave --image out")
    if row.first_frame and not args.image and not args.prompts and not args.judge:
        raise UserError("image to video: give --image FILE, or --prompts with lines image|||caption")
    if args.track_strength is not None and not row.tracks:
        raise UserError("--track-strength: this base has no such condition")
    if row.tracks and not args.tracks:
        raise UserError("this base follows tracks: give the tracking video with --tracks")
    if row.unet.super_resolution and not args.video:
        raise UserError("super-resolution: give the clip, or a folder of clips, with --video")
    if bool(args.inverse_noise) != bool(args.video and row.unet.adapter_image_dim):
        raise UserError("--inverse-noise and --video belong together (DreamVideo): how much of the inverted "
                        "clip to start from")
    if bool(args.mask) != bool(args.video) and row.unet.maps:
        raise UserError("--mask and --video belong together: the part of the video that is hidden")
    if args.midas and not args.depth and "depth" not in (args.take or ()):
        raise UserError("--midas: give the video whose depth it is to estimate with --depth")
    if bool(args.follow) != bool(args.take):
        raise UserError(f"--follow VIDEO and --take belong together: what to take of it, {', '.join(TAKE)}")
    for name in args.take or ():
        if name not in row.unet.maps and not (name == "style" and row.unet.style_image):
            raise UserError(f"--take {name}: this base has no such condition; it has "
                            f"{', '.join(row.unet.maps)}")
    if "depth" in (args.take or ()) and not args.midas and not args.depth_model:
        raise UserError("--take depth: give the network that sees it, --depth-model NAME or --midas FILE")
    if args.then and (base_row(args.then).unet.super_resolution, row.unet.super_resolution) != (True, False):
        raise UserError(f"--then {args.then}: for a base that enlarges clips, sr600, after one that does not")
    if args.then:  # its files are looked for now
        public_files(args.then, base_row(args.then), args.then_weights)
    if not (args.prompt or args.prompts or args.judge or row.unet.super_resolution):
        raise UserError("give one of --prompt TEXT, --prompts FILE, --judge N (tiny)")
    if row.unet.text_resampler and args.frames != row.sample["frames"]:
        raise UserError(f"--frames {args.frames}: HiGen makes clips of {row.sample['frames']} frames")


def tower_image(image, width, tower_size):
    """Pillow image -> (3, s, s), s = tower_size: what the image tower reads beside a clip so wide.

    VGen crops to a square, as wide as the clip but at least as the tower's input, before it scales.
    """
    side = max(tower_size, width)
    return clip_image(image, (side, side), (tower_size, tower_size))


def frame_picture(frame):
    """A frame (3,h,w) in [-1,1] -> Pillow image, as a picture file would hold it."""
    return Image.fromarray(to_uint8(frame[:, None])[0])


@torch.no_grad()
def conditions(base, env, args, images, maps=None):
    """For a batch of clips -> (cond, null_cond) of generate(); images: a path or Pillow image each.

    maps {name: (1,c,f,h,w)}: what all clips share, of read_maps() and encode_tracks().
    """
    row, n, size = base.row, len(images), (args.height, args.width)
    cond, null = {}, {}
    images = [image if image is None or isinstance(image, Image.Image) else open_image(image)
              for image in images]

    def clip_embedding(pictures):
        s = (row.image or row.text).image_size
        pixels = torch.stack([tower_image(p, args.width, s) for p in pictures])
        return base.image_encoder(pixels.to(env.device, env.dtype))[:, None].float()  # n 1 d

    if row.first_frame:
        pixels = torch.stack([image_tensor(center_crop_wide(p, size)) for p in images])
        cond["first_frame"] = base.vae.encode(pixels[:, :, None].to(env.device, env.dtype)).float()
    if row.unet.image_to_video:
        cond["first_frame"] = cond["first_frame"][:, :, 0]
        cond["image"] = clip_embedding(images)
        null["image"] = torch.zeros_like(cond["image"])
    style = getattr(args, "style", None) or getattr(args, "style_image", None)
    if style:
        style = style if isinstance(style, Image.Image) else open_image(style)
        cond["image"] = clip_embedding([style]).expand(n, -1, -1)
        null["image"] = torch.zeros_like(cond["image"])
    if row.unet.adapter_image_dim and images[0] is not None:
        cond["appearance"] = clip_embedding(images)
        null["appearance"] = torch.zeros_like(cond["appearance"])
        for branch, strength in zip((cond, null), getattr(args, "strength", (1.0, 1.0))):
            branch["strength"] = torch.full((n,), strength)
    for name, value in (maps or {}).items():
        cond[name] = value.expand(n, *value.shape[1:])
    return cond, null


def first_frame_kept(videos, images):
    """Clips (3,f,h,w) and the pictures (3,h,w) they began with -> psnr in dB, the mean and the worst."""
    found = [psnr(video[:, 0], image) for video, image in zip(videos, images)]
    return {"psnr": sum(found) / len(found), "psnr_worst": min(found)}


def noised_first_frame(base, picture, keep, shape, generators):
    """CogVideoX-I2V's condition in training: latents (b,c,1,h,w) of slightly noised pixels.

    log sigma ~ N(-3, 0.5). picture (b,3,h,w) in [-1,1]; keep (b,): 1, or 0 where it is dropped; shape
    (b,c,f,h,w) of the clips' latents.
    """
    sigma = (0.5 * randn((len(picture), 1, 1, 1), generators) - 3).exp()
    pixels = picture.cpu() + sigma * randn(picture.shape, generators)
    noise = randn((*shape[:2], 1, *shape[3:]), generators)  # the latent is a sample, too
    pixels, noise = (x.to(picture.device, next(base.vae.parameters()).dtype) for x in (pixels, noise))
    with torch.no_grad():
        latent = base.vae.encode(pixels[:, :, None], noise).float()
    return latent * keep.view(-1, 1, 1, 1, 1)


@torch.no_grad()
def encode_tracks(base, env, video):
    """Tracking video (3,f,h,w) in [-1,1] -> latents of it and of its first frame (Diffusion as Shader).

    A base that makes video from text alone has no place for the second.
    """
    video = video[None].to(env.device, env.dtype)
    parts = {"tracks": video} | ({"first_track": video[:, :, :1]} if base.row.first_frame else {})
    return {name: base.vae.encode(part).float() for name, part in parts.items()}


def read_maps(args, size):
    """VideoComposer's maps from ready files -> {name: (1,c,f,h,w)}.

    depth: MiDaS's inverse depth / 20 in 0..10 (.npy; a video counts as 0..1), but with --midas a video in
    [-1,1], whose depth estimate_depth() finds; sketch: 0..1 (a picture is the single sketch of the first
    frame); motion: .npy (2,f,h,w); image: the first frame, in 0..1; video and mask (1: hidden).
    """
    f, maps = args.frames, {}
    if args.depth and args.midas:  # squeezed to the clip's size, not cropped: as published
        video = read_video(args.depth, f)[0].transpose(0, 1)
        maps["depth"] = F.interpolate(video, size, mode="bilinear", antialias=True).transpose(0, 1)
    elif args.depth:
        maps["depth"] = read_map(args.depth, f, size, 1)
    if args.sketch:
        sketch = read_map(args.sketch, None, size, 1)
        name = "sketch" if sketch.shape[1] > 1 else "single_sketch"
        maps[name] = read_map(args.sketch, f, size, 1) if name == "sketch" else sketch.expand(-1, f, -1, -1)
    if args.motion_vectors:
        maps["motion"] = read_map(args.motion_vectors, f, size, 2)
    if args.image:
        maps["local_image"] = read_map(args.image, None, size, 3).expand(-1, f, -1, -1)
    if args.mask:
        video, hidden = read_map(args.video, f, size, 3), read_map(args.mask, None, size, 1).round()
        shown = 1 - hidden.expand(-1, f, -1, -1)
        maps["masked"] = torch.cat([(video * 2 - 1) * shown, shown])
    return {name: value[None] for name, value in maps.items()}


def followed(args, row, device):
    """--follow VIDEO -> {name: (1,c,f,h,w)}, the maps of --take; "style" is its first frame, in args.style.

    3 frames a second as published, or as many as make a clip; squeezed to the clip's size, not cropped.
    """
    count, rate, _ = video_info(args.follow)
    stride = max(1, min(round(rate / 3), (count - 1) // max(args.frames - 1, 1)))
    video, size = read_video(args.follow, args.frames, rate / stride)[0], (args.height, args.width)
    args.style = frame_picture(video[:, 0]) if "style" in args.take else None
    video = F.interpolate(video.transpose(0, 1), size, mode="bilinear", antialias=True).transpose(0, 1)

    def depth(video):
        if args.midas:
            return estimate_depth(args.midas, video[None], device)[0]
        near = 1 / torch.from_numpy(distances(args.depth_model, video, device)).float()
        return (2 * near / near.max())[None]  # about MiDaS's range; other networks have their own
    flow = lucas_kanade if row.text is None else None
    flow = raft("large", args.flow_weights, device) if args.flow_weights else flow
    maps = video_maps(video, args.take, depth, flow, block=16 if row.text else 1)
    if "motion" in args.take and not flow:
        maps["motion"] = codec_motion(video)
    return {name: value[None] for name, value in maps.items()}


def enlarge(path, args, dtype=torch.float32):
    """A clip for SR600 -> ((1,3,f,H,W) in [-1,1], its own frames): at most 32, 16 or fewer doubled."""
    frames = min(video_info(path)[0], 32)
    video, _ = read_video(path, frames)
    if frames <= 16:  # as published: the network was trained on 32
        video = video.repeat_interleave(2, dim=1)
    size = (args.height, args.width)
    video = F.interpolate(video.transpose(0, 1).float(), size, mode="bilinear", align_corners=False)
    return video.transpose(0, 1)[None].to(dtype), frames


# ---- depth

class MiDaS(nn.Module):
    """Relative inverse depth of pictures: MiDaS v3 (arXiv 1907.01341), DPT-Large (2103.13413) by default.

    The network is transformers'; from_public() takes the public file's tensors (midas_v3_dpt_large.pth).
    """

    def __init__(self, dim=1024, layers=24, heads=16, patch=16, image_size=384, neck=(256, 512, 1024, 1024),
                 fusion=256):
        super().__init__()
        from transformers import DPTConfig, DPTForDepthEstimation
        self.patch = patch
        self.taps = [(k + 1) * layers // 4 - 1 for k in range(4)]  # the last block of each quarter
        self.dpt = DPTForDepthEstimation(DPTConfig(
            hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * dim,
            hidden_act="gelu", layer_norm_eps=1e-5, image_size=image_size, patch_size=patch,
            is_hybrid=False, readout_type="project", backbone_out_indices=self.taps,
            neck_hidden_sizes=list(neck), fusion_hidden_size=fusion))
        self.dpt.dpt.layernorm = nn.Identity()  # of the last block's output, which nothing reads

    def from_public(self, state, source):
        """Take the public file's tensors: none missing, none left over. -> self, in eval mode."""
        split = {}
        for key, value in state.items():
            if ".to_qkv." in key:  # rows: q, then k, then v
                split |= {key.replace("qkv", c): rows for c, rows in zip("qkv", value.chunk(3))}
            else:
                split[key] = value
        # rename reshapes: the head's last layer is (32,1,1,1) there, a transposed convolution
        self.dpt.load_state_dict(rename(split, self.dpt, midas_name, source), assign=True)
        return self.eval()

    def forward(self, images):
        """images (n,3,h,w) in [-1,1], sides multiples of 2 patches (32) -> inverse depth (n,h,w) >= 0."""
        rows, columns = (side // self.patch for side in images.shape[2:])
        states = self.dpt.dpt(images, output_hidden_states=True).hidden_states  # embeddings, then blocks
        # part by part: called as a whole it takes square pictures only
        return self.dpt.head(self.dpt.neck([states[i + 1] for i in self.taps], rows, columns))


MIDAS_NAMES = {
    "dpt.embeddings.cls_token": "cls_embedding", "dpt.embeddings.position_embeddings": "pos_embedding",
    "dpt.embeddings.patch_embeddings.projection": "patch_embedding", "dpt.encoder.layer": "blocks",
    "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.attention.query": "attn.to_q",
    "attention.attention.key": "attn.to_k", "attention.attention.value": "attn.to_v",
    "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.0", "output.dense": "mlp.2",
    **{f"neck.reassemble_stage.readout_projects.{k}": f"fc{k + 1}" for k in range(4)},
    **{f"neck.reassemble_stage.layers.{k}.projection": f"conv{k + 1}.0" for k in range(4)},
    **{f"neck.reassemble_stage.layers.{k}.resize": f"conv{k + 1}.1" for k in range(4)},
    **{f"neck.convs.{k}": f"conv{k + 1}.{1 if k == 2 else 2}" for k in range(4)},  # the third has no resize
    **{f"neck.fusion_stage.layers.{k}": f"fusion{4 - k}" for k in range(4)},
    "residual_layer": "layer", "convolution1": "residual.1", "convolution2": "residual.3",
    "projection": "conv_out", "head.head": "head"}


def midas_name(key):
    """transformers' key of DPTForDepthEstimation -> the public file's, q, k and v apart."""
    for theirs, public in MIDAS_NAMES.items():
        key = key.replace(theirs, public)
    return key


@torch.no_grad()
def estimate_depth(path, video, device):
    """Weights of MiDaS, video (1,3,f,h,w) in [-1,1] -> VideoComposer's depth (1,1,f,h,w) in 0..10, CPU.

    Frame by frame, in float32 (published: float16).
    """
    with torch.device("meta"):  # no time for random weights
        net = MiDaS()
    net = net.from_public(load_weights(path), path).to(device, torch.float32)
    depth = torch.cat([net(frame[None].to(device)).cpu() for frame in video[0].transpose(0, 1)])
    return (depth / 20).clamp(0, 10)[None, None]


# ---- runs and public adapters

def read_runs(args):
    """Every --ckpt -> [(path, tensors, meta)]; several must be adapters that go together (DreamVideo)."""
    runs = [(text, *load_checkpoint(run_file(text))) for text in args.ckpt]
    known = {}
    for text, tensors, meta in runs:
        if args.base and args.base != meta["base"]:
            raise UserError(f"--ckpt {text}: was trained on base {meta['base']}, not {args.base}")
        if meta["base"] != runs[0][2]["base"]:
            raise UserError(f"--ckpt {text}: was trained on base {meta['base']}, {runs[0][0]} on "
                            f"{runs[0][2]['base']}; they cannot be joined")
        if len(runs) > 1 and meta["method"] != "dreamvideo":
            raise UserError(f"--ckpt {text}: a run of {meta['method']}; only DreamVideo's can be joined")
        twice = [k for k in tensors if k in known and not k.startswith(LEARNED)]
        if twice:
            raise UserError(f"--ckpt {text}: trained the same as {known[twice[0]]} ({twice[0]}); give one "
                            "subject and one motion")
        known |= dict.fromkeys(tensors, text)
    return runs


def load_run(path, tensors, meta, weights, base=None):
    """What load_checkpoint(path) gave -> the run's base with its trained tensors put in, on the CPU.

    base: one that another run was put into.
    """
    # a run of all weights holds the whole network, whatever it started from
    whole = not meta["rank"]
    base = base or load_base(meta["base"], weights or meta["args"].get("weights"), "cpu", torch.float32,
                             scratch=bool(whole and meta["args"].get("scratch")), start=whole,
                             tracks=meta.get("tracking_blocks", 0), motion=meta["method"] == "demo")
    if meta.get("guidance_dim"):
        add_guidance(base, meta["guidance_dim"])
    if meta["rank"]:
        add_lora(base.net, meta["rank"], meta["alpha"], meta["lora_targets"])
    modules = {"net": base.net, "text": base.text_encoder, "image": base.image_encoder,
               "motion": base.motion_encoder}
    parts = run_parts(tensors)
    base.learn({base.token_of(word): vectors for word, vectors in parts.pop("learned").items()}, path)
    for part, state in parts.items():
        if not state:
            continue
        unexpected = modules[part].load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            raise UserError(f"--ckpt {path}: does not fit base {base.name}: unexpected {unexpected[0]}")
    merge_lora(base.net)
    base.schedule = make_schedule(**meta["schedule"]) if meta.get("schedule") else base.schedule
    return base


def lora_file(text):
    """FILE or FILE:scale -> (path, scale), the file checked."""
    path, _, scale = text.rpartition(":")
    try:
        path, scale = (path, float(scale)) if path else (text, 1.0)
    except ValueError:  # the colon is part of the name
        path, scale = text, 1.0
    if not Path(path).is_file():
        raise UserError(f"--lora {path}: no such file")
    return Path(path), scale


def get_args(argv=None):
    p = Parser(__doc__)
    # what
    p.add_argument("--base", help=f"base to sample from: {', '.join(BASES)} (default: the run's)")
    p.add_argument("--weights", help="folder with the base's public weights (default: its hub)")
    p.add_argument("--ckpt", action="append", default=[], metavar="FOLDER[:STEP]",
                   help="folder of one of our runs; twice to join DreamVideo's subject and motion")
    p.add_argument("--learned", metavar="FILE", help="words of a textual inversion (DreamVideo's file)")
    p.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]",
                   help="LoRA or adapter file (T2V-Turbo, VADER, InstructVideo, DreamVideo); repeatable")
    p.add_argument("--out", default="out/sample", help="folder to write")
    p.add_argument("--prompt", help="one prompt")
    p.add_argument("--prompts", help="file of prompts: txt, csv, jsonl, json; I2VGen-XL: image|||caption")
    p.add_argument("--judge", type=COUNT, metavar="N",
                   help="tiny world: N random captions (and held-out first frames), judged")
    p.add_argument("--reward", help="score the clips: a reward of rewards.py, or several joined by commas")
    p.add_argument("--reward-weights", help="folder with the rewards' public files (default: their hub)")
    p.add_argument("--motion", choices=MOTIONS + NEW_MOTIONS, help="tiny world: motion of all clips")
    p.add_argument("--negative", help="negative prompt (default: the run's or the base's)")
    p.add_argument("--suffix", help="text put after every prompt (default: the base's)")
    # conditions
    p.add_argument("--image", help="first frame (I2VGen-XL, CogVideoX-I2V, das, VideoComposer)")
    p.add_argument("--continue", dest="more", type=NATURAL, default=0, metavar="K",
                   help="image to video: K further clips, each from the last frame of the one before, joined")
    p.add_argument("--tracks", help="tracking video (Diffusion as Shader; das.py --make-tracks makes one)")
    p.add_argument("--track-strength", type=UNSIGNED, help="how much the tracks count: 0 not at all (1)")
    p.add_argument("--video", help="clip or folder of clips (SR600); what --mask hides (VideoComposer); clip "
                   "whose motion to start near (DreamVideo)")
    p.add_argument("--mask", help="picture, white where the video is hidden (VideoComposer)")
    p.add_argument("--depth", help="depth maps: .npy or video; with --midas any video (VideoComposer)")
    p.add_argument("--midas", metavar="FILE", help="estimate the depth of the video --depth with these "
                   "weights (ModelScope hub iic/tf-t2v, models/midas_v3_dpt_large.pth)")
    p.add_argument("--sketch", help="sketches: .npy or video, or one picture (VideoComposer)")
    p.add_argument("--motion-vectors", help="motion vectors: .npy of shape 2 f h w (VideoComposer)")
    p.add_argument("--style-image", help="picture whose style and content to follow (VideoComposer)")
    p.add_argument("--follow", metavar="VIDEO", help="clip from which to make the conditions (VideoComposer)")
    p.add_argument("--take", nargs="+", choices=TAKE, help="which; motion: the codec's vectors")
    p.add_argument("--depth-model", metavar="NAME", help="depth network of transformers: hub name or folder")
    p.add_argument("--flow-weights", help="motion by torchvision's raft_large, not by the codec")
    p.add_argument("--appearance-image", help="picture that guides the motion adapter (DreamVideo)")
    p.add_argument("--strength", type=REAL, nargs=2, default=(1.0, 1.0), metavar=("COND", "UNCOND"),
                   help="of the appearance image in the two branches of guidance")
    p.add_argument("--subject-below", type=NATURAL, metavar="T", help="the subject's adapters act at noise "
                   "steps below T alone (DreamVideo, with a motion; tiny: 300)")
    p.add_argument("--inverse-noise", type=SHARE, default=0.0, help="share of the inverted --video in the "
                   "starting noise (DreamVideo; advice: 0 to 0.5 for a motion learned from one clip)")
    p.add_argument("--motion-factor", type=NATURAL, help="HiGen: more is more motion (500)")
    p.add_argument("--appearance-factor", type=REAL, help="HiGen: more is more change over the clip (1.0)")
    # pixels
    p.add_argument("--frames", type=COUNT, help="frames a clip (default: the base's)")
    p.add_argument("--size", metavar="LENGTH,RESOLUTION,ASPECT",
                   help="Open-Sora: by name, 2s..16s, 144p..720p, height:width, such as 4s,240p,9:16")
    p.add_argument("--height", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--width", type=COUNT, help="pixels (default: the base's)")
    p.add_argument("--fps", type=COUNT, help="frame rate as a condition, for bases that take one")
    p.add_argument("--save-fps", type=COUNT, help="frame rate of the files")
    # sampling
    p.add_argument("--sampler", choices=SAMPLERS, help="default: the base's")
    p.add_argument("--sample-steps", type=COUNT, help="sampler steps (default: the base's)")
    p.add_argument("--eta", type=SHARE, help="DDIM noise, 0 deterministic to 1 (default: the base's)")
    p.add_argument("--cfg", type=REAL, help="guidance u + cfg (c - u); 1 is off (default: the base's)")
    p.add_argument("--dynamic-cfg", choices=("published", "meant", "off"),
                   help="CogVideoX: guidance that grows over the steps, as published or as meant")
    p.add_argument("--motion-cfg", type=REAL, help="T2V-Turbo-v2: scale of motion guidance (0.05)")
    p.add_argument("--n", type=COUNT, default=1, help="clips a prompt")
    p.add_argument("--vbench", action="store_true", help="name the files as VBench wants: PROMPT-0.mp4, ...")
    p.add_argument("--batch", type=COUNT, default=4, help="clips at a time on each process")
    p.add_argument("--seed", type=NATURAL, default=0, help="seed")
    # afterwards
    p.add_argument("--then", metavar="BASE", help="enlarge the clips with this base, sr600, into OUT/BASE")
    p.add_argument("--then-weights", help="folder with its public weights (default: its hub)")
    p.add_argument("--then-size", type=COUNT, nargs=2, metavar=("HEIGHT", "WIDTH"), help="(720 1280)")
    # machine
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on GPU, fp32 on CPU")
    p.add_argument("--sequential", action="store_true", help="the two branches of guidance one by one")
    p.add_argument("--decode-chunk", type=COUNT, default=16, help="frames the autoencoder takes at a time")
    args = p.parse_args(argv)
    if not args.base and not args.ckpt:
        raise UserError("give --base NAME or --ckpt FOLDER")
    if args.reward_weights and not args.reward:
        raise UserError("--reward-weights: of which reward? give --reward")
    if args.motion and not args.judge:
        raise UserError("--motion: which clips --judge N draws; give --judge, or say it in the --prompt")
    if sum(bool(x) for x in (args.prompt, args.prompts, args.judge)) > 1:
        raise UserError("give only one of --prompt TEXT, --prompts FILE, --judge N (tiny)")
    return args


def apply_size(args, row):
    """Open-Sora's --size by name -> --frames, --height, --width where these are not given."""
    if not isinstance(row.net, STDiT3Config):
        raise UserError("--size: only Open-Sora's sizes have names; give --frames, --height, --width")
    names = args.size.split(",")
    if len(names) > 3:
        raise UserError(f"--size {args.size}: more than length,resolution,aspect, such as 4s,240p,9:16")
    for flag, value in zip(("frames", "height", "width"), opensora_size(*names)):
        if getattr(args, flag) is None:
            setattr(args, flag, value)


def file_names(prompts, n, vbench=False):
    """Names of the clips, n a prompt: 0000.mp4 ..., or VBench's PROMPT-0.mp4 ... PROMPT-4.mp4."""
    if not vbench:
        return [f"{j:04d}.mp4" for j in range(len(prompts) * n)]
    for prompt in prompts:
        if "/" in prompt or len(prompt.encode()) > 240:
            raise UserError(f"--vbench: {prompt[:60]!r} can be no file's name (a / in it, or too long)")
        if prompts.count(prompt) > 1:
            raise UserError(f"--vbench: the prompt {prompt[:60]!r} comes twice; give --n instead")
    return [f"{prompt}-{k}.mp4" for prompt in prompts for k in range(n)]


def read_pairs(path, row, image=None):
    """A prompt file -> [(image or None, prompt)]; the image of all, or of each line image|||prompt."""
    optional = row.unet.adapter_image_dim and Path(path).is_file() and b"|||" in Path(path).read_bytes()
    if not image and (row.first_frame or optional):
        return read_image_prompts(path)
    return [(image, prompt) for prompt in read_prompts(path)]


def read_jobs(args, row):
    """-> prompts, and for each its first frame (I2VGen-XL), its clip (SR600), both readable, or None."""
    if args.judge and row.first_frame:
        clips, prompts = tiny_pairs(args.seed, args.judge, args.frames, args.motion)
        return prompts, [frame_picture(clip[:, 0]) for clip in clips]
    if args.judge:
        captions, rng = tiny_captions(), np.random.default_rng(args.seed)
        captions = [c for c in captions if args.motion in (None, parse(c)["motion"])]
        if not captions:
            raise UserError(f"--motion {args.motion}: base {args.base} has no such motion among its captions")
        prompts = [captions[i] for i in rng.integers(len(captions), size=args.judge)]
        return prompts, [None] * len(prompts)
    if row.unet.super_resolution:
        clips = list_videos(args.video)
        for clip in clips:
            video_info(clip)
        return prompts_of(clips, args.prompts, args.prompt), clips
    image = args.image if row.first_frame else args.appearance_image
    pairs = [(image, args.prompt)] if args.prompt else read_pairs(args.prompts, row, image)
    for image in dict.fromkeys(image for image, _ in pairs if image):
        open_image(image)
    return [caption for _, caption in pairs], [image for image, _ in pairs]


def main(argv=None):
    args = get_args(argv)
    play(args)  # its networks are gone when it returns
    if args.then:
        more = {"weights": args.then_weights, "device": args.device, "dtype": args.dtype, "seed": args.seed,
                "video": args.out, "out": Path(args.out, args.then), "save_fps": args.save_fps,
                **dict(zip(("height", "width"), args.then_size or ()))}
        flags = [x for k, v in more.items() if v is not None for x in (f"--{k.replace('_', '-')}", str(v))]
        play(get_args(["--base", args.then, *flags] + ["--sequential"] * args.sequential))
    if dist.is_initialized():
        dist.destroy_process_group()


def play(args):
    """All that the options ask for, from files to files."""
    if args.base:
        base_row(args.base)  # an unknown name is refused before anything is read
    runs = read_runs(args)
    name, known = args.base or runs[0][2]["base"], {}
    for _, _, meta in runs:
        known |= meta["sample"]
    row = base_row(name, runs[0][2].get("tracking_blocks", 0) if runs else 0)
    if args.size:
        apply_size(args, row)
    settings = fill(args, name, known)
    if row.unet.super_resolution:
        del settings["frames"]  # each clip keeps its own
    check_conditions(args, row)
    check_writable(args.out)
    prompts, files = read_jobs(args, row)
    names = file_names(prompts, args.n, args.vbench)
    size = args.height, args.width
    maps = read_maps(args, size) if row.unet.maps else {}
    tracks = read_video(args.tracks, args.frames, size=size)[0] if args.tracks else None
    loras = [lora_file(text) for text in args.lora]
    start_near = read_video(args.video, args.frames, size=size)[0] if args.inverse_noise else None
    env = setup(args)
    reward = get_reward(args.reward, env.device, args.reward_weights) if args.reward else None
    if reward:
        reward.check(prompts)
    if args.midas:
        if args.depth:
            maps["depth"] = estimate_depth(args.midas, maps["depth"], env.device)
    if args.follow:
        maps |= followed(args, row, env.device)
    base = None
    for text, tensors, meta in runs:
        base = load_run(text, tensors, meta, args.weights, base)
    if base is None:
        base = load_base(args.base, args.weights, "cpu", torch.float32 if loras else env.dtype)
    if args.learned:
        base.learn(read_words(base, args.learned), f"--learned {args.learned}")
    for path, scale in loras:
        merge_public_lora(base.net, path, scale)
    base.freeze(env.dtype)
    # one after the other on the GPU: T5 and a 5B network together would not fit on 24 GB
    for encoder in filter(None, (base.text_encoder, base.motion_encoder)):
        encoder.to(env.device)
    with torch.no_grad(), env.autocast():
        base.learned = {token: vectors.to(env.device) for token, vectors in base.learned.items()}
        base.remember([prompt + args.suffix for prompt in prompts] +
                      [args.negative, *([""] if args.inverse_noise else [])])
    for module in base.parts().values():
        module.to(env.device)

    jobs = [(prompt, file, f"{args.seed}-{i}-{k}")
            for i, (prompt, file) in enumerate(zip(prompts, files)) for k in range(args.n)]
    out, start = Path(args.out), time.time()
    mine = list(range(env.rank, len(jobs), env.world))
    advice = memory_advice("--batch 1", "--sequential", "--decode-chunk 1", "--dtype bf16", "fewer --frames",
                           "a smaller --height and --width")
    batch, inverted = 1 if row.unet.super_resolution else args.batch, None
    with advice:
        if start_near is not None:
            with env.autocast(), torch.no_grad():
                inverted = invert_clip(base, env, args, start_near)
        if tracks is not None:
            with env.autocast():
                maps |= encode_tracks(base, env, tracks)
            if args.track_strength is not None:
                maps["track_strength"] = torch.tensor([args.track_strength])
        for i in range(0, len(mine), batch):
            part = [jobs[j] for j in mine[i:i + batch]]
            options, frames = dict(sequential=args.sequential, chunk=args.decode_chunk), None
            options["inverted"] = inverted
            prompt, images, seed = (list(column) for column in zip(*part))
            bar = env.main and env.device.type == "cuda"
            if row.unet.super_resolution:
                options["video"], frames = enlarge(images[0], args)
                args.frames = options["video"].shape[2]
                images = [None]
            videos = generate_from(base, env, prompt, images, seed, args, batch, args.more, maps,
                                   progress=bar, **options)
            if frames is not None and frames < videos.shape[2]:
                videos = videos[:, :, ::2]  # every frame went in twice
            for j, video in zip(mine[i:i + batch], videos):
                write_video(out / names[j], video, args.save_fps)
                if tracks is not None:  # what went in beside what came out
                    still, first = video[:, :1], jobs[j][1]
                    if first:
                        first = first if isinstance(first, Image.Image) else open_image(first)
                        still = image_tensor(center_crop_wide(first, size))[:, None]
                    side = torch.cat([still.expand_as(video), tracks, video], dim=3)
                    write_video(out / f"{j:04d}-side.mp4", side, args.save_fps)
                if isinstance(jobs[j][1], Image.Image):
                    write_atomic(out / f"{j:04d}.png", jobs[j][1].save)
            if env.main:
                done = min(len(jobs), (i + len(part)) * env.world)
                print(f"{done}/{len(jobs)} clips, {time.time() - start:.1f} s", flush=True)
    scores = {}  # by the clip's number; of the files, as one would look at them
    if reward:
        files, texts = [out / f"{j:04d}.mp4" for j in mine], [jobs[j][0] for j in mine]
        scored = zip(mine, score_files(reward, env.device, files, texts))
        scores = dict(gather_rows(list(scored), env))
    if env.world > 1:
        dist.barrier()
    if env.main:
        adapters = args.ckpt + ([args.learned] if args.learned else []) + args.lora
        given = {flag: getattr(args, flag) for flag in FILE_FLAGS if getattr(args, flag)}
        own = ("image" if row.first_frame else "appearance_image" if row.unet.adapter_image_dim else
               "video")
        if args.judge and row.first_frame:
            jobs = [(prompt, out / f"{j:04d}.png", seed) for j, (prompt, _, seed) in enumerate(jobs)]
        rows = [dict(file=names[j], prompt=prompt, seed=seed, base=base.name, adapters=adapters,
                     **(given | ({own: str(file)} if file else {})), **settings,
                     **({"continue": args.more} if args.more else {}),
                     **({"scores": scores[j]} if scores else {}))
                for j, (prompt, file, seed) in enumerate(jobs)]
        write_atomic(out / "index.jsonl", lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in rows)))
        shown = rows[:32]
        clips = [read_video(out / r["file"])[0] for r in shown]
        headers = ["tracks", "result"] if tracks is not None else None
        clips = [[tracks, clip] for clip in clips] if headers else clips
        contact_sheet(clips, out / "sheet.png", [r["prompt"] for r in shown], headers=headers)
        if args.judge:  # on the files, as one would look at them
            files = [read_video(out / r["file"])[0] for r in rows]
            verdict = judge_captions([video[:, :args.frames] for video in files], [r["prompt"] for r in rows])
            if row.first_frame:
                verdict |= first_frame_kept(files, [image_tensor(open_image(r["image"])) for r in rows])
            print("judge:", " ".join(f"{k} {v:.3f}" for k, v in verdict.items()))
            text = json.dumps(dict(clips=len(rows), **settings, **verdict), indent=1)
            write_atomic(out / "judge.json", lambda p: p.write_text(text))
        if scores:
            print_scores([scores[j] for j in range(len(jobs))])
        print(f"{out}: {len(rows)} clips, sheet.png, index.jsonl")


if __name__ == "__main__":
    main()
