"""VideoDPO: OmniScore, pairs, loss; each stage goes on exactly where it was cut off; two processes equal one.

The loss, whole steps and OmniScore's formula are compared with the original code in test_oracles.py.
"""
import argparse
import copy
import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import spread
from safetensors.torch import load_file
from test_dist import launch, relative

import bases
import common
import data
import dit
import models
import omniscore
import pipeline
import sample
import text_encoders
import videodpo
from bases import choose_sampling, load_base
from common import Env, generator, read_lines
from data import PairDataset, write_video
from diffusion import Flow, make_schedule, noised, randn
from models import add_lora, frozen_copy, without_lora
from omniscore import OMNISCORE_TINY, clip_scorer, tiny_dimensions, total_score
from tinyworld import FLAW_SHARES, render, tiny_batch, tiny_flaws, tiny_scene
from weights import load_checkpoint

CPU = Env(0, 1, torch.device("cpu"), torch.float32)


def release(folder, n=4, frames=8, score=True, seed=0):
    """A folder as the released data has it: pair i is of clips 2 i and 2 i + 1; the losers are blurred."""
    clips, captions, _ = tiny_batch(seed, n, frames)
    rows, pairs = [], []
    for i, (clip, caption) in enumerate(zip(clips, captions)):
        blurred = F.avg_pool3d(clip, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
        for kind, video in (("win", clip), ("lose", blurred)):
            path = f"{kind}videos/{i:06d}.mp4"
            write_video(folder / path, video)
            rows.append({"basic": {"clip_duration": frames / 8, "clip_path": path},
                         "misc": {"frame_caption": [caption]}})
        pairs.append({"video1": 2 * i, "video2": 2 * i + 1, "label": 0, "frame_caption": caption}
                     | ({"score": 0.36 + 0.1 * i} if score else {}))
    (folder / "metadata.json").write_text(json.dumps(rows))
    (folder / "pair.json").write_text(json.dumps(pairs))
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return release(tmp_path_factory.mktemp("released"))


TRAIN = ["--base", "tiny", "--batch", "2", "--eval-n", "1", "--sample-steps", "1", "--lr", "1e-4",
         "--lr-schedule", "constant"]
STAGED = ["--base", "tiny", "--samples", "2", "--sample-steps", "1", "--batch", "1", "--eval-n", "1"]


def train(folder, out, steps, *more):
    videodpo.main([*TRAIN, "--pairs", str(folder), "--steps", str(steps), "--out", str(out), *more])
    return load_file(out / "ckpt.safetensors")


# ---- OmniScore

def test_subject_consistency_of_what_never_changes_is_one_minus_a_frame():
    still = torch.randn(1, 32).expand(16, -1)
    assert omniscore.subject_consistency(still) == pytest.approx(15 / 16)
    assert omniscore.subject_consistency(torch.eye(16)) == 0


def test_flickering():
    video = torch.ones(3, 8, 16, 16)
    assert omniscore.temporal_flickering(video) == 1
    video[:, ::2] = -1
    assert omniscore.temporal_flickering(video) == 0


def sliding(step):
    """A smooth pattern that moves `step` pixels a frame, and the flow that says so."""
    x = torch.arange(48.0)
    wave = torch.stack([torch.sin((x - step * k) / 4) for k in range(5)])
    video = wave[None, :, None, :].expand(3, 5, 48, 48)

    def flow(a, b):
        frame = [int((video.transpose(0, 1) - f).abs().flatten(1).sum(1).argmin()) for f in (a[0], b[0])]
        found = torch.zeros(len(a), 2, 48, 48)
        found[:, 0] = step * (frame[1] - frame[0])
        return found
    return video, flow


def test_motion_smoothness_and_dynamic_degree_follow_the_flow():
    video, flow = sliding(2.0)
    still = lambda a, b: torch.zeros(len(a), 2, 48, 48)
    followed, overlaid = (omniscore.motion_smoothness(video, fn) for fn in (flow, still))
    assert followed > 0.98 and followed > overlaid + 0.02
    # the threshold on 48 pixels is 6 * 48 / 256 = 1.125; at 16 frames a second every second one is looked at
    assert omniscore.dynamic_degree(video, flow) == 1 and omniscore.dynamic_degree(video, still) == 0
    slow, flow = sliding(0.7)
    assert omniscore.dynamic_degree(slow, flow, fps=8) == 0 and omniscore.dynamic_degree(slow, flow, fps=16) == 1


def test_aesthetic_imaging_and_overall():
    head = torch.nn.Linear(4, 1)
    head.weight.data, head.bias.data = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([5.0])
    assert omniscore.aesthetic_quality(torch.tensor([[3.0, 0, 0, 0]]), head) == pytest.approx(0.6)  # normalised
    seen = []
    quality = lambda frames: (seen.append(frames.shape), frames.new_full((len(frames),), 70.0))[1]
    assert omniscore.imaging_quality(torch.zeros(3, 2, 600, 1024), quality) == pytest.approx(0.7)
    assert seen[0][2:] == (300, 512)
    features = torch.tensor([[2.0, 0], [0, 1.0]])
    assert omniscore.overall_consistency(features, torch.tensor([[1.0, 1.0]])) == pytest.approx(1)


def test_omniscore_weighs_quality_four_to_one():
    best = {k: v[1] for k, v in omniscore.OMNISCORE.items()}
    assert total_score(best)["total"] == pytest.approx(1)
    assert total_score(best | {"overall_consistency": 0.0})["total"] == pytest.approx(0.8)
    assert total_score(best | {"dynamic_degree": 0.0})["quality"] == pytest.approx(5 / 5.5)


@pytest.mark.parametrize("fault, dimension", [
    ("marked", "imaging_quality"), ("marked", "aesthetic_quality"), ("flickering", "temporal_flickering"),
    ("shaking", "motion_smoothness"), ("still", "dynamic_degree"), ("other", "subject_consistency"),
    ("caption", "overall_consistency")])
def test_each_tiny_dimension_sees_its_fault(fault, dimension):
    rng = np.random.default_rng(3)
    scene = tiny_scene(rng, "square", "blue", "black", "moving right")
    good, caption = render(scene), scene.caption()
    bad, words = good, caption
    if fault in FLAW_SHARES:
        bad = render(scene, flaws=tiny_flaws(rng, **{flaw: flaw == fault for flaw in FLAW_SHARES}))
    elif fault == "still":
        bad = good[:, :1].expand(-1, 8, -1, -1)
    elif fault == "other":
        bad = torch.cat([good[:, :4], render(tiny_scene(rng, "circle", "red", "gray"))[:, 4:]], dim=1)
    else:
        words = caption.replace("square", "circle")
    dimensions = tiny_dimensions()
    before, after = dimensions(good, caption), dimensions(bad, words)
    low, high, _ = OMNISCORE_TINY[dimension]
    assert before[dimension] - after[dimension] > 0.1 * (high - low)
    score_clip = clip_scorer("tiny", (8, 32, 32))
    assert score_clip(good, caption)["total"] > score_clip(bad, words)["total"]


def test_without_networks_there_are_no_scores(message):
    assert clip_scorer("videocrafter2", (16, 320, 512)) is None
    assert "OmniScore needs a folder" in message(clip_scorer, "videocrafter2", (16, 320, 512), required=True)


def test_real_networks_with_small_stand_ins(tmp_path, monkeypatch, message):
    """All seven run on what transformers, torchvision and our DINO make of random weights of small sizes."""
    from torchvision.models import optical_flow
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    assert "score-weights" in message(omniscore.check_score_files, None)
    assert "dino_vitbase16_pretrain.pth is missing" in message(omniscore.check_score_files, tmp_path)
    tower = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                 projection_dim=32)
    words = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
             "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPModel(CLIPConfig(
        text_config=tower | dict(vocab_size=len(words), bos_token_id=52, eos_token_id=53, pad_token_id=53),
        vision_config=tower | dict(image_size=56, patch_size=14), projection_dim=32))
    clip.save_pretrained(tmp_path / "clip-vit-large-patch14")
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer.save_pretrained(tmp_path / "clip-vit-large-patch14")
    small = lambda width, heads: metrics_dino(width=32, heads=2, layers=1)
    metrics_dino = text_encoders.DINO
    monkeypatch.setattr(omniscore, "DINO", small)
    state = {text_encoders.dino_name(k): v for k, v in small(0, 0).state_dict().items()}
    torch.save(state, tmp_path / "dino_vitbase16_pretrain.pth")
    torch.save(torch.nn.Linear(32, 1).state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    torch.save(optical_flow.raft_small().state_dict(), tmp_path / "raft.pth")
    torch.save({"params": torch.zeros(1)}, tmp_path / "musiq_spaq_ckpt-358bb6af.pth")
    monkeypatch.setattr(omniscore, "raft", lambda size, weights, device: metrics_raft("small", weights, device))
    from data import raft as metrics_raft
    asked = []

    def create_metric(name, device, pretrained_model_path):
        asked.append((name, Path(pretrained_model_path).name))
        return lambda frames: frames.mean((1, 2, 3), keepdim=False)[:, None] * 100
    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=create_metric))
    omniscore.check_score_files(tmp_path)
    score_clip = clip_scorer("videocrafter2", (16, 320, 512), tmp_path, tmp_path / "raft.pth")
    found = score_clip(torch.rand(3, 4, 128, 144) * 2 - 1, "a fox", 8)
    assert asked == [("musiq-spaq", "musiq_spaq_ckpt-358bb6af.pth")]
    assert set(omniscore.DIMENSIONS) | {"quality", "semantic", "total"} == set(found)
    assert found["imaging_quality"] == pytest.approx(0.5, abs=0.02) and found["temporal_flickering"] < 0.7
    assert all(np.isfinite(v) for v in found.values())


