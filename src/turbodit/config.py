"""What every model is: shapes, sizes and the original sampler's defaults.

Plain frozen dataclasses and one preset per model. No torch here: the command line
reads this file before anything heavy is imported. Numbers come from the Wan 2.1 and
2.2 releases (Wan, arXiv:2503.20314, and the public configuration files).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Task = Literal["t2v", "i2v", "flf2v", "ti2v"]
Solver = Literal["unipc", "euler", "dpm++", "few-step"]

# The negative prompt that Wan's own sampler uses when the user gives none.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

# Width and height in pixels, by resolution and aspect ratio.
SIZES_480P = {
    "16:9": (832, 480),
    "9:16": (480, 832),
    "4:3": (640, 480),
    "3:4": (480, 640),
    "1:1": (640, 640),
}
SIZES_720P = {
    "16:9": (1280, 720),
    "9:16": (720, 1280),
    "4:3": (960, 720),
    "3:4": (720, 960),
    "1:1": (960, 960),
}


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of one Wan DiT.

    Attributes:
        dim: width of the residual stream; `num_heads` divides it.
        ffn_dim: hidden width of the feed-forward layers.
        in_dim: input channels: latents, plus 4 mask and the condition's latent channels in
            image-to-video models that concatenate their condition.
        out_dim: channels of the predicted velocity, the VAE's latent channels.
        text_dim, text_len: width and (padded) number of text embeddings.
        image_dim: width of CLIP features; None for models without image cross attention.
        image_positions: length of the learned position table over image features
            (first-last-frame models: 2 images of 257); None where there is none.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int | None = None
    image_positions: int | None = None

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head dimension must be even for RoPE, got {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class VAEConfig:
    """Geometry of a video VAE: latent channels and pixels (frames) per latent."""

    latent_channels: int
    temporal_stride: int
    spatial_stride: int


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of a model's sampler.

    `guidance_high_noise` belongs to the high-noise expert of two-expert models,
    `guidance` to the low-noise one (and to single models); `boundary` is the
    rectified-flow time above which the high-noise expert works. `shift_480p`, where a model
    has one, takes the place of `shift` for frames of up to 832x480 pixels.
    """

    steps: int
    shift: float
    guidance: float
    guidance_high_noise: float | None = None
    boundary: float | None = None
    shift_480p: float | None = None
    solver: Solver = "unipc"
    sigma_max: float = 80.0
    negative_prompt: str = WAN_NEGATIVE_PROMPT


@dataclass(frozen=True)
class ModelConfig:
    """One model as users name it.

    `attention_blocks`: query and key rows of a block for block-sparse attention, where the
    back-ends' own sizes are too large for the model's few tokens.
    `sizes` maps resolution -> aspect ratio -> (width, height); the first entry of each
    is the default. `hub_id` is the diffusers-layout repository of the weights.
    """

    name: str
    task: Task
    transformer: TransformerConfig
    vae: VAEConfig
    sampling: SamplingConfig
    frames: int
    fps: int
    sizes: dict[str, dict[str, tuple[int, int]]] = field(hash=False)
    hub_id: str | None = None
    attention_blocks: tuple[int, int] | None = None

    @property
    def block_settings(self) -> dict[str, Any]:
        """Settings of block-sparse attention that are the model's own."""
        if self.attention_blocks is None:
            return {}
        return dict(zip(("block_q", "block_k"), self.attention_blocks, strict=True))

    @property
    def experts(self) -> int:
        return 1 if self.sampling.boundary is None else 2

    @property
    def size_multiple(self) -> tuple[int, int]:
        """(height, width) must be multiples of these: VAE stride times patch size."""
        _, patch_h, patch_w = self.transformer.patch_size
        return self.vae.spatial_stride * patch_h, self.vae.spatial_stride * patch_w

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip given in frames and pixels."""
        v = self.vae
        return (
            v.latent_channels,
            (frames - 1) // v.temporal_stride + 1,
            height // v.spatial_stride,
            width // v.spatial_stride,
        )

    def token_count(self, frames: int, height: int, width: int) -> int:
        """Length of the DiT's sequence for a clip given in frames and pixels."""
        _, t, h, w = self.latent_shape(frames, height, width)
        pt, ph, pw = self.transformer.patch_size
        return (t // pt) * (h // ph) * (w // pw)


VAE_21 = VAEConfig(latent_channels=16, temporal_stride=4, spatial_stride=8)
VAE_22 = VAEConfig(latent_channels=48, temporal_stride=4, spatial_stride=16)
VAE_SPRITE = VAEConfig(latent_channels=32, temporal_stride=4, spatial_stride=16)


def _wan_1_3b() -> TransformerConfig:
    return TransformerConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)


def _wan_14b(
    in_dim: int = 16, image_dim: int | None = None, image_positions: int | None = None
) -> TransformerConfig:
    return TransformerConfig(
        dim=5120,
        ffn_dim=13824,
        num_heads=40,
        num_layers=40,
        in_dim=in_dim,
        image_dim=image_dim,
        image_positions=image_positions,
    )


