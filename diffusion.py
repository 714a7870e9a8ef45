"""Noise schedules, prediction types, guidance, samplers and training losses, as pure functions.

    x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps,    ab ("alpha bar") = cumulative product of 1 - beta

The network predicts eps, x0 or v = sqrt(ab) eps - sqrt(1 - ab) x0 (Salimans & Ho, arXiv
2202.00512). Flow matching (Open-Sora, Wan) is a schedule with the same methods:

    x_t = (1 - sigma) x0 + sigma eps,    sigma = t / 1000,    the network predicts v = eps - x0

A sampler takes net_fn(x, t (b,)) -> prediction like x, usually made by guided(), and draws its
noise from one torch.Generator per sample, so a clip does not depend on the rest of its batch.
"""
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError

# ---- noise schedules: betas (T,) in float64

def linear_sd(num=1000, first=0.00085, last=0.012):
    """Stable Diffusion's "scaled linear": linear in sqrt(beta). ModelScope's, VideoCrafter2's."""
    return torch.linspace(first ** 0.5, last ** 0.5, num, dtype=torch.float64) ** 2


def cosine(num=1000, s=0.008):
    """ab(u) = cos^2((u + s) / (1 + s) pi / 2), beta <= 0.999 (arXiv 2102.09672, eq. 17)."""
    def g(u):
        return torch.cos((u + s) / (1 + s) * torch.pi / 2) ** 2
    u = torch.arange(num, dtype=torch.float64)
    return (1 - g((u + 1) / num) / g(u / num)).clamp(max=0.999)


def betas_of(ab):
    """The betas whose alpha bar is `ab` (T,)."""
    return 1 - ab / torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])


def linear_sd_shifted(num=1000, first=0.00085, last=0.012, divisor=1.0):
    """CogVideoX's schedule: linear_sd with its SNR divided by `divisor` (3 for 2B, 1 for 5B).

    This shift comes before make_schedule's zero_snr rescales the result, make_schedule's `shift`
    after it.
    """
    ab = torch.cumprod(1 - linear_sd(num, first, last), 0)
    return betas_of(shift_snr(ab, divisor ** -0.5))


def logsnr_cosine_interp(num=1000, scale_min=2.0, scale_max=4.0):
    """SR600's schedule: a cosine's log SNR within +-15, plus 2 ln(1 / scale).

    The scale goes from scale_min at the clean end to scale_max at the noisy one. As published,
    sigma = sqrt(1 - ab) is rounded to float32, which makes the noisiest step pure noise.
    """
    u = torch.linspace(1, 0, num, dtype=torch.float64)  # 1: clean
    first, last = math.atan(math.exp(7.5)), math.atan(math.exp(-7.5))
    logsnr = -2 * torch.log(torch.tan(first + u * (last - first)))
    ab = torch.sigmoid(logsnr - 2 * (u * math.log(scale_min) + (1 - u) * math.log(scale_max)))
    ab = 1 - (1 - ab).sqrt().float().double() ** 2
    return betas_of(ab)


def zero_terminal_snr(betas):
    """Shift and scale sqrt(ab) so that the last step is pure noise (2305.08891, algorithm 1)."""
    a = torch.cumprod(1 - betas, 0).sqrt()
    a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return betas_of(a ** 2)


def shift_snr(ab, factor):
    """ab with sqrt(ab / (1 - ab)) multiplied by `factor` (arXiv 2301.11093, section 2.1).

    The same noise hides a redundant signal (many pixels, many frames) less well; a factor below 1
    compensates for that.
    """
    return factor ** 2 * ab / (1 - ab + factor ** 2 * ab)


def x0_scale(num, first=1.0, last=0.7, ramp=400):
    """VideoCrafter2's factors on x0, (num,) float64: first to last in `ramp` steps, then last.

    Scaling the signal down adds noise at the same ab, as in arXiv 2301.10972. (The original's
    table has `ramp` further entries, which no step reads.)
    """
    ramp = torch.linspace(first, last, ramp, dtype=torch.float64)
    return torch.cat([ramp, torch.full((num,), last, dtype=torch.float64)])[:num]


SCHEDULES = {"linear_sd": linear_sd, "linear_sd_shifted": linear_sd_shifted, "cosine": cosine,
             "logsnr_cosine_interp": logsnr_cosine_interp}


