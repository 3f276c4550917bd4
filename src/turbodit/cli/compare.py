"""`turbodit compare`: two models beside each other, from the same prompts and seeds."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from turbodit.cli.eval import ModelFlags, flag, write_tables
from turbodit.cli.generate import Switch
from turbodit.cli.report import Bars, short_warnings

if TYPE_CHECKING:
    import numpy as np

    from turbodit.batch import Job, Order
    from turbodit.evaluation.spec import ModelSpec
    from turbodit.pipeline import Pipeline
    from turbodit.video import Video

SIDES = ("left", "right")
STAGES = ("text", "image", "denoise", "decode")  # of a video's time: without writing it
HALVES = ".left"  # folder of the left model's videos, while the right ones are being made
SEED = 0  # without one of the user's: a random one could not be resumed


@dataclass(frozen=True)
class Pair:
    """One prompt and seed: what both models are to do.

    Attributes:
        number: of the pair, which names the left video while it waits for the right one.
        left, right: both with the path of the finished video as output.
    """

    number: int
    left: Job
    right: Job

    @property
    def output(self) -> Path:
        return self.left.output

    @property
    def same_sampler(self) -> bool:
        """Whether the videos would be equal but for how the same model is computed."""
        models = [job.record["model"] for job in (self.left, self.right)]
        return models[0] == models[1] and self.left.settings == self.right.settings

    def finished(self) -> dict[str, Any] | None:
        """The sidecar of the finished video, if there is one of the same two jobs."""
        from turbodit.video import read_sidecar

        record = read_sidecar(self.output)
        wanted = {"prompt": self.left.prompt, "seed": self.left.seed}
        same = wanted.items() <= record.items() and all(
            record["settings"].get(side) == json.loads(json.dumps(job.record))
            for side, job in zip(SIDES, (self.left, self.right), strict=True)
        )
        return record if same and self.output.exists() else None


@dataclass(frozen=True)
class Compare(ModelFlags):
    """Make videos with two models from the same prompts and seeds, and show them side by side."""

    left: Annotated[Positional[str], flag("A")]
    """The model on the left: name, folder or Hub id, with options of its own after a colon, such as
    spritewan:steps=4,attention=sagesla,linear=fp8. What they leave open is as the flags say, then
    as the prompt file says, or the model's default."""
    right: Annotated[Positional[str], flag("B")]
    """The model on the right, likewise."""
    prompts: Annotated[str, flag("FILE|TEXT")]
    """Prompts, one a line (.txt), or objects as of generate (.jsonl); or one prompt itself."""
    size: Annotated[str | None, flag("W*H")] = None
    """Width and height in pixels of each video, such as 832*480."""
    frames: Annotated[int | None, flag("N")] = None
    """Number of frames, 4k+1."""
    seed: Annotated[int, flag("N")] = SEED
    """Of every prompt that has none of its own. Default: 0."""
    out: Annotated[Path, flag("FOLDER")] = Path("compare")
    """Where an mp4 for each prompt goes, and summary.json and summary.md."""
    force: Switch = False
    """Replace what is there."""
    resume: Switch = False
    """Leave out what is there already with the same settings."""
    json: Switch = False
    """Print the summary as JSON."""
    debug: Switch = False
    """Show the traceback of errors."""

    def run(self) -> None:
        """Make, join and write all videos that are left to do; report.

        Raises:
            ValueError, OSError: a mistake of the user's, or a file that cannot be written.
        """
        from turbodit.video import check_free

        specs = self.specs((self.left, self.right))
        pairs = self._pairs(specs)
        todo = [pair for pair in pairs if not (self.resume and pair.finished())]
        for pair in todo:
            check_free(pair.output, self.force)
        if todo:
            with short_warnings(), Bars() as bars:
                self._make_left(specs[0], todo, bars)
                self._make_right(specs, todo, bars)
        numbers = summary(specs, pairs)
        write_tables(self.out / "summary", numbers, markdown(numbers))
        print(json.dumps(numbers, ensure_ascii=False) if self.json else markdown(numbers))

    def _pairs(self, specs: Sequence[ModelSpec]) -> list[Pair]:
        """What is to be done for every prompt, all checked."""
        from turbodit.batch import plan
        from turbodit.checkpoints import find_model

        left, right = (
            plan(
                [
                    replace(order, request=replace(order.request, **spec.sampling))
                    for order in self._orders()
                ],
                find_model(spec.model).config(spec.transformers),
                {"spec": spec.text, **spec.record},
            )
            for spec in specs
        )
        for one, other in zip(left, right, strict=True):
            _check_alike(one, other)
        return [Pair(number, *jobs) for number, jobs in enumerate(zip(left, right, strict=True))]

    def _orders(self) -> list[Order]:
        from turbodit.batch import Order, parse_size, read_prompt_file, slug
        from turbodit.request import GenerationRequest

        options: dict[str, Any] = {"seed": self.seed}
        if self.frames is not None:
            options["frames"] = self.frames
        if self.size is not None:
            options["width"], options["height"] = parse_size(self.size)
        if Path(self.prompts).suffix in (".txt", ".jsonl"):
            return read_prompt_file(Path(self.prompts), options, self.out)
        request = GenerationRequest(self.prompts, **options)
        return [Order(request, self.out / f"{slug(self.prompts)}.mp4", exact=False)]

    def _half(self, pair: Pair) -> Path:
        return self.out / HALVES / f"{pair.number:05d}"

    def _make_left(self, spec: ModelSpec, todo: Sequence[Pair], bars: Bars) -> None:
        """Keep the left videos without loss, so that only one model is in memory at a time.

        Those that an interrupted run has left are used when that run is resumed.
        """
        halves = [replace(pair.left, output=self._half(pair)) for pair in todo]
        missing = [job for job in halves if not (self.resume and job.is_done())]
        if not missing:
            return
        pipe = self._load(spec, missing[0], bars)
        for number, job in enumerate(missing, start=1):
            bars.start_video(f"left {number}/{len(missing)}  {job.prompt}")
            (video,) = pipe.generate(job.settings, bars)
            video.settings = job.record
            video.save(job.output, force=True)
        del pipe
        gc.collect()  # or the models would not leave the GPU before the next ones come

    def _make_right(self, specs: Sequence[ModelSpec], todo: Sequence[Pair], bars: Bars) -> None:
        from turbodit.video import sidecar

        pipe = self._load(specs[1], todo[0].right, bars)
        for number, pair in enumerate(todo, start=1):
            bars.start_video(f"right {number}/{len(todo)}  {pair.right.prompt}")
            (video,) = pipe.generate(pair.right.settings, bars)
            half = self._half(pair)
            _joined(specs, pair, half, video).save(pair.output, force=self.force)
            sidecar(half).unlink()
            shutil.rmtree(half)
        shutil.rmtree(self.out / HALVES)

    def _load(self, spec: ModelSpec, first: Job, bars: Bars) -> Pipeline:
        """The model, on a GPU warmed up: kernels compile with the first video."""
        pipe = spec.load(self.device, bars)
        if pipe.device.type == "cuda":
            bars.start_video(f"warm-up  {spec.text}")
            pipe.generate(first.settings, bars)
        return pipe


