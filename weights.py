"""Weight files: download, layouts, strict loading, LoRA formats, and our own checkpoints.

This file is independent of the networks: each network's file defines the map from public names to
ours and passes it in.
"""
import json
import math
import os
import re
import zipfile
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common import (
    UserError, check_file, check_folder, crc32, is_a, is_finite, is_plain, json_object,
    known_fields, one_per_machine, read_meta, read_text, steps_saved, warn, write_atomic)

# ---- our own checkpoints

def run_file(text):
    """--ckpt FOLDER, or FOLDER:STEP for a step that --keep kept -> what load_checkpoint() takes."""
    folder, _, step = text.rpartition(":")
    check_folder(folder)
    if not folder or not step.isdigit() or Path(text).exists():
        return Path(text)
    file = Path(folder, f"ckpt-{step}.safetensors")
    if not file.exists():
        kept = ", ".join(map(str, sorted(steps_saved(folder)))) or "none"
        raise UserError(f"--ckpt {text}: no such step there; kept are {kept} (--keep K keeps more)")
    return file


def load_checkpoint(path):
    """One of our runs (its folder, or a ckpt*.safetensors in it) -> ({key: tensor}, meta).

    If ckpt.safetensors of a folder is corrupt, the newest ckpt-<step>.safetensors that is whole
    is read.
    """
    path = Path(path)
    check_folder(path)
    files = [path]
    if path.is_dir():
        names = ["ckpt.safetensors", *(f"ckpt-{k}.safetensors" for k in steps_saved(path))]
        files = [path / name for name in names if (path / name).exists()]
    if not files or not files[0].exists():
        raise UserError(f"--ckpt {path}: no ckpt.safetensors there; give the --out folder of a "
                        "finished run")
    for file in files:
        try:
            tensors, text = load_safetensors(file)
            if "crc32" in text and text["crc32"] != str(crc32(tensors, text.get("nanovideo", ""))):
                raise UserError(f"{file}: corrupt (its checksum differs)")
            break
        except UserError as e:
            if file == files[-1]:
                raise
            warn(f"{e}; trying the one before it")
    if "nanovideo" not in text:
        raise UserError(f"--ckpt {path}: not a nanovideo checkpoint ({looks_like(tensors)}); "
                        "public weights go to --weights, public LoRA files to --lora")
    if not tensors:
        raise UserError(f"{file}: holds no tensors; the file is damaged")
    bad = next((k for k, v in tensors.items() if not is_plain(v)), None)
    if bad:
        raise UserError(f"{file}: {bad} is not a tensor of finite numbers; the run had diverged, "
                        "or the file is damaged")
    return tensors, read_meta(json_object(text["nanovideo"], file), file)


def run_meta(path):
    """The metadata of a run's file, None of other files. The tensors are not read."""
    if Path(path).suffix == ".json" or kind_of(path) != "safetensors":  # an index of shards
        return None
    try:
        with safe_open(path, "pt") as f:
            text = (f.metadata() or {}).get("nanovideo")
    except Exception as e:  # its own error
        raise UserError(f"{path}: not a whole safetensors file ({str(e)[:100]})") from None
    return read_meta(json_object(text, path), path) if text is not None else None


# before the keys of a run's tensors that are not the network's
LEARNED = "string_to_param."  # words of textual inversion, as in DreamVideo's files
PREFIXES = {"text": "text_encoder.", "image": "image_encoder.", "motion": "motion_encoder.",
            "learned": LEARNED}


def run_parts(tensors) -> dict:
    """The tensors of a run -> {"net", "text", "image", "motion", "learned": what it trained there}.

    Keys are bare; "learned" is {word: vectors (N, width)}.
    """
    parts = {part: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
             for part, prefix in PREFIXES.items()}
    others = tuple(PREFIXES.values())
    return {"net": {k: v for k, v in tensors.items() if not k.startswith(others)}} | parts


# ---- reading weight files

NOT_WEIGHTS = {  # how a file begins -> what it is and what to do
    b"version https://git-lfs": "a Git LFS pointer, not the file: git lfs pull, or download it",
    b"<": "a web page, not the file: the download needs a login, or another address",
    b"{": "JSON text, not weights: an error message, or a config",
    b"GGUF": "GGUF (quantized for llama.cpp): take the safetensors file",
    b"\x89HDF": "HDF5 (Keras): take the PyTorch file",
    b"\x1f\x8b": "packed by gzip: unpack it", b"7z\xbc\xaf": "packed by 7-Zip: unpack it",
    b"Rar!": "packed by RAR: unpack it", b"\x93NUMPY": "a NumPy array, not weights",
    b"\0\0\0\0\0\0\0\0": "zeros at its start: the download was not finished"}


def kind_of(path):
    """"safetensors" or "torch", by the file's content, whatever its name; UserError for others."""
    path = Path(path)
    if os.path.isfile(os.path.join(path, ".metadata")):
        raise UserError(f"{path}: a folder of torch.distributed.checkpoint: convert it with python "
                        "-m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE")
    with check_file(path).open("rb") as file:
        start = file.read(64)
    if not start:
        raise UserError(f"{path}: empty; the download failed: fetch it again")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 10 ** 9:
        return "safetensors"
    for mark, what in NOT_WEIGHTS.items():
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(mark):
            raise UserError(f"{path}: {what}")
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    return "safetensors" if path.suffix == ".safetensors" else "torch"


def load_safetensors(path):
    """-> ({key: tensor on the CPU}, metadata)."""
    check_file(path)
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except Exception as e:  # its own error, or a type that this PyTorch lacks
        raise UserError(f"{path}: not a whole safetensors file ({str(e)[:100]}); "
                        "a download or copy was cut off: fetch it again") from e


