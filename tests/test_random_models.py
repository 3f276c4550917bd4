from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from turbodit import random_models
from turbodit.config import PRESETS, VAEConfig
from turbodit.model.wan import WanModel
from turbodit.quantization import QuantizedLinear
from turbodit.random_models import random_pipeline, random_transformer, random_vae

SHAPE = replace(PRESETS["spritewan"].transformer, dim=64, ffn_dim=128, num_heads=2, num_layers=2)


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


def test_image_to_video_has_features_of_the_image():
    model = thin("Wan2.1-I2V-14B-480P")
    pipe = random_pipeline(model, device="cpu", dtype=torch.float32)
    features = pipe.image_encoder.encode([Image.new("RGB", (16, 16))])
    assert features.shape == (1, 257, 1280)
    video = pipe(
        "anything", image=Image.new("RGB", (16, 16)), width=16, height=16, frames=1, steps=1
    )
    assert video.frames.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("name", ["Wan2.2-TI2V-5B", "spritewan"])
def test_vae_is_of_the_models_geometry(monkeypatch, name):
    monkeypatch.setattr(random_models, "fill_random", lambda *arguments: None)  # too large
    model = PRESETS[name]
    vae = random_vae(model, device="cpu")
    assert vae.latent_channels == model.vae.latent_channels
    assert vae.spatial_stride == model.vae.spatial_stride
    assert vae.temporal_stride == model.vae.temporal_stride


def test_unknown_vae_is_refused():
    model = replace(PRESETS["spritewan"], vae=VAEConfig(8, 4, 8))
    with pytest.raises(ValueError, match=r"VAEs of Wan 2\.1, Wan 2\.2 and SpriteWan"):
        random_vae(model, device="cpu")


def test_weights_depend_on_seed_and_name_alone():
    dense, sparse, other = (
        random_transformer(SHAPE, device="cpu", dtype=torch.float32, attention=name, seed=seed)
        for name, seed in (("sdpa", 0), ("sla", 0), ("sdpa", 1))
    )
    weights = dense.state_dict()
    for name, weight in sparse.state_dict().items():
        if "proj_l" in name:
            assert weight.std() > 0
        else:
            assert torch.equal(weight, weights[name]), name
    changed = other.state_dict()
    assert not any(torch.equal(weight, changed[name]) for name, weight in weights.items())
    same_shape = [f"blocks.{i}.self_attn.q.weight" for i in range(2)]
    assert not torch.equal(*(weights[name] for name in same_shape))


@pytest.mark.parametrize("format", ["int8-channel", "int8-block", "fp8-channel"])
def test_quantised_block_by_block(format):
    model = random_transformer(SHAPE, device="cpu", dtype=torch.float32, linear=format)
    linears = [m for m in model.blocks.modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) == 2 * 10
    assert all(linear.format == format for linear in linears)
    assert not any(isinstance(m, torch.nn.Linear) for m in model.blocks.modules())
    assert isinstance(model.head.head, torch.nn.Linear)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_what_stays_float32_does():
    model = random_transformer(SHAPE, device="cpu", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        expected = torch.float32 if WanModel.keep_float32(name) else torch.bfloat16
        assert parameter.dtype == expected, name


@torch.no_grad()
def test_activations_stay_finite_and_the_output_has_a_size():
    model = random_transformer(SHAPE, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, SHAPE.in_dim, 2, 8, 8, generator=generator)
    context = torch.randn(1, SHAPE.text_len, SHAPE.text_dim, generator=generator)
    velocity = model(latents, torch.tensor([0.7]), context)
    assert 0.2 < velocity.std() < 5
