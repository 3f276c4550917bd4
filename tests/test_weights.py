from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from turbodit.weights import DTYPES, assign_weights, lazy_weights, read_metadata, read_weights

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


EVERY_DTYPE = {f"{d}": torch.arange(12).reshape(3, 4).to(d) for d in DTYPES.values()}
SHAPES = {"empty": torch.zeros(0, 3), "number": torch.tensor(5.0), "row": torch.arange(3.0)}


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".old.pth"])
def test_lazy_tensors(mapped: bool, suffix: str, tmp_path: Path) -> None:
    path, state = tmp_path / f"file{suffix}", EVERY_DTYPE | SHAPES
    if suffix == ".old.pth":
        state = {name: tensor for name, tensor in state.items() if "float8" not in name}
    if suffix == ".safetensors":
        save_file(state, path)
    else:  # several tensors may lie in one storage, in any order
        table = torch.randn(6, 5)
        state |= {"column": table[:, 2], "turned": table[1:4].t(), "all": table}
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pth")

    lazy = lazy_weights(path, mapped=mapped)

    assert lazy.keys() == state.keys()
    for name, tensor in state.items():
        known, read = lazy[name], lazy[name].read()
        assert (known.shape, known.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert (known.ndim, known.nbytes) == (tensor.ndim, tensor.nbytes)
        assert read.dtype == tensor.dtype and read.float().equal(tensor.float()), name
    if not mapped and suffix != ".old.pth":
        assert lazy["row"].read().data_ptr() != lazy["row"].read().data_ptr()


def test_metadata(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors", {"format": "pt", "x": "é"})
    save_file(STATE, tmp_path / "b.safetensors")
    assert read_metadata(tmp_path / "a.safetensors") == {"format": "pt", "x": "é"}
    assert read_metadata(tmp_path / "b.safetensors") == {}


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
    for read in (read_weights, lambda path: lazy_weights(path, mapped=False)):
        with pytest.raises(ValueError, match=f"model{suffix} is truncated"):
            read(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(STATE, path)
    weights = lazy_weights(path, mapped=False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        [tensor.read() for tensor in weights.values()]


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


def test_8_bit_weights_are_not_cast(tmp_path: Path) -> None:
    module = nn.Module()
    values = torch.randn(3).to(torch.float8_e4m3fn)
    module.register_buffer("values", torch.empty_like(values, device="meta"))
    module.register_buffer("others", torch.zeros(3, device="meta"))
    weights = {"values": values, "others": values}
    assign_weights(module, weights, tmp_path, dtype=torch.bfloat16)
    assert module.values is values and module.others.dtype == torch.bfloat16
