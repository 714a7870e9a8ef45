"""HiGen: generate an image first, then its motion (Qing et al., arXiv 2312.04483).

    L = || net(x_t, t, text, prior, gamma_m, gamma_a) - v ||^2

One network works in two passes. The spatial pass makes an image from the text. The
temporal pass makes the clip around that image (the prior), and is told two things about
the clip: how much it moves, gamma_m, and how much its look changes, gamma_a. In training
all three are computed from the clip. In sampling the image comes from the first pass,
and the two factors are options.

    gamma_m [i]:    how far frame i + 1 is from frame i, 0 (still) to 1000
    gamma_a [i,j]:  how alike frames i and j look, the cosine of their CLIP embeddings
    prior:          the latent of the middle frame
    images:         prior = 0, gamma_m = 0, gamma_a = 1; layers over time pass their input on

    python higen.py --base tiny-higen                    # 2 CPU cores, minutes
    python higen.py --weights W --data clips.csv --rank 16 --lr 1e-4      # LoRA, one GPU
    torchrun --nproc_per_node=8 higen.py --weights W --data clips.csv --rank 0
    python higen.py ... --resume                         # continue, bit for bit
    python sample.py --ckpt out/higen --prompt "a red circle growing" --motion-factor 450

tiny-higen is tiny with HiGen's layers, which start untrained. In the tiny world coarse
colours stand in for CLIP embeddings.

Writes to --out: ckpt.safetensors (averaged weights with --ema), log.jsonl, curve.png,
and before.png, step-N.png and after.png with held-out prompts, from the same noise at
three motion factors; on tiny bases eval.jsonl holds the speeds, in pixels per frame.

Memory: as t2v.py on the same base and size (not measured).

Differences from the original: its training code is not public; this follows the paper.
 - The scale of gamma_m is ours, chosen to fit the public weights, see motion_factors().
 - The look of a frame is its CLIP embedding alone.
"""
from common import Parser, Run, run_command, trained  # first: for signals
from dataclasses import replace

import torch
import torch.nn.functional as F

from bases import choose_sampling, start_base
from data import clip_frames
from diffusion import appearance_rows, diffusion_loss, draw_noise
from models import parallelize, seed_dropout
from pipeline import Clips, generate_split, show
from tinyworld import judge, tiny_captions

# those of VGen's text-to-video training; no others are published
PAPER = dict(
    base="higen", out="out/higen", steps=10000, lr=3e-5, warmup=10, offset_noise=0.1,
    preview_every=500, eval_n=2)
TINY = dict(
    image_share=0.25, steps=600, batch=16, lr=1e-3, lr_schedule="cosine", warmup=20,
    betas=(0.9, 0.99), wd=0.01, ema=0.99, rank=0, offset_noise=0.0, cache_latents=True,
    workers=0, grad_ckpt=False, eval_n=8, preview_every=300, log_every=50)
TRAVEL = 4, 18         # pixels that objects of the tiny world travel: slow and fast clips
DIALS = 0.5, 1.0, 1.5  # motion factors of before.png ..., relative to the base's own


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base data images pixels sampling optimisation ema lora")
    p.add_argument("--offset-noise", type=p.UNSIGNED,
                   help="strength of noise that all pixels of a frame share: it teaches "
                        "brightness")
    p.options("machine evaluation run")
    return p.parse(argv, PAPER, {"tiny-higen": TINY})


# ---- the method

def motion_factors(latents):
    """gamma_m: whole numbers (b,f-1) from 0 to 1000; latents (b,c,f,h,w), unit variance.

    The root mean square of the change from frame to frame, times 1000. A lively clip has
    about 500, the published factor for sampling.
    """
    step = latents.float().diff(dim=2).square().mean((1, 3, 4)).sqrt()
    return (1000 * step).round().clamp(max=1000)


@torch.no_grad()
def likeness(base, env, video):
    """gamma_a: (b,f,f) in 0..1 on the CPU, of clips (b,3,f,h,w) in [-1,1]."""
    found = []
    for frames in video.transpose(1, 2):  # f 3 h w
        if base.image_encoder:
            pixels = clip_frames(frames).to(env.device, env.dtype)
            looks = base.image_encoder(pixels).float().cpu()
        else:  # the tiny world: coarse colours
            looks = F.adaptive_avg_pool2d(frames, 4).flatten(1)
        looks = F.normalize(looks, dim=-1)
        found.append((looks @ looks.T).clamp(0, 1))
    return torch.stack(found)


