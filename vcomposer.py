"""VideoComposer: videos that follow maps of depth, sketches or motion (Wang et al., 2306.02018).

    L = || net(x_t, t, text, maps, image) - v ||^2

Besides the text the network sees maps as large as the clip: depth, sketches of all frames or
of the first, motion vectors, the first frame itself. A small encoder for each makes channels
of it, whose sum stands beside the noisy latents at the first convolution. The CLIP embedding
of one frame, as further tokens beside the text, tells the style. All of them are read off
the training clip, and each is dropped at random, so that any subset works in sampling.

    python vcomposer.py --base tiny-vcomposer --out out/vcomposer      # 2 CPU cores, minutes
    python vcomposer.py --weights W --data clips.csv --flow-weights raft_large.pth --rank 16
    torchrun --nproc_per_node=8 vcomposer.py --weights W --data clips.csv --rank 0
    python vcomposer.py ... --resume                                   # continue, bit for bit
    python sample.py --ckpt out/vcomposer --prompt "a red circle" --depth depth.npy

tiny-vcomposer is tiny with encoders of depth, sketch and motion, which start at nothing.

Writes to --out: ckpt.safetensors (averaged weights with --ema), log.jsonl, curve.png, and
before.png, step-N.png and after.png: a clip, then clips made with its caption alone and with
each of its maps; eval.jsonl holds their distance from the clip.

Memory: as t2v.py on the same base and size (not measured).

Differences from the original: its training code is not public, so this follows the paper and
what VGen's network tells.
 - Which maps are dropped together is ours, see drop_maps().
 - Sketches are Sobel's edges, not PiDiNet's. Motion is RAFT's flow, not the codec's vectors,
   at the centre of every block of 16x16 pixels; without --flow-weights it is not trained.
 - Masks are not trained, and neither is depth on real clips (the tiny world knows its own).
"""
import torch

from bases import choose_sampling, load_base
from common import Parser, Run, run_command, trained
from data import clip_frames, lucas_kanade, raft, video_maps
from diffusion import diffusion_loss, draw_noise
from models import add_lora, parallelize, seed_dropout
from pipeline import Clips, generate_split, show

# those of VGen's text-to-video training; the paper's own are for another base
PAPER = dict(
    base="vcomposer", out="out/vcomposer", steps=10000, lr=3e-5, warmup=10, offset_noise=0.1,
    preview_every=500, eval_n=2)
TINY = dict(
    image_share=0.0, steps=600, batch=16, lr=1e-3, lr_schedule="cosine", warmup=20,
    betas=(0.9, 0.99), wd=0.01, ema=0.99, rank=0, offset_noise=0.0, cache_latents=True,
    workers=0, grad_ckpt=False, preview_every=300, log_every=50)
NONE, ALONE = 0.1, 0.4  # shares of the clips that see no map, and one map alone


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base data images")
    p.add_argument("--flow-weights",
                   help="file of torchvision's raft_large, for maps of motion (tiny: not needed)")
    p.options("pixels sampling optimisation ema lora")
    p.add_argument("--offset-noise", type=p.UNSIGNED,
                   help="strength of noise that all pixels of a frame share: it teaches brightness")
    p.options("machine evaluation run")
    return p.parse(argv, PAPER, {"tiny-vcomposer": TINY})


# ---- the method

