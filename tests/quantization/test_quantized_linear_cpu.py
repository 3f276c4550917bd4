"""8-bit layers on a CPU: SpriteWan's sizes, by way of the module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from turbodit.kernels.quantized_linear import FORMATS, quantize_activation, reference
from turbodit.quantization import QuantizedLinear

SIZES = [(576, 256, 1024), (1152, 1024, 256), (2, 256, 256)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_a_layer_is_exact_in_what_it_stores(
    rows: int, inputs: int, outputs: int, format: str
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs)
    layer, x = QuantizedLinear.from_linear(linear, format), torch.randn(2, rows // 2, inputs)
    a = reference.dequantize(*quantize_activation(x, format), format).double()
    b = reference.dequantize(*layer.weight, format).double()
    with torch.no_grad():
        y = layer(x)
        want, magnitude = a @ b.t() + linear.bias.double(), a.abs() @ b.t().abs()
        assert ((y - want).abs() <= 2**-22 * magnitude + 2**-24).all()
        # And what is stored is near what was given.
        error = (y - linear(x)).norm() / linear(x).norm()
    assert error < (0.04 if format == "fp8-channel" else 0.02)


@pytest.mark.parametrize("format", ["int8-block", "int8-channel"])
def test_integers_are_multiplied_as_integers(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    calls, int_mm = [], torch._int_mm
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", lambda *a, **k: calls.append(a) or int_mm(*a, **k))
    layer = QuantizedLinear.from_linear(nn.Linear(256, 64), format)
    with torch.no_grad():
        layer(torch.randn(3, 200, 256))
    assert calls and all(x.dtype == torch.int8 for call in calls for x in call)
