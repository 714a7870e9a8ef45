"""The methods' own effects on the tiny world, with seeds and thresholds: by hand, `pytest -m effect -n 0`.

Minutes each. Each test writes results/NAME.json, whose "table" rows RESULTS.md repeats word for word
(tests/test_readme.py compares).
"""
import argparse
import json
import time
from pathlib import Path

import demo_effect
import numpy as np
import pytest
import torch

import bases
import das
import data
import dreamvideo
import grpo
import higen
import i2vgen
import instructvideo
import metrics
import pipeline
import rewards
import sample
import t2v
import tft2v
import tinyworld
import vader
import vcomposer
import videodpo
import videolcm
from common import Env
from tinyworld import judge_captions, parse
from weights import load_checkpoint

RESULTS = Path(__file__).parent.parent / "results"
SEEDS = (0, 1, 2)
# vader.py's settings for the learned scorer, where it is one of several rewards
LEARNED = ["--steps", "100", "--lr", "4e-3", "--sample-steps", "5"]


def write(name, table, **figures):
    (RESULTS / f"{name}.json").write_text(json.dumps(dict(table=table, **figures), indent=1) + "\n")


# the flawed bases; three seeds on the UNet, one on Wan's network
FLAWED = [*(("tiny", seed) for seed in SEEDS), ("tiny-wan", 0)]


@pytest.mark.effect
@pytest.mark.parametrize("base, sure, likely", [("tiny", 0.97, 0.92), ("tiny-wan", 0.95, 0.9)])
def test_tiny_base(base, sure, likely, tmp_path):
    """256 random captions: colour, background >= 97 %, shape, motion >= 92 %, marked >= 55 %; of tiny-wan, in
    20 steps, colour, background >= 95 %, shape, motion >= 90 %."""
    assert bases.base_row("tiny-wan").sample.sample_steps <= 20
    sample.main(["--base", base, "--judge", "256", "--batch", "16", "--out", str(tmp_path)])
    seen = json.loads((tmp_path / "judge.json").read_text())
    names = ("shape", "colour", "background", "motion", "joint", *tinyworld.FLAW_SHARES)
    cells = " | ".join(f"{100 * seen[k]:.1f} %" for k in names)
    file = f"{base.replace('-', '_')}_base"
    write(file, [f"| {base} | 256 | {cells} |"], **seen)
    (RESULTS / f"{file}.png").write_bytes((tmp_path / "sheet.png").read_bytes())
    assert seen["colour"] >= sure and seen["background"] >= sure and seen["marked"] >= 0.55
    assert seen["motion"] >= likely and seen["shape"] >= likely


def judged(out, *command):
    """sample.py --judge -> its verdict, and cells of a table: first frame in dB, accuracies in percent."""
    sample.main([*command, "--batch", "16", "--out", str(out)])
    seen = json.loads((out / "judge.json").read_text())
    names = ("shape", "colour", "background", "motion", "joint")
    return seen, f"{seen['psnr']:.1f} dB | " + " | ".join(f"{100 * seen[k]:.1f} %" for k in names)


@pytest.mark.effect
@pytest.mark.parametrize("base", ["tiny-i2v", "tiny-cogvideox"])
def test_i2v(base, tmp_path):
    """256 held-out (first frame, caption): PSNR of the first frame > 20 dB, motion >= 85 %."""
    seen, cells = judged(tmp_path, "--base", base, "--judge", "256")
    name = f"i2v_{base}"
    write(name, [f"| {base} | 256 | {cells} |"], **seen)
    (RESULTS / f"{name}.png").write_bytes((tmp_path / "sheet.png").read_bytes())
    assert seen["psnr"] > 20 and seen["motion"] >= 0.85


TEN = ["--sample-steps", "10"]


@pytest.mark.effect
@pytest.mark.parametrize("motion", ["zigzagging", "circling"])
def test_i2vgen(motion, tmp_path):
    """A motion that the base never saw: right in at least 90 % of 256 held-out pairs, and so are the motions
    that it knew before, of 256 others (10 sampler steps); 10 CPU minutes."""
    start = time.process_time()
    i2vgen.main(["--base", "tiny-i2v", "--motion", motion, "--out", str(tmp_path / "run")])
    minutes = (time.process_time() - start) / 60
    table, runs = [], {}
    for when, command in (("before", ["--base", "tiny-i2v"]), ("after", ["--ckpt", str(tmp_path / "run")])):
        for what, more in ((motion, ["--motion", motion]), ("known", [])):
            seen, cells = judged(tmp_path / f"{when}-{what}", *command, "--judge", "256", *more, *TEN)
            runs[f"{when} {what}"] = seen
            table.append(f"| {motion} | {when} | {what} | {cells} |")
    write(f"i2vgen_{motion}", table, minutes=minutes, **runs)
    for what in (motion, "known"):
        sheet = (tmp_path / f"after-{what}" / "sheet.png").read_bytes()
        (RESULTS / f"i2vgen_{motion}{'_known' * (what == 'known')}.png").write_bytes(sheet)
        assert runs[f"after {what}"]["motion"] >= 0.9, what
    assert minutes <= 10


