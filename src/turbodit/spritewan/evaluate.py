"""What SpriteWan makes of held-out prompts, as the judge sees it.

    python -m turbodit.spritewan.evaluate --out runs/evaluation --steps 20 50

Each row of the table is the share of clips, in percent, in which the judge finds the object,
the motion and the background of the prompt. None of the prompts' combinations occurred in
training. Writes `<out>/evaluation.json` and a contact sheet for every row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image

from turbodit.pipeline import Pipeline
from turbodit.request import GenerationRequest
from turbodit.spritewan.contact_sheet import sheet
from turbodit.spritewan.judge import Judge, load_judge, score
from turbodit.spritewan.train_vae import decibels
from turbodit.spritewan.world import HELD_OUT, Scene, render, scene
from turbodit.video import Video

SHEET_CLIPS = 16


@dataclass(frozen=True)
class Options:
    """What to evaluate.

    Attributes:
        model: name or folder, as `turbodit generate --model` takes it.
        judge: folder of the judge; the embedded one if not given.
        clips: held-out prompts of each text-to-video row.
        steps: a text-to-video row for each number of steps.
        images: clips of the image-to-video row, one at a time, at the default steps.
    """

    out: Path
    model: str = "spritewan"
    judge: Path | None = None
    clips: int = 256
    steps: tuple[int, ...] = (20, 50)
    images: int = 64
    guidance: float | None = None
    seed: int = 0
    batch: int = 32
    device: str | None = None


def evaluate(options: Options) -> dict[str, dict[str, Any]]:
    """The table: for each row the judge's accuracies in percent and the seconds it took."""
    options.out.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_pretrained(options.model, device=options.device)
    judge = load_judge(options.judge, device=pipe.device)
    scenes = [scene(HELD_OUT + index) for index in range(options.clips)]
    rows = {
        "ground truth": judged(judge, ground_truth(scenes, options, pipe.device), scenes, options)
    }
    for steps in options.steps:
        name = f"text, {steps} steps"
        start = time.monotonic()
        videos = from_text(pipe, scenes, steps, options)
        seconds = time.monotonic() - start
        rows[name] = {**judged(judge, videos, scenes, options), "seconds": round(seconds, 1)}
        _draw(videos, scenes, options.out / f"text-{steps}.png")
    if options.images:
        some = scenes[: options.images]
        videos = from_images(pipe, some, options)
        truth = ground_truth(some, options, pipe.device)[:, 0].float()
        error = (videos[:, 0].float() - truth).square().mean(dim=(1, 2, 3))
        rows["image"] = {
            **judged(judge, videos, some, options),
            "first_frame_psnr": sum(decibels(error)) / len(some),
        }
        _draw(videos, some, options.out / "image.png")
    (options.out / "evaluation.json").write_text(json.dumps(rows, indent=1))
    for name, row in rows.items():
        print(name, json.dumps(row))
    return rows


def ground_truth(scenes: Sequence[Scene], options: Options, device: torch.device) -> torch.Tensor:
    """The scenes themselves, drawn on `device`: uint8 (B,T,3,H,W) on the CPU."""
    return torch.cat([render(part, device).cpu() for part in _batches(scenes, options.batch)])


def from_text(
    pipe: Pipeline, scenes: Sequence[Scene], steps: int, options: Options
) -> torch.Tensor:
    """A clip for each scene's caption, uint8 (B,T,3,H,W)."""
    videos: list[Video] = []
    for part in _batches(scenes, options.batch):
        request = GenerationRequest(
            [s.caption for s in part],
            seed=[options.seed + s.clip_id for s in part],
            steps=steps,
            guidance=options.guidance,
        )
        videos += pipe.generate(pipe.resolve(request))
    return _stack(videos)


def from_images(pipe: Pipeline, scenes: Sequence[Scene], options: Options) -> torch.Tensor:
    """A clip that goes on from each scene's first frame, uint8 (B,T,3,H,W)."""
    videos: list[Video] = []
    for one in scenes:
        first = render([one], frames=1)[0, 0].permute(1, 2, 0).numpy()
        request = GenerationRequest(
            one.caption,
            image=Image.fromarray(first),
            seed=options.seed + one.clip_id,
            guidance=options.guidance,
        )
        videos += pipe.generate(pipe.resolve(request))
    return _stack(videos)


def _stack(videos: Sequence[Video]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(video.frames).permute(0, 3, 1, 2) for video in videos])


def judged(
    judge: Judge, videos: torch.Tensor, scenes: Sequence[Scene], options: Options
) -> dict[str, float]:
    """Accuracies in percent, each batch weighted by its size."""
    totals: dict[str, float] = {}
    device = next(judge.parameters()).device
    for start in range(0, len(scenes), options.batch):
        rows = slice(start, start + options.batch)
        scores = score(judge.predict(videos[rows].to(device)), scenes[rows])
        for name, value in scores.items():
            totals[name] = totals.get(name, 0.0) + 100 * value * len(scenes[rows])
    return {name: round(total / len(scenes), 2) for name, total in totals.items()}


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Squared Fréchet distance of two Gaussians fitted to features (arXiv:1706.08500).

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr(sqrt(C1 C2)). With X and Y the features less their
    means, C1 = X^T X / (n - 1) and so on, and the last trace is the sum of the singular values
    of X Y^T, or of the triangles of their QR decompositions: no root of a singular matrix.

    Args:
        one, other: features of at least two clips each, (n, D) and (m, D).
    """
    one, other = one.double(), other.double()
    mean = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    x = (one - one.mean(dim=0)) / (len(one) - 1) ** 0.5
    y = (other - other.mean(dim=0)) / (len(other) - 1) ** 0.5
    overlap = torch.linalg.svdvals(torch.linalg.qr(x).R @ torch.linalg.qr(y).R.T).sum()
    return (mean + x.square().sum() + y.square().sum() - 2 * overlap).item()


def _batches(scenes: Sequence[Scene], size: int) -> list[Sequence[Scene]]:
    return [scenes[start : start + size] for start in range(0, len(scenes), size)]


def _draw(videos: torch.Tensor, scenes: Sequence[Scene], path: Path) -> None:
    captions = [s.caption for s in scenes[:SHEET_CLIPS]]
    sheet(videos[:SHEET_CLIPS], captions).save(path)


if __name__ == "__main__":
    evaluate(tyro.cli(Options))
