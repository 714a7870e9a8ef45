"""Noise schedules, prediction types, guidance, samplers and training losses: pure functions.

x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps, with ab ("alpha bar") the cumulative product of 1 - beta, kept in
float64 and cast to x's dtype when it is looked up. The network predicts eps, x0 or
v = sqrt(ab) eps - sqrt(1 - ab) x0 (Salimans & Ho, arXiv 2202.00512).

Rectified flow (Open-Sora) has a line of its own, x_t = (1 - t/1000) x0 + t/1000 eps, and v = x0 - eps.

Samplers take net_fn(x, t (b,)) -> prediction like x, usually made by guided(), and one torch.Generator a
sample for what they draw: a clip does not depend on its batch.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError

# ---- noise schedules: float64 betas

def linear_sd(num=1000, first=0.00085, last=0.012):
    """Stable Diffusion's "scaled linear": linear in sqrt(beta). ModelScope's and VideoCrafter2's."""
    return torch.linspace(first ** 0.5, last ** 0.5, num, dtype=torch.float64) ** 2


def cosine(num=1000, s=0.008):
    """Nichol & Dhariwal, arXiv 2102.09672, eq. 17: ab(u) = cos^2((u + s) / (1 + s) pi / 2), beta <= 0.999."""
    def g(u):
        return torch.cos((u + s) / (1 + s) * torch.pi / 2) ** 2
    u = torch.arange(num, dtype=torch.float64)
    return (1 - g((u + 1) / num) / g(u / num)).clamp(max=0.999)


def betas_of(ab):
    """The betas whose alpha bar is `ab`."""
    return 1 - ab / torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])


def linear_sd_shifted(num=1000, first=0.00085, last=0.012, divisor=1.0):
    """linear_sd with its SNR over `divisor`, CogVideoX's (3 for 2B, 1 for 5B), to be rescaled by zero_snr.

    make_schedule's `shift` comes after that rescaling, this one before it.
    """
    ab = torch.cumprod(1 - linear_sd(num, first, last), 0)
    return betas_of(shift_snr(ab, divisor ** -0.5))


def logsnr_cosine_interp(num=1000, scale_min=2.0, scale_max=4.0):
    """SR600's sampling: a cosine's log SNR in +-15 plus 2 ln(1 / scale), scale_min at the clean end.

    As published sigma = sqrt(1 - ab) is a float32: the noisiest step rounds to 1, pure noise.
    """
    u = torch.linspace(1, 0, num, dtype=torch.float64)  # 1: clean
    first, last = math.atan(math.exp(7.5)), math.atan(math.exp(-7.5))
    logsnr = -2 * torch.log(torch.tan(first + u * (last - first)))
    ab = torch.sigmoid(logsnr - 2 * (u * math.log(scale_min) + (1 - u) * math.log(scale_max)))
    ab = 1 - (1 - ab).sqrt().float().double() ** 2
    return betas_of(ab)


def zero_terminal_snr(betas):
    """Shift and scale sqrt(ab): the last step is pure noise (Lin et al., arXiv 2305.08891, algorithm 1)."""
    a = torch.cumprod(1 - betas, 0).sqrt()
    a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return betas_of(a ** 2)


def shift_snr(ab, factor):
    """Alpha bar with sqrt(ab / (1 - ab)) times `factor` (Hoogeboom et al., arXiv 2301.11093, section 2.1).

    The same noise hides a redundant signal (many pixels, many frames) less well; factor < 1 makes up for it.
    """
    return factor ** 2 * ab / (1 - ab + factor ** 2 * ab)


def x0_scale(num, first=1.0, last=0.7, ramp=400):
    """VideoCrafter2's factors on x0, (num,) float64: `ramp` steps from first to last, then last.

    A damped signal is more noise for the same ab, as in arXiv 2301.10972. (The original's table goes on for
    `ramp` more entries, which no step reaches.)
    """
    ramp = torch.linspace(first, last, ramp, dtype=torch.float64)
    return torch.cat([ramp, torch.full((num,), last, dtype=torch.float64)])[:num]


