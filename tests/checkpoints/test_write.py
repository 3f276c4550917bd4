"""What killed, failing and concurrent processes leave of files and folders."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turbodit.checkpoints.write import new_file, new_folder, write_folder
from turbodit.weights import LazyTensor, lazy_weights

KILLED = """
import os, signal, sys
from pathlib import Path
from turbodit.checkpoints.write import new_file, new_folder
for new, target in ((new_folder, sys.argv[1]), (new_folder, sys.argv[2]), (new_file, sys.argv[3])):
    if not os.fork():
        with new(Path(target)) as partial:
            (partial / "x" if partial.is_dir() else partial).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
"""


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


def weights(value: float, count: int = 3) -> dict[str, LazyTensor]:
    return {f"w{i}": LazyTensor.of(torch.full((4,), value)) for i in range(count)}


def values(folder: Path) -> set[float]:
    return {x for tensor in lazy_weights(folder).values() for x in tensor.read().tolist()}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals")
def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    fresh, there, file = tmp_path / "fre[s]h", tmp_path / "there", tmp_path / "file.json"
    there.mkdir()
    command = [sys.executable, "-c", KILLED, *map(str, (fresh, there, file))]
    subprocess.run(command, check=True)
    assert len(hidden(tmp_path)) == 3 and len(hidden(there)) == 1
    (tmp_path / ".fre[s]h.notes").touch()  # somebody else's

    for folder in (fresh, there):
        with new_folder(folder) as partial:
            (partial / "y").touch()
        assert [path.name for path in folder.iterdir()] == ["y"]
    with new_file(file) as partial:
        partial.write_text("whole")
    assert file.read_text() == "whole"
    assert hidden(tmp_path) == [".fre[s]h.notes"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")
def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from turbodit.checkpoints.write import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as partial: (partial / 'other').touch()"
    )
    target = tmp_path / "out"
    target.mkdir()
    with new_folder(target) as partial:
        (partial / "mine").touch()
        subprocess.run([sys.executable, "-c", code, str(target)], check=True)
        assert (partial / "mine").exists() and (target / "other").exists()
    assert sorted(path.name for path in target.iterdir()) == ["mine", "other"]


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is there may be in use, so it stays; writing works."""
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with new_file(tmp_path / "a") as one, new_file(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one" and not hidden(tmp_path)


@pytest.mark.parametrize("sizes", [("5GB", "5GB"), (20, "5GB"), ("5GB", 20), (20, 20)])
def test_there_is_no_moment_without_weights(
    sizes: tuple[int | str, int | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All new files are in place before the first old one goes."""
    folder = tmp_path / "folder"
    with new_folder(folder) as partial:
        write_folder(partial, weights(1, 4), {}, sizes[0])
    (folder / "notes.txt").touch()
    unlink, removed = Path.unlink, []

    def watched(path: Path, missing_ok: bool = False) -> None:
        if path.parent == folder:
            removed.append(path.name)
            assert new <= {path.name for path in folder.iterdir()}
            assert path.name not in new
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    with new_folder(folder) as partial:
        write_folder(partial, weights(2), {}, sizes[1])
        new = {path.name for path in partial.iterdir()}
    assert {path.name for path in folder.iterdir()} == new | {"notes.txt"}
    assert bool(removed) == (sizes != ("5GB", "5GB"))
    assert values(folder) == {2.0}


def test_errors_speak_of_the_target(tmp_path: Path) -> None:
    """Whether writing, naming or making the temporary folder fails."""
    target = tmp_path / "out"
    with pytest.raises(FileNotFoundError) as error, new_folder(target) as partial:
        (partial / "no" / "file").write_text("")
    assert str(error.value).endswith(f": '{target}/no/file'")
    (tmp_path / "there" / "folder").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as error, new_file(tmp_path / "there") as partial:
        partial.touch()
    assert str(error.value).endswith(f": '{tmp_path / 'there'}'")
    long = tmp_path / ("x" * 250)
    with pytest.raises(OSError) as error, new_file(long):
        pass
    assert str(error.value).endswith(f": '{long}'")
    with pytest.raises(FileNotFoundError, match=r"^mine$"), new_file(target):
        raise FileNotFoundError("mine")
    assert not hidden(tmp_path)


def test_an_index_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    name = "diffusion_pytorch_model.safetensors.index.json"
    said = re.escape(f"cannot write {tmp_path / 'out' / name}: no space left")
    with pytest.raises(OSError, match=said), new_folder(tmp_path / "out") as partial:
        write_folder(partial, weights(1), {}, 20)
    assert not list(tmp_path.iterdir())
