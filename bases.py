"""The one table of base models, and load_base(name): a base's network, autoencoder, text tower and schedule.

`python bases.py` prints the table and which method runs on which base; `python bases.py --download NAME`
fetches a base's files. A base's public files may be given as the folder that holds them (--weights), in the
original or in the diffusers layout.
"""
import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from common import Parser, UserError, run_command, write_atomic
from diffusion import make_schedule, number_of_updates
from dit import (
    PATCH,
    CogVideoX,
    CogVideoXConfig,
    STDiT3,
    STDiT3Config,
    rope_frequencies,
    with_tracks,
)
from models import (
    UNet3D,
    UNetConfig,
    add_lora,
    demo_source,
    instructvideo_lora_name,
    merge_lora,
    misfit,
    turbo_lora_layers,
    unet_diffusers_name,
    videocrafter_name,
    zero_init,
)
from text_encoders import (
    CLIPConfig,
    OpenCLIPText,
    OpenCLIPVision,
    T5Config,
    T5Text,
    clip_text_only,
    load_learned,
    placeholder_id,
    save_learned,
    t5_tokenizer,
    text_from_hf,
    tokenize,
    vision_from_hf,
)
from tinyworld import (
    MOTIONS,
    NEW_MOTIONS,
    TINY_FPS,
    TINY_FRAMES,
    TINY_SIZE,
    TINY_WORDS,
    TinyText,
    tiny_tokenize,
)
from vae import (
    AutoencoderKL,
    CogVideoXVAE,
    CogVideoXVAEConfig,
    OpenSoraVAE,
    OpenSoraVAEConfig,
    Tiles,
    VAEConfig,
    opensora_vae_name,
    vae_diffusers_name,
)
from weights import (
    START,
    below,
    fetch,
    load_checkpoint,
    load_safetensors,
    load_strict,
    load_weights,
    looks_like,
    public_files,
    rename,
    replace_part,
    run_file,
    run_parts,
)

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled; the defaults are VGen's. A base's own stand in its row, flags change them.

    None in the fields from fps on: the base has no such condition or option.
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
    fps: int | None = None             # frame rate that the network is told
    start_offset: float | None = None  # strength of offset noise in the starting noise
    dynamic_cfg: str | None = None     # CogVideoX: guidance that grows over the steps
    motion_cfg: float | None = None    # T2V-Turbo-v2: scale of motion guidance
    motion_share: float | None = None  # its share of the steps that has it
    motion_factor: int | None = None          # HiGen: more is more motion
    appearance_factor: float | None = None    # HiGen: more is more change
    strength: tuple = (1.0, 1.0)       # DreamVideo: of the appearance image in the branches c and u
    subject_below: int | None = None   # DreamVideo: the subject's adapters act at steps t below this alone
    inverse_noise: float = 0.0         # DreamVideo: share of an inverted clip in the starting noise

    @property
    def size(self):
        """(frames, height, width) in pixels."""
        return self.frames, self.height, self.width

    @property
    def updates(self) -> int:
        """How many updates the sampler makes; with DDIM's spacings that need not be sample_steps."""
        return number_of_updates(self.sampler, self.sample_steps, self.spacing)

    def metadata(self) -> dict:
        """Plain values for a checkpoint or index.jsonl, without what the base does not have."""
        return {k: v for k, v in asdict(self).items() if v is not None and k not in PER_CLIP}


PER_CLIP = ("strength", "subject_below", "inverse_noise")  # of one call of sample.py, not of a run


@dataclass(frozen=True)
class Row:
    """One base. sample: its published sampling; files: {layout: {part: url}}, a url is "hub:repo:file".

    Parts: "net", "vae", "text"; "image": CLIP image tower; "motion_text": a second text tower (DEMO);
    "lora": merged into the network (T2V-Turbo); "tokenizer": T5's.
    """
    about: str
    net: UNetConfig | CogVideoXConfig | STDiT3Config
    vae: VAEConfig | CogVideoXVAEConfig | OpenSoraVAEConfig
    text: CLIPConfig | T5Config | None  # None: TinyText, which knows `words`
    schedule: dict | None               # None: rectified flow has no table
    sample: Sampling
    files: dict = field(default_factory=dict)
    methods: tuple = ()  # the training files that run on it
    words: tuple = tuple(TINY_WORDS)
    image: CLIPConfig | None = None  # the image tower, if it is not the public one that goes with `text`
    motion_words: float = 1.0  # share of what sets words for motions apart that its text encoder keeps

    @property
    def tiny(self) -> bool:
        """Is it a base of the tiny world (its weights in assets/, its words in `words`)?"""
        return self.text is None

    @property
    def unet(self) -> UNetConfig:
        """The UNet's options; all off for a transformer."""
        return self.net if isinstance(self.net, UNetConfig) else UNetConfig()

    @property
    def first_frame(self) -> bool:
        """Does it make video from an image?"""
        cog = isinstance(self.net, CogVideoXConfig) and self.net.in_channels > self.net.out_channels
        return cog or self.unet.image_to_video

    @property
    def tracks(self) -> bool:
        """Does it follow a tracking video (Diffusion as Shader)?"""
        return bool(getattr(self.net, "tracking_blocks", 0))


NETWORKS = {UNetConfig: UNet3D, CogVideoXConfig: CogVideoX, STDiT3Config: STDiT3}
AUTOENCODERS = {VAEConfig: AutoencoderKL, CogVideoXVAEConfig: CogVideoXVAE, OpenSoraVAEConfig: OpenSoraVAE}


MODELSCOPE = "hf:ali-vilab/modelscope-damo-text-to-video-synthesis"
MODELSCOPE_DIFFUSERS = "hf:ali-vilab/text-to-video-ms-1.7b"
I2VGEN_DIFFUSERS = "hf:ali-vilab/i2vgen-xl"
CLIP = "hf:laion/CLIP-ViT-H-14-laion2B-s32B-b79K:open_clip_pytorch_model.bin"
VC2 = "hf:VideoCrafter/VideoCrafter2:model.ckpt"
# what all of VGen's own networks come with
VGEN = {"vae": "hf:stabilityai/stable-diffusion-2-1-base:v2-1_512-ema-pruned.ckpt", "text": CLIP}
NEGATIVE = ("Distorted, discontinuous, Ugly, blurry, low resolution, motionless, static, disfigured, "
            "disconnected limbs, Ugly faces, incomplete arms")
SHARP = ", cinematic, High Contrast, highly detailed, no blur, 4k render"
SR600_SUFFIX = (
    ", cinematic, High Contrast, highly detailed, Unreal Engine 5, no blur, full length ultra-wide angle "
    "shot a cinematic scene, taken using a Canon EOS R camera, hyper detailed photo - realistic maximum "
    "detail, 32k, Color Grading, portrait Photography, ultra HD, extreme meticulous detailing, skin pore "
    "detailing, hyper sharpness, perfect without deformations, 4k render")
SR600_NEGATIVE = (
    "worst quality, normal quality, low quality, low res, blurry, text, watermark, logo, banner, extra "
    "digits, cropped, jpeg artifacts, signature, username, error, sketch ,duplicate, ugly, monochrome, "
    "horror, geometry, mutation, disgusting")

EPS = dict(name="linear_sd", prediction="eps")
V_ZERO_SNR = dict(name="linear_sd", prediction="v", zero_snr=True)
# VideoCrafter2 damps the signal of x_t by up to 0.7 (diffusion.x0_scale)
VC2_EPS = EPS | dict(scale=(1.0, 0.7, 400))
VC2_NET = dict(spatial_dropout=0.0, temporal_linear=True, use_fps_condition=True, default_fps=16)
SIX_MAPS = ("masked", "depth", "sketch", "motion", "local_image", "single_sketch")
# CogVideoX: the betas of linear_sd, their SNR divided, zero terminal SNR, v
COGVIDEOX = dict(name="linear_sd_shifted", prediction="v", zero_snr=True)
COGVIDEOX_5B = dict(positions="rope+learned", in_channels=32)