SCHEDULES = {"linear_sd": linear_sd, "linear_sd_shifted": linear_sd_shifted, "cosine": cosine,
             "logsnr_cosine_interp": logsnr_cosine_interp}


@dataclass(frozen=True)
class Schedule:
    """alpha_bar (T,) float64 and what the network predicts: "eps", "v", "x0". t: long tensor (b,) or int.

    scale (T,) or None: x_t = sqrt(ab_t) scale_t x0 + sqrt(1 - ab_t) eps. A network predicts v of scale_t x0,
    but x0 itself.
    """
    alpha_bar: Tensor
    prediction: str = "eps"
    scale: Tensor | None = None

    def _ab(self, t, like):
        """sqrt(ab_t), sqrt(1 - ab_t) in float64 precision, cast to like's dtype, shaped to multiply it."""
        ab = self.alpha_bar[torch.as_tensor(t).cpu()].reshape(-1, *[1] * (like.ndim - 1)).to(like.device)
        return ab.sqrt().to(like.dtype), (1 - ab).sqrt().to(like.dtype)

    def _scale(self, t, like):
        """scale_t, shaped to multiply `like`; 1 without a scale."""
        if self.scale is None:
            return 1
        return self.scale[torch.as_tensor(t).cpu()].reshape(-1, *[1] * (like.ndim - 1)).to(like)

    def add_noise(self, x0, noise, t):
        """x0, noise like x0, t -> x_t."""
        a, s = self._ab(t, x0)
        return a * self._scale(t, x0) * x0 + s * noise

    def target(self, x0, noise, t):
        """What the network should answer for x_t = add_noise(x0, noise, t)."""
        a, s = self._ab(t, x0)
        return {"eps": noise, "x0": x0, "v": a * noise - s * self._scale(t, x0) * x0}[self.prediction]

    def to_x0(self, out, x_t, t):
        """The network's answer at x_t -> the clean latents it stands for."""
        a, s = self._ab(t, x_t)
        k = self._scale(t, x_t)
        if self.prediction == "eps":
            return (x_t - s * out) / (a * k)
        return out if self.prediction == "x0" else a / k * x_t - s / k * out

    def to_eps(self, out, x_t, t):
        """The network's answer at x_t -> the noise it stands for."""
        a, s = self._ab(t, x_t)
        if self.prediction == "x0":
            return (x_t - a * self._scale(t, x_t) * out) / s
        return out if self.prediction == "eps" else a * out + s * x_t


def make_schedule(name="linear_sd", prediction="eps", zero_snr=False, shift=1.0, scale=None,
                  **kw) -> Schedule:
    """A Schedule from its betas' name in SCHEDULES, e.g. make_schedule("cosine", "v", zero_snr=True).

    scale: None or x0_scale's (first, last, ramp): VideoCrafter2 has (1.0, 0.7, 400).
    """
    if name not in SCHEDULES:
        raise UserError(f"noise schedule {name}: unknown; choose from {', '.join(SCHEDULES)}")
    betas = SCHEDULES[name](**kw)
    betas = zero_terminal_snr(betas) if zero_snr else betas
    scale = None if scale is None else x0_scale(len(betas), *scale)
    return Schedule(shift_snr(torch.cumprod(1 - betas, 0), shift), prediction, scale)


# ---- training losses

def diffusion_loss(net_fn, schedule, x0, noise, t, mask=None, coherence=0.0):
    """Mean over all elements of |net(x_t, t) - target|^2, one value a sample (b,), in fp32.

    net_fn(x_t, t) -> prediction; t (b,). mask (b,1,f,h,w) multiplies prediction and target (DreamVideo's
    subject masks); the mean still runs over all elements. coherence: weight of the same distance between
    what changes from frame to frame in the two (TF-T2V).
    """
    out = net_fn(schedule.add_noise(x0, noise, t), t).float()
    target = schedule.target(x0, noise, t).float()
    if mask is not None:
        out, target = out * mask, target * mask
    loss = (out - target).square().flatten(1).mean(1)
    if coherence and x0.shape[2] > 1:
        loss = loss + coherence * (out - target).diff(dim=2).square().flatten(1).mean(1)
    return loss


