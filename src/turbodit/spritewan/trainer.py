"""What the training stages of the small networks share: updates, their state, export."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from turbodit.spritewan.muon import Muon, matrices
from turbodit.spritewan.state import load_state, save_state

Metrics = dict[str, torch.Tensor]

OPTIMIZER_KEYS = ("momentum", "step", "exp_avg", "exp_avg_sq")  # of Muon, and of AdamW

Model = TypeVar("Model", bound=nn.Module)


class Trainer(Generic[Model]):
    """Updates `model` (matrices by Muon, the rest by AdamW) and averages its parameters.

    Everything needed to go on bit for bit is in `folder` after `save`; a trainer made with
    the same arguments finds it there.

    Attributes:
        step: number of updates so far.
        info: what the last `save` was given, empty for a fresh start.
    """

    def __init__(self, model: Model, folder: Path, betas: tuple[float, float], ema: float) -> None:
        self.model = model
        self.folder = folder
        self.ema_decay = ema
        self.params = list(model.parameters())
        self.average = [p.detach().clone() for p in self.params]
        weights = matrices(model)
        apart = {id(p) for p in weights}
        others = [p for p in self.params if id(p) not in apart]
        self.optimizers: list[torch.optim.Optimizer] = []
        if weights:
            self.optimizers.append(Muon(weights))
        if others:
            fused = others[0].is_cuda
            self.optimizers.append(
                torch.optim.AdamW(others, betas=betas, weight_decay=0.0, fused=fused)
            )
        self.step = 0
        self.info: dict[str, Any] = {}
        self._resume()

    def update(self, loss: torch.Tensor, lr: float) -> torch.Tensor:
        """One optimizer step down the gradient of `loss`; its norm before clipping to 1."""
        self.clear_gradients()
        loss.backward()
        return self.apply_gradients(lr)

    def clear_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def apply_gradients(self, lr: float) -> torch.Tensor:
        """One optimizer step with the gradients that are there; their norm before clipping."""
        _average_gradients(self.params)
        norm = nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        # Early averages would remember the random start: the window grows with the steps.
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - decay)
        self.step += 1
        return norm

    def averaged(self) -> Model:
        """A copy of the model with the averaged weights, in evaluation mode."""
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        for p, average in zip(model.parameters(), self.average, strict=True):
            p.copy_(average)
        return model

    def save(self, **info: Any) -> None:
        """Write the whole state; `info` is JSON and comes back as the attribute."""
        tensors: dict[str, torch.Tensor] = {}
        for (name, p), average in zip(self.model.named_parameters(), self.average, strict=True):
            tensors[f"model.{name}"] = p
            tensors[f"average.{name}"] = average
            for key, value in self._optimizer_of(p).state.get(p, {}).items():
                tensors[f"{key}.{name}"] = value
        save_state(self.folder, tensors, {"trainer_step": self.step, **info})

    @torch.no_grad()
    def _resume(self) -> None:
        loaded = load_state(self.folder)
        if loaded is None:
            return
        tensors, self.info = loaded
        self.step = self.info.pop("trainer_step")
        for (name, p), average in zip(self.model.named_parameters(), self.average, strict=True):
            p.copy_(tensors[f"model.{name}"])
            average.copy_(tensors[f"average.{name}"])
            for key in OPTIMIZER_KEYS:
                if f"{key}.{name}" in tensors:  # absent where no update has been made yet
                    # A fused optimizer counts its steps on the device, a plain one on the CPU.
                    device = "cpu" if key == "step" and not p.is_cuda else p.device
                    state = self._optimizer_of(p).state.setdefault(p, {})
                    state[key] = tensors[f"{key}.{name}"].to(device)

    def _optimizer_of(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        return next(
            optimizer
            for optimizer in self.optimizers
            if any(parameter is p for p in optimizer.param_groups[0]["params"])
        )


def _average_gradients(params: list[nn.Parameter]) -> None:
    """Each gradient becomes its mean over all processes, in one all-reduce."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(means, gradients, strict=True)])


def repeatable(
    work: Callable[[], Metrics], before: Callable[[], None], device: torch.device
) -> Callable[[], Metrics]:
    """`work`, which leaves gradients behind, as a function to call again and again.

    On a GPU it becomes a CUDA graph: started one by one, its 5,000 kernels take the CPU three
    times as long as they take the GPU. Its inputs, gradients and results then stay in place.
    `before` forgets the gradients of the last call, where that is needed.
    """
    if device.type != "cuda":

        def eager() -> Metrics:
            before()
            return work()

        return eager
    side = torch.cuda.Stream()  # CUDA graphs must not be captured from the default stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compile, choose convolution algorithms, make workspaces
            before()
            work()
    torch.cuda.current_stream().wait_stream(side)
    before()
    graph = torch.cuda.CUDAGraph()
    # Threads of other libraries, such as NCCL's, may go on calling CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        metrics = work()

    def replay() -> Metrics:
        graph.replay()
        return metrics

    return replay


def learning_rate(peak: float, step: int, warmup: int, share: float) -> float:
    """Linear warm-up over `warmup` steps; a cosine to 1 % over the `share` of the time used."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return peak * min(1.0, (step + 1) / warmup) * max(cosine, 0.01)


def save_pretrained(part: Any, folder: Path) -> None:
    """Write a part's own folder, in files of at most 15 MB, each complete before it is in place.

    `part` is any object with the `save_pretrained` of diffusers and transformers.
    """
    partial = folder.with_name(folder.name + ".partial")
    part.save_pretrained(partial, max_shard_size="15MB")
    folder.mkdir(exist_ok=True)
    for path in partial.iterdir():
        os.replace(path, folder / path.name)
    partial.rmdir()
