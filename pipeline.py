"""From prompts to videos and from clips to latents: what sample.py and all methods share.

rollout() runs a base's sampler, generate() makes videos with it, conditions() turns pictures and
maps into what the network is told, encode_clips() and draw_latents() prepare clips for training,
show() writes what an evaluation made.
"""
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from bases import Sampling, base_row, latent_shape, size_for_image
from common import (
    Env, UserError, draw_curve, finish, gather_rows, generator, meet, read_lines, read_text,
    seed_of, write_lines)
from data import (
    Buckets, Mixed, center_crop_wide, clip_image, clip_square, contact_sheet, encode_once,
    image_tensor, lanczos_cover, open_clips, open_image, prompt_grid, read_batches,
    read_image_prompts, read_prompts, read_seeded_prompts, to_uint8, write_video)
from diffusion import (
    FLOW_SAMPLERS, cogvideox_dpm, ddim, ddim_invert, dpmpp_2m, dynamic_guidance, guided, higen, lcm,
    mix_noise, offset_noise, randn, recorded, sampler_updates, sr600)
from dit import STDiT3Config, WanConfig
from metrics import psnr
from models import (
    Adapter, SpatialTransformer, guidance_embedding, lora_strength)
from rewards import statistics
from tinyworld import FLAW_SHARES, TinyWorld, judge_captions, tiny_pairs, tiny_prompts
from vae import OpenSoraVAE

STRENGTHS = 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0  # of the LoRA, in sweep.png
ASSET_PROMPTS = Path(__file__).parent / "assets" / "prompts"


# ---- prompts to latents

def rollout(net, base, prompts, x_T, sampling, generators, cond=None, null_cond=None,
            sequential=False, grad_last=0, progress=None, last=None):
    """Prompts and noise x_T (n,c,f,h,w) -> latents (n,c,f,h,w), by the base's sampler with
    guidance.

    generators: one per clip, for the noise that a sampler draws. grad_last: the last K updates
    record gradients; the state before them is a constant, and texts and conditions have none.
    last: as in ddim(); flow matching's samplers have it, too. The rest: see guided_net().
    """
    fn = guided_net(net, base, prompts, sampling, cond, null_cond, sequential)
    schedule, steps = base.sampling_schedule(sampling), sampling.sample_steps
    shared = dict(grad_last=grad_last, progress=progress)
    if sampling.sampler == "lcm":
        x_0 = lcm(fn, x_T, schedule, steps, generators, sampling.origin, sampling.spacing,
                  sampling.size, progress)
    elif sampling.sampler in FLOW_SAMPLERS:
        x_0 = FLOW_SAMPLERS[sampling.sampler](
            fn, x_T, schedule, steps, sampling.size, sampling.spacing, last=last, **shared)
    elif sampling.sampler == "dpm":
        x_0 = cogvideox_dpm(fn, x_T, schedule, steps, generators, **shared)
    elif sampling.sampler == "dpmpp":
        x_0 = dpmpp_2m(fn, x_T, schedule, steps, **shared)
    else:
        x_0 = ddim(fn, x_T, schedule, steps, sampling.eta, generators, spacing=sampling.spacing,
                   last=last, **shared)
    kept = (cond or {}).get("kept")
    return x_0 if kept is None else torch.cat([kept, x_0[:, :, 1:]], dim=2)


def guided_net(net, base, prompts, sampling, cond=None, null_cond=None, sequential=False):
    """-> fn(x, t): the network as samplers call it, with these n prompts, conditions and guidance.

    net: base.net, perhaps wrapped by DDP or FSDP. cond, null_cond: {condition of the network:
    tensor (n, ...)}; the second replaces some in the unconditional branch.
    """
    texts, n = [prompt + sampling.suffix for prompt in prompts], len(prompts)
    with torch.no_grad():
        text, null = base.encode_text(texts), base.encode_null(sampling.negative, n)
        device = text.device
        cond = dict(cond or {}) | frame_rate(sampling.fps, n, device)
        null_cond = dict(null_cond or {})
        if base.row.unet.motion_blocks:
            cond["motion_text"] = base.encode_text(texts, motion=True)
            null_cond["motion_text"] = base.encode_text([sampling.negative] * n, motion=True)
    if isinstance(base.row.net, STDiT3Config):
        cond |= clip_size(sampling, n, device)
        cond["text_mask"] = (base.tokenize(texts) != 0).to(device)  # in both branches, as published
    kept = cond.pop("kept", None)
    if sampling.sampler == "lcm":
        fn = distilled(net, base.row.unet, text, cond, sampling)
        return fn if kept is None else keep_first(fn, kept)
    cfg, rule = sampling.cfg, sampling.dynamic_cfg or "off"
    if rule != "off":
        cfg = dynamic_guidance(cfg, sampling.sample_steps, as_published=rule == "published")
    branches = dict(sequential=sequential, null_cond=null_cond, **cond)
    fn = guided(net, text, null, cfg, **branches)
    if base.row.two_experts:
        low = guided(base.low_net, text, null, sampling.low_cfg, **branches)
        fn = two_experts(base, fn, low, sampling.boundary)
    if kept is not None:
        fn = keep_first(fn, kept)
    if sampling.subject_below is not None:
        fn = late_subject(fn, net, sampling.subject_below)
    return fn


def recorded_rollout(net, base, env, prompts, images, starts, generators, sampling, noise, noisy):
    """Clips sampled with noise: videos (b,3,f,h,w), and for each clip what its training needs.

    images: first frames or None; starts, generators: one per clip, of x_T and of the other noise;
    noise: its (kind, level); noisy: numbers of the updates that draw it, see recorded(). A clip is
    a dictionary of its prompt, conditions of both branches, states and log-probabilities.
    """
    cond, null_cond = conditions(base, env, sampling, images)
    fn = guided_net(net, base, prompts, sampling, cond, null_cond)
    x_T = randn((len(prompts), *base.latent_shape(sampling)), starts, env.device)
    updates = sampler_updates(
        base.sampling_schedule(sampling), sampling.sample_steps, sampling.size, sampling.spacing)
    states, log_probs = recorded(fn, x_T, base.schedule, updates, noisy, *noise, generators)
    clips = [dict(prompt=prompts[i], states=states[i], log_probs=log_probs[i],
                  cond={k: v[i] for k, v in cond.items()},
                  null_cond={k: v[i] for k, v in null_cond.items()}) for i in range(len(prompts))]
    return decode(base, states[:, -1], sampling.frames), clips


