"""DreamVideo: its stages train what they say, resume, join; files in the published layout; CLIP and DINO.

Its losses are oracle cases (dreamvideo/loss_*), as are networks, textual inversion, inversion and metrics.
"""
import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_dist import launch, relative

import bases
import common
import data
import dreamvideo
import metrics
import pipeline
import sample
import tinyworld
from models import Adapter
from text_encoders import DINO, dino_name
from weights import load_checkpoint, load_pickle

SHARED = Path(__file__).parent.parent.parent.parent / "shared" / "data"
STAGES = ("token", "identity", "motion")
CONSTANT = ["--lr-schedule", "constant", "--save-every", "2"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Two sampler steps, no contact sheets; the collector, called at each mp4, passes over what is here."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as m:
        row = bases.BASES["tiny-dreamvideo"]
        m.setitem(bases.BASES, "tiny-dreamvideo", replace(row, sample=replace(row.sample, sample_steps=2)))
        m.setattr(sample, "contact_sheet", lambda *args, **kw: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def runs(quick, tmp_path_factory):
    """{stage: folder} of a run of 4 steps that nothing disturbed."""
    root = tmp_path_factory.mktemp("runs")
    for stage in STAGES:
        train(stage, root / stage, root / "token", *CONSTANT, "--steps", "4")
    return {stage: root / stage for stage in STAGES}


@pytest.fixture
def no_previews(monkeypatch):
    monkeypatch.setattr(dreamvideo, "evaluate", lambda *args: None)
    monkeypatch.setattr(common, "draw_curve", lambda *args: None)


def train(stage, out, token, *more):
    word = ["--learned", str(token)] if stage == "identity" else []
    dreamvideo.main(["--base", "tiny", "--stage", stage, "--batch", "2", "--out", str(out), *word, *more])


def play(out, *args):
    """sample.py -> its clips (as written) and its index."""
    sample.main([*map(str, args), "--out", str(out)])
    rows = [json.loads(x) for x in (out / "index.jsonl").read_text().splitlines()]
    return torch.stack([data.read_video(out / r["file"])[0] for r in rows]), rows


# ---- training

@pytest.mark.parametrize("stage", STAGES)
def test_resume_equals_the_uninterrupted_run(stage, runs, no_previews, tmp_path):
    train(stage, tmp_path, runs["token"], *CONSTANT, "--steps", "2")
    train(stage, tmp_path, runs["token"], *CONSTANT, "--steps", "4", "--resume")
    whole, parts = (load_file(folder / "ckpt.safetensors") for folder in (runs[stage], tmp_path))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    for name in ("before.png", "after.png", "curve.png", "after/0000.mp4", "eval.jsonl"):
        assert (runs[stage] / name).exists(), name


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_a_finished_and_an_almost_finished_run(stage, runs, tmp_path):
    """Both end as the run that nothing interrupted, bit for bit, also if the kill came before "after"."""
    whole, parts = runs[stage], tmp_path / "run"
    shutil.copytree(whole, parts)

    def resume():
        train(stage, parts, runs["token"], *CONSTANT, "--steps", "4", "--resume")
        weights = [load_file(out / "ckpt.safetensors") for out in (whole, parts)]
        assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
        logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in common.read_lines(out / "log.jsonl")]
                for out in (whole, parts)]
        assert logs[0] == logs[1] and len(logs[0]) == 4
        ends = [common.read_lines(out / "eval.jsonl") for out in (whole, parts)]
        assert ends[0] == ends[1] and [row["step"] for row in ends[0]] == [0, 4]
        assert (parts / "after.png").read_bytes() == (whole / "after.png").read_bytes()
    resume()  # no step is left
    (parts / "after.png").unlink()
    first = json.dumps(common.read_lines(parts / "eval.jsonl")[0])
    (parts / "eval.jsonl").write_text(first + "\n")
    resume()
    train(stage, tmp_path / "short", runs["token"], *CONSTANT, "--steps", "3")
    shutil.rmtree(parts)
    (tmp_path / "short").rename(parts)  # one step is left
    (parts / "eval.jsonl").write_text(first + "\n")
    resume()


