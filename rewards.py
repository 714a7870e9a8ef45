"""Rewards: differentiable scores of clips for their prompts; higher is better.

`--reward` takes a name from REWARDS or WITH_ARGUMENT (with an argument after "=" or a weight after
":"), a weighted sum of several, or a function of yours:

    --reward tiny    --reward remove-colour=red    --reward tiny,size:0.5    --reward my_file.py:fn

    def fn(frames, prompts):   # my_file.py: frames (n,3,h,w) in [0,1], n prompts -> rewards (n,)
        return frames[:, 2].mean((1, 2))

A clip's reward is the mean of its frames' rewards. A function that judges whole clips sets
`fn.clip = True` and gets clips (b,3,f,h,w) in [0,1] and b prompts. For grpo.py, which needs no
gradient, it may run any code and return plain numbers.

    python rewards.py --video out/sample --reward hps,aesthetic   # score clips that exist

If FOLDER/index.jsonl exists (sample.py writes it), `--video FOLDER` scores the clips it lists.

For the published rewards, training maximises minus VADER's loss; tables show the plain score.
Differences from the original code
 - Each image is scored against its own prompt (the original PickScore scores all against the first
   prompt of the batch). An image without detections leaves the others of its batch unaffected (the
   original forgets those before it).
 - The compression head fits its file (the published class does not load it).
 - fp32 throughout, no autocast; frozen towers; one square resize for every base; softmax instead of
   exp / sum exp.
 - action takes batches and any number of frames.
"""
from common import (  # first: for signals
    Parser, UserError, check_file, one_line, run_command, setup, steps_saved, warn)
import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import clip_normalize, clips_with_prompts, read_video
from text_encoders import CLIP_L14, CLIPConfig, OpenCLIP, clip_from_hf, tokenize
from tinyworld import BACKGROUNDS, COLOURS, tiny_raw_quality, tiny_scorer
from weights import fetch, load_strict, load_weights, local_file

# ---- what a reward is

def read_anything(prompts):
    """The check of a reward that can read any prompt, or reads none."""


@dataclass(frozen=True)
class Reward:
    """A reward: called with clips (b,3,f,h,w) in [0,1] and their prompts, it returns (b,).

    judge(pictures, prompts) -> (n,) is what training maximises. Its pictures are frames (n,3,h,w),
    and a clip gets the mean over its frames; with clip=True they are whole clips (n,3,f,h,w).
    plain: like judge, but the score that papers quote, for tables (None: judge itself).
    check(prompts): raises UserError for a prompt that the reward cannot read. name: what errors
    call it.
    """
    judge: Callable
    clip: bool = False
    plain: Callable | None = None
    check: Callable = read_anything
    name: str = "the reward"

    def __call__(self, clips, prompts):
        return self.of_clips(self.judge, clips, prompts)

    def score(self, clips, prompts):
        """Clips (b,3,f,h,w) in [0,1] -> the plain scores (b,)."""
        return self.of_clips(self.plain or self.judge, clips, prompts)

    def of_clips(self, judge, clips, prompts):
        b, f = clips.shape[0], clips.shape[2]
        n, pictures = b, clips
        if not self.clip:
            n, pictures = b * f, clips.transpose(1, 2).flatten(0, 1)  # (b f) 3 h w
            prompts = [prompt for prompt in prompts for _ in range(f)]
        out = judge(pictures, prompts)
        if not isinstance(out, Tensor) or out.shape != (n,) or not out.is_floating_point():
            kind = type(out).__name__
            if isinstance(out, Tensor):
                kind = f"a tensor of {str(out.dtype).removeprefix('torch.')}, {tuple(out.shape)},"
            raise UserError(f"{self.name} returned {kind} for {n} pictures or clips; it must "
                            f"return a tensor of floats of shape ({n},)")
        if clips.requires_grad and not out.requires_grad:
            raise UserError(f"{self.name} has no gradient; compute it with torch functions and "
                            "without no_grad")
        return out.view(b, -1).mean(1)


class WeightedSum:
    """A weighted sum of rewards, called like one of them. parts: [(name, weight, Reward)]."""

    def __init__(self, parts):
        self.parts = parts
        self.weights = [weight for _, weight, _ in parts]
        self.clip = any(part.clip for _, _, part in parts)  # does one of them judge whole clips?

    def __call__(self, clips, prompts):
        return sum(weight * part(clips, prompts) for _, weight, part in self.parts)

    def check(self, prompts):
        """Refuse prompts that a part cannot read, before any long work."""
        for _, _, part in self.parts:
            part.check(prompts)

    def each(self, videos, prompts):
        """score(), part by part and without their weights: (parts, b)."""
        return torch.stack([score(part, videos, prompts) for _, _, part in self.parts])

    def scores(self, clips, prompts):
        """-> {name: plain scores (b,)}, and for several parts "sum": what training maximises."""
        row = {name: part.score(clips, prompts) for name, _, part in self.parts}
        return row | ({"sum": self(clips, prompts)} if len(self.parts) > 1 else {})


