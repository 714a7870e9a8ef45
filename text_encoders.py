"""Text encoders: what turns a prompt into the tokens that a video network attends to.

OpenCLIPText is the text tower of OpenCLIP ViT-H-14 (encoder of ModelScope, VideoCrafter2, I2VGen-XL, DEMO),
OpenCLIPVision its image tower (image prompts, CLIP rewards). The layers are written here; open_clip only
brings the tokenizer. Keys are open_clip's: laion/CLIP-ViT-H-14-laion2B-s32B-b79K's
open_clip_pytorch_model.bin (686 tensors) loads as it is; the `text_encoder` folder of diffusers repositories
goes through text_from_hf.

    text = OpenCLIPText(CLIPConfig())(tokenize(["a red ball"]))  # (1, 77, 1024)
"""
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError

# how many blocks at the end each choice of features leaves out
SKIP = {"last": 0, "penultimate": 1}


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the two towers; the defaults are ViT-H-14."""
    embed_dim: int = 1024           # both towers end in it; 0: no text projection (diffusers' layout)
    # image tower
    image_size: int = 224
    vision_layers: int = 32
    vision_width: int = 1280
    vision_head_width: int = 80
    patch_size: int = 14
    # text tower
    vocab_size: int = 49408
    context_length: int = 77
    text_width: int = 1024
    text_heads: int = 16
    text_layers: int = 24           # the diffusers layout keeps 23, to be run with layer="last"


# ---- the transformer that both towers share

class Attention(nn.Module):
    """Multi-head self-attention, q, k and v in one matrix, a bare parameter as in the public files."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal):
        b, n, w = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (b, heads, n, d)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).reshape(b, n, w))  # (b, n, heads d)


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        # the exact (erf) GELU: ViT-H is a laion model; OpenAI's own CLIP files would want QuickGELU here
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x, causal=False):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, causal=False, skip=0):
        for block in self.resblocks[:len(self.resblocks) - skip]:
            x = block(x, causal)
        return x


# ---- the towers

class OpenCLIPText(nn.Module):
    """Causal text transformer. Video networks read its penultimate features, as Stable Diffusion 2."""

    def __init__(self, cfg=CLIPConfig()):
        super().__init__()
        w = cfg.text_width
        self.token_embedding = nn.Embedding(cfg.vocab_size, w)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(cfg.context_length, w))
        self.transformer = Transformer(w, cfg.text_heads, cfg.text_layers)
        self.ln_final = nn.LayerNorm(w)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        if cfg.embed_dim:
            self.text_projection = nn.Parameter(w ** -0.5 * torch.randn(w, cfg.embed_dim))
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # temperature of CLIP's loss

    def forward(self, ids, layer="penultimate"):
        """ids (b, 77) long -> token features (b, 77, text_width); "penultimate" skips the last block."""
        if layer not in SKIP:
            raise UserError(f"layer {layer!r} of the text tower: choose from {', '.join(SKIP)}")
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        # padding is not masked: it stands after the end token, where the causal mask hides it from the words
        x = self.transformer(x, causal=True, skip=SKIP[layer])
        return self.ln_final(x)

    def pooled(self, ids, layer="last"):
        """ids (b, 77) -> text embedding (b, embed_dim), not normalised: the end token, projected."""
        return at_end_token(self(ids, layer), ids) @ self.text_projection


