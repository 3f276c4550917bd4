"""What a user asks for, what will be done, and the one place where the first becomes the second.

No torch here: the command line checks a request before anything heavy is loaded.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard, get_args

from PIL import Image

from turbodit.config import ModelConfig, SamplingConfig, Solver
from turbodit.images import ImageInput, fit_image, load_image
from turbodit.noise_schedule import MID_TIMES, few_step_times

MAX_SIDE = 16_384  # pixels
MAX_TOKENS = 2**20  # a 720p clip of 81 frames has 75,600
MAX_STEPS = 1000  # timesteps of the training schedule
MAX_FPS = 240
AREA_480P = 832 * 480  # pixels
MULTISTEP_STEPS = 50  # where the model's own default is the few-step sampler


@dataclass(frozen=True)
class GenerationRequest:
    """One generation as asked for; None stands for the model's default.

    Attributes:
        prompt: one prompt, or several that share all settings and run as one batch.
        negative_prompt: what guidance steers away from.
        image: first frame; last_image: last frame (path or PIL image).
        width, height: pixels, both or neither.
        resolution, aspect_ratio: names from the model's sizes, e.g. "480p" and "16:9".
        frames: 4k+1.
        guidance, guidance_high_noise: classifier-free guidance, 1 switches it off; the
            second is for the high-noise expert of two-expert models, by default the same.
        boundary: time from which on the high-noise expert works, in (0, 1).
        shift: of the times of a multistep solver.
        sigma_max, mid_times, ode: of the few-step sampler (`noise_schedule.few_step_times`).
        seed: of the first video; the others count on. Or one seed per video.
        num_videos: per prompt.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | None = None
    image: ImageInput | None = None
    last_image: ImageInput | None = None
    width: int | None = None
    height: int | None = None
    resolution: str | None = None
    aspect_ratio: str | None = None
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    solver: Solver | None = None
    shift: float | None = None
    guidance: float | None = None
    guidance_high_noise: float | None = None
    boundary: float | None = None
    sigma_max: float | None = None
    mid_times: Sequence[float] | None = None
    ode: bool | None = None
    seed: int | Sequence[int] | None = None
    num_videos: int = 1


