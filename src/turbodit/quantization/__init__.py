"""8-bit linear layers (W8A8) of the DiT: which layers have them, and the module that they are.

Every linear layer inside the blocks is quantised but SLA's `proj_l`; embeddings and head are
not. `kernels.quantized_linear` says what the formats are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from turbodit.kernels import missing
from turbodit.kernels.norm import ROW_FORMATS
from turbodit.kernels.quantized_linear import (
    BLOCK,
    DTYPES,
    FORMATS,
    Quantized,
    gelu_linear,
    quantize_activation,
    quantize_weight,
    quantized_linear,
    scale_shape,
)

__all__ = [
    "FORMATS",
    "QuantizedLinear",
    "available",
    "can_concatenate",
    "check_no_lora",
    "concatenate",
    "input_kind",
    "is_quantizable",
    "linear_format",
    "quantize_linears",
    "replace_linears",
]

DESCRIPTIONS = {
    "int8-block": "int8, a scale for 128 x 128 values, as in TurboDiffusion's quantised files",
    "int8-channel": "int8, a scale for each token and output channel",
    "fp8-channel": "float8 e4m3, the same; --linear fp8",
}
QUANTIZED_PART, KEPT = "blocks.", "proj_l"
LORA = ".lora_A"  # at the end of the names of a LoRA's parameters


class QuantizedLinear(nn.Module):
    """A linear layer with an 8-bit weight that quantises its input, or takes it quantised.

    Buffers, named as in TurboDiffusion's files: `int8_weight` or `fp8_weight` (out, in), and
    `scale` float32, (ceil(out/128), ceil(in/128)) for "int8-block" and (out, 1) for the others.

    Args:
        format: one of FORMATS.
        dtype: of the output and the bias, where the input is quantised already.

    Raises:
        ValueError: unknown format.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: str,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if format not in FORMATS:
            raise ValueError(f"unknown 8-bit format {format!r}; supported: {', '.join(FORMATS)}")
        self.in_features, self.out_features, self.format = in_features, out_features, format
        shape = (out_features, in_features)
        weight = torch.empty(shape, dtype=DTYPES[format], device=device)
        self.register_buffer(self.weight_name(format), weight)
        scale = torch.empty(scale_shape(shape, format), dtype=torch.float32, device=device)
        self.register_buffer("scale", scale)
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )

    @staticmethod
    def weight_name(format: str) -> str:
        """The buffer that holds the weight."""
        return "fp8_weight" if format == "fp8-channel" else "int8_weight"

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: str) -> QuantizedLinear:
        """`linear` quantised, on its device.

        Raises:
            ValueError: unknown format, or NaN or infinite weights.
        """
        new = cls(
            linear.in_features,
            linear.out_features,
            format,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        new.set_weight(quantize_weight(linear.weight.detach(), format))
        if linear.bias is not None:
            new.bias = linear.bias
        return new

    @property
    def weight(self) -> Quantized:
        return Quantized(getattr(self, self.weight_name(self.format)), self.scale)

    def set_weight(self, weight: Quantized) -> None:
        setattr(self, self.weight_name(self.format), weight.values)
        self.scale = weight.scale

    @property
    def dtype(self) -> torch.dtype:
        """Of the output, where the input does not say: that of the bias."""
        return torch.get_default_dtype() if self.bias is None else self.bias.dtype

    def forward(self, x: torch.Tensor | Quantized) -> torch.Tensor:
        """(..., in) -> (..., out), in the dtype of x, or in `dtype` where x is quantised."""
        if isinstance(x, torch.Tensor):
            inputs = quantize_activation(x, self.format)
            return quantized_linear(inputs, self.weight, self.bias, self.format, x.dtype)
        return quantized_linear(x, self.weight, self.bias, self.format, self.dtype)

    def gelu(self, x: Quantized) -> Quantized:
        """gelu (tanh form) of what the layer makes of x, quantised: for "fp8-channel" only.

        Raises:
            ValueError: a layer of another format.
        """
        if self.format != "fp8-channel":
            raise ValueError(f"gelu is for fp8-channel, this layer is {self.format}")
        return gelu_linear(x, self.weight, self.bias, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


Linear = nn.Linear | QuantizedLinear


def linear_format(name: str) -> str:
    """The format that users call `name`: they say "fp8" for "fp8-channel".

    Raises:
        ValueError: there is none.
    """
    format = "fp8-channel" if name == "fp8" else name
    if format not in FORMATS:
        raise ValueError(f"unknown 8-bit format {name!r}; supported: {', '.join(FORMATS)}, fp8")
    return format


def available(format: str, device: torch.device | str) -> tuple[bool, str]:
    """(True, description) if a format's layers run on a device, else (False, what is missing)."""
    reason = missing(torch.device(device), (8, 9) if format == "fp8-channel" else (8, 0))
    return (reason is None, reason or DESCRIPTIONS[format])


def is_quantizable(name: str) -> bool:
    """Whether the linear layer called `name` in a WanModel is one that is quantised."""
    return name.startswith(QUANTIZED_PART) and not name.endswith(KEPT)


def quantize_linears(model: nn.Module, format: str) -> None:
    """Quantise a model's linear layers in place, one after the other.

    Raises:
        ValueError: unknown format, NaN or infinite weights (it says of which layer), or a LoRA
            beside the layers.
    """
    check_no_lora(model)

    def quantized(name: str, linear: nn.Linear) -> QuantizedLinear:
        try:
            return QuantizedLinear.from_linear(linear, format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    _exchange(model, quantized)


def replace_linears(model: nn.Module, format: str) -> None:
    """Put unfilled 8-bit layers in place of a model's linear layers, on their device."""

    def empty(_: str, linear: nn.Linear) -> QuantizedLinear:
        return QuantizedLinear(
            linear.in_features,
            linear.out_features,
            format,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )

    _exchange(model, empty)


def check_no_lora(model: nn.Module) -> None:
    """Raise a ValueError if a model's layers have LoRA matrices beside their weights."""
    found = [name for name, _ in model.named_parameters() if name.endswith(LORA)]
    if found:
        raise ValueError(
            f"the model has a LoRA beside its weights ({len(found)} layers, such as "
            f"{found[0].removesuffix(LORA)}); merge it first (training.parameters.merge_lora)"
        )


def _exchange(model: nn.Module, new: Callable[[str, nn.Linear], nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantizable(name):
            model.set_submodule(name, new(name, module))


def concatenate(linears: Sequence[Linear]) -> Linear:
    """One layer for inference whose output is that of several, side by side.

    Raises:
        ValueError: layers that `can_concatenate` says do not go together.
    """
    if not can_concatenate(linears):
        raise ValueError(f"layers that do not go together: {', '.join(map(str, linears))}")
    first, has_bias = linears[0], linears[0].bias is not None
    outputs = sum(linear.out_features for linear in linears)
    joined: Linear
    if isinstance(first, QuantizedLinear):
        joined = QuantizedLinear(
            first.in_features, outputs, first.format, bias=has_bias, device="meta"
        )
        parts = [linear.weight for linear in linears if isinstance(linear, QuantizedLinear)]
        joined.set_weight(Quantized(*(torch.cat(part) for part in zip(*parts, strict=True))))
    else:
        joined = nn.Linear(first.in_features, outputs, bias=has_bias, device="meta")
        joined.weight = nn.Parameter(torch.cat([x.weight.data for x in _plain(linears)]))
    if has_bias:
        biases = [linear.bias.data for linear in linears if linear.bias is not None]
        joined.bias = nn.Parameter(torch.cat(biases))
    return joined.eval().requires_grad_(False)


def _plain(linears: Sequence[Linear]) -> list[nn.Linear]:
    return [linear for linear in linears if isinstance(linear, nn.Linear)]


def can_concatenate(layers: Sequence[nn.Module]) -> bool:
    """Whether layers are linear ones of one kind and input, with nothing beside their weights, and
    no block of scales would belong to two."""
    linears = [layer for layer in layers if isinstance(layer, (nn.Linear, QuantizedLinear))]
    if len(linears) < len(layers):
        return False
    formats = {getattr(linear, "format", None) for linear in linears}
    kinds = {(linear.in_features, linear.bias is None) for linear in linears}
    whole_blocks = all(linear.out_features % BLOCK == 0 for linear in linears)
    return len(formats) == len(kinds) == 1 and ("int8-block" not in formats or whole_blocks)


def input_kind(linear: nn.Module, dtype: torch.dtype) -> torch.dtype | str:
    """What a norm in front of a layer should give it: 8-bit rows, or `dtype`."""
    if isinstance(linear, QuantizedLinear) and linear.format in ROW_FORMATS:
        return linear.format
    return dtype
