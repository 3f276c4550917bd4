"""Draws the sprites of SpriteWorld from Noto Color Emoji and writes their atlas.

    python -m turbodit.spritewan.build_sprites --font NotoColorEmoji.ttf

The atlas is one RGBA image, a grid of square sprites in the order of `sprites.json`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from turbodit.spritewan.captions import OBJECT_WORDS

SPRITES = Path(__file__).parents[1] / "assets" / "spritewan" / "sprites"
SPRITE_SIZE = 96
COLUMNS = 8
MARGIN = 2  # clear pixels around a sprite, so that interpolation ends in transparency
STRIKE = 109  # the one size in which the font's bitmaps exist

EMOJI = {
    "cat": "🐱", "dog": "🐶", "fox": "🦊", "bear": "🐻", "panda": "🐼", "lion": "🦁",
    "rabbit": "🐰", "frog": "🐸", "monkey": "🐵", "pig": "🐷", "cow": "🐮", "mouse": "🐭",
    "unicorn": "🦄", "elephant": "🐘", "penguin": "🐧", "owl": "🦉", "duck": "🦆",
    "whale": "🐳", "octopus": "🐙", "crab": "🦀", "fish": "🐟", "turtle": "🐢",
    "butterfly": "🦋", "bee": "🐝", "dinosaur": "🦖", "car": "🚗", "bus": "🚌",
    "train": "🚂", "rocket": "🚀", "helicopter": "🚁", "sailboat": "⛵", "tractor": "🚜",
    "ufo": "🛸", "airplane": "✈", "pizza": "🍕", "burger": "🍔", "apple": "🍎",
    "banana": "🍌", "strawberry": "🍓", "ice cream": "🍦", "cake": "🎂", "donut": "🍩",
    "watermelon": "🍉", "pineapple": "🍍", "tree": "🌳", "cactus": "🌵", "sunflower": "🌻",
    "mushroom": "🍄", "ball": "⚽", "balloon": "🎈", "guitar": "🎸", "house": "🏠",
    "robot": "🤖", "ghost": "👻", "snowman": "⛄", "heart": "❤",
}  # fmt: skip


def draw_sprite(font: ImageFont.FreeTypeFont, emoji: str) -> Image.Image:
    """`emoji` as a square RGBA image, as large as fits, centred.

    Raises:
        ValueError: the font has no picture for it.
    """
    canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(canvas).text((STRIKE // 4, STRIKE // 4), emoji, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for {emoji!r}; expected a colour emoji font")
    picture = canvas.crop(box)
    room = SPRITE_SIZE - 2 * MARGIN
    scale = room / max(picture.size)
    width, height = (round(scale * side) for side in picture.size)
    # Resize with premultiplied alpha: colours hidden under clear pixels must not bleed in.
    picture = picture.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
    corner = ((SPRITE_SIZE - width) // 2, (SPRITE_SIZE - height) // 2)
    square.paste(picture.convert("RGBA"), corner)
    return square


def build(font_path: Path, folder: Path) -> None:
    """Write `sprites.png` and `sprites.json` to `folder`."""
    font = ImageFont.truetype(str(font_path), STRIKE)
    rows = -(-len(OBJECT_WORDS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * SPRITE_SIZE, rows * SPRITE_SIZE))
    for index, name in enumerate(OBJECT_WORDS):
        row, column = divmod(index, COLUMNS)
        atlas.paste(draw_sprite(font, EMOJI[name]), (column * SPRITE_SIZE, row * SPRITE_SIZE))
    folder.mkdir(parents=True, exist_ok=True)
    description = {"size": SPRITE_SIZE, "columns": COLUMNS, "names": list(OBJECT_WORDS)}
    (folder / "sprites.json.partial").write_text(json.dumps(description, indent=1) + "\n")
    atlas.save(folder / "sprites.png.partial", format="PNG", optimize=True)
    for name in ("sprites.json", "sprites.png"):
        os.replace(folder / f"{name}.partial", folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=SPRITES, help="folder of the atlas")
    options = parser.parse_args()
    build(options.font, options.out)


if __name__ == "__main__":
    main()