# ---- scores and pairs

def scored(folder, totals, n):
    """A folder whose clips have these OmniScores, n a prompt."""
    names = [f"{i // n:06d}-{i % n}.mp4" for i in range(len(totals))]
    rows = [{"basic": {"clip_path": f"clips/{x}"}, "misc": {"frame_caption": [f"prompt {x[:6]}"]}}
            for x in names]
    (folder / "metadata.json").write_text(json.dumps(rows))
    (folder / "scores.jsonl").write_text(
        "".join(json.dumps({"clip": x, "total": t}) + "\n" for x, t in zip(names, totals)))
    return lambda: json.loads((folder / "pair.json").read_text())


def make_pairs(folder, drop=0.0):
    omniscore.write_pairs(CPU, folder, videodpo.choose_pairs(omniscore.read_scores(folder), drop))


def test_best_against_worst(tmp_path, message):
    pairs = scored(tmp_path, [0.5, 0.9, 0.1, 0.6, 0.8, 0.7, 0.4, 0.4, 0.4], 3)
    make_pairs(tmp_path)
    found = pairs()
    assert [(p["video1"], p["video2"]) for p in found] == [(1, 2), (4, 3)]  # none where all are alike
    assert found[0]["score"] == pytest.approx(0.09) and found[0]["frame_caption"] == ["prompt 000000"]
    assert found[1]["diff_score"] == pytest.approx(0.2)
    make_pairs(tmp_path, drop=0.67)  # two of three
    assert [p["video1"] for p in pairs()] == [1]
    assert "no pair is left" in message(make_pairs, tmp_path, drop=1.0)
    (tmp_path / "scores.jsonl").write_text("")
    assert "000000-0.mp4 has no score yet: --stage score first" in message(make_pairs, tmp_path)


