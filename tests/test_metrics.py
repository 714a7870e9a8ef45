"""The tiny world's judge: right on the truth, right after the autoencoder, at chance on shuffled captions.

Scores of features are in the oracle cases dreamvideo/metrics_*; here is what they mean.
"""
import random

import numpy as np
import pytest
import torch

from bases import load_base
from metrics import cosine, temporal_consistency
from tinyworld import (
    ATTRIBUTES,
    FLAW_SHARES,
    MOTIONS,
    judge,
    judge_captions,
    parse,
    render,
    tiny_batch,
    tiny_captions,
    tiny_flaws,
    tiny_prompts,
    tiny_scene,
)


@pytest.fixture(scope="module")
def truth():
    return tiny_batch(2026, 1000)


@pytest.fixture(scope="module")
def spoiled():
    """1,000 clips with every combination of flaws in turn -> clips, captions, [{flaw: bool}]."""
    rng, clips, captions, flaws = np.random.default_rng(2026), [], [], []
    for i in range(1000):
        scene = tiny_scene(rng)
        flaws.append({flaw: bool(i >> bit & 1) for bit, flaw in enumerate(FLAW_SHARES)})
        clips.append(render(scene, flaws=tiny_flaws(rng, **flaws[-1])))
        captions.append(scene.caption())
    return torch.stack(clips), captions, flaws


def decoded(clips):
    """What the tiny autoencoder makes of clips."""
    vae = load_base("tiny").vae
    with torch.no_grad():
        return torch.cat([vae.decode(vae.encode(part)) for part in clips.split(50)])


def right(clips, captions, flaws):
    """{attribute or flaw: share of clips in which the judge is right}"""
    seen = [judge(clip) for clip in clips]
    words = [parse(caption) for caption in captions]
    return {a: np.mean([s[a] == w[a] for s, w in zip(seen, words)]) for a in ATTRIBUTES} | {
        flaw: np.mean([s[flaw] == f[flaw] for s, f in zip(seen, flaws)]) for flaw in FLAW_SHARES}


def test_judge_on_ground_truth(truth):
    clips, captions, _ = truth
    seen = judge_captions(clips, captions)
    assert min(seen[a] for a in (*ATTRIBUTES, "joint")) >= 0.99
    assert max(seen[flaw] for flaw in FLAW_SHARES) <= 0.001


def test_judge_sees_flaws_and_what_is_under_them(spoiled):
    seen = right(*spoiled)
    assert min(seen.values()) >= 0.99, seen


@pytest.mark.parametrize("n", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_judge_of_flaws_after_the_tiny_autoencoder(n, spoiled):
    clips, captions, flaws = spoiled
    seen = right(decoded(clips[:n]), captions, flaws)
    assert min(seen.values()) >= 0.97, seen


def test_judge_after_the_tiny_autoencoder(truth):
    clips, captions, _ = truth
    seen = judge_captions(decoded(clips[:150]), captions)
    assert min(seen[a] for a in (*ATTRIBUTES, "joint")) >= 0.98, seen


def test_judge_is_at_chance_on_shuffled_captions(truth):
    clips, captions, _ = truth
    shuffled = list(captions)
    random.Random(0).shuffle(shuffled)
    seen = judge_captions(clips, shuffled)
    for attribute, chance in (("shape", 1 / 3), ("colour", 1 / 8), ("background", 1 / 3), ("motion", 1 / 7)):
        assert abs(seen[attribute] - chance) < 0.05
    assert seen["joint"] < 0.02


def test_judge_sees_noise_as_nothing():
    for strength in (0.0, 0.1, 0.5):
        assert judge(strength * torch.randn(3, 8, 32, 32))["shape"] == "none"


def test_judge_measures_speed_size_and_smoothness(truth):
    clips, _, scenes = truth
    for clip, scene in list(zip(clips, scenes))[:100]:
        seen = judge(clip)
        path = ((scene.x[-1] - scene.x[0]) ** 2 + (scene.y[-1] - scene.y[0]) ** 2) ** 0.5 / 7
        assert abs(seen["speed"] - path) < 0.15 and seen["smoothness"] < 0.3
        area = (torch.pi * torch.tensor(scene.radius ** 2)).mean()
        assert abs(seen["size"] - area) < 0.15 * seen["size"] + 3
    shaken = clips[0].clone()
    shaken[:, 1::2] = shaken[:, 1::2].roll(5, -1)
    assert judge(shaken)["smoothness"] > 1


def test_captions_and_scenes_agree(truth):
    _, captions, scenes = truth
    for caption, scene in zip(captions, scenes):
        assert all(getattr(scene, a) == v for a, v in parse(caption).items())
    assert len(set(tiny_captions())) == 504 and len(MOTIONS) == 7
    train, held_out = set(tiny_prompts()), set(tiny_prompts(held_out=True))
    assert (len(train), len(held_out)) == (440, 64) and not train & held_out


def test_tiny_clips_are_a_function_of_the_seed():
    a, b = tiny_batch((3, 4), 4), tiny_batch((3, 4), 4)
    assert torch.equal(a[0], b[0]) and a[1] == b[1]
    assert torch.equal(render(a[2][0]), a[0][0])
    assert set(ATTRIBUTES) == {"shape", "colour", "background", "motion"}
    assert a[0].min() >= -1 and a[0].max() <= 1


def test_scores_of_features():
    frames = torch.tensor([[2.0, 0.0], [0.0, 0.1], [0.0, 5.0]])  # lengths do not count
    assert cosine(frames, frames[:1]) == pytest.approx(1 / 3)
    assert cosine(frames, torch.stack([frames[0], -frames[0]])) == cosine(frames, []) == 0
    assert temporal_consistency(frames) == pytest.approx(0.5)
