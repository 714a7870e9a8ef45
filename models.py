"""UNet3D, the VGen family's 3-D UNet; the layers that all networks share; LoRA; parallelize().

UNet3D is one network with options: ModelScope T2V (arXiv 2308.06571), VideoCrafter1 and 2
(2310.19512, 2401.09047), T2V-Turbo (2405.18750, 2410.05677), I2VGen-XL (2311.04145), its SR600,
DEMO (2410.05097), DreamVideo (2312.04433), HiGen (2312.04483), TF-T2V / VideoComposer
(2312.15770, 2306.02018) and VideoLCM (2312.09109). The defaults of UNetConfig are ModelScope
T2V's; an option that is off adds no keys and costs nothing. Parameter names are those of the
public checkpoints, misspellings included (`temopral_conv`). The names of VideoCrafter and
diffusers are mapped on loading.

Videos and latents are `b c f h w`; inside the UNet images are `(b f) c h w`, sample by sample.
"""
import copy
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import UserError, is_finite, is_plain, meet, seed_of, warn
from weights import (
    DIFFERENCES, bare_keys, below, load_strict, looks_like, lora_format, named_lora, open_weights,
    rename, turbo_lora)

# ---- layers shared by all networks

def sinusoidal(t, dim, dtype=torch.float32):
    """t (...) -> (..., dim) float32: cosines, then sines, of 10000^(-k / half) t, k < half.

    dtype: of the angles.
    """
    half = dim // 2
    k = torch.arange(half, device=t.device, dtype=dtype)
    # rounded as in the originals: another order of the factors shifts angles by up to 6e-5
    freq = torch.exp(-math.log(10000) * k / half)
    angle = t.to(dtype)[..., None] * freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def guidance_embedding(w, dim=256):
    """Guidance scale w (b,) -> (b, dim): T2V-Turbo's sinusoids of 1000 w, sines first."""
    half = dim // 2
    k = torch.arange(half, device=w.device, dtype=torch.float32)
    freq = torch.exp(-math.log(10000) / (half - 1) * k)
    angle = 1000 * w.float()[:, None] * freq
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def zero_init(module):
    """Zero the weights of a residual branch's last layer: at first it adds nothing."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def lean(layers, x, width):
    """layers(x), of which only x is kept for the backward pass.

    The backward pass computes cheap layers (norms, activations) again. The last one may be a
    matrix product, which is not repeated because its output is not needed. Below a width of 256
    all is kept: in a narrow network the cheap layers take as long as the products.
    """
    again = width >= 256 and torch.is_grad_enabled()
    return checkpoint(layers, x, use_reentrant=False) if again else layers(x)


def run_block(block, *args, recompute):
    """block(*args). recompute: in training, compute its activations again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        # non-reentrant: the other kind loses the graph when no input needs a gradient (LoRA)
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def split_heads(x, heads):
    return rearrange(x, "n l (a d) -> n a l d", a=heads)


def attend(q, k, v, heads, mask=None, causal=False):
    """The attention of all networks: q (n,l,heads d), k and v (n,m,heads d) -> like q.

    mask (n,m): True for keys that are seen; None: all.
    """
    q, k, v = (split_heads(y, heads) for y in (q, k, v))
    mask = None if mask is None else mask[:, None, None]  # the same for all heads and queries
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return rearrange(out, "n a l d -> n l (a d)")


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864): rotate the channel pairs (2i, 2i+1) of x (b,l,heads,d).

    cos, sin (l,d/2): of the angles. Computed in float32.
    """
    # as complex numbers: one pass over memory instead of six
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2).to(x.dtype)


def conv2d(x, weight, bias, stride, padding):
    """F.conv2d of x (n,c,h,w); stride and padding are pairs.

    On a CPU, few pixels under wide weights become one matrix product: oneDNN would reorder the
    weights (and their gradient) in every call, which takes several times longer than the
    convolution itself.
    """
    if x.device.type != "cpu" or len(x) * x.shape[2] * x.shape[3] > len(weight) // 4:
        return F.conv2d(x, weight, bias, stride, padding)
    columns = F.unfold(x, weight.shape[2:], padding=padding, stride=stride)  # n (c kh kw) l
    out = F.linear(columns.transpose(1, 2).flatten(0, 1), weight.flatten(1), bias)  # (n l) c
    rows = (x.shape[2] + 2 * padding[0] - weight.shape[2]) // stride[0] + 1
    return rearrange(out, "(n h w) c -> n c h w", n=len(x), h=rows)


class Conv2d(nn.Conv2d):
    def forward(self, x):
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)


class FrameConv(nn.Conv3d):
    """A Conv3d of kernel (3,1,1), or 1: over the frames only, of a video as b c f (h w)."""

    def forward(self, x):
        return conv2d(x, self.weight.squeeze(-1), self.bias, self.stride[:2], self.padding[:2])


class RelativePosition(nn.Module):
    """A learned vector per distance -span..span of two frames; larger ones are clipped."""

    def __init__(self, span, dim):
        super().__init__()
        self.span = span
        self.embeddings_table = nn.Parameter(torch.empty(2 * span + 1, dim))
        nn.init.xavier_uniform_(self.embeddings_table)

    def forward(self, f):
        """-> (f, f, dim): entry [i, j] belongs to the distance j - i."""
        i = torch.arange(f, device=self.embeddings_table.device)
        distance = (i[None] - i[:, None]).clamp(-self.span, self.span)
        return self.embeddings_table[distance + self.span]


class Attention(nn.Module):
    """Multi-head attention of the UNet: project, attend, merge.

    image_keys: further keys and values for image tokens, to which it attends separately
    (VideoCrafter1 image-to-video, like IP-Adapter). relative: span of RelativePosition in keys
    and values (VideoCrafter1).
    """

    def __init__(self, dim, heads, head_dim, context_dim=None, image_keys=False, relative=0):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim))  # key `to_out.0` as published
        self.to_k_ip = nn.Linear(context_dim, inner, bias=False) if image_keys else None
        self.to_v_ip = nn.Linear(context_dim, inner, bias=False) if image_keys else None
        self.relative_position_k = RelativePosition(relative, head_dim) if relative else None
        self.relative_position_v = RelativePosition(relative, head_dim) if relative else None

    def forward(self, x, context=None, image=None):
        """x (n,l,d), context (n,m,e) or None for self-attention, image (n,k,e) -> (n,l,d)."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if self.relative_position_k is not None:
            return self.to_out(self.attend_relative(q, k, v))
        out = attend(q, k, v, self.heads)
        if image is not None:
            out = out + attend(q, self.to_k_ip(image), self.to_v_ip(image), self.heads)
        return self.to_out(out)

    def attend_relative(self, q, k, v):
        """Logits q_i (k_j + R^k_ij), then the weighted sum of v_j + R^v_ij (1803.02155, eq. 3)."""
        q, k, v = (split_heads(y, self.heads) for y in (q, k, v))
        keys, values = self.relative_position_k(q.shape[2]), self.relative_position_v(q.shape[2])
        logits = q @ k.transpose(-1, -2) + torch.einsum("naid,ijd->naij", q, keys)
        weights = (logits * q.shape[-1] ** -0.5).softmax(-1)
        out = weights @ v + torch.einsum("naij,ijd->naid", weights, values)
        return rearrange(out, "n a l d -> n l (a d)")

    def map_of(self, x, context, index):
        """Attention of each query to one token, index (n,), mean over the heads -> (n,l)."""
        q, k = split_heads(self.to_q(x), self.heads), split_heads(self.to_k(context), self.heads)
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # n a l m
        chosen = index.view(-1, 1, 1, 1).expand(*logits.shape[:3], 1)
        return logits.softmax(-1).gather(-1, chosen).squeeze(-1).mean(1)


