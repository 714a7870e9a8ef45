"""Rewards: reward(frames (n,3,h,w) in [0,1], list of n prompts) -> (n,), differentiable, higher is better.

A reward with `clip = True` judges whole clips instead: reward(clips (b,3,f,h,w) in [0,1], prompts) -> (b,).
`--reward` takes a name of REWARDS, with an argument or a weight, or a weighted sum of several, or your own:

    --reward tiny    --reward remove-colour=red    --reward tiny:1,size:0.5    --reward my_file.py:fn

    def fn(frames, prompts):            # my_file.py: frames (n,3,h,w) in [0,1]
        return frames[:, 2].mean((1, 2))

    python rewards.py --video out/sample --reward hps,aesthetic   # scores of clips that exist

Of the published rewards minus VADER's loss is maximised; tables show the plain score. Differences from the
original code
 - Each image is scored against its own prompt (PickScore's original: all against the first of the batch), and
   an image without detections leaves the others of its batch alone (the original forgets those before it).
 - The compression head fits its file (the published class does not load it).
 - fp32 throughout, no autocast; frozen towers; one square resize for every base; softmax, not exp / sum exp.
 - action takes batches and any number of frames.
"""
import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Parser, UserError, run_command, setup
from data import clip_normalize, list_videos, prompts_of, read_video
from text_encoders import CLIP_L14, CLIPConfig, OpenCLIP, clip_from_hf, tokenize
from tinyworld import BACKGROUNDS, COLOURS, tiny_scorer
from weights import fetch, load_strict, load_weights, local_file

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
    """Whether an object on a plain background stays itself, for clips of any length: 1 if it does, down to 0.

    The mean over frames of exp(-|colour - first colour| / 0.05 - |shape - first shape| / 0.03), each length
    smooth at 0 so that a pixel grid costs little: VBench's subject consistency, with hand-written features
    for DINO's. The shape is the mask's second and third moments along x and y, divided by its area so that
    size does not count. Where the object is and how it moves is left free: a reward of steadiness is highest
    for what stands still, and a network soon finds that out.
    """
    f, h, w = clips.shape[2:]
    with torch.no_grad():  # the background is taken as given
        edges = [clips[..., 0, :], clips[..., -1, :], clips[..., 0], clips[..., -1]]
        back = torch.cat([e.flatten(2) for e in edges], dim=2).median(2).values[:, :, None, None, None]
    distance = (clips - back).square().sum(1).add(1e-6).sqrt()
    mask = F.softplus(distance - 0.05, beta=100)                             # b f h w
    inner = mask ** 4 + 1e-9  # hardly the pixels on the rim, which mix with the background
    colour = (clips * inner[:, None]).sum((3, 4)).transpose(1, 2) / inner.sum((2, 3))[..., None]
    mask = mask / (mask.amax((2, 3), keepdim=True) + 1e-6)
    area, moments = mask.sum((2, 3)) + 1e-6, []
    for profile, n in ((mask.sum(2), w), (mask.sum(3), h)):                  # b f n
        place = torch.arange(n).to(mask)
        aside = place - ((profile * place).sum(2) / area)[..., None]
        moments += [(profile * aside ** k).sum(2) / area ** (1 + k / 2) for k in (2, 3)]
    shape = torch.stack(moments, dim=2)
    drift = rough(colour - colour[:, :1], 0.015) / 0.05 + rough(shape - shape[:, :1], 0.01) / 0.03
    return (-drift).exp().mean(1)


temporal.clip = True


# ---- published rewards: VADER's loss functions (arXiv 2407.08737) around towers that are given