def test_lower_scores_weigh_more(tmp_path):
    pairs = scored(tmp_path, [0.9, 0.8, 0.9, 0.2, 0.9, 0.0], 2)
    make_pairs(tmp_path)
    common, rare, none = (pair["score"] for pair in pairs())
    assert common == pytest.approx(0.72) and rare == pytest.approx(0.18) and none == 1e-3
    assert videodpo.pair_weight(common, 1.0) == pytest.approx(1)
    assert videodpo.pair_weight(rare, 0.5) == pytest.approx(2) and videodpo.pair_weight(none, 1.0) == pytest.approx(720)
    assert videodpo.pair_weight(rare, 0.0) == 1


# ---- the released layout, and its faults

def test_released_folders_are_read(released, tmp_path):
    other = release(tmp_path / "other", 2, frames=40, score=False, seed=5)
    data = PairDataset([released, other], 8, 32, 32)
    assert len(data) == 6 and data.scores == pytest.approx([0.36, 0.46, 0.56, 0.66, 1, 1])
    item = data[4, 0]  # the second folder's rows are counted anew
    assert item["video"].shape == (2, 3, 8, 32, 32) and item["text"] == data.rows[4][-1]
    # 40 frames: stride 4, from starts drawn for each clip and number
    assert torch.equal(data[4, 0]["video"], item["video"])
    assert not torch.equal(data[4, 1]["video"], item["video"])
    sharp = [data[i, 0]["video"].diff(dim=-1).square().mean((1, 2, 3, 4)) for i in range(4)]
    assert all(win > lose for win, lose in sharp)  # winners come first


