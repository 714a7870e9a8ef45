"""InstructVideo: its parts by hand, and the whole method on the tiny base, small public bases and real clips.

Its training step's numbers: the cases of oracle_data/instructvideo."""
import argparse
from pathlib import Path

import hub
import numpy as np
import pytest
import test_dist
import test_transformers
import torch
from runs import read_state
from safetensors.torch import load_file

import bases
import instructvideo
import sample
from common import generator, read_lines
from data import write_video
from diffusion import ddim, make_schedule
from models import add_lora, merge_lora, start_from_lora
from rewards import Reward
from tinyworld import TinyWorld, judge_captions, parse, tiny_prompts
from weights import load_checkpoint, load_pickle

# beside the repository, or one of its work trees
CLIPS = [p for p in (folder / "shared/data/videos" for folder in Path(__file__).parents) if p.exists()]
QUICK = ["--base", "tiny", "--batch", "2", "--sample-steps", "3", "--partial", "0.7", "--eval-n", "1",
         "--log-every", "1"]


def run(out, steps, *more):
    instructvideo.main([*QUICK, "--steps", str(steps), "--out", str(out), *more])


# ---- the parts

@pytest.mark.parametrize("spacing, eta", [("leading", 0.0), ("leading", 1.0), ("trailing", 0.0),
                                          ("cogvideox", 0.0)])
def test_the_last_updates_are_the_whole_chains(spacing, eta):
    schedule = make_schedule("cosine", "v")
    states, x_T = [], torch.randn(1, 2, 1, 2, 2)

    def net(x, t):
        states.append(x)
        return 0.3 * x + torch.sin(t.float() / 100).view(-1, 1, 1, 1, 1)

    def sampled(x, **options):
        states.clear()
        torch.manual_seed(1)  # of the noise that eta adds
        return ddim(net, x, schedule, 7, eta, spacing=spacing, **options)
    whole = sampled(x_T)
    n = len(states)
    if eta == 0:
        state = states[n - 3]
        assert torch.equal(sampled(state, last=3), whole) and len(states) == 3
    assert torch.equal(sampled(x_T, last=n), whole) and len(states) == n


def test_partial_chain_as_published(message):
    sampling = bases.Sampling(sample_steps=20)
    assert instructvideo.partial_chain(make_schedule(), sampling, 0.6) == (551, 12)

    def check(**given):
        args = argparse.Namespace(**dict(partial=0.6, backprop=12, segments=16) | given)
        return instructvideo.editing_chain(args, sampling)
    assert check() == sampling
    assert "is 0: --backprop last-1 needs" in message(check, partial=0.04, backprop=1)
    assert "is 12: --backprop last-13 needs" in message(check, backprop=13)
    assert "--segments 17: a clip has 16 frames" in message(check, segments=17)
    sampling = bases.BASES["cogvideox-5b"].sample  # its sampler cannot start part-way
    chain = check(backprop=1)
    assert sampling.sampler == "dpm" and (chain.sampler, chain.spacing) == ("ddim", "cogvideox")
    assert chain.size == sampling.size and chain.cfg == sampling.cfg


def test_rand_is_refused(message):
    assert "last or last-K" in message(instructvideo.get_args, ["--base", "tiny", "--backprop", "rand"])


def test_a_reward_without_prompts_says_its_defaults():
    args = instructvideo.get_args(["--base", "tiny"])
    assert (args.steps, args.lr, args.reward) == (40, 2e-3, "tiny")
    assert instructvideo.changed_defaults(args) is None
    args = instructvideo.get_args(["--base", "tiny", "--reward", "size"])
    assert (args.steps, args.lr, args.reward) == (30, 3e-4, "size")
    assert instructvideo.changed_defaults(args) == (
        "--reward size: defaults for rewards other than tiny: --steps 30, --lr 0.0003")
    args = instructvideo.get_args(["--reward", "size"])  # of a public base: as published
    assert (args.base, args.steps, args.lr) == ("modelscope-v1.4", 20000, 1e-5)
    assert instructvideo.changed_defaults(args) is None


def test_segments():
    seen = [instructvideo.segment_frames(11, 4, generator(i)) for i in range(100)]
    assert all(2 * s <= i < 2 * s + 2 for row in seen for s, i in enumerate(row))
    assert {i for row in seen for i in row} == set(range(8))  # as published, the last three never come


