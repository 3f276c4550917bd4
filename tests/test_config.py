from dataclasses import replace

import pytest

from turbodit.config import PRESETS, TransformerConfig, preset

# Tokens of the default clips, from the papers' own tables.
TOKENS = {
    ("Wan2.1-T2V-1.3B", 81, 480, 832): 32_760,
    ("Wan2.1-T2V-14B", 81, 720, 1280): 75_600,
    ("Wan2.2-TI2V-5B", 121, 704, 1280): 27_280,
    ("spritewan", 33, 256, 256): 576,
}
# Parameters in billions that the models are named after.
BILLIONS = {"1.3B": 1.42, "14B": 14.3, "A14B": 14.3, "5B": 5.0}


@pytest.mark.parametrize(("name", "frames", "height", "width"), TOKENS)
def test_token_counts(name: str, frames: int, height: int, width: int) -> None:
    assert PRESETS[name].token_count(frames, height, width) == TOKENS[name, frames, height, width]


@pytest.mark.parametrize("model", PRESETS.values(), ids=PRESETS)
def test_presets_are_consistent(model) -> None:
    row, column = model.size_multiple
    assert (model.frames - 1) % model.vae.temporal_stride == 0
    for sizes in model.sizes.values():
        for width, height in sizes.values():
            assert width % column == 0 and height % row == 0
    condition = 4 + model.vae.latent_channels if model.task in ("i2v", "flf2v") else 0
    assert model.transformer.in_dim == model.vae.latent_channels + condition
    assert model.transformer.out_dim == model.vae.latent_channels
    assert model.experts == (2 if "A14B" in model.name else 1)
    assert (model.transformer.image_dim is not None) == (
        "2V-14B" in model.name and model.task != "t2v"
    )


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "spritewan"])
def test_parameter_counts(name: str) -> None:
    import torch

    from turbodit.model.wan import WanModel

    with torch.device("meta"):
        count = sum(p.numel() for p in WanModel(PRESETS[name].transformer).parameters())
    expected = next(v for k, v in BILLIONS.items() if k in name)
    # CLIP layers make the image-to-video models of 2.1 about two billion larger.
    extra = 2.1 if PRESETS[name].transformer.image_dim else 0.0
    assert count / 1e9 == pytest.approx(expected + extra, rel=0.02)


@pytest.mark.parametrize(
    "name", ["Wan2.1-T2V-1.3B", "wan2.1-t2v-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
)
def test_preset_names_are_forgiving(name: str) -> None:
    assert preset(name).name == "Wan2.1-T2V-1.3B"


def test_the_embedded_teacher_is_spritewan_by_another_name() -> None:
    teacher = preset("SpriteWan-Teacher")
    assert teacher.name == "spritewan-teacher"
    assert replace(teacher, name="spritewan") == preset("spritewan")


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'wan3'.*Wan2\.2-TI2V-5B.*-teacher"):
        preset("wan3")


def test_impossible_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        TransformerConfig(dim=100, ffn_dim=4, num_heads=3, num_layers=1)
