"""Fréchet distance, precision, recall and diversity where they can be reckoned by hand."""

from __future__ import annotations

import pytest
import torch

from turbodit.evaluation import distribution
from turbodit.evaluation.distribution import diversity, frechet_distance, precision_recall


def line(*places: float) -> torch.Tensor:
    return torch.tensor(places)[:, None]


def test_frechet_distance_of_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 20_000, 3, generator=generator, dtype=torch.float64).unbind()
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    # |m|^2 + sum (s1 - s2)^2 for two diagonal Gaussians
    scale, shift = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -2.0, 0.0])
    want = 5 + sum((s - 1) ** 2 for s in (1, 2, 3))
    assert frechet_distance(x, y * scale + shift) == pytest.approx(want, rel=0.02)
    few = frechet_distance(x[:2], y[:3])  # fewer clips than features
    assert 0 <= few < 100


def test_frechet_distance_with_the_root_of_a_matrix() -> None:
    t = torch.arange(240, dtype=torch.float64).reshape(40, 6)
    x = torch.sin(1.7 * t) + 0.1 * torch.cos(t**1.3)
    y = 1.5 * torch.cos(0.9 * t) + 0.3 + 0.2 * torch.sin(t**1.2)
    # By scipy.linalg.sqrtm of the product of numpy's covariances.
    assert frechet_distance(x, y) == pytest.approx(7.620079905607943, rel=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)


def test_precision_and_recall_count_balls() -> None:
    # With one neighbour the real balls cover [-1, 5], the generated ones [2.8, 3.2] and [9, 11].
    real, generated = line(0, 1, 2, 3, 4), line(2.9, 3.1, 9.5, 10.5)
    assert precision_recall(real, generated, neighbours=1) == (0.5, 0.2)
    assert precision_recall(generated, real, neighbours=1) == (0.2, 0.5)
    # With three they are wide enough for 3 and 4, but not for 9.5.
    assert precision_recall(real, generated)[0] == 0.5


def test_precision_and_recall_tell_quality_from_variety(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(200, 4, generator=generator)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    narrow = 0.1 * torch.randn(200, 4, generator=generator)  # good, and always the same
    precision, recall = precision_recall(real, narrow)
    assert precision > 0.95
    assert recall < 0.1
    wide = 3 * torch.randn(200, 4, generator=generator)  # everything, and much that is not real
    precision, recall = precision_recall(real, wide)
    assert precision < 0.5
    assert recall > 0.7
    monkeypatch.setattr(distribution, "ROWS", 7)  # distances in pieces
    assert precision_recall(real, wide) == (precision, recall)


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    first = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])  # distances 5, 0, 5
    second = torch.tensor([[7.0, 7.0], [7.0, 7.0], [7.0, 7.0]])
    assert diversity(first[None]) == pytest.approx(10 / 3)
    assert diversity(torch.stack([first, second])) == pytest.approx(5 / 3)
    assert diversity(torch.stack([first, second + 100])) == pytest.approx(5 / 3)


def test_too_few_or_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(3, 1\), expected \(n, D\) with n of at least 4"):
        precision_recall(line(1, 2, 3, 4), line(1, 2, 3))
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(line(1), line(1, 2))
    with pytest.raises(ValueError, match="1 and 2 dimensions"):
        frechet_distance(line(1, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="two seeds"):
        diversity(torch.zeros(5, 1, 3))
