"""A picture of clips: one row each, frames from left to right, the caption underneath.

python -m turbodit.spritewan.contact_sheet --ids 0:16 -o sheet.png
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from turbodit.spritewan.world import render, scene

COLUMNS = 8
THUMBNAIL = 128
GAP = 4
CAPTION_HEIGHT = 24
PAPER, INK = "white", (40, 40, 40)


def sheet(videos: torch.Tensor, captions: Sequence[str]) -> Image.Image:
    """Eight frames (fewer of shorter clips) of every clip, from its first to its last.

    Args:
        videos: uint8 (B, T, 3, H, W).
        captions: B texts.

    Raises:
        ValueError: `videos` is not such a tensor, or there are not B captions.
    """
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[2] != 3:
        raise ValueError(
            f"got {videos.dtype} {tuple(videos.shape)}, expected uint8 (B, T, 3, H, W)"
        )
    if len(captions) != len(videos):
        raise ValueError(f"got {len(captions)} captions for {len(videos)} videos")
    count = videos.shape[1]
    columns = min(COLUMNS, count)
    kept = torch.linspace(0, count - 1, columns).round().long()
    height, width = videos.shape[-2:]
    thumbnail = (round(THUMBNAIL * height / width), THUMBNAIL)
    row_height = thumbnail[0] + CAPTION_HEIGHT
    page = (columns * (THUMBNAIL + GAP) + GAP, len(videos) * row_height + GAP)
    picture = Image.new("RGB", page, PAPER)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=14)
    for row, (clip, caption) in enumerate(zip(videos, captions, strict=True)):
        top = GAP + row * row_height
        frames = F.interpolate(clip.cpu()[kept].float(), size=thumbnail, mode="area")
        for column, frame in enumerate(frames.round().byte().permute(0, 2, 3, 1)):
            picture.paste(Image.fromarray(frame.numpy()), (GAP + column * (THUMBNAIL + GAP), top))
        pen.text((GAP, top + thumbnail[0] + 2), caption, INK, font)
    return picture


def _ids(text: str) -> range:
    first, _, end = text.partition(":")
    return range(int(first), int(end) if end else int(first) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ids", type=_ids, default=range(16), help="clips first:end (0:16)")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    scenes = [scene(i) for i in options.ids]
    picture = sheet(render(scenes), [s.caption for s in scenes])
    partial = options.out.with_name(options.out.name + ".partial")
    picture.save(partial, format="PNG")
    os.replace(partial, options.out)


if __name__ == "__main__":
    main()
