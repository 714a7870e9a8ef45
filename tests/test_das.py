"""das.py: the branch at step 0, gradients, buckets, resume, processes, small public bases, sampling."""
from dataclasses import replace

import pytest
import test_dist
import test_transformers
import torch
from PIL import Image
from safetensors.torch import load_file

import bases
import common
import das
import dit
import pipeline
import sample
import tinyworld
from common import generator, read_lines
from data import read_video, video_info, write_video
from dit import TRACK_BRANCH
from weights import load_pickle

TINY = ["--base", "tiny-cogvideox", "--batch", "2", "--eval-n", "1", "--tracking-blocks", "2", "--warmup",
        "1", "--lr-schedule", "constant", "--save-every", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few clips, two sampler steps."""
    monkeypatch.setattr(das, "TINY_CLIPS", 6)
    row = bases.BASES["tiny-cogvideox"]
    quick = replace(row, sample=replace(row.sample, sample_steps=2))
    monkeypatch.setitem(bases.BASES, "tiny-cogvideox", quick)


def train(out, steps, *more):
    das.main([*TINY, "--steps", str(steps), "--out", str(out), *more])


def random_branch(net):
    """Linear layers that are not zero."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "combine_linear" in name:
                p.copy_(torch.randn(p.shape) * 0.05)


# ---- the tiny base

def test_step_0_is_the_base_and_the_strength_scales_the_branch():
    plain, base = bases.load_base("tiny-cogvideox"), bases.load_base("tiny-cogvideox", tracks=3)
    x, first = torch.randn(2, 8, 5, 16, 16), torch.randn(2, 8, 1, 16, 16)
    t, text = torch.tensor([20, 900]), base.encode_text(["a red circle", "a blue square"])
    cond = {"tracks": torch.randn(2, 8, 5, 16, 16), "first_track": torch.randn(2, 8, 1, 16, 16)}
    with torch.no_grad():
        before = plain.net(x, t, text, first)
        assert torch.equal(base.net(x, t, text, first, **cond), before)
        assert all(torch.equal(base.net.state_dict()[k.replace("blocks_copy", "blocks")], v)
                   for k, v in base.net.state_dict().items() if "_copy." in k)
        random_branch(base.net)
        out = [base.net(x, t, text, first, **cond, track_strength=torch.tensor([s, 1.0]))
               for s in (0.0, 0.5, 1.0)]
        assert torch.equal(out[0][0], before[0]) and (out[2][0] - before[0]).abs().max() > 1e-3
        assert (out[1][0] - out[2][0]).abs().max() > 1e-4
        whole = base.net(x, t, text, first, **cond)
        assert all(torch.equal(o[1], whole[1]) for o in out) and torch.equal(out[2], whole)
        assert torch.equal(base.net(x, t, text, first), before)  # without tracks the branch rests


def loss_of(base, items, drop=0.0, first=0):
    from common import Env
    env = Env(0, 1, torch.device("cpu"), torch.float32)
    batch = torch.utils.data.default_collate(items)
    generators = [generator("x", first + i) for i in range(len(items))]
    latents, picture = das.draw_batch(base, env, batch, generators)
    return das.das_loss(base.net, base, latents, picture, batch["text"], generators, drop)


def test_only_the_branch_trains_and_all_of_it():
    base = bases.load_base("tiny-cogvideox", tracks=2, dtype=None)
    base.freeze(torch.float32, but=["net"])
    das.train_branch(base.net, torch.float32)
    random_branch(base.net)
    base.net.grad_ckpt = True
    base.net.train()
    items = [tinyworld.TinyTracks(2, 9)[i, 0] for i in range(2)]
    loss_of(base, items).mean().backward()
    for name, p in base.net.named_parameters():
        branch = name.startswith(TRACK_BRANCH)
        assert branch == p.requires_grad == (p.grad is not None and bool(p.grad.abs().max() > 0)), name
    das.train_branch(base.net, torch.bfloat16)
    assert {p.dtype for p in base.net.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in base.net.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_image_and_first_track_are_dropped_together_the_tracks_never():
    base = bases.load_base("tiny-cogvideox", tracks=2)
    items, seen = [tinyworld.TinyTracks(2, 9)[i, 0] for i in range(2)], []
    forward = base.net.forward
    base.net.forward = lambda *args, **cond: seen.append(cond) or forward(*args, **cond)
    with torch.no_grad():
        first = loss_of(base, items)
        assert torch.equal(loss_of(base, items), first)  # all that is random is keyed
        loss_of(base, items, drop=1.0)
    assert seen[0]["first_frame"].any() and seen[0]["first_track"].any()
    assert not seen[2]["first_frame"].any() and not seen[2]["first_track"].any()
    assert torch.equal(seen[2]["tracks"], seen[0]["tracks"]) and seen[0]["tracks"].any()
    with torch.no_grad():  # a clip's loss does not depend on its neighbours
        assert torch.allclose(loss_of(base, items[1:], first=1), first[1:], atol=1e-6)


def test_resume_equals_the_uninterrupted_run_and_samples(tmp_path, message):
    train(tmp_path / "whole", 3)
    train(tmp_path / "parts", 2)
    train(tmp_path / "parts", 3, "--resume")
    whole, parts = (load_file(tmp_path / d / "ckpt.safetensors") for d in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert all(k.startswith(TRACK_BRANCH) for k in whole)
    rows = read_lines(tmp_path / "whole" / "eval.jsonl")
    assert [r["step"] for r in rows] == [0, 3] and set(rows[1]["shape"]) == set(tinyworld.TINY_TRACKS)
    assert (tmp_path / "whole" / "before.png").exists() and (tmp_path / "whole" / "after.png").exists()
    assert "has tracking_blocks 2, not 3" in message(
        das.main, [*TINY, "--tracking-blocks", "3", "--out", str(tmp_path / "whole"), "--resume"])

    item, _ = tinyworld.tiny_track_clip(5, "camera", 9)
    pipeline.frame_picture(item["video"][:, 0]).save(tmp_path / "first.png")
    write_video(tmp_path / "tracks.mp4", item["tracks"])
    clips = []
    for more in ((), ("--track-strength", "0"), ("--track-strength", "0")):
        out = tmp_path / f"s{len(clips)}"
        sample.main(["--ckpt", str(tmp_path / "whole"), "--image", str(tmp_path / "first.png"), "--tracks",
                     str(tmp_path / "tracks.mp4"), "--prompt", item["text"], "--n", "2", *more, "--out",
                     str(out)])
        clips.append(read_video(out / "0001.mp4")[0])
        assert video_info(out / "side" / "0001.mp4")[2] == (32, 96) and (out / "sheet.png").exists()
    side = read_video(tmp_path / "s0" / "side" / "0000.mp4")[0]
    assert (side[..., 32:64] - item["tracks"]).abs().mean() < 0.15
    assert (side[:, 5, :, :32] - item["video"][:, 0]).abs().mean() < 0.1
    assert torch.equal(clips[1], clips[2]) and not torch.equal(clips[0], clips[1])
    words = ["--prompt", "a red circle", "--image", str(tmp_path / "first.png"), "--out", str(tmp_path / "x")]
    assert "--tracks" in message(sample.main, ["--ckpt", str(tmp_path / "whole"), *words])
    assert "no such condition" in message(
        sample.main, ["--base", "tiny-cogvideox", "--track-strength", "1", *words])


def test_a_finished_run_and_one_that_lacks_a_step_go_on(tmp_path):
    """A finished run is evaluated anew, an almost finished one makes its last step; neither trains a step
    twice or writes a line twice."""
    train(tmp_path / "run", 2)
    before = load_file(tmp_path / "run" / "ckpt.safetensors")
    rows = read_lines(tmp_path / "run" / "eval.jsonl")
    train(tmp_path / "run", 2, "--resume")
    after = load_file(tmp_path / "run" / "ckpt.safetensors")
    assert all(torch.equal(before[k], v) for k, v in after.items())
    assert read_lines(tmp_path / "run" / "eval.jsonl") == rows and [r["step"] for r in rows] == [0, 2]
    assert len(read_lines(tmp_path / "run" / "log.jsonl")) == 2
    train(tmp_path / "run", 3, "--resume", "--preview-every", "2")
    steps = [row["step"] for row in read_lines(tmp_path / "run" / "log.jsonl")]
    assert steps == [0, 1, 2] and load_pickle(tmp_path / "run" / "state.pt")["step"] == 3
    assert [r["step"] for r in read_lines(tmp_path / "run" / "eval.jsonl")] == [0, 2, 3]


@pytest.mark.slow
def test_accumulation_equals_a_large_batch(tmp_path):
    grads = []
    for batch, accum in ((4, 1), (1, 4)):
        out = tmp_path / f"{batch}x{accum}"
        train(out, 1, "--batch", str(batch), "--accum", str(accum), "--no-cache-latents")
        moments = load_pickle(out / "state.pt")["moments"]
        grads.append(torch.cat([moments[k]["exp_avg"].flatten() for k in sorted(moments)]))
    assert all((g - grads[0]).norm() < 2e-6 * grads[0].norm() for g in grads[1:])


@pytest.fixture
def run(tmp_path):
    """A script that is das.py but for clips of one sampler step, and its arguments."""
    script = tmp_path / "quick.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(test_dist.ROOT)!r})\n"
        "import bases, das\nfrom dataclasses import replace\n"
        "row = bases.BASES['tiny-cogvideox']\n"
        "bases.BASES['tiny-cogvideox'] = replace(row, sample=replace(row.sample, sample_steps=1))\n"
        "if __name__ == '__main__':\n    das.main()\n")
    return [str(script), *TINY, "--no-cache-latents", "--steps", "2", "--batch", "1", "--lr", "1e-4"]


@pytest.mark.slow
def test_fsdp_on_two_processes_equals_one(run, tmp_path):
    one = test_dist.launch(1, tmp_path / "one", *run, "--accum", "2")
    two = test_dist.launch(2, tmp_path / "two", *run, "--parallel", "fsdp")
    assert test_dist.relative(two, one, "gradients") < 5e-6


@pytest.mark.slow
def test_ddp_equals_one_and_half_precision_trains_in_float32(run, tmp_path):
    one = test_dist.launch(1, tmp_path / "one", *run, "--accum", "2")
    two = test_dist.launch(2, tmp_path / "ddp", *run)
    assert test_dist.relative(two, one, "gradients") < 5e-6
    half = test_dist.launch(2, tmp_path / "half", *run, "--parallel", "fsdp", "--dtype", "bf16")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in half["weights"].values())


# ---- public bases at small width

@pytest.fixture
def small(monkeypatch, tmp_path):
    """name -> arguments of a run on a small base of that name, four clips of two lengths as its data."""
    def get(name, branch=True):
        row = test_transformers.small(monkeypatch, name)
        test_transformers.publish(tmp_path / "weights", name)
        if not branch:  # as CogVideoX-5B-I2V's
            import json
            folder = tmp_path / "weights" / "transformer"
            for index in folder.glob("*.index.json"):
                weights = json.loads(index.read_text())
                keep = {k: v for k, v in weights["weight_map"].items() if not k.startswith(TRACK_BRANCH)}
                for shard in set(weights["weight_map"].values()):
                    state = load_file(folder / shard)
                    from safetensors.torch import save_file
                    save_file({k: v for k, v in state.items() if k in keep}, folder / shard)
                index.write_text(json.dumps(weights | {"weight_map": keep}))
        h, w = row.sample.height, row.sample.width
        lists = {"prompt.txt": [], "videos.txt": [], "trackings.txt": []}
        for i in range(4):
            frames = 9 if i < 2 else 4
            for kind in ("videos", "tracking"):
                write_video(tmp_path / f"data/{kind}/{i}.mp4", torch.rand(3, frames, h, w) * 2 - 1)
            line = "a red ball moves to the left", f"videos/{i}.mp4", f"tracking/{i}.mp4"
            for file, text in zip(lists, line):
                lists[file].append(text)
        for file, lines in lists.items():
            (tmp_path / "data" / file).write_text("\n".join(lines))
        return ["--base", name, "--weights", str(tmp_path / "weights"), "--data", str(tmp_path / "data"),
                "--buckets", f"1x{h}x{w}", "--tracking-blocks", "2", "--workers", "0", "--batch", "1",
                "--accum", "1", "--eval-n", "1", "--steps", "2", "--save-every", "1",
                "--out", str(tmp_path / "run")]
    return get


@pytest.mark.parametrize("name, more", [
    ("das", ["--cache-latents"]), ("cogvideox-5b-i2v", []), ("cogvideox-5b", []),
    ("cogvideox-2b", ["--ema", "0.9"])])
def test_trains_resumes_and_samples(name, more, small, tmp_path):
    args = [*small(name), *more]
    das.main(args)
    args[args.index("--steps") + 1] = "3"
    das.main([*args, "--resume"])
    tensors = load_file(tmp_path / "run" / "ckpt.safetensors")
    assert tensors and all(k.startswith(TRACK_BRANCH) for k in tensors)
    Image.new("RGB", (30, 20), (9, 99, 9)).save(tmp_path / "first.png")
    image = ["--image", str(tmp_path / "first.png")] if bases.BASES[name].first_frame else []
    sample.main(["--ckpt", str(tmp_path / "run"), *image, "--tracks", str(tmp_path / "data/tracking/0.mp4"),
                 "--weights", args[3], "--prompt", "a red ball", "--out", str(tmp_path / "s")])
    assert video_info(tmp_path / "s" / "side" / "0000.mp4")[2][1] == 3 * bases.BASES[name].sample.width


def test_evaluation_is_on_clips_that_are_not_trained_on(small, tmp_path):
    """Two clips of 9 and two of 4 frames, which are read as pictures: one of 9 frames is held out."""
    words = small("das")
    (tmp_path / "data" / "prompt.txt").write_text("\n".join("abcd"))

    def texts(*more):
        args = das.get_args([*words, *more])
        training, clips = das.read_data(args, bases.choose_sampling("das", args, method="das"))
        return [[row[-1] for row in part.rows] for part in training.parts], [clip["text"] for clip in clips]
    assert texts() == ([["c", "d"], ["a"]], ["b"])
    assert texts("--eval-data", str(tmp_path / "data"), "--eval-n", "3") == ([["c", "d"], ["a", "b"]], ["a", "b"])
    assert texts("--eval-n", "2") == ([["c", "d"], ["a", "b"]], ["a", "b"])  # too few: with a warning


def test_das_starts_from_the_files_of_i2v(small, tmp_path):
    """--base das with CogVideoX-5B-I2V's files, in bf16: exact copies in fp32; linear layers of zeros."""
    args = small("das", branch=False)
    seen, step = {}, common.FiniteGuard.step

    def spy(self, opt, *a, **kw):
        seen.setdefault("weights", [p.detach().clone() for p in opt.param_groups[0]["params"]])
        return step(self, opt, *a, **kw)
    common.FiniteGuard.step = spy
    try:
        das.main([*args, "--dtype", "bf16"])
    finally:
        common.FiniteGuard.step = step
    public = {}
    for shard in (tmp_path / "weights/transformer").glob("*.safetensors"):
        public |= load_file(shard)
    names = list(load_file(tmp_path / "run" / "ckpt.safetensors"))
    trained = {p.shape for p in seen["weights"]}
    assert len(names) == len(seen["weights"]) and trained
    net = dit.CogVideoX(bases.BASES["das"].net)
    order = [k for k, _ in net.named_parameters() if k.startswith(TRACK_BRANCH)]
    for k, p in zip(order, seen["weights"]):
        assert p.dtype == torch.float32
        if "_copy." in k:
            assert torch.equal(p, public[k.replace("_copy", "", 1)].float()), k
        else:
            assert not p.any(), k


# ---- errors

def test_errors_are_one_line(message, tmp_path, small):
    out = ["--out", str(tmp_path / "x")]
    assert "--data" in message(das.main, out)
    assert "goes with --data" in message(das.main, ["--eval-data", str(tmp_path), *out])
    assert "branch of das has" in message(das.main, [*small("das"), "--tracking-blocks", "3", *out])
    assert "tiny-cogvideox" in message(das.main, ["--base", "tiny-i2v", *out])
    tiny = ["--base", "tiny-cogvideox", *out]
    assert "6 blocks to copy" in message(das.main, [*tiny, "--tracking-blocks", "7"])
    assert "'9x32' is not FRAMES" in message(das.main, [*tiny, "--buckets", "9x32"])
    assert "nearest" in message(das.main, [*tiny, "--buckets", "8x32x32", "--data", str(tmp_path)])
    assert "no such folder" in message(das.main, ["--base", "das", "--data", "none", *out])
    assert "--drop-image" in message(das.main, [*tiny, "--drop-image", "2"])
    (tmp_path / "prompt.txt").write_text("a\n")
    assert "videos.txt: no such file" in message(das.main, ["--base", "das", "--data", str(tmp_path), *out])
    assert not (tmp_path / "x").exists()
