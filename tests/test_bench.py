"""bench.py runs on the tiny bases and writes what it found."""
import json
from dataclasses import replace

import pytest
import torch

import bench
import common
from common import UserError


def run(tmp_path, words):
    bench.main([*words.split(), "--device", "cpu", "--rounds", "1", "--repeats", "1", "--threads", "1",
                "--out", str(tmp_path)])
    (file,) = tmp_path.glob("bench_*.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_question_is_answered_by_a_process_of_its_own(tmp_path, capsys):
    found = run(tmp_path, "train --base tiny --trained lora --optimizer --grad-ckpt")
    row = found["rows"]["ours"]
    assert 0 < row["least"] <= row["seconds"] <= row["most"] and 0 < row["over"] < row["peak"] < 5
    assert 0 < row["utilisation"] < 1 and found["table"][0] in capsys.readouterr().out
    assert found["clip"] == [8, 32, 32] and "--trained lora" in found["command"]


def measured(words, tmp_path, side="ours"):
    """The steps of a process that measures, in this one."""
    args = bench.get_args([*words.split(), "--repeats", "1", "--device", "cpu", "--threads", "1",
                           "--side", side, "--answer", str(tmp_path / "answer")])
    env = common.setup(args.device, args.dtype)
    bench.measure(bench.fitted(args, env), env)
    return torch.load(tmp_path / "answer", weights_only=True)


@pytest.mark.parametrize("words", [
    "forward --base tiny-i2v", "vader --base tiny --sample-steps 2",
    "vader --base tiny-cogvideox --sample-steps 2", "sample --base tiny --sample-steps 2",
    "decode --base tiny", "tracks --base tiny-cogvideox"])
def test_each_question(words, tmp_path):
    found = measured(words, tmp_path)
    assert found["seconds"][0] > 0 and found["cpu"][0] > 0


@pytest.mark.parametrize("base", ["tiny-cogvideox", "tiny-wan"])
@pytest.mark.parametrize("question", ["forward", "train"])
def test_both_sides_have_the_same_weights_and_inputs(question, base, tmp_path):
    pytest.importorskip("diffusers")
    ours, theirs = (measured(f"{question} --base {base}", tmp_path, side)["result"]
                    for side in ("ours", "peer"))
    assert ours.abs().max() > 0 and (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_sizes_shrink_by_what_a_base_takes():
    assert bench.smaller("modelscope", (16, 256, 256)) == (16, 128, 128)
    assert bench.smaller("modelscope", (16, 64, 64)) == (8, 64, 64)
    assert bench.smaller("cogvideox-5b-i2v", (49, 480, 720)) == (25, 480, 720)  # its positions are learned
    assert bench.smaller("cogvideox-5b-i2v", (1, 480, 720)) is None


def test_what_cannot_be_trained_is_refused():
    args = bench.get_args("train --base tiny --trained branch --side ours --device cpu".split())
    env = common.setup("cpu")
    with pytest.raises(UserError, match="branch"):
        bench.train(bench.fitted(args, env), env)


# ---- fit

def fit_options(words, method="t2v"):
    return bench.import_module(method).get_args(words.split())


WAN = "--base tiny-wan --rank 4 --lora-targets q k v --batch 1 --device cpu --dtype fp32"


def check_count(method, words):
    """Fake tensors count what real ones do, and that is what the allocator gives out."""
    args = fit_options(words, method)
    fake, real = bench.count(method, args, 1, step_only=True)["step"], bench.count(method, args, 1, real=True)
    print(f"{method} {words}, MB: {fake / 1e6:.1f} fake, {real['counted'] / 1e6:.1f} real, "
          f"{real['measured'] / 1e6:.1f} measured")
    assert abs(fake - real["counted"]) < 0.02 * fake
    assert abs(fake - real["measured"]) < 0.15 * real["measured"]


@pytest.mark.parametrize("more", ["", "--grad-ckpt"])
def test_fit_counts_what_the_allocator_gives_out(more):
    check_count("t2v", f"{WAN} {more}")


MIDDLE = "--base wan2.1-t2v-1.3b --rank 16 --lora-targets q k v --dtype bf16"  # cut to 78 M parameters


@pytest.mark.slow
@pytest.mark.parametrize("method, words", [
    ("vader", "--base tiny --dtype fp32"), ("t2v", "--base tiny --rank 16 --dtype bf16"),
    ("t2v", f"{MIDDLE} --frames 17 --height 128 --width 224"),
    ("t2v", f"{MIDDLE} --frames 17 --height 128 --width 224 --no-grad-ckpt"),
    ("vader", f"{MIDDLE} --frames 9 --height 128 --width 128 --reward brightness"),
    ("vader", f"{MIDDLE} --frames 9 --height 128 --width 128 --reward brightness --no-grad-ckpt")])
def test_fit_at_larger_sizes(method, words, monkeypatch):
    row = bench.BASES["wan2.1-t2v-1.3b"]
    net = replace(row.net, dim=512, ffn_dim=2048, heads=4, num_layers=16)
    monkeypatch.setitem(bench.BASES, "wan2.1-t2v-1.3b", replace(row, net=net))
    check_count(method, f"{words} --device cpu")


def test_fit_extends_two_blocks_to_all():
    args = fit_options(WAN)
    short, whole = bench.whole_count("t2v", args, 1), bench.count("t2v", args, 1)
    assert short["net"] == whole["net"] and short["trained"] == whole["trained"]
    assert abs(short["step"] - whole["step"]) < 0.02 * whole["step"]


def test_offloaded_activations_do_not_count():
    there, away = (bench.count("t2v", fit_options(f"{WAN} {more}"), 1, step_only=True)["step"]
                   for more in ("", "--offload"))
    assert away < 0.7 * there


def test_fit_says_what_to_change(capsys):
    words = ["fit", "--method", "t2v", *WAN.replace("--batch 1", "--batch 2").split()]
    assert bench.fit([*words, "--gb", "1"]) and not bench.fit([*words, "--gb", "0.01", "--gpus", "2"])
    said = capsys.readouterr().out
    assert "fits 1 GiB" in said and "does not fit 0.01 GiB" in said
    assert "try, in this order: --grad-ckpt, --batch 1, --offload, --frozen int8, --parallel fsdp" in said


def test_fsdp_shares_weights_but_not_while_loading():
    args = fit_options(f"{WAN} --cache-latents")
    found = dict(net=800, block=10, text=100, rest=50, reward=0, kept=0, trained=80, step=300, sample=1, decode=2)
    one = {phase: sizes for phase, *sizes in bench.phases(args, 1, found)}
    args.parallel = "fsdp"
    eight = {phase: sizes for phase, *sizes in bench.phases(args, 8, found)}
    assert one["step"] == [850, 80, 160, 300] and eight["step"] == [170, 10, 20, 300]
    assert eight["load"] == one["load"] == [950, 0, 0, 0]


def test_a_method_is_asked_for():
    with pytest.raises(UserError, match="--method"):
        bench.fit(["fit"])
