"""Norms with their tangents on a GPU, at the widths of Wan, and in the DiT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from turbodit.config import TransformerConfig
from turbodit.kernels import norm as ops
from turbodit.kernels import norm_jvp
from turbodit.model.wan import WanModel

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
EPS = 1e-6
WIDTHS = (24, 1000, 1536, 3072, 5120, 16384)
# Width, tokens, runs of them with one modulation; the last are more than a grid's second axis has.
SIZES = [(w, *some) for w in WIDTHS for some in ((1, 1), (129, 1), (1020, 4))]
SIZES += [(24, 40_000, 40_000)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nothing is written to holds NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()  # an error belongs to the test that made it


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> torch.Tensor:
    return (torch.randn(shape, device=CUDA) + offset).to(dtype)


def glue(
    tensors: dict[str, torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, out: torch.dtype
) -> list[torch.Tensor]:
    """All that there is: `add_norm` in the two ways of a block, `gated_add`, `norm`, `rms_norm`."""
    x, update, gate = tensors["x"], tensors["update"], tensors["gate"]
    modulation = {"shift": tensors["shift"], "scale": tensors["scale"]}
    affine = {"weight": weight, "bias": bias}
    y, h = ops.add_norm(x, update, gate, **affine, eps=EPS, out=out)
    z, k = ops.add_norm(x, update, **modulation, eps=EPS, out=out)
    every, _ = ops.add_norm(x, update, gate, **affine, **modulation, eps=EPS, out=out)
    width, half = x.shape[-1], 2 if x.shape[-1] % 64 else 32
    turns = torch.arange(x.shape[1] * half, device=CUDA).reshape(x.shape[1], half) / (7 * width)
    return [
        y, h, z, k, every, ops.gated_add(x, update, gate),
        ops.norm(x, **modulation, eps=EPS, out=out),
        ops.rms_norm(update, weight, EPS, (turns.cos(), turns.sin())),
    ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("width", "length", "runs"), SIZES)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_as_exact_as_pytorch(
    monkeypatch: pytest.MonkeyPatch, width: int, length: int, runs: int, stream: torch.dtype
) -> None:
    """Values and tangents err at most twice as much as by PyTorch's rules."""
    half = torch.bfloat16
    names = ("x", "update", "gate", "shift", "scale")

    def inputs(offset: float) -> dict[str, torch.Tensor]:
        tables = gaussian(2, runs, 6, width).unbind(2)[:3]
        x = gaussian(2, length, width, dtype=stream, offset=offset)
        return dict(
            zip(names, (x, gaussian(2, length, width, dtype=half), *tables), strict=True)
        )  # fmt: skip

    values, tangents = inputs(3.0), inputs(-1.0)
    weight, bias = gaussian(2, width).unbind()

    def jvp(double: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        def cast(x: torch.Tensor) -> torch.Tensor:
            return x.double() if double else x

        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(cast(values[n]), cast(tangents[n])) for n in names}
            out = torch.float64 if double else half
            results = glue(duals, cast(weight), cast(bias), out)
            return [tuple(forward_ad.unpack_dual(x)) for x in results]

    with Operators() as found:
        got = jvp(double=False)
    assert found.calls["add_norm_jvp"] == 5 and found.calls["rms_norm_jvp"] == 1
    monkeypatch.setattr(norm_jvp, "has_kernel", lambda x: False)
    plain, exact = jvp(double=False), jvp(double=True)
    for mine, theirs, want in zip(got, plain, exact, strict=True):
        for a, b, c in zip(mine, theirs, want, strict=True):
            assert a.dtype == b.dtype and a.isfinite().all()
            assert (a - c).norm() <= 2 * (b - c).norm() + 1e-5 * c.norm()


@torch.no_grad()
@pytest.mark.parametrize("api", ["func", "dual_level"])
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_whole_model_under_autocast(residual: str, per_frame: bool, api: str) -> None:
    """float32 weights and products in bfloat16, against float64 on the CPU."""
    config = TransformerConfig(
        dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64, text_len=100
    )
    model = WanModel(config, residual=residual)  # type: ignore[arg-type]
    for name, p in model.named_parameters():
        is_scale = "norm" in name and "weight" in name
        torch.nn.init.normal_(p, mean=1.0 if is_scale else 0.0, std=0.1)
    latents, direction = torch.randn(2, 2, 16, 3, 10, 14).bfloat16().unbind()
    t, t_tangent = torch.tensor([0.9, 0.3]), torch.tensor([0.2, -0.4])
    if per_frame:
        t, t_tangent = t[:, None].repeat(1, 3), t_tangent[:, None].repeat(1, 3)
        t[:, 0], t_tangent[:, 0] = 0, 0
    context = torch.randn(2, 100, 64)

    def jvp(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        text = context.to(device, dtype)

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                return model(x, t, text)

        primals = latents.to(device, dtype), t.to(device)
        tangents = direction.to(device, dtype), t_tangent.to(device)
        if api == "func":
            return torch.func.jvp(velocity, primals, tangents)
        with forward_ad.dual_level():
            out = velocity(*map(forward_ad.make_dual, primals, tangents))
            return tuple(forward_ad.unpack_dual(out))

    model.to(CUDA)
    with Operators() as found:
        got = jvp(torch.float32, "cuda")
    if api == "dual_level":
        assert found.calls["add_norm_jvp"] == 2 * 4 + 1 and found.calls["rms_norm_jvp"] == 2 * 3
    model.to("cpu", torch.float64)
    model.residual = "float32"
    for mine, want in zip(got, jvp(torch.float64, "cpu"), strict=True):
        mine = mine.cpu().double()
        assert (mine - want).norm() <= 2e-2 * want.norm()
