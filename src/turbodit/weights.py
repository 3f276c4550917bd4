"""Reading weight files and filling modules with them: lazily, strictly, without running code.

A file is a mapping from names to tensors that stay on disk until they are used, so a
model never exists twice in memory. Every parameter of a module is filled or an error lists
what is missing, left over or of another shape.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Weights = Mapping[str, torch.Tensor]

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model")
LISTED = 10  # names that an error spells out before it only counts


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
    if path.is_dir():
        return _SafetensorsWeights(_weight_files(path))
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        return _SafetensorsWeights([path])
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    supported = ", ".join((".safetensors", *PICKLE_SUFFIXES))
    raise ValueError(f"{path} has the suffix {path.suffix!r}; supported: {supported}")


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


def _weight_files(folder: Path) -> list[Path]:
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


def _read_pickle(path: Path) -> Weights:
    is_zip = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are not, and cannot be mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
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


def assign_weights(
    module: nn.Module,
    weights: Weights,
    source: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_float32: Callable[[str], bool] | None = None,
) -> None:
    """Make `weights` the parameters of `module`, which was built on the meta device.

    Args:
        source: where the weights come from, for errors.
        dtype: what floating-point weights are cast to; None keeps the file's.
        keep_float32: names cast to float32 instead.

    Raises:
        ValueError: missing or unexpected names, other shapes.
    """
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

    def cast(name: str) -> torch.Tensor:
        tensor = weights[name]
        if dtype is None or not tensor.is_floating_point():
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
