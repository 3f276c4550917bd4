"""The twelve backgrounds of SpriteWorld: gradients and a few soft-edged shapes.

Each painter takes `p`, (n, PARAMETERS) uniform numbers in [0, 1), and a `Canvas`, and returns
float32 (n, 3, size, size) in [0, 1]. Coordinates are in pixels of a 256-pixel frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

PARAMETERS = 32
FRAME = 256.0
RGB = tuple[float, float, float]


class Canvas:
    """Pixel centres `x`, `y` (1, size, size) and the shapes over them.

    A shape is a coverage in [0, 1] of shape (n, size, size) with an edge two pixels wide;
    positions are numbers or (n, 1, 1).
    """

    def __init__(self, size: int, device: torch.device) -> None:
        line = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (FRAME / size)
        self.y, self.x = torch.meshgrid(line, line, indexing="ij")
        self.y, self.x = self.y[None], self.x[None]

    def disc(self, x: Tensor | float, y: Tensor | float, radius: Tensor | float) -> Tensor:
        return _soft(radius - torch.hypot(self.x - x, self.y - y))

    def box(
        self,
        left: Tensor | float,
        right: Tensor | float,
        top: Tensor | float,
        bottom: Tensor | float = 2 * FRAME,
    ) -> Tensor:
        wide = _soft(self.x - left) * _soft(right - self.x)
        return wide * _soft(self.y - top) * _soft(bottom - self.y)

    def below(self, line: Tensor | float) -> Tensor:
        return _soft(self.y - line)

    def peak(self, x: Tensor | float, top: Tensor | float, slope: Tensor | float) -> Tensor:
        """A triangle that opens downwards from (x, top)."""
        return _soft((self.y - top - slope * (self.x - x).abs()) / (1 + slope**2) ** 0.5)

    def wave(
        self,
        level: Tensor | float,
        height: Tensor | float,
        length: Tensor | float,
        phase: Tensor | float,
    ) -> Tensor:
        """Everything below a sine line; `phase` in turns."""
        return self.below(level + height * torch.sin(2 * math.pi * (self.x / length + phase)))


def draw(kinds: Sequence[str], parameters: Tensor, size: int) -> Tensor:
    """Backgrounds of the named `kinds` from `parameters` (B, PARAMETERS): (B, 3, size, size).

    Drawn kind by kind: every painter runs at most once.
    """
    canvas = Canvas(size, parameters.device)
    image = torch.empty(len(kinds), 3, size, size, device=parameters.device)
    for kind in sorted(set(kinds)):
        rows = [i for i, k in enumerate(kinds) if k == kind]
        image[rows] = PAINTERS[kind](parameters[rows], canvas).clamp(0, 1)
    return image


def _soft(distance: Tensor) -> Tensor:
    """Coverage of a pixel whose centre lies `distance` pixels inside an edge."""
    return (0.5 + 0.5 * distance).clamp(0, 1)


def _at(p: Tensor, index: int, low: float, high: float) -> Tensor:
    """Parameter `index` as a number in [low, high): (n, 1, 1)."""
    return (low + (high - low) * p[:, index])[:, None, None]


def _colour(p: Tensor, index: int, first: RGB, second: RGB) -> Tensor:
    """A colour between two, chosen by parameter `index`: (n, 3, 1, 1)."""
    start, way = _constants(first, second, p.device)
    return (start + way * p[:, index, None])[:, :, None, None]


@cache
def _constants(first: RGB, second: RGB, device: torch.device) -> tuple[Tensor, Tensor]:
    """First colour and its distance to the second; kept, since every copy stalls a GPU."""
    a, b = torch.tensor([first, second], device=device) / 255
    return a, b - a


def _mix(under: Tensor, over: Tensor, coverage: Tensor) -> Tensor:
    """`over` painted on `under`; coverage (n, size, size)."""
    return under + (over - under) * coverage[:, None]


def _sky(canvas: Canvas, top: Tensor, bottom: Tensor, until: float = FRAME) -> Tensor:
    return _mix(top, bottom, (canvas.y / until).clamp(0, 1))


def _meadow(p: Tensor, c: Canvas) -> Tensor:
    image = _sky(
        c,
        _colour(p, 0, (110, 180, 245), (80, 160, 230)),
        _colour(p, 1, (215, 240, 255), (240, 245, 235)),
        150,
    )
    white = _colour(p, 0, (255, 255, 255), (250, 252, 255))
    for i in (2, 4):  # clouds of three discs
        x, y = _at(p, i, 20, 236), _at(p, i + 1, 22, 70)
        cloud = torch.maximum(c.disc(x - 18, y + 4, 11), c.disc(x + 18, y + 4, 12))
        image = _mix(image, white, torch.maximum(cloud, c.disc(x, y, 17)))
    hill = c.wave(_at(p, 6, 120, 145), _at(p, 7, 10, 18), 300.0, p[:, 8, None, None])
    image = _mix(image, _colour(p, 9, (120, 195, 85), (145, 205, 95)), hill)
    near = c.wave(_at(p, 10, 165, 190), _at(p, 11, 8, 14), 230.0, p[:, 12, None, None])
    image = _mix(image, _colour(p, 13, (75, 165, 60), (95, 175, 55)), near)
    petals = _colour(p, 14, (255, 235, 90), (255, 190, 220))
    for i in range(15, 27, 2):
        image = _mix(image, petals, c.disc(_at(p, i, 8, 248), _at(p, i + 1, 205, 248), 4.5))
    return image


def _night_sky(p: Tensor, c: Canvas) -> Tensor:
    image = _sky(
        c,
        _colour(p, 0, (10, 12, 48), (18, 10, 55)),
        _colour(p, 1, (45, 45, 115), (75, 45, 120)),
    )
    star = _colour(p, 2, (255, 255, 235), (235, 240, 255))
    for i in range(3, 27, 2):
        x, y = _at(p, i, 6, 250), _at(p, i + 1, 6, 250)
        image = _mix(image, star, c.disc(x, y, 1.5 + 0.25 * (i % 6)))
    x, y, radius = _at(p, 27, 35, 221), _at(p, 28, 35, 80), _at(p, 29, 20, 26)
    moon = c.disc(x, y, radius) * (1 - c.disc(x + 0.5 * radius, y - 0.25 * radius, 0.85 * radius))
    return _mix(image, _colour(p, 30, (255, 245, 190), (250, 235, 160)), moon)


def _desert(p: Tensor, c: Canvas) -> Tensor:
    image = _sky(
        c,
        _colour(p, 0, (120, 195, 235), (150, 205, 225)),
        _colour(p, 1, (255, 238, 195), (250, 225, 175)),
        140,
    )
    sun = c.disc(_at(p, 2, 30, 226), _at(p, 3, 28, 60), _at(p, 4, 16, 22))
    image = _mix(image, _colour(p, 5, (255, 250, 200), (255, 235, 140)), sun)
    horizon = _at(p, 6, 135, 150)
    for i in (7, 9):  # pyramids, their right faces in shadow
        x, top = _at(p, i, 40, 216), horizon - _at(p, i + 1, 35, 62)
        pyramid = c.peak(x, top, 0.8)
        image = _mix(image, _colour(p, 11, (225, 180, 105), (215, 165, 95)), pyramid)
        shadow = pyramid * _soft(c.x - x - 0.25 * (c.y - top))
        image = _mix(image, _colour(p, 11, (185, 135, 75), (175, 125, 70)), shadow)
    image = _mix(image, _colour(p, 12, (240, 205, 130), (235, 195, 120)), c.below(horizon))
    dune = c.wave(_at(p, 13, 170, 185), _at(p, 14, 8, 14), 260.0, p[:, 15, None, None])
    image = _mix(image, _colour(p, 16, (228, 180, 100), (222, 172, 95)), dune)
    near = c.wave(_at(p, 17, 210, 225), _at(p, 18, 8, 14), 220.0, p[:, 19, None, None])
    return _mix(image, _colour(p, 20, (212, 155, 80), (205, 148, 78)), near)


def _ocean(p: Tensor, c: Canvas) -> Tensor:
    image = _sky(
        c,
        _colour(p, 0, (135, 205, 245), (170, 215, 240)),
        _colour(p, 1, (225, 243, 250), (250, 240, 225)),
        100,
    )
    sun = c.disc(_at(p, 2, 30, 226), _at(p, 3, 25, 50), 18.0)
    image = _mix(image, _colour(p, 4, (255, 245, 180), (255, 225, 130)), sun)
    image = _mix(image, _colour(p, 5, (60, 150, 205), (70, 165, 200)), c.below(_at(p, 6, 90, 105)))
    shades: tuple[tuple[RGB, RGB], ...] = (
        ((45, 130, 195), (50, 150, 190)),
        ((30, 110, 180), (35, 130, 175)),
        ((20, 90, 160), (22, 108, 155)),
        ((12, 70, 138), (15, 88, 135)),
    )
    for i, (first, second) in enumerate(shades):
        level = _at(p, 7 + i, 0, 10) + (122.0 + 36 * i)
        waves = c.wave(level, 4.0 + i, 40.0 + 12 * i, p[:, 11 + i, None, None])
        image = _mix(image, _colour(p, 5, first, second), waves)
    return image


def _snow(p: Tensor, c: Canvas) -> Tensor:
    image = _sky(
        c,
        _colour(p, 0, (150, 180, 215), (170, 185, 220)),
        _colour(p, 1, (215, 228, 240), (225, 222, 240)),
        160,
    )
    white = _colour(p, 2, (250, 252, 255), (244, 249, 255))
    hill = c.wave(_at(p, 3, 135, 155), _at(p, 4, 10, 18), 320.0, p[:, 5, None, None])
    image = _mix(image, _colour(p, 6, (218, 230, 246), (212, 224, 242)), hill)
    near = c.wave(_at(p, 7, 185, 205), _at(p, 8, 8, 14), 250.0, p[:, 9, None, None])
    image = _mix(image, white, near)
    for i in range(10, 32, 2):
        image = _mix(image, white, c.disc(_at(p, i, 6, 250), _at(p, i + 1, 6, 185), 3.5))
    return image


def _city(p: Tensor, c: Canvas) -> Tensor:
    image = _sky(
        c,
        _colour(p, 0, (150, 165, 200), (175, 160, 190)),
        _colour(p, 1, (245, 225, 210), (235, 215, 225)),
        200,
    )
    window = _colour(p, 2, (255, 235, 150), (255, 225, 125))
    for i in range(6):
        left = 43.0 * i - 2 + _at(p, 3 + i, -3, 3)
        top = _at(p, 9 + i, 50, 135)
        wall = _colour(p, 15 + i, (85, 95, 125), (125, 110, 130))
        image = _mix(image, wall, c.box(left, left + 45, top))
        for column in (9.0, 26.0):
            # Windows repeat down the wall: distance from the middle of the nearest one.
            row = torch.remainder(c.y - top - 10, 26) - 7
            lights = c.box(left + column, left + column + 10, top + 4) * _soft(7 - row.abs())
            image = _mix(image, window, lights)
    image = _mix(image, _colour(p, 21, (95, 98, 105), (85, 88, 98)), c.below(218.0))
    dash = _soft(16 - (torch.remainder(c.x + 64 * p[:, 22, None, None], 64) - 32).abs())
    return _mix(image, window, dash * c.box(-9.0, 265.0, 234.0, 240.0))


def _forest(p: Tensor, c: Canvas) -> Tensor:
    image = _sky(
        c,
        _colour(p, 0, (185, 220, 190), (200, 225, 175)),
        _colour(p, 1, (120, 175, 125), (130, 180, 110)),
    )
    ground = _colour(p, 2, (70, 95, 50), (85, 100, 50))
    rows: tuple[tuple[float, float, float, RGB, RGB], ...] = (
        (52.0, 70.0, 205.0, (75, 140, 95), (90, 150, 90)),
        (64.0, 90.0, 235.0, (35, 95, 60), (45, 105, 55)),
    )
    image = _mix(image, ground, c.below(195.0))
    trunk = _colour(p, 3, (95, 65, 45), (85, 60, 40))
    for r, (spacing, top, foot, first, second) in enumerate(rows):
        green = _colour(p, 4 + r, first, second)
        for i in range(int(FRAME / spacing) + 1):
            x = spacing * (i + 0.5 * r) + _at(p, 6 + 5 * r + i, -9, 9)
            peak = top - 45 + _at(p, 16 + 5 * r + i, -20, 20)
            image = _mix(image, trunk, c.box(x - 5, x + 5, foot - 40, foot))
            image = _mix(image, green, c.peak(x, peak, 3.0) * (1 - c.below(foot - 25)))
    return image


def _brick_wall(p: Tensor, c: Canvas) -> Tensor:
    width, height = 64.0, 32.0
    y = c.y + height * p[:, 0, None, None]
    row = torch.floor(y / height)
    x = c.x + width * (p[:, 1, None, None] + 0.5 * torch.remainder(row, 2))
    column = torch.floor(x / width)
    edge_x = width / 2 - (torch.remainder(x, width) - width / 2).abs()
    edge_y = height / 2 - (torch.remainder(y, height) - height / 2).abs()
    # Three shades of brick, in an order without an obvious pattern.
    shade = torch.remainder(row * row + 2 * column + row * column, 3) / 2
    brick = _mix(
        _colour(p, 2, (190, 85, 62), (175, 92, 70)),
        _colour(p, 2, (160, 62, 48), (148, 70, 55)),
        shade,
    )
    mortar = _colour(p, 3, (222, 205, 190), (205, 195, 188))
    return _mix(mortar, brick, _soft(torch.minimum(edge_x, edge_y) - 2.5))


def _checkerboard(p: Tensor, c: Canvas) -> Tensor:
    cell = _at(p, 0, 40, 56)
    x, y = c.x / cell + 2 * p[:, 1, None, None], c.y / cell + 2 * p[:, 2, None, None]
    # Triangle waves of period 2 cross zero on the lines between cells; so does their product.
    across = 0.5 - (torch.remainder(x, 2) - 1).abs()
    down = 0.5 - (torch.remainder(y, 2) - 1).abs()
    sign = across.sign() * down.sign()
    distance = torch.minimum(across.abs(), down.abs()) * cell * sign
    cool = _colour(p, 3, (95, 105, 150), (70, 130, 140))
    warm = _colour(p, 4, (150, 95, 120), (165, 110, 85))
    dark = cool + (warm - cool) * p[:, 5, None, None, None]
    return _mix(_colour(p, 6, (240, 240, 235), (248, 236, 214)), dark, _soft(distance))


def _sunset(p: Tensor, c: Canvas) -> Tensor:
    horizon = _at(p, 0, 165, 185)
    height = (c.y / horizon).clamp(0, 1)
    image = _mix(
        _colour(p, 1, (70, 40, 110), (95, 45, 115)),
        _colour(p, 2, (235, 100, 80), (240, 110, 95)),
        (height / 0.6).clamp(0, 1),
    )
    image = _mix(
        image, _colour(p, 3, (255, 195, 95), (255, 180, 80)), (2.5 * height - 1.5).clamp(0, 1)
    )
    x, radius = _at(p, 4, 60, 196), _at(p, 5, 38, 52)
    sun = c.disc(x, horizon - 6, radius)
    image = _mix(image, _colour(p, 6, (255, 240, 150), (255, 230, 120)), sun)
    sea = _colour(p, 7, (95, 45, 95), (80, 40, 100))
    image = _mix(image, sea, c.below(horizon))
    for i in range(4):  # the sun's reflection, in stripes that widen downwards
        y = horizon + (10.0 + 16 * i)
        half = radius * (0.5 + 0.15 * i)
        stripe = c.box(x - half, x + half, y, y + 6)
        image = _mix(image, _colour(p, 8, (250, 165, 90), (245, 150, 85)), stripe)
    return image


def _mountains(p: Tensor, c: Canvas) -> Tensor:
    image = _sky(
        c,
        _colour(p, 0, (95, 150, 215), (120, 165, 215)),
        _colour(p, 1, (220, 235, 245), (235, 232, 240)),
        190,
    )
    white = _colour(p, 2, (250, 252, 255), (242, 246, 255))
    for i, middle in enumerate((30.0, 226.0, 128.0)):
        x = middle + _at(p, 3 + i, -22, 22)
        top = _at(p, 6 + i, 45, 85) + (15.0 if i == 2 else 0.0)
        slope = _at(p, 9 + i, 1.0, 1.35)
        rock = _colour(p, 12 + i, (100, 110, 140), (120, 118, 145))
        shade = _colour(p, 12 + i, (75, 85, 118), (92, 92, 122))
        body = c.peak(x, top, slope)
        cap = body * (1 - c.wave(top + 34, 5.0, 26.0, p[:, 15, None, None]))
        image = _mix(image, rock, body)
        image = _mix(image, shade, body * _soft(c.x - x))
        image = _mix(image, white, cap)
    pasture = c.wave(_at(p, 16, 205, 220), 7.0, 240.0, p[:, 17, None, None])
    return _mix(image, _colour(p, 18, (95, 140, 90), (110, 150, 95)), pasture)


def _polka_dots(p: Tensor, c: Canvas) -> Tensor:
    spacing = _at(p, 0, 46, 60)
    x, y = c.x / spacing + p[:, 1, None, None], c.y / spacing + p[:, 2, None, None]
    x = x + 0.5 * torch.remainder(torch.floor(y), 2)
    dx, dy = torch.remainder(x, 1) - 0.5, torch.remainder(y, 1) - 0.5
    dots = _soft((_at(p, 3, 0.24, 0.32) - torch.hypot(dx, dy)) * spacing)
    warm = _colour(p, 4, (250, 185, 205), (250, 215, 160))
    cool = _colour(p, 4, (160, 205, 245), (170, 225, 195))
    paper = warm + (cool - warm) * p[:, 5, None, None, None]
    return _mix(paper, _colour(p, 6, (255, 255, 255), (250, 250, 255)), dots)


PAINTERS: dict[str, Callable[[Tensor, Canvas], Tensor]] = {
    "meadow": _meadow,
    "night sky": _night_sky,
    "desert": _desert,
    "ocean": _ocean,
    "snow": _snow,
    "city": _city,
    "forest": _forest,
    "brick wall": _brick_wall,
    "checkerboard": _checkerboard,
    "sunset": _sunset,
    "mountains": _mountains,
    "polka dots": _polka_dots,
}
