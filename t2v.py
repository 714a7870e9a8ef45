"""Text to video by plain denoising: from scratch, full fine-tuning or LoRA.

As VGen trains ModelScopeT2V (Wang et al., arXiv 2308.06571):

    L = E_{x0, text, eps, t} || net(x_t, t, text) - target ||^2        (2006.11239, eq. 14)
    x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps
    target: the base's, eps or v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0

Around this loss: some captions are dropped, so that sampling can use guidance; some steps
train on single images, which keep frames sharp; the noise has a part that a whole frame
shares; a moving average of the weights is saved; clips can be encoded once (--cache-latents).

    python t2v.py --base tiny --steps 50                    # fine-tune tiny; a minute on a CPU
    python t2v.py --base tiny --scratch --out out/tiny      # how assets/tiny.safetensors was made
    python t2v.py --base modelscope --weights W --data clips.csv --rank 16 --lr 1e-4   # LoRA
    torchrun --nproc_per_node=8 t2v.py --weights W --data clips.csv --rank 0 --mixture
    torchrun --nproc_per_node=4 t2v.py --weights W --data clips.csv --rank 0 --parallel fsdp
    python t2v.py ... --resume                              # continue, bit for bit
    python sample.py --ckpt out/t2v --prompt "..."

Writes to --out: ckpt.safetensors (averaged weights with --ema), log.jsonl, curve.png, and
before.png, step-N.png and after.png, clips of held-out prompts with always the same noise;
on tiny bases eval.jsonl holds the judge's verdict on them.

Memory: LoRA on ModelScope, 16 frames of 256x256 in bf16, batch 1: 7.4 GB or less on an H100.
Full fine-tuning keeps 4 fp32 copies of its 1.41 G parameters (22.6 GB), and the activations
of one block (not measured).

Differences from the original code
 - Images and videos mix by --image-share on any number of GPUs. VGen mixes by rank, so one
   GPU would train on images alone. --mixture has VGen's clip lengths and frame rates; fewer
   than 8 processes take turns at them.
 - Data is shuffled, and clips have exactly the frames asked for. (VGen's loader is off by
   one, and pads with grey.)
 - Dropped captions become --negative, "" by default. (VGen: its negative prompt.)
 - VGen halves the gradients of layers that an image model has, too, which AdamW cancels.
   --spatial-lr 0.5 is what it meant.
 - Dropout masks and noise are keyed by the sample's number, so a run does not depend on
   --batch.
 - The moving average is one file, not one shard per GPU.
"""
import torch

from bases import base_row, choose_sampling, load_base
from common import Parser, Run, UserError, run_command, trained
from data import Mixed, VideoDataset, read_batches
from diffusion import diffusion_loss, make_schedule, offset_noise, randn
from models import (
    TemporalConv, TemporalTransformer, add_lora, forget_motion, parallelize, seed_dropout)
from pipeline import (
    cache_data, check_words, draw_latents, drop_captions, encode_clips, frame_rate, image_step,
    one_frame, preview, preview_prompts, read_clips, read_data)
from tinyworld import TinyWorld

# VGen's t2v_train.yaml; LoRA is ours. Its frames and frame rates, process by process:
PAPER = dict(
    base="modelscope", out="out/t2v", steps=10000, lr=3e-5, warmup=10, offset_noise=0.1,
    preview_every=500)
MIXTURE = [(1, 1), (16, 8), (16, 16), (16, 16), (16, 16), (32, 8), (32, 16), (32, 16)]
TINY = dict(
    steps=2000, batch=16, lr=1.5e-3, lr_schedule="cosine", warmup=50, betas=(0.9, 0.99), wd=0.01,
    ema=0.995, rank=0, image_share=0.0, offset_noise=0.0, cache_latents=True, workers=0,
    grad_ckpt=False, log_every=50)
