"""Recipes of SLA fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from turbodit.recipes.prompts import GENERAL, SPRITEWORLD
from turbodit.training.config import Expert, SLAConfig


def spritewan() -> SLAConfig:
    """The embedded model: a first look on a CPU; on a GPU with a batch of 128, minutes."""
    return SLAConfig(
        model="spritewan-teacher",
        data=("spriteworld:16",),
        out=Path("runs/spritewan-sla"),
        steps=2000,
        batch=4,
        lr=2e-4,
        weight_decay=0.0,
        max_grad_norm=1.0,
        p_mean=0.7,
        checkpointing="none",
        log_every=5,
        save_every=200,
        sample_every=None,
        prompts=SPRITEWORLD,
    )


def wan_1_3b(model: str = "Wan2.1-T2V-1.3B") -> SLAConfig:
    """TurboDiffusion's own: 1e-5, four samples a GPU, top-k ratio 0.1."""
    return SLAConfig(
        model=model,
        out=Path("runs") / f"{model}-sla",
        steps=2000,
        batch=4,
        lr=1e-5,
        prompts=GENERAL,
    )


def wan_5b(model: str = "Wan2.2-TI2V-5B") -> SLAConfig:
    """As the 1.3B; a third of the samples from a given first frame."""
    return SLAConfig(
        model=model,
        out=Path("runs") / f"{model}-sla",
        steps=2000,
        batch=1,
        accumulate=4,
        lr=1e-5,
        prompts=GENERAL,
    )


def wan_14b(model: str, expert: Expert | None = None) -> SLAConfig:
    """TurboDiffusion's: on 32 GPUs, 8 of which share a sample's tokens."""
    return SLAConfig(
        model=model,
        expert=expert,
        out=Path("runs") / "-".join([model, *([expert] if expert else []), "sla"]),
        steps=1000,
        batch=1,
        accumulate=32,
        lr=1e-5,
        context=8,
        prompts=GENERAL,
    )


SLA: dict[str, Callable[[], SLAConfig]] = {
    "spritewan": spritewan,
    "Wan2.1-T2V-1.3B": wan_1_3b,
    "Wan2.1-T2V-14B": lambda: wan_14b("Wan2.1-T2V-14B"),
    "Wan2.1-I2V-14B-480P": lambda: wan_14b("Wan2.1-I2V-14B-480P"),
    "Wan2.1-I2V-14B-720P": lambda: wan_14b("Wan2.1-I2V-14B-720P"),
    "Wan2.1-FLF2V-14B-720P": lambda: wan_14b("Wan2.1-FLF2V-14B-720P"),
    "Wan2.2-T2V-A14B-high": lambda: wan_14b("Wan2.2-T2V-A14B", "high-noise"),
    "Wan2.2-T2V-A14B-low": lambda: wan_14b("Wan2.2-T2V-A14B", "low-noise"),
    "Wan2.2-I2V-A14B-high": lambda: wan_14b("Wan2.2-I2V-A14B", "high-noise"),
    "Wan2.2-I2V-A14B-low": lambda: wan_14b("Wan2.2-I2V-A14B", "low-noise"),
    "Wan2.2-TI2V-5B": wan_5b,
}
