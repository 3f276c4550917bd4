"""What is installed, which devices there are, and what runs on them or why not."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from turbodit import __version__, quantization
from turbodit.attention import BACKENDS, available
from turbodit.checkpoints import find_model
from turbodit.checkpoints.packed import PACKED

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "av",
    "ftfy",
    "tyro",
    "rich",
)
GIB = 2**30


def diagnose() -> dict[str, Any]:
    """All findings as plain values for JSON."""
    gpus = _gpus()
    return {
        "turbodit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "gpus": gpus,
        "no_gpu": None if gpus else _why_no_gpu(),
        "attention": {d: _attention(d) for d in ("cpu", *(gpu["device"] for gpu in gpus))},
        "linear": {d: _linear(d) for d in ("cpu", *(gpu["device"] for gpu in gpus))},
        "embedded_model": _embedded_model(),
        "video": _video(),
    }


def show(findings: dict[str, Any], console: Console) -> None:
    """Print the findings as tables."""
    console.print(
        f"turbodit {findings['turbodit']}, Python {findings['python']}, {findings['platform']}"
    )
    console.print(_packages_table(findings["packages"]))
    console.print(_devices_table(findings))
    console.print(_verdicts_table("Attention", "back-end", findings["attention"]))
    console.print(_verdicts_table("8-bit linear layers", "format", findings["linear"]))
    console.print(f"Embedded model: {_embedded_line(findings['embedded_model'])}", highlight=False)
    console.print(f"Video: {_video_line(findings['video'])}", highlight=False)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    details = _linux_cpu_details()
    return {
        "name": details.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        # Where bfloat16 is native, the CPU path is several times faster in it.
        "bf16": [flag for flag in ("amx_bf16", "avx512_bf16") if flag in details.get("flags", "")],
        "memory_gib": _memory_gib(),
    }


def _linux_cpu_details() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    return dict(re.findall(r"^(.+?)\s*:\s*(.*)$", first, flags=re.MULTILINE))


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / GIB, 1),
            }
        )
    return found


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is a CPU build"
    return f"this PyTorch is built for CUDA {torch.version.cuda}, but finds no device or driver"


def _attention(device: str) -> dict[str, dict[str, Any]]:
    verdicts = {name: available(name, device) for name in BACKENDS}
    return {name: {"runs": runs, "note": note} for name, (runs, note) in verdicts.items()}


def _linear(device: str) -> dict[str, dict[str, Any]]:
    verdicts = {name: quantization.available(name, device) for name in quantization.FORMATS}
    return {name: {"runs": runs, "note": note} for name, (runs, note) in verdicts.items()}


def _embedded_model() -> dict[str, Any]:
    """The student and its teacher, which share all but the transformer."""
    folder, teacher = find_model("spritewan"), find_model("spritewan-teacher")
    found: dict[str, Any] = {"path": str(folder.path)}
    try:
        transformers = (*folder.stored_transformers, *teacher.stored_transformers)
        parts = (*transformers, folder.vae, folder.text_encoder, folder.tokenizer)
    except (FileNotFoundError, ValueError) as error:  # missing, or damaged
        return found | {"error": str(error)}
    patterns = ("*.safetensors", PACKED)
    files = [path for part in parts for pattern in patterns for path in part.glob(pattern)]
    return found | {"error": None, "weight_bytes": sum(path.stat().st_size for path in files)}


def _video() -> dict[str, Any]:
    import av

    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return {"libavcodec": codec, "libx264": "libx264" in av.codecs_available}


def _packages_table(packages: dict[str, str | None]) -> Table:
    table = Table("package", "version", title="Packages", title_justify="left")
    for name, version in packages.items():
        table.add_row(name, version or "[dim]not installed[/]")
    return table


def _devices_table(findings: dict[str, Any]) -> Table:
    table = Table("device", "name", "memory", "details", title="Devices", title_justify="left")
    cpu = findings["cpu"]
    bf16 = f"bfloat16 native ({', '.join(cpu['bf16'])})" if cpu["bf16"] else "bfloat16 emulated"
    details = f"{cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}, {bf16}"
    table.add_row("cpu", cpu["name"], _gib(cpu["memory_gib"]), details)
    for gpu in findings["gpus"]:
        capability = f"compute capability {gpu['capability']}"
        table.add_row(gpu["device"], gpu["name"], _gib(gpu["memory_gib"]), capability)
    if findings["no_gpu"]:
        table.add_row("cuda", "none", "", findings["no_gpu"])
    return table


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size} GiB"


def _verdicts_table(title: str, kind: str, verdicts: dict[str, dict[str, dict[str, Any]]]) -> Table:
    table = Table("device", kind, "runs", "", title=title, title_justify="left")
    for device, found in verdicts.items():
        for name, verdict in found.items():
            table.add_row(device, name, "yes" if verdict["runs"] else "no", verdict["note"])
    return table


def _embedded_line(model: dict[str, Any]) -> str:
    if model["error"]:
        return f"incomplete: {model['error']}; install turbodit again"
    size = f"{model['weight_bytes'] / 2**20:.1f} MiB of weights in {model['path']}"
    return f"spritewan and spritewan-teacher, {size}"


def _video_line(video: dict[str, Any]) -> str:
    encoder = "libx264 found" if video["libx264"] else "no libx264: mp4 cannot be written"
    return f"libavcodec {video['libavcodec']}, {encoder}"
