"""The whole UNet family at small width: public files load as the hubs hold them, and every base samples."""
import json
import sys
import types
from functools import partial
from pathlib import Path

import hub
import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import bases
import diffusion
import pipeline
import sample
import text_encoders
import tracks
from bases import load_base
from data import read_video, video_info, write_video
from models import merge_public_lora, read_peft_lora

PROMPT = ["--prompt", "a fox in the snow"]


def same(net, state):
    """A network holds exactly these tensors."""
    ours = net.state_dict()
    assert ours.keys() == state.keys()
    wrong = [k for k in ours if (ours[k] - state[k]).abs().max() > 1e-5]
    assert not wrong, wrong[:3]


def check_parts(base, expected):
    found = {"net": base.net, "vae": base.vae, "text": base.text_encoder, "image": base.image_encoder,
             "motion_text": base.motion_encoder}
    assert {k for k, v in found.items() if v is not None} == set(expected) | {"text"}
    for part, state in expected.items():
        same(found[part], state)


# ---- public files

@pytest.mark.parametrize("name", hub.PUBLIC)
def test_public_files_load(name, public):
    folder, expected = public(name)
    if bases.BASES[name].net.spatial_adapters:  # in no file of the base: they start as the identity
        base = load_base(name, folder)
        ours = base.net.state_dict()
        assert all(v.abs().max() == 0 for k, v in ours.items() if "up_linear" in k)
        expected = expected | {"net": expected["net"] | {k: ours[k] for k in ours if "_adapter." in k}}
        check_parts(base, expected)
    else:
        check_parts(load_base(name, folder), expected)


def test_folders_named_after_their_repository(monkeypatch, tmp_path):
    hub.small(monkeypatch, "demo")
    expected = hub.publish(tmp_path, "demo", repo_folders=True)
    assert (tmp_path / "DEMO" / "demo.pth").exists()
    check_parts(load_base("demo", tmp_path), expected)


@pytest.mark.parametrize("name", ["modelscope", "i2vgen-xl"])
def test_diffusers_layout(name, monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    row = hub.small(monkeypatch, name)
    expected = hub.publish_diffusers(tmp_path, name)
    base = load_base(name, tmp_path)
    same(base.net, expected["net"])
    same(base.vae, expected["vae"])
    ids = text_encoders.tokenize(["a red ball"])
    import transformers
    peer = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    with torch.no_grad():
        layers = peer(ids, output_hidden_states=True)
        theirs = layers.last_hidden_state
        if row.net.image_to_video:  # all layers are in the file: as its pipeline's clip_skip = 1
            inner = getattr(peer, "text_model", peer)
            theirs = inner.final_layer_norm(layers.hidden_states[-2])
        assert torch.allclose(base.encode_text(["a red ball"]), theirs, atol=1e-5)
        if row.net.image_to_video:
            images = torch.randn(2, 3, 224, 224)
            vision = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "image_encoder")
            assert torch.allclose(base.image_encoder(images), vision.eval()(images).image_embeds, atol=1e-4)


def wrap(state, kind):
    if kind == "deepspeed":
        return {"module": hub.prefixed("_forward_module.", state), "global_steps": 1, "optimizer": None}
    if kind == "ddp":
        return {"state_dict": hub.prefixed("module.", state), "step": torch.tensor(7)}
    return state


@pytest.mark.parametrize("kind", ["deepspeed", "ddp", "bare"])
def test_other_wrappings(kind, public, tmp_path):
    """VideoCrafter2 saved by DeepSpeed, and as a bare dictionary."""
    folder, expected = public("videocrafter2")
    state = torch.load(f"{folder}/model.ckpt", weights_only=True)["state_dict"]
    torch.save(wrap(state, kind), tmp_path / "model.ckpt")
    check_parts(load_base("videocrafter2", tmp_path), expected)


def test_classes_beside_the_tensors_are_left_out(public, tmp_path, monkeypatch):
    """Stable Diffusion's file names a class of Lightning, which need not be installed, nor is it run."""
    folder, expected = public("videocrafter2")
    module = types.ModuleType("lightning_of_old")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "lightning_of_old"})
    monkeypatch.setitem(sys.modules, "lightning_of_old", module)
    state = torch.load(f"{folder}/model.ckpt", weights_only=True)
    callback = module.ModelCheckpoint()
    callback.best = 3
    torch.save(state | {"callbacks": {module.ModelCheckpoint: callback}}, tmp_path / "model.ckpt")
    monkeypatch.delitem(sys.modules, "lightning_of_old")
    check_parts(load_base("videocrafter2", tmp_path), expected)


# ---- public LoRA and adapter files

