"""Validation samples of tiny random models."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tests.training.tiny_training import (
    log_of,
    only_logs,
    rcm_config,
    sla_config,
    spy,
    tiny_teacher,
    train,
)

from turbodit.checkpoints import find_model
from turbodit.distributed import join, leave
from turbodit.model.wan import WanModel
from turbodit.noise_schedule import few_step_times
from turbodit.sampling import few_step
from turbodit.training.checkpoint import TrainState
from turbodit.training.config import TrainConfig
from turbodit.training.ema import PowerEMA
from turbodit.training.networks import Experts
from turbodit.training.preview import Preview, few_step_sampler
from turbodit.training.setup import Run

PROMPTS = ("a red fox", "the car moves left", "snow")
SHAPE = (16, 2, 4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def teacher(folder):
    return tiny_teacher(folder)


@pytest.fixture(scope="module")
def image_teacher(folder):
    return tiny_teacher(folder, "i2v")


@pytest.fixture
def run_of():
    """A function from a configuration to its run, in this process."""

    def open_run(config: TrainConfig) -> Run:
        folder = find_model(config.model)
        source = folder.transformers[0]
        return Run(config, join("cpu"), folder, folder.config(), torch.float32, source, (0.0, 1.0))

    yield open_run
    leave()


class Log:
    """In place of a TrainLog."""

    def __init__(self) -> None:
        self.shown: dict[str, np.ndarray] = {}

    def videos(self, step, name, frames, fps) -> None:
        assert (step, fps) == (7, 16)
        self.shown[name] = frames


def few_steps(conditional, unconditional, noise, generators):
    return few_step(conditional, noise, few_step_times(2, 80.0), generators=generators)


def shown(run: Run, seed: int = 0) -> dict[str, np.ndarray]:
    """What a student that `seed` decides and its average make of the prompts."""
    student = run.trained(run.source)
    average = PowerEMA(student, 0.1)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    preview, log = Preview.of(run, few_steps, SHAPE), Log()
    preview(log, TrainState({"student": student}, {}, {"0.1": average}, step=7))
    return log.shown


def test_student_and_average_on_the_same_noise_each_time(run_of, teacher, tmp_path):
    run = run_of(rcm_config(teacher, tmp_path, prompts=PROMPTS, sample_every=1))
    first, other = shown(run, seed=0), shown(run, seed=1)
    assert first.keys() == {"student", "average-0.1"}
    for frames in first.values():
        assert frames.shape == (3, 5, 32, 32, 3) and frames.dtype == np.uint8
    assert np.array_equal(first["average-0.1"], other["average-0.1"])
    assert not np.array_equal(first["student"], other["student"])
    assert not np.array_equal(first["student"], first["average-0.1"])
    again = shown(run, seed=0)
    assert np.array_equal(first["student"], again["student"])


def test_prompts_matter(run_of, teacher, tmp_path):
    run = run_of(rcm_config(teacher, tmp_path, prompts=("a red fox", "a red fox"), sample_every=1))
    both = shown(run)["student"]
    run = run_of(rcm_config(teacher, tmp_path, prompts=("a red fox", "snow"), sample_every=1))
    other = shown(run)["student"]
    assert np.array_equal(both[0], other[0])
    assert not np.array_equal(both[1], other[1])
    assert not np.array_equal(both[0], both[1]), "all prompts have one noise"


@pytest.mark.parametrize("changes", [{"prompts": ()}, {"sample_every": None}])
def test_nothing_to_show(run_of, teacher, tmp_path, changes):
    config = {"prompts": PROMPTS, "sample_every": 1, **changes}
    run = run_of(rcm_config(teacher, tmp_path, **config))
    assert Preview.of(run, few_steps, SHAPE) is None


def test_models_that_need_an_image_show_nothing(run_of, image_teacher, tmp_path):
    run = run_of(rcm_config(image_teacher, tmp_path, prompts=PROMPTS, sample_every=1))
    assert Preview.of(run, few_steps, SHAPE) is None


@pytest.mark.parametrize("make", [sla_config, rcm_config])
def test_looking_changes_nothing(teacher, tmp_path, monkeypatch, make):
    """A run with samples has the losses of one without, and their videos."""
    only_logs(monkeypatch)
    monkeypatch.setattr("turbodit.training.preview.solver_sample", two_steps)
    shared = {"prompts": PROMPTS[:2], "steps": 3, "ema": (0.1,)}
    watched = make(teacher, tmp_path / "watched", sample_every=2, **shared)
    train(watched)
    alone = make(teacher, tmp_path / "alone", **shared)
    train(alone)
    assert log_of(watched) == log_of(alone)
    names = sorted(path.name for path in (tmp_path / "watched" / "samples").glob("*.mp4"))
    assert names == [
        *(f"{name}-0000000{step}.mp4" for name in ("average-0.1", "student") for step in (2, 3)),
        "teacher-00000002.mp4",
    ]
    with av.open(tmp_path / "watched" / "samples" / names[0]) as video:
        frame = next(video.decode(video=0))
    assert (frame.width, frame.height) == (2 * 128, 64), "two clips side by side"
    assert not (tmp_path / "alone" / "samples").exists()


def two_steps(velocity, noise, *, solver, steps, shift):
    """In place of the teacher's 50."""
    assert (solver, steps, shift) == ("unipc", 50, 5.0)
    return noise - velocity(noise, 1.0)


def test_rcms_sampler_takes_four_steps_without_guidance(monkeypatch):
    asked = []

    def conditional(latents, t):
        asked.append(t)
        return latents

    def unconditional(latents, t):
        raise AssertionError("a pass for nothing")

    sampler = few_step_sampler(4, 60.0)
    generators = [torch.Generator().manual_seed(0)]
    sampler(conditional, unconditional, torch.zeros(1, *SHAPE), generators)
    assert asked == list(few_step_times(4, 60.0)[:-1])


def test_slas_sampler_is_guided(teacher, tmp_path, monkeypatch):
    """Two texts in every step: the prompt and the model's negative one."""
    only_logs(monkeypatch)
    texts = []

    def noted(velocity, noise, **options):
        with monkeypatch.context() as patch:
            calls = spy(patch, WanModel, "forward")
            velocity(noise, 0.5)
        texts.extend(context for _, _, _, context, *_ in calls)
        return noise

    monkeypatch.setattr("turbodit.training.preview.solver_sample", noted)
    train(sla_config(teacher, tmp_path, prompts=PROMPTS[:1], sample_every=1, steps=1))
    student, of_teacher = texts[:2], texts[2:]
    for conditional, unconditional in (student, of_teacher):
        assert not torch.equal(conditional, unconditional)


def test_two_experts_share_a_samples_steps(folder, tmp_path, monkeypatch):
    two = tiny_teacher(folder, "t2v-a14b")
    asked = spy(monkeypatch, Experts, "at")
    config = rcm_config(
        two, tmp_path, method="scm", steps=1, ema=(0.1,), sample_every=1, prompts=PROMPTS[:1]
    )
    monkeypatch.setattr("turbodit.training.preview.solver_sample", two_steps)
    train(config)
    sampled = [experts.at(t) is experts.high_noise for experts, t in asked[-10:]]
    both = [True, True, False, False]
    assert sampled == [*both, *both, True, True], "the student's, its average's, the teacher's"
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 3
