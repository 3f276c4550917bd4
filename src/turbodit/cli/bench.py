"""`turbodit bench`: flags of the measurements, and where their results go."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg, subcommand

from turbodit.cli.generate import Switch
from turbodit.config import Solver

if TYPE_CHECKING:
    import torch

    from turbodit.benchmark.report import Report
    from turbodit.benchmark.workload import Workload

SMALL, LARGE = "spritewan", "Wan2.1-T2V-1.3B"  # what is measured on a CPU and on a GPU
Format = Literal["int8-block", "int8-channel", "fp8"]


def _flag(metavar: str) -> Any:
    """A flag whose help says itself what is done without it."""
    return arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class Measurement(ABC):
    """What all measurements have in common."""

    model: Annotated[str | None, _flag("NAME")] = None
    """Preset, with random weights: Wan2.1-T2V-1.3B (the default on a GPU), spritewan (on a CPU)."""
    size: Annotated[str | None, _flag("W*H")] = None
    """Width and height in pixels, such as 832*480; by default the model's own."""
    frames: Annotated[int | None, _flag("N")] = None
    """Number of frames, 4k+1; by default the model's own."""
    device: Annotated[str | None, _flag("NAME")] = None
    """cpu, cuda, cuda:1; by default a GPU if there is one."""
    repeats: Annotated[int | None, _flag("N")] = None
    """Measured calls of each kind, after those that warm up."""
    out: Annotated[Path, _flag("FOLDER")] = Path("bench-results")
    """Where .json, .md and .png go, named by date, device and what was measured."""
    json: Switch = False
    """Print the numbers as JSON, not as tables."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        """Measure, write and print.

        Raises:
            ValueError, OSError: a mistake of the user's, or a file that cannot be written.
        """
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"repeats must be positive, got {self.repeats}")
        from turbodit.benchmark.report import environment, heading, save
        from turbodit.cli.report import short_warnings

        device = self._device()
        found = environment(device)
        with short_warnings():
            report = self._measure(device)
        paths = save(report, found, self.out)
        if self.json:
            print(json.dumps({"command": report.command, **found, **report.numbers}))
        else:
            print(f"{heading(report, found)}\n{report.markdown}")
        _tell(f"written: {', '.join(map(str, paths))}")

    @abstractmethod
    def _measure(self, device: torch.device) -> Report:
        """What this command measures."""

    def _device(self) -> torch.device:
        import torch

        from turbodit.device import choose_device

        device = choose_device(self.device)
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
        return device

    def _workload(self, device: torch.device) -> Workload:
        from turbodit.batch import parse_size
        from turbodit.benchmark.workload import Workload

        name = self.model or (LARGE if device.type == "cuda" else SMALL)
        size = None if self.size is None else parse_size(self.size)
        return Workload.of(name, size, self.frames)

    def _repeats(self, defaults: dict[str, int], device: torch.device) -> int:
        return defaults[device.type] if self.repeats is None else self.repeats


@dataclass(frozen=True)
class Step(Measurement):
    """One forward pass of the transformer in every way it can be computed: time, memory, error."""

    modes: Annotated[tuple[str, ...], _flag("MODE [MODE ...]")] = ()
    """Some of: diffusers dense bf16-residual fp8 int8-channel int8-block sagesla sagesla-fp8
    sagesla-int8-channel sagesla-int8-block. By default all that suit the device."""
    no_graph: Switch = False
    """On a GPU: not as a CUDA graph too."""
    no_profile: Switch = False
    """On a GPU: do not find out which kernels a step runs (two more steps of each mode)."""

    def _measure(self, device: torch.device) -> Report:
        from turbodit.benchmark import step

        options = step.Options(
            self._repeats(step.REPEATS, device), not self.no_graph, not self.no_profile
        )
        return step.report(self._workload(device), device, self.modes, options, _tell)


@dataclass(frozen=True)
class Ladder(Measurement):
    """Seconds of a video from the original to SageSLA: 8 bits, few steps, sparse attention."""

    linear: Annotated[Format | None, _flag("FORMAT")] = None
    """8 bits for the linear layers: int8-block, int8-channel or fp8 (the default where it runs)."""
    no_graph: Switch = False
    """On a GPU: launch our kernels one by one, not as a CUDA graph."""
    no_vae: Switch = False
    """Leave out the VAE."""

    def _measure(self, device: torch.device) -> Report:
        from turbodit.benchmark import ladder
        from turbodit.benchmark.modes import chosen_format

        options = ladder.Options(
            self._repeats(ladder.REPEATS, device),
            chosen_format(self.linear, device),
            graph=not self.no_graph,
            vae=not self.no_vae,
        )
        return ladder.report(self._workload(device), device, options, _tell)


@dataclass(frozen=True)
class Attention(Measurement):
    """Attention back-ends: time, memory, kernels and accuracy.

    At the shapes of Wan's models, or of --model alone.
    """

    def _measure(self, device: torch.device) -> Report:
        from turbodit.benchmark import attention

        if self.model is None and (self.size is not None or self.frames is not None):
            raise ValueError("--size and --frames belong to a --model, and none is given")
        workload = None if self.model is None else self._workload(device)
        repeats = self._repeats(attention.REPEATS, device)
        return attention.report(device, workload, repeats, _tell)


@dataclass(frozen=True)
class Linear(Measurement):
    """The linear layers of a model: 8-bit formats beside PyTorch's product."""

    def _measure(self, device: torch.device) -> Report:
        from turbodit.benchmark import linear

        repeats = self._repeats(linear.REPEATS, device)
        return linear.report(self._workload(device), device, repeats, _tell)


