"""What a training run is: plain values, without torch, that recipes return and flags change.

The entries of `Attributes` are also the flags' help: one for each field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from turbodit.config import ModelConfig

Part = Literal["full", "attention", "proj_l", "lora"]
Checkpointing = Literal["none", "block", "selective"]
Expert = Literal["high-noise", "low-noise"]
Dtype = Literal["bfloat16", "float32"]
Objective = Literal["white-box", "black-box"]
Variant = Literal["released", "paper"]
Method = Literal["rcm", "scm", "dmd", "dcm"]
NoiseLevels = Literal["lognormal", "few-step"]
TemporalHeads = Literal["none", "all", "chosen"]
TangentName = Literal["exact", "semi-continuous", "finite-difference"]

MAX_EMA = 12**-0.5  # `training.ema`: that of a uniform average


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all methods share.

    Attributes:
        model: preset, folder or Hub id of the teacher, whose VAE and text encoder the data's are.
        transformer: other weights for the teacher: a file or folder. None: the model's own.
        expert: of a two-expert model, the one that is trained, on its own range of times. None:
            both in one run, which rcm can.
        data: folders or patterns of shards (`turbodit synthesize`, `turbodit encode`).
        out: folder of the run: checkpoints, log, samples, and at the end `transformer/`.
        steps: updates of all networks, in all.
        minutes: end after so long, looked at with every log entry; the same command goes on. None:
            no limit.
        batch: samples of each data-parallel process in one pass.
        accumulate: passes whose gradients are added up for one update.
        lr: learning rate of AdamW.
        betas: of AdamW: how much of its two moments each update keeps.
        weight_decay: of AdamW.
        max_grad_norm: gradients longer than this are shortened to it. None: never.
        ema: relative standard deviations of the averages that are kept (`training.ema`), each in
            (0, 0.2887); the first is what is exported. Empty: the weights themselves are.
        dtype: of the matrix products. None: bfloat16 on a GPU, float32 on a CPU.
        master_weights: whether what trains is stored in float32; with --no-master-weights it is
            stored in the dtype of the matrix products.
        image_share: of models that take an image as their first latent frame (TI2V), the share of
            samples that are trained so.
        seed: of data order, noise and times.
        device: cpu, cuda or cuda:1. None: a GPU if there is one.
        replicate: copies of the sharded weights, for several nodes (`distributed.mesh`).
        shard: groups of GPUs that have other samples, and a shard of the weights each. None: as
            many as the GPUs there are allow.
        context: GPUs that share the tokens of their samples.
        checkpointing: activations that blocks compute again
            (`distributed.activation_checkpointing`).
        compile: whether torch.compile fuses what lies between the matrix products of passes with a
            gradient, on a GPU and in a run of one process; with --no-compile nothing is fused.
        log_every: updates between entries of the log.
        save_every: updates between checkpoints.
        sample_every: updates between validation samples. None: no samples.
        prompts: of the validation samples.
        keep: checkpoints that stay.
        wandb_project: also log to this project of Weights & Biases.
    """

    model: str
    transformer: Path | None = None
    expert: Expert | None = None
    data: tuple[str, ...] = ()
    out: Path = Path("runs")
    steps: int = 1000
    minutes: float | None = None
    batch: int = 1
    accumulate: int = 1
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    max_grad_norm: float | None = None
    ema: tuple[float, ...] = (0.1,)
    dtype: Dtype | None = None
    master_weights: bool = True
    image_share: float = 0.3
    seed: int = 0
    device: str | None = None
    replicate: int = 1
    shard: int | None = None
    context: int = 1
    checkpointing: Checkpointing = "block"
    compile: bool = True
    log_every: int = 10
    save_every: int = 500
    sample_every: int | None = 500
    prompts: tuple[str, ...] = ()
    keep: int = 2
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        _require(self, "positive", _positive, "steps", "batch", "accumulate", "keep", "replicate",
                 "shard", "context", "log_every", "save_every", "sample_every",
                 "lr", "max_grad_norm", "minutes")  # fmt: skip
        _require(self, "0 or more", _not_negative, "seed", "weight_decay")
        _require(self, "in [0, 1]", lambda share: 0 <= share <= 1, "image_share")
        _require(self, "in [0, 1)", lambda pair: all(0 <= x < 1 for x in pair), "betas")
        _require(self, f"different values between 0 and {MAX_EMA:.4f}", _are_rates, "ema")
        floats = [f.name for f in fields(self) if isinstance(getattr(self, f.name), float)]
        _require(self, "finite", math.isfinite, *floats)

    def check_model(self, model: ModelConfig) -> None:
        """Raise a ValueError unless `expert` is given for two-expert models, and only for them.

        Methods add what they cannot train.
        """
        if (model.experts == 2) != (self.expert is not None):
            wanted = "high-noise or low-noise" if model.experts == 2 else "none"
            raise ValueError(f"expert is {self.expert}; {model.name} wants {wanted}")


