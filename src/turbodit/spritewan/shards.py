"""SpriteWorld as training data: clips rendered and encoded into shards."""

from __future__ import annotations

from pathlib import Path

import torch

from turbodit.checkpoints import find_model
from turbodit.device import choose_device
from turbodit.prompt_cache import fingerprint
from turbodit.spritewan.train_vae import to_signed
from turbodit.spritewan.world import HELD_OUT, Scene, render, scene
from turbodit.training.data.shards import (
    DatasetInfo,
    Sample,
    ShardWriter,
    claim_folder,
    sample_key,
    shard_path,
)
from turbodit.training.encode import Encoders

SHARD_SIZE = 256
BATCH = {"cpu": 4, "cuda": 64}


@torch.no_grad()
def write_clips(folder: Path, count: int, device: str | None = None) -> None:
    """Encode training clips 0 to `count` into `folder`; whole shards that are there stay.

    Raises:
        ValueError: a number of clips that is not there, or a folder that holds other data.
    """
    if not 1 <= count <= HELD_OUT:
        raise ValueError(f"SpriteWorld has 1 to {HELD_OUT:,} training clips, got {count}")
    home = choose_device(device)
    encoders = Encoders.from_pretrained("spritewan-teacher", device=device)
    model = find_model("spritewan-teacher").config()
    shape = model.latent_shape(model.frames, *_size(model.sizes))
    info = DatasetInfo(
        model.name,
        shape,
        count,
        -(-count // SHARD_SIZE),
        fingerprint(encoders.vae.model),
        {"made of": "SpriteWorld, rendered"},
    )
    claim_folder(folder, info)
    for shard in range(info.shards):
        path = shard_path(folder, shard)
        if path.exists():
            continue
        numbers = range(shard * SHARD_SIZE, min(count, (shard + 1) * SHARD_SIZE))
        with ShardWriter(path, info.identity()) as writer:
            for start in range(0, len(numbers), BATCH[home.type]):
                own = numbers[start : start + BATCH[home.type]]
                scenes = [scene(number) for number in own]
                for sample in _samples(encoders, own, scenes, home):
                    if sample.key not in writer.keys:
                        writer.write(sample)


def _samples(
    encoders: Encoders, numbers: range, scenes: list[Scene], device: torch.device
) -> list[Sample]:
    video = to_signed(render(scenes, device))
    latents = encoders.vae.encode(video).float()
    captions = [scene.caption for scene in scenes]
    context = encoders.text.encode(captions)
    return [
        Sample(sample_key(number), latents[row], context[row], captions[row])
        for row, number in enumerate(numbers)
    ]


def _size(sizes: dict[str, dict[str, tuple[int, int]]]) -> tuple[int, int]:
    """(height, width) of the model's own videos."""
    width, height = next(iter(next(iter(sizes.values())).values()))
    return height, width
