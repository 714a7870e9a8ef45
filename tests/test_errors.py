"""Bad input: one line that names the thing and the remedy, before any long work; the exit code is not 0."""
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import bases
import rewards
import sample
import t2v
import vader
from bases import load_base
from data import write_video
from models import UNet3D, unet_diffusers_name
from weights import load_checkpoint

ROOT = Path(__file__).parent.parent


def vader_error(message, *args):
    return message(vader.main, ["--base", "tiny", *args])


def test_unknown_names_list_the_choices(message, tmp_path):
    out = ["--out", str(tmp_path)]
    assert ", ".join(bases.BASES) in message(sample.main, ["--base", "nope", "--prompt", "a"])
    prompts = str(prompt_file(tmp_path))
    assert ", ".join(bases.BASES) in message(vader.main, ["--base", "nope", "--prompts", prompts, *out])
    assert "it runs on tiny, tiny-clean, tiny-i2v" in message(vader.main, ["--base", "das", "--prompts", prompts, *out])
    text = vader_error(message, "--reward", "nope", *out)
    assert "brightness" in text and "my_file.py:function" in text
    assert "no such reward file" in vader_error(message, "--reward", "nope.py:fn", *out)
    assert "last-K" in vader_error(message, "--backprop", "first", *out)
    assert "1..5" in vader_error(message, "--backprop", "last-11", *out)
    assert "0..7" in vader_error(message, "--decode", "8", *out)
    assert "--decode all" in vader_error(message, "--decode", "0", *out)
    assert "to_out.0" in vader_error(message, "--lora-targets", "to_nothing", *out)
    assert not (tmp_path / "log.jsonl").exists()


def prompt_file(folder, text="a cat\n"):
    (folder / "prompts.txt").write_text(text)
    return folder / "prompts.txt"


def test_data_root_needs_a_list(message, tmp_path):
    root = ["--base", "tiny", "--data-root", str(tmp_path), "--out", str(tmp_path)]
    assert "give --data" in message(t2v.main, root)
    assert "give --prompts" in message(sample.main, [*root, "--prompt", "a red circle"])


def test_prompts(message, tmp_path):
    assert "nowhere.txt" in vader_error(message, "--prompts", "nowhere.txt", "--out", str(tmp_path))
    empty = str(prompt_file(tmp_path, "# only a comment\n"))
    assert "prompts.txt" in vader_error(message, "--prompts", empty, "--out", str(tmp_path))
    text = message(sample.main, ["--base", "tiny", "--prompt", "a red dragon", "--out", str(tmp_path)])
    assert "dragon" in text and "triangle" in text
    assert "--prompt" in message(sample.main, ["--base", "tiny"])
    assert "--prompts" in message(vader.main, ["--base", "i2vgen-xl"])
    assert "--data" in message(t2v.main, ["--base", "modelscope"])


@pytest.mark.parametrize("flag,size,hint", [
    ("--height", "30", "24 or 32"), ("--width", "40", "at most 32"),
    ("--frames", "9", "1 to 8"), ("--frames", "0", "1 or more")])
def test_sizes_name_the_nearest_that_fit(flag, size, hint, message, tmp_path):
    args = ["--base", "tiny", "--prompt", "a red circle", flag, size, "--out", str(tmp_path)]
    assert hint in message(sample.main, args)


def test_checkpoints(message, tmp_path):
    assert "--out folder" in message(sample.main, ["--ckpt", str(tmp_path), "--prompt", "a"])
    file = tmp_path / "ckpt.safetensors"
    save_file({"down_blocks.0.weight": torch.zeros(1)}, file)
    assert "diffusers" in message(load_checkpoint, tmp_path)
    file.write_bytes(file.read_bytes()[:-3])
    assert "not a whole safetensors file" in message(sample.main, ["--ckpt", str(tmp_path), "--prompt", "a"])


