"""What a training run tells: numbers and sample videos, in files and on the screen.

    folder/log.jsonl            one object a line: {"step": ..., "time": ..., name: number, ...}
    folder/samples/<name>-<step>.mp4
    folder/tensorboard/         the same for TensorBoard, samples as their first frames

`Metrics` collects numbers on the device between two entries, without waiting for it, and takes
their means over all processes. `TrainLog` writes them, on the first process alone. A run that
was stopped goes on in the same files; steps that it does again come again, and the later line
counts.
"""

from __future__ import annotations

import importlib
import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from turbodit.distributed.mesh import Mesh
from turbodit.video import Video

if TYPE_CHECKING:
    import numpy as np

TIME_BINS = 5  # of rectified-flow time, equally wide
SHOWN = 4  # metrics in the line on the screen


class Metrics:
    """Means of what was added since the last `take`; values that are not finite are counted.

    A name is `added` on all processes or on none between two calls of `take`.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._sums: dict[str, torch.Tensor] = {}  # of each: sum, number, number not finite

    def add(self, name: str, values: torch.Tensor | float) -> None:
        """Any number of values of one metric, such as each sample's loss."""
        self._add(name, torch.as_tensor(values, device=self.mesh.device).detach().flatten())

    def add_by_time(self, name: str, values: torch.Tensor, t: torch.Tensor) -> None:
        """`values` (B,), also apart by the bin of rectified-flow time that t (B,) is in."""
        self.add(name, values)
        bins = (t.detach().flatten() * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        for index in range(TIME_BINS):
            own = f"{name}/t{index / TIME_BINS:.1f}-{(index + 1) / TIME_BINS:.1f}"
            self._add(own, values.detach().flatten(), bins == index)

    def take(self) -> dict[str, float]:
        """Means over all processes, and for a metric with such values `nan/<name>`, their number.

        A metric without any finite value has no mean.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = torch.stack([self._sums[name] for name in names])
        dist.all_reduce(totals)
        self._sums.clear()
        taken: dict[str, float] = {}
        for name, (total, count, wrong) in zip(names, totals.tolist(), strict=True):
            if count:
                taken[name] = total / count
            if wrong:
                taken[f"nan/{name}"] = wrong
        return taken

    def _add(self, name: str, values: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        values = values.double()
        counted = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        finite = values.isfinite()
        good, wrong = finite & counted, ~finite & counted
        row = torch.stack([values.where(good, 0).sum(), good.sum(), wrong.sum()])
        self._sums[name] = self._sums[name] + row if name in self._sums else row


class _Sink(Protocol):
    """One place where a log is kept."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def video(self, step: int, name: str, video: Video) -> None: ...

    def close(self) -> None: ...


class TrainLog:
    """Writes a run's numbers and samples; on other processes than the first it does nothing.

    Args:
        folder: of the run, created.
        mesh: of the run.
        total_steps: of the run, for the line on the screen.
        step: that the run begins with; TensorBoard forgets what an earlier run told of later ones.
        wandb_project: Weights & Biases' name of a project to write to as well.

    Raises:
        ModuleNotFoundError: TensorBoard, or W&B where it is asked for, is not installed.
    """

    def __init__(
        self,
        folder: Path | str,
        mesh: Mesh,
        total_steps: int,
        step: int = 0,
        wandb_project: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._mesh = mesh
        self._sinks: list[_Sink] = []
        self._last = (step, time.perf_counter())
        if not mesh.is_first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sinks = [_Lines(self.folder), _TensorBoard(self.folder / "tensorboard", step)]
        if wandb_project is not None:
            self._sinks.append(_WandB(self.folder, wandb_project))
        self._sinks.append(_Screen(total_steps))

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after `step` updates; seconds per step and peak memory (GiB) are added.

        The seconds are those since the last entry; a GPU's peak is counted anew from then on.
        """
        if self._sinks:
            values = {**values, **self._speed(step), **_memory(self._mesh.device)}
        for sink in self._sinks:
            sink.scalars(step, values)

    def videos(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """Samples side by side as one video.

        Args:
            name: of the samples, such as "student"; part of a file's name.
            frames: (N, T, H, W, 3) uint8.

        Raises:
            ValueError: frames of another shape or dtype.
        """
        if self._sinks:
            video = Video(_grid(frames), fps)
            for sink in self._sinks:
                sink.video(step, name, video)

    def close(self) -> None:
        """End all files; the log can't be used after it."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()

    def _speed(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        last_step, last_time = self._last
        self._last = (step, now)
        done = step - last_step
        return {"seconds_per_step": (now - last_time) / done} if done > 0 else {}


class _Lines:
    """log.jsonl, and samples as mp4."""

    def __init__(self, folder: Path) -> None:
        self.samples = folder / "samples"
        path = folder / "log.jsonl"
        _cut_half_a_line(path)
        self.file = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        record = {"step": step, "time": round(time.time(), 3)}
        record |= {name: _plain(value) for name, value in values.items()}
        # Written at once and whole: nothing stays in a buffer.
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def video(self, step: int, name: str, video: Video) -> None:
        video.save(self.samples / f"{name}-{step:08d}.mp4", force=True)

    def close(self) -> None:
        self.file.close()


class _TensorBoard:
    """Numbers, and the first, middle and last frames of samples, one under the other.

    TensorBoard shows videos only as GIFs, made by a package that it doesn't bring.
    """

    def __init__(self, folder: Path, step: int) -> None:
        _library("tensorboard", "turbodit[train]")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def video(self, step: int, name: str, video: Video) -> None:
        count = len(video.frames)
        frames = [video.frames[index] for index in (0, count // 2, count - 1)]
        image = torch.cat([torch.from_numpy(frame) for frame in frames])
        self.writer.add_image(f"samples/{name}", image, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """Weights & Biases, in the run that the folder began."""

    def __init__(self, folder: Path, project: str) -> None:
        self.wandb = _library("wandb", "wandb")
        name = folder.resolve().name
        self.run = self.wandb.init(
            project=project, name=name, id=name, resume="allow", dir=str(folder)
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def video(self, step: int, name: str, video: Video) -> None:
        frames = video.frames.transpose(0, 3, 1, 2)
        shown = self.wandb.Video(frames, fps=round(video.fps), format="mp4")
        self.run.log({f"samples/{name}": shown}, step=step)

    def close(self) -> None:
        self.run.finish()


class _Screen:
    """A line of progress on stderr that is kept up to date, or lines where that is no terminal."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self.total = total
        console = Console(stderr=True)
        self.progress = None
        if console.is_terminal:
            text = TextColumn("{task.fields[metrics]}")
            columns = (MofNCompleteColumn(), BarColumn(), Remaining(), text)
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task("", total=total, metrics="")
            self.progress.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        shown = [name for name in values if "/" not in name][:SHOWN]
        if "seconds_per_step" in values and "seconds_per_step" not in shown:
            shown.append("seconds_per_step")
        wrong = [name for name in values if name.startswith("nan/")]
        text = "  ".join(f"{name} {values[name]:.4g}" for name in [*shown, *wrong])
        if self.progress is None:
            print(f"{step}/{self.total}  {text}", file=sys.stderr, flush=True)
        else:
            self.progress.update(self.task, completed=step, metrics=text)

    def video(self, step: int, name: str, video: Video) -> None:
        pass  # not on a line

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def _library(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the log needs the package {name}: pip install {install}"
        ) from error


def _grid(frames: np.ndarray) -> np.ndarray:
    """(N, T, H, W, 3) -> (T, rows * H, columns * W, 3), nearly square; black where N ends."""
    import numpy as np

    if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(
            f"samples must be uint8 (N, T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}"
        )
    count, length, height, width, _ = frames.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    empty = np.zeros((rows * columns - count, *frames.shape[1:]), dtype=np.uint8)
    tiles = np.concatenate([frames, empty]).reshape(rows, columns, length, height, width, 3)
    return tiles.transpose(2, 0, 3, 1, 4, 5).reshape(length, rows * height, columns * width, 3)


def _memory(device: torch.device) -> dict[str, float]:
    """Most memory held, in GiB: on a GPU since the last call, else by the process so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": peak / 2**30}


def _plain(value: Any) -> Any:
    """As JSON has it, which knows neither NaN nor infinity."""
    number = float(value)
    return float(f"{number:.7g}") if math.isfinite(number) else str(number)


def _cut_half_a_line(path: Path) -> None:
    """Remove what a killed process began to write."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
