from __future__ import annotations

import pytest
from tests.benchmark.tiny import CPU, TINY, WORKLOAD, silent

from turbodit.benchmark import ladder
from turbodit.benchmark.ladder import (
    Options,
    extrapolated,
    factors,
    markdown,
    rungs,
    summary,
    with_decoding,
)
from turbodit.benchmark.measure import Times
from turbodit.config import PRESETS, SamplingConfig


def test_rungs_of_wan():
    ladder = rungs(PRESETS["Wan2.1-T2V-1.3B"].sampling, "fp8-channel")
    assert [(rung.steps, rung.passes, rung.complete) for rung in ladder] == [
        (50, 2, False),
        (50, 2, False),
        (4, 1, True),
        (4, 1, True),
    ]
    assert [rung.mode.linear for rung in ladder] == [None, *["fp8-channel"] * 3]
    assert [rung.mode.sparse for rung in ladder] == [False, False, False, True]
    assert ladder[0].mode.original


def test_without_guidance_a_step_is_one_pass():
    first, *_ = rungs(SamplingConfig(steps=8, shift=3.0, guidance=1.0), "int8-channel")
    assert first.passes == 1


def test_extrapolation_counts_every_pass():
    first, *_ = rungs(PRESETS["Wan2.1-T2V-1.3B"].sampling, "fp8-channel")
    assert extrapolated(Times(0.5, 0.6, 0.8, 3), first) == Times(50.0, 60.0, 80.0, 3)


def test_factors():
    assert factors([100.0, 20.0, 2.0]) == [
        {"previous": None, "first": 1.0},
        {"previous": 5.0, "first": 5.0},
        {"previous": 10.0, "first": 50.0},
    ]


def test_factors_of_what_did_not_fit():
    assert factors([None, 20.0, 10.0]) == [
        {"previous": None, "first": None},
        {"previous": None, "first": None},
        {"previous": 2.0, "first": None},
    ]


def test_decoding_is_added():
    assert with_decoding(3.0, 1.5) == 4.5
    assert with_decoding(None, 1.5) is None
    assert with_decoding(3.0, None) is None


def measured(seconds: float) -> dict:
    times = {"min": seconds, "median": seconds, "max": seconds, "n": 1}
    return {
        "state": "measured",
        "forward_seconds": times,
        "seconds": times,
        "how": "1 complete run",
        "peak_gib": 2.0,
    }


def test_a_table_with_a_rung_that_did_not_fit():
    climbed = list(zip(rungs(TINY.sampling, "int8-channel"), range(4), strict=True))
    results = [{"state": "out of memory"}, measured(60.0), measured(3.0), measured(1.0)]
    found = summary([(rung, results[i]) for rung, i in climbed], {"seconds": {"median": 2.0}})
    assert [rung["with_decoding_seconds"] for rung in found] == [None, 62.0, 5.0, 3.0]
    decoding = {"state": "out of memory"}
    numbers = {"tokens": 32, "rungs": found, "decoding": decoding, "experts": 2}
    text = markdown(numbers)
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert "out of memory" in rows[0]
    assert "| 20.0 |" in rows[2]
    assert "VAE decoding: out of memory." in text
    assert "one of the 2 experts" in text
    ladder.picture(numbers, WORKLOAD)


def test_all_rungs_are_measured_on_a_cpu():
    report = ladder.report(WORKLOAD, CPU, Options(repeats=2, linear="int8-channel"), silent)
    numbers = report.numbers
    assert [rung["steps"] * rung["passes_a_step"] for rung in numbers["rungs"]] == [20, 20, 4, 4]
    first, *_, last = numbers["rungs"]
    assert first["how"] == "extrapolated from 2 measured forward passes"
    assert first["seconds"]["median"] == pytest.approx(
        20 * first["forward_seconds"]["median"], rel=0.01, abs=1e-3
    )
    assert last["how"] == "2 complete runs"
    assert last["factor"]["first"] == pytest.approx(
        first["seconds"]["median"] / last["seconds"]["median"], abs=1e-3
    )
    assert numbers["decoding"]["seconds"]["n"] == 2
    assert "SageSLA 0.1" in report.markdown


def test_a_rung_without_memory_does_not_end_the_ladder(monkeypatch):
    import torch

    build = ladder.build

    def too_small(mode, model, device):
        if mode.original:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(mode, model, device)

    monkeypatch.setattr(ladder, "build", too_small)
    options = Options(repeats=1, linear="int8-channel", vae=False)
    numbers = ladder.report(WORKLOAD, CPU, options, silent).numbers
    states = [rung["state"] for rung in numbers["rungs"]]
    assert states == ["out of memory", "measured", "measured", "measured"]
    assert numbers["decoding"] is None
