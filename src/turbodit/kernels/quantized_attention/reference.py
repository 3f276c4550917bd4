"""Quantised attention in plain PyTorch: what the kernels compute, and how a CPU does it.

    S = (q8 k8^T) * q_scale * k_scale,  P = exp(S - rowmax),  out = (P v~) / rowsum * v_scale

with q8 and k8 in int8, P and v~ in float16 or float8 e4m3 (SageAttention, arXiv:2410.02367;
the fp8 form and V's mean SageAttention2, arXiv:2411.10958). Three means keep rounding small:

- K minus its mean over all keys: a whole row of scores moves by q . mean, which softmax does
  not see, and what is left fits 8 bits much better.
- V divided by its channels' largest magnitudes, on request after its mean is taken away. Rows
  of P / rowsum add up to one, so the mean comes back as it is.
- P lies in [0, 1] and is stretched to the whole fp8 range; the row sum stretches with it.

Scales: one per query row (finer than per block, and the softmax works on rows anyway), one
per block of key rows, one per channel of V. The sums are float32, or float64 if that is what
comes in.

Shapes: B batch, H heads (Hkv of k and v), Lq/Lk length, D head dimension, Mq/Mk number of
query/key blocks, N kept key blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from turbodit.kernels import wide
from turbodit.kernels.linear_attention.reference import linear_branch

INT8_MAX = 127.0
FP8_MAX = 448.0
LOG2_FP8_MAX = math.log2(FP8_MAX)
# The largest magnitude that scaled values of V have, and P has, in each format.
V_MAX = {"fp16": 1.0, "fp8": FP8_MAX}
PV_DTYPE = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}
# Rows, blocks and channels of nothing but zeros have a scale, too.
TINY = 1e-12

Linear = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor | None,
    counts: torch.Tensor | None,
    linear: Linear | None,
    k_mean: torch.Tensor | None,
    v_largest: torch.Tensor | None,
    *,
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
    """As `turbodit.kernels.quantized_attention.quantized_attention`, all arguments given."""
    rows, row_scale = quantize_queries(q, scale)
    if smooth_k and k_mean is None:
        k_mean = _heads_first(k).mean(2)
    keys, key_scale = quantize_keys(k, block_k, k_mean)
    values, value_scale, mean = quantize_values(v, pv, smooth_v, v_largest)
    rows = rows * row_scale
    group = q.shape[2] // k.shape[2]
    keys, values, value_scale, mean = (
        x.repeat_interleave(group, dim=1)
        for x in (keys * key_scale, _blocks(values, block_k), value_scale, mean)
    )
    out = torch.empty_like(rows)
    for m in range(-(-rows.shape[2] // block_q)):
        here = slice(m * block_q, (m + 1) * block_q)
        kept = None if indices is None else indices[:, :, m].long()
        number = None if counts is None else counts[:, :, m]
        k_m, v_m, position = _gather(keys, values, kept, number, length=k.shape[1])
        if causal:
            row = torch.arange(rows.shape[2], device=q.device)[here, None]
            position = torch.where(position <= row, position, -1)
        sees_any = (position >= 0).any(-1, keepdim=True)
        average = _attend(rows[:, :, here], k_m, v_m, position, pv, block_k, pv_threshold)
        out[:, :, here] = average * value_scale + mean * sees_any
    out = out.transpose(1, 2)
    if linear is not None:
        out = out + linear_branch(q.to(out.dtype), *linear, feature_map)
    return out.to(q.dtype).contiguous()


def quantize_queries(q: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B,L,H,D) -> integers (B,H,L,D), scales * factor (B,H,L,1)."""
    rows = _heads_first(q)
    scale = _scale(rows.abs().amax(-1, keepdim=True), INT8_MAX)
    return _rounded(rows / scale, "int8"), scale * factor


