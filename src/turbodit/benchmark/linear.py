"""The linear layers of a DiT: 8-bit formats beside PyTorch's own product in 16 or 32 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from turbodit.benchmark import draw
from turbodit.benchmark.measure import (
    Times,
    attempt,
    free,
    replayed_milliseconds,
    significant,
)
from turbodit.benchmark.modes import Mode, why_not
from turbodit.benchmark.report import OUT_OF_MEMORY, Report, not_measured, paragraphs, spread, table
from turbodit.benchmark.workload import Workload, dtype_on
from turbodit.config import TransformerConfig
from turbodit.kernels.quantized_linear import (
    FORMATS,
    quantize_activation,
    quantize_weight,
    quantized_linear,
)

REPEATS = {"cuda": 20, "cpu": 3}
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Layer:
    """x (rows, inputs) -> (rows, outputs)."""

    name: str
    rows: int
    inputs: int
    outputs: int

    @property
    def label(self) -> str:
        return f"{self.name}: {self.rows} x {self.inputs} x {self.outputs}"

    def tops(self, ms: float) -> float:
        """Tera-operations a second: two for each product that is added."""
        return significant(2 * self.rows * self.inputs * self.outputs / ms / 1e9)


def layers(config: TransformerConfig, tokens: int) -> list[Layer]:
    """The shapes of a block's linear layers."""
    dim, hidden = config.dim, config.ffn_dim
    return [
        Layer("q, k and v in one", tokens, dim, 3 * dim),
        Layer("one of q, k, v, o", tokens, dim, dim),
        Layer("up", tokens, dim, hidden),
        Layer("down", tokens, hidden, dim),
        Layer("k and v of text", config.text_len, dim, 2 * dim),
    ]


@torch.no_grad()
def measure(layer: Layer, device: torch.device, repeats: int) -> dict[str, Any]:
    """PyTorch's product, and each format that runs: its parts and the whole."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator, device=device)
        return noise.to(dtype_on(device))

    x, bias = normal(layer.rows, layer.inputs), normal(layer.outputs)
    weight = normal(layer.outputs, layer.inputs) / layer.inputs**0.5

    def timed(call: Callable[[], Any]) -> Times:
        return replayed_milliseconds(call, device, repeats)

    want = F.linear(x.float(), weight.float(), bias.float())
    plain = timed(lambda: F.linear(x, weight, bias))
    found = {
        str(x.dtype).removeprefix("torch."): {
            "ms": plain.summary(),
            "tops": layer.tops(plain.median),
            "relative_l2": relative_l2(F.linear(x, weight, bias), want),
        }
    }
    for format in FORMATS:
        if why_not(Mode("", linear=format), device) is None:
            found[format] = _of_format(layer, format, x, weight, bias, want, timed)
    return found


def _of_format(
    layer: Layer,
    format: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    want: torch.Tensor,
    timed: Callable[[Callable[[], Any]], Times],
) -> dict[str, Any]:
    small = quantize_weight(weight, format)
    quantized = quantize_activation(x, format)

    def product() -> torch.Tensor:
        return quantized_linear(quantized, small, bias, format, x.dtype)

    def whole() -> torch.Tensor:
        return quantized_linear(quantize_activation(x, format), small, bias, format, x.dtype)

    quantizing = timed(lambda: quantize_activation(x, format))
    multiplying, together = timed(product), timed(whole)
    return {
        "quantize_ms": quantizing.summary(),
        "product_ms": multiplying.summary(),
        "product_tops": layer.tops(multiplying.median),
        "ms": together.summary(),
        "tops": layer.tops(together.median),
        "relative_l2": relative_l2(whole(), want),
    }


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||, want in float32."""
    return round(((got.float() - want).norm() / want.norm()).item(), 6)


def report(
    workload: Workload, device: torch.device, repeats: int | None = None, tell: Tell = print
) -> Report:
    """Measure a model's layers at its number of tokens and describe them."""
    repeats = repeats or REPEATS[device.type]
    found = {}
    for layer in layers(workload.model.transformer, workload.tokens):
        tell(f"linear: {layer.label}")
        free()
        found[layer.label] = attempt(partial(measure, layer, device, repeats))
    missing = {format: why_not(Mode("", linear=format), device) for format in FORMATS}
    numbers = workload.summary() | {
        "repeats": repeats,
        "missing": {format: reason for format, reason in missing.items() if reason is not None},
        "layers": {name: rows or OUT_OF_MEMORY for name, rows in found.items()},
    }
    return Report("linear", workload.label, numbers, markdown(numbers), picture(numbers, workload))


def markdown(numbers: Mapping[str, Any]) -> str:
    """One table for each layer."""
    header = ("", "quantise, ms", "product + bias, ms", "TOP/s", "together, ms", "TOP/s", "error")
    parts = [
        f"Rows x inputs x outputs; {numbers['repeats']} calls each, minimum / median / maximum in "
        "milliseconds. The error is against float32. TOP/s are of the medians.",
        not_measured(numbers["missing"]),
    ]
    for name, rows in numbers["layers"].items():
        if rows == OUT_OF_MEMORY:
            parts.append(f"{name}: {OUT_OF_MEMORY}")
        else:
            parts += [name, table(header, ((form, *_cells(row)) for form, row in rows.items()))]
    return paragraphs(*parts)


def _cells(row: Mapping[str, Any]) -> list[Any]:
    return [
        spread(row.get("quantize_ms"), 3),
        spread(row.get("product_ms"), 3),
        row.get("product_tops"),
        spread(row["ms"], 3),
        row["tops"],
        f"{row['relative_l2']:.2%}",
    ]


def picture(numbers: Mapping[str, Any], workload: Workload) -> Image.Image:
    """TOP/s of quantisation, product and bias together, as bars."""
    rows = [
        draw.Bar(f"{name}, {format}", row["tops"], f"{row['tops']:,.3g} TOP/s")
        for name, formats in numbers["layers"].items()
        if formats != OUT_OF_MEMORY
        for format, row in formats.items()
    ]
    rows = rows or [draw.Bar("all", None, OUT_OF_MEMORY)]
    return draw.bars(f"Linear layers, quantisation included: {workload.label}", rows)
