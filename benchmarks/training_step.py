"""What an update costs at full size, with random weights, on one GPU or on several.

    python benchmarks/training_step.py --model Wan2.1-T2V-1.3B
    torchrun --nproc-per-node 2 benchmarks/training_step.py --model Wan2.1-T2V-1.3B
    torchrun --nproc-per-node 4 benchmarks/training_step.py --model Wan2.1-T2V-14B \
        --parts sla --no-master-weights

One sample, of the model's first size if none is given; products in bfloat16, block-wise
checkpointing. One process compiles the blocks; several share the sample's tokens (Ulysses) and the
weights (FSDP2). Networks, casts and optimizers are those of a training run.

Parts: "sla", white-box fine-tuning; "dense", plain training; "rcm", its parts timed apart, with
two-step roll-outs. Prints a line for each measurement and writes benchmarks/results/. Weights,
noise and times do not depend on the number of processes, so neither do losses, but for rounding.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro

from turbodit.batch import parse_size
from turbodit.benchmark.report import environment
from turbodit.checkpoints import ModelFolder
from turbodit.config import ModelConfig, preset
from turbodit.distributed import Mesh, join, leave
from turbodit.model.wan import WanModel
from turbodit.plan.inference import check_size
from turbodit.random_models import random_transformer
from turbodit.training import losses
from turbodit.training.config import TrainConfig
from turbodit.training.losses import DirectedLoss, Loss, Network
from turbodit.training.networks import Conditions, guided
from turbodit.training.setup import Run
from turbodit.training.times import LogNormal, UniformShifted, random_rollout_times, time_of_angle

ROLLOUT_STEPS = 2
PROMPT_TOKENS = 128
NO_FILES = Path("random")

Numbers = dict[str, torch.Tensor]  # of one value each


class RandomRun(Run):
    """A run whose networks are drawn from their names, the same in all processes."""

    @classmethod
    def of(
        cls, model: ModelConfig, mesh: Mesh, dtype: torch.dtype, *, master_weights: bool = True
    ) -> RandomRun:
        config = TrainConfig(
            model=model.name, master_weights=master_weights, context=mesh.context, image_share=0
        )
        return cls(config, mesh, ModelFolder(NO_FILES), model, dtype, NO_FILES, (0.0, 1.0))

    def student(self, attention: str = "sdpa", **settings: Any) -> WanModel:
        return self.spread(self.trained(self.source, attention, settings))

    def teacher(self) -> WanModel:
        return self.frozen(self.source)

    def _load(self, source: Path, dtype: torch.dtype, attention: str, settings: Any) -> WanModel:
        """On this process's GPU, where only one network is whole at a time."""
        collect(self.mesh.device)
        return random_transformer(
            self.model.transformer,
            device=self.mesh.device,
            dtype=dtype,
            attention=attention,
            attention_settings=settings,
        )


@dataclass
class Bench:
    """A run, its inputs and what was measured.

    Attributes:
        size: width and height in pixels, frames.
        repeats: measured calls, after one that is not.
    """

    run: RandomRun
    size: tuple[int, int, int]
    repeats: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device, model = self.run.mesh.device, self.run.model
        self.generator = self.run.generator()
        width, height, frames = self.size
        self.x0 = self.normal(1, *model.latent_shape(frames, height, width))
        shape = model.transformer
        context = self.normal(1, shape.text_len, shape.text_dim).to(self.run.dtype)
        context[:, PROMPT_TOKENS:] = 0
        self.conditions = Conditions(context)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def noise(self) -> torch.Tensor:
        return self.normal(*self.x0.shape)

    def sla_time(self) -> torch.Tensor:
        return time_of_angle(LogNormal(1.5, 1.6).sample(1, self.generator))

    def velocity(self, model: WanModel, conditions: Conditions | None = None) -> Network:
        return (conditions or self.conditions).network(self.run.forward(model))

    def adamw(self, model: WanModel) -> torch.optim.AdamW:
        return self.run.adamw(model.parameters(), self.run.config.lr)

    def measure(self, name: str, call: Callable[[], Numbers]) -> None:
        """Numbers of all calls, seconds of all but the first, which compiles, and most memory of
        the last in any process."""
        collect(self.device)
        seconds, numbers, peak = [], [], 0.0
        for _ in range(self.repeats + 1):
            most_memory(self.device)
            start = time.perf_counter()
            numbers.append(call())
            peak = most_memory(self.device)
            seconds.append(round(time.perf_counter() - start, 3))
        row = {"what": name, "s": seconds[1:], "peak_gib": round(self.largest(peak), 2)}
        row |= {key: [each[key].item() for each in numbers] for key in numbers[0]}
        self.rows.append(row)
        if self.run.mesh.is_first:
            print(json.dumps(row), flush=True)

    def largest(self, value: float) -> float:
        """Of all processes."""
        found = torch.tensor(value, device=self.device)
        if self.run.mesh.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()


def update(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Loss | DirectedLoss]
) -> Callable[[], Numbers]:
    """One optimizer step down `loss`."""

    def step() -> Numbers:
        found = loss()
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        norm = {"norm": found.norm} if isinstance(found, DirectedLoss) else {}
        return {"loss": found.loss.detach(), **norm}

    return step