def _wan_5b() -> TransformerConfig:
    return TransformerConfig(
        dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48
    )


def _spritewan() -> TransformerConfig:
    return TransformerConfig(
        dim=256,
        ffn_dim=1024,
        num_heads=4,
        num_layers=10,
        in_dim=32,
        out_dim=32,
        text_dim=128,
        text_len=64,
    )


def _wan21(
    name: str,
    task: Task,
    transformer: TransformerConfig,
    sampling: SamplingConfig,
    sizes: dict[str, dict[str, tuple[int, int]]],
) -> ModelConfig:
    hub_id = f"Wan-AI/{name}-Diffusers"
    return ModelConfig(name, task, transformer, VAE_21, sampling, 81, 16, sizes, hub_id)


_I2V_21_NEGATIVE_PROMPT = "镜头晃动，" + WAN_NEGATIVE_PROMPT
_I2V_21_SAMPLING = SamplingConfig(
    steps=40,
    shift=5.0,
    shift_480p=3.0,
    guidance=5.0,
    negative_prompt=_I2V_21_NEGATIVE_PROMPT,
)
_BOTH = {"480p": SIZES_480P, "720p": SIZES_720P}
_480P_ONLY = {"480p": SIZES_480P}
_720P_FIRST = {"720p": SIZES_720P, "480p": SIZES_480P}

PRESETS: dict[str, ModelConfig] = {
    model.name: model
    for model in (
        _wan21(
            "Wan2.1-T2V-1.3B",
            "t2v",
            _wan_1_3b(),
            SamplingConfig(steps=50, shift=5.0, guidance=5.0),
            _480P_ONLY,
        ),
        _wan21(
            "Wan2.1-T2V-14B",
            "t2v",
            _wan_14b(),
            SamplingConfig(steps=50, shift=5.0, guidance=5.0),
            _720P_FIRST,
        ),
        _wan21(
            "Wan2.1-I2V-14B-480P",
            "i2v",
            _wan_14b(in_dim=36, image_dim=1280),
            _I2V_21_SAMPLING,
            _480P_ONLY,
        ),
        _wan21(
            "Wan2.1-I2V-14B-720P",
            "i2v",
            _wan_14b(in_dim=36, image_dim=1280),
            _I2V_21_SAMPLING,
            _720P_FIRST,
        ),
        _wan21(
            "Wan2.1-FLF2V-14B-720P",
            "flf2v",
            _wan_14b(in_dim=36, image_dim=1280, image_positions=514),
            SamplingConfig(
                steps=50, shift=16.0, guidance=5.0, negative_prompt=_I2V_21_NEGATIVE_PROMPT
            ),
            _720P_FIRST,
        ),
        _wan21(
            "Wan2.2-T2V-A14B",
            "t2v",
            _wan_14b(),
            SamplingConfig(
                steps=40,
                shift=12.0,
                guidance=3.0,
                guidance_high_noise=4.0,
                boundary=0.875,
            ),
            _720P_FIRST,
        ),
        _wan21(
            "Wan2.2-I2V-A14B",
            "i2v",
            _wan_14b(in_dim=36),
            SamplingConfig(
                steps=40,
                shift=5.0,
                guidance=3.5,
                guidance_high_noise=3.5,
                boundary=0.900,
                sigma_max=200.0,
            ),
            _720P_FIRST,
        ),
        ModelConfig(
            name="Wan2.2-TI2V-5B",
            task="ti2v",
            transformer=_wan_5b(),
            vae=VAE_22,
            sampling=SamplingConfig(steps=50, shift=5.0, guidance=5.0),
            frames=121,
            fps=24,
            sizes={"720p": {"16:9": (1280, 704), "9:16": (704, 1280)}},
            hub_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        ),
        ModelConfig(
            name="spritewan",
            task="ti2v",
            transformer=_spritewan(),
            vae=VAE_SPRITE,
            sampling=SamplingConfig(steps=20, shift=3.0, guidance=3.0, negative_prompt=""),
            frames=33,
            fps=16,
            sizes={"256p": {"1:1": (256, 256)}},
            attention_blocks=(16, 16),  # 36 blocks, of which a tenth is three
        ),
    )
}


SPRITEWAN_TEACHER = "spritewan-teacher"  # other weights of the preset "spritewan"


def preset(name: str) -> ModelConfig:
    """The preset called `name`, in any case, with or without an organisation before a slash.

    Of "spritewan-teacher" it is that of "spritewan", by the other name.

    Raises:
        ValueError: no preset has that name.
    """
    wanted = name.rsplit("/", 1)[-1].lower().removesuffix("-diffusers")
    if wanted == SPRITEWAN_TEACHER:
        return replace(PRESETS["spritewan"], name=SPRITEWAN_TEACHER)
    for key, model in PRESETS.items():
        if key.lower() == wanted:
            return model
    known = ", ".join([*PRESETS, SPRITEWAN_TEACHER])
    raise ValueError(f"unknown model {name!r}; known models: {known}")
