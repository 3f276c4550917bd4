"""Accuracy of attention against float32, on three kinds of inputs.

Gaussian ones, ones with outlier channels and large K means, and what SpriteWan's layers see.
Sparse back-ends are compared with exact attention over the key blocks that they keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from turbodit.attention import attention_function
from turbodit.attention.sla import SageSLA, SparseLinearAttention
from turbodit.benchmark.modes import RATIO
from turbodit.kernels.block_map import map_from_indices

SHORT, SMALL_BLOCK = 4_096, 32  # tokens below which blocks are small
PROMPT = "a big red fox runs to the right through the snow"


def all_accuracy(gaussian: list[torch.Tensor], device: torch.device) -> dict[str, Any]:
    """Errors by case and back-end; Gaussian q, k, v are given."""
    cases: Iterable[tuple[str, list[torch.Tensor]]] = (
        ("Gaussian", gaussian),
        ("outlier channels, large K means", with_outliers(gaussian)),
        *recorded(device),
    )
    return {name: accuracy(tensors) for name, tensors in cases}


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


def recorded(device: torch.device) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """q, k, v of some layers of SpriteWan's teacher, which is dense, at some steps of a clip."""
    from turbodit.pipeline import Pipeline

    pipe = Pipeline.from_pretrained("spritewan-teacher", device=device)
    (model,) = pipe.transformers.values()
    layers = {0: "first", len(model.blocks) // 2: "middle", len(model.blocks) - 1: "last"}
    seen: dict[int, list[list[torch.Tensor]]] = {index: [] for index in layers}
    for index in layers:

        def record(_: torch.nn.Module, qkv: tuple[torch.Tensor, ...], of: int = index) -> None:
            seen[of].append([x[:1].to(torch.bfloat16, copy=True) for x in qkv])

        attention: Any = model.blocks[index]
        attention.self_attn.attn_op.register_forward_pre_hook(record)
    pipe(PROMPT, steps=4, seed=0)
    for index, calls in seen.items():
        for when, position in (("noise", 0), ("clean", -1)):
            yield f"SpriteWan, {layers[index]} layer, most {when}", calls[position]


@torch.no_grad()
def accuracy(tensors: list[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Of 16-bit and 8-bit attention, dense and over the kept blocks (no linear branch)."""
    q, k, v = tensors
    wide = (q.float(), k.float(), v.float())
    dim, device = q.shape[-1], q.device
    want = exact(*wide)
    results = {name: errors(attention_function(name)(q, k, v), want) for name in ("sdpa", "sage")}
    blocks: dict[str, Any] = (
        {} if q.shape[1] >= SHORT else {"block_q": SMALL_BLOCK, "block_k": SMALL_BLOCK}
    )
    for name, kind in (("sla", SparseLinearAttention), ("sagesla", SageSLA)):
        module = kind(dim, RATIO, **blocks).to(device)
        kept = kept_tokens(module, q, k)
        want = exact(*wide, kept)
        results[f"sdpa over the blocks of {name}"] = errors(exact(q, k, v, kept), want)
        results[name] = errors(module(q, k, v), want)
    return results


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention in the dtype of its inputs; kept (B, H, Lq, Lk) bool."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept).transpose(1, 2)


def kept_tokens(module: SparseLinearAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The module's block map as a map of tokens: bool (B, H, Lq, Lk)."""
    blocks = map_from_indices(module.block_indices(q, k), None, -(-k.shape[1] // module.block_k))
    tokens = blocks.repeat_interleave(module.block_q, 2).repeat_interleave(module.block_k, 3)
    return tokens[:, :, : q.shape[1], : k.shape[1]]


def errors(got: torch.Tensor, want: torch.Tensor) -> dict[str, float]:
    """Relative L2 and L1, root mean square and cosine."""
    got, want = got.double().flatten(), want.double().flatten()
    difference = got - want
    return {
        "relative_l2": (difference.norm() / want.norm()).item(),
        "relative_l1": (difference.abs().sum() / want.abs().sum()).item(),
        "rmse": difference.square().mean().sqrt().item(),
        "cosine": F.cosine_similarity(got, want, dim=0).item(),
    }
