"""What the commands that make training data share: workers, reports, marks of files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from turbodit.config import ModelConfig
from turbodit.request import GenerationRequest, Settings, resolve


@dataclass(frozen=True)
class Worker:
    """Which of how many processes this is, and which of its machine's; alone by default."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def device(self, device: str | None) -> str | None:
        """The device asked for; where there are several processes, each has a GPU of its own."""
        on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
        return f"cuda:{self.local_rank}" if on_gpu and self.world > 1 else device


@dataclass
class Report:
    """What one process did.

    Attributes:
        made, found: samples made now, and those that were there.
        skipped: reason by source that could not be used, also in shards that were there.
    """

    made: int = 0
    found: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def this_worker() -> Worker:
    """This process among those that torchrun started, if it did."""
    if not dist.is_torchelastic_launched():
        return Worker()
    return Worker(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def clip_settings(request: GenerationRequest, model: ModelConfig) -> Settings:
    """The request for a clip of text alone: the size, frames and frame rate of all samples.

    With an image, the image's own shape would decide, and samples would differ in size.

    Raises:
        ValueError: the model cannot make such clips.
    """
    plain = replace(request, prompt="a clip", image=None, last_image=None)
    return resolve(plain, replace(model, task="t2v"))


def file_mark(path: Path) -> str:
    """Text that changes when a file does: its name, size and time of change."""
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""
