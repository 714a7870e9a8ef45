"""The race: five ways to align the flawed tiny base, at equal reward queries and at equal time. By hand:

    python tests/race.py --out out/race              # trains, judges every checkpoint, draws; an hour on one core
    python tests/race.py --tune --out out/tune       # three learning rates of those that ask while they train

VADER, InstructVideo and GRPO ask the scorer while they train. VideoDPO and plain fine-tuning on the best eighth
ask it once, about 1,504 clips that the base makes first. All sample in 5 steps without guidance, in training and
when they are judged: 64 held-out captions, always from the same noise.

A reward query is one clip scored. Minutes are those that the processor spent on the training process (one thread)
until a checkpoint, without evaluations; of the last two with making and scoring the clips. Memory is the largest
resident set of that process. Writes OUT/race.json, race_queries.png and race_minutes.png, and copies them to
results/ (not --tune).
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import bases  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
import grpo  # noqa: E402
import instructvideo  # noqa: E402
import pipeline  # noqa: E402
import rewards  # noqa: E402
import t2v  # noqa: E402
import tinyworld  # noqa: E402
import vader  # noqa: E402
import videodpo  # noqa: E402
from weights import load_checkpoint  # noqa: E402

SEEDS = (0, 1, 2)
RATES = (0.5, 1.0, 2.0)  # of the learning rates below, tried on seed 100
EASY = ["--base", "tiny", "--cfg", "1", "--dtype", "fp32", "--device", "cpu"]
# name: (command, options, learning rate, steps, steps between checkpoints, colour)
METHODS = {
    "VADER": (vader, ["--sweep", "0"], 2e-3, 40, 5, "tab:red"),
    "InstructVideo": (instructvideo, [], 2e-3, 40, 5, "tab:orange"),
    "GRPO": (grpo, [], 3e-3, 20, 4, "tab:blue"),
    "VideoDPO": (videodpo, ["--eval-n", "1"], 2e-3, 40, 8, "tab:green"),
    "best eighth": (t2v, ["--steps", "100", "--warmup", "10", "--ema", "0.95"], 5e-4, 100, 20, "tab:gray"),
}
ASKED_FIRST = {"VideoDPO", "best eighth"}
REACHED = 0.7  # of the scorer, for the table: how soon?
HELD_OUT = 64


# ---- one run, in a process of its own

def best_eighth(clips, file):
    """Of clips [(path, caption)], write the eighth that the scorer likes best to a list for --data."""
    reward = rewards.get_reward("tiny", "cpu")
    scores = [row["tiny"] for row in rewards.score_files(reward, "cpu", *zip(*clips))]
    liked = sorted(np.argsort(scores)[-len(clips) // 8:])
    file.write_text("video,caption\n" + "".join("{},{}\n".format(*clips[i]) for i in liked))


def train(name, seed, rate, out, clips):
    """Train and write OUT/times.json: per checkpoint, [steps, CPU seconds]; the peak of memory in MB.

    clips: the folder of a VideoDPO run with this seed, whose clips "best eighth" reuses.
    """
    method, more, _, _, every, _ = METHODS[name]
    times, save, made = {}, common.Run.save, [0.0]

    def noted(run):
        times.setdefault(run.done, time.process_time() + made[0])
        save(run)
    common.Run.save = noted
    for of, evaluation in ((vader, "evaluate_reward"), (instructvideo, "evaluate_reward"),
                           (grpo, "evaluate_reward"), (videodpo, "evaluate_policy")):
        setattr(of, evaluation, lambda *args, **more: None)  # every checkpoint is judged later, alike
    out.mkdir(parents=True, exist_ok=True)
    if name == "best eighth":
        made[0] = json.loads((clips / "made.json").read_text())
        best_eighth(data.read_clips(clips / "train"), out / "best.csv")
        more = [*more, "--data", str(out / "best.csv")]
    if name == "VideoDPO":  # the clips alone first, to know what they cost
        command = [*EASY, "--seed", str(seed), "--out", str(out), *more]
        videodpo.main([*command, "--stage", "generate"])
        (out / "made.json").write_text(json.dumps(time.process_time()))
        more = [*more, "--resume"]
    easy = [x for x in EASY if name != "best eighth" or x not in ("--cfg", "1")]
    method.main([*easy, *more, "--lr", str(rate), "--seed", str(seed), "--save-every", str(every), "--keep", "100",
                 "--preview-every", "0", "--out", str(out)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (out / "times.json").write_text(json.dumps(dict(times=list(times.items()), peak=peak)))


# ---- what came of it

def look(base):
    """-> the held-out scorer, shares of captions right, of each flaw, and of clips with any."""
    prompts = tinyworld.tiny_prompts(True, HELD_OUT)
    sampling = bases.choose_sampling("tiny", argparse.Namespace(sample_steps=5, cfg=1.0))
    env = common.Env(0, 1, torch.device("cpu"), torch.float32)
    clips = pipeline.generate(base, env, prompts, [f"race-{i}" for i in range(HELD_OUT)], sampling, 16)
    row = tinyworld.judge_captions(clips, prompts)
    flawed = [any(tinyworld.judge(clip)[flaw] for flaw in tinyworld.FLAW_SHARES) for clip in clips]
    reward = rewards.get_reward("tiny", "cpu")
    return row | dict(flawed=float(np.mean(flawed)),
                      scorer=pipeline.statistics(reward, clips, prompts, "cpu")["reward"])


def follow(name, out, start, clips, last):
    """-> one run's rows, from the base to the last checkpoint: steps, queries, CPU minutes, and look(). last: of
    its checkpoints only the last."""
    found = json.loads((out / "times.json").read_text())
    args = json.loads((out / "args.json").read_text())
    first = len(data.read_clips(out / "train")) if name == "VideoDPO" else 1504 if name in ASKED_FIRST else 0
    per_step = 0 if name in ASKED_FIRST else args["batch"] * args["accum"]
    rows = [dict(step=0, queries=0, minutes=0.0, **start)]
    if name in ASKED_FIRST:  # the clips are made, and nothing is trained yet
        made = json.loads((clips / "made.json").read_text())
        rows.append(dict(step=0, queries=first, minutes=made / 60, **start))
    for step, seconds in found["times"][-1 if last else 0:]:
        path = out / f"ckpt-{step}.safetensors"
        base = pipeline.load_run(path, *load_checkpoint(path), None)
        rows.append(dict(step=step, queries=first + per_step * step, minutes=seconds / 60, **look(base)))
    return dict(rows=rows, peak=found["peak"])


def run(name, seed, rate, out, start, clips, last):
    """Train in a process of its own, then judge its checkpoints; what is there already is kept."""
    file = out / "rows.json"
    if not file.exists():
        words = [sys.executable, __file__, "--child", name, str(seed), str(rate), str(out), str(clips)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        file.write_text(json.dumps(follow(name, out, start, clips, last)))
    found = json.loads(file.read_text())
    last = found["rows"][-1]
    print(f"{name}, seed {seed}, rate {rate:g}: scorer {last['scorer']:.3f}, flawed {last['flawed']:.3f}, captions "
          f"{last['joint']:.3f}, {last['queries']} queries, {last['minutes']:.1f} minutes", flush=True)
    return found


def span(values, form):
    """The mean of three seeds, and their range."""
    low, mean, high = min(values), sum(values) / len(values), max(values)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def first_to_reach(rows, what):
    """Queries or minutes of the first checkpoint whose scorer is REACHED, or None."""
    return next((row[what] for row in rows if row["scorer"] >= REACHED), None)


def table(start, found):
    """Rows for RESULTS.md: at the end, and what it took to reach REACHED."""
    rows = [f"| base | 0 | - | {start['scorer']:.3f} | {100 * start['flawed']:.1f} % | {100 * start['joint']:.1f} % "
            "| - | - | - |"]
    for name, runs in found.items():
        ends = [r["rows"][-1] for r in runs]
        soon = [[first_to_reach(r["rows"], what) for r in runs] for what in ("queries", "minutes")]
        queries, minutes = ("never" if None in s else span(s, form) for s, form in zip(soon, (".0f", ".1f")))
        rows.append(f"| {name} | {ends[0]['queries']} | {span([e['minutes'] for e in ends], '.1f')} "
                    f"| {span([e['scorer'] for e in ends], '.3f')} | {span([100 * e['flawed'] for e in ends], '.1f')} % "
                    f"| {span([100 * e['joint'] for e in ends], '.1f')} % | {queries} | {minutes} "
                    f"| {max(r['peak'] for r in runs):.0f} MB |")
    return rows


def draw(found, what, label, file):
    """Held-out scorer, and clips with a flaw, against reward queries or minutes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    for axis, column, title in zip(panels, ("scorer", "flawed"), ("held-out scorer", "clips with a flaw")):
        for name, runs in found.items():
            for seed, one in enumerate(runs):
                rows = one["rows"]
                axis.plot([r[what] for r in rows], [r[column] for r in rows], color=METHODS[name][-1],
                          lw=1.5, alpha=0.8, marker="o", markevery=[-1], label=None if seed else name)
        axis.set(xlabel=label, title=title, ylim=(0, 1))
        axis.grid(alpha=0.3)
        if what == "queries":
            axis.set_xscale("symlog", linthresh=100)
            axis.set_xlim(0, 2000)
            axis.set_xticks([0, 50, 100, 200, 500, 1000, 2000], ["0", "50", "100", "200", "500", "1000", "2000"])
    panels[1].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", default="out/race", help="folder for the runs; what is there is kept")
    p.add_argument("--tune", action="store_true", help="try three learning rates of VADER, InstructVideo and GRPO, on seed 100")
    p.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        name, seed, rate, out, clips = args.child
        return train(name, int(seed), float(rate), Path(out), Path(clips))
    out = Path(args.out).absolute()
    start, found = look(bases.load_base("tiny")), {}
    settings = [(100, k) for k in RATES] if args.tune else [(seed, 1.0) for seed in SEEDS]
    for name, (_, _, rate, *_) in METHODS.items():
        if args.tune and name in ASKED_FIRST:
            continue  # RESULTS.md lists what was tried for them
        found[name] = [run(name, seed, k * rate, out / f"{name} {seed} {k}", start, out / f"VideoDPO {seed} {k}",
                           last=args.tune)
                       for seed, k in settings]
    result = dict(table=table(start, found), start=start, runs=found)
    (out / "race.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(result["table"]))
    if not args.tune:
        draw(found, "queries", "reward queries", out / "race_queries.png")
        draw(found, "minutes", "CPU minutes of training", out / "race_minutes.png")
        for name in ("race.json", "race_queries.png", "race_minutes.png"):
            (ROOT / "results" / name).write_bytes((out / name).read_bytes())


if __name__ == "__main__":
    main()
