"""Step distillation (rCM, arXiv:2510.08431): a student of one to four steps, without guidance.

Consistency (sCM) draws the student along the teacher's guided flow, which keeps its diversity;
distribution matching (DMD), against a fake score that learns what the student makes, keeps its
samples sharp. Updates come in turns: `RCMConfig.updates_student`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from turbodit.checkpoints.stated import ATTENTION, SETTINGS
from turbodit.checkpoints.transformer import stated_use
from turbodit.config import ModelConfig
from turbodit.model.wan import WanModel
from turbodit.noise_schedule import few_step_times
from turbodit.training import losses
from turbodit.training.checkpoint import TrainState
from turbodit.training.config import RCMConfig
from turbodit.training.data import Batch
from turbodit.training.ema import PowerEMA
from turbodit.training.losses import Network
from turbodit.training.networks import (
    Conditions,
    OneSide,
    Transformer,
    conditions_of,
    guided,
)
from turbodit.training.preview import Preview, few_step_sampler
from turbodit.training.session import Session
from turbodit.training.setup import Run, open_run
from turbodit.training.times import (
    Angles,
    Intervals,
    LogNormal,
    UniformShifted,
    Within,
    random_rollout_times,
    time_of_angle,
)

TANGENTS = {
    "exact": losses.exact_tangent,
    "semi-continuous": losses.semi_continuous_tangent,
    "finite-difference": losses.finite_difference_tangent,
}
SAMPLE_STEPS = 4  # of the validation samples, and what the export states


def train(config: RCMConfig) -> None:
    """Distil, or go on, until `config.steps` updates are done; then write `<out>/transformer`, and
    of two experts the second to `<out>/transformer_2`.

    Raises:
        ValueError, FileNotFoundError: a configuration, data or model that does not fit.
        OSError: a file that cannot be written; the last complete checkpoint stays.
    """
    with open_run(config) as run:
        distillation = Distillation.of(run, config)
        student, fake = distillation.student, distillation.fake
        models = {"student": student}
        optimizers = {"student": run.adamw(student.parameters(), config.lr)}
        if fake is not None:
            models["fake"] = fake
            lr = config.lr / 5 if config.fake_lr is None else config.fake_lr
            optimizers["fake"] = run.adamw(fake.parameters(), lr)
        data = run.data()
        sources = run.sources if config.student is None else (config.student,)
        stated = {**run.folder.stated(sources), **_stated(config, run.model)}
        state = TrainState(
            models,
            optimizers,
            averages={f"{rate:g}": PowerEMA(student, rate) for rate in config.ema},
            generators={"noise": distillation.generator},
            common={} if distillation.common is None else {"experts": distillation.common},
            data=data,
            identity={
                "method": config.method,
                "model": config.model,
                "stated": json.dumps(stated),
            },
        )
        preview = Preview.of(
            run,
            few_step_sampler(SAMPLE_STEPS, config.sigma_max),
            data.latent_shape,
            distillation.teacher,
            config.guidance,
        )
        with Session(run, state, preview) as session:
            batches = iter(data)
            updates = sum(config.updates_student(step) for step in range(session.step))
            while session.unfinished:
                if config.updates_student(session.step):
                    for _ in range(config.accumulate):
                        distillation.student_backward(next(batches), session)
                    session.update("student", average_step=updates)
                    updates += 1
                else:
                    for _ in range(config.accumulate):
                        distillation.fake_backward(next(batches), session)
                    session.update("fake")
                session.advance()
            session.export(stated)


@dataclass(frozen=True)
class Distillation:
    """The networks, and the gradients that a batch leaves in them.

    Attributes:
        fake: None without DMD.
        negative: (1, text_len, text_dim).
        generator: of noise and times.
        common: of two experts, what decides which of them works.
    """

    run: Run
    config: RCMConfig
    student: Transformer
    teacher: Transformer
    fake: Transformer | None
    negative: torch.Tensor
    generator: torch.Generator
    common: torch.Generator | None

    @classmethod
    def of(cls, run: Run, config: RCMConfig) -> Distillation:
        if config.tangent != "exact" and run.dtype != torch.float32:
            raise ValueError(
                f"tangent {config.tangent!r} is a difference, which {run.dtype} rounds away; "
                "supported: dtype float32, or tangent 'exact'"
            )
        attention, settings = "sdpa", None
        if config.joint_ratio is not None:
            attention, settings = "sla", joint_settings(config, run.model)
        elif config.student is not None and _is_sparse(config.student):
            raise ValueError(
                f"{config.student} was trained with sparse-linear attention; give --joint-ratio to "
                "go on with it, or a student with dense attention"
            )

        def new_student(source: Path) -> WanModel:
            return run.spread(run.trained(config.student or source, attention, settings))

        def new_fake(source: Path) -> WanModel:
            return run.spread(run.trained(source))

        negative = config.negative_prompt
        if negative is None:
            negative = run.model.sampling.negative_prompt
        return cls(
            run,
            config,
            run.network(new_student).train(),
            run.network(run.frozen),
            run.network(new_fake) if config.uses_dmd else None,
            run.encode_text([negative]),
            run.generator(),
            None if run.boundary is None else run.common_generator(),
        )

    def student_backward(self, batch: Batch, session: Session) -> None:
        """Gradients of the consistency loss and, where it counts, of DMD, one after the other."""
        latents, conditions = self._conditions(batch)
        student = conditions.network(self.run.forward(self.student))
        teacher = self._guided_teacher(conditions)
        if self.config.uses_consistency:
            loss = self._consistency(student, teacher, latents, conditions, session)
            (loss / self.config.accumulate).backward()
        if self.config.dmd_counts(session.step):
            loss = self._dmd(student, teacher, latents, conditions, session)
            (loss / self.config.accumulate).backward()

    def fake_backward(self, batch: Batch, session: Session) -> None:
        """Gradients of the fake score's loss on the student's samples."""
        assert self.fake is not None
        latents, conditions = self._conditions(batch)
        student = conditions.network(self.run.forward(self.student))
        x0 = self._rollout(student, latents, session, with_gradient=False)
        s = self._angles(UniformShifted(self.config.shift)).sample(len(x0), self.generator)
        fake = conditions.network(self.run.forward(self.fake))
        mask = conditions.mask(latents)
        loss = losses.fake_score(fake, x0, self._noise(latents), s, mask)
        (loss.loss / self.config.accumulate).backward()
        session.metrics.add_by_time("fake_loss", loss.per_sample, time_of_angle(s))

    def _consistency(
        self,
        student: Network,
        teacher: Network,
        x0: torch.Tensor,
        conditions: Conditions,
        session: Session,
    ) -> torch.Tensor:
        config, noise, mask = self.config, self._noise(x0), conditions.mask(x0)
        if config.method == "dcm":
            t, t_next = Intervals().sample(len(x0), self.generator)
            found = losses.dcm(student, teacher, x0, noise, t, t_next, mask)
            session.metrics.add_by_time("dcm_loss", found.per_sample, t)
            return found.loss
        s = self._angles(LogNormal(config.p_mean, config.p_std)).sample(len(x0), self.generator)
        loss = losses.scm(
            student,
            teacher,
            x0,
            noise,
            s,
            warmup=config.tangent_weight(session.step),
            tangent=TANGENTS[config.tangent],
            loss_scale=config.loss_scale,
            mask=mask,
        )
        session.metrics.add_by_time("scm_tangent_norm", loss.norm, time_of_angle(s))
        session.metrics.add("scm_loss", loss.per_sample)
        session.metrics.add("scm_broken_samples", loss.skipped.double())
        return loss.loss

    def _dmd(
        self,
        student: Network,
        teacher: Network,
        latents: torch.Tensor,
        conditions: Conditions,
        session: Session,
    ) -> torch.Tensor:
        assert self.fake is not None
        x0 = self._rollout(student, latents, session, with_gradient=True)
        s = self._angles(UniformShifted(self.config.shift)).sample(len(x0), self.generator)
        loss = losses.dmd(
            x0,
            conditions.network(self.run.forward(self.fake)),
            teacher,
            self._noise(latents),
            s,
            loss_scale=self.config.dmd_scale,
            mask=conditions.mask(latents),
        )
        session.metrics.add_by_time("dmd_distance", loss.norm, time_of_angle(s))
        session.metrics.add("dmd_broken_samples", loss.skipped.double())
        return loss.loss

    def _rollout(
        self, student: Network, latents: torch.Tensor, session: Session, *, with_gradient: bool
    ) -> torch.Tensor:
        """The student's samples; 1, 2, ... steps in turns, the same number in all processes."""
        config = self.config
        steps = 1 + session.step // config.student_every % config.rollout_steps
        if config.fixed_times:
            times = few_step_times(steps, config.sigma_max)
        else:
            generator = self.common or self.generator
            times = random_rollout_times(steps, UniformShifted(config.shift), generator)
        seeds = torch.randint(
            2**62, (len(latents),), generator=self.generator, device=latents.device
        )
        generators = [torch.Generator(latents.device).manual_seed(n) for n in seeds.tolist()]
        noise = self._noise(latents)
        return losses.rollout(student, noise, times, generators, with_gradient=with_gradient)

    def _angles(self, distribution: Angles) -> Angles:
        """Those that are trained: one expert's own, or all of a batch's one expert's."""
        if self.common is None:
            return Within(distribution, *self.run.times)
        assert self.run.boundary is not None
        return OneSide(distribution, self.run.boundary, self.common)

    def _guided_teacher(self, conditions: Conditions) -> Network:
        conditional = conditions.network(self.run.forward(self.teacher))
        without = conditions.with_text(self.negative).network(self.run.forward(self.teacher))
        return guided(conditional, without, self.config.guidance)

    def _conditions(self, batch: Batch) -> tuple[torch.Tensor, Conditions]:
        return conditions_of(batch, self.run.image_share, self.generator, self.run.mesh.device)

    def _noise(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.randn(latents.shape, generator=self.generator, device=latents.device)


def _is_sparse(source: Path) -> bool:
    """Whether weights are of sparse-linear attention."""
    return stated_use(source).get(ATTENTION) in ("sla", "sagesla")


def joint_settings(config: RCMConfig, model: ModelConfig) -> dict[str, object]:
    """Of the "sla" back-end that is trained together with few steps: what the student's files
    state, at the ratio asked for."""
    settings = model.block_settings
    if config.student is not None:
        settings |= stated_use(config.student).get(SETTINGS, {})
    return settings | {"ratio": config.joint_ratio}


def _stated(config: RCMConfig, model: ModelConfig) -> dict[str, object]:
    """How the student is to be used."""
    stated: dict[str, object] = {
        "sampling": {
            "solver": "few-step",
            "steps": SAMPLE_STEPS,
            "sigma_max": config.sigma_max,
            "guidance": 1.0,
        }
    }
    if config.joint_ratio is not None:
        stated |= {"attention": "sla", "attention_settings": joint_settings(config, model)}
    return stated
