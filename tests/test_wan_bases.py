"""Wan2.1 and Wan2.2 through the table: small files in each published layout, load_base, sample.py.

Their networks: test_wan.py and test_wan_vae.py.
"""
from dataclasses import replace

import hub
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import bases
import pipeline
import sample
import t2v
from data import read_video, video_info
from dit import WanConfig, wan_diffusers_name
from models import add_lora
from text_encoders import OpenCLIPVision, T5Text, umt5_name, wan_clip_name
from vae import wan_vae_diffusers_name

NAMES = [name for name, row in bases.BASES.items() if isinstance(row.net, WanConfig) and row.files]
LAYOUTS = "original", "diffusers", "comfyui"
FIRST_FRAME = [name for name in NAMES if bases.BASES[name].first_frame]
TWO = [name for name in NAMES if bases.BASES[name].two_experts]


def small(monkeypatch, name):
    """Put small networks in the place of a base's own, for this test. -> its row"""
    row = bases.BASES[name]
    net = replace(row.net, dim=32, ffn_dim=48, heads=2, num_layers=2, freq_dim=16, text_dim=32,
                  image_dim=32 if row.net.image_dim else 0)
    if not net.image_dim:
        net = replace(net, text_length=8)
    text = replace(row.text, length=net.text_length, vocab_size=60, width=32, heads=2, head_dim=16, hidden=48,
                   layers=2)
    vae = replace(row.vae, dim=8, decoder_dim=8)
    image = row.image and replace(
        row.image, vision_layers=2, vision_width=32, vision_head_width=16, image_size=28)
    sampling = replace(row.sample, frames=5, height=4 * row.vae.factor, width=6 * row.vae.factor, sample_steps=3)
    row = replace(row, net=net, vae=vae, text=text, image=image, sample=sampling)
    monkeypatch.setitem(bases.BASES, name, row)
    return row


def modules_of(row):
    """{part: module on the meta device}, in our keys."""
    kinds = {"net": (bases.NETWORKS[type(row.net)], row.net), "vae": (bases.AUTOENCODERS[type(row.vae)], row.vae),
             "text": (T5Text, row.text)}
    if row.image:
        kinds["image"] = OpenCLIPVision, row.image
    if row.two_experts:
        kinds["low_net"] = kinds["net"]
    return {part: hub.on_meta(*kind) for part, kind in kinds.items()}


def in_layout(part, state, layout, row):
    """{our key: tensor} -> {key of the published file: tensor}."""
    if part in ("net", "low_net"):
        named = {wan_diffusers_name(k) if layout == "diffusers" else k: v for k, v in state.items()}
        return hub.prefixed("model.diffusion_model." if layout == "comfyui" and part == "net" else "", named)
    if part == "vae":
        return {wan_vae_diffusers_name(k, row.vae) if layout == "diffusers" else k: v for k, v in state.items()}
    if part == "text":
        return {umt5_name(k) if layout == "original" else k: v for k, v in state.items()}
    if layout == "original":
        return hub.prefixed("visual.", {wan_clip_name(k): v for k, v in state.items()})
    return clip_of_transformers(state)


def clip_of_transformers(state):
    """OpenCLIPVision's tensors in the naming of transformers' CLIPVisionModel."""
    out = {}
    for key, value in state.items():
        if ".attn.in_proj_" in key:
            layer, end = key.split(".attn.in_proj_")
            for name, rows in zip("qkv", value.chunk(3)):
                out[f"{layer}.self_attn.{name}_proj.{end}"] = rows
        else:
            out[key] = value
    names = {"transformer.resblocks.": "encoder.layers.", ".attn.out_proj.": ".self_attn.out_proj.",
             ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".mlp.c_fc.": ".mlp.fc1.",
             ".mlp.c_proj.": ".mlp.fc2.", "ln_pre.": "pre_layrnorm.", "ln_post.": "post_layernorm.",
             "class_embedding": "embeddings.class_embedding", "conv1.": "embeddings.patch_embedding.",
             "positional_embedding": "embeddings.position_embedding.weight"}
    for ours, theirs in names.items():
        out = {k.replace(ours, theirs): v for k, v in out.items()}
    return hub.prefixed("vision_model.", out)


