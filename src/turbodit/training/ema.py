"""Averages of the weights over the course of training, by a power function (EDM2).

After t updates the average weighs update i by about (i / t)^gamma, whatever t is: its window
is always the same share of the training so far (Karras et al., arXiv:2312.02696, section 3 and
appendix C).
The share is told by the relative standard deviation of the profile, here `rate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

MAX_RATE = 12**-0.5  # of a uniform average, gamma = 0


def power_exponent(rate: float) -> float:
    """gamma of a profile with relative standard deviation `rate`.

    rate = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^-(1/2), solved as the largest real root of
    x^3 + 7 x^2 + (16 - rate^-2) x + (12 - rate^-2) = 0.

    Raises:
        ValueError: a rate outside of (0, 12^-0.5).
    """
    if not 0 < rate < MAX_RATE:
        raise ValueError(f"the rate of an average must be in (0, {MAX_RATE:.4f}), got {rate}")
    roots = np.roots([1.0, 7.0, 16.0 - rate**-2, 12.0 - rate**-2])
    return float(roots[np.isreal(roots)].real.max())


class PowerEMA:
    """The average of a model's trainable weights, in float32, sharded as they are.

    Args:
        model: whose weights are averaged; after it has been spread over devices.
        rate: relative standard deviation of the profile: 0.1 averages over the last tenth or so
            of the training.

    Raises:
        ValueError: a rate outside of (0, 12^-0.5).
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.exponent = power_exponent(rate)
        self.average = {
            name: p.detach().to(torch.float32, copy=True) for name, p in _trained(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update number `step`, counted from 0.

        The average is kept by (1 - 1 / (step + 1))^(gamma + 1): the first weights replace it.
        """
        keep = (1 - 1 / (step + 1)) ** (self.exponent + 1)
        weights = _trained(model)
        averages = [_local(average) for average in self.average.values()]
        current = [_local(weights[name]).float() for name in self.average]
        torch._foreach_lerp_(averages, current, 1 - keep)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within it `model` has the averaged weights, rounded to its dtypes; its own after it."""
        weights = _trained(model)
        own = {name: p.detach().clone() for name, p in weights.items()}
        _copy(self.average, weights)
        try:
            yield
        finally:
            _copy(own, weights)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages themselves, by the names of the weights."""
        return dict(self.average)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _local(x: torch.Tensor) -> torch.Tensor:
    """This process's shard: arithmetic on it needs no other process."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def _copy(source: dict[str, torch.Tensor], target: dict[str, nn.Parameter]) -> None:
    for name, p in target.items():
        _local(p).copy_(_local(source[name]))
