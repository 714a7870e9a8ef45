"""Image to video by plain denoising: I2VGen-XL (Zhang et al., arXiv 2311.04145), whose
trainer was never released, CogVideoX-I2V (arXiv 2408.06072) and Wan (arXiv 2503.20314).

    L = E_{x0, text, eps, t} || net(x_t, t, text, image) - v ||^2
    x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps
    v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0                        (arXiv 2202.00512)
    flow matching (Wan): x_t = (1 - sigma) x0 + sigma eps, v = eps - x0

The image is the clip's own first frame. The networks receive it as follows:

    I2VGen-XL   its latent, as channels beside x_t and as 64 tokens beside the words, and
                4 tokens of its CLIP embedding
    CogVideoX   the latent of its pixels with a little noise, log sigma ~ N(-3, 0.5), as
                channels beside x_t
    Wan-I2V     a mask, its latents and those of grey frames behind it, as channels beside
                x_t, and the tokens of its CLIP
    Wan-TI2V    its latent as the first frame of x_t, with a step of 0; it has no loss

(CogVideoX's loss, |x0_pred - x0|^2 / (1 - ab_t), is L.) Some captions and some images are
dropped, so that sampling can use guidance; some steps train on the first frames alone.

    python i2vgen.py --base tiny-i2v         # learns to zigzag, forgets nothing; 2 CPU cores
    python i2vgen.py --base tiny-i2v --scratch --out out/tiny-i2v    # how it was made
    python i2vgen.py --weights W --data clips.csv --lr 1e-4          # LoRA, one GPU
    torchrun --nproc_per_node=4 i2vgen.py --weights W --data clips.csv --rank 0
    python i2vgen.py --base wan2.1-i2v-14b-480p --weights W --data clips.csv
    python i2vgen.py ... --resume                      # continue, bit for bit
    python sample.py --ckpt out/i2vgen --image first.png --prompt "a red circle zigzagging"

With ModelScope's files as --weights and --rank 0, I2VGen-XL starts from them, and the
layers that read the image are new.

Writes to --out: ckpt.safetensors (averaged weights with --ema), log.jsonl, curve.png,
before.png, step-N.png and after.png with their clips: held-out first frames and captions,
always from the same noise; and eval.jsonl: how well the first frame is kept (PSNR in dB),
and on tiny bases the judge's verdict.

Differences from the original code (the others: docs/differences/i2vgen.md)
 - I2VGen-XL's configuration names a trainer that is not in the code. Learning rate, offset
   noise and moving average are the configuration's. It drops nothing, but its sampler's
   unconditional branch must have been trained: --drop-text and --drop-image 0.1.
"""
from common import Parser, Run, UserError, run_command, seed_of, trained  # first: for signals
import torch

import data
import pipeline
import tinyworld
from bases import base_row, choose_sampling, start_base
from diffusion import diffusion_loss, offset_noise, randn
from dit import WanConfig
from models import parallelize, seed_dropout

# I2VGen-XL's configuration; LoRA is ours.
PAPER = dict(
    base="i2vgen-xl", out="out/i2vgen", drop_image=0.1, offset_noise=0.1, steps=10000,
    lr=3e-5, warmup=10, ema=0.9999, eval_n=4)
# CogVideo's finetune/. Its other trainer, SAT: --rank 0 --lr 1e-5 --betas 0.9 0.95 --wd 1e-4
# --clip 0.1 --drop-text 0.1
COGVIDEOX = dict(
    rank=128, alpha=64.0, lr=2e-5, warmup=100, ema=0.0, drop_text=0.0, drop_image=0.05,
    image_share=0.0, offset_noise=0.0, read_fps=8.0)
# DiffSynth-Studio's LoRA. Both branches of Wan's guidance see the image: it is never dropped
WAN = dict(
    rank=32, alpha=32.0, lr=1e-4, lora_targets=["q", "k", "v", "o", "ffn.0", "ffn.2"],
    ema=0.0, drop_text=0.0, drop_image=0.0, image_share=0.0, offset_noise=0.0)
