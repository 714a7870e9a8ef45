"""DreamVideo: your subject, your motion or both, by adapters (Wei et al., 2312.04433).

    L = E_{x0, eps, t} || m * (net(x_t, t, text, image) - eps) ||^2
    A(x) = x + up(gelu(down(x + s cond(image))))         an adapter; up is zero at first

    stage     trains                 frozen       data            mask m   image
    token     the word *: vectors    all else     3-6 pictures    yes      none
    identity  adapters S             all else     3-6 pictures    yes      none
    motion    adapters M             all else     1 clip or more  none     a random frame

S: one per spatial transformer beside its attention to the text: x + attn(x, text) becomes
S(x) + attn(x, text). M: likewise three per temporal transformer, beside both attentions
over frames and the feed-forward layer. Only M reads an image, the CLIP embedding of a
frame, for how things look; s = 1 in training. New adapters are the identity, A(x) = x.

Subject and motion are learned apart. Sampling loads S and M into one network:

    e = u + w (c - u),  c = net_SM(x_t, t, "a * running", image), s = s_c
                        u = net_SM(x_t, t, negative, zeros),      s = s_u

sample.py --strength gives s_c, s_u. With --subject-below T (ours), S is on at t < T only:
the path is decided before the subject, which was learned from still pictures, acts.

    python dreamvideo.py --base tiny --stage token --out out/token
    python dreamvideo.py --base tiny --stage identity --learned out/token --out out/dog
    python dreamvideo.py --base tiny --stage motion --out out/motion
    python sample.py --ckpt out/dog --ckpt out/motion --subject-below 300 --prompt "a *"
    python dreamvideo.py --weights W --stage token --data dog --word-init dog --out w
    torchrun --nproc_per_node=4 dreamvideo.py --weights W --stage motion --data clips
    python dreamvideo.py ... --resume            # continue, bit for bit
    python sample.py --ckpt out/dog:500 --ckpt out/motion:1500 ...     # RUN:STEP

Differences from the original code are in docs/differences/dreamvideo.md.
"""
from common import Parser, Run, UserError, run_command, trained  # first: for signals
import os

import torch
import torch.nn.functional as F
from torch import nn

import data
import pipeline
import tinyworld
from bases import base_row, choose_sampling, read_words, start_base
from diffusion import diffusion_loss, randn
from models import Adapter, compile_blocks, parallelize, seed_dropout
from weights import LEARNED

WORD = f"{LEARNED}*"  # key of the word's vectors in checkpoints, as in DreamVideo's files
WITH_ADAPTERS = {"tiny": "tiny-dreamvideo", "modelscope-v1.5": "dreamvideo"}
PAPER = dict(
    base="dreamvideo", out="out/dreamvideo", stage="token", vectors=1, masked_loss=True,
    picture_frames=1, drop_text=0.0, drop_image=0.0, offset_noise=0.1, warmup=10,
    clip=1e9, keep=10, eval_n=16)
STAGES = {
    "token": dict(steps=3000, batch=4, lr=1e-4, save_every=200),
    "identity": dict(steps=1000, batch=4, lr=1e-5, save_every=100),
    "motion": dict(steps=1000, batch=1, lr=1e-5, save_every=100, drop_text=0.5, drop_image=0.5)}
# tiny never saw single frames, so pictures stand still or move for 8; its word is two vectors
TINY = dict(
    vectors=2, word_init="white circle", masked_loss=False, picture_frames=8,
    offset_noise=0.0, batch=4, betas=(0.9, 0.99), lr_schedule="cosine", cache_latents=True,
    workers=0, grad_ckpt=False, log_every=50)
