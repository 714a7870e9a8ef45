"""Compare our code with numbers of the original code:  python tests/oracles.py PATH... [-v]

PATH is a case (a .json beside its .safetensors) or a folder of them. One line per case,
`system/case  max-relative-error  ok|FAIL|unsupported|empty`, then remarks. A case that compared nothing is
"empty", not ok. Exit status 1 if a case is FAIL or unsupported.

Outputs graded `required` decide. `as_published` ones (quirks of the original that we drop) are listed as
skipped where ours differs or has no counterpart. `debug` ones help to find a fault: -v compares those it can.
Cases run by kind, system and fields alone, through the functions that sample.py and the method files call.
"""
import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import traceback
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# MKL rounds exp() differently on each kind of processor: one unit in the last place of a frequency, times
# step 999, is 3e-5. This branch is the same on all of them, and the one that the cases were computed with.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bases
import common
import das
import data
import demo
import diffusion
import dit
import dreamvideo
import grpo
import instructvideo
import metrics
import models
import omniscore
import pipeline
import rewards
import text_encoders
import tracks
import vae
import videodpo
import videolcm
import weights


class Unsupported(Exception):
    """The case asks for something that this project does not have (yet)."""


# ---- the format: cases, inputs, deterministic weights

class Case:
    """One case file. The json's fields are attributes: system, kind, config, call, inputs, outputs ..."""

    def __init__(self, path):
        self.path = Path(path)
        self.config, self.call, self.inputs, self.outputs, self.params = {}, {}, {}, {}, {}
        self.left_as_built = []
        self.noise = {}  # output name: size below which it is rounding error alone, where a kind can tell
        vars(self).update(json.loads(self.path.read_text()))
        if self.kind == "table":
            # every expected value of every row becomes one output, so that tables are graded like the rest
            whole = vars(self) | self.outputs.pop("rows", {})  # a grade for all rows
            for i, row in enumerate(self.rows):
                graded = {name: row.get(name, whole.get(name)) for name in ("check", "tol")}
                for name, value in row["expected"].items():
                    self.outputs[f"{i}.{name}"] = {"value": value, **graded}

    def tensor(self, name):
        with safe_open(self.path.with_suffix(".safetensors"), "pt") as f:
            return f.get_tensor(name)

    def input(self, name):
        """The named input as a tensor (texts and other literals as they are), None where there is none."""
        spec = self.inputs.get(name)
        if spec is None:
            return None
        if "tensor" in spec:
            return self.tensor(spec["tensor"])
        if "weight_rule" in spec:
            return fill_tensor(spec["weight_rule"]["name"], spec["weight_rule"]["shape"])
        if "value" in spec:
            value = spec["value"]
            first = value
            while isinstance(first, list) and first:
                first = first[0]
            numbers = isinstance(value, list) and isinstance(first, (int, float))
            return torch.tensor(value) if numbers else value
        rule = spec["rule"]
        known = {"case", "name", "shape", "post", "scale"}
        if unknown := set(rule) - known or rule.get("post", "tanh") != "tanh":
            raise Unsupported(f"input rule {unknown}")
        x = normal(f"input:{rule.get('case', self.path.stem)}:{rule.get('name', name)}", rule["shape"])
        x = x * rule.get("scale", 1.0)
        return torch.tanh(x) if "post" in rule else x

    def expected(self, name):
        if "value" in self.outputs[name]:
            return self.outputs[name]["value"]
        with safe_open(self.path.with_suffix(".safetensors"), "pt") as f:
            return f.get_tensor(name) if name in f.keys() else vars(self)[name]


def normal(key, shape):
    """float32 normal numbers that depend on the string alone."""
    random = np.random.RandomState(zlib.crc32(key.encode()) & 0xffffffff)
    return torch.from_numpy(np.asarray(random.standard_normal(shape))).float()


def fill_tensor(name, shape):
    """Rule crc32-normal-v1 for the parameter of that name."""
    random = np.random.RandomState(zlib.crc32(name.encode()) & 0xffffffff)
    w = random.standard_normal(tuple(shape))
    if len(shape) >= 2:
        w = w / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        w = 1 + 0.1 * w
    else:
        w = 0.1 * w
    return torch.from_numpy(w).float()


PLAIN = [{"prefix": "", "coef": 1.0}]


def fill(net, params, left_as_built=(), public=lambda name: name, terms=lambda name: PLAIN):
    """Give `net` the case's weights; its keys and shapes must be those of `params`. -> net in eval mode.

    public(our key) -> the published key, after whose name a tensor is filled; terms(published key): the
    tensor is their sum of coef times the rule for prefix + key.
    """
    ours = {public(name): list(value.shape) for name, value in net.state_dict().items()}
    if ours != params:
        wrong = [f"{k} {ours.get(k, 'missing')} instead of {params.get(k, 'none')}"
                 for k in ours | params if ours.get(k) != params.get(k)]
        raise ValueError(f"{len(wrong)} parameters differ: {', '.join(wrong[:3])}")
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.ndim and value.is_floating_point() and public(name) not in left_as_built:
                value.copy_(sum(term["coef"] * fill_tensor(term["prefix"] + public(name), value.shape)
                                for term in terms(public(name))))
    return net.eval()


def part(value, spec):
    """The piece of a quantity that an output stores: `slice` has [start, stop] or an integer per axis."""
    index = tuple(slice(*s) if isinstance(s, list) else s for s in spec.get("slice", []))
    return value[index] if index else value


def statistics(x, columns):
    """One row of a table of statistics, in float64."""
    x = x.detach().double().flatten()
    functions = {"mean": x.mean, "std": x.std, "absmax": lambda: x.abs().max(), "first": lambda: x[0],
                 "last": lambda: x[-1], "l2": x.norm, "sum": x.sum}
    return torch.stack([functions[c]() for c in columns])


def gradient(grads, spec):
    """What a gradient output asks for, from {parameter or input: gradient}: a gradient, a table, or None."""
    if "rows" in spec:
        scales = spec.get("scale", 1.0)
        scales = scales if isinstance(scales, list) else [scales] * len(spec["rows"])
        rows = [scale * grads[row] for scale, row in zip(scales, spec["rows"])]
        return torch.stack([statistics(row, spec["columns"]) for row in rows])
    name = spec.get("wrt", spec.get("wrt_input"))
    return None if name is None else part(spec.get("scale", 1.0) * grads[name], spec)


# ---- from the original's arguments to ours

SCHEDULE_ARGUMENTS = {"num_timesteps": "num", "init_beta": "first", "last_beta": "last", "cosine_s": "s"}


def make_schedule(name, param, mean_type="eps"):
    """Our Schedule for a schedule and prediction type in VGen's words."""
    if name not in diffusion.SCHEDULES:
        raise Unsupported(f"noise schedule {name}")
    arguments = {SCHEDULE_ARGUMENTS.get(k, k): v for k, v in param.items() if k != "zero_terminal_snr"}
    if mean_type not in ("eps", "v", "x0"):
        raise Unsupported(f"prediction type {mean_type}")
    zero_snr = param.get("zero_terminal_snr", False)
    return diffusion.make_schedule(name, mean_type, zero_snr=zero_snr, **arguments)


def diffusion_schedule(config):
    return make_schedule(config["schedule"], config["schedule_param"], config["mean_type"])


UNET_FIELDS = {"in_dim", "out_dim", "dim", "dim_mult", "num_res_blocks", "attn_scales", "head_dim",
               "num_heads", "context_dim", "dropout", "use_fps_condition", "num_tokens", "concat_dim"}
COMPOSITIONS = {"depthmap": "depth", "mask": "masked"}  # VideoComposer's names for two of models.MAPS


def vgen_config(network, config):
    """Our UNetConfig for the arguments of a VGen network."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in UNET_FIELDS}
    if network in ("t2v", "t2v_lora"):
        pass
    elif network == "i2vgen":
        options |= dict(image_to_video=True, use_fps_condition=True)
    elif network == "sr600":
        options |= dict(super_resolution=True)
    elif network == "demo":
        options |= dict(motion_blocks=True)
    elif network == "higen_unet":
        options |= dict(text_resampler=config["context_embedding_depth"])
    elif network in ("tft2v_unet", "videolcm"):
        named = [COMPOSITIONS.get(c, c) for c in config["config"]["video_compositions"]]
        options |= dict(maps=tuple(c for c in named if c in models.MAPS), style_image="image" in named,
                        histogram="histogram" in named, concat_dim=config.get("concat_dim", 8),
                        map_encoder_depth=config.get("adapter_transformer_layers", 1))
    elif network == "dreamvideo":
        for kind, positions in (("spatial", ["", "parallel", ""]), ("temporal", ["parallel"] * 3)):
            positions = dict(zip(("self_attention", "cross_attention", "feedforward"),
                                 config.get(f"{kind}_adapter_position_list") or positions))
            layers = config.get(f"{kind}_adapter_list") or []
            if any(positions[layer] == "" for layer in layers):
                raise Unsupported("an adapter without a position (as published, its layer then vanishes)")
            options[f"{kind}_adapters"] = tuple((layer, positions[layer]) for layer in layers)
            options[f"{kind}_adapter_dim"] = config.get(f"{kind}_adapter_hidden_dim") or 0
        options["adapter_image_dim"] = config.get("temporal_adapter_condition_dim") or 0
    else:
        raise Unsupported(f"network {network}")
    if network not in ("tft2v_unet", "videolcm", "i2vgen"):
        options.pop("concat_dim", None)
    return models.UNetConfig(**options)


def vgen_unet(network, config, params, left_as_built):
    """The UNet3D of a VGen config, filled."""
    return fill(models.UNet3D(vgen_config(network, config)), params, left_as_built)


def videocrafter_config(config):
    """Our UNetConfig for the arguments of VideoCrafter's or T2V-Turbo's UNet."""
    return models.UNetConfig(
        in_dim=config["in_channels"], out_dim=config["out_channels"], dim=config["model_channels"],
        dim_mult=tuple(config["channel_mult"]), num_res_blocks=config["num_res_blocks"],
        attn_scales=tuple(1 / r for r in config["attention_resolutions"]),
        head_dim=config["num_head_channels"], context_dim=config["context_dim"], spatial_dropout=0.0,
        temporal_linear=True, temporal_conv=config["temporal_conv"],
        relative_position=config["temporal_length"] if config["use_relative_position"] else 0,
        image_keys=config.get("use_image_attention", False), use_fps_condition=config["fps_cond"],
        default_fps=16, guidance_dim=config.get("time_cond_proj_dim") or 0,
        motion_guidance_dim=config.get("motion_cond_proj_dim") or 0)


def vc2_unet(config, params, left_as_built):
    """The UNet3D of a VideoCrafter or T2V-Turbo config, filled under its published names."""
    net = models.UNet3D(videocrafter_config(config))
    return fill(net, params, left_as_built, models.videocrafter_name)


def vc2_arguments(case, arguments):
    """(x, t, text), conditions: a VideoCrafter call's arguments, {published name: input}, in our words."""
    given = {name: case.input(key) for name, key in arguments.items()}
    x, t, text = given.pop("x"), given.pop("timesteps"), given.pop("context")
    cond = {}
    if isinstance(given.get("fps"), int):
        given["fps"] = torch.full((len(x),), given["fps"])
    for theirs, ours in (("fps", "fps"), ("timestep_cond", "guidance"), ("motion_cond", "motion_guidance")):
        if given.get(theirs) is not None:
            cond[ours] = given[theirs]
    return (x, t, text), cond


def affine_sin(case):
    """The toy network net(x, t, text) and text(branch, b): a branch's (s, y) travel as tokens (b, 1, 2)."""
    if case.toy["name"] != "affine_sin":
        raise Unsupported(f"toy network {case.toy['name']}")
    d = case.toy.get("d", 0.0)

    def net(x, t, text):
        s, y = text[:, 0].view(-1, 2, *[1] * (x.ndim - 1)).unbind(1)  # each (b, 1, 1, ...)
        t = t.view(-1, *[1] * (x.ndim - 1))
        return s * (0.3 * x + 0.05 * torch.sin(t / 100)) + 0.1 * y * (1 + d * x)

    def text(branch, b):
        numbers = case.toy.get(branch, {})
        return torch.tensor([numbers.get("s", 1.0), numbers.get("y", 0.0)]).expand(b, 1, 2)

    return net, text


def toy_guided(case, b, guide_scale):
    """The toy behind the project's own guidance: fn(x, t)."""
    net, text = affine_sin(case)
    if guide_scale is None:
        return diffusion.guided(net, text("single", b), None, None)
    return diffusion.guided(net, text("cond", b), text("uncond", b), guide_scale)


# ---- the kinds: functions case -> {output name: value}; an output they leave out has no counterpart here

