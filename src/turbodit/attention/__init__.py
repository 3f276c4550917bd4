"""Attention: one call over (B, L, H, D) tensors, and the table of back-ends behind it.

A model asks for a back-end by name when it is built and keeps what it gets: nothing is chosen
at import time, from the environment, or silently in place of another.

Shapes: B batch, Lq/Lk query/key length, H heads, D head dimension.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from typing import Any

import torch

from turbodit import kernels
from turbodit.attention import dense, linear, sage
from turbodit.attention.block_sparse import block_sparse_attn
from turbodit.attention.jvp import sdpa_with_tangent
from turbodit.attention.sage import sageattn
from turbodit.attention.sla import SageSLA, SparseLinearAttention
from turbodit.attention.sparge import sparge_attn_cdf, sparge_attn_topk
from turbodit.attention.temporal import check_temporal_heads

__all__ = [
    "BACKENDS",
    "TEMPORAL_HEADS",
    "AttentionFunction",
    "Backend",
    "SageSLA",
    "SparseLinearAttention",
    "attention_function",
    "available",
    "block_sparse_attn",
    "sageattn",
    "sparge_attn_cdf",
    "sparge_attn_topk",
]

AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# The setting that the model sees to: the heads whose tokens come place by place (`temporal`).
TEMPORAL_HEADS = "temporal_heads"


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        build: settings by keyword -> (q (B,Lq,H,D), k (B,Lk,H,D), v (B,Lk,H,D)) ->
            (B,Lq,H,D), non-causal, scaled by 1/sqrt(D).
        missing: what keeps it from running on a device, or None if it runs.
        description: one line for `turbodit doctor`.
        settings: names that `build` takes, and TEMPORAL_HEADS where blocks depend on them.
        self_only: approximates attention within one sequence; not for cross attention.
        has_parameters: `build` also takes `head_dim`, and gives a new `torch.nn.Module`, for
            one layer of a model.
    """

    build: Callable[..., AttentionFunction]
    missing: Callable[[torch.device], str | None]
    description: str
    settings: tuple[str, ...] = ()
    self_only: bool = False
    has_parameters: bool = False