def aligned(out, *command, method=vader):
    """vader.py or instructvideo.py -> its first and last line of eval.jsonl, CPU minutes of the run."""
    start = time.process_time()
    method.main([*command, "--dtype", "fp32", "--out", str(out)])
    rows = [json.loads(x) for x in (out / "eval.jsonl").read_text().splitlines()]
    return rows[0], rows[-1], (time.process_time() - start) / 60


def gain(before, after, what="reward"):
    """In standard deviations of the held-out rewards before training."""
    return (after[what] - before[what]) / before[f"{what}_sd"]


def accuracies(before, after):
    """-> change of each of the judge's accuracies, cells of a table."""
    names = (*tinyworld.ATTRIBUTES, "joint")
    change = {k: after["judge"][k] - before["judge"][k] for k in names}
    return change, " | ".join(f"{100 * after['judge'][k]:.1f} ({100 * v:+.1f})" for k, v in change.items())


def flaws_gone(before, after):
    """Cells of a table: the held-out scorer, the share of each flaw, of captions obeyed."""
    was, now = before["judge"], after["judge"]
    shares = " | ".join(f"{100 * was[k]:.1f} -> {100 * now[k]:.1f} %"
                        for k in (*tinyworld.FLAW_SHARES, "joint"))
    return f"{before['reward']:.3f} -> {after['reward']:.3f} | {shares}"


def check_flaws_gone(before, after, marked):
    """Marked at most `marked` of before, flicker and shake at most half, captions kept."""
    was, now = before["judge"], after["judge"]
    assert now["marked"] <= marked * was["marked"] and now["joint"] >= was["joint"] - 0.0201
    assert now["flickering"] <= was["flickering"] / 2 and now["shaking"] <= was["shaking"] / 2


@pytest.mark.effect
@pytest.mark.parametrize("base, seed", FLAWED)
def test_vader(base, seed, tmp_path):
    """The main command, in 5 minutes: of 64 held-out captions at most 5 % marked, flicker and shake at most
    half as often, captions not lower by more than 2 points."""
    start, out = time.time(), tmp_path / "run"
    before, after, cpu = aligned(out, "--base", base, "--seed", str(seed))
    minutes = (time.time() - start) / 60
    wan = "_wan" if base == "tiny-wan" else ""
    row = f"| vader | {base if wan else seed} | {flaws_gone(before, after)} | {minutes:.1f} | {cpu:.1f} |"
    write(f"vader{wan}_{seed}", [row], minutes=minutes, cpu=cpu, before=before, after=after)
    for name in ("before", "after") if seed == 0 else ():
        (RESULTS / f"vader{wan}_{name}.png").write_bytes((out / f"{name}.png").read_bytes())
    check_flaws_gone(before, after, marked=0.5)
    assert after["judge"]["marked"] <= 0.05 and cpu <= 10


@pytest.mark.effect
def test_vader_for_too_long(tmp_path):
    """A reward without a bound and blind to the prompt rises for ever, and all clips become alike. With
    --patience the run ends, and best.safetensors obeys the captions."""
    command = ["--base", "tiny", "--reward", "tiny-raw", "--lr", "2e-3", "--sample-steps", "5", "--steps", "60",
               "--preview-every", "10", "--watch", "tiny", "--eval-n", "32", "--sweep", "0"]
    table, ends = [], {}
    for name, more in (("too long", []), ("patience", ["--patience", "2"])):
        vader.main([*command, *more, "--out", str(tmp_path / name)])
        rows = [json.loads(x) for x in (tmp_path / name / "eval.jsonl").read_text().splitlines()]
        table += [f"| {name} | {r['step']} | {r['reward']:.2f} | {r['watch']:.3f} "
                  f"| {100 * r['judge']['marked']:.1f} % | {100 * r['judge']['joint']:.1f} % |" for r in rows]
        ends[name] = rows
    write("vader_too_long", table, rows=ends)
    (RESULTS / "vader_too_long.png").write_bytes((tmp_path / "too long" / "after.png").read_bytes())
    best = max(ends["patience"], key=lambda r: r["watch"])
    assert ends["too long"][-1]["reward"] > ends["too long"][0]["reward"] + 1
    assert ends["too long"][-1]["judge"]["joint"] < 0.5 and best["judge"]["joint"] >= 0.9
    assert ends["patience"][-1]["step"] < 60 and (tmp_path / "patience" / "best.safetensors").exists()


@pytest.mark.effect
@pytest.mark.parametrize("seed", SEEDS)
def test_vader_size(seed, tmp_path):
    """A hand-written reward on the clean base: held-out reward +0.5 sd; each accuracy -5 points at most."""
    command = ["--base", "tiny-clean", "--reward", "size", "--seed", str(seed)]
    before, after, minutes = aligned(tmp_path / "run", *command)
    change, cells = accuracies(before, after)
    row = (f"| size | {seed} | {before['reward']:.4f} | {after['reward']:.4f} "
           f"| {gain(before, after):+.2f} sd | {cells} | {minutes:.1f} |")
    write(f"vader_size_{seed}", [row], minutes=minutes, before=before, after=after)
    assert gain(before, after) >= 0.5 and minutes <= 10
    assert all(v >= -0.0501 for k, v in change.items() if k != "joint")