TINY = dict(
    steps=200, batch=16, lr=5e-4, lr_schedule="cosine", warmup=20, betas=(0.9, 0.99), wd=0.01,
    ema=0.99, rank=0, motion="zigzagging", replay=0.5, image_share=0.0, offset_noise=0.0,
    drop_text=0.1, read_fps=None, cache_latents=True, workers=0, grad_ckpt=False, log_every=20,
    eval_n=64)
SCRATCH = TINY | dict(
    steps=1200, batch=64, lr=1.5e-3, warmup=50, ema=0.995, motion=None, preview_every=1000,
    log_every=50)
SEEN = "picture", "first_frame", "image"  # of the first frame, see encode()
TINY_CLIPS = {False: 2048, True: 8192}  # with --scratch or without


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base")
    p.add_argument("--scratch", action="store_true",
                   help="start from random weights (tiny: of the text encoder, too); needs "
                        "--rank 0")
    p.options("data", without=("--read-fps",))
    p.add_argument("--read-fps", type=p.POSITIVE,
                   help="frame rate to read at (default: --fps, or every frame)")
    p.add_argument("--motion", choices=tinyworld.MOTIONS + tinyworld.NEW_MOTIONS,
                   help="tiny bases: the clips' motion")
    p.add_argument("--replay", type=p.SHARE, default=0.0,
                   help="tiny bases: share of clips with motions that the base knows, so that it "
                        "keeps them (on others: list such clips in --data)")
    p.options("images", without=("--images",))
    p.add_argument("--drop-image", type=p.SHARE,
                   help="probability of dropping the image condition")
    p.options("pixels sampling optimisation ema lora")
    p.add_argument("--offset-noise", type=p.UNSIGNED,
                   help="strength of noise that all pixels of a frame share: it teaches brightness")
    p.options("machine evaluation run")
    tiny = SCRATCH if p.parse_known_args(argv)[0].scratch else TINY
    args = p.parse(argv, PAPER, {
        "cogvideox-5b-i2v": COGVIDEOX, "tiny-i2v": tiny, "tiny-cogvideox": COGVIDEOX | tiny,
        "wan2.1-i2v-14b-480p": WAN, "wan2.1-i2v-14b-720p": WAN, "wan2.2-ti2v-5b": WAN})
    if args.scratch and args.rank:
        raise UserError("--scratch: LoRA on random weights cannot learn; add --rank 0")
    if not base_row(args.base).tiny and not args.data:
        raise UserError("--data: give a folder, csv, jsonl or list of clips with captions")
    if not base_row(args.base).tiny and (args.motion or args.replay):
        flag = f"--motion {args.motion}" if args.motion else f"--replay {args.replay:g}"
        raise UserError(f"{flag}: only the tiny world's own clips have motions")
    return args


# ---- the method

def image_condition(base, x0, seen, keep, generators):
    """What the network is told of the first frames, {name: tensor}.

    x0 (b,c,f,h,w): the clips' latents; seen: see encode(); keep (b,): 1, or 0 where the
    image is dropped.
    """
    if isinstance(base.row.net, WanConfig):  # first_frame b c f h w, image b n d; or neither
        cond = {k: v * keep.view(-1, *[1] * (v.ndim - 1)) for k, v in seen.items()}
        return {k: v[:, :, :x0.shape[2]] if v.ndim == 5 else v for k, v in cond.items()}
    picture = seen["picture"]
    if base.row.unet.image_to_video:
        # the embedding alone is dropped, as in the second branch of the published guidance
        embedding = base.image_encoder(picture)[:, None].float()  # b 1 d
        return {"first_frame": x0[:, :, 0], "image": embedding * keep.view(-1, 1, 1)}
    latent = pipeline.noised_first_frame(base, picture, keep, x0.shape, generators)
    return {"first_frame": latent}  # b c 1 h w


