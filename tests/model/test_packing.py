"""Packed projections, encoded contexts and 8-bit layers against the plain model."""

from __future__ import annotations

import pytest
import torch
from tests.model.test_wan import VARIANTS, random_inputs, random_model, relative_error, run
from torch import nn

from turbodit.config import TransformerConfig
from turbodit.model.wan import WanModel
from turbodit.quantization import (
    FORMATS,
    QuantizedLinear,
    can_concatenate,
    concatenate,
    linear_format,
    quantize_linears,
    replace_linears,
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_and_encoding_change_nothing(variant: str) -> None:
    model, x = random_model(VARIANTS[variant]), random_inputs(variant)
    want = run(model, x)
    for _ in "twice":
        model.pack_projections()
    assert not hasattr(model.blocks[0].self_attn, "k")
    assert relative_error(run(model, x), want) < 1e-6
    with torch.no_grad():
        encoded = model.encode_context(x.context, x.image_context)
        assert relative_error(model(x.latents, x.t, encoded), want) < 1e-6


@pytest.mark.parametrize("format", FORMATS)
def test_quantised_model_is_near_the_plain_one(format: str) -> None:
    model, x = random_model(VARIANTS["i2v-clip"]), random_inputs("i2v-clip")
    want = run(model, x)
    quantize_linears(model, format)
    plain = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert not any(name.startswith("blocks.") for name in plain) and "head.head" in plain
    got = run(model, x)
    assert 1e-4 < relative_error(got, want) < (0.05 if format == "fp8-channel" else 0.02)
    packed = format != "int8-block"  # whose blocks of 128 do not meet at this width of 72
    model.pack_projections()
    assert hasattr(model.blocks[0].self_attn, "qkv") == packed
    assert relative_error(run(model, x), got) < 1e-5


def test_proj_l_is_not_quantised() -> None:
    model = WanModel(VARIANTS["t2v"], "sla")
    quantize_linears(model, "int8-channel")
    assert isinstance(model.blocks[0].self_attn.attn_op.local_attn.proj_l, nn.Linear)
    assert isinstance(model.blocks[0].self_attn.o, QuantizedLinear)


def test_replaced_layers_take_the_state_of_quantised_ones() -> None:
    model, x = random_model(VARIANTS["t2v"]), random_inputs("t2v")
    quantize_linears(model, "int8-block")
    with torch.device("meta"):
        empty = WanModel(VARIANTS["t2v"])
        replace_linears(empty, "int8-block")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(run(empty.eval(), x), run(model, x))


@pytest.mark.parametrize("format", FORMATS)
def test_concatenated_blocks_of_128(format: str) -> None:
    torch.manual_seed(0)
    linears = [QuantizedLinear.from_linear(nn.Linear(200, 128), format) for _ in range(3)]
    x = torch.randn(2, 5, 200)
    got = concatenate(linears)(x)
    torch.testing.assert_close(got, torch.cat([linear(x) for linear in linears], -1))


def test_layers_of_different_kinds_do_not_go_together() -> None:
    plain, other = nn.Linear(8, 8), nn.Linear(8, 8)
    assert can_concatenate([plain, other])
    quantised = QuantizedLinear.from_linear(other, "int8-channel")
    with pytest.raises(ValueError, match="do not go together"):
        concatenate([plain, quantised])


def test_bfloat16_residual_is_near_the_float32_one() -> None:
    x = random_inputs("t2v")
    model = random_model(VARIANTS["t2v"])
    want = run(model, x)
    model.residual = "bfloat16"
    assert 1e-5 < relative_error(run(model, x), want) < 0.01


def test_bad_names_are_refused() -> None:
    config = TransformerConfig(dim=24, ffn_dim=24, num_heads=2, num_layers=1)
    with pytest.raises(ValueError, match="unknown residual 'float16'; supported: float32, bf"):
        WanModel(config, residual="float16")
    with pytest.raises(ValueError, match="unknown 8-bit format 'int4'; supported: int8-block"):
        linear_format("int4")
    assert linear_format("fp8") == "fp8-channel"


def test_weights_that_are_not_finite_name_their_layer() -> None:
    model = random_model(VARIANTS["t2v"])
    with torch.no_grad():
        model.blocks[1].ffn[2].weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"blocks.1.ffn.2: a weight with NaN"):
        quantize_linears(model, "int8-block")
