"""VADER on every base, with longer clips, from public LoRA files; its LoRA in peft; early end; memory."""
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from runs import on_small_base
from safetensors.torch import load_file
from test_effects import write
from test_keys import on_meta, read

import bases
import common
import diffusion
import dit
import pipeline
import rewards
import sample
import vader
from common import Env
from data import video_info
from models import UNet3D, UNetConfig, add_lora, merge_lora, videocrafter_name
from vae import AutoencoderKL
from weights import load_checkpoint

PEFT, CRAFTER = "base_model.model.", "model.diffusion_model."


def lines(path):
    return [json.loads(x) for x in path.read_text().splitlines()]


# ---- bases

@pytest.fixture
def small(public, monkeypatch, tmp_path):
    """name -> the arguments of one short step on a small network with public file names."""
    def get(name):
        return [*on_small_base(vader, name, public, monkeypatch, tmp_path),
                "--reward", "brightness", "--steps", "1", "--accum", "1", "--rank", "2", "--sample-steps",
                "2", "--eval-n", "1", "--sweep", "0", "--out", str(tmp_path / "run")]
    return get


@pytest.mark.parametrize("name", [
    "modelscope", "videocrafter2", "opensora", "cogvideox-2b", "cogvideox-5b", "i2vgen-xl",
    "cogvideox-5b-i2v"])
def test_one_step_on_every_base(name, small, tmp_path):
    args = small(name)
    more = ["--continue", "1", "--decode", "alt"] if bases.BASES[name].first_frame else []
    vader.main([*args, *more])
    tensors, meta = load_checkpoint(tmp_path / "run")
    moved = [v.abs().max() > 0 for k, v in tensors.items() if "lora_B" in k]
    assert all(moved) and all(torch.isfinite(v).all() for v in tensors.values())
    frames = bases.BASES[name].sample.frames
    assert video_info(tmp_path / "run" / "after" / "0000.mp4")[0] == (2 * frames - 1 if more else frames)
    own = bases.BASES[name].sample.sampler
    assert meta["sample"]["sampler"] == ("dpmpp" if name == "modelscope" else own)


def test_every_base_of_the_table_is_one_of_these_or_tiny():
    tested = {"modelscope", "modelscope-v1.4", "modelscope-v1.5", "videocrafter2", "opensora", "cogvideox-2b",
              "cogvideox-5b", "i2vgen-xl", "cogvideox-5b-i2v", "tiny", "tiny-clean", "tiny-i2v",
              "tiny-cogvideox", "tiny-wan"}
    tested |= {"demo", "tft2v", "tft2v-32"}  # test_matrix.py, and so is Wan
    tested |= {name for name in bases.BASES if name.startswith("wan") and "a14b" not in name}
    assert {name for name, row in bases.BASES.items() if "vader" in row.methods} == tested


@pytest.mark.parametrize("base", ["tiny-i2v", "tiny-cogvideox"])
def test_longer_clips_with_a_reward_over_time(base, tmp_path):
    vader.main(["--base", base, "--steps", "1", "--batch", "1", "--sample-steps", "2", "--eval-n", "1",
                "--sweep", "0", "--continue", "1", "--no-grad-ckpt", "--out", str(tmp_path)])
    rows = lines(tmp_path / "eval.jsonl")
    assert rows[0]["later"] != rows[1]["later"] and rows[0]["reward"] != rows[0]["later"]
    frames = bases.BASES[base].sample.frames
    assert video_info(tmp_path / "after" / "0000.mp4")[0] == 2 * frames - 1


def test_the_rollout_and_the_evaluation_are_the_same_clip(monkeypatch):
    """vader_loss from the noise of generate_from() is minus the reward of its video, with --continue, too."""
    base = bases.load_base("tiny-i2v")
    sampling = replace(base.row.sample, sample_steps=2)
    image, env = Image.new("RGB", (32, 32), (60, 100, 255)), Env(0, 1, torch.device("cpu"), torch.float32)
    reward = rewards.get_reward("temporal", "cpu")
    prompt = ["a blue square moving left"]
    noise = iter([common.generator("sample", "a"), common.generator("sample", "a-1")])
    with monkeypatch.context() as m:
        m.setattr(vader, "randn", lambda shape, generators, device: diffusion.randn(shape, [next(noise)], device))
        loss = vader.vader_loss(
            base.net, base, env, reward, prompt, [image], [None], sampling, 1, 1, [list(range(15))])
    video = pipeline.generate_from(base, env, prompt, [image], ["a"], sampling, continuations=1)
    assert torch.allclose(-loss, rewards.score(reward, video, prompt), atol=1e-6)


