"""The plumbing, all of it: processes, seeds, log, checkpoints, exact resume, weight files."""
import contextlib
import hashlib
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import time
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class UserError(SystemExit):
    """The user's mistake: one line that names the thing and the remedy; Python prints it and exits with 1."""

    def __init__(self, message):
        super().__init__(f"error: {message}")


# ---- processes and seeds

@dataclass
class Env:
    """Where this process runs. `stop` turns true on SIGTERM or Ctrl-C: save and leave at the next step."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype   # of frozen weights and of autocast
    stop: bool = False

    @property
    def main(self):
        return self.rank == 0

    def autocast(self):
        """Autocast for network calls; off in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def setup(args) -> Env:
    """Start this process, plain `python x.py` or under torchrun (gloo on CPU, nccl on GPUs), and seed it."""
    wanted = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {wanted}: PyTorch {torch.__version__} sees no GPU here; try --device cpu")
    variables = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    rank, world, local = (int(os.environ.get(k, default)) for k, default in variables)
    device = torch.device(f"cuda:{local}" if wanted == "cuda" else wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)  # the same on every process, so that all build the same network
    return Env(rank, world, device, DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")])


def catch_signals(env):
    """For training runs: SIGTERM (pre-emption) or Ctrl-C sets env.stop, so that the loop saves and leaves."""
    def on_signal(signum, frame):
        if env.stop:  # asked twice: leave at once
            raise SystemExit(1)
        env.stop = True
        print("stopping after this step: saving first (again to leave at once)", flush=True)
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, on_signal)


def agree_to_stop(env):
    """True on every process as soon as one of them was asked to stop."""
    return on_any(env.stop, env)


def on_any(flag, env) -> bool:
    """True on every process if `flag` is true on one of them; each must call it."""
    if env.world == 1:
        return bool(flag)
    count = torch.tensor(float(bool(flag)), device=env.device)
    dist.all_reduce(count)
    return count.item() > 0


