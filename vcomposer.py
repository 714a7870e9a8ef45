"""VideoComposer: clips that follow depth, sketches or motion (Wang et al., 2306.02018).

    L = || net(x_t, t, text, maps, image) - v ||^2

Besides the text the network sees maps as large as the clip: depth, sketches of all
frames or of the first, motion vectors, the first frame itself. A small encoder turns
each map into channels, and their sum is concatenated to the noisy latents. The CLIP
embedding of one frame, as additional tokens after the text, sets the style. All of these
are computed from the training clip, and each is dropped at random, so that any subset
works in sampling.

    python vcomposer.py --base tiny-vcomposer            # 2 CPU cores, minutes
    python vcomposer.py --weights W --data clips.csv --flow-weights raft.pth --rank 16
    torchrun --nproc_per_node=8 vcomposer.py --weights W --data clips.csv --rank 0
    python vcomposer.py ... --resume                     # continue, bit for bit
    python sample.py --ckpt out/vcomposer --prompt "a red circle" --depth depth.npy

tiny-vcomposer is tiny with encoders of depth, sketch and motion, whose channels the first
convolution does not see yet.

Writes to --out: ckpt.safetensors (averaged weights with --ema), log.jsonl, curve.png,
and before.png, step-N.png and after.png with a clip, and what is made with its caption
alone and with each of its maps; eval.jsonl holds the distance from the clip.

Memory: as t2v.py on the same base and size (not measured).

Differences from the original: its training code is not public; this follows the paper
and VGen's network.
 - The rule for dropping maps is our choice, see drop_maps().
 - Sketches are Sobel's edges, not PiDiNet's. Motion is RAFT's flow, not the codec's
   vectors, in the middle of every 16x16 pixels; without --flow-weights it is left out.
 - Masks are not trained, nor depth on real clips (the tiny world knows its own).
"""
from common import Parser, Run, run_command, trained  # first: for signals
import torch

from bases import choose_sampling, start_base
from data import clip_frames, lucas_kanade, raft, video_maps
from diffusion import diffusion_loss, draw_noise
from models import parallelize, seed_dropout
from pipeline import Clips, generate_split, show

# those of VGen's text-to-video training; the paper's own are for another base
PAPER = dict(
    base="vcomposer", out="out/vcomposer", steps=10000, lr=3e-5, warmup=10,
    offset_noise=0.1, preview_every=500, eval_n=2)
TINY = dict(
    image_share=0.0, steps=600, batch=16, lr=1e-3, lr_schedule="cosine", warmup=20,
    betas=(0.9, 0.99), wd=0.01, ema=0.99, rank=0, offset_noise=0.0, cache_latents=True,
    workers=0, grad_ckpt=False, eval_n=8, preview_every=300, log_every=50)
NONE, ALONE = 0.1, 0.4  # shares of the clips that see no map, and one map alone


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base data images")
    p.add_argument("--flow-weights",
                   help="file of torchvision's RAFT weights (default: no maps of motion, "
                        "except on tiny bases)")
    p.options("pixels sampling optimisation ema lora")
    p.add_argument("--offset-noise", type=p.UNSIGNED,
                   help="strength of noise that all pixels of a frame share: it teaches "
                        "brightness")
    p.options("machine evaluation run")
    return p.parse(argv, PAPER, {"tiny-vcomposer": TINY})


# ---- the method

