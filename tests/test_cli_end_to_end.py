"""The command line around a real pipeline of tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from tests.tiny_models import tiny_diffusers_folder

from turbodit.cli import main

SMALL = ("--size", "64*64", "--frames", "5", "--steps", "2", "--seed", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_diffusers_folder(tmp_path_factory.mktemp("models") / "tiny", "ti2v")


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)


def test_prompt_to_mp4_twice_the_same(folder, capsys):
    for name in ("a.mp4", "b.mp4"):
        assert main(["generate", "a red fox", "--model", str(folder), *SMALL, "-o", name]) == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    with av.open("a.mp4") as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 5
    assert (frames[0].width, frames[0].height) == (64, 64)
    out, err = capsys.readouterr()
    for stage in ("text", "denoise", "decode", "write"):
        assert stage in err, "no progress shown"
        assert stage in out, "not in the summary"


def test_other_models_are_recorded_and_not_mistaken(folder, capsys):
    command = ["generate", "a red fox", "--model", str(folder), *SMALL, "-o", "a.gif", "--json"]
    assert main(command) == 0
    (video,) = json.loads(capsys.readouterr().out)["videos"]
    recorded = json.loads(Path("a.gif.json").read_text(encoding="utf-8"))
    assert recorded["settings"] == video["settings"]
    assert recorded["settings"]["weights"] == str(folder)
    assert recorded["settings"]["steps"] == 2
    assert main([*command, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == ["a.gif"]


def test_image_is_the_first_frame_and_part_of_the_record(folder):
    Image.new("RGB", (64, 64), (200, 30, 30)).save("red.png")
    Image.new("RGB", (64, 64), (30, 30, 200)).save("blue.png")
    for name in ("red", "blue"):
        flags = ["--model", str(folder), "--image", f"{name}.png", "-o", name]
        assert main(["generate", "a fox", *flags, *SMALL]) == 0
    frames = [np.asarray(Image.open(f"{name}/frame-00000.png")) for name in ("red", "blue")]
    assert not np.array_equal(*frames)
    assert json.loads(Path("red.json").read_text())["settings"]["image"] == "red.png"


def test_very_long_prompt_says_what_is_cut(folder, capsys):
    prompt = "a red fox " * 4_999 + "THE END ..."
    assert len(prompt) > 50_000
    command = ["generate", "--prompt", prompt, "--model", str(folder), *SMALL, "-o", "a.gif"]
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "turbodit: warning: the prompt is longer than 512 tokens" in err
    assert json.loads(Path("a.gif.json").read_text(encoding="utf-8"))["prompt"] == prompt


def test_prompt_cache_keeps_embeddings(folder):
    for name in ("a.gif", "b.gif"):
        flags = ["--model", str(folder), "--prompt-cache", "cache", "-o", name]
        assert main(["generate", "a fox", *flags, *SMALL]) == 0
    assert list(Path("cache").glob("*.safetensors"))
    assert Path("a.gif").read_bytes() == Path("b.gif").read_bytes()


def test_broken_models_are_user_errors(folder, tmp_path, capsys):
    broken = tiny_diffusers_folder(tmp_path / "broken", "ti2v")
    (weights,) = (broken / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["generate", "a fox", "--model", str(broken), *SMALL]) == 2
    assert weights.name in capsys.readouterr().err
    weights.unlink()
    assert main(["generate", "a fox", "--model", str(broken), *SMALL]) == 2
    assert "transformer" in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_wrong_architecture_is_a_user_error(folder, tmp_path, capsys):
    other = tiny_diffusers_folder(tmp_path / "t2v", "t2v") / "transformer"
    command = ["generate", "a fox", "--model", str(folder), "--transformer", str(other), *SMALL]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "turns 16 channels into 16, expected 48" in err
    assert "load" not in err, "told after loading began"