@dataclass(frozen=True)
class Schedule:
    """alpha_bar (T,) in float64, and what the network predicts: "eps", "v" or "x0".

    scale (T,) or None: x_t = sqrt(ab_t) scale_t x0 + sqrt(1 - ab_t) eps. With a scale, a network
    that predicts v predicts that of scale_t x0; one that predicts x0 predicts x0 itself. Steps t
    are ints or long tensors (b,).
    """
    alpha_bar: Tensor
    prediction: str = "eps"
    scale: Tensor | None = None
    tables: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def at(self, t, like):
        """sqrt(ab_t), sqrt(1 - ab_t) and scale_t, each shaped to multiply `like` (b, ...).

        Computed in float64 and then rounded to like's dtype. The tables stay on like's device: a
        lookup that copied t to the CPU would make the CPU wait for the GPU in every training
        step.
        """
        place = like.device, like.dtype
        if place not in self.tables:
            scale = torch.ones_like(self.alpha_bar) if self.scale is None else self.scale
            table = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt(), scale])
            self.tables[place] = table.to(like.dtype).to(like.device)
        table = self.tables[place]
        if isinstance(t, Tensor):
            columns = table[:, t.reshape(-1).to(like.device)]
        else:
            columns = table[:, t:t + 1]
        return columns.reshape(3, -1, *[1] * (like.ndim - 1)).unbind()

    def level(self, t):
        """(a, s) of x_t = a x0 + s eps at step t, an int: floats; t = -1 stands for x0."""
        if t < 0:
            return 1.0, 0.0
        ab = self.alpha_bar[t].item()
        scale = 1.0 if self.scale is None else self.scale[t].item()
        return ab ** 0.5 * scale, (1 - ab) ** 0.5

    def steps(self, u, size=None):
        """u (b,) in 0..1, how far towards the noise -> steps t (b,). size: as Flow's, not used."""
        return (u * len(self.alpha_bar)).long()

    def grid(self, k, origin, size=None):
        """k (b,), 0 (clean) to origin (noise) -> steps of a chain of `origin` equal parts."""
        return (len(self.alpha_bar) // origin * k - 1).clamp(min=0)

    def add_noise(self, x0, noise, t):
        """x0, noise like x0, t -> x_t."""
        a, s, k = self.at(t, x0)
        return a * k * x0 + s * noise

    def target(self, x0, noise, t):
        """What the network should answer at x_t = add_noise(x0, noise, t)."""
        a, s, k = self.at(t, x0)
        return {"eps": noise, "x0": x0, "v": a * noise - s * k * x0}[self.prediction]

    def to_x0(self, out, x_t, t):
        """The network's answer at x_t -> the clean latents that it implies."""
        a, s, k = self.at(t, x_t)
        if self.prediction == "eps":
            return (x_t - s * out) / (a * k)
        return out if self.prediction == "x0" else a / k * x_t - s / k * out

    def to_eps(self, out, x_t, t):
        """The network's answer at x_t -> the noise that it implies."""
        a, s, k = self.at(t, x_t)
        if self.prediction == "x0":
            return (x_t - a * k * out) / s
        return out if self.prediction == "eps" else a * out + s * x_t


def shifted(u, shift):
    """u in 0..1 moved towards the noise: shift u / (1 + (shift - 1) u) (2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def size_shift(frames, height, width):
    """Open-Sora's shift for a clip, size in pixels: 1 for an image of 512x512.

    The same noise hides a large, redundant clip less well (arXiv 2403.03206, section 5.3.2), so
    the shift grows with the square root of pixels and of latent frames.
    """
    latent_frames = 1 if frames == 1 else max(frames // 17 * 5, 1)
    return (height * width / 512 ** 2 * latent_frames) ** 0.5


@dataclass(frozen=True)
class Flow:
    """Flow matching (arXiv 2210.02747, 2209.03003), with the methods of Schedule.

    x_t = (1 - sigma) x0 + sigma noise with sigma = t / 1000. Steps t are real, 0 (clean) to 1000
    (noise): numbers or tensors (b,). The network predicts v = noise - x0.
    """
    shift: float = 1.0     # steps in sampling and in training are moved towards the noise by this
    by_size: bool = False  # Open-Sora: and by size_shift() of the clip

    def shift_of(self, size=None):
        """size: (frames, height, width) in pixels, needed with by_size."""
        assert size or not self.by_size, "this schedule depends on the size of the clip"
        return self.shift * size_shift(*size) if self.by_size else self.shift

    def steps(self, u, size=None):
        """u (b,) in 0..1, how far towards the noise -> steps t (b,)."""
        return 1000 * shifted(u, self.shift_of(size))

    def grid(self, k, origin, size=None):
        """k (b,), 0 (clean) to origin (noise) -> steps of a chain of `origin` Euler steps."""
        return self.steps(k / origin, size)

    def sigma(self, t, like):
        """t / 1000, shaped to multiply `like` (b, ...)."""
        sigma = torch.as_tensor(t, dtype=torch.float32, device=like.device) / 1000
        return sigma.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    def level(self, t):
        """(a, s) of x_t = a x0 + s eps at step t: floats."""
        return 1 - t / 1000, t / 1000

    def add_noise(self, x0, noise, t):
        """x0, noise like x0, t -> x_t."""
        sigma = self.sigma(t, x0)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0, noise, t):
        """What the network should answer at any t."""
        return noise - x0

    def to_x0(self, out, x_t, t):
        """The network's answer at x_t -> the clean latents that it implies."""
        return x_t - self.sigma(t, x_t) * out

    def to_eps(self, out, x_t, t):
        """The network's answer at x_t -> the noise that it implies."""
        return x_t + (1 - self.sigma(t, x_t)) * out


def make_schedule(name="linear_sd", prediction="eps", zero_snr=False, shift=1.0, scale=None,
                  **kw) -> Schedule | Flow:
    """A schedule by the name of its betas, e.g. make_schedule("cosine", "v", zero_snr=True).

    name: a key of SCHEDULES; kw: arguments of that function. scale: None, or x0_scale's
    (first, last, ramp); VideoCrafter2 has (1.0, 0.7, 400). Or name "flow", with shift and by_size.
    """
    if name == "flow":
        return Flow(shift, **kw)
    betas = SCHEDULES[name](**kw)
    betas = zero_terminal_snr(betas) if zero_snr else betas
    scale = None if scale is None else x0_scale(len(betas), *scale)
    return Schedule(shift_snr(torch.cumprod(1 - betas, 0), shift), prediction, scale)


# ---- training losses

def diffusion_loss(net_fn, schedule, x0, noise, t, mask=None, frame_mask=None, given=None):
    """Mean of |net(x_t, t) - target|^2 over all elements of a sample, (b,) in fp32.

    net_fn(x_t, t) -> prediction; t (b,). mask (b,1,f,h,w) multiplies prediction and target
    (DreamVideo's subject masks); the mean still runs over all elements. frame_mask (b,f): True or
    1 for frames to learn. The others are conditions: they are given clean and are not counted,
    and net_fn gets the mask as `frame_mask` (Open-Sora). given (b,): True or 1 where the first
    frame is such a condition, with a step of 0 in net_fn's t (b,f) (Wan2.2 TI2V).
    """
    x_t, now, steps = schedule.add_noise(x0, noise, t), {}, t
    if given is not None:
        frame_mask = torch.ones(len(x0), x0.shape[2], dtype=torch.bool, device=x0.device)
        frame_mask[:, 0] = given == 0
        steps = t[:, None] * frame_mask
    elif frame_mask is not None:
        now["frame_mask"] = frame_mask = frame_mask.bool()
    if frame_mask is not None:
        x_t = torch.where(frame_mask[:, None, :, None, None], x_t, x0)
    out = net_fn(x_t, steps, **now).float()
    target = schedule.target(x0, noise, t).float()
    if mask is not None:
        out, target = out * mask, target * mask
    error = (out - target).square()
    if frame_mask is None:
        return error.flatten(1).mean(1)
    return (error.mean((1, 3, 4)) * frame_mask).sum(1) / frame_mask.sum(1)


def logit_normal(u, scale=1.0):
    """Uniform u in 0..1 -> sigmoid(scale z), z standard normal: mostly steps in the middle.

    The density with which flow matching is often trained (arXiv 2403.03206, eq. 19).
    """
    return torch.sigmoid(scale * torch.special.ndtri(u))


def boundary_scalings(t, sigma_data=0.5, timestep_scaling=10.0):
    """c_skip, c_out of a consistency function f(x, t) = c_skip x + c_out x0; t: number or tensor.

    They make f(x, 0) = x (consistency models, arXiv 2303.01469; timestep_scaling is from latent
    consistency models, 2310.04378). From t = 19 on, f differs from x0 by 7e-6 at most.
    """
    u = timestep_scaling * t
    return sigma_data ** 2 / (u ** 2 + sigma_data ** 2), u / (u ** 2 + sigma_data ** 2) ** 0.5


def consistency(schedule, out, x_t, t):
    """f(x_t, t) = c_skip x_t + c_out x0, from the network's answer; t (b,) or a number.

    Flow matching needs no scalings (c_skip = 0, c_out = 1): x0 = x_t - sigma v is x_t at sigma = 0.
    """
    if isinstance(schedule, Flow):
        return schedule.to_x0(out, x_t, t)
    c_skip, c_out = boundary_scalings(torch.as_tensor(t).to(x_t).reshape(-1, *[1] * (x_t.ndim - 1)))
    return c_skip * x_t + c_out * schedule.to_x0(out, x_t, t)


# ---- guidance

def guided(net, text, null, cfg=None, rescale=0.0, sequential=False, null_cond=None, **cond):
    """-> fn(x, t, **now) = u + cfg (c - u): classifier-free guidance (2207.12598; 1 is off here).

    c and u are the network's answers for `text` and `null` (b,n,d). cfg: None or 1 for c alone, a
    number, or a function of the step, an int (dynamic_guidance). `cond` {name: tensor (b, ...)}
    goes to both branches, and so do the conditions of a single call, `now` (rflow's frame_mask).
    null_cond replaces some of `cond` in u. sequential: two calls instead of one on a doubled
    batch, which halves the activations. rescale: share of the result that is brought back to c's
    standard deviation, against the over-exposure that a large cfg causes (arXiv 2305.08891,
    section 3.4; SR600: 0.3).
    """
    if cfg is None or cfg == 1:
        return lambda x, t, **now: net(x, t, text, **cond, **now)
    null_cond = cond | (null_cond or {})
    if not sequential:
        both_text = torch.cat([text, null])
        both_cond = {k: torch.cat([cond[k], v]) for k, v in null_cond.items()}

    def fn(x, t, **now):
        if sequential:
            c, u = net(x, t, text, **cond, **now), net(x, t, null, **null_cond, **now)
        else:
            both_now = {k: torch.cat([v, v]) for k, v in now.items()}
            out = net(torch.cat([x, x]), torch.cat([t, t]), both_text, **both_cond, **both_now)
            c, u = out.chunk(2)
        scale = cfg(int(t[0])) if callable(cfg) else cfg
        out = u + scale * (c - u)
        if rescale:
            dims = tuple(range(1, out.ndim))
            factor = c.std(dims, keepdim=True) / out.std(dims, keepdim=True)
            out = (rescale * factor + 1 - rescale) * out
        return out
    return fn


def dynamic_guidance(cfg, steps, num=1000, as_published=False):
    """-> fn(t): guidance scale at step t, for samplers with "trailing" steps (CogVideoX).

    It rises from 1 to 1 + cfg:  1 + cfg (1 - cos(pi (i / steps)^5)) / 2  in the i-th update.
    as_published: diffusers puts steps - t, t = 999 ... 0, in the place of i, a slip that makes
    the scale jump up and down. The demos of CogVideoX and Diffusion as Shader were made with it.
    """
    times = ddim_timesteps(steps, num, "trailing")

    def scale(t):
        i = steps - t if as_published else times.index(t)
        return 1 + cfg * (1 - math.cos(math.pi * (i / steps) ** 5)) / 2
    return scale


# ---- what samplers share

def full_step(x, t):
    """(b,): step t for every sample of x."""
    return torch.full((len(x),), t, device=x.device)


def recording(number, updates, grad_last):
    """Context of update `number` (from 0) of so many: the last grad_last record gradients.

    The state before them is then a constant (VADER, InstructVideo). Under torch.no_grad none do.
    """
    return torch.set_grad_enabled(torch.is_grad_enabled() and number >= updates - grad_last)


def randn(shape, generators, device="cpu"):
    """Noise of `shape` (b, ...). Sample i is drawn from generators[i] on the CPU.

    It is the same on any device and in any batch.
    """
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)