# ---- which frames

def test_frames_to_decode():
    g = common.generator(0)
    assert vader.frames_to_reward("first-middle-last", 9, g) == [0, 4, 8]
    assert vader.frames_to_reward("first-middle-last", 2, g) == [0, 1]
    assert vader.frames_to_reward("all", 3, g) == [0, 1, 2]
    assert vader.frames_to_reward("alt", 5, g) == [0, 2, 4] and vader.frames_to_reward("3", 5, g) == [3]
    assert {vader.frames_to_reward("random", 3, g)[0] for _ in range(40)} == {0, 1, 2}


def test_updates_with_gradient():
    g = common.generator(0)
    assert vader.updates_with_gradient(3, 5, g) == 3
    assert {vader.updates_with_gradient("rand", 4, g) for _ in range(60)} == {1, 2, 3, 4}


# ---- LoRA files

def crafter_file(path, net, rank, prefix=PEFT + CRAFTER):
    """Random LoRA of a small VideoCrafter2 in the layout of VADER's public files."""
    g, state = torch.Generator().manual_seed(5), {}
    for name, module in net.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            key = prefix + videocrafter_name(f"{name}.")
            state[f"{key}lora_A.weight"] = torch.randn(rank, module.weight.shape[1], generator=g)
            state[f"{key}lora_B.weight"] = torch.randn(module.weight.shape[0], rank, generator=g) * 0.1
    torch.save(state, path)


def test_public_lora_is_a_start_and_a_file_to_sample_with(small, tmp_path):
    args = small("videocrafter2")
    base = bases.load_base("videocrafter2", args[3])
    plain = {k: v.clone() for k, v in base.net.state_dict().items()}
    crafter_file(tmp_path / "lora.pt", base.net, 4)
    bases.merge_public_lora(base.net, tmp_path / "lora.pt")
    file = torch.load(tmp_path / "lora.pt", weights_only=True)
    layer = "input_blocks.0.1.transformer_blocks.0.attn1.to_q"
    public_key = PEFT + CRAFTER + layer.replace("input_blocks.0.1", "init_attn.0")
    a, b = (file[f"{public_key}.lora_{k}.weight"] for k in "AB")
    delta = base.net.state_dict()[f"{layer}.weight"] - plain[f"{layer}.weight"]
    assert torch.allclose(delta, 8 / 4 * b @ a, atol=1e-5)  # alpha is 8, and in no file

    half = ["--lora", f"{tmp_path / 'lora.pt'}:0.5", "--out", str(tmp_path / "half")]
    vader.main([*args, "--lr", "1e-12", *half])
    half = load_checkpoint(tmp_path / "half")[0][f"{layer}.lora_B.weight"]
    assert torch.allclose(half, 0.5 * b, atol=1e-6)
    vader.main([*args, "--lora", str(tmp_path / "lora.pt"), "--lr", "1e-12"])
    tensors, meta = load_checkpoint(tmp_path / "run")
    assert meta["rank"] == 4 and meta["alpha"] == 8 and len(tensors) == len(file)
    assert torch.allclose(tensors[f"{layer}.lora_A.weight"], a)
    run = bases.load_run(str(tmp_path / "run"), tensors, meta, args[3])
    for k, v in run.net.state_dict().items():
        assert torch.allclose(v, base.net.state_dict()[k], atol=1e-5), k
    vader.main([*args, "--lora", str(tmp_path / "lora.pt"), "--steps", "2", "--resume"])
    assert load_checkpoint(tmp_path / "run")[1]["step"] == 2


@pytest.mark.parametrize("name, config, net", [
    ("vader_videocrafter_pickscore", UNetConfig(**bases.VC2_NET), UNet3D),
    ("vader_videocrafter_hps_aesthetic", UNetConfig(**bases.VC2_NET), UNet3D),
    ("vader_opensora_lora_r16", dit.STDiT3Config(), dit.STDiT3)])
