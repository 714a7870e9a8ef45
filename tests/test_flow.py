"""Flow matching: a schedule like the others, and its samplers next to diffusers'."""
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import i2vgen
import instructvideo
import pipeline
import t2v
import videodpo
from bases import BASES, Base, Sampling, choose_sampling, load_base
from common import Env, Parser, UserError, read_meta
from diffusion import (
    FLOW_SAMPLERS, FLOW_SOLVERS, Flow, diffusion_loss, draw_noise, flow_dpmpp, flow_levels, flow_unipc, lcm,
    lcm_timesteps, logit_normal, make_schedule, noised, randn, rflow)

SOLVERS = [rflow, flow_dpmpp, flow_unipc]


def gaussian(mean=1.5, var=0.25):
    """The exact velocity E[noise - x0 | x_t] for data drawn from N(mean, var)."""
    def net(x, t):
        s = (t / 1000).view(-1, 1, 1, 1, 1)
        return (s - (1 - s) * var) / ((1 - s) ** 2 * var + s ** 2) * (x - (1 - s) * mean) - mean
    return net


def curved(x, t):
    """A velocity that depends on x and t in no simple way."""
    return torch.tanh(0.7 * x + t.view(-1, 1, 1, 1, 1) / 400) + 0.1 * x


# ---- the schedule

def test_a_flow_answers_like_any_schedule():
    x0, noise, t = torch.randn(3, 4, 2, 3, 3), torch.randn(3, 4, 2, 3, 3), torch.tensor([1.0, 500.0, 1000.0])
    for schedule in (Flow(), make_schedule("linear_sd", "v")):
        steps = t if isinstance(schedule, Flow) else t.long() - 1
        x_t, out = schedule.add_noise(x0, noise, steps), schedule.target(x0, noise, steps)
        assert torch.allclose(schedule.to_x0(out, x_t, steps), x0, atol=1e-4)
        assert torch.allclose(schedule.to_eps(out, x_t, steps), noise, atol=1e-4)
        assert diffusion_loss(lambda x, t, out=out: out, schedule, x0, noise, steps).max() == 0
    assert torch.equal(Flow().add_noise(x0, noise, 1000), noise) and torch.equal(Flow().add_noise(x0, noise, 0), x0)


def test_shift_moves_steps_towards_the_noise():
    u = torch.linspace(0, 1, 11)
    assert torch.allclose(Flow().steps(u), 1000 * u)
    assert Flow(5.0).steps(torch.tensor(0.5)).item() == pytest.approx(1000 * 5 / 6)
    odds = [s / (1 - s) for s in (Flow(shift).steps(torch.tensor(0.3)).item() / 1000 for shift in (1, 3, 12))]
    assert [o / odds[0] for o in odds] == pytest.approx([1, 3, 12], rel=1e-4)  # it multiplies the odds
    by_size = Flow(by_size=True)
    assert by_size.shift_of((17, 512, 512)) == pytest.approx(5 ** 0.5) and by_size.shift_of((1, 256, 256)) == 0.5
    with pytest.raises(AssertionError, match="size"):
        by_size.steps(u)


def test_random_steps_of_training():
    generators = [torch.Generator().manual_seed(i) for i in range(2000)]
    t, noise = draw_noise(Flow(3.0), torch.zeros(2000, 1, 1, 1, 1), generators)
    assert t.is_floating_point() and 0 < t.min() and t.max() < 1000
    assert (t < 750).float().mean().item() == pytest.approx(0.5, abs=0.04)  # 0.5 goes to 0.75
    u = torch.rand(20000)
    z = logit_normal(u).logit()
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03 and logit_normal(torch.tensor([0.0, 0.5])).tolist() == [0, 0.5]
    x0 = torch.randn(2, 1, 1, 2, 2)
    x_t, t, target = noised(Flow(2.0), x0, -x0, torch.tensor([0.0, 0.5]))
    assert torch.equal(x_t[0], x0[0]) and torch.equal(target, -2 * x0) and t.tolist() == pytest.approx([0, 2000 / 3])


