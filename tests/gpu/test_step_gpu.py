"""A DiT's step on a GPU: fused glue, packed projections, 8-bit layers, CUDA graphs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from turbodit.config import TransformerConfig
from turbodit.graph import StepGraph
from turbodit.kernels import norm as ops
from turbodit.kernels.norm import reference
from turbodit.kernels.quantized_linear import Quantized, quantize_activation
from turbodit.kernels.quantized_linear.reference import dequantize
from turbodit.model.layers import FeedForward
from turbodit.model.wan import WanModel
from turbodit.quantization import FORMATS, QuantizedLinear, quantize_linears

pytestmark = pytest.mark.gpu

EPS = 1e-6
WIDTHS = (64, 1000, 1536, 3072, 5120)
SMALL = TransformerConfig(
    dim=384, ffn_dim=1000, num_heads=3, num_layers=3, text_dim=64, text_len=32
)
WITH_CLIP = TransformerConfig(
    dim=384, ffn_dim=1024, num_heads=3, num_layers=2, text_dim=64, text_len=32, in_dim=36,
    image_dim=80,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def gaussian(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", [1, 129])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["affine", "modulated"])
def test_add_norm(width: int, length: int, stream: torch.dtype, form: str) -> None:
    x, update = gaussian(2, length, width, dtype=stream), gaussian(2, length, width)
    table = torch.randn(2, 1, 6, width, device="cuda")
    gate = table[:, :, 2]
    given = [torch.randn(width, device="cuda") for _ in "wb"] + [None, None]
    if form == "modulated":
        given = [None, None, table[:, :, 0], table[:, :, 1]]
    names = dict(zip(("weight", "bias", "shift", "scale"), given, strict=True))
    y, h = ops.add_norm(x, update, gate, **names, eps=EPS, out=torch.bfloat16)
    want_y = reference.add(x, update, gate)
    torch.testing.assert_close(y, want_y, rtol=2**-7, atol=1e-6)
    assert torch.equal(ops.gated_add(x, update, gate), y)
    want = reference.layer_norm(y, *given, EPS)
    torch.testing.assert_close(h.float(), want, rtol=2**-7, atol=1e-3)
    for format in ops.ROW_FORMATS:
        values, scale = ops.norm(y, **names, eps=EPS, out=format)
        theirs = reference.norm(y, *given, EPS, None, format)
        torch.testing.assert_close(scale, theirs[1])
        got, same = (dequantize(*pair, format) for pair in ((values, scale), theirs))
        assert error(got, want) <= 1.05 * error(same, want)


def test_a_modulation_for_every_token() -> None:
    """More of them than the second axis of a grid has."""
    batch, length, width = 2, 40_000, 64
    x, update = (gaussian(batch, length, width, dtype=torch.float32) for _ in range(2))
    gate, shift, scale = torch.randn(3, batch, length, width, device="cuda").unbind()
    y, h = ops.add_norm(x, update, gate, shift=shift, scale=scale, eps=EPS, out=torch.bfloat16)
    torch.testing.assert_close(y, reference.add(x, update, gate))
    want = reference.layer_norm(y, None, None, shift, scale, EPS)
    torch.testing.assert_close(h.float(), want, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("width", [1536, 3072, 5120])
@pytest.mark.parametrize("rotated", [False, True])
def test_rms_norm(width: int, rotated: bool) -> None:
    x = gaussian(2, 129, 3 * width)[..., width : 2 * width]
    weight = torch.randn(width, device="cuda")
    angles = torch.randn(2, 129, 64, device="cuda")
    angles = (angles[0].cos(), angles[0].sin()) if rotated else None
    got = ops.rms_norm(x, weight, EPS, angles)
    want = reference.rms_norm(x.double(), weight.double(), EPS, *(angles or (None, None)))
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=1e-3)
    ops.rms_norm(x, weight, EPS, angles, in_place=True)
    assert torch.equal(x, got)


def model(config: TransformerConfig = SMALL, **settings) -> WanModel:
    made = WanModel(config, **settings).cuda().eval()
    for name, p in made.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name and "weight" in name else 0, std=0.05)
        if not made.keep_float32(name):
            p.data = p.data.bfloat16()
    return made


def inputs(config: TransformerConfig = SMALL, size: int = 10, batch: int = 1) -> list[torch.Tensor]:
    given = [
        gaussian(batch, config.in_dim, 3, size, 14),
        torch.rand(batch, device="cuda"),
        gaussian(batch, config.text_len, config.text_dim),
    ]
    if config.image_dim is not None:
        given.append(gaussian(batch, 257, config.image_dim))
    return given


def wide(small: WanModel) -> WanModel:
    return copy.deepcopy(small).float()


@torch.no_grad()
@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_fused_bf16_step_against_float32(residual: str) -> None:
    ours, given = model(residual=residual), inputs()
    want = wide(ours)(*(x.float() for x in given))
    assert error(ours(*given), want) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, WITH_CLIP], ids=["t2v", "clip"])
def test_packed_projections_change_nothing(config: TransformerConfig) -> None:
    ours, given = model(config), inputs(config)
    want = ours(*given)
    ours.pack_projections()
    assert ours.blocks[0].self_attn.qkv.out_features == 3 * config.dim
    assert error(ours(*given), want) < 0.005  # another tile, another order of sums
    encoded = ours.encode_context(*given[2:])
    torch.testing.assert_close(ours(*given[:2], encoded), ours(*given), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_step(format: str) -> None:
    ours, given = model(), inputs()
    want = ours(*given)
    quantize_linears(ours, format)
    assert isinstance(ours.blocks[0].ffn[2], QuantizedLinear)
    got = ours(*given)
    assert error(got, want) < 0.1
    ours.pack_projections()
    assert error(ours(*given), got) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "sagesla"])
@pytest.mark.parametrize("format", [None, "fp8-channel"])
def test_graph_replays_the_step(attention: str, format: str | None) -> None:
    ours = model(attention=attention)
    if format is not None:
        quantize_linears(ours, format)
    ours.pack_projections()
    graph = StepGraph(ours)
    first, second = inputs(), inputs()
    for given in (first, second, first):
        torch.testing.assert_close(graph(*given), ours(*given), rtol=0, atol=0)
    encoded = ours.encode_context(second[2])
    latents, t = first[:2]
    got = graph(latents, t, encoded)
    torch.testing.assert_close(graph(latents, t, encoded), got, rtol=0, atol=0)
    torch.testing.assert_close(got, ours(latents, t, second[2]), rtol=0, atol=0)
    recorded, held = graph._recording, graph.memory
    assert held > 0
    torch.testing.assert_close(graph(latents.double(), t, encoded), got, rtol=0, atol=0)
    assert graph._recording is recorded
    larger = inputs(size=12)
    torch.testing.assert_close(graph(*larger), ours(*larger), rtol=0, atol=0)
    assert graph._recording is not recorded
    graph.release()
    assert graph.memory == 0


@torch.no_grad()
def test_graph_outlives_the_tables_of_other_sizes() -> None:
    ours, given = model(), inputs()
    graph = StepGraph(ours)
    want = graph(*given)
    for size in range(2, 42, 2):  # more than are kept
        ours(*inputs(size=size))
    torch.cuda.empty_cache()
    junk = torch.full((2**22,), torch.nan, device="cuda")
    torch.testing.assert_close(graph(*given), want, rtol=0, atol=0)
    del junk


@torch.no_grad()
def test_two_graphs_that_take_turns_share_their_memory() -> None:
    given = inputs(size=64)
    first = StepGraph(model())
    second = StepGraph(model(), first)
    want = first(*given)
    second(*given)
    assert 0 <= second.memory < 0.5 * first.memory
    torch.testing.assert_close(first(*given), want, rtol=0, atol=0)


def test_graph_on_a_cpu_says_why_not() -> None:
    ours = WanModel(SMALL)
    with pytest.raises(ValueError, match="needs a GPU"):
        StepGraph(ours)(*(x.cpu().float() for x in inputs()))


@torch.no_grad()
def test_compiled_step_has_no_graph_breaks() -> None:
    ours, given = model(), inputs()
    quantize_linears(ours, "fp8-channel")
    ours.pack_projections()
    want = ours(*given)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True)
    assert error(compiled(*given), want) < 0.02


# The product that ends with GELU and fp8.


@pytest.fixture
def hopper_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows with each call of the kernel for Hopper."""
    from turbodit.kernels.quantized_linear import triton

    if torch.cuda.get_device_capability() != (9, 0) or triton.TRITON_VERSION < (3, 6):
        pytest.skip("needs compute capability 9.0 and Triton 3.6")
    from turbodit.kernels.quantized_linear import hopper

    calls = []
    gelu_linear = hopper.gelu_linear

    def counted(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(arguments[0]))
        return gelu_linear(*arguments)

    monkeypatch.setattr(hopper, "gelu_linear", counted)
    return calls