def test_manifests_of_the_published_loras(name, config, net, tmp_path):
    file, net = read(f"vader/{name}.manifest"), on_meta(net, config)
    torch.save({k: torch.zeros(shape) for k, shape in file["keys"].items()}, tmp_path / "lora.pt")
    state, rank, alpha, layers = bases.read_peft_lora(net, tmp_path / "lora.pt")
    assert rank == file["config"]["r"] and alpha == file["config"]["lora_alpha"]
    with torch.device("meta"):
        ours = add_lora(net, rank, alpha, file["config"]["targets"])
    want = {k: v.shape for k, v in net.state_dict().items() if ".lora_" in k}
    assert set(layers) == set(file["config"]["targets"])
    assert len(want) == 2 * len(ours) and {k: v.shape for k, v in state.items()} == want


def test_our_lora_loads_in_peft(small, tmp_path):
    peft = pytest.importorskip("peft")
    args = small("modelscope")
    vader.main([*args, "--lr", "0.1", "--rank", "40", "--alpha", "20"])  # wider than some layers
    bases.main(["--export", "original", str(tmp_path / "run"), str(tmp_path / "peft")])
    base = bases.load_base("modelscope", args[3])
    tensors, meta = load_checkpoint(tmp_path / "run")
    ours = bases.load_run(str(tmp_path / "run"), tensors, meta, args[3]).net
    theirs = peft.PeftModel.from_pretrained(base.net, str(tmp_path / "peft")).eval()
    x, t, text = torch.randn(1, 4, 3, 4, 6), torch.tensor([500]), torch.randn(1, 77, 32)
    plain = bases.load_base("modelscope", args[3]).net
    with torch.no_grad():
        plain, tuned, other = (net(x, t, text) for net in (plain, ours, theirs))
    assert torch.allclose(tuned, other, atol=1e-4) and (tuned - plain).abs().max() > 1e-2

    # and back: peft's file is a public LoRA file to us
    fresh = bases.load_base("modelscope", args[3]).net
    bases.merge_public_lora(fresh, tmp_path / "peft" / "adapter_model.safetensors")
    with torch.no_grad():
        assert torch.allclose(fresh(x, t, text), tuned, atol=1e-4)


def test_export_for_videocrafter_has_vaders_layout(small, tmp_path):
    vader.main(small("videocrafter2"))
    bases.main(["--export", "original", str(tmp_path / "run"), str(tmp_path / "peft")])
    keys = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert all(k.startswith(PEFT + CRAFTER) for k in keys)
    assert any("init_attn.0." in k for k in keys) and not any("input_blocks.0.1." in k for k in keys)


# ---- the run

TINY = ["--base", "tiny", "--batch", "1", "--sample-steps", "2", "--eval-n", "1", "--sweep", "0"]


def log(out):
    """log.jsonl without the times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines(out / "log.jsonl")]


def test_resuming_a_finished_and_an_almost_finished_run(tmp_path):
    """Both end as the run that nothing interrupted, bit for bit, also if the kill came before "after"."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    vader.main([*TINY, "--steps", "3", "--out", str(whole)])
    vader.main([*TINY, "--steps", "2", "--out", str(parts)])
    vader.main([*TINY, "--steps", "3", "--out", str(parts), "--resume"])  # one step is left

    def same():
        weights = [load_file(out / "ckpt.safetensors") for out in (whole, parts)]
        assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
        assert log(whole) == log(parts) and len(log(whole)) == 3
        ends = [[row for row in lines(out / "eval.jsonl") if row["step"] in (0, 3)] for out in (whole, parts)]
        assert ends[0] == ends[1] and len(ends[0]) == 2
        assert (parts / "after.png").read_bytes() == (whole / "after.png").read_bytes()
    same()
    vader.main([*TINY, "--steps", "3", "--out", str(parts), "--resume"])  # none is left
    same()
    (parts / "after.png").unlink()
    (parts / "eval.jsonl").write_text("".join(
        json.dumps(row) + "\n" for row in lines(parts / "eval.jsonl") if row["step"] < 3))
    vader.main([*TINY, "--steps", "3", "--out", str(parts), "--resume"])
    same()


