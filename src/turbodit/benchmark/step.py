"""One forward pass of a DiT, in every way that we can compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from turbodit.benchmark import draw
from turbodit.benchmark.measure import (
    WARM_UP,
    attempt,
    free,
    milliseconds,
    peak_gib,
    reset_peak,
)
from turbodit.benchmark.modes import (
    MODES,
    REFERENCE,
    Mode,
    build,
    chosen_modes,
    skipped_modes,
)
from turbodit.benchmark.profile import CLASSES, kernel_milliseconds, longest, shares
from turbodit.benchmark.report import (
    OUT_OF_MEMORY,
    Report,
    line,
    not_measured,
    paragraphs,
    percent,
    spread,
    table,
)
from turbodit.benchmark.workload import Inputs, Workload, dtype_on
from turbodit.graph import StepGraph
from turbodit.model.wan import WanModel

KERNELS_SHOWN = 12
REPEATS = {"cuda": 5, "cpu": 2}
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a step is measured.

    Attributes:
        repeats: measured calls, after those that warm up.
        graph: on a GPU, also as a CUDA graph.
        profile: on a GPU, which kernels a step runs.
    """

    repeats: int
    graph: bool = True
    profile: bool = True


@torch.no_grad()
def measure(
    workload: Workload,
    device: torch.device,
    modes: Mapping[str, Mode],
    options: Options,
    tell: Tell,
) -> dict[str, Any]:
    """All numbers as plain values."""
    rows: dict[str, dict[str, Any]] = {}
    velocities: dict[str, torch.Tensor] = {}
    for name, mode in modes.items():
        tell(f"step: {name}")
        free()
        keep = partial(velocities.__setitem__, name)
        found = measure_mode(mode, workload, device, options, keep)
        tell(f"step: {name}: {line(found)}")
        rows[name] = {"label": mode.label} | found
    for name, velocity in velocities.items():
        if REFERENCE in velocities:
            rows[name]["relative_l2"] = relative_l2(velocity, velocities[REFERENCE])
    return workload.summary() | {"repeats": options.repeats, "modes": rows}


def measure_mode(
    mode: Mode,
    workload: Workload,
    device: torch.device,
    options: Options,
    keep: Callable[[torch.Tensor], None],
) -> dict[str, Any]:
    """One mode: called from Python, profiled, and as a CUDA graph.

    Args:
        keep: given the velocity, float32 on the CPU.
    """
    ready = attempt(lambda: _ready(mode, workload, device))
    if ready is None:
        return {"eager": OUT_OF_MEMORY}
    network, inputs = ready
    found = attempt(lambda: _called(network, inputs, device, options, keep))
    if found is None:
        return {"eager": OUT_OF_MEMORY}
    if options.graph and device.type == "cuda" and isinstance(network, WanModel):
        found |= attempt(lambda: _replayed(network, inputs, device, options)) or {
            "graph": OUT_OF_MEMORY
        }
    return found


def _ready(mode: Mode, workload: Workload, device: torch.device) -> tuple[nn.Module, Inputs]:
    network = build(mode, workload.model, device)
    return network, Inputs.of(workload, device, dtype_on(device)).encoded(network)


def _called(
    network: nn.Module,
    inputs: Inputs,
    device: torch.device,
    options: Options,
    keep: Callable[[torch.Tensor], None],
) -> dict[str, Any]:
    step = inputs.step(network)
    keep(step().float().cpu())  # the first call, which also compiles
    reset_peak(device)
    times = milliseconds(step, device, options.repeats, WARM_UP[device.type] - 1)
    found: dict[str, Any] = {"eager": "measured", "eager_ms": times.summary()}
    found["peak_gib"] = peak_gib(device)
    if options.profile and device.type == "cuda":
        kernels = kernel_milliseconds(step)
        found |= {"share": shares(kernels), "kernels_ms": longest(kernels, KERNELS_SHOWN)}
    return found


