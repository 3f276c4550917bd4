"""LoRA files (arXiv:2106.09685): a layer's change as the product of two thin matrices.

    W + strength * alpha / rank * up @ down         down (rank, in), up (out, rank)

All public ways to write them are read into one form, differences by original parameter name:

| form | names |
|---|---|
| diffusers (PEFT) | `transformer.blocks.0.attn1.to_q.lora_A.weight`, `lora_B` |
| original | `diffusion_model.blocks.0.self_attn.q.lora_down.weight`, `lora_up`, or lora_A, lora_B |
| kohya | `lora_unet_blocks_0_self_attn_q.lora_down.weight`, `lora_up` |
| whole differences | `<layer>.diff` of a weight, `<layer>.diff_b` of a bias |

with `<layer>.alpha`, or PEFT's configuration in the file's metadata; without either alpha is the
rank. Parameters of SLA's linear branch (proj_l), which start at zero and have no base to differ
from, may be in the file as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from turbodit.checkpoints.keys import to_diffusers
from turbodit.checkpoints.transformer import LINEAR_BRANCH, empty_transformer
from turbodit.checkpoints.write import CONFIG_KEY, new_file, write_file
from turbodit.config import TransformerConfig
from turbodit.weights import LazyTensor, LazyWeights, lazy_weights, listing, read_metadata

Names = Literal["diffusers", "native"]
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # layer -> down, up

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
KOHYA = "lora_unet_"
DOWN, UP, ALPHA, WEIGHT, BIAS = "down", "up", "alpha", "weight", "bias"
ENDINGS = {
    ".lora_A.weight": DOWN,
    ".lora_down.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_up.weight": UP,
    ".alpha": ALPHA,
    ".diff": WEIGHT,
    ".diff_b": BIAS,
}
PEFT_KEY = "lora_adapter_metadata"  # of diffusers' files: PEFT's LoraConfig as JSON
PEFT_UNSUPPORTED = ("alpha_pattern", "use_rslora", "use_dora")
ANY_CLIP: dict[str, Any] = {
    "image_dim": 1280,
    "image_positions": 514,
}  # so that CLIP's layers have names


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA that is not read yet.

    Attributes:
        deltas: what is added at strength 1, float32, by original parameter name.
        linear_branch: parameters of SLA's linear branch as they are.
        stated: what our own files say in their metadata, such as the attention they are for.
    """

    source: Path
    deltas: LazyWeights
    linear_branch: LazyWeights
    stated: Mapping[str, Any]


def read_lora(source: Path, config: TransformerConfig) -> LoRAFile:
    """The LoRA in a safetensors or PyTorch file.

    Args:
        config: of the model it is for, whose layers give it its names. Layers of CLIP are
            known whether or not the model has them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated file, names that are of no form or no layer, half a pair of
            matrices, matrices whose ranks differ, or a kind of PEFT that is not LoRA alone.
    """
    stored = lazy_weights(source, mapped=False)
    metadata = read_metadata(source) if source.suffix == ".safetensors" else {}
    layers = _layers(config)
    parts: dict[str, dict[str, LazyTensor]] = {}
    branch: dict[str, LazyTensor] = {}
    unknown = []
    for name, tensor in stored.items():
        plain = _without_prefix(name)
        ending = next((ending for ending in ENDINGS if plain.endswith(ending)), "")
        layer = layers.get(plain.removesuffix(ending))
        if LINEAR_BRANCH in plain and plain in layers.values():
            branch[plain] = tensor
        elif ending and layer is not None:
            parts.setdefault(layer, {})[ENDINGS[ending]] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} of {len(stored)} names belong to no known form of LoRA or "
            f"to no layer of the model: {listing(unknown)}; supported endings: "
            f"{', '.join(ENDINGS)}"
        )
    alpha = _peft_alpha(metadata, source)
    deltas: dict[str, LazyTensor] = {}
    for layer, found in parts.items():
        deltas |= _deltas(layer, found, alpha, source)
    return LoRAFile(source, deltas, branch, json.loads(metadata.get(CONFIG_KEY, "{}")))


def write_lora(
    path: Path,
    factors: Factors,
    alpha: float,
    names: Names,
    linear_branch: Mapping[str, torch.Tensor],
    stated: Mapping[str, Any],
) -> None:
    """Write a LoRA as a safetensors file.

    Args:
        factors: down (rank, in) and up (out, rank) by original layer name, such as
            "blocks.0.self_attn.q".
        names: "diffusers" for its names and PEFT's metadata, "native" for original ones and
            an `alpha` for each layer.
        linear_branch: parameters of SLA's linear branch by original name.
        stated: for the metadata, as `LoRAFile.stated`.

    Raises:
        ValueError: unknown names, or nothing to write.
        OSError: it cannot be written.
    """
    if names not in get_args(Names):
        raise ValueError(f"unknown names {names!r}; supported: {', '.join(get_args(Names))}")
    if not factors:
        raise ValueError(f"{path}: there is no LoRA to write")
    tensors: dict[str, torch.Tensor] = {}
    for layer, (down, up) in factors.items():
        if names == "diffusers":
            prefix = f"transformer.{_diffusers_layer(layer)}"
            tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
        else:
            prefix = f"diffusion_model.{layer}"
            tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
            tensors[f"{prefix}.alpha"] = torch.tensor(float(alpha))
    peft = {PEFT_KEY: json.dumps(_peft_config(factors, alpha))} if names == "diffusers" else {}
    prefix = "transformer." if names == "diffusers" else "diffusion_model."
    tensors |= {prefix + name: tensor for name, tensor in linear_branch.items()}
    weights = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    with new_file(path) as partial:
        write_file(partial, weights, stated, metadata=peft)


