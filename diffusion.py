"""Noise schedules, prediction types, guidance, the DDIM sampler and the training loss: pure functions.

x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps, with ab ("alpha bar") the cumulative product of 1 - beta, kept in
float64 and cast to x's dtype when it is looked up. The network predicts eps, x0 or
v = sqrt(ab) eps - sqrt(1 - ab) x0 (Salimans & Ho, arXiv 2202.00512).
"""
import math
from dataclasses import dataclass

import torch
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


def logsnr_cosine_interp(num=1000, scale_min=2.0, scale_max=4.0):
    """SR600's sampling: a cosine's log SNR in +-15 plus 2 ln(1 / scale), scale_min at the clean end."""
    u = torch.linspace(1, 0, num, dtype=torch.float64)  # 1: clean
    first, last = math.atan(math.exp(7.5)), math.atan(math.exp(-7.5))
    logsnr = -2 * torch.log(torch.tan(first + u * (last - first)))
    ab = torch.sigmoid(logsnr - 2 * (u * math.log(scale_min) + (1 - u) * math.log(scale_max)))
    return 1 - ab / torch.cat([torch.ones(1, dtype=torch.float64), ab[:-1]])


def zero_terminal_snr(betas):
    """Shift and scale sqrt(ab): the last step is pure noise (Lin et al., arXiv 2305.08891, algorithm 1)."""
    a = torch.cumprod(1 - betas, 0).sqrt()
    a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    ab = a ** 2
    return 1 - torch.cat([ab[:1], ab[1:] / ab[:-1]])


def shift_snr(ab, factor):
    """Alpha bar with sqrt(ab / (1 - ab)) times `factor` (Hoogeboom et al., arXiv 2301.11093, section 2.1).

    The same noise hides a redundant signal (many pixels, many frames) less well; factor < 1 makes up for it.
    """
    return factor ** 2 * ab / (1 - ab + factor ** 2 * ab)


SCHEDULES = {"linear_sd": linear_sd, "cosine": cosine, "logsnr_cosine_interp": logsnr_cosine_interp}


@dataclass(frozen=True)
class Schedule:
    """alpha_bar (T,) float64 and what the network predicts: "eps", "v", "x0". t: long tensor (b,) or int."""
    alpha_bar: Tensor
    prediction: str = "eps"

    def _ab(self, t, like):
        """sqrt(ab_t), sqrt(1 - ab_t) in float64 precision, cast to like's dtype, shaped to multiply it."""
        ab = self.alpha_bar[torch.as_tensor(t).cpu()].reshape(-1, *[1] * (like.ndim - 1)).to(like.device)
        return ab.sqrt().to(like.dtype), (1 - ab).sqrt().to(like.dtype)

    def add_noise(self, x0, noise, t):
        """x0, noise like x0, t -> x_t."""
        a, s = self._ab(t, x0)
        return a * x0 + s * noise

    def target(self, x0, noise, t):
        """What the network should answer for x_t = add_noise(x0, noise, t)."""
        a, s = self._ab(t, x0)
        return {"eps": noise, "x0": x0, "v": a * noise - s * x0}[self.prediction]

    def to_x0(self, out, x_t, t):
        """The network's answer at x_t -> the clean latents it stands for."""
        a, s = self._ab(t, x_t)
        if self.prediction == "eps":
            return (x_t - s * out) / a
        return out if self.prediction == "x0" else a * x_t - s * out

    def to_eps(self, out, x_t, t):
        """The network's answer at x_t -> the noise it stands for."""
        a, s = self._ab(t, x_t)
        if self.prediction == "x0":
            return (x_t - a * out) / s
        return out if self.prediction == "eps" else a * out + s * x_t


def make_schedule(name="linear_sd", prediction="eps", zero_snr=False, shift=1.0, **kw) -> Schedule:
    """A Schedule from its betas' name in SCHEDULES, e.g. make_schedule("cosine", "v", zero_snr=True)."""
    if name not in SCHEDULES:
        raise UserError(f"noise schedule {name}: unknown; choose from {', '.join(SCHEDULES)}")
    betas = SCHEDULES[name](**kw)
    betas = zero_terminal_snr(betas) if zero_snr else betas
    return Schedule(shift_snr(torch.cumprod(1 - betas, 0), shift), prediction)


# ---- training loss

def diffusion_loss(net_fn, schedule, x0, noise, t, mask=None):
    """Mean over all elements of |net(x_t, t) - target|^2, one value a sample (b,), in fp32.

    net_fn(x_t, t) -> prediction; t (b,). mask (b,1,f,h,w) multiplies prediction and target (DreamVideo's
    subject masks); the mean still runs over all elements.
    """
    out = net_fn(schedule.add_noise(x0, noise, t), t).float()
    target = schedule.target(x0, noise, t).float()
    if mask is not None:
        out, target = out * mask, target * mask
    return (out - target).square().flatten(1).mean(1)


