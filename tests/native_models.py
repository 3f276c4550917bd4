"""Tiny random models in the original layout: what diffusers and transformers hold, renamed back.

The renaming is written apart from the one under test and goes the other way.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKLWan
from tests.tiny_models import (
    WITH_CLIP,
    Variant,
    randomise,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_transformer,
)
from transformers import CLIPVisionConfig, CLIPVisionModel

from turbodit.checkpoints.keys import to_native

State = dict[str, torch.Tensor]

RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3"} | {
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def tiny_native_folder(path: Path, variant: Variant = "t2v") -> Path:
    """Write a complete folder for `variant` in the original layout to `path` and return it."""
    path.mkdir(parents=True, exist_ok=True)
    kind: Literal["2.1", "2.2"] = "2.2" if variant == "ti2v" else "2.1"
    torch.save(native_vae(native_kind_vae(kind)), path / f"Wan{kind}_VAE.pth")
    text = native_text_encoder(tiny_text_encoder().state_dict())
    torch.save(text, path / "models_t5_umt5-xxl-enc-bf16.pth")
    tiny_tokenizer().save_pretrained(path / "google" / "umt5-xxl")
    if variant in WITH_CLIP:
        clip = native_image_encoder(tiny_head_80_clip().state_dict())
        torch.save(clip, path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    if variant in ("t2v-a14b", "i2v-a14b"):
        save_native_transformer(path / "high_noise_model", variant, seed=0)
        save_native_transformer(path / "low_noise_model", variant, seed=1)
    else:
        save_native_transformer(path, variant, seed=0)
    return path


def save_native_transformer(folder: Path, variant: Variant, seed: int) -> None:
    """config.json and one safetensors file as in the original repositories."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_transformer(variant, seed)
    config = model.config
    save_file(native_transformer(model), folder / "diffusion_pytorch_model.safetensors")
    stated = {
        "_class_name": "WanModel",
        "dim": config.num_attention_heads * config.attention_head_dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": variant.split("-")[0],
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_dim": config.text_dim,
        "text_len": 512,
    }
    (folder / "config.json").write_text(json.dumps(stated))


def native_transformer(model: torch.nn.Module) -> State:
    """A diffusers DiT's weights under original names."""
    return {to_native(name): tensor for name, tensor in model.state_dict().items()}


def native_kind_vae(kind: Literal["2.1", "2.2"], seed: int = 5) -> AutoencoderKLWan:
    """4-wide, but with the levels and statistics of the released VAEs."""
    torch.manual_seed(seed)
    if kind == "2.1":
        return randomise(AutoencoderKLWan(base_dim=4))
    from turbodit.vae import MEAN_22, STD_22

    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=48,
        latents_mean=MEAN_22,
        latents_std=STD_22,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    return randomise(vae)


def native_vae(vae: AutoencoderKLWan) -> State:
    """The VAE's weights under the names of Wan2.1_VAE.pth or Wan2.2_VAE.pth."""
    name_22 = vae.config.is_residual
    return {_native_vae_name(name, name_22): tensor for name, tensor in vae.state_dict().items()}


def _native_vae_name(name: str, residual: bool) -> str:
    part, _, rest = name.partition(".")
    if part in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if part == 'quant_conv' else 'conv2'}.{rest}"
    outer = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
    module, _, inner = rest.partition(".")
    if module in outer:
        return f"{part}.{outer[module]}.{inner}"
    for theirs, original in RESIDUAL.items():
        inner = re.sub(rf"(^|\.){theirs}\.", rf"\g<1>{original}.", inner)
    if module == "mid_block":
        places = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
        kind, index, inner = inner.split(".", 2)
        return f"{part}.middle.{places[f'{kind}.{index}']}.{inner}"
    stack = "downsamples" if module == "down_blocks" else "upsamples"
    if not residual and module == "down_blocks":  # one flat list
        return f"{part}.{stack}.{inner}"
    level, kind, inner = inner.split(".", 2)
    last = 2 if module == "down_blocks" else 3  # where the resampling is, after 2 or 3 blocks
    if kind == "resnets":
        place, inner = inner.split(".", 1)
    else:
        place, inner = str(last), inner.removeprefix("0.")
    if not residual:
        return f"{part}.{stack}.{4 * int(level) + int(place)}.{inner}"
    return f"{part}.{stack}.{level}.{stack}.{place}.{inner}"


def native_text_encoder(state: State) -> State:
    """umT5's weights under the names of models_t5_umt5-xxl-enc-bf16.pth, in bfloat16."""
    renames = (
        ("encoder.block", "blocks"),
        ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
        ("layer.0.SelfAttention", "attn"),
        ("layer.0.layer_norm", "norm1"),
        ("layer.1.layer_norm", "norm2"),
        ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
        ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
        ("layer.1.DenseReluDense.wo", "ffn.fc2"),
        ("encoder.final_layer_norm", "norm"),
        ("shared", "token_embedding"),
    )
    native = {}
    for name, tensor in state.items():
        if name == "encoder.embed_tokens.weight":  # the same as shared
            continue
        for theirs, original in renames:
            name = name.replace(theirs, original)
        native[name] = tensor.bfloat16()
    return native


def tiny_head_80_clip(seed: int = 6) -> CLIPVisionModel:
    """2 heads of 80, the width of ViT-H/14's heads."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    return randomise(CLIPVisionModel(config))


def native_image_encoder(state: State) -> State:
    """CLIP's weights under the names of Wan's file, with traces of its other parts."""
    state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    native = {"log_scale": torch.zeros(()), "textual.norm.weight": torch.zeros(4)}
    native["visual.head"] = torch.zeros(4, 4)
    layers = 1 + max(int(name.split(".")[2]) for name in state if "encoder.layers" in name)
    for layer in range(layers):
        for parameter in ("weight", "bias"):
            attention = f"encoder.layers.{layer}.self_attn"
            parts = [state.pop(f"{attention}.{part}_proj.{parameter}") for part in "qkv"]
            native[f"visual.transformer.{layer}.attn.to_qkv.{parameter}"] = torch.cat(parts)
    native["visual.cls_embedding"] = state.pop("embeddings.class_embedding")[None, None]
    native["visual.pos_embedding"] = state.pop("embeddings.position_embedding.weight")[None]
    renames = (
        ("encoder.layers", "transformer"),
        ("self_attn.out_proj", "attn.proj"),
        ("layer_norm", "norm"),
        ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.2"),
        ("pre_layrnorm", "pre_norm"),
        ("post_layernorm", "post_norm"),
        ("embeddings.patch_embedding", "patch_embedding"),
    )
    for name, tensor in state.items():
        for theirs, original in renames:
            name = name.replace(theirs, original)
        native[f"visual.{name}"] = tensor
    return native
