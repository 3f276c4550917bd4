"""Linear attention, SLA and Sparge on a GPU against the same on a CPU in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from turbodit.attention.sla import SageSLA, SparseLinearAttention
from turbodit.attention.sparge import sparge_attn_cdf, sparge_attn_topk
from turbodit.kernels import linear_attention as op
from turbodit.kernels.linear_attention import reference

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
LENGTHS = (1, 63, 200, 1111, 4097)
QUANTISATION = 0.04  # relative error of 8-bit products on Gaussian inputs


def tensors(
    length: int, dim: int, dtype: torch.dtype, *, count: int = 3, heads: int = 3
) -> list[torch.Tensor]:
    """(2, L, H, D), heads lying apart as in a fused projection."""
    generator = torch.Generator().manual_seed(length)
    wide = torch.randn(count, 2, length, heads, dim + 8, generator=generator)
    return list(wide.to(CUDA, dtype)[..., :dim].unbind())


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).norm() / want.norm()).item()


def outcome(attend, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    points = [x.detach().requires_grad_() for x in inputs]
    out = attend(*points)
    return [out.detach(), *torch.autograd.grad(out, points, grad)]


def in_same_precision(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str
) -> torch.Tensor:
    """Linear attention by PyTorch, every intermediate in the inputs' dtype."""
    phi_q, phi_k = (reference.phi(x, feature_map).to(x.dtype) for x in (q, k))
    numerator = torch.einsum("blhd,bhde->blhe", phi_q, torch.einsum("blhd,blhe->bhde", phi_k, v))
    denominator = torch.einsum("blhd,bhd->blh", phi_q, phi_k.sum(dim=1))
    return numerator / (denominator[..., None] + op.EPS)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Tests must not use up each other's recompilations."""
    torch.compiler.reset()
    yield
    torch.cuda.synchronize()  # an error belongs to the test that made it


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "dim", "feature_map"),
    [
        (torch.bfloat16, 128, "softmax"),
        (torch.bfloat16, 64, "elu"),
        (torch.float16, 128, "relu"),
        (torch.float16, 64, "softmax"),
        (torch.bfloat16, 40, "softmax"),
    ],
)
def test_linear_attention(length: int, dim: int, dtype: torch.dtype, feature_map: str) -> None:
    *inputs, grad = tensors(length, dim, dtype, count=4)
    got = outcome(lambda *x: op.linear_attention(*x, feature_map), inputs, grad)
    plain = outcome(lambda *x: in_same_precision(*x, feature_map), inputs, grad)
    exact = [x.double().cpu() for x in (*inputs, grad)]
    want = outcome(lambda *x: op.linear_attention(*x, feature_map), exact[:3], exact[3])
    names = ("out", "q", "k", "v")
    for name, x, y, z in zip(names, got, plain, want, strict=True):
        assert x.shape == z.shape and x.dtype == dtype and x.isfinite().all(), name
        if length > 1 or name in ("out", "v"):  # a lone key's weight is 1 whatever it is
            assert relative_error(x, z) <= 2 * relative_error(y, z) + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "dim", "block_k", "feature_map"),
    [
        (torch.bfloat16, 128, 64, "softmax"),
        (torch.float16, 128, 128, "relu"),
        (torch.bfloat16, 64, 32, "elu"),
        (torch.float16, 64, 16, "softmax"),
        (torch.bfloat16, 40, 64, "softmax"),
    ],
)
def test_statistics(
    length: int, dim: int, block_k: int, dtype: torch.dtype, feature_map: str
) -> None:
    k, v = tensors(length, dim, dtype, count=2)
    k += 3
    k[..., 5] = -k[..., 5].abs()  # with relu a feature that no key has
    weight = torch.randn(dim, dim, device=CUDA) / dim**0.5
    got = op.key_value_statistics(k, v, weight, block_k, feature_map)
    exact = (x.double().cpu() for x in (k, v, weight))
    want = op.key_value_statistics(*exact, block_k, feature_map)
    for name, x, y in zip(want._fields, got, want, strict=True):
        bound = {"means": torch.finfo(dtype).eps, "k_sum": 1e-5}.get(name, 1e-6)
        assert x.isfinite().all() and relative_error(x, y) <= bound, name
    assert torch.equal(got.v_largest.cpu(), want.v_largest.float())