# ---- guidance

def guided(net, text, null, cfg=None, **cond):
    """-> fn(x, t) = u + cfg (c - u): classifier-free guidance (arXiv 2207.12598, in the form with 1 for off).

    c and u are the network's answers for `text` and `null` (b,n,d), computed in one batched call. cfg None
    or 1: c alone. Tensors in `cond` (fps, ...) go to both.
    """
    if cfg is None or cfg == 1:
        return lambda x, t: net(x, t, text, **cond)
    both_text = torch.cat([text, null])
    both_cond = {k: torch.cat([v, v]) for k, v in cond.items()}

    def fn(x, t):
        c, u = net(torch.cat([x, x]), torch.cat([t, t]), both_text, **both_cond).chunk(2)
        return u + cfg * (c - u)
    return fn


# ---- DDIM (Song et al., arXiv 2010.02502)

def ddim_timesteps(steps, num=1000, spacing="leading"):
    """Descending list of integer steps.

    "leading": VGen's 1 + k (num // steps), e.g. 981, ..., 21, 1 for 50; when steps does not divide num there
    are more than asked, as published. "trailing": num - 1 first, for schedules that end in pure noise
    (arXiv 2305.08891, section 3.3).
    """
    if spacing == "trailing":
        return [round(num - i * num / steps) - 1 for i in range(steps)]
    return [min(1 + t, num - 1) for t in range(0, num, num // steps)][::-1]


def ddim_step(schedule, out, x, t, t_prev, eta=0.0, noise=None):
    """One update from step t to t_prev (ints; -1: all the way to x0), eq. 12. `noise` like x when eta > 0."""
    x0, eps = schedule.to_x0(out, x, t), schedule.to_eps(out, x, t)
    if t_prev < 0:
        return x0
    ab, ab_prev = schedule.alpha_bar[t].item(), schedule.alpha_bar[t_prev].item()
    sigma = eta * ((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev)) ** 0.5
    x = ab_prev ** 0.5 * x0 + max(1 - ab_prev - sigma ** 2, 0.0) ** 0.5 * eps
    return x if sigma == 0 else x + sigma * noise


def ddim(net_fn, x_T, schedule, steps, eta=0.0, generators=None, grad_last=0, spacing="leading",
         progress=None):
    """Sample: noise x_T (b,c,f,h,w) -> latents. net_fn(x, t (b,)) -> guided prediction.

    generators: one torch.Generator a sample, for the noise of eta > 0 (a clip does not depend on its batch).
    grad_last: the last K updates record gradients, the state before them is constant (VADER, InstructVideo).
    As published with "leading", the chain ends at ab_0, not at x0: a residual sqrt(1 - ab_0) eps stays,
    visually nil.
    """
    num = len(schedule.alpha_bar)
    times = ddim_timesteps(steps, num, spacing)
    if spacing == "trailing":
        updates = list(zip(times, times[1:] + [-1]))
    else:
        updates = [(t, max(t - num // steps, 0)) for t in times]
    x = x_T
    for i, (t, t_prev) in enumerate(progress(updates) if progress else updates):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= len(updates) - grad_last):
            out = net_fn(x, torch.full((len(x),), t, device=x.device))
            noise = randn_like(x, generators) if eta > 0 else None
            x = ddim_step(schedule, out.float(), x, t, t_prev, eta, noise)
    return x


def ddim_invert_step(schedule, out, x, t, t_next):
    """One update of the reversed ODE, from step t up to t_next (len(alpha_bar): pure noise, ab = 0)."""
    x0, eps = schedule.to_x0(out, x, t), schedule.to_eps(out, x, t)
    ab = schedule.alpha_bar[t_next].item() if t_next < len(schedule.alpha_bar) else 0.0
    return ab ** 0.5 * x0 + (1 - ab) ** 0.5 * eps


@torch.no_grad()
def ddim_invert(net_fn, x0, schedule, steps):
    """Clean latents -> the noise that DDIM would turn into them; t = 0, s, 2s, ..., s = T // steps (VGen)."""
    num = len(schedule.alpha_bar)
    x = x0
    for t in range(0, num, num // steps):
        out = net_fn(x, torch.full((len(x),), t, device=x.device))
        x = ddim_invert_step(schedule, out.float(), x, t, t + num // steps)
    return x


# ---- noise

def randn(shape, generators, device="cpu"):
    """Noise of `shape` (b, ...), sample i from generators[i] on the CPU: same on any device, in any batch."""
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)


def randn_like(x, generators):
    return torch.randn_like(x) if generators is None else randn(x.shape, generators, x.device).to(x.dtype)
