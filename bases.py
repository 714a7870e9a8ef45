"""The table of base models, and load_base(): a base's network, autoencoder, text tower, schedule.

    python bases.py                                # print the table
    python bases.py --download NAME                # fetch a base's public files
    python bases.py --export FORMAT RUN OUT        # write a run's LoRA for another program
    python bases.py --merge RUN OUT --weights W    # write its whole network, in the public layout

FORMAT: diffusers (load_lora_weights() of its pipelines; for UNets, which it gives no LoRA loader,
PeftModel.from_pretrained(pipe.unet, OUT)), comfyui, kohya, original (peft's folder for the original
code's network), or dreamvideo (a word or adapters as DreamVideo's own file). RUN may be
FOLDER:STEP. LoRA runs that RUN started from (--init) are in the file, too.

Public files are downloaded, or read from the folder --weights, in the original or in diffusers'
layout.
"""
from common import (  # first: for signals
    INIT, STATES, Parser, UserError, crc32, reads_weights, run_command, send_weights, warn,
    write_atomic)
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion import FLOW_SAMPLERS, make_schedule, number_of_updates
from dit import (
    PATCH, CogVideoX, CogVideoXConfig, STDiT3, STDiT3Config, Wan, WanConfig, cogvideox_state,
    stdit3_state, wan_diffusers_name, wan_state)
from models import (
    UNet3D, UNetConfig, add_lora, fits, freeze_int8, merge_lora, merge_public_lora, plain_lora,
    read_peft_lora, unet_diffusers_name, unet_state, videocrafter_name, with_motion_blocks,
    with_new_conditions, zero_init)
from text_encoders import (
    UMT5_XXL, WAN_CLIP, CLIPConfig, OpenCLIPText, OpenCLIPVision, T5Config, T5Text, clean_text,
    image_state, placeholder_id, t5_state, t5_tokenizer, text_state, tokenize)
from tinyworld import (
    MOTIONS, NEW_MOTIONS, TINY_COGVIDEOX_VAE, TINY_FPS, TINY_FRAMES, TINY_SIZE, TINY_VAE,
    TINY_WORDS, TinyText, tiny_tokenize)
from vae import (
    WAN22_VAE, AutoencoderKL, CogVideoXVAE, CogVideoXVAEConfig, OpenSoraVAE, OpenSoraVAEConfig,
    Tiles, VAEConfig, WanVAE, WanVAEConfig, cogvideox_vae_state, opensora_vae_state, vae_state,
    wan_vae_state)
from weights import (
    PARTS, START, below, export_dreamvideo, fetch, load_checkpoint, load_safetensors, load_strict,
    load_weights, lora_file, lora_format, name_of, open_weights, public_files, read_learned,
    replace_part, run_file, run_meta, run_parts, write_lora)

ASSETS = Path(__file__).parent / "assets"

# config -> class
NETWORKS = {UNetConfig: UNet3D, CogVideoXConfig: CogVideoX, STDiT3Config: STDiT3, WanConfig: Wan}
AUTOENCODERS = {VAEConfig: AutoencoderKL, CogVideoXVAEConfig: CogVideoXVAE,
                OpenSoraVAEConfig: OpenSoraVAE, WanVAEConfig: WanVAE}
# class -> fn(public weights, module, source): our weights
CONVERT = {UNet3D: unet_state, CogVideoX: cogvideox_state, STDiT3: stdit3_state, Wan: wan_state,
           AutoencoderKL: vae_state, CogVideoXVAE: cogvideox_vae_state,
           OpenSoraVAE: opensora_vae_state, WanVAE: wan_vae_state, OpenCLIPText: text_state,
           OpenCLIPVision: image_state, T5Text: t5_state}


# ---- the table

@dataclass(frozen=True)
class Sampling:
    """How clips are sampled. The defaults are VGen's; a base's row has its own; flags change them.

    None in the fields from fps on means that the base has no such condition or option.
    """
    frames: int = 16
    height: int = 256
    width: int = 256
    save_fps: int = 8          # frame rate of the files
    sampler: str = "ddim"
    sample_steps: int = 50
    cfg: float = 9.0           # guidance scale w in u + w (c - u)
    eta: float = 0.0           # DDIM noise
    spacing: str = "leading"   # how sampler steps are spread over the schedule's, see diffusion.py
    origin: int = 50           # steps of a consistency model's distillation
    negative: str = ""
    suffix: str = ""           # text put after every prompt
    fps: int | None = None                  # frame rate given to the network
    start_offset: float | None = None       # strength of offset noise in the starting noise
    dynamic_cfg: str | None = None          # CogVideoX: guidance that grows over the steps
    shift: float | None = None              # Wan: moves the steps towards the noise
    boundary: float | None = None           # Wan2.2's two experts: the first has t >= 1000 boundary
    low_cfg: float | None = None            # the second expert's guidance scale
    motion_cfg: float | None = None         # T2V-Turbo-v2: scale of motion guidance
    motion_share: float | None = None       # share of the steps that have it
    motion_factor: int | None = None        # HiGen: amount of motion
    appearance_factor: float | None = None  # HiGen: change over the clip
    strength: tuple = (1.0, 1.0)       # DreamVideo: of the appearance image in the branches c and u
    subject_below: int | None = None   # DreamVideo: the subject's adapters act at steps below
    inverse_noise: float = 0.0         # DreamVideo: share of an inverted clip in the starting noise

    @property
    def size(self):
        """(frames, height, width) in pixels."""
        return self.frames, self.height, self.width

    @property
    def updates(self) -> int:
        """How many updates the sampler makes; some DDIM spacings make more than sample_steps."""
        return number_of_updates(self.sampler, self.sample_steps, self.spacing)

    def metadata(self) -> dict:
        """Plain values for a checkpoint or index.jsonl, without what the base does not have."""
        return {k: v for k, v in asdict(self).items() if v is not None and k not in PER_CLIP}


PER_CLIP = ("strength", "subject_below", "inverse_noise")  # of one call of sample.py, not of a run


EPS = dict(name="linear_sd", prediction="eps")


@dataclass(frozen=True)
class Row:
    """One base. The defaults are ModelScope's. url: "hub:repo:file", see weights.fetch().

    Parts of `files` are "net", "vae", "text"; "image": CLIP image tower; "motion_text": a second
    text tower (DEMO); "lora": merged into the network (T2V-Turbo); "tokenizer": T5's; "low_net":
    the expert for little noise (Wan2.2).
    """
    about: str
    net: UNetConfig | CogVideoXConfig | STDiT3Config | WanConfig = UNetConfig()
    vae: VAEConfig | CogVideoXVAEConfig | OpenSoraVAEConfig | WanVAEConfig = VAEConfig()
    text: CLIPConfig | T5Config | None = CLIPConfig()  # None: TinyText, which knows `words`
    schedule: dict = field(default_factory=lambda: EPS)  # arguments of diffusion.make_schedule
    sample: Sampling = Sampling()                      # as published
    files: dict = field(default_factory=dict)          # {layout: {part: url}}
    methods: tuple = ()                                # the training files that run on it
    millions: float = 0.0                              # parameters of the network
    image: CLIPConfig | None = None                    # image tower; None: of the text tower's CLIP
    keeps_first: bool = False                          # may be given its first frame (Wan TI2V)
    # of the tiny world's bases
    assets: dict = field(default_factory=dict)  # {part: name of the file in assets/ that holds it}
    flawed: bool = False                        # trained on clips that look scraped from the web
    words: tuple = tuple(TINY_WORDS)
    motion_words: float = 1.0                   # share of what sets words for motions apart

    @property
    def tiny(self) -> bool:
        """Is it a base of the tiny world, whose weights are in assets/?"""
        return self.text is None

    @property
    def unet(self) -> UNetConfig:
        """The UNet's options; all off for a transformer."""
        return self.net if isinstance(self.net, UNetConfig) else UNetConfig()

    @property
    def first_frame(self) -> bool:
        """Does it make video from an image, always?"""
        transformer = isinstance(self.net, CogVideoXConfig | WanConfig)
        beside = transformer and self.net.in_channels > self.net.out_channels
        return beside or self.unet.image_to_video

    @property
    def takes_first_frame(self) -> bool:
        """Can its clips start from an image?"""
        return self.first_frame or self.keeps_first

    @property
    def two_experts(self) -> bool:
        """Has it a network for much noise and one for little (Wan2.2 A14B)?"""
        return self.sample.boundary is not None

    @property
    def tracks(self) -> bool:
        """Does it follow a tracking video (Diffusion as Shader)?"""
        return bool(getattr(self.net, "tracking_blocks", 0))


# files
MODELSCOPE = "hf:ali-vilab/modelscope-damo-text-to-video-synthesis"
MODELSCOPE_FILES = {"net": f"{MODELSCOPE}:text2video_pytorch_model.pth",
                    "vae": f"{MODELSCOPE}:VQGAN_autoencoder.pth",
                    "text": f"{MODELSCOPE}:open_clip_pytorch_model.bin"}
