"""Two processes (gloo): gradients are the one-process mean; resume is exact, also from DDP to FSDP2."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import load_pickle

ROOT = Path(__file__).parent.parent
VADER = [
    "vader.py", "--base", "tiny", "--sample-steps", "3", "--eval-n", "2", "--decode", "all", "--eta", "1"]
T2V = ["t2v.py", "--base", "tiny", "--no-cache-latents", "--preview-every", "0", "--rank", "0"]


def launch(processes, out, *args):
    """Run a method file, under torchrun when there is more than one process."""
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*start, *args, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_pickle(Path(out, "state.pt"))


def moments(state):
    """exp_avg after the first AdamW step is (1 - beta1) times the gradient."""
    return {k: v["exp_avg"] for k, v in state["moments"].items()}


def relative(a, b):
    """Length of the difference relative to b's."""
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_vader_gradients_of_two_processes_equal_the_one_process_mean(parallel, tmp_path):
    one = launch(1, tmp_path / "one", *VADER, "--steps", "1", "--batch", "2", "--accum", "2")
    two = launch(2, tmp_path / "two", *VADER, "--steps", "1", "--batch", "2", "--parallel", parallel)
    a, b = moments(one), moments(two)
    assert a.keys() == b.keys()
    moved = {k for k in a if a[k].abs().max() > 0}
    assert moved == {k for k in a if "lora_B" in k}  # A has no gradient while B is zero
    assert relative(*(torch.cat([m[k].flatten() for k in sorted(a)]) for m in (b, a))) < 1e-6


def test_resume_on_two_processes_is_exact_and_goes_from_ddp_to_fsdp(tmp_path):
    whole = launch(2, tmp_path / "whole", *VADER, "--steps", "3", "--batch", "2")
    launch(2, tmp_path / "parts", *VADER, "--steps", "2", "--batch", "2")
    (tmp_path / "fsdp").mkdir()
    for name in ("state.pt", "log.jsonl", "eval.jsonl"):
        (tmp_path / "fsdp" / name).write_bytes((tmp_path / "parts" / name).read_bytes())
    parts = launch(2, tmp_path / "parts", *VADER, "--steps", "3", "--batch", "2", "--resume")
    assert all(torch.equal(whole["weights"][k], v) for k, v in parts["weights"].items())
    other = launch(
        2, tmp_path / "fsdp", *VADER, "--steps", "3", "--batch", "2", "--resume", "--parallel", "fsdp")
    assert max(relative(other["weights"][k], v) for k, v in whole["weights"].items()) < 1e-4


BRANCH = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, torch.distributed as dist
from common import full
from models import CogVideoX, parallelize
from test_cogvideox import SMALL, filled, inputs
torch.manual_seed(0)
args, cond = inputs()
dist.init_process_group("gloo")
rank, one = dist.get_rank(), filled(CogVideoX(SMALL))
one(*args, **cond).square().mean().backward()
for mode in ("ddp", "fsdp"):
    net = filled(CogVideoX(SMALL))
    net.grad_ckpt = True
    net = parallelize(net, mode, torch.device("cpu"))
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
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*start, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
