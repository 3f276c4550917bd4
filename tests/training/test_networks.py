"""Conditions of a batch, and guidance, around networks that say what they were given."""

from __future__ import annotations

import pytest
import torch

from turbodit.training.data import Batch
from turbodit.training.losses import exact_tangent
from turbodit.training.networks import Conditions, Experts, OneSide, conditions_of, guided
from turbodit.training.times import LogNormal, UniformShifted, time_of_angle

B, C, T, H, W = 3, 2, 4, 2, 2
CPU = torch.device("cpu")


class Asked:
    """In place of a WanModel: keeps its arguments, answers with the latents."""

    def __call__(self, latents, t, context, features):
        self.latents, self.t, self.context, self.features = latents, t, context, features
        return latents[:, :C]


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, C, T, H, W, generator=torch.Generator().manual_seed(seed))


def context() -> torch.Tensor:
    return torch.arange(B * 6.0).reshape(B, 2, 3)


def times() -> torch.Tensor:
    return torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)


def some_first() -> Conditions:
    """Samples 0 and 2 begin with a given frame."""
    return Conditions(
        context(), first=latents(1)[:, :, :1], keep_first=torch.tensor([True, False, True])
    )


def test_text_alone():
    model, x, t = Asked(), latents(), times()
    conditions = Conditions(context())
    conditions.network(model)(x, t)
    assert torch.equal(model.latents, x) and torch.equal(model.t, t)
    assert torch.equal(model.context, context()) and model.features is None
    assert conditions.mask(x) is None


def test_image_conditions_come_behind_the_latents_in_their_dtype():
    model, x = Asked(), latents().double()
    channels, features = torch.ones(B, 5, T, H, W), torch.rand(B, 7, 2)
    Conditions(context(), channels, features).network(model)(x, times())
    assert torch.equal(model.latents[:, :C], x)
    assert model.latents.shape[1] == C + 5 and (model.latents[:, C:] == 1).all()
    assert model.latents.dtype == torch.float64
    assert model.features is features


def test_given_first_frames_are_clean_and_have_time_zero():
    model, x, t = Asked(), latents(), times()
    conditions = some_first()
    conditions.network(model)(x, t)
    assert model.t.shape == (B, T) and model.t.dtype == torch.float64
    for row, kept in enumerate((True, False, True)):
        first = latents(1) if kept else x
        assert torch.equal(model.latents[row, :, 0], first[row, :, 0])
        assert model.t[row, 0] == (0 if kept else t[row])
        assert (model.t[row, 1:] == t[row]).all()
    assert torch.equal(model.latents[:, :, 1:], x[:, :, 1:])


def test_given_first_frames_are_masked():
    mask = some_first().mask(latents()).expand(B, C, T, H, W)
    assert (mask[[0, 2], :, 0] == 0).all()
    assert (mask[:, :, 1:] == 1).all() and (mask[1] == 1).all()


def test_nothing_flows_through_a_given_frame():
    """Neither a gradient nor a tangent; both flow through the others."""
    x = latents().double().requires_grad_()
    network = some_first().network(lambda z, t, *_: z * t[:, None, :, None, None])
    (gradient,) = torch.autograd.grad(network(x, times()).sum(), x)
    with torch.no_grad():
        _, tangent = exact_tangent(
            network, x.detach(), times(), torch.ones_like(x), torch.ones(B, 1, 1, 1, 1).double()
        )
    for found in (gradient, tangent):
        assert (found[[0, 2], :, 0] == 0).all()
        assert (found[1, :, 0] != 0).all() and (found[:, :, 1:] != 0).all()


def test_another_text_for_all_samples():
    model = Asked()
    negative = torch.full((1, 2, 3), -1.0)
    channels = torch.zeros(B, 5, T, H, W)
    Conditions(context(), channels).with_text(negative).network(model)(latents(), times())
    assert model.context.shape == (B, 2, 3) and (model.context == -1).all()
    assert model.latents.shape[1] == C + 5


def batch(**parts) -> Batch:
    names = ("",) * B
    return Batch(latents(), context(), names, names, **parts)


