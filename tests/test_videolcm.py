"""VideoLCM: its parts by hand, and the whole method on the tiny base, small public bases and real clips.

Its training step's and its sampler's numbers: the cases of oracle_data/videolcm."""
from dataclasses import replace
from pathlib import Path

import hub
import pytest
import test_dist
import torch
from runs import check_kill_in_evaluation, files, same_training
from safetensors.torch import load_file

import bases
import data
import diffusion
import models
import pipeline
import rewards
import sample
import tinyworld
import videolcm
from common import Env, generator, read_lines
from data import write_video
from diffusion import Flow, consistency, lcm_timesteps, make_schedule
from weights import load_checkpoint, load_pickle

# beside the repository, or one of its work trees
CLIPS = [p for p in (folder / "shared/data/videos" for folder in Path(__file__).parents) if p.exists()]
QUICK = ["--base", "tiny", "--batch", "2", "--no-cache-latents", "--preview-every", "0", "--warmup", "0",
         "--lr-schedule", "constant", "--eval-n", "1"]
# near 0 the pseudo-Huber distance bends within 0.001: rounding weighs more in its gradients than elsewhere
NEAR = 5e-5


def run(out, steps, *more):
    videolcm.main([*QUICK, "--steps", str(steps), "--out", str(out), *more])


# ---- the parts

SCHEDULES = [make_schedule("cosine", "v", zero_snr=True), make_schedule("linear_sd", "eps"),
             make_schedule("linear_sd", "eps", scale=(1.0, 0.7, 400))]  # the last as VideoCrafter2's


def points_at(schedule, clean):
    """A network that knows the one clip there is: its answer at any (x, t)."""
    def net(x, t):
        a, s, scale = schedule.at(t, x)
        eps = (x - a * scale * clean) / s
        return schedule.target(clean, eps, t)
    return net


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["v", "eps", "scaled"])
def test_a_student_that_jumps_to_the_clip_has_no_loss(schedule):
    clean, noise, n = torch.randn(3, 2, 2, 3, 3), torch.randn(3, 2, 2, 3, 3), torch.tensor([0, 24, 49])
    right, wrong = points_at(schedule, clean), points_at(schedule, clean + 1)
    loss, jump = videolcm.consistency_step(right, right, right, schedule, clean, noise, n)
    assert loss[1:].max() < 1e-4 and (jump - clean).abs().max() < 5e-3
    # near the clip the target is the point itself, of the least noise that there is
    assert loss[0] < 1.2 * (1 - schedule.alpha_bar[0].item()) ** 0.5
    loss, jump = videolcm.consistency_step(wrong, right, right, schedule, clean, noise, n)
    assert loss.tolist() == pytest.approx([1, 1, 1], abs=0.05) and (jump - clean - 1).abs().max() < 5e-3


@pytest.mark.parametrize("schedule", [*SCHEDULES, Flow(3.0)], ids=["v", "eps", "scaled", "flow"])
def test_the_teachers_step_is_the_samplers(schedule):
    """From t to s each clip makes a step of DDIM, or with flow matching Euler's x + (sigma' - sigma) v."""
    noise, out, n, seen = torch.randn(3, 2, 2, 3, 3), torch.randn(3, 2, 2, 3, 3), torch.tensor([49, 25, 0]), {}

    def spy(name):
        def net(x, t):
            seen[name] = x, t
            return out
        return net
    videolcm.consistency_step(spy("student"), spy("teacher"), spy("target"), schedule, noise, -noise, n)
    (x_t, t), (x_s, s) = seen["teacher"], seen["target"]
    for i in range(3):
        if isinstance(schedule, Flow):
            alone = x_t[i] + (s[i] - t[i]) / 1000 * out[i]
        else:
            alone = diffusion.ddim_step(schedule, out[i:i + 1], x_t[i:i + 1], t[i].item(), s[i].item())[0]
        assert torch.allclose(x_s[i], alone, rtol=1e-5, atol=1e-6)
    assert s[2] == 0 and torch.equal(s[:2], schedule.grid(n[:2], 50))