PRESETS = {"tiny": TINY, "tiny-weak": TINY}


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base")
    p.add_argument("--scratch", action="store_true",
                   help="start from random weights (tiny: of the text encoder, too); needs --rank 0")
    p.add_argument("--train-text", action="store_true",
                   help="also train the text encoder, on tiny bases with --rank 0")
    p.add_argument("--forget-motion", action="store_true",
                   help="start with layers over time that pass their input on, as an image model")
    p.add_argument("--zero-snr", action="store_true",
                   help="train for v and a schedule that ends in pure noise (arXiv 2305.08891)")
    p.options("data images")
    p.add_argument("--mixture", action="store_true",
                   help="VGen's mixture of images and clips of several lengths and frame rates")
    p.options("pixels sampling optimisation ema lora")
    p.add_argument("--offset-noise", type=p.UNSIGNED,
                   help="strength of noise that all pixels of a frame share: it teaches brightness")
    p.add_argument("--spatial-lr", type=p.UNSIGNED, default=1.0,
                   help="factor on --lr for layers within a frame; 0 freezes them")
    p.options("machine evaluation run")
    args = p.parse(argv, PAPER, PRESETS)
    for flag in ("scratch", "forget_motion"):
        if vars(args)[flag] and args.rank:
            raise UserError(f"--{flag.replace('_', '-')}: LoRA on random weights cannot learn; add "
                            "--rank 0")
    tiny = base_row(args.base).tiny
    if args.mixture and (not args.data or tiny or args.cache_latents):
        raise UserError("--mixture: reads real clips, each time anew: give --data, no tiny base and "
                        "no --cache-latents")
    if args.train_text and (not tiny or args.rank):
        raise UserError("--train-text: only the tiny world's text encoder can be trained, with "
                        "--rank 0")
    return args


# ---- the method

def t2v_loss(net, schedule, x0, text, generators, offset=0.0, **cond):
    """The denoising loss at random steps, (b,).

    x0 (b,c,f,h,w): latents; text (b,n,d); generators: one per sample, for its step and noise;
    offset: strength of the noise that a frame shares; cond: other conditions of the network.
    """
    steps = len(schedule.alpha_bar)
    t = torch.stack([torch.randint(steps, (), generator=g) for g in generators])
    # a frame's mean hardly changes under plain noise, so the network would not learn to choose it
    noise, shared = randn(x0.shape, generators), randn((*x0.shape[:3], 1, 1), generators)
    noise = offset_noise(noise, shared, offset)

    def predict(x_t, t):
        return net(x_t, t, text, **cond)
    return diffusion_loss(predict, schedule, x0, noise.to(x0.device), t.to(x0.device))


def spatial_parameters(net):
    """{name: parameter} of a UNet3D's layers within a frame: what an image model has, too.

    VGen's list of them leaves out the embedding of the step.
    """
    kinds = TemporalTransformer, TemporalConv
    temporal = [f"{name}." for name, module in net.named_modules() if isinstance(module, kinds)]
    skipped = ("time_embed.", *temporal)
    return {name: p for name, p in net.named_parameters() if not name.startswith(skipped)}


