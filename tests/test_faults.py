"""Faults found while the first design was read; each has its test here or, if it is of one method, with that method."""
import argparse
import json
import sys
import types

import numpy as np
import pytest
import torch

import common
import diffusion
import sample
from common import Log, UserError, using_average
from data import list_clips, read_video
from diffusion import higen, make_schedule, randn

TINY = ["--base", "tiny", "--sample-steps", "2"]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def test_vbench_names_and_scores_go_together(tmp_path):
    """The clips that were written are scored, not 0000.mp4 of another run."""
    (tmp_path / "prompts.txt").write_text("a red circle moving left\na blue square growing\n")
    words = [*TINY, "--prompts", str(tmp_path / "prompts.txt"), "--reward", "size"]
    sample.main([*words, "--vbench", "--out", str(tmp_path / "named")])
    sample.main([*words, "--out", str(tmp_path / "numbered")])
    named, numbered = rows_of(tmp_path / "named"), rows_of(tmp_path / "numbered")
    assert [row["file"] for row in named] == ["a red circle moving left-0.mp4", "a blue square growing-0.mp4"]
    assert [row["scores"] for row in named] == [row["scores"] for row in numbered]
    assert len({row["scores"]["size"] for row in named}) == 2


def toy(x, t, text, image_prior=None, motion_factor=None, appearance_factor=None):
    """A network that mixes what it is given, each sample for itself."""
    bias = text.mean((1, 2)).view(-1, 1, 1, 1, 1) + 0.01 * t.view(-1, 1, 1, 1, 1)
    return torch.sin(x + bias + image_prior[:, :, None])


def test_higen_draws_each_clip_from_its_own_generator():
    schedule, shape = make_schedule("linear_sd", "v", zero_snr=True), (4, 6, 2, 2)
    text, null = torch.arange(24.0).view(3, 4, 2) / 24, torch.zeros(3, 4, 2)

    def clips(part):
        generators = [torch.Generator().manual_seed(i) for i in range(3)][part]
        image_noise = randn((len(generators), 4, 1, 2, 2), generators)
        noise = randn((len(generators), *shape), generators)
        return higen(toy, schedule, text[part], null[part], image_noise, noise, 4, 2.0, eta=1.0,
                     generators=generators)[1]
    assert torch.allclose(clips(slice(0, 3))[1:2], clips(slice(1, 2)), atol=1e-5)


def test_what_goes_with_clips_is_not_taken_for_clips(tmp_path):
    sample.main(["--base", "tiny-i2v", "--sample-steps", "1", "--judge", "2", "--out", str(tmp_path)])
    assert [clip.name for _, clip, _ in list_clips(tmp_path, "found")[1]] == ["0000.mp4", "0001.mp4"]
    assert sorted(p.name for p in (tmp_path / "first").iterdir()) == ["0000.png", "0001.png"]
    assert rows_of(tmp_path)[0]["image"] == str(tmp_path / "first" / "0000.png")
    assert not list(tmp_path.glob("*-side.mp4")) and read_video(tmp_path / "0000.mp4")[0].shape[1] == 8


def test_the_average_is_taken_back_after_an_error():
    params, ema = {"a": torch.nn.Parameter(torch.ones(2))}, {"a": torch.zeros(2)}
    with pytest.raises(ValueError), using_average(params, ema):
        assert params["a"].sum() == 0
        raise ValueError
    assert params["a"].sum() == 2


@pytest.mark.parametrize("flag", ["tensorboard", "wandb"])
def test_a_missing_logger_is_one_line(flag, monkeypatch, tmp_path):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    import vader
    with pytest.raises(UserError, match=f"--{flag}: .*pip install {flag}"):
        vader.main(["--base", "tiny", f"--{flag}", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_loggers_get_scalars_and_videos(monkeypatch, tmp_path):
    """Stand-ins for the two packages: what would be sent to them."""
    sent = []

    class Board:
        def __init__(self, folder):
            self.file_writer = types.SimpleNamespace(add_summary=lambda s, step: sent.append(("gif", step, s)))

        def add_scalar(self, name, value, step):
            sent.append((name, step, value))

    class Value(types.SimpleNamespace):
        Image = types.SimpleNamespace

        def __init__(self, value=None, **more):
            super().__init__(value=value, **more)
    Value.Value = types.SimpleNamespace
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Board
    proto = types.ModuleType("tensorboard.compat.proto.summary_pb2")
    proto.Summary = Value
    wandb = types.ModuleType("wandb")
    ids = []

    def init(id, **more):
        ids.append(id)
        return types.SimpleNamespace(id=id or "abc123", log=lambda values, step: sent.append(("wandb", step, values)))
    wandb.init = init
    wandb.Video = lambda frames, **kw: ("video", frames.shape)
    for name, module in (("torch.utils.tensorboard", board), ("wandb", wandb), ("tensorboard", types.ModuleType("t")),
                         ("tensorboard.compat", types.ModuleType("t")), ("tensorboard.compat.proto", types.ModuleType("t")),
                         ("tensorboard.compat.proto.summary_pb2", proto)):
        monkeypatch.setitem(sys.modules, name, module)
    args = argparse.Namespace(out=str(tmp_path), batch=1, accum=1, steps=2, log_every=1, tensorboard=True, wandb=True, resume=False)
    log = Log(args, common.Env(0, 1, torch.device("cpu"), torch.float32), {})
    log.step(0, loss=1.0)
    log.video(1, "held-out/0", np.zeros((3, 8, 8, 3), np.uint8), 8, "a cat")
    assert ("loss", 0, 1.0) in sent and ("wandb", 0, {"loss": 1.0}) in sent
    gif = next(s for kind, step, s in sent if kind == "gif").value[0].image
    assert gif.encoded_image_string.startswith(b"GIF8") and (gif.height, gif.width) == (8, 8)
    assert ("wandb", 1, {"held-out/0": ("video", (3, 3, 8, 8))}) in sent
    args.resume = True  # goes on in the same run of W&B
    Log(args, common.Env(0, 1, torch.device("cpu"), torch.float32), {}, start=1)
    assert ids == [None, "abc123"]


def test_steps_need_no_look_at_the_device():
    """add_noise at steps t (b,) gives the same numbers as at each single step."""
    schedule = make_schedule("linear_sd")
    x0, noise, t = torch.randn(3, 2, 2, 2, 2), torch.randn(3, 2, 2, 2, 2), torch.tensor([0, 500, 999])
    together = schedule.add_noise(x0, noise, t)
    one_by_one = torch.cat([schedule.add_noise(x0[i:i + 1], noise[i:i + 1], int(t[i])) for i in range(3)])
    assert torch.equal(together, one_by_one)
    assert diffusion.make_schedule("linear_sd").alpha_bar.dtype == torch.float64
