"""Foreign state dicts of the Wan DiT, brought to original names and shapes.

What differs between their writers: prefixes, traces of wrappers, diffusers' names, a patch
embedding stored as a linear layer, and ComfyUI's fp8 weights with a scale beside them.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from turbodit.checkpoints.keys import to_native
from turbodit.weights import LazyTensor, LazyWeights, listing

# In the order of preference, as one file can hold several networks: ComfyUI's two; rCM's
# averaged and raw weights; none.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net_ema.", "net.", "")
ANCHOR = "patch_embedding.weight"  # has this name in every layout
WRAPPER_TRACES = ("_checkpoint_wrapped_module.", "_orig_mod.")
PATCH = (1, 2, 2)
DIFFUSERS_ONLY = "attn2.norm_added_q.weight"  # in older diffusers exports, never used

FP8_MARK = "scaled_fp8"  # an empty tensor in ComfyUI's files of that kind
FP8_SCALE = ".scale_weight"  # one number, of the weight beside it
FP8_INPUT_SCALE = ".scale_input"  # a hint for a product in fp8; we find scales as we go

UNSUPPORTED = {  # part of a name -> what a file with such names is
    ".lora_": "a LoRA, not a whole model: merge it with turbodit merge --lora",
}


def native_weights(weights: LazyWeights, source: Path) -> LazyWeights:
    """The DiT in `weights` under original names, its patch embedding as a convolution.

    ComfyUI's scaled fp8 weights are multiplied by their scales, into float32.

    Raises:
        ValueError: no Wan DiT in it, or a kind of file that is not supported.
    """
    for mark, kind in UNSUPPORTED.items():
        if any(mark in name for name in weights):
            raise ValueError(f"{source} is {kind}")
    plain = {_unwrapped(name): name for name in weights}
    prefix = next((prefix for prefix in PREFIXES if prefix + ANCHOR in plain), None)
    if prefix is None:
        raise ValueError(
            f"{source} holds no Wan transformer: no {ANCHOR} among its {len(plain)} names "
            f"({listing(sorted(plain))})"
        )
    native = {
        to_native(name.removeprefix(prefix)): weights[stored]
        for name, stored in plain.items()
        if name.startswith(prefix) and not name.endswith(DIFFUSERS_ONLY)
    }
    if native[ANCHOR].ndim == 2:
        native[ANCHOR] = _as_convolution(native[ANCHOR])
    return _without_fp8_scales(native, source)


def _as_convolution(linear: LazyTensor) -> LazyTensor:
    """(dim, channels * kt * kh * kw) -> (dim, channels, kt, kh, kw)"""
    dim, features = linear.shape
    shape = (dim, features // math.prod(PATCH), *PATCH)
    return LazyTensor(shape, linear.dtype, lambda: linear.read().unflatten(1, (-1, *PATCH)))


def _without_fp8_scales(weights: dict[str, LazyTensor], source: Path) -> LazyWeights:
    """`weights` with the scaled ones multiplied by their scales."""
    scales = {
        name.removesuffix(FP8_SCALE): tensor
        for name, tensor in weights.items()
        if name.endswith(FP8_SCALE)
    }
    extra = (FP8_MARK, *(layer + part for layer in scales for part in (FP8_SCALE, FP8_INPUT_SCALE)))
    plain = {name: tensor for name, tensor in weights.items() if name not in extra}
    for layer, scale in scales.items():
        weight = weights.get(f"{layer}.weight")
        if weight is None or weight.dtype.itemsize > 1 or math.prod(scale.shape) != 1:
            found = "none" if weight is None else str(weight.dtype)
            raise ValueError(
                f"{source}: {layer}{FP8_SCALE} {scale.shape} is expected to be one number, of an "
                f"fp8 weight; the weight is {found}"
            )
        plain[f"{layer}.weight"] = _scaled(weight, scale)
    return plain


def _scaled(weight: LazyTensor, scale: LazyTensor) -> LazyTensor:
    def read() -> torch.Tensor:
        return weight.read().float() * scale.read().float().reshape(())

    return LazyTensor(weight.shape, torch.float32, read)


def _unwrapped(name: str) -> str:
    for trace in WRAPPER_TRACES:
        name = name.replace(trace, "")
    return name
