"""Reading weight files and filling modules with them: lazily, strictly, without running code.

A file is a mapping from names to tensors that stay on disk until they are used, so a
model never exists twice in memory. Every parameter of a module is filled or an error lists
what is missing, left over or of another shape.

Most readers map files into memory. Linux counts such a mapping as if all of it were to be
changed, and refuses one that is larger than the machine's memory; `lazy_weights` can also
read tensor after tensor, which works for files of any size.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Weights = Mapping[str, torch.Tensor]

DTYPES = {  # by their names in safetensors files
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model")
LISTED = 10  # names that an error spells out before it only counts


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read, or computed, whenever it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


LazyWeights = Mapping[str, LazyTensor]


def read_weights(path: Path) -> Weights:
    """Tensors by name, read when accessed.

    Args:
        path: a `.safetensors` file; a PyTorch file (`.pth`, `.pt`, `.bin`, `.ckpt`), read as
            data only, perhaps with its state dict under `state_dict` or `model`; or a folder
            with one safetensors file or several and their index.

    Raises:
        FileNotFoundError: no such file, no weights in the folder, a shard is missing.
        ValueError: truncated or unknown file, or one whose pickle holds more than tensors.
    """
    files = _weight_files(path)
    if files[0].suffix in PICKLE_SUFFIXES:
        is_zip = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are not: cannot be mapped
        return _load_pickle(path, map_location="cpu", mmap=is_zip)
    return _SafetensorsWeights(files)


def lazy_weights(path: Path, *, mapped: bool = True) -> LazyWeights:
    """What `read_weights` reads, with shapes and dtypes that are known beforehand.

    Args:
        mapped: map the files; otherwise a tensor is read anew each time, into memory of its
            own.

    Raises: as `read_weights`.
    """
    files = _weight_files(path)
    if not mapped and files[0].suffix == ".safetensors":
        return {name: tensor for file in files for name, tensor in _tensors_in(file).items()}
    if not mapped and zipfile.is_zipfile(path):
        placed = {
            name: _placed_tensor(path, tensor)
            for name, tensor in _load_pickle(path, map_location="meta").items()
        }
        if all(tensor is not None for tensor in placed.values()):
            return {name: tensor for name, tensor in placed.items() if tensor is not None}
    return {name: LazyTensor.of(tensor) for name, tensor in read_weights(path).items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty where it has none.

    Raises:
        ValueError: truncated file.
    """
    return _read_header(path)[0].get("__metadata__", {})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON object in it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is truncated or no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


class _SafetensorsWeights(Mapping[str, torch.Tensor]):
    """Tensors of several safetensors files, mapped into memory."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file: name -> dtype, shape, offsets; and where data begins."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content = file.read(length) if 0 < length <= size - 8 else b""
    try:
        header = json.loads(content)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    if 8 + length + max(ends, default=0) != size:
        raise ValueError(f"{path} is truncated: {size:,} bytes are not what its header says")
    return header, 8 + length


def _tensors_in(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, which is read without mapping it."""
    header, start = _read_header(path)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} in {path} has the unknown dtype {entry['dtype']}")
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        read = partial(_read_at, path, start + entry["data_offsets"][0], shape, dtype)
        tensors[name] = LazyTensor(shape, dtype, read)
    return tensors


def _placed_tensor(path: Path, tensor: torch.Tensor) -> LazyTensor | None:
    """The tensor in a PyTorch file that was loaded as `tensor`, on the meta device.

    None where this version of PyTorch does not tell its place.
    """
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        return None
    start = offset + tensor.storage_offset() * tensor.dtype.itemsize
    shape = tuple(tensor.shape)
    read = partial(_read_at, path, start, shape, tensor.dtype, tensor.stride())
    return LazyTensor(shape, tensor.dtype, read)


