"""Training data: latents, text embeddings and prompts in tar shards."""

from turbodit.training.data.reader import Batch, LatentDataset
from turbodit.training.data.shards import (
    BrokenSample,
    DatasetInfo,
    Sample,
    ShardWriter,
    claim_folder,
)

__all__ = [
    "Batch",
    "BrokenSample",
    "DatasetInfo",
    "LatentDataset",
    "Sample",
    "ShardWriter",
    "claim_folder",
]
