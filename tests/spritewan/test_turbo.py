"""The build of the turbo model: what is called with what, and what is not done twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbodit.spritewan import turbo


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Every stage makes an empty folder and notes its inputs."""
    done: list[tuple] = []

    def made(folder: Path, *call: object) -> None:
        folder.mkdir(parents=True)
        done.append(call)

    def data(options: turbo.Options, folder: Path) -> None:
        done.append(("data", folder))

    def merge(base: Path, diff_base: str, target: Path, folder: Path) -> None:
        made(folder, "merge", base, diff_base, target)

    def quantize(source: Path, folder: Path, format: str) -> None:
        made(folder, "quantize", source, format)

    monkeypatch.setattr(turbo, "make_data", data)
    for name in ("sla", "rcm"):
        monkeypatch.setattr(
            getattr(turbo, name),
            "train",
            lambda config, name=name: made(config.out / "transformer", name, config),
        )
    monkeypatch.setattr(turbo, "merge_difference", merge)
    monkeypatch.setattr(turbo, "quantize_file", quantize)
    return done


def test_stages_feed_each_other(calls, tmp_path):
    options = turbo.Options(tmp_path, sla_steps=7, rcm_minutes=3.0)
    assert turbo.build(options) == tmp_path / "turbo"
    assert [call[0] for call in calls] == ["data", "sla", "rcm", "merge", "quantize"]
    (_, data), (_, sla), (_, rcm), merge, quantize = calls
    assert sla.data == rcm.data == (str(data),)
    assert (sla.steps, sla.minutes, rcm.steps, rcm.minutes) == (7, None, 2000, 3.0)
    student, tuned = tmp_path / "rcm" / "transformer", tmp_path / "sla" / "transformer"
    assert merge[1:] == (student, "spritewan-teacher", tuned)
    assert sla.model == rcm.model == "spritewan-teacher"
    assert quantize[1:] == (tmp_path / "merged", "int8-channel")


def test_what_is_whole_is_left_alone(calls, tmp_path):
    (tmp_path / "sla" / "transformer").mkdir(parents=True)
    turbo.build(turbo.Options(tmp_path))
    assert [call[0] for call in calls] == ["data", "rcm", "merge", "quantize"]
    calls.clear()
    turbo.build(turbo.Options(tmp_path))
    assert [call[0] for call in calls] == ["data"]