@pytest.mark.effect
def test_vader_removes_a_colour(tmp_path):
    """Prompts that ask for red: of 21 held-out ones at most half as many clips are red as before.

    Reported beside it: what becomes of 56 held-out captions of other colours.
    """
    red = [c for c in tinyworld.tiny_captions() if parse(c)["colour"] == "red"]
    order = np.random.default_rng(0).permutation(len(red))
    others = [c for c in tinyworld.tiny_prompts(held_out=True) if c not in red]
    for name, prompts in (("train", [red[i] for i in order[21:]]), ("held-out", [red[i] for i in order[:21]]),
                          ("others", others)):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
    before, after, minutes = aligned(
        tmp_path / "run", "--base", "tiny-clean", "--reward", "remove-colour=red", "--lr", "1e-3",
        "--prompts", str(tmp_path / "train.txt"), "--eval-prompts", str(tmp_path / "held-out.txt"),
        "--eval-n", "21")
    seen = {}
    for name, command in (("before", ["--base", "tiny-clean"]), ("after", ["--ckpt", str(tmp_path / "run")])):
        sample.main([*command, "--sample-steps", "10", "--batch", "16", "--prompts",
                     str(tmp_path / "others.txt"), "--out", str(tmp_path / name)])
        clips = [data.read_video(f)[0] for f in sorted((tmp_path / name).glob("*.mp4"))]
        seen[name] = judge_captions(clips, others)
    table = []
    for name, row in (("before", before), ("after", after)):
        names = "colour", "shape", "background", "motion"
        cells = " | ".join(f"{100 * row['judge'][k]:.1f} %" for k in names)
        table.append(f"| {name} | {cells} | {100 * seen[name]['joint']:.1f} % | {minutes:.1f} |")
    write("vader_remove_red", table, minutes=minutes, before=before, after=after, others=seen)
    (RESULTS / "vader_remove_red.png").write_bytes((tmp_path / "run" / "after.png").read_bytes())
    assert after["judge"]["colour"] <= 0.5 * before["judge"]["colour"] and minutes <= 10


@pytest.mark.effect
def test_vader_with_two_rewards(tmp_path):
    """The learned scorer and the object's size, summed: both up by 0.5 sd."""
    names = "tiny", "size"
    command = ["--base", "tiny-clean", "--reward", "tiny,size:0.1", *LEARNED]
    before, after, minutes = aligned(tmp_path / "run", *command)
    change, cells = accuracies(before, after)
    both = " | ".join(f"{before[k]:.4f} | {after[k]:.4f} | {gain(before, after, k):+.2f} sd" for k in names)
    write("vader_two", [f"| {both} | {cells} | {minutes:.1f} |"], minutes=minutes, before=before, after=after)
    assert all(gain(before, after, k) >= 0.5 for k in names) and minutes <= 10


@pytest.mark.effect
def test_vader_on_longer_clips(tmp_path):
    """tiny-i2v, clips of 8 + 7 + 7 frames: the temporal reward of those after the first 8 up, nothing lost.

    The target, 0.5 sd, is not reached (RESULTS.md): this asks for half of it, and that words are obeyed.
    """
    before, after, minutes = aligned(tmp_path / "run", "--base", "tiny-i2v")
    change, cells = accuracies(before, after)
    both = " | ".join(f"{before[k]:.4f} | {after[k]:.4f} | {gain(before, after, k):+.2f} sd"
                      for k in ("reward", "later"))
    row = f"| {both} | {cells} | {minutes:.1f} |"
    write("vader_longer", [row], minutes=minutes, before=before, after=after)
    for name in ("before", "after"):
        (RESULTS / f"vader_longer_{name}.png").write_bytes((tmp_path / "run" / f"{name}.png").read_bytes())
    assert gain(before, after, "later") >= 0.25 and change["joint"] >= -0.02 and minutes <= 10


@pytest.mark.effect
@pytest.mark.parametrize("seed", SEEDS)
def test_instructvideo(seed, tmp_path):
    """Of 64 held-out captions at most a third as many clips marked as before, captions not lower by more than
    2 points, in 10 CPU minutes."""
    command = ["--base", "tiny", "--seed", str(seed)]
    before, after, cpu = aligned(tmp_path / "run", *command, method=instructvideo)
    row = f"| instructvideo | {seed} | {flaws_gone(before, after)} | {cpu:.1f} |"
    write(f"instructvideo_{seed}", [row], cpu=cpu, before=before, after=after)
    for name in ("before", "after") if seed == 0 else ():
        (RESULTS / f"instructvideo_{name}.png").write_bytes((tmp_path / "run" / f"{name}.png").read_bytes())
    was, now = before["judge"], after["judge"]
    assert now["marked"] <= was["marked"] / 3 and now["joint"] >= was["joint"] - 0.0201 and cpu <= 10