def stored_bytes(path, key) -> bytes:
    """A file that a safetensors file holds as a tensor of bytes."""
    check_file(path)
    try:
        with safe_open(path, "pt") as f:
            return bytes(f.get_tensor(key).numpy())
    except Exception as e:  # its own error, or no such key
        raise UserError(f"{path}: holds no {key} ({str(e)[:100]})") from None


class Shell:
    """Stands in for any class that a file names besides its tensors, and keeps nothing of it."""

    def __init__(self, *args, **kw):
        pass

    def __setstate__(self, state):
        pass


def load_pickle(path, allow=(), shells=False):
    """torch.load on the CPU that runs no code from the file.

    allow: classes that the file may hold besides tensors. shells: replace all others by a Shell,
    such as Lightning's callbacks in Stable Diffusion's files.
    """
    allow = list(allow)
    try:
        # of a path, torch would go by the suffix
        with check_file(path).open("rb") as file:
            if zipfile.is_zipfile(file):
                infos = zipfile.ZipFile(file).infolist()
                if any(info.compress_type for info in infos):  # torch never does
                    raise ValueError("a compressed archive")
                if not any(info.filename.endswith("data.pkl") for info in infos):
                    raise ValueError("a zip archive of other things")
                file.seek(0)
                if shells:
                    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
                    allow += [(Shell, name) for name in unsafe]
            file.seek(0)
            with torch.serialization.safe_globals(allow):
                return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as e:  # zip, pickle and EOF errors alike mean one thing to the user
        reason = (str(e) or repr(e)).splitlines()[0][:100]
        raise UserError(f"{path}: not a whole PyTorch file, or not one of plain tensors "
                        f"({reason}); fetch it again") from e


def open_weights(path):
    """A weight file -> ({key: tensor} as it is in the file, or a list of tensors; metadata).

    Of a file in shards, give the index (*.index.json). What holds the tensors is taken out of its
    wrappers, an averaged copy (EMA) before the plain one.
    """
    path = Path(path)
    if path.name.endswith(".json") and ".index." in path.name:
        state = {}
        for shard in shards_of(path):
            state |= open_weights(path.parent / shard)[0]
        return state, {}
    state, text = load_safetensors(path) if kind_of(path) == "safetensors" else (
        load_pickle(path, shells=True), {})
    if not isinstance(state, list):
        state = unwrap(state, path)
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta
                                          or value.nbytes > value.untyped_storage().nbytes()):
            raise UserError(f"{path}: {key} is not a tensor whose numbers are all in the file")
    return state, text


AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|averaged?)([^a-z]|$)", re.IGNORECASE)
WRAPPERS = ("state_dict", "unet_state_dict", "model_state_dict", "module", "model", "net",
            "network", "unet", "transformer", "generator", "params", "weights")


def tensors_in(value, depth=4) -> int:
    """How many tensors a dictionary holds, in dictionaries within it, too."""
    if isinstance(value, dict) and depth:
        return sum(tensors_in(part, depth - 1) for part in value.values())
    return int(isinstance(value, Tensor))


def unwrap(state, path) -> dict:
    """{"state_dict": {key: tensor} ...} in any depth -> {key: tensor}; says which part it takes."""
    for _ in range(8):  # a hostile file may hold itself
        if not isinstance(state, dict):
            raise UserError(f"{path}: holds no tensors but a {type(state).__name__}")
        sizes = {k: tensors_in(v) for k, v in state.items() if isinstance(v, dict)}
        held = [k for k in sizes if sizes[k] and "optim" not in str(k)]
        parts = [k for k in held if AVERAGED.search(str(k))]
        parts += [k for k in WRAPPERS if sizes.get(k) and k not in parts]
        if not parts and not any(isinstance(v, Tensor) for v in state.values()):
            parts = [k for k in sizes if sizes[k]]
            if len(parts) > 1:
                raise UserError(f"{path}: holds several parts ({', '.join(map(str, parts[:8]))}); "
                                "save the one that is wanted alone")
        if not parts:
            break
        # an average may have been kept of a few tensors only
        whole = [k for k in parts if 2 * sizes[k] >= max(sizes[k] for k in parts)]
        if len(held) > 1:
            warn(f"{path}: holds {', '.join(map(str, held))}; {whole[0]} is taken")
        state = state[whole[0]]
    named = {k: v for k, v in state.items() if isinstance(k, str)}
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
    tensors |= {k: torch.tensor(v) for k, v in named.items()  # of a LoRA
                if k.endswith(".alpha") and is_a(v, (float, -1e9, 1e9))}
    if not tensors:
        first = ", ".join(str(k)[:60] for k in list(state)[:5])
        raise UserError(f"{path}: holds no tensors (its first keys: {first})")
    return tensors


# what training, compilers, trainers and other programs put before every key, or within keys
OUTER = ("module.", "_forward_module.", "model.diffusion_model.", "diffusion_model.", "model.",
         "net.", "network.", "unet.", "transformer.", "generator.", "ema_model.", "ema.",
         "_module.", "student.", "denoiser.", "dit.", "backbone.", "pipe.", "pipeline.")