def test_public_weights(message, tmp_path, monkeypatch):
    weights = ["--weights", str(tmp_path)]
    text = message(sample.main, ["--base", "modelscope", "--prompt", "a cat", "--weights", "nowhere"])
    assert "nowhere" in text
    text = message(sample.main, ["--base", "modelscope", "--prompt", "a cat", *weights])
    assert "text2video_pytorch_model.pth" in text and "VQGAN_autoencoder.pth" in text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = message(sample.main, ["--base", "modelscope", "--prompt", "a cat"])
    assert "ali-vilab/modelscope-damo-text-to-video-synthesis" in text and "--weights" in text

    # files of the right names that hold the wrong things
    for name in ("text2video_pytorch_model.pth", "VQGAN_autoencoder.pth", "open_clip_pytorch_model.bin"):
        torch.save({"state_dict": {"local_image_concat.0.weight": torch.zeros(1)}}, tmp_path / name)
    assert "I2VGen-XL" in message(load_base, "modelscope", tmp_path)
    (tmp_path / "text2video_pytorch_model.pth").write_bytes(b"PK\x03\x04 cut off")
    assert "fetch it again" in message(load_base, "modelscope", tmp_path)


# base, the part whose file is wrong, base whose file it is in truth, that file's name, what the message says
WRONG = [
    ("modelscope", "net", "videocrafter2", "model.ckpt", "VideoCrafter2"),
    ("modelscope", "net", "i2vgen-xl", "i2vgen_xl_00854500.pth", "I2VGen-XL"),
    ("modelscope", "net", "higen", "cvpr2024.t2v.e003.non_ema_0725000.pth", "HiGen"),
    ("modelscope", "net", "demo", "demo.pth", "DEMO"),
    ("modelscope", "net", "t2v-turbo", "unet_lora.pt", "T2V-Turbo's LoRA"),
    ("modelscope", "net", "modelscope", "VQGAN_autoencoder.pth", "Stable Diffusion"),
    ("modelscope", "net", "modelscope", "open_clip_pytorch_model.bin", "OpenCLIP"),
    ("modelscope", "vae", "modelscope", "open_clip_pytorch_model.bin", "OpenCLIP"),
    ("modelscope", "text", "modelscope", "text2video_pytorch_model.pth", "ModelScope UNet"),
    ("dreamvideo", "net", "videocrafter2", "model.ckpt", "VideoCrafter2"),
    ("dreamvideo", "net", "higen", "cvpr2024.t2v.e003.non_ema_0725000.pth", "HiGen"),
    ("dreamvideo", "image", "demo", "motion_encoder.pth", "OpenCLIP"),
    ("demo", "net", "modelscope", "text2video_pytorch_model.pth", "ModelScope UNet"),
    ("videocrafter2", "net", "modelscope", "text2video_pytorch_model.pth", "ModelScope UNet"),
    ("t2v-turbo", "lora", "modelscope", "text2video_pytorch_model.pth", "ModelScope UNet"),
    ("t2v-turbo-v2", "net", "videocrafter2", "model.ckpt", "VideoCrafter2"),
    ("videolcm", "net", "modelscope-v1.5", "model_scope_v1-5_0632000.pth", "another shape")]


@pytest.mark.parametrize("base, part, other, file, words", WRONG)
def test_a_wrong_file_is_named(base, part, other, file, words, message, public, tmp_path):
    folder, wrong = Path(public(base)[0]), Path(public(other)[0], file)
    name = bases.BASES[base].files["original"][part].split(":", 2)[2]
    for right in folder.iterdir():
        (tmp_path / right.name).symlink_to(wrong if right.name == name else right)
    text = message(load_base, base, tmp_path)
    assert words in text and (name in text or f"{base} {part}" in text), text