def publish(folder, name, layout, low_seed=7):
    """Write the small base's files as `layout` has them. -> {part: tensors to expect}"""
    row, expected = bases.BASES[name], {}
    for seed, (part, module) in enumerate(modules_of(row).items()):
        expected[part] = hub.random_state(module, low_seed if part == "low_net" else seed)
    folder.mkdir(parents=True, exist_ok=True)
    model = hub.spiece_model(folder / "spiece.model").read_bytes()
    for part, url in row.files[layout].items():
        path = folder / url.split(":", 2)[2].removeprefix("split_files/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if part == "tokenizer":
            if layout != "comfyui":
                path.with_name("spiece.model").write_bytes(model)
            continue
        state = {k: v.contiguous() for k, v in in_layout(part, expected[part], layout, row).items()}
        if part == "text" and layout == "comfyui":
            state["spiece_model"] = torch.frombuffer(bytearray(model), dtype=torch.uint8)
        if path.suffix == ".pth":
            torch.save(state, path)
        else:
            save_file(state, path)
    return expected


@pytest.mark.parametrize("name, layout", [
    pytest.param(name, layout, marks=[] if "14b" not in name or layout == "comfyui" else [pytest.mark.slow])
    for name in NAMES for layout in LAYOUTS])
def test_loads_what_was_published(name, layout, monkeypatch, tmp_path):
    small(monkeypatch, name)
    expected = publish(tmp_path, name, layout)
    base = bases.load_base(name, tmp_path)
    parts = {"net": base.net, "vae": base.vae, "text": base.text_encoder, "image": base.image_encoder,
             "low_net": base.low_net}
    for part, module in parts.items():
        assert (module is None) == (part not in expected)
        if module is not None:
            ours = module.state_dict()
            assert ours.keys() == expected[part].keys()
            assert all(torch.equal(ours[k], v) for k, v in expected[part].items())
    text = base.encode_text(["a  red ball"])  # blanks are cleaned, what is behind the prompt is zero
    assert torch.equal(text, base.encode_text(["a red ball"]))
    assert text.shape == (1, base.row.net.text_length, 32) and not text[:, -1].any() and text[:, 0].any()


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.mark.parametrize("name", NAMES)
def test_samples_end_to_end(name, monkeypatch, tmp_path, picture):
    row = small(monkeypatch, name)
    publish(tmp_path / "weights", name, "original")
    args = ["--base", name, "--weights", str(tmp_path / "weights"), "--prompt", "a red ball", "--n", "2"]
    args += ["--image", picture] if row.takes_first_frame else []
    clips = []
    for options in ([], ["--batch", "1", "--sequential"]):
        out = tmp_path / f"out{len(clips)}"
        sample.main([*args, *options, "--out", str(out)])
        count, fps, size = video_info(out / "0001.mp4")
        assert (count, fps) == (5, row.sample.save_fps)
        if row.takes_first_frame:  # of the picture's shape, about as many pixels
            assert size == bases.size_for_image(name, 64, 96)
        else:
            assert size == row.sample.size[1:]
        clips.append(read_video(out / "0001.mp4")[0])
    assert (clips[0] - clips[1]).abs().mean() < 0.02 < clips[0].std()


def test_published_sizes():
    """Of images of 720x1280, 1000x1000 and 1280x720, h x w."""
    def sizes(name):
        return [bases.size_for_image(name, h, w) for h, w in ((720, 1280), (1000, 1000), (1280, 720))]
    assert sizes("wan2.1-i2v-14b-480p") == [(464, 832), (624, 624), (832, 464)]
    assert sizes("wan2.2-i2v-a14b") == [(720, 1280), (960, 960), (1280, 720)]
    assert sizes("wan2.2-ti2v-5b") == [(704, 1248), (928, 960), (1248, 704)]


@pytest.mark.parametrize("name", TWO)
def test_the_experts_change_at_the_boundary(name, monkeypatch, tmp_path, picture):
    """The first has the steps from 1000 boundary on, the second the rest, each with its own guidance."""
    row = small(monkeypatch, name)
    publish(tmp_path, name, "original")
    base, seen = bases.load_base(name, tmp_path), []
    for which, net in (("high", base.net), ("low", base.low_net)):
        net.register_forward_pre_hook(lambda module, args, which=which: seen.append((which, float(args[1].max()))))
    images = [picture if row.first_frame else None]
    env = pipeline.Env(0, 1, torch.device("cpu"), torch.float32)
    sampling = replace(row.sample, sample_steps=8)
    pipeline.generate_from(base, env, ["a red ball"], images, ["0"], sampling)
    assert {which for which, _ in seen} == {"high", "low"}
    assert all((which == "high") == (t >= 1000 * row.sample.boundary) for which, t in seen)


def test_wrong_files_are_refused_by_name(monkeypatch, message, tmp_path):
    for name in ("wan2.1-t2v-1.3b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"):
        small(monkeypatch, name)
    one, two, five = (tmp_path / k for k in ("one", "two", "five"))
    publish(one, "wan2.1-t2v-1.3b", "original")
    publish(five, "wan2.2-ti2v-5b", "original")
    (one / "Wan2.1_VAE.pth").write_bytes((five / "Wan2.2_VAE.pth").read_bytes())
    text = message(bases.load_base, "wan2.1-t2v-1.3b", one)
    assert "Wan2.1_VAE.pth" in text and "Wan2.2" in text
    net = "diffusion_pytorch_model.safetensors"
    (five / net).write_bytes((one / net).read_bytes())
    text = message(bases.load_base, "wan2.2-ti2v-5b", five)
    assert "16 channels" in text and "48" in text
    publish(two, "wan2.2-t2v-a14b", "original", low_seed=0)  # the same weights in both folders
    text = message(bases.load_base, "wan2.2-t2v-a14b", two)
    assert "high_noise_model" in text and "low_noise_model" in text
    publish(two, "wan2.2-t2v-a14b", "original")
    high, low = (two / f"{kind}_noise_model" / "diffusion_pytorch_model.safetensors" for kind in ("high", "low"))
    low.rename(two / "wan2.2_t2v_high_noise_14B.safetensors")
    low.symlink_to(two / "wan2.2_t2v_high_noise_14B.safetensors")
    assert "swapped" in message(bases.load_base, "wan2.2-t2v-a14b", two)
    low.unlink()
    publish(two, "wan2.2-t2v-a14b", "comfyui")
    models = two / "diffusion_models"
    (models / "wan2.2_t2v_low_noise_14B_fp16.safetensors").unlink()
    high.unlink()
    assert "low_noise" in message(bases.load_base, "wan2.2-t2v-a14b", two)


def test_sizes_and_options(monkeypatch, message, tmp_path):
    word = ["--prompt", "a", "--out", str(tmp_path / "out")]
    assert "81 or 85" in message(sample.main, ["--base", "wan2.1-t2v-1.3b", "--frames", "83", *word])
    assert "480 or 496" in message(sample.main, ["--base", "wan2.1-t2v-1.3b", "--height", "490", *word])
    assert "704 or 736" in message(sample.main, ["--base", "wan2.2-ti2v-5b", "--height", "720", *word])
    assert "--image" in message(sample.main, ["--base", "wan2.1-i2v-14b-480p", *word])
    assert "no such condition" in message(sample.main, ["--base", "wan2.1-t2v-1.3b", "--low-cfg", "3", *word])
    assert "no such condition" in message(sample.main, ["--base", "modelscope", "--shift", "3", *word])
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")  # it would not be read
    judged = ["--base", "tiny-wan", "--judge", "2", "--image", str(tmp_path / "image.png"), "--out", str(tmp_path / "out")]
    assert "leave --image out" in message(sample.main, judged)


@pytest.mark.parametrize("name", sorted(t2v.PRESETS))
def test_presets_of_t2v_fit_their_bases(name):
    """Sizes and lengths; and the layers of LoRA, given or the network's own."""
    args = t2v.get_args(["--base", name])
    bases.choose_sampling(name, args, method="t2v")
    row = bases.BASES[name]
    with torch.device("meta"):
        assert add_lora(bases.NETWORKS[type(row.net)](row.net), 1, 1, args.lora_targets)
