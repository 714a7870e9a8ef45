"""Training text to video: VGen's mixture, its gradient scales, zero SNR, TF-T2V, HiGen, VideoComposer."""
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

import bases
import data
import diffusion
import models
import pipeline
import sample
import t2v
import tinyworld
from bases import forget_motion, load_base, spatial_parameters
from common import Env, MySamples
from weights import load_checkpoint, load_pickle

CLIPS = [p for p in (folder / "shared/data/videos" for folder in Path(__file__).parents) if p.exists()]
real = pytest.mark.skipif(not CLIPS, reason="needs real clips, shared/data/videos")
CPU = Env(0, 1, torch.device("cpu"), torch.float32)
QUICK = ["--batch", "1", "--no-cache-latents", "--preview-every", "0", "--warmup", "0", "--ema", "0"]


def train(out, *args):
    t2v.main([*QUICK, *map(str, args), "--out", str(out)])
    return load_checkpoint(out)


def seen_by_the_network(monkeypatch):
    """-> list of (frames, text, conditions) of every forward from here on."""
    calls, forward = [], models.UNet3D.forward

    def spy(self, x, t, text, **cond):
        calls.append((x.shape[2], text.detach().clone(), {k: v for k, v in cond.items() if v is not None}))
        return forward(self, x, t, text, **cond)
    monkeypatch.setattr(models.UNet3D, "forward", spy)
    return calls


# ---- what VGen does: mixture, gradient scales, zero SNR

