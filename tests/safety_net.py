"""A safety net for a redesign: what five steps of every method give on its tiny bases.

    python tests/safety_net.py record          # every case below -> tests/safety_net.json
    python tests/safety_net.py check           # run them again: which come out otherwise?
    python tests/safety_net.py check t2v das   # only these; after record: the others stay

Kept are a run's log, the names and shapes in its checkpoint, and what the latents of sample.py's
first clip are like. A number may be off by 1e-5 of itself, or of a thousandth of the largest in its
series. Record and check on one kind of processor. When options change, edit CASES, keep the json.
Recorded anew when the tiny bases got other weights (assets/tiny.safetensors, the scorer). The code
before agreed with records of the code before the redesign; for that, cases with dropout in the
network run without it (WITHOUT_DROPOUT), since dropout is keyed by sample now.
"""
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MKL_CBWR="COMPATIBLE",
                   HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from models import Dropout  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402
from vae import AutoencoderKL, CogVideoXVAE  # noqa: E402

# what commands have in common; {out} is a case's own folder, where write_files() puts its data
WORDS = {
    "run": "--steps 5 --warmup 2 --batch 2 --log-every 5 --preview-every 0 --out {out}/run",
    "fresh": "{run} --no-cache-latents",  # to encode thousands of clips first takes minutes
    "data": "{run} --data {out}/clips.csv --cache-latents",
    "two": "--batch 1 --accum 2",
    "fast": "--eval-n 1 --sweep 0 --sample-steps 4",
    "few": "--prompts {out}/prompts.txt --eval-prompts {out}/others.txt --samples 2 --drop-pairs 0",
    "pairs": "--pairs {out}/run/train --eval-pairs {out}/run/held-out",
    "ask": "sample.py --out {out}/clip --sample-steps 3 --prompt 'a red circle moving left'",
    "say": "{ask} --ckpt {out}/run",
    "judge": "sample.py --out {out}/clip --sample-steps 3 --judge 1 --ckpt {out}/run"}
