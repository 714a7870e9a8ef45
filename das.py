"""Diffusion as Shader: video that follows 3-D tracks (Gu et al., arXiv 2501.03847), on
top of CogVideoX.

    L = E_{x0, eps, t} || net(x_t, t, text, image, tracks) - v ||^2
    x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps,   v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0

(The original's loss, |x0_pred - x0|^2 / (1 - ab_t), is the same.) A tracking video shows
where each point of the first frame is at any time, coloured by its position in that frame
(tracks.py). Copies of the base's first blocks read the latents of the tracking video.
After each block a linear layer, zero at first, adds its copy's answer to the tokens of
the frozen base, so at step 0 the network is exactly the base. Latents of the first frame
and of the first tracking frame are further channels of the two inputs.

    python das.py --base tiny-cogvideox                    # 2 CPU cores, 20 minutes
    python das.py --make-tracks clips.csv --out tracked    # clips -> a data set with tracks
    python das.py --make-tracks first.png --depth d.npy --camera "rot y 20"
    python das.py --base cogvideox-5b-i2v --weights W --data tracked --batch 1 --accum 64
    # as published, 64 clips per step like the line above
    torchrun --nproc_per_node=8 das.py --base cogvideox-5b-i2v --weights W --data D --parallel fsdp
    python das.py ... --resume                             # continue, bit for bit
    python sample.py --ckpt out/das --image first.png --tracks tracks.mp4 --prompt "a dog"

--base das starts from the public branch, or from zero if --weights holds
CogVideoX-5B-I2V's files. cogvideox-2b and -5b are the text-to-video variant, without the
two first frames. `das.py --make-tracks SOURCE --help` lists the options that make tracks.

Writes to --out: ckpt.safetensors (the branch), log.jsonl, curve.png, eval.jsonl (tiny:
how far the object is from its track, on held-out clips), before.png and after.png with
clips, tracks and results side by side.

Differences from the original code (the others: docs/differences/das.md)
 - Trained weights are kept in fp32 (original: bf16).
 - Clips are shuffled anew in each epoch (original: a fixed order) and cropped, not
   squeezed.
 - Noise on the first frame, and whether it is dropped, is drawn per clip, not per batch.
 - Tracking videos are in [-1,1] in sampling, too (original demo: [0,1]).
"""
from common import Parser, Run, run_command, trained  # first: for signals
import torch

import pipeline
import tinyworld
import tracks
from bases import choose_sampling, start_base
from data import Buckets, read_batches
from diffusion import diffusion_loss, randn
from dit import TRACK_BRANCH
from models import parallelize

# The published script, train_DaS.sh: 8 GPUs, so 64 clips per step.
PAPER = dict(
    base="das", out="out/das", tracking_blocks=18, drop_image=0.05, steps=2000, batch=2, accum=4,
    lr=1e-4, lr_schedule="cosine", warmup=100, betas=(0.9, 0.95), wd=1e-3, eval_n=2)
TINY = dict(
    tracking_blocks=6, steps=500, batch=16, accum=1, lr=1e-3, warmup=20, betas=(0.9, 0.99),
    wd=0.01, ema=0.99, cache_latents=True, workers=0, grad_ckpt=False, log_every=20, eval_n=48)
PRESETS = {"tiny-cogvideox": TINY}
TINY_CLIPS = 2048  # fixed ones, to encode once


def get_args(argv=None):
    if tracks.asked_for(argv):
        return tracks.get_args(argv)
    p = Parser(__doc__)
    p.options("base")
    p.add_argument("--tracking-blocks", type=p.COUNT,
                   help="number of the base's first blocks that get a copy which reads the tracks")
    p.add_argument("--data",
                   help="clips with tracking videos: a folder with prompt.txt, videos.txt and "
                        "trackings.txt, or a .csv or .jsonl with video, tracking and caption "
                        "(tiny-cogvideox makes its own)")
    p.add_argument("--eval-data", metavar="DATA",
                   help="clips to evaluate on, in the form of --data (default: the last --eval-n "
                        "of --data, which are then not trained on)")
    p.add_argument("--eval-n", type=p.COUNT,
                   help="number of clips to evaluate on (tiny: of each motion)")
    p.options("data", without=("--data", "--read-fps", "--drop-text"))
    p.add_argument("--drop-image", type=p.SHARE,
                   help="probability of dropping the image condition")
    p.options("pixels sampling", without=("--fps", "--eta"))
    p.options("optimisation ema machine run")
    args = p.parse(argv, PAPER, PRESETS)
    if args.eval_data and not args.data:
        p.error("--eval-data: goes with --data")
    return args