@pytest.mark.parametrize("fault, words", [
    ("gone", "pair.json row 1: "), ("short", "pair.json row 1: "), ("corrupt", "pair.json row 1: "),
    ("index", "row 1: video1 and video2 must be two of the 8 rows"), ("same", "row 1: video1 and video2"),
    ("score", "row 1: score 0 is no number above 0"), ("caption", "row 1: frame_caption is no text"),
    ("layout", "metadata.json row 3: wanted"), ("list", "pair.json: not a list of pairs"),
    ("json", "not valid JSON")])
def test_bad_pairs_are_named_with_their_row(fault, words, released, tmp_path, message):
    folder = tmp_path / "bad"
    shutil.copytree(released, folder)
    pairs = json.loads((folder / "pair.json").read_text())
    clip = folder / "losevideos" / "000001.mp4"
    if fault == "gone":
        clip.unlink()
    elif fault == "short":
        write_video(clip, torch.zeros(3, 5, 32, 32))
    elif fault == "corrupt":
        clip.write_bytes(clip.read_bytes()[:200])
    elif fault in ("index", "same", "score", "caption"):
        pairs[1] |= {"index": {"video2": 8}, "same": {"video2": 2}, "score": {"score": 0},
                     "caption": {"frame_caption": 7}}[fault]
        (folder / "pair.json").write_text(json.dumps(pairs))
    elif fault == "layout":
        rows = json.loads((folder / "metadata.json").read_text())
        del rows[3]["basic"]
        (folder / "metadata.json").write_text(json.dumps(rows))
    else:
        (folder / "pair.json").write_text("{}" if fault == "list" else "[{")
    assert words in message(videodpo.main, [*TRAIN, "--pairs", str(folder), "--out", str(tmp_path / "out"),
                                            "--steps", "1"])


# ---- the method

def lora_pair(ckpt=False):
    """The tiny network with LoRA branches that are not zero, in float64, and two pairs for it."""
    torch.manual_seed(0)
    base = load_base("tiny", dtype=torch.float64)
    add_lora(base.net, 4, 4, ["to_q", "to_v"])
    base.net.double()
    for k, p in base.net.named_parameters():
        if "lora_B" in k:
            p.data = 0.05 * torch.randn(p.shape, generator=generator(k)).double()
    base.net.grad_ckpt = ckpt
    g = [generator(i) for i in range(2)]
    pairs, noise = (randn((2, 2, 4, 8, 8, 8), g).double() for _ in "ab")
    return base, settings("tiny"), pairs, noise


def settings(name, beta=500.0, **fixed):
    """-> the sampling and the args that pair_loss() takes."""
    args = argparse.Namespace(beta_dpo=beta, train_fps=None)
    return choose_sampling(name, args, **fixed), args


def test_reference_is_the_network_without_lora():
    base, _, pairs, noise = lora_pair()
    plain, text = load_base("tiny", dtype=torch.float64), base.encode_text(["a red circle growing"] * 2)
    inputs = pairs[:, 0], torch.tensor([300, 700]), text
    with torch.no_grad():
        assert torch.equal(without_lora(base.net)(*inputs), plain.net(*inputs))
        assert not torch.allclose(base.net(*inputs), plain.net(*inputs))


