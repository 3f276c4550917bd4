"""A training run under way: updates, averages, checkpoints, log and samples, as they fall due."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from turbodit.distributed import gradient_norm
from turbodit.model.wan import WanModel
from turbodit.training.checkpoint import Checkpoints, TrainState, export_transformer
from turbodit.training.data import LatentDataset
from turbodit.training.log import Metrics, TrainLog
from turbodit.training.networks import Experts
from turbodit.training.parameters import LoRA, save_lora
from turbodit.training.setup import Run

MOST_SKIPPED = 50  # updates of a network in a row


class Session:
    """Goes on from the last checkpoint of the run, if there is one.

    Args:
        run: of the processes.
        state: its networks, of which "student" is the one that is averaged and exported.
        preview: called with the log, the step and the state when samples are due.

    Attributes:
        metrics: what the log's next entry tells.
    """

    def __init__(
        self,
        run: Run,
        state: TrainState,
        preview: Callable[[TrainLog, TrainState], None] | None = None,
    ) -> None:
        self.run, self.state, self.config = run, state, run.config
        self.metrics = Metrics(run.mesh)
        self._start = time.monotonic()
        self._time_is_up = False
        self._skipped: Counter[str] = Counter()  # of each network, in a row until now
        self._preview = preview
        self._checkpoints = Checkpoints(self.config.out / "checkpoints", run.mesh, self.config.keep)
        self._checkpoints.load(state)
        self._log = TrainLog(
            self.config.out, run.mesh, self.config.steps, state.step, self.config.wandb_project
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._log.close()
        self._checkpoints.close(together=kind is None)

    @property
    def step(self) -> int:
        """Updates so far."""
        return self.state.step

    @property
    def unfinished(self) -> bool:
        """Whether there are updates left to do, and time."""
        return self.state.step < self.config.steps and not self._time_is_up

    def update(self, name: str, average_step: int | None = None) -> None:
        """One optimizer step of a network with the gradients that are there, which are cleared.

        Where their norm is NaN or infinite nothing changes: the step is skipped and counted.

        Args:
            average_step: number of the student's update, from 0, for its averages.

        Raises:
            FloatingPointError: so it was in MOST_SKIPPED updates of the network in a row.
        """
        model, optimizer = self.state.models[name], self.state.optimizers[name]
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = gradient_norm(parameters)
        self.metrics.add(f"{name}_gradient_norm", norm)
        self.metrics.add(f"{name}_skipped", 0.0 if norm.isfinite() else 1.0)
        self._count_skipped(name, norm)
        if norm.isfinite():
            if self.config.max_grad_norm is not None:
                _shorten(parameters, self.config.max_grad_norm / norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average_step is not None:
            for average in self.state.averages.values():
                average.update(model, average_step)

    def _count_skipped(self, name: str, norm: torch.Tensor) -> None:
        self._skipped[name] = 0 if norm.isfinite() else self._skipped[name] + 1
        if self._skipped[name] >= MOST_SKIPPED:
            raise FloatingPointError(
                f"the gradient's norm of {name} is {norm.item()}, for {MOST_SKIPPED} updates in a "
                f"row until step {self.step + 1}: the run has diverged; go on from an older "
                "checkpoint at a lower rate (docs/training/troubleshooting.md)"
            )

    def advance(self) -> None:
        """End an update: log, save and sample where that is due."""
        state, config = self.state, self.config
        state.step += 1
        if not self.unfinished or state.step % config.log_every == 0:
            # The mean of all processes, so that all of them stop, or none.
            self.metrics.add("minutes", (time.monotonic() - self._start) / 60)
            if isinstance(state.data, LatentDataset):
                self.metrics.add("broken_samples", float(state.data.skipped.total()))
            found = self.metrics.take()
            self._time_is_up = config.minutes is not None and found["minutes"] >= config.minutes
            self._log.scalars(state.step, found)
        last = not self.unfinished
        if last or state.step % config.save_every == 0:
            self._checkpoints.save(state)
        due = config.sample_every is not None and state.step % config.sample_every == 0
        if self._preview is not None and config.sample_every is not None and (due or last):
            self._preview(self._log, state)

    def export(self, stated: Mapping[str, Any], lora: LoRA | None = None) -> None:
        """Write the student, its first average if it has one: the whole of it to
        `<out>/transformer`, the second of two experts to `<out>/transformer_2`; or a LoRA alone to
        `<out>/lora.safetensors`.

        Args:
            stated: of how it is to be used (`checkpoints.stated`).
            lora: that was trained.
        """
        student = self.state.models["student"]
        averages = list(self.state.averages.values())
        with averages[0].applied(student) if averages else nullcontext():
            if lora is None:
                for name, network in _by_folder(student).items():
                    folder, dtype = self.config.out / name, torch.bfloat16
                    export_transformer(network, folder, self.run.mesh, dtype, stated)
                return
            trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
            whole = {name: _whole(p) for name, p in trained.items()}
            if self.run.mesh.is_first:
                save_lora(whole, lora, self.config.out / "lora.safetensors", "diffusers", stated)


def _by_folder(student: nn.Module) -> dict[str, WanModel]:
    """Its networks, by the folders that they are written to."""
    if isinstance(student, Experts):
        return student.by_folder()
    assert isinstance(student, WanModel)
    return {"transformer": student}


def _whole(x: torch.Tensor) -> torch.Tensor:
    """A parameter on the CPU, gathered from all processes."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu()


@torch.no_grad()
def _shorten(parameters: list[nn.Parameter], factor: torch.Tensor) -> None:
    factor = factor.clamp(max=1.0)
    for p in parameters:
        assert p.grad is not None
        p.grad.mul_(factor.to(p.grad.dtype))
