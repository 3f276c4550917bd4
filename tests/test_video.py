from __future__ import annotations

import errno
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from turbodit import video as video_module
from turbodit.video import Video, check_free, read_sidecar, sidecar

FPS = 16


def make_video(height: int = 64, width: int = 96, frames: int = 5) -> Video:
    """A red field over a blue one, and a yellow square that moves right."""
    clip = np.empty((frames, height, width, 3), np.uint8)
    clip[:, :32] = (220, 40, 30)
    clip[:, 32:] = (20, 90, 200)
    for index in range(frames):
        clip[index, 8:24, 8 * index : 8 * index + 16] = (240, 220, 30)
    return Video(clip, FPS, "ein Fuchs im Schnee 雪", 7, {"steps": 4}, {"decode": 1.5})


def decode_mp4(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))


def test_mp4_is_h264_that_browsers_play(tmp_path):
    path = make_video().save(tmp_path / "fox.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.format.name == "yuv420p"
        assert stream.average_rate == FPS
        assert stream.frames == 5
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "not faststart"


def test_mp4_keeps_colours(tmp_path):
    clip = make_video()
    shown = decode_mp4(clip.save(tmp_path / "fox.mp4"))
    # Halved colour planes blur the edges; flat areas are what shows a wrong matrix.
    flat = shown[0, 40:60, 8:80].astype(int) - clip.frames[0, 40:60, 8:80].astype(int)
    assert np.abs(flat).max() <= 4
    assert psnr(shown, clip.frames) > 30


@pytest.mark.parametrize(("height", "width"), [(63, 96), (64, 95), (63, 95)])
def test_mp4_of_odd_size_repeats_the_last_line(tmp_path, height, width):
    clip = make_video(height, width)
    shown = decode_mp4(clip.save(tmp_path / "fox.mp4"))
    assert shown.shape == (5, 64, 96, 3)
    assert psnr(shown[:, :height, :width], clip.frames) > 30


def test_settings_are_in_the_mp4_and_beside_it(tmp_path):
    path = make_video().save(tmp_path / "fox.mp4")
    with av.open(str(path)) as container:
        comment = json.loads(container.metadata["comment"])
    record = json.loads(sidecar(path).read_text(encoding="utf-8"))
    for origin in (comment, record):
        assert origin["prompt"] == "ein Fuchs im Schnee 雪"
        assert origin["seed"] == 7
        assert origin["settings"] == {"steps": 4}
    assert record["timings"] == {"decode": 1.5}
    assert (record["frames"], record["height"], record["width"]) == (5, 64, 96)
    assert sidecar(path).name == "fox.mp4.json"


def test_same_clip_gives_the_same_bytes_whatever_it_took(tmp_path):
    # Where 4 does not divide the macroblocks of a row, one x264 in a hundred decides otherwise:
    # its look-ahead (mbtree) reads what lies behind them.
    first, second = make_video(width=128), make_video(width=128)
    second.timings = {"decode": 99.0}
    a, b = first.save(tmp_path / "a.mp4"), second.save(tmp_path / "b.mp4")
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_last_as_long_as_the_clip(tmp_path, suffix):
    path = make_video(frames=8).save(tmp_path / f"fox{suffix}")
    with Image.open(path) as image:
        assert image.n_frames == 8
        assert image.info["loop"] == 0
        milliseconds = 0
        for index in range(8):
            image.seek(index)
            image.load()  # webp: the duration is known once the frame is decoded
            milliseconds += image.info["duration"]
    assert milliseconds == 1000 * 8 / FPS


def test_png_frames_are_exact(tmp_path):
    clip = make_video()
    folder = clip.save(tmp_path / "fox")
    shown = np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())])
    np.testing.assert_array_equal(shown, clip.frames)
    assert sidecar(folder).exists()


def test_unknown_suffix_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'\.avi' is not one of \.mp4, \.gif, \.webp"):
        make_video().save(tmp_path / "fox.avi")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fox.mp4", "fox.gif", "fox"])
