"""Wan's autoencoders: diffusers' numbers, chunks, tiles, chosen frames, wrong files."""
import gzip
import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import UserError
from vae import WAN22_VAE, Tiles, WanVAE, WanVAEConfig, runs_of, wan_vae_diffusers_name, wan_vae_state
from weights import load_strict

DATA = Path(__file__).parent / "oracle_data" / "wan_vae"
FULL = {"2.1": WanVAEConfig(), "2.2": WAN22_VAE}
SMALL = {"2.1": replace(FULL["2.1"], dim=4, decoder_dim=4, num_res_blocks=1),
         "2.2": replace(FULL["2.2"], dim=4, decoder_dim=8, num_res_blocks=1)}
both = pytest.mark.parametrize("version", ["2.1", "2.2"])


def small(version, **options):
    torch.manual_seed(0)
    net = WanVAE(replace(SMALL[version], **options)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 and p.numel() > len(p) else 0.5)
    return net


def clip(net, frames, height=2, width=3, b=1):
    """A video of so many frames and its size in latents."""
    return torch.randn(b, 3, frames, height * net.cfg.factor, width * net.cfg.factor).tanh()


def peer_of(net):
    """diffusers' network with the same weights, under diffusers' names."""
    from diffusers import AutoencoderKLWan
    c, residual = net.cfg, net.cfg.shortcuts
    peer = AutoencoderKLWan(
        base_dim=c.dim, decoder_base_dim=c.decoder_dim, z_dim=c.z_channels, num_res_blocks=c.num_res_blocks,
        latents_mean=list(c.mean), latents_std=list(c.std), is_residual=residual,
        in_channels=3 * c.patch ** 2, out_channels=3 * c.patch ** 2, patch_size=c.patch if residual else None,
        scale_factor_spatial=c.factor).eval()
    state = {wan_vae_diffusers_name(k, c): v for k, v in net.state_dict().items()}
    peer.load_state_dict(state)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in wan_vae_state(state, net, "peer").items())
    return peer


# ---- keys

@both
@pytest.mark.parametrize("naming", ["", "_diffusers"])
def test_manifest(version, naming):
    """All keys and shapes of the full networks, in both namings."""
    keys = json.loads(gzip.open(DATA / f"wan{version}_vae{naming}.manifest.json.gz").read())["keys"]
    with torch.device("meta"):
        net = WanVAE(FULL[version])
    name_of = (lambda key: wan_vae_diffusers_name(key, net.cfg)) if naming else lambda key: key
    assert {name_of(k): list(v.shape) for k, v in net.state_dict().items()} == {k: list(v) for k, v in keys.items()}


@both
def test_rule_of_the_names(version):
    names = json.loads(gzip.open(DATA / f"wan{version}_vae_original_to_diffusers.json.gz").read())["keys"]
    assert len(names) > 190
    assert {key: wan_vae_diffusers_name(key, FULL[version]) for key in names} == names


def test_constants():
    from diffusers import AutoencoderKLWan
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters  # 2.1's
    assert [tuple(defaults[f"latents_{k}"].default) for k in ("mean", "std")] == [FULL["2.1"].mean, FULL["2.1"].std]
    assert len(WAN22_VAE.mean) == len(WAN22_VAE.std) == 48
    assert (FULL["2.1"].factor, WAN22_VAE.factor, WAN22_VAE.time_factor, WAN22_VAE.latent_frames(121)) == (8, 16, 4, 31)


@pytest.mark.parametrize("version, other", [("2.1", "2.2"), ("2.2", "2.1")])
@pytest.mark.parametrize("diffusers", [False, True])
def test_a_file_of_the_other_generation_is_refused_by_name(version, other, diffusers):
    net, state = small(version), small(other).state_dict()
    if diffusers:
        state = {wan_vae_diffusers_name(k, SMALL[other]): v for k, v in state.items()}
    with pytest.raises(UserError, match=rf"a Wan{other} autoencoder") as error:
        load_strict(net, wan_vae_state(state, net, "vae.pth"), "vae.pth")
    assert "\n" not in str(error.value) and str(error.value).startswith("vae.pth: ")


# ---- numbers