CASES = {
    "t2v": ["t2v.py --base tiny {fresh} --eval-n 1", "{say}"],
    "t2v-lora": ["t2v.py --base tiny {fresh} --rank 8 {two} --grad-ckpt --eval-n 1", "{say}"],
    "t2v-scratch": ["t2v.py --base tiny {fresh} --scratch --eval-n 1", "{say}"],
    "t2v-text": ["t2v.py --base tiny {fresh} --train-text --rank 0 --drop-text 0.5 --eval-n 1",
                 "{say}"],
    "t2v-data": ["t2v.py --base tiny {data} --image-share 0.5 --offset-noise 0.1 --eval-n 1",
                 "{say}"],
    "t2v-weak": ["t2v.py --base tiny-weak {fresh} {two} --zero-snr --eval-n 1", "{say}"],
    "t2v-higen": ["higen.py --base tiny-higen {fresh} --image-share 0.5 --eval-n 1", "{say}"],
    "t2v-vcomposer": ["vcomposer.py --base tiny-vcomposer {fresh} --eval-n 1",
                      "{say} --depth {out}/tracks-0"],
    "videolcm": ["videolcm.py --base tiny {run}", "{say}"],
    "videolcm-weak": ["videolcm.py --base tiny-weak {fresh} {two}", "{say}"],
    "videolcm-reward": ["videolcm.py --base tiny {fresh} --rank 16 --reward tiny:0.1", "{say}"],
    "videolcm-range": ["videolcm.py --base tiny {fresh} --cfg-range 1 2", "{say} --cfg 2"],
    "vader": ["vader.py --base tiny {run} --eval-n 1 --sweep 0", "{say}"],
    "vader-size": ["vader.py --base tiny {run} {fast} {two} --reward size --grad-ckpt", "{say}"],
    "vader-sum": [
        "vader.py --base tiny {run} {fast} --reward tiny:1,size:0.5 --backprop last-3", "{say}"],
    "vader-i2v": ["vader.py --base tiny-i2v {run} {fast} --continue 1", "{judge} --continue 1"],
    "vader-cog": ["vader.py --base tiny-cogvideox {run} {fast} --batch 1 --continue 1", "{judge}"],
    "instructvideo": ["instructvideo.py --base tiny {run} --eval-n 1 {two}", "{say}"],
    "instructvideo-size": ["instructvideo.py --base tiny {run} --data {out}/clips.csv --eval-n 1 "
                           "--reward size", "{say}"],
    "videodpo": [
        "videodpo.py --base tiny {run} {few} --lr 2e-5", "{say}",
        "videodpo.py --base tiny {run} {pairs} --rank 0 --lr 2e-6 {two} --out {out}/full",
        "{ask} --ckpt {out}/full",
        "videodpo.py --base tiny {run} {pairs} --reweight 1 --lr 2e-5 --out {out}/weighted",
        "{ask} --ckpt {out}/weighted"],
    "dreamvideo": [
        "dreamvideo.py --base tiny --stage token {fresh} --eval-prompts {out}/star.txt",
        "{say} --prompt 'a * growing'",
        "dreamvideo.py --base tiny --stage identity --learned {out}/run {run} "
        "--eval-prompts {out}/star.txt --out {out}/who",
        "dreamvideo.py --base tiny --stage motion {run} --eval-prompts {out}/images.txt "
        "--out {out}/how",
        "{ask} --ckpt {out}/who --ckpt {out}/how --prompt 'a * moving left' --subject-below 300 "
        "--appearance-image {out}/clip-0/0.png"],
    "dreamvideo-zigzag": ["dreamvideo.py --base tiny --stage motion --motion zigzagging {fresh} "
                          "--drop-image 0.5 --eval-prompts {out}/images.txt", "{say}"],
    "demo": ["demo.py --base tiny {fresh} --eval-n 1", "{say}"],
    "demo-weak": ["demo.py --base tiny-weak {fresh} --eval-n 1 {two}", "{say}"],
    "demo-published": ["demo.py --base tiny {fresh} --eval-n 1 --as-published", "{say}"],
    "demo-data": ["demo.py --base tiny-weak {data} --read-fps 8 --ema 0", "{say}"],
    "i2vgen": ["i2vgen.py --base tiny-i2v {fresh} --eval-n 1", "{judge}"],
    "i2vgen-data": ["i2vgen.py --base tiny-i2v {data} --rank 8 --image-share 0.5",
                    "{say} --image {out}/clip-0/0.png --continue 1"],
    "i2vgen-scratch": ["i2vgen.py --base tiny-i2v {fresh} --eval-n 1 --scratch", "{judge}"],
    "i2vgen-cog": ["i2vgen.py --base tiny-cogvideox {fresh} --eval-n 1", "{judge}"],
    "das": ["das.py --base tiny-cogvideox {fresh} --eval-n 1 --tracking-blocks 2",
            "{say} --image {out}/clip-0/0.png --tracks {out}/tracks-0"],
    "das-data": [
        "das.py --base tiny-cogvideox {data} --eval-n 1 --eval-data {out}/clips.csv {two}",
        "das.py --make-tracks {out}/clip-0/0.png --depth {out}/depth.npy --camera 'rot y 20' "
        "--frames 9 --height 32 --width 32 --out {out}/made",
        "{say} --image {out}/made/first.png --tracks {out}/made/tracks.mp4 --track-strength 0.8"]}

WITHOUT_DROPOUT = ("t2v-vcomposer", "i2vgen", "i2vgen-data", "i2vgen-scratch")


def write_files(out):
    """Clips as folders of pictures, with captions and tracking videos; depth; prompts."""
    y, x = np.mgrid[:32, :32]
    for k, i in np.ndindex(2, 9):
        square = (abs(x - 8 - 2 * i) < 4 + k) & (abs(y - 12 - 5 * k) < 4 + k)
        frame = np.where(square[..., None], (230, 40 + 190 * k, 40), 128)
        track = np.stack([8 * x - 16 * i * square, 8 * y, 128 + 60 * square], 2).clip(0, 255)
        for folder, picture in ((out / f"clip-{k}", frame), (out / f"tracks-{k}", track)):
            folder.mkdir(exist_ok=True)
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}.png")
    np.save(out / "depth.npy", (2 + y / 31).astype(np.float32))
    texts = {
        "clips.csv": "video,tracking,caption\nclip-0,tracks-0,a red square moving right\n"
                     "clip-1,tracks-1,a yellow square moving right on a gray background",
        "prompts.txt": "a blue triangle moving up\na blue triangle\na circle\na square growing",
        "others.txt": "a white circle growing\na red square shrinking",
        "star.txt": "a * growing", "images.txt": "clip-0/0.png|||a red square moving"}
    for name, text in texts.items():
        (out / name).write_text(text)


