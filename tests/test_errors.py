"""Bad input: one line that names the thing and the remedy, before any long work; the exit code is not 0."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bases
import rewards
import sample
import t2v
import vader
from bases import load_base
from common import load_checkpoint

ROOT = Path(__file__).parent.parent


def vader_error(message, *args):
    return message(vader.main, ["--base", "tiny", *args])


def test_unknown_names_list_the_choices(message, tmp_path):
    out = ["--out", str(tmp_path)]
    assert "tiny, modelscope" in message(sample.main, ["--base", "nope", "--prompt", "a"])
    prompts = str(prompt_file(tmp_path))
    assert "tiny, modelscope" in message(vader.main, ["--base", "nope", "--prompts", prompts, *out])
    text = vader_error(message, "--reward", "nope", *out)
    assert "brightness" in text and "my_file.py:function" in text
    assert "no file" in vader_error(message, "--reward", "nope.py:fn", *out)
    assert "last-K" in vader_error(message, "--backprop", "first", *out)
    assert "1..10" in vader_error(message, "--backprop", "last-11", *out)
    assert "0..7" in vader_error(message, "--decode", "8", *out)
    assert "--decode all" in vader_error(message, "--decode", "0", *out)
    assert "to_out.0" in vader_error(message, "--lora-targets", "to_nothing", *out)
    assert not (tmp_path / "log.jsonl").exists()


def prompt_file(folder, text="a cat\n"):
    (folder / "prompts.txt").write_text(text)
    return folder / "prompts.txt"


def test_prompts(message, tmp_path):
    assert "nowhere.txt" in vader_error(message, "--prompts", "nowhere.txt", "--out", str(tmp_path))
    empty = str(prompt_file(tmp_path, "# only a comment\n"))
    assert "prompts.txt" in vader_error(message, "--prompts", empty, "--out", str(tmp_path))
    text = message(sample.main, ["--base", "tiny", "--prompt", "a red dragon", "--out", str(tmp_path)])
    assert "dragon" in text and "triangle" in text
    assert "--prompt" in message(sample.main, ["--base", "tiny"])
    assert "--prompts" in message(vader.main, ["--base", "modelscope"])
    assert "--data" in message(t2v.main, ["--base", "modelscope"])


@pytest.mark.parametrize("flag,size,hint", [
    ("--height", "30", "24 or 32"), ("--width", "40", "at most 32"),
    ("--frames", "9", "1 to 8"), ("--frames", "0", "1 to 8")])
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
        torch.save({"state_dict": {"local_image_embedding.0.weight": torch.zeros(1)}}, tmp_path / name)
    assert "I2VGen-XL" in message(load_base, "modelscope", tmp_path)
    (tmp_path / "text2video_pytorch_model.pth").write_bytes(b"PK\x03\x04 cut off")
    assert "fetch it again" in message(load_base, "modelscope", tmp_path)


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
    assert "modelscope" in capsys.readouterr().out
