"""Networks: UNet3D (the VGen family's 3-D UNet), STDiT3 and CogVideoX (transformers), LoRA, parallelize().

UNet3D is one network with options: ModelScope T2V (arXiv 2308.06571), VideoCrafter1 and 2 (2310.19512,
2401.09047), T2V-Turbo (2405.18750, 2410.05677), I2VGen-XL (2311.04145), its SR600, DEMO (2410.05097),
DreamVideo (2312.04433), HiGen (2312.04483), TF-T2V / VideoComposer (2312.15770, 2306.02018) and VideoLCM
(2312.09109). The options stand in a frozen dataclass whose defaults are the public ModelScope T2V checkpoint;
an option that is off adds no keys and costs nothing. Parameter names are the public checkpoints',
misspellings included (`temopral_conv`); what VideoCrafter and diffusers name otherwise is mapped at load.
CogVideoX (2408.06072) makes video from text or an image, with the branch of Diffusion as Shader (2501.03847)
as an option; its keys are those of the public diffusers files.
Videos and latents are `b c f h w`; inside the UNet images travel as `(b f) c h w`, sample-major; inside
STDiT3 tokens as `b f s d`, s the h w patches of a frame.
"""
import copy
import math
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import UserError, seed_of

# ---- parts shared by every network

def sinusoidal(t, dim):
    """t (b,) -> (b, dim) float32: cosines, then sines, frequencies 10000^(-k / half) for k = 0..half-1."""
    half = dim // 2
    # rounded as in the originals: in float32 another order of these factors shifts angles by up to 6e-5
    freq = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = t.float()[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def guidance_embedding(w, dim=256):
    """Guidance scale w (b,) -> (b, dim): sinusoid of 1000 w as T2V-Turbo has it, sines first, half - 1."""
    half = dim // 2
    freq = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=w.device, dtype=torch.float32))
    angle = 1000 * w.float()[:, None] * freq
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def zero_init(module):
    """Zero weights and bias of a residual branch's last layer: the branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def lean(layers, x, width):
    """layers(x), keeping x alone for the backward pass, which computes cheap layers (norms, activations, a
    gather) again. The last one may be a product: its answer is not needed there, so it runs once.

    Only from 256 channels on: in a narrow network the cheap layers take as long as the products.
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
    """Attention of `heads` heads, of every network here: q (n,l,heads d), k and v (n,m,heads d) -> like q.

    mask (n,m), True for the keys that are seen; None: all.
    """
    q, k, v = (split_heads(y, heads) for y in (q, k, v))
    mask = None if mask is None else mask[:, None, None]  # the same for all heads and queries
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return rearrange(out, "n a l d -> n l (a d)")


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864): turn the pairs of channels (2i, 2i+1) of x (b,l,heads,d) by the
    angles of cos, sin (l,d/2). In float32, whatever x is."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # one pass over memory instead of six
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2).to(x.dtype)


def conv2d(x, weight, bias, stride, padding):
    """F.conv2d of x (n,c,h,w), stride and padding pairs.

    On a CPU few pixels under wide weights become one matmul: oneDNN would reorder the weights, and in
    training their gradient, at every call, which takes several times longer than the convolution itself.
    """
    if x.device.type != "cpu" or len(x) * x.shape[2] * x.shape[3] > len(weight) // 4:
        return F.conv2d(x, weight, bias, stride, padding)
    columns = F.unfold(x, weight.shape[2:], padding=padding, stride=stride)  # n (c kh kw) l
    out = F.linear(columns.transpose(1, 2).flatten(0, 1), weight.flatten(1), bias)  # (n l) c: one matmul
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
    """A learned vector for each distance -span..span between two frames, farther ones clipped."""

    def __init__(self, span, dim):
        super().__init__()
        self.span = span
        self.embeddings_table = nn.Parameter(torch.empty(2 * span + 1, dim))
        nn.init.xavier_uniform_(self.embeddings_table)

    def forward(self, f):
        """-> (f, f, dim): entry [i, j] belongs to the distance j - i."""
        i = torch.arange(f, device=self.embeddings_table.device)
        return self.embeddings_table[(i[None] - i[:, None]).clamp(-self.span, self.span) + self.span]