def feed_forward(dim: int = 384, hidden: int = 1024) -> FeedForward:
    layers = FeedForward(dim, hidden).cuda().bfloat16()
    for place in (0, 2):
        layers[place] = QuantizedLinear.from_linear(layers[place], "fp8-channel")
    return layers.requires_grad_(False)


def rows(length: int, dim: int = 384) -> Quantized:
    return quantize_activation(gaussian(1, length, dim), "fp8-channel")


def separately(layers: FeedForward, x: Quantized) -> torch.Tensor:
    return layers[2](quantize_activation(layers[0](x), "fp8-channel", "gelu"))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 127, 4097])
def test_feed_forward_against_float32(length: int, hopper_calls: list[int]) -> None:
    layers, x = feed_forward(), rows(length)
    up, _, down = layers
    hidden = dequantize(*x, "fp8-channel") @ dequantize(*up.weight, "fp8-channel").t() + up.bias
    hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
    want = hidden @ dequantize(*down.weight, "fp8-channel").t() + down.bias
    got, other = layers(x), separately(layers, x)
    assert got.dtype == torch.bfloat16 and got.shape == (1, length, 384)
    assert error(got, want) < 1.1 * error(other, want) + 0.01
    assert hopper_calls == [length]


@torch.no_grad()
def test_feed_forward_has_no_bfloat16_between(hopper_calls: list[int]) -> None:
    layers, x = feed_forward(), rows(65_536)

    def peak(run: Any) -> int:
        run()  # compiles, and takes what is kept
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    values = 65_536 * 1024
    fused, separate = peak(lambda: layers(x)), peak(lambda: separately(layers, x))
    assert fused + values // 2 < separate
    assert hopper_calls == [65_536] * 2


