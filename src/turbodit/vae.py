"""Videos to latents and back: Wan's VAEs, on diffusers' AutoencoderKLWan.

Both kinds: 2.1 (16 channels, strides 4x8x8) and 2.2 (48 channels, 4x16x16, residual, on
2x2 pixel patches). They are causal in time: the first frame is coded alone, every further
latent frame holds four video frames, and a decoder that keeps the features of the frames
before can hand out the video piece by piece (Wan, arXiv:2503.20314, section 4.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from turbodit.weights import Weights, assign_weights, read_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

# Mean and standard deviation of the 2.2 VAE's latent channels, from the public configuration;
# those of the 2.1 VAE are AutoencoderKLWan's defaults.
# fmt: off
MEAN_22 = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
    0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
    -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
    -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
    0.3573, -0.0548, -0.1681, -0.0667,
]
STD_22 = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on

# Names in Wan2.2_VAE.pth -> names in AutoencoderKLWan, applied one after the other.
RENAMES_22 = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (
        r"\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)",
        r".down_blocks.\1.downsampler.\2",
    ),
    (r"\.downsamples\.(\d+)\.downsamples\.", r".down_blocks.\1.resnets."),
    (r"\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)", r".up_blocks.\1.upsampler.\2"),
    (r"\.upsamples\.(\d+)\.upsamples\.", r".up_blocks.\1.resnets."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


class VideoVAE:
    """Encodes pixels in [-1, 1] to normalised latents and decodes them.

    Args:
        model: the network.
        tiling: code frames larger than 256 pixels (512 when the 2.2 kind encodes) in
            overlapping, blended tiles: less memory, and seams that are faint but not zero.
        slicing: code the samples of a batch one after the other: less memory.
    """

    def __init__(
        self, model: AutoencoderKLWan, *, tiling: bool = False, slicing: bool = False
    ) -> None:
        self.model = model.eval()
        self.tiling = tiling
        self.slicing = slicing
        _always_use_onednn(model)
        if tiling:
            model.enable_tiling()
        if slicing:
            model.enable_slicing()
        config = model.config
        self.temporal_stride: int = config.scale_factor_temporal
        self.spatial_stride: int = config.scale_factor_spatial
        self.latent_channels: int = config.z_dim
        per_channel = (1, self.latent_channels, 1, 1, 1)
        self._mean = torch.tensor(config.latents_mean).view(per_channel)
        self._std = torch.tensor(config.latents_std).view(per_channel)

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        tiling: bool = False,
        slicing: bool = False,
    ) -> VideoVAE:
        """Load a diffusers `vae/` folder, or the file `Wan2.1_VAE.pth` or `Wan2.2_VAE.pth`.

        Raises:
            FileNotFoundError: no such folder or file, or no weights in it.
            ValueError: truncated file, or weights that do not fit.
        """
        from diffusers import AutoencoderKLWan

        source = Path(source)
        weights = read_weights(source)
        if source.is_dir():
            config = AutoencoderKLWan.load_config(source, local_files_only=True)
        else:
            config, weights = _from_native(weights)
        with torch.device("meta"):
            model = AutoencoderKLWan.from_config(config)
        assign_weights(model, weights, source, dtype=dtype, device=device)
        return cls(model, tiling=tiling, slicing=slicing)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, *args: Any, **kwargs: Any) -> VideoVAE:
        """Move or cast the network, as `torch.nn.Module.to` does."""
        self.model.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, t, h, w), float32: the posterior's mode, normalised by channel.

        Args:
            video: (B, 3, T, H, W) in [-1, 1], T = 4k+1, H and W multiples of the stride.

        Raises:
            ValueError: another shape.
        """
        self._check_video(video)
        mode = self.model.encode(video.to(self.device, self.dtype)).latent_dist.mode().float()
        return (mode - self._mean.to(mode.device)) / self._std.to(mode.device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Video (B, 3, T, H, W), float32 in [-1, 1], of latents (B, C, t, h, w).

        Raises:
            ValueError: another shape.
        """
        return self.model.decode(self._denormalise(latents)).sample.float()

    @torch.no_grad()
    def decode_chunks(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """`decode` in pieces: the first frame (B, 3, 1, H, W), then four frames at a time.

        Each piece is yielded as soon as it is decoded, and only one is held. With tiling,
        where every tile runs over the whole clip, all pieces come at the end.

        Raises:
            ValueError: another shape.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        if self.tiling:
            frames = self.decode(latents)
            yield from frames.split([1] + [self.temporal_stride] * (latents.shape[2] - 1), dim=2)
            return
        features = self.model.post_quant_conv(self._denormalise(latents))
        samples = features.split(1 if self.slicing else features.shape[0])
        # A slot for every causal convolution's last frames; there are fewer than modules.
        slots = sum(1 for _ in self.model.decoder.modules())
        caches: list[list[Any]] = [[None] * slots for _ in samples]
        for frame in range(features.shape[2]):
            decoded = torch.cat(
                [
                    self.model.decoder(
                        sample[:, :, frame : frame + 1],
                        feat_cache=cache,
                        feat_idx=[0],
                        first_chunk=frame == 0,
                    )
                    for sample, cache in zip(samples, caches, strict=True)
                ]
            )
            yield unpatchify(decoded, self.model.config.patch_size or 1).clamp(-1, 1).float()

    def _denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, "
                f"expected (B, {self.latent_channels}, t, h, w)"
            )
        latents = latents.to(self.device, torch.float32)
        mean, std = self._mean.to(latents.device), self._std.to(latents.device)
        return (latents * std + mean).to(self.dtype)

    def _check_video(self, video: torch.Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"video has shape {tuple(video.shape)}, expected (B, 3, T, H, W)")
        frames, height, width = video.shape[2:]
        if frames % self.temporal_stride != 1:
            raise ValueError(f"video has {frames} frames, expected {self.temporal_stride}k+1")
        if height % self.spatial_stride or width % self.spatial_stride:
            raise ValueError(
                f"video is {width}x{height} pixels, "
                f"expected multiples of {self.spatial_stride} both ways"
            )


