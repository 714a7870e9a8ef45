"""Every public base at small width: its files as the hubs hold them, with random weights. No tests here.

    row = hub.small(monkeypatch, "videocrafter2")    # bases.BASES has the small row from here on
    parts = hub.publish(tmp_path, "videocrafter2")   # the folder for --weights
    base = load_base("videocrafter2", tmp_path)      # holds the tensors of `parts`
"""
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bases
from models import (
    UNet3D,
    UNetConfig,
    add_lora,
    instructvideo_lora_name,
    turbo_lora_layers,
    unet_diffusers_name,
    videocrafter_name,
)
from text_encoders import CLIPConfig, OpenCLIP, OpenCLIPText
from vae import AutoencoderKL, VAEConfig, vae_diffusers_name

PUBLIC = [name for name, row in bases.BASES.items() if row.files and isinstance(row.net, UNetConfig)]
CLIP = CLIPConfig(
    embed_dim=32, vision_layers=1, vision_width=32, vision_head_width=16, patch_size=56, text_width=32,
    text_heads=2, text_layers=3)
# the schedule's buffers in VideoCrafter's whole-model file
BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "scale_arr")


def small(monkeypatch, name):
    """Put a small network, autoencoder and towers in the place of a base's own, for this test. -> its row"""
    row = bases.BASES[name]
    net = replace(row.net, dim=32, dim_mult=(1, 2), num_res_blocks=1, head_dim=16,
                  context_dim=32, adapter_image_dim=32 if row.net.adapter_image_dim else 0)
    size = dict(frames=32, height=8, width=8) if net.text_resampler else dict(frames=3, height=16, width=24)
    sample = replace(row.sample, **size, sample_steps=3 if row.sample.sampler == "lcm" else 2)
    vae = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)
    row = replace(row, net=net, vae=vae, text=CLIP, sample=sample)
    monkeypatch.setitem(bases.BASES, name, row)
    return row


def on_meta(build, *args):
    with torch.device("meta"):
        return build(*args)


