"""Fine-tuning a Wan DiT for sparse-linear attention (SLA, arXiv:2509.24006, section 5).

The student is the teacher with SLA in every self attention. White-box: it learns the teacher's
velocity on the data's latents; black-box: the diffusion target noise - x0 itself. The student of a
teacher that was distilled to few steps takes as few.
"""

from __future__ import annotations

import json

import torch

from turbodit.attention import TEMPORAL_HEADS, SparseLinearAttention
from turbodit.attention.temporal import check_temporal_heads
from turbodit.checkpoints.stated import SETTINGS
from turbodit.checkpoints.transformer import stated_use
from turbodit.checkpoints.write import new_file
from turbodit.config import SamplingConfig
from turbodit.model.wan import WanModel
from turbodit.training import losses
from turbodit.training.checkpoint import TrainState
from turbodit.training.config import SLAConfig
from turbodit.training.data import Batch
from turbodit.training.ema import PowerEMA
from turbodit.training.networks import conditions_of
from turbodit.training.parameters import LoRA, Part, select_trainable
from turbodit.training.preview import Preview, own_sampler
from turbodit.training.session import Session
from turbodit.training.setup import Run, open_run
from turbodit.training.temporal_heads import choose_temporal_heads
from turbodit.training.times import Angles, FewStep, LogNormal, Within, time_of_angle

CHOSEN = "temporal_heads.json"  # in the folder of a run
PASSES = 4  # of a batch, by which temporal heads are chosen


def train(config: SLAConfig) -> None:
    """Train, or go on, until `config.steps` updates are done; then write `<out>/transformer`.

    Raises:
        ValueError, FileNotFoundError: a configuration, data or model that does not fit.
        OSError: a file that cannot be written; the last complete checkpoint stays.
    """
    with open_run(config) as run:
        settings = _attention_settings(run, config)
        stated = {**stated_use(run.source), "attention": "sla", "attention_settings": settings}
        student = run.trained(config.student or run.source, "sla", settings)
        part: Part | LoRA = LoRA(config.lora_rank) if config.train == "lora" else config.train
        select_trainable(student, part, run.same_generator())
        student = run.spread(student)
        teacher = run.frozen(run.source) if config.objective == "white-box" else None

        data, generator = run.data(), run.generator()
        times = Within(_noise_levels(config, run.model.sampling), *run.times)
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
        sampler = own_sampler(run, guidance)
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


def _noise_levels(config: SLAConfig, sampling: SamplingConfig) -> Angles:
    if config.noise_levels == "lognormal":
        return LogNormal(config.p_mean, config.p_std)
    if sampling.solver != "few-step":
        raise ValueError(
            "noise levels few-step are those of a distilled model, but the solver of "
            f"{config.transformer or config.model} is {sampling.solver}; expected lognormal"
        )
    return FewStep(sampling.steps, sampling.sigma_max)


def _attention_settings(run: Run, config: SLAConfig) -> dict[str, object]:
    """Of the student's SLA, temporal heads included."""
    settings, shape = config.attention_settings(run.model), run.model.transformer
    stated = {} if config.student is None else stated_use(config.student).get(SETTINGS, {})
    variant = stated.get("variant", "released") if stated else config.variant
    if variant != config.variant:
        raise ValueError(
            f"{config.student} was trained with variant {variant}, got {config.variant}"
        )
    if TEMPORAL_HEADS in stated:
        settings[TEMPORAL_HEADS] = stated[TEMPORAL_HEADS]
    elif config.temporal_heads == "all":
        settings[TEMPORAL_HEADS] = [list(range(shape.num_heads))] * shape.num_layers
    elif config.temporal_heads == "chosen":
        settings[TEMPORAL_HEADS] = _chosen_heads(run, config, settings)
    return settings


def _chosen_heads(run: Run, config: SLAConfig, settings: dict[str, object]) -> list[list[int]]:
    """Those of the run's file, which is made where it is missing: a run that goes on, or is gone on
    with by more processes, keeps them."""
    path = config.out / CHOSEN
    if not path.exists():
        if run.mesh.size > 1:
            raise ValueError(
                f"temporal heads are chosen by one process, got {run.mesh.size}; begin the run "
                f"with one, for a step, or put {CHOSEN} of another run into {config.out}"
            )
        teacher, generator = run.frozen(run.source), run.generator()
        x0, conditions = conditions_of(
            next(iter(run.data())), run.image_share, generator, run.mesh.device
        )
        velocity = conditions.network(run.forward(teacher))
        times = Within(_noise_levels(config, run.model.sampling), *run.times)

        def ask() -> None:
            for _ in range(PASSES):
                t = time_of_angle(times.sample(len(x0), generator))
                noise = torch.randn(x0.shape, generator=generator, device=x0.device)
                losses.black_box(velocity, x0, noise, t)

        heads = choose_temporal_heads(teacher, settings, ask)
        with new_file(path) as partial:
            partial.write_text(json.dumps(heads) + "\n")
    shape = run.model.transformer
    try:
        found: list[list[int]] = json.loads(path.read_text())
        check_temporal_heads(found, shape.num_layers, shape.num_heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; without this file they are chosen again") from error
    return found


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