def seed_of(*numbers) -> int:
    """A 63-bit seed from integers or strings, e.g. (seed, rank, step): neighbours give unrelated streams."""
    text = ",".join(map(str, numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*numbers) -> torch.Generator:
    """CPU generator keyed by numbers: the same noise on any device, after any resume, in any batch."""
    return torch.Generator().manual_seed(seed_of(*numbers))


def mean_over_ranks(values: dict, env) -> dict:
    """{name: float} -> the same, averaged over the processes (each must call it, with the same names)."""
    if env.world == 1:
        return values
    t = torch.tensor(list(values.values()), dtype=torch.float64, device=env.device)
    dist.all_reduce(t)
    return dict(zip(values, (t / env.world).tolist()))


# ---- options

def apply_defaults(parser, argv, presets, option="base"):
    """Parse argv; presets[value of --base] replaces the parser's defaults, given flags win. -> args"""
    chosen = getattr(parser.parse_known_args(argv)[0], option)
    parser.set_defaults(**presets.get(chosen, {}))
    return parser.parse_args(argv)


def lr_at(step, args):
    """Learning rate of update `step` (0-based): linear warm-up, then constant, one cosine to 0, or four.

    VGen's warm-up is one update behind and so wastes its first one, at rate 0; after it the two are equal.
    """
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.lr_schedule == "constant":
        return args.lr
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    if args.lr_schedule == "cosine-restarts":
        done = 4 * done % 1
    return args.lr * (1 + math.cos(math.pi * done)) / 2


# ---- log

class Log:
    """One line a step on the screen and in out/log.jsonl (rank 0); TensorBoard and W&B if asked for."""

    def __init__(self, args, env, parts, start=0):
        """parts: {name: module}, counted in the header; start: the first step (not 0 after a resume)."""
        self.args, self.env, self.start, self.clock = args, env, start, time.time()
        self.path = Path(args.out, "log.jsonl")
        self.writers = []
        if not env.main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep_lines(self.path, start)
        arguments = json.dumps(vars(args), indent=1, default=str)
        write_atomic(Path(args.out, "args.json"), lambda p: p.write_text(arguments))
        print("arguments:", " ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None))
        print(f"device: {device_name(env.device)} x {env.world}, {str(env.dtype)[6:]};",
              ", ".join(f"{k} {v}" for k, v in versions().items()))
        for name, module in parts.items():
            n = [(p.numel(), p.requires_grad) for p in module.parameters()]
            print(f"{name}: {sum(k for k, g in n if g):,} trained of {sum(k for k, _ in n):,} parameters")
        print(f"effective batch: {args.batch} a process x {args.accum} accumulated x {env.world} processes = "
              f"{args.batch * args.accum * env.world}", flush=True)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(args.out)
            self.writers.append(lambda step, v: [board.add_scalar(k, x, step) for k, x in v.items()])
        if args.wandb:
            import wandb
            run = wandb.init(project="nanovideo", name=Path(args.out).name, config=vars(args))
            self.writers.append(lambda step, v: run.log(v, step=step))

    def step(self, step, **values):
        """Log the floats of a finished step (0-based), averaged over the processes: each must call this."""
        values = mean_over_ranks({k: float(v) for k, v in values.items()}, self.env)
        now, seconds = time.time(), time.time() - self.clock
        self.clock = now
        if not self.env.main:
            return
        with open(self.path, "a") as f:
            f.write(json.dumps({"step": step, **values, "seconds": round(seconds, 3)}) + "\n")
        for write in self.writers:
            write(step, values)
        if step % self.args.log_every == 0 or step == self.args.steps - 1:
            shown = " | ".join(f"{k} {v:.3g}" if k == "lr" else f"{k} {v:.4f}" for k, v in values.items())
            print(f"step {step + 1}/{self.args.steps} | {shown} | {seconds:.2f} s", flush=True)
        if step == self.start + 1:  # the first step compiles and allocates: time the second
            left = seconds * (self.args.steps - step - 1)
            print(f"{seconds:.2f} s a step, about {left / 60:.0f} min to go, "
                  f"peak memory {peak_memory(self.env.device):.2f} GB", flush=True)


def keep_lines(path, before):
    """Keep a jsonl file's lines whose "step" is below `before`: a resumed run repeats what came after."""
    path = Path(path)
    lines = path.read_text().splitlines() if before and path.exists() else []
    kept = [x + "\n" for x in lines if json.loads(x)["step"] < before]
    write_atomic(path, lambda p: p.write_text("".join(kept)))


def peak_memory(device) -> float:
    """Peak memory of this process so far in GB (10^9 bytes): allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in ("torch", "open_clip_torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def draw_curve(log_path, png, keys, title=""):
    """log.jsonl -> a picture: one panel a key, each step as a dot and a running mean."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(x) for x in Path(log_path).read_text().splitlines()]
    fig, axes = plt.subplots(1, len(keys), figsize=(5 * len(keys), 3.4), squeeze=False)
    for ax, key in zip(axes[0], keys):
        points = [(r["step"] + 1, r[key]) for r in rows if key in r]
        if not points:
            continue
        steps, values = zip(*points)
        mean, window = [], max(1, len(values) // 20)
        for i in range(len(values)):
            mean.append(sum(values[max(0, i - window + 1):i + 1]) / min(i + 1, window))
        ax.plot(steps, values, ".", ms=3, alpha=0.35)
        ax.plot(steps, mean, lw=2)
        ax.set_xlabel("step")
        ax.set_title(key)
        ax.grid(alpha=0.3)
    fig.suptitle(title)
    fig.tight_layout()
    write_atomic(Path(png), lambda p: fig.savefig(p, dpi=110))
    plt.close(fig)


class FiniteGuard:
    """Skip steps whose loss is not finite; after 10 in a row stop, the last good checkpoint kept."""

    def __init__(self):
        self.bad = 0

    def ok(self, env, **terms) -> bool:
        """terms: the named loss terms of this step (0-d tensors). The same answer on every process."""
        wrong = [k for k, v in terms.items() if not torch.isfinite(v).all()]
        if not on_any(wrong, env):
            self.bad = 0
            return True
        self.bad += 1
        if wrong:
            print(f"warning: {wrong[0]} is not finite: step skipped ({self.bad} in a row)", flush=True)
        if self.bad >= 10:
            raise UserError(f"{(wrong or ['a loss term'])[0]} was not finite 10 steps in a row; the last "
                            "checkpoint is kept: try a lower --lr, a smaller --clip, or --dtype fp32")
        return False


def clip_gradients(params, largest):
    """Scale the gradients to a norm of at most `largest`. -> the norm before, a plain tensor (FSDP2 too)."""
    norm = torch.nn.utils.clip_grad_norm_(params, largest)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@contextlib.contextmanager
def memory_advice(*dials):
    """Turn a CUDA out-of-memory error into one line that lists the dials to turn, in that order."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as e:
        raise UserError(f"the GPU is out of memory; try, in this order: {', '.join(dials)}") from e


# ---- checkpoints: ckpt.safetensors is what one samples from, state.pt what one resumes from

def write_atomic(path, write):
    """write(temporary path), fsync, rename: a kill at any moment leaves the old file or the new, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the same suffix: some writers go by it
    write(tmp)
    with open(tmp, "rb") as f:
        os.fsync(f.fileno())
    os.replace(tmp, path)


def full(t: Tensor) -> Tensor:
    """A tensor, or the whole of an FSDP2-sharded one (then every process must call), detached on the CPU."""
    t = t.detach()
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu()


def trained(parts: dict) -> dict:
    """{prefix: module} -> {key: parameter} that are trained: public names, no wrapper's `module.` in them."""
    found = {}
    for prefix, module in parts.items():
        for name, p in module.named_parameters():
            if p.requires_grad:
                found[prefix + name.removeprefix("module.").replace("_orig_mod.", "")] = p
    return found


def save_checkpoint(args, env, step, params, meta, opt, ema=None, scaler=None):
    """Write out/ckpt.safetensors (averaged weights if `ema`) and out/state.pt after `step` updates.

    params: {key: parameter} from trained(); ema: {key: tensor} or None; meta: what sample.py needs to know,
    plain types. Every process must call this; rank 0 writes.
    """
    weights = {k: full(p).contiguous() for k, p in params.items()}
    moments = {k: {n: full(v) for n, v in opt.state[p].items()} for k, p in params.items()}
    averaged = {k: full(v).contiguous() for k, v in ema.items()} if ema else None
    if not env.main:
        return
    out = Path(args.out)
    given = {k: v for k, v in vars(args).items() if v is not None}
    meta = dict(meta, step=step, args=given, versions=versions())
    product = averaged or weights
    text = {"nanovideo": json.dumps(meta, default=str)}
    write_atomic(out / f"ckpt-{step}.safetensors", lambda p: save_file(product, p, text))
    write_atomic(out / "ckpt.safetensors", lambda p: save_file(product, p, text))
    # all that resume needs is in this one file: the two files need not be of the same moment
    state = dict(
        step=step, weights=weights, moments=moments, ema=averaged, meta=json.loads(text["nanovideo"]),
        scaler=scaler.state_dict() if scaler else None)
    write_atomic(out / "state.pt", lambda p: torch.save(state, p))
    steps = sorted(int(p.stem.split("-")[1]) for p in out.glob("ckpt-*.safetensors"))
    for old in steps[:max(0, len(steps) - args.keep)]:
        (out / f"ckpt-{old}.safetensors").unlink()


# what a resumed run may not change
SAME = ("base", "rank", "alpha", "lora_targets", "seed", "batch", "accum")


def check_out(args, method):
    """Refuse to overwrite a run or to resume one with other options. -> the state to resume from, or None."""
    path = Path(args.out, "state.pt")
    if not path.exists():
        return None
    if not args.resume:
        raise UserError(
            f"{args.out} already holds a run: --resume continues it, --out FOLDER starts a new one")
    state = load_pickle(path)
    then, now = state["meta"]["args"] | {"method": state["meta"]["method"]}, vars(args) | {"method": method}
    for k in ("method", *SAME):
        if then.get(k) != now.get(k):
            raise UserError(f"--resume: the run in {args.out} has {k} {then.get(k)}, not {now.get(k)}: "
                            "give the same, or another --out")
    return state


def load_state(state, params, opt, ema=None, scaler=None) -> int:
    """Put check_out()'s state back into all that trains, plain, DDP or FSDP2. -> updates done."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def like(value, p):
        if isinstance(p, DTensor):
            return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
        return value.to(p.device)
    if set(params) != set(state["weights"]):
        first = sorted(set(params) ^ set(state["weights"]))[0]
        raise UserError(
            f"--resume: the run's trained tensors are not those asked for (first difference: {first})")
    with torch.no_grad():
        for k, p in params.items():
            p.copy_(like(state["weights"][k], p))
            opt.state[p] = {n: like(v, p) if v.ndim else v for n, v in state["moments"][k].items()}
            if ema is not None:
                ema[k].copy_(like(state["ema"][k], p))
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return state["step"]


def load_checkpoint(path):
    """One of our own runs (folder, or a ckpt*.safetensors in it) -> ({key: tensor}, meta)."""
    path = Path(path)
    file = path / "ckpt.safetensors" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"--ckpt {path}: no ckpt.safetensors there; give the --out folder of a finished run")
    tensors, text = load_safetensors(file)
    if "nanovideo" not in text:
        raise UserError(f"--ckpt {path}: not a nanovideo checkpoint ({looks_like(tensors)}); "
                        "public weights go to --weights, public LoRA files to --lora")
    return tensors, json.loads(text["nanovideo"])


def net_and_text(tensors):
    """The tensors of a checkpoint -> the network's and the text encoder's, both under bare keys."""
    prefix = "text_encoder."
    text = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return {k: v for k, v in tensors.items() if not k.startswith(prefix)}, text


# ---- weight files

def load_safetensors(path):
    """-> ({key: tensor on the CPU}, metadata)."""
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError, struct.error) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e}); "
                        "a download or copy was cut off: fetch it again") from e


class Shell:
    """Stands in for a class that a file names beside its tensors: takes anything, does nothing."""

    def __init__(self, *args, **kw):
        pass

    def __setstate__(self, state):
        pass


def load_pickle(path, allow=(), shells=False):
    """torch.load on the CPU that runs no code from the file; `allow`: classes it may hold beside tensors.

    shells: of all others nothing is kept (Stable Diffusion's files name Lightning's callbacks).
    """
    try:
        allow = list(allow)
        if shells and zipfile.is_zipfile(path):
            allow += [(Shell, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]
        with torch.serialization.safe_globals(allow):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # zip, pickle and EOF errors alike mean one thing to the user
        raise UserError(f"{path}: not a whole PyTorch file, or not one of plain tensors "
                        f"({str(e).splitlines()[0][:100]}); fetch it again") from e


def load_weights(path, lists=False) -> dict:
    """A public weight file (.safetensors, .pt, .pth, .bin, .ckpt) -> {key: tensor}, without wrappers.

    Given the index of a file in shards (*.index.json), all of them. lists: a list of tensors comes as it is.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return {k: v for shard in shards_of(path) for k, v in load_weights(path.parent / shard).items()}
    state = load_safetensors(path)[0] if path.suffix == ".safetensors" else load_pickle(path, shells=True)
    if isinstance(state, list) and lists:
        return state
    if isinstance(state, list):
        raise UserError(f"{path}: a list of {len(state)} tensors without names: T2V-Turbo's LoRA is one")
    inner = state
    while isinstance(inner, dict):
        state = inner
        wrappers = ("state_dict", "unet_state_dict", "module", "model")
        inner = next((state[k] for k in wrappers if isinstance(state.get(k), dict)), None)
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        first = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: holds no tensors (its first keys: {first})")
    # DDP and DeepSpeed put their own names before every key
    return {k.removeprefix("module.").removeprefix("_forward_module."): v
            for k, v in state.items() if isinstance(v, Tensor)}


def shards_of(index):
    """Index of a file in shards (*.index.json) -> their names."""
    return sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))


def replace_part(path, part, state):
    """Write {key: tensor} in fp16 as "part.key" of a safetensors file (assets/), whose other parts stay."""
    old = load_safetensors(path)[0] if Path(path).exists() else {}
    kept = {k: v for k, v in old.items() if not k.startswith(part + ".")}
    new = {f"{part}.{k}": v.detach().half().contiguous().cpu() for k, v in state.items()}
    write_atomic(path, lambda p: save_file(kept | new, p))


KINDS = {  # part of a key that only this kind of file has -> the kind, in words; the first that fits counts
    "_adapter.": "a DreamVideo adapter",
    "_lora.down_linear": "InstructVideo's fine-tuned file",
    "lora": "a LoRA file",
    "image_latents": "I2VGen-XL in diffusers layout",
    "local_image_concat": "I2VGen-XL",
    "context_embedding.tokens": "HiGen",
    "depth_embedding": "VideoComposer",
    "pre_image_condition": "TF-T2V",
    "image_proj_model": "VideoCrafter1 image-to-video",
    "time_cond_proj": "T2V-Turbo",
    "init_attn": "VideoCrafter2",
    "transformer_blocks_copy": "Diffusion as Shader",
    "conv_y": "a CogVideoX autoencoder",
    "SelfAttention": "a T5 encoder",
    "input_blocks.1.3.": "DEMO",
    "encoder.down_blocks": "an SD autoencoder in diffusers layout",
    "down_blocks": "a diffusers UNet",
    "temopral_conv": "a VGen or ModelScope UNet",
    "first_stage_model": "a Stable Diffusion checkpoint",
    "input_blocks": "an image UNet of Stable Diffusion",
    "decoder.up.": "an SD autoencoder",
    "resblocks": "an OpenCLIP model",
    "text_model.": "a transformers CLIP text model",
    "vision_model.": "a transformers CLIP image model",
    "transformer_blocks.0.norm1.linear": "CogVideoX",
    "fusion1.layer1.": "MiDaS",
}


def looks_like(state) -> str:
    """What kind of public file these keys are from, in words."""
    for part, kind in KINDS.items():
        if any(part in k for k in state):
            return f"it looks like {kind}"
    return f"unknown keys such as {next(iter(state), 'none')}"


def load_strict(net, state, name):
    """load_state_dict() whose error tells in one line what the keys look like, and the first faults."""
    want = {k: v.shape for k, v in net.state_dict().items()}
    faults = {"missing": [k for k in want if k not in state],
              "unexpected": [k for k in state if k not in want],
              "of another shape": [k for k in want if k in state and want[k] != state[k].shape]}
    if any(faults.values()):
        words = "; ".join(f"{len(keys)} {fault}, first {keys[0]}" for fault, keys in faults.items() if keys)
        raise UserError(f"{name}: these are not its weights ({looks_like(state)}): {words}")
    net.load_state_dict(state, assign=next(net.parameters()).is_meta)


def rename(state, net, name_of, source):
    """{their key: tensor} -> {our key: tensor}, in our shapes (1x1 convolutions against Linears).

    name_of(our key) -> their key; one of theirs that is left over or not there is a UserError.
    """
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    theirs = {name_of(k): k for k in shapes}
    missing, extra = [k for k in theirs if k not in state], [k for k in state if k not in theirs]
    if missing or extra:
        first = f"missing {missing[0]}" if missing else f"unexpected {extra[0]}"
        raise UserError(f"{source}: these are not its weights ({looks_like(state)}): {len(missing)} missing, "
                        f"{len(extra)} unexpected, first: {first}")
    wrong = [k for k, ours in theirs.items() if state[k].numel() != shapes[ours].numel()]
    if wrong:
        raise UserError(f"{source}: these are not its weights ({looks_like(state)}): {len(wrong)} of another "
                        f"shape, first {wrong[0]}")
    return {ours: state[their].reshape(shapes[ours]) for their, ours in theirs.items()}
