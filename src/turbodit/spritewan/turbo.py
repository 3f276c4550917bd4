"""Build the turbo SpriteWan: the teacher's 20 guided steps in four, with sparse, 8-bit layers.

    python -m turbodit.spritewan.turbo --out runs/turbo

The teacher's samples, SLA, rCM, their merge, and 8-bit linear layers, each as the command of its
name does it. Stopped at any time and given again, it goes on; what is there whole is left alone.
Then measure it:

    turbodit eval spritewan --model spritewan-teacher spritewan:transformer=runs/turbo/turbo

and make it the embedded model: its files take the place of those in assets/spritewan/transformer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from turbodit.checkpoints import quantize_file
from turbodit.checkpoints.merge import merge_difference
from turbodit.pipeline import Pipeline
from turbodit.recipes import RCM, SLA
from turbodit.request import GenerationRequest
from turbodit.spritewan.world import scene
from turbodit.training import rcm, sla
from turbodit.training.synthesize import Prompt, synthesize

TEACHER = "spritewan-teacher"


@dataclass(frozen=True)
class Options:
    """Settings of the build; sizes are for a GPU, rates those of the recipes.

    Attributes:
        clips: that the teacher makes.
        teacher_steps: of each, with guidance.
        sla_steps, sla_minutes, rcm_steps, rcm_minutes: each training ends with whichever comes
            first.
        batch: samples of an update.
        linear: format of the 8-bit layers: int8-channel also runs on CPUs.
    """

    out: Path
    clips: int = 4096
    teacher_steps: int = 50
    sla_steps: int = 2000
    sla_minutes: float | None = None
    rcm_steps: int = 2000
    rcm_minutes: float | None = None
    batch: int = 128
    linear: str = "int8-channel"
    device: str | None = None


def build(options: Options) -> Path:
    """The folder of the turbo transformer."""
    out, data = options.out, options.out / "data"
    make_data(options, data)
    shared: dict[str, Any] = {
        "data": (str(data),),
        "batch": options.batch,
        "device": options.device,
        "log_every": 20,
        "save_every": 200,
    }
    tuned = replace(
        SLA["spritewan"](),
        out=out / "sla",
        steps=options.sla_steps,
        minutes=options.sla_minutes,
        **shared,
    )
    distilled = replace(
        RCM["spritewan"](),
        out=out / "rcm",
        steps=options.rcm_steps,
        minutes=options.rcm_minutes,
        **shared,
    )
    if not (tuned.out / "transformer").exists():
        sla.train(tuned)
    if not (distilled.out / "transformer").exists():
        rcm.train(distilled)
    merged, turbo = out / "merged", out / "turbo"
    if not merged.exists():
        merge_difference(distilled.out / "transformer", TEACHER, tuned.out / "transformer", merged)
    if not turbo.exists():
        quantize_file(merged, turbo, options.linear)
    return turbo


def make_data(options: Options, folder: Path) -> None:
    """The teacher's samples of SpriteWorld's training captions."""
    guidance = RCM["spritewan"]().guidance
    synthesize(
        Pipeline.from_pretrained(TEACHER, device=options.device),
        [Prompt(scene(clip).caption) for clip in range(options.clips)],
        folder,
        request=GenerationRequest(
            (), steps=options.teacher_steps, solver="euler", shift=3.0, guidance=guidance
        ),
        batch=min(options.batch, options.clips),
    )


if __name__ == "__main__":
    print(build(tyro.cli(Options)))
