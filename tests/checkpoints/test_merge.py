"""Merging from files to a file."""

from __future__ import annotations

import json
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
from tests.native_models import native_transformer, save_native_transformer
from tests.tiny_models import TEXT_DIM, tiny_diffusers_folder, tiny_transformer

from turbodit.checkpoints import load_transformer, quantize_file, transformer_config
from turbodit.checkpoints.merge import compare, merge_difference, merge_loras
from turbodit.checkpoints.transformer import config_json
from turbodit.checkpoints.write import CONFIG_KEY, write_file
from turbodit.config import PRESETS, TransformerConfig
from turbodit.model.wan import WanModel
from turbodit.weights import LazyTensor, LazyWeights, read_metadata

State = dict[str, torch.Tensor]

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=TEXT_DIM, freq_dim=32
)
I2V = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=TEXT_DIM, freq_dim=32,
    in_dim=36, image_dim=16,
)  # fmt: skip
PROJ_L = "self_attn.attn_op.local_attn.proj_l"


def state_of(variant: str, seed: int, dtype: torch.dtype = torch.float32) -> State:
    """A random model under original names."""
    state = native_transformer(tiny_transformer(variant, seed))
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def with_branch(state: State, seed: int = 7) -> State:
    """`state` as SLA training leaves it: with a float32 proj_l in every block."""
    generator = torch.Generator().manual_seed(seed)
    size = CONFIG.head_dim
    branch = {}
    for block in range(CONFIG.num_layers):
        branch[f"blocks.{block}.{PROJ_L}.weight"] = torch.randn(size, size, generator=generator)
        branch[f"blocks.{block}.{PROJ_L}.bias"] = torch.randn(size, generator=generator)
    return state | branch


def save(path: Path, state: State, config: TransformerConfig = CONFIG, **stated: object) -> Path:
    """One of our own files."""
    weights = {name: LazyTensor.of(tensor) for name, tensor in state.items()}
    write_file(path, weights, config_json(config, None) | stated)
    return path


def emulated(base: torch.Tensor, old: torch.Tensor, new: torch.Tensor, w: float) -> torch.Tensor:
    """The formula in float64, rounded to float32 after each operation."""
    base64, old64, new64 = (x.double() for x in (base, old, new))
    difference = (new64 - old64).float().double()
    scaled = (difference * torch.tensor(w).double()).float().double()  # w is float32, too
    return (base64 + scaled).float().to(base.dtype)


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A student, the original model, and that tuned with SLA."""
    return (
        save(tmp_path / "student.safetensors", state_of("t2v", 1, torch.bfloat16)),
        save(tmp_path / "original.safetensors", state_of("t2v", 0)),
        save(tmp_path / "sla.safetensors", with_branch(state_of("t2v", 2, torch.bfloat16))),
    )


@pytest.mark.parametrize("weight", [1.0, 0.5, -0.3, 0.0])
def test_arithmetic(weight: float, three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    calls: list[tuple[str, int, int]] = []

    report = merge_difference(
        *three, target, weight=weight, progress=lambda *call: calls.append(call)
    )

    base, old, new = map(load_file, three)
    written = load_file(target)
    assert written.keys() == new.keys()
    for name, tensor in base.items():
        expected = emulated(tensor, old[name], new[name], weight)
        assert written[name].dtype == torch.bfloat16 and written[name].equal(expected), name
    for name in new.keys() - base.keys():
        assert written[name].dtype == torch.float32 and written[name].equal(new[name]), name
    assert set(report.merged) == base.keys()
    assert set(report.copied) == new.keys() - base.keys()
    assert report.counts() == {"merged": len(base), "copied": 4, "kept": 0, "missing": 0}
    assert calls == [("merge", done, len(new)) for done in range(len(new) + 1)]
    model = load_transformer(target, attention="sla")
    assert model.config == CONFIG


def test_every_readable_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A diffusers folder, a PyTorch file as of TurboDiffusion, and ComfyUI's; to a folder."""
    tiny_transformer("t2v", 1).save_pretrained(tmp_path / "base")
    sla = with_branch(state_of("t2v", 2))
    sla["patch_embedding.weight"] = sla["patch_embedding.weight"].flatten(1)
    torch.save({f"net.{name}": tensor for name, tensor in sla.items()}, tmp_path / "sla.pth")
    comfy = {f"model.diffusion_model.{n}": t for n, t in state_of("t2v", 0).items()}
    save_file(comfy, tmp_path / "comfy.safetensors")
    monkeypatch.setitem(PRESETS, "tiny", SimpleNamespace(transformer=CONFIG))
    sources = (tmp_path / name for name in ("base", "comfy.safetensors", "sla.pth"))

    report = merge_difference(*sources, tmp_path / "out", weight=0.5)

    assert len(report.copied) == 4 and not report.kept and not report.missing
    got = load_transformer(tmp_path / "out", dtype=torch.float32, attention="sla").state_dict()
    base, old, new = (state_of("t2v", seed) for seed in (1, 0, 2))
    for name in base:
        assert got[name].equal(emulated(base[name], old[name], new[name], 0.5)), name
    stored = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert "blocks.0.attn1.to_q.weight" in stored
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention"] == "sla"