@dataclass(frozen=True, kw_only=True)
class SLAConfig(TrainConfig):
    """Fine-tuning for sparse-linear attention (SLA, arXiv:2509.24006).

    Attributes:
        objective: "white-box", the teacher's velocity, or "black-box", that of the data.
        student: weights that the student begins with, merged ones for instance. None: the
            teacher's.
        train: "full", "attention", "proj_l" or "lora" (`training.parameters`).
        lora_rank: of "lora".
        ratio: top-k ratio, the share of key blocks that a query block keeps.
        first_ratio: begin with this ratio and go to `ratio` in a straight line. None: `ratio` from
            the start.
        ratio_steps: updates that it takes to get there.
        variant: "released" or "paper" (`attention.sla`).
        block_q: rows of an attention block of queries. None: the model's own, or 64 here and what
            suits the device in inference.
        block_k: the same of keys.
        temporal_heads: those whose blocks go over time (`attention.temporal`): "none", "all", or
            "chosen" before the first update by what sparsity leaves out. Of a student that has
            some already they are its own.
        noise_levels: "lognormal", or "few-step", those that a distilled model's sampler visits.
        p_mean: mean of n; lognormal noise levels are sigma = exp(n), n normal.
        p_std: standard deviation of n.
    """

    objective: Objective = "white-box"
    student: Path | None = None
    train: Part = "full"
    lora_rank: int = 32
    ratio: float = 0.1
    first_ratio: float | None = None
    ratio_steps: int = 1000
    variant: Variant = "released"
    block_q: int | None = None
    block_k: int | None = None
    temporal_heads: TemporalHeads = "none"
    noise_levels: NoiseLevels = "lognormal"
    p_mean: float = 1.5
    p_std: float = 1.6

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "positive", _positive, "lora_rank", "block_q", "block_k", "p_std")
        _require(self, "0 or more", _not_negative, "ratio_steps")
        _require(self, "in (0, 1]", _is_ratio, "ratio", "first_ratio")
        if self.train != "lora" and self.lora_rank != SLAConfig.lora_rank:
            raise ValueError(
                f"lora_rank is that of train lora, got {self.lora_rank} with train {self.train}"
            )

    def ratio_at(self, step: int) -> float:
        """The top-k ratio of update number `step`, from 0."""
        if self.first_ratio is None or step >= self.ratio_steps:
            return self.ratio
        return self.first_ratio + (self.ratio - self.first_ratio) * step / self.ratio_steps

    def attention_settings(self, model: ModelConfig) -> dict[str, object]:
        """Of the "sla" back-end, but for temporal heads; what is left to it is not among them."""
        settings = {"ratio": self.ratio, "variant": self.variant, **model.block_settings}
        for name in ("block_q", "block_k"):
            if (rows := getattr(self, name)) is not None:
                settings[name] = rows
        return settings