def randn_like(x, generators):
    """Noise like x (b, ...), sample i from generators[i]; None: from torch's global generator."""
    if generators is None:
        return torch.randn_like(x)
    return randn(x.shape, generators, x.device).to(x.dtype)


def offset_noise(noise, shared, strength=0.1):
    """Noise (b,c,f,h,w) + strength * shared (b,c,f,1,1), one value per channel and frame.

    Plain noise hardly changes the mean of a frame, so a network never learns to choose its
    brightness.
    """
    return noise + strength * shared


def draw_noise(schedule, x0, generators, offset=0.0, size=None, timesteps="uniform"):
    """Steps t (b,) and noise like x0 for training, each sample's from its own generator.

    offset: strength of offset_noise(); size: of the clips in pixels, see Flow; timesteps: the
    density of t before the schedule's shift, "uniform" or "logit-normal".
    """
    number = torch.stack([torch.randint(1000, (), generator=g) for g in generators])
    u = (number + 0.5) / 1000
    t = schedule.steps(logit_normal(u) if timesteps == "logit-normal" else u, size)
    noise, shared = randn(x0.shape, generators), randn((*x0.shape[:3], 1, 1), generators)
    return t.to(x0.device), offset_noise(noise, shared, offset).to(x0.device)


def noised(schedule, x0, noise, u, size=None, origin=None):
    """Training input of any base: x0, noise (n,...), u (n,) in 0..1 -> x_t, t (n,), target.

    u says how far towards the noise; size: of the clips in pixels, see Flow. origin: draw only
    from the steps of a consistency model's distillation (lcm_timesteps), e.g. 19, 39, ..., 999
    for 50.
    """
    if origin is None:
        t = schedule.steps(u, size)
    else:
        t = schedule.grid((u * origin).long() + 1, origin, size)
    return schedule.add_noise(x0, noise, t), t, schedule.target(x0, noise, t)