def unet_forward(case):
    """Networks of VGen and DEMO, one forward a case."""
    network = case.call["network"]
    net = vgen_unet(network, case.config, case.params, case.left_as_built)
    x, seen, maps = case.input("x"), {}, []
    cond = {"fps": case.input("fps"), "image": case.input("image"), "motion_text": case.input("temporal_y"),
            "eot": case.input("eot_idx"), "first_frame": case.input("local_image")}
    cond = {k: v for k, v in cond.items() if v is not None}
    if "first_frame" in cond and cond["first_frame"].ndim == 5:
        cond["first_frame"] = cond["first_frame"][:, :, 0]

    def watch(name):
        def hook(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            if isinstance(module, models.TemporalTransformer):  # stored as b c f h w, others (b f) c h w
                out = out.unflatten(0, (len(x), -1)).transpose(1, 2)
            seen[name] = out.detach().clone()
        return hook

    # debug outputs name submodules; those that our network does not have are left out
    wanted = {n for spec in case.outputs.values() for n in spec.get("rows", [spec.get("submodule")])}
    modules = dict(net.named_modules())
    handles = [modules[n].register_forward_hook(watch(n)) for n in wanted & set(modules)]
    with torch.no_grad():
        out = net(x, case.input("t"), case.input("y"), **cond)
    out, maps = out if isinstance(out, tuple) else (out, [])
    for handle in handles:
        handle.remove()

    result = {"out": out}
    for name, spec in case.outputs.items():
        if "block" in spec:
            result[name] = part(maps[spec["block"]], spec)
        elif "temporal_y_scale" in spec:  # debug: of another run
            continue
        elif "submodule" in spec and spec["submodule"] in seen:
            result[name] = part(seen[spec["submodule"]], spec)
        elif "rows" in spec and set(spec["rows"]) <= set(seen):
            result[name] = torch.stack([statistics(seen[row], spec["columns"]) for row in spec["rows"]])
        elif name == "out":
            result[name] = part(out, spec)
    return result


def motion_block(case):
    sizes = (case.config[k] for k in ("in_channels", "n_heads", "d_head", "context_dim"))
    block = models.MotionBlock(*sizes, linear=True)
    fill(block, case.params, case.left_as_built)
    x = case.input("x")
    c = models.Context(x.shape[2], None, None, motion_text=case.input("context"), eot=case.input("eot_idx"))
    with torch.no_grad():
        out, eot_map = block(x.transpose(1, 2).flatten(0, 1), c)
    return {"out": out.unflatten(0, (len(x), -1)).transpose(1, 2), "eot_map": eot_map}


def init_from_base(case):
    net = models.UNet3D(vgen_config(case.call["network"], case.config))
    source = {key: models.demo_source(key, net) for key in net.state_dict()}
    with torch.no_grad():
        net.load_state_dict({key: fill_tensor(old, case.base_params[old]) for key, old in source.items()})
        out = net.eval()(case.input("x"), case.input("t"), case.input("y"),
                         motion_text=case.input("temporal_y"))
    return {"out": out, "key_source": source}


def instructvideo_lora(case):
    public = models.instructvideo_lora_name
    base = {k: v for k, v in case.params.items() if "_lora." not in k}
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    rank = case.config["lora_rank"]

    def build():
        net = models.UNet3D(vgen_config(case.call["network"], case.config))
        models.add_lora(net, rank, case.config["lora_alpha"] or rank, targets)
        return fill(net, case.params, case.left_as_built, public)

    nets = {"lora": build(), "merged": build(), "base": vgen_unet("t2v", case.config, base, ())}
    models.merge_lora(nets["merged"])
    result = {}
    with torch.no_grad():
        for name, spec in case.outputs.items():
            if "weights" in spec:
                result[name] = part(nets[spec["weights"]](*map(case.input, ("x", "t", "y"))), spec)
            else:
                result[name] = part(nets["merged"].state_dict()[spec["key"]], spec)
    return result


def fourier(case):
    x = case.input("x")
    return {name: models.fourier_filter(x, spec["threshold"], spec["scale"])
            for name, spec in case.outputs.items()}


def videocrafter_forward(case):
    """VideoCrafter and T2V-Turbo, without LoRA."""
    net, result = vc2_unet(case.config, case.params, case.left_as_built), {}
    for name, call in case.call.items():
        if call.get("fn") == "guidance_embedding":
            result[name] = models.guidance_embedding(case.input(call["w"]), call["dim"])
            continue
        args, cond = vc2_arguments(case, call)
        if net.cfg.image_keys:  # the first 77 tokens are text
            x, t, text = args
            args, cond["image"] = (x, t, text[:, :77]), text[:, 77:]
        with torch.no_grad():
            result[name] = net(*args, **cond)
    return result


def turbo_network(config, lora, params, left_as_built, mode, weights):
    """T2V-Turbo's UNet: mode "none", or with its name-less LoRA list "active" or "merged"."""
    public = models.videocrafter_name
    net = models.UNet3D(videocrafter_config(config))
    if mode == "none":
        return fill(net, params, left_as_built, public, lambda name: weights["base"])
    layers = models.turbo_lora_layers(net)
    if [public(f"{n}.")[:-1] for n in layers] != [target["module"] for target in lora["targets"]]:
        raise ValueError("the order of the LoRA layers differs")
    models.add_lora(net, lora["rank"], lora["rank"] * lora["scale"], layers)
    indices, shapes = {}, dict(params)
    for target in lora["targets"]:
        for side, end in (("B", "up"), ("A", "down")):
            index = str(target[f"index_{end}"])
            indices[f"{target['module']}.lora_{side}.weight"] = index
            shapes[index] = target[end]
    ends = {str(target[f"index_{end}"]): end for target in lora["targets"] for end in ("up", "down")}
    fill(net, shapes, left_as_built, lambda key: indices.get(public(key), public(key)),
         lambda name: weights[ends.get(name, "base")])
    if mode == "merged":
        models.merge_lora(net)
    return net


def turbo_lora(case):
    weights = {"base": PLAIN, "up": PLAIN, "down": PLAIN} | case.config.get("weights", {}).get("policy", {})
    nets = {mode: turbo_network(case.config["unet"], case.config["lora"], case.params, case.left_as_built,
                                mode, weights) for mode in ("none", "active", "merged")}
    result = {}
    for name, call in case.call.items():
        if call.get("fn") == "guidance_embedding":
            result[name] = models.guidance_embedding(case.input(call["w"]), call["dim"])
        elif call.get("fn") == "merged_weight":
            state = {models.videocrafter_name(k): v for k, v in nets["merged"].state_dict().items()}
            result[name] = state[call["key"]]
        else:
            args, cond = vc2_arguments(case, call["args"])
            with torch.no_grad():
                result[name] = nets[call["lora"]](*args, **cond)
    return result


# DreamVideo, HiGen, TF-T2V, VideoLCM: several forwards a case, arguments named as published
VGEN_ARGUMENTS = {"y": "text", "y_image": "appearance", "ag_strength": "strength",
                  "spat_prior": "image_prior", "motion_cond": "motion_factor",
                  "appearance_cond": "appearance_factor"}


def vgen_arguments(case, arguments):
    """{published argument: input name, number or None} -> our keyword arguments, tensors in place."""
    given = {k: case.input(v) if isinstance(v, str) else v for k, v in arguments.items()}
    return {VGEN_ARGUMENTS.get(k, k): v for k, v in given.items() if v is not None}


def vgen_forward(case):
    net, result = vgen_unet(case.system, case.config, case.params, case.left_as_built), {}
    for name, call in case.call.items():
        with torch.no_grad():
            if "returns" not in call:
                result[name] = net(**vgen_arguments(case, call))
            elif call["returns"] == "context":
                result[name] = net.context_embedding(case.input(call["y"]))
    return result


@torch.no_grad()
def higen_two_pass(case):
    """An image, then the clip around it, by sample.higen."""
    net = vgen_unet(case.system, case.config["unet"], case.params, case.left_as_built)
    first, then = case.call["image"], case.call["video"]
    text, null = case.input(then["cond"]["y"]), case.input(then["uncond"]["y"])
    noises = []
    for call in (first, then):
        noise = case.input(call["x"])
        if call["offset_noise"] is not None:
            shared = case.input(call["offset_noise"])
            noise = diffusion.offset_noise(noise, shared, call["offset_strength"])
        noises.append(noise)
    motion, appearance = then["cond"]["motion_cond"]["constant"], then["cond"]["appearance_cond"]
    image, video = diffusion.higen(
        net, diffusion_schedule(case.config["diffusion"]), text, null, *noises, then["steps"],
        then["guide_scale"], then["eta"], motion, appearance["appearance_factor"])
    return {"image": image, "video": video}


def adapter_merge(case):
    result = {}
    for name, call in case.call.items():
        net = models.UNet3D(vgen_config("dreamvideo", case.config[call["config"]]))
        state = {k: fill_tensor(k, v.shape) for k, v in net.state_dict().items() if "adapter" not in k}
        for kind, step in (("identity", call["identity"]), ("motion", call["motion"])):
            if step is not None:
                file, zero = case.adapter_files[kind], case.adapter_files["step_0_zero"]
                prefix = file["rule_prefix"].replace("{step}", str(step))
                for key in file["keys"]:
                    untrained = step == 0 and any(z in key for z in zero)
                    shape = case.params[key]
                    state[key] = torch.zeros(shape) if untrained else fill_tensor(prefix + key, shape)
        net.load_state_dict(state)
        with torch.no_grad():
            result[name] = net.eval()(**vgen_arguments(case, call["args"]))
    return result


def train_step_dreamvideo(case):
    """Loss and gradients of the adapters (method dreamvideo) or of the word's vectors."""
    config, method = case.config, case.call["method"]
    if method not in ("dreamvideo", "textual_inversion"):
        raise Unsupported(f"train_step of method {method}")
    schedule, tower, nets = diffusion_schedule(config["diffusion"]), None, {}
    for name, spec in getattr(case, "networks", {"unet": {"key_prefix": "", "rule_prefix": ""}}).items():
        cut = spec["key_prefix"]
        params = {k.removeprefix(cut): v for k, v in case.params.items() if k.startswith(cut)}
        if spec["rule_prefix"]:
            raise Unsupported("weights under another name")
        if name == "clip":
            tower = clip_with_words(config["clip"], params, case.left_as_built)
        else:
            nets[name] = vgen_unet(case.call["network"], config["unet"], params, case.left_as_built)
    net, result = nets["unet"], {}
    for module in filter(None, (net, tower)):
        module.requires_grad_(False)
    trainable = "" if case.call["trainable"] == "all" else case.call["trainable"]
    wanted = {} if tower else {k: p for k, p in net.named_parameters() if trainable in k}
    for p in wanted.values():
        p.requires_grad_(True)

    def loss(run, vectors=None):
        given = {k: case.input(v) if isinstance(v, str) else v for k, v in run.items()}
        noise, text, cond = given["noise"], given.get("y"), {}
        if given.get("offset_noise") is not None:
            noise = diffusion.offset_noise(noise, given["offset_noise"], case.call["offset_strength"])
        if tower:
            text = tower(given["tokens"], config["layer"], {config["placeholder_token"]: vectors})
        if given.get("y_image") is not None:
            cond["appearance"] = given["y_image"]
        result["xt"] = schedule.add_noise(given["x0"], noise, given["t"])
        return dreamvideo.adapter_loss(net, schedule, given["x0"], noise, given["t"], text,
                                       given.get("mask"), **cond)

    runs, chosen = case.call["runs"], case.call["runs"][case.call["grad_of"]]
    vectors = torch.nn.Parameter(case.input(chosen["vectors"])) if tower else None
    result |= {name: loss(run, vectors) for name, run in runs.items()}
    result[case.call["grad_of"]].mean().backward()
    if tower:
        result["grad"], result["embedding_before"] = vectors.grad.clone(), vectors.detach().clone()
        o = case.call["optimizer"]
        if o["name"] != "adamw":
            raise Unsupported(f"optimizer {o['name']}")
        opt = torch.optim.AdamW([vectors], o["lr"], o["betas"], o["eps"], weight_decay=o["weight_decay"])
        for _ in range(o["steps"]):
            opt.zero_grad()
            loss(chosen, vectors).mean().backward()
            opt.step()
        result["embedding_after"] = vectors.detach()
    for name, spec in case.outputs.items():
        if "names" in spec:
            result[name] = torch.stack([wanted[k].grad.norm() for k in spec["names"]])
        elif "param" in spec:
            result[name] = part(wanted[spec["param"]].grad, spec)
    return result


def train_step_t2v(case):
    if case.call["method"] != "t2v":
        raise Unsupported(f"train_step of method {case.call['method']}")
    net = vgen_unet(case.call["network"], case.config["unet"], case.params, case.left_as_built)
    schedule = diffusion_schedule(case.config["diffusion"])
    x0, noise, t, text = (case.input(name) for name in ("x0", "noise", "t", "y"))
    per_sample = diffusion.diffusion_loss(lambda x, t: net(x, t, text), schedule, x0, noise, t)
    per_sample.mean().backward()
    result = {"per_sample": per_sample, "loss": per_sample.mean()[None]}
    grads = {name: p.grad for name, p in net.named_parameters()}
    for name, spec in case.outputs.items():
        if name not in result:
            result[name] = gradient(grads, spec)
            # a bias that a normalisation removes has gradient zero: both sides then hold rounding errors of
            # sums of far larger terms, which nobody can match
            case.noise[name] = torch.finfo(torch.float32).eps * largest(*grads.values())
    return result


def loss_diffusion(case):
    if case.call["loss"] != "diffusion":
        raise Unsupported(f"loss {case.call['loss']}")
    x0, noise, t = case.input("x0"), case.input("noise"), case.input("t")
    mask, offset = case.input("mask"), case.input("offset")
    result = {}
    for name, spec in case.outputs.items():
        config, options = case.config["diffusions"][spec["diffusion"]], spec["options"]
        options = {"loss_type": config.get("loss_type", "mse")} | options
        schedule, fn = diffusion_schedule(config), toy_guided(case, len(x0), options.get("guide_scale"))
        n = noise + options.get("offset", 0.0) * offset if "offset" in options else noise
        x_t = schedule.add_noise(x0, n, t)
        if spec["compute"] == "x_t":
            result[name] = x_t
        elif spec["compute"] == "p_x0":
            result[name] = schedule.to_x0(fn(x_t, t), x_t, t)
        elif spec["compute"] == "loss" and options["loss_type"] == "mse" and "div" not in options:
            # the case's mask is b f c h w and counts by its first channel
            m = mask[:, :, 0].unsqueeze(1) if options.get("mask") else None  # (b, 1, f, h, w)
            result[name] = diffusion.diffusion_loss(fn, schedule, x0, n, t, mask=m)
    return result


def sampler_trajectory(case):
    x0, eta_noise = case.input("x"), case.input("eta_noise")
    states = {}
    for name, run in case.call["runs"].items():
        if run["clamp"] is not None:  # no published run clamps, our samplers do not
            continue
        schedule = diffusion_schedule(case.config["diffusions"][run["diffusion"]])
        steps, fn = run["ddim_timesteps"], toy_guided(case, len(x0), run["guide_scale"])
        xs, ts = [], []

        def record(x, t, xs=xs, ts=ts, fn=fn):
            xs.append(x)
            ts.append(int(t[0]))
            return fn(x, t)

        if run["direction"] == "reverse":
            last = diffusion.ddim_invert(record, x0, schedule, steps)
        else:
            # the sampler's own loop, its draws (if eta > 0) replaced by the recorded ones
            with mock.patch.object(diffusion, "randn_like", side_effect=eta_noise):
                last = diffusion.ddim(record, x0, schedule, steps, eta=run["eta"])
        if ts != run["timesteps"]:
            raise ValueError(f"run {name}: steps {ts} instead of {run['timesteps']}")
        states[name] = xs + [last]

    result = {}
    for name, spec in case.outputs.items():
        if spec["run"] in states:
            kept = torch.stack(states[spec["run"]])
            result[name] = part(kept[spec["saved"]], spec)  # a list keeps the axis, a number drops it
    return result


def schedule_tables(case):
    result = {}
    for name, spec in case.outputs.items():
        param = dict(case.config["schedules"][spec["schedule"]])
        kind = param.pop("schedule")
        if kind not in diffusion.SCHEDULES:
            continue
        if spec["quantity"] == "alphas_cumprod":
            result[name] = part(make_schedule(kind, param).alpha_bar, spec)
        elif spec["quantity"] == "sigma":
            param["zero_terminal_snr"] = False  # as published: given, without effect
            result[name] = part((1 - make_schedule(kind, param).alpha_bar).sqrt(), spec)
    return result


def vae_encode_decode(case):
    dd, scale = case.config["ddconfig"], case.call["scale_factor"]
    cfg = vae.VAEConfig(ch=dd["ch"], ch_mult=tuple(dd["ch_mult"]), num_res_blocks=dd["num_res_blocks"],
                        z_channels=dd["z_channels"], scale=scale)
    net = fill(vae.AutoencoderKL(cfg), case.params, case.left_as_built)
    result, x, z, noise = {}, case.input("x"), case.input("z"), case.input("noise")
    with torch.no_grad():
        if x is not None:
            video = x.unsqueeze(2)  # an image is a video of one frame
            mean, logvar = net.image_moments(x)
            std = torch.exp(logvar / 2)
            result |= {"mean": mean, "logvar": logvar, "std": std, "recon_from_mean": net.decode_images(mean)}
            result["mode_scaled"] = net.encode(video).squeeze(2)
            if noise is not None:
                result["sample_scaled"] = net.encode(video, noise.unsqueeze(2)).squeeze(2)
            result["encoder_out"] = net.encoder(x)
            result["moments"] = net.quant_conv(result["encoder_out"])  # net.moments clamps the log variance
            result["kl"] = (mean ** 2 + std ** 2 - 1 - logvar).flatten(1).sum(1) / 2
        if z is not None:
            result["decoded"] = net.decode_images(z)
    return {name: part(result[name], spec) for name, spec in case.outputs.items() if name in result}


def clip_config(open_clip):
    """Our CLIPConfig for open_clip's {embed_dim, vision_cfg, text_cfg}; vision_cfg.width is vision_width."""
    known = {field.name for field in dataclasses.fields(text_encoders.CLIPConfig)}
    fields = {"embed_dim": open_clip["embed_dim"]}
    for tower in ("vision", "text"):
        for name, value in open_clip.get(f"{tower}_cfg", {}).items():
            fields[name if name in known else f"{tower}_{name}"] = value
    return text_encoders.CLIPConfig(**fields)


def text_forward(case):
    cfg = clip_config(case.config["open_clip"])
    both = any(key.startswith("visual.") for key in case.params)
    net = text_encoders.OpenCLIP(cfg) if both else text_encoders.OpenCLIPText(cfg)
    fill(net, case.params, case.left_as_built)
    ids, image, texts = case.input("token_ids"), case.input("image"), case.input("texts")
    if texts is not None and not torch.equal(text_encoders.tokenize(texts, cfg.context_length), ids):
        raise ValueError("texts tokenise to other ids")

    result = {}
    with torch.no_grad():
        for name, spec in case.outputs.items():
            tower, layer, quantity = (spec.get(k) for k in ("tower", "layer", "quantity"))
            if tower == "tokenizer":
                value = text_encoders.tokenize(texts, cfg.context_length)
            elif tower == "image":
                value = net.visual(image)
                if quantity == "embedding_normalized":
                    value = torch.nn.functional.normalize(value, dim=-1)
            elif quantity == "tokens":
                value = net(ids, layer)
            elif quantity == "pooled":
                value = net.pooled(ids, layer)
            elif quantity == "at_eot":
                value = text_encoders.at_end_token(net(ids, layer), ids)
            else:
                continue
            result[name] = part(value, spec)
    return result


def calls(case):
    """Each output's entry in `call`, resolved: (name, {argument: value}); a string names an input."""
    for name, call in case.call.items():
        yield name, {k: case.input(v) if isinstance(v, str) and k not in ("op", "returns") else v
                     for k, v in call.items()}


def thinned(value, spec):
    """The entries that an output stores: every step-th of one axis."""
    if "take" not in spec:
        return value
    index = [slice(None)] * value.ndim
    index[spec["take"]["axis"]] = slice(None, None, spec["take"]["step"])
    return value[tuple(index)]


def clip_with_words(clip, params, left_as_built):
    """The text tower of a case of textual inversion, filled."""
    cfg = text_encoders.CLIPConfig(
        embed_dim=clip["proj"], vocab_size=clip["vocab"], context_length=clip["n_ctx"],
        text_width=clip["width"], text_heads=clip["heads"], text_layers=clip["layers"],
        text_mlp_ratio=clip["mlp_ratio"])
    # the case's tower lacks the temperature of CLIP's loss, which nothing here reads
    return fill(text_encoders.OpenCLIPText(cfg), {"logit_scale": []} | params, left_as_built)


def text_with_vectors(case):
    layer = case.config["layer"]
    net = clip_with_words(case.config["clip"], case.params, case.left_as_built)
    result = {}
    with torch.no_grad():
        for name, call in calls(case):
            ids, vectors = call["tokens"], call["vectors"]
            learned = None if vectors is None else {case.config["placeholder_token"]: vectors}
            words = net(ids, layer, learned)
            ids, embedded = net.embed(ids, learned)
            value = {"words": words, "embedded": embedded, "tokens": ids,
                     "pooled": text_encoders.at_end_token(words, ids) @ net.text_projection}[call["returns"]]
            result[name] = thinned(value, case.outputs[name])
    return result


def image_tower(case):
    config = case.config
    if config["network"] != "dino_vit":
        raise Unsupported(f"network {config['network']}")
    net = text_encoders.DINO(config["embed_dim"], config["num_heads"], config["depth"], config["patch_size"],
                             image_size=np.ravel(config["img_size"])[0]).eval()
    state = {key: fill_tensor(key, shape) for key, shape in case.params.items()}
    net.load_state_dict(weights.rename(state, net, text_encoders.dino_name, "case"))
    with torch.no_grad():
        return {name: net(call["image"]) for name, call in calls(case)}


def annotator(case):
    """Depth by MiDaS. The two networks behind sketches, which we take ready, are passed over."""
    config = case.config
    if config["network"] in ("pidinet", "sketch_cleaner"):
        return {}
    if config["network"] != "midas":
        raise Unsupported(f"network {config['network']}")
    net = tracks.MiDaS(config["dim"], config["num_layers"], config["num_heads"], config["patch_size"],
                       config["image_size"], config["neck_dims"], config["fusion_dim"])
    net.from_public({key: fill_tensor(key, shape) for key, shape in case.params.items()}, "case")
    with torch.no_grad():
        return {name: net(call["image"])[:, None] for name, call in calls(case)}


def subject_metrics(case):
    result = {}
    for name, call in calls(case):
        clip, dino = ([] if call[k] is None else call[k] for k in ("clip_targets", "dino_targets"))
        frames = call["clip_frames"]
        result[name] = [metrics.cosine(frames, call["clip_text"]), metrics.cosine(frames, clip),
                        metrics.cosine(call["dino_frames"], dino), metrics.temporal_consistency(frames)]
    return result


def pillow(pixels):
    return Image.fromarray(pixels.byte().numpy())


FILTERS = {"box": Image.BOX, "bilinear": Image.BILINEAR, "nearest": Image.NEAREST}


def image_steps(case):
    """DreamVideo's transforms, step by step."""
    result = {}
    for name, call in calls(case):
        x = pillow(call["image"])
        for step in call["steps"]:
            if step["op"] == "center_crop_wide":
                x = data.center_crop_wide(x, step["size_wh"][::-1], FILTERS[step["interpolation"]])
            elif step["op"] == "resize":
                x = x.resize(step["size_wh"], FILTERS[step["interpolation"]])
            elif step["op"] == "to_tensor":
                x = data.image_tensor(x) / 2 + 0.5
            elif step["op"] == "normalize" and np.allclose(step["mean"], data.CLIP_MEAN):
                x = data.clip_normalize(x)
            elif step["op"] == "normalize" and step["mean"] == step["std"] == [0.5] * 3:
                x = 2 * x - 1
            else:
                raise Unsupported(f"step {step}")
        result[name] = x
    return result


def image_items(case):
    """VGen's two transforms: of the frames, and of what the CLIP tower sees."""
    result = {}
    for name, spec in case.outputs.items():
        item = case.call["items"][spec["item"]]
        image, size = pillow(case.input(item["image"])), item["resolution"][::-1]
        if spec["transform"] == "train":
            value = data.image_tensor(data.center_crop_wide(image, size, FILTERS[case.call["filter"]]))
        else:
            value = data.clip_image(image, item["vit_crop"][::-1], item["vit_resolution"][::-1])
        result[name] = value
    return result


def center_crop_size(config, w, h, resolution):
    resized, crop_xy = data.cover_and_crop(w, h, resolution[::-1])
    return {"resized": resized, "crop_xy": crop_xy}


def frame_selection(config, **inputs):
    """The published readers are off by one frame and pad with grey. Ours (data.read_video) takes frames
    start + i stride and refuses a clip that is too short: nothing of theirs has a counterpart."""
    return {}


def annealing_lr(config, decay_mode, updates):
    schedule = {"cosine": "cosine", "none": "constant"}.get(decay_mode)
    if schedule is None:  # "linear": no published configuration uses it
        return {}
    args = argparse.Namespace(lr=config["base_lr"], warmup=config["warmup_steps"],
                              steps=config["total_steps"], lr_schedule=schedule)
    return {"lr": [common.lr_at(k, args) for k in range(updates)]}


def table(case):
    function = case.call["function"]
    if function not in TABLES:
        raise Unsupported(f"table of {function}")
    return {f"{i}.{name}": value for i, row in enumerate(case.rows)
            for name, value in TABLES[function](case.config, **row["inputs"]).items()}


def clip_tokenize(config, text):
    ids = text_encoders.tokenize([text], config["context_length"])[0].tolist()
    while ids[-1] == config["pad"]:  # stored without the padding
        ids.pop()
    return {"ids": ids}


TABLES = {"clip_tokenize": clip_tokenize, "center_crop_size": center_crop_size, "annealing_lr": annealing_lr,
          "frame_selection": frame_selection, "frame_selection_custom": frame_selection}

# ---- samplers of the UNet family

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}


