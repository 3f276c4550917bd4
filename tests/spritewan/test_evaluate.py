"""Evaluation: accuracies weighted by clips, and the table that a perfect generator would get."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from turbodit.request import GenerationRequest
from turbodit.spritewan import evaluate as evaluation
from turbodit.spritewan.evaluate import Options, evaluate, judged
from turbodit.spritewan.judge import Verdict
from turbodit.spritewan.world import BACKGROUNDS, HELD_OUT, MOTIONS, OBJECTS, Scene, render, scene
from turbodit.video import Video


class Reader(nn.Module):
    """Reads a clip's number from its pixels and knows the scene; of `blind` clips it knows none."""

    def __init__(self, scenes: Sequence[Scene], blind: Sequence[int] = ()) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # tells its device
        self.scenes, self.blind = scenes, blind
        self.batches: list[int] = []

    def predict(self, videos: torch.Tensor) -> Verdict:
        self.batches.append(len(videos))
        heads = [torch.zeros(len(videos), len(names)) for names in (OBJECTS, MOTIONS, BACKGROUNDS)]
        for row, number in enumerate(videos[:, 0, 0, 0, 0].tolist()):
            one = self.scenes[number]
            seen = (one.objects, one.motion, one.background)
            for head, labels in zip(heads, seen, strict=True):
                head[row, labels] = -1.0 if number in self.blind else 1.0
        return Verdict(*heads, features=torch.zeros(len(videos), 256))


def numbered(count: int) -> torch.Tensor:
    """Clips whose pixels are their number, uint8 (B, 9, 3, 4, 4)."""
    numbers = torch.arange(count, dtype=torch.uint8)
    return numbers[:, None, None, None, None].expand(-1, 9, 3, 4, 4)


def test_every_clip_has_the_same_weight_whatever_its_batch(tmp_path: Path) -> None:
    scenes = [scene(HELD_OUT + i) for i in range(5)]
    judge = Reader(scenes, blind=[0])  # the batches' plain mean would be 83.3
    accuracies = judged(judge, numbered(5), scenes, Options(tmp_path, batch=2))
    assert judge.batches == [2, 2, 1]
    assert accuracies == {"object": 80.0, "motion": 80.0, "background": 80.0}


class Copyist:
    """In place of a pipeline: answers every request with the ground truth of the seed's scene."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        self.requests.append(request)
        return request

    def generate(self, request: GenerationRequest) -> list[Video]:
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        seeds = [request.seed] if isinstance(request.seed, int) else request.seed
        scenes = [scene(seed - 7) for seed in seeds]
        assert list(prompts) == [s.caption for s in scenes]
        clips = render(scenes).permute(0, 1, 3, 4, 2).numpy()
        return [Video(clip, fps=16) for clip in clips]


def test_a_perfect_generator_is_judged_as_the_ground_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyist = Copyist()
    monkeypatch.setattr(evaluation.Pipeline, "from_pretrained", lambda *_, **__: copyist)
    options = Options(
        tmp_path / "out", clips=3, steps=(4, 8), images=2, batch=2, guidance=2, seed=7
    )
    rows = evaluate(options)
    assert list(rows) == ["ground truth", "text, 4 steps", "text, 8 steps", "image"]
    truth = rows["ground truth"]
    assert truth.keys() == {"object", "motion", "background"}
    for row in ("text, 4 steps", "text, 8 steps"):
        assert {name: rows[row][name] for name in truth} == truth
    assert rows["image"]["first_frame_psnr"] > 80, "equal bytes"
    assert json.loads((options.out / "evaluation.json").read_text()) == rows
    for name in ("text-4.png", "text-8.png", "image.png"):
        Image.open(options.out / name).verify()
    asked = [(len(r.prompt), r.steps) for r in copyist.requests if r.image is None]
    assert asked == [(2, 4), (1, 4), (2, 8), (1, 8)]
    assert all(request.guidance == 2 for request in copyist.requests)
    first_frames = [r.image for r in copyist.requests if r.image is not None]
    for index, image in enumerate(first_frames):
        pixels = render([scene(HELD_OUT + index)], frames=1)[0, 0].permute(1, 2, 0)
        assert image.tobytes() == pixels.numpy().tobytes()
    assert len(first_frames) == 2


def test_samples_of_other_seeds_and_their_seconds() -> None:
    scenes = [scene(HELD_OUT + i) for i in range(3)]
    told: list[tuple[str, int, int]] = []

    class Counter:
        """Every clip shows its scene's number; a batch of two takes 6 seconds, of one 5."""

        def __init__(self) -> None:
            self.seeds: list[int] = []

        def resolve(self, request: GenerationRequest) -> GenerationRequest:
            assert request.steps == 5
            return request

        def generate(self, request: GenerationRequest) -> list[Video]:
            self.seeds += request.seed
            timings = {"text": 0.5, "denoise": 2.5 + len(request.seed), "decode": 1.0}
            timings["denoise_step"] = 9.0  # a part of it
            clips = [np.full((9, 4, 4, 3), seed % HELD_OUT, np.uint8) for seed in request.seed]
            return [Video(clip, fps=16, timings=timings) for clip in clips]

    pipe, judge = Counter(), Reader(scenes)
    sample = evaluation.draw_sample(
        pipe,
        judge,
        scenes,
        {"steps": 5},
        repetition=2,
        batch=2,
        progress=lambda *step: told.append(step),
    )
    assert pipe.seeds == [3 * HELD_OUT + i for i in range(3)]
    assert judge.batches == [2, 1]
    assert told == [("seed 2", 2, 3), ("seed 2", 3, 3)]
    assert sample.seconds == pytest.approx(4)  # 6 / 2 and 5 / 1
    assert sample.shown.shape == (3, 9, 3, 4, 4)
    assert sample.shown[:, 0, 0, 0, 0].tolist() == [0, 1, 2]
    assert evaluation.score(sample.verdict, scenes)["object"] == 1


def test_quality_is_the_mean_over_seeds() -> None:
    scenes = [scene(HELD_OUT + i) for i in range(5)]
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(50, 4, generator=generator)
    verdicts = []
    for blind, shift in (((), 0.0), ((0, 1), 3.0)):
        verdict = Reader(scenes, blind).predict(numbered(5))
        features = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)) + shift
        verdicts.append(replace(verdict, features=features))
    row = evaluation.quality(verdicts, scenes, reference)
    first, second = row["by_seed"]
    assert (first["object"], second["object"], row["object"]) == (100, 60, 80)
    assert second["frechet"] > first["frechet"] + 20
    assert row["frechet"] == pytest.approx((first["frechet"] + second["frechet"]) / 2)
    assert row["precision"] == (first["precision"] + second["precision"]) / 2
    assert row["diversity"] == pytest.approx(6)  # (3, 3, 3, 3)
    assert evaluation.quality(verdicts[:1], scenes, reference)["diversity"] is None


def test_real_clips_are_judged_in_batches() -> None:
    scenes = [scene(HELD_OUT + i) for i in range(3)]

    class Tall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))

        def predict(self, videos: torch.Tensor) -> Verdict:
            pixels = videos[:, 0, :, 0, 0].float()
            return Verdict(pixels, pixels, pixels, pixels)

    verdict = evaluation.judge_scenes(Tall(), scenes, batch=2)
    assert torch.equal(verdict.features, render(scenes)[:, 0, :, 0, 0].float())
