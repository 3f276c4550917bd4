"""`turbodit eval`: flags of the evaluations, their tables, and where they are written."""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg, subcommand

from turbodit.cli.generate import Switch
from turbodit.cli.report import Bars, short_warnings
from turbodit.config import Solver
from turbodit.evaluation.spec import KEYS, DType, Linear, ModelSpec, Offload, Residual, read_spec

if TYPE_CHECKING:
    import torch

    from turbodit.spritewan.judge import Judge
    from turbodit.spritewan.world import Scene

DIGITS = 4  # after the point, of numbers in files
TITLES = {  # of columns, by measure
    "frames": "frames",
    "flicker": "flicker",
    "colour_drift": "colour drift",
    "sharpness": "sharpness",
    "dynamic_degree": "dynamic degree, %",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "object": "object, %",
    "motion": "motion, %",
    "background": "background, %",
    "frechet": "Fréchet",
    "precision": "precision",
    "recall": "recall",
    "diversity": "diversity",
    "seconds_per_clip": "s per clip",
}
SUBJECT_LENGTH = 160  # characters of the subject in a file name
REAL = "real clips"


def flag(metavar: str) -> Any:
    """A flag whose help says itself what is done without it."""
    return arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The options of a model's spec as flags: for all models whose spec does not say otherwise."""

    transformer: Annotated[UseAppendAction[tuple[Path, ...]], flag("PATH")] = ()
    """Other weights for the transformer; given twice for two experts, high noise first."""
    attention: Annotated[str | None, flag("NAME")] = None
    """Attention back-end, see `turbodit doctor`; by default what the files state, else sdpa."""
    sla_topk: Annotated[float | None, flag("X")] = None
    """Share of key blocks that sparse attention keeps."""
    linear: Annotated[Linear | None, flag("FORMAT")] = None
    """8 bits for the linear layers: int8-block, int8-channel or fp8; by default as in the file."""
    residual: Annotated[Residual | None, flag("NAME")] = None
    """Residual stream of the transformer: float32 (the default) or bfloat16."""
    dtype: Annotated[DType | None, flag("NAME")] = None
    """bfloat16, float16 or float32."""
    offload: Annotated[Offload | None, flag("MODE")] = None
    """none; model: only the model at work is on the GPU; sequential: of a transformer, a block."""
    steps: Annotated[int | None, flag("N")] = None
    """Denoising steps."""
    solver: Annotated[Solver | None, flag("NAME")] = None
    """unipc, euler, dpm++, or few-step for distilled models."""
    shift: Annotated[float | None, flag("X")] = None
    """Shift of the times towards noise."""
    guidance: Annotated[float | None, flag("X")] = None
    """Classifier-free guidance; 1 switches it off."""
    guidance_high_noise: Annotated[float | None, flag("X")] = None
    """The same for the high-noise expert of two-expert models."""
    boundary: Annotated[float | None, flag("T")] = None
    """Time from which on the high-noise expert works."""
    sigma_max: Annotated[float | None, flag("X")] = None
    """Noise level that few-step sampling starts from."""
    mid_times: Annotated[tuple[float, ...] | None, flag("X [X ...]")] = None
    """Angles that few-step sampling visits between, such as 1.5 1.4 1.0."""
    ode: Switch = False
    """Few-step sampling without fresh noise."""
    device: Annotated[str | None, flag("NAME")] = None
    """cpu, cuda, cuda:1; by default a GPU if there is one."""

    def specs(self, texts: Sequence[str]) -> list[ModelSpec]:
        """The specs that `texts` say, with these flags for what they leave open."""
        given = {key: getattr(self, key) for key in KEYS}
        common = {key: value for key, value in given.items() if value not in (None, (), False)}
        return [read_spec(text, common) for text in texts]


@dataclass(frozen=True)
class Result:
    """What an evaluation has found.

    Attributes:
        command: "videos", "pair" or "spritewan".
        subject: what was evaluated; part of the files' name.
        settings: how, plain values.
        kind: what the rows are, the title of the first column.
        rows: measures of each, by name.
        summary: measures of all rows together, such as their mean.
    """

    command: str
    subject: str
    settings: Mapping[str, Any]
    kind: str
    rows: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """All of it, for JSON."""
        command = {"command": f"eval {self.command}", **self.settings}
        return {**command, "rows": self.rows, "summary": self.summary}

    def markdown(self) -> str:
        """A line for each row, a column for each of their measures that has a title."""
        from turbodit.benchmark.report import table

        rows = [*self.rows.items(), *self.summary.items()]
        measures = [m for m in TITLES if any(m in row for _, row in rows)]
        header = [self.kind, *(TITLES[m] for m in measures)]
        lines = [(name, *(_cell(row.get(m)) for m in measures)) for name, row in rows]
        return f"{table(header, lines)}\n"


