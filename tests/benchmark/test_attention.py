from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.benchmark.tiny import CPU, WORKLOAD, silent

from turbodit.benchmark import attention, attention_accuracy
from turbodit.benchmark.attention import Shape, sizes_for
from turbodit.benchmark.workload import Workload

SMALL = replace(
    attention.CPU,
    shapes=(Shape("small", 128, 2, 64, train=True),),
    lengths=(64, 128),
    accuracy=Shape("accuracy", 256, 2, 64),
)


def test_a_models_shape_and_blocks():
    sizes = sizes_for(CPU, WORKLOAD)
    (shape,) = sizes.shapes
    assert (shape.length, shape.heads, shape.dim) == (32, 2, 32)
    assert sizes.contenders["sagesla"] == {"ratio": 0.1, "block_q": 16, "block_k": 16}
    assert sizes.contenders["sage"] == {}


def test_wan_keeps_the_back_ends_own_blocks():
    sizes = sizes_for(torch.device("cuda"), Workload.of("Wan2.1-T2V-14B"))
    (shape,) = sizes.shapes
    assert (shape.length, shape.heads, shape.train) == (75_600, 40, False)
    assert sizes.contenders["sagesla"] == {"ratio": 0.1}
    assert {"flash3", "flash4"} <= set(sizes.contenders)


def test_everything_is_measured_on_a_cpu(monkeypatch):
    monkeypatch.setattr(attention, "sizes_for", lambda device, workload: SMALL)
    monkeypatch.setattr(attention_accuracy, "recorded", lambda device: [])
    report = attention.report(CPU, None, 1, silent)
    numbers = report.numbers
    (shape,) = numbers["speed"]
    names = set(attention.CPU.contenders)
    assert set(shape["results"]) == names | {"sla, forward + backward", "sdpa, forward + tangent"}
    assert all(row["ms"]["n"] == 1 for row in shape["results"].values())
    assert set(numbers["tflops_over_length"]) == names
    gaussian = numbers["accuracy"]["Gaussian"]
    assert gaussian["sage"]["relative_l2"] < 0.05
    assert (
        gaussian["sla"]["relative_l2"] < 2 * gaussian["sdpa over the blocks of sla"]["relative_l2"]
    )
    assert "| sagesla |" in report.markdown


@pytest.mark.slow
def test_accuracy_on_what_spritewan_sees():
    cases = dict(attention_accuracy.recorded(CPU))
    assert len(cases) == 6
    for q, k, v in cases.values():
        assert q.shape == k.shape == v.shape == (1, 576, 4, 64)
        assert q.dtype == torch.bfloat16