TINY_STAGES = {
    "token": dict(steps=200, lr=2e-2), "identity": dict(steps=700, lr=4e-3),
    "motion": dict(steps=500, lr=3e-3, drop_text=0.0, drop_image=1.0, motion="circling")}


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base")
    p.add_argument("--stage", choices=STAGES, help="what to learn, see the table above")
    p.add_argument("--motion", choices=tinyworld.MOTIONS + tinyworld.NEW_MOTIONS,
                   help="tiny bases: the clips' motion")
    p.add_argument("--learned", metavar="FILE",
                   help="words of a textual inversion: a run of dreamvideo.py or DreamVideo's file")
    p.add_argument("--word-init",
                   help="words whose vectors it starts from (default: random)")
    p.add_argument("--vectors", type=p.COUNT, help="number of vectors of the word")
    p.add_argument("--masked-loss", action=p.YES_NO, help="only the subject's pixels count")
    p.add_argument("--picture-frames", type=p.COUNT, help="frames of a still picture")
    p.add_argument("--drop-image", type=p.SHARE,
                   help="probability of dropping the image condition")
    p.add_argument("--offset-noise", type=p.UNSIGNED,
                   help="strength of noise that all pixels of a frame share: it teaches brightness")
    p.options("data pixels sampling optimisation machine evaluation run",
              without=("--fps", "--buckets"))
    stage = p.parse_known_args(argv)[0].stage or PAPER["stage"]
    tiny = TINY | TINY_STAGES[stage]
    args = p.parse(argv, PAPER | STAGES[stage], {"tiny": tiny, "tiny-dreamvideo": tiny})
    args.base = WITH_ADAPTERS.get(args.base, args.base)
    moving = args.base == "tiny-dreamvideo" and stage == "motion"
    if args.motion and not (moving and args.motion in tinyworld.NEW_MOTIONS):
        raise UserError(f"--motion {args.motion}: --base tiny --stage motion has "
                        f"{', '.join(tinyworld.NEW_MOTIONS)}")
    if args.learned and stage != "identity":
        raise UserError("--learned: only --stage identity goes on from a word")
    if args.word_init and len(args.word_init.split()) not in (1, args.vectors):
        raise UserError(f"--word-init {args.word_init!r}: give one word, or one for each of the "
                        f"{args.vectors} vectors")
    return args


# ---- the method

def adapter_loss(net, schedule, x0, noise, t, text, mask=None, **cond):
    """L, (b,): x0 (b,c,f,h,w) latents; m (b,1,f,h,w) of 0 and 1; mean over all positions."""
    return diffusion_loss(lambda x, t: net(x, t, text, **cond), schedule, x0, noise, t, mask)


def clip_loss(net, base, batch, x0, generators, args, negative):
    """adapter_loss() of a batch of encode(); x0: its scaled latents (b,c,f,h,w).

    generators, one per clip, draw step, dropped caption, frame, dropped image, offset, noise.
    """
    draws = torch.stack([torch.rand(4, generator=g) for g in generators])
    u_step, u_text, u_frame, u_image = draws.T
    t = base.schedule.steps(u_step).to(x0.device)
    shared = randn((*x0.shape[:3], 1, 1), generators)
    noise = (randn(x0.shape, generators) + args.offset_noise * shared).to(x0.device)
    captions = [negative if u < args.drop_text else caption
                for caption, u in zip(batch["text"], u_text)]
    text, cond, mask = base.encode_text(captions), {}, batch.get("mask")
    if args.stage == "motion":
        frames = [clip[int(u * len(clip))] for clip, u in zip(batch["pictures"], u_frame)]
        pixels = torch.stack(frames).to(next(base.image_encoder.parameters()))
        image = base.image_encoder(pixels)  # b d; zeros where it is dropped, as published
        image = image * (u_image >= args.drop_image).to(image)[:, None]
        cond["appearance"] = image[:, None].float()  # b 1 d: the same for all frames
    mask = None if mask is None else mask.to(x0)
    return adapter_loss(net, base.schedule, x0, noise, t, text, mask, **cond)