class Attention(nn.Module):
    """Multi-head attention, the only one in the UNet: project, split heads, SDPA, merge.

    image_keys: further keys and values for image tokens, attended to apart from the text (VideoCrafter1
    image-to-video, as IP-Adapter). relative: span of a RelativePosition in keys and values (VideoCrafter1).
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
        """Logits q_i (k_j + R^k_ij), then the weighted sum of v_j + R^v_ij (arXiv 1803.02155, eq. 3, 4)."""
        q, k, v = (split_heads(y, self.heads) for y in (q, k, v))
        f = q.shape[2]
        logits = q @ k.transpose(-1, -2) + torch.einsum("naid,ijd->naij", q, self.relative_position_k(f))
        weights = (logits * q.shape[-1] ** -0.5).softmax(-1)
        out = weights @ v + torch.einsum("naij,ijd->naid", weights, self.relative_position_v(f))
        return rearrange(out, "n a l d -> n l (a d)")

    def map_of(self, x, context, index):
        """Mean over heads of each query's attention to one token of its sample: index (n,) -> (n,l)."""
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
        return value.mul_(torch.ops.aten.gelu_(gate))  # in place: these are a network's largest tensors


class GELU(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, inner)

    def act(self, h):
        gelu = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_
        return gelu(h, approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim, first=GEGLU):
        super().__init__()
        # `net.1` is the published file's dropout of rate 0: it holds no weights but keeps the index
        self.net = nn.Sequential(first(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        first, _, last = self.net
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return lean(lambda h: last(first.act(h)), first.proj(x), x.shape[-1])
        rows = max(512, 2 ** 21 // first.proj.out_features)  # of a piece whose activations stay in the cache
        pieces = x.flatten(0, -2).split(rows)
        return torch.cat([last(first.act(first.proj(p))) for p in pieces]).view(x.shape)


class Adapter(nn.Module):
    """DreamVideo's  A(x) = x + up(gelu(down(x + strength cond(image)))); starts as the identity."""

    def __init__(self, dim, hidden=0, image_dim=0, serial=False):
        super().__init__()
        self.serial = serial
        self.down_linear = nn.Linear(dim, hidden or dim // 2)
        self.up_linear = zero_init(nn.Linear(hidden or dim // 2, dim))
        self.condition_linear = nn.Linear(image_dim, dim) if image_dim else None
        self.on = True

    def forward(self, x, image=None, strength=1.0):
        """x (n,f,d); image (b,f,e), n a multiple of b: one CLIP embedding a frame, or None."""
        if not self.on:
            return x
        h = x
        if self.condition_linear is not None and image is not None:
            cond = strength * self.condition_linear(image)
            h = x + cond.repeat_interleave(len(x) // len(cond), 0)
        return x + self.up_linear(F.gelu(self.down_linear(h)))


class TransformerBlock(nn.Module):
    """x += attn1(x); x += attn2(x, text); x += ff(x). Without a text, attn2 is a second self-attention.

    cross_twice: attn1 attends to the text too (HiGen's text resampler). adapters: (layer, position) pairs,
    layer "self_attention" | "cross_attention" | "feedforward", position "parallel" | "serial" (DreamVideo).
    """

    def __init__(self, dim, heads, head_dim, context_dim=None, cross_twice=False, image_keys=False,
                 relative=0, adapters=(), adapter_dim=0, adapter_image_dim=0):
        super().__init__()
        self.cross_twice = cross_twice
        self.attn1 = Attention(dim, heads, head_dim, context_dim if cross_twice else None, relative=relative)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, heads, head_dim, context_dim, image_keys, relative)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        where = dict(adapters)
        for name, layer in (("attn_adapter", "self_attention"), ("cross_attn_adapter", "cross_attention"),
                            ("ff_adapter", "feedforward")):
            adapter = None
            if layer in where:
                adapter = Adapter(dim, adapter_dim, adapter_image_dim, where[layer] == "serial")
            setattr(self, name, adapter)

    def forward(self, x, text=None, image=None, appearance=None, strength=1.0, eot=None):
        """x (n,l,d); text (b,m,e) with n = b f: each frame of a sample attends to the same text.

        image (b,k,e): tokens for attn2's image keys; appearance, strength: see Adapter. eot (b,): the answer
        is (x, map (b, n l / b)), how much each place attends to that token of the text.
        """
        n, length, d = x.shape

        def cross(attention, x):
            # cross-attention treats each query alone, so the f frames of a sample can be one long sequence of
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


# ---- UNet blocks: every one is called as block(x, c), x (b f) c h w, c a Context

@dataclass
class Context:
    """What all blocks of a forward pass see."""
    f: int                               # frames
    emb: Tensor                          # (b f) e: embedding of the step (fps, ...)
    text: Tensor                         # b n d, or (b f) n d: tokens for the spatial transformers
    image: Tensor | None = None          # b k d: tokens for image_keys (VideoCrafter1)
    motion_text: Tensor | None = None    # b n d: tokens for the motion blocks (DEMO)
    eot: Tensor | None = None            # (b,): the motion blocks return attention maps of this token
    appearance: Tensor | None = None     # b f d: CLIP embeddings for the adapters (DreamVideo)
    strength: float = 1.0                # of the appearance
    temporal: bool = True                # False: layers over time pass their input on (HiGen's images)


class Conv1x1(nn.Conv1d):
    """A Conv1d of kernel 1, stored as in the public files (weight [out, in, 1]), on channels-last tokens."""

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
        self.proj_out = zero_init(nn.Linear(inner, channels) if linear else Conv1x1(inner, channels, 1))

    def tokens(self, x, f):
        video = rearrange(x, "(b f) c h w -> b c f h w", f=f)
        # the norm is over the frames, too; as it lies, linear would multiply pixel by pixel
        return self.proj_in(rearrange(self.norm(video), "b c f h w -> (b h w) f c").contiguous())

    def back(self, h, x):
        return x + rearrange(self.proj_out(h), "(b h w) f c -> (b f) c h w", h=x.shape[2], w=x.shape[3])

    def forward(self, x, c):
        if not c.temporal:
            return x
        block = self.transformer_blocks[0]
        return self.back(block(self.tokens(x, c.f), None, None, c.appearance, c.strength), x)


class MotionBlock(TemporalTransformer):
    """DEMO's motion conditioning: over the frames, at each pixel, and to the motion encoder's tokens."""

    def forward(self, x, c):
        """-> x, or with c.eot (x, map (b,h,w,f)): how much each place attends to the end-of-text token."""
        h = self.transformer_blocks[0](self.tokens(x, c.f), c.motion_text, eot=c.eot)
        if c.eot is None:
            return self.back(h, x)
        h, eot_map = h
        return self.back(h, x), eot_map.view(len(c.eot), *x.shape[2:], c.f)


class Dropout(nn.Dropout):
    """Dropout whose masks can be keyed by sample, see seed_dropout(). Until then it is nn.Dropout."""
    seeds = None  # one per sample of the batch

    def forward(self, x):
        """x (b k, ...) for any k: the rows of a sample lie together, as everywhere in the UNet."""
        if self.seeds is None or not self.training or not self.p:
            return super().forward(x)
        assert len(x) % len(self.seeds) == 0, "seed_dropout() was called for another batch"
        keep = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        for part, seed in zip(keep.chunk(len(self.seeds)), self.seeds):
            part.bernoulli_(1 - self.p, generator=torch.Generator(x.device).manual_seed(seed))
        return x * keep / (1 - self.p)


def seed_dropout(net, seed, numbers):
    """Key dropout, from here to the next call, by (seed, number of the sample, layer).

    numbers: those of the batch's samples within the run. The masks then do not depend on --batch, and blocks
    recomputed in the backward pass draw the same ones again. net: plain, DDP or FSDP.
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
        self.temopral_conv = TemporalConv(cout, temporal_dropout) if temporal_conv else None  # as published

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
    """Maps or latents, frame by frame, pooled to a given size and then 4x smaller. Keys .0, .3, .5."""

    def __init__(self, cin, widths, cout):
        first, second = widths
        super().__init__(Conv2d(cin, first, 3, padding=1), nn.SiLU(), nn.Identity(),
                         Conv2d(first, second, 3, stride=2, padding=1), nn.SiLU(),
                         Conv2d(second, cout, 3, stride=2, padding=1))

    def forward(self, x, size):
        """x (n,c,h,w) -> (n,cout,size[0] / 4,size[1] / 4)."""
        x = F.adaptive_avg_pool2d(self[1](self[0](x)), size)  # in place of self[2], which has no weights
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
            return self.fn.to_out(attend(*self.fn.to_qkv(self.norm(x)).chunk(3, dim=-1), self.heads))

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
    """HiGen: a few learned queries read the text, twice a block, and stand in for its tokens."""

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


# VideoComposer's maps: argument -> channels (their values: sample.read_maps)
MAPS = {"depth": 1, "sketch": 1, "single_sketch": 1, "canny": 1, "motion": 2, "local_image": 3, "masked": 4}


def after_name(name):
    """A map's second encoder, by its published name."""
    return f"{'mask' if name == 'masked' else name}_embedding_after"


# ---- UNet3D

@dataclass(frozen=True)
class UNetConfig:
    """Defaults: ModelScope T2V (text2video_pytorch_model.pth, model_scope_v1-4/v1-5), 1,411 M parameters."""
    in_dim: int = 4
    out_dim: int = 4
    dim: int = 320
    dim_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple = (1.0, 0.5, 0.25)  # levels with transformers, as fractions of the latent size
    head_dim: int = 64
    num_heads: int = 8                     # of the first temporal transformer; elsewhere channels / head_dim
    context_dim: int = 1024
    dropout: float = 0.1
    use_fps_condition: bool = False        # frame rate in the time embedding
    default_fps: int = 0                   # used where no fps is given; 0: then none is added
    # VideoCrafter1 and 2
    spatial_dropout: float | None = None   # of the ResBlocks' 2-D half, if it differs from dropout
    temporal_linear: bool = False          # Linear, not Conv1d, around all temporal blocks but the first
    temporal_conv: bool = True
    relative_position: int = 0             # span of relative frame positions
    image_keys: bool = False               # spatial transformers attend to image tokens apart
    # T2V-Turbo
    guidance_dim: int = 0                  # width of the guidance embedding
    motion_guidance_dim: int = 0           # of a second such input
    # I2VGen-XL
    image_to_video: bool = False           # latent of the first frame and its CLIP embedding
    # SR600
    super_resolution: bool = False         # padding (2, 1), rows cropped, damped skip connections
    # DEMO
    motion_blocks: bool = False
    # DreamVideo: (layer, position) pairs, see TransformerBlock
    spatial_adapters: tuple = ()
    spatial_adapter_dim: int = 0           # 0: half the width
    temporal_adapters: tuple = ()
    temporal_adapter_dim: int = 0
    adapter_image_dim: int = 0             # the temporal adapters see a CLIP embedding of this width
    # HiGen
    text_resampler: int = 0                # depth; also brings the motion, appearance and image factors
    # TF-T2V, VideoComposer, VideoLCM
    concat_dim: int = 0                    # channels beside the latents, the sum of all maps' encodings
    maps: tuple = ()                       # of MAPS
    style_image: bool = False              # tokens from a CLIP image embedding
    histogram: bool = False                # a token a frame from a colour histogram of 156 numbers
    map_encoder_depth: int = 1
    num_tokens: int = 4                    # of an image (I2VGen-XL, VideoComposer); of HiGen's text (16)
    # the tiny world's options (no public base has them)
    frame_pos: int = 0                     # learned positions of this many frames, in the time embedding
    spatial_pos: int = 0                   # learned map after the first convolution, latent pixels a side
    pooled_text: bool = False              # mean text token in the time embedding


def misfit(cfg, f, h, w):
    """What is wrong with f frames of h x w latents for this UNet, in words; None if they fit."""
    factor = 2 ** (len(cfg.dim_mult) - 1)
    if cfg.super_resolution:
        rows = h
        for _ in cfg.dim_mult[1:]:  # each level halves and adds one; only the lowest may be odd
            if rows % 2 or w % factor:
                return (f"latent size {h}x{w}: this super-resolution UNet needs a width that is a multiple "
                        f"of {factor} and an even height on every level")
            rows = rows // 2 + 1
    elif h % factor or w % factor:
        return f"latent size {h}x{w}: height and width must be multiples of {factor} for this UNet"
    if cfg.frame_pos and f > cfg.frame_pos:
        return f"{f} frames: this base has learned positions for at most {cfg.frame_pos} frames"
    if cfg.spatial_pos and max(h, w) > cfg.spatial_pos:
        return f"latent size {h}x{w}: this base has learned positions for {cfg.spatial_pos} pixels a side"
    return None


class UNet3D(nn.Module):
    """The VGen family's UNet; ModelScope T2V by default."""

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
                        adapter_dim=cfg.temporal_adapter_dim, adapter_image_dim=cfg.adapter_image_dim)

        def entry(cin, cout, attention):
            """A list of encoder or decoder: a ResBlock, then a spatial and a temporal transformer or none."""
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
                self.input_blocks.append(Downsample(channels, (2, 1) if cfg.super_resolution else 1))
                skips.append(channels)
                scale /= 2

        self.middle_block = entry(channels, channels, True)
        self.middle_block.append(ResBlock(channels, channels, emb_dim, **res))

        # decoder: per level num_res_blocks + 1 entries, an Upsample at the end of the last one
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(cfg.num_res_blocks + 1):
                self.output_blocks.append(entry(channels + skips.pop(), width, scale in cfg.attn_scales))
                channels = width
            if level > 0:
                self.output_blocks[-1].append(Upsample(channels, crop=cfg.super_resolution))
                scale *= 2

        conv_out = Conv2d(channels, cfg.out_dim, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), conv_out)
        nn.init.zeros_(conv_out.weight)  # the weight only, as published

    def build_conditions(self, dim, emb_dim):
        """Everything around the UNet proper, option by option."""
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
            wave = sinusoidal(torch.arange(n), dim // 2).T  # dim/2 positions
            rows, columns = wave[:, :, None].expand(-1, n, n), wave[:, None, :].expand(-1, n, n)
            self.spatial_pos = nn.Parameter(0.5 * torch.cat([rows, columns]))
        if cfg.pooled_text:
            self.pooled_text = nn.Linear(cfg.context_dim, emb_dim)

    def blocks(self):
        """The modules to shard and to recompute one by one."""
        kinds = (ResBlock, SpatialTransformer, TemporalTransformer, Downsample, Upsample)
        return [m for m in self.modules() if isinstance(m, kinds)]

    def embed(self, t, text, f, fps=None, guidance=None, motion_guidance=None, motion_factor=None,
              appearance_factor=None):
        """-> (b f) e: embedding of the step, and of what else each ResBlock adds."""
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
        if cfg.pooled_text:  # before the non-linearity, so that step, words and frame number can combine
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
        """Text, then the tokens of images: what the spatial transformers attend to, b n d or (b f) n d."""
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
        """-> (b f) c h w: the channels that join the noisy latents at the first convolution, or None."""
        cfg, (b, _, f, h, w) = self.cfg, x.shape
        if cfg.image_to_video:
            # the image at frame 0, then planes that tell how far through the clip a frame is
            k = torch.arange(1, f, device=x.device, dtype=x.dtype) / max(f - 1, 1)
            planes = repeat(k, "f -> b c f h w", b=b, c=cfg.in_dim, h=h, w=w)
            clip = torch.cat([first_frame[:, :, None], planes], dim=2)
            clip = self.local_image_concat(rearrange(clip, "b c f h w -> (b f) c h w"))
            # twice, as published: the public weights were trained so (diffusers' port adds it once)
            return 2 * self.local_temporal_encoder(clip, f)
        total = x.new_zeros(b * f, cfg.concat_dim, h, w)
        for name, value in (maps or {}).items():
            if value is not None:
                keep = (map_keep or {}).get(name, x.new_ones(b)).repeat_interleave(f).view(-1, 1, 1, 1)
                total = total + keep * self.encode_map(name, value, (4 * h, 4 * w))
        return total

    def encode_map(self, name, value, size):
        """A map (b,c,f,8h,8w) of MAPS, encoded -> (b f) concat_dim h w; size (4h, 4w)."""
        if name not in self.cfg.maps:
            raise UserError(f"condition {name}: this base has no encoder for it; "
                            f"it has {', '.join(self.cfg.maps) or 'none'}")
        after = getattr(self, after_name(name))
        frames = rearrange(value, "b c f h w -> (b f) c h w")
        return after(getattr(self, f"{name}_embedding")(frames, size), value.shape[2])

    def forward(self, x: Tensor, t: Tensor, text: Tensor, fps=None, guidance=None, motion_guidance=None,
                image=None, first_frame=None, motion_text=None, eot=None, appearance=None, strength=1.0,
                image_prior=None, motion_factor=None, appearance_factor=None, histogram=None, map_keep=None,
                **maps) -> Tensor:
        """x (b,c,f,h,w) noisy latents, t (b,) step 0..999, text (b,n,d) -> prediction like x.

        Conditions, each for the bases that know it:
        fps (b,); guidance, motion_guidance (b,...): guidance_embedding of scales (T2V-Turbo);
        image: CLIP embedding (b,1,d) (I2VGen-XL, VideoComposer's style), tokens (b,k,d) (VideoCrafter1);
        first_frame (b,c,h,w): latent of the first frame (I2VGen-XL);
        motion_text (b,n,d) (DEMO), eot (b,): answer with (prediction, [map (b,h,w,f) of each motion block]);
        appearance (b,1 or f,d), strength, a number or (b,) (DreamVideo);
        image_prior (b,c,h,w), motion_factor (b,) or (b,f-1), appearance_factor (b,f,32) (HiGen);
        histogram (b,f,156), `maps` of MAPS (b,c,f,8h,8w), map_keep {name: (b,): 0 drops} (VideoComposer).
        """
        cfg, (f, h, w) = self.cfg, x.shape[2:]
        if fault := misfit(cfg, f, h, w):
            raise UserError(fault)
        if appearance is not None:
            appearance = appearance.expand(-1, f, -1)
            strength = strength.view(-1, 1, 1) if isinstance(strength, Tensor) else strength
        if maps and not cfg.concat_dim:
            raise UserError(f"condition {next(iter(maps))}: unknown to this base")
        c = Context(
            f, self.embed(t, text, f, fps, guidance, motion_guidance, motion_factor, appearance_factor),
            self.tokens(text, f, first_frame, image, histogram), image if cfg.image_keys else None,
            motion_text, eot, appearance, strength, temporal=not (cfg.text_resampler and f == 1))
        eot_maps = []

        def run(layer, x):
            if self.grad_ckpt and torch.is_grad_enabled():
                # non-reentrant: the other kind loses the graph when no input needs a gradient (LoRA)
                x = checkpoint(layer, x, c, use_reentrant=False)
            else:
                x = layer(x, c)
            if isinstance(x, tuple):  # a motion block asked for its map; a result, so that it keeps its graph
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
        x = rearrange(self.out(x), "(b f) c h w -> b c f h w", f=f).contiguous()  # FSDP2 warns of views
        return (x, eot_maps) if eot is not None else x


def fourier_filter(x, threshold, scale):
    """Scale the lowest frequencies, a window of 2 threshold x 2 threshold around 0, of x (n,c,h,w)."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.float()), dim=(-2, -1))
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    gain = torch.ones(x.shape[-2:], device=x.device)
    gain[h - threshold:h + threshold, w - threshold:w + threshold] = scale
    back = torch.fft.ifft2(torch.fft.ifftshift(spectrum * gain, dim=(-2, -1)))
    return back.real.to(x.dtype)


def damp_skip(x, skip, up, down):
    """FreeU (arXiv 2309.11497), always on in SR600: half of x up, low frequencies of the skip down."""
    half = x.shape[1] // 2
    return torch.cat([x[:, :half] * up, x[:, half:]], dim=1), fourier_filter(skip, 1, down)


# ---- other names of the same weights

def videocrafter_name(key):
    """Key of UNet3D -> VideoCrafter's (without `model.diffusion_model.`)."""
    if key.startswith("input_blocks.0.1."):
        return key.replace("input_blocks.0.1.", "init_attn.0.", 1)
    return re.sub(r"^(input_blocks\.\d+)\.op\.", r"\1.0.op.", key)


def demo_source(key, net):
    """Key of a UNet3D with motion blocks -> the ModelScope key it starts from (DEMO's initialisation).

    A motion block starts as a copy of the spatial transformer before it; what follows moves up by one place.
    """
    found = re.match(r"(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.(\d+)\.(.+)", key)
    if not found:
        return key
    entry, place, rest = found[1], int(found[2]), found[3]
    if place >= 2 and any(isinstance(m, MotionBlock) for m in net.get_submodule(entry)):
        return f"{entry}.{place - 1}.{rest}"
    return key


I2VGEN_DIFFUSERS = {
    "local_image_concat.": "image_latents_proj_in.",
    "local_image_embedding.": "image_latents_context_embedding.",
    "local_temporal_encoder.layers.0.0.norm.": "image_latents_temporal_encoder.norm1.",
    "local_temporal_encoder.layers.0.0.fn.": "image_latents_temporal_encoder.attn1.",  # to_qkv: see bases.py
    "local_temporal_encoder.layers.0.1.net.0.0.": "image_latents_temporal_encoder.ff.net.0.proj.",
    "local_temporal_encoder.layers.0.1.net.2.": "image_latents_temporal_encoder.ff.net.2."}


def unet_diffusers_name(key, num_res_blocks=2):
    """Public key of UNet3D -> the same tensor's in diffusers' UNet3DConditionModel or I2VGenXLUNet."""
    for ours, theirs in I2VGEN_DIFFUSERS.items():
        if key.startswith(ours):
            return key.replace(ours, theirs, 1)
    part, _, rest = key.partition(".")
    if part == "time_embed":
        return rest.replace("0.", "time_embedding.linear_1.", 1).replace("2.", "time_embedding.linear_2.", 1)
    if part == "out":
        return rest.replace("0.", "conv_norm_out.", 1).replace("2.", "conv_out.", 1)
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


# ---- LoRA: W x + (alpha / rank) B A x, on Linear and convolution layers

def add_lora(net, rank, alpha, targets):
    """Freeze `net`, give each layer whose name ends in one of `targets` a LoRA branch. -> their names.

    The branch of layer `key` holds `key.lora_A.weight` and `key.lora_B.weight`, trained in fp32; B starts at
    zero. On a convolution A has its kernel, stride and padding, B is 1x1 (as T2V-Turbo's). A rank above a
    layer's width is cut to it.
    """
    net.requires_grad_(False)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = {n: m for n, m in net.named_modules()
              if isinstance(m, kinds) and any(f".{n}".endswith(f".{target}") for target in targets)}
    unused = [target for target in targets if not any(f".{n}".endswith(f".{target}") for n in layers)]
    if unused:
        raise UserError(f"--lora-targets {unused[0]}: no layer of the network has a name ending so "
                        "(try to_q to_k to_v to_out.0 net.2)")
    for layer in layers.values():
        new = dict(bias=False, device=layer.weight.device, dtype=torch.float32)  # trained tensors stay fp32
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
    """While it lasts LoRA branches count `strength` times. Recomputed blocks must be run outside of it."""
    layers = [m for m in net.modules() if hasattr(m, "lora_scale")]
    scales = [layer.lora_scale for layer in layers]
    try:
        for layer, scale in zip(layers, scales):
            layer.lora_scale = strength * scale
        yield
    finally:
        for layer, scale in zip(layers, scales):
            layer.lora_scale = scale


def frozen_copy(net, dtype, mode, device, offload=False):
    """What a network is before all its weights are trained, sharded with fsdp.

    dtype: of the layers whose weights autocast would cast anyway; norms and tables keep theirs, so that
    under autocast the copy computes exactly what `net` does. None: all keep theirs.
    """
    frozen = copy.deepcopy(net).eval().requires_grad_(False)
    for module in frozen.modules() if dtype else ():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            module.to(dtype)
    return parallelize(frozen, mode, device, offload) if mode == "fsdp" else frozen


def without_lora(net):
    """-> fn, called as `net` is: the network as it was before LoRA was trained, DPO's reference."""
    def reference(*args, **cond):
        with lora_strength(net, 0.0):
            return net(*args, **cond)
    return reference


@torch.no_grad()
def merge_lora(net):
    """Fold every LoRA branch into its weight, W += (alpha / rank) B A, and remove it."""
    for layer in list(net.modules()):
        if hasattr(layer, "lora_A"):
            delta = layer.lora_scale * layer.lora_B.weight.flatten(1) @ layer.lora_A.weight.flatten(1)
            layer.weight += delta.view_as(layer.weight).to(layer.weight.dtype)
            layer.lora_hook.remove()
            del layer.lora_A, layer.lora_B, layer.lora_scale, layer.lora_hook


# ---- the public LoRA files

def instructvideo_lora_name(key):
    """Our LoRA key -> InstructVideo's:  attn1.to_out.0.lora_A -> attn1.to_out_lora.down_linear."""
    key = key.replace(".lora_A.", "_lora.down_linear.").replace(".lora_B.", "_lora.up_linear.")
    return key.replace("to_out.0_lora", "to_out_lora")


def turbo_lora_layers(net):
    """Layers of T2V-Turbo's name-less LoRA list, in its order: entry 2 i is layer i's B, entry 2 i + 1 its A.

    They are all Linear, Conv2d and Conv3d layers as VideoCrafter registers them: the first temporal
    transformer (our input_blocks.0.1) after the encoder.
    """
    names = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    moved = [n for n in names if n.startswith("input_blocks.0.1.")]
    rest = [n for n in names if n not in moved]
    at = 1 + max(i for i, n in enumerate(rest) if n.startswith("input_blocks."))
    return rest[:at] + moved + rest[at:]


# ---- many GPUs

def parallelize(net, mode, device, offload=False, reshard=True, unused=False):
    """Wrap a network for data parallel training; call the returned network in rollouts and losses.

    mode: "ddp" (a full copy on each GPU) or "fsdp" (FSDP2: block by block, then the rest; frozen weights may
    be of another type than trained ones). offload: FSDP's shards, their gradients and the optimizer's state
    stay in CPU memory. reshard False: ZeRO-2. unused: a step may leave parts of the network out. A single
    process without FSDP gets its network back as it is.
    """
    if not torch.distributed.is_initialized():
        return net
    if mode == "fsdp":
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
        policy = {} if reshard else {"reshard_after_forward": False}
        policy |= dict(offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda")) if offload else {}
        for block in net.blocks():
            fully_shard(block, **policy)
        return fully_shard(net, **policy)
    more = dict(broadcast_buffers=False, find_unused_parameters=unused)
    return nn.parallel.DistributedDataParallel(net, [device.index] if device.type == "cuda" else None, **more)


def sync_gradients(net, on):
    """Context: with on=False gradients add up on each process, the next backward with on=True averages."""
    if isinstance(net, nn.parallel.DistributedDataParallel):
        return nullcontext() if on else net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):  # FSDP2
        net.set_requires_gradient_sync(on)
    return nullcontext()
