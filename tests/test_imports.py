"""Imports point down: a module may only use what lies below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import turbodit

SOURCE = Path(turbodit.__file__).parent

# From the bottom up. A module may import lower layers and its own package.
LAYERS = (
    ("config", "device", "noise_schedule", "images", "video", "kernels"),
    ("sampling", "offload", "prompt_cache", "weights", "request", "attention", "quantization"),
    ("model", "text_encoder", "image_encoder", "vae", "plan"),
    ("checkpoints", "conditioning", "graph"),
    ("pipeline", "distributed"),
    ("random_models",),
    ("batch", "training", "benchmark", "evaluation", "serving", "integrations"),
    ("recipes",),
    ("spritewan", "doctor"),
    ("cli",),
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
ALLOWED_IN_KERNELS = {"torch", "triton"} | set(sys.stdlib_module_names)
PURE = ("config", "noise_schedule", "images", "video", "request", "batch", "plan", "cli")


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def unit(path: Path) -> str:
    """The module or package directly under turbodit that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module))
            if node.module == "turbodit":
                names |= {f"turbodit.{alias.name}" for alias in node.names}
    return names


def units_used(path: Path) -> set[str]:
    used = {name.split(".")[1] for name in imports(path) if name.startswith("turbodit.")}
    return {name for name in used if name in RANK} - {unit(path)}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    assert unit(path) in RANK, f"say in LAYERS where {unit(path)} belongs"
    upwards = [name for name in units_used(path) if RANK[name] >= RANK[unit(path)]]
    assert not upwards, f"{unit(path)} must not import {upwards}"


def test_kernels_need_nothing_but_torch_and_triton():
    for path in (SOURCE / "kernels").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - {"turbodit"}
        assert outside <= ALLOWED_IN_KERNELS, path


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", PURE)
def test_what_needs_no_torch_imports_none(module):
    assert "torch" not in modules_after(f"import turbodit.{module}")


def test_importing_the_package_is_quick():
    heavy = {"torch", "diffusers", "transformers", "numpy", "av", "PIL", "tyro", "rich"}
    assert not heavy & modules_after("import turbodit")


def test_pipeline_leaves_the_libraries_for_later():
    loaded = modules_after("import turbodit.pipeline")
    assert not {"diffusers", "transformers", "av", "tyro"} & loaded
