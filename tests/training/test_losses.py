"""Losses against derivations by hand, on flows that are known exactly (docs/training/losses.md)."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks.toy_rcm import ring
from torch import nn

from turbodit.training.losses import (
    black_box,
    dcm,
    denoise,
    dmd,
    exact_tangent,
    fake_score,
    finite_difference_tangent,
    rollout,
    scm,
    semi_continuous_tangent,
    trigflow,
    white_box,
)
from turbodit.training.times import time_of_angle

MIXTURE = ring(std=0.2)
MEAN, STD = torch.tensor([0.7, -0.3], dtype=torch.float64), 0.4  # of the one Gaussian below
TANGENTS = [exact_tangent, finite_difference_tangent, semi_continuous_tangent]


@pytest.fixture(autouse=True)
def float64_and_one_seed():
    """Derivations are compared in double precision; networks that are not say so."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class MLP(nn.Module):
    """A smooth velocity, different at each time; draws its weights from `seed`."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None]], dim=1))


class Pointwise(nn.Module):
    """A velocity of latents (B, C, ...) that mixes channels and nothing else."""

    def __init__(self, channels, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.channels = nn.Linear(channels + 1, channels, dtype=dtype)

    def forward(self, x, t):
        time = t.reshape(-1, *[1] * (x.ndim - 1)).expand_as(x[:, :1])
        features = torch.cat([x, time], dim=1).movedim(1, -1)
        return self.channels(features.to(self.channels.weight.dtype)).tanh().movedim(-1, 1)


def batch(count=5, seed=0):
    """x0 of the mixture, noise, angles in (0, pi/2)."""
    generator = torch.Generator().manual_seed(seed)
    x0 = MIXTURE.sample(count, generator)
    noise = torch.randn(count, 2, generator=generator)
    return x0, noise, torch.linspace(0.1, 1.55, count)


def video(seed=0):
    """x0, noise (2, 3, 4, 2, 2), angles, and a mask that keeps the first frame of the second."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 2, 3, 4, 2, 2, generator=generator)
    mask = torch.ones(2, 1, 4, 1, 1)
    mask[1, :, 0] = 0
    return x0, noise, torch.tensor([0.4, 1.3]), mask


def exact_consistency(x, t):
    """The consistency function of N(MEAN, STD^2), as a velocity.

    Along its flow x - (1-t) MEAN grows with the deviation sqrt((1-t)^2 STD^2 + t^2), so the clean
    end is f = MEAN + STD (x - (1-t) MEAN) / deviation, and v = (x - f) / t.
    """
    t = t[:, None]
    f = MEAN + STD * (x - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2).sqrt()
    return (x - f) / t


def gaussian_flow(x, t):
    """E[noise - x0 | x] where x0 is N(MEAN, STD^2)."""
    t = t[:, None]
    a = 1 - t
    return (t - a * STD**2) / (a**2 * STD**2 + t**2) * (x - a * MEAN) - MEAN


def integrated_consistency(x, t, steps=48):
    """The consistency function of the mixture as a velocity: Runge-Kutta down to t = 0."""
    state, h = x, -t / steps
    for step in range(steps):
        now = t + step * h
        k1 = MIXTURE.velocity(state, now)
        k2 = MIXTURE.velocity(state + h[:, None] / 2 * k1, now + h / 2)
        k3 = MIXTURE.velocity(state + h[:, None] / 2 * k2, now + h / 2)
        k4 = MIXTURE.velocity(state + h[:, None] * k3, now + h)
        state = state + h[:, None] / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return (x - state) / t[:, None]


def F_by_the_book(network, x, s):
    """(cos s x - x0) / sin s with x0 = c_skip x + c_out net(c_in x, t)."""
    cos, sin = s.cos()[:, None], s.sin()[:, None]
    c_skip, c_out = 1 / (cos + sin), -sin / (cos + sin)
    x0 = c_skip * x + c_out * network(c_skip * x, s.sin() / (s.cos() + s.sin()))
    return (cos * x - x0) / sin


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()))


def test_network_of_one_sample_gives_its_derivative_and_its_clean_end():
    # A network that knows x0 and noise: F is dx_s/ds, and the estimate is x0.
    x0, noise, s = batch()
    cos, sin = s.cos()[:, None], s.sin()[:, None]
    x_s = cos * x0 + sin * noise

    def oracle(x, t):
        torch.testing.assert_close(x, (1 - t)[:, None] * x0 + t[:, None] * noise)
        return noise - x0

    torch.testing.assert_close(trigflow(oracle)(x_s, s), cos * noise - sin * x0)
    torch.testing.assert_close(denoise(oracle, x_s, s), x0)


