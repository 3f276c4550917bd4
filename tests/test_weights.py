from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from turbodit.weights import assign_weights, read_weights

STATE = {"a.weight": torch.randn(16, 16), "a.bias": torch.randn(16)}


class Poison:
    """Unpickling this calls print."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("the file ran code",)


def test_files_of_every_kind(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "file.safetensors")
    torch.save(STATE, tmp_path / "file.pth")
    torch.save({"state_dict": STATE, "epoch": 1}, tmp_path / "wrapped.pt")
    torch.save(STATE, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for path in sorted(tmp_path.iterdir()):
        weights = read_weights(path)
        assert weights.keys() == STATE.keys()
        assert all(weights[name].equal(tensor) for name, tensor in STATE.items())


def test_sharded_folder(tmp_path: Path) -> None:
    shards = {name: f"part-{name}.safetensors" for name in STATE}
    for name, shard in shards.items():
        save_file({name: STATE[name]}, tmp_path / shard)
    with pytest.raises(FileNotFoundError, match=r"expected one .safetensors.*found: part-a\.bias"):
        read_weights(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    weights = read_weights(tmp_path)
    assert len(weights) == 2
    assert all(weights[name].equal(tensor) for name, tensor in STATE.items())
    (tmp_path / "part-a.bias.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-a\.bias\.safetensors are missing"):
        read_weights(tmp_path)
    for content, message in {
        "{": r"index\.json is truncated",
        "[]": "holds a list, expected a JSON object",
        "{}": "has no weight_map",
    }.items():
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused(
    zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pth"
    torch.save({**STATE, "bad": Poison()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="pickled objects other than tensors"):
        read_weights(path)
    assert "the file ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_truncated_files(suffix: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    (torch.save if suffix == ".pth" else save_file)(STATE, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=f"model{suffix} is truncated"):
        read_weights(path)


def test_something_else(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "list.pth")
    (tmp_path / "model.zip").touch()
    with pytest.raises(ValueError, match=r"suffix '\.zip'; supported: \.safetensors, \.pth"):
        read_weights(tmp_path / "model.zip")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        read_weights(tmp_path / "none.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="found: nothing"):
        read_weights(tmp_path / "empty")


def test_assigned_weights_are_not_copied(tmp_path: Path) -> None:
    weights = {"weight": torch.randn(2, 3), "bias": torch.randn(2, dtype=torch.float64)}
    with torch.device("meta"):
        module = nn.Linear(3, 2)

    assign_weights(module, weights, tmp_path, dtype=torch.float32)

    assert module.weight.data_ptr() == weights["weight"].data_ptr()
    assert module.bias.dtype == torch.float32 and module.weight.requires_grad


def test_integers_keep_their_type(tmp_path: Path) -> None:
    module = nn.Module()
    module.register_buffer("counts", torch.zeros(3, dtype=torch.int64, device="meta"))
    assign_weights(module, {"counts": torch.arange(3)}, tmp_path, dtype=torch.bfloat16)
    assert module.counts.tolist() == [0, 1, 2] and module.counts.dtype == torch.int64
