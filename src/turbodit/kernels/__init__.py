"""Operations in plain PyTorch and in Triton; each package's `reference` is its specification."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

HEAD_DIMS = (64, 128)  # that the attention kernels have tiles for


def custom_op(name: str) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Makes a function whose first argument is a tensor the PyTorch operator `name`.

    Two things of its caller's must not reach into it: the current CUDA device, where Triton
    would launch whatever the device of its tensors, and autocast, which would round the
    float32 matrix products of a reference.
    """

    def register(run: Callable[..., Any]) -> torch.library.CustomOpDef:
        @functools.wraps(run)
        def apart(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
                return run(x, *args, **kwargs)

        return torch.library.custom_op(name, apart, mutates_args=())

    return register
