"""From a prompt, an image, or both, to a video.

`Pipeline` holds the models and runs them in turn: text encoder, image condition, DiT in a
sampler's loop, VAE decoder. What a request means is settled before, in `request.resolve`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from turbodit import quantization
from turbodit.attention import available
from turbodit.checkpoints import find_model, load_transformer
from turbodit.checkpoints.stated import choose_attention
from turbodit.conditioning import ImageCondition, encode_known_frames
from turbodit.config import ModelConfig
from turbodit.device import choose_device
from turbodit.graph import StepGraph
from turbodit.image_encoder import ImageEncoder
from turbodit.model.wan import EncodedContext, Residual, WanModel
from turbodit.noise_schedule import few_step_times
from turbodit.offload import OffloadMode, Residence, check_mode
from turbodit.prompt_cache import PromptCache, fingerprint
from turbodit.quantization import linear_format
from turbodit.request import GenerationRequest, Settings, resolve
from turbodit.sampling import (
    Velocity,
    few_step,
    gaussian_noise,
    guide,
    solver_sample,
    switch_experts,
)
from turbodit.text_encoder import TextEncoder, clean_prompt
from turbodit.vae import VideoVAE, to_frames
from turbodit.video import Video

# Called with a stage ("load", "text", "image", "denoise", "decode") and how far it is.
Progress = Callable[[str, int, int], None]

# Pixels of a frame up to which samples are decoded at once: those of one at 480p, as decoding takes
# memory by the pixel (`plan.inference`).
DECODED_TOGETHER = 832 * 480


class Pipeline:
    """Models that make videos together.

    Args:
        model: what the models are, and the sampler's defaults.
        transformers: the DiT, or Wan 2.2's high-noise and low-noise experts.
        vae, text_encoder, image_encoder: the last only for models with CLIP features.
        device: where they compute.
        offload: which are there at a time (`offload.Residence`).
        graph: run the DiT as a CUDA graph (`graph.StepGraph`), on a GPU and where its weights
            stay there.
        prompt_cache: folder of text embeddings; None keeps none.

    Raises:
        ValueError: a number of experts or a text encoder that does not fit `model`, an unknown
            offload mode.
    """

    def __init__(
        self,
        model: ModelConfig,
        transformers: Sequence[WanModel],
        vae: VideoVAE,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder | None = None,
        *,
        device: torch.device | str = "cpu",
        offload: OffloadMode = "none",
        graph: bool = True,
        prompt_cache: str | Path | None = None,
    ) -> None:
        if len(transformers) != model.experts:
            raise ValueError(f"{model.name} has {model.experts} expert(s), got {len(transformers)}")
        if text_encoder.dim != model.transformer.text_dim:
            raise ValueError(
                f"the text encoder's embeddings have width {text_encoder.dim}, {model.name} "
                f"expects {model.transformer.text_dim}"
            )
        self.model = model
        self.device = torch.device(device)
        self.vae, self.text_encoder, self.image_encoder = vae, text_encoder, image_encoder
        self.transformers = dict(zip(("transformer", "transformer_2"), transformers, strict=False))
        self._cache = None
        if prompt_cache is not None:
            weights = fingerprint(text_encoder.model)
            words = text_encoder.vocabulary_fingerprint()
            identity = f"{weights} {words} {text_encoder.max_length} {self.device.type}"
            self._cache = PromptCache(Path(prompt_cache), identity)
        modules: dict[str, nn.Module] = {"vae": vae.model, "text_encoder": text_encoder.model}
        modules |= self.transformers
        if image_encoder is not None:
            modules["image_encoder"] = image_encoder.model
        self._residence = Residence(modules, self.device, offload)
        self._by_block = offload == "sequential"
        self.stage_memory: dict[str, int] = {}  # on a GPU: most bytes of each stage, as timings
        self._graphs: dict[str, StepGraph] = {}
        if graph and offload == "none" and self.device.type == "cuda":
            for name, network in self.transformers.items():
                self._graphs[name] = StepGraph(network, self._graphs.get("transformer"))

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "spritewan",
        *,
        transformer: str | Path | Sequence[str | Path] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attention: str | None = None,
        attention_settings: Mapping[str, Any] | None = None,
        linear: str | None = None,
        residual: Residual = "float32",
        graph: bool = True,
        offload: OffloadMode = "none",
        vae_tiling: bool = False,
        prompt_cache: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Pipeline:
        """Load the models of a folder, a preset or a Hub repository.

        Args:
            model: as in `checkpoints.find_model`; by default the embedded one.
            transformer: a file or folder with other weights for the DiT; one per expert.
            device: by default a GPU where there is one.
            dtype: of the weights; by default bfloat16 on a GPU and float32 on a CPU.
            attention: back-end of the DiT's self attention (`attention.BACKENDS`); None: what
                its files state (`checkpoints.stated`), else "sdpa".
            attention_settings: of the back-end, e.g. {"ratio": 0.15}; else what the files state,
                and then the model's own.
            linear: 8-bit format of the DiT's linear layers (`quantization.linear_format`); None:
                that of its files.
            residual: dtype of the DiT's residual stream, "float32" or "bfloat16".
            graph: run the DiT as a CUDA graph where that is possible.
            offload: which models are on the device at a time (`offload.Residence`).
            vae_tiling: code large frames in tiles: less memory, faint seams.
            prompt_cache: folder of text embeddings to use and add to; None for none.
            progress: told which of the parts is being loaded.

        Raises:
            FileNotFoundError: no such model, or a part of it is missing.
            ValueError: a broken or unsupported file; experts whose files do not state the same;
                a device that is not there; a back-end that does not run on it; an offload mode
                that is unknown or needs a GPU.
        """
        device = choose_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        _check_runs(device, linear, offload)
        if attention is not None:
            _check_attention(device, attention)  # before anything is downloaded
        folder = find_model(model)
        given = (transformer,) if isinstance(transformer, (str, Path)) else transformer or ()
        sources = tuple(Path(source) for source in given)
        config = folder.config(sources)
        shape = config.transformer
        chosen, settings = choose_attention(
            config, folder.stated(sources), attention, attention_settings or {}
        )
        _check_attention(device, chosen)
        home = device if offload == "none" else torch.device("cpu")
        parts: dict[str, Callable[[], Any]] = {
            "text_encoder": lambda: TextEncoder.from_pretrained(
                folder.text_encoder, folder.tokenizer, shape.text_len, dtype, home
            ),
            "vae": lambda: VideoVAE.from_pretrained(folder.vae, dtype, home, tiling=vae_tiling),
            "transformers": lambda: [
                load_transformer(
                    source,
                    config=shape,
                    dtype=dtype,
                    device=home,
                    attention=chosen,
                    attention_settings=settings,
                    linear=linear,
                    residual=residual,
                )
                for source in sources or folder.transformers
            ],
        }
        if shape.image_dim is not None:
            parts["image_encoder"] = lambda: ImageEncoder.from_pretrained(
                folder.image_encoder, folder.image_processor, dtype, home
            )
        loaded = {}
        report = progress or _silent
        for done, (name, load) in enumerate(parts.items()):
            report("load", done, len(parts))
            loaded[name] = load()
        report("load", len(parts), len(parts))
        for network in loaded["transformers"]:
            network.pack_projections()
        return cls(
            config,
            **loaded,
            device=device,
            offload=offload,
            graph=graph,
            prompt_cache=prompt_cache,
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> Video | list[Video]:
        """One video for one prompt; a list of videos for several prompts, seeds or videos.

        Args:
            prompt, options: the fields of `request.GenerationRequest`.
            progress: told of every step of every stage.

        Raises:
            TypeError: an unknown option.
            ValueError: a value that is impossible or does not fit the model.
            FileNotFoundError: an image file does not exist.
        """
        request = GenerationRequest(prompt, **options)
        videos = self.generate(self.resolve(request), progress)
        return videos[0] if isinstance(prompt, str) and len(videos) == 1 else videos

    def resolve(self, request: GenerationRequest) -> Settings:
        """Fill in and check a request (`request.resolve`)."""
        return resolve(request, self.model)

    @property
    def peak_memory(self) -> int | None:
        """Most bytes taken on the GPU in the last generation, what CUDA graphs hold included; None
        on a CPU."""
        return max(self.stage_memory.values(), default=None)

    @contextmanager
    def _stage(self, name: str, clock: _Clock) -> Iterator[None]:
        """A part of a generation, whose time and memory are measured."""
        if self.device.type != "cuda":
            with clock.stage(name):
                yield
            return
        # A graph that is recorded now takes its memory openly; afterwards it is hidden.
        held = sum(graph.memory for graph in self._graphs.values())
        torch.cuda.reset_peak_memory_stats(self.device)
        with clock.stage(name):
            yield
        self.stage_memory[name] = torch.cuda.max_memory_allocated(self.device) + held

    @torch.no_grad()
    def generate(self, settings: Settings, progress: Progress | None = None) -> list[Video]:
        """Make the videos of resolved settings, as one batch.

        The noise of each video comes from its own seed alone, so a video does not depend on
        its batch, but for the last bits where a kernel picks another order of summation
        for another batch size.
        """
        clock = _Clock(self.device, progress or _silent)
        self.stage_memory = {}
        try:
            with self._stage("text", clock):
                context, negative = self._encode_prompts(settings, clock.report)
            condition = ImageCondition()
            if settings.image is not None:
                with self._stage("image", clock):
                    condition = self._encode_images(settings, settings.image, clock.report)
            with self._stage("denoise", clock):
                latents = self._denoise(settings, context, negative, condition, clock.report)
            with self._stage("decode", clock):
                frames = self._decode(latents, clock.report)
        finally:
            self._residence.clear()
        summary = {"model": self.model.name} | settings.summary()
        return [
            Video(clip, settings.fps, prompt, seed, dict(summary), clock.timings())
            for clip, prompt, seed in zip(frames, settings.prompts, settings.seeds, strict=True)
        ]

    @torch.no_grad()
    def latents(
        self, settings: Settings, progress: Progress | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, ImageCondition]:
        """What training data is made of: nothing is decoded.

        Returns:
            Clean latents (B, C, T, H, W) float32, text embeddings (B, text_len, text_dim), and
            the image condition.
        """
        report = progress or _silent
        try:
            context, negative = self._encode_prompts(settings, report)
            condition = ImageCondition()
            if settings.image is not None:
                condition = self._encode_images(settings, settings.image, report)
            return self._denoise(settings, context, negative, condition, report), context, condition
        finally:
            self._residence.clear()

    def _encode_prompts(
        self, settings: Settings, report: Progress
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (B, text_len, text_dim) of the prompts and of the negative prompt."""
        negative = settings.negative_prompt
        asked = settings.prompts if negative is None else (*settings.prompts, negative)
        unique = list(dict.fromkeys(asked))
        embeddings = {}
        for done, prompt in enumerate(unique):
            report("text", done, len(unique))
            embeddings[prompt] = self._encode_prompt(clean_prompt(prompt))
        report("text", len(unique), len(unique))
        context = torch.cat([embeddings[prompt] for prompt in settings.prompts])
        return context, None if negative is None else embeddings[negative].expand_as(context)

    def _encode_prompt(self, prompt: str) -> torch.Tensor:
        """(1, text_len, text_dim); alone, so that it does not depend on other prompts."""
        cut = self.text_encoder.truncated(prompt)
        if cut is not None:
            warnings.warn(
                f"the prompt is longer than {self.text_encoder.max_length} tokens; "
                f"its last {len(cut)} characters have no effect: {_shortened(cut)}",
                stacklevel=2,
            )
        cached = None if self._cache is None else self._cache.load(prompt)
        if cached is not None:
            return cached.to(self.device)
        self._residence.bring("text_encoder")
        embedding = self.text_encoder.encode([prompt])
        if self._cache is not None:
            self._cache.store(prompt, embedding)
        return embedding

    def _encode_images(
        self, settings: Settings, image: Image.Image, report: Progress
    ) -> ImageCondition:
        report("image", 0, 1)
        features = None
        if self.image_encoder is not None:
            self._residence.bring("image_encoder")
            known = [image] if settings.last_image is None else [image, settings.last_image]
            features = self.image_encoder.encode(known).flatten(0, 1)[None]
        self._residence.bring("vae")
        condition = encode_known_frames(
            self.vae, self.model, image, settings.last_image, settings.frames
        )
        report("image", 1, 1)
        return replace(condition, features=features)

    def _denoise(
        self,
        settings: Settings,
        context: torch.Tensor,
        negative: torch.Tensor | None,
        condition: ImageCondition,
        report: Progress,
    ) -> torch.Tensor:
        """Clean latents (B, C, T, H, W), float32; a FloatingPointError if they are not finite."""
        shape = self.model.latent_shape(settings.frames, settings.height, settings.width)
        generators = [torch.Generator().manual_seed(seed) for seed in settings.seeds]
        noise = gaussian_noise(shape, generators, self.device)
        velocity = self._velocity(settings, context, negative, condition)

        def on_step(done: int, total: int) -> None:
            report("denoise", done, total)

        on_step(0, settings.steps)
        if settings.solver == "few-step":
            assert settings.sigma_max is not None and settings.mid_times is not None
            latents = few_step(
                velocity,
                noise,
                few_step_times(settings.steps, settings.sigma_max, settings.mid_times),
                generators=generators,
                ode=bool(settings.ode),
                on_step=on_step,
            )
        else:
            assert settings.shift is not None
            latents = solver_sample(
                velocity,
                noise,
                solver=settings.solver,
                steps=settings.steps,
                shift=settings.shift,
                on_step=on_step,
            )
        if not latents.isfinite().all():
            raise FloatingPointError("denoising gave NaN or infinite latents; try dtype float32")
        return condition.keep_first(latents)

    def _velocity(
        self,
        settings: Settings,
        context: torch.Tensor,
        negative: torch.Tensor | None,
        condition: ImageCondition,
    ) -> Velocity:
        """The guided velocity, of one expert or of two that take turns."""

        def expert(name: str, guidance: float) -> Velocity:
            conditional = self._network(name, context, condition)
            if negative is None:
                return conditional
            return guide(conditional, self._network(name, negative, condition), guidance)

        if settings.boundary is None:
            return expert("transformer", settings.guidance)
        assert settings.guidance_high_noise is not None
        return switch_experts(
            expert("transformer", settings.guidance_high_noise),
            expert("transformer_2", settings.guidance),
            settings.boundary,
        )

    def _network(self, name: str, context: torch.Tensor, condition: ImageCondition) -> Velocity:
        """The DiT called `name` as a function of state and time alone; float32 out."""
        network = self.transformers[name]
        step = self._graphs.get(name, network)
        features = condition.model_features(len(context))
        encoded: EncodedContext | None = None

        def velocity(latents: torch.Tensor, t: float) -> torch.Tensor:
            nonlocal encoded
            self._residence.bring(name)
            inputs = condition.model_input(latents, t)
            if self._by_block:  # its weights are there for their own block's turn only
                return network(*inputs, context, features).float()
            if encoded is None:
                encoded = network.encode_context(context, features)
            return step(*inputs, encoded).float()

        return velocity

    def _decode(self, latents: torch.Tensor, report: Progress) -> list[np.ndarray]:
        """(T, H, W, 3) uint8 of each sample; large ones one after the other, for their memory."""
        self._residence.bring("vae")
        total = latents.shape[0] * latents.shape[2]
        done = 0
        report("decode", done, total)
        height, width = (size * self.vae.spatial_stride for size in latents.shape[-2:])
        clips: list[np.ndarray] = []
        for samples in latents.split(max(1, DECODED_TOGETHER // (height * width))):
            pieces = []
            for chunk in self.vae.decode_chunks(samples):
                pieces.append([to_frames(frames) for frames in chunk])
                done += len(samples)
                report("decode", done, total)
            clips += [np.concatenate(sample) for sample in zip(*pieces, strict=True)]
        return clips


def _shortened(text: str, limit: int = 200) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_runs(device: torch.device, linear: str | None, offload: str) -> None:
    """Refuse what cannot run on the device before anything is loaded."""
    check_mode(offload)
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"offload {offload!r} needs a GPU to keep free; the device is cpu")
    if linear is not None:
        runs, reason = quantization.available(linear_format(linear), device)
        if not runs:
            raise ValueError(f"linear layers in {linear} do not run on {device}: {reason}")


def _check_attention(device: torch.device, attention: str) -> None:
    runs, reason = available(attention, device)
    if not runs:
        raise ValueError(f"attention {attention!r} does not run on {device}: {reason}")


def _silent(stage: str, done: int, total: int) -> None:
    pass


class _Clock:
    """Seconds by stage and of a typical step, counted when the device's work is done."""

    def __init__(self, device: torch.device, progress: Progress) -> None:
        self.device = device
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._steps: list[float] = []

    def now(self) -> float:
        _synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self._seconds[name] = self.now() - start

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell `progress`, and note when denoising steps end."""
        if stage == "denoise":
            self._steps.append(self.now())
        self._progress(stage, done, total)

    def timings(self) -> dict[str, float]:
        """Seconds of each stage, and "denoise_step": the median of the denoising steps."""
        steps = [end - start for start, end in pairwise(self._steps)]
        return self._seconds | {"denoise_step": median(steps)}
