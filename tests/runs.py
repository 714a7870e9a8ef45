"""What tests of whole runs share: a run's files, and a kill in an evaluation. No tests here."""
from argparse import Namespace

import pytest
import test_transformers
import torch
from PIL import Image
from safetensors.torch import load_file

import bases
from common import STATES, load_state_file, read_lines


def spread(mode, shard_group=None):
    """The options that models.parallelize() reads."""
    return Namespace(parallel=mode, offload=False, compile=False, shard_group=shard_group)


def read_state(folder):
    """What a run goes on from, whole: of its file or of its shards."""
    state = load_state_file(next(folder / name for name in STATES if (folder / name).exists()))

    def whole(values):
        return values and {k: whole(v) if isinstance(v, dict) else v[...] for k, v in values.items()}
    return state | {part: whole(state[part]) for part in ("weights", "moments", "ema")}


def files(folder, *kinds):
    """{name: content} of the files of these kinds in a run's folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.suffix in kinds and p.name != "curve.png"}


def same_training(a, b):
    """Are weights and log of two runs the same, bit for bit?"""
    tensors = [load_file(d / "ckpt.safetensors") for d in (a, b)]
    logs = [[row | {"seconds": 0} for row in read_lines(d / "log.jsonl")] for d in (a, b)]
    equal = all(torch.equal(v, tensors[1][k]) for k, v in tensors[0].items())
    return equal and tensors[0].keys() == tensors[1].keys() and logs[0] == logs[1]


def on_small_base(method, name, public, monkeypatch, folder):
    """The arguments of a run on the small network of a base with public file names, with one prompt (and first
    frame). A method's preset for the base keeps to the small size."""
    if name in test_transformers.NAMES:
        test_transformers.small(monkeypatch, name)
        weights = folder / "weights"
        test_transformers.publish(weights, name)
    else:
        weights, _ = public(name)
    row = bases.BASES[name]
    size = dict(zip(("frames", "height", "width"), row.sample.size))
    monkeypatch.setitem(method.PRESETS, name, method.PRESETS.get(name, {}) | size)
    Image.new("RGB", (30, 20), (9, 99, 9)).save(folder / "first.png")
    first = f"{folder / 'first.png'}|||" if row.first_frame else ""
    (folder / "prompts.txt").write_text(f"{first}a red ball\n")
    return ["--base", name, "--weights", str(weights), "--prompts", str(folder / "prompts.txt")]


class Killed(Exception):
    pass


def check_kill_in_evaluation(method, train, when, tmp_path, monkeypatch):
    """A run of three updates, killed in `when`, one of its evaluations, and resumed, is the same run.

    method: module with evaluate(); train(folder, steps, *options) runs it. when: "step-2" or "after".
    """
    more = ["--preview-every", "2", "--save-every", "2"]
    train(tmp_path / "whole", 3, *more)
    evaluate = method.evaluate

    def killed(*args):
        if args[-1] == when:
            raise Killed
        evaluate(*args)
    with monkeypatch.context() as patch:
        patch.setattr(method, "evaluate", killed)
        with pytest.raises(Killed):
            train(tmp_path / "parts", 3, *more)
    assert not (tmp_path / "parts" / "after.png").exists()
    train(tmp_path / "parts", 3, *more, "--resume")
    assert same_training(tmp_path / "whole", tmp_path / "parts")
    assert len(read_lines(tmp_path / "whole" / "log.jsonl")) == 3
    whole, parts = (files(tmp_path / d, ".png", ".mp4") for d in ("whole", "parts"))
    assert parts == {k: v for k, v in whole.items() if when == "after" or not k.startswith("step-2")}
