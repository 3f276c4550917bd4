"""Means over processes, whole lines, samples in a grid."""

from __future__ import annotations

import json
import sys
import time
import types
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from turbodit.distributed import join, leave
from turbodit.training.log import Metrics, TrainLog, _grid


@pytest.fixture
def mesh():
    yield join("cpu")
    leave()


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_metrics_are_means_of_finite_values(mesh):
    metrics = Metrics(mesh)
    metrics.add("loss", torch.tensor([1.0, float("nan"), 3.0]))
    metrics.add("loss", 5.0)
    metrics.add("norm", torch.tensor(float("inf")))
    assert metrics.take() == {"loss": 3.0, "nan/loss": 1.0, "nan/norm": 1.0}
    assert metrics.take() == {}


def test_losses_by_noise_level(mesh):
    metrics = Metrics(mesh)
    losses = torch.tensor([1.0, 2.0, 4.0, float("nan"), 8.0])
    metrics.add_by_time("loss", losses, torch.tensor([0.0, 0.19, 0.2, 0.5, 1.0]))
    assert metrics.take() == {
        "loss": 3.75,
        "nan/loss": 1.0,
        "loss/t0.0-0.2": 1.5,
        "loss/t0.2-0.4": 4.0,
        "nan/loss/t0.4-0.6": 1.0,
        "loss/t0.8-1.0": 8.0,
    }


def test_an_interrupted_run_goes_on_in_the_same_files(tmp_path, mesh, capsys):
    with TrainLog(tmp_path, mesh, total_steps=4) as log:
        log.scalars(1, {"loss": 0.5})
        log.scalars(2, {"loss": float("nan"), "nan/loss": 3.0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed
    time.sleep(1.1)  # TensorBoard puts its files in order by the second they began in
    with TrainLog(tmp_path, mesh, total_steps=4, step=1) as log:
        log.scalars(2, {"loss": 0.25})
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 2]
    assert [line["loss"] for line in found] == [0.5, "nan", 0.25]
    assert all(line["peak_memory_gib"] > 0 and line["seconds_per_step"] > 0 for line in found)
    assert "2/4  loss nan" in capsys.readouterr().err

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_samples_as_a_grid(tmp_path, mesh):
    frames = np.zeros((3, 5, 16, 24, 3), dtype=np.uint8)
    for index in range(3):
        frames[index] = 80 * (index + 1)
    grid = _grid(frames)
    assert grid.shape == (5, 32, 48, 3)
    corners = [grid[0, y, x, 0] for y in (0, 31) for x in (0, 47)]
    assert corners == [80, 160, 240, 0]
    with TrainLog(tmp_path, mesh, total_steps=1) as log:
        log.videos(7, "student", frames, fps=8)
        log.videos(7, "student", frames, fps=8)  # the same step again, after a resume
    with av.open(str(tmp_path / "samples" / "student-00000007.mp4")) as video:
        decoded = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(decoded) == 5
    assert abs(int(decoded[0][8, 8, 0]) - 80) < 6
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    image = board.Images("samples/student")[0]
    assert (image.step, image.height, image.width) == (7, 96, 48)


def test_samples_of_another_shape(tmp_path, mesh):
    with (
        TrainLog(tmp_path, mesh, total_steps=1) as log,
        pytest.raises(ValueError, match=r"uint8 \(N, T, H, W, 3\), got float64 \(1, 2, 4, 4, 3\)"),
    ):
        log.videos(0, "student", np.zeros((1, 2, 4, 4, 3)), fps=8)


def test_only_the_first_process_writes(tmp_path, mesh):
    with TrainLog(tmp_path / "run", replace(mesh, rank=1), total_steps=1) as log:
        log.scalars(1, {"loss": 1.0})
        log.videos(1, "student", np.zeros((1, 2, 4, 4, 3), dtype=np.uint8), fps=8)
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_same_where_it_is_asked_for(tmp_path, mesh, monkeypatch):
    told = []

    class Run:
        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("finished")

    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: told.append(settings) or Run()
    fake.Video = lambda frames, fps, format: (frames.shape, fps, format)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with TrainLog(tmp_path / "run", mesh, total_steps=1, wandb_project="p") as log:
        log.scalars(1, {"loss": 1.0})
        log.videos(1, "student", np.zeros((1, 2, 4, 6, 3), dtype=np.uint8), fps=8)
    settings, (step, values), (_, sample), end = told
    assert (settings["project"], settings["id"], settings["resume"]) == ("p", "run", "allow")
    assert (step, values["loss"]) == (1, 1.0)
    assert sample == {"samples/student": ((2, 3, 4, 6), 8, "mp4")}
    assert end == "finished"


def test_wandb_that_is_not_there(tmp_path, mesh, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        TrainLog(tmp_path, mesh, total_steps=1, wandb_project="p")
