from __future__ import annotations

import pytest
from tests.benchmark.tiny import CPU, WORKLOAD, silent

from turbodit.benchmark import e2e
from turbodit.benchmark.e2e import Options, summary


def test_every_stage_has_its_time_cold_and_warm():
    options = Options(
        repeats=2,
        build={"attention": "sagesla", "linear": "int8-channel", "residual": "float32"},
        request={"steps": 2, "solver": "few-step"},
    )
    report = e2e.report(WORKLOAD, CPU, options, silent)
    numbers = report.numbers
    stages = {"text", "denoise", "denoise_step", "decode", "write", "total"}
    assert set(numbers["cold_seconds"]) == stages == set(numbers["warm_seconds"])
    assert numbers["warm_seconds"]["denoise"]["n"] == 2
    assert numbers["settings"]["steps"] == 2
    assert numbers["weights"] == "random"
    assert numbers["host_peak_gib"] > 0
    assert "attention sagesla" in report.markdown
    assert "| of it one step |" in report.markdown


@pytest.mark.parametrize("name", ["spritewan", "spritewan-teacher"])
def test_the_embedded_models_have_their_own_weights(monkeypatch, name):
    seen = {}
    monkeypatch.setattr(
        e2e.Pipeline, "from_pretrained", lambda name, **options: seen.update(options, name=name)
    )
    workload = e2e.Workload.of(name)
    e2e.load(workload, CPU, {"attention": "sagesla"})
    # With the settings that its files state, or its preset.
    assert seen == {"name": name, "device": CPU, "attention": "sagesla"}


def test_total_is_of_the_stages_and_the_first_is_apart():
    def video(seconds: float) -> dict:
        return {
            "seconds": {"denoise": seconds, "total": seconds},
            "peak_gib": {"denoise": seconds / 10},
            "settings": {},
        }

    found = summary(5.0, [video(9.0), video(2.0), video(4.0)])
    assert found["cold_seconds"]["denoise"] == 9.0
    assert found["warm_seconds"]["denoise"] == {"min": 2.0, "median": 3.0, "max": 4.0, "n": 2}
    assert found["peak_gib"] == {"denoise": pytest.approx(0.9)}
