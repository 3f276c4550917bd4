from __future__ import annotations

import pytest
import torch
from tests.benchmark.tiny import CPU, TINY, WORKLOAD, silent

from turbodit.benchmark import linear
from turbodit.benchmark.linear import Layer, layers


def test_layers_of_a_block():
    shapes = [(layer.rows, layer.inputs, layer.outputs) for layer in layers(TINY.transformer, 32)]
    assert shapes == [(32, 64, 192), (32, 64, 64), (32, 64, 128), (32, 128, 64), (8, 64, 128)]


def test_operations_a_second():
    assert Layer("", 1000, 1000, 1000).tops(ms=2.0) == pytest.approx(1.0)


def test_all_formats_are_measured_on_a_cpu():
    report = linear.report(WORKLOAD, CPU, 1, silent)
    assert len(report.numbers["layers"]) == 5
    for rows in report.numbers["layers"].values():
        assert list(rows) == ["float32", "int8-block", "int8-channel", "fp8-channel"]
        assert rows["float32"]["relative_l2"] < 1e-5
        assert rows["int8-channel"]["relative_l2"] < rows["fp8-channel"]["relative_l2"] < 0.1
        assert rows["int8-block"]["product_ms"]["n"] == 1
    assert "| fp8-channel |" in report.markdown


def test_a_layer_without_memory_is_told(monkeypatch):
    def too_small(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(linear, "measure", too_small)
    report = linear.report(WORKLOAD, CPU, 1, silent)
    assert set(report.numbers["layers"].values()) == {"out of memory"}
    assert "out of memory" in report.markdown
