"""What faster modes change in the videos of SpriteWan's teacher: same prompts, same noise.

    python benchmarks/quality.py
    python benchmarks/quality.py --device cpu --clips 2 --steps 4   # to see that it runs

For each mode: PSNR of its videos against those of the exact one (mean and worst clip); the
share of clips, in percent, in which the judge finds the object, the motion and the background
of the prompt; and the Fréchet distance between the judge's features of the videos and of the
scenes that the prompts were written for. `sdpa-math`, another exact back-end, shows what
rounding alone changes.

Writes `<out>/<date>-<device>-quality.json` and prints a table in markdown.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import tyro

from turbodit.pipeline import Pipeline
from turbodit.spritewan import evaluate
from turbodit.spritewan.evaluate import frechet_distance
from turbodit.spritewan.judge import load_judge
from turbodit.spritewan.train_vae import decibels
from turbodit.spritewan.world import HELD_OUT, scene

BASELINE = "exact"
LABELS = ("object", "motion", "background", "frechet")
# What `Pipeline.from_pretrained` is given for each.
MODES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "sdpa-math": {"attention": "sdpa-math"},
    "residual bfloat16": {"residual": "bfloat16"},
    "int8-block": {"linear": "int8-block"},
    "int8-channel": {"linear": "int8-channel"},
    "fp8": {"linear": "fp8-channel"},
    "sage": {"attention": "sage"},
    "sage, fp8, residual bfloat16": {
        "attention": "sage",
        "linear": "fp8-channel",
        "residual": "bfloat16",
    },
    "sparge 0.75": {"attention": "sparge", "attention_settings": {"ratio": 0.75}},
    "sparge 0.5": {"attention": "sparge", "attention_settings": {"ratio": 0.5}},
}


@dataclass(frozen=True)
class Options:
    out: Path = Path("benchmarks/results")
    device: str = "cuda"
    clips: int = 256
    steps: int = 20
    seed: int = 0
    batch: int = 32
    modes: tuple[str, ...] = tuple(MODES)


def psnr(videos: torch.Tensor, baseline: torch.Tensor) -> dict[str, float]:
    """Of each clip, uint8 (B,T,3,H,W), over all its frames: mean and worst."""
    errors = [
        (one.float() - other.float()).square().mean()
        for one, other in zip(videos, baseline, strict=True)
    ]
    values = decibels(torch.stack(errors))
    return {"mean_psnr": round(sum(values) / len(values), 2), "worst_psnr": round(min(values), 2)}


def measured(options: Options) -> Iterator[tuple[str, dict[str, float]]]:
    scenes = [scene(HELD_OUT + index) for index in range(options.clips)]
    settings = evaluate.Options(out=options.out, seed=options.seed, batch=options.batch)
    judge = load_judge(device=options.device)
    truth = evaluate.ground_truth(scenes, settings, torch.device(options.device))
    features = judge.predict(truth).features
    for name in dict.fromkeys((BASELINE, *options.modes)):
        pipe = Pipeline.from_pretrained("spritewan-teacher", device=options.device, **MODES[name])
        start = time.monotonic()
        videos = evaluate.from_text(pipe, scenes, options.steps, settings)
        seconds = round(time.monotonic() - start, 1)
        if name == BASELINE:
            baseline = videos
        distance = frechet_distance(judge.predict(videos).features, features)
        row = {
            **psnr(videos, baseline),
            **evaluate.judged(judge, videos, scenes, settings),
            "frechet": round(distance, 3),
            "seconds": seconds,
        }
        yield name, row


def markdown(rows: dict[str, dict[str, float]]) -> str:
    lines = [
        "| | PSNR, mean | worst | object | motion | background | Fréchet |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        first = "| | |" if name == BASELINE else f"| {row['mean_psnr']} | {row['worst_psnr']} |"
        judged = " | ".join(str(row[label]) for label in LABELS)
        lines.append(f"| {name} {first} {judged} |")
    return "\n".join(lines) + "\n"


def write(rows: dict[str, dict[str, float]], options: Options, device: str) -> None:
    results = {
        "device": device,
        "torch": torch.__version__,
        "dtype": "bfloat16" if options.device == "cuda" else "float32",
        "clips": options.clips,
        "steps": options.steps,
        "seed": f"{options.seed} + clip id",
        "results": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{date.today()}-{device.replace(' ', '-').lower()}-quality.json"
    partial = options.out / f"{name}.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(options.out / name)


def main(options: Options) -> None:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    rows: dict[str, dict[str, float]] = {}
    for name, row in measured(options):
        print(f"{name}: {row}", flush=True)
        rows[name] = row
        write(rows, options, device)  # after each: a run that is cut short keeps what it has
    print(markdown(rows))


if __name__ == "__main__":
    main(tyro.cli(Options))
