"""Reads the metadata of a distributed checkpoint as data: other pickles are refused."""

from __future__ import annotations

import pathlib
import pickle
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

# Classes of what a checkpoint is made of, and the one function that makes memory layouts.
OWN = "torch.distributed.checkpoint."
OTHERS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "Path")),
    # Where newer versions of Python keep them.
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "Path")),
}


class CheckpointReader(dcp.FileSystemReader):
    """A FileSystemReader whose metadata, which torch unpickles, cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds.

        Raises:
            UnpicklingError: the file is damaged, or names anything but parts of a checkpoint.
            OSError: it cannot be read.
        """
        with (pathlib.Path(self.path) / ".metadata").open("rb") as file:
            _Unpickler(file).load()
        return super().read_metadata(*args, **kwargs)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in OTHERS:
            return super().find_class(module, name)
        if (module == "torch" or module.startswith(OWN)) and "." not in name:
            found = super().find_class(module, name)
            is_part = isinstance(found, type) and found.__module__ == module
            if isinstance(found, torch.dtype) or (module != "torch" and is_part):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")
