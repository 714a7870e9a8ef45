"""TF-T2V: learn motion from videos that have no captions (Wang et al., arXiv 2312.15770).

    L = || net(x_t, t, c) - v ||^2  +  lambda || d net(x_t, t, c) - d v ||^2
    d: the difference between neighbouring frames; clips only (coherence, lambda = 0.1)
    v: the target of --base tft2v; a base that predicts noise has eps

Captioned videos are rare; captioned images and plain videos are not. One network learns
from both in turn. In the content branch it sees single images, c = their captions. In
the motion branch it sees clips without captions, c = the CLIP embedding of the middle
frame, which gives the content but not the motion. Sampling combines the two: the prompt
sets the content, and the motion is what was learned from the clips.

    python tft2v.py --base tiny-clean                  # an image model learns to move; minutes
    python tft2v.py --base tiny-clean --image-share 1  # the same steps without clips
    python tft2v.py --weights W --data clips --images pictures.csv --rank 16 --lr 1e-4
    torchrun --nproc_per_node=8 tft2v.py --weights W --data clips --images I --rank 0
    python tft2v.py ... --resume                 # continue, bit for bit
    python sample.py --ckpt out/tft2v --prompt "a fox in the snow"

--data: clips, whose captions are never read; --images: pictures with captions. Without
--images, single frames of --data with its captions take their place. On --base tiny-clean both
come from the tiny world, and training starts from tiny without its layers over time
(--forget-motion). Tiny has no layers for an image embedding; there clips go without.

Writes to --out: ckpt.safetensors (averaged weights with --ema), log.jsonl, curve.png,
and before.png, step-N.png and after.png with clips of held-out prompts, always from the
same noise; on tiny bases eval.jsonl holds the judge's verdict on them.

Memory: as t2v.py on the same base and size (not measured).

Differences from the original: its training code is not public; this follows the paper.
 - The dropout rate of the image embedding is our choice, see see_image().
 - A coin with --image-share decides whether a batch is images or clips.
"""
from common import Parser, Run, UserError, run_command, trained  # first: for signals
import torch

from bases import choose_sampling, start_base
from data import clip_frames
from diffusion import draw_noise
from models import forget_motion, parallelize, seed_dropout
from pipeline import Clips, preview

# lambda is the paper's; the others are those of VGen's text-to-video training
PAPER = dict(
    base="tft2v", out="out/tft2v", coherence=0.1, steps=10000, lr=3e-5, warmup=10,
    offset_noise=0.1, preview_every=500)
TINY = dict(
    forget_motion=True, image_share=0.5, steps=400, batch=16, lr=1e-3,
    lr_schedule="cosine", warmup=20, betas=(0.9, 0.99), wd=0.01, ema=0.99, rank=0,
    offset_noise=0.0, cache_latents=True, workers=0, grad_ckpt=False, log_every=50)
NO_CAPTION = ""  # the text of every clip


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base")
    p.add_argument("--forget-motion", action=p.YES_NO, default=False,
                   help="start with layers over time that pass their input on, as in an "
                        "image model")
    p.options("data images")
    p.add_argument("--coherence", type=p.UNSIGNED, help="lambda, weight of the coherence loss")
    p.options("pixels sampling optimisation ema lora")
    p.add_argument("--offset-noise", type=p.UNSIGNED,
                   help="strength of noise that all pixels of a frame share: it teaches "
                        "brightness")
    p.options("machine evaluation run")
    args = p.parse(argv, PAPER, {"tiny": TINY, "tiny-clean": TINY})
    if args.forget_motion and args.rank:
        raise UserError("--forget-motion: LoRA cannot learn motion from nothing; add "
                        "--rank 0 or --no-forget-motion")
    if not args.image_share:
        raise UserError("--image-share 0: no caption would be left; give a share above 0")
    return args


# ---- the method

def tft2v_loss(net, schedule, x0, text, generators, offset=0.0, coherence=0.0, **cond):
    """The denoising loss and lambda = `coherence` times the coherence loss, (b,).

    x0 (b,c,f,h,w): latents, f = 1 for images, which have no second term; text (b,n,d);
    generators: one per sample, for its step and noise; offset: strength of the noise that
    a frame shares; cond: further conditions.
    """
    t, noise = draw_noise(schedule, x0, generators, offset)
    out = net(schedule.add_noise(x0, noise, t), t, text, **cond).float()
    error = out - schedule.target(x0, noise, t).float()
    loss = error.square().flatten(1).mean(1)
    if x0.shape[2] > 1:  # d is linear: d net - d v = d (net - v)
        loss = loss + coherence * error.diff(dim=2).square().flatten(1).mean(1)
    return loss


@torch.no_grad()
def middle_frames(base, env, video):
    """Clips (b,3,f,h,w) in [-1,1] -> CLIP embeddings of their middle frames, (b,1,d)."""
    frames = clip_frames(video[:, :, video.shape[2] // 2])
    return base.image_encoder(frames.to(env.device, env.dtype))[:, None].float().cpu()


def see_image(image, generators):
    """Embeddings (b,1,d) -> the same, zeros for clips that go without.

    Sampling from words has none, so the network must know both cases. A tenth of the
    clips never see it, four tenths always do, and a coin decides for the others.
    """
    case, coin = torch.stack([torch.rand(2, generator=g) for g in generators]).T
    keep = (case >= 0.6) | ((case > 0.1) & (coin > 0.5))
    return image.float() * keep[:, None, None]


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="tft2v")
    # clips need captions only where their frames are the captioned images
    clips = Clips(args, sampling, captions=not args.images)
    run = Run(args, "tft2v")

    base = load(args, run)
    clips.check_words(base)
    has_image = base.row.unet.style_image  # layers that image steps leave out
    net = parallelize(base.net, args, run.device, unused=has_image)
    params = trained({"": net})
    opt = run.adamw(params.values())
    meta = dict(sample=sampling.metadata())
    run.attach(opt, params, [net], base.parts(), meta, ema_decay=args.ema)

    def observe(video, batch):
        return {"image": middle_frames(base, run.env, video)} if has_image else {}
    clips.open(run, base, observe, texts=[NO_CAPTION])

    if not run.resumed:
        preview(run, base, sampling, clips.prompts, "before")
    for _ in run.steps():
        for numbers in run.micro_steps():
            generators = run.generators(numbers)
            seed_dropout(net, args.seed, numbers)
            x0, captions, seen = clips.draw(generators)
            cond = {}
            if x0.shape[2] > 1:  # the motion branch
                captions = [NO_CAPTION] * len(captions)
                if has_image:
                    cond["image"] = see_image(seen["image"], generators).to(run.device)
            with run.forward():
                text = base.encode_text(captions)
                loss = tft2v_loss(
                    net, base.schedule, x0, text, generators, args.offset_noise,
                    args.coherence, **cond)
            run.backward(loss)
        run.update()
        if run.preview_due:
            preview(run, base, sampling, clips.prompts, f"step-{run.done}")
    if not run.stopped:
        preview(run, base, sampling, clips.prompts, "after")
    run.finish("loss", "grad")


def load(args, run):
    """-> the base in training mode; what is trained is kept in fp32."""
    dtype = run.dtype if args.rank else torch.float32
    base = start_base(run, dtype, image=True, frozen=args.frozen)
    if args.forget_motion:  # a resumed run's weights come later
        forget_motion(base.net)
    base.train_net(args, run.dtype)
    return base


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp",
                "smaller --height and --width")