def _cell(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """What all evaluations have in common."""

    out: Annotated[Path, flag("FOLDER")] = Path("eval-results")
    """Where .json and .md go, named by date and what was evaluated; the same day's are replaced."""
    json: Switch = False
    """Print the numbers as JSON, not as a table."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        """Evaluate, write and print.

        Raises:
            ValueError, OSError: a mistake of the user's, or a file that cannot be written.
        """
        with short_warnings(), Bars() as bars:
            for result in self._results(bars):
                numbers = self._environment() | result.numbers()
                stem = self._stem(result.command, result.subject)
                written = write_tables(stem, numbers, result.markdown())
        print(json.dumps(numbers, ensure_ascii=False) if self.json else result.markdown())
        print(f"turbodit: written: {', '.join(map(str, written))}", file=sys.stderr)

    @abstractmethod
    def _results(self, bars: Bars) -> Iterator[Result]:
        """What has been found: once, or again with every row that is finished."""

    def _environment(self) -> dict[str, Any]:
        """Device and versions."""
        import torch

        from turbodit.benchmark.report import environment

        return environment(torch.device("cpu"))

    def _stem(self, command: str, subject: str) -> Path:
        words = "".join(c if c.isalnum() or c in ".=_" else "-" for c in subject)
        return self.out / f"{date.today()}-{command}-{words[:SUBJECT_LENGTH].strip('-.')}"


@dataclass(frozen=True)
class Videos(Evaluation):
    """What can be measured of videos alone: flicker, colour drift, sharpness, motion."""

    folder: Annotated[Positional[Path], flag("FOLDER")]
    """Holds .mp4, .mov, .mkv, .webm, .avi, .gif, or folders of png frames."""
    no_flow: Switch = False
    """Leave out the dynamic degree, which needs OpenCV: pip install 'turbodit[eval]'."""

    def _results(self, bars: Bars) -> Iterator[Result]:
        from turbodit.evaluation.no_reference import describe, load_opencv
        from turbodit.evaluation.read import find_videos, read_frames

        videos = find_videos(self.folder)
        if not self.no_flow:
            try:
                load_opencv()
            except ValueError as error:
                raise ValueError(f"{error}; --no-flow leaves it out") from error
        rows = {}
        for done, (name, path) in enumerate(videos.items()):
            bars("videos", done, len(videos))
            with _naming(name):
                rows[name] = _rounded(describe(read_frames(path), flow=not self.no_flow))
        bars("videos", len(videos), len(videos))
        settings = {"folder": str(self.folder), "videos": len(videos)}
        subject = self.folder.resolve().name
        yield Result("videos", subject, settings, "video", rows, {"mean": _means(rows)})


@dataclass(frozen=True)
class Pair(Evaluation):
    """PSNR, SSIM and MS-SSIM between the videos of two folders that have the same names."""

    first: Annotated[Positional[Path], flag("A")]
    """A folder of videos."""
    second: Annotated[Positional[Path], flag("B")]
    """Another one."""
    no_ms_ssim: Switch = False
    """Leave out MS-SSIM, which needs frames of 176 pixels and more."""

    def _results(self, bars: Bars) -> Iterator[Result]:
        from turbodit.evaluation.read import find_videos, read_frames
        from turbodit.evaluation.similarity import similarity

        ones, others = find_videos(self.first), find_videos(self.second)
        _check_partners(ones, others)
        rows = {}
        for done, (name, path) in enumerate(ones.items()):
            bars("videos", done, len(ones))
            with _naming(name):
                found = similarity(
                    read_frames(path), read_frames(others[name]), multi_scale=not self.no_ms_ssim
                )
            rows[name] = _rounded(asdict(found))
        bars("videos", len(ones), len(ones))
        worst = {m: min(row[m] for row in rows.values()) for m in _means(rows)}
        settings = {"first": str(self.first), "second": str(self.second), "videos": len(ones)}
        subject = f"{self.first.resolve().name}-{self.second.resolve().name}"
        summary = {"mean": _means(rows), "worst": worst}
        yield Result("pair", subject, settings, "video", rows, summary)


@dataclass(frozen=True)
class SpriteWan(Evaluation, ModelFlags):
    """SpriteWorld's held-out prompts: accuracy, Fréchet distance, precision, recall, diversity."""

    model: Annotated[tuple[str, ...], flag("SPEC [SPEC ...]")] = ("spritewan",)
    """Name, folder or Hub id, with options of its own: spritewan:steps=4,attention=sagesla.
    One row each. Default: spritewan."""
    clips: Annotated[int, flag("N")] = 1024
    """Held-out prompts. Default: 1024."""
    seeds: Annotated[int, flag("N")] = 3
    """Clips of each prompt. Default: 3."""
    batch: Annotated[int, flag("N")] = 16
    """Clips made at a time. Default: 16."""

    def _results(self, bars: Bars) -> Iterator[Result]:
        specs = self._checked()
        from turbodit.device import choose_device
        from turbodit.spritewan.evaluate import judge_scenes, quality
        from turbodit.spritewan.judge import load_judge
        from turbodit.spritewan.world import HELD_OUT, scene

        device = choose_device(self.device)
        judge = load_judge(device=device)
        # As many clips again, for what the distances are between two sets of real ones.
        scenes = [scene(HELD_OUT + index) for index in range(2 * self.clips)]
        bars.start_video(REAL)
        asked, others = scenes[: self.clips], scenes[self.clips :]
        reference = judge_scenes(judge, asked, self.batch).features
        real = quality([judge_scenes(judge, others, self.batch)], others, reference)
        rows = {REAL: _rounded(real)}
        for number, spec in enumerate(specs, start=1):
            bars.start_video(f"{number}/{len(specs)}  {spec.text}")
            rows[spec.text] = self._row(spec, judge, asked, reference, bars)
            yield self._result(specs, rows)

    def _row(
        self,
        spec: ModelSpec,
        judge: Judge,
        scenes: Sequence[Scene],
        reference: torch.Tensor,
        bars: Bars,
    ) -> dict[str, Any]:
        """Measures of one model; its first clips go into a contact sheet."""
        from turbodit.spritewan.contact_sheet import sheet
        from turbodit.spritewan.evaluate import draw_sample, quality

        pipe = spec.load(self.device, bars)
        samples = [
            draw_sample(
                pipe,
                judge,
                scenes,
                spec.sampling,
                repetition=seed,
                batch=self.batch,
                progress=bars,
            )
            for seed in range(self.seeds)
        ]
        shown = samples[0].shown
        picture = sheet(shown, [scene.caption for scene in scenes[: len(shown)]])
        path = _with_ending(self._stem("spritewan", spec.text), ".png")
        with _partial(path) as partial:
            picture.save(partial, format="PNG")
        verdicts = [sample.verdict for sample in samples]
        seconds = {"seconds_per_clip": median(sample.seconds for sample in samples)}
        return _rounded(quality(verdicts, scenes, reference) | seconds)

    def _checked(self) -> list[ModelSpec]:
        """The models; all that can be said before anything heavy is loaded has been said."""
        from turbodit.checkpoints import find_model
        from turbodit.request import GenerationRequest, resolve

        for name, least in (("clips", 4), ("seeds", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        specs = self.specs(self.model)
        texts = [spec.text for spec in specs]
        twice = sorted({text for text in texts if texts.count(text) > 1})
        if twice:
            raise ValueError(f"--model names {', '.join(twice)} twice")
        for spec in specs:
            config = find_model(spec.model).config(spec.transformers)
            resolve(GenerationRequest("a cat", **spec.sampling), config)
        return specs

    def _result(self, specs: Sequence[ModelSpec], rows: Mapping[str, Any]) -> Result:
        settings = {
            "clips": self.clips,
            "seeds": self.seeds,
            "batch": self.batch,
            "models": {spec.text: {**spec.record, **spec.sampling} for spec in specs},
        }
        subject = "-".join(spec.text for spec in specs)
        return Result("spritewan", subject, settings, "model", rows)

    def _environment(self) -> dict[str, Any]:
        from turbodit.benchmark.report import environment
        from turbodit.device import choose_device

        return environment(choose_device(self.device))


Eval = Annotated[
    Annotated[Videos, subcommand("videos")]
    | Annotated[Pair, subcommand("pair")]
    | Annotated[SpriteWan, subcommand("spritewan")],
    subcommand("eval", description="Measure how good videos are, and how alike."),
]


def _check_partners(ones: Mapping[str, Path], others: Mapping[str, Path]) -> None:
    """Raise unless both folders have videos of the same names."""
    alone = [str(ones[name]) for name in ones if name not in others]
    alone += [str(others[name]) for name in others if name not in ones]
    if alone:
        raise ValueError(f"without a partner of the same name: {', '.join(alone)}")


@contextmanager
def _naming(video: str) -> Iterator[None]:
    """Say in the error which video it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{video}: {error}") from error


def _means(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of every measure, over all rows."""
    measures = next(iter(rows.values()))
    return {m: round(mean(row[m] for row in rows.values()), DIGITS) for m in measures}


def _rounded(values: Any) -> Any:
    """Numbers for a file; what was left out is not in it."""
    if isinstance(values, Mapping):
        return {key: _rounded(value) for key, value in values.items() if value is not None}
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return round(values, DIGITS)


def write_tables(stem: Path, numbers: Mapping[str, Any], markdown: str) -> list[Path]:
    """Write `<stem>.json` and `<stem>.md`, each whole or not at all; their paths."""
    text = json.dumps(numbers, ensure_ascii=False, indent=1)
    paths = []
    for ending, content in ((".json", f"{text}\n"), (".md", markdown)):
        path = _with_ending(stem, ending)
        with _partial(path) as partial:
            partial.write_text(content, encoding="utf-8")
        paths.append(path)
    return paths


def _with_ending(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)  # with_suffix would cut at a point in the name


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A name beside `path` that becomes `path` on success and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
