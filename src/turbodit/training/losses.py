"""What training minimises: SLA's fine-tuning, sCM, DMD and their fall-backs, as pure functions.

A network is a callable (latents (B, C, ...), t (B,)) -> rectified-flow velocity noise - x0 at
(1 - t) x0 + t noise. Text, guidance, the clean frames of image-to-video and the dtype of the
weights are put into it by a closure. State and arithmetic here are float64; the closure casts.

rCM (arXiv:2510.08431) works in TrigFlow, whose time is an angle s in [0, pi/2]:
x_s = cos(s) x0 + sin(s) noise, and F(x_s, s) = dx_s/ds is its velocity. Everything that knows of
angles is in this file and in `times.py`. Symbols are those of the papers: F, g, x_s, s.

Shapes: latents (B, C, ...) of any number of dimensions; t, s (B,) float64. A mask is 1 (or True)
where latents are generated and learned, 0 where they are given, and broadcasts to the latents;
each sample has at least one element to learn. What is masked has no loss and no tangent, and
does not count in norms and means. Losses are means over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch.autograd import forward_ad

from turbodit.sampling import few_step
from turbodit.training.times import time_of_angle

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (latents, t) -> velocity
TrigFlow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_s, s) -> F
FINITE_STEP = 1e-4  # of finite differences, in radians (rCM)
LEAST_WEIGHT = 1e-5  # of DMD's normaliser


class Loss(NamedTuple):
    """`loss`: scalar, with gradient. `per_sample`: its terms (B,), detached."""

    loss: torch.Tensor
    per_sample: torch.Tensor


class DirectedLoss(NamedTuple):
    """A loss whose gradient is a given direction, which some samples may not have.

    Attributes:
        loss: scalar, with gradient; skipped samples count as zero in the mean.
        per_sample: its terms (B,), detached.
        norm: length of the direction before it is normalised (B,), detached; 0 where skipped.
        skipped: bool (B,), samples whose direction is NaN or infinite.
    """

    loss: torch.Tensor
    per_sample: torch.Tensor
    norm: torch.Tensor
    skipped: torch.Tensor


def trigflow(network: Network) -> TrigFlow:
    """F(x_s, s), TrigFlow's velocity, of a rectified-flow network.

    x_s / (cos s + sin s) is the rectified-flow state at t = sin s / (cos s + sin s). From
    x0 = (x_s - sin(s) v) / (cos s + sin s) and F = (cos(s) x_s - x0) / sin(s) the sine cancels:
    F = ((cos s - sin s) x_s + v) / (cos s + sin s), which is exact at s = 0, too.
    """

    def velocity(x_s: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        cos, sin = _cos_sin(s, x_s)
        c_in = 1 / (cos + sin)
        v = network(c_in * x_s, time_of_angle(s))
        return c_in * ((cos - sin) * x_s + v)

    return velocity


def denoise(network: Network, x_s: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Clean estimate cos(s) x_s - sin(s) F(x_s, s), the shape of x_s, float64."""
    x_s = x_s.double()
    cos, sin = _cos_sin(s, x_s)
    return cos * x_s - sin * trigflow(network)(x_s, s)


# SLA fine-tuning (arXiv:2509.24006; TurboDiffusion, arXiv:2512.16093)