INNER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def bare_keys(state, path) -> dict:
    """{key: tensor} without the wrappers of OUTER that all keys carry, and without those of INNER.

    Counters beside wrapped keys (AveragedModel's n_averaged) are dropped. Of keys "ema_model.x" and
    "online_model.x" the average is taken.
    """
    bare = {INNER.sub("", k): v for k, v in state.items()}
    if len(bare) < len(state):
        raise UserError(f"{path}: two keys differ by a wrapper only, such as _orig_mod.")
    while bare:
        keys = [k for k, v in bare.items() if v.ndim] or list(bare)
        prefix = next((p for p in OUTER if all(k.startswith(p) for k in keys)), None)
        if prefix is None:
            break
        bare = {k.removeprefix(prefix): v for k, v in bare.items() if k.startswith(prefix)}
    for prefix, other in (("ema_model.", "online_model."), ("ema_model.", "model."),
                          ("ema.", "model."), ("ema.", "net.")):
        both = [k for k in bare if k.startswith(prefix) and other + k[len(prefix):] in bare]
        if both:
            warn(f"{path}: holds {other}* and {prefix}*; {prefix}* is taken")
            return bare_keys({k.removeprefix(prefix): bare[k] for k in both}, path)
    return bare


def load_weights(path, lists=False) -> dict:
    """A weight file (.safetensors, .pt, .pth, .bin, .ckpt, by its content) -> {key: tensor}, the
    keys without wrappers.

    Of a file in shards, give the index (*.index.json). lists: return a list of tensors as it is.
    """
    state, _ = open_weights(path)
    if isinstance(state, list) and not lists:
        raise UserError(f"{path}: a list of {len(state)} tensors without names, like T2V-Turbo's "
                        "LoRA")
    return state if isinstance(state, list) else bare_keys(from_fp8(state, path), path)


FP8_SCALES = ".scale_weight", ".weight_scale"  # ComfyUI's names, of a layer
# what else its fp8 files hold: marks, and scales of activations, which are not needed
FP8_MARKS = "scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant"


def from_fp8(state, path) -> dict:
    """{key: tensor} of a file in fp8, such as ComfyUI's *_fp8_scaled: weights times their scales,
    in bf16. Other files as they are."""
    packed = [k for k, v in state.items() if v.is_floating_point() and v.element_size() == 1]
    if not packed:
        return state
    plain = {k: v for k, v in state.items() if not k.endswith(FP8_SCALES + FP8_MARKS)}
    for key in plain.keys() & set(packed):
        layer, weight = key.removesuffix(".weight"), state[key].float()
        scale = next((state[layer + end] for end in FP8_SCALES if layer + end in state), None)
        if scale is not None and scale.numel() not in (1, len(weight)):
            raise UserError(f"{path}: the fp8 scales of {key} are not one or one per row; take a "
                            "file in bf16 or fp16")
        if scale is not None:
            weight = weight * scale.float().view(-1, *[1] * (weight.ndim - 1))
        plain[key] = weight.bfloat16()
    return plain


def config_file(path) -> dict:
    """A JSON file that comes with weights."""
    return json_object(read_text(path), path)


def shards_of(index):
    """The index of a file in shards (*.index.json) -> names of the shards, files beside it."""
    names = config_file(Path(index)).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    if not names or not all(isinstance(n, str) and n == Path(n).name and not n.endswith(".json")
                            for n in names):
        raise UserError(f"{index}: not an index of a file in shards, which names files beside it")
    return sorted(set(names))


# where a file of several parts has them: ComfyUI's, Stable Diffusion's, diffusers' names
PARTS = {
    "net": ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer."),
    "vae": ("first_stage_model.", "vae."),
    "text": ("cond_stage_model.model.", "cond_stage_model.transformer.",
             "text_encoders.clip_h.transformer.", "text_encoders.t5xxl.transformer.",
             "text_encoders.umt5xxl.transformer.", "text_encoder."),
    "image": ("image_encoder.", "clip_vision.")}


def below(state, *prefixes):
    """The tensors whose keys start with the first of `prefixes` that occurs, without it; `state`
    itself if none does."""
    for prefix in prefixes:
        cut = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if cut:
            return cut
    return state


def replace_part(path, part, state):
    """Write {key: tensor} in fp16 as "part.key" into a file of assets/, whose other parts stay."""
    old = load_safetensors(path)[0] if Path(path).exists() else {}
    kept = {k: v for k, v in old.items() if not k.startswith(f"{part}.")}
    new = {f"{part}.{k}": v.detach().half().contiguous().cpu() for k, v in state.items()}
    write_atomic(path, lambda p: save_file(kept | new, p))


KINDS = {  # part of a key that only this kind of file has -> the kind; the first match counts
    "_adapter.": "a DreamVideo adapter",
    "_lora.down_linear": "InstructVideo's fine-tuned file",
    "lora": "a LoRA file",
    "image_latents": "I2VGen-XL in diffusers layout",
    "local_image_concat": "I2VGen-XL",
    "context_embedding.tokens": "HiGen",
    "depth_embedding": "VideoComposer",
    "pre_image_condition": "TF-T2V",
    "image_proj_model": "VideoCrafter1 image-to-video",
    "time_cond_proj": "T2V-Turbo",
    "init_attn": "VideoCrafter2",
    "transformer_blocks_copy": "Diffusion as Shader",
    "vace_": "Wan's VACE",
    "condition_embedder.time_proj": "Wan in diffusers layout",
    "time_projection.": "Wan",
    "fusion1.layer1.": "MiDaS",
    "cls_embedding": "Wan's CLIP",
    "pos_embedding.embedding": "a UMT5 encoder",
    "conv_y": "a CogVideoX autoencoder",
    "downsamples.0.downsamples.": "a Wan2.2 autoencoder",
    "encoder.downsamples.0.residual.": "a Wan2.1 autoencoder",
    "down_blocks.0.resnets.0.norm1.gamma": "a Wan2.2 autoencoder in diffusers layout",
    "down_blocks.0.norm1.gamma": "a Wan2.1 autoencoder in diffusers layout",
    "SelfAttention": "a T5 encoder",
    "input_blocks.1.3.": "DEMO",
    "encoder.down_blocks": "an SD autoencoder in diffusers layout",
    "down_blocks": "a diffusers UNet",
    "temopral_conv": "a VGen or ModelScope UNet",
    "first_stage_model": "a Stable Diffusion checkpoint",
    "input_blocks": "an image UNet of Stable Diffusion",
    "decoder.up.": "an SD autoencoder",
    "resblocks": "an OpenCLIP model",
    "text_model.": "a transformers CLIP text model",
    "vision_model.": "a transformers CLIP image model",
    "transformer_blocks.0.norm1.linear": "CogVideoX",
}