def test_turbo_list(public, tmp_path):
    folder, expected = public("t2v-turbo")
    row, base = bases.BASES["t2v-turbo"], load_base("t2v-turbo", folder)
    tensors = hub.turbo_lora(row, seed=8)
    torch.save(tensors, tmp_path / "more.pt")
    merge_public_lora(base.net, tmp_path / "more.pt", 0.5)
    same(base.net, hub.with_turbo(expected["net"], tensors, row, 0.5))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_instructvideo(public, tmp_path, scale):
    folder, expected = public("modelscope-v1.4")
    row, base = bases.BASES["modelscope-v1.4"], load_base("modelscope-v1.4", folder)
    tuned = {k: v + 0.1 for k, v in expected["net"].items()}  # the file's own base counts
    file, merged = hub.instructvideo(tuned, row)
    torch.save(file, tmp_path / "tuned.pth")
    merge_public_lora(base.net, tmp_path / "tuned.pth", scale)
    same(base.net, {k: v + scale * (merged[k] - v) for k, v in tuned.items()})


def test_dreamvideo_adapters(public, tmp_path):
    folder, expected = public("dreamvideo")
    base, files = load_base("dreamvideo", folder), []
    for kind in ("spatial", "temporal"):
        files.append(tmp_path / f"{kind}.pth")
        torch.save(hub.adapters(expected["net"], kind), files[-1])
        merge_public_lora(base.net, files[-1])
    same(base.net, expected["net"])


@pytest.mark.parametrize("words, tensors", [
    ("no pair of matrices", {"attn1.to_q.lora_A.weight": (2, 64)}),
    ("no pair of matrices", {"attn1.to_q.lora_A.weight": (2,), "attn1.to_q.lora_B.weight": (64, 2)}),
    ("does not fit", {"attn1.to_q.lora_A.weight": (2, 5), "attn1.to_q.lora_B.weight": (64, 2)}),
    ("does not fit", {"attn1.to_q.lora_A.weight": (2, 64), "attn1.to_q.lora_B.weight": (64, 3)}),
    ("belongs to no layer", {"attn7.to_q.lora_A.weight": (2, 64)}),
    ("others have 3", {"attn1.to_q.lora_A.weight": (2, 64), "attn1.to_q.lora_B.weight": (64, 2),
                       "attn1.to_k.lora_A.weight": (3, 64), "attn1.to_k.lora_B.weight": (64, 3)})])