@dataclass(frozen=True)
class Settings:
    """One generation, every choice made; one prompt and one seed per video.

    What a solver or a model does not have is None: `shift` of the few-step sampler,
    `guidance_high_noise` of a single expert, and so on. Images have the video's size.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    width: int
    height: int
    frames: int
    fps: int
    solver: Solver
    steps: int
    guidance: float
    negative_prompt: str | None = None
    guidance_high_noise: float | None = None
    boundary: float | None = None
    shift: float | None = None
    sigma_max: float | None = None
    mid_times: tuple[float, ...] | None = None
    ode: bool | None = None
    image: Image.Image | None = None
    last_image: Image.Image | None = None

    def summary(self) -> dict[str, Any]:
        """The settings that all videos share and that apply, as plain values for JSON."""
        apart = {"prompts", "seeds", "image", "last_image"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        return {name: value for name, value in values.items() if value is not None}


def resolve(request: GenerationRequest, model: ModelConfig) -> Settings:
    """Fill in the model's defaults and check everything.

    Raises:
        ValueError: a value is impossible, or does not apply to this model or solver.
        FileNotFoundError: an image file does not exist.
    """
    _check_types(request)
    prompts, seeds = _videos(request)
    image, last_image = _images(request, model)
    width, height = _size(request, model, image)
    frames = _frames(request, model, width, height)
    fps = model.fps if request.fps is None else request.fps
    _require(1 <= fps <= MAX_FPS, f"fps must be between 1 and {MAX_FPS}, got {fps}")
    return Settings(
        prompts=prompts,
        seeds=seeds,
        width=width,
        height=height,
        frames=frames,
        fps=fps,
        image=None if image is None else fit_image(image, width, height),
        last_image=None if last_image is None else fit_image(last_image, width, height),
        **_schedule(request, model.sampling, width * height),
        **_guidance(request, model),
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_types(request: GenerationRequest) -> None:
    whole = ("width", "height", "frames", "fps", "steps")
    real = ("shift", "guidance", "guidance_high_noise", "boundary", "sigma_max")
    text = ("negative_prompt", "resolution", "aspect_ratio", "solver")
    picture = ("image", "last_image")
    for names, good, kind in (
        (whole, _is_whole, "a whole number"),
        (real, _is_real, "a finite number"),
        (text, lambda value: isinstance(value, str), "text"),
        (picture, lambda value: isinstance(value, (str, Path, Image.Image)), "a path or image"),
        (("ode",), lambda value: isinstance(value, bool), "true or false"),
    ):
        for name in names:
            value = getattr(request, name)
            _require(value is None or good(value), f"{name} must be {kind}, got {value!r}")
    mid_times = request.mid_times
    _require(
        mid_times is None or (isinstance(mid_times, Sequence) and all(map(_is_real, mid_times))),
        f"mid_times must be finite numbers, got {mid_times!r}",
    )


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _videos(request: GenerationRequest) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """A prompt and a seed for every video."""
    asked = (request.prompt,) if isinstance(request.prompt, str) else request.prompt
    _require(isinstance(asked, Sequence), f"a prompt must be text, got {asked!r}")
    _require(bool(asked), "no prompt given")
    for prompt in asked:
        _require(isinstance(prompt, str), f"a prompt must be text, got {prompt!r}")
        _require(bool(prompt.strip()), "the prompt is empty; say what the video should show")
    number = request.num_videos
    good = _is_whole(number) and number >= 1
    _require(good, f"num_videos must be a positive whole number, got {number!r}")
    prompts = tuple(prompt for prompt in asked for _ in range(number))
    return prompts, _seeds(request.seed, len(prompts))


def _seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """One for each of `count` videos."""
    if seed is None:
        seed = secrets.randbelow(2**31)
    if _is_whole(seed):
        seeds = tuple(range(seed, seed + count))
    else:
        seeds = tuple(seed) if isinstance(seed, Sequence) else (seed,)
    for value in seeds:
        good = _is_whole(value) and 0 <= value < 2**63
        _require(good, f"a seed must be a whole number from 0 to 2^63 - 1, got {value!r}")
    _require(len(seeds) == count, f"got {len(seeds)} seeds for {count} videos")
    return seeds


def _images(
    request: GenerationRequest, model: ModelConfig
) -> tuple[Image.Image | None, Image.Image | None]:
    """First and last frame, upright RGB, in their own sizes."""
    if model.task == "t2v":
        _require(
            request.image is None and request.last_image is None,
            f"{model.name} makes videos from text alone; for image-to-video use an i2v or "
            "ti2v model",
        )
    if model.task in ("i2v", "flf2v"):
        _require(request.image is not None, f"{model.name} needs an image (the first frame)")
    if model.task == "flf2v":
        _require(request.last_image is not None, f"{model.name} needs last_image (the last frame)")
    # Models with CLIP or a pinned first frame have no place for a second image.
    takes_last = model.task == "flf2v" or (
        model.task == "i2v" and model.transformer.image_dim is None
    )
    _require(request.last_image is None or takes_last, f"{model.name} does not take a last_image")
    image, last_image = (
        None if given is None else load_image(given)
        for given in (request.image, request.last_image)
    )
    return image, last_image


def _size(
    request: GenerationRequest, model: ModelConfig, image: Image.Image | None
) -> tuple[int, int]:
    """Width and height: explicit, by name, or with the image's shape and the named area."""
    width, height = request.width, request.height
    named = request.resolution is not None or request.aspect_ratio is not None
    _require((width is None) == (height is None), "give both width and height, or neither")
    if width is not None and height is not None:
        _require(not named, "give width and height, or resolution and aspect_ratio, not both")
        _check_explicit_size(width, height, model)
        return width, height
    resolution = request.resolution or next(iter(model.sizes))
    _require(
        resolution in model.sizes,
        f"{model.name} has no resolution {resolution!r}; supported: {', '.join(model.sizes)}",
    )
    sizes = model.sizes[resolution]
    aspect_ratio = request.aspect_ratio or next(iter(sizes))
    _require(
        aspect_ratio in sizes,
        f"{model.name} has no aspect ratio {aspect_ratio!r} at {resolution}; "
        f"supported: {', '.join(sizes)}",
    )
    # A model that knows a single shape keeps it: the image is cropped instead.
    if image is None or request.aspect_ratio is not None or len(sizes) == 1:
        return sizes[aspect_ratio]
    return _size_like(image, area=math.prod(sizes[aspect_ratio]), model=model)