def align_by_grpo(name, seed, out, *more, base="tiny"):
    """grpo.py -> its row of a table, of results/NAME_SEED.json; and the first and last line of eval.jsonl."""
    start, cpu = time.time(), time.process_time()
    grpo.main(["--base", base, "--seed", str(seed), "--dtype", "fp32", "--out", str(out), *more])
    minutes, cpu = (time.time() - start) / 60, (time.process_time() - cpu) / 60
    rows = [json.loads(x) for x in (out / "eval.jsonl").read_text().splitlines()]
    before, after = rows[0], rows[-1]
    row = f"| {name} | {seed if base == 'tiny' else base} | {flaws_gone(before, after)} | {minutes:.1f} | {cpu:.1f} |"
    write(f"{name}_{seed}", [row], minutes=minutes, cpu=cpu, before=before, after=after)
    for when in ("before", "after") if seed == 0 else ():
        (RESULTS / f"{name}_{when}.png").write_bytes((out / f"{when}.png").read_bytes())
    return before["judge"], after["judge"], cpu


@pytest.mark.effect
@pytest.mark.parametrize("base, seed", FLAWED)
def test_grpo(base, seed, tmp_path):
    """Policy gradients on the flawed bases, the scorer as reward, within 15 CPU minutes: of 64 held-out captions
    marked clips at most half as many, captions not lower by more than 5 points."""
    name = "grpo_wan" if base == "tiny-wan" else "grpo"
    was, now, cpu = align_by_grpo(name, seed, tmp_path / "run", base=base)
    assert now["marked"] <= was["marked"] / 2 and now["joint"] >= was["joint"] - 0.0501 and cpu <= 15


@pytest.mark.effect
def test_grpo_without_gradient(tmp_path):
    """The same for a reward that no gradient passes through: minus the bytes of each frame as a JPEG."""
    reward = f"{Path(__file__).parent / 'jpeg_bytes.py'}:jpeg_bytes"
    was, now, cpu = align_by_grpo("grpo_jpeg", 0, tmp_path / "run", "--reward", reward)
    assert now["marked"] <= was["marked"] / 2 and now["joint"] >= was["joint"] - 0.0501 and cpu <= 15


@pytest.mark.effect
@pytest.mark.parametrize("seed", SEEDS)
def test_das(seed, tmp_path):
    """48 held-out clips of each motion: the object is off its track by under 6 % of the frame's width and at
    most a quarter of what it is off without tracks, after 20 minutes of steps at most. Zigzags and moves of
    the camera were never trained on. Reported beside it: how often the shape is right, and how far its
    outline is from the best template, as a share of the area.
    """
    das.main(["--base", "tiny-cogvideox", "--seed", str(seed), "--out", str(tmp_path)])
    minutes = sum(json.loads(x)["seconds"] for x in (tmp_path / "log.jsonl").read_text().splitlines()) / 60
    rows = [json.loads(x) for x in (tmp_path / "eval.jsonl").read_text().splitlines()]
    before, after = (row["position"] for row in rows)
    table = [f"| {seed} | {motion} | {100 * before[motion]:.1f} % | {100 * after[motion]:.1f} % "
             f"| {before[motion] / after[motion]:.1f}x | {100 * rows[1]['shape'][motion]:.1f} % "
             f"| {rows[1]['misfit'][motion]:.2f} | {minutes:.1f} |" for motion in before]
    write(f"das_{seed}", table, seed=seed, minutes=minutes, before=rows[0], after=rows[1])
    (RESULTS / f"das_{seed}.png").write_bytes((tmp_path / "after.png").read_bytes())
    assert minutes <= 20
    assert all(error < 0.06 and error <= before[motion] / 4 for motion, error in after.items())


def scores(folder, prompts):
    """The scorer's verdict on FOLDER/0000.mp4 ..., a clip per prompt."""
    files = [folder / f"{i:04d}.mp4" for i in range(len(prompts))]
    reward = rewards.get_reward("tiny", "cpu")
    return [row["tiny"] for row in rewards.score_files(reward, "cpu", files, prompts)]


def preferred(out):
    """A run of videodpo.py -> its first and last evaluation, each with the scorer's mean ("reward"); the
    share of prompts whose clip the scorer prefers afterwards."""
    before, *_, after = [json.loads(x) for x in (out / "eval.jsonl").read_text().splitlines()]
    args = json.loads((out / "args.json").read_text())
    folder = Path(args["eval_pairs"][0]) if args["eval_pairs"] else out / "held-out"
    pairs = json.loads((folder / "pair.json").read_text())[:args["eval_n"]]
    prompts = [row["frame_caption"][0] for row in pairs]
    was, now = (scores(out / name, prompts) for name in ("before", "after"))
    before["reward"], after["reward"] = float(np.mean(was)), float(np.mean(now))
    return before, after, float(np.mean(np.array(now) > np.array(was)))


@pytest.mark.effect
@pytest.mark.parametrize("base, seed", FLAWED)
def test_videodpo(base, seed, tmp_path):
    """All stages, 15 CPU minutes at most. On 128 held-out prompts: at most half as many clips marked, 75 %
    win by the scorer, captions lose 2 points at most; of all 128 held-out pairs 70 % are told apart."""
    start = time.process_time()
    videodpo.main(["--base", base, "--seed", str(seed), "--dtype", "fp32", "--out", str(tmp_path / "run")])
    cpu = (time.process_time() - start) / 60
    before, after, wins = preferred(tmp_path / "run")
    wan = "_wan" if base == "tiny-wan" else ""
    row = (f"| videodpo | {base if wan else seed} | {flaws_gone(before, after)} | {100 * wins:.1f} % "
           f"| {100 * after['wins']:.1f} % | {100 * after['accuracy']:.1f} % | {cpu:.1f} |")
    write(f"videodpo{wan}_{seed}", [row], cpu=cpu, wins=wins, before=before, after=after)
    for name in ("before", "after") if seed == 0 else ():
        (RESULTS / f"videodpo{wan}_{name}.png").write_bytes((tmp_path / "run" / f"{name}.png").read_bytes())
    was, now = before["judge"], after["judge"]
    assert now["marked"] <= was["marked"] / 2 and now["joint"] >= was["joint"] - 0.0201
    assert wins >= 0.75 and after["accuracy"] >= 0.7 and cpu <= 15