def pseudo_huber(a, b, c=0.001):
    """Mean over all elements of sqrt((a - b)^2 + c^2) - c, one value a sample (b,), in fp32.

    Nearly |a - b|, but smooth at 0: the loss of consistency distillation (arXiv 2310.14189).
    """
    return ((a.float() - b.float()).square() + c ** 2).sqrt().sub(c).flatten(1).mean(1)


def boundary_scalings(t, sigma_data=0.5, timestep_scaling=10.0):
    """c_skip, c_out of a consistency function f(x, t) = c_skip x + c_out x0; t: number or tensor.

    They make f(x, 0) = x (consistency models, arXiv 2303.01469; timestep_scaling: latent ones, 2310.04378).
    From t = 19 on f is x0 but for 7e-6.
    """
    u = timestep_scaling * t
    return sigma_data ** 2 / (u ** 2 + sigma_data ** 2), u / (u ** 2 + sigma_data ** 2) ** 0.5


def consistency(schedule, out, x_t, t):
    """A consistency function, f(x_t, t) = c_skip x_t + c_out x0, from the network's answer; t (b,) or int."""
    c_skip, c_out = boundary_scalings(torch.as_tensor(t).to(x_t).reshape(-1, *[1] * (x_t.ndim - 1)))
    return c_skip * x_t + c_out * schedule.to_x0(out, x_t, t)


# ---- guidance

def guided(net, text, null, cfg=None, rescale=0.0, sequential=False, null_cond=None, **cond):
    """-> fn(x, t, **now) = u + cfg (c - u): classifier-free guidance (arXiv 2207.12598; here 1 is off).

    c and u are the network's answers for `text` and `null` (b,n,d). cfg None or 1: c alone; a function of the
    step, an int: another scale at each (dynamic_guidance). Tensors in `cond` (b, ...) (fps, ...) go to both
    branches, as do those of a single call, `now` (rflow's frame_mask); null_cond {name: tensor} replaces some
    of `cond` in u.
    Both in one batched call, or with `sequential` in two, which halves the activations.
    rescale: share of the result brought back to c's standard deviation, against the over-exposure of large
    cfg (arXiv 2305.08891, section 3.4; SR600: 0.3).
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
            c, u = net(torch.cat([x, x]), torch.cat([t, t]), both_text, **both_cond, **both_now).chunk(2)
        scale = cfg(int(t[0])) if callable(cfg) else cfg
        out = u + scale * (c - u)
        if rescale:
            dims = tuple(range(1, out.ndim))
            factor = c.std(dims, keepdim=True) / out.std(dims, keepdim=True)
            out = (rescale * factor + 1 - rescale) * out
        return out
    return fn


def dynamic_guidance(cfg, steps, num=1000, as_published=False):
    """-> fn(t): guidance scale of the step t, for samplers with "trailing" steps (CogVideoX).

    It rises from 1 to 1 + cfg:  1 + cfg (1 - cos(pi (i / steps)^5)) / 2  at step i. as_published: diffusers'
    form, with which the demos of CogVideoX and Diffusion as Shader ran, has steps - t in the place of i,
    t = 999 ... 0 (a slip: the scale jumps up and down).
    """
    times = ddim_timesteps(steps, num, "trailing")

    def scale(t):
        i = steps - t if as_published else times.index(t)
        return 1 + cfg * (1 - math.cos(math.pi * (i / steps) ** 5)) / 2
    return scale


# ---- DDIM (Song et al., arXiv 2010.02502)

def ddim_timesteps(steps, num=1000, spacing="leading"):
    """Descending list of integer steps.

    "leading": VGen's 1 + k (num // steps), e.g. 981, ..., 21, 1 for 50; when steps does not divide num there
    are more than asked, as published. "trailing": num - 1 first, for schedules that end in pure noise
    (arXiv 2305.08891, section 3.3).
    """
    if not 1 <= steps <= num:
        raise UserError(f"--sample-steps {steps}: this sampler takes 1 to {num}")
    if spacing == "trailing":
        # numpy's rounding decides the halves (48 steps), as published; it may add an entry 0 at the end
        return [int(t) - 1 for t in np.arange(num, 0, -num / steps).round()[:steps]]
    return [min(1 + t, num - 1) for t in range(0, num, num // steps)][::-1]


def ddim_updates(steps, num=1000, spacing="leading"):
    """What the sampler does, as pairs (t, t_prev): from step t to t_prev; -1: to x0."""
    times = ddim_timesteps(steps, num, "leading" if spacing == "leading" else "trailing")
    if spacing == "leading":
        return [(t, max(t - num // steps, 0)) for t in times]
    if spacing == "trailing":
        return list(zip(times, times[1:] + [-1]))
    # "cogvideox", as published: the same where steps divides num; elsewhere each step lands beside the next
    # one's t, and the last may stop short of x0
    return [(t, t - num // steps) for t in times]


def number_of_updates(sampler, steps, spacing="leading") -> int:
    """How many updates a sampler makes: `steps`, or what a spacing of DDIM's makes of them."""
    if sampler == "dpm":
        return len(ddim_updates(steps, spacing="cogvideox"))
    return len(ddim_updates(steps, spacing=spacing)) if sampler == "ddim" else steps