def test_the_formulas_of_the_docstring():
    """c_skip and c_out with sigma_data = 0.5 and the timestep scaling 10; the norm of 0 is 0."""
    t = torch.tensor([0.0, 19.0, 999.0])
    c_skip, c_out = diffusion.boundary_scalings(t)
    assert torch.allclose(c_skip, 0.5 ** 2 / ((10 * t) ** 2 + 0.5 ** 2))
    assert torch.allclose(c_out, 10 * t / ((10 * t) ** 2 + 0.5 ** 2).sqrt())
    a = torch.tensor([[0.0, 0.003], [1.0, -1.0]])
    assert videolcm.pseudo_huber(a, a, 0.001).tolist() == pytest.approx([0, 0], abs=1e-9)
    by_hand = [(10 ** 0.5 - 1) * 0.0005, (1 + 1e-6) ** 0.5 - 0.001]
    assert videolcm.pseudo_huber(a, torch.zeros(2, 2), 0.001).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_the_boundary_condition():
    schedule, x, out = SCHEDULES[1], torch.randn(2, 2, 2, 3, 3), torch.randn(2, 2, 2, 3, 3)
    assert torch.equal(consistency(schedule, out, x, 0), x)
    assert torch.equal(consistency(Flow(), out, x, 0), x)  # x0 = x - sigma v, without scalings
    both = consistency(schedule, out, x, torch.tensor([0, 400]))
    assert torch.equal(both[0], x[0]) and torch.equal(both[1], consistency(schedule, out[1:], x[1:], 400)[0])
    assert (both[1] - schedule.to_x0(out[1:], x[1:], 400)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("origin, steps", [(50, [(999, 979), (519, 499), (19, 0)]),
                                           (20, [(999, 949), (549, 499), (49, 0)])])
def test_steps_are_those_of_the_sampler(origin, steps):
    """The student learns at the steps at which lcm() asks it; only it has a gradient."""
    seen, weight = {}, torch.ones((), requires_grad=True)

    def spy(name):
        def net(x, t):
            seen[name] = t.tolist(), torch.is_grad_enabled()
            return weight * x
        return net
    x = torch.randn(3, 1, 1, 2, 2)
    n = torch.tensor([origin - 1, origin // 2 if origin == 20 else 25, 0])
    videolcm.consistency_step(spy("student"), spy("teacher"), spy("target"), SCHEDULES[0], x, x, n, origin)
    t, s = (list(column) for column in zip(*steps))
    assert seen == {"student": (t, True), "teacher": (t, False), "target": (s, False)}
    assert set(t) <= set(lcm_timesteps(origin, SCHEDULES[0], origin))


class Fake:
    """A base whose frame shows the latents' first channel three times."""
    row = bases.BASES["tiny"]

    class vae:
        @staticmethod
        def decode(z, frames=None, chunk=16):
            z = z if frames is None else z[:, :, frames]
            return z[:, :1].expand(-1, 3, -1, -1, -1)


def test_reward_of_random_frames_and_of_whole_clips():
    z = (torch.rand(2, 4, 8, 2, 2) - 0.5).requires_grad_()

    def judge(pictures, prompts):
        assert len(pictures) == len(prompts)
        return pictures.mean((1, 2, 3))
    reward = rewards.Reward(judge)
    for k in (3, 8, 20):
        z.grad = None
        generators = [generator("r", i) for i in range(2)]
        found = videolcm.reward_of(reward, Fake, z, ["a", "b"], generators, 8, k)
        found.sum().backward()
        touched = z.grad[:, 0].abs().sum((2, 3)) > 0
        assert touched.sum(1).tolist() == [min(k, 8)] * 2
        values = [(z[i, 0, touched[i]].mean() / 2 + 0.5).item() for i in range(2)]
        assert found.tolist() == pytest.approx(values, rel=1e-5)

    def of_clips(clips, prompts):
        assert clips.shape == (2, 3, 8, 2, 2)
        return clips.mean((1, 2, 3, 4))
    of_clips = rewards.Reward(of_clips, clip=True)
    videolcm.reward_of(of_clips, Fake, z, ["a", "b"], None, 8, 3)


# ---- the method on the tiny base

def test_leaves_what_it_promises_and_sample_plays_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tinyworld.TinyWorld, "__len__", lambda self: 4)
    run(tmp_path / "run", 1, "--preview-every", "1", "--cache-latents", "--ema", "0.75")
    for name in ("ckpt.safetensors", "state.pt", "log.jsonl", "curve.png", "args.json", "before.png",
                 "after.png", "before/0000.mp4", "after/0000.mp4"):
        assert (tmp_path / "run" / name).exists(), name
    assert not list((tmp_path / "run").glob("step-*"))  # the last one is "after"
    tensors, meta = load_checkpoint(tmp_path / "run")
    assert meta["method"] == "videolcm" and meta["step"] == 1 and not meta["guidance_dim"]
    # the file holds the average: after one update a quarter of the way
    before = bases.load_base("tiny").net.state_dict()
    student = load_pickle(tmp_path / "run" / "state.pt")["weights"]
    assert tensors.keys() == before.keys() == student.keys()
    for k, v in tensors.items():
        assert torch.allclose(v, torch.lerp(before[k], student[k], 0.25), atol=1e-7), k
    assert any((student[k] - v).abs().max() > 1e-5 for k, v in before.items())

    sample.main(["--ckpt", str(tmp_path / "run"), "--prompt", "a red circle moving left", "--out",
                 str(tmp_path / "s")])
    row = read_lines(tmp_path / "s" / "index.jsonl")[0]
    assert (row["sampler"], row["sample_steps"], row["spacing"], row["origin"]) == ("lcm", 4, "even", 20)


@pytest.mark.slow
def test_the_scale_is_an_input(tmp_path, monkeypatch):
    """--cfg-range: each sample has its own scale, which the student is told; so is sample.py's."""
    told, embed = [], models.guidance_embedding

    def spy(w, dim):
        told.append(w.tolist())
        return embed(w, dim)
    monkeypatch.setattr(models, "guidance_embedding", spy)
    for rank in ("0", "4"):
        out = tmp_path / rank
        run(out, 2, "--rank", rank, "--cfg-range", "1", "3", "--lr", "1e-2", "--ema", "0")
        assert all(1 <= w <= 3 for row in told for w in row) and len({w for row in told for w in row}) == 4
        told.clear()
        tensors, meta = load_checkpoint(out)
        assert meta["guidance_dim"] == 256
        assert {k for k in tensors if "time_cond_proj" in k} == (
            {"time_cond_proj.weight"} if rank == "0" else
            {"time_cond_proj.lora_A.weight", "time_cond_proj.lora_B.weight"})
        clips = []
        for cfg in ("1", "3"):
            with monkeypatch.context() as m:
                m.setattr(sample, "write_video", lambda path, video, fps: clips.append(video))
                m.setattr(sample, "read_video", lambda *a, **k: (clips[-1], 8))
                sample.main(["--ckpt", str(out), "--prompt", "a red circle moving left", "--sample-steps",
                             "1", "--cfg", cfg, "--out", str(tmp_path / f"{rank}-{cfg}")])
        assert (clips[0] - clips[1]).abs().max() > 1e-3


@pytest.mark.slow
def test_lora_without_updates_is_the_base(tmp_path):
    """The teacher is the base, and the target starts there: branches that count nothing change nothing."""
    run(tmp_path / "lora", 1, "--rank", "4", "--lr", "1e-9")
    run(tmp_path / "all", 1, "--lr", "1e-9")
    lora, whole = (read_lines(tmp_path / d / "log.jsonl")[0]["loss"] for d in ("lora", "all"))
    assert lora == pytest.approx(whole, rel=1e-5)
    assert all(".lora_" in k for k in load_file(tmp_path / "lora/ckpt.safetensors"))


@pytest.mark.parametrize("more", [
    pytest.param([], marks=pytest.mark.slow),
    ["--rank", "4", "--cfg-range", "1", "2", "--reward", "redness,size"]])
def test_resume_equals_the_uninterrupted_run(more, tmp_path):
    run(tmp_path / "whole", 3, *more)
    run(tmp_path / "parts", 2, *more)
    run(tmp_path / "parts", 3, *more, "--resume")
    assert same_training(tmp_path / "whole", tmp_path / "parts")
    log = read_lines(tmp_path / "whole" / "log.jsonl")
    assert len(log) == 3 and ("reward" in log[0]) == bool(more)


@pytest.mark.slow
@pytest.mark.parametrize("ema", ["0.95", "0"])
def test_resuming_a_finished_run_changes_nothing(ema, tmp_path):
    """Nor is it trained on: only the evaluation at its end is made again."""
    run(tmp_path, 2, "--ema", ema)
    kinds = ".png", ".mp4", ".safetensors", ".pt", ".jsonl"
    before = files(tmp_path, *kinds)
    run(tmp_path, 2, "--ema", ema, "--resume")
    assert files(tmp_path, *kinds) == before


@pytest.mark.slow
@pytest.mark.parametrize("when", ["step-2", "after"])
def test_resuming_an_almost_finished_run(when, tmp_path, monkeypatch):
    """Killed in the evaluation after its second of three updates, or in the one at the end."""
    check_kill_in_evaluation(videolcm, run, when, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("ema, name", [("0", "student"), ("0.75", "target")])
def test_what_is_previewed_is_what_is_saved(ema, name, tmp_path):
    """The target, which with --ema 0 is the student: sample.py makes the clips of the previews from it."""
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
    run(tmp_path / "run", 1, "--ema", ema, "--lr", "1e-2", "--eval-prompts", str(tmp_path / "prompts.txt"))
    state = load_pickle(tmp_path / "run" / "state.pt")
    same = all(torch.equal(v, state["ema"][k]) for k, v in state["weights"].items())
    assert same == (name == "student")
    clips = [data.read_video(tmp_path / "run" / when / "0000.mp4")[0] for when in ("before", "after")]
    assert (clips[0] - clips[1]).abs().max() > 0.02
    tensors, meta = load_checkpoint(tmp_path / "run")
    base = bases.load_run(tmp_path / "run", tensors, meta, None)
    sampling = replace(base.row.sample, **{k: v for k, v in meta["sample"].items()})
    env = Env(0, 1, torch.device("cpu"), torch.float32)
    made = pipeline.generate(base, env, ["a red circle moving left"], ["preview-0"], sampling)
    data.write_video(tmp_path / "made.mp4", made[0], sampling.save_fps)
    assert (data.read_video(tmp_path / "made.mp4")[0] - clips[1]).abs().max() < 0.02


@pytest.mark.slow
def test_accumulation_changes_nothing(tmp_path):
    states = []
    for batch, accum in ((2, 1), (1, 2)):
        out = tmp_path / f"{batch}x{accum}"
        run(out, 1, "--batch", str(batch), "--accum", str(accum), "--reward", "redness", "--reward-frames",
            "2", "--cfg-range", "1", "2")
        states.append(load_pickle(out / "state.pt"))
    assert states[0]["seen"] == states[1]["seen"] == 2
    assert test_dist.relative(states[1], states[0], "gradients") < NEAR


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--parallel", "ddp"], ["--parallel", "fsdp"],
                                  ["--parallel", "ddp", "--rank", "4", "--cfg-range", "1", "2"],
                                  ["--parallel", "fsdp", "--rank", "4", "--reward", "redness"]])
def test_two_processes_equal_one(more, tmp_path):
    """Teacher, student and average: whole on each process, or all three in shards; previews between."""
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
    args = ["videolcm.py", *QUICK, "--steps", "3", "--batch", "1", "--lr", "3e-5", "--preview-every", "2",
            "--eval-prompts", str(tmp_path / "prompts.txt"), *more]
    one = test_dist.launch(1, tmp_path / "one", *args, "--accum", "2")
    two = test_dist.launch(2, tmp_path / "two", *args)
    assert test_dist.relative(two, one, "gradients") < NEAR and test_dist.relative(two, one, "weights") < NEAR
    assert two["ema"].keys() == two["weights"].keys()
    assert all(torch.allclose(v, one["ema"][k], atol=1e-6) for k, v in two["ema"].items())


# ---- public bases, at small width

@pytest.fixture
def clips(tmp_path):
    write_video(tmp_path / "clips" / "a.mp4", torch.rand(3, 4, 32, 48) * 2 - 1)
    (tmp_path / "clips" / "a.txt").write_text("a red ball moves")
    return str(tmp_path / "clips")


NAMES = [name for name in hub.PUBLIC if "videolcm" in bases.BASES[name].methods]  # the others: test_matrix.py


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "modelscope" else pytest.mark.slow)
    for name in NAMES if not name.startswith("modelscope-v")])
