"""Back-ends in a CUDA graph, on another device than the current one, and with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from turbodit.attention import BACKENDS, AttentionFunction, attention_function, available

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
OURS = ("sage", "sparge", "sla", "sagesla", "linear")


def inputs(seed: int, length: int = 1111, device: torch.device = CUDA) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(3, 2, length, 3, 128, generator=generator)
    return list(wide.to(device, torch.bfloat16).unbind())


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def built(name: str, device: torch.device = CUDA) -> AttentionFunction:
    """A back-end of ours; where it has parameters, with a linear branch."""
    attend = attention_function(name, head_dim=128)
    if isinstance(attend, torch.nn.Module):
        torch.manual_seed(0)
        for parameter in attend.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        attend.to(device)
    return attend


@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_a_cuda_graph_takes_new_inputs(name: str) -> None:
    attend = built(name)
    places = inputs(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend(*places)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # fails where the host waits for the device
        out = attend(*places)
    for seed in (1, 2):
        fresh = inputs(seed)
        for place, x in zip(places, fresh, strict=True):
            place.copy_(x)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, attend(*fresh))


@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_autocast_changes_nothing(name: str) -> None:
    attend, qkv = built(name), inputs(0)
    want = attend(*qkv)
    with torch.autocast("cuda", torch.float16):
        assert torch.equal(attend(*qkv), want)


@pytest.mark.multi_gpu
@torch.no_grad()
@pytest.mark.parametrize("name", OURS)
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    other = torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    want = built(name)(*inputs(0))
    got = built(name, other)(*inputs(0, device=other))
    assert got.device == other and torch.equal(got.cpu(), want.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in OURS])
def test_gradients_of_libraries(name: str) -> None:
    runs, reason = available(name, CUDA)
    if not runs:
        pytest.skip(reason)
    tensors = inputs(0, 512)
    grad = inputs(1, 512)[0]

    def gradients(attend: AttentionFunction, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        points = [x.to(dtype).requires_grad_() for x in tensors]
        return torch.autograd.grad(attend(*points), points, grad.to(dtype))

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    want = gradients(exact, torch.float64)
    plain = gradients(attention_function("sdpa-math"), torch.bfloat16)
    for got, own, right in zip(
        gradients(attention_function(name), torch.bfloat16), plain, want, strict=True
    ):
        assert relative_error(got, right) < 2 * relative_error(own, right)
