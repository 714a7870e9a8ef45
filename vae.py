"""Autoencoders: video <-> latents, frame by frame.

AutoencoderKL is Stable Diffusion's (Rombach et al., arXiv 2112.10752). Keys are those of the SD checkpoint's
`first_stage_model.`. Latents are scaled: encode multiplies by cfg.scale, decode divides.
`python vae.py --train-tiny` trains the tiny world's autoencoder.
"""
import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models import attend


@dataclass(frozen=True)
class VAEConfig:
    """Defaults: the SD 2.1 autoencoder (84 M parameters), 8x smaller latents of 4 channels."""
    ch: int = 128
    ch_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    scale: float = 0.18215
    patch: int = 1  # tiny world: fold patch x patch pixels into channels at the door (no public file has it)

    @property
    def factor(self):
        """Pixels per latent, along height and width."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels; the projections are 1x1 convolutions, as published."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (rearrange(proj(h), "n c h w -> n (h w) c") for proj in (self.q, self.k, self.v))
        h = rearrange(attend(q, k, v, heads=1), "n (h w) c -> n c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # pad right and bottom only, as published


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def middle(channels):
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels)
    mid.attn_1 = AttnBlock(channels)
    mid.block_2 = ResnetBlock(channels, channels)
    return mid


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        channels = cfg.ch
        self.conv_in = nn.Conv2d(3 * cfg.patch ** 2, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, mult in enumerate(cfg.ch_mult):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(cfg.num_res_blocks):
                level.block.append(ResnetBlock(channels, cfg.ch * mult))
                channels = cfg.ch * mult
            if i < len(cfg.ch_mult) - 1:
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = middle(channels)
        self.norm_out, self.conv_out = norm(channels), nn.Conv2d(channels, 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        channels = cfg.ch * cfg.ch_mult[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, channels, 3, padding=1)
        self.mid = middle(channels)
        levels = []
        for i, mult in reversed(list(enumerate(cfg.ch_mult))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(cfg.num_res_blocks + 1):
                level.block.append(ResnetBlock(channels, cfg.ch * mult))
                channels = cfg.ch * mult
            if i > 0:
                level.upsample = Upsample(channels)
            levels.insert(0, level)  # stored in the encoder's order, run from the last to the first
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(channels), nn.Conv2d(channels, 3 * cfg.patch ** 2, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    def __init__(self, cfg=VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)

    def moments(self, images: Tensor):
        """images (n,3,h,w) in [-1,1] -> mean, log variance in [-30,20] of unscaled latents (n,c,h',w')."""
        images = F.pixel_unshuffle(images, self.cfg.patch)
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode_images(self, z: Tensor) -> Tensor:
        """Unscaled latents z (n,c,h',w') -> images (n,3,h,w), about [-1,1], not clamped."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.cfg.patch)

    def encode(self, video: Tensor, noise: Tensor | None = None, chunk: int = 16) -> Tensor:
        """video (b,3,f,h,w) in [-1,1] -> scaled latents (b,c,f,h',w').

        The mean, or a sample when there is `noise` like the latents: VGen trains on samples, never on the
        mean. `chunk` frames are encoded at a time.
        """
        images = rearrange(video, "b c f h w -> (b f) c h w")
        parts = [self.moments(images[i:i + chunk]) for i in range(0, len(images), chunk)]
        z = torch.cat([mean for mean, _ in parts])
        if noise is not None:
            std = torch.cat([logvar for _, logvar in parts]).mul(0.5).exp()
            z = z + std * rearrange(noise, "b c f h w -> (b f) c h w")
        return rearrange(z, "(b f) c h w -> b c f h w", b=len(video)) * self.cfg.scale

    def decode(self, latents: Tensor, frames=None, chunk: int = 16) -> Tensor:
        """Scaled latents (b,c,f,h',w') -> video (b,3,f,h,w), differentiable.

        frames: list of frame numbers to decode instead of all; the others cost nothing. `chunk` images are
        decoded at a time.
        """
        if frames is not None:
            latents = latents[:, :, frames]
        z = rearrange(latents, "b c f h w -> (b f) c h w") / self.cfg.scale
        images = torch.cat([self.decode_images(part) for part in z.split(chunk)])
        return rearrange(images, "(b f) c h w -> b c f h w", b=len(latents))