def _needs(
    modules: tuple[str, ...] = (), install: str = "", capability: tuple[int, int] = (8, 0)
) -> Callable[[torch.device], str | None]:
    """What a library's back-end misses on a device: CUDA, a newer device, or its modules."""

    def missing(device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs a CUDA device"
        return kernels.too_old(device, capability) or _not_installed(modules, install)

    return missing


def _not_installed(modules: tuple[str, ...], install: str) -> str | None:
    absent = next((module for module in modules if not _is_there(module)), None)
    return absent and f"needs the package {absent}: pip install {install}"


def _is_there(module: str) -> bool:
    """Whether a module or submodule can be found; nothing is imported for it."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not rest:
        return spec is not None
    return PathFinder.find_spec(module, spec.submodule_search_locations or []) is not None


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(
        build=lambda: sdpa_with_tangent,
        missing=lambda device: None,
        description="PyTorch's scaled_dot_product_attention, which chooses among the next four",
    ),
    "sdpa-cudnn": Backend(
        build=lambda: partial(dense.sdpa_by, "cudnn"),
        missing=_needs(),
        description="the same, always by cuDNN",
    ),
    "sdpa-flash": Backend(
        build=lambda: partial(dense.sdpa_by, "flash"),
        missing=lambda device: None if device.type == "cpu" else _needs()(device),
        description="the same, always by its FlashAttention-2",
    ),
    "sdpa-efficient": Backend(
        build=lambda: partial(dense.sdpa_by, "efficient"),
        missing=_needs(capability=(5, 0)),
        description="the same, always by its memory-efficient attention",
    ),
    "sdpa-math": Backend(
        build=lambda: partial(dense.sdpa_by, "math"),
        missing=lambda device: None,
        description="the same, always by plain matrix products: exact, slow, holds all scores",
    ),
    "flash2": Backend(
        build=lambda: dense.flash2,
        # FlashAttention-4 is installed into a folder of the same name.
        missing=_needs(("flash_attn.flash_attn_interface",), "flash-attn"),
        description="FlashAttention-2",
    ),
    "flash3": Backend(
        build=lambda: dense.flash3,
        missing=_needs(
            ("flash_attn_interface",), "it from the hopper folder of flash-attention", (9, 0)
        ),
        description="FlashAttention-3",
    ),
    "flash4": Backend(
        build=lambda: dense.flash4,
        # FlashAttention-2 may bring the first of these, but not what it is written in.
        missing=_needs(("flash_attn.cute", "cutlass"), "flash-attn-4", (9, 0)),
        description="FlashAttention-4",
    ),
    "xformers": Backend(
        build=lambda: dense.xformers,
        missing=_needs(("xformers",), "xformers"),
        description="xFormers' memory_efficient_attention",
    ),
    "sage": Backend(
        build=lambda: sage.sage,
        missing=kernels.missing,
        description="SageAttention: dense, int8 scores, float16 or fp8 values",
    ),
    "sparge": Backend(
        build=lambda **settings: partial(sparge_attn_topk, **settings),
        missing=kernels.missing,
        description="SpargeAttention: block-sparse and 8-bit, without training",
        settings=("ratio", "block_q", "block_k", "pv_threshold", TEMPORAL_HEADS),
        self_only=True,
    ),
    "sla": Backend(
        build=SparseLinearAttention,
        missing=kernels.missing,
        description="sparse-linear attention, trainable; for models trained with it",
        settings=("ratio", "variant", "feature_map", "block_q", "block_k", TEMPORAL_HEADS),
        self_only=True,
        has_parameters=True,
    ),
    "sagesla": Backend(
        build=SageSLA,
        missing=kernels.missing,
        description="sparse-linear attention in 8 bits; for models trained with sla",
        settings=("ratio", "feature_map", "block_q", "block_k", TEMPORAL_HEADS),
        self_only=True,
        has_parameters=True,
    ),
    "linear": Backend(
        build=lambda: linear.linear,
        missing=kernels.missing,
        description="linear attention alone; for models trained with it",
        self_only=True,
    ),
}


def available(name: str, device: torch.device | str) -> tuple[bool, str]:
    """(True, description) if back-end `name` runs on `device`, else (False, what is missing)."""
    backend = _lookup(name)
    reason = backend.missing(torch.device(device))
    return (reason is None, reason or backend.description)


def attention_function(
    name: str, *, head_dim: int | None = None, cross: bool = False, **settings: Any
) -> AttentionFunction:
    """Back-end `name`, as a function or, where it has parameters, as a new module.

    Args:
        name: one of `BACKENDS`.
        head_dim: D; a back-end with parameters must know it.
        cross: whether queries and keys come from different sequences.
        settings: of the back-end, e.g. ratio=0.1.

    Raises:
        ValueError: an unknown back-end or setting, one that is not for cross attention, or
            one that needs `head_dim`.
    """
    backend = _lookup(name)
    unknown = sorted(set(settings) - set(backend.settings))
    if unknown:
        raise ValueError(
            f"attention {name!r} has no setting {', '.join(unknown)}; "
            f"supported: {', '.join(backend.settings) or 'none'}"
        )
    if cross and backend.self_only:
        dense_ones = ", ".join(name for name, other in BACKENDS.items() if not other.self_only)
        raise ValueError(f"attention {name!r} is not for cross attention; supported: {dense_ones}")
    check_temporal_heads(settings.pop(TEMPORAL_HEADS, ()))
    if not backend.has_parameters:
        return backend.build(**settings)
    if head_dim is None:
        raise ValueError(f"attention {name!r} has parameters and needs head_dim")
    return backend.build(head_dim=head_dim, **settings)


def _lookup(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"unknown attention back-end {name!r}; supported: {', '.join(BACKENDS)}")
    return BACKENDS[name]
