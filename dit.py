"""Video transformers: Open-Sora 1.2's STDiT3, CogVideoX with Diffusion as Shader's branch, Wan.

CogVideoX (arXiv 2408.06072) makes video from text or from an image; the branch of Diffusion as
Shader (2501.03847), which follows a tracking video, is an option. Wan (2503.20314) is one class
for all sizes of Wan2.1 and Wan2.2, from text or from images. Parameter names are those of the
public checkpoints. Videos and latents are `b c f h w`. Inside, tokens are `b f s d` (STDiT3; s
counts the patches of a frame), one sequence of text and video (CogVideoX) or `b k m d` (Wan; the m
tokens of a group have one timestep).
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common import UserError
from models import (
    GELU, FeedForward, attend, feed_forward, lean, rotate, run_block, sinusoidal, tanh_gelu,
    zero_init)
from weights import below, rename


def init_linears(net):
    """Xavier's weights and biases of zero for all linear layers: where STDiT3 and Wan start."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


# ---- STDiT3: Open-Sora 1.2's transformer over space and time (github.com/hpcaitech/Open-Sora)

@dataclass(frozen=True)
class STDiT3Config:
    """Defaults: STDiT3-XL/2 (hpcai-tech/OpenSora-STDiT-v3), 1,209 M parameters."""
    in_dim: int = 4
    dim: int = 1152
    depth: int = 28           # pairs of a spatial and a temporal block
    num_heads: int = 16
    context_dim: int = 4096   # of the T5 tokens
    text_length: int = 300    # tokens of the null caption


def modulate(x, shift, scale):
    """LayerNorm without weights, then x (1 + scale) + shift (adaLN, 2212.09748); all (b,f,s,d)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def rope_frequencies(dim, device=None):
    """Angle per step of each pair of channels, (dim / 2,) float32, in a rotary embedding of dim."""
    return 10000 ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


class MLP(nn.Module):
    def __init__(self, cin, inner, cout):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(cin, inner), nn.Linear(inner, cout)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in float32, whatever the types of weights and x."""

    def forward(self, x):
        y = F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return y.to(x.dtype)


