"""Training text to video: t2v.py, tft2v.py (TF-T2V), higen.py (HiGen), vcomposer.py (VideoComposer)."""
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import bases
import data
import demo
import diffusion
import higen
import i2vgen
import instructvideo
import models
import pipeline
import sample
import t2v
import test_dist
import test_transformers
import tft2v
import tinyworld
import vcomposer
import videolcm
from bases import load_base
from common import Env, SampleNumbers, generator, read_lines
from models import Dropout, forget_motion, seed_dropout
from weights import load_checkpoint, load_pickle

CLIPS = [p for p in (folder / "shared/data/videos" for folder in Path(__file__).parents) if p.exists()]
real = pytest.mark.skipif(not CLIPS, reason="needs real clips, shared/data/videos")
CPU = Env(0, 1, torch.device("cpu"), torch.float32)
QUICK = ["--batch", "1", "--no-cache-latents", "--preview-every", "0", "--warmup", "0", "--ema", "0",
         "--eval-n", "1", "--sample-steps", "1"]
TINY = {t2v: "tiny", tft2v: "tiny", higen: "tiny-higen", vcomposer: "tiny-vcomposer"}
by_name = pytest.mark.parametrize("method", TINY, ids=lambda method: method.__name__)
# t2v in the default suite, all in the slow one
mostly_slow = pytest.mark.parametrize(
    "method", [t2v, *(pytest.param(m, marks=pytest.mark.slow) for m in (tft2v, higen, vcomposer))],
    ids=lambda method: method.__name__)


def train(method, out, *args, shown=False):
    """Run a method, without evaluations unless they are to be shown. -> tensors, metadata"""
    with pytest.MonkeyPatch.context() as m:
        if not shown:
            m.setattr(method, "preview" if hasattr(method, "preview") else "evaluate", lambda *a: None)
        method.main([*QUICK, *map(str, args), "--out", str(out)])
    return load_checkpoint(out)


@pytest.fixture
def few_clips(monkeypatch):
    """The tiny world has four clips: they are soon encoded."""
    init = tinyworld.TinyWorld.__init__
    monkeypatch.setattr(tinyworld.TinyWorld, "__init__", lambda self, n, *a, **k: init(self, 4, *a, **k))


def seen_by_the_network(monkeypatch):
    """-> list of (frames, text, conditions) of every forward from here on."""
    calls, forward = [], models.UNet3D.forward

    def spy(self, x, t, text, **cond):
        calls.append((x.shape[2], text.detach().clone(), {k: v for k, v in cond.items() if v is not None}))
        return forward(self, x, t, text, **cond)
    monkeypatch.setattr(models.UNet3D, "forward", spy)
    return calls


# ---- all four

def product(out):
    """What a run leaves, but for times."""
    state = load_pickle(out / "state.pt")
    log = [{k: v for k, v in row.items() if k != "seconds"} for row in read_lines(out / "log.jsonl")]
    return state, load_checkpoint(out)[0], log


@mostly_slow
def test_resuming_an_almost_finished_and_a_finished_run(method, tmp_path, few_clips, monkeypatch):
    """Bit for bit; a finished one is left as it was, and evaluated again."""
    monkeypatch.setattr(higen, "fit_resampler", lambda base: None)
    args = ["--base", TINY[method], "--lr-schedule", "constant", "--image-share", 0.5, "--ema", 0.9,
            "--cache-latents"]
    train(method, tmp_path / "whole", *args, "--steps", 3, shown=True)
    train(method, tmp_path / "parts", *args, "--steps", 2, "--save-every", 1)
    train(method, tmp_path / "parts", *args, "--steps", 3, "--resume")
    (state, tensors, log), other = product(tmp_path / "whole"), product(tmp_path / "parts")
    assert len(log) == 3 and log == other[2]
    for a, b in ((state["weights"], other[0]["weights"]), (state["ema"], other[0]["ema"]), (tensors, other[1])):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for k, values in state["moments"].items():
        assert all(torch.equal(v, other[0]["moments"][k][n]) for n, v in values.items())

    before = (tmp_path / "whole" / "ckpt.safetensors").read_bytes()
    rows = read_lines(tmp_path / "whole" / "eval.jsonl")
    picture = (tmp_path / "whole" / "after.png").read_bytes()
    train(method, tmp_path / "whole", *args, "--steps", 3, "--resume", shown=True)
    assert (tmp_path / "whole" / "ckpt.safetensors").read_bytes() == before
    assert product(tmp_path / "whole")[2] == log
    assert read_lines(tmp_path / "whole" / "eval.jsonl") == rows and [r["step"] for r in rows] == [0, 3]
    assert (tmp_path / "whole" / "after.png").read_bytes() == picture
    assert (tmp_path / "whole" / "before" / "0000.mp4").exists()


