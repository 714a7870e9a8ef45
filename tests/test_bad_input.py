"""Bad input, each tried: a one-line error that names the thing, exit code not 0, nothing written.

BAD is the table: file, command line (run in a folder that `place` fills), words of the message. Below it
hypothesis makes up command lines and files: whatever they hold, no traceback reaches the user.
"""
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import bases
import common
import das
import data
import demo
import dreamvideo
import i2vgen
import instructvideo
import rewards
import sample
import t2v
import tft2v
import vader
import videodpo
import videolcm
import weights
from data import VideoDataset, read_image_prompts, read_prompts, write_video

ROOT = Path(__file__).parent.parent
MAINS = {"sample": sample.main, "vader": vader.main, "t2v": t2v.main, "tft2v": tft2v.main, "i2vgen": i2vgen.main,
         "bases": bases.main, "data": data.main, "das": das.main, "instructvideo": instructvideo.main,
         "videodpo": videodpo.main, "dreamvideo": dreamvideo.main,
         "demo": demo.main, "videolcm": videolcm.main}
TINY = "--base tiny --prompt 'a red circle'"

BAD = [
    # numbers
    ("t2v", "--base tiny --steps 0", "--steps: '0' is not a whole number of 1 or more"),
    ("t2v", "--base tiny --steps -5", "--steps"),
    ("t2v", "--base tiny --steps 1.5", "--steps: '1.5'"),
    ("t2v", "--base tiny --steps many", "--steps: 'many'"),
    ("t2v", "--base tiny --batch 0", "--batch"),
    ("t2v", "--base tiny --accum 0", "--accum"),
    ("t2v", "--base tiny --lr -1", "--lr: '-1' is not a number above 0"),
    ("t2v", "--base tiny --lr nan", "--lr: 'nan'"),
    ("t2v", "--base tiny --lr inf", "--lr: 'inf'"),
    ("t2v", "--base tiny --lr 1e-4x", "--lr"),
    ("t2v", "--base tiny --wd -0.1", "--wd"),
    ("t2v", "--base tiny --betas 0.9", "--betas: expected 2 arguments"),
    ("t2v", "--base tiny --betas 0.9 1.0", "--betas: '1.0' is not a number from 0 to below 1"),
    ("t2v", "--base tiny --ema 1", "--ema"),
    ("t2v", "--base tiny --clip 0", "--clip"),
    ("t2v", "--base tiny --drop-text 1.5", "--drop-text: '1.5' is not a number from 0 to 1"),
    ("t2v", "--base tiny --image-share -0.1", "--image-share"),
    ("t2v", "--base tiny --offset-noise -1", "--offset-noise"),
    ("t2v", "--base tiny --save-every 0", "--save-every"),
    ("t2v", "--base tiny --log-every 0", "--log-every"),
    ("t2v", "--base tiny --keep 0", "--keep"),
    ("t2v", "--base tiny --preview-every -1", "--preview-every"),
    ("t2v", "--base tiny --workers -1", "--workers"),
    ("t2v", "--base tiny --seed -1", "--seed"),
    ("t2v", "--base tiny --rank -1", "--rank"),
    ("t2v", "--base tiny --alpha 0", "--alpha"),
    ("t2v", "--base tiny --read-fps 0", "--read-fps"),
    ("t2v", "--base tiny --warmup -2", "--warmup"),
    ("vader", "--base tiny --rank 0", "--rank 0: VADER trains LoRA"),
    ("vader", "--base tiny --eta 2", "--eta"),
    ("vader", "--base tiny --cfg much", "--cfg: 'much' is not a number"),
    ("vader", "--base tiny --sample-steps 0", "--sample-steps"),
    ("vader", "--base tiny --eval-n 0", "--eval-n"),
    ("i2vgen", "--base tiny-i2v --drop-image 2", "--drop-image"),
    ("sample", f"{TINY} --n 0", "--n: '0'"),
    ("sample", f"{TINY} --batch -1", "--batch"),
    ("sample", f"{TINY} --save-fps 0", "--save-fps"),
    ("sample", f"{TINY} --decode-chunk 0", "--decode-chunk"),
    ("sample", "--base tiny --judge 0", "--judge"),
    # words
    ("t2v", "--base tinny", "--base tinny: unknown; choose from tiny"),
    ("vader", "--base tinny --prompts good.txt", "--base tinny: unknown"),
    ("i2vgen", "--base tinny", "--base tinny: unknown"),
    ("sample", "--base tinny --prompt a", "--base tinny: unknown"),
    ("t2v", "--base das --data clips", "does not run on it; it runs on tiny"),
    ("vader", "--base higen --prompts good.txt", "does not run on it"),
    ("i2vgen", "--base tiny", "does not run on it"),
    ("t2v", "--base tiny --step 5", "unrecognized arguments: --step 5"),
    ("t2v", "--base tiny --steps", "--steps: expected one argument"),
    ("t2v", "--base tiny extra", "unrecognized arguments: extra"),
    ("t2v", "--base tiny --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("t2v", "--base tiny --parallel zero", "--parallel: invalid choice"),
    ("t2v", "--base tiny --lr-schedule linear", "--lr-schedule: invalid choice"),
    ("t2v", "--base tiny --scratch --rank 4", "--scratch: LoRA on random weights"),
    ("t2v", "--base tiny --rank 4 --lora-targets to_x", "--lora-targets to_x: no layer"),
    ("t2v", "--base modelscope", "--data: give a folder"),
    ("t2v", "--base tiny --mixture", "--mixture: reads real clips"),
    ("tft2v", "--base tiny --image-share 0", "--image-share 0: no caption would be left"),
    ("t2v", "--base tiny --images good.txt --image-share 0.5", "--images: goes with --data"),
    ("t2v", "--base modelscope --data clips --images none.csv", "none.csv: no such folder or list"),
    ("sample", f"{TINY} --follow clips", "--follow: this base has no such condition"),
    ("sample", "--base vcomposer --prompt a --take depth", "--follow VIDEO and --take belong together"),
    ("sample", "--base vcomposer --prompt a --follow clips --take depth", "give the network that sees it"),
    ("sample", "--base tiny-vcomposer --prompt a --follow clips --take style", "--take style: this base has"),
    ("sample", "--base vcomposer --prompt a --follow clips --take colours", "--take: invalid choice"),
    ("sample", f"{TINY} --then tiny", "--then tiny: for a base that enlarges"),
    ("sample", f"{TINY} --then sr600 --then-weights nowhere", "nowhere: no such folder"),
    ("t2v", "--base tiny --device tpu", "--device tpu"),
    ("t2v", "--base tiny --device xla", "--device xla"),
    ("t2v", "--base tiny --device cuda:99", "--device cuda:99"),
    ("vader", "--base i2vgen-xl", "--prompts: give a file of image|||caption lines"),
    ("vader", "--base tiny --continue 1", "--continue: only a base that makes video from a first frame"),
    ("vader", "--base tiny --activities good.txt", "--activities: goes with a file of nouns"),
    ("vader", "--base tiny --patience 2", "--patience: counts evaluations; give --preview-every"),
    ("vader", "--base tiny --sampler rflow", "--sampler rflow: this base is sampled by ddim"),
    ("vader", "--base tiny --sampler lcm", "--sampler lcm: VADER backpropagates through"),
    ("vader", "--base tiny --lora none.pt --out lora", "none.pt"),
    ("vader", "--base tiny --reward size,nice", "--reward nice: unknown"),
    ("vader", "--base tiny --reward size:much", "weight 'much' is no number"),
    ("vader", "--base tiny --reward size --watch nice", "--reward nice: unknown"),
    ("bases", "--export peft run folder", "--export peft: no such format; choose from diffusers, comfyui"),
    ("bases", "--export diffusers run folder", "--export diffusers: it has no network like that of tiny"),
    ("vader", "--base tiny-clean --init run", "--init run/ckpt.safetensors: a run on base tiny, not tiny-clean"),
    ("vader", "--base tiny --init none", "--init none: no such file"),
    ("vader", "--base tiny --init run:7", "--init run:7: no such step there; kept are 2"),
    ("vader", "--base tiny --init words.txt", "--init words.txt: "),
    ("t2v", "--base tiny --scratch --init run --out other", "--init: --scratch starts from random weights"),
    ("vader", "--base tiny --reward nice", "--reward nice: unknown; choose from"),
    ("vader", "--base tiny --reward none.py:fn", "none.py: no such reward file"),
    ("vader", "--base tiny --reward mine.py:fn", "mine.py has no function fn"),
    ("vader", "--base tiny --reward broken.py:fn", "broken.py cannot be imported (SyntaxError"),
    ("vader", "--base tiny --reward wrong.py:fn --steps 1 --batch 1 --sample-steps 1 --eval-n 1 --out wrong",
     "returned"),
    ("vader", "--base tiny --backprop first", "--backprop: 'first' is not last, last-K"),
    ("vader", "--base tiny --backprop last-99", "1..5"),
    ("vader", "--base tiny --reward size --decode 8", "0..7"),
    ("vader", "--base tiny --reward size --decode odd", "--decode odd"),
    ("sample", f"{TINY} --reward nice", "--reward nice: unknown; choose from"),
    ("sample", f"{TINY} --reward size:x", "--reward size:x: weight 'x' is no number"),
    ("sample", f"{TINY} --reward hps --reward-weights nowhere", "--reward-weights nowhere: no such folder"),
    ("sample", f"{TINY} --reward rainy --reward-weights .", "is missing for --reward rainy"),
    ("sample", f"{TINY} --reward-weights .", "--reward-weights: of which reward?"),
    ("vader", "--base tiny --decode 0", "judges whole clips; add --decode all"),
    ("vader", "--base tiny --fps 8", "takes no frame rate"),
    ("i2vgen", "--base i2vgen-xl", "--data: give a folder"),
    ("i2vgen", "--base tiny-i2v --motion flying", "--motion: invalid choice"),
    ("i2vgen", "--base i2vgen-xl --data clips --motion circling", "only the tiny world's"),
    ("sample", "--prompt a", "give --base NAME or --ckpt FOLDER"),
    ("sample", "--base tiny", "give one of --prompt TEXT"),
    ("sample", "--base tiny --prompt a --judge 3", "give only one of"),
    ("sample", "--base tiny --prompt 'a red dragon'", "does not know 'dragon'"),
    ("sample", f"{TINY} --motion growing", "give --judge"),
    ("sample", "--base tiny --judge 2 --motion circling", "no such motion"),
    ("sample", f"{TINY} --sampler euler", "--sampler: invalid choice"),
    ("sample", f"{TINY} --image picture.png", "--image: this base has no such condition"),
    ("sample", "--base tiny-i2v --prompt 'a red circle'", "give --image FILE"),
    ("sample", f"{TINY} --continue 2", "--continue"),
    ("sample", f"{TINY} --size 2s", "--size: only Open-Sora"),
    ("sample", "--base opensora --prompt a --size 3s", "clip size 3s: unknown"),
    ("bases", "--download tinny", "--base tinny: unknown"),
    ("bases", "--pack tiny", "--pack: expected 2 arguments"),
    ("bases", "--pack modelscope run", "only the tiny bases"),
    ("data", "", "required: --check"),
    # sizes
    ("sample", f"{TINY} --height 30", "nearest: 24 or 32"),
    ("sample", f"{TINY} --width 64", "at most 32"),
    ("sample", f"{TINY} --frames 9", "1 to 8 frames"),
    ("t2v", "--base modelscope --data clips --height 100", "nearest: 64 or 128"),
    ("i2vgen", "--base tiny-cogvideox --frames 8", "nearest"),
    # prompt files
    ("vader", "--base tiny --prompts none.txt", "none.txt: no such file"),
    ("vader", "--base tiny --prompts empty.txt", "empty.txt: the file is empty"),
    ("vader", "--base tiny --prompts notes.txt", "only comments"),
    ("vader", "--base tiny --prompts latin.txt", "latin.txt: not UTF-8"),
    ("vader", "--base tiny --prompts bars.txt", "bars.txt row 1: image|||caption"),
    ("vader", "--base tiny --prompts surplus.csv", "surplus.csv row 2: 2 fields"),
    ("vader", "--base tiny --prompts nocolumn.csv", "no `prompt`"),
    ("vader", "--base tiny --prompts bad.json", "bad.json: not valid JSON"),
    ("vader", "--base tiny --prompts bad.jsonl", "bad.jsonl row 2: not valid JSON"),
    ("vader", "--base tiny --prompts clips", "prompt files are"),
    ("vader", "--base tiny --prompts words.txt", "is no caption of the tiny world ('dragon')"),
    ("sample", "--base tiny --prompts none.csv", "none.csv: no such file"),
    ("sample", "--base tiny-i2v --prompts bars.txt", "bars.txt row 1: none.png"),
    ("sample", "--base tiny-i2v --prompt a --image broken.png", "broken.png: not a readable picture"),
    ("i2vgen", "--base tiny-i2v --eval-prompts good.txt", "wanted image|||caption"),
    # clips
    ("t2v", "--base tiny --data none", "none: no such folder"),
    ("t2v", "--base tiny --data empty", "empty: no clips"),
    ("t2v", "--base tiny --data nocaption", "a.mp4: no caption beside it"),
    ("t2v", "--base tiny --data wrongpath.csv", "wrongpath.csv row 3: none.mp4: no such clip"),
    ("t2v", "--base tiny --data nocolumn.csv", "no `video`"),
    ("t2v", "--base tiny --data emptycaption.csv", "row 2: `caption` is empty"),
    ("t2v", "--base tiny --data good.txt", "wanted video|||caption"),
    ("t2v", "--base tiny --optim adamw8bit --parallel fsdp", "--optim adamw8bit: its moments cannot be saved in shards"),
    ("t2v", "--base tiny --data picture.png", "wanted a folder, .csv"),
    ("t2v", "--base tiny --data pictures", "--frames 1"),
    ("t2v", "--base tiny --data broken --steps 1 --out broken-run", "2 of 2 clips are bad"),
    ("t2v", "--base tiny --data broken --steps 1 --workers 1 --out broken-run", "2 of 2 clips are bad"),
    ("t2v", "--base tiny --data short --steps 1 --out short-run", "1 of 1 clips are bad"),
    ("data", "--check none", "none: no such folder"),
    # weights, checkpoints, folders
    ("sample", f"{TINY} --ckpt none", "--ckpt none: no ckpt.safetensors"),
    ("sample", f"{TINY} --ckpt foreign", "not a nanovideo checkpoint (it looks like a diffusers UNet)"),
    ("sample", f"{TINY} --ckpt cut", "not a whole safetensors file"),
    ("sample", "--base tiny-i2v --prompt a --ckpt run", "was trained on base tiny, not tiny-i2v"),
    ("sample", "--base modelscope --prompt a --weights none", "--weights none: no such folder"),
    ("sample", "--base modelscope --prompt a --weights empty", "open_clip_pytorch_model.bin are missing"),
    ("sample", "--base modelscope --prompt a", "give its folder with --weights"),
    ("sample", f"{TINY} --weights empty", "has its weights in assets/"),
    ("sample", f"{TINY} --lora none.pt", "none.pt: no such file"),
    ("sample", f"{TINY} --out picture.png", "picture.png is a file"),
    ("t2v", "--base tiny --out picture.png/run", "picture.png is a file"),
    ("t2v", "--base tiny --rank 2 --out run", "already holds a run: --resume continues it"),
    ("t2v", "--base tiny --rank 4 --out run --resume", "has rank 2, not 4"),
    ("t2v", "--base tiny --rank 2 --seed 1 --out run --resume", "has seed 0, not 1"),
    ("vader", "--base tiny --rank 2 --out run --resume", "has method t2v, not vader"),
    ("t2v", "--base tiny --rank 2 --steps 1 --out run --resume", "is at step 2: give a larger --steps"),
    ("t2v", "--base tiny --rank 2 --lora-targets to_q --out run --resume", "has lora_targets"),
    # InstructVideo
    ("instructvideo", "--weights empty", "--data: give a folder"),
    ("instructvideo", "--base higen --data clips", "does not run on it; it runs on tiny"),
    ("instructvideo", "--base tiny --rank 0", "--rank 0: InstructVideo trains LoRA"),
    ("instructvideo", "--base tiny --partial 1.5", "--partial: '1.5' is not a number from 0 to 1"),
    ("instructvideo", "--base tiny --partial 0.1", "--partial 0.1 of 5 steps is 0: --backprop last-1 needs"),
    ("instructvideo", "--base tiny --backprop last-4", "is 3: --backprop last-4 needs as many"),
    ("instructvideo", "--base tiny --backprop rand", "--backprop rand: InstructVideo takes last or last-K"),
    ("instructvideo", "--base tiny --segments 9", "--segments 9: a clip has 8 frames"),
    ("instructvideo", "--base tiny --segments 0", "--segments: '0'"),
    ("instructvideo", "--base tiny --attenuation -1", "--attenuation: '-1' is not a number of 0 or more"),
    ("instructvideo", "--base tiny --history 0", "--history"),
    ("instructvideo", "--base tiny --reward nice", "--reward nice: unknown; choose from"),
    ("instructvideo", "--base tiny --lora none.pth", "none.pth: no such file"),
    ("instructvideo", "--base tiny --lora picture.png", "picture.png"),
    ("instructvideo", "--base tiny --lora foreign/ckpt.safetensors", "no LoRA of InstructVideo to start"),
    ("instructvideo", "--base tiny --eval-prompts none.txt", "none.txt: no such file"),
    ("instructvideo", "--base tiny --eval-prompts words.txt", "is no caption of the tiny world ('dragon')"),
    ("instructvideo", "--base tiny --data nocaption", "a.mp4: no caption beside it"),
    ("instructvideo", "--base tiny --rank 2 --out run --resume", "has method t2v, not instructvideo"),
    # tracks (more in test_tracks.py)
    ("das", "--base tiny", "does not run on it"),
    ("das", "--base das", "--data: give a folder"),
    ("das", "--base das --data clips", "prompt.txt: no such file"),
    ("das", "--base das --data good.txt", "wanted a folder with prompt.txt"),
    ("das", "--base das --data wrongpath.csv", "no `tracking`"),
    ("das", "--base tiny-cogvideox --tracking-blocks 0", "--tracking-blocks: '0'"),
    ("das", "--base tiny-cogvideox --tracking-blocks 9", "6 blocks to copy"),
    ("das", "--base tiny-cogvideox --buckets 9", "--buckets: '9' is not FRAMES"),
    ("das", "--base tiny-cogvideox --frames 8", "nearest"),
    ("das", "--base tiny-cogvideox --out run --resume", "has method t2v, not das"),
    ("das", "--make-tracks none.mp4", "none.mp4: no such file"),
    ("das", "--make-tracks picture.png", "say what moves"),
    ("das", "--make-tracks picture.png --camera 'zoom 3'", "'zoom 3': unknown"),
    ("das", "--make-tracks picture.png --camera 'rot y 9'", "needs depth"),
    ("das", "--make-tracks picture.png --camera 'rot y 9' --depth none.npy", "none.npy: no such file"),
    ("das", "--make-tracks clips/a.mp4 --flow-weights none.pth", "none.pth: no such file"),
    ("das", "--make-tracks", "--make-tracks: expected one argument"),
    ("sample", f"{TINY} --track-strength 1", "--track-strength: this base has no such condition"),
    # VideoDPO
    ("videodpo", "--base tiny --frames 4", "its OmniScore judges clips of 8 frames of 32x32, not 4"),
    ("videodpo", "--base tiny --samples 0", "--samples: '0'"),
    ("videodpo", "--base tiny --beta-dpo 0", "--beta-dpo"),
    ("videodpo", "--base tiny --drop-pairs 2", "--drop-pairs"),
    ("videodpo", "--base tiny --reweight -1", "--reweight"),
    ("videodpo", "--base tiny --reduce column", "unrecognized arguments: --reduce column"),
    ("videodpo", "--base tiny --stage all", "--stage: invalid choice"),
    ("videodpo", "--base tiny-i2v", "does not run on it; it runs on tiny"),
    ("videodpo", "--base videocrafter2", "--prompts: give a file of prompts"),
    ("videodpo", "--base videocrafter2 --prompts good.txt", "--score-weights: OmniScore needs a folder with"),
    ("videodpo", "--base videocrafter2 --prompts good.txt --score-weights empty",
     "--score-weights empty: dino_vitbase16_pretrain.pth is missing"),
    ("videodpo", "--base tiny --stage score", "metadata.json; run the stage before it first"),
    ("videodpo", "--base tiny --stage train", "pair.json; run the stage before it first"),
    ("videodpo", "--base tiny --stage score --pairs clips", "leave one of the two"),
    ("videodpo", "--base tiny --eval-pairs clips", "--eval-pairs: goes with --pairs"),
    ("videodpo", "--base tiny --pairs none", "none: no such folder of pairs"),
    ("videodpo", "--base tiny --pairs clips", "clips/metadata.json: no such file"),
    ("videodpo", "--base tiny --out run", "already holds a run"),
    ("sample", "--base tiny --prompt a/b --vbench", "--vbench: 'a/b' cannot be a file name"),
    # DreamVideo
    ("dreamvideo", "", "--data: give a folder or list of pictures"),
    ("dreamvideo", "--stage style", "--stage: invalid choice"),
    ("dreamvideo", "--base modelscope --data pictures", "dreamvideo.py does not run on it"),
    ("dreamvideo", "--base opensora --data pictures", "t2v.py --rank 16 learns a subject (--data PICTURES --frames 1)"),
    ("demo", "--base wan2.1-t2v-1.3b --data clips", "t2v.py --rank 16 --data CLIPS learns a motion"),
    ("das", "--base wan2.1-i2v-14b-480p", "made of CogVideoX's blocks"),
    ("t2v", "--base wan2.2-t2v-a14b --data clips", "sample.py alone plays its two experts"),
    ("videolcm", "--base wan2.1-t2v-1.3b --data clips --cfg-range 1 3", "--cfg-range: only UNets"),
    ("dreamvideo", "--base tiny --motion circling", "--motion circling: --base tiny --stage motion has"),
    ("dreamvideo", "--base tiny --stage motion --motion growing", "zigzagging, circling"),
    ("dreamvideo", "--base tiny --learned run", "only --stage identity goes on from a word"),
    ("dreamvideo", "--base tiny --stage identity --learned none", "--learned none: no such file"),
    ("dreamvideo", "--base tiny --stage identity --learned run", "a run without a word"),
    ("dreamvideo", "--base tiny --stage identity", "the captions hold *"),
    ("dreamvideo", "--base tiny --word-init 'a red circle'", "one word, or one for each of the 2 vectors"),
    ("dreamvideo", "--base tiny --word-init 'a dragon'", "does not know 'dragon'"),
    ("dreamvideo", "--base tiny --data none", "none: no such folder or list of pictures"),
    ("dreamvideo", "--base tiny --data empty", "no pictures in this folder"),
    ("dreamvideo", "--base tiny --data pictures --masked-loss", "no mask for a.png; --no-masked-loss"),
    ("dreamvideo", "--base tiny --stage motion --data nocaption", "no caption beside it"),
    ("dreamvideo", "--base tiny --eval-prompts none.txt", "none.txt: no such file"),
    ("dreamvideo", "--base tiny --eval-prompts words.txt", "does not know 'dragon'"),
    ("dreamvideo", "--base tiny --stage motion --eval-prompts bars.txt", "bars.txt row 1: none.png"),
    ("bases", "--export dreamvideo run out", "a run of t2v; only dreamvideo.py's"),
    ("bases", "--export dreamvideo out", "--export: expected 3 arguments"),
    ("sample", "--ckpt run:7 --prompt a", "no such step there; kept are 2"),
    ("sample", "--ckpt run --ckpt run --prompt a", "only DreamVideo's can be joined"),
    ("sample", f"{TINY} --subject-below 300", "--subject-below: this base has no adapters of a subject"),
    ("sample", f"{TINY} --inverse-noise 0.5", "--inverse-noise and --video belong together"),
    ("sample", f"{TINY} --learned none.pth", "--learned none.pth: no such file"),
    # DEMO
    ("demo", "--base tiny --text-motion -1", "--text-motion: '-1' is not a number of 0 or more"),
    ("demo", "--base tiny --drop-motion 2", "--drop-motion"),
    ("demo", "--base tiny --zero 1", "--zero: invalid choice"),
    ("demo", "--base tinny", "--base tinny: unknown"),
    ("demo", "--base videocrafter2 --data clips", "does not run on it; it runs on tiny"),
    ("demo", "--base modelscope", "--data: give a folder"),
    ("demo", "--base tiny-weak --data none", "none: no such folder"),
    ("demo", "--base tiny --eval-prompts words.txt", "does not know 'dragon'"),
    ("demo", "--base tiny --encoder-from 3", "the motion encoder has the blocks 0..0"),
    ("demo", "--base modelscope --data clips --weights empty --text-motion 0", "are missing for modelscope"),
    ("demo", "--base modelscope --data clips --flow-weights none.pth", "none.pth: no such file"),
    ("demo", "--base tiny --out run --resume", "has method t2v, not demo"),
    ("t2v", "--base tiny --train-text --rank 2", "--train-text: only the tiny"),
    # VideoLCM
    ("videolcm", "", "--data: give a folder"),
    ("videolcm", "--base videolcm --data clips", "does not run on it; it runs on tiny"),
    ("videolcm", "--base tinny", "--base tinny: unknown"),
    ("videolcm", "--base tiny --origin 30", "--origin 30: must divide 1000"),
    ("videolcm", "--base tiny --origin 0", "--origin: '0' is not a whole number of 1 or more"),
    ("videolcm", "--base tiny --sample-steps 21", "--sample-steps 21: this consistency model takes 1 to 20"),
    ("videolcm", "--base tiny --cfg-range 3 1", "--cfg-range: the first is the lower one"),
    ("videolcm", "--base tiny --cfg-range 3", "--cfg-range: expected 2 arguments"),
    ("videolcm", "--base tiny --cfg-range 2 3", "--cfg 1.5: outside of --cfg-range 2 3"),
    ("videolcm", "--base tiny --reward nice", "--reward nice: unknown; choose from"),
    ("videolcm", "--base tiny --reward tiny --eval-prompts words.txt", "is no caption of the tiny world"),
    ("videolcm", "--base tiny --reward-frames 0", "--reward-frames"),
    ("videolcm", "--base tiny --rank 4 --lora-targets to_x", "--lora-targets to_x: no layer"),
    ("videolcm", "--base tiny --eval-prompts words.txt", "does not know 'dragon'"),
    ("videolcm", "--base tiny --data nocaption", "a.mp4: no caption beside it"),
    ("videolcm", "--base tiny --out run --resume", "has method t2v, not videolcm"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the table's commands name."""
    p = tmp_path_factory.mktemp("place")
    texts = {
        "good.txt": "a red circle\n", "empty.txt": "", "notes.txt": "# later\n",
        "words.txt": "a red dragon\n",
        "bars.txt": "none.png|||a red circle\n", "surplus.csv": "prompt\na red circle, moving left\n",
        "nocolumn.csv": "id,words\n1,a red circle\n", "bad.json": "{", "bad.jsonl": '{"prompt": "a"}\n{\n',
        "wrongpath.csv": "video,caption\nclips/a.mp4,x\nnone.mp4,x\n", "mine.py": "x = 1\n",
        "emptycaption.csv": "video,caption\nclips/a.mp4, \n", "broken.py": "def fn(:\n",
        "wrong.py": "def fn(frames, prompts):\n    return frames.mean()\n",
        "broken.png": "no picture", "broken/a.mp4": "no video", "broken/a.txt": "a red circle",
        "broken/b.mp4": "", "broken/b.txt": "a red circle", "clips/a.txt": "a red circle",
        "short/a.txt": "a red circle", "pictures/a.txt": "a red circle"}
    for name, text in texts.items():
        (p / name).parent.mkdir(exist_ok=True)
        (p / name).write_text(text)
    (p / "latin.txt").write_bytes("a café".encode("latin-1"))
    for folder, frames in (("clips", 8), ("short", 3), ("nocaption", 8)):
        write_video(p / folder / "a.mp4", torch.zeros(3, frames, 32, 32))
    for picture in ("picture.png", "pictures/a.png"):
        Image.new("RGB", (8, 8)).save(p / picture)
    (p / "empty").mkdir()
    for folder in ("foreign", "cut"):
        (p / folder).mkdir()
        save_file({"down_blocks.0.weight": torch.zeros(1)}, p / folder / "ckpt.safetensors")
    (p / "cut" / "ckpt.safetensors").write_bytes((p / "foreign" / "ckpt.safetensors").read_bytes()[:-2])
    t2v.main(["--base", "tiny", "--rank", "2", "--batch", "1", "--steps", "2", "--eval-n", "1", "--sample-steps", "1",
              "--no-cache-latents", "--out", str(p / "run")])
    return p


def tree(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_there_are_a_hundred():
    assert len(BAD) == len(set(BAD)) >= 100


@pytest.mark.parametrize("script, line, words", BAD, ids=[f"{s} {a}"[:70] for s, a, _ in BAD])
def test_bad_input(script, line, words, place, monkeypatch, message, tmp_path, capfd):
    monkeypatch.chdir(place)
    before, args = tree(place), shlex.split(line)
    trained = "-run" in line or "--out wrong" in line  # found while training: those runs began
    if script not in ("bases", "data") and "--out" not in args:
        args += ["--out", str(tmp_path / "new")]
    assert words in message(MAINS[script], args)
    assert "Traceback" not in capfd.readouterr().err
    if not trained:
        assert tree(place) == before and not (tmp_path / "new").exists()
    assert not [p for p in place.rglob("*") if ".tmp" in p.name or p.suffix == ".pt" and "run/" not in str(p)]


@pytest.mark.parametrize("line", ["t2v.py --base tiny --steps 0", "bases.py --download nope",
                                  "tinyworld.py --train autoencoder --base huge", "rewards.py", "data.py --check none"])
def test_as_the_shell_sees_it(line):
    done = subprocess.run([sys.executable, *shlex.split(line)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


# ---- made up by hypothesis

class Reached(Exception):
    """All checks before the long work have passed."""


FLAGS = {"t2v": t2v, "vader": vader, "i2vgen": i2vgen, "sample": sample, "instructvideo": instructvideo,
         "das": das, "videodpo": videodpo, "demo": demo, "videolcm": videolcm}
VALUES = st.one_of(
    st.sampled_from([
        "tiny", "tiny-i2v", "tiny-cogvideox", "modelscope", "good.txt", "clips", "run", "none", "", "all",
        "last-2", "cpu", "bf16", "fsdp", "surplus.csv", "picture.png", "1e400", "nan", "--", "a red circle",
        "broken.png", "foreign", "circling", "2s,144p,1:1", str(10 ** 20)]),
    st.integers(-3, 70).map(str), st.floats().map(str),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=8))


def known_flags(module):
    lines = [line for line in Path(module.__file__).read_text().splitlines() if "add_argument(" in line]
    return [line.split('"')[1] for line in lines if '"--' in line]


@pytest.mark.parametrize("script", FLAGS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(draws=st.data())
def test_any_command_line(script, draws, place):
    module = FLAGS[script]
    flags = st.sampled_from(known_flags(module))
    args = []
    for flag in draws.draw(st.lists(flags, max_size=6)):
        args += [flag, *draws.draw(st.lists(VALUES, max_size=2))]
    if draws.draw(st.booleans()):
        args = ["--base", draws.draw(st.sampled_from(list(bases.BASES))), *args]

    def reached(*args, **kw):
        raise Reached
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(common, "setup", reached)
        if hasattr(module, "setup"):
            patch.setattr(module, "setup", reached)
        before = tree(place)
        try:
            module.main(args)
        except Reached:
            pass
        except common.UserError as e:
            assert "\n" not in str(e)
        except SystemExit as e:  # --help
            assert not e.code
        assert tree(place) == before


TEXTS = st.one_of(
    st.binary(max_size=60), st.text(max_size=60).map(lambda s: s.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from([
        "prompt", "video", "caption", ",", '"', "\n", "|||", "a cat", "clips/a.mp4", "{", "}", "[", "]",
        ":", '{"prompt": "a"}', "#", "\r\n", "\x85", "null"]), max_size=12).map("".join).map(str.encode))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=TEXTS, suffix=st.sampled_from([".txt", ".csv", ".json", ".jsonl", ""]))
def test_any_list(content, suffix, place):
    """Prompt files and lists of clips of any content are read or refused in one line."""
    file = place / f"any{suffix}"
    file.write_bytes(content)
    for read in (read_prompts, read_image_prompts, lambda f: VideoDataset(f, 8, 32, 32)):
        try:
            read(file)
        except common.UserError as e:
            assert str(e) and "\n" not in str(e)
    file.unlink()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200), whole=st.booleans(), name=st.sampled_from([
    "ckpt.safetensors", "state.pt", "a.npy", "a.mp4", "a.gif", "a.png"]))
def test_any_file(content, name, whole, place):
    """Files of any content, or real ones with a few bytes changed."""
    source = {"ckpt.safetensors": "run/ckpt.safetensors", "state.pt": "run/state.pt", "a.mp4": "clips/a.mp4",
              "a.png": "picture.png"}.get(name)
    if whole and source:
        real = bytearray((place / source).read_bytes())
        for i, value in enumerate(content[:8]):
            real[(value * 7919 * (i + 1)) % min(len(real), 4000)] = value
        content = bytes(real)
    file = place / "any" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    reader = {"ckpt.safetensors": weights.load_checkpoint, "state.pt": common.load_state_file,
              "a.npy": lambda f: data.read_map(f, 4, (8, 8), 1), "a.png": data.read_image}
    try:
        reader.get(name, data.read_video)(file)
    except common.UserError as e:
        assert str(e) and "\n" not in str(e)


def test_a_reward_must_give_one_number_each(message):
    reward = rewards.Reward(lambda frames, prompts: np.zeros(len(frames)))
    with pytest.raises(common.UserError, match="must return a tensor"):
        rewards.score(reward, torch.zeros(1, 3, 2, 8, 8), ["a"])
