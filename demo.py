"""DEMO: motion gets a text encoder and a conditioning of its own (Ruan et al., 2410.05097).

    L = L_diffusion + 0.1 L_video-motion + 0.1 L_text-motion + 0.1 L_regularization

      diffusion       | net(x_t, t) - target |^2        target: the noise, or v if the base has v
      video motion    | D(net(x_t, t)) - D(target) |^2  D(u)[f] = |u[f+1] - u[f]| over frames
      text motion     -cos(flow of the attention maps, flow of the clip)
      regularization  -cos(motion encoder's feature of the caption, image embedding)

The base's text encoder, now the content encoder, still tells its spatial transformers what
to show. After each of them comes a new motion block: a copy that attends over the frames
of a pixel, and to the tokens of a second text encoder, the motion encoder.

    part                    starts as             trained by
    motion blocks (274 M)   spatial transformers  diffusion, video motion, text motion
    motion encoder (164 M)  content encoder       all four, in its blocks from --encoder-from
    base, content encoder, optical flow, image tower: never

    python demo.py --base tiny-weak         # tiny, its text encoder made blind to motions
    python demo.py --base modelscope --weights W --data clips.csv    # as published, 1 GPU
    torchrun --nproc_per_node=4 demo.py --weights W --data clips.csv --parallel fsdp
    python demo.py --base demo --weights W --data clips.csv      # from the public DEMO
    python demo.py ... --resume             # continue, bit for bit
    python sample.py --ckpt out/demo --prompt "a red circle moving left" --sequential

Writes to --out: ckpt.safetensors (blocks and encoder), log.jsonl with all loss terms,
curve.png, before.png, after.png and their clips, on tiny eval.jsonl (the judge's verdict).

Differences from the original code (the others: docs/differences/demo.md)
 - The text-motion loss has a gradient. (There, activation checkpointing cuts it off.)
   --as-published: without it; and DeepSpeed's OneCycle sets the rate, not --lr.
 - Frozen parts have no gradients. (There, RAFT and others accumulate unused ones.)
 - The frame to embed is scaled to [0,1]. (Published: a cast that folds its dark half.)
 - Guidance reads the negative prompt by both encoders: --drop-motion trains that (on tiny
   0.1), but does not pull the feature of the negative prompt to the clip's image.
"""
from common import Parser, Run, UserError, run_command, seed_of, trained  # first: for signals
import torch
import torch.nn.functional as F

import data
import pipeline
import tinyworld
from bases import NEGATIVE, base_row, choose_sampling, start_base
from diffusion import diffusion_loss, randn
from models import MotionBlock, parallelize, seed_dropout

PAPER = dict(
    base="modelscope", out="out/demo", video_motion=0.1, text_motion=0.1,
    regularization=0.1, steps=20000, batch=4, accum=4, lr=5e-5, warmup=10, encoder_lr=1e-6,
    encoder_from=10, drop_motion=0.0, read_fps=3.0, negative=NEGATIVE, zero=2, eval_n=4)
TINY = dict(
    steps=240, batch=16, accum=1, lr=2e-3, lr_schedule="cosine", warmup=20, encoder_lr=5e-3,
    encoder_from=0, drop_motion=0.1, betas=(0.9, 0.99), wd=0.01, ema=0.98, negative=None,
    cache_latents=True, workers=0, grad_ckpt=False, log_every=20, eval_n=64)


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base")
    p.add_argument("--video-motion", type=p.UNSIGNED, help="weight of the video-motion loss")
    p.add_argument("--text-motion", type=p.UNSIGNED,
                   help="weight of the text-motion loss; 0: no optical flow is computed")
    p.add_argument("--regularization", type=p.UNSIGNED,
                   help="weight of the regularization loss; 0: no image tower is loaded")
    p.add_argument("--encoder-from", type=p.NATURAL,
                   help="first block of the motion encoder to train (CLIP's: 0 to 22); 0 "
                        "trains its embeddings, too")
    p.add_argument("--encoder-lr", type=p.POSITIVE,
                   help="learning rate of the motion encoder (--lr: the motion blocks')")
    p.add_argument("--drop-motion", type=p.SHARE,
                   help="as --drop-text, for the captions that the motion encoder reads")
    p.add_argument("--as-published", action="store_true",
                   help="no gradient through the attention maps; OneCycle's rate")
    p.add_argument("--flow-weights",
                   help="file of torchvision's RAFT weights (default: download raft_small)")
    p.add_argument("--zero", type=int, choices=(2, 3),
                   help="with fsdp: 2 shards gradients and moments, 3 the weights, too")
    p.options("data pixels sampling optimisation ema machine evaluation run", without=("--fps",))
    return p.parse(argv, PAPER, {"tiny": TINY, "tiny-weak": TINY})