CLIP = "hf:laion/CLIP-ViT-H-14-laion2B-s32B-b79K:open_clip_pytorch_model.bin"
SD_VAE = "hf:stabilityai/stable-diffusion-2-1-base:v2-1_512-ema-pruned.ckpt"
VC2 = "hf:VideoCrafter/VideoCrafter2:model.ckpt"
VC2_FILES = {"net": VC2, "vae": VC2, "text": VC2}


def vgen_files(net, **more):
    """The files of VGen's own networks."""
    return {"original": {"net": net, "vae": SD_VAE, "text": CLIP} | more}


def diffusers_files(repo, net="unet", **more):
    """{part: url} of a repository in diffusers' layout; more {part: file}: further parts."""
    files = {"net": f"{net}/diffusion_pytorch_model.safetensors",
             "vae": "vae/diffusion_pytorch_model.safetensors",
             "text": "text_encoder/model.safetensors"} | more
    return {part: f"{repo}:{file}" for part, file in files.items()}


def cogvideox_files(repo):
    """CogVideoX's repositories; network and T5 are in shards."""
    tokenizer = "tokenizer/spiece.model"
    return {"diffusers": diffusers_files(repo, "transformer", tokenizer=tokenizer)}


def wan_files(name, comfy, net, vae="2.1", image=False, two=False):
    """Files of Wan-AI's repository NAME, of its diffusers layout, of ComfyUI's `comfy`.

    net: ComfyUI's name of the network, with {} for "high_noise" or "low_noise" if there are two.
    """
    repo, weights = f"hf:Wan-AI/{name}", "diffusion_pytorch_model.safetensors"
    original = {"net": f"{repo}:{weights}", "vae": f"{repo}:Wan{vae}_VAE.pth",
                "text": f"{repo}:models_t5_umt5-xxl-enc-bf16.pth",
                "tokenizer": f"{repo}:google/umt5-xxl/tokenizer.json"}
    folders = {"tokenizer": "tokenizer/tokenizer.json"}
    split = f"hf:Comfy-Org/{comfy}:split_files"
    text = f"{split}/text_encoders/umt5_xxl_fp16.safetensors"
    comfyui = {"net": f"{split}/diffusion_models/{net.format('high_noise')}.safetensors",
               "vae": f"{split}/vae/wan{'_2.1' if vae == '2.1' else '2.2'}_vae.safetensors",
               "text": text, "tokenizer": text}  # it holds the tokenizer, too
    if image:
        original["image"] = f"{repo}:models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        folders["image"] = "image_encoder/model.safetensors"
        comfyui["image"] = f"{split}/clip_vision/clip_vision_h.safetensors"
    if two:
        original["net"] = f"{repo}:high_noise_model/{weights}"
        original["low_net"] = f"{repo}:low_noise_model/{weights}"
        folders["low_net"] = f"transformer_2/{weights}"
        comfyui["low_net"] = comfyui["net"].replace("high_noise", "low_noise")
    diffusers = diffusers_files(f"{repo}-Diffusers", "transformer", **folders)
    return {"original": original, "diffusers": diffusers, "comfyui": comfyui}


# prompts
NEGATIVE = (
    "Distorted, discontinuous, Ugly, blurry, low resolution, motionless, static, disfigured, "
    "disconnected limbs, Ugly faces, incomplete arms")
SHARP = ", cinematic, High Contrast, highly detailed, no blur, 4k render"
SR600_SUFFIX = (
    ", cinematic, High Contrast, highly detailed, Unreal Engine 5, no blur, full length ultra-wide "
    "angle shot a cinematic scene, taken using a Canon EOS R camera, hyper detailed photo - "
    "realistic maximum detail, 32k, Color Grading, portrait Photography, ultra HD, extreme "
    "meticulous detailing, skin pore detailing, hyper sharpness, perfect without deformations, 4k "
    "render")
SR600_NEGATIVE = (
    "worst quality, normal quality, low quality, low res, blurry, text, watermark, logo, banner, "
    "extra digits, cropped, jpeg artifacts, signature, username, error, sketch ,duplicate, ugly, "
    "monochrome, horror, geometry, mutation, disgusting")
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
WAN_I2V_NEGATIVE = f"镜头晃动，{WAN_NEGATIVE}"  # 2.1's

# what several rows share
V_ZERO_SNR = dict(name="linear_sd", prediction="v", zero_snr=True)
VC2_EPS = EPS | dict(scale=(1.0, 0.7, 400))  # the signal of x_t is damped by up to 0.7
VC2_NET = dict(spatial_dropout=0.0, temporal_linear=True, use_fps_condition=True, default_fps=16)
TURBO = Sampling(height=320, width=512, fps=16, sampler="lcm", sample_steps=4, cfg=7.5,
                 spacing="stride", origin=50)
VCOMPOSER = UNetConfig(
    concat_dim=8, style_image=True,
    maps=("masked", "depth", "sketch", "motion", "local_image", "single_sketch"))
TFT2V = Sampling(width=448, negative=NEGATIVE, suffix=SHARP)
ADAPTERS = dict(
    spatial_adapters=(("cross_attention", "parallel"),),
    temporal_adapters=tuple(
        (layer, "parallel") for layer in ("self_attention", "cross_attention", "feedforward")))
COGVIDEOX = dict(name="linear_sd_shifted", prediction="v", zero_snr=True)
COGVIDEOX_5B = dict(
    vae=CogVideoXVAEConfig(), text=T5Config(), schedule=COGVIDEOX,
    sample=Sampling(frames=49, height=480, width=720, sampler="dpm", cfg=6.0,
                    dynamic_cfg="published"))
COGVIDEOX_I2V = dict(positions="rope+learned", in_channels=32)
WAN = dict(vae=WanVAEConfig(), text=UMT5_XXL, schedule=dict(name="flow", shift=5.0))
WAN_14B = WanConfig(dim=5120, ffn_dim=13824, heads=40, num_layers=40)
WAN_14B_I2V = replace(WAN_14B, in_channels=36)
WAN_CLIP_14B = replace(WAN_14B_I2V, image_dim=WAN_CLIP.vision_width)
WAN_SAMPLE = Sampling(
    frames=81, height=480, width=832, save_fps=16, sampler="flow-unipc", spacing="wan", cfg=5.0,
    shift=5.0, negative=WAN_NEGATIVE)
WAN_I2V = replace(WAN_SAMPLE, sample_steps=40, shift=3.0, negative=WAN_I2V_NEGATIVE)
HD = dict(height=720, width=1280)
# methods for any network that makes video from text, and what UNets have besides
ANY_TEXT = ("t2v", "videolcm", "vader", "grpo", "instructvideo", "videodpo")
TEXT_TO_VIDEO = (*ANY_TEXT, "demo")
# The tiny world. Noise hides so redundant a signal less well, hence the schedule's shift. With
# v-prediction and zero terminal SNR, sampling starts where training ended.
TINY_NET = UNetConfig(
    dim=32, dim_mult=(1, 2), num_res_blocks=1, attn_scales=(1.0, 0.5), head_dim=32, num_heads=1,
    context_dim=64, dropout=0.0, frame_pos=TINY_FRAMES, pooled_text=True, spatial_pos=8)
TINY_SAMPLE = Sampling(
    frames=TINY_FRAMES, height=TINY_SIZE, width=TINY_SIZE, save_fps=TINY_FPS, sample_steps=25,
    cfg=1.5, spacing="trailing")
TINY = dict(
    vae=replace(TINY_VAE, scale=0.64), text=None, sample=TINY_SAMPLE,
    schedule=dict(name="cosine", prediction="v", zero_snr=True, shift=0.15),
    assets={"net": "tiny-clean", "vae": "tiny", "text": "tiny-clean"})
TINY_TOWER = CLIPConfig(
    embed_dim=32, image_size=TINY_SIZE, vision_layers=1, vision_width=32, vision_head_width=16,
    patch_size=8)