def test_recomputed_blocks_find_the_lora_on():
    """The reference switches LoRA off; blocks that are computed again in the backward pass must not."""
    grads = []
    for ckpt in (False, True):
        base, (sampling, args), pairs, noise = lora_pair(ckpt)
        u = torch.tensor([[0.2, 0.7], [0.5, 0.9]])
        loss, z = videodpo.pair_loss(base.net, without_lora(base.net), base, sampling, args, pairs,
                                     ["a red circle growing", None], u, noise, torch.ones(2))
        loss.mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in base.net.parameters() if p.requires_grad]))
    assert grads[0].norm() > 0 and (grads[0] - grads[1]).norm() < 1e-6 * grads[0].norm()


def test_loss_falls_when_winners_get_better_and_each_pair_has_its_weight():
    target, ref = torch.randn(4, 4, 2, 3, 5), torch.randn(4, 4, 2, 3, 5)
    better = torch.cat([ref[:2].lerp(target[:2], 0.1), ref[2:]])
    for reduce in ("video", "column"):
        same, z = videodpo.dpo_loss(ref, ref, target, torch.ones(2), 5.0, reduce)
        assert same.tolist() == pytest.approx([np.log(2)] * 2)
        assert z.shape == ((2,) if reduce == "video" else (2, 5))
        loss, z = videodpo.dpo_loss(better, ref, target, torch.tensor([1.0, 3.0]), 5.0, reduce)
        assert (z > 0).all() and loss[0] < np.log(2)
        alone, _ = videodpo.dpo_loss(better[1::2], ref[1::2], target[1::2], torch.ones(1), 5.0, reduce)
        assert loss[1] == pytest.approx(3 * alone.item())


def test_noised_follows_each_kind_of_base():
    x0, noise, u = torch.randn(3, 4, 2, 4, 4), torch.randn(3, 4, 2, 4, 4), torch.tensor([0.0, 0.5, 0.9999])
    eps, v = make_schedule("linear_sd"), make_schedule("linear_sd", "v")
    assert noised(eps, x0, noise, u)[1].tolist() == [0, 500, 999]
    assert noised(eps, x0, noise, u, origin=50)[1].tolist() == [19, 519, 999]
    x_t, t, target = noised(v, x0, noise, u)
    ab = v.alpha_bar[t].float().view(-1, 1, 1, 1, 1)
    # |v - v'|^2 ab = |eps - eps'|^2 for any answer v', as the docstring says
    guess = torch.randn_like(x0)
    eps_error = (v.to_eps(guess, x_t, t) - noise).square()
    assert torch.allclose(ab * (guess - target).square(), eps_error, rtol=1e-3, atol=1e-4)
    x_t, t, target = noised(Flow(), x0, noise, u)
    part = (t / 1000).view(-1, 1, 1, 1, 1)
    assert t[1] == 500 and torch.allclose(x_t - part * target, x0, atol=1e-5)
    assert noised(Flow(by_size=True), x0, noise, u, (51, 240, 426))[1][1] > 501


def test_open_sora_and_turbo_are_told_what_they_need(public):
    texts, t = ["a fox", "a dog"], torch.tensor([19, 999])
    public("t2v-turbo")
    base = load_base("t2v-turbo", public("t2v-turbo")[0])
    cond = pipeline.training_conditions(base, settings("t2v-turbo")[0], texts, t)
    assert set(cond) == {"guidance"} and torch.equal(
        cond["guidance"], models.guidance_embedding(torch.full((2,), 7.5), 256))
    fake = argparse.Namespace(row=bases.base_row("opensora"),
                              tokenize=lambda texts: torch.tensor([[1, 1, 0]] * len(texts)))
    cond = pipeline.training_conditions(fake, settings("opensora")[0], texts, t)
    assert {k: v.tolist() for k, v in cond.items()} == {
        "fps": [24, 24], "height": [240, 240], "width": [426, 426], "text_mask": [[True, True, False]] * 2}


