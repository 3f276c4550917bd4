"""What a transformer's files say about its use, besides its shape and its 8-bit format.

    "attention"            back-end of self attention (`attention.BACKENDS`)
    "attention_settings"   of that back-end, such as {"ratio": 0.1}
    "sampling"             the fields of `config.SamplingConfig` that are not the model's own

These are keys of config.json, and of what single files have in its place. All are optional, and
what a caller asks for wins over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from turbodit.attention import BACKENDS, attention_function
from turbodit.config import ModelConfig, SamplingConfig

KEYS = ATTENTION, SETTINGS, SAMPLING = ("attention", "attention_settings", "sampling")
DEFAULT_ATTENTION = "sdpa"  # where nobody says another
Stated = Mapping[str, Any]


def read_stated(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    """KEYS of what a file holds, checked.

    Raises: as `check_stated`.
    """
    stated = {key: content[key] for key in KEYS if key in content}
    check_stated(stated, place)
    return stated


def check_stated(stated: Stated, place: str) -> None:
    """Raise unless a model can be used as `stated` says.

    Args:
        place: where it is said, for errors.

    Raises:
        ValueError: unknown keys, back-ends, settings or fields, or values that they do not take.
    """
    unknown = sorted(stated.keys() - set(KEYS))
    if unknown:
        raise ValueError(f"{place} states {', '.join(unknown)}; supported: {', '.join(KEYS)}")
    for key in (SETTINGS, SAMPLING):
        value = stated.get(key, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{place}: {key} is {value!r}, expected names and their values")
    _check_attention(stated, place)
    _check_sampling(stated.get(SAMPLING, {}), place)


def _check_attention(stated: Stated, place: str) -> None:
    if ATTENTION not in stated:
        if SETTINGS in stated:
            raise ValueError(f"{place} states {SETTINGS}, but not {ATTENTION}")
        return
    name, settings = stated[ATTENTION], stated.get(SETTINGS, {})
    try:
        with torch.device("meta"):
            attention_function(name, head_dim=1, **settings)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    except TypeError as error:  # values of another type
        raise ValueError(
            f"{place}: attention {name!r} does not take {settings}: {error}"
        ) from error


def _check_sampling(sampling: Mapping[str, Any], place: str) -> None:
    types = get_type_hints(SamplingConfig)
    unknown = sorted(sampling.keys() - types.keys())
    if unknown:
        raise ValueError(
            f"{place}: {SAMPLING} has no {', '.join(unknown)}; supported: {', '.join(types)}"
        )
    for name, value in sampling.items():
        if not _is_of(value, types[name]):
            kinds = get_args(types[name]) or (types[name],)
            expected = " or ".join(getattr(kind, "__name__", repr(kind)) for kind in kinds)
            raise ValueError(f"{place}: {SAMPLING} {name} is {value!r}, expected {expected}")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a field's type: a class, a union of some, or a Literal."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    classes = get_args(kind) or (kind,)
    if float in classes:
        classes = (*classes, int)
    return isinstance(value, classes) and not isinstance(value, bool)


def agreed(stated: Mapping[Path, Stated]) -> Stated:
    """What the transformers of one model state, all the same.

    Raises:
        ValueError: two of them differ.
    """
    (first, expected), *others = stated.items()
    for source, got in others:
        for key in KEYS:
            if got.get(key) != expected.get(key):
                raise ValueError(
                    f"the experts of a model must state the same {key}; {first} states "
                    f"{expected.get(key, 'none')}, {source} {got.get(key, 'none')}"
                )
    return expected


def choose_attention(
    model: ModelConfig, stated: Stated, name: str | None, settings: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Back-end of self attention and all its settings that are not its own defaults.

    What is asked for, over what the files state, over what the model has. A setting that is
    stated for another back-end counts where both have it, as "sla" and "sagesla" do.

    Args:
        stated: by the model's transformers.
        name, settings: as asked for; None for the stated back-end.

    Raises:
        ValueError: unknown back-end or setting, values that it does not take, or a variant of
            "sla" that "sagesla" does not compute.
    """
    chosen = stated.get(ATTENTION, DEFAULT_ATTENTION) if name is None else name
    with torch.device("meta"):
        attention_function(chosen, head_dim=model.transformer.head_dim, **settings)
    defaults = model.block_settings | stated.get(SETTINGS, {})
    if chosen == "sagesla" and defaults.get("variant", "released") != "released":
        raise ValueError(
            f"the files state variant {defaults['variant']!r} of attention 'sla', got 'sagesla', "
            "which computes 'released' alone; supported: 'sla'"
        )
    takes = BACKENDS[chosen].settings
    return chosen, {key: defaults[key] for key in takes if key in defaults} | dict(settings)
