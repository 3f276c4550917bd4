"""The teacher's training: its loss by hand, its data, exact resume, several processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tests.spritewan import two_processes
from torch import nn

from turbodit.checkpoints import load_transformer
from turbodit.config import PRESETS, TransformerConfig, VAEConfig
from turbodit.spritewan import train_teacher
from turbodit.spritewan.rank import Rank
from turbodit.spritewan.train_teacher import LatentBuffer, Options, add_noise, flow_matching_loss
from turbodit.spritewan.world import HELD_OUT

CPU = torch.device("cpu")
TINY = replace(
    PRESETS["spritewan"],
    transformer=TransformerConfig(
        dim=16, ffn_dim=16, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=6, text_len=3
    ),
    vae=VAEConfig(latent_channels=4, temporal_stride=4, spatial_stride=16),
)
SHIFT = 3.0
Clips = tuple[torch.Tensor, torch.Tensor]  # latents (B,C,T,h,w), context (B,Lt,D)


def options(out: Path = Path("unused"), **changes: object) -> Options:
    """A small run on the CPU; encoders are fakes, so their paths do not matter."""
    settings = {
        "batch": 4,
        "short_batch": 4,
        "first_clips": 8,
        "max_clips": 8,
        "clips_per_step": 4,
        "log_steps": 1,
        "workers": 0,
        "device": "cpu",
        "compile": False,
    }
    return Options(out, Path("vae"), Path("text"), Path("words"), **settings | changes)


# The loss.


class Exact(nn.Module):
    """Says the velocity of frames with noise without error, and nonsense of clean frames.

    x_t = x0 + t (noise - x0), so that noise - x0 = (x_t - x0) / t.
    """

    def __init__(self, latents: torch.Tensor, error: float = 0.0) -> None:
        super().__init__()
        self.latents, self.error = latents, error

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.noisy, self.t, self.context = noisy, t, context
        velocity = (noisy - self.latents) / t[:, None, :, None, None]
        return velocity.nan_to_num(nan=1e3) + self.error


@pytest.fixture
def clips() -> Clips:
    """In float64, for exact velocities."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(64, 2, 3, 2, 2, generator=generator, dtype=torch.float64)
    return latents, torch.randn(64, 3, 6, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, clips: Clips, image_share: float) -> float:
    settings = options(image_share=image_share, time_shift=SHIFT)
    generator = torch.Generator().manual_seed(0)
    latents, context = clips
    noisy, t, velocity = add_noise(latents, settings, generator)
    return flow_matching_loss(model, noisy, t, velocity, context).item()


@pytest.mark.parametrize("image_share", [0.0, 0.3, 1.0])
def test_the_exact_velocity_has_no_loss_and_an_error_its_square(
    clips: Clips, image_share: float
) -> None:
    assert loss_of(Exact(clips[0]), clips, image_share) < 1e-9
    assert loss_of(Exact(clips[0], error=1.5), clips, image_share) == pytest.approx(1.5**2)


def test_the_mean_is_over_noisy_frames(clips: Clips) -> None:
    """A model that says zero leaves (noise - x0)^2 = ((x_t - x0) / t)^2 in every noisy frame."""

    class Zero(Exact):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return 0 * super().forward(*inputs)

    model = Zero(clips[0])
    loss = loss_of(model, clips, image_share=0.5)
    total = count = 0
    for noisy, times, latents in zip(model.noisy, model.t, clips[0], strict=True):
        for frame, t in enumerate(times):
            if t > 0:
                velocity = (noisy[:, frame] - latents[:, frame]) / t
                total += velocity.square().sum().item()
                count += velocity.numel()
    assert 0 < count < clips[0].numel()
    assert loss == pytest.approx(total / count, rel=1e-6)


def test_kept_first_frames_are_clean_and_at_time_zero(clips: Clips) -> None:
    latents, context = clips
    model = Exact(latents)
    loss_of(model, clips, image_share=0.5)
    kept = model.t[:, 0] == 0
    assert 16 < kept.sum() < 48  # four standard deviations around 32
    assert torch.equal(model.noisy[kept, :, 0], latents[kept, :, 0])
    assert (model.t[:, 1:] > 0).all(), "only first frames are kept"
    assert torch.equal(model.t[:, 1], model.t[:, 2])
    assert torch.equal(model.t[~kept, 0], model.t[~kept, 1])
    assert (model.noisy != latents).flatten(3).any(-1)[:, :, 1:].all()
    assert torch.equal(model.context, context)
    for share, everyone in ((0.0, False), (1.0, True)):
        loss_of(model, clips, share)
        assert ((model.t[:, 0] == 0) == everyone).all()