@torch.no_grad()
def test_feed_forward_compiles_as_one_graph(hopper_calls: list[int]) -> None:
    layers, x = feed_forward(), rows(300)
    want = layers(x)
    torch.compiler.reset()
    compiled = torch.compile(layers, fullgraph=True)
    for _ in "twice":
        torch.testing.assert_close(compiled(x), want, rtol=0, atol=0)
    assert len(hopper_calls) >= 3


@torch.no_grad()
def test_feed_forward_as_a_cuda_graph(hopper_calls: list[int]) -> None:
    layers, x = feed_forward(), rows(300)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = layers(x)
    assert hopper_calls == [300] * 2
    for _ in range(2):
        for old, new in zip(x, rows(300), strict=True):
            old.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(out, layers(x), rtol=0, atol=0)


@torch.no_grad()
def test_step_with_gelu_in_the_product(hopper_calls: list[int]) -> None:
    ours, given = model(replace(SMALL, ffn_dim=1024)), inputs()
    want = ours(*given)
    quantize_linears(ours, "fp8-channel")
    ours.pack_projections()
    got = ours(*given)
    assert error(got, want) < 0.1
    assert len(hopper_calls) == SMALL.num_layers
    graph = StepGraph(ours)
    torch.testing.assert_close(graph(*given), got, rtol=0, atol=0)
    calls = len(hopper_calls)
    torch.testing.assert_close(graph(*given), got, rtol=0, atol=0)
    assert len(hopper_calls) == calls  # it is replayed
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True)
    assert error(compiled(*given), got) < 0.02
    assert len(hopper_calls) > calls
