"""Memory and time of training on one of several GPUs. Estimates, of which `NOTES` tells the error.

What each network holds, per parameter, divided over the processes that share one copy (FSDP2):

    stored     bfloat16 with the few float32 parameters of Wan, or float32 (master weights)
    gradient   in the dtype it is stored in, of what trains
    AdamW      two moments, in the dtype it is stored in, of what trains
    EMA        float32, of what trains, once for each average

The student has all of these. A teacher, which all but black-box fine-tuning need, has only the
first, in bfloat16; a fake score, which DMD needs, all but the EMA.

Activations of a block that are kept for its backward pass, bytes per token, were counted from
what autograd saves (float32 norms, bfloat16 products):

    KEPT_D * D + KEPT_F * F

With block-wise checkpointing a block keeps its float32 input, 4 D, and one block at a time the
rest. Tokens are divided over the context processes.

Shapes: L tokens, D width, F width of the feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from turbodit.config import ModelConfig
from turbodit.plan.inference import LIBRARIES, check_size
from turbodit.plan.report import Plan
from turbodit.plan.speed import attention_cost, forward_seconds
from turbodit.plan.weights import (
    FULL,
    HALF,
    Trained,
    count,
    count_block,
    trained_parameters,
)

Method = Literal["sla", "rcm", "scm", "dmd", "dcm"]
Objective = Literal["white-box", "black-box"]
Checkpointing = Literal["none", "selective", "block"]

KEPT_D, KEPT_F = 72, 4
# Gradients on the way through a block: of the stream and the norms; of the hidden layer twice.
GRADIENT_D, GRADIENT_F = 12, 4
PRODUCTS_D, PRODUCTS_F = 18, 2  # results of products and attention, that "selective" keeps
OUTSIDE_D = 16  # patches, and the head's norm
EXCHANGED_D = 8  # q, k, v and the result of attention, on their way between context processes
GATHERED = 2  # blocks whose weights are whole at a time: the one at work, and the next
# A student's forward pass with gradient, in plain forward passes: itself, its recomputation, and
# a backward pass of 2 for products and 2.6 to 3 for attention.
RECOMPUTED, BACKWARD = 1.0, 2.5
# A Jacobian-vector product in plain forward passes: itself and its tangents. 1.24 s for the 1.3B at
# 480p on an H100, where a plain pass is reckoned to take 0.50.
JVP = 2.5
LARGE = 5120  # width from which on the recipes of rCM update the student every 10th time


@dataclass(frozen=True)
class Training:
    """One method on one model.

    Attributes:
        method: "sla", fine-tuning; "rcm", sCM and DMD; "scm" or "dmd" alone; "dcm", consistency in
            discrete time.
        gpus: processes, one for each GPU.
        context_parallel: processes that share the tokens of their samples.
        fsdp: processes that share one copy of the weights; None: all.
        batch: samples of a context group at a time (accumulation takes no memory).
        attention: of the student; None: "sla" for the method of that name, else "sdpa".
        part: what of the student trains.
        rank: of a LoRA.
        checkpointing: which activations are computed again.
        master_weights: weights stored in float32, otherwise in bfloat16.
        ratio: share of the key blocks that sparse attention keeps.
        both_experts: both experts of a model that has two, trained in one run; otherwise one is.
        objective: of "sla": "white-box", the teacher's velocity, or "black-box", without one.
        averages: of the student's weights, kept side by side.
        student_every: with DMD, one in so many updates is the student's, and the others the fake
            score's. None: 5, or 10 of the largest models, as the recipes have it.
        rollout_steps: most steps of DMD's roll-out, which takes 1, 2, ... in turns.

    Raises:
        ValueError: an unknown name, sizes that do not divide, a size of video that the model
            cannot make, a ratio that is not in (0, 1], black-box distillation, or two experts that
            are not there or not trained in one run.
    """

    model: ModelConfig
    width: int
    height: int
    frames: int
    method: Method
    gpus: int = 1
    context_parallel: int = 1
    fsdp: int | None = None
    batch: int = 1
    attention: str | None = None
    part: Trained = "full"
    rank: int = 32
    checkpointing: Checkpointing = "block"
    master_weights: bool = True
    ratio: float = 0.1
    both_experts: bool = False
    objective: Objective = "white-box"
    averages: int = 1
    student_every: int | None = None
    rollout_steps: int = 4

    def __post_init__(self) -> None:
        check_size(self.model, self.width, self.height, self.frames)
        for name, got, known in (
            ("method", self.method, Method),
            ("part", self.part, Trained),
            ("checkpointing", self.checkpointing, Checkpointing),
            ("objective", self.objective, Objective),
        ):
            if got not in get_args(known):
                raise ValueError(f"unknown {name} {got!r}; supported: {', '.join(get_args(known))}")
        for name in ("gpus", "context_parallel", "batch", "rank", "student_every", "rollout_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.averages < 0:
            raise ValueError(f"averages must be 0 or more, got {self.averages}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"the ratio must be in (0, 1], got {self.ratio}")
        if not self.has_teacher and self.method != "sla":
            raise ValueError(f"distillation needs a teacher: {self.method} is not black-box")
        if self.both_experts and (self.model.experts != 2 or self.method in ("sla", "dcm")):
            raise ValueError(
                f"both experts are trained in one run by rcm, scm and dmd, of a model that has "
                f"two; got {self.method} and {self.model.name}, which has {self.model.experts}"
            )
        self._check_mesh()
        attention_cost(self.student_attention)

    @property
    def tokens(self) -> int:
        return self.model.token_count(self.frames, self.height, self.width)

    @property
    def student_attention(self) -> str:
        return self.attention or ("sla" if self.method == "sla" else "sdpa")

    @property
    def has_teacher(self) -> bool:
        return self.objective == "white-box"

    @property
    def has_fake_score(self) -> bool:
        return self.method in ("rcm", "dmd")

    @property
    def shards(self) -> int:
        return self.gpus if self.fsdp is None else self.fsdp

    def plan(self) -> Plan:
        """Bytes on one GPU at the peak of an update, and seconds of updates on H100s."""
        stage = f"one of {self.gpus} GPUs" if self.gpus > 1 else "one GPU"
        title = (
            f"{self.method} training of {self.model.name}, {self.width}x{self.height}, "
            f"{self.frames} frames: {self.tokens:,} tokens"
        )
        if self.model.experts == 2:
            title += ", both experts" if self.both_experts else ", one expert"
        return Plan(title, {stage: self.parts()}, {stage: (stage,)}, self.seconds(), NOTES)

    def parts(self) -> dict[str, int]:
        """Bytes on one GPU."""
        c = self.model.transformer
        sla = self.student_attention == "sla"
        number = trained_parameters(c, self.part, sla, self.rank)
        stored = self._stored(sla)
        trained = stored if self.part == "full" else self._width * number
        beside = trained if self.part == "lora" else 0  # which is no part of the weights
        parts = {
            "student: weights": self._shard(stored + beside),
            "student: gradients": self._shard(trained),
            "student: AdamW": self._shard(2 * trained),
            "student: EMA": self._shard(self.averages * FULL * number),
        }
        if self.has_teacher:
            parts["teacher: weights"] = self._shard(count(c, False).bytes())
        if self.has_fake_score:
            fake = self._stored(False)
            parts |= {
                "fake score: weights": self._shard(fake),
                "fake score: gradients": self._shard(fake),
                "fake score: AdamW": self._shard(2 * fake),
            }
        return parts | {
            "gathered weights": self._gathered(),
            "kept activations": self._kept(),
            "a block's activations": self._at_work(),
            "libraries": LIBRARIES,
        }

    def seconds(self) -> dict[str, float]:
        """Of updates, with perfect scaling over the context processes and free communication."""
        c = self.model.transformer
        share = self.batch / self.context_parallel

        def forward(attention: str) -> float:
            return share * forward_seconds(c, self.tokens, attention, self.ratio, None)

        student, dense = forward(self.student_attention), forward("sdpa")
        trained = 1 + BACKWARD + (RECOMPUTED if self.checkpointing != "none" else 0)
        if self.method == "sla":
            return {"an update on H100s": self.has_teacher * dense + trained * student}
        guided = 2 * dense
        of_student = 0.0
        if self.method != "dmd":
            without_gradient = 1.0 if self.method == "dcm" else JVP
            of_student += guided + (without_gradient + trained) * student
        if not self.has_fake_score:
            return {"an update on H100s": of_student}
        rollout = (1 + self.rollout_steps) / 2  # steps, on average
        of_student += (rollout - 1 + trained) * student + guided + dense
        fake = rollout * student + trained * dense
        every = self.student_every or (10 if c.dim >= LARGE else 5)
        return {
            "a student's update on H100s": of_student,
            "a fake score's update on H100s": fake,
            "the mean update on H100s": (of_student + (every - 1) * fake) / every,
        }

    @property
    def _width(self) -> int:
        """Bytes of what trains, as it is stored."""
        return FULL if self.master_weights else HALF

    def _stored(self, sla: bool) -> int:
        counts = count(self.model.transformer, sla)
        return FULL * counts.total if self.master_weights else counts.bytes()

    def _shard(self, size: int) -> int:
        """Of what a network has `size` bytes of, of all experts that are trained."""
        return -(-size * (2 if self.both_experts else 1) // self.shards)

    def _gathered(self) -> int:
        """Whole weights of blocks in bfloat16, and a block's gradients there and in float32."""
        if self.shards == 1 and not self.master_weights:
            return 0
        block = count_block(self.model.transformer, False).total
        outside = count(self.model.transformer, False).others
        return HALF * (GATHERED * block + outside) + (HALF + FULL) * block

    def _kept(self) -> int:
        """Activations of all blocks that wait for the backward pass."""
        c = self.model.transformer
        each = {
            "block": FULL * c.dim,
            "selective": (FULL + PRODUCTS_D) * c.dim + PRODUCTS_F * c.ffn_dim,
            "none": KEPT_D * c.dim + KEPT_F * c.ffn_dim,
        }[self.checkpointing]
        return self._own_tokens * (c.num_layers * each + OUTSIDE_D * c.dim)

    def _at_work(self) -> int:
        """Activations and gradients of the block whose backward pass runs."""
        c = self.model.transformer
        each = GRADIENT_D * c.dim + GRADIENT_F * c.ffn_dim
        if self.checkpointing != "none":
            each += KEPT_D * c.dim + KEPT_F * c.ffn_dim
        if self.context_parallel > 1:
            each += EXCHANGED_D * c.dim
        return self._own_tokens * each

    @property
    def _own_tokens(self) -> int:
        return self.batch * self.tokens // self.context_parallel

    def _check_mesh(self) -> None:
        context, heads = self.context_parallel, self.model.transformer.num_heads
        if self.shards < 1 or self.gpus % self.shards or self.shards % context:
            raise ValueError(
                f"{self.gpus} GPUs with {self.shards} for a copy of the weights and {context} for "
                "the tokens of a sample; each must be a multiple of the next"
            )
        if heads % context or self.tokens % context:
            raise ValueError(
                f"{heads} heads and {self.tokens:,} tokens do not divide over {context} context "
                "processes"
            )


NOTES = (
    "Estimates from counts of tensors. Measured was the 1.3B at 832x480 on one H100, batch 1, with "
    "master weights and without averages: SLA 1.93 s (1.35 reckoned; 1.51 in an earlier form of "
    "the code) and 28.7 GiB (36.9); rCM with roll-outs of two steps: the student 9.98 s (8.8), the "
    "fake score 3.90 s (3.3), 44.4 GiB (58.1). And the 14B on two H200, with bfloat16 weights: SLA "
    "6.17 s (4.55), 74.7 GiB (93.5).",
    "One network's backward pass is in memory at a time; text embeddings and latents are read "
    "from files. Not counted: the VAE, which runs with samples keep on every GPU, and the text "
    "encoder, which reads the prompts at the start.",
    "Seconds: from the rates of inference on one H100, without communication.",
)