def _layers(config: TransformerConfig) -> dict[str, str]:
    """How files call the layers and lone parameters of a model -> their original names."""
    model = empty_transformer(replace(config, **ANY_CLIP), None, "sla")
    layers = {}
    for parameter in model.state_dict():
        layer = parameter.removesuffix(".weight").removesuffix(".bias")
        if LINEAR_BRANCH in parameter:
            layers[parameter] = parameter  # as a whole
        layers |= {layer: layer, _diffusers_layer(layer): layer}
        layers[KOHYA + layer.replace(".", "_")] = layer
    return layers


def _diffusers_layer(layer: str) -> str:
    """The diffusers name of a layer or a lone parameter."""
    if not _is_layer(layer):
        return to_diffusers(layer)
    return to_diffusers(f"{layer}.weight").removesuffix(".weight")


def _is_layer(name: str) -> bool:
    """Whether an original name is that of a layer, and not of a lone parameter."""
    return not name.endswith(("modulation", "emb_pos"))


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _deltas(
    layer: str, found: Mapping[str, LazyTensor], alpha: float | None, source: Path
) -> dict[str, LazyTensor]:
    """What the parts of one layer add to its parameters."""
    parameter = f"{layer}.weight" if _is_layer(layer) else layer
    deltas = {}
    if BIAS in found:
        deltas[f"{layer}.bias"] = _float32(found[BIAS])
    if WEIGHT in found:
        deltas[parameter] = _float32(found[WEIGHT])
    if DOWN in found or UP in found or ALPHA in found:
        if WEIGHT in found or not {DOWN, UP} <= found.keys():
            raise ValueError(
                f"{source}: {layer} has {', '.join(found)}; expected down and up, and perhaps "
                "alpha; or a whole difference alone"
            )
        if ALPHA in found:
            alpha = found[ALPHA].read().item()
        deltas[parameter] = _product(layer, found[DOWN], found[UP], alpha, source)
    return deltas


def _product(
    layer: str, down: LazyTensor, up: LazyTensor, alpha: float | None, source: Path
) -> LazyTensor:
    """alpha / rank * up @ down, also of convolutions (rank, in, ...) and (out, rank, 1, ...)."""
    rank = down.shape[0]
    if up.ndim != down.ndim or down.ndim < 2 or math.prod(up.shape[1:]) != rank:
        raise ValueError(
            f"{source}: {layer} has matrices of shapes {down.shape} and {up.shape}; expected "
            "(rank, in) and (out, rank)"
        )
    scale = 1.0 if alpha is None else alpha / rank
    shape = (up.shape[0], *down.shape[1:])

    def read() -> torch.Tensor:
        matrix = up.read().float().flatten(1) @ down.read().float().flatten(1)
        return matrix.mul_(scale).reshape(shape)

    return LazyTensor(shape, torch.float32, read)


def _float32(tensor: LazyTensor) -> LazyTensor:
    def read() -> torch.Tensor:
        return tensor.read().to(torch.float32, copy=True)

    return LazyTensor(tensor.shape, torch.float32, read)


def _peft_alpha(metadata: Mapping[str, str], source: Path) -> float | None:
    """alpha of all layers, as diffusers writes it; None where the file does not say."""
    stated = {
        name.rpartition(".")[2]: value
        for name, value in json.loads(metadata.get(PEFT_KEY, "{}")).items()
    }
    unsupported = [name for name in PEFT_UNSUPPORTED if stated.get(name)]
    if unsupported:
        raise ValueError(
            f"{source} is a kind of LoRA that is not supported: {', '.join(unsupported)}; "
            "supported: one alpha for all layers"
        )
    return stated.get("lora_alpha")


def _peft_config(factors: Factors, alpha: float) -> dict[str, Any]:
    """PEFT's LoraConfig of factors that all have one rank."""
    (rank,) = {down.shape[0] for down, _ in factors.values()}
    layers = sorted(_diffusers_layer(layer) for layer in factors)
    stated = {"r": rank, "lora_alpha": alpha, "target_modules": layers, "peft_type": "LORA"}
    return {f"transformer.{name}": value for name, value in stated.items()}
