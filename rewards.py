"""Rewards: reward(frames (n,3,h,w) in [0,1], list of n prompts) -> (n,), differentiable, higher is better.

A reward with `clip = True` judges whole clips instead: reward(clips (b,3,f,h,w) in [0,1], prompts) -> (b,).
`--reward` takes a name of REWARDS, with an argument or a weight, or a weighted sum of several, or your own:

    --reward tiny    --reward remove-colour=red    --reward tiny:1,size:0.5    --reward my_file.py:fn

    def fn(frames, prompts):            # my_file.py: frames (n,3,h,w) in [0,1]
        return frames[:, 2].mean((1, 2))

`python rewards.py --train-tiny` trains the tiny world's learned scorer (assets/tiny-scorer.safetensors).
"""
import importlib.util
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from common import COUNT, Parser, UserError, load_safetensors
from data import BACKGROUNDS, COLOURS, TINY_WORDS, tiny_batch

SCORER_FILE = Path(__file__).parent / "assets" / "tiny-scorer.safetensors"


# ---- hand-written rewards, for any base

def brightness(frames, prompts):
    """Mean pixel, 0 to 1. Says nothing about the prompt: the example of how a reward is over-optimised."""
    return frames.mean((1, 2, 3))


def redness(frames, prompts):
    """Mean of red minus the mean of green and blue, -1 to 1."""
    return (frames[:, 0] - frames[:, 1:].mean(1)).mean((1, 2))


def size(frames, prompts):
    """Share of the picture that differs from its border's mean colour, 0 to 1: how large the object is."""
    with torch.no_grad():  # the background is taken as given: it must not pay to change it
        edges = [frames[:, :, 0], frames[:, :, -1], frames[:, :, :, 0], frames[:, :, :, -1]]
        border = torch.cat(edges, dim=2).median(2).values
    distance = (frames - border[:, :, None, None]).square().sum(1).add(1e-6).sqrt()
    return torch.sigmoid((distance - 0.25) / 0.08).mean((1, 2))


def remove_colour(name, files):
    """Minus the share of pixels that have a colour of the tiny world: 0 without it, -1 all over.

    A pixel counts 1 where it is that colour, 0 where it is another of the palette, linearly in between: the
    gradient is as steep on the colour itself, and points to its nearest neighbour for all pixels alike.
    """
    if name not in COLOURS:
        raise UserError(f"--reward remove-colour={name}: choose a colour from {', '.join(COLOURS)}")
    others = [v for k, v in (COLOURS | BACKGROUNDS).items() if k != name]
    colour, others = torch.tensor(COLOURS[name]) / 255, torch.tensor(others) / 255
    far = (others - colour).square().sum(1).min()  # what `behind` is on the nearest other colour

    def reward(frames, prompts):
        pixels = frames.movedim(1, -1)[..., None, :]                         # n h w 1 3
        to_colour = (pixels - colour.to(frames)).square().sum(-1)            # n h w 1
        to_others = (pixels - others.to(frames)).square().sum(-1)            # n h w palette
        behind = (to_colour - to_others).amax(-1)  # -far on the colour; a difference of squares is linear
        return -((far / 2 - behind) / (1.5 * far)).clamp(min=0).mean((1, 2))
    return reward


def rough(x, scale):
    """Length of vectors (..., d) that is smooth at 0: |x| for |x| far above `scale`."""
    return (x.square().sum(-1) + scale ** 2).sqrt() - scale


def temporal(clips, prompts):
    """How smoothly an object on a plain background lives on, for clips of any length: 0 perfect, else below.

    Minus the sum of: second differences of its centroid over its speed (steady motion costs nothing, and
    moving less does not pay), of the log of its area, and how far its colour is from that of the first frame.
    """
    f, h, w = clips.shape[2:]
    with torch.no_grad():  # the background is taken as given
        edges = [clips[..., 0, :], clips[..., -1, :], clips[..., 0], clips[..., -1]]
        back = torch.cat([e.flatten(2) for e in edges], dim=2).median(2).values[:, :, None, None, None]
    distance = (clips - back).square().sum(1).add(1e-6).sqrt()
    mask = F.softplus(distance - 0.1, beta=50)  # b f h w; linear in the object's coverage, so that a shift of
    area = mask.sum((2, 3)) + 1e-6              # a part of a pixel counts as such
    y = (mask.sum(3) * torch.arange(h).to(mask)).sum(2) / area / w           # in widths of the picture
    x = (mask.sum(2) * torch.arange(w).to(mask)).sum(2) / area / w
    place, size = torch.stack([x, y], dim=2), area.log()[..., None]          # b f 2, b f 1
    colour = (clips * mask[:, None]).sum((3, 4)).transpose(1, 2) / area[..., None]
    speed = rough(place.diff(dim=1), 1 / 320).sum(1) / max(1, f - 1)
    bends = rough(place.diff(n=2, dim=1), 1 / 320).sum(1) / max(1, f - 2)
    swells = rough(size.diff(n=2, dim=1), 0.01).sum(1) / max(1, f - 2)
    shift = rough(colour - colour[:, :1], 0.01).mean(1)
    return -(bends / (speed + 1 / 32) + swells + shift)