def test_rows_and_metadata():
    assert make_schedule(**BASES["opensora"].schedule) == Flow(by_size=True)
    assert make_schedule(name="flow", shift=5.0) == Flow(5.0)
    meta = dict(method="vader", base="opensora", step=1, sample=dict(BASES["opensora"].sample.metadata()))
    assert "schedule" not in read_meta(meta, "file")  # runs made before flow matching was a schedule
    flow = dict(name="flow", shift=5.0, by_size=False)
    sample = dict(meta["sample"], sampler="flow-unipc", spacing="diffusers")
    assert make_schedule(**read_meta(meta | dict(schedule=flow, sample=sample), "file")["schedule"]) == Flow(5.0)


def test_samplers_of_flow_matching_can_replace_one_another():
    parser = Parser("test")
    parser.add_argument("--sampler")
    for name in FLOW_SAMPLERS:
        assert choose_sampling("opensora", parser.parse_args(["--sampler", name])).sampler == name
    for base, name in (("opensora", "ddim"), ("tiny", "flow-unipc"), ("tiny-cogvideox", "rflow")):
        with pytest.raises(UserError, match="this base is sampled by"):
            choose_sampling(base, parser.parse_args(["--sampler", name]))


# ---- samplers

@pytest.mark.parametrize("sampler", SOLVERS)
def test_draws_from_a_gaussian_whose_velocity_is_exact(sampler):
    torch.manual_seed(0)
    x = sampler(gaussian(), torch.randn(4000, 1, 1, 1, 1), Flow(3.0), 100)
    assert abs(x.mean() - 1.5) < 0.05 and abs(x.std() - 0.5) < 0.05


