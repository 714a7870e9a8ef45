"""VideoLCM: distil a text-to-video base into a student that needs 1 to 8 steps (Wang et
al., arXiv 2312.09109), by latent consistency distillation (Luo et al., arXiv 2310.04378).

    L = E || f(x_t, t; theta) - f(x_s, s; theta-) ||     (2310.04378, eq. 15, algorithm 1)

    f(x, t) = c_skip(t) x + c_out(t) x0(net(x, t, text))      the jump to the clean clip
    c_skip(t) = sigma_data^2 / ((10 t)^2 + sigma_data^2)      sigma_data = 0.5; 10 is the
    c_out(t) = 10 t / sqrt((10 t)^2 + sigma_data^2)           timestep scaling
    || d || = mean of sqrt(d^2 + c^2) - c                     pseudo-Huber, c = 0.001

f jumps from any noise to the clean clip: f(x, 0) = x, and two neighbours on one path must
land at the same place. x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps is a noised clip. Its
neighbour x_s is one DDIM step of the base (the teacher) with guidance u + w (c - u), from
t to s = t - 1000 / origin. theta are the student's weights, theta- the target's, a moving
average of them. So the student learns guidance, too, and a clip costs 4 network calls
instead of 2 x 50. With flow matching the step is Euler's, and f = x0 = x - sigma net(x, t,
text): it is x at sigma = 0. T2V-Turbo (Li et al., arXiv 2405.18750) adds

    --cfg-range   w is drawn per clip and given to the student: --cfg still works
    --reward      L - E r(decode(f(x_t, t; theta)), text), a reward of the jump (eq. 13)

    python videolcm.py --base tiny-clean                  # 2 CPU cores, minutes
    python videolcm.py --base tiny-clean --rank 16 --lr 1e-3 --reward tiny:0.1
    torchrun --nproc_per_node=4 videolcm.py --weights W --data clips.csv --parallel fsdp
    python videolcm.py --base videocrafter2 --weights W --data clips.csv --reward hps
    python videolcm.py ... --resume                       # continue, bit for bit
    python sample.py --ckpt out/videolcm --prompt "a red circle moving left"

Writes to --out: ckpt.safetensors (the target), log.jsonl, curve.png, and before.png,
step-N.png and after.png: held-out prompts in 1, 2, 4 and 8 steps, always from the same
noise, with the clips of --sample-steps steps.

Memory: for all 1.41 G weights of ModelScope, student, gradients, two moments and target
take 28 GB in fp32, the teacher 3 GB in bf16, plus activations (not measured).

Differences from the original code (the others: docs/differences/videolcm.md)
 - The target is saved and sampled from. (VideoLCM's files are the student.)
 - The scale is --cfg, w in u + w (c - u): VideoLCM's 9 and T2V-Turbo's 5 to 15 are 10
   and 6 to 16 here.
 - Teacher and target have no dropout. (There they stay in training mode, an oversight.)
"""
from common import Parser, Run, UserError, run_command, seed_of, trained  # first: for signals
from dataclasses import replace
from functools import partial

import torch

import data
import models
import pipeline
import rewards
import tinyworld
from bases import add_guidance, base_row, choose_sampling, start_base
from diffusion import consistency, guided, randn

GUIDANCE_DIM = 256  # numbers that tell the student the scale, as in T2V-Turbo
SHOWN = 1, 2, 4, 8  # sampler steps of the previews

# VideoLCM's configuration; T2V-Turbo's for VideoCrafter2.
PAPER = dict(
    base="tft2v", out="out/videolcm", origin=50, sample_steps=4, reward_frames=5,
    steps=32000, accum=16, lr=3e-5, warmup=10, ema=0.95, rank=0, preview_every=500, eval_n=4)
TURBO = dict(
    fps=16, cfg=8.5, cfg_range=(6.0, 16.0), steps=10000, accum=2, lr=1e-5, warmup=0,
    ema=0.0, rank=64, alpha=64.0)
TINY = dict(
    origin=20, cfg=1.5, steps=300, batch=8, accum=1, lr=5e-4, lr_schedule="cosine",
    warmup=20, cache_latents=True, workers=0, grad_ckpt=False, preview_every=100,
    save_every=100, log_every=25)
