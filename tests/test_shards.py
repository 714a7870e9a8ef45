"""The state of a sharded run, a file per process: kills, damage, hostile files. Processes: see test_dist.py."""
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from runs import read_state
from safetensors.torch import save_file
from test_weights import put
from test_weights import state as plain_state

import bases
import common
import vader
import weights
from common import Env, UserError, load_state_file, open_shards, save_shards, save_state


class Killed(BaseException):
    pass


def save(out, step, processes=2):
    """A state as that many processes write it; its tensors are full of `step`."""
    class Shard(SimpleNamespace):
        def to_local(self):
            return torch.full((2, 3), float(step)).chunk(processes)[self.rank].clone()
    fields = plain_state() | {"step": step, "seen": 6 * step}

    def part(rank):
        shard = Shard(rank=rank, device_mesh=SimpleNamespace(size=lambda dim: processes))
        moments = {"a": dict(step=torch.tensor(float(step)), exp_avg=shard, exp_avg_sq=shard)}
        save_shards(out, Env(rank, processes, torch.device("cpu"), torch.float32),
                    {k: fields[k] for k in ("step", "seen", "meta", "scaler")}, {"a": shard}, moments, {"a": shard})
    others = list(range(1, processes))

    def meet():  # while the first process waits, the others write
        while others:
            part(others.pop())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "meet", meet)
        part(0)


def is_whole(out):
    """-> the step of the state that a resumed run would take, all of it read."""
    state = read_state(out)
    tensors = [state["weights"]["a"], state["ema"]["a"], *state["moments"]["a"].values()]
    assert all((t == state["step"]).all() for t in tensors) and tensors[0].shape == (2, 3)
    return state["step"]


def test_a_state_in_parts_is_read_as_a_whole_and_by_rows(tmp_path):
    save(tmp_path, 3)
    assert is_whole(tmp_path) == 3 and not (tmp_path / "state-previous").exists()
    weight = load_state_file(tmp_path / "state")["weights"]["a"]
    assert weight.shape == (2, 3) and weight[1:2].shape == (1, 3) and weight[2:4].shape == (0, 3)
    save(tmp_path, 4, processes=1)
    assert is_whole(tmp_path) == 4 and len(list((tmp_path / "state").iterdir())) == 1
    shutil.rmtree(tmp_path / "state")
    assert is_whole(tmp_path) == 3


@pytest.mark.parametrize("before", ["parts", "file"])
def test_a_kill_at_any_moment_leaves_a_whole_state(before, tmp_path):
    """Stopped at each rename, removal and fsync in turn: the state is the old one or the new."""
    moments, seen = 0, set()
    while True:
        out = tmp_path / str(moments)
        out.mkdir()
        if before == "file":
            old = plain_state() | {"step": 2, "seen": 12}
            tensors = {k: {"a": torch.full((2, 3), 2.0)} for k in ("weights", "ema")}
            mean = dict(step=torch.tensor(2.0), exp_avg=tensors["ema"]["a"], exp_avg_sq=tensors["ema"]["a"])
            save_state(out, {k: old[k] for k in ("step", "seen", "meta", "scaler")}, tensors["weights"], {"a": mean},
                       tensors["ema"])
        else:
            save(out, 1)
            save(out, 2)
        left = moments

        def counted(call):
            def wrapped(*args, **more):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return call(*args, **more)
            return wrapped
        try:
            with pytest.MonkeyPatch.context() as patch:
                for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (shutil, "rmtree")):
                    patch.setattr(module, name, counted(getattr(module, name)))
                save(out, 3)
        except Killed:
            pass
        else:
            break
        seen.add(is_whole(out))
        moments += 1
    assert moments > 8 and seen == {2, 3}
    assert is_whole(out) == 3 and not (out / "state.pt").exists()
    common.own_folder(tmp_path / "3")  # what a killed run left is removed
    assert not list((tmp_path / "3").glob(f"{common.TEMPORARY}*"))
    common.release_folders()


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def about(path, tensors=None, **changed):
    """Another header, its checksums right unless they are what changes."""
    with common.safe_open(path, "pt") as file:
        old = json.loads(file.metadata()["nanovideo"])
        tensors = tensors or {k: file.get_tensor(k).clone() for k in file.keys()}
    sums = {"crc32": {k: common.crc32({k: t}, "") for k, t in tensors.items()}}
    save_file(tensors, path, {"nanovideo": json.dumps(old | sums | changed)})


def negative(path):
    about(path, {"exp_avg_sq/a": -torch.ones(1, 3), "exp_avg/a": torch.ones(1, 3), "weights/a": torch.ones(1, 3),
                 "ema/a": torch.ones(1, 3)})


