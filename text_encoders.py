"""Text encoders, whose tokens a video network attends to, and image towers.

OpenCLIPText is the text tower of OpenCLIP ViT-H-14 (ModelScope, VideoCrafter2, I2VGen-XL, DEMO),
OpenCLIPVision its image tower (image prompts, CLIP rewards, Wan2.1's I2V). With other sizes the
same classes are OpenAI's ViT-L-14 (CLIP_L14). T5Text is transformers' T5 (CogVideoX, Open-Sora) or
UMT5 (Wan). DINO is an image tower that tells subjects apart.

The layers are written here; open_clip only brings the tokenizer. Keys are open_clip's: laion's
open_clip_pytorch_model.bin (686 tensors) loads as it is. The `text_encoder` folder of diffusers
repositories goes through text_from_hf, transformers' CLIPModel (OpenAI's CLIP, PickScore) through
clip_from_hf. Textual inversion (words learned as vectors, Gal et al., arXiv 2208.01618) enters by
the argument `learned` of OpenCLIPText.

    text = OpenCLIPText(CLIPConfig())(tokenize(["a red ball"]))  # (1, 77, 1024)
"""
import html
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, check_file, warn, warn_once
from models import attend
from weights import below, looks_like, rename, stored_bytes

SKIP = {"last": 0, "penultimate": 1}  # choice of features -> number of last blocks that do not run


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the two towers; the defaults are ViT-H-14's."""
    embed_dim: int = 1024           # of both outputs; 0: no projections, only tokens
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
    text_layers: int = 24           # the diffusers layout has 23, which are run with layer="last"
    text_mlp_ratio: float = 4.0     # width of a block's MLP / text_width
    quick_gelu: bool = False        # OpenAI's own models: x sigmoid(1.702 x) in place of GELU


CLIP_L14 = CLIPConfig(
    embed_dim=768, vision_layers=24, vision_width=1024, vision_head_width=64, text_width=768,
    text_heads=12, text_layers=12, quick_gelu=True)
# of xlm-roberta-large ViT-H-14: Wan2.1's I2V reads the tokens before the last block
WAN_CLIP = CLIPConfig(embed_dim=0, vision_layers=31)


# ---- the transformer that all towers share

class Attention(nn.Module):
    """Multi-head self-attention; q, k, v share a matrix, a bare parameter as in public files."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.heads, causal=causal))


class MLP(nn.Module):
    def __init__(self, width, hidden, quick_gelu=False):
        super().__init__()
        self.quick_gelu = quick_gelu
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x):
        x = self.c_fc(x)
        # GELU is the exact (erf) one: ViT-H is a laion model
        return self.c_proj(x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))


class Block(nn.Module):
    def __init__(self, width, heads, mlp_ratio, eps, quick_gelu=False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, int(mlp_ratio * width), quick_gelu)

    def forward(self, x, causal=False):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads, layers, mlp_ratio=4.0, eps=1e-5, quick_gelu=False):
        super().__init__()
        self.resblocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, eps, quick_gelu) for _ in range(layers))

    def forward(self, x, causal=False, skip=0):
        for block in self.resblocks[:len(self.resblocks) - skip]:
            x = block(x, causal)
        return x


# ---- the towers

class OpenCLIPText(nn.Module):
    """Causal text transformer. Video networks read its penultimate features, like SD 2."""

    def __init__(self, cfg=CLIPConfig()):
        super().__init__()
        w = cfg.text_width
        self.token_embedding = nn.Embedding(cfg.vocab_size, w)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(cfg.context_length, w))
        self.transformer = Transformer(
            w, cfg.text_heads, cfg.text_layers, cfg.text_mlp_ratio, quick_gelu=cfg.quick_gelu)
        self.ln_final = nn.LayerNorm(w)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        if cfg.embed_dim:
            self.text_projection = nn.Parameter(w ** -0.5 * torch.randn(w, cfg.embed_dim))
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # of CLIP's loss

    def units(self):
        """The modules to shard one by one (models.parallelize)."""
        return list(self.transformer.resblocks)

    def embed(self, ids, learned=None):
        """ids (b, n) -> ids, token embeddings (b, n, text_width), `learned` words in their places.

        learned: {token id of a placeholder: vectors (N, text_width)}, see insert_vectors.
        """
        x = self.token_embedding(ids)
        for placeholder, vectors in (learned or {}).items():
            ids, x = insert_vectors(ids, x, placeholder, vectors)
        return ids, x

    def forward(self, ids, layer="penultimate", learned=None):
        """ids (b, 77) long -> features (b, 77, text_width); "penultimate" skips the last block."""
        x = self.embed(ids, learned)[1] + self.positional_embedding[:ids.shape[1]]
        # padding needs no mask: it follows the end token, so the causal mask hides it from the
        # words
        x = self.transformer(x, causal=True, skip=SKIP[layer])
        return self.ln_final(x)

    def pooled(self, ids, layer="last"):
        """ids (b, 77) -> text embedding (b, embed_dim), not normalised: the projected end token."""
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
        self.transformer = Transformer(
            w, w // cfg.vision_head_width, cfg.vision_layers, quick_gelu=cfg.quick_gelu)
        if cfg.embed_dim:
            self.ln_post = nn.LayerNorm(w)
            self.proj = nn.Parameter(std * torch.randn(w, cfg.embed_dim))

    def tokens(self, images):
        """images (n, 3, h, w) in CLIP's mean and std -> tokens (n, 1 + patches, vision_width).

        The class token is first; neither ln_post nor proj is applied.
        """
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (n, patches, w), row by row
        first = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding
        return self.transformer(self.ln_pre(x))

    def forward(self, images):
        """images (n, 3, h, w) in CLIP's mean and std -> (n, embed_dim), not normalised."""
        return self.ln_post(self.tokens(images)[:, 0]) @ self.proj


