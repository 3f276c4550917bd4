"""`turbodit merge`: what a training changed, or a LoRA, added to another transformer's weights."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import arg

from turbodit.cli.generate import Switch
from turbodit.cli.report import Bars, short_warnings

if TYPE_CHECKING:
    from turbodit.checkpoints.merge import MergeReport


def _flag(metavar: str, **options: Any) -> Any:
    """A flag whose help says itself what is done without it."""
    return arg(metavar=metavar, help_behavior_hint="", **options)


@dataclass(frozen=True)
class Merge:
    """Add what a training changed to another transformer: base + weight * (target - base before).

    Either --diff-base and --diff-target, or --lora. Paths are a transformer's file or folder, or a
    model's name or folder; none may be quantised.
    """

    base: Annotated[str, _flag("PATH")]
    """What is added to, such as a distilled student."""
    output: Annotated[Path, _flag("PATH", aliases=["-o"])]
    """A .safetensors file with original names, or a folder in diffusers' layout."""
    diff_base: Annotated[str | None, _flag("PATH")] = None
    """What --diff-target was trained from, such as the original model."""
    diff_target: Annotated[str | None, _flag("PATH")] = None
    """What was trained, such as with sparse-linear attention."""
    weight: Annotated[float | None, _flag("X")] = None
    """Of the difference. Default: 1."""
    lora: Annotated[tuple[str, ...], _flag("FILE[:X] [FILE[:X] ...]")] = ()
    """LoRA files, each with its strength, by default 1."""
    report: Annotated[Path | None, _flag("FILE")] = None
    """Where to write what became of every parameter, as JSON."""
    force: Switch = False
    """Replace what is there."""
    json: Switch = False
    """Print the result as JSON."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        """Merge, write, report.

        Raises:
            ValueError, OSError: a mistake of the user's, or a file that cannot be written.
        """
        start = time.perf_counter()
        self._check()
        with short_warnings(), Bars() as bars:
            from turbodit.checkpoints import merge
            from turbodit.checkpoints.write import new_file

            options: dict[str, Any] = {"force": self.force, "progress": bars}
            if self.diff_base is not None and self.diff_target is not None:
                sources = (self.base, self.diff_base, self.diff_target)
                done = merge.merge_difference(*sources, self.output, weight=self._weight, **options)
            else:
                loras = [parse_lora(text) for text in self.lora]
                done = merge.merge_loras(self.base, loras, self.output, **options)
        if self.report is not None:
            content = json.dumps(self._inputs() | asdict(done), indent=2, ensure_ascii=False)
            with new_file(self.report) as partial:
                partial.write_text(content + "\n", encoding="utf-8")
        seconds = time.perf_counter() - start
        if self.json:
            summary = self._inputs() | done.counts() | {"seconds": seconds}
            print(json.dumps(summary, ensure_ascii=False))
        else:
            self._show(done, seconds)

    def _check(self) -> None:
        pair = [self.diff_base, self.diff_target]
        if self.lora and (pair != [None, None] or self.weight is not None):
            raise ValueError(
                "--lora goes without --diff-base, --diff-target and --weight: merge one after the "
                "other, and give a LoRA's strength as FILE:X"
            )
        if not self.lora and None in pair:
            raise ValueError("merge needs --diff-base and --diff-target, or --lora")
        if self.report is not None:
            self._check_report(self.report)

    def _check_report(self, report: Path) -> None:
        """Raise where the report could not be written, or would replace what it is about."""
        if report.is_dir():
            raise IsADirectoryError(f"--report {report} is a folder; expected a file")
        home = next(path for path in report.absolute().parents if path.exists())
        if not home.is_dir() or not os.access(home, os.W_OK):
            raise OSError(f"cannot write --report {report}: {home} is no folder to write to")
        models = [self.base, self.diff_base, self.diff_target, self.output]
        files = [Path(model) for model in models if model is not None]
        files += [file for file, _ in map(parse_lora, self.lora)]
        if report.resolve() in {file.resolve() for file in files}:
            raise ValueError(f"--report {report} is a model of this merge; give another file")

    def _inputs(self) -> dict[str, Any]:
        """The flags that say what was merged."""
        inputs: dict[str, Any] = {"base": self.base, "output": str(self.output)}
        if self.lora:
            return inputs | {"lora": self.lora}
        pair = {"diff_base": self.diff_base, "diff_target": self.diff_target}
        return inputs | pair | {"weight": self._weight}

    @property
    def _weight(self) -> float:
        return 1.0 if self.weight is None else self.weight

    def _show(self, done: MergeReport, seconds: float) -> None:
        """Print how many parameters were merged, copied, kept and missing, and why."""
        table = Table("parameters", "", "why", title=f"{self.output}, {seconds:.1f} s")
        table.add_row("merged", str(len(done.merged)))
        table.add_row("copied", str(len(done.copied)))
        for name, reasons in (("kept", done.kept), ("missing", done.missing)):
            for reason, count in Counter(reasons.values()).items():
                table.add_row(name, str(count), Text(reason))
        Console().print(table)
        print(f'turbodit generate "..." --transformer {self.output}')


def parse_lora(text: str) -> tuple[Path, float]:
    """ "FILE" or "FILE:0.8" -> path and strength. Colons may be the path's own.

    Raises:
        ValueError: no number behind the colon of a file that exists.
    """
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).is_file():
        return Path(text), 1.0
    try:
        return Path(path), float(strength)
    except ValueError:
        if Path(path).is_file():
            raise ValueError(f"the strength of {path} must be a number, got {strength!r}") from None
        return Path(text), 1.0
