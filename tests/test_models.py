"""Networks, LoRA, samplers: properties that hold for any weights."""
import pytest
import torch

from common import UserError
from diffusion import (Schedule, boundary_scalings, ddim, ddim_invert, ddim_timesteps, diffusion_loss,
                       dpmpp_2m_sde, guided, lcm, linear_sd, make_schedule, randn, x0_scale)
from models import UNet3D, UNetConfig, add_lora, merge_lora
from vae import TINY_VAE, AutoencoderKL

SMALL = UNetConfig(dim=32, dim_mult=(1, 2), num_res_blocks=1, attn_scales=(1.0, 0.5), head_dim=16,
                   num_heads=2, context_dim=24, dropout=0.0, use_fps_condition=True)


def small_unet():
    net = UNet3D(SMALL)
    for p in net.parameters():  # no layer may hide behind its zero initialisation
        if p.ndim == 1 or p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.2)
    return net.eval()


def inputs(b=2, f=3):
    return torch.randn(b, 4, f, 8, 8), torch.randint(1000, (b,)), torch.randn(b, 5, 24)


def test_lora_starts_as_the_identity_and_is_all_that_trains():
    net, args = small_unet(), inputs()
    with torch.no_grad():
        before = net(*args)
        names = add_lora(net, 4, 8.0, ["to_q", "to_k", "to_v", "to_out.0"])
        # two attentions of four Linears a transformer
        assert len(names) % 8 == 0 and torch.equal(net(*args), before)
        assert all(p.requires_grad == (".lora_" in k) for k, p in net.named_parameters())


def test_merged_lora_gives_the_same_prediction():
    net, args = small_unet(), inputs()
    keys = set(net.state_dict())
    add_lora(net, 4, 8.0, ["to_q", "to_out.0", "net.2"])
    with torch.no_grad():
        for k, p in net.named_parameters():
            if "lora_B" in k:
                p.normal_(std=0.1)
        adapted = net(*args)
        merge_lora(net)
        assert set(net.state_dict()) == keys
        assert (net(*args) - adapted).abs().max() / adapted.abs().max() < 1e-5


@pytest.mark.parametrize("lora", [False, True])
def test_every_trained_parameter_gets_the_same_gradient_with_recomputation(lora):
    net, args = small_unet(), inputs()
    if lora:
        add_lora(net, 2, 2.0, ["to_q", "to_k", "to_v"])
        for k, p in net.named_parameters():
            if "lora_B" in k:
                torch.nn.init.normal_(p, std=0.1)
    grads = []
    for net.grad_ckpt in (False, True):
        net.zero_grad()
        net(*args, fps=torch.tensor([8, 16])).square().mean().backward()
        grads.append({k: p.grad for k, p in net.named_parameters()})
    for k, p in net.named_parameters():
        if not p.requires_grad:
            assert grads[0][k] is None and grads[1][k] is None
        else:
            assert grads[1][k].abs().max() > 0, k
            assert torch.allclose(grads[0][k], grads[1][k], rtol=1e-4, atol=1e-7), k


def test_frames_see_one_another_and_samples_do_not():
    net, (x, t, text) = small_unet(), inputs()
    with torch.no_grad():
        a = net(x, t, text)
        assert torch.allclose(net(x[1:], t[1:], text[1:]), a[1:], atol=1e-5)
        moved = x.clone()
        moved[0, :, 2] += 1
        b = net(moved, t, text)
    assert (a - b)[0, :, 0].abs().max() > 1e-4 and (a - b)[1].abs().max() == 0


def test_decode_of_chosen_frames_equals_decoding_all():
    vae = AutoencoderKL(TINY_VAE)
    z = torch.randn(2, 4, 5, 4, 4)
    with torch.no_grad():
        assert torch.allclose(vae.decode(z)[:, :, [1, 4]], vae.decode(z, frames=[1, 4], chunk=1), atol=1e-5)


def gaussian(schedule, mean=1.5, var=0.25):
    """The exact noise prediction for data drawn from N(mean, var)."""
    def net(x, t):
        ab = schedule.alpha_bar[int(t[0])].item()
        k = 1.0 if schedule.scale is None else schedule.scale[int(t[0])].item()
        m, v = k * mean, k * k * var  # of k x0, which takes x0's place
        y = m + v * ab ** 0.5 * (x - ab ** 0.5 * m) / (ab * v + 1 - ab)
        eps = (x - ab ** 0.5 * y) / (1 - ab) ** 0.5
        v = (ab ** 0.5 * x - y) / (1 - ab) ** 0.5
        return {"eps": eps, "x0": y / k, "v": v}[schedule.prediction]
    return net


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("scale", [None, (1.0, 0.7, 400)])
def test_ddim_draws_from_a_gaussian_whose_score_is_exact(prediction, eta, scale):
    schedule = make_schedule("linear_sd", prediction, scale=scale)
    x = ddim(gaussian(schedule), torch.randn(4000, 1, 1, 1, 1), schedule, 100, eta)
    # linear_sd's last step is not pure noise: a start from noise of mean 0 leaves some of the mean behind
    assert abs(x.mean() - 1.5) < 0.1 and abs(x.std() - 0.5) < 0.05


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_scale_of_one_changes_no_bit(prediction):
    x_T, results = torch.randn(2, 1, 2, 3, 3), []
    for scale in (None, (1.0, 1.0, 400)):
        schedule = make_schedule("linear_sd", prediction, scale=scale)
        generators = [torch.Generator(), torch.Generator()]
        results.append(ddim(gaussian(schedule), x_T, schedule, 7, 1.0, generators))
    assert torch.equal(*results)


