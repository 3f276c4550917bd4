"""`turbodit generate`: flags, and what they make happen."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from turbodit.cli.report import Bars, Summary, VideoSummary, peak_host_memory, short_warnings
from turbodit.config import SIZES_480P, Solver

if TYPE_CHECKING:
    from turbodit.batch import Job, Order
    from turbodit.pipeline import Pipeline

# Models by the names of Wan's --task; where there are two, the second is for 480p.
TASKS = {
    "t2v-1.3B": ("Wan2.1-T2V-1.3B",),
    "t2v-14B": ("Wan2.1-T2V-14B",),
    "i2v-14B": ("Wan2.1-I2V-14B-720P", "Wan2.1-I2V-14B-480P"),
    "flf2v-14B": ("Wan2.1-FLF2V-14B-720P",),
    "t2v-A14B": ("Wan2.2-T2V-A14B",),
    "i2v-A14B": ("Wan2.2-I2V-A14B",),
    "ti2v-5B": ("Wan2.2-TI2V-5B",),
}
PIXELS_480P = max(width * height for width, height in SIZES_480P.values())

Switch = Annotated[bool, arg(help_behavior_hint="")]  # that it is off by default is plain


def _flag(metavar: str, *names: str) -> Any:
    """A flag without a default in its help, where None stands for the model's own.

    tyro lists aliases before the name: for help to begin with the field's own name, that is
    an alias, and the last of `names` is the name.
    """
    if not names:
        return arg(metavar=metavar, help_behavior_hint="")
    *aliases, name = names
    return arg(metavar=metavar, aliases=aliases, name=name.lstrip("-"), help_behavior_hint="")


@dataclass(frozen=True)
class Generate:
    """Make videos from text, from an image, or from both.

    What is left out is the model's own default. Names with - may be written with _.
    """

    text: Annotated[Positional[str | None], _flag("PROMPT")] = None
    """What the video shows."""
    prompt: Annotated[str | None, _flag("TEXT")] = None
    """The same, as a flag."""
    prompt_file: Annotated[Path | None, _flag("FILE")] = None
    """Prompts, one a line (.txt), or objects of prompt, size, seed, steps, output ... (.jsonl)."""
    negative_prompt: Annotated[str | None, _flag("TEXT")] = None
    """What guidance steers away from."""
    image: Annotated[Path | None, _flag("FILE", "--image", "--image-path", "--first-frame")] = None
    """First frame."""
    last_image: Annotated[Path | None, _flag("FILE", "--last-image", "--last-frame")] = None
    """Last frame, for models that take one."""

    model: Annotated[str | None, _flag("NAME", "--model", "--ckpt-dir")] = None
    """Name, folder or Hub id; by default spritewan, which is embedded, as is spritewan-teacher."""
    task: Annotated[str | None, _flag("TASK")] = None
    """Wan's names, such as t2v-1.3B or i2v-A14B, instead of --model or as a check on its folder."""
    transformer: Annotated[
        UseAppendAction[tuple[Path, ...]], _flag("PATH", "--transformer", "--dit-path")
    ] = ()
    """Other weights for the transformer; given twice for two experts, high noise first."""

    size: Annotated[str | None, _flag("W*H")] = None
    """Width and height in pixels, such as 832*480; images are cropped to that shape."""
    resolution: Annotated[str | None, _flag("NAME")] = None
    """Named size, such as 480p; an image keeps its shape within that area."""
    aspect_ratio: Annotated[str | None, _flag("W:H")] = None
    """Shape of a named size, such as 16:9."""
    frames: Annotated[int | None, _flag("N", "--frames", "--num-frames", "--frame-num")] = None
    """Number of frames, 4k+1."""
    fps: Annotated[int | None, _flag("N")] = None
    """Frames per second."""

    steps: Annotated[int | None, _flag("N", "--steps", "--num-steps", "--sample-steps")] = None
    """Denoising steps."""
    solver: Annotated[Solver | None, _flag("NAME", "--solver", "--sample-solver")] = None
    """unipc, euler, dpm++, or few-step for distilled models."""
    shift: Annotated[float | None, _flag("X", "--shift", "--sample-shift")] = None
    """Shift of the times towards noise."""
    guidance: Annotated[float | None, _flag("X", "--guidance", "--sample-guide-scale")] = None
    """Classifier-free guidance; 1 switches it off."""
    guidance_high_noise: Annotated[float | None, _flag("X")] = None
    """The same for the high-noise expert of two-expert models."""
    boundary: Annotated[float | None, _flag("T")] = None
    """Time from which on the high-noise expert works."""
    sigma_max: Annotated[float | None, _flag("X")] = None
    """Noise level that few-step sampling starts from."""
    mid_times: Annotated[tuple[float, ...] | None, _flag("X [X ...]")] = None
    """Angles that few-step sampling visits between, such as 1.5 1.4 1.0."""
    ode: Switch = False
    """Few-step sampling without fresh noise."""
    seed: Annotated[int | None, _flag("N", "--seed", "--base-seed")] = None
    """Of the first video, the others count on; random if left out (prompt files: 0)."""
    num_videos: Annotated[int | None, _flag("N", "--num-videos", "--num-samples")] = None
    """Videos per prompt."""

    attention: Annotated[str | None, _flag("NAME", "--attention", "--attention-type")] = None
    """Attention back-end, see `turbodit doctor`; by default what the files state, else sdpa."""
    sla_topk: Annotated[float | None, _flag("X")] = None
    """Share of key blocks that sparse attention keeps."""
    linear: Annotated[Literal["int8-block", "int8-channel", "fp8"] | None, _flag("FORMAT")] = None
    """8 bits for the linear layers: int8-block, int8-channel or fp8; by default as in the file."""
    residual: Annotated[Literal["float32", "bfloat16"], _flag("NAME")] = "float32"
    """Residual stream of the transformer: float32, or bfloat16, which is faster."""
    no_graph: Switch = False
    """On a GPU: launch the transformer's kernels one by one, not as a CUDA graph."""
    device: Annotated[str | None, _flag("NAME")] = None
    """cpu, cuda, cuda:1; by default a GPU if there is one."""
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, _flag("NAME")] = None
    """bfloat16, float16 or float32."""
    offload: Annotated[Literal["none", "model", "sequential"], _flag("MODE")] = "none"
    """none; model: only the model at work is on the GPU; sequential: of a transformer, a block."""
    offload_model: Annotated[bool | None, _flag("BOOL")] = None
    """Wan's name for --offload model."""
    vae_tiling: Switch = False
    """Encode and decode in tiles: less memory, faint seams."""
    prompt_cache: Annotated[Path | None, _flag("FOLDER")] = None
    """Keep text embeddings there, and use those that it has."""

    output: Annotated[
        Path | None, _flag("PATH", "--output", "-o", "--save-file", "--save-path")
    ] = None
    """.mp4, .gif, .webp, or a folder of png frames (prompt files: of videos); default: outputs/."""
    force: Switch = False
    """Replace what is there."""
    resume: Switch = False
    """Leave out videos that are there already with the same settings."""
    json: Switch = False
    """Print the result as JSON."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        """Generate and write all videos that are left to do; report.

        Raises:
            ValueError, OSError: a mistake of the user's, or a file that cannot be written.
        """
        start = time.perf_counter()  # importing torch is part of loading
        from turbodit.batch import pending, plan
        from turbodit.checkpoints import find_model
        from turbodit.checkpoints.stated import choose_attention

        orders = self._orders()
        folder = find_model(self._model_name())
        model = folder.config(self.transformer)
        self._check_task(model.name)
        stated = folder.stated(self.transformer)
        attention = choose_attention(model, stated, self.attention, self._attention_settings())
        jobs = plan(orders, model, self._weights(*attention))
        todo = pending(jobs, resume=self.resume, force=self.force)
        left = {job.output for job in todo}
        summary = Summary(skipped=[str(job.output) for job in jobs if job.output not in left])
        if todo:
            with short_warnings(), Bars() as bars:
                pipe = self._load(bars)
                summary.device = str(pipe.device)
                summary.load_seconds = time.perf_counter() - start
                for number, job in enumerate(todo, start=1):
                    bars.start_video(f"{number}/{len(todo)}  {job.prompt}")
                    self._make(pipe, job, bars, summary)
        if self.json:
            print(json.dumps(asdict(summary), ensure_ascii=False))
        else:
            summary.show()

    def _orders(self) -> list[Order]:
        from turbodit.batch import read_prompt_file, single_order

        given = [x for x in (self.text, self.prompt, self.prompt_file) if x is not None]
        if len(given) != 1:
            raise ValueError(
                "give one prompt, as an argument or with --prompt, or several with --prompt-file"
            )
        if self.prompt_file is None:
            prompt = self.prompt if self.text is None else self.text
            return [single_order({"prompt": prompt} | self._options(), self.output)]
        if self.output is not None and self.output.suffix:
            raise ValueError(
                f"a prompt file makes several videos: --output must be a folder, got {self.output}"
            )
        return read_prompt_file(self.prompt_file, self._options(), self.output)

    def _options(self) -> dict[str, Any]:
        """Fields of GenerationRequest that were given, but for the prompt."""
        from turbodit.batch import REQUEST_KEYS, parse_size

        options = {key: getattr(self, key, None) for key in REQUEST_KEYS if key != "prompt"}
        options["ode"] = self.ode or None
        if self.size is not None:
            options["width"], options["height"] = parse_size(self.size)
        return {key: value for key, value in options.items() if value is not None}

    def _model_name(self) -> str:
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}; supported: {', '.join(TASKS)}")
        if self.model is not None or self.task is None:
            return self.model or "spritewan"
        names = TASKS[self.task]
        options = self._options()
        pixels = options.get("width", 0) * options.get("height", 0)
        small = self.resolution == "480p" or 0 < pixels <= PIXELS_480P
        return names[-1] if small else names[0]

    def _check_task(self, name: str) -> None:
        if self.task is not None and name not in TASKS[self.task]:
            raise ValueError(
                f"--task {self.task} is {' or '.join(TASKS[self.task])}, but {self.model} "
                f"holds {name}"
            )

    def _attention_settings(self) -> dict[str, Any]:
        return {} if self.sla_topk is None else {"ratio": self.sla_topk}

    def _weights(self, attention: str, settings: dict[str, Any]) -> dict[str, Any]:
        """What decides a video besides the request, where it is not the default."""
        weights: dict[str, Any] = {"weights": self._model_name(), "attention": attention}
        if settings:
            weights["attention_settings"] = settings
        if self.transformer:
            weights["transformer"] = [str(path) for path in self.transformer]
        if self.dtype is not None:
            weights["dtype"] = self.dtype
        if self.linear is not None:
            weights["linear"] = self.linear
        if self.residual != "float32":
            weights["residual"] = self.residual
        if self.vae_tiling:
            weights["vae_tiling"] = True
        return weights

    def _load(self, bars: Bars) -> Pipeline:
        import torch

        from turbodit.pipeline import Pipeline
        from turbodit.quantization import linear_format

        return Pipeline.from_pretrained(
            self._model_name(),
            transformer=self.transformer or None,
            device=self.device,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            attention=self.attention,
            attention_settings=self._attention_settings(),
            linear=None if self.linear is None else linear_format(self.linear),
            residual=self.residual,
            graph=not self.no_graph,
            offload="model" if self.offload_model and self.offload == "none" else self.offload,
            vae_tiling=self.vae_tiling,
            prompt_cache=self.prompt_cache,
            progress=bars,
        )

    def _make(self, pipe: Pipeline, job: Job, bars: Bars, summary: Summary) -> None:
        (video,) = pipe.generate(job.settings, bars)
        video.settings = job.record
        start = time.perf_counter()
        bars("write", 0, 1)
        video.save(job.output, force=self.force)
        bars("write", 1, 1)
        seconds = video.timings | {"write": time.perf_counter() - start}
        peak = peak_host_memory() if pipe.peak_memory is None else pipe.peak_memory
        summary.peak_bytes = max(summary.peak_bytes, peak)
        summary.videos.append(
            VideoSummary(str(job.output), video.prompt, video.seed, video.settings, seconds)
        )
