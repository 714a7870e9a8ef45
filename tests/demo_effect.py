"""DEMO against plain fine-tuning, from a tiny base blind to the words for motions. By hand:

    python tests/demo_effect.py --jobs 2 --out out/effect             # all runs, two at a time, a core each
    python tests/demo_effect.py --jobs 14 --device cuda --out out/effect
    python tests/demo_effect.py --explore --jobs 14 --device cuda --out out/explore  # how settings were found

Runs the commands below, lets sample.py judge each run, and writes OUT/demo.json, demo.png. CPU minutes
are those of the training process alone, its evaluations included.
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

SEEDS = (0, 1, 2)
STEPS = 240
COMMON = f"--base tiny-weak --steps {STEPS} --warmup 20"
PLAIN = f"t2v.py {COMMON} --ema 0.98 --preview-every 0 --lr 1.5e-3"
DEMO = f"demo.py {COMMON} --eval-n 16"
LOSSES = ("video-motion", "text-motion", "regularization")
ATTRIBUTES = ("shape", "colour", "background", "motion", "joint")


def runs():
    """{name: command}: three seeds of DEMO and of its fair rival, plain fine-tuning that trains the text
    encoder as well; then on seed 0 plain fine-tuning that leaves the text encoder as it is, and DEMO without
    each of the extra losses, and without all."""
    found = {}
    for seed in SEEDS:
        found[f"plain {seed}"] = f"{PLAIN} --train-text --seed {seed}"
        found[f"DEMO {seed}"] = f"{DEMO} --seed {seed}"
    found["plain, text encoder frozen"] = PLAIN
    for loss in LOSSES:
        found[f"DEMO without {loss}"] = f"{DEMO} --{loss} 0"
    found["DEMO without all three"] = DEMO + "".join(f" --{loss} 0" for loss in LOSSES)
    return found


def exploration():
    """Learning rates of both, by which those above are chosen; checkpoints at 100, 200, 300, 400 steps."""
    kept = "--steps 400 --save-every 100 --keep 4"
    found = {f"plain lr {lr}": f"{PLAIN} {kept} --lr {lr}" for lr in ("5e-4", "1.5e-3", "4e-3")}
    found["plain LoRA lr 4e-3"] = f"{PLAIN} {kept} --rank 16 --lr 4e-3"
    found |= {f"DEMO lr {lr} encoder {e}": f"{DEMO} {kept} --lr {lr} --encoder-lr {e}"
              for lr, e in (("1e-3", "1e-2"), ("2e-3", "2e-3"), ("2e-3", "1e-2"), ("4e-3", "5e-3"),
                            ("4e-3", "2e-2"), ("8e-3", "2e-2"))}
    found["DEMO drop-motion 0"] = f"{DEMO} {kept} --drop-motion 0"
    found["DEMO text-motion 1"] = f"{DEMO} {kept} --text-motion 1"
    found["DEMO no regularization"] = f"{DEMO} {kept} --regularization 0"
    found["DEMO no extra loss"] = DEMO + f" {kept}" + "".join(f" --{loss} 0" for loss in LOSSES)
    return found


SHARED = """import dataclasses, runpy, sys; sys.path.insert(0, "."); import bases
bases.BASES["tiny-weak"] = dataclasses.replace(bases.BASES["tiny-weak"], motion_words=float(sys.argv.pop(1)))
sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name="__main__")"""


def call(line, args):
    """-> CPU minutes of `python LINE`; its output goes to the screen only when it fails."""
    words = [sys.executable, *([] if args.share is None else ["-c", SHARED, str(args.share)]), *line]
    words += ["--device", args.device, "--dtype", "fp32"] if args.device else []
    process = subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, line))}\n{output[-3000:]}")
    return (usage.ru_utime + usage.ru_stime) / 60


def judged(out, checkpoint, args):
    call(["sample.py", *checkpoint, "--judge", args.clips, "--sample-steps", "10", "--batch", "16", "--out",
          str(out)], args)
    return json.loads((out / "judge.json").read_text())


def table(weak, found):
    """Rows for RESULTS.md."""
    def row(name, seen, minutes):
        cells = " | ".join(f"{100 * seen[k]:.1f} %" for k in ATTRIBUTES)
        return f"| {name} | {cells} | {minutes} |"
    rows = [row("tiny-weak", weak, "")]
    return rows + [row(name, run["steps"][str(STEPS)], f"{run['cpu_minutes']:.1f}")
                   for name, run in found.items() if str(STEPS) in run["steps"]]


def sheet(out, shown=("judge-weak", f"plain_0/judge-{STEPS}", f"DEMO_0/judge-{STEPS}")):
    """OUT/demo.png: the same ten captions from the weak base, plain fine-tuning and DEMO, seed 0."""
    rows = [json.loads(x) for x in (out / shown[0] / "index.jsonl").read_text().splitlines()[:10]]
    clips = [[data.read_video(out / name / row["file"])[0] for name in shown] for row in rows]
    data.contact_sheet(clips, out / "demo.png", [row["prompt"] for row in rows], frames=4, scale=2,
                       headers=["tiny-weak", "plain fine-tuning", "DEMO"])


def check(weak, found):
    """The issue's thresholds."""
    for seed in SEEDS:
        plain, ours = (found[f"{kind} {seed}"]["steps"][str(STEPS)] for kind in ("plain", "DEMO"))
        assert ours["motion"] >= plain["motion"] + 0.10, seed
        assert ours["colour"] >= plain["colour"] - 0.02 and ours["shape"] >= plain["shape"] - 0.02, seed
        assert found[f"DEMO {seed}"]["cpu_minutes"] <= 15, seed


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--device", help="cuda, cpu (default: cuda if there is one)")
    p.add_argument("--clips", default="256", help="captions that a run is judged on")
    p.add_argument("--explore", action="store_true", help="the settings that were tried, instead")
    p.add_argument("--share", type=float, help="of what sets words for motions apart, kept (tiny-weak: 0)")
    p.add_argument("--only", default="", help="runs whose names hold this")
    p.add_argument("--out", default="out/effect", help="folder for the runs")
    args = p.parse_args(argv)
    out = Path(args.out).absolute()

    def one(item):
        name, command = item
        folder, steps = out / name.replace(" ", "_"), {}
        minutes = call([*command.split(), "--out", str(folder)], args)
        for file in sorted(folder.glob("ckpt-*.safetensors")):
            step = file.stem.removeprefix("ckpt-")
            steps[step] = judged(folder / f"judge-{step}", ["--ckpt", f"{folder}:{step}"], args)
        row = dict(command=command, cpu_minutes=minutes, steps=steps)
        print(name, f"{minutes:.1f} min", {s: [seen[k] for k in ATTRIBUTES] for s, seen in steps.items()},
              flush=True)
        return name, row
    wanted = exploration() if args.explore else runs()
    wanted = {name: command for name, command in wanted.items() if args.only in name}
    with ThreadPoolExecutor(args.jobs) as pool:
        start = pool.submit(judged, out / "judge-weak", ["--base", "tiny-weak"], args)
        found = dict(pool.map(one, wanted.items()))
    weak = start.result()
    result = dict(table=table(weak, found), weak=weak, runs=found)
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    if not args.explore and not args.only:
        sheet(out)
    print("\n".join(result["table"]), flush=True)
    return weak, found


if __name__ == "__main__":
    main()
