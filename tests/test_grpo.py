"""GRPO: its parts by hand, the whole method on every base, many processes, rewards that fail.

The numbers of the original codes: the cases of oracle_data/grpo."""
import argparse
import math
import subprocess

import pytest
import test_dist
import torch
from runs import on_small_base, same_training

import bases
import common
import diffusion
import grpo
import models
import pipeline
import rewards
from common import Env, read_lines
from weights import load_checkpoint

QUICK = ["--base", "tiny", "--batch", "4", "--accum", "1", "--group", "2", "--sample-steps", "3",
         "--steps-trained", "1", "--eval-n", "1", "--log-every", "1"]
CPU = Env(0, 1, torch.device("cpu"), torch.float32)
PROMPTS = ["a red circle growing", "a red circle growing", "a blue square moving left", "a blue square moving left"]


def run(out, steps, *more):
    grpo.main([*QUICK, "--steps", str(steps), "--out", str(out), *more])


def log(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_lines(out / "log.jsonl")]


# ---- the policy

SCHEDULES = [("ddim", diffusion.make_schedule("cosine", "v", zero_snr=True), "trailing"),
             ("ddim", diffusion.make_schedule("linear_sd", "eps"), "leading"),
             ("ddim", diffusion.make_schedule("linear_sd", "x0"), "leading"),
             ("cps", diffusion.make_schedule("linear_sd", "eps", scale=(1.0, 0.7, 400)), "leading"),
             ("cps", diffusion.Flow(3.0), "wan"), ("flow", diffusion.Flow(3.0), "wan"),
             ("dance", diffusion.Flow(3.0), "wan")]


@pytest.mark.parametrize("kind, schedule, spacing", SCHEDULES)
def test_without_noise_a_rollout_is_the_deterministic_sampler(kind, schedule, spacing):
    x_T = torch.randn(2, 2, 1, 3, 3)

    def fn(x, t):
        return 0.3 * torch.tanh(x) + torch.sin(t.float() / 100).view(-1, 1, 1, 1, 1)
    updates = diffusion.sampler_updates(schedule, 6, spacing=spacing)
    states, log_probs = diffusion.recorded(fn, x_T, schedule, updates, range(len(updates) - 1), kind, 0.0, None)
    if isinstance(schedule, diffusion.Flow):
        final = diffusion.rflow(fn, x_T, schedule, 6)
    else:
        final = diffusion.ddim(fn, x_T, schedule, 6, spacing=spacing)
    assert torch.allclose(states[:, -1], final, atol=1e-5) and not log_probs.any()
    assert states.shape == (2, len(updates) + 1, 2, 1, 3, 3)


@pytest.mark.parametrize("kind, schedule, spacing", SCHEDULES)
def test_what_is_drawn_has_the_log_probability_of_a_gaussian(kind, schedule, spacing):
    """torch's own density; and the noise adds up to that of the next level, which Euler's step overshoots."""
    x_T, g = torch.randn(1, 2, 4, 16, 16), [torch.Generator().manual_seed(1)]
    updates = diffusion.sampler_updates(schedule, 6, spacing=spacing)
    states, log_probs = diffusion.recorded(
        lambda x, t: 0.1 * x, x_T, schedule, updates, range(len(updates) - 1), kind, grpo.LEVELS[kind], g)
    for i, step in enumerate(updates[:-1]):
        mean, std = diffusion.policy(
            lambda x, t: 0.1 * x, schedule, states[:, i], *step, kind, grpo.LEVELS[kind])
        theirs = torch.distributions.Normal(mean, std).log_prob(states[:, i + 1]).mean()
        assert math.isclose(log_probs[0, i].item(), theirs.item(), rel_tol=1e-4, abs_tol=1e-5)
        s, s_next = (schedule.level(t)[1] for t in step)
        std, k = diffusion.drawn_noise(kind, grpo.LEVELS[kind], s, s_next)
        assert std > 0
        whole = (std ** 2 + k ** 2) ** 0.5
        assert math.isclose(whole, s_next, rel_tol=1e-9) if kind in ("ddim", "cps") else whole > s_next


