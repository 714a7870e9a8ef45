"""Names and shapes of the public checkpoints, the maps to other namings, and live parity with the peers."""
import dataclasses
import gzip
import json
from functools import cache
from pathlib import Path

import hub
import oracles
import pytest
import torch

import diffusion
from bases import BASES, NETWORKS
from dit import CogVideoX, CogVideoXConfig, STDiT3, STDiT3Config, Wan, WanConfig, wan_diffusers_name, wan_state
from models import (
    UNet3D,
    UNetConfig,
    add_lora,
    instructvideo_lora_name,
    turbo_lora_layers,
    unet_diffusers_name,
    unet_state,
    videocrafter_name,
)
from text_encoders import (
    DINO,
    UMT5_XXL,
    CLIPConfig,
    OpenCLIP,
    OpenCLIPText,
    OpenCLIPVision,
    T5Config,
    T5Text,
    clip_text_only,
    dino_name,
    placeholder_id,
    t5_tokenizer,
    text_from_hf,
    text_state,
    tokenize,
    umt5_name,
    vision_from_hf,
)
from tracks import MiDaS, midas_name
from vae import (
    AutoencoderKL,
    CogVideoXVAE,
    CogVideoXVAEConfig,
    OpenSoraVAE,
    Tiles,
    VAEConfig,
    opensora_vae_name,
    vae_diffusers_name,
    vae_state,
)
from weights import load_pickle, load_strict, load_weights, local_file, looks_like, rename, save_word

DATA = Path(__file__).parent / "oracle_data"

# public file of a network -> its base, and what its keys look like
UNETS = {
    "modelscope_unet/modelscope_t2v": ("modelscope", "a VGen or ModelScope UNet"),
    "dreamvideo/base_modelscope_v1-5": ("modelscope-v1.5", "a VGen or ModelScope UNet"),
    "dreamvideo/unet_joint": ("dreamvideo", "a DreamVideo adapter"),
    "demo_unet/demo": ("demo", "DEMO"),
    "i2vgen_unet/i2vgen_xl": ("i2vgen-xl", "I2VGen-XL"),
    "sr600_unet/sr600": ("sr600", "a VGen or ModelScope UNet"),
    "higen_unet/unet": ("higen", "HiGen"),
    "tft2v_unet/unet_t2v": ("tft2v", "TF-T2V"),
    "tft2v_unet/unet_vcomposer": ("vcomposer", "VideoComposer"),
    "videolcm/unet_t2v": ("videolcm", "a VGen or ModelScope UNet"),
    "videolcm/unet_vcomposer": ("vcomposer", "VideoComposer"),
    "t2v_turbo_unet/t2v_turbo_v2_unet_mg": ("t2v-turbo-v2", "T2V-Turbo"),
    "t2v_turbo_unet/t2v_turbo_v2_unet_no_mg": ("t2v-turbo", "T2V-Turbo"),
}
# other public files -> our network at its full size
OTHERS = {
    "sd_vae/sd21_vae": (AutoencoderKL, VAEConfig()),
    "clip_embedders/vit_h_14": (OpenCLIP, CLIPConfig()),
    "demo_text/open_clip_vit_h_14": (OpenCLIP, CLIPConfig()),
    "demo_text/motion_encoder": (OpenCLIPText, CLIPConfig()),
    "stdit3/STDiT3-XL-2": (STDiT3, STDiT3Config()),
    "cogvideox_dit/cogvideox_2b": (CogVideoX, CogVideoXConfig(num_layers=30, heads=30, positions="sincos")),
    "cogvideox_dit/cogvideox_5b": (CogVideoX, CogVideoXConfig()),
    "cogvideox_dit/cogvideox_5b_i2v": (
        CogVideoX, CogVideoXConfig(in_channels=32, positions="rope+learned")),
    "das_dit/das": (
        CogVideoX, CogVideoXConfig(in_channels=32, positions="rope+learned", tracking_blocks=18)),
    "cogvideox_vae/cogvideox_vae": (CogVideoXVAE, CogVideoXVAEConfig()),
    "cogvideox_t5/t5_v1_1_xxl_encoder": (T5Text, T5Config()),
    "wan_t5/umt5_xxl_encoder_transformers": (T5Text, UMT5_XXL),
}
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, heads=40, num_layers=40)
WAN = {
    "wan2.1_t2v_1.3b": WanConfig(),
    "wan2.1_t2v_14b": WAN_14B,
    "wan2.2_t2v_a14b": WAN_14B,
    "wan2.1_i2v_14b_480p": dataclasses.replace(WAN_14B, in_channels=36, image_dim=1280),
    "wan2.1_flf2v_14b_720p": dataclasses.replace(
        WAN_14B, in_channels=36, image_dim=1280, image_positions=514),
    "wan2.2_i2v_a14b": dataclasses.replace(WAN_14B, in_channels=36),
    "wan2.2_ti2v_5b": WanConfig(in_channels=48, out_channels=48, dim=3072, ffn_dim=14336, heads=24),
}
MAPS = {"modelscope_unet": ("modelscope_unet/modelscope_t2v", unet_diffusers_name),
        "i2vgen_unet": ("i2vgen_unet/i2vgen_xl", unet_diffusers_name),
        "sd_vae": ("sd_vae/sd21_vae", vae_diffusers_name)}


