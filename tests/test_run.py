"""A run survives: corrupt and missing files, full disks, signals, numbers that are not finite, no memory."""
import ast
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import pipeline
import sample
import t2v
import tinyworld
import vader
from common import Env, FiniteGuard, UserError, clip_gradients, memory_advice
from weights import load_checkpoint, load_pickle

ROOT = Path(__file__).parent.parent
ARGS = ["--base", "tiny", "--batch", "2", "--rank", "2", "--preview-every", "0", "--save-every", "1",
        "--keep", "2", "--lr-schedule", "constant", "--no-cache-latents", "--eval-n", "1", "--sample-steps", "1"]
CPU = Env(0, 1, torch.device("cpu"), torch.float32)


def train(out, steps, *more):
    t2v.main([*ARGS, "--steps", str(steps), "--out", str(out), *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 4 steps that nothing disturbed: its folder."""
    out = tmp_path_factory.mktemp("whole")
    train(out, 4)
    return out


def same(a, b):
    """Are the weights, moments and log of two runs the same, bit for bit?"""
    x, y = (load_pickle(d / "state.pt") for d in (a, b))
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in common.read_lines(d / "log.jsonl")]
            for d in (a, b)]
    tensors = [load_file(d / "ckpt.safetensors") for d in (a, b)]
    equal = all(torch.equal(x["weights"][k], v) for k, v in y["weights"].items())
    equal &= all(torch.equal(v, y["moments"][k][n]) for k, m in x["moments"].items() for n, v in m.items())
    return equal and logs[0] == logs[1] and all(torch.equal(v, tensors[1][k]) for k, v in tensors[0].items())


# ---- files

def cut(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size * 2 // 3])


def flip(file):
    content = bytearray(file.read_bytes())
    at = len(content) // 2
    content[at] ^= 255
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("harm", [
    flip, *(pytest.param(harm, marks=pytest.mark.slow) for harm in (cut, empty, Path.unlink))])
def test_a_harmed_state_is_named_and_the_one_before_it_taken(harm, whole, tmp_path, capsys):
    train(tmp_path, 3)
    harm(tmp_path / "state.pt")
    capsys.readouterr()
    train(tmp_path, 4, "--resume")
    err = capsys.readouterr().err
    assert harm is Path.unlink or (str(tmp_path / "state.pt") in err and "trying the one before" in err)
    assert (tmp_path / "state.pt.corrupt").exists() == (harm is not Path.unlink)
    assert load_pickle(tmp_path / "state-previous.pt")["step"] in (2, 3)
    assert same(tmp_path, whole)


def test_no_whole_state_is_an_error(message, tmp_path):
    train(tmp_path, 2)
    cut(tmp_path / "state.pt")
    flip(tmp_path / "state-previous.pt")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    text = message(t2v.main, [*ARGS, "--out", str(tmp_path), "--resume"])
    assert "no whole state" in text and "--out" in text
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


@pytest.mark.parametrize("harm", [
    cut, *(pytest.param(harm, marks=pytest.mark.slow) for harm in (flip, empty))])
def test_a_harmed_checkpoint_is_named_and_the_one_before_it_taken(harm, message, tmp_path, capsys):
    train(tmp_path, 2)
    good = {k: v.clone() for k, v in load_file(tmp_path / "ckpt.safetensors").items()}  # not memory-mapped
    harm(tmp_path / "ckpt.safetensors")
    tensors, meta = load_checkpoint(tmp_path)
    assert meta["step"] == 2 and all(torch.equal(tensors[k], v) for k, v in good.items())
    assert "ckpt.safetensors: " in capsys.readouterr().err
    harm(tmp_path / "ckpt-2.safetensors")
    assert load_checkpoint(tmp_path)[1]["step"] == 1
    harm(tmp_path / "ckpt-1.safetensors")
    assert "ckpt-1.safetensors" in message(sample.main, ["--ckpt", str(tmp_path), "--prompt", "a red circle"])


@pytest.mark.slow
def test_a_log_whose_last_line_was_cut_off(whole, tmp_path):
    train(tmp_path, 2)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 2, "lo')
    train(tmp_path, 4, "--resume")
    assert same(tmp_path, whole)


def test_keep(tmp_path):
    train(tmp_path, 4)
    assert common.steps_saved(tmp_path) == [4, 3]
    train(tmp_path, 5, "--keep", "1", "--resume")
    assert common.steps_saved(tmp_path) == [5]
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~common.UMASK for p in tmp_path.glob("*.safetensors"))


def test_pickles_are_loaded_without_code_and_nothing_shared_is_one():
    """Every torch.load in the repository has weights_only=True; what is shared is safetensors."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
        for call in calls:
            name, options = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            if name in ("torch.load", "pickle.load", "pickle.loads"):
                assert options.get("weights_only") == "True", f"{file.name}: {ast.unparse(call)}"
            assert options.get("allow_pickle", "False") == "False", f"{file.name}: {ast.unparse(call)}"
    shared = {p.suffix for p in (ROOT / "assets").rglob("*") if p.is_file()}
    assert shared <= {".gif", ".safetensors", ".png", ".txt"}


# ---- disks

def command(*args):
    return [sys.executable, "t2v.py", *ARGS, *args]


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path):
    """No file may grow beyond a limit: first checkpoints do not fit, then the state does not."""
    def limit(size):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    train(tmp_path, 2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix in (".pt", ".safetensors")}
    sizes = {k: len(v) for k, v in before.items()}
    line = command("--steps", "3", "--resume", "--out", str(tmp_path))
    for size in (sizes["ckpt.safetensors"] // 2, (sizes["ckpt.safetensors"] + sizes["state.pt"]) // 2):
        done = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, preexec_fn=limit(size))
        assert done.returncode == 1
        error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and "cannot be written" in error[0] and str(tmp_path) in error[0], done.stderr
        assert "Traceback" not in done.stderr and not list(tmp_path.glob(".*tmp*"))
        assert load_pickle(tmp_path / "state.pt")["step"] == 2
    assert (tmp_path / "state.pt").read_bytes() == before["state.pt"]
    train(tmp_path, 3, "--resume")  # with room again it goes on
    assert load_pickle(tmp_path / "state.pt")["step"] == 3


def test_out_that_cannot_be_written(message, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert "is a file" in message(t2v.main, [*ARGS, "--out", str(tmp_path / "file")])
    assert "is a file" in message(vader.main, ["--base", "tiny", "--out", str(tmp_path / "file" / "deep")])
    line = ["--base", "tiny", "--prompt", "a", "--out", str(tmp_path / "file")]
    assert "is a file" in message(sample.main, line)
    assert "another folder" in message(t2v.main, [*ARGS, "--out", str(tmp_path / ("x" * 300))])
    monkeypatch.setattr(os, "access", lambda *a: False)  # root may write everywhere
    assert "cannot be written" in message(t2v.main, [*ARGS, "--out", str(tmp_path / "new")])
    monkeypatch.undo()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: usage)
    assert "larger disk" in message(t2v.main, [*ARGS, "--out", str(tmp_path / "new")])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- signals

@pytest.mark.parametrize("sign, workers", [
    (signal.SIGTERM, "0"), (signal.SIGTERM, "1"), (signal.SIGINT, "0")])
def test_asked_to_stop_it_saves_and_leaves(sign, workers, tmp_path):
    """The signal goes to the whole group, reading processes included, as schedulers and terminals send it."""
    line = command("--steps", "10000", "--save-every", "9999", "--workers", workers, "--out", str(tmp_path))
    run = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    while len(common.read_lines(tmp_path / "log.jsonl")) < 2:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    os.killpg(run.pid, sign)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0 and "Traceback" not in err and "saving first" in out
    steps = load_pickle(tmp_path / "state.pt")["step"]
    assert steps == len(common.read_lines(tmp_path / "log.jsonl")) >= 2 and (tmp_path / "curve.png").exists()


# ---- numbers that are not finite

class Weight:
    """One weight, its optimizer and the guard of a run in fp16 or fp32."""

    def __init__(self, fp16):
        self.p = torch.nn.Parameter(torch.ones(1))
        self.opt = torch.optim.SGD([self.p], lr=1.0)
        self.scaler = torch.amp.GradScaler("cpu", enabled=fp16, init_scale=8.0)
        self.guard = FiniteGuard(CPU)

    def step(self, slope, **terms):
        self.scaler.scale(self.p * slope).backward()
        return self.guard.step(self.opt, self.scaler, [self.p], 1.0, **terms)


def test_a_step_without_numbers_is_left_out_and_named(capsys):
    w, fine, nan = Weight(False), torch.tensor(1.0), torch.tensor(float("nan"))
    assert w.step(2.0, reward=fine) == 2 and w.p.item() == pytest.approx(0, abs=1e-5)  # clipped
    w.step(1.0, flow=fine, text_motion=nan)
    w.step(float("inf"), flow=fine)
    assert w.p.item() == pytest.approx(0, abs=1e-5) and w.guard.bad == 2
    out = capsys.readouterr().out
    assert "text_motion is not finite" in out and "gradient is not finite" in out
    w.step(1.0, flow=fine)
    assert w.guard.bad == 0
    with pytest.raises(UserError, match="flow was not finite 10 steps in a row"):
        for _ in range(10):
            w.step(1.0, flow=nan)


def test_fp16_looks_for_its_scale_without_being_counted():
    w, fine = Weight(True), torch.tensor(1.0)
    for scale in (4, 2, 1):
        w.step(float("inf"), loss=fine)
        assert w.scaler.get_scale() == scale and w.guard.bad == 0 and w.p.item() == 1
    w.step(float("inf"), loss=fine)  # not a matter of scale any more
    assert w.guard.bad == 1
    assert w.step(0.5, loss=fine) == 0.5 and w.p.item() == 0.5


def test_gradients_are_clipped_together():
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in "ab")
    a.grad, b.grad = torch.tensor([3.0, 0]), torch.tensor([0, 4.0])
    assert clip_gradients([a, b], 1.0) == 5
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([0.6, 0, 0, 0.8]))
    clip_gradients([a, b], 2.0)
    torch.testing.assert_close(a.grad, torch.tensor([0.6, 0]))


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_half_precision(dtype, tmp_path):
    train(tmp_path, 3, "--dtype", dtype)
    state = load_pickle(tmp_path / "state.pt")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in state["weights"].values())
    assert (state["scaler"] != {}) == (dtype == "fp16")
    train(tmp_path, 4, "--dtype", dtype, "--resume")
    losses = [row["loss"] for row in common.read_lines(tmp_path / "log.jsonl")]
    train(tmp_path / "fp32", 4)
    full = [row["loss"] for row in common.read_lines(tmp_path / "fp32" / "log.jsonl")]
    assert losses == pytest.approx(full, rel=0.05)


