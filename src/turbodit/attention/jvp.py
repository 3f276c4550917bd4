"""Dense attention that passes tangents on, for `torch.func.jvp` and `torch.autograd.forward_ad`.

None of PyTorch's fused attention kernels has a rule for forward-mode differentiation. An
`autograd.Function` with one would compute the output twice, once for itself and once beside its
tangent. So the dual tensors are taken apart and put together here, around one operator.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from turbodit.attention import dense
from turbodit.kernels.attention_jvp import attention_jvp
from turbodit.kernels.forward_ad import has_tangent


def sdpa_with_tangent(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, with its tangent where q, k or v have one.

    Without tangents this is `dense.sdpa`, gradients included. With them it is
    `kernels.attention_jvp`, whose results have no gradient: PyTorch raises RuntimeError in a
    backward pass through them.

    Args:
        q: (B, Lq, H, D).
        k, v: (B, Lk, H, D).

    Returns:
        (B, Lq, H, D), a dual tensor where an input is one.
    """
    if not has_tangent(q, k, v):
        return dense.sdpa(q, k, v)
    primals, tangents = zip(*(forward_ad.unpack_dual(x) for x in (q, k, v)), strict=True)
    return forward_ad.make_dual(*attention_jvp(*primals, *tangents))
