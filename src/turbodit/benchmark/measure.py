"""Time and memory of calls, on a GPU or on a CPU."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from turbodit.graph import StepGraph

GIB = 2**30
# Calls before measured ones: on a GPU the first compiles, the second finds everything in place.
WARM_UP = {"cuda": 2, "cpu": 1}
ATTEMPTED = TypeVar("ATTEMPTED")


@dataclass(frozen=True)
class Times:
    """Of `n` measured calls, all in one unit, which is part of the name they are stored under."""

    min: float
    median: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Times:
        return cls(min(values), statistics.median(values), max(values), len(values))

    def scaled(self, factor: float) -> Times:
        return Times(self.min * factor, self.median * factor, self.max * factor, self.n)

    def summary(self, digits: int = 4) -> dict[str, float]:
        """As plain values for JSON, rounded."""
        return {name: round(value, digits) for name, value in asdict(self).items()}


def significant(value: float) -> float:
    """Rounded to four significant digits."""
    return float(f"{value:.4g}")


def milliseconds(
    call: Callable[[], Any], device: torch.device, repeats: int, warm_up: int | None = None
) -> Times:
    """Milliseconds of single calls.

    On a GPU they follow one another without a pause: what is measured is from the end of one to
    the end of the next, whether the GPU or the CPU that launches its kernels takes longer.
    """
    for _ in range(WARM_UP[device.type] if warm_up is None else warm_up):
        call()
    if device.type == "cuda":
        return Times.of(_cuda_milliseconds(call, repeats))
    return Times.of([1000 * elapsed(call, device) for _ in range(repeats)])


def replayed_milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> Times:
    """As `milliseconds`; on a GPU of replays of a CUDA graph: its own time alone."""
    if device.type != "cuda":
        return milliseconds(call, device, repeats)
    for _ in range(WARM_UP[device.type]):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return milliseconds(graph.replay, device, repeats)


def _cuda_milliseconds(call: Callable[[], Any], repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def elapsed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds until a call's work is done."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    """Give back memory that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """From here on `peak_gib` counts, beginning with what is allocated now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device, graph: StepGraph | None = None) -> float | None:
    """Most GiB taken on a GPU since `reset_peak`; None on a CPU, where nobody counts.

    Args:
        graph: whose memory is taken all the time, but not counted as allocated.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    held = 0 if graph is None else graph.memory
    return round((torch.cuda.max_memory_allocated() + held) / GIB, 3)


def host_peak_gib() -> float:
    """Most GiB of memory that this process has held so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round((peak if sys.platform == "darwin" else 1024 * peak) / GIB, 3)


def attempt(call: Callable[[], ATTEMPTED]) -> ATTEMPTED | None:
    """What `call` gives, or None if the GPU's memory was too small for it."""
    try:
        return call()
    except torch.OutOfMemoryError:
        pass
    free()  # only here: the error held on to every tensor of the call
    return None
