"""`sageattn` as F.scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from turbodit.attention.sage import sageattn


def inputs(heads_kv: int = 4, dim: int = 64, length_k: int = 90) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 70, dim), (2, heads_kv, length_k, dim), (2, heads_kv, length_k, dim))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


CALLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"is_causal": True}),
    ({}, {"attn_mask": None, "dropout_p": 0.0, "scale": 0.2}),
    ({"dim": 24}, {}),
    ({"dim": 80}, {"is_causal": True}),
    ({"length_k": 1}, {}),
    ({"heads_kv": 2}, {"enable_gqa": True}),
]


@pytest.mark.parametrize(("shape", "call"), CALLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_is_attention_but_for_rounding(
    shape: dict[str, int], call: dict[str, Any], dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in inputs(**shape))
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **call)
    out = sageattn(q, k, v, **call)
    assert out.shape == want.shape and out.dtype == dtype
    assert relative_error(out, want) < 0.015


def test_takes_the_place_of_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.TransformerEncoderLayer(128, 2, 64, dropout=0.0, batch_first=True)
    x = torch.randn(1, 30, 128, generator=torch.Generator().manual_seed(0))
    attend = layer.self_attn

    def run() -> torch.Tensor:
        with torch.no_grad():
            return attend(x, x, x, need_weights=False)[0]

    attend.train()  # keeps to the call, past a fused one
    want = run()
    monkeypatch.setattr(F, "scaled_dot_product_attention", sageattn)
    assert 0 < relative_error(run(), want) < 0.02


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attn_mask": torch.ones(70, 90, dtype=torch.bool)}, "no attn_mask"),
    ({"dropout_p": 0.1}, "no dropout, got dropout_p=0.1"),
    ({"query": torch.zeros(4, 70, 64)}, r"takes \(B, H, L, D\) tensors"),
    ({"query": torch.zeros(2, 8, 70, 64)}, "need enable_gqa=True"),
    ({"query": torch.zeros(2, 4, 70, 160)}, "up to 128 are supported, got 160"),
    ({"query": torch.zeros(2, 4, 70, 64).half()}, "one dtype"),
    ({"query": torch.zeros(2, 4, 70, 64, requires_grad=True)}, "no gradient"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_it_cannot_do_is_refused(call: dict[str, Any], message: str) -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=message):
        sageattn(**{"query": q, "key": k, "value": v} | call)