def test_a_text_to_video_difference_onto_an_image_to_video_model(tmp_path: Path) -> None:
    base = save(tmp_path / "i2v.safetensors", state_of("i2v", 1), I2V)
    old = save(tmp_path / "t2v.safetensors", state_of("t2v", 0))
    new = save(tmp_path / "sla.safetensors", with_branch(state_of("t2v", 2)))

    report = merge_difference(base, old, new, tmp_path / "out.safetensors")

    written, before = load_file(tmp_path / "out.safetensors"), load_file(base)
    shapes = "shape (24, 36, 1, 2, 2) in base, (24, 16, 1, 2, 2) in diff-base, (24, 16, 1, 2, 2)"
    assert report.kept.pop("patch_embedding.weight") == f"{shapes} in diff-target"
    assert set(report.kept.values()) == {"not in diff-base and diff-target"}
    assert all("img" in name for name in report.kept) and len(report.kept) == 2 * 5 + 8
    for name in (*report.kept, "patch_embedding.weight"):
        assert written[name].equal(before[name])
    assert "patch_embedding.bias" in report.merged and len(report.copied) == 4
    assert transformer_config(tmp_path / "out.safetensors") == I2V
    load_transformer(tmp_path / "out.safetensors", attention="sla")

    # And the other way: the base has no place for what CLIP needs.
    report = merge_difference(old, base, base, tmp_path / "other.safetensors")
    assert set(report.missing.values()) == {"not in base"}
    assert len(report.missing) == 2 * 5 + 8 and list(report.kept) == ["patch_embedding.weight"]
    assert load_file(tmp_path / "other.safetensors").keys() == load_file(old).keys()


def test_what_becomes_of_a_linear_branch() -> None:
    """Copied where the base has none, merged where all have one, else the base's."""

    def weights(*names: str) -> LazyWeights:
        return {name: LazyTensor.of(torch.zeros(2)) for name in names}

    w, p = "blocks.0.ffn.0.bias", f"blocks.0.{PROJ_L}.bias"
    assert compare(weights(w), weights(w), weights(w, p)).copied == (p,)
    assert compare(weights(w), weights(w, p), weights(w, p)).copied == (p,)
    assert compare(weights(w, p), weights(w, p), weights(w, p)).merged == (w, p)
    assert compare(weights(w, p), weights(w), weights(w, p)).kept == {p: "not in diff-base"}
    assert compare(weights(w), weights(w, p), weights(w)).missing == {p: "not in base"}


def test_the_result_says_what_it_is(tmp_path: Path) -> None:
    """The attention of the linear branch, the sampler of the base."""
    sla = {"attention": "sla", "attention_settings": {"ratio": 0.15}}
    base = save(tmp_path / "a.safetensors", state_of("t2v", 1), sampling={"steps": 4})
    old = save(tmp_path / "b.safetensors", state_of("t2v", 0))
    new = save(tmp_path / "c.safetensors", with_branch(state_of("t2v", 2)), **sla)

    def stated(name: str) -> dict[str, object]:
        content = json.loads(read_metadata(tmp_path / name)[CONFIG_KEY])
        chosen = ("attention", "attention_settings", "sampling", "in_channels")
        return {key: content[key] for key in chosen if key in content}

    merge_difference(base, old, new, tmp_path / "out.safetensors")
    assert stated("out.safetensors") == sla | {"sampling": {"steps": 4}, "in_channels": 16}
    merge_difference(new, old, base, tmp_path / "other.safetensors")  # now the base has it
    assert stated("other.safetensors") == sla | {"in_channels": 16}
    merge_difference(old, base, base, tmp_path / "plain.safetensors")
    assert stated("plain.safetensors") == {"in_channels": 16}