def distilled(net, unet, text, cond, sampling):
    """A consistency model's fn(x, t): no second branch, the guidance scale is a condition
    (T2V-Turbo). unet: the options of the network, see Row.unet."""
    def embedded(scale):
        scales = torch.full((len(text),), scale, device=text.device)
        return guidance_embedding(scales, unet.guidance_dim)
    if unet.guidance_dim:
        cond = cond | {"guidance": embedded(sampling.cfg)}

    def fn(x, t):
        if not unet.motion_guidance_dim:
            return net(x, t, text, **cond)
        early = t[0] >= 1000 * (1 - sampling.motion_share)  # motion is decided in the first steps
        motion = embedded(sampling.motion_cfg if early else 0.0)
        return net(x, t, text, motion_guidance=motion, **cond)
    return fn


def late_subject(fn, net, below):
    """fn(x, t) with DreamVideo's subject adapters off at steps t >= below.

    Those steps decide the motion, and a subject learned from still pictures would reduce it.
    """
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


def two_experts(base, high, low, boundary):
    """fn(x, t): `high` at steps t >= 1000 boundary, then `low` (Wan2.2). Only the network in use
    is on the device."""
    def fn(x, t, **now):
        early = bool(t.max() >= 1000 * boundary)
        used, other = (base.net, base.low_net) if early else (base.low_net, base.net)
        if next(used.parameters()).device != x.device:
            other.to("cpu")
            used.to(x.device)
        return (high if early else low)(x, t, **now)
    return fn


def keep_first(fn, kept):
    """fn(x, t) of a network that is given its first latent frame, kept (b,c,1,h,w) (Wan2.2 TI2V).

    It sees that frame as it is, with a step of 0, in every call. What the sampler makes of it does
    not touch the other frames, and is replaced in the end.
    """
    def given(x, t):
        steps = t[:, None].repeat(1, x.shape[2])  # b f
        steps[:, 0] = 0
        return fn(torch.cat([kept, x[:, :, 1:]], dim=2), steps)
    return given


def frame_rate(fps, n, device) -> dict:
    """{"fps": (n,)} for a base that takes the frame rate as a condition, else {}."""
    return {} if fps is None else {"fps": torch.full((n,), fps, device=device)}


def clip_size(sampling, n, device) -> dict:
    """Open-Sora's conditions {"height", "width": (n,)}, in pixels."""
    return {k: torch.full((n,), float(v), device=device)
            for k, v in (("height", sampling.height), ("width", sampling.width))}


def invert_clip(base, env, video, steps):
    """The noise (1,c,f,h,w) that DDIM would turn into a clip (3,f,h,w): without words or
    guidance."""
    latents = base.vae.encode(video[None].to(env.device, env.dtype)).float()
    null = base.encode_null("", 1)
    return ddim_invert(lambda x, t: base.net(x, t, null), latents, base.schedule, steps)


# ---- prompts to videos

@torch.no_grad()
def generate(base, env: Env, prompts, seeds, sampling: Sampling, batch=8, progress=False, cond=None,
             null_cond=None, video=None, sequential=False, chunk=16, inverted=None):
    """Prompts -> videos (n,3,f,h,w) in [-1,1] on the CPU; clip i comes from noise keyed by
    seeds[i].

    cond, null_cond: as for rollout(); video (n,3,f,h,w): what SR600 enlarges; inverted
    (1,c,f,h,w): noise to mix into all clips', see invert_clip(). chunk: frames the autoencoder
    takes at a time. Evaluations during training call this, too, so they show what sample.py will
    make.
    """
    videos, bar = [], tqdm if progress else None
    for i in range(0, len(prompts), batch):
        part = slice(i, i + batch)
        texts, generators = prompts[part], [generator("sample", s) for s in seeds[part]]
        with env.autocast():
            if sampling.sampler == "sr600":
                latents = base.vae.encode(video[part].to(env.device), chunk=chunk)
                latents = enlarged(base, texts, latents, sampling, generators, sequential, bar)
            else:
                image_noise, x_T = starting_noise(base, env, sampling, generators, inverted)
            if sampling.sampler == "higen":
                latents = image_then_clip(base, texts, image_noise, x_T, sampling, generators,
                                          sequential, bar)
            elif sampling.sampler != "sr600":
                own, null = ({k: v[part].to(env.device) for k, v in (given or {}).items()}
                             for given in (cond, null_cond))
                latents = rollout(base.net, base, texts, x_T, sampling, generators, own, null,
                                  sequential, progress=bar)
            frames = sampling.frames if video is None else video.shape[2]
            videos.append(decode(base, latents, frames, chunk).float().clamp(-1, 1).cpu())
    return torch.cat(videos)


def starting_noise(base, env, sampling, generators, inverted=None):
    """-> (HiGen's noise of the image (n,c,1,h,w) or None, noise of the clips (n,c,f,h,w))."""
    c, f, h, w = latent_shape(base.name, *sampling.size)
    n, image_noise = len(generators), None
    if sampling.sampler == "higen":
        image_noise = randn((n, c, 1, h, w), generators, env.device)
    x_T = randn((n, c, f, h, w), generators, env.device)
    if sampling.start_offset:
        shared = randn((n, c, f, 1, 1), generators, env.device)
        x_T = offset_noise(x_T, shared, sampling.start_offset)
    if inverted is not None:
        x_T = mix_noise(inverted, x_T, sampling.inverse_noise)
    return image_noise, x_T


