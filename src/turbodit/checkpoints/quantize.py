"""Quantising a transformer from file to file, a layer at a time.

Neither model is ever in memory as a whole, only what a layer takes while it is quantised: six to
seven times its weight in 16 bits.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from turbodit.checkpoints.folder import HIGH_NOISE, LOW_NOISE, ModelFolder, find_model
from turbodit.checkpoints.transformer import (
    LINEAR_BRANCH,
    Stored,
    config_json,
    empty_transformer,
    open_transformer,
    quantized_weights,
    write_transformer,
)
from turbodit.checkpoints.write import new_file, new_folder, write_file
from turbodit.device import choose_device
from turbodit.quantization import linear_format
from turbodit.weights import PICKLE_SUFFIXES, LazyWeights, check_fit

Progress = Callable[[str, int, int], None]  # (stage, done, total), as `pipeline` reports
HEADERS = 2**20  # bytes that a file has besides its tensors, at most


@dataclass(frozen=True)
class QuantizedFiles:
    """What was written: a file or folder for each transformer, and bytes of all their weights."""

    transformers: tuple[Path, ...]
    format: str
    bytes_before: int
    bytes_after: int


def quantize_file(
    source: Path | str,
    target: Path | str,
    format: str,
    *,
    device: torch.device | str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizedFiles:
    """Write the transformer at `source` with 8-bit linear layers to `target`.

    Other weights keep the dtype that they have. Weights that were quantised in another format
    are rounded twice; those already in `format` are copied.

    Args:
        source: whatever `load_transformer` takes; or a model by name or folder, of which the
            transformers are quantised and nothing else is written.
        target: a `.safetensors` file, which gets original names (for "int8-block" those of
            TurboDiffusion's files); or a folder, which gets diffusers' layout. The
            transformers of a model folder keep their sub-folders.
        format: as for `turbodit.quantization.linear_format`.
        device: where weights are quantised.
        force: replace the file, or the weights in the folder.
        progress: told of every tensor that is written, as (stage, done, total).

    Raises:
        FileNotFoundError: nothing at `source`, or a part of it is missing.
        FileExistsError: `target` is there, and not to be replaced.
        ValueError: unknown format or device, a source that does not load, NaN or infinite
            weights, a target that is the source or no safetensors file, or a single file
            for two transformers.
        OSError: not enough space on the disk, or it cannot be written.
    """
    format = linear_format(format)
    device = choose_device(device)
    target = Path(target)
    sources = _transformers(source)
    _check_target(target, sources, force)
    stored = {name: open_transformer(path, mapped=False) for name, path in sources.items()}
    new = {name: _quantized(stored[name], sources[name], format, device) for name in sources}
    size = sum(_size(model.weights) for model in new.values())
    _check_space(target, size)
    _write(target, new, _counter(progress, sum(len(model.weights) for model in new.values())))
    return QuantizedFiles(
        transformers=tuple(_part(target, name) for name in new),
        format=format,
        bytes_before=sum(_size(model.weights) for model in stored.values()),
        bytes_after=size,
    )


def _transformers(source: Path | str) -> dict[str, Path]:
    """Files and folders of transformers, by sub-folder; "" for one that stands alone."""
    path = Path(source).expanduser()
    if not path.exists() and path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        path = find_model(source).path
    marks = ("model_index.json", HIGH_NOISE, LOW_NOISE)
    if any((path / mark).exists() for mark in marks):
        return {part.name: part for part in ModelFolder(path).transformers}
    return {"": path}


def _quantized(stored: Stored, source: Path, format: str, device: torch.device | str) -> Stored:
    """`stored`, to be quantised when it is read."""
    attention = "sla" if any(LINEAR_BRANCH in name for name in stored.weights) else "sdpa"
    model = empty_transformer(stored.config, stored.format, attention)
    check_fit(model, stored.weights, source)
    if stored.format == format:
        return stored
    weights = quantized_weights(stored.weights, model, source, stored.format, format, device)
    return Stored(stored.config, format, weights)


def _write(target: Path, models: dict[str, Stored], advance: Callable[[], None]) -> None:
    if _is_file(target):
        (model,) = models.values()
        with new_file(target) as partial:
            config = config_json(model.config, model.format)
            write_file(partial, model.weights, config, advance)
        return
    with new_folder(target) as partial:
        for name, model in models.items():
            (partial / name).mkdir(exist_ok=True)
            write_transformer(partial / name, model, advance=advance)


def _check_target(target: Path, sources: dict[str, Path], force: bool) -> None:
    """Refuse a target that cannot be written, or must not be, before anything is read."""
    if target.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{target}: a quantised model is a .safetensors file or a folder")
    if _is_file(target) and len(sources) > 1:
        raise ValueError(
            f"{target} is one file, but there are {len(sources)} transformers "
            f"({', '.join(sources)}); give a folder"
        )
    if any(_part(target, name).resolve() == path.resolve() for name, path in sources.items()):
        raise ValueError(f"{target} is what is to be quantised; give another output")
    if not target.exists():
        return
    if target.is_dir() == _is_file(target):
        kind = "folder" if target.is_dir() else "file"
        raise FileExistsError(f"{target} is a {kind}; refusing to replace it")
    if not force and (_is_file(target) or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; --force (force=True) replaces it")


def _check_space(target: Path, size: int) -> None:
    home = next(path for path in (target, *target.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(home).free
    if free < size + HEADERS:
        raise OSError(
            errno.ENOSPC, f"{target} needs {size + HEADERS:,} bytes, but {free:,} bytes are free"
        )


def _part(target: Path, name: str) -> Path:
    """Where the transformer called `name` is written."""
    return target if _is_file(target) else target / name


def _is_file(target: Path) -> bool:
    return target.suffix == ".safetensors"


def _size(weights: LazyWeights) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """A function that reports one more tensor at each call."""
    if progress is None:
        return lambda: None
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("quantize", done, total)

    progress("quantize", 0, total)
    return advance