@torch.no_grad()
def read_maps(base, env, video, batch, flow):
    """Clips (b,3,f,h,w) in [-1,1] -> {name of a map: (b,c,f,h,w)} on the CPU.

    "image" (b,1,d) is the CLIP embedding of the middle frame. batch: what the data set
    holds, perhaps "depth"; flow(a, b): the motion between frames, or None.
    """
    unet, block = base.row.unet, 1 if base.row.tiny else 16
    maps = [video_maps(clip, unet.maps, flow=flow, block=block) for clip in video]
    seen = {name: torch.stack([one[name] for one in maps]) for name in maps[0]}
    if "depth" in batch:
        seen["depth"] = batch["depth"]
    if unet.style_image:
        frames = clip_frames(video[:, :, video.shape[2] // 2]).to(env.device, env.dtype)
        seen["image"] = base.image_encoder(frames)[:, None].float().cpu()
    return seen


def drop_maps(names, generators):
    """-> {name: (b,) 1, or 0 where the sample does not see it}; generators: one per sample.

    A tenth of the clips sees none, so that words alone still work. Four tenths see one
    alone, all maps equally often: that is how most clips are sampled, and beside a map
    that tells more, the network would not learn to use one that tells little, such as
    motion. The others see each map with probability 1/2, which teaches combinations.
    (VGen: a tenth none, a tenth all, the others each with probability 1/2 or 0.6.)
    """
    draws = torch.stack([torch.rand(1 + len(names), generator=g) for g in generators])
    case, coins = draws[:, 0], draws[:, 1:]
    alone = case >= 1 - ALONE
    turn = ((case - (1 - ALONE)) / ALONE * len(names)).floor()  # which one is alone
    keep = {}
    for k, name in enumerate(names):
        together = (case > NONE) & (coins[:, k] > 0.5)
        keep[name] = torch.where(alone, turn == k, together).float()
    return keep


def vcomposer_loss(net, base, x0, text, seen, generators, offset=0.0):
    """The denoising loss, (b,), of latents x0 (b,c,f,h,w); images (f = 1) have no maps.

    seen: what read_maps() gave; text (b,n,d); generators: one per sample.
    """
    cond, keep = {}, {}
    if x0.shape[2] > 1:
        names = [name for name in ("image", *base.row.unet.maps) if name in seen]
        for name, on in drop_maps(names, generators).items():
            cond[name], keep[name] = seen[name].float().to(x0.device), on.to(x0.device)
    if "image" in cond:  # without it: zeros
        cond["image"] = cond["image"] * keep.pop("image")[:, None, None]

    def predict(x_t, t):
        return net(x_t, t, text, map_keep=keep, **cond)
    t, noise = draw_noise(base.schedule, x0, generators, offset)
    return diffusion_loss(predict, base.schedule, x0, noise, t)


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="vcomposer")
    clips = Clips(args, sampling, depth=True)
    examples = clips.examples(args.eval_n)
    run = Run(args, "vcomposer")

    base, flow = load(args, run)
    clips.check_words(base)
    # images leave out the encoders of maps
    net = parallelize(base.net, args, run.device, unused=True)
    params = trained({"": net})
    opt = run.adamw(params.values())
    meta = dict(sample=sampling.metadata())
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
                loss = vcomposer_loss(
                    net, base, x0, text, seen, generators, args.offset_noise)
            run.backward(loss)
        run.update()
        if run.preview_due:
            evaluate(run, base, sampling, examples, f"step-{run.done}")
    if not run.stopped:
        evaluate(run, base, sampling, examples, "after")
    run.finish("loss", "grad")


def load(args, run):
    """-> the base in training mode, what is trained in fp32; flow(a, b) for maps of motion,
    or None."""
    dtype = run.dtype if args.rank else torch.float32
    flow = raft("large", args.flow_weights, run.device) if args.flow_weights else None
    base = start_base(run, dtype, image=True, frozen=args.frozen)
    base.train_net(args, run.dtype)
    return base, lucas_kanade if base.row.tiny else flow


# ---- evaluation

@torch.no_grad()
def evaluate(run, base, sampling, examples, name):
    """Clips, and what is made with their captions, alone and with each map -> NAME.png,
    NAME/*.mp4 (of the last map), a line of eval.jsonl. Every process must call it.

    The line holds root mean square distances from the clip, for pixels in [-1,1].
    """
    true, prompts = examples["video"], examples["text"]
    seeds = [f"preview-{i}" for i in range(len(prompts))]
    known = [key for key in base.row.unet.maps if key in examples]
    made = {}
    with run.averaged(base.net):
        for key in ("words", *known):
            maps = {key: examples[key]} if key in known else {}
            made[key] = generate_split(
                base, run.env, prompts, seeds, sampling, run.args.batch, maps=maps)
    if run.main:
        row = {key: (videos - true).square().mean().sqrt().item()
               for key, videos in made.items()}
        columns = [true, *made.values()]
        show(run, name, columns[-1], prompts, sampling.save_fps, row,
             sheet=list(zip(*columns))[:16], headers=["clip", *made])


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp",
                "smaller --height and --width")
