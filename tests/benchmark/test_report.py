from __future__ import annotations

import json

import pytest
from PIL import Image
from tests.benchmark.tiny import CPU

from turbodit.benchmark.report import Report, environment, heading, line, save, spread, table

REPORT = Report("step", "tiny 16x16x1", {"tokens": 4}, "| table |\n", Image.new("RGB", (4, 4)))


def test_environment_names_versions():
    found = environment(CPU)
    assert found["device"] == "CPU"
    assert {"torch", "cuda", "triton", "python", "turbodit"} <= set(found)


def test_three_files_are_written(tmp_path):
    found = environment(CPU) | {"device": "NVIDIA H100 80GB"}
    paths = save(REPORT, found, tmp_path / "results")
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    assert all("-nvidia-h100-80gb-step-tiny-16x16x1" in path.name for path in paths)
    numbers = json.loads(paths[0].read_text())
    assert (numbers["tokens"], numbers["device"], numbers["command"]) == (
        4,
        "NVIDIA H100 80GB",
        "step",
    )
    assert paths[1].read_text().startswith("step: tiny 16x16x1\nNVIDIA H100 80GB, torch ")
    assert Image.open(paths[2]).size == (4, 4)
    assert len(list((tmp_path / "results").iterdir())) == 3
    save(REPORT, found, tmp_path / "results")  # again, in its place
    assert len(list((tmp_path / "results").iterdir())) == 3


def test_nothing_is_half_written(tmp_path, monkeypatch):
    def full(self, file, format):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space"):
        save(REPORT, environment(CPU), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".md")]


def test_heading_without_a_subject_has_no_loose_ends():
    report = Report("attention", "", {}, "", REPORT.picture)
    assert heading(report, environment(CPU)).startswith("attention\nCPU, torch ")


def test_tables():
    assert table(("a", "b"), [(1, None)]) == "| a | b |\n| --- | --- |\n| 1 |  |"
    assert spread({"min": 1, "median": 2.345, "max": 30, "n": 3}, 1) == "1.0 / 2.3 / 30.0"
    assert spread(None) is None


def test_line_tells_what_was_measured():
    times = {"min": 1.0, "median": 2.0, "max": 3.0, "n": 3}
    found = {"state": "measured", "eager_ms": times, "kernels_ms": {"a": 1.0}, "peak_gib": 2.5}
    assert line(found) == "state measured, eager_ms 1.00 / 2.00 / 3.00, peak_gib 2.5"