class OpenCLIP(OpenCLIPText):
    """Both towers under open_clip's keys: text at the top, image in `visual`."""

    def __init__(self, cfg=CLIPConfig()):
        super().__init__(cfg)
        self.visual = OpenCLIPVision(cfg)


def at_end_token(tokens, ids):
    """tokens (b, n, w), ids (b, n) -> (b, w): the features at the end token, the largest id."""
    return tokens[torch.arange(len(ids), device=tokens.device), ids.argmax(dim=1)]


def tokenize(texts, context_length=77):
    """A string or list of strings -> ids (b, context_length) long, [start, words, end, 0 ...].

    A longer text is cut and still ends in the end token. By open_clip (lower case, html unescaped).
    """
    try:
        import open_clip  # slow to import
    except ImportError:
        raise UserError("tokenizing prompts needs open_clip: pip install open_clip_torch") from None
    texts = [texts] if isinstance(texts, str) else texts
    ids, lost = open_clip.tokenize(texts, context_length=context_length), {}
    for text, row in zip(texts, ids):
        if row[-1] != 0:  # no padding: it fits exactly or was cut
            tokenizer = open_clip.tokenizer._tokenizer
            lost[text] = tokenizer.decode(tokenizer.encode(text)[context_length - 2:]).strip()
    say_cut(lost, len(texts), context_length)
    return ids


lengths_said = set()  # of encoders that have cut a text in this run


def say_cut(lost, of, length):
    """Warn, once per run, that texts are longer than an encoder reads.

    lost: {text: the end of it that is not read}; of: number of texts; length: in tokens.
    """
    lost = {text: end for text, end in lost.items() if end}
    if lost and length not in lengths_said:
        lengths_said.add(length)
        text, end = next(iter(lost.items()))
        end = end if len(end) <= 200 else f"{end[:100]} ... {end[-100:]}"
        warn(f"{len(lost)} of {of} prompt(s) are longer than the {length} tokens that the text "
             f"encoder reads: {text[:60]!r} ... is read without its end, {end!r}; shorten it "
             "(said once)")


# ---- textual inversion: a word whose embedding is learned from pictures

def insert_vectors(ids, embedded, placeholder, vectors):
    """Put the N `vectors` (N, w) in the place of each token `placeholder`.

    ids (b, n), embedded (b, n, w) before positions are added -> both, new. With N > 1 the rest of
    the text moves right and is cut at n, as in DreamVideo (VGen). Gradients reach the vectors.
    """
    b, n = ids.shape
    # all (b, n): where a token's copies end; which token goes to a place, and which of its copies
    ends = torch.where(ids == placeholder, len(vectors), 1).cumsum(1)
    place = torch.arange(n, device=ids.device).expand(b, n).contiguous()
    source = torch.searchsorted(ends, place, right=True)
    copy = place - F.pad(ends, (1, 0)).gather(1, source)
    last = ((ids != 0) * place).amax(1, keepdim=True)  # before the padding
    if (ends.gather(1, last) > n).any():
        warn_once(f"a prompt with a learned word of {len(vectors)} vectors is longer than the {n} "
                  "tokens that the text encoder reads: its end is not read")
    ids = ids.gather(1, source)
    embedded = embedded.gather(1, source[..., None].expand_as(embedded))
    learned = (ids == placeholder)[..., None]
    return ids, torch.where(learned, vectors[copy].to(embedded.dtype), embedded)