def test_lora_files_that_do_not_fit(words, tensors, public, tmp_path, message):
    base = load_base("modelscope", public("modelscope")[0])
    block = "middle_block.1.transformer_blocks.0."
    torch.save({block + key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / "lora.pt")
    read = read_peft_lora if "others" in words else merge_public_lora  # ranks may differ to be merged
    assert words in message(read, base.net, tmp_path / "lora.pt")


# ---- sampling, from files to files

@pytest.fixture
def play(monkeypatch, public, tmp_path):
    """play(base, *args) -> (clips before they are written, rows of index.jsonl); the files are looked at."""
    monkeypatch.setattr(pipeline, "sr600", partial(diffusion.sr600, inversion_steps=2))

    def run(name, *args):
        folder, _ = public(name)
        clips, out = {}, tmp_path / f"out-{len(list(tmp_path.iterdir()))}"

        def write(path, video, fps):
            clips[path.name] = video
            write_video(path, video, fps)
        with monkeypatch.context() as m:
            m.setattr(sample, "write_video", write)
            sample.main(["--base", name, "--weights", folder, "--out", str(out), *map(str, args)])
        rows = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
        assert (out / "sheet.png").exists() and [r["file"] for r in rows] == sorted(clips)
        for row in rows:
            frames, fps, size = video_info(out / row["file"])
            assert (frames, *size) == tuple(clips[row["file"]].shape[1:])
            assert fps == row["save_fps"] and row["base"] == name
        return [clips[r["file"]] for r in rows], rows
    return run


def far(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.fixture
def files(tmp_path):
    """Pictures and maps of every kind."""
    rng = np.random.default_rng(0)

    def picture(name, size):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
        return tmp_path / name

    def array(name, *shape):
        np.save(tmp_path / name, rng.random(shape, dtype=np.float32))
        return tmp_path / name
    write_video(tmp_path / "clip.mp4", torch.rand(3, 3, 16, 24) * 2 - 1)
    return {"image": picture("image.png", (40, 30)), "other": picture("other.png", (20, 50)),
            "mask": picture("mask.png", (16, 24)), "depth": array("depth.npy", 3, 16, 24),
            "motion": array("motion.npy", 2, 3, 16, 24), "sketches": array("sketch.npy", 1, 3, 8, 12),
            "video": tmp_path / "clip.mp4"}


# base -> options whose change must be seen in the clip
TEXT_TO_VIDEO = {
    "modelscope": ["--cfg", "3"], "modelscope-v1.4": ["--eta", "1"], "dreamvideo": ["--cfg", "1"],
    "modelscope-v1.5": ["--negative", "rain"], "demo": ["--negative", "rain"],
    "videocrafter2": ["--fps", "4"], "t2v-turbo": ["--cfg", "3"],
    "t2v-turbo-v2": ["--motion-cfg", "0.9"], "tft2v": ["--suffix", ""],
    "tft2v-32": ["--cfg", "3"], "videolcm": ["--sample-steps", "2"], "higen": ["--motion-factor", "50"]}


@pytest.mark.parametrize("name", TEXT_TO_VIDEO)
def test_text_to_video(name, play):
    """A clip is the same in any batch and with the guidance branches one by one; options have an effect."""
    two = ["--prompt", "a fox in the snow", "--n", "2"]
    clips, rows = play(name, *two)
    row = bases.BASES[name]
    assert clips[0].shape == (3, *row.sample.size)
    assert torch.isfinite(clips[0]).all()
    assert clips[0].std() > 0.01 and far(clips[:1], clips[1:]) > 0.01  # two seeds
    assert rows[0]["prompt"] == two[1] and rows[0]["cfg"] == row.sample.cfg
    assert far(clips, play(name, *two, "--batch", "1", "--sequential", "--decode-chunk", "1")[0]) < 1e-4
    assert far(clips, play(name, *two, *TEXT_TO_VIDEO[name])[0]) > 1e-3


def test_image_to_video(play, files, tmp_path):
    prompts = tmp_path / "list.txt"
    prompts.write_text("# image|||caption\nimage.png|||a fox\nother.png|||a dog\n")
    clips, rows = play("i2vgen-xl", "--prompts", prompts)
    assert [r["prompt"] for r in rows] == ["a fox", "a dog"] and rows[1]["image"].endswith("other.png")
    assert clips[0].shape == (3, 3, 16, 24)
    alone = play("i2vgen-xl", "--image", files["image"], "--prompt", "a fox", "--sequential")[0]
    assert far(clips[:1], alone) < 1e-4
    other = play("i2vgen-xl", "--image", files["other"], "--prompt", "a fox")[0]
    assert far(alone, other) > 1e-3
    assert far(alone, play("i2vgen-xl", "--image", files["image"], "--prompt", "a fox", "--fps", 2)[0]) > 1e-4


def test_super_resolution(play, tmp_path):
    source = tmp_path / "clips"
    source.mkdir()
    for i, frames in enumerate((16, 18, 1)):
        write_video(source / f"{i:04d}.mp4", torch.rand(3, frames, 8, 8) * 2 - 1)
    index = [{"file": "0000.mp4"}, {"file": "0001.mp4", "prompt": "a fox"}, {"file": "0002.mp4"}]
    (source / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in index))
    size = ["--height", 8, "--width", 12]
    clips, rows = play("sr600", "--video", source, *size)
    assert [c.shape for c in clips] == [(3, 16, 8, 12), (3, 18, 8, 12), (3, 1, 8, 12)]
    assert [r["prompt"] for r in rows] == ["", "a fox", ""] and rows[1]["video"].endswith("0001.mp4")
    # one clip out of that folder, in other batches, and with words of one's own
    one = play("sr600", "--video", source / "0000.mp4", *size, "--batch", 3, "--sequential")[0]
    assert far(clips[:1], one) < 1e-3
    assert far(one, play("sr600", "--video", source / "0000.mp4", *size, "--prompt", "a dog")[0]) > 1e-4
    (tmp_path / "words.txt").write_text("a\nb\nc\n")
    rows = play("sr600", "--video", source, *size, "--prompts", tmp_path / "words.txt")[1]
    assert [r["prompt"] for r in rows] == ["a", "b", "c"]


def test_videocomposer(play, files):
    plain, _ = play("vcomposer", *PROMPT)
    conditions = {
        "depth": ["--depth", files["depth"]], "sketch": ["--sketch", files["image"]],
        "sketches": ["--sketch", files["sketches"]], "motion": ["--motion-vectors", files["motion"]],
        "style": ["--style-image", files["image"]], "image": ["--image", files["image"]],
        "mask": ["--video", files["video"], "--mask", files["mask"]]}
    for name, args in conditions.items():
        clips, rows = play("vcomposer", *PROMPT, *args)
        assert far(plain, clips) > 1e-3, name
        assert str(args[1]) in rows[0].values()
    everything = [*PROMPT, "--n", 2, *(x for args in conditions.values() for x in args)]
    clips, _ = play("vcomposer", *everything)
    assert far(clips, play("vcomposer", *everything, "--batch", 1, "--sequential")[0]) < 1e-4


def test_depth_of_a_video(play, tmp_path, monkeypatch):
    """--midas: as the maps that one makes oneself, with Pillow's resize, aspect not kept."""
    case = oracles.Case(Path(__file__).parent / "oracle_data" / "tft2v_unet" / "midas_tiny.json")
    state = {key: oracles.fill_tensor(key, shape) for key, shape in case.params.items()}
    state["head.4.weight"] *= 20  # some of it beyond the clamp
    torch.save(state, tmp_path / "midas.pth")
    small = partial(tracks.MiDaS, 32, 4, 4, 16, 64, (8, 16, 32, 32), 16)
    monkeypatch.setattr(tracks, "MiDaS", small)
    write_video(tmp_path / "clip.mp4", F.interpolate(torch.rand(3, 4, 5, 6) * 2 - 1, (64, 80)))
    frames = read_video(tmp_path / "clip.mp4", 3)[0].add(1).mul(127.5).round().byte().permute(1, 2, 3, 0)
    frames = [np.asarray(Image.fromarray(f.numpy()).resize((64, 32), Image.BILINEAR)) for f in frames]
    video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        depth = (small().from_public(state, "test")(video) / 20).clamp(0, 10)
    assert depth.shape == (3, 32, 64) and depth.std() > 0.1 and (depth == 10).any() and (depth < 9).any()
    np.save(tmp_path / "depth.npy", depth)

    size = [*PROMPT, "--height", 32, "--width", 64]
    ours, rows = play("vcomposer", *size, "--depth", tmp_path / "clip.mp4", "--midas", tmp_path / "midas.pth")
    assert rows[0]["depth"].endswith("clip.mp4") and rows[0]["midas"].endswith("midas.pth")
    theirs, _ = play("vcomposer", *size, "--depth", tmp_path / "depth.npy")
    plain, _ = play("vcomposer", *size)
    assert 10 * far(ours, theirs) < far(ours, plain) > 1e-3


def test_appearance_image_and_adapters(play, public, files, tmp_path):
    folder, expected = public("dreamvideo")
    for kind in ("spatial", "temporal"):
        torch.save(hub.adapters(expected["net"], kind), tmp_path / f"{kind}.pth")
    subject, motion = (["--lora", tmp_path / f"{kind}.pth"] for kind in ("spatial", "temporal"))
    short = [*PROMPT, "--frames", 3]
    plain, _ = play("dreamvideo", *short)
    # without adapters the picture changes nothing: they start as the identity
    look = ["--appearance-image", files["image"]]
    assert far(plain, play("dreamvideo", *short, *look)[0]) < 1e-5
    adapted, rows = play("dreamvideo", *short, *subject, *motion)
    assert far(plain, adapted) > 1e-3 and rows[0]["adapters"] == [str(subject[1]), str(motion[1])]
    looking = play("dreamvideo", *short, *subject, *motion, *look)[0]
    assert far(adapted, looking) > 1e-3
    assert far(looking, play("dreamvideo", *short, *subject, *motion, *look, "--sequential")[0]) < 1e-4
    assert far(looking, play("dreamvideo", *short, *subject, *motion, *look, "--strength", 1, 0)[0]) > 1e-4


def test_lora_with_a_scale(play, public, tmp_path):
    folder, expected = public("modelscope-v1.4")
    file, _ = hub.instructvideo(expected["net"], bases.BASES["modelscope-v1.4"])
    torch.save(file, tmp_path / "tuned.pth")
    plain, half, whole = (play("modelscope-v1.4", *PROMPT, *lora)[0] for lora in (
        [], ["--lora", f"{tmp_path / 'tuned.pth'}:0.5"], ["--lora", tmp_path / "tuned.pth"]))
    assert far(plain, half) > 1e-3 and far(half, whole) > 1e-3
    assert far(plain, play("modelscope-v1.4", *PROMPT, "--lora", f"{tmp_path / 'tuned.pth'}:0")[0]) < 1e-5


@pytest.mark.parametrize("name", ["i2vgen-xl", "higen", "sr600", "vcomposer", "t2v-turbo-v2", "dreamvideo"])
def test_half_precision(name, play, files):
    """Conditions meet half-precision weights under autocast."""
    args = {"i2vgen-xl": [*PROMPT, "--image", files["image"]],
            "sr600": ["--video", files["video"], "--height", 8, "--width", 8],
            "vcomposer": [*PROMPT, "--depth", files["depth"], "--style-image", files["image"]],
            "dreamvideo": [*PROMPT, "--frames", 3, "--appearance-image", files["image"]]}.get(name, PROMPT)
    clips, _ = play(name, *args, "--dtype", "bf16", "--sample-steps", 1)
    assert torch.isfinite(clips[0]).all() and clips[0].std() > 0.01


def test_every_base_is_sampled_here():
    elsewhere = {"vcomposer-hd"}  # tests/test_conditions.py
    assert {"i2vgen-xl", "sr600", "vcomposer", *elsewhere, *TEXT_TO_VIDEO} == set(hub.PUBLIC)
