"""`turbodit bench`: flags, messages and files; what is measured is tested in tests/benchmark."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image
from tests.benchmark.tiny import TINY

from turbodit.cli import main
from turbodit.config import PRESETS


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)


def bench(*arguments: str) -> int:
    return main(["bench", *arguments, "--model", "tiny", "--device", "cpu", "--repeats", "1"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["step", "--modes", "diffusers", "dense"], "| ours, dense |"),
        (["ladder", "--linear", "int8-block"], "| SageSLA 0.1 |"),
        (["linear"], "| int8-channel |"),
        (["e2e", "--solver", "few-step", "--steps", "1"], "| denoise |"),
    ],
)
def test_a_measurement_prints_tables_and_writes_files(tmp_path, capsys, arguments, expected):
    assert bench(*arguments) == 0
    out, err = capsys.readouterr()
    assert expected in out
    assert f"{arguments[0]}: tiny 128x128x5" in out
    assert "written: bench-results/" in err
    files = sorted((tmp_path / "bench-results").iterdir())
    assert [file.suffix for file in files] == [".json", ".md", ".png"]
    assert json.loads(files[0].read_text())["model"] == "tiny"
    Image.open(files[2]).verify()


def test_json_is_all_that_stdout_gets(tmp_path, capsys):
    out = ("--out", str(tmp_path / "other"))
    assert bench("ladder", "--no-vae", "--size", "64*64", "--frames", "1", "--json", *out) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["command"], numbers["tokens"]) == ("ladder", 4)
    assert numbers["linear"] == "int8-channel"
    assert numbers["decoding"] is None
    assert len(list((tmp_path / "other").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--modes", "fast"], "unknown mode fast; supported: diffusers, dense"),
        (["step", "--model", "Wan9"], "unknown model 'Wan9'"),
        (["linear", "--size", "100*100"], "nearest:"),
        (["e2e", "--frames", "6"], "frames must be 4k+1"),
        (["ladder", "--repeats", "0"], "repeats must be positive, got 0"),
        (["step", "--device", "tpu"], "tpu"),
        (["attention", "--size", "64*64"], "--size and --frames belong to a --model"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    given = [*arguments] if "--device" in arguments else [*arguments, "--device", "cpu"]
    assert main(["bench", *given]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_help_imports_no_torch():
    code = (
        "import sys\n"
        "from turbodit.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'av', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    for arguments in (["bench", "--help"], ["bench", "step", "--help"], ["bench", "e2e", "--help"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "usage: turbodit bench" in done.stdout