# ---- the losses: one value per sample (b,), unweighted

def video_motion_loss(out, target):
    """Mean of (D(out) - D(target))^2, D(u)[f] = |u[f+1] - u[f]|. (b,c,f,h,w) -> (b,)."""
    change, wanted = (u.float().diff(dim=2).abs() for u in (out, target))
    return (change - wanted).square().flatten(1).mean(1)


def text_motion_loss(maps, clip_flow, optical_flow):
    """-cos(flow of the attention maps, flow of the clip), mean over resolutions, (b,).

    maps: one (b,h,w,f) per motion block, first to last, of the block's latent resolution.
    models.Attention.map_of makes them in the block's attention to the motion encoder's
    tokens: how much pixel (h,w) of frame f attends to the end-of-text token, which has
    read the whole caption; 0 to 1, mean over heads. They have a gradient to both parts.
    clip_flow (b,f-1,2,H,W): the clip's optical flow, each frame to the next.
    optical_flow(a, b): pictures (n,3,h,w) -> (n,2,h,w), pixels from a to b.
    """
    same_size, cosines = {}, []
    for attention in maps:
        same_size.setdefault(attention.shape[1:3], []).append(attention.float())
    for size, group in same_size.items():
        grey = torch.stack(group).mean(0).permute(0, 3, 1, 2)[:, None]  # b 1 f h w
        # small maps are enlarged to the clip's flow: optical flow needs some pixels
        grey = data.resize(grey, max(min(size), min(clip_flow.shape[-2:])))
        moved = data.frame_flow(optical_flow, grey.expand(-1, 3, -1, -1, -1))
        wanted = data.resize(clip_flow.float(), moved.shape[-2:])
        cosines.append(F.cosine_similarity(moved.flatten(1), wanted.flatten(1), eps=1e-8))
    return -torch.stack(cosines).mean(0)


def regularization_loss(feature, image):
    """-cos(motion encoder's end-of-text feature, image embedding), both (b,d) -> (b,)."""
    # as published, the feature is not projected into CLIP's joint space; the widths agree
    return -F.cosine_similarity(feature.float(), image.float(), eps=1e-8)


def demo_losses(net_fn, schedule, x0, noise, t, clip_flow, optical_flow, feature, image,
                detach=False, captioned=1.0):
    """The terms of L, {name: (b,)}; without optical_flow or image (None) not theirs.

    net_fn(x_t, t) -> prediction (b,c,f,h,w) and maps; without optical_flow that alone.
    x0, noise (b,c,f,h,w); t (b,); the rest as above. detach: no gradient through maps.
    captioned (b,): 1, or 0 where the feature is that of the negative prompt.
    """
    answer = net_fn(schedule.add_noise(x0, noise, t), t)
    out, maps = answer if optical_flow else (answer, ())
    terms = {"diffusion": diffusion_loss(lambda *_: out, schedule, x0, noise, t),
             "video_motion": video_motion_loss(out, schedule.target(x0, noise, t))}
    if optical_flow:
        maps = [attention.detach() for attention in maps] if detach else maps
        terms["text_motion"] = text_motion_loss(maps, clip_flow, optical_flow)
    if image is not None:  # the negative prompt says nothing about this image
        terms["regularization"] = captioned * regularization_loss(feature, image)
    return terms


