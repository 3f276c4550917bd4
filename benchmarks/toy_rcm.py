"""Distils a flow on a ring of Gaussians in the plane: what sCM, DMD and rCM do, in a picture.

    python benchmarks/toy_rcm.py --picture docs/toy-rcm.png

A small network learns the ring by flow matching (the teacher). Three students start from it
and are trained with the losses of `turbodit.training`: sCM alone, DMD alone, both (rCM). Each then
samples in 1, 2 and 4 steps. For each: the energy distance to the ring (0 for equal
distributions; "exact samples" shows what chance alone makes of it), the share of samples
within three standard deviations of a Gaussian's centre, and the least and greatest
share that one of the Gaussians gets, times their number (1 is right, 0 is a lost mode).

Writes `<out>/<date>-cpu-toy-rcm.json`, the picture, and prints a table in markdown.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from turbodit.benchmark.draw import INK, PAPER
from turbodit.benchmark.report import count, environment, table
from turbodit.noise_schedule import few_step_times, shift_time
from turbodit.sampling import few_step
from turbodit.training.losses import Network, black_box, dmd, fake_score, rollout, scm
from turbodit.training.times import (
    LogNormal,
    UniformShifted,
    random_rollout_times,
    time_of_angle,
)

Method = Literal["rCM", "sCM", "DMD"]
STEPS = (1, 2, 4)
TEACHER_STEPS = 100
SIGMA_MAX = 80.0
TITLE_HEIGHT, MARGIN, PANEL, VIEW = 34, 16, 200, 2.2  # pixels; VIEW: half a panel's width


@dataclass(frozen=True)
class Options:
    """Settings of one run."""

    out: Path = Path("benchmarks/results")
    picture: Path | None = None
    teacher_iterations: int = 4000
    updates: int = 3000  # of each student
    warmup: int = 500  # updates of sCM before its tangent is whole and, in rCM, DMD begins
    fake_updates: int = 4  # of the fake score after each update by DMD
    batch: int = 512
    teacher_lr: float = 2e-3
    lr: float = 1e-3  # of student and fake score
    samples: int = 8192
    seed: int = 0


@dataclass(frozen=True)
class Mixture:
    """Gaussians of equal weight and `std` around `means` (K, 2), whose flow is known."""

    means: torch.Tensor
    std: float

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count, 2) in the dtype of the means."""
        of = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, 2, generator=generator, dtype=self.means.dtype)
        return self.means[of] + self.std * noise

    def velocity(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """E[noise - x0 | (1-t) x0 + t noise = x] for x (B, 2), t (B,): the exact network.

        Given the Gaussian k, x is normal around a m_k (a = 1 - t) with variance
        a^2 std^2 + t^2, and x0 - m_k and noise are its shares a std^2 and t of x - a m_k.
        """
        t = t[:, None, None]
        a = 1 - t
        variance = a**2 * self.std**2 + t**2
        off = x[:, None] - a * self.means  # (B, K, 2)
        share = (-0.5 * off.square().sum(-1, keepdim=True) / variance).softmax(1)
        each = (t - a * self.std**2) / variance * off - self.means
        return (share * each).sum(1)

    def measure(self, samples: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
        """Samples (N, 2) against others of the mixture itself."""
        distance, nearest = torch.cdist(samples, self.means.to(samples.dtype)).min(1)
        shares = nearest.bincount(minlength=len(self.means)) / len(samples) * len(self.means)
        return {
            "energy_distance": round(energy_distance(samples, target), 5),
            "on_a_mode": round((distance < 3 * self.std).double().mean().item(), 4),
            "least_share": round(shares.min().item(), 3),
            "greatest_share": round(shares.max().item(), 3),
        }


def ring(modes: int = 8, radius: float = math.sqrt(2), std: float = 0.15) -> Mixture:
    """Gaussians on a circle; about unit variance in each direction."""
    turn = torch.arange(modes, dtype=torch.float64) * 2 * math.pi / modes
    return Mixture(radius * torch.stack([turn.cos(), turn.sin()], dim=1), std)


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of samples (N, 2), (M, 2), without a bias."""

    def within(z: torch.Tensor) -> torch.Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return (2 * torch.cdist(x, y).mean() - within(x) - within(y)).item()


class MLP(nn.Module):
    """Velocity (B, 2) float32 of x (B, 2) and t (B,). Smooth, as derivatives are taken."""

    def __init__(self, width: int = 128, frequencies: int = 8) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(frequencies) * math.pi)
        self.layers = nn.Sequential(
            nn.Linear(2 + frequencies, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        waves = (t[:, None] * self.frequencies).cos()
        return self.layers(torch.cat([x, waves], dim=1).float())


def train_teacher(data: Mixture, options: Options) -> MLP:
    """Flow matching."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = MLP()
    optimizer = torch.optim.Adam(model.parameters())
    for i in range(options.teacher_iterations):
        x0 = data.sample(options.batch, generator)
        t = time_of_angle(UniformShifted(1.0).sample(options.batch, generator))
        optimizer.zero_grad()
        black_box(model, x0, _noise(options, generator), t).loss.backward()
        _step(optimizer, options.teacher_lr * (1 - i / options.teacher_iterations))
    return model.requires_grad_(False)


def distil(teacher: MLP, data: Mixture, method: Method, options: Options) -> MLP:
    """A student of the teacher. sCM sees samples of the mixture, DMD noise alone."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    student, fake = (copy.deepcopy(teacher).requires_grad_() for _ in range(2))
    optimizers = [torch.optim.Adam(model.parameters()) for model in (student, fake)]
    p_G, p_D = LogNormal(0.0, 1.6), UniformShifted(5.0)
    for i in range(options.updates):
        optimizer, fake_optimizer = optimizers
        lr = options.lr * (1 - i / options.updates)
        consistency = method != "DMD"
        matching = method == "DMD" or (method == "rCM" and i >= options.warmup)
        optimizer.zero_grad()
        if consistency:
            x0, noise = data.sample(options.batch, generator), _noise(options, generator)
            s, r = p_G.sample(options.batch, generator), min(1.0, i / options.warmup)
            scm(student, teacher, x0, noise, s, warmup=r).loss.backward()
        if matching:
            x0 = _rollout(student, i, p_D, options, generator, with_gradient=True)
            noise, s = _noise(options, generator), p_D.sample(options.batch, generator)
            dmd(x0, fake, teacher, noise, s).loss.backward()
        _step(optimizer, lr)
        for j in range(options.fake_updates if matching else 0):
            fake_optimizer.zero_grad()
            x0 = _rollout(student, i + j, p_D, options, generator, with_gradient=False)
            noise, s = _noise(options, generator), p_D.sample(options.batch, generator)
            fake_score(fake, x0, noise, s).loss.backward()
            _step(fake_optimizer, lr)
    return student


def _rollout(
    student: MLP,
    turn: int,
    p_D: UniformShifted,
    options: Options,
    generator: torch.Generator,
    *,
    with_gradient: bool,
) -> torch.Tensor:
    """(batch, 2), of 1 to 4 steps in turns."""
    times = random_rollout_times(1 + turn % 4, p_D, generator)
    noise = _noise(options, generator)[None]
    student_of_one = _as_one_sample(student)
    return rollout(student_of_one, noise, times, [generator], with_gradient=with_gradient)[0]


@torch.no_grad()
def samples_of(model: Network, steps: int, options: Options, ode: bool = False) -> torch.Tensor:
    """(samples, 2) in few steps, or along the flow in many."""
    generator = torch.Generator().manual_seed(options.seed + 2)
    times: Sequence[float] = [
        shift_time(1 - i / steps, 3.0) * SIGMA_MAX / (1 + SIGMA_MAX) for i in range(steps + 1)
    ]
    if not ode:
        times = few_step_times(steps, SIGMA_MAX)
    noise = torch.randn(1, options.samples, 2, generator=generator)
    network = _as_one_sample(model)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return network(x, x.new_full((1,), t))

    return few_step(velocity, noise, times, generators=[generator], ode=ode)[0]


def _as_one_sample(model: Network) -> Network:
    """All points as one sample of a sampler that draws each sample's noise by itself."""
    return lambda x, t: model(x[0], t.expand(x.shape[1]))[None]


def _noise(options: Options, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(options.batch, 2, generator=generator)


def _step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def runs(data: Mixture, options: Options) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Name, steps (0 where there are none) and samples (N, 2) of everything that is compared."""
    generator = torch.Generator().manual_seed(options.seed + 3)
    yield "exact samples", 0, data.sample(options.samples, generator).float()
    teacher = train_teacher(data, options)
    yield "teacher", TEACHER_STEPS, samples_of(teacher, TEACHER_STEPS, options, ode=True)
    for steps in STEPS:
        yield "teacher", steps, samples_of(teacher, steps, options)
    for method in get_args(Method):
        student = distil(teacher, data, method, options)
        for steps in STEPS:
            yield method, steps, samples_of(student, steps, options)


def draw(panels: Sequence[tuple[str, torch.Tensor] | None], columns: int) -> Image.Image:
    """Panels of points (N, 2), row by row, each under its title; None leaves a place empty."""
    rows = math.ceil(len(panels) / columns)
    cell_width, cell_height = PANEL + MARGIN, PANEL + TITLE_HEIGHT
    size = (columns * cell_width + MARGIN, rows * cell_height + MARGIN)
    picture = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for index, panel in enumerate(panels):
        if panel is None:
            continue
        title, points = panel
        left = MARGIN + index % columns * cell_width
        top = index // columns * cell_height + TITLE_HEIGHT
        pen.text((left + PANEL / 2, top - 6), title, INK, font, anchor="ms")
        picture.paste(_density(points), (left, top))
    return picture


def _density(points: torch.Tensor) -> Image.Image:
    """Points (N, 2) as a square, the darker the more lie there."""
    cells, edges = 2 * [PANEL // 2], [-VIEW, VIEW, -VIEW, VIEW]
    counts = torch.histogramdd(points, cells, range=edges).hist
    shade = 245 * (1 - (counts.T.flip(0) / 6).clamp(max=1).sqrt())
    square = Image.fromarray(shade.round().byte().numpy())
    return square.resize((PANEL, PANEL), Image.Resampling.NEAREST)


def main(options: Options) -> None:
    data, start = ring(), time.monotonic()
    target = data.sample(options.samples, torch.Generator().manual_seed(options.seed + 4)).float()
    rows, panels = [], []
    for name, steps, samples in runs(data, options):
        row = {"name": name, "steps": steps, **data.measure(samples, target)}
        print(row, flush=True)
        rows.append(row)
        panels.append((f"{name}, {count(steps, 'step')}" if steps else name, samples))
    seconds = round(time.monotonic() - start, 1)
    settings = {name: str(value) for name, value in asdict(options).items()}
    results = {
        **environment(torch.device("cpu")),
        "settings": settings,
        "seconds": seconds,
        "results": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{date.today()}-cpu-toy-rcm.json"
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)
    if options.picture:
        picture = draw([panels[0], panels[1], None, *panels[2:]], columns=len(STEPS))
        partial = options.picture.with_name(f"{options.picture.name}.partial")
        picture.save(partial, format="PNG", optimize=True)
        partial.replace(options.picture)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))


if __name__ == "__main__":
    main(tyro.cli(Options))
