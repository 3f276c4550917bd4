"""From the original to SageSLA, one rung at a time: seconds of denoising a video.

The first rungs take many steps of one length each, so some forward passes are measured and
multiplied; the few-step rungs are run from noise to latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image

from turbodit.benchmark import draw
from turbodit.benchmark.measure import (
    WARM_UP,
    Times,
    attempt,
    elapsed,
    free,
    milliseconds,
    peak_gib,
    reset_peak,
)
from turbodit.benchmark.modes import ORIGINAL, RATIO, Mode, build, chosen_format
from turbodit.benchmark.report import OUT_OF_MEMORY, Report, count, line, paragraphs, spread, table
from turbodit.benchmark.workload import Inputs, Workload, dtype_on
from turbodit.config import SamplingConfig
from turbodit.graph import StepGraph
from turbodit.model.wan import WanModel
from turbodit.noise_schedule import few_step_times
from turbodit.random_models import random_vae
from turbodit.sampling import few_step

FEW_STEPS = 4
REPEATS = {"cuda": 3, "cpu": 2}
VAE_SEED, SAMPLER_SEED = 1, 2
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Rung:
    """One way to make a video: `steps` steps of `passes` forward passes each.

    Attributes:
        complete: run from noise to latents, not extrapolated from some forward passes.
    """

    name: str
    mode: Mode
    steps: int
    passes: int
    complete: bool


@dataclass(frozen=True)
class Options:
    """How a ladder is measured.

    Attributes:
        repeats: measured forward passes, or complete runs of a few-step rung.
        linear: 8-bit format of the linear layers.
        graph: on a GPU, our rungs run as CUDA graphs.
        vae: measure decoding too.
    """

    repeats: int
    linear: str
    graph: bool = True
    vae: bool = True


def rungs(sampling: SamplingConfig, linear: str) -> list[Rung]:
    """The ladder of a model with these defaults."""
    passes = 1 if sampling.guidance == 1 else 2
    steps = sampling.steps
    dense = Mode("ours", linear=linear)
    sparse = Mode("ours", linear=linear, sparse=True)
    return [
        Rung("diffusers, eager", ORIGINAL, steps, passes, complete=False),
        Rung(f"fused, {linear} linears", dense, steps, passes, complete=False),
        Rung(f"{FEW_STEPS} steps without guidance", dense, FEW_STEPS, 1, complete=True),
        Rung(f"SageSLA {RATIO}", sparse, FEW_STEPS, 1, complete=True),
    ]


# What follows from measured numbers.


def extrapolated(forward: Times, rung: Rung) -> Times:
    """The time of all of a rung's forward passes, from those of some."""
    return forward.scaled(rung.steps * rung.passes)


def factors(seconds: Sequence[float | None]) -> list[dict[str, float | None]]:
    """How many times faster each is than the one before it ("previous"), and than the first.

    None where one of the two is: the measured one before that does not take its place.
    """
    found = []
    for index, own in enumerate(seconds):
        previous = seconds[index - 1] if index else None
        found.append({"previous": _quotient(previous, own), "first": _quotient(seconds[0], own)})
    return found


def _quotient(slow: float | None, fast: float | None) -> float | None:
    return None if slow is None or fast is None else round(slow / fast, 3)


def with_decoding(seconds: float | None, decoding: float | None) -> float | None:
    """Denoising and decoding together."""
    return None if seconds is None or decoding is None else round(seconds + decoding, 4)


def summary(
    measured: Sequence[tuple[Rung, Mapping[str, Any]]], decoding: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Rungs as plain values: what was measured, factors, and seconds with decoding."""
    medians = [
        numbers["seconds"]["median"] if "seconds" in numbers else None for _, numbers in measured
    ]
    decode = (decoding or {}).get("seconds", {}).get("median")
    return [
        {
            "name": rung.name,
            "steps": rung.steps,
            "passes_a_step": rung.passes,
            **numbers,
            "factor": factor,
            "with_decoding_seconds": with_decoding(seconds, decode),
        }
        for (rung, numbers), factor, seconds in zip(
            measured, factors(medians), medians, strict=True
        )
    ]


# Measuring.


@torch.no_grad()
def measure(
    workload: Workload, device: torch.device, options: Options, tell: Tell
) -> dict[str, Any]:
    """All numbers as plain values."""
    measured: list[tuple[Rung, Mapping[str, Any]]] = []
    for rung in rungs(workload.model.sampling, options.linear):
        tell(f"ladder: {rung.name}")
        free()
        found = attempt(partial(climb, rung, workload, device, options))
        found = found or {"state": OUT_OF_MEMORY}
        tell(f"ladder: {rung.name}: {line(found, digits=4)}")
        measured.append((rung, found))
    decoding = None
    if options.vae:
        tell("ladder: VAE")
        free()
        decoding = attempt(partial(decode, workload, device, options.repeats))
        decoding = decoding or {"state": OUT_OF_MEMORY}
    return workload.summary() | {
        "repeats": options.repeats,
        "linear": options.linear,
        "rungs": summary(measured, decoding),
        "decoding": decoding,
        "experts_held": 1,
        "experts": workload.model.experts,
    }


def climb(rung: Rung, workload: Workload, device: torch.device, options: Options) -> dict[str, Any]:
    """Measure one rung; peak memory is that of the DiT with its weights."""
    network: Callable[..., torch.Tensor]
    network = model = build(rung.mode, workload.model, device)
    inputs = Inputs.of(workload, device, dtype_on(device)).encoded(model)
    held: StepGraph | None = None
    if options.graph and device.type == "cuda" and isinstance(model, WanModel):
        network = held = StepGraph(model)
    step = inputs.step(network)
    step()  # compiles, and records a graph
    reset_peak(device)
    warm_up = WARM_UP[device.type] - 1
    forward = milliseconds(step, device, options.repeats, warm_up).scaled(1e-3)
    found = {"state": "measured", "forward_seconds": forward.summary(6)}
    if rung.complete:
        sample = sampler(rung, inputs, workload, network)
        if device.type == "cuda":
            sample()  # warms up what the forward pass does not run
        total = Times.of([elapsed(sample, device) for _ in range(options.repeats)])
        how = count(total.n, "complete run")
    else:
        total = extrapolated(forward, rung)
        passes = "pass" if forward.n == 1 else "passes"
        how = f"extrapolated from {forward.n} measured forward {passes}"
    return found | {"seconds": total.summary(), "how": how, "peak_gib": peak_gib(device, held)}


def sampler(
    rung: Rung, inputs: Inputs, workload: Workload, network: Callable[..., torch.Tensor]
) -> Callable[[], torch.Tensor]:
    """The few-step sampler's whole loop, from noise to latents."""
    times = few_step_times(rung.steps, workload.model.sampling.sigma_max)
    velocity = inputs.velocity(network)

    def sample() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(SAMPLER_SEED)]
        return few_step(velocity, inputs.noise, times, generators=generators)

    return sample


