"""DEMO: what trains and what does not, its teachers, processes, resume, real clips, sampling."""
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import hub
import numpy as np
import pytest
import torch
from runs import read_state, spread
from safetensors.torch import load_file

import bases
import data
import demo
import models
import pipeline
import sample
import tinyworld
import weights
from common import Env, generator, read_lines
from data import frame_flow, lucas_kanade, resize, write_video
from tinyworld import tiny_batch
from weights import load_pickle

ROOT = Path(__file__).parent.parent
CLIPS = Path(os.environ.get("NANOVIDEO_CLIPS", "/work/shared/data/videos"))
CAPTIONS = {"car_turn": "a car takes a turn", "cat_walking": "a cat walks", "eagle": "an eagle flies",
            "cactus_blooming": "a cactus opens its flower"}
TERMS = {"diffusion", "video_motion", "text_motion", "regularization"}
QUICK = ["--base", "tiny", "--batch", "2", "--eval-n", "1", "--no-cache-latents", "--log-every", "1"]


@pytest.fixture
def quick(monkeypatch):
    """A tiny base that samples in two steps."""
    row = bases.BASES["tiny"]
    monkeypatch.setitem(bases.BASES, "tiny", replace(row, sample=replace(row.sample, sample_steps=2)))


def raft_file(path):
    from torchvision.models.optical_flow import raft_small
    torch.manual_seed(0)
    torch.save(raft_small().state_dict(), path)
    return str(path)


def clip_list(folder, clips=2):
    lines = ["path,caption"]
    for i in range(clips):
        write_video(folder / f"{i}.mp4", torch.rand(3, 6, 32, 40) * 2 - 1)
        lines.append(f"{i}.mp4,a ball that rolls")
    (folder / "clips.csv").write_text("\n".join(lines))
    return str(folder / "clips.csv")


# ---- the losses

def test_the_flow_without_a_network_sees_where_things_go():
    clips, _, scenes = tiny_batch(3, 40)
    found = frame_flow(lucas_kanade, clips)
    assert found.shape == (40, 7, 2, 32, 32)
    for flow, scene in zip(found, scenes):
        dx, dy = (flow[:, i].flatten()[flow.norm(dim=1).flatten() > 0.3].mean().nan_to_num() for i in (0, 1))
        way = {"moving left": -dx, "moving right": dx, "moving up": -dy, "moving down": dy}
        if scene.motion in way:  # about as fast as it is, mostly that way
            true = math.hypot(np.diff(scene.x).mean(), np.diff(scene.y).mean())
            assert 0.5 * true < way[scene.motion] < 1.3 * true
            assert way[scene.motion] == max(way[scene.motion], abs(dx), abs(dy))
        elif scene.motion == "standing still":
            assert flow.abs().max() < 0.05
        else:  # growing: away from the centre
            away = torch.arange(32) - float(scene.x.mean()) + 0.5
            assert (flow[:, 0] * away).sum() * (1 if scene.motion == "growing" else -1) > 0
    moves = [i for i, scene in enumerate(scenes) if scene.motion != "standing still"]
    faint = frame_flow(lucas_kanade, 0.05 * clips[moves] + 0.1)
    assert torch.nn.functional.cosine_similarity(faint.flatten(1), found[moves].flatten(1)).min() > 0.98
    x = clips[:2].clone().requires_grad_()
    frame_flow(lucas_kanade, x).square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0
    flat = torch.full((1, 3, 3, 8, 8), 0.1, requires_grad=True)
    frame_flow(lucas_kanade, flat).sum().backward()
    assert torch.isfinite(flat.grad).all()


def test_maps_that_move_as_the_clip_does_cost_least():
    """The loss is near -1 where attention follows the object, above 0 where it goes the other way."""
    clips, captions, _ = tiny_batch(5, 20)
    keep = [i for i, c in enumerate(captions) if "moving" in c]
    clips = clips[keep]
    real = frame_flow(lucas_kanade, clips)
    shape = (clips - clips[..., :1, :1]).abs().sum(1) / 9  # b f h w: brighter where the object is
    maps = [shape.permute(0, 2, 3, 1), shape[..., ::2, ::2].permute(0, 2, 3, 1)]
    follow = demo.text_motion_loss(maps, real, lucas_kanade)
    back = demo.text_motion_loss([m.flip(3) for m in maps], real, lucas_kanade)
    assert follow.shape == (len(keep),) and follow.max() < -0.8 and back.min() > 0


