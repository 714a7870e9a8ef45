"""What every command shares: processes and seeds, options, the Run object, its log, saving and
resuming."""
from signals import MAIN, TORCHRUN, UNDER_TORCHRUN, stop  # before torch is imported
import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shutil
import stat
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class UserError(Exception):
    """A mistake by the user, reported in one line that says what is wrong and what to do."""

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(text) -> str:
    """`text` without what a hostile name could do to a terminal: control characters, endless
    length."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(text))
    return text if len(text) <= 2000 else f"{text[:1500]} ... {text[-400:]}"


def run_command(main, *memory_options):
    """Run a command's main(); a UserError becomes one line on stderr and exit code 1.

    memory_options: what to try if memory runs out, most effective first.
    """
    stop.importing = False
    try:
        with memory_advice(*memory_options), lost_process():
            main()
    except (UserError, PermissionError) as e:
        print(f"error: {one_line(e)}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        release_folders()


def warn(message):
    """Print a warning on stderr, from one process of a run only."""
    if MAIN:
        print(f"warning: {one_line(message)}", file=sys.stderr, flush=True)


@cache
def warn_once(message):
    """warn(), unless this process has said the same before."""
    warn(message)


# ---- files of the user

def check_file(path, what="file") -> Path:
    """`path` as a Path, if it is a regular file that can be read; UserError says what else it is.

    Every file that a user names passes here before it is opened. A FIFO or a device is refused:
    reading it would hang or never end. what: the word for it in the error, such as "picture".
    """
    path, shown = Path(path), str(path)[:200]
    try:
        mode = path.stat().st_mode  # of what a link points to
        if stat.S_ISDIR(mode):
            raise UserError(f"{shown}: a folder; wanted a {what}")
        if not stat.S_ISREG(mode):
            raise UserError(f"{shown}: a FIFO, socket or device; wanted a {what}")
        path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{shown}: no such {what}") from None
    except (OSError, ValueError) as e:  # no permission, a loop of links, a name too long, a NUL
        raise UserError(f"{shown}: cannot be read ({getattr(e, 'strerror', None) or e}); check "
                        "its name and permissions") from None
    return path


def check_folder(path):
    """Raise UserError if the user may not list and enter a folder, or not reach `path`."""
    try:
        with os.scandir(os.path.join(path, ".")):
            pass
    except PermissionError:
        raise UserError(f"{path}: cannot be read (Permission denied): no permission to list and "
                        "enter this folder or one above (chmod u+rx gives both)") from None
    except (OSError, ValueError):  # no folder: whoever opens it says so
        pass


def check_limit(kind, amount, usual, what):
    """Refuse `what`, a sentence's beginning, if its `amount` is over the usual limit of a kind.

    The environment variable NANOVIDEO_<KIND>_LIMIT=2 allows twice as much.
    """
    name = f"NANOVIDEO_{kind}_LIMIT"
    try:
        factor = float(os.environ.get(name, 1))
    except ValueError:
        factor = math.nan
    if not factor > 0:
        raise UserError(f"{name}={os.environ[name]}: not a number above 0; 2 allows twice the "
                        "usual size")
    if amount > factor * usual:
        raise UserError(f"{what}; {name}={math.ceil(amount / usual)} in the environment allows it")


TEXT_BYTES = 1e9  # largest list or JSON file that is read


def read_text(path, what="file") -> str:
    """The text of a user's file: UTF-8 in every locale, with or without a byte order mark.

    Raises UserError if it is not such a text, is empty, or is larger than TEXT_BYTES.
    """
    path = check_file(path, what)
    size = path.stat().st_size
    check_limit("TEXT", size, TEXT_BYTES, f"{path}: a text of {size / 1e6:.0f} MB")
    try:
        # joined files have a mark within
        text = path.read_bytes().decode("utf-8").replace("\ufeff", "")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start}); save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def parse_json(text, where):
    """JSON text -> its value; what is wrong with it is a UserError that names `where`."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("an object has the same key twice")
        return dict(pairs)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as e:
        raise UserError(f"{where}: not valid JSON ({e})") from None


NO_TEXT = re.compile("[\0\ud800-\udfff]")


def check_text(text, where) -> str:
    """`text`, unless it holds a NUL or half a character, which tokenizers and files refuse."""
    wrong = NO_TEXT.search(text)
    if wrong:
        raise UserError(f"{where}: character {wrong.start() + 1} is U+{ord(wrong[0]):04X}, no "
                        "character of a text; remove it")
    return text


def json_object(text, source) -> dict:
    """parse_json() of an object."""
    value = parse_json(text, source)
    if not isinstance(value, dict):
        raise UserError(f"{source}: holds a {type(value).__name__}, not {{name: value}}")
    return value


# ---- the schema of what comes with weights

# {field: what it may be}: (type, least, most), a tuple of words, a type, [what all items of a list
# may be], [what each of several items may be], or the schema of a dictionary. Nothing here names
# code or a file.
SAMPLERS = ("ddim", "lcm", "dpmpp", "dpm", "rflow", "flow-dpmpp", "flow-unipc", "higen", "sr600")
SAMPLE_FIELDS = dict(
    frames=(int, 1, 10 ** 4), height=(int, 1, 16384), width=(int, 1, 16384),
    save_fps=(int, 1, 1000), sampler=SAMPLERS, sample_steps=(int, 1, 10 ** 5),
    cfg=(float, -1000, 1000), eta=(float, 0, 1),
    spacing=("leading", "trailing", "stride", "even", "cogvideox", "wan", "diffusers"),
    origin=(int, 1, 1000),
    negative=str, suffix=str, fps=(int, 1, 1000), start_offset=(float, 0, 100),
    dynamic_cfg=("published", "meant", "off"), motion_cfg=(float, -1000, 1000),
    motion_share=(float, 0, 1), motion_factor=(int, 0, 10 ** 6),
    shift=(float, 1e-6, 1e6), boundary=(float, 0, 1), low_cfg=(float, -1000, 1000),
    appearance_factor=(float, -1000, 1000))
SCHEDULE_FIELDS = dict(
    name=("linear_sd", "linear_sd_shifted", "cosine", "logsnr_cosine_interp", "flow"),
    prediction=("eps", "v", "x0"), zero_snr=bool, shift=(float, 1e-6, 1e6),
    divisor=(float, 1e-6, 1e6), by_size=bool,
    scale=[(float, 1e-3, 1e3), (float, 1e-3, 1e3), (int, 1, 10 ** 4)])
# what a resumed run may not change; the number of processes, --batch and --accum may
SAME = dict(
    base=str, init=str, stage=str, rank=(int, 0, 10 ** 6), alpha=(float, 1e-12, 1e9),
    lora_targets=[str], tracking_blocks=(int, 0, 1000), seed=(int, 0, 2 ** 64))
# init: checksums of init-0.safetensors, init-1 ... beside the checkpoint, see keep_init()
META_FIELDS = SAME | dict(
    init=[str], method=str, step=(int, 0, 10 ** 9), guidance_dim=(int, 0, 10 ** 5),
    sample=SAMPLE_FIELDS, schedule=SCHEDULE_FIELDS, args=dict(SAME, scratch=bool))


def is_a(value, allowed) -> bool:
    """Is an untrusted value what one field of a schema allows?"""
    if isinstance(allowed, list):
        if not isinstance(value, (list, tuple)):
            return False
        kinds = allowed * len(value) if len(allowed) == 1 else allowed
        return len(kinds) == len(value) and all(map(is_a, value, kinds))
    if isinstance(allowed, type):
        numbers = (int, float) if allowed is float else allowed
        fits = isinstance(value, numbers) and (allowed is bool or not isinstance(value, bool))
        return fits and not (allowed is str and NO_TEXT.search(value))
    if isinstance(allowed[0], type):
        kind, low, high = allowed
        return is_a(value, kind) and low <= value <= high
    return isinstance(value, str) and value in allowed


def known_fields(values, schema, source) -> tuple[dict, list]:
    """The fields of an untrusted dictionary that `schema` knows -> them, names of the others.

    A field of another type or out of its range is a UserError; None counts as absent.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: holds a {type(values).__name__}, not {{name: value}}")
    known, unknown = {}, [str(name) for name in values if name not in schema]
    for name in (name for name in schema if values.get(name) is not None):
        value, allowed = values[name], schema[name]
        if isinstance(allowed, dict):
            value, inner = known_fields(value, allowed, f"{source}: {name}")
            unknown += [f"{name}.{k}" for k in inner]
        elif not is_a(value, allowed):
            raise UserError(f"{source}: {name} is {str(value)[:60]!r}, which it cannot be; the "
                            "file is damaged or not ours")
        known[name] = value
    return known, unknown


def read_meta(values, source) -> dict:
    """The metadata of a run, as sample.py and --resume need it; what else is in it is dropped.

    Its options ("args") and versions are a record, of which only META_FIELDS are read. Other
    unknown fields are named in a warning.
    """
    meta, unknown = known_fields(values, META_FIELDS, source)
    for name in ("method", "base", "step", "sample"):
        if name not in meta:
            raise UserError(f"{source}: its metadata has no {name}; the file is damaged or not "
                            "ours")
    if meta.setdefault("rank", 0) and not {"alpha", "lora_targets"} <= meta.keys():
        raise UserError(f"{source}: its metadata has a rank, but no alpha or no lora_targets")
    unknown = [name[:60] for name in unknown if not name.startswith(("args.", "versions"))]
    if unknown:
        warn(f"{source}: no settings of a run, left out: {', '.join(unknown[:8])}")
    return {"args": {}} | meta


# ---- processes and seeds

@dataclass
class Env:
    """Where this process runs."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype   # of frozen weights and of autocast
    offload: bool = False

    @property
    def main(self):
        return self.rank == 0

    @contextlib.contextmanager
    def autocast(self):
        """For network calls: autocast, off in fp32. With --offload, saved activations wait on the
        CPU."""
        saved = contextlib.nullcontext()
        if self.offload:
            saved = torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled), saved:
            yield