@torch.no_grad()
def read_maps(base, env, video, batch, flow):
    """What is told of clips (b,3,f,h,w) in [-1,1] -> {name of a map: (b,c,f,h,w)} on the CPU.

    "image" (b,1,d) is the CLIP embedding of the middle frame. batch: of the data set, which may
    hold "depth"; flow(a, b): the motion between frames, or None.
    """
    unet, block = base.row.unet, 1 if base.row.tiny else 16
    maps = [video_maps(clip, unet.maps, flow=flow, block=block) for clip in video]
    seen = {name: torch.stack([one[name] for one in maps]) for name in maps[0]}
    if "depth" in batch:
        seen["depth"] = batch["depth"]
    if unet.style_image:
        frames = clip_frames(video[:, :, video.shape[2] // 2])
        seen["image"] = base.image_encoder(frames.to(env.device, env.dtype))[:, None].float().cpu()
    return seen


def drop_maps(names, generators):
    """-> {name: (b,) 1, or 0 where the sample does not see it}; generators: one per sample.

    A tenth of the clips sees none: so sampling from words alone goes on to work. Four tenths see
    one alone, each of them as often: that is how most clips are sampled, and a map that tells
    little, such as motion, would hardly be used beside one that tells more. The others see each
    with probability 1/2, which teaches the combinations. (VGen: one tenth none, one tenth all,
    otherwise each with probability 1/2 or 0.6.)
    """
    draws = torch.stack([torch.rand(1 + len(names), generator=g) for g in generators])
    case, coins = draws[:, 0], draws[:, 1:]
    alone = case >= 1 - ALONE
    turn = ((case - (1 - ALONE)) / ALONE * len(names)).floor()  # whose turn it is to be alone
    keep = {}
    for k, name in enumerate(names):
        together = (case > NONE) & (coins[:, k] > 0.5)
        keep[name] = torch.where(alone, turn == k, together).float()
    return keep


def vcomposer_loss(net, base, x0, text, seen, generators, offset=0.0):
    """The denoising loss, (b,), of latents x0 (b,c,f,h,w); images (f = 1) go without maps.

    seen: what read_maps() gave; text (b,n,d); generators: one per sample, for all its draws.
    """
    names = [name for name in ("image", *base.row.unet.maps) if name in seen and x0.shape[2] > 1]
    cond, keep = {}, {}
    if names:
        keep = {name: on.to(x0.device) for name, on in drop_maps(names, generators).items()}
        cond = {name: seen[name].float().to(x0.device) for name in names}
    if "image" in cond:  # no embedding is one of zeros
        cond["image"] = cond["image"] * keep.pop("image")[:, None, None]
    t, noise = draw_noise(base.schedule, x0, generators, offset)
    return diffusion_loss(
        lambda x_t, t: net(x_t, t, text, map_keep=keep, **cond), base.schedule, x0, noise, t)


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="vcomposer")
    clips = Clips(args, sampling, depth=True)
    examples = clips.examples(args.eval_n)
    run = Run(args, "vcomposer")

    base, flow = load(args, run)
    clips.check_words(base)
    # images leave out the encoders of maps
    net = parallelize(base.net, args.parallel, run.device, args.offload, unused=True)
    params = trained({"": net})
    opt = torch.optim.AdamW(params.values(), args.lr, args.betas, weight_decay=args.wd)
    meta = dict(rank=args.rank, alpha=args.alpha, lora_targets=args.lora_targets,
                sample=sampling.metadata())
    run.attach(opt, params, [net], base.parts(), meta, ema_decay=args.ema)

    def observe(video, batch):
        return read_maps(base, run.env, video, batch, flow)
    examples |= observe(examples["video"], examples)
    clips.open(run, base, observe, examples["text"])

    if not run.resumed:
        evaluate(run, base, sampling, examples, "before")
    for _ in run.steps():
        for numbers in run.micro_steps():
            generators = run.generators(numbers)
            seed_dropout(net, args.seed, numbers)
            x0, captions, seen = clips.draw(generators)
            with run.forward():
                text = base.encode_text(captions)
                loss = vcomposer_loss(net, base, x0, text, seen, generators, args.offset_noise)
            run.backward(loss)
        run.update()
        if run.preview_due:
            evaluate(run, base, sampling, examples, f"step-{run.done}")
    if not run.stopped:
        evaluate(run, base, sampling, examples, "after")
    run.finish("loss", "grad")


def load(args, run):
    """-> the base in training mode, its trained tensors in fp32 and requiring gradients; what finds
    the motion between frames, or None."""
    dtype = run.dtype if args.rank else torch.float32
    flow = raft("large", args.flow_weights, run.device) if args.flow_weights else None
    base = load_base(args.base, args.weights, run.device, dtype, image=True)
    if args.rank:
        add_lora(base.net, args.rank, args.alpha, args.lora_targets)
    else:
        base.net.requires_grad_(True)
    base.freeze(run.dtype, but=["net"])  # what is frozen needs half the memory
    base.net.grad_ckpt = args.grad_ckpt
    base.net.train()
    return base, lucas_kanade if base.row.tiny else flow


# ---- evaluation

@torch.no_grad()
def evaluate(run, base, sampling, examples, name):
    """Clips, and what is made with their captions: alone, and with each map. Every process must call.

    -> NAME.png, NAME/*.mp4 of the last column, a line of eval.jsonl: the root mean square distance
    in pixels' range [-1,1] between what was made and the clip.
    """
    true, prompts = examples["video"], examples["text"]
    seeds = [f"preview-{i}" for i in range(len(prompts))]
    told = {"words": {}}
    told |= {key: {key: examples[key]} for key in base.row.unet.maps if key in examples}
    base.net.eval()
    with run.averaged():
        made = {key: generate_split(base, run.env, prompts, seeds, sampling, run.args.batch, maps=maps)
                for key, maps in told.items()}
    base.net.train()
    if run.main:
        row = {key: (videos - true).square().mean().sqrt().item() for key, videos in made.items()}
        columns = [true, *made.values()]
        show(run, name, columns[-1], prompts, sampling.save_fps, row,
             sheet=list(zip(*columns))[:16], headers=["clip", *made])


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp",
                "smaller --height and --width")