@pytest.mark.parametrize("base", ["tiny", "tiny-dreamvideo"])
def test_new_adapters_change_nothing_and_can_learn(base, monkeypatch):
    """As loaded all zeros; after prepare() only `up` is, in the layers of the stage and in all others."""
    args = dreamvideo.get_args(["--base", base, "--stage", "motion"])
    assert args.base == "tiny-dreamvideo"
    plain, adapted = bases.load_base("tiny-clean"), bases.load_base(args.base)
    state = {k: v for k, v in adapted.net.state_dict().items() if "_adapter." in k}
    assert state and not any(v.any() for v in state.values())
    inputs = torch.randn(1, 4, 8, 8, 8), torch.tensor([500]), plain.encode_text(["a red circle"])
    with torch.no_grad():
        expected = plain.net(*inputs)
        assert torch.equal(adapted.net(*inputs), expected)
        dreamvideo.prepare(args, adapted, None)
        assert torch.equal(adapted.net(*inputs), expected)
    for k, v in adapted.net.state_dict().items():
        assert "_adapter." not in k or bool(v.any()) != ("up_linear" in k), k
    adapters = [module for module in adapted.net.modules() if isinstance(module, Adapter)]
    for adapter in adapters:  # as if somebody had trained them: nothing is drawn anew
        adapter.up_linear.weight.data.fill_(1)
        adapter.down_linear.weight.data.zero_()
    dreamvideo.prepare(args, adapted, None)
    assert not any(adapter.down_linear.weight.any() for adapter in adapters)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_its_part_and_nothing_else(stage, runs):
    tensors, meta = load_checkpoint(runs[stage])
    assert meta["stage"] == stage and meta["base"] == "tiny-dreamvideo" and meta["step"] == 4
    words = {k for k in tensors if k.startswith("string_to_param.")}
    adapters = tensors.keys() - words
    start = load_checkpoint(runs["token"])[0]
    fresh = bases.load_base("tiny-dreamvideo").net.state_dict()
    every = {k for k in fresh if "_adapter." in k}
    blocks = {k.split(".ff_adapter")[0] + "." for k in every if "ff_adapter" in k}  # of the layers over time
    motion = {k for k in every if k.startswith(tuple(blocks))}
    expected = {"token": set(), "identity": every - motion, "motion": motion}[stage]
    assert adapters == expected and len(every - motion) > 10 and len(motion) > 30
    assert all(tensors[k].abs().max() > 0 for k in adapters if "up_linear" in k)  # from zero: all learn
    if stage == "token":
        base = bases.load_base("tiny-dreamvideo")
        ids = base.tokenize(["white circle"])[0, :2]
        first = base.text_encoder.token_embedding.weight[ids]
        moved = (tensors["string_to_param.*"] - first).abs()
        assert tensors["string_to_param.*"].shape == (2, 64) and (moved > 0).all() and moved.max() < 0.1
    elif stage == "identity":  # carried along, frozen
        assert words and torch.equal(*(t["string_to_param.*"] for t in (tensors, start)))
    else:
        assert not words


@pytest.mark.parametrize("stage", ["token", "motion"])
def test_accumulation_equals_a_large_batch(stage, runs, no_previews, tmp_path):
    grads = []
    for batch, accum in ((4, 1), (2, 2)):
        out = tmp_path / f"{batch}x{accum}"
        train(stage, out, runs["token"], "--steps", "1", "--batch", str(batch), "--accum", str(accum),
              "--drop-text", "0.5")
        moments = load_pickle(out / "state.pt")["moments"]
        grads.append(torch.cat([m["exp_avg"].flatten() for k, m in sorted(moments.items()) if m]))
    assert (grads[0] - grads[1]).norm() < 2e-6 * grads[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["token", "motion"])
def test_two_processes_equal_one(stage, tmp_path):
    (tmp_path / "one.txt").write_text("a red circle\n")  # a short preview
    args = ["dreamvideo.py", "--base", "tiny", "--stage", stage, "--steps", "2", "--batch", "1", "--lr",
            "1e-4", "--eval-prompts", str(tmp_path / "one.txt")]
    one = launch(1, tmp_path / "one", *args, "--accum", "2")
    two = launch(2, tmp_path / "two", *args)
    assert two["seen"] == one["seen"] == 4
    assert relative(two, one, "weights") < 1e-6