def factors(base, x0, seen):
    """Latents x0 (b,c,f,h,w), what was read off their clips -> conditions of the network.

    seen: "alike" (b,f,f), and "mean", latents without the autoencoder's noise, which would
    count as motion. Images (f = 1) need neither.
    """
    b, f = x0.shape[0], x0.shape[2]
    if f == 1:
        alike, motion = torch.ones(b, 1, 1), torch.zeros(b)
        prior = torch.zeros_like(x0[:, :, 0])
    else:
        alike = seen["alike"].float()
        motion = motion_factors(base.vae.normalise(seen["mean"].to(x0)))
        prior = x0[:, :, f // 2]
    return dict(image_prior=prior, motion_factor=motion.to(x0.device),
                appearance_factor=appearance_rows(alike).to(x0.device))  # b f 32


def higen_loss(net, base, x0, text, seen, generators, offset=0.0):
    """The denoising loss of clips or of images, (b,); generators: one per sample."""
    cond = factors(base, x0, seen)

    def predict(x_t, t):
        return net(x_t, t, text, **cond)
    t, noise = draw_noise(base.schedule, x0, generators, offset)
    return diffusion_loss(predict, base.schedule, x0, noise, t)


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="higen")
    clips = Clips(args, sampling, travel=TRAVEL)
    run = Run(args, "higen")

    base = load(args, run)
    clips.check_words(base)
    # images leave out the layers over time
    net = parallelize(base.net, args, run.device, unused=True)
    params = trained({"": net})
    opt = run.adamw(params.values())
    meta = dict(sample=sampling.metadata())
    run.attach(opt, params, [net], base.parts(), meta, ema_decay=args.ema)
    clips.open(run, base, lambda video, _: {"alike": likeness(base, run.env, video)})

    if not run.resumed:
        evaluate(run, base, sampling, clips.prompts, "before")
    for _ in run.steps():
        for numbers in run.micro_steps():
            generators = run.generators(numbers)
            seed_dropout(net, args.seed, numbers)
            x0, captions, seen = clips.draw(generators)
            with run.forward():
                text = base.encode_text(captions)
                loss = higen_loss(
                    net, base, x0, text, seen, generators, args.offset_noise)
            run.backward(loss)
        run.update()
        if run.preview_due:
            evaluate(run, base, sampling, clips.prompts, f"step-{run.done}")
    if not run.stopped:
        evaluate(run, base, sampling, clips.prompts, "after")
    run.finish("loss", "grad")


# ---- what is trained, and from where

def load(args, run):
    """-> the base in training mode; what is trained is kept in fp32."""
    dtype = run.dtype if args.rank else torch.float32
    base = start_base(run, dtype, image=True, frozen=args.frozen)
    if base.row.tiny and not (run.resumed or args.rank or args.init):
        fit_resampler(base)
    base.train_net(args, run.dtype)
    return base


def fit_resampler(base, steps=300, batch=64):
    """tiny-higen's new reader of texts learns to pass on tiny's tokens, so that words keep
    their meaning. Otherwise training would have to learn them again."""
    reader, captions = base.net.context_embedding, tiny_captions()
    captions += [caption.split(" on a ")[0] for caption in captions] + [""] * 40
    device = next(reader.parameters()).device
    with torch.no_grad():
        tokens = base.encode_text(captions).float()
    draw = torch.Generator().manual_seed(0)
    reader.requires_grad_(True)
    opt = torch.optim.AdamW(reader.parameters(), betas=(0.9, 0.99))
    for rate in torch.linspace(3e-3, 0, steps).tolist():
        opt.param_groups[0]["lr"] = rate
        rows = tokens[torch.randint(len(tokens), (batch,), generator=draw).to(device)]
        loss = (reader(rows) - rows).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()


# ---- evaluation

@torch.no_grad()
def evaluate(run, base, sampling, prompts, name):
    """The prompts, from the same noise at each motion factor -> NAME.png, NAME/*.mp4 (of the
    last), and on tiny bases mean speeds. Every process must call it."""
    seeds = [f"preview-{i}" for i in range(len(prompts))]
    dials = [round(sampling.motion_factor * dial) for dial in DIALS]
    made = []
    with run.averaged(base.net):
        for dial in dials:
            turned = replace(sampling, motion_factor=dial)
            made.append(generate_split(base, run.env, prompts, seeds, turned, run.args.batch))
    if run.main:
        row = None
        if base.row.tiny:
            speeds = [[judge(video)["speed"] for video in videos] for videos in made]
            row = {f"speed_{k}": sum(each) / len(each) for k, each in zip(dials, speeds)}
        headers = [f"motion factor {dial}" for dial in dials]
        show(run, name, made[-1], prompts, sampling.save_fps, row, list(zip(*made))[:16], headers)


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp",
                "smaller --height and --width")
