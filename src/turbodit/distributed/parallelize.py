"""A model spread over a mesh: weights in shards (FSDP2), tokens over the context axis.

What is minimised is the mean, over all processes, of each one's loss. All gradients follow from
that alone: every exchange of tokens has its exact adjoint as backward pass, and FSDP averages
over all processes, those of a context group too. Where these compute the same loss from the
same gathered output, each has `context` times its own tokens' part of a gradient, and the
average is what one process would have found.

Precision: the products in `compute_dtype`; what Wan keeps in float32 (`WanModel.keep_float32`)
as it is stored; gradients are summed in float32. Weights stored in float32 are master weights:
the optimizer updates them, and each pass casts them while they are gathered.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from turbodit.distributed.context_parallel import split_tokens
from turbodit.distributed.mesh import Mesh
from turbodit.kernels import wide
from turbodit.model.wan import Attention, Block, WanModel


def parallelize(model: WanModel, mesh: Mesh, compute_dtype: torch.dtype | None = None) -> WanModel:
    """Spread `model`, in place, over `mesh`, on whose device it is afterwards.

    Every process has the same whole model at first. A lone process whose weights are stored in
    `compute_dtype` has nothing to gather or to cast: its model stays as it is.

    Args:
        compute_dtype: of the matrix products; None: that of the weights.

    Raises:
        ValueError: heads that do not divide over the context axis; trainable weights of
            several dtypes where one is needed.
    """
    compute_dtype = compute_dtype or model.patch_embedding.weight.dtype
    if mesh.context > 1:
        split_tokens(model, mesh.context_group)
    if mesh.size > 1 or _dtypes(_products(model)) != {compute_dtype}:
        _shard(model, mesh, compute_dtype)
    return model.to(mesh.device)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """L2 norm of all gradients of a model, over all its shards: a scalar, the same everywhere."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _shard(model: WanModel, mesh: Mesh, compute_dtype: torch.dtype) -> None:
    """FSDP in two groups of weights per block: one in `compute_dtype`, one as stored.

    Inputs are never cast: x, times and modulations are float32 on purpose.
    """
    # Where a gradient is wanted, no result of a layer is changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    stored = MixedPrecisionPolicy(reduce_dtype=wide(compute_dtype), cast_forward_inputs=False)
    products = replace(stored, param_dtype=compute_dtype)

    def group(modules: nn.Module | list[nn.Module], policy: MixedPrecisionPolicy) -> None:
        fully_shard(modules, mesh=mesh.fsdp, mp_policy=policy)

    for block in model.blocks:
        parts = _block_products(block)
        _check_uniform(block, parts)
        group(parts, products)
        group(block, stored)
    group([model.time_embedding, model.time_projection], stored)
    # The head's norm gives the dtype that the sharded weight has.
    group(model.head.head, replace(products, cast_forward_inputs=True))
    group(model.head, stored)
    group(model, products)


def _block_products(block: nn.Module) -> list[nn.Module]:
    """The parts of a block that multiply matrices, each called once in every pass."""
    assert isinstance(block, Block)
    attentions: tuple[Attention, ...] = (block.self_attn, block.cross_attn)
    parts = [
        part
        for attention in attentions
        for name, part in attention.named_children()
        if "norm" not in name and name != "attn_op"
    ]
    return [*parts, block.ffn]


def _products(model: WanModel) -> list[nn.Module]:
    return [part for block in model.blocks for part in _block_products(block)]


def _dtypes(modules: Sequence[nn.Module]) -> set[torch.dtype]:
    return {p.dtype for module in modules for p in module.parameters()}


def _check_uniform(block: nn.Module, products: list[nn.Module]) -> None:
    """FSDP gathers a group's weights together, so those that train have one dtype."""
    inside = {id(p): p for part in products for p in part.parameters()}
    others = {id(p): p for p in block.parameters() if id(p) not in inside}
    for group in (inside, others):
        dtypes = {p.dtype for p in group.values() if p.requires_grad}
        if len(dtypes) > 1:
            raise ValueError(
                f"trainable weights of a block have the dtypes {sorted(map(str, dtypes))}, "
                "expected one for the matrix products and one for the rest; "
                "supported: all in float32, or as load_transformer stores them"
            )
