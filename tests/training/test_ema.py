"""The power function average against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from turbodit.training.ema import PowerEMA, power_exponent


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.25, 0.288])
def test_exponent_gives_the_rate(rate):
    gamma = power_exponent(rate)
    assert gamma > 0
    profile = math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))
    assert profile == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("rate", [0.0, -0.1, 0.2887, 1.0])
def test_rates_that_no_profile_has(rate):
    with pytest.raises(ValueError, match="must be in"):
        power_exponent(rate)


def updated(rate: float, steps: int) -> tuple[PowerEMA, nn.Module]:
    """After weights 0, 1, 2, ... in turn."""
    model = nn.Linear(2, 1).requires_grad_(True)
    ema = PowerEMA(model, rate)
    for step in range(steps):
        for p in model.parameters():
            p.data.fill_(step)
        ema.update(model, step)
    return ema, model


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
def test_profile_has_the_rate_as_relative_deviation(rate):
    """A window of weights i: mean and spread of the profile i^gamma over 2,000 updates."""
    steps = 2000
    gamma = power_exponent(rate)
    ema, _ = updated(rate, steps)
    mean = (gamma + 1) / (gamma + 2)  # of the share of the training, weighed by i^gamma
    assert ema.average["weight"].mean().item() / steps == pytest.approx(mean, abs=2e-3)
    # The deviation, from the weights that the updates imply.
    keep = [(1 - 1 / (t + 1)) ** (gamma + 1) for t in range(steps)]
    weights, rest = [0.0] * steps, 1.0
    for t in reversed(range(steps)):
        weights[t], rest = rest * (1 - keep[t]), rest * keep[t]
    centre = sum(w * t for t, w in enumerate(weights))
    spread = math.sqrt(sum(w * (t - centre) ** 2 for t, w in enumerate(weights)))
    assert spread / steps == pytest.approx(rate, rel=0.01)


def test_first_update_forgets_the_start():
    ema, model = updated(0.1, 1)
    assert torch.equal(ema.average["weight"], model.weight)


def test_averages_are_float32_and_only_of_what_trains():
    model = nn.Linear(4, 4).bfloat16()
    model.bias.requires_grad_(False)
    ema = PowerEMA(model, 0.1)
    assert {name: x.dtype for name, x in ema.state_dict().items()} == {"weight": torch.float32}
    ema.update(model, 0)
    assert torch.equal(ema.average["weight"], model.weight.float())


def test_applied_lends_the_average_and_gives_the_weights_back():
    ema, model = updated(0.2, 10)
    own, average = model.weight.detach().clone(), ema.average["weight"].clone()
    with pytest.raises(RuntimeError, match="stop"), ema.applied(model):
        assert torch.equal(model.weight, average)
        raise RuntimeError("stop")
    assert torch.equal(model.weight, own)
    assert torch.equal(ema.average["weight"], average)
    assert not torch.equal(own, average)
