"""Options that save memory or time and must not change results: --frozen int8, --optim adamw8bit, sample.py
--offload, --compile."""
import argparse
import dataclasses
import importlib.util

import pytest
import torch
from test_models import SMALL, inputs, small_stdit3, stdit3_inputs
from torch import nn
from torch._dynamo.testing import CompileCounter

import common
import models
import pipeline
import sample
import t2v
from bases import load_base
from common import Env, Run, read_lines
from dit import CogVideoX, CogVideoXConfig, Wan, WanConfig
from models import Int8Linear, UNet3D, add_lora, freeze_int8, lora_strength, merge_lora
from weights import load_checkpoint

T2V = ["--base", "tiny", "--batch", "1", "--rank", "2", "--no-cache-latents", "--preview-every", "0", "--eval-n", "1",
       "--sample-steps", "1", "--workers", "0", "--steps", "1"]


def error(ours, theirs):
    """Length of the difference of two lists of tensors, relative to the second."""
    a, b = (torch.cat([t.float().flatten() for t in tensors]) for tensors in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


# ---- --frozen int8

def clips(base, b=2):
    """x, t, text and conditions for a base's network."""
    shape = base.latent_shape(base.row.sample)
    g = torch.Generator().manual_seed(1)
    prompts = ["a red circle moving left on a gray background", "a blue square growing on a black background"][:b]
    cond = {"fps": torch.full((b,), 8.0)} if base.row.unet.use_fps_condition else {}
    return torch.randn(b, *shape, generator=g), torch.tensor([100, 700])[:b], base.encode_text(prompts), cond


def loss_and_gradients(net, x, t, text, cond):
    net.zero_grad()
    loss = net(x, t, text, **cond).float().square().mean()
    loss.backward()
    return loss.detach().view(1), [p.grad for p in net.parameters() if p.requires_grad]


def with_lora(name, frozen, recompute=False):
    base = load_base(name, frozen=frozen)
    targets = ["q", "k", "v", "o"] if name == "tiny-wan" else ["to_q", "to_k", "to_v", "to_out.0"]
    add_lora(base.net, 4, 4.0, targets)
    for key, p in base.net.named_parameters():
        if ".lora_" in key:
            nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(len(key)))
    base.net.grad_ckpt = recompute
    return base