def placeholder_id(word):
    """CLIP's token id of a placeholder such as "*", which must be a single token."""
    ids = tokenize(word)[0]
    pieces = int(ids.argmax()) - 1  # [start, the word's pieces, end, 0 ...]
    if pieces != 1:
        raise UserError(f"placeholder {word!r}: {pieces} tokens instead of one; use for example *")
    return int(ids[1])


# ---- other layouts of the same weights

HF_TOP = {"embeddings.token_embedding.weight": "token_embedding.weight",
          "embeddings.position_embedding.weight": "positional_embedding",
          "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}
HF_VISION_TOP = {"embeddings.class_embedding": "class_embedding",
                 "embeddings.patch_embedding.weight": "conv1.weight",
                 "embeddings.position_embedding.weight": "positional_embedding",
                 # as spelled there
                 "pre_layrnorm.weight": "ln_pre.weight", "pre_layrnorm.bias": "ln_pre.bias",
                 "post_layernorm.weight": "ln_post.weight", "post_layernorm.bias": "ln_post.bias"}
HF_BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


def text_from_hf(state):
    """transformers' CLIPTextModel (keys with or without `text_model.`) -> OpenCLIPText's weights.

    The text_encoder of diffusers video models is ViT-H without its last block and projection. For
    it, build CLIPConfig(text_layers=23, embed_dim=0) and read layer="last": the penultimate
    features of the full tower.
    """
    return from_hf(state, "text", HF_TOP)


def vision_from_hf(state):
    """State dict of transformers' CLIPVisionModelWithProjection -> OpenCLIPVision's."""
    return from_hf(state, "vision", HF_VISION_TOP)


def clip_from_hf(state):
    """State dict of transformers' CLIPModel (both towers) -> OpenCLIP's."""
    heads = "vision_model.", "visual_projection."
    vision = {k: v for k, v in state.items() if k.startswith(heads)}
    text = {k: v for k, v in state.items() if k not in vision and k != "logit_scale"}
    ours = text_from_hf(text) | {f"visual.{k}": v for k, v in vision_from_hf(vision).items()}
    return ours | {k: state[k] for k in ("logit_scale",) if k in state}


def from_hf(state, tower, top):
    """One tower, "text" or "vision"; top: names outside of the blocks, theirs -> ours."""
    out, qkv = {}, {}
    projection = {"text": ("text_projection.weight", "text_projection"),
                  "vision": ("visual_projection.weight", "proj")}[tower]
    for key, value in state.items():
        name = key.removeprefix(f"{tower}_model.")
        block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "embeddings.position_ids":  # a buffer of old transformers versions: 0, 1, 2 ...
            continue
        if name in top:
            out[top[name]] = value
        elif name == projection[0]:
            out[projection[1]] = value.T  # a Linear there, a matrix on the right in open_clip
        elif block and block[2] in HF_BLOCK:
            out[f"transformer.resblocks.{block[1]}.{HF_BLOCK[block[2]]}.{block[3]}"] = value
        elif block and block[2] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            fused = f"transformer.resblocks.{block[1]}.attn.in_proj_{block[3]}"
            qkv.setdefault(fused, {})[block[2][-6]] = value  # "q", "k" or "v"
        else:
            raise UserError(f"{key}: not a key of transformers' CLIP {tower} model")
    for fused, parts in qkv.items():
        if len(parts) < 3:
            raise UserError(f"{fused}: only {', '.join(sorted(parts))} of q, k, v are in the file")
        out[fused] = torch.cat([parts["q"], parts["k"], parts["v"]])  # rows: q, then k, then v
    return out


def clip_text_only(state):
    """The text tower's part of an open_clip state dict: all but visual.*."""
    return {key: value for key, value in state.items() if not key.startswith("visual.")}


def text_state(state, net, source):
    """Public weights -> OpenCLIPText's: of an open_clip file (both towers), or transformers'."""
    state = below(state, "cond_stage_model.model.")
    if any("encoder.layers." in k for k in state):
        state = text_from_hf(state)
    elif not any("resblocks" in k for k in state):
        raise UserError(f"{source}: not an OpenCLIP text tower: {looks_like(state)}")
    ours = net.state_dict()
    return {k: v for k, v in clip_text_only(state).items() if k in ours}


WAN_CLIP_NAMES = {"transformer.resblocks.": "transformer.", "class_embedding": "cls_embedding",
                  "positional_embedding": "pos_embedding", "conv1.": "patch_embedding.",
                  "ln_pre.": "pre_norm.", "ln_post.": "post_norm.", ".ln_": ".norm",
                  ".attn.in_proj_": ".attn.to_qkv.", ".attn.out_proj.": ".attn.proj.",
                  ".c_fc.": ".0.", ".c_proj.": ".2."}


def wan_clip_name(key):
    """Our key of OpenCLIPVision -> that of Wan's CLIP file, without `visual.`."""
    for ours, theirs in WAN_CLIP_NAMES.items():
        key = key.replace(ours, theirs)
    return "head" if key == "proj" else key


def image_state(state, net, source):
    """Public weights -> OpenCLIPVision's, of an open_clip file, Wan's, or in transformers' naming.

    A tower that is read before its last block takes what it needs of the file.
    """
    ours = net.state_dict()
    if any("encoder.layers." in k for k in state):
        state = vision_from_hf(state)
    elif not any(k.startswith("visual.") for k in state):
        raise UserError(f"{source}: has no OpenCLIP image tower: {looks_like(state)}")
    else:
        wan, state = "visual.cls_embedding" in state, below(state, "visual.")
        if wan:
            needed = {wan_clip_name(k) for k in ours}
            state = {k: v for k, v in state.items() if k in needed}
            state = rename(state, net, wan_clip_name, source)
    return state if "proj" in ours else {k: v for k, v in state.items() if k in ours}


# ---- T5 (Raffel et al., arXiv 1910.10683), its encoder only

@dataclass(frozen=True)
class T5Config:
    """Defaults: the encoder of T5 v1.1 XXL (4,762 M parameters), as CogVideoX uses it."""
    umt5: bool = False   # positions for each layer, and what is not of the prompt is zero (Wan)
    length: int = 226    # tokens that a prompt is padded or cut to (Open-Sora: 300)
    mask: bool = False   # hide the padding from the words (CogVideoX: no; Open-Sora: yes)
    vocab_size: int = 32128
    width: int = 4096
    heads: int = 64
    head_dim: int = 64
    hidden: int = 10240  # of the gated MLP
    layers: int = 24


UMT5_XXL = T5Config(umt5=True, length=512, mask=True, vocab_size=256384)  # Wan's, 5,681 M


class T5Text(nn.Module):
    """transformers' T5EncoderModel or UMT5EncoderModel, with its public keys.

    In fp16 its activations overflow.
    """

    def __init__(self, cfg=T5Config()):
        super().__init__()
        try:
            import transformers  # slow to import
        except ImportError:
            raise UserError("this base's text encoder is transformers' T5: pip install "
                            "transformers") from None
        self.cfg = cfg
        kind, options = transformers.T5EncoderModel, transformers.T5Config
        if cfg.umt5:
            kind, options = transformers.UMT5EncoderModel, transformers.UMT5Config
        model = kind(options(
            vocab_size=cfg.vocab_size, d_model=cfg.width, num_heads=cfg.heads, d_kv=cfg.head_dim,
            d_ff=cfg.hidden, num_layers=cfg.layers, feed_forward_proj="gated-gelu",
            dropout_rate=0.0, is_encoder_decoder=False, use_cache=False))
        self.shared, self.encoder = model.shared, model.encoder
        self.encoder.embed_tokens = None  # `shared` by another name; public files leave it out

    def forward(self, ids):
        """ids (b, n) long, 0 for padding (read like words without cfg.mask) -> (b, n, width)."""
        mask = (ids != 0).long() if self.cfg.mask else torch.ones_like(ids)
        out = self.encoder(inputs_embeds=self.shared(ids), attention_mask=mask).last_hidden_state
        return out * mask[..., None].to(out.dtype) if self.cfg.umt5 else out


UMT5_NAMES = {"encoder.block.": "blocks.", "shared.": "token_embedding.",
              "encoder.final_layer_norm.": "norm.", "layer.0.layer_norm.": "norm1.",
              "layer.1.layer_norm.": "norm2.",
              "layer.0.SelfAttention.relative_attention_bias.": "pos_embedding.embedding.",
              "layer.0.SelfAttention.": "attn.", "layer.1.DenseReluDense.": "ffn.",
              ".wi_0.": ".gate.0.", ".wi_1.": ".fc1.", ".wo.": ".fc2."}


def umt5_name(key):
    """Key of T5Text -> that of Wan's models_t5_umt5-xxl-enc-bf16.pth."""
    for ours, theirs in UMT5_NAMES.items():
        key = key.replace(ours, theirs)
    return key


def t5_state(state, net, source):
    """Public weights, with or without a decoder -> T5Text's; of UMT5 also with Wan's own keys."""
    ours = net.state_dict()
    if "token_embedding.weight" in state:
        return rename(state, net, umt5_name, source)
    state = {"shared.weight": state.get("encoder.embed_tokens.weight")} | state  # one table
    return {k: v for k, v in state.items() if k in ours and v is not None}


def clean_text(text):
    """As Wan does before its tokenizer: repair the encoding and HTML, single blanks."""
    try:
        import ftfy  # comes with open_clip
    except ImportError:
        raise UserError("cleaning prompts for UMT5 needs ftfy: pip install ftfy") from None
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def t5_tokenizer(path, length, clean=None):
    """T5's or UMT5's spiece.model or tokenizer.json -> fn(list of str): ids (b, length) long.

    Ids are [words, 1, 0 ...]; a longer text is cut before the 1. clean: what is done to a text
    first (Wan: clean_text).
    """
    encode, decode = pieces_of(check_file(path, "tokenizer of the base"))

    def tokenize(texts):
        ids, lost = torch.zeros(len(texts), length, dtype=torch.long), {}
        for row, text in zip(ids, texts):
            tokens = encode(clean(text) if clean else text)
            lost[text] = decode(tokens[length - 1:])
            tokens = [*tokens[:length - 1], 1]
            row[:len(tokens)] = torch.tensor(tokens)
        say_cut(lost, len(texts), length)
        return ids
    return tokenize


def pieces_of(path):
    """A model of sentencepiece, a text encoder of ComfyUI's that holds one, or a tokenizer.json ->
    encode(str): ids, decode(ids): str."""
    if path.suffix == ".json":
        from tokenizers import Tokenizer  # comes with transformers
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # it raises no other kind
            raise UserError(f"{path}: not a tokenizer.json ({str(e)[:80]})") from None
        return (lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
                tokenizer.decode)
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError("T5's tokenizer needs sentencepiece: pip install sentencepiece") from None
    model = dict(model_file=str(path))
    if path.suffix == ".safetensors":
        model = dict(model_proto=stored_bytes(path, "spiece_model"))
    try:
        pieces = SentencePieceProcessor(**model)
    except (RuntimeError, OSError) as e:
        raise UserError(f"{path}: not a model of sentencepiece ({str(e)[:80]})") from None
    return pieces.encode, pieces.decode


# ---- DINO

class DINO(nn.Module):
    """Self-supervised image tower (Caron et al., arXiv 2104.14294), ViT-S/16 by default.

    It tells two subjects of a kind apart, where CLIP sees the kind. The public file
    (dino_deitsmall16_pretrain.pth) loads through weights.rename with dino_name.
    """

    def __init__(self, width=384, heads=6, layers=12, patch_size=16, image_size=224):
        super().__init__()
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        patches = (image_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patches, width))
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.transformer = Transformer(width, heads, layers, eps=1e-6)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        """images (n, 3, h, w) in ImageNet's mean and std, sides in patches -> (n, width)."""
        x = self.patch_embed(images)
        first, table = self.pos_embed.split([1, self.pos_embed.shape[1] - 1], dim=1)
        side = math.isqrt(table.shape[1])
        if x.shape[2:] != (side, side):
            table = table.transpose(1, 2).unflatten(2, (side, side))
            table = F.interpolate(table, x.shape[2:], mode="bicubic").flatten(2).transpose(1, 2)
        x = x.flatten(2).transpose(1, 2) + table  # (n, patches, width), row by row
        x = torch.cat([(self.cls_token + first).expand(len(x), -1, -1), x], dim=1)
        return self.norm(self.transformer(x))[:, 0]


DINO_NAMES = {"patch_embed.": "patch_embed.proj.", "transformer.resblocks.": "blocks.",
              ".ln_": ".norm", ".attn.in_proj_": ".attn.qkv.", ".attn.out_proj.": ".attn.proj.",
              ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}


def dino_name(key):
    """Our key of DINO -> the public file's."""
    for ours, theirs in DINO_NAMES.items():
        key = key.replace(ours, theirs)
    return key
