"""A model and how it is run, as one word: `spritewan:steps=4,attention=sagesla,linear=fp8`.

No torch here: the command line reads specs before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from turbodit.config import Solver

if TYPE_CHECKING:
    from turbodit.pipeline import Pipeline, Progress

Linear = Literal["int8-block", "int8-channel", "fp8"]
Residual = Literal["float32", "bfloat16"]
DType = Literal["bfloat16", "float16", "float32"]
Offload = Literal["none", "model", "sequential"]


def _one_of(type_: Any) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in get_args(type_):
            raise ValueError(f"supported: {', '.join(get_args(type_))}")
        return text

    return read


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("supported: true, false")
    return text == "true"


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split())


# How the model is loaded, and what is asked of it. The names are those of `generate`'s flags.
LOADING: dict[str, Callable[[str], Any]] = {
    "transformer": Path,
    "attention": str,
    "sla_topk": float,
    "linear": _one_of(Linear),
    "residual": _one_of(Residual),
    "dtype": _one_of(DType),
    "offload": _one_of(Offload),
}
SAMPLING: dict[str, Callable[[str], Any]] = {
    "steps": int,
    "solver": _one_of(Solver),
    "shift": float,
    "guidance": float,
    "guidance_high_noise": float,
    "boundary": float,
    "sigma_max": float,
    "mid_times": _numbers,
    "ode": _switch,
}
KEYS = LOADING | SAMPLING
SEVERAL = ("transformer",)  # keys that may be given twice, for two experts


@dataclass(frozen=True)
class ModelSpec:
    """One model and how it is run.

    Attributes:
        model: name, folder or Hub id.
        loading, sampling: the options given, by the names in LOADING and SAMPLING.
    """

    model: str
    loading: Mapping[str, Any]
    sampling: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The whole spec, as `read_spec` takes it; names the model in tables and labels."""
        options = {**self.loading, **self.sampling}
        parts = [f"{key}={word}" for key, value in options.items() for word in _words(key, value)]
        return f"{self.model}:{','.join(parts)}" if parts else self.model

    @property
    def transformers(self) -> tuple[Path, ...]:
        """Other weights for the transformer; empty for the model's own."""
        return self.loading.get("transformer", ())

    @property
    def record(self) -> dict[str, Any]:
        """What decides a video besides the sampler's settings, plain values."""
        record = {"weights": self.model, **self.loading}
        if self.transformers:
            record["transformer"] = [str(path) for path in self.transformers]
        return record

    def load(self, device: str | None, progress: Progress | None = None) -> Pipeline:
        """The model, ready to run on `device` (None: a GPU if there is one).

        Raises:
            FileNotFoundError: no such model, or a part of it is missing.
            ValueError: a broken file, or something that does not run on the device.
        """
        import torch

        from turbodit.pipeline import Pipeline
        from turbodit.quantization import linear_format

        options = dict(self.loading)
        if "sla_topk" in options:
            options["attention_settings"] = {"ratio": options.pop("sla_topk")}
        if "linear" in options:
            options["linear"] = linear_format(options["linear"])
        if "dtype" in options:
            options["dtype"] = getattr(torch, options["dtype"])
        return Pipeline.from_pretrained(self.model, device=device, progress=progress, **options)


def _words(key: str, value: Any) -> list[str]:
    """The values of a key in a spec."""
    if key in SEVERAL:
        return [str(one) for one in value]
    if isinstance(value, tuple):
        return [" ".join(map(str, value))]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def read_spec(text: str, common: Mapping[str, Any] | None = None) -> ModelSpec:
    """Read `model` or `model:key=value,key=value`.

    The keys are names of `turbodit generate`'s flags, with _ or -: those of LOADING and
    SAMPLING. `transformer` may be given twice, for two experts; `mid_times` are numbers with
    spaces between them. A colon that no `=` follows belongs to the model's name.

    Args:
        common: options for what the spec leaves open, by the same names; values as they are
            in the result.

    Raises:
        ValueError: no model, an unknown key, a key given twice, or a value that cannot be read.
    """
    model, colon, tail = text.rpartition(":")
    if not colon or "=" not in tail:
        model, tail = text, ""
    if not model:
        raise ValueError(f"{text!r} names no model; expected MODEL or MODEL:key=value,key=value")
    options = dict(common or {}) | _options(text, tail)
    return ModelSpec(
        model,
        {key: value for key, value in options.items() if key in LOADING},
        {key: value for key, value in options.items() if key in SAMPLING},
    )


def _options(text: str, tail: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in tail.split(",") if tail else ():
        name, equals, value = part.partition("=")
        key = name.strip().replace("-", "_")
        if not equals or key not in KEYS:
            raise ValueError(f"unknown option {part!r} in {text!r}; supported: {', '.join(KEYS)}")
        try:
            read = KEYS[key](value.strip())
        except ValueError as error:
            raise ValueError(f"cannot read {part!r} in {text!r}: {error}") from error
        if key in SEVERAL:
            read = (*options.get(key, ()), read)
        elif key in options:
            raise ValueError(f"{key} is given twice in {text!r}")
        options[key] = read
    return options