def test_masks_and_dropped_conditions_reach_the_loss(runs, no_previews, tmp_path, monkeypatch):
    seen, loss = [], dreamvideo.adapter_loss

    def spy(net, schedule, x0, noise, t, text, mask=None, **cond):
        seen.append((None if mask is None else mask.clone(), text.clone(), cond))
        return loss(net, schedule, x0, noise, t, text, mask, **cond)
    monkeypatch.setattr(dreamvideo, "adapter_loss", spy)
    train("identity", tmp_path / "a", runs["token"], "--steps", "1", "--masked-loss")
    train("identity", tmp_path / "b", runs["token"], "--steps", "1", "--no-masked-loss")
    mask = seen[0][0]
    assert mask.shape == (2, 1, 8, 8, 8) and 0 <= mask.min() < mask.max() <= 1 and seen[1][0] is None
    assert 0.1 < mask.mean() < 0.5 and not seen[0][2]
    seen.clear()
    train("motion", tmp_path / "c", None, "--steps", "1", "--drop-text", "1", "--drop-image", "1")
    train("motion", tmp_path / "d", None, "--steps", "1", "--drop-text", "0", "--drop-image", "0")
    (_, text, cond), (_, other, image) = seen
    assert cond["appearance"].abs().max() == 0 and torch.equal(text[0], text[1])  # both are the negative text
    assert (image["appearance"].abs().amax((1, 2)) > 0).all() and not torch.equal(other[0], other[1])


# ---- sampling

def test_subject_motion_and_both(runs, tmp_path):
    item = tinyworld.tiny_subject(0, 1)[0]
    picture = tmp_path / "picture.png"
    pipeline.frame_picture(item["video"][:, 0]).save(picture)
    prompt, n = ["--prompt", "a * moving on a gray background"], iter(range(99))

    def clips(*args):
        return play(tmp_path / str(next(n)), *prompt, *args)[0]
    subject, motion = ["--ckpt", runs["identity"]], ["--ckpt", runs["motion"]]
    image = ["--appearance-image", picture]
    joint, rows = play(tmp_path / "joint", *prompt, *subject, *motion, *image)
    assert rows[0]["adapters"] == [str(runs["identity"]), str(runs["motion"])]
    assert rows[0]["appearance_image"] == str(picture) and rows[0]["sample_steps"] == 2
    assert torch.equal(joint, clips(*motion, *subject, *image))  # in any order
    for other in (clips(*subject), clips(*subject, *motion),
                  clips(*subject, *motion, *image, "--strength", 1, 0),
                  clips("--ckpt", f"{runs['identity']}:2", *motion, *image),
                  clips("--ckpt", runs["token"], *motion, *image)):
        assert (other - joint).abs().max() > 0
    # strength 0 in both branches is no image at all
    assert torch.equal(clips(*subject, *motion, *image, "--strength", 0, 0), clips(*subject, *motion))
    # never, some of the time, always: the subject's adapters (its word is another matter)
    late = [clips(*subject, *motion, *image, "--subject-below", t) for t in (0, 600, 1000)]
    assert torch.equal(late[0], clips("--ckpt", runs["token"], *motion, *image))
    assert torch.equal(late[2], joint) and all((late[1] - late[i]).abs().max() > 0 for i in (0, 2))
    (tmp_path / "list.txt").write_text("# image|||prompt\npicture.png|||a * moving on a gray background\n")
    listed, rows = play(tmp_path / "listed", *subject, *motion, "--prompts", tmp_path / "list.txt")
    assert torch.equal(listed, joint) and rows[0]["appearance_image"].endswith("picture.png")


def test_inverse_noise(runs, tmp_path):
    clip = tinyworld.tiny_motion(0, 1, "circling")[0].items[0]["video"]
    data.write_video(tmp_path / "clip.mp4", clip)
    args = ["--ckpt", runs["motion"], "--prompt", "a red circle moving", "--n", "2"]
    mix = ["--video", tmp_path / "clip.mp4", "--inverse-noise"]
    plain = play(tmp_path / "0", *args)[0]
    some, all_ = (play(tmp_path / s, *args, *mix, s)[0] for s in ("0.5", "1"))
    assert (plain - some).abs().max() > 0.1 and (some[0] - some[1]).abs().max() > 0.1
    assert (all_[0] - all_[1]).abs().max() < 0.02  # no noise of its own is left