def test_times_are_stratified_and_shifted(clips: Clips) -> None:
    model = Exact(clips[0])
    loss_of(model, clips, image_share=0.3)
    shifted = model.t[:, 1]
    uniform = shifted / (SHIFT - (SHIFT - 1) * shifted)  # the shift's inverse
    stratum = torch.arange(64) / 64
    assert ((uniform >= stratum - 1e-6) & (uniform <= stratum + 1 / 64 + 1e-6)).all()
    assert shifted.median() == pytest.approx(SHIFT * 0.5 / (1 + (SHIFT - 1) * 0.5), abs=0.02)


# The data. Pixels, latents and embeddings of a clip are all its number.


class NumberVAE:
    clips = 0

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        self.clips += len(video)
        number = ((video[:, :1, :1, :1, :1] + 1) * 127.5).round()
        return number.expand(-1, *TINY.latent_shape(5, 32, 32))


class NumberText:
    def encode(self, prompts: list[str]) -> torch.Tensor:
        """The empty prompt, of dropped captions, is -1."""
        numbers = torch.tensor([float(prompt or -1) for prompt in prompts])
        shape = TINY.transformer
        return numbers[:, None, None].expand(-1, shape.text_len, shape.text_dim).bfloat16()


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of 5 frames and 32x32 pixels, encoded four at a time, for a tiny model."""

    def number_scene(clip_id: int) -> SimpleNamespace:
        return SimpleNamespace(clip_id=clip_id % 251, caption=str(clip_id % 251))

    def render(scenes: list[SimpleNamespace], device: torch.device) -> torch.Tensor:
        numbers = torch.tensor([s.clip_id for s in scenes], dtype=torch.uint8)
        return numbers[:, None, None, None, None].expand(-1, 5, 3, 32, 32)

    for name, value in {
        "CONFIG": TINY,
        "FRAMES": 5,
        "SIZE": 32,
        "ENCODE_BATCH": 4,
        "WARMUP_STEPS": 2,
        "scene": number_scene,
        "render": render,
        "_encoders": lambda options, device: (NumberVAE(), NumberText()),
    }.items():
        monkeypatch.setattr(train_teacher, name, value)


def buffer(index: int = 0, count: int = 1) -> LatentBuffer:
    return LatentBuffer(options(), Rank(index, count), CPU, NumberVAE(), NumberText())


def numbers_in(ring: LatentBuffer) -> list[int]:
    return sorted(int(n) for n in ring.latents[: ring.size, 0, 0, 0, 0])


def test_the_buffer_keeps_the_newest_clips() -> None:
    ring = buffer()
    ring.fill(until=4)
    assert numbers_in(ring) == [0, 1, 2, 3]
    ring.grow(until=12)
    assert numbers_in(ring) == list(range(4, 12))
    ring.grow(until=12)
    assert ring.next_clip == 12


def test_a_buffer_started_late_holds_and_draws_the_same_clips() -> None:
    early, late = buffer(), buffer()
    early.fill(until=8)
    early.grow(until=20)
    late.fill(until=16)
    late.grow(until=20)
    assert numbers_in(early) == list(range(12, 20))
    assert (early.vae.clips, late.vae.clips) == (20, 12), "clips that nobody sees were encoded"
    drawn = [ring.sample(50, torch.Generator().manual_seed(0)) for ring in (early, late)]
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one, other)
    latents, context = drawn[0]
    assert latents.dtype == context.dtype == torch.float32
    assert latents.shape[1:] == early.latents.shape[1:]
    assert set(latents[:, 0, 0, 0, 0].tolist()) == set(map(float, range(12, 20)))
    assert torch.equal(latents[:, 0, 0, 0, 0], context[:, 0, 0]), "a caption of another clip"


def test_a_buffer_that_is_not_full_draws_only_what_it_has() -> None:
    ring = buffer()
    ring.latents.fill_(torch.nan)
    ring.fill(until=4)
    latents, _ = ring.sample(50, torch.Generator().manual_seed(0))
    assert set(latents[:, 0, 0, 0, 0].tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_processes_see_clips_of_their_own() -> None:
    rings = [buffer(index, 3) for index in range(3)]
    for ring in rings:
        ring.fill(until=8)
    assert sorted(n for ring in rings for n in numbers_in(ring)) == list(range(24))


@pytest.mark.parametrize("count", [1, 3])
def test_training_never_sees_held_out_clips(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_teacher, "scene", lambda clip_id: clip_id)
    for index in range(count):
        data = train_teacher._Scenes(5, Rank(index, count))
        assert data[0] == 5 * count + index
        last = data[len(data) - 1]
        assert last < HELD_OUT <= last + 2 * count


# The run.


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every step takes a minute, and its context is kept here."""
    seen: list[torch.Tensor] = []
    clocks: list[SimpleNamespace] = []

    def clock(minutes: float) -> SimpleNamespace:
        clocks.append(SimpleNamespace(seconds=0.0))
        return clocks[-1]

    def loss(model: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
        clocks[-1].seconds += 60
        seen.append(batch[-1].clone())
        return flow_matching_loss(model, *batch)

    monkeypatch.setattr(train_teacher, "Clock", clock)
    monkeypatch.setattr(train_teacher, "flow_matching_loss", loss)
    return seen


def log_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("contexts")
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The learning rate's way down too, which counts the time over all runs."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_teacher.train(options(whole, minutes=4, total_minutes=4))
    for minutes in (1, 3):
        train_teacher.train(options(parts, minutes=minutes, total_minutes=4))
    states = [load_file(out / "state" / "state-000.safetensors") for out in (whole, parts)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    info = json.loads((parts / "state" / "info.json").read_text())
    assert (info["trainer_step"], info["seconds"]) == (4, 240)
    steps = [[line for line in log_of(out) if "loss" in line] for out in (whole, parts)]
    for one, other in zip(*steps, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    rates = [line["lr"] for line in steps[0]]
    assert rates[1] > rates[2] > rates[3] and [line["clips"] for line in steps[0]] == [
        8,
        12,
        16,
        20,
    ]


@pytest.mark.usefixtures("contexts")
def test_export_is_the_average_and_loads(tmp_path: Path) -> None:
    train_teacher.train(options(tmp_path, minutes=2))
    teacher = load_transformer(tmp_path / "transformer", dtype=torch.float32)
    assert teacher.config == TINY.transformer
    state = load_file(tmp_path / "state" / "state-000.safetensors")
    for name, parameter in teacher.named_parameters():
        average = state[f"average.{name}"]
        kept = average if teacher.keep_float32(name) else average.bfloat16().float()
        assert torch.equal(parameter, kept), name
    assert log_of(tmp_path)[-1]["event"] == "stop"


def test_captions_are_dropped_in_their_share(tmp_path: Path, contexts: list[torch.Tensor]) -> None:
    train_teacher.train(
        options(tmp_path, minutes=2, batch=1_000, short_share=0, caption_dropout=0.25)
    )
    masks = [(context == -1).flatten(1).all(dim=1) for context in contexts]
    for context, dropped in zip(contexts, masks, strict=True):
        assert (context[~dropped] >= 0).all()
        assert 195 < dropped.sum() < 305  # four standard deviations around 250
    assert not torch.equal(*masks), "every step has its own draws"


def test_training_begins_with_short_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contexts: list[torch.Tensor]
) -> None:
    shapes = []
    timed_loss = train_teacher.flow_matching_loss

    def loss(model: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(batch[0].shape[:3]))
        return timed_loss(model, *batch)

    monkeypatch.setattr(train_teacher, "flow_matching_loss", loss)
    settings = {"short_share": 0.5, "short_frames": 1, "short_batch": 6}
    train_teacher.train(options(tmp_path, minutes=4, total_minutes=4, **settings))
    assert shapes == [(6, 4, 1)] * 2 + [(4, 4, 2)] * 2
    assert [len(context) for context in contexts] == [6, 6, 4, 4]


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, contexts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: nn.Module, *_: object) -> torch.Tensor:
        return model.head.head.weight.sum() * torch.nan

    monkeypatch.setattr(train_teacher, "flow_matching_loss", broken)
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        train_teacher.train(options(tmp_path, minutes=2))
    assert not (tmp_path / "state").exists() and not (tmp_path / "transformer").exists()


# Several processes.


def test_two_processes_with_half_a_batch_each_equal_one_with_all(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (8, two_processes.WIDTH)
    batches = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    two_processes.train_alone(tmp_path / "one", batches)
    two_processes.train_together(tmp_path, batches)
    one, first, second = (
        load_file(tmp_path / name / "state-000.safetensors") for name in ("one", "0", "1")
    )
    for name in one:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], one[name], rtol=1e-7, atol=1e-9)
