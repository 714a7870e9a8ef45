"""The tiny world's judge: right on the truth, right after the autoencoder, at chance on shuffled captions.

Scores of features are in the oracle cases dreamvideo/metrics_*; here is what they mean.
"""
import random

import pytest
import torch

from bases import load_base
from metrics import cosine, temporal_consistency
from tinyworld import (
    ATTRIBUTES,
    MOTIONS,
    judge,
    judge_captions,
    parse,
    render,
    tiny_batch,
    tiny_captions,
    tiny_prompts,
)


@pytest.fixture(scope="module")
def truth():
    return tiny_batch(2026, 1000)


def test_judge_on_ground_truth(truth):
    clips, captions, _ = truth
    assert min(judge_captions(clips, captions).values()) >= 0.99


def test_judge_after_the_tiny_autoencoder(truth):
    clips, captions, _ = truth
    vae = load_base("tiny").vae
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(part)) for part in clips.split(50)])
    seen = judge_captions(decoded, captions)
    assert min(seen.values()) >= 0.98, seen


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
