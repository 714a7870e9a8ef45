"""Every method end to end on the tiny base: it trains, saves, resumes bit for bit, sample.py plays it."""
import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import common
import data
import i2vgen
import models
import pipeline
import sample
import t2v
import tinyworld
import vader
import videolcm
from bases import base_row, load_base
from common import Env
from weights import load_checkpoint, load_pickle

T2V = ["--base", "tiny", "--batch", "2", "--no-cache-latents", "--preview-every", "0", "--eval-n", "1", "--sample-steps", "1"]
QUICK = {
    "t2v": (t2v, [*T2V, "--log-every", "1"]),
    "t2v-lora": (t2v, [*T2V, "--rank", "4", "--ema", "0.9", "--image-share", "0.5"]),
    "vader": (vader, ["--base", "tiny", "--batch", "2", "--sample-steps", "3", "--eval-n", "2",
                      "--sweep", "0"]),
}


def run(method, out, steps, *more):
    module, args = QUICK[method]
    module.main([*args, "--steps", str(steps), "--out", str(out), *more])


@pytest.mark.parametrize("method", QUICK)
def test_resume_equals_the_uninterrupted_run(method, tmp_path):
    schedule = ["--warmup", "2", "--lr-schedule", "constant"]
    run(method, tmp_path / "whole", 4, *schedule)
    run(method, tmp_path / "parts", 2, *schedule)
    run(method, tmp_path / "parts", 4, *schedule, "--resume")
    whole, parts = (load_file(tmp_path / d / "ckpt.safetensors") for d in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    logs = []
    for d in ("whole", "parts"):
        rows = [json.loads(x) for x in (tmp_path / d / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_vader_leaves_what_it_promises_and_sample_plays_it(tmp_path):
    run("vader", tmp_path / "run", 2, "--preview-every", "1", "--sweep", "1")
    for name in ("ckpt.safetensors", "state.pt", "log.jsonl", "eval.jsonl", "curve.png", "args.json",
                 "before.png", "after.png", "step-1.png", "sweep.png", "before/0001.mp4", "after/0001.mp4"):
        assert (tmp_path / "run" / name).exists(), name
    tensors, meta = load_checkpoint(tmp_path / "run")
    assert meta["method"] == "vader" and meta["step"] == 2 and meta["sample"]["sample_steps"] == 3
    assert all(".lora_" in k for k in tensors)
    assert any(v.abs().max() > 0 for k, v in tensors.items() if "lora_B" in k)
    rows = [json.loads(x) for x in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert set(rows[0]["judge"]) == {*tinyworld.ATTRIBUTES, "joint", *tinyworld.FLAW_SHARES}
    assert rows[0]["reward"] != rows[2]["reward"]

    sample.main(["--ckpt", str(tmp_path / "run"), "--prompt", "a red circle moving left", "--n", "2",
                 "--out", str(tmp_path / "s")])
    index = [json.loads(x) for x in (tmp_path / "s" / "index.jsonl").read_text().splitlines()]
    assert [r["file"] for r in index] == ["0000.mp4", "0001.mp4"]
    assert index[0]["sample_steps"] == 3 and (tmp_path / "s" / "sheet.png").exists()


@pytest.mark.parametrize("options", [
    ["--backprop", "last-2", "--decode", "alt", "--reward", "size"],
    ["--backprop", "rand", "--decode", "random", "--reward", "redness"],
    ["--decode", "3", "--reward", "brightness", "--accum", "2", "--eta", "1"],
    ["--grad-ckpt"]])
def test_vader_options(options, tmp_path):
    run("vader", tmp_path, 1, *options)
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path / "ckpt.safetensors").values())


def test_vader_with_a_reward_of_the_users(tmp_path):
    (tmp_path / "mine.py").write_text("def blue(frames, prompts):\n"
                                      "    assert len(frames) == len(prompts)\n"
                                      "    return frames[:, 2].mean((1, 2))\n")
    run("vader", tmp_path / "run", 1, "--reward", f"{tmp_path / 'mine.py'}:blue")
    assert (tmp_path / "run" / "after.png").exists()


@pytest.mark.parametrize("method", ["t2v-lora", "t2v", "vader"])
def test_accumulation_equals_a_large_batch(method, tmp_path):
    """exp_avg of the first AdamW step is (1 - beta1) times the gradient."""
    grads, more = [], ["--decode", "all"] if method == "vader" else []
    for batch, accum in ((4, 1), (1, 4), (2, 2)):
        out = tmp_path / f"{batch}x{accum}"
        run(method, out, 1, "--batch", str(batch), "--accum", str(accum), *more)
        state = load_pickle(out / "state.pt")
        assert state["seen"] == 4
        grads.append(torch.cat([state["moments"][k]["exp_avg"].flatten() for k in sorted(state["moments"])]))
    for g in grads[1:]:
        assert (g - grads[0]).norm() < 5e-6 * grads[0].norm()


@pytest.mark.parametrize("method", ["t2v", "vader"])
def test_one_step_of_videocrafter2(method, public, tmp_path, monkeypatch):
    """The frame rate reaches the network in losses, rollouts, previews and evaluations."""
    folder, _ = public("videocrafter2")
    (tmp_path / "prompts.txt").write_text("a fox\n")
    data.write_video(tmp_path / "clips" / "a.mp4", torch.rand(3, 4, 16, 24) * 2 - 1)
    (tmp_path / "clips" / "a.txt").write_text("a fox in the snow")
    args = {"t2v": ["--data", str(tmp_path / "clips"), "--workers", "0", "--sample-steps", "2"],
            "vader": ["--prompts", str(tmp_path / "prompts.txt"), "--reward", "brightness", "--accum", "1",
                      "--sample-steps", "2", "--eval-n", "1", "--sweep", "0"]}[method]
    seen, forward = [], models.UNet3D.forward

    def spy(self, *args, fps=None, **kw):
        seen.append(None if fps is None else fps.unique().tolist())
        return forward(self, *args, fps=fps, **kw)
    monkeypatch.setattr(models.UNet3D, "forward", spy)
    module = {"t2v": t2v, "vader": vader}[method]
    args = ["--base", "videocrafter2", "--weights", folder, "--steps", "1", "--rank", "2", *args]
    module.main([*args, "--out", str(tmp_path / "default")])
    assert seen and all(fps == [24 if method == "vader" else 28] for fps in seen)  # VADER's script: 24
    seen.clear()
    module.main([*args, "--out", str(tmp_path / "run"), "--fps", "5"])
    assert seen and all(fps == [5] for fps in seen)
    seen.clear()  # and goes with the checkpoint
    sample.main(["--ckpt", str(tmp_path / "run"), "--weights", folder, "--prompt", "a fox", "--out",
                 str(tmp_path / "s")])
    assert seen and all(fps == [5] for fps in seen)


@pytest.mark.parametrize("module, args", [
    (vader, ["--sample-steps", "2", "--eval-n", "1", "--sweep", "0"]),
    (t2v, ["--rank", "2", "--eval-n", "1", "--sample-steps", "1"]), (t2v, ["--eval-n", "1", "--sample-steps", "1"]), (videolcm, ["--eval-n", "1"]),
    (i2vgen, ["--base", "tiny-i2v", "--eval-n", "1", "--sample-steps", "1"])])
def test_the_text_tower_goes_when_all_texts_are_encoded(module, args, tmp_path, monkeypatch):
    towers, load, save = [], module.start_base, common.save_checkpoint

    def spy(*args, **kw):
        base = load(*args, **kw)
        towers.append(weakref.ref(base.text_encoder))
        return base

    def check(*args, **kw):
        gc.collect()
        towers.append(towers[0]() is None)
        save(*args, **kw)
    monkeypatch.setattr(module, "start_base", spy)
    monkeypatch.setattr(common, "save_checkpoint", check)
    monkeypatch.setattr(tinyworld.TinyWorld, "__len__", lambda self: 4)
    module.main(["--base", "tiny", "--steps", "1", "--batch", "1", *args, "--out", str(tmp_path)])
    assert towers[1:] == [True]


def test_t2v_trains_from_scratch_with_its_text_encoder(tmp_path):
    t2v.main(["--base", "tiny", "--scratch", "--batch", "2", "--no-cache-latents", "--eval-n", "1",
              "--steps", "1", "--out", str(tmp_path)])
    tensors = load_file(tmp_path / "ckpt.safetensors")
    assert any(k.startswith("text_encoder.") for k in tensors) and "input_blocks.0.0.weight" in tensors
    assert (tmp_path / "after.png").exists() and not (tmp_path / "before.png").exists()
    sample.main(["--ckpt", str(tmp_path), "--prompt", "a blue square growing", "--sample-steps", "2",
                 "--out", str(tmp_path / "s")])


def test_a_clip_depends_neither_on_batch_nor_on_its_neighbours():
    base, env = load_base("tiny"), Env(0, 1, torch.device("cpu"), torch.float32)
    prompts = ["a red circle moving left", "a blue square growing", "a white triangle moving up"]
    for eta in (0.0, 1.0):
        sampling = replace(base_row("tiny").sample, sample_steps=4, eta=eta)
        together = pipeline.generate(base, env, prompts, ["a", "b", "c"], sampling)
        alone = pipeline.generate(base, env, prompts[1:2], ["b"], sampling)
        assert (together[1] - alone[0]).abs().max() < 1e-4
