"""Samples of a network while it trains: the same prompts and noise each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from turbodit.noise_schedule import few_step_times
from turbodit.sampling import Velocity, few_step, gaussian_noise, guide, solver_sample
from turbodit.training.checkpoint import TrainState
from turbodit.training.log import TrainLog
from turbodit.training.networks import Transformer
from turbodit.training.setup import Run
from turbodit.vae import VideoVAE, to_frames

# (conditional velocity, unconditional, noise (B, C, T, H, W), generators) -> latents
Sampler = Callable[[Velocity, Velocity, torch.Tensor, list[torch.Generator]], torch.Tensor]


class Preview:
    """Shows what the student, its averages and the teacher make of the run's prompts.

    All processes sample, as a spread network needs them; the first one decodes. Models that
    cannot do without an image have no previews.

    Args:
        run: of the processes.
        sampler: the student's, from noise to latents.
        latent_shape: (C, T, H, W).
        teacher: shown once, as it does not change, by its own sampler.
        guidance: of the teacher.
    """

    def __init__(
        self,
        run: Run,
        sampler: Sampler,
        latent_shape: tuple[int, ...],
        teacher: Transformer | None = None,
        guidance: float = 1.0,
    ) -> None:
        self.run, self.sampler, self.shape = run, sampler, latent_shape
        self.teacher, self.guidance = teacher, guidance
        prompts = run.config.prompts
        self.context = run.encode_text(prompts)
        self.negative = run.encode_text([run.model.sampling.negative_prompt])
        self.negative = self.negative.expand_as(self.context)
        self.vae = VideoVAE.from_pretrained(run.folder.vae, run.dtype, run.mesh.device)

    @classmethod
    def of(cls, run: Run, *args: Any, **kwargs: Any) -> Preview | None:
        """A preview of these arguments; None where there is nothing to show."""
        wanted = run.config.prompts and run.config.sample_every is not None
        able = run.model.task in ("t2v", "ti2v")
        return cls(run, *args, **kwargs) if wanted and able else None

    def __call__(self, log: TrainLog, state: TrainState) -> None:
        student = state.models["student"]
        assert isinstance(student, Transformer)
        self.show(log, state.step, "student", student, self.sampler)
        for name, average in state.averages.items():
            with average.applied(student):
                self.show(log, state.step, f"average-{name}", student, self.sampler)
        if self.teacher is not None:
            sampler = own_sampler(self.run, self.guidance)
            self.show(log, state.step, "teacher", self.teacher, sampler)
            self.teacher = None

    @torch.no_grad()
    def show(
        self, log: TrainLog, step: int, name: str, model: Transformer, sampler: Sampler
    ) -> None:
        """Sample `model` and add the videos to the log."""
        generators = [torch.Generator().manual_seed(n) for n in range(len(self.context))]
        noise = gaussian_noise(self.shape, generators, self.run.mesh.device)
        latents = sampler(
            self._velocity(model, self.context), self._velocity(model, self.negative), noise,
            generators,
        )  # fmt: skip
        if self.run.mesh.is_first:
            log.videos(step, name, self._decode(latents), self.run.model.fps)

    def _velocity(self, model: Transformer, context: torch.Tensor) -> Velocity:
        forward = self.run.forward(model)

        def velocity(latents: torch.Tensor, t: float) -> torch.Tensor:
            times = latents.new_full((len(latents),), t, dtype=torch.float64)
            return forward(latents, times, context).float()

        return velocity

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        """(B, T, H, W, 3) uint8"""
        clips = []
        for sample in latents.split(1):
            chunks = [to_frames(chunk[0]) for chunk in self.vae.decode_chunks(sample)]
            clips.append(np.concatenate(chunks))
        return np.stack(clips)


def own_sampler(run: Run, guidance: float) -> Sampler:
    """That of the run's teacher: few steps if it was distilled, or a solver, with guidance."""
    sampling = run.model.sampling
    if sampling.solver == "few-step":
        return few_step_sampler(sampling.steps, sampling.sigma_max)

    def sample(
        conditional: Velocity,
        unconditional: Velocity,
        noise: torch.Tensor,
        generators: list[torch.Generator],
    ) -> torch.Tensor:
        return solver_sample(
            guide(conditional, unconditional, guidance),
            noise,
            solver="unipc",
            steps=sampling.steps,
            shift=sampling.shift,
        )

    return sample


def few_step_sampler(steps: int, sigma_max: float) -> Sampler:
    """The few-step sampler, without guidance."""

    def sample(
        conditional: Velocity,
        unconditional: Velocity,
        noise: torch.Tensor,
        generators: list[torch.Generator],
    ) -> torch.Tensor:
        times = few_step_times(steps, sigma_max)
        return few_step(conditional, noise, times, generators=generators)

    return sample
