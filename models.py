"""Networks: UNet3D, the VGen family's 3-D UNet (ModelScope T2V, arXiv 2308.06571), LoRA and parallelize().

One network, options in a frozen dataclass whose defaults are the public ModelScope T2V checkpoint; an option
that is off adds no keys and costs nothing. Parameter names are the public checkpoint's, misspellings included
(`temopral_conv`). Videos and latents are `b c f h w`; inside the UNet images travel as `(b f) c h w`,
sample-major.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import UserError


# ---- parts shared by every network

def sinusoidal(t, dim):
    """t (b,) -> (b, dim) float32: cosines, then sines, frequencies 10000^(-k / half) for k = 0..half-1."""
    half = dim // 2
    freq = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angle = t.float()[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def zero_init(module):
    """Zero weights and bias of a residual branch's last layer: the branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class Attention(nn.Module):
    """Multi-head attention, the only one in the UNet: project, split heads, SDPA, merge."""

    def __init__(self, dim, heads, head_dim, context_dim=None):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim))  # key `to_out.0` as published

    def forward(self, x, context=None):
        """x (n, l, d), context (n, m, e) or None for self-attention -> (n, l, d)."""
        context = x if context is None else context
        q, k, v = (rearrange(y, "n l (a d) -> n a l d", a=self.heads)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "n a l d -> n l (a d)"))


class GEGLU(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        # `net.1` is the published file's dropout of rate 0: it holds no weights but keeps the index
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """x += attn1(x); x += attn2(x, text); x += ff(x). Without a text, attn2 is a second self-attention."""

    def __init__(self, dim, heads, head_dim, context_dim=None):
        super().__init__()
        self.attn1 = Attention(dim, heads, head_dim)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, heads, head_dim, context_dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, text=None):
        """x (n, l, d); text (b, m, e) with n = b f: each frame of a sample attends to the same text."""
        x = x + self.attn1(self.norm1(x))
        if text is None:
            x = x + self.attn2(self.norm2(x))
        else:
            # cross-attention treats each query alone, so the f frames of a sample can be one long sequence of
            # queries: keys and values of the text are computed once per video, not once per frame
            n, length, d = x.shape
            joined = self.norm2(x).reshape(len(text), -1, d)  # b (f l) d
            x = x + self.attn2(joined, text).reshape(n, length, d)
        return x + self.ff(self.norm3(x))


# ---- UNet blocks: every one is called as block(x, emb, text, f), x (b f) c h w, emb (b f) e, text b n d

class Conv1x1(nn.Conv1d):
    """A Conv1d of kernel 1, stored as in the public files (weight [out, in, 1]), on channels-last tokens."""

    def forward(self, x):
        return F.linear(x, self.weight[..., 0], self.bias)


class SpatialTransformer(nn.Module):
    """Attention within each frame and to the text."""

    def __init__(self, channels, heads, head_dim, context_dim):
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, heads, head_dim, context_dim)])
        self.proj_out = zero_init(nn.Linear(inner, channels))

    def forward(self, x, emb, text, f):
        h = self.proj_in(rearrange(self.norm(x), "n c h w -> n (h w) c"))
        h = self.proj_out(self.transformer_blocks[0](h, text))
        return x + rearrange(h, "n (h w) c -> n c h w", h=x.shape[2])


class TemporalTransformer(nn.Module):
    """Attention over the frames, at each pixel: self-attention twice, no positions, no mask."""

    def __init__(self, channels, heads, head_dim):
        super().__init__()
        inner = heads * head_dim
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = Conv1x1(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, heads, head_dim)])
        self.proj_out = zero_init(Conv1x1(inner, channels, 1))

    def forward(self, x, emb, text, f):
        video = rearrange(x, "(b f) c h w -> b c f h w", f=f)
        h = rearrange(self.norm(video), "b c f h w -> (b h w) f c")  # statistics over frames and pixels
        h = self.proj_out(self.transformer_blocks[0](self.proj_in(h)))
        return x + rearrange(h, "(b h w) f c -> (b f) c h w", h=x.shape[2], w=x.shape[3])


class TemporalConv(nn.Module):
    """Four (3,1,1) convolutions over the frames, residual."""

    def __init__(self, channels, dropout):
        super().__init__()
        def layer(*drop):
            return nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), *drop,
                                 nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)))
        self.conv1 = layer()  # conv1 has no dropout: its convolution is `conv1.2`, the others' `.3`
        self.conv2, self.conv3, self.conv4 = (layer(nn.Dropout(dropout)) for _ in range(3))
        zero_init(self.conv4[-1])

    def forward(self, x, f):
        h = rearrange(x, "(b f) c h w -> b c f h w", f=f)
        h = self.conv4(self.conv3(self.conv2(self.conv1(h))))
        return x + rearrange(h, "b c f h w -> (b f) c h w")


