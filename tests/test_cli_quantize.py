"""`turbodit quantize`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.tiny_models import tiny_diffusers_folder, tiny_transformer

from turbodit.checkpoints import load_transformer
from turbodit.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A transformer's folder; the current folder is its parent."""
    tiny_transformer().save_pretrained(tmp_path / "dit")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "dit"


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that ends in a user's error."""
    assert main(["quantize", *arguments]) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert out == "" and line.startswith("turbodit: ") and "Traceback" not in err
    return line


@pytest.mark.parametrize(
    ("linear", "format"),
    {"int8-block": "int8-block", "int8-channel": "int8-channel", "fp8": "fp8-channel"}.items(),
)
def test_formats(
    linear: str, format: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "dit", "out.safetensors", "--linear", linear]) == 0
    assert load_transformer("out.safetensors").blocks[0].ffn[0].format == format
    out, err = capsys.readouterr()
    for text in (format, "before", "after", " GB", "--model dit --transformer out.safetensors"):
        assert text in out
    assert "quantize" in err and "quantize" not in out.replace("turbodit quantize", "")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_diffusers_folder(tmp_path / "model", "t2v-a14b")
    target = tmp_path / "out"
    command = ["quantize", str(model), str(target), "--linear", "fp8", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.pop("seconds") > 0
    before, after = result.pop("bytes_before"), result.pop("bytes_after")
    assert 0 < after < before
    parts = [str(target / "transformer"), str(target / "transformer_2")]
    assert result == {"transformers": parts, "format": "fp8-channel"}


def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model 'none'" in fails(capsys, "none", "out", "--linear", "fp8")
    assert "unknown device" in fails(capsys, "dit", "out", "--linear", "fp8", "--device", "gpu")
    assert main(["quantize", "dit", "out", "--linear", "fp8"]) == 0
    capsys.readouterr()
    assert "out exists already; --force" in fails(capsys, "dit", "out", "--linear", "int8-block")
    assert main(["quantize", "dit", "out", "--linear", "int8-block", "--force"]) == 0
    assert load_transformer("out").blocks[0].ffn[0].format == "int8-block"
    with pytest.raises(FileExistsError):
        main(["quantize", "dit", "out", "--linear", "int8-block", "--debug"])


@pytest.mark.parametrize("arguments", [("dit", "out"), ("dit", "out", "--linear", "int4")])
def test_usage(
    arguments: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", *arguments])
    assert stopped.value.code == 2
    assert "linear" in capsys.readouterr().err
    assert not (folder.parent / "out").exists()


def test_weights_that_cannot_be_quantised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_transformer()
    with torch.no_grad():
        model.blocks[1].attn1.to_q.weight[0, 0] = torch.inf
    model.save_pretrained(folder)
    line = fails(capsys, "dit", "out", "--linear", "int8-channel")
    assert "dit: blocks.1.self_attn.q: " in line and "NaN or infinite" in line
    assert not Path("out").exists()


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom turbodit.cli import main\n"
        "try:\n    main(['quantize', '--help'])\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "int8-block, int8-channel or fp8" in done.stdout
