"""Text to video by plain denoising: from scratch, full fine-tuning or LoRA.

As VGen trains ModelScopeT2V (Wang et al., arXiv 2308.06571):

    L = E_{x0, text, eps, t} || net(x_t, t, text) - target ||^2    (2006.11239, eq. 14)
    x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps
    target: the base's, eps or v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0
    flow matching (Open-Sora, Wan): x_t = (1 - sigma) x0 + sigma eps, target eps - x0

In addition, some captions are dropped, so that sampling can use guidance. Some steps
train on single images, which keeps frames sharp. Part of the noise is constant over each
frame. With --ema, a moving average of the weights is saved.

    python t2v.py --base tiny --steps 50                 # fine-tune; a minute on a CPU
    python t2v.py --base tiny-clean --scratch            # how assets/tiny-clean was trained
    python t2v.py --weights W --data clips.csv --rank 16 --lr 1e-4        # LoRA, one GPU
    python t2v.py --base wan2.1-t2v-1.3b --weights W --data clips.csv --frames 33
    torchrun --nproc_per_node=8 t2v.py --weights W --data clips.csv --rank 0 --mixture
    torchrun --nproc_per_node=4 t2v.py ... --rank 0 --parallel fsdp
    python t2v.py ... --resume                           # continue, bit for bit
    python sample.py --ckpt out/t2v --prompt "..."

Writes to --out: ckpt.safetensors (averaged weights with --ema), log.jsonl, curve.png,
and before.png, step-N.png and after.png with clips of held-out prompts, always from the
same noise; on tiny bases eval.jsonl holds the judge's verdict on them.

Memory: LoRA on ModelScope, 16 frames of 256x256 in bf16, batch 1: 7.4 GB or less on an
H100. Full fine-tuning keeps 4 fp32 copies of its 1.41 G parameters (22.6 GB) and the
activations of one block (not measured).

Differences from the original code (the others: docs/differences/t2v.md)
 - Images and videos mix by --image-share on any number of GPUs. VGen mixes by rank, so
   one GPU would train on images alone. --mixture has VGen's clip lengths and frame
   rates; fewer than 8 processes take turns at them.
 - Dropped captions become --negative, "" by default. (VGen: its negative prompt.)
 - VGen halves the gradients of layers that an image model has, too, which AdamW cancels.
   --spatial-lr 0.5 has the intended effect.
 - Noise and dropout are keyed by the sample's number, so runs do not depend on --batch.
"""
from common import Parser, Run, UserError, run_command, trained  # first: for signals
import torch

from bases import base_row, choose_sampling, start_base
from diffusion import diffusion_loss, draw_noise, make_schedule
from models import (
    TemporalConv, TemporalTransformer, UNetConfig, forget_motion, parallelize, seed_dropout)
from pipeline import Clips, preview, training_conditions

# VGen's t2v_train.yaml; LoRA is ours
PAPER = dict(
    base="modelscope", out="out/t2v", steps=10000, lr=3e-5, warmup=10, offset_noise=0.1,
    preview_every=500)
# frames and frames per second of VGen's 8 processes
MIXTURE = [(1, 1), (16, 8), (16, 16), (16, 16), (16, 16), (32, 8), (32, 16), (32, 16)]
TINY = dict(
    steps=2000, batch=16, lr=1.5e-3, lr_schedule="cosine", warmup=50, betas=(0.9, 0.99),
    wd=0.01, ema=0.995, rank=0, image_share=0.0, offset_noise=0.0, cache_latents=True,
    workers=0, grad_ckpt=False, log_every=50)
# LoRA as users of the transformers train it: CogVideoX's own finetune/ (2 GPUs or more) and,
# for Open-Sora, the same
COGVIDEOX = dict(
    rank=128, alpha=64.0, lr=2e-5, warmup=100, offset_noise=0.0, image_share=0.0, wd=1e-4,
    betas=(0.9, 0.95))