EIGHTH = ["--steps", "100", "--lr", "5e-4", "--warmup", "10", "--ema", "0.95"]


@pytest.mark.effect
def test_best_eighth(tmp_path):
    """The plain rival of videodpo.py: of its 1,504 clips, t2v.py learns the eighth that the scorer likes best.
    No target. The same held-out captions and noise before and after."""
    start, made = time.process_time(), tmp_path / "made"
    videodpo.main(["--base", "tiny", "--stage", "generate", "--eval-n", "1", "--dtype", "fp32", "--out", str(made)])
    clips = data.read_clips(made / "train")
    found = rewards.score_files(rewards.get_reward("tiny", "cpu"), "cpu", *zip(*clips))
    liked = np.argsort([row["tiny"] for row in found])[-len(clips) // 8:]
    rows = "".join("{},{}\n".format(*clips[i]) for i in sorted(liked))
    (tmp_path / "best.csv").write_text("video,caption\n" + rows)
    t2v.main(["--base", "tiny", "--data", str(tmp_path / "best.csv"), *EIGHTH, "--dtype", "fp32",
              "--preview-every", "0", "--out", str(tmp_path / "run")])
    minutes, seen = (time.process_time() - start) / 60, []
    held_out, short = tinyworld.tiny_prompts(True, 128), ["--sample-steps", "5", "--cfg", "1"]
    for name, source in (("before", ["--base", "tiny"]), ("after", ["--ckpt", tmp_path / "run"])):
        clips = played(tmp_path / name, held_out, *source, *short, n=1)
        reward = float(np.mean(scores(tmp_path / name, held_out)))
        seen.append({"reward": reward, "judge": judge_captions(clips, held_out)})
    better = np.array(scores(tmp_path / "after", held_out)) > scores(tmp_path / "before", held_out)
    row = f"| best eighth | {flaws_gone(*seen)} | {100 * better.mean():.1f} % | {minutes:.1f} |"
    write("best_eighth", [row], clips=len(liked), minutes=minutes, wins=float(better.mean()),
          before=seen[0], after=seen[1])
    (RESULTS / "best_eighth.png").write_bytes((tmp_path / "after" / "sheet.png").read_bytes())
    assert seen[1]["reward"] > seen[0]["reward"] and minutes <= 15


# ---- DreamVideo

BACKS = ("gray", "black", "brown")
JOINT = ["--subject-below", 300]  # options of sample.py for subject and motion together


def played(out, prompts, *command, n):
    """Clips of a list of prompts by sample.py, as written to files, n a prompt."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    sample.main([*map(str, command), "--prompts", str(out / "prompts.txt"), "--n", str(n), "--batch", "16",
                 "--out", str(out)])
    return [data.read_video(out / f"{i:04d}.mp4")[0] for i in range(n * len(prompts))]


def best_words(out, subject, path):
    """The tiny base's best wordings: of 24 objects and 36 of two colours, and of 7 motions and just "moving".

    -> likeness and its words, path error and its words. Two clips a wording of the subject, 6 of the motion.
    """
    warm = ("red", "orange", "purple", "white")  # what is nearest to salmon and pink
    colours = [*tinyworld.COLOURS, *(f"{a} {b}" for a in warm for b in warm if a != b)]
    objects = [f"{c} {s}" for c in colours for s in tinyworld.SHAPES]
    clips = played(out / "subject", [f"a {o} moving left on a gray background" for o in objects],
                   "--base", "tiny-clean", n=2)
    likeness = {o: tinyworld.subject_likeness(clips[2 * i:2 * i + 2], subject) for i, o in enumerate(objects)}
    motions = (*tinyworld.MOTIONS, "moving")
    prompts = [prompt.replace("moving", m) for m in motions for _, prompt in tinyworld.tiny_previews(False)[:3]]
    clips = played(out / "motion", prompts, "--base", "tiny-clean", n=2)
    errors = {m: tinyworld.path_error(clips[6 * i:6 * i + 6], path)["path_error"]
              for i, m in enumerate(motions)}
    words, motion = max(likeness, key=lambda o: sum(likeness[o].values())), min(errors, key=errors.get)
    return likeness[words] | {"path_error": errors[motion], "words": f"{words}; {motion}"}


@pytest.mark.effect
@pytest.mark.parametrize("motion, seed", [("circling", 3), ("zigzagging", 1)])
def test_dreamvideo(motion, seed, tmp_path):
    """A star with a stripe from 4 pictures, a path from 3 clips, each stage in 10 CPU minutes at most.

    Likeness (colours + shape, 0 to 2) of the subject at least 0.1 above the best words, path error at most
    half that of the best words, also both together: then likeness at most 0.2 below, path error at most 1
    pixel above that of each alone, and the subject does not flicker: its frames are at least 0.9 times as
    alike as with the subject alone. (JOINT was chosen on circling with seed 0.)
    """
    subject, path = tinyworld.tiny_subject(seed, 4), tinyworld.tiny_motion(seed, 3, motion)[1]
    run, minutes = {stage: tmp_path / stage for stage in dreamvideo.STAGES}, {}
    for stage in run:
        more = {"token": [], "identity": ["--learned", str(run["token"])], "motion": ["--motion", motion]}
        start = time.process_time()
        dreamvideo.main(["--base", "tiny", "--stage", stage, "--seed", str(seed), *more[stage],
                         "--out", str(run[stage])])
        minutes[stage] = (time.process_time() - start) / 60
    found = {"words": best_words(tmp_path / "words", subject, path)}
    moved = [f"a * {m} on a {b} background"
             for m in ("moving left", "moving up", "standing still") for b in BACKS]
    for stage in ("token", "identity"):
        clips = played(tmp_path / f"s-{stage}", moved, "--ckpt", run[stage], n=2)
        found[stage] = tinyworld.subject_likeness(clips, subject) | tinyworld.steadiness(clips)
    lines = [prompt for _, prompt in tinyworld.tiny_previews(False)[:3]]
    clips = played(tmp_path / "s-motion", lines, "--ckpt", run["motion"], n=4)
    found["motion"] = tinyworld.path_error(clips, path)
    both = ["--ckpt", run["identity"], "--ckpt", run["motion"], *JOINT]
    clips = played(tmp_path / "s-joint", [f"a * moving on a {b} background" for b in BACKS], *both, n=4)
    found["joint"] = (tinyworld.subject_likeness(clips, subject) | tinyworld.steadiness(clips)
                      | tinyworld.path_error(clips, path))

    table = []
    for name, row in found.items():
        row["likeness"] = row["colours"] + row["shape"] if "colours" in row else None
        cells = [f"{row[k]:.2f}" if row.get(k) is not None else "-"
                 for k in ("colours", "shape", "likeness", "steady", "path_error")]
        table.append(f"| {motion} | {name} | {' | '.join(cells)} | "
                     f"{f'{minutes[name]:.1f}' if name in minutes else '-'} |")
    write(f"dreamvideo_{motion}", table, seed=seed, minutes=minutes, **found)
    for name in ("s-identity", "s-motion", "s-joint"):
        sheet = (tmp_path / name / "sheet.png").read_bytes()
        (RESULTS / f"dreamvideo_{motion}_{name[2:]}.png").write_bytes(sheet)
    words, joint = found["words"], found["joint"]
    assert found["identity"]["likeness"] >= words["likeness"] + 0.1
    assert found["motion"]["path_error"] <= words["path_error"] / 2
    assert joint["likeness"] >= max(words["likeness"] + 0.1, found["identity"]["likeness"] - 0.2)
    assert joint["path_error"] <= min(words["path_error"] / 2, found["motion"]["path_error"] + 1)
    assert joint["steady"] >= 0.9 * found["identity"]["steady"]
    assert max(minutes.values()) <= 10


@pytest.mark.effect
def test_demo(tmp_path):
    """From tiny-weak, three seeds, 256 captions: motion >= 10 points above plain fine-tuning of as many
    steps that trains the text encoder as well, colour and shape not more than 2 below it, 15 CPU minutes a
    run. Each extra loss left out once.
    """
    weak, runs = demo_effect.main(["--jobs", "2", "--device", "cpu", "--out", str(tmp_path)])
    for name in ("demo.json", "demo.png"):
        (RESULTS / name).write_bytes((tmp_path / name).read_bytes())
    demo_effect.check(weak, runs)


# ---- VideoLCM

def few_steps(base, prompts, run, steps):
    """Clips of 64 captions, two a caption, from the same noise for every network -> clips, CPU s a clip."""
    start = time.process_time()
    sampling = bases.choose_sampling("tiny-clean", argparse.Namespace(sample_steps=steps), run)
    clips = pipeline.generate(base, Env(0, 1, torch.device("cpu"), torch.float32), prompts,
                              [f"lcm-{i}" for i in range(len(prompts))], sampling, 16)
    return clips, (time.process_time() - start) / len(prompts)


@pytest.mark.effect
def test_videolcm(tmp_path):
    """4 steps reach 90 % of the joint accuracy of the base's 50 with guidance, on 64 held-out captions, two
    clips each; 15 CPU minutes of training at most. And, as the judge's words tell little here (one DDIM step
    of the base says the right ones): in one step the student is 2 dB nearer to the base's 50-step clip of the
    same noise than the base in one step, and its objects are half as spread over the frame or more.
    """
    start = time.process_time()
    videolcm.main(["--base", "tiny-clean", "--out", str(tmp_path)])
    minutes = (time.process_time() - start) / 60
    prompts, tiny = 2 * tinyworld.tiny_prompts(held_out=True), bases.load_base("tiny-clean")
    tensors, meta = load_checkpoint(tmp_path)
    student = bases.load_run(tmp_path, tensors, meta, None)
    runs, clips, table = {}, {}, []
    for name, base, run, counts in (("base", tiny, {}, (50, 1, 2, 4, 8)),
                                    ("student", student, meta["sample"], (1, 2, 4, 8))):
        for steps in counts:
            made, seconds = few_steps(base, prompts, run, steps)
            seen, whole = [tinyworld.judge(clip) for clip in made], clips.get("base-50", made)
            centres = np.array([np.mean(tinyworld._centres(tinyworld._object(c)[3]), 1) for c in made])
            row = judge_captions(made, prompts) | dict(
                seconds=seconds, spread=float(np.sqrt(centres.var(0).sum())),
                psnr=float(np.mean([metrics.psnr(a, b) for a, b in zip(made, whole)])) if clips else None,
                **{k: float(np.mean([s[k] for s in seen])) for k in ("misfit", "off_palette")})
            runs[f"{name}-{steps}"], clips[f"{name}-{steps}"] = row, made
            near = "-" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
            faster = runs["base-50"]["seconds"] / seconds
            table.append(f"| {name} | {steps} | {100 * row['shape']:.1f} % | {100 * row['joint']:.1f} % | {near} | {row['spread']:.2f} | "
                         f"{row['misfit']:.3f} | {row['off_palette']:.0f} | {seconds:.3f} | {faster:.1f}x |")
    write("videolcm", table, minutes=minutes, **runs)
    shown = "base-50", "base-1", "student-1", "student-2", "student-4"
    names = [name.replace("-", ", ") + " steps"[:5 if name.endswith("-1") else 6] for name in shown]
    data.contact_sheet([[clips[k][i] for k in shown] for i in range(10)], RESULTS / "videolcm.png",
                       prompts[:10], frames=4, scale=2, headers=names)
    whole, base, one = (runs[k] for k in ("base-50", "base-1", "student-1"))
    assert runs["student-4"]["joint"] >= 0.9 * whole["joint"] and minutes <= 15
    assert one["psnr"] >= base["psnr"] + 2 and one["spread"] >= 0.5 * whole["spread"]


# ---- TF-T2V, HiGen, VideoComposer

AXIS = {"moving left": "moving right", "moving up": "moving down", "growing": "shrinking"}
AXIS |= {b: a for a, b in AXIS.items()}  # the same motion the other way


def trained(method, out, *args):
    """Run a method's main() -> CPU minutes."""
    start = time.process_time()
    method.main([*args, "--preview-every", "0", "--dtype", "fp32", "--out", str(out)])
    return (time.process_time() - start) / 60