# ours: nobody published such a run on these transformers
COGVIDEOX = dict(steps=10000, accum=2, lr=1e-5, warmup=0, rank=64, alpha=64.0)
OPENSORA = COGVIDEOX | dict(lora_targets=["qkv", "q_linear", "kv_linear"])
WAN = COGVIDEOX | dict(frames=33, lora_targets=["q", "k", "v", "o"])
PRESETS = {"tft2v": dict(cfg=10.0), "videocrafter2": TURBO, "opensora": OPENSORA} | (
    dict.fromkeys(("tiny", "tiny-clean", "tiny-weak", "tiny-wan"), TINY)
    | dict.fromkeys(("cogvideox-2b", "cogvideox-5b"), COGVIDEOX)
    | dict.fromkeys(("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-ti2v-5b"), WAN))


def get_args(argv=None):
    p = Parser(__doc__)
    p.options("base data pixels sampling", without=("--drop-text", "--eta"))
    p.add_argument("--cfg-range", type=p.REAL, nargs=2, metavar=("LOW", "HIGH"),
                   help="draw the scale of the teacher's guidance from here, per clip, and "
                        "tell it to the student (default: always --cfg)")
    p.add_argument("--origin", type=p.COUNT,
                   help="steps of the teacher's DDIM or Euler, from noise to clip; divides 1000")
    p.options("reward")
    p.add_argument("--reward-frames", type=p.COUNT,
                   help="random frames per clip that the reward sees, if it judges frames")
    p.options("optimisation")
    p.add_argument("--ema", type=p.DECAY,
                   help="decay of the weights' moving average, which is what gets saved; 0: "
                        "no average (default: 0.95, VideoCrafter2 0; the average is the target, "
                        "so with 0 the target is the student)")
    p.options("lora machine evaluation run")
    args = p.parse(argv, PAPER, PRESETS)
    if 1000 % args.origin:
        raise UserError(f"--origin {args.origin}: must divide 1000, such as 50 or 20")
    if args.sample_steps > args.origin:
        raise UserError(f"--sample-steps {args.sample_steps}: this consistency model takes 1 to "
                        f"{args.origin}")
    if args.cfg_range and args.cfg_range[0] > args.cfg_range[1]:
        raise UserError("--cfg-range: the first is the lower one")
    if args.cfg_range and not isinstance(base_row(args.base).net, models.UNetConfig):
        raise UserError("--cfg-range: only UNets can be told the scale; give one with --cfg")
    if not args.data and not base_row(args.base).tiny:
        raise UserError("--data: give a folder, csv, jsonl or list of clips with captions")
    return args


# ---- the method

def pseudo_huber(a, b, c=0.001):
    """|| a - b ||, (b,), in fp32: nearly the mean of |a - b|, but smooth at 0 (Song and
    Dhariwal, arXiv 2310.14189)."""
    return ((a.float() - b.float()).square() + c ** 2).sqrt().sub(c).flatten(1).mean(1)


def consistency_step(student, teacher, target, schedule, x0, eps, n, origin=50, c=0.001,
                     size=None):
    """-> the loss of each clip (b,), and the student's jumps to clean latents, like x0.

    f is diffusion.consistency(), which the sampler calls, too. student, teacher (with
    guidance), target: fn(x, t (b,)) -> the network's answer. x0, eps: clean latents and
    noise (b,c,f,h,w). n (b,): which of the teacher's `origin` steps to look at; 0 is the
    last one, which ends at step 0. c: of the norm. size: of the clips in pixels, see Flow.
    """
    t = schedule.grid(n + 1, origin, size)  # 19, 39, ..., 999 if origin = 50
    s = schedule.grid(n, origin, size)      # 0 for t = 19: the teacher's own clip, f(x, 0) = x
    x_t = schedule.add_noise(x0, eps, t)
    with torch.no_grad():
        out = teacher(x_t, t).float()
        # DDIM (2010.02502, eq. 12): what `out` says of the clip and of the noise, mixed anew;
        # with flow matching this is Euler's step
        x_s = schedule.add_noise(schedule.to_x0(out, x_t, t), schedule.to_eps(out, x_t, t), s)
        # f(x_s, s; theta-), where the student should land
        wanted = consistency(schedule, target(x_s, s).float(), x_s, s)
    # f(x_t, t; theta), where it lands
    jump = consistency(schedule, student(x_t, t).float(), x_t, t)
    return pseudo_huber(jump, wanted, c), jump