def clip_losses(net, base, batch, x0, generators, args, negative, optical_flow):
    """demo_losses() of a batch of encode_clips(); x0: its scaled latents (b,c,f,h,w).

    generators, one per clip, draw: step, dropped caption for either encoder, noise.
    """
    draws = torch.stack([torch.rand(3, generator=g) for g in generators])
    u_step, u_text, u_motion = draws.T
    t = base.schedule.steps(u_step).to(x0.device)
    noise = randn(x0.shape, generators).to(x0.device)
    drop_text, drop_motion = u_text < args.drop_text, u_motion < args.drop_motion
    content_words, motion_words = (
        [negative if dropped else text for text, dropped in zip(batch["text"], drop)]
        for drop in (drop_text, drop_motion))
    text = base.encode_text(content_words)                # b n d
    motion = base.encode_text(motion_words, motion=True)  # b n d
    end = base.end_of_text(motion_words).to(x0.device)    # b, the token's position

    def net_fn(x, t):  # answers with maps if it is asked for those of a token
        return net(x, t, text, motion_text=motion, eot=end if optical_flow else None)
    feature = motion[range(len(end)), end]                # b d
    taught = {k: batch[k].to(x0.device) for k in ("flow", "image") if k in batch}
    return demo_losses(
        net_fn, base.schedule, x0, noise, t, taught.get("flow"), optical_flow, feature,
        taught.get("image"), args.as_published, captioned=(~drop_motion).to(x0))


def onecycle(step, low=1e-5, high=5e-5, half=2000, decay=0.001, decay_steps=10000,
             momentum=(0.85, 0.99)):
    """DeepSpeed's OneCycle, as published -> (lr, beta1, beta2) of an update, from 0."""
    if step >= 2 * half:
        return low / (1 + decay * (step - 2 * half) / decay_steps), momentum[1], 0.99
    height = min(step, 2 * half - step) / half
    beta1 = momentum[1] - (momentum[1] - momentum[0]) * height if step else momentum[0]  # sic
    return low + (high - low) * height, beta1, 0.99


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="demo")
    clips, rows, prompts = read_clips(args, sampling)
    run = Run(args, "demo")
    weights = {"diffusion": 1.0, "video_motion": args.video_motion,
               "text_motion": args.text_motion, "regularization": args.regularization}

    optical_flow = load_flow(args, run.device)
    base = start_base(run, torch.float32, motion=True, image=args.regularization > 0)
    if base.row.tiny:  # refuses words that the tiny world does not know
        base.tokenize([*prompts, sampling.negative, *(caption for _, _, caption in rows)])
    embed_image = image_embedding(args, base, run)
    train_motion(base, args.encoder_from, run.dtype)
    base.net.grad_ckpt = args.grad_ckpt
    base.net.train()
    shards = args, run.device, args.zero == 3
    net = parallelize(base.net, *shards)
    base.motion_encoder = encoder = parallelize(base.motion_encoder, *shards)
    blocks, words = trained({"": net}), trained({"motion_encoder.": encoder})
    groups = [dict(params=list(blocks.values())),
              dict(params=list(words.values()), lr_factor=args.encoder_lr / args.lr)]
    opt = run.adamw(groups)
    run.attach(opt, blocks | words, [net, encoder], base.parts(),
               dict(sample=sampling.metadata()), ema_decay=args.ema)

    def encode(batch):
        return encode_clips(base, run.env, batch["video"], optical_flow, embed_image)
    if args.cache_latents:  # then the content encoder and the image tower are done
        about = dict(size=sampling.size, fps=args.read_fps, rows=seed_of(rows),
                     flow=bool(optical_flow), image=bool(embed_image))
        clips = pipeline.cache_latents(run, clips, encode, about)
        base.remember([*clips.texts(), sampling.negative, *prompts], run.env, motion_too=False)
        base.image_encoder = embed_image = None
    batches = data.read_batches(clips, run.numbers, args.seed, args.workers)
    if not run.resumed:
        pipeline.preview(run, base, sampling, prompts, "before")
    for step in run.steps():
        for group in opt.param_groups if args.as_published else ():
            group["lr"], *group["betas"] = onecycle(step)
        for numbers in run.micro_steps():
            batch, generators = next(batches), run.generators(numbers)
            batch |= {} if args.cache_latents else encode(batch)
            x0 = pipeline.draw_latents(base, run.env, batch, generators)
            seed_dropout(net, args.seed, numbers)
            with run.forward():
                terms = clip_losses(net, base, batch, x0, generators, args,
                                    sampling.negative, optical_flow)
                loss = sum(weights[name] * term for name, term in terms.items())
            run.backward(loss, loss=loss, **terms)
        run.update()
        if run.preview_due:
            pipeline.preview(run, base, sampling, prompts, f"step-{run.done}")
    if not run.stopped:
        pipeline.preview(run, base, sampling, prompts, "after")
    run.finish("loss", *weights)