class Fake:
    """A base whose frame shows the latents' first channel three times."""

    class vae:
        @staticmethod
        def decode(z, frames=None, chunk=16):
            z = z if frames is None else z[:, :, frames]
            return z[:, :1].expand(-1, 3, -1, -1, -1)


def test_segmental_reward():
    z = (torch.rand(2, 4, 16, 2, 2) - 0.5).requires_grad_()
    frames = [[1, 4, 8, 13], [0, 7, 10, 15]]

    def judge(pictures, prompts):
        assert prompts == ["a"] * 4 + ["b"] * 4
        return pictures.mean((1, 2, 3))
    reward = Reward(judge)
    found = instructvideo.segmental_reward(reward, Fake, z, ["a", "b"], 16, frames, 0.5)
    for k in range(2):
        values = [np.exp(-0.5 * abs(i - 8)) * (z[k, 0, i].mean().item() / 2 + 0.5) for i in frames[k]]
        assert found[k].item() == pytest.approx(np.mean(values), rel=1e-5)
    found.sum().backward()
    touched = z.grad[:, 0].abs().sum((2, 3)) > 0
    assert [row.nonzero().flatten().tolist() for row in touched] == frames

    def of_clips(clips, prompts):
        assert prompts == ["a", "b"]
        return clips.mean((1, 2, 3, 4))
    found = instructvideo.segmental_reward(
        Reward(of_clips, clip=True), Fake, z, ["a", "b"], 16, frames, 0.5)
    assert torch.allclose(found, z[:, 0].mean((1, 2, 3)) / 2 + 0.5)  # unweighted


def test_statistics_of_a_caption():
    statistics = instructvideo.PromptStatistics(history=3, min_history=2)
    first = statistics.update(["a", "b"], [1.0, 3.0])  # too few of each: the step's mean 2, sd 1
    assert first == pytest.approx([-1, 1], abs=1e-5)
    assert statistics.update(["a"], [5.0]) == pytest.approx([1], abs=1e-5)  # mean 3, sd 2
    statistics.update(["a", "a"], [5.0, 8.0])
    assert list(statistics.past["a"]) == [5, 5, 8]
    # a resumed run reads them again
    rows = [dict(prompt=p, reward=r) for p, r in (("a", 1.0), ("b", 3.0), ("a", 5.0), ("a", 5.0), ("a", 8.0))]
    assert instructvideo.PromptStatistics(3, 2, rows).past == statistics.past


def test_tiny_clips_show_their_captions_and_none_that_is_held_out():
    data = TinyWorld(880, captions=tiny_prompts())
    items = [data[i, 0] for i in range(0, 880, 40)]
    assert not {x["text"] for x in items} & set(tiny_prompts(held_out=True))
    assert {data[i, 0]["text"] for i in range(440)} == set(tiny_prompts())
    assert all(len(parse(x["text"])) == 4 for x in items)
    assert judge_captions([x["video"] for x in items], [x["text"] for x in items])["joint"] == 1
    assert not torch.equal(data[0, 0]["video"], data[440, 0]["video"])


# ---- the method on the tiny base