RECIPES = {"image-text pairs": ["--image-share", "1"], "and clips without captions": ["--image-share", "0.5"]}


def text_free(out, runs, minutes):
    """Judge the two recipes' runs, write tft2v.json and .png. -> {recipe: accuracies}"""
    found, rows, clips = {}, [], []
    for name, run in runs.items():
        sample.main(["--ckpt", str(run), "--judge", "128", "--sample-steps", "10", "--batch", "16",
                     "--out", str(out / name)])
        seen = json.loads((out / name / "judge.json").read_text())
        index = [json.loads(x) for x in (out / name / "index.jsonl").read_text().splitlines()]
        clips.append([data.read_video(out / name / r["file"])[0] for r in index])
        pairs = [(tinyworld.judge(c)["motion"], parse(r["prompt"])["motion"]) for c, r in zip(clips[-1], index)]
        seen["axis"] = float(np.mean([a in (b, AXIS.get(b)) for a, b in pairs]))
        seen["smoothness"] = float(np.median([tinyworld.judge(c)["smoothness"] for c in clips[-1]]))
        cells = " | ".join(f"{100 * seen[k]:.1f} %" for k in ("shape", "colour", "motion", "axis"))
        rows.append(f"| {name} | {cells} | {seen['smoothness']:.2f} | {minutes[name]:.1f} |")
        found[name] = seen
    write("tft2v", rows, minutes=minutes, runs=found)
    data.contact_sheet([list(pair) for pair in zip(*(c[:10] for c in clips))], RESULTS / "tft2v.png",
                       [r["prompt"] for r in index[:10]], headers=list(runs))
    return found


