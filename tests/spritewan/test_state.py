"""The state of a training stage on disk: small pieces, all or nothing, whatever interrupts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from turbodit.spritewan import state
from turbodit.spritewan.state import Clock, StageLog, load_state, save_state

OLD = {"weight": torch.tensor([1.0, 2.0])}
NEW = {"weight": torch.tensor([3.0, 4.0])}


def siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_round_trip_of_shapes_dtypes_and_names(tmp_path: Path) -> None:
    tensors = {
        "model.blocks.0.weight": torch.randn(3, 5).T,  # not contiguous
        "average.bias": torch.randn(4).bfloat16(),
        "step.bias": torch.tensor(7.0),
        "counts": torch.arange(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    info = {"trainer_step": 3, "seconds": 1.5}
    save_state(tmp_path / "run" / "state", tensors, info)
    loaded = load_state(tmp_path / "run" / "state")
    assert loaded is not None
    assert loaded[1] == info
    assert loaded[0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(loaded[0][name], tensor.detach(), rtol=0, atol=0)


def test_no_state_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path / "state") is None


def test_shards_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SHARD_BYTES", 4_000)
    floats = (400, 600, 1_000, 1, 999, 500, 501)
    tensors = {f"tensor-{i}": torch.randn(count) for i, count in enumerate(floats)}
    save_state(tmp_path / "state", tensors, {})
    shards = sorted((tmp_path / "state").glob("*.safetensors"))
    assert len(shards) == 5
    for shard in shards:
        header = int.from_bytes(shard.read_bytes()[:8], "little")
        assert shard.stat().st_size - 8 - header <= 4_000
    loaded = load_state(tmp_path / "state")
    assert loaded is not None and all(torch.equal(loaded[0][n], t) for n, t in tensors.items())


def test_a_smaller_state_leaves_no_shard_of_a_larger_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "SHARD_BYTES", 8)
    save_state(tmp_path / "state", OLD | {"gone": torch.zeros(2)}, {"step": 1})
    save_state(tmp_path / "state", NEW, {"step": 2})
    loaded = load_state(tmp_path / "state")
    assert loaded is not None
    assert loaded[0].keys() == {"weight"} and torch.equal(loaded[0]["weight"], NEW["weight"])
    assert loaded[1] == {"step": 2}
    assert siblings(tmp_path / "state") == ["state"]


@pytest.mark.parametrize("stop", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failure_while_writing_keeps_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    monkeypatch.setattr(state, "SHARD_BYTES", 8)
    save_state(tmp_path / "state", OLD, {"step": 1})
    written = []

    def failing_save(shard: dict[str, torch.Tensor], path: Path) -> None:
        if written:
            raise stop
        written.append(path)
        path.write_bytes(b"first shard")

    with monkeypatch.context() as patch, pytest.raises(type(stop)):
        patch.setattr(state, "save_file", failing_save)
        save_state(tmp_path / "state", NEW | {"more": torch.zeros(2)}, {"step": 2})
    assert written
    loaded = load_state(tmp_path / "state")
    assert loaded is not None
    assert torch.equal(loaded[0]["weight"], OLD["weight"]) and loaded[1] == {"step": 1}
    save_state(tmp_path / "state", NEW, {"step": 3})  # what was left behind is in nobody's way
    assert siblings(tmp_path / "state") == ["state"]


def test_a_stop_between_the_two_renames_keeps_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path / "state", OLD, {"step": 1})
    rename = Path.rename

    def stopping_rename(path: Path, target: Path) -> Path:
        if path.name == "state.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", stopping_rename)
        save_state(tmp_path / "state", NEW, {"step": 2})
    assert not (tmp_path / "state").exists()
    loaded = load_state(tmp_path / "state")
    assert loaded is not None
    assert torch.equal(loaded[0]["weight"], OLD["weight"]) and loaded[1] == {"step": 1}
    save_state(tmp_path / "state", NEW, {"step": 2})
    assert siblings(tmp_path / "state") == ["state"]


def test_a_stop_before_the_old_state_is_deleted_has_the_new_one(tmp_path: Path) -> None:
    save_state(tmp_path / "state", NEW, {"step": 2})
    save_state(tmp_path / "state.previous", OLD, {"step": 1})  # as such a stop leaves it
    loaded = load_state(tmp_path / "state")
    assert loaded is not None
    assert torch.equal(loaded[0]["weight"], NEW["weight"]) and loaded[1] == {"step": 2}
    save_state(tmp_path / "state", OLD, {"step": 3})
    assert siblings(tmp_path / "state") == ["state"]


def test_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(state.time, "monotonic", lambda: now)
    clock = Clock(minutes=0.5)
    now = 129.0
    assert clock.seconds == 29.0 and not clock.over
    now = 131.0
    assert clock.over


def test_log_appends_a_line_of_json_for_each_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / "log.jsonl"
    StageLog(path).write(event="start", step=0)
    StageLog(path).write(step=50, loss=torch.tensor(0.5), seconds=1.23456789)  # a later run
    lines = path.read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    assert [json.loads(line) for line in lines] == [
        {"event": "start", "step": 0},
        {"step": 50, "loss": 0.5, "seconds": 1.234568},
    ]