def test_maps_of_wide_clips():
    maps = [torch.rand(2, 4, 6, 3, requires_grad=True), torch.rand(2, 2, 3, 3, requires_grad=True)]
    real = frame_flow(lucas_kanade, torch.rand(2, 3, 3, 16, 24), 8)
    assert real.shape == (2, 2, 2, 8, 12)
    demo.text_motion_loss(maps, real, lucas_kanade).sum().backward()
    assert all(m.grad.abs().max() > 0 for m in maps)
    assert resize(real, (5, 7)).shape == (2, 2, 2, 5, 7)


def test_all_pairs_of_a_batch_in_one_call():
    calls = []

    def flow(a, b):
        calls.append(len(a))
        return torch.zeros(len(a), 2, *a.shape[2:])
    frame_flow(flow, torch.rand(4, 3, 16, 8, 8))
    assert calls == [60]


# ---- what trains

def small_demo(public, start=True):
    """A base of small width with motion blocks, and the folder of its files."""
    name = "modelscope" if start else "demo"
    folder, tensors = public(name)
    return bases.load_base(name, folder, motion=True, image=True), tensors


def test_motion_blocks_start_as_copies_of_the_spatial_ones(public):
    base, tensors = small_demo(public)
    state = base.net.state_dict()
    entry = "input_blocks.1"
    for k in (k for k in state if k.startswith(f"{entry}.2.")):
        source = k.replace(f"{entry}.2.", f"{entry}.1.")
        assert torch.equal(state[k], tensors["net"][source])
        assert state[k].data_ptr() != state[source].data_ptr()  # training one must not move the other
    assert torch.equal(state[f"{entry}.3.norm.weight"], tensors["net"][f"{entry}.2.norm.weight"])
    content, motion = base.text_encoder.state_dict(), base.motion_encoder.state_dict()
    assert all(torch.equal(content[k], v) and content[k].data_ptr() != v.data_ptr()
               for k, v in motion.items())
    assert base.row.net.motion_blocks and "image encoder" in base.parts()
    assert not bases.BASES["modelscope"].net.motion_blocks


def losses_of(base, video, captions, args, width):
    """demo.clip_losses() of clips, their teacher of images drawing numbers."""
    env = Env(0, 1, torch.device("cpu"), torch.float32)
    image = (lambda x: torch.randn(len(x), width, generator=generator("image")))
    batch = demo.encode_clips(base, env, video, lucas_kanade, image) | {"text": captions}
    generators = [generator("x", i) for i in range(len(video))]
    x0 = pipeline.draw_latents(base, env, batch, generators)
    return demo.clip_losses(base.net, base, batch, x0, generators, args, "", lucas_kanade)


