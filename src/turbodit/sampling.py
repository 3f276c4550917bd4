"""Samplers: from noise to clean latents, given a velocity.

A sampler is a function of a velocity, a state and a schedule. What the velocity is made
of (guidance, two experts, a clean first frame) is put together outside, by the small
combinators below, so that every sampler has it all.

A velocity is a callable (latents (B, C, T, H, W), t) -> noise - x0 of the same shape, for
latents (1 - t) x0 + t noise at rectified-flow time t, a Python float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

Velocity = Callable[[torch.Tensor, float], torch.Tensor]
StepCallback = Callable[[int, int], None]  # (steps done, steps in all)
MultistepSolver = Literal["unipc", "euler", "dpm++"]

TIMESTEPS = 1000  # of the training schedule that diffusers' schedulers count in


def gaussian_noise(
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str
) -> torch.Tensor:
    """Standard normal noise (B, *shape), float32, sample i drawn from generators[i] alone.

    A sample does not depend on its neighbours in the batch. Generators of the CPU give every
    device the same noise; those of a GPU are faster, for training.
    """
    rows = [
        torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float32)
        for generator in generators
    ]
    return torch.stack(rows).to(device)


def guide(conditional: Velocity, unconditional: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance (arXiv:2207.12598): v_u + guidance * (v_c - v_u).

    At guidance 1 that is v_c, and the unconditional velocity is never computed.
    """
    if guidance == 1:
        return conditional

    def guided(latents: torch.Tensor, t: float) -> torch.Tensor:
        v_c = conditional(latents, t)
        v_u = unconditional(latents, t)
        return v_u + guidance * (v_c - v_u)

    return guided


def switch_experts(high_noise: Velocity, low_noise: Velocity, boundary: float) -> Velocity:
    """The high-noise expert while t >= boundary, the low-noise expert after (Wan 2.2)."""

    def switched(latents: torch.Tensor, t: float) -> torch.Tensor:
        expert = high_noise if t >= boundary else low_noise
        return expert(latents, t)

    return switched


def few_step(
    velocity: Velocity,
    noise: torch.Tensor,
    times: Sequence[float],
    *,
    generators: Sequence[torch.Generator],
    ode: bool = False,
    on_step: StepCallback | None = None,
) -> torch.Tensor:
    """Sample a consistency model in a few steps (rCM, arXiv:2510.08431).

    A step from t to t' estimates the clean latents x - t v and mixes them with fresh noise
    to the level t' (`ode`: follows v to t' instead). The state is float64.

    Args:
        noise: standard normal, (B, C, T, H, W), any float dtype.
        times: falling rectified-flow times that end in 0 (`noise_schedule.few_step_times`).
        generators: one per sample, for the fresh noise.

    Returns:
        Clean latents, (B, C, T, H, W) float32.
    """
    x = times[0] * noise.double()
    for step, (t, t_next) in enumerate(pairwise(times), start=1):
        v = velocity(x, t).double()
        if ode:
            x = x - (t - t_next) * v
        else:
            x = (1 - t_next) * (x - t * v)
            if t_next > 0:
                fresh = gaussian_noise(x.shape[1:], generators, x.device)
                x = x + t_next * fresh.double()
        if on_step is not None:
            on_step(step, len(times) - 1)
    return x.float()


def solver_sample(
    velocity: Velocity,
    noise: torch.Tensor,
    *,
    solver: MultistepSolver,
    steps: int,
    shift: float,
    on_step: StepCallback | None = None,
) -> torch.Tensor:
    """Integrate the probability-flow ODE with one of diffusers' schedulers, in float32.

    Args:
        noise: standard normal, (B, C, T, H, W).
        solver: "unipc" (arXiv:2302.04867), "dpm++" (arXiv:2211.01095) or "euler".
        shift: of the times towards noise (`noise_schedule.shift_time`).

    Returns:
        Clean latents, (B, C, T, H, W) float32.
    """
    scheduler = _scheduler(solver, shift)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # large shifts round neighbouring timesteps to one integer
    x = noise.float()
    for step, timestep in enumerate(scheduler.timesteps, start=1):
        v = velocity(x, timestep.item() / TIMESTEPS).float()
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
        if on_step is not None:
            on_step(step, steps)
    return x


def _scheduler(solver: MultistepSolver, shift: float) -> SchedulerMixin:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if solver == "unipc":
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        return UniPCMultistepScheduler(num_train_timesteps=TIMESTEPS, **flow)
    if solver == "dpm++":
        from diffusers.schedulers.scheduling_dpmsolver_multistep import (
            DPMSolverMultistepScheduler,
        )

        return DPMSolverMultistepScheduler(num_train_timesteps=TIMESTEPS, **flow)
    if solver == "euler":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
            FlowMatchEulerDiscreteScheduler,
        )

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=shift)
    raise ValueError(f"unknown solver {solver!r}; supported: unipc, euler, dpm++, few-step")