def i2v_loss(net, base, sampling, x0, seen, captions, generators, args):
    """The denoising loss of clips (b,).

    x0 (b,c,f,h,w): their latents; seen: see encode(); generators: one per clip.
    """
    uniform = torch.stack([torch.rand(3, generator=g) for g in generators])  # b 3
    for_step, for_text, for_image = uniform.unbind(1)
    t = base.sampling_schedule(sampling).steps(for_step, sampling.size).to(x0.device)
    text = base.encode_text([sampling.negative if u < args.drop_text else caption
                             for caption, u in zip(captions, for_text)])
    keep = (for_image >= args.drop_image).float().to(x0.device)

    # noise that a frame shares: plain noise hardly touches its mean, its brightness
    shared = randn((*x0.shape[:3], 1, 1), generators)
    noise = offset_noise(randn(x0.shape, generators), shared, args.offset_noise)
    cond = image_condition(base, x0, seen, keep, generators)
    cond |= pipeline.frame_rate(sampling.fps, len(x0), x0.device)

    given = keep if base.row.keeps_first and x0.shape[2] > 1 else None

    def predict(x_t, t):
        return net(x_t, t, text, **cond)
    return diffusion_loss(predict, base.schedule, x0, noise.to(x0.device), t, given=given)


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="i2vgen")
    read_fps = args.read_fps or sampling.fps
    if args.data:
        sizes = pipeline.bucket_sizes(args, sampling.size)
        clips = pipeline.open_data(args, sizes, read_fps)
    else:
        clips = tinyworld.TinyWorld(TINY_CLIPS[args.scratch], sampling.frames, args.seed,
                                    args.motion, replay=args.replay)
    rows, held_out = clips.rows if args.data else [], held_out_pairs(args, sampling, clips)
    run = Run(args, "i2vgen")

    dtype = run.dtype if args.rank else torch.float32  # what trains is kept in fp32
    base = start_base(run, dtype, args.scratch, start=not args.rank, frozen=args.frozen)
    texts = [sampling.negative, *(caption for _, caption in held_out)]
    if base.row.tiny:  # refuses words that the tiny world does not know
        base.tokenize([*texts, *(caption for _, _, caption in rows)])
    nets = train(args, run, base)
    net, params = nets[""], trained(nets)
    opt = run.adamw(params.values())
    meta = dict(sample=sampling.metadata())
    run.attach(opt, params, list(nets.values()), base.parts(), meta, ema_decay=args.ema)
    if args.cache_latents:
        source = seed_of(rows or (args.motion, args.replay))
        about = dict(size=sampling.size, fps=read_fps, rows=source)
        clips = pipeline.cache_latents(
            run, clips, lambda b: encode(base, run.env, sampling, b["video"]), about)
        if not trains_encoders(args):
            base.remember([*clips.texts(), *texts], run.env)  # then the text tower goes
    batches = data.read_batches(clips, run.numbers, args.seed, args.workers)

    if not run.resumed and not args.scratch:
        evaluate(run, base, sampling, held_out, "before")
    for step in run.steps():
        # all clips of a step are videos, or all are images
        draw = torch.rand((), generator=run.generator(step, "image")).item()
        for numbers in run.micro_steps():
            batch, generators = next(batches), run.generators(numbers)
            if not args.cache_latents:
                batch |= encode(base, run.env, sampling, batch["video"])
            x0 = pipeline.draw_latents(base, run.env, batch, generators)
            x0 = x0[:, :, :1] if draw < args.image_share else x0
            seen = {k: batch[k].float().to(run.device) for k in SEEN if k in batch}
            seed_dropout(net, args.seed, numbers)
            with run.forward():
                loss = i2v_loss(
                    net, base, sampling, x0, seen, batch["text"], generators, args)
            run.backward(loss)
        run.update()
        if run.preview_due:
            evaluate(run, base, sampling, held_out, f"step-{run.done}")
    if not run.stopped:
        evaluate(run, base, sampling, held_out, "after")
    run.finish("loss", "grad")


