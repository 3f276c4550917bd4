"""The feed-forward network in 8 bits: whose product ends with GELU, and that nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from turbodit.kernels.quantized_linear import FORMATS, Quantized, quantize_activation
from turbodit.model.layers import FeedForward
from turbodit.quantization import QuantizedLinear


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def feed_forward(up: str, down: str) -> FeedForward:
    layers = FeedForward(48, 80)
    layers[0] = QuantizedLinear.from_linear(layers[0].bfloat16(), up)
    layers[2] = QuantizedLinear.from_linear(layers[2].bfloat16(), down)
    return layers.requires_grad_(False)


def rows(format: str) -> Quantized:
    return quantize_activation(torch.randn(2, 5, 48), format)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedLinear]:
    """The layers whose product ended with GELU."""
    made: list[QuantizedLinear] = []
    gelu = QuantizedLinear.gelu
    monkeypatch.setattr(QuantizedLinear, "gelu", lambda self, x: made.append(self) or gelu(self, x))
    return made


@pytest.mark.parametrize("down", FORMATS)
@pytest.mark.parametrize("up", FORMATS)
def test_feed_forward_is_its_parts(up: str, down: str, calls: list[QuantizedLinear]) -> None:
    layers, x = feed_forward(up, down), torch.randn(2, 5, 48).bfloat16()
    given = x if up == "int8-block" else rows(up)
    hidden = quantize_activation(layers[0](given), down, "gelu")
    got = layers(given)
    assert got.dtype == torch.bfloat16 and torch.equal(got, layers[2](hidden))
    assert calls == ([layers[0]] if up == down == "fp8-channel" else [])
    layers(x)
    assert len(calls) <= 1  # what is not quantised takes the other way


def test_feed_forward_compiles_as_one_graph() -> None:
    layers, x = feed_forward("fp8-channel", "fp8-channel"), rows("fp8-channel")
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layers(x))


def test_gelu_is_that_of_the_weights_of_now() -> None:
    """Loaded, assigned or written in place: nothing is kept of those before."""
    first, second = (QuantizedLinear.from_linear(nn.Linear(48, 80), "fp8-channel") for _ in "12")
    x = rows("fp8-channel")
    with torch.no_grad():
        before, want = first.gelu(x), second.gelu(x)
        assert not torch.equal(before.scale, want.scale)
        with torch.device("meta"):
            empty = QuantizedLinear(48, 80, "fp8-channel")
        empty.load_state_dict(second.state_dict(), assign=True)
        first.bias.copy_(second.bias)
        first.set_weight(second.weight)
        for layer in (empty, first):
            got = layer.gelu(x)
            assert torch.equal(got.values.float(), want.values.float())
            assert torch.equal(got.scale, want.scale)


def test_shapes_are_known_without_data() -> None:
    with torch.device("meta"):
        layer = QuantizedLinear(48, 80, "fp8-channel", bias=False)
        x = Quantized(torch.empty(2, 5, 48, dtype=torch.float8_e4m3fn), torch.empty(2, 5, 1))
        values, scale = layer.gelu(x)
    assert values.shape == (2, 5, 80) and values.dtype == torch.float8_e4m3fn
    assert scale.shape == (2, 5, 1) and scale.dtype == torch.float32


@pytest.mark.parametrize("format", ["int8-block", "int8-channel"])
def test_other_formats_are_refused(format: str) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(48, 80), format)
    with pytest.raises(ValueError, match=f"gelu is for fp8-channel, this layer is {format}"):
        layer.gelu(rows(format))