def looks_like(state) -> str:
    """What kind of public file has these keys, in words."""
    for part, kind in KINDS.items():
        if any(part in k for k in state):
            return f"it looks like {kind}"
    return f"unknown keys such as {next(iter(state), 'none')}"


# ---- strict loading

def load_strict(net, state, name):
    """load_state_dict() with a one-line error: what the file appears to be, the first faults."""
    want = net.state_dict()
    both = [k for k in want if k in state]
    real = [k for k in both if want[k].is_floating_point()]
    faults = {"missing": [k for k in want if k not in state],
              "unexpected": [k for k in state if k not in want],
              "of another shape": [k for k in both if want[k].shape != state[k].shape],
              "of whole numbers": [k for k in real if not state[k].is_floating_point()]}
    faults["with NaN or infinity"] = [] if any(faults.values()) else [
        k for k in real if not (state[k].is_meta or is_finite(state[k]))]
    if any(faults.values()):
        counts = "; ".join(f"{len(keys)} {fault}, first {keys[0]}"
                           for fault, keys in faults.items() if keys)
        raise UserError(f"{name}: these are not its weights ({looks_like(state)}): {counts}")
    net.load_state_dict(state, assign=next(net.parameters()).is_meta)


def rename(state, net, name_of, source):
    """{their key: tensor} -> {our key: tensor}, in our shapes (their Linear, our 1x1 convolution).

    name_of(our key) -> their key. Keys that are missing or left over are a UserError.
    """
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    theirs = {name_of(k): k for k in shapes}
    missing, extra = [k for k in theirs if k not in state], [k for k in state if k not in theirs]
    if missing or extra:
        first = f"missing {missing[0]}" if missing else f"unexpected {extra[0]}"
        raise UserError(f"{source}: these are not its weights ({looks_like(state)}): "
                        f"{len(missing)} missing, {len(extra)} unexpected, first: {first}")
    wrong = [k for k, ours in theirs.items() if state[k].numel() != shapes[ours].numel()]
    if wrong:
        raise UserError(f"{source}: these are not its weights ({looks_like(state)}): "
                        f"{len(wrong)} of another shape, first {wrong[0]}")
    return {ours: state[their].reshape(shapes[ours]) for their, ours in theirs.items()}


# ---- LoRA files -> {our layer + ".lora_A.weight" or ".lora_B.weight": tensor}

# what a folder of peft, of diffusers or of ours calls it
LORA_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "ckpt.safetensors",
              "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


def lora_file(text):
    """--lora FILE or FILE:SCALE -> (path, scale); the file is there. FILE may be its folder."""
    path, _, scale = text.rpartition(":")
    try:
        path, scale = (path, float(scale)) if path else (text, 1.0)
    except ValueError:  # the colon is part of the name
        path, scale = text, 1.0
    if not math.isfinite(scale):
        raise UserError(f"--lora {text}: the scale {scale} is no number")
    check_folder(path)
    inside = [Path(path, name) for name in LORA_NAMES if os.path.isfile(os.path.join(path, name))]
    return check_file(inside[0] if inside else path), scale


# a key's tail: peft's .lora_A.weight and .lora_A.default.weight, kohya's .lora_down.weight,
# diffusers' .lora.down.weight, .lora_linear_layer.down.weight, .processor.to_q_lora.down.weight
LORA_TAIL = re.compile(r"(.+?)[._]lora(?:_linear_layer|_layer)?[._](A|B|down|up)"
                       r"(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?")
LORA_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B"}
# what programs put before a layer's name; kohya's has "_" for every "."
LORA_HEAD = re.compile(
    r"(base_model|diffusion_model|model|module|_forward_module|unet|transformer|net|"
    r"lora_unet|lora_transformer|lora|lycoris)[._]|_")
TEXT_LORA = re.compile(r"lora_te\d*_|(base_model\.model\.)?(text_encoder|te)(_?\d)?\.")
LORA_FORMATS = {"lora_unet_": "kohya's", "lora_te": "kohya's", "lycoris_": "LyCORIS's",
                "base_model.model.": "peft's", "diffusion_model.": "ComfyUI's",
                ".lora.": "old diffusers'", ".processor.": "old diffusers'",
                "unet.": "diffusers'", "transformer.": "diffusers'", "text_encoder": "diffusers'",
                ".lora_A": "peft's", ".lora_down": "kohya's", ".lora_up": "kohya's"}
NOT_LORA = {  # a part of a key -> what only looks like LoRA
    "magnitude_vector": "DoRA", "dora_scale": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr",
    "lora_mid": "LoRA with a middle matrix (CP decomposition)", "lora_embedding": "LoRA of words",
    "vera_lambda": "VeRA", "ia3_l": "IA3", "oft_": "OFT", "modules_to_save": "whole layers",
    "diff_": "differences of other kinds", ".bias": "biases", "bias_": "biases",
    "w_norm": "norms", "b_norm": "norms", "on_input": "IA3"}
