"""Sample videos from a base, or from one of our runs on top of it.

    python sample.py --base tiny --prompt "a red circle moving left on a gray background"
    python sample.py --ckpt out/vader --prompts prompts.txt --n 4
    python sample.py --base tiny --judge 256         # how many of 256 random captions are obeyed?
    python sample.py --ckpt out/vader --prompts prompts.txt --reward hps,aesthetic  # scores, too
    torchrun --nproc_per_node=4 sample.py --base modelscope --weights W --prompts prompts.txt
    python sample.py --base i2vgen-xl --image dog.png --prompt "a dog runs"
    python sample.py --base vcomposer --depth depth.npy --style-image art.png --prompt "a red car"
    python sample.py --base vcomposer --depth drive.mp4 --midas W --prompt "a red car"
    python sample.py --base vcomposer --follow drive.mp4 --take sketch motion --prompt "a red car"
    python sample.py --base tft2v --prompt "a fox in the snow" --then sr600    # enlarged: OUT/sr600
    python sample.py --base tiny-i2v --image a.png --prompt "a red circle growing" --continue 2
    python sample.py --ckpt out/das --image first.png --tracks tracks.mp4 --prompt "a dog"
    python sample.py --base sr600 --video out/sample       # every clip there, enlarged
    python sample.py --base modelscope-v1.4 --lora instructvideo.pth:0.8 --prompt "a fox"
    python sample.py --ckpt out/identity:500 --ckpt out/motion --prompt "a * turns"

Writes OUT/0000.mp4 ..., OUT/sheet.png (a contact sheet) and OUT/index.jsonl (file, prompt, seed,
base, adapters, settings and, with --reward, scores). Two more folders may be written: OUT/side
(tracks beside the result) and OUT/first (the first frames that --judge drew).

A clip depends on its prompt, its number and --seed alone, not on --batch or the number of
processes. Memory: prompts are encoded first, and the text towers are freed before the networks
move to the GPU. Then --batch 1, --sequential and --decode-chunk 1 help most. With --offload the
network's weights wait on the CPU and come block by block; --frozen int8 halves them.
"""
from common import (  # first: for signals
    Parser, UserError, check_writable, gather_rows, meet, own_folder, release_folders, run_command,
    setup, warn, write_atomic, write_lines)
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from bases import (
    base_row, choose_sampling, load_base, load_run, nearest_side, read_words, size_for_image)
from data import (
    center_crop_wide, clips_with_prompts, codec_motion, contact_sheet, image_tensor, is_clip,
    lucas_kanade, open_image, opensora_size, raft, read_map, read_video, video_info, video_maps,
    write_video)
from dit import STDiT3Config, WanConfig
from models import compile_blocks, merge_public_lora
from pipeline import (
    encode_tracks, first_frame_kept, frame_picture, generate_from, invert_clip, offload,
    read_image_rows)
from rewards import get_reward, print_scores, score_files
from text_encoders import CLIPConfig
from tinyworld import MOTIONS, NEW_MOTIONS, judge_captions, parse, tiny_captions, tiny_pairs
from tracks import depth_estimator
from weights import LEARNED, load_checkpoint, lora_file, public_files, run_file

# options that name a file, and what --follow takes of a clip
FILE_FLAGS = (
    "image", "tracks", "video", "mask", "depth", "midas", "sketch", "motion_vectors", "style_image",
    "appearance_image", "follow", "flow_weights")
WINDOW = 32  # frames that SR600 was trained on
TAKE = "depth", "sketch", "single_sketch", "motion", "local_image", "style"


