"""Weight files: download, layouts, strict loading, LoRA formats, and our own checkpoints.

This file is independent of the networks: each network's file defines the map from public names to
ours and passes it in.
"""
import json
import struct
import zipfile
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common import (
    UserError, check_file, crc32, parse_json, read_text, steps_saved, warn, write_atomic)

# ---- our own checkpoints

def run_file(text):
    """--ckpt FOLDER, or FOLDER:STEP for a step that --keep kept -> what load_checkpoint() takes."""
    folder, _, step = text.rpartition(":")
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
    try:
        return tensors, json.loads(text["nanovideo"])
    except ValueError:
        raise UserError(f"--ckpt {path}: its metadata is corrupt") from None


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

def load_safetensors(path):
    """-> ({key: tensor on the CPU}, metadata)."""
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError, struct.error) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e}); "
                        "a download or copy was cut off: fetch it again") from e


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
    try:
        allow = list(allow)
        if shells and zipfile.is_zipfile(path):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            allow += [(Shell, name) for name in unsafe]
        with torch.serialization.safe_globals(allow):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # zip, pickle and EOF errors alike mean one thing to the user
        raise UserError(f"{path}: not a whole PyTorch file, or not one of plain tensors "
                        f"({str(e).splitlines()[0][:100]}); fetch it again") from e


def load_weights(path, lists=False) -> dict:
    """A weight file (.safetensors, .pt, .pth, .bin, .ckpt) -> {key: tensor}, without wrappers.

    Of a file in shards, give the index (*.index.json). lists: return a list of tensors as it is.
    """
    path = check_file(path)
    if path.name.endswith(".index.json"):
        shards = [load_weights(path.parent / shard) for shard in shards_of(path)]
        return {k: v for shard in shards for k, v in shard.items()}
    if path.suffix == ".safetensors":
        state = load_safetensors(path)[0]
    else:
        state = load_pickle(path, shells=True)
    if isinstance(state, list) and lists:
        return state
    if isinstance(state, list):
        raise UserError(f"{path}: a list of {len(state)} tensors without names, like T2V-Turbo's "
                        "LoRA")
    inner = state
    while isinstance(inner, dict):
        state = inner
        wrappers = ("state_dict", "unet_state_dict", "module", "model")
        inner = next((state[k] for k in wrappers if isinstance(state.get(k), dict)), None)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no tensors but a {type(state).__name__}")
    if not any(isinstance(v, Tensor) for v in state.values()):
        first = ", ".join(map(str, list(state)[:5]))
        raise UserError(f"{path}: holds no tensors (its first keys: {first})")
    # DDP and DeepSpeed put their own names before every key
    return {k.removeprefix("module.").removeprefix("_forward_module."): v
            for k, v in state.items() if isinstance(v, Tensor)}


