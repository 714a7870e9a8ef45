"""Image to video: i2vgen.py on its bases at small width, --continue, --judge with images, new motions."""
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_transformers
import test_wan_bases
import torch
from PIL import Image
from runs import check_kill_in_evaluation, files
from safetensors.torch import load_file

import bases
import i2vgen
import models
import pipeline
import sample
from common import Env, generator, read_lines
from data import read_video, video_info, write_video
from metrics import psnr
from tinyworld import (
    ATTRIBUTES,
    FLAW_SHARES,
    MOTIONS,
    NEW_MOTIONS,
    TINY_WORDS,
    TinyWorld,
    judge,
    judge_captions,
    parse,
    tiny_batch,
    tiny_pairs,
    tiny_scene,
)
from weights import load_pickle

ROOT = Path(__file__).parent.parent
CLIPS = ROOT.parent / "shared" / "data" / "videos"
SCRATCH = ["--base", "tiny-i2v", "--scratch", "--batch", "2", "--no-cache-latents", "--eval-n", "2"]
# captions of our own; not every clip need be there
CAPTIONS = {"cactus_blooming": "a cactus opens its flowers", "car_turn": "a car turns on a road",
            "cat_walking": "a cat walks through grass", "eagle": "an eagle flies over water"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two sampler steps."""
    row = bases.BASES["tiny-i2v"]
    monkeypatch.setitem(bases.BASES, "tiny-i2v", replace(row, sample=replace(row.sample, sample_steps=2)))


def train(out, steps, *more):
    i2vgen.main([*SCRATCH, "--steps", str(steps), "--out", str(out), *more])


@pytest.fixture
def small(request, public, monkeypatch, tmp_path):
    """name -> arguments of a run on a small base of that name with two clips of noise as its data."""
    def get(name):
        if name == "i2vgen-xl":
            weights = public(name)[0]
        else:
            test_transformers.small(monkeypatch, name)
            weights = tmp_path / "weights"
            test_transformers.publish(weights, name)
        frames, h, w = bases.BASES[name].sample.size
        for i in range(2):
            write_video(tmp_path / f"data/{i}.mp4", torch.rand(3, frames + 3, h, w) * 2 - 1)
            (tmp_path / f"data/{i}.txt").write_text("a red ball moves to the left")
        return ["--base", name, "--weights", str(weights), "--data", str(tmp_path / "data"),
                "--read-fps", "8", "--workers", "0", "--steps", "2", "--out", str(tmp_path / "run")]
    return get


# ---- the tiny base

@pytest.mark.parametrize("more", [(), ("--cache-latents", "--ema", "0.9", "--image-share", "0.5")])
def test_resume_equals_the_uninterrupted_run(more, tmp_path, monkeypatch):
    monkeypatch.setattr(i2vgen, "TINY_CLIPS", {False: 8, True: 8})
    schedule = [*more, "--warmup", "2", "--lr-schedule", "constant"]
    train(tmp_path / "whole", 3, *schedule)
    train(tmp_path / "parts", 2, *schedule)
    train(tmp_path / "parts", 3, *schedule, "--resume")
    whole, parts = (load_file(tmp_path / d / "ckpt.safetensors") for d in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert {k.split(".")[0] for k in whole} > {"text_encoder", "image_encoder", "local_image_concat"}


@pytest.mark.parametrize("more", [(), ("--ema", "0")])
def test_resuming_a_finished_run_changes_nothing(more, tmp_path):
    """Nor is it trained on: only the evaluation at its end is made again."""
    train(tmp_path, 2, *more)
    kinds = ".png", ".mp4", ".safetensors", ".pt", ".jsonl"
    before = files(tmp_path, *kinds)
    train(tmp_path, 2, *more, "--resume")
    assert files(tmp_path, *kinds) == before


@pytest.mark.parametrize("when", ["step-2", "after"])
def test_resuming_an_almost_finished_run(when, tmp_path, monkeypatch):
    """Killed in the evaluation after its second of three updates, or in the one at the end."""
    check_kill_in_evaluation(i2vgen, train, when, tmp_path, monkeypatch)
    steps = [[row["step"] for row in read_lines(tmp_path / d / "eval.jsonl")] for d in ("whole", "parts")]
    assert steps == [[2, 3], [2, 3] if when == "after" else [3]]


def test_accumulation_equals_a_large_batch(tmp_path):
    """All that is random about a sample, dropout included, comes from its number."""
    grads = []
    for batch, accum in ((4, 1), (1, 4)):
        out = tmp_path / f"{batch}x{accum}"
        train(out, 1, "--batch", str(batch), "--accum", str(accum))
        moments = load_pickle(out / "state.pt")["moments"]
        grads.append(torch.cat([moments[k]["exp_avg"].flatten() for k in sorted(moments)]))
    assert (grads[1] - grads[0]).norm() < 2e-6 * grads[0].norm()


def test_from_scratch_to_packed_base_to_fine_tuning(tmp_path, monkeypatch):
    """--scratch, bases.py --pack, load_base, sample.py with --continue and --judge, LoRA on a new motion."""
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "tiny.safetensors").symlink_to(bases.ASSETS / "tiny.safetensors")
    monkeypatch.setattr(bases, "ASSETS", assets)
    train(tmp_path / "run", 1)
    bases.main(["--pack", "tiny-i2v", str(tmp_path / "run")])
    packed = load_file(assets / "tiny-i2v.safetensors")
    assert {k.split(".")[0] for k in packed} == {"net", "text", "image"}  # the autoencoder is tiny's
    assert (assets / "tiny-i2v.safetensors").stat().st_size <= 3.9e6
    base = bases.load_base("tiny-i2v")
    assert torch.equal(base.vae.decoder.conv_in.weight, bases.load_base("tiny").vae.decoder.conv_in.weight)
    assert list(base.text_encoder.words) == [*TINY_WORDS, *NEW_MOTIONS]

    Image.new("RGB", (50, 40), (230, 40, 40)).save(tmp_path / "first.png")
    out = tmp_path / "s"
    sample.main(["--base", "tiny-i2v", "--image", str(tmp_path / "first.png"), "--prompt",
                 "a red circle circling", "--continue", "2", "--out", str(out)])
    assert video_info(out / "0000.mp4")[0] == 8 + 7 + 7
    for command in (["--base", "tiny-i2v"], ["--ckpt", str(tmp_path / "run")]):
        sample.main([*command, "--judge", "3", "--motion", "circling", "--out", str(tmp_path / "j")])
        verdict = json.loads((tmp_path / "j" / "judge.json").read_text())
        assert {"psnr", "psnr_worst", "motion", "joint"} <= set(verdict) and verdict["clips"] == 3
        rows = [json.loads(x) for x in (tmp_path / "j" / "index.jsonl").read_text().splitlines()]
        assert all("circling" in r["prompt"] and Path(r["image"]).exists() for r in rows)

    monkeypatch.setattr(i2vgen, "TINY_CLIPS", {False: 8, True: 8})
    i2vgen.main(["--base", "tiny-i2v", "--rank", "2", "--steps", "1", "--batch", "2", "--eval-n", "2",
                 "--out", str(tmp_path / "tuned")])
    rows = [json.loads(x) for x in (tmp_path / "tuned" / "eval.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1] and "motion" in rows[0]["judge"]
    assert (tmp_path / "tuned" / "before.png").exists() and (tmp_path / "tuned" / "after.png").exists()
    sample.main(["--ckpt", str(tmp_path / "tuned"), "--judge", "1", "--out", str(tmp_path / "t")])


def test_a_continued_clip_starts_where_the_last_one_ended(tmp_path, monkeypatch):
    """The clip's own last frame comes back as the next one's condition, and is not there twice."""
    images_given, real = [], pipeline.conditions
    train(tmp_path / "run", 1)

    def spy(base, env, sampling, images, *more):
        images_given.append(images[0])
        return real(base, env, sampling, images, *more)
    monkeypatch.setattr(pipeline, "conditions", spy)
    monkeypatch.setattr(pipeline, "generate", lambda base, env, prompts, seeds, args, *a, **kw: torch.stack(
        [torch.linspace(-1, 0, 8)[None, :, None, None].expand(3, 8, 32, 32)] * len(prompts)))
    Image.new("RGB", (32, 32)).save(tmp_path / "first.png")
    sample.main(["--ckpt", str(tmp_path / "run"), "--image", str(tmp_path / "first.png"), "--prompt",
                 "a red circle growing", "--continue", "1", "--out", str(tmp_path / "s")])
    assert images_given[1].getpixel((3, 3)) == (128, 128, 128)
    assert read_video(tmp_path / "s" / "0000.mp4")[0].shape[1] == 15


# ---- public bases at small width

@pytest.mark.parametrize("rank", ["0", "2"])
@pytest.mark.parametrize("name", ["i2vgen-xl", "cogvideox-5b-i2v"])
def test_trains_resumes_and_samples(name, rank, small, tmp_path):
    args = [*small(name), "--rank", rank, "--image-share", "0.5", "--drop-image", "0.5"]
    i2vgen.main(args)
    args[args.index("--steps") + 1] = "3"
    i2vgen.main([*args, "--resume"])
    tensors = load_file(tmp_path / "run" / "ckpt.safetensors")
    assert all((".lora_" in k) == (rank == "2") for k in tensors)
    Image.new("RGB", (30, 20), (9, 99, 9)).save(tmp_path / "first.png")
    sample.main(["--ckpt", str(tmp_path / "run"), "--image", str(tmp_path / "first.png"), "--prompt",
                 "a red ball", "--weights", args[3], "--continue", "1", "--out", str(tmp_path / "s")])
    frames = bases.BASES[name].sample.frames
    assert video_info(tmp_path / "s" / "0000.mp4")[0] == 2 * frames - 1


@pytest.mark.parametrize("name", ["i2vgen-xl", "cogvideox-5b-i2v"])
def test_every_trained_parameter_gets_a_gradient_and_the_image_reaches_the_network(name, small):
    weights = small(name)[3]
    base = bases.load_base(name, weights)
    base.net.requires_grad_(True)
    base.net.grad_ckpt = True
    base.net.train()
    sampling = base.row.sample
    x0 = torch.randn(2, *base.latent_shape(sampling))
    picture = torch.rand(2, 3, sampling.height, sampling.width) * 2 - 1
    if name == "i2vgen-xl":
        picture = torch.randn(2, 3, 224, 224)
    args = Namespace(drop_text=0.0, drop_image=0.0, offset_noise=0.1)

    def loss(picture, **changed):
        models.seed_dropout(base.net, 0, range(2))
        return i2vgen.i2v_loss(base.net, base, sampling, x0, {"picture": picture}, ["a ball", "a red ball"],
                               [generator("x", i) for i in range(2)], Namespace(**vars(args) | changed))
    first = loss(picture)
    first.mean().backward()
    lacking = [k for k, p in base.net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not lacking, lacking
    assert all(p.grad is None for part in (base.vae, base.text_encoder) for p in part.parameters())
    with torch.no_grad():
        assert torch.allclose(loss(picture), first, atol=1e-5)           # all that is random is keyed
        other = loss(torch.stack([picture[0], -picture[1]]))
        assert torch.allclose(other[0], first[0], atol=1e-5) and (other[1] - first[1]).abs() > 1e-6
        assert (loss(picture, drop_image=1.0) - first).abs().min() > 1e-6
        assert torch.allclose(loss(picture, drop_image=1.0), loss(-picture, drop_image=1.0), atol=1e-5)


def test_cogvideox_noises_the_pixels_of_the_first_frame(small):
    """sigma = exp(N(-3, 0.5)) for each clip; nothing of the image is left where it is dropped."""
    base = bases.load_base("cogvideox-5b-i2v", small("cogvideox-5b-i2v")[3])
    seen = []
    base.vae.encode = lambda video, noise: seen.append(video) or noise
    n = 400
    x0, picture = torch.zeros(n, 4, 3, 4, 6), torch.zeros(n, 3, 16, 16)
    keep = (torch.arange(n) % 2).float()
    cond = i2vgen.image_condition(base, x0, {"picture": picture}, keep, [generator("y", i) for i in range(n)])
    log_sigma = seen[0].flatten(1).std(1).log()
    assert abs(log_sigma.mean() + 3) < 0.1 and abs(log_sigma.std() - 0.5) < 0.06
    assert cond["first_frame"].shape == (n, 4, 1, 4, 6)
    assert not cond["first_frame"][::2].any() and cond["first_frame"][1::2].any(dim=1).all()


@pytest.mark.parametrize("name", ["wan2.1-i2v-14b-480p", "wan2.2-ti2v-5b"])
def test_wan_sees_the_first_frame_as_in_sampling(name, monkeypatch, tmp_path):
    """Beside the noise and by CLIP, or as a clean first frame with a step of 0; not where it is dropped."""
    row = test_wan_bases.small(monkeypatch, name)
    test_wan_bases.publish(tmp_path, name, "original")
    base, env = bases.load_base(name, tmp_path), Env(0, 1, torch.device("cpu"), torch.float32)
    video = torch.rand(2, 3, *row.sample.size) * 2 - 1
    encoded = i2vgen.encode(base, env, row.sample, video)
    x0, calls = base.vae.normalise(encoded.pop("mean")), []
    del encoded["std"]
    first = [pipeline.frame_picture(clip[:, 0]) for clip in video]
    expected, _ = pipeline.conditions(base, env, row.sample, first)
    kept = expected.pop("kept", x0[:, :, :1])
    assert encoded.keys() == expected.keys() and torch.allclose(kept, x0[:, :, :1], atol=0.1)

    def net(x, t, text, **cond):
        calls.append((x, t, cond))
        return torch.zeros_like(x)
    for drop in (0.0, 1.0):
        args = Namespace(drop_text=0.0, drop_image=drop, offset_noise=0.0)
        i2vgen.i2v_loss(net, base, row.sample, x0, encoded, ["a", "b"], [generator("w", i) for i in range(2)], args)
    (x, t, cond), (x_dropped, t_dropped, dropped) = calls
    assert all(torch.equal(cond[k], v) and not dropped[k].any() for k, v in expected.items())
    if row.keeps_first:
        assert torch.equal(x[:, :, 0], x0[:, :, 0]) and not t[:, 0].any() and (t[:, 1:] > 0).all()
        assert not torch.equal(x_dropped[:, :, 0], x0[:, :, 0]) and (t_dropped > 0).all()


def test_starts_from_modelscope(small, message, tmp_path):
    """Layers that ModelScope lacks are new, the others its own; only training of all weights starts so."""
    args = small("i2vgen-xl")
    own = torch.load(Path(args[3]) / "i2vgen_xl_00854500.pth", weights_only=True)["state_dict"]
    new = ("fps_embedding.", "local_image", "local_temporal_encoder.", "context_embedding.")
    plain = {k: v for k, v in own.items() if not k.startswith(new)}
    plain["input_blocks.0.0.weight"] = own["input_blocks.0.0.weight"][:, :4].clone()
    folder = tmp_path / "modelscope"
    folder.mkdir()
    torch.save({"state_dict": plain}, folder / "text2video_pytorch_model.pth")
    for theirs, ours in (("VQGAN_autoencoder.pth", "v2-1_512-ema-pruned.ckpt"),
                         ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.bin")):
        (folder / theirs).symlink_to(Path(args[3]).absolute() / ours)
    missing = message(bases.load_base, "i2vgen-xl", folder)
    assert "i2vgen_xl_00854500.pth" in missing and "are missing" in missing
    base = bases.load_base("i2vgen-xl", folder, start=True)
    state = base.net.state_dict()
    first = state.pop("input_blocks.0.0.weight")
    assert torch.equal(first[:, :4], plain["input_blocks.0.0.weight"]) and not first[:, 4:].any()
    assert all(torch.equal(state[k], v) for k, v in plain.items() if k in state)
    assert not state["fps_embedding.2.weight"].any() and state["context_embedding.2.weight"].any()
    args[3] = str(folder)
    assert "missing" in message(i2vgen.main, [*args, "--rank", "2"])
    i2vgen.main([*args, "--rank", "0"])
    Image.new("RGB", (30, 20)).save(tmp_path / "first.png")
    sample.main(["--ckpt", str(tmp_path / "run"), "--image", str(tmp_path / "first.png"), "--prompt",
                 "a ball", "--weights", str(folder), "--out", str(tmp_path / "s")])


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not here")
@pytest.mark.parametrize("name", ["i2vgen-xl", "cogvideox-5b-i2v"])
def test_real_clips(name, small, tmp_path):
    args = small(name)
    clips = [p for p in sorted(CLIPS.iterdir()) if p.stem in CAPTIONS]
    listed = tmp_path / "clips.csv"
    listed.write_text("video,caption\n" + "".join(f"{p},{CAPTIONS[p.stem]}\n" for p in clips))
    args[args.index("--data") + 1] = str(listed)
    args[args.index("--steps") + 1] = "4"
    i2vgen.main(args)
    rows = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(np.isfinite(r["loss"]) for r in rows)
    assert json.loads((tmp_path / "run" / "eval.jsonl").read_text().splitlines()[-1])["psnr"] > 0


# ---- errors

def test_errors_are_one_line(message, tmp_path):
    out = ["--out", str(tmp_path / "x")]
    assert "--data" in message(i2vgen.main, out)
    assert "--rank 0" in message(i2vgen.main, ["--base", "tiny-i2v", "--scratch", "--rank", "2", *out])
    assert "tiny-i2v" in message(i2vgen.main, ["--base", "modelscope", "--data", ".", *out])
    assert "--motion" in message(i2vgen.main, ["--data", ".", "--motion", "circling", *out])
    assert "zigzagging" in message(i2vgen.main, ["--base", "tiny-i2v", "--motion", "jumping", *out])
    assert "--continue" in message(sample.main, ["--base", "tiny", "--prompt", "a", "--continue", "1", *out])
    assert "--continue" in message(sample.main, [
        "--base", "das", "--tracks", __file__, "--image", __file__, "--prompt", "a", "--continue", "1", *out])
    assert "--image" in message(sample.main, [
        "--base", "tiny-i2v", "--judge", "2", "--image", __file__, *out])
    assert "--image" in message(sample.main, ["--base", "tiny-i2v", "--prompt", "a", *out])
    assert "--judge" in message(sample.main, ["--base", "tiny", "--prompt", "a", "--motion", "growing", *out])
    assert not (tmp_path / "x").exists()


# ---- the new motions

@pytest.mark.parametrize("motion", NEW_MOTIONS)
@pytest.mark.parametrize("frames", [8, 9])
def test_the_judge_knows_the_new_motions(motion, frames):
    clips, captions, scenes = tiny_batch((7, frames), 100, frames, motion=motion)
    assert all(motion in c for c in captions)
    assert all(np.ptp(s.x) < 32 and abs(s.x - 16).max() < 9 and abs(s.y - 16).max() < 9 for s in scenes)
    vae = bases.load_base("tiny").vae
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(part)) for part in clips.split(50)])
    for videos in (clips, decoded):
        seen = judge_captions(videos, captions)
        assert min(seen[a] for a in (*ATTRIBUTES, "joint")) >= 0.99
        assert max(seen[flaw] for flaw in FLAW_SHARES) <= 0.01


def test_the_old_world_is_as_it_was():
    """The shipped tiny base depends on it: words, captions and random streams."""
    assert not set(NEW_MOTIONS) & {*MOTIONS, *TINY_WORDS} and len(TINY_WORDS) == 26
    rng = np.random.default_rng(5)
    scenes = [tiny_scene(rng) for _ in range(50)]
    last = scenes[-1].x[0], scenes[-1].y[-1], scenes[-1].radius[3]
    assert last == pytest.approx((15.3303, 16.3324, 5.8339), abs=1e-4)
    clips, _, _ = tiny_batch(2027, 100)
    assert not {judge(clip)["motion"] for clip in clips} & set(NEW_MOTIONS)


def test_held_out_pairs_are_in_no_training_set():
    clips, captions = tiny_pairs(0, 20, motion="circling")
    again, _ = tiny_pairs(0, 20, motion="circling")
    assert torch.equal(clips, again) and all("circling" in c and "background" in c for c in captions)
    world = TinyWorld(50, motion="circling")
    training = [world[i, 0]["video"][:, 0] for i in range(50)]
    assert max(psnr(clip[:, 0], frame) for clip in clips for frame in training) < 60


def test_replay_mixes_in_motions_that_the_base_knows():
    world = TinyWorld(8, motion="circling", replay=0.25)
    motions = [parse(world[i, 0]["text"])["motion"] for i in range(8)]
    assert set(motions[:2]) <= set(MOTIONS) and set(motions[2:]) == {"circling"}
