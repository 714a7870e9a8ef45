"""Many processes (gloo) equal one, DDP equals FSDP2, and a run goes on with other numbers of them.

In float32 the same micro-batches summed in another order already differ by rounding, which AdamW divides by
itself where a gradient is nothing else (a bias before a norm): hence the published, small learning rates
here, and one comparison in float64, where no such excuse is left.
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import read_state

from common import read_lines
from weights import load_pickle

ROOT = Path(__file__).parent.parent
VADER = [
    "vader.py", "--base", "tiny", "--sample-steps", "3", "--eval-n", "2", "--decode", "all", "--eta", "1",
    "--steps", "5", "--batch", "1", "--lr", "2e-4", "--sweep", "0"]
T2V = [
    "t2v.py", "--base", "tiny", "--no-cache-latents", "--preview-every", "0", "--rank", "0", "--steps", "5",
    "--batch", "1", "--lr", "3e-5", "--lr-schedule", "constant", "--warmup", "0", "--ema", "0.9", "--eval-n", "1", "--sample-steps", "1"]


def command(processes, *args):
    """A method file, under torchrun when there is more than one process."""
    return [sys.executable, *args] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *args]


def launch(processes, out, *args):
    done = subprocess.run([*command(processes, *args), "--out", str(out)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return read_state(Path(out))


def relative(state, other, part):
    """Length of the difference of all weights, or of AdamW's mean gradients, relative to the other's."""
    def vector(s):
        values = {k: v["exp_avg"] for k, v in s["moments"].items()} if part == "gradients" else s["weights"]
        return torch.cat([values[k].flatten() for k in sorted(values)])
    return ((vector(state) - vector(other)).norm() / vector(other).norm()).item()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """method -> the state of one process after 5 steps of 4 samples."""
    seen = {}

    def run(method):
        if method not in seen:
            seen[method] = launch(1, tmp_path_factory.mktemp("one") / "run", *method, "--accum", "4")
        return seen[method]
    return lambda method: run(tuple(method))


@pytest.mark.parametrize("method, processes, parallel", [
    (VADER, 2, "fsdp"), *(pytest.param(*more, marks=pytest.mark.slow) for more in (
        (VADER, 2, "ddp"), (VADER, 4, "fsdp"), (T2V, 2, "fsdp"), (T2V, 4, "ddp")))])
def test_five_steps_of_many_processes_equal_one(method, processes, parallel, one, tmp_path):
    many = launch(
        processes, tmp_path, *method, "--accum", str(4 // processes), "--parallel", parallel,
        *(["--offload"] if processes == 4 else []))
    assert many["seen"] == one(method)["seen"] == 20
    assert relative(many, one(method), "gradients") < 2e-6  # see above
    assert relative(many, one(method), "weights") < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_fsdp_of_frozen_half_precision_and_trained_float32(dtype, tmp_path):
    state = launch(2, tmp_path, *VADER, "--dtype", dtype, "--parallel", "fsdp", "--steps", "3")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in state["weights"].values())
    assert any(v.abs().max() > 0 for k, v in state["weights"].items() if "lora_B" in k)


@pytest.mark.slow
def test_fsdp_from_scratch(tmp_path):
    """A sharded network, its text encoder whole on each process, and the moving average of both."""
    args = [*T2V, "--scratch", "--steps", "3", "--preview-every", "3"]
    one = launch(1, tmp_path / "one", *args, "--accum", "2")
    two = launch(2, tmp_path / "two", *args, "--parallel", "fsdp")
    assert relative(two, one, "weights") < 1e-5 and two["ema"].keys() == two["weights"].keys()


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(one, tmp_path):
    """DDP on 2, FSDP2 on 2, then one process: the run that one process makes alone, and no sample twice."""
    part = [*T2V, "--save-every", "1"]
    launch(2, tmp_path, *part, "--accum", "2", "--steps", "2")
    launch(2, tmp_path, *part, "--accum", "2", "--steps", "4", "--parallel", "fsdp", "--resume")
    last = launch(1, tmp_path, *part, "--accum", "1", "--batch", "4", "--resume")
    assert last["seen"] == 20 and relative(last, one(T2V), "weights") < 1e-6
    assert [row["step"] for row in read_lines(tmp_path / "log.jsonl")] == [0, 1, 2, 3, 4]


def test_resume_on_two_processes_is_exact(tmp_path):
    whole = launch(2, tmp_path / "whole", *VADER, "--steps", "3")
    launch(2, tmp_path / "parts", *VADER, "--steps", "2")
    parts = launch(2, tmp_path / "parts", *VADER, "--steps", "3", "--resume")
    assert all(torch.equal(whole["weights"][k], v) for k, v in parts["weights"].items())


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_is_told_to_stop(sign, tmp_path):
    """The signal reaches the processes twice, from the group and from torchrun: they save and leave."""
    args = [*T2V, "--steps", "10000", "--workers", "1", "--out", str(tmp_path)]
    run = subprocess.Popen(command(2, *args), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           start_new_session=True)
    try:
        while not (tmp_path / "log.jsonl").exists() or len(read_lines(tmp_path / "log.jsonl")) < 2:
            assert run.poll() is None
            time.sleep(0.1)
        os.killpg(run.pid, sign)
        run.wait(60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    state = load_pickle(tmp_path / "state.pt")
    assert state["step"] == len(read_lines(tmp_path / "log.jsonl")) >= 2


def test_two_nodes_meet(tmp_path):
    """torchrun.sh on two machines (both are this one): the same line on each."""
    env = os.environ | {"NODES": "2", "HOST": "127.0.0.1:29517", "NPROC": "1",
                        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    line = ["./torchrun.sh", *VADER, "--steps", "1", "--out", str(tmp_path)]
    nodes = [subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True) for _ in "ab"]
    texts = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert load_pickle(tmp_path / "state.pt")["seen"] == 2


DOUBLE = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import argparse
import torch, torch.distributed as dist
import bases, t2v
from common import Env, FiniteGuard, SampleNumbers, average_gradients, full, generator, trained
from data import read_batches
from models import add_lora, parallelize
from runs import spread
from pipeline import draw_latents, encode_clips
from tinyworld import TinyWorld

def run(mode, env, accum, rank):
    torch.manual_seed(0)
    base = bases.load_base("tiny", dtype=torch.float64)
    if rank:
        add_lora(base.net, rank, rank, ["to_q", "to_v"])
        base.net.double()
    else:
        base.net.requires_grad_(True)
    base.net.grad_ckpt = True
    net = parallelize(base.net, spread(*mode), env.device) if mode else base.net
    params = trained({{"": net}})
    opt = torch.optim.AdamW(params.values(), 1e-3)
    args = argparse.Namespace(batch=1, accum=accum, steps=5, offset_noise=0.1, timesteps="uniform",
                              keep_first=0.0)
    guard = FiniteGuard(env)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    numbers = SampleNumbers(args, env, 0, 0)
    batches, grads = read_batches(TinyWorld(64), numbers), []
    for i, batch in enumerate(batches):
        generators = [generator("sample", n) for n in numbers[i]]
        with torch.no_grad():
            x0 = draw_latents(base, env, encode_clips(base, env, batch["video"]), generators).double()
        average_gradients(net, i % accum == accum - 1)
        loss = t2v.t2v_loss(net, base, base.row.sample, x0, batch["text"], generators, args)
        (loss.double().mean() / accum).backward()
        if i % accum == accum - 1:
            grads.append(torch.cat([full(p.grad).flatten() for p in params.values()]))
            guard.step(opt, scaler, list(params.values()), 1.0)
    return torch.stack(grads), torch.cat([full(p).flatten() for p in params.values()])

dist.init_process_group("gloo")
alone = Env(0, 1, torch.device("cpu"), torch.float64)
env = Env(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), torch.float64)
for rank in (0, 4):
    one = run(None, alone, 4, rank)
    for mode in (("ddp",), ("fsdp",), ("fsdp", 2))[:2 + (env.world == 4)]:  # the last: 2 copies of 2 shards
        for a, b, what in zip(run(mode, env, 4 // env.world, rank), one, ("gradients", "weights")):
            error = ((a - b).norm() / b.norm()).item()
            print(mode, env.world, what, error)
            assert error < {bound}, (mode, what, error)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_in_float64_many_processes_equal_one(processes, tmp_path):
    script = tmp_path / "double.py"
    script.write_text(DOUBLE.format(root=str(ROOT), tests=str(ROOT / "tests"), bound=1e-12))
    done = subprocess.run(command(processes, str(script)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


NODES = """
import sys
sys.path[:0] = [{root!r}]
from pathlib import Path
import argparse, common
import torch, torch.distributed as dist
from torch import nn
from common import full, load_state, load_state_file
from models import add_lora, parallelize

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6)) for _ in range(3))
        self.out = nn.Linear(6, 3)  # of 4 processes one has no row of it, of 2 the last has 1 of 3
        self.register_buffer("scale", torch.tensor(3.0))

    def units(self):
        return list(self.blocks)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.scale * self.out(x)