FAULTS = [
    cut, flip, Path.unlink, negative, lambda p: about(p, step=4), lambda p: about(p, files=10 ** 9),
    lambda p: about(p, crc32=[]), lambda p: about(p, {"weights/a": torch.ones(1, 2)}),
    lambda p: about(p, {"exp_avg/a": torch.ones(1, 3) * torch.nan}), lambda p: about(p, {"weights/b": torch.ones(1, 3)}),
    lambda p: about(p, {"weights/a": torch.ones(9, 3)}), lambda p: about(p, {"weights/a": torch.tensor(1.0)}),
    lambda p: about(p, {"weights/a": torch.ones(1, 3).int()}),
    lambda p: p.write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR."), lambda p: save_file({}, p),
    lambda p: (p.unlink(), os.mkfifo(p))]


@pytest.mark.parametrize("harm", range(len(FAULTS)))
def test_a_damaged_or_hostile_part_is_one_line(harm, message, tmp_path):
    save(tmp_path, 3)
    FAULTS[harm](tmp_path / "state" / "1.safetensors")
    assert "state" in message(is_whole, tmp_path)


@pytest.mark.parametrize("path, value", [
    ("step", -1), ("seen", 2), ("meta", None), ("meta.args", 3), ("scaler", {"scale": "x"}), ("files", 0)])
def test_a_header_that_is_wrong_is_refused(path, value, message, tmp_path):
    save(tmp_path, 3, processes=1)
    file = tmp_path / "state" / "0.safetensors"
    with common.safe_open(file, "pt") as opened:
        text = json.loads(opened.metadata()["nanovideo"])
    put(path, value)(text)
    about(file, **{path.split(".")[0]: text[path.split(".")[0]]})
    assert "state" in message(load_state_file, tmp_path / "state")


def test_a_truncated_part_and_the_state_before_it(tmp_path, capsys):
    save(tmp_path, 2)
    save(tmp_path, 3)
    cut(tmp_path / "state" / "1.safetensors")
    args = SimpleNamespace(out=tmp_path, resume=True, steps=9, save_every=1)
    then = open_shards(tmp_path / "state-previous")["meta"]
    for key in common.SAME:
        setattr(args, key, then["args"].get(key))
    assert common.check_out(args, then["method"])["step"] == 2
    assert "trying the one before it" in capsys.readouterr().err and (tmp_path / "state.corrupt").is_dir()


def test_a_shard_group_must_fit(monkeypatch, message, tmp_path):
    line = ["--base", "tiny", "--out", str(tmp_path / "run"), "--shard-group", "2"]
    assert "--parallel fsdp" in message(vader.main, line)
    assert "1 processes" in message(vader.main, [*line, "--parallel", "fsdp"])
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(common, "read_ranks", lambda: (0, 6, 0))
    common.check_shard_group(2, "fsdp")
    common.check_shard_group(None, "ddp")
    with pytest.raises(UserError, match="--shard-group 4: does not divide the 6 processes"):
        common.check_shard_group(4, "fsdp")


def test_one_process_of_a_machine_downloads(tmp_path):
    """Four at once: the first makes the file, the others find it."""
    pids = []
    for _ in range(4):
        pid = os.fork()
        if not pid:
            try:
                with common.one_per_machine():
                    if not (tmp_path / "file").exists():
                        with open(tmp_path / "made", "a") as f:
                            f.write("x")
                        (tmp_path / "file").write_text("whole")
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    assert (tmp_path / "made").read_text() == "x"


def test_the_hub_is_asked_once(monkeypatch, tmp_path):
    asked = []

    def download(repo, file, local_files_only=False):
        if local_files_only and not (tmp_path / file).exists():
            raise LocalEntryNotFoundError("not in the cache")
        if not local_files_only:
            asked.append(file)
            (tmp_path / file).write_text("x")
        return str(tmp_path / file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for _ in range(2):
        assert weights.fetch("hf:them/base:net.safetensors", "tiny") == tmp_path / "net.safetensors"
    assert asked == ["net.safetensors"]


def test_with_fsdp_only_the_first_process_reads_weights(monkeypatch):
    """The others build the same networks, in the same types, and wait for the numbers."""
    read, sent = bases.load_base("tiny", dtype=torch.float64), []
    monkeypatch.setattr(common, "_receives", [True])
    monkeypatch.setattr(bases, "load_parts", None)
    monkeypatch.setattr(bases, "send_weights", sent.extend)
    base = bases.load_base("tiny", dtype=torch.float64)
    assert sent == list(base.parts().values())
    for mine, theirs in zip(sent, read.parts().values()):
        ours, others = mine.state_dict(), theirs.state_dict()
        assert {k: (v.shape, v.dtype, v.device) for k, v in ours.items()} == {
            k: (v.shape, v.dtype, v.device) for k, v in others.items()}