# beside a LoRA: what is added to a layer's parameter, a difference of two networks
DIFFERENCES = {".diff": "weight", ".diff_b": "bias"}


def lora_format(state):
    """Format of a LoRA file that open_weights() read: "turbo", "named", ... or None."""
    if isinstance(state, list):
        return "turbo"
    if any("_lora.down_linear" in k for k in state):
        return "instructvideo"
    marks = [m for m in NOT_LORA if m not in (".bias", "bias_", "diff_")]
    if any(LORA_TAIL.fullmatch(k) or any(m in k for m in marks) for k in state):
        return "named"
    return "adapters" if any("_adapter." in k for k in state) else None


def find_layer(name, layers):
    """A layer as some program names it -> ours, or None. layers: {name of a layer: ours}."""
    name = INNER.sub("", name.replace(".processor.", "."))
    while name not in layers and f"{name}.0" not in layers:  # diffusers' to_out is ours .0
        head = LORA_HEAD.match(name)
        if not head:
            return None
        name = name[head.end():]
    return layers.get(name) or layers[f"{name}.0"]


def named_lora(state, text, path, layers):
    """A LoRA of any program but T2V-Turbo's and InstructVideo's -> ({our layer + ".lora_A.weight"
    or ".lora_B.weight": tensor in float32}, {our layer: scale}, {our parameter: tensor to add}).

    state, text: open_weights(path); layers {public name: ours}.
    """
    flat = {name.replace(".", "_"): ours for name, ours in layers.items()}
    layers, source = flat | layers, f"--lora {path}"
    lora, names, alphas, differences, strange, texts = {}, {}, {}, {}, [], []
    kind = next((v for k, v in LORA_FORMATS.items() if any(k in key for key in state)), "bare")
    for key, value in state.items():
        tail, (bare, dot, end) = LORA_TAIL.fullmatch(key), key.rpartition(".")
        parameter = DIFFERENCES.get(dot + end)
        if not (tail or parameter or end == "alpha"):
            what = next((what for mark, what in NOT_LORA.items() if mark in key), "a whole tensor")
            raise UserError(f"{source}: {key} is of {what}, which is not supported: merge it into "
                            "its base with the program that made it")
        name = tail[1] if tail else bare
        ours = find_layer(name, layers)
        if ours is None and TEXT_LORA.match(name):
            texts.append(name)
        elif ours is None:
            strange.append(name)
        elif parameter:
            differences[f"{ours}.{parameter}"] = value
        elif tail is None:
            alphas[ours] = value
        else:
            ours_key = f"{ours}.lora_{LORA_SIDES[tail[2]]}.weight"
            if ours_key in lora:
                raise UserError(f"{source}: holds two LoRA of {ours} (such as {key}); save one")
            names[ours] = name
            lora[ours_key] = value.float() if value.is_floating_point() else value
    if strange:
        first, *more = dict.fromkeys(strange)
        others = f", nor do {len(more)} more, such as {', '.join(more[:3])}" if more else ""
        raise UserError(f"{source}: a LoRA file in {kind} names: {first} belongs to no layer of "
                        f"this network{others}; give the base that it was made for")
    if not lora:
        of = " but those of the text encoder" if texts else ""
        raise UserError(f"{source}: holds no matrices of a LoRA of the network{of}")
    if texts:
        warn(f"{source}: a LoRA file in {kind} names: what it has for the text encoder is left out "
             f"(such as {texts[0]}), so prompts may have less effect than its author saw")
    downs = {ours: lora.get(f"{ours}.lora_A.weight") for ours in names}
    ranks = {ours: len(down) for ours, down in downs.items() if down is not None and down.ndim}
    return lora, lora_scales(path, text, state, names, ranks, alphas), differences


def turbo_lora(tensors, layers, path):
    """T2V-Turbo's list without names, [B_0, A_0, B_1, A_1, ...]; layers: our names in its order."""
    if len(tensors) != 2 * len(layers) or not all(isinstance(x, Tensor) for x in tensors):
        raise UserError(f"{path}: a list of {len(tensors)} tensors, but T2V-Turbo's LoRA of this "
                        f"network is a list of {2 * len(layers)}")
    lora = {f"{layer}.lora_A.weight": down for layer, down in zip(layers, tensors[1::2])}
    return lora | {f"{layer}.lora_B.weight": up for layer, up in zip(layers, tensors[::2])}


# fields of adapter_config.json that are read here, and those that change nothing
CONFIG_FIELDS = dict(
    peft_type=("LORA",), r=(int, 1, 10 ** 6), lora_alpha=(float, -1e6, 1e6), use_rslora=bool,
    bias=("none",))
CONFIG_READ = {*CONFIG_FIELDS, "rank_pattern", "alpha_pattern", "target_modules",
               "exclude_modules", "layers_to_transform", "init_lora_weights"}
CONFIG_IDLE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "ephemeral_gpu_offload", "eva_config", "inference_mode", "layers_pattern", "loftq_config",
    "lora_dropout", "megatron_core", "parent_library", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type"}


