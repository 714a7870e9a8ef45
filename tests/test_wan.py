"""Wan: live parity with diffusers and transformers, files of every naming, LoRA files in and out, precision."""
import dataclasses
import gzip
import json
from pathlib import Path

import hub
import oracles
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import bases
import data
import weights
from dit import CogVideoX, CogVideoXConfig, Wan, WanConfig, wan_diffusers_name, wan_state
from models import add_lora, merge_public_lora, public_layers, read_peft_lora
from text_encoders import (
    WAN_CLIP, CLIPConfig, OpenCLIPVision, T5Config, T5Text, clean_text, image_state, t5_state, t5_tokenizer,
    umt5_name, wan_clip_name)

MANIFESTS = Path(__file__).parent / "oracle_data"
T2V = WanConfig(in_channels=4, out_channels=4, dim=48, ffn_dim=80, heads=2, num_layers=2, freq_dim=32, text_dim=16,
                text_length=512)
I2V = dataclasses.replace(T2V, in_channels=12, image_dim=20)
FLF2V = dataclasses.replace(I2V, image_positions=10)
A14B = dataclasses.replace(T2V, in_channels=12)
LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
          "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")


def filled(net):
    """The network with deterministic weights, none of them zero."""
    return oracles.fill(net, {key: list(value.shape) for key, value in net.state_dict().items()})


def close(ours, theirs, tol=1e-5):
    assert oracles.error(ours, theirs) < tol


def given(cfg, b=2, f=3, h=4, w=6):
    """(x, t, text) and conditions of a Wan; the prompts are shorter than text_length."""
    text, cond = torch.randn(b, 7, cfg.text_dim), {}
    text[0, 4:] = 0
    if cfg.in_channels > cfg.out_channels:
        cond["first_frame"] = torch.randn(b, cfg.in_channels - cfg.out_channels, f, h, w)
    if cfg.image_dim:
        cond["image"] = torch.randn(b, cfg.image_positions or 5, cfg.image_dim)
    return [torch.randn(b, cfg.out_channels, f, h, w), torch.tensor([7.5, 999.0])[:b], text], cond


