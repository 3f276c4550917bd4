"""What the training stages share: resumable state, a wall-clock limit, a log.

A stage can be stopped at any moment and started again with the same command. Its state
is a folder of safetensors shards of at most 16 MiB (small enough for any transport) and
an `info.json`; a new state is complete before it replaces the old one.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SHARD_BYTES = 15 * 2**20


def save_state(folder: Path, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
    """Write `tensors` (any shapes and dtypes) and `info` (JSON) to `folder`, all or nothing.

    Raises:
        ValueError: a tensor is larger than a shard may be.
    """
    partial = folder.with_name(folder.name + ".partial")
    previous = folder.with_name(folder.name + ".previous")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for index, shard in enumerate(_shards(tensors)):
        save_file(shard, partial / f"state-{index:03d}.safetensors")
    (partial / "info.json").write_text(json.dumps(info, indent=1))
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """(tensors, info) of the last complete state in `folder`, on the CPU; None where none is."""
    if not folder.exists():  # perhaps stopped between the two renames
        folder = folder.with_name(folder.name + ".previous")
    if not folder.exists():
        return None
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("state-*.safetensors")):
        tensors.update(load_file(path))
    return tensors, json.loads((folder / "info.json").read_text())


def _shards(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > SHARD_BYTES:
            raise ValueError(f"{name} has {tensor.nbytes} bytes, supported: up to {SHARD_BYTES}")
        tensor = tensor.detach().cpu().contiguous()
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


class Clock:
    """Wall-clock limit of one run of a stage, in minutes."""

    def __init__(self, minutes: float) -> None:
        self.start = time.monotonic()
        self.limit = 60 * minutes

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def over(self) -> bool:
        return self.seconds > self.limit


class StageLog:
    """Appends one JSON object a line to `path` and prints it: the stage's kept log."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, **record: Any) -> None:
        line = json.dumps({k: _plain(v) for k, v in record.items()})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    return round(value, 6) if isinstance(value, float) else value
