"""8-bit linear layers in files: which format they are in, and from one format to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path

import torch

from turbodit.kernels.quantized_linear import DTYPES, Quantized, quantize_weight, scale_shape
from turbodit.kernels.quantized_linear.reference import dequantize
from turbodit.quantization import FORMATS, QuantizedLinear, is_quantizable
from turbodit.weights import LazyTensor, LazyWeights, listing

VALUES = {format: f".{QuantizedLinear.weight_name(format)}" for format in FORMATS}
SCALE, PLAIN = ".scale", ".weight"


def stored_format(weights: LazyWeights, source: Path, stated: str | None = None) -> str | None:
    """The 8-bit format of the linear layers in `weights`, under original names; None if plain.

    Args:
        source: where the weights come from, for errors.
        stated: the format that the source says it has.

    Raises:
        ValueError: layers without a scale, with one of a wrong shape, or in several formats;
            another format than the stated one.
    """
    layers = {layer: _fitting(weights, layer) for layer in _quantized_layers(weights)}
    broken = [_described(weights, layer) for layer, formats in layers.items() if not formats]
    if broken:
        raise ValueError(
            f"{source}: the weights and scales of {len(broken)} layers are of no 8-bit format: "
            f"{listing(broken)}; supported: int8 with a float32 scale for 128 x 128 values, int8 "
            "or fp8 (e4m3) with one for each row"
        )
    common = _common_formats(layers, weights, source) if layers else set()
    if stated is not None and stated not in common:
        found = " or ".join(sorted(common)) or "not quantised"
        raise ValueError(f"{source} says that its linear layers are {stated}, but they are {found}")
    return stated or next((format for format in FORMATS if format in common), None)


def _common_formats(layers: dict[str, set[str]], weights: LazyWeights, source: Path) -> set[str]:
    """The formats that all layers can be of; those of `layers`, and those that are plain."""
    layers = layers | {layer: {"not quantised"} for layer in _plain_layers(weights)}
    common = set.intersection(*layers.values())
    if not common:
        kinds = {" or ".join(sorted(formats)): layer for layer, formats in layers.items()}
        found = ", ".join(f"{layer} is {kind}" for kind, layer in kinds.items())
        raise ValueError(f"{source} mixes formats of linear layers: {found}")
    return common


def convert_linears(
    weights: LazyWeights,
    layers: Iterable[str],
    source: Path,
    *,
    old: str | None,
    new: str,
    device: torch.device | str,
) -> LazyWeights:
    """`weights` with `layers` in another format, each converted on `device` when it is read.

    From one 8-bit format to another they are rounded twice.

    Args:
        source: where the weights come from, for errors.
        old, new: formats; old is None for plain weights.

    Raises, when one is read:
        ValueError: NaN or infinite weights.
    """

    @lru_cache(maxsize=1)  # its values and its scale are read in turn
    def converted(layer: str) -> Quantized:
        try:
            return quantize_weight(_plain(weights, layer, old, device), new)
        except ValueError as error:
            raise ValueError(f"{source}: {layer}: {error}") from error

    layers = set(layers)
    result: dict[str, LazyTensor] = {}
    for name, tensor in weights.items():
        layer, _, part = name.rpartition(".")
        if layer not in layers or part == "bias":
            result[name] = tensor
        elif f".{part}" != SCALE:
            result |= _lazy(layer, tensor.shape, new, partial(converted, layer))
    return result


def _lazy(
    layer: str, shape: tuple[int, ...], format: str, convert: Callable[[], Quantized]
) -> dict[str, LazyTensor]:
    scales = scale_shape(shape, format)
    return {
        layer + VALUES[format]: LazyTensor(shape, DTYPES[format], lambda: convert().values),
        layer + SCALE: LazyTensor(scales, torch.float32, lambda: convert().scale),
    }


def _plain(
    weights: LazyWeights, layer: str, format: str | None, device: torch.device | str
) -> torch.Tensor:
    """The weight of a layer in floating point, on `device`."""
    if format is None:
        return weights[layer + PLAIN].read().to(device)
    values = weights[layer + VALUES[format]].read().to(device)
    return dequantize(values, weights[layer + SCALE].read().to(device), format)


def _quantized_layers(weights: LazyWeights) -> list[str]:
    endings = tuple(VALUES.values())
    return [name.rpartition(".")[0] for name in weights if name.endswith(endings)]


def _plain_layers(weights: LazyWeights) -> list[str]:
    """Layers that are quantised in quantised models, and are not in `weights`."""
    matrices = [name for name, tensor in weights.items() if tensor.ndim == 2]
    layers = [name.removesuffix(PLAIN) for name in matrices if name.endswith(PLAIN)]
    return [layer for layer in layers if is_quantizable(layer)]


def _fitting(weights: LazyWeights, layer: str) -> set[str]:
    """The formats that a layer's weight and scale can be of."""
    scale = weights.get(layer + SCALE)
    if scale is None or scale.dtype != torch.float32:
        return set()
    values = {format: weights.get(layer + ending) for format, ending in VALUES.items()}
    return {
        format
        for format, stored in values.items()
        if stored is not None
        and (stored.ndim, stored.dtype) == (2, DTYPES[format])
        and scale.shape == scale_shape(stored.shape, format)
    }


def _described(weights: LazyWeights, layer: str) -> str:
    parts = []
    for ending in (*dict.fromkeys(VALUES.values()), SCALE):
        tensor = weights.get(layer + ending)
        if tensor is not None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            parts.append(f"{ending[1:]} {dtype} {tensor.shape}")
        elif ending == SCALE:
            parts.append("no scale")
    return f"{layer} ({', '.join(parts)})"