def test_one_step_of_a_public_base(name, public, clips, monkeypatch, tmp_path):
    folder, _ = public(name)
    args = ["--base", name, "--weights", folder, "--data", clips, "--steps", "1", "--batch", "1", "--accum",
            "1", "--workers", "0", "--preview-every", "1", "--lr", "1e-3"]
    videolcm.main([*args, "--reward", "brightness", "--out", str(tmp_path / "run")])
    tensors, meta = load_checkpoint(tmp_path / "run")
    assert meta["sample"]["sampler"] == "lcm" and meta["sample"]["sample_steps"] == 4
    lora = name == "videocrafter2"  # T2V-Turbo's recipe
    assert bool(meta["guidance_dim"]) == lora and all((".lora_" in k) == lora for k in tensors)
    assert not any("pre_image_condition" in k for k in tensors)  # of TF-T2V: without an image, no gradient
    sample.main(["--ckpt", str(tmp_path / "run"), "--weights", folder, "--prompt", "a red ball",
                 "--out", str(tmp_path / "s")])
    assert read_lines(tmp_path / "s" / "index.jsonl")[0]["sampler"] == "lcm"


@pytest.mark.slow
@pytest.mark.skipif(not CLIPS, reason="the real clips are not there")
def test_real_clips(public, tmp_path):
    """16 frames of two real clips, encoded once, at small width."""
    folder, _ = public("modelscope")
    names = ("cat_walking", "eagle")
    lines = [f"{CLIPS[0] / name}.mp4,a film of {name.split('_')[0]}" for name in names]
    (tmp_path / "clips.csv").write_text("\n".join(["video,caption", *lines]) + "\n")
    videolcm.main([
        "--base", "modelscope", "--weights", folder, "--data", str(tmp_path / "clips.csv"), "--frames", "16",
        "--height", "16", "--width", "32", "--steps", "2", "--batch", "2", "--accum", "1", "--workers", "0",
        "--cache-latents", "--preview-every", "0", "--out", str(tmp_path / "run")])
    losses = [row["loss"] for row in read_lines(tmp_path / "run" / "log.jsonl")]
    assert len(losses) == 2 and all(0 < loss < 2 for loss in losses)
