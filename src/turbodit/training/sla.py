"""Fine-tuning a Wan DiT for sparse-linear attention (SLA, arXiv:2509.24006, section 5).

The student is the teacher with SLA in every self attention. White-box: it learns the teacher's
velocity on the data's latents; black-box: the diffusion target noise - x0 itself.
"""

from __future__ import annotations

import json

import torch

from turbodit.attention import SparseLinearAttention
from turbodit.checkpoints.transformer import stated_use
from turbodit.model.wan import WanModel
from turbodit.training import losses
from turbodit.training.checkpoint import TrainState
from turbodit.training.config import SLAConfig
from turbodit.training.data import Batch
from turbodit.training.ema import PowerEMA
from turbodit.training.networks import conditions_of
from turbodit.training.parameters import LoRA, Part, select_trainable
from turbodit.training.preview import Preview, guided_solver
from turbodit.training.session import Session
from turbodit.training.setup import Run, open_run
from turbodit.training.times import LogNormal, Within, time_of_angle


def train(config: SLAConfig) -> None:
    """Train, or go on, until `config.steps` updates are done; then write `<out>/transformer`.

    Raises:
        ValueError, FileNotFoundError: a configuration, data or model that does not fit.
        OSError: a file that cannot be written; the last complete checkpoint stays.
    """
    with open_run(config) as run:
        settings = config.attention_settings(run.model)
        stated = {**stated_use(run.source), "attention": "sla", "attention_settings": settings}
        student = run.trained(run.source, "sla", settings)
        part: Part | LoRA = LoRA(config.lora_rank) if config.train == "lora" else config.train
        select_trainable(student, part, run.same_generator())
        student = run.spread(student)
        teacher = run.frozen(run.source) if config.objective == "white-box" else None

        data, generator = run.data(), run.generator()
        times = Within(LogNormal(config.p_mean, config.p_std), *run.times)
        state = TrainState(
            models={"student": student},
            optimizers={"student": run.adamw(student.parameters(), config.lr)},
            averages={f"{rate:g}": PowerEMA(student, rate) for rate in config.ema},
            generators={"noise": generator},
            data=data,
            identity={
                "method": "sla",
                "model": config.model,
                "objective": config.objective,
                "train": config.train,
                "stated": json.dumps(stated),
            },
        )
        guidance = run.model.sampling.guidance
        sampler = guided_solver(run, guidance)
        preview = Preview.of(run, sampler, data.latent_shape, teacher, guidance)
        with Session(run, state, preview) as session:
            batches = iter(data)
            while session.unfinished:
                _set_ratio(student, config.ratio_at(session.step))
                for _ in range(config.accumulate):
                    loss = _loss(run, student, teacher, next(batches), times, generator, session)
                    (loss / config.accumulate).backward()
                session.update("student", average_step=session.step)
                session.advance()
            session.export(stated, part if isinstance(part, LoRA) else None)


def _loss(
    run: Run,
    student: WanModel,
    teacher: WanModel | None,
    batch: Batch,
    times: Within,
    generator: torch.Generator,
    session: Session,
) -> torch.Tensor:
    """Of one batch, at new times and noise."""
    x0, conditions = conditions_of(batch, run.image_share, generator, run.mesh.device)
    t = time_of_angle(times.sample(len(x0), generator))
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    velocity, mask = conditions.network(run.forward(student)), conditions.mask(x0)
    if teacher is None:
        loss = losses.black_box(velocity, x0, noise, t, mask)
    else:
        target = conditions.network(run.forward(teacher))
        loss = losses.white_box(velocity, target, x0, noise, t, mask)
    session.metrics.add_by_time("loss", loss.per_sample, t)
    return loss.loss


def _set_ratio(model: WanModel, ratio: float) -> None:
    for module in model.modules():
        if isinstance(module, SparseLinearAttention):
            module.ratio = ratio
