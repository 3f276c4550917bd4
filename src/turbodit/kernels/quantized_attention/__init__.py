"""Attention with 8-bit products: int8 Q K^T, P V in float16 or float8 e4m3; forward only.

Dense, causal, or over the kept key blocks of a block map; on request with SLA's linear branch
added on top. `reference` holds the formulas, `triton` the kernels.

Shapes: B batch, Lq/Lk query/key length, H heads (Hkv of k and v), D head dimension, Mq/Mk
number of query/key blocks, N key blocks listed for each query block.
"""

from __future__ import annotations

import math

import torch

from turbodit.kernels import HEAD_DIMS, custom_op, implementation, wide
from turbodit.kernels.linear_attention import FEATURE_MAPS

BLOCKS_Q = (16, 32, 64, 128)
BLOCKS_K = (16, 32, 64, 128)
PV_FORMATS = ("fp16", "fp8")
# fp8 tensor cores sum over 32 keys at a time.
MIN_BLOCK_K = {"fp16": 16, "fp8": 32}


def quantized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    indices: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    causal: bool = False,
    pv: str = "fp16",
    pv_threshold: float | None = None,
    smooth_k: bool = True,
    k_mean: torch.Tensor | None = None,
    smooth_v: bool = False,
    v_largest: torch.Tensor | None = None,
    linear: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    feature_map: str = "softmax",
) -> torch.Tensor:
    """softmax(q k^T * scale) v in 8 bits (SageAttention, arXiv:2410.02367 and 2411.10958).

    Args:
        q: (B, Lq, H, D) float16 or bfloat16, D 64 or 128; on a CPU any floating dtype and D.
        k, v: (B, Lk, Hkv, D), dtype of q; H is a multiple of Hkv.
        indices: int32 (B, H, Mq, N): the key blocks that each query block sees, each at most
            once, in any order. None: all keys.
        counts: int32 (B, H, Mq): how many of the N are meant, the first ones. A query block
            of 0 gives zeros. None: all N.
        block_q: query rows of a block: 16, 32, 64 or 128.
        block_k: key rows of a block, which share one scale: the same, with fp8 32 and more.
        scale: of the scores, above zero; 1/sqrt(D) if None.
        causal: query i sees keys up to i, as in F.scaled_dot_product_attention. Dense only.
        pv: "fp16" or "fp8" (e4m3; compute capability 8.9 and above, and a CPU).
        pv_threshold: leave out of a row's softmax the blocks whose scores all lie this far under
            the largest score of the blocks before, and P V of blocks that all rows of a tile
            leave out (SpargeAttention, arXiv:2502.18137); above zero. None: leave out nothing.
        smooth_k: quantise K without its mean over the keys, which changes no softmax.
        k_mean: that mean (B,Hkv,D), float32, if it is known.
        smooth_v: quantise V without its mean over the keys, which is added afterwards.
        v_largest: largest |v| of each channel (B,Hkv,D), float32, if it is known; not with
            `smooth_v`.
        linear: (means (B,H,D,D) in q's dtype, k_sum (B,H,D) and bias (D,) in float32): adds the
            linear branch w means + bias with w_i = phi(q)_i k_sum_i / (phi(q) . k_sum + 1e-5).
            Needs H = Hkv.
        feature_map: phi: "softmax", "elu" (elu + 1) or "relu".

    Returns:
        (B, Lq, H, D), dtype of q.

    Raises:
        ValueError: arguments other than these, or a gradient is asked for.
    """
    _check_tensors(q, k, v)
    _check_choices(q, block_q, block_k, pv)
    _check_map(q, k, indices, counts, block_q, causal)
    _check_known(k, k_mean, v_largest, smooth_k, smooth_v)
    means, k_sum, bias = _check_linear(q, k, linear, feature_map)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if factor <= 0:  # the row maximum is taken before scaling
        raise ValueError(f"scale must be above zero, got {scale}")
    if pv_threshold is not None and pv_threshold <= 0:
        raise ValueError(f"pv_threshold must be above zero, got {pv_threshold}")
    return _quantized_attention(
        q, k, v, indices, counts, means, k_sum, bias, k_mean, v_largest,
        block_q, block_k, factor, causal, pv, pv_threshold, smooth_k, smooth_v, feature_map,
    )  # fmt: skip


def fastest_pv(device: torch.device, block_k: int = 64) -> str:
    """The format of P V that suits a device: "fp8" where tensor cores have it, else "fp16"."""
    if device.type != "cuda" or block_k < MIN_BLOCK_K["fp8"]:
        return "fp16"
    return "fp8" if torch.cuda.get_device_capability(device) >= (8, 9) else "fp16"


