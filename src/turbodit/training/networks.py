"""The DiT as losses see it: a function of latents and time, with a batch's conditions inside.

Wan 2.2's two experts are one network (`Experts`) where both are trained in one run. Which of them
works, the time says, and it is the same one for all samples of a pass and in all processes, whose
exchanges would not meet otherwise. So the noise levels of a pass are on one side of the boundary
(`OneSide`).

Shapes: B samples; C latent channels; T, H, W latent frames, height, width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from turbodit.model.wan import WanModel
from turbodit.training.data import Batch
from turbodit.training.losses import Network
from turbodit.training.times import Angles, Within, time_of_angle

Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Conditions:
    """What the velocity of a batch depends on besides its latents and times.

    Attributes:
        context: (B, text_len, text_dim).
        channels: (B, in_dim - C, T, H, W), or None.
        features: (B, n, image_dim), or None.
        first: (B, C, 1, H, W), clean first latent frames, of which those are kept that
            `keep_first` (B,) bool says; or None.
    """

    context: torch.Tensor
    channels: torch.Tensor | None = None
    features: torch.Tensor | None = None
    first: torch.Tensor | None = None
    keep_first: torch.Tensor | None = None

    def mask(self, latents: torch.Tensor) -> torch.Tensor | None:
        """1 where latents (B, C, T, H, W) are generated, 0 in first frames that are kept."""
        if self.keep_first is None:
            return None
        is_first = torch.arange(latents.shape[2], device=latents.device) == 0
        kept = self.keep_first[:, None] & is_first
        return (~kept)[:, None, :, None, None].double()

    def network(self, model: Forward) -> Network:
        """`model`, called as a WanModel is, under these conditions."""

        def velocity(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            latents, times = self._keep_first(latents, t)
            if self.channels is not None:
                latents = torch.cat([latents, self.channels.to(latents.dtype)], dim=1)
            return model(latents, times, self.context, self.features)

        return velocity

    def with_text(self, context: torch.Tensor) -> Conditions:
        """The same with another text, (1, text_len, text_dim), for all samples."""
        return replace(self, context=context.expand_as(self.context))

    def _keep_first(
        self, latents: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents with their kept first frames, and times (B,) or (B, T), 0 for kept frames.

        Without changes in place, which tangents and gradients could not follow.
        """
        if self.first is None or self.keep_first is None:
            return latents, t
        kept = self.keep_first[:, None, None, None, None]
        first = torch.where(kept, self.first.to(latents.dtype), latents[:, :, :1])
        first_time = torch.where(self.keep_first, torch.zeros_like(t), t)
        later = t[:, None].expand(-1, latents.shape[2] - 1)
        return torch.cat([first, latents[:, :, 1:]], dim=2), torch.cat(
            [first_time[:, None], later], dim=1
        )


def conditions_of(
    batch: Batch, image_share: float, generator: torch.Generator, device: torch.device
) -> tuple[torch.Tensor, Conditions]:
    """A batch's latents (B, C, T, H, W), and its conditions, on `device`.

    Args:
        image_share: of samples whose first latent frame is given (TI2V models).
    """
    latents = batch.latents.to(device)
    conditions = Conditions(
        batch.context.to(device),
        None if batch.channels is None else batch.channels.to(device),
        None if batch.features is None else batch.features.to(device),
    )
    if image_share > 0:
        drawn = torch.rand(len(latents), generator=generator, device=generator.device)
        keep = (drawn < image_share).to(device)
        conditions = replace(conditions, first=latents[:, :, :1], keep_first=keep)
    return latents, conditions


def guided(conditional: Network, unconditional: Network, guidance: float) -> Network:
    """Classifier-free guidance (arXiv:2207.12598): v_u + guidance (v_c - v_u)."""
    if guidance == 1:
        return conditional

    def velocity(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        v_u = unconditional(latents, t)
        return v_u + guidance * (conditional(latents, t) - v_u)

    return velocity


class Experts(nn.Module):
    """Wan 2.2's two experts as one network with the parameters of both.

    Args:
        high_noise, low_noise: what works at rectified-flow times from `boundary` on, and below it.
    """

    def __init__(self, high_noise: WanModel, low_noise: WanModel, boundary: float) -> None:
        super().__init__()
        self.high_noise, self.low_noise, self.boundary = high_noise, low_noise, boundary

    def at(self, t: torch.Tensor) -> WanModel:
        """The expert for rectified-flow times t, of any shape.

        Raises:
            ValueError: there are times for both.
        """
        sides = set((t >= self.boundary).flatten().tolist())
        if len(sides) != 1:
            raise ValueError(
                f"one pass is one expert's: got times on both sides of {self.boundary}, "
                f"{t.flatten().tolist()}"
            )
        return self.high_noise if sides.pop() else self.low_noise

    def by_folder(self) -> dict[str, WanModel]:
        """Both, by the names of their folders in diffusers' layout."""
        return {"transformer": self.high_noise, "transformer_2": self.low_noise}


Transformer = WanModel | Experts


@dataclass(frozen=True)
class OneSide:
    """A distribution of angles, drawn so that all angles of a batch are for one of two experts.

    The side of the boundary is drawn first, with the share of the distribution that it has, then
    the angles on it. Each angle alone has the distribution, so that a mean over the batch has the
    expectation that it has for independent angles.

    Attributes:
        boundary: rectified-flow time from which on the high-noise expert works.
        common: draws the side; alike in all processes.
    """

    distribution: Angles
    boundary: float
    common: torch.Generator

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """See `training.times.Angles`."""
        t = time_of_angle(self.distribution.sample(1, self.common)).item()
        low, high = (self.boundary, 1.0) if t >= self.boundary else (0.0, self.boundary)
        return Within(self.distribution, low, high).sample(count, generator)
