"""The tiny world's rewards, and the published ones around small random towers in files like theirs."""
import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from safetensors.torch import save_file

import rewards
import sample
from data import list_clips, write_video
from rewards import get_reward, score
from text_encoders import CLIP_L14, CLIPConfig, OpenCLIP, clip_from_hf, tokenize
from tinyworld import COLOURS, MOTIONS, judge, render, tiny_scene

DATA = Path(__file__).parent / "oracle_data" / "rewards"
RED = "a red circle moving left"


def manifest(name):
    return json.loads(gzip.decompress((DATA / f"{name}.manifest.json.gz").read_bytes()))["keys"]


def shapes(tensors):
    return {k: list(v.shape) for k, v in tensors.items()}


def on_meta(build, *args):
    with torch.device("meta"):
        return build(*args)


def scene(motion="moving left", frames=24, seed=0, **given):
    given = dict(colour="red", background="gray", shape="circle") | given
    return tiny_scene(np.random.default_rng(seed), motion=motion, frames=frames, **given)


def value(spec, clip):
    return score(get_reward(spec, "cpu"), clip[None], [RED]).item()


# ---- the tiny world's

@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_counts_as_such(colour):
    for other in COLOURS:
        clip = render(scene(colour=other, frames=8))
        share = (clip - clip[:, :, :1, :1]).square().sum(0).sqrt().gt(0.5).float().mean().item()
        reward = value(f"remove-colour={colour}", clip)
        if other == colour:
            assert -1.2 * share < reward < -0.6 * share
        else:
            assert reward > -0.1 * share


@pytest.mark.parametrize("colour", COLOURS)
def test_gradient_takes_a_colour_away(colour):
    """Followed in the pixels, also from the colour itself, the gradient ends where the judge sees another."""
    clip = render(scene(colour=colour, frames=8))[None]
    reward = get_reward(f"remove-colour={colour}", "cpu")
    shift = torch.zeros(1, 3, 1, 1, 1, requires_grad=True)  # one colour for the object as a whole
    mask = (clip - clip[:, :, :, :1, :1]).square().sum(1, keepdim=True).sqrt().gt(0.5)
    opt = torch.optim.Adam([shift], 0.02)
    for _ in range(60):
        opt.zero_grad()
        loss = -score(reward, (clip + shift * mask).clamp(-1, 1), [RED])
        loss.sum().backward()
        opt.step()
    assert judge(clip[0])["colour"] == colour
    assert judge((clip + shift * mask).detach()[0].clamp(-1, 1))["colour"] != colour


def test_an_object_that_stays_itself():
    """Motions cost little; another colour or shape, or no object, from some frame on costs more."""
    for motion in MOTIONS:
        for frames in (8, 24):
            assert value("temporal", render(scene(motion, frames))) > 0.65, motion
    moving = scene("moving left")
    clip = render(moving)
    good = value("temporal", clip)
    empty = clip[:, :, :1, :1].expand_as(clip)
    for other in (render(dataclasses.replace(moving, colour="blue")), empty,
                  render(dataclasses.replace(moving, shape="triangle"))):
        assert value("temporal", torch.cat([clip[:, :16], other[:, 16:]], dim=1)) < good - 0.1


def test_standing_still_hardly_pays():
    """A clip of which the colour drifts gains less by freezing its object than by halving the drift."""
    moving = scene(frames=8)
    frozen = dataclasses.replace(moving, x=np.full(8, moving.x.mean()))
    def drifting(s, share):
        clip, other = render(s), render(dataclasses.replace(s, colour="purple"))
        weight = share * torch.linspace(0, 1, 8).view(1, 8, 1, 1)
        return value("temporal", (1 - weight) * clip + weight * other)
    now = drifting(moving, 0.5)
    assert drifting(frozen, 0.5) - now < 0.5 * (drifting(moving, 0.25) - now)


@pytest.mark.parametrize("spec", ["remove-colour=red", "temporal", "brightness", "redness", "size", "tiny"])
@pytest.mark.parametrize("frames", [1, 2, 3, 8, 24])
def test_tiny_rewards(spec, frames):
    if spec == "tiny" and frames != 8:
        return
    check(get_reward(spec, "cpu"), frames, 32, moves=frames > 1 or spec != "temporal", prompts=[RED] * 3)