class Learner:
    def __init__(self, env, rank, parallel=None, group=None):
        torch.manual_seed(0)
        self.env, net = env, Net().double()
        if parallel and env.rank:  # as load_base() does: the weights come from the first process
            net = net.to("meta").to_empty(device="cpu")
        if parallel:
            common.send_weights([net])
        if rank:
            torch.manual_seed(1)
            add_lora(net, rank, rank, ["0", "2"])
            net.double()
            for block in net.blocks:
                nn.init.ones_(block[0].lora_B.weight)
        args = argparse.Namespace(parallel=parallel, shard_group=group, offload=False, compile=False)
        self.net = parallelize(net, args, env.device) if parallel else net
        self.params = common.trained({{"": self.net}})
        self.opt = torch.optim.AdamW(self.params.values(), 1e-3)
        self.ema = {{k: p.detach().clone() for k, p in self.params.items()}}
        self.guard, self.scaler, self.norms = common.FiniteGuard(env), torch.amp.GradScaler("cpu", enabled=False), []

    def train(self, first, last):
        for step in range(first, last):
            x = torch.randn(4, 6, dtype=torch.float64, generator=common.generator(step))
            mine = slice(None) if self.env.world == 1 else slice(self.env.rank, self.env.rank + 1)
            self.net(x[mine]).square().mean().backward()
            self.norms.append(self.guard.step(self.opt, self.scaler, self.params.values(), 1e-2))
            common.move_average(self.ema, self.params, 0.9)
        return self

    def save(self, out, step):
        meta = dict(method="t2v", base="tiny", sample={{}})
        common.save_checkpoint(argparse.Namespace(out=str(out), keep=1), self.env, step, 4 * step, self.params, meta,
                               self.opt, self.ema)

    def load(self, path):
        args = argparse.Namespace(out=str(path.parent), keep=1)
        assert load_state(args, self.env, load_state_file(path), self.params, self.opt, self.ema) == (3, 12)
        return self.train(3, 5)

    def result(self):
        values = [*self.params.values(), *self.ema.values()]
        values += [self.opt.state[p][n] for p in self.params.values() for n in ("exp_avg", "exp_avg_sq", "step")]
        return torch.cat([full(t).double().flatten() for t in values])

