"""`turbodit eval` and `turbodit compare`: what they write, print and refuse.

The measures themselves are tested in tests/evaluation.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny_models import tiny_diffusers_folder

from turbodit.cli import main
from turbodit.cli.compare import HALVES, _check_alike
from turbodit.cli.eval import ModelFlags
from turbodit.evaluation.read import read_frames
from turbodit.evaluation.spec import KEYS
from turbodit.request import Settings
from turbodit.spritewan.world import HELD_OUT, render, scene
from turbodit.video import Video, read_sidecar

SMALL = ("--size", "64*64", "--frames", "5", "--device", "cpu")


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def clip(offset: int = 0, frames: int = 3, size: int = 64) -> np.ndarray:
    t, y, x = np.ogrid[:frames, :size, :size]
    channels = [2 * x + t + 0 * y, y + 0 * (x + t) + offset, x + y + 5 * t]
    return np.stack(channels, axis=-1).astype(np.uint8)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that ends in a user's error."""
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def results(ending: str) -> list[Path]:
    return sorted(Path("eval-results").glob(f"*{ending}"))


# eval videos, eval pair


def test_videos_of_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Video(clip(), 16).save("clips/moving")
    Video(np.repeat(clip()[:1], 3, axis=0), 16).save("clips/still")
    assert main(["eval", "videos", "clips", "--no-flow"]) == 0
    out = capsys.readouterr().out
    assert "| video | frames | flicker | colour drift | sharpness |" in out
    (path,) = results("-videos-clips.json")
    numbers = json.loads(path.read_text())
    assert list(numbers["rows"]) == ["moving", "still"]
    assert numbers["rows"]["still"]["flicker"] == 0
    flickers = [row["flicker"] for row in numbers["rows"].values()]
    assert numbers["summary"]["mean"]["flicker"] == pytest.approx(sum(flickers) / 2)
    assert path.with_suffix(".md").read_text().strip() == out.strip()
    assert len(results("")) == 2, "nothing half-written is left"


def test_videos_that_cannot_be_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Video(clip(frames=1), 16).save("clips/short")
    err = fails(capsys, "eval", "videos", "clips", "--no-flow")
    assert "short: got 1 frame(s), expected at least 2" in err
    assert not Path("eval-results").exists()
    monkeypatch.setitem(sys.modules, "cv2", None)
    err = fails(capsys, "eval", "videos", "clips")
    assert "pip install 'turbodit[eval]'; --no-flow leaves it out" in err
    assert "folder not found: none" in fails(capsys, "eval", "videos", "none")
    Path("clips/bad.mp4").write_bytes(b"no video")
    assert "cannot decode clips/bad.mp4" in fails(capsys, "eval", "videos", "clips", "--no-flow")


