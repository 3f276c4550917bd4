"""What the training stages share: the average, the state on disk, the learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from turbodit.spritewan.trainer import Trainer, learning_rate


def make(folder: Path) -> Trainer[nn.Linear]:
    torch.manual_seed(0)
    return Trainer(nn.Linear(3, 2), folder, betas=(0.9, 0.99), ema=0.999)


def step(trainer: Trainer[nn.Linear]) -> None:
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(trainer.step))
    trainer.update(trainer.model(inputs).square().mean(), lr=0.1)


def test_average_starts_short_and_leaves_the_model_alone(tmp_path: Path) -> None:
    trainer = make(tmp_path / "state")
    start = trainer.model.weight.detach().clone()
    step(trainer)
    moved = trainer.model.weight.detach().clone()
    torch.testing.assert_close(trainer.averaged().weight, 0.1 * start + 0.9 * moved)
    assert torch.equal(trainer.model.weight, moved)


def test_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, first = make(tmp_path / "whole"), make(tmp_path / "halves")
    assert whole.info == {}
    for _ in range(4):
        step(whole)
    step(first)
    first.save(seconds=7.5)
    second = make(tmp_path / "halves")
    assert second.step == 1 and second.info == {"seconds": 7.5}
    for _ in range(3):
        step(second)
    assert torch.equal(whole.model.weight, second.model.weight)
    assert torch.equal(whole.averaged().bias, second.averaged().bias)


def test_learning_rate() -> None:
    assert learning_rate(1.0, step=4, warmup=10, share=0.0) == pytest.approx(0.5)
    assert learning_rate(1.0, step=99, warmup=10, share=0.5) == pytest.approx(0.5)
    assert learning_rate(1.0, step=99, warmup=10, share=3.0) == pytest.approx(0.01)
