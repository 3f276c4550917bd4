"""Evaluation: accuracies weighted by clips, and the table that a perfect generator would get."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

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


def test_frechet_distance_of_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 20_000, 3, generator=generator, dtype=torch.float64).unbind()
    assert evaluation.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    # |m|^2 + sum (s1 - s2)^2 for two diagonal Gaussians
    scale, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -2.0, 0.0])
    want = 5 + sum((s - 1) ** 2 for s in (1, 2, 3))
    assert evaluation.frechet_distance(x, y * scale + shift) == pytest.approx(want, rel=0.02)
    few = evaluation.frechet_distance(x[:2], y[:3])  # fewer clips than features
    assert 0 <= few < 100