def sqrt_linear(config, prediction="eps", use_scale=False):
    """Our Schedule for VideoCrafter's schedule fields."""
    if config["beta_schedule"] != "scaled_linear":
        raise Unsupported(f"noise schedule {config['beta_schedule']}")
    scale = [config[k] for k in ("scale_a", "scale_b", "mid_step")] if use_scale else None
    return diffusion.make_schedule("linear_sd", prediction, scale=scale, num=config["num_train_timesteps"],
                                   first=config["linear_start"], last=config["linear_end"])


def videocrafter_schedule(case):
    schedule, result = sqrt_linear(case.config), {}
    num, first, last = (case.config[k] for k in ("num_train_timesteps", "linear_start", "linear_end"))
    result["betas"], result["alphas_cumprod"] = diffusion.linear_sd(num, first, last), schedule.alpha_bar
    if "mid_step" in case.config:
        result["scale_arr"] = sqrt_linear(case.config, use_scale=True).scale
    for name, call in case.call.items():
        if call["fn"] == "add_noise":
            noising = sqrt_linear(case.config, use_scale=call["use_scale"])
            result[name] = noising.add_noise(*(case.input(call[k]) for k in ("x0", "noise", "t")))
        elif call["fn"] in ("boundary_c_skip", "boundary_c_out"):
            scalings = diffusion.boundary_scalings(
                case.input(call["t"]), call["sigma_data"], call["timestep_scaling"])
            result[name] = scalings[call["fn"] == "boundary_c_out"]
        elif call["fn"] == "pseudo_huber":
            a, b = case.input(call["a"]), case.input(call["b"])
            result[name] = videolcm.pseudo_huber(a, b, call["c"]).mean()[None]
        elif call["fn"] == "guidance_embedding":
            result[name] = models.guidance_embedding(case.input(call["w"]), call["dim"])
    return result


def recorder(fn, schedule):
    """fn(x, t) of a sampler -> the same, and lists of what passes: states, predictions of x0, steps."""
    xs, x0s, ts = [], [], []

    def record(x, t):
        out = fn(x, t)
        xs.append(x)
        x0s.append(schedule.to_x0(out, x, t))
        ts.append(int(t[0]))
        return out
    return record, xs, x0s, ts


def linear_sine(toy):
    """net(x, t, text); the scalar condition c travels as text (b, 1, 1)."""
    def net(x, t, text):
        c, t = (v.view(-1, *[1] * (x.ndim - 1)) for v in (text, t))
        return toy["x_coef"] * x + toy["sin_coef"] * torch.sin(t / toy["t_div"]) + toy["cond_coef"] * c
    return net


def videocrafter_network(case, b):
    """The case's network behind the project's guidance: fn(x, t)."""
    call, cfg = case.call, case.config.get("cfg")
    if call["network"] == "unet":
        net = vc2_unet(case.config["unet"], case.params, case.left_as_built)
        cond = {k: case.input(name) for k, name in call["cond"].items()}
        uncond = {k: case.input(name) for k, name in (call["uncond"] or call["cond"]).items()}
        text, null = cond.pop("context"), uncond.pop("context")
        return diffusion.guided(net, text, null, cfg, null_cond=uncond, **cond)
    if case.toy["name"] != "linear_sine":
        raise Unsupported(f"toy network {case.toy['name']}")
    text, null = (torch.full((b, 1, 1), float(case.input(branch["c"]) if branch else 0.0))
                  for branch in (call["cond"], call["uncond"]))
    return diffusion.guided(linear_sine(case.toy), text, null, cfg)


@torch.no_grad()
def videocrafter_sampler(case):
    config, x_T, noise = case.config, case.input("x_T"), case.input("step_noise")
    schedule = sqrt_linear(config, PREDICTIONS[config.get("prediction_type", "epsilon")], config["use_scale"])
    record, xs, x0s, ts = recorder(videocrafter_network(case, len(x_T)), schedule)
    with mock.patch.object(diffusion, "randn_like", side_effect=noise):
        if config["sampler"] == "ddim_vc2":
            final = diffusion.ddim(record, x_T, schedule, config["S"], config["eta"])
            result = {"ddim_timesteps": torch.tensor(ts[::-1])}
        elif config["sampler"] == "lcm_turbo":
            final = diffusion.lcm(record, x_T, schedule, config["num_inference_steps"],
                                  origin=config["lcm_origin_steps"])
            result = {"timesteps": torch.tensor(ts)}
        else:
            raise Unsupported(f"sampler {config['sampler']}")
    if len(ts) != case.call["calls"]:
        raise ValueError(f"{len(ts)} network calls instead of {case.call['calls']}")
    for i, (x, x0) in enumerate(zip([*xs[1:], final], x0s)):
        result |= {f"x_after_call{i}": x, f"pred_x0_call{i}": x0}
        if i + 1 < len(xs):  # the original noises once more after the last step, and drops it
            result[f"x_after{i}"] = x
    return result | {"final": final}


def sampler_toy(toy):
    """net(x, t, text, a): y travels as text (b, 1, 1), a as a tensor (b,)."""
    def tanh_sin(x, t, y, a):
        return torch.tanh(x) * (0.8 + 0.2 * t / 1000) + 0.1 * torch.sin(3 * x + y * a)

    def tanh_lin(x, t, y, a):
        return torch.tanh(0.7 * x + toy["y"]) - 0.4 * x * t / 1000

    functions = {"tanh_sin": tanh_sin, "tanh_lin": tanh_lin}
    if toy["name"] not in functions:
        raise Unsupported(f"toy network {toy['name']}")

    def net(x, t, text, a):
        t, y, a = (v.view(-1, *[1] * (x.ndim - 1)) for v in (t, text, a))
        return functions[toy["name"]](x, t, y, a)
    return net


@torch.no_grad()
def sampler_ops(case):
    """DreamVideo's and VideoLCM's: each entry of call is one function of diffusion.py."""
    config, net, result = case.config, sampler_toy(case.toy), {}
    if "diffusion" in config:
        schedule = diffusion_schedule(config["diffusion"])
        schedule = dataclasses.replace(schedule, prediction=config["prediction"])
    else:
        if config["beta_schedule"] != "scaled_linear" or config["timestep_scaling"] != 10:
            raise Unsupported("another schedule or timestep scaling of VideoLCM")
        schedule = diffusion.make_schedule(
            "linear_sd", config["prediction"], config["rescale_betas_zero_snr"],
            first=config["beta_start"], last=config["beta_end"])
    origin = config.get("original_inference_steps")

    def value(spec):
        """An argument's value: a name of an input, "@" and the name of an output, or the value itself."""
        if isinstance(spec, str):
            return result[spec[1:]] if spec.startswith("@") else case.input(spec)
        return spec

    def network(call, b):
        def numbers(name, key):
            return torch.full((b,), float((call.get(name) or {}).get(key, 0.0)))
        text, null = (numbers(name, "y").view(b, 1, 1) for name in ("cond", "uncond"))
        return diffusion.guided(net, text, null, call.get("guide_scale"),
                                null_cond={"a": numbers("uncond", "a")}, a=numbers("cond", "a"))

    for name, call in case.call.items():
        op, x, steps = call["op"], value(call.get("x")), call.get("steps")
        if op == "ddim_invert":
            result[name] = diffusion.ddim_invert(network(call, len(x)), x, schedule, steps)
        elif op == "mix_noise":
            noise, offset = value(call["noise"]), value(call.get("offset_noise"))
            if offset is not None:
                noise = diffusion.offset_noise(noise, offset, call["offset_strength"])
            result[name] = diffusion.mix_noise(value(call["inverted"]), noise, call["strength"])
        elif op == "ddim_sample":
            result[name] = diffusion.ddim(network(call, len(x)), x, schedule, steps, call["eta"])
        elif op == "lcm_sample":
            fn, states = network(call, len(x)), []

            def record(x, t, fn=fn, states=states):
                states.append(x)
                return fn(x, t)
            noise = [case.input(k) for k in call["step_noise"]]
            with mock.patch.object(diffusion, "randn_like", side_effect=noise):
                last = diffusion.lcm(record, x, schedule, steps, origin=origin, spacing="even")
            result[name] = torch.stack([*states[1:], last])
        elif op == "lcm_timesteps":
            times = diffusion.lcm_timesteps(steps, schedule, origin, "even")
            result[name] = torch.tensor(times)
        elif op == "alphas_cumprod":
            result[name] = schedule.alpha_bar
        else:
            raise Unsupported(f"op {op}")
    return result


def appearance_schedule(case):
    if ops := {call["op"] for call in case.call.values()} - {"appearance_matrix"}:
        raise Unsupported(f"op {ops}")
    return {name: diffusion.appearance_matrix(call["frames"], call["appearance_factor"])
            for name, call in case.call.items()}


@torch.no_grad()
def sr600_pipeline(case):
    if case.call["pipeline"] != "sr600":
        raise Unsupported(f"pipeline {case.call['pipeline']}")
    config, x0, result = case.config, case.input("x0"), {}
    schedules = {}
    for name in ("reverse", "forward"):
        param = dict(config[name])
        schedules[name] = make_schedule(param.pop("schedule"), mean_type=param.pop("mean_type"), param=param)

    def network(toy, branch, guide_scale=None, guide_rescale=None):
        net, text = affine_sin(argparse.Namespace(toy=case.toy[toy]))
        return diffusion.guided(net, text(branch, len(x0)), text("uncond", len(x0)), guide_scale,
                                rescale=guide_rescale or 0.0)

    # 1. inversion
    call = case.call["inversion"]
    fn, states, ts = network("inversion", call["branch"], call["guide_scale"]), [], []

    def record(x, t):
        states.append(x)
        ts.append(int(t[0]))
        return fn(x, t)
    inverted = diffusion.ddim_invert(record, x0, schedules[call["schedule"]], config["inversion_steps"],
                                     config["total_noise_levels"])
    if ts != call["timesteps"]:
        raise ValueError(f"inversion: steps {ts} instead of {call['timesteps']}")
    result["inverted"] = inverted
    result["inv_traj"] = torch.stack([*states, inverted])[case.outputs["inv_traj"]["saved"]]

    # 2. one prediction
    call = case.call["denoise"]
    schedule, t = schedules[call["schedule"]], torch.full((len(x0),), call["t"])
    x = case.input(call["x"])
    for name, options in call["variants"].items():
        options = {"branch": "cond"} | options
        out = network("sampling", **options)(x, t)
        result[f"denoise.{name}.x0"] = schedule.to_x0(out, x, t)
        result[f"denoise.{name}.eps"] = schedule.to_eps(out, x, t)

    # 3. sampling
    call = case.call["sampling"]
    published = {"solver": "dpmpp_2m_sde", "discretization": "trailing", "start": "inverted", "t_min": 0,
                 "t_max": config["total_noise_levels"] - 1}
    if other := {k: call[k] for k in published if call[k] != published[k]}:
        raise Unsupported(f"SR600 sampling with {other}")
    fn = network("sampling", "cond", call["guide_scale"], call["guide_rescale"])
    schedule, x0s, times = schedules[call["schedule"]], [], []

    def record_x0(x, t):
        out = fn(x, t)
        x0s.append(schedule.to_x0(out, x, t))
        times.append(int(t[0]))
        return out
    with mock.patch.object(diffusion, "randn_like", side_effect=case.input("sde_noise")):
        result["sampled"] = diffusion.dpmpp_2m_sde(
            record_x0, inverted, schedule, config["steps"], levels=config["total_noise_levels"])
    result["sampled_x0s"] = torch.stack(x0s)[case.outputs["sampled_x0s"]["saved"]]
    result["model_timesteps"] = times
    return result


# ---- Open-Sora 1.2

def fixed(config, **values):
    """Refuse a config that differs from what our network always has."""
    if other := {k: config.get(k) for k, v in values.items() if config.get(k, v) != v}:
        raise Unsupported(f"config {other}")