class Published:
    """judge(pictures, prompts) -> (loss, score), (n,) each. Called: -loss, which is to be maximised.

    loss is what VADER minimises; .score(pictures, prompts) the plain figure that papers quote, for tables.
    check(prompts) refuses, before long work, what the reward cannot read.
    """

    def __init__(self, judge, clip=False, check=None):
        self.judge, self.clip = judge, clip
        self.check = check or (lambda prompts: None)

    def __call__(self, pictures, prompts):
        return -self.judge(pictures, prompts)[0]

    def score(self, pictures, prompts):
        return self.judge(pictures, prompts)[1]


def unit(features):
    """(n, d) -> unit length."""
    return features / features.norm(dim=-1, keepdim=True)


def imagenet(images):
    """(..., 3, h, w) in [0,1] -> ImageNet's mean and standard deviation."""
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / std


def square(images, normalize=clip_normalize, size=224):
    """(n,3,h,w) in [0,1] -> (n,3,size,size): squeezed, not cropped, as VADER does for all but PickScore."""
    images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return normalize(images)


def crop(images, size=224):
    """(n,3,h,w) in [0,1] -> (n,3,size,size) as CLIP's own: short side, bicubic, not clamped; centre crop."""
    h, w = images.shape[2:]
    large = (size, w * size // h) if h < w else (h * size // w, size)
    images = F.interpolate(images, large, mode="bicubic", antialias=True, align_corners=False)
    top, left = large[0] // 2 - size // 2, large[1] // 2 - size // 2
    return clip_normalize(images[:, :, top:top + size, left:left + size])


def detector_input(images):
    """(n,3,h,w) in [0,1] -> (n,3,512,512 w/h): aspect kept, no antialias (as published)."""
    h, w = images.shape[2:]
    images = F.interpolate(images, (512, 512 * w // h), mode="bilinear", antialias=False, align_corners=False)
    return imagenet(images)


def head_reward(tower, head, target=None, scale=1.0):
    """A head on unit CLIP features: loss scale * |score - target|; without a target less is better."""
    def judge(frames, prompts):
        s = head(unit(tower(square(frames))))
        return scale * (s if target is None else (s - target).abs()), s
    return Published(judge)


def text_reward(image_tower, text_tower, prepare=square, scale=1.0, best=1.0):
    """Cosine of each image and its own prompt, times scale: loss |1 - score / best|.

    HPS (arXiv 2306.09341) leaves CLIP's temperature out; PickScore (2305.01569) has it, and 100 for the best.
    """
    def judge(frames, prompts):
        s = scale * (unit(image_tower(prepare(frames))) * unit(text_tower(prompts))).sum(1)
        return (1 - s / best).abs(), s
    return Published(judge)


def mixed_reward(aesthetic, hps, loss_weights=(1.5, 1.0), score_weights=(1.0, 15.0)):
    """VADER's fixed mix of two: half the weighted sums of their losses and of their scores."""
    def judge(frames, prompts):
        two = [reward.judge(frames, prompts) for reward in (aesthetic, hps)]
        return tuple(sum(w * value for w, value in zip(weights, values)) / 2
                     for weights, values in zip((loss_weights, score_weights), zip(*two)))
    return Published(judge)


def object_reward(detect, add=False):
    """detect(images) -> (confidence, found), (n, queries) each: of the object, and where it is detected.

    To remove (VADER): the loss is the mean confidence of what is detected, 0 where nothing is. To add (ours):
    1 - the largest confidence, so that there is a gradient before anything is detected.
    """
    def judge(frames, prompts):
        confidence, found = detect(detector_input(frames))
        if add:
            s = confidence.amax(1)
            return 1 - s, s
        loss = (confidence * found).sum(1) / found.sum(1).clamp(min=1)
        return loss, 1 - loss
    return Published(judge)


def yolos_confidence(logits, target, threshold=0.2):
    """logits (n, queries, classes + 1, "no object" last) -> what object_reward's detect gives."""
    p = logits.softmax(-1)[..., :-1]
    best, label = p.max(-1)
    return p[..., target], (label == target) & (best > threshold)


def action_reward(classify, class_of):
    """classify(clips (b,3,f,224,224)) -> logits; class_of(prompt) -> class. Cross entropy; score: softmax."""
    def judge(clips, prompts):
        frames = square(clips.transpose(1, 2).flatten(0, 1), imagenet)  # (b f) 3 224 224
        logits = classify(frames.unflatten(0, (len(clips), -1)).transpose(1, 2))
        target = torch.tensor([class_of(p) for p in prompts], device=logits.device)
        loss = F.cross_entropy(logits, target, reduction="none")
        return loss, logits.softmax(1).gather(1, target[:, None])[:, 0]
    return Published(judge, clip=True, check=lambda prompts: [class_of(p) for p in prompts])


# ---- their towers and heads

class Head(nn.Module):
    """MLP on unit CLIP features (n, 768) -> (n,). widths: {number of the layer in the file: its width}."""

    def __init__(self, widths, relu=False, sigmoid=False):
        super().__init__()
        sizes = zip([768, *widths.values()], widths.values())
        self.layers = nn.ModuleDict({str(k): nn.Linear(*size) for k, size in zip(widths, sizes)})
        self.relu, self.sigmoid = relu, sigmoid

    def forward(self, x):
        for i, layer in enumerate(self.layers.values()):
            x = layer(F.relu(x) if self.relu and i else x)
        return torch.sigmoid(x[:, 0]) if self.sigmoid else x[:, 0]


# The published layers of the first three have no nonlinearity between them. The published class of the last
# does not fit its file: linear, ReLU, dropout, three times, is what the numbers of its layers tell.
AFFINE = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
HEADS = {
    "aesthetic": ("gh:mihirp1998/VADER:assets/sac+logos+ava1-l14-linearMSE.pth", dict(widths=AFFINE)),
    "rainy": ("gh:mihirp1998/VADER:assets/rainy_reward.pt", dict(widths=AFFINE, sigmoid=True)),
    "snowy": ("gh:mihirp1998/VADER:assets/snowy_reward.pt", dict(widths=AFFINE, sigmoid=True)),
    "compression": ("gh:mihirp1998/VADER:assets/compression_reward.pt",
                    dict(widths={0: 512, 3: 128, 6: 32, 9: 1}, relu=True)),
}
CLIPS = {
    "ViT-L-14": ("hf:openai/clip-vit-large-patch14:model.safetensors", CLIP_L14),
    "ViT-H-14": ("hf:laion/CLIP-ViT-H-14-laion2B-s32B-b79K:open_clip_pytorch_model.bin", CLIPConfig()),
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
    """Where a reward's public files are: `weights`, a folder (None: their hub). Loads frozen fp32 networks.

    Rewards of one sum share their towers.
    """

    def __init__(self, device, weights=None):
        self.device, self.root, self.loaded = torch.device(device), weights and Path(weights), {}
        if weights and not self.root.is_dir():
            raise UserError(f"--reward-weights {weights}: no such folder")

    def frozen(self, network):
        return network.requires_grad_(False).eval().to(self.device)

    def find(self, name, url):
        """Path of the file "hub:repo:file" for the reward of that name."""
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
        """Both towers of CLIPS[which], and text(prompts) -> (n, d), for the reward of that name."""
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
            each = list(dict.fromkeys(prompts))  # the frames of a clip share theirs
            features = net.pooled(tokenize(each).to(self.device))
            return features[[each.index(p) for p in prompts]]
        return net, text

    def folder(self, name, repo):
        """Local folder of a repository in transformers' layout, or its name on the hub."""
        if not self.root:
            return repo
        short = repo.split("/")[-1]
        for folder in (self.root / short, self.root):
            if (folder / "config.json").is_file():
                return str(folder)
        raise UserError(f"--reward-weights {self.root}: {short}/config.json of {repo} is missing for "
                        f"--reward {name}")

    def pretrained(self, name, kind, repo, **options):
        """from_pretrained() of that class of transformers, for the reward of that name."""
        try:
            import transformers  # slow to import: only where such a reward is used
            build = getattr(transformers, kind)
        except (ImportError, AttributeError):
            raise UserError(f"--reward {name}: needs transformers' {kind}: "
                            "pip install -U transformers") from None
        folder = self.folder(name, repo)
        try:
            return build.from_pretrained(folder, **options)
        except Exception as e:  # offline, cut off, another network's: all mean the same to the user
            raise UserError(f"--reward {name}: cannot get huggingface.co repository {repo} from {folder} "
                            f"({type(e).__name__}); download it elsewhere and give the folder that holds "
                            f"{repo.split('/')[-1]}/ with --reward-weights") from None

    def transformer(self, name, kind, repo):
        """transformers' network of that class with the repository's weights."""
        network, found = self.pretrained(name, kind, repo, output_loading_info=True)
        if found["missing_keys"]:  # transformers would leave them random
            first = min(found["missing_keys"])
            raise UserError(f"--reward {name}: {self.folder(name, repo)} is not whole, or not {repo}: "
                            f"it lacks {first}")
        return self.frozen(network.float())


def published_head(name, target, scale=1.0):
    """-> build(files) of a reward of HEADS."""
    def build(files):
        return head_reward(files.clip(name, "ViT-L-14")[0].visual, files.head(name), target, scale)
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
    """CLIP's text-video score: the cosine with its own preprocessing, its mean over the frames."""
    which = which or "ViT-L-14"
    if which not in ("ViT-L-14", "ViT-H-14"):
        raise UserError(f"--reward clip={which}: choose ViT-L-14 (OpenAI) or ViT-H-14 (laion)")
    net, text = files.clip("clip", which)
    return text_reward(net.visual, text, crop)


def detected(word, add=False):
    """-> build(argument, files) of remove-object and add-object; argument OBJECT or OBJECT@DETECTOR."""
    def build(argument, files):
        target, _, which = argument.partition("@")
        which, name = which or "yolos-base", f"{word}={argument}"
        if not target or which not in DETECTORS:
            raise UserError(f"--reward {name}: write {word}=OBJECT or {word}=OBJECT@DETECTOR, "
                            f"the detector one of {', '.join(DETECTORS)}")
        find = dino if which.startswith("grounding") else yolos
        return object_reward(find(name, target, DETECTORS[which], files), add)
    return build


def yolos(name, target, repo, files):
    """A detector of COCO's classes (arXiv 2106.00666)."""
    net = files.transformer(name, "YolosForObjectDetection", repo)
    classes = net.config.label2id
    if target not in classes:
        raise UserError(f"--reward {name}: YOLOS knows no {target!r}; choose from {', '.join(classes)}, or "
                        f"write {target}@grounding-dino-base")
    return lambda images: yolos_confidence(net(pixel_values=images).logits, classes[target])


def dino(name, target, repo, files, threshold=0.4):
    """A detector of what a text names (Grounding DINO, arXiv 2303.05499); every detection counts."""
    net = files.transformer(name, "GroundingDinoForObjectDetection", repo)
    words = files.pretrained(name, "AutoTokenizer", repo)(target.rstrip(".") + ".", return_tensors="pt")

    def detect(images):
        text = {k: v.expand(len(images), -1).to(images.device) for k, v in words.items()}
        confidence = net(pixel_values=images, **text).logits.sigmoid().amax(-1)
        return confidence, confidence > threshold
    return detect


ACTIONS = {  # word of a prompt -> Kinetics-400 class; the first that occurs decides
    "piano": "playing piano", "guitar": "playing guitar", "doughnuts": "eating doughnuts",
    "beer": "drinking beer", "badminton": "playing badminton", "cello": "playing cello",
    "scooter": "riding scooter", "ballet": "dancing ballet", "pancake": "flipping pancake",
    "violin": "playing violin", "wood": "chopping wood", "watermelon": "eating watermelon",
    "jogging": "jogging"}


def action_class(classes, text):
    """{class name: number}, a class or a prompt with a word of ACTIONS -> number."""
    if text in classes:
        return classes[text]
    for word, action in ACTIONS.items():
        if word in text:
            return classes[action]
    raise UserError(f"--reward action: no class for {text!r}; give one of Kinetics-400 as action=CLASS, or "
                    f"prompts with one of {', '.join(ACTIONS)}")


def action(argument, files):
    """VideoMAE (arXiv 2203.12602), for any number of frames; its class from the argument or each prompt."""
    net = files.transformer("action", "VideoMAEForVideoClassification",
                            "MCG-NJU/videomae-base-finetuned-kinetics")
    from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table
    classes, cfg, embed = net.config.label2id, net.config, net.videomae.embeddings
    if argument:
        action_class(classes, argument)  # refused now, not at the first clip

    def classify(clips):
        clips = whole_tubes(clips, cfg.tubelet_size)
        places = clips.shape[2] // cfg.tubelet_size * (cfg.image_size // cfg.patch_size) ** 2
        if embed.position_embeddings.shape[1] != places:  # computed, not learned
            embed.position_embeddings = get_sinusoid_encoding_table(places, cfg.hidden_size)
        return net(pixel_values=clips.transpose(1, 2)).logits
    return action_reward(classify, lambda prompt: action_class(classes, argument or prompt))


def whole_tubes(clips, tube, least=1):
    """(b,3,f,h,w) -> f a multiple of `tube`, at least `least` of them: the last frame is repeated."""
    f = clips.shape[2]
    more = max(least, -(-f // tube)) * tube - f
    return torch.cat([clips, clips[:, :, -1:].expand(-1, -1, more, -1, -1)], dim=2)


def vjepa(files):
    """Temporal consistency by V-JEPA 2 (arXiv 2506.09985), for clips of any length; prompts are not read.

    Minus the mean L1 distance between the features of the clip's later half and what the predictor expects
    there after the first half alone. The paper names such a reward but published no code: this form is ours,
    and no number of theirs stands beside it. A frozen clip is easy to predict: mix it with a reward that asks
    for what the prompt says.
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
        past, future = torch.arange(tubes * each, device=clips.device).expand(b, -1).tensor_split(
            [first * each], dim=1)
        expected = net.predictor(
            encoder_hidden_states=encode(clips[:, :, :first * cfg.tubelet_size]), context_mask=[past],
            target_mask=[future]).last_hidden_state
        seen = encode(clips)[:, first * each:]
        # V-JEPA's own loss: targets are normalised
        loss = (expected - F.layer_norm(seen, seen.shape[-1:])).abs().mean((1, 2))
        return loss, -loss
    return Published(judge, clip=True)


# ---- the table

# name -> build(files), or build(argument, files) for those that take one after "="
REWARDS = {
    "tiny": tiny_scorer,
    "brightness": lambda files: brightness,
    "redness": lambda files: redness,
    "size": lambda files: size,
    "temporal": lambda files: temporal,
    "aesthetic": aesthetic,
    "aesthetic-hps": lambda files: mixed_reward(aesthetic(files), hps("", files)),
    "pickscore": pickscore,
    "rainy": published_head("rainy", 1.0),
    "snowy": published_head("snowy", 1.0),
    "compression": published_head("compression", None),
    "vjepa": vjepa,
}
WITH_ARGUMENT = {
    "remove-colour": remove_colour,
    "hps": hps,
    "clip": clip_score,
    "remove-object": detected("remove-object"),
    "add-object": detected("add-object", add=True),
    "action": action,
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

    def check(self, prompts):
        """Refuse prompts that a part cannot read, before long work."""
        for _, _, part in self.parts:
            getattr(part, "check", lambda prompts: None)(prompts)

    def scores(self, clips, prompts):
        """-> {name: (b,)} of plain scores, and for several parts "sum": what is maximised."""
        found = {name: of_clips(part, clips, prompts, plain=True) for name, _, part in self.parts}
        return found | ({"sum": self(clips, prompts)} if len(self.parts) > 1 else {})


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
        names = ", ".join([*REWARDS, *WITH_ARGUMENT])
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
    except UserError:
        raise
    except Exception as e:  # the user's own code
        raise UserError(f"--reward {name}: {file} cannot be imported ({type(e).__name__}: {e})") from e
    if not callable(getattr(module, function, None)):
        raise UserError(f"--reward {name}: {file} has no function {function}(frames, prompts)")
    return getattr(module, function)


def of_clips(reward, clips, prompts, plain=False):
    """Clips (b,3,f,h,w) in [0,1] -> (b,): one reward's value of the clip, or the mean of its frames' own.

    plain: its score for tables, where it has one beside what is maximised.
    """
    b, f = clips.shape[0], clips.shape[2]
    n, pictures = b, clips
    if not getattr(reward, "clip", False):
        n, pictures = b * f, clips.transpose(1, 2).flatten(0, 1)  # (b f) 3 h w
        prompts = [p for p in prompts for _ in range(f)]
    out = (getattr(reward, "score", reward) if plain else reward)(pictures, prompts)
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
    """Videos (n,3,f,h,w) in [-1,1] -> {"reward": mean, "reward_sd": deviation} of what is maximised.

    The same of the parts of a sum, and of a plain score that is not what is maximised, under their names.
    """
    found = []
    for i in range(0, len(videos), 8):
        clips = videos[i:i + 8].to(device).float().clamp(-1, 1) / 2 + 0.5
        plain = reward.scores(clips, prompts[i:i + 8])
        if len(reward.parts) == 1 and not hasattr(reward.parts[0][2], "score"):
            plain = {}  # the reward itself
        plain.pop("sum", None)
        found.append({"reward": reward(clips, prompts[i:i + 8])} | plain)
    row = {}
    for name in found[0]:
        values = torch.cat([part[name] for part in found]).cpu()
        row |= {name: values.mean().item(), f"{name}_sd": values.std(unbiased=False).item()}
    return row


@torch.no_grad()
def score_files(reward, device, files, prompts):
    """Clips in files, a prompt each -> [{name: plain score}], the row of a table for each clip."""
    rows = []
    for file, prompt in zip(files, prompts):
        clip = read_video(file)[0][None].to(device) / 2 + 0.5
        rows.append({name: value.item() for name, value in reward.scores(clip, [prompt]).items()})
    return rows


def print_scores(rows):
    """The table of score_files(): mean and standard deviation of each reward over the clips."""
    width = max(len(name) for name in ("reward", *rows[0]))
    print(f"{'reward':{width}}  {'mean':>9} {'sd':>9}   {len(rows)} clips")
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows])
        print(f"{name:{width}}  {values.mean():9.4f} {values.std(unbiased=False):9.4f}")


def get_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--video", required=True, help="clip or folder of clips to score")
    p.add_argument("--reward", required=True, help="reward, or weighted sum: see above")
    p.add_argument("--reward-weights", help="folder with the rewards' public files (default: their hub)")
    p.add_argument("--prompts", help="their prompts, in order (default: the folder's index.jsonl)")
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.set_defaults(seed=0, dtype="fp32")
    return p.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    files = list_videos(args.video)
    prompts = prompts_of(files, args.prompts)
    env = setup(args)
    reward = get_reward(args.reward, env.device, args.reward_weights)
    reward.check(prompts)
    rows = score_files(reward, env.device, files, prompts)
    for file, row in zip(files, rows):
        print(file.name, " ".join(f"{name} {value:.4f}" for name, value in row.items()))
    print_scores(rows)


if __name__ == "__main__":
    run_command(main)
