"""`turbodit quantize`: a transformer with 8-bit linear layers, from file to file."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from turbodit.cli.generate import Switch
from turbodit.cli.report import Bars, short_warnings


@dataclass
class Summary:
    """What `quantize` did; its fields are the keys of `--json`."""

    transformers: list[str]
    format: str
    bytes_before: int
    bytes_after: int
    seconds: float

    def show(self, model: str) -> None:
        """Print sizes, format and time, and how to use what was written."""
        table = Table(show_header=False)
        for key, value in self._rows().items():
            table.add_row(key, value)
        Console().print(table)
        flags = " ".join(f"--transformer {path}" for path in self.transformers)
        print(f'turbodit generate "..." --model {model} {flags}')

    def _rows(self) -> dict[str, Text]:
        return {
            "format": Text(self.format),
            "before": Text(f"{self.bytes_before / 1e9:.3f} GB"),
            "after": Text(f"{self.bytes_after / 1e9:.3f} GB"),
            "time": Text(f"{self.seconds:.1f} s"),
        }


@dataclass(frozen=True)
class Quantize:
    """Write a transformer with 8-bit linear layers, for `generate --transformer`."""

    input: Annotated[Positional[str], arg(metavar="INPUT", help_behavior_hint="")]
    """A transformer's file or folder; or a model's name or folder, for all its transformers."""
    output: Annotated[Positional[Path], arg(metavar="OUTPUT", help_behavior_hint="")]
    """A .safetensors file with original names, or a folder in diffusers' layout."""
    linear: Annotated[
        Literal["int8-block", "int8-channel", "fp8"], arg(metavar="FORMAT", help_behavior_hint="")
    ]
    """int8-block, int8-channel or fp8."""
    device: Annotated[str, arg(metavar="NAME", help_behavior_hint="")] = "cpu"
    """Where weights are quantised: cpu, cuda, cuda:1. Default: cpu."""
    force: Switch = False
    """Replace what is there."""
    json: Switch = False
    """Print the result as JSON."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        """Quantise, write, report.

        Raises:
            ValueError, OSError: a mistake of the user's, or a file that cannot be written.
        """
        start = time.perf_counter()
        with short_warnings(), Bars() as bars:
            from turbodit.checkpoints import quantize_file

            written = quantize_file(
                self.input,
                self.output,
                self.linear,
                device=self.device,
                force=self.force,
                progress=bars,
            )
        details: dict[str, Any] = asdict(written)
        details["transformers"] = [str(path) for path in written.transformers]
        summary = Summary(**details, seconds=time.perf_counter() - start)
        if self.json:
            print(json.dumps(asdict(summary), ensure_ascii=False))
        else:
            summary.show(self.input)