def test_a_flow_network_is_trained(tmp_path):
    """Open-Sora's class, small: z is 0 at the start, and gradients flow."""
    net = dit.STDiT3(dit.STDiT3Config(depth=1, dim=32, num_heads=2, context_dim=8, text_length=6))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    row = replace(bases.base_row("opensora"), net=net.cfg)
    text = torch.randn(1, 6, 8)
    base = argparse.Namespace(
        row=row, schedule=make_schedule(**row.schedule), net=net, sampling_schedule=lambda sampling: base.schedule,
        tokenize=lambda texts: torch.ones(len(texts), 6, dtype=torch.long),
        encode_text=lambda texts: text.expand(len(texts), -1, -1),
        encode_null=lambda null, n: net.null_text(n))
    sampling, args = settings("opensora", 100.0, height=32, width=48)
    frozen = frozen_copy(net, torch.float32, spread("ddp"), torch.device("cpu"))
    pairs, noise = torch.randn(2, 2, 4, 3, 4, 6), torch.randn(2, 2, 4, 3, 4, 6)
    loss, z = videodpo.pair_loss(net, frozen, base, sampling, args, pairs, ["a fox", None],
                                 torch.rand(2, 2), noise, torch.ones(2))
    loss.mean().backward()
    assert z.shape == (2,) and z.abs().max() < 1e-4
    assert sum(p.grad.norm() for p in net.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in frozen.parameters())


# ---- training

@pytest.mark.parametrize("options", [
    ["--rank", "4"],
    pytest.param(["--rank", "0", "--no-share-noise"], marks=pytest.mark.slow)])
def test_resume_equals_the_uninterrupted_run(options, released, tmp_path):
    more = [*options, "--reweight", "1", "--eval-pairs", str(released)]
    whole = train(released, tmp_path / "whole", 3, *more)
    train(released, tmp_path / "parts", 2, *more)
    parts = train(released, tmp_path / "parts", 3, *more, "--resume")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    rows = [read_lines(tmp_path / d / "log.jsonl") for d in ("whole", "parts")]
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in part] for part in rows]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    evals = [read_lines(tmp_path / d / "eval.jsonl") for d in ("whole", "parts")]
    assert [row["step"] for row in evals[0]] == [0, 3] and evals[0][-1] == evals[1][-1]
    # the reference is the network before training: nothing is preferred at first, then something is
    assert logs[0][0]["loss"] == pytest.approx(np.log(2) * np.mean(
        [videodpo.pair_weight(s, 1.0) for s in first_scores(released)]), rel=1e-4)
    assert logs[0][0]["margin"] == pytest.approx(0, abs=1e-5) and logs[0][1]["margin"] != 0
    assert evals[0][0]["wins"] == 0 and evals[0][-1]["margin"] != 0
    assert (tmp_path / "whole" / "after.png").exists()
    # resuming a finished run trains no further and says the same of it
    again = train(released, tmp_path / "whole", 3, *more, "--resume")
    assert all(torch.equal(again[k], parts[k]) for k in parts)
    assert read_lines(tmp_path / "whole" / "eval.jsonl") == evals[0]
    assert read_lines(tmp_path / "whole" / "log.jsonl") == rows[0]


@pytest.mark.parametrize("options", [
    ["--rank", "0"], pytest.param(["--rank", "4"], marks=pytest.mark.slow)])
def test_policy_and_reference_are_equal_before_training_in_bf16(options, released, tmp_path, capfd):
    """Their norms, too: beta is 5000. Blocks are recomputed, so the policy runs as on a GPU."""
    train(released, tmp_path / "run", 2, *options, "--dtype", "bf16", "--grad-ckpt", "--batch", "1")
    printed = capfd.readouterr()
    assert "largest |z| is 0 (must be 0)" in printed.out and "policy and reference differ" not in printed.err
    first, second = read_lines(tmp_path / "run" / "log.jsonl")
    assert first["margin"] == 0 and first["loss"] == pytest.approx(np.log(2)) and second["margin"] != 0


def test_a_reference_of_other_numerics_is_noticed(released, tmp_path, capfd, monkeypatch):
    def rounded(net, dtype, *rest):
        return frozen_copy(net.to(torch.bfloat16).float(), None, *rest)
    monkeypatch.setattr(videodpo, "frozen_copy", lambda net, *rest: rounded(copy.deepcopy(net), *rest))
    train(released, tmp_path / "run", 1, "--rank", "0", "--batch", "1", "--beta-dpo", "5000")
    assert "warning: policy and reference differ before training" in capfd.readouterr().err