def _read_at(
    path: Path,
    start: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """A tensor whose elements lie in `path` from byte `start` on."""
    if strides is None or 0 in shape:
        count = math.prod(shape)
    else:  # as far as its last element
        count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    data = torch.empty(count, dtype=dtype)
    with path.open("rb") as file:
        file.seek(start)
        read = file.readinto(data.view(torch.uint8).numpy().data) if count else 0
    if read != data.nbytes:
        raise ValueError(f"{path} is truncated: a tensor goes on past its end")
    return data.view(shape) if strides is None else data.as_strided(shape, strides)


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights at `path`, several only if they are safetensors."""
    if path.is_dir():
        return _files_in(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        supported = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise ValueError(f"{path} has the suffix {path.suffix!r}; supported: {supported}")
    return [path]


def _files_in(folder: Path) -> list[Path]:
    """The safetensors files that make up `folder`'s weights."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return files
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"expected one .safetensors file or a .safetensors.index.json in {folder}, "
            f"found: {found}"
        )
    index = read_json(indices[0])
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{indices[0]} has no weight_map (from names to files)")
    shards = sorted(set(index["weight_map"].values()))
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise FileNotFoundError(
            f"{indices[0]} names {len(shards)} files, of which {listing(missing)} are missing"
        )
    return [folder / shard for shard in shards]


def _load_pickle(path: Path, **options: Any) -> Weights:
    """The state dict in a PyTorch file, loaded as `options` of torch.load say."""
    try:
        content = torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is truncated or holds pickled objects other than tensors, which could run "
            f"code when loaded; such files are refused"
        ) from error
    except (EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or no PyTorch file: {error}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{path} holds no state dict (a mapping from names to tensors)")
    return content


def check_fit(module: nn.Module, weights: Weights | LazyWeights, source: Path) -> None:
    """Raise a ValueError unless `weights` have the names and shapes of all of `module`'s."""
    expected = module.state_dict()
    shared = expected.keys() & weights.keys()
    require_fit(
        source,
        type(module).__name__,
        missing=expected.keys() - shared,
        unexpected=weights.keys() - shared,
        reshaped={
            name: (tuple(weights[name].shape), tuple(expected[name].shape))
            for name in shared
            if weights[name].shape != expected[name].shape
        },
    )


def assign_weights(
    module: nn.Module,
    weights: Weights | LazyWeights,
    source: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_float32: Callable[[str], bool] | None = None,
) -> None:
    """Make `weights` the parameters and buffers of `module`, which was built on the meta device.

    Args:
        source: where the weights come from, for errors.
        dtype: what floating-point weights are cast to; None keeps the file's. 8-bit weights
            of the module are never cast.
        keep_float32: names cast to float32 instead.

    Raises:
        ValueError: missing or unexpected names, other shapes.
    """
    check_fit(module, weights, source)
    expected = module.state_dict()

    def cast(name: str) -> torch.Tensor:
        stored = weights[name]
        tensor = stored.read() if isinstance(stored, LazyTensor) else stored
        if dtype is None or not tensor.is_floating_point() or expected[name].dtype.itemsize == 1:
            return tensor.to(device)
        return tensor.to(device, torch.float32 if keep_float32 and keep_float32(name) else dtype)

    module.load_state_dict({name: cast(name) for name in expected}, assign=True)


def load_transformers_model(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    weights: Weights,
    source: Path,
    dtype: torch.dtype,
) -> Any:
    """A transformers model with `weights`, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: `source` is a folder without a config.json.
        ValueError: missing or unexpected names, other shapes.
    """
    from transformers.utils import logging

    if source.is_dir() and not (source / "config.json").exists():
        # transformers makes a configuration of its defaults where there is none.
        raise FileNotFoundError(f"no config.json in {source}")
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what does not fit is raised below
    logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
    require_fit(
        source,
        model_class.__name__,
        missing=info["missing_keys"],
        unexpected=info["unexpected_keys"],
        reshaped={name: (tuple(got), tuple(want)) for name, got, want in info["mismatched_keys"]},
    )
    return model.eval()


def require_fit(
    source: Path,
    target: str,
    *,
    missing: set[str],
    unexpected: set[str],
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise a ValueError that lists what keeps the weights in `source` from filling `target`.

    Args:
        reshaped: name -> (shape in the file, shape in the model).
    """
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {listing(sorted(missing))}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {listing(sorted(unexpected))}")
    if reshaped:
        shapes = [
            f"{name} {got}, expected {want}" for name, (got, want) in sorted(reshaped.items())
        ]
        problems.append(f"{len(reshaped)} of another shape: {listing(shapes)}")
    if problems:
        raise ValueError(f"the weights in {source} do not fit {target}: {'; '.join(problems)}")


def listing(names: list[str]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
