"""Finding a model by name, telling a folder's layout, and deducing what model it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from turbodit.checkpoints.packed import unpacked
from turbodit.checkpoints.stated import SAMPLING, Stated, agreed
from turbodit.checkpoints.transformer import presets_like, stated_use, transformer_config
from turbodit.config import (
    PRESETS,
    SIZES_480P,
    VAE_21,
    VAE_22,
    ModelConfig,
    SamplingConfig,
    Task,
    TransformerConfig,
    VAEConfig,
)
from turbodit.noise_schedule import MID_TIMES
from turbodit.weights import read_json

# Files of the original layout; the experts' folders only in two-expert models.
VAE_FILES = {"Wan2.1_VAE.pth": VAE_21, "Wan2.2_VAE.pth": VAE_22}
VAE_CLASS = "AutoencoderKLWan"  # in diffusers' config.json
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
HIGH_NOISE, LOW_NOISE = "high_noise_model", "low_noise_model"


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk, in diffusers' layout or the original one, and where its parts lie.

    Parts are looked up when asked for, so a folder may lack what is not used. Each lookup
    raises FileNotFoundError, naming what is missing and what is there.

    Attributes:
        transformer_name: sub-folder of the DiT (the first one) in diffusers' layout.
    """

    path: Path
    transformer_name: str = "transformer"

    @property
    def layout(self) -> Literal["diffusers", "native"]:
        if (self.path / "model_index.json").exists():
            return "diffusers"
        marks = (*VAE_FILES, TEXT_ENCODER_FILE, HIGH_NOISE, "config.json")
        if any((self.path / mark).exists() for mark in marks):
            return "native"
        raise FileNotFoundError(
            f"{self.path} is no model folder: expected model_index.json (diffusers' layout) or "
            f"one of {', '.join(marks)} (the original layout); found {self._found()}"
        )

    @property
    def transformers(self) -> tuple[Path, ...]:
        """The DiT; in two-expert models the high-noise expert, then the low-noise one.

        Packed ones are unpacked (`checkpoints.packed`, which see for more errors).
        """
        return tuple(unpacked(part) for part in self.stored_transformers)

    @property
    def stored_transformers(self) -> tuple[Path, ...]:
        """What `transformers` are in this folder, perhaps packed."""
        if self.layout == "diffusers":
            if self._index().get("transformer_2", [None])[0] is None:
                return (self._find(self.transformer_name),)
            return self._find(self.transformer_name), self._find("transformer_2")
        if (self.path / HIGH_NOISE).exists() or (self.path / LOW_NOISE).exists():
            return self._find(HIGH_NOISE), self._find(LOW_NOISE)
        self._find("config.json")
        return (self.path,)

    @property
    def vae(self) -> Path:
        return self._find("vae") if self.layout == "diffusers" else self._find(*VAE_FILES)

    @property
    def text_encoder(self) -> Path:
        return self._find("text_encoder" if self.layout == "diffusers" else TEXT_ENCODER_FILE)

    @property
    def tokenizer(self) -> Path:
        return self._find("tokenizer" if self.layout == "diffusers" else TOKENIZER_FOLDER)

    @property
    def image_encoder(self) -> Path:
        return self._find("image_encoder" if self.layout == "diffusers" else IMAGE_ENCODER_FILE)

    @property
    def image_processor(self) -> Path | None:
        """None in the original layout, which has no file for it."""
        return self._find("image_processor") if self.layout == "diffusers" else None

    def config(self, transformers: tuple[Path, ...] = ()) -> ModelConfig:
        """What model this is: the preset with these shapes, or else one made from them; with the
        sampler's defaults that the transformers' files state.

        Presets that differ only in their defaults (Wan2.1-I2V-14B for 480p and 720p) are told
        apart by the folder's path; where it does not say, the first is taken.

        Args:
            transformers: files or folders used in place of the folder's own.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: a part is broken or not supported, or files state what is unknown, does not
                fit the model, or differs between its experts.
        """
        model = self._model(transformers or self.transformers)
        sampling = self.stated(transformers).get(SAMPLING, {})
        return replace(model, sampling=_stated_sampling(model.sampling, sampling, model.name))

    def stated(self, transformers: tuple[Path, ...] = ()) -> Stated:
        """What the transformers' files say about their use (`checkpoints.stated`).

        Args:
            transformers: as of `config`.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: something unknown, or experts that do not state the same.
        """
        sources = transformers or self.transformers
        return agreed({source: stated_use(source) for source in sources})

    def _model(self, sources: tuple[Path, ...]) -> ModelConfig:
        """The preset, or the model that is none, before what its files state."""
        shape, vae = transformer_config(sources[0]), self._vae_config()
        _check_channels(shape, sources[0], vae, self.vae)
        alike = [
            model
            for model in presets_like(shape)
            if model.transformer.num_heads == shape.num_heads
            and model.vae == vae
            and model.experts == len(sources)
        ]
        if not alike:
            return self._custom_config(shape, vae, len(sources))
        path = str(self.path.resolve()).lower()
        model = next((model for model in alike if model.name.lower() in path), alike[0])
        boundary = self._index().get("boundary_ratio") or model.sampling.boundary
        return replace(model, sampling=replace(model.sampling, boundary=boundary))

    def _custom_config(self, shape: TransformerConfig, vae: VAEConfig, experts: int) -> ModelConfig:
        """A model that is no preset, with generic defaults of the sampler."""
        index = self._index()
        task: Task
        if shape.image_positions is not None:
            task = "flf2v"
        elif shape.in_dim > shape.out_dim:
            task = "i2v"
        else:
            task = "ti2v" if index.get("expand_timesteps", vae == VAE_22) else "t2v"
        boundary = index.get("boundary_ratio")
        if (experts == 2) != (boundary is not None):
            raise ValueError(
                f"{self.path} has {experts} transformer(s), but the boundary between two "
                f"experts (boundary_ratio in model_index.json) is {boundary}"
            )
        sampling = SamplingConfig(
            steps=50,
            shift=5.0,
            guidance=5.0,
            guidance_high_noise=5.0 if experts == 2 else None,
            boundary=boundary,
        )
        return ModelConfig(
            name=self.path.resolve().name,
            task=task,
            transformer=shape,
            vae=vae,
            sampling=sampling,
            frames=81,
            fps=16,
            sizes={"480p": SIZES_480P},
        )

    def _vae_config(self) -> VAEConfig:
        vae = self.vae
        if vae.name in VAE_FILES:
            return VAE_FILES[vae.name]
        path = vae / "config.json"
        data = read_json(path)
        name = data.get("_class_name", "none")
        if name != VAE_CLASS:
            raise ValueError(f"{path} describes the architecture {name}; supported: {VAE_CLASS}")
        if "z_dim" not in data:
            raise ValueError(f"{path} does not say 'z_dim' (the number of latent channels)")
        return VAEConfig(
            latent_channels=data["z_dim"],
            temporal_stride=data.get("scale_factor_temporal", VAE_21.temporal_stride),
            spatial_stride=data.get("scale_factor_spatial", VAE_21.spatial_stride),
        )

    def _index(self) -> dict[str, Any]:
        """model_index.json; empty in the original layout, which has none."""
        path = self.path / "model_index.json"
        return read_json(path) if path.exists() else {}

    def _find(self, *names: str) -> Path:
        for name in names:
            if (self.path / name).exists():
                return self.path / name
        raise FileNotFoundError(f"{self.path} has no {' or '.join(names)}; found {self._found()}")

    def _found(self) -> str:
        return ", ".join(sorted(entry.name for entry in self.path.iterdir())) or "nothing"