@dataclass(frozen=True, kw_only=True)
class RCMConfig(TrainConfig):
    """Step distillation (rCM, arXiv:2510.08431): consistency and distribution matching.

    Updates come in turns: while the tangent warms up, and every `student_every`-th time after it,
    the student is updated, otherwise the fake score. Without DMD the student is always.

    Attributes:
        method: "rcm", sCM and DMD; "scm" or "dmd" alone; "dcm", consistency in discrete time
            without a derivative.
        tangent: of sCM (`training.losses`).
        student: weights that the student begins with, trained with SLA for instance. None: the
            teacher's.
        joint_ratio: train the student with SLA at this top-k ratio at the same time. None: dense.
        guidance: of the teacher.
        negative_prompt: what guidance steers away from. None: the model's own.
        fake_lr: of the fake score. None: lr / 5.
        loss_scale: weight of sCM's loss.
        dmd_scale: weight of DMD's loss.
        p_mean: mean of n; sCM's noise levels are sigma = exp(n), n normal.
        p_std: standard deviation of n.
        shift: of DMD's uniform times.
        student_every: with DMD, one in so many updates is the student's, the others are the fake
            score's.
        warmup: updates over which sCM's tangent fades in, all of them the student's, without DMD.
            "dmd" has none.
        sigma_max: noise level of the few-step sampler's first step.
        rollout_steps: most steps of DMD's roll-out, which takes 1, 2, ... in turns.
        fixed_times: roll out through the sampler's own times instead of random ones.
    """

    betas: tuple[float, float] = (0.0, 0.999)
    lr: float = 2e-6
    method: Method = "rcm"
    tangent: TangentName = "exact"
    student: Path | None = None
    joint_ratio: float | None = None
    guidance: float = 5.0
    negative_prompt: str | None = None
    fake_lr: float | None = None
    loss_scale: float = 100.0
    dmd_scale: float = 1.0
    p_mean: float = 0.7
    p_std: float = 1.6
    shift: float = 5.0
    student_every: int = 5
    warmup: int = 1000
    sigma_max: float = 80.0
    rollout_steps: int = 4
    fixed_times: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "positive", _positive, "student_every", "fake_lr", "p_std", "shift",
                 "sigma_max")  # fmt: skip
        _require(self, "0 or more", _not_negative, "warmup")
        _require(self, "in (0, 1]", _is_ratio, "joint_ratio")
        _require(self, "from 1 to 4", lambda steps: 1 <= steps <= 4, "rollout_steps")
        if self.fixed_times and not self.uses_dmd:
            raise ValueError(
                f"fixed_times are those of methods rcm and dmd, got method {self.method}"
            )
        if self.tangent != "exact" and self.method not in ("rcm", "scm"):
            raise ValueError(
                f"tangent is that of methods rcm and scm, got {self.tangent} with method "
                f"{self.method}"
            )

    def check_model(self, model: ModelConfig) -> None:
        """As `TrainConfig.check_model`, but two experts may be trained in one run.

        One of them alone cannot roll out from pure noise to clean latents, which DMD needs, and its
        intervals would end in the other's range.
        """
        if model.experts == 2 and self.expert is None:
            self._check_both()
            return
        super().check_model(model)
        if self.expert is not None and self.method != "scm":
            raise ValueError(f"one expert trains with method scm, got {self.method}")

    def _check_both(self) -> None:
        """Raise a ValueError unless two experts can be trained in one run."""
        both = "both experts in one run"
        if self.method == "dcm" or (self.uses_consistency and self.tangent != "exact"):
            raise ValueError(
                f"an interval and a difference may reach over the boundary: {both} train with "
                f"methods rcm and scm with tangent exact, and dmd; got {self.method} with "
                f"{self.tangent}"
            )
        for name in ("transformer", "student"):
            if (given := getattr(self, name)) is not None:
                raise ValueError(f"{both} begin with the model's own weights, got {name} {given}")

    @property
    def uses_consistency(self) -> bool:
        return self.method != "dmd"

    @property
    def uses_dmd(self) -> bool:
        return self.method in ("rcm", "dmd")

    def updates_student(self, step: int) -> bool:
        """Whether update number `step`, from 0, is one of the student."""
        if not self.uses_dmd or (self.uses_consistency and step < self.warmup):
            return True
        return step % self.student_every == 0

    def dmd_counts(self, step: int) -> bool:
        """Whether DMD is a part of the student's update number `step`."""
        return self.uses_dmd and (not self.uses_consistency or step >= self.warmup)

    def tangent_weight(self, step: int) -> float:
        """sCM's warm-up r."""
        return 1.0 if self.warmup == 0 else min(1.0, step / self.warmup)


def _require(config: TrainConfig, expected: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raise a ValueError unless these fields are None or as expected; NaN never is."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} must be {expected}, got {value}")


def _positive(value: float) -> bool:
    return value > 0


def _not_negative(value: float) -> bool:
    return value >= 0


def _is_ratio(value: float) -> bool:
    return 0 < value <= 1


def _are_rates(values: tuple[float, ...]) -> bool:
    """Averages are told apart by their rates as they are printed."""
    names = {f"{rate:g}" for rate in values}
    return len(names) == len(values) and all(0 < rate < MAX_EMA for rate in values)
