"""What commands share that make transformers' files of others': where from, where to, whether
there is room, how far they are, and writing."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from turbodit.checkpoints.folder import HIGH_NOISE, LOW_NOISE, ModelFolder, find_model
from turbodit.checkpoints.transformer import Stored, config_json, write_transformer
from turbodit.checkpoints.write import Advance, new_file, new_folder, write_file
from turbodit.weights import PICKLE_SUFFIXES, LazyWeights

Progress = Callable[[str, int, int], None]  # (stage, done, total), as `pipeline` reports
HEADERS = 2**20  # bytes that a file has besides its tensors, at most


def find_transformers(source: Path | str) -> dict[str, Path]:
    """Files and folders of transformers, by sub-folder; "" for one that stands alone.

    Args:
        source: a transformer's file or folder; or a model by name or folder.

    Raises:
        FileNotFoundError: no model of that name, or a part of it is missing.
    """
    folder = ModelFolder(Path(source).expanduser())
    if not folder.path.exists() and folder.path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        folder = find_model(source)
    marks = ("model_index.json", HIGH_NOISE, LOW_NOISE)
    if any((folder.path / mark).exists() for mark in marks):
        return {part.name: part for part in folder.transformers}
    return {"": folder.path}


def check_target(
    target: Path, names: Collection[str], sources: Iterable[Path], done: str, force: bool
) -> None:
    """Refuse a target that cannot be written, or must not be, before anything is read.

    Args:
        names: of the transformers that will be written, as in `find_transformers`.
        sources: what they are made of.
        done: what happens to them, for errors: "quantised", "merged".
        force: what is there may be replaced.

    Raises:
        FileExistsError: it is there, and not to be replaced.
        ValueError: it is a source, lies in one or holds one; it is no safetensors file, or one
            file for several transformers.
    """
    if target.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{target}: a {done} model is a .safetensors file or a folder")
    if is_file(target) and len(names) > 1:
        raise ValueError(
            f"{target} is one file, but there are {len(names)} transformers "
            f"({', '.join(names)}); give a folder"
        )
    for source in sources:
        for part in (place(target, name) for name in names):
            _check_apart(part, source, done)
    if not target.exists():
        return
    if target.is_dir() == is_file(target):
        kind = "folder" if target.is_dir() else "file"
        raise FileExistsError(f"{target} is a {kind}; refusing to replace it")
    if not force and (is_file(target) or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; --force (force=True) replaces it")


def _check_apart(part: Path, source: Path, done: str) -> None:
    """Raise a ValueError where writing `part`, a file or a folder, would change `source`.

    A file's name and the file that it links to both count.
    """
    another = f"which is to be {done}; give another output"
    if part.resolve() == source.resolve():
        raise ValueError(f"{part} is what is to be {done}; give another output")
    files = [path for path in source.iterdir() if path.is_file()] if source.is_dir() else [source]
    if is_file(part):
        if _names(part) & {name for file in files for name in _names(file)}:
            raise ValueError(f"{part} is a file of {source}, {another}")
        if source.is_dir() and source.resolve() in _homes(part):
            raise ValueError(f"{part} lies in {source}, {another}")
        return
    within = [file for file in files if part.resolve() in _homes(file)]
    if within:
        raise ValueError(f"{part} holds {within[0]}, {another}")


def _names(file: Path) -> set[Path]:
    """The absolute paths of a file and, if it is a link, of what it links to."""
    return {file.parent.resolve() / file.name, file.resolve()}


def _homes(file: Path) -> set[Path]:
    return {name.parent for name in _names(file)}


def check_space(target: Path, size: int) -> None:
    """Raise an OSError where `size` bytes of tensors do not fit the disk of `target`."""
    home = next(path for path in (target, *target.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(home).free
    if free < size + HEADERS:
        raise OSError(
            errno.ENOSPC, f"{target} needs {size + HEADERS:,} bytes, but {free:,} bytes are free"
        )


def place(target: Path, name: str) -> Path:
    """Where the transformer called `name` is written."""
    return target if is_file(target) else target / name


def is_file(target: Path) -> bool:
    """Whether a target is one file, by its name."""
    return target.suffix == ".safetensors"


def total_bytes(weights: LazyWeights) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def counter(stage: str, progress: Progress | None, total: int) -> Advance:
    """A function that reports one more tensor at each call."""
    if progress is None:
        return lambda: None
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(stage, done, total)

    progress(stage, 0, total)
    return advance


def write_transformers(target: Path, models: Mapping[str, Stored], advance: Advance) -> None:
    """Write transformers, by sub-folder, to `target`: a file with original names, or a folder in
    diffusers' layout.

    Raises:
        OSError: they cannot be written.
    """
    if is_file(target):
        (model,) = models.values()
        with new_file(target) as partial:
            config = config_json(model.config, model.format, model.stated)
            write_file(partial, model.weights, config, advance)
        return
    with new_folder(target) as partial:
        for name, model in models.items():
            (partial / name).mkdir(exist_ok=True)
            write_transformer(partial / name, model, advance=advance)