@pytest.mark.parametrize("sampler, gain", [(rflow, 12), (flow_dpmpp, 70), (flow_unipc, 70)])
def test_order(sampler, gain):
    """16 times the steps: the error of Euler's method falls by about 16, that of the others by much more."""
    torch.manual_seed(0)
    x_T, s = torch.randn(64, 1, 1, 1, 1), 0.999 if sampler is flow_unipc else 1.0
    # the exact end of the path: x keeps its distance from the mean in units of the spread
    exact = 1.5 + 0.5 * (x_T - (1 - s) * 1.5) / ((1 - s) ** 2 * 0.25 + s ** 2) ** 0.5

    def error(steps):
        x = sampler(lambda x, t: gaussian()(x.double(), t.double()), x_T.double(), Flow(), steps)
        return (x - exact).abs().mean().item()
    assert error(4) > gain * error(64)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_live_parity_with_diffusers_unipc(steps):
    from diffusers import UniPCMultistepScheduler
    for shift in (3.0, 5.0):
        peer = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        peer.set_timesteps(steps)
        x_T = torch.randn(2, 3, 2, 4, 4)
        x, times = x_T, []
        for t in peer.timesteps:
            times.append(int(t))
            x = peer.step(curved(x, t.expand(2)), t, x).prev_sample
        assert flow_levels("unipc", steps, shift, "diffusers")[0] == times
        ours = flow_unipc(curved, x_T, Flow(shift), steps, spacing="diffusers")
        assert (ours - x).abs().max() < 2e-5 * x.abs().max()


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_live_parity_with_diffusers_euler(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler
    peer = FlowMatchEulerDiscreteScheduler(shift=3.0)
    peer.set_timesteps(steps)
    x_T = torch.randn(2, 3, 2, 4, 4)
    x = x_T
    for t in peer.timesteps:
        x = peer.step(curved(x, t.expand(2)), t, x).prev_sample
    assert flow_levels("euler", steps, 3.0, "diffusers")[0] == pytest.approx(peer.timesteps.tolist(), rel=1e-6)
    ours = rflow(curved, x_T, Flow(3.0), steps, spacing="diffusers")
    assert (ours - x).abs().max() < 2e-5 * x.abs().max()


@pytest.mark.parametrize("sampler", SOLVERS)
def test_only_the_last_k_updates_carry_gradient(sampler):
    w, calls = torch.ones((), requires_grad=True), []

    def net(x, t):
        calls.append((torch.is_grad_enabled(), x.requires_grad))
        return w * curved(x, t)
    x_T = torch.randn(1, 1, 1, 2, 2)
    with torch.no_grad():
        whole = sampler(net, x_T, Flow(3.0), 5)
    assert not any(grad for grad, _ in calls) and len(calls) == 5
    calls.clear()
    x = sampler(net, x_T, Flow(3.0), 5, grad_last=2)
    assert torch.equal(x, whole)
    x.sum().backward()
    assert [c[0] for c in calls] == [False] * 3 + [True] * 2 and [c[1] for c in calls] == [False] * 4 + [True]
    assert w.grad.abs() > 0


@pytest.mark.parametrize("sampler", SOLVERS)
def test_a_first_frame_that_the_network_puts_in_leaves_the_others_alone(sampler):
    """TI2V: fn sees the clean frame in every call; what the sampler makes of frame 0 has no influence."""
    first, x_T = torch.randn(1, 2, 1, 3, 3), torch.randn(1, 2, 3, 3, 3)

    def fn(x, t):
        x = torch.cat([first, x[:, :, 1:]], dim=2)
        return curved(x, t) + x.mean(2, keepdim=True)  # frames see one another
    results = [sampler(fn, torch.cat([start, x_T[:, :, 1:]], dim=2), Flow(5.0), 6)
               for start in (first, x_T[:, :, :1])]
    assert torch.equal(results[0][:, :, 1:], results[1][:, :, 1:])


@pytest.mark.parametrize("name", FLOW_SAMPLERS)
def test_the_last_updates_start_from_a_clip_noised_to_their_level(name):
    """What InstructVideo edits: the chain's last updates, from (1 - sigma) x0 + sigma noise at their first level."""
    states, schedule, x0 = [], Flow(5.0), torch.randn(2, 2, 3, 3, 3)
    chain = Sampling(sampler=name, spacing="wan", sample_steps=10)
    t, n = instructvideo.partial_chain(schedule, chain, 0.6)
    times, sigmas = flow_levels(FLOW_SOLVERS[name], 10, 5.0)
    assert n == 6 and t == pytest.approx(1000 * sigmas[4])

    def exact(x, t):
        states.append(t[0].item())
        return (x - x0) / sigmas[times.index(t[0].item())]
    x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
    assert torch.allclose(FLOW_SAMPLERS[name](exact, x_t, schedule, 10, last=n), x0, atol=1e-4)
    assert states == pytest.approx(times[4:])
    states.clear()  # all of them are the whole chain
    whole = FLOW_SAMPLERS[name](curved, x_t, schedule, 10)
    assert torch.equal(FLOW_SAMPLERS[name](curved, x_t, schedule, 10, last=10), whole)


def test_a_consistency_model_jumps_on_the_grid_of_its_teacher():
    """Its steps are moved by the shift and the clip's size; between jumps it noises anew, and lands on x0."""
    assert lcm_timesteps(4, Flow(5.0), 20) == pytest.approx([1000 * 5 * u / (1 + 4 * u) for u in (1, 0.75, 0.5, 0.25)])
    size = (51, 240, 426)
    by_size = lcm_timesteps(2, Flow(by_size=True), 20, size=size)
    assert by_size == pytest.approx(Flow(by_size=True).steps(torch.tensor([1, 0.5]), size).tolist())
    x0, seen = torch.randn(2, 2, 3, 3, 3), []

    def exact(x, t):
        seen.append((x, t[0].item()))
        return (x - x0) * 1000 / t[0]
    x_T, g = torch.randn_like(x0), [torch.Generator().manual_seed(i) for i in range(2)]
    assert torch.allclose(lcm(exact, x_T, Flow(5.0), 4, g, 20), x0, atol=1e-5)
    assert [t for _, t in seen] == lcm_timesteps(4, Flow(5.0), 20)
    sigma = seen[1][1] / 1000
    noise = randn(x0.shape, [torch.Generator().manual_seed(i) for i in range(2)])
    assert torch.allclose(seen[1][0], (1 - sigma) * x0 + sigma * noise, atol=1e-5)


def test_a_consistency_model_keeps_a_given_first_frame():
    """sample.py --image with a distilled run: one call per step, without a second branch."""
    base, env, calls = load_base("tiny-wan"), Env(0, 1, torch.device("cpu"), torch.float32), []
    base.net.register_forward_pre_hook(lambda module, given: calls.append(given[:2]))
    sampling = replace(base.row.sample, sampler="lcm", spacing="even", origin=20, sample_steps=2)
    cond, _ = pipeline.conditions(base, env, sampling, [Image.new("RGB", (32, 32), (200, 30, 30))])
    x_T, g = torch.randn(1, *base.latent_shape(sampling)), [torch.Generator()]
    with torch.no_grad():
        x = pipeline.rollout(base.net, base, ["a red circle moving left"], x_T, sampling, g, cond)
    assert torch.equal(x[:, :, :1], cond["kept"]) and x[:, :, 1:].std() > 0.1
    assert len(calls) == 2 and all(torch.equal(seen[:, :, :1], cond["kept"]) for seen, _ in calls)
    assert all(not t[:, 0].any() and (t[:, 1:] == want).all()
               for (_, t), want in zip(calls, lcm_timesteps(2, Flow(5.0), 20)))


@pytest.mark.parametrize("method", ["t2v", "videodpo", "i2vgen"])
def test_shift_moves_the_steps_of_training(method, monkeypatch):
    """--shift means the same in training as in sampling."""
    def steps(shift):
        seen, row = [], BASES["wan2.2-ti2v-5b"]
        base = SimpleNamespace(row=row, schedule=make_schedule(**row.schedule), net=None)
        base.sampling_schedule = partial(Base.sampling_schedule, base)
        base.encode_text = lambda texts: torch.zeros(len(texts), 1, 1)
        base.encode_null = lambda text, n: torch.zeros(n, 1, 1)

        def net(x, t, text, **cond):
            seen.append(t)
            return x
        sampling, x0 = replace(row.sample, shift=shift), torch.zeros(2, 1, 2, 2, 2)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        if method == "t2v":
            args = SimpleNamespace(offset_noise=0.0, timesteps="uniform", keep_first=0.0)
            t2v.t2v_loss(net, base, sampling, x0, ["a", "b"], generators, args)
        elif method == "i2vgen":
            args = SimpleNamespace(offset_noise=0.0, drop_text=0.0, drop_image=1.0)
            i2vgen.i2v_loss(net, base, sampling, x0, {}, ["a", "b"], generators, args)
        else:
            args = SimpleNamespace(train_fps=None, beta_dpo=1.0)
            u, pairs = torch.full((1, 2), 0.5), x0[None]
            videodpo.pair_loss(net, net, base, sampling, args, pairs, ["a"], u, pairs, torch.ones(1))
        return seen[0].flatten()[-1].item() / 1000
    one, three = steps(1.0), steps(3.0)
    assert three / (1 - three) == pytest.approx(3 * one / (1 - one), rel=1e-3)


def test_progress_sees_every_update():
    for sampler in SOLVERS:
        seen = []
        sampler(curved, randn((1, 1, 1, 2, 2), [torch.Generator()]), Flow(), 4,
                progress=lambda times, seen=seen: seen.extend(times) or times)
        assert len(seen) == 4 and seen[0] >= 999


def test_open_sora_is_loaded_with_its_schedule(monkeypatch):
    monkeypatch.setattr("bases.load_parts", lambda *given: None)
    monkeypatch.setattr("bases.public_files", lambda *given: {})
    monkeypatch.setattr("bases.build_parts", lambda row, image: dict.fromkeys(("net", "vae", "text"), torch.nn.Module()))
    monkeypatch.setattr("bases.make_tokenizer", lambda *given: None)
    assert load_base("opensora", dtype=None).schedule == Flow(by_size=True)
