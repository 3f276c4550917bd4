"""The autoencoder's training: same function as the library's, exact resume, loadable export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from turbodit.spritewan import train_vae
from turbodit.spritewan.rank import Rank
from turbodit.spritewan.train_vae import VAE_CONFIG, ClipAutoencoder, ClipPool, Options
from turbodit.spritewan.trainer import Metrics
from turbodit.spritewan.world import HELD_OUT

TINY = {**VAE_CONFIG, "base_dim": 4, "decoder_base_dim": 4}


@pytest.fixture
def tiny() -> ClipAutoencoder:
    torch.manual_seed(0)
    return ClipAutoencoder(AutoencoderKLWan(**TINY)).double()


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of 9 frames and 32x32 pixels, and steps that take a minute."""

    def clip(clip_id: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(clip_id)
        return torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8, generator=generator)

    def clips(ids: Iterable[int]) -> torch.Tensor:
        return torch.stack([clip(i) for i in ids])

    clocks: list[SimpleNamespace] = []
    make_repeatable = train_vae.repeatable

    def clock(minutes: float) -> SimpleNamespace:
        clocks.append(SimpleNamespace(seconds=0.0))
        return clocks[-1]

    def repeatable(
        work: Callable[[], Metrics], before: Callable[[], None], device: torch.device
    ) -> Callable[[], Metrics]:
        def timed_work() -> Metrics:
            clocks[-1].seconds += 60
            return work()

        return make_repeatable(timed_work, before, device)

    monkeypatch.setattr(train_vae, "FRAMES", 9)
    monkeypatch.setattr(train_vae, "SIZE", 32)
    monkeypatch.setattr(train_vae, "Clock", clock)
    monkeypatch.setattr(train_vae, "repeatable", repeatable)
    monkeypatch.setattr(train_vae, "training_clips", lambda ids, device: clips(ids))
    monkeypatch.setattr(train_vae, "render", lambda s, device: clips(x.clip_id for x in s))


def options(out: Path, steps: int) -> Options:
    """So many minutes in all that the seconds used do not move the learning rate."""
    return Options(
        out,
        minutes=steps,
        total_minutes=1e12,
        batch=2,
        frames=5,
        side=32,
        pool=4,
        evaluation_clips=2,
        log_steps=1,
        device="cpu",
    )


def test_whole_clips_equal_the_librarys_chunks(tiny: ClipAutoencoder) -> None:
    video = 2 * torch.rand(2, 3, 13, 32, 32, dtype=torch.float64) - 1
    with torch.no_grad():
        posterior = tiny.vae.encode(video).latent_dist
        mean, log_variance = tiny.encode(video)
        latents = posterior.mode()
        decoded = tiny.decode(latents)
        expected = tiny.vae.decode(latents).sample
    torch.testing.assert_close(mean, posterior.mean.float())
    torch.testing.assert_close(log_variance, posterior.logvar.float())
    torch.testing.assert_close(decoded.clamp(-1, 1), expected, rtol=1e-10, atol=1e-10)


def test_gradient_flows_through_handed_on_features(tiny: ClipAutoencoder) -> None:
    """The gradient to the first frame from the last chunk's pixels, by finite difference."""
    latents = torch.randn(1, 32, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    last_frames = tiny.decode(latents)[:, :, 5:]
    last_frames.square().sum().backward()
    assert latents.grad is not None
    direction = torch.zeros_like(latents)
    direction[:, :, 0] = torch.randn(1, 32, 2, 2, dtype=torch.float64)
    step = 1e-3  # the library upsamples in float32: a smaller one would measure its rounding
    with torch.no_grad():
        up, down = (
            tiny.decode(latents + sign * step * direction)[:, :, 5:].square().sum()
            for sign in (1, -1)
        )
    slope = (latents.grad * direction).sum()
    assert slope.abs() > 1e-6
    torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=1e-3, atol=0)