def test_leaves_what_it_promises_and_sample_plays_it(tmp_path):
    run(tmp_path / "run", 2, "--preview-every", "1")
    for name in ("ckpt.safetensors", "state.pt", "log.jsonl", "eval.jsonl", "rewards.jsonl", "curve.png",
                 "args.json", "before.png", "after.png", "step-1.png", "after/0000.mp4"):
        assert (tmp_path / "run" / name).exists(), name
    tensors, meta = load_checkpoint(tmp_path / "run")
    assert meta["method"] == "instructvideo" and meta["step"] == 2 and meta["sample"]["sample_steps"] == 3
    assert all(".lora_" in k for k in tensors)
    assert any(v.abs().max() > 0 for k, v in tensors.items() if "lora_B" in k)
    rows = read_lines(tmp_path / "run" / "eval.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2] and rows[0]["reward"] != rows[2]["reward"]
    rows = read_lines(tmp_path / "run" / "rewards.jsonl")
    assert [(r["step"], r["sample"]) for r in rows] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    log = read_lines(tmp_path / "run" / "log.jsonl")
    assert log[0]["reward"] == pytest.approx((rows[0]["reward"] + rows[1]["reward"]) / 2)
    sample.main(["--ckpt", str(tmp_path / "run"), "--prompt", "a red circle moving left", "--out",
                 str(tmp_path / "s")])
    assert (tmp_path / "s" / "0000.mp4").exists()


def test_resume_equals_the_uninterrupted_run(tmp_path):
    (tmp_path / "clips").mkdir()  # one caption, so that the statistics go on, too
    write_video(tmp_path / "clips" / "a.mp4", TinyWorld(1)[0, 0]["video"])
    (tmp_path / "clips" / "a.txt").write_text("a red circle moving left")
    more = ["--data", str(tmp_path / "clips"), "--eta", "1", "--warmup", "2", "--batch", "1"]
    run(tmp_path / "whole", 3, *more)
    run(tmp_path / "parts", 2, *more, "--save-every", "1")
    run(tmp_path / "parts", 3, *more, "--resume")
    whole, parts = (load_file(tmp_path / d / "ckpt.safetensors") for d in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    logs = [read_lines(tmp_path / d / "log.jsonl") for d in ("whole", "parts")]
    for row in (*logs[0], *logs[1]):
        del row["seconds"]
    assert logs[0] == logs[1] and len(logs[0]) == 3 and all(row["advantage"] for row in logs[0][1:])
    assert (tmp_path / "whole/rewards.jsonl").read_text() == (tmp_path / "parts/rewards.jsonl").read_text()


@pytest.mark.slow
def test_accumulation_and_processes_change_nothing(tmp_path):
    """The same samples as a batch of 2, as 2 micro-steps, and on 2 processes."""
    args = ["--lr", "2e-4"]
    launched = ["instructvideo.py", *QUICK, *args, "--batch", "1", "--steps", "2", "--parallel", "fsdp"]
    run(tmp_path / "one", 2, *args)
    run(tmp_path / "parts", 2, *args, "--batch", "1", "--accum", "2")
    test_dist.launch(2, tmp_path / "two", *launched)
    one, rows = load_pickle(tmp_path / "one/state.pt"), read_lines(tmp_path / "one/rewards.jsonl")
    assert [r["sample"] for r in rows] == [0, 1, 2, 3]
    for name in ("parts", "two"):
        state = read_state(tmp_path / name)
        others = read_lines(tmp_path / name / "rewards.jsonl")
        assert state["seen"] == one["seen"] == 4
        assert test_dist.relative(state, one, "gradients") < 4e-6
        assert test_dist.relative(state, one, "weights") < 2e-6
        assert [(r["sample"], r["prompt"]) for r in others] == [(r["sample"], r["prompt"]) for r in rows]
        for key in ("reward", "advantage"):
            assert [r[key] for r in others] == pytest.approx([r[key] for r in rows], abs=2e-3)


@pytest.mark.parametrize("options", [["--backprop", "last-2", "--reward", "tiny", "--grad-ckpt"],
                                     ["--segments", "8", "--attenuation", "0", "--reward", "redness"]])
def test_options(options, tmp_path):
    run(tmp_path, 1, *options)


# ---- public bases, at small width

@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    for name in "ab":
        write_video(folder / f"{name}.mp4", torch.rand(3, 9, 32, 48) * 2 - 1)
        (folder / f"{name}.txt").write_text("a red ball moves")
    return str(folder)


def small_base(name, public, monkeypatch, tmp_path):
    """-> folder with the files of a small base of that name."""
    if name not in hub.PUBLIC:
        test_transformers.small(monkeypatch, name)
        test_transformers.publish(tmp_path / "weights", name)
        return str(tmp_path / "weights")
    return public(name)[0]


NAMES = [name for name in (*hub.PUBLIC, *test_transformers.COGVIDEOX)  # the others: test_matrix.py
         if "instructvideo" in bases.BASES[name].methods]
SAME = ("modelscope", "modelscope-v1.5", "tft2v-32")  # but for their weights as modelscope-v1.4, tft2v


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAME])
def test_one_step_of_a_public_base(name, public, clips, monkeypatch, tmp_path):
    folder = small_base(name, public, monkeypatch, tmp_path)
    instructvideo.main([
        "--base", name, "--weights", folder, "--data", clips, "--steps", "1", "--batch", "1", "--rank", "2",
        "--segments", "2", "--sample-steps", "3", "--eval-n", "1", "--workers", "0", "--warmup", "0",
        "--reward", "brightness", "--out", str(tmp_path / "run")])
    tensors, _ = load_checkpoint(tmp_path / "run")
    assert sum(v.abs().max() > 0 for k, v in tensors.items() if "lora_B" in k) > 10
    sample.main(["--ckpt", str(tmp_path / "run"), "--weights", folder, "--prompt", "a red ball",
                 "--out", str(tmp_path / "s")])