@mostly_slow
def test_batches_do_not_matter(method, tmp_path, monkeypatch):
    """Dropout and every other draw are a sample's own, also where blocks are recomputed."""
    row = bases.BASES[TINY[method]]
    monkeypatch.setitem(bases.BASES, TINY[method], replace(row, net=replace(row.net, dropout=0.1)))
    monkeypatch.setattr(higen, "fit_resampler", lambda base: None)
    results = []
    for i, more in enumerate((["--batch", 2], ["--accum", 2], ["--batch", 2, "--grad-ckpt"])):
        out = tmp_path / str(i)
        train(method, out, "--base", TINY[method], "--steps", 1, "--image-share", 0.1, *more)
        moments = load_pickle(out / "state.pt")["moments"]
        results.append((read_lines(out / "log.jsonl")[0]["loss"],
                        torch.cat([v["exp_avg"].flatten() for v in moments.values() if v])))
    loss, gradient = results[0]
    for other, direction in results[1:]:
        assert other == pytest.approx(loss, rel=1e-5)
        assert (direction - gradient).norm() < 1e-5 * gradient.norm()
    monkeypatch.setattr(method, "seed_dropout", lambda net, seed, numbers: None)
    train(method, tmp_path / "unseeded", "--base", TINY[method], "--steps", 1, "--image-share", 0.1, "--batch", 2)
    unseeded = read_lines(tmp_path / "unseeded" / "log.jsonl")[0]["loss"]
    assert unseeded != pytest.approx(loss, rel=1e-5)  # there was dropout


def test_dropout_is_keyed_by_sample_and_layer():
    net = torch.nn.Sequential(Dropout(0.25), torch.nn.Identity(), Dropout(0.25))
    x = torch.ones(6, 50, 40)  # three samples of two rows
    torch.manual_seed(0)
    plain = torch.nn.Dropout(0.25)(x)
    torch.manual_seed(0)
    assert torch.equal(net[0](x), plain)  # as nn.Dropout until it is given seeds
    seed_dropout(net, 0, [7, 8, 9])
    first, last = net[0](x), net[2](x)
    assert not torch.equal(first, last) and torch.equal(first, net[0](x))
    assert first.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert first.count_nonzero() / first.numel() == pytest.approx(0.75, abs=0.02)
    assert not torch.equal(first[:2], first[2:4])
    seed_dropout(net, 0, [8])
    assert torch.equal(net[0](x[:2]), first[2:4])
    seed_dropout(net, 1, [8])
    assert not torch.equal(net[0](x[:2]), first[2:4])
    assert torch.equal(net.eval()(x), x)
    x.requires_grad_()
    net.train()[0](x[:2]).sum().backward()
    assert torch.equal(x.grad[:2], net[0](x[:2]))


# ---- t2v: what VGen does

