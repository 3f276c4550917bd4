"""Sparse-linear attention (SLA, arXiv:2509.24006), trainable, and its 8-bit form for inference.

    out = softmax attention over the kept key blocks + proj_l(linear attention)

The block map keeps, for each block of queries, the key blocks whose mean scores best with the
queries' mean. What the linear attention covers depends on the variant:

- "released": all keys, as in the checkpoints of TurboDiffusion (arXiv:2512.16093). Its sums
  over keys are one D x D matrix per head, so proj_l is multiplied into that matrix, not into
  the output of each token: phi(q) (phi(K)^T V) W^T = phi(q) ((phi(K)^T V) W^T).
- "paper": the keys that the map left out, so that every query sees each key once, exactly or
  through the feature map.

proj_l is a D x D linear layer in float32 that all heads of a layer share. It starts at zero:
at first SLA is sparse attention alone.

Forward-mode differentiation passes: the block map is held fixed, the sparse branch has one kernel
for value and tangent, and the linear branch goes by PyTorch's own rules.

Shapes: B batch, L length, H heads, D head dimension, M blocks (Mq of queries, Mk of keys).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from turbodit.attention.head_dim import pad_head_dim
from turbodit.kernels import HEAD_DIMS, linear_attention
from turbodit.kernels.attention_jvp import sparse_attention_jvp
from turbodit.kernels.block_map import map_from_indices, pool, select_topk
from turbodit.kernels.forward_ad import has_tangent
from turbodit.kernels.linear_attention import FEATURE_MAPS, KeyValueStatistics, key_value_statistics
from turbodit.kernels.linear_attention import reference as linear_reference
from turbodit.kernels.quantized_attention import fastest_pv, quantized_attention
from turbodit.kernels.sparse_attention import sparse_attention

VARIANTS = ("released", "paper")


class SparseLinearAttention(nn.Module):
    """SLA over (B, L, H, D), differentiable.

    Its parameters `proj_l.weight` (D, D) and `proj_l.bias` (D,) are those that TurboDiffusion's
    files call `...self_attn.attn_op.local_attn.proj_l.*`.

    Args:
        head_dim: D.
        ratio: top-k ratio, the share of key blocks that each query block keeps, in (0, 1]; at
            least one block is kept.
        variant: "released" or "paper".
        feature_map: of the linear attention: "softmax" over D, "elu" (elu + 1) or "relu".
        block_q, block_k: rows of a block of queries and of keys.

    Raises:
        ValueError: unknown variant or feature map, or a ratio that is not in (0, 1].
    """

    def __init__(
        self,
        head_dim: int,
        ratio: float = 0.1,
        *,
        variant: str = "released",
        feature_map: str = "softmax",
        block_q: int = 64,
        block_k: int = 64,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown SLA variant {variant!r}; supported: {', '.join(VARIANTS)}")
        if feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"unknown feature map {feature_map!r}; supported: {', '.join(FEATURE_MAPS)}"
            )
        if not 0 < ratio <= 1:
            raise ValueError(f"the top-k ratio must be in (0, 1], got {ratio}")
        self.ratio = ratio
        self.variant = variant
        self.feature_map = feature_map
        self.block_q = block_q
        self.block_k = block_k
        self.proj_l = nn.Linear(head_dim, head_dim, dtype=torch.float32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros: no linear branch."""
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v (B, L, H, D) of one dtype -> (B, L, H, D).

        Raises:
            ValueError: shapes or dtypes that do not fit, or that the device cannot do.
        """
        # Scores of blocks and sums over keys need float32 also where autocast is on.
        with torch.autocast(q.device.type, enabled=False):
            if self._can_fuse(q, k, v):
                return self._fused(q, k, v)
            indices = self.block_indices(q.detach(), k.detach())  # without tangents
            if self.variant == "paper":
                linear = self._marginal_branch(q, k, v, indices)
            else:
                linear = self._linear_branch(q, k, v)
            return self._sparse(q, k, v, indices) + linear

    @torch.no_grad()
    def block_indices(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The kept key blocks of each query block: (B, H, Mq, N) int32."""
        q, k = pad_head_dim(q, k)
        return select_topk(pool(q, self.block_q), pool(k, self.block_k), self.ratio)

    def _linear_branch(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The linear branch over all keys, proj_l included."""
        ops = _linear_attention(q, k, v)
        kv, k_sum = ops.key_value_sums(k, v, self.feature_map)
        kv = kv @ self.proj_l.weight.to(kv.dtype).T
        return ops.linear_output(q, kv, k_sum, self.feature_map, self.proj_l.bias.to(kv.dtype))

    def _marginal_branch(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        """The linear branch over the key blocks that are not in `indices`, proj_l included."""
        left_out = ~map_from_indices(indices, None, -(-k.shape[1] // self.block_k))
        blocks = {"block_q": self.block_q, "block_k": self.block_k}
        linear = marginal_attention(q, k, v, left_out, self.feature_map, **blocks)
        return F.linear(linear, self.proj_l.weight.to(q.dtype), self.proj_l.bias.to(q.dtype))

    def _can_fuse(self, *inputs: torch.Tensor) -> bool:
        """Whether the sparse kernel may add the linear branch: it has no derivative, all keys,
        and no mask for a feature map over padded channels."""
        tensors = (*inputs, self.proj_l.weight, self.proj_l.bias)
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        differentiates = trains or has_tangent(*inputs)
        fits = self.variant == "released" and inputs[0].shape[-1] in HEAD_DIMS
        return fits and not differentiates

    def _fused(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Both branches in one kernel, after one pass over K and V."""
        statistics = key_value_statistics(k, v, self.proj_l.weight, self.block_k, self.feature_map)
        indices = select_topk(
            pool(q, self.block_q), statistics.pooled_k, self.ratio, statistics.k_mean
        )
        bias = self.proj_l.bias.to(statistics.k_sum.dtype)
        return self._kernel(
            q,
            k,
            v,
            indices,
            linear=(statistics.means, statistics.k_sum, bias),
            feature_map=self.feature_map,
            **self._known(statistics),
        )

    def _sparse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        """The sparse branch; with a tangent it has no gradient."""
        if has_tangent(q, k, v):
            primals, tangents = zip(*(forward_ad.unpack_dual(x) for x in (q, k, v)), strict=True)
            out, out_tangent = sparse_attention_jvp(
                *primals, *tangents, indices=indices, block_q=self.block_q, block_k=self.block_k
            )
            return forward_ad.make_dual(out, out_tangent)
        dim = q.shape[-1]
        q, k, v = pad_head_dim(q, k, v)
        return self._kernel(q, k, v, indices, scale=dim**-0.5)[..., :dim]

    def _known(self, statistics: KeyValueStatistics) -> dict[str, torch.Tensor]:
        """What the kernel need not find out itself."""
        return {}

    def _kernel(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        indices: torch.Tensor,
        **settings: Any,
    ) -> torch.Tensor:
        return sparse_attention(
            q, k, v, indices, block_q=self.block_q, block_k=self.block_k, **settings
        )


class SageSLA(SparseLinearAttention):
    """SLA (released) for inference: its sparse branch in 8 bits, the linear branch in one kernel.

    Takes the weights of `SparseLinearAttention`. Int8 Q K^T, and P V in the format that suits
    the device (`fastest_pv`). Of its parts only proj_l has a gradient; asked for those of
    q, k or v, it raises ValueError.

    Args: as `SparseLinearAttention`.
    """

    def __init__(
        self,
        head_dim: int,
        ratio: float = 0.1,
        *,
        feature_map: str = "softmax",
        block_q: int = 128,
        block_k: int = 64,
    ) -> None:
        super().__init__(head_dim, ratio, feature_map=feature_map, block_q=block_q, block_k=block_k)

    def _known(self, statistics: KeyValueStatistics) -> dict[str, torch.Tensor]:
        return {"k_mean": statistics.k_mean, "v_largest": statistics.v_largest}

    def _kernel(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        indices: torch.Tensor,
        **settings: Any,
    ) -> torch.Tensor:
        return quantized_attention(
            q,
            k,
            v,
            indices=indices,
            block_q=self.block_q,
            block_k=self.block_k,
            pv=fastest_pv(q.device, self.block_k),
            **settings,
        )


def marginal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    feature_map: str,
    *,
    block_q: int,
    block_k: int,
) -> torch.Tensor:
    """Linear attention over the key blocks of a map (SLA, eq. 5 and 6), differentiable.

    The sums of each key block are computed once and added up per query block as the map says:
    a product of the map with M matrices of D x D, in float32. It holds two of D * D * M floats
    per head.

    Args:
        q: (B, Lq, H, D).
        k, v: (B, Lk, H, D).
        block_map: bool (B, H, Mq, Mk), the key blocks that count.

    Returns:
        (B, Lq, H, D), dtype of q; zeros for queries without any key block.
    """
    kv, k_sum = _block_sums(k, v, feature_map, block_k)
    weights = block_map.to(kv.dtype)
    kv = (weights @ kv.flatten(3)).unflatten(3, kv.shape[3:])
    k_sum = weights @ k_sum
    # A block of queries reads its own sums, so blocks take the place of the batch.
    padded = F.pad(q, (0, 0, 0, 0, 0, -q.shape[1] % block_q))
    out = _linear_attention(q, k, v).linear_output(
        padded.reshape(-1, block_q, *q.shape[2:]),
        _blocks_first(kv),
        _blocks_first(k_sum),
        feature_map,
    )
    return out.reshape(padded.shape)[:, : q.shape[1]]


def _linear_attention(*inputs: torch.Tensor) -> ModuleType:
    """The operators or, where a tangent is wanted, their references in PyTorch."""
    return linear_reference if has_tangent(*inputs) else linear_attention


def _block_sums(
    k: torch.Tensor, v: torch.Tensor, feature_map: str, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """kv (B, H, M, D, D) and k_sum (B, H, M, D) of each key block; the last may be shorter."""
    batch, length = k.shape[:2]
    whole = length - length % block
    pieces = [
        _linear_attention(k, v).key_value_sums(
            *(x[:, begin:end].reshape(-1, rows, *x.shape[2:]) for x in (k, v)), feature_map
        )
        for begin, end, rows in ((0, whole, block), (whole, length, length - whole))
        if begin < end
    ]
    kv, k_sum = (
        torch.cat([x.unflatten(0, (batch, -1)) for x in sums], dim=1).transpose(1, 2)
        for sums in zip(*pieces, strict=True)
    )
    return kv, k_sum


def _blocks_first(x: torch.Tensor) -> torch.Tensor:
    """(B, H, M, ...) -> (B * M, H, ...)"""
    return x.transpose(1, 2).flatten(0, 1)