def image_then_clip(base, prompts, image_noise, x_T, sampling, generators, sequential=False,
                    progress=None):
    """HiGen's two passes -> latents of the clips."""
    text = base.encode_text([prompt + sampling.suffix for prompt in prompts])
    null = base.encode_null(sampling.negative, len(prompts))
    _, latents = higen(
        base.net, base.schedule, text, null, image_noise, x_T, sampling.sample_steps, sampling.cfg,
        sampling.eta, sampling.motion_factor, sampling.appearance_factor, sequential, progress,
        sampling.spacing, generators)
    return latents


def enlarged(base, prompts, latents, sampling, generators, sequential=False, progress=None):
    """SR600 on the latents of enlarged clips -> latents."""
    text = base.encode_text([prompt + sampling.suffix for prompt in prompts])
    null = base.encode_null(sampling.negative, len(prompts))
    return sr600(base.net, base.schedule, text, null, latents, sampling.sample_steps, sampling.cfg,
                 generators, sequential=sequential, progress=progress)


def generate_from(base, env: Env, prompts, images, seeds, sampling, batch=8, continuations=0,
                  maps=None, style=None, **options):
    """generate() from images, one path or Pillow image each (None: words alone), and maps, see
    conditions().

    continuations: how often each clip is extended from its last frame; the result has
    f + continuations (f - 1) frames.
    """
    videos = []
    for k in range(continuations + 1):
        with env.autocast():
            cond, null = conditions(base, env, sampling, images, maps, style)
        numbered = seeds if k == 0 else [f"{s}-{k}" for s in seeds]
        made = generate(base, env, prompts, numbered, sampling, batch, cond=cond, null_cond=null,
                        **options)
        videos.append(made if k == 0 else made[:, :, 1:])  # its first frame is there already
        images = [frame_picture(video[:, -1]) for video in made] if k < continuations else None
    return torch.cat(videos, dim=2)