class GEGLU(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def act(self, h):
        value, gate = h.chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return F.gelu(gate) * value
        return value.mul_(torch.ops.aten.gelu_(gate))  # in place: the network's largest tensors


def tanh_gelu(h):
    gelu = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_
    return gelu(h, approximate="tanh")


class GELU(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, inner)

    def act(self, h):
        return tanh_gelu(h)


def feed_forward(x, proj, act, last):
    """last(act(proj(x))), x (..., d); what lies between is a transformer's largest tensor.

    A backward pass computes act() again. Without one, a CPU takes a part of the tokens at a time.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return lean(lambda h: last(act(h)), proj(x), x.shape[-1])
    rows = max(512, 2 ** 21 // proj.out_features)  # their activations fit into the cache
    pieces = x.flatten(0, -2).split(rows)
    return torch.cat([last(act(proj(p))) for p in pieces]).view(x.shape)


class FeedForward(nn.Module):
    def __init__(self, dim, first=GEGLU):
        super().__init__()
        # `net.1` is a dropout of rate 0 in the original; it keeps the index of what follows
        self.net = nn.Sequential(first(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        first, _, last = self.net
        return feed_forward(x, first.proj, first.act, last)


class Adapter(nn.Module):
    """DreamVideo's  A(x) = x + up(gelu(down(x + strength cond(image)))); the identity at first."""

    def __init__(self, dim, hidden=0, image_dim=0, serial=False):
        super().__init__()
        self.serial = serial
        self.down_linear = nn.Linear(dim, hidden or dim // 2)
        self.up_linear = zero_init(nn.Linear(hidden or dim // 2, dim))
        self.condition_linear = nn.Linear(image_dim, dim) if image_dim else None
        self.on = True

    def forward(self, x, image=None, strength=1.0):
        """x (n,f,d); image (b,f,e), n a multiple of b: a CLIP embedding per frame, or None."""
        if not self.on:
            return x
        h = x
        if self.condition_linear is not None and image is not None:
            cond = strength * self.condition_linear(image)
            h = x + cond.repeat_interleave(len(x) // len(cond), 0)
        return x + self.up_linear(F.gelu(self.down_linear(h)))


class TransformerBlock(nn.Module):
    """x += attn1(x); x += attn2(x, text); x += ff(x). Without text, attn2 is like attn1.

    cross_twice: attn1 attends to the text, too (HiGen's text resampler). adapters: DreamVideo's,
    pairs (layer, position) of a key of ADAPTERS and "parallel" or "serial".
    """
    ADAPTERS = {"self_attention": "attn_adapter", "cross_attention": "cross_attn_adapter",
                "feedforward": "ff_adapter"}

    def __init__(self, dim, heads, head_dim, context_dim=None, cross_twice=False, image_keys=False,
                 relative=0, adapters=(), adapter_dim=0, adapter_image_dim=0):
        super().__init__()
        self.cross_twice = cross_twice
        first_context = context_dim if cross_twice else None
        self.attn1 = Attention(dim, heads, head_dim, first_context, relative=relative)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, heads, head_dim, context_dim, image_keys, relative)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        position = dict(adapters)
        for layer, name in self.ADAPTERS.items():
            adapter = None
            if layer in position:
                adapter = Adapter(dim, adapter_dim, adapter_image_dim, position[layer] == "serial")
            setattr(self, name, adapter)

    def forward(self, x, text=None, image=None, appearance=None, strength=1.0, eot=None):
        """x (n,l,d); text (b,m,e) with n = b f: all frames of a sample attend to the same text.

        image (b,k,e): tokens for attn2's image keys; appearance, strength: see Adapter. eot (b,):
        also return how much each place attends to that token of the text, (b, n l / b).
        """
        n, length, d = x.shape

        def cross(attention, x):
            # each query is treated alone, so the f frames of a sample may be one long sequence of
            # queries: keys and values of the text are computed once per video, not once per frame
            joined = x.reshape(len(text), -1, d)  # b (f l) d
            return attention(joined, text, image).reshape(n, length, d)

        def add(adapter, x, delta):
            if adapter is None:
                return x + delta
            if adapter.serial:
                return adapter(x + delta, appearance, strength)
            return adapter(x, appearance, strength) + delta

        h = self.norm1(x)
        x = add(self.attn_adapter, x, cross(self.attn1, h) if self.cross_twice else self.attn1(h))
        h = self.norm2(x)
        x = add(self.cross_attn_adapter, x, self.attn2(h) if text is None else cross(self.attn2, h))
        x = add(self.ff_adapter, x, self.ff(self.norm3(x)))
        return x if eot is None else (x, self.attn2.map_of(h.reshape(len(text), -1, d), text, eot))


# ---- UNet blocks, called as block(x, c) with x (b f) c h w and c a Context

@dataclass
class Context:
    """What all blocks see in a forward pass."""
    f: int                             # frames
    emb: Tensor                        # (b f) e: embedding of the step (fps, ...)
    text: Tensor                       # b n d, or (b f) n d: tokens for the spatial transformers
    image: Tensor | None = None        # b k d: tokens for image_keys (VideoCrafter1)
    motion_text: Tensor | None = None  # b n d: tokens for the motion blocks (DEMO)
    eot: Tensor | None = None          # (b,): the motion blocks return attention maps of this token
    appearance: Tensor | None = None   # b f d: CLIP embeddings for the adapters (DreamVideo)
    strength: float = 1.0              # of the appearance
    temporal: bool = True              # False: layers over time pass x on (HiGen's images)


class Conv1x1(nn.Conv1d):
    """A Linear on channels-last tokens, stored as a Conv1d as in public files."""

    def forward(self, x):
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class SpatialTransformer(nn.Module):
    """Attention within each frame and to the text."""

    def __init__(self, channels, heads, head_dim, context_dim, **options):
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(inner, heads, head_dim, context_dim, **options)])
        self.proj_out = zero_init(nn.Linear(inner, channels))

    def forward(self, x, c):
        h = self.proj_in(rearrange(self.norm(x), "n c h w -> n (h w) c").contiguous())
        h = self.proj_out(self.transformer_blocks[0](h, c.text, c.image))
        return x + rearrange(h, "n (h w) c -> n c h w", h=x.shape[2])


class TemporalTransformer(nn.Module):
    """Attention over the frames, at each pixel: self-attention twice, no positions, no mask."""

    def __init__(self, channels, heads, head_dim, context_dim=None, linear=False, **options):
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear else Conv1x1(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(inner, heads, head_dim, context_dim, **options)])
        proj_out = nn.Linear(inner, channels) if linear else Conv1x1(inner, channels, 1)
        self.proj_out = zero_init(proj_out)

    def tokens(self, x, f):
        video = rearrange(x, "(b f) c h w -> b c f h w", f=f)
        # the norm is over the frames, too; contiguous, or the Linear would run pixel by pixel
        return self.proj_in(rearrange(self.norm(video), "b c f h w -> (b h w) f c").contiguous())

    def back(self, h, x):
        h = self.proj_out(h)
        return x + rearrange(h, "(b h w) f c -> (b f) c h w", h=x.shape[2], w=x.shape[3])

    def forward(self, x, c):
        if not c.temporal:
            return x
        block = self.transformer_blocks[0]
        return self.back(block(self.tokens(x, c.f), None, None, c.appearance, c.strength), x)


class MotionBlock(TemporalTransformer):
    """DEMO: attention over the frames at each pixel, and to the motion encoder's tokens."""

    def forward(self, x, c):
        """-> x, or with c.eot (x, attention of each place to the end-of-text token (b,h,w,f))."""
        h = self.transformer_blocks[0](self.tokens(x, c.f), c.motion_text, eot=c.eot)
        if c.eot is None:
            return self.back(h, x)
        h, eot_map = h
        return self.back(h, x), eot_map.view(len(c.eot), *x.shape[2:], c.f)


class Dropout(nn.Dropout):
    """Dropout whose masks can be keyed by sample, see seed_dropout(); until then, nn.Dropout."""
    seeds = None  # one per sample of the batch

    def forward(self, x):
        """x (b k, ...) for any k: the rows of a sample lie together, as everywhere in the UNet."""
        if self.seeds is None or not self.training or not self.p:
            return super().forward(x)
        return self.keyed(x)

    @torch.compiler.disable  # compiled, each new seed would be a new graph
    def keyed(self, x):
        assert len(x) % len(self.seeds) == 0, "seed_dropout() was called for another batch"
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        for part, seed in zip(keep.chunk(len(self.seeds)), self.seeds):
            part.bernoulli_(1 - self.p, generator=torch.Generator(x.device).manual_seed(seed))
        return x * keep / (1 - self.p)


def seed_dropout(net, seed, numbers):
    """Key dropout, from here to the next call, by (seed, number of the sample, layer).

    numbers: those of the batch's samples within the run. The masks then do not depend on --batch,
    and blocks recomputed in the backward pass draw the same ones again. net: plain, DDP or FSDP.
    """
    layers = [module for module in net.modules() if isinstance(module, Dropout)]
    for i, layer in enumerate(layers):
        layer.seeds = [seed_of(seed, "dropout", number, i) for number in numbers]


class Layer(nn.Sequential):
    """Norm, SiLU, perhaps a dropout, and a convolution."""

    def forward(self, x):
        return lean(super().forward, x, x.shape[1])


class TemporalConv(nn.Module):
    """Four (3,1,1) convolutions over the frames, residual."""

    def __init__(self, channels, dropout):
        super().__init__()
        def layer(*drop):
            return Layer(nn.GroupNorm(32, channels), nn.SiLU(), *drop,
                         FrameConv(channels, channels, (3, 1, 1), padding=(1, 0, 0)))
        self.conv1 = layer()  # conv1 has no dropout: its convolution is `conv1.2`, the others' `.3`
        self.conv2, self.conv3, self.conv4 = (layer(Dropout(dropout)) for _ in range(3))
        zero_init(self.conv4[-1])

    def forward(self, x, f):
        h = rearrange(x, "(b f) c h w -> b c f (h w)", f=f)
        h = self.conv4(self.conv3(self.conv2(self.conv1(h))))
        return x + rearrange(h, "b c f (h w) -> (b f) c h w", h=x.shape[2])


class ResBlock(nn.Module):
    """Convolutions within each frame, shifted by the time embedding, then a TemporalConv."""

    def __init__(self, cin, cout, emb_dim, dropout, temporal_dropout, temporal_conv=True):
        super().__init__()
        self.in_layers = Layer(nn.GroupNorm(32, cin), nn.SiLU(), Conv2d(cin, cout, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, cout))
        self.out_layers = Layer(nn.GroupNorm(32, cout), nn.SiLU(), Dropout(dropout),
                                zero_init(Conv2d(cout, cout, 3, padding=1)))
        self.skip_connection = nn.Identity() if cin == cout else Conv2d(cin, cout, 1)
        # spelled as published
        self.temopral_conv = TemporalConv(cout, temporal_dropout) if temporal_conv else None

    def forward(self, x, c):
        h = self.in_layers(x) + self.emb_layers(c.emb)[:, :, None, None]
        x = self.skip_connection(x) + self.out_layers(h)
        return self.temopral_conv(x, c.f) if self.temopral_conv is not None and c.temporal else x


def forget_motion(net):
    """Let layers over time pass their input on, as in training that starts from an image model."""
    for module in net.modules():
        if isinstance(module, TemporalTransformer):
            zero_init(module.proj_out)
        if isinstance(module, TemporalConv):
            zero_init(module.conv4[-1])


class Downsample(nn.Module):
    def __init__(self, channels, padding=1):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x, c):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels, crop=False):
        super().__init__()
        self.crop = crop
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, c):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x[:, :, 1:-1] if self.crop else x)


