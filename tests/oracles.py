"""Compare our code with numbers of the original code:  python tests/oracles.py PATH... [-v]

PATH is a case (a .json beside its .safetensors) or a folder of them. One line per case,
`system/case  max-relative-error  ok|FAIL|unsupported`, then remarks; exit status 1 unless every case is ok.

Outputs graded `required` decide. `as_published` ones (quirks of the original that we drop) are listed as
skipped where ours differs or has no counterpart. `debug` ones help to find a fault: -v compares those it can.
Cases run by kind, system and fields alone, through the functions that sample.py and the method files call.
"""
import argparse
import dataclasses
import json
import sys
import traceback
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import data
import diffusion
import metrics
import models
import text_encoders
import vae


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
            for i, row in enumerate(self.rows):
                graded = {name: row.get(name, vars(self).get(name)) for name in ("check", "tol")}
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
        if "value" in spec:
            value = spec["value"]
            numbers = isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value)
            return torch.tensor(value) if numbers else value
        rule = spec["rule"]
        if unknown := set(rule) - {"case", "name", "shape", "post"} or rule.get("post", "tanh") != "tanh":
            raise Unsupported(f"input rule {unknown}")
        x = normal(f"input:{rule.get('case', self.path.stem)}:{rule.get('name', name)}", rule["shape"])
        return torch.tanh(x) if "post" in rule else x

    def expected(self, name):
        spec = self.outputs[name]
        return spec["value"] if "value" in spec else self.tensor(name)


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


def fill(net, params, left_as_built=()):
    """Give `net` the case's weights; its keys and shapes must be those of `params`. -> net in eval mode."""
    ours = {name: list(value.shape) for name, value in net.state_dict().items()}
    if ours != params:
        wrong = [f"{k} {ours.get(k, 'missing')} instead of {params.get(k, 'none')}"
                 for k in ours | params if ours.get(k) != params.get(k)]
        raise ValueError(f"{len(wrong)} parameters differ: {', '.join(wrong[:3])}")
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.ndim and value.is_floating_point() and name not in left_as_built:
                value.copy_(fill_tensor(name, value.shape))
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
               "num_heads", "context_dim", "dropout", "use_fps_condition"}


def vgen_unet(network, config, params, left_as_built):
    """The UNet3D of a VGen config, filled."""
    if network != "t2v":
        raise Unsupported(f"network {network}")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in UNET_FIELDS}
    return fill(models.UNet3D(models.UNetConfig(**options)), params, left_as_built)


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
    net = vgen_unet(case.call["network"], case.config, case.params, case.left_as_built)
    x, fps, seen = case.input("x"), case.input("fps"), {}

    def watch(name):
        def hook(module, args, out):
            if isinstance(module, models.TemporalTransformer):  # stored as b c f h w, others (b f) c h w
                out = out.unflatten(0, (len(x), -1)).transpose(1, 2)
            seen[name] = out.detach().clone()
        return hook

    # debug outputs name submodules; those that our network does not have are left out
    wanted = {n for spec in case.outputs.values() for n in spec.get("rows", [spec.get("submodule")])}
    modules = dict(net.named_modules())
    handles = [modules[n].register_forward_hook(watch(n)) for n in wanted & set(modules)]
    with torch.no_grad():
        out = net(x, case.input("t"), case.input("y"), **({} if fps is None else {"fps": fps}))
    for handle in handles:
        handle.remove()

    result = {"out": out}
    for name, spec in case.outputs.items():
        if "submodule" in spec and spec["submodule"] in seen:
            result[name] = part(seen[spec["submodule"]], spec)
        elif "rows" in spec and set(spec["rows"]) <= set(seen):
            result[name] = torch.stack([statistics(seen[row], spec["columns"]) for row in spec["rows"]])
        elif name == "out":
            result[name] = part(out, spec)
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
            mean, logvar = net.moments(x)
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


def text_with_vectors(case):
    clip, layer = case.config["clip"], case.config["layer"]
    cfg = text_encoders.CLIPConfig(
        embed_dim=clip["proj"], vocab_size=clip["vocab"], context_length=clip["n_ctx"],
        text_width=clip["width"], text_heads=clip["heads"], text_layers=clip["layers"],
        text_mlp_ratio=clip["mlp_ratio"])
    # the case's tower lacks the temperature of CLIP's loss, which nothing here reads
    net = fill(text_encoders.OpenCLIPText(cfg), {"logit_scale": []} | case.params, case.left_as_built)
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
    net.load_state_dict(common.rename(state, net, text_encoders.dino_name, "case"))
    with torch.no_grad():
        return {name: net(call["image"]) for name, call in calls(case)}


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

# the same word may mean another computation in another system, so both choose the function
KINDS = {
    ("text_forward", "dreamvideo"): text_with_vectors,
    ("image_tower_forward", "dreamvideo"): image_tower,
    ("metric", "dreamvideo"): subject_metrics,
    ("image_transform", "dreamvideo"): image_steps,
    ("image_transform", "vgen_data"): image_items,
    ("table", "dreamvideo"): table,
    ("table", "vgen_data"): table,
    ("unet_forward", "modelscope_unet"): unet_forward,
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
    label, worst = f"{path.resolve().parent.name}/{path.stem}", 0.0
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
    except (Exception, SystemExit) as fault:  # noqa: BLE001  (UserError is a SystemExit)
        if verbose:
            traceback.print_exc()
        return label, np.nan, "FAIL", f"{type(fault).__name__}: {fault}".splitlines()[0]
    status = "FAIL" if found["failed"] else "unsupported" if found["no counterpart"] else "ok"
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
        bad += status != "ok"
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
