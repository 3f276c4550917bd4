"""Linear attention: the reference against formulas and float64, the kernels against both.

Kernels run in Triton's interpreter on a CPU, in float16 and float32: its bfloat16 products
are wrong.
"""

from __future__ import annotations

import pytest
import torch
from tests.kernels.compile_only import assert_compiles

from turbodit.kernels import linear_attention as op
from turbodit.kernels.linear_attention import FEATURE_MAPS, reference

EPS = 1e-5


def tensors(
    length: int, dim: int, *, heads: int = 1, batch: int = 1, count: int = 3, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def every_pair(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str) -> torch.Tensor:
    """Linear attention from its definition: a weight phi(q).phi(k) for each pair."""
    maps = {
        "softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
        "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "relu": lambda x: torch.where(x > 0, x, 0.0),
    }
    phi = maps[feature_map]
    weights = torch.einsum("blhd,bmhd->bhlm", phi(q), phi(k))
    weights = weights / (weights.sum(-1, keepdim=True) + EPS)
    return torch.einsum("bhlm,bmhd->blhd", weights, v)


# The reference and its operators.


def test_a_case_by_hand() -> None:
    """relu, D = 2: phi(k) = (1,0), (2,3); kv = phi(K)^T V; k_sum = (3,3)."""
    k = torch.tensor([[1.0, -1.0], [2.0, 3.0]])[None, :, None]
    v = torch.tensor([[10.0, 20.0], [1.0, 2.0]])[None, :, None]
    q = torch.tensor([[1.0, 1.0], [-1.0, 4.0]])[None, :, None]
    kv, k_sum = op.key_value_sums(k, v, "relu")
    torch.testing.assert_close(kv[0, 0], torch.tensor([[12.0, 24.0], [3.0, 6.0]]))
    torch.testing.assert_close(k_sum[0, 0], torch.tensor([3.0, 3.0]))
    want = torch.tensor([[15 / 6, 30 / 6], [12 / 12, 24 / 12]])
    torch.testing.assert_close(
        op.linear_attention(q, k, v, "relu")[0, :, 0], want, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_it_is_attention_with_the_feature_map_as_kernel(feature_map: str) -> None:
    q, k, v = tensors(7, 5, heads=3, batch=2)
    got = op.linear_attention(q[:, :4], k, v, feature_map)
    assert got.shape == (2, 4, 3, 5) and got.dtype == torch.float64
    torch.testing.assert_close(got, every_pair(q[:, :4], k, v, feature_map))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients(feature_map: str) -> None:
    inputs = [x.requires_grad_() for x in tensors(5, 4, heads=2)]
    assert torch.autograd.gradcheck(lambda *x: op.linear_attention(*x, feature_map), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_only_its_rounding(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors(40, 16))
    out = op.linear_attention(q, k, v, "softmax")
    assert out.dtype == dtype
    exact = every_pair(q.double(), k.double(), v.double(), "softmax")
    assert relative_error(out, exact) <= torch.finfo(dtype).eps


def test_no_key_with_a_feature_gives_zeros() -> None:
    q, k, v = tensors(6, 4)
    assert (op.linear_attention(q, -k.abs(), v, "relu") == 0).all()


@pytest.mark.parametrize("grad", [False, True])
def test_operators_fulfil_pytorchs_contract(grad: bool) -> None:
    q, k, v = (x.float().requires_grad_(grad) for x in tensors(6, 4, heads=2))
    kv, k_sum = (x.detach().requires_grad_(grad) for x in op.key_value_sums(k, v, "elu"))
    ops = torch.ops.turbodit
    for name, arguments in {
        "key_value_sums": (k, v),
        "linear_output": (q, kv, k_sum),
        "key_value_sums_backward": (kv.detach(), k_sum.detach(), k.detach(), v.detach()),
        "linear_output_backward": (q.detach(), q.detach(), kv.detach(), k_sum.detach()),
    }.items():
        torch.library.opcheck(getattr(ops, name).default, (*arguments, "elu"))


def test_autocast_changes_nothing() -> None:
    """The sums outgrow half precision."""
    q, k, v = (x.float().requires_grad_() for x in tensors(6, 4))
    with torch.autocast("cpu", torch.bfloat16):
        out = op.linear_attention(q, k, v, "softmax")
        (grad,) = torch.autograd.grad(out.sum(), q)
    torch.testing.assert_close(out, op.linear_attention(q, k, v, "softmax"))
    assert grad.dtype == torch.float32


def test_compiles_without_graph_breaks() -> None:
    q, k, v = (x.float().requires_grad_() for x in tensors(6, 4))
    compiled = torch.compile(op.linear_attention, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, "softmax")
    torch.testing.assert_close(out, op.linear_attention(q, k, v, "softmax"))
    out.sum().backward()
    assert q.grad is not None and v.grad is not None and v.grad.abs().sum() > 0


def test_errors_say_what_is_wrong() -> None:
    q, k, v = tensors(4, 4)
    with pytest.raises(ValueError, match=r"'exp'.*softmax, elu, relu"):
        op.linear_attention(q, k, v, "exp")
    with pytest.raises(ValueError, match=r"one shape.*\(1, 3, 1, 4\)"):
        op.linear_attention(q, k, v[:, :3], "relu")
    with pytest.raises(ValueError, match="L > 0"):
        op.linear_attention(q, k[:, :0], v[:, :0], "relu")
    with pytest.raises(ValueError, match="k_sum"):
        op.linear_attention(q[..., :3], k, v, "relu")


# The kernels.


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """The launch functions; what they allocate is full of NaN until it is written."""
    from turbodit.kernels.linear_attention import triton

    plain = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *shape, **kwargs) -> torch.Tensor:
        return plain(self, *shape, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return triton


def on_this_device(*inputs: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [x.to(device, dtype) for x in inputs]


def rounded(feature_map: str, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients by plain PyTorch in the inputs' precision."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    phi_q, phi_k = (reference.phi(x, feature_map).to(x.dtype) for x in (q, k))
    kv = torch.einsum("blhd,blhe->bhde", phi_k, v)
    denominator = torch.einsum("blhd,bhd->blh", phi_q, phi_k.sum(1))[..., None] + EPS
    out = torch.einsum("blhd,bhde->blhe", phi_q, kv) / denominator
    out.backward(grad)
    return [out.detach(), q.grad, k.grad, v.grad]


def by_kernels(
    kernels, feature_map: str, inputs: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    q, k, v = inputs
    kv, k_sum = kernels.key_value_sums(k, v, feature_map)
    out = kernels.linear_output(q, kv, k_sum, feature_map)
    grad_q, grad_kv, grad_k_sum = kernels.linear_output_backward(grad, q, kv, k_sum, feature_map)
    grads = kernels.key_value_sums_backward(grad_kv, grad_k_sum, k, v, feature_map)
    return [out, grad_q, *grads]


def exactly(feature_map: str, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    points = [x.double().requires_grad_() for x in inputs]
    out = every_pair(*points, feature_map)
    out.backward(grad.double())
    return [out.detach(), *(x.grad for x in points)]


SHAPES = [(1, 64, 1), (63, 128, 1), (65, 64, 3), (129, 24, 2)]
CASES = [(torch.float16, *shape) for shape in SHAPES]
if not torch.cuda.is_available():  # in the interpreter float32 shows the formulas' errors alone
    CASES.append((torch.float32, 65, 64, 1))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("dtype", "length", "dim", "heads"), CASES)
def test_kernels(
    kernels, dtype: torch.dtype, length: int, dim: int, heads: int, feature_map: str
) -> None:
    *inputs, grad = on_this_device(*tensors(length, dim, heads=heads, count=4), dtype=dtype)
    got = by_kernels(kernels, feature_map, inputs, grad)
    want = exactly(feature_map, inputs, grad)
    plain = rounded(feature_map, inputs, grad)
    for name, x, y, z in zip(("out", "q", "k", "v"), got, want, plain, strict=True):
        assert x.shape == y.shape and x.dtype == dtype and x.isfinite().all(), name
        if length == 1 and name in "qk":
            continue  # a lone key's weight is 1: what is left of these gradients is rounding
        error, own = relative_error(x, y), relative_error(z, y)
        assert error <= 2 * own + 2 * torch.finfo(dtype).eps, (name, error, own)


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_the_sequence_add_up(kernels, monkeypatch, parts: int) -> None:
    """Also where the heads are parts of wider rows, and batches lie apart."""
    monkeypatch.setattr(kernels, "PROGRAMS", 4 * parts)
    wide = on_this_device(*tensors(150, 100, heads=2, batch=3, count=4), dtype=torch.float16)
    *inputs, grad = (x[::2, :, :, 10:42] for x in wide)
    assert not inputs[0].is_contiguous()
    assert kernels._grid(inputs[0])[0] == (4, parts)
    got = by_kernels(kernels, "softmax", inputs, grad)
    for x, y in zip(got, exactly("softmax", inputs, grad), strict=True):
        assert relative_error(x, y) <= 2e-3


def test_sums_past_the_range_of_float16(kernels) -> None:
    q, k, v = on_this_device(*tensors(128, 16), dtype=torch.float16)
    v = 2000 + 2000 * v
    kv, k_sum = kernels.key_value_sums(k, v, "elu")
    assert kv.max() > torch.finfo(torch.float16).max
    got = kernels.linear_output(q, kv, k_sum, "elu")
    assert relative_error(got, every_pair(q.double(), k.double(), v.double(), "elu")) <= 1e-3


def test_a_gradient_without_strides(kernels) -> None:
    q, k, v = on_this_device(*tensors(20, 16), dtype=torch.float16)
    sums = kernels.key_value_sums(k, v, "elu")
    ones = torch.ones((), dtype=q.dtype, device=q.device).expand(q.shape)
    got = kernels.linear_output_backward(ones, q, *sums, "elu")
    want = kernels.linear_output_backward(ones.contiguous(), q, *sums, "elu")
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


# For every architecture, without one.

KERNELS = {  # pointers in 16 bits, pointers in float32, strided tensors
    "_key_value_sums_kernel": ("k v", "kv k_sum", "kv"),
    "_key_value_sums_backward_kernel": ("k v grad_k grad_v", "grad_kv grad_k_sum", "kv"),
    "_linear_output_kernel": ("q out", "kv k_sum", "q"),
    "_linear_output_backward_kernel": (
        "grad q grad_q",
        "kv k_sum grad_kv grad_k_sum",
        "gq",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_for_every_architecture(kernel: str) -> None:
    """At the largest head dimension, which takes the most memory."""
    half, full, strided = KERNELS[kernel]
    signature = {
        **{f"{name}_ptr": "*bf16" for name in half.split()},
        **{f"{name}_ptr": "*fp32" for name in full.split()},
        "length": "i32",
        "run": "i32:16",
        "H": "i32",
        **{f"stride_{x}{axis}": "i32:16" for x in strided for axis in "blh"},
    }
    constants = {"FEATURE_MAP": "softmax", "D": 128, "BLOCK_D": 128, "BLOCK_L": 64}
    assert_compiles(
        "turbodit.kernels.linear_attention.triton",
        kernel,
        signature,
        constants,
        num_warps=8,
        num_stages=2,
    )