BASES = {
    "tiny": Row(
        "text to video in the tiny world, 8 frames of 32x32; it obeys the words and looks bad, as "
        "clips scraped from the web do: marked, flickering, shaking",
        TINY_NET, **TINY | dict(assets=dict.fromkeys(("net", "vae", "text"), "tiny")), flawed=True,
        millions=1.8, methods=("tft2v", *TEXT_TO_VIDEO)),
    "tiny-clean": Row(
        "tiny, trained on clips without flaws; what customises and controls starts from it",
        TINY_NET, **TINY, millions=1.8, methods=(*ANY_TEXT, "tft2v")),
    # I2VGen-XL's network and conditions. Words have 32 numbers, not 64, to make room for the layers
    # that read the image: the file stays below 4 MB.
    "tiny-i2v": Row(
        "image to video in the tiny world, built like I2VGen-XL, 8 frames of 32x32; in assets/",
        replace(TINY_NET, context_dim=32, image_to_video=True, concat_dim=4),
        **TINY | dict(assets=dict.fromkeys(("net", "text", "image"), "tiny-i2v") | {"vae": "tiny"}),
        image=TINY_TOWER, words=(*TINY_WORDS, *NEW_MOTIONS), millions=1.9,
        methods=("i2vgen", "vader", "grpo")),
    # A CogVideoX-I2V of 9 frames. Latents are 2x smaller in time, height and width, so that a frame
    # still has 8 x 8 tokens. Positions and schedule are 5B-I2V's, with a shift by which noise hides
    # an object's path as in tiny (left against right, over the noise at the sampler's second step:
    # 0.3; tiny: 0.5).
    "tiny-cogvideox": Row(
        "image to video in the tiny world, CogVideoX's classes, 9 frames of 32x32; in assets/",
        CogVideoXConfig(
            in_channels=16, out_channels=8, num_layers=6, heads=4, head_dim=32, time_dim=32,
            text_dim=64, text_length=10, positions="rope+learned", size=(5, 16, 16)),
        TINY_COGVIDEOX_VAE, None, COGVIDEOX | dict(shift=0.7),
        replace(TINY_SAMPLE, frames=9, cfg=2.0),
        assets=dict.fromkeys(("net", "vae", "text"), "tiny-cogvideox"),
        words=(*TINY_WORDS, *NEW_MOTIONS), millions=1.5,
        methods=("i2vgen", "vader", "grpo", "das")),
    # Wan's network on tiny's latents: a frame has 4 x 4 tokens
    "tiny-wan": Row(
        "text to video in the tiny world, Wan's network and flow matching, flawed as tiny; may "
        "start from a first frame (--image)",
        WanConfig(in_channels=4, out_channels=4, dim=128, ffn_dim=512, heads=4, num_layers=6,
                  freq_dim=64, text_dim=64, text_length=10),
        **TINY | dict(
            schedule=dict(name="flow", shift=5.0),
            sample=replace(TINY_SAMPLE, sampler="flow-unipc", spacing="wan", sample_steps=20,
                           shift=5.0),
            assets={"net": "tiny-wan", "vae": "tiny", "text": "tiny-wan"}),
        keeps_first=True, flawed=True, millions=1.7, methods=ANY_TEXT),
    # an extreme case of what DEMO says of CLIP: to this text encoder all motions are one word
    "tiny-weak": Row(
        "tiny with a text encoder that cannot tell motions apart, for demo.py",
        TINY_NET, **TINY, motion_words=0.0, millions=1.8, methods=("t2v", "videolcm", "demo")),
    # tiny, extended as "higen", "vcomposer" and "dreamvideo" extend ModelScope: new layers are
    # untrained
    "tiny-higen": Row(
        "tiny with HiGen's factors, to be trained by higen.py",
        replace(TINY_NET, text_resampler=1, num_tokens=10),
        **TINY | dict(sample=replace(TINY_SAMPLE, sampler="higen", motion_factor=300,
                                     appearance_factor=0.1)),
        millions=2.2, methods=("higen",)),
    "tiny-vcomposer": Row(
        "tiny with maps of depth, sketch and motion, to be trained by vcomposer.py",
        replace(TINY_NET, concat_dim=8, maps=("depth", "sketch", "motion")), **TINY, millions=1.9,
        methods=("vcomposer",)),
    "tiny-dreamvideo": Row(
        "tiny with adapters for a subject and a motion (dreamvideo.py --base tiny)",
        replace(TINY_NET, **ADAPTERS, adapter_image_dim=32),
        **TINY | dict(assets=TINY["assets"] | {"image": "tiny-i2v"}), image=TINY_TOWER,
        words=(*TINY_WORDS, "*"), millions=2.0, methods=("dreamvideo",)),  # * is a word to learn

    "modelscope": Row(
        "ModelScope text-to-video (arXiv 2308.06571), 16 frames of 256x256",
        files={"original": MODELSCOPE_FILES,
               "diffusers": diffusers_files("hf:ali-vilab/text-to-video-ms-1.7b")},
        millions=1411.2, methods=TEXT_TO_VIDEO),
    "modelscope-v1.4": Row(
        "its version 1.4, the base of InstructVideo (--lora takes its fine-tuned file)",
        sample=Sampling(cfg=3.0, sample_steps=20),
        files=vgen_files("ms:iic/InstructVideo:model_scope_v1-4_0600000.pth"),
        millions=1411.2, methods=TEXT_TO_VIDEO),
    "modelscope-v1.5": Row(
        "its version 1.5, the base of DreamVideo",
        files=vgen_files("ms:iic/dreamvideo-t2v:model_scope_v1-5_0632000.pth"),
        millions=1411.2, methods=TEXT_TO_VIDEO),
    "dreamvideo": Row(
        "v1.5 with adapters for a subject and a motion (arXiv 2312.04433), 32 frames; needs --lora",
        UNetConfig(**ADAPTERS, adapter_image_dim=1024),
        sample=Sampling(frames=32, start_offset=0.1),
        files=vgen_files("ms:iic/dreamvideo-t2v:model_scope_v1-5_0632000.pth", image=CLIP),
        millions=1501.6, methods=("dreamvideo",)),
    "demo": Row(
        "ModelScope with a motion encoder and motion blocks (DEMO, arXiv 2410.05097)",
        UNetConfig(motion_blocks=True), sample=Sampling(negative=NEGATIVE),
        files={"original": MODELSCOPE_FILES | {
            "net": "hf:Ryan-PR/DEMO:demo.pth",
            "motion_text": "hf:Ryan-PR/DEMO:motion_encoder.pth"}},
        millions=1684.9, methods=("vader", "grpo", "instructvideo", "demo")),
    "videocrafter2": Row(
        "VideoCrafter2 (arXiv 2401.09047), 16 frames of 320x512",
        UNetConfig(**VC2_NET), schedule=VC2_EPS,
        sample=Sampling(height=320, width=512, fps=28, save_fps=10, cfg=12.0, eta=1.0),
        files={"original": VC2_FILES}, millions=1413.3, methods=ANY_TEXT),
    "t2v-turbo": Row(
        "VideoCrafter2 distilled to 4 steps (T2V-Turbo, arXiv 2405.18750)",
        UNetConfig(**VC2_NET, guidance_dim=256), sample=TURBO,
        files={"original": VC2_FILES | {"lora": "hf:jiachenli-ucsb/T2V-Turbo-VC2:unet_lora.pt"}},
        millions=1413.4, methods=("videodpo",)),
    "t2v-turbo-v2": Row(
        "T2V-Turbo-v2 with motion guidance (arXiv 2410.05677), 16 steps",
        UNetConfig(**VC2_NET, guidance_dim=256, motion_guidance_dim=256),
        sample=replace(TURBO, sample_steps=16, origin=200, motion_cfg=0.05, motion_share=0.5),
        files={"original": VC2_FILES | {"net": "hf:jiachenli-ucsb/T2V-Turbo-v2:unet_mg.pt"}},
        millions=1413.7, methods=("videodpo",)),
    "i2vgen-xl": Row(
        "image to video (I2VGen-XL, arXiv 2311.04145), 16 frames of 704x1280",
        UNetConfig(image_to_video=True, concat_dim=4, use_fps_condition=True),
        schedule=dict(name="cosine", prediction="v", zero_snr=True),
        sample=Sampling(height=704, width=1280, fps=16, negative=NEGATIVE),
        files=vgen_files("ms:damo/I2VGen-XL:i2vgen_xl_00854500.pth", image=CLIP) | {
            "diffusers": diffusers_files("hf:ali-vilab/i2vgen-xl",
                                         image="image_encoder/model.safetensors"),
            # what i2vgen.py may start from instead; OpenCLIP's file holds both towers
            START: MODELSCOPE_FILES | {"image": MODELSCOPE_FILES["text"]}},
        millions=1420.5, methods=("i2vgen", "vader", "grpo")),
    "sr600": Row(
        "video to video at 720x1280 (SR600, in VGen): any clip, sharper; needs --video",
        UNetConfig(super_resolution=True),
        schedule=dict(name="logsnr_cosine_interp", prediction="v"),
        sample=Sampling(frames=32, height=720, width=1280, sampler="sr600", sample_steps=30,
                        suffix=SR600_SUFFIX, negative=SR600_NEGATIVE),
        files=vgen_files("ms:iic/HiGen:sr_step_110000_ema.pth"), millions=1411.2),
    "higen": Row(
        "first an image, then the clip around it (HiGen, arXiv 2312.04483), 32 frames of 256x448",
        UNetConfig(text_resampler=2, num_tokens=16), schedule=V_ZERO_SNR,
        sample=Sampling(frames=32, width=448, sampler="higen", cfg=12.0, start_offset=0.1,
                        motion_factor=500, appearance_factor=1.0),
        files=vgen_files("ms:iic/HiGen:cvpr2024.t2v.e003.non_ema_0725000.pth"),
        millions=1483.2, methods=("higen",)),
    "tft2v": Row(
        "TF-T2V (arXiv 2312.15770), 16 frames of 256x448",
        UNetConfig(concat_dim=8, style_image=True), schedule=V_ZERO_SNR, sample=TFT2V,
        files=vgen_files("ms:iic/tf-t2v:tft2v_t2v_non_ema_512000.pth"), millions=1416.5,
        methods=(*ANY_TEXT, "tft2v")),
    "tft2v-32": Row(
        "TF-T2V, 32 frames of 256x448",
        UNetConfig(concat_dim=8, style_image=True), schedule=V_ZERO_SNR,
        sample=replace(TFT2V, frames=32),
        files=vgen_files("ms:iic/tf-t2v:tft2v_t2v_32frames_non_ema_560000.pth"), millions=1416.5,
        methods=(*ANY_TEXT, "tft2v")),
    "vcomposer": Row(
        "VideoComposer by TF-T2V (arXiv 2306.02018): depth, sketch, motion, images as conditions",
        VCOMPOSER, schedule=V_ZERO_SNR, sample=TFT2V,
        files=vgen_files("ms:iic/tf-t2v:tft2v_vcomposer_non_ema_254000.pth", image=CLIP),
        millions=1416.6, methods=("vcomposer",)),
    "vcomposer-hd": Row(
        "VideoComposer by TF-T2V, 16 frames of 512x896",
        VCOMPOSER, schedule=V_ZERO_SNR, sample=replace(TFT2V, height=512, width=896),
        files=vgen_files("ms:iic/tf-t2v:tft2v_vcomposer_non_ema_270000_896x512.pth", image=CLIP),
        millions=1416.6, methods=("vcomposer",)),
    "videolcm": Row(
        "TF-T2V distilled to 4 steps (VideoLCM, arXiv 2312.09109)",
        UNetConfig(concat_dim=8), schedule=V_ZERO_SNR,
        sample=Sampling(width=448, sampler="lcm", sample_steps=4, cfg=1.0, spacing="even",
                        suffix=SHARP.replace("no blur", "Unreal Engine 5, no blur")),
        files=vgen_files("ms:iic/tf-t2v:videolcm_t2v_non_ema_544000.pth"), millions=1411.3),
    "cogvideox-2b": Row(
        "CogVideoX-2B (arXiv 2408.06072), 49 frames of 480x720",
        CogVideoXConfig(num_layers=30, heads=30, positions="sincos"),
        CogVideoXVAEConfig(scale=1.15258426), T5Config(), COGVIDEOX | dict(divisor=3.0),
        Sampling(frames=49, height=480, width=720, spacing="cogvideox", cfg=6.0),
        cogvideox_files("hf:THUDM/CogVideoX-2b"), millions=1693.8,
        methods=(*ANY_TEXT, "das")),
    "cogvideox-5b": Row(
        "CogVideoX-5B, 49 frames of 480x720",
        CogVideoXConfig(), **COGVIDEOX_5B, files=cogvideox_files("hf:THUDM/CogVideoX-5b"),
        millions=5570.3, methods=(*ANY_TEXT, "das")),
    "cogvideox-5b-i2v": Row(
        "CogVideoX-5B-I2V, image to video",
        CogVideoXConfig(**COGVIDEOX_I2V), **COGVIDEOX_5B,
        files=cogvideox_files("hf:THUDM/CogVideoX-5b-I2V"),
        millions=5570.5, methods=("i2vgen", "vader", "grpo", "das")),
    "das": Row(
        "Diffusion as Shader (arXiv 2501.03847): CogVideoX-5B-I2V that follows a tracking video",
        CogVideoXConfig(**COGVIDEOX_I2V, tracking_blocks=18), **COGVIDEOX_5B,
        files=cogvideox_files("hf:EXCAI/Diffusion-As-Shader"), millions=8129.4, methods=("das",)),
    "opensora": Row(
        "Open-Sora 1.2, 51 frames of 240x426, other sizes and lengths too",
        STDiT3Config(), OpenSoraVAEConfig(), T5Config(length=300, mask=True),
        dict(name="flow", by_size=True),
        Sampling(frames=51, height=240, width=426, fps=24, save_fps=24, sampler="rflow",
                 sample_steps=30, cfg=7.0, suffix=" aesthetic score: 6.5."),
        {"original": {"net": "hf:hpcai-tech/OpenSora-STDiT-v3:model.safetensors",
                      "vae": "hf:hpcai-tech/OpenSora-VAE-v1.2:model.safetensors",
                      "text": "hf:DeepFloyd/t5-v1_1-xxl:pytorch_model.bin",
                      "tokenizer": "hf:DeepFloyd/t5-v1_1-xxl:spiece.model"}},
        millions=1207.6, methods=ANY_TEXT),
    "wan2.1-t2v-1.3b": Row(
        "Wan2.1 T2V-1.3B (arXiv 2503.20314), 81 frames of 480x832, other sizes and lengths too",
        WanConfig(), **WAN, sample=WAN_SAMPLE,
        files=wan_files("Wan2.1-T2V-1.3B", "Wan_2.1_ComfyUI_repackaged", "wan2.1_t2v_1.3B_bf16"),
        millions=1419.0, methods=ANY_TEXT),
    "wan2.1-t2v-14b": Row(
        "Wan2.1 T2V-14B, 81 frames of 720x1280 or 480x832",
        WAN_14B, **WAN, sample=replace(WAN_SAMPLE, **HD),
        files=wan_files("Wan2.1-T2V-14B", "Wan_2.1_ComfyUI_repackaged", "wan2.1_t2v_14B_bf16"),
        millions=14288.5, methods=ANY_TEXT),
    "wan2.1-i2v-14b-480p": Row(
        "Wan2.1 I2V-14B-480P, image to video, as many pixels as 480x832 in the image's shape",
        WAN_CLIP_14B, **WAN | dict(schedule=dict(name="flow", shift=3.0)), sample=WAN_I2V,
        image=WAN_CLIP,
        files=wan_files("Wan2.1-I2V-14B-480P", "Wan_2.1_ComfyUI_repackaged",
                        "wan2.1_i2v_480p_14B_bf16", image=True),
        millions=16394.9, methods=("i2vgen", "vader", "grpo")),
    "wan2.1-i2v-14b-720p": Row(
        "Wan2.1 I2V-14B-720P, image to video, as many pixels as 720x1280 in the image's shape",
        WAN_CLIP_14B, **WAN, sample=replace(WAN_I2V, **HD, shift=5.0), image=WAN_CLIP,
        files=wan_files("Wan2.1-I2V-14B-720P", "Wan_2.1_ComfyUI_repackaged",
                        "wan2.1_i2v_720p_14B_bf16", image=True),
        millions=16394.9, methods=("i2vgen", "vader", "grpo")),
    "wan2.2-ti2v-5b": Row(
        "Wan2.2 TI2V-5B, from text or (--image) from a first frame, 121 frames of 704x1280",
        WanConfig(in_channels=48, out_channels=48, dim=3072, ffn_dim=14336, heads=24),
        **WAN | dict(vae=WAN22_VAE), keeps_first=True,
        sample=replace(WAN_SAMPLE, frames=121, height=704, width=1280, save_fps=24),
        files=wan_files("Wan2.2-TI2V-5B", "Wan_2.2_ComfyUI_Repackaged", "wan2.2_ti2v_5B_fp16",
                        vae="2.2"),
        millions=4999.8, methods=(*ANY_TEXT, "i2vgen")),
    "wan2.2-t2v-a14b": Row(
        "Wan2.2 T2V-A14B, 81 frames of 720x1280 or 480x832; two experts, one on the device",
        WAN_14B, **WAN | dict(schedule=dict(name="flow", shift=12.0)),
        sample=replace(WAN_SAMPLE, **HD, sample_steps=40, shift=12.0, cfg=4.0, low_cfg=3.0,
                       boundary=0.875),
        files=wan_files("Wan2.2-T2V-A14B", "Wan_2.2_ComfyUI_Repackaged", "wan2.2_t2v_{}_14B_fp16",
                        two=True),
        millions=2 * 14288.5),
    "wan2.2-i2v-a14b": Row(
        "Wan2.2 I2V-A14B, image to video, as many pixels as 720x1280; two experts",
        WAN_14B_I2V, **WAN,
        sample=replace(WAN_SAMPLE, **HD, sample_steps=40, cfg=3.5, low_cfg=3.5, boundary=0.9),
        files=wan_files("Wan2.2-I2V-A14B", "Wan_2.2_ComfyUI_Repackaged", "wan2.2_i2v_{}_14B_fp16",
                        two=True),
        millions=2 * 14288.9),
}


