"""Attention with its tangent on a GPU, at sizes the interpreter is too slow for, and in the DiT."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from turbodit.attention import dense
from turbodit.attention.jvp import sdpa_with_tangent
from turbodit.config import TransformerConfig
from turbodit.kernels.attention_jvp import attention_jvp, has_kernel, reference
from turbodit.model.wan import WanModel

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
HALF = (torch.float16, torch.bfloat16)
LENGTHS = [(1, 1), (63, 200), (200, 63), (1111, 1111), (1, 4097), (4097, 1111), (4096, 4096)]
ALL, ONLY_Q = (True, True, True), (True, False, False)

Inputs = list[torch.Tensor | None]  # q, k, v and their tangents


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing is written to holds NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()  # an error belongs to the test that made it


def inputs(
    length_q: int,
    length_k: int,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    given: tuple[bool, ...] = ALL,
) -> Inputs:
    """(2, L, 3, D) as parts of wider tensors."""

    def rows(length: int) -> torch.Tensor:
        return torch.randn(2, length, 4, 2 * dim, device=CUDA, dtype=dtype)[:, :, 1:, dim:]

    lengths = (length_q, length_k, length_k)
    tangents = [rows(n) if is_given else None for n, is_given in zip(lengths, given, strict=True)]
    return [*map(rows, lengths), *tangents]


def plain_attention(tensors: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's derivative of attention as three operations, each in the inputs' dtype."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ((q.shape[-1] ** -0.5 * q @ k.mT).softmax(dim=-1) @ v).transpose(1, 2)

    primals = tuple(x for x in tensors[:3] if x is not None)
    pairs = zip(primals, tensors[3:], strict=True)
    return torch.func.jvp(
        attend, primals, tuple(torch.zeros_like(x) if dx is None else dx for x, dx in pairs)
    )


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def assert_as_exact_as_pytorch(tensors: Inputs) -> None:
    """Output and tangent err at most twice as much as PyTorch in the same precision."""
    got, plain = attention_jvp(*tensors), plain_attention(tensors)
    exact = plain_attention([x if x is None else x.double() for x in tensors])
    for mine, theirs, want in zip(got, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.isfinite().all()
        assert (mine - want).norm() <= 2 * (theirs - want).norm() + 1e-2


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("length_q", "length_k"), LENGTHS)
def test_kernel(length_q: int, length_k: int, dim: int, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(inputs(length_q, length_k, dim, dtype))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "given", [ONLY_Q, (False, True, False), (False, False, True), (True, True, False)]
)
def test_kernel_without_some_tangents(given: tuple[bool, ...], dim: int) -> None:
    assert_as_exact_as_pytorch(inputs(1111, 512, dim, given=given))


def test_kernel_through_pointers() -> None:
    """Rows at distances that TMA cannot take, and a tangent that is one number in all places."""
    tensors = inputs(1111, 1000)
    for i, x in enumerate(tensors):
        assert x is not None
        tensors[i] = torch.nn.functional.pad(x, (0, 1))[..., :-1]
    tensors[3] = tensors[3][:, :1, :1, :1].expand_as(tensors[0])
    assert_as_exact_as_pytorch(tensors)


def test_long_sequence() -> None:
    """Some rows of a sequence whose score matrix would not fit."""
    q, k, v, dq, dk, dv = inputs(40_000, 40_000)
    got = attention_jvp(q, k, v, dq, dk, dv)
    some = torch.arange(0, 40_000, 997, device=CUDA)
    want = reference.attention_jvp(q[:, some], k, v, dq[:, some], dk, dv, 128**-0.5)
    for mine, theirs in zip(got, want, strict=True):
        assert relative_error(mine[:, some], theirs) <= 1e-2


def test_equal_inputs_give_equal_bits() -> None:
    tensors = inputs(1111, 1111)
    assert all(map(torch.equal, attention_jvp(*tensors), attention_jvp(*tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [40, 64])
def test_backend_takes_any_dtype_and_width(dim: int, dtype: torch.dtype) -> None:
    tensors = [x for x in inputs(200, 111, dim, dtype) if x is not None]
    assert has_kernel(tensors[0]) == (dtype == torch.bfloat16 and dim == 64)
    out, tangent = torch.func.jvp(sdpa_with_tangent, tuple(tensors[:3]), tuple(tensors[3:]))
    assert relative_error(out, dense.sdpa(*(x.double() for x in tensors[:3]))) <= 1e-2
    want = plain_attention([x.double() for x in tensors])[1]
    assert relative_error(tangent, want) <= 1e-2


@torch.no_grad()
@pytest.mark.parametrize("image_dim", [None, 40])
@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_whole_model(residual: str, image_dim: int | None) -> None:
    """In bfloat16 against float64 on the CPU."""
    config = TransformerConfig(
        dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64, text_len=100,
        image_dim=image_dim,
    )  # fmt: skip
    model = WanModel(config, residual=residual).requires_grad_(False)  # type: ignore[arg-type]
    for name, p in model.named_parameters():
        is_scale = "norm" in name and "weight" in name
        torch.nn.init.normal_(p, mean=1.0 if is_scale else 0.0, std=0.1)
        if not model.keep_float32(name):
            p.data = p.data.bfloat16()
    latents, direction = torch.randn(2, 2, 16, 3, 10, 14).bfloat16().unbind()
    t, t_tangent = torch.tensor([0.9, 0.3]), torch.tensor([0.2, -0.4])
    context = torch.randn(2, 100, 64).bfloat16()
    image = None if image_dim is None else torch.randn(2, 257, image_dim).bfloat16()

    def jvp(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        to = {"dtype": dtype, "device": device}
        others = context.to(**to), None if image is None else image.to(**to)
        primals, tangents = (
            (latents.to(**to), t.to(device)),
            (direction.to(**to), t_tangent.to(device)),
        )
        return torch.func.jvp(lambda x, t: model(x, t, *others), primals, tangents)

    model.to(CUDA)
    got = jvp(torch.bfloat16, CUDA)
    model.to("cpu", torch.float64)
    model.residual = "float32"
    for mine, want in zip(got, jvp(torch.float64, torch.device("cpu")), strict=True):
        assert relative_error(mine.cpu(), want) <= 2e-2
