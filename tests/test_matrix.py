"""Any method on any base: every cell of the table's matrix for two steps at a small width, with a resume."""
import importlib
import json

import hub
import pytest
import test_transformers
import test_wan_bases
import torch
from PIL import Image
from runs import same_training

import bases
from data import write_video
from dit import CogVideoXConfig, STDiT3Config, WanConfig

CELLS = [(name, method) for name, row in bases.BASES.items() for method in row.methods]
CAPTION = "a red circle moving left"
BY_REWARD = "vader", "grpo", "instructvideo"


def small(monkeypatch, public, folder, name):
    """A base's small networks, published into a folder. -> its row, options of load_base()"""
    if bases.BASES[name].tiny:
        return bases.BASES[name], []
    if name in hub.PUBLIC:
        folder = public(name)[0]
    elif isinstance(bases.BASES[name].net, WanConfig):
        test_wan_bases.small(monkeypatch, name)
        test_wan_bases.publish(folder, name, "original")
    else:
        test_transformers.small(monkeypatch, name)
        test_transformers.publish(folder, name)
    return bases.BASES[name], ["--weights", str(folder)]


def write_inputs(row, folder):
    """Two clips with tracks, a pair, pictures, a file of prompts and a reward."""
    frames, h, w = row.sample.size
    lines = ["path,tracking,caption"]
    for k in range(2):
        for kind in ("clip", "tracks"):
            write_video(folder / f"{kind}{k}.mp4", torch.rand(3, frames + 3, max(h, 16), max(w, 16)) * 2 - 1)
        lines.append(f"clip{k}.mp4,tracks{k}.mp4,{CAPTION}")
        (folder / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (96, 64), (200, 30, 30 * k)).save(folder / f"pictures/{k}.png")
    (folder / "clips.csv").write_text("\n".join(lines))
    line = f"{folder}/pictures/0.png|||{CAPTION}" if row.first_frame else CAPTION
    (folder / "prompts.txt").write_text(f"{line}\n")
    (folder / "reward.py").write_text("def bright(videos, prompts):\n    return videos.flatten(1).mean(1)\n")
    rows = [{"basic": {"clip_duration": 1.0, "clip_path": f"clip{k}.mp4", "globalidx": k},
             "misc": {"frame_caption": [CAPTION]}} for k in range(2)]
    (folder / "metadata.json").write_text(json.dumps(rows))
    pair = dict(video1=0, video2=1, label=0, frame_caption=[CAPTION], score=0.5, diff_score=0.1)
    (folder / "pair.json").write_text(json.dumps([pair]))


def options_of(method, row, folder):
    """What a method needs for two steps on a base."""
    write_inputs(row, folder)
    clips = ["--data", str(folder / "clips.csv"), "--workers", "0", "--read-fps", "8", "--no-cache-latents"]
    prompts, reward = ["--prompts", str(folder / "prompts.txt")], ["--reward", f"{folder}/reward.py:bright"]
    return {
        "vader": [*prompts, *reward, "--sweep", "0"],
        "grpo": [*prompts, *reward, "--rank", "4", "--group", "2", "--accum", "2", "--updates", "1", "--sample-steps", "3"],
        "instructvideo": [*clips[:-1], *reward, "--segments", "2", "--sample-steps", "3"],
        "videodpo": ["--pairs", str(folder), "--rank", "4"],
        "dreamvideo": ["--data", str(folder / "pictures"), "--workers", "0", "--no-masked-loss"],
        "demo": [*clips, "--text-motion", "0", "--regularization", "0", "--encoder-from", "1"],
        "das": [*clips[:4], "--tracking-blocks", "2"] + ["--no-cache-latents"],
        "t2v": [*clips, *(["--keep-first", "0.5"] if row.keeps_first else [])],
    }.get(method, clips)


# run by default, with one base of each kind of network; the other tests of the methods are on UNets
QUICK = ["opensora-videodpo", "opensora-instructvideo", "opensora-videolcm", "cogvideox-2b-vader",
         "tiny-wan-instructvideo", "wan2.2-ti2v-5b-t2v", "wan2.2-ti2v-5b-i2vgen", "wan2.1-i2v-14b-480p-vader",
         "wan2.1-i2v-14b-480p-i2vgen", *(f"wan2.1-t2v-1.3b-{m}" for m in ("t2v", "vader", "instructvideo", "videolcm"))]


@pytest.mark.parametrize("name, method", [
    pytest.param(*cell, marks=[] if "-".join(cell) in QUICK else [pytest.mark.slow]) for cell in CELLS])
def test_two_steps_and_a_resume(name, method, monkeypatch, public, tmp_path):
    row, weights = small(monkeypatch, public, tmp_path / "weights", name)
    options = ["--base", name, *weights, "--batch", "1", "--accum", "1", "--warmup", "0", "--dtype", "fp32",
               "--device", "cpu", "--lr", "1e-3", "--eval-n", "1", "--preview-every", "0", "--save-every", "1",
               "--sample-steps", "2"]
    for flag, value in zip(("frames", "height", "width"), row.sample.size):  # presets have larger ones
        options += [f"--{flag}", str(value)]
    options += options_of(method, row, tmp_path)
    train = importlib.import_module(method).main
    train([*options, "--steps", "2", "--out", str(tmp_path / "whole")])
    train([*options, "--steps", "1", "--out", str(tmp_path / "parts")])
    train([*options, "--steps", "2", "--out", str(tmp_path / "parts"), "--resume"])
    assert same_training(tmp_path / "whole", tmp_path / "parts")
    first, second = ([json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()])
    assert first["grad"] > 0 and second["reward" if method in BY_REWARD else "loss"] != 0


def test_what_is_left_out():
    """Text to video trains by each method for any such network, but for distilled and two-pass ones."""
    text = {"t2v", "videolcm", "vader", "grpo", "instructvideo", "videodpo"}
    for name, row in bases.BASES.items():
        if row.two_experts:
            assert not row.methods
        elif not isinstance(row.net, WanConfig | STDiT3Config | CogVideoXConfig):
            continue
        elif row.first_frame:
            assert set(row.methods) >= {"i2vgen", "vader", "grpo"} or name == "das"
        else:
            assert set(row.methods) >= text