# ---- hand-written rewards, for any base

def brightness(frames, prompts):
    """Mean pixel, 0 to 1. It ignores the prompt: an example of a reward that can be hacked."""
    return frames.mean((1, 2, 3))


def redness(frames, prompts):
    """Mean of red minus the mean of green and blue, -1 to 1."""
    return (frames[:, 0] - frames[:, 1:].mean(1)).mean((1, 2))


def size(frames, prompts):
    """How large the object is: share of pixels unlike the border's median colour, 0 to 1."""
    with torch.no_grad():  # the background is constant: changing it must not pay
        edges = [frames[:, :, 0], frames[:, :, -1], frames[:, :, :, 0], frames[:, :, :, -1]]
        border = torch.cat(edges, dim=2).median(2).values
    distance = (frames - border[:, :, None, None]).square().sum(1).add(1e-6).sqrt()
    return torch.sigmoid((distance - 0.25) / 0.08).mean((1, 2))


def remove_colour(name, files):
    """Minus the share of pixels that have a colour of the tiny world: 0 without it, -1 all over.

    A pixel counts 1 where it is that colour, 0 where it is another of the palette, and linearly in
    between. The gradient is as steep on the colour itself, and for all pixels it points to the
    same nearest neighbour.
    """
    if name not in COLOURS:
        raise UserError(f"--reward remove-colour={name}: choose a colour from {', '.join(COLOURS)}")
    others = [v for k, v in (COLOURS | BACKGROUNDS).items() if k != name]
    colour, others = torch.tensor(COLOURS[name]) / 255, torch.tensor(others) / 255
    far = (others - colour).square().sum(1).min()  # what `behind` is on the nearest other colour

    def judge(frames, prompts):
        pixels = frames.movedim(1, -1)[..., None, :]                         # n h w 1 3
        to_colour = (pixels - colour.to(frames)).square().sum(-1)            # n h w 1
        to_others = (pixels - others.to(frames)).square().sum(-1)            # n h w palette
        # -far on the colour; linear in the pixel, as a difference of squares
        behind = (to_colour - to_others).amax(-1)
        return -((far / 2 - behind) / (1.5 * far)).clamp(min=0).mean((1, 2))
    return Reward(judge)


def rough(x, scale):
    """Length of vectors x (..., d), smooth at 0: about |x| - scale where |x| is far above scale."""
    return (x.square().sum(-1) + scale ** 2).sqrt() - scale


def temporal(clips, prompts):
    """Does an object on a plain background stay itself? 1 if it does, down to 0; for any length.

    The mean over frames of exp(-|colour - first colour| / 0.05 - |shape - first shape| / 0.03).
    Each length is smooth at 0, so that the pixel grid costs little. It is VBench's subject
    consistency with hand-written features instead of DINO's. The shape is the mask's second and
    third moments along x and y, divided by its area so that size does not count. Position and
    motion do not count. Even so, an object that stands still scores highest, and training
    exploits that.
    """
    f, h, w = clips.shape[2:]
    with torch.no_grad():  # the background is constant
        edges = [clips[..., 0, :], clips[..., -1, :], clips[..., 0], clips[..., -1]]
        border = torch.cat([edge.flatten(2) for edge in edges], dim=2).median(2).values  # b 3
    distance = (clips - border[:, :, None, None, None]).square().sum(1).add(1e-6).sqrt()
    mask = F.softplus(distance - 0.05, beta=100)                             # b f h w
    inner = mask ** 4 + 1e-9  # hardly the pixels on the rim, which mix with the background
    colour = (clips * inner[:, None]).sum((3, 4)).transpose(1, 2)            # b f 3
    colour = colour / inner.sum((2, 3))[..., None]
    mask = mask / (mask.amax((2, 3), keepdim=True) + 1e-6)
    area, moments = mask.sum((2, 3)) + 1e-6, []
    for profile, n in ((mask.sum(2), w), (mask.sum(3), h)):                  # b f n
        place = torch.arange(n).to(mask)
        aside = place - ((profile * place).sum(2) / area)[..., None]
        moments += [(profile * aside ** k).sum(2) / area ** (1 + k / 2) for k in (2, 3)]
    shape = torch.stack(moments, dim=2)
    other_colour = rough(colour - colour[:, :1], 0.015) / 0.05
    other_shape = rough(shape - shape[:, :1], 0.01) / 0.03
    return (-other_colour - other_shape).exp().mean(1)


