"""Prompt embeddings on disk: a prompt that was seen before needs no text encoder.

One safetensors file per prompt, named by a hash of everything that its contents depend on.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

_SAMPLES = 64  # values of each weight that go into a fingerprint


class PromptCache:
    """Embeddings of one encoder in a folder that others may share.

    Args:
        folder: created when the first embedding is stored.
        identity: of the encoder (`fingerprint`) and of all that changes its output.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity

    def path(self, prompt: str) -> Path:
        """Where the embedding of a (cleaned) prompt is kept."""
        key = hashlib.sha256(f"{self.identity}\n{prompt}".encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def load(self, prompt: str) -> torch.Tensor | None:
        """The embedding on the CPU, or None. An unreadable entry warns and counts as none."""
        path = self.path(prompt)
        if not path.exists():
            return None
        try:
            return load(path.read_bytes())["embedding"]
        except (SafetensorError, KeyError) as error:
            warnings.warn(
                f"prompt cache entry {path} is damaged ({error}); encoding the prompt again",
                stacklevel=2,
            )
            return None

    def store(self, prompt: str, embedding: torch.Tensor) -> None:
        """Keep an embedding, all or nothing.

        Raises:
            OSError: it cannot be written, for example for want of space.
        """
        path = self.path(prompt)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(save({"embedding": embedding.cpu().contiguous()}))
            os.replace(partial, path)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write the prompt cache {self.folder}: {error.strerror}"
            ) from error
        finally:
            partial.unlink(missing_ok=True)


def fingerprint(module: nn.Module) -> str:
    """Hash of a module's weights: names, shapes, dtypes and a sample of the values."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        flat = tensor.flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