def stdit3_forward(case):
    config, result = case.config, {}
    fixed(config, patch_size=[1, 2, 2], input_sq_size=512, mlp_ratio=4.0, qk_norm=True, pred_sigma=True)
    net = fill(dit.STDiT3(dit.STDiT3Config(
        in_dim=config["in_channels"], dim=config["hidden_size"], depth=config["depth"],
        num_heads=config["num_heads"], context_dim=config["caption_channels"],
        text_length=config["model_max_length"])), case.params, case.left_as_built)
    named = {"timestep": "t", "y": "text", "mask": "text_mask", "x_mask": "frame_mask"}
    for name, call in case.call.items():
        given = {named.get(k, k): case.input(v) for k, v in call.items()}
        b = len(given["x"])
        given["text"] = given["text"].squeeze(1)
        for k in {"text_mask", "fps", "height", "width"} & set(given):
            # half the rows: both branches of guidance; guided() repeats them for us
            given[k] = given[k].repeat(b // len(given[k]), *[1] * (given[k].ndim - 1))
        seen = {}
        watched = {"x_patch": net.x_embedder.proj, "t_mlp": net.t_block,
                   "spatial0": net.spatial_blocks[0], "temporal0": net.temporal_blocks[0],
                   "head": net.final_layer}
        handles = [module.register_forward_hook(lambda m, args, out, k=k: seen.update({k: out}))
                   for k, module in watched.items()]
        with torch.no_grad():
            v = net(**given)
        for handle in handles:
            handle.remove()
        rows, columns = seen["x_patch"].shape[3:]
        # the original returns all channels of the head, ours the first half, negated
        whole = rearrange(seen.pop("head"), "b f (h w) (p q c) -> b c f (h p) (w q)", h=rows, p=2, q=2)
        result[name] = whole[..., :v.shape[3], :v.shape[4]]
        assert torch.equal(-v, result[name][:, :v.shape[1]])
        if name == "out":  # debug outputs, tokens as b (f s) d there
            result["pos_emb"] = net.positions(rows, columns, given["height"][0] * given["width"][0])[None]
            result["x_patch"], result["t_mlp"] = seen["x_patch"].flatten(2).mT, seen["t_mlp"].squeeze(1)
            result |= {k: seen[k].flatten(1, 2) for k in ("spatial0", "temporal0")}
    return result


@torch.no_grad()
def opensora_vae(case):
    config, spatial, temporal = case.config, case.config["spatial"], case.config["temporal"]
    fixed(spatial, in_channels=3, out_channels=3, norm_num_groups=32, act_fn="silu")
    fixed(temporal, num_groups=32, activation_fn="swish")
    ch, z = spatial["block_out_channels"], spatial["latent_channels"]
    fixed(temporal, in_out_channels=z, latent_embed_dim=z, embed_dim=z)
    net = vae.OpenSoraVAE(vae.OpenSoraVAEConfig(
        vae.VAEConfig(ch=ch[0], ch_mult=tuple(c // ch[0] for c in ch), z_channels=z,
                      num_res_blocks=spatial["layers_per_block"]),
        ch=temporal["filters"], ch_mult=tuple(temporal["channel_multipliers"]),
        num_res_blocks=temporal["num_res_blocks"], time_down=tuple(temporal["temporal_downsample"]),
        chunk_frames=config["micro_frame_size"], shift=tuple(config["shift"]), scale=tuple(config["scale"])))
    state = {key: getattr(net, key) if key in ("scale", "shift") else fill_tensor(key, shape)
             for key, shape in case.params.items()}
    net.load_state_dict(weights.rename(state, net, lambda k: vae.opensora_vae_name(k, len(ch)), "case"))
    result, net = {}, net.eval()
    for name, call in case.call.items():
        if call["fn"] == "encode":
            if call["posterior"] != "mean":
                raise Unsupported(f"posterior {call['posterior']}")
            video = case.input(call["video"])
            result[name] = net.encode(video, chunk=config["micro_batch_size"])
            result["spatial_latent_mode"] = net.spatial_vae.encode(video)
            first = result["spatial_latent_mode"][:, :, :config["micro_frame_size"]]
            result["temporal_moments_chunk0"] = torch.cat(net.temporal_vae.moments(first), dim=1)
        elif call["fn"] == "decode":
            latents, frames = case.input(call["latent"]), call["num_frames"]
            latents = latents[:, :, slice(*call.get("latent_slice", [None]))]
            result[name] = net.decode(latents, chunk=config["micro_batch_size"], num_frames=frames)
            if "latent_slice" not in call:
                n, left = net.cfg.latent_frames(net.cfg.chunk_frames), min(frames, net.cfg.chunk_frames)
                first = (latents * net.scale + net.shift)[:, :, :n]
                result["temporal_decode_chunk0"] = net.temporal_vae.decode(first, left)
        elif call["fn"] == "latent_frames":
            result[name] = {k: net.cfg.latent_frames(int(k)) for k in vars(case)[name]}
        else:
            raise Unsupported(f"function {call['fn']}")
    return result


def flow_tanh(toy):
    """The toy net(x, t, text, frame_mask) of rectified flow, with our sign: noise - x0."""
    def net(x, t, text, frame_mask=None):
        t = (t / toy["t_div"])[:, None, None, None, None]
        if frame_mask is not None:
            t = t * frame_mask[:, None, :, None, None]
        words = text.flatten(1).mean(1)[:, None, None, None, None]
        return -torch.tanh(toy["z_coef"] * x + toy["t_coef"] * t + toy["cond_coef"] * words)
    return net


def rectified_flow(case):
    config, result, seen = case.config, {}, {}
    if case.toy["name"] != "flow_tanh":
        raise Unsupported(f"toy network {case.toy['name']}")
    fixed(config, num_timesteps=1000)
    net, steps = flow_tanh(case.toy), config["num_sampling_steps"]
    size = config["num_frames"], config["height"], config["width"]
    for name, call in case.call.items():
        given = {k: case.input(v) for k, v in call.items() if isinstance(v, str) and k != "fn"}
        flow = diffusion.Flow(by_size=bool(call.get("use_timestep_transform")))
        if call["fn"] == "timesteps":
            result[name] = torch.tensor(diffusion.flow_levels("euler", steps, flow.shift_of(size))[0])
        elif call["fn"] == "timestep_transform":
            result[name] = diffusion.Flow(by_size=True).steps(given["t"] / 1000, size)
        elif call["fn"] == "add_noise":
            result[name] = flow.add_noise(given["x0"], given["noise"], given["t"])
        elif call["fn"] == "training_loss":
            fn = diffusion.guided(net, given["cond"], None)
            result[name] = diffusion.diffusion_loss(fn, flow, given["x0"], given["noise"], given["t"],
                                                    frame_mask=given.get("mask"))
        elif call["fn"] == "sample":
            fn, masks = diffusion.guided(net, given["cond"], given["uncond"], config["cfg"]), []

            def record(x, t, frame_mask=None, fn=fn, masks=masks):
                masks.append(frame_mask)
                return fn(x, t) if frame_mask is None else fn(x, t, frame_mask=frame_mask)
            z = given["z"]
            noise = given.get("step_noise", torch.zeros(steps, *z.shape))  # not given: no frame joins late
            with mock.patch.object(diffusion, "randn_like", side_effect=noise):
                result[name] = diffusion.rflow(record, z, flow, steps, size, frame_mask=given.get("mask"))
            seen[name] = masks
        elif call["fn"] == "record_x_mask":
            result[name] = torch.stack(seen[call["of"]]).byte()
        else:
            raise Unsupported(f"function {call['fn']}")
    return result


# ---- Wan's autoencoders

def wan_vae_config(c, generation):
    """Our WanVAEConfig for the arguments of the original's WanVAE_."""
    fixed(c, attn_scales=[], dropout=0.0)
    later = generation == "2.2"
    return vae.WanVAEConfig(
        c["dim"], c.get("dec_dim", c["dim"]), tuple(c["dim_mult"]), c["num_res_blocks"], c["z_dim"],
        patch=2 if later else 1, shortcuts=later, mean=tuple(c["latents_mean"]), std=tuple(c["latents_std"]),
        time_down=tuple(c["temperal_downsample"]))


@torch.no_grad()
def wan_vae_steps(case):
    done, result = {}, {}
    fixed(case.call, mode="eval", dtype="float32", clamp=False)
    cfg = wan_vae_config(case.config, case.call["generation"])
    net = fill(vae.WanVAE(cfg), case.params, case.left_as_built)
    if tiling := case.call["tiling"]:
        sizes = [tiling[f"tile_sample_min_{side}"] for side in ("height", "width")]
        strides = [tiling[f"tile_sample_stride_{side}"] for side in ("height", "width")]
        net.tiles = vae.Tiles(*sizes, *(1 - stride / size for stride, size in zip(strides, sizes)))
    for step in case.call["steps"]:
        source = step["from"]
        x = case.input(source["input"]) if "input" in source else done[source["latent"]]
        if step["op"] == "encode":
            result[step["to"]] = net.clip_moments(x)
            result[step["latent_to"]] = done[step["latent_to"]] = net.encode(x)
        else:
            result[step["to"]] = net.decode(x)
    return result


# ---- Wan's flow matching

# the original's and diffusers' samplers -> ours: solver, function, spacing
WAN_SAMPLERS = {"unipc": ("unipc", diffusion.flow_unipc, "wan"), "dpm++": ("dpmpp", diffusion.flow_dpmpp, "wan"),
                "euler_wan": ("euler", diffusion.rflow, "wan"), "euler": ("euler", diffusion.rflow, "diffusers"),
                "unipc_diffusers": ("unipc", diffusion.flow_unipc, "diffusers")}


def wan_levels(sampler, steps, shift):
    solver, _, spacing = WAN_SAMPLERS[sampler]
    times, sigmas = diffusion.flow_levels(solver, steps, shift, spacing)
    return {"timesteps": torch.tensor(times), "sigmas": torch.tensor(sigmas)}


@torch.no_grad()
def wan_sampler(case):
    call, seen = case.call, []
    fixed(case.config, num_train_timesteps=1000, solver_order=2)

    def expert(toy, guidance):
        net, text = affine_wave(toy)
        null = text("uncond", len(case.input("x")))
        return diffusion.guided(net, null if guidance is None else text("cond", len(null)), null, guidance)
    if call["boundary"] is None:
        high = low = expert(case.toy, call["guidance"])
    else:
        low, high = (expert({"name": case.toy["name"], **case.toy[name]}, guidance)
                     for name, guidance in zip(("low", "high"), call["guidance"]))

    def fn(x, t):
        above = call["boundary"] is None or t[0].item() >= 1000 * call["boundary"]
        v = high(x, t) if above else low(x, t)
        seen.append((x, t[0], above, v))
        return v
    _, sampler, spacing = WAN_SAMPLERS[call["sampler"]]
    shift, steps = case.config["shift"], call["num_inference_steps"]
    last = sampler(fn, case.input("x"), diffusion.Flow(shift), steps, spacing=spacing)
    states, times, experts, velocities = zip(*seen)
    return {"timesteps": torch.stack(times), "sigmas": wan_levels(call["sampler"], steps, shift)["sigmas"],
            "xs": torch.stack([*states[1:], last]), "expert": torch.tensor(experts).byte(),
            "velocities": torch.stack(velocities)}


def wan_schedule(case):
    fixed(case.config, num_train_timesteps=1000)
    result = {}
    for row in case.rows:
        given = row["inputs"]
        ours = wan_levels(given["sampler"], given["num_inference_steps"], given["shift"])
        result |= {name: ours[what] for what, name in row["expected"].items()}
    return result


def wan_flow_loss(case):
    flow, out = diffusion.Flow(), case.input("model_output").requires_grad_()
    x0, noise, t = case.input("x0"), case.input("noise"), flow.steps(case.input("sigma"))
    x_t = flow.add_noise(x0, noise, t)
    loss = diffusion.diffusion_loss(lambda x, t: out, flow, x0, noise, t).mean()
    loss.backward()
    return {"x_t": x_t, "target": flow.target(x0, noise, t), "x0_pred": flow.to_x0(out, x_t, t),
            "loss": loss[None], "grad": out.grad, "timesteps": t}


def wan_train_timesteps(case):
    result = {}
    for row in case.rows:
        given = row["inputs"]
        u = torch.tensor(given["quantiles"], dtype=torch.float64)
        if given["rule"] == "logit_normal_shift":
            u = diffusion.logit_normal(u, given["scale"])
        elif given["rule"] != "uniform_shift":
            raise Unsupported(f"density {given['rule']}")
        result[row["expected"]["sigma"]] = diffusion.Flow(given["shift"]).steps(u) / 1000
    return result


# ---- VADER's rollouts

# diffusers' DPMSolverMultistepScheduler, made from ModelScope's scheduler
DPMPP_2M = dict(beta_schedule="scaled_linear", solver_order=2, algorithm_type="dpmsolver++",
                solver_type="midpoint", lower_order_final=True, final_sigmas_type="zero",
                timestep_spacing="linspace", prediction_type="epsilon", thresholding=False,
                use_karras_sigmas=False)


def rollout_gradient(case):
    """The reward's gradient through the last updates of a sampler, toys for network and decoder."""
    config, toy, result = case.config, case.toy, {}
    if toy["name"] != "channel_tanh" or config["loss"]["name"] != "mean_square_to":
        raise Unsupported(f"toy {toy['name']}, loss {config['loss']['name']}")
    for name, variant in config["variants"].items():
        lora, x_T = case.input("lora_w").requires_grad_(), case.input("x_T")

        def net(x, t, text):
            mixed = torch.einsum("ij,bjfhw->bifhw", case.input("base_w") + lora, x)
            shift = t.view(-1, 1, 1, 1, 1) / toy["t_div"] + text.flatten(1).mean(1).view(-1, 1, 1, 1, 1)
            return toy["skip"] * x + toy["gain"] * torch.tanh(toy["inner"] * mixed + shift)
        fn = diffusion.guided(net, case.input("cond"), case.input("uncond"), config["cfg"])
        if config["sampler"] == "ddim_vc2":
            schedule, times = sqrt_linear(config, use_scale=config["use_scale"]), []

            def record(x, t):
                times.append(int(t[0]))
                return fn(x, t)
            with mock.patch.object(diffusion, "randn_like", side_effect=case.input("step_noise")):
                z = diffusion.ddim(record, x_T, schedule, config["S"], config["eta"],
                                   grad_last=config["calls"] - variant["cut"])
            result["ddim_timesteps"] = torch.tensor(times[::-1])
        elif config["sampler"] == "rflow" and config["mask"] is None:
            steps = config["num_sampling_steps"]
            size = [config[k] for k in ("num_frames", "height", "width")]
            z = diffusion.rflow(lambda x, t: -fn(x, t), x_T, diffusion.Flow(by_size=config["use_timestep_transform"]),
                                steps, size, grad_last=steps - variant["cut"])
        elif config["sampler"] == "dpmpp_2m":
            c, times = config["scheduler"], []
            other = {k: c[k] for k, v in DPMPP_2M.items() if c[k] != v}
            if other:
                raise Unsupported(f"DPM-Solver++ with {other}")
            schedule = diffusion.make_schedule(
                "linear_sd", num=c["num_train_timesteps"], first=c["beta_start"], last=c["beta_end"])

            def record(x, t):
                times.append(int(t[0]))
                return fn(x, t)
            steps = config["num_inference_steps"]
            z = diffusion.dpmpp_2m(record, x_T, schedule, steps, grad_last=steps - variant["cut"])
            result["timesteps"] = torch.tensor(times)
        else:
            raise Unsupported(f"sampler {config['sampler']}")
        frames = torch.einsum("ij,bjfhw->bifhw", case.input("decoder"), z[:, :, variant["frames"]])
        frames = toy["decode_scale"] * frames
        loss = (frames - config["loss"]["target"]).square().mean()
        loss.backward()
        result |= {f"{name}.z": z, f"{name}.frames": frames, f"{name}.loss": loss.view(1),
                   f"{name}.grad_lora_w": lora.grad}
    return result


# ---- rewards

# the real heads' files, beside the repository (or above it); what needs one is skipped where it is not there
HEAD_FILES = next((folder for parent in Path(__file__).resolve().parents
                   if (folder := parent / "shared" / "data" / "reward_heads").is_dir()), Path("no-heads"))


def pooled(weight, size):
    """Toy tower: (n,3,h,w) -> (n,d), a matrix on the picture shrunk to size x size."""
    shrink = torch.nn.AdaptiveAvgPool2d(size)
    return lambda images: shrink(images).flatten(1) @ weight.T


def computable(case):
    """Names of the outputs whose real head is on this machine; the others are graded as skipped."""
    absent = [name for name, spec in case.outputs.items()
              if "needs_file" in spec and not (HEAD_FILES / spec["needs_file"]).is_file()]
    for name in absent:
        case.outputs[name]["check"] = "as_published"
    return [name for name in case.outputs if name not in absent]


def reward_of(spec, towers, case):
    """The published reward of one entry of config.rewards, around toy towers. -> as rewards.py builds it"""
    fn, tower = spec["reward_fn"], towers[spec["tower"]]
    def text(prompts):
        return case.input("text_features")[[int(p) for p in prompts]]
    if fn in ("aesthetic", "rainy", "snowy", "compression_score"):
        head = rewards.Files("cpu", HEAD_FILES).head(spec["head"])
        return rewards.head_reward(tower, head, spec["target"], spec["grad_scale"])
    if fn == "hps":
        return rewards.text_reward(tower, text)
    if fn == "aesthetic_hps":
        aesthetic = reward_of(spec | {"reward_fn": "aesthetic"}, towers, case)
        return rewards.mixed_reward(aesthetic, rewards.text_reward(towers[spec["tower2"]], text),
                                    spec["loss_weights"], spec["score_weights"])
    if fn == "pick_score":
        return rewards.text_reward(tower, text, rewards.crop, np.exp(spec["logit_scale"]), 100)
    if fn == "actpred":
        return rewards.action_reward(lambda clips: tower(clips.mean(2)), lambda _: case.input("target_class"))
    raise Unsupported(f"reward {fn}")


PREPARE = {"square_224_clipnorm": rewards.square, "bicubic_crop_224": rewards.crop,
           "square_224_imagenetnorm": lambda x: rewards.square(x, rewards.imagenet),
           "detection": rewards.detector_input}


def reward_losses(case):
    """Every reward's preprocessing, loss, score and gradient, through rewards.score() as VADER calls it."""
    if case.toy["name"] != "pooled_linear":
        raise Unsupported(f"toy {case.toy['name']}")
    towers = {k: pooled(case.input(v), case.toy["pool"]) for k, v in case.toy["towers"].items()}
    image, result, found = case.input("image"), {}, {}
    for name in computable(case):
        spec = case.outputs[name]
        if "preprocess" in spec:
            if spec["preprocess"] in PREPARE:
                result[name] = sampled(PREPARE[spec["preprocess"]](image.clamp(-1, 1) / 2 + 0.5), spec)
            continue
        which = spec["reward"]
        if case.config["rewards"][which]["preprocess"] not in PREPARE:
            continue  # the short side: as published, the towers could not take it
        if which not in found:
            reward = reward_of(case.config["rewards"][which], towers, case)
            x = image.clone().requires_grad_()
            clips = x.transpose(0, 1)[None] if reward.clip else x[:, :, None]  # one clip, or one frame each
            # as published, PickScore asks every image about the first prompt
            row0 = case.config["rewards"][which].get("pairing") == "row0"
            prompts = ["0" if row0 else str(i) for i in range(len(clips))]
            loss = -rewards.score(reward, clips, prompts).mean()
            loss.backward()
            plain = reward.score((clips / 2 + 0.5).clamp(0, 1), prompts)
            found[which] = {"loss": loss.view(1), "score": plain.mean().view(1), "grad": x.grad,
                            "grad_norm": x.grad.norm().view(1)}
        quantity = spec["quantity"]
        if quantity == "grad_sub":
            result[name] = sampled(found[which]["grad"], spec)
        else:
            result[name] = found[which][quantity]
    return result


def sampled(x, spec):
    """Every stride-th row and column from offset."""
    (top, left), (down, right) = spec["offset"], spec["stride"]
    return x[..., top::down, left::right]


def reward_heads(case):
    """The real heads on unit vectors."""
    result = {}
    if not computable(case):
        raise Unsupported("needs the real heads, shared/data/reward_heads")
    for name in computable(case):
        which = name.removesuffix("_grad_norm")
        x = case.input("features").requires_grad_()
        value = rewards.Files("cpu", HEAD_FILES).head(which)(x)
        value.sum().backward()
        result[name] = value if name == which else x.grad.norm(dim=1)
    return result


def reward_detection(case):
    """Object removal, each image alone and all together."""
    toy, config, result = case.toy, case.config, {}
    if toy["name"] != "pooled_detector" or toy["classes"] != config["num_classes"] + 1:
        raise Unsupported(f"toy {toy['name']}")
    tower = pooled(toy["gain"] * case.input(toy["weight"]), toy["pool"])

    def detect(images):
        logits = tower(images).unflatten(1, (toy["queries"], toy["classes"]))
        return rewards.yolos_confidence(logits, config["target_id"], config["threshold"])
    reward, image = rewards.object_reward(detect), case.input("image")
    for name, spec in case.outputs.items():
        rows = slice(None) if spec.get("row") is None else [spec["row"]]
        x = image[rows].clone().requires_grad_()
        loss = -rewards.score(reward, x[:, :, None], ["a"] * len(x)).mean()
        loss.backward()
        result[name] = (x.grad.norm() if spec.get("quantity") == "grad_norm" else loss).view(1)
    return result


def clip_forward(case):
    """Both towers of a CLIP in open_clip's or transformers' layout."""
    config, result = case.config, {}
    if config["arch"] == "open_clip":
        cfg, convert = clip_config(config), None
    elif config["arch"] == "hf" and config["intermediate"] == 4 * config["hidden"]:
        width, heads, layers = (config[k] for k in ("hidden", "heads", "layers"))
        cfg, convert = text_encoders.CLIPConfig(
            embed_dim=config["projection"], image_size=config["image_size"], patch_size=config["patch"],
            vision_width=width, vision_head_width=width // heads, vision_layers=layers, text_width=width,
            text_heads=heads, text_layers=layers, vocab_size=config["vocab"],
            context_length=config["positions"]), text_encoders.clip_from_hf
    else:
        raise Unsupported(f"architecture {config['arch']}")
    cfg = dataclasses.replace(cfg, quick_gelu=config["activation"] == "quick_gelu")
    net = text_encoders.OpenCLIP(cfg).eval()
    if convert is None:
        fill(net, case.params, case.left_as_built)
    else:
        state = {k: fill_tensor(k, shape) if shape else net.logit_scale.detach()
                 for k, shape in case.params.items()}
        weights.load_strict(net, convert(state), case.path)
    ids, image = case.input("text_tokens"), case.input("image").requires_grad_()
    if config["text_pooling"] == "first_eos" and not torch.equal(
            ids.argmax(1), (ids == config["eos"]).int().argmax(1)):
        raise Unsupported("an end token that is not the largest id")
    length = rewards.unit if config["normalize"] else lambda x: x
    for name, call in case.call.items():
        if call["fn"] == "encode_image":
            result[name] = length(net.visual(image))
        elif call["fn"] == "encode_text":
            result[name] = length(net.pooled(ids))
        elif call["fn"] == "row_dot":
            result[name] = (result[call["a"]] * result[call["b"]]).sum(1)
        elif call["fn"] == "grad" and call["of"] == "mean(1-score)" and call["wrt"] == "image":
            (1 - result["score"]).mean().backward()
            result[name] = image.grad
        else:
            raise Unsupported(f"function {call['fn']}")
    return result


# ---- VideoDPO

def dpo_loss(case):
    """The loss on given predictions, its gradient and its argument, for both reductions."""
    result, inputs = {}, [case.input(k) for k in ("pred", "ref_pred", "target")]
    for name, call in case.call.items():
        pred = inputs[0].clone().requires_grad_()
        loss, z = videodpo.dpo_loss(pred, *inputs[1:], case.input("dupfactor"), case.config["beta_dpo"],
                                    call["reduce"])
        loss.mean().backward()
        what = "grad" if call.get("grad_of") else "inside" if "inside" in name else name
        result[name] = {"grad": pred.grad, "inside": z, "implicit_acc": (z > 0).float().mean()[None]}.get(
            what, loss.mean()[None])
    return result


def dpo_step(case):
    """One training step from noise to gradients, all weights or the LoRA list of T2V-Turbo."""
    config, nets = case.config, {}
    lora = config.get("lora") if config["trains"] == "lora" else None
    for who in ("policy", "reference"):
        nets[who] = turbo_network(config["unet"], lora, case.params, case.left_as_built,
                                  "active" if lora else "none", config["weights"][who])
    net = nets["policy"]
    if not lora:
        net.requires_grad_(True)
    schedule = sqrt_linear(config, use_scale=config["use_scale"])
    noise, t = case.input("noise"), case.input("timesteps")
    x_noisy = schedule.add_noise(case.input("x0"), noise, t)
    given = {k: v for k, v in case.call["network"].items() if k != "x"}
    (_, t, text), cond = vc2_arguments(case, given | {"x": "noise"})
    with torch.no_grad():
        ref = nets["reference"](x_noisy, t, text, **cond)
    pred = net(x_noisy, t, text, **cond)
    target = schedule.target(case.input("x0"), noise, t)
    loss, _ = videodpo.dpo_loss(pred, ref, target, case.input("dupfactor"), config["beta_dpo"],
                                config["reduce"])
    loss.mean().backward()
    grads = {models.videocrafter_name(k): p.grad for k, p in net.named_parameters() if p.grad is not None}
    result = {"loss": loss.mean()[None], "x_noisy": x_noisy, "pred": pred, "ref_pred": ref,
              "grad_total_norm": torch.stack([g.norm() for g in grads.values()]).norm()[None]}
    entries = {layer[f"index_{end}"]: f"{layer['module']}.lora_{side}.weight" for layer in
               (lora["targets"] if lora else []) for side, end in (("B", "up"), ("A", "down"))}
    for name, spec in case.outputs.items():
        key = spec.get("key") or entries.get(spec.get("lora_entry"))
        if key in grads:
            result[name] = grads[key]
    return result


def omniscore_rows(config, **raw):
    raw = {k.replace(" ", "_"): v for k, v in raw.items()}
    table = {k.replace(" ", "_"): (*v, config["dim_weight"][k]) for k, v in config["norm_min_max"].items()}
    raw["subject_consistency"] /= config["subject_divisor"]  # over frames, as subject_consistency() has it
    raw["imaging_quality"] /= config["imaging_divisor"]
    shares = config["quality_weight"], config["semantic_weight"]
    return omniscore.total_score(raw, table, [k.replace(" ", "_") for k in config["semantic"]], shares)


def select_pair(config, totals):
    win, lose, score = videodpo.select_pair(totals)
    return {"win": win, "lose": lose, "pair_score": score}


def dupfactor(config, score, dupbeta, numerator):
    return {"dupfactor": videodpo.pair_weight(score, dupbeta, numerator)}


def videodpo_table(case):
    functions = {"omniscore": omniscore_rows, "select_pair": select_pair, "dupfactor": dupfactor}
    result = {}
    for i, row in enumerate(case.rows):
        if row["op"] not in functions:
            raise Unsupported(f"a table of {row['op']}")
        result |= {f"{i}.{k}": v for k, v in functions[row["op"]](case.config, **row["inputs"]).items()}
    return result


# ---- InstructVideo's training step and statistics

def instructvideo_step(case):
    """A clip noised part-way, the rest of the chain, the reward of segments, and its gradients."""
    config, call = case.config, case.call
    if call["method"] != "instructvideo":
        raise Unsupported(f"train_step of method {call['method']}")
    rank, public, dd = config["unet"]["lora_rank"], models.instructvideo_lora_name, config["vae"]["ddconfig"]
    net = models.UNet3D(vgen_config(call["network"], config["unet"]))
    models.add_lora(net, rank, config["unet"]["lora_alpha"] or rank, ["to_q", "to_k", "to_v", "to_out.0"])
    fill(net, case.params["unet"], case.left_as_built, public)
    vae_config = vae.VAEConfig(ch=dd["ch"], ch_mult=tuple(dd["ch_mult"]), z_channels=dd["z_channels"],
                               num_res_blocks=dd["num_res_blocks"], scale=config["vae_scale_factor"])
    autoencoder = fill(vae.AutoencoderKL(vae_config), case.params["vae"], case.left_as_built)
    clip = fill(text_encoders.OpenCLIP(clip_config(config["clip"])), case.params["clip"], case.left_as_built)
    captions, result, rewarded = case.input("captions"), {}, []
    ids = text_encoders.tokenize(captions, clip_config(config["clip"]).context_length)
    if not torch.equal(ids, case.input("token_ids")):
        raise ValueError("captions tokenise to other ids")
    normalize = torch.nn.functional.normalize
    text_features = normalize(clip.pooled(ids, "last"), dim=-1).detach()

    def reward(frames, prompts):
        """Cosine of picture and caption, frames (n,3,h,w) in [0,1]."""
        short = min(frames.shape[2:])
        size = [config["resize_to"] * n // short for n in frames.shape[2:]]
        fed = data.clip_normalize(torch.nn.functional.interpolate(
            frames, size, mode="bilinear", antialias=config["resize_antialias"]))
        features = normalize(clip.visual(fed), dim=-1)
        texts = torch.stack([text_features[captions.index(p)] for p in prompts])
        rewarded.extend([fed, features, (features * texts).sum(1)])
        return rewarded[-1]

    schedule, frames = diffusion_schedule(config["diffusion"]), config["frames"]
    steps, grad_last = config["ddim_timesteps"], config["trunc_backprop_timestep"]
    t, last = instructvideo.partial_chain(
        schedule, bases.Sampling(sample_steps=steps), config["starting_partial"])
    x_t = schedule.add_noise(case.input("latent"), case.input("noise"), t)
    null = case.input("zero_y").expand(len(x_t), -1, -1)
    fn, times = diffusion.guided(net, case.input("y"), null, config["guide_scale"]), []

    def record(x, t):
        times.append((int(t[0]), torch.is_grad_enabled()))
        return fn(x, t)
    x0 = diffusion.ddim(record, x_t, schedule, steps, config["eta"], grad_last=grad_last, last=last)
    if ([t for t, _ in times], [t for t, grad in times if grad]) != (call["timesteps"],
                                                                    call["grad_timesteps"]):
        raise ValueError(f"other steps: {times}")
    x0.retain_grad()
    span = frames // config["segments"]
    if span != call["segment_length"]:
        raise ValueError(f"segments of {span} frames")
    numbers = [[s * span + i for s, i in enumerate(row)] for row in case.input("local_index").tolist()]
    values = instructvideo.segmental_reward(
        rewards.Reward(reward), SimpleNamespace(vae=autoencoder), x0, captions, frames, numbers,
        config["lambda_TAR"])
    loss = (1 - values).mean()
    loss.backward()
    fed, features, cosines = rewarded
    b, s = len(captions), config["segments"]
    result = dict(xt=x_t, x0=x0, frames_fed=fed[:s], image_features=features.view(b, s, -1),
                  text_features=text_features, cosines=cosines.view(b, s), rewards=values, loss=loss[None],
                  tar=torch.exp(-config["lambda_TAR"] * (torch.tensor(numbers) - frames // 2).abs()),
                  grad_x0=x0.grad)
    grads = {public(k): p.grad for k, p in net.named_parameters() if p.grad is not None}
    return result | {name: gradient(grads, spec) for name, spec in case.outputs.items() if name not in result}


def stat_tracker(config, updates):
    statistics = instructvideo.PromptStatistics(config["buffer_size"], config["min_count"])
    return {"advantages": [statistics.update(u["prompts"], u["rewards"]) for u in updates]}


TABLES["stat_tracker"] = stat_tracker


# ---- CogVideoX and Diffusion as Shader. Their tensors are (b,f,c,h,w), ours (b,c,f,h,w)

def swapped(x):
    return x.transpose(1, 2)


def cogvideox_config(config):
    """Our CogVideoXConfig for the arguments of diffusers' CogVideoXTransformer3DModel, or DaS's."""
    rotary, learned = (config[f"use_{kind}_positional_embeddings"] for kind in ("rotary", "learned"))
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    if config["patch_size"] != dit.PATCH or (learned and not rotary):
        raise Unsupported(f"patches of {config['patch_size']}, or learned positions alone")
    return dit.CogVideoXConfig(
        in_channels=config["in_channels"], out_channels=config["out_channels"],
        num_layers=config["num_layers"], heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"], time_dim=config["time_embed_dim"],
        text_dim=config["text_embed_dim"], text_length=config["max_text_seq_length"],
        positions="rope+learned" if learned else "rope" if rotary else "sincos",
        size=(frames, config["sample_height"], config["sample_width"]),
        tracking_blocks=config.get("num_tracking_blocks", 0))


def cogvideox_vae(config, params):
    """The CogVideoXVAE of the arguments of diffusers' AutoencoderKLCogVideoX, filled."""
    if config["temporal_compression_ratio"] != 4 or config["in_channels"] != 3:
        raise Unsupported("an autoencoder of another time factor or other channels")
    return fill(vae.CogVideoXVAE(vae.CogVideoXVAEConfig(
        widths=tuple(config["block_out_channels"]), layers=config["layers_per_block"],
        z_channels=config["latent_channels"], groups=config["norm_num_groups"],
        scale=config["scaling_factor"])), params)


def cogvideox_forward(case):
    cfg = cogvideox_config(case.config)
    net, result, seen = fill(dit.CogVideoX(cfg), case.params, case.left_as_built), {}, {}
    with torch.no_grad():
        for name, factor in vars(case).get("param_scale", {}).items():
            net.state_dict()[name].mul_(factor)

    def watch(name, what):
        """Keep what(arguments, answer) of a submodule's first call, a dictionary."""
        if name in dict(net.named_modules()):
            def hook(module, args, out):
                seen.update(what(args, out) | seen)
            net.get_submodule(name).register_forward_hook(hook)
    watch("time_embedding.linear_2", lambda args, out: {"time_embedding": out})
    watch("patch_embed", lambda args, out: {"patch_embed": torch.cat(out, dim=1)})
    watch("transformer_blocks.0", lambda args, out: {"block0_text": out[0], "block0_video": out[1]})
    watch("transformer_blocks.1", lambda args, out: {"block1_text_in": args[0], "block1_video_in": args[1]})
    watch("norm_final", lambda args, out: {"norm_final": out})
    watch("initial_combine_linear", lambda args, out: {"initial_combine": out})
    watch("transformer_blocks_copy.0", lambda args, out: {"copy0_video": out[1]})
    for i in range(2):
        watch(f"combine_linears.{i}", lambda args, out, i=i: {f"combine{i}": out})
    for run in case.call["runs"]:
        seen.clear()

        def given(name, run=run):
            """An input's first channels, as many as the network answers with, and the others or None."""
            x = case.input(run["prefix"] + name)
            if x is None:
                return None, None
            x, beside = swapped(x).tensor_split([cfg.out_channels], dim=1)
            return x, beside if beside.shape[1] else None
        x, first_frame = given("x")
        tracks, first_track = given("tracking")
        text, t = (case.input(run["prefix"] + name) for name in ("text", "timestep"))
        with torch.no_grad():
            seen["out"] = swapped(net(x, t, text, first_frame, tracks, first_track))
        rope = net.rope(*x.shape[2:], n=0)
        if rope is not None:
            seen["rope_cos"], seen["rope_sin"] = (table.repeat_interleave(2, dim=-1) for table in rope)
        result |= {run["prefix"] + name: value for name, value in seen.items()}
    return result


def tables_of_rows(case, functions):
    """Tables whose `expected` names outputs, or are literals, which are checked here. -> {output: value}"""
    result = {}
    for row in case.rows:
        if row["what"] not in functions:
            raise Unsupported(f"a table of {row['what']}")
        ours = functions[row["what"]](case, **row["inputs"])
        for name, expected in row["expected"].items():
            if isinstance(expected, str):
                result[expected] = ours[name]
            elif np.asarray(ours[name]).tolist() != expected:
                raise ValueError(f"{name} {ours[name]} instead of {expected}")
    return result


def rope_rows(case, head_dim, base_grid, grid, frames, at):
    cos, sin = (table.repeat_interleave(2, dim=-1)
                for table in dit.rope_positions(frames, *grid, *base_grid, head_dim))
    rows = slice(None) if at is None else case.input(at)
    return {"cos": cos[rows], "sin": sin[rows], "colsum_cos": cos.double().sum(0),
            "colsum_sin": sin.double().sum(0), "total_rows": len(cos),
            "crop_start_stop": dit.crop_window(*grid, *base_grid)}


def sincos_rows(case, dim, grid, frames, spatial_interpolation_scale, temporal_interpolation_scale, at):
    if temporal_interpolation_scale != 1:
        raise Unsupported("scaled frame numbers")
    table = dit.sincos_positions(frames, *grid, dim, spatial_interpolation_scale)
    return {"table": table if at is None else table[case.input(at)], "colsum": table.double().sum(0),
            "total_rows": len(table)}


def timestep_rows(case, dim, timestep):
    return {"table": models.sinusoidal(torch.tensor(timestep), dim)}


def position_table(case):
    return tables_of_rows(
        case, {"rope": rope_rows, "sincos": sincos_rows, "timestep_sinusoid": timestep_rows})


def cogvideox_vae_steps(case):
    net, done = cogvideox_vae(case.config, case.params), {}
    if tiling := case.call["tiling"]:
        net.tiles = vae.Tiles(
            tiling["tile_sample_min_height"], tiling["tile_sample_min_width"],
            tiling["tile_overlap_factor_height"], tiling["tile_overlap_factor_width"])
    for step in case.call["steps"]:
        source = step["from"]
        if "input" in source:
            x = case.input(source["input"])
        else:
            x = done[source["mean_of"]].chunk(2, dim=1)[0]
        with torch.no_grad():
            done[step["to"]] = net.clip_moments(x) if step["op"] == "encode" else net.decode_latents(x)
    return done


def t5_forward(case):
    c, alias = case.config, case.fill_alias
    if c["feed_forward_proj"] != "gated-gelu":
        raise Unsupported(f"T5 with {c['feed_forward_proj']}")
    cfg = text_encoders.T5Config(vocab_size=c["vocab_size"], width=c["d_model"], heads=c["num_heads"],
                                 head_dim=c["d_kv"], hidden=c["d_ff"], layers=c["num_layers"])
    # two names of one tensor in the original, one here
    params = {name: shape for name, shape in case.params.items() if name not in alias}
    net = fill(text_encoders.T5Text(cfg), params, case.left_as_built, lambda name: alias.get(name, name))
    result = {}
    for run in case.call["runs"]:
        net.cfg = dataclasses.replace(cfg, mask=run["mask"] == "nonzero_ids")
        with torch.no_grad():
            result[run["to"]] = net(case.input("input_ids"))
    return result


def cogvideox_schedule(config):
    published = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
                 "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    if other := {k: config[k] for k in published if config[k] != published[k]}:
        raise Unsupported(f"schedule with {other}")
    return diffusion.make_schedule(
        "linear_sd_shifted", "v", zero_snr=True, num=config["num_train_timesteps"],
        first=config["beta_start"], last=config["beta_end"], divisor=config["snr_shift_scale"])


def cogvideox_guidance(rule, guidance, steps):
    """What guided() takes as cfg: None, a number or a function of the step."""
    if rule in ("none", "constant"):
        return guidance
    if rule not in ("dynamic_raw_timestep", "dynamic_step_index"):
        raise Unsupported(f"guidance {rule}")
    return diffusion.dynamic_guidance(guidance, steps, as_published=rule == "dynamic_raw_timestep")


def guidance_values(cfg, steps):
    return [cfg(t) if callable(cfg) else cfg for t in diffusion.ddim_timesteps(steps, spacing="trailing")]


def affine_wave(toy):
    """The toy net(x, t, text) and its text of a branch (b,1,4): a, b, period, 1 for cos."""
    if toy["name"] != "affine_wave":
        raise Unsupported(f"toy network {toy['name']}")

    def net(x, t, text):
        a, b, period, cosine, t = (v.view(-1, *[1] * (x.ndim - 1)) for v in (*text[:, 0].unbind(1), t))
        angle = t / period
        return a * x + b * torch.where(cosine > 0, angle.cos(), angle.sin())

    def text(branch, b):
        numbers = toy[branch]
        values = [numbers["a"], numbers["b"], numbers["period"], float(numbers["wave"] == "cos")]
        return torch.tensor(values).expand(b, 1, 4)
    return net, text


@torch.no_grad()
def cogvideox_sampler(case):
    call, x_T, noise = case.call, case.input("x"), case.input("noise")
    steps, schedule = call["num_inference_steps"], cogvideox_schedule(case.config)
    cfg = cogvideox_guidance(call["guidance_rule"], call["guidance"], steps)
    net, text = affine_wave(case.toy)
    if cfg is None:
        fn = diffusion.guided(net, text("uncond", len(x_T)), None)
    else:
        fn = diffusion.guided(net, text("cond", len(x_T)), text("uncond", len(x_T)), cfg)
    record, xs, x0s, ts = recorder(fn, schedule)
    if call["sampler"] == "ddim":
        last = diffusion.ddim(record, x_T, schedule, steps, spacing="cogvideox")
    elif call["sampler"] == "dpm":
        with mock.patch.object(diffusion, "randn_like", side_effect=noise):
            last = diffusion.cogvideox_dpm(record, x_T, schedule, steps)
    else:
        raise Unsupported(f"sampler {call['sampler']}")
    result = {"timesteps": ts, "xs": torch.stack([*xs[1:], last]), "x0s": torch.stack(x0s)}
    return result if cfg is None else result | {"guidance": guidance_values(cfg, steps)}


def cogvideox_tables(case):
    def alphas_cumprod(case, config):
        return {"alphas_cumprod": cogvideox_schedule(case.config[config]).alpha_bar}

    def guidance(case, config, guidance, guidance_rule, num_inference_steps):
        cfg = cogvideox_guidance(guidance_rule, guidance, num_inference_steps)
        return {"guidance": guidance_values(cfg, num_inference_steps)}
    return tables_of_rows(case, {"alphas_cumprod": alphas_cumprod, "guidance": guidance})


def cogvideox_loss(case):
    schedule, t = cogvideox_schedule(case.config), case.input("timestep")
    x0, noise, out = (case.input(name) for name in ("latents", "noise", "model_output"))
    out.requires_grad_()
    x_t = schedule.add_noise(x0, noise, t)
    per_sample = diffusion.diffusion_loss(lambda x, t: out, schedule, x0, noise, t)
    per_sample.mean().backward()
    return {"noisy": x_t, "v_target": schedule.target(x0, noise, t), "x0_pred": schedule.to_x0(out, x_t, t),
            "loss": per_sample.mean()[None], "grad": out.grad, "loss_per_sample": per_sample,
            "weights": 1 / (1 - schedule.alpha_bar[t])}


@torch.no_grad()
def das_pipeline(case):
    call, steps = case.call, case.call["num_inference_steps"]
    if call["sampler"] != "dpm" or call["tiling"] or call["tracking_video_posterior"] != "mean":
        raise Unsupported("another sampler, tiling, or a sample of the tracking video's latents")
    parts = {part: {k.removeprefix(f"{part}."): v for k, v in case.params.items() if k.startswith(f"{part}.")}
             for part in ("transformer", "vae")}
    net = fill(dit.CogVideoX(cogvideox_config(case.config["transformer"])), parts["transformer"])
    autoencoder = cogvideox_vae(case.config["vae"], parts["vae"])
    schedule = cogvideox_schedule(case.config["scheduler"])

    image, tracking = 2 * case.input("image")[:, :, None] - 1, swapped(case.input("tracking")[None])
    tracks = autoencoder.encode(2 * tracking - 1 if call["tracking_range"] == "-1..1" else tracking)
    first_frame = autoencoder.encode(image, case.input("image_noise"))
    first_track = autoencoder.encode(2 * tracking[:, :, :1] - 1, case.input("tracking_image_noise"))
    cfg = cogvideox_guidance(call["guidance_rule"], call["guidance"], steps)
    fn = diffusion.guided(net, case.input("prompt_embeds"), case.input("negative_prompt_embeds"), cfg,
                          first_frame=first_frame, tracks=tracks, first_track=first_track)

    seen = {"tokens_of": [], "v": [], "t": []}

    def watch(module, args, out):
        seen["v"].append(out)
        seen["t"].append(args[1])
    net.register_forward_hook(watch)
    net.patch_embed.register_forward_pre_hook(lambda module, args: seen["tokens_of"].append(args[0]))
    noise = [swapped(x) for x in case.input("step_noise")]
    with mock.patch.object(diffusion, "randn_like", side_effect=noise):
        latents = diffusion.cogvideox_dpm(fn, swapped(case.input("init_noise")), schedule, steps)

    def stored(x):  # there the unconditional half comes first
        return swapped(x).flip(0)
    return {"tracking_latents": swapped(tracks), "first_hidden_states": stored(seen["tokens_of"][0]),
            "first_tracking_maps": stored(seen["tokens_of"][1]), "first_v": stored(seen["v"][0]),
            "last_v": stored(seen["v"][-1]), "timesteps": torch.stack(seen["t"]),
            "final_latents": swapped(latents), "video_t0": autoencoder.decode(latents, frames=[0])[:, :, 0]}


# ---- Diffusion as Shader: cameras and drawing

def camera_paths(case):
    return {row["expected"]["poses"]: tracks.camera_path(**row["inputs"]) for row in case.rows}


def four_rows(camera):
    """World-to-camera (f,3,4) -> (f,4,4)."""
    return np.concatenate([camera, np.tile([[[0.0, 0, 0, 1]]], (len(camera), 1, 1))], axis=1)


def projections(case):
    done = {}

    def get(name):
        if name is None or name in done:
            return done.get(name)
        return case.input(name).double().numpy()
    commands = case.inputs.get("commands")
    if commands and "poses" in case.inputs:
        poses = get("poses")
        if not np.allclose(tracks.camera_path(commands["value"], len(poses)), poses, atol=2e-6):
            raise ValueError("poses are not those of the commands")
    for step in case.call["steps"]:
        op, K, poses = step["op"], get(step.get("K")), get(step.get("poses"))
        if op == "default_intrinsics":
            result = tracks.intrinsics(step["height"], step["width"], step["fov_degrees"])
        elif op == "project_points":
            result = tracks.project(get(step["points"]), K, poses)
        elif op == "lift_tracks":
            result = tracks.lift(get(step["tracks"]), K, four_rows(get(step["ext"])))
        elif op == "project_tracks":
            if poses is not None:
                poses = poses.copy()
                poses[:, :3, 3] /= step["translation_divisor"]
            camera = tracks.view(poses, four_rows(get(step["ext"])), step["mode"])
            result = tracks.project(get(step["world"]), K, camera)
        else:
            raise Unsupported(f"step {op}")
        done[step["to"]] = result
    return done


def object_motions(case):
    """As published but for one unit on all axes: what differs is skipped."""
    points, mask, moving = (case.input(name).numpy() for name in ("points_frame0", "mask", "tracks"))
    points, mask, result = points.reshape(-1, 3), mask.astype(bool), {}
    for step in case.call["steps"]:
        path = tracks.object_path(f"{step['motion']} {step['distance']}", step["frames"])
        if step["op"] == "move_points":
            selected = mask.reshape(-1)
            path = tracks.about_centre(path, points, selected)
            result[step["to"]] = np.stack(
                [tracks.move_object(points, selected, path[k])[selected] for k in step["at"]])
        elif step["op"] == "move_tracks":
            selected = tracks.in_mask(moving[0], mask)
            path = tracks.about_centre(path, moving[0], selected)
            result[step["to"]] = np.stack(
                [tracks.move_object(moving[k], selected, path[k]) for k in step["at"]])
        else:
            raise Unsupported(f"step {step['op']}")
    return result


def drawings(case):
    call, points, visible = case.call, case.input("points").numpy(), case.input("visible")
    size = h, w = call["height"], call["width"]
    if call["style"] == "dense":
        points = points.reshape(len(points), -1, 3) * points.dtype.type([w, h, 1])
        colours = tracks.dense_colours(points[0, :, 2], size)
    elif call["style"] == "cotracker":
        colours = tracks.grid_colours(points[0], size)
    elif call["style"] == "spatracker":
        x, y, depth = points[0].T
        red, green = (255 * (v - v.min()) / (v.max() - v.min()) for v in (x, y))
        colours = tracks.track_colours(red, green, depth)
        return {"point_colors": torch.from_numpy(colours)}
    else:
        raise Unsupported(f"style {call['style']}")
    shown = None if visible is None else visible.bool().numpy()
    video = tracks.draw_tracks(points, colours, size, shown, tuple(call["mark_half"]))
    result = {}
    for name, spec in case.outputs.items():
        result[name] = torch.from_numpy(video).permute(0, 3, 1, 2)
        if "rows_from" in spec:  # the published code never draws a point in row 0
            k = spec["rows_from"]
            result[name] = torch.cat([case.expected(name)[:, :, :k], result[name][:, :, k:]], dim=2)
    return result


def das_train_step(case):
    """One step of das.py from given latents, noise and steps, up to the gradients."""
    call = case.call
    net = fill(dit.CogVideoX(cogvideox_config(case.config)), case.params, case.left_as_built)
    das.train_branch(net, torch.float32)
    if call["mode"] == "train":
        net.train()
    x0, image, tracking, first_track, noise = (swapped(case.input(name)) for name in (
        "video_latents", "image_latent", "tracking_latents", "tracking_image_latent", "noise"))
    if call["image_conditions_dropped"]:
        image, first_track = 0 * image, 0 * first_track
    seen = []
    net.register_forward_hook(lambda module, args, out: seen.append(out))
    cond = {"first_frame": image, "tracks": tracking, "first_track": first_track}
    loss = das.branch_loss(net, cogvideox_schedule(call["scheduler"]), x0, noise, case.input("timestep"),
                           case.input("text"), cond).mean()
    loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    if wrong := set(grads) ^ set(case.outputs["grad_norms"]["names"]):
        raise ValueError(f"{len(wrong)} parameters should (not) be trained: {min(wrong)}")
    result = {"loss": loss[None], "model_out": swapped(seen[0])}
    for name, spec in case.outputs.items():
        if name == "grad_norms":
            result[name] = torch.stack([grads[k].norm() for k in spec["names"]])
        elif name.startswith("grad."):
            result[name] = grads[name.removeprefix("grad.")]
    return result


# ---- Wan. Its tensors are (b,c,f,h,w), as ours

def wan_config(config):
    """Our WanConfig for the arguments of the original's WanModel."""
    published = {"patch_size": [1, dit.PATCH, dit.PATCH], "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6}
    if other := {k: config[k] for k in published if config[k] != published[k]}:
        raise Unsupported(f"Wan with {other}")
    return dit.WanConfig(
        in_channels=config["in_dim"], out_channels=config["out_dim"], dim=config["dim"], ffn_dim=config["ffn_dim"],
        heads=config["num_heads"], num_layers=config["num_layers"], freq_dim=config["freq_dim"],
        text_dim=config["text_dim"], text_length=config["text_len"])


def wan_network(case):
    """The Wan of a case, filled. Only generation 2.1 has the image branch."""
    cfg, kind = wan_config(case.config), case.config["model_type"]
    if case.call["generation"] == "2.1" and kind in ("i2v", "flf2v"):
        cfg = dataclasses.replace(cfg, image_dim=1280, image_positions=514 if kind == "flf2v" else 0)
    net = fill(dit.Wan(cfg), case.params, case.left_as_built)
    with torch.no_grad():
        for name, factor in vars(case).get("param_scale", {}).items():
            net.state_dict()[name].mul_(factor)
    return net


def wan_given(case, prefix=""):
    """(x, t, text) and conditions of one of a case's runs; x and t are None where it has none."""
    x, y, t, text, clip = (case.input(prefix + name) for name in ("x", "y", "t", "text", "clip_fea"))
    image = None if clip is None else clip.reshape(len(text), -1, clip.shape[-1])  # FLF2V: two images
    return (x, t, text), {"first_frame": y, "image": image}


def wan_forward(case):
    net, result, seen = wan_network(case), {}, {}

    def watch(name, key, what=lambda out: out):
        def hook(module, args, out):
            seen.setdefault(key, what(out))
        if name in dict(net.named_modules()):
            net.get_submodule(name).register_forward_hook(hook)

    def of_time(out):  # (b,k,...): of the sample, or of its first and last token
        return out[:, 0] if out.shape[1] == 1 else out[:, [0, -1]]
    watch("patch_embedding", "patch_tokens", lambda out: out.flatten(2).transpose(1, 2))
    watch("time_embedding", "time_embedding", of_time)
    watch("time_projection", "time_projection", lambda out: of_time(out).unflatten(-1, (6, -1)))
    watch("text_embedding", "text_context", lambda out: out[:, :24])
    watch("img_emb.proj", "image_context", lambda out: out[:, :24])
    watch("blocks.0.self_attn", "block0_self_attn")
    watch("blocks.0.cross_attn", "block0_cross_attn")
    watch("blocks.0", "block0", lambda out: out.flatten(1, 2))
    watch("head", "head_tokens", lambda out: out.flatten(1, 2))
    for run in case.call["runs"]:
        seen.clear()
        given, cond = wan_given(case, run["prefix"])
        with torch.no_grad():
            seen["out"] = net(*given, **cond)
        result |= {run["prefix"] + name: value for name, value in seen.items()}
    return result


def wan_train_step(case):
    net, (_, cond) = wan_network(case).train(), wan_given(case)
    if case.call["loss"] != "mse_velocity" or case.call["num_train_timesteps"] != 1000:
        raise Unsupported(f"loss {case.call['loss']}")
    x0, noise, sigma = case.input("x0"), case.input("noise"), case.input("sigma")
    s, start = sigma.view(-1, 1, 1, 1, 1), 0
    x_t, t = (1 - s) * x0 + s * noise, 1000 * sigma
    if case.call["first_frame_clean"]:
        start = 1
        x_t[:, :, 0] = x0[:, :, 0]
        t = t[:, None].repeat(1, x0.shape[2])  # a timestep per latent frame
        t[:, 0] = 0
    out = net(x_t, t, case.input("text"), **cond)
    loss = (out - (noise - x0))[:, :, start:].square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    result = {"x_t": x_t, "model_out": out, "loss": loss[None],
              "grad_norms": torch.stack([grads[k].norm() for k in case.outputs["grad_norms"]["names"]])}
    return result | {name: grads[name.removeprefix("grad.")] for name in case.outputs
                     if name.startswith("grad.")}


def wan_pipeline(case):
    """Through our own conditions() and rollout(), with the text and CLIP features that are given."""
    call, config = case.call, case.config
    fixed(call, mode="eval", dtype="float32")
    fixed(config["scheduler"], num_train_timesteps=1000, solver_order=2)
    task, samplers = call["task"], {"unipc": "flow-unipc", "dpm++": "flow-dpmpp", "euler_wan": "rflow"}
    if call["sampler"] not in samplers:
        raise Unsupported(f"sampler {call['sampler']}")
    cfg, two = wan_config(config["transformer"]), call["boundary"] is not None
    cfg = dataclasses.replace(cfg, image_dim=1280 if task == "i2v" else 0)
    low_cfg, high_cfg = call["guidance"] if two else (None, call["guidance"])
    area = call.get("max_area") or math.prod(call["size"])
    settings = bases.Sampling(
        frames=call["frames"], height=area, width=1, sampler=samplers[call["sampler"]], spacing="wan",
        sample_steps=call["num_inference_steps"], cfg=high_cfg, low_cfg=low_cfg, boundary=call["boundary"],
        shift=config["scheduler"]["shift"], negative="negative")
    row = bases.Row("", cfg, wan_vae_config(config["vae"], call["vae_generation"]), text_encoders.UMT5_XXL,
                    dict(name="flow"), settings, image=text_encoders.WAN_CLIP, keeps_first=task == "ti2v")

    def part(name, module):
        params = {k.removeprefix(f"{name}."): v for k, v in case.params.items() if k.startswith(f"{name}.")}
        prefix = "" if f"{name}." in case.fill_strip else f"{name}."  # so that the two experts differ
        return fill(module, params, case.left_as_built, terms=lambda key: [{"prefix": prefix, "coef": 1.0}])
    networks = ("transformer_high", "transformer_low") if two else ("transformer",)
    nets = [part(name, dit.Wan(cfg)) for name in networks]

    class Tower:
        def tokens(self, images):
            return case.input("clip_fea")
    base = bases.Base("oracle", row, nets[0], part("vae", vae.WanVAE(row.vae)), None, diffusion.Flow(), None,
                      Tower() if task == "i2v" else None, low_net=nets[-1] if two else None)
    for prompt, name in (("prompt", "prompt_embeds"), ("negative", "negative_prompt_embeds")):
        text = case.input(name)
        base.encoded[prompt, False] = F.pad(text, (0, 0, 0, cfg.text_length - len(text)))

    seen = []

    def watch(module, given, out):
        c, u = out.chunk(2)
        v = u + (low_cfg if two and module is nets[1] else high_cfg) * (c - u)
        seen.append((module is nets[0], given[0][:1], given[1][:1], v[0]))
    for net in nets:
        net.register_forward_hook(watch)
    env, picture = common.Env(0, 1, torch.device("cpu"), torch.float32), None
    if case.input("image") is not None:
        picture = pipeline.frame_picture(case.input("image"))
    with torch.no_grad(), mock.patch.dict(bases.BASES, {"oracle": row}):
        size = call["size"]
        if picture is not None and list(bases.size_for_image("oracle", *case.input("image").shape[1:])) != size:
            raise ValueError(f"another size than {size}")
        settings = dataclasses.replace(settings, height=size[0], width=size[1])
        cond, _ = pipeline.conditions(base, env, settings, [picture])
        latents = pipeline.rollout(nets[0], base, ["prompt"], case.input("init_noise")[None], settings, None, cond)
        video = base.vae.decode(latents)[0]
    high, states, times, velocities = zip(*seen)
    tokens = math.prod(states[0].shape[3:]) // dit.PATCH ** 2
    result = {"timesteps": torch.stack([t.max() for t in times]), "expert": torch.tensor(high).byte(),
              "first_input": states[0][0], "first_timesteps": times[0].repeat_interleave(tokens, dim=-1),
              "first_v": velocities[0], "last_v": velocities[-1], "final_latents": latents[0],
              "video": video.clamp(-1, 1), "video_raw": video}
    if "first_frame" in cond:
        result["condition"] = cond["first_frame"][0]
    return {name: result[name] for name in case.outputs if name in result}


def wan_rope_rows(case, head_dim, grid, at, theta):
    if theta != 10000:
        raise Unsupported(f"rope with theta {theta}")
    return {name: table[case.input(at)] for name, table in
            zip(("cos", "sin"), dit.wan_rope(*grid, head_dim))}


def wan_timestep_rows(case, dim, timestep):
    return {"table": models.sinusoidal(torch.tensor(timestep), dim, torch.float64)}


def wan_positions(case):
    return tables_of_rows(case, {"rope": wan_rope_rows, "timestep_sinusoid": wan_timestep_rows})


def wan_lora(case):
    """The same adapter as several public files, each loaded as sample.py --lora does."""
    given, cond = wan_given(case)
    result = {}

    def answer(net):
        with torch.no_grad():
            return net(*given, **cond)
    result["out_plain"] = answer(wan_network(case))
    with safe_open(case.path.with_suffix(".safetensors"), "pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}
    for kind, spec in case.call["files"].items():
        file = {k.removeprefix(spec["prefix"]): v for k, v in tensors.items() if k.startswith(spec["prefix"])}
        if len(file) != spec["keys"]:
            raise ValueError(f"{kind}: {len(file)} keys instead of {spec['keys']}")
        net = wan_network(case)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{kind}.safetensors")
            save_file(file, path)
            models.merge_public_lora(net, path, case.call["scale"])
        out, theirs = answer(net), case.expected(spec["output"])
        old = result.get(spec["output"])  # several files have one answer: keep the worst
        if old is None or error(out, theirs) > error(old, theirs):
            result[spec["output"]] = out
    return result


def umt5_forward(case):
    c = case.config
    if c["num_buckets"] != 32 or c["shared_pos"]:
        raise Unsupported("UMT5 with shared positions, or other buckets")
    cfg = text_encoders.T5Config(
        umt5=True, mask=True, vocab_size=c["vocab_size"], width=c["dim"], heads=c["num_heads"],
        head_dim=c["dim_attn"] // c["num_heads"], hidden=c["dim_ffn"], layers=c["encoder_layers"])
    net = fill(text_encoders.T5Text(cfg), case.params, case.left_as_built, text_encoders.umt5_name)
    result, ids = {}, case.input("input_ids")
    for run in case.call["runs"]:
        masked = run["mask"] == "nonzero_ids"
        if not run["zero_pads"]:  # before the rows are set to zero
            net.cfg = dataclasses.replace(cfg, umt5=False, mask=masked)
        with torch.no_grad():
            result[run["to"]] = net(ids)
        net.cfg = cfg
    return result


def wan_clip(case):
    c, call = case.config, case.call
    expected = {"pool_type": "token", "pre_norm": True, "post_norm": False, "activation": "gelu"}
    if other := {k: c[k] for k in expected if c[k] != expected[k]}:
        raise Unsupported(f"CLIP with {other}")
    if (tuple(call["mean"]), tuple(call["std"])) != (data.CLIP_MEAN, data.CLIP_STD):
        raise Unsupported("another mean or deviation")
    if c["mlp_ratio"] != 4:
        raise Unsupported(f"an MLP {c['mlp_ratio']} times as wide")
    cfg = text_encoders.CLIPConfig(
        embed_dim=0, image_size=c["image_size"], vision_layers=c["num_layers"] - 1, vision_width=c["dim"],
        vision_head_width=c["dim"] // c["num_heads"], patch_size=c["patch_size"])
    with torch.device("meta"):
        net = text_encoders.OpenCLIPVision(cfg)
    state = {name: fill_tensor(name, shape) for name, shape in case.params.items()}
    weights.load_strict(net, text_encoders.image_state(state, net, "case"), "case")
    pixels = data.clip_square(case.input("image"), c["image_size"])
    with torch.no_grad():
        return {"preprocessed": pixels, "features": net.tokens(pixels)}


def umt5_table(case):
    if other := {row["op"] for row in case.rows} - {"text_clean"}:
        raise Unsupported(f"a table of {other}")
    return {f"{i}.text": text_encoders.clean_text(**row["inputs"]) for i, row in enumerate(case.rows)}


# the same word may mean another computation in another system, so both choose the function
KINDS = {
    ("dit_forward", "stdit3"): stdit3_forward,
    ("vae_encode_decode", "opensora_vae"): opensora_vae,
    ("vae_encode_decode", "wan_vae"): wan_vae_steps,
    ("rectified_flow", "rflow"): rectified_flow,
    ("sampler_trajectory", "wan_sampler"): wan_sampler,
    ("schedule", "wan_sampler"): wan_schedule,
    ("loss", "wan_sampler"): wan_flow_loss,
    ("train_timesteps", "wan_sampler"): wan_train_timesteps,
    ("rollout_gradient", "vader"): rollout_gradient,
    ("text_forward", "dreamvideo"): text_with_vectors,
    ("image_tower_forward", "dreamvideo"): image_tower,
    ("annotator_forward", "tft2v_unet"): annotator,
    ("metric", "dreamvideo"): subject_metrics,
    ("image_transform", "dreamvideo"): image_steps,
    ("image_transform", "vgen_data"): image_items,
    ("table", "dreamvideo"): table,
    ("table", "vgen_data"): table,
    ("unet_forward", "modelscope_unet"): unet_forward,
    ("unet_forward", "i2vgen_unet"): unet_forward,
    ("unet_forward", "sr600_unet"): unet_forward,
    ("unet_forward", "demo_unet"): unet_forward,
    ("unet_forward", "vc2_unet"): videocrafter_forward,
    ("unet_forward", "t2v_turbo_unet"): videocrafter_forward,
    ("unet_forward", "dreamvideo"): vgen_forward,
    ("unet_forward", "higen_unet"): vgen_forward,
    ("unet_forward", "tft2v_unet"): vgen_forward,
    ("unet_forward", "videolcm"): vgen_forward,
    ("motion_block", "demo_unet"): motion_block,
    ("init_from_base", "demo_unet"): init_from_base,
    ("lora", "instructvideo"): instructvideo_lora,
    ("train_step", "instructvideo"): instructvideo_step,
    ("table", "instructvideo"): table,
    ("lora", "t2v_turbo_unet"): turbo_lora,
    ("fourier_filter", "sr600_unet"): fourier,
    ("adapter_merge", "dreamvideo"): adapter_merge,
    ("train_step", "dreamvideo"): train_step_dreamvideo,
    ("pipeline", "higen_unet"): higen_two_pass,
    ("train_step", "modelscope_unet"): train_step_t2v,
    ("vae_encode_decode", "sd_vae"): vae_encode_decode,
    ("text_forward", "clip_embedders"): text_forward,
    ("text_forward", "demo_text"): text_forward,
    ("table", "clip_embedders"): table,
    ("loss", "vgen_ddim"): loss_diffusion,
    ("sampler_trajectory", "vgen_ddim"): sampler_trajectory,
    ("sampler_trajectory", "demo_sampler"): sampler_trajectory,
    ("schedule", "vgen_ddim"): schedule_tables,
    ("schedule", "demo_sampler"): schedule_tables,
    # samplers of the UNet family
    ("schedule", "vc2_ddim"): videocrafter_schedule,
    ("sampler_trajectory", "vc2_ddim"): videocrafter_sampler,
    ("schedule", "turbo_lcm"): videocrafter_schedule,
    ("sampler_trajectory", "turbo_lcm"): videocrafter_sampler,
    ("sampler_trajectory", "dreamvideo"): sampler_ops,
    ("sampler_trajectory", "videolcm"): sampler_ops,
    ("schedule", "higen_unet"): appearance_schedule,
    ("pipeline", "vgen_ddim"): sr600_pipeline,
    ("reward", "rewards"): reward_losses,
    ("reward_heads", "rewards"): reward_heads,
    ("reward_detection", "rewards"): reward_detection,
    ("clip_forward", "rewards"): clip_forward,
    ("loss", "videodpo"): dpo_loss,
    ("train_step", "videodpo"): dpo_step,
    ("table", "videodpo"): videodpo_table,
    # CogVideoX and Diffusion as Shader
    ("dit_forward", "cogvideox_dit"): cogvideox_forward,
    ("dit_forward", "das_dit"): cogvideox_forward,
    ("position_table", "cogvideox_dit"): position_table,
    ("vae_encode_decode", "cogvideox_vae"): cogvideox_vae_steps,
    ("text_forward", "cogvideox_t5"): t5_forward,
    ("sampler_trajectory", "cogvideox_sampler"): cogvideox_sampler,
    ("schedule", "cogvideox_sampler"): cogvideox_tables,
    ("loss", "cogvideox_sampler"): cogvideox_loss,
    ("pipeline", "das_pipeline"): das_pipeline,
    ("train_step", "das_dit"): das_train_step,
    ("camera_path", "das_tracking"): camera_paths,
    ("projection", "das_tracking"): projections,
    ("object_motion", "das_tracking"): object_motions,
    ("draw_tracks", "das_tracking"): drawings,
    # Wan
    ("dit_forward", "wan_dit"): wan_forward,
    ("train_step", "wan_dit"): wan_train_step,
    ("position_table", "wan_dit"): wan_positions,
    ("lora_files", "wan_dit"): wan_lora,
    ("pipeline", "wan_pipeline"): wan_pipeline,
    ("text_forward", "wan_t5"): umt5_forward,
    ("table", "wan_t5"): umt5_table,
    ("clip_image_forward", "wan_clip"): wan_clip,
}


# ---- DEMO

def toy_flow(a, b):
    return torch.stack([(b - a).mean(1), (a * b).mean(1)], dim=1)


def flow_of(case):
    """The flow that the case names: the toy, or RAFT filled by the rule."""
    if case.call.get("antialias"):
        raise Unsupported("flow resized with antialiasing")
    if case.call["flow"] == "toy":
        return toy_flow
    if case.call["flow"] != "raft_small" or case.call.get("flow_updates", 12) != 12:
        raise Unsupported(f"flow {case.call['flow']}, {case.call.get('flow_updates')} updates")
    from torchvision.models.optical_flow import raft_small
    state = {name: fill_tensor(name, value.shape) if value.is_floating_point() and value.ndim else value
             for name, value in raft_small().state_dict().items()}
    with mock.patch.object(data, "hub_weights", return_value=state):
        return data.raft("small", "weights of the rule")


def loss_demo(case):
    """One of DEMO's losses and its gradients."""
    result, loss = {}, case.call["loss"]
    wrt = {spec["wrt_input"] for spec in case.outputs.values() if "wrt_input" in spec}
    given = {name: case.input(name) for name in case.inputs}
    given = {name: x.requires_grad_() if name in wrt else x for name, x in given.items()}
    if loss == "video_motion":
        schedule = diffusion_schedule(next(iter(case.config["diffusions"].values())))
        x0, noise, t, out = (given[k] for k in ("x0", "noise", "t", "pred"))
        result["x_t"] = schedule.add_noise(x0, noise, t)
        result["diffusion_loss"] = diffusion.diffusion_loss(lambda *_: out, schedule, x0, noise, t)
        result["video_motion_loss"] = demo.video_motion_loss(out, schedule.target(x0, noise, t))
        losses = {"grad_diffusion": "diffusion_loss", "grad_video_motion": "video_motion_loss"}
    elif loss == "text_motion":
        maps = [given[f"map.{i}"] for i in range(sum(name.startswith("map.") for name in given))]
        flow = flow_of(case)
        real = data.frame_flow(flow, given["video"].transpose(1, 2), case.call["map_resize"])
        result["loss"] = demo.text_motion_loss(maps, real, flow)
        losses = dict.fromkeys((name for name in case.outputs if name.startswith("grad")), "loss")
    elif loss == "regularization":
        result["loss"] = demo.regularization_loss(given["eot_tokens"], given["image_embeddings"])
        losses = {"grad": "loss"}
    else:
        raise Unsupported(f"loss {loss}")
    for name, of in losses.items():
        if name in case.outputs:
            source = given[case.outputs[name]["wrt_input"]]
            result[name] = part(torch.autograd.grad(result[of].mean(), source, retain_graph=True)[0],
                                case.outputs[name])
    return result


def train_step_demo(case):
    if case.call["method"] != "demo":
        raise Unsupported(f"train_step of method {case.call['method']}")
    net = vgen_unet(case.call["network"], case.config["unet"], case.params, case.left_as_built)
    net.requires_grad_(False)
    for module in net.modules():
        if isinstance(module, models.MotionBlock):
            module.requires_grad_(True)
    net.grad_ckpt = True
    schedule, flow = diffusion_schedule(case.config["diffusion"]), flow_of(case)
    x0, noise, t, text, eot, image = (
        case.input(name) for name in ("x0", "noise", "t", "y", "eot_idx", "image_embeddings"))
    real = data.frame_flow(flow, case.input("video").transpose(1, 2), case.call["map_resize"])
    result, grads = {}, {}
    for maps in ("attached", "detached"):
        motion = case.input("temporal_y").requires_grad_()
        net.zero_grad()
        terms = demo.demo_losses(
            lambda x, t, motion=motion: net(x, t, text, motion_text=motion, eot=eot), schedule, x0, noise, t,
            real, flow, motion[torch.arange(len(eot)), eot], image, detach=maps == "detached")
        weights = {"diffusion": 1.0} | case.config["weights"]
        total = sum(weights[name] * term for name, term in terms.items()).mean()
        total.backward()
        result |= terms | {"total": total}
        grads[maps] = {"temporal_y": motion.grad} | {
            name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    for name, spec in case.outputs.items():
        if name in result:
            continue
        found = grads[spec["maps"]]
        if isinstance(spec.get("value"), dict):
            norms = {key: found[key].norm().item() for key in spec["value"]}
            # of a bias that a normalisation removes both sides hold rounding errors alone (train_step_t2v)
            noise = torch.finfo(torch.float32).eps * max(norms.values())
            result[name] = {key: theirs if max(norms[key], theirs) < noise else norms[key]
                            for key, theirs in spec["value"].items()}
        else:
            result[name] = gradient(found, spec)
    return result


def onecycle(config, update):
    if config.get("decay_mom_rate"):
        raise Unsupported("a momentum that decays")
    if config["cycle_first_step_size"] != config["cycle_second_step_size"]:
        raise Unsupported("unequal halves of the cycle")
    lr, beta1, beta2 = demo.onecycle(
        update - 1, config["cycle_min_lr"], config["cycle_max_lr"], config["cycle_first_step_size"],
        config["decay_lr_rate"], config["decay_step_size"],
        (config["cycle_min_mom"], config["cycle_max_mom"]))
    return {"lr": [lr] * len(config["groups"]), "beta1": beta1, "beta2": beta2}


TABLES["onecycle"] = onecycle
KINDS |= {
    ("loss", "demo_losses"): loss_demo,
    ("train_step", "demo_losses"): train_step_demo,
    ("table", "demo_losses"): table,
}


# ---- VideoLCM

def train_step_videolcm(case):
    config, nets, seen = case.config, {}, {}
    if case.call["method"] != "videolcm":
        raise Unsupported(f"train_step of method {case.call['method']}")
    if (config["sigma_data"], config["timestep_scaling"]) != (0.5, 10) or case.call["trainable"] != "all":
        raise Unsupported("other boundary scalings, or a part of the weights")
    for name, spec in case.networks.items():
        cut, terms = spec["key_prefix"], [{"prefix": spec["rule_prefix"], "coef": 1.0}]
        params = {k.removeprefix(cut): v for k, v in case.params.items() if k.startswith(cut)}
        net = models.UNet3D(vgen_config(case.call["network"], config["unet"]))
        nets[name] = fill(net, params, case.left_as_built, terms=lambda key, terms=terms: terms)
    schedule = make_schedule(config["schedule"], {"zero_terminal_snr": config["zero_terminal_snr"]},
                             config["prediction"])
    result = {}
    for output, run in case.call["runs"].items():
        x0, noise, n, text, null = (
            case.input(run[k]) for k in ("latents", "noise", "index", "y", "y_negative"))

        def spoken(name, text=text):
            def fn(x, t):
                seen[name] = x, t
                return nets[name](x, t, text)
            return fn
        teacher = diffusion.guided(nets["teacher"], text, null.expand(len(x0), -1, -1), 1 + config["w"])
        loss, jump = videolcm.consistency_step(
            spoken("student"), teacher, spoken("target"), schedule, x0, noise, n, config["ddim_timesteps"],
            config["huber_c"])
        result[output] = loss.mean()[None]
        if output == case.call["grad_of"]:
            nets["student"].zero_grad()
            result[output].mean().backward()
            grads = dict(nets["student"].named_parameters())
            names = case.params if case.outputs["grad_norms"]["names"] == "params" else (
                case.outputs["grad_norms"]["names"])
            zero = torch.zeros(())
            result["grad_norms"] = torch.stack([
                zero if grads[k].grad is None else grads[k].grad.norm() for k in names])
            result |= {"noisy": seen["student"][0], "x_prev": seen["target"][0], "model_pred": jump,
                       "start_timesteps": seen["student"][1], "timesteps": seen["target"][1]}
    if "w_embedding" in case.outputs:
        w = torch.full((len(x0),), float(config["w"]))
        result["w_embedding"] = models.guidance_embedding(w, case.expected("w_embedding").shape[-1])
    return result


KINDS["train_step", "videolcm"] = train_step_videolcm


# ---- policy gradients

PROCESSES = {"ddim": ("ddim", "eta"), "flow_sde": ("flow", "noise_level"), "dance_sde": ("dance", "eta"),
             "flow_cps": ("cps", "noise_level")}


def process_of(config):
    """(kind, level) of the noise, in our words."""
    if config["process"] not in PROCESSES:
        raise Unsupported(f"process {config['process']}")
    kind, level = PROCESSES[config["process"]]
    return kind, config[level]


def policy_schedule(config):
    if config["process"] != "ddim":
        return diffusion.Flow()
    fixed(config, beta_schedule="scaled_linear", spacing="leading")
    return diffusion.make_schedule(
        "linear_sd", config["prediction"], zero_snr=config.get("zero_snr", False), num=config["num_train_timesteps"],
        first=config["linear_start"], last=config["linear_end"])


def policy_steps(case, config):
    """[(t, t_next)] of the rows of a case: by t on DDIM's grid, or by index into the levels."""
    if config["process"] == "ddim":
        step = config["num_train_timesteps"] // config["steps"]
        return [(t, max(t - step, 0)) for t in case.input("t").tolist()]
    sigmas, index = case.input("sigmas").double(), case.input("index").tolist()
    return [(1000 * sigmas[i].item(), 1000 * sigmas[i + 1].item()) for i in index]


def published_log_prob(config, x_next, mean, std):
    """CPS as published: minus the mean square, no density."""
    if config["process"] == "flow_cps":
        return -(x_next - mean).square().flatten(1).mean(1)
    return diffusion.log_prob(x_next, mean, std)


def sde_step(case):
    result, x, out, noise = {}, case.input("x"), case.input("out"), case.input("noise")
    for name, variant in case.config["variants"].items():
        config, rows = case.config | variant, []
        schedule, sample = policy_schedule(config), case.input(f"{name}.sample")
        for r, step in enumerate(policy_steps(case, config)):
            one = slice(r, r + 1)
            mean, std = diffusion.gaussian_step(schedule, out[one], x[one], *step, *process_of(config))
            rows.append((mean, torch.tensor([std]), published_log_prob(config, sample[one], mean, std),
                         mean + std * noise[one], schedule.to_x0(out[one], x[one], step[0])))
        for quantity, column in zip(("mean", "std", "log_prob", "next", "x0"), zip(*rows)):
            result[f"{name}.{quantity}"] = torch.cat(column)
    return result


def channel_tanh(case, lora, cfg, t=None, uncond_grad=True):
    """The toy with guidance: fn(x, t). lora: what is added to its matrix; t: what it is given in a call
    instead, a list."""
    toy, calls = case.toy, iter(t or ())
    if toy["name"] != "channel_tanh":
        raise Unsupported(f"toy {toy['name']}")

    def net(x, t, text):
        mixed = torch.einsum("ij,bjfhw->bifhw", case.input("base_w") + lora, x)
        shift = t.view(-1, 1, 1, 1, 1) / toy["t_div"] + text.flatten(1).mean(1).view(-1, 1, 1, 1, 1)
        return toy["skip"] * x + toy["gain"] * torch.tanh(toy["inner"] * mixed + shift)

    def fn(x, now, rows=slice(None)):
        now = torch.full((len(x),), next(calls)) if t is not None else now
        cond, uncond = case.input("cond")[rows], case.input("uncond")[rows]
        if uncond_grad or cfg == 1:
            return diffusion.guided(net, cond, uncond, cfg)(x, now)
        return diffusion.guided(lambda x, t, text: text, net(x, now, cond), net(x, now, uncond).detach(), cfg,
                                sequential=True)(x, now)
    return fn


def sde_trajectory(case):
    config, x_T, noise = case.config, case.input("x_T"), case.input("step_noise")
    schedule, (kind, level), t, n = policy_schedule(config), process_of(config), None, config["calls"]
    result = {}
    if config["process"] == "ddim":
        step = config["num_train_timesteps"] // config["steps"]
        updates = [(1 + k * step, max(1 + (k - 1) * step, 0)) for k in reversed(range(n))]
        result["timesteps"] = torch.tensor([t for t, _ in updates])
    else:
        t = case.input("t").tolist()
        if "shift" in config:
            sigmas = diffusion.flow_levels("euler", config["steps"], config["shift"])[1]
            result["sigmas"] = torch.tensor(sigmas)
        else:
            sigmas = case.input("sigmas").tolist()
        updates = [(1000 * a, 1000 * b) for a, b in zip(sigmas, sigmas[1:])]
        result["timesteps"] = torch.tensor([now for now, _ in updates])

    def rolled(level):
        fn = channel_tanh(case, case.input("lora_w"), config["cfg"], t)
        with mock.patch.object(diffusion, "randn_like", side_effect=noise):
            return diffusion.recorded(fn, x_T, schedule, updates, range(n), kind, level, None)
    states, log_probs = rolled(level)

    def rescored(weights):
        fn, rows = channel_tanh(case, case.input(weights), config["cfg"], t), []
        for i, step in enumerate(updates):
            mean, std = diffusion.policy(fn, schedule, states[:, i], *step, kind, level)
            rows.append(published_log_prob(config, states[:, i + 1], mean, std))
        return torch.stack(rows)
    old, new = rescored("lora_w") if kind == "cps" else log_probs.T, rescored("lora_w_new")
    result |= {"final": states[:, -1], "log_prob": old, "log_prob_new": new, "log_ratio": new - old}
    result |= {f"x_after{i}": states[:, i + 1] for i in range(n)}
    if t:  # the last call's clean estimate: a last update without noise
        result["ode"] = rolled(0.0)[0][:, -1]
        fn = channel_tanh(case, case.input("lora_w"), config["cfg"], t[-1:])
        result["decoded"], _ = diffusion.policy(fn, schedule, states[:, -2], *updates[-1], kind, 0.0)
    return result


def clipped_losses(case, fn, reference, x, x_next, steps, process, old, advantages, clip_range):
    """log pi, loss of the clipped ratio and KL, (b,) each; sample b makes steps[b]. reference: a network."""
    schedule, columns = policy_schedule(process), []
    for b, step in enumerate(steps):
        one = slice(b, b + 1)
        rows = dict(rows=one)
        mean, std = diffusion.policy(lambda x, t, rows=rows: fn(x, t, **rows), schedule, x[one], *step,
                                *process_of(process))
        new = diffusion.log_prob(x_next[one], mean, std)
        loss, _ = grpo.policy_loss(new, old[one], advantages[one], clip_range)
        kl = torch.zeros(1)
        if reference:
            with torch.no_grad():
                ref, _ = diffusion.policy(lambda x, t, rows=rows: reference(x, t, **rows), schedule, x[one], *step,
                                     *process_of(process))
            euler = process["process"] in ("flow_sde", "dance_sde")  # as published: g alone, not g sqrt(d)
            kl = grpo.gaussian_kl(mean, ref, std / ((step[0] - step[1]) / 1000) ** 0.5 if euler else std)
        columns.append((new, loss, kl))
    return [torch.cat(column) for column in zip(*columns)]


def policy_losses(case):
    result, x, x_next = {}, case.input("x"), case.input("x_next")
    old = case.input("old_log_prob")
    for name, variant in case.config["variants"].items():
        config, lora = case.config | variant, case.input("lora_w").requires_grad_()
        fn = channel_tanh(case, lora, config["cfg"], uncond_grad=config["uncond_grad"])
        reference = channel_tanh(case, 0.0, config["cfg"]) if config["kl_beta"] else None
        new, loss, kl = clipped_losses(
            case, fn, reference, x, x_next, policy_steps(case, config), config, old,
            case.input("advantages").clamp(-config["adv_clip"], config["adv_clip"]), config["clip_range"])
        total = loss.mean() + config["kl_beta"] * kl.mean()
        total.backward()
        ratio = (new - old).exp()
        result |= {f"{name}.{k}": v for k, v in dict(
            log_prob=new, log_ratio=new - old, policy_loss=loss.mean()[None], kl_loss=kl.mean()[None],
            loss=total[None], grad_lora_w=lora.grad, approx_kl=(new - old).square().mean()[None] / 2,
            clip_fraction=((ratio - 1).abs() > config["clip_range"]).float().mean()[None]).items()}
    return result


def grpo_step(case):
    """Advantages, which clips and steps are trained, and the accumulated gradients."""
    c, lora = case.config, case.input("lora_w").requires_grad_()
    steps, groups, size = c["steps"], c["groups"], c["num_generations"]
    sigmas, times = case.input("sigmas").tolist(), case.input("t").tolist()
    latents, old, perms = (case.input(k) for k in ("latents", "old_log_prob", "perms"))
    keys = [n // size if c["use_group"] else 0 for n in range(groups * size)]
    parts = {name: grpo.group_advantages(
        case.input(name), keys, "group", c["std_eps"], int(c["std"] == "unbiased")) for name in c["coefficients"]}
    order = list(range(groups * size))
    if c["best_of_n"]:
        total = sum(weight * parts[name] for name, weight in c["coefficients"].items())
        chosen = grpo.best_and_worst(total, c["best_of_n"])
        order = case.input("order").tolist()
        if sorted(order) != sorted([*chosen[0], *chosen[1]]):
            raise ValueError(f"clips {chosen} instead of {order}")
    grads, total_loss = [], 0.0
    trained = max(1, int((steps - 1) * c["timestep_fraction"]))
    for place, n in enumerate(order):
        for i in perms[place].tolist()[:trained]:
            one = slice(n, n + 1)
            fn = channel_tanh(case, lora, c["cfg"], [times[i]])
            step = [(1000 * sigmas[i], 1000 * sigmas[i + 1])]
            mean, std = diffusion.policy(lambda x, t, fn=fn, one=one: fn(x, t, one), policy_schedule(c),
                                    latents[one, i], *step[0], *process_of(c))
            new = diffusion.log_prob(latents[one, i + 1], mean, std)
            loss = sum(weight * grpo.policy_loss(
                new, old[one, i], parts[name][one].clamp(-c["adv_clip"], c["adv_clip"]), c["clip_range"])[0]
                for name, weight in c["coefficients"].items())
            loss = loss.sum() / (c["gradient_accumulation_steps"] * trained)
            loss.backward()
            total_loss += loss.item()
        if (place + 1) % c["gradient_accumulation_steps"] == 0:
            grads.append(lora.grad.clone())
            lora.grad = None
    return {"grad": torch.stack(grads), "grad_norm": grads[-1].norm()[None],
            "total_loss": torch.tensor([total_loss])}


def advantages_row(rewards, groups, std, eps, over="group"):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return grpo.group_advantages(rewards, groups, over, eps, int(std == "unbiased"))


def mixed_row(rewards, weights, sum, trimmed=0.0, **how):
    if trimmed:  # debug
        return {}
    weights = weights if isinstance(weights, dict) else dict(zip(rewards, weights))
    if sum == "rewards":
        mixed = [torch.tensor(r, dtype=torch.float64) * weights[name] for name, r in rewards.items()]
        return {"advantages": advantages_row(torch.stack(mixed).sum(0).tolist(), **how)}
    parts = [weights[name] * advantages_row(r, **how) for name, r in rewards.items()]
    return {"advantages": torch.stack(parts).sum(0)}


def best_row(scores, n):
    best, worst = grpo.best_and_worst(scores, n)
    return {"best": best, "worst": worst}


def tracker_row(buffer_size, min_count, eps, updates):
    if eps != 1e-6:
        raise Unsupported(f"a tracker's eps {eps}")
    tracker = instructvideo.PromptStatistics(buffer_size, min_count)
    advantages = [tracker.update(u["prompts"], u["rewards"]) for u in updates]
    past = [tracker.past[prompt] for prompt in sorted(tracker.past)]
    return {"advantages": advantages, "count": [len(p) for p in past], "mean": [np.mean(p) for p in past],
            "std": [np.std(p) for p in past]}


def ema_row(start, values, decay, every):
    ema, seen = {"w": torch.tensor(start, dtype=torch.float64)}, []
    for i, value in enumerate(values):
        if (i + 1) % every == 0:
            now = {"w": torch.tensor(value, dtype=torch.float64)}
            common.move_average(ema, now, min((1 + i) / (10 + i), decay))
        seen.append(ema["w"].item())
    return {"ema": seen}


def grpo_table(case):
    functions = {"group_advantages": lambda **row: {"advantages": advantages_row(**row)},
                 "mixed_rewards": mixed_row, "best_of_n": best_row, "prompt_tracker": tracker_row,
                 "ema": ema_row, "zero_std": lambda **row: {}}  # debug
    result = {}
    for i, row in enumerate(case.rows):
        if row["op"] not in functions:
            raise Unsupported(f"a table of {row['op']}")
        result |= {f"{i}.{k}": v for k, v in functions[row["op"]](**row["inputs"]).items()}
    return result


KINDS |= {
    ("sde_step", "grpo"): sde_step,
    ("sde_trajectory", "grpo"): sde_trajectory,
    ("policy_loss", "grpo"): policy_losses,
    ("train_step", "grpo"): grpo_step,
    ("table", "grpo"): grpo_table,
}


# ---- grading

def error(ours, theirs):
    """max|ours - theirs| / max|theirs|; infinite for another shape or text, or what is not finite."""
    if isinstance(theirs, dict):
        return max((error(ours[k], v) if k in ours else np.inf for k, v in theirs.items()), default=0.0)
    if isinstance(theirs, str) or theirs is None or isinstance(theirs, bool):
        return 0.0 if ours == theirs else np.inf
    ours, theirs = (torch.as_tensor(v).detach().double() for v in (ours, theirs))
    if ours.shape != theirs.shape:
        return np.inf
    difference = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
    if difference == 0:
        return 0.0
    relative = difference / (theirs.abs().max().item() or 1.0)
    return relative if np.isfinite(relative) else np.inf


def largest(*values):
    return max(torch.as_tensor(v).detach().abs().max().item() for v in values)


def run(path, verbose=False):
    """Run a case: (`system/case`, largest error of its required outputs, ok|FAIL|unsupported, remarks)."""
    path = Path(path)
    label, worst, compared = f"{path.resolve().parent.name}/{path.stem}", 0.0, 0
    found = {"failed": [], "no counterpart": [], "skipped": [], "rounding noise": [], "debug differs": []}
    try:
        case = Case(path)
        label = f"{case.system}/{path.stem}"
        if (case.kind, case.system) not in KINDS:
            raise Unsupported(f"kind {case.kind} of {case.system}")
        ours = KINDS[case.kind, case.system](case)
        for name, spec in case.outputs.items():
            if ours.get(name) is None:
                if spec["check"] != "debug":
                    found["skipped" if spec["check"] == "as_published" else "no counterpart"].append(name)
                continue
            theirs = case.expected(name)
            compared += 1
            e = error(ours[name], theirs)
            if e <= spec["tol"]:
                worst = max(worst, e) if spec["check"] == "required" else worst
            elif np.isfinite(e) and largest(ours[name], theirs) < case.noise.get(name, 0.0):
                found["rounding noise"].append(name)
            elif spec["check"] == "as_published":
                found["skipped"].append(name)
            elif spec["check"] == "debug":
                if verbose:
                    found["debug differs"].append(f"{name} {e:.1e}")
            else:
                worst = max(worst, e)
                found["failed"].append(f"{name} {e:.1e} > {spec['tol']:.0e}")
    except Unsupported as reason:
        return label, np.nan, "unsupported", str(reason)
    except Exception as fault:  # noqa: BLE001
        if verbose:
            traceback.print_exc()
        return label, np.nan, "FAIL", f"{type(fault).__name__}: {fault}".splitlines()[0]
    status = "ok" if compared else "empty"
    status = "FAIL" if found["failed"] else "unsupported" if found["no counterpart"] else status
    remarks = [f"{what}: {', '.join(names)}" for what, names in found.items() if names]
    return label, worst, status, "; ".join(remarks)


def find_cases(paths):
    """Case files at and under the paths. Manifests and key maps (.json.gz) are no cases."""
    cases = []
    for path in map(Path, paths):
        found = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not found or not path.exists():
            raise SystemExit(f"{path}: no case (.json) there")
        cases += found
    return cases


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("paths", nargs="+", metavar="PATH", help="case file, or folder searched for them")
    parser.add_argument("-v", "--verbose", action="store_true", help="compare debug outputs, show tracebacks")
    args = parser.parse_args(arguments)
    bad = 0
    for path in find_cases(args.paths):
        label, worst, status, remarks = run(path, args.verbose)
        print(f"{label:44} {worst:9.2e}  {status}" + (f"  ({remarks})" if remarks else ""), flush=True)
        bad += status not in ("ok", "empty")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
