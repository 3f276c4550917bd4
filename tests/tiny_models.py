"""Tiny random models in diffusers folder layout, a few hundred kilobytes each.

Widths are as small as the architectures allow, but every structural fact is kept: number
of latent channels, strides, conditions, experts. Weights are random and seeded.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

Variant = Literal["t2v", "i2v", "flf2v", "t2v-a14b", "i2v-a14b", "ti2v"]

TEXT_DIM = 32
IMAGE_DIM = 16
IMAGE_TOKENS = 5  # a class token and 2x2 patches
TEXT_ONLY = ("t2v", "t2v-a14b")
WITH_CLIP = ("i2v", "flf2v")
BOUNDARY = {"t2v-a14b": 0.875, "i2v-a14b": 0.9}
WORDS = ("a", "the", "red", "blue", "cat", "fox", "car", "moves", "jumps", "left", "right", "snow")


def tiny_diffusers_folder(path: Path, variant: Variant = "t2v") -> Path:
    """Write a complete folder for `variant` to `path` (created) and return it."""
    path.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save_pretrained(path / "tokenizer")
    tiny_text_encoder().save_pretrained(path / "text_encoder")
    tiny_vae("2.2" if variant == "ti2v" else "2.1").save_pretrained(path / "vae")
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    scheduler.save_pretrained(path / "scheduler")
    tiny_transformer(variant).save_pretrained(path / "transformer")
    index: dict[str, object] = {
        "_class_name": "WanPipeline" if variant in TEXT_ONLY else "WanImageToVideoPipeline",
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
    }
    if variant in BOUNDARY:
        tiny_transformer(variant, seed=1).save_pretrained(path / "transformer_2")
        index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
        index["boundary_ratio"] = BOUNDARY[variant]
    if variant in WITH_CLIP:
        tiny_image_encoder().save_pretrained(path / "image_encoder")
        tiny_image_processor().save_pretrained(path / "image_processor")
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    if variant == "ti2v":
        index["expand_timesteps"] = True
    (path / "model_index.json").write_text(json.dumps(index, indent=2))
    return path


def tiny_transformer(variant: Variant = "t2v", seed: int = 0) -> WanTransformer3DModel:
    """2 layers, 2 heads of 12. With CLIP, diffusers expects exactly 512 text tokens."""
    channels = 48 if variant == "ti2v" else 16
    condition = 20 if variant in ("i2v", "flf2v", "i2v-a14b") else 0
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels + condition,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=40,
        num_layers=2,
        image_dim=IMAGE_DIM if variant in WITH_CLIP else None,
        added_kv_proj_dim=24 if variant in WITH_CLIP else None,
        pos_embed_seq_len=2 * IMAGE_TOKENS if variant == "flf2v" else None,
    )
    return randomise(model)


def tiny_vae(kind: Literal["2.1", "2.2"] = "2.1", seed: int = 2) -> AutoencoderKLWan:
    """4-wide VAEs: 16 channels at 4x8x8 (2.1) or 48 channels at 4x16x16 (2.2)."""
    torch.manual_seed(seed)
    channels = 16 if kind == "2.1" else 48
    shared = {
        "base_dim": 4,
        "z_dim": channels,
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": torch.linspace(-0.5, 0.5, channels).tolist(),
        "latents_std": torch.linspace(0.5, 2.0, channels).tolist(),
    }
    if kind == "2.1":
        vae = AutoencoderKLWan(dim_mult=[1, 1, 1, 1], **shared)
    else:
        vae = AutoencoderKLWan(
            dim_mult=[1, 2, 2, 2],
            decoder_base_dim=4,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            **shared,
        )
    return randomise(vae)


def tiny_text_encoder(seed: int = 3) -> UMT5EncoderModel:
    """2 layers, width 32."""
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=256, d_model=TEXT_DIM, d_kv=8, d_ff=40, num_layers=2, num_heads=4
    )
    return UMT5EncoderModel(config).eval()


def tiny_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer of some words and all printable ASCII characters."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [("▁" + word, -3.0) for word in WORDS]
    characters = [(chr(code), -6.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=specials + words + characters, extra_ids=0)


def tiny_image_encoder(seed: int = 4) -> CLIPVisionModel:
    """3 layers, width 16, images of 28 pixels in patches of 14."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config).eval()


def tiny_image_processor() -> CLIPImageProcessorPil:
    """CLIP's preprocessing at 28 pixels."""
    return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Move every parameter off special initial values such as zeros and ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 100
            parameter.add_(torch.randn_like(parameter) * 0.5 / math.sqrt(fan_in))
    return model.eval()