def distil(student, teacher, target, base, sampling, captions, x0, generators, scales):
    """consistency_step() with three networks on clips x0 with captions.

    generators: one per clip, for its step, its noise and its guidance scale in `scales`.
    """
    n = torch.stack([torch.randint(sampling.origin, (), generator=g) for g in generators])
    n = n.to(x0.device)
    eps = randn(x0.shape, generators, x0.device)
    uniform = torch.stack([torch.rand((), generator=g) for g in generators])
    w = (scales[0] + (scales[1] - scales[0]) * uniform).to(x0.device)

    text, null = base.encode_text(captions), base.encode_null(sampling.negative, len(x0))
    cond = pipeline.training_conditions(base, sampling, captions, n, sampling.fps)
    told, dim = dict(cond), base.row.unet.guidance_dim
    if dim:  # of add_guidance(): student and target are told w
        cond.pop("guidance")
        told["guidance"] = models.guidance_embedding(w, dim)

    def scale(step):  # of guidance: one per clip, the same at each step
        return w.view(-1, 1, 1, 1, 1)
    return consistency_step(
        partial(student, text=text, **told), guided(teacher, text, null, scale, **cond),
        partial(target, text=text, **told), base.sampling_schedule(sampling), x0, eps,
        n, sampling.origin, size=sampling.size)


def reward_of(reward, base, jump, prompts, generators, frames, shown):
    """Reward (b,) of clean latents (b,c,f',h',w') of clips of so many frames: of as many random
    ones as are shown, or of whole clips."""
    if reward.clip:
        return rewards.score(reward, pipeline.decode(base, jump, frames), prompts)
    order = [torch.randperm(frames, generator=g)[:shown].sort().values for g in generators]
    videos = [pipeline.decode(base, x[None], frames, chosen=i.tolist())
              for x, i in zip(jump, order)]
    return rewards.score(reward, torch.cat(videos), prompts)


def main(argv=None):
    args = get_args(argv)
    sampling = choose_sampling(args.base, args, method="videolcm", sampler="lcm", spacing="even")
    low, high = scales = args.cfg_range or (sampling.cfg, sampling.cfg)
    if not low <= sampling.cfg <= high:
        raise UserError(f"--cfg {sampling.cfg:g}: outside of --cfg-range {low:g} {high:g}")
    clips, rows, prompts = read_clips(args, sampling)
    captions = [caption for _, _, caption in rows]
    run = Run(args, "videolcm")
    reward = None
    if args.reward:
        reward = rewards.get_reward(args.reward, run.device, args.reward_weights, run.out)
        reward.check([*captions, *prompts])

    dtype = run.dtype if args.rank else torch.float32  # what trains is kept in fp32
    base = start_base(run, dtype, frozen=args.frozen)
    texts = [*captions, *(prompt + sampling.suffix for prompt in prompts), sampling.negative]
    base.tokenize(texts)  # refuses words that the tiny world does not know
    net, teacher, target, meta = student_teacher_target(args, run, base)
    params = trained({"": net})
    target_params = {k: p for k, p in target.named_parameters() if k in params}
    opt = run.adamw(params.values())
    meta["sample"] = sampling.metadata()
    run.attach(opt, params, [net], base.parts(), meta, ema=target_params, ema_decay=args.ema)

    def encode(batch):
        return pipeline.encode_clips(base, run.env, batch["video"])
    if args.cache_latents:
        about = dict(size=sampling.size, fps=args.read_fps, rows=seed_of(rows))
        clips = pipeline.cache_latents(run, clips, encode, about)
        base.remember([*clips.texts(), *texts], run.env)  # then the text tower goes
    batches = data.read_batches(clips, run.numbers, args.seed, args.workers)

    if not run.resumed:
        evaluate(run, base, target, sampling, prompts, "before")
    for _ in run.steps():
        for numbers in run.micro_steps():
            batch, generators = next(batches), run.generators(numbers)
            encoded = batch if args.cache_latents else encode(batch)
            x0 = pipeline.draw_latents(base, run.env, encoded, generators)
            gain = {}
            with run.forward():
                loss, jump = distil(net, teacher, target, base, sampling, batch["text"], x0,
                                    generators, scales)
                if reward:
                    gain["reward"] = reward_of(
                        reward, base, jump, batch["text"], generators, sampling.frames,
                        args.reward_frames)
            run.backward(loss - sum(gain.values()), loss=loss, **gain)
        run.update()
        if run.preview_due:
            evaluate(run, base, target, sampling, prompts, f"step-{run.done}")
    if not run.stopped:
        evaluate(run, base, target, sampling, prompts, "after")
    run.finish("loss", "reward" if reward else "grad")


