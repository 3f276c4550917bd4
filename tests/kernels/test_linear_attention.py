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


def test_a_bias_is_added_and_has_a_gradient() -> None:
    q, k, v = tensors(5, 4, heads=2)
    kv, k_sum = op.key_value_sums(k, v, "elu")
    bias = torch.randn(4, dtype=torch.float64)
    plain = op.linear_output(q, kv, k_sum, "elu")
    torch.testing.assert_close(op.linear_output(q, kv, k_sum, "elu", bias), plain + bias)
    inputs = [x.requires_grad_() for x in (q, kv, k_sum, bias)]
    assert torch.autograd.gradcheck(
        lambda q, kv, k_sum, bias: op.linear_output(q, kv, k_sum, "elu", bias), inputs
    )


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_statistics_are_what_their_names_say(feature_map: str) -> None:
    q, k, v = tensors(21, 6, heads=2, batch=2)
    k[..., 4] = -k[..., 4].abs()  # with relu a feature that no key has
    weight, bias = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    got = op.key_value_statistics(k, v, weight, 8, feature_map)
    for i, rows in enumerate(k.split(8, dim=1)):
        torch.testing.assert_close(got.pooled_k[:, :, i], rows.mean(dim=1))
    assert got.pooled_k.shape[2] == 3
    torch.testing.assert_close(got.k_mean, k.mean(dim=1))
    assert torch.equal(got.v_largest, v.abs().amax(dim=1))
    if feature_map == "relu":
        assert (got.means[:, :, 4] == 0).all() and (got.k_sum[:, :, 4] == 0).all()
    want = every_pair(q, k, v, feature_map) @ weight.T + bias
    branch = reference.linear_branch(q, got.means, got.k_sum, bias, feature_map)
    torch.testing.assert_close(branch, want)


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
        "key_value_statistics": (k.detach(), v.detach(), torch.eye(4), 4),
        "key_value_sums_backward": (kv.detach(), k_sum.detach(), k.detach(), v.detach()),
        "linear_output_backward": (q.detach(), q.detach(), kv.detach(), k_sum.detach()),
    }.items():
        torch.library.opcheck(getattr(ops, name).default, (*arguments, "elu"))
    bias = torch.ones(4, requires_grad=grad)
    torch.library.opcheck(ops.linear_output.default, (q, kv, k_sum, "elu", bias))


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
    with pytest.raises(ValueError, match=r"weight.*\(3, 4\)"):
        op.key_value_statistics(k, v, torch.eye(4)[:3], 2, "relu")
    with pytest.raises(ValueError, match="blocks of 0 keys"):
        op.key_value_statistics(k, v, torch.eye(4), 0, "relu")
    kv, k_sum = op.key_value_sums(k, v, "relu")
    with pytest.raises(ValueError, match=r"bias must be \(4,\), got \(1,\)"):
        op.linear_output(q, kv, k_sum, "relu", torch.ones(1))


# The kernels.


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """The launch functions; what they allocate is full of NaN until it is written."""
    from turbodit.kernels.linear_attention import triton

    plain = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *shape, **kwargs) -> torch.Tensor:
        return plain(self, *shape, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x, x.shape))
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
    grad_q, grad_kv, grad_k_sum, grad_bias = kernels.linear_output_backward(
        grad, q, kv, k_sum, feature_map
    )
    torch.testing.assert_close(grad_bias, grad.float().sum(dim=(0, 1, 2)), rtol=1e-4, atol=1e-4)
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
    monkeypatch.setattr(kernels, "_multiprocessors", lambda x: 4 * parts)
    wide = on_this_device(*tensors(150, 100, heads=2, batch=3, count=4), dtype=torch.float16)
    *inputs, grad = (x[::2, :, :, 10:42] for x in wide)
    assert not inputs[0].is_contiguous()
    assert kernels._grid(inputs[0], 64)[0] == (4, parts)
    got = by_kernels(kernels, "softmax", inputs, grad)
    for x, y in zip(got, exactly("softmax", inputs, grad), strict=True):
        assert relative_error(x, y) <= 2e-3


STATISTICS = [
    (1, 64, 1, 64),
    (63, 128, 1, 64),
    (65, 64, 3, 16),
    (129, 24, 2, 32),
    (129, 64, 1, 128),
]


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("length", "dim", "heads", "block_k"), STATISTICS)
def test_statistics(
    kernels, length: int, dim: int, heads: int, block_k: int, feature_map: str
) -> None:
    k, v = on_this_device(*tensors(length, dim, heads=heads, count=2), dtype=torch.float16)
    k += 2
    k[..., 5] = -k[..., 5].abs()  # with relu a feature that no key has
    weight = torch.randn(dim, dim, device=k.device)
    got = op.KeyValueStatistics(*kernels.key_value_statistics(k, v, weight, block_k, feature_map))
    want = op.KeyValueStatistics(
        *reference.key_value_statistics(
            k.double(), v.double(), weight.double(), block_k, feature_map
        )
    )
    for name, x, y in zip(want._fields, got, want, strict=True):
        assert x.shape == y.shape and x.isfinite().all(), name
        half = name == "means"
        assert x.dtype == (torch.float16 if half else torch.float32), name
        assert relative_error(x, y) <= (2e-3 if half else 1e-6), name
    assert torch.equal(got.v_largest, want.v_largest.float())