def decode(workload: Workload, device: torch.device, repeats: int) -> dict[str, Any]:
    """Decode random latents with a random VAE."""
    vae = random_vae(workload.model, device=device, dtype=dtype_on(device))
    shape = workload.model.latent_shape(workload.frames, workload.height, workload.width)
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(VAE_SEED)).to(device)

    def run() -> None:
        for _ in vae.decode_chunks(latents):
            pass

    run()
    reset_peak(device)
    times = Times.of([elapsed(run, device) for _ in range(repeats)])
    return {"state": "measured", "seconds": times.summary(), "peak_gib": peak_gib(device)}


# What is written.


def report(
    workload: Workload, device: torch.device, options: Options | None = None, tell: Tell = print
) -> Report:
    """Measure the ladder and describe it."""
    options = options or Options(REPEATS[device.type], chosen_format(None, device))
    numbers = measure(workload, device, options, tell)
    return Report("ladder", workload.label, numbers, markdown(numbers), picture(numbers, workload))


def markdown(numbers: Mapping[str, Any]) -> str:
    """The rungs, and what decoding adds."""
    header = (
        "",
        "steps x passes",
        "forward pass, s",
        "denoising, s",
        "",
        "x previous",
        "x first",
        "peak memory, GiB",
        "with VAE, s",
    )
    experts = numbers["experts"]
    return paragraphs(
        f"Seconds of denoising one video, {numbers['tokens']:,} tokens. Times are minimum / median "
        "/ maximum. Text encoding is not part of it.",
        table(header, (_cells(rung) for rung in numbers["rungs"])),
        _decoding(numbers["decoding"]),
        f"Memory is that of one of the {experts} experts." if experts > 1 else "",
    )


def _decoding(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["state"] == OUT_OF_MEMORY:
        return f"VAE decoding: {OUT_OF_MEMORY}."
    memory = "" if found["peak_gib"] is None else f", {found['peak_gib']:.2f} GiB"
    return f"VAE decoding: {spread(found['seconds'])} s{memory}."


def _cells(rung: Mapping[str, Any]) -> list[Any]:
    steps = f"{rung['steps']} x {rung['passes_a_step']}"
    if rung["state"] == OUT_OF_MEMORY:
        return [rung["name"], steps, OUT_OF_MEMORY, *[None] * 6]
    together = rung["with_decoding_seconds"]
    return [
        rung["name"],
        steps,
        spread(rung["forward_seconds"], 4),
        spread(rung["seconds"]),
        rung["how"],
        *(_factor(rung["factor"][name]) for name in ("previous", "first")),
        rung["peak_gib"],
        None if together is None else f"{together:.2f}",
    ]


def _factor(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def picture(numbers: Mapping[str, Any], workload: Workload) -> Image.Image:
    """Median seconds as bars on a logarithmic scale."""
    rows = []
    for rung in numbers["rungs"]:
        if rung["state"] == OUT_OF_MEMORY:
            rows.append(draw.Bar(rung["name"], None, OUT_OF_MEMORY))
            continue
        seconds, factor = rung["seconds"]["median"], rung["factor"]["first"]
        text = f"{seconds:,.2f} s" if seconds < 100 else f"{seconds:,.0f} s"
        if factor not in (None, 1.0):
            text += f"   {factor:.1f} x faster"
        rows.append(draw.Bar(rung["name"], seconds, text))
    return draw.bars(f"Denoising a video, seconds: {workload.label}", rows, log=True)
