"""Writing safetensors files tensor by tensor, so that no model is held as a whole.

Everything goes to a temporary name first. What is at the final one is complete, also if the
process is killed or the disk is full. What a killed process leaves, the next one that writes the
same target removes; it is told from what another process is still writing by a lock, which the
system takes from a process that ends, however it ends.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from huggingface_hub import split_state_dict_into_shards_factory

from turbodit.weights import DTYPES, LazyTensor, LazyWeights

WEIGHTS_NAME = "diffusion_pytorch_model"
CONFIG_KEY = "turbodit"  # of our safetensors files' metadata: the content of config.json
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the first tensor, in bytes

Advance = Callable[[], None]  # called when a tensor is written


def write_file(
    path: Path,
    weights: LazyWeights,
    config: Mapping[str, Any],
    advance: Advance = lambda: None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One safetensors file with `config` in its metadata.

    Tensors are read in the order of `weights`. In the file those of wide dtypes come first,
    so that all are aligned.

    Args:
        metadata: what else is in it.

    Raises:
        ValueError: a dtype that safetensors does not have.
        OSError: it cannot be written; an incomplete file is left.
    """
    places, size = _places(weights)
    header = _header(weights, places, {CONFIG_KEY: json.dumps(config), **(metadata or {})})
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
    """A temporary name that becomes `path` on success and vanishes otherwise.

    Raises:
        OSError: it cannot be written; errors about the temporary name speak of `path`.
    """
    with _new(path, path.parent) as partial:
        yield partial
        os.replace(partial, path)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder` on success and vanishes otherwise.

    Where `folder` exists, its weights are replaced, in sub-folders too, and other files stay.

    Raises:
        OSError: it cannot be written; errors about the temporary name speak of `folder`.
    """
    fresh = not folder.exists()
    with _new(folder, folder.parent if fresh else folder) as partial:
        partial.mkdir()
        yield partial
        if fresh:
            os.replace(partial, folder)
        else:
            _replace_weights(folder, partial)


@contextmanager
def _new(target: Path, home: Path) -> Iterator[Path]:
    """A name within a hidden folder in `home`; the folder vanishes in the end."""
    home.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(target)
    hidden = home / f".{target.name}.partial-{secrets.token_hex(4)}"
    unlocked = hidden.with_name(f"{hidden.name}.new")
    with _speaking_of(target, hidden / "new", unlocked, hidden):
        unlocked.mkdir()
        lock = _lock(unlocked)
        try:
            os.replace(unlocked, hidden)  # under this name others find it, so it is locked first
            yield hidden / "new"
        finally:
            for folder in (hidden, unlocked):
                shutil.rmtree(folder, ignore_errors=True)  # if not now, then by the next process
            if lock is not None:
                lock.release()


def _remove_left_behind(target: Path) -> None:
    """Remove the hidden folders of processes that were killed while they wrote `target`."""
    for home in (target.parent, target):
        for hidden in home.glob(f".{escape(target.name)}.partial-????????"):
            lock = _lock(hidden)
            if lock is not None:
                shutil.rmtree(hidden, ignore_errors=True)
                lock.release()


def _lock(hidden: Path) -> BaseFileLock | None:
    """The lock that says that a hidden folder is in use, until it is released.

    None where another process has it, or where there are no locks, as on some network disks: there
    nobody gets one, so nothing is removed.
    """
    lock = FileLock(hidden / "lock", blocking=False)
    try:
        lock.acquire()
    except (Timeout, OSError, NotImplementedError):  # or the folder is gone, or another user's
        return None
    return lock


@contextmanager
def _speaking_of(target: Path, *hidden: Path) -> Iterator[None]:
    """Put the target's name into errors of the file system, in place of the hidden ones."""

    def plain(text: object) -> str:
        found = str(text)
        for path in hidden:
            found = found.replace(str(path), str(target))
        return found

    try:
        yield
    except OSError as error:
        if plain(error) == str(error):
            raise
        name = None if error.filename is None else plain(error.filename)
        raise OSError(error.errno, plain(error.strerror or error), name) from error


def _replace_weights(folder: Path, new: Path) -> None:
    """Move what is in `new` into `folder`; the weights there that it does not replace are removed.

    That comes last: there is no moment without weights.
    """
    folder.mkdir(exist_ok=True)
    entries = sorted(new.iterdir(), key=lambda entry: (entry.suffix == ".json", entry.name))
    names = {entry.name for entry in entries}
    for entry in entries:  # an index after the files that it names
        if entry.is_dir():
            _replace_weights(folder / entry.name, entry)
        else:
            os.replace(entry, folder / entry.name)
    if "config.json" in names:
        for old in folder.glob(f"{WEIGHTS_NAME}*"):
            if old.name not in names:
                old.unlink(missing_ok=True)


def _places(weights: LazyWeights) -> tuple[dict[str, int], int]:
    """Where each tensor begins, counted from the first, and the bytes of all of them."""
    places, end = {}, 0
    for name in sorted(weights, key=lambda name: -weights[name].dtype.itemsize):
        places[name] = end
        end += weights[name].nbytes
    return places, end


def _header(weights: LazyWeights, places: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    """The length of the header, and the header itself."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
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
    text = json.dumps(content, indent=2) + "\n"
    with _explained(path, len(text)):
        path.write_text(text)


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
