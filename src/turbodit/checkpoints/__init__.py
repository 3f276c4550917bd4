"""Model files in and out: folders and their layouts, name maps, foreign formats."""

from turbodit.checkpoints.folder import ModelFolder, find_model
from turbodit.checkpoints.transformer import (
    load_transformer,
    save_transformer,
    transformer_config,
)

__all__ = [
    "ModelFolder",
    "find_model",
    "load_transformer",
    "save_transformer",
    "transformer_config",
]
