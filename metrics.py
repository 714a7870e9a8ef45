"""Metrics for real videos: cosines of encoder features (DreamVideo, arXiv 2312.04433).

    CLIP-T                  cosine(CLIP of the frames, CLIP of the prompt)
    CLIP-I                  cosine(CLIP of the frames, CLIP of the subject's pictures)
    DINO-I                  cosine(DINO of the frames, DINO of the subject's pictures)
    temporal consistency    cosine(CLIP of neighbouring frames)

    python metrics.py out/sample --references dog      # prompts of index.jsonl, or --prompts
    python metrics.py clips.txt                        # lines clip|||folder of references|||prompt
    python metrics.py out/sample --clip-weights ViT-B-32.pt --dino-weights dino_deitsmall16.pth

Every clip's scores and their means are printed and written to scores.json beside the clips.
"""
from common import Parser, UserError, run_command, write_atomic  # first: for signals
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import (
    clips_with_prompts, list_pictures, open_image, read_triples, read_video, to_uint8)
from text_encoders import DINO, dino_name, tokenize
from weights import hub_weights, load_strict, rename

# ---- features

def cosine(frames, targets):
    """Features (f, d) of a video's frames and (n, d) of texts or pictures -> mean cosine over all
    pairs.

    Need not be normalised. 0 without targets, as the published script reports it.
    """
    if not len(targets):
        return 0.0
    return float((F.normalize(frames, dim=-1) @ F.normalize(targets, dim=-1).T).mean())


def temporal_consistency(frames):
    """Features (f, d) of a video's frames, f > 1 -> mean cosine of neighbouring frames."""
    return float(F.cosine_similarity(frames[:-1], frames[1:], dim=-1).mean())


DINO_URL = ("https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/"
            "dino_deitsmall16_pretrain.pth")


def clip_towers(weights=None, device="cpu", name="ViT-B-32-quickgelu"):
    """OpenAI's CLIP, by open_clip -> images(list of Pillow), texts(list of str): features (n, d).

    weights: its file ViT-B-32.pt; None: open_clip's hub.
    """
    import open_clip  # slow to import
    try:
        net, _, prepare = open_clip.create_model_and_transforms(
            name, pretrained=weights or "openai")
    except Exception as e:  # offline, no such file, another network's
        raise UserError(f"--clip-weights {weights or ''}: cannot load CLIP {name} "
                        f"({type(e).__name__}); download ViT-B-32.pt elsewhere and give it "
                        "with --clip-weights") from None
    net.eval().requires_grad_(False).to(device)
    words = open_clip.get_tokenizer(name)

    def texts(prompts):
        tokenize(prompts)  # says what is cut
        return net.encode_text(words(prompts).to(device)).float().cpu()

    def images(pictures):
        parts = [torch.stack([prepare(p) for p in pictures[i:i + 32]])
                 for i in range(0, len(pictures), 32)]
        return torch.cat([net.encode_image(part.to(device)).float().cpu() for part in parts])
    return images, texts


def dino_tower(weights=None, device="cpu", net=None):
    """DINO ViT-S/16 -> images(list of Pillow): features (n, 384). weights: its file; None: its
    authors' site.
    """
    from torchvision import transforms  # slow to import
    state, net = hub_weights(DINO_URL, weights, "--dino-weights"), net or DINO()
    load_strict(net, rename(state, net, dino_name, weights or DINO_URL), weights or DINO_URL)
    net.eval().requires_grad_(False).to(device)
    prepare = transforms.Compose([
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def images(pictures):
        parts = [torch.stack([prepare(p) for p in pictures[i:i + 32]])
                 for i in range(0, len(pictures), 32)]
        return torch.cat([net(part.to(device)).cpu() for part in parts])
    return images


def score_clip(frames, prompt, references, clip, dino) -> dict:
    """Frames and reference pictures, lists of Pillow images, and the prompt -> the four scores.

    clip, dino: of clip_towers() and dino_tower(). A clip of one frame has no consistency over time.
    """
    images, texts = clip
    features = images(frames)
    scores = {"clip_t": cosine(features, texts([prompt])),
              "clip_i": cosine(features, images(references) if references else []),
              "dino_i": cosine(dino(frames), dino(references)) if references else 0.0}
    if len(frames) > 1:
        scores["temporal_consistency"] = temporal_consistency(features)
    return scores


def psnr(a, b):
    """Peak signal-to-noise ratio of two pictures or clips in [-1,1], in dB."""
    return float(10 * (4 / (a.float() - b.float()).square().mean().clamp(min=1e-10)).log10())


# ---- OmniScore (VideoDPO, arXiv 2412.14167): seven dimensions of VBench (2311.17982) in one number

# the seven dimensions, each a number near 0..1 for one clip. A clip is (3,f,h,w) in [-1,1];
# features (f,d).


# ---- the command

def read_rows(args):
    """-> [(clip, folder of references or None, prompt)], all checked."""
    source = Path(args.clips)
    if source.suffix.lower() == ".txt":
        rows = read_triples(source)
    else:
        folder = args.references and Path(args.references)
        rows = [(clip, folder, prompt) for clip, prompt in clips_with_prompts(source, args.prompts)]
    for clip, folder, prompt in rows:
        if prompt is None:
            raise UserError(f"{clip}: no prompt in index.jsonl beside it; give --prompts FILE, a "
                            "line a clip in the order of their names")
        if folder:
            list_pictures(folder)
    return rows


@torch.no_grad()
def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("clips",
                   help="folder of clips, or .txt of lines clip|||folder of references|||prompt")
    p.add_argument("--references", metavar="FOLDER",
                   help="pictures of the subject, for CLIP-I and DINO-I")
    p.add_argument("--prompts", help="file of prompts, one line per clip (default: index.jsonl of "
                                     "the folder)")
    p.add_argument("--clip-weights", metavar="FILE",
                   help="OpenAI's ViT-B-32.pt (default: open_clip's hub)")
    p.add_argument("--clip-model", default="ViT-B-32-quickgelu",
                   help="open_clip's name of the CLIP")
    p.add_argument("--dino-weights", metavar="FILE",
                   help="dino_deitsmall16_pretrain.pth (default: its authors' site)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cuda or cpu (default: cuda if there is one)")
    args = p.parse_args(argv)
    rows, scores = read_rows(args), []
    clip = clip_towers(args.clip_weights, args.device, args.clip_model)
    dino = None
    if any(folder for _, folder, _ in rows):
        dino = dino_tower(args.dino_weights, args.device)
    for path, folder, prompt in rows:
        frames = [Image.fromarray(frame) for frame in to_uint8(read_video(path)[0])]
        pictures = [open_image(file) for file in list_pictures(folder)] if folder else []
        scores.append(score_clip(frames, prompt, pictures, clip, dino))
        print(path.name, " ".join(f"{k} {v:.4f}" for k, v in scores[-1].items()), flush=True)
    names = dict.fromkeys(k for s in scores for k in s)
    mean = {k: float(np.mean([s[k] for s in scores if k in s])) for k in names}
    print(f"mean of {len(rows)} clips:", " ".join(f"{k} {v:.4f}" for k, v in mean.items()))
    clips = [dict(clip=str(path), prompt=prompt, **s) for (path, _, prompt), s in zip(rows, scores)]
    text = json.dumps(dict(mean=mean, clips=clips), indent=1)
    write_atomic(rows[0][0].parent / "scores.json", lambda p: p.write_text(text, "utf-8"))


if __name__ == "__main__":
    run_command(main)
