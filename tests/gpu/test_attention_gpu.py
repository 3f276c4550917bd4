"""Attention back-ends and 8-bit attention on a GPU, at lengths the interpreter is too slow for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from turbodit.attention import BACKENDS, attention_function, available
from turbodit.attention.sage import sageattn
from turbodit.kernels.quantized_attention import PV_FORMATS, quantized_attention, reference

kernels = pytest.importorskip("turbodit.kernels.quantized_attention.triton")
pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
HALF = (torch.float16, torch.bfloat16)
LENGTHS = [(1, 1), (1, 4097), (63, 200), (200, 63), (1111, 1111), (4097, 1111)]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def inputs(
    length_q: int, length_k: int, *, heads: int = 2, heads_kv: int = 2, batch: int = 1,
    dim: int = 128, dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """q, k, v with a mean, as parts of one wider tensor each."""
    generator = torch.Generator(CUDA).manual_seed(length_q + length_k)

    def rows(length: int, heads: int) -> torch.Tensor:
        shape = (batch, heads, length + 3, 2 * dim)
        wide = torch.randn(shape, generator=generator, device=CUDA, dtype=dtype)
        return wide[:, :, 1:-2, dim:].transpose(1, 2)

    k = rows(length_k, heads_kv)
    return rows(length_q, heads), k + 3 * k[:1, :1], rows(length_k, heads_kv) + 1


def fused_inputs(length: int) -> tuple[torch.Tensor, ...]:
    """q, k, v as one product gives them: rows of 3 H D elements."""
    generator = torch.Generator(CUDA).manual_seed(length)
    shape = (2, length, 3, 3, 128)
    qkv = torch.randn(shape, generator=generator, device=CUDA).bfloat16()
    qkv[:, :, 2] += 1
    return qkv.unbind(2)


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """float64 attention; visible bool, broadcast to (B,H,Lq,Lk)."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


