"""Layers that are not linear ones alone are neither quantised nor packed."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import TEXT_DIM
from torch import nn

from turbodit.config import TransformerConfig
from turbodit.model.wan import WanModel
from turbodit.quantization import can_concatenate, concatenate, quantize_linears
from turbodit.training.parameters import LoRA, LoRALinear, select_trainable

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=1, text_dim=TEXT_DIM, freq_dim=32
)


@pytest.fixture
def model() -> WanModel:
    torch.manual_seed(0)
    model = WanModel(CONFIG)
    select_trainable(model, LoRA(rank=2, targets=("q", "v")))
    return model


def test_a_lora_is_not_quantised(model: WanModel) -> None:
    with pytest.raises(ValueError, match=r"\(4 layers, such as blocks\.0\.self_attn\.q\); merge"):
        quantize_linears(model, "int8-channel")
    assert isinstance(model.blocks[0].self_attn.k, nn.Linear)  # nor are the others, half-way


def test_a_lora_is_not_packed(model: WanModel) -> None:
    attention = model.blocks[0].self_attn
    layers = [attention.q, attention.k, attention.v]
    assert not can_concatenate(layers) and not can_concatenate([layers[0], layers[2]])
    with pytest.raises(ValueError, match="do not go together"):
        concatenate(layers)
    model.pack_projections()
    assert isinstance(attention.q, LoRALinear)