def ddim_step(schedule, out, x, t, t_prev, eta=0.0, noise=None):
    """One update from step t to t_prev (ints; -1: all the way to x0), eq. 12. `noise` like x when eta > 0."""
    x0, eps = schedule.to_x0(out, x, t), schedule.to_eps(out, x, t)
    if t_prev < 0:
        return x0
    ab, ab_prev = schedule.alpha_bar[t].item(), schedule.alpha_bar[t_prev].item()
    sigma = eta * ((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev)) ** 0.5
    x = ab_prev ** 0.5 * schedule._scale(t_prev, x0) * x0 + max(1 - ab_prev - sigma ** 2, 0.0) ** 0.5 * eps
    return x if sigma == 0 else x + sigma * noise


def ddim(net_fn, x_T, schedule, steps, eta=0.0, generators=None, grad_last=0, spacing="leading",
         progress=None, last=None):
    """Sample: noise x_T (b,c,f,h,w) -> latents.

    generators: for the noise of eta > 0.
    grad_last: the last K updates record gradients, the state before them is constant (VADER, InstructVideo).
    last: only so many last updates are made, and x_T is the state at the step of the first of them, such as a
    clip noised to there (SDEdit, arXiv 2108.01073; InstructVideo).
    As published with "leading", the chain ends at ab_0, not at x0: a residual sqrt(1 - ab_0) eps stays,
    visually nil.
    """
    updates = ddim_updates(steps, len(schedule.alpha_bar), spacing)
    updates = updates if last is None else updates[len(updates) - last:]
    x = x_T
    for i, (t, t_prev) in enumerate(progress(updates) if progress else updates):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= len(updates) - grad_last):
            out = net_fn(x, torch.full((len(x),), t, device=x.device))
            noise = randn_like(x, generators) if eta > 0 else None
            x = ddim_step(schedule, out.float(), x, t, t_prev, eta, noise)
    return x


def ddim_invert_step(schedule, out, x, t, t_next):
    """One update of the reversed ODE, from step t up to t_next (len(alpha_bar): pure noise)."""
    x0, eps = schedule.to_x0(out, x, t), schedule.to_eps(out, x, t)
    if t_next >= len(schedule.alpha_bar):
        return eps
    return schedule.add_noise(x0, eps, t_next)