def base_row(name, tracks=0) -> Row:
    """A base's row; tracks: number of tracking blocks (Diffusion as Shader) of a run on it."""
    if name not in BASES:
        raise UserError(f"--base {name}: unknown; choose from {', '.join(BASES)} (python bases.py "
                        "shows the table)")
    row = BASES[name]
    if not tracks:
        return row
    if not isinstance(row.net, CogVideoXConfig):
        raise UserError(f"--tracking-blocks {tracks}: {name} has no branch for tracking videos")
    layers, own = row.net.num_layers, row.net.tracking_blocks
    if not 0 < tracks <= layers:
        raise UserError(f"--tracking-blocks {tracks}: {name} has {layers} blocks to copy")
    if own and tracks != own:
        raise UserError(f"--tracking-blocks {tracks}: the branch of {name} has {own}")
    return replace(row, net=replace(row.net, tracking_blocks=tracks))


# ---- sizes and sampling of a run, checked before anything is loaded

def latent_shape(name, frames, height, width):
    """(c, f, h, w) of a clip's latents. Raises UserError with the nearest size that fits."""
    row = base_row(name)
    for flag, size in (("--frames", frames), ("--height", height), ("--width", width)):
        if size < 1:
            raise UserError(f"{flag} {size}: must be 1 or more")
    check_frames(name, row, frames)
    check_side(name, row, "height", height)
    check_side(name, row, "width", width)
    vae = row.vae
    return vae.z_channels, vae.latent_frames(frames), height // vae.factor, width // vae.factor


