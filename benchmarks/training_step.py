"""What an update costs at full size, with random weights, on one GPU.

    python benchmarks/training_step.py --model Wan2.1-T2V-1.3B

One sample of the model's first size, float32 master weights, products in bfloat16, block-wise
checkpointing, compiled blocks. The parts of rCM are timed apart, with two-step roll-outs. Prints
a line for each and writes benchmarks/results/.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from turbodit.config import preset
from turbodit.distributed import checkpoint_blocks
from turbodit.model.wan import WanModel
from turbodit.random_models import random_transformer
from turbodit.training import losses
from turbodit.training.compiled import compile_blocks
from turbodit.training.losses import Network
from turbodit.training.networks import Conditions, guided
from turbodit.training.times import (
    LogNormal,
    UniformShifted,
    random_rollout_times,
    time_of_angle,
)

HALF = torch.bfloat16
ROLLOUT_STEPS = 2
PROMPT_TOKENS = 128


@dataclass
class Bench:
    """One model's networks and inputs."""

    model: str
    repeats: int

    def __post_init__(self) -> None:
        config = preset(self.model)
        self.device, self.shape = torch.device("cuda"), config.transformer
        self.generator = torch.Generator(self.device).manual_seed(0)
        width, height = next(iter(next(iter(config.sizes.values())).values()))
        self.size = f"{width}x{height}x{config.frames}"
        self.x0 = self.normal(1, *config.latent_shape(config.frames, height, width))
        context = self.normal(1, self.shape.text_len, self.shape.text_dim).to(HALF)
        context[:, PROMPT_TOKENS:] = 0
        self.conditions = Conditions(context)
        self.rows: list[dict[str, Any]] = []

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def noise(self) -> torch.Tensor:
        return self.normal(*self.x0.shape)

    def network(self, *, train: bool, attention: str = "sdpa", **settings: Any) -> WanModel:
        model = random_transformer(
            self.shape,
            device=self.device,
            dtype=torch.float32 if train else HALF,
            attention=attention,
            attention_settings=settings,
        )
        model.requires_grad_(train)
        if train:
            checkpoint_blocks(model, "block")
            compile_blocks(model)
        return model

    def velocity(self, model: WanModel, conditions: Conditions | None = None) -> Network:
        casts = model.patch_embedding.weight.dtype != HALF

        def forward(latents: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
            with torch.autocast("cuda", HALF, enabled=casts):
                return model(latents.to(HALF), *others)

        return (conditions or self.conditions).network(forward)

    def update(self, model: WanModel, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        """One optimizer step down `loss`."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

        def step() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def measure(self, name: str, call: Callable[[], None]) -> None:
        """Seconds of each call after the first, which compiles, and most memory."""
        seconds = []
        for _ in range(self.repeats + 1):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            seconds.append(round(time.perf_counter() - start, 3))
        peak = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.rows.append({"what": name, "s": seconds[1:], "peak_gib": peak})
        print(json.dumps(self.rows[-1]), flush=True)


def sla(bench: Bench) -> None:
    """White-box fine-tuning at a ratio of 0.1, beside plain training with dense attention."""
    teacher = bench.velocity(bench.network(train=False))

    def time_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
        return bench.noise(), time_of_angle(LogNormal(1.5, 1.6).sample(1, bench.generator))

    student = bench.network(train=True, attention="sla", ratio=0.1)

    def white_box() -> torch.Tensor:
        noise, t = time_and_noise()
        return losses.white_box(bench.velocity(student), teacher, bench.x0, noise, t).loss

    bench.measure("SLA, white-box", bench.update(student, white_box))
    dense = bench.network(train=True)

    def black_box() -> torch.Tensor:
        noise, t = time_and_noise()
        return losses.black_box(bench.velocity(dense), bench.x0, noise, t).loss

    bench.measure("dense, black-box", bench.update(dense, black_box))


def rcm(bench: Bench) -> None:
    """The tangent alone, and updates by sCM, by DMD, and of the fake score."""
    student_model, fake_model = bench.network(train=True), bench.network(train=True)
    student, fake = bench.velocity(student_model), bench.velocity(fake_model)
    teacher_model = bench.network(train=False)
    without = bench.conditions.with_text(torch.zeros_like(bench.conditions.context))
    teacher = guided(
        bench.velocity(teacher_model), bench.velocity(teacher_model, without), guidance=5.0
    )
    generators = [torch.Generator(bench.device).manual_seed(1)]
    angle = partial(LogNormal(0.7, 1.6).sample, 1, bench.generator)
    shifted = UniformShifted(5.0)

    @torch.no_grad()
    def tangent() -> None:
        x, weight = bench.noise().double(), torch.ones(1, 1, 1, 1, 1, device=bench.device)
        losses.exact_tangent(losses.trigflow(student), x, angle(), x, weight.double())

    def rollout(*, with_gradient: bool) -> torch.Tensor:
        times = random_rollout_times(ROLLOUT_STEPS, shifted, bench.generator)
        return losses.rollout(
            student, bench.noise(), times, generators, with_gradient=with_gradient
        )

    def scm() -> torch.Tensor:
        return losses.scm(student, teacher, bench.x0, bench.noise(), angle()).loss

    def dmd() -> torch.Tensor:
        x0, s = rollout(with_gradient=True), shifted.sample(1, bench.generator)
        return losses.dmd(x0, fake, teacher, bench.noise(), s).loss

    def fake_score() -> torch.Tensor:
        x0, s = rollout(with_gradient=False), shifted.sample(1, bench.generator)
        return losses.fake_score(fake, x0, bench.noise(), s).loss

    bench.measure("rCM: tangent alone", tangent)
    bench.measure("rCM: sCM", bench.update(student_model, scm))
    bench.measure("rCM: DMD", bench.update(student_model, dmd))
    bench.measure("rCM: fake score", bench.update(fake_model, fake_score))


def main(model: str = "Wan2.1-T2V-1.3B", repeats: int = 3) -> None:
    """Measure and write."""
    bench = Bench(model, repeats)
    sla(bench)
    torch.cuda.empty_cache()
    rcm(bench)
    device = torch.cuda.get_device_name()
    name = f"{date.today()}-{device}-training-step-{model}-{bench.size}".lower().replace(" ", "-")
    path = Path(__file__).parent / "results" / f"{name}.json"
    numbers = {"device": device, "torch": torch.__version__, "model": model, "size": bench.size}
    path.write_text(json.dumps(numbers | {"batch": 1, "rows": bench.rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    tyro.cli(main)
