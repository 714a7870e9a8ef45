"""Weight files: download, layouts, strict loading, what kind of file this is, reading our own checkpoints."""
import json
import struct
import zipfile
from pathlib import Path
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common import UserError, crc32, steps_saved, warn, write_atomic

# ---- our own checkpoints

def run_file(text):
    """--ckpt FOLDER, or FOLDER:STEP for one of the steps that --keep kept -> what load_checkpoint takes."""
    folder, _, step = text.rpartition(":")
    if not folder or not step.isdigit() or Path(text).exists():
        return Path(text)
    file = Path(folder, f"ckpt-{step}.safetensors")
    if not file.exists():
        kept = ", ".join(map(str, sorted(steps_saved(folder)))) or "none"
        raise UserError(f"--ckpt {text}: no such step there; kept are {kept} (--keep K keeps more)")
    return file


def load_checkpoint(path):
    """One of our own runs (folder, or a ckpt*.safetensors in it) -> ({key: tensor}, meta).

    In a folder whose ckpt.safetensors is corrupt, the newest ckpt-<step>.safetensors that is whole.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [path / "ckpt.safetensors"] + [path / f"ckpt-{k}.safetensors" for k in steps_saved(path)]
        files = [f for f in files if f.exists()]
    if not files or not files[0].exists():
        raise UserError(f"--ckpt {path}: no ckpt.safetensors there; give the --out folder of a finished run")
    for file in files:
        try:
            tensors, text = load_safetensors(file)
            if "crc32" in text and text["crc32"] != str(crc32(tensors, text.get("nanovideo", ""))):
                raise UserError(f"{file}: corrupt (its checksum differs)")
            break
        except UserError as e:
            if file == files[-1]:
                raise
            warn(f"{str(e)}; trying the one before it")
    if "nanovideo" not in text:
        raise UserError(f"--ckpt {path}: not a nanovideo checkpoint ({looks_like(tensors)}); "
                        "public weights go to --weights, public LoRA files to --lora")
    return tensors, json.loads(text["nanovideo"])


def net_and_text(tensors):
    """The tensors of a checkpoint -> the network's and the text encoder's, both under bare keys."""
    prefix = "text_encoder."
    text = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return {k: v for k, v in tensors.items() if not k.startswith(prefix)}, text


LEARNED = "string_to_param."  # before a word of textual inversion, in our runs as in DreamVideo's files


def run_parts(tensors):
    """The tensors of one of our runs -> {part: state} of what it trained, under bare keys.

    "learned" is {word: vectors}.
    """
    found = {}
    for part, prefix in (("image", "image_encoder."), ("motion", "motion_encoder."), ("learned", LEARNED)):
        found[part] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        tensors = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    net, text = net_and_text(tensors)
    return {"net": net, "text": text, **found}


# ---- weight files

def load_safetensors(path):
    """-> ({key: tensor on the CPU}, metadata)."""
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError, struct.error) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e}); "
                        "a download or copy was cut off: fetch it again") from e


class Shell:
    """Stands in for a class that a file names beside its tensors: takes anything, does nothing."""

    def __init__(self, *args, **kw):
        pass

    def __setstate__(self, state):
        pass


def load_pickle(path, allow=(), shells=False):
    """torch.load on the CPU that runs no code from the file; `allow`: classes it may hold beside tensors.

    shells: of all others nothing is kept (Stable Diffusion's files name Lightning's callbacks).
    """
    try:
        allow = list(allow)
        if shells and zipfile.is_zipfile(path):
            allow += [(Shell, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]
        with torch.serialization.safe_globals(allow):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # zip, pickle and EOF errors alike mean one thing to the user
        raise UserError(f"{path}: not a whole PyTorch file, or not one of plain tensors "
                        f"({str(e).splitlines()[0][:100]}); fetch it again") from e


def load_weights(path, lists=False) -> dict:
    """A public weight file (.safetensors, .pt, .pth, .bin, .ckpt) -> {key: tensor}, without wrappers.

    Given the index of a file in shards (*.index.json), all of them. lists: a list of tensors comes as it is.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return {k: v for shard in shards_of(path) for k, v in load_weights(path.parent / shard).items()}
    state = load_safetensors(path)[0] if path.suffix == ".safetensors" else load_pickle(path, shells=True)
    if isinstance(state, list) and lists:
        return state
    if isinstance(state, list):
        raise UserError(f"{path}: a list of {len(state)} tensors without names: T2V-Turbo's LoRA is one")
    inner = state
    while isinstance(inner, dict):
        state = inner
        wrappers = ("state_dict", "unet_state_dict", "module", "model")
        inner = next((state[k] for k in wrappers if isinstance(state.get(k), dict)), None)
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        first = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: holds no tensors (its first keys: {first})")
    # DDP and DeepSpeed put their own names before every key
    return {k.removeprefix("module.").removeprefix("_forward_module."): v
            for k, v in state.items() if isinstance(v, Tensor)}


def shards_of(index):
    """Index of a file in shards (*.index.json) -> their names."""
    return sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))


def replace_part(path, part, state):
    """Write {key: tensor} in fp16 as "part.key" of a safetensors file (assets/), whose other parts stay."""
    old = load_safetensors(path)[0] if Path(path).exists() else {}
    kept = {k: v for k, v in old.items() if not k.startswith(part + ".")}
    new = {f"{part}.{k}": v.detach().half().contiguous().cpu() for k, v in state.items()}
    write_atomic(path, lambda p: save_file(kept | new, p))


