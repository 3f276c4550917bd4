"""Full-size models with random weights: do sizes and memory fit, and what does each stage take?

    python benchmarks/full_size.py --out benchmarks/results

1. Wan2.1-T2V-1.3B at 480x832, 81 frames: one whole generation to an mp4 (random text
   embeddings, VAE of real size).
2. Wan2.1-T2V-14B at 720x1280, 81 frames: one forward pass of the DiT.

Writes `<out>/<date>-<device>-full-size.json`. One run, not a median: this shows that sizes
and memory are right, not how fast we can be.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import tyro

from turbodit.config import PRESETS
from turbodit.random_models import random_pipeline


@dataclass(frozen=True)
class Options:
    out: Path
    steps: int = 50
    device: str = "cuda"


def generation(options: Options) -> dict[str, Any]:
    """Seconds of each stage and peak memory of one 480p clip of the 1.3B model."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    pipe = random_pipeline(PRESETS["Wan2.1-T2V-1.3B"], device=options.device)
    loaded = time.perf_counter() - start
    video = pipe("a clip of noise", steps=options.steps, seed=0)
    start = time.perf_counter()
    video.save(options.out / "full-size-1.3b-480p.mp4", force=True)
    return {
        "model": "Wan2.1-T2V-1.3B",
        "frames": list(video.frames.shape),
        "settings": video.settings,
        "seconds": {"load": loaded, **video.timings, "write": time.perf_counter() - start},
        "peak_gib": _peak_gib(),
    }


@torch.no_grad()
def one_step(options: Options) -> dict[str, Any]:
    """Seconds and peak memory of one forward pass of the 14B model at 720p."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = PRESETS["Wan2.1-T2V-14B"]
    pipe = random_pipeline(config, device=options.device)
    model = pipe.transformers["transformer"]
    dit = config.transformer
    latents = torch.randn(1, *config.latent_shape(81, 720, 1280), device=options.device)
    context = torch.randn(1, dit.text_len, dit.text_dim, device=options.device)
    t = torch.tensor([0.7], device=options.device)
    seconds = []
    for _ in range(2):  # the first one also warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        velocity = model(latents, t, context)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "model": config.name,
        "tokens": config.token_count(81, 720, 1280),
        "velocity": list(velocity.shape),
        "finite": bool(velocity.isfinite().all()),
        "first_seconds": seconds[0],
        "seconds": seconds[1],
        "peak_gib": _peak_gib(),
    }


def _peak_gib() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name()
    results = {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "generation": generation(options),
        "one_step": one_step(options),
    }
    name = f"{date.today()}-{device.replace(' ', '-').lower()}-full-size.json"
    (options.out / name).write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