class ResBlock(nn.Module):
    """Convolutions within each frame, shifted by the time embedding, then a TemporalConv."""

    def __init__(self, cin, cout, emb_dim, dropout):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, cout))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, cout), nn.SiLU(), nn.Dropout(dropout),
                                        zero_init(nn.Conv2d(cout, cout, 3, padding=1)))
        self.skip_connection = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)
        self.temopral_conv = TemporalConv(cout, dropout)  # key name as published

    def forward(self, x, emb, text, f):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        x = self.skip_connection(x) + self.out_layers(h)
        return self.temopral_conv(x, f)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, emb, text, f):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, emb, text, f):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


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
    use_fps_condition: bool = False
    # the tiny world's options (no public base has them)
    frame_pos: int = 0                     # learned positions of this many frames, in the time embedding
    spatial_pos: int = 0                   # learned map after the first convolution, latent pixels a side
    pooled_text: bool = False              # mean text token in the time embedding


class UNet3D(nn.Module):
    """The VGen family's UNet; ModelScope T2V by default."""

    def __init__(self, cfg=UNetConfig()):
        super().__init__()
        self.cfg = cfg
        self.grad_ckpt = False  # recompute each block in the backward pass
        dim, emb_dim = cfg.dim, 4 * cfg.dim
        widths = [dim * m for m in cfg.dim_mult]

        def mlp():
            return nn.Sequential(nn.Linear(dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.time_embed = mlp()
        if cfg.use_fps_condition:
            self.fps_embedding = mlp()
            zero_init(self.fps_embedding[-1])
        if cfg.frame_pos:
            self.frame_pos = nn.Parameter(0.5 * sinusoidal(torch.arange(cfg.frame_pos), emb_dim))
        if cfg.spatial_pos:  # starts as sines and cosines of the row and of the column
            n = cfg.spatial_pos
            wave = sinusoidal(torch.arange(n), dim // 2).T  # dim/2 positions
            rows, columns = wave[:, :, None].expand(-1, n, n), wave[:, None, :].expand(-1, n, n)
            self.spatial_pos = nn.Parameter(0.5 * torch.cat([rows, columns]))
        if cfg.pooled_text:
            self.pooled_text = nn.Linear(cfg.context_dim, emb_dim)

        def entry(cin, cout, attention):
            """A list of encoder or decoder: a ResBlock, then a spatial and a temporal transformer or none."""
            layers = [ResBlock(cin, cout, emb_dim, cfg.dropout)]
            if attention:
                heads = cout // cfg.head_dim
                layers += [SpatialTransformer(cout, heads, cfg.head_dim, cfg.context_dim),
                           TemporalTransformer(cout, heads, cfg.head_dim)]
            return nn.ModuleList(layers)

        # encoder: per level num_res_blocks entries, then a Downsample unless it is the last
        conv_in = nn.Conv2d(cfg.in_dim, dim, 3, padding=1)
        temporal_in = TemporalTransformer(dim, cfg.num_heads, cfg.head_dim)
        self.input_blocks = nn.ModuleList([nn.ModuleList([conv_in, temporal_in])])
        skips, channels, scale = [dim], dim, 1.0
        for level, width in enumerate(widths):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(entry(channels, width, scale in cfg.attn_scales))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(Downsample(channels))  # bare in the list: key `input_blocks.3.op`
                skips.append(channels)
                scale /= 2

        self.middle_block = entry(channels, channels, True)
        self.middle_block.append(ResBlock(channels, channels, emb_dim, cfg.dropout))

        # decoder: per level num_res_blocks + 1 entries, an Upsample at the end of the last one
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(cfg.num_res_blocks + 1):
                self.output_blocks.append(entry(channels + skips.pop(), width, scale in cfg.attn_scales))
                channels = width
            if level > 0:
                self.output_blocks[-1].append(Upsample(channels))
                scale *= 2

        conv_out = nn.Conv2d(channels, cfg.out_dim, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), conv_out)
        nn.init.zeros_(conv_out.weight)  # the weight only, as published

    def blocks(self):
        """The modules to shard and to recompute one by one."""
        kinds = (ResBlock, SpatialTransformer, TemporalTransformer, Downsample, Upsample)
        return [m for m in self.modules() if isinstance(m, kinds)]

    def embed(self, t, text, f, fps):
        """-> (b f) e: embedding of the step (and of fps, text, frame number) that each ResBlock adds."""
        first, act, last = self.time_embed
        dtype = first.weight.dtype
        e = first(sinusoidal(t, self.cfg.dim).to(dtype))[:, None]  # b 1 e
        if self.cfg.pooled_text:  # before the non-linearity, so that step, words and frame number can combine
            e = e + self.pooled_text(text.mean(1))[:, None]
        if self.cfg.frame_pos:
            e = e + self.frame_pos[:f]
        e = last(act(e))
        if self.cfg.use_fps_condition and fps is not None:
            e = e + self.fps_embedding(sinusoidal(fps, self.cfg.dim).to(dtype))[:, None]
        return e.expand(-1, f, -1).reshape(len(t) * f, -1)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, fps: Tensor | None = None) -> Tensor:
        """x (b,c,f,h,w) noisy latents, t (b,) step 0..999, text (b,n,d), fps (b,) -> prediction like x."""
        b, _, f, h, w = x.shape
        factor = 2 ** (len(self.cfg.dim_mult) - 1)
        if h % factor or w % factor:
            raise UserError(
                f"latent size {h}x{w}: height and width must be multiples of {factor} for this UNet")
        if self.cfg.frame_pos and f > self.cfg.frame_pos:
            raise UserError(
                f"{f} frames: this base has learned positions for at most {self.cfg.frame_pos} frames")
        if self.cfg.spatial_pos and max(h, w) > self.cfg.spatial_pos:
            raise UserError(f"latent size {h}x{w}: this base has learned positions for "
                            f"{self.cfg.spatial_pos} pixels a side")
        emb = self.embed(t, text, f, fps)

        def run(layer, x):
            if self.grad_ckpt and torch.is_grad_enabled():
                # non-reentrant: the other kind loses the graph when no input needs a gradient (LoRA)
                return checkpoint(layer, x, emb, text, f, use_reentrant=False)
            return layer(x, emb, text, f)

        conv_in, temporal_in = self.input_blocks[0]
        x = conv_in(rearrange(x, "b c f h w -> (b f) c h w"))
        if self.cfg.spatial_pos:
            x = x + self.spatial_pos[:, :h, :w]
        x = run(temporal_in, x)
        skips = [x]
        for entry in list(self.input_blocks)[1:]:
            for layer in entry if isinstance(entry, nn.ModuleList) else [entry]:
                x = run(layer, x)
            skips.append(x)
        for layer in self.middle_block:
            x = run(layer, x)
        for entry in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in entry:
                x = run(layer, x)
        return rearrange(self.out(x), "(b f) c h w -> b c f h w", f=f)


def unet_diffusers_name(key, num_res_blocks=2):
    """Public key of UNet3D -> the name of the same tensor in diffusers' UNet3DConditionModel."""
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


# ---- LoRA: W x + (alpha / rank) B A x, on Linear layers

class LoRALinear(nn.Linear):
    """A frozen Linear (same keys) and a trained low-rank branch, keys `lora_A.weight` and `lora_B.weight`."""

    def __init__(self, base, rank, alpha):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        new = dict(bias=False, device=base.weight.device, dtype=torch.float32)  # trained tensors stay fp32
        self.lora_A = nn.Linear(base.in_features, rank, **new)  # init: kaiming_uniform(a=sqrt 5), as in peft
        self.lora_B = nn.Linear(rank, base.out_features, **new)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(x))