@pytest.mark.parametrize("zero_snr, levels", [(False, None), (False, 700), (True, None)])
def test_dpm_solver_draws_from_a_gaussian_whose_score_is_exact(zero_snr, levels):
    schedule = make_schedule("cosine", "v", zero_snr=zero_snr)
    x_T = torch.randn(4000, 1, 1, 1, 1)
    if levels:  # what is left of the data at that step
        x_T = schedule.add_noise(1.5 + 0.5 * torch.randn(x_T.shape), x_T, levels - 1)
    x = dpmpp_2m_sde(gaussian(schedule), x_T, schedule, 50, levels=levels)
    assert abs(x.mean() - 1.5) < 0.1 and abs(x.std() - 0.5) < 0.05


def test_lcm_lands_on_what_a_consistent_network_says():
    schedule = make_schedule("linear_sd", "v", zero_snr=True)
    for spacing in ("stride", "even"):
        for steps in (1, 4):
            x = lcm(gaussian(schedule, var=0.0), torch.randn(2, 1, 1, 2, 2), schedule, steps, spacing=spacing)
            assert torch.allclose(x, torch.full_like(x, 1.5), atol=1e-4)
    assert boundary_scalings(0) == (1, 0)  # f(x, 0) = x
    with pytest.raises(UserError, match="1 to 50"):
        lcm(gaussian(schedule), torch.randn(1, 1, 1, 2, 2), schedule, 51)


@pytest.mark.parametrize("sampler", [ddim, lcm, dpmpp_2m_sde])
def test_a_sampled_clip_does_not_depend_on_its_batch(sampler):
    schedule = make_schedule("linear_sd", "eps")

    def sample(seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        x_T, more = randn((len(seeds), 1, 2, 3, 3), generators), {"eta": 1.0} if sampler is ddim else {}
        return sampler(gaussian(schedule), x_T, schedule, 4, generators=generators, **more)
    assert torch.equal(sample([1, 2, 3])[1:2], sample([2]))
    assert not torch.equal(sample([1]), sample([2]))


def test_inversion_comes_back():
    schedule = make_schedule("linear_sd", "eps")
    x0 = torch.full((1, 1, 1, 1, 2), 1.2)
    x_T = ddim_invert(gaussian(schedule), x0, schedule, 250)
    assert (ddim(gaussian(schedule), x_T, schedule, 250) - x0).abs().max() < 0.05


def test_zero_terminal_snr_ends_in_pure_noise_and_trailing_steps_start_there():
    schedule = make_schedule("cosine", "v", zero_snr=True, shift=0.25)
    assert schedule.alpha_bar[-1] == 0 and ddim_timesteps(25, spacing="trailing")[0] == 999
    x = ddim(gaussian(schedule), torch.randn(4000, 1, 1, 1, 1), schedule, 50, spacing="trailing")
    assert abs(x.mean() - 1.5) < 0.05 and abs(x.std() - 0.5) < 0.07


def test_prediction_types_agree():
    x0, noise, t = torch.randn(2, 1, 2, 3, 3), torch.randn(2, 1, 2, 3, 3), torch.tensor([10, 900])
    ab = torch.cumprod(1 - linear_sd(), 0)
    for prediction, scale in [(p, k) for p in ("eps", "v", "x0") for k in (None, x0_scale(1000))]:
        s = Schedule(ab, prediction, scale)
        x_t, target = s.add_noise(x0, noise, t), s.target(x0, noise, t)
        assert torch.allclose(s.to_x0(target, x_t, t), x0, atol=1e-4)
        assert torch.allclose(s.to_eps(target, x_t, t), noise, atol=1e-4)
        assert diffusion_loss(lambda x, t: target, s, x0, noise, t).abs().max() == 0  # noqa: B023


def test_only_the_last_k_updates_carry_gradient():
    schedule, w = make_schedule("linear_sd", "eps"), torch.ones((), requires_grad=True)
    calls = []

    def net(x, t):
        calls.append((torch.is_grad_enabled(), x.requires_grad))
        return w * 0.1 * x
    ddim(net, torch.randn(1, 1, 1, 2, 2), schedule, 5, grad_last=2).sum().backward()
    assert [c[0] for c in calls] == [False] * 3 + [True] * 2 and [c[1] for c in calls] == [False] * 4 + [True]
    assert w.grad.abs() > 0


def test_guidance_is_u_plus_cfg_times_difference():
    def net(x, t, text):
        return text.view(-1, 1).expand_as(x)
    text, null = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0])
    out = guided(net, text, null, 5.0)(torch.zeros(2, 2), torch.zeros(2))
    assert torch.equal(out[:, 0], torch.tensor([11.0, 16.0]))
    assert torch.equal(guided(net, text, null, 1)(torch.zeros(2, 2), torch.zeros(2))[:, 0], text)


def test_guidance_with_conditions_of_each_branch():
    def net(x, t, text, strength, fps):
        return strength.view(-1, 1) * text.view(-1, 1) * x + fps.view(-1, 1)
    x, t, ones = torch.randn(2, 5), torch.zeros(2), torch.ones(2)
    text, off = torch.tensor([3.0, 4.0]), {"strength": 0 * ones}
    c, u = net(x, t, text, ones, 8 * ones), net(x, t, ones, 0 * ones, 8 * ones)
    plain = u + 5 * (c - u)
    rescaled = plain * (c.std(1) / plain.std(1))[:, None]
    for sequential in (False, True):
        for phi in (0.0, 0.3):
            fn = guided(net, text, ones, 5.0, phi, sequential, null_cond=off, strength=ones, fps=8 * ones)
            assert torch.allclose(fn(x, t), phi * rescaled + (1 - phi) * plain, atol=1e-4)
