"""Finds videos in a folder and decodes them frame by frame: one frame is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")


def find_videos(folder: Path) -> dict[str, Path]:
    """Videos directly in `folder`: name without suffix -> file, or subfolder of png frames.

    In order of their names. Hidden files and other kinds of files are passed over.

    Raises:
        FileNotFoundError: no such folder, or it has no videos.
        NotADirectoryError: it is a file.
        ValueError: two videos have the same name.
    """
    if not folder.exists():
        raise FileNotFoundError(f"folder not found: {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder of videos")
    videos: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if _is_video(path)):
        name = path.name if path.is_dir() else path.stem
        if name in videos:
            raise ValueError(f"two videos have the same name: {videos[name]} and {path}")
        videos[name] = path
    if not videos:
        raise FileNotFoundError(
            f"no videos in {folder}; supported: {', '.join(SUFFIXES)}, or folders of png frames"
        )
    return videos


def _is_video(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return any(path.glob("*.png")) if path.is_dir() else path.suffix.lower() in SUFFIXES


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video file, or of a folder of png frames in the order of their names.

    Yields:
        (H, W, 3) uint8 RGB, all of one size.

    Raises:
        ValueError: the file is broken, cut short, or holds no video; or its size changes.
    """
    first = None
    for frame in _png_frames(path) if path.is_dir() else _decoded_frames(path):
        first = frame.shape if first is None else first
        if frame.shape != first:
            sizes = " to ".join(f"{width}x{height}" for height, width, _ in (first, frame.shape))
            raise ValueError(f"{path} changes its size from {sizes}")
        yield frame
    if first is None:
        raise ValueError(f"{path} holds no frames")


def _png_frames(folder: Path) -> Iterator[np.ndarray]:
    import numpy as np
    from PIL import Image

    for path in sorted(folder.glob("*.png")):
        try:
            with Image.open(path) as image:
                frame = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:  # Pillow's for broken png files
            raise ValueError(f"cannot read {path}: {error}") from error
        yield frame


def _decoded_frames(path: Path) -> Iterator[np.ndarray]:
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video")
            stream = container.streams.video[0]
            packets = 0
            # Without this, H.264 decoders paint over what is broken and say nothing.
            stream.codec_context.options = {"err_detect": "explode"}
            for packet in container.demux(stream):
                packets += packet.size > 0
                if packet.is_corrupt:
                    raise ValueError(f"cannot decode {path}: packet {packets} is broken")
                for frame in packet.decode():
                    yield frame.to_ndarray(format="rgb24")
            if packets < stream.frames:
                raise ValueError(f"{path} is cut short: {packets} of {stream.frames} frames")
    except av.FFmpegError as error:
        raise ValueError(f"cannot decode {path}: {error.strerror}") from error
