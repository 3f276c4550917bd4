"""A generated clip, and how it is written: mp4, gif, webp, or a folder of png frames.

Whatever is written is complete or absent: everything goes to a temporary name beside the
target first, so that neither an error nor Ctrl-C leaves half a file behind.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbodit import __version__

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

CRF = 16  # x264's constant rate factor: visually lossless, about 1 MB for 5 s of 480p
FRAME_NAME = re.compile(r"frame-\d{5}\.png")
BT709 = 1  # the code of ITU-R BT.709 in H.264's colour fields


@dataclass
class Video:
    """One clip and how it came to be.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB.
        fps: frames per second.
        settings: everything that decides the frames besides prompt and seed; JSON values.
        timings: seconds by stage.
    """

    frames: np.ndarray
    fps: float
    prompt: str = ""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, dtype = self.frames.shape, self.frames.dtype
        if len(shape) != 4 or shape[3] != 3 or 0 in shape or dtype != "uint8":
            raise ValueError(f"frames must be uint8 (T, H, W, 3), got {dtype} {tuple(shape)}")
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the clip in the format that `path` ends in, and a sidecar of its settings.

        `.mp4` is H.264 in yuv420p, playable while it downloads; `.gif` and `.webp` are
        animations; a path without a suffix becomes a folder of png frames. Beside it lies
        `<path>.json` (see `sidecar`), and an mp4 carries prompt, seed and settings in its
        comment too.

        Args:
            force: replace what is there. A folder is only replaced if it holds nothing but
                png frames written by this method.

        Returns:
            The path written.

        Raises:
            ValueError: a suffix that we cannot write.
            FileExistsError: `path` or its sidecar exists and may not be replaced.
            OSError: it cannot be written, for example for want of space.
        """
        path = Path(path)
        write = _writer(path)
        check_free(path, force)
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            _explained(path, self.frames.nbytes),
            _temporary(path) as clip,
            _temporary(sidecar(path)) as record,
        ):
            write(self, clip)
            record.write_text(self._record(), encoding="utf-8")
        return path

    def _record(self) -> str:
        count, height, width, _ = self.frames.shape
        clip = {"frames": count, "height": height, "width": width, "fps": self.fps}
        record = self._origin() | clip | {"timings": self.timings}
        return json.dumps(record, ensure_ascii=False, indent=1) + "\n"

    def _origin(self) -> dict[str, Any]:
        return {
            "turbodit": __version__,
            "prompt": self.prompt,
            "seed": self.seed,
            "settings": self.settings,
        }


def sidecar(path: str | Path) -> Path:
    """Where the settings of the clip at `path` lie: `fox.mp4` -> `fox.mp4.json`."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """What the sidecar of the clip at `path` records; empty if there is none, or none of ours."""
    try:
        record = json.loads(sidecar(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) and "turbodit" in record else {}


def check_free(path: Path, force: bool) -> None:
    """Raise unless a clip can be written to `path` without destroying what is there.

    Raises:
        ValueError: a suffix that we cannot write.
        FileExistsError: `path` or its sidecar exists and may not be replaced.
        NotADirectoryError, PermissionError: nothing can be created there.
    """
    _writer(path)
    _check_folder(path)
    record = sidecar(path)
    for target, wants_folder in ((path, not path.suffix), (record, False)):
        if target.exists() and target.is_dir() != wants_folder:
            kind = "file" if wants_folder else "folder"
            raise FileExistsError(f"{target} is a {kind}; refusing to replace it")
    foreign = record.exists() and not read_sidecar(path)  # ours may go once its clip is gone
    taken = record if foreign and not path.exists() else path
    if taken.exists() and not force:
        raise FileExistsError(f"{taken} exists already; --force (force=True) replaces it")
    if path.is_dir():
        others = [f.name for f in path.iterdir() if not FRAME_NAME.fullmatch(f.name)]
        if others:
            raise FileExistsError(
                f"{path} holds more than frames ({others[0]}); refusing to replace it"
            )


def _check_folder(path: Path) -> None:
    """Raise unless `path` can be created, as far as can be told without doing it."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"cannot write {path}: {folder} is a file, expected a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: no permission to write in {folder}")


def _write_mp4(video: Video, path: Path) -> None:
    import av
    import numpy as np
    from av.video.reformatter import Colorspace

    # yuv420p halves both sides of the colour planes: odd sides get their last line twice.
    _, height, width, _ = video.frames.shape
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        container.metadata["comment"] = json.dumps(video._origin(), ensure_ascii=False)
        stream = container.add_stream("libx264", rate=Fraction(video.fps).limit_denominator(1001))
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(CRF)}
        # Untagged, a player would guess the colour matrix from the size of the picture.
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        for rgb in video.frames:
            frame = av.VideoFrame.from_ndarray(np.pad(rgb, padding, mode="edge"), format="rgb24")
            yuv = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))


def _write_gif(video: Video, path: Path) -> None:
    # A gif counts in hundredths of a second.
    first, *rest = _pillow_images(video)
    first.save(
        path,
        format="GIF",
        save_all=True,
        append_images=rest,
        duration=[10 * d for d in _durations(len(video.frames), 100 / video.fps)],
        loop=0,
    )


def _write_webp(video: Video, path: Path) -> None:
    first, *rest = _pillow_images(video)
    first.save(
        path,
        format="WEBP",
        save_all=True,
        append_images=rest,
        duration=_durations(len(video.frames), 1000 / video.fps),
        loop=0,
        quality=90,
    )


def _write_frames(video: Video, path: Path) -> None:
    path.mkdir()
    for index, image in enumerate(_pillow_images(video)):
        image.save(path / f"frame-{index:05d}.png")


def _pillow_images(video: Video) -> list[Image]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in video.frames]


def _durations(count: int, ticks: float) -> list[int]:
    """`count` whole durations whose running sum is within half a tick of `ticks` each."""
    ends = [round(ticks * index) for index in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]


_WRITERS: dict[str, Callable[[Video, Path], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".webp": _write_webp,
    "": _write_frames,
}


def _writer(path: Path) -> Callable[[Video, Path], None]:
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        known = ", ".join(s for s in _WRITERS if s)
        raise ValueError(
            f"cannot write {path}: suffix {path.suffix!r} is not one of {known}, "
            "or none for a folder of png frames"
        )
    return _WRITERS[suffix]


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` that becomes `path` on success and vanishes otherwise."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def _explained(path: Path, frame_bytes: int) -> Iterator[None]:
    """Say in the error which file could not be written and, if for want of space, how much."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(path.parent).free
            reason = (
                f"no space left; the frames are {frame_bytes:,} bytes before compression, "
                f"{free:,} bytes are free"
            )
        raise OSError(error.errno, f"cannot write {path}: {reason}") from error
