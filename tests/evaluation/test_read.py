"""Videos found in folders and read back; broken ones are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from turbodit.evaluation.read import find_videos, read_frames
from turbodit.video import Video


def clip(frames: int = 5, height: int = 48) -> np.ndarray:
    """Slow gradients, which H.264 keeps well."""
    t, y, x = np.ogrid[:frames, :height, :64]
    return np.stack([2 * x + t + 0 * y, 3 * y + t + 0 * x, x + y + 9 * t], axis=-1).astype(np.uint8)


def test_mp4_and_png_are_read_back(tmp_path: Path) -> None:
    frames = clip()
    mp4 = Video(frames, 16).save(tmp_path / "fox.mp4")
    decoded = np.stack(list(read_frames(mp4)))
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 3
    png = Video(frames, 16).save(tmp_path / "frames")
    assert np.array_equal(np.stack(list(read_frames(png))), frames)


def test_videos_by_name(tmp_path: Path) -> None:
    Video(clip(2), 16).save(tmp_path / "b.mp4")
    Video(clip(2), 16).save(tmp_path / "a")
    (tmp_path / ".half.mp4").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    assert find_videos(tmp_path) == {"a": tmp_path / "a", "b": tmp_path / "b.mp4"}
    (tmp_path / "a.GIF").touch()
    with pytest.raises(ValueError, match="two videos have the same name"):
        find_videos(tmp_path)


def test_folders_without_videos(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no videos in .*; supported: \.mp4, "):
        find_videos(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder not found"):
        find_videos(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        find_videos(tmp_path / "file")


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole = Video(clip(33), 16).save(tmp_path / "whole.mp4").read_bytes()
    middle = whole.index(b"mdat") + 700
    broken = {
        "text.mp4": b"no video",
        "empty.mp4": b"",
        "cut.mp4": whole[: len(whole) * 2 // 3],  # its index, which comes first, is complete
        "noise.mp4": whole[:middle] + bytes(1500) + whole[middle + 1500 :],
    }
    for name, content in broken.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            list(read_frames(path))
    folder = Video(clip(2), 16).save(tmp_path / "frames")
    (folder / "frame-00001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read .*frame-00001\.png"):
        list(read_frames(folder))


def test_frames_of_several_sizes(tmp_path: Path) -> None:
    folder = Video(clip(2), 16).save(tmp_path / "frames")
    Image.new("RGB", (32, 48)).save(folder / "frame-00002.png")
    with pytest.raises(ValueError, match="frames changes its size from 64x48 to 32x48"):
        list(read_frames(folder))