def test_a_copy_computes_what_the_network_does_under_autocast():
    """Only the layers that autocast casts anyway are in bf16."""
    net = load_base("tiny").net
    frozen = frozen_copy(net, torch.bfloat16, spread("ddp"), torch.device("cpu"))
    types = {type(m).__name__: m.weight.dtype for m in frozen.modules() if getattr(m, "weight", None) is not None}
    assert types["Linear"] == types["Conv2d"] == torch.bfloat16
    assert types["GroupNorm"] == types["LayerNorm"] == torch.float32
    x, t, text = torch.randn(1, 4, 8, 8, 8), torch.tensor([500]), torch.randn(1, 8, net.cfg.context_dim)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x, t, text), net(x, t, text))


def first_scores(folder):
    """Of the pairs of the first step."""
    scores = PairDataset([folder], 8, 32, 32).scores
    return [scores[i] for i in data.batch_indices(4, 0, 2, 0)]


@pytest.mark.slow
def test_accumulation_equals_a_large_batch_and_noise_is_shared_on_demand(released, tmp_path):
    def first(name, *more):
        out = str(tmp_path / name)
        videodpo.main([*TRAIN, "--pairs", str(released), "--steps", "1", "--out", out, *more])
        state = common.check_out(argparse.Namespace(
            out=str(tmp_path / name), resume=True, steps=2, save_every=1, base="tiny", rank=16, alpha=16.0,
            lora_targets=["to_q", "to_k", "to_v", "to_out.0"], seed=0), "videodpo")
        return torch.cat([state["moments"][k]["exp_avg"].flatten() for k in sorted(state["moments"])])
    large, parts = first("a", "--batch", "4"), first("b", "--batch", "1", "--accum", "4")
    assert (large - parts).norm() < 1e-4 * large.norm()
    assert (large - first("c", "--batch", "4", "--no-share-noise")).norm() > 0.1 * large.norm()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_equal_one(mode, released, tmp_path):
    """Blocks recomputed, the reference the network with LoRA off."""
    args = ["videodpo.py", *TRAIN, "--pairs", str(released), "--batch", "1", "--steps", "2", "--grad-ckpt"]
    one = launch(1, tmp_path / "one", *args, "--accum", "2")
    two = launch(2, tmp_path / "two", *args, "--parallel", mode, "--eval-pairs", str(released))
    assert two["seen"] == one["seen"] == 4
    assert relative(two, one, "gradients") < 1e-4 and relative(two, one, "weights") < 1e-4


@pytest.mark.parametrize("name", ["videocrafter2", "t2v-turbo", "t2v-turbo-v2"])
def test_one_step_of_public_bases(name, public, tmp_path, monkeypatch):
    """The network's own frame rate, 16; the steps and guidance embeddings of T2V-Turbo; full and LoRA."""
    folder, _ = public(name)
    clips = tmp_path / "pairs"
    release(clips, 1, frames=3)
    seen, forward = [], models.UNet3D.forward

    def spy(self, x, t, *args, **kw):
        if torch.is_grad_enabled():
            steps = [i % (5 if name == "t2v-turbo-v2" else 20) for i in t.tolist()]
            seen.append((kw.get("fps"), "guidance" in kw, "motion_guidance" in kw, steps))
        return forward(self, x, t, *args, **kw)
    monkeypatch.setattr(models.UNet3D, "forward", spy)
    rank = "2" if "turbo" in name else "0"
    videodpo.main(["--base", name, "--weights", folder, "--pairs", str(clips), "--steps", "1",
                   "--rank", rank, "--accum", "1", "--workers", "0", "--eval-n", "1",
                   "--out", str(tmp_path / "run")])
    fps, guidance, motion, steps = seen[-1]
    assert fps is None and guidance == ("turbo" in name) and motion == (name == "t2v-turbo-v2")
    # the steps of their distillation, 50 and 200 of them
    assert steps == {"t2v-turbo": [19, 19], "t2v-turbo-v2": [4, 4]}.get(name, steps)
    sample.main(["--ckpt", str(tmp_path / "run"), "--weights", folder, "--prompt", "a red fox", "--vbench",
                 "--n", "2", "--out", str(tmp_path / "s")])
    assert (tmp_path / "s" / "a red fox-0.mp4").exists() and (tmp_path / "s" / "a red fox-1.mp4").exists()
    assert not load_checkpoint(tmp_path / "run")[1]["rank"] or name != "videocrafter2"


