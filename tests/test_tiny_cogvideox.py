"""The base tiny-cogvideox: sizes, loading and packing, sampling from a picture, its autoencoder."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import bases
import sample
import tinyworld
from bases import BASES, latent_shape, load_base
from dit import PATCH, CogVideoX
from tinyworld import TinyText, judge_captions, tiny_batch
from vae import CogVideoXVAE
from weights import load_weights, replace_part

NAME, ROW = "tiny-cogvideox", BASES["tiny-cogvideox"]
ASSET = bases.ASSETS / f"{NAME}.safetensors"
needs_asset = pytest.mark.skipif(not ASSET.exists(), reason="not trained yet")


def random_parts():
    net, text = CogVideoX(ROW.net), TinyText(ROW.words, ROW.net.text_dim)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return {"net": net, "vae": CogVideoXVAE(ROW.vae), "text": text}


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A folder of assets with random weights of this base, under the names of the shipped file."""
    for part, module in random_parts().items():
        replace_part(tmp_path / f"{NAME}.safetensors", part, module.state_dict())
    monkeypatch.setattr(bases, "ASSETS", tmp_path)
    return tmp_path


def psnr(a, b):
    """Of videos in [-1,1], (n,) dB."""
    return -10 * torch.log10(((a - b) / 2).square().flatten(1).mean(1))


def test_sizes(message):
    shape = latent_shape(NAME, 9, 32, 32)
    assert shape == (ROW.vae.z_channels, *ROW.net.size) and shape[1] >= 3
    assert min(shape[2:]) // PATCH >= 8  # tokens a side
    assert latent_shape(NAME, 1, 32, 32)[1] == 1
    assert "at most 9; nearest: 9" in message(latent_shape, NAME, 17, 32, 32)
    assert "nearest: 1 or 9" in message(latent_shape, NAME, 8, 32, 32)
    assert "--width 48" in message(latent_shape, NAME, 9, 32, 48)
    assert latent_shape("cogvideox-5b-i2v", 49, 480, 720) == (16, 13, 60, 90)
    assert "nearest: 49" in message(latent_shape, "cogvideox-5b-i2v", 57, 480, 720)
    assert "nearest: 49 or 57" in message(latent_shape, "cogvideox-5b", 50, 480, 720)
    assert "multiple of 16; nearest: 480 or 496" in message(latent_shape, "cogvideox-5b", 49, 484, 720)
    assert "480x720 pixels only" in message(latent_shape, "cogvideox-5b-i2v", 49, 512, 720)


def test_the_file_stays_small(assets):
    assert (assets / f"{NAME}.safetensors").stat().st_size <= 3.9e6


def test_it_loads_and_knows_the_new_motions(assets, message):
    base = load_base(NAME)
    assert base.row.first_frame and not base.net.training
    with torch.no_grad():
        text = base.encode_text(["a red circle zigzagging on a gray background", "a blue square circling"])
        assert text.shape == (2, ROW.net.text_length, ROW.net.text_dim)
        x = torch.randn(2, *latent_shape(NAME, 9, 32, 32))
        assert base.net(x, torch.tensor([999, 3]), text, first_frame=x[:, :, :1]).shape == x.shape
        assert "'dragon'" in message(base.encode_text, ["a red dragon"])
    scratch = load_base(NAME, scratch=True)
    table = "patch_embed.pos_embedding"
    assert torch.allclose(scratch.net.state_dict()[table], base.net.state_dict()[table], atol=1e-3)
    assert not torch.equal(scratch.net.proj_out.weight, base.net.proj_out.weight)