def test_published_layout_both_ways(runs, no_previews, tmp_path, capsys):
    files = {}
    for stage in STAGES:
        bases.main(["--export", "dreamvideo", str(runs[stage]), str(tmp_path / stage)])
        files[stage] = Path(capsys.readouterr().out.strip())
    assert files["token"].name == "text_embedding_of_*_0000004.pth"
    assert files["motion"].name == files["identity"].name == "adapter_00000004.pth"
    state = load_pickle(files["motion"])
    assert set(state) == {"state_dict", "step"} and state["step"] == 4
    assert all(isinstance(v, torch.nn.Parameter) for v in state["state_dict"].values())
    bases.main(["--export", "dreamvideo", f"{runs['motion']}:2", str(tmp_path)])
    assert capsys.readouterr().out.strip().endswith("adapter_00000002.pth")
    prompt = ["--prompt", "a * moving on a gray background"]
    ours = play(tmp_path / "ours", *prompt, "--ckpt", runs["identity"], "--ckpt", runs["motion"])[0]
    theirs = play(tmp_path / "theirs", *prompt, "--base", "tiny-dreamvideo", "--learned", files["token"],
                  "--lora", files["identity"], "--lora", files["motion"])[0]
    assert torch.equal(ours, theirs)
    train("identity", tmp_path / "from-file", files["token"], "--steps", "1")  # and to train on
    a, b = (load_checkpoint(p)[0]["string_to_param.*"] for p in (tmp_path / "from-file", runs["token"]))
    assert torch.equal(a, b)


def test_refused(runs, no_previews, tmp_path, message):
    prompt = ["--prompt", "a * moving"]
    subject = ["--ckpt", str(runs["identity"])]
    assert "trained the same" in message(sample.main, [*subject, *subject, *prompt])
    assert "kept are 2, 4" in message(sample.main, ["--ckpt", f"{runs['motion']}:3", *prompt])
    other = other_run(tmp_path)
    assert "cannot be joined" in message(sample.main, [*subject, "--ckpt", other, *prompt])
    assert "a run of t2v" in message(bases.main, ["--export", "dreamvideo", other, "x"])
    assert "give the same" in message(dreamvideo.main, [
        "--base", "tiny", "--stage", "motion", "--out", str(runs["token"]), "--resume"])
    assert "captions hold *" in message(dreamvideo.main, [
        "--base", "tiny", "--stage", "identity", "--out", str(tmp_path / "x")])


def other_run(tmp_path):
    import t2v
    t2v.main(["--base", "tiny", "--rank", "1", "--steps", "1", "--batch", "1", "--eval-n", "1", "--sample-steps", "1",
              "--no-cache-latents", "--out", str(tmp_path / "other")])
    return str(tmp_path / "other")


# ---- pictures, clips, public bases

def test_read_subject(tmp_path, message):
    (tmp_path / "masks").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 40), "red").save(tmp_path / f"{i}.jpg")
    half = np.zeros((40, 64), np.uint8)
    half[:, :32] = 255
    Image.fromarray(half).save(tmp_path / "masks" / "0.png")
    assert "no mask for 1.jpg" in message(dreamvideo.read_subject, tmp_path, (32, 32), (4, 4))
    assert len(dreamvideo.read_subject(tmp_path, (32, 32))) == 2
    Image.fromarray(half // 2).save(tmp_path / "masks" / "1.png")
    assert "grey pixels" in message(dreamvideo.read_subject, tmp_path, (32, 32), (4, 4))
    Image.fromarray(255 - half).save(tmp_path / "masks" / "1.png")
    items = dreamvideo.read_subject(tmp_path, (32, 32), (4, 4))
    assert items[0]["video"].shape == (3, 1, 32, 32) and items[0]["text"] == "a *"
    assert [x["mask"][0, 0, 0].tolist() for x in items] == [[1, 1, 0, 0], [0, 0, 1, 1]]
    (tmp_path / "list.txt").write_text("1.jpg|||a {} in the snow\n")
    items = dreamvideo.read_subject(tmp_path / "list.txt", (32, 32), (4, 4))
    assert [x["text"] for x in items] == ["a * in the snow"]
    Image.fromarray(half[:20]).save(tmp_path / "masks" / "1.png")
    assert "another size" in message(dreamvideo.read_subject, tmp_path, (32, 32), (4, 4))


def all_stages(public, tmp_path, pictures, clips, *more):
    """The three stages on a small copy of the public base, then both sampled together."""
    folder, _ = public("dreamvideo")
    common = ["--base", "modelscope-v1.5", "--weights", folder, "--steps", "1", "--batch", "1",
              "--workers", "0"]
    out = {stage: str(tmp_path / stage) for stage in STAGES}
    dreamvideo.main([*common, "--stage", "token", "--data", pictures, "--word-init", "dog",
                     "--out", out["token"]])
    dreamvideo.main([*common, "--stage", "identity", "--data", pictures, "--learned", out["token"],
                     "--out", out["identity"]])
    dreamvideo.main([*common, "--stage", "motion", "--data", clips, "--out", out["motion"], *more])
    assert load_checkpoint(out["token"])[0]["string_to_param.*"].shape == (1, 32)
    found, rows = play(tmp_path / "s", "--ckpt", out["identity"], "--ckpt", out["motion"],
                       "--weights", folder, "--prompt", "a * runs on the road")
    assert rows[0]["base"] == "dreamvideo" and torch.isfinite(found).all()
    return found


def test_a_small_copy_of_the_public_base(public, no_previews, tmp_path):
    (tmp_path / "dog" / "masks").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "dog" / f"{i}.jpg")
        mask = Image.fromarray(np.where(np.arange(40) < 20, 255, 0).astype(np.uint8)[None].repeat(30, 0))
        mask.save(tmp_path / "dog" / "masks" / f"{i}.png")
    (tmp_path / "clips").mkdir()
    data.write_video(tmp_path / "clips" / "a.mp4", torch.rand(3, 5, 16, 24) * 2 - 1)
    (tmp_path / "clips" / "a.txt").write_text("a car turns")
    all_stages(public, tmp_path, str(tmp_path / "dog"), str(tmp_path / "clips"))