@dataclass(frozen=True)
class Clip:
    """One clip to make. source: its first frame or appearance (path or Pillow), SR600's clip, or
    None."""
    file: str
    prompt: str
    source: object
    seed: str


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base", without=("--resume", "--init"))
    p.add_argument("--ckpt", action="append", default=[], metavar="FOLDER[:STEP]",
                   help="folder of one of our runs; twice to join DreamVideo's subject and motion")
    p.add_argument("--learned", metavar="FILE",
                   help="words of a textual inversion: a run of dreamvideo.py or DreamVideo's file")
    p.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]",
                   help="LoRA or adapter file of T2V-Turbo, VADER, InstructVideo or DreamVideo; "
                        "repeatable")
    p.add_argument("--prompt", type=p.TEXT, help="one prompt")
    p.add_argument("--prompts", help="file of prompts: .txt (also lines prompt|seed), .csv, "
                                     ".tsv, .jsonl, .json; with a first frame: lines "
                                     "image|||caption")
    p.options("data", only=["--data-root"])
    p.add_argument("--judge", type=p.COUNT, metavar="N",
                   help="tiny bases: sample N random captions (and held-out first frames) and "
                        "judge the clips")
    p.add_argument("--motion", choices=MOTIONS + NEW_MOTIONS, help="tiny bases: the clips' motion")
    p.options("reward")
    add_conditions(p)
    p.options("pixels sampler sampling")
    p.add_argument("--size", metavar="LENGTH,RESOLUTION,ASPECT",
                   help="Open-Sora's sizes by name: 2s to 16s, 144p to 720p, height:width, such as "
                        "4s,240p,9:16")
    p.add_argument("--save-fps", type=p.RATE,
                   help="frame rate of the files (default: the base's)")
    p.add_argument("--suffix", type=p.TEXT, help="text put after every prompt (default: "
                                                  "the base's)")
    p.add_argument("--dynamic-cfg", choices=("published", "meant", "off"),
                   help="CogVideoX: guidance that grows over the steps, as published or as meant")
    p.add_argument("--low-cfg", type=p.REAL,
                   help="Wan2.2 A14B: guidance scale of the expert for little noise")
    p.add_argument("--motion-cfg", type=p.REAL,
                   help="T2V-Turbo-v2: scale of motion guidance (default: 0.05)")
    p.add_argument("--n", type=p.COUNT, default=1, help="clips generated per prompt")
    p.add_argument("--vbench", action="store_true",
                   help="name the files as VBench wants: PROMPT-0.mp4, ...")
    p.add_argument("--then", metavar="BASE",
                   help="enlarge the clips with this base, sr600, into OUT/BASE")
    p.add_argument("--then-weights", metavar="FOLDER",
                   help="folder with its public weights (default: download them)")
    p.add_argument("--then-size", type=p.COUNT, nargs=2, metavar=("HEIGHT", "WIDTH"),
                   help="size of the enlarged clips in pixels (default: 720 1280)")
    p.options("machine", without=("--grad-ckpt", "--parallel", "--shard-group"))
    p.options("lora", only=["--frozen"])
    p.add_argument("--sequential", action="store_true",
                   help="run the two branches of guidance one after the other: less memory")
    p.add_argument("--decode-chunk", type=p.COUNT, default=16,
                   help="frames that the autoencoder decodes at a time")
    p.add_argument("--batch", type=p.COUNT, default=4, help="clips generated at a time per process")
    p.add_argument("--seed", type=p.SEED, default=0, help="seed of everything random")
    p.set_defaults(out="out/sample")
    args = p.parse_args(argv)
    if not args.base and not args.ckpt:
        raise UserError("give --base NAME or --ckpt FOLDER")
    if args.offload and args.compile:
        raise UserError("--compile: compiled blocks must stay in place; leave --offload out")
    if args.reward_weights and not args.reward:
        raise UserError("--reward-weights: of which reward? give --reward")
    if args.data_root and not args.prompts:
        raise UserError("--data-root: where the paths in --prompts start; give --prompts, too")
    if args.motion and not args.judge:
        raise UserError("--motion: chooses the clips of --judge N; give --judge, or use --prompt")
    if sum(x is not None for x in (args.prompt, args.prompts, args.judge)) > 1:
        raise UserError("give only one of --prompt TEXT, --prompts FILE, --judge N (tiny)")
    return args