out = Path({out!r})
env = common.setup("cpu", "fp32", 0, "fsdp")
alone = common.Env(0, 1, env.device, env.dtype)
for rank in (0, 2):
    one = Learner(alone, rank).train(0, 3)
    if env.main:
        one.save(out / f"one-{{rank}}", 3)
    one.train(3, 5)
    for group in (None, 2):
        folder = out / f"{{rank}}-{{group}}"
        many = Learner(env, rank, "fsdp", group).train(0, 2)
        many.save(folder, 2)
        many.train(2, 3).save(folder, 3)
        common.meet()
        assert sorted(p.name for p in folder.iterdir()) == [
            "ckpt-3.safetensors", "ckpt.safetensors", "state", "state-previous"]
        sizes = [p.stat().st_size for p in sorted((folder / "state").iterdir())]
        assert len(sizes) == (group or 4), sizes
        many.train(3, 5)
        assert (torch.stack(many.norms) / torch.stack(one.norms) - 1).abs().max() < {bound}
        def near(other):
            error = ((other.result() - one.result()).norm() / one.result().norm()).item()
            assert error < {bound}, (rank, group, error)
        near(many)
        again = Learner(env, rank, "fsdp", group).load(folder / "state")
        assert torch.equal(again.result(), many.result())
        near(Learner(env, rank, "fsdp", 2 if group is None else None).load(folder / "state"))
        near(Learner(env, rank, "fsdp", group).load(out / f"one-{{rank}}" / "state.pt"))
        near(Learner(alone, rank).load(folder / "state"))
        common.meet()
        if env.main:  # the run goes on as one process: its state is the only one
            one.save(folder, 5)
            assert not (folder / "state").exists() and (folder / "state.pt").exists()
dist.destroy_process_group()
"""


def test_shards_of_four_processes_on_two_nodes(tmp_path):
    """Shards over all, and 2 copies of 2 shards: one process's run in float64, its norms of gradients, average and
    moments. The state is written in parts, and read by the same, by another number of processes and by one."""
    script = tmp_path / "nodes.py"
    script.write_text(NODES.format(root=str(ROOT), out=str(tmp_path), bound=1e-12))
    done = subprocess.run(command(4, str(script)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


BRANCH = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, torch.distributed as dist
from common import full
from dit import CogVideoX
from models import parallelize
from runs import spread
from test_cogvideox import SMALL, filled, inputs
torch.manual_seed(0)
args, cond = inputs()
dist.init_process_group("gloo")
rank, one = dist.get_rank(), filled(CogVideoX(SMALL))
one(*args, **cond).square().mean().backward()
for mode in ("ddp", "fsdp"):
    net = filled(CogVideoX(SMALL))
    net.grad_ckpt = True
    net = parallelize(net, spread(mode), torch.device("cpu"))
    mine = {{k: v[rank:rank + 1] for k, v in cond.items()}}
    net(*(a[rank:rank + 1] for a in args), **mine).square().mean().backward()
    pairs = [(full(p.grad), q.grad) for p, q in zip(net.parameters(), one.parameters())]
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in zip(*pairs))
    assert (a - b).norm() < 3e-6 * b.norm(), (mode, (a - b).norm() / b.norm())
dist.destroy_process_group()
"""


def test_cogvideox_gradients_of_two_processes(tmp_path):
    """Diffusion as Shader's network whole and in shards, blocks recomputed: the one-process gradients."""
    script = tmp_path / "branch.py"
    script.write_text(BRANCH.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = subprocess.run(command(2, str(script)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