def lora_config(path, text):
    """The config of a LoRA file and where it stands: adapter_config.json beside it, or metadata
    of diffusers or kohya in it. None: there is none."""
    beside = Path(path).parent / "adapter_config.json"
    if os.path.lexists(beside):
        return config_file(beside), beside
    source = f"--lora {path}: its metadata"
    if "lora_adapter_metadata" in text:  # {"transformer.r": 4, "text_encoder.r": 4 ...}
        config = json_object(text["lora_adapter_metadata"], source)
        head = next((h for h in ("transformer.", "unet.") if any(k.startswith(h) for k in config)),
                    "")
        return {k.removeprefix(head): v for k, v in config.items() if k.startswith(head)}, source
    try:
        config = dict(r=int(text["ss_network_dim"]), lora_alpha=float(text["ss_network_alpha"]))
    except (KeyError, ValueError):  # none, or "Dynamic"
        return None, source
    return config, source


def check_config(config, source):
    """Refuse a config with a field that changes the result and is not read here."""
    for name, value in config.items():
        if name not in CONFIG_READ | CONFIG_IDLE and value not in (None, False, [], {}, "", "none"):
            raise UserError(f"{source}: {name} = {str(value)[:60]} is not supported: merge the "
                            "LoRA into its base with the program that made it")
    known_fields({k: config.get(k) for k in CONFIG_FIELDS}, CONFIG_FIELDS, source)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        raise UserError(f"{source}: init_lora_weights = {start[:60]} changes the base, too, which "
                        "is not supported: convert it to plain LoRA with peft")
    for name in ("r", "lora_alpha"):
        if config.get(name) is None:
            raise UserError(f"{source}: has no {name}, so the scale is unknown; add it")


def pattern_value(config, field, layer, default, source):
    """rank_pattern or alpha_pattern {end of a layer's name: number} at `layer`."""
    patterns = config.get(field) or {}
    if not is_a(patterns, dict) or not is_a(list(patterns.values()), [(float, -1e6, 1e6)]):
        raise UserError(f"{source}: {field} is not {{layer: number}}")
    for name, value in patterns.items():
        if not re.fullmatch(r"[\w.-]+", name):  # a hostile one takes for ever to match
            raise UserError(f"{source}: {field} has {name[:60]!r}: regular expressions are not "
                            "supported: write the layers' names")
        if f".{layer}".endswith(f".{name}"):
            return value
    return default


def check_selected(config, layer, source):
    """Refuse a file with a layer that its config leaves out: peft would not apply it."""
    wanted, left_out = (config.get(k) for k in ("target_modules", "exclude_modules"))
    ends = [[isinstance(x, str) and f".{layer}".endswith(f".{x}") for x in names]
            for names in (wanted, left_out) if isinstance(names, list) and names]
    blocks = config.get("layers_to_transform")
    blocks = blocks if isinstance(blocks, list) or blocks is None else [blocks]
    number = re.search(r"[._](\d+)[._]", layer)
    faults = {"target_modules": isinstance(wanted, list) and wanted and not any(ends[0]),
              "exclude_modules": isinstance(left_out, list) and left_out and any(ends[-1]),
              "layers_to_transform": blocks and number and int(number[1]) not in blocks}
    for field, fault in faults.items():
        if fault:
            raise UserError(f"{source}: {field} leaves out {layer}, which the file holds; they do "
                            "not belong together")


def lora_scales(path, text, state, names, ranks, alphas):
    """{our layer: factor of its B A}: alpha / rank, of the layer's own alpha, else the config's.

    names {our layer: the file's}; ranks {our layer: rank}; alphas {our layer: tensor}.
    """
    config, source = lora_config(path, text)
    plain, scales = 1.0, {}
    if "nanovideo" in text:  # one of our runs: a narrow layer has a smaller rank, the same scale
        meta = read_meta(json_object(text["nanovideo"], source), source)
        if not meta["rank"]:
            raise UserError(f"{source} is of whole weights, not of a LoRA")
        if "init" in meta:
            warn(f"{source}: was trained on top of --init, which is left out; --ckpt has it, too")
        config, plain = None, meta["alpha"] / meta["rank"]
    elif config is not None:
        check_config(config, source)
    for ours, rank in ranks.items():
        scales[ours] = plain
        layer = names[ours].removeprefix("base_model.model.")
        if config is not None:
            check_selected(config, layer, source)
        if ours in alphas:
            alpha = alphas[ours]
            if (alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(alpha.item())
                    or not rank):
                raise UserError(f"--lora {path}: the alpha of {layer} is not one number")
            scales[ours] = alpha.item() / rank
        elif config is not None:
            r = pattern_value(config, "rank_pattern", layer, config["r"], source)
            if r != rank:
                raise UserError(f"{source}: says rank {r} of {layer}, which has {rank}; it belongs "
                                "to another file")
            alpha = pattern_value(config, "alpha_pattern", layer, config["lora_alpha"], source)
            scales[ours] = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        if scales[ours] == 0:
            raise UserError(f"--lora {path}: the alpha of {layer} is 0, so the LoRA would do "
                            "nothing; give the alpha that it was trained with")
    known = config is not None or "nanovideo" in text or ranks.keys() <= alphas.keys()
    if not known and kind_of(path) == "torch" and all(k.startswith("base_model.") for k in state):
        warn(f"--lora {path}: tells no alpha; 8 is taken, peft's default, as VADER's files need")
        return {ours: 8 / rank if rank else 1.0 for ours, rank in ranks.items()}
    if not known:
        warn(f"--lora {path}: tells no alpha; scale 1 is taken (alpha = rank)")
    return scales


# what --export writes: (before a layer's name, A, B, the file)
LORA_FILES = {
    "diffusers": ("transformer.", "lora_A", "lora_B", "pytorch_lora_weights.safetensors"),
    "comfyui": ("diffusion_model.", "lora_down", "lora_up", "comfyui_lora.safetensors"),
    "kohya": ("lora_unet_", "lora_down", "lora_up", "kohya_lora.safetensors"),
    "peft": ("base_model.model.", "lora_A", "lora_B", "adapter_model.safetensors")}