def test_replaces_only_when_forced(tmp_path, name):
    clip = make_video()
    path = clip.save(tmp_path / name)
    with pytest.raises(FileExistsError, match="exists already"):
        clip.save(path)
    longer = make_video(frames=9)
    longer.save(path, force=True)
    assert json.loads(sidecar(path).read_text())["frames"] == 9


def test_never_replaces_a_folder_of_other_things(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "notes").write_text("more of it")
    (tmp_path / "clip.mp4").mkdir()
    for name in ("thesis", "notes", "clip.mp4"):
        with pytest.raises(FileExistsError, match="replace"):
            make_video().save(tmp_path / name, force=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_never_replaces_a_foreign_file_in_the_sidecars_place(tmp_path):
    path, record = tmp_path / "fox", tmp_path / "fox.json"
    for content in ("{}", "[1, 2]", "no JSON"):
        record.write_text(content)
        with pytest.raises(FileExistsError, match=r"fox\.json exists already"):
            make_video().save(path)
        assert record.read_text() == content
    assert not path.exists()
    make_video().save(path, force=True)
    record.unlink()
    record.mkdir()
    for force in (False, True):
        with pytest.raises(FileExistsError, match=r"fox\.json is a folder; refusing"):
            make_video().save(path, force=force)


def test_a_deleted_clip_can_be_made_again(tmp_path):
    path = make_video().save(tmp_path / "fox.gif")
    path.unlink()
    make_video(frames=9).save(path)
    assert read_sidecar(path)["frames"] == 9


@pytest.mark.parametrize("name", ["fox.mp4", "fox.gif", "fox.webp", "fox"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_nothing_half_written_is_left(tmp_path, monkeypatch, name, error):
    suffix = Path(name).suffix
    write = video_module._WRITERS[suffix]

    def write_then_fail(video: Video, path: Path) -> None:
        write(video, path)
        raise error

    monkeypatch.setitem(video_module._WRITERS, suffix, write_then_fail)
    with pytest.raises(type(error)):
        make_video().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_full_disk_says_what_was_needed(tmp_path, monkeypatch):
    def fail(video: Video, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(video_module._WRITERS, ".mp4", fail)
    clip = make_video()
    message = r"fox\.mp4: no space left; the frames are 92,160 bytes"
    with pytest.raises(OSError, match=message) as caught:
        clip.save(tmp_path / "fox.mp4")
    assert clip.frames.nbytes == 92_160
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_failed_replacement_keeps_the_old_clip(tmp_path, monkeypatch):
    path = make_video().save(tmp_path / "fox.mp4")
    before = path.read_bytes(), sidecar(path).read_bytes()

    def fail(video: Video, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setitem(video_module._WRITERS, ".mp4", fail)
    with pytest.raises(KeyboardInterrupt):
        make_video(frames=9).save(path, force=True)
    assert (path.read_bytes(), sidecar(path).read_bytes()) == before


def test_creates_the_folder_it_is_saved_in(tmp_path):
    assert make_video().save(tmp_path / "a" / "b" / "fox.gif").exists()


def test_check_free_raises_before_any_work(tmp_path):
    check_free(tmp_path / "new.mp4", force=False)
    with pytest.raises(ValueError, match="avi"):
        check_free(tmp_path / "new.avi", force=False)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file, expected a folder"):
        check_free(tmp_path / "file" / "clips" / "new.mp4", force=False)


def test_check_free_raises_where_nothing_may_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may do all
    with pytest.raises(PermissionError, match="no permission to write in"):
        check_free(tmp_path / "clips" / "new.mp4", force=False)


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((3, 8, 8, 3), np.float32), 16, "uint8"),
        (np.zeros((8, 8, 3), np.uint8), 16, r"\(8, 8, 3\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), 16, "T, H, W"),
        (np.zeros((3, 8, 8, 3), np.uint8), 0, "fps must be positive, got 0"),
    ],
)
def test_refuses_what_is_no_clip(frames, fps, message):
    with pytest.raises(ValueError, match=message):
        Video(frames, fps)