def test_conditions_of_a_batch():
    generator = torch.Generator().manual_seed(0)
    parts = {"channels": torch.rand(B, 5, T, H, W), "features": torch.rand(B, 7, 2)}
    state = generator.get_state()
    x0, conditions = conditions_of(batch(**parts), 0.0, generator, CPU)
    assert torch.equal(x0, latents()) and torch.equal(conditions.context, context())
    assert torch.equal(conditions.channels, parts["channels"])
    assert torch.equal(conditions.features, parts["features"])
    assert conditions.first is None and conditions.keep_first is None
    assert torch.equal(generator.get_state(), state), "drew a number that nobody asked for"


def test_share_of_samples_that_begin_with_an_image():
    generator = torch.Generator().manual_seed(0)
    drawn = [conditions_of(batch(), 0.3, generator, CPU)[1].keep_first for _ in range(400)]
    assert torch.stack(drawn).double().mean().item() == pytest.approx(0.3, abs=0.04)
    x0, conditions = conditions_of(batch(), 1.0, generator, CPU)
    assert conditions.keep_first.all()
    assert torch.equal(conditions.first, x0[:, :, :1])


def test_guidance():
    x, t = latents(), times()
    velocity = guided(lambda x, t: x + 2, lambda x, t: x - 1, 5.0)
    torch.testing.assert_close(velocity(x, t), x - 1 + 5 * 3)


def test_guidance_of_one_asks_the_conditional_network_alone():
    def conditional(x, t):
        return x

    def unconditional(x, t):
        raise AssertionError("a pass for nothing")

    assert guided(conditional, unconditional, 1.0)(latents(), times()) is not None


# Two experts

BOUNDARY = 0.875


def test_the_time_says_which_expert_works():
    experts = Experts(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), BOUNDARY)
    for t, name in ((1.0, "high"), (BOUNDARY, "high"), (BOUNDARY - 1e-9, "low"), (0.0, "low")):
        times = torch.tensor([t, t], dtype=torch.float64)
        assert experts.at(times) is getattr(experts, f"{name}_noise"), t
    with pytest.raises(ValueError, match=r"times on both sides of 0\.875, \[0\.75, 1\.0\]"):
        experts.at(torch.tensor([0.75, 1.0]))


def test_experts_are_one_module_with_the_parameters_of_both():
    experts = Experts(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), BOUNDARY)
    names = [name for name, _ in experts.named_parameters()]
    assert [name.partition(".")[0] for name in names] == ["high_noise"] * 2 + ["low_noise"] * 2
    folders = experts.by_folder()
    assert folders["transformer"] is experts.high_noise
    assert folders["transformer_2"] is experts.low_noise


@pytest.mark.parametrize("distribution", [UniformShifted(5.0), LogNormal(0.7, 1.6)])
def test_batches_are_on_one_side_and_have_the_distribution(distribution):
    """Its share of each side, and within a side its own quantiles."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    side = OneSide(distribution, BOUNDARY, common)
    batches = torch.stack([time_of_angle(side.sample(3, own)) for _ in range(3000)])
    high = batches >= BOUNDARY
    assert (high.all(1) | ~high.any(1)).all()
    wanted = time_of_angle(distribution.sample(100_000, torch.Generator().manual_seed(2)))
    shares = [x.double().mean().item() for x in (high[:, 0], wanted >= BOUNDARY)]
    assert shares[0] == pytest.approx(shares[1], abs=0.03) and 0.2 < shares[1] < 0.45
    levels = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    for of_side in (lambda t: t[t >= BOUNDARY], lambda t: t[t < BOUNDARY]):
        found, expected = (of_side(t).quantile(levels) for t in (batches, wanted))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_the_side_is_the_same_whatever_a_process_draws_itself():
    found = []
    for seed in (1, 2):
        side = OneSide(UniformShifted(5.0), BOUNDARY, torch.Generator().manual_seed(0))
        own = torch.Generator().manual_seed(seed)
        found.append(torch.stack([side.sample(2, own) for _ in range(50)]))
    sides = [time_of_angle(angles) >= BOUNDARY for angles in found]
    assert torch.equal(*sides) and not torch.equal(*found)
    assert sides[0].any() and not sides[0].all()
