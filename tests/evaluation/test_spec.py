"""Specs of models: what they say, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbodit.evaluation.spec import KEYS, read_spec
from turbodit.pipeline import Pipeline


def test_a_name_alone() -> None:
    spec = read_spec("spritewan")
    assert (spec.text, spec.model) == ("spritewan", "spritewan")
    assert (spec.loading, spec.sampling) == ({}, {})
    assert spec.record == {"weights": "spritewan"}


def test_options_of_both_kinds() -> None:
    spec = read_spec("a/b:steps=3, sla-topk=0.2,linear=fp8,mid_times=1.5 1.4,ode=true")
    assert spec.model == "a/b"
    assert spec.loading == {"sla_topk": 0.2, "linear": "fp8"}
    assert spec.sampling == {"steps": 3, "mid_times": (1.5, 1.4), "ode": True}
    assert spec.record == {"weights": "a/b", "sla_topk": 0.2, "linear": "fp8"}
    assert spec.text == "a/b:sla_topk=0.2,linear=fp8,steps=3,mid_times=1.5 1.4,ode=true"
    assert read_spec(spec.text) == spec


def test_a_colon_in_the_name() -> None:
    assert read_spec("C:/models/wan").model == "C:/models/wan"
    assert read_spec("C:/wan:steps=4").model == "C:/wan"


def test_two_experts() -> None:
    spec = read_spec("wan:transformer=high,transformer=low")
    assert spec.transformers == (Path("high"), Path("low"))
    assert spec.record["transformer"] == ["high", "low"]
    assert read_spec(spec.text) == spec


def test_own_options_win_over_common_ones() -> None:
    common = {"steps": 20, "guidance": 2.0, "transformer": (Path("x"),)}
    spec = read_spec("wan:steps=4,transformer=y", common)
    assert spec.sampling == {"steps": 4, "guidance": 2.0}
    assert spec.transformers == (Path("y"),)
    assert spec.text == "wan:transformer=y,steps=4,guidance=2.0", "nothing is left out"
    assert common["steps"] == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (":steps=4", "names no model"),
        ("", "names no model"),
        ("wan:stepps=4", f"unknown option 'stepps=4' in .*; supported: {', '.join(KEYS)}"),
        ("wan:steps=4,fast", "unknown option 'fast'"),
        ("wan:steps=4,steps=5", "steps is given twice"),
        ("wan:steps=four", "cannot read 'steps=four' in .*: invalid literal"),
        ("wan:linear=int4", "supported: int8-block, int8-channel, fp8"),
        ("wan:solver=magic", "supported: unipc, euler"),
        ("wan:ode=1", "supported: true, false"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(text)


def test_what_the_pipeline_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    given = {}
    monkeypatch.setattr(
        Pipeline, "from_pretrained", lambda model, **options: given.update(options, model=model)
    )
    text = "wan:attention=sla,sla_topk=0.3,linear=fp8,dtype=bfloat16,residual=bfloat16,steps=4"
    read_spec(text).load("cpu")
    assert given == {
        "model": "wan",
        "device": "cpu",
        "progress": None,
        "attention": "sla",
        "attention_settings": {"ratio": 0.3},
        "linear": "fp8-channel",
        "dtype": torch.bfloat16,
        "residual": "bfloat16",
    }
