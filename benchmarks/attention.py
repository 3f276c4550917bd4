"""Attention back-ends side by side: time, memory, where the time goes, and accuracy.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cpu      # small sizes, to see that it runs

1. Time of each back-end at the shapes of Wan's self attention, medians of one run beside
   PyTorch's own attention, as a CUDA graph (what a model that is captured takes) and called from
   Python (where the CPU may take longer than the GPU); the memory that a call takes beside its
   inputs; the kernels it runs.
2. Speed over the sequence length, as a drawing.
3. Accuracy against float32 attention on Gaussian inputs, on inputs with outlier channels and
   large K means, and on what SpriteWan's layers see. Sparse back-ends are compared with exact
   attention over the key blocks that they keep.

Writes `<out>/<date>-<device>-attention.json` and `.svg`, and prints tables in markdown.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro

from turbodit.attention import attention_function, available
from turbodit.attention.sla import SageSLA, SparseLinearAttention
from turbodit.kernels.block_map import map_from_indices

RATIO = 0.1
SMALL_BLOCKS = {"block_q": 32, "block_k": 32}  # where a sequence has few
TRAINABLE = ("sdpa-cudnn", "flash3", "flash4", "sla", "sla 128x64")
WARM_UP = 3
PROFILER_TRIES = 3
KERNELS_SHOWN = 12
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Options:
    out: Path = Path("benchmarks/results")
    device: str = "cuda"
    repeats: int = 20


@dataclass(frozen=True)
class Shape:
    name: str
    length: int
    heads: int
    dim: int = 128
    train: bool = False  # the backward pass too


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device.

    Attributes:
        contenders: settings of each; its first word names the back-end.
        lengths: of the drawing.
        accuracy: of the inputs that are made up.
    """

    contenders: dict[str, dict[str, Any]]
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


# What is compared.


def missing(sizes: Sizes, device: str) -> dict[str, str]:
    """Contenders that do not run here, and why."""
    found = {name: available(name.split()[0], device) for name in sizes.contenders}
    return {name: reason for name, (runs, reason) in found.items() if not runs}


def contenders(dim: int, sizes: Sizes, device: str) -> dict[str, Attention]:
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


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention in the dtype of its inputs; kept (B, H, Lq, Lk) bool."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=kept).transpose(1, 2)