def random_map(
    q: torch.Tensor, k: torch.Tensor, block_q: int, block_k: int, kept: int | None = None
) -> dict[str, Any]:
    (batch, length_q, heads, _), length_k = q.shape, k.shape[1]
    blocks_q, blocks_k = -(-length_q // block_q), -(-length_k // block_k)
    kept = kept or (blocks_k + 3) // 4
    order = torch.rand(batch, heads, blocks_q, blocks_k, device=CUDA).argsort(-1)
    counts = torch.randint(0, kept + 1, (batch, heads, blocks_q), device=CUDA)
    return {"indices": order[..., :kept].int(), "counts": counts.int()}


def random_linear(q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Operands of the linear branch, as of 100,000 keys."""
    batch, _, heads, dim = q.shape
    means = torch.randn(batch, heads, dim, dim, device=CUDA).to(q.dtype)
    k_sum = 1e5 * torch.rand(batch, heads, dim, device=CUDA)
    return means, k_sum, torch.randn(dim, device=CUDA)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that is not initialised holds NaN, or the largest integer."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def compare(*qkv: torch.Tensor, **settings: Any) -> None:
    """The kernel against the reference, and both against the reference without rounding."""
    got = quantized_attention(*qkv, **settings)
    names = ("indices", "counts", "linear", "k_mean", "v_largest")
    optional = (settings.pop(name, None) for name in names)
    defaults = {
        "block_q": 128, "block_k": 64, "scale": qkv[0].shape[-1] ** -0.5, "causal": False,
        "pv": "fp16", "pv_threshold": None, "smooth_k": True, "smooth_v": False,
        "feature_map": "softmax",
    }  # fmt: skip
    arguments = (*qkv, *optional)
    with pytest.MonkeyPatch.context() as patch:
        rounded = reference.quantized_attention(*arguments, **defaults | settings)
        patch.setattr(reference, "_rounded", lambda x, form: x)
        plain = reference.quantized_attention(*arguments, **defaults | settings)
    assert got.shape == plain.shape and got.dtype == plain.dtype and got.isfinite().all()
    assert relative_error(got, plain) <= max(2 * relative_error(rounded, plain), 1e-3)
    assert relative_error(got, rounded) < 0.02


@pytest.mark.parametrize("pv", PV_FORMATS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("length_q", "length_k"), LENGTHS)
def test_dense(length_q: int, length_k: int, dim: int, dtype: torch.dtype, pv: str) -> None:
    compare(*inputs(length_q, length_k, dim=dim, dtype=dtype), pv=pv, smooth_v=dim == 64)


@pytest.mark.parametrize("pv", PV_FORMATS)
@pytest.mark.parametrize(("length_q", "length_k"), LENGTHS)
def test_causal_with_shared_key_heads(length_q: int, length_k: int, pv: str) -> None:
    q, k, v = inputs(length_q, length_k, heads=6, heads_kv=2, batch=2)
    compare(q, k, v, causal=True, pv=pv)


@pytest.mark.parametrize("pv", PV_FORMATS)
def test_shared_key_heads(pv: str) -> None:
    q, k, v = inputs(1111, 1000, heads=6, heads_kv=2, batch=2)
    compare(q, k, v, pv=pv)
    compare(q, k, v, **random_map(q, k, 128, 64), pv=pv)


@pytest.mark.parametrize("pv", PV_FORMATS)
@pytest.mark.parametrize("block_k", [16, 32, 64, 128])
@pytest.mark.parametrize("block_q", [16, 32, 64, 128])
def test_blocks(block_q: int, block_k: int, pv: str) -> None:
    if (block_k, pv) == (16, "fp8"):
        pytest.skip("fp8 needs 32 keys")
    q, k, v = inputs(1111, 1000, heads=3, heads_kv=3, batch=2)
    blocks = {"block_q": block_q, "block_k": block_k}
    compare(q, k, v, pv=pv, **blocks)
    compare(q, k, v, pv=pv, **blocks, **random_map(q, k, **blocks))


@pytest.mark.parametrize("pv", PV_FORMATS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_linear_branch(feature_map: str, dim: int, dtype: torch.dtype, pv: str) -> None:
    q, k, v = inputs(1111, 1000, batch=2, dim=dim, dtype=dtype)
    settings = {"pv": pv, "feature_map": feature_map, "smooth_v": dim == 64}
    compare(q, k, v, **random_map(q, k, 128, 64), linear=random_linear(q), **settings)


@pytest.mark.parametrize("pv", PV_FORMATS)
def test_more_tiles_than_multiprocessors(pv: str) -> None:
    q, k, v = inputs(4097, 1111, heads=5, heads_kv=5, batch=2)
    known = {"k_mean": k.float().mean(1), "v_largest": v.float().abs().amax(1)}
    for _ in range(3):  # other lists, other orders of events
        compare(q, k, v, **random_map(q, k, 128, 64), linear=random_linear(q), pv=pv, **known)


@pytest.mark.parametrize("pv", PV_FORMATS)
def test_faint_blocks(pv: str) -> None:
    q, k, v = inputs(1111, 1000)
    q[:, :500], k[:, 128:320] = 4, -4  # that no row of some tiles wants
    compare(q, k, v, pv=pv, pv_threshold=4.0)
    compare(q, k, v, **random_map(q, k, 128, 64), pv=pv, pv_threshold=4.0)


@pytest.mark.parametrize("pv", PV_FORMATS)
def test_accuracy_at_length(pv: str) -> None:
    q, k, v = torch.randn(3, 1, 4097, 4, 128, device=CUDA).bfloat16()
    error = relative_error(quantized_attention(q, k, v, pv=pv), exact(q, k, v))
    assert error < {"fp16": 0.02, "fp8": 0.04}[pv]
    k = k + 20 * torch.randn(128, device=CUDA).bfloat16()
    q[..., 3] *= 10
    v[..., 5] *= 50
    out, want = quantized_attention(q, k, v, pv=pv), exact(q, k, v)
    assert F.cosine_similarity(out.flatten().double(), want.flatten(), dim=0) > 0.998


def test_offsets_past_two_billion_elements() -> None:
    """k of 2^31 elements and some: heads at its far end are as right as those at its start."""
    length, heads = 4200, 4000
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    k = torch.randn(1, length, heads, 128, device=CUDA, dtype=torch.bfloat16)
    q = k[:, :64]
    out = quantized_attention(q, k, k, pv="fp16")[:, :, -2:].clone()
    want = quantized_attention(q[:, :, -2:], k[:, :, -2:], k[:, :, -2:], pv="fp16")
    assert torch.equal(out, want)


def test_extra_memory_is_the_quantised_copies() -> None:
    q, k, v = inputs(8192, 8192, heads=8, heads_kv=8)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = quantized_attention(q, k, v, pv="fp8")
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.1 * (out.nbytes + k.numel() + v.numel())


def test_compiled_and_in_a_cuda_graph() -> None:
    q, k, v = inputs(1111, 1111)
    want = quantized_attention(q, k, v)
    compiled = torch.compile(quantized_attention, fullgraph=True)
    assert torch.equal(compiled(q, k, v), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails where the host waits for the device
        out = quantized_attention(q, k, v)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


def test_what_a_gpu_refuses() -> None:
    q, k, v = inputs(64, 64)
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        quantized_attention(q.float(), k.float(), v.float())
    with pytest.raises(ValueError, match=r"D of \(64, 128\)"):
        quantized_attention(q[..., :80], k[..., :80], v[..., :80])
    with pytest.raises(ValueError, match="contiguous"):
        quantized_attention(*(x.transpose(1, 3)[:, :64] for x in (q, k, v)))


# The kernel for Hopper.


@pytest.fixture
def hopper_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of listed blocks with each call of the kernel."""
    if torch.cuda.get_device_capability() != (9, 0) or kernels.TRITON_VERSION < (3, 6):
        pytest.skip("needs compute capability 9.0 and Triton 3.6")
    from turbodit.kernels.quantized_attention import hopper

    calls = []
    attend = hopper.attend

    def counted(*arguments: Any) -> torch.Tensor:
        indices = arguments[5]
        calls.append(0 if indices is None else indices.shape[-1])
        return attend(*arguments)

    monkeypatch.setattr(hopper, "attend", counted)
    return calls


def test_what_the_hopper_kernel_is_for(hopper_calls: list[int]) -> None:
    q, k, v = inputs(300, 300)
    sparse = random_map(q, k, 128, 64)
    taken = [{}, sparse, {"indices": sparse["indices"]}, sparse | {"linear": random_linear(q)}]
    for settings in taken:
        quantized_attention(q, k, v, pv="fp8", **settings)
    assert hopper_calls == [0, 2, 2, 2]
    left = [{"causal": True}, {"pv_threshold": 4.0}, {"smooth_v": True}, {"block_q": 64}]
    for settings in left:
        quantized_attention(q, k, v, pv="fp8", **settings)
    quantized_attention(q, k, v, pv="fp16")
    quantized_attention(*inputs(300, 300, dim=64), pv="fp8")
    assert len(hopper_calls) == len(taken)


@pytest.mark.parametrize("length", [129, 1000, 1111])
def test_hopper_kernel_after_a_fused_product(length: int, hopper_calls: list[int]) -> None:
    q, k, v = fused_inputs(length)
    sparse = random_map(q, k, 128, 64)
    sparse["counts"][:, 0, 0] = 0
    compare(q, k, v, pv="fp8")
    compare(q, k, v, pv="fp8", indices=sparse["indices"])
    compare(q, k, v, pv="fp8", **sparse)
    compare(q, k, v, pv="fp8", **sparse, linear=random_linear(q))
    assert len(hopper_calls) == 4


@pytest.mark.parametrize("listed", [128, 129, 140])
def test_hopper_kernel_with_long_lists(listed: int, hopper_calls: list[int]) -> None:
    q, k, v = inputs(1000, 9001)
    sparse = random_map(q, k, 128, 64, kept=listed)
    compare(q, k, v, pv="fp8", indices=sparse["indices"])
    compare(q, k, v, pv="fp8", **sparse, linear=random_linear(q))
    assert hopper_calls == [listed, listed]


@pytest.mark.parametrize(("mean", "limit"), [(0, 0.04), (1, 0.006)])
def test_accuracy_with_long_lists(mean: float, limit: float, hopper_calls: list[int]) -> None:
    """Sums over many keys that add up, too: fp8 tensor cores drop bits, always downwards."""
    q, k, v = torch.randn(3, 1, 9001, 2, 128, device=CUDA).bfloat16()
    q, v = q[:, :1000], v + mean
    indices = random_map(q, k, 128, 64, kept=140)["indices"]
    blocks = torch.zeros(1, 2, 8, 141, dtype=torch.bool, device=CUDA)
    blocks.scatter_(-1, indices.long(), True)
    visible = blocks.repeat_interleave(128, 2).repeat_interleave(64, 3)[:, :, :1000, :9001]
    out = quantized_attention(q, k, v, indices=indices, pv="fp8")
    assert relative_error(out, exact(q, k, v, visible)) < limit
    dense = quantized_attention(q, k, v, pv="fp8")
    assert relative_error(dense, exact(q, k, v)) < limit
    assert hopper_calls == [140, 0]


def test_hopper_kernel_repeats_itself(hopper_calls: list[int]) -> None:
    """Whatever order its copies and products come in."""
    q, k, v = inputs(4097, 4097, heads=5, heads_kv=5, batch=2)
    settings = random_map(q, k, 128, 64) | {"linear": random_linear(q), "pv": "fp8"}
    want = quantized_attention(q, k, v, **settings)
    assert all(torch.equal(quantized_attention(q, k, v, **settings), want) for _ in range(30))
    want = quantized_attention(q, k, v, pv="fp8")
    assert all(torch.equal(quantized_attention(q, k, v, pv="fp8"), want) for _ in range(30))
    assert len(hopper_calls) == 62


# Back-ends.


@pytest.mark.parametrize("dim", [40, 64, 80, 128])
def test_sageattn_pads_the_head_dimension(dim: int) -> None:
    q, k, v = (x.transpose(1, 2) for x in inputs(300, 200, dim=dim))
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative_error(sageattn(q, k, v), want) < 0.04


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [name for name in BACKENDS if not BACKENDS[name].self_only])
def test_dense_back_ends(name: str, dtype: torch.dtype) -> None:
    runs, reason = available(name, CUDA)
    if not runs:
        pytest.skip(reason)
    q, k, v = inputs(1111, 512, heads=3, heads_kv=3, batch=2, dtype=dtype)
    own_error = relative_error(attention_function("sdpa-math")(q, k, v), exact(q, k, v))
    error = relative_error(attention_function(name)(q, k, v), exact(q, k, v))
    assert error < (0.04 if name == "sage" else 2 * own_error)