def to_frames(video: torch.Tensor) -> np.ndarray:
    """(3, T, H, W) in [-1, 1] -> (T, H, W, 3) uint8, rounded to the nearest."""
    pixels = (video.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().numpy()


def _from_native(weights: Weights) -> tuple[dict[str, Any], Weights]:
    """AutoencoderKLWan's configuration and weights from those of an original file."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    if "encoder.conv1.weight" not in weights or "decoder.conv1.weight" not in weights:
        raise ValueError(
            "expected an original Wan VAE file (with encoder.conv1.weight), "
            f"found names such as {', '.join(list(weights)[:5])}"
        )
    base_dim = weights["encoder.conv1.weight"].shape[0]
    if "decoder.upsamples.0.upsamples.0.residual.0.gamma" not in weights:
        return {"base_dim": base_dim}, convert_wan_vae_to_diffusers(dict(weights))
    dim_mult = [1, 2, 4, 4]
    config = {
        "base_dim": base_dim,
        "decoder_base_dim": weights["decoder.conv1.weight"].shape[0] // dim_mult[-1],
        "z_dim": len(MEAN_22),
        "dim_mult": dim_mult,
        "latents_mean": MEAN_22,
        "latents_std": STD_22,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    }
    return config, {_rename_22(name): weights[name] for name in weights}


def _rename_22(name: str) -> str:
    for pattern, replacement in RENAMES_22:
        name = re.sub(pattern, replacement, name)
    return name


def _always_use_onednn(model: nn.Module) -> None:
    """Let small convolutions of one sample on a CPU run as large ones do, in place.

    PyTorch leaves those of a batch of one with at most 20,480 values in (C, T, H) to loops of its
    own, with which decoding takes twice the time (2.13; `use_mkldnn` in Convolution.cpp of ATen).
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        # Kernels of one value are products, for which its choice is right.
        if isinstance(module, nn.Conv3d) and module.kernel_size != (1, 1, 1):
            module._conv_forward = partial(_convolve, module)  # type: ignore[method-assign]


def _convolve(
    layer: nn.Conv3d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return nn.Conv3d._conv_forward(layer, x, weight, bias)
    assert isinstance(layer.padding, tuple)
    return torch.mkldnn_convolution(
        x, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups
    )
