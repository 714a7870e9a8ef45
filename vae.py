"""Autoencoders: video <-> latents.

AutoencoderKL is Stable Diffusion's (Rombach et al., arXiv 2112.10752) and works frame by frame.
OpenSoraVAE is Open-Sora 1.2's: the same autoencoder, and another one over time on its latents.
CogVideoXVAE (arXiv 2408.06072) and WanVAE (2503.20314) are causal in time; the latents have 4 times
fewer frames than the video.

All have one interface, see Autoencoder, and the keys of their public files (for AutoencoderKL,
those below `first_stage_model.` of SD checkpoints). Maps from other namings stand next to them.
"""
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models import attend
from weights import below, rename


@dataclass(frozen=True)
class VAEConfig:
    """Defaults: the SD 2.1 autoencoder (84 M parameters), 8x smaller latents of 4 channels."""
    ch: int = 128
    ch_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    scale: float = 0.18215
    patch: int = 1  # the tiny world's option: fold patch x patch pixels into channels first

    @property
    def factor(self):
        """Pixels per latent, along height and width."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)

    @property
    def time_factor(self):
        """Frames per latent frame."""
        return 1

    def latent_frames(self, frames):
        """Number of latent frames of a clip."""
        return frames


class Autoencoder(nn.Module):
    """What the autoencoders share. Each also has a config `cfg` and two methods:

    moments(video, chunk=16): video (b,3,f,h,w) in [-1,1] -> mean and log variance in [-30,20] of
    unscaled latents (b,c,f',h',w').
    decode(latents, frames=None, chunk=16): scaled latents -> video (b,3,f,h,w) in about [-1,1], not
    clamped, differentiable. frames: list of the only frames wanted, numbered from 0.

    chunk: how many frames are processed at a time.
    """
    sampled = True  # networks train on samples of the encoder's Gaussian, not on its mean

    def normalise(self, z: Tensor) -> Tensor:
        """Unscaled latents -> the scaled ones that a video network sees."""
        return z * self.cfg.scale

    def encode(self, video: Tensor, noise: Tensor | None = None, chunk: int = 16) -> Tensor:
        """video (b,3,f,h,w) in [-1,1] -> scaled latents (b,c,f',h',w').

        The mean, or with `noise` like the latents a sample of the encoder's Gaussian (VGen and
        CogVideoX train on samples, never on the mean; Wan on the mean).
        """
        mean, logvar = self.moments(video, chunk)
        if noise is not None and self.sampled:
            mean = mean + (0.5 * logvar).exp() * noise
        return self.normalise(mean)


# ---- Stable Diffusion's autoencoder

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
    """Single-head self-attention over the pixels, with 1x1 convolutions as projections."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        projections = self.q, self.k, self.v
        q, k, v = (rearrange(layer(h), "n c h w -> n (h w) c") for layer in projections)
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
        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * cfg.z_channels, 3, padding=1)

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
        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, 3 * cfg.patch ** 2, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(Autoencoder):
    """Frame by frame: (b,3,f,h,w) <-> latents (b,4,f,h/8,w/8) by default."""

    def __init__(self, cfg=VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)

    def image_moments(self, images: Tensor):
        """images (n,3,h,w) in [-1,1] -> mean, log variance in [-30,20] of latents (n,c,h',w')."""
        images = F.pixel_unshuffle(images, self.cfg.patch)
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode_images(self, z: Tensor) -> Tensor:
        """Unscaled latents z (n,c,h',w') -> images (n,3,h,w), about [-1,1], not clamped."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.cfg.patch)

    def moments(self, video: Tensor, chunk: int = 16):
        """See Autoencoder."""
        images = rearrange(video, "b c f h w -> (b f) c h w")
        parts = zip(*(self.image_moments(part) for part in images.split(chunk)))
        return tuple(rearrange(torch.cat(x), "(b f) c h w -> b c f h w", b=len(video))
                     for x in parts)

    def decode(self, latents: Tensor, frames=None, chunk: int = 16) -> Tensor:
        """See Autoencoder. Frames that are not wanted cost nothing."""
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
        inner = {"block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
        parts = [parts[0], f"{parts[1]}_blocks", str(level), inner[parts[3]], *parts[4:]]
    return ".".join(parts)


# names in old diffusers files -> in new ones
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_state(state, net, source):
    """Public weights -> AutoencoderKL's: SD's (alone or in a whole SD file), or diffusers'."""
    state = below(state, "first_stage_model.")
    if any(k.startswith("encoder.down_blocks.") for k in state):
        for old, new in OLD_ATTENTION.items():
            state = {k.replace(f"attentions.0.{old}.", f"attentions.0.{new}."): v
                     for k, v in state.items()}
        levels = len(net.cfg.ch_mult)
        return rename(state, net, lambda key: vae_diffusers_name(key, levels), source)
    return {k: v for k, v in state.items() if not k.startswith(("loss.", "model_ema."))}


# ---- Open-Sora 1.2: AutoencoderKL for frames, then a causal autoencoder over time on its latents

