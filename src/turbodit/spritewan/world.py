"""SpriteWorld: short clips of sprites that move over a background, each made from its id.

A clip shows one sprite (in a fifth of the clips two different ones, sharing one motion) at
256x256 and 16 frames per second. `scene(clip_id)` draws its labels, its caption and its
continuous parameters; `render` turns scenes into pixels. Nothing is stored: the id is
the data set.

Ids below `HELD_OUT` are training clips. In a fixed twentieth of the (object, motion,
background) combinations no training clip exists; ids from `HELD_OUT` on show only those.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from turbodit.spritewan import backgrounds, captions
from turbodit.spritewan.build_sprites import SPRITES
from turbodit.spritewan.captions import BACKGROUNDS, MOTIONS, OBJECTS, SIZES

FRAMES = 33
SIZE = 256
FPS = 16
HELD_OUT = 1_000_000_000

HELD_OUT_PER_PLACE = 3  # objects, of 56, for each pair of motion and background
TWO_SPRITES = 0.2  # share of clips
CROWD_STRIDE = 61_803_399  # between clips whose sprites meet in a crowd
MIP_LEVELS = 3
SMALLEST = 0.4  # drawn size where growth begins and shrinking ends, relative to the full one

# Drawn size in pixels of one sprite, and of each of two.
PIXELS = {"small": (56.0, 72.0), "large": (96.0, 120.0)}
PIXELS_OF_TWO = {"small": (50.0, 62.0), "large": (80.0, 94.0)}

# Sprites that look to one side are mirrored when they move to the other (-1 left, 1 right).
FACING = {
    **dict.fromkeys(
        "unicorn elephant duck whale fish turtle bee dinosaur car bus train helicopter "
        "tractor".split(),
        -1,
    ),
    "rocket": 1,
    "airplane": 1,
}


class Draws:
    """A stream of random choices that depends on `key` alone."""

    def __init__(self, *key: int) -> None:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        self._numbers = iter(generator.random(64).tolist())

    def number(self) -> float:
        """Uniform in [0, 1)."""
        return next(self._numbers)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.number()

    def chance(self, probability: float) -> bool:
        return self.number() < probability

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.number() * len(options))]


@dataclass(frozen=True, eq=False)
class Scene:
    """Labels, caption and continuous parameters of one clip.

    Attributes:
        objects, motion, background, size: indices into OBJECTS, MOTIONS, BACKGROUNDS, SIZES.
        tracks: float32 (sprites, FRAMES, 4): centre x and y and drawn size in pixels, angle
            in radians (clockwise on the screen).
        mirrored: for each sprite, whether it is drawn left-right reversed.
        backdrop: float32 (backgrounds.PARAMETERS,) in [0, 1): what the background varies.
    """

    clip_id: int
    objects: tuple[int, ...]
    motion: int
    background: int
    size: int
    caption: str
    tracks: np.ndarray = field(repr=False)
    mirrored: tuple[bool, ...] = field(repr=False)
    backdrop: np.ndarray = field(repr=False)


def scene(clip_id: int) -> Scene:
    """The clip called `clip_id`: the same on every machine.

    Raises:
        ValueError: `clip_id` is negative.
    """
    if clip_id < 0:
        raise ValueError(f"clip ids count from 0, got {clip_id}")
    draws = Draws(clip_id, 0)
    motion = int(draws.uniform(0, len(MOTIONS)))
    background = int(draws.uniform(0, len(BACKGROUNDS)))
    size = int(draws.uniform(0, len(SIZES)))
    training, held_out = _objects_by_split()[motion, background]
    candidates = list(held_out if clip_id >= HELD_OUT else training)
    objects = [draws.pick(candidates)]
    if draws.chance(TWO_SPRITES):
        candidates.remove(objects[0])
        objects.append(draws.pick(candidates))
    tracks = _tracks(MOTIONS[motion], SIZES[size], len(objects), draws)
    labels = tuple(objects), motion, background, size
    return Scene(
        clip_id,
        *labels,
        caption=_paraphrase(*labels, Draws(clip_id, 1)),
        tracks=tracks.astype(np.float32),
        mirrored=tuple(_is_mirrored(OBJECTS[o], t) for o, t in zip(objects, tracks, strict=True)),
        backdrop=np.array([draws.number() for _ in range(backgrounds.PARAMETERS)], np.float32),
    )


def paraphrases(scene: Scene, count: int) -> list[str]:
    """`count` captions of the scene; the first is its own."""
    labels = scene.objects, scene.motion, scene.background, scene.size
    return [_paraphrase(*labels, Draws(scene.clip_id, 1 + i)) for i in range(count)]


def canonical_caption(scene: Scene) -> str:
    """The plainest caption that names every label of the scene."""
    return captions.canonical_caption(
        [OBJECTS[o] for o in scene.objects],
        MOTIONS[scene.motion],
        BACKGROUNDS[scene.background],
        SIZES[scene.size],
    )


def crowd(clip_id: int, sprites: int) -> Scene:
    """Training clip `clip_id` with the sprites of other training clips added to its own.

    No clip of the data set, but food for an autoencoder, for which sprites are harder than
    backgrounds.
    """
    scenes = [scene(clip_id)]
    while sum(len(s.objects) for s in scenes) < sprites:
        scenes.append(scene((clip_id + len(scenes) * CROWD_STRIDE) % HELD_OUT))
    return replace(
        scenes[0],
        objects=tuple(o for s in scenes for o in s.objects),
        tracks=np.concatenate([s.tracks for s in scenes]),
        mirrored=tuple(m for s in scenes for m in s.mirrored),
    )


def is_held_out(obj: int, motion: int, background: int) -> bool:
    """Whether no training clip shows this object, motion and background together."""
    return obj in _objects_by_split()[motion, background][1]


def _paraphrase(
    objects: tuple[int, ...], motion: int, background: int, size: int, draws: Draws
) -> str:
    names = [OBJECTS[o] for o in objects]
    return captions.paraphrase(names, MOTIONS[motion], BACKGROUNDS[background], SIZES[size], draws)


@lru_cache(maxsize=1)
def _objects_by_split() -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """(objects in training, objects held out) for every (motion, background).

    The held-out ones are those whose names hash lowest: fixed for ever, and three for every
    pair, so that held-out clips are as uniform over motions and backgrounds as training ones.
    """
    split = {}
    for m, motion in enumerate(MOTIONS):
        for b, background in enumerate(BACKGROUNDS):
            digests = [
                hashlib.sha256(f"{obj}/{motion}/{background}".encode()).digest() for obj in OBJECTS
            ]
            order = sorted(range(len(OBJECTS)), key=digests.__getitem__)
            held_out, training = order[:HELD_OUT_PER_PLACE], order[HELD_OUT_PER_PLACE:]
            split[m, b] = (training, held_out)
    return split


def _is_mirrored(name: str, track: np.ndarray) -> bool:
    return FACING.get(name, 0) * (track[-1, 0] - track[0, 0]) < -1.0


# Tracks. Two sprites share a path and stand on its two sides, so that they never overlap:
# above each other when they move sideways, else beside each other. Offsets are from the middle
# of the frame; `reach` is how far from it a centre may be.

_TIME = np.linspace(0.0, 1.0, FRAMES)  # of a clip, not seconds


def _tracks(motion: str, size: str, count: int, draws: Draws) -> np.ndarray:
    """(count, FRAMES, 4): centre x, centre y, drawn size, angle."""
    full = draws.uniform(*(PIXELS if count == 1 else PIXELS_OF_TWO)[size])
    reach = SIZE / 2 - full / 2
    sides = np.array([[0.0]] if count == 1 else [[-1.0], [1.0]])
    drawn, angle = np.full(FRAMES, full), np.zeros(FRAMES)
    if motion in ("moving left", "moving right"):
        forward = 1.0 if motion == "moving right" else -1.0
        x, y = forward * _straight(reach, draws), _across(sides, reach, draws)
    elif motion in ("moving up", "moving down"):
        forward = 1.0 if motion == "moving down" else -1.0
        y, x = forward * _straight(reach, draws), _across(sides, reach, draws)
    elif motion == "moving diagonally":
        x, y = _diagonal(full, reach, sides, draws)
    elif motion == "bouncing":
        y, x = _hops(reach, draws), _across(sides, reach, draws)
    elif motion == "circling":
        x, y = _circle(reach, sides, draws)
    else:
        x = _across(sides, reach, draws)
        y = np.full(FRAMES, 0.7 * reach * draws.uniform(-1.0, 1.0))
        if motion == "growing":
            drawn = full * (SMALLEST + (1 - SMALLEST) * _TIME)
        elif motion == "shrinking":
            drawn = full * (1 - (1 - SMALLEST) * _TIME)
        elif motion == "spinning":
            angle = 2 * math.pi * draws.uniform(1.0, 1.8) * draws.pick((-1.0, 1.0)) * _TIME
    tracks = np.empty((count, FRAMES, 4))
    tracks[..., 0], tracks[..., 1] = SIZE / 2 + x, SIZE / 2 + y
    tracks[..., 2], tracks[..., 3] = drawn, angle
    return tracks


def _straight(reach: float, draws: Draws) -> np.ndarray:
    """(FRAMES,): evenly from before the middle to behind it."""
    return reach * (-draws.uniform(0.6, 1.0) * (1 - _TIME) + draws.uniform(0.6, 1.0) * _TIME)


def _across(sides: np.ndarray, reach: float, draws: Draws) -> np.ndarray:
    """(count, 1): place across the path: anywhere for one sprite, two halves for two."""
    middle_of_half = SIZE / 4
    room = reach if len(sides) == 1 else reach - middle_of_half
    return middle_of_half * sides + 0.7 * room * draws.uniform(-1.0, 1.0)


def _diagonal(
    full: float, reach: float, sides: np.ndarray, draws: Draws
) -> tuple[np.ndarray, np.ndarray]:
    """x and y (count, FRAMES): side by side towards a corner, all inside the frame."""
    right, down = draws.pick((-1.0, 1.0)), draws.pick((-1.0, 1.0))
    apart = 0.39 * full * sides
    way = _straight(reach - np.abs(apart).max(), draws)
    return right * (way + apart), down * (way - apart)


def _hops(reach: float, draws: Draws) -> np.ndarray:
    """(FRAMES,): up and down from a floor, two or three times."""
    height = draws.uniform(1.1, 1.9) * reach
    hops = draws.uniform(1.8, 2.8)
    floor = draws.uniform(height / 4, reach)
    lift = np.abs(np.sin(math.pi * (hops * _TIME + draws.number())))
    return floor - min(height, reach + floor) * lift


def _circle(reach: float, sides: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """x and y (count, FRAMES): once around the middle or more; two sprites face each other."""
    turns = draws.uniform(1.0, 1.6) * draws.pick((-1.0, 1.0))
    radius = draws.uniform(0.75, 0.97) * reach
    phase = 2 * math.pi * (turns * _TIME + draws.number()) + math.pi / 2 * (sides - 1)
    return radius * np.cos(phase), radius * np.sin(phase)


# Pixels.


def render(
    scenes: Sequence[Scene], device: str | torch.device = "cpu", frames: int = FRAMES
) -> torch.Tensor:
    """The first `frames` frames of each scene: uint8 (B, frames, 3, 256, 256) on `device`.

    A clip's bytes do not depend on the clips around it.

    Raises:
        ValueError: `frames` is not in 1..FRAMES, or there is no scene.
    """
    if not 1 <= frames <= FRAMES:
        raise ValueError(f"frames must be in 1..{FRAMES}, got {frames}")
    if not scenes:
        raise ValueError("render needs at least one scene")
    device = torch.device(device)
    clips = torch.empty(len(scenes), frames, 3, SIZE, SIZE, dtype=torch.uint8, device=device)
    # One clip at a time fits a CPU's cache; a GPU wants work for all of its cores.
    together = 1 if device.type == "cpu" else 32
    for start in range(0, len(scenes), together):
        some = scenes[start : start + together]
        group = clips[start : start + together]
        kinds = [BACKGROUNDS[s.background] for s in some]
        parameters = torch.from_numpy(np.stack([s.backdrop for s in some])).to(device)
        images = backgrounds.draw(kinds, parameters, SIZE)
        group[:] = (images * 255).round().to(torch.uint8)[:, None]
        for slot in range(max(len(s.objects) for s in some)):
            _paint_sprites(group, some, slot)
    return clips


def _paint_sprites(clips: torch.Tensor, scenes: Sequence[Scene], slot: int) -> None:
    """Paint sprite number `slot` of the scenes that have one into their `clips`, in place.

    Only a square window around each sprite is touched, of one size for all. One trilinear
    look-up serves all windows: the volume's depth is the mip level, the output's depth is time.
    """
    shown = [i for i, s in enumerate(scenes) if len(s.objects) > slot]
    frames, device = clips.shape[1], clips.device
    tracks = np.stack([scenes[i].tracks[slot, :frames] for i in shown])
    x, y, drawn, angle = torch.from_numpy(tracks).to(device)[..., None, None].unbind(2)
    objects = torch.tensor([scenes[i].objects[slot] for i in shown], device=device)
    flip = torch.tensor([-1.0 if scenes[i].mirrored[slot] else 1.0 for i in shown], device=device)

    line = torch.arange(_window(tracks), device=device)
    rows = _first_pixel(y, len(line)) + line[:, None]  # (B, T, window, 1)
    columns = _first_pixel(x, len(line)) + line  # (B, T, 1, window)
    dx, dy = columns + 0.5 - x, rows + 0.5 - y
    cos, sin = torch.cos(angle), torch.sin(angle)
    # The sprite's own axes, which turn with it; its edges are at -1 and 1.
    u = (cos * dx + sin * dy) * (2 / drawn) * flip[:, None, None, None]
    v = (cos * dy - sin * dx) * (2 / drawn)
    atlas = _atlas(device)
    level = (torch.log2(atlas.shape[-1] / drawn) - 0.4).clamp(0, MIP_LEVELS - 1)
    w = ((2 * level + 1) / MIP_LEVELS - 1).expand_as(u)
    picture = F.grid_sample(atlas[objects], torch.stack([u, v, w], dim=-1), align_corners=False)
    colour, alpha = picture.permute(0, 2, 3, 4, 1).split((3, 1), dim=-1)

    clip = torch.tensor(shown, device=device)[:, None, None, None]
    time = torch.arange(frames, device=device)[:, None, None]
    under = clips[clip, time, :, rows, columns]  # (B, T, window, window, 3)
    blended = 255 * colour + under * (1 - alpha)
    clips[clip, time, :, rows, columns] = blended.round().to(torch.uint8)


def _window(tracks: np.ndarray) -> int:
    """Side in pixels of a square that holds any of the sprites, turned as it may be."""
    drawn, angle = tracks[..., 2], tracks[..., 3]
    return min(SIZE, math.ceil((drawn * (abs(np.cos(angle)) + abs(np.sin(angle)))).max()) + 2)


def _first_pixel(centre: torch.Tensor, window: int) -> torch.Tensor:
    return (centre - window / 2).round().long().clamp(0, SIZE - window)


@lru_cache(maxsize=4)
def _atlas(device: torch.device) -> torch.Tensor:
    """Premultiplied sprites with their mip levels: float32 (objects, 4, MIP_LEVELS, s, s).

    Level i is the picture averaged over 2^i pixels, kept at full size.
    """
    info = json.loads((SPRITES / "sprites.json").read_text())
    side, columns = info["size"], info["columns"]
    sheet = np.asarray(Image.open(SPRITES / "sprites.png").convert("RGBA"), dtype=np.float32) / 255
    rows = sheet.shape[0] // side
    cells = sheet.reshape(rows, side, columns, side, 4).transpose(0, 2, 4, 1, 3)
    cells = cells.reshape(rows * columns, 4, side, side)
    sprites = torch.from_numpy(cells[[info["names"].index(name) for name in OBJECTS]])
    sprites[:, :3] *= sprites[:, 3:]
    levels = [sprites]
    for i in range(1, MIP_LEVELS):
        small = F.avg_pool2d(sprites, 2**i)
        levels.append(F.interpolate(small, size=(side, side), mode="bilinear"))
    return torch.stack(levels, dim=2).to(device)