def write_lora(pairs, form, folder, base):
    """Write a LoRA {layer: (A, B)} for another program, in a form of LORA_FILES. -> the file

    The layers have the program's names. Their scale is in B, so every alpha is the layer's rank.
    base: its name, for peft's adapter_config.json.
    """
    head, down, up, file = LORA_FILES[form]
    named, path = {}, Path(folder, file)
    for layer, (a, b) in pairs.items():
        key = head + (layer.replace(".", "_") if form == "kohya" else layer)
        named |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b}
        if form in ("comfyui", "kohya"):
            named[f"{key}.alpha"] = torch.tensor(float(len(a)))
    write_atomic(path, lambda p: save_file(named, p))
    if form == "peft":
        ranks = {layer: len(a) for layer, (a, _) in pairs.items()}
        most = max(ranks.values())
        others = {layer: rank for layer, rank in ranks.items() if rank != most}
        config = dict(
            peft_type="LORA", base_model_name_or_path=base, r=most, lora_alpha=most,
            rank_pattern=others, alpha_pattern=others, target_modules=list(ranks), bias="none",
            lora_dropout=0.0, inference_mode=True)
        text = json.dumps(config, indent=1)
        write_atomic(path.with_name("adapter_config.json"), lambda p: p.write_text(text, "utf-8"))
    return path


# ---- DreamVideo's files: words of a textual inversion, adapters

def read_learned(path, token_of) -> dict:
    """Words of a textual inversion -> {token id: vectors (N, width)}, OpenCLIPText's `learned`.

    path: a run of dreamvideo.py, DreamVideo's file {"string_to_token", "string_to_param"}, or a
    plain {word: (N, width) or (width,)}; token_of(word) -> id, where the file does not tell it.
    """
    path, ids = Path(path), {}
    check_folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such file of textual inversion")
    if path.is_dir():
        words = run_parts(load_checkpoint(path)[0])["learned"]
        if not words:
            raise UserError(f"--learned {path}: a run without a word; give one of dreamvideo.py "
                            "--stage token")
    elif kind_of(path) == "safetensors":
        words = load_safetensors(path)[0]
    else:
        # published files hold an nn.ParameterDict: a dictionary of tensors, but a class when
        # unpickled
        words = load_pickle(path, allow=[nn.ParameterDict])
    if isinstance(words, dict) and "string_to_param" in words:
        words, ids = words["string_to_param"], words.get("string_to_token", {})
    if isinstance(words, nn.ParameterDict):  # its keys() needs an attribute that old files lack
        words = dict(words.named_parameters())
    if not (isinstance(words, dict) and words and isinstance(ids, dict)
            and all(isinstance(k, str) and is_plain(v) and 1 <= v.ndim <= 2 and v.numel()
                    for k, v in words.items())):
        raise UserError(f"{path}: not a file of textual inversion: wanted string_to_param, or "
                        "{word: tensor}")
    try:
        return {int(ids[word]) if word in ids else token_of(word):
                vectors.detach().reshape(-1, vectors.shape[-1]) for word, vectors in words.items()}
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{path}: its string_to_token is not {{word: number}}") from None


def save_word(path, word, token, vectors):
    """One word's vectors (N, width) and token id -> .pth in DreamVideo's layout."""
    words = nn.ParameterDict({word: nn.Parameter(vectors.detach().cpu().clone())})
    state = {"string_to_token": {word: torch.tensor(token)}, "string_to_param": words}
    write_atomic(path, lambda p: torch.save(state, p))


def export_dreamvideo(run, folder, token_of):
    """Write a run of dreamvideo.py, RUN or RUN:STEP, as DreamVideo's own file. -> its path

    token_of(base, word) -> token id of the word in the base's text encoder.
    """
    tensors, meta = load_checkpoint(run_file(run))
    if meta["method"] != "dreamvideo":
        raise UserError(f"--ckpt {run}: a run of {meta['method']}; only dreamvideo.py's have "
                        "adapters")
    parts, step = run_parts(tensors), meta["step"]
    if meta.get("stage") == "token":
        word, vectors = next(iter(parts["learned"].items()), ("", None))
        if not word.isprintable() or "/" in word or not 0 < len(word) < 100:
            raise UserError(f"--ckpt {run}: its word {word[:60]!r} cannot be part of a file's name")
        path = Path(folder, f"text_embedding_of_{word}_{step:07d}.pth")
        save_word(path, word, token_of(meta["base"], word), vectors)
    else:
        path = Path(folder, f"adapter_{step:08d}.pth")
        state = {k: nn.Parameter(v) for k, v in parts["net"].items()}
        write_atomic(path, lambda p: torch.save({"state_dict": state, "step": step}, p))
    return path


# ---- where public files are

START = "modelscope"  # a layout of i2vgen-xl: the weights that its training may start from


