"""Rewards: reward(frames (n,3,h,w) in [0,1], list of n prompts) -> (n,), differentiable, higher is better.

A reward with `clip = True` judges whole clips instead: reward(clips (b,3,f,h,w) in [0,1], prompts) -> (b,).
REWARDS maps a name to a function(device) that builds the reward; `--reward my_file.py:fn` brings your own:

    def fn(frames, prompts):            # my_file.py: frames (n,3,h,w) in [0,1]
        return frames[:, 2].mean((1, 2))

`python rewards.py --train-tiny` trains the tiny world's learned scorer (assets/tiny-scorer.safetensors).
"""
import importlib.util
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from common import COUNT, Parser, UserError, load_safetensors
from data import TINY_WORDS, tiny_batch

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


def tiny_scorer(device):
    if not SCORER_FILE.exists():
        raise UserError(f"{SCORER_FILE} is missing: check out the repository whole, "
                        "or run python rewards.py --train-tiny")
    scorer = TinyScorer()
    scorer.load_state_dict(load_safetensors(SCORER_FILE)[0])
    scorer.requires_grad_(False).eval().to(device)

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

REWARDS = {
    "tiny": tiny_scorer,
    "brightness": lambda device: brightness,
    "redness": lambda device: redness,
    "size": lambda device: size,
}


def get_reward(name, device):
    """A reward by its name in REWARDS, or "file.py:function": the user's own function(frames, prompts)."""
    if name in REWARDS:
        return REWARDS[name](device)
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise UserError(
            f"--reward {name}: unknown; choose from {', '.join(REWARDS)}, or give my_file.py:function")
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


def score(reward, videos, prompts):
    """Videos (b,3,f,h,w) in [-1,1] -> rewards (b,): of the clip, or the mean of its frames' own."""
    clips = videos.float().clamp(-1, 1) / 2 + 0.5
    b, f = clips.shape[0], clips.shape[2]
    n = b if getattr(reward, "clip", False) else b * f
    if n == b * f:
        clips = clips.transpose(1, 2).flatten(0, 1)  # (b f) 3 h w
        prompts = [p for p in prompts for _ in range(f)]
    out = reward(clips, prompts)
    if not isinstance(out, Tensor) or out.shape != (n,):
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(f"the reward gave {found} for {n} pictures or clips: it must return a tensor ({n},)")
    if videos.requires_grad and not out.requires_grad:
        raise UserError("the reward has no gradient: compute it with torch functions, not under no_grad")
    return out.view(b, -1).mean(1)


if __name__ == "__main__":
    p = Parser(__doc__)
    p.add_argument("--train-tiny", action="store_true", required=True, help="train the tiny world's scorer")
    p.add_argument("--out", default=str(SCORER_FILE), help="file to write")
    p.add_argument("--steps", type=COUNT, default=400, help="optimizer steps of 64 clips")
    args = p.parse_args()
    train_tiny(args.out, args.steps)