def test_f_and_clean_estimate_agree_with_the_preconditioning_of_the_paper():
    net = MLP()
    _, x, s = batch()
    torch.testing.assert_close(trigflow(net)(x, s), F_by_the_book(net, x, s))
    x0 = s.cos()[:, None] * x - s.sin()[:, None] * F_by_the_book(net, x, s)
    torch.testing.assert_close(denoise(net, x, s), x0)


def test_at_the_clean_end_nothing_is_denoised_and_nothing_is_divided_by_zero():
    x, s = torch.ones(1, 2), torch.zeros(1)
    torch.testing.assert_close(denoise(MLP(), x, s), x)
    assert trigflow(MLP())(x, s).isfinite().all()


def test_the_mixtures_velocity_is_that_of_its_samples():
    # Regression by hand: over many samples near one x, the mean of noise - x0.
    x0 = MIXTURE.sample(400_000, torch.Generator().manual_seed(0))
    noise = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(1))
    x, t = torch.tensor([[0.6, 0.3]]), torch.tensor([0.6])
    near = (0.4 * x0 + 0.6 * noise - x).norm(dim=1) < 0.1
    found = (noise - x0)[near].mean(0)
    deviation = (noise - x0)[near].std(0) / near.sum().sqrt()
    assert ((found - MIXTURE.velocity(x, t)[0]).abs() < 4 * deviation + 0.01).all()