# ---- clips, teachers, what trains

def read_clips(args, sampling):
    """-> data set of clips, --data's rows (number, path, caption), evaluation prompts."""
    if args.data:
        clips = pipeline.open_data(args, pipeline.bucket_sizes(args, sampling.size, 2))
        rows, prompts = clips.rows, [clips.rows[0][2]]
    elif base_row(args.base).tiny:
        flawed = base_row(args.base).flawed
        clips, rows = tinyworld.TinyWorld(2048, sampling.frames, args.seed, flawed=flawed), []
        prompts = tinyworld.tiny_prompts(held_out=True)
    else:
        raise UserError("--data: give a folder, csv, jsonl or list of clips with captions")
    prompts = data.read_prompts(args.eval_prompts) if args.eval_prompts else prompts
    return clips, rows, prompts[:args.eval_n]


def load_flow(args, device):
    """-> optical_flow of text_motion_loss() or None; tiny clips need no network."""
    if not args.text_motion:
        return None
    tiny = base_row(args.base).tiny
    return data.lucas_kanade if tiny else data.raft("small", args.flow_weights, device)


def image_embedding(args, base, run):
    """-> embed(frames (b,3,h,w) in [-1,1]) -> (b,d), or None: CLIP, on tiny the scorer."""
    if not args.regularization:
        return None
    if base.row.tiny:
        return tinyworld.tiny_image_embedding(run.device)
    size = base.row.text.image_size
    return lambda frames: base.image_encoder(
        data.clip_frames(frames, size).to(run.device, run.dtype))


@torch.no_grad()
def encode_clips(base, env, video, optical_flow, embed_image):
    """Clips (b,3,f,h,w) in [-1,1] -> latents' "mean" and "std", "flow" (b,f-1,2,H,W), at most
    128 pixels as published, "image" (b,d): the middle frame's embedding; on the CPU."""
    video = video.to(env.device)
    encoded = pipeline.encode_clips(base, env, video)
    if optical_flow:
        encoded["flow"] = data.frame_flow(optical_flow, video, min(128, *video.shape[3:])).cpu()
    if embed_image:
        encoded["image"] = embed_image(video[:, :, video.shape[2] // 2]).float().cpu()
    return encoded


def train_motion(base, first, dtype):
    """Train motion blocks and the motion encoder, from block `first` on (0: all of it)."""
    encoder, blocks = base.motion_encoder, base.motion_encoder.units()
    if first >= len(blocks):
        raise UserError(f"--encoder-from {first}: the motion encoder has the blocks "
                        f"0..{len(blocks) - 1}")
    base.freeze(dtype, but=("net", "motion encoder"))  # what trains stays in fp32
    motion_blocks = [m for m in base.net.modules() if isinstance(m, MotionBlock)]
    for module in motion_blocks + (blocks[first:] if first else [encoder]):
        module.requires_grad_(True)
    for p in base.net.parameters():
        p.data = p.data if p.requires_grad else p.data.to(dtype)


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp",
                "smaller --height and --width")
