"""Attention back-ends side by side: time, memory, where the time goes, and accuracy.

1. Time of each back-end at the shapes of Wan's self attention, beside PyTorch's own attention, as
   a CUDA graph (what a model that is captured takes) and called from Python (where the CPU may
   take longer than the GPU); the memory that a call takes beside its inputs; the kernels it runs.
2. Speed over the sequence length, as a drawing.
3. Accuracy (`attention_accuracy`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from turbodit.attention import BACKENDS, attention_function, available
from turbodit.benchmark import draw
from turbodit.benchmark.attention_accuracy import all_accuracy
from turbodit.benchmark.measure import (
    GIB,
    free,
    milliseconds,
    replayed_milliseconds,
    reset_peak,
    significant,
)
from turbodit.benchmark.modes import RATIO
from turbodit.benchmark.profile import kernel_milliseconds, longest
from turbodit.benchmark.report import Report, not_measured, paragraphs, spread, table
from turbodit.benchmark.workload import Workload
from turbodit.kernels.attention_jvp import attention_jvp

SMALL_BLOCKS = {"block_q": 32, "block_k": 32}  # where a sequence has few
TRAINABLE = ("sdpa-cudnn", "flash3", "flash4", "sla", "sla 128x64")
TRAINED_HEADS = 12  # the backward passes of larger models take minutes
KERNELS_SHOWN, PROFILED_CALLS = 12, 5
REPEATS = {"cuda": 20, "cpu": 2}
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """Of q, k and v: (1, length, heads, dim)."""

    name: str
    length: int
    heads: int
    dim: int = 128
    train: bool = False  # what training needs, too: the backward pass, and the tangent


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device.

    Attributes:
        contenders: settings of each; its first word names the back-end.
        lengths: of the drawing.
        accuracy: of the inputs that are made up.
    """

    contenders: Mapping[str, Mapping[str, Any]]
    shapes: tuple[Shape, ...]
    lengths: tuple[int, ...]
    accuracy: Shape


GPU = Sizes(
    contenders={
        "sdpa-cudnn": {},
        "sdpa-flash": {},
        "flash3": {},
        "flash4": {},
        "sage": {},
        "sparge 0.5": {"ratio": 0.5},
        "sla": {"ratio": RATIO},
        "sla 128x64": {"ratio": RATIO, "block_q": 128},
        "sagesla": {"ratio": RATIO},
        "sagesla 0.15": {"ratio": 0.15},
        "linear": {},
    },
    shapes=(
        Shape("1.3B 480p", 32_760, 12, train=True),
        Shape("14B 480p", 32_760, 40),
        Shape("14B 720p", 75_600, 40),
    ),
    lengths=(2_048, 4_096, 8_192, 16_384, 32_768, 65_536),
    accuracy=Shape("accuracy", 8_192, 4),
)
CPU = Sizes(
    contenders={
        "sdpa": {},
        "sage": {},
        "sparge 0.5": {"ratio": 0.5, **SMALL_BLOCKS},
        "sla": {"ratio": RATIO, **SMALL_BLOCKS},
        "sagesla": {"ratio": RATIO, **SMALL_BLOCKS},
        "sagesla 0.15": {"ratio": 0.15, **SMALL_BLOCKS},
        "linear": {},
    },
    shapes=(Shape("small", 1_024, 2, 64, train=True),),
    lengths=(512, 1_024),
    accuracy=Shape("accuracy", 512, 2, 64),
)


def sizes_for(device: torch.device, workload: Workload | None) -> Sizes:
    """The device's own, or those with the one shape of a model's self attention."""
    sizes = GPU if device.type == "cuda" else CPU
    if workload is None:
        return sizes
    config = workload.model.transformer
    shape = Shape(
        workload.label,
        workload.tokens,
        config.num_heads,
        config.head_dim,
        train=config.num_heads <= TRAINED_HEADS,
    )
    own = workload.model.attention_blocks
    blocks = {} if own is None else dict(zip(("block_q", "block_k"), own, strict=True))
    contenders = {
        name: {**settings, **(blocks if _has_blocks(name) else {})}
        for name, settings in sizes.contenders.items()
    }
    return replace(sizes, shapes=(shape,), contenders=contenders)


def _has_blocks(contender: str) -> bool:
    return "block_q" in BACKENDS[contender.split()[0]].settings


# What is compared.


def missing(sizes: Sizes, device: torch.device) -> dict[str, str]:
    """Contenders that do not run here, and why."""
    found = {name: available(name.split()[0], device) for name in sizes.contenders}
    return {name: reason for name, (runs, reason) in found.items() if not runs}


def contenders(dim: int, sizes: Sizes, device: torch.device) -> dict[str, Attention]:
    """Those that run here; the ones with parameters have a linear branch, as after training."""
    absent = missing(sizes, device)
    found = {
        name: attention_function(name.split()[0], head_dim=dim, **settings)
        for name, settings in sizes.contenders.items()
        if name not in absent
    }
    for module in found.values():
        if isinstance(module, torch.nn.Module):
            module.to(device)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
    return found