def peer_of(cfg):
    """diffusers' WanTransformer3DModel of a WanConfig."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.WanTransformer3DModel(
        num_attention_heads=cfg.heads, attention_head_dim=cfg.dim // cfg.heads, in_channels=cfg.in_channels,
        out_channels=cfg.out_channels, text_dim=cfg.text_dim, freq_dim=cfg.freq_dim, ffn_dim=cfg.ffn_dim,
        num_layers=cfg.num_layers, image_dim=cfg.image_dim or None, added_kv_proj_dim=cfg.dim if cfg.image_dim else None,
        pos_embed_seq_len=cfg.image_positions or None).eval()


def ask_peer(peer, cfg, x, t, text, first_frame=None, image=None):
    x = x if first_frame is None else torch.cat([x, first_frame], dim=1)
    text = F.pad(text, (0, 0, 0, cfg.text_length - text.shape[1]))
    if cfg.image_positions:
        image = image.unflatten(1, (2, -1)).flatten(0, 1)
    return peer(x, t, text, image).sample


# t per sample, and per token (3 frames of 2 x 3)
@pytest.mark.parametrize("cfg, tokens", [(T2V, 0), (T2V, 18), (I2V, 0), (FLF2V, 0), (A14B, 0)],
                         ids=["t2v", "ti2v", "i2v", "flf2v", "i2v-a14b"])
def test_equals_diffusers_with_gradients(cfg, tokens):
    net, peer = filled(Wan(cfg)), peer_of(cfg)
    peer.load_state_dict({wan_diffusers_name(key): value for key, value in net.state_dict().items()})
    back = wan_state(peer.state_dict(), net, "peer")
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in net.state_dict().items())
    (x, t, text), cond = given(cfg)
    if tokens:
        t = torch.rand(2, tokens) * 1000
    outs, grads = [], []
    for call, module in ((net, net), (lambda *args, **kw: ask_peer(peer, cfg, *args, **kw), peer)):
        leaf = x.clone().requires_grad_()
        out = call(leaf, t, text, **cond)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        outs.append(out)
        grads.append({k: p.grad for k, p in module.named_parameters()} | {"x": leaf.grad})
    close(*outs)
    for key in grads[0]:
        close(grads[0][key], grads[1][wan_diffusers_name(key)], 1e-4)


def test_timesteps_per_sample_frame_and_token_agree():
    net = filled(Wan(T2V))
    (x, t, text), _ = given(T2V)
    frames = torch.tensor([[0.0, 300.0, 300.0], [0.0, 900.0, 900.0]])
    with torch.no_grad():
        close(net(x, t, text), net(x, t[:, None].expand(-1, 3), text), 1e-6)
        out = net(x, frames, text)
        close(out, net(x, frames.repeat_interleave(6, 1), text), 1e-6)
        assert oracles.error(out, net(x, frames[:, 1], text)) > 1e-2
    with pytest.raises(AssertionError, match="one per latent frame"):
        net(x, torch.zeros(2, 5), text)


def test_conditions_must_fit():
    (x, t, text), cond = given(I2V)
    for cfg, wrong in ((T2V, {"first_frame": cond["first_frame"]}), (I2V, {"image": cond["image"]}),
                       (I2V, {"first_frame": cond["first_frame"]}), (T2V, {"image": cond["image"]})):
        with pytest.raises(AssertionError):
            Wan(cfg)(x, t, text, **wrong)
    with pytest.raises(AssertionError, match="multiples of 2"):
        Wan(T2V)(x[..., :5], t, text)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("cfg", [T2V, I2V, dataclasses.replace(T2V, dim=256, ffn_dim=272)], ids=["t2v", "i2v", "wide"])
def test_gradients_are_the_same_with_recomputation(cfg, lora):
    """Wide: from 256 channels on, layers are recomputed in any case."""
    net = filled(Wan(cfg))
    if lora:
        add_lora(net, 4, 4.0, LAYERS)
        for name, p in net.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(p, std=0.1)
    args, cond = given(cfg)
    grads = []
    for net.grad_ckpt in (False, True):
        net.zero_grad()
        net(*args, **cond).square().sum().backward()
        grads.append({k: p.grad for k, p in net.named_parameters() if p.requires_grad})
    assert grads[0] and all(torch.equal(g, grads[1][k]) for k, g in grads[0].items())
    assert all(g.any() for k, g in grads[0].items())


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    net = filled(Wan(I2V))
    args, cond = given(I2V)
    with torch.no_grad():
        exact = net(*args, **cond)
        if not autocast:
            net.bfloat16()
        seen = []
        net.blocks[1].register_forward_hook(lambda module, given, out: seen.append(out))
        net.time_projection.register_forward_hook(lambda module, given, out: seen.append(out))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = net(*args, **cond)
    # the residual stream, the modulation and the prediction are float32
    assert [y.dtype for y in (*seen, out)] == [torch.float32] * 3 and out.isfinite().all()
    assert 0 < oracles.error(out, exact) < 0.03
    if autocast:  # the time embedding is exact
        emb = filled(Wan(I2V)).time_projection(net.time_embedding(torch.zeros(1, 1, 32)))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(net.time_projection(net.time_embedding(torch.zeros(1, 1, 32))), emb)


def test_starts_as_published():
    net = Wan(T2V)
    args, cond = given(T2V)
    assert not net(*args).any()  # the last layer is zero
    for layer in (net.text_embedding[0], net.time_embedding[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15) and not layer.bias.any()
    bound = (6 / (48 + 80)) ** 0.5
    assert net.blocks[0].ffn[0].weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    assert net.patch_embedding.weight.abs().max().item() <= (6 / (48 + 16)) ** 0.5
    assert net.blocks[1].modulation.std().item() == pytest.approx(48 ** -0.5, rel=0.2)
    assert net.units() == list(net.blocks)


# ---- weight files

def on_meta(cfg):
    with torch.device("meta"):
        return Wan(cfg)


def load(cfg, path):
    """The path of a base's network file through weights.py, as load_base() takes it."""
    net = on_meta(cfg)
    state = weights.below(weights.load_weights(path), *weights.PARTS["net"])
    weights.load_strict(net, wan_state(state, net, "wan net"), "wan net")
    return net