def test_pack_takes_a_run_that_holds_what_was_trained(assets, tmp_path):
    """The table of positions is not trained: the file gets a fresh one."""
    parts = random_parts()
    tensors = dict(parts["net"].named_parameters())
    tensors |= {f"text_encoder.{k}": p for k, p in parts["text"].named_parameters()}
    (tmp_path / "run").mkdir()
    save_file({k: p.detach() for k, p in tensors.items()}, tmp_path / "run" / "ckpt.safetensors",
              {"nanovideo": json.dumps({"base": NAME, "method": "i2vgen", "step": 1, "sample": {}})})
    before = load_weights(assets / f"{NAME}.safetensors")
    bases.main(["--pack", NAME, str(tmp_path / "run")])
    base, after = load_base(NAME), load_weights(assets / f"{NAME}.safetensors")
    assert torch.allclose(base.net.proj_out.weight, parts["net"].proj_out.weight, atol=1e-3)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before if k.startswith("vae."))


def test_sample_from_a_picture(assets, tmp_path, message):
    Image.fromarray(np.full((32, 32, 3), 60, np.uint8)).save(tmp_path / "a.png")
    args = ["--base", NAME, "--prompt", "a red circle circling", "--sample-steps", "2"]
    sample.main([*args, "--image", str(tmp_path / "a.png"), "--n", "2", "--out", str(tmp_path / "s")])
    rows = [json.loads(x) for x in (tmp_path / "s" / "index.jsonl").read_text().splitlines()]
    assert [r["file"] for r in rows] == ["0000.mp4", "0001.mp4"] and rows[0]["frames"] == 9
    assert "--image" in message(sample.main, args)


# ---- autoencoder

def test_autoencoder_decodes_chosen_frames_and_chunks_as_the_whole():
    auto, z = CogVideoXVAE(ROW.vae), torch.randn(3, *latent_shape(NAME, 9, 32, 32), requires_grad=True)
    whole = auto.decode(z)
    assert whole.shape == (3, 3, 9, 32, 32)
    assert (auto.decode(z, frames=[4, 0]) - whole[:, :, [4, 0]]).abs().max() < 1e-5
    assert (auto.decode(z, chunk=1) - auto.decode(z, chunk=100)).abs().max() < 1e-5
    auto.decode(z, frames=[8])[0].sum().backward()
    assert (z.grad[0].abs().amax((0, 2, 3)) > 0).all() and not z.grad[1:].any()
    with torch.no_grad():
        video = whole.clamp(-1, 1)
        assert (auto.encode(video, chunk=9) - auto.encode(video, chunk=100)).abs().max() < 1e-5


def test_clips_it_is_trained_on():
    clips = tinyworld.tiny_clips((3, 4), 8)
    assert clips.shape == (8, 3, 9, 32, 32) and clips.abs().max() <= 1
    assert torch.equal(clips, tinyworld.tiny_clips((3, 4), 8)) and not torch.equal(clips, tinyworld.tiny_clips((3, 5), 8))
    assert (clips[4:].diff(dim=2).abs().amax((1, 3, 4)) > 0.1).any(1).all()  # the wild ones move


@pytest.mark.slow
def test_training_writes_the_part(assets):
    path = assets / f"{NAME}.safetensors"
    before = load_weights(path)
    tinyworld.train_autoencoder(NAME, path, 1, 1, 2)
    after = load_weights(path)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert after.keys() == before.keys() and changed and all(k.startswith("vae.") for k in changed)
    tinyworld.train_autoencoder(NAME, path, 0, 3, 2)  # the decoder alone
    again = load_weights(path)
    assert {k.split(".")[1] for k in after if not torch.equal(after[k], again[k])} == {"decoder"}


@pytest.mark.slow
@needs_asset
def test_shipped_autoencoder():
    """Held-out clips come back as they were: of the tiny world, on wild paths, tracking videos."""
    auto = load_base(NAME).vae
    video, captions, _ = tiny_batch((12, 34), 128, 9)
    wild = torch.stack([tinyworld.wild_clip(np.random.default_rng((5, i)), 9) for i in range(32)])
    with torch.no_grad():
        back = auto.decode(auto.encode(video)).clamp(-1, 1)
        again = auto.decode(auto.encode(wild)).clamp(-1, 1)
    seen = judge_captions(back, captions)
    assert psnr(back, video).mean() >= 30 and psnr(again, wild).mean() >= 22
    assert min(seen[k] for k in ("shape", "colour", "motion")) >= 0.98, seen