# What is refused.


def test_models_that_do_not_go_together(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, old, new = three
    wide = TransformerConfig(
        dim=48, ffn_dim=40, num_heads=2, num_layers=2, text_dim=TEXT_DIM, freq_dim=32
    )
    other = save(tmp_path / "wide.safetensors", WanModel(wide).state_dict(), wide)
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"diff-base .*wide.* another arch.*dim 48, expected 24"):
        merge_difference(base, other, new, out)
    with pytest.raises(ValueError, match=r"the weight of the difference must be finite, got nan"):
        merge_difference(base, old, new, out, weight=float("nan"))
    model = tiny_diffusers_folder(tmp_path / "a14b", "t2v-a14b")
    with pytest.raises(ValueError, match=r"base .*has 2 transformers; give one .*transformer_2"):
        merge_difference(model, old, new, out)
    merge_difference(model / "transformer_2", old, new, out)


def test_broken_files(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, old, new = three
    out = tmp_path / "out.safetensors"
    short = tmp_path / "short.safetensors"
    short.write_bytes(new.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"short.safetensors is truncated"):
        merge_difference(base, old, short, out)
    state = load_file(old)
    del state["blocks.1.ffn.2.bias"]
    with pytest.raises(ValueError, match=r"1 missing: blocks\.1\.ffn\.2\.bias"):
        merge_difference(base, save(short, state), new, out)
    state = load_file(old) | {"blocks.1.ffn.2.gain": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 unexpected: blocks\.1\.ffn\.2\.gain"):
        merge_difference(base, save(short, state), new, out)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        merge_difference(base, tmp_path / "none.safetensors", new, out)
    with pytest.raises(FileNotFoundError, match="no model 'none'"):
        merge_difference("none", old, new, out)
    state = load_file(new)
    state["blocks.0.ffn.0.weight"][0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.0\.weight: .* NaN or infinite"):
        merge_difference(base, old, save(short, state), out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("format", ["int8-block", "fp8"])
def test_quantised_files(format: str, three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, old, new = three
    quantize_file(new, tmp_path / "quantised", format)
    with pytest.raises(ValueError, match=r"diff-target .*is quantised \(.* `turbodit quantize"):
        merge_difference(base, old, tmp_path / "quantised", tmp_path / "out")


def test_scaled_fp8_files(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """ComfyUI's, whose weights are read as float32 elsewhere."""
    base, old, new = three
    state = load_file(old)
    weight = state["blocks.0.ffn.0.weight"]
    state["blocks.0.ffn.0.weight"] = weight.to(torch.float8_e4m3fn)
    state["blocks.0.ffn.0.scale_weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"diff-base .*is quantised .*float8_e4m3fn"):
        merge_difference(base, save(tmp_path / "fp8.safetensors", state), new, tmp_path / "out")


# Outputs.


def test_what_is_there_stays(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for target in (tmp_path / "out.safetensors", tmp_path / "out"):
        merge_difference(*three, target)
        with pytest.raises(FileExistsError, match=r"out.* exists already; --force"):
            merge_difference(*three, target, weight=0.5)
        merge_difference(*three, target, weight=0.5, force=True)
    first, second = (load_transformer(p, attention="sla").state_dict() for p in
                     (tmp_path / "out.safetensors", tmp_path / "out"))  # fmt: skip
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    with pytest.raises(ValueError, match="is what is to be merged"):
        merge_difference(*three, three[2], force=True)
    with pytest.raises(ValueError, match=r"a merged model is a \.safetensors file or a folder"):
        merge_difference(*three, tmp_path / "out.pth")


def test_no_source_is_replaced(tmp_path: Path) -> None:
    """Neither by its own file, nor made unreadable by another beside it; links are followed."""
    models = [tmp_path / name for name in "abc"]
    for seed, model in enumerate(models):
        tiny_transformer("t2v", seed).save_pretrained(model)
    name = "diffusion_pytorch_model.safetensors"
    file = models[0] / name
    (tmp_path / "link").symlink_to(models[2])
    (tmp_path / "link.safetensors").symlink_to(file)
    before = {path: path.read_bytes() for path in tmp_path.glob("?/*")}
    others = models[1:]
    for base, target, message in (
        (models[0], file, rf"a/{name} is a file of .*a, which is to be merged"),
        (models[0], models[1] / name, "is a file of .*b, which"),
        (models[0], tmp_path / "link" / name, "is a file of .*c, which"),
        (models[0], tmp_path / "link.safetensors", "is a file of .*a, which"),
        (models[0], models[0] / "new.safetensors", r"new\.safetensors lies in .*a, which"),
        (models[0], tmp_path / "link", "link is what is to be merged"),
        (file, models[0], f"a holds .*{name}, which is to be merged"),
        (tmp_path / "link.safetensors", models[0], "a holds .*, which is to be merged"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_difference(base, *others, target, force=True)
    with pytest.raises(ValueError, match=r"is a file of .*a, which is to be quantised"):
        quantize_file(models[0], file, "int8-channel", force=True)
    assert {path: path.read_bytes() for path in tmp_path.glob("?/*")} == before
    merge_difference(models[0], *others, models[0] / "sub")
    merge_difference(models[0], *others, tmp_path / "own.safetensors")
    merge_difference(tmp_path / "own.safetensors", *others, tmp_path / "beside.safetensors")


def test_a_full_disk(
    three: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    merge_difference(*three, target)
    before = load_file(target / "diffusion_pytorch_model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
        with pytest.raises(OSError, match=r"needs 1,[0-9]{3},[0-9]{3} bytes, but 1,048,576 bytes"):
            merge_difference(*three, tmp_path / "other")

    from turbodit.checkpoints import write

    to_bytes, left = write._bytes, 20

    def full(*args: object) -> memoryview:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        return to_bytes(*args)

    monkeypatch.setattr(write, "_bytes", full)
    name = re.escape(str(target / "diffusion_pytorch_model.safetensors"))
    with pytest.raises(OSError, match=rf"cannot write {name}: no space left"):
        merge_difference(*three, target, weight=0.5, force=True)
    after = load_file(target / "diffusion_pytorch_model.safetensors")
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert not (tmp_path / "other").exists() and not list(target.glob(".*"))


# Another process: killed, and measured.

PROCESS = """
import os, re, signal, sys
from pathlib import Path
from turbodit.checkpoints.merge import merge_difference

def kill_half_way(stage, done, total):
    if done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

small, large, (target, killed) = sys.argv[1:4], sys.argv[4:7], sys.argv[7:]
merge_difference(*small, target)  # code that is loaded when it is first used
child = os.fork()
if not child:
    merge_difference(*small, killed, progress=kill_half_way)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
before = peak()
merge_difference(*large, target, force=True)
print(1024 * (peak() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_and_a_killed_process(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Three models of 50 MB make one of 50; the largest layer has 3, in float32 6."""
    config = TransformerConfig(
        dim=512, ffn_dim=2048, num_heads=4, num_layers=6, text_dim=TEXT_DIM, freq_dim=32
    )
    with torch.device("meta"):
        state = WanModel(config).state_dict()
    shapes = {tuple(tensor.shape) for tensor in state.values()}
    random = {shape: torch.randn(shape).bfloat16() for shape in shapes}
    weights = {name: random[tuple(tensor.shape)] for name, tensor in state.items()}
    large = save(tmp_path / "large.safetensors", weights, config)
    size = large.stat().st_size
    assert size > 50e6
    targets = [tmp_path / "out.safetensors", tmp_path / "killed"]
    command = [sys.executable, "-c", PROCESS, *map(str, (*three, large, large, large, *targets))]
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    merged = targets[0].stat().st_size
    for path in (large, targets[0]):
        path.unlink()

    status, taken = map(int, done)
    assert status == -signal.SIGKILL and not targets[1].exists()
    merge_difference(*three, targets[1])
    load_transformer(targets[1], attention="sla")
    assert abs(merged - size) < 1e4
    assert taken < 0.6 * size, f"{taken:,} bytes"


def test_native_folders(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 0), ("c", 2)):
        save_native_transformer(tmp_path / name, "i2v", seed)
    report = merge_difference(*(tmp_path / name for name in "abc"), tmp_path / "out")
    assert not (report.kept or report.missing or report.copied)
    assert transformer_config(tmp_path / "out") == I2V


def test_no_lora(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merge_loras(three[0], [], tmp_path / "out")
