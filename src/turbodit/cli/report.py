"""What the command line tells while it works, on stderr, and when it is done, on stdout."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

STAGES = ("text", "image", "denoise", "decode", "write")


@dataclass
class VideoSummary:
    """One video; `seconds` by stage, and of a typical denoising step ("denoise_step")."""

    path: str
    prompt: str
    seed: int
    settings: dict[str, Any]
    seconds: dict[str, float]


@dataclass
class Summary:
    """What a run of `generate` did; its fields are the keys of `--json`."""

    skipped: list[str]
    videos: list[VideoSummary] = field(default_factory=list)
    device: str = ""
    load_seconds: float = 0.0
    peak_bytes: int = 0

    def show(self) -> None:
        """Print paths, seconds of each stage, peak memory and settings."""
        if self.videos:
            Console().print(self._table())
        for path in self.skipped:
            print(f"{path} (done before)")
        for video in self.videos:
            print(video.path)

    def _table(self) -> Table:
        videos = "a video" if len(self.videos) == 1 else f"{len(self.videos)} videos"
        table = Table(show_header=False, title=f"{videos} on {self.device}")
        seconds = {"load": self.load_seconds}
        for stage in STAGES:
            parts = [video.seconds[stage] for video in self.videos if stage in video.seconds]
            if parts:
                seconds[stage] = sum(parts)
        for stage, duration in (seconds | {"total": sum(seconds.values())}).items():
            table.add_row(stage, f"{duration:.2f} s")
        step = median(video.seconds["denoise_step"] for video in self.videos)
        table.add_row("a denoising step", f"{step:.3f} s")
        table.add_row("peak memory", f"{self.peak_bytes / 2**30:.2f} GiB", end_section=True)
        first, *others = (video.settings | {"seed": video.seed} for video in self.videos)
        for key, value in first.items():
            if all(other.get(key) == value for other in others):
                table.add_row(key, Text(str(value)))
        return table


class Bars:
    """Progress on stderr: a bar for each stage of the video at work."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def start_video(self, title: str) -> None:
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._tasks.clear()
        self._progress.console.print(Text(title), overflow="ellipsis", no_wrap=True)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total, refresh=True)


@contextmanager
def short_warnings() -> Iterator[None]:
    """Warnings as one line on stderr, and the same one again for another video."""

    def show(message: Warning | str, *details: object, **more: object) -> None:
        print(f"turbodit: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def peak_host_memory() -> int:
    """Most bytes of memory that this process has held so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
