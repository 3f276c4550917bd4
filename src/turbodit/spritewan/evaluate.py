"""What SpriteWan's teacher makes of held-out prompts, as the judge sees it.

    python -m turbodit.spritewan.evaluate --out runs/evaluation --steps 20 50

Each row of the table is the share of clips, in percent, in which the judge finds the object,
the motion and the background of the prompt. None of the prompts' combinations occurred in
training. Writes `<out>/evaluation.json` and a contact sheet for every row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import tyro
from PIL import Image

from turbodit.evaluation.distribution import diversity, frechet_distance, precision_recall
from turbodit.pipeline import Pipeline, Progress
from turbodit.request import GenerationRequest
from turbodit.spritewan.contact_sheet import sheet
from turbodit.spritewan.judge import Judge, Verdict, load_judge, score
from turbodit.spritewan.train_vae import decibels
from turbodit.spritewan.world import HELD_OUT, Scene, render, scene
from turbodit.video import Video

SHEET_CLIPS = 16
STAGES = ("text", "denoise", "decode")  # of a generation from text


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
    model: str = "spritewan-teacher"
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
    sampling = {"steps": steps, "guidance": options.guidance}
    parts = text_batches(pipe, scenes, sampling, options.seed, options.batch)
    return _stack([video for part in parts for video in part])


def text_batches(
    pipe: Pipeline, scenes: Sequence[Scene], sampling: Mapping[str, Any], seed: int, batch: int
) -> Iterator[list[Video]]:
    """A clip for each scene's caption, in batches; its seed is `seed` and the clip's id.

    Args:
        sampling: fields of GenerationRequest.
    """
    for part in _batches(scenes, batch):
        seeds = [seed + s.clip_id for s in part]
        request = GenerationRequest([s.caption for s in part], seed=seeds, **sampling)
        yield pipe.generate(pipe.resolve(request))


@dataclass(frozen=True)
class Sample:
    """What a model made of the scenes' captions, from one seed for each.

    Attributes:
        verdict: the judge's, on all clips; the clips themselves are not kept.
        seconds: of a clip: of its batch over the batch's size, the median of all batches.
        shown: the first clips, for a contact sheet, uint8 (n, T, 3, H, W).
    """

    verdict: Verdict
    seconds: float
    shown: torch.Tensor


def draw_sample(
    pipe: Pipeline,
    judge: Judge,
    scenes: Sequence[Scene],
    sampling: Mapping[str, Any],
    *,
    repetition: int,
    batch: int,
    progress: Progress,
) -> Sample:
    """Make and judge one clip for each scene, a batch at a time.

    Args:
        sampling: fields of GenerationRequest.
        repetition: counts samples of the same scenes from 0; each has other seeds.
        progress: told how many clips are done.
    """
    verdicts, seconds, shown = [], [], []
    done = 0
    for videos in text_batches(pipe, scenes, sampling, repetition * HELD_OUT, batch):
        clips = _stack(videos)
        verdicts.append(judge.predict(clips))
        seconds.append(sum(videos[0].timings[stage] for stage in STAGES) / len(videos))
        if done < SHEET_CLIPS:
            shown.append(clips[: SHEET_CLIPS - done])
        done += len(videos)
        progress(f"seed {repetition}", done, len(scenes))
    return Sample(Verdict.concatenate(verdicts), median(seconds), torch.cat(shown))


def quality(
    samples: Sequence[Verdict], scenes: Sequence[Scene], reference: torch.Tensor
) -> dict[str, Any]:
    """How good samples of the scenes' captions are, and how different from each other.

    Args:
        samples: the judge's verdicts on a clip of each scene, once for every repetition.
        reference: features of real clips, (n, D).

    Returns:
        object, motion, background: the judge's accuracies in percent.
        frechet: distance to the reference.
        precision, recall: against the reference (arXiv:1904.06991).
        diversity: mean distance of features between repetitions; None if there is only one.
        by_seed: all but diversity for each repetition; the values above are their means.
    """
    by_seed = []
    for verdict in samples:
        precision, recall = precision_recall(reference, verdict.features)
        accuracies = {name: 100 * share for name, share in score(verdict, scenes).items()}
        distance = frechet_distance(verdict.features, reference)
        by_seed.append(
            {**accuracies, "frechet": distance, "precision": precision, "recall": recall}
        )
    several = len(samples) > 1
    return {
        **{name: mean(row[name] for row in by_seed) for name in by_seed[0]},
        "diversity": (
            diversity(torch.stack([v.features for v in samples], dim=1)) if several else None
        ),
        "by_seed": by_seed,
    }


def judge_scenes(judge: Judge, scenes: Sequence[Scene], batch: int) -> Verdict:
    """The judge's verdict on the scenes themselves, drawn a batch at a time on its device."""
    device = next(judge.parameters()).device
    parts = [judge.predict(render(part, device)) for part in _batches(scenes, batch)]
    return Verdict.concatenate(parts)


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


def _batches(scenes: Sequence[Scene], size: int) -> list[Sequence[Scene]]:
    return [scenes[start : start + size] for start in range(0, len(scenes), size)]


def _draw(videos: torch.Tensor, scenes: Sequence[Scene], path: Path) -> None:
    captions = [s.caption for s in scenes[:SHEET_CLIPS]]
    sheet(videos[:SHEET_CLIPS], captions).save(path)


if __name__ == "__main__":
    evaluate(tyro.cli(Options))
