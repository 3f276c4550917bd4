"""Packed weights: unpacked once, whole or not at all, whoever else does it at the same time."""

from __future__ import annotations

import errno
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.tiny_models import tiny_diffusers_folder

from turbodit.checkpoints import find_model, load_transformer, packed, quantize_file
from turbodit.checkpoints.folder import ModelFolder
from turbodit.checkpoints.merge import merge_difference
from turbodit.checkpoints.packed import pack, unpacked

SHARDS = ("model-1.safetensors", "model-2.safetensors")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache of files that libraries keep."""
    path = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(path))
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder with two shards of bfloat16 weights and other files."""
    folder = tmp_path / "plain" / "teacher"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for shard in SHARDS:
        weight = 0.02 * torch.randn(64, 256, generator=generator)
        save_file({f"{shard}.weight": weight.bfloat16()}, folder / shard)
    (folder / "config.json").write_text(json.dumps({"dim": 256}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """`plain`, packed."""
    folder = Path(shutil.copytree(plain, tmp_path / "packed" / "teacher"))
    pack(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kept(cache: Path) -> list[Path]:
    """What is in the cache: a folder for each content, and what was not finished."""
    return sorted((cache / "turbodit" / "unpacked").iterdir())


# Round trip.


def test_nothing_is_lost(plain: Path, folder: Path, cache: Path) -> None:
    assert not list(folder.glob("*.safetensors"))
    target = unpacked(folder)
    assert contents(target) == contents(plain)
    assert kept(cache) == [target.parent] and target.name == "teacher"
    usual = folder.stat().st_mode
    assert target.stat().st_mode == usual, "others may read it, too"


def test_a_packed_file_is_smaller_and_an_ordinary_xz(plain: Path, folder: Path) -> None:
    for shard in SHARDS:
        content = (folder / f"{shard}.xz").read_bytes()
        assert lzma.decompress(content, format=lzma.FORMAT_XZ) == (plain / shard).read_bytes()
        assert len(content) < 0.8 * (plain / shard).stat().st_size


def test_the_same_weights_give_the_same_bytes(plain: Path, folder: Path) -> None:
    pack(plain)
    assert contents(plain) == contents(folder)
    pack(plain)  # packed already
    assert contents(plain) == contents(folder)


def test_what_is_not_packed_is_returned_as_it_is(plain: Path, cache: Path) -> None:
    for path in (plain, plain / "config.json", plain / "nothing"):
        assert unpacked(path) == path
    assert not cache.exists()


# Once.


def test_a_content_is_unpacked_once(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = unpacked(folder)

    def again(file: Path, target: Path) -> None:
        raise AssertionError(f"{file} was unpacked again")

    monkeypatch.setattr(packed, "_decompress", again)
    assert unpacked(folder) == target
    assert unpacked(Path(shutil.copytree(folder, tmp_path / "copy" / "teacher"))) == target


@pytest.mark.parametrize("changed", ["config.json", "model-1.safetensors.xz"])
def test_another_content_is_kept_elsewhere(folder: Path, cache: Path, changed: str) -> None:
    before = unpacked(folder)
    old = contents(before)
    (folder / changed).write_bytes(lzma.compress(b"new") if changed[-1] == "z" else b"{}")
    after = unpacked(folder)
    assert after != before and contents(before) == old
    assert (after / changed.removesuffix(".xz")).read_bytes() in (b"new", b"{}")


def test_another_name_is_kept(folder: Path, cache: Path) -> None:
    other = folder.with_name("transformer")
    assert unpacked(folder).name == "teacher"
    assert unpacked(Path(shutil.copytree(folder, other))).name == "transformer"
    assert contents(unpacked(other)) == contents(unpacked(folder))


# Several processes, and those that end early.

CHILD = """
import os, signal, sys, time
from pathlib import Path
from turbodit.checkpoints import packed

decompress = packed._decompress

def together(file, target):
    (cache,) = (parent for parent in target.parents if parent.name == "unpacked")
    while len(list(cache.iterdir())) < 2:  # until the other is under way
        if any(entry.name[0] != "." for entry in cache.iterdir()):  # or done
            break
        time.sleep(0.01)
    decompress(file, target)

def killed(file, target):
    target.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

packed._decompress = globals()[sys.argv[1]]
print(packed.unpacked(Path(sys.argv[2])))
"""


def child(how: str, folder: Path, cache: Path) -> subprocess.Popen[str]:
    """A process that unpacks `folder`."""
    environment = os.environ | {"HF_ASSETS_CACHE": str(cache)}
    command = [sys.executable, "-c", CHILD, how, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once(plain: Path, folder: Path, cache: Path) -> None:
    processes = [child("together", folder, cache) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [str(unpacked(folder))] * 2
    assert contents(Path(outputs[0])) == contents(plain)
    assert kept(cache) == [Path(outputs[0]).parent]


def test_a_killed_process_leaves_nothing_that_is_used(
    plain: Path, folder: Path, cache: Path
) -> None:
    process = child("killed", folder, cache)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (left,) = kept(cache)
    assert ".partial-" in left.name
    target = unpacked(folder)
    assert contents(target) == contents(plain)
    assert kept(cache) == [left, target.parent]


# What goes wrong.


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "not xz"])
def test_a_damaged_file_is_named(folder: Path, cache: Path, damage: str) -> None:
    shard = folder / f"{SHARDS[1]}.xz"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    bad = {"truncated": content[:100], "changed": content, "empty": b"", "not xz": b"weights"}
    shard.write_bytes(bad[damage])
    with pytest.raises(
        ValueError, match=r"packed/teacher/model-2\.safetensors\.xz is truncated or"
    ):
        unpacked(folder)
    assert kept(cache) == []


def test_a_cache_that_cannot_be_written(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = rf"cannot unpack {folder} into {cache}/turbodit/unpacked: .*set HF_ASSETS_CACHE"
    cache.touch()  # neither is this a folder
    with pytest.raises(OSError, match=message):
        unpacked(folder)
    cache.unlink()

    def mkdir(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as context:
        context.setattr(Path, "mkdir", mkdir)
        with pytest.raises(PermissionError, match=message):
            unpacked(folder)
    assert not cache.exists()


def test_a_full_disk(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copyfileobj(source: object, sink: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", copyfileobj)
    with pytest.raises(OSError, match=rf"into {cache}/turbodit/unpacked: No space left on device"):
        unpacked(folder)
    assert kept(cache) == []


# Readers.


def test_a_packed_transformer_is_read_as_any_other(cache: Path, tmp_path: Path) -> None:
    model = ModelFolder(tiny_diffusers_folder(tmp_path / "model"))
    (part,) = model.transformers
    before, config = load_transformer(part).state_dict(), model.config()
    pack(part)
    assert model.stored_transformers == (part,)
    (found,) = find_model(model.path).transformers
    assert cache in found.parents and model.config() == config
    quantize_file(model.path, tmp_path / "quantised", "int8-channel")
    assert (tmp_path / "quantised" / "transformer" / "config.json").exists()
    merge_difference(part, part, part, tmp_path / "merged")
    for source in (found, part, tmp_path / "merged"):
        after = load_transformer(source).state_dict()
        assert after.keys() == before.keys()
        assert all(tensor.equal(before[name]) for name, tensor in after.items())