@pytest.mark.effect
def test_tft2v(tmp_path):
    """Tiny without its layers over time knows from the words along which axis things move, but not how. After
    400 steps, half with clips that have no captions, motion accuracy (128 captions) is at least 20 points
    above that after 400 steps on image-text pairs alone, colours and shapes at most 5 points below. No clip
    ever tells which word is left: half of "left" and "right" would be right by chance; expect 57 %.
    """
    minutes = {name: trained(tft2v, tmp_path / name, "--base", "tiny-clean", *more) for name, more in RECIPES.items()}
    check_text_free(text_free(tmp_path, {name: tmp_path / name for name in RECIPES}, minutes), minutes)


def check_text_free(found, minutes):
    pairs, clips = (found[name] for name in RECIPES)
    assert clips["motion"] >= pairs["motion"] + 0.2 and max(minutes.values()) <= 10
    assert all(clips[k] >= pairs[k] - 0.05 for k in ("shape", "colour"))


FACTORS = (175, 275, 375, 475, 575)  # a clip's mean in training: 370 +- 150 where things move
MOVES = [f"a {c} moving {way} on a {b} background" for way in ("left", "right", "up", "down") for c, b in (
    ("red circle", "gray"), ("yellow square", "black"), ("cyan triangle", "brown"))]


