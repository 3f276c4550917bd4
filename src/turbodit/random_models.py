"""Full-size models with random weights: what a model costs can be measured without its weights.

Every weight is drawn from a seed and its own name, so that two builds of a model have the same
weights whatever their attention, 8-bit format or device memory; and so does diffusers' build of
it, whose names are translated.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from torch import nn

from turbodit.checkpoints import find_model
from turbodit.config import VAE_21, VAE_22, VAE_SPRITE, ModelConfig, TransformerConfig
from turbodit.image_encoder import ImageEncoder
from turbodit.model.wan import Residual, WanModel
from turbodit.offload import OffloadMode
from turbodit.pipeline import Pipeline
from turbodit.quantization import quantize_linears
from turbodit.text_encoder import TextEncoder
from turbodit.vae import MEAN_22, STD_22, VideoVAE

CLIP_TOKENS = 257  # of ViT-H/14: a class token and 16x16 patches
VECTOR_STD = 0.02  # of biases, and of norms' weights around 1
LINEAR_BRANCH_STD = 0.05  # of SLA's proj_l
SHAPE_22 = {  # of the 2.2 VAE, from its public configuration
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}


class RandomTextEncoder(TextEncoder):
    """Random embeddings (B, max_length, dim) in place of a text encoder's."""

    def __init__(self, length: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.model = nn.Module()
        self.max_length = length
        self._like = torch.empty(length, dim, dtype=dtype, device=device)

    @property
    def dim(self) -> int:
        return self._like.shape[1]

    def encode(self, prompts: list[str]) -> torch.Tensor:
        return torch.stack([torch.randn_like(self._like) for _ in prompts])

    def truncated(self, prompt: str) -> None:
        return None


class RandomImageEncoder(ImageEncoder):
    """Random features (B, tokens, dim) in place of CLIP's."""

    def __init__(self, tokens: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.model = nn.Module()
        self._like = torch.empty(tokens, dim, dtype=dtype, device=device)

    def encode(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.stack([torch.randn_like(self._like) for _ in images])


def random_pipeline(
    model: ModelConfig,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "sdpa",
    attention_settings: Mapping[str, Any] | None = None,
    linear: str | None = None,
    residual: Residual = "float32",
    graph: bool = True,
    offload: OffloadMode = "none",
) -> Pipeline:
    """A pipeline of `model`'s real sizes that makes noise, without text and image encoders.

    The weights are drawn on `device` in `dtype`, so that a model which fits the device
    needs no host memory; with offloading they start in host memory.

    Args:
        attention, attention_settings, linear, residual: as of `random_transformer`.
        graph: as of `Pipeline`.

    Raises:
        ValueError: a VAE that is none of Wan 2.1, of Wan 2.2 or of SpriteWan.
    """
    device = torch.device(device)
    home = device if offload == "none" else torch.device("cpu")
    vae = random_vae(model, device=home, dtype=dtype)
    config = model.transformer
    transformers = [
        random_transformer(
            config,
            device=home,
            dtype=dtype,
            attention=attention,
            attention_settings=attention_settings,
            linear=linear,
            residual=residual,
            seed=seed,
        )
        for seed in range(model.experts)
    ]
    for transformer in transformers:
        transformer.pack_projections()
    text = RandomTextEncoder(config.text_len, config.text_dim, dtype, device)
    image = None
    if config.image_dim is not None:
        image = RandomImageEncoder(CLIP_TOKENS, config.image_dim, dtype, device)
    return Pipeline(
        model, transformers, vae, text, image, device=device, offload=offload, graph=graph
    )


def random_transformer(
    config: TransformerConfig,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "sdpa",
    attention_settings: Mapping[str, Any] | None = None,
    linear: str | None = None,
    residual: Residual = "float32",
    seed: int = 0,
) -> WanModel:
    """A DiT with random weights on `device`, in evaluation mode.

    With `linear` each block is quantised as soon as it is filled: the model never has its size
    in `dtype` on the device.

    Args:
        attention, attention_settings, residual: as of `WanModel`.
        linear: 8-bit format of the linear layers (`quantization.FORMATS`), or None for `dtype`.

    Raises:
        ValueError: an unknown back-end, setting or format.
    """
    with torch.device("meta"):
        model = WanModel(config, attention, attention_settings, residual=residual)

    def fill(part: nn.Module, name: str) -> None:
        fill_random(part, name, device, dtype, seed=seed, keep_float32=model.keep_float32)

    for name, part in model.named_children():
        if part is not model.blocks:
            fill(part, name)
    for index, block in enumerate(model.blocks):
        fill(block, f"blocks.{index}")
        if linear is not None:
            quantize_linears(_alone(block), linear)
    return model.eval()


def random_vae(
    model: ModelConfig, *, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> VideoVAE:
    """`model`'s VAE with random weights on `device`.

    Raises:
        ValueError: a VAE that is none of Wan 2.1, of Wan 2.2 or of SpriteWan.
    """
    from diffusers import AutoencoderKLWan

    shapes: dict[Any, Callable[[], dict[str, Any]]] = {
        VAE_21: dict,
        VAE_22: lambda: SHAPE_22 | {"latents_mean": MEAN_22, "latents_std": STD_22},
        VAE_SPRITE: lambda: AutoencoderKLWan.load_config(find_model("spritewan").vae),
    }
    if model.vae not in shapes:
        raise ValueError(
            f"random weights are supported for the VAEs of Wan 2.1, Wan 2.2 and SpriteWan; "
            f"{model.name} has {model.vae}"
        )
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(shapes[model.vae]())
    fill_random(vae, "", device, dtype)
    return VideoVAE(vae)


@torch.no_grad()
def fill_random(
    module: nn.Module,
    prefix: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    keep_float32: Callable[[str], bool] = lambda name: False,
    name_of: Callable[[str], str] = str,
) -> None:
    """Replace the parameters of a module on the meta device by random ones, one after the other.

    Args:
        prefix: of their names.
        keep_float32: names that are float32 whatever `dtype` is.
        name_of: from a parameter's name to the one that it is drawn from.
    """
    for name, parameter in list(module.named_parameters(prefix)):
        weight = _random_weight(name_of(name), parameter.shape, device, seed)
        weight = weight.to(torch.float32 if keep_float32(name) else dtype)
        owner, _, own_name = name.removeprefix(f"{prefix}.").rpartition(".")
        new = nn.Parameter(weight, requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(owner), own_name, new)


def _random_weight(
    name: str, shape: torch.Size, device: torch.device | str, seed: int
) -> torch.Tensor:
    """Float32, so scaled that activations keep their size from layer to layer."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(shape, generator=generator, device=device)
    if "proj_l." in name:
        return LINEAR_BRANCH_STD * noise
    if len(shape) > 1:
        return noise / math.sqrt(math.prod(shape[1:]))
    return VECTOR_STD * noise + (1 if name.endswith("weight") else 0)


def _alone(block: nn.Module) -> nn.Module:
    """A model of this block only, to treat it as a part of a whole one."""
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    return model
