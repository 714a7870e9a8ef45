"""Files that come from the world with weights in them: LoRA of every program, wrappers, state, metadata, arrays."""
import copy
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import bases
import common
import data
import rewards
import tracks
import weights
from hostile import MANY, cases  # noqa: F401
from models import UNet3D, merge_public_lora, public_layers, read_peft_lora

RANK = 4


@pytest.fixture(scope="module")
def net():
    return bases.load_base("tiny-cogvideox").net


@pytest.fixture
def lora(net, tmp_path):
    """lora(A's key, B's key, ...) -> the scale with which two layers' LoRA is merged; the files stay in tmp_path."""
    layers = [f"transformer_blocks.1.attn1.to_{x}" for x in ("q", "out.0")]
    g = torch.Generator().manual_seed(0)
    modules = dict(net.named_modules())
    A = {n: 0.1 * torch.randn(RANK, modules[n].in_features, generator=g) for n in layers}
    B = {n: 0.1 * torch.randn(modules[n].out_features, RANK, generator=g) for n in layers}

    def merged(a, b, more=(), config=None, meta=None, name="lora.safetensors", flat=False, short=False):
        state = {}
        for n in layers:
            shown = n.removesuffix(".0") if short else n
            shown = shown.replace(".", "_") if flat else shown
            state |= {a.format(shown): A[n], b.format(shown): B[n]}
            state |= {k.format(shown): v.clone() for k, v in dict(more).items()}
        save = save_file if name.endswith("safetensors") else torch.save
        save(state, tmp_path / name, *([meta] if meta else []))
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        own = copy.deepcopy(net)
        merge_public_lora(own, tmp_path / name)
        scales = []
        for n in layers:
            delta = B[n] @ A[n]
            change = own.get_submodule(n).weight - net.get_submodule(n).weight
            scales.append(((change * delta).sum() / delta.square().sum()).item())
            assert torch.allclose(change, scales[-1] * delta, atol=1e-5)
        assert max(scales) - min(scales) < 1e-3
        return scales[0]
    return merged


PEFT = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"
DOWN, UP = ".lora_down.weight", ".lora_up.weight"
NAMES = {  # program -> key of A, key of B, further arguments
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "peft": PEFT, "peft, named": tuple(x.replace(".weight", ".my_adapter.weight") for x in PEFT),
    "peft, module": tuple(f"module.{x}" for x in PEFT), "no weight": ("{}.lora_A", "{}.lora_B"),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "diffusers, peft": ("transformer.base_model.model.{}.lora_A.weight", "transformer.base_model.model.{}.lora_B.weight"),
    "ComfyUI": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "ComfyUI, whole": ("model.diffusion_model.{}" + DOWN, "model.diffusion_model.{}" + UP),
    "old": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "linear layer": ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
    "compiled": ("_orig_mod.{}.lora_A.weight", "_orig_mod.{}.lora_B.weight"),
    "FSDP": ("_fsdp_wrapped_module.{}.lora_A.weight", "_fsdp_wrapped_module.{}.lora_B.weight")}


