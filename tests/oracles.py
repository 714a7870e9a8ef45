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
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion
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


TABLES = {"clip_tokenize": clip_tokenize}

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
            result[name] = diffusion.pseudo_huber(a, b, call["c"]).mean()[None]
        elif call["fn"] == "guidance_embedding" and hasattr(models, "guidance_embedding"):
            result[name] = models.guidance_embedding(case.input(call["w"]), call["dim"])
    return result


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
        if "vc2_unet" not in globals():
            raise Unsupported("the UNet of VideoCrafter2")
        net = globals()["vc2_unet"](case.config["unet"], case.params, case.left_as_built)
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
    fn, xs, x0s, ts = videocrafter_network(case, len(x_T)), [], [], []
    schedule = sqrt_linear(config, PREDICTIONS[config.get("prediction_type", "epsilon")], config["use_scale"])

    def record(x, t):
        out = fn(x, t)
        xs.append(x)
        x0s.append(schedule.to_x0(out, x, t))
        ts.append(int(t[0]))
        return out

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
            times = diffusion.lcm_timesteps(steps, len(schedule.alpha_bar), origin, "even")
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


# the same word may mean another computation in another system, so both choose the function
KINDS = {
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
    # samplers of the UNet family
    ("schedule", "vc2_ddim"): videocrafter_schedule,
    ("sampler_trajectory", "vc2_ddim"): videocrafter_sampler,
    ("schedule", "turbo_lcm"): videocrafter_schedule,
    ("sampler_trajectory", "turbo_lcm"): videocrafter_sampler,
    ("sampler_trajectory", "dreamvideo"): sampler_ops,
    ("sampler_trajectory", "videolcm"): sampler_ops,
    ("schedule", "higen_unet"): appearance_schedule,
    ("pipeline", "vgen_ddim"): sr600_pipeline,
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