@pytest.mark.parametrize("name", ["tiny", "tiny-wan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_changes_losses_and_gradients_by_less_than_two_percent(name, dtype):
    found = []
    for frozen in (None, "int8"):
        base = with_lora(name, frozen, recompute=frozen == "int8")
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found.append(loss_and_gradients(base.net, *clips(base)))
    (loss, grads), (rounded, rounded_grads) = found
    assert error(rounded, loss) < 0.02 and error(rounded_grads, grads) < 0.02
    layers = [m for m in base.net.modules() if isinstance(m, Int8Linear)]
    assert layers and all(m.weight.dtype == torch.int8 for m in layers)
    assert all(p.requires_grad == (".lora_" in key) for key, p in base.net.named_parameters())


def test_int8_weights_are_never_whole_and_keep_nothing_for_the_backward_pass(monkeypatch):
    """Row by row and column by column as at once; strength 0 leaves the base; merging adds the LoRA."""
    base = with_lora("tiny-wan", "int8")
    layer, x = base.net.blocks[0].ffn[0], torch.randn(2, 5, 128, requires_grad=True)
    whole = nn.functional.linear(x, layer.weight * layer.scale, layer.bias)
    (expected,) = torch.autograd.grad(whole.sin().sum(), x)
    monkeypatch.setattr(models, "spans", lambda n, width: [slice(i, i + 30) for i in range(0, n, 30)])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: (kept.append(y), y)[1], lambda y: y):
        out = layer(x)
    (grad,) = torch.autograd.grad(out.sin().sum(), x)
    assert torch.allclose(out, whole, atol=1e-5) and torch.allclose(grad, expected, atol=1e-5)
    assert not any(y.is_floating_point() and y.numel() >= layer.weight.numel() for y in kept)

    plain = load_base("tiny-wan", frozen="int8")
    given = clips(base)[:3]
    with torch.no_grad():
        with lora_strength(base.net, 0.0):
            assert torch.equal(base.net(*given), plain.net(*given))
        adapted = base.net(*given)
        merge_lora(base.net)
        assert base.net.state_dict().keys() == plain.net.state_dict().keys()
        assert 4 * error([base.net(*given)], [adapted]) < error([plain.net(*given)], [adapted])


def test_a_run_in_int8_is_a_run_as_any_other(tmp_path, message):
    for name, more in (("plain", []), ("int8", ["--frozen", "int8"])):
        t2v.main([*T2V, "--out", str(tmp_path / name), *more])
    (plain, _), (ours, meta) = (load_checkpoint(tmp_path / d) for d in ("plain", "int8"))
    assert ours.keys() == plain.keys() and meta["step"] == 1
    a, b = (read_lines(tmp_path / d / "log.jsonl")[0]["loss"] for d in ("plain", "int8"))
    assert a != b and abs(a - b) < 0.02 * a
    sample.main(["--ckpt", str(tmp_path / "int8"), "--prompt", "a red circle moving left on a gray background",
                 "--sample-steps", "1", "--out", str(tmp_path / "clips"), "--frozen", "int8"])
    assert (tmp_path / "clips" / "0000.mp4").exists()
    text = message(t2v.main, [*T2V, "--rank", "0", "--frozen", "int8", "--out", str(tmp_path / "no")])
    assert "--frozen int8" in text and "--rank" in text and not (tmp_path / "no").exists()


# ---- sample.py --offload

def test_blocks_come_one_by_one_and_the_next_is_there_in_time():
    """On a CPU: what would be copied, and when. STDiT3's blocks do not run in the order of units()."""
    net, (args, cond) = small_stdit3(), stdit3_inputs()
    order = [block for pair in zip(net.spatial_blocks, net.temporal_blocks) for block in pair]
    fetched, ready, most = [], [], []

    class Watched(pipeline.Streamed):
        def enter(self, block, given):
            ready.append(block in self.homes)
            super().enter(block, given)

        def fetch(self, block):
            if block not in self.homes:
                super().fetch(block)
                fetched.append(block)
                for t in pipeline.tensors_of(block):
                    t.data = t.data.clone()  # as on a GPU: another tensor
            most.append(len(self.homes))
    with torch.no_grad():
        expected, homes = net(*args, **cond), [t.data_ptr() for t in pipeline.tensors_of(net)]
        Watched(net, torch.device("cpu"))
        for _ in range(3):
            assert torch.equal(net(*args, **cond), expected)
            assert [t.data_ptr() for t in pipeline.tensors_of(net)] == homes
    assert fetched == 3 * order and max(most) == 2
    assert ready == 4 * [False] + 2 * [False, True, True, True]


def test_offload_changes_no_byte_of_a_clip(tmp_path, message):
    args = ["--base", "tiny-wan", "--prompt", "a red circle moving left on a gray background", "--sample-steps", "2"]
    for name, more in (("here", []), ("offload", ["--offload"])):
        sample.main([*args, "--out", str(tmp_path / name), *more])
    a, b = ((tmp_path / name / "0000.mp4").read_bytes() for name in ("here", "offload"))
    assert a == b
    assert "--compile" in message(sample.main, [*args, "--offload", "--compile", "--out", str(tmp_path / "no")])


# ---- --optim adamw8bit

def test_adamw8bit_trains_and_resumes(tmp_path, monkeypatch):
    """Needs torchao. Its moments are in 8 bits; those that are saved are floats, rounded again on loading."""
    pytest.importorskip("torchao.optim")
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)  # of single steps
    args = argparse.Namespace(optim="adamw8bit", lr=1e-3, betas=[0.9, 0.99], wd=0.0, keep=1, out=str(tmp_path))
    env, grads = Env(0, 1, torch.device("cpu"), torch.float32), torch.randn(4, 64, 64)

    def start():
        params = {"large": nn.Parameter(torch.ones(64, 64)), "small": nn.Parameter(torch.ones(64))}
        return params, Run.adamw(argparse.Namespace(args=args), params.values())

    def step(params, opt, number):
        common.set_rate(opt.param_groups[0], 1e-2)
        for p in params.values():
            p.grad = grads[number, :len(p)].view(p.shape) if p.ndim > 1 else grads[number, 0]
        opt.step()
    params, opt = start()
    for number in range(3):
        step(params, opt, number)
    assert hasattr(opt.state[params["large"]]["exp_avg_sq"], "codes")
    moments = {k: {n: common.full(v) for n, v in opt.state[p].items()} for k, p in params.items()}
    assert all(type(v) is torch.Tensor and v.dtype == torch.float32 for m in moments.values() for v in m.values())
    weights = {k: p.detach().clone() for k, p in params.items()}
    state = dict(step=3, seen=3, weights=dict(weights), moments=moments, ema=None, scaler=None)
    resumed, fresh = start()
    assert common.load_state(args, env, state, resumed, fresh) == (3, 3)
    assert hasattr(fresh.state[resumed["large"]]["exp_avg_sq"], "codes")
    for pair in ((params, opt), (resumed, fresh)):
        step(*pair, 3)
    moved = [[p.detach() - weights[k] for k, p in own.items()] for own in (resumed, params)]
    assert error(*moved) < 0.1 and max(x.abs().max() for x in moved[1]) > 1e-3