def add_conditions(p):
    """Options for what bases take beside a prompt."""
    p.add_argument("--image", help="first frame (I2VGen-XL, CogVideoX-I2V, das, VideoComposer)")
    p.add_argument("--continue", dest="continuations", type=p.NATURAL, default=0, metavar="K",
                   help="with a first frame: K further clips, each from the last frame of the one "
                        "before")
    p.add_argument("--tracks", help="tracking video (Diffusion as Shader; das.py --make-tracks)")
    p.add_argument("--track-strength", type=p.UNSIGNED,
                   help="weight of the tracks; 0 ignores them (default: 1)")
    p.add_argument("--video", help="SR600: clip or folder of clips to enlarge; VideoComposer: "
                                   "video that --mask partly hides; DreamVideo: clip whose "
                                   "motion guides the starting noise")
    p.add_argument("--mask", help="VideoComposer: picture that is white where the video is hidden")
    p.add_argument("--depth", help="VideoComposer: depth maps, .npy or video; with --midas a clip")
    p.add_argument("--midas", metavar="FILE",
                   help="VideoComposer: estimate the depth of --depth or --follow with these "
                        "weights (ModelScope hub iic/tf-t2v, models/midas_v3_dpt_large.pth)")
    p.add_argument("--sketch", help="VideoComposer: sketches, .npy or video, or one picture")
    p.add_argument("--motion-vectors", metavar="FILE",
                   help="VideoComposer: motion vectors, .npy of shape (2, f, h, w)")
    p.add_argument("--style-image", help="VideoComposer: picture whose style and content to follow")
    p.add_argument("--follow", metavar="VIDEO", help="VideoComposer: clip to take conditions from")
    p.add_argument("--take", nargs="+", choices=TAKE,
                   help="what to take of --follow; motion: the codec's motion vectors or, with "
                        "--flow-weights, optical flow")
    p.add_argument("--depth-model", metavar="NAME",
                   help="depth network of transformers: hub name or folder")
    p.add_argument("--flow-weights", metavar="FILE",
                   help="file of torchvision's RAFT weights")
    p.add_argument("--appearance-image", help="DreamVideo: picture that guides the motion adapter")
    p.add_argument("--strength", type=p.REAL, nargs=2, default=(1.0, 1.0),
                   metavar=("COND", "UNCOND"),
                   help="DreamVideo: weight of the appearance image in the two guidance branches")
    p.add_argument("--subject-below", type=p.NATURAL, metavar="T",
                   help="DreamVideo with a motion: the subject's adapters act only at noise steps "
                        "below T (tiny: 300)")
    p.add_argument("--inverse-noise", type=p.SHARE, default=0.0,
                   help="DreamVideo: share of the inverted --video in the starting noise (0 to 0.5 "
                        "suit a motion learned from one clip)")
    p.add_argument("--motion-factor", type=p.NATURAL, help="HiGen: amount of motion (default: 500)")
    p.add_argument("--appearance-factor", type=p.REAL,
                   help="HiGen: amount of change over the clip (default: 1.0)")


def main(argv=None):
    args = get_args(argv)
    play(args)  # its networks are gone when it returns
    if args.then:
        flags = {"weights": args.then_weights, "device": args.device, "dtype": args.dtype,
                 "seed": args.seed, "video": args.out, "out": Path(args.out, args.then),
                 "save-fps": args.save_fps, **dict(zip(("height", "width"), args.then_size or ()))}
        words = [x for k, v in flags.items() if v is not None for x in (f"--{k}", str(v))]
        play(get_args(["--base", args.then, *words] + ["--sequential"] * args.sequential
                      + ["--offload"] * args.offload))
    release_folders()
    if dist.is_initialized():
        dist.destroy_process_group()


def play(args):
    """Generate, score and write all that the options ask for."""
    if args.base:
        base_row(args.base)  # an unknown name is refused before anything is read
    runs = read_runs(args)
    name = args.base or runs[0][2]["base"]
    row = base_row(name, runs[0][2].get("tracking_blocks", 0) if runs else 0)
    known = {k: v for _, _, meta in runs for k, v in meta["sample"].items()}
    sampling = choose_sampling(name, args, known, **size_asked(args, name, row))
    check_conditions(args, row, sampling)
    check_writable(args.out)
    clips = read_clips(args, row, sampling)
    size = sampling.height, sampling.width
    maps = read_maps(args, sampling) if row.unet.maps else {}
    tracks = read_video(args.tracks, sampling.frames, size=size)[0] if args.tracks else None
    near = read_video(args.video, sampling.frames, size=size)[0] if args.inverse_noise else None
    loras = [lora_file(text) for text in args.lora]
    style = open_image(args.style_image) if args.style_image else None
    env = setup(args.device, args.dtype, args.seed)
    if env.main:
        say_changes(args, row, sampling)
    reward = get_reward(args.reward, env.device, args.reward_weights) if args.reward else None
    if reward:
        reward.check([clip.prompt for clip in clips])
    if args.midas and args.depth:
        estimate = depth_estimator(args.midas, env.device, inverse=True)
        maps["depth"] = estimate(maps["depth"][0])[None, None]
    if args.follow:
        taken, style = followed(args, row, sampling, env.device, style)
        maps |= taken
    texts = [clip.prompt + sampling.suffix for clip in clips]
    base = build(args, env, runs, loras, texts, sampling)
    own_folder(args.out)
    mine = list(range(env.rank, len(clips), env.world))
    make_clips(args, env, base, sampling, clips, mine, maps, style, tracks, near)
    scores = {}  # by the clip's number; of the files, as one would look at them
    if reward:
        files = [Path(args.out, clips[j].file) for j in mine]
        rows = score_files(reward, env.device, files, [clips[j].prompt for j in mine])
        scores = dict(gather_rows(list(zip(mine, rows)), env))
    meet()
    if env.main:
        report(args, row, base, sampling, clips, scores, tracks)


