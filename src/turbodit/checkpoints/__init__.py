"""Model files in and out: folders and their layouts, name maps, foreign formats."""

from turbodit.checkpoints.folder import ModelFolder, find_model
from turbodit.checkpoints.quantize import QuantizedFiles, quantize_file
from turbodit.checkpoints.transformer import (
    load_transformer,
    save_transformer,
    transformer_config,
)

__all__ = [
    "ModelFolder",
    "QuantizedFiles",
    "find_model",
    "load_transformer",
    "quantize_file",
    "save_transformer",
    "transformer_config",
]
