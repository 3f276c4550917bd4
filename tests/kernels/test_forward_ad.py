"""Tangents of a linear map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from turbodit.kernels.forward_ad import linear
from turbodit.model.layers import Linear


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func._schema.name in ("aten::mm", "aten::addmm")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    """x (2, 5, 8), weight, bias, and a tangent for each."""
    torch.manual_seed(0)
    shapes = 2 * ((2, 5, 8), (12, 8), (12,))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(
    ("given", "has_bias"),
    [
        ((0,), True), ((1,), True), ((0, 1), True), ((0, 2), True), ((0, 1, 2), True),
        ((0,), False), ((1,), False), ((0, 1), False),
    ],
)  # fmt: skip
def test_tangent_is_that_of_pytorch(
    inputs: list[torch.Tensor], given: tuple[int, ...], has_bias: bool
) -> None:
    def jvp(function: Any) -> tuple[torch.Tensor, torch.Tensor]:
        def run(*some: torch.Tensor) -> torch.Tensor:
            arguments = inputs[:3] if has_bias else [*inputs[:2], None]
            for i, value in zip(given, some, strict=True):
                arguments[i] = value
            return function(*arguments)

        directions = tuple(inputs[3 + i] for i in given)
        return torch.func.jvp(run, tuple(inputs[i] for i in given), directions)

    torch.testing.assert_close(jvp(linear), jvp(F.linear))


def test_tangent_takes_one_product(inputs: list[torch.Tensor]) -> None:
    layer = Linear(8, 12).double().requires_grad_(False)
    with Products() as products:
        torch.func.jvp(layer, (inputs[0],), (inputs[3],))
    assert products.count == 2  # value and tangent; three by PyTorch's rule


def test_without_tangents_it_is_a_linear_layer(inputs: list[torch.Tensor]) -> None:
    layer, same = Linear(8, 12).double(), torch.nn.Linear(8, 12).double()
    same.load_state_dict(layer.state_dict())
    results = []
    for one in (layer, same):
        out = one(inputs[0])
        out.square().sum().backward()
        results.append((out, one.weight.grad, one.bias.grad))
    assert all(map(torch.equal, *results))


def test_a_tangent_has_gradients(inputs: list[torch.Tensor]) -> None:
    x, weight, bias, direction, *_ = inputs
    results = []
    for function in (linear, F.linear):
        w = weight.clone().requires_grad_()
        out, tangent = torch.func.jvp(lambda x: function(x, w, bias), (x,), (direction,))  # noqa: B023
        (out.square() + tangent.square()).sum().backward()
        results.append(w.grad)
    torch.testing.assert_close(*results)
