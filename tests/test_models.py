"""Networks, LoRA, samplers: properties that hold for any weights."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common import UserError
from diffusion import (
    Flow,
    Schedule,
    boundary_scalings,
    ddim,
    ddim_invert,
    ddim_timesteps,
    diffusion_loss,
    dpmpp_2m_sde,
    flow_levels,
    guided,
    lcm,
    linear_sd,
    make_schedule,
    randn,
    rflow,
    x0_scale,
)
from dit import STDiT3, STDiT3Config
from models import (
    GEGLU,
    GELU,
    FeedForward,
    Layer,
    UNet3D,
    UNetConfig,
    add_lora,
    conv2d,
    lean,
    merge_lora,
)
from tinyworld import TINY_VAE
from vae import AutoencoderKL, OpenSoraVAE, OpenSoraVAEConfig, VAEConfig

SMALL = UNetConfig(dim=32, dim_mult=(1, 2), num_res_blocks=1, attn_scales=(1.0, 0.5), head_dim=16,
                   num_heads=2, context_dim=24, dropout=0.0, use_fps_condition=True)


def small_unet():
    net = UNet3D(SMALL)
    for p in net.parameters():  # no layer may hide behind its zero initialisation
        if p.ndim == 1 or p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.2)
    return net.eval()


def check_gradients(net, run):
    """run() -> prediction: each trained parameter has the same gradient with and without recomputation."""
    grads = []
    for net.grad_ckpt in (False, True):
        net.zero_grad()
        run().square().mean().backward()
        grads.append({k: p.grad for k, p in net.named_parameters()})
    for k, p in net.named_parameters():
        if not p.requires_grad:
            assert grads[0][k] is None and grads[1][k] is None
        else:
            assert grads[1][k].abs().max() > 0, k
            assert torch.allclose(grads[0][k], grads[1][k], rtol=1e-4, atol=1e-7), k


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
    check_gradients(net, lambda: net(*args, fps=torch.tensor([8, 16])))


@pytest.mark.parametrize("kernel, stride, padding", [
    ((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (2, 1)), ((1, 1), (1, 1), (0, 0)), ((3, 1), (1, 1), (1, 0))])
def test_a_convolution_of_few_pixels_is_one(kernel, stride, padding):
    x = torch.randn(2, 5, 4, 6, requires_grad=True)
    weight, bias = torch.randn(200, 5, *kernel, requires_grad=True), torch.randn(200, requires_grad=True)
    found = []
    for fn in (conv2d, torch.nn.functional.conv2d):  # 48 pixels, 200 channels: the first is a matmul
        out = fn(x, weight, bias, stride, padding)
        found.append((out, *torch.autograd.grad(out.sin().sum(), (x, weight, bias))))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found))


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


def test_steps_are_looked_up_where_they_are():
    """On the meta device a copy to the CPU, for which a GPU would have to be waited, is an error."""
    x, t = torch.randn(2, 1, 2, 3, 3, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    for prediction in ("eps", "v", "x0"):
        schedule = make_schedule("linear_sd", prediction, scale=(1.0, 0.7, 400))
        schedule.to_x0(schedule.target(x, x, t), schedule.add_noise(x, x, t), t)


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


# ---- Open-Sora

def small_stdit3():
    net = STDiT3(STDiT3Config(dim=32, depth=2, num_heads=2, context_dim=24, text_length=5))
    for p in net.parameters():
        if p.ndim == 1 or p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.2)
    return net.eval()


def stdit3_inputs(b=2, f=3):
    """x, t, text and the conditions; latents of odd sizes."""
    cond = dict(fps=torch.full((b,), 24.0), height=torch.full((b,), 56.0), width=torch.full((b,), 40.0),
                text_mask=torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])[:b])
    return (torch.randn(b, 4, f, 7, 5), torch.rand(b) * 1000, torch.randn(b, 5, 24)), cond


@pytest.mark.parametrize("lora", [False, True])
def test_stdit3_gradients_are_the_same_with_recomputation(lora):
    net, (args, cond) = small_stdit3(), stdit3_inputs()
    if lora:
        before = net(*args, **cond)
        names = add_lora(net, 2, 2.0, ["qkv", "q_linear", "kv_linear"])  # VADER's
        assert len(names) == 3 * 2 * 2 and torch.equal(net(*args, **cond), before)
        for k, p in net.named_parameters():
            if "lora_B" in k:
                torch.nn.init.normal_(p, std=0.1)
    frame_mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    check_gradients(net, lambda: net(*args, frame_mask=frame_mask, **cond))


def test_stdit3_sees_its_own_sample_and_tokens_only():
    net, ((x, t, text), cond) = small_stdit3(), stdit3_inputs()
    with torch.no_grad():
        a = net(x, t, text, **cond)
        assert a.shape == x.shape
        alone = net(x[:1], t[:1], text[:1, :2], **{k: v[:1] for k, v in cond.items() if k != "text_mask"})
        assert torch.allclose(alone, a[:1], atol=1e-5)  # cutting tokens off is hiding them
        moved = text.clone()
        moved[0, 2:] += 1
        assert torch.equal(net(x, t, moved, **cond), a)
        every = torch.ones(2, 3)
        assert torch.allclose(net(x, t, text, frame_mask=every, **cond), a, atol=1e-6)
        # frame 1 is a condition: the network does not see how noisy it is said to be
        mask = torch.tensor([[1, 0, 1]] * 2)
        out = [net(x, t, null, frame_mask=mask, **cond) for null in (text, net.null_text(2))]
        assert (out[0] - a).abs().max() > 1e-3 and (out[0] - out[1]).abs().max() > 1e-3


def test_stdit3_in_bf16():
    net, (args, cond) = small_stdit3(), stdit3_inputs()
    with torch.no_grad():
        exact = net(*args, **cond)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net(*args, **cond)
        half = net.to(torch.bfloat16)(*args, **cond)
    for out in (mixed, half):
        assert (out.float() - exact).abs().max() / exact.abs().max() < 0.05


def flow_gaussian(mean=1.5, var=0.25):
    """The exact velocity E[noise - x0 | x_t] for data drawn from N(mean, var)."""
    def net(x, t, frame_mask=None):
        s = (t / 1000).view(-1, 1, 1, 1, 1)
        total = (1 - s) ** 2 * var + s ** 2
        return (s - (1 - s) * var) / total * (x - (1 - s) * mean) - mean
    return net


@pytest.mark.parametrize("flow", [Flow(), Flow(by_size=True)])
def test_rflow_draws_from_a_gaussian_whose_velocity_is_exact(flow):
    size = 51, 240, 426
    x = rflow(flow_gaussian(), torch.randn(4000, 1, 1, 1, 1), flow, 100, size)
    assert abs(x.mean() - 1.5) < 0.05 and abs(x.std() - 0.5) < 0.05
    times, levels = flow_levels("euler", 30, flow.shift_of(size))
    assert times[0] == 1000 and len(times) == 30 and all(a > b > 0 for a, b in zip(times, times[1:]))
    assert levels == pytest.approx([t / 1000 for t in times] + [0])
    assert Flow(by_size=True).shift_of((1, 512, 512)) == 1


def test_rflow_with_a_frame_mask():
    x_T = torch.randn(2, 1, 3, 4, 4)
    seen = []

    def net(x, t, frame_mask):
        seen.append((t[0].item(), frame_mask, x))
        return flow_gaussian()(x, t)
    mask = torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]])
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    out = rflow(net, x_T, Flow(), 10, frame_mask=mask, generators=generators)
    assert torch.equal(out[0, :, 0], x_T[0, :, 0])                     # a condition stays
    free = rflow(flow_gaussian(), x_T, Flow(), 10)
    assert torch.equal(out[1], free[1]) and torch.equal(out[0, :, 1], free[0, :, 1])
    for t, active, x in seen:                                          # 0.5 joins at half of the noise
        assert active.tolist() == [[False, True, t <= 500], [True] * 3]
        assert torch.equal(x[0, :, 2], x_T[0, :, 2]) == (t > 500)
    alone = rflow(net, x_T[:1], Flow(), 10, frame_mask=mask[:1],
                  generators=[torch.Generator().manual_seed(1)])
    assert torch.equal(alone, out[:1])                                 # nor does its noise know the batch


def test_conditions_are_given_clean_and_not_counted():
    x0, noise, t = torch.randn(2, 1, 3, 4, 4), torch.randn(2, 1, 3, 4, 4), torch.tensor([100.0, 900.0])
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])

    def net(x, t, frame_mask=None):
        assert frame_mask is None or torch.equal(x[0, :, 1], x0[0, :, 1])        # the condition is clean
        return (x - Flow().add_noise(x0, noise, t)).square() + noise - x0        # wrong at the condition alone
    assert diffusion_loss(net, Flow(), x0, noise, t).max() < 1e-12
    assert diffusion_loss(net, Flow(), x0, noise, t, frame_mask=mask).max() < 1e-12
    wrong = diffusion_loss(lambda x, t, frame_mask: noise - x0 + frame_mask[:, None, :, None, None].float(),
                           Flow(), x0, noise, t, frame_mask=mask)
    assert wrong.tolist() == pytest.approx([1, 1])                               # the mean over frames that count


@pytest.mark.parametrize("first", [GEGLU, GELU])
def test_feed_forward_in_pieces_equals_the_whole(first):
    """Without gradients a CPU takes 512 or 1,024 of these tokens at a time, in place; the input stays."""
    torch.manual_seed(0)
    ff, x = FeedForward(512, first), torch.randn(3, 700, 512)
    whole, before = ff(x), x.clone()
    with torch.no_grad():
        assert torch.allclose(ff(x), whole, atol=1e-5) and torch.equal(x, before)


def test_lean_layers_keep_their_input_and_repeat_no_product():
    """norm, SiLU, dropout, convolution; a gated layer: the gradients of the plain ones, dropout included."""
    conv = torch.nn.Sequential(torch.nn.GroupNorm(4, 16), torch.nn.SiLU(), torch.nn.Dropout(0.3),
                               torch.nn.Conv2d(16, 16, 3, padding=1))
    ff = FeedForward(256)
    for layers, same, size in ((lambda x: lean(conv, x, 256), conv, (2, 16, 8, 8)),
                               (ff, lambda x: ff.net[2](ff.net[0].act(ff.net[0].proj(x))), (2, 9, 256))):
        found = []
        for call in (layers, same):
            kept, x = {}, torch.randn(size, generator=torch.Generator().manual_seed(0)).requires_grad_()
            torch.manual_seed(0)
            with torch.autograd.graph.saved_tensors_hooks(
                    lambda y: (kept.setdefault(y.untyped_storage().data_ptr(), y), y)[1], lambda y: y):
                out = call(x)
            with FlopCounterMode(display=False) as counter:
                out.square().sum().backward()
            found.append((out.detach(), x.grad, sum(y.untyped_storage().nbytes() for y in kept.values()),
                          counter.get_total_flops()))
        (out, grad, held, flops), (plain, plain_grad, plainly_held, plain_flops) = found
        assert torch.equal(out, plain) and torch.allclose(grad, plain_grad, atol=1e-6)
        assert held < 0.8 * plainly_held and flops == plain_flops
    assert sum(isinstance(m, Layer) for m in small_unet().modules()) > 20


def small_opensora_vae():
    return OpenSoraVAE(OpenSoraVAEConfig(
        VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1), ch=32, num_res_blocks=1, chunk_frames=5)).eval()


def test_opensora_vae_decodes_chosen_frames_and_those_alone():
    vae, z, decoded = small_opensora_vae(), torch.randn(2, 4, 5, 4, 6), []
    vae.temporal_vae.decoder.register_forward_hook(lambda m, args, out: decoded.append(out.shape))
    with torch.no_grad():
        whole = vae.decode(z)
        assert whole.shape == (2, 3, 14, 8, 12)  # 5 + 5 + 4 frames
        assert torch.allclose(vae.decode(z, num_frames=12), whole[:, :, [*range(10), 12, 13]], atol=1e-5)
        del decoded[:]
        assert torch.allclose(vae.decode(z, frames=[7, 1, 7], chunk=1), whole[:, :, [7, 1, 7]], atol=1e-5)
    assert len(decoded) == 2  # the third piece of 5 frames was left alone
    z.requires_grad_()
    vae.decode(z, frames=[6]).sum().backward()
    assert [bool(g.any()) for g in z.grad[0].unbind(1)] == [False, False, True, True, False]


def test_opensora_vae_encodes_piece_by_piece():
    vae, video = small_opensora_vae(), torch.rand(1, 3, 12, 8, 12) * 2 - 1
    with torch.no_grad():
        z = vae.encode(video)
        assert z.shape == (1, 4, vae.cfg.latent_frames(12), 4, 6)
        assert torch.allclose(vae.encode(video[:, :, 5:10], chunk=2), z[:, :, 2:4], atol=1e-5)
        noise = torch.randn_like(z)
        sample = vae.encode(video, noise)
        assert torch.equal(vae.encode(video, 0 * noise), z) and ((sample - z) * noise > 0).all()
    assert [OpenSoraVAEConfig().latent_frames(n) for n in (1, 16, 17, 51, 102)] == [1, 4, 5, 15, 30]
