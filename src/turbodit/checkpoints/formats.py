"""Foreign state dicts of the Wan DiT, brought to original names and shapes.

What differs between their writers: prefixes, traces of wrappers, diffusers' names, and a
patch embedding stored as a linear layer. Quantised files are recognised and refused.
"""

from __future__ import annotations

from pathlib import Path

from turbodit.checkpoints.keys import to_native
from turbodit.weights import Weights, listing

# In the order of preference, as one file can hold several networks: ComfyUI's two; rCM's
# averaged and raw weights; none.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net_ema.", "net.", "")
ANCHOR = "patch_embedding.weight"  # has this name in every layout
WRAPPER_TRACES = ("_checkpoint_wrapped_module.", "_orig_mod.")
PATCH = (1, 2, 2)
DIFFUSERS_ONLY = "attn2.norm_added_q.weight"  # in older diffusers exports, never used

UNSUPPORTED = {  # part of a name -> what a file with such names is
    ".int8_weight": "an int8-quantised file",
    ".scale_weight": "a scaled fp8 file",
    "scaled_fp8": "a scaled fp8 file",
    ".lora_": "a LoRA, not a whole model",
}


def native_weights(weights: Weights, source: Path) -> Weights:
    """The DiT in `weights` under original names, its patch embedding as a convolution.

    Raises:
        ValueError: no Wan DiT in it, or a kind of file that is not supported.
    """
    for mark, kind in UNSUPPORTED.items():
        if any(mark in name for name in weights):
            raise ValueError(f"{source} is {kind}; not supported yet")
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
    patch_embedding = native[ANCHOR]
    if patch_embedding.ndim == 2:  # linear over (channel, kt, kh, kw)
        native[ANCHOR] = patch_embedding.unflatten(1, (-1, *PATCH))
    return native


def _unwrapped(name: str) -> str:
    for trace in WRAPPER_TRACES:
        name = name.replace(trace, "")
    return name