def cogvideox_files(repo):
    """Layout of CogVideoX's repositories (diffusers, the network and T5 in shards)."""
    return {"diffusers": {"net": f"{repo}:transformer/diffusion_pytorch_model.safetensors",
                          "vae": f"{repo}:vae/diffusion_pytorch_model.safetensors",
                          "text": f"{repo}:text_encoder/model.safetensors",
                          "tokenizer": f"{repo}:tokenizer/spiece.model"}}


DREAMVIDEO = dict(
    spatial_adapters=(("cross_attention", "parallel"),),
    temporal_adapters=tuple(
        (layer, "parallel") for layer in ("self_attention", "cross_attention", "feedforward")),
    adapter_image_dim=1024)

BASES = {
    # the tiny world: 8 frames of 32 x 32, 4x smaller latents. Few steps hide a signal of so many redundant
    # pixels, hence the shift; v-prediction and zero terminal SNR make the first step of sampling start from
    # what training ended in.
    "tiny": Row(
        "text to video in the tiny world, 8 frames of 32x32; in assets/, nothing to download",
        UNetConfig(
            dim=32, dim_mult=(1, 2), num_res_blocks=1, attn_scales=(1.0, 0.5), head_dim=32, num_heads=1,
            context_dim=64, dropout=0.0, frame_pos=TINY_FRAMES, pooled_text=True, spatial_pos=8),
        VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, patch=2, scale=0.64),
        None,
        dict(name="cosine", prediction="v", zero_snr=True, shift=0.15),
        Sampling(frames=TINY_FRAMES, height=TINY_SIZE, width=TINY_SIZE, save_fps=TINY_FPS, sample_steps=25,
                 cfg=1.5, spacing="trailing"),
        methods=("t2v", "tft2v", "videolcm", "vader", "instructvideo", "videodpo", "demo")),
    # I2VGen-XL's network and conditioning; tiny's autoencoder, and its schedule for tiny's reason. Words have
    # 32 numbers, not 64, to make room for the layers that read the image (the file stays below 4 MB).
    "tiny-i2v": Row(
        "image to video in the tiny world, built like I2VGen-XL, 8 frames of 32x32; in assets/",
        UNetConfig(
            dim=32, dim_mult=(1, 2), num_res_blocks=1, attn_scales=(1.0, 0.5), head_dim=32, num_heads=1,
            context_dim=32, dropout=0.0, frame_pos=TINY_FRAMES, pooled_text=True, spatial_pos=8,
            image_to_video=True, concat_dim=4),
        VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, patch=2, scale=0.64),
        None,
        dict(name="cosine", prediction="v", zero_snr=True, shift=0.15),
        Sampling(frames=TINY_FRAMES, height=TINY_SIZE, width=TINY_SIZE, save_fps=TINY_FPS, sample_steps=25,
                 cfg=1.5, spacing="trailing"),
        methods=("i2vgen", "vader"),
        words=(*TINY_WORDS, *NEW_MOTIONS),
        image=CLIPConfig(embed_dim=32, image_size=TINY_SIZE, vision_layers=1, vision_width=32,
                         vision_head_width=16, patch_size=8)),
    # a CogVideoX-I2V of 9 frames: latents 2x smaller in time, height and width, so that a frame still has
    # 8 x 8 tokens; positions and schedule as of 5B-I2V, but for a shift by which the noise hides an object's
    # path as in tiny (left against right, over the noise at the sampler's second step: 0.3; tiny: 0.5).
    "tiny-cogvideox": Row(
        "image to video in the tiny world, CogVideoX's classes, 9 frames of 32x32; in assets/",
        CogVideoXConfig(
            in_channels=16, out_channels=8, num_layers=6, heads=4, head_dim=32, time_dim=32, text_dim=64,
            text_length=10, positions="rope+learned", size=(5, 16, 16)),
        CogVideoXVAEConfig(widths=(16, 24), layers=1, z_channels=8, groups=8, scale=1.0),
        None,
        COGVIDEOX | dict(divisor=1.0, shift=0.7),
        Sampling(frames=9, height=TINY_SIZE, width=TINY_SIZE, save_fps=TINY_FPS, sample_steps=25, cfg=2.0,
                 spacing="trailing"),
        methods=("i2vgen", "vader", "das"),
        words=(*TINY_WORDS, *NEW_MOTIONS)),
    "modelscope": Row(
        "ModelScope text-to-video (arXiv 2308.06571), 16 frames of 256x256",
        UNetConfig(), VAEConfig(), CLIPConfig(), EPS, Sampling(),
        {"original": {"net": f"{MODELSCOPE}:text2video_pytorch_model.pth",
                      "vae": f"{MODELSCOPE}:VQGAN_autoencoder.pth",
                      "text": f"{MODELSCOPE}:open_clip_pytorch_model.bin"},
         "diffusers": {"net": f"{MODELSCOPE_DIFFUSERS}:unet/diffusion_pytorch_model.safetensors",
                       "vae": f"{MODELSCOPE_DIFFUSERS}:vae/diffusion_pytorch_model.safetensors",
                       "text": f"{MODELSCOPE_DIFFUSERS}:text_encoder/model.safetensors"}},
        methods=("t2v", "videolcm", "vader", "instructvideo", "videodpo", "demo")),
    "modelscope-v1.4": Row(
        "its version 1.4, the base of InstructVideo (--lora takes its fine-tuned file)",
        UNetConfig(), VAEConfig(), CLIPConfig(), EPS, Sampling(cfg=3.0, sample_steps=20),
        {"original": VGEN | {"net": "ms:iic/InstructVideo:model_scope_v1-4_0600000.pth"}},
        methods=("t2v", "videolcm", "vader", "instructvideo", "videodpo", "demo")),
    "modelscope-v1.5": Row(
        "its version 1.5, the base of DreamVideo",
        UNetConfig(), VAEConfig(), CLIPConfig(), EPS, Sampling(),
        {"original": VGEN | {"net": "ms:iic/dreamvideo-t2v:model_scope_v1-5_0632000.pth"}},
        methods=("t2v", "videolcm", "vader", "instructvideo", "videodpo", "demo")),
    "dreamvideo": Row(
        "v1.5 with adapters for a subject and a motion (arXiv 2312.04433), 32 frames; --lora fills them",
        UNetConfig(**DREAMVIDEO), VAEConfig(), CLIPConfig(), EPS,
        Sampling(frames=32, start_offset=0.1),
        {"original": VGEN | {"net": "ms:iic/dreamvideo-t2v:model_scope_v1-5_0632000.pth", "image": CLIP}},
        methods=("dreamvideo",)),
    "demo": Row(
        "ModelScope with a motion encoder and motion blocks (DEMO, arXiv 2410.05097)",
        UNetConfig(motion_blocks=True), VAEConfig(), CLIPConfig(), EPS, Sampling(negative=NEGATIVE),
        {"original": {"net": "hf:Ryan-PR/DEMO:demo.pth", "motion_text": "hf:Ryan-PR/DEMO:motion_encoder.pth",
                      "vae": f"{MODELSCOPE}:VQGAN_autoencoder.pth",
                      "text": f"{MODELSCOPE}:open_clip_pytorch_model.bin"}},
        methods=("instructvideo", "demo")),
    "videocrafter2": Row(
        "VideoCrafter2 (arXiv 2401.09047), 16 frames of 320x512",
        UNetConfig(**VC2_NET), VAEConfig(), CLIPConfig(), VC2_EPS,
        Sampling(height=320, width=512, fps=28, save_fps=10, cfg=12.0, eta=1.0),
        {"original": {"net": VC2, "vae": VC2, "text": VC2}},
        methods=("t2v", "videolcm", "vader", "instructvideo", "videodpo")),
    "t2v-turbo": Row(
        "VideoCrafter2 distilled to 4 steps (T2V-Turbo, arXiv 2405.18750)",
        UNetConfig(**VC2_NET, guidance_dim=256), VAEConfig(), CLIPConfig(), EPS,
        Sampling(height=320, width=512, fps=16, sampler="lcm", sample_steps=4, cfg=7.5, spacing="stride",
                 origin=50),
        {"original": {"net": VC2, "vae": VC2, "text": VC2,
                      "lora": "hf:jiachenli-ucsb/T2V-Turbo-VC2:unet_lora.pt"}},
        methods=("videodpo",)),
    "t2v-turbo-v2": Row(
        "T2V-Turbo-v2 with motion guidance (arXiv 2410.05677), 16 steps",
        UNetConfig(**VC2_NET, guidance_dim=256, motion_guidance_dim=256), VAEConfig(), CLIPConfig(), EPS,
        Sampling(height=320, width=512, fps=16, sampler="lcm", sample_steps=16, cfg=7.5, spacing="stride",
                 origin=200, motion_cfg=0.05, motion_share=0.5),
        {"original": {"net": "hf:jiachenli-ucsb/T2V-Turbo-v2:unet_mg.pt", "vae": VC2, "text": VC2}},
        methods=("videodpo",)),
    "i2vgen-xl": Row(
        "image to video (I2VGen-XL, arXiv 2311.04145), 16 frames of 704x1280",
        UNetConfig(image_to_video=True, concat_dim=4, use_fps_condition=True), VAEConfig(), CLIPConfig(),
        dict(name="cosine", prediction="v", zero_snr=True),
        Sampling(height=704, width=1280, fps=16, negative=NEGATIVE),
        {"original": VGEN | {"net": "ms:damo/I2VGen-XL:i2vgen_xl_00854500.pth", "image": CLIP},
         "diffusers": {"net": f"{I2VGEN_DIFFUSERS}:unet/diffusion_pytorch_model.safetensors",
                       "vae": f"{I2VGEN_DIFFUSERS}:vae/diffusion_pytorch_model.safetensors",
                       "text": f"{I2VGEN_DIFFUSERS}:text_encoder/model.safetensors",
                       "image": f"{I2VGEN_DIFFUSERS}:image_encoder/model.safetensors"},
         # what i2vgen.py may start from instead; OpenCLIP's file holds both towers
         START: {"net": f"{MODELSCOPE}:text2video_pytorch_model.pth",
                 "vae": f"{MODELSCOPE}:VQGAN_autoencoder.pth",
                 "text": f"{MODELSCOPE}:open_clip_pytorch_model.bin",
                 "image": f"{MODELSCOPE}:open_clip_pytorch_model.bin"}},
        methods=("i2vgen", "vader")),
    "sr600": Row(
        "video to video at 720x1280 (SR600, in VGen): any clip, sharper; needs --video",
        UNetConfig(super_resolution=True), VAEConfig(), CLIPConfig(),
        dict(name="logsnr_cosine_interp", prediction="v"),
        Sampling(frames=32, height=720, width=1280, sampler="sr600", sample_steps=30, suffix=SR600_SUFFIX,
                 negative=SR600_NEGATIVE),
        {"original": VGEN | {"net": "ms:iic/HiGen:sr_step_110000_ema.pth"}}),
    "higen": Row(
        "first an image, then the clip around it (HiGen, arXiv 2312.04483), 32 frames of 256x448",
        UNetConfig(text_resampler=2, num_tokens=16), VAEConfig(), CLIPConfig(), V_ZERO_SNR,
        Sampling(frames=32, width=448, sampler="higen", cfg=12.0, start_offset=0.1, motion_factor=500,
                 appearance_factor=1.0),
        {"original": VGEN | {"net": "ms:iic/HiGen:cvpr2024.t2v.e003.non_ema_0725000.pth"}},
        methods=("higen",)),
    "tft2v": Row(
        "TF-T2V (arXiv 2312.15770), 16 frames of 256x448",
        UNetConfig(concat_dim=8, style_image=True), VAEConfig(), CLIPConfig(), V_ZERO_SNR,
        Sampling(width=448, negative=NEGATIVE, suffix=SHARP),
        {"original": VGEN | {"net": "ms:iic/tf-t2v:tft2v_t2v_non_ema_512000.pth"}},
        methods=("t2v", "tft2v", "instructvideo", "videolcm")),
    "vcomposer": Row(
        "VideoComposer by TF-T2V (arXiv 2306.02018): depth, sketch, motion, images as conditions",
        UNetConfig(concat_dim=8, style_image=True, maps=SIX_MAPS), VAEConfig(), CLIPConfig(), V_ZERO_SNR,
        Sampling(width=448, negative=NEGATIVE, suffix=SHARP),
        {"original": VGEN | {"net": "ms:iic/tf-t2v:tft2v_vcomposer_non_ema_254000.pth", "image": CLIP}},
        methods=("vcomposer",)),
    "videolcm": Row(
        "TF-T2V distilled to 4 steps (VideoLCM, arXiv 2312.09109)",
        UNetConfig(concat_dim=8), VAEConfig(), CLIPConfig(), V_ZERO_SNR,
        Sampling(width=448, sampler="lcm", sample_steps=4, cfg=1.0, spacing="even", origin=50,
                 suffix=SHARP.replace("no blur", "Unreal Engine 5, no blur")),
        {"original": VGEN | {"net": "ms:iic/tf-t2v:videolcm_t2v_non_ema_544000.pth"}}),
    "cogvideox-2b": Row(
        "CogVideoX-2B (arXiv 2408.06072), 49 frames of 480x720",
        CogVideoXConfig(num_layers=30, heads=30, positions="sincos"), CogVideoXVAEConfig(scale=1.15258426),
        T5Config(), COGVIDEOX | dict(divisor=3.0),
        Sampling(frames=49, height=480, width=720, spacing="cogvideox", cfg=6.0),
        cogvideox_files("hf:THUDM/CogVideoX-2b"),
        methods=("vader", "instructvideo", "das", "videodpo")),
    "cogvideox-5b": Row(
        "CogVideoX-5B, 49 frames of 480x720",
        CogVideoXConfig(), CogVideoXVAEConfig(), T5Config(), COGVIDEOX | dict(divisor=1.0),
        Sampling(frames=49, height=480, width=720, sampler="dpm", cfg=6.0, dynamic_cfg="published"),
        cogvideox_files("hf:THUDM/CogVideoX-5b"),
        methods=("vader", "instructvideo", "das", "videodpo")),
    "cogvideox-5b-i2v": Row(
        "CogVideoX-5B-I2V, image to video",
        CogVideoXConfig(**COGVIDEOX_5B), CogVideoXVAEConfig(), T5Config(), COGVIDEOX | dict(divisor=1.0),
        Sampling(frames=49, height=480, width=720, sampler="dpm", cfg=6.0, dynamic_cfg="published"),
        cogvideox_files("hf:THUDM/CogVideoX-5b-I2V"),
        methods=("i2vgen", "vader", "das")),
    "das": Row(
        "Diffusion as Shader (arXiv 2501.03847): CogVideoX-5B-I2V that follows a tracking video",
        CogVideoXConfig(**COGVIDEOX_5B, tracking_blocks=18), CogVideoXVAEConfig(), T5Config(),
        COGVIDEOX | dict(divisor=1.0),
        Sampling(frames=49, height=480, width=720, sampler="dpm", cfg=6.0, dynamic_cfg="published"),
        cogvideox_files("hf:EXCAI/Diffusion-As-Shader"),
        methods=("das",)),
    "opensora": Row(
        "Open-Sora 1.2, 51 frames of 240x426, other sizes and lengths too",
        STDiT3Config(), OpenSoraVAEConfig(), T5Config(length=300, mask=True), None,
        Sampling(frames=51, height=240, width=426, fps=24, save_fps=24, sampler="rflow", sample_steps=30,
                 cfg=7.0, suffix=" aesthetic score: 6.5."),
        {"original": {"net": "hf:hpcai-tech/OpenSora-STDiT-v3:model.safetensors",
                      "vae": "hf:hpcai-tech/OpenSora-VAE-v1.2:model.safetensors",
                      "text": "hf:DeepFloyd/t5-v1_1-xxl:pytorch_model.bin",
                      "tokenizer": "hf:DeepFloyd/t5-v1_1-xxl:spiece.model"}},
        methods=("vader", "videodpo")),
}
# TF-T2V's other weights: longer clips, larger frames
BASES["tft2v-32"] = replace(
    BASES["tft2v"], about="TF-T2V, 32 frames of 256x448", sample=replace(BASES["tft2v"].sample, frames=32),
    files={"original": VGEN | {"net": "ms:iic/tf-t2v:tft2v_t2v_32frames_non_ema_560000.pth"}})