def generate_split(base, env: Env, prompts, seeds, sampling, batch=8, images=None, continuations=0,
                   maps=None):
    """generate_from(), the prompts shared out over the processes: each must call it, and gets all
    videos.

    maps: {name: tensor (n, ...)}, each clip's own.
    """
    meet()  # one of them may still measure what was made before
    # the same number on each process, as FSDP needs it: the last may repeat some
    per = -(-len(prompts) // env.world)
    mine = [i % len(prompts) for i in range(env.rank * per, (env.rank + 1) * per)]
    given = [None] * len(prompts) if images is None else images
    own = ([column[i] for i in mine] for column in (prompts, given, seeds))
    own_maps = {k: v[mine] for k, v in (maps or {}).items()}
    videos = generate_from(base, env, *own, sampling, batch, continuations, own_maps)
    return torch.cat(gather_rows([videos], env))[:len(prompts)]


def generate_folder(base, env: Env, folder, prompts, n, sampling, batch, seed, resume):
    """n clips per prompt -> FOLDER/clips/PROMPT-K.mp4 and metadata.json, VideoDPO's layout
    (read_clips).

    The processes split the work. Existing clips are kept. A resumed run makes the same clips as
    an uninterrupted one.
    """
    folder = Path(folder)
    if (folder / "clips").exists() and not resume:
        raise UserError(f"{folder} already holds clips: --resume goes on, --out FOLDER starts anew")
    about = folder / "settings.json"
    wanted = dict(sampling.metadata(), base=base.name, n=n, seed=seed, batch=batch, prompts=prompts)
    wanted |= {"init": base.init} if base.init else {}
    wanted = json.dumps(wanted, indent=1)
    if about.exists() and about.read_text("utf-8") != wanted:
        raise UserError(f"{folder}: its clips were made with other options or prompts: give the "
                        "same, or another --out")
    finish(env, about, lambda: wanted)
    jobs = [(f"clips/{i:06d}-{k}.mp4", prompt, f"{seed}-{folder.name}-{i}-{k}")
            for i, prompt in enumerate(prompts) for k in range(n)]
    # whole batches: else a resumed run would differ by rounding
    size, start = 2 * batch, time.time()
    batches = [jobs[j:j + size] for j in range(0, len(jobs), size)][env.rank::env.world]
    for number, part in enumerate(batches, 1):
        files, texts, seeds = map(list, zip(*part))
        if not all((folder / file).exists() for file in files):
            videos = generate(base, env, texts, seeds, sampling, size)
            for file, video in zip(files, videos):
                write_video(folder / file, video, sampling.save_fps)
        if env.main and (number % 20 == 0 or number == len(batches)):
            done = min(len(jobs), number * size * env.world)
            print(f"{folder}: {done}/{len(jobs)} clips, {time.time() - start:.0f} s", flush=True)
    rows = [{"basic": {"clip_duration": sampling.frames / sampling.save_fps, "clip_path": file,
                       "globalidx": j},
             "misc": {"frame_caption": [prompt]}} for j, (file, prompt, _) in enumerate(jobs)]
    finish(env, folder / "metadata.json", lambda: json.dumps(rows, indent=1))


def show(run, name, videos, prompts, fps, row=None, sheet=None, headers=None, files=16):
    """Write an evaluation: NAME.png, NAME/*.mp4 of the first 16 clips, a line of eval.jsonl.

    Main process only. videos (n,3,f,h,w); row: measurements, {name: float or dict}; sheet: rows
    of the picture (None: the clips), with column headers; files: number of clips to write.
    """
    if row is not None:
        record(run, name, row)
    contact_sheet(list(videos[:16]) if sheet is None else sheet, run.out / f"{name}.png",
                  list(prompts[:16]), headers=headers)
    for i, video in enumerate(videos[:files]):
        write_video(run.out / name / f"{i:04d}.mp4", video, fps)
    for i, video in enumerate(videos[:4]):
        run.log.video(run.done, f"held-out/{i}", to_uint8(video), fps, prompts[i])


def record(run, name, row):
    """run.record(). After the last evaluation of a run on a tiny base say, in plain words, what it
    did to the clips of its held-out prompts."""
    run.record(name, row)
    rows = read_lines(run.out / "eval.jsonl")
    if name != "after" or "judge" not in row or len(rows) < 2 or rows[0]["step"] > 0:
        return
    was, now = rows[0]["judge"], rows[-1]["judge"]
    flaws = [flaw for flaw in FLAW_SHARES if was[flaw] or now[flaw]]
    words = [f"{name} {100 * was[key]:.0f} % -> {100 * now[key]:.0f} %"
             for name, key in (*zip(flaws, flaws), ("captions", "joint"))]
    print(f"on held-out prompts: {', '.join(words)}", flush=True)


# ---- held-out prompts and their rewards

def read_items(args, sampling, continuations=0):
    """Options of vader.py -> training and held-out items, each (first frame or None, prompt)."""
    row = base_row(args.base)
    if continuations and not row.first_frame:
        raise UserError("--continue: only a base that makes video from a first frame can go on "
                        "from the last one")
    if args.activities and (row.first_frame or not args.prompts):
        raise UserError("--activities: goes with a file of nouns, --prompts, on a base without a "
                        "first frame")

    def read(path):
        if row.first_frame:
            return [(open_image(image), caption) for image, caption in read_image_prompts(path)]
        return [(None, prompt) for prompt in read_prompts(path)]

    def tiny_items(held_out):
        if not row.first_frame:
            return [(None, prompt) for prompt in tiny_prompts(held_out)]
        seed, n = (0, args.eval_n) if held_out else (1, 256)
        clips, captions = tiny_pairs(seed, n, sampling.frames)
        return [(frame_picture(clip[:, 0]), caption) for clip, caption in zip(clips, captions)]

    if args.activities:
        items = [(None, prompt) for prompt in prompt_grid(args.prompts, args.activities)]
    elif args.prompts:
        items = read(args.prompts)
    elif row.tiny:
        items = tiny_items(held_out=False)
    elif row.first_frame:
        raise UserError("--prompts: give a file of image|||caption lines; this base needs first "
                        "frames")
    else:
        grid = prompt_grid(ASSET_PROMPTS / "animals.txt", ASSET_PROMPTS / "activities.txt")
        items = [(None, prompt) for prompt in grid]
    if args.eval_prompts:
        held_out = read(args.eval_prompts)
    elif row.tiny and not args.prompts:
        held_out = tiny_items(held_out=True)
    else:
        held_out = items[::max(1, len(items) // args.eval_n)]  # from all over the file
    return items, held_out[:args.eval_n]


def bucket_sizes(args, size, least=1):
    """`size` and those of --buckets, each (frames, height, width). Refuses sizes that do not fit
    the base, and those of fewer than `least` frames, which the method cannot train on."""
    for f, h, w in args.buckets:
        if f < least:
            raise UserError(f"--buckets {f}x{h}x{w}: needs {least} frames or more here")
        try:
            latent_shape(args.base, f, h, w)
        except UserError as e:
            raise UserError(f"--buckets {f}x{h}x{w}: {e}") from None
    return list(dict.fromkeys([size, *args.buckets]))


def open_data(args, sizes, fps=None):
    """--data as clips of `sizes` (frames, height, width), read at --read-fps or at `fps`, see
    data.open_clips()."""
    return open_clips(args.data, sizes, fps or args.read_fps, args.seed, args.data_root,
                      captions_rule(args))


def captions_rule(args):
    """What --empty-captions means to data.list_clips()."""
    return "empty" if args.empty_captions else "needed"


def read_captioned(args, sampling):
    """Options of instructvideo.py -> clips with captions, the captions, held-out items (None,
    prompt)."""
    if args.data:
        data = open_data(args, bucket_sizes(args, sampling.size, args.segments))
        captions = list(dict.fromkeys(caption for _, _, caption in data.rows))
        prompts = captions
    elif base_row(args.base).tiny:
        captions, prompts = tiny_prompts(), tiny_prompts(held_out=True)
        data = TinyWorld(880, sampling.frames, args.seed, captions=captions,
                         flawed=base_row(args.base).flawed)
    else:
        raise UserError("--data: give a folder, csv, jsonl or list of clips with captions")
    if args.eval_prompts:
        prompts = read_prompts(args.eval_prompts)
    return data, captions, [(None, prompt) for prompt in prompts[:args.eval_n]]


def measure_reward(base, sampling, reward, videos, prompts, device):
    """-> {"reward", "reward_sd", ...} of the videos, and on tiny bases "judge": {attribute: share
    right}."""
    row = statistics(reward, videos, prompts, device)
    if base.row.tiny:
        row["judge"] = judge_captions(videos[:, :, :sampling.frames], prompts)
    return row


@torch.no_grad()
def evaluate_reward(run, base, sampling, reward, items, name, watch=None, continuations=0):
    """Held-out items, always from the same noise -> a line of eval.jsonl, NAME.png, NAME/*.mp4.

    items: (first frame or None, prompt); watch: a second reward, "watch" in the line. Every
    process must call it.
    """
    images, prompts = (list(column) for column in zip(*items))
    seeds = [f"eval-{i}" for i in range(len(prompts))]
    videos = generate_split(base, run.env, prompts, seeds, sampling, run.args.batch, images,
                            continuations)
    if not run.main:
        return
    row = measure_reward(base, sampling, reward, videos, prompts, run.device)
    if continuations:  # what is beyond the length that the base was trained to make
        beyond = torch.cat([videos[:, :, :1], videos[:, :, sampling.frames:]], dim=2)
        later = statistics(reward, beyond, prompts, run.device)
        row |= {"later": later["reward"], "later_sd": later["reward_sd"]}
    if watch is reward:
        row["watch"] = row["reward"]
    elif watch:
        row["watch"] = statistics(watch, videos, prompts, run.device)["reward"]
    show(run, name, videos, prompts, sampling.save_fps, row)


def read_prompt_sets(args):
    """--prompts and --eval-prompts -> prompts to train on, held-out ones.

    Tiny bases have their own: 376 and 128 captions. Others are evaluated on what they train on, if
    nothing else is given.
    """
    tiny = base_row(args.base).tiny
    if args.prompts:
        prompts = held_out = read_prompts(args.prompts)
    else:
        prompts, held_out = (tiny_prompts(part, 128) if tiny else [] for part in (False, True))
    if args.eval_prompts:
        held_out = read_prompts(args.eval_prompts)
    return prompts, held_out


# VideoDPO's stages: what each starts from, in its folders
STAGE_FILES = {"generate": "", "score": "metadata.json", "pair": "scores.jsonl",
               "train": "pair.json"}


def plan_stages(args):
    """Options of videodpo.py -> stages to run, {folder: prompts of its clips}; refuses what cannot
    work."""
    if args.pairs and args.stage not in (None, "train"):
        raise UserError(f"--stage {args.stage}: --pairs already supplies the pairs; leave one "
                        "of the two")
    if args.eval_pairs and not args.pairs:
        raise UserError("--eval-pairs: goes with --pairs; else held-out pairs are made from "
                        "--eval-prompts")
    if args.pairs:
        return ["train"], {}
    stages = [args.stage] if args.stage else list(STAGE_FILES)
    prompts, held_out = read_prompt_sets(args)
    if "generate" in stages and not prompts:
        raise UserError("--prompts: give a file of prompts to generate from, or ready pairs with "
                        "--pairs")
    out, first = Path(args.out), stages[0]
    folders = {out / "train": prompts, out / "held-out": held_out[:args.eval_n]}
    for folder in folders:
        file = folder / STAGE_FILES[first]
        if first != "generate" and not file.exists():
            raise UserError(f"--stage {first}: no {file}; run the stage before it first")
    return stages, folders


@torch.no_grad()
def sample_held_out(run, base, sampling, prompts, name) -> dict:
    """Sample the prompts, always from the same noise -> NAME.png and NAME/*.mp4, a clip per prompt.

    -> {"judge": {attribute: share right}} on tiny bases, else {}. Every process must call it.
    """
    seeds = [f"eval-{i}" for i in range(len(prompts))]
    videos = generate_split(base, run.env, prompts, seeds, sampling, run.args.batch)
    if run.main:
        show(run, name, videos, prompts, sampling.save_fps, files=len(videos))
    return {"judge": judge_captions(videos, prompts)} if base.row.tiny and run.main else {}


@torch.no_grad()
def sweep_lora(run, base, sampling, reward, items, continuations=0):
    """Held-out prompts with the LoRA weaker and stronger than trained -> sweep.jsonl, sweep.png.

    Where the reward still rises but the judge falls (on real bases: where clips move far from the
    base's), the reward is being fooled.
    """
    if not items:
        return
    images, prompts = (list(column) for column in zip(*items))
    seeds, rows, unchanged = [f"eval-{i}" for i in range(len(prompts))], [], None
    for strength in STRENGTHS:
        with lora_strength(base.net, strength):
            videos = generate_split(base, run.env, prompts, seeds, sampling, run.args.batch, images,
                                    continuations)
        unchanged = videos if unchanged is None else unchanged  # the first has none of the LoRA
        row = dict(strength=strength, distance=(videos - unchanged).square().mean().sqrt().item())
        row |= measure_reward(base, sampling, reward, videos, prompts, run.device)
        rows.append(row | row.pop("judge", {}))
    if run.main:
        write_lines(run.out / "sweep.jsonl", rows)
        damage = "joint" if "joint" in rows[0] else "distance"
        draw_curve(run.out / "sweep.jsonl", run.out / "sweep.png", ["reward", damage],
                   "strength of the LoRA", "strength")


# ---- clips to latents and back

def decode(base, latents, frames, chunk=16, chosen=None):
    """Latents (b,c,f',h',w') -> video (b,3,f,h,w), differentiable; chosen: numbers of the only
    frames wanted.

    frames: of the whole clip, which Open-Sora's latents do not tell.
    """
    more = {"num_frames": frames} if isinstance(base.vae, OpenSoraVAE) else {}
    return base.vae.decode(latents, chosen, chunk, **more)


@torch.no_grad()
def encode_clips(base, env, video) -> dict:
    """Clips (b,3,f,h,w) in [-1,1] -> {"mean", "std"} (b,c,f',h',w') of unscaled latents, on the
    CPU."""
    # clip by clip: a convolution over another number of clips rounds otherwise
    parts = [base.vae.moments(clip[None].to(env.device, env.dtype)) for clip in video]
    mean, logvar = (torch.cat(column).cpu() for column in zip(*parts))
    return {"mean": mean, "std": (0.5 * logvar).exp()}


def draw_latents(base, env, encoded, generators, part=""):
    """What encode_clips() gave, perhaps out of a cache -> scaled latents: a sample of the encoder's
    Gaussian, or (Wan) its mean.

    generators: one per clip. part: a prefix of the two names, such as "tracks.".
    """
    z, std = encoded[f"{part}mean"].float(), encoded[f"{part}std"].float()
    if base.vae.sampled:
        z = z + std * randn(z.shape, generators)
    return base.vae.normalise(z.to(env.device))


def cache_latents(run, data, encode, about, name="."):
    """--cache-latents: encode every clip of `data` once, in half precision, into OUT/latents/NAME.

    encode(batch) -> {name: tensor (b, ...)}; about: plain values; files made with other values
    are redone. -> a data set of what encode gave, with "text". Buckets have a folder each.
    """
    if isinstance(data, Buckets):
        parts = []
        for part, (f, h, w) in zip(data.parts, data.sizes):
            own = about | dict(size=(f, h, w), rows=seed_of(part.rows))
            parts.append(cache_latents(run, part, encode, own, f"{name}/{f}x{h}x{w}"))
        return Buckets(parts, like=data)
    about = dict(base=run.args.base, weights=run.args.weights, seed=run.args.seed) | about
    def encode_half(batch):
        return {k: v.half() for k, v in encode(batch).items()}
    folder = run.out / "latents" / name
    return encode_once(folder, data, encode_half, about, run.env, run.args.workers)


# ---- text-to-video training: clips, images among them, previews

class Clips:
    """What a text-to-video run reads: clips, single images among them, and prompts for previews.

        clips = Clips(args, sampling)                 # reads the lists, refuses bad options
        clips.check_words(base)
        clips.open(run, base)                         # --cache-latents encodes everything now
        x0, captions, seen = clips.draw(generators)   # of each micro-step

    drawn: the settings at the size of the clips that were drawn last. Its options are the groups
    "data" and "images" of common.OPTIONS. On tiny bases clips come from the tiny world unless there
    is --data.
    """

    def __init__(self, args, sampling, captions=True, mixture=(), **tiny):
        """captions False: none of --data's are read. mixture: (frames, frames per second) of the
        kinds of clips that batches take turns at, in place of steps on images. tiny: options of
        TinyWorld.
        """
        self.args, self.sampling, self.mixture = args, sampling, mixture
        self.tiny = tiny | dict(flawed=base_row(args.base).flawed)
        self.observe, self.cached, self.drawn = None, False, sampling
        if args.images and not (args.data and (args.image_share or mixture)):
            raise UserError("--images: goes with --data, for the steps of --image-share")
        if args.buckets and (args.images or mixture):
            raise UserError("--buckets: not with --images or --mixture; list pictures in --data "
                            "and give them a size of 1 frame")
        causal = base_row(args.base).vae.latent_frames(2) == 1  # a latent is of several frames
        if args.image_share and causal and not (args.images or mixture):
            raise UserError(f"--image-share: {args.base} has no latents of single frames; give "
                            "pictures with --images, or --image-share 0")
        if not args.data and not base_row(args.base).tiny:
            raise UserError("--data: give a folder, csv, jsonl or list of clips with captions")
        kinds = sorted(set(mixture), reverse=True) or [(sampling.frames, args.read_fps)]
        if args.images and not mixture:
            kinds.append((1, None))
        self.kinds, self.parts = kinds, []
        for frames, fps in kinds:
            if not args.data:
                self.parts.append(TinyWorld(4096, frames, args.seed, **self.tiny))
                continue
            pictures = args.images and frames == 1
            sizes = bucket_sizes(args, (frames, *sampling.size[1:]))
            self.parts.append(open_clips(
                args.images if pictures else args.data, sizes, fps, args.seed, args.data_root,
                captions_rule(args) if captions or pictures else "ignored"))
        if args.eval_prompts:
            prompts = read_prompts(args.eval_prompts)
        else:
            prompts = [self.parts[-1].rows[0][2]] if args.data else tiny_prompts(held_out=True)
        self.prompts = prompts[:args.eval_n]

    def check_words(self, base):
        """Refuse words that the tiny world does not know."""
        if base.row.tiny:
            rows = [row for part in self.parts if self.args.data for row in part.rows]
            base.tokenize([*self.prompts, self.sampling.negative, *(row[2] for row in rows)])

    def examples(self, n):
        """A batch of n clips to evaluate on: the first of --data, or tiny ones that training never
        reads. Before open()."""
        data, size = self.parts[0], self.sampling.size
        if not self.args.data:
            data = TinyWorld(n, self.sampling.frames, self.args.seed + 1, **self.tiny)
        if isinstance(data, Buckets):
            if size not in data.sizes:
                raise UserError(f"--buckets: no clip is read at {size[0]}x{size[1]}x{size[2]}, to "
                                "evaluate on; give other --frames, --height and --width")
            data = data.parts[data.sizes.index(size)]
        return default_collate([data[i, i] for i in range(min(n, len(data)))])

    def open(self, run, base, observe=None, texts=()):
        """Start reading. --cache-latents first encodes all clips and frees the image tower. It
        also encodes captions, prompts and `texts` and frees the text tower, unless texts is None.

        observe(video (b,3,f,h,w), batch) -> {name: tensor (b, ...)}: what the method reads off
        clips.
        """
        self.run, self.base, self.observe, args = run, base, observe, self.args
        if args.cache_latents:
            for i, part in enumerate(self.parts):
                rows = part.rows if args.data else "tiny"
                about = dict(size=self.sampling.size, fps=args.read_fps, rows=seed_of(rows))
                name = "images" if i else "."
                self.parts[i] = cache_latents(run, part, self.encode, about, name)
            self.cached, base.image_encoder = True, None
            if texts is not None:
                prompts = [prompt + self.sampling.suffix for prompt in self.prompts]
                captions = [text for part in self.parts for text in part.texts()]
                base.remember([*captions, *prompts, *texts, self.sampling.negative], run.env)
        data = self.parts[0]
        if len(self.parts) > 1:
            data = Mixed(self.parts, *self.turns(), run.samples_read)
        self.batches = read_batches(data, run.numbers, args.seed, args.workers)

    def turns(self):
        """-> which part of the data is read in turn from now on, and samples per turn."""
        args, run = self.args, self.run
        if not self.mixture:  # a turn is an update of all processes
            steps = [int(self.is_image_step(step)) for step in range(run.start, args.steps)]
            return steps, args.batch * args.accum * run.env.world
        first = run.samples_read // args.batch  # a turn is a batch of one process
        last = first + (args.steps - run.start) * args.accum * run.env.world
        kinds = [self.mixture[k % len(self.mixture)] for k in range(first, last)]
        return [self.kinds.index(kind) for kind in kinds], args.batch

    def is_image_step(self, step) -> bool:
        """Does update `step` train on single frames? Drawn from its number: all processes agree."""
        draw = torch.rand((), generator=self.run.generator(step, "image")).item()
        return not self.mixture and draw < self.args.image_share

    def encode(self, batch):
        """A batch of clips -> {name: tensor (b, ...)} on the CPU: latents, what observe() saw."""
        video = batch["video"]
        seen = self.observe(video, batch) if self.observe and video.shape[2] > 1 else {}
        return encode_clips(self.base, self.run.env, video) | seen

    def draw(self, generators):
        """The next micro-step's samples -> latents x0 (b,c,f,h,w), captions, all that was encoded.

        f is 1 in steps on images. Captions are replaced by the negative prompt with probability
        --drop-text.
        """
        batch = next(self.batches)
        if self.args.buckets:
            f, h, w = batch["size"][0].tolist()
            self.drawn = replace(self.sampling, frames=f, height=h, width=w)
        seen = batch if self.cached else self.encode(batch)
        x0 = draw_latents(self.base, self.run.env, seen, generators)
        if self.is_image_step(self.run.step) and x0.shape[2] > 1:  # a random frame of each clip
            chosen = [int(torch.randint(x0.shape[2], (), generator=g)) for g in generators]
            x0 = torch.stack([x[:, i:i + 1] for x, i in zip(x0, chosen)])
        dropped = [torch.rand((), generator=g) < self.args.drop_text for g in generators]
        captions = [self.sampling.negative if drop else text
                    for text, drop in zip(batch["text"], dropped)]
        return x0, captions, seen


@torch.no_grad()
def preview(run, base, sampling, prompts, name):
    """Sample the prompts, always from the same noise, by the averaged weights -> NAME.png, clips;
    in the tiny world also the judge's verdict, a line of eval.jsonl. Every process must call it."""
    seeds = [f"preview-{i}" for i in range(len(prompts))]
    with run.averaged(base.net):
        videos = generate_split(base, run.env, prompts, seeds, sampling, run.args.batch)
    if run.main:
        judged = base.row.tiny and sampling.frames > 1  # a still picture has no motion to judge
        row = {"judge": judge_captions(videos, prompts)} if judged else None
        show(run, name, videos, prompts, sampling.save_fps, row)


@torch.no_grad()
def encode_tracks(base, env, video):
    """Tracking video (3,f,h,w) in [-1,1] -> latents of it and of its first frame (Diffusion as
    Shader).

    A base that makes video from text alone has no place for the second.
    """
    video = video[None].to(env.device, env.dtype)
    parts = {"tracks": video} | ({"first_track": video[:, :, :1]} if base.row.first_frame else {})
    return {name: base.vae.encode(part).float() for name, part in parts.items()}


# ---- conditions

def training_conditions(base, sampling, texts, t, fps=None) -> dict:
    """A text-to-video network's inputs in training besides step and text, {name: tensor (n,
    ...)}.

    t (n,) steps. fps None: the network's own default (VideoCrafter2: 16). T2V-Turbo is told its
    guidance scale, Open-Sora the clip's size.
    """
    unet, n = base.row.unet, len(t)
    cond = frame_rate(fps, n, t.device)
    if isinstance(base.row.net, STDiT3Config):
        cond = {"fps": torch.full((n,), float(sampling.fps), device=t.device)}
        cond |= clip_size(sampling, n, t.device)
        cond["text_mask"] = (base.tokenize(texts) != 0).to(t.device)
    if unet.guidance_dim:
        scale = torch.full((n,), float(sampling.cfg), device=t.device)
        cond["guidance"] = guidance_embedding(scale, unet.guidance_dim)
    if unet.motion_guidance_dim:  # in the first steps only, as distilled() has it
        early = t >= 1000 * (1 - sampling.motion_share)
        scale = sampling.motion_cfg * early
        cond["motion_guidance"] = guidance_embedding(scale, unet.motion_guidance_dim)
    return cond


def tower_image(image, width, tower_size):
    """Pillow image -> (3, s, s), s = tower_size: the image tower's input for a clip of this width.

    VGen crops to a square, as wide as the clip but at least as the tower's input, before it scales.
    """
    side = max(tower_size, width)
    return clip_image(image, (side, side), (tower_size, tower_size))


def tower_frames(base, video, width):
    """Clips (b,3,f,h,w) in [-1,1] -> (b,f,3,s,s): their frames as the base's image tower reads them
    beside a clip so wide."""
    side = (base.row.image or base.row.text).image_size
    frames = [frame_picture(frame) for frame in video.transpose(1, 2).flatten(0, 1)]
    pictures = torch.stack([tower_image(frame, width, side) for frame in frames])
    return pictures.unflatten(0, (len(video), -1))


def frame_picture(frame):
    """A frame (3,h,w) in [-1,1] -> Pillow image, as a picture file would hold it."""
    return Image.fromarray(to_uint8(frame[:, None])[0])


@torch.no_grad()
def conditions(base, env, sampling, images, maps=None, style=None):
    """For a batch of clips -> (cond, null_cond) of generate().

    images: a path or Pillow image each, or None; maps {name: (1,c,f,h,w)}: what all clips share;
    style: a Pillow image whose style they follow (VideoComposer).
    """
    row, n, size = base.row, len(images), (sampling.height, sampling.width)
    cond, null = {}, {}
    images = [image if image is None or isinstance(image, Image.Image) else open_image(image)
              for image in images]
    if isinstance(row.net, WanConfig):
        return wan_conditions(base, env, sampling, images), null

    def clip_embedding(pictures):
        s = (row.image or row.text).image_size
        pixels = torch.stack([tower_image(p, sampling.width, s) for p in pictures])
        return base.image_encoder(pixels.to(env.device, env.dtype))[:, None].float()  # n 1 d

    if row.first_frame:
        pixels = torch.stack([image_tensor(center_crop_wide(p, size)) for p in images])
        cond["first_frame"] = base.vae.encode(pixels[:, :, None].to(env.device, env.dtype)).float()
    if row.unet.image_to_video:
        cond["first_frame"] = cond["first_frame"][:, :, 0]
        cond["image"] = clip_embedding(images)
        null["image"] = torch.zeros_like(cond["image"])
    if style is not None:
        cond["image"] = clip_embedding([style]).expand(n, -1, -1)
        null["image"] = torch.zeros_like(cond["image"])
    if row.unet.adapter_image_dim and images[0] is not None:
        cond["appearance"] = clip_embedding(images)
        null["appearance"] = torch.zeros_like(cond["appearance"])
        for branch, strength in zip((cond, null), sampling.strength):
            branch["strength"] = torch.full((n,), strength)
    for name, value in (maps or {}).items():
        cond[name] = value.expand(n, *value.shape[1:])
    return cond, null


def wan_conditions(base, env, sampling, images) -> dict:
    """Wan's conditions of clips that start from Pillow images, in both branches; None: words alone.

    TI2V keeps the latents of the image as its first latent frame. The others read beside the noise
    4 channels of a mask, which is 1 in the first latent frame, and the latents of the image and of
    grey frames behind it. Wan2.1's network reads the tokens of its CLIP, too.
    """
    size, weight = (sampling.height, sampling.width), next(base.vae.parameters())
    if images[0] is None:
        return {}
    if base.row.keeps_first:
        pixels = [image_tensor(lanczos_cover(p, size)) for p in images]
        return {"kept": base.vae.encode(torch.stack(pixels)[:, :, None].to(weight)).float()}
    cond, pixels = {}, []
    for picture in images:
        if size != size_for_image(base.name, picture.height, picture.width):
            picture = center_crop_wide(picture, size)
        pixels.append(F.interpolate(image_tensor(picture)[None], size, mode="bicubic"))
    clip = F.pad(torch.cat(pixels)[:, :, None], (0, 0, 0, 0, 0, sampling.frames - 1))
    latents = base.vae.encode(clip.to(weight)).float()
    mask = torch.zeros_like(latents[:, :1]).repeat(1, base.row.vae.time_factor, 1, 1, 1)
    mask[:, :, 0] = 1
    cond["first_frame"] = torch.cat([mask, latents], dim=1)
    if base.image_encoder is not None:
        squares = [clip_square(image_tensor(p)[None], base.row.image.image_size) for p in images]
        cond["image"] = base.image_encoder.tokens(torch.cat(squares).to(weight)).float()
    return cond


def first_frame_kept(videos, images):
    """Clips (3,f,h,w) and the pictures (3,h,w) they began with -> psnr in dB, the mean and the
    worst."""
    found = [psnr(video[:, 0], image) for video, image in zip(videos, images)]
    return {"psnr": sum(found) / len(found), "psnr_worst": min(found)}


def noised_first_frame(base, picture, keep, shape, generators):
    """CogVideoX-I2V's condition in training: latents (b,c,1,h,w) of slightly noised pixels.

    log sigma ~ N(-3, 0.5). picture (b,3,h,w) in [-1,1]; keep (b,): 1, or 0 where it is dropped;
    shape (b,c,f,h,w) of the clips' latents.
    """
    sigma = (0.5 * randn((len(picture), 1, 1, 1), generators) - 3).exp()
    pixels = picture.cpu() + sigma * randn(picture.shape, generators)
    noise = randn((*shape[:2], 1, *shape[3:]), generators)  # the latent is a sample, too
    weight = next(base.vae.parameters())
    with torch.no_grad():
        latent = base.vae.encode(pixels[:, :, None].to(weight), noise.to(weight)).float()
    return latent * keep.view(-1, 1, 1, 1, 1)


def read_image_rows(path, row, image=None, root=None):
    """A prompt file -> [(image or None, prompt, seed or None)]: one image for all, or each line's
    own, image|||prompt, with paths as listed_path()."""
    optional = (row.unet.adapter_image_dim or row.keeps_first) and "|||" in read_text(path)
    if not image and (row.first_frame or optional):
        return [(*pair, None) for pair in read_image_prompts(path, root)]
    return [(image, prompt, seed) for prompt, seed in read_seeded_prompts(path)]


# ---- networks that wait in CPU memory (sample.py --offload)

def offload(base, device):
    """Keep a base's networks in CPU memory, after Base.remember().

    Of a denoiser, the block at work and the next one are on `device`; the autoencoder and the
    image tower are there while they work.
    """
    for net in filter(None, (base.net, base.low_net)):
        Streamed(net, device)
    lend(base.vae, device, "moments", "encode", "decode")
    if base.image_encoder is not None:
        lend(base.image_encoder, device, "forward", "tokens")


def lend(module, device, *names):
    """Let a module be on `device` only while one of its methods `names` runs, without gradients."""
    def wrap(method):
        def run(*args, **options):
            home = next(module.parameters()).device  # `device`, if another of its methods calls
            module.to(device)
            try:
                args = [x.to(device) if isinstance(x, Tensor) else x for x in args]
                return method(*args, **options)
            finally:
                module.to(home)
        return run
    for name in names:
        setattr(module, name, wrap(getattr(module, name)))


class Streamed:
    """Hooks that bring a network's blocks to `device` one after the other, for sampling.

    While a block runs, the next one is copied, on a stream of its own. The order is that of the
    call before. What lies outside the blocks stays on the device.
    """

    def __init__(self, net, device):
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.homes = {}    # {block on the device: its tensors in CPU memory}
        self.follows = {}  # {block: the one after it}
        self.last = None   # the block that ran last and the event of its end
        blocks = net.units()
        inside = {id(t) for block in blocks for t in tensors_of(block)}
        for t in tensors_of(net):
            if id(t) not in inside:
                t.data = t.data.to(device)
            elif self.side:
                t.data = t.data.pin_memory()  # else copying would not run beside the block
        for block in blocks:
            block.register_forward_pre_hook(self.enter)
            block.register_forward_hook(self.leave)
        net.register_forward_hook(self.rest)

    def fetch(self, block):
        """Begin to copy a block to the device, unless it is there."""
        if block not in self.homes:
            self.homes[block] = [t.data for t in tensors_of(block)]
            with torch.cuda.stream(self.side):
                for t in tensors_of(block):
                    t.data = t.data.to(self.device, non_blocking=True)

    def drop(self, block):
        """Free a block's copy on the device, which no kernel may still read."""
        for t, home in zip(tensors_of(block), self.homes.pop(block)):
            t.data = home

    def enter(self, block, args):
        self.fetch(block)
        if self.side:
            torch.cuda.current_stream().wait_stream(self.side)

    def leave(self, block, args, out):
        """The block's kernels are queued: wait for those of the block before, fetch the next."""
        end = self.side and torch.cuda.current_stream().record_event()
        before, self.last = self.last, (block, end)
        if before:
            self.follows[before[0]] = block
            if before[1]:
                before[1].synchronize()
            self.drop(before[0])
        if block in self.follows:
            self.fetch(self.follows[block])

    def rest(self, net, args, out):
        if self.side:
            torch.cuda.current_stream().synchronize()
        for block in list(self.homes):
            self.drop(block)
        self.last = None


def tensors_of(module):
    return [*module.parameters(), *module.buffers()]