@both
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_equals_diffusers(version, frames):
    net = small(version)
    peer, video = peer_of(net), clip(net, frames, b=2)
    with torch.no_grad():
        theirs, ours = peer.encode(video).latent_dist, net.moments(video)
        assert (ours[0] - theirs.mean).abs().max() < 1e-5 * theirs.mean.abs().max()
        assert (ours[1] - theirs.logvar).abs().max() < 1e-5 * theirs.logvar.abs().max()
        z = torch.randn_like(ours[0])
        mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (net.cfg.mean, net.cfg.std))
        assert torch.allclose(net.encode(video), (ours[0] - mean) / std)
        assert torch.equal(net.encode(video, noise=torch.randn_like(z)), net.encode(video))  # never sampled
        video = net.decode(z)
        assert video.shape[2] == 1 + 4 * (z.shape[2] - 1)
        assert (video.clamp(-1, 1) - peer.decode(z * std + mean).sample).abs().max() < 2e-5


@pytest.mark.parametrize("version, frames", [("2.1", 5), ("2.1", 1)])
def test_tiles_equal_diffusers(version, frames):
    net = small(version)
    peer, video = peer_of(net), clip(net, frames, 7, 6)
    peer.enable_tiling(32, 24, 24, 16)
    net.tiles = Tiles(32, 24, 1 / 4, 1 / 3)
    with torch.no_grad():
        theirs, ours = peer.encode(video).latent_dist.mean, net.moments(video)[0]
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
        mean, std = net.mean_std(ours)
        ours, theirs = net.decode(ours), peer.decode(ours * std + mean).sample
        assert (ours.clamp(-1, 1) - theirs).abs().max() < 2e-5
        net.tiles = None
        assert (net.decode(torch.randn(1, 16, 2, 7, 6)).shape) == (1, 3, 5, 56, 48)


@both
def test_chunks_change_no_bit(version):
    net = small(version)
    video, z = clip(net, 33), torch.randn(2, net.cfg.z_channels, 9, 2, 3)
    with torch.no_grad():
        moments, decoded = net.moments(video, chunk=1000), net.decode(z, chunk=1000)
        for chunk in (1, 4, 8, 16, 20):
            assert all(map(torch.equal, net.moments(video, chunk), moments))
            assert torch.equal(net.decode(z, chunk=chunk), decoded)
        for n in (1, 9, 17):  # no layer looks ahead
            assert torch.equal(net.moments(video[:, :, :n])[0], moments[0][:, :, :net.cfg.latent_frames(n)])
        assert torch.equal(net.decode(z[:, :, :4]), decoded[:, :, :13])
        assert torch.equal(net.moments(video[:, :, :8])[0], moments[0][:, :, :2])  # 3 frames too many


@both
@pytest.mark.parametrize("tiles", [None, Tiles(32, 32, 1 / 4, 1 / 4)])
def test_chosen_frames_and_their_gradients_are_those_of_the_whole_clip(version, tiles):
    net = small(version)
    net.requires_grad_(False).tiles = tiles
    z = torch.randn(1, net.cfg.z_channels, 21, 2 if tiles else 1, 3 if tiles else 2, requires_grad=True)
    whole = net.decode(z)
    for frames in ([0], [1], [41], [0, 40, 80], [30, 28, 30], list(range(0, 81, 2))):
        some = net.decode(z, frames)
        if tiles is None:
            assert torch.equal(some, whole[:, :, frames])
        else:  # pieces so small that SiLU meets their ends, which it rounds otherwise
            assert torch.allclose(some, whole[:, :, frames], atol=1e-5)
        weight = torch.randn(some.shape)
        ours, = torch.autograd.grad((some * weight).sum(), z)
        theirs, = torch.autograd.grad((whole[:, :, frames] * weight).sum(), z, retain_graph=True)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max() and theirs.abs().max() > 0
        assert ours[:, :, 1 + (max(frames) + 3) // 4:].abs().max() == 0 if max(frames) < 77 else True


def test_a_chosen_frame_runs_few_frames_of_the_large_levels():
    net, counted = small("2.1", num_res_blocks=2), []
    net.decoder.head[2].register_forward_hook(lambda m, given, out: counted.append(out.shape[2]))
    net.decoder.upsamples[12].register_forward_hook(lambda m, given, out: counted.append(given[0].shape[2]))
    with torch.no_grad():
        net.decode(torch.randn(1, 16, 21, 1, 1), [80])
    assert counted == [15, 1]  # seven causal convolutions reach 14 frames back
    assert runs_of([80, 0, 3, 40, 3], gap=16) == [[0, 3], [40], [80]]


def test_half_precision_keeps_the_numbers():
    net = small("2.1")
    z = torch.randn(1, 16, 3, 2, 3)
    with torch.no_grad():
        exact = net.decode(z)
        half = net.to(torch.bfloat16).decode(z.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and (half.float() - exact).abs().max() < 0.1 * exact.abs().max()
