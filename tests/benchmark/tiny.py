"""A model of which one forward pass takes milliseconds, with SpriteWan's VAE."""

from __future__ import annotations

import torch

from turbodit.benchmark.workload import Workload
from turbodit.config import VAE_SPRITE, ModelConfig, SamplingConfig, TransformerConfig

CPU = torch.device("cpu")
TINY = ModelConfig(
    name="tiny",
    task="ti2v",
    transformer=TransformerConfig(
        dim=64,
        ffn_dim=128,
        num_heads=2,
        num_layers=2,
        in_dim=32,
        out_dim=32,
        text_dim=16,
        text_len=8,
        freq_dim=32,
    ),
    vae=VAE_SPRITE,
    sampling=SamplingConfig(steps=10, shift=3.0, guidance=3.0),
    frames=5,
    fps=8,
    sizes={"small": {"1:1": (128, 128)}},
    attention_blocks=(16, 16),
)
WORKLOAD = Workload(TINY, 128, 128, 5)  # 2 x 4 x 4 tokens


def silent(text: str) -> None:
    pass