def mix_noise(inverted, noise, strength):
    """sqrt(strength) inverted + sqrt(1 - strength) noise: DreamVideo's start, near a video's."""
    return strength ** 0.5 * inverted + (1 - strength) ** 0.5 * noise


# ---- one update as a Gaussian: what stochastic samplers draw from, and the policy of grpo.py

NOISES = ("ddim", "cps", "flow", "dance")


def drawn_noise(kind, level, s, s_next):
    """-> (std, k): an update from noise s to s' draws x' from N(a' x0 + k eps, std^2).

    level: how much noise, 0 for none. "ddim" (2010.02502, eq. 16): level is eta; needs a^2 + s^2
    = 1. "cps" (2509.05952): any schedule. Both replace a part of the noise, k^2 + std^2 = s'^2.
    "flow" (Flow-GRPO, 2505.05470) and "dance" (DanceGRPO, 2505.07818), for flow matching: an
    Euler step of the SDE with noise strength g that has the flow's marginals,

        x' = x - d (v + g^2 / (2 s) eps) + g sqrt(d) noise,    d = s - s'
    """
    if level == 0:
        return 0.0, s_next
    if kind == "ddim":
        std = level * s_next / s * ((s ** 2 - s_next ** 2) / (1 - s_next ** 2)) ** 0.5
    elif kind == "cps":
        std = s_next * math.sin(level * math.pi / 2)
    else:
        signal = 1 - s if s < 1 else 1 - s_next  # as published; pure noise has none
        g = level if kind == "dance" else level * (s / signal) ** 0.5
        std = g * (s - s_next) ** 0.5
        return std, s_next - std ** 2 / (2 * s)
    return std, max(s_next ** 2 - std ** 2, 0.0) ** 0.5  # below 0 by rounding: zero terminal SNR


def gaussian_step(schedule, out, x, t, t_next, kind="ddim", level=0.0):
    """Mean, like x, and standard deviation, a float, of the state at step t_next.

    out: the network's output at x = x_t, (b,c,f,h,w); t, t_next: numbers, see Schedule.level();
    kind and level: see drawn_noise(). With level 0 the mean is the deterministic sampler's state.
    """
    (_, s), (a_next, s_next) = schedule.level(t), schedule.level(t_next)
    std, k = drawn_noise(kind, level, s, s_next)
    return a_next * schedule.to_x0(out, x, t) + k * schedule.to_eps(out, x, t), std


def policy(net_fn, schedule, x, t, t_next, noise="ddim", level=0.0):
    """gaussian_step() of a network: mean and std of pi(x' | x), x at step t and x' at t_next."""
    out = net_fn(x, full_step(x, t)).float()
    return gaussian_step(schedule, out, x, t, t_next, noise, level)


def log_prob(x_next, mean, std):
    """log N(x'; mean, std^2), (b,): as published the mean over a clip's elements, not the sum."""
    z = (x_next - mean) / std
    return -z.square().flatten(1).mean(1) / 2 - math.log(std) - math.log(2 * math.pi) / 2


@torch.no_grad()
def recorded(net_fn, x_T, schedule, updates, noisy, noise, level, generators):
    """Sample with noise: x_T (b,...) -> states x_T ... x_0 (b,n+1,...), log pi (b,n) of n updates.

    updates: [(t, t_next)]; noisy: numbers of those that draw noise, of this kind and level. All is
    in fp32: rounded to bf16, a state has another log-probability (off by 1e-3 where std is 0.04).
    """
    states, log_probs = [x_T], []
    for i, (t, t_next) in enumerate(updates):
        x = states[-1]
        mean, std = policy(net_fn, schedule, x, t, t_next, noise, level if i in noisy else 0.0)
        x_next = mean + std * randn_like(x, generators) if std else mean
        states.append(x_next)
        log_probs.append(log_prob(x_next, mean, std) if std else x.new_zeros(len(x)))
    return torch.stack(states, 1), torch.stack(log_probs, 1)


