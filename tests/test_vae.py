from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from tests.native_models import native_kind_vae, native_vae
from tests.tiny_models import tiny_vae
from torch.profiler import ProfilerActivity, profile

from turbodit.vae import VideoVAE

Kind = Literal["2.1", "2.2"]
KINDS = pytest.mark.parametrize("kind", ["2.1", "2.2"])


def random_video(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def random_latents(vae: VideoVAE, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape[0], vae.latent_channels, *shape[1:], generator=generator)


@KINDS
def test_encode_and_decode_match_diffusers(kind: Kind, tmp_path: Path) -> None:
    reference = tiny_vae(kind)
    reference.save_pretrained(tmp_path)
    vae = VideoVAE.from_pretrained(tmp_path)
    mean = torch.tensor(reference.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(reference.config.latents_std).view(1, -1, 1, 1, 1)
    video = random_video(2, 3, 9, 32, 64)

    latents = vae.encode(video)

    stride = vae.spatial_stride
    assert latents.shape == (2, vae.latent_channels, 3, 32 // stride, 64 // stride)
    with torch.no_grad():
        expected = (reference.encode(video).latent_dist.mode() - mean) / std
        torch.testing.assert_close(latents, expected)
        decoded = reference.decode(latents * std + mean).sample
    torch.testing.assert_close(vae.decode(latents), decoded)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@KINDS
def test_convolutions_of_one_small_sample_are_onednns(kind: Kind) -> None:
    reference = tiny_vae(kind)
    latents = torch.randn(1, reference.config.z_dim, 2, 2, 3)
    with torch.no_grad():
        expected = reference.decode(latents).sample
    vae = VideoVAE(reference)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found, torch.no_grad():
        decoded = vae.model.decode(latents).sample
    torch.testing.assert_close(decoded, expected)
    events = found.key_averages(group_by_input_shape=True)
    assert any(event.key == "aten::mkldnn_convolution" for event in events)
    slow = [event.input_shapes[1] for event in events if event.key == "aten::slow_conv3d_forward"]
    assert all(kernel == [1, 1, 1] for _, _, *kernel in slow)


@KINDS
@pytest.mark.parametrize("slicing", [False, True])
def test_chunks_are_the_decoded_video(kind: Kind, slicing: bool) -> None:
    vae = VideoVAE(tiny_vae(kind), slicing=slicing)
    latents = random_latents(vae, 2, 3, 2, 3)

    chunks = list(vae.decode_chunks(latents))

    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4]
    if slicing:  # one sample at a time: another order of summation
        torch.testing.assert_close(torch.cat(chunks, 2), vae.decode(latents))
    else:
        torch.testing.assert_close(torch.cat(chunks, 2), vae.decode(latents), rtol=0, atol=0)


def test_chunks_of_two_videos_can_be_taken_in_turn() -> None:
    vae = VideoVAE(tiny_vae())
    first, second = random_latents(vae, 1, 2, 2, 2), -random_latents(vae, 1, 2, 2, 2)

    in_turn = list(zip(vae.decode_chunks(first), vae.decode_chunks(second), strict=True))

    for latents, chunks in zip((first, second), zip(*in_turn, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(chunks, 2), vae.decode(latents), rtol=0, atol=0)


@KINDS
def test_tiles_are_those_of_the_image_where_they_do_not_overlap(kind: Kind) -> None:
    vae = VideoVAE(tiny_vae(kind), tiling=True)
    whole = VideoVAE(tiny_vae(kind))
    stride = vae.spatial_stride
    latents = random_latents(vae, 1, 2, 16 // stride * 2, 320 // stride)

    video = vae.decode(latents)

    # Tiles of 256 pixels start every 192 and are blended over the 64 pixels they share.
    left = whole.decode(latents[..., : 256 // stride])
    right = whole.decode(latents[..., 192 // stride :])
    assert video.shape == (1, 3, 5, latents.shape[3] * stride, 320)
    torch.testing.assert_close(video[..., :192], left[..., :192])
    torch.testing.assert_close(video[..., 256:], right[..., 64:])
    torch.testing.assert_close(torch.cat(list(vae.decode_chunks(latents)), 2), video)


@pytest.mark.parametrize(("kind", "tile"), [("2.1", 256), ("2.2", 512)])
def test_tiles_of_the_encoder(kind: Kind, tile: int) -> None:
    vae = VideoVAE(tiny_vae(kind), tiling=True)
    whole = VideoVAE(tiny_vae(kind))
    stride = vae.spatial_stride
    step = tile * 3 // 4
    video = random_video(1, 3, 1, 32, tile * 5 // 4)

    latents = vae.encode(video)

    left, right = whole.encode(video[..., :tile]), whole.encode(video[..., step:])
    assert latents.shape[3:] == (32 // stride, video.shape[4] // stride)
    cut, overlap = step // stride, (tile - step) // stride
    torch.testing.assert_close(latents[..., :cut], left[..., :cut])
    torch.testing.assert_close(latents[..., cut + overlap :], right[..., overlap:])


@KINDS
def test_original_file(kind: Kind, tmp_path: Path) -> None:
    reference = VideoVAE(native_kind_vae(kind))
    path = tmp_path / f"Wan{kind}_VAE.pth"
    torch.save(native_vae(reference.model), path)

    vae = VideoVAE.from_pretrained(path)

    video = random_video(1, 3, 5, 32, 32)
    latents = reference.encode(video)
    torch.testing.assert_close(vae.encode(video), latents)
    torch.testing.assert_close(vae.decode(latents), reference.decode(latents))


def test_half_precision_returns_float32(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path)
    vae = VideoVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    latents = vae.encode(random_video(1, 3, 1, 16, 16))
    assert latents.dtype == vae.decode(latents).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 10, 32, 32), r"10 frames, expected 4k\+1"),
        ((1, 3, 0, 32, 32), r"0 frames, expected 4k\+1"),
        ((1, 3, 5, 32, 36), "36x32 pixels, expected multiples of 8"),
        ((1, 4, 5, 32, 32), r"expected \(B, 3, T, H, W\)"),
        ((3, 5, 32, 32), r"expected \(B, 3, T, H, W\)"),
    ],
)
def test_videos_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoVAE(tiny_vae()).encode(torch.zeros(shape))


def test_latents_that_do_not_fit() -> None:
    vae = VideoVAE(tiny_vae())
    with pytest.raises(ValueError, match=r"expected \(B, 16, t, h, w\)"):
        vae.decode(torch.zeros(1, 48, 1, 2, 2))
    with pytest.raises(ValueError, match=r"expected \(B, 16, t, h, w\)"):
        next(vae.decode_chunks(torch.zeros(1, 48, 1, 2, 2)))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at"):
        VideoVAE.from_pretrained(tmp_path / "Wan2.1_VAE.pth")
    state = native_vae(native_kind_vae("2.2"))
    del state["decoder.head.2.weight"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"1 missing: decoder\.conv_out\.weight"):
        VideoVAE.from_pretrained(tmp_path / "short.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected an original Wan VAE file"):
        VideoVAE.from_pretrained(tmp_path / "other.pth")
