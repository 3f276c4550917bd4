"""The table of back-ends: what is refused and why, and that each gives what it says."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from turbodit import attention
from turbodit.attention import BACKENDS, attention_function, available
from turbodit.config import TransformerConfig
from turbodit.model.wan import WanModel

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
# Flash attention of other libraries: (module, function, back-end).
LIBRARIES = [
    ("flash_attn", "flash_attn_func", "flash2"),
    ("flash_attn_interface", "flash_attn_func", "flash3"),
    ("flash_attn.cute", "flash_attn_func", "flash4"),
    ("xformers.ops", "memory_efficient_attention", "xformers"),
]
# What tells that they are installed: (modules, back-end).
MARKS = [
    (("flash_attn/__init__.py", "flash_attn/flash_attn_interface.py"), "flash2"),
    (("flash_attn_interface.py",), "flash3"),
    (("flash_attn/cute/__init__.py", "cutlass/__init__.py"), "flash4"),
    (("xformers/__init__.py",), "xformers"),
]
SHAPE = TransformerConfig(
    dim=128, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=5
)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    lengths = (70, 50, 50)
    return tuple(torch.randn(2, n, 3, 64, generator=generator).to(dtype) for n in lengths)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 9, 0)


def pretend(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    device = SimpleNamespace(name="A device", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)


def install(monkeypatch: pytest.MonkeyPatch, module: str, **content: Any) -> None:
    """A package of that name which holds only `content`."""
    for name in {module, module.split(".")[0]}:
        fake = ModuleType(name)
        fake.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, fake)
    vars(sys.modules[module]).update(content)


def test_the_names_are_those_of_the_documentation() -> None:
    sdpa = "sdpa sdpa-cudnn sdpa-flash sdpa-efficient sdpa-math"
    others = "flash2 flash3 flash4 xformers sage sparge sla sagesla linear"
    assert list(BACKENDS) == f"{sdpa} {others}".split()


@pytest.mark.parametrize("name", ["sdpa", "sdpa-math", "sdpa-flash"])
def test_sdpa_and_its_kernels(name: str) -> None:
    assert available(name, CPU)[0]
    q, k, v = inputs()
    assert relative_error(attention_function(name)(q, k, v), exact(q, k, v)) < 1e-6


def test_one_kernel_is_asked_for_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = attention.dense.sdpa_kernel
    monkeypatch.setattr(attention.dense, "sdpa_kernel", lambda x: asked.append(x) or real(x))
    attention_function("sdpa-math")(*inputs())
    assert asked == [torch.nn.attention.SDPBackend.MATH]


@pytest.mark.parametrize(("module", "function", "name"), LIBRARIES)
@pytest.mark.parametrize("as_tuple", [False, True])
def test_libraries_are_called_as_they_are_installed(
    monkeypatch: pytest.MonkeyPatch, module: str, function: str, name: str, as_tuple: bool
) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out = exact(q, k, v).to(q.dtype)
        return (out, None) if as_tuple and name in ("flash3", "flash4") else out

    install(monkeypatch, module, **{function: call})
    q, k, v = inputs(torch.bfloat16)
    out = attention_function(name)(q, k, v)
    assert torch.equal(out, exact(q, k, v).bfloat16())


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4"])
def test_flash_attention_refuses_float32_before_it_is_imported(name: str) -> None:
    with pytest.raises(ValueError, match=r"float16 and bfloat16, got torch\.float32; sdpa"):
        attention_function(name)(*inputs())


@pytest.mark.parametrize(("files", "name"), MARKS)
def test_what_a_library_misses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, h100: None, files: tuple[str], name: str
) -> None:
    assert available(name, CPU) == (False, "needs a CUDA device")
    monkeypatch.syspath_prepend(tmp_path)
    for file in files:
        runs, reason = available(name, CUDA)
        assert not runs and re.match("needs the package [a-z_.]+: pip install ", reason)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise ImportError('only to be used, not to be looked for')")
        importlib.invalidate_caches()
    assert available(name, CUDA) == (True, BACKENDS[name].description)
    pretend(monkeypatch, 7, 5)
    wanted = "9.0" if name in ("flash3", "flash4") else "8.0"
    reason = f"needs compute capability {wanted}, A device has 7.5"
    assert available(name, CUDA) == (False, reason)


def test_two_libraries_in_one_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, h100: None
) -> None:
    """FlashAttention-4 alone makes a folder `flash_attn`, which is not FlashAttention-2."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    (tmp_path / "cutlass.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert available("flash4", CUDA)[0]
    reason = "needs the package flash_attn.flash_attn_interface: pip install flash-attn"
    assert available("flash2", CUDA) == (False, reason)