def first_vectors(base, args, g):
    """Where the word starts, (N, width): --word-init's words, or uniform in 0..1."""
    table = base.text_encoder.token_embedding.weight
    if not args.word_init:
        return torch.rand(args.vectors, table.shape[1], generator=g)
    # of each word its first token; CLIP's texts begin with a start token
    tokens = base.tokenize(args.word_init.split())[:, 0 if base.row.tiny else 1]
    return table[tokens.to(table.device)].float().expand(args.vectors, -1).clone()


def prepare(args, base, run):
    """What the stage trains gets gradients, in fp32. -> {WORD: its vectors}, or {}."""
    if args.stage == "token":
        vectors = first_vectors(base, args, run.generator("token")).to(run.device)
        base.learned = {base.token_of("*"): nn.Parameter(vectors)}
    elif args.learned:
        base.learn(read_words(base, args.learned), f"--learned {args.learned}")
    for adapter in (m for m in base.net.modules() if isinstance(m, Adapter)):
        stage = "motion" if adapter.condition_linear else "identity"  # S reads no image
        if stage == args.stage:
            adapter.float().requires_grad_(True)
        if not adapter.up_linear.weight.any():  # new, all zeros: draw the rest
            for layer in filter(None, (adapter.down_linear, adapter.condition_linear)):
                drawn = nn.Linear(layer.in_features, layer.out_features)  # on the CPU
                layer.load_state_dict(drawn.state_dict())
    return dict(zip([WORD], base.learned.values()))


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="dreamvideo")
    clips, previews, measure = read_data(args, sampling)
    texts = [caption for _, _, caption in clips.rows]
    if args.stage == "identity" and not args.learned and any("*" in x.split() for x in texts):
        raise UserError("--learned: the captions hold *; give the word of --stage token")
    run = Run(args, "dreamvideo")
    base = start_base(run, run.dtype)
    texts += [sampling.negative, *(prompt for _, prompt in previews)]
    base.tokenize(texts)  # refuses words that the tiny world does not know
    word = prepare(args, base, run)
    base.net.grad_ckpt = args.grad_ckpt
    base.net.train()
    if args.stage == "token":
        net = compile_blocks(base.net, args, run.device)
    else:  # the text tower is done, too
        net = parallelize(base.net, args, run.device)
        base.remember(texts, run.env)
    params = trained({"": net}) | word
    learning = [p for p in params.values() if p.requires_grad]
    opt = run.adamw(learning)
    run.attach(opt, params, [net], base.parts() | {"word": nn.ParameterList(word.values())},
               dict(stage=args.stage, sample=sampling.metadata()))

    def encode(batch):
        encoded = {k: v for k, v in batch.items() if k == "mask"}
        if args.stage == "motion":  # each frame as the image tower reads it
            encoded["pictures"] = pipeline.tower_frames(base, batch["video"], sampling.width)
        return encoded | pipeline.encode_clips(base, run.env, batch["video"])
    if args.cache_latents:
        about = dict(size=sampling.size, fps=args.read_fps, still=args.picture_frames,
                     data=args.data, motion=args.motion, masked=args.masked_loss)
        clips = pipeline.cache_latents(run, clips, encode, about)
    batches = data.read_batches(clips, run.numbers, args.seed, args.workers)
    if not run.resumed:
        evaluate(run, base, sampling, previews, measure, "before")
    for _ in run.steps():
        for numbers in run.micro_steps():
            batch, generators = next(batches), run.generators(numbers)
            batch |= {} if args.cache_latents else encode(batch)
            x0 = pipeline.draw_latents(base, run.env, batch, generators)
            seed_dropout(net, args.seed, numbers)
            with run.forward():
                loss = clip_loss(net, base, batch, x0, generators, args, sampling.negative)
            run.backward(loss)
        if args.stage == "token" and run.env.world > 1:  # its word is outside of DDP
            torch.distributed.all_reduce(word[WORD].grad.div_(run.env.world))
        run.update()
        if run.preview_due:
            evaluate(run, base, sampling, previews, measure, f"step-{run.done}")
    if not run.stopped:
        evaluate(run, base, sampling, previews, measure, "after")
    run.finish("loss", "grad")