BASES["vcomposer-hd"] = replace(
    BASES["vcomposer"], about="VideoComposer by TF-T2V, 16 frames of 512x896",
    sample=replace(BASES["vcomposer"].sample, height=512, width=896),
    files={"original": VGEN | {"net": "ms:iic/tf-t2v:tft2v_vcomposer_non_ema_270000_896x512.pth",
                               "image": CLIP}})
# what DEMO says of CLIP, made on purpose and to the end: an encoder to which all motions are one word
BASES["tiny-weak"] = replace(
    BASES["tiny"], about="tiny's file, its text encoder made blind to motions as it is loaded: for demo.py",
    motion_words=0.0, methods=("t2v", "videolcm", "demo"))

# tiny as "higen" and "vcomposer" are ModelScope: what is new in them starts as in models.py, maps as nothing
BASES["tiny-higen"] = replace(
    BASES["tiny"], about="tiny with HiGen's factors, to be trained by higen.py",
    net=replace(BASES["tiny"].net, text_resampler=1, num_tokens=10), methods=("higen",),
    sample=replace(BASES["tiny"].sample, sampler="higen", motion_factor=300, appearance_factor=0.1))
BASES["tiny-vcomposer"] = replace(
    BASES["tiny"], about="tiny with maps of depth, sketch and motion, to be trained by vcomposer.py",
    net=replace(BASES["tiny"].net, concat_dim=8, maps=("depth", "sketch", "motion")),
    methods=("vcomposer",))