def check_frames(name, row, frames):
    """Refuse a number of frames that the base cannot make."""
    if isinstance(row.net, CogVideoXConfig):
        learned = row.net.positions == "rope+learned"  # a table for so many latent frames
        most = 1 + (row.net.size[0] - 1) * row.vae.time_factor if learned else None
        if frames % 8 != 1 or (most and frames > most):
            low = (min(frames, most or frames) - 1) // 8 * 8 + 1
            near = f"{low}" if low == most else f"{low} or {low + 8}"
            limit = f", at most {most}" if most else ""
            raise UserError(f"--frames {frames}: {name} makes 8 k + 1 frames{limit}; nearest: "
                            f"{near}")
    unit = row.vae.time_factor if isinstance(row.net, WanConfig) else 1
    if frames % unit != 1 % unit:
        low = (frames - 1) // unit * unit + 1
        raise UserError(f"--frames {frames}: {name} makes {unit} k + 1 frames; nearest: {low} or "
                        f"{low + unit}")
    most = row.unet.frame_pos
    if most and frames > most:
        raise UserError(f"--frames {frames}: {name} makes clips of 1 to {most} frames")


def check_side(name, row, side, size):
    """Refuse a "height" or "width", in pixels, that does not fit the base's network."""
    flag, unit, net = f"--{side}", row.vae.factor, row.net
    if isinstance(net, STDiT3Config):
        return  # it pads
    if isinstance(net, WanConfig):
        step = unit * PATCH
    elif isinstance(net, CogVideoXConfig):
        step, own = unit * PATCH, [n * unit for n in net.size[1:]]
        if net.positions == "rope+learned" and size != own[side == "width"]:
            raise UserError(f"{flag} {size}: {name} has learned positions for {own[0]}x{own[1]} "
                            "pixels only")
    else:
        step, largest = unit * 2 ** (len(net.dim_mult) - 1), net.spatial_pos * unit
        if largest and size > largest:
            raise UserError(f"{flag} {size}: {name} makes at most {largest} pixels per side")
        if net.super_resolution and side == "height":
            heights = [h for h in range(unit, 2 * size + 64 * unit, unit)
                       if fits(net, 1, h // unit, 0)]
            if size not in heights:
                a, b = sorted(sorted(heights, key=lambda h: abs(h - size))[:2])
                raise UserError(f"{flag} {size}: {name} needs a height that halves well; nearest: "
                                f"{a} or {b}")
            return
    if size % step:
        low = max(step, size // step * step)
        raise UserError(f"{flag} {size}: {name} needs a multiple of {step}; nearest: {low} or "
                        f"{low + step} (it was trained at {getattr(row.sample, side)})")


def nearest_side(name, row, side, ideal):
    """The "height" or "width" nearest to `ideal` pixels that fits the base's network."""
    unit, largest = row.vae.factor, int(2 * ideal)
    for length in sorted(range(unit, largest + 64 * unit, unit), key=lambda n: abs(n - ideal)):
        with suppress(UserError):
            check_side(name, row, side, length)
            return length
    raise AssertionError(f"{name}: no {side} near {ideal} fits")


def size_for_image(name, height, width):
    """Size (h, w) of the clip that Wan makes of an image of this size, as published: about as many
    pixels as the base's own clips, in the image's shape."""
    row = base_row(name)
    area, shape = row.sample.height * row.sample.width, height / width
    unit = row.vae.factor * PATCH
    sides = (area * shape) ** 0.5, (area / shape) ** 0.5
    tall, wide = (int(side // unit * unit) for side in sides)
    if not row.keeps_first:
        return tall, wide
    # one side is rounded down, and the area gives the other: whichever keeps the shape better
    choices = (tall, int(area / tall // unit * unit)), (int(area / wide // unit * unit), wide)
    return min(choices, key=lambda size: max(size[0] / size[1] / shape, shape * size[1] / size[0]))


# why a method runs on few bases, and what to use instead
ELSEWHERE = {
    "das": " (its branch for tracks is made of CogVideoX's blocks)",
    "dreamvideo": " (its adapters are layers of that UNet); elsewhere t2v.py --rank 16 learns a "
                  "subject (--data PICTURES --frames 1) or a motion (--data CLIPS)",
    "demo": " (its motion blocks are layers of UNets); elsewhere t2v.py --rank 16 --data CLIPS "
            "learns a motion"}


def choose_sampling(name, args, run=None, method=None, **fixed) -> Sampling:
    """The sampling settings for base `name`: its own, then a run's, then flags, then `fixed`.

    args: a parsed command line. Its options count that have the name of a field and are not None.
    run: the settings that a checkpoint holds, by default --init's. Sizes that do not fit and bases
    that the method does not run on are refused here, before anything is loaded.
    """
    row = base_row(name)
    if method and method not in row.methods:
        if row.two_experts:
            raise UserError(f"--base {name}: sample.py alone plays its two experts; no method "
                            "trains them")
        known = ", ".join(n for n, r in BASES.items() if method in r.methods)
        raise UserError(f"--base {name}: {method}.py does not run on it; it runs on {known}"
                        f"{ELSEWHERE.get(method, '')}")
    if method and args.init:
        run = init_sampling(name, args)
    names = {f.name for f in fields(Sampling)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    for option in ("fps", "motion_factor", "appearance_factor", "motion_cfg", "dynamic_cfg",
                   "shift", "low_cfg"):
        if option in given and getattr(row.sample, option) is None:
            what = "takes no frame rate" if option == "fps" else "has no such condition"
            raise UserError(f"--{option.replace('_', '-')} {given[option]}: base {name} {what}")
    known = {k: v for k, v in (run or {}).items() if k in names and v is not None}
    sampling = replace(row.sample, **known | given | fixed)
    own = row.sample.sampler  # UNets that are sampled by DDIM and flow matching have a choice
    kin = FLOW_SAMPLERS if own in FLOW_SAMPLERS else (own,)
    kin = (*kin, "lcm") if "videolcm" in row.methods else kin  # for what was distilled
    if isinstance(row.net, UNetConfig) and own in ("ddim", "lcm", "dpmpp"):
        kin = ("ddim", "lcm", "dpmpp")
    if sampling.sampler not in kin:
        raise UserError(f"--sampler {sampling.sampler}: this base is sampled by {own}")
    latent_shape(name, *sampling.size)
    return sampling


# ---- a loaded base

@dataclass
class Base:
    """A loaded base: its row of the table, its networks and its noise schedule.

    image_encoder, motion_encoder: None where the base has none. learned {token id: vectors}:
    words of a textual inversion. low_net: the expert for little noise, if there are two; net is
    the other one.
    """
    name: str
    row: Row
    net: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    schedule: object  # diffusion.Schedule or Flow
    tokenize: object  # fn(list of str) -> ids (b, n)
    image_encoder: nn.Module | None = None
    motion_encoder: nn.Module | None = None
    learned: dict = field(default_factory=dict)
    encoded: dict = field(default_factory=dict)  # {(prompt, motion): tokens (n, d)}, see remember()
    low_net: nn.Module | None = None
    init: list = field(default_factory=list)  # checksums of what --init put on it

    def sampling_schedule(self, sampling):
        """Its noise schedule with the shift of these settings."""
        if sampling.shift is None:
            return self.schedule
        return replace(self.schedule, shift=sampling.shift)

    def latent_shape(self, sampling):
        """(c, f, h, w) of the latents of clips of this size."""
        return latent_shape(self.name, *sampling.size)

    def parts(self) -> dict:
        """{name: module} of all networks that it has."""
        named = {"net": self.net, "vae": self.vae, "text encoder": self.text_encoder,
                 "image encoder": self.image_encoder, "motion encoder": self.motion_encoder,
                 "low-noise net": self.low_net}
        return {name: module for name, module in named.items() if module is not None}

    def to(self, device):
        """Move its networks to a device; of two experts the second stays behind, see two_experts()
        in pipeline.py."""
        for module in self.parts().values():
            place = "cpu" if module is self.low_net else device
            meta = any(t.is_meta for t in module.state_dict().values())  # see send_weights()
            module.to_empty(device=place) if meta else module.to(place)

    def freeze(self, dtype, but=()):
        """Turn gradients off and convert to `dtype` (None: keep), except for networks in `but`.

        T5 overflows in fp16 and gets bf16 instead.
        """
        for module in (m for name, m in self.parts().items() if name not in but):
            half = dtype == torch.float16 and isinstance(module, T5Text)
            module.requires_grad_(False)
            if dtype is not None:
                module.to(torch.bfloat16 if half else dtype)

    def freeze_int8(self):
        """Keep the linear weights of its network, or of both experts, in 8 bits."""
        for net in filter(None, (self.net, self.low_net)):
            freeze_int8(net)

    def train_net(self, args, dtype, also=()):
        """Train LoRA branches (--rank) or all weights (--rank 0) of the network from now on.

        The rest is frozen, in `dtype`, except for networks in `also`. What trains keeps its own
        type: fp32 for branches, load_base()'s for weights.
        """
        if args.rank:
            add_lora(self.net, args.rank, args.alpha, args.lora_targets)
        else:
            self.net.requires_grad_(True)
        self.freeze(dtype, but=["net", *also])
        self.net.grad_ckpt = args.grad_ckpt
        self.net.train()

    def encode_text(self, prompts, motion=False) -> Tensor:
        """List of str -> tokens (b, n, d) on the encoder's device; motion: by DEMO's encoder."""
        if all((prompt, motion) in self.encoded for prompt in prompts):
            device = next(self.net.parameters()).device
            return torch.stack([self.encoded[prompt, motion] for prompt in prompts]).to(device)
        encoder = self.motion_encoder if motion else self.text_encoder
        ids = self.tokenize(prompts).to(next(encoder.parameters()).device)
        if isinstance(self.row.text, T5Config):
            with torch.autocast(ids.device.type, enabled=False):  # see freeze()
                return encoder(ids)
        if self.row.tiny:
            return encoder(ids, learned=self.learned)
        # the tower was built without its last block: these are the penultimate features
        return encoder(ids, layer="last", learned=self.learned)

    def encode_null(self, negative, n) -> Tensor:
        """Tokens (n, m, d) of the unconditional branch; Open-Sora learned its own for ""."""
        if isinstance(self.net, STDiT3) and not negative:
            return self.net.null_text(n)
        return self.encode_text([negative] * n)

    def end_of_text(self, prompts) -> Tensor:
        """(b,): where prompts end: at CLIP's end token or at tiny's first empty place."""
        ids = self.tokenize(prompts)
        if self.row.tiny:
            return (ids != 0).sum(1).clamp(max=ids.shape[1] - 1)
        return ids.argmax(1)

    def learn(self, words, source):
        """Add words of a textual inversion {token id: vectors (N, width)} for use in prompts."""
        if not words:
            return
        table = self.text_encoder.token_embedding.weight
        for token, vectors in words.items():
            if not 0 <= token < len(table):
                raise UserError(f"{source}: {token} is no token of {self.name}")
            if vectors.ndim != 2 or vectors.shape[1] != table.shape[1]:
                raise UserError(f"{source}: vectors of shape {tuple(vectors.shape)}, but the words "
                                f"of {self.name} have {table.shape[1]} numbers")
        self.learned |= {token: vectors.to(table.device) for token, vectors in words.items()}

    def token_of(self, word) -> int:
        """Id of a word that is a single token, such as "*", textual inversion's placeholder."""
        return token_of(self.name, word)

    @torch.no_grad()
    def remember(self, prompts, env, motion_too=True):
        """Encode these prompts now and drop the text towers (DEMO's two: 1.4 GB in half precision).

        motion_too: also drop DEMO's motion encoder; False where it is trained.
        """
        prompts = list(dict.fromkeys(prompts))
        motion_too = motion_too and self.row.unet.motion_blocks
        self.tokenize(prompts)  # all at once: it counts those that are too long
        for motion in (False, True)[:1 + motion_too]:
            for i in range(0, len(prompts), 16):
                batch = prompts[i:i + 16]
                with env.autocast():
                    tokens = self.encode_text(batch, motion)
                self.encoded |= {(prompt, motion): row.cpu() for prompt, row in zip(batch, tokens)}
        self.text_encoder = None
        if motion_too:
            self.motion_encoder = None
        torch.cuda.empty_cache()


def token_of(name, word) -> int:
    """Id of a word that is a single token, in the text encoder of base `name`."""
    row = base_row(name)
    if not row.tiny:
        return placeholder_id(word)
    if word not in row.words:
        raise UserError(f"{word!r}: not a word of base {name}")
    return row.words.index(word) + 1


def load_base(name, weights=None, device="cpu", dtype=torch.float32, scratch=False, start=False,
              tracks=0, motion=False, image=False, links=(), frozen=None) -> Base:
    """Build a base and load its public weights: all parts frozen, in eval mode and in `dtype`.

    weights: folder of the public files (original or diffusers layout); None: assets/ (tiny) or
    the hub's local copy, downloaded if need be. dtype None: that of the files. scratch: leave the
    network, and tiny encoders, at their random start. start: image to video may start from
    ModelScope's files. tracks: number of tracking blocks to add. motion: with DEMO's motion
    blocks and motion encoder, copies of the base's own layers where it has none. image: with the
    image tower in the text tower's file. links: what is put on the base, the first one first.
    frozen "int8": the network's linear weights in 8 bits.
    """
    for meta in (link.meta for link in links if link.meta):
        start, motion = start or not meta["rank"], motion or meta["method"] == "demo"
        tracks = tracks or meta.get("tracking_blocks", 0)
    row = base_row(name, tracks)
    files = dict(public_files(name, row, weights, start))  # its errors come before any work
    copied = motion and not row.unet.motion_blocks
    if copied:
        row = replace(row, net=replace(row.net, motion_blocks=True))
    if files and copied:
        files["motion_text"] = files["text"]
    if files and image:
        files["image"] = files["text"]
    with torch.device("cpu" if scratch else "meta"):
        parts = build_parts(row, image=bool(row.image) or "image" in files)
    random = () if not scratch else ("net", "text", "image") if row.tiny else ("net",)
    if reads_weights():  # with fsdp only the first process: the others get them below
        load_parts({k: v for k, v in parts.items() if k not in random}, name, row, files, copied,
                   start)
        if "lora" in files:
            merge_public_lora(parts["net"], files["lora"])
    if row.tracks:
        parts["vae"].tiles = Tiles()  # as the network was trained
    ids_of = make_tokenizer(row, parts["text"], files.get("tokenizer"))
    base = Base(name, row, parts["net"], parts["vae"], parts["text"],
                make_schedule(**row.schedule), ids_of, parts.get("image"), parts.get("motion_text"))
    base.low_net = parts.get("low_net")
    if links:
        base.to("cpu")  # with fsdp the other processes have no weights yet
    for link in links:
        put_link(base, link)
    base.freeze(dtype)  # before it moves: float32 on the GPU would be the run's peak
    if frozen == "int8":
        base.freeze_int8()
    base.to(device)
    send_weights(base.parts().values())
    for module in base.parts().values():
        module.eval()
    return base


def build_parts(row, image) -> dict:
    """{part: module} of a base. image: with an image tower. DEMO's has a motion encoder, too."""
    parts = {"net": NETWORKS[type(row.net)](row.net), "vae": AUTOENCODERS[type(row.vae)](row.vae),
             "text": text_tower(row)}
    if row.unet.motion_blocks:
        parts["motion_text"] = text_tower(row)
    if row.two_experts:
        parts["low_net"] = NETWORKS[type(row.net)](row.net)
    if image:
        parts["image"] = OpenCLIPVision(row.image or row.text)
    return parts


def text_tower(row) -> nn.Module:
    """The part of a base's text encoder that its network reads."""
    if row.tiny:
        unet = isinstance(row.net, UNetConfig)
        return TinyText(row.words, row.net.context_dim if unet else row.net.text_dim)
    if isinstance(row.text, T5Config):
        return T5Text(row.text)
    # video networks read the features before the last block, which is neither built nor loaded
    return OpenCLIPText(replace(row.text, embed_dim=0, text_layers=row.text.text_layers - 1))


def make_tokenizer(row, tower, file=None):
    """-> fn(list of str): ids (b, n) for the base's text tower; file: T5's tokenizer."""
    if row.tiny:
        return partial(tiny_tokenize, tower.words, tower.context_length)
    if file is None:
        return tokenize
    return t5_tokenizer(file, row.text.length, clean_text if row.text.umt5 else None)


def load_parts(parts, name, row, files, copied, start):
    """Load each of `parts` {part: module} from its file; for the rest see load_base()."""
    opened = {}  # one file at a time; it may hold several parts
    for part, module in parts.items():
        source = f"{name} {part}" + (f", {files[part]}" if files else "")
        if row.tiny:
            state = tiny_state(row, part)
        else:
            if files[part] not in opened:
                opened = {files[part]: load_weights(files[part])}
            state = below(opened[files[part]], *PARTS.get(part, ()))
        if isinstance(module, UNet3D) and copied:
            state = with_motion_blocks(state, module, source)
        elif not row.tiny or part == "net":
            state = CONVERT[type(module)](state, module, source)
        if isinstance(module, UNet3D):
            begins = start and START in row.files and not any("local_image" in k for k in state)
            state = with_new_conditions(state, module) if row.tiny or begins else state
        if copied and part == "motion_text":  # not the same tensors in two towers
            state = {k: v.clone() for k, v in state.items()}
        load_strict(module, state, source)
    if row.two_experts:
        check_experts(parts, files)


def check_experts(parts, files):
    """Refuse Wan2.2's two experts in each other's place, as far as names tell, or one twice."""
    for part, wrong in (("net", ("low_noise", "transformer_2")), ("low_net", ("high_noise",))):
        path = files[part].resolve()
        if any(word in name for word in wrong for name in (path.name, path.parent.name)):
            raise UserError(f"{files[part]} is {path}: the two experts are swapped")
    if torch.equal(parts["net"].head.head.weight, parts["low_net"].head.head.weight):
        raise UserError(f"{files['net']} and {files['low_net']} hold the same weights; one must be "
                        "the expert for much noise, the other that for little")


def tiny_state(row, part):
    """A part of a tiny base. Files in assets/ are fp16 with keys "net.*", "vae.*", "text.*" ..."""
    part = "text" if part == "motion_text" else part
    path = ASSETS / f"{row.assets[part]}.safetensors"
    tensors = load_safetensors(path)[0] if path.exists() else {}
    state = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
    if not state:
        raise UserError(f"{path} is missing or holds no {part}: check out the repository whole, or "
                        "train it (docs/tinyworld.md)")
    if part == "text":
        table = state["token_embedding.weight"]
        if row.motion_words < 1:
            table = table.float()
            words = {word for motion in MOTIONS for word in motion.split()}
            motions = sorted(TINY_WORDS.index(word) + 1 for word in words)
            table[motions] = torch.lerp(table[motions].mean(0), table[motions], row.motion_words)
        new = 1 + len(row.words) - len(table)  # words without a vector, such as "*"
        state["token_embedding.weight"] = F.pad(table, (0, 0, 0, new))
    return state


# ---- what lies on a base: a run, and what it started from (--init)

@dataclass
class Link:
    """One thing to put on a base: a run of ours, a public LoRA, or whole public weights.

    tensors: under our names; meta: of a run. kept: what the folder of a run that starts from it
    gets, see common.keep_init(): the file, or of a LoRA, whose config may be beside it, tensors.
    """
    file: Path
    tensors: dict
    meta: dict | None = None
    kept: Path | dict | None = None

    @property
    def checksum(self) -> str:
        return str(crc32(self.tensors, ""))


def init_file(text):
    """--init RUN, RUN:STEP, FILE or FILE:SCALE -> path of the file, scale."""
    run = text.rpartition(":")[0]
    return lora_file(str(run_file(text)) if os.path.isdir(run) else text)


def read_link(name, file, scale=1.0) -> Link:
    """A file that --init names, or a run's copy of it, if it fits the network of base `name`."""
    meta = run_meta(file)
    lora = not meta and lora_format(open_weights(file)[0])
    if scale != 1 and not lora:
        raise UserError(f"{file}: only a public LoRA has a scale; leave out :{scale:g}")
    if meta:
        check_same_base(name, file, meta)
        return Link(file, *load_checkpoint(file), kept=file)
    with torch.device("meta"):
        row = base_row(name)
        net = NETWORKS[type(row.net)](row.net)  # for its names and shapes
    if lora:
        tensors = plain_lora(net, file, scale)
        return Link(file, tensors, kept=tensors)
    tensors = CONVERT[type(net)](below(load_weights(file), *PARTS["net"]), net, file)
    load_strict(net, tensors, file)
    return Link(file, tensors, kept=tensors if file.suffix == ".json" else file)  # of shards


def check_same_base(name, file, meta):
    """Refuse a run on another base."""
    if meta["base"] != name:
        raise UserError(f"{file}: a run on base {meta['base']}, not {name}; give --base "
                        f"{meta['base']}")


def read_chain(name, folder, checksums) -> list:
    """What a run started from, [Link], from its own folder; checksums: its metadata's "init"."""
    links = []
    for k, checksum in enumerate(checksums):
        file = Path(folder, INIT.format(k))
        if not file.exists():
            raise UserError(f"{file}: missing; the run started from it (--init), and nothing else "
                            "has it: copy the whole folder of the run")
        links.append(read_link(name, file))
        if links[-1].checksum != checksum:
            raise UserError(f"{file}: not what the run started from (its checksum differs): copy "
                            "the whole folder of the run again")
    return links


def read_init(args, state) -> list:
    """--init -> [Link], the first lies on the base; state: of a resumed run, which has copies."""
    if state:
        return read_chain(args.base, args.out, state["meta"].get("init", ()))
    file, scale = init_file(args.init)
    link = read_link(args.base, file, scale)
    before = link.meta.get("init", ()) if link.meta else ()
    return [*read_chain(args.base, file.parent, before), link]


def init_sampling(name, args) -> dict:
    """The sampling settings of the run that --init names; {} of other files. Reads no tensors."""
    resumed = args.resume and any(Path(args.out, state).exists() for state in STATES)
    copies = sorted(Path(args.out).glob(INIT.format("*"))) if resumed else []
    with as_init():
        file = copies[-1] if copies else init_file(args.init)[0]
        meta = run_meta(file)
        if meta:
            check_same_base(name, file, meta)
    return meta["sample"] if meta else {}


@contextmanager
def as_init():
    """Context in which errors of what other flags read, too, speak of --init."""
    try:
        yield
    except UserError as e:
        raise UserError(re.sub(r"^(--lora |--ckpt |(?!--))", "--init ", str(e))) from None


def start_base(run, dtype, scratch=False, tracks=0, motion=False, **options) -> Base:
    """load_base() for a training run, on its device, with what --init names on it."""
    args, links = run.args, []
    if args.init:
        if scratch:
            raise UserError("--init: --scratch starts from random weights; leave one of them out")
        with as_init():
            links = read_init(args, run.state)
        row, methods = base_row(args.base), [link.meta["method"] for link in links if link.meta]
        copies = (motion and not row.unet.motion_blocks) or (tracks and not row.tracks)
        if copies and run.method not in methods:
            raise UserError(f"--init {args.init}: {run.method}.py copies layers of the public "
                            f"base; it can only start from a run of its own")
    run.init = [(link.checksum, link.kept) for link in links]
    base = load_base(args.base, args.weights, run.device, dtype, scratch, tracks=tracks,
                     motion=motion, links=links, **options)
    base.init = [checksum for checksum, _ in run.init]
    return base


def put_link(base, link):
    """Put a link on a base that is on the CPU. LoRA is merged, in fp32."""
    base.net.float()
    if link.meta:
        put_run(base, link.file, link.tensors, link.meta)
    elif any(".lora_A." in k for k in link.tensors):
        merge_public_lora(base.net, link.file, opened=(link.tensors, {}))
    else:
        load_strict(base.net, link.tensors, link.file)


def put_run(base, path, tensors, meta):
    """Put the trained tensors of a run, load_checkpoint(path), into its base, on the CPU."""
    if meta.get("guidance_dim"):
        add_guidance(base, meta["guidance_dim"])
    if meta["rank"]:
        add_lora(base.net, meta["rank"], meta["alpha"], meta["lora_targets"])
    modules = {"net": base.net, "text": base.text_encoder, "image": base.image_encoder,
               "motion": base.motion_encoder}
    parts = run_parts(tensors)
    words = parts.pop("learned")
    base.learn({base.token_of(word): vectors for word, vectors in words.items()}, path)
    for part, state in parts.items():
        ours = modules[part].state_dict() if state and modules[part] else {}
        wrong = [k for k, v in state.items() if k not in ours or ours[k].shape != v.shape]
        if part == "net" and meta["rank"]:
            wrong += [k for k in ours if ".lora_" in k and k not in state]
        if wrong:
            raise UserError(f"--ckpt {path}: does not fit base {base.name}: {len(wrong)} tensors "
                            f"are not its own, missing or of another shape, first {wrong[0]}")
        if state:
            modules[part].float().load_state_dict(state, strict=False)
    merge_lora(base.net)
    base.schedule = make_schedule(**meta["schedule"]) if meta.get("schedule") else base.schedule


def run_links(path, tensors, meta) -> list:
    """The result of load_checkpoint(path) -> [Link], what the run started from and the run."""
    folder = Path(path) if Path(path).is_dir() else run_file(str(path)).parent
    return [*read_chain(meta["base"], folder, meta.get("init", ())), Link(path, tensors, meta)]


def load_run(path, tensors, meta, weights, base=None):
    """The result of load_checkpoint(path) -> the run's base in fp32 on the CPU, with what the run
    started from and its trained tensors.

    base: a base that already holds another run of the same start, to load this one into.
    """
    if base:
        put_run(base, path, tensors, meta)
        return base
    links = run_links(path, tensors, meta)
    # a run of all weights holds the whole network, whatever it started from
    scratch = bool(not meta["rank"] and len(links) == 1 and meta["args"].get("scratch"))
    return load_base(meta["base"], weights, "cpu", torch.float32, scratch, links=links)


# ---- what methods add to a base

def add_guidance(base, dim):
    """Give a base's UNet T2V-Turbo's input for a guidance scale, `dim` numbers, zero at first."""
    if base.row.unet.guidance_dim == dim:
        return  # of a run that it started from
    base.row = replace(base.row, net=replace(base.row.net, guidance_dim=dim))
    like = base.net.time_embed[0].weight
    base.net.cfg = replace(base.net.cfg, guidance_dim=dim)
    layer = nn.Linear(dim, base.net.cfg.dim, bias=False, device=like.device, dtype=like.dtype)
    base.net.time_cond_proj = zero_init(layer)


def read_words(base, path):
    """Words of a textual inversion in a run or a file -> {token id: vectors (N, width)}."""
    return read_learned(path, base.token_of)


def read_lora(name, text):
    """FILE or FILE:SCALE, a LoRA of peft's for base `name` -> what read_peft_lora() returns."""
    with torch.device("meta"):
        row = base_row(name)
        net = NETWORKS[type(row.net)](row.net)  # for its names and shapes
    return read_peft_lora(net, *lora_file(text))


# ---- the command

FORMATS = "diffusers", "comfyui", "kohya", "original", "dreamvideo"  # of --export


def public_name(name, key, diffusers=False):
    """Key of our network -> that in base `name`'s original file, or in diffusers' class for it."""
    row = base_row(name)
    if not diffusers:
        crafter = isinstance(row.net, UNetConfig) and row.net.temporal_linear
        return f"model.diffusion_model.{videocrafter_name(key)}" if crafter else key
    if isinstance(row.net, WanConfig):
        return wan_diffusers_name(key)
    if isinstance(row.net, CogVideoXConfig):
        return key
    if not any("diffusers" in other.files for other in BASES.values() if other.net == row.net):
        raise UserError(f"--export diffusers: it has no network like that of {name}; choose "
                        "comfyui, kohya or original")
    return unet_diffusers_name(key, row.net.num_res_blocks)


def lora_of_run(run):
    """A run's LoRA and those that it started from, as one -> {layer: (A, B)}, the scale in B, and
    its base's name."""
    path, found = run_file(run), {}
    tensors, meta = load_checkpoint(path)
    for link in run_links(path, tensors, meta):
        own, lora = link.meta, run_parts(link.tensors)["net"]
        if own and not own["rank"] or not all(k.endswith((".lora_A.weight", ".lora_B.weight",
                                                          ".alpha")) for k in lora):
            raise UserError(f"{link.file}: holds whole weights, no LoRA to export; --merge writes "
                            "the whole network")
        for key in (k for k in lora if ".lora_A." in k):
            layer, down = key.removesuffix(".lora_A.weight"), lora[key]
            up = lora[key.replace(".lora_A.", ".lora_B.")]
            scale = own["alpha"] / own["rank"] if own else lora[f"{layer}.alpha"] / len(down)
            found.setdefault(layer, []).append((down, scale * up))
    pairs = {layer: tuple(zip(*parts)) for layer, parts in found.items()}  # of A, of B
    return {k: (torch.cat(a), torch.cat(b, 1)) for k, (a, b) in pairs.items()}, meta["base"]


def export(form, run, folder):
    """Write a run's LoRA in one of FORMATS. -> the file"""
    if form not in FORMATS:
        raise UserError(f"--export {form}: no such format; choose from {', '.join(FORMATS)}")
    if form == "dreamvideo":
        return export_dreamvideo(run, folder, token_of)
    pairs, base = lora_of_run(run)
    peft = form == "original" or form == "diffusers" and isinstance(base_row(base).net, UNetConfig)
    named = {}
    for layer, pair in pairs.items():
        name = public_name(base, f"{layer}.weight", form == "diffusers").removesuffix(".weight")
        named[name if peft else name.removeprefix("model.diffusion_model.")] = pair
    return write_lora(named, "peft" if peft else form, folder, base)


def merge(run, folder, weights):
    """Write the whole network of a run, what it started from merged in, in fp32. -> the file

    It has the name that --weights looks for, and is a file for --init.
    """
    tensors, meta = load_checkpoint(run_file(run))
    others = [part for part, state in run_parts(tensors).items() if state and part != "net"]
    if others:
        warn(f"--merge {run}: holds more than a network, which is left out: {', '.join(others)}")
    name, net = meta["base"], load_run(run, tensors, meta, weights).net
    files = next(iter(base_row(name).files.values()), {"net": f"::{name}"})
    path = Path(folder, name_of(files["net"])).with_suffix(".safetensors")
    state = {public_name(name, k): v.contiguous() for k, v in net.state_dict().items()}
    write_atomic(path, lambda p: save_file(state, p))
    return path


def pack(name, run):
    """Put the network and the encoders of a --scratch run into assets/NAME.safetensors."""
    row = base_row(name)
    if row.files or row.motion_words < 1:
        raise UserError(f"--pack {name}: only the tiny bases have their weights in assets/")
    parts = run_parts(load_checkpoint(run)[0])
    if parts.pop("motion"):
        raise UserError(f"--pack {name}: {run} is a run of demo.py, which trains no whole base")
    if parts["net"]:  # a run holds what it trained; tables of positions are buffers
        parts["net"] = dict(NETWORKS[type(row.net)](row.net).named_buffers()) | parts["net"]
    for part, state in parts.items():
        if state:  # a run that did not start from scratch left the encoders as they were
            replace_part(ASSETS / f"{name}.safetensors", part, state)


def download(name):
    """Fetch a base's public files into its hub's cache and print where they are."""
    files = next(iter(base_row(name).files.values()), {})
    if not files:
        print(f"{name}: nothing to download, its weights are in assets/")
    for url in dict.fromkeys(files.values()):  # one file may hold several parts
        path = fetch(url, name)
        print(f"{os.path.getsize(path) / 1e9:6.2f} GB  {path}")


def get_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--download", metavar="NAME", help="fetch the public files of this base")
    p.add_argument("--export", nargs=3, metavar=("FORMAT", "RUN", "OUT"),
                   help="write the LoRA of a run into folder OUT as diffusers, comfyui, kohya or "
                        "original (peft) have it, or DreamVideo's file (dreamvideo)")
    p.add_argument("--merge", nargs=2, metavar=("RUN", "OUT"),
                   help="write the whole network of a run into folder OUT, in the public layout")
    p.options("base", only=["--weights"])
    p.add_argument("--pack", nargs=2, metavar=("NAME", "RUN"),
                   help="put network and encoders of a --scratch run into "
                        "assets/NAME.safetensors")
    return p.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    if args.export:
        print(export(*args.export))
    elif args.merge:
        print(merge(*args.merge, args.weights))
    elif args.pack:
        pack(*args.pack)
    elif args.download:
        download(args.download)
    else:
        methods = {name: " ".join(sorted(row.methods)) for name, row in BASES.items()}
        width = max(map(len, methods.values()))
        print(f"{'base':20}{'parameters':>11}  {'methods':{width}}  about")
        for name, row in BASES.items():
            print(f"{name:20}{row.millions:>9.1f} M  {methods[name]:{width}}  {row.about}")


if __name__ == "__main__":
    run_command(main)
