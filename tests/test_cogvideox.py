"""CogVideoX, its autoencoder and samplers, Diffusion as Shader: properties that hold for any weights."""
import dataclasses

import oracles
import pytest
import torch
from test_models import check_gradients, gaussian

from diffusion import (
    cogvideox_dpm,
    ddim,
    ddim_timesteps,
    ddim_updates,
    dynamic_guidance,
    guided,
    make_schedule,
)
from dit import CogVideoX, CogVideoXConfig, with_tracks
from models import add_lora, merge_lora
from vae import CogVideoXVAE, CogVideoXVAEConfig, Tiles

SMALL = CogVideoXConfig(in_channels=8, out_channels=4, num_layers=3, heads=2, head_dim=16, time_dim=24,
                        text_dim=20, text_length=5, positions="rope+learned", size=(3, 6, 8),
                        tracking_blocks=2)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
COGVIDEOX = dict(name="linear_sd_shifted", prediction="v", zero_snr=True)


def filled(net):
    """Deterministic weights, none of them zero."""
    return oracles.fill(net, {key: list(value.shape) for key, value in net.state_dict().items()})


def inputs(b=2, f=3):
    """(x, t, text), conditions of a Diffusion as Shader."""
    x, text = torch.randn(b, 4, f, 6, 8), torch.randn(b, 5, 20)
    cond = dict(first_frame=torch.randn(b, 4, 1, 6, 8), tracks=torch.randn(b, 4, f, 6, 8),
                first_track=torch.randn(b, 4, 1, 6, 8))
    return (x, torch.randint(1000, (b,)), text), cond


@pytest.mark.parametrize("trained", ["all", "lora", "branch"])
def test_every_trained_parameter_gets_the_same_gradient_with_recomputation(trained):
    net, (args, cond) = filled(CogVideoX(SMALL)), inputs()
    assert len(net.units()) == 5
    if trained == "lora":
        assert len(add_lora(net, 2, 2.0, TARGETS)) == 4 * 5
        for key, p in net.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.1)
    if trained == "branch":
        for key, p in net.named_parameters():
            p.requires_grad_(key.startswith(("transformer_blocks_copy.", "combine_linears.", "initial_")))
    check_gradients(net, lambda: net(*args, **cond))


def test_merged_lora_gives_the_same_prediction():
    net, (args, cond) = filled(CogVideoX(SMALL)), inputs()
    keys = set(net.state_dict())
    with torch.no_grad():
        before = net(*args, **cond)
        add_lora(net, 4, 8.0, [*TARGETS, "net.0.proj", "net.2"])
        assert torch.equal(net(*args, **cond), before)
        for key, p in net.named_parameters():
            if "lora_B" in key:
                p.normal_(std=0.1)
        adapted = net(*args, **cond)
        merge_lora(net)
        assert set(net.state_dict()) == keys and oracles.error(adapted, before) > 1e-2
        assert oracles.error(net(*args, **cond), adapted) < 1e-5


def test_tracks_start_as_the_identity():
    """The branch copied from a base adds nothing; its last linear layers are the first to learn."""
    (args, cond), base = inputs(), filled(CogVideoX(dataclasses.replace(SMALL, tracking_blocks=0)))
    net = CogVideoX(SMALL)
    state = with_tracks(base.state_dict(), net)
    net.load_state_dict(state)
    assert all(torch.equal(state[k.replace("_copy", "")], v) for k, v in state.items() if "_copy." in k)
    with torch.no_grad():
        out = net(*args, **cond)
        assert torch.equal(out, base(*args, first_frame=cond["first_frame"]))
        assert torch.equal(out, net(*args, first_frame=cond["first_frame"]))  # no tracks: the branch rests
    net(*args, **cond).square().mean().backward()
    moved = {key.split(".")[0] for key, p in net.named_parameters() if p.grad.abs().max() > 0
             and key.startswith(("transformer_blocks_copy", "combine_linears", "initial_combine_linear"))}
    assert moved == {"combine_linears"}


def test_frames_see_one_another_and_samples_do_not():
    net, (args, cond) = filled(CogVideoX(SMALL)), inputs()
    with torch.no_grad():
        a = net(*args, **cond)
        one = net(*(y[1:] for y in args), **{key: y[1:] for key, y in cond.items()})
        assert oracles.error(one, a[1:]) < 1e-5
        moved = args[0].clone()
        moved[0, :, 2] += 1
        b = net(moved, *args[1:], **cond)
    assert (a - b)[0, :, 0].abs().max() > 1e-4 and (a - b)[1].abs().max() < 1e-6


