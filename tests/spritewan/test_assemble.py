"""The folder put together from trained parts loads like any other, here and in diffusers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import UniPCMultistepScheduler
from tests.tiny_models import tiny_diffusers_folder

from turbodit.checkpoints.folder import EMBEDDED
from turbodit.checkpoints.packed import pack
from turbodit.config import PRESETS
from turbodit.pipeline import Pipeline
from turbodit.spritewan.assemble import MODEL_INDEX, Options, assemble

SOURCES = {  # sub-folders of what is assembled, and of where it comes from
    "teacher": "transformer",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "tokenizer": "tokenizer",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusers_folder(tmp_path_factory.mktemp("trained"), "ti2v")


def options(trained: Path, out: Path) -> Options:
    return Options(out=out, **{part: trained / name for part, name in SOURCES.items()})


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_folder_holds_the_parts_and_loads(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "spritewan"
    assemble(options(trained, out))
    packed = Path(shutil.copytree(trained / "transformer", tmp_path / "packed"))
    pack(packed)
    assert contents(out / "teacher") == contents(packed)
    for part in ("vae", "text_encoder", "tokenizer"):
        assert contents(out / part) == contents(trained / part)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*SOURCES, "scheduler", "model_index.json"]
    )
    pipe = Pipeline.from_pretrained(out, transformer=out / "teacher", device="cpu")
    assert pipe.model.task == "ti2v"
    video = pipe("a cat", seed=0, width=32, height=32, frames=5, steps=1)
    assert video.frames.shape == (5, 32, 32, 3)


def test_the_scheduler_is_the_samplers_default(trained: Path, tmp_path: Path) -> None:
    assemble(options(trained, tmp_path / "out"))
    scheduler = UniPCMultistepScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert scheduler.config.prediction_type == "flow_prediction"
    assert scheduler.config.use_flow_sigmas
    assert scheduler.config.flow_shift == PRESETS["spritewan"].sampling.shift


def test_parts_that_are_there_are_replaced(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "old.safetensors").touch()
    (tmp_path / "vae.partial").mkdir()  # of a run that was stopped
    (tmp_path / "judge").mkdir()
    assemble(options(trained, tmp_path))
    assert contents(tmp_path / "vae") == contents(trained / "vae")
    assert not (tmp_path / "vae.partial").exists()
    assert (tmp_path / "judge").exists(), "nothing else is touched"


def test_a_missing_part_is_named_and_the_one_that_is_there_kept(
    trained: Path, tmp_path: Path
) -> None:
    assemble(options(trained, tmp_path))
    before = contents(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        assemble(replace(options(trained, tmp_path), tokenizer=trained / "nowhere"))
    assert contents(tmp_path) == before


def test_the_embedded_index_is_the_one_written_here() -> None:
    assert json.loads((EMBEDDED["spritewan"].path / "model_index.json").read_text()) == MODEL_INDEX