# ---- what to make

def read_runs(args):
    """Every --ckpt -> [(path, tensors, meta)]; several must be adapters that go together
    (DreamVideo)."""
    runs = [(text, *load_checkpoint(run_file(text))) for text in args.ckpt]
    owner = {}
    for text, tensors, meta in runs:
        if args.base and args.base != meta["base"]:
            raise UserError(f"--ckpt {text}: was trained on base {meta['base']}, not {args.base}")
        if meta["base"] != runs[0][2]["base"]:
            raise UserError(f"--ckpt {text}: was trained on base {meta['base']}, {runs[0][0]} on "
                            f"{runs[0][2]['base']}; they cannot be joined")
        if len(runs) > 1 and meta["method"] != "dreamvideo":
            raise UserError(f"--ckpt {text}: a run of {meta['method']}; only DreamVideo's can be "
                            "joined")
        if meta.get("init") != runs[0][2].get("init"):
            raise UserError(f"--ckpt {text}: started from another --init than {runs[0][0]}; they "
                            "cannot be joined")
        twice = [k for k in tensors if k in owner and not k.startswith(LEARNED)]
        if twice:
            raise UserError(f"--ckpt {text}: trained the same as {owner[twice[0]]} ({twice[0]}); "
                            "give one subject and one motion")
        owner |= dict.fromkeys(tensors, text)
    return runs


def size_asked(args, name, row) -> dict:
    """Frames, height and width that follow from other flags: Open-Sora's --size by name, and the
    shape of --image for Wan."""
    if args.size:
        return named_size(args, row)
    if args.image and isinstance(row.net, WanConfig) and not (args.height or args.width):
        picture = open_image(args.image)
        return dict(zip(("height", "width"),
                        size_for_image(name, picture.height, picture.width)))
    return {}


def named_size(args, row) -> dict:
    """Open-Sora's --size by name -> frames, height and width, where these flags are not given."""
    if not isinstance(row.net, STDiT3Config):
        raise UserError("--size: only Open-Sora's sizes have names; give --frames, --height and "
                        "--width")
    names = args.size.split(",")
    if len(names) > 3:
        raise UserError(f"--size {args.size}: more than length,resolution,aspect, such as "
                        "4s,240p,9:16")
    size = dict(zip(("frames", "height", "width"), opensora_size(*names)))
    return {k: v for k, v in size.items() if vars(args)[k] is None}


def check_conditions(args, row, sampling):
    """Raise UserError, before loading anything, for inputs that the base cannot use or lacks."""
    check_files(args, row)
    if args.subject_below is not None and not row.unet.adapter_image_dim:
        raise UserError("--subject-below: this base has no adapters of a subject")
    if args.judge and not row.tiny:
        raise UserError("--judge: only clips of the tiny world can be judged; give --prompt or "
                        "--prompts")
    if args.continuations and (not row.first_frame or row.tracks):
        raise UserError("--continue: only a base that makes video from an image alone goes on from "
                        "a frame")
    if row.takes_first_frame and args.judge and args.image:
        raise UserError("--judge: chooses what its clips start from; leave --image out")
    if row.first_frame and not args.image and not args.prompts and not args.judge:
        raise UserError("image to video: give --image FILE, or --prompts of image|||caption lines")
    if args.track_strength is not None and not row.tracks:
        raise UserError("--track-strength: this base has no such condition")
    if row.tracks and not args.tracks:
        raise UserError("this base follows tracks: give the tracking video with --tracks")
    if row.unet.super_resolution and not args.video:
        raise UserError("super-resolution: give the clip, or a folder of clips, with --video")
    if bool(args.inverse_noise) != bool(args.video and row.unet.adapter_image_dim):
        raise UserError("--inverse-noise and --video belong together (DreamVideo): how much of the "
                        "inverted clip to start from")
    if args.then:
        if not base_row(args.then).unet.super_resolution or row.unet.super_resolution:
            raise UserError(f"--then {args.then}: for a base that enlarges clips, sr600, after one "
                            "that does not")
        public_files(args.then, base_row(args.then), args.then_weights)  # are they there?
    told = args.prompt is not None or args.prompts or args.judge
    if not (told or row.unet.super_resolution):
        raise UserError("give one of --prompt TEXT, --prompts FILE, --judge N (tiny)")
    if row.unet.text_resampler and sampling.frames != row.sample.frames:
        raise UserError(f"--frames {sampling.frames}: HiGen makes clips of {row.sample.frames} "
                        "frames")


