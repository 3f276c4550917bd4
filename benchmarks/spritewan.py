"""How long SpriteWan takes for one clip, in several forms beside each other.

    python benchmarks/spritewan.py spritewan-teacher:steps=50 spritewan
    python benchmarks/spritewan.py spritewan-teacher:steps=50 spritewan --device cpu --threads 2

A form is a spec as `turbodit eval spritewan --model` takes it. All are loaded first and make
clips to warm up (compilation, CUDA graphs); then they take turns, so that a machine's slow minutes
meet them all. Prints a line for each and writes benchmarks/results/.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import tyro

from turbodit.benchmark.measure import WARM_UP, Times
from turbodit.benchmark.report import environment
from turbodit.device import choose_device
from turbodit.evaluation.spec import read_spec
from turbodit.pipeline import Pipeline
from turbodit.request import GenerationRequest, Settings, resolve
from turbodit.spritewan.world import HELD_OUT, scene

STAGES = ("denoise", "decode")


@dataclass(frozen=True)
class Options:
    """Settings of the measurement.

    Attributes:
        specs: models and how they run.
        repeats: clips of each that count.
        device: cpu or cuda; by default a GPU if there is one.
        threads: of a CPU; by default PyTorch's own choice.
    """

    specs: Annotated[tuple[str, ...], tyro.conf.Positional]
    repeats: int = 10
    device: str | None = None
    threads: int | None = None


def clip_seconds(pipe: Pipeline, settings: Settings) -> dict[str, float]:
    """Seconds of each stage of one clip, and of them all."""
    timings = pipe.generate(settings)[0].timings
    return {stage: timings[stage] for stage in STAGES} | {"all": sum(timings.values())}


def main(options: Options) -> None:
    """Measure and write."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    forms: dict[str, tuple[Pipeline, Settings]] = {}
    for text in options.specs:
        spec = read_spec(text)
        pipe = spec.load(str(device))
        request = GenerationRequest(scene(HELD_OUT).caption, seed=0, **spec.sampling)
        forms[text] = pipe, resolve(request, pipe.model)
        for _ in range(WARM_UP[device.type]):
            clip_seconds(*forms[text])
    rounds = [
        {text: clip_seconds(*form) for text, form in forms.items()} for _ in range(options.repeats)
    ]
    rows = {
        text: {
            name: Times.of([r[text][name] for r in rounds]).summary(5) for name in rounds[0][text]
        }
        for text in forms
    }
    for text, row in rows.items():
        print(text, json.dumps(row))
    found = environment(device)
    words = f"{date.today()}-{found['device']}-spritewan-speed".lower().replace(" ", "-")
    path = Path(__file__).parent / "results" / f"{words}.json"
    numbers = {"command": "benchmarks/spritewan.py", **found, "unit": "s", "rows": rows}
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(numbers, indent=1) + "\n")
    partial.replace(path)
    print(path)


if __name__ == "__main__":
    main(tyro.cli(Options))