@pytest.mark.parametrize("dim", [64, 128, 40])
def test_output_with_a_bias(dim: int) -> None:
    q, k, v, grad = tensors(1111, dim, torch.bfloat16, count=4)
    sums = [x.detach() for x in op.key_value_sums(k, v, "softmax")]
    inputs = [q, *sums, torch.randn(dim, device=CUDA)]

    def attend(q: torch.Tensor, kv: torch.Tensor, k_sum: torch.Tensor, bias: torch.Tensor):
        return op.linear_output(q, kv, k_sum, "softmax", bias)

    got = outcome(attend, inputs, grad)
    want = outcome(attend, [x.double().cpu() for x in inputs], grad.double().cpu())
    for name, x, y in zip(("out", "q", "kv", "k_sum", "bias"), got, want, strict=True):
        bound = 1e-5 if name == "bias" else 2 * torch.finfo(torch.bfloat16).eps
        assert relative_error(x, y) <= bound, name


def test_equal_inputs_give_equal_bits() -> None:
    *inputs, grad = tensors(5000, 128, torch.bfloat16, count=4)
    first, second = (outcome(op.linear_attention, inputs, grad) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    weight = torch.eye(128, device=CUDA)
    first, second = (op.key_value_statistics(*inputs[1:], weight, 64, "elu") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_what_the_kernels_do_not_take_is_refused() -> None:
    q, k, v = tensors(16, 64, torch.float32)
    with pytest.raises(ValueError, match="float32"):
        op.linear_attention(q, k, v)
    q, k, v = tensors(16, 136, torch.float16)
    with pytest.raises(ValueError, match="at most 128"):
        op.linear_attention(q, k, v)


# SLA.


def sla(kind: type, dim: int, **settings) -> tuple[SparseLinearAttention, SparseLinearAttention]:
    """(On the GPU, the exact one on a CPU), with one projection."""
    torch.manual_seed(0)
    module = kind(dim, ratio=0.25, **settings)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    exact = SparseLinearAttention(
        dim,
        0.25,
        variant=module.variant,
        feature_map=module.feature_map,
        block_q=module.block_q,
        block_k=module.block_k,
    )
    exact.load_state_dict(module.state_dict())
    return module.to(CUDA), exact.double()


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_sla_forward_and_backward(length: int, dim: int, variant: str) -> None:
    *inputs, grad = tensors(length, dim, torch.bfloat16, count=4)
    module, exact = sla(SparseLinearAttention, dim, variant=variant)
    got = outcome(module, inputs, grad)
    wide = [x.double().cpu() for x in (*inputs, grad)]
    want = outcome(exact, wide[:3], wide[3])
    for name, x, y in zip(("out", "q", "k", "v"), got, want, strict=True):
        assert x.isfinite().all(), name
        if length > 1 or name in ("out", "v"):
            assert relative_error(x, y) <= 4 * torch.finfo(torch.bfloat16).eps, name
    with torch.no_grad():
        assert relative_error(module(*inputs), want[0]) <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("feature_map", op.FEATURE_MAPS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_sagesla(length: int, dim: int, feature_map: str) -> None:
    inputs = tensors(length, dim, torch.bfloat16)
    module, exact = sla(SageSLA, dim, feature_map=feature_map)
    want = exact(*(x.double().cpu() for x in inputs)).detach()
    with torch.no_grad():
        assert relative_error(module(*inputs), want) <= QUANTISATION


@torch.no_grad()
@pytest.mark.parametrize("attend", [sparge_attn_topk, sparge_attn_cdf])
@pytest.mark.parametrize("length", LENGTHS)
def test_sparge_is_that_of_a_cpu(attend, length: int) -> None:
    inputs = tensors(length, 128, torch.bfloat16)
    want = attend(*(x.cpu() for x in inputs))
    assert relative_error(attend(*inputs), want) <= 2 * QUANTISATION  # both are quantised


def every_module() -> dict[str, SparseLinearAttention]:
    return {
        "sla": sla(SparseLinearAttention, 128)[0],
        "paper": sla(SparseLinearAttention, 128, variant="paper")[0],
        "sagesla": sla(SageSLA, 128)[0],
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["sla", "paper", "sagesla"])
def test_forward_never_waits_for_the_gpu(name: str) -> None:
    inputs = tensors(1111, 128, torch.bfloat16)
    module = every_module()[name]
    module(*inputs)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("name", ["sla", "paper", "sagesla"])
def test_cuda_graphs(name: str) -> None:
    inputs = tensors(1111, 128, torch.bfloat16)
    module = every_module()[name]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = module(*inputs)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, module(*inputs))


@pytest.mark.parametrize("name", ["sla", "paper"])
def test_compiles_for_training(name: str) -> None:
    *inputs, grad = tensors(300, 128, torch.bfloat16, count=4)
    module = every_module()[name]
    want = outcome(module, inputs, grad)
    got = outcome(torch.compile(copy.deepcopy(module), fullgraph=True), inputs, grad)
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) <= torch.finfo(torch.bfloat16).eps