# ---- conditions: image encoders, VideoComposer's maps, HiGen's text

class MapEncoder(nn.Sequential):
    """Maps or latents, frame by frame: pooled to a size, then shrunk by 4. Keys 0, 3, 5."""

    def __init__(self, cin, widths, cout):
        first, second = widths
        super().__init__(Conv2d(cin, first, 3, padding=1), nn.SiLU(), nn.Identity(),
                         Conv2d(first, second, 3, stride=2, padding=1), nn.SiLU(),
                         Conv2d(second, cout, 3, stride=2, padding=1))

    def forward(self, x, size):
        """x (n,c,h,w) -> (n,cout,size[0] / 4,size[1] / 4)."""
        x = F.adaptive_avg_pool2d(self[1](self[0](x)), size)  # what self[2] stands for
        return self[5](self[4](self[3](x)))


class TemporalEncoder(nn.Module):
    """A small transformer over the frames at each pixel: x += attn(norm x); x += ff(x)."""

    class Layer(nn.Module):
        def __init__(self, dim, heads):
            super().__init__()
            inner = heads * dim  # each head is as wide as the input
            self.heads = heads
            self.norm = nn.LayerNorm(dim)
            self.fn = nn.Module()
            self.fn.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
            self.fn.to_out = nn.Sequential(nn.Linear(inner, dim), Dropout(0.05))

        def forward(self, x):
            q, k, v = self.fn.to_qkv(self.norm(x)).chunk(3, dim=-1)
            return self.fn.to_out(attend(q, k, v, self.heads))

    def __init__(self, dim, heads=2, depth=1):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            ff = nn.Module()
            inner = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU())
            ff.net = nn.Sequential(inner, Dropout(0.05), nn.Linear(4 * dim, dim))
            self.layers.append(nn.ModuleList([self.Layer(dim, heads), ff]))

    def forward(self, x, f):
        """x (b f) c h w -> the same shape."""
        h = rearrange(x, "(b f) c h w -> (b h w) f c", f=f)
        for attention, ff in self.layers:
            h = h + attention(h)
            h = h + ff.net(h)
        return rearrange(h, "(b h w) f c -> (b f) c h w", h=x.shape[2], w=x.shape[3])