def add_lora(net, rank, alpha, targets):
    """Freeze `net`, give each Linear whose name ends in one of `targets` a LoRA branch. -> their names."""
    net.requires_grad_(False)
    names = [n for n, m in net.named_modules()
             if isinstance(m, nn.Linear) and any(f".{n}".endswith(f".{target}") for target in targets)]
    unused = [target for target in targets if not any(f".{n}".endswith(f".{target}") for n in names)]
    if unused:
        raise UserError(f"--lora-targets {unused[0]}: no Linear layer of the network has a name ending so "
                        "(try to_q to_k to_v to_out.0 net.2)")
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parent = net.get_submodule(parent)
        setattr(parent, leaf, LoRALinear(getattr(parent, leaf), rank, alpha))
    return names


@torch.no_grad()
def merge_lora(net):
    """Fold every LoRA branch into its weight, W += (alpha / rank) B A, and leave plain Linears."""
    for name, m in list(net.named_modules()):
        if isinstance(m, LoRALinear):
            m.weight += (m.scale * m.lora_B.weight @ m.lora_A.weight).to(m.weight.dtype)
            plain = nn.Linear(m.in_features, m.out_features, m.bias is not None, device="meta")
            plain.weight, plain.bias = m.weight, m.bias
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, plain)


# ---- many GPUs

def parallelize(net, mode, device):
    """Wrap a network for data parallel training; call the returned network in rollouts and losses.

    mode: "ddp" (a full copy on each GPU) or "fsdp" (FSDP2, parameters sharded). With one process the network
    comes back as it is.
    """
    if not torch.distributed.is_initialized():
        return net
    if mode == "fsdp":
        from torch.distributed.fsdp import fully_shard
        for block in net.blocks():
            fully_shard(block)
        return fully_shard(net)
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)


def sync_gradients(net, on):
    """Context: with on=False gradients add up on each process, the next backward with on=True averages."""
    if isinstance(net, nn.parallel.DistributedDataParallel):
        return nullcontext() if on else net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):  # FSDP2
        net.set_requires_gradient_sync(on)
    return nullcontext()