OPENSORA = COGVIDEOX | dict(rank=32, alpha=32.0)
# DiffSynth-Studio's examples/wanvideo/model_training/lora/*.sh. Clips have the base's 81 frames
# at 480x832, of TI2V-5B 49; steps are uniform before a shift of 5, which is the base's.
WAN = dict(
    rank=32, alpha=32.0, lr=1e-4, lora_targets=["q", "k", "v", "o", "ffn.0", "ffn.2"],
    height=480, width=832, drop_text=0.0, offset_noise=0.0, image_share=0.0)
PRESETS = dict.fromkeys(("tiny", "tiny-clean", "tiny-weak"), TINY) | {
    "cogvideox-2b": COGVIDEOX, "cogvideox-5b": COGVIDEOX, "opensora": OPENSORA,
    "tiny-wan": TINY | dict(keep_first=0.2),
    "wan2.1-t2v-1.3b": WAN, "wan2.1-t2v-14b": WAN, "wan2.2-ti2v-5b": WAN | dict(frames=49)}


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base")
    p.add_argument("--scratch", action="store_true",
                   help="start from random weights (tiny: of the text encoder, too); "
                        "needs --rank 0")
    p.add_argument("--train-text", action="store_true",
                   help="also train the text encoder, on tiny bases with --rank 0")
    p.add_argument("--forget-motion", action="store_true",
                   help="start with layers over time that pass their input on, as in an "
                        "image model")
    p.add_argument("--zero-snr", action="store_true",
                   help="train for v, on a schedule that ends in pure noise (2305.08891)")
    p.options("data images")
    p.add_argument("--mixture", action="store_true",
                   help="VGen's mixture of images and of clip lengths and frame rates")
    p.options("pixels sampling optimisation ema lora")
    p.add_argument("--timesteps", choices=("uniform", "logit-normal"), default="uniform",
                   help="density of the training steps, before the schedule's shift")
    p.add_argument("--keep-first", type=p.SHARE, default=0.0, metavar="P",
                   help="probability that a clip is given its first latent frame (Wan2.2 TI2V)")
    p.add_argument("--offset-noise", type=p.UNSIGNED,
                   help="strength of noise that all pixels of a frame share: it teaches "
                        "brightness")
    p.add_argument("--spatial-lr", type=p.UNSIGNED, default=1.0,
                   help="factor on --lr for layers within a frame; 0 freezes them")
    p.options("machine evaluation run")
    args = p.parse(argv, PAPER, PRESETS)
    for flag in ("scratch", "forget_motion"):
        if vars(args)[flag] and args.rank:
            flag = flag.replace("_", "-")
            raise UserError(f"--{flag}: LoRA on random weights cannot learn; add --rank 0")
    row = base_row(args.base)
    tiny = row.tiny
    of_unets = {"--forget-motion": args.forget_motion, "--zero-snr": args.zero_snr,
                "--mixture": args.mixture, "--spatial-lr": args.spatial_lr != 1}
    for flag, given in of_unets.items():
        if given and not isinstance(row.net, UNetConfig):
            raise UserError(f"{flag}: only for UNets; {args.base} is a transformer")
    if args.mixture and (not args.data or tiny or args.cache_latents):
        raise UserError("--mixture: reads real clips, each time anew: give --data, no tiny "
                        "base and no --cache-latents")
    if args.keep_first and not row.keeps_first:
        raise UserError(f"--keep-first: {args.base} cannot be given a first frame")
    if args.train_text and (not tiny or args.rank):
        raise UserError("--train-text: only the tiny world's text encoder can be trained, "
                        "with --rank 0")
    return args


# ---- the method

def t2v_loss(net, base, sampling, x0, captions, generators, args):
    """The denoising loss at random steps, (b,).

    x0 (b,c,f,h,w): latents; generators: one per sample, for its step and noise;
    --offset-noise: strength of the noise that a frame shares; --timesteps: density of t;
    --keep-first: how often the first latent frame is given, clean and with a step of 0.
    """
    t, noise = draw_noise(
        base.sampling_schedule(sampling), x0, generators, args.offset_noise, sampling.size,
        args.timesteps)
    text = base.encode_text(captions)
    cond = training_conditions(base, sampling, captions, t, sampling.fps)

    given = None
    if args.keep_first and x0.shape[2] > 1:  # not of an image
        given = torch.stack([torch.rand((), generator=g) < args.keep_first for g in generators])

    def predict(x_t, t):
        return net(x_t, t, text, **cond)
    return diffusion_loss(predict, base.schedule, x0, noise, t, given=given)


