from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.benchmark.tiny import CPU, TINY, WORKLOAD

from turbodit.benchmark.workload import Inputs, Workload


@pytest.mark.parametrize(
    ("name", "size", "frames", "tokens"),
    [
        ("Wan2.1-T2V-1.3B", None, None, 32_760),
        ("Wan2.1-T2V-14B", None, None, 75_600),
        ("Wan2.1-I2V-14B-480P", (832, 480), 81, 32_760),
        ("wan2.2-ti2v-5b", None, None, 27_280),
        ("spritewan", (128, 128), 5, 32),
    ],
)
def test_a_presets_video(name, size, frames, tokens):
    assert Workload.of(name, size, frames).tokens == tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Wan9",), "unknown model 'Wan9'"),
        (("spritewan", (100, 256)), "nearest: 96x256"),
        (("spritewan", None, 6), "frames must be 4k"),
    ],
)
def test_impossible_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Workload.of(*arguments)


def test_inputs_are_the_same_every_time():
    first, second = (Inputs.of(WORKLOAD, CPU, torch.float32) for _ in "ab")
    assert torch.equal(first.noise, second.noise)
    assert torch.equal(first.context, second.context)


def test_inputs_have_what_the_model_needs():
    shape = replace(TINY.transformer, in_dim=68, image_dim=24, image_positions=514)
    workload = replace(WORKLOAD, model=replace(TINY, transformer=shape))
    seen = []
    inputs = Inputs.of(workload, CPU, torch.bfloat16)
    inputs.step(lambda *arguments: seen.extend(arguments))()
    latents, t, context, features = seen
    assert latents.shape == (1, 68, 2, 8, 8)
    assert t.tolist() == [pytest.approx(0.7)]
    assert (context.shape, context.dtype) == ((1, 8, 16), torch.bfloat16)
    assert features.shape == (1, 514, 24)
