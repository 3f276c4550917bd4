"""Seconds of a forward pass on an H100: work divided by rates.

    linear layers     2 L (m D^2 + 2 D F) per block, m = 6 (text keys and values are encoded once)
    self attention    4 r L^2 D, r: the share of key blocks that is computed
    and beside it     what is linear in L: keys and values pooled, quantised, summed
    cross attention   4 L Lc D
    everything else   norms, modulation, quantisation: bytes that grow with L D

The rates are those of one H100 (80 GB, 700 W), the results of `turbodit bench step` and `bench
attention` of 2026-11-26. With them the steps measured there come out within 6 %. Other cards have
other rates: nothing here speaks of them.

Shapes: L tokens, Lc context tokens, D width, F width of the feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from turbodit.config import TransformerConfig
from turbodit.plan.weights import Linear

CLIP_TOKENS = 257  # of one image, where the model has CLIP
PRODUCTS = {None: 740e12, "fp8": 1350e12, "int8-channel": 1150e12, "int8-block": 600e12}  # op/s
CROSS_ATTENTION = 460e12  # op/s
# Seconds per token, channel and block of everything else, without and with quantising inputs.
REST, REST_8_BIT = 1.4e-11, 2.0e-11


@dataclass(frozen=True)
class AttentionCost:
    """Of a back-end of self attention.

    Attributes:
        rate: op/s of the kernel.
        sparse: whether it computes the ratio's share of the key blocks only.
        beside: seconds per token, channel and block beside the kernel.
        copies: bytes per token and channel of q, k and v in other formats.
    """

    rate: float
    sparse: bool = False
    beside: float = 0.0
    copies: int = 0


ATTENTION = {
    "sdpa": AttentionCost(545e12),
    "sage": AttentionCost(810e12, copies=2),
    "sla": AttentionCost(480e12, sparse=True, beside=5.4e-12),
    "sagesla": AttentionCost(650e12, sparse=True, beside=5.4e-12, copies=2),
}


def attention_cost(name: str) -> AttentionCost:
    """Of the back-end called `name`.

    Raises:
        ValueError: none whose cost is known.
    """
    if name not in ATTENTION:
        raise ValueError(
            f"the cost of attention {name!r} is not known; known: {', '.join(ATTENTION)}"
        )
    return ATTENTION[name]


def check_linear(linear: str | None) -> None:
    """Raise a ValueError unless `linear` is a format as users call it, or None."""
    if linear is not None and linear not in get_args(Linear):
        raise ValueError(
            f"unknown 8-bit format {linear!r}; supported: {', '.join(get_args(Linear))}"
        )


def forward_seconds(
    config: TransformerConfig, tokens: int, attention: str, ratio: float, linear: Linear | None
) -> float:
    """One forward pass at batch 1, its kernels launched without gaps (as a CUDA graph).

    Args:
        ratio: share of the key blocks that sparse attention keeps.

    Raises:
        ValueError: a back-end whose cost is not known.
    """
    cost = attention_cost(attention)
    d, f = config.dim, config.ffn_dim
    products = 2 * tokens * (6 * d**2 + 2 * d * f) / PRODUCTS[linear]
    kept = ratio if cost.sparse else 1.0
    self_attention = 4 * kept * tokens**2 * d / cost.rate + cost.beside * tokens * d
    cross_attention = 4 * tokens * context_tokens(config) * d / CROSS_ATTENTION
    rest = (REST if linear is None else REST_8_BIT) * tokens * d
    return config.num_layers * (products + self_attention + cross_attention + rest)


def context_tokens(config: TransformerConfig) -> int:
    """Text tokens, and image tokens where there are any."""
    images = 0 if config.image_dim is None else config.image_positions or CLIP_TOKENS
    return config.text_len + images
