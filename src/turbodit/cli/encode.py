"""`turbodit encode`: training data of videos with captions.

A command of its own beside `synthesize`: none of its steps, solvers and seeds have a meaning
here, and no transformer is loaded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from turbodit.cli.generate import Switch
from turbodit.cli.report import short_warnings
from turbodit.cli.synthesize import WorkerBars, flag, tell


@dataclass(frozen=True)
class Encode:
    """Make training data of videos: their latents and captions' text embeddings, in tar shards.

    Started again, the same command goes on where it was, and does what is new or changed.
    torchrun shares the shards among GPUs.
    """

    videos: Annotated[Positional[Path], flag("FOLDER")]
    """Videos with captions: clip.mp4 and clip.txt, or metadata.jsonl or .csv (file_name, text)."""
    output: Annotated[Path, flag("FOLDER", "-o")]
    """Where shards and dataset.json go."""
    model: Annotated[str, flag("NAME")] = "spritewan-teacher"
    """Name, folder or Hub id of the model that is to be trained. Default: spritewan-teacher."""

    size: Annotated[str | None, flag("W*H")] = None
    """Width and height in pixels, such as 832*480; by default the model's own."""
    frames: Annotated[int | None, flag("N")] = None
    """Number of frames, 4k+1, from the beginning of each video; by default the model's own."""
    fps: Annotated[int | None, flag("N")] = None
    """Frames per second that are taken; by default the model's own."""
    shard_size: Annotated[int, flag("N")] = 256
    """Videos in a shard. Default: 256."""

    device: Annotated[str | None, flag("NAME")] = None
    """cpu, cuda, cuda:1; by default a GPU if there is one."""
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, flag("NAME")] = None
    """bfloat16, float16 or float32; by default bfloat16 on a GPU."""
    json: Switch = False
    """Print the result as JSON."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        """Encode what is new; report.

        Raises:
            ValueError, OSError: a mistake of the user's, or a file that cannot be written.
        """
        start = time.perf_counter()
        import torch

        from turbodit.batch import parse_size
        from turbodit.request import GenerationRequest
        from turbodit.training.data.work import this_worker
        from turbodit.training.encode import Encoders, encode_videos

        width, height = (None, None) if self.size is None else parse_size(self.size)
        worker = this_worker()
        with short_warnings(), WorkerBars(worker) as bars:
            encoders = Encoders.from_pretrained(
                self.model,
                device=worker.device(self.device),
                dtype=None if self.dtype is None else getattr(torch, self.dtype),
            )
            report = encode_videos(
                encoders,
                self.videos,
                self.output,
                request=GenerationRequest(
                    prompt="", width=width, height=height, frames=self.frames, fps=self.fps
                ),
                shard_size=self.shard_size,
                worker=worker,
                progress=bars,
            )
        tell(report, self.output, time.perf_counter() - start, as_json=self.json)