def check_files(args, row):
    """Files that the base can read are there, and those that belong together are given together."""
    takes = {"image"} if row.takes_first_frame else set()
    takes |= {"tracks"} if row.tracks else set()
    takes |= {"video"} if row.unet.super_resolution else set()
    takes |= {"appearance_image", "video"} if row.unet.adapter_image_dim else set()
    if row.unet.maps:
        takes |= {"image", "video", "mask", "depth", "midas", "sketch", "motion_vectors",
                  "style_image", "follow", "flow_weights"}
    for flag in FILE_FLAGS:
        value, option = vars(args)[flag], f"--{flag.replace('_', '-')}"
        if value and flag not in takes:
            known = ", ".join(f"--{f.replace('_', '-')}" for f in sorted(takes)) or "words alone"
            raise UserError(f"{option}: this base has no such condition; it takes {known}")
        if value and not os.path.exists(value):
            raise UserError(f"{option} {value}: no such file")
    if args.learned and not os.path.exists(args.learned):
        raise UserError(f"--learned {args.learned}: no such file, nor a run's folder")
    if args.learned and not row.tiny and not isinstance(row.text, CLIPConfig):
        raise UserError("--learned: this base's text encoder knows no learned words")
    if bool(args.mask) != bool(args.video) and row.unet.maps:
        raise UserError("--mask and --video belong together: the part of the video that is hidden")
    take = args.take or ()
    if args.midas and not args.depth and "depth" not in take:
        raise UserError("--midas: give the video whose depth it is to estimate with --depth")
    if bool(args.follow) != bool(args.take):
        raise UserError("--follow VIDEO and --take belong together: what to take of it, "
                        + ", ".join(TAKE))
    for name in take:
        if name not in row.unet.maps and not (name == "style" and row.unet.style_image):
            raise UserError(f"--take {name}: this base has no such condition; it has "
                            f"{', '.join(row.unet.maps)}")
    if "depth" in take and not args.midas and not args.depth_model:
        raise UserError("--take depth: give the network that sees it, --depth-model NAME or "
                        "--midas FILE")


def read_clips(args, row, sampling):
    """-> [Clip] to make, all their files readable."""
    if args.judge:
        rows = [(image, prompt, None) for image, prompt in judged_pairs(args, row, sampling)]
    elif row.unet.super_resolution:
        rows = [(file, prompt or "", None) for file, prompt
                in clips_with_prompts(args.video, args.prompts, args.prompt)]
        for file, _, _ in rows:
            video_info(file)
    else:
        image = args.image if row.takes_first_frame else args.appearance_image
        rows = [(image, args.prompt, None)]
        if args.prompt is None:
            rows = read_image_rows(args.prompts, row, image, args.data_root)
        for picture in dict.fromkeys(picture for picture, _, _ in rows if picture):
            w, h = open_image(picture).size
            if row.takes_first_frame and not similar((h, w), sampling.size[1:]):
                warn(f"{picture}: {w}x{h} pixels are cropped to the shape of {sampling.width}x"
                     f"{sampling.height}")
    names = file_names([prompt for _, prompt, _ in rows], args.n, args.vbench)
    clips = []
    for i, (source, prompt, seed) in enumerate(rows):
        # a prompt with its own seed is the clip of --prompt PROMPT --seed SEED
        start = f"{args.seed}-{i}" if seed is None else f"{seed}-0"
        clips += [Clip(names[len(clips) + k], prompt, source, f"{start}-{k}")
                  for k in range(args.n)]
    return clips


def judged_pairs(args, row, sampling):
    """--judge N -> [(held-out first frame or None, random caption)]."""
    if row.first_frame:
        clips, prompts = tiny_pairs(args.seed, args.judge, sampling.frames, args.motion)
        return [(frame_picture(clip[:, 0]), prompt) for clip, prompt in zip(clips, prompts)]
    captions, rng = tiny_captions(), np.random.default_rng(args.seed)
    captions = [c for c in captions if args.motion in (None, parse(c)["motion"])]
    if not captions:
        raise UserError(f"--motion {args.motion}: base {args.base} has no such motion among its "
                        "captions")
    return [(None, captions[i]) for i in rng.integers(len(captions), size=args.judge)]


def file_names(prompts, n, vbench=False):
    """Names of the clips, n per prompt: 0000.mp4 ..., or VBench's PROMPT-0.mp4 ... PROMPT-4.mp4."""
    if not vbench:
        return [f"{j:04d}.mp4" for j in range(len(prompts) * n)]
    for prompt in prompts:
        if "/" in prompt or len(prompt.encode()) > 240:
            raise UserError(f"--vbench: {prompt[:60]!r} cannot be a file name (a / in it, or too "
                            "long)")
        if prompts.count(prompt) > 1:
            raise UserError(f"--vbench: the prompt {prompt[:60]!r} occurs twice; give --n instead")
    return [f"{prompt}-{k}.mp4" for prompt in prompts for k in range(n)]


