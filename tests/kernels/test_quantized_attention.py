"""8-bit attention: the reference against float64, the kernels against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.compile_only import ARCHITECTURES, assert_compiles

from turbodit.kernels.linear_attention.reference import FEATURE_MAPS, linear_branch
from turbodit.kernels.quantized_attention import (
    _quantized_attention,
    fastest_pv,
    quantized_attention,
    reference,
)

kernels = pytest.importorskip("turbodit.kernels.quantized_attention.triton")
triton, tl = kernels.triton, kernels.tl

DEFAULTS: dict[str, Any] = {
    "block_q": 32, "block_k": 32, "scale": 0.125, "causal": False, "pv": "fp16",
    "pv_threshold": None, "smooth_k": True, "smooth_v": False, "feature_map": "softmax",
}  # fmt: skip
# What a kernel may differ from its reference by: in fp8, P is rounded at another running maximum.
CLOSE = {"fp16": 1e-3, "fp8": 0.02}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def inputs(
    length_q: int, length_k: int, heads: int = 1, heads_kv: int | None = None, batch: int = 1,
    dim: int = 64, dtype: torch.dtype = torch.float16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """q, k, v with a K mean and a V mean, all views of one wider tensor each."""
    generator = torch.Generator().manual_seed(length_q + 1000 * length_k)

    def rows(length: int, heads: int) -> torch.Tensor:
        wide = torch.randn(batch, heads, length + 3, 2 * dim, generator=generator)
        return wide.to(dtype)[:, :, 1:-2, dim:].transpose(1, 2)

    heads_kv = heads_kv or heads
    channel = 3 * torch.randn(dim, generator=generator).to(dtype)
    q, k, v = rows(length_q, heads), rows(length_k, heads_kv), rows(length_k, heads_kv)
    return q, k + channel, v + 1


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """float64 attention of scale 1/8; visible bool, broadcast to (B,H,Lq,Lk)."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.mT / 8
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0) @ v).transpose(1, 2)