def test_wrong_diffusers_file(message, monkeypatch, tmp_path):
    """An SD autoencoder in the place of the network, and a file of another shape."""
    hub.small(monkeypatch, "modelscope")
    vae = {"encoder.down_blocks.0.resnets.0.conv1.bias": torch.zeros(3)}
    for file in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        (tmp_path / file).parent.mkdir()
        save_file(vae, f"{tmp_path / file}.safetensors")
    assert "an SD autoencoder" in message(load_base, "modelscope", tmp_path)
    net = hub.on_meta(UNet3D, bases.BASES["modelscope"].net)
    state = {unet_diffusers_name(k, 1): torch.zeros(2, 2) for k in net.state_dict()}
    save_file(state, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert "of another shape" in message(load_base, "modelscope", tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "vae/diffusion_pytorch_model.safetensors is missing" in message(load_base, "modelscope", tmp_path)


def test_missing_files(message, public, tmp_path):
    for file in Path(public("demo")[0]).iterdir():
        if file.name != "motion_encoder.pth":
            (tmp_path / file.name).symlink_to(file)
    text = message(load_base, "demo", tmp_path)
    assert "motion_encoder.pth is missing for demo" in text
    assert "folder that holds demo.pth" in message(load_base, "demo", tmp_path / "demo.pth")
    assert "assets/" in message(load_base, "tiny", tmp_path)


def picture(folder, name="a.png"):
    Image.new("RGB", (20, 20)).save(folder / name)
    return str(folder / name)


@pytest.mark.parametrize("base, flags, words", [
    ("modelscope", ["--image", "PICTURE"], "words alone"),
    ("i2vgen-xl", ["--depth", "PICTURE"], "it takes --image"),
    ("i2vgen-xl", [], "give --image FILE"),
    ("i2vgen-xl", ["--image", "nowhere.png"], "nowhere.png: no such file"),
    ("i2vgen-xl", ["--image", "BROKEN"], "not a readable picture"),
    ("sr600", [], "--video"),
    ("sr600", ["--video", "BROKEN"], "cannot be decoded"),
    ("sr600", ["--video", "PICTURE", "--height", "704"], "nearest: 656 or 720"),
    ("sr600", ["--video", "PICTURE", "--width", "1000"], "960 or 1024"),
    ("higen", ["--frames", "16"], "32 frames"),
    ("modelscope", ["--height", "260"], "nearest: 256 or 320"),
    ("modelscope", ["--fps", "8"], "no frame rate"),
    ("modelscope", ["--motion-factor", "8"], "--motion-factor"),
    ("modelscope", ["--sampler", "higen"], "sampled by ddim"),
    ("sr600", ["--video", "PICTURE", "--sampler", "ddim"], "sampled by sr600"),
    ("vcomposer", ["--mask", "PICTURE"], "belong together"),
    ("vcomposer", ["--image", "BROKEN"], "not a readable picture"),
    ("vcomposer", ["--depth", "ARRAY"], "5 frame(s) instead of 16"),
    ("vcomposer", ["--motion-vectors", "ARRAY"], "expected 2 channel(s)"),
    ("vcomposer", ["--motion-vectors", "OBJECTS"], "not of numbers"),
    ("vcomposer", ["--midas", "PICTURE"], "estimate with --depth"),
    ("vcomposer", ["--midas", "nowhere.pth", "--depth", "ARRAY"], "nowhere.pth: no such file"),
    ("vcomposer", ["--midas", "PICTURE", "--depth", "ARRAY"], "array.npy"),
    ("tft2v", ["--midas", "PICTURE"], "words alone"),
    ("tft2v", ["--style-image", "PICTURE"], "words alone"),
    ("dreamvideo", ["--image", "PICTURE"], "--appearance-image"),
    ("modelscope", ["--lora", "nowhere.pth:0.5"], "nowhere.pth: no such file")])
def test_conditions(base, flags, words, message, tmp_path):
    """Refused before anything is loaded: there are no weights here."""
    for name in ("broken.png", "broken.mp4"):
        (tmp_path / name).write_bytes(b"no such thing")
    np.save(tmp_path / "array.npy", np.zeros((5, 8, 8), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    given = {"PICTURE": picture(tmp_path), "ARRAY": str(tmp_path / "array.npy"),
             "OBJECTS": str(tmp_path / "objects.npy"),
             "BROKEN": str(tmp_path / ("broken.mp4" if base == "sr600" else "broken.png"))}
    text = message(sample.main, ["--base", base, "--prompt", "a", *(given.get(f, f) for f in flags)])
    assert words in text, text


def test_wrong_file_of_midas(message, tmp_path):
    clip, weights = tmp_path / "clip.mp4", tmp_path / "midas.pth"
    write_video(clip, torch.zeros(3, 16, 16, 16))
    call = partial(message, sample.main, ["--base", "vcomposer", "--prompt", "a", "--depth", str(clip),
                                          "--midas", str(weights), "--device", "cpu"])
    torch.save({"temopral_conv.weight": torch.zeros(1)}, weights)
    text = call()
    assert "midas.pth" in text and "a VGen or ModelScope UNet" in text
    weights.write_bytes(b"no such thing")
    assert "fetch it again" in call()


def test_words(message, tmp_path):
    assert "--prompt" in message(sample.main, ["--base", "modelscope"])
    assert "only one" in message(sample.main, ["--base", "tiny", "--prompt", "a", "--judge", "3"])
    assert "tiny world" in message(sample.main, ["--base", "modelscope", "--judge", "3"])
    array = str(tmp_path / "a.npy")
    np.save(array, np.zeros((16, 8, 8), np.float32))
    assert "--prompt" in message(sample.main, ["--base", "vcomposer", "--depth", array])
    prompts = str(prompt_file(tmp_path, "nowhere.png|||a cat\n"))
    assert "row 1" in message(sample.main, ["--base", "i2vgen-xl", "--prompts", prompts])
    write_video(tmp_path / "clip.mp4", torch.zeros(3, 2, 16, 16))
    assert "2 prompts for 1 clips" in message(sample.main, [
        "--base", "sr600", "--video", str(tmp_path), "--prompts", str(prompt_file(tmp_path, "a\nb\n"))])


def test_lora_files(message, public, tmp_path):
    names = ("modelscope", "dreamvideo", "t2v-turbo")
    plain, dream, turbo = (load_base(name, public(name)[0]) for name in names)
    lora, adapter = tmp_path / "lora.pt", tmp_path / "adapter.pth"
    torch.save(hub.turbo_lora(bases.BASES["t2v-turbo"])[:-2], lora)
    torch.save(hub.adapters(dream.net.state_dict(), "temporal"), adapter)
    merge = bases.merge_public_lora
    assert "a list of" in message(merge, turbo.net, lora)
    assert "no scale" in message(merge, dream.net, adapter, 0.5)
    assert "--base dreamvideo" in message(merge, plain.net, adapter)
    torch.save({"x.lora_up.weight": torch.zeros(1)}, lora)
    assert "a LoRA file" in message(merge, plain.net, lora)
    torch.save(hub.instructvideo(plain.net.state_dict(), bases.BASES["modelscope"])[0], lora)
    assert "ModelScope UNet): " in message(merge, dream.net, lora)


def test_a_run_is_not_overwritten_nor_resumed_as_another(message, tmp_path):
    args = ["--base", "tiny", "--batch", "1", "--steps", "1", "--sample-steps", "2", "--eval-n", "1",
            "--out", str(tmp_path)]
    vader.main(args)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert "--resume" in message(vader.main, args)
    assert "rank" in message(vader.main, [*args, "--resume", "--rank", "3"])
    assert "method" in message(t2v.main, ["--base", "tiny", "--out", str(tmp_path), "--resume"])
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_a_reward_that_breaks_the_contract(message, tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    assert "no function fn" in message(rewards.get_reward, f"{tmp_path / 'mine.py'}:fn", "cpu")
    assert "--base tiny" in message(rewards.get_reward("tiny", "cpu"), torch.zeros(1, 3, 4, 32, 32), ["a"])


def test_exit_code_and_one_line_on_the_screen():
    for line in (["sample.py", "--base", "nope", "--prompt", "a"],
                 ["sample.py", "--ckpt", "nowhere", "--prompt", "a"],
                 ["vader.py", "--base", "tiny", "--reward", "nope"],
                 ["bases.py", "--download", "nope"]):
        done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_not_finite_steps_are_skipped_and_then_stop(message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def bad(frames, prompts):\n    return frames.mean((1, 2, 3)) / 0 * float('nan')\n")
    args = ["--base", "tiny", "--batch", "1", "--steps", "20", "--sample-steps", "2", "--eval-n", "1",
            "--reward", f"{tmp_path / 'mine.py'}:bad"]
    assert "reward was not finite" in message(vader.main, [*args, "--out", str(tmp_path / "run")])
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 9
    assert all("reward" in json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines())


def test_the_table_prints(capsys):
    bases.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["base", *bases.BASES]
    words = next(line for line in lines if line.startswith("modelscope ")).split()
    assert words[1:3] == ["1411.2", "M"] and {"t2v", "vader", "demo"} <= set(words[3:])


def test_download(message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = message(bases.main, ["--download", "videocrafter2"])
    assert "model.ckpt of huggingface.co repository VideoCrafter/VideoCrafter2" in text
    assert "--weights" in text
    bases.main(["--download", "tiny"])
    assert "nothing to download" in capsys.readouterr().out
    fetched = []
    monkeypatch.setattr(bases, "fetch", lambda url, name: fetched.append(url) or __file__)
    bases.main(["--download", "videocrafter2"])
    assert fetched == [bases.VC2]  # one file for three parts