def test_accumulation_equals_a_batch_with_random_frames(tmp_path):
    """--decode random draws by sample: a batch of 2 rewards the frames that 2 micro-steps reward."""
    more = ["--reward", "size", "--decode", "random", "--steps", "2"]
    vader.main([*TINY, *more, "--batch", "2", "--accum", "1", "--out", str(tmp_path / "batch")])
    vader.main([*TINY, *more, "--batch", "1", "--accum", "2", "--out", str(tmp_path / "accum")])
    batch, accum = log(tmp_path / "batch"), log(tmp_path / "accum")
    assert len(batch) == len(accum) == 2
    for row, other in zip(batch, accum):
        assert row == pytest.approx(other, rel=1e-5)


def test_another_reward_says_its_defaults():
    args = vader.get_args(["--base", "tiny"])
    assert (args.steps, args.lr, args.sample_steps, args.reward) == (40, 2e-3, 5, "tiny")
    assert vader.changed_defaults(args) is None
    args = vader.get_args(["--base", "tiny", "--reward", "size", "--lr", "1e-3"])
    assert (args.steps, args.lr, args.sample_steps, args.reward) == (30, 1e-3, 10, "size")
    assert vader.changed_defaults(args) == (
        "--reward size: defaults for rewards other than tiny: --steps 30, --lr 0.0003, --sample-steps 10")
    assert vader.changed_defaults(vader.get_args(["--base", "tiny-i2v", "--reward", "size"])) is None


