"""Memory and time of training on one of several GPUs. Estimates, of which `NOTES` tells the error.

What each network holds, per parameter, divided over the processes that share one copy (FSDP2):

    stored     bfloat16 with the few float32 parameters of Wan, or float32 (master weights)
    gradient   in the dtype it is stored in, of what trains
    AdamW      two moments, in the dtype it is stored in, of what trains
    EMA        float32, of what trains

The student has all of these; a teacher only the first; a fake score (rCM) all but the EMA.

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

Method = Literal["sla", "rcm"]
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
# A Jacobian-vector product: the pass itself, and twice its work for the tangents.
JVP = 3.0
ROLLOUT = 2.5  # mean steps of 1 to 4, the last with gradient in the student's phase
FAKE_UPDATES = {True: 4, False: 9}  # fake-score phases per student phase: small models; 14B
LARGE = 5120  # width from which on rCM updates the student every 10th time, not every 5th


@dataclass(frozen=True)
class Training:
    """One method on one model.

    Attributes:
        method: "sla", white-box fine-tuning; "rcm", sCM and DMD.
        gpus: processes, one for each GPU.
        context_parallel: processes that share the tokens of their samples.
        fsdp: processes that share one copy of the weights; None: all.
        batch: samples of a context group at a time (accumulation takes no memory).
        attention: of the student; None: "sla" for the method of that name, else "sdpa".
        part: what of the student trains.
        rank: of a LoRA.
        checkpointing: which activations are computed again.
        master_weights: weights stored in float32.
        both_experts: both experts of a model that has two, trained in one run; otherwise one is.

    Raises:
        ValueError: an unknown name, sizes that do not divide, a size of video that the model
            cannot make, or two experts that are not there or not trained in one run.
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
    master_weights: bool = False
    ratio: float = 0.1
    both_experts: bool = False

    def __post_init__(self) -> None:
        check_size(self.model, self.width, self.height, self.frames)
        for name, got, known in (
            ("method", self.method, Method),
            ("part", self.part, Trained),
            ("checkpointing", self.checkpointing, Checkpointing),
        ):
            if got not in get_args(known):
                raise ValueError(f"unknown {name} {got!r}; supported: {', '.join(get_args(known))}")
        for name in ("gpus", "context_parallel", "batch", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.both_experts and (self.model.experts != 2 or self.method != "rcm"):
            raise ValueError(
                f"both experts are trained in one run by rcm, of a model that has two; got "
                f"{self.method} and {self.model.name}, which has {self.model.experts}"
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
            "student: EMA": self._shard(FULL * number),
            "teacher: weights": self._shard(count(c, False).bytes()),
        }
        if self.method == "rcm":
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
            return {"an update on H100s": dense + trained * student}
        guided = 2 * dense
        consistency = guided + (JVP + trained) * student
        matching = (ROLLOUT - 1 + trained) * student + guided + dense
        fake = ROLLOUT * student + trained * dense
        others = FAKE_UPDATES[c.dim < LARGE]
        return {
            "a student's update on H100s": consistency + matching,
            "a fake score's update on H100s": fake,
            "the mean update on H100s": (consistency + matching + others * fake) / (others + 1),
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
    "Estimates from counts of tensors. Measured was the 1.3B at 832x480 on one H100, batch 1: SLA "
    "1.51 s (1.35 reckoned), rCM's student 10.0 s (9.3) and fake score 3.5 s (3.5); memory was a "
    "quarter lower than reckoned.",
    "One network's backward pass is in memory at a time; text embeddings and latents are read "
    "from files, so that no encoder and no VAE is.",
    "Seconds: from the rates of inference on one H100, without communication.",
)
