from __future__ import annotations

import torch
from tests.benchmark.tiny import CPU, WORKLOAD, silent

from turbodit.benchmark import step
from turbodit.benchmark.step import Options

ONCE = Options(repeats=1)


def test_modes_are_timed_and_compared():
    names = ("diffusers", "dense", "int8-channel", "sagesla-int8-channel")
    report = step.report(WORKLOAD, CPU, names, ONCE, silent)
    modes = report.numbers["modes"]
    assert list(modes) == list(names)
    assert report.numbers["tokens"] == 32
    for row in modes.values():
        assert row["eager"] == "measured"
        assert row["eager_ms"]["n"] == 1
        assert "graph" not in row  # of a GPU
    errors = {name: row["relative_l2"] for name, row in modes.items()}
    assert errors["dense"] == 0
    assert errors["diffusers"] < 1e-5
    assert 1e-4 < errors["int8-channel"] < 0.1
    assert errors["sagesla-int8-channel"] > errors["int8-channel"]
    assert "| ours, dense |" in report.markdown


def test_without_the_reference_there_is_no_error():
    numbers = step.report(WORKLOAD, CPU, ("diffusers",), ONCE, silent).numbers
    assert "relative_l2" not in numbers["modes"]["diffusers"]


def test_all_modes_that_suit_a_cpu_run():
    report = step.report(WORKLOAD, CPU, (), ONCE, silent)
    assert set(report.numbers["skipped"]) == {"fp8", "sagesla-fp8"}
    assert "- not measured: fp8" in report.markdown
    assert len(report.numbers["modes"]) == 8


def test_a_mode_without_memory_does_not_end_the_run(monkeypatch):
    build = step.build

    def too_small(mode, model, device):
        if mode.original:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(mode, model, device)

    monkeypatch.setattr(step, "build", too_small)
    report = step.report(WORKLOAD, CPU, ("diffusers", "dense"), ONCE, silent)
    assert report.numbers["modes"]["diffusers"]["eager"] == "out of memory"
    assert report.numbers["modes"]["dense"]["eager"] == "measured"
    assert "| diffusers, eager | out of memory |" in report.markdown


def test_a_table_of_a_gpu():
    times = {"min": 1.0, "median": 2.0, "max": 3.0, "n": 3}
    row = {
        "label": "ours, dense",
        "eager": "measured",
        "eager_ms": times,
        "peak_gib": 4.0,
        "graph": "measured",
        "graph_ms": times,
        "graph_peak_gib": 5.0,
        "share": {"GEMM": 0.6, "attention": 0.3, "rest": 0.1},
        "kernels_ms": {"nvjet": 1.5},
        "relative_l2": 0.0123,
    }
    full = row | {"graph": "out of memory"}
    del full["graph_ms"], full["graph_peak_gib"]
    numbers = {"tokens": 32, "repeats": 3, "modes": {"dense": row, "full": full}}
    text = step.markdown(numbers)
    both = "1.00 / 2.00 / 3.00"
    assert f"| ours, dense | {both} | {both} | 4.00 / 5.00 | 60% | 30% | 10% | 1.23% |" in text
    assert f"| {both} | out of memory | 4.00 |" in text
    assert "| `nvjet` | 1.5 |" in text
    step.picture(numbers, WORKLOAD)