def random_state(module, seed):
    """A state dict of random weights, none of them zero, of a size that lets signals through."""
    g, state = torch.Generator().manual_seed(seed), {}
    for name, p in module.named_parameters():
        value = torch.randn(p.shape, generator=g).mul_(p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
        state[name] = value.add_(1) if p.ndim == 1 and name.endswith("weight") else value
    return state


def public_parts(row):
    """{part: state dict} under the original names, whole: both towers, all layers."""
    kinds = {"net": (UNet3D, row.net), "vae": (AutoencoderKL, row.vae), "clip": (OpenCLIP, row.text)}
    if row.net.motion_blocks:
        kinds["motion_text"] = OpenCLIPText, row.text
    return {part: random_state(on_meta(*kind), seed) for seed, (part, kind) in enumerate(kinds.items())}


def text_part(state):
    """What load_base keeps of a text tower: all but the last block, the projection and the temperature."""
    last = f"transformer.resblocks.{CLIP.text_layers - 1}."
    return {k: v for k, v in state.items()
            if not k.startswith(("visual.", last)) and k not in ("text_projection", "logit_scale")}


def image_part(state):
    return {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}


def spiece_model(path):
    """A small tokenizer of sentencepiece's, as T5's spiece.model -> `path`."""
    spm = pytest.importorskip("sentencepiece")
    words = ["a red ball moves to the left", "two blue squares", "The green ball, then the red one"] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(path.with_suffix("")), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    return path


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def videocrafter(parts):
    """VideoCrafter's model.ckpt."""
    state = {name: torch.rand(1400 if name == "scale_arr" else 1000) for name in BUFFERS}
    state |= prefixed("model.diffusion_model.", {videocrafter_name(k): v for k, v in parts["net"].items()})
    state |= prefixed("first_stage_model.", parts["vae"])
    text = {k: v for k, v in parts["clip"].items() if not k.startswith("visual.")}
    return {"state_dict": state | prefixed("cond_stage_model.model.", text)}


def turbo_lora(row, rank=5, seed=7):
    """T2V-Turbo's list for a network -> [B_0, A_0, ...]."""
    net, g, tensors = on_meta(UNet3D, row.net), torch.Generator().manual_seed(seed), []
    modules = dict(net.named_modules())
    for name in turbo_lora_layers(net):
        shape = modules[name].weight.shape
        r = min(rank, *shape[:2])
        ones = [1] * (len(shape) - 2)
        tensors += [0.1 * torch.randn(shape[0], r, *ones, generator=g),
                    0.1 * torch.randn(r, *shape[1:], generator=g)]
    return tensors


def instructvideo(net_state, row, rank=4):
    """InstructVideo's file: base and LoRA together -> (file, {key: merged tensor})."""
    net = on_meta(UNet3D, row.net)
    names = add_lora(net, rank, rank, ["to_q", "to_k", "to_v", "to_out.0"])
    lora = {k: 0.2 * torch.randn(v.shape) for k, v in net.state_dict().items() if ".lora_" in k}
    merged = {f"{k}.weight": net_state[f"{k}.weight"] +
              lora[f"{k}.lora_B.weight"] @ lora[f"{k}.lora_A.weight"] for k in names}
    file = net_state | {instructvideo_lora_name(k): v for k, v in lora.items()}
    return {"state_dict": file, "optimizer": {}, "scaler": {}, "step": 620000}, net_state | merged


def content(parts, which, row):
    """What one public file holds; which: the parts that the table takes from it."""
    if set(which) > {"vae"}:
        return videocrafter(parts)
    part, step = which[0], {"step": 632000}
    if part == "motion_text":
        return parts[part]
    if part in ("text", "image"):
        return parts["clip"]
    if part == "vae":  # whole Stable Diffusion, of which only this is wanted
        other = {"model.diffusion_model.input_blocks.0.0.bias": torch.zeros(1)}
        return {"state_dict": prefixed("first_stage_model.", parts["vae"]) | other, "global_step": 1}
    net = {k: v for k, v in parts["net"].items() if "_adapter." not in k}
    if row.net.motion_blocks:
        return {"unet_state_dict": net} | step
    if row.net.temporal_linear:
        return {videocrafter_name(k): v for k, v in net.items()}
    return {"state_dict": net} | step


def publish(folder, name, repo_folders=False):
    """Write the original files of a small base. -> {part of load_base: the tensors that it must hold}"""
    row, folder = bases.BASES[name], Path(folder)
    parts, by_url = public_parts(row), {}
    for part, url in row.files["original"].items():
        by_url.setdefault(url, []).append(part)
    expected = {"net": dict(parts["net"]), "vae": parts["vae"], "text": text_part(parts["clip"])}
    for url, which in by_url.items():
        _, repo, file = url.split(":", 2)
        path = folder / (repo.split("/")[-1] if repo_folders else "") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if which == ["lora"]:
            tensors = turbo_lora(row)
            torch.save(tensors, path)
            expected["net"]["time_cond_proj.weight"] = torch.zeros_like(parts["net"]["time_cond_proj.weight"])
            expected["net"] = with_turbo(expected["net"], tensors, row)
            continue
        held = content(parts, which, row)
        if name == "t2v-turbo":  # VideoCrafter2's file, which lacks this layer
            del held["state_dict"]["model.diffusion_model.time_cond_proj.weight"]
        torch.save(held, path)
    if "image" in row.files["original"]:
        expected["image"] = image_part(parts["clip"])
    if "motion_text" in parts:
        expected["motion_text"] = text_part(parts["motion_text"])
    return expected


def with_turbo(state, tensors, row, scale=1.0):
    """Weights plus scale B A of T2V-Turbo's list."""
    layers, state = turbo_lora_layers(on_meta(UNet3D, row.net)), dict(state)
    assert len(tensors) == 2 * len(layers)
    for name, up, down in zip(layers, tensors[::2], tensors[1::2]):
        weight = state[f"{name}.weight"]
        delta = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
        state[f"{name}.weight"] = weight + scale * delta.view(weight.shape)
    return state


def adapters(state, kind):
    """DreamVideo's file of the subject's ("spatial") or the motion's ("temporal") adapters of a network."""
    spatial = [k for k in state if "cross_attn_adapter" in k and "condition" not in k and
               k.replace("cross_attn_adapter", "attn_adapter") not in state]
    keys = spatial if kind == "spatial" else [k for k in state if "_adapter." in k and k not in spatial]
    return {"state_dict": {k: torch.nn.Parameter(state[k].clone()) for k in keys}, "step": 500}


# ---- the diffusers layout, written by diffusers and transformers themselves

def publish_diffusers(folder, name):
    """As publish(), in diffusers layout; the network in shards."""
    import diffusers
    import transformers
    row, folder = bases.BASES[name], Path(folder)
    parts = public_parts(row)
    width, blocks = row.net.context_dim, row.net.num_res_blocks
    unet = diffusers.I2VGenXLUNet if row.net.image_to_video else diffusers.UNet3DConditionModel
    peer = unet(
        block_out_channels=(32, 64), layers_per_block=blocks, attention_head_dim=row.net.head_dim,
        cross_attention_dim=width, down_block_types=("CrossAttnDownBlock3D",) * 2,
        up_block_types=("CrossAttnUpBlock3D",) * 2)
    peer.load_state_dict(to_diffusers(parts["net"], peer, blocks))
    peer.save_pretrained(folder / "unet", max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1

    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    theirs = vae.state_dict()
    vae.load_state_dict({n: v.reshape(theirs[n].shape)
                         for n, v in ((vae_diffusers_name(k, 2), v) for k, v in parts["vae"].items())})
    vae.save_pretrained(folder / "vae")

    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=CLIP.vocab_size, hidden_size=32, intermediate_size=128, num_attention_heads=2,
        # ModelScope's has one layer less, I2VGen-XL's all
        num_hidden_layers=CLIP.text_layers - (not row.net.image_to_video), hidden_act="gelu"))
    text.load_state_dict(random_state(text, 5))
    text.save_pretrained(folder / "text_encoder")
    expected = {"net": parts["net"], "vae": parts["vae"]}
    if row.net.image_to_video:
        vision = vision_peer()
        vision.load_state_dict(random_state(vision, 6))
        vision.save_pretrained(folder / "image_encoder")
    return expected


def vision_peer():
    import transformers
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, projection_dim=CLIP.embed_dim, num_hidden_layers=1,
        num_attention_heads=2, image_size=CLIP.image_size, patch_size=CLIP.patch_size, hidden_act="gelu"))


def to_diffusers(state, peer, num_res_blocks):
    """Our UNet's tensors under diffusers' keys, in the peer's shapes (q, k, v of I2VGen-XL apart)."""
    shapes, theirs = peer.state_dict(), {}
    for key, value in state.items():
        name = unet_diffusers_name(key, num_res_blocks)
        if name.endswith("attn1.to_qkv.weight"):
            theirs |= {name.replace("qkv", c): rows for c, rows in zip("qkv", value.chunk(3))}
        else:
            theirs[name] = value.reshape(shapes[name].shape)
    return theirs


