"""Runs that start from runs and from public files (--init), and what is exported of such a chain."""
import json
import shutil
from argparse import Namespace
from pathlib import Path

import hub
import pytest
import test_keys
import test_transformers
import torch
from runs import on_small_base, same_training
from safetensors.torch import load_file, save_file

import bases
import das
import sample
import vader
from common import INIT, crc32
from models import add_lora, merge_lora, merge_public_lora
from weights import load_checkpoint, lora_file, write_lora

TARGETS = ["to_q", "to_out.0"]
VADER = ["--base", "tiny", "--batch", "1", "--sample-steps", "2", "--eval-n", "1", "--sweep", "0", "--no-grad-ckpt",
         "--rank", "2", "--device", "cpu"]


def write_run(folder, rank=0, base="tiny", init=(), seed=0, net=None):
    """A run of one step that trained all weights of a base's network, or a LoRA; init: runs it started from."""
    net, g = net or bases.load_base(base).net, torch.Generator().manual_seed(seed)
    if rank:
        add_lora(net, rank, 2.0 * rank, TARGETS)
    tensors = {k: v + 0.05 * torch.randn(v.shape, generator=g) for k, v in net.named_parameters()
               if not rank or ".lora_" in k}
    meta = dict(method="t2v", base=base, step=1, sample={"save_fps": 3}, rank=rank, alpha=2.0 * rank or 1.0,
                lora_targets=TARGETS, init=list(map(checksum, init)))
    folder.mkdir()
    for k, run in enumerate(init):
        shutil.copy(run / "ckpt.safetensors", folder / INIT.format(k))
    text = json.dumps(meta)
    save_file(tensors, folder / "ckpt.safetensors", {"nanovideo": text, "crc32": str(crc32(tensors, text))})


def checksum(run):
    return str(crc32(load_file(run / "ckpt.safetensors"), ""))


def weights_of(run):
    """The network of a run as sample.py loads it."""
    return bases.load_run(run, *load_checkpoint(run), None).net.state_dict()


def on(init, out="none", base="tiny"):
    """The network that --init gives a new run."""
    args = Namespace(base=base, init=str(init), out=str(out), resume=False)
    with bases.as_init():
        return bases.load_base(base, links=bases.read_init(args, None)).net.state_dict()


def same(a, b, tol=1e-6):
    return a.keys() == b.keys() and all(torch.allclose(v, b[k], atol=tol) for k, v in a.items())


def test_a_run_from_a_run_from_a_run(tmp_path, message):
    """All weights, then a LoRA, then a LoRA. Each run's folder is whole without those before it."""
    a, b, c, parts = (tmp_path / name for name in ("a", "b", "c", "parts"))
    write_run(a)
    write_run(b, 2, init=[a])
    options = [*VADER, "--init", str(b), "--lr", "1e-2"]
    vader.main([*options, "--steps", "2", "--out", str(c)])
    vader.main([*options, "--steps", "1", "--out", str(parts)])
    assert load_checkpoint(c)[1]["init"] == [checksum(a), checksum(b)]
    assert load_checkpoint(c)[1]["sample"]["save_fps"] == 3  # settings go along the chain
    assert (c / "init-1.safetensors").samefile(b / "ckpt.safetensors")  # and takes no space

    # by hand: b's branches merged into a's weights, c's into those
    net = bases.load_base("tiny").net
    net.load_state_dict(load_file(a / "ckpt.safetensors"), strict=False)
    for run in (b, c):
        tensors, meta = load_checkpoint(run)
        add_lora(net, meta["rank"], meta["alpha"], meta["lora_targets"])
        net.load_state_dict(tensors, strict=False)
        merge_lora(net)
    assert same(weights_of(c), net.state_dict(), 0)
    assert not same(weights_of(c), weights_of(b)) and same(on(c), net.state_dict(), 0)

    shutil.rmtree(a)
    shutil.rmtree(b)
    vader.main([*options, "--steps", "2", "--out", str(parts), "--resume"])
    assert same_training(c, parts)
    sample.main(["--ckpt", str(c), "--prompt", "a red circle", "--sample-steps", "1", "--out", str(tmp_path / "s")])
    assert "has init" in message(vader.main, [*VADER, "--steps", "3", "--out", str(c), "--resume"])

    (c / "init-0.safetensors").unlink()
    assert "init-0.safetensors: missing" in message(weights_of, c)
    shutil.copy(c / "init-1.safetensors", c / "init-0.safetensors")
    resume = [*options, "--steps", "3", "--out", str(c), "--resume"]
    for call in (lambda: weights_of(c), lambda: vader.main(resume), lambda: on(c)):
        assert "init-0.safetensors: not what the run started from" in message(call)


@pytest.mark.parametrize("form", ["comfyui", "kohya", "original"])
def test_a_chain_of_lora_is_exported_as_one(form, tmp_path):
    write_run(tmp_path / "a", 2, seed=1)
    write_run(tmp_path / "b", 3, init=[tmp_path / "a"], seed=2)
    whole = weights_of(tmp_path / "b")
    bases.main(["--export", form, str(tmp_path / "b"), str(tmp_path / form)])
    file = next((tmp_path / form).glob("*.safetensors"))
    assert same(on(file), whole) and same(on(tmp_path / form) if form == "original" else whole, whole)
    plain, half = bases.load_base("tiny").net.state_dict(), on(f"{file}:0.5")
    assert all(torch.allclose(2 * half[k] - plain[k], v, atol=1e-5) for k, v in whole.items())