temporal.clip = True


# ---- the tiny world's learned scorer, in HPS's part: a CLIP for clips (Radford et al., arXiv 2103.00020)

class TinyScorer(nn.Module):
    """Cosine of a clip's and a caption's embedding, -1 to 1. Sees the whole clip, so motion counts."""
    clip = True

    def __init__(self, dim=64):
        super().__init__()
        def conv(cin, cout, stride):
            return nn.Sequential(nn.Conv3d(cin, cout, 3, stride, padding=1), nn.GroupNorm(8, cout), nn.SiLU())
        self.video = nn.Sequential(
            conv(3, 24, (1, 2, 2)), conv(24, 48, (2, 2, 2)), conv(48, 64, (1, 1, 1)), conv(64, 96, (2, 2, 2)),
            nn.Flatten(), nn.Linear(96 * 2 * 4 * 4, dim))  # 2 frames of 4x4 are left of 8 of 32x32
        # a sum over the words: their order carries nothing in the tiny world
        self.words = nn.EmbeddingBag(len(TINY_WORDS) + 1, 64, mode="sum", padding_idx=0)
        self.text = nn.Sequential(nn.SiLU(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, dim))
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        self.index = {w: i + 1 for i, w in enumerate(TINY_WORDS)}

    def embed(self, clips, prompts):
        """clips (b,3,8,32,32) in [0,1], prompts -> two (b, dim), unit length."""
        ids = [[self.index[w] for w in p.split()] for p in prompts]
        ids = torch.tensor([row + [0] * (12 - len(row)) for row in ids], device=clips.device)
        return F.normalize(self.video(clips * 2 - 1), dim=1), F.normalize(self.text(self.words(ids)), dim=1)

    def forward(self, clips, prompts):
        video, text = self.embed(clips, prompts)
        return (video * text).sum(1)


def tiny_scorer(files):
    if not SCORER_FILE.exists():
        raise UserError(f"{SCORER_FILE} is missing: check out the repository whole, "
                        "or run python rewards.py --train-tiny")
    scorer = TinyScorer()
    scorer.load_state_dict(load_safetensors(SCORER_FILE)[0])
    scorer.requires_grad_(False).eval().to(files.device)

    def reward(clips, prompts):
        if clips.shape[1:] != (3, 8, 32, 32):
            f, h, w = clips.shape[2:]
            raise UserError(f"--reward tiny judges clips of 8 frames of 32x32, not {f} of {h}x{w}: "
                            "use it with --base tiny and --decode all")
        return scorer(clips, prompts)
    reward.clip = True
    return reward


def train_tiny(out, steps=400, batch=64, lr=2e-3, seed=0):
    """Contrastive training of TinyScorer on rendered clips with a little noise, as a decoder makes it."""
    torch.manual_seed(seed)
    scorer, start = TinyScorer(), time.time()
    opt = torch.optim.AdamW(scorer.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        clips, captions, _ = tiny_batch((seed, 7, step), batch)
        clips = (clips + 0.1 * torch.rand(()) * torch.randn_like(clips)).clamp(-1, 1) / 2 + 0.5
        video, text = scorer.embed(clips, captions)
        logits = scorer.log_scale.exp() * video @ text.T
        # captions that occur twice in the batch are right for each other's clips
        same = torch.tensor([[a == b for b in captions] for a in captions], dtype=torch.float32)
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            right = same[range(batch), logits.argmax(1)].mean()
            print(f"step {step:5d}/{steps} | loss {loss:.4f} | right caption of {batch} {right:.3f} "
                  f"| {time.time() - start:.0f} s", flush=True)
    save_file({k: v.half().contiguous() for k, v in scorer.state_dict().items()}, out)


# ---- the table

class Files:
    """Where a reward finds its public files: `weights`, a folder (None: their hub)."""

    def __init__(self, device, weights=None):
        self.device, self.weights = torch.device(device), weights


# name -> build(files), or build(argument, files) for those that take one after "="
REWARDS = {
    "tiny": tiny_scorer,
    "brightness": lambda files: brightness,
    "redness": lambda files: redness,
    "size": lambda files: size,
    "temporal": lambda files: temporal,
}
WITH_ARGUMENT = {
    "remove-colour": remove_colour,
}


class Reward:
    """A weighted sum of rewards, as get_reward() makes it. parts: [(name, weight, reward)].

    clip: one of them judges whole clips. Called with clips (b,3,f,h,w) or frames (b,3,h,w) in [0,1] -> (b,).
    """

    def __init__(self, parts):
        self.parts, self.clip = parts, any(getattr(part, "clip", False) for _, _, part in parts)

    def __call__(self, pictures, prompts):
        clips = pictures if pictures.ndim == 5 else pictures[:, :, None]
        return sum(weight * of_clips(part, clips, prompts) for _, weight, part in self.parts)


def get_reward(spec, device, weights=None) -> Reward:
    """`name[=argument][:weight]` or `file.py:function[:weight]`, several joined by commas -> their sum.

    weights: a folder with the rewards' public files (None: fetched from their hub). Raises UserError.
    """
    files, parts = Files(device, weights), []
    for text in spec.split(","):
        text = text.strip()
        file, dot_py, rest = text.partition(".py:")
        name, colon, weight = rest.partition(":") if dot_py else text.partition(":")
        try:
            number = float(weight) if colon else 1.0
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"--reward {text}: weight {weight!r} is no number; write name=argument:weight")
        build = users_function(file + ".py", name) if dot_py else named(name, files)
        parts.append((text.removesuffix(f":{weight}") if colon else text, number, build))
    return Reward(parts)


