"""Videos with captions in a folder: found, decoded, brought to a model's size and frame rate."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from turbodit.images import fit_image

if TYPE_CHECKING:
    from av import VideoFrame

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
METADATA = ("metadata.jsonl", "metadata.csv")
ROUNDING = 1e-4  # seconds, of time stamps


class BrokenVideo(Exception):
    """A video that cannot be used; the message is the reason, without the video's name."""


@dataclass(frozen=True)
class Clip:
    """A video of the folder; `name` is its path within. There may be no such file, or caption."""

    name: str
    path: Path
    caption: str | None


def find_clips(folder: Path) -> list[Clip]:
    """The videos of a folder, by name.

    Captions are in `metadata.jsonl` or `metadata.csv` (file_name and text of each video), or
    else beside the videos, here and in sub-folders: `clip.txt` for `clip.mp4`.

    Raises:
        FileNotFoundError: no such folder, or no videos in it.
        ValueError: a bad line of the metadata.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of videos at {folder}")
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is None:
        paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
        captions = {str(path.relative_to(folder)): _caption_beside(path) for path in paths}
    else:
        captions = _read_metadata(metadata)
    if not captions:
        raise FileNotFoundError(f"no videos ({', '.join(SUFFIXES)}) in {folder}")
    return [Clip(name, folder / name, captions[name]) for name in sorted(captions)]


def _caption_beside(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return None
    return text.read_text("utf-8-sig", errors="replace").strip() or None


def _read_metadata(path: Path) -> dict[str, str | None]:
    """Caption by file name."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file) if path.suffix == ".csv" else _json_lines(path, file)
        captions: dict[str, str | None] = {}
        for number, row in enumerate(rows, start=1):
            if not row.get("file_name"):
                raise ValueError(f"{path}: row {number} has no file_name; it has {list(row)}")
            captions[row["file_name"]] = (row.get("text") or "").strip() or None
    return captions


def _json_lines(path: Path, lines: Iterable[str]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} line {number} is no JSON object: {error}") from error
    return rows


def read_video(path: Path, *, frames: int, fps: float, width: int, height: int) -> np.ndarray:
    """The first `frames` frames at `fps`, resized and centre-cropped: uint8 (T, H, W, 3).

    Frame i is the one that is on the screen i / fps seconds after the first.

    Raises:
        BrokenVideo: it cannot be decoded, or is too short.
    """
    import av

    if not path.is_file():
        raise BrokenVideo("file not found")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BrokenVideo("no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            length = 1 / float(stream.average_rate or fps)  # of the last frame
            pictures = _at_rate(
                container.decode(stream), frames, fps, length, lambda f: _picture(f, width, height)
            )
    except av.FFmpegError as error:
        raise BrokenVideo(f"cannot be decoded ({type(error).__name__})") from error
    if len(pictures) < frames:
        raise BrokenVideo(f"too short: {len(pictures)} of {frames} frames at {fps:g} fps")
    return np.stack(pictures)


def _at_rate(
    decoded: Iterable[VideoFrame],
    frames: int,
    fps: float,
    length: float,
    picture: Callable[[VideoFrame], np.ndarray],
) -> list[np.ndarray]:
    """Up to `frames` pictures, one for each 1 / fps seconds; the last frame lasts `length`."""
    pictures: list[np.ndarray] = []
    shown: VideoFrame | None = None
    start = now = 0.0

    def take(until: float) -> None:
        """Pictures of the frame that is on the screen until then."""
        if shown is not None and len(pictures) < frames and len(pictures) / fps < until - ROUNDING:
            image = picture(shown)
            while len(pictures) < frames and len(pictures) / fps < until - ROUNDING:
                pictures.append(image)

    for frame in decoded:
        if frame.time is None:
            raise BrokenVideo("no time stamps")
        if shown is None:
            start = frame.time
        now = frame.time - start
        take(now)
        if len(pictures) == frames:
            return pictures
        shown = frame
    take(now + length)
    return pictures


def _picture(frame: VideoFrame, width: int, height: int) -> np.ndarray:
    """(H, W, 3) uint8, upright."""
    upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return np.asarray(fit_image(Image.fromarray(np.ascontiguousarray(upright)), width, height))
