from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.benchmark.tiny import CPU, TINY, WORKLOAD

from turbodit.benchmark import modes
from turbodit.benchmark.modes import MODES, build, chosen_format, chosen_modes
from turbodit.benchmark.step import relative_l2
from turbodit.benchmark.workload import Inputs
from turbodit.config import PRESETS


@torch.no_grad()
def test_the_original_and_ours_have_the_same_weights():
    inputs = Inputs.of(WORKLOAD, CPU, torch.float32)
    original, ours = (
        inputs.encoded(network).step(network)()
        for network in (build(MODES[name], TINY, CPU) for name in ("diffusers", "dense"))
    )
    assert relative_l2(ours, original) < 1e-5


def test_named_modes_come_in_the_tables_order():
    assert list(chosen_modes(("sagesla", "diffusers"), CPU)) == ["diffusers", "sagesla"]


def test_by_default_a_cpu_leaves_out_fp8():
    names = list(chosen_modes((), CPU))
    assert "sagesla-int8-channel" in names
    assert not [name for name in names if "fp8" in name]


def test_unknown_modes_are_named():
    with pytest.raises(ValueError, match="unknown mode fast, loud; supported: diffusers, dense"):
        chosen_modes(("loud", "dense", "fast"), CPU)


def test_modes_that_do_not_run_are_refused(monkeypatch):
    monkeypatch.setattr(modes, "available", lambda name, device: (False, "needs a newer device"))
    with pytest.raises(ValueError, match="sagesla does not run on cpu: needs a newer device"):
        chosen_modes(("sagesla",), CPU)
    assert "sagesla" not in chosen_modes((), CPU)


@pytest.mark.parametrize(
    ("capability", "format"), [((8, 0), "int8-channel"), ((8, 9), "fp8-channel")]
)
def test_format_suits_the_device(monkeypatch, capability, format):
    found = SimpleNamespace(name="a GPU", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert chosen_format(None, torch.device("cuda")) == format
    assert chosen_format("int8-block", torch.device("cuda")) == "int8-block"
    if capability < (8, 9):
        with pytest.raises(ValueError, match=r"needs compute capability 8\.9"):
            chosen_format("fp8", torch.device("cuda"))


def test_format_on_a_cpu():
    assert chosen_format(None, CPU) == "int8-channel"


def test_sparse_settings_are_the_models():
    assert modes.sparse_settings(PRESETS["spritewan"]) == {
        "ratio": 0.1,
        "block_q": 16,
        "block_k": 16,
    }
    assert modes.sparse_settings(PRESETS["Wan2.1-T2V-14B"]) == {"ratio": 0.1}