def _replayed(
    network: WanModel, inputs: Inputs, device: torch.device, options: Options
) -> dict[str, Any]:
    graph = StepGraph(network)
    step = inputs.step(graph)
    step()  # captures
    reset_peak(device)
    times = milliseconds(step, device, options.repeats, warm_up=1)
    return {
        "graph": "measured",
        "graph_ms": times.summary(),
        "graph_peak_gib": peak_gib(device, graph),
    }


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||"""
    got, want = got.double(), want.double()
    return round(((got - want).norm() / want.norm()).item(), 6)


def report(
    workload: Workload,
    device: torch.device,
    names: tuple[str, ...] = (),
    options: Options | None = None,
    tell: Tell = print,
) -> Report:
    """Measure the modes called `names` (none: all that suit the device) and describe them.

    Raises:
        ValueError: an unknown mode, or one that does not run on the device.
    """
    modes = chosen_modes(names, device)
    options = options or Options(REPEATS[device.type])
    numbers = measure(workload, device, modes, options, tell)
    if not names:
        numbers["skipped"] = skipped_modes(device)
    return Report("step", workload.label, numbers, markdown(numbers), picture(numbers, workload))


def markdown(numbers: Mapping[str, Any]) -> str:
    """The modes, and the kernels of each that was profiled."""
    rows = numbers["modes"].values()
    header = (
        "",
        "called, ms",
        "CUDA graph, ms",
        "peak memory, GiB (called / graph)",
        *(f"{name}, share" for name in CLASSES),
        "relative L2 error",
    )
    profiled = [
        f"Longest kernels of {row['label']!r}:\n\n{_kernels(row['kernels_ms'])}"
        for row in rows
        if "kernels_ms" in row
    ]
    return paragraphs(
        f"One forward pass, {numbers['tokens']:,} tokens, {numbers['repeats']} calls each. Times "
        "are minimum / median / maximum in milliseconds. Weights are random, the same in every "
        f"mode; the error is that of the velocity against {MODES[REFERENCE].label!r}. Ours take "
        "the text encoded for cross attention, as all steps of a video share it. Random weights "
        "attend to all tokens nearly alike: a trained model loses less by sparse attention.",
        table(header, (_cells(row) for row in rows)),
        not_measured(numbers.get("skipped", {})),
        *profiled,
    )


def _kernels(milliseconds: Mapping[str, float]) -> str:
    return table(("kernel", "ms"), ((f"`{name}`", ms) for name, ms in milliseconds.items()))


def _cells(row: Mapping[str, Any]) -> list[Any]:
    if row["eager"] == OUT_OF_MEMORY:
        return [row["label"], OUT_OF_MEMORY, *[None] * (3 + len(CLASSES))]
    graph = spread(row.get("graph_ms"))
    if row.get("graph") == OUT_OF_MEMORY:
        graph = OUT_OF_MEMORY
    peaks = [row.get(name) for name in ("peak_gib", "graph_peak_gib")]
    error = row.get("relative_l2")
    return [
        row["label"],
        spread(row["eager_ms"]),
        graph,
        " / ".join(f"{peak:.2f}" for peak in peaks if peak is not None),
        *(percent(row.get("share", {}).get(name)) for name in CLASSES),
        None if error is None else f"{error:.2%}",
    ]


def picture(numbers: Mapping[str, Any], workload: Workload) -> Image.Image:
    """Medians as bars: of the CUDA graph where there is one."""
    rows = []
    for row in numbers["modes"].values():
        if row["eager"] == OUT_OF_MEMORY:
            rows.append(draw.Bar(row["label"], None, OUT_OF_MEMORY))
            continue
        times = row.get("graph_ms", row["eager_ms"])["median"]
        how = "CUDA graph" if "graph_ms" in row else "called"
        rows.append(draw.Bar(row["label"], times, f"{times:,.1f} ms, {how}"))
    return draw.bars(f"One DiT step, {workload.label}", rows)