def _check_explicit_size(width: int, height: int, model: ModelConfig) -> None:
    row, column = model.size_multiple
    legal_w, legal_h = (
        min(max(round(side / multiple), 1), MAX_SIDE // multiple) * multiple
        for side, multiple in ((width, column), (height, row))
    )
    _require(
        (width, height) == (legal_w, legal_h),
        f"{model.name} cannot make {width}x{height}: the width must be a positive multiple of "
        f"{column} and the height of {row}, up to {MAX_SIDE}; nearest: {legal_w}x{legal_h}",
    )


def _size_like(image: Image.Image, area: int, model: ModelConfig) -> tuple[int, int]:
    """The image's aspect ratio within `area` pixels, rounded down to legal multiples."""
    row, column = model.size_multiple
    ratio = image.height / image.width
    width = round(math.sqrt(area / ratio)) // column * column
    height = round(math.sqrt(area * ratio)) // row * row
    _require(
        0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE,
        f"an image of {image.width}x{image.height} is too narrow for a video of its shape; "
        "give an aspect_ratio or width and height",
    )
    return width, height


def _frames(request: GenerationRequest, model: ModelConfig, width: int, height: int) -> int:
    frames = model.frames if request.frames is None else request.frames
    stride = model.vae.temporal_stride
    _require(frames >= 1, f"frames must be positive, got {frames}")
    below = (frames - 1) // stride * stride + 1
    _require(
        frames == below,
        f"frames must be {stride}k+1, got {frames}; nearest: {below} and {below + stride}",
    )
    tokens = model.token_count(frames, height, width)
    _require(
        tokens <= MAX_TOKENS,
        f"{frames} frames of {width}x{height} are {tokens:,} tokens, supported: up to "
        f"{MAX_TOKENS:,}; ask for fewer frames or a smaller size",
    )
    return frames


def _schedule(request: GenerationRequest, defaults: SamplingConfig, pixels: int) -> dict[str, Any]:
    """Solver, steps and what belongs to the solver, for frames of so many pixels."""
    solver = request.solver or defaults.solver
    _require(
        solver in get_args(Solver),
        f"unknown solver {solver!r}; supported: {', '.join(get_args(Solver))}",
    )
    if solver == "few-step":
        _require(request.shift is None, "shift has no meaning for the few-step solver")
        mid_times = MID_TIMES if request.mid_times is None else tuple(request.mid_times)
        steps = request.steps
        if steps is None:
            own = defaults.solver == "few-step" and request.mid_times is None
            steps = defaults.steps if own else len(mid_times) + 1
        sigma_max = defaults.sigma_max if request.sigma_max is None else request.sigma_max
        few_step_times(steps, sigma_max, mid_times)
        return {
            "solver": solver,
            "steps": steps,
            "sigma_max": sigma_max,
            "mid_times": mid_times[: steps - 1],
            "ode": bool(request.ode),
        }
    for name in ("sigma_max", "mid_times", "ode"):
        _require(
            getattr(request, name) is None,
            f"{name} belongs to the few-step solver, and the solver is {solver}",
        )
    steps = defaults.steps if request.steps is None else request.steps
    if request.steps is None and defaults.solver == "few-step":
        steps = MULTISTEP_STEPS
    _require(1 <= steps <= MAX_STEPS, f"steps must be between 1 and {MAX_STEPS}, got {steps}")
    default = defaults.shift
    if defaults.shift_480p is not None and pixels <= AREA_480P:
        default = defaults.shift_480p
    shift = default if request.shift is None else request.shift
    _require(shift > 0, f"shift must be positive, got {shift}")
    return {"solver": solver, "steps": steps, "shift": shift}


def _guidance(request: GenerationRequest, model: ModelConfig) -> dict[str, Any]:
    """Guidance of each expert, their boundary, and the negative prompt if it has a use."""
    defaults = model.sampling
    solver = request.solver or defaults.solver
    # rCM students have their guidance built in, or say what they need.
    own = solver != "few-step" or defaults.solver == "few-step"
    guidance = request.guidance
    if guidance is None:
        guidance = defaults.guidance if own else 1.0
    values: dict[str, Any] = {"guidance": guidance}
    if defaults.boundary is None:
        for name in ("guidance_high_noise", "boundary"):
            _require(
                getattr(request, name) is None,
                f"{name} belongs to two-expert models, and {model.name} has one expert",
            )
    else:
        high = request.guidance_high_noise
        if high is None:
            own = own and request.guidance is None
            high = defaults.guidance_high_noise if own else guidance
        boundary = defaults.boundary if request.boundary is None else request.boundary
        _require(0 < boundary < 1, f"boundary must be between 0 and 1, got {boundary}")
        values |= {"guidance_high_noise": high, "boundary": boundary}
    scales = [guidance, values.get("guidance_high_noise", guidance)]
    _require(min(scales) >= 1, f"guidance must be 1 (off) or more, got {min(scales)}")
    if max(scales) > 1:
        given = request.negative_prompt
        values["negative_prompt"] = defaults.negative_prompt if given is None else given
    else:
        _require(
            request.negative_prompt is None,
            "a negative prompt has no effect without guidance; set guidance above 1",
        )
    return values