_SPRITEWAN = Path(__file__).parents[1] / "assets" / "spritewan"
EMBEDDED = {  # the models in this package: the few-step student, and the teacher it learnt from
    "spritewan": ModelFolder(_SPRITEWAN),
    "spritewan-teacher": ModelFolder(_SPRITEWAN, transformer_name="teacher"),
}


def _stated_sampling(own: SamplingConfig, stated: Mapping[str, Any], name: str) -> SamplingConfig:
    """`own`, with what files state in its place.

    A model that is none of the few-step solver's and has become one has its guidance built in.
    """
    implied: dict[str, Any] = {}
    if stated.get("solver") == "few-step" != own.solver:
        guidance = stated.get("guidance", 1.0)
        implied = {"steps": len(MID_TIMES) + 1, "guidance": guidance}
        if own.guidance_high_noise is not None:
            implied["guidance_high_noise"] = guidance
    if "shift" in stated:
        implied["shift_480p"] = None
    new = replace(own, **{**implied, **stated})
    for field in ("boundary", "guidance_high_noise"):
        if (getattr(new, field) is None) != (own.boundary is None):
            experts = "one expert" if own.boundary is None else "two experts"
            raise ValueError(
                f"the transformer's files state {SAMPLING} {field} {getattr(new, field)}, but "
                f"{name} has {experts}"
            )
    return new


def _check_channels(
    shape: TransformerConfig, transformer: Path, vae: VAEConfig, vae_path: Path
) -> None:
    """Raise a ValueError unless the DiT's input and output are the VAE's latents."""
    channels = vae.latent_channels
    with_condition = 2 * channels + vae.temporal_stride  # mask and latents of known frames
    if shape.out_dim != channels or shape.in_dim not in (channels, with_condition):
        raise ValueError(
            f"{transformer} does not fit the VAE in {vae_path}: it turns {shape.in_dim} channels "
            f"into {shape.out_dim}, expected {channels} (or {with_condition}, with an image) "
            f"into {channels}"
        )


def find_model(name: str | Path) -> ModelFolder:
    """The folder of a model, downloaded if need be.

    Args:
        name: "spritewan", the embedded model, or "spritewan-teacher"; a folder; a preset's name,
            such as "Wan2.1-T2V-1.3B"; or a repository on the Hugging Face Hub, such as
            "Wan-AI/Wan2.1-T2V-1.3B".

    Raises:
        FileNotFoundError: nothing has that name, or it cannot be downloaded.
    """
    text = str(name)
    if text.lower() in EMBEDDED:
        return EMBEDDED[text.lower()]
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelFolder(path)
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; a model is a folder with all its parts")
    by_name = {key.lower(): model.hub_id for key, model in PRESETS.items()}
    repository = by_name.get(text.lower(), text)
    if repository is None or text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no model folder at {text}")
    if "/" not in repository:
        raise FileNotFoundError(
            f"no model {text!r}: neither a folder, nor a Hub repository (organisation/name), "
            f"nor one of {', '.join({**PRESETS, **EMBEDDED})}"
        )
    return ModelFolder(_download(repository))


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repository))
    except (OSError, HFValidationError) as error:  # OSError: offline, not found, no access
        raise FileNotFoundError(
            f"{repository} is no folder here, and downloading it from the Hugging Face Hub "
            f"failed: {error}"
        ) from error
