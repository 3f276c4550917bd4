"""A DiT's step as one CUDA graph: its kernels are recorded once and launched together.

A step is hundreds of kernels. At small sizes, or with a slow CPU, they take longer to launch one
by one from Python than to run; at full size with a fast one there is no difference
(docs/log.md).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from turbodit.kernels.norm import Angles
from turbodit.model.wan import EncodedContext, WanModel

WARM_UP = 2  # runs before the recording: kernels are compiled, workspaces and tables made


@dataclass
class _Recording:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    latents: torch.Tensor
    t: torch.Tensor
    context: list[torch.Tensor]
    velocity: torch.Tensor
    angles: Angles  # a table that others may give up
    loaded: weakref.ref[EncodedContext]  # what `context` is a copy of
    memory: int  # bytes that stay taken for activations

    def fits(self, inputs: list[torch.Tensor]) -> bool:
        own = [self.latents, self.t, *self.context]
        return [(x.shape, x.dtype) for x in own] == [(x.shape, x.dtype) for x in inputs]


class _Memory:
    """Where graphs that take turns have their activations.

    A pool's memory belongs to the stream that it was asked for on, so they share that, too.
    """

    def __init__(self) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Not the default one: what runs there cannot be recorded."""
        self._stream = self._stream or torch.cuda.Stream(device)
        return self._stream


class StepGraph:
    """A WanModel for inference, called like the model itself, that replays a CUDA graph.

    The graph holds for one set of shapes. It is recorded at the first call with them, and the
    one before is given up. Its memory (activations, inputs, and keys and values of the context)
    stays taken until then, or until `release`.

    Args:
        model: on a GPU; its weights must stay where they are.
        shared: another graph, whose memory for activations this one uses as well: two experts
            take turns, and need it once.
    """

    def __init__(self, model: WanModel, shared: StepGraph | None = None) -> None:
        self.model = model
        self._memory: _Memory = _Memory() if shared is None else shared._memory
        self._recording: _Recording | None = None

    @property
    def memory(self) -> int:
        """Bytes on the GPU that stay taken for activations, beside what PyTorch calls allocated."""
        return 0 if self._recording is None else self._recording.memory

    @torch.no_grad()
    def __call__(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor | EncodedContext,
        image_context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `WanModel.forward`, without gradients; the result is the caller's to keep.

        Raises:
            ValueError: as `WanModel.forward`, or the latents are not on a GPU.
            torch.OutOfMemoryError: the recording does not fit the GPU.
        """
        if not isinstance(context, EncodedContext):
            context = self.model.encode_context(context, image_context)
        # As the model does first of all: samplers of several precisions share a graph.
        latents = latents.to(self.model.patch_embedding.weight.dtype)
        recording = self._recording
        if recording is None or not recording.fits([latents, t, *context.tensors()]):
            recording = None  # or the memory of two would be taken at a time
            self.release()
            recording = self._recording = self._record(latents, t, context)
        if context is not recording.loaded():
            torch._foreach_copy_(recording.context, context.tensors())
            recording.loaded = weakref.ref(context)
        recording.latents.copy_(latents)
        recording.t.copy_(t)
        recording.graph.replay()
        return recording.velocity.clone()

    def release(self) -> None:
        """Give up the graph and its memory; the next call records anew."""
        self._recording = None

    def _record(
        self, latents: torch.Tensor, t: torch.Tensor, context: EncodedContext
    ) -> _Recording:
        device = latents.device
        if device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a GPU, the latents are on {device}")
        latents, t = latents.clone(), t.clone()
        own = EncodedContext(
            tuple(tuple((k.clone(), v.clone()) for k, v in pairs) for pairs in context.layers)
        )
        stream = self._memory.stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.model(latents, t, own)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what is cached, a graph could not use
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory.pool, stream=stream):
            velocity = self.model(latents, t, own)
        return _Recording(
            graph,
            latents,
            t,
            own.tensors(),
            velocity,
            angles=self.model.angles(latents),
            loaded=weakref.ref(context),
            memory=torch.cuda.memory_reserved(device) - before,
        )