@pytest.mark.skipif(not SHARED.exists(), reason="needs VGen's demo pictures and clips")
def test_real_pictures_and_a_real_clip(public, no_previews, tmp_path, monkeypatch):
    row = hub.small(monkeypatch, "dreamvideo")
    size = dict(frames=8, height=64, width=64)
    monkeypatch.setitem(bases.BASES, "dreamvideo", replace(row, sample=replace(row.sample, **size)))
    monkeypatch.setattr(hub, "small", lambda *_: row)
    (tmp_path / "clips.txt").write_text(f"{SHARED / 'videos' / 'car_turn.mp4'}|||a car turns\n")
    found = all_stages(public, tmp_path, str(SHARED / "subject_dog"), str(tmp_path / "clips.txt"))
    assert found.shape == (1, 3, 8, 64, 64)


# ---- the tiny world's subject and motion

def test_likeness_and_path_error_on_the_truth():
    subject = tinyworld.tiny_subject(0, 4)
    truth = tinyworld.subject_likeness(torch.stack([x["video"] for x in subject]), subject)
    assert truth["colours"] > 0.95 and truth["shape"] > 0.9
    clips, captions, _ = tinyworld.tiny_batch(1, 24)
    other = tinyworld.subject_likeness(clips, subject)
    assert other["colours"] < 0.3 and other["shape"] < 0.75
    moved = tinyworld.moved_pictures(subject, 8)
    assert len(moved) == 4 * 5 and all(x["video"].shape == (3, 8, 32, 32) for x in moved)
    truth = tinyworld.subject_likeness([x["video"] for x in moved], subject)
    assert truth["colours"] > 0.9 and truth["shape"] > 0.9
    for clip in moved[::5]:  # those that stand still are the pictures
        assert torch.equal(clip["video"], clip["video"][:, :1].expand(-1, 8, -1, -1))
    left = moved[1]
    assert left["text"] == "a * moving left on a black background"
    x, _ = tinyworld._centres(left["mask"][0].numpy())
    assert -9.5 < x[-1] - x[0] < -8.5 and (np.diff(x) < 0).all()
    steady = tinyworld.steadiness([x["video"] for x in moved])["steady"]
    assert steady > 1.9 > tinyworld.steadiness([torch.cat([a["video"][:, :4], b[:, :4]], 1)
                                                for a, b in zip(moved, clips)])["steady"]
    for motion in tinyworld.NEW_MOTIONS:
        few, path = tinyworld.tiny_motion(3, 3, motion)
        items = few.items
        assert tinyworld.path_error([x["video"] for x in items], path)["path_error"] < 0.3
        assert tinyworld.path_error(clips, path)["path_error"] > 2
        assert {tinyworld.judge(x["video"])["motion"] for x in items} == {motion}
        assert all(x["text"].split()[3] == "moving" for x in items)