def vae_diffusers_name(key, levels=4):
    """Public key of AutoencoderKL -> the name of the same tensor in diffusers' AutoencoderKL."""
    for ours, theirs in (("mid.block_1", "mid_block.resnets.0"),
                         ("mid.block_2", "mid_block.resnets.1"),
                         ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
                         ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
                         ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
                         ("mid.attn_1.k", "mid_block.attentions.0.to_k"),
                         ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
                         ("nin_shortcut", "conv_shortcut"),
                         ("norm_out", "conv_norm_out")):
        key = key.replace(ours, theirs)
    parts = key.split(".")
    if parts[1] in ("down", "up"):
        level = int(parts[2]) if parts[1] == "down" else levels - 1 - int(parts[2])
        inner = {"block": ["resnets"], "downsample": ["downsamplers", "0"], "upsample": ["upsamplers", "0"]}
        parts = [parts[0], parts[1] + "_blocks", str(level), *inner[parts[3]], *parts[4:]]
    return ".".join(parts)


# ---- the tiny world's autoencoder:  python vae.py --train-tiny

TINY_VAE = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, patch=2, scale=1.0)


def train_tiny(out, steps, decoder_steps, batch=64, lr=2e-3, seed=0):
    """Train TINY_VAE on rendered frames, then its decoder alone, and put it into the tiny base's file `out`.

    Loss: L1 + MSE + 1e-4 KL, errors relative to a frame's contrast. The second stage leaves the latents as
    they are (a base may already be trained on them); with steps 0 it starts from the file's autoencoder.
    """
    from common import load_weights, replace_part
    from data import tiny_batch
    torch.manual_seed(seed)
    vae, start = AutoencoderKL(TINY_VAE), time.time()
    if not steps:
        state = {k.removeprefix("vae."): v for k, v in load_weights(out).items() if k.startswith("vae.")}
        vae.load_state_dict({k: v.float() for k, v in state.items()})
    for stage, (n, first) in enumerate(((steps, 0), (decoder_steps, steps))):
        decoder_only = stage == 1
        vae.encoder.requires_grad_(not decoder_only)
        vae.quant_conv.requires_grad_(not decoder_only)
        trained = [p for p in vae.parameters() if p.requires_grad]
        opt = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=max(n, 1), pct_start=0.05)
        for step in range(n):
            video, _, _ = tiny_batch((seed, first + step), batch // 4)
            images = rearrange(video[:, :, torch.randperm(video.shape[2])[:4]], "b c f h w -> (b f) c h w")
            with torch.set_grad_enabled(not decoder_only):
                mean, logvar = vae.moments(images)
            error = vae.decode_images(mean + (0.5 * logvar).exp() * torch.randn_like(mean)) - images
            kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
            # in units of each frame's own contrast: else blue on gray stays blurred, for it costs little
            centred = images - images.mean((2, 3), keepdim=True)
            contrast = centred.square().mean((1, 2, 3), keepdim=True).sqrt()
            scaled = error * (0.3 / contrast).clamp(max=5)
            loss = scaled.abs().mean() + scaled.square().mean() + 1e-4 * kl
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            opt.step()
            schedule.step()
            if step % 100 == 0 or step == n - 1:
                part = "decoder" if decoder_only else "all"
                print(f"{part} {step:5d}/{n} | mse {error.square().mean():.5f} | kl {kl:.3f} "
                      f"| latent std {mean.std():.3f} | {time.time() - start:.0f} s", flush=True)
    replace_part(out, "vae", vae.state_dict())


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--train-tiny", action="store_true", required=True,
                   help="train the tiny world's autoencoder")
    p.add_argument("--out", default="assets/tiny.safetensors", help="file whose autoencoder is replaced")
    p.add_argument("--steps", type=int, default=2000,
                   help="optimizer steps of 64 frames; 0: only the decoder, from --out")
    p.add_argument("--decoder-steps", type=int, default=2200, help="further steps with the encoder frozen")
    args = p.parse_args()
    train_tiny(args.out, args.steps, args.decoder_steps)