def test_fewer_frames_take_the_first_rows_of_the_learned_table():
    net, (args, cond) = filled(CogVideoX(SMALL)), inputs(f=2)
    short = filled(CogVideoX(dataclasses.replace(SMALL, size=(2, 6, 8))))
    rows = short.patch_embed.pos_embedding.shape[1]
    state = net.state_dict()
    short.load_state_dict(state | {"patch_embed.pos_embedding": net.patch_embed.pos_embedding[:, :rows]})
    with torch.no_grad():
        assert torch.equal(net(*args, **cond), short(*args, **cond))


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16(how):
    net, (args, cond) = filled(CogVideoX(SMALL)), inputs()
    with torch.no_grad():
        want = net(*args, **cond)
        if how == "weights":
            net = net.bfloat16()
            (x, t, text), cond = args, {key: y.bfloat16() for key, y in cond.items()}
            out = net(x.bfloat16(), t, text.bfloat16(), **cond)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out = net(*args, **cond)
    assert out.dtype == torch.bfloat16 and oracles.error(out, want) < 0.05


def test_what_does_not_fit_is_an_assertion():
    """latent_shape() and sample.py have refused it before; here it is a mistake of ours."""
    net, ((x, t, text), cond) = CogVideoX(SMALL), inputs()
    first, tracks = cond["first_frame"], cond["tracks"]
    base = CogVideoX(dataclasses.replace(SMALL, tracking_blocks=0))
    text_only = CogVideoX(dataclasses.replace(SMALL, in_channels=4, positions="rope"))
    for words, fails, given in [
            ("first_frame: 4 channels of latents instead of 8", net, dict()),
            ("first_track: 4 channels", net, dict(first_frame=first, tracks=tracks)),
            ("8 channels of latents instead of 4", text_only, dict(first_frame=first)),
            ("multiples of 2", net, dict(x=x[..., :5], first_frame=first[..., :5])),
            ("learned positions", net, dict(x=x[..., :6], first_frame=first[..., :6])),
            ("6 text tokens", net, dict(text=torch.randn(2, 6, 20), first_frame=first)),
            ("tracks", base, cond)]:
        with pytest.raises(AssertionError, match=words):
            fails(**{"x": x, "t": t, "text": text} | given)


# ---- autoencoder

def small_vae():
    return filled(CogVideoXVAE(CogVideoXVAEConfig(widths=(8, 8, 16), layers=1, z_channels=4, groups=4)))