@pytest.mark.parametrize(
    ("consistency", "flow"),
    [(exact_consistency, gaussian_flow), (integrated_consistency, MIXTURE.velocity)],
    ids=["one Gaussian, closed form", "mixture, integrated"],
)
def test_the_tangent_of_a_consistency_function_vanishes(consistency, flow):
    x0, noise, s = batch()
    student = MLP()

    def bent(x, t):
        return consistency(x, t) + 0.1 * student(x, t)

    assert scm(consistency, flow, x0, noise, s).norm.max() < 1e-5
    assert scm(bent, flow, x0, noise, s).norm.min() > 1e-4
    assert scm(consistency, flow, x0, noise, s, warmup=0.5).norm.min() > 1e-3


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_scm_gradient_is_the_formula_with_central_differences(r):
    student, teacher = MLP(0), MLP(1)
    x0, noise, s = batch()
    cos, sin = s.cos()[:, None], s.sin()[:, None]
    x_s = cos * x0 + sin * noise
    with torch.no_grad():
        F_T = F_by_the_book(teacher, x_s, s)
        ahead, behind = (F_by_the_book(student, x_s + h * F_T, s + h) for h in (1e-5, -1e-5))
        dF_ds = (ahead - behind) / 2e-5
        F = F_by_the_book(student, x_s, s)
        g = -cos * (1 - r**2 * sin**2).sqrt() * (F - F_T) - r * cos * sin * (x_s + dF_ds)
        length = g.norm(dim=1, keepdim=True)
        expected = -2 * 7.0 * g / (length + 0.1) / len(s)
    by_hand = (expected * F_by_the_book(student, x_s, s)).sum()
    found = scm(student, teacher, x0, noise, s, warmup=r, loss_scale=7.0)
    torch.testing.assert_close(found.norm, length[:, 0], rtol=1e-8, atol=0)
    torch.testing.assert_close(
        found.per_sample, 7 * (length / (length + 0.1))[:, 0] ** 2, rtol=1e-8, atol=0
    )
    for mine, theirs in zip(
        gradients(found.loss, student), gradients(by_hand, student), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_without_warm_up_the_student_is_drawn_to_the_teacher_alone():
    x0, noise, s = batch()
    assert scm(MLP(0), MLP(0), x0, noise, s, warmup=0.0).norm.max() == 0
    student = MLP(0)
    before = [p.detach().clone() for p in student.parameters()]
    loss = scm(student, MLP(1), x0, noise, s, warmup=0.0).loss
    step = [p - 1e-4 * grad for p, grad in zip(before, gradients(loss, student), strict=True)]

    def distance():
        x_s = s.cos()[:, None] * x0 + s.sin()[:, None] * noise
        return (trigflow(student)(x_s, s) - trigflow(MLP(1))(x_s, s)).norm(dim=1).sum()

    far = distance()
    for p, value in zip(student.parameters(), step, strict=True):
        p.data.copy_(value)
    assert distance() < far


@pytest.mark.parametrize("tangent", TANGENTS[1:])
def test_differences_agree_with_the_exact_tangent(tangent):
    net = MLP()
    _, x, s = batch()
    flow, weight = torch.randn_like(x), (s.cos() * s.sin())[:, None]
    F, exact = exact_tangent(trigflow(net), x, s, flow, weight)
    same, found = tangent(trigflow(net), x, s, flow, weight)
    torch.testing.assert_close(same, F)
    # A one-sided difference is off by half its step, 1e-4, times a second derivative.
    error = (found - exact).norm() / exact.norm()
    assert 1e-8 < error < 1e-3


@pytest.mark.parametrize(
    ("tangent", "dtype", "least", "greatest"),
    [
        (exact_tangent, torch.bfloat16, 0, 0.01),
        (finite_difference_tangent, torch.float32, 0, 0.01),
        (semi_continuous_tangent, torch.float32, 0, 0.01),
        (finite_difference_tangent, torch.bfloat16, 0.1, math.inf),
        (semi_continuous_tangent, torch.bfloat16, 0.1, math.inf),
    ],
)
def test_differences_need_a_float32_network(tangent, dtype, least, greatest):
    rounded, net = Pointwise(2, dtype), Pointwise(2)
    net.load_state_dict(rounded.state_dict())
    _, x, s = batch(64)
    flow, weight = torch.randn_like(x), (s.cos() * s.sin())[:, None]
    with torch.no_grad():
        _, exact = exact_tangent(trigflow(net), x, s, flow, weight)
        _, found = tangent(trigflow(rounded), x, s, flow, weight)
    assert least <= (found - exact).norm() / exact.norm() < greatest


def test_the_semi_continuous_tangent_is_exact_in_the_latents():
    def steady(x, s):  # no partial derivative in time, and curved in x
        return x**3

    _, x, s = batch()
    flow, weight = torch.ones_like(x), torch.ones(len(x), 1)
    _, found = semi_continuous_tangent(steady, x, s, flow, weight)
    torch.testing.assert_close(found, 3 * x**2)


@pytest.mark.parametrize("tangent", TANGENTS)
def test_tangents_leave_no_graph_behind(tangent):
    student = MLP()
    x0, noise, s = batch()
    found = scm(student, MLP(1), x0, noise, s, tangent=tangent)
    assert found.loss.requires_grad
    assert not found.norm.requires_grad and not found.per_sample.requires_grad


def test_dmd_gradient_is_the_weighted_difference_of_the_estimates():
    fake, teacher = MLP(0), MLP(1)
    x0, noise, s = batch()
    x0.requires_grad_()
    with torch.no_grad():
        x_s = s.cos()[:, None] * x0 + s.sin()[:, None] * noise
        estimates = [
            s.cos()[:, None] * x_s - s.sin()[:, None] * F_by_the_book(net, x_s, s)
            for net in (fake, teacher)
        ]
        weight = (x0 - estimates[1]).abs().mean(1, keepdim=True)
        expected = 2 * 3.0 * (estimates[0] - estimates[1]) / weight / len(s)
    found = dmd(x0, fake, teacher, noise, s, loss_scale=3.0)
    (gradient,) = torch.autograd.grad(found.loss, x0)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(found.norm, (estimates[0] - estimates[1]).norm(dim=1))


def test_dmd_moves_samples_from_the_fake_to_the_real_distribution():
    def flow_of(mean):
        return lambda x, t: gaussian_flow(x + (1 - t)[:, None] * (MEAN - mean), t) + MEAN - mean

    fake, real = torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 0.0])
    x0 = (fake + STD * torch.randn(64, 2)).requires_grad_()
    noise, s = torch.randn(64, 2), torch.full((64,), 0.9)
    found = dmd(x0, flow_of(fake), flow_of(real), noise, s)
    (gradient,) = torch.autograd.grad(found.loss, x0)
    # Two Gaussians of one width: every sample is moved along the difference of the means.
    torch.testing.assert_close(
        nn.functional.normalize(-gradient),
        nn.functional.normalize(real - fake, dim=0).expand(64, 2),
    )
    same = dmd(x0, flow_of(real), flow_of(real), noise, s)
    assert torch.autograd.grad(same.loss, x0)[0].abs().max() == 0