def white_box(
    student: Network,
    teacher: Network,
    x0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> Loss:
    """mean ||v_student - v_teacher||^2 at x_t, the mean over the elements of a sample.

    Raises:
        ValueError: t is not (B,).
    """
    x_t = _interpolate(x0, noise, t)
    with torch.no_grad():
        v_teacher = teacher(x_t, t)
    return _mean_square(student(x_t, t).double() - v_teacher, mask)


def black_box(
    student: Network,
    x0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> Loss:
    """mean ||v_student - (noise - x0)||^2 at x_t: the diffusion loss, without a teacher.

    Raises:
        ValueError: t is not (B,).
    """
    velocity = noise.double() - x0
    return _mean_square(student(_interpolate(x0, noise, t), t) - velocity, mask)


# Consistency: continuous time (sCM, arXiv:2410.11081) and its fall-backs


class Tangent(Protocol):
    """How dF/ds along the flow is found."""

    def __call__(
        self,
        student: TrigFlow,
        x_s: torch.Tensor,
        s: torch.Tensor,
        flow: torch.Tensor,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """F and weight * dF/ds at (x_s, s), without gradient.

        Args:
            flow: dx_s/ds, the shape of x_s.
            weight: (B, 1, ...). A product of derivatives takes it into its inputs, where it
                keeps them small (sCM, section 5.1).
        """


def exact_tangent(
    student: TrigFlow,
    x_s: torch.Tensor,
    s: torch.Tensor,
    flow: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Tangent` by one Jacobian-vector product in forward mode: every layer needs its rule."""
    primals, tangents = (x_s, s), (weight * flow, weight.reshape(s.shape))
    return _jvp(student, primals, tangents)


def finite_difference_tangent(
    student: TrigFlow,
    x_s: torch.Tensor,
    s: torch.Tensor,
    flow: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Tangent` from a second pass one small step back along the flow, in x_s and s at once.

    Its error is the network's rounding over the step plus half the step times d2F/ds2. It needs a
    float32 network: in bfloat16 the rounding is as large as the difference.
    """
    F = student(x_s, s)
    before = student(x_s - FINITE_STEP * flow, s - FINITE_STEP)
    return F, weight * (F - before) / FINITE_STEP


def semi_continuous_tangent(
    student: TrigFlow,
    x_s: torch.Tensor,
    s: torch.Tensor,
    flow: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Tangent` with a finite difference in time alone.

    dF/ds = (dF/dx_s) flow + partial dF/ds. The first term is an exact Jacobian-vector product;
    the second, in which sines of high frequency amplify errors (sCM, section 4.1), is a difference.
    The network must be float32, as in `finite_difference_tangent`.
    """
    F, F_tangent = _jvp(lambda x: student(x, s), (x_s,), (weight * flow,))
    before = student(x_s, s - FINITE_STEP)
    return F, F_tangent + weight * (F - before) / FINITE_STEP


def scm(
    student: Network,
    teacher: Network,
    x0: torch.Tensor,
    noise: torch.Tensor,
    s: torch.Tensor,
    *,
    warmup: float = 1.0,
    tangent: Tangent = exact_tangent,
    loss_scale: float = 100.0,
    mask: torch.Tensor | None = None,
) -> DirectedLoss:
    """Continuous-time consistency distillation (sCM, algorithm 1; rCM).

    With F^- the student without gradient, F_T the teacher (guidance included) and r the warm-up,

        g = -cos s sqrt(1 - r^2 sin^2 s) (F^- - F_T) - r cos s sin s (x_s + dF/ds),

    which at r = 1 is cos s times the derivative along the teacher's flow of the student's clean
    estimate: zero for a consistency function. At r = 0 the student learns F_T. The loss of
    a sample is loss_scale * sum (F - F^- - g / (||g|| + 0.1))^2: its value says nothing, its
    gradient is -2 loss_scale g / (||g|| + 0.1).

    A sample whose g is not finite is skipped; in the pass with gradient it is zeros, so that a
    broken input or teacher cannot reach the parameters. What breaks the student's own pass at
    zeros is not caught here: the gradient's norm tells.

    Args:
        x0, noise: (B, C, ...), any float dtype.
        s: angles in (0, pi/2).
        warmup: r in [0, 1].

    Raises:
        ValueError: s is not (B,), or the warm-up is not in [0, 1].
    """
    if not 0 <= warmup <= 1:
        raise ValueError(f"the tangent warm-up must be in [0, 1], got {warmup}")
    F_theta = trigflow(student)
    with torch.no_grad():
        x_s = _add_noise(x0, noise, s)
        cos, sin = _cos_sin(s, x_s)
        F_teacher = trigflow(teacher)(x_s, s)
        F, F_tangent = tangent(F_theta, x_s, s, _masked(F_teacher, mask), cos * sin)
        g = -cos * (1 - (warmup * sin).square()).sqrt() * (F - F_teacher)
        g = _masked(g - warmup * (cos * sin * x_s + F_tangent), mask)
        g, skipped = _skip_broken(g)
        norm = _norm(g)
        g = g / (_column(norm, g) + 0.1)
        x_s = x_s.masked_fill(_column(skipped, x_s), 0)
    F = F_theta(x_s, s)
    error = F - F.detach() - g
    per_sample = loss_scale * error.square().flatten(1).sum(1)
    return DirectedLoss(per_sample.mean(), per_sample.detach(), norm, skipped)


def dcm(
    student: Network,
    teacher: Network,
    x0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    t_next: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> Loss:
    """Discrete-time consistency distillation (arXiv:2303.01469), needs no derivative.

    The teacher takes one Euler step from x at t to x' at t_next; the student's clean estimate
    x - t v is drawn to its own at x', without gradient there: mean of the squared difference.
    Where t_next = 0 the target is x' itself.

    Args:
        t, t_next: ends of intervals, t > t_next (`times.Intervals`).

    Raises:
        ValueError: t or t_next is not (B,).
    """
    x_t = _interpolate(x0, noise, t)
    time, time_next = _column(t, x_t), _column(t_next, x_t)
    with torch.no_grad():
        x_next = x_t - (time - time_next) * teacher(x_t, t)
        target = x_next - time_next * student(x_next, t_next)
    return _mean_square(x_t - time * student(x_t, t) - target, mask)


# Distribution matching (DMD2, arXiv:2405.14867; rCM)


def rollout(
    student: Network,
    noise: torch.Tensor,
    times: Sequence[float],
    generators: Sequence[torch.Generator],
    *,
    with_gradient: bool,
) -> torch.Tensor:
    """Clean latents (B, C, ...) float32 from pure noise, as the few-step sampler makes them.

    The times are those of `sampling.few_step`, which is what runs: one list for the whole batch.
    Only the last step has a gradient, and only if asked for.

    Args:
        times: `times.random_rollout_times` or `noise_schedule.few_step_times`.
        generators: one a sample, for the fresh noise between steps.
    """
    last = times[-2]

    def velocity(latents: torch.Tensor, t: float) -> torch.Tensor:
        with torch.set_grad_enabled(with_gradient and t == last):
            return student(latents, latents.new_full((len(latents),), t))

    return few_step(velocity, noise, times, generators=generators)


def dmd(
    x0: torch.Tensor,
    fake: Network,
    teacher: Network,
    noise: torch.Tensor,
    s: torch.Tensor,
    *,
    loss_scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> DirectedLoss:
    """Draws the student's samples from the distribution they have to the teacher's.

    At x_s = cos(s) x0 + sin(s) noise both networks estimate clean latents. The direction is
    (fake - real) / w, w = mean |x0 - real| of the sample and at least 1e-5; the loss of a sample is
    loss_scale * sum (x0 - (x0 - direction)^-)^2, whose gradient is 2 loss_scale direction. `norm`
    is that of fake - real.

    A sample whose direction is not finite is skipped. If it is so because the student's own
    pass was not finite, the gradient of its parameters is lost all the same.

    Args:
        x0: student's samples, of `rollout` with gradient.
        fake: velocity of the student's distribution (`fake_score`).
        teacher: guidance included.

    Raises:
        ValueError: s is not (B,).
    """
    with torch.no_grad():
        x_s = _add_noise(x0, noise, s)
        real = denoise(teacher, x_s, s)
        difference = _masked(denoise(fake, x_s, s) - real, mask)
        weight = _sample_mean((x0 - real).abs(), mask).clamp(min=LEAST_WEIGHT)
        direction, skipped = _skip_broken(difference / _column(weight, difference))
        norm = _norm(difference).masked_fill(skipped, 0)
        target = x0.double() - direction
    # A skipped sample is left out before it meets its target, which need not be finite.
    error = (x0.double() - target).masked_fill(_column(skipped, target), 0)
    per_sample = loss_scale * error.square().flatten(1).sum(1)
    return DirectedLoss(per_sample.mean(), per_sample.detach(), norm, skipped)


def fake_score(
    fake: Network,
    x0: torch.Tensor,
    noise: torch.Tensor,
    s: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> Loss:
    """The diffusion loss on the student's samples: sum ||x0 - fake's estimate||^2 / sin^2 s.

    Written without the division: x0 = cos(s) x_s - sin(s) (cos(s) noise - sin(s) x0), so the
    error of the estimate over sin s is that of F against cos(s) noise - sin(s) x0.

    Args:
        x0: student's samples, of `rollout` without gradient.

    Raises:
        ValueError: s is not (B,).
    """
    cos, sin = _cos_sin(s, x0)
    F = trigflow(fake)(_add_noise(x0, noise, s), s)
    error = _masked(F - (cos * noise - sin * x0), mask)
    per_sample = error.square().flatten(1).sum(1)
    return Loss(per_sample.mean(), per_sample.detach())


def _jvp(
    function: Callable[..., torch.Tensor],
    primals: tuple[torch.Tensor, ...],
    tangents: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The function's value and its derivative along the tangents, in forward mode.

    By dual tensors and not by torch.func.jvp: what shards a network on several devices (FSDP)
    looks at the storage of its tensors, and those of torch.func have none.
    """
    with forward_ad.dual_level():
        pairs = zip(primals, tangents, strict=True)
        out = function(*(forward_ad.make_dual(x, tangent) for x, tangent in pairs))
        primal, tangent = forward_ad.unpack_dual(out)
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ...), as many dimensions as `like` (B, C, ...)."""
    if values.shape != like.shape[:1]:
        raise ValueError(
            f"one value a sample: got shape {tuple(values.shape)}, expected ({len(like)},) "
            f"for latents {tuple(like.shape)}"
        )
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _cos_sin(s: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    column = _column(s, like)
    return column.cos(), column.sin()


def _add_noise(x0: torch.Tensor, noise: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    cos, sin = _cos_sin(s, x0)
    return cos * x0.double() + sin * noise.double()


def _interpolate(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    time = _column(t, x0)
    return (1 - time) * x0.double() + time * noise.double()


def _masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x with zeros where the mask is 0, whatever was there."""
    return x if mask is None else x.masked_fill(mask == 0, 0)


def _sample_mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, C, ...) -> (B,): mean over what the mask leaves of each sample."""
    kept = torch.ones_like(x) if mask is None else (mask != 0).expand_as(x).to(x.dtype)
    return _masked(x, mask).flatten(1).sum(1) / kept.flatten(1).sum(1)


def _mean_square(error: torch.Tensor, mask: torch.Tensor | None) -> Loss:
    per_sample = _sample_mean(error.square(), mask)
    return Loss(per_sample.mean(), per_sample.detach())


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _skip_broken(direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros in place of samples that are not finite everywhere, and which these are (B,)."""
    skipped = ~direction.isfinite().flatten(1).all(1)
    return direction.masked_fill(_column(skipped, direction), 0), skipped