class OpenCLIPVision(nn.Module):
    """Vision transformer of OpenCLIP; state dict keys are the public ones without `visual.`."""

    def __init__(self, cfg=CLIPConfig()):
        super().__init__()
        w, std = cfg.vision_width, cfg.vision_width ** -0.5
        patches = (cfg.image_size // cfg.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, w, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.class_embedding = nn.Parameter(std * torch.randn(w))
        self.positional_embedding = nn.Parameter(std * torch.randn(1 + patches, w))
        self.ln_pre = nn.LayerNorm(w)
        self.transformer = Transformer(w, w // cfg.vision_head_width, cfg.vision_layers)
        self.ln_post = nn.LayerNorm(w)
        self.proj = nn.Parameter(std * torch.randn(w, cfg.embed_dim))

    def forward(self, images):
        """images (n, 3, image_size, image_size) in CLIP's mean and std -> (n, embed_dim), not normalised."""
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (n, patches, w), row by row
        first = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj  # only the class token leaves the tower


class OpenCLIP(OpenCLIPText):
    """Both towers under open_clip's keys: the text tower at the top, the image tower in `visual`."""

    def __init__(self, cfg=CLIPConfig()):
        super().__init__(cfg)
        self.visual = OpenCLIPVision(cfg)


def at_end_token(tokens, ids):
    """tokens (b, n, w), ids (b, n) -> (b, w): the row of the end token, which has the largest id."""
    return tokens[torch.arange(len(ids), device=tokens.device), ids.argmax(dim=1)]


def tokenize(texts, context_length=77):
    """Token ids of a string or list of strings: (b, context_length) long, [start, words, end, 0 ...].

    A longer text is cut, its last id is then the end token. Source: open_clip (lower case, html unescaped).
    """
    try:
        import open_clip  # slow to import: only when a text comes
    except ImportError:
        raise UserError("tokenizing prompts needs open_clip: pip install open_clip_torch") from None
    return open_clip.tokenize(texts, context_length=context_length)


# ---- other layouts of the same weights

HF_TOP = {"embeddings.token_embedding.weight": "token_embedding.weight",
          "embeddings.position_embedding.weight": "positional_embedding",
          "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}
HF_BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
            "self_attn.out_proj": "attn.out_proj"}


def text_from_hf(state):
    """State dict of transformers' CLIPTextModel (with or without `text_model.`) -> OpenCLIPText's, any depth.

    The text_encoder of diffusers video models is ViT-H without its last block and projection: build
    CLIPConfig(text_layers=23, embed_dim=0) and read layer="last", the penultimate features of the full tower.
    """
    out, qkv = {}, {}
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "embeddings.position_ids":  # a buffer of old transformers versions: 0, 1, 2 ...
            continue
        if name in HF_TOP:
            out[HF_TOP[name]] = value
        elif name == "text_projection.weight":
            out["text_projection"] = value.T  # a Linear there, a matrix on the right in open_clip
        elif block and block[2] in HF_BLOCK:
            out[f"transformer.resblocks.{block[1]}.{HF_BLOCK[block[2]]}.{block[3]}"] = value
        elif block and block[2] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            fused = f"transformer.resblocks.{block[1]}.attn.in_proj_{block[3]}"
            qkv.setdefault(fused, {})[block[2][-6]] = value  # "q", "k" or "v"
        else:
            raise UserError(f"{key}: no key of transformers' CLIPTextModel (open_clip files need no mapping)")
    for fused, parts in qkv.items():
        if len(parts) < 3:
            raise UserError(f"{fused}: only {', '.join(sorted(parts))} of q, k, v are in the file")
        out[fused] = torch.cat([parts["q"], parts["k"], parts["v"]])  # rows: q, then k, then v
    return out


def clip_text_only(state):
    """The text tower's part of an open_clip state dict (visual.* left out)."""
    return {key: value for key, value in state.items() if not key.startswith("visual.")}


# ---- the tiny world's text encoder

class TinyText(nn.Module):
    """A word a token, one transformer block, trained with the tiny network. Unknown words are refused."""

    def __init__(self, words, width=64, heads=2, layers=1, context_length=10):
        super().__init__()
        self.words = {w: i + 1 for i, w in enumerate(words)}  # 0 is the padding
        self.context_length = context_length
        self.token_embedding = nn.Embedding(len(words) + 1, width)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(context_length, width))
        self.transformer = Transformer(width, heads, layers)
        self.ln_final = nn.LayerNorm(width)

    def tokenize(self, texts):
        """List of str -> (b, context_length) long."""
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.long, device="cpu")
        for i, text in enumerate(texts):
            words = text.lower().replace(",", " ").split()
            unknown = [w for w in words if w not in self.words]
            if unknown:
                raise UserError(f"prompt {text!r}: the tiny world does not know {unknown[0]!r}; "
                                f"its words: {' '.join(self.words)}")
            if len(words) > self.context_length:
                raise UserError(f"prompt {text!r}: {len(words)} words, "
                                f"the tiny world's captions have at most {self.context_length}")
            ids[i, :len(words)] = torch.tensor([self.words[w] for w in words], dtype=torch.long)
        return ids

    def forward(self, ids):
        """ids (b, n) -> token features (b, n, width)."""
        x = self.token_embedding(ids) + self.positional_embedding
        return self.ln_final(self.transformer(x))