@pytest.mark.parametrize("frames", [1, 9, 17, 25])
def test_a_clip_of_8k_plus_1_frames_keeps_its_length(frames):
    vae = small_vae()
    video = torch.rand(2, 3, frames, 8, 12)
    with torch.no_grad():
        z = vae.encode(video)
        assert z.shape == (2, 4, 1 + (frames - 1) // vae.cfg.time_factor, 8 // vae.cfg.factor, 3)
        assert vae.decode(z).shape == video.shape
        # neither the batch nor the number of clips at a time matters
        assert oracles.error(vae.encode(video[1:], chunk=100), vae.encode(video, chunk=100)[1:]) < 1e-5
        assert oracles.error(vae.decode(z, chunk=100), vae.decode(z, chunk=1)) < 1e-5


def test_nothing_is_seen_of_later_chunks():
    vae, video = small_vae(), torch.rand(1, 3, 25, 8, 8)
    with torch.no_grad():
        z = vae.encode(video)
        later = torch.cat([video[:, :, :9], torch.rand(1, 3, 16, 8, 8)], dim=2)
        assert torch.equal(vae.encode(later)[:, :, :3], z[:, :, :3])
        changed = torch.cat([z[:, :, :5], torch.randn_like(z[:, :, 5:])], dim=2)
        assert torch.equal(vae.decode(changed)[:, :, :17], vae.decode(z)[:, :, :17])
        earlier = torch.cat([video[:, :, :8], torch.rand(1, 3, 1, 8, 8), video[:, :, 9:]], dim=2)
        assert not torch.equal(vae.encode(earlier)[:, :, 3], z[:, :, 3])  # the cache brings the past


def test_decode_of_chosen_frames_equals_decoding_all_and_stops_there():
    vae, z, chunks = small_vae(), torch.randn(2, 4, 7, 2, 2), []
    vae.decoder.register_forward_pre_hook(lambda module, args: chunks.append(args[0].shape[2]))
    with torch.no_grad():
        whole = vae.decode(z)
        assert chunks == [3, 2, 2] * 2
        for frames, count in (([0], 1), ([8, 2], 1), ([9], 2), ([3, 24], 3)):
            chunks.clear()
            assert oracles.error(vae.decode(z, frames=frames, chunk=64), whole[:, :, frames]) < 1e-5
            assert len(chunks) == count


def test_decoding_is_differentiable_through_the_caches():
    vae, z = small_vae(), torch.randn(1, 4, 5, 2, 2, requires_grad=True)
    vae.decode(z, frames=[16]).sum().backward()
    assert (z.grad.abs().amax((0, 1, 3, 4)) > 0).all()


def test_tiles_leave_small_pictures_alone_and_cover_large_ones():
    vae, video = small_vae(), torch.rand(1, 3, 9, 20, 28)
    with torch.no_grad():
        z = vae.encode(video)
        whole = vae.decode(z)
        vae.tiles = Tiles(20, 28, 0.2, 0.25)
        assert torch.equal(vae.encode(video), z) and torch.equal(vae.decode(z), whole)
        vae.tiles = Tiles(16, 16, 0.25, 0.25)
        assert vae.encode(video).shape == z.shape and vae.decode(z).shape == whole.shape
        assert torch.equal(vae.decode(z, frames=[0, 7]), vae.decode(z)[:, :, [0, 7]])


# ---- samplers

@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
@pytest.mark.parametrize("divisor", [1.0, 3.0])
def test_samplers_draw_from_a_gaussian_whose_score_is_exact(sampler, divisor):
    schedule, x_T = make_schedule(**COGVIDEOX, divisor=divisor), torch.randn(4000, 1, 1, 1, 1)
    if sampler == "dpm":
        x = cogvideox_dpm(gaussian(schedule), x_T, schedule, 50)
    else:  # of first order: more steps
        x = ddim(gaussian(schedule), x_T, schedule, 200, spacing="cogvideox")
    assert abs(x.mean() - 1.5) < 0.05 and abs(x.std() - 0.5) < 0.05


def test_a_sample_does_not_depend_on_its_batch():
    schedule, x_T = make_schedule(**COGVIDEOX), torch.randn(3, 4, 2, 3, 3)

    def sample(x, seeds):
        return cogvideox_dpm(gaussian(schedule), x, schedule, 5,
                             [torch.Generator().manual_seed(seed) for seed in seeds])
    assert torch.equal(sample(x_T, [1, 2, 3])[1:2], sample(x_T[1:2], [2]))


def test_updates_of_cogvideox():
    assert ddim_updates(50, spacing="cogvideox") == ddim_updates(50, spacing="trailing")
    assert ddim_updates(50, spacing="cogvideox")[-1] == (19, -1)
    assert ddim_updates(7, spacing="cogvideox")[-1] == (142, 0)  # as published: stops short of x0
    assert ddim_updates(7, spacing="trailing")[-1] == (142, -1)
    assert ddim_updates(50)[-1] == (1, 0)


def test_dynamic_guidance():
    """The intended one rises from 1 to 1 + cfg, the published one jumps; guided() asks at each step."""
    times = ddim_timesteps(50, spacing="trailing")
    values = [dynamic_guidance(6.0, 50)(t) for t in times]
    assert values[0] == 1 and values == sorted(values) and 6.5 < values[-1] < 7
    published = [dynamic_guidance(6.0, 50, as_published=True)(t) for t in times]
    assert published[:4] == pytest.approx([2.29, 2.54, 6.97, 6.42], abs=0.005)
    def net(x, t, text):
        return text.view(-1, 1).expand_as(x)
    fn = guided(net, torch.ones(2, 1, 1), torch.zeros(2, 1, 1), dynamic_guidance(6.0, 50))
    assert [fn(torch.zeros(2, 1), torch.full((2,), t))[0].item() for t in times] == pytest.approx(values)
