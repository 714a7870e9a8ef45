"""Signals and the screen: a command that is asked to end does so within seconds, and saves first
if it trains. A line that cannot be printed does no harm.

Every command imports common.py, which imports this module, before all others: a signal may come
while torch is imported.
"""
import contextlib
import ctypes
import io
import os
import signal
import sys
import time
from pathlib import Path

# a scheduler, Ctrl-C, a closed terminal, a cluster's warning
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
TORCHRUN = "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
UNDER_TORCHRUN = all(name in os.environ for name in TORCHRUN)
MAIN = not UNDER_TORCHRUN or os.environ["RANK"] == "0"  # does this process print and write?


class Stop:
    """Has this process been asked to end?

    A signal ends it at once with exit code 128 + its number; SystemExit is raised, so temporary
    files are removed. During a training step (`training`) a signal only sets `asked`; the run then
    finishes the step, saves and leaves. A second signal, 2 s later or more, ends it in any case.
    """

    def __init__(self):
        self.importing = self.training = False
        self.when = None    # time of the first request
        self.reason = None  # of a request that is not the user's: the run ends with this error
        self.code = 0

    @property
    def asked(self):
        return self.when is not None

    def listen(self):
        """From now on, take SIGNALS as requests to end."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        first = not self.asked
        if not first and time.monotonic() - self.when < 2:
            return  # torchrun passes on what the terminal has already sent to all of us
        self.when, self.code = self.when or time.monotonic(), 128 + number
        if first and self.training:
            say("stopping after this step: saving first (again to leave at once)", 1)
            return
        say(f"stopped by {signal.Signals(number).name}", 2)
        if self.importing:  # nothing to tidy up, and half an import may swallow an exception
            os._exit(self.code)
        raise SystemExit(self.code)

    def give_up(self, reason):
        """During a training step: finish it, save, and end with this error."""
        self.when, self.reason, self.code = self.when or time.monotonic(), reason, 1

    def end_step(self):
        """All that was trained is saved: a signal need not wait any more, nor need an earlier
        one."""
        self.training = False
        if self.asked:
            raise SystemExit(self.code)


def say(text, file):
    """Write a line to file descriptor `file`. A signal handler must not call print(), which it
    may have interrupted."""
    if MAIN:
        with contextlib.suppress(OSError):
            os.write(file, f"{text}\n".encode())


def end_with_parent(number):
    """Linux sends this process the signal `number` when its parent ends; elsewhere nothing does."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG


class Screen(io.FileIO):
    """Where stdout or stderr goes. What cannot be written (pipe closed, disk full) is lost."""

    def write(self, data):
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def steady(stream):
    """sys.stdout or sys.stderr -> the same by way of Screen; letters that its encoding does not
    have are escaped."""
    raw = io.BufferedWriter(Screen(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)


stop = Stop()
command = getattr(sys.modules["__main__"], "__file__", None)
if command and Path(command).resolve().parent == Path(__file__).resolve().parent:
    stop.importing = True  # until run_command()
    stop.listen()
    if UNDER_TORCHRUN:
        end_with_parent(signal.SIGTERM)
    while (spare := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # a closed stdin, stdout or stderr: else the next file opened would take its place
    os.close(spare)
    sys.stdout, sys.stderr = (steady(s) if s else s for s in (sys.stdout, sys.stderr))