# ---- memory

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")])
def test_no_memory_lists_the_dials(error, message):
    @memory_advice("--grad-ckpt", "--batch 1")
    def work():
        raise error
    assert "try, in this order: --grad-ckpt, --batch 1" in message(work)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape"), memory_advice("--batch 1"):
        raise RuntimeError("shape of memory")


@pytest.mark.slow
@pytest.mark.parametrize("method, more", [(t2v, ARGS), (vader, [
    "--base", "tiny", "--batch", "2", "--sample-steps", "3", "--eval-n", "1", "--backprop", "last-2",
    "--sweep", "0"])])
def test_offload_changes_nothing_but_where_things_wait(method, more, tmp_path):
    packed = []

    class Spy(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory):
            packed.append(pin_memory)
            super().__init__(pin_memory)
    for name, option in (("plain", []), ("offload", ["--offload"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd.graph, "save_on_cpu", Spy)
            method.main([*more, "--steps", "2", "--grad-ckpt", "--out", str(tmp_path / name), *option])
        assert bool(packed) == bool(option)
    assert same(tmp_path / "plain", tmp_path / "offload")


# ---- latents encoded once

@pytest.mark.slow
def test_latents_are_encoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "TinyWorld", lambda n, *more, **options: tinyworld.TinyWorld(
        70, *more, **options))
    calls, encode = [], pipeline.encode_clips

    def spy(base, env, video):
        calls.append(len(video))
        return encode(base, env, video)
    monkeypatch.setattr(pipeline, "encode_clips", spy)
    cached = [a for a in ARGS if a != "--no-cache-latents"]

    def go(out, steps, *more):
        calls.clear()
        t2v.main([*cached, "--cache-latents", "--steps", str(steps), "--out", str(out), *more])
        return sum(calls)
    assert go(tmp_path / "whole", 4) == 70
    assert go(tmp_path / "parts", 2) == 70 and go(tmp_path / "parts", 4, "--resume") == 0
    assert same(tmp_path / "whole", tmp_path / "parts")
    files = sorted((tmp_path / "parts" / "latents").iterdir())
    assert [f.name for f in files] == ["000000.safetensors", "000001.safetensors"]
    cut(files[1])  # 6 clips
    assert go(tmp_path / "parts", 5, "--resume") == 6
    plain = tmp_path / "plain"
    train(plain, 4)
    a, b = (load_pickle(d / "state.pt")["weights"] for d in (plain, tmp_path / "whole"))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-4  # kept in fp16


def test_args_are_kept(whole):
    assert json.loads((whole / "args.json").read_text())["steps"] == 4
