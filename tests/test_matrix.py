"""Methods on transformers: every cell of the table's matrix for two steps at a small width, with a resume."""
import importlib
import json

import pytest
import test_transformers
import test_wan_bases
import torch
from PIL import Image
from runs import same_training

import bases
from data import write_video
from dit import WanConfig
from models import UNetConfig

CELLS = [(name, method) for name, row in bases.BASES.items() for method in row.methods
         if row.files and not isinstance(row.net, UNetConfig) and method in ("t2v", "vader", "videodpo")]


def small(monkeypatch, folder, name):
    """A base's small networks, published into `folder`. -> its row"""
    if isinstance(bases.BASES[name].net, WanConfig):
        row = test_wan_bases.small(monkeypatch, name)
        test_wan_bases.publish(folder, name, "original")
    else:
        row = test_transformers.small(monkeypatch, name)
        test_transformers.publish(folder, name)
    return row


def inputs(method, row, folder):
    """Clips, pairs or prompts for a method -> its options."""
    folder.mkdir()
    frames, size = row.sample.frames, row.sample.size[1:]
    Image.new("RGB", (96, 64), (200, 30, 30)).save(folder / "image.png")
    line = f"{folder}/image.png|||a red ball" if row.first_frame else "a red ball"
    (folder / "prompts.txt").write_text(f"{line}\n")
    if method == "vader":
        (folder / "reward.py").write_text("def bright(videos, prompts):\n    return videos.flatten(1).mean(1)\n")
        return ["--prompts", str(folder / "prompts.txt"), "--reward", f"{folder}/reward.py:bright", "--sweep", "0"]
    for k in range(2):
        write_video(folder / f"{k}.mp4", torch.rand(3, frames, *size) * 2 - 1)
    if method == "videodpo":
        rows = [{"basic": {"clip_duration": 1.0, "clip_path": f"{k}.mp4", "globalidx": k},
                 "misc": {"frame_caption": ["a red ball"]}} for k in range(2)]
        (folder / "metadata.json").write_text(json.dumps(rows))
        pair = dict(video1=0, video2=1, label=0, frame_caption=["a red ball"], score=0.5, diff_score=0.1)
        (folder / "pair.json").write_text(json.dumps([pair]))
        return ["--pairs", str(folder), "--rank", "4"]
    (folder / "clips.csv").write_text("path,caption\n0.mp4,a red ball\n1.mp4,two blue squares\n")
    keep = ["--keep-first", "0.5"] if row.keeps_first else []
    return ["--data", str(folder / "clips.csv"), "--workers", "0", *keep]


# one cell of each kind of network by default
QUICK = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "opensora", "cogvideox-2b"


@pytest.mark.parametrize("name, method", [
    pytest.param(*cell, marks=[] if cell[0] in QUICK else [pytest.mark.slow]) for cell in CELLS])
def test_two_steps_and_a_resume(name, method, monkeypatch, tmp_path):
    row = small(monkeypatch, tmp_path / "weights", name)
    options = ["--base", name, "--weights", str(tmp_path / "weights"), *inputs(method, row, tmp_path / "in"),
               "--batch", "1", "--accum", "1", "--warmup", "0", "--dtype", "fp32", "--device", "cpu", "--lr", "1e-3",
               "--eval-n", "1", "--preview-every", "0", "--save-every", "1"]
    for flag, value in zip(("frames", "height", "width"), row.sample.size):  # presets have larger ones
        options += [f"--{flag}", str(value)]
    options += ["--sample-steps", "2"] if method != "t2v" else []
    train = importlib.import_module(method).main
    train([*options, "--steps", "2", "--out", str(tmp_path / "whole")])
    train([*options, "--steps", "1", "--out", str(tmp_path / "parts")])
    train([*options, "--steps", "2", "--out", str(tmp_path / "parts"), "--resume"])
    assert same_training(tmp_path / "whole", tmp_path / "parts")
    first, second = ([json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()])
    assert first["grad"] > 0 and second["loss" if method != "vader" else "reward"] != 0