def shards_of(index):
    """The index of a file in shards (*.index.json) -> names of the shards."""
    try:
        return sorted(set(parse_json(read_text(index), index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not an index of a file in shards") from None


def below(state, prefix):
    """The tensors whose keys start with `prefix`, without it; `state` itself if there are none."""
    cut = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return cut or state


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
    "conv_y": "a CogVideoX autoencoder",
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
    "fusion1.layer1.": "MiDaS",
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
    want = {k: v.shape for k, v in net.state_dict().items()}
    faults = {"missing": [k for k in want if k not in state],
              "unexpected": [k for k in state if k not in want],
              "of another shape": [k for k in want if k in state and want[k] != state[k].shape]}
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

def lora_file(text):
    """--lora FILE or FILE:SCALE -> (path, scale); the file is there."""
    path, _, scale = text.rpartition(":")
    try:
        path, scale = (path, float(scale)) if path else (text, 1.0)
    except ValueError:  # the colon is part of the name
        path, scale = text, 1.0
    if not Path(path).is_file():
        raise UserError(f"--lora {path}: no such file")
    return Path(path), scale


def lora_format(state):
    """Format of a LoRA file that load_weights() read: "turbo", "peft", ... or None."""
    if isinstance(state, list):
        return "turbo"
    marks = {"_adapter.": "adapters", ".lora_A.weight": "peft",
             "_lora.down_linear": "instructvideo"}
    return next((kind for mark, kind in marks.items() if any(mark in k for k in state)), None)


def turbo_lora(tensors, layers, path):
    """T2V-Turbo's list without names, [B_0, A_0, B_1, A_1, ...]; layers: our names in its order."""
    if len(tensors) != 2 * len(layers) or not all(isinstance(x, Tensor) for x in tensors):
        raise UserError(f"{path}: a list of {len(tensors)} tensors, but T2V-Turbo's LoRA of this "
                        f"network is a list of {2 * len(layers)}")
    lora = {f"{layer}.lora_A.weight": down for layer, down in zip(layers, tensors[1::2])}
    return lora | {f"{layer}.lora_B.weight": up for layer, up in zip(layers, tensors[::2])}


def peft_lora(path, layers):
    """A LoRA file of peft's, such as VADER's -> (tensors in float32, rank, alpha).

    layers {public name: our name}; peft's and the pipeline's prefixes are cut off. alpha comes
    from the adapter_config.json beside the file, else it is 8, peft's default (VADER's files do
    not tell it).
    """
    state = below(below(load_weights(path), "base_model.model."), "model.diffusion_model.")
    lora, ranks = {}, {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".lora_")
        if kind not in ("A.weight", "B.weight") or layer not in layers:
            raise UserError(f"--lora {path}: {key} belongs to no layer of this network: "
                            f"{looks_like(state)}")
        lora[f"{layers[layer]}.lora_{kind}"] = value.float()
        if kind == "A.weight" and value.ndim:
            ranks[layer] = len(value)
    text = load_safetensors(path)[1] if Path(path).suffix == ".safetensors" else {}
    config, alpha = Path(path).parent / "adapter_config.json", 8.0
    try:
        if "nanovideo" in text:  # of one of our runs
            alpha = float(json.loads(text["nanovideo"])["alpha"])
        elif config.is_file():
            alpha = float(parse_json(read_text(config), config)["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--lora {path}: no alpha in its metadata or in {config.name}") from None
    return lora, max(ranks.values(), default=0), alpha


def export_peft(run, folder, public_name):
    """Write a run's LoRA in peft's format: adapter_model.safetensors and adapter_config.json.

    public_name(base, key): a key of our network -> that in the base's public file.
    """
    tensors, meta = load_checkpoint(run)
    rank, alpha, head = meta["rank"], meta["alpha"], "base_model.model."
    if not rank:
        raise UserError(f"--ckpt {run}: holds whole weights and no LoRA, so peft could not load it")
    named = {head + public_name(meta["base"], k): v for k, v in tensors.items()}
    ranks = {k.removeprefix(head).removesuffix(".lora_A.weight"): v.shape[0]
             for k, v in named.items() if k.endswith(".lora_A.weight")}
    # a narrow layer has a smaller rank than asked for, but the same scale alpha / rank
    cut = {k: r for k, r in ranks.items() if r != rank}
    config = dict(
        peft_type="LORA", base_model_name_or_path=meta["base"], r=rank, lora_alpha=alpha,
        rank_pattern=cut, alpha_pattern={k: alpha * r / rank for k, r in cut.items()},
        target_modules=list(ranks), bias="none", lora_dropout=0.0, inference_mode=True)
    text = json.dumps(config, indent=1)
    write_atomic(Path(folder, "adapter_model.safetensors"), lambda p: save_file(named, p))
    write_atomic(Path(folder, "adapter_config.json"), lambda p: p.write_text(text, "utf-8"))


# ---- DreamVideo's files: words of a textual inversion, adapters

def read_learned(path, token_of) -> dict:
    """Words of a textual inversion -> {token id: vectors (N, width)}, OpenCLIPText's `learned`.

    path: a run of dreamvideo.py, DreamVideo's file {"string_to_token", "string_to_param"}, or a
    plain {word: (N, width) or (width,)}; token_of(word) -> id, where the file does not tell it.
    """
    path, ids = Path(path), {}
    if not path.exists():
        raise UserError(f"{path}: no such file of textual inversion")
    if path.is_dir():
        words = run_parts(load_checkpoint(path)[0])["learned"]
        if not words:
            raise UserError(f"--learned {path}: a run without a word; give one of dreamvideo.py "
                            "--stage token")
    elif path.suffix == ".safetensors":
        words = load_safetensors(path)[0]
    else:
        # published files hold an nn.ParameterDict: a dictionary of tensors, but a class when
        # unpickled
        words = load_pickle(path, allow=[nn.ParameterDict])
    if isinstance(words, dict) and "string_to_param" in words:
        words, ids = words["string_to_param"], words.get("string_to_token", {})
    if isinstance(words, nn.ParameterDict):  # its keys() needs an attribute that old files lack
        words = dict(words.named_parameters())
    if not (isinstance(words, dict) and words
            and all(isinstance(v, Tensor) and 1 <= v.ndim <= 2 for v in words.values())):
        raise UserError(f"{path}: not a file of textual inversion: wanted string_to_param, or "
                        "{word: tensor}")
    return {int(ids[word]) if word in ids else token_of(word):
            vectors.detach().reshape(-1, vectors.shape[-1]) for word, vectors in words.items()}


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
    if meta["stage"] == "token":
        (word, vectors), = parts["learned"].items()
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
    if not root.exists():
        raise UserError(f"--weights {weights}: no such folder")
    if root.is_file():
        expected = ", ".join(names_of(row, next(iter(row.files))))
        raise UserError(f"--weights {weights}: give the folder that holds {expected}")
    found = {layout: {part: local_file(root, url) for part, url in files.items()}
             for layout, files in row.files.items() if start or layout != START}
    layout = max(found, key=lambda k: sum(path is not None for path in found[k].values()))
    for part, path in found[layout].items():
        if path is None:
            expected, missing = ", ".join(names_of(row, layout)), name_of(row.files[layout][part])
            raise UserError(f"--weights {weights}: {missing} is missing for {name}; expected "
                            f"{expected}")
    return found[layout]


def name_of(url):
    """The file of "hub:repo:file"."""
    return url.split(":", 2)[2]


def names_of(row, layout):
    """Names of a base's public files in one layout."""
    return list(dict.fromkeys(name_of(url) for url in row.files[layout].values()))


def local_file(root, url):
    """The file of "hub:repo:file" below `root`, or None.

    It may stand in a folder named after its repository (two repositories may use the same name). In
    diffusers layout the index of a file in shards will do, and .bin for .safetensors.
    """
    _, repo, file = url.split(":", 2)
    names = [Path(file), Path(f"{file}.index.json")]
    if names[0].suffix == ".safetensors":
        names += [names[0].with_suffix(".bin"), names[0].with_name("pytorch_model.bin")]
    folders = (root / repo.split("/")[-1], root)
    return next((f / name for f in folders for name in names if (f / name).is_file()), None)


def fetch(url, name, flag="--base", option="--weights"):
    """"hub:repo:file" -> path of a local copy, downloaded if need be. Hubs: hf, ms, gh.

    The UserError names `flag` and name, which asked for the file, and `option`, which can supply
    it from a local folder.
    """
    hub, repo, file = url.split(":", 2)
    site = {"hf": "huggingface.co", "ms": "modelscope.cn", "gh": "github.com"}[hub]
    try:
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
    local = Path(torch.hub.get_dir(), "checkpoints", Path(file).name)
    if not local.exists():
        local.parent.mkdir(parents=True, exist_ok=True)
        address = f"https://github.com/{repo}/raw/main/{quote(file)}"
        torch.hub.download_url_to_file(address, local, progress=False)
    return local


def fetch_huggingface(repo, file):
    """A file of a Hugging Face repository, or its index if it is in shards -> the cached copy."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    try:
        return Path(hf_hub_download(repo, file))
    except EntryNotFoundError:
        index = Path(hf_hub_download(repo, f"{file}.index.json"))
        for shard in shards_of(index):
            hf_hub_download(repo, str(Path(file).with_name(shard)))
        return index