# ---- data and networks

def read_clips(args, sampling):
    """-> the data set of clips, its rows (tiny: none), the prompts of the previews."""
    if args.data:
        clips = pipeline.open_data(args, pipeline.bucket_sizes(args, sampling.size))
        rows, prompts = clips.rows, [clips.rows[0][2]]
    else:
        clips = tinyworld.TinyWorld(
            1024, sampling.frames, args.seed, captions=tinyworld.tiny_prompts(),
            flawed=base_row(args.base).flawed)
        rows, prompts = [], tinyworld.tiny_prompts(held_out=True)
    if args.eval_prompts:
        prompts = data.read_prompts(args.eval_prompts)
    return clips, rows, prompts[:args.eval_n]


def student_teacher_target(args, run, base):
    """-> the student that trains, wrapped by DDP or FSDP; the frozen teacher: a copy of the
    base, or with LoRA the student with its branches off; the target; metadata."""
    place, targets = (args, run.device), list(args.lora_targets or base.net.lora_targets)
    if args.cfg_range:
        add_guidance(base, GUIDANCE_DIM)  # a layer for the scale, zero at first
        targets.append("time_cond_proj")
    if args.rank:
        models.add_lora(base.net, args.rank, args.alpha, targets)
    else:
        teacher = models.frozen_copy(base.net, run.dtype, *place)
        base.net.requires_grad_(True)
        if base.row.unet.style_image:  # TF-T2V's layer for an image has no use here
            base.net.pre_image_condition.requires_grad_(False)
    base.freeze(run.dtype, but=["net"])
    target = models.frozen_copy(base.net, None, *place)
    base.net.grad_ckpt = args.grad_ckpt
    student = models.parallelize(base.net, *place)
    if args.rank:
        teacher = models.without_lora(student)
    meta = dict(lora_targets=targets, guidance_dim=base.row.unet.guidance_dim)
    return student, teacher, target, meta


# ---- evaluation

@torch.no_grad()
def evaluate(run, base, target, sampling, prompts, name):
    """The prompts by the target in a few steps, always from the same noise -> NAME.png,
    and NAME/*.mp4 in --sample-steps steps. Every process must call it."""
    counts = sorted({k for k in SHOWN if k <= sampling.origin} | {sampling.sample_steps})
    seeds = [f"preview-{i}" for i in range(len(prompts))]
    base, videos = replace(base, net=target), {}
    for k in counts:
        now = replace(sampling, sample_steps=k)
        videos[k] = pipeline.generate_split(base, run.env, prompts, seeds, now, run.args.batch)
    if run.main:
        sheet = [list(row) for row in zip(*videos.values())][:16]
        headers = ["1 step" if k == 1 else f"{k} steps" for k in counts]
        pipeline.show(run, name, videos[sampling.sample_steps], prompts,
                      sampling.save_fps, sheet=sheet, headers=headers)


if __name__ == "__main__":
    run_command(main, "--grad-ckpt", "--batch 1", "--offload", "--parallel fsdp",
                "smaller --height and --width")