def _check_alike(left: Job, right: Job) -> None:
    """Raise unless both videos have the same number of frames, size and rate."""
    names = ("width", "height", "frames", "fps")
    values = [{name: getattr(job.settings, name) for name in names} for job in (left, right)]
    if values[0] != values[1]:
        raise ValueError(
            f"the models' videos do not fit side by side: {values[0]} and {values[1]}; "
            "give --size and --frames that suit both"
        )


def _joined(specs: Sequence[ModelSpec], pair: Pair, half: Path, right: Video) -> Video:
    """Both videos in one; its sidecar has the jobs, the seconds, and how alike the two are."""
    import numpy as np

    from turbodit.evaluation.read import read_frames
    from turbodit.evaluation.side_by_side import side_by_side
    from turbodit.video import Video, read_sidecar

    frames = np.stack(list(read_frames(half)))
    seconds = [_total(timings) for timings in (read_sidecar(half)["timings"], right.timings)]
    labels = [
        (spec.text, f"{duration:.2f} s") for spec, duration in zip(specs, seconds, strict=True)
    ]
    settings = dict(zip(SIDES, (pair.left.record, pair.right.record), strict=True))
    if pair.same_sampler:
        settings["similarity"] = _similarity(frames, right.frames)
    return Video(
        side_by_side(frames, right.frames, (labels[0], labels[1])),
        right.fps,
        pair.left.prompt,
        pair.left.seed,
        settings,
        dict(zip(SIDES, seconds, strict=True)),
    )


def _total(timings: Mapping[str, float]) -> float:
    return sum(timings[stage] for stage in STAGES if stage in timings)


def _similarity(left: np.ndarray, right: np.ndarray) -> dict[str, float]:
    from turbodit.evaluation.similarity import similarity

    found = similarity(left, right, multi_scale=False)
    return {"psnr": round(found.psnr, 2), "ssim": round(found.ssim, 4)}


def summary(specs: Sequence[ModelSpec], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Seconds and similarity of every finished pair, and the medians of the seconds."""
    rows = []
    for pair in pairs:
        record = pair.finished()
        assert record is not None, f"{pair.output} was written before"
        rows.append(
            {
                "output": str(pair.output),
                "prompt": pair.left.prompt,
                "seed": pair.left.seed,
                "seconds": {side: round(record["timings"][side], 4) for side in SIDES},
                **record["settings"].get("similarity", {}),
            }
        )
    return {
        **dict(zip(SIDES, (spec.text for spec in specs), strict=True)),
        "median_seconds": {side: median(row["seconds"][side] for row in rows) for side in SIDES},
        "videos": rows,
    }


def markdown(numbers: Mapping[str, Any]) -> str:
    """The summary as a table with a row for each pair, and one of the medians."""
    from turbodit.benchmark.report import table

    header = ["prompt", "seed", *(f"{numbers[side]}, s" for side in SIDES), "PSNR, dB", "SSIM"]
    rows = [
        [
            row["prompt"].replace("|", "\\|"),
            row["seed"],
            *_seconds(row["seconds"]),
            row.get("psnr"),
            row.get("ssim"),
        ]
        for row in numbers["videos"]
    ]
    rows.append(["median", None, *_seconds(numbers["median_seconds"]), None, None])
    return f"{table(header, rows)}\n"


def _seconds(values: Mapping[str, float]) -> list[str]:
    return [f"{values[side]:.2f}" for side in SIDES]
