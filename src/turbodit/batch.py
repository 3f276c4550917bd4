"""Jobs of the command line: prompt files, where each video goes, what is done already.

A job is one video. No torch here: everything is checked before a model is loaded.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from turbodit.config import ModelConfig
from turbodit.request import GenerationRequest, Settings, resolve
from turbodit.video import check_free, read_sidecar

REQUEST_KEYS = tuple(field.name for field in fields(GenerationRequest))
LINE_KEYS = (*REQUEST_KEYS, "size", "output")
SIZE_KEYS = ("width", "height", "resolution", "aspect_ratio")
SLUG_LENGTH = 40  # characters of the prompt in a file name
BATCH_SEED = 0  # of prompt files without seeds: a random one could not be resumed


@dataclass(frozen=True)
class Order:
    """One line of a prompt file, or the command line itself.

    Attributes:
        request: what is asked for.
        output: where its video goes.
        exact: whether `output` is just what the user asked for; if not, or where there are
            several videos, the seed is added to the name.
        origin: where it was said, for error messages.
    """

    request: GenerationRequest
    output: Path
    exact: bool
    origin: str = ""

    def path(self, seed: int, several: bool) -> Path:
        if self.exact and not several:
            return self.output
        return self.output.with_name(f"{self.output.stem}-{seed}{self.output.suffix}")


@dataclass(frozen=True)
class Job:
    """One video: its settings, its path, and what its sidecar will record of them."""

    settings: Settings
    output: Path
    record: dict[str, Any]

    @property
    def prompt(self) -> str:
        return self.settings.prompts[0]

    @property
    def seed(self) -> int:
        return self.settings.seeds[0]

    def is_done(self) -> bool:
        """Whether `output` holds a video of this prompt, seed and record."""
        wanted = {"prompt": self.prompt, "seed": self.seed, "settings": self.record}
        same = _plain(wanted).items() <= read_sidecar(self.output).items()
        return same and self.output.exists()


def parse_size(text: str) -> tuple[int, int]:
    """ "832*480" or "832x480" -> (width, height) in pixels.

    Raises:
        ValueError: neither of them.
    """
    match = re.fullmatch(r"(-?\d+)\s*[*x×]\s*(-?\d+)", text.strip().lower())
    if not match:
        raise ValueError(f"size must be width*height, such as 832*480, got {text!r}")
    return int(match[1]), int(match[2])


def single_order(options: dict[str, Any], output: Path | None) -> Order:
    """The one order of a command line without a prompt file.

    Args:
        options: fields of GenerationRequest.
        output: by default the prompt's first words in the folder `outputs`.
    """
    request = GenerationRequest(**options)
    if output is not None:
        return Order(request, output, exact=True)
    return Order(request, Path("outputs") / f"{slug(options['prompt'])}.mp4", exact=False)


def read_prompt_file(path: Path, options: dict[str, Any], folder: Path | None) -> list[Order]:
    """Orders of a prompt file: `.txt`, a prompt a line, or `.jsonl`, an object a line.

    Blank lines and lines that start with # are skipped. The keys of an object are the
    fields of GenerationRequest, `size` ("832*480") and `output` (relative to `folder`).

    Args:
        options: fields of GenerationRequest for what a line leaves open.
        folder: where videos without an `output` go; by default `outputs/<file's name>`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, an empty file, or a bad line (its number is said).
    """
    readers = {".txt": lambda line: {"prompt": line}, ".jsonl": _read_object}
    if path.suffix not in readers:
        raise ValueError(f"prompt file {path} must end in {' or '.join(readers)}")
    if not path.is_file():
        raise FileNotFoundError(f"prompt file not found: {path}")
    folder = folder or Path("outputs") / path.stem
    defaults = {"seed": BATCH_SEED} | options
    orders = []
    for number, line in _lines(path):
        origin = f"{path} line {number}: "
        try:
            values = readers[path.suffix](line)
        except ValueError as error:
            raise ValueError(f"{origin}{error}") from error
        exact = "output" in values
        output = folder / values.pop("output", f"{number:03d}-{slug(values['prompt'])}.mp4")
        request = GenerationRequest(**_merge(defaults, values))
        orders.append(Order(request, output, exact, origin))
    if not orders:
        raise ValueError(f"prompt file {path} has no prompts")
    return orders


def plan(orders: Sequence[Order], model: ModelConfig, record: dict[str, Any]) -> list[Job]:
    """A job for every video of the orders, all checked.

    Args:
        record: what decides a video besides its settings (weights, dtype, ...).

    Raises:
        ValueError: a request is impossible, or two videos would go to one path.
    """
    jobs = [job for order in orders for job in _jobs(order, model, record)]
    counts = Counter(job.output for job in jobs)
    twice = [str(path) for path, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"several videos would be written to {', '.join(twice)}")
    return jobs


def pending(jobs: Sequence[Job], *, resume: bool, force: bool) -> list[Job]:
    """The jobs still to do, all of which may write their output.

    Args:
        resume: leave out what is done already; without it, nothing is.
        force: outputs may be replaced.

    Raises:
        FileExistsError: an output exists and may not be replaced.
    """
    left = [job for job in jobs if not (resume and job.is_done())]
    for job in left:
        check_free(job.output, force)
    return left


def slug(prompt: str) -> str:
    """The first words of a prompt as a file name; "video" if it has none."""
    words = re.findall(r"\w+", prompt.lower()[: 2 * SLUG_LENGTH])
    return "-".join(words)[:SLUG_LENGTH].strip("-_") or "video"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8: {error}") from error
    for number, line in enumerate(content.splitlines(), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, text


def _read_object(line: str) -> dict[str, Any]:
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {line[:40]!r}")
    unknown = sorted(values.keys() - set(LINE_KEYS))
    if unknown:
        raise ValueError(f"unknown keys: {', '.join(unknown)}; supported: {', '.join(LINE_KEYS)}")
    for key in ("prompt", "output"):
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"{key} must be text, got {values[key]!r}")
    if "prompt" not in values:
        raise ValueError("there is no prompt")
    if "size" in values:
        values["width"], values["height"] = parse_size(str(values.pop("size")))
    return values


def _merge(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` over `defaults`; a line that says anything about size says all of it."""
    if any(key in values for key in SIZE_KEYS):
        defaults = {key: value for key, value in defaults.items() if key not in SIZE_KEYS}
    return defaults | values


def _jobs(order: Order, model: ModelConfig, record: dict[str, Any]) -> Iterator[Job]:
    try:
        settings = resolve(order.request, model)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{order.origin}{error}") from error
    images = {
        name: str(getattr(order.request, name))
        for name in ("image", "last_image")
        if getattr(order.request, name) is not None
    }
    record = record | {"model": model.name} | settings.summary() | images
    for prompt, seed in zip(settings.prompts, settings.seeds, strict=True):
        output = order.path(seed, several=len(settings.seeds) > 1)
        yield Job(replace(settings, prompts=(prompt,), seeds=(seed,)), output, record)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give them back: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