@pytest.mark.parametrize("name", NAMES)
def test_lora_names(lora, name):
    assert lora(*NAMES[name]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("head", ["lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_", "lora_unet_diffusion_model_"])
def test_kohya_names(lora, head):
    alpha = {head + "{}.alpha": torch.tensor(2.0)}
    assert lora(head + "{}" + DOWN, head + "{}" + UP, alpha, flat=True) == pytest.approx(2 / RANK, abs=1e-3)


@pytest.mark.parametrize("name", ["lora_te_text_model_layers_0_q", "lora_te2_x", "text_encoder.layers.0.q", "base_model.model.text_encoder.q"])
def test_a_text_encoders_lora_is_left_out_and_said(lora, message, capsys, tmp_path, name):
    text = {f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.lora_up.weight": torch.ones(8, 4)}
    assert lora("lora_unet_{}" + DOWN, "lora_unet_{}" + UP, text, flat=True) == pytest.approx(1, abs=1e-3)
    assert f"left out (such as {name})" in capsys.readouterr().err
    save_file(text, tmp_path / "lora.safetensors")
    assert "but those of the text encoder" in message(weights.named_lora, text, {}, tmp_path / "lora.safetensors", {})


def test_attention_processors(lora):
    at = "transformer.{}".replace("{}", "{}_lora")
    assert lora(at + ".down.weight", at + ".up.weight", short=True) == pytest.approx(1, abs=1e-3)


SCALES = [  # config, the scale or a word of the error
    (dict(r=4, lora_alpha=8), 2), (dict(r=4, lora_alpha=8, use_rslora=True), 4),
    (dict(r=4, lora_alpha=8, alpha_pattern={"to_q": 4, "to_out.0": 4}), 1),
    (dict(r=8, lora_alpha=8, rank_pattern={"attn1.to_q": 4, "attn1.to_out.0": 4}), 2),
    (dict(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0"], bias="none", peft_version="0.17.0"), 2),
    (dict(r=4, lora_alpha=8, layers_to_transform=[1, 2]), 2), (dict(r=4, lora_alpha=8, init_lora_weights=True), 2),
    (dict(r=4, lora_alpha=8, layers_to_transform=[0]), "layers_to_transform"),
    (dict(r=4, lora_alpha=8, target_modules=["to_k"]), "target_modules"),
    (dict(r=4, lora_alpha=8, exclude_modules=["to_q"]), "exclude_modules"),
    (dict(r=8, lora_alpha=8), "rank 8"), (dict(r=4), "lora_alpha"), (dict(lora_alpha=4), "has no r"),
    (dict(r=0, lora_alpha=4), "r is"), (dict(r="4", lora_alpha=4), "r is"), (dict(r=True, lora_alpha=4), "r is"),
    (dict(r=4, lora_alpha=float("nan")), "lora_alpha is"), (dict(r=4, lora_alpha=8, use_dora=True), "use_dora"),
    (dict(r=4, lora_alpha=8, fan_in_fan_out=True), "fan_in_fan_out"), (dict(r=4, lora_alpha=8, bias="all"), "bias"),
    (dict(r=4, lora_alpha=8, modules_to_save=["proj_out"]), "modules_to_save"),
    (dict(r=4, lora_alpha=8, lora_bias=True), "lora_bias"), (dict(r=4, lora_alpha=8, peft_type="LOHA"), "peft_type"),
    (dict(r=4, lora_alpha=8, init_lora_weights="pissa"), "pissa"), (dict(r=4, lora_alpha=8, new_field=3), "new_field"),
    (dict(r=4, lora_alpha=8, alpha_pattern={"(a+)+$": 4}), "regular expressions"),
    (dict(r=4, lora_alpha=8, rank_pattern=[4]), "rank_pattern"), ([], "list")]


@pytest.mark.parametrize("config, wanted", SCALES, ids=[str(c)[:60] for c, _ in SCALES])
def test_lora_scale(lora, message, config, wanted):
    if isinstance(wanted, str):
        assert wanted in message(lora, *PEFT, config=config)
    else:
        assert lora(*PEFT, config=config) == pytest.approx(wanted, abs=1e-3)


def test_scale_from_metadata_or_said(lora, message, tmp_path, capsys):
    diffusers = {"transformer.r": 4, "transformer.lora_alpha": 8, "text_encoder.r": 16, "transformer_2.lora_alpha": 1}
    keys = NAMES["diffusers"]
    assert lora(*keys, meta={"lora_adapter_metadata": json.dumps(diffusers)}) == pytest.approx(2, abs=1e-3)
    assert lora(*keys, meta={"ss_network_dim": "4", "ss_network_alpha": "1"}) == pytest.approx(0.25, abs=1e-3)
    assert not capsys.readouterr().err
    assert lora(*keys, meta={"ss_network_dim": "Dynamic", "ss_network_alpha": "None"}) == pytest.approx(1, abs=1e-3)
    assert "scale 1 is taken" in capsys.readouterr().err
    assert lora(*PEFT, name="vader.pt") == pytest.approx(2, abs=1e-3)  # VADER's files: alpha 8
    assert "8 is taken" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("<html>")
    assert "not valid JSON" in message(lora, *PEFT)
    (tmp_path / "adapter_config.json").write_text("[" * 10 ** 5)
    assert "not valid JSON" in message(lora, *PEFT)


@pytest.mark.parametrize("key, words", [
    ("{}.lora_magnitude_vector.weight", "DoRA"), ("{}.dora_scale", "DoRA"), ("{}.hada_w1_a", "LoHa"),
    ("{}.lokr_w1", "LoKr"), ("{}.lora_mid.weight", "middle"), ("{}.lora_B.bias", "biases"), ("{}.diff", "differences"),
    ("{}.weight", "whole tensor"), ("{}.diff_b", "differences"), ("{}.oft_diag", "OFT"), ("{}.lora_embedding_A", "words"),
    ("{}.modules_to_save.weight", "whole layers"), ("{}.lora_A.other.weight", "two LoRA"),
    ("transformer.{}.lora_A.weight", "two LoRA"), ("lora_unet_x_{}.lora_down.weight", "in kohya's names"),
    ("transformer.x.{}.lora_A.weight", "belongs to no layer"), ("{}.alpha", "not one number")])
def test_what_is_no_lora_is_refused_by_name(lora, message, key, words):
    assert words in message(lora, *NAMES["bare"], {key: torch.ones(3, 3)})


def test_lora_numbers_and_ranks(lora, net, message, tmp_path):
    for bad in (torch.tensor(float("nan")), torch.tensor(0.0), torch.ones(2), torch.tensor(1j)):
        assert "alpha" in message(lora, *NAMES["bare"], {"{}.alpha": bad}, name="lora.pt")
    assert "too large" in message(lora, *NAMES["bare"], {"{}.alpha": torch.tensor(3e38, dtype=torch.float64) * 1e9})
    keys = {f"transformer_blocks.1.attn1.to_q.{x}": v for x, v in (
        ("lora_A.weight", torch.ones(4, 128)), ("lora_B.weight", torch.ones(128, 4)), ("alpha", 2))}
    torch.save(keys, tmp_path / "number.pt")  # not a tensor
    assert weights.open_weights(tmp_path / "number.pt")[0]["transformer_blocks.1.attn1.to_q.alpha"] == 2
    for bad in (torch.full((4, 128), torch.nan), torch.ones(4, 128, dtype=torch.int32), torch.ones(0, 128)):
        layer = "transformer_blocks.0.attn1.to_q"
        save_file({f"{layer}.lora_A.weight": bad, f"{layer}.lora_B.weight": torch.ones(128, len(bad))},
                  tmp_path / "bad.safetensors")
        assert layer in message(merge_public_lora, net, tmp_path / "bad.safetensors")
    alpha = {"{}.alpha": torch.tensor(2.0)}
    lora(*NAMES["bare"], alpha)
    state, rank, alpha, targets = read_peft_lora(net, tmp_path / "lora.safetensors", 3.0)
    assert (rank, alpha, len(targets)) == (4, 2.0, 2) and len(state) == 4
    (tmp_path / "run").mkdir()
    (tmp_path / "lora.safetensors").rename(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert weights.lora_file(f"{tmp_path / 'run'}:0.5") == (tmp_path / "run" / "pytorch_lora_weights.safetensors", 0.5)


def test_every_unet_has_its_names_in_three_layouts():
    for name in ("demo", "videocrafter2", "i2vgen-xl"):
        with torch.device("meta"):
            net = UNet3D(bases.BASES[name].net)
        layers = public_layers(net)
        ours = set(layers.values())
        assert ours == {n for n, m in net.named_modules() if getattr(m, "weight", None) is not None}
        assert len({n.replace(".", "_") for n in ours}) == len(ours), name


# ---- whole weights

A = {"a.weight": torch.ones(2)}
WRAPPED = [
    {"state_dict": A}, {"ema": A}, {"model": {"module": A}}, {"a": A}, {"state_dict": {"module.model.a.weight": A["a.weight"]}},
    {f"{p}a.weight": A["a.weight"] for p in ("_orig_mod.module.",)}, {"_fsdp_wrapped_module.model.a.weight": A["a.weight"]},
    {"model.diffusion_model.a.weight": A["a.weight"]}, {"net.module._forward_module.a.weight": A["a.weight"]},
    {"model": {"a.weight": torch.zeros(2)}, "ema": A}, {"state_dict": {"a.weight": torch.zeros(2)}, "ema_state_dict": A},
    {"model": A, "ema": {"decay": 0.9}}, {"ema_model.a.weight": A["a.weight"], "online_model.a.weight": torch.zeros(2),
                                          "step": torch.tensor(3)},
    {"module": A, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "step": 3},
    {"unet": {"a.weight": torch.zeros(2)}, "ema_unet": A}, {"generator": {"a.weight": torch.zeros(2)}, "generator_EMA": A},
    {"module.a.weight": A["a.weight"], "n_averaged": torch.tensor(3)}, {"model": {"a.weight": torch.zeros(2)}, "swa_model": A},
    {"pipe.dit._module.a.weight": A["a.weight"]}, {"model": A, "ema_optimizer": {"a": torch.zeros(2)}}, {"model.a.weight": torch.zeros(2), "ema_model.a.weight": A["a.weight"]},
    {"transformer": {"_orig_mod.a._checkpoint_wrapped_module.weight": A["a.weight"]}}]


@pytest.mark.parametrize("k", range(len(WRAPPED)))
def test_wrappers(k, tmp_path):
    torch.save(WRAPPED[k], tmp_path / "a.safetensors")  # the name says nothing
    found = weights.load_weights(tmp_path / "a.safetensors")
    assert found.keys() == A.keys() and found["a.weight"].eq(1).all()


def npz():
    file = io.BytesIO()
    np.savez(file, a=np.zeros(2))
    return file.getvalue()


class Code:
    def __reduce__(self):
        return print, ("run",)


ITSELF = {}
ITSELF["model"] = ITSELF
NOT_WEIGHTS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "web page": b"\n<!DOCTYPE html>",
    "a web page": b"<html>", "JSON": b'{"error": "gated"}', "empty": b"", "GGUF": b"GGUF\x03\0\0\0", "zeros": bytes(99),
    "gzip": b"\x1f\x8b\x08", "7-Zip": b"7z\xbc\xaf\x27\x1c", "HDF5": b"\x89HDF\r\n", "other things": npz(),
    "NumPy": b"\x93NUMPY\x01\0", "plain tensors": pickle.dumps(Code()), "not a whole": b"PK\x03\x04 cut off",
    "holds no tensors": None, "several parts": {"one": A, "two": A}, "without names": [torch.ones(2)],
    "all in the file": {"a": torch.ones(1).expand(10 ** 9)}, "no tensors": ITSELF}


@pytest.mark.parametrize("words", NOT_WEIGHTS)
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_what_is_no_checkpoint(words, name, message, tmp_path, capfd):
    content, file = NOT_WEIGHTS[words], tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    said = message(weights.load_weights, file)
    assert (words in said or name == "a.safetensors" and "not a whole" in said) and name in said
    assert "run" not in capfd.readouterr().out


def test_other_names_and_folders(message, tmp_path):
    save_file(A, tmp_path / "a.ckpt")
    assert weights.load_weights(tmp_path / "a.ckpt").keys() == A.keys()
    save_file(A, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-3])
    assert "cut off" in message(weights.load_weights, tmp_path / "b.safetensors")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"x")
    assert "dcp_to_torch" in message(weights.load_weights, tmp_path / "dcp")
    (tmp_path / "c.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    assert "files beside it" in message(weights.load_weights, tmp_path / "c.safetensors.index.json")
    (tmp_path / "c.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "c.safetensors.index.json"}}))
    assert "files beside it" in message(weights.load_weights, tmp_path / "c.safetensors.index.json")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", bytes(10 ** 6))
    assert "compressed" in message(weights.load_weights, tmp_path / "bomb.pt")


@pytest.mark.parametrize("name", [
    "model.fp16.safetensors", "model.bf16.safetensors", "model.bin", "pytorch_model.fp16.bin", "model.pt",
    "model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_variants_of_a_files_name(name, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / name).touch()
    assert weights.local_file(tmp_path, "hf:a/b:unet/model.safetensors") == tmp_path / "unet" / name
    assert weights.local_file(tmp_path, "hf:a/b:unet/spiece.model") is None


def test_the_nearest_set_of_files_is_named(message, tmp_path):
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "diffusion_pytorch_model.fp16.safetensors").touch()
    said = message(weights.public_files, "modelscope", bases.BASES["modelscope"], tmp_path)
    assert "text_encoder/model.safetensors is missing" in said and "VQGAN" not in said


# ---- what comes with a run

def meta(**changes):
    values = dict(method="t2v", base="tiny", step=3, rank=0, sample={"frames": 8, "cfg": 1.5}, args={}, versions={})
    return values | changes


@pytest.mark.parametrize("changes, words", [
    (dict(step=-1), "step"), (dict(step="3"), "step"), (dict(base=None), "no base"), (dict(rank=4), "no alpha"),
    (dict(sample=3), "sample"), (dict(sample={"frames": 10 ** 12}), "frames"), (dict(sample={"sampler": "x.py:f"}), "sampler"),
    (dict(sample={"cfg": float("nan")}), "cfg"), (dict(schedule={"name": "os"}), "schedule"), (dict(lora_targets="q"), "lora_t"),
    (dict(sample={"negative": "\ud83d"}), "negative"), (dict(schedule={"scale": [1.0, 0.7, 400, 1]}), "scale"),
    (dict(schedule={"scale": []}), "scale"), (dict(schedule={"scale": [1, 0.7, 0.5]}), "scale"), (dict(rank=True), "rank"), (dict(tracking_blocks=1e3), "tracking"), (dict(args={"scratch": "yes"}), "scratch")])
def test_metadata_of_a_run(changes, words, message):
    assert words in message(common.read_meta, meta(**changes), "ckpt")


def test_metadata_names_no_code_and_no_paths(capsys):
    bad = meta(sample={"frames": 8, "reward": "evil.py:f"}, weights="/etc", args={"weights": "/etc", "reward": "evil.py:f"})
    kept = common.read_meta(bad, "ckpt")
    assert "evil" not in str(kept) and "/etc" not in str(kept)
    assert "sample.reward" in capsys.readouterr().err
    assert common.SAMPLE_FIELDS.keys() == bases.Sampling.__dataclass_fields__.keys() - set(bases.PER_CLIP)
    for name, row in bases.BASES.items():  # every base's own settings pass
        assert common.read_meta(meta(sample=row.sample.metadata()), name)["sample"] == row.sample.metadata()


def test_metadata_that_is_no_dictionary(message, tmp_path):
    for text in ("[1]", "[" * 10 ** 5, "{", "null"):
        save_file(A, tmp_path / "ckpt.safetensors", {"nanovideo": text})
        assert "ckpt.safetensors" in message(weights.load_checkpoint, tmp_path)
        assert "ckpt.safetensors" in message(common.step_of, tmp_path / "ckpt.safetensors")
    save_file({}, tmp_path / "ckpt.safetensors", {"nanovideo": json.dumps(meta())})
    assert "holds no tensors" in message(weights.load_checkpoint, tmp_path)
    assert "no branch for tracking" in message(bases.base_row, "tiny", 3)  # of a run's metadata
    save_file({"a": torch.tensor([torch.inf])}, tmp_path / "ckpt.safetensors", {"nanovideo": json.dumps(meta())})
    assert "finite" in message(weights.load_checkpoint, tmp_path)


def state():
    w = torch.ones(2, 3)
    moments = {"step": torch.tensor(3.0), "exp_avg": w.clone(), "exp_avg_sq": w.clone()}
    return dict(step=3, seen=6, weights={"a": w}, moments={"a": moments}, ema={"a": w.clone()}, meta=meta(), scaler=None)


def put(path, value):
    def change(s):
        *outer, last = path.split(".")
        for name in outer:
            s = s[name]
        if value is KeyError:
            del s[last]
        else:
            s[last] = value
    return change


NAN, BROAD = torch.full((2, 3), torch.nan), torch.ones(1, 3)
STATES = [
    ("step", -1), ("step", 10 ** 12), ("step", 3.0), ("step", "3"), ("step", True), ("seen", -6), ("seen", 2), ("seen", 10 ** 15),
    ("weights", {}), ("weights.a", NAN), ("weights.a", [1]), ("weights.a", BROAD), ("weights.a", torch.ones(2, 3).int()),
    ("moments", {}), ("moments", KeyError), ("moments.a", KeyError), ("moments.a.exp_avg", NAN), ("moments.a.exp_avg", BROAD),
    ("moments.a.exp_avg", KeyError), ("moments.a.exp_avg_sq", -torch.ones(2, 3)), ("moments.a.step", torch.tensor(torch.nan)),
    ("moments.a.step", torch.tensor(-9.0)), ("moments.a.step", torch.tensor(9e9)), ("ema", {}), ("ema.a", NAN), ("ema.a", BROAD), ("meta", None), ("meta.args", 3),
    ("meta.base", KeyError), ("scaler", {"scale": "x"}), ("scaler", {"scale": torch.nan}), ("more", 1)]


@pytest.mark.parametrize("path, value", STATES, ids=[f"{p} {str(v)[:20]}" for p, v in STATES])
def test_a_state_that_is_wrong_is_refused(path, value, message, tmp_path):
    wrong = state()
    put(path, value)(wrong)
    torch.save(wrong, tmp_path / "state.pt")
    assert "state.pt" in message(common.load_state_file, tmp_path / "state.pt")


def test_a_state_that_is_right_and_rows_of_a_log(message, tmp_path):
    torch.save(state(), tmp_path / "state.pt")
    assert common.load_state_file(tmp_path / "state.pt")["seen"] == 6
    for row in ("3", "{}", '{"step": "x"}', '{"step": -1}'):
        (tmp_path / "log.jsonl").write_text('{"step": 0}\n' + row + "\n")
        assert "row 2" in message(common.keep_lines, tmp_path / "log.jsonl", 5)


# ---- arrays

def header(shape, kind="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("content, words", [
    (header((10 ** 6, 10 ** 6)), "cut off"), (header((4, 4)) + bytes(60), "cut off"), (header((2,), "|O") + bytes(99), "object"),
    (header((2,), "<U5") + bytes(99), "numbers"), (header((2,), "<c8") + bytes(99), "numbers"), (b"", "not a .npy"),
    (b"\x93NUMPY\x09\x09", "not a .npy"), (b"PK\x03\x04", "not a .npy"), (header((2, 2)) + bytes(16), "channel"),
    (header((0, 4, 4)), "empty"), (header(()) + bytes(4), "channel")])
def test_arrays(content, words, message, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    assert words in message(data.read_map, tmp_path / "a.npy", None, (4, 4), 1)
    for reader in (lambda f: tracks.read_depth(f, (4, 4)), lambda f: tracks.read_poses(f, 2), tracks.read_mesh):
        assert "a.npy" in message(reader, tmp_path / "a.npy")


@pytest.mark.parametrize("text, words", [
    (None, "wanted .obj files"), ("v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3", "NaN"), ("v 0 0 0\nf 1 2 3", "a vertex that is not there")])
def test_meshes(text, words, message, tmp_path):
    if text:
        (tmp_path / "a.OBJ").write_text(text)
    assert words in message(tracks.read_mesh, tmp_path)


def test_a_mirror_is_no_pose(message, tmp_path):
    np.save(tmp_path / "a.npy", np.tile(np.diag([-1.0, 1, 1, 1]), (2, 1, 1)))
    assert "no rotation" in message(tracks.read_poses, tmp_path / "a.npy", 2)


def test_a_bomb_of_zeros(message, tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", depth=np.zeros((64, 64, 64), np.uint8))
    monkeypatch.setenv("NANOVIDEO_ARRAY_LIMIT", "0.0004")
    assert "a.npz: 0 million numbers; NANOVIDEO_ARRAY_LIMIT=" in message(data.read_array, tmp_path / "a.npz", "depth")
    monkeypatch.delenv("NANOVIDEO_ARRAY_LIMIT")
    assert data.read_array(tmp_path / "a.npz", "depth")["depth"].shape == (64, 64, 64)
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("depth.npy", header((10 ** 6, 10 ** 6)))
    assert "cut off" in message(data.read_array, tmp_path / "b.npz", "depth")


# ---- a user's reward

@pytest.mark.parametrize("body, words", [
    ("raise ValueError('no')", "call 1 ended with ValueError: no"), ("import sys; sys.exit(3)", "SystemExit"), ("pass", "NoneType"),
    ("return frames.long().sum((1, 2, 3))", "int64"), ("return frames", "float32"), ("return 1", "returned int")])
def test_a_users_reward_that_fails(body, words, message, tmp_path):
    (tmp_path / "mine.py").write_text(f"def fn(frames, prompts):\n    {body}\n")
    (tmp_path / "ckpt-7.safetensors").touch()
    reward = rewards.get_reward(f"{tmp_path}/mine.py:fn", "cpu", out=tmp_path)
    said = message(reward, torch.zeros(1, 3, 2, 4, 4), ["a"])
    assert words in said and "mine.py:fn" in said and ("ckpt-7" in said or "returned" in said)


# ---- any file

@pytest.mark.slow
@MANY
@given(draw=st.data())
def test_any_weight_file(net, cases, draw):  # noqa: F811
    """Files good, cut, with bytes changed or wrapped at random: tensors or one line, whatever the reader."""
    folder = cases.fresh()
    kind = draw.draw(st.sampled_from(["lora", "checkpoint", "state", "array", "weights"]))
    file, content = folder / "file", io.BytesIO()
    layer = draw.draw(st.sampled_from(["transformer_blocks.0.attn1.to_q", "transformer_blocks_0_attn1_to_q", "x", ""]))
    head = draw.draw(st.sampled_from(["", "transformer.", "lora_unet_", "base_model.model.", "model.", "module."]))
    tails = st.sampled_from([".lora_A.weight", ".lora_B.weight", ".alpha", ".weight", ".lora_down.weight", ".lora_up.weight"])
    shapes = st.sampled_from([(4, 128), (128, 4), (), (0, 128), (3,), (1, 1)])
    tensors = {head + layer + draw.draw(tails): torch.ones(draw.draw(shapes)) for _ in range(draw.draw(st.integers(0, 3)))}
    junk = st.recursive(st.none() | st.integers() | st.floats() | st.text(max_size=9),
                        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x, max_size=3), max_leaves=9)
    if kind == "array":
        np.save(content, np.ones(draw.draw(shapes)))
    elif kind == "checkpoint" or (kind == "lora" and draw.draw(st.booleans())):
        values = meta(**draw.draw(st.dictionaries(st.sampled_from(sorted(common.META_FIELDS)), junk, max_size=3)))
        save_file(tensors, file, {"nanovideo": json.dumps(values)})
        content.write(file.read_bytes())
    else:
        value = state() if kind == "state" else tensors
        name = draw.draw(st.sampled_from(sorted(state())))
        value = value | {name: draw.draw(junk)} if draw.draw(st.booleans()) else {name: value}
        torch.save(value, content)
    blob = bytearray(content.getvalue())
    for place, value in draw.draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4)):
        blob[place % len(blob)] = value
    file.write_bytes(blob[:draw.draw(st.sampled_from([len(blob), len(blob) - 1, len(blob) // 2, 9]))])
    (folder / "adapter_config.json").write_text(json.dumps(draw.draw(junk | st.just(dict(r=4, lora_alpha=8)))))
    reader = {"lora": lambda f: merge_public_lora(net, f), "checkpoint": weights.load_checkpoint, "weights": weights.load_weights,
              "state": common.load_state_file, "array": lambda f: data.read_map(f, None, (4, 4), 1)}[kind]
    cases.check(lambda: reader(file), str(file), "adapter_config.json")
