"""Quantising a transformer from file to file, a layer at a time.

Neither model is ever in memory as a whole, only what a layer takes while it is quantised: six to
seven times its weight in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from turbodit.checkpoints.rewrite import (
    Progress,
    check_space,
    check_target,
    counter,
    find_transformers,
    place,
    total_bytes,
    write_transformers,
)
from turbodit.checkpoints.transformer import (
    LINEAR_BRANCH,
    Stored,
    empty_transformer,
    open_transformer,
    quantized_weights,
)
from turbodit.device import choose_device
from turbodit.quantization import linear_format
from turbodit.weights import check_fit


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

    Other weights keep the dtype that they have, and what the files say about the model's use
    (`checkpoints.stated`) goes with them. Weights that were quantised in another format
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
            weights, a target that is the source, lies in it or holds it, or is no safetensors
            file, or a single file for two transformers.
        OSError: not enough space on the disk, or it cannot be written.
    """
    format = linear_format(format)
    device = choose_device(device)
    target = Path(target)
    sources = find_transformers(source)
    check_target(target, sources, sources.values(), "quantised", force)
    stored = {name: open_transformer(path, mapped=False) for name, path in sources.items()}
    new = {name: _quantized(stored[name], sources[name], format, device) for name in sources}
    size = sum(total_bytes(model.weights) for model in new.values())
    check_space(target, size)
    count = sum(len(model.weights) for model in new.values())
    write_transformers(target, new, counter("quantize", progress, count))
    return QuantizedFiles(
        transformers=tuple(place(target, name) for name in new),
        format=format,
        bytes_before=sum(total_bytes(model.weights) for model in stored.values()),
        bytes_after=size,
    )


def _quantized(stored: Stored, source: Path, format: str, device: torch.device | str) -> Stored:
    """`stored`, to be quantised when it is read."""
    attention = "sla" if any(LINEAR_BRANCH in name for name in stored.weights) else "sdpa"
    model = empty_transformer(stored.config, stored.format, attention)
    check_fit(model, stored.weights, source)
    if stored.format == format:
        return stored
    weights = quantized_weights(stored.weights, model, source, stored.format, format, device)
    return Stored(stored.config, format, weights, stored.stated)
