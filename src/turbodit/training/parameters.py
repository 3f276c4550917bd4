"""Which parameters of a DiT are trained: all, some, or LoRA matrices beside frozen weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from turbodit.checkpoints.lora import Names, write_lora
from turbodit.checkpoints.transformer import LINEAR_BRANCH
from turbodit.quantization import QuantizedLinear

Part = Literal["full", "attention", "proj_l"]

SELF_ATTENTION = ".self_attn."  # in the names of its parameters
DOWN, UP = "lora_A", "lora_B"
LAYERS = ("q", "k", "v", "o", "k_img", "v_img", "ffn.0", "ffn.2")  # that LoRA can be put around
PACKED = (".qkv.", ".kv.", ".kv_img.")


@dataclass(frozen=True)
class LoRA:
    """Training of two thin matrices for each layer, W + alpha / rank * up @ down
    (arXiv:2106.09685).

    Attributes:
        rank: of the matrices.
        alpha: None: the rank, so that the factor is 1.
        targets: layers in every block, of both attentions where both have one of that name.
    """

    rank: int = 32
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank of a LoRA must be positive, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"the alpha of a LoRA must be positive and finite, got {self.alpha}")
        unknown = [target for target in self.targets if target not in LAYERS]
        if unknown or not self.targets:
            raise ValueError(
                f"a LoRA got the targets {', '.join(self.targets) or 'none'}; supported: "
                f"{', '.join(LAYERS)}"
            )

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LoRALinear(nn.Module):
    """A frozen linear layer and its LoRA, y = W x + b + scale * up (down x).

    `weight` and `bias` are those of the layer and keep their names; the matrices are `lora_A`
    (rank, in) and `lora_B` (out, rank), in the dtype and on the device of the weight. It is
    no nn.Linear: what takes the weight of one, as the fused feed-forward does, would leave the
    matrices out.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = scale
        self.weight, self.bias = linear.weight, linear.bias
        weight = linear.weight.detach()
        self.lora_A = nn.Parameter(weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(weight.new_empty(self.out_features, rank))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """down uniform with standard deviation 1 / sqrt(3 in), up zero: no change at first."""
        bound = self.in_features**-0.5
        self.lora_A.uniform_(-bound, bound, generator=generator)
        self.lora_B.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        change = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * change

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.lora_A.shape[0]}"


def select_trainable(
    model: nn.Module, part: Part | LoRA, generator: torch.Generator | None = None
) -> dict[str, nn.Parameter]:
    """Let `part` of a WanModel require gradients, and nothing else.

    Call it before the model is sharded. The keys of the base's state dict stay.

    Args:
        part: "full"; "attention", all of self attention with the linear branch of SLA, if
            there is one; "proj_l", that branch alone; or a LoRA, which is put into the model
            in place, trained together with the linear branch, if there is one.
        generator: for a LoRA's first values, on the model's device.

    Returns:
        The parameters that train, by name.

    Raises:
        ValueError: unknown part, 8-bit or packed layers, a linear branch to train where there
            is none, or a LoRA in a model that has one or has no layer for it.
    """
    _check_trainable(model)
    if isinstance(part, LoRA):
        _add_lora(model, part, generator)
    elif part not in get_args(Part):
        raise ValueError(
            f"cannot train {part!r}; supported: {', '.join(get_args(Part))}, or a LoRA"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(name, part))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            f"nothing of the model is {part!r}: its attention has no linear branch; supported: "
            "attention 'sla'"
        )
    return trained


def merge_lora(model: nn.Module) -> None:
    """Add the LoRA matrices in a model to its weights, in place and in float32, and remove them.

    Raises:
        ValueError: there are none.
    """
    layers = _lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA to merge")
    for name, layer in layers.items():
        linear = nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        linear.weight, linear.bias = layer.weight, layer.bias
        with torch.no_grad():
            change = layer.scale * (layer.lora_B.float() @ layer.lora_A.float())
            linear.weight.copy_(layer.weight.float() + change)
        model.set_submodule(name, linear)


def save_lora(
    state: Mapping[str, torch.Tensor],
    lora: LoRA,
    path: Path,
    names: Names,
    stated: Mapping[str, Any],
) -> None:
    """Write the LoRA in a model's state dict alone, as `turbodit merge --lora` reads it.

    Parameters of SLA's linear branch go with it as they are.

    Args:
        state: whole tensors, of the model or of its average.
        lora: that was selected.
        names: "diffusers", for diffusers and PEFT; or "native", for ComfyUI and others.
        stated: the attention that it was trained with, as `load_transformer` takes it:
            {"attention": "sla", "attention_settings": {"ratio": 0.1}}; or nothing.

    Raises:
        ValueError: no LoRA in `state`, or unknown names.
        OSError: it cannot be written.
    """
    layers = [name.removesuffix(f".{DOWN}") for name in state if name.endswith(f".{DOWN}")]
    factors = {layer: (state[f"{layer}.{DOWN}"], state[f"{layer}.{UP}"]) for layer in layers}
    branch = {name: tensor for name, tensor in state.items() if LINEAR_BRANCH in name}
    write_lora(path, factors, lora.scale * lora.rank, names, branch, stated)


def _is_trained(name: str, part: Part | LoRA) -> bool:
    if isinstance(part, LoRA):
        return LINEAR_BRANCH in name or name.endswith((f".{DOWN}", f".{UP}"))
    if part == "attention":
        return SELF_ATTENTION in name
    return part == "full" or LINEAR_BRANCH in name


def _check_trainable(model: nn.Module) -> None:
    quantized = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    if quantized:
        raise ValueError(
            f"the model is quantised ({quantized[0]} and {len(quantized) - 1} more layers); "
            "8-bit layers have no gradient: load it in floating point"
        )
    packed = [name for name, _ in model.named_parameters() if any(p in name for p in PACKED)]
    if packed:
        raise ValueError(f"the model is packed for inference ({packed[0]}); load it anew")


def _add_lora(model: nn.Module, lora: LoRA, generator: torch.Generator | None) -> None:
    if _lora_layers(model):
        raise ValueError("the model has a LoRA already; merge it first")
    endings = tuple(f".{target}" for target in lora.targets)
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and name.endswith(endings)
    ]
    if not layers:
        raise ValueError(f"the model has no layer for a LoRA of {', '.join(lora.targets)}")
    for name, linear in layers:
        layer = LoRALinear(linear, lora.rank, lora.scale)
        layer.reset_parameters(generator)
        model.set_submodule(name, layer)


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