def inputs(shape: Shape, device: str, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v (1, L, H, D) bfloat16, Gaussian."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (3, 1, shape.length, shape.heads, shape.dim)
    return list(torch.randn(size, generator=generator, device=device).bfloat16().unbind())


# Time, memory, kernels.


def milliseconds(call: Callable[[], Any], device: str, repeats: int) -> dict[str, float]:
    """Median and minimum of single calls; on a GPU of replays of a CUDA graph."""
    for _ in range(WARM_UP):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        replayed = list(_cuda_times(graph.replay, repeats))
        called = {"called_ms": round(statistics.median(_cuda_times(call, repeats)), 3)}
    else:
        replayed, called = list(_cpu_times(call, repeats)), {}
    times = {"median_ms": statistics.median(replayed), "min_ms": min(replayed)}
    return {name: round(value, 3) for name, value in times.items()} | called


def _cuda_times(call: Callable[[], Any], repeats: int) -> Iterator[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    for start, end in events:
        yield start.elapsed_time(end)


def _cpu_times(call: Callable[[], Any], repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        yield 1000 * (time.perf_counter() - start)


def extra_gib(call: Callable[[], Any]) -> float:
    """Peak memory of a call beside what was there before it; its output is part of it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)


def kernels(call: Callable[[], Any], calls: int = 5) -> dict[str, float]:
    """Milliseconds of each GPU kernel in one call, the longest first."""
    # Now and then the profiler sees nothing.
    for _ in range(PROFILER_TRIES):
        events = [
            event
            for event in profiled(call, calls)
            if event.self_device_time_total > 0 and not event.is_user_annotation
        ]
        if events:
            break
    events.sort(key=lambda event: -event.self_device_time_total)
    return {
        event.key[:80]: round(event.self_device_time_total / 1000 / calls, 4)
        for event in events[:KERNELS_SHOWN]
    }


def profiled(call: Callable[[], Any], calls: int) -> Iterable[Any]:
    """The profiler's totals of some calls, after as many to start it up."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA],
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1),
        acc_events=True,  # else they are gone when their part of the schedule ends
    ) as profiler:
        for _ in range(2):
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
            profiler.step()
    return profiler.key_averages()


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


def measured(call: Callable[[], Any], options: Options) -> dict[str, Any]:
    result: dict[str, Any] = milliseconds(call, options.device, options.repeats)
    if options.device == "cuda":
        result |= {"extra_gib": extra_gib(call), "kernels_ms": kernels(call)}
    return result


def speed(shape: Shape, sizes: Sizes, options: Options) -> dict[str, Any]:
    """Every contender at one shape."""
    tensors = inputs(shape, options.device)
    results = {}
    for name, run in contenders(shape.dim, sizes, options.device).items():
        results[name] = measured(forward(run, tensors), options)
        if shape.train and name in TRAINABLE:
            call = forward_backward(run, tensors)
            results[f"{name}, forward + backward"] = measured(call, options)
    return {**asdict(shape), "results": results}


def over_length(sizes: Sizes, options: Options) -> dict[str, dict[int, float]]:
    """TFLOP/s that dense attention would need to be as fast, by contender and length."""
    first = sizes.shapes[0]
    curves: dict[str, dict[int, float]] = {}
    for length in sizes.lengths:
        shape = Shape(f"L={length}", length, first.heads, first.dim)
        tensors = inputs(shape, options.device)
        for name, run in contenders(shape.dim, sizes, options.device).items():
            taken = milliseconds(forward(run, tensors), options.device, options.repeats)
            flop = 4 * length**2 * shape.heads * shape.dim
            curves.setdefault(name, {})[length] = round(flop / taken["median_ms"] / 1e9, 4)
    return curves


# Accuracy.


def with_outliers(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Some channels of q, k and v are far larger than the rest, and K has a large mean."""
    q, k, v = (x.float() for x in tensors)
    dim = q.shape[-1]
    channels = torch.arange(0, dim, dim // 4, device=q.device)
    k[..., channels] *= 4
    q[..., channels + 1] *= 4
    v[..., channels + 2] *= 10
    generator = torch.Generator(q.device).manual_seed(1)
    k += 5 * torch.randn(1, 1, *k.shape[2:], generator=generator, device=k.device)
    return [x.bfloat16() for x in (q, k, v)]


def recorded(device: str) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """q, k, v of some layers of SpriteWan at some steps of making a clip."""
    from turbodit.pipeline import Pipeline

    pipe = Pipeline.from_pretrained("spritewan", device=device)
    (model,) = pipe.transformers.values()
    layers = {0: "first", len(model.blocks) // 2: "middle", len(model.blocks) - 1: "last"}
    seen: dict[int, list[list[torch.Tensor]]] = {index: [] for index in layers}
    for index in layers:

        def record(_: torch.nn.Module, qkv: tuple[torch.Tensor, ...], of: int = index) -> None:
            seen[of].append([x[:1].to(torch.bfloat16, copy=True) for x in qkv])

        model.blocks[index].self_attn.attn_op.register_forward_pre_hook(record)
    pipe("a big red fox runs to the right through the snow", steps=4, seed=0)
    for index, calls in seen.items():
        for when, position in (("noise", 0), ("clean", -1)):
            yield f"SpriteWan, {layers[index]} layer, most {when}", calls[position]


def errors(got: torch.Tensor, want: torch.Tensor) -> dict[str, float]:
    got, want = got.double().flatten(), want.double().flatten()
    difference = got - want
    return {
        "relative_l2": (difference.norm() / want.norm()).item(),
        "relative_l1": (difference.abs().sum() / want.abs().sum()).item(),
        "rmse": difference.square().mean().sqrt().item(),
        "cosine": F.cosine_similarity(got, want, dim=0).item(),
    }


def kept_tokens(module: SparseLinearAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The module's block map as a map of tokens: bool (B, H, Lq, Lk)."""
    blocks = map_from_indices(module.block_indices(q, k), None, -(-k.shape[1] // module.block_k))
    tokens = blocks.repeat_interleave(module.block_q, 2).repeat_interleave(module.block_k, 3)
    return tokens[:, :, : q.shape[1], : k.shape[1]]


@torch.no_grad()
def accuracy(tensors: list[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Of 16-bit and 8-bit attention, dense and over the kept blocks (no linear branch)."""
    q, k, v = tensors
    wide = [x.float() for x in tensors]
    dim, device = q.shape[-1], q.device
    want = exact(*wide)
    results = {name: errors(attention_function(name)(q, k, v), want) for name in ("sdpa", "sage")}
    blocks = {} if q.shape[1] >= 4_096 else SMALL_BLOCKS
    for name, kind in (("sla", SparseLinearAttention), ("sagesla", SageSLA)):
        module = kind(dim, RATIO, **blocks).to(device)
        kept = kept_tokens(module, q, k)
        want = exact(*wide, kept)
        results[f"sdpa over the blocks of {name}"] = errors(exact(q, k, v, kept), want)
        results[name] = errors(module(q, k, v), want)
    return results


def all_accuracy(sizes: Sizes, options: Options) -> dict[str, Any]:
    gaussian = inputs(sizes.accuracy, options.device)
    cases: Iterable[tuple[str, list[torch.Tensor]]] = (
        ("Gaussian", gaussian),
        ("outlier channels, large K means", with_outliers(gaussian)),
        *recorded(options.device),
    )
    return {name: accuracy(tensors) for name, tensors in cases}


# What is written.


def markdown(results: dict[str, Any]) -> str:
    lines = [f"{results['device']}, torch {results['torch']}, {results['repeats']} calls each", ""]
    lines += [f"Not measured: {name}, {why}" for name, why in results["missing"].items()]
    for shape in results["speed"]:
        lines += [
            f"{shape['name']}: L = {shape['length']}, {shape['heads']} heads of {shape['dim']}",
            "",
            "| | median ms | minimum ms | called from Python, ms | extra memory, GiB |",
            "|---|---|---|---|---|",
        ]
        for name, row in shape["results"].items():
            numbers = (
                row.get(key, "") for key in ("median_ms", "min_ms", "called_ms", "extra_gib")
            )
            lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
        lines.append("")
    lines += ["| accuracy | | relative L2 | cosine |", "|---|---|---|---|"]
    for case, rows in results["accuracy"].items():
        for name, row in rows.items():
            lines.append(f"| {case} | {name} | {row['relative_l2']:.2%} | {row['cosine']:.5f} |")
    return "\n".join(lines) + "\n"


def drawing(curves: dict[str, dict[int, float]], title: str) -> str:
    """TFLOP/s over L as SVG; both axes logarithmic."""
    colours = (
        "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c",
        "#ccb974", "#64b5cd", "#2f6f4f", "#000000",
    )  # fmt: skip
    lengths = sorted(next(iter(curves.values())))
    highest = max(max(curve.values()) for curve in curves.values())
    lowest = min(min(curve.values()) for curve in curves.values())

    def place(value: float, low: float, high: float, start: int, end: int) -> float:
        share = torch.log(torch.tensor(value / low)) / torch.log(torch.tensor(high / low))
        return round(start + (end - start) * share.item(), 1)

    def x(length: int) -> float:
        return place(length, lengths[0], lengths[-1], 60, 480)

    def y(value: float) -> float:
        return place(value, lowest, highest, 320, 40)

    parts = [f'<text x="60" y="20">{title}: TFLOP/s of dense attention over L</text>']
    parts += [f'<text x="{x(n) - 15}" y="345">{n}</text>' for n in lengths]
    parts += [f'<text x="5" y="{y(value)}">{value:.3g}</text>' for value in (lowest, highest)]
    for (name, curve), colour in zip(curves.items(), cycle(colours), strict=False):
        points = " ".join(f"{x(length)},{y(value)}" for length, value in curve.items())
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        end = y(curve[lengths[-1]])
        parts.append(f'<text x="490" y="{end}" fill="{colour}">{name}</text>')
    body = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="360" font-family="sans-serif"'
        f' font-size="11">\n<rect width="640" height="360" fill="white"/>\n{body}\n</svg>\n'
    )


def main(options: Options) -> None:
    torch.manual_seed(0)
    sizes = GPU if options.device == "cuda" else CPU
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    results: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repeats": options.repeats,
        "triton": version("triton") if options.device == "cuda" else None,
        "ratio": RATIO,
        "missing": missing(sizes, options.device),
        "speed": [speed(shape, sizes, options) for shape in sizes.shapes],
        "tflops_over_length": over_length(sizes, options),
        "accuracy": all_accuracy(sizes, options),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{date.today()}-{device.replace(' ', '-').lower()}-attention"
    (options.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / f"{name}.svg").write_text(drawing(results["tflops_over_length"], device))
    print(markdown(results))


if __name__ == "__main__":
    main(tyro.cli(Options))