def test_statistics_of_parts_and_of_strided_rows(kernels, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_multiprocessors", lambda x: 12)
    wide = on_this_device(*tensors(150, 100, heads=2, batch=3, count=2), dtype=torch.float16)
    k, v = (x[::2, :, :, 10:42] for x in wide)
    weight = torch.eye(32, device=k.device)
    assert kernels._grid(k, 64)[0] == (4, 3)
    got = kernels.key_value_statistics(k, v, weight, 64, "softmax")
    want = reference.key_value_statistics(k.double(), v.double(), weight.double(), 64, "softmax")
    for x, y in zip(got, want, strict=True):
        assert relative_error(x, y) <= 1e-3


def test_means_past_the_range_of_sums(kernels) -> None:
    """Sums over a long sequence exceed float16's range, means of values do not."""
    k, v = on_this_device(*tensors(128, 16, count=2), dtype=torch.float16)
    v = 2000 + 2000 * v
    weight = torch.eye(16, device=k.device)
    means = kernels.key_value_statistics(k, v, weight, 64, "elu")[3]
    want = reference.key_value_statistics(k.double(), v.double(), weight.double(), 64, "elu")[3]
    assert relative_error(means, want) <= 1e-3


def test_output_with_a_bias(kernels) -> None:
    q, k, v = on_this_device(*tensors(70, 24, heads=2), dtype=torch.float16)
    kv, k_sum = kernels.key_value_sums(k, v, "softmax")
    bias = torch.randn(24, device=q.device)
    got = kernels.linear_output(q, kv, k_sum, "softmax", bias)
    want = reference.linear_output(q.double(), kv.double(), k_sum.double(), "softmax", bias)
    assert relative_error(got, want) <= 1e-3


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

FLOATS = {
    "kv_ptr", "k_sum_ptr", "bias_ptr", "weight_ptr", "pooled_ptr", "k_mean_ptr", "v_largest_ptr",
    "grad_kv_ptr", "grad_k_sum_ptr", "grad_bias_ptr",
    "kv_parts_ptr", "k_sum_parts_ptr", "v_largest_parts_ptr",
}  # fmt: skip
ROWS = {"FEATURE_MAP": "softmax", "D": 128, "BLOCK_D": 128, "BLOCK_L": 64}
PARTS = {"D": 128, "BLOCK_D": 128, "BLOCK_K": 64, "FEATURES": 16, "PARTS": 8}
NO_STATISTICS = dict.fromkeys(
    ("v_largest_parts_ptr", "pooled_ptr", "weight_ptr", "v_largest_ptr", "k_mean_ptr")
)
KERNELS = {
    "sums": ("_key_value_sums_kernel", ROWS | dict.fromkeys(("pooled_ptr", "v_largest_ptr"))),
    "statistics": ("_key_value_sums_kernel", ROWS),
    "sums_backward": ("_key_value_sums_backward_kernel", ROWS),
    "output": ("_linear_output_kernel", ROWS),
    "output_backward": ("_linear_output_backward_kernel", ROWS),
    "add_sums": ("_add_parts_kernel", PARTS | NO_STATISTICS),
    "add_statistics": ("_add_parts_kernel", PARTS),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_stages", "block_l", "architectures"),
    [(3, 64, (90, 100)), (2, 32, (80, 86, 89, 120))],
    ids=["large", "small"],
)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile(
    name: str, num_stages: int, block_l: int, architectures: tuple[int, ...]
) -> None:
    """For every architecture, at the largest head dimension, which takes the most memory."""
    from turbodit.kernels.linear_attention import triton

    kernel, constants = KERNELS[name]
    if "BLOCK_L" in constants and name != "statistics":  # there it is block_k
        constants = constants | {"BLOCK_L": block_l}
    signature = {}
    for argument in getattr(triton, kernel).arg_names:
        if argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in FLOATS else "*bf16"
        elif argument.startswith("stride") or argument == "run":
            signature[argument] = "i32:16"
        else:
            signature[argument] = "i32"
    if name == "add_statistics":
        signature["kv_ptr"] = "*bf16"
    assert_compiles(
        "turbodit.kernels.linear_attention.triton",
        kernel,
        {argument: kind for argument, kind in signature.items() if argument not in constants},
        constants,
        architectures,
        num_warps=8,
        num_stages=num_stages,
    )