@custom_op("turbodit::quantized_attention")
def _quantized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor | None,
    counts: torch.Tensor | None,
    means: torch.Tensor | None,
    k_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    k_mean: torch.Tensor | None,
    v_largest: torch.Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    causal: bool,
    pv: str,
    pv_threshold: float | None,
    smooth_k: bool,
    smooth_v: bool,
    feature_map: str,
) -> torch.Tensor:
    linear = None
    if means is not None and k_sum is not None and bias is not None:
        linear = (means, k_sum, bias)
    return implementation(__name__, q).quantized_attention(
        q, k, v, indices, counts, linear, k_mean, v_largest,
        block_q=block_q, block_k=block_k, scale=scale, causal=causal, pv=pv,
        pv_threshold=pv_threshold, smooth_k=smooth_k, smooth_v=smooth_v, feature_map=feature_map,
    )  # fmt: skip


@_quantized_attention.register_fake
def _(q: torch.Tensor, *others: object) -> torch.Tensor:
    return q.new_empty(q.shape)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or 0 in (*q.shape, *k.shape):
        raise ValueError(
            f"q, k, v must be (B,Lq,H,D), (B,Lk,Hkv,D), (B,Lk,Hkv,D), none empty; got {shapes}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q and k must agree in B and D, and H be a multiple of Hkv; got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            "q, k, v must have one dtype and one device; got "
            + ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "quantised attention has no gradient: call it under torch.no_grad(), or train with "
            "an attention that has one (sdpa, sla)"
        )
    if not q.is_cuda:
        return
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"on a GPU quantised attention takes float16 or bfloat16 and D of {HEAD_DIMS}; "
            f"got {q.dtype} and D = {q.shape[3]}"
        )
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("the last dimension of q, k and v must be contiguous")


def _check_choices(q: torch.Tensor, block_q: int, block_k: int, pv: str) -> None:
    if pv not in PV_FORMATS:
        raise ValueError(f"unknown pv {pv!r}; supported: {', '.join(PV_FORMATS)}")
    if block_q not in BLOCKS_Q or block_k not in BLOCKS_K or block_k < MIN_BLOCK_K[pv]:
        raise ValueError(
            f"block_q must be one of {BLOCKS_Q}, block_k one of {BLOCKS_K} and at least "
            f"{MIN_BLOCK_K[pv]} with {pv}; got {block_q} and {block_k}"
        )
    if pv == "fp8" and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 9):
        name = torch.cuda.get_device_name(q.device)
        raise ValueError(f"pv='fp8' needs compute capability 8.9, {name} is older; use 'fp16'")


def _check_map(
    q: torch.Tensor,
    k: torch.Tensor,
    indices: torch.Tensor | None,
    counts: torch.Tensor | None,
    block_q: int,
    causal: bool,
) -> None:
    if indices is None:
        if counts is not None:
            raise ValueError("counts without indices")
        return
    if causal:
        raise ValueError("a block map and causal=True do not go together")
    blocks = (q.shape[0], q.shape[2], -(-q.shape[1] // block_q))
    if indices.dtype != torch.int32 or indices.shape[:-1] != blocks or indices.ndim != 4:
        raise ValueError(
            f"indices must be int32 {(*blocks, 'N')}, got {indices.dtype} {tuple(indices.shape)}"
        )
    if counts is not None and (counts.dtype != torch.int32 or counts.shape != blocks):
        raise ValueError(f"counts must be int32 {blocks}, got {counts.dtype} {tuple(counts.shape)}")


def _check_known(
    k: torch.Tensor,
    k_mean: torch.Tensor | None,
    v_largest: torch.Tensor | None,
    smooth_k: bool,
    smooth_v: bool,
) -> None:
    shape = (k.shape[0], k.shape[2], k.shape[3])
    dtype = wide(k.dtype)
    for name, x in (("k_mean", k_mean), ("v_largest", v_largest)):
        if x is not None and (x.shape != shape or x.dtype != dtype):
            raise ValueError(f"{name} must be {dtype} {shape}, got {x.dtype} {tuple(x.shape)}")
    if k_mean is not None and not smooth_k:
        raise ValueError("k_mean without smooth_k")
    if v_largest is not None and smooth_v:
        raise ValueError("v_largest is not that of V without its mean: not with smooth_v")


def _check_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    linear: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    feature_map: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The three parts of `linear`, or three times None."""
    if linear is None:
        return None, None, None
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"unknown feature map {feature_map!r}; supported: {', '.join(FEATURE_MAPS)}"
        )
    batch, _, heads, dim = q.shape
    means, k_sum, bias = linear
    wanted = ((batch, heads, dim, dim), (batch, heads, dim), (dim,))
    if k.shape[2] != heads or (means.shape, k_sum.shape, bias.shape) != wanted:
        raise ValueError(
            f"linear must be of shapes {wanted} for as many heads in k as in q; got "
            f"{tuple(means.shape)}, {tuple(k_sum.shape)}, {tuple(bias.shape)} and k of "
            f"{k.shape[2]} heads"
        )
    return means, k_sum, bias