def test_pull_is_the_slope_of_the_mean():
    for kind, schedule, spacing in SCHEDULES:
        step = (*diffusion.sampler_updates(schedule, 6, spacing=spacing)[2], kind, grpo.LEVELS[kind])
        x, out = torch.randn(1, 2), torch.randn(1, 2)
        means = [diffusion.gaussian_step(schedule, out + h, x, *step)[0] for h in (0.0, 1.0)]
        std = diffusion.gaussian_step(schedule, out, x, *step)[1]
        assert torch.allclose((means[1] - means[0]).abs() / std, torch.full((1, 2), grpo.pull(schedule, *step)), rtol=1e-3)


class Toy(torch.nn.Module):
    """One weight: the network's output is weight * tanh(x) - 0.2 x."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x, t):
        return self.weight * torch.tanh(x) - 0.2 * x


def test_gradient_is_that_of_the_expected_reward(monkeypatch):
    """REINFORCE: sum over steps of D grad log pi times the reward, averaged over rollouts, is d E[r] / d weight
    by finite differences with the same noise. (log_prob is a mean over D elements.)"""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # no rounding in the differences
    schedule, n, dims = diffusion.Flow(), 200_000, 2
    updates = diffusion.sampler_updates(schedule, 3)
    g = torch.Generator().manual_seed(0)
    draws = [torch.randn(n, dims, generator=g, dtype=torch.float64) for _ in range(3)]

    def rollouts(weight):
        """The last update, which draws no noise, keeps its weight: its own slope is no policy's."""
        noise = iter(draws[1:])
        monkeypatch.setattr(diffusion, "randn_like", lambda x, generators: next(noise))

        def fn(x, t):
            return Toy(weight if t[0] > updates[-1][0] + 1 else 0.3)(x, t)
        states, _ = diffusion.recorded(fn, draws[0], schedule, updates, range(2), "dance", 0.8, None)
        return states, -(states[:, -1] - 1).square().sum(1)
    slope = (rollouts(0.35)[1].mean() - rollouts(0.25)[1].mean()) / 0.1
    states, r = rollouts(0.3)
    toy, advantage = Toy(0.3), grpo.group_advantages(r, [0] * n, eps=0.0)
    for i in range(2):
        mean, std = diffusion.policy(toy, schedule, states[:, i], *updates[i], "dance", 0.8)
        new = diffusion.log_prob(states[:, i + 1], mean, std)
        loss, ratio = grpo.policy_loss(new, new.detach(), advantage, 1e-4)
        assert (ratio == 1).all()
        (dims * loss * r.std(correction=0)).mean().backward()
    assert abs(slope) > 0.1 and math.isclose(-toy.weight.grad.item(), slope.item(), rel_tol=0.05)


def test_clipped_ratios_do_not_train():
    old = torch.zeros(4)
    new = torch.tensor([0.01, -0.01, 0.01, -0.01], requires_grad=True)
    loss, ratio = grpo.policy_loss(new, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), 1e-3)
    loss.sum().backward()
    assert new.grad.ne(0).tolist() == [False, True, True, False]  # what already went far enough rests
    assert torch.allclose(ratio, new.exp())


# ---- advantages

def test_advantages_of_a_group_sum_to_0():
    torch.manual_seed(3)
    r, groups = torch.randn(12, dtype=torch.float64), [0, 1, 2, 3] * 3
    for over in ("batch", "group"):
        a = grpo.group_advantages(r, groups, over)
        for k in range(4):
            assert abs(a[k::4].sum()) < 1e-9 and a[k::4].abs().max() > 0.1
    a = grpo.group_advantages(r, groups, "group", eps=0.0)
    assert torch.allclose(a[::4].std(correction=0), torch.ones((), dtype=torch.float64))