def check(reward, frames, size, moves=True, prompts=("a cat", "a dog jogging", "a cat")):
    """One number a clip, alone as in a batch, with a finite gradient, not zero; fp32 within autocast."""
    torch.manual_seed(frames)
    videos = torch.stack([render(scene(m, frames)) for m in ("moving left", "growing", "moving up")])
    videos = torch.nn.functional.interpolate(videos + 0.1 * torch.randn_like(videos), (frames, size, size))
    videos.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = score(reward, videos, list(prompts))
    out.sum().backward()
    assert out.shape == (3,) and out.dtype == torch.float32 and out.isfinite().all()
    assert videos.grad.isfinite().all()
    if moves:
        assert (videos.grad.flatten(1).norm(dim=1) > 0).all()
    for i in range(3):
        alone = score(reward, videos[i:i + 1].detach(), [prompts[i]])
        assert alone.item() == pytest.approx(out[i].item(), rel=1e-4, abs=1e-5)
    plain = reward.scores(videos.detach() / 2 + 0.5, list(prompts))
    assert all(v.shape == (3,) and v.isfinite().all() for v in plain.values())


# ---- sums

def test_a_sum_mixes_clips_and_frames(tmp_path):
    (tmp_path / "mine.py").write_text("def blue(frames, prompts):\n    assert frames.ndim == 4\n"
                                      "    return frames[:, 2].mean((1, 2))\n")
    clips = torch.rand(2, 3, 8, 32, 32, requires_grad=True) * 2 - 1
    spec = f"tiny:2, size:-0.5,remove-colour=red,{tmp_path}/mine.py:blue:0.25"
    both = get_reward(spec, "cpu")
    parts = [get_reward(s, "cpu") for s in ("tiny", "size", "remove-colour=red", f"{tmp_path}/mine.py:blue")]
    values = [score(p, clips, [RED] * 2) for p in parts]
    expected = sum(w * v for w, v in zip((2, -0.5, 1, 0.25), values))
    assert both.clip and not parts[1].clip
    assert torch.allclose(score(both, clips, [RED] * 2), expected)
    plain = both.scores(clips / 2 + 0.5, [RED] * 2)
    assert list(plain) == ["tiny", "size", "remove-colour=red", f"{tmp_path}/mine.py:blue", "sum"]
    assert torch.allclose(plain["sum"], expected) and torch.allclose(plain["size"], values[1])
    check(both, 8, 32, prompts=[RED] * 3)


def test_a_function_of_the_users_may_judge_whole_clips(tmp_path, message):
    (tmp_path / "mine.py").write_text(
        "def still(clips, prompts):\n"
        "    assert clips.ndim == 5 and len(clips) == len(prompts)\n"
        "    return -(clips[:, :, 1:] - clips[:, :, :-1]).abs().mean((1, 2, 3, 4))\n"
        "still.clip = True\n"
        "def detached(frames, prompts):\n    return frames.detach().mean((1, 2, 3))\n"
        "def one_number(frames, prompts):\n    return 1.0\n")
    reward = get_reward(f"{tmp_path}/mine.py:still", "cpu")
    check(reward, 8, 32, prompts=[RED] * 3)
    assert reward.clip and not get_reward(f"{tmp_path}/mine.py:detached", "cpu").clip
    clips = (torch.rand(2, 3, 4, 8, 8) * 2 - 1).requires_grad_()
    for name, words in (("detached", "no gradient"), ("one_number", "returned float for 8 pictures")):
        mine = get_reward(f"{tmp_path}/mine.py:{name}", "cpu")
        assert words in message(score, mine, clips, [RED] * 2)


def test_check_asks_every_part(message):
    reward = get_reward("size,tiny:0.5", "cpu")
    reward.check([RED])
    assert "is no caption of the tiny world ('dragon')" in message(reward.check, [RED, "a dragon"])
    get_reward("size", "cpu").check(["a dragon"])  # it reads no prompts


@pytest.mark.parametrize("spec, words", [
    ("nice", "--reward nice: unknown; choose from"), ("size:a", "weight 'a' is no number"),
    ("size:nan", "weight 'nan'"), ("size=3", "size takes no argument"), ("size,,tiny", "unknown"),
    ("remove-colour", "choose a colour from red"), ("remove-colour=gray", "choose a colour"),
    ("hps=v3", "choose v2.0 or v2.1"), ("clip=B", "choose ViT-L-14"), ("none.py:fn:2", "none.py: no such reward file"),
    ("add-object=", "write add-object=OBJECT"), ("remove-object=cup@dino", "grounding-dino-tiny"),
    ("hps", "cannot get HPS_v2.1_compressed.pt of huggingface.co repository xswu/HPSv2"),
    ("remove-object=book", "cannot get huggingface.co repository hustvl/yolos-base"),
    ("size,vjepa", "vjepa2-vitl-fpc64-256/ with --reward-weights")])
