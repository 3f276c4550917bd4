"""`turbodit synthesize`: training data that a teacher makes of prompts."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import UseAppendAction, arg

from turbodit.cli.generate import Switch
from turbodit.cli.report import Bars, short_warnings

if TYPE_CHECKING:
    from turbodit.request import GenerationRequest
    from turbodit.training.data.work import Report, Worker
    from turbodit.training.synthesize import Prompt

SPRITEWORLD = "spriteworld:"  # before a number of captions


def flag(metavar: str, *aliases: str) -> Any:
    """A flag whose help says itself what is done without it."""
    return arg(metavar=metavar, aliases=aliases, help_behavior_hint="")


@dataclass(frozen=True)
class Synthesize:
    """Make training data: a teacher's latents and text embeddings of prompts, in tar shards.

    Started again, the same command goes on where it was. torchrun shares the shards among GPUs.
    """

    prompts: Annotated[str, flag("FILE")]
    """Prompts, a line each (.txt), objects (.jsonl), or spriteworld:N, the embedded model's own."""
    output: Annotated[Path, flag("FOLDER", "-o")]
    """Where shards and dataset.json go."""
    model: Annotated[str, flag("NAME")] = "spritewan-teacher"
    """Name, folder or Hub id of the teacher. Default: spritewan-teacher."""
    transformer: Annotated[UseAppendAction[tuple[Path, ...]], flag("PATH")] = ()
    """Other weights for the transformer; given twice for two experts, high noise first."""

    size: Annotated[str | None, flag("W*H")] = None
    """Width and height in pixels, such as 832*480; by default the model's own."""
    frames: Annotated[int | None, flag("N")] = None
    """Number of frames, 4k+1; by default the model's own."""
    steps: Annotated[int, flag("N")] = 100
    """Denoising steps. Default: 100."""
    solver: Annotated[Literal["euler", "unipc", "dpm++"], flag("NAME")] = "euler"
    """euler, unipc or dpm++. Default: euler."""
    shift: Annotated[float, flag("X")] = 3.0
    """Shift of the times towards noise. Default: 3."""
    guidance: Annotated[float, flag("X")] = 5.0
    """Classifier-free guidance. Default: 5."""
    guidance_high_noise: Annotated[float | None, flag("X")] = None
    """The same for the high-noise expert of two-expert models; by default no other."""
    negative_prompt: Annotated[str | None, flag("TEXT")] = None
    """What guidance steers away from; by default the model's own."""
    seed: Annotated[int, flag("N")] = 0
    """Of all noise. Default: 0."""
    shard_size: Annotated[int, flag("N")] = 256
    """Samples in a shard. Default: 256."""
    batch: Annotated[int, flag("N")] = 1
    """Samples computed together; best one that divides the shard. Default: 1."""

    device: Annotated[str | None, flag("NAME")] = None
    """cpu, cuda, cuda:1; by default a GPU if there is one."""
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, flag("NAME")] = None
    """bfloat16, float16 or float32; by default bfloat16 on a GPU."""
    json: Switch = False
    """Print the result as JSON."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        """Make and write what is missing; report.

        Raises:
            ValueError, OSError: a mistake of the user's, or a file that cannot be written.
            FloatingPointError: the teacher made NaN or infinity.
        """
        start = time.perf_counter()
        from turbodit.training.data.work import this_worker
        from turbodit.training.synthesize import synthesize

        prompts = self._prompts()
        request = self._request()
        worker = this_worker()
        with short_warnings(), WorkerBars(worker) as bars:
            report = synthesize(
                self._load(worker, bars),
                prompts,
                self.output,
                request=request,
                seed=self.seed,
                shard_size=self.shard_size,
                batch=self.batch,
                worker=worker,
                progress=bars,
            )
        tell(report, self.output, time.perf_counter() - start, as_json=self.json)

    def _prompts(self) -> list[Prompt]:
        from turbodit.training.synthesize import Prompt, read_prompts

        if not self.prompts.startswith(SPRITEWORLD):
            return read_prompts(Path(self.prompts))
        from turbodit.spritewan.world import HELD_OUT, scene

        number = self.prompts.removeprefix(SPRITEWORLD)
        if not number.isdecimal() or not 1 <= int(number) <= HELD_OUT:
            raise ValueError(
                f"--prompts {SPRITEWORLD}N takes N from 1 to {HELD_OUT:,}, got {number!r}"
            )
        return [Prompt(scene(clip).caption) for clip in range(int(number))]

    def _request(self) -> GenerationRequest:
        from turbodit.batch import parse_size
        from turbodit.request import GenerationRequest

        width, height = (None, None) if self.size is None else parse_size(self.size)
        return GenerationRequest(
            prompt=(),
            width=width,
            height=height,
            frames=self.frames,
            steps=self.steps,
            solver=self.solver,
            shift=self.shift,
            guidance=self.guidance,
            guidance_high_noise=self.guidance_high_noise,
            negative_prompt=self.negative_prompt,
        )

    def _load(self, worker: Worker, bars: WorkerBars) -> Any:
        import torch

        from turbodit.pipeline import Pipeline

        return Pipeline.from_pretrained(
            self.model,
            transformer=self.transformer or None,
            device=worker.device(self.device),
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            progress=bars,
        )


class WorkerBars(Bars):
    """Progress of the first worker; of several, the others are silent."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._shown = worker.rank == 0

    def __enter__(self) -> WorkerBars:
        if self._shown:
            super().__enter__()
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._shown:
            super().__call__(stage, done, total)


def tell(report: Report, folder: Path, seconds: float, *, as_json: bool) -> None:
    """Print what this process did."""
    if as_json:
        result = vars(report) | {"output": str(folder), "seconds": seconds}
        print(json.dumps(result, ensure_ascii=False))
        return
    table = Table(show_header=False)
    rows = {"made": report.made, "there before": report.found, "skipped": len(report.skipped)}
    for name, number in rows.items():
        table.add_row(name, f"{number:,} samples")
    table.add_row("time", f"{seconds:.1f} s", end_section=True)
    for source, reason in report.skipped.items():
        table.add_row(Text(source), Text(reason))
    Console().print(table)
    print(folder)
