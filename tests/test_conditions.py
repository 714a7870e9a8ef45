"""VideoComposer's conditions made from a video, and SR600 after any base."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_t2v import CLIPS, real

import bases
import data
import diffusion
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


def test_sketch_is_where_it_is_steep():
    video = torch.full((3, 1, 8, 16), -1.0)
    video[..., 8:] = 1
    sketch = data.edges(video)[0, 0].numpy()
    assert sketch.shape == (8, 16) and np.allclose(sketch[:, 7:9], 1) and not sketch[:, [0, 5, 10, 15]].any()
