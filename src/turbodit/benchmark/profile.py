"""Which kernels a call runs on a GPU, and what kind of work they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

PROFILER_TRIES = 3
NAME_LENGTH = 80

# The first rule of which a part is in a kernel's name (in lower case) says its class; what no
# rule names is "rest": norms, rotations, casts, copies, quantisation of activations.
KERNEL_CLASSES = (
    # Attention of libraries, then ours with all that it finds out before the products.
    (("flash", "fmha", "sdpa", "attention"), "attention"),
    (("_statistics_kernel", "_combine_kernel", "_key_value_sums", "_add_parts"), "attention"),
    (("_quantize_keys", "_quantize_values", "_linear_output", "_forward_kernel"), "attention"),
    (("_pool_kernel", "_self_similarity", "_select_", "_from_map", "_from_indices"), "attention"),
    (("gemm", "nvjet", "cutlass", "splitk", "matmul", "gemv", "_scale_sums"), "GEMM"),
    (("_gelu_linear",), "GEMM"),
)
CLASSES = ("GEMM", "attention", "rest")


def kernel_class(name: str) -> str:
    """One of CLASSES."""
    lowered = name.lower()
    for parts, found in KERNEL_CLASSES:
        if any(part in lowered for part in parts):
            return found
    return "rest"


def shares(kernels: Mapping[str, float]) -> dict[str, float]:
    """What part of the kernels' time each class has; zeros where there are no kernels."""
    total = sum(kernels.values())
    sums = dict.fromkeys(CLASSES, 0.0)
    for name, time in kernels.items():
        sums[kernel_class(name)] += time
    return {name: round(time / total, 4) if total else 0.0 for name, time in sums.items()}


def longest(kernels: Mapping[str, float], count: int) -> dict[str, float]:
    """The kernels that take longest, names shortened; same names added up."""
    short: dict[str, float] = {}
    for name, time in kernels.items():
        short[name[:NAME_LENGTH]] = short.get(name[:NAME_LENGTH], 0.0) + time
    ordered = sorted(short.items(), key=lambda item: -item[1])
    return {name: round(time, 4) for name, time in ordered[:count]}


def kernel_milliseconds(call: Callable[[], Any], calls: int = 1) -> dict[str, float]:
    """Milliseconds of each GPU kernel in one call."""
    # Now and then the profiler sees nothing.
    for _ in range(PROFILER_TRIES):
        found = {
            event.key: event.self_device_time_total / 1000 / calls
            for event in _profiled(call, calls)
            if event.self_device_time_total > 0 and not event.is_user_annotation
        }
        if found:
            return found
    return {}


def _profiled(call: Callable[[], Any], calls: int) -> Iterable[Any]:
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