def test_groups_that_teach_nothing_and_clips_without_a_score():
    nan = math.nan
    r = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, nan, 5.0, nan, nan])
    a = grpo.group_advantages(r, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert a.isfinite().all() and a[[0, 1, 2, 5, 6, 7, 8]].tolist() == [0.0] * 7
    assert a[4] > 0 and torch.allclose(a[3], -a[4])


def test_which_updates_draw_noise_and_train():
    g = common.generator(0)
    seen = [grpo.steps_to_train(("share", 0.6), 6, g) for _ in range(30)]
    assert all(list(noisy) == [0, 1, 2, 3, 4] and len(set(part)) == 3 for noisy, part in seen)
    assert {i for _, part in seen for i in part} == {0, 1, 2, 3, 4}  # never the last
    seen = [grpo.steps_to_train(("window", 2), 6, g) for _ in range(40)]
    assert {tuple(noisy) for noisy, _ in seen} == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert all(list(noisy) == list(part) for noisy, part in seen)
    assert [list(x) for x in grpo.steps_to_train(("first", 2), 6, g)] == [[0, 1, 2, 3, 4], [0, 1]]


def test_best_of_n_is_shared_out(monkeypatch):
    """Two processes; the chosen clips are all on one of them: the other trains spare ones that count 0."""
    best, worst = grpo.best_and_worst([3.0, 1.0, 2.0, 5.0, 4.0], 3)
    assert (best, worst) == ([3, 4], [1])
    made = common.Run.__new__(common.Run)
    made.args = argparse.Namespace(batch=2)
    chosen = {0: 2.0, 2: -1.0, 4: -1.0}
    for rank, numbers, values in ((0, (0, 2, 4, 6), [2.0, -1.0, -1.0, 0.0]), (1, (1, 3, 5, 7), [0.0] * 4)):
        made.env = Env(rank, 2, torch.device("cpu"), torch.float32)
        monkeypatch.setattr(made, "gather", lambda rows: [0, 3], raising=False)
        mine = made.share_out([{"number": n} for n in numbers], chosen, "advantage")
        assert [c["number"] for c in mine] == list(numbers)
        scale = 2 * 4 / 3  # a mean over 2 x 4 clips is one over the 3 chosen
        assert [c["advantage"] for c in mine] == pytest.approx([scale * v for v in values])


# ---- the ratio

def rolled(base, noisy, sampling, images=None):
    clips = pipeline.recorded_rollout(
        base.net, base, CPU, PROMPTS, images or [None] * 4, [common.generator("x", i // 2) for i in range(4)],
        [common.generator(i) for i in range(4)], sampling, ("ddim", 1.0), noisy)[1]
    clips = grpo.default_collate([clip | {"advantage": 1.0} for clip in clips])
    updates = diffusion.sampler_updates(base.schedule, sampling.sample_steps, sampling.size, sampling.spacing)
    return clips, updates


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_ratio_is_exactly_1_before_the_first_update(recompute, cfg):
    """The rollout's call without gradient and training's with it round alike."""
    base = bases.load_base("tiny")
    models.add_lora(base.net, 4, 4.0, ["to_q", "to_k", "to_v"])
    for p in base.net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    base.net.grad_ckpt = recompute
    sampling = grpo.replace(base.row.sample, sample_steps=3, cfg=cfg)
    clips, updates = rolled(base, range(2), sampling)
    args = argparse.Namespace(updates=2, clip_ratio=1e-4, even_steps=True, kl=0.1)
    for i in (0, 1):
        loss, ratio, kl = grpo.grpo_loss(base.net, base, sampling, clips, i, (*updates[i], "ddim", 1.0), args)
        assert ratio.tolist() == [0.0] * 4 and (kl > 1e-7).all()
    loss.mean().backward()
    with torch.no_grad():
        for p in base.net.parameters():
            if p.requires_grad:
                p += 1e-2 * p.grad.sign()
        _, ratio, _ = grpo.grpo_loss(base.net, base, sampling, clips, 1, (*updates[1], "ddim", 1.0), args)
    assert (ratio > 1e-4).all()


def test_divergence_of_the_base_from_itself_is_0():
    base = bases.load_base("tiny")
    models.add_lora(base.net, 4, 4.0, ["to_q"])  # B is 0: the branch adds nothing
    sampling = grpo.replace(base.row.sample, sample_steps=3)
    clips, updates = rolled(base, range(2), sampling)
    args = argparse.Namespace(updates=1, clip_ratio=1e-4, even_steps=False, kl=0.1)
    _, _, kl = grpo.grpo_loss(base.net, base, sampling, clips, 0, (*updates[0], "ddim", 1.0), args)
    assert kl.tolist() == [0.0] * 4


def test_a_group_may_start_from_one_noise(tmp_path, monkeypatch):
    seen = []
    make = grpo.make_clips

    def watched(*args):
        seen.append(make(*args))
        return seen[-1]
    monkeypatch.setattr(grpo, "make_clips", watched)
    run(tmp_path / "a", 1, "--same-noise", "--steps-trained", "window-1")
    run(tmp_path / "b", 1, "--no-same-noise")
    for clips, same in zip(seen, (True, False)):
        assert [c["number"] for c in clips] == [0, 1, 2, 3]
        assert clips[0]["prompt"] == clips[1]["prompt"] != clips[2]["prompt"]
        for a, b in ((0, 1), (2, 3)):
            assert torch.equal(clips[a]["states"][0], clips[b]["states"][0]) is same
            assert not torch.equal(clips[a]["states"][-1], clips[b]["states"][-1])
        assert not torch.equal(clips[0]["states"][0], clips[2]["states"][0])
    drawn = [clips[0]["log_probs"].ne(0).tolist() for clips in seen]
    assert sum(drawn[0]) == 1 and drawn[1] == [True, True, False]


# ---- the run

def test_it_trains_saves_and_plays(tmp_path):
    run(tmp_path / "run", 2, "--updates", "2", "--kl", "0.01", "--best-of", "2", "--preview-every", "1")
    tensors, meta = load_checkpoint(tmp_path / "run")
    assert meta["method"] == "grpo" and meta["sample"]["eta"] == 0 and meta["sample"]["cfg"] == 1
    assert all(v.abs().max() > 0 for k, v in tensors.items() if "lora_B" in k)
    rows = log(tmp_path / "run")
    assert rows[0]["ratio"] > 0 and rows[1]["kl"] > 0 and rows[0]["reward_sd"] > 0
    assert [r["step"] for r in read_lines(tmp_path / "run" / "eval.jsonl")] == [0, 1, 2]
    assert (tmp_path / "run" / "after.png").exists()


def test_resume_equals_the_uninterrupted_run(tmp_path):
    more = ["--updates", "2", "--steps-trained", "window-2", "--sample-steps", "4"]
    run(tmp_path / "whole", 3, *more)
    run(tmp_path / "parts", 2, *more)
    run(tmp_path / "parts", 3, *more, "--resume")
    assert same_training(tmp_path / "whole", tmp_path / "parts") and len(log(tmp_path / "whole")) == 3


def test_accumulation_equals_a_batch(tmp_path):
    run(tmp_path / "batch", 1)
    run(tmp_path / "accum", 1, "--batch", "1", "--accum", "4")
    a, b = (log(tmp_path / d)[0] for d in ("batch", "accum"))
    assert a == pytest.approx(b, rel=1e-4, abs=1e-7) and a["grad"] > 0


DIST = ["grpo.py", "--base", "tiny", "--sample-steps", "3", "--steps-trained", "1", "--eval-n", "2", "--group", "4", "--steps", "3",
        "--batch", "1", "--lr", "2e-4", "--updates", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel, more", [("ddp", []), ("fsdp", ["--best-of", "2", "--grad-ckpt"])])
def test_two_processes_equal_one(parallel, more, tmp_path):
    """Groups are spread over the processes. Ratios of the first optimizer update are 1 under FSDP2, too: with
    others, the same clips would be clipped and the weights would differ."""
    one = test_dist.launch(1, tmp_path / "one", *DIST, *more, "--accum", "8")
    two = test_dist.launch(2, tmp_path / "two", *DIST, *more, "--accum", "4", "--parallel", parallel)
    assert two["seen"] == one["seen"] == 24
    assert test_dist.relative(two, one, "gradients") < 2e-5 and test_dist.relative(two, one, "weights") < 1e-5


RATIO = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import argparse
import torch, torch.distributed as dist
import bases, grpo, models, runs, test_grpo
dist.init_process_group("gloo")
torch.manual_seed(0)
base = bases.load_base("tiny")
models.add_lora(base.net, 4, 4.0, ["to_q", "to_v"])
base.net.grad_ckpt = True
net = models.parallelize(base.net, runs.spread("fsdp"), torch.device("cpu"))
sampling = grpo.replace(base.row.sample, sample_steps=3, cfg=2.0)
clips, updates = test_grpo.rolled(base, range(2), sampling)
args = argparse.Namespace(updates=2, clip_ratio=1e-4, even_steps=True, kl=0.1)
for i in (0, 1):
    loss, ratio, _ = grpo.grpo_loss(net, base, sampling, clips, i, (*updates[i], "ddim", 1.0), args)
    assert ratio.tolist() == [0.0] * 4, ratio
    loss.mean().backward()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ratio_is_exactly_1_in_shards(tmp_path):
    script = tmp_path / "ratio.py"
    script.write_text(RATIO.format(root=str(test_dist.ROOT), tests=str(test_dist.ROOT / "tests")))
    done = subprocess.run(test_dist.command(2, str(script)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- rewards without gradient

FUNCTIONS = """
import io
import numpy as np
from PIL import Image

calls = 0

def plain(frames, prompts):
    return [float(frame.mean()) for frame in frames]

def whole(clips, prompts):
    return np.array([clips.mean()])

whole.clip = True

def one(clips, prompts):
    return clips.numpy().mean()

one.clip = True

def now_and_then(clips, prompts):
    global calls
    calls += 1
    if calls % 3 == 0:
        raise OSError("the detector died")
    return float(clips.mean())

now_and_then.clip = True

def never(clips, prompts):
    raise OSError("no server")

def wrong(frames, prompts):
    return frames
"""


@pytest.fixture
def reward(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return lambda name: rewards.get_reward(f"{tmp_path / 'mine.py'}:{name}", "cpu", gradient=False)


@pytest.mark.parametrize("name", ["plain", "whole", "one"])
def test_plain_numbers_are_rewards(name, reward):
    videos = torch.rand(3, 3, 2, 4, 4) * 2 - 1
    scores = reward(name).each(videos, ["a"] * 3)
    assert torch.allclose(scores, (videos.mean((1, 2, 3, 4)) / 2 + 0.5)[None], atol=1e-6)


def test_a_reward_that_fails_now_and_then(reward, capfd):
    scores = reward("now_and_then").each(torch.rand(6, 3, 2, 4, 4), ["a"] * 6)
    assert scores.isnan().tolist() == [[False, False, True, False, False, True]]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all("OSError: the detector died" in line and "left out" in line for line in lines)


def test_a_reward_that_always_fails_ends_the_run(reward, message):
    said = message(reward("never").each, torch.rand(9, 3, 2, 4, 4), ["a"] * 9)
    assert "OSError: no server" in said and "8 clips in a row failed" in said
    assert "returned a tensor" in message(reward("wrong").each, torch.rand(9, 3, 2, 4, 4), ["a"] * 9)


def test_a_run_goes_on_without_failed_clips(tmp_path, capfd):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    run(tmp_path / "run", 2, "--reward", f"{tmp_path / 'mine.py'}:now_and_then,size:0.5")
    rows = log(tmp_path / "run")
    assert len(rows) == 2 and all(math.isfinite(v) for row in rows for v in row.values())
    assert capfd.readouterr().err.count("left out") >= 2
    assert load_checkpoint(tmp_path / "run")[1]["step"] == 2


def test_each_reward_is_normalised_by_itself(monkeypatch, tmp_path):
    """100 times the reward changes nothing; its weight does."""
    made = common.Run.__new__(common.Run)
    made.args = argparse.Namespace(group=2, best_of=None, std_of="batch", batch=4)
    made.env = CPU
    scores = torch.tensor([[0.1, 3.0], [0.2, 1.0], [0.5, 2.0], [0.3, 2.5]])

    def advantages(scale, weights):
        rows = [{"number": k, "scores": s * torch.tensor([scale, 1.0])} for k, s in enumerate(scores)]
        return torch.tensor([c["advantage"] for c in grpo.choose_clips(made, rows, weights)[0]])
    one = advantages(1.0, [1.0, 0.5])
    assert torch.allclose(one, advantages(100.0, [1.0, 0.5]), atol=1e-2)
    assert not torch.allclose(one, advantages(1.0, [0.5, 0.5]), atol=0.1)


# ---- every base

@pytest.fixture
def small(public, monkeypatch, tmp_path):
    """name -> the arguments of one short step on a small network with public file names."""
    def get(name):
        return [*on_small_base(grpo, name, public, monkeypatch, tmp_path),
                "--reward", "brightness", "--steps", "1", "--batch", "2", "--accum", "1", "--group", "2", "--rank", "2",
                "--sample-steps", "2", "--updates", "1", "--eval-n", "1", "--out", str(tmp_path / "run")]
    return get


@pytest.mark.parametrize("name", [
    "modelscope", "videocrafter2", "opensora", "cogvideox-2b", "cogvideox-5b", "i2vgen-xl", "cogvideox-5b-i2v"])
def test_one_step_on_every_base(name, small, tmp_path):
    grpo.main(small(name))
    tensors, meta = load_checkpoint(tmp_path / "run")
    moved = [v.abs().max() > 0 for k, v in tensors.items() if "lora_B" in k]
    assert all(moved) and all(torch.isfinite(v).all() for v in tensors.values())
    assert meta["sample"]["sampler"] == bases.BASES[name].sample.sampler
    assert log(tmp_path / "run")[0]["grad"] > 0


@pytest.mark.parametrize("base", ["tiny-i2v", "tiny-cogvideox"])
def test_from_first_frames(base, tmp_path):
    run(tmp_path / "run", 1, "--base", base, "--reward", "temporal")
    assert log(tmp_path / "run")[0]["grad"] > 0


def test_every_base_of_vader():
    with_vader, with_grpo = ({n for n, row in bases.BASES.items() if m in row.methods} for m in ("vader", "grpo"))
    assert with_vader == with_grpo


# ---- errors

@pytest.mark.parametrize("options, words", [
    ("--group 1", "--group 1: clips of a prompt are compared"),
    ("--group 3", "--group 3: no divisor of a step's 64 clips"),
    ("--eta 0", "--eta 0: rollouts need noise"),
    ("--sampler lcm", "--sampler lcm"),
    ("--best-of 9", "--best-of 9: choose 2 to 8"),
    ("--best-of 1", "--best-of 1: choose 2 to 8"),
    ("--rank 0", "--rank 0: GRPO trains LoRA"),
    ("--noise flow", "--noise flow: does not fit base tiny; choose ddim or cps"),
    ("--noise brown", "--noise"),
    ("--sample-steps 1", "--steps-trained: 2 of 0 updates"),
    ("--steps-trained window-5", "--steps-trained: 5 of 4 updates"),
    ("--steps-trained first-5", "--steps-trained: 5 of 4 updates"),
    ("--steps-trained window-0", "--steps-trained: '0' is not a whole number of 1 or more"),
    ("--steps-trained 1.5", "--steps-trained: '1.5' is not a number from 0 to 1"),
    ("--updates 9", "with --updates 9"),
    ("--clip-ratio 0", "--clip-ratio"),
    ("--reward nice", "--reward nice: unknown"),
    ("--reward none.py:fn", "none.py: no such reward file"),
    ("--base higen", "grpo.py does not run on it"),
    ("--base tiny-i2v --activities x", "--activities: goes with"),
])
def test_errors_in_one_line(options, words, message, tmp_path):
    said = message(grpo.main, ["--base", "tiny", *options.split(), "--out", str(tmp_path / "run")])
    assert words in said and not (tmp_path / "run").exists()


def test_flow_bases_take_no_ddim(message, tmp_path):
    said = message(grpo.main, ["--base", "opensora", "--noise", "ddim", "--out", str(tmp_path / "run")])
    assert "--noise ddim: does not fit base opensora; choose cps, flow or dance" in said