@pytest.mark.parametrize("name", ["original", "diffusers", "comfyui", "comfyui whole"])
def test_files_of_every_naming(name, tmp_path):
    net = filled(Wan(I2V))
    state = {"original": lambda k: k, "diffusers": wan_diffusers_name,
             "comfyui": lambda k: f"model.diffusion_model.{k}", "comfyui whole": lambda k: f"model.diffusion_model.{k}"}[name]
    file = {state(k): v for k, v in net.state_dict().items()}
    if name == "diffusers":  # is in the files of its I2V
        file["blocks.0.attn2.norm_added_q.weight"] = torch.ones(48)
    if name == "comfyui whole":
        file["first_stage_model.conv1.weight"] = torch.ones(2, 2)
    save_file(file, tmp_path / "a.safetensors")
    ours = load(I2V, tmp_path / "a.safetensors").state_dict()
    assert all(torch.equal(ours[key], value) for key, value in net.state_dict().items())


def test_files_in_fp8(tmp_path, message):
    net, file, want = filled(Wan(T2V)), {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, {}
    for key, value in net.state_dict().items():
        file[key] = want[key] = value
        if ".self_attn." in key and value.ndim == 2:
            layer = key.removesuffix(".weight")
            per_row = layer.endswith(".q")  # one scale, or one per row
            scale = value.abs().amax(1) / 448 if per_row else value.abs().max() / 448
            file[key] = (value / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
            file[f"{layer}.scale_weight"] = scale
            file[f"{layer}.scale_input"] = torch.tensor(1.0)
    save_file(file, tmp_path / "scaled.safetensors")
    ours = load(T2V, tmp_path / "scaled.safetensors").state_dict()
    for key, value in want.items():
        packed = file[key].dtype == torch.float8_e4m3fn
        assert ours[key].dtype == (torch.bfloat16 if packed else torch.float32)
        # e4m3 has 3 bits behind the comma
        assert torch.allclose(ours[key].float(), value, rtol=0.07, atol=1e-3) if packed else torch.equal(ours[key], value)
    file["blocks.0.self_attn.q.scale_weight"] = torch.ones(5)
    save_file(file, tmp_path / "wrong.safetensors")
    assert "bf16 or fp16" in message(load, T2V, tmp_path / "wrong.safetensors")


def test_wrong_files_are_refused_by_name(message, tmp_path):
    def said(cfg, state):
        net = on_meta(cfg)
        return message(lambda: weights.load_strict(net, wan_state(state, net, "t2v net"), "t2v net"))
    full = WanConfig(dim=5120, ffn_dim=13824, heads=40, num_layers=1)
    i2v = dataclasses.replace(full, in_channels=36, image_dim=1280)
    expert = dataclasses.replace(full, in_channels=36)
    flf2v = dataclasses.replace(i2v, image_positions=514)
    names = {"Wan2.1-I2V-14B": i2v, "Wan2.2-I2V-A14B": expert, "Wan2.1-FLF2V-14B": flf2v, "Wan2.2-T2V-A14B": full}
    for name, cfg in names.items():
        for naming in (str, wan_diffusers_name):
            state = {naming(key): value for key, value in on_meta(cfg).state_dict().items()}
            text = said(WanConfig(num_layers=1), state)
            assert name in text and "this network is Wan2.1-T2V-1.3B" in text and "--base" in text
    assert "width 48 and 12 channels, with an image branch (CLIP)" in said(T2V, on_meta(I2V).state_dict())
    whole = Wan(T2V).state_dict()
    assert "it looks like Wan's VACE" in said(T2V, whole | {"vace_blocks.0.modulation": torch.ones(1)})
    assert "it looks like CogVideoX" in said(T2V, CogVideoX(CogVideoXConfig(num_layers=1, heads=1)).state_dict())
    short = {k: v for k, v in whole.items() if not k.startswith("blocks.1.")}
    assert "it looks like Wan" in said(T2V, short)
    renamed = {wan_diffusers_name(k): v for k, v in short.items()}
    assert "it looks like Wan in diffusers layout" in said(T2V, renamed)
    mixed = {wan_diffusers_name(k) if "ffn" in k else k: v for k, v in whole.items()}
    assert "first blocks.0.ffn.0.weight" in said(T2V, mixed)


# ---- LoRA files

def adapted(cfg=T2V, rank=3, alpha=6.0):
    """A Wan with LoRA branches that do something -> it, {layer: (A, B)}."""
    net = filled(Wan(cfg))
    layers = add_lora(net, rank, alpha, LAYERS)
    for name in layers:
        torch.nn.init.normal_(net.get_submodule(name).lora_B.weight, std=0.1)
    return net, {n: [net.get_submodule(n).get_submodule(f"lora_{side}").weight.data for side in "AB"] for n in layers}


def lora_file(form, pairs, scale):
    """{key: tensor} of a public LoRA file; scale: alpha / rank."""
    state, sides = {}, ("lora_A", "lora_B")
    head, end, name_of = {
        "diffusers": ("transformer.", "weight", lambda n: wan_diffusers_name(f"{n}.").removesuffix(".")),
        "peft": ("diffusion_model.", "weight", str), "comfyui": ("diffusion_model.", "weight", str),
        "musubi": ("lora_unet_", "weight", lambda n: n.replace(".", "_")), "diffsynth": ("", "default.weight", str)}[form]
    alpha = form in ("comfyui", "musubi")
    if alpha:
        sides = "lora_down", "lora_up"
    for layer, (down, up) in pairs.items():
        up = up if alpha else scale * up
        state |= {f"{head}{name_of(layer)}.{side}.{end}": w.clone() for side, w in zip(sides, (down, up))}
        if alpha:
            state[f"{head}{name_of(layer)}.alpha"] = torch.tensor(scale * len(down))
    return state


def merged(state, path, cfg=T2V, strength=1.0):
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    net = filled(Wan(cfg))
    merge_public_lora(net, path, strength)
    return net


FORMS = "diffusers", "peft", "comfyui", "musubi", "diffsynth"


@pytest.mark.parametrize("form", FORMS)
def test_lora_of_every_program(form, tmp_path):
    net, pairs = adapted()
    args, _ = given(T2V)
    path = tmp_path / "a.safetensors"
    with torch.no_grad():
        plain, out = filled(Wan(T2V))(*args), net(*args)
        assert oracles.error(out, plain) > 1e-2
        close(merged(lora_file(form, pairs, 2.0), path)(*args), out)
    # and as a start of training
    fresh = filled(Wan(T2V))
    state, rank, alpha, targets = read_peft_lora(fresh, path)
    assert rank == 3
    add_lora(fresh, rank, alpha, targets)
    fresh.load_state_dict(state, strict=False)
    with torch.no_grad():
        close(fresh(*args), out)


def test_lora_with_differences(tmp_path, message):
    """.diff_b is added to a bias, .diff to a norm's weight, both times the strength."""
    _, pairs = adapted()
    state, path = lora_file("comfyui", pairs, 2.0), tmp_path / "a.safetensors"
    bias, norm = torch.randn(48), torch.randn(48)
    more = {"diffusion_model.blocks.0.self_attn.q.diff_b": bias, "diffusion_model.blocks.1.norm3.diff": norm}
    ours, plain = merged(state | more, path, strength=0.5), merged(state, path, strength=0.5)
    changed = {"blocks.0.self_attn.q.bias": 0.5 * bias, "blocks.1.norm3.weight": 0.5 * norm}
    for key, value in ours.state_dict().items():
        assert torch.allclose(value, plain.state_dict()[key] + changed.get(key, 0))
    save_file(state | more, path)
    assert "blocks.0.self_attn.q.bias" in message(read_peft_lora, filled(Wan(T2V)), path)
    save_file(state | {k: 0 * v for k, v in more.items()}, path)
    assert read_peft_lora(filled(Wan(T2V)), path)[1] == 3  # zeros change nothing
    for wrong in ({"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(5)},
                  {"diffusion_model.blocks.0.norm3.diff": torch.full((48,), torch.nan)},
                  {"diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.ones(48)}):
        save_file(state | wrong, path)
        assert "do not fit" in message(merge_public_lora, filled(Wan(T2V)), path)
    save_file(state | {"diffusion_model.blocks.0.diff_m": torch.ones(48)}, path)
    assert "other kinds" in message(merge_public_lora, filled(Wan(T2V)), path)


def test_lora_of_another_variant(tmp_path, message):
    """A T2V LoRA goes on I2V, whose image keys stay as they are; the other way round it does not."""
    _, pairs = adapted()
    i2v = merged(lora_file("musubi", pairs, 2.0), tmp_path / "t2v.safetensors", I2V)
    same = "blocks.0.cross_attn.k_img.weight"
    assert torch.equal(i2v.state_dict()[same], filled(Wan(I2V)).state_dict()[same])
    net = filled(Wan(I2V))
    add_lora(net, 2, 2.0, ["k_img"])
    pairs = {"blocks.0.cross_attn.k_img": [torch.randn(2, 48), torch.randn(48, 2)]}
    save_file(lora_file("peft", pairs, 1.0), tmp_path / "i2v.safetensors")
    text = message(merge_public_lora, filled(Wan(T2V)), tmp_path / "i2v.safetensors")
    assert "blocks.0.cross_attn.k_img belongs to no layer" in text


def test_names_of_layers_are_unique():
    net = on_meta(FLF2V)
    layers = public_layers(net)
    ours = {n for n, m in net.named_modules() if hasattr(m, "weight")}
    assert set(layers.values()) == ours and len({n.replace(".", "_") for n in ours}) == len(ours)
    assert layers["blocks.0.norm2"] == "blocks.0.norm3" and layers["blocks.1.attn2.add_k_proj"].endswith("k_img")


@pytest.fixture
def run(tmp_path):
    """The folder of a run with a LoRA, and its network. -> its net"""
    net, _ = adapted()
    tensors = {k: v.clone() for k, v in net.state_dict().items() if ".lora_" in k}
    meta = dict(method="t2v", base="wan2.1-t2v-1.3b", step=1, sample={}, rank=3, alpha=6.0, lora_targets=list(LAYERS))
    (tmp_path / "run").mkdir()
    save_file(tensors, tmp_path / "run" / "ckpt.safetensors", {"nanovideo": json.dumps(meta)})
    return net


@pytest.mark.parametrize("form", bases.FORMATS[:4])
def test_exports_come_back(form, run, tmp_path):
    """Here, and in diffusers or (original) in peft."""
    bases.main(["--export", form, str(tmp_path / "run"), str(tmp_path / form)])
    file = next((tmp_path / form).glob("*.safetensors"))
    net, (args, _) = filled(Wan(T2V)), given(T2V)
    merge_public_lora(net, file)
    peer = peer_of(T2V)
    peer.load_state_dict({wan_diffusers_name(k): v for k, v in filled(Wan(T2V)).state_dict().items()})
    with torch.no_grad():
        out = run(*args)
        close(net(*args), out)
        if form == "original":
            peft = pytest.importorskip("peft")
            theirs = peft.PeftModel.from_pretrained(filled(Wan(T2V)), str(tmp_path / form)).eval()
            return close(theirs(*args), out)
        diffusers = pytest.importorskip("diffusers")
        pipe = diffusers.WanPipeline(None, None, None, diffusers.UniPCMultistepScheduler(), transformer=peer)
        pipe.load_lora_weights(str(tmp_path / form), weight_name=file.name)
        close(ask_peer(peer, T2V, *args), out)


# ---- encoders

UMT5 = T5Config(umt5=True, mask=True, length=9, vocab_size=60, width=32, heads=4, head_dim=8, hidden=48, layers=2)


def test_umt5_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = filled(transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")))
    peer.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 7, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0], [5, 7, 8, 9, 10, 11, 12, 13, 1]])
    with torch.no_grad():
        want = peer(ids, attention_mask=ids.ne(0)).last_hidden_state * ids.ne(0)[..., None]
    state = weights.load_weights(tmp_path / "model.safetensors")
    own = {umt5_name(k): v for k, v in state.items() if k != "encoder.embed_tokens.weight"}
    embedded = {k: v for k, v in state.items() if k != "shared.weight"} | {
        "encoder.embed_tokens.weight": state["shared.weight"], "spiece_model": torch.zeros(3, dtype=torch.uint8)}
    for file in (state, own, embedded):  # transformers', the original, ComfyUI's with the tokenizer inside
        with torch.device("meta"):
            net = T5Text(UMT5)
        weights.load_strict(net, t5_state(file, net, "text"), "text")
        with torch.no_grad():
            close(net(ids), want)
        assert not net(ids)[0, 3:].any()


def test_a_t5_is_no_umt5(message):
    """T5 has one table of positions, UMT5 one per layer."""
    t5 = T5Text(dataclasses.replace(UMT5, umt5=False)).state_dict()
    umt5 = T5Text(UMT5)
    assert "relative_attention_bias" in message(weights.load_strict, umt5, t5_state(t5, umt5, "text"), "text")
    assert weights.looks_like({umt5_name(k): 0 for k in umt5.state_dict()}) == "it looks like a UMT5 encoder"


def test_tokenizers_of_both_files_agree(tmp_path, message):
    spm = pytest.importorskip("sentencepiece")
    tokenizers = pytest.importorskip("tokenizers")
    pieces = spm.SentencePieceProcessor(model_file=str(hub.spiece_model(tmp_path / "spiece.model")))
    model = tokenizers.models.Unigram([(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))], 2)
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fast.decoder = tokenizers.decoders.Metaspace()
    fast.save(str(tmp_path / "tokenizer.json"))
    texts = ["  a red\n ball ", "two &amp;amp; squares", "", "blue squares " * 9]
    ids = [t5_tokenizer(tmp_path / name, 9, clean_text)(texts) for name in ("spiece.model", "tokenizer.json")]
    assert torch.equal(*ids) and ids[0][3, -1] == 1 and ids[0][2].tolist() == [1] + [0] * 8
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in message(t5_tokenizer, tmp_path / "tokenizer.json", 9)


def test_image_tower_in_every_naming():
    """The tokens before the last block; transformers calls them hidden_states[-2]."""
    transformers = pytest.importorskip("transformers")
    peer = filled(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, projection_dim=16, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=7, hidden_act="gelu")))
    cfg = CLIPConfig(embed_dim=0, image_size=28, vision_layers=2, vision_width=32, vision_head_width=16, patch_size=7)
    whole = OpenCLIPVision(dataclasses.replace(cfg, embed_dim=16, vision_layers=3))
    whole.load_state_dict(image_state(peer.state_dict(), whole, "peer"))
    open_clip = {f"visual.{k}": v for k, v in whole.state_dict().items()} | {"logit_scale": torch.ones(())}
    wan = {f"visual.{wan_clip_name(k)}": v for k, v in whole.state_dict().items()}
    wan["visual.cls_embedding"] = wan["visual.cls_embedding"][None, None]
    wan["visual.pos_embedding"] = wan["visual.pos_embedding"][None]
    wan["textual.token_embedding.weight"] = torch.ones(3, 3)
    images = data.clip_square(torch.rand(2, 3, 20, 34) * 2 - 1, 28)
    with torch.no_grad():
        want = peer(images, output_hidden_states=True).hidden_states[-2]
    for file in (peer.state_dict(), open_clip, wan):
        with torch.device("meta"):
            net = OpenCLIPVision(cfg)
        weights.load_strict(net, image_state(file, net, "image"), "image")
        with torch.no_grad():
            close(net.tokens(images), want)
    assert weights.looks_like(wan) == "it looks like Wan's CLIP"


def test_full_size_image_tower():
    with torch.device("meta"):
        net = OpenCLIPVision(WAN_CLIP)
    assert len(net.transformer.resblocks) == 31 and net.positional_embedding.shape == (257, 1280)
    file = json.loads(gzip.decompress(
        (MANIFESTS / "wan_clip" / "clip_xlm_roberta_vit_h_14.manifest.json.gz").read_bytes()))["keys"]
    state = {key: torch.empty(shape, device="meta") for key, shape in file.items()}
    weights.load_strict(net, image_state(state, net, "image"), "image")  # none missing