class TextResampler(nn.Module):
    """HiGen: learned queries attend to the text, twice per block, and replace its tokens."""

    def __init__(self, context_dim, dim, tokens, depth):
        super().__init__()
        self.tokens = nn.Parameter(dim ** -0.5 * torch.randn(1, tokens, dim))
        self.context_transformer = nn.ModuleList(
            TransformerBlock(dim, 8, dim // 8, dim, cross_twice=True) for _ in range(depth))
        self.input_mapping = nn.Linear(context_dim, dim)
        self.output_mapping = nn.Linear(dim, context_dim)

    def forward(self, text):
        """text (b,n,d) -> (b,tokens,d)."""
        x, text = self.tokens.expand(len(text), -1, -1), self.input_mapping(text)
        for block in self.context_transformer:
            x = block(x, text)
        return self.output_mapping(x)


# VideoComposer's maps: argument -> channels (for their values see sample.read_maps)
MAPS = {"depth": 1, "sketch": 1, "single_sketch": 1, "canny": 1, "motion": 2, "local_image": 3,
        "masked": 4}


def after_name(name):
    """A map's second encoder, by its published name."""
    return f"{'mask' if name == 'masked' else name}_embedding_after"


# ---- UNet3D

@dataclass(frozen=True)
class UNetConfig:
    """Defaults: ModelScope T2V (text2video_pytorch_model.pth, v1-4, v1-5), 1,411 M parameters."""
    in_dim: int = 4
    out_dim: int = 4
    dim: int = 320
    dim_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple = (1.0, 0.5, 0.25)  # levels with transformers, as shares of the latent size
    head_dim: int = 64
    num_heads: int = 8                    # of the first temporal transformer (else: by head_dim)
    context_dim: int = 1024
    dropout: float = 0.1
    use_fps_condition: bool = False       # frame rate in the time embedding
    default_fps: int = 0                  # used where no fps is given; 0: none is added
    # VideoCrafter1 and 2
    spatial_dropout: float | None = None  # of the ResBlocks' 2-D half, if it differs from dropout
    temporal_linear: bool = False         # Linear, not Conv1d, around all temporal blocks but one
    temporal_conv: bool = True
    relative_position: int = 0            # span of relative frame positions
    image_keys: bool = False              # spatial transformers attend to image tokens separately
    # T2V-Turbo
    guidance_dim: int = 0                 # width of the guidance embedding
    motion_guidance_dim: int = 0          # of a second such input
    # I2VGen-XL
    image_to_video: bool = False          # latent of the first frame and its CLIP embedding
    # SR600
    super_resolution: bool = False        # padding (2, 1), rows cropped, damped skip connections
    # DEMO
    motion_blocks: bool = False
    # DreamVideo: (layer, position) pairs, see TransformerBlock
    spatial_adapters: tuple = ()
    spatial_adapter_dim: int = 0          # 0: half the width
    temporal_adapters: tuple = ()
    temporal_adapter_dim: int = 0
    adapter_image_dim: int = 0            # width of the CLIP embedding that temporal adapters see
    # HiGen
    text_resampler: int = 0               # depth; also adds the motion, appearance and image inputs
    # TF-T2V, VideoComposer, VideoLCM
    concat_dim: int = 0                   # channels beside the latents: the sum of all encoded maps
    maps: tuple = ()                      # of MAPS
    style_image: bool = False             # tokens from a CLIP image embedding
    histogram: bool = False               # a token per frame from a colour histogram of 156 numbers
    map_encoder_depth: int = 1
    num_tokens: int = 4                   # of an image (I2VGen-XL, VideoComposer) or HiGen's text
    # the tiny world's options, which no public base has
    frame_pos: int = 0                    # learned positions of so many frames, in that embedding
    spatial_pos: int = 0                  # learned map after the first convolution, pixels per side
    pooled_text: bool = False             # mean text token in the time embedding


def fits(cfg, f, h, w) -> bool:
    """Can this UNet take f frames of h x w latents? bases.latent_shape() explains it to users."""
    factor, rows = 2 ** (len(cfg.dim_mult) - 1), h
    for _ in cfg.dim_mult[1:]:
        if rows % 2:
            return False
        rows = rows // 2 + cfg.super_resolution  # SR600's levels add a row; its lowest may be odd
    places = (cfg.frame_pos or f) >= f and (cfg.spatial_pos or max(h, w)) >= max(h, w)
    return w % factor == 0 and places


class UNet3D(nn.Module):
    """The VGen family's UNet; ModelScope T2V by default."""
    lora_targets = "to_q", "to_k", "to_v", "to_out.0"  # what --lora-targets is if it is not given

    def __init__(self, cfg=UNetConfig()):
        super().__init__()
        self.cfg = cfg
        self.grad_ckpt = False  # recompute each block in the backward pass
        dim, emb_dim = cfg.dim, 4 * cfg.dim
        widths = [dim * m for m in cfg.dim_mult]
        self.build_conditions(dim, emb_dim)

        res = dict(dropout=cfg.dropout if cfg.spatial_dropout is None else cfg.spatial_dropout,
                   temporal_dropout=cfg.dropout, temporal_conv=cfg.temporal_conv)
        spatial = dict(image_keys=cfg.image_keys, adapters=cfg.spatial_adapters,
                       adapter_dim=cfg.spatial_adapter_dim)
        temporal = dict(relative=cfg.relative_position, adapters=cfg.temporal_adapters,
                        adapter_dim=cfg.temporal_adapter_dim,
                        adapter_image_dim=cfg.adapter_image_dim)

        def entry(cin, cout, attention):
            """A ResBlock, with attention followed by a spatial and a temporal transformer."""
            layers = [ResBlock(cin, cout, emb_dim, **res)]
            if attention:
                size = cout, cout // cfg.head_dim, cfg.head_dim
                layers.append(SpatialTransformer(*size, cfg.context_dim, **spatial))
                if cfg.motion_blocks:
                    layers.append(MotionBlock(*size, cfg.context_dim, linear=True))
                layers.append(TemporalTransformer(*size, linear=cfg.temporal_linear, **temporal))
            return nn.ModuleList(layers)

        # encoder: per level num_res_blocks entries, then a Downsample unless it is the last
        conv_in = Conv2d(cfg.in_dim + cfg.concat_dim, dim, 3, padding=1)
        temporal_in = TemporalTransformer(dim, cfg.num_heads, cfg.head_dim, **temporal)
        self.input_blocks = nn.ModuleList([nn.ModuleList([conv_in, temporal_in])])
        skips, channels, scale = [dim], dim, 1.0
        for level, width in enumerate(widths):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(entry(channels, width, scale in cfg.attn_scales))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:  # bare in the list: key `input_blocks.3.op`
                padding = (2, 1) if cfg.super_resolution else 1
                self.input_blocks.append(Downsample(channels, padding))
                skips.append(channels)
                scale /= 2

        self.middle_block = entry(channels, channels, True)
        self.middle_block.append(ResBlock(channels, channels, emb_dim, **res))

        # decoder: per level num_res_blocks + 1 entries, an Upsample at the end of the last one
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(cfg.num_res_blocks + 1):
                cin = channels + skips.pop()
                self.output_blocks.append(entry(cin, width, scale in cfg.attn_scales))
                channels = width
            if level > 0:
                self.output_blocks[-1].append(Upsample(channels, crop=cfg.super_resolution))
                scale *= 2

        conv_out = Conv2d(channels, cfg.out_dim, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), conv_out)
        nn.init.zeros_(conv_out.weight)  # the weight only, as published

    def build_conditions(self, dim, emb_dim):
        """Layers of the conditions, option by option; built first, see with_new_conditions."""
        cfg = self.cfg

        def mlp(cin, zero=False):
            layers = nn.Sequential(nn.Linear(cin, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
            if zero:
                zero_init(layers[-1])
            return layers
        self.time_embed = mlp(dim)
        if cfg.use_fps_condition:
            self.fps_embedding = mlp(dim, zero=True)
        if cfg.guidance_dim:
            self.time_cond_proj = nn.Linear(cfg.guidance_dim, dim, bias=False)
            if cfg.motion_guidance_dim:
                self.motion_cond_proj = nn.Linear(cfg.motion_guidance_dim, dim, bias=False)
                self.combine_proj = nn.Linear(2 * dim, dim, bias=False)
        if cfg.image_to_video:
            n, c = cfg.in_dim, cfg.context_dim
            self.local_image_concat = nn.Sequential(
                Conv2d(n, 4 * n, 3, padding=1), nn.SiLU(), Conv2d(4 * n, 4 * n, 3, padding=1),
                nn.SiLU(), Conv2d(4 * n, n, 3, padding=1))
            self.local_temporal_encoder = TemporalEncoder(n)
            self.local_image_embedding = MapEncoder(n, (8 * n, 16 * n), c)
            self.context_embedding = nn.Sequential(
                nn.Linear(c, emb_dim), nn.SiLU(), nn.Linear(emb_dim, cfg.num_tokens * c))
        if cfg.text_resampler:
            self.context_embedding = TextResampler(
                cfg.context_dim, emb_dim, cfg.num_tokens, cfg.text_resampler)
            self.asim_embedding = mlp(32, zero=True)
            self.msim_embedding = mlp(dim, zero=True)
            self.img_embedding = zero_init(Conv2d(cfg.in_dim, dim, 3, padding=1))
        if cfg.style_image:
            c = cfg.context_dim
            self.pre_image_condition = nn.Sequential(
                nn.Linear(c, c), nn.SiLU(), nn.Linear(c, cfg.num_tokens * c))
        for name in cfg.maps:
            n = cfg.concat_dim
            setattr(self, f"{name}_embedding", MapEncoder(MAPS[name], (4 * n, 4 * n), n))
            setattr(self, after_name(name), TemporalEncoder(n, depth=cfg.map_encoder_depth))
        if cfg.histogram:
            self.hist_context_embedding = nn.Sequential(
                nn.Linear(156, emb_dim), nn.SiLU(), nn.Linear(emb_dim, cfg.context_dim))
        if cfg.frame_pos:
            self.frame_pos = nn.Parameter(0.5 * sinusoidal(torch.arange(cfg.frame_pos), emb_dim))
        if cfg.spatial_pos:  # starts as sines and cosines of the row and of the column
            n = cfg.spatial_pos
            wave = sinusoidal(torch.arange(n), dim // 2).T  # dim/2 n
            rows, columns = wave[:, :, None].expand(-1, n, n), wave[:, None, :].expand(-1, n, n)
            self.spatial_pos = nn.Parameter(0.5 * torch.cat([rows, columns]))
        if cfg.pooled_text:
            self.pooled_text = nn.Linear(cfg.context_dim, emb_dim)

    def namings(self):
        """Functions from our keys to those of other public files."""
        diffusers = partial(unet_diffusers_name, num_res_blocks=self.cfg.num_res_blocks)
        # diffusers has no DEMO
        return [videocrafter_name] if self.cfg.motion_blocks else [videocrafter_name, diffusers]

    def units(self):
        """The modules that FSDP shards, and --compile compiles, one by one."""
        kinds = (ResBlock, SpatialTransformer, TemporalTransformer, Downsample, Upsample)
        return [m for m in self.modules() if isinstance(m, kinds)]

    def embed(self, t, text, f, fps=None, guidance=None, motion_guidance=None, motion_factor=None,
              appearance_factor=None):
        """-> (b f) e: embedding of the step and of all else that the ResBlocks add."""
        cfg, b = self.cfg, len(t)
        first, act, last = self.time_embed
        dtype = first.weight.dtype
        e = sinusoidal(t, cfg.dim).to(dtype)
        if guidance is not None:
            w = self.time_cond_proj(guidance.to(dtype))
            if cfg.motion_guidance_dim:
                motion = self.motion_cond_proj(motion_guidance.to(dtype))
                w = self.combine_proj(torch.cat([w, motion], dim=-1))
            e = e + w
        e = first(e)[:, None]  # b 1 e
        if cfg.pooled_text:  # before the non-linearity, so that step, words and frame interact
            e = e + self.pooled_text(text.mean(1))[:, None]
        if cfg.frame_pos:
            e = e + self.frame_pos[:f]
        e = last(act(e))
        if cfg.use_fps_condition and (fps is not None or cfg.default_fps):
            fps = torch.full((b,), cfg.default_fps, device=t.device) if fps is None else fps
            e = e + self.fps_embedding(sinusoidal(fps, cfg.dim).to(dtype))[:, None]
        if motion_factor is not None:  # b, or b f-1: interpolated to the frames, before the MLP
            wave = sinusoidal(motion_factor.reshape(-1), cfg.dim).view(b, -1, cfg.dim)
            if wave.shape[1] not in (1, f):
                wave = F.interpolate(wave.transpose(1, 2), size=f, mode="linear").transpose(1, 2)
            e = e + self.msim_embedding(wave.to(dtype))
        if appearance_factor is not None:
            e = e + self.asim_embedding(appearance_factor.to(dtype))
        return e.expand(-1, f, -1).reshape(b * f, -1)

    def tokens(self, text, f, first_frame=None, image=None, histogram=None):
        """Text, then image tokens, for the spatial transformers: b n d or (b f) n d."""
        cfg, b = self.cfg, len(text)
        if cfg.text_resampler:
            text = self.context_embedding(text)
        if cfg.image_to_video:
            local = self.local_image_embedding(first_frame, (32, 32))  # 8x8 tokens of any picture
            text = torch.cat([text, local.flatten(2).transpose(1, 2)], dim=1)
        if image is not None and (cfg.image_to_video or cfg.style_image):
            encoder = self.context_embedding if cfg.image_to_video else self.pre_image_condition
            text = torch.cat([text, encoder(image).view(b, cfg.num_tokens, -1)], dim=1)
        if histogram is not None:  # a token of its own for each frame
            extra = rearrange(self.hist_context_embedding(histogram), "b f d -> (b f) 1 d")
            text = torch.cat([text.repeat_interleave(f, 0), extra], dim=1)
        return text

    def beside(self, x, first_frame=None, maps=None, map_keep=None):
        """-> (b f) c h w: the channels that join the noisy latents at the first convolution."""
        cfg, (b, _, f, h, w) = self.cfg, x.shape
        if cfg.image_to_video:
            # the image at frame 0, then planes that hold the frame's place in the clip, up to 1
            k = torch.arange(1, f, device=x.device, dtype=x.dtype) / max(f - 1, 1)
            planes = repeat(k, "f -> b c f h w", b=b, c=cfg.in_dim, h=h, w=w)
            clip = torch.cat([first_frame[:, :, None], planes], dim=2)
            clip = self.local_image_concat(rearrange(clip, "b c f h w -> (b f) c h w"))
            # twice, as published; the weights were trained with that (diffusers' port adds it once)
            return 2 * self.local_temporal_encoder(clip, f)
        total = x.new_zeros(b * f, cfg.concat_dim, h, w)
        for name, value in (maps or {}).items():
            if value is not None:
                keep = (map_keep or {}).get(name, x.new_ones(b))
                keep = keep.repeat_interleave(f).view(-1, 1, 1, 1)
                total = total + keep * self.encode_map(name, value, (4 * h, 4 * w))
        return total

    def encode_map(self, name, value, size):
        """A map of MAPS (b,c,f,8h,8w) -> (b f) concat_dim h w; size (4h, 4w)."""
        assert name in self.cfg.maps, f"condition {name}: no encoder among {self.cfg.maps}"
        after = getattr(self, after_name(name))
        frames = rearrange(value, "b c f h w -> (b f) c h w")
        return after(getattr(self, f"{name}_embedding")(frames, size), value.shape[2])

    def forward(self, x: Tensor, t: Tensor, text: Tensor, fps=None, guidance=None,
                motion_guidance=None, image=None, first_frame=None, motion_text=None, eot=None,
                appearance=None, strength=1.0, image_prior=None, motion_factor=None,
                appearance_factor=None, histogram=None, map_keep=None, **maps) -> Tensor:
        """x (b,c,f,h,w) noisy latents, t (b,) step 0..999, text (b,n,d) -> prediction like x.

        Conditions, each for the bases that have it: fps (b,); guidance, motion_guidance (b,d):
        guidance_embedding of scales (T2V-Turbo); image: CLIP embedding (b,1,d) (I2VGen-XL,
        VideoComposer's style) or tokens (b,k,d) (VideoCrafter1); first_frame (b,c,h,w): latent of
        the first frame (I2VGen-XL); motion_text (b,n,d) (DEMO); eot (b,): index of the
        end-of-text token, to return (prediction, [attention map (b,h,w,f) of each motion block]);
        appearance (b,1 or f,d), strength: a number or (b,) (DreamVideo); image_prior (b,c,h,w),
        motion_factor (b,) or (b,f-1), appearance_factor (b,f,32) (HiGen); histogram (b,f,156),
        `maps` of MAPS (b,c,f,8h,8w), map_keep {name: (b,)}, where 0 drops a map (VideoComposer).
        """
        cfg, (f, h, w) = self.cfg, x.shape[2:]
        assert fits(cfg, f, h, w), f"{f} frames of {h}x{w} latents do not fit this UNet"
        assert not maps or cfg.concat_dim, f"conditions {', '.join(maps)}: unknown to this UNet"
        if appearance is not None:
            appearance = appearance.expand(-1, f, -1)
            strength = strength.view(-1, 1, 1) if isinstance(strength, Tensor) else strength
        emb = self.embed(t, text, f, fps, guidance, motion_guidance, motion_factor,
                         appearance_factor)
        c = Context(f, emb, self.tokens(text, f, first_frame, image, histogram),
                    image if cfg.image_keys else None, motion_text, eot, appearance, strength,
                    temporal=not (cfg.text_resampler and f == 1))
        eot_maps = []

        def run(layer, x):
            x = run_block(layer, x, c, recompute=self.grad_ckpt)
            if isinstance(x, tuple):  # a motion block's map is a result and keeps its graph
                x, eot_map = x
                eot_maps.append(eot_map)
            return x

        conv_in, temporal_in = self.input_blocks[0]
        beside = self.beside(x, first_frame, maps, map_keep) if cfg.concat_dim else None
        x = rearrange(x, "b c f h w -> (b f) c h w")
        x = conv_in(x if beside is None else torch.cat([x, beside], dim=1))
        if image_prior is not None:
            x = x + self.img_embedding(image_prior).repeat_interleave(f, 0)
        if cfg.spatial_pos:
            x = x + self.spatial_pos[:, :h, :w]
        x = run(temporal_in, x)
        skips = [x]
        for entry in list(self.input_blocks)[1:]:
            for layer in entry if isinstance(entry, nn.ModuleList) else [entry]:
                x = run(layer, x)
            skips.append(x)
        for layer in self.middle_block:
            x = run(layer, x)
        for i, entry in enumerate(self.output_blocks):
            skip = skips.pop()
            if cfg.super_resolution and i < 2:
                x, skip = damp_skip(x, skip, *((1.1, 0.6), (1.2, 0.4))[i])
            x = torch.cat([x, skip], dim=1)
            for layer in entry:
                x = run(layer, x)
        # contiguous, since FSDP2 warns of views
        x = rearrange(self.out(x), "(b f) c h w -> b c f h w", f=f).contiguous()
        return (x, eot_maps) if eot is not None else x


def fourier_filter(x, threshold, scale):
    """Scale the lowest frequencies of x (n,c,h,w), a square of 2 threshold around 0."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.float()), dim=(-2, -1))
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    gain = torch.ones(x.shape[-2:], device=x.device)
    gain[h - threshold:h + threshold, w - threshold:w + threshold] = scale
    back = torch.fft.ifft2(torch.fft.ifftshift(spectrum * gain, dim=(-2, -1)))
    return back.real.to(x.dtype)


def damp_skip(x, skip, up, down):
    """FreeU (arXiv 2309.11497) of SR600: half of x scaled up, the skip's low frequencies down."""
    half = x.shape[1] // 2
    return torch.cat([x[:, :half] * up, x[:, half:]], dim=1), fourier_filter(skip, 1, down)


# ---- public weights -> ours

def videocrafter_name(key):
    """Key of UNet3D -> VideoCrafter's (without `model.diffusion_model.`)."""
    if key.startswith("input_blocks.0.1."):
        return key.replace("input_blocks.0.1.", "init_attn.0.", 1)
    return re.sub(r"^(input_blocks\.\d+)\.op\.", r"\1.0.op.", key)


def demo_source(key, net):
    """Key of a UNet3D with motion blocks -> the ModelScope key that it starts from (DEMO).

    A motion block starts as a copy of the spatial transformer before it; what follows is one place
    further back than in ModelScope.
    """
    match = re.match(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.(\d+)\.(.+)", key)
    if not match:
        return key
    entry, place, rest = match[1], int(match[2]), match[3]
    if place >= 2 and any(isinstance(m, MotionBlock) for m in net.get_submodule(entry)):
        return f"{entry}.{place - 1}.{rest}"
    return key


I2VGEN_DIFFUSERS = {
    "local_image_concat.": "image_latents_proj_in.",
    "local_image_embedding.": "image_latents_context_embedding.",
    "local_temporal_encoder.layers.0.0.norm.": "image_latents_temporal_encoder.norm1.",
    # but for to_qkv, one matrix in the original, see unet_state()
    "local_temporal_encoder.layers.0.0.fn.": "image_latents_temporal_encoder.attn1.",
    "local_temporal_encoder.layers.0.1.net.0.0.": "image_latents_temporal_encoder.ff.net.0.proj.",
    "local_temporal_encoder.layers.0.1.net.2.": "image_latents_temporal_encoder.ff.net.2."}


def unet_diffusers_name(key, num_res_blocks=2):
    """Public key of UNet3D -> that of diffusers' UNet3DConditionModel or I2VGenXLUNet."""
    for ours, theirs in I2VGEN_DIFFUSERS.items():
        if key.startswith(ours):
            return key.replace(ours, theirs, 1)
    part, _, rest = key.partition(".")
    ends = {"time_embed": {"0": "time_embedding.linear_1", "2": "time_embedding.linear_2"},
            "out": {"0": "conv_norm_out", "2": "conv_out"}}
    if part in ends:
        place, _, kind = rest.partition(".")
        return f"{ends[part][place]}.{kind}"
    if part not in ("input_blocks", "middle_block", "output_blocks"):
        return key
    if part == "middle_block":
        side, n = "mid_block", 0
        slot, _, rest = rest.partition(".")
        kind = {"0": "resnets", "1": "attentions", "2": "temp_attentions", "3": "resnets"}[slot]
        n = int(slot == "3")
    else:
        block, slot, rest = rest.split(".", 2)
        if part == "input_blocks" and block == "0":
            return f"conv_in.{rest}" if slot == "0" else f"transformer_in.{rest}"
        level, n = divmod(int(block) - (part == "input_blocks"), num_res_blocks + 1)
        side = f"{'down' if part == 'input_blocks' else 'up'}_blocks.{level}"
        if slot == "op":
            return f"{side}.downsamplers.0.conv.{rest}"
        if rest.startswith("conv."):
            return f"{side}.upsamplers.0.{rest}"
        kind = {"0": "resnets", "1": "attentions", "2": "temp_attentions"}[slot]
    if rest.startswith("temopral_conv."):
        return f"{side}.temp_convs.{n}.{rest.removeprefix('temopral_conv.')}"
    for ours, theirs in (("in_layers.0", "norm1"), ("in_layers.2", "conv1"),
                         ("out_layers.0", "norm2"), ("out_layers.3", "conv2"),
                         ("emb_layers.1", "time_emb_proj"), ("skip_connection", "conv_shortcut")):
        if kind == "resnets" and rest.startswith(ours + "."):
            rest = theirs + rest.removeprefix(ours)
    return f"{side}.{kind}.{n}.{rest}"


def unet_state(state, net, source):
    """Public weights -> UNet3D's: VGen's, VideoCrafter's (alone or in its file), diffusers'."""
    state = below(state, "model.diffusion_model.")
    if any(k.startswith("init_attn.") for k in state):
        turbo = net.cfg.guidance_dim and not net.cfg.motion_guidance_dim
        if turbo and "time_cond_proj.weight" not in state:
            # T2V-Turbo: the file is VideoCrafter2's, and of this layer only the LoRA was
            # published (its weights were a random draw). Zeros can be repeated.
            zeros = torch.zeros(net.time_cond_proj.weight.shape)
            state = state | {"time_cond_proj.weight": zeros}
        return rename(state, net, videocrafter_name, source)
    if any(k.startswith("down_blocks.") for k in state):
        attention = "image_latents_temporal_encoder.attn1.to_"
        if f"{attention}q.weight" in state:  # one matrix in the original
            state = dict(state)
            parts = [state.pop(f"{attention}{k}.weight") for k in "qkv"]
            state[f"{attention}qkv.weight"] = torch.cat(parts)
        return rename(state, net, lambda k: unet_diffusers_name(k, net.cfg.num_res_blocks), source)
    adapters = identity_adapters(net)  # no base's file has them
    if adapters and state.keys() | adapters.keys() == net.state_dict().keys():
        return adapters | state
    return state


def identity_adapters(net):
    """DreamVideo's adapters, untrained: all zeros, A(x) = x. dreamvideo.py draws its new ones."""
    shapes = {k: v.shape for k, v in net.state_dict().items() if "_adapter." in k}
    return {k: torch.zeros(shape) for k, shape in shapes.items()}


def with_new_conditions(state, net):
    """Weights that lack some of net's conditions -> those from which its training starts.

    The missing layers are drawn as they are built, the same on every process. The first convolution
    ignores input channels that are new.
    """
    missing = net.state_dict().keys() - state.keys()
    if not missing:
        return state
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        # conditions are built before all else, so a UNet without levels draws the same numbers
        small = UNet3D(replace(net.cfg, dim_mult=(1,), num_res_blocks=0, attn_scales=()))
    fresh = {k: v for k, v in small.state_dict().items() if k in missing}
    first, cfg = "input_blocks.0.0.weight", net.cfg
    if first in state and state[first].shape[1] == cfg.in_dim:
        fresh[first] = F.pad(state[first], (0, 0, 0, 0, 0, cfg.concat_dim))
    return state | fresh


def with_motion_blocks(state, net, source):
    """Public weights of a base -> those of `net`, the same with DEMO's motion blocks.

    The blocks are copies of its spatial transformers, as published.
    """
    with torch.device("meta"):
        plain = UNet3D(replace(net.cfg, motion_blocks=False))
    load_strict(plain, unet_state(state, plain, source), source)
    state = plain.state_dict()
    return {k: state[demo_source(k, net)].clone() for k in net.state_dict()}


# ---- LoRA: W x + (alpha / rank) B A x, on Linear and convolution layers

def add_lora(net, rank, alpha, targets):
    """Freeze `net` and give each layer whose name ends in one of `targets` a LoRA branch. -> names

    targets None: the network's own, its class's lora_targets.

    The branch of `layer` is `layer.lora_A.weight` and `layer.lora_B.weight`, in fp32; B starts at
    zero. On a convolution A has its kernel, stride and padding, and B is 1x1 (as in T2V-Turbo). A
    rank above a layer's width is cut to that.
    """
    net.requires_grad_(False)
    targets = targets or net.lora_targets
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = {n: m for n, m in net.named_modules()
              if isinstance(m, kinds) and any(f".{n}".endswith(f".{target}") for target in targets)}
    for target in targets:
        if not any(f".{n}".endswith(f".{target}") for n in layers):
            raise UserError(f"--lora-targets {target}: no layer of the network has such a name "
                            f"(its attentions: {' '.join(net.lora_targets)}; the default)")
    for layer in layers.values():
        new = dict(bias=False, device=layer.weight.device, dtype=torch.float32)
        cout, cin = layer.weight.shape[:2]
        r = min(rank, cin, cout)
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            conv = type(layer)
            layer.lora_A = conv(cin, r, layer.kernel_size, layer.stride, layer.padding, **new)
            layer.lora_B = conv(r, cout, 1, **new)
        else:  # init of A: kaiming_uniform(a=sqrt 5), as in peft
            layer.lora_A, layer.lora_B = nn.Linear(cin, r, **new), nn.Linear(r, cout, **new)
        nn.init.zeros_(layer.lora_B.weight)
        layer.lora_scale, layer.lora_hook = alpha / rank, layer.register_forward_hook(lora_branch)
    return list(layers)


def lora_branch(layer, args, out):
    return out + layer.lora_scale * layer.lora_B(layer.lora_A(args[0]))


@contextmanager
def lora_strength(net, strength):
    """Context in which LoRA branches count `strength` times; no backward pass may run in it."""
    layers = [m for m in net.modules() if hasattr(m, "lora_scale")]
    scales = [layer.lora_scale for layer in layers]
    try:
        for layer, scale in zip(layers, scales):
            layer.lora_scale = strength * scale
        yield
    finally:
        for layer, scale in zip(layers, scales):
            layer.lora_scale = scale


def frozen_copy(net, dtype, args, device):
    """The network as it is before all its weights are trained; sharded with fsdp.

    dtype: of the layers whose weights autocast would cast anyway; norms and tables keep theirs,
    so that under autocast the copy computes exactly what `net` does. None: all keep theirs.
    """
    frozen = copy.deepcopy(net).eval().requires_grad_(False)
    for module in frozen.modules() if dtype else ():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            module.to(dtype)
    wrap = parallelize if args.parallel == "fsdp" else compile_blocks  # DDP has nothing to average
    return wrap(frozen, args, device)


def without_lora(net):
    """-> fn(*args, **cond): `net` without its LoRA, the reference of DPO."""
    def reference(*args, **cond):
        with lora_strength(net, 0.0):
            return net(*args, **cond)
    return reference


def lora_delta(down, up, like):
    """B A, of a layer's LoRA weights A and B, in the shape of its weight `like`; float32."""
    return (up.float().flatten(1) @ down.float().flatten(1)).view_as(like)


@torch.no_grad()
def merge_lora(net):
    """Add every LoRA branch to its weight, W += (alpha / rank) B A, and remove it."""
    for layer in list(net.modules()):
        if hasattr(layer, "lora_A"):
            delta = lora_delta(layer.lora_A.weight, layer.lora_B.weight, layer.weight)
            if isinstance(layer, Int8Linear):
                layer.store(layer.weight * layer.scale + layer.lora_scale * delta)
            else:
                layer.weight += (layer.lora_scale * delta).to(layer.weight.dtype)
            layer.lora_hook.remove()
            del layer.lora_A, layer.lora_B, layer.lora_scale, layer.lora_hook


# ---- frozen weights in 8 bits (--frozen int8)

def freeze_int8(net):
    """Keep the weights of the linear layers in the network's blocks as 8-bit codes from now on.

    They are frozen, and the layers keep their names, so LoRA branches may come before or after.
    What lies outside the blocks, norms, biases and convolutions keep their type.
    """
    for layer in (m for block in net.units() for m in block.modules()):
        if type(layer) is nn.Linear and not layer.weight.requires_grad:
            layer.__class__ = Int8Linear
            layer.store(layer.weight)


class Int8Linear(nn.Linear):
    """A Linear whose frozen weight is scale * codes: int8 codes (n,k), a float32 scale per row."""

    @torch.no_grad()
    def store(self, weight):
        """Take the weight (n,k), rounded to the nearest codes of -127..127."""
        weight = weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        codes = (weight / scale).round_().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x):
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        out = Int8Product.apply(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class Int8Product(torch.autograd.Function):
    """x (..., k), codes (n,k), scale (n,1) -> x W^T (..., n) in the type of x, W = scale * codes.

    W is never whole: only some of its rows exist at a time, in the backward pass some columns.
    """

    @staticmethod
    def forward(ctx, x, codes, scale):
        ctx.save_for_backward(codes, scale)
        out = x.new_empty(*x.shape[:-1], len(codes))
        for rows in spans(*codes.shape):
            out[..., rows] = F.linear(x, (codes[rows] * scale[rows]).to(x.dtype))
        return out

    @staticmethod
    def backward(ctx, grad):
        codes, scale = ctx.saved_tensors
        n, k = codes.shape
        out = grad.new_empty(*grad.shape[:-1], k)
        for columns in spans(k, n):
            out[..., columns] = grad @ (codes[:, columns] * scale).to(grad.dtype)
        return out, None, None


def spans(n, width):
    """Slices of n rows, each of about four million numbers."""
    step = max(1, 2 ** 22 // width)
    return [slice(i, i + step) for i in range(0, n, step)]


# ---- public LoRA files, read by weights.py, into a network

def instructvideo_lora_name(key):
    """Our LoRA key -> InstructVideo's:  attn1.to_out.0.lora_A -> attn1.to_out_lora.down_linear."""
    key = key.replace(".lora_A.", "_lora.down_linear.").replace(".lora_B.", "_lora.up_linear.")
    return key.replace("to_out.0_lora", "to_out_lora")


def turbo_lora_layers(net):
    """Names of the layers in T2V-Turbo's LoRA list, which has none, in its order.

    They are all Linear, Conv2d and Conv3d layers in VideoCrafter's order, where the first temporal
    transformer (our input_blocks.0.1) comes after the encoder.
    """
    names = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    moved = [n for n in names if n.startswith("input_blocks.0.1.")]
    rest = [n for n in names if n not in moved]
    at = 1 + max(i for i, n in enumerate(rest) if n.startswith("input_blocks."))
    return rest[:at] + moved + rest[at:]


def public_layers(net):
    """{name of a layer with a weight, in the public files' namings and in ours: ours}."""
    ours = [n for n, m in net.named_modules() if isinstance(getattr(m, "weight", None), Tensor)]
    layers = {name_of(f"{n}.weight").removesuffix(".weight"): n
              for name_of in net.namings() for n in ours}
    return layers | {n: n for n in ours}


def lora_pairs(net, lora, path):
    """{layer.lora_A.weight, layer.lora_B.weight: tensor} -> {layer: (A, B)} that fit `net`."""
    def outer(shape):  # a Linear's (in,) is a 1x1 convolution's (in, 1, 1)
        return tuple(shape[:1]) + tuple(n for n in shape[1:] if n > 1)
    shapes, pairs = {k: v.shape for k, v in net.state_dict().items()}, {}
    for layer in dict.fromkeys(key.rpartition(".lora_")[0] for key in lora):
        down, up = (lora.get(f"{layer}.lora_{side}.weight") for side in "AB")
        if down is None or up is None or min(down.ndim, up.ndim) < 2:
            raise UserError(f"--lora {path}: {layer} is no pair of matrices A and B")
        shape, rank = shapes.get(f"{layer}.weight", ()), len(down)
        fit = (up.shape[:1], outer(down.shape[1:])) == (shape[:1], outer(shape[1:]))
        if not fit or up.shape != (*up.shape[:1], rank, *[1] * (up.ndim - 2)) or not rank:
            raise UserError(f"--lora {path}: the LoRA of {layer} does not fit this network; give "
                            "the base that it was made for")
        if not (is_plain(down) and is_plain(up)):
            raise UserError(f"--lora {path}: the LoRA of {layer} is not of finite numbers")
        pairs[layer] = down, up
    return pairs


def plain_lora(net, path, scale=1.0):
    """A LoRA file, peft's, diffusers', ComfyUI's, kohya's or T2V-Turbo's -> the same `scale` times
    under our names, for merge_public_lora(): each layer has its alpha, and no config is needed."""
    state, text = open_weights(path)
    if lora_format(state) == "turbo":
        lora, scales, differences = turbo_lora(state, turbo_lora_layers(net), path), {}, {}
    elif lora_format(state) == "named":
        lora, scales, differences = named_lora(state, text, path, public_layers(net))
    else:
        raise UserError(f"--lora {path}: no plain LoRA: {looks_like(state)}; it goes to sample.py "
                        "--lora, or to --lora of its own method")
    plain = {}
    for layer, (down, up) in lora_pairs(net, lora, path).items():
        alpha = torch.tensor(scale * scales.get(layer, 1.0) * len(down))
        plain |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up,
                  f"{layer}.alpha": alpha}
    ends = {parameter: end for end, parameter in DIFFERENCES.items()}
    for key, value in differences.items():
        layer, _, parameter = key.rpartition(".")
        plain[layer + ends[parameter]] = scale * value.float()
    return plain


@torch.no_grad()
def merge_public_lora(net, path, scale=1.0, opened=None):
    """Add a LoRA file of any known format to the weights; see weights.named_lora().

    InstructVideo's file also holds the base's weights, which replace the network's. DreamVideo's
    adapters are no LoRA: they fill the network's own and have no scale. opened: what
    open_weights(path) gives, if it was read before.
    """
    state, text = opened or open_weights(path)
    kind, scales = lora_format(state), {}
    if kind == "named":
        lora, scales, differences = named_lora(state, text, path, public_layers(net))
        add_differences(net, differences, path, scale)
    elif kind == "turbo":
        lora = turbo_lora(state, turbo_lora_layers(net), path)
    elif kind in ("adapters", "instructvideo"):
        state = bare_keys(state, path)
        if kind == "adapters":
            return fill_adapters(net, state, path, scale)
        base = {k: v for k, v in state.items() if "_lora." not in k}
        if base:
            load_strict(net, base, f"--lora {path}")
        lora = instructvideo_lora(net, state, path)
    else:
        raise UserError(f"--lora {path}: not a LoRA file that is known here: {looks_like(state)}")
    modules = dict(net.named_modules())
    for layer, (down, up) in lora_pairs(net, lora, path).items():
        weight = modules[layer].weight
        factor = scale * scales.get(layer, 1.0)
        weight += (factor * lora_delta(down, up, weight)).to(weight.dtype)
        if not is_finite(weight):
            raise UserError(f"--lora {path}: {layer} is too large with it (scale {factor:g})")


@torch.no_grad()
def add_differences(net, differences, path, scale):
    """{our parameter: tensor} of a LoRA file, such as biases: add them, `scale` times."""
    parameters = dict(net.named_parameters())
    for key, value in differences.items():
        own = parameters.get(key)
        if own is None or own.shape != value.shape or not is_plain(value):
            raise UserError(f"--lora {path}: the differences of {key} do not fit this network; "
                            "give the base that it was made for")
        own += (scale * value.float()).to(own.dtype)


def fill_adapters(net, state, path, scale):
    """A file of DreamVideo's, {key: tensor} of the subject's or the motion's adapters -> net."""
    if scale != 1:
        raise UserError(f"--lora {path}:{scale:g}: DreamVideo's adapters have no scale; leave it "
                        "out")
    ours = {k: v.shape for k, v in net.state_dict().items()}
    wrong = [k for k, v in state.items() if ours.get(k) != v.shape or not is_plain(v)]
    if wrong:
        raise UserError(f"--lora {path}: {len(wrong)} tensors do not fit this network, first "
                        f"{wrong[0]}: DreamVideo's adapters go with --base dreamvideo")
    net.load_state_dict(state, strict=False)


def read_peft_lora(net, path, scale=1.0):
    """A LoRA file, B times `scale` -> tensors, rank, alpha, targets, the last three for add_lora().

    All its layers must have one rank. The file's layers have the names of a public file.
    """
    lora, scales, differences = named_lora(*open_weights(path), path, public_layers(net))
    extra = next((k for k, v in differences.items() if v.any()), None)
    if extra:
        raise UserError(f"--lora {path}: holds differences beside the LoRA (such as that of "
                        f"{extra}), which a run does not train; start from a file without them")
    pairs, modules = lora_pairs(net, lora, path), dict(net.named_modules())
    rank = max(len(down) for down, _ in pairs.values())
    for layer, (down, _) in pairs.items():
        weight = modules[layer].weight
        if len(down) != min(rank, *weight.shape[:2]):
            raise UserError(f"--lora {path}: {layer} has rank {len(down)}, others have {rank}")
        if down.ndim != weight.ndim:
            raise UserError(f"--lora {path}: {layer} is a convolution, its LoRA is not")
    common = next(iter(scales.values())) or 1.0
    for layer, own in scales.items():
        lora[f"{layer}.lora_B.weight"] = lora[f"{layer}.lora_B.weight"] * (scale * own / common)
    short = list(dict.fromkeys(layer.rpartition(".")[2] for layer in pairs))  # to_q, ...
    same = {n for n in modules if n.rpartition(".")[2] in short} == pairs.keys()
    return lora, rank, common * rank, short if same else list(pairs)


def instructvideo_lora(net, state, path):
    """InstructVideo's file {key: tensor} -> its LoRA under our names, float32."""
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    names = [f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"]
    ours = {instructvideo_lora_name(name): name for name in names}
    theirs = [k for k in state if "_lora." in k]
    unknown = [k for k in theirs if k not in ours]
    if unknown:
        raise UserError(f"--lora {path}: {unknown[0]} belongs to no layer of this network")
    return {ours[k]: state[k].float() for k in theirs}


def start_from_lora(net, path, scale=1.0):
    """Start from InstructVideo's public LoRA, times `scale`: put it into the branches of `net`.

    The base's weights in the file must be the network's own, since a run saves its LoRA alone.
    """
    state, _ = open_weights(path)
    if lora_format(state) != "instructvideo":
        known = "T2V-Turbo's list" if isinstance(state, list) else looks_like(state)
        raise UserError(f"--lora {path}: no LoRA of InstructVideo to start from: {known}")
    state = bare_keys(state, path)
    ours, lora = net.state_dict(), instructvideo_lora(net, state, path)
    other = lora.keys() ^ {k for k in ours if ".lora_" in k}
    if other:
        raise UserError(f"--lora {path}: {min(other)} is in one of file and network only; it goes "
                        "with --lora-targets to_q to_k to_v to_out.0 and the base it was made for")
    for key, value in lora.items():
        if value.shape != ours[key].shape:
            rank = next(len(v) for k, v in lora.items() if ".lora_A." in k)
            raise UserError(f"--lora {path}: has rank {rank} and {key} of {tuple(value.shape)}: "
                            f"give --rank {rank}, or the base it was made for")
    for key in (k for k in state if "_lora." not in k):
        own, theirs = ours.get(key), state[key]
        if own is not None and own.dtype == torch.int8:
            continue  # --frozen int8: convolutions and norms tell one base from another
        if own is None or own.shape != theirs.shape or not torch.allclose(
                own.float(), theirs.to(own).float(), rtol=1e-2, atol=1e-4):
            raise UserError(f"--lora {path}: was made for other base weights (first: {key}): give "
                            "the --base it was made for (InstructVideo's: modelscope-v1.4)")
    net.load_state_dict(lora, strict=False)
    for layer in (m for m in net.modules() if hasattr(m, "lora_B")):
        layer.lora_B.weight.data *= scale / layer.lora_scale


# ---- compiled blocks (--compile)

@cache
def compiler_works(kind):
    """Can torch.compile() make code for this kind of device, such as "cuda"? If not, say why."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=kind))
    except Exception as e:  # no C++ compiler, no Triton, an old GPU: many types of error
        reason = (str(e).strip() or repr(e)).splitlines()[0][:160]
        warn(f"--compile: no compiler works here ({reason}); the run goes on without it")
        return False
    return True


def compile_blocks(net, args, device):
    """With --compile, compile a network's blocks one by one, in place. -> net

    Blocks alike share their code, so a transformer compiles in the time of one block. It happens
    in the first call of each kind: with and without gradients, and for each new size.
    """
    if args.compile and compiler_works(device.type):
        config, blocks = torch._dynamo.config, net.units()
        config.suppress_errors = True  # a block that cannot be compiled runs as it is
        # a UNet's blocks have many shapes; the limit of 8 would leave most of them uncompiled
        config.recompile_limit = max(config.recompile_limit, 8 * len(blocks))
        config.accumulated_recompile_limit = max(1024, config.recompile_limit)
        for block in blocks:
            block.compile()
    return net


# ---- many GPUs

def parallelize(net, args, device, reshard=True, unused=False, whole=False):
    """Wrap a network for data parallel training; call the returned network in rollouts and losses.

    --parallel ddp: a full copy on each GPU, with `whole` always; fsdp: FSDP2, block by block, then
    the rest (frozen weights may have another type than trained ones), with --offload its shards,
    their gradients and the optimizer's state in CPU memory, with --shard-group a copy in each group
    of processes (hybrid sharding: weights are gathered within a group, gradients averaged over
    all). reshard False: ZeRO-2. unused: a step may leave out parts of the network. A single process
    without FSDP gets its network back unchanged, but for --compile, which comes before FSDP, whose
    hooks then run around the code.
    """
    if not whole:
        compile_blocks(net, args, device)
    if not torch.distributed.is_initialized():
        return net
    meet()  # a machine may have downloaded for an hour
    if args.parallel == "fsdp" and not whole:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
        policy = {} if reshard else {"reshard_after_forward": False}
        if args.shard_group:
            groups = torch.distributed.get_world_size() // args.shard_group
            policy["mesh"] = init_device_mesh(device.type, (groups, args.shard_group),
                                              mesh_dim_names=("copies", "shards"))
        if args.offload:
            policy["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for block in net.units():
            fully_shard(block, **policy)
        return fully_shard(net, **policy)
    devices = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        net, devices, broadcast_buffers=False, find_unused_parameters=unused)