def read(name):
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))


def on_meta(build, *args):
    with torch.device("meta"):
        return build(*args)


def shapes(net):
    return {key: list(value.shape) for key, value in net.state_dict().items()}


@cache
def full_size(kind, cfg):
    """{key: shape} of a network of the table."""
    return shapes(on_meta(kind, cfg))


def unet(name):
    return full_size(UNet3D, BASES[name].net)


def filled(net):
    """The network with deterministic weights, none of them zero."""
    return oracles.fill(net, shapes(net))


def close(ours, theirs):
    assert oracles.error(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", UNETS)
def test_networks_of_the_table(name):
    base, words = UNETS[name]
    named = videocrafter_name if BASES[base].net.temporal_linear else (lambda key: key)
    keys = read(f"{name}.manifest")["keys"]
    assert {named(key): shape for key, shape in unet(base).items()} == keys
    assert looks_like(keys) == f"it looks like {words}"


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(name):
    assert full_size(*OTHERS[name]) == read(f"{name}.manifest")["keys"]


@pytest.mark.parametrize("name", WAN)
def test_wan(name):
    keys = read(f"wan_dit/{name}.manifest")["keys"]
    assert full_size(Wan, WAN[name]) == keys and looks_like(keys) == "it looks like Wan"


@pytest.mark.parametrize("name", ["wan2.1_t2v_1.3b", "wan2.1_i2v_14b_480p"])
def test_wan_in_diffusers_layout(name):
    keys, net = read(f"wan_dit/{name}_diffusers.manifest")["keys"], on_meta(Wan, WAN[name])
    assert {wan_diffusers_name(key): shape for key, shape in shapes(net).items()} == keys
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    load_strict(net, wan_state(state, net, "manifest"), "manifest")


def test_wan_diffusers_names():
    table = read("wan_dit/original_to_diffusers")["keys"]
    assert {key: wan_diffusers_name(key) for key in table} == table
    assert set(table) == {key for key in full_size(Wan, WAN["wan2.1_flf2v_14b_720p"])
                          if not key.startswith("blocks.") or key.startswith("blocks.0.")}


def test_umt5_in_wans_own_layout():
    ours = full_size(T5Text, UMT5_XXL)
    assert {umt5_name(key): shape for key, shape in ours.items()} == read("wan_t5/umt5_xxl_encoder.manifest")["keys"]


def test_autoencoders_and_towers_of_the_table():
    for name, row in BASES.items():
        if row.files and isinstance(row.net, UNetConfig):
            assert (row.vae, row.text) == (VAEConfig(), CLIPConfig()), name


@pytest.mark.parametrize("name", BASES)
def test_numbers_of_parameters(name):
    """What `python bases.py` prints."""
    net = on_meta(NETWORKS[type(BASES[name].net)], BASES[name].net)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == BASES[name].millions / (1 + BASES[name].two_experts)


def test_midas():
    """Names through the map, and exact shapes but for the layers that are stored in another form."""
    keys, expected = read("tft2v_unet/midas_v3_dpt_large.manifest")["keys"], {}
    for key, (rows, *shape) in keys.items():
        names = [key.replace("qkv", c) for c in "qkv"] if "qkv" in key else [key]
        expected |= {name: [rows // len(names), *shape] for name in names}
    expected["head.4.weight"] = [1, 32, 1, 1]  # a convolution for a transposed one
    net = on_meta(MiDaS)
    assert {midas_name(key): shape for key, shape in shapes(net.dpt).items()} == expected
    assert looks_like(keys) == "it looks like MiDaS"
    net.from_public({key: torch.empty(shape, device="meta") for key, shape in keys.items()}, "manifest")


def test_videocrafter2_whole():
    """model.ckpt: three networks, and the schedule's buffers, which are not needed."""
    keys = hub.prefixed("model.diffusion_model.", {
        videocrafter_name(key): shape for key, shape in unet("videocrafter2").items()})
    keys |= hub.prefixed("first_stage_model.", full_size(AutoencoderKL, VAEConfig()))
    keys |= hub.prefixed("cond_stage_model.model.", full_size(OpenCLIPText, CLIPConfig()))
    keys |= {name: [1400 if name == "scale_arr" else 1000] for name in hub.BUFFERS}
    assert keys == read("vc2_unet/videocrafter2_model.manifest")["keys"]
    assert looks_like(keys) == "it looks like VideoCrafter2"


def test_instructvideo_file():
    net = on_meta(UNet3D, UNetConfig())
    add_lora(net, 4, 4, ["to_q", "to_k", "to_v", "to_out.0"])
    keys = {instructvideo_lora_name(key): shape for key, shape in shapes(net).items()}
    assert keys == read("instructvideo/instructvideo_lora.manifest")["keys"]
    assert "InstructVideo" in looks_like(keys)


def test_turbo_list():
    """T2V-Turbo's LoRA has no names: order, kinds and shapes of its 1150 tensors."""
    file = read("t2v_turbo_unet/t2v_turbo_vc2_unet_lora.manifest")
    net = on_meta(UNet3D, BASES["t2v-turbo"].net)
    modules, layers = dict(net.named_modules()), turbo_lora_layers(net)
    published = [videocrafter_name(f"{name}.").removesuffix(".") for name in layers]
    assert published == [target["module"] for target in file["config"]["targets"]]
    tensors = []
    for name in layers:
        cout, *rest = modules[name].weight.shape
        r = min(64, cout, rest[0])
        tensors += [[cout, r, *(1 for _ in rest[1:])], [r, *rest]]
    assert {str(i): shape for i, shape in enumerate(tensors)} == file["keys"]


@pytest.mark.parametrize("kind, file", [("spatial", "identity"), ("temporal", "motion")])
def test_dreamvideo_adapters(kind, file):
    keys = read(f"dreamvideo/{file}_adapter.manifest")["keys"]
    state = on_meta(lambda: {key: torch.empty(shape) for key, shape in unet("dreamvideo").items()})
    found = hub.adapters(state, kind)["state_dict"]
    assert {key: list(value.shape) for key, value in found.items()} == keys
    assert looks_like(keys) == "it looks like a DreamVideo adapter"


def test_text_tower_of_clip():
    keys = clip_text_only(read("clip_embedders/vit_h_14.manifest")["keys"])
    assert shapes(on_meta(OpenCLIPText)) == keys and not any(key.startswith("visual") for key in keys)


def test_open_soras_autoencoder():
    """The file's keys and shapes exactly; its attention has Linears where ours has 1x1 convolutions."""
    keys, net = read("opensora_vae/OpenSora-VAE-v1.2.manifest")["keys"], on_meta(OpenSoraVAE)
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    ours = rename(state, net, opensora_vae_name, "manifest")  # none missing, none left over
    assert {key: list(value.shape) for key, value in ours.items()} == shapes(net)
    linear = {opensora_vae_name(key) for key, shape in shapes(net).items()
              if shape != keys[opensora_vae_name(key)]}
    assert len(linear) == 8 and all(".attentions.0.to_" in key for key in linear)


def test_dino():
    ours = {dino_name(key): shape for key, shape in shapes(on_meta(DINO)).items()}
    assert ours == read("dreamvideo/dino_vits16.manifest")["keys"]


def test_image_side_of_videocrafter1():
    """The Image2Video-512 file: the network has keys and values for image tokens; the image tower is whole,
    beside leftovers of the text tower; the rest is as in VideoCrafter2's but for a resampler (not ours)."""
    keys = read("vc2_unet/videocrafter1_i2v_512_model.manifest")["keys"]

    def part(prefix):
        return {key.removeprefix(prefix): shape for key, shape in keys.items() if key.startswith(prefix)}
    visual = part("embedder.model.visual.")
    assert shapes(on_meta(OpenCLIPVision)) == visual
    text = {k: v for k, v in shapes(on_meta(OpenCLIPText)).items() if not k.startswith("transformer.")}
    assert text == clip_text_only(part("embedder.model."))
    assert len(part("embedder.")) == len(text) + len(visual)
    net = full_size(UNet3D, dataclasses.replace(BASES["videocrafter2"].net, image_keys=True))
    assert {videocrafter_name(key): shape for key, shape in net.items()} == part("model.diffusion_model.")
    rest = read("vc2_unet/videocrafter2_model.manifest")["keys"]
    rest = {key: shape for key, shape in rest.items() if not key.startswith("model.diffusion_model.")}
    ours = ("model.diffusion_model.", "image_proj_model.", "embedder.")
    assert {key: shape for key, shape in keys.items() if not key.startswith(ours)} == rest
    assert looks_like(keys) == "it looks like VideoCrafter1 image-to-video"


def test_learned_word(tmp_path):
    """The file that we write has the published one's keys and token."""
    save_word(tmp_path / "word.pth", "*", placeholder_id("*"), torch.zeros(1, 1024))
    state = load_pickle(tmp_path / "word.pth", allow=[torch.nn.ParameterDict])
    assert state["string_to_token"] == {"*": torch.tensor(265)}
    ours = {f"string_to_param.{word}": list(v.shape) for word, v in state["string_to_param"].items()}
    assert ours == read("dreamvideo/text_embedding.manifest")["keys"]


@pytest.mark.parametrize("system", MAPS)
def test_diffusers_names(system):
    name, rename = MAPS[system]
    table = read(f"{system}/original_to_diffusers")["map"]
    ours = {key: rename(key).replace("to_qkv", "to_{q,k,v}")  # one matrix in I2VGen-XL's original
            for key in read(f"{name}.manifest")["keys"]}
    assert ours == {key: theirs for key, (theirs, _) in table.items()}
    assert len(set(ours.values())) == len(ours)  # so that the map can be turned round


def give_weights(peer, net, rename, back):
    """Load our weights into the peer, strictly, and turn the peer's back into ours."""
    theirs, ours = peer.state_dict(), net.state_dict()
    # Conv1d and 1x1 Conv2d weights are matrices there
    renamed = {rename(key): value for key, value in ours.items()}
    peer.load_state_dict({key: value.reshape(theirs[key].shape) for key, value in renamed.items()})
    again = back(peer.state_dict(), net, "peer")
    assert again.keys() == ours.keys() and all(torch.equal(again[key], ours[key]) for key in ours)


@pytest.mark.parametrize("mult, attention, blocks, frames", [((1, 2), 1, 2, 3), ((1, 2, 2), 2, 1, 1)])
def test_unet_equals_diffusers(mult, attention, blocks, frames):
    diffusers = pytest.importorskip("diffusers")
    cfg = UNetConfig(dim=32, dim_mult=mult, num_res_blocks=blocks, head_dim=16, context_dim=24,
                     attn_scales=tuple(0.5 ** i for i in range(attention)))
    net = filled(UNet3D(cfg))
    attended = [level < attention for level in range(len(mult))]
    peer = diffusers.UNet3DConditionModel(
        block_out_channels=tuple(32 * m for m in mult), layers_per_block=blocks,
        attention_head_dim=16, cross_attention_dim=24,
        down_block_types=tuple("CrossAttnDownBlock3D" if a else "DownBlock3D" for a in attended),
        up_block_types=tuple("CrossAttnUpBlock3D" if a else "UpBlock3D" for a in reversed(attended))).eval()
    give_weights(peer, net, lambda key: unet_diffusers_name(key, blocks), unet_state)
    x, t, text = torch.randn(2, 4, frames, 8, 12), torch.tensor([7, 900]), torch.randn(2, 5, 24)
    with torch.no_grad():
        close(net(x, t, text), peer(x, t, text).sample)


@pytest.mark.parametrize("frames", [1, 4])
def test_i2vgen_equals_diffusers(frames):
    """If its first convolution weighs the image's channels twice: the original adds them twice."""
    diffusers = pytest.importorskip("diffusers")
    cfg = UNetConfig(dim=32, dim_mult=(1, 2), num_res_blocks=1, head_dim=16, context_dim=24,
                     image_to_video=True, concat_dim=4, use_fps_condition=True)
    net = filled(UNet3D(cfg))
    peer = diffusers.I2VGenXLUNet(
        block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=16, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock3D",) * 2, up_block_types=("CrossAttnUpBlock3D",) * 2).eval()
    theirs = hub.to_diffusers(net.state_dict(), peer, 1)
    back = unet_state(theirs, net, "peer")
    assert all(torch.equal(back[key], value) for key, value in net.state_dict().items())
    theirs["conv_in.weight"] = theirs["conv_in.weight"].clone()
    theirs["conv_in.weight"][:, 4:8] *= 2
    peer.load_state_dict(theirs)
    x, t, text = torch.randn(2, 4, frames, 8, 12), torch.tensor([7, 900]), torch.randn(2, 5, 24)
    first, image, fps = torch.randn(2, 4, 8, 12), torch.randn(2, 1, 24), torch.tensor([8, 16])
    planes = [torch.full_like(first, k / (frames - 1)) for k in range(1, frames)]
    with torch.no_grad():
        ours = net(x, t, text, fps=fps, image=image, first_frame=first)
        close(ours, peer(x, t, fps, torch.stack([first, *planes], 2), image[:, 0], text).sample)


def test_vision_equals_transformers():
    pytest.importorskip("transformers")
    peer, net = filled(hub.vision_peer()), OpenCLIPVision(hub.CLIP).eval()
    net.load_state_dict(vision_from_hf(peer.state_dict()))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        close(net(images), peer(images).image_embeds)


def test_vae_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    net = filled(AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1)))
    peer = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=4, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3).eval()
    give_weights(peer, net, lambda key: vae_diffusers_name(key, levels=3), vae_state)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior, (mean, logvar) = peer.encode(images).latent_dist, net.image_moments(images)
        close(mean, posterior.mean)
        close(logvar, posterior.logvar)
        close(net.decode_images(mean), peer.decode(mean).sample)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_equals_transformers(prefix):
    transformers = pytest.importorskip("transformers")
    peer = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        hidden_act="gelu", bos_token_id=97, eos_token_id=98, pad_token_id=0)).eval()
    cfg = CLIPConfig(embed_dim=0, vocab_size=99, text_width=32, text_heads=4, text_layers=3)
    net = OpenCLIPText(cfg).eval()
    state = {prefix + key.removeprefix("text_model."): v for key, v in filled(peer).state_dict().items()}
    state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]  # as old files have it
    net.load_state_dict(text_from_hf(state))  # strict: no key missing, none left over
    assert text_state(state, net, "peer").keys() == net.state_dict().keys()
    ids = torch.zeros(2, 77, dtype=torch.long)
    ids[0, :4], ids[1, :77] = torch.tensor([97, 5, 6, 98]), torch.arange(77) % 90 + 1
    with torch.no_grad():
        close(net(ids, "last"), peer(ids).last_hidden_state)
        # a tower with one layer more reads the same features when it skips that layer
        deeper = OpenCLIPText(dataclasses.replace(cfg, text_layers=4)).eval()
        deeper.load_state_dict(net.state_dict(), strict=False)
        close(deeper(ids, "penultimate"), peer(ids).last_hidden_state)