def test_it_ends_early(tmp_path):
    """Trained on brightness, watched by darkness: each evaluation is worse than the one before."""
    (tmp_path / "dark.py").write_text("def dark(frames, prompts):\n    return -frames.mean((1, 2, 3))\n")
    vader.main(["--base", "tiny", "--reward", "brightness", "--watch", f"{tmp_path / 'dark.py'}:dark", "--lr",
                "1e-2", "--steps", "6", "--preview-every", "1", "--patience", "2", "--batch", "1",
                "--sample-steps", "2", "--eval-n", "1", "--sweep", "1", "--out", str(tmp_path / "run")])
    rows = lines(tmp_path / "run" / "eval.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2]  # one row a step; the last one is "after", too
    assert rows[0]["watch"] > rows[1]["watch"] > rows[2]["watch"]
    assert (tmp_path / "run" / "after.png").exists() and (tmp_path / "run" / "after" / "0000.mp4").exists()
    assert not (tmp_path / "run" / "best.safetensors").exists()  # the best was no training at all
    sweep = lines(tmp_path / "run" / "sweep.jsonl")
    assert [r["strength"] for r in sweep] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
    assert sweep[0]["distance"] == 0 and sweep[-1]["distance"] > sweep[3]["distance"] > 0
    assert sweep[0]["reward"] < sweep[4]["reward"] and (tmp_path / "run" / "sweep.png").exists()


def test_it_keeps_the_best_also_if_it_is_the_last(tmp_path):
    vader.main(["--base", "tiny-clean", "--reward", "brightness", "--lr", "1e-2", "--steps", "3", "--preview-every",
                "1", "--patience", "1", "--batch", "1", "--sample-steps", "2", "--eval-n", "1", "--sweep",
                "0", "--out", str(tmp_path / "up")])
    assert load_checkpoint(tmp_path / "up" / "best.safetensors")[1]["step"] == 3
    sample.main(["--ckpt", str(tmp_path / "up" / "best.safetensors"), "--prompt", "a red circle growing",
                 "--sample-steps", "2", "--out", str(tmp_path / "s")])


def test_a_sum_of_rewards_is_reported_part_by_part(tmp_path):
    vader.main(["--base", "tiny", "--reward", "tiny,size:0.5", "--steps", "1", "--batch", "1", "--eval-n",
                "2", "--sample-steps", "2", "--sweep", "0", "--out", str(tmp_path)])
    for row in lines(tmp_path / "eval.jsonl"):
        assert row["reward"] == pytest.approx(row["tiny"] + 0.5 * row["size"], abs=1e-5)


def test_nouns_and_activities(tmp_path):
    (tmp_path / "nouns.txt").write_text("red circle\norange square\n")
    (tmp_path / "activities.txt").write_text("growing\nmoving left\n")
    args = vader.get_args(["--base", "tiny", "--prompts", str(tmp_path / "nouns.txt"), "--activities",
                           str(tmp_path / "activities.txt"), "--eval-n", "2"])
    items, held_out = pipeline.read_items(args, bases.choose_sampling("tiny", args, method="vader"))
    assert [p for _, p in items] == ["a red circle growing", "a red circle moving left",
                                     "an orange square growing", "an orange square moving left"]
    assert [p for _, p in held_out] == ["a red circle growing", "an orange square growing"]


def test_prompts_that_come_with_the_code():
    args = vader.get_args([])
    items, held_out = pipeline.read_items(args, bases.choose_sampling(args.base, args, method="vader"))
    assert len(items) == 300 and len({p for _, p in items}) == 300
    assert len(held_out) == 8 and len({p.split()[1] for _, p in held_out}) == 8  # eight animals


# ---- memory

def held(base, last, sample_steps):
    """Bytes that one step's forward pass keeps for the backward pass, of rollout and decoder."""
    if not any(hasattr(m, "lora_A") for m in base.net.modules()):
        add_lora(base.net, 4, 4.0, ["to_q", "to_k", "to_v"])
    base.net.grad_ckpt = True
    sampling = replace(base.row.sample, sample_steps=sample_steps)
    env, seen = Env(0, 1, torch.device("cpu"), torch.float32), {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t  # alive, so that no address comes twice
        return t
    own = {p.untyped_storage().data_ptr() for m in (base.net, base.vae) for p in m.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        vader.vader_loss(base.net, base, env, rewards.get_reward("brightness", "cpu"),
                         ["a red circle growing"], [None], [common.generator(0)], sampling, last, 0, [[3]])
    return sum(t.untyped_storage().nbytes() for k, t in seen.items() if k not in own)


def test_steps_without_gradient_hold_nothing():
    base = bases.load_base("tiny")
    four, eight = held(base, 1, sample_steps=4), held(base, 1, sample_steps=8)
    assert eight <= 1.02 * four
    assert held(base, 8, sample_steps=8) > 2 * four


@pytest.mark.effect
def test_what_a_step_holds_at_a_middle_size(monkeypatch):
    """ModelScope of width 128 (of 320), 4 frames of 64x64: `last` holds at most 0.35 of 20 steps with
    gradient; from 10 to 50 sampling steps it grows by at most 2 %."""
    row = bases.BASES["modelscope"]
    row = replace(row, net=replace(row.net, dim=128, context_dim=256), vae=replace(row.vae, ch=64),
                  sample=replace(row.sample, frames=4, height=64, width=64))
    monkeypatch.setitem(bases.BASES, "modelscope", row)
    base = bases.Base("modelscope", row, UNet3D(row.net).eval(), AutoencoderKL(row.vae).eval(), None,
                      diffusion.make_schedule(**row.schedule), None)
    base.freeze(torch.float32)
    base.encoded = {(prompt, False): torch.randn(77, 256) for prompt in ("a red circle growing", "")}
    runs = {(steps, last): held(base, last, sample_steps=steps) / 1e6
            for steps, last in ((10, 1), (20, 1), (50, 1), (20, 20))}
    table = [f"| {steps} | {last} | {mb:.1f} MB |" for (steps, last), mb in runs.items()]
    figures = {f"{steps} steps, last {last}": mb for (steps, last), mb in runs.items()}
    write("vader_memory", table, **figures)
    assert runs[20, 1] <= 0.35 * runs[20, 20] and runs[50, 1] <= 1.02 * runs[10, 1]


def test_merging_is_what_the_branches_do():
    base = bases.load_base("tiny")
    add_lora(base.net, 4, 4.0, ["to_q"])
    for p in base.net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.1)
    x, t, text = torch.randn(1, 4, 8, 8, 8), torch.tensor([500]), base.encode_text(["a red circle growing"])
    with torch.no_grad():
        branches = base.net(x, t, text)
        merge_lora(base.net)
        assert torch.allclose(base.net(x, t, text), branches, atol=1e-5)