def test_star():
    place = np.array([[16.0], [16.0], [7.0]])
    scene = tinyworld.Scene("star", "pink", "black", "standing still", *place, "salmon")
    video, mask = tinyworld.render(scene, with_mask=True)
    assert abs(mask.sum() - np.pi * 49) < 8  # the area of a disc of that radius
    assert torch.allclose(mask, mask.flip(-1))
    colours = {tuple(c) for c in data.to_uint8(video)[0].reshape(-1, 3).tolist()}
    assert {tinyworld.NEW_COLOURS["pink"], tinyworld.NEW_COLOURS["salmon"], tinyworld.BACKGROUNDS["black"]} <= colours


# ---- metrics as a command

def test_scores_of_a_folder(tmp_path, monkeypatch, message):
    import open_clip
    eye = dict(image_size=32, layers=1, width=32, patch_size=16, head_width=16)
    words = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
    config = dict(embed_dim=16, vision_cfg=eye, text_cfg=words, quick_gelu=True)
    (tmp_path / "small-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small-clip.json")
    net, _, prepare = open_clip.create_model_and_transforms("small-clip")
    torch.save(net.state_dict(), tmp_path / "clip.pt")
    monkeypatch.setattr(metrics, "DINO", lambda: DINO(width=16, heads=2, layers=1))
    dino = metrics.DINO()
    torch.save({dino_name(k): v for k, v in dino.state_dict().items()}, tmp_path / "dino.pth")
    (tmp_path / "dog").mkdir()
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(
            tmp_path / "dog" / f"{i}.jpg")
    clips = tmp_path / "clips"
    for i in range(2):
        data.write_video(clips / f"{i:04d}.mp4", torch.rand(3, 3, 32, 48) * 2 - 1)
    weights = ["--clip-model", "small-clip", "--clip-weights", str(tmp_path / "clip.pt"),
               "--dino-weights", str(tmp_path / "dino.pth"), "--device", "cpu"]
    assert "give --prompts" in message(metrics.main, [str(clips), *weights])
    rows = [dict(file=f"{i:04d}.mp4", prompt=f"a dog {i}") for i in range(2)]
    (clips / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    metrics.main([str(clips), "--references", str(tmp_path / "dog"), *weights])
    found = json.loads((clips / "scores.json").read_text())

    frames = [Image.fromarray(f) for f in data.to_uint8(data.read_video(clips / "0001.mp4")[0])]
    dogs = [data.open_image(tmp_path / "dog" / f"{i}.jpg") for i in range(2)]
    with torch.no_grad():
        g, r = (net.eval().encode_image(torch.stack([prepare(x) for x in xs])) for xs in (frames, dogs))
        t = net.encode_text(open_clip.tokenize(["a dog 1"]))
        sizes = {(40, 50): (256, 320), (48, 32): (384, 256)}  # the shorter side becomes 256
        large = [x.resize(sizes[x.size], Image.BICUBIC) for x in frames + dogs]
        crops = [x.crop(((x.width - 224) // 2, (x.height - 224) // 2, (x.width + 224) // 2,
                         (x.height + 224) // 2)) for x in large]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        d = dino.eval()(torch.stack([((data.image_tensor(x) / 2 + 0.5) - mean) / std for x in crops]))
    expected = dict(clip_t=metrics.cosine(g, t), clip_i=metrics.cosine(g, r),
                    dino_i=metrics.cosine(d[:3], d[3:]), temporal_consistency=metrics.temporal_consistency(g))
    assert {k: found["clips"][1][k] for k in expected} == pytest.approx(expected, abs=1e-5)
    assert found["mean"]["clip_t"] == pytest.approx(np.mean([c["clip_t"] for c in found["clips"]]))

    (tmp_path / "list.txt").write_text("clips/0001.mp4|||dog|||a dog 1\n")
    metrics.main([str(tmp_path / "list.txt"), *weights])
    assert json.loads((clips / "scores.json").read_text())["mean"] == pytest.approx(expected, abs=1e-5)
    metrics.main([str(clips), *weights])  # no pictures: 0, as published
    assert json.loads((clips / "scores.json").read_text())["mean"]["clip_i"] == 0
    (tmp_path / "list.txt").write_text("clips/0001.mp4|||nothing|||a dog\n")
    assert "no such folder" in message(metrics.main, [str(tmp_path / "list.txt"), *weights])
    wrong = ["--clip-model", "small-clip", "--clip-weights", str(tmp_path / "dino.pth")]
    assert "--clip-weights" in message(metrics.main, [str(clips), *wrong])
