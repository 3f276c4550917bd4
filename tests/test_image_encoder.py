from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image
from tests.native_models import native_image_encoder, tiny_head_80_clip
from tests.tiny_models import (
    IMAGE_DIM,
    IMAGE_TOKENS,
    tiny_image_encoder,
    tiny_image_processor,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
)

from turbodit.image_encoder import ImageEncoder


@pytest.fixture
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(40, 60), (90, 30)]
    return [Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]


def test_matches_diffusers(tmp_path: Path, images: list[Image.Image]) -> None:
    model, processor = tiny_image_encoder(), tiny_image_processor()
    model.save_pretrained(tmp_path / "image_encoder")
    processor.save_pretrained(tmp_path / "image_processor")
    pipeline = WanImageToVideoPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(),
        scheduler=UniPCMultistepScheduler(),
        image_encoder=model,
        image_processor=processor,
    )
    with torch.no_grad():
        expected = pipeline.encode_image(images)

    encoder = ImageEncoder.from_pretrained(tmp_path / "image_encoder", tmp_path / "image_processor")

    features = encoder.encode(images)
    assert features.shape == (2, IMAGE_TOKENS, IMAGE_DIM)
    torch.testing.assert_close(features, expected)


def test_original_file(tmp_path: Path, images: list[Image.Image]) -> None:
    reference = tiny_head_80_clip()
    torch.save(native_image_encoder(reference.state_dict()), tmp_path / "clip.pth")

    encoder = ImageEncoder.from_pretrained(tmp_path / "clip.pth")

    pixels = encoder.processor(images=images, return_tensors="pt").pixel_values
    assert pixels.shape == (2, 3, 28, 28)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(encoder.encode(images), expected)


def test_original_preprocessing_squeezes_the_whole_image(tmp_path: Path) -> None:
    torch.save(native_image_encoder(tiny_head_80_clip().state_dict()), tmp_path / "clip.pth")
    encoder = ImageEncoder.from_pretrained(tmp_path / "clip.pth")
    wide = Image.new("RGB", (280, 28), "black")
    wide.paste("white", (0, 0, 28, 28))  # a tenth, at the border that a central crop would lose
    pixels = encoder.processor(images=[wide], return_tensors="pt").pixel_values[0]
    assert pixels[:, :, 0].min() > pixels[:, :, -1].max() + 1


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at"):
        ImageEncoder.from_pretrained(tmp_path / "none.pth")
    state = native_image_encoder(tiny_head_80_clip().state_dict())
    torch.save(state, tmp_path / "clip.pth")
    with pytest.raises(FileNotFoundError, match="no image processor folder"):
        ImageEncoder.from_pretrained(tmp_path / "clip.pth", tmp_path / "none")
    del state["visual.transformer.1.norm2.bias"]
    torch.save(state, tmp_path / "clip.pth")
    with pytest.raises(ValueError, match=r"1 missing.*layers\.1\.layer_norm2\.bias"):
        ImageEncoder.from_pretrained(tmp_path / "clip.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected Wan's CLIP file"):
        ImageEncoder.from_pretrained(tmp_path / "other.pth")


def test_folder_without_a_config(tmp_path: Path) -> None:
    tiny_image_encoder().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        ImageEncoder.from_pretrained(tmp_path)
