"""`turbodit merge`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from safetensors.torch import load_file, save_file
from tests.tiny_models import tiny_transformer
from tyro.conf import FlagCreatePairsOff

from turbodit.checkpoints import load_transformer
from turbodit.cli.merge import Merge, parse_lora


def merge(*arguments: str) -> None:
    tyro.cli(Merge, args=arguments, config=(FlagCreatePairsOff,)).run()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders a, b and c, and lora.safetensors; the current folder is their parent."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        tiny_transformer("t2v", seed).save_pretrained(tmp_path / name)
    tensors = {"diffusion_model.blocks.0.ffn.2.diff_b": torch.ones(24)}
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path


THREE = ("--base", "a", "--diff-base", "b", "--diff-target", "c")


def test_a_difference(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge(*THREE, "--weight", "0.5", "-o", "out.safetensors", "--report", "some/report.json")
    out, err = capsys.readouterr()
    assert "merged" in out and "copied" in out and "out.safetensors" in out
    assert 'turbodit generate "..." --transformer out.safetensors' in out
    assert "merge" in err
    a, b, c, got = (
        load_transformer(name, dtype=torch.float32).blocks[1].ffn[0].weight
        for name in ("a", "b", "c", "out.safetensors")
    )
    torch.testing.assert_close(got, a + 0.5 * (c - b))
    report = json.loads(Path("some/report.json").read_text())
    assert "blocks.1.ffn.0.weight" in report["merged"]
    assert report["copied"] == [] and report["kept"] == report["missing"] == {}
    assert report["base"] == "a" and report["weight"] == 0.5


def test_loras(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--base", "a", "--lora", "lora.safetensors:0.5", "lora.safetensors")
    merge(*arguments, "-o", "out", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result.pop("seconds") > 0
    loras = ["lora.safetensors:0.5", "lora.safetensors"]
    assert result.pop("kept") > 50
    assert result == {"base": "a", "output": "out", "lora": loras} | {
        "merged": 1, "copied": 0, "missing": 0
    }  # fmt: skip
    before, after = (load_transformer(name, dtype=torch.float32) for name in ("a", "out"))
    torch.testing.assert_close(after.blocks[0].ffn[2].bias, before.blocks[0].ffn[2].bias + 1.5)
    merge("--base", "a", "--lora", "lora.safetensors", "-o", "other")
    out = capsys.readouterr().out
    assert "kept" in out and "not in a LoRA" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "a"), "needs --diff-base and --diff-target, or --lora"),
        (("--base", "a", "--diff-base", "b"), "needs --diff-base and --diff-target, or --lora"),
        ((*THREE, "--lora", "lora.safetensors"), "--lora goes without"),
        (("--base", "a", "--lora", "lora.safetensors", "--weight", "1"), "--lora goes without"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, models: Path) -> None:
    with pytest.raises(ValueError, match=message):
        merge(*arguments, "-o", "out")
    assert not Path("out").exists()


LORA = ("--base", "a", "--lora", "lora.safetensors")


def test_reports_that_cannot_be_written_are_refused_first(models: Path) -> None:
    for report, kind, message in (
        ("b", OSError, "--report b is a folder; expected a file"),
        ("lora.safetensors/x.json", OSError, r"lora\.safetensors is no folder to write to"),
        ("./lora.safetensors", ValueError, "is a model of this merge; give another file"),
        ("out.safetensors", ValueError, "is a model of this merge; give another file"),
    ):
        with pytest.raises(kind, match=message):
            merge(*LORA, "-o", "out.safetensors", "--report", report)
    assert not Path("out.safetensors").exists()
    load_file("lora.safetensors")
    merge(*LORA, "-o", "out", "--report", "out/report.json")
    assert json.loads(Path("out/report.json").read_text())["output"] == "out"


def test_paths_of_loras(models: Path) -> None:
    with pytest.raises(ValueError, match=r"strength of lora\.safetensors must be a number, got 'x"):
        parse_lora("lora.safetensors:x")
    assert parse_lora("lora.safetensors:2") == (Path("lora.safetensors"), 2.0)
    for name in ("lora.safetensors:x", "lora.safetensors:2"):
        Path(name).touch()
        assert parse_lora(name) == (Path(name), 1.0)
        assert parse_lora(f"{name}:3") == (Path(name), 3.0)
    assert parse_lora("a/b.safetensors") == (Path("a/b.safetensors"), 1.0)
    assert parse_lora("a/b.safetensors:-0.5") == (Path("a/b.safetensors"), -0.5)
    assert parse_lora("c:b.safetensors") == (Path("c:b.safetensors"), 1.0)


def test_the_flags_import_no_torch() -> None:
    code = "import sys, turbodit.cli.merge; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
