"""What is written of a measurement: JSON, tables in markdown, and a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Report:
    """One measurement.

    Attributes:
        command: "step", "ladder", ...
        subject: what was measured, such as a model and a size; part of the files' name.
        numbers: everything measured, plain values.
        markdown: the same as tables, without a heading.
    """

    command: str
    subject: str
    numbers: Mapping[str, Any]
    markdown: str
    picture: Image.Image


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions that numbers belong to."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "turbodit": _version("turbodit"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def heading(report: Report, found: Mapping[str, Any]) -> str:
    """Two lines that say what was measured where."""
    versions = ", ".join(
        f"{name} {found[name]}" for name in ("torch", "cuda", "triton") if found[name]
    )
    title = ": ".join(word for word in (report.command, report.subject) if word)
    return f"{title}\n{found['device']}, {versions}\n"


def save(report: Report, found: Mapping[str, Any], out: Path) -> list[Path]:
    """Write `<out>/<date>-<device>-<command>-<subject>.json`, `.md` and `.png`; their paths.

    A measurement of the same thing on the same day is replaced.
    """
    out.mkdir(parents=True, exist_ok=True)
    words = (date.today(), found["device"], report.command, report.subject)
    stem = "-".join(str(word).strip() for word in words if word)
    stem = stem.lower().replace(" ", "-").replace("/", "-")
    numbers = {"command": report.command, **found, **report.numbers}
    writers: dict[str, Callable[[Path], Any]] = {
        "json": lambda path: path.write_text(json.dumps(numbers, indent=1) + "\n"),
        "md": lambda path: path.write_text(heading(report, found) + "\n" + report.markdown),
        "png": lambda path: report.picture.save(path, format="PNG"),
    }
    paths = []
    for suffix, write in writers.items():
        path = out / f"{stem}.{suffix}"
        partial = path.with_name(f".{path.name}.partial")
        try:
            write(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        paths.append(path)
    return paths


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table, without an end of line after it; None is an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    cells = (["" if cell is None else str(cell) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def paragraphs(*parts: str) -> str:
    """Parts that are not empty, with a line between them."""
    return "\n\n".join(part for part in parts if part) + "\n"


def not_measured(reasons: Mapping[str, str]) -> str:
    """What is left out, and why, as a list."""
    return "\n".join(f"- not measured: {name}, {why}" for name, why in reasons.items())


def spread(times: Mapping[str, float] | None, digits: int = 2) -> str | None:
    """Minimum, median and maximum of `Times.summary` as one cell."""
    if times is None:
        return None
    return " / ".join(f"{times[name]:.{digits}f}" for name in ("min", "median", "max"))


def line(found: Mapping[str, Any], digits: int = 2) -> str:
    """What was measured, in one line: told at once, for a run that may be cut short."""
    cells = []
    for name, value in found.items():
        if isinstance(value, Mapping) and "median" in value:
            cells.append(f"{name} {spread(value, digits)}")
        elif isinstance(value, (int, float, str)):
            cells.append(f"{name} {value}")
    return ", ".join(cells)


def percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"


def count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