# ---- pictures, masks, clips

def read_data(args, sampling):
    """-> clips, previews [(image or None, prompt)], measure(videos) -> {name: float}."""
    row, (frames, *size), measure = base_row(args.base), sampling.size, None
    if not row.tiny and not args.data:
        raise UserError("--data: give a folder or list of pictures (--stage motion: clips)")
    if args.learned and not os.path.exists(args.learned):
        raise UserError(f"--learned {args.learned}: no such file, nor a run's folder")
    previews = tinyworld.tiny_previews(args.stage != "motion")
    if args.stage == "motion" and args.data:
        clips = pipeline.open_data(args, [sampling.size])
        previews = [(pipeline.frame_picture(clips[0, 0]["video"][:, 0]), clips.rows[0][2])]
    elif args.stage == "motion":
        clips, path = tinyworld.tiny_motion(args.seed, 3, args.motion, frames)
        measure = lambda videos: tinyworld.path_error(videos, path)
    else:
        cells = [side // row.vae.factor for side in size] if args.masked_loss else None
        if args.data:
            shown = read_subject(args.data, size, cells, args.data_root)
            previews = [(None, shown[0]["text"])]
        else:
            subject = tinyworld.tiny_subject(args.seed, 4)
            measure = lambda videos: tinyworld.subject_likeness(videos, subject)
            shown = tinyworld.moved_pictures(subject, args.picture_frames)
        clips = data.Few([stand_still(item, args.picture_frames, cells) for item in shown])
    if args.eval_prompts:
        previews = [line[:2] for line in pipeline.read_image_rows(args.eval_prompts, row)]
    return clips, previews[:args.eval_n], measure


def read_subject(source, size, cells=None, root=None):
    """Pictures of a subject -> [{"video" (3,1,h,w) in [-1,1], "text", "mask" (1,1,*cells)}]

    source: a folder, or a .txt of DreamVideo's lines picture|||caption, {} meaning *.
    root: see data.listed_path(). size (h, w) in pixels; cells: in latents, for
    masks/NAME.png; None: without masks.
    """
    if not os.path.exists(source):
        raise UserError(f"{source}: no such folder or list of pictures")
    if os.path.isdir(source):
        rows = [(picture, "a *") for picture in data.list_pictures(source)]
    else:
        rows = data.read_image_prompts(source, root)
    items = []
    for path, text in rows:
        picture = data.open_image(path)
        pixels = data.image_tensor(data.center_crop_wide(picture, size))
        items.append({"video": pixels[:, None], "text": text.replace("{}", "*")})
        if cells:
            file = path.parent / "masks" / f"{path.stem}.png"
            if not file.is_file():
                raise UserError(f"{file}: no mask for {path.name}; --no-masked-loss needs none")
            items[-1]["mask"] = data.read_mask(file, picture.size, cells)[None]
    return items


def stand_still(item, frames, cells=None):
    """A picture -> a clip of equal frames, with its mask if there are cells (h, w)."""
    clip = {"video": item["video"].expand(-1, frames, -1, -1), "text": item["text"]}
    if cells:  # a cell counts if any of it is the subject's
        clip["mask"] = F.adaptive_max_pool2d(item["mask"], cells).expand(-1, frames, -1, -1)
    return clip


@torch.no_grad()
def evaluate(run, base, sampling, previews, measure, name):
    """Clips of the previews, always from the same noise -> NAME.png, clips, eval.jsonl."""
    images, prompts = zip(*previews)
    seeds = [f"eval-{i}" for i in range(len(prompts))]
    with run.averaged(base.net):
        videos = pipeline.generate_split(
            base, run.env, prompts, seeds, sampling, run.args.batch, images)
    if run.main:
        row = measure(videos) if measure else None
        pipeline.show(run, name, videos, prompts, sampling.save_fps, row)


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--offload", "fewer --frames",
                "smaller --height and --width")
