"""A teacher's own videos as training data: latents and text embeddings of prompts, in shards.

Distillation on them needs no videos of others, and the student learns what the teacher makes
of a prompt (rCM, arXiv:2510.08431). The defaults are those of rCM's published data set: 100
Euler steps, shift 3, guidance 5.

Sample number n has its noise from the seed `sample_seed(seed, n)` alone, and a shard has its name
when it is whole. So a run may be killed at any moment: the same command goes on where it was, and
ends with the same samples.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from turbodit.pipeline import Pipeline, Progress
from turbodit.prompt_cache import fingerprint
from turbodit.request import GenerationRequest, Settings
from turbodit.training.data.shards import (
    DatasetInfo,
    Sample,
    ShardWriter,
    claim_folder,
    sample_key,
    shard_path,
)
from turbodit.training.data.work import Report, Worker, clip_settings, file_mark, silent

MAX_SEED = 2**31 - 1
PROMPT_KEYS = ("prompt", "image", "last_image")


@dataclass(frozen=True)
class Prompt:
    """What one sample shows; images for models that begin (and end) with one."""

    text: str
    image: Path | None = None
    last_image: Path | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file: `.txt`, one a line, or `.jsonl`, an object a line.

    Blank lines and lines that start with # are skipped. The keys of an object are "prompt" and,
    relative to the file, "image" and "last_image".

    Raises:
        FileNotFoundError: no such file, or an image that it names is missing.
        ValueError: another suffix, no prompts, or a bad line (its number is said).
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompt file {path} must end in .txt or .jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"prompt file not found: {path}")
    try:
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8: {error}") from error
    prompts = []
    for number, raw in enumerate(content.split("\n"), start=1):
        line = raw.strip()
        if line and not line.startswith("#"):
            where = f"{path} line {number}"
            prompts.append(
                _read_object(line, where, path) if path.suffix == ".jsonl" else Prompt(line)
            )
    if not prompts:
        raise ValueError(f"prompt file {path} has no prompts")
    return prompts


def _read_object(line: str, where: str, path: Path) -> Prompt:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise ValueError(f"{where}: expected an object of texts, got {line[:40]!r}")
    unknown = sorted(values.keys() - set(PROMPT_KEYS))
    if unknown:
        raise ValueError(
            f"{where}: unknown keys: {', '.join(unknown)}; supported: {', '.join(PROMPT_KEYS)}"
        )
    if not values.get("prompt", "").strip():
        raise ValueError(f"{where}: there is no prompt")
    images = {key: path.parent / values[key] for key in PROMPT_KEYS[1:] if key in values}
    for image in images.values():
        if not image.is_file():
            raise FileNotFoundError(f"{where}: image not found: {image}")
    return Prompt(values["prompt"], **images)


def sample_seed(seed: int, number: int) -> int:
    """Seed of a sample's noise: sets with different seeds share none."""
    return (seed << 32) + number


