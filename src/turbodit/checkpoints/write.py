"""Writing safetensors files tensor by tensor, so that no model is held as a whole.

Everything goes to a temporary name first. What is at the final one is complete, also if the
process is killed or the disk is full.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from turbodit.weights import DTYPES, LazyTensor, LazyWeights

WEIGHTS_NAME = "diffusion_pytorch_model"
CONFIG_KEY = "turbodit"  # of our safetensors files' metadata: the content of config.json
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the first tensor, in bytes

Advance = Callable[[], None]  # called when a tensor is written


def write_file(
    path: Path, weights: LazyWeights, config: Mapping[str, Any], advance: Advance = lambda: None
) -> None:
    """One safetensors file with `config` in its metadata.

    Tensors are read in the order of `weights`. In the file those of wide dtypes come first,
    so that all are aligned.

    Raises:
        ValueError: a dtype that safetensors does not have.
        OSError: it cannot be written; an incomplete file is left.
    """
    places, size = _places(weights)
    header = _header(weights, places, config)
    with _explained(path, len(header) + size), path.open("wb") as file:
        file.write(header)
        for name, tensor in weights.items():
            file.seek(len(header) + places[name])
            file.write(_bytes(name, tensor))
            advance()


def write_folder(
    folder: Path,
    weights: LazyWeights,
    config: Mapping[str, Any],
    max_shard_size: int | str = "5GB",
    advance: Advance = lambda: None,
) -> None:
    """diffusers' layout, into an empty folder: config.json and safetensors, sharded if large."""
    plan = split_state_dict_into_shards_factory(
        dict(weights),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=WEIGHTS_NAME + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        write_file(folder / file, {name: weights[name] for name in names}, config, advance)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / f"{WEIGHTS_NAME}.safetensors.index.json", index)
    _write_json(folder / "config.json", config)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name beside `path` that becomes `path` on success and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder` on success and vanishes otherwise.

    Where `folder` exists, its weights are replaced, in sub-folders too, and other files stay.
    """
    fresh = not folder.exists()
    home = folder.parent if fresh else folder
    home.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=home, prefix=f".{folder.name}.partial-") as name:
        partial = Path(name) / "new"  # with the usual permissions, which `name` has not
        partial.mkdir()
        yield partial
        if fresh:
            os.replace(partial, folder)
        else:
            _replace_weights(folder, partial)


def _replace_weights(folder: Path, new: Path) -> None:
    folder.mkdir(exist_ok=True)
    if (new / "config.json").exists():
        for old in folder.glob(f"{WEIGHTS_NAME}*"):
            old.unlink()
    for entry in new.iterdir():
        if entry.is_dir():
            _replace_weights(folder / entry.name, entry)
        else:
            os.replace(entry, folder / entry.name)


def _places(weights: LazyWeights) -> tuple[dict[str, int], int]:
    """Where each tensor begins, counted from the first, and the bytes of all of them."""
    places, end = {}, 0
    for name in sorted(weights, key=lambda name: -weights[name].dtype.itemsize):
        places[name] = end
        end += weights[name].nbytes
    return places, end


def _header(weights: LazyWeights, places: Mapping[str, int], config: Mapping[str, Any]) -> bytes:
    """The length of the header, and the header itself."""
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config)}
    entries: dict[str, Any] = {"__metadata__": metadata}
    for name, place in places.items():
        tensor = weights[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors files cannot hold")
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % ALIGNMENT)
    return len(content).to_bytes(8, "little") + content


def _bytes(name: str, lazy: LazyTensor) -> memoryview:
    tensor = lazy.read().detach().cpu().contiguous()
    assert (tuple(tensor.shape), tensor.dtype) == (lazy.shape, lazy.dtype), name
    return tensor.flatten().view(torch.uint8).numpy().data


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    """Say in the error which file could not be written and, if for want of space, how much."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(path.parent).free
            reason = f"no space left; it has {size:,} bytes, {free:,} bytes are free"
        raise OSError(error.errno, f"cannot write {path}: {reason}") from error
