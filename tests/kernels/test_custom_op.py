"""What of its caller's state must not reach into an operator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from turbodit.kernels.linear_attention import key_value_sums, linear_output
from turbodit.kernels.quantized_attention import quantized_attention
from turbodit.kernels.sparse_attention import sparse_attention

BLOCKS = {"block_q": 16, "block_k": 16}
INDICES = torch.tensor([[1, 2], [0, 2], [0, 1]], dtype=torch.int32).expand(1, 2, 3, 2)
CALLS: list[Callable[..., Any]] = [
    quantized_attention,
    lambda q, k, v: quantized_attention(q, k, v, indices=INDICES, **BLOCKS),
    lambda q, k, v: sparse_attention(q, k, v, INDICES, **BLOCKS),
    lambda q, k, v: key_value_sums(k, v, "softmax")[0],
    lambda q, k, v: linear_output(q, *key_value_sums(k, v, "relu"), "relu"),
]


def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 1, 40, 2, 64, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("call", CALLS)
def test_autocast_changes_nothing(call: Callable[..., Any]) -> None:
    want = call(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(*inputs()), want)


def test_nor_does_it_change_gradients() -> None:
    def gradients() -> tuple[torch.Tensor, ...]:
        q, k, v = (x.requires_grad_() for x in inputs())
        sparse = sparse_attention(q, k, v, INDICES, **BLOCKS)
        linear = linear_output(q, *key_value_sums(k, v, "softmax"), "softmax")
        return torch.autograd.grad(sparse + linear, (q, k, v), q.detach())

    want = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, gradients(), want))


@pytest.mark.parametrize("call", CALLS)
def test_the_device_is_that_of_the_first_tensor(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or nullcontext())
    tensors = inputs()
    call(*tensors)
    known = {x.data_ptr() for x in tensors}
    assert seen and all(x.data_ptr() in known for x in seen)
