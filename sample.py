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

from bases import BASES, base_row, fill, load_base, merge_public_lora, read_words
from common import (
    COUNT, NATURAL, REAL, SHARE, UNSIGNED, Parser, UserError, check_writable, gather_rows,
    memory_advice, run_command, setup, write_atomic)
from data import (
    center_crop_wide, codec_motion, contact_sheet, image_tensor, list_videos, lucas_kanade,
    open_image, opensora_size, prompts_of, raft, read_map, read_video, video_info, video_maps,
    write_video)
from dit import STDiT3Config
from pipeline import (
    SAMPLERS, check_sampler, encode_tracks, enlarge_clip, first_frame_kept, frame_picture,
    generate_from, invert_clip, load_run, lora_file, read_image_pairs, read_runs)
from rewards import get_reward, print_scores, score_files
from text_encoders import CLIPConfig
from tinyworld import MOTIONS, NEW_MOTIONS, judge_captions, parse, tiny_captions, tiny_pairs
from tracks import estimate_depth, midas_depth
from weights import public_files

# ---- conditions from files

FILE_FLAGS = ("image", "tracks", "video", "mask", "depth", "midas", "sketch", "motion_vectors", "style_image",
              "appearance_image", "follow", "flow_weights")
TAKE = "depth", "sketch", "single_sketch", "motion", "local_image", "style"  # what --follow is followed in


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


def read_maps(args, size):
    """VideoComposer's maps from ready files -> {name: (1,c,f,h,w)}.

    depth: MiDaS's inverse depth / 20 in 0..10 (.npy; a video counts as 0..1), but with --midas a video in
    [-1,1], whose depth midas_depth() finds; sketch: 0..1 (a picture is the single sketch of the first
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
            return midas_depth(args.midas, video[None], device)[0]
        near = 1 / torch.from_numpy(estimate_depth(args.depth_model, video, device)).float()
        return (2 * near / near.max())[None]  # about MiDaS's range; other networks have their own
    flow = lucas_kanade if row.text is None else None
    flow = raft("large", args.flow_weights, device) if args.flow_weights else flow
    maps = video_maps(video, args.take, depth, flow, block=16 if row.text else 1)
    if "motion" in args.take and not flow:
        maps["motion"] = codec_motion(video)
    return {name: value[None] for name, value in maps.items()}


# ---- runs and public adapters

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
    pairs = [(image, args.prompt)] if args.prompt else read_image_pairs(args.prompts, row, image)
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
            maps["depth"] = midas_depth(args.midas, maps["depth"], env.device)
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
                options["video"], frames = enlarge_clip(images[0], args)
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
    run_command(main)