def quantize_keys(
    k: torch.Tensor, block_k: int, mean: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """k (B,L,H,D), less mean (B,H,D) -> integers (B,H,Mk,block_k,D), zero past the end, and
    scales (B,H,Mk,1,1)."""
    rows = _heads_first(k)
    if mean is not None:
        rows = rows - mean[:, :, None]
    blocks = _blocks(rows, block_k)
    scale = _scale(blocks.abs().amax((-2, -1), keepdim=True), INT8_MAX)
    return _rounded(blocks / scale, "int8"), scale


def quantize_values(
    v: torch.Tensor, pv: str, smooth: bool, largest: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """v (B,L,H,D), largest |v| (B,H,D) if known -> rounded values (B,H,L,D), scales (B,H,1,D),
    mean (B,H,1,D) or zeros."""
    rows = _heads_first(v)
    mean = rows.mean(2, keepdim=True) if smooth else torch.zeros_like(rows[:, :, :1])
    rows = rows - mean
    largest = rows.abs().amax(2) if largest is None else largest
    scale = _scale(largest[:, :, None], V_MAX[pv])
    return _rounded(rows / scale, pv), scale, mean


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: torch.Tensor,
    pv: str,
    block_k: int,
    pv_threshold: float | None,
) -> torch.Tensor:
    """Softmax attention of one query block, P rounded; keys at position -1 are not seen.

    q (B,H,block_q,D), k and v (B,H,n,D), position (B,H,block_q or 1,n) or without B, H.
    Rows that see nothing give zeros.
    """
    scores = (q @ k.mT).masked_fill(position < 0, -torch.inf)
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    p = (scores - largest).exp()
    if pv_threshold is not None:
        p = p.masked_fill(_faint(scores, block_k, pv_threshold), 0)
    total = p.sum(-1, keepdim=True)
    return _rounded(p * V_MAX[pv], pv) @ v / (total.clamp(min=TINY) * V_MAX[pv])


def _faint(scores: torch.Tensor, block_k: int, threshold: float) -> torch.Tensor:
    """Which scores (...,n) a row leaves out: those of blocks whose largest is more than
    `threshold` under the largest of all blocks before (SpargeAttention, section 3.4)."""
    block_largest = scores.unflatten(-1, (-1, block_k)).amax(-1)
    before = F.pad(block_largest.cummax(-1).values[..., :-1], (1, 0), value=-torch.inf)
    return (block_largest < before - threshold).repeat_interleave(block_k, -1)


def _gather(
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor | None,
    number: torch.Tensor | None,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one query block reads: k and v (B,H,n,D) and the positions of their rows.

    keys, values (B,H,Mk,block_k,D); kept (B,H,N) key blocks, of which the first `number`
    (B,H) count, or None for all. Padding has position -1.
    """
    first = torch.arange(keys.shape[2], device=keys.device)
    if kept is not None:
        real = torch.ones_like(kept, dtype=torch.bool)
        if number is not None:
            real = torch.arange(kept.shape[-1], device=kept.device) < number[..., None]
        first = torch.where(real, kept, 0)
        keys, values = (x.take_along_dim(first[..., None, None], 2) for x in (keys, values))
        first = torch.where(real, first, keys.shape[2] + length)  # past every real row
    block_k = keys.shape[3]
    position = first[..., None] * block_k + torch.arange(block_k, device=keys.device)
    position = torch.where(position < length, position, -1)
    return keys.flatten(2, 3), values.flatten(2, 3), position.flatten(-2)[..., None, :]


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(B,L,H,D) -> (B,H,L,D), at least float32."""
    return x.transpose(1, 2).to(wide(x.dtype))


def _blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """(B,H,L,D) -> (B,H,M,block,D), zeros past the end."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def _scale(largest: torch.Tensor, limit: float) -> torch.Tensor:
    return largest.clamp(min=TINY) / limit


def _rounded(x: torch.Tensor, form: str) -> torch.Tensor:
    """To the nearest number that a format holds: "int8", "fp16" or "fp8"."""
    return x.round() if form == "int8" else x.to(PV_DTYPE[form]).to(x.dtype)