def test_towers_equal_open_clip():
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 28, "layers": 2, "width": 64, "head_width": 16, "patch_size": 7}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    net = filled(OpenCLIP(oracles.clip_config({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})))
    peer = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    peer.load_state_dict(net.state_dict())
    ids, images = tokenize(["a red ball", "", "two words " * 60]), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        close(net.pooled(ids), peer.encode_text(ids))
        close(net.visual(images), peer.encode_image(images))


def renamed(key, table):
    for ours, theirs in table.items():
        key = key.replace(ours, theirs)
    return key


VIT_NAMES = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks.": "layers.",
             "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "norm1": "layernorm_before", "norm2": "layernorm_after", ".norm.": ".layernorm.",
             "attn.proj": "attention.o_proj"}


@pytest.mark.parametrize("size", [(24, 24), (16, 40)])  # the position table's own grid, and another
def test_dino_equals_transformers(size):
    transformers = pytest.importorskip("transformers", minversion="5.0")  # its keys were others before
    net = filled(DINO(width=48, heads=3, layers=2, patch_size=8, image_size=24))
    peer = transformers.ViTModel(transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=24,
        patch_size=8, layer_norm_eps=1e-6), add_pooling_layer=False).eval()
    theirs = {}
    for key, value in net.state_dict().items():
        name = renamed("." + dino_name(key), VIT_NAMES).removeprefix(".")
        if ".qkv." in name:
            for c, rows in zip("qkv", value.chunk(3)):
                theirs[name.replace("attn.qkv", f"attention.{c}_proj")] = rows
        else:
            theirs[name] = value
    peer.load_state_dict(theirs)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        close(net(images), peer(images, interpolate_pos_encoding=True).last_hidden_state[:, 0])