# tiny as "dreamvideo" is v1.5: with adapters, tiny-i2v's image tower for them, and a word to learn
BASES["tiny-dreamvideo"] = replace(
    BASES["tiny"], about="tiny with adapters for a subject and a motion (dreamvideo.py --base tiny)",
    net=replace(BASES["tiny"].net, **DREAMVIDEO | dict(adapter_image_dim=32)), words=(*TINY_WORDS, "*"),
    image=BASES["tiny-i2v"].image, methods=("dreamvideo",))


def base_row(name, tracks=0) -> Row:
    """A base's row; tracks: number of tracking blocks (Diffusion as Shader) of a run on it."""
    if name not in BASES:
        raise UserError(
            f"--base {name}: unknown; choose from {', '.join(BASES)} (python bases.py shows the table)")
    row = BASES[name]
    if not tracks:
        return row
    if not 0 < tracks <= row.net.num_layers:
        raise UserError(f"--tracking-blocks {tracks}: {name} has {row.net.num_layers} blocks to copy")
    if row.tracks and tracks != row.net.tracking_blocks:
        raise UserError(f"--tracking-blocks {tracks}: the branch of {name} has {row.net.tracking_blocks}")
    return replace(row, net=replace(row.net, tracking_blocks=tracks))


def meta_network(name) -> nn.Module:
    """A base's network without memory for its weights, to look at names and shapes."""
    with torch.device("meta"):
        return NETWORKS[type(base_row(name).net)](base_row(name).net)


@dataclass
class Base:
    """A loaded base: row (its line of the table), its networks, its noise schedule.

    image_encoder, motion_encoder: None where the base has none. learned: {token id: vectors}, words that a
    textual inversion brought.
    """
    name: str
    row: Row
    net: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    schedule: object
    tokenize: object  # list of str -> ids (b, n)
    image_encoder: nn.Module | None = None
    motion_encoder: nn.Module | None = None
    learned: dict = field(default_factory=dict)
    encoded: dict = field(default_factory=dict)  # (prompt, motion): tokens (n, d)

    def latent_shape(self, sampling):
        """(c, f, h, w) of the latents of clips of this size."""
        return latent_shape(self.name, *sampling.size)

    def parts(self) -> dict:
        """{name: module} of all networks."""
        named = {"net": self.net, "vae": self.vae, "text encoder": self.text_encoder,
                 "image encoder": self.image_encoder, "motion encoder": self.motion_encoder}
        return {name: module for name, module in named.items() if module is not None}

    def freeze(self, dtype, but=()):
        """Networks without gradients and in `dtype`; but T5 overflows in fp16 and takes bf16 for it.

        but: names of those that are left as they are.
        """
        for module in (m for name, m in self.parts().items() if name not in but):
            half = dtype == torch.float16 and isinstance(module, T5Text)
            module.requires_grad_(False)
            if dtype is not None:
                module.to(torch.bfloat16 if half else dtype)

    def encode_text(self, prompts, motion=False) -> Tensor:
        """List of str -> (b, n, d) tokens on the text tower's device; motion: by DEMO's motion encoder."""
        if all((prompt, motion) in self.encoded for prompt in prompts):
            device = next(self.net.parameters()).device
            return torch.stack([self.encoded[prompt, motion] for prompt in prompts]).to(device)
        encoder = self.motion_encoder if motion else self.text_encoder
        ids = self.tokenize(prompts).to(next(encoder.parameters()).device)
        if isinstance(self.row.text, T5Config):
            with torch.autocast(ids.device.type, enabled=False):  # in its own precision, see freeze()
                return encoder(ids)
        if self.row.tiny:
            return encoder(ids, learned=self.learned)
        # the tower was built without its last block: penultimate features
        return encoder(ids, layer="last", learned=self.learned)

    def learn(self, words, source):
        """Words of a textual inversion, {token id: vectors (N, width)}: prompts may hold them from now on."""
        if not words:
            return
        table = self.text_encoder.token_embedding.weight
        for vectors in words.values():
            if vectors.shape[-1] != table.shape[1]:
                raise UserError(f"{source}: vectors of {vectors.shape[-1]} numbers, this base's words have "
                                f"{table.shape[1]}")
        self.learned |= {token: vectors.to(table.device) for token, vectors in words.items()}

    def token_of(self, word) -> int:
        """Id of a word that is one token, such as "*", the placeholder of textual inversion."""
        return int(self.tokenize([word])[0, 0]) if self.row.tiny else placeholder_id(word)

    def end_of_text(self, prompts) -> Tensor:
        """(b,) where each prompt ends: CLIP's end token (the largest id), tiny's first empty place."""
        ids = self.tokenize(prompts)
        if self.row.tiny:
            return (ids != 0).sum(1).clamp(max=ids.shape[1] - 1)
        return ids.argmax(1)

    def encode_null(self, negative, n) -> Tensor:
        """(n, m, d) tokens of the unconditional branch; Open-Sora learned a text of its own for no words."""
        if isinstance(self.net, STDiT3) and not negative:
            return self.net.null_text(n)
        return self.encode_text([negative] * n)

    @torch.no_grad()
    def remember(self, prompts, env, motion_too=True):
        """Encode these prompts now and let the text towers go (1.4 GB in half precision for DEMO's two).

        motion_too: DEMO's motion encoder as well; it stays where it is trained.
        """
        prompts = list(dict.fromkeys(prompts))
        motion_too = motion_too and self.row.unet.motion_blocks
        for motion in (False, True)[:1 + motion_too]:
            for i in range(0, len(prompts), 16):
                part = prompts[i:i + 16]
                with env.autocast():
                    tokens = self.encode_text(part, motion)
                self.encoded |= {(prompt, motion): row.cpu() for prompt, row in zip(part, tokens)}
        self.text_encoder = None
        if motion_too:
            self.motion_encoder = None
        torch.cuda.empty_cache()