def below(state, prefix):
    """The tensors whose keys start with `prefix`, without it; `state` itself if there are none."""
    cut = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return cut or state


KINDS = {  # part of a key that only this kind of file has -> the kind, in words; the first that fits counts
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
    """What kind of public file these keys are from, in words."""
    for part, kind in KINDS.items():
        if any(part in k for k in state):
            return f"it looks like {kind}"
    return f"unknown keys such as {next(iter(state), 'none')}"


def load_strict(net, state, name):
    """load_state_dict() whose error tells in one line what the keys look like, and the first faults."""
    want = {k: v.shape for k, v in net.state_dict().items()}
    faults = {"missing": [k for k in want if k not in state],
              "unexpected": [k for k in state if k not in want],
              "of another shape": [k for k in want if k in state and want[k] != state[k].shape]}
    if any(faults.values()):
        words = "; ".join(f"{len(keys)} {fault}, first {keys[0]}" for fault, keys in faults.items() if keys)
        raise UserError(f"{name}: these are not its weights ({looks_like(state)}): {words}")
    net.load_state_dict(state, assign=next(net.parameters()).is_meta)


def rename(state, net, name_of, source):
    """{their key: tensor} -> {our key: tensor}, in our shapes (1x1 convolutions against Linears).

    name_of(our key) -> their key; one of theirs that is left over or not there is a UserError.
    """
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    theirs = {name_of(k): k for k in shapes}
    missing, extra = [k for k in theirs if k not in state], [k for k in state if k not in theirs]
    if missing or extra:
        first = f"missing {missing[0]}" if missing else f"unexpected {extra[0]}"
        raise UserError(f"{source}: these are not its weights ({looks_like(state)}): {len(missing)} missing, "
                        f"{len(extra)} unexpected, first: {first}")
    wrong = [k for k, ours in theirs.items() if state[k].numel() != shapes[ours].numel()]
    if wrong:
        raise UserError(f"{source}: these are not its weights ({looks_like(state)}): {len(wrong)} of another "
                        f"shape, first {wrong[0]}")
    return {ours: state[their].reshape(shapes[ours]) for their, ours in theirs.items()}


# ---- where public files are

START = "modelscope"  # the layout of i2vgen-xl that is not its own weights


def public_files(name, row, weights, start=False):
    """-> {part: path}; what is missing is an error here, before long work. Empty for a base of assets/.

    start: a folder of the layout START will do.
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
    found = {layout: {p: local_file(root, url) for p, url in files.items()}
             for layout, files in row.files.items() if start or layout != START}
    layout = max(found, key=lambda k: sum(v is not None for v in found[k].values()))
    missing = [row.files[layout][p].split(":", 2)[2] for p, path in found[layout].items() if path is None]
    if missing:
        expected = ", ".join(names_of(row, layout))
        raise UserError(f"--weights {weights}: {missing[0]} is missing for {name}; expected {expected}")
    return found[layout]


def names_of(row, layout):
    """Names of a base's public files in one layout."""
    return list(dict.fromkeys(url.split(":", 2)[2] for url in row.files[layout].values()))


def local_file(root, url):
    """The file of "hub:repo:file" below `root`, or None.

    Also found: the file in a folder named after its repository (two repositories may use the same name), and
    in diffusers layout the index of a file in shards, and .bin for .safetensors.
    """
    _, repo, file = url.split(":", 2)
    names = [Path(file), Path(f"{file}.index.json")]
    if names[0].suffix == ".safetensors":
        names += [names[0].with_suffix(".bin"), names[0].with_name("pytorch_model.bin")]
    folders = (root / repo.split("/")[-1], root)
    return next((f / name for f in folders for name in names if (f / name).is_file()), None)


def fetch(url, name, flag="--base", option="--weights"):
    """"hub:repo:file" -> path of the local copy, downloaded if need be. Hubs: hf, ms (ModelScope), gh.

    Its UserError names what asked for the file, `flag` and name, and `option`, the other way to bring it.
    """
    hub, repo, file = url.split(":", 2)
    site = {"hf": "huggingface.co", "ms": "modelscope.cn", "gh": "github.com"}[hub]
    try:
        if hub == "gh":
            local = Path(torch.hub.get_dir(), "checkpoints", Path(file).name)
            if not local.exists():
                local.parent.mkdir(parents=True, exist_ok=True)
                address = f"https://github.com/{repo}/raw/main/{quote(file)}"
                torch.hub.download_url_to_file(address, local, progress=False)
            return local
        if hub == "hf":
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError
            try:
                return Path(hf_hub_download(repo, file))
            except EntryNotFoundError:  # in shards
                index = Path(hf_hub_download(repo, f"{file}.index.json"))
                for shard in shards_of(index):
                    hf_hub_download(repo, str(Path(file).with_name(shard)))
                return index
        from modelscope import model_file_download  # optional: pip install modelscope
        return Path(model_file_download(repo, file))
    except Exception as e:  # offline, no such file, gated repository: all mean the same to the user
        hint = "pip install modelscope, or " if isinstance(e, ImportError) else ""
        raise UserError(
            f"{flag} {name}: cannot get {file} of {site} repository {repo} ({type(e).__name__}); {hint}"
            f"download it elsewhere and give its folder with {option}") from None
