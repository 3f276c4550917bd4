from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from turbodit.config import PRESETS
from turbodit.random_models import random_pipeline


def thin(name):
    """The preset with a small DiT."""
    model = PRESETS[name]
    shape = replace(model.transformer, dim=64, ffn_dim=64, num_heads=2, num_layers=1)
    return replace(model, transformer=shape)


def test_makes_a_video_without_any_files():
    pipe = random_pipeline(thin("Wan2.1-T2V-1.3B"), device="cpu", dtype=torch.bfloat16)
    dit = pipe.transformers["transformer"]
    assert dit.patch_embedding.weight.dtype == torch.bfloat16
    assert dit.head.modulation.dtype == torch.float32
    assert pipe.vae.dtype == torch.bfloat16
    video = pipe("anything", width=16, height=16, frames=1, steps=1)
    assert video.frames.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("name", ["Wan2.1-I2V-14B-480P", "Wan2.2-TI2V-5B"])
def test_other_models_are_refused(name):
    with pytest.raises(ValueError, match="CLIP or another VAE"):
        random_pipeline(PRESETS[name], device="cpu")