# ---- DDIM (Song et al., arXiv 2010.02502)

def ddim_timesteps(steps, num=1000, spacing="leading"):
    """Descending list of integer steps.

    "leading": VGen's 1 + k (num // steps), e.g. 981, ..., 21, 1 for 50. As published, there are
    more than `steps` of them when steps does not divide num. "trailing": num - 1 first, for
    schedules that end in pure noise (arXiv 2305.08891, section 3.3).
    """
    if not 1 <= steps <= num:
        raise UserError(f"--sample-steps {steps}: this sampler takes 1 to {num}")
    if spacing == "trailing":
        # numpy's rounding decides the halves (48 steps), as published; it may add an entry 0 at
        # the end
        return [int(t) - 1 for t in np.arange(num, 0, -num / steps).round()[:steps]]
    return [min(1 + t, num - 1) for t in range(0, num, num // steps)][::-1]


def ddim_updates(steps, num=1000, spacing="leading"):
    """The sampler's updates as pairs (t, t_prev), from step t to t_prev; -1 stands for x0."""
    times = ddim_timesteps(steps, num, "leading" if spacing == "leading" else "trailing")
    if spacing == "leading":
        return [(t, max(t - num // steps, 0)) for t in times]
    if spacing == "trailing":
        return list(zip(times, times[1:] + [-1]))
    # "cogvideox", as published: the same where steps divides num. Elsewhere each update ends
    # beside the next one's t, and the last may stop short of x0.
    return [(t, t - num // steps) for t in times]


def sampler_updates(schedule, steps, size=None, spacing="leading", sampler="rflow"):
    """A sampler's updates, pairs (t, t_next): ddim_updates(), or of flow matching from level to
    level, see flow_levels(). size: of the clips in pixels, see Flow."""
    if isinstance(schedule, Schedule):
        return ddim_updates(steps, len(schedule.alpha_bar), spacing)
    _, sigmas = flow_levels(FLOW_SOLVERS[sampler], steps, schedule.shift_of(size), spacing)
    times = [1000 * sigma for sigma in sigmas]
    return list(zip(times, times[1:]))


def number_of_updates(sampler, steps, spacing="leading") -> int:
    """How many updates a sampler makes: `steps`, or what DDIM's spacing makes of them."""
    if sampler == "dpm":
        return len(ddim_updates(steps, spacing="cogvideox"))
    return len(ddim_updates(steps, spacing=spacing)) if sampler == "ddim" else steps


def ddim_step(schedule, out, x, t, t_prev, eta=0.0, noise=None):
    """One DDIM update from step t to t_prev (Song et al., eq. 12), see gaussian_step().

    out: the network's output at x = x_t, (b,c,f,h,w); t, t_prev: ints, t_prev = -1 means x0.
    eta: 0 is deterministic, 1 is DDPM; above 0 it needs `noise` like x.
    """
    mean, std = gaussian_step(schedule, out, x, t, t_prev, "ddim", eta)
    return mean if std == 0 else mean + std * noise


def ddim(net_fn, x_T, schedule, steps, eta=0.0, generators=None, grad_last=0, spacing="leading",
         progress=None, last=None):
    """Sample: noise x_T (b,c,f,h,w) -> latents.

    generators: one per sample, for the noise of eta > 0. grad_last: see recording(). last: make
    only the last so many updates. x_T is then the state at the step of the first of them, such as
    a clip noised to that step (SDEdit, arXiv 2108.01073; InstructVideo). As published, "leading"
    ends at ab_0 and not at x0, so an invisible sqrt(1 - ab_0) eps remains.
    """
    updates = ddim_updates(steps, len(schedule.alpha_bar), spacing)
    updates = updates if last is None else updates[len(updates) - last:]
    x = x_T
    for i, (t, t_prev) in enumerate(progress(updates) if progress else updates):
        with recording(i, len(updates), grad_last):
            out = net_fn(x, full_step(x, t))
            noise = randn_like(x, generators) if eta > 0 else None
            x = ddim_step(schedule, out.float(), x, t, t_prev, eta, noise)
    return x


def ddim_invert_step(schedule, out, x, t, t_next):
    """One update of the reversed ODE, from step t up to t_next; len(alpha_bar) means pure noise."""
    x0, eps = schedule.to_x0(out, x, t), schedule.to_eps(out, x, t)
    if t_next >= len(schedule.alpha_bar):
        return eps
    return schedule.add_noise(x0, eps, t_next)


@torch.no_grad()
def ddim_invert(net_fn, x0, schedule, steps, levels=None):
    """Clean latents -> the noise that DDIM would turn into them.

    Visits t = 0, s, 2s, ... with s = T // steps (VGen) and ends in pure noise. With `levels`, T =
    levels and the end is the noise of step levels - 1 (SR600: 700).
    """
    num = len(schedule.alpha_bar) if levels is None else levels
    end = num if levels is None else levels - 1
    x = x0
    for t in range(0, num, num // steps):
        out = net_fn(x, full_step(x, t))
        x = ddim_invert_step(schedule, out.float(), x, t, min(t + num // steps, end))
    return x


# ---- latent consistency models (arXiv 2310.04378)

def lcm_timesteps(steps, schedule, origin=50, spacing="stride", size=None):
    """Descending list of steps, chosen from the `origin` steps of the distillation.

    Those are 999, 979, ..., 19 for 50; with flow matching Euler's, for clips of `size`. "stride":
    T2V-Turbo takes every (origin // steps)-th of them, e.g. 999, 759, 519, 279. "even": VideoLCM
    takes i origin / steps, rounded down (diffusers 0.26), e.g. 999, 759, 499, 259.
    """
    if not 1 <= steps <= origin:
        raise UserError(f"--sample-steps {steps}: this consistency model takes 1 to {origin}")
    k = torch.arange(origin, 0, -1)
    if spacing == "even":
        k = k[torch.arange(steps) * origin // steps]
    else:
        k = k[::origin // steps][:steps]
    return schedule.grid(k, origin, size).tolist()


@torch.no_grad()
def lcm(net_fn, x_T, schedule, steps, generators=None, origin=50, spacing="stride", size=None,
        progress=None):
    """Sample a consistency model: noise x_T (b,c,f,h,w) -> latents, by jumps to x0.

    Each step jumps to x0 and adds noise for the next. It calls the network once: guidance was
    distilled into the network, and may be one of its conditions. size: of the clips in pixels, see
    Flow.
    """
    times = lcm_timesteps(steps, schedule, origin, spacing, size)
    x = x_T
    for i, t in enumerate(progress(times) if progress else times):
        out = net_fn(x, full_step(x, t))
        x0 = consistency(schedule, out.float(), x, t)
        if i + 1 < len(times):
            x = schedule.add_noise(x0, randn_like(x, generators), times[i + 1])
    return x0


# ---- DPM-Solver++ (Lu et al., arXiv 2211.01095)

def dpmpp_2m(net_fn, x_T, schedule, steps, grad_last=0, progress=None):
    """DPM-Solver++(2M), algorithm 2, as VADER samples ModelScope: noise x_T (b,c,f,h,w) -> latents.

    It draws no noise. With lam = ln sqrt(ab / (1 - ab)) and h = lam' - lam, from t to t':

        x' = sqrt((1 - ab') / (1 - ab)) x + (1 - exp(-h)) sqrt(ab') D
        D = x0 + h / (2 h_last) (x0 - x0_last)

    Steps are spaced by "linspace": 999 = t_1 > ... > t_n, even towards 0. The last update goes to
    x0. grad_last: see recording().
    """
    num = len(schedule.alpha_bar)
    times = [int(t) for t in np.linspace(0, num - 1, steps + 1).round()[:0:-1]]
    ab = schedule.alpha_bar
    lam = 0.5 * (ab / (1 - ab)).log()
    x, last, h_last = x_T, None, None
    updates = list(zip(times, times[1:] + [-1]))
    for i, (t, t_prev) in enumerate(progress(updates) if progress else updates):
        with recording(i, steps, grad_last):
            out = net_fn(x, full_step(x, t))
            x0 = schedule.to_x0(out.float(), x, t)
            if t_prev < 0:
                return x0
            h, d = (lam[t_prev] - lam[t]).item(), x0
            if last is not None:
                d = x0 + h / (2 * h_last) * (x0 - last)
            keep = ((1 - ab[t_prev]) / (1 - ab[t])).sqrt().item()
            x = keep * x - math.expm1(-h) * ab[t_prev].sqrt().item() * d
            last, h_last = x0, h


@torch.no_grad()
def dpmpp_2m_sde(net_fn, x_T, schedule, steps, generators=None, levels=None, progress=None):
    """SDE-DPM-Solver++(2M), as SR600 samples, from step levels - 1 (default: the last) -> latents.

    The state is x = x0 + r eps with r = sigma / alpha. The network sees x / sqrt(1 + r^2), which
    is the schedule's form. From r to r', with q = (r' / r)^2 and h = ln(r / r'):

        x' = q x + (1 - q) D + r' sqrt(1 - q) noise,    D = x0 + h / (2 h_last) (x0 - x0_last)

    x_T (b,c,f,h,w): noise of size 1; for SR600, what ddim_invert() made of the small video.
    """
    num = len(schedule.alpha_bar)
    levels = levels or num
    # "trailing" real-valued steps without the last: the chain jumps from the one before it to r =
    # 0. (As published: where the division rounds up, there is one more than asked for.)
    times = torch.arange(levels - 1, -1, -levels / (steps + 1), dtype=torch.float64).tolist()[:-1]
    log_r = 0.5 * torch.log((1 - schedule.alpha_bar) / schedule.alpha_bar)
    r = np.exp(np.interp(times, range(num), log_r.numpy())).tolist() + [0.0]
    x = x_T if math.isinf(r[0]) else r[0] * x_T
    last, h_last = None, None
    for i, t in enumerate(progress(times) if progress else times):
        pure = math.isinf(r[i])  # zero terminal SNR: no signal at all
        x_in = x if pure else x / (1 + r[i] ** 2) ** 0.5
        step = round(t)
        out = net_fn(x_in, full_step(x, step))
        x0 = schedule.to_x0(out.float(), x_in, step)
        if r[i + 1] == 0:
            x = x0
        elif pure:  # as published: one Euler step, which keeps the noise that it was given
            x = x0 + r[i + 1] * x_T
        else:
            q, h = (r[i + 1] / r[i]) ** 2, math.log(r[i] / r[i + 1])
            d = x0 if last is None else x0 + h / (2 * h_last) * (x0 - last)
            x = q * x + (1 - q) * d + r[i + 1] * (1 - q) ** 0.5 * randn_like(x, generators)
            last, h_last = x0, h
    return x


def cogvideox_dpm(net_fn, x_T, schedule, steps, generators=None, grad_last=0, progress=None):
    """SDE-DPM-Solver++(2M), as CogVideoX-5B samples: noise x_T (b,c,f,h,w) -> latents.

    The schedule must end in pure noise, ab_T = 0.

    With lam = ln sqrt(ab / (1 - ab)), h = lam' - lam and q = exp(-2 h), from t to t'
    (ddim_updates):

        x' = sqrt(q (1 - ab') / (1 - ab)) x + (1 - q) sqrt(ab') D + sqrt((1 - q) (1 - ab')) noise
        D = x0 + h / (2 h_last) (x0 - x0_last),    h_last = lam - lam_last

    This is dpmpp_2m_sde's solver in another parametrisation, but its first step, from lam = -inf
    (q = 0), adds fresh noise, and t' is CogVideoX's. grad_last: see recording().
    """
    ab = schedule.alpha_bar
    lam = 0.5 * (ab / (1 - ab)).log()  # -inf at the last step, which makes q = 0 and 1 / h_last = 0
    x, last, t_last = x_T, None, None
    updates = ddim_updates(steps, len(ab), "cogvideox")
    for i, (t, t_prev) in enumerate(progress(updates) if progress else updates):
        with recording(i, len(updates), grad_last):
            out = net_fn(x, full_step(x, t))
            x0 = schedule.to_x0(out.float(), x, t)
            if t_prev < 0:
                return x0
            h, d = lam[t_prev] - lam[t], x0
            if last is not None:
                d = x0 + (h / (2 * (lam[t] - lam[t_last]))).item() * (x0 - last)
            q, fresh = (-2 * h).exp(), -(-2 * h).expm1()
            keep, jump = (q * (1 - ab[t_prev]) / (1 - ab[t])).sqrt(), fresh * ab[t_prev].sqrt()
            spread = (fresh * (1 - ab[t_prev])).sqrt()
            x = keep.item() * x + jump.item() * d + spread.item() * randn_like(x, generators)
            last, t_last = x0, t
    return x


# ---- flow matching: Euler, DPM-Solver++ and UniPC on levels sigma from 1 (noise) to 0 (clean)

def flow_levels(solver, steps, shift, spacing="wan", last=None):
    """-> steps for the network, a list, and levels sigma, `steps` + 1 floats, the last one 0.
    last: only those of the last so many updates.

    solver: "euler", "dpmpp" or "unipc". Levels are even from 1 to 0, then moved by `shift` (Wan,
    Open-Sora). spacing "diffusers" gives those of diffusers' schedulers. Euler reads the real
    step 1000 sigma; the others round it down, as published.
    """
    if spacing == "diffusers" and solver == "euler":
        u = np.linspace(1, shifted(0.001, shift), steps)  # moved twice at the low end, as published
    elif spacing == "diffusers":
        u = np.linspace(1, 0.001, steps + 1)[:-1]
    else:
        first = np.float32(0.999).item() if solver == "unipc" else 1.0
        u = np.linspace(first, 0, steps + 1)[:-1]
    sigma = shifted(u, shift)
    if solver == "unipc":  # which takes log(1 - sigma)
        sigma = sigma.clip(max=1 - 1e-6)
    # in float32, 0.9 would give step 899; as float32 the first real step is 1000, as masks need it
    times = np.float32(1000 * sigma) if solver == "euler" else (1000 * sigma).astype(int)
    first = 0 if last is None else steps - last
    return times.tolist()[first:], [*np.float32(sigma).tolist()[first:], 0.0]


def log_ratios(sigmas):
    """lambda = log((1 - sigma) / sigma) of each level, -inf for 1 and inf for 0."""
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    return ((1 - sigmas) / sigmas).log().tolist()


def rflow(net_fn, x_T, schedule, steps, size=None, spacing="wan", frame_mask=None, generators=None,
          grad_last=0, progress=None, last=None):
    """Sample by Euler steps, x' = x + (sigma' - sigma) v: noise x_T (b,c,f,h,w) -> latents.

    size: (frames, height, width) in pixels, see Flow. spacing: see flow_levels(). grad_last: see
    recording(). last: see ddim(). frame_mask (b,f) in 0..1: 1 makes a frame from noise. The others
    start as latents in x_T: 0 keeps them; m in between keeps them until t = 1000 m, noises them to
    there and then lets them join (Open-Sora's edits). net_fn gets `frame_mask` (b,f), True for
    frames that take part. generators: one per sample, for that noise.
    """
    times, sigmas = flow_levels("euler", steps, schedule.shift_of(size), spacing, last)
    x, active = x_T, None if frame_mask is None else frame_mask == 1
    for i, t in enumerate(progress(times) if progress else times):
        with recording(i, len(times), grad_last):
            now = {}
            if frame_mask is not None:
                joined, active = active, 1000 * frame_mask >= t
                noise = randn_like(x, generators)  # drawn in every step, as published
                joins = (active & ~joined)[:, None, :, None, None]
                x = torch.where(joins, schedule.add_noise(x, noise, t), x)
                now["frame_mask"] = active
            v = net_fn(x, full_step(x, t), **now).float()
            moved = x + (sigmas[i + 1] - sigmas[i]) * v
            x = moved if active is None else torch.where(active[:, None, :, None, None], moved, x)
    return x


def flow_dpmpp(net_fn, x_T, schedule, steps, size=None, spacing="wan", grad_last=0, progress=None,
               last=None):
    """DPM-Solver++(2M) for flow matching: noise x_T (b,c,f,h,w) -> latents. Arguments: see rflow().

    With h = lambda' - lambda, from sigma to sigma' (compare dpmpp_2m):

        x' = sigma' / sigma x + (1 - sigma') (1 - exp(-h)) D
        D = x0 + h / (2 h_last) (x0 - x0_last)
    """
    times, sigmas = flow_levels("dpmpp", steps, schedule.shift_of(size), spacing, last)
    lam = log_ratios(sigmas)
    x, before = x_T, None
    for i, t in enumerate(progress(times) if progress else times):
        with recording(i, len(times), grad_last):
            x0 = x - sigmas[i] * net_fn(x, full_step(x, t)).float()
            if i + 1 == len(times):
                return x0
            h, d = lam[i + 1] - lam[i], x0  # from pure noise, h is infinite
            if before is not None:
                d = x0 + h / (2 * (lam[i] - lam[i - 1])) * (x0 - before)
            x = sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * math.expm1(-h) * d
            before = x0


def flow_unipc(net_fn, x_T, schedule, steps, size=None, spacing="wan", grad_last=0, progress=None,
               last=None):
    """UniPC of order 2 with B(h) = exp(-h) - 1 (arXiv 2302.04867), Wan's default: noise x_T
    (b,c,f,h,w) -> latents. Arguments: see rflow().

    Each network call at x corrects the update that led there, then predicts the next state. Both
    are the update below from sigma to sigma', h = lambda' - lambda:

        y' = sigma' / sigma y - (1 - sigma') B(h) (x0 + change)
    """
    times, sigmas = flow_levels("unipc", steps, schedule.shift_of(size), spacing, last)
    lam = log_ratios(sigmas)

    def update(i, y, x0, change):
        """From level i to the next one."""
        b = math.expm1(lam[i] - lam[i + 1])
        return sigmas[i + 1] / sigmas[i] * y - (1 - sigmas[i + 1]) * b * (x0 + change)
    x = y = x_T  # y: x after its correction
    history = []  # the last three estimates of x0; all come from states before their correction
    for i, t in enumerate(progress(times) if progress else times):
        with recording(i, len(times), grad_last):
            x0 = x - sigmas[i] * net_fn(x, full_step(x, t)).float()
            if i + 1 == len(times):
                return x0
            history = [*history[-2:], x0]
            change = 0.0
            if i > 0:
                before = history[-2]
                y = update(i - 1, y, before, unipc_correction(history, lam[max(i - 2, 0):i + 1]))
                ratio = (lam[i - 1] - lam[i]) / (lam[i + 1] - lam[i])  # below 0
                change = (before - x0) / (2 * ratio)
            x = update(i, y, x0, change)


def unipc_correction(history, lam):
    """What UniPC's corrector adds to the last estimate of x0, from two or three and their levels.

    The coefficients a of the differences solve a_0 + a_1 = f_1 / B, r a_0 + a_1 = 2 f_2 / B with
    k = -h, B = exp(k) - 1, f_1 = B / k - 1, f_2 = f_1 / k - 1 / 2 (eq. 5, 10).
    """
    *before, last, new = history
    if not before:
        return (new - last) / 2
    k = lam[1] - lam[2]
    b, r = math.expm1(k), (lam[0] - lam[1]) / -k
    f_1 = b / k - 1
    f_2 = f_1 / k - 1 / 2
    a_0 = (f_1 - 2 * f_2) / (b * (1 - r))
    a_1 = f_1 / b - a_0
    return a_0 * (before[0] - last) / r + a_1 * (new - last)


FLOW_SAMPLERS = {"rflow": rflow, "flow-dpmpp": flow_dpmpp, "flow-unipc": flow_unipc}
FLOW_SOLVERS = {"rflow": "euler", "flow-dpmpp": "dpmpp", "flow-unipc": "unipc"}  # of flow_levels()


# ---- HiGen (arXiv 2312.04483) and SR600: samplers of two passes

def appearance_matrix(frames, factor=1.0):
    """(f, f): how alike frames i and j look, 1 - factor |i - j| / (f - 1).

    A larger factor means more change over the clip; 0 means none.
    """
    i = torch.arange(frames, dtype=torch.float32)
    return 1 - factor * (i[:, None] - i).abs() / max(frames - 1, 1)


def appearance_rows(alike):
    """(b,f,f) likeness of frames -> (b,f,32), each row resized to what the network reads."""
    return F.interpolate(alike, 32, mode="linear", align_corners=True)


def higen(net, schedule, text, null, image_noise, video_noise, steps, cfg, eta=0.0,
          motion_factor=500, appearance_factor=1.0, sequential=False, progress=None,
          spacing="leading", generators=None):
    """HiGen's two passes of one network: an image, then the clip around it.

    image_noise (b,c,1,h,w), video_noise (b,c,f,h,w), published f = 32 -> latents like these two.
    """
    b, c, f, h, w = video_noise.shape
    device = video_noise.device

    def run(noise, prior, motion, appearance):
        fn = guided(net, text, null, cfg, sequential=sequential, image_prior=prior,
                    motion_factor=motion, appearance_factor=appearance)
        return ddim(fn, noise, schedule, steps, eta, generators, progress=progress, spacing=spacing)
    nothing = torch.zeros(b, c, h, w, device=device)
    still, same = torch.zeros(b, device=device), torch.ones(b, 1, 32, device=device)
    image = run(image_noise, nothing, still, same)
    motion = torch.full((b, f - 1), float(motion_factor), device=device)
    alike = appearance_matrix(f, appearance_factor).to(device)
    appearance = appearance_rows(alike.expand(b, -1, -1))
    return image, run(video_noise, image[:, :, 0], motion, appearance)


def sr600(net, schedule, text, null, latents, steps, cfg, generators=None, levels=700,
          inversion_steps=30, rescale=0.3, sequential=False, progress=None):
    """SR600 (VGen): invert an enlarged clip's latents (b,c,f,h,w), then sample from there.

    Inversion uses the cosine schedule and the negative prompt. Sampling, on `schedule`, starts
    from the noise it ends in, so the clip's layout stays.
    """
    inversion = make_schedule("cosine", schedule.prediction)
    noise = ddim_invert(lambda x, t: net(x, t, null), latents, inversion, inversion_steps, levels)
    fn = guided(net, text, null, cfg, rescale, sequential)
    return dpmpp_2m_sde(fn, noise, schedule, steps, generators, levels, progress)