@torch.no_grad()
def ddim_invert(net_fn, x0, schedule, steps, levels=None):
    """Clean latents -> the noise that DDIM would turn into them; t = 0, s, 2s, ..., s = T // steps (VGen).

    Ends in pure noise, or with `levels` (T = levels) at the noise of step levels - 1 (SR600: 700).
    """
    num = len(schedule.alpha_bar) if levels is None else levels
    end = num if levels is None else levels - 1
    x = x0
    for t in range(0, num, num // steps):
        out = net_fn(x, torch.full((len(x),), t, device=x.device))
        x = ddim_invert_step(schedule, out.float(), x, t, min(t + num // steps, end))
    return x


# ---- latent consistency models (arXiv 2310.04378)

def lcm_timesteps(steps, num=1000, origin=50, spacing="stride"):
    """Descending list of integer steps, out of the `origin` steps of the distillation (999, 979, ..., 19).

    "stride": T2V-Turbo's every (origin // steps)-th, e.g. 999, 759, 519, 279 for 4. "even": VideoLCM's
    i origin / steps rounded down (diffusers 0.26), e.g. 999, 759, 499, 259.
    """
    if not 1 <= steps <= origin:
        raise UserError(f"--sample-steps {steps}: this consistency model takes 1 to {origin}")
    grid = [j * (num // origin) - 1 for j in range(origin, 0, -1)]
    if spacing == "even":
        return [grid[i * origin // steps] for i in range(steps)]
    return grid[::origin // steps][:steps]


@torch.no_grad()
def lcm(net_fn, x_T, schedule, steps, generators=None, origin=50, spacing="stride", progress=None):
    """Sample a consistency model: noise x_T (b,c,f,h,w) -> latents; jump to x0, add noise, jump again.

    The network is asked once a step: guidance was distilled into it (and may be one of its conditions).
    """
    times = lcm_timesteps(steps, len(schedule.alpha_bar), origin, spacing)
    x = x_T
    for i, t in enumerate(progress(times) if progress else times):
        out = net_fn(x, torch.full((len(x),), t, device=x.device))
        x0 = consistency(schedule, out.float(), x, t)
        if i + 1 < len(times):
            x = schedule.add_noise(x0, randn_like(x, generators), times[i + 1])
    return x0


# ---- DPM-Solver++ (Lu et al., arXiv 2211.01095)

def dpmpp_2m(net_fn, x_T, schedule, steps, grad_last=0, progress=None):
    """DPM-Solver++(2M), algorithm 2: noise x_T (b,c,f,h,w) -> latents. diffusers' for ModelScope, VADER's.

    No noise is drawn. With lam = ln sqrt(ab / (1 - ab)) and h = lam' - lam, from t to t':

        x' = sqrt((1 - ab') / (1 - ab)) x + (1 - exp(-h)) sqrt(ab') D
        D = x0 + h / (2 h_last) (x0 - x0_last)

    "linspace" steps, 999 = t_1 > ... > t_n, evenly spaced towards 0; the last update goes to x0 itself.
    grad_last: as in ddim().
    """
    num = len(schedule.alpha_bar)
    times = [int(t) for t in np.linspace(0, num - 1, steps + 1).round()[:0:-1]]
    ab = schedule.alpha_bar
    lam = 0.5 * (ab / (1 - ab)).log()
    x, last, h_last = x_T, None, None
    updates = list(zip(times, times[1:] + [-1]))
    for i, (t, t_prev) in enumerate(progress(updates) if progress else updates):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= steps - grad_last):
            out = net_fn(x, torch.full((len(x),), t, device=x.device))
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
    """SDE-DPM-Solver++(2M) from step levels - 1 (default: the last): x_T (b,c,f,h,w) -> latents. SR600's.

    The state is x = x0 + r eps with r = sigma / alpha; the network sees x / sqrt(1 + r^2), in the schedule's
    form. From r to r', with q = (r' / r)^2 and h = ln(r / r'):

        x' = q x + (1 - q) D + r' sqrt(1 - q) noise,    D = x0 + h / (2 h_last) (x0 - x0_last)

    x_T counts as noise of size 1: for SR600 what ddim_invert left of the small video.
    """
    num = len(schedule.alpha_bar)
    levels = levels or num
    # "trailing" real-valued steps, the last of them dropped: the chain jumps from the one before it to r = 0
    # (as published: where the division rounds up there is one more than asked)
    times = torch.arange(levels - 1, -1, -levels / (steps + 1), dtype=torch.float64).tolist()[:-1]
    log_r = 0.5 * torch.log((1 - schedule.alpha_bar) / schedule.alpha_bar)
    r = np.exp(np.interp(times, range(num), log_r.numpy())).tolist() + [0.0]
    x = x_T if math.isinf(r[0]) else r[0] * x_T
    last, h_last = None, None
    for i, t in enumerate(progress(times) if progress else times):
        pure = math.isinf(r[i])  # no signal at all, with zero terminal SNR
        x_in = x if pure else x / (1 + r[i] ** 2) ** 0.5
        step = round(t)
        out = net_fn(x_in, torch.full((len(x),), step, device=x.device))
        x0 = schedule.to_x0(out.float(), x_in, step)
        if r[i + 1] == 0:
            x = x0
        elif pure:  # as published: one Euler step, which keeps the noise it was given
            x = x0 + r[i + 1] * x_T
        else:
            q, h = (r[i + 1] / r[i]) ** 2, math.log(r[i] / r[i + 1])
            d = x0 if last is None else x0 + h / (2 * h_last) * (x0 - last)
            x = q * x + (1 - q) * d + r[i + 1] * (1 - q) ** 0.5 * randn_like(x, generators)
            last, h_last = x0, h
    return x


# ---- rectified flow (Liu et al., arXiv 2209.03003), as Open-Sora 1.2 has it; real t, 0 clean to 1000 noise

def flow_transform(t, frames, height, width):
    """Move t towards the noise for clips of more pixels and frames: t' = r t / (1 + (r - 1) t), t in 0..1.

    A large clip is redundant and the same noise hides it less well (arXiv 2403.03206, section 5.3.2). r is 1
    for an image of 512x512, and grows with the root of its pixels and of its latent frames. t: tensor, in
    sampling and in training; the size is in pixels.
    """
    latent_frames = 1 if frames == 1 else max(frames // 17 * 5, 1)
    r = (height * width / 512 ** 2 * latent_frames) ** 0.5
    return 1000 * r * t / (1000 + (r - 1) * t)


def flow_timesteps(steps, size=None):
    """Descending list of real steps, 1000 first, evenly spaced or with flow_transform for size (f, h, w)."""
    t = 1000 * (1 - torch.arange(steps, dtype=torch.float64) / steps)
    t = t if size is None else flow_transform(t, *size)
    return t.float().tolist()  # in float32 the first is 1000 exactly, which frame masks rely on


def flow_add_noise(x0, noise, t):
    """x0 (b,...), noise like x0, t (b,) or number -> x_t = (1 - t/1000) x0 + t/1000 noise."""
    t = torch.as_tensor(t, dtype=x0.dtype, device=x0.device).reshape(-1, *[1] * (x0.ndim - 1)) / 1000
    return (1 - t) * x0 + t * noise


def flow_loss(net_fn, x0, noise, t, frame_mask=None):
    """Mean over all elements of |v - (x0 - noise)|^2, one value a sample (b,), in fp32; t (b,).

    net_fn(x_t, t) -> v, which may have more channels than x0 (Open-Sora's second half is unused).
    frame_mask (b,f), True or 1: frames to learn; the others are conditions, given clean and not counted, and
    net_fn gets it as `frame_mask`.
    """
    x_t, now = flow_add_noise(x0, noise, t), {}
    if frame_mask is not None:
        frame_mask = frame_mask.bool()
        x_t = torch.where(frame_mask[:, None, :, None, None], x_t, x0)
        now["frame_mask"] = frame_mask
    v = net_fn(x_t, t, **now)[:, :x0.shape[1]].float()
    error = (v - (x0 - noise).float()).square().mean((1, 3, 4))  # b f
    if frame_mask is None:
        return error.mean(1)
    return (error * frame_mask).sum(1) / frame_mask.sum(1)


def noised(schedule, x0, noise, u, size=None, origin=None):
    """Any base's training input: u (n,) in 0..1 says how far -> x_t, t, what the network should answer.

    schedule None: rectified flow, with flow_transform for `size`. origin: only the steps of a consistency
    model's distillation (lcm_timesteps), e.g. 19, 39, ..., 999 of 50.
    """
    if schedule is None:
        t = 1000 * u if size is None else flow_transform(1000 * u, *size)
        return flow_add_noise(x0, noise, t), t, x0 - noise
    num = len(schedule.alpha_bar)
    t = (u * num).long() if origin is None else num // origin * ((u * origin).long() + 1) - 1
    return schedule.add_noise(x0, noise, t), t, schedule.target(x0, noise, t)


def rflow(net_fn, x_T, steps, size=None, frame_mask=None, generators=None, grad_last=0, progress=None):
    """Sample by Euler steps: noise x_T (b,c,f,h,w) -> latents, along x' = x + v (t - t_next) / 1000.

    size: (frames, height, width) in pixels, for flow_transform. grad_last: as in ddim().
    frame_mask (b,f) in 0..1: 1 makes a frame from noise; the others start as latents that are in x_T. 0 keeps
    them, m between keeps them down to t = 1000 m, noises them to there and lets them join (edits). net_fn
    gets `frame_mask` (b,f), True for the frames that take part. generators: for that noise.
    """
    times = flow_timesteps(steps, size)
    updates = list(zip(times, times[1:] + [0.0]))
    x, active = x_T, None if frame_mask is None else frame_mask == 1
    for i, (t, t_next) in enumerate(progress(updates) if progress else updates):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= len(updates) - grad_last):
            now = {}
            if frame_mask is not None:
                joined, active = active, 1000 * frame_mask >= t
                noised = flow_add_noise(x, randn_like(x, generators), t)  # drawn at each step, as published
                x = torch.where((active & ~joined)[:, None, :, None, None], noised, x)
                now["frame_mask"] = active
            v = net_fn(x, torch.full((len(x),), t, device=x.device), **now)[:, :x.shape[1]].float()
            moved = x + v * (t - t_next) / 1000
            x = moved if active is None else torch.where(active[:, None, :, None, None], moved, x)
    return x


def cogvideox_dpm(net_fn, x_T, schedule, steps, generators=None, grad_last=0, progress=None):
    """SDE-DPM-Solver++(2M), the sampler of CogVideoX-5B: noise x_T (b,c,f,h,w) -> latents, ab_T = 0.

    With lam = ln sqrt(ab / (1 - ab)), from t to t' of ddim_updates, h = lam' - lam and q = exp(-2 h):

        x' = sqrt(q (1 - ab') / (1 - ab)) x + (1 - q) sqrt(ab') D + sqrt((1 - q) (1 - ab')) noise
        D = x0 + h / (2 h_last) (x0 - x0_last),    h_last = lam - lam_last

    the solver of dpmpp_2m_sde in another parametrisation; but its first step, from lam = -inf (q = 0), adds
    fresh noise, and t' is CogVideoX's. grad_last: as in ddim().
    """
    ab = schedule.alpha_bar
    lam = 0.5 * (ab / (1 - ab)).log()  # -inf at the last step, which makes q = 0 and 1 / h_last = 0
    x, last, t_last = x_T, None, None
    updates = ddim_updates(steps, len(ab), "cogvideox")
    for i, (t, t_prev) in enumerate(progress(updates) if progress else updates):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= len(updates) - grad_last):
            out = net_fn(x, torch.full((len(x),), t, device=x.device))
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


# ---- HiGen (arXiv 2312.04483)

def appearance_matrix(frames, factor=1.0):
    """(f, f): row i says how alike frame i and each other look, 1 - factor |i - j| / (f - 1).

    Larger factor: more change over the clip; 0: none.
    """
    i = torch.arange(frames, dtype=torch.float32)
    return 1 - factor * (i[:, None] - i).abs() / max(frames - 1, 1)


def appearance_rows(alike):
    """(b,f,f) likeness of frames -> (b,f,32), what the network reads: other clips' rows are stretched."""
    return F.interpolate(alike, 32, mode="linear", align_corners=True)


def motion_factors(latents):
    """How far each frame is from the next, 0 (still) to 1000, whole numbers: (b,c,f,h,w) -> (b,f-1).

    Root mean square, times 1000. (The paper takes differences of neighbouring frames; their scale is not
    published. Latents of unit variance give sampling's 500 for a lively clip.)
    """
    step = latents.float().diff(dim=2).square().mean((1, 3, 4)).sqrt()
    return (1000 * step).round().clamp(max=1000)


# ---- noise

def randn(shape, generators, device="cpu"):
    """Noise of `shape` (b, ...), sample i from generators[i] on the CPU: same on any device, in any batch."""
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)


def randn_like(x, generators):
    return torch.randn_like(x) if generators is None else randn(x.shape, generators, x.device).to(x.dtype)


def offset_noise(noise, shared, strength=0.1):
    """Noise (b,c,f,h,w) plus `strength` of one more value a channel and frame, shared (b,c,f,1,1).

    Plain noise hardly touches the mean of a frame, so that a network never learns to choose its brightness.
    """
    return noise + strength * shared


def mix_noise(inverted, noise, strength):
    """sqrt(strength) inverted + sqrt(1 - strength) noise: DreamVideo's start, near a video's inversion."""
    return strength ** 0.5 * inverted + (1 - strength) ** 0.5 * noise


# ---- samplers of two passes

def higen(net, schedule, text, null, image_noise, video_noise, steps, cfg, eta=0.0, motion_factor=500,
          appearance_factor=1.0, sequential=False, progress=None, spacing="leading", generators=None):
    """HiGen's two passes of one network (arXiv 2312.04483): an image, then the clip around it.

    image_noise (b,c,1,h,w), video_noise (b,c,f,h,w), published f = 32 -> (image, video) latents.
    """
    b, c, f, h, w = video_noise.shape
    device = video_noise.device

    def run(noise, prior, motion, appearance):
        fn = guided(net, text, null, cfg, sequential=sequential, image_prior=prior, motion_factor=motion,
                    appearance_factor=appearance)
        return ddim(fn, noise, schedule, steps, eta, generators, progress=progress, spacing=spacing)
    prior = torch.zeros(b, c, h, w, device=device)
    image = run(image_noise, prior, torch.zeros(b, device=device), torch.ones(b, 1, 32, device=device))
    motion = torch.full((b, f - 1), float(motion_factor), device=device)
    appearance = appearance_rows(appearance_matrix(f, appearance_factor).to(device).expand(b, -1, -1))
    return image, run(video_noise, image[:, :, 0], motion, appearance)


def sr600(net, schedule, text, null, latents, steps, cfg, generators=None, levels=700, inversion_steps=30,
          rescale=0.3, sequential=False, progress=None):
    """SR600: invert the enlarged clip's latents, then sample from there with other words (VGen).

    Inversion runs on the cosine schedule with the negative prompt; sampling (on `schedule`) starts with the
    noise that it ends in, so that the clip's layout stays.
    """
    cosine = make_schedule("cosine", schedule.prediction)
    noise = ddim_invert(lambda x, t: net(x, t, null), latents, cosine, inversion_steps, levels)
    fn = guided(net, text, null, cfg, rescale, sequential)
    return dpmpp_2m_sde(fn, noise, schedule, steps, generators, levels, progress)
