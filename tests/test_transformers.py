"""CogVideoX, Diffusion as Shader and Open-Sora through the table: small files in the published layout,
load_base, sample.py. Their networks: test_cogvideox.py, test_models.py, test_keys.py."""
import json
from dataclasses import replace

import hub
import pytest
import torch
from safetensors.torch import save_file

import bases
import data
import dit
import sample
import text_encoders
import vae
import weights
from data import video_info, write_video
from dit import CogVideoXConfig, STDiT3Config, WanConfig
from text_encoders import T5Config
from vae import CogVideoXVAEConfig, OpenSoraVAEConfig, VAEConfig, opensora_vae_name
from weights import rename

NAMES = [name for name, row in bases.BASES.items()  # Wan: test_wan_bases.py
         if isinstance(row.text, T5Config) and not isinstance(row.net, WanConfig)]
COGVIDEOX = [name for name in NAMES if name != "opensora"]
T5 = dict(vocab_size=60, width=32, heads=2, head_dim=16, hidden=48, layers=2)


def small(monkeypatch, name):
    """Put small networks in the place of a base's own, for this test. -> its row"""
    row = bases.BASES[name]
    text = replace(row.text, length=8, **T5)
    if name == "opensora":
        net = STDiT3Config(dim=32, depth=1, num_heads=2, context_dim=32, text_length=8)
        vae = OpenSoraVAEConfig(VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1), ch=32,
                                num_res_blocks=1, chunk_frames=5)
        size = dict(frames=6, height=16, width=20)
    else:
        channels = 8 if row.first_frame else 4
        net = replace(row.net, in_channels=channels, out_channels=4, num_layers=3, heads=2, head_dim=16,
                      time_dim=24, text_dim=32, text_length=8, size=(3, 4, 6),
                      tracking_blocks=2 if row.tracks else 0)
        vae = CogVideoXVAEConfig(widths=(8, 8, 16, 16), layers=1, z_channels=4, groups=4, scale=row.vae.scale)
        size = dict(frames=9, height=32, width=48)
    row = replace(row, net=net, vae=vae, text=text, sample=replace(row.sample, **size, sample_steps=2))
    monkeypatch.setitem(bases.BASES, name, row)
    return row


def publish(folder, name):
    """Write the small base's files; CogVideoX's network and T5 in shards. -> {part: tensors to expect}"""
    row, expected = bases.BASES[name], {}
    kinds = {"net": (bases.NETWORKS, row.net), "vae": (bases.AUTOENCODERS, row.vae),
             "text": ({T5Config: text_encoders.T5Text}, row.text)}
    for seed, (part, (table, cfg)) in enumerate(kinds.items()):
        module = hub.on_meta(table[type(cfg)], cfg)
        state = hub.random_state(module, seed)
        for key, value in module.state_dict().items():
            state.setdefault(key, torch.rand(value.shape))  # buffers
        expected[part] = state
    for part, url in next(iter(row.files.values())).items():
        _, repo, file = url.split(":", 2)
        path = folder / (repo.split("/")[-1] if name == "opensora" else "") / file  # three have one name
        path.parent.mkdir(parents=True, exist_ok=True)
        if part == "tokenizer":
            hub.spiece_model(path)
            continue
        state = {k: v.contiguous() for k, v in expected[part].items()}
        if part == "net" and name == "opensora":
            del state["rope.freqs"]  # not in every file
        if part == "vae" and name == "opensora":
            state = {opensora_vae_name(k): v for k, v in state.items()}
        if part == "text" and name == "opensora":
            torch.save(state, path)
            continue
        if part == "vae" or name == "opensora":
            save_file(state, path)
            continue
        keys, index = list(state), {}
        for i, some in enumerate((keys[::2], keys[1::2])):
            shard = f"{path.stem}-{i + 1:05d}-of-00002.safetensors"
            save_file({k: state[k] for k in some}, path.with_name(shard))
            index |= {k: shard for k in some}
        path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": index}))
    return expected


@pytest.mark.parametrize("name", NAMES)
def test_loads_what_was_published(name, monkeypatch, tmp_path):
    small(monkeypatch, name)
    expected = publish(tmp_path, name)
    base = bases.load_base(name, tmp_path)
    for part, module in (("net", base.net), ("vae", base.vae), ("text", base.text_encoder)):
        ours = module.state_dict()
        assert ours.keys() == expected[part].keys()
        assert all(torch.equal(ours[k], v) for k, v in expected[part].items() if k != "rope.freqs")
    assert base.encode_text(["a red ball"]).shape == (1, 8, 32)


