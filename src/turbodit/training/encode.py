"""Videos with captions as training data: encoded once, into the shards of `data.shards`.

A shard is kept as long as the videos and captions that it was made from stay as they are: beside
it lies `shard_000000.json` with a mark of them, and with the videos that could not be used.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from turbodit.checkpoints import find_model
from turbodit.checkpoints.write import new_file
from turbodit.conditioning import ImageCondition, encode_known_frames
from turbodit.config import ModelConfig
from turbodit.device import choose_device
from turbodit.image_encoder import ImageEncoder
from turbodit.pipeline import Progress
from turbodit.prompt_cache import fingerprint
from turbodit.request import GenerationRequest, Settings
from turbodit.text_encoder import TextEncoder
from turbodit.training.data.shards import (
    DatasetInfo,
    Sample,
    ShardWriter,
    claim_folder,
    explained,
    sample_key,
    shard_path,
)
from turbodit.training.data.videos import BrokenVideo, Clip, find_clips, read_video
from turbodit.training.data.work import Report, Worker, clip_settings, file_mark, silent
from turbodit.vae import VideoVAE


@dataclass(frozen=True)
class Encoders:
    """What turns videos and captions into a model's inputs; no transformer."""

    model: ModelConfig
    vae: VideoVAE
    text: TextEncoder
    image: ImageEncoder | None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Encoders:
        """Load them from a model's folder; arguments and errors as `Pipeline.from_pretrained`."""
        device = choose_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        folder = find_model(model)
        config = folder.config()
        shape = config.transformer
        image = None
        if shape.image_dim is not None:
            image = ImageEncoder.from_pretrained(
                folder.image_encoder, folder.image_processor, dtype, device
            )
        return cls(
            config,
            VideoVAE.from_pretrained(folder.vae, dtype, device),
            TextEncoder.from_pretrained(
                folder.text_encoder, folder.tokenizer, shape.text_len, dtype, device
            ),
            image,
        )

    @torch.no_grad()
    def encode(self, key: str, frames: np.ndarray, caption: str) -> Sample:
        """The sample of a clip (T, H, W, 3) uint8."""
        cut = self.text.truncated(caption)
        if cut is not None:
            warnings.warn(
                f"a caption is longer than {self.text.max_length} tokens; its last {len(cut)} "
                f"characters have no effect: {caption[:60]!r}...",
                stacklevel=2,
            )
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None]
        latents = self.vae.encode(pixels.float() / 127.5 - 1)
        condition = self._condition(frames)
        return Sample(
            key,
            latents[0],
            self.text.encode([caption])[0],
            caption,
            None if condition.channels is None else condition.channels[0],
            None if condition.features is None else condition.features[0],
        )

    def _condition(self, frames: np.ndarray) -> ImageCondition:
        """What the first frame, and the last, add to the model's input."""
        if self.model.task in ("t2v", "ti2v"):  # of ti2v: the latents' own first frame
            return ImageCondition()
        first, last = Image.fromarray(frames[0]), Image.fromarray(frames[-1])
        known = [first, last] if self.model.task == "flf2v" else [first]
        condition = encode_known_frames(
            self.vae, self.model, first, last if len(known) == 2 else None, len(frames)
        )
        if self.image is None:
            return condition
        return replace(condition, features=self.image.encode(known).flatten(0, 1)[None])