# ---- published rewards: VADER's loss functions (arXiv 2407.08737) around towers that are given

def published(judge, clip=False, check=read_anything):
    """judge(pictures, prompts) -> (loss, score), (n,) each -> the reward -loss.

    loss is what VADER minimises; score is the figure that papers quote.
    """
    def minus_loss(pictures, prompts):
        return -judge(pictures, prompts)[0]

    def plain(pictures, prompts):
        return judge(pictures, prompts)[1]
    return Reward(minus_loss, clip, plain, check)


def unit(features):
    """(n, d) -> unit length."""
    return features / features.norm(dim=-1, keepdim=True)


def imagenet(images):
    """(..., 3, h, w) in [0,1] -> ImageNet's mean and standard deviation."""
    mean, std = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return (images - mean) / std


def square(images, normalize=clip_normalize, size=224):
    """(n,3,h,w) in [0,1] -> (n,3,size,size): squeezed, as VADER does for all but PickScore."""
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return normalize(images)


def crop(images, size=224):
    """(n,3,h,w) in [0,1] -> (n,3,size,size): CLIP's own resize of the short side and centre crop.

    Bicubic, and not clamped.
    """
    h, w = images.shape[2:]
    large = (size, w * size // h) if h < w else (h * size // w, size)
    images = F.interpolate(images, large, mode="bicubic", antialias=True)
    top, left = large[0] // 2 - size // 2, large[1] // 2 - size // 2
    return clip_normalize(images[:, :, top:top + size, left:left + size])


def detector_input(images):
    """(n,3,h,w) in [0,1] -> (n,3,512,512 w/h), without antialiasing (as published)."""
    h, w = images.shape[2:]
    return imagenet(F.interpolate(images, (512, 512 * w // h), mode="bilinear"))


def head_reward(tower, head, target=None, scale=1.0):
    """A head on unit CLIP features: loss scale * |score - target|.

    Without a target the loss is scale * score: less is better.
    """
    def judge(frames, prompts):
        score = head(unit(tower(square(frames))))
        return scale * (score if target is None else (score - target).abs()), score
    return published(judge)


def text_reward(image_tower, text_tower, prepare=square, scale=1.0, best=1.0):
    """Score: cosine of each image and its own prompt, times scale. Loss: |1 - score / best|.

    HPS (arXiv 2306.09341) has no temperature, so scale 1; PickScore (2305.01569) has CLIP's, and
    100 counts as best.
    """
    def judge(frames, prompts):
        images, texts = unit(image_tower(prepare(frames))), unit(text_tower(prompts))
        score = scale * (images * texts).sum(1)
        return (1 - score / best).abs(), score
    return published(judge)


def mixed_reward(aesthetic, hps, loss_weights=(1.5, 1.0), score_weights=(1.0, 15.0)):
    """VADER's fixed mix of two: half the weighted sums of their losses and of their scores."""
    def judge(frames, prompts):
        two = aesthetic.judge(frames, prompts), hps.judge(frames, prompts)  # minus their losses
        return sum(weight * value for weight, value in zip(loss_weights, two)) / 2

    def plain(frames, prompts):
        two = aesthetic.plain(frames, prompts), hps.plain(frames, prompts)
        return sum(weight * value for weight, value in zip(score_weights, two)) / 2
    return Reward(judge, plain=plain)


def object_reward(detect, add=False):
    """detect(images) -> (confidence, found), (n, queries) each -> a reward for an object's absence.

    confidence that a query shows the object; found: does it count as detected?
    Removal (VADER's): the loss is the mean confidence of what is detected, 0 if nothing is.
    add=True (ours): the loss is 1 - the largest confidence, which has a gradient even before
    anything is detected.
    """
    def judge(frames, prompts):
        confidence, found = detect(detector_input(frames))
        if add:
            score = confidence.amax(1)
            return 1 - score, score
        loss = (confidence * found).sum(1) / found.sum(1).clamp(min=1)
        return loss, 1 - loss
    return published(judge)


def yolos_confidence(logits, target, threshold=0.2):
    """logits (n, queries, classes + 1), "no object" last -> object_reward's (confidence, found)."""
    p = logits.softmax(-1)[..., :-1]
    best, label = p.max(-1)
    return p[..., target], (label == target) & (best > threshold)


def action_reward(classify, class_of):
    """Does a clip show an action? Loss: cross entropy; score: the softmax probability.

    classify(clips (b,3,f,224,224)) -> logits (b, classes); class_of(prompt) -> number of its class.
    """
    def judge(clips, prompts):
        frames = square(clips.transpose(1, 2).flatten(0, 1), imagenet)  # (b f) 3 224 224
        logits = classify(frames.unflatten(0, (len(clips), -1)).transpose(1, 2))
        target = torch.tensor([class_of(prompt) for prompt in prompts], device=logits.device)
        loss = F.cross_entropy(logits, target, reduction="none")
        return loss, logits.softmax(1).gather(1, target[:, None])[:, 0]

    def check(prompts):
        for prompt in prompts:
            class_of(prompt)
    return published(judge, clip=True, check=check)


# ---- their towers and heads

class Head(nn.Module):
    """MLP on unit CLIP features (n,768) -> (n,). widths: {number of a layer in the file: width}."""

    def __init__(self, widths, relu=False, sigmoid=False):
        super().__init__()
        sizes = zip([768, *widths.values()], widths.values())
        self.layers = nn.ModuleDict({str(k): nn.Linear(*size) for k, size in zip(widths, sizes)})
        self.relu, self.sigmoid = relu, sigmoid

    def forward(self, x):
        for i, layer in enumerate(self.layers.values()):
            x = layer(F.relu(x) if self.relu and i else x)
        return torch.sigmoid(x[:, 0]) if self.sigmoid else x[:, 0]


# The first three have no nonlinearity between their layers, as published. The published class of
# the last does not fit its file, where the layer numbers imply three times linear, ReLU, dropout.
VADER = "gh:mihirp1998/VADER:assets"
AFFINE = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
HEADS = {
    "aesthetic": (f"{VADER}/sac+logos+ava1-l14-linearMSE.pth", dict(widths=AFFINE)),
    "rainy": (f"{VADER}/rainy_reward.pt", dict(widths=AFFINE, sigmoid=True)),
    "snowy": (f"{VADER}/snowy_reward.pt", dict(widths=AFFINE, sigmoid=True)),
    "compression": (f"{VADER}/compression_reward.pt",
                    dict(widths={0: 512, 3: 128, 6: 32, 9: 1}, relu=True)),
}
CLIPS = {
    "ViT-L-14": ("hf:openai/clip-vit-large-patch14:model.safetensors", CLIP_L14),
    "ViT-H-14": ("hf:laion/CLIP-ViT-H-14-laion2B-s32B-b79K:open_clip_pytorch_model.bin",
                 CLIPConfig()),
    "HPS v2.0": ("hf:xswu/HPSv2:HPS_v2_compressed.pt", CLIPConfig()),
    "HPS v2.1": ("hf:xswu/HPSv2:HPS_v2.1_compressed.pt", CLIPConfig()),
    "PickScore": ("hf:yuvalkirstain/PickScore_v1:model.safetensors", CLIPConfig()),
}
DETECTORS = {
    "yolos-base": "hustvl/yolos-base",
    "yolos-tiny": "hustvl/yolos-tiny",
    "grounding-dino-base": "IDEA-Research/grounding-dino-base",
    "grounding-dino-tiny": "IDEA-Research/grounding-dino-tiny",
}


class Files:
    """Finds the public files of rewards and loads frozen fp32 networks from them.

    weights: the folder that holds the files (None: fetch them from their hub). The rewards of one
    sum share their towers.
    """

    def __init__(self, device, weights=None):
        self.device, self.root = torch.device(device), weights and Path(weights)
        self.loaded = {}
        if weights and not self.root.is_dir():
            raise UserError(f"--reward-weights {weights}: no such folder")

    def frozen(self, network):
        return network.requires_grad_(False).eval().to(self.device)

    def find(self, name, url):
        """Path of the file at url, "hub:repo:file", for the reward `name`."""
        if not self.root:
            return fetch(url, name, "--reward", "--reward-weights")
        file, repo = Path(url.split(":")[2]), url.split(":")[1]
        plain = self.root / file.name
        path = local_file(self.root, url) or (plain if plain.is_file() else None)
        if not path:
            raise UserError(f"--reward-weights {self.root}: {file.name} of {repo} is missing for "
                            f"--reward {name}")
        return path

    def head(self, name):
        url, options = HEADS[name]
        path = self.find(name, url)
        head = Head(**options)
        load_strict(head, load_weights(path), path)
        return self.frozen(head)

    def clip(self, name, which):
        """Both towers of CLIPS[which], and text(prompts) -> (n, d), for the reward `name`."""
        if which not in self.loaded:
            url, cfg = CLIPS[which]
            path = self.find(name, url)
            state = load_weights(path)
            if any(k.startswith("vision_model.") for k in state):
                state = clip_from_hf(state)
            with torch.device("meta"):
                net = OpenCLIP(cfg)
            load_strict(net, {k: v.float() for k, v in state.items()}, path)
            self.loaded[which] = self.frozen(net)
        net = self.loaded[which]

        @torch.no_grad()
        def text(prompts):
            distinct = list(dict.fromkeys(prompts))  # the frames of a clip share theirs
            features = net.pooled(tokenize(distinct).to(self.device))
            return features[[distinct.index(prompt) for prompt in prompts]]
        return net, text

    def folder(self, name, repo):
        """Local folder of a repository in transformers' layout, or its name on the hub."""
        if not self.root:
            return repo
        short = repo.split("/")[-1]
        for folder in (self.root / short, self.root):
            if (folder / "config.json").is_file():
                return str(folder)
        raise UserError(f"--reward-weights {self.root}: {short}/config.json of {repo} is missing "
                        f"for --reward {name}")

    def pretrained(self, name, kind, repo, **options):
        """from_pretrained() of transformers' class `kind`, for the reward `name`."""
        try:
            import transformers  # slow to import: only where such a reward is used
            build = getattr(transformers, kind)
        except (ImportError, AttributeError):
            raise UserError(f"--reward {name} needs {kind} of the package transformers: "
                            "pip install -U transformers") from None
        folder = self.folder(name, repo)
        try:
            return build.from_pretrained(folder, **options)
        except Exception as e:  # offline, truncated, another network's: all the same to the user
            raise UserError(
                f"--reward {name}: cannot get huggingface.co repository {repo} from {folder} "
                f"({type(e).__name__}); download it elsewhere and give the folder that holds "
                f"{repo.split('/')[-1]}/ with --reward-weights") from None

    def transformer(self, name, kind, repo):
        """transformers' network of class `kind` with the repository's weights."""
        network, report = self.pretrained(name, kind, repo, output_loading_info=True)
        if report["missing_keys"]:  # transformers would leave them random
            raise UserError(
                f"--reward {name}: {self.folder(name, repo)} is incomplete, or it is not {repo}: "
                f"{min(report['missing_keys'])} is missing")
        return self.frozen(network.float())


def published_head(name, target, scale=1.0):
    """-> build(files) for a reward of HEADS."""
    def build(files):
        tower = files.clip(name, "ViT-L-14")[0].visual
        return head_reward(tower, files.head(name), target, scale)
    return build


aesthetic = published_head("aesthetic", 10.0, 0.1)


def hps(version, files):
    """Human preference score, by default v2.1."""
    if version not in ("", "v2.0", "v2.1"):
        raise UserError(f"--reward hps={version}: choose v2.0 or v2.1")
    net, text = files.clip("hps", f"HPS {version or 'v2.1'}")
    return text_reward(net.visual, text)


def pickscore(files):
    net, text = files.clip("pickscore", "PickScore")
    return text_reward(net.visual, text, crop, net.logit_scale.exp().item(), 100.0)


def clip_score(which, files):
    """CLIP score: cosine of each frame and the prompt, with CLIP's own preprocessing."""
    which = which or "ViT-L-14"
    if which not in ("ViT-L-14", "ViT-H-14"):
        raise UserError(f"--reward clip={which}: choose ViT-L-14 (OpenAI) or ViT-H-14 (laion)")
    net, text = files.clip("clip", which)
    return text_reward(net.visual, text, crop)


def detected(word, add=False):
    """-> build(argument, files) for remove-object and add-object; argument: OBJECT[@DETECTOR]."""
    def build(argument, files):
        target, _, which = argument.partition("@")
        which, name = which or "yolos-base", f"{word}={argument}"
        if not target or which not in DETECTORS:
            raise UserError(f"--reward {name}: write {word}=OBJECT or {word}=OBJECT@DETECTOR, with "
                            f"a detector from {', '.join(DETECTORS)}")
        find = dino if which.startswith("grounding") else yolos
        return object_reward(find(name, target, DETECTORS[which], files), add)
    return build


def yolos(name, target, repo, files):
    """-> detect(images) for one of COCO's classes (YOLOS, arXiv 2106.00666)."""
    net = files.transformer(name, "YolosForObjectDetection", repo)
    classes = net.config.label2id
    if target not in classes:
        raise UserError(f"--reward {name}: YOLOS knows no {target!r}; choose from "
                        f"{', '.join(classes)}, or write {target}@grounding-dino-base")

    def detect(images):
        return yolos_confidence(net(pixel_values=images).logits, classes[target])
    return detect


def dino(name, target, repo, files, threshold=0.4):
    """-> detect(images) for what a text names (Grounding DINO, arXiv 2303.05499).

    Every detection above the threshold counts.
    """
    net = files.transformer(name, "GroundingDinoForObjectDetection", repo)
    tokenizer = files.pretrained(name, "AutoTokenizer", repo)
    words = tokenizer(target.rstrip(".") + ".", return_tensors="pt")

    def detect(images):
        text = {k: v.expand(len(images), -1).to(images.device) for k, v in words.items()}
        confidence = net(pixel_values=images, **text).logits.sigmoid().amax(-1)
        return confidence, confidence > threshold
    return detect


ACTIONS = {  # word of a prompt -> Kinetics-400 class; the first one that occurs decides
    "piano": "playing piano", "guitar": "playing guitar", "doughnuts": "eating doughnuts",
    "beer": "drinking beer", "badminton": "playing badminton", "cello": "playing cello",
    "scooter": "riding scooter", "ballet": "dancing ballet", "pancake": "flipping pancake",
    "violin": "playing violin", "wood": "chopping wood", "watermelon": "eating watermelon",
    "jogging": "jogging"}


def action_class(classes, text):
    """Number of the class that a text names, or that one of its words in ACTIONS stands for.

    classes: {class name: number}.
    """
    if text in classes:
        return classes[text]
    for word, action in ACTIONS.items():
        if word in text:
            return classes[action]
    raise UserError(f"--reward action: no class for {text!r}; give a class of Kinetics-400 as "
                    f"action=CLASS, or prompts with one of {', '.join(ACTIONS)}")


def action(argument, files):
    """VideoMAE (arXiv 2203.12602) for any number of frames.

    argument: the class to show; if empty, each prompt names its own.
    """
    net = files.transformer("action", "VideoMAEForVideoClassification",
                            "MCG-NJU/videomae-base-finetuned-kinetics")
    from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table
    classes, cfg, embed = net.config.label2id, net.config, net.videomae.embeddings
    if argument:
        action_class(classes, argument)  # an unknown class is refused here, not at the first clip

    def class_of(prompt):
        return action_class(classes, argument or prompt)

    def classify(clips):
        clips = whole_tubes(clips, cfg.tubelet_size)
        tubes = clips.shape[2] // cfg.tubelet_size
        places = tubes * (cfg.image_size // cfg.patch_size) ** 2
        if embed.position_embeddings.shape[1] != places:  # computed, not learned
            embed.position_embeddings = get_sinusoid_encoding_table(places, cfg.hidden_size)
        return net(pixel_values=clips.transpose(1, 2)).logits
    return action_reward(classify, class_of)


def whole_tubes(clips, tube, least=1):
    """Clips (b,3,f,h,w), their last frame repeated until f is a multiple of `tube`.

    The result has at least `least` tubes.
    """
    f = clips.shape[2]
    missing = max(least, -(-f // tube)) * tube - f
    return torch.cat([clips, clips[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


def vjepa(files):
    """Temporal consistency by V-JEPA 2 (arXiv 2506.09985): any clip length, no prompts.

    Minus the mean L1 distance between the features of the clip's second half and the predictor's
    guess from the first half alone. The VADER paper names such a reward but published no code, so
    this form is ours and there is no published number to compare with. A frozen clip is easy to
    predict: combine it with a reward that asks for what the prompt says.
    """
    net = files.transformer("vjepa", "VJEPA2Model", "facebook/vjepa2-vitl-fpc64-256")
    cfg = net.config

    def encode(clips):
        return net.encoder(pixel_values_videos=clips.transpose(1, 2)).last_hidden_state

    def judge(clips, prompts):
        b = len(clips)
        frames = square(clips.transpose(1, 2).flatten(0, 1), imagenet, cfg.crop_size)
        clips = whole_tubes(frames.unflatten(0, (b, -1)).transpose(1, 2), cfg.tubelet_size, least=2)
        tubes = clips.shape[2] // cfg.tubelet_size
        first, each = tubes // 2, (cfg.crop_size // cfg.patch_size) ** 2
        places = torch.arange(tubes * each, device=clips.device).expand(b, -1)
        past, future = places.tensor_split([first * each], dim=1)
        past_features = encode(clips[:, :, :first * cfg.tubelet_size])
        guess = net.predictor(encoder_hidden_states=past_features, context_mask=[past],
                              target_mask=[future]).last_hidden_state
        features = encode(clips)[:, first * each:]
        features = F.layer_norm(features, features.shape[-1:])  # as in V-JEPA's own loss
        loss = (guess - features).abs().mean((1, 2))
        return loss, -loss
    return published(judge, clip=True)


# ---- the table

def tiny(files):
    """The tiny world's preference model, -1 to 1: does a clip of 8 frames of 32x32 show its
    caption, without flaws?"""
    judge, check = tiny_scorer(files)
    return Reward(judge, clip=True, check=check)


def tiny_raw(files):
    """Only how clean a tiny clip is, without a bound and blind to the prompt: a reward to be
    hacked."""
    return Reward(tiny_raw_quality(files), clip=True)


# name -> build(files)
REWARDS = {
    "tiny": tiny,
    "tiny-raw": tiny_raw,
    "brightness": lambda files: Reward(brightness),
    "redness": lambda files: Reward(redness),
    "size": lambda files: Reward(size),
    "temporal": lambda files: Reward(temporal, clip=True),
    "aesthetic": aesthetic,
    "aesthetic-hps": lambda files: mixed_reward(aesthetic(files), hps("", files)),
    "pickscore": pickscore,
    "rainy": published_head("rainy", 1.0),
    "snowy": published_head("snowy", 1.0),
    "compression": published_head("compression", None),
    "vjepa": vjepa,
}
# name -> build(argument, files), for those that take an argument after "="
WITH_ARGUMENT = {
    "remove-colour": remove_colour,
    "hps": hps,
    "clip": clip_score,
    "remove-object": detected("remove-object"),
    "add-object": detected("add-object", add=True),
    "action": action,
}


def get_reward(spec, device, weights=None, out=None, gradient=True) -> WeightedSum:
    """`name[=argument][:weight]` or `file.py:function[:weight]`, joined by commas -> their sum.

    weights: folder with the rewards' public files (None: fetch them from their hub). out: folder
    of the run, whose last checkpoint is named if a function of the user's fails. gradient False:
    functions of the user's are forgiving(). Raises UserError.
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
            raise UserError(f"--reward {text}: weight {weight!r} is no number; write name:weight "
                            "or name=argument:weight")
        part = users_reward(file + ".py", name, out) if dot_py else named_reward(name, files)
        part = part if gradient or not dot_py else forgiving(part)
        parts.append((text.removesuffix(f":{weight}") if colon else text, number, part))
    return WeightedSum(parts)


def named_reward(text, files) -> Reward:
    """`name[=argument]` -> the reward with that name."""
    name, equals, argument = text.partition("=")
    if name in WITH_ARGUMENT:
        return WITH_ARGUMENT[name](argument, files)
    if name not in REWARDS:
        names = ", ".join([*REWARDS, *WITH_ARGUMENT])
        raise UserError(f"--reward {text}: unknown; choose from {names}, or give "
                        "my_file.py:function")
    if equals:
        raise UserError(f"--reward {text}: {name} takes no argument")
    return REWARDS[name](files)


def users_reward(file, function, out=None) -> Reward:
    """The user's own function(frames, prompts), or with `clip = True` function(clips, prompts)."""
    name = f"--reward {file}:{function}"
    spec = importlib.util.spec_from_file_location("user_reward", check_file(file, "reward file"))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as e:  # the user's own code may raise anything
        raise UserError(f"{name}: {file} cannot be imported ({type(e).__name__}: {e})") from e
    judge = getattr(module, function, None)
    if not callable(judge):
        raise UserError(f"{name}: {file} has no function {function}(frames, prompts)")
    calls = itertools.count(1)

    def called(pictures, prompts):
        call = next(calls)
        try:
            return judge(pictures, prompts)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as e:
            saved = steps_saved(out)[:1] if out else []
            last = f"; the last checkpoint is {out}/ckpt-{saved[0]}.safetensors" if saved else ""
            raise UserError(f"{name}: call {call} ended with {type(e).__name__}: {str(e)[:200]}"
                            f"{last or '; no checkpoint was saved yet'}") from e
    return Reward(called, clip=bool(getattr(judge, "clip", False)), name=name)


FAILURES = 8  # of a user's function in a row, after which a run ends


def forgiving(reward) -> Reward:
    """A user's reward that needs no gradient: it may return plain numbers, and may fail on a clip.

    Such a clip scores nothing, NaN, and a warning says why; FAILURES in a row raise UserError.
    """
    failed = itertools.count(1)

    def numbers(pictures, prompts):
        out = reward.judge(pictures, prompts)
        try:
            return torch.as_tensor(out).to(pictures).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            return out  # of_clips() says what it is
    plain = replace(reward, judge=numbers)

    def judge(clips, prompts):
        nonlocal failed
        scores = []
        for clip, prompt in zip(clips, prompts):
            try:
                scores.append(plain(clip[None], [prompt])[0])
                if not scores[-1].isfinite():
                    raise UserError(f"{reward.name} returned {scores.pop().item()}")
                failed = itertools.count(1)
            except UserError as e:
                cause = e.__cause__
                why = f"{reward.name}: {type(cause).__name__}: {cause}" if cause else str(e)
                if next(failed) == FAILURES:
                    raise UserError(f"{why}; {FAILURES} clips in a row failed") from e
                print(f"warning: {one_line(why)}; a clip is left out", file=sys.stderr, flush=True)
                scores.append(clips.new_tensor(math.nan))
        return torch.stack(scores)
    return replace(reward, judge=judge, clip=True)


# ---- scoring clips

def score(reward, videos, prompts):
    """Videos (b,3,f,h,w) in [-1,1] -> what training maximises (b,), in fp32."""
    with torch.autocast(videos.device.type, enabled=False):
        return reward(videos.float().clamp(-1, 1) / 2 + 0.5, prompts)


@torch.no_grad()
def statistics(reward, videos, prompts, device):
    """Videos (n,3,f,h,w) in [-1,1] -> {"reward": mean, "reward_sd": standard deviation}.

    They describe what training maximises. The parts of a sum, and a plain score that differs from
    what is maximised, follow under their names. Clips that scored nothing, see forgiving(), are
    counted ("unscored") and left out.
    """
    rows = []
    for i in range(0, len(videos), 8):
        clips = videos[i:i + 8].to(device).float().clamp(-1, 1) / 2 + 0.5
        row = {"reward": reward(clips, prompts[i:i + 8])}
        if len(reward.parts) > 1 or reward.parts[0][2].plain:
            row |= reward.scores(clips, prompts[i:i + 8])
            row.pop("sum", None)  # the reward itself
        rows.append(row)
    result = {}
    for name in rows[0]:
        values = torch.cat([row[name] for row in rows]).cpu()
        if values.isnan().any():
            result["unscored"] = values.isnan().float().mean().item()
            values = values[~values.isnan()]
        result[name] = values.mean().item()
        result[f"{name}_sd"] = values.std(unbiased=False).item() if len(values) else math.nan
    return result


@torch.no_grad()
def score_files(reward, device, files, prompts):
    """Clips in files, with a prompt each -> [{name: plain score}], a row per clip."""
    rows = []
    for file, prompt in zip(files, prompts):
        clip = read_video(file)[0][None].to(device) / 2 + 0.5
        scores = reward.scores(clip, [prompt])
        rows.append({name: value.item() for name, value in scores.items()})
    return rows


def print_scores(rows):
    """Print a table of score_files()'s rows: each reward's mean and standard deviation."""
    width = max(len(name) for name in ("reward", *rows[0]))
    print(f"{'reward':{width}}  {'mean':>9} {'sd':>9}   {len(rows)} clips")
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows])
        print(f"{name:{width}}  {values.mean():9.4f} {values.std(unbiased=False):9.4f}")


def get_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--video", required=True, help="clip, or folder of clips, to score")
    p.add_argument("--reward", required=True, help="reward or weighted sum, as described above")
    p.add_argument("--reward-weights",
                   help="folder with the rewards' public files (default: download them)")
    p.add_argument("--prompts", help="file with a prompt per clip, in order (default: the prompts "
                                     "in the folder's index.jsonl)")
    p.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: cuda if there is one)")
    return p.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    files, prompts = zip(*clips_with_prompts(args.video, args.prompts))
    without = [file.name for file, prompt in zip(files, prompts) if prompt is None]
    if without:
        warn(f"{len(without)} clips have no prompt ({without[0]} is the first): they are scored "
             "with an empty one; --prompts FILE gives them")
    prompts = [prompt or "" for prompt in prompts]
    env = setup(args.device, "fp32")
    reward = get_reward(args.reward, env.device, args.reward_weights)
    reward.check(prompts)
    rows = score_files(reward, env.device, files, prompts)
    for file, row in zip(files, rows):
        print(file.name, " ".join(f"{name} {value:.4f}" for name, value in row.items()))
    print_scores(rows)


if __name__ == "__main__":
    run_command(main)