# ---- the method

def train_branch(net, dtype):
    """Only the branch that reads the tracks trains, in fp32; the base is frozen, in
    `dtype`."""
    for name, part in net.named_children():
        branch = name in TRACK_BRANCH
        part.requires_grad_(branch).to(torch.float32 if branch else dtype)


def branch_loss(net, schedule, x0, noise, t, text, cond):
    """|net(x_t, t, text, cond) - v|^2, (b,). cond: latents first_frame and first_track
    (b,c,1,h,w), tracks (b,c,f,h,w)."""
    return diffusion_loss(lambda x, t: net(x, t, text, **cond), schedule, x0, noise, t)


def das_loss(net, base, latents, picture, captions, generators, drop_image):
    """The loss of clips (b,).

    latents: {"video", "tracks": (b,c,f,h,w), "first_track": (b,c,1,h,w)}; picture
    (b,3,h,w): the first frames in [-1,1]; generators: one per clip.
    """
    x0 = latents["video"]
    uniform = torch.stack([torch.rand(2, generator=g) for g in generators])
    t = base.schedule.steps(uniform[:, 0]).to(x0.device)
    noise = randn(x0.shape, generators).to(x0.device)
    cond = {"tracks": latents["tracks"]}
    if base.row.first_frame:
        # both first frames are dropped together, the tracks never
        keep = (uniform[:, 1] >= drop_image).float().to(x0.device)
        cond["first_frame"] = pipeline.noised_first_frame(
            base, picture, keep, x0.shape, generators)
        cond["first_track"] = latents["first_track"] * keep.view(-1, 1, 1, 1, 1)
    text = base.encode_text(captions)
    return branch_loss(net, base.schedule, x0, noise, t, text, cond)


def main(argv=None):
    args = get_args(argv)
    if "make_tracks" in args:
        return tracks.make(args)
    sampling = choose_sampling(args.base, args, method="das")
    clips, eval_clips = read_data(args, sampling)
    run = Run(args, "das")

    # a frozen base, a branch that starts from copies of its blocks. dtype=None: as in the
    # files, so that the weights that train reach fp32 without a detour through fp16
    base = start_base(run, dtype=None, tracks=args.tracking_blocks)
    if args.data:
        captions = [row[-1] for row in clips.rows]
        base.tokenize([*captions, sampling.negative])  # refuses unknown words on tiny
    base.freeze(run.dtype, but=["net"])
    train_branch(base.net, run.dtype)
    base.net.grad_ckpt = args.grad_ckpt
    base.net.train()
    net = parallelize(base.net, args, run.device)
    params = trained({"": base.net})
    opt = run.adamw(params.values())
    meta = dict(tracking_blocks=args.tracking_blocks, sample=sampling.metadata())
    run.attach(opt, params, [net], base.parts(), meta, ema_decay=args.ema)
    if args.cache_latents:
        about = {} if args.data else vars(clips)
        clips = pipeline.cache_latents(
            run, clips, lambda batch: encode(base, run.env, batch), about)
        texts = [*clips.texts(), *(clip["text"] for clip in eval_clips)]
        base.remember([*texts, sampling.negative], run.env)
    batches = read_batches(clips, run.numbers, args.seed, args.workers)

    if not run.resumed:
        evaluate(run, base, sampling, eval_clips, "before")
    for _ in run.steps():
        for numbers in run.micro_steps():
            batch, generators = next(batches), run.generators(numbers)
            latents, picture = draw_batch(base, run.env, batch, generators)
            with run.forward():
                loss = das_loss(
                    net, base, latents, picture, batch["text"], generators, args.drop_image)
            run.backward(loss)
        run.update()
        if run.preview_due:
            evaluate(run, base, sampling, eval_clips, f"step-{run.done}")
    if not run.stopped:
        evaluate(run, base, sampling, eval_clips, "after")
    run.finish("loss", "grad")