# ---- CogVideoX

SMALL_DIT = CogVideoXConfig(in_channels=4, out_channels=4, num_layers=2, heads=2, head_dim=32, time_dim=24,
                            text_dim=40, text_length=6, size=(3, 8, 12))


def cogvideox_peer(diffusers, cfg):
    """diffusers' CogVideoXTransformer3DModel of a CogVideoXConfig."""
    frames, height, width = cfg.size
    return diffusers.CogVideoXTransformer3DModel(
        in_channels=cfg.in_channels, out_channels=cfg.out_channels, num_layers=cfg.num_layers,
        num_attention_heads=cfg.heads, attention_head_dim=cfg.head_dim, time_embed_dim=cfg.time_dim,
        text_embed_dim=cfg.text_dim, max_text_seq_length=cfg.text_length, sample_frames=4 * frames - 3,
        sample_height=height, sample_width=width, use_rotary_positional_embeddings="rope" in cfg.positions,
        use_learned_positional_embeddings="learned" in cfg.positions).eval()


# sincos and rope also with another size and another number of frames than the configured ones
@pytest.mark.parametrize("positions, channels, size", [
    ("sincos", 4, (3, 8, 12)), ("sincos", 4, (2, 6, 14)), ("rope", 4, (3, 8, 12)), ("rope", 4, (5, 8, 8)),
    ("rope", 4, (1, 14, 6)), ("rope+learned", 8, (3, 8, 12))])