def most_memory(device: torch.device) -> float:
    """GiB that were in use at once since the last call, all work being done; on a CPU 0."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    most = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return most


def collect(device: torch.device) -> None:
    """Free what nobody uses any more: networks refer to themselves."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def sla(bench: Bench) -> None:
    """White-box fine-tuning at a ratio of 0.1."""
    # The student first: it may be stored in float32, and is whole before it is sharded.
    student_model = bench.run.student("sla", ratio=0.1)
    teacher = bench.velocity(bench.run.teacher())
    student = bench.velocity(student_model)

    def white_box() -> Loss:
        return losses.white_box(student, teacher, bench.x0, bench.noise(), bench.sla_time())

    bench.measure("SLA, white-box", update(bench.adamw(student_model), white_box))


def dense(bench: Bench) -> None:
    """Plain training with dense attention."""
    model = bench.run.student()
    network = bench.velocity(model)

    def black_box() -> Loss:
        return losses.black_box(network, bench.x0, bench.noise(), bench.sla_time())

    bench.measure("dense, black-box", update(bench.adamw(model), black_box))


def rcm(bench: Bench) -> None:
    """The tangent alone, and updates by sCM, by DMD, and of the fake score."""
    student_model, fake_model = bench.run.student(), bench.run.student()
    student, fake = bench.velocity(student_model), bench.velocity(fake_model)
    teacher_model = bench.run.teacher()
    without = bench.conditions.with_text(torch.zeros_like(bench.conditions.context))
    unconditional = bench.velocity(teacher_model, without)
    teacher = guided(bench.velocity(teacher_model), unconditional, guidance=5.0)
    generators = [torch.Generator(bench.device).manual_seed(1)]
    angle = partial(LogNormal(0.7, 1.6).sample, 1, bench.generator)
    shifted = UniformShifted(5.0)

    @torch.no_grad()
    def tangent() -> Numbers:
        x, weight = bench.noise().double(), bench.x0.new_ones(1, 1, 1, 1, 1).double()
        _, found = losses.exact_tangent(losses.trigflow(student), x, angle(), x, weight)
        return {"norm": torch.linalg.vector_norm(found)}

    def rollout(gradient: bool) -> torch.Tensor:
        times = random_rollout_times(ROLLOUT_STEPS, shifted, bench.generator)
        return losses.rollout(student, bench.noise(), times, generators, with_gradient=gradient)

    def scm() -> DirectedLoss:
        return losses.scm(student, teacher, bench.x0, bench.noise(), angle())

    def dmd() -> DirectedLoss:
        x0, s = rollout(gradient=True), shifted.sample(1, bench.generator)
        return losses.dmd(x0, fake, teacher, bench.noise(), s)

    def fake_score() -> Loss:
        x0, s = rollout(gradient=False), shifted.sample(1, bench.generator)
        return losses.fake_score(fake, x0, bench.noise(), s)

    bench.measure("rCM: tangent alone", tangent)
    optimizer = bench.adamw(student_model)
    bench.measure("rCM: sCM", update(optimizer, scm))
    bench.measure("rCM: DMD", update(optimizer, dmd))
    bench.measure("rCM: fake score", update(bench.adamw(fake_model), fake_score))


PARTS: dict[str, Callable[[Bench], None]] = {"sla": sla, "dense": dense, "rcm": rcm}


def write(bench: Bench, parts: str) -> Path:
    """All rows so far, in benchmarks/results/, under a name that says what was measured."""
    run, size, found = bench.run, "x".join(map(str, bench.size)), environment(bench.device)
    gpus, master_weights = run.mesh.size, run.config.master_weights
    words = [date.today(), found["device"], "training-step", run.model.name, size]
    words += [parts] * (parts != "all") + ["no-master-weights"] * (not master_weights)
    words += [f"{gpus}-gpus"] * (gpus > 1)
    name = "-".join(map(str, words)).lower().replace(" ", "-")
    path = Path(__file__).parent / "results" / f"{name}.json"
    found |= {"model": run.model.name, "size": size, "batch": 1, "gpus": gpus}
    found |= {"context": run.mesh.context, "master_weights": master_weights, "rows": bench.rows}
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(unfinished, path)
    return path


def main(
    model: str = "Wan2.1-T2V-1.3B",
    parts: Literal["sla", "dense", "rcm", "all"] = "all",
    master_weights: bool = True,
    size: str | None = None,
    frames: int | None = None,
    repeats: int = 3,
) -> None:
    """Measure and write.

    Args:
        parts: what to measure.
        master_weights: store weights that are trained in float32, else as they are multiplied.
        size: W*H in pixels. None: the model's first.
        frames: None: the model's own number.
        repeats: measured calls of each update.
    """
    config = preset(model)
    first = next(iter(next(iter(config.sizes.values())).values()))
    width, height = first if size is None else parse_size(size)
    frames = frames or config.frames
    check_size(config, width, height, frames)
    mesh = join("cuda", context=int(os.environ.get("WORLD_SIZE", "1")))  # as torchrun says
    run = RandomRun.of(config, mesh, torch.bfloat16, master_weights=master_weights)
    bench = Bench(run, (width, height, frames), repeats)
    for part in PARTS if parts == "all" else [parts]:
        bench.generator.manual_seed(0)  # a part's losses are the same without those before it
        PARTS[part](bench)
        if mesh.is_first:
            print(write(bench, parts))
    leave()


if __name__ == "__main__":
    tyro.cli(main)
