"""Memory and time of making a video.

A step's peak is one of two moments in a block, at which these live (bytes per token and channel;
r: of the residual stream, 4 or 2; h: of a norm's output, 2, or 1 in 8 bits):

    always         the model's input tokens 2, the stream before the block r
    feed-forward   the stream r, cross attention's output 2, the norm's output h, and the hidden
                   layer 2 F/D with either its 8-bit form 1 F/D or the output 2
    attention      the norm's output h, q k v together 6, their copies in other formats c, the
                   result 2 and after it the output 2

A CUDA graph keeps its memory also while it is not at work. In the one measurement of two experts
each graph had its own.

Shapes: L tokens, D width, F width of the feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from turbodit.config import VAE_21, ModelConfig
from turbodit.plan.report import GIB, Plan
from turbodit.plan.speed import attention_cost, check_linear, context_tokens, forward_seconds
from turbodit.plan.weights import (
    FULL,
    HALF,
    Linear,
    count,
    encoders_bytes,
    vae_bytes,
)
from turbodit.request import GenerationRequest, resolve

# Work space of matrix products, and rounding: what measured peaks have on top.
LIBRARIES = 3 * GIB // 20
# A graph's memory beyond the activations of a called step, as a share of them, by the format of the
# linear layers: gaps. Measured: 0.14 to 0.41 in bfloat16, 0.5 to 0.75 and 0.25 to 0.4 in 8 bits.
GAPS = {None: 0.25, "fp8": 0.65, "int8-channel": 0.65, "int8-block": 0.4}
# Decoding with the 2.1 VAE, bytes per pixel of a frame: 4.2 GiB at 832x480, 9.8 at 1280x720.
DECODED_PIXEL = 11_400
STEP, DENOISE, DECODE = "a step, the transformer alone", "denoising", "decoding"
ENCODE, DENOISE_ALONE, DECODE_ALONE = "text alone", "denoising alone", "decoding alone"
RESIDENT, OFFLOADED = "everything on the GPU", "--offload model"


@dataclass(frozen=True)
class Inference:
    """One video in bfloat16, a batch of one.

    Attributes:
        attention: back-end of self attention, one of `speed.ATTENTION`.
        linear: 8-bit format of the linear layers, or None.
        residual: dtype of the residual stream.
        graph: the step as a CUDA graph.
        ratio: share of the key blocks that sparse attention keeps.

    Raises:
        ValueError: a size that the model cannot make, or an unknown back-end or format.
    """

    model: ModelConfig
    width: int
    height: int
    frames: int
    attention: str = "sdpa"
    linear: Linear | None = None
    residual: Literal["float32", "bfloat16"] = "float32"
    graph: bool = True
    ratio: float = 0.1

    def __post_init__(self) -> None:
        check_size(self.model, self.width, self.height, self.frames)
        check_linear(self.linear)
        attention_cost(self.attention)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"the top-k ratio must be in (0, 1], got {self.ratio}")

    @property
    def tokens(self) -> int:
        return self.model.token_count(self.frames, self.height, self.width)

    def plan(self) -> Plan:
        """Bytes of every stage, and seconds of a step on an H100."""
        experts = self.model.experts
        encoders, vae = encoders_bytes(self.model), vae_bytes(self.model)
        resident = {"transformer": experts * self._weights(), "encoders": encoders, "VAE": vae}
        graphs = experts if self.graph else 1
        working = {name: graphs * size for name, size in self.working().items()}
        called = replace(self, graph=False)  # an offloaded model is not a graph
        stages = {
            STEP: self.step(),
            DENOISE: {**resident, **self.inputs(), **working},
            ENCODE: {"encoders": encoders},
            DENOISE_ALONE: called.step(),
        }
        ways = {RESIDENT: (DENOISE,), OFFLOADED: (ENCODE, DENOISE_ALONE)}
        decoded = self.decoding()
        notes = [_NOT_COUNTED]
        if decoded is None:
            notes.append("Decoding with this VAE has not been measured and is not counted.")
        else:
            held = working if self.graph else {}
            stages[DECODE] = {**resident, **held, "frames": decoded}
            stages[DECODE_ALONE] = {"VAE": vae, "frames": decoded}
            ways = {RESIDENT: (DENOISE, DECODE), OFFLOADED: (*ways[OFFLOADED], DECODE_ALONE)}
        title = f"{self.model.name}, {self.width}x{self.height}, {self.frames} frames"
        return Plan(
            f"{title}: {self.tokens:,} tokens",
            stages,
            ways,
            {"a forward pass on an H100": self.seconds()},
            (*notes, _SECONDS),
        )

    def step(self) -> dict[str, int]:
        """What is in memory at a step's peak, of one DiT and its inputs alone."""
        context = {"text keys and values": self._context(), "libraries": LIBRARIES}
        return {"weights": self._weights(), **context, **self.working()}

    def inputs(self) -> dict[str, int]:
        """What all experts take besides weights and activations."""
        return {
            "text keys and values": self.model.experts * self._context(),
            "libraries": LIBRARIES,
        }

    def working(self) -> dict[str, int]:
        """Activations; with a graph, its gaps and its own copy of the context too."""
        activations = self.activations()
        if not self.graph:
            return {"activations": activations}
        return {"CUDA graph": int((1 + GAPS[self.linear]) * activations) + self._context()}

    def activations(self) -> int:
        """The larger of the two moments of the module's docstring, and rotary angles."""
        c = self.model.transformer
        r = FULL if self.residual == "float32" else HALF
        h = 1 if self.linear in ("int8-channel", "fp8") else HALF  # norms quantise rows only
        hidden = c.ffn_dim / c.dim
        output = HALF if self.linear is None else hidden  # or the hidden layer in 8 bits
        always = HALF + r
        feed_forward = always + r + HALF + h + HALF * hidden + output
        attention = always + h + 3 * HALF + attention_cost(self.attention).copies + 2 * HALF
        angles = FULL * self.tokens * c.head_dim
        return int(max(feed_forward, attention) * self.tokens * c.dim) + angles

    def decoding(self) -> int | None:
        """What the VAE takes besides its weights; None where nobody has measured it."""
        return DECODED_PIXEL * self.width * self.height if self.model.vae == VAE_21 else None

    def seconds(self) -> float:
        """A forward pass on an H100."""
        config = self.model.transformer
        return forward_seconds(config, self.tokens, self.attention, self.ratio, self.linear)

    def _weights(self) -> int:
        sla = self.attention in ("sla", "sagesla")
        return count(self.model.transformer, sla).bytes(self.linear)

    def _context(self) -> int:
        """Keys and values of text (and image) in every block, in bfloat16."""
        c = self.model.transformer
        return 2 * HALF * c.num_layers * context_tokens(c) * c.dim


def check_size(model: ModelConfig, width: int, height: int, frames: int) -> None:
    """Raise a ValueError unless `model` can make such a video."""
    request = GenerationRequest("a", width=width, height=height, frames=frames)
    resolve(request, replace(model, task="t2v"))  # sizes do not depend on images


_SECONDS = (
    "Seconds: from the rates of one H100; a step with guidance is two passes. Launches are not "
    "counted, which small models wait for."
)
_NOT_COUNTED = (
    "Not counted: latents, samplers' states, encoding an image, a second prompt's keys and values "
    "under guidance."
)
