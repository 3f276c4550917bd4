"""What an image adds to the DiT's input, in each of Wan's three forms.

- Wan 2.1 I2V and FLF2V: mask and latents of the known frames on extra channels, and CLIP
  features beside the text.
- Wan 2.2 I2V-A14B: the extra channels alone.
- Wan 2.2 TI2V: the first latent frame stays clean, at time 0.

Shapes: B batch; C latent channels; T, H, W latent frames, height, width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from turbodit.config import ModelConfig
from turbodit.vae import VideoVAE


@dataclass(frozen=True)
class ImageCondition:
    """Parts that a model does not use are None; all have a batch of 1. Empty for text alone.

    Attributes:
        channels: (1, 4 + C, T, H, W), mask and latents of the known frames.
        first_latent: (1, C, 1, H, W), the first latent frame to keep.
        features: (1, 257 or 514, 1280), CLIP's view of the known frames.
    """

    channels: torch.Tensor | None = None
    first_latent: torch.Tensor | None = None
    features: torch.Tensor | None = None

    def model_input(self, latents: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The DiT's input (B, C_in, T, H, W) at state `latents`, and times (B,) or (B, T)."""
        batch, _, frames = latents.shape[:3]
        times = torch.full((batch,), t, dtype=torch.float64, device=latents.device)
        if self.first_latent is not None:
            times = times[:, None].repeat(1, frames)
            times[:, 0] = 0
        latents = self.keep_first(latents)
        if self.channels is not None:
            channels = self.channels.to(latents.dtype).expand(batch, -1, -1, -1, -1)
            latents = torch.cat([latents, channels], dim=1)
        return latents, times

    def keep_first(self, latents: torch.Tensor) -> torch.Tensor:
        """`latents` with the first latent frame put back where there is one to keep.

        Samplers update every element on its own, so it is enough to do this to what the
        DiT sees and to the result: what a sampler makes of the first frame has no effect.
        """
        if self.first_latent is None:
            return latents
        first = self.first_latent.to(latents.dtype).expand(len(latents), -1, -1, -1, -1)
        return torch.cat([first, latents[:, :, 1:]], dim=2)

    def model_features(self, batch: int) -> torch.Tensor | None:
        """CLIP features (B, n, 1280), or None."""
        return None if self.features is None else self.features.expand(batch, -1, -1)


def encode_known_frames(
    vae: VideoVAE,
    model: ModelConfig,
    image: Image.Image,
    last_image: Image.Image | None,
    frames: int,
) -> ImageCondition:
    """The VAE's share of an image condition, for a clip of `frames` frames.

    Args:
        image: first frame, last_image: last frame, both of the video's size.
    """
    first = _pixels(image).to(vae.device, vae.dtype)
    if model.task == "ti2v":
        return ImageCondition(first_latent=vae.encode(first[None, :, None]).float())
    video = first.new_zeros(1, 3, frames, *first.shape[1:])
    video[0, :, 0] = first
    if last_image is not None:
        video[0, :, -1] = _pixels(last_image).to(video)
    latents = vae.encode(video).float()
    mask = _known_mask(latents, model.vae.temporal_stride, last_image is not None)
    return ImageCondition(channels=torch.cat([mask, latents], dim=1))


def _known_mask(latents: torch.Tensor, stride: int, last: bool) -> torch.Tensor:
    """(1, stride, T, H, W): 1 where a latent frame's pixel frames are known.

    A channel for each of the `stride` pixel frames of a latent frame; the first latent
    frame has only one, which counts for all channels.
    """
    mask = latents.new_zeros(1, stride, *latents.shape[2:])
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1
    return mask


def _pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return pixels.permute(2, 0, 1) / 127.5 - 1