@pytest.mark.parametrize("name", ["modelscope", "cogvideox-2b"])
def test_diffusers_takes_an_export(name, monkeypatch, tmp_path):
    """Its pipeline for a transformer; for a UNet, which it has no loader for, peft."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    unet, rank = name == "modelscope", 40  # wider than some layers
    row = (hub if unet else test_transformers).small(monkeypatch, name)
    net = test_keys.filled(bases.NETWORKS[type(row.net)](row.net))
    if unet:
        peer = diffusers.UNet3DConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=16, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock3D",) * 2, up_block_types=("CrossAttnUpBlock3D",) * 2).eval()
        peer.load_state_dict(hub.to_diffusers(net.state_dict(), peer, 1))
    else:
        peer = test_keys.cogvideox_peer(diffusers, row.net)
        peer.load_state_dict(net.state_dict())
    write_run(tmp_path / "run", rank, name, net=net)
    net.load_state_dict(load_file(tmp_path / "run" / "ckpt.safetensors"), strict=False)
    bases.main(["--export", "diffusers", str(tmp_path / "run"), str(tmp_path / "lora")])
    x, t, text = torch.randn(2, 4, 3, 8, 12), torch.tensor([7, 900]), torch.randn(2, 8, 32)
    if unet:
        theirs = peft.PeftModel.from_pretrained(peer, str(tmp_path / "lora")).eval()
    else:
        pipe = diffusers.CogVideoXPipeline(None, None, None, peer, diffusers.CogVideoXDDIMScheduler())
        pipe.load_lora_weights(str(tmp_path / "lora"))
    with torch.no_grad():
        ours = net(x, t, text)
        out = theirs(x, t, text).sample if unet else peer(x.transpose(1, 2), text, t).sample.transpose(1, 2)
        test_keys.close(ours, out)
        merge_lora(net)
    fresh = test_keys.filled(bases.NETWORKS[type(row.net)](row.net))
    merge_public_lora(fresh, lora_file(str(tmp_path / "lora"))[0])
    assert same(fresh.state_dict(), net.state_dict(), 1e-5)


def test_a_run_on_a_public_lora_keeps_it(tmp_path):
    """peft's folder, whose scale stands in a config beside the file, at half strength."""
    layer = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    width = bases.load_base("tiny").net.get_submodule(layer).weight.shape
    pair = torch.randn(3, width[1]), 0.1 * torch.randn(width[0], 3)
    write_lora({layer: pair}, "peft", tmp_path / "lora", "tiny")
    vader.main([*VADER, "--init", f"{tmp_path}/lora:0.5", "--steps", "1", "--out", str(tmp_path / "run"), "--lr", "1e-9"])
    shutil.rmtree(tmp_path / "lora")
    change = weights_of(tmp_path / "run")[f"{layer}.weight"] - bases.load_base("tiny").net.state_dict()[f"{layer}.weight"]
    assert torch.allclose(change, 0.5 * pair[1] @ pair[0], atol=1e-4) and change.abs().max() > 1e-2


def test_merged_weights_are_a_start_and_a_base(public, monkeypatch, tmp_path, message):
    """--merge: the file goes to --init, and with the base's other files to --weights."""
    args = on_small_base(vader, "videocrafter2", public, monkeypatch, tmp_path)
    folder = Path(args[3])
    vader.main([*args, "--reward", "brightness", "--steps", "1", "--accum", "1", "--rank", "2", "--sample-steps", "2",
                "--eval-n", "1", "--sweep", "0", "--lr", "0.1", "--out", str(tmp_path / "run")])
    want = bases.load_run(tmp_path / "run", *load_checkpoint(tmp_path / "run"), folder).net.state_dict()
    bases.main(["--merge", str(tmp_path / "run"), str(tmp_path / "out"), "--weights", str(folder)])
    file = next((tmp_path / "out").glob("*"))
    assert file.name == "model.safetensors" and any(".init_attn." in k for k in load_file(file))
    link = bases.read_link("videocrafter2", file)
    base = bases.load_base("videocrafter2", folder, links=[link])
    assert same(base.net.state_dict(), want, 0) and link.kept == file
    for path in (file, tmp_path / "run" / "ckpt.safetensors"):
        assert "has a scale; leave out :2" in message(bases.read_link, "videocrafter2", path, 2.0)
    assert "these are not its weights" in message(bases.read_link, "modelscope", file)
    write_run(tmp_path / "whole")
    write_run(tmp_path / "on-it", 2, init=[tmp_path / "whole"])
    for run in ("whole", "on-it"):
        export = ["--export", "kohya", str(tmp_path / run), str(tmp_path / "x")]
        assert "no LoRA to export; --merge" in message(bases.main, export)


def test_a_branch_of_copies_starts_from_its_own_kind(tmp_path, message):
    write_run(tmp_path / "run", 2, "tiny-cogvideox")
    text = message(das.main, ["--base", "tiny-cogvideox", "--init", str(tmp_path / "run"), "--out", str(tmp_path / "o")])
    assert "das.py copies layers of the public base" in text


def test_public_files_in_shards(tmp_path):
    net = bases.load_base("tiny").net
    state = {k: v + 1 for k, v in net.state_dict().items()}
    names = list(state)
    for n, keys in enumerate((names[::2], names[1::2])):
        save_file({k: state[k].contiguous() for k in keys}, tmp_path / f"part-{n}.safetensors")
    index = {"weight_map": {k: f"part-{i % 2}.safetensors" for i, k in enumerate(names)}}
    (tmp_path / "net.safetensors.index.json").write_text(json.dumps(index))
    link = bases.read_link("tiny", tmp_path / "net.safetensors.index.json")
    assert same(link.kept, state, 0) and same(on(tmp_path / "net.safetensors.index.json"), state, 0)