# ---- data and latents

def read_data(args, sampling):
    """-> (the training data set, Buckets of several sizes; the clips to evaluate on).

    The latter: {"video", "tracks": (3,f,h,w) in [-1,1], "text", "motion", "scene": the
    truth on tiny, else None}.
    """
    sizes = pipeline.bucket_sizes(args, sampling.size)
    if not args.data and args.base in PRESETS:
        clips = tinyworld.TinyTracks(TINY_CLIPS, sampling.frames, args.seed)
        return clips, tinyworld.held_out_tracks(args.eval_n, sampling.frames, args.seed)
    rule, root, others = pipeline.captions_rule(args), args.data_root, None
    parts = tracks.in_buckets(args.data, sizes, args.seed, root, rule)
    if args.eval_data:
        others = tracks.in_buckets(args.eval_data, sizes, root=root, captions=rule)
    parts, held_out = tracks.hold_out(parts, sampling.size, args.eval_n, others)
    clips = [held_out[i, i] for i in range(min(args.eval_n, len(held_out)))]
    return Buckets(parts), [clip | {"motion": "clips", "scene": None} for clip in clips]


def encode(base, env, batch):
    """Clips and tracking videos (b,3,f,h,w) -> {"PART.mean", "PART.std"} of the latents,
    on the CPU.

    And "picture" (b,3,h,w), the first frames: their noise is new each time.
    """
    parts = {"video": batch["video"], "tracks": batch["tracks"]}
    if base.row.first_frame:
        parts["first_track"] = batch["tracks"][:, :, :1]
    encoded = {"picture": batch["video"][:, :, 0]}
    for name, video in parts.items():
        encoded |= {f"{name}.{k}": v for k, v in pipeline.encode_clips(base, env, video).items()}
    return encoded


def draw_batch(base, env, batch, generators):
    """A batch, encoded or not -> ({part: scaled latents}, pictures (b,3,h,w)), see
    das_loss()."""
    encoded = batch if "picture" in batch else encode(base, env, batch)
    names = [k.removesuffix(".mean") for k in encoded if k.endswith(".mean")]
    latents = {name: pipeline.draw_latents(base, env, encoded, generators, f"{name}.")
               for name in names}
    return latents, encoded["picture"].float().to(env.device)


# ---- evaluation

@torch.no_grad()
def evaluate(run, base, sampling, clips, name):
    """The held-out clips anew, from first frame, caption and tracks, always from the
    same noise -> NAME.png, NAME/*.mp4.

    Tiny: also a line of eval.jsonl, for each motion: "position", the object's mean distance from
    where it should be, in frame widths; "shape", how often it is right; "misfit" of its outline.
    """
    prompts, images = [clip["text"] for clip in clips], None
    if base.row.first_frame:
        images = [pipeline.frame_picture(clip["video"][:, 0]) for clip in clips]
    seeds = [f"eval-{i}" for i in range(len(clips))]
    with run.averaged(base.net):
        with run.forward():
            encoded = [pipeline.encode_tracks(base, run.env, clip["tracks"]) for clip in clips]
        maps = {k: torch.cat([latents[k] for latents in encoded]) for k in encoded[0]}
        videos = pipeline.generate_split(
            base, run.env, prompts, seeds, sampling, run.args.batch, images, maps=maps)
    if not run.main:
        return
    motions = [clip["motion"] for clip in clips]
    shown = [i for i, motion in enumerate(motions) if motions[:i].count(motion) < 4]
    sheet = [[clips[i]["video"], clips[i]["tracks"], videos[i]] for i in shown]
    captions = [f"{prompts[i]} ({motions[i]})" for i in shown]
    row = tinyworld.judge_tracked(videos, clips) if clips[0]["scene"] else None
    side_by_side = [torch.cat(strip, dim=3) for strip in sheet]
    pipeline.show(run, name, side_by_side, captions, sampling.save_fps, row, sheet,
                  headers=["clip", "tracks", "result"])


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp",
                "fewer --frames")