def test_names_for_vbench(message):
    assert sample.file_names(["a", "b c"], 2, True) == ["a-0.mp4", "a-1.mp4", "b c-0.mp4", "b c-1.mp4"]
    assert sample.file_names(["a", "a"], 2) == ["0000.mp4", "0001.mp4", "0002.mp4", "0003.mp4"]
    assert "cannot be a file name" in message(sample.file_names, ["a/b"], 1, True)
    assert "occurs twice" in message(sample.file_names, ["a", "a"], 1, True)


# ---- the stages

def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of all stages, two prompts."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "p.txt").write_text("a red circle growing\na blue square moving left\n")
    (folder / "e.txt").write_text("a white triangle standing still\n")
    args = [*STAGED, "--prompts", str(folder / "p.txt"), "--eval-prompts", str(folder / "e.txt"),
            "--steps", "1", "--drop-pairs", "0.25"]
    videodpo.main([*args, "--out", str(folder / "run")])
    return folder / "run", args


def test_all_stages_leave_what_they_promise(made):
    out, _ = made
    for name in ("train/clips/000001-1.mp4", "held-out/clips/000000-0.mp4", "train/pair.json", "eval.jsonl",
                 "curve.png", "before.png", "after.png", "after/0000.mp4", "ckpt.safetensors"):
        assert (out / name).exists(), name
    assert len(json.loads((out / "train" / "metadata.json").read_text())) == 4
    rows = read_lines(out / "train" / "scores.jsonl")
    assert [r["clip"] for r in rows] == ["000000-0.mp4", "000000-1.mp4", "000001-0.mp4", "000001-1.mp4"]
    assert len(PairDataset([out / "train"], 8, 32, 32)) == 2
    first, row = read_lines(out / "eval.jsonl")
    assert {"accuracy", "margin", "total", "wins", "dynamic_degree", "judge"} <= set(row)
    # the scores that wins compares
    totals = [read_lines(out / name / "scores.jsonl")[0]["total"] for name in ("before", "after")]
    assert [first["total"], row["total"]] == totals and row["wins"] == float(totals[1] > totals[0])


def test_stage_by_stage_and_after_a_cut_it_is_the_same_run(made, message):
    """Bit for bit: clips, scores, pairs, weights."""
    out, args = made
    again = out.parent / "again"
    args = [*args, "--out", str(again)]
    assert "run the stage before" in message(videodpo.main, [*args, "--stage", "score"])
    videodpo.main([*args, "--stage", "generate"])
    assert "already holds clips" in message(videodpo.main, [*args, "--stage", "generate"])
    (again / "train" / "clips" / "000000-1.mp4").unlink()  # as a kill leaves it
    (again / "train" / "metadata.json").unlink()
    resume = [*args, "--stage", "generate", "--resume"]
    assert "other options" in message(videodpo.main, [*resume, "--eta", "1"])
    videodpo.main(resume)
    videodpo.main([*args, "--stage", "score"])
    scores = again / "train" / "scores.jsonl"
    lines = scores.read_text().splitlines(True)
    scores.unlink()
    (again / "train" / "scores-0.jsonl").write_text(lines[0] + lines[1][:30])  # a line cut off
    (again / "train" / "scores-3.jsonl").write_text(lines[3])  # of a run on more processes
    videodpo.main([*args, "--stage", "score", "--resume"])
    videodpo.main([*args, "--stage", "pair"])
    videodpo.main([*args, "--stage", "train"])
    for name in ("train", "held-out"):
        ours, theirs = tree(again / name), tree(out / name)
        same = {k for k in theirs if "scores-" not in k}
        assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    a, b = load_file(again / "ckpt.safetensors"), load_file(out / "ckpt.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_two_processes_make_the_same_clips_and_pairs(made):
    out, args = made
    two = out.parent / "two"
    launch(2, two, "videodpo.py", *args)
    for file in ("metadata.json", "pair.json", "clips/000001-0.mp4", "scores.jsonl"):
        assert (two / "train" / file).read_bytes() == (out / "train" / file).read_bytes(), file