# ---- VideoComposer's maps

def read_maps(args, sampling):
    """VideoComposer's maps from ready files -> {name: (1,c,f,h,w)}.

    depth: MiDaS's inverse depth / 20 in 0..10 (.npy; a video counts as 0..1), but with --midas a
    video in [-1,1], whose depth is estimated later; sketch: 0..1 (a picture is the single sketch
    of the first frame); motion: .npy (2,f,h,w); image: the first frame, in 0..1; video and mask
    (1: hidden).
    """
    f, size, maps = sampling.frames, (sampling.height, sampling.width), {}
    if args.depth and args.midas:  # squeezed to the clip's size, not cropped: as published
        video = read_video(args.depth, f)[0].transpose(0, 1)
        maps["depth"] = F.interpolate(video, size, mode="bilinear", antialias=True).transpose(0, 1)
    elif args.depth:
        maps["depth"] = read_map(args.depth, f, size, 1)
    if args.sketch:
        sketch = read_map(args.sketch, None, size, 1)
        if sketch.shape[1] > 1:
            maps["sketch"] = read_map(args.sketch, f, size, 1)
        else:
            maps["single_sketch"] = sketch.expand(-1, f, -1, -1)
    if args.motion_vectors:
        maps["motion"] = read_map(args.motion_vectors, f, size, 2)
    if args.image:
        maps["local_image"] = read_map(args.image, None, size, 3).expand(-1, f, -1, -1)
    if args.mask:
        video, hidden = read_map(args.video, f, size, 3), read_map(args.mask, None, size, 1).round()
        shown = 1 - hidden.expand(-1, f, -1, -1)
        maps["masked"] = torch.cat([(video * 2 - 1) * shown, shown])
    return {name: value[None] for name, value in maps.items()}


