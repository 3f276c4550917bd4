"""What is put by hand into the DiT's input; parity with diffusers is in test_pipeline_parity."""

from __future__ import annotations

import torch

from turbodit.conditioning import ImageCondition, _known_mask


def test_nothing_is_added_for_text_alone():
    latents = torch.randn(2, 3, 4, 5, 6)
    model_input, times = ImageCondition().model_input(latents, 0.25)
    torch.testing.assert_close(model_input, latents, rtol=0, atol=0)
    assert times.tolist() == [0.25, 0.25]


def test_a_first_latent_stays_clean_at_time_zero():
    latents, first = torch.randn(2, 3, 4, 5, 6), torch.randn(1, 3, 1, 5, 6)
    condition = ImageCondition(first_latent=first)
    model_input, times = condition.model_input(latents, 0.25)
    assert times.tolist() == [[0, 0.25, 0.25, 0.25]] * 2
    for kept in (model_input, condition.keep_first(latents)):
        torch.testing.assert_close(kept[:, :, :1], first.expand(2, -1, -1, -1, -1))
        torch.testing.assert_close(kept[:, :, 1:], latents[:, :, 1:])


def test_channels_follow_the_latents_in_every_sample():
    latents, channels = torch.randn(2, 3, 4, 5, 6), torch.randn(1, 7, 4, 5, 6)
    condition = ImageCondition(channels=channels, features=torch.randn(1, 5, 8))
    model_input, times = condition.model_input(latents, 0.25)
    assert times.shape == (2,)
    torch.testing.assert_close(model_input[:, :3], latents)
    torch.testing.assert_close(model_input[:, 3:], channels.expand(2, -1, -1, -1, -1))
    assert condition.model_features(2).shape == (2, 5, 8)


def test_mask_marks_the_frames_that_are_known():
    latents = torch.randn(1, 16, 3, 2, 2)
    first = [[1, 0, 0]] * 4  # a row for each of the four frames in a latent frame
    assert _known_mask(latents, 4, last=False)[0, :, :, 0, 0].tolist() == first
    both = [*first[:3], [1, 0, 1]]
    assert _known_mask(latents, 4, last=True)[0, :, :, 1, 1].tolist() == both