class STDiT3SelfAttention(nn.Module):
    """q and k are normalised head by head, and rotated to their positions if it runs over time."""

    def __init__(self, dim, heads, temporal):
        super().__init__()
        self.heads, self.temporal = heads, temporal
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (RMSNorm(dim // heads, eps=1e-6) for _ in range(2))

    def forward(self, x):
        """x (n,l,d) -> (n,l,d)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = (y.unflatten(-1, (self.heads, -1)) for y in (q, k))  # n l a d
        q, k = self.q_norm(q), self.k_norm(k)
        if self.temporal:
            # the frequencies are not read from the file's `rope.freqs`, which bf16 would ruin
            steps = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
            angle = torch.outer(steps, rope_frequencies(q.shape[-1], x.device))  # l d/2
            q, k = (rotate(y, angle.cos(), angle.sin()) for y in (q, k))
        return self.proj(attend(q.flatten(2), k.flatten(2), v, self.heads))


class STDiT3CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, text, mask):
        """x (n,l,d), text (n,m,d), mask (n,m) or None -> (n,l,d)."""
        k, v = self.kv_linear(text).chunk(2, dim=-1)
        return self.proj(attend(self.q_linear(x), k, v, self.heads, mask))


class STDiT3Block(nn.Module):
    """Self-attention within a frame or over the frames, cross-attention to the text, MLP."""

    def __init__(self, dim, heads, temporal):
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim ** 0.5)
        self.attn = STDiT3SelfAttention(dim, heads, temporal)
        self.cross_attn = STDiT3CrossAttention(dim, heads)
        self.mlp = MLP(dim, 4 * dim, dim)

    def forward(self, x, text, text_mask, emb):
        """x (b,f,s,d), text (b,n,d), text_mask (b,n) or None, emb (b,1 or f,6,d) -> like x."""
        _, f, s, _ = x.shape
        table = (self.scale_shift_table + emb).unsqueeze(3)  # b f 6 1 d
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table.unbind(2)
        h = modulate(x, shift_a, scale_a)
        if self.temporal:
            h = self.attn(rearrange(h, "b f s d -> (b s) f d"))
            h = rearrange(h, "(b s) f d -> b f s d", s=s)
        else:
            h = self.attn(rearrange(h, "b f s d -> (b f) s d"))
            h = rearrange(h, "(b f) s d -> b f s d", f=f)
        x = torch.addcmul(x, gate_a, h)
        # no norm and no gate here, as published; a video is one sequence of queries, so that the
        # keys of the text are computed once
        x = x + self.cross_attn(x.flatten(1, 2), text, text_mask).unflatten(1, (f, s))
        return torch.addcmul(x, gate_m, self.mlp(modulate(x, shift_m, scale_m)))


class STDiT3FinalLayer(nn.Module):
    def __init__(self, dim, cout):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim ** 0.5)
        self.linear = nn.Linear(dim, cout)

    def forward(self, x, emb, clean, frame_mask):
        """x (b,f,s,d); emb, clean (b,1,d): embeddings of the step and of step 0 -> (b,f,s,cout)."""
        def head(x, emb):
            table = (self.scale_shift_table + emb.unsqueeze(2)).unsqueeze(3)  # b 1 2 1 d
            return modulate(x, *table.unbind(2))
        u = head(x, emb)
        if frame_mask is not None:
            # as published, clean frames are modulated a second time, not instead of the first
            u = torch.where(frame_mask[:, :, None, None], u, head(u, clean))
        return self.linear(u)


class STDiT3(nn.Module):
    """Open-Sora 1.2: pairs of a spatial and a temporal block, flow prediction, any size."""
    patch = 2  # a token is 2 x 2 latent pixels
    lora_targets = "qkv", "q_linear", "kv_linear", "proj"  # if --lora-targets is not given

    def __init__(self, cfg=STDiT3Config()):
        super().__init__()
        self.cfg = cfg
        self.grad_ckpt = False  # recompute each block in the backward pass
        dim, patch = cfg.dim, (1, self.patch, self.patch)

        def embedder():
            holder = nn.Module()
            holder.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
            return holder
        self.rope = nn.Module()  # a key of the public file that is not used
        self.rope.register_buffer("freqs", rope_frequencies(dim // cfg.num_heads))
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv3d(cfg.in_dim, dim, patch, stride=patch)
        self.t_embedder, self.fps_embedder = embedder(), embedder()
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = nn.Module()
        null = torch.randn(cfg.text_length, cfg.context_dim) / cfg.context_dim ** 0.5
        self.y_embedder.register_buffer("y_embedding", null)  # frozen, as published
        self.y_embedder.y_proj = MLP(cfg.context_dim, dim, dim)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(STDiT3Block(dim, cfg.num_heads, temporal) for _ in range(cfg.depth))
            for temporal in (False, True))
        self.final_layer = STDiT3FinalLayer(dim, self.patch ** 2 * 2 * cfg.in_dim)
        self.init_weights()

    def init_weights(self):
        init_linears(self)
        nn.init.normal_(self.fps_embedder.mlp[0].weight, std=0.02)
        zero_init(self.fps_embedder.mlp[2])
        for block in self.temporal_blocks:  # the network starts as an image model
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                zero_init(layer)

    def namings(self):
        """Functions from our keys to those of other public files."""
        return []

    def units(self):
        """The modules that FSDP shards, and --compile compiles, one by one."""
        return [*self.spatial_blocks, *self.temporal_blocks]

    def null_text(self, b):
        """(b,n,d): the learned caption that guidance puts in the text's place, under its mask."""
        return self.y_embedder.y_embedding.expand(b, -1, -1)

    def positions(self, rows, columns, pixels):
        """-> (rows columns, d) float32: sines and cosines of each token's column, then of its row.

        Positions are those in a square of as many tokens, and closer to each other where the clip
        is larger than 512x512: (index / scale) (side / number). pixels: the clip's height *
        width, a tensor.
        """
        side = round((rows * columns) ** 0.5)
        scale = pixels.float().sqrt() / 512

        def wave(n):
            p = torch.arange(n, device=pixels.device, dtype=torch.float32) / scale * (side / n)
            return sinusoidal(p, self.cfg.dim // 2).roll(self.cfg.dim // 4, -1)  # sines first
        column = wave(columns)[None].expand(rows, -1, -1)
        row = wave(rows)[:, None].expand(-1, columns, -1)
        return torch.cat([column, row], dim=-1).flatten(0, 1)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, *, fps, height, width, text_mask=None,
                frame_mask=None) -> Tensor:
        """x (b,c,f,h,w) latents, t (b,) real in 0..1000, text (b,n,d) -> noise - x0 like x.

        fps, height, width (b,): of the clip, in pixels; all samples must have the first one's
        size. text_mask (b,n): 1 for tokens that are seen; None: all. frame_mask (b,f): True or 1
        for noisy frames, False for clean ones (conditions), which are treated as being at t = 0;
        None: all noisy.
        """
        cfg, (h, w) = self.cfg, x.shape[3:]
        dtype, p = self.x_embedder.proj.weight.dtype, self.patch
        x = F.pad(x.to(dtype), (0, -w % p, 0, -h % p))
        rows, columns = x.shape[3] // p, x.shape[4] // p
        x = rearrange(self.x_embedder.proj(x), "b c f h w -> b f (h w) c")
        x = x + self.positions(rows, columns, height[0] * width[0]).to(x.dtype)

        def embed(t):
            e = self.t_embedder.mlp(sinusoidal(t, 256).to(dtype))
            return (e + self.fps_embedder.mlp(sinusoidal(fps, 256).to(dtype)))[:, None]  # b 1 d
        emb = per_frame = embed(t)
        clean = None
        if frame_mask is not None:
            frame_mask, clean = frame_mask.bool(), embed(torch.zeros_like(t))
            per_frame = torch.where(frame_mask[:, :, None], emb, clean)  # b f d
        six = self.t_block(per_frame).unflatten(-1, (6, cfg.dim))
        text = self.y_embedder.y_proj(text.to(dtype))
        text_mask = None if text_mask is None else text_mask.bool()

        for pair in zip(self.spatial_blocks, self.temporal_blocks):
            for block in pair:
                x = run_block(block, x, text, text_mask, six, recompute=self.grad_ckpt)
        x = self.final_layer(x, emb, clean, frame_mask)
        x = rearrange(x, "b f (h w) (p q c) -> b c f (h p) (w q)", h=rows, p=p, q=p)
        # the public weights answer x0 - noise, and as many channels again that nothing reads
        return -x[:, :cfg.in_dim, :, :h, :w]


def stdit3_state(state, net, source):
    """Public weights -> STDiT3's."""
    unused = {"rope.freqs": rope_frequencies(net.cfg.dim // net.cfg.num_heads)}  # not in every file
    return unused | state


# ---- CogVideoX (arXiv 2408.06072), with the tracks of Diffusion as Shader (arXiv 2501.03847)

@dataclass(frozen=True)
class CogVideoXConfig:
    """Defaults: CogVideoX-5B, text to video, 5,570 M parameters.

    2B: num_layers=30, heads=30, positions="sincos". 5B-I2V: in_channels=32,
    positions="rope+learned". Diffusion as Shader: 5B-I2V with tracking_blocks=18.
    """
    in_channels: int = 16       # I2V: 32, the noisy latents and those of the first frame
    out_channels: int = 16
    num_layers: int = 42
    heads: int = 48
    head_dim: int = 64
    time_dim: int = 512         # width of the step's embedding
    text_dim: int = 4096        # of T5
    text_length: int = 226
    positions: str = "rope"     # "sincos": a table, added; "rope+learned": and a learned table
    size: tuple = (13, 60, 90)  # f, h, w of the latents in training: 49 frames of 480 x 720
    tracking_blocks: int = 0    # so many blocks get a trained copy that sees the tracks


PATCH = 2  # a token is 2 x 2 latent pixels of a frame


def sincos_positions(f, h, w, dim, scale=1.875, device=None):
    """(f h w, dim) float32: time in dim / 4 channels, then column, then row in 3 dim / 8 each.

    Each is sines, then cosines. Rows and columns are divided by `scale`, as published.
    """
    def wave(n, d, unit):
        freq = 10000 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
        position = torch.arange(n).float() / unit  # in float32, as published
        angle = position[:, None] * freq
        return torch.cat([angle.sin(), angle.cos()], dim=-1).float().to(device=device)
    rows, columns = wave(h, 3 * dim // 8, scale), wave(w, 3 * dim // 8, scale)
    return spread(wave(f, dim // 4, 1), rows, columns, "twh")


def spread(t, h, w, order="thw"):
    """Vectors of time (f,a), row (h,b) and column (w,c) -> one per token, (f h w, a + b + c)."""
    size = len(t), len(h), len(w)
    parts = {"t": t[:, None, None], "h": h[None, :, None], "w": w[None, None]}
    return torch.cat([parts[axis].expand(*size, -1) for axis in order], dim=-1).flatten(0, 2)


def crop_window(h, w, base_h, base_w):
    """(top, left), (bottom, right) of an h x w grid, scaled to fit and centred in the base's."""
    if h / w > base_h / base_w:
        rows, columns = base_h, round(base_h / h * w)
    else:
        rows, columns = round(base_w / w * h), base_w
    top, left = round((base_h - rows) / 2), round((base_w - columns) / 2)
    return (top, left), (top + rows, left + columns)


def rope_positions(f, h, w, base_h, base_w, head_dim):
    """cos, sin (f h w, head_dim / 2) of rotary positions: 1/4 of it time, 3/8 row, 3/8 column.

    A grid other than the base's is stretched over the part of it that crop_window gives.
    """
    def angle(position, dim):
        return position[:, None] * (1 / 10000 ** (torch.arange(0, dim, 2).float() / dim))
    (top, left), (bottom, right) = crop_window(h, w, base_h, base_w)
    # the end point scales with the offset in it, as published; at the base's own size: 0, 1, ...
    # h - 1
    rows = torch.linspace(top, bottom * (h - 1) / h, h)
    columns = torch.linspace(left, right * (w - 1) / w, w)
    angles = spread(angle(torch.arange(f).float(), head_dim // 4), angle(rows, 3 * head_dim // 8),
                    angle(columns, 3 * head_dim // 8))
    return angles.cos(), angles.sin()


class PatchEmbed(nn.Module):
    """Text and latents -> tokens of one width, with the positions that are added (not rope)."""

    def __init__(self, cfg):
        super().__init__()
        dim = cfg.heads * cfg.head_dim
        self.positions = cfg.positions
        self.proj = nn.Conv2d(cfg.in_channels, dim, PATCH, stride=PATCH)
        self.text_proj = nn.Linear(cfg.text_dim, dim)
        if cfg.positions == "rope+learned":  # text rows first; a buffer as in the public class
            f, h, w = cfg.size
            table = sincos_positions(f, h // PATCH, w // PATCH, dim)
            self.register_buffer("pos_embedding", F.pad(table, (0, 0, cfg.text_length, 0))[None])

    def forward(self, x, text):
        """x (b,c,f,h,w), text (b,n,d) -> text tokens (b,n,dim), video tokens (b,f h/2 w/2,dim)."""
        b, _, f, h, w = x.shape
        text = self.text_proj(text)
        video = self.proj(rearrange(x, "b c f h w -> (b f) c h w"))
        video = rearrange(video, "(b f) d h w -> b (f h w) d", b=b)
        n, m = text.shape[1], video.shape[1]
        if self.positions == "sincos":
            size = f, h // PATCH, w // PATCH
            table = sincos_positions(*size, video.shape[-1], device=video.device)
            video = video + table.to(video.dtype)
        elif self.positions == "rope+learned":
            # fewer frames: the table's first rows, as in the authors' code (diffusers uses sincos
            # then)
            table = self.pos_embedding.to(video)
            text, video = text + table[:, :n], video + table[:, n:n + m]
        return text, video


class AdaLayerNorm(nn.Module):
    """LayerNorm of text and video tokens, each scaled and shifted by the step's embedding."""

    def __init__(self, dim, time_dim):
        super().__init__()
        self.linear = zero_init(nn.Linear(time_dim, 6 * dim))  # gates start at 0 (DiT, 2212.09748)
        self.norm = nn.LayerNorm(dim)

    def forward(self, text, video, emb):
        """-> text and video as one sequence (b,n + m,dim), and the gates for both."""
        six = self.linear(F.silu(emb))[:, None].chunk(6, -1)  # b 1 dim
        shift, scale, gate, text_shift, text_scale, text_gate = six
        text = torch.addcmul(text_shift, self.norm(text), 1 + text_scale)
        video = torch.addcmul(shift, self.norm(video), 1 + scale)
        return torch.cat([text, video], dim=1), text_gate, gate


class JointAttention(nn.Module):
    """Self-attention over text and video together; q and k are normalised, then rotated."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k = (nn.LayerNorm(dim // heads, eps=1e-6) for _ in range(2))
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(dim, dim))  # key `to_out.0` as published

    def forward(self, x, rope):
        """x (b,l,dim), rope: cos, sin (l,d/2) or None -> (b,l,dim)."""
        v = self.to_v(x)
        q = self.norm_q(self.to_q(x).unflatten(-1, (self.heads, -1)))  # b l heads d
        k = self.norm_k(self.to_k(x).unflatten(-1, (self.heads, -1)))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k = (y.flatten(2).to(v.dtype) for y in (q, k))
        return self.to_out(attend(q, k, v, self.heads))


class CogVideoXBlock(nn.Module):
    """Joint attention, then an MLP, on text and video tokens, modulated by the step."""

    def __init__(self, cfg):
        super().__init__()
        dim = cfg.heads * cfg.head_dim
        self.norm1 = AdaLayerNorm(dim, cfg.time_dim)
        self.attn1 = JointAttention(dim, cfg.heads)
        self.norm2 = AdaLayerNorm(dim, cfg.time_dim)
        self.ff = FeedForward(dim, GELU)

    def forward(self, text, video, emb, rope):
        """text (b,n,dim), video (b,m,dim), emb (b,time_dim), rope of both -> text, video."""
        n = text.shape[1]
        x, text_gate, gate = self.norm1(text, video, emb)
        out = self.attn1(x, rope)
        text = torch.addcmul(text, text_gate, out[:, :n])
        video = torch.addcmul(video, gate, out[:, n:])
        x, text_gate, gate = self.norm2(text, video, emb)
        out = self.ff(x)
        return torch.addcmul(text, text_gate, out[:, :n]), torch.addcmul(video, gate, out[:, n:])


class CogVideoX(nn.Module):
    """Diffusion transformer over text and video tokens in one sequence; CogVideoX-5B by default.

    tracking_blocks adds Diffusion as Shader's branch: copies of the first blocks run on the
    tracks' tokens, and each adds its output, through a linear layer that starts at zero, to the
    video tokens.
    """
    lora_targets = "to_q", "to_k", "to_v", "to_out.0"  # if --lora-targets is not given

    def __init__(self, cfg=CogVideoXConfig()):
        super().__init__()
        self.cfg = cfg
        self.grad_ckpt = False  # recompute each block in the backward pass
        dim = cfg.heads * cfg.head_dim
        self.patch_embed = PatchEmbed(cfg)
        self.time_embedding = nn.Module()
        self.time_embedding.linear_1 = nn.Linear(dim, cfg.time_dim)
        self.time_embedding.linear_2 = nn.Linear(cfg.time_dim, cfg.time_dim)
        self.transformer_blocks = nn.ModuleList(CogVideoXBlock(cfg) for _ in range(cfg.num_layers))
        self.norm_final = nn.LayerNorm(dim)
        self.norm_out = nn.Module()
        self.norm_out.linear = zero_init(nn.Linear(cfg.time_dim, 2 * dim))
        self.norm_out.norm = nn.LayerNorm(dim)
        self.proj_out = zero_init(nn.Linear(dim, cfg.out_channels * PATCH ** 2))
        if cfg.tracking_blocks:
            copies = range(cfg.tracking_blocks)
            self.transformer_blocks_copy = nn.ModuleList(CogVideoXBlock(cfg) for _ in copies)
            self.combine_linears = nn.ModuleList(zero_init(nn.Linear(dim, dim)) for _ in copies)
            self.initial_combine_linear = zero_init(nn.Linear(dim, dim))

    def namings(self):
        """Functions from our keys to those of other public files."""
        return []

    def units(self):
        """The modules that FSDP shards, and --compile compiles, one by one."""
        return [m for m in self.modules() if isinstance(m, CogVideoXBlock)]

    def rope(self, f, h, w, n):
        """cos, sin of n text tokens, which are not rotated, and of the video; None without rope."""
        if self.cfg.positions == "sincos":
            return None
        base = (size // PATCH for size in self.cfg.size[1:])
        cos, sin = rope_positions(f, h // PATCH, w // PATCH, *base, self.cfg.head_dim)
        device = self.proj_out.weight.device
        return F.pad(cos, (0, 0, n, 0), value=1.0).to(device), F.pad(sin, (0, 0, n, 0)).to(device)

    def beside(self, x, first, name):
        """x (b,c,f,h,w) and `first` (b,d,k,h,w) or None, padded with zeros -> (b,c + d,f,h,w)."""
        if first is not None:
            first = F.pad(first, (0, 0, 0, 0, 0, x.shape[2] - first.shape[2]))
            x = torch.cat([x, first.to(x)], dim=1)
        given, wanted = x.shape[1], self.cfg.in_channels
        assert given == wanted, f"with {name}: {given} channels of latents instead of {wanted}"
        return x

    def check(self, x, text, tracks):
        """Assert that sizes and conditions fit; the command line was checked by latent_shape()."""
        cfg, (f, h, w), n = self.cfg, x.shape[2:], text.shape[1]
        assert h % PATCH == w % PATCH == 0, f"latents of {h}x{w}: not multiples of {PATCH}"
        if cfg.positions == "rope+learned":
            assert (h, w) == cfg.size[1:] and f <= cfg.size[0], (
                f"{f} latent frames of {h}x{w}: the learned positions are for {cfg.size}")
            assert n == cfg.text_length, (
                f"{n} text tokens: the learned positions are for {cfg.text_length}")
        assert tracks is None or cfg.tracking_blocks, "tracks: this network has no branch for them"

    def forward(self, x: Tensor, t: Tensor, text: Tensor, first_frame=None, tracks=None,
                first_track=None, track_strength=None) -> Tensor:
        """x (b,c,f,h,w) noisy latents, t (b,) step 0..999, text (b,n,d) of T5 -> v like x.

        Conditions: first_frame (b,c,k,h,w), k <= f: latents of the first frame, k = 1 (I2V);
        tracks (b,c,f,h,w), first_track (b,c,k,h,w): latents of the tracking video and of its
        first frame (Diffusion as Shader; the branch does not run without tracks); track_strength
        (b,) multiplies what the branch adds.
        """
        self.check(x, text, tracks)
        cfg, (f, h, w) = self.cfg, x.shape[2:]
        emb = sinusoidal(t, cfg.heads * cfg.head_dim).to(self.proj_out.weight.dtype)
        emb = self.time_embedding.linear_2(F.silu(self.time_embedding.linear_1(emb)))
        rope = self.rope(f, h, w, text.shape[1])
        words, video = self.patch_embed(self.beside(x, first_frame, "first_frame"), text)
        if tracks is not None:
            _, tracking = self.patch_embed(self.beside(tracks, first_track, "first_track"), text)
            side = self.initial_combine_linear(video + tracking)
        for i, block in enumerate(self.transformer_blocks):
            words, video = run_block(block, words, video, emb, rope, recompute=self.grad_ckpt)
            if tracks is not None and i < cfg.tracking_blocks:
                # in series: a copy reads the output of the linear layer before it
                copied = self.transformer_blocks_copy[i]
                _, side = run_block(copied, words, side, emb, rope, recompute=self.grad_ckpt)
                side = self.combine_linears[i](side)
                added = side if track_strength is None else track_strength.view(-1, 1, 1) * side
                video = video + added
        shift, scale = self.norm_out.linear(F.silu(emb))[:, None].chunk(2, dim=-1)
        video = torch.addcmul(shift, self.norm_out.norm(self.norm_final(video)), 1 + scale)
        return rearrange(self.proj_out(video), "b (f h w) (c p q) -> b c f (h p) (w q)",
                         f=f, h=h // PATCH, p=PATCH, q=PATCH)


TRACK_BRANCH = ("transformer_blocks_copy", "combine_linears", "initial_combine_linear")


def with_tracks(state, net):
    """CogVideoX's weights -> those from which Diffusion as Shader's training of `net` starts.

    The branch's blocks are copies of the base's and its linear layers are zero, so the network's
    predictions are exactly the base's.
    """
    state = dict(state)
    for key, value in net.state_dict().items():
        if key.startswith("transformer_blocks_copy."):
            state[key] = state[key.replace("_copy", "", 1)].clone()
        elif key.startswith(TRACK_BRANCH[1:]):
            state[key] = torch.zeros(value.shape)
    return state


def cogvideox_state(state, net, source):
    """Public weights -> CogVideoX's. Diffusion as Shader may start from CogVideoX-5B-I2V's file."""
    started = not net.cfg.tracking_blocks or any(k.startswith("combine_linears.") for k in state)
    return state if started else with_tracks(state, net)


# ---- Wan2.1 and Wan2.2 (arXiv 2503.20314, github.com/Wan-Video)

@dataclass(frozen=True)
class WanConfig:
    """Defaults: Wan2.1-T2V-1.3B, 1,419 M parameters.

    T2V-14B, and each expert of T2V-A14B: dim=5120, ffn_dim=13824, heads=40, num_layers=40.
    I2V-A14B: in_channels=36, too. I2V-14B: image_dim=1280, too. FLF2V-14B: image_positions=514,
    too. TI2V-5B: in_channels=out_channels=48, dim=3072, ffn_dim=14336, heads=24.
    """
    in_channels: int = 16     # I2V: 36, the noisy latents, 4 of the mask, those of the image
    out_channels: int = 16
    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    num_layers: int = 30
    freq_dim: int = 256       # sinusoids of the timestep
    text_dim: int = 4096      # of UMT5
    text_length: int = 512
    image_dim: int = 0        # width of CLIP's tokens; 0: there is no image branch
    image_positions: int = 0  # tokens of two images (FLF2V), which get learned positions; 0: none


def wan_rope(f, h, w, head_dim, device=None):
    """cos, sin (f h w, head_dim / 2) float32 of rotary positions: of time, then row, then column.

    Rows and columns have head_dim // 6 pairs of channels each, time has the rest.
    """
    def angle(n, pairs):
        step = 10000 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        return torch.outer(torch.arange(n, dtype=torch.float64), step)
    pairs = head_dim // 6
    angles = angle(f, head_dim // 2 - 2 * pairs), angle(h, pairs), angle(w, pairs)
    return tuple(spread(*(wave(a).float().to(device) for a in angles))
                 for wave in (torch.cos, torch.sin))


class Linear32(nn.Linear):
    """A Linear computed in float32, whatever the types of weights and x, autocast or not."""

    def forward(self, x):
        device = "cpu" if x.is_meta else x.device.type  # there is no autocast for tensors on meta
        with torch.autocast(device, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class LayerNorm32(nn.LayerNorm):
    """LayerNorm with weights, computed in float32, whatever the types of weights and x."""

    def forward(self, x):
        shape, weight, bias = self.normalized_shape, self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), shape, weight, bias, self.eps)


class WanSelfAttention(nn.Module):
    """q and k are normalised over all heads together, then rotated to their positions."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(dim, eps=1e-6) for _ in range(2))

    def forward(self, x, rope):
        """x (b,n,dim), rope: cos, sin (n,d/2) -> (b,n,dim)."""
        def rotated(norm, y):
            return rotate(norm(y).unflatten(-1, (self.heads, -1)), *rope).flatten(2)
        q, k = (lean(partial(rotated, norm), project(x), x.shape[-1])
                for norm, project in ((self.norm_q, self.q), (self.norm_k, self.k)))
        return self.o(attend(q, k, self.v(x), self.heads))


class WanCrossAttention(WanSelfAttention):
    """Attention to the text and, with its own keys and values, to the image tokens of CLIP."""

    def __init__(self, dim, heads, image):
        super().__init__(dim, heads)
        if image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps=1e-6)

    def forward(self, x, text, image):
        """x (b,n,dim), text (b,m,dim), image (b,k,dim) or None -> (b,n,dim)."""
        q = self.norm_q(self.q(x))
        out = attend(q, self.norm_k(self.k(text)), self.v(text), self.heads)
        if image is not None:
            out = out + attend(q, self.norm_k_img(self.k_img(image)), self.v_img(image), self.heads)
        return self.o(out)


class WanBlock(nn.Module):
    """Self-attention, cross-attention, MLP. Residual stream, norms and modulation are float32."""

    def __init__(self, cfg):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim ** 0.5)
        self.self_attn = WanSelfAttention(cfg.dim, cfg.heads)
        self.norm3 = LayerNorm32(cfg.dim, eps=1e-6)
        self.cross_attn = WanCrossAttention(cfg.dim, cfg.heads, image=cfg.image_dim > 0)
        self.ffn = nn.Sequential(
            nn.Linear(cfg.dim, cfg.ffn_dim), nn.GELU("tanh"), nn.Linear(cfg.ffn_dim, cfg.dim))

    def forward(self, x, six, text, image, rope):
        """x (b,k,m,dim), six (b,k,6,dim), both float32; text, image, rope: see above -> like x."""
        proj, _, last = self.ffn
        table = (self.modulation.float() + six).unsqueeze(3)  # b k 6 1 dim
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table.unbind(2)

        def tokens(h):  # in the type of the layers (weights may be int8), as one sequence
            return h.to(proj.bias.dtype).flatten(1, 2)

        def modulated(x, shift, scale):
            return lean(lambda x: tokens(modulate(x, shift, scale)), x, x.shape[-1])
        h = self.self_attn(modulated(x, shift_a, scale_a), rope)
        x = torch.addcmul(x, gate_a, h.view(x.shape))
        x = x + self.cross_attn(tokens(self.norm3(x)), text, image).view(x.shape)
        h = feed_forward(modulated(x, shift_m, scale_m), proj, tanh_gelu, last)
        return torch.addcmul(x, gate_m, h.view(x.shape))


class WanHead(nn.Module):
    def __init__(self, dim, cout):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim ** 0.5)
        self.head = Linear32(dim, cout)

    def forward(self, x, emb):
        """x (b,k,m,dim), emb (b,k,dim): of the timestep -> (b,k,m,cout)."""
        table = (self.modulation.float() + emb.unsqueeze(2)).unsqueeze(3)  # b k 2 1 dim
        return self.head(modulate(x, *table.unbind(2)))


class Wan(nn.Module):
    """Wan2.1-T2V-1.3B by default; flow matching, any size and length."""
    lora_targets = "q", "k", "v", "o"  # if --lora-targets is not given

    def __init__(self, cfg=WanConfig()):
        super().__init__()
        self.cfg = cfg
        self.grad_ckpt = False  # recompute each block in the backward pass
        dim, patch = cfg.dim, (1, PATCH, PATCH)
        self.patch_embedding = nn.Conv3d(cfg.in_channels, dim, patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(cfg.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(
            Linear32(cfg.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        if cfg.image_dim:
            self.img_emb = nn.Module()
            self.img_emb.proj = nn.Sequential(
                nn.LayerNorm(cfg.image_dim), nn.Linear(cfg.image_dim, cfg.image_dim), nn.GELU(),
                nn.Linear(cfg.image_dim, dim), nn.LayerNorm(dim))
        if cfg.image_positions:
            table = torch.zeros(1, cfg.image_positions, cfg.image_dim)
            self.img_emb.emb_pos = nn.Parameter(table)
        self.blocks = nn.ModuleList(WanBlock(cfg) for _ in range(cfg.num_layers))
        self.head = WanHead(dim, cfg.out_channels * PATCH ** 2)
        self.init_weights()

    def init_weights(self):
        """As published, for training from scratch."""
        init_linears(self)
        nn.init.xavier_uniform_(self.patch_embedding.weight.view(self.cfg.dim, -1))
        for layer in (*self.text_embedding[::2], *self.time_embedding[::2]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def namings(self):
        """Functions from our keys to those of other public files."""
        return [wan_diffusers_name]

    def units(self):
        """The modules that FSDP shards, and --compile compiles, one by one."""
        return list(self.blocks)

    def check(self, x, t, text, image):
        """Assert that sizes and conditions fit; the command line was checked by latent_shape()."""
        cfg, (c, f, h, w) = self.cfg, x.shape[1:]
        assert c == cfg.in_channels, (
            f"{c} channels of latents, with first_frame, instead of {cfg.in_channels}")
        assert h % PATCH == w % PATCH == 0, f"latents of {h}x{w}: not multiples of {PATCH}"
        assert t.ndim == 1 or t.shape[1] in (1, f, f * h * w // PATCH ** 2), (
            f"{t.shape[1]} timesteps per sample: give one, one per latent frame or per token")
        assert text.shape[1] <= cfg.text_length, f"{text.shape[1]} text tokens are too many"
        assert (image is not None) == (cfg.image_dim > 0), "image: for the image branch, always"

    def forward(self, x: Tensor, t: Tensor, text: Tensor, first_frame=None, image=None) -> Tensor:
        """x (b,c,f,h,w) noisy latents, t (b,), (b,f) or (b,f h/2 w/2) in 0..1000, fractions
        allowed: a timestep per sample, latent frame or token; text (b,n,d) of UMT5, rows behind
        the prompt zero -> the velocity noise - x0, like x, float32.

        Conditions: first_frame (b,e,f,h,w): what stands beside x (I2V: 4 channels of mask, then 16
        of the image's latents); image (b,k,e): tokens of CLIP (Wan2.1's I2V, FLF2V).
        """
        if first_frame is not None:
            x = torch.cat([x, first_frame.to(x)], dim=1)
        self.check(x, t, text, image)
        cfg, (f, h, w) = self.cfg, x.shape[2:]
        dtype = self.patch_embedding.weight.dtype
        exact = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
        t = t.view(len(t), -1)  # b k
        emb = self.time_embedding(sinusoidal(t, cfg.freq_dim, exact))  # b k dim
        six = self.time_projection(emb).unflatten(-1, (6, cfg.dim))
        # the zeros are not masked: their tokens, made of biases alone, are attended to
        text = F.pad(text.to(dtype), (0, 0, 0, cfg.text_length - text.shape[1]))
        text = self.text_embedding(text)
        if image is not None:
            image = image.to(dtype)
            image = image + self.img_emb.emb_pos if cfg.image_positions else image
            image = self.img_emb.proj(image)
        rope = wan_rope(f, h // PATCH, w // PATCH, cfg.dim // cfg.heads, x.device)

        x = rearrange(self.patch_embedding(x.to(dtype)), "b d f h w -> b (f h w) d")
        x = x.float().unflatten(1, (t.shape[1], -1))  # b k m dim
        for block in self.blocks:
            x = run_block(block, x, six, text, image, rope, recompute=self.grad_ckpt)
        x = self.head(x, emb).flatten(1, 2)
        return rearrange(x, "b (f h w) (p q c) -> b c f (h p) (w q)",
                         f=f, h=h // PATCH, p=PATCH, q=PATCH)


WAN_DIFFUSERS = {
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "img_emb.proj.0.": "condition_embedder.image_embedder.norm1.",
    "img_emb.proj.1.": "condition_embedder.image_embedder.ff.net.0.proj.",
    "img_emb.proj.3.": "condition_embedder.image_embedder.ff.net.2.",
    "img_emb.proj.4.": "condition_embedder.image_embedder.norm2.",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head.": "proj_out.", "head.modulation": "scale_shift_table",
    "modulation": "scale_shift_table",
    ".self_attn.": ".attn1.", ".cross_attn.": ".attn2.", ".norm3.": ".norm2.",
    ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".o.": ".to_out.0.",
    ".k_img.": ".add_k_proj.", ".v_img.": ".add_v_proj.", ".norm_k_img.": ".norm_added_k.",
    ".ffn.0.": ".ffn.net.0.proj.", ".ffn.2.": ".ffn.net.2."}


def wan_diffusers_name(key):
    """Key of Wan -> that of diffusers' WanTransformer3DModel."""
    for ours, theirs in WAN_DIFFUSERS.items():
        key = key.replace(ours, theirs)
    return key


WAN_NAMES = {  # (dim, in_channels, image branch)
    (1536, 16, ""): "Wan2.1-T2V-1.3B",
    (5120, 16, ""): "Wan2.1-T2V-14B or Wan2.2-T2V-A14B",
    (5120, 36, "CLIP"): "Wan2.1-I2V-14B",
    (5120, 36, "CLIP of two images"): "Wan2.1-FLF2V-14B",
    (5120, 36, ""): "Wan2.2-I2V-A14B",
    (3072, 48, ""): "Wan2.2-TI2V-5B"}


def wan_variant(state):
    """Which Wan has these weights, original or diffusers' keys, in words."""
    dim, channels = state["patch_embedding.weight"].shape[:2]
    image = "CLIP" if any("k_img." in k or "add_k_proj." in k for k in state) else ""
    if any("emb_pos" in k or "image_embedder.pos_embed" in k for k in state):
        image = "CLIP of two images"
    own = f"a Wan of width {dim} and {channels} channels"
    own += f", with an image branch ({image})" if image else ", without an image branch"
    return WAN_NAMES.get((dim, channels, image), own)


def wan_state(state, net, source):
    """Public weights -> Wan's: with the original's keys (ComfyUI's too) or diffusers'."""
    state = below(state, "model.diffusion_model.")
    diffusers = "condition_embedder.time_proj.weight" in state
    known = diffusers or "time_projection.1.weight" in state
    if known and state.get("patch_embedding.weight", torch.empty(0)).ndim == 5:
        theirs, ours = wan_variant(state), wan_variant(net.state_dict())
        if theirs != ours:
            raise UserError(f"{source}: these are weights of {theirs}, this network is {ours}; "
                            "give the --base that the file belongs to")
    if diffusers:
        # in the files of diffusers' I2V; no code reads it
        state = {k: v for k, v in state.items() if ".norm_added_q." not in k}
        return rename(state, net, wan_diffusers_name, source)
    return state