@pytest.mark.parametrize("grad_ckpt, as_published", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("name", ["tiny", "modelscope"])
def test_what_trains_has_a_gradient_and_nothing_else(name, grad_ckpt, as_published, public):
    folder = public(name)[0] if name != "tiny" else None
    base = bases.load_base(name, folder, motion=True, image=name != "tiny")
    demo.train_motion(base, 0 if name == "tiny" else 1, torch.float32)
    base.net.grad_ckpt = grad_ckpt
    base.net.train()
    video = torch.rand(2, 3, *base.row.sample.size) * 2 - 1
    args = Namespace(drop_text=0.1, drop_motion=0.0, as_published=as_published)
    terms = losses_of(base, video, ["a red circle moving left", "a blue square growing"], args,
                      32 if folder else 64)
    assert set(terms) == TERMS and all(v.shape == (2,) for v in terms.values())
    assert terms["text_motion"].requires_grad != as_published
    sum(v.mean() for v in terms.values()).backward()
    blocks = tuple(f"{k}." for k, m in base.net.named_modules() if isinstance(m, models.MotionBlock))
    for part, module in base.parts().items():
        for k, p in module.named_parameters():
            encoder = part == "motion encoder" and (name == "tiny" or "resblocks.1." in k)
            assert p.requires_grad == (encoder or part == "net" and k.startswith(blocks)), (part, k)
            if p.requires_grad:
                assert p.grad is not None and p.grad.abs().max() > 0, (part, k)
            else:
                assert p.grad is None, (part, k)


def test_the_negative_prompt_is_not_pulled_to_the_image():
    """Where the motion encoder reads the negative prompt, regularization is 0; the other samples of the
    batch have the value that they have without any dropping, and the mean stays one over the batch."""
    base = bases.load_base("tiny", motion=True)
    demo.train_motion(base, 0, torch.float32)
    video = tiny_batch(4, 6)[0]
    captions = ["a red circle moving left", "a blue square growing"] * 3
    found = {}
    for share in (0.0, 0.5, 1.0):
        args = Namespace(drop_text=0.0, drop_motion=share, as_published=False)
        found[share] = losses_of(base, video, captions, args, 64)
    regularization = {share: terms["regularization"] for share, terms in found.items()}
    dropped = regularization[0.5] == 0
    assert 0 < dropped.sum() < 6 and (regularization[0.0] != 0).all() and (regularization[1.0] == 0).all()
    assert torch.equal(regularization[0.5][~dropped], regularization[0.0][~dropped])
    for name in ("diffusion", "video_motion", "text_motion"):  # these learn to read the negative prompt
        changed = found[0.5][name] != found[0.0][name]
        assert changed[dropped].any() and not changed[~dropped].any(), name
    encoder = list(base.motion_encoder.parameters())
    gradient, = torch.autograd.grad(regularization[1.0].sum(), encoder[:1], retain_graph=True)
    assert not gradient.any()
    gradient, = torch.autograd.grad(regularization[0.5].sum(), encoder[:1], retain_graph=True)
    assert gradient.any()


def test_the_teachers_are_frozen_and_the_flow_is_in_float32(tmp_path):
    flow = data.raft("small", raft_file(tmp_path / "raft.pth"), "cpu")
    frames = (torch.rand(1, 3, 16, 16) * 2 - 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = flow(frames, frames.flip(3))
    assert found.dtype == torch.float32 and found.requires_grad
    assert torch.equal(found, flow(frames, frames.flip(3)))  # autocast changes nothing


def test_onecycle_is_that_of_the_published_run():
    assert demo.onecycle(0) == (1e-5, 0.85, 0.99)
    assert demo.onecycle(2000) == pytest.approx((5e-5, 0.85, 0.99))
    assert demo.onecycle(4000) == (1e-5, 0.99, 0.99)


def test_two_learning_rates_or_the_published_schedule(quick, tmp_path, monkeypatch):
    groups, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kw):
        groups.append([(g["lr"], *g["betas"]) for g in self.param_groups])
        return step(self, *args, **kw)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    rates = ["--lr", "1e-3", "--encoder-lr", "4e-3", "--warmup", "2", "--lr-schedule", "constant"]
    demo.main([*QUICK, *rates, "--steps", "2", "--out", str(tmp_path / "own")])
    assert groups == [[pytest.approx((lr * share, 0.9, 0.99)) for lr in (1e-3, 4e-3)] for share in (0.5, 1)]
    groups.clear()
    demo.main([*QUICK, *rates, "--steps", "2", "--as-published", "--out", str(tmp_path / "published")])
    assert groups == [[demo.onecycle(k)] * 2 for k in range(2)]


# ---- runs

@pytest.mark.parametrize("options", [
    [], ["--as-published"], ["--text-motion", "0", "--regularization", "0"],
    ["--grad-ckpt", "--accum", "2", "--ema", "0", "--drop-motion", "0.5"]])
def test_options(options, quick, tmp_path):
    demo.main([*QUICK, "--steps", "1", *options, "--out", str(tmp_path)])
    tensors = load_file(tmp_path / "ckpt.safetensors")
    blocks = {k.split(".")[2] for k in tensors if k.startswith("input_blocks.1.")}
    assert blocks == {"2"} and any(k.startswith("motion_encoder.") for k in tensors)
    row, = (json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines())
    assert ("text_motion" in row, "regularization" in row) == (("0" not in options[:2],) * 2)
    if "--as-published" in options:
        group = load_pickle(tmp_path / "state.pt")
        assert row["lr"] == 1e-5 and group["step"] == 1


def test_resume_equals_the_uninterrupted_run_and_sample_plays_it(quick, tmp_path):
    cached = [x for x in QUICK if x != "--no-cache-latents"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinyworld.TinyWorld, "__len__", lambda self: 6)
        demo.main([*cached, "--steps", "4", "--lr-schedule", "constant", "--out", str(tmp_path / "whole")])
        for more in (["--steps", "2"], ["--steps", "4", "--resume"]):
            demo.main([*cached, "--lr-schedule", "constant", *more, "--out", str(tmp_path / "parts")])
    whole, parts = (load_file(tmp_path / d / "ckpt.safetensors") for d in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    for name in ("before.png", "after.png", "after/0000.mp4", "curve.png", "eval.jsonl", "state.pt"):
        assert (tmp_path / "whole" / name).exists(), name

    clips = {}
    for more in ([], ["--sequential", "--decode-chunk", "1"], ["--cfg", "1"]):
        out = tmp_path / "_".join(["s", *more])
        sample.main(["--ckpt", str(tmp_path / "whole"), "--prompt", "a red circle moving left", *more,
                     "--out", str(out)])
        clips["".join(more)] = data.read_video(out / "0000.mp4")[0]
    first = clips.pop("")
    assert (clips["--sequential--decode-chunk1"] - first).abs().max() < 0.1
    assert (clips["--cfg1"] - first).abs().max() > 0.1


def test_resuming_a_finished_and_an_almost_finished_run(quick, tmp_path):
    """Both end as the run that nothing interrupted, bit for bit, also if the kill came before "after"."""
    args = [*QUICK, "--lr-schedule", "constant", "--save-every", "1"]
    for out, steps, more in (("whole", 3, []), ("parts", 2, []), ("parts", 3, ["--resume"])):
        demo.main([*args, "--steps", str(steps), *more, "--out", str(tmp_path / out)])
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def same():
        weights = [load_file(out / "ckpt.safetensors") for out in (whole, parts)]
        assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
        logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in read_lines(out / "log.jsonl")]
                for out in (whole, parts)]
        assert logs[0] == logs[1] and len(logs[0]) == 3
        ends = [[row for row in read_lines(out / "eval.jsonl") if row["step"] != 2] for out in (whole, parts)]
        assert ends[0] == ends[1] and [row["step"] for row in ends[0]] == [0, 3]
        assert (parts / "after.png").read_bytes() == (whole / "after.png").read_bytes()
    same()
    demo.main([*args, "--steps", "3", "--resume", "--out", str(parts)])  # no step is left
    same()
    (parts / "after.png").unlink()
    kept = [row for row in read_lines(parts / "eval.jsonl") if row["step"] < 3]
    (parts / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    demo.main([*args, "--steps", "3", "--resume", "--out", str(parts)])
    same()


def test_the_motion_words_reach_the_clip_by_the_motion_encoder_too(quick, tmp_path, monkeypatch):
    """Both branches of guidance: motion(prompt) against motion(negative)."""
    demo.main([*QUICK, "--steps", "1", "--out", str(tmp_path / "run")])
    seen, forward = [], models.UNet3D.forward

    def spy(self, x, t, text, motion_text=None, **kw):
        seen.append((text, motion_text))
        return forward(self, x, t, text, motion_text=motion_text, **kw)
    monkeypatch.setattr(models.UNet3D, "forward", spy)
    sample.main(["--ckpt", str(tmp_path / "run"), "--prompt", "a red circle moving left", "--negative",
                 "a blue square", "--sequential", "--out", str(tmp_path / "s")])
    (text, motion), (null, null_motion) = seen[:2]
    assert not torch.equal(text, null) and not torch.equal(motion, null_motion)
    assert not torch.equal(text, motion)  # the encoder has moved away from its start


def launch(processes, out, *more):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*(run if processes > 1 else [sys.executable]), "demo.py", "--base", "tiny", "--batch", "1",
         "--steps", "2", "--accum", str(2 // processes), "--eval-n", "1", "--no-cache-latents", "--grad-ckpt",
         "--warmup", "0", "--lr", "1e-4", "--encoder-lr", "1e-4", "--lr-schedule", "constant",
         "--out", str(out), *more],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return read_state(Path(out))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launch(1, tmp_path_factory.mktemp("one") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(parallel, one, tmp_path):
    """DDP, and FSDP2 as ZeRO-2, with checkpointing: the same gradients, and all that trains has one."""
    grads = {k: v["exp_avg"] for k, v in one["moments"].items()}
    assert all(g.abs().max() > 0 for g in grads.values())
    assert {k.split(".")[0] for k in grads} == {
        "input_blocks", "middle_block", "output_blocks", "motion_encoder"}
    total = torch.cat([g.flatten() for g in grads.values()])
    two = launch(2, tmp_path / "two", "--parallel", parallel)
    assert two["seen"] == one["seen"] == 4 and two["moments"].keys() == grads.keys()
    other = torch.cat([two["moments"][k]["exp_avg"].flatten() for k in grads])
    assert (other - total).norm() < 1e-5 * total.norm()


def test_zero_2_keeps_whole_weights_until_the_backward_pass(monkeypatch):
    from torch.distributed import fsdp
    seen = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **kw: seen.append(kw) or module)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    encoder = tinyworld.TinyText(["a"])
    for reshard in (False, True):
        models.parallelize(encoder, spread("fsdp"), torch.device("cpu"), reshard=reshard)
    assert seen == [{"reshard_after_forward": False}] * 2 + [{}] * 2


# ---- public bases at small width

@pytest.mark.parametrize("name", ["modelscope", "demo"])
def test_trains_on_public_files_and_samples(name, public, tmp_path):
    folder, _ = public(name)
    args = ["--base", name, "--weights", folder, "--data", clip_list(tmp_path), "--steps", "1",
            "--batch", "1", "--accum", "1", "--workers", "0", "--encoder-from", "1", "--flow-weights",
            raft_file(tmp_path / "raft.pth"), "--dtype", "bf16", "--read-fps", "8"]
    demo.main([*args, "--out", str(tmp_path / "run")])
    tensors, meta = weights.load_checkpoint(tmp_path / "run")
    assert meta["sample"]["negative"] == bases.NEGATIVE
    assert {k.split(".")[3] for k in tensors if k.startswith("motion_encoder.")} == {"1"}
    assert all(v.dtype == torch.float32 for v in tensors.values())
    row, = (json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert all(math.isfinite(row[k]) for k in TERMS)
    sample.main(["--ckpt", str(tmp_path / "run"), "--weights", folder, "--prompt", "a ball", "--sequential",
                 "--decode-chunk", "1", "--dtype", "bf16", "--out", str(tmp_path / "s")])
    assert (tmp_path / "s" / "0000.mp4").exists()


def test_no_frozen_weight_loses_precision_in_what_trains(public):
    """fp32 where it trains, --dtype elsewhere in the network."""
    base, tensors = small_demo(public, start=False)
    demo.train_motion(base, 1, torch.bfloat16)
    for k, p in base.net.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
        if p.requires_grad:
            assert torch.equal(p, tensors["net"][k])


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not here")
def test_real_clips(public, tmp_path):
    folder, _ = public("modelscope")
    clips = [p for p in sorted(CLIPS.iterdir()) if p.stem in CAPTIONS]
    (tmp_path / "clips.csv").write_text("path,caption\n" + "".join(
        f"{p},{CAPTIONS[p.stem]}\n" for p in clips))
    demo.main([
        "--base", "modelscope", "--weights", folder, "--data", str(tmp_path / "clips.csv"), "--steps", "3",
        "--batch", "2", "--accum", "1", "--workers", "0", "--encoder-from", "1", "--flow-weights",
        raft_file(tmp_path / "raft.pth"), "--height", "32", "--width", "48", "--cache-latents", "--out",
        str(tmp_path / "run")])
    rows = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(np.isfinite(r["loss"]) for r in rows)
    assert (tmp_path / "run" / "after.png").exists()


# ---- the base that is blind to motions

def test_the_words_for_motions_are_one_to_tiny_weak(monkeypatch):
    """Only the content of motion words goes; what the encoder makes of all others stays."""
    tiny, weak = (bases.load_base(name, motion=name == "tiny-weak") for name in ("tiny-clean", "tiny-weak"))
    old, new = (b.text_encoder.token_embedding.weight for b in (tiny, weak))
    words = list(tiny.text_encoder.words)
    motions = {w for m in tinyworld.MOTIONS for w in m.split()}
    for word in words:
        i = words.index(word) + 1
        assert torch.equal(old[i], new[i]) == (word not in motions)
    left, right = words.index("left") + 1, words.index("right") + 1
    assert torch.equal(new[left], new[right])
    assert torch.equal(weak.motion_encoder.token_embedding.weight, new)  # DEMO's starts as blind
    for k, v in tiny.net.state_dict().items():
        moved = [name for name in weak.net.state_dict() if models.demo_source(name, weak.net) == k]
        assert moved and all(torch.equal(weak.net.state_dict()[name], v) for name in moved)
    monkeypatch.setitem(bases.BASES, "tiny-weak", replace(bases.BASES["tiny-weak"], motion_words=0.1))
    new = bases.load_base("tiny-weak").text_encoder.token_embedding.weight
    kept = (new[left] - new[right]).norm() / (old[left] - old[right]).norm()
    assert kept.item() == pytest.approx(0.1, rel=1e-3)


def test_errors_are_one_line(message, public, tmp_path):
    out = ["--out", str(tmp_path / "x")]
    assert "--data" in message(demo.main, out)
    assert "does not run on it" in message(demo.main, ["--base", "videocrafter2", "--data", ".", *out])
    assert "--encoder-from 7: the motion encoder has the blocks 0..0" in message(
        demo.main, [*QUICK, "--encoder-from", "7", *out])
    folder, _ = public("modelscope")
    listed = clip_list(tmp_path)
    assert "--flow-weights" in message(demo.main, [
        "--base", "modelscope", "--weights", folder, "--data", listed, "--read-fps", "8", *out])
    assert hub.CLIP.text_layers == 3 and not (tmp_path / "x").exists()