def public_files(name, row, weights, start=False):
    """-> {part: path} of a base's files; empty for a base of assets/.

    weights: the folder that holds them, in any layout of the row; None: download them. start: the
    layout START will do. Missing files are an error here, before long work.
    """
    if not row.files:
        if weights is not None:
            raise UserError(f"--weights {weights}: base {name} has its weights in assets/")
        return {}
    if weights is None:
        return {part: fetch(url, name) for part, url in next(iter(row.files.values())).items()}
    root = Path(weights)
    check_folder(root)
    if not root.exists():
        raise UserError(f"--weights {weights}: no such folder")
    first = next(iter(row.files.values()))
    layouts = [[Path(name).name for name in names_of(row, layout)] for layout in row.files]
    one_part = any(len(names) > 1 and root.name in names for names in layouts)
    if root.is_file() and not one_part and not first.keys() & {"tokenizer", "lora"}:
        return dict.fromkeys(first, root)  # all parts in one file, as in ComfyUI's
    if root.is_file():
        expected = ", ".join(names_of(row, next(iter(row.files))))
        raise UserError(f"--weights {weights}: give the folder that holds {expected}")
    found = {layout: {part: local_file(root, url) for part, url in files.items()}
             for layout, files in row.files.items() if start or layout != START}
    missing = {layout: list(dict.fromkeys(name_of(row.files[layout][part])
                                          for part, path in files.items() if path is None))
               for layout, files in found.items()}
    layout = min(missing, key=lambda k: len(missing[k]))  # the nearest
    if missing[layout]:
        verb = "is" if len(missing[layout]) == 1 else "are"
        others = [file for file in names_of(row, layout) if file not in missing[layout]]
        beside = f", beside {', '.join(others)}" if others else ""
        raise UserError(f"--weights {weights}: {', '.join(missing[layout])} {verb} missing for "
                        f"{name}: put what is missing into this folder{beside}")
    return found[layout]


def name_of(url):
    """The file of "hub:repo:file"."""
    return url.split(":", 2)[2]


def names_of(row, layout):
    """Names of a base's public files in one layout."""
    return list(dict.fromkeys(name_of(url) for url in row.files[layout].values()))


PRECISIONS = "bf16", "fp16", "fp32"  # at the end of ComfyUI's names
WEIGHT_SUFFIXES = ".safetensors", ".bin", ".pth", ".ckpt", ".pt"


def local_file(root, url):
    """The file of "hub:repo:file" below `root`, or None.

    It may stand in a folder named after its repository (two repositories may use the same name).
    Its index will do if it is in shards, the same name in another format, and if there is none in
    full precision, one in half: NAME.fp16.safetensors, NAME.safetensors.index.fp16.json. ComfyUI's
    files may be in its own folder models/, and in another precision: NAME_fp16 for NAME_bf16.
    """
    _, repo, file = url.split(":", 2)
    folders = (root / repo.split("/")[-1], root)
    if file.startswith("split_files/"):
        file = file.removeprefix("split_files/")
        folders = [place / sub for place in folders for sub in ("split_files", ".")]
    file = Path(file)
    stems = [file.stem] + ["pytorch_model"] * (file.suffix == ".safetensors")
    name, _, precision = file.stem.rpartition("_")
    if precision in PRECISIONS:
        stems = [f"{name}_{p}" for p in (precision, *PRECISIONS)]
    ends = [file.suffix]
    if file.suffix in WEIGHT_SUFFIXES:  # not a tokenizer
        ends += [end for end in WEIGHT_SUFFIXES if end != file.suffix]
    names = [f"{stem}{half}{end}{index}" for half in ("", ".fp16", ".bf16") for stem in stems
             for end in ends for index in ("", ".index.json")]
    names += ["spiece.model"] * (file.name == "tokenizer.json")  # the same in another format
    names += [f"{stem}{end}.index{half}.json" for half in (".fp16", ".bf16") for stem in stems
              for end in ends]
    paths = (folder / file.with_name(name) for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


def fetch(url, name, flag="--base", option="--weights"):
    """"hub:repo:file" -> path of a local copy, downloaded if need be. Hubs: hf, ms, gh.

    The UserError names `flag` and name, which asked for the file, and `option`, which can supply
    it from a local folder.
    """
    hub, repo, file = url.split(":", 2)
    site = {"hf": "huggingface.co", "ms": "modelscope.cn", "gh": "github.com"}[hub]
    try:
        with one_per_machine():
            if hub == "gh":
                return fetch_github(repo, file)
            if hub == "hf":
                return fetch_huggingface(repo, file)
            from modelscope import model_file_download  # optional: pip install modelscope
            return Path(model_file_download(repo, file))
    except Exception as e:  # offline, no such file, gated repository: all mean the same to the user
        hint = "pip install modelscope, or " if isinstance(e, ImportError) else ""
        raise UserError(
            f"{flag} {name}: cannot get {file} of {site} repository {repo} ({type(e).__name__}); "
            f"{hint}download it elsewhere and give its folder with {option}") from None


def fetch_github(repo, file):
    """A file of a GitHub repository's main branch -> its copy in torch.hub's folder."""
    return fetch_address(f"https://github.com/{repo}/raw/main/{quote(file)}")


def fetch_address(url):
    """A file of the web -> its copy in torch.hub's folder, downloaded if need be."""
    local = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not local.exists():
        local.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, local, progress=False)
    return local


def hub_weights(url, path, option):
    """The tensors of `path`, or if it is None those of `url`; `option` can give the file."""
    try:
        with one_per_machine():
            local = path or fetch_address(url)
    except Exception as e:  # offline, or no such file any more
        raise UserError(f"cannot get {url} ({type(e).__name__}); download it elsewhere and give "
                        f"it with {option}") from None
    return load_weights(local)


def fetch_huggingface(repo, file):
    """A file of a Hugging Face repository, or its index if it is in shards -> the cached copy,
    for which the hub is not asked again."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def get(name):
        try:
            return Path(hf_hub_download(repo, name, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(repo, name))
    try:
        return get(file)
    except EntryNotFoundError:
        index = get(f"{file}.index.json")
        for shard in shards_of(index):
            get(str(Path(file).with_name(shard)))
        return index
