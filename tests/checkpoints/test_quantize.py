"""Quantising from file to file."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.native_models import native_transformer, save_native_transformer, tiny_native_folder
from tests.tiny_models import TEXT_DIM, tiny_diffusers_folder, tiny_transformer

from turbodit.checkpoints import (
    find_model,
    load_transformer,
    quantize_file,
    save_transformer,
    transformer_config,
)
from turbodit.checkpoints.transformer import config_json
from turbodit.checkpoints.write import write_file
from turbodit.config import PRESETS, TransformerConfig
from turbodit.model.wan import WanModel
from turbodit.quantization import FORMATS, QuantizedLinear, quantize_linears
from turbodit.weights import LazyTensor

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=TEXT_DIM, freq_dim=32
)
PROJ_L = "self_attn.attn_op.local_attn.proj_l"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A transformer in diffusers' layout."""
    tiny_transformer().save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.float().equal(expected[name].float()), name


def quantized(source: Path, format: str, **options: object) -> WanModel:
    """What is expected: the model at `source`, quantised after loading."""
    model = load_transformer(source, dtype=torch.float32, **options)
    quantize_linears(model, format)
    return model


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("name", ["out.safetensors", "some/where/out-v2.1"])
@pytest.mark.parametrize("format", FORMATS)
def test_layouts(layout: str, name: str, format: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / name
    if layout == "original":
        save_native_transformer(source, "i2v", seed=0)
    else:
        tiny_transformer("i2v").save_pretrained(source)
    calls: list[tuple[str, int, int]] = []

    done = quantize_file(source, target, format, progress=lambda *call: calls.append(call))

    expected = quantized(source, format)
    assert_same(load_transformer(target, dtype=torch.float32), expected)
    assert transformer_config(target) == expected.config
    state = expected.state_dict()
    assert done.transformers == (target,) and done.format == format
    assert done.bytes_after == sum(tensor.nbytes for tensor in state.values())
    plain = load_transformer(source, dtype=torch.float32).state_dict()
    assert done.bytes_before == sum(tensor.nbytes for tensor in plain.values())
    assert calls == [("quantize", done, len(state)) for done in range(len(state) + 1)]
    written = load_file(target if target.is_file() else next(target.glob("*.safetensors")))
    to_q = "self_attn.q" if target.is_file() else "attn1.to_q"
    weight = written[f"blocks.1.{to_q}.{QuantizedLinear.weight_name(format)}"]
    assert weight.shape == (24, 24) and weight.dtype.itemsize == 1
    assert written["patch_embedding.weight"].shape == (24, 36, 1, 2, 2)
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_others(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single file with a prefix, half of it in bfloat16, and with sparse-linear attention."""
    state = native_transformer(tiny_transformer())
    size = CONFIG.head_dim
    for block in range(CONFIG.num_layers):
        state[f"blocks.{block}.{PROJ_L}.weight"] = torch.randn(size, size)
        state[f"blocks.{block}.{PROJ_L}.bias"] = torch.randn(size)
    state |= {name: tensor.bfloat16() for name, tensor in state.items() if ".ffn." in name}
    state["patch_embedding.weight"] = state["patch_embedding.weight"].flatten(1)
    source, target = tmp_path / f"model{suffix}", tmp_path / "out.safetensors"
    content = {f"net.{name}": tensor for name, tensor in state.items()}
    (save_file if suffix == ".safetensors" else torch.save)(content, source)
    preset = SimpleNamespace(transformer=CONFIG)
    monkeypatch.setitem(PRESETS, "tiny", preset)

    quantize_file(source, target, "int8-block")

    expected = quantized(source, "int8-block", attention="sla")
    monkeypatch.delitem(PRESETS, "tiny")  # the file says its shape itself
    assert_same(load_transformer(target, dtype=torch.float32, attention="sla"), expected)
    written = load_file(target)
    assert written["blocks.0.ffn.0.bias"].dtype == torch.bfloat16
    assert written["head.head.weight"].dtype == torch.float32


def test_from_8_bits_to_8_bits(folder: Path, tmp_path: Path) -> None:
    quantize_file(folder, tmp_path / "fp8", "fp8")
    quantize_file(tmp_path / "fp8", tmp_path / "copy.safetensors", "fp8")
    quantize_file(tmp_path / "fp8", tmp_path / "int8.safetensors", "int8-channel")
    first = load_transformer(tmp_path / "fp8")
    assert_same(load_transformer(tmp_path / "copy.safetensors"), first)
    assert_same(
        load_transformer(tmp_path / "int8.safetensors"),
        load_transformer(tmp_path / "fp8", linear="int8-channel"),
    )


@pytest.mark.parametrize("layout", ["diffusers", "native"])
@pytest.mark.parametrize("variant", ["t2v", "t2v-a14b"])
def test_whole_models(layout: str, variant: str, tmp_path: Path) -> None:
    write = tiny_diffusers_folder if layout == "diffusers" else tiny_native_folder
    source = write(tmp_path / "model", variant)

    done = quantize_file(source, tmp_path / "out", "int8-channel")

    names = ["transformer", "transformer_2"] if layout == "diffusers" else [""]
    if layout == "native" and variant == "t2v-a14b":
        names = ["high_noise_model", "low_noise_model"]
    names = names[: 2 if variant == "t2v-a14b" else 1]
    assert done.transformers == tuple(tmp_path / "out" / name for name in names)
    for name in names:
        expected = quantized(source / name, "int8-channel")
        assert_same(load_transformer(tmp_path / "out" / name, dtype=torch.float32), expected)
    if layout == "diffusers":
        assert find_model(source).config(done.transformers).experts == len(names)
    single = tmp_path / "out.safetensors"
    if len(names) == 2:
        with pytest.raises(ValueError, match=r"one file, but there are 2 .*give a folder"):
            quantize_file(source, single, "int8-channel")
    else:
        assert quantize_file(source, single, "int8-channel").transformers == (single,)


def test_models_by_name(tmp_path: Path) -> None:
    done = quantize_file("spritewan-teacher", tmp_path / "out", "int8-block")
    assert done.transformers == (tmp_path / "out" / "teacher",)
    assert done.bytes_after < 0.6 * done.bytes_before
    with pytest.raises(FileNotFoundError, match="no weights at"):
        quantize_file(tmp_path / "none.safetensors", tmp_path / "other", "int8-block")
    with pytest.raises(FileNotFoundError, match="no model 'none'"):
        quantize_file("none", tmp_path / "other", "int8-block")


# Outputs that are there, and disks that are full.


def test_what_is_there_stays(folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "out.safetensors", tmp_path / "out"
    for target in (file, out):
        quantize_file(folder, target, "int8-block")
        with pytest.raises(FileExistsError, match=r"out.* exists already; --force"):
            quantize_file(folder, target, "int8-channel")
        assert load_transformer(target).blocks[0].ffn[0].format == "int8-block"
    (out / "notes.txt").write_text("mine")
    for target in (file, out):
        quantize_file(folder, target, "int8-channel", force=True)
        assert load_transformer(target).blocks[0].ffn[0].format == "int8-channel"
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    quantize_file(folder, tmp_path / "empty", "int8-block")


@pytest.mark.parametrize("force", [True, False])
def test_targets_that_are_refused(force: bool, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    for target, kind, message in (
        (folder, ValueError, "is what is to be quantised"),
        (tmp_path / "folder.safetensors", FileExistsError, "is a folder; refusing"),
        (tmp_path / "file", FileExistsError, "is a file; refusing"),
        (tmp_path / "out.pth", ValueError, "is a .safetensors file or a folder"),
    ):
        with pytest.raises(kind, match=message):
            quantize_file(folder, target, "int8-block", force=force)
    load_transformer(folder)


def test_the_source_is_not_replaced_by_its_parts(tmp_path: Path) -> None:
    source = tiny_diffusers_folder(tmp_path / "model")
    with pytest.raises(ValueError, match="is what is to be quantised"):
        quantize_file(source, source, "int8-block", force=True)


def test_other_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown 8-bit format 'int4'"):
        quantize_file(folder, tmp_path / "out", "int4")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        quantize_file(folder, tmp_path / "out", "fp8", device="gpu")
    with pytest.raises(ValueError, match=r"'cuda:99' was asked for, but PyTorch .* finds"):
        quantize_file(folder, tmp_path / "out", "fp8", device="cuda:99")
    state = native_transformer(tiny_transformer())
    del state["blocks.1.ffn.2.bias"]
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: blocks\.1\.ffn\.2\.bias"):
        quantize_file(folder, tmp_path / "out", "fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_a_failure_leaves_nothing(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entries() -> set[Path]:
        return set(tmp_path.rglob("*"))

    before = entries()
    with monkeypatch.context() as patch:
        usage = SimpleNamespace(free=2**20)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"needs 1,[0-9]{3},[0-9]{3} bytes, but 1,048,576 bytes"):
            quantize_file(folder, tmp_path / name, "int8-block")
    assert entries() == before

    from turbodit.checkpoints import write

    to_bytes, left = write._bytes, 20

    def full(*args: object) -> memoryview:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        return to_bytes(*args)

    files = {"out": "out/diffusion_pytorch_model.safetensors"}
    said = re.escape(f"cannot write {tmp_path / files.get(name, name)}: no space left; it has ")
    with monkeypatch.context() as patch:
        patch.setattr(write, "_bytes", full)
        with pytest.raises(OSError, match=said + "[0-9,]+ bytes"):
            quantize_file(folder, tmp_path / name, "int8-block")
    assert entries() == before

    model = load_transformer(folder, dtype=torch.float32)
    model.blocks[1].ffn[2].weight.data[0, 0] = torch.nan
    save_transformer(model, folder)
    before = entries()
    with pytest.raises(ValueError, match=r"transformer: blocks\.1\.ffn\.2: .*NaN or infinite"):
        quantize_file(folder, tmp_path / name, "int8-block")
    assert entries() == before


KILLED = """
import os, signal, sys
from turbodit.checkpoints import quantize_file

def progress(stage, done, total):
    if done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

for target in sys.argv[2:]:
    child = os.fork()
    if not child:
        quantize_file(sys.argv[1], target, "int8-block", progress=progress)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals")
def test_a_killed_process_leaves_no_target(folder: Path, tmp_path: Path) -> None:
    targets = [tmp_path / "out.safetensors", tmp_path / "out"]
    command = [sys.executable, "-c", KILLED, str(folder), *map(str, targets)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == 2 * [str(-signal.SIGKILL)]
    assert len(list(tmp_path.glob(".*"))) == 2
    for target in targets:
        assert not target.exists()
        quantize_file(folder, target, "int8-block")
        load_transformer(target)
    assert not list(tmp_path.glob(".*"))


# Memory.

MEASURED = """
import re, sys
from pathlib import Path
import turbodit.checkpoints.quantize as quantize

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

source, small, target = sys.argv[1:]
quantize.quantize_file(small, target, "int8-block")  # code that is loaded when it is first used
before = peak()
quantize.quantize_file(source, target, "int8-block", force=True)
print(1024 * (peak() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_model_is_never_in_memory_as_a_whole(folder: Path, tmp_path: Path) -> None:
    """350 MB become 180; the largest layer has 8, and ten times as much while it is quantised."""
    config = TransformerConfig(
        dim=1024, ffn_dim=4096, num_heads=8, num_layers=10, text_dim=TEXT_DIM, freq_dim=32
    )
    with torch.device("meta"):
        state = WanModel(config).state_dict()
    shapes = {tuple(tensor.shape) for tensor in state.values()}
    random = {shape: LazyTensor.of(torch.randn(shape).bfloat16()) for shape in shapes}
    weights = {name: random[tuple(tensor.shape)] for name, tensor in state.items()}
    source, target = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    write_file(source, weights, config_json(config, None))
    size = source.stat().st_size
    assert size > 340e6

    command = [sys.executable, "-c", MEASURED, str(source), str(folder), str(target)]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    halved = target.stat().st_size / size
    source.unlink()
    target.unlink()

    assert 0.5 < halved < 0.55
    assert taken < 0.5 * size, f"{taken:,} bytes"