def test_mixture_gives_each_of_8_processes_its_own_kind_and_one_process_all():
    kinds = sorted(set(t2v.MIXTURE), reverse=True)
    for world, accum, seen in ((8, 2, 0), (1, 4, 6), (2, 3, 12)):
        args = Namespace(mixture=True, batch=2, steps=8, accum=accum, seed=0)
        turn, size = t2v.turns(args, Env(0, world, None, None), 0, seen)
        found = []
        for rank in range(world):
            numbers = MySamples(args, Env(rank, world, None, None), 0, seen)
            kind = [{kinds[turn[(n - seen) // size]] for n in mine} for mine in numbers]
            assert all(len(k) == 1 for k in kind)  # a batch is of one kind
            found.append([k.pop() for k in kind])
        if world == 8:
            assert [set(k) for k in found] == [{kind} for kind in t2v.MIXTURE]
        else:  # in turn, going on from where the run stopped
            order = [found[k % world][k // world] for k in range(world * len(found[0]))]
            assert order == [t2v.MIXTURE[(seen // 2 + k) % 8] for k in range(len(order))]


def test_what_an_image_model_has_is_what_vgen_scales():
    with torch.device("meta"):
        net = models.UNet3D()
    names = spatial_parameters(net)
    assert len(names) == 682  # of VGen's list of keys
    assert "input_blocks.0.0.weight" in names and not any("temopral" in k or "time_embed" in k for k in names)


def test_gradient_scale_and_learning_rate_of_layers_within_a_frame(tmp_path):
    before = load_base("tiny").net.state_dict()
    within = spatial_parameters(load_base("tiny").net).keys()
    weights, _ = train(tmp_path / "frozen", "--base", "tiny", "--steps", 1, "--spatial-lr", 0)
    assert all(torch.equal(weights[k], before[k]) for k in within)
    assert any(not torch.equal(weights[k], before[k]) for k in weights.keys() - within)
    first = []
    for name, more in (("one", []), ("half", ["--grad-scale", "0.5"])):
        train(tmp_path / name, "--base", "tiny", "--steps", 1, "--clip", 1e6, *more)
        moments = load_pickle(tmp_path / name / "state.pt")["moments"]
        first.append({k: v["exp_avg"] for k, v in moments.items()})
    for k, whole in first[0].items():
        assert torch.allclose(first[1][k], whole * (0.5 if k in within else 1.0))


def test_zero_snr_goes_with_the_run(tmp_path, monkeypatch):
    row = bases.BASES["tiny"]
    weak = dict(name="linear_sd", prediction="eps")
    monkeypatch.setitem(bases.BASES, "tiny", bases.replace(
        row, schedule=weak, sample=row.sample | {"spacing": "leading"}))
    tensors, meta = train(tmp_path / "run", "--base", "tiny", "--steps", 1, "--zero-snr", "--rank", 2)
    base = pipeline.load_run(tmp_path / "run", tensors, meta, None)
    assert base.schedule.prediction == "v" and base.schedule.alpha_bar[-1] < 1e-12
    assert meta["sample"]["spacing"] == "trailing"
    assert load_base("tiny").schedule.prediction == "eps"


def test_coherence_is_the_loss_between_changes_from_frame_to_frame():
    schedule, g = diffusion.make_schedule(), torch.Generator().manual_seed(0)
    x0, noise, out = (torch.randn(2, 3, 4, 5, 6, generator=g) for _ in range(3))
    t = torch.tensor([10, 900])
    plain, more = (diffusion.diffusion_loss(lambda x, t: out, schedule, x0, noise, t, coherence=c)
                   for c in (0.0, 0.1))
    wrong = out - noise
    steps = (wrong[:, :, 1:] - wrong[:, :, :-1]).square().mean((1, 2, 3, 4))
    assert torch.allclose(more - plain, 0.1 * steps, atol=1e-6)
    one = (diffusion.diffusion_loss(lambda x, t: out[:, :, :1], schedule, x0[:, :, :1], noise[:, :, :1], t,
                                    coherence=c) for c in (0.0, 0.1))
    assert torch.equal(*one)  # an image has none


def test_forgotten_motion_is_frame_by_frame():
    """Without layers over time a frame's prediction does not depend on the others."""
    net = load_base("tiny").net
    x, text = torch.randn(1, 4, 8, 8, 8), torch.randn(1, 10, 64)
    other = torch.cat([x[:, :, :4], torch.randn(1, 4, 4, 8, 8)], dim=2)
    t = torch.tensor([500])
    with torch.no_grad():
        assert (net(x, t, text) - net(other, t, text))[:, :, :4].abs().max() > 1e-3
        forget_motion(net)
        assert torch.allclose(net(x, t, text)[:, :, :4], net(other, t, text)[:, :, :4], atol=1e-5)


# ---- HiGen's factors

def test_factors_are_those_of_the_clips():
    still = torch.randn(1, 4, 1, 8, 8).expand(-1, -1, 5, -1, -1)
    assert diffusion.motion_factors(still).tolist() == [[0] * 4]
    ramp = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(2, 4, -1, 8, 8) * torch.tensor([0.1, 0.25]).view(
        2, 1, 1, 1, 1)
    assert diffusion.motion_factors(ramp).tolist() == [[100] * 4, [250] * 4]
    rows = diffusion.appearance_matrix(32, 0.7)[None]
    assert torch.allclose(diffusion.appearance_rows(rows), rows, atol=1e-6)
    short = diffusion.appearance_rows(diffusion.appearance_matrix(8, 0.7)[None])
    assert short.shape == (1, 8, 32) and torch.allclose(short[0, 0, [0, -1]], torch.tensor([1.0, 0.3]))


def test_tiny_higen_starts_from_words_that_mean_what_they_did():
    base = load_base("tiny-higen")
    with torch.no_grad():
        tokens = base.encode_text(["a red circle moving left", "", "a blue square growing"])
    before = (base.net.context_embedding(tokens) - tokens).square().mean()
    bases.fit_resampler(base, steps=80)
    assert (base.net.context_embedding(tokens) - tokens).square().mean() < 0.05 * before


def test_higen_is_told_of_clips_and_images(monkeypatch, tmp_path):
    calls = seen_by_the_network(monkeypatch)
    monkeypatch.setattr(t2v, "fit_resampler", lambda base: None)
    for images in (0, 1):
        train(tmp_path / str(images), "--base", "tiny-higen", "--steps", 1, "--image-share", images)
    (f, _, clip), (one, _, image) = calls
    assert (f, one) == (8, 1)
    assert clip["motion_factor"].shape == (1, 7) and clip["appearance_factor"].shape == (1, 8, 32)
    assert clip["image_prior"].abs().max() > 0.1 and image["image_prior"].abs().max() == 0
    assert image["motion_factor"].tolist() == [0] and (image["appearance_factor"] == 1).all()
    calls.clear()
    sample.main(["--ckpt", str(tmp_path / "0"), "--prompt", "a red circle moving left", "--sample-steps", "2",
                 "--motion-factor", "120", "--out", str(tmp_path / "s")])
    assert [f for f, _, _ in calls] == [1, 1, 8, 8] and (calls[-1][2]["motion_factor"] == 120).all()


# ---- VideoComposer's maps

def test_maps_start_as_nothing_and_can_be_dropped_for_one_sample():
    plain, base = load_base("tiny").net, load_base("tiny-vcomposer")
    x, text, t = torch.randn(2, 4, 8, 8, 8), torch.randn(2, 10, 64), torch.tensor([500, 20])
    depth = torch.rand(2, 1, 8, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(x, t, text), base.net(x, t, text, depth=depth))
        base.net.input_blocks[0][0].weight.normal_(std=0.1)
        with_map, without = base.net(x, t, text, depth=depth), base.net(x, t, text)
        half = base.net(x, t, text, depth=depth, map_keep={"depth": torch.tensor([1.0, 0.0])})
    assert (with_map - without).abs().max() > 1e-3
    assert torch.allclose(half[0], with_map[0], atol=1e-5) and torch.allclose(half[1], without[1], atol=1e-5)


def test_maps_of_a_tiny_clip():
    rows = tinyworld.TinyWorld(40, depth=True, motion="moving right")
    item = next(rows[i, 0] for i in range(40) if "square" in rows[i, 0]["text"])
    maps = data.video_maps(item["video"], models.MAPS, flow=data.lucas_kanade)
    inside = item["depth"][0, 1:] > 0
    assert maps["motion"].shape == (2, 8, 32, 32) and (maps["motion"][:, 0] == 0).all()
    x, y = (maps["motion"][k, 1:][inside].mean() for k in (0, 1))
    assert 0.5 < x < 3 and y.abs() < 0.3  # to the right
    dots = data.video_maps(item["video"], ["motion"], flow=data.lucas_kanade, block=16)["motion"]
    assert torch.equal(dots[..., 8::16, 8::16], maps["motion"][..., 8::16, 8::16])
    assert torch.count_nonzero(dots) <= 2 * 7 * 4
    sketch = maps["sketch"]
    assert 0 <= sketch.min() and sketch.max() <= 1
    assert sketch[0, 1:][inside].mean() > 3 * sketch[0, 1:][~inside].mean()
    assert torch.equal(maps["single_sketch"][:, 5], sketch[:, 0]) and maps["local_image"].min() >= 0


def test_training_with_maps_goes_on_bit_for_bit(tmp_path):
    args = ["--base", "tiny-vcomposer", "--cache-latents", "--lr-schedule", "constant", "--image-share", 0.5]
    small = tinyworld.TinyWorld.__init__
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tinyworld.TinyWorld, "__init__", lambda self, n, *a, **k: small(self, 4, *a, **k))
        whole, _ = train(tmp_path / "whole", *args, "--steps", 4)
        train(tmp_path / "parts", *args, "--steps", 2)
        parts, _ = train(tmp_path / "parts", *args, "--steps", 4, "--resume")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


# ---- data

def test_captionless_lists(tmp_path, message):
    for name in ("a", "b"):
        data.write_video(tmp_path / "clips" / f"{name}.mp4", torch.rand(3, 3, 16, 16) * 2 - 1)
    assert "no caption beside it" in message(data.VideoDataset, tmp_path / "clips", 2, 16, 16)
    (tmp_path / "list.txt").write_text("clips/a.mp4\nclips/b.mp4|||a caption that nobody reads\n")
    (tmp_path / "list.csv").write_text("video\nclips/a.mp4\nclips/b.mp4\n")
    for source in ("clips", "list.txt", "list.csv"):
        rows = data.VideoDataset(tmp_path / source, 2, 16, 16, captions=False)
        assert len(rows) == 2 and rows[1, 0]["text"] == ""


# ---- real clips, small networks

def real_clips(folder, names):
    folder.mkdir()
    for name in names:
        (folder / f"{name}.mp4").symlink_to(CLIPS[0] / f"{name}.mp4")
        (folder / f"{name}.txt").write_text(name.replace("_", " "))
    return folder


@real
def test_mixture_on_real_clips(public, tmp_path, monkeypatch):
    folder, _ = public("modelscope")
    calls = seen_by_the_network(monkeypatch)
    tensors, _ = train(tmp_path / "run", "--base", "modelscope", "--weights", folder, "--steps", 2, "--accum",
                       4, "--mixture", "--rank", 2, "--workers", 0, "--data",
                       real_clips(tmp_path / "clips", ["cactus_blooming"]))
    assert [f for f, _, _ in calls] == [f for f, _ in t2v.MIXTURE]
    assert any(v.abs().max() > 0 for k, v in tensors.items() if "lora_B" in k)


@real
def test_text_free_on_real_clips(public, tmp_path, monkeypatch):
    """TF-T2V: clips go without words, told the middle frame's embedding; pictures have their captions."""
    folder, _ = public("tft2v")
    (tmp_path / "pictures").mkdir()
    for i, word in enumerate(("bear", "tiger")):
        Image.effect_noise((40, 30), 50 + i).convert("RGB").save(tmp_path / "pictures" / f"{word}.png")
    (tmp_path / "pictures.csv").write_text("file,text\npictures/bear.png,a bear\npictures/tiger.png,a tiger")
    (tmp_path / "clips.txt").write_text("".join(f"{CLIPS[0] / name}.mp4\n" for name in (
        "cactus_blooming", "cat_walking", "eagle")))
    calls = seen_by_the_network(monkeypatch)
    train(tmp_path / "run", "--base", "tft2v", "--weights", folder, "--steps", 6, "--rank", 2, "--text-free",
          "--coherence", 0.1, "--image-share", 0.5, "--drop-text", 0, "--negative", "", "--workers", 0,
          "--data", tmp_path / "clips.txt", "--images", tmp_path / "pictures.csv")
    base = load_base("tft2v", folder)
    with torch.no_grad():
        empty, bear, tiger = base.encode_text(["", "a bear", "a tiger"])
    assert {f for f, _, _ in calls} == {1, 3}
    for f, text, cond in calls:
        known = (empty,) if f > 1 else (bear, tiger)
        assert any(torch.allclose(text[0], k, atol=1e-5) for k in known)
        assert ("image" in cond) == (f > 1)
    sample.main(["--ckpt", str(tmp_path / "run"), "--weights", folder, "--prompt", "a bear", "--out",
                 str(tmp_path / "s")])
    assert (tmp_path / "s" / "0000.mp4").exists()


@real
def test_higen_on_real_clips(public, tmp_path, monkeypatch):
    folder, _ = public("higen")
    calls = seen_by_the_network(monkeypatch)
    train(tmp_path / "run", "--base", "higen", "--weights", folder, "--steps", 2, "--rank", 2,
          "--image-share", 0, "--workers", 0, "--data",
          real_clips(tmp_path / "clips", ["cactus_blooming", "car_turn"]))
    for f, _, cond in calls:
        assert f == 32 and cond["motion_factor"].shape == (1, 31) and cond["motion_factor"].min() > 0
        rows = cond["appearance_factor"][0]  # cosines of CLIP embeddings
        assert torch.allclose(rows.diagonal(), torch.ones(32), atol=1e-4) and rows.min() < 0.9999
    sample.main(["--ckpt", str(tmp_path / "run"), "--weights", folder, "--prompt", "a cactus",
                 "--motion-factor", "300", "--appearance-factor", "0.5", "--out", str(tmp_path / "s")])
    rows = [json.loads(x) for x in (tmp_path / "s" / "index.jsonl").read_text().splitlines()]
    assert rows[0]["motion_factor"] == 300 and rows[0]["appearance_factor"] == 0.5
