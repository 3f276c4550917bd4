"""Full-size models with random weights: what a model costs can be measured without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from turbodit.config import VAE_21, ModelConfig
from turbodit.model.wan import WanModel
from turbodit.offload import OffloadMode
from turbodit.pipeline import Pipeline
from turbodit.text_encoder import TextEncoder
from turbodit.vae import VideoVAE

STD = 0.02  # of all weights; small, so that activations stay finite


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


def random_pipeline(
    model: ModelConfig,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "sdpa",
    attention_settings: Mapping[str, Any] | None = None,
    offload: OffloadMode = "none",
) -> Pipeline:
    """A pipeline of `model`'s real sizes that makes noise, with no text encoder.

    The weights are drawn on `device` in `dtype`, so that a model which fits the device
    needs no host memory; with offloading they start in host memory.

    Raises:
        ValueError: a model with CLIP, or with another VAE than that of Wan 2.1.
    """
    if model.transformer.image_dim is not None or model.vae != VAE_21:
        raise ValueError(
            f"random weights are supported for models with the VAE of Wan 2.1 and without CLIP; "
            f"{model.name} has CLIP or another VAE"
        )
    from diffusers import AutoencoderKLWan

    device = torch.device(device)
    home = device if offload == "none" else torch.device("cpu")
    with torch.device("meta"):
        transformers = [
            WanModel(model.transformer, attention, attention_settings) for _ in range(model.experts)
        ]
        vae = AutoencoderKLWan()
    for transformer in transformers:
        _fill(transformer, dtype, home)
    _fill(vae, dtype, home)
    config = model.transformer
    text = RandomTextEncoder(config.text_len, config.text_dim, dtype, device)
    return Pipeline(model, transformers, VideoVAE(vae), text, device=device, offload=offload)


def _fill(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give a module on the meta device random weights; a DiT's small ones stay float32."""
    for name, parameter in module.named_parameters():
        if not (isinstance(module, WanModel) and module.keep_float32(name)):
            parameter.data = parameter.data.to(dtype)
    module.to_empty(device=device)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=STD)