def main(argv=None):
    args = get_args(argv)
    # --zero-snr: sampling, too, starts from pure noise
    spacing = {"spacing": "trailing"} if args.zero_snr else {}
    sampling = choose_sampling(args.base, args, method="t2v", **spacing)
    data = read_mixture(args, sampling) if args.mixture else read_data(
        args, sampling, TinyWorld(4096, sampling.frames, args.seed))
    prompts = preview_prompts(args, data[0])
    run = Run(args, "t2v")

    base, schedule = load(args, run)
    texts = [*prompts, sampling.negative]
    check_words(base, texts, data)
    # plain training leaves out the layers for TF-T2V's image
    unused = base.row.unet.style_image
    nets = {"": parallelize(base.net, args.parallel, run.device, args.offload, unused=unused)}
    if trains_text(args):
        base.text_encoder = parallelize(base.text_encoder, "ddp", run.device)
        nets["text_encoder."] = base.text_encoder
    net, params = nets[""], trained(nets)
    opt = torch.optim.AdamW(parameter_groups(base.net, params, args.spatial_lr), args.lr, args.betas,
                            weight_decay=args.wd)
    meta = dict(rank=args.rank, alpha=args.alpha, lora_targets=args.lora_targets,
                sample=sampling.metadata(), schedule=schedule)
    run.attach(opt, params, list(nets.values()), base.parts(), meta, ema_decay=args.ema)

    def encode(batch):
        return encode_clips(base, run.env, batch["video"])
    if args.cache_latents:
        # texts are encoded once, too, unless their encoder is trained
        data = cache_data(run, base, sampling, data, encode, None if trains_text(args) else texts)
    batches = read_turns(run, data) if args.mixture else read_clips(run, *data)

    if not run.resumed and not args.scratch:
        preview(run, base, sampling, prompts, "before")
    for step in run.steps():
        images = not args.mixture and image_step(run, step)
        for numbers in run.micro_steps():
            batch, generators = next(batches), run.generators(numbers)
            seed_dropout(net, args.seed, numbers)
            x0 = draw_latents(
                base, run.env, batch if args.cache_latents else encode(batch), generators)
            x0 = one_frame(x0, generators) if images else x0
            captions = drop_captions(batch["text"], sampling.negative, args.drop_text, generators)
            with run.forward():
                loss = t2v_loss(
                    net, base.schedule, x0, base.encode_text(captions), generators,
                    args.offset_noise, **frame_rate(sampling.fps, len(x0), run.device))
            run.backward(loss)
        run.update()
        if run.preview_due:
            preview(run, base, sampling, prompts, f"step-{run.done}")
    if not run.stopped:
        preview(run, base, sampling, prompts, "after")
    run.finish("loss", "grad")


# ---- what is trained

def trains_text(args):
    """Is the text encoder trained, too? Only the tiny world's can be."""
    return args.train_text or (args.scratch and base_row(args.base).tiny)


def load(args, run):
    """-> the base in training mode, its trained tensors in fp32 and requiring gradients; --zero-snr's
    schedule as plain values, or None."""
    dtype = run.dtype if args.rank else torch.float32
    base = load_base(args.base, args.weights, run.device, dtype, args.scratch)
    if args.forget_motion:
        forget_motion(base.net)
    schedule = None
    if args.zero_snr:
        schedule = base.row.schedule | dict(prediction="v", zero_snr=True)
        base.schedule = make_schedule(**schedule)
    if args.rank:
        add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    else:
        base.net.requires_grad_(True)
    base.text_encoder.requires_grad_(trains_text(args))
    # what is frozen needs half the memory
    base.freeze(run.dtype, but=["net"] + ["text encoder"] * trains_text(args))
    base.net.grad_ckpt = args.grad_ckpt
    base.net.train()
    return base, schedule


def parameter_groups(net, params, spatial_lr):
    """The trained parameters {key: parameter} -> AdamW's groups: within a frame, and all others."""
    spatial = spatial_parameters(net)
    within = [p for key, p in params.items() if key in spatial]
    others = [p for key, p in params.items() if key not in spatial]
    return [dict(params=within, lr_factor=spatial_lr), dict(params=others, lr_factor=1.0)]


# ---- VGen's mixture of data

def read_mixture(args, sampling):
    """-> a data set for each kind of MIXTURE, the longest clips first."""
    sets = []
    for frames, fps in sorted(set(MIXTURE), reverse=True):
        source = args.images if args.images and frames == 1 else args.data
        sets.append(VideoDataset(source, frames, sampling.height, sampling.width, fps, args.seed))
    return sets


def mixture_turns(first, last):
    """Which of read_mixture()'s data sets the batches first..last-1 of a run are made of.

    Eight processes have VGen's kind each, and fewer take turns.
    """
    kinds = sorted(set(MIXTURE), reverse=True)
    return [kinds.index(MIXTURE[k % len(MIXTURE)]) for k in range(first, last)]


def read_turns(run, data):
    """The batches of --mixture for all micro-steps to come."""
    args, first = run.args, run.samples_read // run.args.batch
    last = first + (args.steps - run.start) * args.accum * run.env.world
    mixed = Mixed(data, mixture_turns(first, last), args.batch, run.samples_read)
    return read_batches(mixed, run.numbers, args.seed, args.workers)


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp",
                "smaller --height and --width")
