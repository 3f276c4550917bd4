from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from turbodit import attention, doctor
from turbodit.cli import main

H100 = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)


@pytest.fixture
def one_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: H100)


@pytest.fixture
def backend_for_gpus(monkeypatch) -> None:
    def missing(device: torch.device) -> str | None:
        return None if device.type == "cuda" else "needs a CUDA device"

    backend = attention.Backend(
        build=lambda: lambda q, k, v: v, missing=missing, description="fast"
    )
    monkeypatch.setitem(attention.BACKENDS, "quick", backend)


def test_findings_are_json_and_true(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["packages"]["torch"] == metadata.version("torch")
    assert findings["cpu"]["cores"] >= 1
    assert findings["cpu"]["memory_gib"] > 0.5
    assert set(findings["attention"]["cpu"]) == set(attention.BACKENDS)
    assert findings["attention"]["cpu"]["sdpa"]["runs"]
    assert findings["linear"]["cpu"]["fp8-channel"]["runs"]
    assert findings["video"]["libx264"]


def test_packages_that_are_not_there(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert doctor.diagnose()["packages"]["no-such-package"] is None


def test_embedded_weights_are_those_of_both_models():
    found = doctor.diagnose()["embedded_model"]
    assert found["error"] is None
    parts = ("transformer", "teacher", "vae", "text_encoder")
    files = [path for part in parts for path in Path(found["path"], part).glob("*.safetensors*")]
    weights = [path for path in files if path.suffix != ".json"]
    assert found["weight_bytes"] == sum(path.stat().st_size for path in weights) > 0
    assert {path.parent.name for path in weights} == set(parts)


def test_looking_unpacks_nothing(monkeypatch):
    def unpacked(folder):
        raise AssertionError(f"{folder} was unpacked")

    monkeypatch.setattr("turbodit.checkpoints.folder.unpacked", unpacked)
    assert doctor.diagnose()["embedded_model"]["error"] is None


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in doctor.diagnose()["no_gpu"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0" in doctor.diagnose()["no_gpu"]


def test_every_backend_is_judged_on_every_device(one_gpu, backend_for_gpus):
    findings = doctor.diagnose()
    assert findings["gpus"] == [
        {"device": "cuda:0", "name": "NVIDIA H100", "capability": "9.0", "memory_gib": 80.0}
    ]
    assert findings["attention"]["cpu"]["quick"] == {"runs": False, "note": "needs a CUDA device"}
    assert findings["attention"]["cuda:0"]["quick"] == {"runs": True, "note": "fast"}


def test_tables_show_what_was_found(one_gpu, backend_for_gpus, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in ("torch", "NVIDIA H100", "80.0 GiB", "9.0", "quick", "needs a CUDA device"):
        assert part in out


@pytest.mark.parametrize(("index", "message"), [("{}", "has no transformer"), ("{", "truncated")])
def test_incomplete_embedded_model_says_what_is_missing(
    monkeypatch, tmp_path, capsys, index, message
):
    (tmp_path / "model_index.json").write_text(index)
    folder = doctor.find_model(tmp_path)
    monkeypatch.setattr(doctor, "find_model", lambda name: folder)
    assert message in doctor.diagnose()["embedded_model"]["error"]
    assert main(["doctor"]) == 0
    assert "incomplete: " in capsys.readouterr().out