def test_dmd_with_a_sample_at_its_own_estimate_divides_by_the_least_weight():
    x0, noise, s = batch()
    x0.requires_grad_()
    found = dmd(x0, lambda x, t: noise - x0 + 1e-7, lambda x, t: noise - x0, noise, s)
    (gradient,) = torch.autograd.grad(found.loss, x0)
    x0_error = -1e-7 * s.sin() / (s.cos() + s.sin())
    expected = (2 / len(s) * x0_error / 1e-5)[:, None].expand(-1, 2)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def test_fake_score_is_the_error_of_the_estimate_over_the_squared_sine():
    fake = MLP()
    x0, noise, s = batch()
    x_s = s.cos()[:, None] * x0 + s.sin()[:, None] * noise
    expected = ((x0 - denoise(fake, x_s, s)) ** 2).sum(1) / s.sin() ** 2
    found = fake_score(fake, x0, noise, s)
    torch.testing.assert_close(found.per_sample, expected.detach())
    torch.testing.assert_close(found.loss, expected.mean())


@pytest.mark.parametrize("angle", [0.3, 1.2])
def test_the_best_fake_score_is_the_posterior_mean(angle):
    # Samples whose moments are exactly those of x0 ~ N(MEAN, STD^2) and noise ~ N(0, 1), so
    # that the best linear estimate is the posterior mean without an error of sampling.
    z = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / 256)).T
    x0, noise, s = MEAN + STD * z[:, :2], z[:, 2:], torch.full((256,), angle)
    linear = nn.Linear(2, 2)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=100, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = fake_score(lambda x, t: linear(x), x0, noise, s).loss
        value.backward()
        return value

    optimizer.step(loss)
    x_s = torch.randn(5, 2)
    cos, sin = math.cos(angle), math.sin(angle)
    gain = cos * STD**2 / (cos**2 * STD**2 + sin**2)
    found = denoise(lambda x, t: linear(x), x_s, s[:5])
    torch.testing.assert_close(found, MEAN + gain * (x_s - cos * MEAN), rtol=1e-6, atol=1e-6)


