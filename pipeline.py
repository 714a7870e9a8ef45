"""From prompts to videos and from clips to latents: what sample.py and all methods share.

rollout() runs a sampler on a base, generate() makes videos of it, conditions() turns pictures and maps into
what the network is told, and moments() and draw_latents() encode clips for training.
"""
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from bases import add_guidance, latent_shape, load_base
from common import Env, UserError, finish, gather_rows, generator, seed_of
from data import (
    center_crop_wide, clip_frames, clip_image, encode_once, image_tensor, open_image, quick_files,
    read_image_prompts, read_prompts, read_video, to_uint8, video_info, video_maps, write_video)
from diffusion import (
    appearance_rows, cogvideox_dpm, ddim, ddim_invert, dpmpp_2m, dynamic_guidance, guided, higen,
    lcm, make_schedule, mix_noise, motion_factors, offset_noise, randn, rflow, sr600)
from metrics import psnr
from models import (
    Adapter, SpatialTransformer, UNetConfig, add_lora, guidance_embedding, lora_strength,
    merge_lora)
from weights import LEARNED, load_checkpoint, run_file, run_parts

# ---- prompts to videos

SAMPLERS = ("ddim", "lcm", "dpmpp", "dpm", "rflow", "higen", "sr600")


def check_sampler(args, row):
    """Refuse a sampler that cannot sample this base."""
    own, unet = row.sample["sampler"], isinstance(row.net, UNetConfig)
    if args.sampler != own and (not unet or {args.sampler, own} - {"ddim", "lcm", "dpmpp"}):
        raise UserError(f"--sampler {args.sampler}: this base is sampled by {own}")


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


def frame_rate(args, n, device) -> dict:
    """{"fps": (n,)} for a base that takes the frame rate as a condition, else {}."""
    return {} if args.fps is None else {"fps": torch.full((n,), args.fps, device=device)}


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


def invert_clip(base, env, args, video):
    """The noise (1,c,f,h,w) that DDIM would turn into a clip (3,f,h,w): without words, guidance or image."""
    latents = base.vae.encode(video[None].to(env.device, env.dtype)).float()
    null = base.encode_null("", 1)
    return ddim_invert(lambda x, t: base.net(x, t, null), latents, base.schedule, args.sample_steps)


# ---- clips to latents and back

def decode(base, latents, frames, chunk=16, chosen=None):
    """Latents -> video; chosen: numbers of the only frames to decode.

    Open-Sora's latents do not tell how many frames their last one stands for: frames, of the whole clip.
    """
    more = {"num_frames": frames} if base.row.schedule is None else {}
    return base.vae.decode(latents, chosen, chunk, **more)


@torch.no_grad()
def moments(vae, video, env):
    """video (b,3,f,h,w) -> {"mean", "std"} (b,c,f,h,w) of the encoder's Gaussian, on the CPU."""
    # each clip as (f,3,h,w): its frames are the batch
    parts = [vae.moments(clip.transpose(0, 1).to(env.device, env.dtype)) for clip in video]
    mean, logvar = (torch.stack([x.transpose(0, 1).cpu() for x in column]) for column in zip(*parts))
    return {"mean": mean, "std": (0.5 * logvar).exp()}


def draw_latents(vae, batch, generators, env):
    """A batch of clips, encoded already or not -> samples of the encoder's Gaussian, as VGen trains."""
    m = batch if "mean" in batch else moments(vae, batch["video"], env)
    z = m["mean"].float() + m["std"].float() * randn(m["mean"].shape, generators)
    return z.to(env.device) * vae.cfg.scale


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


@torch.no_grad()
def encode_tracks(base, env, video):
    """Tracking video (3,f,h,w) in [-1,1] -> latents of it and of its first frame (Diffusion as Shader).

    A base that makes video from text alone has no place for the second.
    """
    video = video[None].to(env.device, env.dtype)
    parts = {"tracks": video} | ({"first_track": video[:, :, :1]} if base.row.first_frame else {})
    return {name: base.vae.encode(part).float() for name, part in parts.items()}


# ---- conditions

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


def read_image_pairs(path, row, image=None):
    """A prompt file -> [(image or None, prompt)]; the image of all, or of each line image|||prompt."""
    optional = row.unet.adapter_image_dim and Path(path).is_file() and b"|||" in Path(path).read_bytes()
    if not image and (row.first_frame or optional):
        return read_image_prompts(path)
    return [(image, prompt) for prompt in read_prompts(path)]


def enlarge_clip(path, args, dtype=torch.float32):
    """A clip for SR600 -> ((1,3,f,H,W) in [-1,1], its own frames): at most 32, 16 or fewer doubled."""
    frames = min(video_info(path)[0], 32)
    video, _ = read_video(path, frames)
    if frames <= 16:  # as published: the network was trained on 32
        video = video.repeat_interleave(2, dim=1)
    size = (args.height, args.width)
    video = F.interpolate(video.transpose(0, 1).float(), size, mode="bilinear", align_corners=False)
    return video.transpose(0, 1)[None].to(dtype), frames


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
