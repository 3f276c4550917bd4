"""Muon: momentum whose matrices are made orthogonal before they move the weights.

Every direction of a weight matrix then moves by about the same amount, where Adam follows
the few that dominate the gradient; small networks learn in fewer steps. The method is Keller
Jordan's (2024); the step is scaled to AdamW's size as in arXiv:2502.16982, so that both take
the same learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

# Coefficients of the quintic iteration that drives singular values towards one.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST = 16  # rows and columns from which on a matrix is worth it


class Muon(torch.optim.Optimizer):
    """For weight matrices (see `matrices`); everything else wants AdamW."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # Matrices of one shape go through the iteration together: few, large launches.
            by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.flatten(1).shape].append(p)
            for params in by_shape.values():
                self._move(params, group["lr"], group["momentum"], group["weight_decay"])

    def _move(
        self, params: list[torch.Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        momenta = [self._momentum(p) for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, momenta, momentum)  # Nesterov
        steps = orthogonalize(torch.stack([u.flatten(1) for u in ahead]))
        size = lr * 0.2 * max(steps.shape[1:]) ** 0.5
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        shaped = [s.view_as(p) for s, p in zip(steps, params, strict=True)]
        torch._foreach_add_(params, shaped, alpha=-size)

    def _momentum(self, p: torch.Tensor) -> torch.Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """(N, rows, columns) -> the same with singular values near one, by Newton-Schulz."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers and convolutions that are large enough for Muon."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        p
        for module in model.modules()
        if isinstance(module, layers)
        for name, p in module.named_parameters(recurse=False)
        if name == "weight" and min(p.flatten(1).shape) >= SMALLEST
    ]