@dataclass(frozen=True)
class OpenSoraVAEConfig:
    """Defaults: OpenSora-VAE-v1.2 (393 M parameters), 4 channels, 8x smaller, 4x fewer frames."""
    spatial: VAEConfig = VAEConfig()         # SDXL's shape, but scaled like SD's
    ch: int = 128
    ch_mult: tuple = (1, 2, 2, 4)
    num_res_blocks: int = 4
    time_down: tuple = (False, True, True)   # between which levels time is halved
    chunk_frames: int = 17                   # a clip is encoded in pieces of so many frames
    shift: tuple = (-0.10, 0.34, 0.27, 0.98)  # latents are (z - shift) / scale
    scale: tuple = (3.85, 2.32, 2.33, 3.06)

    @property
    def factor(self):
        """Pixels per latent, along height and width."""
        return self.spatial.factor

    @property
    def z_channels(self):
        return self.spatial.z_channels

    @property
    def time_factor(self):
        """Frames per latent; the first latent of a piece may hold fewer."""
        return 2 ** sum(self.time_down)

    def latent_frames(self, frames):
        """Number of latent frames of a clip, e.g. 51 -> 15."""
        whole, rest = divmod(frames, self.chunk_frames)
        in_piece = -(-self.chunk_frames // self.time_factor)  # rounded up
        return whole * in_piece + -(-rest // self.time_factor)


class FrontConv3d(nn.Module):
    """Convolution that sees a frame and those before it; before the first there are zeros."""

    def __init__(self, cin, cout, kernel, time_stride=1, bias=True):
        super().__init__()
        side = kernel // 2
        self.pad = side, side, side, side, kernel - time_stride, 0
        self.conv = nn.Conv3d(cin, cout, kernel, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, x):
        return self.conv(F.pad(x, self.pad))


class TimeResBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, cin), FrontConv3d(cin, cout, 3, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(32, cout), FrontConv3d(cout, cout, 3, bias=False)
        self.conv3 = nn.Identity() if cin == cout else FrontConv3d(cin, cout, 1, bias=False)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv3(x) + self.conv2(F.silu(self.norm2(h)))


def time_res_blocks(cin, cout, number):
    return nn.Sequential(*(TimeResBlock(cin if i == 0 else cout, cout) for i in range(number)))


class TimeDownsample(FrontConv3d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, time_stride=2)


class TimeUpsample(FrontConv3d):
    def __init__(self, channels):
        super().__init__(channels, 2 * channels, 3)

    def forward(self, x):
        return rearrange(super().forward(x), "b (c s) f h w -> b c (f s) h w", s=2)


class TimeEncoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * mult for mult in cfg.ch_mult]
        self.conv_in = FrontConv3d(cfg.z_channels, cfg.ch, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            time_res_blocks(cin, cout, cfg.num_res_blocks)
            for cin, cout in zip([cfg.ch, *widths], widths))
        self.conv_blocks = nn.ModuleList(
            TimeDownsample(width) if down else nn.Identity()
            for width, down in zip(widths, cfg.time_down))
        self.res_blocks = time_res_blocks(widths[-1], widths[-1], cfg.num_res_blocks)
        self.norm1 = nn.GroupNorm(32, widths[-1])
        self.conv2 = FrontConv3d(widths[-1], 2 * cfg.z_channels, 1)

    def forward(self, x):
        h = self.conv_in(x)
        for i, blocks in enumerate(self.block_res_blocks):
            h = blocks(h)
            if i < len(self.conv_blocks):
                h = self.conv_blocks[i](h)
        return self.conv2(F.silu(self.norm1(self.res_blocks(h))))


class TimeDecoder(nn.Module):
    """Lists are stored in the encoder's order and run from the last to the first."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * mult for mult in cfg.ch_mult]
        self.conv1 = FrontConv3d(cfg.z_channels, widths[-1], 3)
        self.res_blocks = time_res_blocks(widths[-1], widths[-1], cfg.num_res_blocks)
        self.block_res_blocks = nn.ModuleList(
            time_res_blocks(cin, cout, cfg.num_res_blocks)
            for cin, cout in zip([*widths[1:], widths[-1]], widths))
        self.conv_blocks = nn.ModuleList(
            TimeUpsample(width) if up else nn.Identity()
            for width, up in zip(widths[1:], cfg.time_down))
        self.norm1 = nn.GroupNorm(32, widths[0])
        self.conv_out = FrontConv3d(widths[0], cfg.z_channels, 3)

    def forward(self, z):
        h = self.res_blocks(self.conv1(z))
        for i, blocks in reversed(list(enumerate(self.block_res_blocks))):
            h = blocks(h)
            if i > 0:
                h = self.conv_blocks[i - 1](h)
        return self.conv_out(F.silu(self.norm1(h)))


class TimeAutoencoder(nn.Module):
    """Over time only: at most chunk_frames frames of the images' latents <-> 4x fewer."""

    def __init__(self, cfg):
        super().__init__()
        self.time_factor = cfg.time_factor
        self.encoder, self.decoder = TimeEncoder(cfg), TimeDecoder(cfg)
        self.quant_conv = FrontConv3d(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        self.post_quant_conv = FrontConv3d(cfg.z_channels, cfg.z_channels, 1)

    def moments(self, x):
        """x (b,c,f,h,w) -> mean, log variance in [-30,20] of f / 4 (rounded up) latent frames."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time_factor, 0))  # empty frames in front
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z, frames):
        """z (b,c,n,h,w) -> its last `frames` frames (b,c,frames,h,w): those in front were empty."""
        return self.decoder(self.post_quant_conv(z))[:, :, -frames % self.time_factor:]


class OpenSoraVAE(Autoencoder):
    """(b,3,f,h,w) <-> latents (b,4,n,h/8,w/8), n = cfg.latent_frames(f)."""

    def __init__(self, cfg=OpenSoraVAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.spatial_vae, self.temporal_vae = AutoencoderKL(cfg.spatial), TimeAutoencoder(cfg)
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.tensor(getattr(cfg, name)).view(1, -1, 1, 1, 1))

    def normalise(self, z: Tensor) -> Tensor:
        """Unscaled latents -> the scaled ones that a video network sees."""
        return (z - self.shift) / self.scale

    def moments(self, video: Tensor, chunk: int = 16):
        """See Autoencoder. Of the part over time, on the means of the images' latents.

        (The original samples the images' latents, too.)
        """
        images = self.spatial_vae.encode(video, chunk=chunk)
        pieces = images.split(self.cfg.chunk_frames, dim=2)
        parts = zip(*(self.temporal_vae.moments(piece) for piece in pieces))
        return tuple(torch.cat(x, dim=2) for x in parts)

    def decode(self, latents: Tensor, frames=None, chunk: int = 16,
               num_frames: int | None = None) -> Tensor:
        """See Autoencoder. num_frames: of the whole clip (default: the most that fit, 15 -> 51).

        Only the pieces of 17 frames that hold wanted ones go through the part over time, and only
        the wanted frames go through the part for images. (VADER decodes one latent frame as if a
        clip began there: latents[:, :, k:k + 1] with num_frames=1.)
        """
        cfg = self.cfg
        z = latents * self.scale + self.shift
        parts = z.split(cfg.latent_frames(cfg.chunk_frames), dim=2)
        if num_frames is None:
            last = min(cfg.chunk_frames, cfg.time_factor * parts[-1].shape[2])
            num_frames = (len(parts) - 1) * cfg.chunk_frames + last
        frames = range(num_frames) if frames is None else frames
        pieces = {}
        for i in {k // cfg.chunk_frames for k in frames}:
            left = num_frames - i * cfg.chunk_frames
            pieces[i] = self.temporal_vae.decode(parts[i], min(cfg.chunk_frames, left))
        images = [pieces[k // cfg.chunk_frames][:, :, k % cfg.chunk_frames] for k in frames]
        return self.spatial_vae.decode(torch.stack(images, dim=2), chunk=chunk)


def opensora_vae_name(key, levels=4):
    """Key of OpenSoraVAE -> the public file's, whose part for images has diffusers' names."""
    part, _, rest = key.partition(".")
    if part != "spatial_vae":
        return key
    return f"spatial_vae.module.{vae_diffusers_name(rest, levels)}"


def opensora_vae_state(state, net, source):
    """Public weights -> OpenSoraVAE's."""
    return rename(state, net, opensora_vae_name, source)


# ---- CogVideoX's autoencoder: causal in time (arXiv 2408.06072, section 2.1)

@dataclass(frozen=True)
class CogVideoXVAEConfig:
    """Defaults: CogVideoX-5B's and 5B-I2V's (216 M parameters). 2B's has scale 1.15258426."""
    widths: tuple = (128, 256, 256, 512)
    layers: int = 3            # residual blocks per level; the decoder has one more
    z_channels: int = 16
    groups: int = 32           # of the GroupNorms
    scale: float = 0.7

    @property
    def factor(self):
        """Pixels per latent, along height and width."""
        return 2 ** (len(self.widths) - 1)

    @property
    def time_factor(self):
        """Frames per latent frame, after the first one, which stands alone."""
        return 2 ** min(len(self.widths) - 1, TIME_LEVELS)

    def latent_frames(self, frames):
        """Number of latent frames of a clip, e.g. 49 -> 13."""
        return 1 + (frames - 1) // self.time_factor


TIME_LEVELS = 2  # only the first levels halve the frames
# Frames pass in chunks. GroupNorm takes its statistics over a chunk, so the public weights rely
# on these sizes. The remainder joins the first chunk: 49 frames are 9 8 8 8 8 8, their 13 latent
# frames 3 2 2 2 2 2.
ENCODE_CHUNK = 8
DECODE_CHUNK = 2


@dataclass(frozen=True)
class Tiles:
    """Split pictures larger than a tile (in pixels) into overlapping tiles and blend the results.

    It saves memory; the result differs slightly from that without tiles. Defaults: diffusers'
    enable_tiling for 480 x 720, with which Diffusion as Shader was trained. height (1 -
    overlap_height) must be a multiple of 8, and likewise for the width.
    """
    height: int = 240
    width: int = 360
    overlap_height: float = 1 / 6
    overlap_width: float = 1 / 5


class CausalConv(nn.Module):
    """3x3x3 convolution that sees no later frame.

    cache: {module: the last two frames of its last chunk}.
    """

    def __init__(self, cin, cout):
        super().__init__()
        self.conv = nn.Conv3d(cin, cout, 3, padding=(0, 1, 1))

    def forward(self, x, cache):
        before = cache[self] if self in cache else x[:, :, :1].expand(-1, -1, 2, -1, -1)
        x = torch.cat([before, x], dim=2)
        cache[self] = x[:, :, -2:].clone()  # a view would keep all of x in memory
        return self.conv(x)


class Pointwise(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.conv = nn.Conv3d(cin, cout, 1)

    def forward(self, x):
        return self.conv(x)


# A chunk with an odd number of frames is a clip's first one: its first frame stands alone, and only
# the others are halved or doubled in time.

def enlarge(z, like):
    """z (b,c,f,h,w) -> frames, height and width of `like`, nearest."""
    frames, h, w = like.shape[2:]
    odd = frames % 2
    parts = ((z[:, :, :odd], odd), (z[:, :, odd:], frames - odd))
    return torch.cat([F.interpolate(part, (f, h, w)) for part, f in parts if f], dim=2)


class LatentNorm(nn.Module):
    """GroupNorm, scaled and shifted at each place by the latents there (MoVQ, arXiv 2209.09002)."""

    def __init__(self, channels, cfg):
        super().__init__()
        self.norm_layer = nn.GroupNorm(cfg.groups, channels, eps=1e-6)
        self.conv_y = Pointwise(cfg.z_channels, channels)
        self.conv_b = Pointwise(cfg.z_channels, channels)

    def forward(self, x, z):
        # the original enlarges z first; a 1x1x1 convolution commutes with that and is cheaper
        # before it
        return self.norm_layer(x) * enlarge(self.conv_y(z), x) + enlarge(self.conv_b(z), x)


class CausalResnet(nn.Module):
    """Two causal convolutions. Encoder: latent=False, GroupNorms, z None. Decoder: LatentNorms."""

    def __init__(self, cin, cout, cfg, latent):
        super().__init__()
        def norm(channels):
            if latent:
                return LatentNorm(channels, cfg)
            return nn.GroupNorm(cfg.groups, channels, eps=1e-6)
        self.norm1, self.conv1 = norm(cin), CausalConv(cin, cout)
        self.norm2, self.conv2 = norm(cout), CausalConv(cout, cout)
        self.conv_shortcut = nn.Identity() if cin == cout else nn.Conv3d(cin, cout, 1)

    def forward(self, x, cache, z=None):
        given = () if z is None else (z,)
        h = self.conv1(F.silu(self.norm1(x, *given)), cache)
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h, *given)), cache)


def per_frame(layer, x):
    """layer(images (n,c,h,w)) on every frame of x (b,c,f,h,w)."""
    out = layer(rearrange(x, "b c f h w -> (b f) c h w"))
    return rearrange(out, "(b f) c h w -> b c f h w", b=len(x))


class CausalDownsample(Downsample):
    """Half the height and width; with `time` also half the frames, as means of pairs."""

    def __init__(self, channels, time):
        super().__init__(channels)
        self.time = time

    def forward(self, x):
        if self.time:
            odd = x.shape[2] % 2
            pairs = x[:, :, odd:]
            x = torch.cat([x[:, :, :odd], (pairs[:, :, ::2] + pairs[:, :, 1::2]) / 2], dim=2)
        return per_frame(super().forward, x)


class CausalUpsample(Upsample):
    """Twice the height and width; with `time` also twice the frames."""

    def __init__(self, channels, time):
        super().__init__(channels)
        self.time = time

    def forward(self, x):
        if self.time:
            odd = x.shape[2] % 2
            x = torch.cat([x[:, :, :odd], x[:, :, odd:].repeat_interleave(2, dim=2)], dim=2)
        return per_frame(super().forward, x)


def causal_levels(widths, layers, cfg, latent, resize):
    """Levels of residual blocks, a ModuleList; each but the last ends in resize(channels, time)."""
    levels, cin = nn.ModuleList(), widths[0]
    for i, width in enumerate(widths):
        level = nn.Module()
        level.resnets = nn.ModuleList()
        for _ in range(layers):
            level.resnets.append(CausalResnet(cin, width, cfg, latent))
            cin = width
        if i < len(widths) - 1:
            name = "upsamplers" if latent else "downsamplers"
            setattr(level, name, nn.ModuleList([resize(width, time=i < TIME_LEVELS)]))
        levels.append(level)
    return levels


def causal_middle(channels, cfg, latent):
    mid = nn.Module()
    mid.resnets = nn.ModuleList(CausalResnet(channels, channels, cfg, latent) for _ in range(2))
    return mid


class CausalEncoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        last = cfg.widths[-1]
        self.conv_in = CausalConv(3, cfg.widths[0])
        self.down_blocks = causal_levels(cfg.widths, cfg.layers, cfg, False, CausalDownsample)
        self.mid_block = causal_middle(last, cfg, False)
        self.norm_out = nn.GroupNorm(cfg.groups, last, eps=1e-6)
        self.conv_out = CausalConv(last, 2 * cfg.z_channels)

    def forward(self, x, cache):
        h = self.conv_in(x, cache)
        for level in self.down_blocks:
            for block in level.resnets:
                h = block(h, cache)
            for resize in getattr(level, "downsamplers", ()):
                h = resize(h)
        for block in self.mid_block.resnets:
            h = block(h, cache)
        return self.conv_out(F.silu(self.norm_out(h)), cache)


class CausalDecoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths = cfg.widths[::-1]
        self.conv_in = CausalConv(cfg.z_channels, widths[0])
        self.mid_block = causal_middle(widths[0], cfg, True)
        self.up_blocks = causal_levels(widths, cfg.layers + 1, cfg, True, CausalUpsample)
        self.norm_out = LatentNorm(widths[-1], cfg)
        self.conv_out = CausalConv(widths[-1], 3)

    def forward(self, z, cache):
        h = self.conv_in(z, cache)
        for block in self.mid_block.resnets:
            h = block(h, cache, z)
        for level in self.up_blocks:
            for block in level.resnets:
                h = block(h, cache, z)
            for resize in getattr(level, "upsamplers", ()):
                h = resize(h)
        return self.conv_out(F.silu(self.norm_out(h, z)), cache)


def in_chunks(part, x, size, enough=None):
    """part(chunk, cache) over the frames of x (b,c,f,h,w), until there are `enough` (None: all)."""
    f, cache, out, done = x.shape[2], {}, [], 0
    later = max(f // size - 1, 0)
    for chunk in x.split([f - later * size] + [size] * later, dim=2):
        out.append(part(chunk, cache))
        done += out[-1].shape[2]
        if enough is not None and done >= enough:
            break
    return torch.cat(out, dim=2)


def blend(before, tile, extent, dim):
    """`tile`, faded in along `dim` from the end of `before` over the first `extent` places."""
    size = tile.shape[dim]
    extent = min(extent, before.shape[dim], size)
    weight = torch.arange(extent, device=tile.device, dtype=tile.dtype) / max(extent, 1)
    weight = weight[:, None] if dim == -2 else weight
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start, rest = tile.split([extent, size - extent], dim=dim)
    return torch.cat([end * (1 - weight) + start * weight, rest], dim=dim)


def tiled(part, x, tile, out_tile, overlap):
    """part(x) put together from tiles of `tile` (rows, columns), which it turns into `out_tile`."""
    step = [int(n * (1 - share)) for n, share in zip(tile, overlap)]
    extent = [int(n * share) for n, share in zip(out_tile, overlap)]
    keep_h, keep_w = (n - e for n, e in zip(out_tile, extent))
    rows = []
    for i in range(0, x.shape[3], step[0]):
        row = []
        for j in range(0, x.shape[4], step[1]):
            y = part(x[..., i:i + tile[0], j:j + tile[1]])
            if rows:  # with neighbours that are already blended, as published
                y = blend(rows[-1][len(row)], y, extent[0], -2)
            if row:
                y = blend(row[-1], y, extent[1], -1)
            row.append(y)
        rows.append(row)
    return torch.cat([torch.cat([y[..., :keep_h, :keep_w] for y in row], -1) for row in rows], -2)


class TiledAutoencoder(Autoencoder):
    """An autoencoder that may take large pictures in tiles."""
    tiles = None  # Tiles() to save memory

    def in_tiles(self, part, x, decode=False):
        """part(x), video to latents or with `decode` back, in tiles if there are some and x is
        larger than one."""
        if self.tiles is None:
            return part(x)
        t = self.tiles
        pixels, overlap = (t.height, t.width), (t.overlap_height, t.overlap_width)
        latents = tuple(n // self.cfg.factor for n in pixels)
        here, there = (latents, pixels) if decode else (pixels, latents)
        if x.shape[3] <= here[0] and x.shape[4] <= here[1]:
            return part(x)
        return tiled(part, x, here, there, overlap)


class CogVideoXVAE(TiledAutoencoder):
    """(b,3,f,h,w) <-> latents (b,16,1 + (f - 1) / 4,h / 8,w / 8), where f is 8 k + 1.

    Clips of another length are encoded, too, but not restored: an even number n of latent frames
    is decoded to 4 n frames. moments() and decode() take as many clips at a time as have `chunk`
    frames in total, at least one.
    """

    def __init__(self, cfg=CogVideoXVAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = CausalEncoder(cfg), CausalDecoder(cfg)

    def moments(self, video: Tensor, chunk: int = 16):
        """See Autoencoder."""
        parts = [self.clip_moments(clips) for clips in video.split(max(1, chunk // video.shape[2]))]
        mean, logvar = torch.cat(parts).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def clip_moments(self, video: Tensor) -> Tensor:
        """video (b,3,f,h,w) -> mean, then log variance of unscaled latents, (b,2c,f',h',w')."""
        return self.in_tiles(lambda x: in_chunks(self.encoder, x, ENCODE_CHUNK), video)

    def decode(self, latents: Tensor, frames=None, chunk: int = 16) -> Tensor:
        """See Autoencoder. Chunks after the last wanted frame cost nothing, those before it do."""
        enough = None if frames is None else max(frames) + 1
        clips = max(1, chunk // (latents.shape[2] * self.cfg.time_factor))
        parts = [self.decode_latents(z / self.cfg.scale, enough) for z in latents.split(clips)]
        video = torch.cat(parts)
        return video if frames is None else video[:, :, frames]

    def decode_latents(self, z: Tensor, enough=None) -> Tensor:
        """Unscaled latents z -> video (b,3,f,h,w), at least `enough` frames of it (None: all)."""
        def part(z):
            return in_chunks(self.decoder, z, DECODE_CHUNK, enough)
        return self.in_tiles(part, z, decode=True)


def cogvideox_vae_state(state, net, source):
    """Public weights -> CogVideoXVAE's: the keys are the same."""
    return state


# ---- Wan's autoencoders: causal in time, without statistics over time or space

# of the latents, per channel, as published (they are not in the files)
WAN21_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
              0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN21_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
             3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
    0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
    -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
    -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
    0.3573, -0.0548, -0.1681, -0.0667)
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)


@dataclass(frozen=True)
class WanVAEConfig:
    """Defaults: Wan2.1's (126.9 M parameters), latents of 16 channels, 8x smaller, 4x fewer frames.

    WAN22_VAE is that of Wan2.2-TI2V-5B (704.7 M): 48 channels, 16x smaller.
    """
    dim: int = 96              # width of the encoder's first level
    decoder_dim: int = 96      # and of the decoder's last one
    mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2    # per level of the encoder; the decoder has one more
    z_channels: int = 16
    patch: int = 1             # 2.2: fold patch x patch pixels into channels first
    shortcuts: bool = False    # 2.2: around each level, without parameters
    mean: tuple = WAN21_MEAN   # latents are (z - mean) / std
    std: tuple = WAN21_STD
    time_down: tuple = (False, True, True)  # after which levels time is halved

    @property
    def factor(self):
        """Pixels per latent, along height and width."""
        return self.patch * 2 ** (len(self.mult) - 1)

    @property
    def time_factor(self):
        """Frames per latent frame, after the first one, which stands alone."""
        return 2 ** sum(self.time_down)

    def latent_frames(self, frames):
        """Number of latent frames of a clip, e.g. 81 -> 21."""
        return 1 + (frames - 1) // self.time_factor


WAN22_VAE = WanVAEConfig(dim=160, decoder_dim=256, z_channels=48, patch=2, shortcuts=True,
                         mean=WAN22_MEAN, std=WAN22_STD)


class Past:
    """What causal layers are told while a clip passes in chunks, or only a part of it.

    start: do these frames begin with the clip's first one? Before that there are zeros. kept
    {layer: its last input frames of the chunk before}; None: a chunk comes alone. needed {layer:
    number of its output frames, from the end, that are worth keeping}.
    """

    def __init__(self, start=True, kept=None, needed=None):
        self.start, self.kept, self.needed = start, kept, needed or {}

    def before(self, layer, x, number):
        """Input x (b,c,f,h,w) of `layer`, after the last `number` frames of the chunk before."""
        if not self.start and self.kept is not None:
            x = torch.cat([self.kept[layer], x], dim=2)
        if self.kept is not None:
            self.kept[layer] = x[:, :, -number:].clone()  # a view would keep all of x in memory
        return x


class Chain(nn.Sequential):
    """Layers in a row, of which some need a Past."""

    def forward(self, x, past):
        for layer in self:
            x = layer(x, past) if isinstance(layer, CAUSAL) else layer(x)
        return x


class FrameConv(nn.Conv3d):
    """nn.Conv3d. On a CPU it makes the output frames of one latent frame at a time (`together`, see
    WanVAE), however long the chunk is: oneDNN rounds otherwise for another number of frames.

    alone: the first output frame sees zeros and one frame, so that the others need no work.
    """
    together = 1

    def forward(self, x, alone=False):
        if x.device.type != "cpu":
            return super().forward(x)
        length, stride, out = self.kernel_size[0], self.stride[0], []
        frames = (x.shape[2] - length) // stride + 1
        over = frames % self.together  # a clip's first frame, or where a part of a clip begins
        for i, n in enumerate([1] * over + [self.together] * (frames // self.together)):
            i = i if i < over else over + (i - over) * self.together
            first = length - 1 if alone and i == 0 else 0  # tap
            seen = x[:, :, i * stride + first:(i + n - 1) * stride + length]
            out.append(F.conv3d(
                seen, self.weight[:, :, first:], self.bias, self.stride, self.padding))
        return torch.cat(out, dim=2) if len(out) > 1 else out[0]


class WanConv(FrameConv):
    """Convolution over 3 frames and 3x3 pixels that sees no later frame.

    Without earlier frames (see Past) the first two frames are only read.
    """

    def __init__(self, cin, cout):
        super().__init__(cin, cout, 3, padding=(0, 1, 1))

    def forward(self, x, past):
        if past.start:
            x = F.pad(x, (0, 0, 0, 0, 2, 0))
        return super().forward(past.before(self, x, 2), alone=past.start)


class WanHalve(FrameConv):
    """Half the frames. A clip's first frame stays as it is."""

    def __init__(self, channels):
        super().__init__(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x, past):
        first = x[:, :, :int(past.start)]
        x = past.before(self, x, 1)
        return torch.cat([first, super().forward(x)], dim=2) if x.shape[2] > 1 else first


class WanDouble(FrameConv):
    """Twice the frames: two halves of the channels. A clip's first frame stays as it is and is not
    seen by the others."""

    def __init__(self, channels):
        super().__init__(channels, 2 * channels, (3, 1, 1))

    def forward(self, x, past):
        alone = int(past.start)  # frames
        first, x = x[:, :, :alone], x[:, :, alone:]
        if past.start:
            x = F.pad(x, (0, 0, 0, 0, 2, 0))
        x = past.before(self, x, 2)
        if x.shape[2] > 2:
            x = rearrange(super().forward(x), "b (s c) f h w -> b c (f s) h w", s=2)
            x = torch.cat([first, x], dim=2)
        else:
            x = first
        if self in past.needed and x.shape[2] > past.needed[self]:
            past.start, x = False, x[:, :, -past.needed[self]:]
        return x


def frame_by_frame(layer, x):
    """per_frame(), on a CPU one frame at a time, for the reason of FrameConv."""
    if x.device.type != "cpu":
        return per_frame(layer, x)
    return torch.stack([layer(frame) for frame in x.unbind(2)], dim=2)


class PerFrame(nn.Sequential):
    """Layers for images (n,c,h,w), on every frame of a video."""

    def forward(self, x):
        return frame_by_frame(super().forward, x)


class WanNorm(nn.Module):
    """Each position's channels, scaled to a root mean square of 1, times gamma."""

    def __init__(self, channels, axes=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x):
        precise = torch.promote_types(x.dtype, torch.float32)
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=precise)
        return x / size.clamp(min=1e-12).to(x.dtype) * (self.gamma * x.shape[1] ** 0.5)


class WanResBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.residual = Chain(WanNorm(cin), nn.SiLU(), WanConv(cin, cout),
                              WanNorm(cout), nn.SiLU(), nn.Identity(), WanConv(cout, cout))
        self.shortcut = nn.Identity() if cin == cout else FrameConv(cin, cout, 1)

    def forward(self, x, past):
        h = self.residual(x, past)
        return self.shortcut(x[:, :, -h.shape[2]:]) + h


class WanAttention(nn.Module):
    """Single-head self-attention over the pixels of a frame."""

    def __init__(self, channels):
        super().__init__()
        self.norm = WanNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + frame_by_frame(self.attend, x)

    def attend(self, x):
        """x (n,c,h,w) -> what is added to it."""
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "n c h w -> n (h w) c").chunk(3, dim=-1)
        return self.proj(rearrange(attend(q, k, v, heads=1), "n (h w) c -> n c h w", h=x.shape[2]))


class WanDownLevel(nn.Module):
    """A level of 2.2's encoder; around it, means over cells of frames, rows, columns, channels."""

    def __init__(self, layers, cout, time_factor, factor):
        super().__init__()
        self.downsamples = Chain(*layers)
        self.cout, self.cell = cout, dict(t=time_factor, p=factor, q=factor)

    def forward(self, x, past):
        short = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.cell["t"], 0))
        short = rearrange(short, "b c (f t) (h p) (w q) -> b (c t p q) f h w", **self.cell)
        return self.downsamples(x, past) + short.unflatten(1, (self.cout, -1)).mean(2)


class WanUpLevel(nn.Module):
    """A level of 2.2's decoder; around it, channels that become frames, rows and columns."""

    def __init__(self, layers, cout, time_factor):
        super().__init__()
        self.upsamples = Chain(*layers)
        self.cout, self.cell = cout, dict(t=time_factor, p=2, q=2)

    def forward(self, x, past):
        short = x.repeat_interleave(4 * self.cell["t"] * self.cout // x.shape[1], dim=1)
        short = rearrange(short, "b (c t p q) f h w -> b c (f t) (h p) (w q)", **self.cell)
        x = self.upsamples(x, past)
        return x + short[:, :, -x.shape[2]:]  # of the clip's first frame only the last copy


CAUSAL = Chain, WanConv, WanHalve, WanDouble, WanResBlock, WanDownLevel, WanUpLevel


def named(**layers):
    """A Chain with these names; None is left out."""
    return Chain(OrderedDict((name, layer) for name, layer in layers.items() if layer))


def wan_blocks(cin, cout, number):
    return [WanResBlock(cin if i == 0 else cout, cout) for i in range(number)]


def wan_middle(channels):
    return Chain(*wan_blocks(channels, channels, 1), WanAttention(channels),
                 *wan_blocks(channels, channels, 1))


def wan_encoder(cfg):
    widths, levels = [cfg.dim * mult for mult in cfg.mult], []
    for i, (cin, cout) in enumerate(zip([cfg.dim, *widths], widths)):
        layers, last = wan_blocks(cin, cout, cfg.num_res_blocks), i == len(widths) - 1
        time = not last and cfg.time_down[i]
        if not last:
            shrink = nn.Conv2d(cout, cout, 3, stride=2)
            layers.append(named(resample=PerFrame(nn.ZeroPad2d((0, 1, 0, 1)), shrink),
                                time_conv=WanHalve(cout) if time else None))
        levels += [WanDownLevel(layers, cout, 1 + time, 2 - last)] if cfg.shortcuts else layers
    return named(conv1=WanConv(3 * cfg.patch ** 2, cfg.dim), downsamples=Chain(*levels),
                 middle=wan_middle(cout), head=wan_head(cout, 2 * cfg.z_channels))


def wan_decoder(cfg):
    widths, levels = [cfg.decoder_dim * mult for mult in cfg.mult[::-1]], []
    cin = widths[0]
    for i, cout in enumerate(widths):
        layers, last = wan_blocks(cin, cout, cfg.num_res_blocks + 1), i == len(widths) - 1
        time = not last and cfg.time_down[-1 - i]
        cin = cout if cfg.shortcuts else cout // 2  # of the next level
        if not last:
            enlarge = PerFrame(nn.Upsample(scale_factor=2), nn.Conv2d(cout, cin, 3, padding=1))
            layers.append(named(time_conv=WanDouble(cout) if time else None, resample=enlarge))
        if cfg.shortcuts:
            whole = WanUpLevel(layers, cout, 1 + time)
            layers = [named(upsamples=Chain(*layers)) if last else whole]
        levels += layers
    return named(conv1=WanConv(cfg.z_channels, widths[0]), middle=wan_middle(widths[0]),
                 upsamples=Chain(*levels), head=wan_head(cout, 3 * cfg.patch ** 2))


def wan_head(channels, cout):
    return Chain(WanNorm(channels), nn.SiLU(), WanConv(channels, cout))


def frames_needed(decoder, number):
    """-> how many of the last latent frames the last `number` frames of a video depend on, and
    likewise {WanDouble: how many of its output frames}."""
    needed = {}
    for layer in reversed(list(decoder.modules())):  # from the last to the first
        if isinstance(layer, WanConv):
            number += 2
        elif isinstance(layer, WanDouble):
            needed[layer] = number
            number = -(-number // 2) + 2
    return number, needed


def runs_of(numbers, gap):
    """Ascending runs of the numbers, in which neighbours differ by `gap` at most."""
    runs = []
    for k in sorted(set(numbers)):
        if runs and k - runs[-1][-1] <= gap:
            runs[-1].append(k)
        else:
            runs.append([k])
    return runs


class WanVAE(TiledAutoencoder):
    """(b,3,f,h,w) <-> latents (b,16,1 + (f - 1) / 4,h / 8,w / 8) by default, where f is 4 k + 1.

    Other numbers of frames lose the last ones, as published. Latents are means; nothing trains on
    samples. Chunks change no number.
    """
    sampled = False

    def __init__(self, cfg=WanVAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = wan_encoder(cfg), wan_decoder(cfg)
        self.conv1 = FrameConv(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        self.conv2 = FrameConv(cfg.z_channels, cfg.z_channels, 1)
        frames = cfg.time_factor  # per latent frame
        for layer in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(layer, WanHalve):
                frames //= 2
            if isinstance(layer, FrameConv):
                layer.together = frames
            if isinstance(layer, WanDouble):
                frames *= 2

    def mean_std(self, like):
        """Of the latents' channels, (c,1,1,1) each."""
        both = torch.tensor([self.cfg.mean, self.cfg.std]).to(like)
        return both.view(2, -1, 1, 1, 1)

    def normalise(self, z: Tensor) -> Tensor:
        """See Autoencoder."""
        mean, std = self.mean_std(z)
        return (z - mean) / std

    def moments(self, video: Tensor, chunk: int = 16):
        """See Autoencoder."""
        mean, logvar = self.clip_moments(video, chunk).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def clip_moments(self, video: Tensor, chunk: int = 16) -> Tensor:
        """video (b,3,f,h,w) -> mean, then log variance of unscaled latents, (b,2c,f',h',w')."""
        time, p = self.cfg.time_factor, self.cfg.patch
        size = max(1, chunk // (time * len(video))) * time

        def part(x):
            x = x[:, :, :1 + (x.shape[2] - 1) // time * time]
            x = rearrange(x, "b c f (h p) (w q) -> b (c q p) f h w", p=p, q=p)  # columns first
            return self.conv1(in_parts(self.encoder, x, size, 1 + size - time))
        return self.in_tiles(part, video)

    def decode(self, latents: Tensor, frames=None, chunk: int = 16) -> Tensor:
        """See Autoencoder. A few neighbouring frames, up to `chunk`, cost little more than what
        they depend on: all latents before them, but few frames of the large levels."""
        mean, std = self.mean_std(latents)
        z, time = latents * std + mean, self.cfg.time_factor
        size = max(1, chunk // (time * len(z)))

        def whole(z):
            return self.pixels(in_parts(self.decoder, self.conv2(z), size, size))

        if frames is None:
            return self.in_tiles(whole, z, decode=True)
        shown = {}
        for run in runs_of(frames, gap=16):
            latent = -(-run[-1] // time)  # the one that holds the last frame
            number = latent * time - run[0] + 1  # frames from the run's first to that latent's last

            def last(z, number=number):
                reach, needed = frames_needed(self.decoder, number)
                past = Past(start=z.shape[2] <= reach, needed=needed)
                return self.pixels(self.decoder(self.conv2(z[:, :, -reach:]), past))[:, :, -number:]
            part = last if number <= chunk else lambda z, number=number: whole(z)[:, :, -number:]
            video = self.in_tiles(part, z[:, :, :latent + 1], decode=True)
            shown |= {k: video[:, :, k - run[0]] for k in run}
        return torch.stack([shown[k] for k in frames], dim=2)

    def pixels(self, x):
        """What the decoder gives -> video (b,3,f,h,w)."""
        p = self.cfg.patch
        return rearrange(x, "b (c q p) f h w -> b c f (h p) (w q)", p=p, q=p)


def in_parts(net, x, size, first):
    """net(x, past) over the frames of x (b,c,f,h,w): `first` of them, then `size` at a time."""
    past, out = Past(kept={}), []
    for part in (x[:, :, :first], *x[:, :, first:].split(size, dim=2)):
        if part.shape[2]:
            out.append(net(part, past))
            past.start = False
    return torch.cat(out, dim=2)


WAN_NAMES = (
    ("middle.0.", "mid_block.resnets.0."), ("middle.1.", "mid_block.attentions.0."),
    ("middle.2.", "mid_block.resnets.1."), ("residual.0.", "norm1."), ("residual.2.", "conv1."),
    ("residual.3.", "norm2."), ("residual.6.", "conv2."), ("shortcut.", "conv_shortcut."),
    ("head.0.", "norm_out."), ("head.2.", "conv_out."))


def wan_vae_diffusers_name(key, cfg):
    """Original key of WanVAE -> the name of the same tensor in diffusers' AutoencoderKLWan."""
    top = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    part, rest = key.split(".", 1)
    if part in top:
        return f"{top[part]}.{rest}"
    if rest.startswith("conv1."):
        return f"{part}.conv_in.{rest.removeprefix('conv1.')}"
    for ours, theirs in WAN_NAMES:
        rest = rest.replace(ours, theirs)
    numbers = rest.split(".")
    if not numbers[0].endswith("samples"):
        return f"{part}.{rest}"
    blocks = cfg.num_res_blocks + (part == "decoder")  # per level; then what resizes
    where = "down" if part == "encoder" else "up"
    if cfg.shortcuts:
        _, level, _, n, *rest = numbers
        resize = f"{where}sampler"
    elif part == "encoder":
        _, n, *rest = numbers
        return ".".join([part, "down_blocks", n, *rest])
    else:
        _, n, *rest = numbers
        level, n = divmod(int(n), blocks + 1)
        resize = "upsamplers.0"
    layer = f"resnets.{n}" if int(n) < blocks else resize
    return ".".join([part, f"{where}_blocks", str(level), layer, *rest])


def wan_vae_state(state, net, source):
    """Public weights -> WanVAE's: the original file's, or diffusers'."""
    if "quant_conv.weight" in state:
        return rename(state, net, lambda key: wan_vae_diffusers_name(key, net.cfg), source)
    return state