def test_adamw8bit_without_its_package_is_one_line(tmp_path, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = message(t2v.main, [*T2V, "--optim", "adamw8bit", "--out", str(tmp_path / "no")])
    assert "--optim adamw8bit" in text and "pip install torchao" in text and not (tmp_path / "no").exists()


# ---- --compile

def small_networks():
    """{name: (network, arguments, conditions)} of the four kinds, with LoRA branches that do something."""
    cog = CogVideoX(CogVideoXConfig(
        in_channels=4, out_channels=4, num_layers=2, heads=2, head_dim=16, time_dim=32, text_dim=24, text_length=5,
        size=(3, 8, 8)))
    wan = Wan(WanConfig(in_channels=4, out_channels=4, dim=32, ffn_dim=64, heads=2, num_layers=2, freq_dim=32,
                        text_dim=24, text_length=16))
    unet = UNet3D(dataclasses.replace(SMALL, dim_mult=(1,), attn_scales=(1.0,), dropout=0.1))
    found = {"unet": (unet, inputs(), {}), "stdit3": (small_stdit3(), *stdit3_inputs()),
             "cogvideox": (cog, inputs(), {}), "wan": (wan, inputs(), {})}
    targets = {"unet": ["to_q", "net.2"], "stdit3": ["qkv"], "cogvideox": ["to_q", "net.2"], "wan": ["q", "ffn.2"]}
    for name, (net, _, _) in found.items():
        net.grad_ckpt = True
        add_lora(net.eval(), 2, 2.0, targets[name])
        for key, p in net.named_parameters():
            if ".lora_B" in key:
                nn.init.normal_(p, std=0.1)
    return found


@pytest.mark.parametrize("name, int8", [
    ("unet", False), ("stdit3", False), ("cogvideox", False), ("wan", False), ("wan", True)])
def test_blocks_compile_without_graph_breaks(name, int8):
    """Captured whole, with and without gradients, and run as they are: the numbers of the plain network."""
    net, args, cond = small_networks()[name]
    if int8:
        freeze_int8(net)

    def run():
        net.zero_grad()
        out = net(*args, **cond)
        out.square().mean().backward()
        with torch.no_grad():
            return [out.detach(), net(*args, **cond), *(p.grad for p in net.parameters() if p.requires_grad)]
    expected, counter = run(), CompileCounter()
    for block in net.units():
        block.compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=100):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(run(), expected))
        graphs = counter.frame_count
        run()
    assert graphs == counter.frame_count > 1  # nothing is compiled twice


def test_without_a_compiler_one_line_is_said(monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("no compiler\nmore")
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(nn.Module, "compile", broken)
    models.compiler_works.cache_clear()
    net, device = small_stdit3(), torch.device("cpu")
    for _ in range(2):
        assert models.parallelize(net, argparse.Namespace(compile=True, parallel="ddp"), device) is net
    err = capsys.readouterr().err
    models.compiler_works.cache_clear()
    assert err.count("\n") == 1 and "--compile" in err and "no compiler" in err