def broken(network, rows, value=math.nan):
    """`network` with `value` in the outputs of some samples."""

    def velocity(x, t):
        wrong = torch.zeros(len(x), 1, dtype=torch.bool)
        wrong[rows] = True
        return network(x, t).masked_fill(wrong, value)

    return velocity


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scm_skips_a_broken_sample_and_leaves_the_others_as_they_are(value):
    student, teacher = MLP(0), MLP(1)
    x0, noise, s = batch()
    whole = scm(student, teacher, x0, noise, s)
    found = scm(student, broken(teacher, [2], value), x0, noise, s)
    others = torch.tensor([0, 1, 3, 4])
    assert found.skipped.tolist() == [False, False, True, False, False]
    assert found.per_sample[2] == 0 and found.norm[2] == 0
    torch.testing.assert_close(found.per_sample[others], whole.per_sample[others])
    few = scm(student, teacher, x0[others], noise[others], s[others])
    for mine, theirs in zip(
        gradients(found.loss, student), gradients(few.loss * 4 / 5, student), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_broken_latents_do_not_reach_the_parameters():
    student = MLP()
    x0, noise, s = batch()
    x0[1, 0] = math.nan
    found = scm(student, MLP(1), x0, noise, s)
    assert found.skipped.tolist() == [False, True, False, False, False]
    assert all(grad.isfinite().all() for grad in gradients(found.loss, student))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_broken_element_is_enough_to_skip_a_sample(value):
    def tangent(student, x_s, s, flow, weight):
        F, F_tangent = exact_tangent(student, x_s, s, flow, weight)
        F_tangent[3, 1] = value
        return F, F_tangent

    x0, noise, s = batch()
    found = scm(MLP(0), MLP(1), x0, noise, s, tangent=tangent)
    assert found.skipped.tolist() == [False, False, False, True, False]
    assert found.loss.isfinite()


def test_dmd_skips_what_the_student_broke():
    x0, noise, s = batch()
    x0[1, 0] = math.inf
    x0.requires_grad_()
    found = dmd(x0, MLP(0), MLP(1), noise, s)
    (gradient,) = torch.autograd.grad(found.loss, x0)
    assert found.skipped.tolist() == [False, True, False, False, False]
    assert found.loss > 0 and gradient.isfinite().all() and (gradient[1] == 0).all()


def test_dmd_skips_a_broken_sample_and_leaves_the_others_as_they_are():
    fake, teacher = MLP(0), MLP(1)
    x0, noise, s = batch()
    x0.requires_grad_()
    found = dmd(x0, fake, broken(teacher, [0]), noise, s)
    whole = dmd(x0, fake, teacher, noise, s)
    gradient, expected = (torch.autograd.grad(each.loss, x0)[0] for each in (found, whole))
    assert found.skipped.tolist() == [True, False, False, False, False]
    assert gradient[0].abs().max() == 0 and found.per_sample[0] == 0 and found.norm[0] == 0
    torch.testing.assert_close(gradient[1:], expected[1:])


def test_where_all_samples_are_broken_the_loss_is_zero_and_says_so():
    student = MLP()
    x0, noise, s = batch()
    nothing = broken(MLP(1), slice(None))
    found = scm(student, nothing, x0, noise, s)
    assert found.loss == 0 and found.skipped.all()
    assert all((grad == 0).all() for grad in gradients(found.loss, student))
    x0.requires_grad_()
    found = dmd(x0, student, nothing, noise, s)
    assert found.loss == 0 and found.skipped.all()
    assert (torch.autograd.grad(found.loss, x0)[0] == 0).all()


LOSSES = {
    "white box": lambda net, x0, noise, s, mask: white_box(net, teach, x0, noise, s / 2, mask),
    "black box": lambda net, x0, noise, s, mask: black_box(net, x0, noise, s / 2, mask),
    "sCM": lambda net, x0, noise, s, mask: scm(net, teach, x0, noise, s, mask=mask),
    "dCM": lambda net, x0, noise, s, mask: dcm(net, teach, x0, noise, s / 2, s / 3, mask),
    "DMD": lambda net, x0, noise, s, mask: dmd(net(x0, s), teach, zero, noise, s, mask=mask),
    "fake score": lambda net, x0, noise, s, mask: fake_score(net, x0, noise, s, mask),
}


def teach(x, t):
    return 0.3 * x.sin()


def zero(x, t):
    return torch.zeros_like(x)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_frames_do_not_count(name):
    # The second sample has its first frame given: whatever is there, the loss is that of the
    # other three frames alone.
    loss, net = LOSSES[name], Pointwise(3)
    x0, noise, s, mask = video()
    found = loss(net, x0, noise, s, mask)
    first = loss(net, x0[:1], noise[:1], s[:1], None)
    second = loss(net, x0[1:, :, 1:], noise[1:, :, 1:], s[1:], None)
    torch.testing.assert_close(found.per_sample, torch.cat([first.per_sample, second.per_sample]))
    if name in ("sCM", "DMD"):
        torch.testing.assert_close(found.norm, torch.cat([first.norm, second.norm]))
    expected = gradients((first.loss + second.loss) / 2, net)
    for mine, theirs in zip(gradients(found.loss, net), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    x0[1, :, 0] = 1e9
    assert loss(net, x0, noise, s, mask).loss == found.loss


@pytest.mark.parametrize("name", LOSSES)
def test_masked_frames_get_no_gradient(name):
    outputs = []

    def watched(x, t):
        if torch.is_grad_enabled():
            outputs.append(net(x, t).requires_grad_())
            outputs[-1].retain_grad()
            return outputs[-1]
        return net(x, t)

    net = Pointwise(3)
    x0, noise, s, mask = video()
    LOSSES[name](watched, x0, noise, s, mask).loss.backward()
    (v,) = outputs
    assert (v.grad[1, :, 0] == 0).all()
    assert (v.grad[0] != 0).all() and (v.grad[1, :, 1:] != 0).all()


def test_a_masked_frame_has_no_tangent_direction():
    seen = []

    def tangent(student, x_s, s, flow, weight):
        seen.append(flow)
        return exact_tangent(student, x_s, s, flow, weight)

    x0, noise, s, mask = video()
    scm(Pointwise(3), teach, x0, noise, s, tangent=tangent, mask=mask)
    (flow,) = seen
    assert (flow[1, :, 0] == 0).all() and (flow[1, :, 1:] != 0).all()


def test_a_mask_may_be_boolean():
    x0, noise, s, mask = video()
    net = Pointwise(3)
    for loss in LOSSES.values():
        torch.testing.assert_close(
            loss(net, x0, noise, s, mask.bool()), loss(net, x0, noise, s, mask)
        )


@pytest.mark.parametrize("name", LOSSES)
def test_a_bfloat16_network_is_trained_near_its_float64_self(name):
    x0, noise, s, mask = video()
    x0, noise = x0.float(), noise.float()
    half, whole = Pointwise(3, torch.bfloat16), Pointwise(3)
    whole.load_state_dict(half.state_dict())
    found, expected = (LOSSES[name](net, x0, noise, s, mask) for net in (half, whole))
    assert found.per_sample.dtype == torch.float64
    torch.testing.assert_close(found.per_sample, expected.per_sample, rtol=0.05, atol=0)
    for mine, theirs in zip(
        gradients(found.loss, half), gradients(expected.loss, whole), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() < 0.05 * theirs.norm()


def test_white_box_by_hand():
    x0, noise, t = torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([0.25, 0.5])
    found = white_box(lambda x, t: 3 * x, lambda x, t: x, x0, noise, t)
    torch.testing.assert_close(found.per_sample, torch.tensor([(2 * 0.75) ** 2, 1.0]))
    assert found.loss == found.per_sample.mean()


def test_black_box_by_hand():
    x0, noise, t = torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([0.25, 0.5])
    found = black_box(lambda x, t: x, x0, noise, t)
    torch.testing.assert_close(found.per_sample, torch.tensor([1.75**2, 1.5**2]))


def test_discrete_consistency_by_hand():
    # At t = 0.8 between x0 = 1 and noise = 0: x = 0.2. Teacher's velocity -1, so x' = 0.5 at
    # t' = 0.5. Student's velocity 2 x: 0.2 - 0.8 * 0.4 = -0.12 against 0.5 - 0.5 * 1 = 0.
    x0, noise = torch.ones(1, 2), torch.zeros(1, 2)
    weight = torch.tensor(2.0, requires_grad=True)

    def student(x, t):
        return weight * x

    def teacher(x, t):
        return -torch.ones_like(x)

    t, t_next = torch.tensor([0.8]), torch.tensor([0.5])
    found = dcm(student, teacher, x0, noise, t, t_next)
    torch.testing.assert_close(found.per_sample, torch.tensor([0.12**2]))
    # The target has no gradient: d/dweight (0.2 - 0.16 weight)^2 = 2 * -0.12 * -0.16.
    (gradient,) = torch.autograd.grad(found.loss, weight)
    torch.testing.assert_close(gradient, torch.tensor(2 * 0.12 * 0.16))


def test_discrete_consistency_ends_in_the_data():
    x0, noise, t = torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([0.2])
    # Its last interval: the teacher's step to t = 0 is the target, whatever the student says.
    found = dcm(lambda x, t: x * 0 + 7.0, lambda x, t: noise - x0, x0, noise, t, t * 0)
    torch.testing.assert_close(found.per_sample, torch.tensor([(0.8 - 0.2 * 7 - 1) ** 2]))


def test_a_consistency_function_has_no_discrete_loss_but_the_teachers_step():
    x0, noise, _ = batch()

    def loss(step):
        t = torch.full((5,), 0.6)
        return dcm(exact_consistency, gaussian_flow, x0, noise, t, t - step).loss

    # Euler's error is of second order, and squared here.
    assert loss(0.01) / loss(0.005) == pytest.approx(16, rel=0.1)


def test_roll_out_has_the_last_steps_gradient_alone():
    net = MLP()
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    times = (1.0, 0.9, 0.6, 0.0)

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    with torch.no_grad():
        x = noise
        draws = generators()
        for t, t_next in ((1.0, 0.9), (0.9, 0.6)):
            fresh = torch.stack([torch.randn(2, generator=g, dtype=torch.float32) for g in draws])
            x = (1 - t_next) * (x - t * net(x, torch.full((3,), t))) + t_next * fresh
    last = x - 0.6 * net(x, torch.full((3,), 0.6))
    found = rollout(net, noise, times, generators(), with_gradient=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, last.float())
    for mine, theirs in zip(
        gradients(found.square().sum(), net), gradients(last.square().sum(), net), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert not rollout(net, noise, times, generators(), with_gradient=False).requires_grad


def test_one_time_a_sample():
    x0, noise, s = batch()
    with pytest.raises(ValueError, match=r"got shape \(5, 1\), expected \(5,\)"):
        scm(MLP(), MLP(), x0, noise, s[:, None])
    with pytest.raises(ValueError, match=r"got shape \(1,\), expected \(5,\)"):
        white_box(MLP(), MLP(), x0, noise, s[:1])


def test_warm_up_out_of_its_range():
    x0, noise, s = batch()
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 1.5"):
        scm(MLP(), MLP(), x0, noise, s, warmup=1.5)


def test_times_given_to_a_network_are_those_of_the_angles():
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    _, x, s = batch()
    denoise(network, x, s)
    torch.testing.assert_close(seen[0], time_of_angle(s))