STALLED = timedelta(minutes=10)  # so long one process waits for another in a training step
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def setup(device=None, dtype=None, seed=0, parallel="ddp", offload=False) -> Env:
    """Start this process, alone or under torchrun (gloo on CPUs, nccl on GPUs), and seed it.

    device: "cuda", "cuda:1", "mps", "cpu" or None for the best there is; dtype: a key of DTYPES
    or None. Every process seeds torch alike, so that all build the same network. Raises
    UserError.
    """
    rank, world, local_rank = read_ranks()
    device = pick_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), local_rank)
    # two backends: with --offload, shards and gradients live on the CPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if UNDER_TORCHRUN and not dist.is_initialized():
        try:
            dist.init_process_group(backend, timeout=STALLED)
        except (RuntimeError, ValueError) as e:
            raise UserError(f"the {world} processes cannot reach each other ({e}); start them with "
                            "torchrun (see torchrun.sh)") from e
    elif parallel == "fsdp" and not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if world > 1:
        _patient.append(dist.new_group(backend="gloo", timeout=timedelta(days=1)))
        if parallel == "fsdp":
            _receives.append(rank > 0)
    torch.manual_seed(seed)
    dtype = DTYPES[dtype or ("bf16" if device.type == "cuda" else "fp32")]
    return Env(rank, world, device, dtype, offload)


_patient = []  # the last: a group of all processes with a long timeout


@contextlib.contextmanager
def one_per_machine():
    """Let the processes of this machine do something one after the other, such as a download: the
    first makes it, the others find it. A process that ends makes way for the next."""
    path = Path(tempfile.gettempdir(), f"nanovideo-{os.getuid()}.lock")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def meet():
    """Wait for all processes, up to a day: one may have worked for the others (downloaded,
    encoded, sampled, saved). Each must call it."""
    if _patient:
        dist.barrier(_patient[-1])


_receives = []  # the last: does this process get its weights from the first one?


def reads_weights() -> bool:
    """Does this process read the base's weight files? With fsdp the first one reads for all: see
    send_weights()."""
    return not (_receives and _receives[-1])


def send_weights(modules):
    """With fsdp: give each process the first one's parameters and buffers of these networks,
    tensor by tensor. Every process must call it."""
    if not _receives:
        return
    meet()  # the first may have read for an hour
    for module in modules:
        for tensors in (module.named_parameters, module.named_buffers):
            found = [t for _, t in tensors(remove_duplicate=False)]
            kinds = [[t.dtype for t in found]]  # a file's, which only the first process knows
            dist.broadcast_object_list(kinds, 0)
            for t, kind in zip(found, kinds[0]):
                t.data = t.data.to(kind).contiguous()
                dist.broadcast(t.data, 0)


def check_shard_group(size, parallel):
    """Refuse a --shard-group that does not fit to the processes."""
    world = read_ranks()[1]
    if size and parallel != "fsdp":
        raise UserError("--shard-group: only for shards; add --parallel fsdp")
    if size and world % size:
        raise UserError(f"--shard-group {size}: does not divide the {world} processes of this run; "
                        "give the number of processes per machine")