def named(text, files):
    """`name[=argument]` -> the reward of that name."""
    name, equals, argument = text.partition("=")
    if name in WITH_ARGUMENT:
        return WITH_ARGUMENT[name](argument, files)
    if name not in REWARDS:
        names = ", ".join([*REWARDS, *(f"{k}=..." for k in WITH_ARGUMENT)])
        raise UserError(f"--reward {text}: unknown; choose from {names}, or give my_file.py:function")
    if equals:
        raise UserError(f"--reward {text}: {name} takes no argument")
    return REWARDS[name](files)


def users_function(file, function):
    """The user's own function(frames, prompts)."""
    name = f"{file}:{function}"
    if not Path(file).exists():
        raise UserError(f"--reward {name}: no file {file}")
    spec = importlib.util.spec_from_file_location("user_reward", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # the user's own code
        raise UserError(f"--reward {name}: {file} cannot be imported ({type(e).__name__}: {e})") from e
    if not callable(getattr(module, function, None)):
        raise UserError(f"--reward {name}: {file} has no function {function}(frames, prompts)")
    return getattr(module, function)


def of_clips(reward, clips, prompts):
    """Clips (b,3,f,h,w) in [0,1] -> (b,): one reward's value of the clip, or the mean of its frames' own."""
    b, f = clips.shape[0], clips.shape[2]
    n, pictures = b, clips
    if not getattr(reward, "clip", False):
        n, pictures = b * f, clips.transpose(1, 2).flatten(0, 1)  # (b f) 3 h w
        prompts = [p for p in prompts for _ in range(f)]
    out = reward(pictures, prompts)
    if not isinstance(out, Tensor) or out.shape != (n,):
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(f"the reward gave {found} for {n} pictures or clips: it must return a tensor ({n},)")
    if clips.requires_grad and not out.requires_grad:
        raise UserError("the reward has no gradient: compute it with torch functions, not under no_grad")
    return out.view(b, -1).mean(1)


def score(reward, videos, prompts):
    """Videos (b,3,f,h,w) in [-1,1] -> rewards (b,) in fp32: of the clip, or the mean of its frames' own."""
    with torch.autocast(videos.device.type, enabled=False):
        clips = videos.float().clamp(-1, 1) / 2 + 0.5
        return reward(clips, prompts) if isinstance(reward, Reward) else of_clips(reward, clips, prompts)


@torch.no_grad()
def statistics(reward, videos, prompts, device):
    """Videos (n,3,f,h,w) -> {"reward": mean, "reward_sd": deviation}, and the same of a sum's parts."""
    parts = {name: part for name, _, part in reward.parts} if len(reward.parts) > 1 else {}
    row = {}
    for name, part in ({"reward": reward} | parts).items():
        found = torch.cat([score(part, videos[i:i + 8].to(device), prompts[i:i + 8]).cpu()
                           for i in range(0, len(videos), 8)])
        row |= {name: found.mean().item(), f"{name}_sd": found.std(unbiased=False).item()}
    return row


if __name__ == "__main__":
    p = Parser(__doc__)
    p.add_argument("--train-tiny", action="store_true", required=True, help="train the tiny world's scorer")
    p.add_argument("--out", default=str(SCORER_FILE), help="file to write")
    p.add_argument("--steps", type=COUNT, default=400, help="optimizer steps of 64 clips")
    args = p.parse_args()
    train_tiny(args.out, args.steps)