def higen_speeds(out, run, minutes):
    """The same 12 prompts and noises at each factor -> mean speeds, motion accuracies; higen.json, .png."""
    speeds, right, shape, clips = [], [], [], []
    for factor in FACTORS:
        made = played(out / str(factor), MOVES, "--ckpt", run, "--motion-factor", factor, n=1)
        seen = [tinyworld.judge(clip) for clip in made]
        speeds.append([s["speed"] for s in seen])
        asked = [parse(p) for p in MOVES]
        right.append(float(np.mean([s["motion"] == a["motion"] for s, a in zip(seen, asked)])))
        shape.append(float(np.mean([s["shape"] == a["shape"] for s, a in zip(seen, asked)])))
        clips.append(made)
    mean = [float(np.mean(s)) for s in speeds]
    rows = [f"| {k} | {speed:.2f} | {100 * a:.1f} % | {100 * b:.1f} % |"
            for k, speed, a, b in zip(FACTORS, mean, right, shape)]
    write("higen", rows, minutes=minutes, speeds=speeds, motion=right, shape=shape)
    shown = (0, 4, 8, 9)
    data.contact_sheet([[c[i] for c in (clips[0], clips[2], clips[4])] for i in shown], RESULTS / "higen.png",
                       [MOVES[i] for i in shown], headers=[f"factor {FACTORS[k]}" for k in (0, 2, 4)])
    return mean, right


@pytest.mark.effect
def test_higen(tmp_path):
    """Tiny with HiGen's factors, trained in 20 CPU minutes at most. The same 12 prompts and noises at motion
    factors 175 to 575: the mean measured speed rises each time, and is at least 1.5 times as high in the end.
    (A first run, without fit_resampler(), saturated: 0.77, 1.22, 1.68, 1.75 and 1.68 pixels a frame at 100,
    200, 300, 400 and 500, with 17 to 42 % of the motions right.)
    """
    minutes = trained(higen, tmp_path / "run", "--base", "tiny-higen")
    check_higen(*higen_speeds(tmp_path, tmp_path / "run", minutes), minutes)


def check_higen(mean, right, minutes):
    assert all(a < b for a, b in zip(mean, mean[1:])) and mean[-1] >= 1.5 * mean[0] and minutes <= 20


def followed_maps(run, minutes):
    """48 held-out scenes, words without motion, by each condition alone -> {name: figures}, written."""
    videos, _, scenes = tinyworld.tiny_batch((0, tinyworld.HELD_OUT), 48, drop_background=0.0)
    prompts = [f"a {s.colour} {s.shape} on a {s.background} background" for s in scenes]
    maps = [data.video_maps(v, ("sketch", "motion"), flow=data.lucas_kanade) |
            {"depth": tinyworld.render(s, with_mask=True)[1]} for v, s in zip(videos, scenes)]
    tensors, meta = load_checkpoint(run)
    base = bases.load_run(run, tensors, meta, None)
    sampling = bases.choose_sampling(base.name, argparse.Namespace(sample_steps=10), meta["sample"])
    env, found, rows, clips = Env(0, 1, torch.device("cpu"), torch.float32), {}, [], [list(videos)]
    for name in (None, "depth", "sketch", "motion"):
        given = {name: torch.stack([m[name] for m in maps])} if name else {}
        seeds = [f"map-{i}" for i in range(48)]
        made = pipeline.generate_split(base, env, prompts, seeds, sampling, 16, maps=given)
        errors = [tinyworld.position_error(v, s.x, s.y) for v, s in zip(made, scenes)]
        seen = [tinyworld.judge(v) for v in made]
        right, shape = (float(np.mean([a[k] == vars(s)[k] for a, s in zip(seen, scenes)]))
                        for k in ("motion", "shape"))
        found[name or "none"] = dict(position=float(np.mean(errors)), motion=right, shape=shape)
        rows.append(f"| {name or 'none'} | {100 * np.mean(errors):.1f} % | {100 * right:.1f} % | "
                    f"{100 * shape:.1f} % |")
        clips.append(list(made))
    write("vcomposer", rows, minutes=minutes, conditions=found)
    data.contact_sheet([list(row) for row in zip(*(c[:8] for c in clips))], RESULTS / "vcomposer.png",
                       prompts[:8], frames=4, headers=["true", *found])
    return found


@pytest.mark.effect
def test_vcomposer(tmp_path):
    """Tiny with maps, trained in 20 CPU minutes at most; 48 held-out scenes, captions that tell no motion. By
    depth, sketch or motion alone the object is off its path by at most half of what it is without, and the
    motion is right at least 30 points more often.
    """
    minutes = trained(vcomposer, tmp_path, "--base", "tiny-vcomposer")
    check_maps(followed_maps(tmp_path, minutes), minutes)


def check_maps(found, minutes):
    for name in ("depth", "sketch", "motion"):
        assert found[name]["position"] <= found["none"]["position"] / 2, name
        assert found[name]["motion"] >= found["none"]["motion"] + 0.3, name
    assert minutes <= 20
