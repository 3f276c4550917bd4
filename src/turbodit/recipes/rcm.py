"""Recipes of rCM distillation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from turbodit.recipes.prompts import GENERAL, SPRITEWORLD
from turbodit.training.config import Expert, Method, RCMConfig


def spritewan() -> RCMConfig:
    """The embedded model: the teacher's 20 steps with guidance in four without."""
    return RCMConfig(
        model="spritewan-teacher",
        data=("spriteworld:16",),
        out=Path("runs/spritewan-rcm"),
        steps=4000,
        batch=4,
        lr=5e-5,
        fake_lr=2e-4,
        weight_decay=0.0,
        max_grad_norm=1.0,
        guidance=3.0,
        warmup=150,
        student_every=3,
        checkpointing="none",
        log_every=5,
        save_every=200,
        sample_every=None,
        prompts=SPRITEWORLD,
    )


def wan_1_3b(model: str = "Wan2.1-T2V-1.3B") -> RCMConfig:
    """rCM's own for the 1.3B; good after about 10,000 updates."""
    return RCMConfig(
        model=model,
        out=Path("runs") / f"{model}-rcm",
        steps=10_000,
        batch=1,
        lr=2e-6,
        fake_lr=4e-7,
        p_mean=0.7,
        student_every=5,
        warmup=1000,
        sigma_max=80.0,
        prompts=GENERAL,
    )


def wan_5b(model: str = "Wan2.2-TI2V-5B") -> RCMConfig:
    """As the 1.3B, without published numbers."""
    return RCMConfig(
        model=model,
        out=Path("runs") / f"{model}-rcm",
        steps=10_000,
        batch=1,
        lr=2e-6,
        fake_lr=4e-7,
        context=4,
        prompts=GENERAL,
    )


def wan_14b(
    model: str,
    expert: Expert | None = None,
    method: Method = "rcm",
    sigma_max: float = 200.0,
) -> RCMConfig:
    """rCM's own for the 14B; good after 3,000 to 4,000 updates.

    Args:
        expert: of a model that has two; None: both in one run.
    """
    return RCMConfig(
        model=model,
        expert=expert,
        method=method,
        out=Path("runs") / "-".join([model, *([expert] if expert else []), "rcm"]),
        steps=4000,
        batch=1,
        lr=1e-6,
        fake_lr=1e-7,
        p_mean=1.5,
        student_every=10,
        warmup=0,
        sigma_max=sigma_max,
        context=8,
        prompts=GENERAL,
    )


RCM: dict[str, Callable[[], RCMConfig]] = {
    "spritewan": spritewan,
    "Wan2.1-T2V-1.3B": wan_1_3b,
    "Wan2.1-T2V-14B": lambda: wan_14b("Wan2.1-T2V-14B"),
    "Wan2.1-I2V-14B-480P": lambda: wan_14b("Wan2.1-I2V-14B-480P"),
    "Wan2.1-I2V-14B-720P": lambda: wan_14b("Wan2.1-I2V-14B-720P"),
    "Wan2.1-FLF2V-14B-720P": lambda: wan_14b("Wan2.1-FLF2V-14B-720P"),
    "Wan2.2-T2V-A14B": lambda: wan_14b("Wan2.2-T2V-A14B"),
    "Wan2.2-T2V-A14B-high": lambda: wan_14b("Wan2.2-T2V-A14B", "high-noise", "scm"),
    "Wan2.2-T2V-A14B-low": lambda: wan_14b("Wan2.2-T2V-A14B", "low-noise", "scm"),
    "Wan2.2-I2V-A14B": lambda: wan_14b("Wan2.2-I2V-A14B"),
    "Wan2.2-I2V-A14B-high": lambda: wan_14b("Wan2.2-I2V-A14B", "high-noise", "scm"),
    "Wan2.2-I2V-A14B-low": lambda: wan_14b("Wan2.2-I2V-A14B", "low-noise", "scm"),
    "Wan2.2-TI2V-5B": wan_5b,
}