def followed(args, row, sampling, device, style=None):
    """--follow VIDEO -> ({name: (1,c,f,h,w)}, the maps of --take; the style picture, its first
    frame).

    3 frames a second as published, or as many as make a clip; squeezed to the clip's size, not
    cropped.
    """
    count, rate, _ = video_info(args.follow)
    stride = max(1, min(round(rate / 3), (count - 1) // max(sampling.frames - 1, 1)))
    video, size = read_video(args.follow, sampling.frames, stride=stride)[0], sampling.size[1:]
    style = frame_picture(video[:, 0]) if "style" in args.take else style
    video = F.interpolate(video.transpose(0, 1), size, mode="bilinear", antialias=True)
    video = video.transpose(0, 1)

    def depth(video):
        return depth_estimator(args.midas or args.depth_model, device, inverse=True)(video)[None]
    flow = lucas_kanade if row.tiny else None
    flow = raft("large", args.flow_weights, device) if args.flow_weights else flow
    maps = video_maps(video, args.take, depth, flow, block=1 if row.tiny else 16)
    if "motion" in args.take and not flow:
        maps["motion"] = codec_motion(video)
    return {name: value[None] for name, value in maps.items()}, style


def fitting_size(base, sampling, args, shape):
    """Size (h, w) to which SR600 enlarges a clip of shape (h, w): that of --height and --width, or
    one of as many pixels in the clip's own shape, as near as the network can."""
    size = sampling.height, sampling.width
    if args.height or args.width or similar(shape, size):
        return size
    tall = (shape[0] / shape[1]) ** 0.5
    sides = (size[0] * size[1]) ** 0.5 * tall, (size[0] * size[1]) ** 0.5 / tall
    return tuple(nearest_side(base.name, base.row, side, ideal)
                 for side, ideal in zip(("height", "width"), sides))


def say_changes(args, row, sampling):
    """Print what a result does not keep of the clips that it is made from: frames, rate, shape."""
    size = sampling.height, sampling.width
    for flag in ("tracks", "video", "depth", "sketch", "follow"):
        path = vars(args)[flag]
        if not path or row.unet.super_resolution or not is_clip(path):
            continue
        count, fps, shape = video_info(path)
        changes = [f"{sampling.frames} of its {count} frames are used"] * (count != sampling.frames)
        if abs(fps - sampling.save_fps) > 0.01 * fps:
            changes.append(f"its {fps:.4g} fps become {sampling.save_fps} (see --save-fps)")
        if not similar(shape, size):
            changes.append(f"its {shape[1]}x{shape[0]} pixels are fitted to {size[1]}x{size[0]}")
        if changes:
            print(f"--{flag} {path}: {', '.join(changes)}", flush=True)


def similar(shape, size):
    """Do (h, w) and (h, w) differ by less than 2 % in shape? So do 256x448 and 720x1280: as
    published, the one is squeezed into the other."""
    return abs(shape[0] * size[1] / (shape[1] * size[0]) - 1) < 0.02


def windows(frames):
    """[(first, end)] of WINDOW frames that cover a clip; the last one overlaps the one before."""
    starts = [*range(0, frames - WINDOW, WINDOW), max(0, frames - WINDOW)]
    return [(first, min(frames, first + WINDOW)) for first in starts]


def middle(video, size):
    """(3,f,h,w) -> its middle in the shape of size (h, w); all of it if that is nearly its own."""
    h, w = video.shape[2:]
    if similar((h, w), size):
        return video
    rows, columns = min(h, round(w * size[0] / size[1])), min(w, round(h * size[1] / size[0]))
    top, left = (h - rows) // 2, (w - columns) // 2
    return video[:, :, top:top + rows, left:left + columns]


def enlarge_clip(args, env, base, sampling, clip, bar):
    """SR600 on a whole clip -> (its frames, enlarged (3,f,H,W), and their rate)."""
    video, fps = read_video(clip.source)
    n, h, w = video.shape[1:]
    size, parts, made = fitting_size(base, sampling, args, (h, w)), windows(n), []
    video = middle(video, size)
    kept, many = video.shape[2:], len(parts) > 1
    print(f"{clip.source}: {n} frames at {fps:.4g} fps, {w}x{h}",
          *([f"cropped to {kept[1]}x{kept[0]}"] if kept != (h, w) else []), end=" ")
    print(f"-> {size[1]}x{size[0]}", *([f"in {len(parts)} windows of {WINDOW} frames, the last "
          f"overlaps by {parts[-2][1] - parts[-1][0]}"] if many else []), flush=True)
    double = 2 if n <= WINDOW // 2 else 1  # as published: the network was trained on WINDOW frames
    for first, end in parts:
        part = F.interpolate(video[:, first:end].transpose(0, 1), size, mode="bilinear")
        part = part.transpose(0, 1).repeat_interleave(double, dim=1)
        own = replace(sampling, frames=part.shape[1], height=size[0], width=size[1])
        larger = generate_from(
            base, env, [clip.prompt], [None], [clip.seed], own, batch=1, progress=bar,
            sequential=args.sequential, chunk=args.decode_chunk, video=part[None])[0, :, ::double]
        made.append(larger[:, sum(x.shape[1] for x in made) - first:])  # the new frames
    return torch.cat(made, dim=1), fps


# ---- making clips

def build(args, env, runs, loras, texts, sampling):
    """The base with its runs, words and LoRA files put in, on its device; the prompts are
    encoded."""
    base = None
    for text, tensors, meta in runs:
        base = load_run(text, tensors, meta, args.weights, base)
    if base is None:
        base = load_base(args.base, args.weights, "cpu", torch.float32 if loras else env.dtype)
    if args.learned:
        base.learn(read_words(base, args.learned), f"--learned {args.learned}")
    for path, scale in loras:
        for net in experts(base, path):
            merge_public_lora(net, path, scale)
    base.freeze(env.dtype)
    if args.frozen == "int8":
        base.freeze_int8()
    # one after the other on the GPU: T5 and a 5B network together would not fit on 24 GB
    for encoder in filter(None, (base.text_encoder, base.motion_encoder)):
        encoder.to(env.device)
    base.learned = {token: vectors.to(env.device) for token, vectors in base.learned.items()}
    base.remember([*texts, sampling.negative, *([""] if args.inverse_noise else [])], env)
    if args.offload:
        offload(base, env.device)
    else:
        base.to(env.device)
    for net in filter(None, (base.net, base.low_net)):
        compile_blocks(net, args, env.device)
    return base


def experts(base, path):
    """The networks that a LoRA file is for: of Wan2.2's two, the one that its name speaks of."""
    name = Path(path).name.lower()
    if not base.row.two_experts or "high" in name:
        return [base.net]
    return [base.low_net] if "low" in name else [base.net, base.low_net]


def make_clips(args, env, base, sampling, clips, mine, maps, style, tracks, near):
    """Write the clips whose numbers are in `mine`. tracks, near: videos (3,f,h,w) or None."""
    out, start, options = Path(args.out), time.time(), {}
    with env.autocast(), torch.no_grad():
        if near is not None:
            options["inverted"] = invert_clip(base, env, near, sampling.sample_steps)
        if tracks is not None:
            maps = maps | encode_tracks(base, env, tracks)
    if args.track_strength is not None:
        maps = maps | {"track_strength": torch.tensor([args.track_strength])}
    bar = env.main and env.device.type == "cuda"
    batch = 1 if base.row.unet.super_resolution else args.batch
    for i in range(0, len(mine), batch):
        part, fps = [clips[j] for j in mine[i:i + batch]], sampling.save_fps
        if base.row.unet.super_resolution:
            video, fps = enlarge_clip(args, env, base, sampling, part[0], bar)
            videos, fps = [video], args.save_fps or fps
        else:
            videos = generate_from(
                base, env, [clip.prompt for clip in part], [clip.source for clip in part],
                [clip.seed for clip in part], sampling, batch, args.continuations, maps, style,
                progress=bar, sequential=args.sequential, chunk=args.decode_chunk, **options)
        for clip, video in zip(part, videos):
            write_video(out / clip.file, video, fps)
            if tracks is not None:
                side = beside(clip, tracks, video)
                write_video(out / "side" / clip.file, side, fps)
            if isinstance(clip.source, Image.Image):
                write_atomic(first_frame_file(args, clip), clip.source.save)
        if env.main:
            done = min(len(clips), (i + len(part)) * env.world)
            print(f"{done}/{len(clips)} clips, {time.time() - start:.1f} s", flush=True)


def first_frame_file(args, clip):
    """Where the first frame that --judge drew for a clip is kept."""
    return Path(args.out, "first", clip.file).with_suffix(".png")


def beside(clip, tracks, video):
    """First frame, tracks and result side by side, (3,f,h,3w): what went in and what came out."""
    still = video[:, :1]
    if clip.source:
        picture = clip.source if isinstance(clip.source, Image.Image) else open_image(clip.source)
        still = image_tensor(center_crop_wide(picture, tuple(video.shape[2:])))[:, None]
    return torch.cat([still.expand_as(video), tracks, video], dim=3)


def report(args, row, base, sampling, clips, scores, tracks):
    """index.jsonl, sheet.png, the judge's verdict and the table of scores."""
    out, settings = Path(args.out), sampling.metadata()
    adapters = args.ckpt + ([args.learned] if args.learned else []) + args.lora
    given = {flag: vars(args)[flag] for flag in FILE_FLAGS if vars(args)[flag]}
    own = "appearance_image" if row.unet.adapter_image_dim else "video"
    own = "image" if row.takes_first_frame else own  # what a clip's source is called
    rows = []
    for j, clip in enumerate(clips):
        line = dict(file=clip.file, prompt=clip.prompt, seed=clip.seed, base=base.name,
                    adapters=adapters, **given)
        if clip.source:
            drawn = isinstance(clip.source, Image.Image)
            line[own] = str(first_frame_file(args, clip) if drawn else clip.source)
        line |= settings | ({"continue": args.continuations} if args.continuations else {})
        if row.unet.super_resolution:  # each clip keeps its own
            frames, fps, (h, w) = video_info(out / clip.file)
            line |= dict(frames=frames, save_fps=fps, height=h, width=w)
        rows.append(line | ({"scores": scores[j]} if scores else {}))
    write_lines(out / "index.jsonl", rows)

    shown = [read_video(out / clip.file)[0] for clip in clips[:32]]
    headers = ["tracks", "result"] if tracks is not None else None
    contact_sheet([[tracks, video] for video in shown] if headers else shown, out / "sheet.png",
                  [clip.prompt for clip in clips[:32]], headers=headers)
    if args.judge:  # on the files, as one would look at them
        videos = [read_video(out / clip.file)[0] for clip in clips]
        verdict = judge_captions([video[:, :sampling.frames] for video in videos],
                                 [clip.prompt for clip in clips])
        if row.first_frame:
            verdict |= first_frame_kept(videos, [image_tensor(clip.source) for clip in clips])
        print("judge:", " ".join(f"{k} {v:.3f}" for k, v in verdict.items()))
        text = json.dumps(dict(clips=len(clips), **settings, **verdict), indent=1)
        write_atomic(out / "judge.json", lambda p: p.write_text(text, "utf-8"))
    if scores:
        print_scores([scores[j] for j in range(len(clips))])
    print(f"{out}: {len(clips)} clips, sheet.png, index.jsonl")


if __name__ == "__main__":
    run_command(main, "--batch 1", "--sequential", "--decode-chunk 1", "--dtype bf16",
                "--offload", "--frozen int8", "fewer --frames", "a smaller --height and --width")