def inputs(shape: Shape, device: torch.device, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v (1, L, H, D) bfloat16, Gaussian."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (3, 1, shape.length, shape.heads, shape.dim)
    return list(torch.randn(size, generator=generator, device=device).bfloat16().unbind())


def forward(run: Attention, tensors: list[torch.Tensor]) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            run(*tensors)

    return call


def forward_backward(run: Attention, tensors: list[torch.Tensor]) -> Callable[[], Any]:
    points = [x.detach().requires_grad_() for x in tensors]
    grad = torch.randn_like(points[0])
    leaves = [*points, *(run.parameters() if isinstance(run, torch.nn.Module) else ())]

    def call() -> None:
        torch.autograd.grad(run(*points), leaves, grad)

    return call


def forward_tangent(tensors: list[torch.Tensor]) -> Callable[[], Any]:
    tangents = [torch.randn_like(x) for x in tensors]

    def call() -> None:
        with torch.no_grad():
            attention_jvp(*tensors, *tangents)

    return call


# Measuring.


def measured(call: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, Any]:
    """Times of one call; on a GPU also its memory and kernels."""
    times = replayed_milliseconds(call, device, repeats)
    result: dict[str, Any] = {"ms": times.summary()}
    if device.type == "cuda":
        kernels = longest(kernel_milliseconds(call, PROFILED_CALLS), KERNELS_SHOWN)
        result["called_ms"] = milliseconds(call, device, repeats).summary()
        result |= {"extra_gib": extra_gib(call, device), "kernels_ms": kernels}
    return result


def extra_gib(call: Callable[[], Any], device: torch.device) -> float:
    """Peak memory of a call beside what was there before it; its output is part of it."""
    free()
    reset_peak(device)
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / GIB, 3)


def speed(shape: Shape, sizes: Sizes, device: torch.device, repeats: int) -> dict[str, Any]:
    """Every contender at one shape."""
    tensors = inputs(shape, device)
    results = {}
    for name, run in contenders(shape.dim, sizes, device).items():
        results[name] = measured(forward(run, tensors), device, repeats)
        if shape.train and name in TRAINABLE:
            call = forward_backward(run, tensors)
            results[f"{name}, forward + backward"] = measured(call, device, repeats)
    if shape.train:
        results["sdpa, forward + tangent"] = measured(forward_tangent(tensors), device, repeats)
    return {**asdict(shape), "results": results}


def over_length(sizes: Sizes, device: torch.device, repeats: int) -> dict[str, dict[int, float]]:
    """TFLOP/s that dense attention would need to be as fast, by contender and length."""
    first = sizes.shapes[0]
    curves: dict[str, dict[int, float]] = {}
    for length in sizes.lengths:
        shape = Shape(f"L={length}", length, first.heads, first.dim)
        tensors = inputs(shape, device)
        for name, run in contenders(shape.dim, sizes, device).items():
            taken = replayed_milliseconds(forward(run, tensors), device, repeats)
            flop = 4 * length**2 * shape.heads * shape.dim
            curves.setdefault(name, {})[length] = significant(flop / taken.median / 1e9)
    return curves


def accuracy(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Relative errors by case and back-end."""
    return all_accuracy(inputs(sizes.accuracy, device), device)


# What is written.


def report(
    device: torch.device,
    workload: Workload | None = None,
    repeats: int | None = None,
    tell: Tell = print,
) -> Report:
    """Measure all that runs here, at the shapes of Wan's models or of one, and describe it."""
    torch.manual_seed(0)
    repeats = repeats or REPEATS[device.type]
    sizes = sizes_for(device, workload)
    shapes = []
    for shape in sizes.shapes:
        tell(f"attention: {shape.name}")
        shapes.append(speed(shape, sizes, device, repeats))
    tell("attention: over length")
    curves = over_length(sizes, device, repeats)
    tell("attention: accuracy")
    numbers = {
        "repeats": repeats,
        "ratio": RATIO,
        "missing": missing(sizes, device),
        "speed": shapes,
        "tflops_over_length": curves,
        "accuracy": accuracy(sizes, device),
    }
    picture = draw.lines(
        "Attention forward: FLOP of dense attention by time", curves, "tokens", "TFLOP/s"
    )
    subject = "" if workload is None else workload.label
    return Report("attention", subject, numbers, markdown(numbers), picture)


def markdown(numbers: Mapping[str, Any]) -> str:
    """Times by shape, and errors."""
    header = ("", "ms", "called from Python, ms", "extra memory, GiB")
    parts = [
        f"{numbers['repeats']} calls each; minimum / median / maximum.",
        not_measured(numbers["missing"]),
    ]
    for shape in numbers["speed"]:
        parts.append(
            f"{shape['name']}: L = {shape['length']}, {shape['heads']} heads of {shape['dim']}"
        )
        parts.append(table(header, (_cells(*row) for row in shape["results"].items())))
    errors = (
        (case, name, f"{row['relative_l2']:.2%}", f"{row['cosine']:.5f}")
        for case, rows in numbers["accuracy"].items()
        for name, row in rows.items()
    )
    return paragraphs(*parts, table(("accuracy", "", "relative L2", "cosine"), errors))


def _cells(name: str, row: Mapping[str, Any]) -> list[Any]:
    called = spread(row.get("called_ms"), 3)
    return [name, spread(row["ms"], 3), called, row.get("extra_gib")]