def test_mixture_gives_each_of_8_processes_its_own_kind_and_one_process_all():
    kinds = sorted(set(t2v.MIXTURE), reverse=True)
    for world, accum, seen in ((8, 2, 0), (1, 4, 6), (2, 3, 12)):
        args = SimpleNamespace(batch=2, steps=8, accum=accum, seed=0)
        run = SimpleNamespace(start=0, samples_read=seen, env=Env(0, world, None, None))
        turn, size = pipeline.Clips.turns(SimpleNamespace(
            args=args, run=run, mixture=t2v.MIXTURE, kinds=kinds))
        found = []
        for rank in range(world):
            numbers = SampleNumbers(args, Env(rank, world, None, None), 0, seen)
            kind = [{kinds[turn[(n - seen) // size]] for n in mine}
                    for mine in (numbers[k] for k in range(8 * accum))]
            assert all(len(k) == 1 for k in kind)  # a batch is of one kind
            found.append([k.pop() for k in kind])
        if world == 8:
            assert [set(k) for k in found] == [{kind} for kind in t2v.MIXTURE]
        else:  # in turn, going on from where the run stopped
            order = [found[k % world][k // world] for k in range(world * len(found[0]))]
            assert order == [t2v.MIXTURE[(seen // 2 + k) % 8] for k in range(len(order))]


def test_what_an_image_model_has_is_what_vgen_scales():
    with torch.device("meta"):
        net = models.UNet3D()
    names = t2v.spatial_parameters(net)
    assert len(names) == 682  # of VGen's list of keys
    assert "input_blocks.0.0.weight" in names and not any("temopral" in k or "time_embed" in k for k in names)


def test_learning_rate_of_layers_within_a_frame(tmp_path):
    before = load_base("tiny").net.state_dict()
    within, moved = t2v.spatial_parameters(load_base("tiny").net), []
    for factor in (1, 0.5, 0):
        weights, _ = train(t2v, tmp_path / str(factor), "--base", "tiny", "--steps", 1, "--wd", 0,
                           "--lr-schedule", "constant", "--lr", 1e-3, "--spatial-lr", factor)
        moved.append({k: v - before[k] for k, v in weights.items()})
    for k, whole in moved[0].items():
        if k in within:
            assert torch.allclose(moved[1][k], whole / 2, atol=1e-6) and not moved[2][k].any()
        else:
            assert torch.equal(moved[2][k], whole)
    assert moved[0].keys() - within and moved[0].keys() & within


def test_zero_snr_goes_with_the_run(tmp_path, monkeypatch):
    row = bases.BASES["tiny"]
    weak = dict(name="linear_sd", prediction="eps")
    monkeypatch.setitem(bases.BASES, "tiny", replace(
        row, schedule=weak, sample=replace(row.sample, spacing="leading")))
    tensors, meta = train(t2v, tmp_path / "run", "--base", "tiny", "--steps", 1, "--zero-snr", "--rank", 2)
    base = bases.load_run(tmp_path / "run", tensors, meta, None)
    assert base.schedule.prediction == "v" and base.schedule.alpha_bar[-1] < 1e-12
    assert meta["sample"]["spacing"] == "trailing"
    assert load_base("tiny").schedule.prediction == "eps"


def test_forgotten_motion_is_frame_by_frame():
    """Without layers over time a frame's prediction does not depend on the others."""
    net = load_base("tiny").net
    x, text = torch.randn(1, 4, 8, 8, 8), torch.randn(1, 10, 64)
    other = torch.cat([x[:, :, :4], torch.randn(1, 4, 4, 8, 8)], dim=2)
    t = torch.tensor([500])
    with torch.no_grad():
        assert (net(x, t, text) - net(other, t, text))[:, :, :4].abs().max() > 1e-3
        forget_motion(net)
        assert torch.allclose(net(x, t, text)[:, :, :4], net(other, t, text)[:, :, :4], atol=1e-5)


# ---- TF-T2V

def test_coherence_is_the_loss_between_changes_from_frame_to_frame():
    schedule, g = diffusion.make_schedule(), torch.Generator().manual_seed(0)
    x0, out = (torch.randn(2, 3, 4, 5, 6, generator=g) for _ in range(2))

    def loss(x0, coherence):
        generators = [generator(i) for i in range(2)]
        return tft2v.tft2v_loss(
            lambda x, t, text: out[:, :, :x.shape[2]], schedule, x0, None, generators, coherence=coherence)
    _, noise = diffusion.draw_noise(schedule, x0, [generator(i) for i in range(2)])
    wrong = out - noise
    steps = (wrong[:, :, 1:] - wrong[:, :, :-1]).square().mean((1, 2, 3, 4))
    assert torch.allclose(loss(x0, 0.0), wrong.square().mean((1, 2, 3, 4)), atol=1e-6)
    assert torch.allclose(loss(x0, 0.1) - loss(x0, 0.0), 0.1 * steps, atol=1e-6)
    assert torch.equal(loss(x0[:, :, :1], 0.0), loss(x0[:, :, :1], 0.1))  # an image has none


def test_the_image_is_seen_by_65_in_100_clips():
    image = torch.ones(4000, 1, 3).half()
    seen = tft2v.see_image(image, [generator(i) for i in range(4000)])
    assert seen.dtype == torch.float32 and set(seen.unique().tolist()) == {0.0, 1.0}
    assert seen[:, 0, 0].mean() == pytest.approx(0.65, abs=0.02) and torch.equal(seen[:, 0, 0], seen[:, 0, 2])
    assert torch.equal(tft2v.see_image(image[:1], [generator(7)])[0], seen[7])


def test_tiny_clips_go_without_captions(tmp_path, monkeypatch):
    """The defaults of --base tiny: half of the steps are single frames with their captions."""
    calls = seen_by_the_network(monkeypatch)
    train(tft2v, tmp_path, "--base", "tiny", "--steps", 6, "--drop-text", 0)
    assert {f for f, _, _ in calls} == {1, 8} and len(calls) == 6
    with torch.no_grad():
        empty = load_base("tiny").encode_text([""])
    for f, text, cond in calls:
        assert torch.allclose(text, empty, atol=1e-5) == (f > 1) and not cond


# ---- HiGen's factors

def test_factors_are_those_of_the_clips():
    still = torch.randn(1, 4, 1, 8, 8).expand(-1, -1, 5, -1, -1)
    assert higen.motion_factors(still).tolist() == [[0] * 4]
    ramp = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(2, 4, -1, 8, 8) * torch.tensor([0.1, 0.25]).view(
        2, 1, 1, 1, 1)
    assert higen.motion_factors(ramp).tolist() == [[100] * 4, [250] * 4]
    rows = diffusion.appearance_matrix(32, 0.7)[None]
    assert torch.allclose(diffusion.appearance_rows(rows), rows, atol=1e-6)
    short = diffusion.appearance_rows(diffusion.appearance_matrix(8, 0.7)[None])
    assert short.shape == (1, 8, 32) and torch.allclose(short[0, 0, [0, -1]], torch.tensor([1.0, 0.3]))


def test_tiny_higen_starts_from_words_that_mean_what_they_did():
    base = load_base("tiny-higen")
    with torch.no_grad():
        tokens = base.encode_text(["a red circle moving left", "", "a blue square growing"])
    before = (base.net.context_embedding(tokens) - tokens).square().mean()
    higen.fit_resampler(base, steps=80)
    assert (base.net.context_embedding(tokens) - tokens).square().mean() < 0.05 * before


def test_higen_is_told_of_clips_and_images(monkeypatch, tmp_path):
    calls = seen_by_the_network(monkeypatch)
    monkeypatch.setattr(higen, "fit_resampler", lambda base: None)
    for images in (0, 1):
        train(higen, tmp_path / str(images), "--base", "tiny-higen", "--steps", 1, "--image-share", images)
    (f, _, clip), (one, _, image) = calls
    assert (f, one) == (8, 1)
    assert clip["motion_factor"].shape == (1, 7) and clip["appearance_factor"].shape == (1, 8, 32)
    assert clip["image_prior"].abs().max() > 0.1 and image["image_prior"].abs().max() == 0
    assert image["motion_factor"].tolist() == [0] and (image["appearance_factor"] == 1).all()
    calls.clear()
    sample.main(["--ckpt", str(tmp_path / "0"), "--prompt", "a red circle moving left", "--sample-steps", "2",
                 "--motion-factor", "120", "--out", str(tmp_path / "s")])
    assert [f for f, _, _ in calls] == [1, 1, 8, 8] and (calls[-1][2]["motion_factor"] == 120).all()


def test_higen_shows_three_motion_factors(monkeypatch, tmp_path):
    calls = seen_by_the_network(monkeypatch)
    monkeypatch.setattr(higen, "fit_resampler", lambda base: None)
    train(higen, tmp_path, "--base", "tiny-higen", "--steps", 1, shown=True)
    told = [cond["motion_factor"].unique().tolist() for f, _, cond in calls if f > 1 and len(cond["motion_factor"]) > 1]
    assert told == [[150], [300], [450]] * 2  # guidance doubles the batch
    rows = read_lines(tmp_path / "eval.jsonl")
    assert [set(row) for row in rows] == [{"step", "speed_150", "speed_300", "speed_450"}] * 2


# ---- VideoComposer's maps

def test_which_maps_are_seen():
    """A tenth of the clips sees none, four tenths one alone, all equally often; else each is seen by half."""
    names, n = ("depth", "sketch", "motion"), 6000
    keep = vcomposer.drop_maps(names, [generator(i) for i in range(n)])
    table = torch.stack([keep[name] for name in names], 1)  # n 3
    assert set(keep) == set(names) and set(table.unique().tolist()) == {0.0, 1.0}
    count = table.sum(1)
    assert (count == 0).float().mean() == pytest.approx(0.1 + 0.5 / 8, abs=0.015)
    assert (count == 1).float().mean() == pytest.approx(0.4 + 0.5 * 3 / 8, abs=0.02)
    assert (count == 3).float().mean() == pytest.approx(0.5 / 8, abs=0.01)
    for column in table[count == 1].T:
        assert column.mean() == pytest.approx(1 / 3, abs=0.03)
    assert vcomposer.drop_maps(names, [generator(7)])["motion"][0] == keep["motion"][7]


def test_maps_start_as_nothing_and_can_be_dropped_for_one_sample():
    plain, base = load_base("tiny-clean").net, load_base("tiny-vcomposer")
    x, text, t = torch.randn(2, 4, 8, 8, 8), torch.randn(2, 10, 64), torch.tensor([500, 20])
    depth = torch.rand(2, 1, 8, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(x, t, text), base.net(x, t, text, depth=depth))
        base.net.input_blocks[0][0].weight.normal_(std=0.1)
        with_map, without = base.net(x, t, text, depth=depth), base.net(x, t, text)
        half = base.net(x, t, text, depth=depth, map_keep={"depth": torch.tensor([1.0, 0.0])})
    assert (with_map - without).abs().max() > 1e-3
    assert torch.allclose(half[0], with_map[0], atol=1e-5) and torch.allclose(half[1], without[1], atol=1e-5)


def test_maps_of_a_tiny_clip():
    rows = tinyworld.TinyWorld(40, depth=True, motion="moving right")
    item = next(rows[i, 0] for i in range(40) if "square" in rows[i, 0]["text"])
    maps = data.video_maps(item["video"], models.MAPS, flow=data.lucas_kanade)
    inside = item["depth"][0, 1:] > 0
    assert maps["motion"].shape == (2, 8, 32, 32) and (maps["motion"][:, 0] == 0).all()
    x, y = (maps["motion"][k, 1:][inside].mean() for k in (0, 1))
    assert 0.5 < x < 3 and y.abs() < 0.3  # to the right
    dots = data.video_maps(item["video"], ["motion"], flow=data.lucas_kanade, block=16)["motion"]
    assert torch.equal(dots[..., 8::16, 8::16], maps["motion"][..., 8::16, 8::16])
    assert torch.count_nonzero(dots) <= 2 * 7 * 4
    sketch = maps["sketch"]
    assert 0 <= sketch.min() and sketch.max() <= 1
    assert sketch[0, 1:][inside].mean() > 3 * sketch[0, 1:][~inside].mean()
    assert torch.equal(maps["single_sketch"][:, 5], sketch[:, 0]) and maps["local_image"].min() >= 0


def test_maps_reach_the_network_and_images_have_none(tmp_path, monkeypatch):
    calls = seen_by_the_network(monkeypatch)
    for images in (0, 1):
        train(vcomposer, tmp_path / str(images), "--base", "tiny-vcomposer", "--steps", 1, "--image-share",
              images, "--batch", 2)
    (f, _, clip), (one, _, image) = calls
    assert (f, one) == (8, 1) and image == {"map_keep": {}}
    assert {k: tuple(v.shape) for k, v in clip.items() if k != "map_keep"} == {
        "depth": (2, 1, 8, 32, 32), "sketch": (2, 1, 8, 32, 32), "motion": (2, 2, 8, 32, 32)}
    assert {k: tuple(v.shape) for k, v in clip["map_keep"].items()} == {
        "depth": (2,), "sketch": (2,), "motion": (2,)}


def test_vcomposer_shows_each_map(tmp_path):
    train(vcomposer, tmp_path, "--base", "tiny-vcomposer", "--steps", 1, shown=True)
    rows = read_lines(tmp_path / "eval.jsonl")
    assert [set(row) for row in rows] == [{"step", "words", "depth", "sketch", "motion"}] * 2
    first = rows[0]  # the first convolution does not see the maps yet
    assert first["words"] == first["depth"] == first["sketch"] == first["motion"] > 0
    assert (tmp_path / "after.png").exists()


# ---- data

def test_captionless_lists(tmp_path, message):
    for name in ("a", "b"):
        data.write_video(tmp_path / "clips" / f"{name}.mp4", torch.rand(3, 3, 16, 16) * 2 - 1)
    assert "no caption beside it" in message(data.VideoDataset, tmp_path / "clips", 2, 16, 16)
    (tmp_path / "list.txt").write_text("clips/a.mp4\nclips/b.mp4|||a caption that nobody reads\n")
    (tmp_path / "list.csv").write_text("video\nclips/a.mp4\nclips/b.mp4\n")
    for source in ("clips", "list.txt", "list.csv"):
        rows = data.VideoDataset(tmp_path / source, 2, 16, 16, captions=False)
        assert len(rows) == 2 and rows[1, 0]["text"] == ""


def test_images_have_captions_of_their_own(tmp_path, message):
    for name in ("a", "b"):
        data.write_video(tmp_path / "clips" / f"{name}.mp4", torch.rand(3, 8, 32, 32) * 2 - 1)
    Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "p.png")
    (tmp_path / "pictures.csv").write_text("file,text\np.png,a red circle")
    line = ["--base", "tiny", "--data", str(tmp_path / "clips")]
    assert "no caption beside it" in message(tft2v.main, line)  # frames of clips would be the images
    args = tft2v.get_args([*line, "--images", str(tmp_path / "pictures.csv")])
    clips = pipeline.Clips(args, bases.choose_sampling("tiny", args), captions=False)
    assert [part.frames for part in clips.parts] == [8, 1] and clips.prompts == ["a red circle"]
    assert [row[2] for row in clips.parts[0].rows] == ["", ""]
    assert clips.examples(5)["video"].shape == (2, 3, 8, 32, 32)


# ---- clips of several sizes

@pytest.fixture
def mixed(tmp_path):
    """Options that read clips of two shapes at two sizes, and a picture at a third; a clip counts twice."""
    rows = ["video,caption,repeats"]
    for name, f, h, w in (("wide", 8, 32, 48), ("wider", 9, 32, 48), ("square", 8, 32, 32)):
        data.write_video(tmp_path / f"{name}.mp4", torch.rand(3, f, h, w) * 2 - 1)
        rows.append(f"{name}.mp4,a red circle moving left,{'2' * (name == 'wide')}")
    (tmp_path / "moving.csv").write_text("\n".join(rows))
    Image.effect_noise((40, 40), 50).convert("RGB").save(tmp_path / "p.png")
    (tmp_path / "all.csv").write_text("\n".join([*rows, "p.png,a blue square moving up,"]))

    def options(pictures=True):
        sizes = ["8x16x24", "1x32x32"] if pictures else ["8x16x24"]
        return ["--data", tmp_path / ("all.csv" if pictures else "moving.csv"), "--buckets", *sizes, "--workers", 0]
    return options


SEEN = {(8, 4, 6), (8, 8, 8), (1, 8, 8)}  # latents of a base that halves thrice, in time never


def shapes_of(monkeypatch):
    """-> the sizes (f, h, w) of what the network saw, a set that grows."""
    seen, forward = set(), models.UNet3D.forward

    def spy(self, x, *args, **cond):
        seen.add(tuple(x.shape[2:]))
        return forward(self, x, *args, **cond)
    monkeypatch.setattr(models.UNet3D, "forward", spy)
    return seen


def test_buckets_are_cached_apart_and_resumed_exactly(mixed, tmp_path, monkeypatch):
    args = ["--base", "tiny", *mixed(), "--cache-latents", "--image-share", 0, "--lr-schedule", "constant"]
    seen = shapes_of(monkeypatch)
    train(t2v, tmp_path / "whole", *args, "--steps", 5)
    assert seen == SEEN
    folders = sorted(p.name for p in (tmp_path / "whole" / "latents").iterdir())
    assert folders == ["1x32x32", "8x16x24", "8x32x32"]
    train(t2v, tmp_path / "parts", *args, "--steps", 2)
    train(t2v, tmp_path / "parts", *args, "--steps", 5, "--resume")
    (state, _, log), other = product(tmp_path / "whole"), product(tmp_path / "parts")
    assert log == other[2]
    assert all(torch.equal(v, other[0]["weights"][k]) for k, v in state["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("method, base, pictures, more", [
    (tft2v, "tiny", True, ["--image-share", 0.2]), (higen, "tiny-higen", True, []),
    (vcomposer, "tiny-vcomposer", True, ["--cache-latents"]), (i2vgen, "tiny-i2v", True, ["--cache-latents"]),
    (videolcm, "tiny", True, ["--cache-latents"]), (demo, "tiny", False, ["--read-fps", 8, "--cache-latents"]),
    (instructvideo, "tiny", False, ["--reward", "brightness", "--sample-steps", 4])],
    ids=lambda value: getattr(value, "__name__", ""))
def test_every_method_reads_buckets(method, base, pictures, more, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(higen, "fit_resampler", lambda base: None)
    seen = shapes_of(monkeypatch)
    method.main([str(x) for x in (
        "--base", base, *mixed(pictures), "--steps", 6, "--batch", 1, "--eval-n", 1, "--sample-steps", 1,
        *more, "--out", tmp_path / "run")])
    assert seen >= SEEN - ({(1, 8, 8)} if not pictures else set())


@pytest.mark.slow
def test_buckets_of_two_processes_are_those_of_one(mixed, tmp_path):
    args = [str(x) for x in (*test_dist.T2V, *mixed(), "--image-share", 0, "--steps", 6)]
    one = test_dist.launch(1, tmp_path / "one", *args, "--accum", "2")
    two = test_dist.launch(2, tmp_path / "two", *args)
    assert test_dist.relative(two, one, "weights") < 1e-6


def test_a_base_that_is_told_the_size_is_told_the_buckets(tmp_path, monkeypatch):
    test_transformers.small(monkeypatch, "opensora")
    test_transformers.publish(tmp_path / "weights", "opensora")
    for name, h, w in (("own", 16, 20), ("tall", 32, 16)):
        data.write_video(tmp_path / "clips" / f"{name}.mp4", torch.rand(3, 6, h, w) * 2 - 1)
        (tmp_path / "clips" / f"{name}.txt").write_text("a red ball")
    told, conditions = set(), pipeline.clip_size

    def spy(sampling, n, device):
        told.add(sampling.size)
        return conditions(sampling, n, device)
    monkeypatch.setattr(pipeline, "clip_size", spy)
    train(t2v, tmp_path / "run", "--base", "opensora", "--weights", tmp_path / "weights", "--rank", 2, "--steps", 4,
          "--data", tmp_path / "clips", "--buckets", "6x32x16", "--workers", 0)
    assert told == {(6, 16, 20), (6, 32, 16)}


@pytest.mark.parametrize("method, line, words", [
    (t2v, "--base tiny --buckets 1x32x32", "--buckets: sizes for the clips of --data"),
    (t2v, "--base tiny --buckets 8x30x32 --data none", "--buckets 8x30x32: --height 30"),
    (t2v, "--base cogvideox-2b --buckets 8x480x720 --data none", "--buckets 8x480x720: --frames 8"),
    (i2vgen, "--base cogvideox-5b-i2v --buckets 49x720x480 --data none", "has learned positions for 480x720"),
    (t2v, "--base tiny --image-share 1 --buckets 1x32x32 --data none --images none", "--buckets: not with --images"),
    (t2v, "--buckets 1x256x256 --data none --mixture", "--buckets: not with --images or --mixture"),
    (demo, "--base tiny --buckets 1x32x32 --data none", "--buckets 1x32x32: needs 2 frames or more"),
])
def test_buckets_that_do_not_fit(method, line, words, message, tmp_path):
    assert words in message(method.main, [*line.split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_empty_captions(tmp_path, message, capsys):
    for name in ("a", "b"):
        data.write_video(tmp_path / f"{name}.mp4", torch.rand(3, 8, 32, 32) * 2 - 1)
    (tmp_path / "list.csv").write_text("video,caption\na.mp4,a red circle\nb.mp4,\n")
    args = ["--base", "tiny", "--data", str(tmp_path / "list.csv")]
    sampling = bases.choose_sampling("tiny", t2v.get_args(args))
    assert "1 of 2 clips have no caption; --empty-captions" in message(pipeline.Clips, t2v.get_args(args), sampling)
    clips = pipeline.Clips(t2v.get_args([*args, "--empty-captions"]), sampling)
    assert [row[2] for row in clips.parts[0].rows] == ["a red circle", ""]
    assert "1 of 2 clips have no caption and are trained on an empty one" in capsys.readouterr().err


# ---- real clips, small networks

def real_clips(folder, names):
    folder.mkdir()
    for name in names:
        (folder / f"{name}.mp4").symlink_to(CLIPS[0] / f"{name}.mp4")
        (folder / f"{name}.txt").write_text(name.replace("_", " "))
    return folder


@real
def test_mixture_on_real_clips(public, tmp_path, monkeypatch):
    folder, _ = public("modelscope")
    calls = seen_by_the_network(monkeypatch)
    tensors, _ = train(t2v, tmp_path / "run", "--base", "modelscope", "--weights", folder, "--steps", 2, "--accum",
                       4, "--mixture", "--rank", 2, "--workers", 0, "--data",
                       real_clips(tmp_path / "clips", ["cactus_blooming"]))
    assert [f for f, _, _ in calls] == [f for f, _ in t2v.MIXTURE]
    assert any(v.abs().max() > 0 for k, v in tensors.items() if "lora_B" in k)


def captionless(folder):
    """Two pictures with captions and three clips without -> their lists."""
    (folder / "pictures").mkdir()
    for i, word in enumerate(("bear", "tiger")):
        Image.effect_noise((40, 30), 50 + i).convert("RGB").save(folder / "pictures" / f"{word}.png")
    (folder / "pictures.csv").write_text("file,text\npictures/bear.png,a bear\npictures/tiger.png,a tiger")
    (folder / "clips.txt").write_text("".join(f"{CLIPS[0] / name}.mp4\n" for name in (
        "cactus_blooming", "cat_walking", "eagle")))
    return ["--data", folder / "clips.txt", "--images", folder / "pictures.csv"]


@real
@pytest.mark.parametrize("cache", [False, True])
def test_text_free_on_real_clips(cache, public, tmp_path, monkeypatch):
    """TF-T2V: clips go without words, told the middle frame's embedding; pictures have their captions."""
    folder, _ = public("tft2v")
    calls = seen_by_the_network(monkeypatch)
    train(tft2v, tmp_path / "run", "--base", "tft2v", "--weights", folder, "--steps", 6, "--rank", 2,
          "--image-share", 0.5, "--drop-text", 0, "--workers", 0, *captionless(tmp_path),
          *["--cache-latents"] * cache)
    base = load_base("tft2v", folder)
    with torch.no_grad():
        empty, bear, tiger = base.encode_text(["", "a bear", "a tiger"])
    assert {f for f, _, _ in calls} == {1, 3}
    for f, text, cond in calls:
        known = (empty,) if f > 1 else (bear, tiger)
        assert any(torch.allclose(text[0], k, atol=1e-5) for k in known)
        assert ("image" in cond) == (f > 1)
    sample.main(["--ckpt", str(tmp_path / "run"), "--weights", folder, "--prompt", "a bear", "--out",
                 str(tmp_path / "s")])
    assert (tmp_path / "s" / "0000.mp4").exists()


@real
def test_tft2v_shows_its_prompts(public, tmp_path):
    """Captions, prompts with the base's suffix and the negative prompt are encoded before the tower goes."""
    folder, _ = public("tft2v")
    train(tft2v, tmp_path / "run", "--base", "tft2v", "--weights", folder, "--steps", 1, "--rank", 2, "--workers",
          0, "--cache-latents", *captionless(tmp_path), shown=True)
    assert (tmp_path / "run" / "after.png").exists() and (tmp_path / "run" / "before" / "0000.mp4").exists()


@real
def test_higen_on_real_clips(public, tmp_path, monkeypatch):
    folder, _ = public("higen")
    calls = seen_by_the_network(monkeypatch)
    train(higen, tmp_path / "run", "--base", "higen", "--weights", folder, "--steps", 2, "--rank", 2,
          "--image-share", 0, "--workers", 0, "--data",
          real_clips(tmp_path / "clips", ["cactus_blooming", "car_turn"]))
    for f, _, cond in calls:
        assert f == 32 and cond["motion_factor"].shape == (1, 31) and cond["motion_factor"].min() > 0
        rows = cond["appearance_factor"][0]  # cosines of CLIP embeddings
        assert torch.allclose(rows.diagonal(), torch.ones(32), atol=1e-4) and rows.min() < 0.9999
    sample.main(["--ckpt", str(tmp_path / "run"), "--weights", folder, "--prompt", "a cactus",
                 "--motion-factor", "300", "--appearance-factor", "0.5", "--out", str(tmp_path / "s")])
    rows = [json.loads(x) for x in (tmp_path / "s" / "index.jsonl").read_text().splitlines()]
    assert rows[0]["motion_factor"] == 300 and rows[0]["appearance_factor"] == 0.5


@real
def test_vcomposer_on_real_clips(public, tmp_path, monkeypatch):
    """Sketches, first frames and the style are read off the clips; without --flow-weights no motion."""
    folder, _ = public("vcomposer")
    calls = seen_by_the_network(monkeypatch)
    train(vcomposer, tmp_path / "run", "--base", "vcomposer", "--weights", folder, "--steps", 2, "--rank", 2,
          "--image-share", 0, "--workers", 0, "--cache-latents", "--data",
          real_clips(tmp_path / "clips", ["cactus_blooming", "car_turn"]), shown=True)
    trained = [cond for _, _, cond in calls if "map_keep" in cond]
    assert len(trained) == 2
    for cond in trained:
        assert cond.keys() == {"image", "sketch", "single_sketch", "local_image", "map_keep"}
        assert cond["map_keep"].keys() == {"sketch", "single_sketch", "local_image"}
    rows = read_lines(tmp_path / "run" / "eval.jsonl")
    assert [set(row) for row in rows] == [{"step", "words", "sketch", "single_sketch", "local_image"}] * 2
