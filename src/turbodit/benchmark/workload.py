"""What is run: a model at a size, on a device, and random inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from turbodit.conditioning import ImageCondition
from turbodit.config import ModelConfig, preset
from turbodit.model.wan import EncodedContext, WanModel
from turbodit.random_models import CLIP_TOKENS
from turbodit.request import GenerationRequest, resolve
from turbodit.sampling import Velocity

T = 0.7  # rectified-flow time of a single step
Network = Callable[..., torch.Tensor]  # called as WanModel is


@dataclass(frozen=True)
class Workload:
    """One video of a model: `frames` of `width` x `height` pixels."""

    model: ModelConfig
    width: int
    height: int
    frames: int

    @classmethod
    def of(
        cls, model: str, size: tuple[int, int] | None = None, frames: int | None = None
    ) -> Workload:
        """A preset's video, by default of the preset's own size.

        Raises:
            ValueError: an unknown preset, or a size that the model cannot make.
        """
        config = preset(model)
        width, height = size or next(iter(next(iter(config.sizes.values())).values()))
        given: dict[str, Any] = {"width": width, "height": height, "frames": frames}
        request = GenerationRequest("a", **given, **known_images(config, width, height))
        return cls(config, width, height, resolve(request, config).frames)

    @property
    def tokens(self) -> int:
        return self.model.token_count(self.frames, self.height, self.width)

    @property
    def label(self) -> str:
        return f"{self.model.name} {self.width}x{self.height}x{self.frames}"

    def summary(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "model": self.model.name,
            "width": self.width,
            "height": self.height,
            "frames": self.frames,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Inputs:
    """Random inputs of a DiT: noise (1, C, T, H, W), context (1, text_len, text_dim) or encoded."""

    noise: torch.Tensor
    context: torch.Tensor | EncodedContext
    condition: ImageCondition

    @classmethod
    def of(
        cls, workload: Workload, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> Inputs:
        """The same on every device."""
        generator = torch.Generator().manual_seed(seed)
        model, config = workload.model, workload.model.transformer

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(1, *shape, generator=generator).to(device, dtype)

        latents = model.latent_shape(workload.frames, workload.height, workload.width)
        noise = normal(*latents)
        context = normal(config.text_len, config.text_dim, dtype=dtype)
        added = config.in_dim - latents[0]
        channels = normal(added, *latents[1:]) if added else None
        features = None
        if config.image_dim is not None:
            features = normal(config.image_positions or CLIP_TOKENS, config.image_dim, dtype=dtype)
        return cls(noise, context, ImageCondition(channels=channels, features=features))

    @torch.no_grad()
    def encoded(self, network: nn.Module) -> Inputs:
        """With the context encoded by our DiT, once, as a sampler's steps share it."""
        if not isinstance(network, WanModel):
            return self
        assert isinstance(self.context, torch.Tensor)
        context = network.encode_context(self.context, self.condition.features)
        return replace(self, context=context, condition=replace(self.condition, features=None))

    def step(self, network: Network) -> Callable[[], torch.Tensor]:
        """One forward pass of the network at batch 1."""
        latents, times = self.condition.model_input(self.noise, T)
        features = self.condition.model_features(1)
        return lambda: network(latents, times, self.context, features)

    def velocity(self, network: Network) -> Velocity:
        """The network as a sampler calls it."""
        features = self.condition.model_features(1)

        def velocity(latents: torch.Tensor, t: float) -> torch.Tensor:
            inputs = self.condition.model_input(latents, t)
            return network(*inputs, self.context, features).float()

        return velocity


def known_images(model: ModelConfig, width: int, height: int) -> dict[str, Any]:
    """Grey images in the place of those that the model cannot do without."""
    needed = {"i2v": ("image",), "flf2v": ("image", "last_image")}.get(model.task, ())
    return {name: Image.new("RGB", (width, height), "grey") for name in needed}


def dtype_on(device: torch.device) -> torch.dtype:
    """What models are computed in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