def block_map(
    q: torch.Tensor, k: torch.Tensor, kept: int, block: int = 32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random indices, counts from 0 on, and what they make visible (B,H,Lq,Lk)."""
    generator = torch.Generator().manual_seed(kept)
    (batch, length_q, heads, _), length_k = q.shape, k.shape[1]
    blocks_q, blocks_k = -(-length_q // block), -(-length_k // block)
    order = torch.rand(batch, heads, blocks_q, blocks_k, generator=generator).argsort(-1)
    counts = torch.randint(0, kept + 1, (batch, heads, blocks_q), generator=generator)
    counts[..., -1] = 0
    indices = order[..., :kept]
    rank = order.argsort(-1)
    visible = rank < counts[..., None]
    visible = visible.repeat_interleave(block, -1).repeat_interleave(block, -2)
    return indices.int(), counts.int(), visible[..., :length_q, :length_k]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is not initialised holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# The reference.


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_is_attention_but_for_rounding(pv: str, causal: bool) -> None:
    q, k, v = inputs(200, 333, heads=4, heads_kv=2, batch=2)
    visible = torch.ones(200, 333, dtype=torch.bool).tril() if causal else None
    out = quantized_attention(q, k, v, causal=causal, pv=pv, smooth_v=True)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert relative_error(out, exact(q, k, v, visible)) < {"fp16": 0.01, "fp8": 0.02}[pv]


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
def test_gaussian_inputs_lose_less_than_four_percent(pv: str) -> None:
    q, k, v = torch.randn(3, 1, 1000, 2, 64, generator=torch.Generator().manual_seed(0))
    error = relative_error(quantized_attention(q, k, v, pv=pv), exact(q, k, v))
    assert error < {"fp16": 0.015, "fp8": 0.04}[pv]


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
def test_outlier_channels_and_large_key_means(pv: str) -> None:
    q, k, v = torch.randn(3, 1, 500, 2, 64, generator=torch.Generator().manual_seed(0))
    k += 20 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    q[..., 3] *= 10
    v[..., 5] *= 50
    want = exact(q, k, v)
    out = quantized_attention(q, k, v, pv=pv)
    assert F.cosine_similarity(out.flatten(), want.float().flatten(), dim=0) > 0.998
    rough = quantized_attention(q, k, v, pv=pv, smooth_k=False)
    assert relative_error(rough[..., :5], want[..., :5]) > 3 * relative_error(
        out[..., :5], want[..., :5]
    )


def test_smoothed_values_keep_small_differences_from_a_large_mean() -> None:
    q, k, v = inputs(64, 64)
    v = v + 100
    smooth = quantized_attention(q, k, v, pv="fp8", smooth_v=True)
    rough = quantized_attention(q, k, v, pv="fp8")
    assert relative_error(smooth, exact(q, k, v)) < 0.1 * relative_error(rough, exact(q, k, v))


@pytest.mark.parametrize("smooth_v", [False, True])
def test_a_block_map_hides_blocks_and_empty_rows_are_zero(smooth_v: bool) -> None:
    q, k, v = inputs(100, 130, heads=2, batch=2)
    indices, counts, visible = block_map(q, k, kept=3)
    sparse = {"indices": indices, "counts": counts, "block_q": 32, "block_k": 32}
    out = quantized_attention(q, k, v, smooth_v=smooth_v, **sparse)
    assert relative_error(out, exact(q, k, v, visible)) < 0.01
    assert out[:, 96:].eq(0).all()


def test_all_blocks_in_any_order_are_dense_attention() -> None:
    q, k, v = inputs(64, 130, heads=2)
    indices = torch.tensor([4, 0, 3, 1, 2], dtype=torch.int32).expand(1, 2, 2, 5)
    sparse = quantized_attention(q, k, v, indices=indices, block_q=32, block_k=32)
    dense = quantized_attention(q, k, v, block_q=32, block_k=32)
    assert relative_error(sparse, dense) < 1e-3


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_the_linear_branch_is_added(feature_map: str) -> None:
    q, k, v = inputs(40, 70, heads=2, batch=2, dtype=torch.float32)
    linear = (torch.randn(2, 2, 64, 64), torch.rand(2, 2, 64), torch.randn(64))
    out = quantized_attention(q, k, v, linear=linear, feature_map=feature_map)
    branch = linear_branch(q.double(), *(x.double() for x in linear), feature_map)
    assert relative_error(out - quantized_attention(q, k, v), branch) < 1e-5


def test_known_statistics_change_nothing() -> None:
    q, k, v = inputs(40, 70, heads=2, batch=2)
    known = {"k_mean": k.float().mean(1), "v_largest": v.float().abs().amax(1)}
    assert torch.equal(quantized_attention(q, k, v, **known), quantized_attention(q, k, v))


def test_faint_blocks_are_left_out() -> None:
    q, k, v = inputs(64, 160, heads=2)
    q, k = 3 * q, k.clone()
    k[:, 32:64] = -q[:, 32:64]  # far under the rest, for the rows that they mirror
    every = quantized_attention(q, k, v, block_k=32)
    apart = quantized_attention(q, k, v, block_k=32, pv_threshold=2.0)
    hardly = quantized_attention(q, k, v, block_k=32, pv_threshold=20.0)
    assert relative_error(hardly, every) < 1e-6 < 1e-3 < relative_error(apart, every) < 0.2


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(1, 70, 1, 64, dtype=torch.float16)
    for pv in ("fp16", "fp8"):
        assert quantized_attention(zeros, zeros, zeros, pv=pv, causal=True).eq(0).all()
        assert kernels.quantized_attention(
            zeros, zeros, zeros, *(None,) * 5, **DEFAULTS | {"pv": pv, "causal": True}
        ).eq(0).all()  # fmt: skip


# The kernels.

LENGTHS = [(1, 1), (1, 65), (63, 64), (64, 63), (65, 111), (129, 33)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize(("length_q", "length_k"), LENGTHS)
def test_dense_kernel(length_q: int, length_k: int, pv: str) -> None:
    q, k, v = inputs(length_q, length_k)
    compare(q, k, v, pv=pv, smooth_v=length_q % 2 == 0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_batches_and_head_dimension_128(causal: bool, pv: str) -> None:
    q, k, v = inputs(70, 50, heads=3, heads_kv=1, batch=2, dim=128)
    compare(q, k, v, pv=pv, causal=causal)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("block_q", "block_k", "pv"), [(16, 16, "fp16"), (64, 64, "fp8"), (128, 64, "fp8")]
)
def test_block_sizes(block_q: int, block_k: int, pv: str) -> None:
    # Without a linear branch no product is in bfloat16, which the interpreter gets wrong.
    q, k, v = inputs(140, 90, dtype=torch.bfloat16 if pv == "fp8" else torch.float16)
    blocks = {"block_q": block_q, "block_k": block_k}
    compare(q, k, v, pv=pv, **blocks)
    indices = torch.zeros(1, 1, -(-140 // block_q), 1, dtype=torch.int32)
    indices[..., 1:, :] = 1
    compare(q, k, v, indices, pv=pv, **blocks)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_sparse_kernel_with_linear_branch(feature_map: str, pv: str) -> None:
    q, k, v = inputs(70, 80, heads=2)
    indices, counts, _ = block_map(q, k, kept=2)
    linear = (torch.randn(1, 2, 64, 64).half(), 1e5 * torch.rand(1, 2, 64), torch.randn(64))
    settings = {"pv": pv, "feature_map": feature_map, "smooth_v": True}
    compare(q, k, v, indices, counts, linear, **settings)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
def test_sparse_kernel(pv: str) -> None:
    q, k, v = inputs(100, 111, heads=2, batch=2)
    indices, counts, _ = block_map(q, k, kept=2)
    compare(q, k, v, indices, counts, pv=pv, smooth_v=True)
    compare(q, k, v, indices, pv=pv)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
def test_kernel_that_leaves_out_faint_blocks(pv: str) -> None:
    q, k, v = inputs(100, 111, heads=2)
    indices, counts, _ = block_map(q, k, kept=4)
    q = 4 * q
    q[:, :32], k[:, 32:64] = 8, -8  # a block that no row of a tile wants
    compare(q, k, v, indices, counts, pv=pv, pv_threshold=3.0)


@pytest.mark.usefixtures("poisoned")
def test_kernel_with_known_statistics() -> None:
    q, k, v = inputs(70, 80, heads=2, batch=2)
    known = (torch.randn(2, 2, 64), 2 * v.float().abs().amax(1))
    compare(q, k, v, None, None, None, *known)


def compare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sparse: Any, **settings: Any
) -> None:
    """Kernel and reference against each other, and against the reference without rounding."""
    arguments = (q, k, v, *sparse, *(None,) * (5 - len(sparse)))
    settings = DEFAULTS | settings
    with pytest.MonkeyPatch.context() as patch:
        got = kernels.quantized_attention(*arguments, **settings)
        patch.setattr(reference, "_rounded", rounded_by_triton)
        rounded = reference.quantized_attention(*arguments, **settings)
        patch.setattr(reference, "_rounded", lambda x, form: x)
        plain = reference.quantized_attention(*arguments, **settings)
    assert got.shape == q.shape and got.dtype == q.dtype and got.isfinite().all()
    assert relative_error(got, rounded) <= CLOSE[settings["pv"]]
    assert relative_error(got, plain) <= max(2 * relative_error(rounded, plain), 1e-3)


@triton.jit
def cast_kernel(x_ptr, out_ptr, number, TO: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < number)
    tl.store(out_ptr + offsets, x.to(TO).to(tl.float32), mask=offsets < number)


def rounded_by_triton(x: torch.Tensor, form: str) -> torch.Tensor:
    """As kernels round: the interpreter casts to fp8 in a way of its own, at times off by half."""
    if form == "int8":
        return x.round()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    to = {"fp16": tl.float16, "fp8": tl.float8e4nv}[form]
    grid = (triton.cdiv(x.numel(), 1024),)
    cast_kernel[grid](x.contiguous(), out, x.numel(), TO=to, BLOCK=1024)
    return out


@pytest.mark.usefixtures("poisoned")
def test_quantised_copies_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", 32)  # many parts of a sum
    monkeypatch.setattr(kernels, "TILE", 16)
    _, k, v = inputs(70, 200, heads=2, batch=2)
    mean, scale = kernels._statistics(v, 1.0, smooth=True)
    want, want_scale, want_mean = reference.quantize_values(v, "fp16", True, None)
    torch.testing.assert_close(scale, want_scale[:, :, 0])
    torch.testing.assert_close(mean, want_mean[:, :, 0])
    values = kernels.quantize_values(v, 32, "fp16", scale, mean)
    torch.testing.assert_close(values.flatten(2, 3)[:, :, :200].float(), want, atol=1e-3, rtol=1e-3)
    assert values.flatten(2, 3)[:, :, 200:].eq(0).all()
    keys, scale = kernels.quantize_keys(k, 32, mean)
    want, want_scale = reference.quantize_keys(k, 32, mean)
    # Rounding before it may tip a value over to the next integer.
    torch.testing.assert_close(keys.float(), want, atol=1, rtol=0)
    assert keys.float().ne(want).double().mean() < 0.01
    torch.testing.assert_close(scale[..., None, None], want_scale)


# The public call.


@pytest.mark.parametrize("sparse", [False, True])
def test_opcheck(sparse: bool) -> None:
    q, k, v = inputs(40, 50, heads=2)
    indices, counts, _ = block_map(q, k, kept=1)
    means, k_sum, bias = torch.randn(1, 2, 64, 64), torch.rand(1, 2, 64), torch.randn(64)
    known = (k.float().mean(1), v.float().abs().amax(1))
    optional = (indices, counts, means, k_sum, bias, *known) if sparse else (None,) * 7
    torch.library.opcheck(_quantized_attention, (q, k, v, *optional, *DEFAULTS.values()))


def test_torch_compile_keeps_it_in_one_graph() -> None:
    q, k, v = inputs(40, 50)
    call = torch.compile(quantized_attention, fullgraph=True, backend="eager")
    assert torch.equal(call(q, k, v), quantized_attention(q, k, v))


def test_fp8_is_chosen_by_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest_pv(torch.device("cpu")) == "fp16"
    for capability, wanted in (((8, 0), "fp16"), ((8, 9), "fp8"), ((9, 0), "fp8")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert fastest_pv(torch.device("cuda")) == wanted
    assert fastest_pv(torch.device("cuda"), block_k=16) == "fp16"


Q = torch.zeros(1, 40, 2, 64)
ONE = torch.zeros(1, 2, 1, 1, dtype=torch.int32)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"q": Q[0]}, "q, k, v must be"),
    ({"k": Q[:, :0], "v": Q[:, :0]}, "none empty"),
    ({"v": Q[:, :9]}, "q, k, v must be"),
    ({"q": Q[:, :, :1]}, "multiple of Hkv"),
    ({"q": Q.half()}, "one dtype"),
    ({"q": Q.clone().requires_grad_()}, "no gradient"),
    ({"pv": "int4"}, "supported: fp16, fp8"),
    ({"block_q": 48}, "block_q must be one of"),
    ({"block_k": 16, "pv": "fp8"}, "at least 32 with fp8"),
    ({"scale": 0.0}, "above zero"),
    ({"pv_threshold": 0.0}, "above zero"),
    ({"k_mean": Q[:, 0, 0]}, "k_mean must be"),
    ({"k_mean": Q[:, 0], "smooth_k": False}, "k_mean without smooth_k"),
    ({"v_largest": Q[:, 0], "smooth_v": True}, "not with smooth_v"),
    ({"counts": ONE[..., 0]}, "counts without indices"),
    ({"indices": ONE, "causal": True}, "causal"),
    ({"indices": ONE.long()}, "indices must be int32"),
    ({"indices": ONE, "block_q": 16}, r"indices must be int32 \(1, 2, 3, 'N'\)"),
    ({"indices": ONE, "counts": ONE}, "counts must be int32"),
    ({"linear": (Q, Q, Q)}, "linear must be of shapes"),
    ({"linear": (Q, Q, Q), "feature_map": "cube"}, "unknown feature map"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantized_attention(**{"q": Q, "k": Q, "v": Q} | arguments)


# Compilation.

MODULE = "turbodit.kernels.quantized_attention.triton"
STRIDES = dict.fromkeys(("stride_b", "stride_l", "stride_h"), "i32:16")
OPTIONAL = {
    "sparse": ("indices_ptr", "counts_ptr"),
    "linear": ("means_ptr", "k_sum_ptr", "bias_ptr"),
    "smooth_v": ("v_mean_ptr",),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "capability"), [((), 80), ((), 90), *((tuple(OPTIONAL), c) for c in ARCHITECTURES)]
)
def test_attention_compiles(given: tuple[str, ...], capability: int) -> None:
    fp8 = capability >= 89
    launch = kernels.LAUNCH.get((capability, 128), kernels.SMALL_LAUNCH)
    pointers = {
        "q_ptr": "*bf16", "k_ptr": "*i8", "k_scale_ptr": "*fp32",
        "v_ptr": "*fp8e4nv" if fp8 else "*fp16", "v_scale_ptr": "*fp32", "v_mean_ptr": "*fp32",
        "out_ptr": "*bf16", "indices_ptr": "*i32", "counts_ptr": "*i32",
        "means_ptr": "*bf16", "k_sum_ptr": "*fp32", "bias_ptr": "*fp32",
    }  # fmt: skip
    numbers = dict.fromkeys(("kept", "length_q", "length_k", "group"), "i32")
    numbers |= dict.fromkeys(("factor", "pv_threshold"), "fp32")
    strides = dict.fromkeys(("stride_qb", "stride_ql", "stride_qh"), "i32:16")
    absent = {name: None for part in OPTIONAL if part not in given for name in OPTIONAL[part]}
    constants = {
        "D": 128, "TILE_Q": launch.rows, "BLOCK_Q": 128, "BLOCK_K": 64,
        "CAUSAL": not given, "FP8": fp8, "SKIP_PV": bool(given), "FEATURE_MAP": "softmax",
    }  # fmt: skip
    assert_compiles(
        MODULE, "_attention_kernel", pointers | numbers | strides, constants | absent,
        (capability,), num_warps=launch.rows // 16, num_stages=launch.stages,
    )  # fmt: skip


@pytest.mark.slow
def test_statistics_and_quantisation_compile() -> None:
    fp32 = dict.fromkeys(("sum_ptr", "min_ptr", "max_ptr", "mean_ptr", "scale_ptr"), "*fp32")
    common = {**fp32, **STRIDES, "length": "i32"}

    def check(kernel: str, own: dict[str, str], constants: dict[str, Any], **options: Any) -> None:
        names = getattr(kernels, kernel).arg_names
        signature = {name: kind for name, kind in (common | own).items() if name in names}
        assert_compiles(MODULE, kernel, signature, {"D": 128} | constants, **options)

    check("_statistics_kernel", {"x_ptr": "*bf16"}, {"CHUNK": 512, "TILE": 128}, num_warps=8)
    numbers = {"chunks": "i32", "limit": "fp32"}
    check("_combine_kernel", numbers, {"TILE": 128, "DIMS": 32, "SMOOTH": True})
    check("_quantize_keys_kernel", {"k_ptr": "*bf16", "out_ptr": "*i8"}, {"BLOCK_K": 64})
    fp16, fp8 = ({"v_ptr": "*bf16", "out_ptr": kind} for kind in ("*fp16", "*fp8e4nv"))
    check("_quantize_values_kernel", fp16, {"BLOCK_K": 64, "FP8": False})
    check(
        "_quantize_values_kernel", fp8, {"BLOCK_K": 64, "FP8": True},
        architectures=(89, 90, 100, 120),
    )  # fmt: skip


LINEAR = ("means_desc", "k_sum_ptr", "bias_ptr")


def tiles(kind: str, shape: list[int], bits: int) -> str:
    """What TMA reads into shared memory, rows of 64 or 128 bytes."""
    swizzle = min(128, shape[1] * bits // 8)
    layout = f"NVMMASharedLayout(swizzle_byte_width={swizzle}, element_bitwidth={bits})"
    return f"tensordesc<{kind}{shape},{layout}>"


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [(), ("indices_ptr",), ("indices_ptr", "counts_ptr"), ("indices_ptr", *LINEAR)],
)
def test_hopper_kernel_compiles(given: tuple[str, ...]) -> None:
    hopper = pytest.importorskip("turbodit.kernels.quantized_attention.hopper")
    signature = {
        "q_ptr": "*bf16", "k_desc": tiles("i8", [64, 128], 8), "k_scale_ptr": "*fp32",
        "v_desc": tiles("fp8e4nv", [128, 64], 8), "v_scale_ptr": "*fp32", "out_ptr": "*bf16",
        "indices_ptr": "*i32", "counts_ptr": "*i32", "means_desc": tiles("bf16", [128, 128], 16),
        "k_sum_ptr": "*fp32", "bias_ptr": "*fp32", "factor": "fp32",
    }  # fmt: skip
    signature |= dict.fromkeys(("width", "length_q", "length_k", "heads", "group"), "i32")
    signature |= dict.fromkeys(("stride_qb", "stride_ql", "stride_qh"), "i32:16")
    optional = ("indices_ptr", "counts_ptr", *LINEAR)
    constants: dict[str, Any] = {name: None for name in optional if name not in given}
    constants["FEATURE_MAP"] = "softmax"
    signature = {name: kind for name, kind in signature.items() if name not in constants}
    report = assert_compiles(
        hopper.__name__, "_attention_kernel", signature, constants, architectures=(90,),
        maxnreg=hopper.REGISTERS,
    )  # fmt: skip
    # Three programs share what a multiprocessor has, less a KiB for each.
    assert 3 * (report[90]["shared"] + 1024) <= 233_472
