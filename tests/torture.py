"""kill -9 at random moments of training, with a save at every step:  python tests/torture.py [--kills 100]

Each run is killed once, at a moment drawn from the start of its log to its end, then goes on with --resume.
It must end as the run that nothing disturbed: weights, optimizer, checkpoint and log, bit for bit. Between
the two, every file that a reader may open (ckpt.safetensors, state.pt) must be whole. Processes are forked
from one that has imported everything, else starting Python would be most of the time. Writes
results/torture.json.
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

import common
import t2v
import vader
import weights

RESULTS = Path(__file__).resolve().parent.parent / "results" / "torture.json"
METHODS = {
    "t2v": (t2v, ["--base", "tiny", "--rank", "2", "--batch", "1", "--steps", "10", "--save-every", "1",
                  "--preview-every", "0", "--no-cache-latents", "--ema", "0.9", "--eval-n", "1", "--sample-steps", "1"]),
    "vader": (vader, ["--base", "tiny", "--reward", "size", "--rank", "2", "--batch", "1", "--steps", "8",
                      "--sample-steps", "2", "--decode", "0", "--eval-n", "1", "--save-every", "1",
                      "--sweep", "0"])}


def start(method, out):
    """Fork a process that trains into `out` (or goes on there) -> its pid."""
    pid = os.fork()
    if pid:
        return pid
    module, args = METHODS[method]
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 1)
    code = 1
    try:
        module.main([*args, "--resume", "--out", str(out)])
        code = 0
    finally:
        os._exit(code)


def product(out):
    """All that a run leaves, without times and paths."""
    state = common.load_state_file(out / "state.pt")
    tensors, meta = weights.load_checkpoint(out)
    log = [{k: v for k, v in row.items() if k != "seconds"} for row in common.read_lines(out / "log.jsonl")]
    return dict(weights=state["weights"], moments=state["moments"], ema=state["ema"] or {}, tensors=tensors,
                numbers=(state["step"], state["seen"], meta["step"], log))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    return a == b


def whole(out):
    """The files that stand there can be read; -> the step to go on from, -1 before the first save."""
    if (out / "ckpt.safetensors").exists():
        weights.load_checkpoint(out / "ckpt.safetensors")
    states = [out / name for name in common.STATES if (out / name).exists()]
    return common.load_state_file(states[0])["step"] if states else -1


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    random.seed(args.seed)
    began, rows = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        folder, wanted, length = Path(folder), {}, {}
        for method in METHODS:
            t = time.time()
            assert os.waitpid(start(method, folder / method), 0)[1] == 0, f"{method} does not run"
            first = (folder / method / "args.json").stat().st_mtime - t
            length[method], wanted[method] = (first, time.time() - t), product(folder / method)
        for i in range(args.kills):
            method, out = list(METHODS)[i % len(METHODS)], folder / f"run-{i}"
            moment = random.uniform(*length[method])
            pid = start(method, out)
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)[1] == 0  # it may have been quicker
            saving = out.exists() and any(".tmp" in f.name for f in out.iterdir())
            step = whole(out)
            code = os.waitpid(start(method, out), 0)[1]
            same = code == 0 and equal(product(out), wanted[method])
            rows.append(dict(method=method, moment=round(moment, 3), step=step, saving=saving, ended=ended,
                             same=same))
            print(f"{i + 1}/{args.kills} {method}: killed after {moment:.2f} s, step {step}"
                  f"{', in mid-write' if saving else ''}: {'same' if same else 'NOT THE SAME'}", flush=True)
            shutil.rmtree(out)
    good, minutes = sum(r["same"] for r in rows), (time.time() - began) / 60
    inside = sum(r["saving"] for r in rows)
    early = sum(r["step"] < 0 for r in rows)
    table = [f"| {len(rows)} | {inside} | {early} | {good} | {minutes:.1f} |"]
    print("| kills | in mid-write | before the first save | equal to the undisturbed run | minutes |", *table,
          sep="\n")
    if len(rows) >= 100:
        RESULTS.write_text(json.dumps(dict(table=table, seed=args.seed, runs=rows), indent=1) + "\n")
    sys.exit(good != len(rows))


if __name__ == "__main__":
    main()