def test_bad_rewards(spec, words, message):
    assert words in message(get_reward, spec, "cpu")


@pytest.mark.parametrize("spec, words", [
    ("hps", "HPS_v2.1_compressed.pt of xswu/HPSv2 is missing for --reward hps"),
    ("rainy", "model.safetensors of openai/clip-vit-large-patch14 is missing for --reward rainy"),
    ("action", "videomae-base-finetuned-kinetics/config.json of MCG-NJU/")])
def test_missing_files(spec, words, message, tmp_path):
    text = message(get_reward, spec, "cpu", tmp_path)
    assert words in text and f"--reward-weights {tmp_path}" in text
    assert "no such folder" in message(get_reward, spec, "cpu", tmp_path / "none")


# ---- published networks: names and shapes

@pytest.mark.parametrize("name, cfg", [
    ("openai-clip-vit-large-patch14", CLIP_L14), ("PickScore_v1", CLIPConfig())])
def test_clip_of_transformers(name, cfg):
    theirs = {k: torch.empty(shape, device="meta") for k, shape in manifest(name).items()}
    # a buffer of older files
    theirs["text_model.embeddings.position_ids"] = theirs["vision_model.embeddings.position_ids"] = None
    ours = shapes(on_meta(OpenCLIP, cfg).state_dict())
    assert shapes(clip_from_hf(theirs)) == ours
    assert len(ours) < len(manifest(name))  # q, k and v are one
    assert rewards.CLIPS["ViT-L-14"][1] is CLIP_L14 and CLIP_L14.quick_gelu
    assert not rewards.CLIPS["PickScore"][1].quick_gelu


def test_hps_and_videomae():
    assert shapes(on_meta(OpenCLIP, rewards.CLIPS["HPS v2.1"][1]).state_dict()) == manifest(
        "HPS_v2_ViT-H-14")
    import transformers
    cfg = transformers.VideoMAEConfig(num_labels=400, use_mean_pooling=True)
    net = on_meta(transformers.VideoMAEForVideoClassification, cfg)
    assert shapes(net.state_dict()) == manifest("videomae-base-finetuned-kinetics")


@pytest.mark.skipif(not oracles.HEAD_FILES.is_dir(), reason="needs the real heads, shared/data/reward_heads")
@pytest.mark.parametrize("name", rewards.HEADS)
def test_real_heads_load(name):
    head = rewards.Files("cpu", oracles.HEAD_FILES).head(name)
    assert head(torch.nn.functional.normalize(torch.randn(5, 768), dim=1)).shape == (5,)
    assert not any(p.requires_grad for p in head.parameters())


# ---- published networks at small width, in the layout of their files

