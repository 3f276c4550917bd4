"""The ways to compute one and the same DiT that are compared, and how each is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from turbodit import quantization
from turbodit.attention import BACKENDS, available
from turbodit.benchmark.workload import dtype_on
from turbodit.checkpoints.keys import to_native
from turbodit.checkpoints.transformer import config_json
from turbodit.config import ModelConfig, TransformerConfig
from turbodit.model.wan import Residual
from turbodit.quantization import linear_format
from turbodit.random_models import fill_random, random_transformer

RATIO = 0.1  # of the key blocks that SageSLA keeps
FP8 = "fp8-channel"


@dataclass(frozen=True)
class Mode:
    """One way to compute a DiT.

    Attributes:
        original: diffusers' implementation, called as it is; nothing else applies then.
        sparse: SageSLA at RATIO instead of dense attention.
        linear: 8-bit format of the linear layers, or None.
        residual: dtype of the residual stream.
    """

    label: str
    original: bool = False
    sparse: bool = False
    linear: str | None = None
    residual: Residual = "bfloat16"


ORIGINAL = Mode("diffusers, eager", original=True)
REFERENCE = "dense"  # the mode that the others' outputs are compared with
MODES: dict[str, Mode] = {
    "diffusers": ORIGINAL,
    REFERENCE: Mode("ours, dense", residual="float32"),
    "bf16-residual": Mode("+ bfloat16 residual"),
    "fp8": Mode("+ fp8-channel linears", linear="fp8-channel"),
    "int8-channel": Mode("+ int8-channel linears", linear="int8-channel"),
    "int8-block": Mode("+ int8-block linears", linear="int8-block"),
    "sagesla": Mode(f"SageSLA {RATIO}", sparse=True),
    "sagesla-fp8": Mode(f"SageSLA {RATIO}, fp8-channel", sparse=True, linear="fp8-channel"),
    "sagesla-int8-channel": Mode(
        f"SageSLA {RATIO}, int8-channel", sparse=True, linear="int8-channel"
    ),
    "sagesla-int8-block": Mode(f"SageSLA {RATIO}, int8-block", sparse=True, linear="int8-block"),
}


def chosen_modes(names: Sequence[str], device: torch.device) -> dict[str, Mode]:
    """The modes called `names`, in the table's order; none named: all that suit the device.

    Raises:
        ValueError: an unknown mode, or one that does not run on the device.
    """
    unknown = sorted(set(names) - set(MODES))
    if unknown:
        raise ValueError(f"unknown mode {', '.join(unknown)}; supported: {', '.join(MODES)}")
    for name in names:
        reason = why_not(MODES[name], device)
        if reason is not None:
            raise ValueError(f"mode {name} does not run on {device}: {reason}")
    if names:
        return {name: mode for name, mode in MODES.items() if name in names}
    left_out = skipped_modes(device)
    return {name: mode for name, mode in MODES.items() if name not in left_out}


def skipped_modes(device: torch.device) -> dict[str, str]:
    """Modes that are only measured on request or not at all, and why."""
    found = {name: why_not(mode, device) for name, mode in MODES.items()}
    if device.type == "cpu":
        emulated = "a CPU multiplies fp8 in float32"
        found |= {name: emulated for name, mode in MODES.items() if mode.linear == FP8}
    return {name: reason for name, reason in found.items() if reason is not None}


def why_not(mode: Mode, device: torch.device) -> str | None:
    """What keeps a mode from running on the device, or None."""
    if mode.sparse:
        runs, reason = available("sagesla", device)
        if not runs:
            return reason
    if mode.linear is not None:
        runs, reason = quantization.available(mode.linear, device)
        if not runs:
            return reason
    return None


def chosen_format(name: str | None, device: torch.device) -> str:
    """A format by its name (`quantization.linear_format`); None: the device's fastest.

    Raises:
        ValueError: an unknown format, or one that does not run on the device.
    """
    if name is None:
        runs = device.type == "cuda" and why_not(Mode("", linear=FP8), device) is None
        return FP8 if runs else "int8-channel"
    format = linear_format(name)
    reason = why_not(Mode("", linear=format), device)
    if reason is not None:
        raise ValueError(f"8-bit format {name} does not run on {device}: {reason}")
    return format


def build(mode: Mode, model: ModelConfig, device: torch.device) -> nn.Module:
    """`model`'s DiT as `mode` computes it, called as WanModel is. All modes: the same weights."""
    dtype = dtype_on(device)
    if mode.original:
        return Original(model.transformer, device, dtype)
    network = random_transformer(
        model.transformer,
        device=device,
        dtype=dtype,
        attention="sagesla" if mode.sparse else dense_attention(device),
        attention_settings=sparse_settings(model) if mode.sparse else None,
        linear=mode.linear,
        residual=mode.residual,
    )
    network.pack_projections()
    return network


def dense_attention(device: torch.device) -> str:
    """cuDNN's where it runs: the fastest dense attention that PyTorch brings."""
    return "sdpa-cudnn" if available("sdpa-cudnn", device)[0] else "sdpa"


def sparse_settings(model: ModelConfig, attention: str = "sagesla") -> dict[str, Any]:
    """RATIO, and the model's own block sizes where it has some."""
    settings = {"ratio": RATIO, **model.block_settings}
    return {key: value for key, value in settings.items() if key in BACKENDS[attention].settings}


class Original(nn.Module):
    """diffusers' WanTransformer3DModel, eager, with the weights of `random_transformer`.

    On a GPU its attention is cuDNN's, the fastest dense attention that PyTorch brings.
    """

    def __init__(
        self, config: TransformerConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> None:
        super().__init__()
        from diffusers import WanTransformer3DModel

        described = config_json(config, None)
        described.pop("text_len", None)  # ours
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(described)
        # Its tables are no parameters: they are computed when it is built.
        model.rope = type(model.rope)(
            config.head_dim, config.patch_size, described["rope_max_seq_len"]
        ).to(device)
        kept = model._keep_in_fp32_modules
        fill_random(
            model,
            "",
            device,
            dtype,
            seed=seed,
            keep_float32=lambda name: any(part in name.split(".") for part in kept),
            name_of=to_native,
        )
        self.model = model.eval()

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        image_context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As of WanModel; t (B,)."""
        dtype = self.model.patch_embedding.weight.dtype
        arguments = {
            "hidden_states": latents.to(dtype),
            "timestep": 1000 * t,
            "encoder_hidden_states": context.to(dtype),
            "encoder_hidden_states_image": image_context,
            "return_dict": False,
        }
        if latents.device.type != "cuda":
            return self.model(**arguments)[0]
        # Where cuDNN has no kernel, as for some lengths of image tokens, the other. Without
        # set_priority: PyTorch 2.11 does not put its order back, which slowed what came next.
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        with sdpa_kernel(backends):
            return self.model(**arguments)[0]
