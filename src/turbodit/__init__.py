"""TurboDiT: Wan video diffusion made fast, for inference and for the training behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pipeline", "Video", "__version__"]

if TYPE_CHECKING:
    from turbodit.pipeline import Pipeline
    from turbodit.video import Video

# Resolved on first use: `import turbodit` and `turbodit --help` must not pay for torch.
_LAZY = {"Pipeline": "turbodit.pipeline", "Video": "turbodit.video"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'turbodit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