def test_cogvideox_equals_diffusers(positions, channels, size):
    diffusers = pytest.importorskip("diffusers")
    theirs = pytest.importorskip("diffusers.pipelines.cogvideo.pipeline_cogvideox")
    cfg = dataclasses.replace(SMALL_DIT, positions=positions, in_channels=channels)
    net, peer = filled(CogVideoX(cfg)), cogvideox_peer(diffusers, cfg)
    peer.load_state_dict(net.state_dict())
    f, h, w = size
    x, beside = torch.randn(2, 4, f, h, w), torch.randn(2, channels - 4, 1, h, w)
    t, text = torch.tensor([7, 999]), torch.randn(2, cfg.text_length, cfg.text_dim)
    rope, both = None, x
    if "rope" in positions:
        crop = theirs.get_resize_crop_region_for_grid((h // 2, w // 2), cfg.size[2] // 2, cfg.size[1] // 2)
        rope = theirs.get_3d_rotary_pos_embed(cfg.head_dim, crop, (h // 2, w // 2), f)
    if channels > 4:
        both = torch.cat([x, torch.cat([beside, torch.zeros(2, 4, f - 1, h, w)], dim=2)], dim=1)
    with torch.no_grad():
        out = peer(both.transpose(1, 2), text, t, image_rotary_emb=rope).sample
        close(net(x, t, text, first_frame=beside if channels > 4 else None), out.transpose(1, 2))


@pytest.mark.parametrize("tiles", [None, Tiles(48, 64, 1 / 3, 1 / 4)])
@pytest.mark.parametrize("frames", [1, 9, 17])
def test_cogvideox_vae_equals_diffusers(frames, tiles):
    diffusers = pytest.importorskip("diffusers")
    cfg = CogVideoXVAEConfig(widths=(8, 8, 16, 16), layers=1, z_channels=4, groups=4)
    net, levels = filled(CogVideoXVAE(cfg)), 4
    peer = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=cfg.widths, layers_per_block=cfg.layers, latent_channels=cfg.z_channels,
        norm_num_groups=cfg.groups, down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels, sample_height=64, sample_width=96).eval()
    peer.load_state_dict(net.state_dict())
    video, noise = torch.rand(2, 3, frames, 72, 40) * 2 - 1, torch.randn(2, 4, (frames + 3) // 4, 9, 5)
    if tiles is not None:
        net.tiles = tiles
        peer.enable_tiling(tiles.height, tiles.width, tiles.overlap_height, tiles.overlap_width)
    with torch.no_grad():
        posterior = peer.encode(video).latent_dist
        close(net.encode(video), 0.7 * posterior.mean)
        close(net.encode(video, noise), 0.7 * (posterior.mean + posterior.std * noise))
        close(net.decode(net.encode(video)), peer.decode(posterior.mean).sample)


def toy(x, t):
    return 0.3 * x + 0.05 * torch.sin(t.view(-1, *[1] * (x.ndim - 1)) / 100)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("steps, divisor", [(25, 1.0), (50, 3.0), (48, 3.0), (30, 3.0), (7, 1.0)])
def test_cogvideox_samplers_equal_diffusers(sampler, steps, divisor, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    kind = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}[sampler]
    peer = kind(beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_spacing="trailing",
                rescale_betas_zero_snr=True, snr_shift_scale=divisor)
    peer.set_timesteps(steps)
    schedule = diffusion.make_schedule("linear_sd_shifted", "v", zero_snr=True, divisor=divisor)
    close(schedule.alpha_bar, peer.alphas_cumprod)
    x_T, noise = torch.randn(2, 4, 3, 4, 6), torch.randn(steps, 2, 4, 3, 4, 6)
    x, old, back = x_T, None, None
    for i, t in enumerate(peer.timesteps):
        out = toy(x, t.expand(2))
        if sampler == "ddim":
            x = peer.step(out, t, x).prev_sample
        else:
            monkeypatch.setattr("diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor",
                                lambda *args, **kw: noise[i])
            x, old = peer.step(out, old, t, back, x, return_dict=False)
            back = t
    draws = iter(noise)
    monkeypatch.setattr(diffusion, "randn_like", lambda x, generators: next(draws))
    if sampler == "ddim":
        close(diffusion.ddim(toy, x_T, schedule, steps, spacing="cogvideox"), x)
    else:
        close(diffusion.cogvideox_dpm(toy, x_T, schedule, steps), x)


def test_sharded_files_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    cfg = dataclasses.replace(SMALL_DIT, positions="rope+learned", in_channels=8)
    peer = cogvideox_peer(diffusers, cfg)
    peer.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    path = local_file(tmp_path, "hf:some/base:transformer/diffusion_pytorch_model.safetensors")
    assert path.name.endswith(".index.json") and len(list(path.parent.glob("*.safetensors"))) > 2
    state, net = load_weights(path), on_meta(lambda: CogVideoX(cfg))
    assert looks_like(state) == "it looks like CogVideoX"
    load_strict(net, state, "net")
    assert all(torch.equal(value, peer.state_dict()[key]) for key, value in net.state_dict().items())


SMALL_T5 = T5Config(length=9, vocab_size=60, width=32, heads=4, head_dim=8, hidden=48, layers=2)


def test_t5_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu")).eval()
    peer.save_pretrained(tmp_path / "text_encoder")  # the shared table stands there once
    net = on_meta(lambda: T5Text(SMALL_T5))
    load_strict(net, load_weights(tmp_path / "text_encoder" / "model.safetensors"), "text")
    ids = torch.tensor([[5, 7, 1, 0, 0, 0, 0, 0, 0], [5, 7, 8, 9, 10, 11, 12, 13, 1]])
    with torch.no_grad():
        close(net(ids), peer(ids).last_hidden_state)
        net.cfg = dataclasses.replace(SMALL_T5, mask=True)
        close(net(ids), peer(ids, attention_mask=ids.ne(0)).last_hidden_state)


def test_t5_tokenizer(tmp_path, message):
    tokenize = t5_tokenizer(hub.spiece_model(tmp_path / "spiece.model"), 9)
    ids = tokenize(["a red ball", "", "two blue squares " * 9])
    assert ids.shape == (3, 9) and ids.dtype == torch.long
    end = ids[0].tolist().index(1)
    assert (ids[0, :end] > 1).all() and (ids[0, end + 1:] == 0).all()
    assert ids[1].tolist() == [1] + 8 * [0]  # the empty prompt: the end, then padding
    assert (ids[2, :8] > 1).all() and ids[2, 8] == 1  # cut, but it ends
    spm = pytest.importorskip("sentencepiece")
    pieces = spm.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert pieces.decode(ids[0, :end].tolist()) == "a red ball"
    assert "spiece.model" in message(t5_tokenizer, tmp_path / "nowhere" / "spiece.model", 9)
