"""Two at once, signals, and places where a command runs: who owns --out, who ends when, what cannot be printed."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import data
import signals
from common import LOCK, TEMPORARY, own_folder, read_ranks, release_folders, write_atomic
from signals import Stop

ROOT = Path(__file__).parent.parent
T2V = ["t2v.py", "--base", "tiny", "--batch", "1", "--rank", "2", "--no-cache-latents", "--eval-n", "1", "--sample-steps", "1",
       "--save-every", "9999", "--preview-every", "0"]


def rows(out):
    return len(common.read_lines(out / "log.jsonl"))


def start(line, **options):
    return subprocess.Popen([sys.executable, *line], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, **options)


def wait_until(true, process=None):
    while not true():
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


# ---- one owner of --out

@pytest.fixture
def owner():
    """folder -> a process that owns it, until it is killed."""
    children = []

    def own(folder):
        ready, told = os.pipe()
        children.append(os.fork())
        if not children[-1]:
            own_folder(folder)
            os.write(told, b"x")
            time.sleep(60)
            os._exit(0)
        assert os.read(ready, 1)
        return children[-1]

    def kill(child):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        children.remove(child)
    own.kill = kill
    yield own
    for child in list(children):
        kill(child)
    release_folders()


def test_the_second_run_is_refused_and_a_dead_owner_keeps_nothing(owner, message, tmp_path):
    out = tmp_path / "a" / "run"
    child = owner(out)
    assert str(child) in message(own_folder, out)
    out.rename(tmp_path / "renamed")  # the lock goes along
    assert str(child) in message(own_folder, tmp_path / "renamed")
    own_folder(tmp_path / "other")
    owner.kill(child)
    own_folder(tmp_path / "renamed")
    own_folder(tmp_path / "renamed")  # one process is one owner
    release_folders()
    assert not (tmp_path / "other").exists() and not (tmp_path / "renamed" / LOCK).exists()


def test_copies_of_a_run_have_owners_of_their_own(owner, message, tmp_path):
    child = owner(tmp_path / "run")
    for name in ("hard", "copy"):
        (tmp_path / name).mkdir()
    os.link(tmp_path / "run" / LOCK, tmp_path / "hard" / LOCK)
    (tmp_path / "copy" / LOCK).write_bytes((tmp_path / "run" / LOCK).read_bytes())
    own_folder(tmp_path / "hard")
    own_folder(tmp_path / "copy")
    assert str(child) in message(own_folder, tmp_path / "run")


def test_locks_that_are_none(message, tmp_path, monkeypatch, capsys):
    (tmp_path / LOCK).symlink_to(tmp_path / "victim")
    assert LOCK in message(own_folder, tmp_path) and not (tmp_path / "victim").exists()
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).mkdir()
    assert LOCK in message(own_folder, tmp_path)
    (tmp_path / LOCK).rmdir()

    def none(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(common.fcntl, "lockf", none)
    own_folder(tmp_path)
    release_folders()
    assert "no locks here" in capsys.readouterr().err


def test_what_a_dead_writer_left_is_removed(tmp_path):
    below = tmp_path / "clips"
    other = tmp_path / "other-run"
    for folder in (below, other):
        folder.mkdir()
    (other / LOCK).write_text("")
    left = [tmp_path / f"{TEMPORARY}a.pt", below / f"{TEMPORARY}b.mp4", other / f"{TEMPORARY}c.pt"]
    for file in left:
        file.write_text("half")
    own_folder(tmp_path)
    release_folders()
    assert [file.exists() for file in left] == [False, False, True]


# ---- files

def test_planted_links_are_not_followed(tmp_path):
    (tmp_path / "victim").write_text("v")
    names = ("state.pt", ".state.tmp.pt", "log.jsonl", "scores-0.jsonl", f"{TEMPORARY}x.pt")
    for name in names:
        (tmp_path / name).symlink_to("victim")
    write_atomic(tmp_path / "state.pt", lambda p: p.write_text("new"))
    common.write_lines(tmp_path / "log.jsonl", [{}])
    with pytest.raises(common.UserError, match="scores-0.jsonl"):
        common.append_line(tmp_path / "scores-0.jsonl", {})
    assert (tmp_path / "victim").read_text() == "v" and (tmp_path / "state.pt").read_text() == "new"


@pytest.mark.parametrize("error", [SystemExit, ValueError, KeyboardInterrupt])
def test_a_writer_that_is_stopped_leaves_nothing(error, tmp_path):
    def write(path):
        path.write_text("half")
        raise error
    (tmp_path / "a.pt").write_text("old")
    with pytest.raises(error):
        write_atomic(tmp_path / "a.pt", write)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"] and (tmp_path / "a.pt").read_text() == "old"


# ---- signals

def test_a_signal_ends_a_command_but_a_training_step_first(capfd):
    stop = Stop()
    with pytest.raises(SystemExit) as e:
        stop.on_signal(signal.SIGTERM, None)
    assert e.value.code == 143
    stop.on_signal(signal.SIGTERM, None)  # at once again: the same request, by way of torchrun
    stop.when -= 3
    with pytest.raises(SystemExit):
        stop.on_signal(signal.SIGTERM, None)
    stop = Stop()
    stop.training = True
    stop.on_signal(signal.SIGHUP, None)
    assert stop.asked and "saving first" in capfd.readouterr().out
    with pytest.raises(SystemExit) as e:  # it came during the save that precedes an evaluation
        stop.end_step()
    assert e.value.code == 129


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_imports_is_one_line(sign, tmp_path):
    run = start([*T2V, "--out", str(tmp_path / "run")])
    status = Path(f"/proc/{run.pid}/status")
    wait_until(lambda: int(re.search(r"SigCgt:\s(\w+)", status.read_text())[1], 16) >> (signal.SIGUSR1 - 1) & 1, run)
    run.send_signal(sign)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err) == (128 + sign, "", f"stopped by {sign.name}\n")


class Numbers(torch.utils.data.Dataset):
    """Item (i, _) is i; a process other than the one that made it is killed at item 5."""

    def __init__(self):
        self.home = os.getpid()

    def __getitem__(self, item):
        if item[0] == 5 and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(item[0])


def test_a_reader_that_is_killed(monkeypatch, message):
    order = [[(i, i), (i + 1, i)] for i in range(0, 12, 2)]
    monkeypatch.setattr(signals, "stop", Stop())
    assert "--workers 0" in message(lambda: list(data.load(Numbers(), iter(order), workers=1)))
    signals.stop.training = True
    batches = [b.tolist() for b in data.load(Numbers(), iter(order), workers=2)]
    assert batches == [[i, i + 1] for i in range(0, 12, 2)]  # until the step is finished
    assert signals.stop.asked and "was killed" in signals.stop.reason


def test_readers_without_shared_memory():
    text = "unable to write to file </torch_1_2_3>: No space left on device (28)"
    assert "/dev/shm" in data.why_lost(RuntimeError(text), []) and "--workers 0" in data.why_lost(RuntimeError(text), [])
    assert not data.why_lost(common.UserError("/data/shm/a.mp4: cannot be decoded"), [])


# ---- where it runs

@pytest.mark.parametrize("given", [
    {"RANK": "1"}, {"WORLD_SIZE": "8"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "", "WORLD_SIZE": "1"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}])
def test_left_over_variables(given, monkeypatch, message):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    text = message(read_ranks)
    assert all(f"{name}={value}" in text for name, value in given.items()) and "torchrun" in text


def test_variables_of_a_single_process(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert read_ranks() == (0, 1, 0)


@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_what_cannot_be_printed_is_lost(kind):
    if kind == "full disk":
        file = os.open("/dev/full", os.O_WRONLY)
    else:
        end, file = os.pipe()
        os.close(end)
    stream = signals.steady(os.fdopen(file, "w"))
    for _ in range(3):
        print("x" * 10000, file=stream, flush=True)
    stream.close()


def test_letters_that_the_terminal_lacks(tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        print("né", file=signals.steady(file), flush=True)
    assert (tmp_path / "out").read_bytes() == b"n\\xe9\n"


@pytest.mark.slow
def test_nowhere_to_print_and_no_backend_to_draw_with(tmp_path):
    line = f"{sys.executable} {' '.join(T2V)} --steps 1 --out {tmp_path}"
    odd = os.environ | {"MPLBACKEND": "nonsense", "PYTHONIOENCODING": "ascii"}
    assert subprocess.run(f"{line} >/dev/full 2>&1", shell=True, cwd=ROOT, env=odd).returncode == 0
    odd["MPLBACKEND"] = "module://matplotlib_inline.nowhere"
    done = subprocess.run(f"{line} --resume --steps 2 >&- 2>&- <&-", shell=True, cwd=ROOT, env=odd)
    assert done.returncode == 0 and rows(tmp_path) == 2 and (tmp_path / "curve.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_pipe_breaks_first_and_all_is_saved(sign, tmp_path):
    line = f"({sys.executable} {' '.join(T2V)} --steps 99999 --out {tmp_path}; echo $? >{tmp_path}/code) 2>&1 | cat"
    run = subprocess.Popen(line, shell=True, cwd=ROOT, stdout=subprocess.DEVNULL, executable="/bin/bash")
    wait_until(lambda: rows(tmp_path) >= 1, run)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    cat = next(k for k in children if Path(f"/proc/{k}/comm").read_text() == "cat\n")
    os.kill(int(cat), signal.SIGKILL)
    os.kill(int((tmp_path / LOCK).read_text().split()[0]), sign)
    run.wait(120)
    assert common.load_state_file(tmp_path / "state.pt")["step"] == rows(tmp_path) >= 1
    assert (tmp_path / "code").read_text() == "0\n"


@pytest.mark.slow
def test_a_signal_in_an_evaluation(tmp_path):
    more = ["--preview-every", "1", "--sample-steps", "200", "--steps", "9", "--out", str(tmp_path)]
    run = start([*T2V, *more, "--rank", "0", "--scratch"])  # from scratch: no evaluation before
    wait_until(lambda: (tmp_path / "state.pt").exists(), run)
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 143 and err.endswith("stopped by SIGTERM\n") and "Traceback" not in err
    assert time.monotonic() - began < 20 and rows(tmp_path) == 1 and not list(tmp_path.rglob(f"{TEMPORARY}*"))


@pytest.mark.slow
def test_a_signal_while_clips_are_made(tmp_path):
    run = start(["sample.py", "--base", "tiny", "--judge", "99", "--batch", "1", "--sample-steps", "4", "--out", str(tmp_path)])
    wait_until(lambda: len(list(tmp_path.glob("*.mp4"))) >= 2, run)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (130, "stopped by SIGINT\n")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_ranks_end_with_torchrun_and_readers_with_the_run(tmp_path):
    out = tmp_path / "run"
    run = start(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *T2V, "--steps", "99999",
                 "--workers", "1", "--out", str(out)])

    def mine():
        """Processes whose command line names the folder."""
        return [p.name for p in Path("/proc").iterdir() if p.name.isdigit() and p.name != str(run.pid)
                and str(out) in (p / "cmdline").read_text()]
    wait_until(lambda: rows(out) >= 1, run)
    assert len(mine()) >= 3
    run.kill()
    run.wait()
    wait_until(lambda: not mine())
    assert common.load_state_file(out / "state.pt")["step"] == rows(out) >= 1
