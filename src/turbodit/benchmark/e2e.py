"""A whole generation, from the prompt to the mp4: seconds and memory of every stage.

The first video of a process (cold: kernels compile, memory is asked for) and the ones after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from turbodit.benchmark import draw
from turbodit.benchmark.measure import (
    GIB,
    Times,
    elapsed,
    host_peak_gib,
    peak_gib,
    reset_peak,
)
from turbodit.benchmark.modes import sparse_settings
from turbodit.benchmark.report import Report, paragraphs, spread, table
from turbodit.benchmark.workload import Workload, dtype_on, known_images
from turbodit.checkpoints.folder import EMBEDDED
from turbodit.pipeline import Pipeline
from turbodit.random_models import random_pipeline
from turbodit.video import Video

PROMPT = "a big red fox runs to the right through the snow"
STAGES = ("text", "image", "denoise", "decode", "write")
ROWS = {  # of the table: a stage or a part of one, and what it is called
    "text": "text",
    "image": "image",
    "denoise": "denoise",
    "denoise_step": "of it one step",
    "decode": "decode",
    "write": "mp4",
    "total": "total",
}
REPEATS = {"cuda": 3, "cpu": 1}
SEED = 0
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a video is made.

    Attributes:
        repeats: warm videos.
        build: arguments of the pipeline: attention, linear, residual, graph.
        request: fields of the request: steps, solver, guidance.
    """

    repeats: int
    build: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)


def load(workload: Workload, device: torch.device, build: Mapping[str, Any]) -> Pipeline:
    """The embedded models with their own weights, any other with random ones."""
    if workload.model.name in EMBEDDED:
        return Pipeline.from_pretrained(workload.model.name, device=device, **build)
    if build.get("attention") in ("sagesla", "sla", "sparge"):
        own = sparse_settings(workload.model, build["attention"])
        build = {"attention_settings": own, **build}
    return random_pipeline(workload.model, device=device, dtype=dtype_on(device), **build)


def generation(
    pipe: Pipeline, workload: Workload, request: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Seconds and GiB of each stage of one video, written to `folder`."""
    images = known_images(workload.model, workload.width, workload.height)
    video = pipe(
        PROMPT,
        width=workload.width,
        height=workload.height,
        frames=workload.frames,
        seed=SEED,
        **images,
        **request,
    )
    assert isinstance(video, Video)  # one prompt, one video
    writing = elapsed(lambda: video.save(folder / "clip.mp4", force=True), pipe.device)
    seconds = video.timings | {"write": writing}
    total = sum(seconds[stage] for stage in STAGES if stage in seconds)
    return {
        "seconds": {name: round(value, 4) for name, value in (seconds | {"total": total}).items()},
        "peak_gib": {name: round(taken / GIB, 3) for name, taken in pipe.stage_memory.items()},
        "settings": video.settings,
    }


def summary(loading: float, videos: list[dict[str, Any]]) -> dict[str, Any]:
    """The first video as it was, the others' stages as times; all in seconds."""
    first, *others = videos
    return {
        "load_seconds": round(loading, 4),
        "settings": first["settings"],
        "cold_seconds": first["seconds"],
        "warm_seconds": {
            name: Times.of([video["seconds"][name] for video in others]).summary()
            for name in (first["seconds"] if others else ())
        },
        "peak_gib": {
            stage: max(video["peak_gib"][stage] for video in videos) for stage in first["peak_gib"]
        },
    }


def report(
    workload: Workload,
    device: torch.device,
    options: Options | None = None,
    tell: Tell = print,
) -> Report:
    """Load, make one video and `repeats` more, and describe it."""
    options = options or Options(REPEATS[device.type])
    loaded: list[Pipeline] = []
    tell("e2e: load")
    reset_peak(device)
    loading = elapsed(lambda: loaded.append(load(workload, device, options.build)), device)
    loading_peak = peak_gib(device)
    videos = []
    with TemporaryDirectory(prefix="turbodit-bench-") as folder:
        for number in range(1 + options.repeats):
            tell(f"e2e: video {number + 1} of {1 + options.repeats}")
            videos.append(generation(loaded[0], workload, options.request, Path(folder)))
    numbers = workload.summary() | {
        "weights": "embedded" if workload.model.name in EMBEDDED else "random",
        "build": dict(options.build),
        "repeats": options.repeats,
        **summary(loading, videos),
        "load_peak_gib": loading_peak,
        "host_peak_gib": host_peak_gib(),
    }
    return Report("e2e", workload.label, numbers, markdown(numbers), picture(numbers, workload))


def markdown(numbers: Mapping[str, Any]) -> str:
    """Stages as rows."""
    settings = numbers["settings"]
    built = ", ".join(f"{name} {value}" for name, value in numbers["build"].items() if value)
    cold, warm, peaks = (numbers[name] for name in ("cold_seconds", "warm_seconds", "peak_gib"))
    rows: list[Sequence[Any]] = [
        ("load", f"{numbers['load_seconds']:.3f}", None, numbers["load_peak_gib"])
    ]
    rows += [
        (title, f"{cold[name]:.3f}", spread(warm.get(name), 3), peaks.get(name))
        for name, title in ROWS.items()
        if name in cold
    ]
    warm_header = f"warm, s (min / median / max of {numbers['repeats']})"
    return paragraphs(
        f"{settings['steps']} steps of {settings['solver']}, guidance {settings['guidance']:g}, "
        f"{numbers['weights']} weights{built and ', ' + built}. Most host memory: "
        f"{numbers['host_peak_gib']:.2f} GiB. The total is without loading.",
        table(("stage", "first video, s", warm_header, "peak memory, GiB"), rows),
    )


def picture(numbers: Mapping[str, Any], workload: Workload) -> Image.Image:
    """Seconds of the stages: medians of the warm videos, where there are some."""
    warm = numbers["warm_seconds"]
    rows = [
        draw.Bar(stage, seconds, f"{seconds:.3f} s")
        for stage in STAGES
        if stage in numbers["cold_seconds"]
        and (seconds := warm[stage]["median"] if warm else numbers["cold_seconds"][stage]) > 0
    ]
    kind = "warm" if warm else "first video"
    return draw.bars(f"From prompt to mp4, seconds, {kind}: {workload.label}", rows)