def synthesize(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    request: GenerationRequest,
    seed: int = 0,
    shard_size: int = 256,
    batch: int = 1,
    worker: Worker | None = None,
    progress: Progress | None = None,
) -> Report:
    """Make the samples of `prompts` that `folder` does not hold yet.

    Args:
        pipe: the teacher.
        request: how to make them; its prompt, images and seed are replaced.
        seed: of all noise.
        shard_size: samples in a shard.
        batch: samples computed together. It changes the last bits, as another device does.
        worker: worker r of N makes shards r, r + N, ...
        progress: told of "samples", and of what `Pipeline` tells.

    Raises:
        ValueError: a request that is impossible; a solver for a model that was distilled
            for another sampler; a folder with other data.
        FloatingPointError: the teacher made NaN or infinity.
        OSError: a shard cannot be written; what is finished is kept.
    """
    if shard_size < 1 or batch < 1:
        raise ValueError(f"shard_size and batch must be positive, got {shard_size} and {batch}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed must be from 0 to {MAX_SEED}, got {seed}")
    if batch > 1 and any(prompt.image is not None for prompt in prompts):
        raise ValueError(f"samples with images are made one by one: batch must be 1, got {batch}")
    worker, tell = worker or Worker(), progress or silent
    clip = clip_settings(request, pipe.model)
    if pipe.model.sampling.solver == "few-step" != clip.solver:
        raise ValueError(
            f"{pipe.model.name} was distilled for the few-step sampler, got solver {clip.solver}, "
            "which makes wrong samples of it; expected the model that it was distilled from"
        )
    sized = replace(
        request, width=clip.width, height=clip.height, resolution=None, aspect_ratio=None
    )
    job = _Job(pipe, prompts, sized, seed)
    info = job.info(shards=math.ceil(len(prompts) / shard_size), shard_size=shard_size)
    claim_folder(folder, info)
    own = range(worker.rank, info.shards, worker.world)
    numbers = [range(len(prompts))[s * shard_size : (s + 1) * shard_size] for s in own]
    total = sum(map(len, numbers))
    report = Report()
    for shard, its_numbers in zip(own, numbers, strict=True):
        path = shard_path(folder, shard)
        if path.exists():
            report.found += len(its_numbers)
        else:
            with ShardWriter(path, info.identity()) as writer:
                report.found += len(writer.keys)
                for start in range(0, len(its_numbers), batch):
                    tell("samples", report.found + report.made, total)
                    report.made += job.write(writer, its_numbers[start : start + batch], tell)
        tell("samples", report.found + report.made, total)
    return report


@dataclass(frozen=True)
class _Job:
    """All that decides the samples."""

    pipe: Pipeline
    prompts: Sequence[Prompt]
    request: GenerationRequest
    seed: int

    def settings(self, numbers: Sequence[int]) -> Settings:
        """For samples that are computed together."""
        prompts = [self.prompts[number] for number in numbers]
        request = replace(
            self.request,
            prompt=[prompt.text for prompt in prompts],
            image=prompts[0].image,
            last_image=prompts[0].last_image,
            seed=[sample_seed(self.seed, number) for number in numbers],
        )
        return self.pipe.resolve(request)

    def info(self, shards: int, shard_size: int) -> DatasetInfo:
        settings = self.settings([0])
        pipe = self.pipe
        weights: dict[str, Any] = {
            name: fingerprint(network) for name, network in pipe.transformers.items()
        }
        return DatasetInfo(
            model=pipe.model.name,
            latent_shape=pipe.model.latent_shape(settings.frames, settings.height, settings.width),
            count=len(self.prompts),
            shards=shards,
            vae=fingerprint(pipe.vae.model),
            origin={
                "kind": "synthesized",
                "settings": json.loads(json.dumps(settings.summary())),
                "seed": self.seed,
                "shard_size": shard_size,
                "prompts": _digest(self.prompts),
                "weights": weights | {"text_encoder": fingerprint(pipe.text_encoder.model)},
            },
        )

    def write(self, writer: ShardWriter, numbers: Sequence[int], progress: Progress) -> int:
        """Make a batch unless the shard has it; how many samples were written."""
        missing = [n for n in numbers if sample_key(n) not in writer.keys]
        if not missing:
            return 0
        # All of them, so that what was cut short ends with the same bits.
        settings = self.settings(numbers)
        latents, context, condition = self.pipe.latents(settings, progress)
        for row, number in enumerate(numbers):
            if number in missing:
                writer.write(
                    Sample(
                        sample_key(number),
                        latents[row],
                        context[row],
                        settings.prompts[row],
                        None if condition.channels is None else condition.channels[0],
                        None if condition.features is None else condition.features[0],
                    )
                )
        return len(missing)


def _digest(prompts: Sequence[Prompt]) -> str:
    """Hash of the prompts, and of the images' names, sizes and times."""
    digest = hashlib.sha256()
    for prompt in prompts:
        parts = [prompt.text]
        for image in (prompt.image, prompt.last_image):
            parts.append("" if image is None else file_mark(image))
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()