def main(argv=None):
    args = get_args(argv)
    # with --zero-snr sampling, too, starts from pure noise
    spacing = {"spacing": "trailing"} if args.zero_snr else {}
    sampling = choose_sampling(args.base, args, method="t2v", **spacing)
    clips = Clips(args, sampling, mixture=MIXTURE if args.mixture else ())
    run = Run(args, "t2v")

    base, schedule = load(args, run)
    clips.check_words(base)
    # TF-T2V's layers for an image stay unused
    unused = base.row.unet.style_image
    net = parallelize(base.net, args, run.device, unused=unused)
    nets = {"": net}
    if trains_text(args):
        base.text_encoder = parallelize(base.text_encoder, args, run.device, whole=True)
        nets["text_encoder."] = base.text_encoder
    params = trained(nets)
    groups = parameter_groups(base.net, params, args.spatial_lr)
    opt = run.adamw(groups)
    meta = dict(sample=sampling.metadata(), schedule=schedule)
    run.attach(opt, params, list(nets.values()), base.parts(), meta, ema_decay=args.ema)
    clips.open(run, base, texts=None if trains_text(args) else ())

    if not run.resumed and not args.scratch:
        preview(run, base, sampling, clips.prompts, "before")
    for _ in run.steps():
        for numbers in run.micro_steps():
            generators = run.generators(numbers)
            seed_dropout(net, args.seed, numbers)
            x0, captions, _ = clips.draw(generators)
            with run.forward():
                loss = t2v_loss(net, base, clips.drawn, x0, captions, generators, args)
            run.backward(loss)
        run.update()
        if run.preview_due:
            preview(run, base, sampling, clips.prompts, f"step-{run.done}")
    if not run.stopped:
        preview(run, base, sampling, clips.prompts, "after")
    run.finish("loss", "grad")


# ---- what is trained

def spatial_parameters(net):
    """Names of a UNet3D's parameters within a frame: what an image model has, too.

    VGen's list of them leaves out the embedding of the step.
    """
    temporal = [f"{name}." for name, module in net.named_modules()
                if isinstance(module, (TemporalTransformer, TemporalConv))]
    others = ("time_embed.", *temporal)
    return {name for name, _ in net.named_parameters() if not name.startswith(others)}


def parameter_groups(net, params, spatial_lr):
    """{key: trained parameter} -> AdamW's groups, with --spatial-lr for those in a frame."""
    names = spatial_parameters(net)
    spatial = [p for key, p in params.items() if key in names]
    others = [p for key, p in params.items() if key not in names]
    return [dict(params=spatial, lr_factor=spatial_lr), dict(params=others, lr_factor=1.0)]


def trains_text(args):
    """Is the text encoder trained, too? Only the tiny world's can be."""
    return args.train_text or (args.scratch and base_row(args.base).tiny)


def load(args, run):
    """-> the base, in training mode; --zero-snr's schedule as plain values, or None.

    What is trained is kept in fp32. A resumed run's weights come later.
    """
    dtype = run.dtype if args.rank else torch.float32
    base = start_base(run, dtype, args.scratch, frozen=args.frozen)
    if args.forget_motion:
        forget_motion(base.net)
    schedule = None
    if args.zero_snr:
        schedule = base.row.schedule | dict(prediction="v", zero_snr=True)
        base.schedule = make_schedule(**schedule)
    base.text_encoder.requires_grad_(trains_text(args))
    base.train_net(args, run.dtype, also=["text encoder"] * trains_text(args))
    return base, schedule


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp",
                "smaller --height and --width")
