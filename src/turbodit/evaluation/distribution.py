"""Measures of a set of samples, from their features: for models whose samples are not the same.

A distilled model draws other videos than its teacher from the same noise; what can be compared
is how they are distributed.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # distances to all features, for so many at a time


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians fitted to features (arXiv:1706.08500).

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr(sqrt(C1 C2)). With X and Y the features less their
    means, C1 = X^T X / (n - 1) and so on, and the last trace is the sum of the singular values
    of X Y^T, or of the triangles of their QR decompositions: no root of a singular matrix.

    Args:
        one, other: features of at least two clips each, (n, D) and (m, D).

    Raises:
        ValueError: other shapes.
    """
    _check(one, other, least=2)
    one, other = one.double(), other.double()
    mean = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    x = (one - one.mean(dim=0)) / (len(one) - 1) ** 0.5
    y = (other - other.mean(dim=0)) / (len(other) - 1) ** 0.5
    overlap = torch.linalg.svdvals(torch.linalg.qr(x).R @ torch.linalg.qr(y).R.T).sum()
    return (mean + x.square().sum() + y.square().sum() - 2 * overlap).item()


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv:1904.06991, equations 1 and 2).

    A set stands for the balls around its features that reach to their `neighbours`-th nearest
    one. Precision is the share of generated features within the real balls: are samples good?
    Recall is the share of real ones within the generated balls: is nothing left out?

    Args:
        real, generated: features (n, D) and (m, D), both of more than `neighbours` clips.

    Raises:
        ValueError: other shapes, or too few clips.
    """
    _check(real, generated, least=neighbours + 1)
    real, generated = real.double(), generated.double()
    return _share_within(generated, real, neighbours), _share_within(real, generated, neighbours)


def _share_within(features: Tensor, centres: Tensor, neighbours: int) -> float:
    """Share of `features` that lie in a ball around some of `centres`."""
    # Each centre is its own nearest, at distance 0.
    radii = torch.cat(
        [_distances(part, centres).kthvalue(neighbours + 1).values for part in centres.split(ROWS)]
    )
    inside = [(_distances(part, centres) <= radii).any(dim=1) for part in features.split(ROWS)]
    return torch.cat(inside).double().mean().item()


def _distances(one: Tensor, other: Tensor) -> Tensor:
    # By way of a matrix product, equal features would have a distance above 0.
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def diversity(features: Tensor) -> float:
    """Mean distance between the samples that one prompt gets from different seeds.

    Args:
        features: (prompts, seeds, D), at least two seeds.

    Raises:
        ValueError: another shape.
    """
    if features.ndim != 3 or len(features) < 1 or features.shape[1] < 2:
        raise ValueError(
            f"got features of shape {tuple(features.shape)}, expected (prompts, seeds, D) with "
            "at least one prompt and two seeds"
        )
    return torch.stack([torch.pdist(samples).mean() for samples in features.double()]).mean().item()


def _check(one: Tensor, other: Tensor, least: int) -> None:
    for features in (one, other):
        if features.ndim != 2 or len(features) < least:
            raise ValueError(
                f"got features of shape {tuple(features.shape)}, expected (n, D) with n of at "
                f"least {least}"
            )
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"features of {one.shape[1]} and {other.shape[1]} dimensions differ")
