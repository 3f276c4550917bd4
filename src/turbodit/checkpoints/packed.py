"""Weights packed with xz, and the cache where they are unpacked, once for each content.

A packed folder is one in diffusers' layout with `<name>.safetensors.xz` in the place of
`<name>.safetensors`; `xz -d` turns it back. Nothing is lost: trained bfloat16 weights hold about
11 bits each, as their exponents are much alike.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import constants

from turbodit.checkpoints.write import new_file

SUFFIX = ".xz"
PACKED = f"*.safetensors{SUFFIX}"
DIGITS = 16  # of a content's hash, in the cache


def pack(folder: Path) -> None:
    """Replace the safetensors in `folder` by packed ones; the same content gives the same bytes.

    Raises:
        OSError: a file cannot be read or written; those before it are packed.
    """
    import lzma  # not in every build of Python

    # Numbers are two bytes wide: literals are told apart by their position in a pair (lp), and
    # matches begin at pairs (pb).
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1}]
    for file in sorted(folder.glob("*.safetensors")):
        with new_file(file.with_name(file.name + SUFFIX)) as partial:
            partial.write_bytes(lzma.compress(file.read_bytes(), filters=filters))
        file.unlink()


def unpacked(folder: Path) -> Path:
    """`folder` itself, or if its weights are packed, the same folder unpacked in the user's cache.

    The cache is where huggingface_hub has libraries keep theirs, `~/.cache/huggingface/assets`
    unless the user has set another; a content that is there already is not unpacked again.

    Args:
        folder: of weights; a file, or a path where nothing is, is returned as it is.

    Raises:
        ValueError: a packed file is truncated or damaged.
        OSError: the cache cannot be written.
    """
    if not any(folder.glob(PACKED)):
        return folder
    files = sorted(path for path in folder.iterdir() if path.is_file())
    cache = Path(constants.HF_ASSETS_CACHE).expanduser() / "turbodit" / "unpacked"
    home = cache / _digest(folder.name, files)
    if not home.exists():
        try:
            _unpack(files, home, folder.name)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot unpack {folder} into {cache}: {error.strerror}; make that folder "
                "writable, with space for the weights, or set HF_ASSETS_CACHE to another one",
            ) from error
    return home / folder.name


def _digest(name: str, files: list[Path]) -> str:
    """What tells a folder of this name and content from others, short enough for a name."""
    digest = hashlib.sha256(f"{name}\n".encode())
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:DIGITS]


def _unpack(files: list[Path], home: Path, name: str) -> None:
    """Write `files`, unpacked, to the sub-folder `name` of a new folder `home`, all or nothing."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=home.parent, prefix=f".{home.name}.partial-") as temporary:
        partial = Path(temporary) / "new"  # with the usual permissions, which `temporary` has not
        target = partial / name
        target.mkdir(parents=True)
        for file in files:
            if file.suffix == SUFFIX:
                _decompress(file, target / file.stem)
            else:
                shutil.copyfile(file, target / file.name)
        try:
            os.rename(partial, home)
        except OSError:
            if not home.is_dir():  # else another process was faster, with the same content
                raise


def _decompress(file: Path, target: Path) -> None:
    import lzma

    try:
        with lzma.open(file) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except (EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error
