"""Train the judge on clips that are rendered as it goes; no clip is seen twice.

    python -m turbodit.spritewan.train_judge --out runs/judge --minutes 5

A run that was stopped goes on with the same command. Writes `<out>/judge` (bfloat16),
`<out>/state` and `<out>/log.jsonl`, whose last line tells the accuracy on held-out clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from turbodit.spritewan.judge import Judge, JudgeConfig, Verdict, load_judge, save_judge, score
from turbodit.spritewan.state import Clock, StageLog
from turbodit.spritewan.trainer import Trainer, learning_rate
from turbodit.spritewan.world import HELD_OUT, OBJECTS, Scene, render, scene

WARMUP_STEPS = 100
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Options:
    """Settings of one training run."""

    out: Path
    minutes: float = 5.0  # over all runs: the learning rate falls along them
    steps: int | None = None  # over all runs, instead of the minutes if they suffice
    batch: int = 64
    lr: float = 1e-3
    evaluation_clips: int = 2048
    save_minutes: float = 1.0
    log_steps: int = 50
    workers: int = 8  # processes that draw scenes
    device: str = "cuda"


class Scenes(Dataset[Scene]):
    """All of SpriteWorld, indexed by clip id."""

    def __getitem__(self, clip_id: int) -> Scene:
        return scene(clip_id)


def scene_batches(first_id: int, batch: int, workers: int) -> Iterator[list[Scene]]:
    """Batches of training scenes with rising ids, drawn in `workers` processes."""
    ids = range(first_id, HELD_OUT)
    return iter(DataLoader(Scenes(), batch, sampler=ids, num_workers=workers, collate_fn=list))


def judge_loss(verdict: Verdict, scenes: list[Scene]) -> dict[str, Tensor]:
    """Cross entropies by head; the target of two sprites is one half on each."""
    device = verdict.object_logits.device
    objects = torch.zeros(len(scenes), len(OBJECTS))
    for row, s in zip(objects, scenes, strict=True):
        row[list(s.objects)] = 1 / len(s.objects)
    motions = torch.tensor([s.motion for s in scenes], device=device)
    backgrounds = torch.tensor([s.background for s in scenes], device=device)
    return {
        "object": F.cross_entropy(verdict.object_logits, objects.to(device)),
        "motion": F.cross_entropy(verdict.motion_logits, motions),
        "background": F.cross_entropy(verdict.background_logits, backgrounds),
    }


def augment(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Faults of a VAE or a generator on prepared frames (B, t, 3, s, s), each clip its own.

    Lost detail, ghosts of the neighbouring frames, a colour cast and noise: the judge must
    read a clip through them.
    """
    batch, count, _, size, _ = frames.shape

    def amount(low: float, high: float, channels: int = 1) -> Tensor:
        shape = (batch, 1, channels, 1, 1)
        uniform = torch.rand(shape, generator=generator, device=frames.device)
        return low + (high - low) * uniform

    coarse = F.interpolate(
        F.avg_pool2d(frames.flatten(0, 1), 4), size=(size, size), mode="bilinear"
    ).unflatten(0, (batch, count))
    frames = frames.lerp(coarse, amount(-0.4, 0.8).clamp_min(0))
    ghosts = (frames.roll(1, dims=1) + frames.roll(-1, dims=1)) / 2
    ghosts[:, 0], ghosts[:, -1] = frames[:, 0], frames[:, -1]
    frames = frames.lerp(ghosts, amount(-0.3, 0.3).clamp_min(0))
    frames = frames * amount(0.85, 1.15, 3) + amount(-0.1, 0.1, 3)
    noise = torch.randn(frames.shape, generator=generator, device=frames.device)
    return frames + amount(-0.05, 0.1).clamp_min(0) * noise


def train(options: Options, config: JudgeConfig) -> None:
    """Train to the end of the budget, then export, and evaluate what was exported."""
    log = StageLog(options.out / "log.jsonl")
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    judge = Judge(config).to(device)
    trainer = Trainer(judge, options.out / "state", betas=(0.9, 0.98), ema=0.998)
    seconds_before = trainer.info.get("seconds", 0.0)
    settings = {name: str(value) for name, value in asdict(options).items()}
    log.write(event="start", step=trainer.step, options=settings)
    batches = scene_batches(trainer.step * options.batch, options.batch, options.workers)
    clock = Clock(options.minutes - seconds_before / 60)
    last_save = clock.seconds
    while trainer.step != options.steps and not clock.over:
        step = trainer.step
        scenes = next(batches)
        generator = torch.Generator(device).manual_seed(step)
        frames = augment(judge.prepare(render(scenes, device)), generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            verdict = judge(frames)
        losses = judge_loss(verdict, scenes)
        seconds = seconds_before + clock.seconds
        share = step / options.steps if options.steps else seconds / (60 * options.minutes)
        lr = learning_rate(options.lr, step, WARMUP_STEPS, share)
        norm = trainer.update(torch.stack(list(losses.values())).sum(), lr)
        if step % options.log_steps == 0:
            log.write(
                step=step,
                **{f"{name}_loss": loss.detach() for name, loss in losses.items()},
                **score(verdict, scenes),
                gradient_norm=norm,
                lr=lr,
                seconds=seconds,
            )
        if clock.seconds - last_save > 60 * options.save_minutes:
            trainer.save(seconds=seconds_before + clock.seconds)
            last_save = clock.seconds
    trainer.save(seconds=seconds_before + clock.seconds)
    save_judge(trainer.averaged(), options.out / "judge")
    accuracies = evaluate(load_judge(options.out / "judge", device), options.evaluation_clips)
    log.write(event="evaluation", step=trainer.step, clips=options.evaluation_clips, **accuracies)


def evaluate(judge: Judge, clips: int) -> dict[str, float]:
    """Accuracies of `judge` on the first `clips` held-out clips."""
    device = judge.object_head.weight.device
    scenes = [scene(HELD_OUT + i) for i in range(clips)]
    verdicts = [
        judge.predict(render(scenes[i : i + EVALUATION_BATCH], device))
        for i in range(0, clips, EVALUATION_BATCH)
    ]
    return score(Verdict.concatenate(verdicts), scenes)


if __name__ == "__main__":
    train(tyro.cli(Options), JudgeConfig())