def encode_videos(
    encoders: Encoders,
    videos: Path,
    folder: Path,
    *,
    request: GenerationRequest,
    shard_size: int = 256,
    worker: Worker | None = None,
    progress: Progress | None = None,
) -> Report:
    """Encode the videos of a folder whose shards are not there, or no longer right.

    Broken videos, and those without a caption, are skipped and reported.

    Args:
        request: size, frames and frame rate of the clips; its prompt has no meaning.
        shard_size: videos of a shard.
        worker: worker r of N makes shards r, r + N, ...

    Raises:
        FileNotFoundError: no videos.
        ValueError: an impossible size; a folder with other data, or that of the videos.
        OSError: a shard cannot be written; what is finished is kept.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be positive, got {shard_size}")
    if folder.resolve() == videos.resolve():
        raise ValueError(f"{folder} is the folder of the videos; shards go into another one")
    worker, tell = worker or Worker(), progress or silent
    settings = clip_settings(request, encoders.model)
    clips = list(enumerate(find_clips(videos)))
    info = _info(encoders, settings, len(clips), shard_size)
    claim_folder(folder, info, growing=True)
    if worker.rank == 0:
        _remove_surplus(folder, info.shards)
    own = range(worker.rank, info.shards, worker.world)
    shards = {shard_path(folder, s): clips[s * shard_size : (s + 1) * shard_size] for s in own}
    total, done = sum(map(len, shards.values())), 0
    report = Report()

    def on_clip(before: int, number: int) -> None:
        tell("videos", before + number, total)

    for path, numbered in shards.items():
        sources = _digest([clip for _, clip in numbered])
        record = _read_record(path)
        made = 0
        if record is None or record.sources != sources or not path.exists():
            with ShardWriter(path, f"{info.identity(sizes=False)} {sources}") as writer:
                before = len(writer.keys)
                skipped = _fill(writer, encoders, settings, numbered, partial(on_clip, done))
                made = len(writer.keys) - before
            record = ShardRecord(sources, len(writer.keys), skipped)
            record.save(path)
        report.made += made
        report.found += record.samples - made
        report.skipped |= record.skipped
        done += len(numbered)
        tell("videos", done, total)
    return report


def _fill(
    writer: ShardWriter,
    encoders: Encoders,
    settings: Settings,
    numbered: Sequence[tuple[int, Clip]],
    tell: Callable[[int], None],
) -> dict[str, str]:
    """Add the clips that the shard lacks; why some cannot be used, by name."""
    skipped = {}
    for step, (number, clip) in enumerate(numbered):
        tell(step)
        if sample_key(number) not in writer.keys:
            try:
                writer.write(_sample(encoders, settings, number, clip))
            except BrokenVideo as error:
                skipped[clip.name] = str(error)
    return skipped


def _sample(encoders: Encoders, settings: Settings, number: int, clip: Clip) -> Sample:
    if clip.caption is None:
        raise BrokenVideo("no caption")
    frames = read_video(
        clip.path,
        frames=settings.frames,
        fps=settings.fps,
        width=settings.width,
        height=settings.height,
    )
    return encoders.encode(sample_key(number), frames, clip.caption)


def _info(encoders: Encoders, settings: Settings, count: int, shard_size: int) -> DatasetInfo:
    size = settings.frames, settings.height, settings.width
    weights = {"text_encoder": fingerprint(encoders.text.model)}
    if encoders.image is not None:
        weights["image_encoder"] = fingerprint(encoders.image.model)
    return DatasetInfo(
        model=encoders.model.name,
        latent_shape=encoders.model.latent_shape(*size),
        count=count,
        shards=math.ceil(count / shard_size),
        vae=fingerprint(encoders.vae.model),
        origin={
            "kind": "encoded",
            "settings": {"size": list(size), "fps": settings.fps},
            "shard_size": shard_size,
            "weights": weights,
        },
    )


@dataclass(frozen=True)
class ShardRecord:
    """What is written beside a shard, as JSON.

    It is written after the shard: should the process be killed between the two, the shard is
    made once more, and never taken for what it is not.

    Attributes:
        sources: mark of the videos and captions of the shard.
        samples: how many there are.
        skipped: reason by video.
    """

    sources: str
    samples: int
    skipped: dict[str, str]

    @staticmethod
    def path(shard: Path) -> Path:
        return shard.with_suffix(".json")

    def save(self, shard: Path) -> None:
        path = self.path(shard)
        with explained(path), new_file(path) as new:
            new.write_text(json.dumps(vars(self), indent=1, ensure_ascii=False), "utf-8")


def _read_record(shard: Path) -> ShardRecord | None:
    """The record beside a shard; None where there is none, or it is broken: then the shard is made
    again, which loses nothing."""
    path = ShardRecord.path(shard)
    if not path.exists():
        return None
    try:
        record = ShardRecord(**json.loads(path.read_text("utf-8")))
        if not (isinstance(record.samples, int) and isinstance(record.skipped, dict)):
            raise TypeError(f"samples {record.samples!r}, skipped {record.skipped!r}")
    except (ValueError, TypeError) as error:
        warnings.warn(f"{path} is broken ({error}); {shard.name} is made again", stacklevel=2)
        return None
    return record


def _digest(clips: Sequence[Clip]) -> str:
    """Hash that changes with a video or a caption."""
    marks = [
        [clip.name, file_mark(clip.path) if clip.path.is_file() else "", clip.caption]
        for clip in clips
    ]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()


def _remove_surplus(folder: Path, shards: int) -> None:
    """Drop the shards of videos that are gone."""
    wanted = {shard_path(folder, number) for number in range(shards)}
    for path in folder.glob("shard_*.tar"):
        if path not in wanted:
            path.unlink()
            ShardRecord.path(path).unlink(missing_ok=True)