@dataclass(frozen=True)
class EndToEnd(Measurement):
    """Every stage from the prompt to the mp4, the first time and after.

    spritewan and spritewan-teacher with their own weights, other models with random ones.
    """

    attention: Annotated[str | None, _flag("NAME")] = None
    """Attention back-end; by default what spritewan's files state, and sdpa for other models."""
    linear: Annotated[Format | None, _flag("FORMAT")] = None
    """8 bits for the linear layers: int8-block, int8-channel or fp8."""
    residual: Annotated[Literal["float32", "bfloat16"], _flag("NAME")] = "float32"
    """Residual stream of the transformer: float32, or bfloat16, which is faster."""
    no_graph: Switch = False
    """On a GPU: launch the transformer's kernels one by one, not as a CUDA graph."""
    steps: Annotated[int | None, _flag("N")] = None
    """Denoising steps."""
    solver: Annotated[Solver | None, _flag("NAME")] = None
    """unipc, euler, dpm++, or few-step for distilled models."""

    def _measure(self, device: torch.device) -> Report:
        from turbodit.benchmark import e2e
        from turbodit.benchmark.modes import chosen_format

        build: dict[str, Any] = {
            "linear": None if self.linear is None else chosen_format(self.linear, device),
            "residual": self.residual,
            "graph": device.type == "cuda" and not self.no_graph,
        }
        if self.attention is not None:
            build["attention"] = self.attention
        request = {"steps": self.steps, "solver": self.solver}
        options = e2e.Options(self._repeats(e2e.REPEATS, device), build, request)
        return e2e.report(self._workload(device), device, options, _tell)


Bench = Annotated[
    Annotated[Step, subcommand("step")]
    | Annotated[Ladder, subcommand("ladder")]
    | Annotated[Attention, subcommand("attention")]
    | Annotated[Linear, subcommand("linear")]
    | Annotated[EndToEnd, subcommand("e2e")],
    subcommand(
        "bench",
        description="Measure what a model costs on this device. No checkpoint is needed: the "
        "weights are random, and only the embedded models make real videos.",
    ),
]


def _tell(text: str) -> None:
    print(f"turbodit: {text}", file=sys.stderr)
