"""Tangents through the whole DiT, by `torch.func.jvp` without gradients, as sCM needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from turbodit.config import TransformerConfig
from turbodit.model.rope import rope_table
from turbodit.model.wan import Residual, WanModel
from turbodit.quantization import quantize_linears

SHAPE: dict[str, Any] = {
    "dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2, "text_dim": 12, "text_len": 7,
    "freq_dim": 32,
}  # fmt: skip
VARIANTS = {
    "t2v": TransformerConfig(**SHAPE),
    "i2v-clip": TransformerConfig(**SHAPE, in_dim=36, image_dim=10),
    "flf2v": TransformerConfig(**SHAPE, in_dim=36, image_dim=10, image_positions=6),
    "ti2v": TransformerConfig(**SHAPE, in_dim=48, out_dim=48),
}
BATCH = 2
STEP = 1e-6  # of the differences: the fastest sinusoid of the time turns by 1000 t

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Point:
    """Where the tangent is taken, along what, and all else that the model takes."""

    latents: torch.Tensor
    t: torch.Tensor  # (B,), or (B, T) where each latent frame has its own
    latents_tangent: torch.Tensor
    t_tangent: torch.Tensor
    context: torch.Tensor
    image_context: torch.Tensor | None

    @property
    def primals(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.latents, self.t

    @property
    def tangents(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.latents_tangent, self.t_tangent

    def to(self, dtype: torch.dtype) -> Point:
        """All but the times in `dtype`."""
        names = ("latents", "latents_tangent", "context", "image_context")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{n: x if x is None else x.to(dtype) for n, x in values.items()})

    def velocity(self, model: WanModel) -> Velocity:
        return lambda latents, t: model(latents, t, self.context, self.image_context)


def random_model(
    name: str = "t2v", attention: str = "sdpa", residual: Residual = "float32", **settings: Any
) -> WanModel:
    torch.manual_seed(0)
    model = WanModel(VARIANTS[name], attention, settings, residual).eval()
    for parameter, p in model.named_parameters():
        is_scale = "norm" in parameter and "weight" in parameter
        torch.nn.init.normal_(p, mean=1.0 if is_scale else 0.0, std=0.2)
    return model.requires_grad_(False)


def random_point(variant: str = "t2v") -> Point:
    """In float64, 3 x 3 x 5 tokens."""
    config = VARIANTS[variant]
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    t = torch.tensor([0.912, 0.3], dtype=torch.float64)
    t_tangent = torch.tensor([0.4, -0.2], dtype=torch.float64)
    if variant == "ti2v":  # the first frame is given: it has no noise, and never will
        t, t_tangent = t[:, None].repeat(1, 3), t_tangent[:, None].repeat(1, 3)
        t[:, 0], t_tangent[:, 0] = 0, 0
    image = None
    if config.image_dim is not None:
        image = normal(BATCH, config.image_positions or 5, config.image_dim)
    size = (BATCH, config.in_dim, 3, 6, 10)
    context = normal(BATCH, config.text_len, config.text_dim)
    return Point(normal(*size), t, normal(*size), t_tangent, context, image)


def half(model: WanModel) -> WanModel:
    """In bfloat16 but for what stays in float32."""
    for name, p in model.named_parameters():
        p.data = p.data.float() if model.keep_float32(name) else p.data.bfloat16()
    return model


def jvp(velocity: Velocity, point: Point) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return torch.func.jvp(velocity, point.primals, point.tangents)


def differences(velocity: Velocity, point: Point) -> torch.Tensor:
    """The tangent from values on both sides."""

    def at(step: float) -> torch.Tensor:
        moved = (x + step * dx for x, dx in zip(point.primals, point.tangents, strict=True))
        return velocity(*moved)

    with torch.no_grad():
        return (at(STEP) - at(-STEP)) / (2 * STEP)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("along", ["latents", "t", "both"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tangent_is_that_of_finite_differences(variant: str, along: str) -> None:
    model, point = random_model(variant).double(), random_point(variant)
    if along == "latents":
        point = replace(point, t_tangent=torch.zeros_like(point.t))
    elif along == "t":
        point = replace(point, latents_tangent=torch.zeros_like(point.latents))
    velocity = point.velocity(model)
    out, tangent = jvp(velocity, point)
    torch.testing.assert_close(out, velocity(*point.primals))
    assert relative_error(tangent, differences(velocity, point)) <= 1e-7


@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_sparse_linear_attention(variant: str, feature_map: str) -> None:
    """The block map is held fixed: it is the same at both ends of a small difference."""
    settings = {"ratio": 0.4, "block_q": 16, "block_k": 16}
    model = random_model(
        attention="sla", variant=variant, feature_map=feature_map, **settings
    ).double()
    point = random_point()
    velocity = point.velocity(model)
    out, tangent = jvp(velocity, point)
    torch.testing.assert_close(out, velocity(*point.primals))
    assert relative_error(tangent, differences(velocity, point)) <= 1e-7


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16(variant: str, residual: Residual) -> None:
    model, point = half(random_model(variant, residual=residual)), random_point(variant)
    point = point.to(torch.bfloat16)
    out, tangent = jvp(point.velocity(model), point)
    assert out.dtype == tangent.dtype == torch.bfloat16
    exact = random_model(variant).double()
    exact.load_state_dict(model.state_dict())
    point = point.to(torch.float64)
    want, want_tangent = jvp(point.velocity(exact), point)
    assert relative_error(tangent, want_tangent) <= 2 * relative_error(out, want) <= 1e-2


def test_dual_level_gives_the_same() -> None:
    model, point = random_model().double(), random_point()
    velocity = point.velocity(model)
    want = jvp(velocity, point)
    with torch.no_grad(), forward_ad.dual_level():
        duals = map(forward_ad.make_dual, point.primals, point.tangents)
        got = forward_ad.unpack_dual(velocity(*duals))
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_encoded_context_gives_the_same() -> None:
    model, point = random_model("i2v-clip").double(), random_point("i2v-clip")
    want = jvp(point.velocity(model), point)
    with torch.no_grad():
        encoded = model.encode_context(point.context, point.image_context)
    got = jvp(lambda latents, t: model(latents, t, encoded), point)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_checkpointing_gives_the_same() -> None:
    model, point = random_model().double(), random_point()
    velocity = point.velocity(model)
    want = jvp(velocity, point)

    def checkpointed(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return checkpoint(velocity, latents, t, use_reentrant=False)

    for mine, theirs in zip(jvp(checkpointed, point), want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_parameters_that_train_change_nothing() -> None:
    model, point = random_model().double(), random_point()
    want = jvp(point.velocity(model), point)
    model.requires_grad_(True)
    got = jvp(point.velocity(model), point)
    assert all(map(torch.equal, got, want)) and not got[1].requires_grad


def test_a_gradient_of_the_tangent_is_refused() -> None:
    model, point = random_model().double().requires_grad_(True), random_point()
    _, tangent = torch.func.jvp(point.velocity(model), point.primals, point.tangents)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        tangent.sum().backward()


def test_nothing_of_it_stays_behind() -> None:
    """The table of angles is kept for later calls, also when first made within `jvp`."""
    model, point = random_model(), random_point().to(torch.float32)
    rope_table.cache_clear()
    jvp(point.velocity(model), point)
    cos, sin = model.angles(point.latents)
    assert cos.data_ptr() and sin.data_ptr()  # a tensor of `jvp` has none once that has ended
    kept = point.velocity(model)(*point.primals)
    rope_table.cache_clear()
    assert torch.equal(kept, point.velocity(model)(*point.primals))


def test_quantised_norms_have_no_tangent() -> None:
    model, point = random_model(), random_point().to(torch.float32)
    quantize_linears(model, "int8-channel")
    with pytest.raises(ValueError, match="no tangent"):
        jvp(point.velocity(model), point)