OURS = ["sage", "sparge", "sla", "sagesla", "linear"]


@pytest.mark.parametrize("name", OURS)
def test_what_our_kernels_miss(monkeypatch: pytest.MonkeyPatch, h100: None, name: str) -> None:
    assert available(name, CPU)[0] and available(name, CUDA)[0]
    assert available(name, "mps") == (False, "needs a CPU or a CUDA device")
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda package: None)
    assert available(name, CPU)[0]
    assert available(name, CUDA) == (False, "needs the package triton: pip install triton")
    pretend(monkeypatch, 7, 5)
    assert "compute capability 8.0" in available(name, CUDA)[1]


@pytest.mark.parametrize("name", ["sdpa-cudnn", "sdpa-efficient"])
def test_kernels_that_need_a_gpu(h100: None, name: str) -> None:
    assert available(name, CPU) == (False, "needs a CUDA device")
    assert available(name, CUDA)[0]


@pytest.mark.parametrize("name", BACKENDS)
def test_every_back_end_is_built_with_its_settings(name: str) -> None:
    values = {"ratio": 0.25, "variant": "paper", "feature_map": "elu", "block_q": 32, "block_k": 16}
    values |= {"pv_threshold": 20.0, "temporal_heads": [[0], []]}
    settings = {setting: values[setting] for setting in BACKENDS[name].settings}
    built = attention_function(name, head_dim=64, **settings)
    assert callable(built)
    assert isinstance(built, nn.Module) == BACKENDS[name].has_parameters
    with pytest.raises(ValueError, match=f"{name!r} has no setting top; supported: "):
        attention_function(name, head_dim=64, top=3)


@pytest.mark.parametrize("name", OURS)
def test_ours_run_on_a_cpu(name: str) -> None:
    q = torch.randn(1, 150, 2, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = attention_function(name, head_dim=64)(q, q, q)
    assert out.shape == q.shape and out.isfinite().all()


def test_parameters_belong_to_a_layer() -> None:
    with pytest.raises(ValueError, match="'sla' has parameters and needs head_dim"):
        attention_function("sla")
    assert attention_function("sla", head_dim=64) is not attention_function("sla", head_dim=64)


@pytest.mark.parametrize("name", BACKENDS)
def test_sparse_attention_is_not_for_cross_attention(name: str) -> None:
    if name in ("sparge", "sla", "sagesla", "linear"):
        with pytest.raises(ValueError, match=r"not for cross attention; supported: sdpa, .*sage$"):
            attention_function(name, head_dim=64, cross=True)
    else:
        attention_function(name, cross=True)


def test_unknown_back_ends_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"unknown attention .*{', '.join(BACKENDS)}"):
        available("flash9", CPU)


# The model's use of the interface.


def velocity(model: WanModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 3, 8, 8, generator=generator)
    context = torch.randn(1, 5, 8, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([0.5]), context)


def test_sla_has_the_parameter_names_of_published_files() -> None:
    model = WanModel(SHAPE, "sla", {"ratio": 0.5, "block_q": 16, "block_k": 16})
    added = model.state_dict().keys() - WanModel(SHAPE).state_dict().keys()
    prefix = "blocks.{}.self_attn.attn_op.local_attn.proj_l.{}"
    assert added == {prefix.format(i, kind) for i in range(2) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "settings", "bound"),
    [("sage", {}, 0.01), ("sparge", {"ratio": 1.0}, 0.01), ("sla", {"ratio": 1.0}, 1e-4)],
)
def test_the_model_runs_with_each(name: str, settings: dict[str, Any], bound: float) -> None:
    torch.manual_seed(0)
    plain = WanModel(SHAPE)
    plain.init_weights()
    nn.init.normal_(plain.head.head.weight)
    other = WanModel(SHAPE, name, settings)
    other.load_state_dict(plain.state_dict(), strict=False)
    error = relative_error(velocity(other), velocity(plain))
    assert error < bound
    assert error > 0, "the back-end made no difference"