def run_case(name, out):
    """Run the commands of a case. -> {what: a series of numbers, or a text}"""
    found, caught, rounded = {}, [], lambda values: [float(f"{value:.7g}") for value in values]
    for autoencoder in (AutoencoderKL, CogVideoXVAE):
        def decode(self, latents, *args, own=autoencoder.decode, **options):
            caught.append(latents.detach().double())
            return own(self, latents, *args, **options)
        autoencoder.decode = decode
    if name in WITHOUT_DROPOUT:
        Dropout.forward = lambda self, x: x
    for command in CASES[name]:
        while "{" in command:
            command = command.format(out=out, **WORDS)
        file, *argv = shlex.split(command)
        caught.clear()
        importlib.import_module(file.removesuffix(".py").replace("/", ".")).main(argv)
        if file == "sample.py":
            z = caught[0][0].flatten()  # the first clip of the first batch
            some = z[torch.linspace(0, len(z) - 1, 8).long()]
            found[f"clip {len(found)}"] = rounded([z.mean(), z.std(), z.abs().mean(), *some])
    for log in sorted(out.rglob("log.jsonl")):
        rows, run = [json.loads(line) for line in log.read_text().splitlines()], log.parent.name
        found |= {f"{run} {k}": rounded(row[k] for row in rows) for k in rows[0] if k != "seconds"}
        with safe_open(log.parent / "ckpt.safetensors", "pt") as f:
            keys = [f"{key} {f.get_slice(key).get_shape()}" for key in sorted(f.keys())]
        digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
        found[f"{run} ckpt"] = f"{len(keys)} tensors, {keys[0]} to {keys[-1]}, sha256 {digest}"
    return found


def work(name):
    """-> (what run_case() found, or {"error": text}; CPU seconds). In a process of its own."""
    screen = io.StringIO()
    with tempfile.TemporaryDirectory() as out, redirect_stdout(screen), redirect_stderr(screen):
        try:
            write_files(Path(out))
            return run_case(name, Path(out)), time.process_time()
        except BaseException:  # SystemExit, too
            return {"error": screen.getvalue()[-1000:] + traceback.format_exc()}, 0.0


def compare(old, new):
    """-> the first difference, or ""; and the largest relative difference up to there."""
    largest = 0.0
    for what in new | old:
        a, b = old.get(what), new.get(what)
        off = 0.0 if a == b else float("inf")
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            x, y = np.array(a), np.array(b)
            off = (abs(x - y) / np.maximum(abs(x), max(1e-3 * abs(x).max(), 1e-9))).max()
        if not off <= 1e-5:  # NaN is not
            return f"DIFFERENT {what}: {a} was recorded, now {b}, off by {off:.0e}", off
        largest = max(largest, off)
    return "", largest


def main():
    mode, *names = sys.argv[1:] or [""]
    if mode not in ("record", "check") or not set(names) <= CASES.keys():
        sys.exit(f"{__doc__}\ncases: {' '.join(CASES)}")
    file, failed = Path(__file__).with_suffix(".json"), []
    known = json.loads(file.read_text()) if file.exists() else {}
    for name in names or CASES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            found, seconds = pool.submit(work, name).result()
        if mode == "record" and "error" not in found:
            known[name] = found
            rows = [f'"{k}": {json.dumps(known[k])}' for k in CASES if k in known]
            file.write_text("{\n" + ",\n".join(rows) + "\n}\n")
        wrong, largest = compare(known.get(name, {}), found)
        failed += [name] if wrong else []
        print(f"{name:20}{seconds:5.0f} s  {wrong or f'ok, within {largest:.0e}'}", flush=True)
    sys.exit(f"{len(failed)} failed: {' '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