def latent_shape(name, frames, height, width):
    """(c, f, h, w) of a clip's latents; a size that does not fit is a UserError that names the nearest."""
    row = base_row(name)
    if isinstance(row.net, STDiT3Config):
        if min(frames, height, width) < 1:
            raise UserError(f"--frames {frames} --height {height} --width {width}: all must be positive")
        factor = row.vae.factor  # any size: the network pads
        return row.vae.z_channels, row.vae.latent_frames(frames), height // factor, width // factor
    if isinstance(row.net, CogVideoXConfig):
        time, unit = row.vae.time_factor, row.vae.factor
        # a table of positions: no other size, no more frames
        fixed = row.net.size if row.net.positions == "rope+learned" else None
        most = 1 + (fixed[0] - 1) * time if fixed else None
        if frames < 1 or frames % 8 != 1 or (most and frames > most):
            low = max(min(frames, most or frames) - 1, 0) // 8 * 8 + 1
            near = f"{low}" if low == most else f"{low} or {low + 8}"
            limit = f", at most {most}" if most else ""
            raise UserError(f"--frames {frames}: {name} makes 8 k + 1 frames{limit}; nearest: {near}")
        for flag, size, own in zip(("--height", "--width"), (height, width), (fixed or (0, 0, 0))[1:]):
            step = unit * PATCH
            if own and size != own * unit:
                only = f"{fixed[1] * unit}x{fixed[2] * unit}"
                raise UserError(f"{flag} {size}: {name} has learned positions for {only} pixels only")
            if size < step or size % step:
                low = max(step, size // step * step)
                raise UserError(f"{flag} {size}: {name} needs a multiple of {step}; nearest: {low} or "
                                f"{low + step} (it was trained at {getattr(row.sample, flag[2:])})")
        return row.vae.z_channels, 1 + (frames - 1) // time, height // unit, width // unit
    step = row.vae.factor * 2 ** (len(row.net.dim_mult) - 1)
    for flag, size in (("--height", height), ("--width", width)):
        if flag == "--height" and row.net.super_resolution:
            continue
        largest = row.net.spatial_pos * row.vae.factor
        if largest and size > largest:
            raise UserError(f"{flag} {size}: {name} makes at most {largest} pixels a side")
        if size < step or size % step:
            low = max(step, size // step * step)
            raise UserError(
                f"{flag} {size}: {name} needs a multiple of {step}; nearest: {low} or {low + step}")
    if row.net.super_resolution:
        unit = row.vae.factor

        def fits(size):
            return size % unit == 0 and misfit(row.net, frames, size // unit, width // unit) is None
        if not fits(height):
            near = sorted((h for h in range(unit, 2 * height + 64 * unit, unit) if fits(h)),
                          key=lambda h: abs(h - height))[:2]
            raise UserError(f"--height {height}: {name} needs a height that halves well; nearest: "
                            f"{' or '.join(map(str, sorted(near)))}")
    if frames < 1 or (row.net.frame_pos and frames > row.net.frame_pos):
        most = f" to {row.net.frame_pos}" if row.net.frame_pos else " or more"
        raise UserError(f"--frames {frames}: {name} makes clips of 1{most} frames")
    return row.vae.z_channels, frames, height // row.vae.factor, width // row.vae.factor


def choose_sampling(name, args, run=None, method=None, **fixed) -> Sampling:
    """The sampling settings of base `name`: the base's own, then a run's, then flags, then `fixed`.

    args: a parsed command line; of its options those count that have a field's name and are not None.
    run: the settings that a checkpoint holds. A size that does not fit, or a base that the method does not
    run on, is refused here, before anything is loaded.
    """
    row = base_row(name)
    if method and method not in row.methods:
        known = ", ".join(n for n, r in BASES.items() if method in r.methods)
        raise UserError(f"--base {name}: {method}.py does not run on it yet; it runs on {known}")
    names = {f.name for f in fields(Sampling)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    for flag in ("fps", "motion_factor", "appearance_factor", "motion_cfg", "dynamic_cfg"):
        if flag in given and getattr(row.sample, flag) is None:
            what = "takes no frame rate as a condition" if flag == "fps" else "has no such condition"
            raise UserError(f"--{flag.replace('_', '-')} {given[flag]}: base {name} {what}")
    known = {k: v for k, v in (run or {}).items() if k in names and v is not None}
    sampling = replace(row.sample, **known | given | fixed)
    check_sampler(sampling, row)
    latent_shape(name, *sampling.size)
    return sampling


def check_sampler(sampling, row):
    """Refuse a sampler that cannot sample this base."""
    own, unet = row.sample.sampler, isinstance(row.net, UNetConfig)
    if sampling.sampler != own and (not unet or {sampling.sampler, own} - {"ddim", "lcm", "dpmpp"}):
        raise UserError(f"--sampler {sampling.sampler}: this base is sampled by {own}")


def load_base(name, weights=None, device="cpu", dtype=torch.float32, scratch=False, start=False,
              tracks=0, motion=False, image=False) -> Base:
    """Build a base and load its public weights, all parts frozen, in eval mode and in `dtype`.

    weights: folder of the public files (original or diffusers layout); None: assets/ (tiny) or the hub's
    local copy, fetched if need be. scratch: leave network and tiny encoders at their random start, load the
    autoencoder only. start: image to video may start from ModelScope's files (start_from_text_to_video).
    tracks: number of tracking blocks to add (models.with_tracks). dtype None: of the files.
    motion: with DEMO's motion blocks and motion encoder, copies of the base's own layers where it has none.
    image: with the image tower that stands in the text tower's file.
    """
    row = base_row(name, tracks)
    files = public_files(name, row, weights, start)  # errors come here, before anything big is built
    tiny = row.tiny
    copies = motion and not row.unet.motion_blocks
    if copies:
        row = replace(row, net=replace(row.net, motion_blocks=True))
    if not tiny:
        files = files | ({"motion_text": files["text"]} if copies else {}) | (
            {"image": files["text"]} if image else {})
    with torch.device("meta" if not scratch else "cpu"):
        parts = {"net": NETWORKS[type(row.net)](row.net), "vae": AUTOENCODERS[type(row.vae)](row.vae)}
        if isinstance(row.text, T5Config):
            parts["text"] = T5Text(row.text)
        elif tiny:
            width = row.net.text_dim if isinstance(row.net, CogVideoXConfig) else row.net.context_dim
            parts["text"] = TinyText(row.words, width)
            if copies:
                parts["motion_text"] = TinyText(row.words, width)
        else:
            # the video networks read the features before the last block: it is neither built nor loaded
            tower = replace(row.text, embed_dim=0, text_layers=row.text.text_layers - 1)
            parts["text"] = OpenCLIPText(tower)
            if "motion_text" in files:
                parts["motion_text"] = OpenCLIPText(tower)
        if "image" in files or row.image:
            parts["image"] = OpenCLIPVision(row.image or row.text)
    opened = {}  # one file may hold several parts
    for part, module in parts.items():
        if scratch and (part == "net" or (part in ("text", "image") and tiny)):
            continue
        where = f"{name} {part}"
        if row.files:
            file = files[part]
            where += f", {file}"
            opened = opened if file in opened else {file: load_weights(file)}
            convert = with_motion_blocks if copies and part == "net" else CONVERT[part]
            state = convert(opened[file], module, where)
            if start and part == "net" and START in row.files and not any("local_image" in k for k in state):
                state = start_from_text_to_video(state, module)
        else:
            state = tiny_state(name, "text" if part == "motion_text" else part)
            state = with_tracks(state, module) if tracks and part == "net" else state
            if part == "net":
                state = identity_adapters(module) | state
                state = fresh_conditions(state, row.net) if name in TINY_NEW else state
            if copies and part == "net":
                state = with_motion_blocks(state, module, where)
        if copies and part == "motion_text":  # parameters may be the file's own tensors, here of two towers
            state = {k: v.clone() for k, v in state.items()}
        load_strict(module, state, where)
    opened.clear()
    if "lora" in files:
        merge_turbo_lora(parts["net"], files["lora"])
    if row.tracks:
        parts["vae"].tiles = Tiles()  # as the network was trained
    words = tokenize
    if tiny:
        words = partial(tiny_tokenize, parts["text"].words, parts["text"].context_length)
    elif "tokenizer" in files:
        words = t5_tokenizer(files["tokenizer"], row.text.length)
    schedule = None if row.schedule is None else make_schedule(**row.schedule)
    base = Base(name, row, parts["net"], parts["vae"], parts["text"], schedule, words, parts.get("image"),
                parts.get("motion_text"))
    base.freeze(dtype)  # before it moves: float32 on the GPU would be the run's peak
    for module in base.parts().values():
        module.to(device).eval()
    return base


# ---- public files

def tiny_state(name, part):
    """A part of a tiny base's file in assets/ (fp16, keys "net.*", "vae.*", "text.*", "image.*").

    A base whose file has no autoencoder has tiny's; tiny-dreamvideo and tiny-weak have none of their own.
    """
    if name == "tiny-dreamvideo":
        state = tiny_state("tiny-i2v" if part == "image" else "tiny", part)
        if part == "text":  # "*" is the last word: no vector of its own
            state["token_embedding.weight"] = F.pad(state["token_embedding.weight"], (0, 0, 0, 1))
        return state
    if name in TINY_NEW:
        return tiny_state("tiny", part)
    if BASES[name].motion_words < 1:
        state = tiny_state("tiny", part)
        return blind_to_motions(state, BASES[name].motion_words) if part == "text" else state
    path = ASSETS / f"{name}.safetensors"
    tensors = load_weights(path) if path.exists() else {}
    state = {k.removeprefix(part + "."): v for k, v in tensors.items() if k.startswith(part + ".")}
    if not state and part == "vae" and name != "tiny":
        return tiny_state("tiny", part)
    if not state:
        raise UserError(
            f"{path} is missing: check out the repository whole, or train it (README, 'The tiny world')")
    return state


def blind_to_motions(state, share):
    """TinyText's tensors -> the same, words for motions moved to their mean but for `share` of the way."""
    motions = sorted({TINY_WORDS.index(word) + 1 for motion in MOTIONS for word in motion.split()})
    table = state["token_embedding.weight"].float()
    table[motions] = torch.lerp(table[motions].mean(0), table[motions], share)
    return state | {"token_embedding.weight": table}


def unet_state(state, net, source):
    """Public network weights -> ours: the UNet's by VGen, VideoCrafter (bare or whole) or diffusers."""
    if isinstance(net, STDiT3):
        return {"rope.freqs": rope_frequencies(net.cfg.dim // net.cfg.num_heads)} | state  # not in every file
    if isinstance(net, CogVideoX):  # Diffusion as Shader may start from CogVideoX-5B-I2V
        started = not net.cfg.tracking_blocks or any(k.startswith("combine_linears.") for k in state)
        return state if started else with_tracks(state, net)
    state = below(state, "model.diffusion_model.")
    if any(k.startswith("init_attn.") for k in state):
        turbo = net.cfg.guidance_dim and not net.cfg.motion_guidance_dim
        if turbo and "time_cond_proj.weight" not in state:
            # T2V-Turbo: the file is VideoCrafter2's and only the LoRA of this layer was published (its base
            # weight was a random draw); zero is the choice that repeats
            state = state | {"time_cond_proj.weight": torch.zeros(net.time_cond_proj.weight.shape)}
        return rename(state, net, videocrafter_name, source)
    if any(k.startswith("down_blocks.") for k in state):
        attention = "image_latents_temporal_encoder.attn1.to_"
        if f"{attention}q.weight" in state:  # one matrix in the original
            state = dict(state)
            parts = [state.pop(f"{attention}{k}.weight") for k in "qkv"]
            state[f"{attention}qkv.weight"] = torch.cat(parts)
        return rename(state, net, lambda k: unet_diffusers_name(k, net.cfg.num_res_blocks), source)
    untrained = identity_adapters(net)
    if untrained and state.keys() | untrained.keys() == net.state_dict().keys():
        return untrained | state  # the base's file has none
    return state


def with_motion_blocks(state, net, source):
    """A base's public weights -> those of `net`, the same with DEMO's motion blocks: copies, as published."""
    with torch.device("meta"):
        plain = UNet3D(replace(net.cfg, motion_blocks=False))
    load_strict(plain, unet_state(state, plain, source), source)
    state = plain.state_dict()
    return {k: state[demo_source(k, net)].clone() for k in net.state_dict()}


def start_from_text_to_video(state, net):
    """ModelScope's weights -> what I2VGen-XL's training starts from: its own layers are new, as published
    (drawn; the frame rate's last layer zero); the first convolution does not see the image's channels yet."""
    new = ("fps_embedding.", "local_image_concat.", "local_temporal_encoder.", "local_image_embedding.",
           "context_embedding.")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the same on every process
        torch.manual_seed(0)
        small = UNet3D(replace(net.cfg, dim_mult=(1,), num_res_blocks=0, attn_scales=()))
    fresh = {k: v for k, v in small.state_dict().items() if k.startswith(new)}
    first = "input_blocks.0.0.weight"
    if first in state and state[first].shape[1] == net.cfg.in_dim:
        fresh[first] = F.pad(state[first], (0, 0, 0, 0, 0, net.cfg.concat_dim))
    return state | fresh


def add_guidance(base, dim):
    """Give a loaded UNet T2V-Turbo's input for a guidance scale, `dim` numbers; its layer starts at zero."""
    base.row = replace(base.row, net=replace(base.row.net, guidance_dim=dim))
    like = base.net.time_embed[0].weight
    base.net.cfg = replace(base.net.cfg, guidance_dim=dim)
    layer = nn.Linear(dim, base.net.cfg.dim, bias=False, device=like.device, dtype=like.dtype)
    base.net.time_cond_proj = zero_init(layer)


TINY_NEW = "tiny-higen", "tiny-vcomposer"  # tiny's weights, and layers that nobody has trained yet


def fresh_conditions(state, cfg):
    """tiny's weights -> those of TINY_NEW's networks; the first convolution does not see its maps yet."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the same on every process
        torch.manual_seed(0)
        fresh = UNet3D(cfg).state_dict()
    first = "input_blocks.0.0.weight"
    return fresh | state | {first: F.pad(state[first], (0, 0, 0, 0, 0, cfg.concat_dim))}


def identity_adapters(net):
    """DreamVideo's adapters, untrained: all zeros, A(x) = x. dreamvideo.py draws its new ones."""
    return {k: torch.zeros(v.shape) for k, v in net.state_dict().items() if "_adapter." in k}


def vae_state(state, vae, source):
    """Public autoencoder weights -> ours: SD's bare, in a whole SD file or in diffusers naming."""
    if isinstance(vae, OpenSoraVAE):
        return rename(state, vae, opensora_vae_name, source)
    if isinstance(vae, CogVideoXVAE):
        return state
    state = below(state, "first_stage_model.")
    if any(k.startswith("encoder.down_blocks.") for k in state):
        # names of old diffusers files
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            state = {k.replace(f"attentions.0.{old}.", f"attentions.0.{new}."): v for k, v in state.items()}
        return rename(state, vae, lambda k: vae_diffusers_name(k, len(vae.cfg.ch_mult)), source)
    return {k: v for k, v in state.items() if not k.startswith(("loss.", "model_ema."))}


def text_state(state, tower, source):
    """Public text weights -> ours: T5's, or OpenCLIP's (both towers) in its own or transformers' naming."""
    if isinstance(tower, T5Text):
        return {k: v for k, v in state.items() if k in tower.state_dict()}
    state = below(state, "cond_stage_model.model.")
    if any("encoder.layers." in k for k in state):
        state = text_from_hf(state)
    elif not any("resblocks" in k for k in state):
        raise UserError(f"{source}: not an OpenCLIP text tower: {looks_like(state)}")
    ours = tower.state_dict()
    return {k: v for k, v in clip_text_only(state).items() if k in ours}


def image_state(state, tower, source):
    """Public image tower, in an open_clip file or in transformers naming -> OpenCLIPVision's."""
    if any("encoder.layers." in k for k in state):
        return vision_from_hf(state)
    if not any(k.startswith("visual.") for k in state):
        raise UserError(f"{source}: has no OpenCLIP image tower: {looks_like(state)}")
    return below(state, "visual.")


CONVERT = {"net": unet_state, "vae": vae_state, "text": text_state, "motion_text": text_state,
           "image": image_state}


# ---- public LoRA and adapter files, merged into the network

def merge_turbo_lora(net, path, scale=1.0):
    """T2V-Turbo's list without names, [B_0, A_0, B_1, A_1, ...], into the weights."""
    tensors, layers = load_weights(path, lists=True), turbo_lora_layers(net)
    if not isinstance(tensors, list) or len(tensors) != 2 * len(layers):
        length = f"a list of {len(tensors)}" if isinstance(tensors, list) else looks_like(tensors)
        raise UserError(f"{path}: {length}, but T2V-Turbo's LoRA of this network is a list of "
                        f"{2 * len(layers)} tensors")
    modules = dict(net.named_modules())
    for name, up, down in zip(layers, tensors[::2], tensors[1::2]):
        weight = modules[name].weight
        if (up.shape[0], *down.shape[1:]) != weight.shape or up.shape[1] != down.shape[0]:
            raise UserError(f"{path}: the entry for {name} has another shape than the network's")
        delta = (up.float().flatten(1) @ down.float().flatten(1)).view_as(weight)
        weight.data += scale * delta.to(weight.dtype)


def merge_public_lora(net, path, scale=1.0):
    """A LoRA file into the weights: T2V-Turbo's list, VADER's (peft), InstructVideo's (with its base).

    Or a file of DreamVideo's adapters, which fills those of the network.
    """
    state = load_weights(path, lists=True)
    if isinstance(state, list):
        return merge_turbo_lora(net, path, scale)
    if any("_adapter." in k for k in state):
        return fill_adapters(net, state, path, scale)
    if any(k.endswith(".lora_A.weight") for k in state):
        state, rank, alpha, layers = read_peft_lora(net, path)
        add_lora(net, rank, alpha * scale, layers)
        net.load_state_dict(state, strict=False)
        return merge_lora(net)
    if not any("_lora.down_linear" in k for k in state):
        raise UserError(f"--lora {path}: no LoRA file that is known here: {looks_like(state)}")
    rank = next(v.shape[0] for k, v in state.items() if "down_linear" in k)
    base = {k: v for k, v in state.items() if "_lora." not in k}
    if base:
        load_strict(net, base, f"--lora {path}")
    add_lora(net, rank, rank * scale, ["to_q", "to_k", "to_v", "to_out.0"])
    fill_branches(net, state, path)
    merge_lora(net)


def fill_branches(net, state, path):
    """The tensors of InstructVideo's file into the LoRA branches that the network has, all of them."""
    ours = {instructvideo_lora_name(k): (k, v.shape) for k, v in net.state_dict().items() if ".lora_" in k}
    wrong = [k for k in ours.keys() | {k for k in state if "_lora." in k} if k not in ours or k not in state]
    if wrong:
        raise UserError(f"--lora {path}: {min(wrong)} is in one of file and network only: its layers are "
                        "--lora-targets to_q to_k to_v to_out.0 of another base")
    other = [k for k, (_, shape) in ours.items() if state[k].shape != shape]
    if other:
        rank = next(v.shape[0] for k, v in state.items() if "down_linear" in k)
        raise UserError(f"--lora {path}: has rank {rank} and {other[0]} of shape "
                        f"{tuple(state[other[0]].shape)}: give --rank {rank}, or the base it was made on")
    net.load_state_dict({name: state[k].float() for k, (name, _) in ours.items()}, strict=False)


def start_from_lora(net, path, scale=1.0):
    """InstructVideo's public file as the start of training: its LoRA times `scale`, for a network that has
    branches of the same rank. The base weights in the file must be the network's own: a run saves LoRA alone.
    """
    state = load_weights(path, lists=True)
    if isinstance(state, list) or not any("_lora.down_linear" in k for k in state):
        what = "T2V-Turbo's list" if isinstance(state, list) else looks_like(state)
        raise UserError(f"--lora {path}: no LoRA of InstructVideo to start from: {what}")
    fill_branches(net, state, path)
    ours = net.state_dict()
    for k, v in state.items():
        if "_lora." not in k and not (k in ours and v.shape == ours[k].shape and torch.allclose(
                ours[k].float(), v.to(ours[k]).float(), rtol=1e-2, atol=1e-4)):
            raise UserError(f"--lora {path}: the base weights in it are others (first: {k}): give the --base "
                            "it was made on (InstructVideo's: modelscope-v1.4)")
    for layer in (m for m in net.modules() if hasattr(m, "lora_B")):
        layer.lora_B.weight.data *= scale / layer.lora_scale


def fill_adapters(net, state, path, scale):
    """One of DreamVideo's files, {key: tensor} of the subject's or the motion's adapters -> the network."""
    if scale != 1:
        raise UserError(f"--lora {path}:{scale:g}: DreamVideo's adapters have no scale; leave it out")
    ours = {k: v.shape for k, v in net.state_dict().items()}
    wrong = [k for k, v in state.items() if ours.get(k) != v.shape]
    if wrong:
        raise UserError(f"--lora {path}: {len(wrong)} tensors do not fit this network, first {wrong[0]}: "
                        "DreamVideo's adapters go with --base dreamvideo")
    net.load_state_dict(state, strict=False)


def read_peft_lora(net, path, scale=1.0):
    """A LoRA file in peft's naming (VADER's) -> {key of net: tensor}, its rank, alpha, targets (add_lora's).

    The layers bear the names of the base's public file, which may stand behind peft's and the pipeline's
    prefixes. alpha: of the adapter_config.json beside it, else 8, peft's default (VADER's files tell none).
    """
    state = below(below(load_weights(path), "base_model.model."), "model.diffusion_model.")
    public = {videocrafter_name(f"{name}."): name for name, _ in net.named_modules()}
    public |= {f"{name}.": name for name, _ in net.named_modules()}
    found, ranks = {}, {}
    for key, value in state.items():
        layer, _, kind = key.rpartition("lora_")
        if kind not in ("A.weight", "B.weight") or layer not in public:
            raise UserError(f"--lora {path}: {key} is of no layer of this network: {looks_like(state)}")
        found[f"{public[layer]}.lora_{kind}"] = value.float()
        if kind == "A.weight":
            ranks[public[layer]] = value.shape[0]
    modules, rank = dict(net.named_modules()), max(ranks.values(), default=0)
    for name, r in ranks.items():
        if f"{name}.lora_B.weight" not in found or r != min(rank, *modules[name].weight.shape[:2]):
            raise UserError(f"--lora {path}: {name}: not a pair lora_A, lora_B of rank {rank}")
    config, alpha = Path(path).parent / "adapter_config.json", 8.0
    text = load_safetensors(path)[1] if Path(path).suffix == ".safetensors" else {}
    if "nanovideo" in text:  # of one of our runs
        alpha = json.loads(text["nanovideo"])["alpha"]
    elif config.is_file():
        alpha = float(json.loads(config.read_text())["lora_alpha"])
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in ranks))  # to_q ... if it means the same
    same = {name for name in modules if name.rpartition(".")[2] in short} == ranks.keys()
    found = {k: v * scale if "lora_B" in k else v for k, v in found.items()}
    return found, rank, alpha, short if same else list(ranks)


def read_lora(name, text):
    """FILE or FILE:SCALE, a LoRA in peft's naming for base `name` -> what read_peft_lora() gives."""
    return read_peft_lora(meta_network(name), *lora_file(text))


def lora_file(text):
    """FILE or FILE:scale -> (path, scale), the file checked."""
    path, _, scale = text.rpartition(":")
    try:
        path, scale = (path, float(scale)) if path else (text, 1.0)
    except ValueError:  # the colon is part of the name
        path, scale = text, 1.0
    if not Path(path).is_file():
        raise UserError(f"--lora {path}: no such file")
    return Path(path), scale


def export_peft(run, folder):
    """Write the LoRA of one of our runs as peft does: adapter_model.safetensors and adapter_config.json.

    Layers bear the names of the base's public network; VideoCrafter2's as in VADER's own files.
    """
    tensors, meta = load_checkpoint(run)
    if not meta["rank"]:
        raise UserError(f"--ckpt {run}: holds whole weights, no LoRA: nothing that peft could load")
    net = base_row(meta["base"]).net
    crafter = isinstance(net, UNetConfig) and net.temporal_linear
    head = "base_model.model.model.diffusion_model." if crafter else "base_model.model."
    named = {head + (videocrafter_name(k) if crafter else k): v for k, v in tensors.items()}
    ranks = {k.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): v.shape[0]
             for k, v in named.items() if k.endswith(".lora_A.weight")}
    # a narrow layer has a smaller rank than asked, but is scaled alike
    cut = {k: r for k, r in ranks.items() if r != meta["rank"]}
    config = dict(
        peft_type="LORA", base_model_name_or_path=meta["base"], r=meta["rank"], lora_alpha=meta["alpha"],
        rank_pattern=cut, alpha_pattern={k: meta["alpha"] * r / meta["rank"] for k, r in cut.items()},
        target_modules=list(ranks), bias="none", lora_dropout=0.0, inference_mode=True)
    write_atomic(Path(folder, "adapter_model.safetensors"), lambda p: save_file(named, p))
    write_atomic(Path(folder, "adapter_config.json"), lambda p: p.write_text(json.dumps(config, indent=1)))


def read_words(base, path):
    """Words of a textual inversion, in DreamVideo's file or a run of dreamvideo.py: {token id: vectors}."""
    if not Path(path).is_dir():
        return load_learned(path)
    words = run_parts(load_checkpoint(path)[0])["learned"]
    if not words:
        raise UserError(f"--learned {path}: a run without a word; give one of dreamvideo.py --stage token")
    return {base.token_of(word): vectors for word, vectors in words.items()}


def export_adapters(run, folder):
    """Write a run of dreamvideo.py, RUN or RUN:STEP, into a folder in DreamVideo's own layout. -> the file"""
    tensors, meta = load_checkpoint(run_file(run))
    if meta["method"] != "dreamvideo":
        raise UserError(f"--ckpt {run}: a run of {meta['method']}; only dreamvideo.py's have adapters")
    parts, row, step = run_parts(tensors), base_row(meta["base"]), meta["step"]
    if meta["stage"] == "token":
        (word, vectors), = parts["learned"].items()
        path = Path(folder, f"text_embedding_of_{word}_{step:07d}.pth")
        save_learned(path, vectors, word, None if row.text else len(row.words))
    else:
        path = Path(folder, f"adapter_{step:08d}.pth")
        state = {"state_dict": {k: nn.Parameter(v) for k, v in parts["net"].items()}, "step": step}
        write_atomic(path, lambda p: torch.save(state, p))
    return path


# ---- the table

def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--download", metavar="NAME", help="fetch the public files of this base")
    p.add_argument("--pack", metavar="NAME",
                   help="put network and encoders of a --scratch run into assets/NAME.safetensors")
    p.add_argument("--export-peft", metavar="FOLDER", help="write the LoRA of the run --ckpt for peft")
    p.add_argument("--export-adapters", metavar="FOLDER",
                   help="write the word or the adapters of the run --ckpt as DreamVideo's own file")
    p.add_argument("--ckpt", help="with --pack or one of --export: folder of that run")
    args = p.parse_args(argv)
    if bool(args.pack or args.export_peft or args.export_adapters) != bool(args.ckpt):
        raise UserError("--pack NAME or --export-peft FOLDER, and --ckpt RUN belong together (or "
                        "--export-adapters FOLDER)")
    if args.export_adapters:
        print(export_adapters(args.ckpt, args.export_adapters))
        return
    if args.export_peft:
        return export_peft(args.ckpt, args.export_peft)
    if args.pack:
        if base_row(args.pack).files or base_row(args.pack).motion_words < 1:
            raise UserError(f"--pack {args.pack}: only the tiny bases have their weights in assets/")
        tensors, _ = load_checkpoint(args.ckpt)
        parts = run_parts(tensors)
        if parts.pop("motion"):
            raise UserError(f"--pack {args.pack}: {args.ckpt} is a run of demo.py, which trains no whole "
                            "base")
        if parts["net"]:  # a run holds what it trained: tables of positions are no part of that
            row = base_row(args.pack)
            parts["net"] = dict(NETWORKS[type(row.net)](row.net).named_buffers()) | parts["net"]
        for part, state in parts.items():
            if state:  # a run that did not start from scratch left the encoders as they were
                replace_part(ASSETS / f"{args.pack}.safetensors", part, state)
        return
    if args.download:
        row = base_row(args.download)
        urls = dict.fromkeys(next(iter(row.files.values()), {}).values())  # one file may hold several parts
        if not urls:
            print(f"{args.download}: nothing to download, its weights are in assets/")
        for url in urls:
            path = fetch(url, args.download)
            print(f"{os.path.getsize(path) / 1e9:6.2f} GB  {path}")
        return
    methods = sorted({m for row in BASES.values() for m in row.methods})
    print(f"{'base':17}{'parameters':>12}  {'methods':24}about")
    for name, row in BASES.items():
        with torch.device("meta"):
            n = sum(q.numel() for q in NETWORKS[type(row.net)](row.net).parameters())
        runs = " ".join(m for m in methods if m in row.methods)
        print(f"{name:17}{n / 1e6:>10.1f} M  {runs:24}{row.about}")


if __name__ == "__main__":
    run_command(main)