def test_pair_of_folders(capsys: pytest.CaptureFixture[str]) -> None:
    for name, offset in (("same", 0), ("other", 10)):
        Video(clip(size=176), 16).save(f"a/{name}")
        Video(clip(offset, size=176), 16).save(f"b/{name}")
    assert main(["eval", "pair", "a", "b", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    rows = numbers["rows"]
    assert rows["same"] == {"psnr": 100, "ssim": 1, "ms_ssim": 1}
    # 10 off in one of three channels
    assert rows["other"]["psnr"] == pytest.approx(10 * np.log10(255**2 / (100 / 3)), abs=1e-4)
    assert numbers["summary"]["worst"] == rows["other"]
    assert json.loads(results("-pair-a-b.json")[0].read_text()) == numbers


def test_pairs_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("a/one", "a/two", "b/two", "b/three"):
        Video(clip(), 16).save(path)
    err = fails(capsys, "eval", "pair", "a", "b")
    assert "without a partner of the same name: a/one, b/three" in err
    Video(clip(), 16).save("c/two")
    Video(clip(frames=2), 16).save("d/two")
    err = fails(capsys, "eval", "pair", "c", "d", "--no-ms-ssim")
    assert "two: the second video ends after 2 frames" in err
    assert "too small for MS-SSIM" in fails(capsys, "eval", "pair", "c", "c")
    assert main(["eval", "pair", "c", "c", "--no-ms-ssim"]) == 0
    assert "folder not found: e" in fails(capsys, "eval", "pair", "c", "e")


# eval spritewan


@cache
def drawn(clip_id: int) -> np.ndarray:
    return render([scene(clip_id)])[0].permute(0, 2, 3, 1).numpy()


class Copyist:
    """Stands in for a pipeline: draws the scene that a prompt was written for."""

    def resolve(self, request):
        return request

    def generate(self, request) -> list[Video]:
        ids = [seed % HELD_OUT + HELD_OUT for seed in request.seed]
        assert [scene(clip_id).caption for clip_id in ids] == list(request.prompt)
        timings = {"text": 0.5, "denoise": 2.0, "decode": 1.5, "denoise_step": 0.1}
        return [Video(drawn(clip_id), 16, timings=timings) for clip_id in ids]


def test_a_perfect_model_of_spriteworld(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(model, **options):
        loaded.append((model, options["attention"]))
        return Copyist()

    monkeypatch.setattr("turbodit.pipeline.Pipeline.from_pretrained", load)
    command = ["eval", "spritewan", "--clips", "4", "--seeds", "2", "--batch", "2", "--steps", "4"]
    model = ("--model", "spritewan-teacher:attention=sdpa-math", "--attention", "sdpa")
    assert main([*command, *model, "--device", "cpu", "--json"]) == 0
    assert loaded == [("spritewan-teacher", "sdpa-math")]
    numbers = json.loads(capsys.readouterr().out)
    name = "spritewan-teacher:attention=sdpa-math,steps=4"
    assert list(numbers["rows"]) == ["real clips", name]
    row = numbers["rows"][name]
    assert [row[label] for label in ("object", "motion", "background")] == [100, 100, 100]
    assert row["frechet"] == pytest.approx(0, abs=1e-3)
    assert (row["precision"], row["recall"], row["diversity"]) == (1, 1, 0)
    assert row["seconds_per_clip"] == 2.0  # 4 seconds for two
    assert len(row["by_seed"]) == 2
    real = numbers["rows"]["real clips"]
    assert real["frechet"] > 1
    assert "diversity" not in real
    (picture,) = results(".png")
    Image.open(picture).verify()
    (table,) = results(".md")
    assert "| object, % | motion, % | background, % | Fréchet | precision | recall |" in (
        table.read_text(encoding="utf-8")
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clips", "3"], "clips must be at least 4, got 3"),
        (["--model", "spritewan", "spritewan"], "--model names spritewan twice"),
        (["--model", "spritewan-teacher:steps=0"], "steps must be between 1"),
        (["--model", "spritewan:speed=9"], "unknown option 'speed=9'"),
        (["--model", "nowhere"], "no model 'nowhere'"),
    ],
)
def test_mistakes_are_told_at_once(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert message in fails(capsys, "eval", "spritewan", "--device", "cpu", *flags)


def test_every_option_of_a_spec_is_a_flag() -> None:
    assert set(KEYS) | {"device"} == {field.name for field in fields(ModelFlags)}


# compare


class Painter:
    """Stands in for a pipeline: noise from the seed, darker where linear layers have 8 bits."""

    def __init__(self, error_at: int | None = None, **options: object) -> None:
        self.device = torch.device("cpu")
        self.options = options
        self.error_at = error_at
        self.made: list[Settings] = []

    def generate(self, settings: Settings, progress) -> list[Video]:
        if len(self.made) == self.error_at:
            raise KeyboardInterrupt
        self.made.append(settings)
        rng = np.random.default_rng(settings.seeds[0])
        shape = (settings.frames, settings.height // 8, settings.width // 8, 3)
        small = rng.integers(20, 236, shape).astype(np.uint8)
        frames = small.repeat(8, axis=1).repeat(8, axis=2) - 20 * ("linear" in self.options)
        timings = {"text": 0.25, "denoise": float(settings.steps), "decode": 0.5}
        timings["denoise_step"] = 1.0
        return [Video(frames, settings.fps, settings.prompts[0], settings.seeds[0], {}, timings)]


@pytest.fixture
def painters(monkeypatch: pytest.MonkeyPatch) -> list[Painter]:
    """The pipelines that are loaded, in order; the next one is as `Painter.error_at` says."""
    made: list[Painter] = []

    def load(model, *, device, progress, **options) -> Painter:
        made.append(Painter(Painter.next_error, **options))
        return made[-1]

    monkeypatch.setattr(Painter, "next_error", None, raising=False)
    monkeypatch.setattr("turbodit.pipeline.Pipeline.from_pretrained", load)
    return made


def compare(*arguments: str) -> int:
    models = ("spritewan-teacher:steps=3", "spritewan-teacher:steps=3,linear=int8-channel")
    return main(["compare", *models, *SMALL, *arguments])


def test_two_models_side_by_side(painters, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--prompts", "A fox, running!", "--seed", "7") == 0
    assert sorted(path.name for path in Path("compare").iterdir()) == [
        "a-fox-running-7.mp4", "a-fox-running-7.mp4.json", "summary.json", "summary.md",
    ]  # fmt: skip
    left, right = painters
    assert left.made == right.made
    assert (left.made[0].seeds, left.made[0].steps) == ((7,), 3)
    frames = np.stack(list(read_frames(Path("compare/a-fox-running-7.mp4"))))
    assert len(frames) == 5
    darker = frames[:, -64:, :64].mean() - frames[:, -64:, -64:].mean()
    assert darker == pytest.approx(20, abs=1.5)
    summary = json.loads(Path("compare/summary.json").read_text())
    assert summary["left"] == "spritewan-teacher:steps=3"
    assert summary["median_seconds"] == {"left": 3.75, "right": 3.75}
    (row,) = summary["videos"]
    assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / 400), abs=0.01)  # before mp4
    assert 0 < row["ssim"] < 1
    out = capsys.readouterr().out
    assert "| A fox, running! | 7 | 3.75 | 3.75 | 22.11 |" in out
    assert out.strip() == Path("compare/summary.md").read_text().strip()


def test_other_samplers_are_not_compared_by_pixels(painters) -> None:
    models = ("spritewan-teacher:steps=4", "spritewan:steps=2")
    assert main(["compare", *models, *SMALL, "--prompts", "a fox", "--out", "c"]) == 0
    summary = json.loads(Path("c/summary.json").read_text())
    assert summary["median_seconds"] == {"left": 4.75, "right": 2.75}
    assert "psnr" not in summary["videos"][0]
    assert "similarity" not in read_sidecar("c/a-fox-0.mp4")["settings"]


def test_nothing_is_replaced_or_made_twice_unasked(painters, capsys) -> None:
    Path("p.txt").write_text("a fox\na cat\n")
    assert compare("--prompts", "p.txt") == 0
    before = Path("compare/002-a-cat-0.mp4").stat().st_mtime_ns
    assert "exists already; --force" in fails(
        capsys, "compare", "spritewan", "spritewan:steps=2", *SMALL, "--prompts", "p.txt"
    )
    assert len(painters) == 2, "a model was loaded in vain"
    assert compare("--prompts", "p.txt", "--resume", "--json") == 0
    assert len(painters) == 2
    videos = json.loads(capsys.readouterr().out)["videos"]
    assert [video["prompt"] for video in videos] == ["a fox", "a cat"]
    Path("p.txt").write_text("a fox\na cat\na car\n")
    assert compare("--prompts", "p.txt", "--resume") == 0
    assert [settings.prompts for settings in painters[3].made] == [("a car",)]
    assert Path("compare/002-a-cat-0.mp4").stat().st_mtime_ns == before
    assert compare("--prompts", "p.txt", "--force") == 0
    assert len(painters[5].made) == 3


def test_an_interrupted_run_goes_on(painters, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.txt").write_text("a fox\na cat\na car\n")
    monkeypatch.setattr(Painter, "next_error", 2)
    assert compare("--prompts", "p.txt") == 130  # the left model, at its third video
    assert not list(Path("compare").glob("*.mp4"))
    assert compare("--prompts", "p.txt", "--resume") == 130  # the right one, likewise
    assert [len(painter.made) for painter in painters] == [2, 1, 2]
    assert len(list(Path("compare").glob("*.mp4"))) == 2
    monkeypatch.setattr(Painter, "next_error", None)
    assert compare("--prompts", "p.txt", "--resume") == 0
    assert [len(painter.made) for painter in painters] == [2, 1, 2, 1]
    assert len(json.loads(Path("compare/summary.json").read_text())["videos"]) == 3
    assert not Path("compare", HALVES).exists()


def test_models_that_do_not_fit_side_by_side() -> None:
    sizes = {"width": 64, "height": 64, "frames": 5}
    left, right = (SimpleNamespace(settings=SimpleNamespace(**sizes, fps=fps)) for fps in (16, 24))
    _check_alike(left, left)
    with pytest.raises(ValueError, match=r"do not fit side by side: .*'fps': 24.*--size"):
        _check_alike(left, right)


def test_two_real_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny_diffusers_folder(tmp_path / "tiny", "ti2v"))
    models = (folder, f"{folder}:linear=int8-channel")
    command = ["compare", *models, *SMALL, "--steps", "2", "--prompts", "a red fox", "--json"]
    assert main(command) == 0
    (video,) = json.loads(capsys.readouterr().out)["videos"]
    assert video["psnr"] > 20
    assert video["seconds"]["left"] > 0
    assert Path(video["output"]).exists()


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from turbodit.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'av', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    for arguments in (["eval", "spritewan", "--help"], ["compare", "--help"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"usage: turbodit {arguments[0]}" in done.stdout