@pytest.fixture
def picture(tmp_path):
    from PIL import Image
    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "image.png")
    write_video(tmp_path / "tracks.mp4", torch.rand(3, 9, 32, 48) * 2 - 1)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_samples_end_to_end(name, monkeypatch, tmp_path, picture):
    row = small(monkeypatch, name)
    publish(tmp_path / "weights", name)
    args = ["--base", name, "--weights", str(tmp_path / "weights"), "--prompt", "a red ball"]
    if row.first_frame:
        args += ["--image", str(picture / "image.png")]
    if row.tracks:
        args += ["--tracks", str(picture / "tracks.mp4")]
    clips = []
    for options in (["--n", "2"], ["--n", "2", "--batch", "1", "--sequential"]):
        out = tmp_path / f"out{len(clips)}"
        sample.main([*args, *options, "--out", str(out)])
        size = row.sample.height // 8 * 8 if name == "opensora" else row.sample.height
        width = row.sample.width // row.vae.factor * row.vae.factor
        assert video_info(out / "0001.mp4") == (row.sample.frames, row.sample.save_fps,
                                                (size // row.vae.factor * row.vae.factor, width))
        clips.append(data.read_video(out / "0001.mp4")[0])
    # whatever the batch and the order of the branches; the files are 8 bit and compressed
    assert (clips[0] - clips[1]).abs().mean() < 0.02 < clips[0].std()


def test_das_starts_from_i2v(monkeypatch, tmp_path):
    """Diffusion as Shader with CogVideoX-5B-I2V's file: copies of its blocks, linear layers of zeros."""
    small(monkeypatch, "das")
    expected = publish(tmp_path, "das")["net"]
    state = {k: v for k, v in expected.items() if "_copy." not in k and "combine_linear" not in k}
    net = hub.on_meta(dit.CogVideoX, bases.BASES["das"].net)
    started = dit.cogvideox_state(state, net, "file")
    assert started.keys() == expected.keys()
    copied = "transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(started[copied.replace("blocks", "blocks_copy")], state[copied])


def test_conditions_and_sizes(monkeypatch, message, tmp_path, picture):
    for name in NAMES:
        small(monkeypatch, name)
    word = ["--prompt", "a", "--out", str(tmp_path / "out")]
    assert "--image" in message(sample.main, ["--base", "cogvideox-5b-i2v", *word])
    assert "--tracks" in message(
        sample.main, ["--base", "das", "--image", str(picture / "image.png"), *word])
    assert "no such condition" in message(
        sample.main, ["--base", "cogvideox-2b", "--tracks", str(picture / "tracks.mp4"), *word])
    assert "9 or 17" in message(sample.main, ["--base", "cogvideox-2b", "--frames", "12", *word])
    assert "nearest: 32 or 48" in message(
        sample.main, ["--base", "cogvideox-2b", "--height", "40", *word])
    assert "learned positions" in message(
        sample.main, ["--base", "cogvideox-5b-i2v", "--height", "64", "--image",
                      str(picture / "image.png"), *word])
    assert "--size" in message(sample.main, ["--base", "cogvideox-2b", "--size", "2s", *word])
    assert "more than" in message(sample.main, ["--base", "opensora", "--size", "2s,240p,9:16,x", *word])
    assert "--decode-chunk" in message(sample.main, ["--base", "opensora", "--decode-chunk", "0", *word])
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    assert "bad.mp4" in message(  # before anything is loaded: there are no weights
        sample.main, ["--base", "das", "--image", str(picture / "image.png"), "--tracks", str(bad), *word])
    assert "choose from 2s" in message(sample.main, ["--base", "opensora", "--size", "3s", *word])
    assert "--dynamic-cfg" in message(sample.main, ["--base", "opensora", "--dynamic-cfg", "off", *word])
    assert "--fps 8" in message(sample.main, ["--base", "cogvideox-2b", "--fps", "8", *word])
    assert "spiece.model" in message(bases.load_base, "cogvideox-2b", str(tmp_path))


def test_a_files_kind_is_named(monkeypatch, tmp_path, message):
    """The I2V file for the text-to-video network."""
    small(monkeypatch, "cogvideox-5b")
    publish(tmp_path, "cogvideox-5b")
    state = {key: torch.zeros(1) for key in ("patch_embed.x", "transformer_blocks.0.norm1.linear.weight")}
    net = hub.on_meta(dit.CogVideoX, bases.BASES["cogvideox-5b"].net)
    assert "CogVideoX" in message(weights.load_strict, net, state, "cogvideox-5b net")


def test_opensora_vae_renames_both_ways():
    cfg = OpenSoraVAEConfig()
    net = hub.on_meta(vae.OpenSoraVAE, cfg)
    theirs = {opensora_vae_name(k): v for k, v in net.state_dict().items()}
    assert rename(theirs, net, opensora_vae_name, "file").keys() == net.state_dict().keys()


def test_opensora_sizes_by_name():
    args = sample.get_args(["--base", "opensora", "--prompt", "a", "--size", "4s,240p,3:4", "--frames", "51"])
    size = sample.named_size(args, bases.BASES["opensora"])
    assert size == dict(height=276, width=368)  # --frames is given and stays


def test_dynamic_guidance_changes_the_clip(monkeypatch, tmp_path):
    small(monkeypatch, "cogvideox-5b")
    publish(tmp_path / "weights", "cogvideox-5b")
    clips = []
    for rule in ("published", "meant", "off"):
        out = tmp_path / rule
        sample.main(["--base", "cogvideox-5b", "--weights", str(tmp_path / "weights"), "--prompt",
                     "a red ball", "--dynamic-cfg", rule, "--out", str(out)])
        clips.append(data.read_video(out / "0000.mp4")[0])
    assert all((a - b).abs().mean() > 0.005 for a, b in zip(clips, clips[1:] + clips[:1]))


def test_full_size_configs_are_the_published_ones():
    assert isinstance(bases.BASES["cogvideox-5b"].net, CogVideoXConfig)
    assert bases.latent_shape("cogvideox-5b", 49, 480, 720) == (16, 13, 60, 90)
    assert bases.latent_shape("opensora", 51, 240, 426) == (4, 15, 30, 53)