def clip_of_transformers(act, dim):
    import transformers
    tower = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                 projection_dim=dim, hidden_act=act)
    ends = dict(bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
    return transformers.CLIPModel(transformers.CLIPConfig(
        text_config=tower | ends, vision_config=tower | dict(patch_size=56), projection_dim=dim)).eval()


def excite(net):
    """Weights of a size that lets signals through."""
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=(p[0].numel()) ** -0.5)
    return net.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder for --reward-weights with every public file, and {name: network in the peer's library}."""
    import transformers as tf
    torch.manual_seed(1)
    folder, nets = tmp_path_factory.mktemp("rewards"), {}
    small = dict(vision_layers=2, vision_width=32, vision_head_width=16, patch_size=56, text_width=32,
                 text_heads=2, text_layers=2)
    sizes = {"ViT-L-14": CLIPConfig(embed_dim=768, quick_gelu=True, **small)}
    sizes |= {k: CLIPConfig(embed_dim=24, **small) for k in rewards.CLIPS if k != "ViT-L-14"}
    table = {k: (url, sizes[k]) for k, (url, _) in rewards.CLIPS.items()}
    for name, act, dim in (("clip-vit-large-patch14", "quick_gelu", 768), ("PickScore_v1", "gelu", 24)):
        nets[name] = excite(clip_of_transformers(act, dim))
        nets[name].logit_scale.data.fill_(3.0)
        (folder / name).mkdir()
        save_file(nets[name].state_dict(), folder / name / "model.safetensors")
    nets["hps"] = excite(OpenCLIP(sizes["HPS v2.1"]))
    torch.save({"epoch": 1, "state_dict": nets["hps"].half().state_dict()}, folder / "HPS_v2.1_compressed.pt")
    nets["hps"] = nets["hps"].float()
    other = excite(OpenCLIP(sizes["HPS v2.0"])).state_dict()
    torch.save({"state_dict": other}, folder / "HPS_v2_compressed.pt")
    torch.save(other, folder / "open_clip_pytorch_model.bin")
    for name, (url, options) in rewards.HEADS.items():
        nets[name] = excite(rewards.Head(**options))
        torch.save(nets[name].state_dict(), folder / url.rsplit("/", 1)[1])

    words = {0: "cup", 1: "book"}
    yolos = tf.YolosForObjectDetection(tf.YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_detection_tokens=6, id2label=words, label2id={v: k for k, v in words.items()}))
    excite(yolos).class_labels_classifier.layers[-1].bias.data = torch.tensor([-1.0, 1.0, 0.0])
    videomae = excite(tf.VideoMAEForVideoClassification(tf.VideoMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=56,
        id2label=dict(enumerate(rewards.ACTIONS.values())),
        label2id={v: k for k, v in enumerate(rewards.ACTIONS.values())})))
    vjepa = excite(tf.VJEPA2Model(tf.VJEPA2Config(
        crop_size=32, patch_size=16, frames_per_clip=8, hidden_size=48, num_attention_heads=2,
        num_hidden_layers=2, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=2)))
    dino = excite(tf.GroundingDinoForObjectDetection(tf.GroundingDinoConfig(
        backbone_config=tf.SwinConfig(
            embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
            out_features=["stage2", "stage3", "stage4"]),
        text_config=dict(model_type="bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=64, vocab_size=12),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=10)))
    for net, name in ((yolos, "yolos-base"), (videomae, "videomae-base-finetuned-kinetics"),
                      (vjepa, "vjepa2-vitl-fpc64-256"), (dino, "grounding-dino-tiny")):
        net.save_pretrained(folder / name)
        nets[name] = net
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "red", "book", "a", "cup", "the"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tf.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "grounding-dino-tiny")
    return folder, nets, table


@pytest.fixture
def public_files(files, monkeypatch):
    monkeypatch.setattr(rewards, "CLIPS", files[2])
    return files[:2]


@pytest.mark.parametrize("spec, frames", [
    ("aesthetic", 1), ("hps", 2), ("hps=v2.0", 1), ("aesthetic-hps", 1), ("pickscore", 1), ("rainy", 1),
    ("snowy", 1), ("compression", 1), ("clip", 2), ("clip=ViT-H-14", 1), ("remove-object=book", 1),
    ("add-object=cup", 1), ("remove-object=red book@grounding-dino-tiny", 1),
    ("add-object=book@grounding-dino-tiny", 1), ("action=jogging", 1), ("action=dancing ballet", 2),
    ("action=jogging", 5), ("vjepa", 1), ("vjepa", 3), ("vjepa", 12), ("hps:2,action=jogging,vjepa:0.5", 4)])
def test_published_rewards(spec, frames, public_files):
    check(get_reward(spec, "cpu", public_files[0]), frames, 40)


def test_weights_are_frozen_and_fp32(public_files):
    towers = rewards.Files("cpu", public_files[0])
    net, _ = towers.clip("hps", "HPS v2.1")
    assert towers.clip("hps", "HPS v2.1")[0] is net  # one copy for a sum
    vjepa = towers.transformer("vjepa", "VJEPA2Model", "facebook/vjepa2-vitl-fpc64-256")
    for n in (net, towers.head("rainy"), vjepa):
        assert not n.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in n.parameters())


def test_aesthetic_of_transformers_clip(public_files):
    """The whole way beside transformers' own CLIP, whose activation is QuickGELU."""
    folder, nets = public_files
    image = torch.rand(2, 3, 90, 160) * 2 - 1
    pixels = rewards.square(image / 2 + 0.5)
    features = nets["clip-vit-large-patch14"].get_image_features(pixel_values=pixels)
    features = getattr(features, "pooler_output", features)
    expected = nets["aesthetic"](torch.nn.functional.normalize(features, dim=1))
    reward = get_reward("aesthetic", "cpu", folder)
    plain = reward.scores(image[:, :, None] / 2 + 0.5, ["a", "b"])["aesthetic"]
    assert torch.allclose(plain, expected, atol=1e-5)
    found = score(reward, image[:, :, None], ["a", "b"])
    assert torch.allclose(found, -0.1 * (expected - 10).abs(), atol=1e-5)


def test_pickscore_of_transformers_clip(public_files):
    folder, nets = public_files
    image, prompts = torch.rand(2, 3, 90, 160) * 2 - 1, ["a cat on a mat", "two dogs"]
    out = nets["PickScore_v1"](pixel_values=rewards.crop(image / 2 + 0.5), input_ids=tokenize(prompts))
    expected = out.logits_per_image.diagonal()
    reward = get_reward("pickscore", "cpu", folder)
    plain = reward.scores(image[:, :, None] / 2 + 0.5, prompts)["pickscore"]
    assert torch.allclose(plain, expected, atol=1e-4)
    assert out.logits_per_image[0, 0] != out.logits_per_image[0, 1]


def test_hps_reads_the_prompt(public_files):
    folder, nets = public_files
    image, prompts = torch.rand(2, 3, 90, 160) * 2 - 1, ["a cat on a mat", "two dogs"]
    half = OpenCLIP(rewards.CLIPS["HPS v2.1"][1])
    half.load_state_dict(nets["hps"].state_dict())  # rounded to fp16, as in the file
    image_features = half.visual(rewards.square(image / 2 + 0.5))
    expected = torch.nn.functional.cosine_similarity(image_features, half.pooled(tokenize(prompts)))
    reward = get_reward("hps", "cpu", folder)
    assert torch.allclose(score(reward, image[:, :, None], prompts), expected - 1, atol=1e-5)
    other = score(reward, image[:, :, None], prompts[::-1])
    assert (other - expected + 1).abs().min() > 1e-4


def test_action_of_the_prompt(public_files, message):
    reward = get_reward("action", "cpu", public_files[0])
    clip = torch.rand(1, 3, 4, 40, 40) * 2 - 1
    by_prompt = score(reward, clip, ["a monkey with a cello"])
    assert by_prompt == score(get_reward("action=playing cello", "cpu", public_files[0]), clip, ["a"])
    probability = reward.scores(clip / 2 + 0.5, ["playing cello"])["action"]
    assert probability.log().item() == pytest.approx(by_prompt.item(), abs=1e-5)
    assert "no class for 'a cat'" in message(score, reward, clip, ["a cat"])
    assert "no class for 'a cat'" in message(reward.check, ["jogging", "a cat"])
    assert "no class for 'sleeping'" in message(get_reward, "action=sleeping", "cpu", public_files[0])


def test_videomae_has_its_own_positions_at_its_own_length(public_files):
    """16 frames, what the published network was built for: nothing of ours stands between."""
    folder, nets = public_files
    clip = torch.rand(1, 3, 16, 224, 224)
    frames = rewards.imagenet(clip.transpose(1, 2))
    net = nets["videomae-base-finetuned-kinetics"]
    expected = net(pixel_values=frames).logits.softmax(1)[0, net.config.label2id["jogging"]]
    out = get_reward("action=jogging", "cpu", folder).scores(clip, ["a"])["action=jogging"]
    assert out.item() == pytest.approx(expected.item(), 1e-4)


def test_objects(public_files, message):
    """What is removed is what YOLOS's own post-processing keeps."""
    folder, nets = public_files
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    out = nets["yolos-base"](pixel_values=rewards.detector_input(image / 2 + 0.5))
    p = out.logits.softmax(-1)[..., :-1]
    best, label = p.max(-1)
    kept = [[b for b, c in zip(*row) if b > 0.2 and c == 1] for row in zip(best.tolist(), label.tolist())]
    assert all(kept)
    expected = [-sum(row) / len(row) for row in kept]
    found = score(get_reward("remove-object=book", "cpu", folder), image[:, :, None], ["a", "b"])
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert "YOLOS knows no 'fox'" in message(get_reward, "remove-object=fox", "cpu", folder)
    # nothing of the kind: no loss, a gradient of zero, not an error
    images = image[:, :, None].requires_grad_()
    none = rewards.object_reward(lambda x: (x.mean((1, 2, 3))[:, None], torch.zeros(len(x), 1, dtype=bool)))
    score(none, images, ["a", "b"]).sum().backward()
    assert images.grad.abs().max() == 0


def test_another_networks_files_are_refused(public_files, message, tmp_path):
    folder, _ = public_files
    (tmp_path / "yolos-base").symlink_to(folder / "vjepa2-vitl-fpc64-256")
    assert "hustvl/yolos-base" in message(get_reward, "remove-object=book", "cpu", tmp_path)
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes((folder / "rainy_reward.pt").read_bytes())
    assert "these are not its weights" in message(get_reward, "hps", "cpu", tmp_path)


# ---- from the command line

def test_scores_of_samples(tmp_path, capsys):
    args = ["--sample-steps", "2", "--reward", "remove-colour=red,temporal:0.5", "--out", str(tmp_path)]
    sample.main(["--base", "tiny", "--prompt", RED, "--n", "3", "--batch", "2", *args])

    def rows_of(text):
        return [line.split() for line in text.splitlines() if line.startswith(("temporal", "sum"))]
    table = rows_of(capsys.readouterr().out)
    rows = [json.loads(x) for x in (tmp_path / "index.jsonl").read_text().splitlines()]
    for name, mean, sd in table:
        values = np.array([row["scores"][name] for row in rows])
        assert (float(mean), float(sd)) == pytest.approx((values.mean(), values.std()), abs=6e-5)
    assert len(table) == 2 and rows[0]["scores"]["sum"] == pytest.approx(
        rows[0]["scores"]["remove-colour=red"] + 0.5 * rows[0]["scores"]["temporal"])
    # the same figures for the files as they lie there
    rewards.main(["--video", str(tmp_path), "--reward", "remove-colour=red,temporal:0.5"])
    again = capsys.readouterr().out
    assert rows_of(again) == table and "0002.mp4" in again


def test_scoring_existing_clips(tmp_path, message):
    write_video(tmp_path / "a.mp4", render(scene(frames=8)))
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    args = ["--video", str(tmp_path), "--reward", "size"]
    wrong = [*args, "--prompts", str(tmp_path / "prompts.txt")]
    assert "2 prompts for 1 clips" in message(rewards.main, wrong)
    assert "arguments are required: --reward" in message(rewards.main, args[:2])
    (tmp_path / "prompts.txt").write_text("a pink circle\n")
    text = message(rewards.main, [*wrong[:3], "tiny", *wrong[4:]])
    assert "'a pink circle' is no caption of the tiny world ('pink')" in text


def test_a_folder_with_an_index_has_no_other_clips(tmp_path, capsys):
    """Clips that an earlier, longer run left in the folder are not scored."""
    args = ["--base", "tiny", "--sample-steps", "1", "--out", str(tmp_path)]
    sample.main([*args, "--prompt", RED, "--n", "2"])
    sample.main([*args, "--prompt", "a blue square growing"])
    assert (tmp_path / "0001.mp4").exists()
    capsys.readouterr()
    rewards.main(["--video", str(tmp_path), "--reward", "tiny"])
    out, err = capsys.readouterr()
    assert "0000.mp4 tiny" in out and "0001.mp4" not in out and "1 clips" in out
    assert "are left out (1)" in err
    (tmp_path / "index.jsonl").unlink()
    rewards.main(["--video", str(tmp_path), "--reward", "size"])
    assert "0001.mp4 size" in capsys.readouterr().out


def test_the_index_decides(tmp_path, message):
    def names():
        return [clip.name for _, clip, _ in list_clips(tmp_path, "found")[1]]
    for name in ("10.mp4", "9.mp4", "c.mp4"):
        (tmp_path / name).touch()
    assert names() == ["9.mp4", "10.mp4", "c.mp4"]
    index = tmp_path / "index.jsonl"
    index.write_text('{"file": "c.mp4", "video": "9.mp4", "prompt": ""}\n{"file": "9.mp4", "prompt": "a dog"}\n')
    assert names() == ["c.mp4", "9.mp4"]  # not `video`, which the clip was made from
    assert [row[2] for row in list_clips(tmp_path, "found")[1]] == ["", "a dog"]
    assert list_clips(tmp_path / "9.mp4", "found")[1] == [(1, tmp_path / "9.mp4", "a dog")]
    assert list_clips(tmp_path / "10.mp4", "found")[1] == [(1, tmp_path / "10.mp4", None)]
    for text, words in (('{"file": "gone.mp4"}', "row 1: ", ), ('{"file": ["9.mp4"]}', "not a text"), ("1", "object"),
                        ("{broken", "not valid JSON"), ("{}", "no `file`"), ('{"a": ' * 5000, "nested too deeply")):
        index.write_text(f"{text}\n")
        assert words in message(list_clips, tmp_path, "found")