def test_every_text_to_video_base_is_there():
    """Left out: distilled ones, HiGen's two passes, DreamVideo's and VideoComposer's conditions."""
    assert {"tiny", "tiny-clean", "tiny-wan", "modelscope", "modelscope-v1.4", "modelscope-v1.5", "videocrafter2", "tft2v",
            "tft2v-32", "demo", "cogvideox-2b", "cogvideox-5b", "opensora", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b",
            "wan2.2-ti2v-5b"} == {name for name, row in bases.BASES.items() if "instructvideo" in row.methods}


def test_starts_from_the_public_file(public, clips, tmp_path, message):
    folder, expected = public("modelscope-v1.4")
    row, path = bases.BASES["modelscope-v1.4"], tmp_path / "public.pth"
    file, merged = hub.instructvideo(expected["net"], row)
    torch.save(file, path)
    for scale, alpha in ((1.0, 4.0), (0.5, 8.0)):
        base = bases.load_base("modelscope-v1.4", folder)
        add_lora(base.net, 4, alpha, ["to_q", "to_k", "to_v", "to_out.0"])
        start_from_lora(base.net, path, scale)
        merge_lora(base.net)
        for k, v in base.net.state_dict().items():
            plain = expected["net"][k]
            assert (v - plain - scale * (merged[k] - plain)).abs().max() < 1e-5, k
    args = ["--base", "modelscope-v1.4", "--weights", folder, "--data", clips, "--steps", "1", "--batch", "1",
            "--segments", "2", "--sample-steps", "2", "--eval-n", "1", "--workers", "0", "--lr", "1e-12",
            "--reward", "redness"]
    instructvideo.main([*args, "--lora", str(path), "--out", str(tmp_path / "run")])
    tensors, _ = load_checkpoint(tmp_path / "run")
    key = "middle_block.1.transformer_blocks.0.attn2.to_out"
    theirs = file["state_dict"][f"{key}_lora.up_linear.weight"]
    assert (tensors[f"{key}.0.lora_B.weight"] - theirs).abs().max() < 1e-6

    args += ["--out", str(tmp_path / "new"), "--lora", str(path)]
    assert "give --rank 4" in message(instructvideo.main, [*args, "--rank", "2"])
    assert "one of file and network only" in message(instructvideo.main, [*args, "--lora-targets", "to_q"])
    file["state_dict"] |= {"out.2.bias": file["state_dict"]["out.2.bias"] + 1}
    torch.save(file, path)
    assert "modelscope-v1.4" in message(instructvideo.main, args)
    torch.save(hub.turbo_lora(row), path)
    assert "no LoRA of InstructVideo" in message(instructvideo.main, args)


@pytest.mark.skipif(not CLIPS, reason="the real clips are not there")
def test_real_clips(public, tmp_path):
    """16 frames of the four real clips, read as published (8 a second), at small width."""
    folder, _ = public("modelscope-v1.4")
    names = ("cactus_blooming", "cat_walking", "eagle")  # car_turn: 32 frames at 20 a second are too short
    lines = [f"{CLIPS[0] / name}.mp4,a film of {name.split('_')[0]}" for name in names]
    (tmp_path / "clips.csv").write_text("\n".join(["video,caption", *lines]) + "\n")
    instructvideo.main([
        "--base", "modelscope-v1.4", "--weights", folder, "--data", str(tmp_path / "clips.csv"),
        "--frames", "16", "--height", "16", "--width", "32", "--steps", "3", "--batch", "1", "--eval-n", "1",
        "--reward", "redness", "--workers", "0", "--sample-steps", "3", "--out", str(tmp_path / "run")])
    rows = read_lines(tmp_path / "run" / "rewards.jsonl")
    assert len(rows) == 3 == len({r["prompt"] for r in rows})