def test_loss_falls() -> None:
    torch.manual_seed(0)
    model = ClipAutoencoder(AutoencoderKLWan(**TINY))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    video = 2 * torch.rand(2, 3, 1, 1, 1).expand(2, 3, 5, 32, 32) - 1
    losses = []
    for _ in range(15):
        reconstruction, *moments = model(video, torch.zeros(2, 32, 2, 2, 2))
        loss = train_vae.autoencoder_loss(reconstruction, video, *moments)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.usefixtures("small_world")
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    train_vae.train(options(tmp_path / "whole", 4), TINY)
    for _ in range(2):
        train_vae.train(options(tmp_path / "halves", 2), TINY)
    whole, halves = (
        load_file(tmp_path / name / "state" / "state-000.safetensors")
        for name in ("whole", "halves")
    )
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert whole["step.vae.encoder.conv_in.weight"].item() == 4


@pytest.mark.usefixtures("small_world")
def test_export_loads_and_carries_the_latents_statistics(tmp_path: Path) -> None:
    train_vae.train(options(tmp_path, 1), TINY)
    vae = AutoencoderKLWan.from_pretrained(tmp_path / "vae", torch_dtype=torch.bfloat16)
    assert vae.config.z_dim == 32
    assert len(vae.config.latents_mean) == len(vae.config.latents_std) == 32
    assert min(vae.config.latents_std) > 0 and vae.config.latents_std != [1.0] * 32
    assert vae.decode(torch.zeros(1, 32, 2, 2, 2).bfloat16()).sample.shape == (1, 3, 5, 32, 32)
    assert not (tmp_path / "vae.partial").exists()
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    precisions = [e["dtype"] for e in events if e.get("event") == "evaluation"]
    assert precisions == ["torch.float32", "torch.bfloat16"]


@pytest.mark.usefixtures("small_world")
def test_a_pool_started_late_holds_the_same_clips() -> None:
    early, late = ClipPool(4, 0, torch.device("cpu")), ClipPool(4, 6, torch.device("cpu"))
    early.advance(10)
    late.advance(10)
    assert torch.equal(early.clips, late.clips)
    window = early.sample(3, 5, 32, torch.Generator().manual_seed(0))
    assert window.shape == (3, 3, 5, 32, 32)
    assert torch.equal(window, late.sample(3, 5, 32, torch.Generator().manual_seed(0)))


def test_processes_count_through_clips_of_their_own(tmp_path: Path) -> None:
    settings = options(tmp_path, 1)
    newest = [train_vae._clips_wanted(320, settings, Rank(index, 4)) for index in range(4)]
    assert newest[0] == 320 + settings.pool
    assert [n - newest[0] for n in newest] == [index * HELD_OUT // 4 for index in range(4)]
    assert newest[3] < HELD_OUT


def test_picture_clips_pan_and_depend_on_the_seed_alone() -> None:
    cpu = torch.device("cpu")
    clip = train_vae.picture_clip(19, cpu)
    assert clip.shape == (33, 3, 256, 256) and clip.dtype == torch.uint8
    assert torch.equal(clip, train_vae.picture_clip(19, cpu))
    assert not torch.equal(clip, train_vae.picture_clip(29, cpu))
    assert clip.float().std() > 10


def test_bytes_survive_the_way_to_floats_and_back() -> None:
    clips = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 16, 16).expand(1, 2, 3, 16, 16)
    assert torch.equal(train_vae.to_bytes(train_vae.to_signed(clips)), clips)


def test_decibels() -> None:
    assert train_vae.decibels(torch.tensor([255.0**2, 65.025])) == pytest.approx([0, 30])


@pytest.mark.parametrize("frames", [1, 6, 37])
def test_windows_must_fit_the_clip(tmp_path: Path, frames: int) -> None:
    with pytest.raises(ValueError, match=f"got {frames}"):
        train_vae.train(Options(tmp_path, frames=frames, device="cpu"))
