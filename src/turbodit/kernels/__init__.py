"""Operations in plain PyTorch and in Triton; each package's `reference` is its specification."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

HEAD_DIMS = (64, 128)  # that the attention kernels have tiles for
LOG2_E = math.log2(math.e)  # GPUs have exp2, not exp


def implementation(package: str, x: torch.Tensor) -> ModuleType:
    """An operation's kernels where x is on a GPU, else its reference; `package` is its name.

    Triton is imported where it is needed: it is not on every machine.
    """
    return importlib.import_module(f"{package}.{'triton' if x.is_cuda else 'reference'}")


def too_old(device: torch.device, capability: tuple[int, int]) -> str | None:
    """What a GPU of less than a compute capability lacks; None if it has it."""
    found = torch.cuda.get_device_properties(device)
    if (found.major, found.minor) >= capability:
        return None
    wanted = ".".join(map(str, capability))
    return f"needs compute capability {wanted}, {found.name} has {found.major}.{found.minor}"


def missing(device: torch.device, capability: tuple[int, int] = (8, 0)) -> str | None:
    """What kernels miss on a device; None if they run. On a CPU their references do."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return "needs a CPU or a CUDA device"
    old = too_old(device, capability)
    if old is None and importlib.util.find_spec("triton") is None:
        return "needs the package triton: pip install triton"
    return old


@functools.cache
def kernels_run(device: torch.device) -> bool:
    """Whether kernels run on a device; the answer is kept."""
    return missing(device) is None


def wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums of a dtype are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def custom_op(
    name: str, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Makes a function whose first argument is a tensor the PyTorch operator `name`.

    `mutates` names the arguments that it writes to.

    Two things of its caller's must not reach into it: the current CUDA device, where Triton
    would launch whatever the device of its tensors, and autocast, which would round the
    float32 matrix products of a reference.
    """

    def register(run: Callable[..., Any]) -> torch.library.CustomOpDef:
        @functools.wraps(run)
        def apart(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
                return run(x, *args, **kwargs)

        return torch.library.custom_op(name, apart, mutates_args=mutates)

    return register
