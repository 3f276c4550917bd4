"""Activations of the DiT's blocks computed again in the backward pass, instead of kept.

- "none": everything is kept.
- "block": only each block's input is kept (arXiv:1604.06174), for one more forward pass.
- "selective": the results of attention and of matrix products are kept too. What is computed
  again is cheap: norms, modulation, GELU, exchanges of tokens.

A block's `forward` is replaced on the instance: no wrapper module, so no name changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from turbodit.model.wan import WanModel

Policy = Literal["none", "block", "selective"]

PRODUCTS = ("mm", "addmm")  # of PyTorch; those of batches hold attention's scores
OWN_SUMS = ("key_value_sums", "linear_output")  # of linear attention


def checkpoint_blocks(model: WanModel, policy: Policy) -> None:
    """Make the blocks of `model` keep, for the backward pass, what `policy` says; in place.

    Where no gradient is wanted, as for a Jacobian-vector product, blocks run as they are.

    Raises:
        ValueError: unknown policy.
    """
    if policy not in get_args(Policy):
        raise ValueError(f"unknown policy {policy!r}; supported: {', '.join(get_args(Policy))}")
    if policy == "none":
        return
    options: dict[str, Any] = {}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for block in model.blocks:
        # A partial object, not a closure: a copy of the model then copies the block in it too.
        block.forward = partial(_run, block.forward, options)


def _run(forward: Callable[..., torch.Tensor], options: dict[str, Any], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    # Blocks draw no random numbers.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if isinstance(op, torch._ops.OpOverload) and _is_product(op):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_product(op: torch._ops.OpOverload) -> bool:
    """Whether an operator is attention, a part of it, or a matrix product."""
    _, name = op._schema.name.split("::")
    if op.namespace == "turbodit":
        return name.endswith("attention") or name in OWN_SUMS
    return op.namespace == "aten" and (name in PRODUCTS or "scaled_dot_product" in name)
