"""`turbodit encode`: small videos of coloured frames, real and broken."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny_models import tiny_diffusers_folder

from turbodit.cli.encode import Encode
from turbodit.request import GenerationRequest
from turbodit.training.data import LatentDataset
from turbodit.training.data.shards import index_shard, sample_key, shard_path
from turbodit.training.data.videos import BrokenVideo, find_clips, read_video
from turbodit.training.data.work import Worker
from turbodit.training.encode import Encoders, encode_videos
from turbodit.video import Video

REQUEST = GenerationRequest("", width=32, height=32, frames=5, fps=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def encoders(models) -> Encoders:
    return Encoders.from_pretrained(tiny_diffusers_folder(models / "tiny", "ti2v"), device="cpu")


def ramp(frames: int = 9, height: int = 32, width: int = 32, red: int = 200) -> np.ndarray:
    """Frames (T, H, W, 3) that are told by their green."""
    pixels = np.zeros((frames, height, width, 3), np.uint8)
    pixels[..., 0] = red
    pixels[..., 1] = 20 * np.arange(frames)[:, None, None]
    return pixels


def add(folder: Path, name: str, caption: str | None = "a cat", fps: float = 8, **shape) -> Path:
    path = folder / name
    Video(ramp(**shape), fps).save(path, force=True)
    path.with_name(path.name + ".json").unlink()
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def encode(encoders: Encoders, tmp_path: Path, **options):
    options = {"request": REQUEST, "shard_size": 2} | options
    return encode_videos(encoders, tmp_path / "videos", tmp_path / "data", **options)


@pytest.fixture
def videos(tmp_path) -> Path:
    """Five good ones, a to e."""
    folder = tmp_path / "videos"
    for number, name in enumerate("abcde"):
        add(folder, f"{name}.mp4", f"a {name}", red=50 * number)
    return folder


def greens(frames: np.ndarray) -> list[int]:
    """Which frames of the ramp these are."""
    return [round(float(frame[..., 1].mean()) / 20) for frame in frames]


# Decoding.


@pytest.mark.parametrize(
    ("source_fps", "fps", "frames", "expected"),
    [
        (8, 8, 5, [0, 1, 2, 3, 4]),
        (8, 8, 9, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (24, 16, 5, [0, 1, 3, 4, 6]),
        (8, 16, 5, [0, 0, 1, 1, 2]),
        (30, 8, 2, [0, 3]),
        (8, 16, 18, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]),
    ],
)
def test_frames_are_those_on_the_screen(tmp_path, source_fps, fps, frames, expected):
    path = add(tmp_path, "a.mp4", fps=source_fps)
    clip = read_video(path, frames=frames, fps=fps, width=32, height=32)
    assert clip.dtype == np.uint8
    assert greens(clip) == expected


@pytest.mark.parametrize(("source_fps", "fps", "frames", "found"), [(8, 8, 10, 9), (24, 8, 5, 3)])
def test_short_videos(tmp_path, source_fps, fps, frames, found):
    path = add(tmp_path, "a.mp4", fps=source_fps)
    with pytest.raises(BrokenVideo, match=f"too short: {found} of {frames} frames at {fps} fps"):
        read_video(path, frames=frames, fps=fps, width=32, height=32)


def test_videos_are_cropped_in_the_middle(tmp_path):
    pixels = ramp(height=32, width=96)
    pixels[:, :, :32] = pixels[:, :, 64:] = 255
    Video(pixels, 8).save(tmp_path / "a.mp4")
    clip = read_video(tmp_path / "a.mp4", frames=5, fps=8, width=16, height=16)
    assert clip.shape == (5, 16, 16, 3)
    assert clip[0, :, 2:-2, 2].max() < 60, "sides are left"


def test_turned_videos_are_upright(tmp_path):
    pixels = np.zeros((5, 32, 64, 3), np.uint8)
    pixels[:, :, :32] = 255  # bright on the left
    Video(pixels, 8).save(tmp_path / "a.mp4")
    content = (tmp_path / "a.mp4").read_bytes()
    # A phone's note in the track header: to be shown turned clockwise by 90 degrees.
    matrix = content.index(b"tkhd") + 4 + 40
    values = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    turned = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    (tmp_path / "a.mp4").write_bytes(content[:matrix] + turned + content[matrix + 36 :])
    clip = read_video(tmp_path / "a.mp4", frames=5, fps=8, width=32, height=64)
    assert clip[0, :28].min() > 200, "what was left must be above"
    assert clip[0, 36:].max() < 50


# Folders.


def test_captions_beside_videos(tmp_path):
    for name in ("b.mp4", "sub/a.mp4", "c.MP4.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_text(f" {name}\n")
    (tmp_path / "d.webm").touch()
    (tmp_path / "notes.txt").touch()
    found = [(clip.name, clip.caption) for clip in find_clips(tmp_path)]
    names = ("b.mp4", "c.MP4.mp4", "sub/a.mp4")
    assert found == [*zip(names[:2], names[:2], strict=True), ("d.webm", None), (names[2],) * 2]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_captions_in_metadata(tmp_path, suffix):
    rows = [{"file_name": "b.mp4", "text": 'a "b", ü'}, {"file_name": "a.mp4", "text": ""}]
    with (tmp_path / f"metadata.{suffix}").open("w", encoding="utf-8", newline="") as file:
        if suffix == "csv":
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n\n" for row in rows)
    found = [(clip.name, clip.caption) for clip in find_clips(tmp_path)]
    assert found == [("a.mp4", None), ("b.mp4", 'a "b", ü')]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("notes.txt", "a", FileNotFoundError, "no videos"),
        ("metadata.jsonl", "{", ValueError, "line 1 is no JSON object"),
        ("metadata.jsonl", '{"file": "a"}', ValueError, r"row 1 has no file_name; it has \['file"),
        ("metadata.csv", "name,text\na,b\n", ValueError, "row 1 has no file_name"),
    ],
)
def test_bad_folders(tmp_path, name, content, error, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        find_clips(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder of videos"):
        find_clips(tmp_path / "nowhere")


# Encoding.


def test_videos_become_samples(encoders, videos, tmp_path):
    report = encode(encoders, tmp_path)
    assert (report.made, report.found, report.skipped) == (5, 0, {})
    data = LatentDataset(tmp_path / "data", encoders.model, batch=5)
    batch = next(iter(data))
    assert sorted(batch.prompts) == [f"a {name}" for name in "abcde"]
    for row, prompt in enumerate(batch.prompts):
        path = videos / f"{prompt[2:]}.mp4"
        frames = read_video(path, frames=5, fps=8, width=32, height=32)
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
        assert torch.equal(batch.latents[row], encoders.vae.encode(pixels)[0].bfloat16().float())
        text = encoders.text.encode([prompt])[0]
        assert torch.equal(batch.context[row], text.bfloat16().float())


def test_broken_videos_are_skipped_with_their_reason(encoders, videos, tmp_path):
    (videos / "b.mp4").write_bytes((videos / "b.mp4").read_bytes()[:600])
    (videos / "d.mp4").write_text("no video")
    add(videos, "f.mp4", frames=3)
    add(videos, "g.mp4", caption=None)
    for _ in range(2):  # the second time from the records
        report = encode(encoders, tmp_path)
        reasons = {name: reason.split(" (")[0] for name, reason in report.skipped.items()}
        assert reasons == {
            "b.mp4": "cannot be decoded",
            "d.mp4": "cannot be decoded",
            "f.mp4": "too short: 3 of 5 frames at 8 fps",
            "g.mp4": "no caption",
        }
    assert (report.made, report.found) == (0, 3)
    data = LatentDataset(tmp_path / "data", encoders.model, batch=3)
    assert sorted(next(iter(data)).keys) == [sample_key(number) for number in (0, 2, 4)]


def test_only_what_changed_is_encoded_again(encoders, videos, tmp_path):
    encode(encoders, tmp_path)
    assert encode(encoders, tmp_path).made == 0
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*.tar")}
    (videos / "c.txt").write_text("another caption")
    assert encode(encoders, tmp_path).made == 2  # its shard
    path = videos / "a.mp4"
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    report = encode(encoders, tmp_path)
    assert (report.made, report.found) == (2, 3)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*.tar")}
    assert [name for name in times if times[name] == after[name]] == ["shard_000002.tar"]


def test_videos_come_and_go(encoders, videos, tmp_path):
    encode(encoders, tmp_path)
    add(videos, "f.mp4")
    assert encode(encoders, tmp_path).made == 2
    assert LatentDataset(tmp_path / "data", encoders.model, batch=1).info.count == 6
    for name in "cdef":
        (videos / f"{name}.mp4").unlink()
    report = encode(encoders, tmp_path)
    assert (report.made, report.found) == (0, 2)
    left = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert left == ["dataset.json", "shard_000000.json", "shard_000000.tar"]


@pytest.mark.parametrize(
    "content", ['{"a": 1}', "{", "[]", b"\xff", '{"sources": "", "samples": null, "skipped": {}}']
)
def test_a_shard_with_a_broken_record_is_made_again(encoders, videos, tmp_path, content):
    encode(encoders, tmp_path)
    shard = shard_path(tmp_path / "data", 1)
    record, whole = shard.with_suffix(".json"), shard.read_bytes()
    good = record.read_bytes()
    record.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match=r"shard_000001\.json is broken .* is made again"):
        report = encode(encoders, tmp_path)
    assert (report.made, report.found) == (2, 3)
    assert (record.read_bytes(), shard.read_bytes()) == (good, whole)


def test_shards_do_not_go_among_the_videos(encoders, videos, tmp_path):
    (tmp_path / "link").symlink_to(videos)
    before = set(videos.iterdir())
    for folder in (videos, tmp_path / "link"):
        with pytest.raises(ValueError, match="is the folder of the videos; shards go into another"):
            encode_videos(encoders, videos, folder, request=REQUEST)
    assert set(videos.iterdir()) == before


def test_a_stop_costs_no_finished_sample(encoders, videos, tmp_path, monkeypatch):
    encode(encoders, tmp_path, shard_size=5)
    whole = shard_path(tmp_path / "data", 0).read_bytes()
    shard_path(tmp_path / "data", 0).unlink()
    encode_one, calls = Encoders.encode, iter(range(100))

    def stop(self, *arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return encode_one(self, *arguments)

    monkeypatch.setattr(Encoders, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        encode(encoders, tmp_path, shard_size=5)
    report = encode(encoders, tmp_path, shard_size=5)
    assert (report.made, report.found) == (2, 3)
    assert shard_path(tmp_path / "data", 0).read_bytes() == whole


def test_workers_share_the_shards(encoders, videos, tmp_path):
    made = [encode(encoders, tmp_path, worker=Worker(rank, 2)).made for rank in (0, 1)]
    assert made == [3, 2]
    paths = sorted((tmp_path / "data").glob("*.tar"))
    assert [len(index_shard(path).entries) for path in paths] == [2, 2, 1]


def test_image_to_video_models_get_their_conditions(models, videos, tmp_path):
    for variant, tokens in (("flf2v", 10), ("i2v-a14b", None)):
        folder = tiny_diffusers_folder(models / variant, variant)
        one = Encoders.from_pretrained(folder, device="cpu")
        encode_videos(one, videos, tmp_path / variant, request=REQUEST)
        batch = next(iter(LatentDataset(tmp_path / variant, one.model, batch=2)))
        assert batch.channels.shape == (2, 20, 2, 4, 4)
        assert batch.channels[:, :4, 0].eq(1).all(), "the first frame is known"
        known = batch.channels[:, :4, 1]
        assert known[:, -1].eq(float(variant == "flf2v")).all(), "the last frame"
        assert (batch.features is None) if tokens is None else batch.features.shape[1] == tokens


def test_a_folder_of_another_size_is_refused(encoders, videos, tmp_path):
    encode(encoders, tmp_path)
    other = GenerationRequest("", width=64, height=32, frames=5, fps=8)
    with pytest.raises(ValueError, match="another data set: latent_shape is"):
        encode(encoders, tmp_path, request=other)
    with pytest.raises(ValueError, match="multiple of 32"):
        encode(encoders, tmp_path, request=GenerationRequest("", width=50, height=32))
    with pytest.raises(ValueError, match="shard_size must be positive, got 0"):
        encode(encoders, tmp_path, shard_size=0)


def test_long_captions_are_told(encoders, tmp_path):
    add(tmp_path / "videos", "a.mp4", "a cat " * 600)
    with pytest.warns(UserWarning, match="a caption is longer than 512 tokens"):
        encode(encoders, tmp_path)


def test_command(models, encoders, videos, tmp_path, capsys):
    (videos / "b.mp4").write_text("no video")
    command = Encode(
        videos,
        tmp_path / "data",
        model=str(models / "tiny"),
        size="32*32",
        frames=5,
        fps=8,
        device="cpu",
    )
    command.run()
    out, err = capsys.readouterr()
    assert "videos" in err, "no progress shown"
    assert "4 samples" in out
    assert "cannot be decoded" in out
