"""VideoComposer's conditions made from a video, and SR600 after any base."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_t2v import CLIPS, real

import bases
import data
import diffusion
import hub
import pipeline
import sample

SOME = ("sketch", "single_sketch", "motion", "local_image", "style")


def test_the_codec_tells_how_blocks_move():
    """A patch with a texture goes 3 pixels to the right and 2 up in each frame."""
    video, patch = torch.full((3, 6, 64, 64), -0.8), torch.rand(3, 24, 24)
    places = [(36 - 2 * i, 10 + 3 * i) for i in range(6)]
    for i, (y, x) in enumerate(places):
        video[:, i, y:y + 24, x:x + 24] = patch
    moved = data.codec_motion(video)
    assert moved.shape == (2, 6, 64, 64) and (moved[:, 0] == 0).all()
    for i, (y, x) in list(enumerate(places))[1:]:
        inside = moved[:, i, y:y + 24, x:x + 24].flatten(1)
        dots = inside[:, inside.abs().sum(0) > 0]  # in the middles of blocks, zeros between
        assert 0 < dots.shape[1] < 40
        assert (dots.median(1).values - torch.tensor([3.0, -2.0])).abs().max() < 0.5
    assert data.codec_motion(video[:, :2, :63, :61]).shape == (2, 2, 63, 61)


def played(monkeypatch, out, *args):
    """-> the clip that sample.py makes, what its network was told, its row of index.jsonl."""
    told, rollout = {}, pipeline.rollout

    def spy(net, base, prompts, x_T, args, generators, cond=None, null_cond=None, *more, **kw):
        told.update(cond=cond, null=null_cond)
        return rollout(net, base, prompts, x_T, args, generators, cond, null_cond, *more, **kw)
    with monkeypatch.context() as m:
        m.setattr(pipeline, "rollout", spy)
        sample.main([*map(str, args), "--prompt", "a cat", "--out", str(out)])
    row, = [json.loads(x) for x in (out / "index.jsonl").read_text().splitlines()]
    return data.read_video(out / row["file"])[0], told, row


@real
@pytest.mark.parametrize("base", ["vcomposer", "vcomposer-hd"])
def test_conditions_of_a_real_clip(base, public, tmp_path, monkeypatch):
    folder, _ = public(base)
    common = ["--base", base, "--weights", folder, "--height", 32, "--width", 32]
    clip = CLIPS[0] / "cat_walking.mp4"
    plain = played(monkeypatch, tmp_path / "plain", *common)[0]
    names = SOME if base == "vcomposer" else ("sketch",)
    for name in names:
        video, told, row = played(monkeypatch, tmp_path / name, *common, "--follow", clip, "--take", name)
        assert set(told["cond"]) == {"image" if name == "style" else name}
        assert row["follow"] == str(clip) and (video - plain).abs().max() > 1e-2, name
    # as published: 3 frames a second (of 8), squeezed; the first one's, in 0..1
    frames = data.read_video(clip, 3, 3)[0]
    if base == "vcomposer":
        told = played(monkeypatch, tmp_path / "all", *common, "--follow", clip, "--take", *SOME)[1]
        first = torch.nn.functional.interpolate(frames[:, :1].transpose(0, 1), (32, 32), mode="bilinear",
                                                antialias=True)
        assert torch.allclose(told["cond"]["local_image"][0, :, 2], first[0] / 2 + 0.5, atol=1e-5)
        assert set(told["null"]) == {"image"}  # the second branch of guidance keeps the maps


@real
def test_depth_by_transformers(public, tmp_path, monkeypatch):
    """A small random depth network: the nearest place is 2, nothing is below 0."""
    import transformers
    kind = tmp_path / "dpt"
    transformers.DPTForDepthEstimation(transformers.DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32,
        patch_size=16, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8)).save_pretrained(kind)
    transformers.DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(kind)
    folder, _ = public("vcomposer")
    _, told, _ = played(monkeypatch, tmp_path / "s", "--base", "vcomposer", "--weights", folder, "--follow",
                        CLIPS[0] / "eagle.mp4", "--take", "depth", "--depth-model", kind)
    depth = told["cond"]["depth"]
    assert depth.shape == (1, 1, 3, 16, 24) and depth.max() == 2 and depth.min() >= 0


def test_longer_and_larger_weights_of_tft2v():
    assert bases.BASES["tft2v-32"].sample.frames == 32
    assert bases.latent_shape("vcomposer-hd", 16, 512, 896) == (4, 16, 64, 112)
    nets = [{row.net for name, row in bases.BASES.items() if name.startswith(kind)} for kind in
            ("tft2v", "vcomposer")]
    assert all(len(found) == 1 for found in nets)  # same keys and shapes


@pytest.mark.parametrize("base", ["tft2v-32", "tiny"])
def test_enlarged_afterwards(base, public, tmp_path, monkeypatch):
    folder = [] if base == "tiny" else ["--weights", public(base)[0], "--frames", "3"]
    plain = diffusion.sr600
    monkeypatch.setattr(pipeline, "sr600", lambda *a, **k: plain(*a, **k, inversion_steps=1))
    sample.main(["--base", base, *folder, "--prompt", "a red circle", "--sample-steps", "2", "--n", "2",
                 "--then", "sr600", "--then-weights", public("sr600")[0], "--then-size", "8", "12",
                 "--out", str(tmp_path)])
    small, large = ([json.loads(x) for x in (f / "index.jsonl").read_text().splitlines()]
                    for f in (tmp_path, tmp_path / "sr600"))
    assert [r["prompt"] for r in large] == [r["prompt"] for r in small] == ["a red circle"] * 2
    assert {r["base"] for r in large} == {"sr600"} and Path(large[1]["video"]).name == "0001.mp4"
    frames, fps, size = data.video_info(tmp_path / "sr600" / "0001.mp4")
    assert (frames, fps, size) == (data.video_info(tmp_path / "0001.mp4")[0], small[0]["save_fps"], (8, 12))


@pytest.mark.parametrize("frames, cuts", [(1, [(0, 1)]), (16, [(0, 16)]), (32, [(0, 32)]), (33, [(0, 32), (1, 33)]),
                                          (60, [(0, 32), (28, 60)]), (64, [(0, 32), (32, 64)]),
                                          (70, [(0, 32), (32, 64), (38, 70)])])
def test_a_long_clip_is_enlarged_whole(frames, cuts, monkeypatch, tmp_path, capfd):
    """In windows; rate, frames and shape come back. The network is left out."""
    assert sample.windows(frames) == cuts
    hub.small(monkeypatch, "sr600")
    level = torch.arange(frames) / 40 - 0.9
    clip = tmp_path / "a.mp4"
    data.write_video(clip, level.view(1, -1, 1, 1).expand(3, frames, 48, 64), 24000 / 1001)
    monkeypatch.setattr(sample, "generate_from", lambda *a, video, **k: video)
    args = sample.get_args(["--base", "sr600", "--video", str(clip)])
    base = SimpleNamespace(name="sr600", row=bases.base_row("sr600"))
    source = SimpleNamespace(source=clip, prompt="", seed="0")
    video, fps = sample.enlarge_clip(args, None, base, base.row.sample, source, False)
    assert video.shape == (3, frames, 16, 24) and fps == pytest.approx(24000 / 1001)
    torch.testing.assert_close(video.mean((0, 2, 3)), level, atol=0.02, rtol=0)
    said = capfd.readouterr().out
    assert f"{frames} frames at 23.98 fps, 64x48 cropped to 64x43 -> 24x16" in said
    assert (f"in {len(cuts)} windows" in said) == (len(cuts) > 1)


@pytest.mark.parametrize("shape, size", [((256, 448), (720, 1280)), ((720, 1280), (720, 1280)), ((480, 640), (848, 1088)),
                                         ((1920, 1080), (1296, 704)), ((512, 512), (976, 960))])
def test_size_of_an_enlarged_clip(shape, size):
    """In the clip's own shape, with about the pixels of 720x1280; what is asked for wins."""
    base = SimpleNamespace(name="sr600", row=bases.base_row("sr600"))
    free, asked = (sample.get_args(["--base", "sr600", *flags]) for flags in ([], ["--width", "640"]))
    found = sample.fitting_size(base, base.row.sample, free, shape)
    assert bases.latent_shape("sr600", 32, *found) and found == size
    assert sample.fitting_size(base, base.row.sample, asked, shape) == (720, 1280)


def test_what_a_source_loses_is_said(tmp_path, capfd):
    """Frames, rate and shape that the result does not keep."""
    data.write_video(tmp_path / "a.mp4", torch.zeros(3, 30, 32, 64), 24)
    args = sample.get_args(["--base", "tiny", "--follow", str(tmp_path / "a.mp4"), "--take", "sketch"])
    row = bases.base_row("tiny")
    sample.say_changes(args, row, row.sample)
    said = capfd.readouterr().out
    assert all(x in said for x in ("--follow", "8 of its 30 frames", "24 fps become", "64x32", "32x32")), said
    data.write_video(tmp_path / "a.mp4", torch.zeros(3, *row.sample.size), row.sample.save_fps)
    sample.say_changes(args, row, row.sample)
    assert not capfd.readouterr().out


def test_sketch_is_where_it_is_steep():
    video = torch.full((3, 1, 8, 16), -1.0)
    video[..., 8:] = 1
    sketch = data.edges(video)[0, 0].numpy()
    assert sketch.shape == (8, 16) and np.allclose(sketch[:, 7:9], 1) and not sketch[:, [0, 5, 10, 15]].any()