# ---- what is trained

def trains_encoders(args):
    """Are the text and image encoders trained, too? Only the tiny world's, from scratch."""
    return args.scratch and base_row(args.base).tiny


def train(args, run, base):
    """LoRA branches or all weights train from now on. -> {prefix of their keys: network},
    wrapped by DDP or FSDP."""
    encoders = {}
    if trains_encoders(args):
        encoders = {"text_encoder": base.text_encoder, "image_encoder": base.image_encoder}
    base.train_net(args, run.dtype, also=[name.replace("_", " ") for name in encoders])
    nets = {"": parallelize(base.net, args, run.device)}
    for name, encoder in encoders.items():
        if encoder is not None:
            encoder = parallelize(encoder.requires_grad_(True), args, run.device, whole=True)
            nets[f"{name}."] = encoder
            setattr(base, name, encoder)
    return nets


# ---- clips and latents

def held_out_pairs(args, sampling, clips):
    """-> [(first frame, a Pillow image; its caption)] to evaluate on."""
    if args.eval_prompts:
        rows = data.read_image_prompts(args.eval_prompts)[:args.eval_n]
        return [(data.open_image(path), caption) for path, caption in rows]
    if args.data:
        videos, captions = ([clips[0, 0][k]] for k in ("video", "text"))
    else:
        videos, captions = tinyworld.tiny_pairs(
            args.seed, args.eval_n, sampling.frames, args.motion)
    return [(pipeline.frame_picture(video[:, 0]), caption)
            for video, caption in zip(videos, captions)]


@torch.no_grad()
def encode(base, env, sampling, video):
    """Clips (b,3,f,h,w) in [-1,1] -> {"mean", "std"} (b,c,f',h',w') of their latents, and
    what image_condition() needs of the first frame beside its latent.

    "picture": the image tower's input (b,3,s,s); for CogVideoX the pixels (b,3,h,w), as
    their noise is new each time. For Wan-I2V the conditions themselves. All on the CPU.
    """
    seen = {"picture": video[:, :, 0]}
    frames = [pipeline.frame_picture(frame) for frame in video[:, :, 0]]
    if base.row.keeps_first:
        seen = {}
    elif isinstance(base.row.net, WanConfig):
        cond = pipeline.wan_conditions(base, env, sampling, frames)
        seen = {k: v.cpu() for k, v in cond.items()}
    elif base.row.unet.image_to_video:
        size, width = (base.row.image or base.row.text).image_size, video.shape[4]
        pictures = [pipeline.tower_image(frame, width, size) for frame in frames]
        seen["picture"] = torch.stack(pictures)
    return pipeline.encode_clips(base, env, video) | seen


# ---- evaluation

@torch.no_grad()
def evaluate(run, base, sampling, pairs, name):
    """The held-out pairs by the averaged weights, always from the same noise -> a line of
    eval.jsonl, NAME.png, NAME/*.mp4. Every process must call it."""
    images, captions = (list(column) for column in zip(*pairs))
    seeds = [f"eval-{i}" for i in range(len(pairs))]
    with run.averaged(base.net):
        videos = pipeline.generate_split(
            base, run.env, captions, seeds, sampling, run.args.batch, images)
    if not run.main:
        return
    size = sampling.size[1:]
    pictures = [data.image_tensor(data.center_crop_wide(image, size)) for image in images]
    row = pipeline.first_frame_kept(videos, pictures)
    if base.row.tiny and not run.args.data:
        row["judge"] = tinyworld.judge_captions(videos, captions)
    pipeline.show(run, name, videos, captions, sampling.save_fps, row)


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp",
                "smaller --height and --width")