def read_ranks():
    """-> the number of this process, how many there are, its number on this machine, by torchrun.

    Another launcher's or left-over variables raise UserError: waiting for processes that nobody
    starts would hang.
    """
    if UNDER_TORCHRUN:
        return tuple(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if (os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")) == ("0", "1"):
        return 0, 1, 0
    found = " ".join(f"{name}={os.environ[name]}" for name in TORCHRUN if name in os.environ)
    raise UserError(f"the environment has {found}, but torchrun did not start this process: start "
                    "it with torchrun (see torchrun.sh), which sets them all, or unset them for a "
                    "single process")


def pick_device(name, local_rank) -> torch.device:
    """The torch.device called `name`, for the process number local_rank of this machine."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; give cuda, cuda:0, mps or cpu") from None
    if device.type in ("cpu", "mps"):
        return device
    if device.type != "cuda":
        raise UserError(f"--device {name}: not supported; give cuda, cuda:0, mps or cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch {torch.__version__} sees no GPU; try cpu")
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} GPU(s); "
                        "torchrun's --nproc_per_node must not be larger")
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device


@contextlib.contextmanager
def lost_process():
    """Turn the error of a process group, one of whose processes ended or stalled, into one line."""
    try:
        yield
    except RuntimeError as e:
        if not dist.is_initialized() or not any(k in str(e).lower() for k in ("gloo", "nccl")):
            raise
        reason = str(e).splitlines()[0][:150]
        raise UserError(f"another process of this run has ended or stalled ({reason}); what was "
                        "saved is whole: --resume goes on from there") from e


def on_any(flag, env) -> bool:
    """True on every process if `flag` is true on one of them; each must call it."""
    if env.world == 1:
        return bool(flag)
    count = torch.tensor(float(bool(flag)), device=env.device)
    dist.all_reduce(count)
    return count.item() > 0


def seed_of(*numbers) -> int:
    """A 63-bit seed from integers or strings, e.g. (seed, step): neighbours give unrelated
    streams."""
    text = ",".join(map(str, numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*numbers) -> torch.Generator:
    """CPU generator keyed by numbers: the same noise on any device, after any resume, in any
    batch."""
    return torch.Generator().manual_seed(seed_of(*numbers))


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _shuffled(n, seed, epoch):
    """The order of n items in one epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(n, first, batch, seed=0):
    """Indices, into n items, of the samples numbered first .. first + batch - 1 of a run.

    Each epoch has its own order. The result depends only on the arguments, so a resumed run
    continues where it stopped, on any number of processes.
    """
    picked = []
    for i in range(first, first + batch):
        epoch, position = divmod(i, n)
        picked.append(int(_shuffled(n, seed, epoch)[position]))
    return picked


class SampleNumbers:
    """The numbers, within the whole run, of the samples that this process reads: numbers[k] for
    micro-step k.

    All randomness of a sample (its place in the data, its noise) is derived from its number, so
    a run does not depend on how samples are split over processes and micro-steps.
    samples_read: how many samples the run had read before update `start`. per_update: samples that
    all processes read for one.
    """

    def __init__(self, args, env, start, samples_read):
        together = args.batch * env.world
        self.per_update, self.samples_read = args.accum * together, samples_read
        end = samples_read + (args.steps - start) * args.accum * together
        self.batch = args.batch
        self.firsts = range(samples_read + env.rank * args.batch, end, together)

    def __getitem__(self, k):
        return range(self.firsts[k], self.firsts[k] + self.batch)


def mean_over_ranks(values: dict, env) -> dict:
    """{name: float} -> the same, averaged over the processes (each must call it, with the same
    names)."""
    if env.world == 1:
        return values
    t = torch.tensor(list(values.values()), dtype=torch.float64, device=env.device)
    dist.all_reduce(t)
    return dict(zip(values, (t / env.world).tolist()))


def gather_rows(rows, env) -> list:
    """Each process's list -> all of them joined, on every process (each must call it)."""
    if env.world == 1:
        return rows
    parts = [None] * env.world
    dist.all_gather_object(parts, rows, _patient[-1])  # some may have had more to do
    return [row for part in parts for row in part]


def average_gradients(net, on):
    """With on=False gradients add up on each process; the next backward with on=True averages
    them."""
    if isinstance(net, torch.nn.parallel.DistributedDataParallel):
        net.require_backward_grad_sync = on  # what DDP's no_sync() switches
    elif hasattr(net, "set_requires_gradient_sync"):  # FSDP2
        net.set_requires_gradient_sync(on)


# ---- options

def _number(kind, low, high, words):
    """An argparse type: text -> number of `kind` within low..high (NaN is not)."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value
    return parse


COUNT = _number(int, 1, 10 ** 9, "a whole number of 1 or more")
NATURAL = _number(int, 0, 10 ** 15, "a whole number of 0 or more")
RATE = _number(int, 1, 1000, "a whole number from 1 to 1000")
REAL = _number(float, -1e9, 1e9, "a number")
POSITIVE = _number(float, 1e-12, 1e9, "a number above 0")
UNSIGNED = _number(float, 0, 1e9, "a number of 0 or more")
SHARE = _number(float, 0, 1, "a number from 0 to 1")
DECAY = _number(float, 0, 1 - 1e-9, "a number from 0 to below 1")
SEED = _number(int, 0, 2 ** 64 - 1, "a whole number from 0 to 2^64 - 1")


def prompt_text(text):
    """An argparse type for prompts: refuses bytes that are not UTF-8."""
    try:
        return check_text(text, "the text")
    except UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def backprop(text):
    """An argparse type for --backprop: "last" -> 1, "last-K" -> K, "rand" -> "rand"."""
    if text == "rand":
        return text
    k = "1" if text == "last" else text.removeprefix("last-")
    if not k.isdigit() or int(k) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not last, last-K (K of 1 or more) or rand")
    return int(k)


def bucket(text):
    """An argparse type: "25x480x720" -> (frames, height, width)."""
    try:
        size = tuple(int(x) for x in text.lower().split("x"))
    except ValueError:
        size = ()
    if len(size) != 3 or min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not FRAMESxHEIGHTxWIDTH, such as 25x480x720")
    return size


# The options that mean the same in every method, by group: {group: {flag: argparse's keywords}}.
YES_NO = argparse.BooleanOptionalAction
OPTIONS = {
    "base": {
        "--base": dict(help="base model; `python bases.py` lists them"),
        "--weights": dict(help="folder with the base's public weights (default: download them)"),
        "--init": dict(metavar="RUN|FILE",
                       help="what to start from: a run on this base, FOLDER[:STEP], or a public "
                            "file, of LoRA (FILE[:SCALE]) or weights (default: the base alone)"),
        "--out": dict(help="folder of this run: checkpoints, log, pictures"),
        "--resume": dict(action="store_true", help="continue the run in --out, exactly"),
    },
    "prompts": {
        "--prompts": dict(help="file of training prompts (with a first frame: image|||caption "
                               "lines)"),
        "--activities": dict(help="file of activities; --prompts then holds nouns, and prompts are "
                                  "a NOUN ACTIVITY"),
    },
    "data": {
        "--data": dict(help="clips with captions: a folder, .csv, .jsonl or a VGen list (tiny "
                            "bases make their own)"),
        "--data-root": dict(help="folder that the paths in lists start from (default: the list's "
                                 "folder, then the working directory)"),
        "--buckets": dict(type=bucket, nargs="+", default=[], metavar="FxHxW",
                          help="clip sizes beside that of --frames, --height and --width, such as "
                               "33x416x240 1x480x832: a clip is read at the one nearest in aspect "
                               "of those it is long enough for, a picture at one of 1 frame"),
        "--empty-captions": dict(action="store_true",
                                 help="train clips without a caption on an empty one, instead of "
                                      "refusing them"),
        "--read-fps": dict(type=POSITIVE, help="frame rate to read at (default: every frame)"),
        "--cache-latents": dict(action=YES_NO, default=False,
                                help="encode every clip once, into --out, instead of in each step"),
        "--workers": dict(type=NATURAL, default=2, help="processes that read clips"),
        "--drop-text": dict(type=SHARE, default=0.1,
                            help="probability of replacing a caption by the negative prompt"),
    },
    "images": {
        "--image-share": dict(type=SHARE, default=0.125,
                              help="probability that a step trains on single frames"),
        "--images": dict(help="pictures and captions for these steps, listed like --data "
                              "(default: frames of --data)"),
    },
    "pixels": {
        "--frames": dict(type=COUNT, help="frames per clip (default: the base's)"),
        "--height": dict(type=COUNT, help="height in pixels (default: the base's)"),
        "--width": dict(type=COUNT, help="width in pixels (default: the base's)"),
        "--fps": dict(type=COUNT, help="frame rate given to the network, for bases that take one"),
    },
    "sampler": {
        "--sampler": dict(choices=SAMPLERS, help="sampler (default: the base's)"),
    },
    "sampling": {
        "--negative": dict(type=prompt_text, help="negative prompt: text of the unconditional "
                                                  "branch (default: the base's)"),
        "--sample-steps": dict(type=COUNT, help="sampler steps (default: the base's)"),
        "--eta": dict(type=SHARE, help="DDIM noise: 0 is deterministic, 1 is DDPM (default: the "
                                       "base's)"),
        "--shift": dict(type=POSITIVE, help="flow matching: moves the steps of sampling and of "
                                           "training towards the noise (default: the base's; small "
                                           "clips need less)"),
        "--cfg": dict(type=REAL, help="guidance scale w in u + w (c - u); 1 turns guidance off "
                                      "(default: the base's)"),
    },
    "reward": {
        "--reward": dict(help="a reward of rewards.py, a weighted sum such as "
                              "hps:1.5,aesthetic:0.1, or my_file.py:function"),
        "--reward-weights": dict(help="folder with the rewards' files (default: download them)"),
    },
    "optimisation": {
        "--steps": dict(type=COUNT, help="optimizer steps"),
        "--batch": dict(type=COUNT, default=1, help="samples per process and micro-step"),
        "--accum": dict(type=COUNT, default=1, help="micro-steps per step (gradient accumulation)"),
        "--lr": dict(type=POSITIVE, help="learning rate"),
        "--optim": dict(choices=("adamw", "adamw8bit"), default="adamw",
                        help="optimizer; adamw8bit keeps its moments in 8 bits (needs torchao; "
                             "--resume then rounds them once more)"),
        "--wd": dict(type=UNSIGNED, default=0.0, help="AdamW weight decay"),
        "--betas": dict(type=DECAY, nargs=2, default=(0.9, 0.999), help="AdamW betas"),
        "--lr-schedule": dict(choices=("constant", "cosine", "cosine-restarts"), default="constant",
                              help="after the warm-up: constant, one cosine to 0, or four of them"),
        "--warmup": dict(type=NATURAL, default=0, help="steps of linear learning-rate warm-up"),
        "--clip": dict(type=POSITIVE, default=1.0, help="gradients are clipped to this norm"),
    },
    "ema": {
        "--ema": dict(type=DECAY, default=0.0, help="decay of the weights' moving average, which "
                                                    "is what gets saved; 0: no average"),
    },
    "lora": {
        "--rank": dict(type=NATURAL, default=16, help="LoRA rank; 0 trains all weights, where the "
                                                      "method allows it"),
        "--alpha": dict(type=POSITIVE, default=16.0, help="LoRA is scaled by alpha / rank"),
        "--lora-targets": dict(nargs="+", help="names of the linear layers that get LoRA branches "
                                               "(default: the network's attentions)"),
        "--frozen": dict(choices=("int8",), help="int8: keep the network's frozen linear weights "
                                                 "in 8 bits (default: in --dtype)"),
    },
    "machine": {
        "--device": dict(help="cuda, cuda:1, mps or cpu (default: cuda if there is one)"),
        "--dtype": dict(choices=tuple(DTYPES), help="precision of frozen weights and of autocast "
                                                    "(default: bf16 on a GPU, else fp32)"),
        "--grad-ckpt": dict(action=YES_NO, default=True,
                            help="recompute blocks in the backward pass: less memory, slower"),
        "--parallel": dict(choices=("ddp", "fsdp"), default="ddp",
                           help="several GPUs: a full copy on each (ddp) or shards (fsdp)"),
        "--shard-group": dict(type=COUNT, metavar="N",
                              help="with fsdp: shard within groups of N processes, such as those "
                                   "of one machine, with a copy in each group (default: one "
                                   "group)"),
        "--compile": dict(action="store_true",
                          help="compile the network's blocks: faster steps after a slow start"),
        "--offload": dict(action="store_true",
                          help="keep saved activations (with fsdp weights, too) in CPU memory; "
                               "sample.py: all but the block at work"),
    },
    "evaluation": {
        "--eval-prompts": dict(help="file of held-out prompts to evaluate on (with a first frame: "
                                    "image|||caption lines)"),
        "--eval-n": dict(type=COUNT, default=8, help="number of held-out prompts used"),
    },
    "run": {
        "--seed": dict(type=SEED, default=0, help="seed of everything random"),
        "--save-every": dict(type=COUNT, default=500, help="steps between checkpoints"),
        "--keep": dict(type=COUNT, default=1, help="number of numbered checkpoints kept"),
        "--preview-every": dict(type=NATURAL, default=0,
                                help="steps between evaluations during training; 0: none"),
        "--log-every": dict(type=COUNT, default=1, help="steps between log lines on the screen"),
        "--tensorboard": dict(action="store_true", help="also log to TensorBoard, into --out"),
        "--wandb": dict(action="store_true", help="also log to Weights & Biases"),
    },
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line; `doc` is the file's docstring. No abbreviated options.

    Its attributes are argparse types, e.g. type=p.COUNT.
    """
    COUNT, NATURAL, REAL = staticmethod(COUNT), staticmethod(NATURAL), staticmethod(REAL)
    POSITIVE, UNSIGNED = staticmethod(POSITIVE), staticmethod(UNSIGNED)
    SHARE, DECAY, BACKPROP = staticmethod(SHARE), staticmethod(DECAY), staticmethod(backprop)
    SEED, TEXT, RATE = staticmethod(SEED), staticmethod(prompt_text), staticmethod(RATE)
    YES_NO = YES_NO

    def __init__(self, doc):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=raw, allow_abbrev=False)

    def error(self, message):
        message = message.removeprefix("argument ")
        raise UserError(f"{message} ({self.prog} --help lists the options)")

    def options(self, groups, without=(), only=None):
        """Declare the options of some groups of OPTIONS, e.g. p.options("base pixels machine").

        without: flags that this method does not have; only: the few that it has.
        """
        for group in groups.split():
            for flag, keywords in OPTIONS[group].items():
                if flag in (only or OPTIONS[group]) and flag not in without:
                    self.add_argument(flag, **keywords)

    def parse(self, argv, defaults, presets=None):
        """Parse the command line; `defaults`, then presets[--base], replace the parser's own.

        Both are {name of an option: value}; a name that is no option is a mistake of ours.
        """
        known = {action.dest for action in self._actions}
        for given in (defaults, *(presets or {}).values()):
            assert given.keys() <= known, f"no such option: {given.keys() - known}"
        self.set_defaults(**defaults)
        base = self.parse_known_args(argv)[0].base
        self.set_defaults(**(presets or {}).get(base, {}))
        args = self.parse_args(argv)
        if "data_root" in known and args.data_root and not args.data:
            raise UserError("--data-root: where the paths in --data start; give --data, too")
        if "frozen" in known and args.frozen and not args.rank:
            raise UserError(f"--frozen {args.frozen}: with --rank 0 no weight is frozen; give a "
                            "--rank of 1 or more")
        if "optim" in known and (args.optim, args.parallel) == ("adamw8bit", "fsdp"):
            raise UserError("--optim adamw8bit: its moments cannot be saved in shards; give "
                            "--optim adamw or --parallel ddp")
        if "buckets" in known and args.buckets and not args.data:
            raise UserError("--buckets: sizes for the clips of --data; give --data, too")
        return args


def lr_at(step, args):
    """Learning rate of update `step` (0-based): linear warm-up, then constant, one cosine to 0,
    or four.

    VGen's warm-up lags by one update and wastes the first one at rate 0. After warm-up the two
    agree.
    """
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.lr_schedule == "constant":
        return args.lr
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    if args.lr_schedule == "cosine-restarts":
        done = 4 * done % 1
    return args.lr * (1 + math.cos(math.pi * done)) / 2


def set_rate(group, rate):
    """Set the learning rate of one of an optimizer's groups."""
    if isinstance(group["lr"], Tensor):  # torchao's AdamW8bit, whose steps are compiled
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


# ---- a training run

class Run:
    """One training run: its processes, folder, log, optimizer state and checkpoints.

    It owns state but no control flow; the loop stays in the method file:

        run = Run(args, "vader")               # starts the processes; checks --out and --resume
        run.attach(...)                        # what trains; --resume puts the state back
        for step in run.steps():               # sets the learning rate; ends on SIGTERM
            for numbers in run.micro_steps():  # numbers of this process's samples in the whole run
                with run.forward():            # autocast
                    loss = ...
                run.backward(loss)
            run.update()                       # clip, step, average, log, save when due
        run.finish("loss", "grad")             # the curve; ends the processes

    Attributes: args, env, out (Path), start and done (updates made before and so far), numbers,
    stopped.
    """

    def __init__(self, args, method, trains=True):
        """trains False: no training, so an earlier run in --out is no obstacle."""
        check_packages(args)
        check_shard_group(args.shard_group, args.parallel)
        self.args, self.method, self.out = args, method, Path(args.out)
        self.state = check_out(args, method) if trains else check_writable(args.out)
        self.env = setup(args.device, args.dtype, args.seed, args.parallel, args.offload)
        self.resumed, self.stopped = self.state is not None, False
        self.totals, self.saved = {}, None
        self.init = []  # what --init puts on the base, see bases.start_base()
        self.together = False  # else one process may have worked for the others

    @property
    def device(self):
        return self.env.device

    @property
    def dtype(self):
        """Precision of frozen weights and of autocast."""
        return self.env.dtype

    @property
    def main(self):
        """Is this the process that writes files?"""
        return self.env.main

    def attach(self, opt, params, nets, parts, meta, ema=None, ema_decay=0.0):
        """Tell the run what is trained. With --resume, restore its state.

        opt: the optimizer; params: {public key: parameter} for the checkpoint (common.trained);
        nets: the networks that parallelize() wrapped; parts: {name: module} to count in the log;
        meta: plain values that sample.py needs besides method, base and --rank, --alpha and
        --lora-targets. ema: {key: tensor} that follow params with constant ema_decay; None:
        copies are made if ema_decay is not 0, and the decay is warmed up so that the start is
        forgotten.
        """
        self.opt, self.params, self.nets = opt, params, nets
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.ema, self.ema_decay, self.ema_warmup = ema, ema_decay, ema is None
        if ema is None and ema_decay:
            self.ema = {k: p.detach().clone() for k, p in params.items()}
        self.start, self.samples_read = load_state(
            self.args, self.env, self.state, params, opt, self.ema, self.scaler)
        self.state = None  # not these copies for the whole run
        self.own()
        self.done = self.start
        lora = {k: v for k, v in vars(self.args).items() if k in ("rank", "alpha", "lora_targets")}
        if lora:  # without --lora-targets, the network's own
            lora["lora_targets"] = lora["lora_targets"] or parts["net"].lora_targets
        self.meta = dict({"rank": 0} | lora | meta, method=self.method, base=self.args.base)
        if self.init:
            self.meta["init"] = [checksum for checksum, _ in self.init]
        if self.main and not self.resumed:
            keep_init(self.out, [source for _, source in self.init])
        self.numbers = SampleNumbers(self.args, self.env, self.start, self.samples_read)
        self.guard = FiniteGuard(self.env)
        self.log = Log(self.args, self.env, parts, self.start)
        if self.main:  # a resumed run repeats what came after its checkpoint
            kept = min(self.start + 1, self.args.steps) if self.resumed else 0
            keep_lines(self.out / "eval.jsonl", kept)

    def adamw(self, params):
        """The optimizer of these parameters or groups of them: --optim, --lr, --betas, --wd."""
        args = self.args
        if args.optim == "adamw8bit":
            from torchao.optim import AdamW8bit
            return AdamW8bit(params, args.lr, tuple(args.betas), weight_decay=args.wd)
        return torch.optim.AdamW(params, args.lr, args.betas, weight_decay=args.wd)

    def own(self):
        """Be the only run in --out from now on; called before anything is written."""
        own_folder(self.out)

    def steps(self):
        """Yield the number of each update that is still to be made (0-based), its learning rate
        set."""
        stop.listen()
        try:
            for step in range(self.start, self.args.steps):
                self.step = step
                for group in self.opt.param_groups:
                    set_rate(group, lr_at(step, self.args) * group.get("lr_factor", 1.0))
                if not self.together:
                    meet()
                self.together = stop.training = True
                yield step
                if self.stopped:
                    break
        finally:
            stop.training = False
        if stop.reason:
            raise UserError(f"{stop.reason}; saved after step {self.done}: --resume goes on")

    def micro_steps(self):
        """Yield the numbers of this process's samples, micro-step by micro-step."""
        for micro in self.turns(range(self.args.accum)):
            yield self.numbers[(self.step - self.start) * self.args.accum + micro]

    def turns(self, calls):
        """Yield the backward passes of an update: the last averages the processes' gradients."""
        for turn, call in enumerate(calls, 1):
            for net in self.nets:
                average_gradients(net, turn == len(calls))
            yield call

    def say(self, message):
        """Print a line, from one process only; None: nothing."""
        if self.main and message:
            print(message, flush=True)

    def generator(self, *key):
        """A CPU generator for the run's seed and this key."""
        return generator(self.args.seed, *key)

    def generators(self, numbers):
        """A CPU generator per sample: all that is random about it."""
        return [self.generator("sample", i) for i in numbers]

    def pick(self, n, numbers):
        """Indices, into n items, of the samples with these numbers; each epoch has its own
        order."""
        return batch_indices(n, numbers[0], len(numbers), self.args.seed)

    def forward(self):
        """Context for network calls: autocast and --offload."""
        return self.env.autocast()

    def backward(self, loss, /, turns=None, **values):
        """Accumulate the gradients of loss.mean(). `values` are averaged over the update and
        logged.

        turns: backward passes per update (default: --accum). Without values, the loss itself is
        logged as "loss".
        """
        turns = turns or self.args.accum
        self.scaler.scale(loss.mean() / turns).backward()
        for name, value in (values or {"loss": loss}).items():
            mean = value.detach().float().mean() / turns
            self.totals[name] = self.totals.get(name, 0.0) + mean

    def optimize(self):
        """Make an optimizer step. -> what backward() averaged, {name: value}, and the norm of the
        gradients."""
        totals, self.totals = self.totals, {}
        norm = self.guard.step(
            self.opt, self.scaler, self.params.values(), self.args.clip, **totals)
        if self.ema is not None:
            warm = (self.step + 1) / (self.step + 10) if self.ema_warmup else 1.0
            move_average(self.ema, self.params, min(self.ema_decay, warm))
        return totals, norm

    def update(self, **more):
        """Make the optimizer step; log (with `more` floats), and save when due."""
        totals, norm = self.optimize()
        self.samples_read += self.args.batch * self.args.accum * self.env.world
        self.log.step(self.step, **totals | more, grad=norm, lr=self.opt.param_groups[0]["lr"])
        self.done = self.step + 1
        self.stopped = on_any(stop.asked, self.env)
        due = self.done % self.args.save_every == 0 or self.done == self.args.steps
        if due or self.stopped or self.preview_due:  # an evaluation may be stopped at any moment
            self.save()
            if not self.stopped:
                stop.end_step()

    def save(self):
        """Write the checkpoint and the state for --resume, unless they are of this step already.

        Every process must call it.
        """
        if self.saved == self.done:
            return
        self.saved, self.together = self.done, False
        save_checkpoint(self.args, self.env, self.done, self.samples_read, self.params, self.meta,
                        self.opt, self.ema, self.scaler)

    @property
    def preview_due(self):
        """Is it time for an evaluation (--preview-every)? Those before and after training are
        extra."""
        every = self.args.preview_every
        due = every and self.done % every == 0 and self.done < self.args.steps
        return bool(due and not self.stopped)

    @contextlib.contextmanager
    def averaged(self, net):
        """Context to sample in: `net` does not drop out, and the trained weights are their moving
        average, where there is one."""
        net.eval()
        try:
            with using_average(self.params, self.ema):
                yield
        finally:
            net.train()

    def record(self, name, row):
        """Write the results of evaluation NAME, {name: value or dict}, to OUT/eval.jsonl and the
        screen."""
        keep_lines(self.out / "eval.jsonl", self.done)  # one line per step: the last word counts
        append_line(self.out / "eval.jsonl", {"step": self.done, **row})
        numbers = {k: v for part in row.values() if isinstance(part, dict) for k, v in part.items()}
        numbers = {k: v for k, v in row.items() if isinstance(v, float)} | numbers
        words = " ".join(f"{k} {v:.4f}" for k, v in numbers.items())
        print(f"held-out, {name}: {words}", flush=True)
        self.log.scalars(self.done, {f"held-out/{k}": v for k, v in numbers.items()})

    def gather(self, rows):
        """A list from each process -> all of them, sorted. Every process must call it."""
        return sorted(gather_rows(rows, self.env))

    def share_out(self, samples, chosen, name):
        """Samples of this process -> those to train on, each with its value of `chosen` as `name`.

        samples: dictionaries with a "number"; chosen {number: value}, of all processes. Each gets
        as many, in whole batches, as the one with most; spare ones have the value 0. Values are
        scaled so that a mean over samples and processes is the mean over the chosen ones.
        """
        own = sum(sample["number"] in chosen for sample in samples)
        most = -(-max(self.gather([own])) // self.args.batch) * self.args.batch
        scale = self.env.world * most / len(chosen)
        mine = sorted(samples, key=lambda sample: sample["number"] not in chosen)[:most]
        return [sample | {name: scale * chosen.get(sample["number"], 0.0)} for sample in mine]

    def append(self, file, rows):
        """Rows {name: value} of the current update -> lines of OUT/file."""
        for row in rows if self.main else ():
            append_line(self.out / file, {"step": self.done, **row})

    def earlier(self, file):
        """The lines of OUT/file that come before this run's first update; later ones are cut
        off."""
        rows = lines_before(self.out / file, self.start)
        if self.main:  # a resumed run repeats what came after its checkpoint
            keep_lines(self.out / file, self.start)
        return rows

    def out_of_patience(self, score):
        """Keep the best checkpoint; True after --patience evaluations without a better `score`.

        score: a column of eval.jsonl. Every process must call it, after save(), and gets the
        answer.
        """
        ended, patience = False, self.args.patience
        if self.main:
            scores = [row[score] for row in read_lines(self.out / "eval.jsonl")]
            best = max(range(len(scores)), key=scores.__getitem__)
            if best == len(scores) - 1:
                write_atomic(self.out / "best.safetensors",
                             lambda p: shutil.copy(self.out / "ckpt.safetensors", p))
            ended = len(scores) - 1 - best >= patience
        if ended:
            verdict = "best.safetensors is the best" if best else "none was better than the base"
            print(f"no better score for {patience} evaluations: {verdict}", flush=True)
        meet()
        return on_any(ended, self.env)

    def finish(self, *keys):
        """Draw curve.png of these columns of the log, if any, and end the processes."""
        if self.main and keys:
            title = f"{self.method} on {self.args.base}"
            draw_curve(self.log.path, self.out / "curve.png", keys, title)
        release_folders()
        if dist.is_initialized():
            dist.destroy_process_group()


class FiniteGuard:
    """The optimizer's step, skipped where a loss or a gradient is not finite; 10 such in a row
    end the run."""

    def __init__(self, env):
        self.env, self.bad = env, 0

    def step(self, opt, scaler, params, clip, **terms) -> Tensor:
        """Unscale (fp16), clip the gradients to a norm of `clip`, step, clear them. -> their norm
        before.

        terms: the named loss terms of this step (0-d tensors). Every process decides the same.
        """
        scaler.unscale_(opt)
        norm = clip_gradients(params, clip)
        wrong = [k for k, v in (terms | {"gradient": norm}).items() if not torch.isfinite(v).all()]
        loss_is_wrong = on_any(wrong and wrong != ["gradient"], self.env)
        if not on_any(wrong, self.env):
            scaler.step(opt)
            scaler.update()
            self.bad = 0
        elif not loss_is_wrong and scaler.get_scale() > 1:  # 1 without fp16
            scaler.update(scaler.get_scale() / 2)  # fp16 looks for its scale by overflowing
        else:
            scaler.update(scaler.get_scale())
            self.bad += 1
            if wrong:
                print(f"warning: {wrong[0]} is not finite: step skipped ({self.bad} in a row)",
                      flush=True)
            if self.bad >= 10:
                raise UserError(f"{(wrong or ['a loss term'])[0]} was not finite 10 steps in a "
                                "row; the last checkpoint is kept: try a lower --lr, a smaller "
                                "--clip, or --dtype fp32")
        opt.zero_grad()
        return norm


def clip_gradients(params, largest):
    """Scale the gradients to a norm of at most `largest`. -> the norm before, a plain tensor.

    Whole tensors and FSDP2's shards may stand beside each other (a network and its text encoder).
    """
    grads = [p.grad for p in params if p.grad is not None]
    kinds = [[g for g in grads if type(g) is kind] for kind in {type(g): None for g in grads}]
    norms = [torch.nn.utils.get_total_norm(part) for part in kinds]
    norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    norm = torch.stack([n.to(norms[0].device) for n in norms]).norm()
    factor = largest / (norm.item() + 1e-6)
    for part in kinds if factor < 1 else ():
        torch._foreach_mul_(part, factor)
    return norm


@torch.no_grad()
def move_average(ema, params, decay):
    """ema <- decay ema + (1 - decay) params, both {key: tensor}; shards and whole tensors side by
    side."""
    for kind in {type(p): None for p in params.values()}:
        keys = [k for k, p in params.items() if type(p) is kind]
        torch._foreach_lerp_([ema[k] for k in keys], [params[k].detach() for k in keys], 1 - decay)


@contextlib.contextmanager
def using_average(params, ema):
    """While it lasts, params {key: parameter} hold the moving average ema {key: tensor} (None:
    themselves)."""
    kept = {k: params[k].detach().clone() for k in ema or {}}
    try:
        for k in kept:
            params[k].data.copy_(ema[k])
        yield
    finally:
        for k, weights in kept.items():
            params[k].data.copy_(weights)


@contextlib.contextmanager
def memory_advice(*options):
    """Turn an out-of-memory error into one line that lists `options` to try, the best one first."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        no_memory = isinstance(e, MemoryError | torch.OutOfMemoryError)
        if not no_memory and "can't allocate memory" not in str(e):
            raise
        reason = (str(e).splitlines() or ["no memory"])[0][:120]
        advice = f"; try, in this order: {', '.join(options)}" if options else ""
        raise UserError(f"out of memory ({reason}){advice}") from e


# ---- log

def check_packages(args):
    """Refuse options, before any work, that need a package which is missing."""
    for asked, option, package in (
            (args.tensorboard, "--tensorboard", "tensorboard"), (args.wandb, "--wandb", "wandb"),
            (args.optim == "adamw8bit", "--optim adamw8bit", "torchao")):
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(f"{option}: the package is missing; pip install {package}")


class Log:
    """One line per step on the screen and in OUT/log.jsonl (rank 0); TensorBoard and W&B on
    request."""

    def __init__(self, args, env, parts, start=0):
        """parts: {name: module}, counted in the header; start: the first step (not 0 after a
        resume)."""
        self.args, self.env, self.start, self.clock = args, env, start, time.time()
        self.path, self.board, self.wandb = Path(args.out, "log.jsonl"), None, None
        if not env.main:
            return
        keep_lines(self.path, start)
        arguments = json.dumps(vars(args), indent=1, default=str)
        write_atomic(Path(args.out, "args.json"), lambda p: p.write_text(arguments, "utf-8"))
        print("arguments:", " ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None))
        print(f"device: {device_name(env.device)} x {env.world}, {str(env.dtype)[6:]};",
              ", ".join(f"{k} {v}" for k, v in versions().items()))
        for name, module in parts.items():
            total = sum(p.numel() for p in module.parameters())
            trains = sum(p.numel() for p in module.parameters() if p.requires_grad)
            print(f"{name}: {trains:,} of {total:,} parameters are trained")
        print(f"effective batch: {args.batch} per process x {args.accum} accumulated x {env.world} "
              f"processes = {args.batch * args.accum * env.world}", flush=True)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(args.out)
        if args.wandb:
            import wandb
            path = Path(args.out, "wandb.id")  # a resumed run goes on in its W&B run
            known = read_text(path).strip() if args.resume and path.exists() else None
            self.wandb = wandb.init(project="nanovideo", name=Path(args.out).name,
                                    config=vars(args), id=known, resume="allow")
            write_atomic(path, lambda p: p.write_text(self.wandb.id, "utf-8"))

    def scalars(self, step, values):
        """{name: float} to TensorBoard and W&B."""
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def video(self, step, name, frames, fps, caption=""):
        """uint8 frames (f,h,w,3) to TensorBoard (as a gif) and W&B."""
        if self.board:
            import imageio.v3 as iio
            from tensorboard.compat.proto.summary_pb2 import Summary
            gif = iio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
            picture = Summary.Image(height=frames.shape[1], width=frames.shape[2], colorspace=3,
                                    encoded_image_string=gif)
            summary = Summary(value=[Summary.Value(tag=name, image=picture)])
            self.board.file_writer.add_summary(summary, step)
        if self.wandb:
            import wandb
            clip = wandb.Video(frames.transpose(0, 3, 1, 2), fps=fps, format="gif", caption=caption)
            self.wandb.log({name: clip}, step=step)

    def step(self, step, **values):
        """Log the floats of a finished step (0-based), averaged over the processes: each must
        call this."""
        values = mean_over_ranks({k: float(v) for k, v in values.items()}, self.env)
        now, seconds = time.time(), time.time() - self.clock
        self.clock = now
        if not self.env.main:
            return
        append_line(self.path, {"step": step, **values, "seconds": round(seconds, 3)})
        self.scalars(step, values)
        if step % self.args.log_every == 0 or step == self.args.steps - 1:
            shown = " | ".join(f"{k} {v:.3g}" if k == "lr" else f"{k} {v:.4f}"
                               for k, v in values.items())
            print(f"step {step + 1}/{self.args.steps} | {shown} | {seconds:.2f} s", flush=True)
        if step == self.start + 1:  # the first step compiles and allocates: time the second
            left = seconds * (self.args.steps - step - 1)
            print(f"{seconds:.2f} s per step, about {left / 60:.0f} min to go, "
                  f"peak memory {peak_memory(self.env.device):.2f} GB", flush=True)


def append_line(path, row):
    """One more line of a jsonl file."""
    try:
        # a link that came with the folder is not followed
        opener = lambda p, flags: os.open(p, flags | os.O_NOFOLLOW, 0o666)
        with open(path, "a", encoding="utf-8", opener=opener) as f:
            f.write(json.dumps(row) + "\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); the last checkpoint is whole: "
                        "make room, then --resume") from e


def write_lines(path, rows):
    """A whole jsonl file."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(path, lambda p: p.write_text(text, "utf-8"))


def read_lines(path) -> list:
    """Rows of a jsonl file of ours, [] without one; a line that a kill cut off is left out."""
    rows = []
    filled = os.path.exists(path) and os.path.getsize(path)
    for line in read_text(path).split("\n") if filled else ():
        with contextlib.suppress(UserError):
            rows.append(parse_json(line, path))
    return rows


def lines_before(path, step) -> list:
    """A jsonl file's rows whose "step" is below `step`."""
    rows = read_lines(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not is_a(row.get("step"), (int, 0, 10 ** 9)):
            raise UserError(f"{path}: row {number} is not of a run's log (no step); move the file "
                            "away")
    return [row for row in rows if row["step"] < step]


def keep_lines(path, before):
    """Keep a jsonl file's lines whose "step" is below `before`: a resumed run repeats what came
    after."""
    write_lines(path, lines_before(path, before) if before else [])


def peak_memory(device) -> float:
    """Peak memory of this process so far in GB (10^9 bytes): allocated on the GPU, or resident on
    the CPU."""
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


def draw_curve(log_path, png, keys, title="", x="step"):
    """Plot columns of log.jsonl: one panel per key, a dot per row at its `x`, a running mean."""
    os.environ["MPLBACKEND"] = "agg"  # Jupyter's, or a wrong one, would end the import
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    rows = read_lines(log_path)
    fig = Figure(figsize=(5 * len(keys), 3.4))
    FigureCanvasAgg(fig)
    axes = fig.subplots(1, len(keys), squeeze=False)
    for ax, key in zip(axes[0], keys):
        points = [(r[x] + (x == "step"), r[key]) for r in rows if key in r]
        if not points:
            continue
        steps, values = zip(*points)
        mean, window = [], max(1, len(values) // 20)
        for i in range(len(values)):
            mean.append(sum(values[max(0, i - window + 1):i + 1]) / min(i + 1, window))
        ax.plot(steps, values, ".", ms=3, alpha=0.35)
        ax.plot(steps, mean, lw=2)
        ax.set_xlabel(x)
        ax.set_title(key)
        ax.grid(alpha=0.3)
    fig.suptitle(title)
    fig.tight_layout()
    write_atomic(Path(png), lambda p: fig.savefig(p, dpi=110))


# ---- checkpoints: ckpt.safetensors to sample from, state.pt to resume from

UMASK = os.umask(0)
os.umask(UMASK)


def write_atomic(path, write):
    """write(temporary path), fsync, rename: a kill at any moment leaves the old file or the new,
    whole.

    If it cannot be written (disk full, no permission), the old file stays and UserError is raised.
    The temporary file has a random name and is made anew, so no link is followed.
    """
    path, tmp = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the same suffix: some writers go by it
        handle, tmp = tempfile.mkstemp(path.suffix, TEMPORARY, path.parent)
        os.close(handle)
        tmp = Path(tmp)
        write(tmp)
        os.chmod(tmp, 0o666 & ~UMASK)  # safetensors writes files that only their owner may read
        sync(tmp)
        os.replace(tmp, path)
        sync(path.parent)  # the rename, too, must outlive a power cut
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise UserError(f"{path}: cannot be written ({reason}); the old file is kept: free disk "
                        "space, or give another folder") from e
    finally:  # a signal may have come
        with contextlib.suppress(OSError):
            if tmp:
                tmp.unlink()


def sync(path):
    """Wait until a file or the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def finish(env, path, text):
    """Wait for all processes, let rank 0 write text() to the file, and wait for it."""
    for last in (False, True):
        if last and env.main:
            write_atomic(path, lambda p: p.write_text(text(), "utf-8"))
        meet()


def check_writable(folder):
    """Refuse, before any work and without leaving a trace, an --out in which nothing can be
    written or in which another run is at work."""
    folder = Path(folder)
    check_folder(folder)
    try:
        nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    except OSError as e:
        raise UserError(f"--out {str(folder)[:60]}: {e.strerror}; give another folder") from None
    if not nearest.is_dir():
        raise UserError(f"--out {folder}: {nearest} is a file; give another folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"--out {folder}: {nearest} cannot be written to; give another folder")
    if (folder / LOCK).exists():
        own_folder(folder)


def own_folder(folder):
    """Make this run the only one in --out, until release_folders() or its end, however it ends.

    Called before anything is written. Rank 0 owns the folder for all processes. What a killed run
    was writing is removed.
    """
    folder = Path(folder)
    lock = folder.absolute() / LOCK
    if not MAIN or lock in _owned:
        return
    made = [p for p in lock.parents if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _owned[lock] = open_lock(lock), made
    except OSError as e:
        raise UserError(f"--out {folder}: {lock.name} cannot be written ({e.strerror}); give "
                        "another folder") from None
    for tmp in list(folder.rglob(f"{TEMPORARY}*")):
        runs = [p for p in tmp.absolute().parents if p.is_relative_to(lock.parent)]
        if not any((p / LOCK).exists() for p in runs[:-1]):  # not of a run in a folder below
            with contextlib.suppress(OSError):
                is_folder = tmp.is_dir() and not tmp.is_symlink()
                remove = shutil.rmtree if is_folder else os.unlink
                remove(tmp)


LOCK, TEMPORARY = ".lock", ".nanovideo.tmp-"  # in a run's folder
_owned = {}  # {lock: (its descriptor, folders made for it)}


def open_lock(path) -> int:
    """Lock a file of a folder for this process -> its descriptor. UserError if another has it.

    The kernel drops such a lock when the process ends; a forked child does not keep it.
    """
    here = str(path.parent.stat().st_ino)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(handle, 200).decode(errors="replace").split()
            os.close(handle)
            if owner[2:] and owner[2] != here:  # a hard link to the lock of another folder
                path.unlink(missing_ok=True)
                continue
            raise UserError(f"--out {path.parent}: in use by another run (process, machine: "
                            f"{ascii(' '.join(owner[:2]))}); wait for it, or give another "
                            "folder") from None
        except OSError as e:  # some network file systems
            warn(f"--out {path.parent}: no locks here ({e.strerror}); start no second run in it")
        if is_file(path, handle):
            break
        os.close(handle)  # its owner has just removed it
    with contextlib.suppress(OSError):
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()} {platform.node()} {here}\n".encode())
    return handle


def is_file(path, handle) -> bool:
    """Is the open file `handle` the one at `path`?"""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def release_folders():
    """Give up what own_folder() took; a folder in which nothing was written is removed again."""
    while _owned:
        lock, (handle, made) = _owned.popitem()
        with contextlib.suppress(OSError):
            if is_file(lock, handle):
                lock.unlink()
            for folder in made:
                folder.rmdir()
        os.close(handle)


def full(t: Tensor) -> Tensor:
    """A tensor, or the whole of an FSDP2-sharded one (then every process must call), detached on
    the CPU; torchao's 8-bit moments as floats."""
    t = t.detach()
    t = t.full_tensor() if hasattr(t, "full_tensor") else t
    return (t.dequantize() if hasattr(t, "codes") else t).cpu()


def trained(parts: dict) -> dict:
    """{prefix: module} -> {key: parameter} that are trained: public names, no wrapper's `module.`
    in them."""
    found = {}
    for prefix, module in parts.items():
        for name, p in module.named_parameters():
            if p.requires_grad:
                found[prefix + name.removeprefix("module.").replace("_orig_mod.", "")] = p
    return found


def save_checkpoint(args, env, step, seen, params, meta, opt, ema=None, scaler=None):
    """Write OUT/ckpt.safetensors (averaged weights if `ema`) and the state after `step` updates.

    seen: samples read so far, all processes together; params: {key: parameter} from trained();
    ema: {key: tensor} or None; meta: what sample.py needs to know, plain types. Every process
    must call this; rank 0 writes, and of a sharded network each process its part of the state.
    The last --keep of ckpt-<step>.safetensors and the previous state are kept, in case a file is
    damaged.
    """
    def whole(t):  # only rank 0 keeps it: 8 copies of a large network would not fit
        if env.main or hasattr(t, "full_tensor"):
            t = full(t).contiguous()
        return t if env.main else None
    product = {k: whole(v) for k, v in (ema or params).items()}
    given = {k: v for k, v in vars(args).items() if v is not None}
    text = json.dumps(dict(meta, step=step, args=given, versions=versions()), default=str)
    out = Path(args.out)
    if env.main:
        about = {"nanovideo": text, "crc32": str(crc32(product, text))}
        for name in (f"ckpt-{step}.safetensors", "ckpt.safetensors"):
            write_atomic(out / name, lambda p: save_file(product, p, about))
    # all that resume needs is in the state: the two need not be of the same moment
    state = dict(step=step, seen=seen, meta=json.loads(text),
                 scaler=scaler.state_dict() if scaler else None)
    moments = {k: opt.state[p] for k, p in params.items()}
    if any(hasattr(p, "full_tensor") for p in params.values()):
        save_shards(out, env, state, params, moments, ema)
    elif env.main:
        save_state(out, state, params, moments, ema)
    if env.main:
        later = [k for k in steps_saved(out) if k > step]  # a resume from an earlier state undid
        for old in later + [k for k in steps_saved(out) if k <= step][args.keep:]:
            (out / f"ckpt-{old}.safetensors").unlink()


# a run has the files, or with --parallel fsdp the folders
STATES = "state.pt", "state", "state-previous.pt", "state-previous"


def save_state(out, state, weights, moments, ema):
    """Write OUT/state.pt, from one process: fields of `state`, {key: tensor}, {key: {name:
    tensor}}, {key: tensor} or None."""
    state = dict(
        state, weights={k: full(p) for k, p in weights.items()},
        moments={k: {n: full(v) for n, v in m.items()} for k, m in moments.items()},
        ema={k: full(v) for k, v in ema.items()} if ema else None)
    last, previous = out / "state.pt", out / "state-previous.pt"
    if last.exists():  # a second name first: at any moment one of the two is whole
        with contextlib.suppress(FileNotFoundError):
            previous.unlink()
        try:
            os.link(last, previous)
        except OSError:  # a file system without links
            os.replace(last, previous)

    def write(path):
        try:
            torch.save(state, path)
        except RuntimeError as e:  # torch's own writer hides the reason
            free = shutil.disk_usage(out).free / 1e9
            raise OSError(errno.ENOSPC, f"{free:.2f} GB free; {str(e).splitlines()[0][:80]}") from e
    write_atomic(last, write)
    for name in ("state", "state-previous"):
        remove_folder(out / name)


def keep_init(out, sources):
    """Put what a run starts from into its folder, as init-0.safetensors, init-1 ..., so that the
    folder is whole without the originals.

    sources: files, which get hard links if possible (no space, and a run's files never change), or
    {key: tensor}.
    """
    for old in out.glob(INIT.format("*")):  # of a run that ended before its first checkpoint
        old.unlink()
    for k, source in enumerate(sources):
        path = out / INIT.format(k)
        if isinstance(source, dict):
            write_atomic(path, lambda p: save_file(source, p))
            continue
        try:
            os.link(Path(source).resolve(), path)
        except OSError:  # another disk, or another owner
            write_atomic(path, lambda p: shutil.copy(source, p))


INIT = "init-{}.safetensors"


def save_shards(out, env, state, weights, moments, ema):
    """Write OUT/state/<number>.safetensors, a file per process of a shard group: like
    save_state(), but every process must call it, and none holds more than its own part.

    A tensor is what the files hold of it, one below the other; 0.safetensors has whole tensors,
    too. The folder gets its name when all files are written.
    """
    tensors = {f"weights/{k}": p for k, p in weights.items()}
    tensors |= {f"ema/{k}": t for k, t in (ema or {}).items()}
    tensors |= {f"{name}/{k}": t for k, moment in moments.items() for name, t in moment.items()}
    sharded = {name: t for name, t in tensors.items() if hasattr(t, "to_local")}
    shards = next(iter(sharded.values())).device_mesh.size(-1)
    own = {name: t.to_local() for name, t in sharded.items()}
    if env.main:
        own = tensors | own
    # a small tensor does not reach the last process
    own = {name: t.detach().cpu().contiguous() for name, t in own.items() if t.numel()}
    fresh, last, previous = out / f"{TEMPORARY}state", out / "state", out / "state-previous"
    if env.main:
        remove_folder(fresh)
    meet()
    if env.rank < shards:  # the other groups hold copies
        sums = {name: crc32({name: t}, "") for name, t in own.items()}
        about = {"nanovideo": json.dumps(dict(state, files=shards, crc32=sums))}
        write_atomic(fresh / f"{env.rank}.safetensors", lambda p: save_file(own, p, about))
    meet()
    if not env.main:
        return
    remove_folder(previous)
    try:
        for a, b in ((last, previous), (fresh, last)):
            if a.exists():
                os.rename(a, b)
        sync(out)
    except OSError as e:
        raise UserError(f"{last}: cannot be written ({e.strerror}); the old state is kept") from e
    for name in ("state.pt", "state-previous.pt"):
        (out / name).unlink(missing_ok=True)


def remove_folder(path):
    """Remove a folder, if there is one; what a kill leaves of it has a temporary name."""
    old = path.with_name(f"{TEMPORARY}old")
    shutil.rmtree(old, ignore_errors=True)
    if path.is_dir():
        os.rename(path, old)
        shutil.rmtree(old, ignore_errors=True)


def crc32(tensors, text) -> int:
    """Checksum of {key: tensor} and metadata: safetensors has none, and a disk may lose bytes of
    a file."""
    value = zlib.crc32(text.encode())
    for k in sorted(tensors):
        value = zlib.crc32(k.encode(), value)
        value = zlib.crc32(tensors[k].contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return value


def steps_saved(out):
    """Steps of the ckpt-<step>.safetensors in a run's folder, the newest first."""
    found = (p.stem.removeprefix("ckpt-") for p in Path(out).glob("ckpt-*.safetensors"))
    return sorted((int(k) for k in found if k.isdigit()), reverse=True)


def check_out(args, method):
    """Refuse to overwrite a run or to resume one with other options. -> the state to resume from,
    or None."""
    check_writable(args.out)
    files = [Path(args.out, name) for name in STATES if Path(args.out, name).exists()]
    product = Path(args.out, "ckpt.safetensors")
    if not args.resume and (files or product.exists()):
        raise UserError(
            f"{args.out} already holds a run: --resume continues it, --out FOLDER starts a new one")
    if not files and product.exists() and step_of(product) > args.save_every:
        raise UserError(f"--resume: {args.out} holds {product.name} but no state to go on from: "
                        "give another --out")
    if not files:
        return None
    for file in files:
        try:
            state = load_state_file(file)
            break
        except UserError as e:
            warn(f"{str(e)}; trying the one before it")
    else:
        raise UserError(f"--resume: no whole state in {args.out}; its ckpt.safetensors can still "
                        "be sampled from: train anew with another --out")
    then = state["meta"]["args"] | {"method": state["meta"]["method"]}
    now = vars(args) | {"method": method}
    for k in ("method", *SAME):
        if then.get(k) != now.get(k):
            raise UserError(f"--resume: the run in {args.out} has {k} {then.get(k)}, not "
                            f"{now.get(k)}: give the same, or another --out")
    if state["step"] > args.steps:
        raise UserError(f"--resume: the run in {args.out} is at step {state['step']}: give a "
                        "larger --steps")
    for bad in files[:files.index(file)] if MAIN else ():
        remove_folder(bad.with_name(f"{bad.name}.corrupt"))
        os.replace(bad, f"{bad}.corrupt")  # else the next save would make it the spare one
    return state


def load_state_file(path):
    """state.pt: its checksums compared (torch.load does not), its fields checked. Of the folder
    state/ the checksums are compared later, part by part."""
    if Path(path).is_dir():
        return check_state(open_shards(Path(path)), path)
    try:
        with zipfile.ZipFile(check_file(path, "state")) as file:
            packed = any(info.compress_type for info in file.infolist())  # torch never does
            broken = "compressed" if packed else file.testzip()
    except UserError:
        raise
    except Exception as e:  # zipfile raises everything there is
        broken = f"{type(e).__name__}: {e}"
    if broken:
        raise UserError(f"{path}: corrupt ({broken})")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # zip, pickle and EOF errors alike mean one thing to the user
        raise UserError(f"{path}: not a state of ours ({(str(e) or repr(e)).splitlines()[0][:100]})"
                        ) from e
    return check_state(state, path)


class Shards:
    """A tensor in the files of a sharded state; shards[first:last] and shards[...] read it.

    shape: that of the whole; pieces: its rows in each file, as (file, name there, number of rows,
    checksum).
    """

    def __init__(self, folder):
        self.folder, self.pieces, self.shape = folder, [], None

    def add(self, file, name, crc):
        """The rows that the next file has. UserError if they do not fit to those before."""
        shape = file.get_slice(name).get_shape()
        rows, width = shape[0], shape[1:]
        before, *known = self.shape or (0, *width)
        if known != width:
            raise UserError(f"{self.folder}: its files hold {name} in different widths")
        self.shape = torch.Size((before + rows, *width))
        self.pieces.append((file, name, rows, crc))

    def __getitem__(self, rows) -> Tensor:
        """Rows, once their pieces match their checksums and are free of NaN; else UserError."""
        first, last, _ = (slice(None) if rows is ... else rows).indices(self.shape[0])
        file, name, *_ = self.pieces[0]
        parts, start = [file.get_slice(name)[:0]], 0  # a small tensor has no rows for the last
        for file, name, count, crc in self.pieces:
            if first < start + count and start < last:
                piece = file.get_tensor(name)
                negative = name.startswith("exp_avg_sq/") and (piece.float() < 0).any()
                if crc32({name: piece}, "") != crc or negative or not is_plain(piece):
                    raise UserError(f"{self.folder}: {name} is corrupt; move this folder away, "
                                    "then --resume goes on from the state before it")
                parts.append(piece[max(first - start, 0):last - start])
            start += count
        return torch.cat(parts)


def open_shards(folder) -> dict:
    """What save_shards() wrote -> the same as from state.pt, but its tensors are Shards."""
    found, abouts = {}, []
    while not abouts or len(abouts) < abouts[0]["files"]:
        path = check_file(folder / f"{len(abouts)}.safetensors", "part of the state")
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path}: corrupt ({str(e)[:100]})") from e
        about = json_object((file.metadata() or {}).get("nanovideo", "{}"), path)
        abouts.append(about)
        if not is_a(about.get("files"), (int, 1, 10 ** 5)) or type(about.get("crc32")) is not dict \
                or any(about.get(k) != abouts[0].get(k) for k in ("files", "step", "seen")):
            raise UserError(f"{path}: not a part of this state")
        for name in file.keys():
            group, _, key = name.partition("/")
            known = found.setdefault(group, {})
            if not file.get_slice(name).get_shape():  # such as AdamW's count of steps
                known[key] = file.get_tensor(name)
            elif isinstance(known.setdefault(key, Shards(folder)), Shards):
                known[key].add(file, name, about["crc32"].get(name))
    weights, ema = found.pop("weights", {}), found.pop("ema", None)
    moments = {k: {name: group[k] for name, group in found.items() if k in group} for k in weights}
    fields = {k: abouts[0].get(k) for k in ("step", "seen", "meta", "scaler")}
    return dict(fields, weights=weights, moments=moments, ema=ema)


def check_state(state, path) -> dict:
    """A state whose fields are right, its metadata as read_meta() gives it; else UserError."""
    fault = state_fault(state)
    if fault:
        raise UserError(f"{path}: {fault}; it is damaged, or not a state of ours")
    state["meta"] = read_meta(state["meta"], path)
    return state


def is_plain(value) -> bool:
    """A dense floating tensor whose numbers are all in the file and finite?

    A file of a kilobyte may hold a tensor that claims 10^12 numbers, all the same one.
    """
    if isinstance(value, Shards):  # checked when it is read
        return True
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return False
    return (value.is_floating_point() and value.nbytes <= value.untyped_storage().nbytes()
            and is_finite(value))


def is_finite(value) -> bool:
    """Are all numbers of a floating tensor finite? The sum of inf or NaN is not."""
    if value.element_size() == 1:  # fp8, of which PyTorch makes no sums
        value = value.float()
    kind = torch.float64 if value.dtype == torch.float64 else torch.float32
    return bool(torch.isfinite(value.sum(dtype=kind)))


def like_each_other(group, weights, name):
    """What is wrong with {key: tensor} that should have the keys and shapes of `weights`."""
    if not isinstance(group, dict) or group.keys() != weights.keys():
        return f"{name} and weights have other keys"
    for key, value in group.items():
        if not is_plain(value) or value.shape != weights[key].shape:
            return f"{name} of {key} is not a tensor of finite numbers in the weight's shape"
    return None


def state_fault(state):
    """What is wrong with the content of a state.pt, in words; None: nothing."""
    names = {"step", "seen", "weights", "moments", "ema", "meta", "scaler"}
    if not isinstance(state, dict) or state.keys() != names:
        return f"its fields are not {', '.join(sorted(names))}"
    step, weights, moments = state["step"], state["weights"], state["moments"]
    if not is_a(step, (int, 0, 10 ** 9)):
        return f"step is {str(step)[:60]}"
    if not is_a(state["seen"], (int, step, 10 ** 7 * max(step, 1))):
        return f"seen is {str(state['seen'])[:60]} samples after {step} steps"
    if not isinstance(weights, dict) or not all(map(is_plain, weights.values())):
        return "weights are not tensors of finite numbers"
    if not isinstance(moments, dict) or moments.keys() != weights.keys():
        return "moments and weights have other keys"
    # a weight that never had a gradient has no moments
    having = {k: m for k, m in moments.items() if m != {}}
    for key, moment in having.items():
        if not isinstance(moment, dict) or moment.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            return f"moments of {key} are not step, exp_avg, exp_avg_sq"
        done = moment["step"]
        # grpo.py may make several optimizer steps per step
        if not is_plain(done) or done.ndim or not 0 <= done <= max(step, 0) * 10 ** 4:
            return f"moments of {key} have another step"
    if step >= 10 and weights and not having:  # FiniteGuard ends a run of so many bad steps
        return "moments are missing"
    own = {k: weights[k] for k in having}
    groups = {name: {k: m[name] for k, m in having.items()} for name in ("exp_avg", "exp_avg_sq")}
    faults = [like_each_other(group, own, name) for name, group in groups.items()]
    if state["ema"] is not None:
        faults.append(like_each_other(state["ema"], weights, "ema"))
    squares = [v for v in groups["exp_avg_sq"].values() if isinstance(v, Tensor)]
    if not any(faults) and any((v < 0).any() for v in squares):
        faults.append("exp_avg_sq is below 0")
    scaler, number = state["scaler"], (float, 1e-30, 1e30)
    fields = dict(scale=number, growth_factor=number, backoff_factor=number,
                  growth_interval=(int, 1, 10 ** 9), _growth_tracker=(int, 0, 10 ** 9))
    if scaler and not (isinstance(scaler, dict) and scaler.keys() == fields.keys()
                       and all(is_a(scaler[k], allowed) for k, allowed in fields.items())):
        faults.append("scaler is not that of an fp16 run")
    return next(filter(None, faults), None)


def step_of(path) -> int:
    """After how many updates a run's ckpt.safetensors was written."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("nanovideo")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a whole checkpoint of ours ({e}); give another --out") from e
    return read_meta(json_object(text, path), path)["step"]


def load_state(args, env, state, params, opt, ema=None, scaler=None) -> tuple[int, int]:
    """Restore check_out()'s state (None: a new run) into what is trained: plain, DDP or FSDP2.

    -> updates done, samples read. Raises UserError if the disk is too small for the checkpoints.
    """
    copies = args.keep + 1 + 2 * (3 + bool(ema))  # checkpoints; two states: weights, two moments
    needed, out = copies * sum(4 * p.numel() for p in params.values()), Path(args.out).absolute()
    free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free
    if not state and needed > free:
        raise UserError(f"--out {args.out}: checkpoints need {needed / 1e9:.1f} GB, "
                        f"{free / 1e9:.1f} GB are free; give a folder on a larger disk")
    if env.world > 1:  # a folder that not all see, or a file that one of them cannot read
        steps = [None] * env.world
        dist.all_gather_object(steps, state["step"] if state else 0, _patient[-1])
        if len(set(steps)) > 1:
            raise UserError("--resume: the processes would go on from different steps "
                            f"({min(steps)} to {max(steps)}): --out must be a folder that all "
                            "nodes share")
    if not state:
        return 0, 0

    if set(params) != set(state["weights"]):
        first = sorted(set(params) ^ set(state["weights"]))[0]
        raise UserError("--resume: the run trained other tensors than these options would "
                        f"(first difference: {first})")
    for k, p in params.items():  # copy_ would broadcast
        if state["weights"][k].shape != p.shape:
            raise UserError(f"--resume: the state's {k} has shape "
                            f"{tuple(state['weights'][k].shape)}, the network's {tuple(p.shape)}")
    if (ema is None) != (state["ema"] is None):
        raise UserError("--resume: the run was made with another --ema, on or off: give the same")
    with torch.no_grad():
        for k, p in params.items():
            p.copy_(part_like(state["weights"][k], p))
            opt.state[p] = {n: moment_like(opt, n, v, p) for n, v in state["moments"][k].items()}
            if ema is not None:
                ema[k].copy_(part_like(state["ema"][k], p))
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    for k in ("weights", "moments", "ema"):
        del state[k]  # main() keeps the state: not these copies for the whole run
    return state["step"], state["seen"]


def moment_like(opt, name, value, p):
    """A saved moment of the optimizer, laid out as the parameter p; of 8-bit AdamW quantised."""
    if not value.shape:  # the step
        return value
    value = part_like(value, p)
    if not hasattr(opt, "_new_buffer"):
        return value
    buffer = opt._new_buffer(p, name == "exp_avg")  # torchao's: signed or not
    buffer.copy_(value)
    return buffer


def part_like(value, p) -> Tensor:
    """A saved tensor, whole or Shards, laid out as the parameter p: of a shard, this process's
    rows (FSDP2 gives each the same number of rows, the last ones what is left)."""
    from torch.distributed.tensor import DTensor
    if not isinstance(p, DTensor):
        return value[...].to(p.device)
    share = -(-p.shape[0] // p.device_mesh.size(-1))
    first = min(share * p.device_mesh.get_local_rank(p.device_mesh.ndim - 1), p.shape[0])
    own = value[first:first + share].to(p.device, copy=True)  # not a view that keeps the whole
    return DTensor.from_local(own, p.device_mesh, p.placements, run_check=False, shape=p.shape,
                              stride=p.stride())
