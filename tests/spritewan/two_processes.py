"""A run of `Trainer` shared by two processes; apart, as each process imports this file anew."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from turbodit.spritewan.trainer import Trainer

WIDTH = 16  # of the batches' samples


def train_alone(folder: Path, batches: list[torch.Tensor]) -> None:
    """An update for each batch (B, WIDTH), float64; the state is saved in `folder`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)).double()
    trainer = Trainer(model, folder, betas=(0.9, 0.99), ema=0.999)
    for batch in batches:
        trainer.update(model(batch).square().mean(), lr=0.1)
    trainer.save()


def train_together(folder: Path, batches: list[torch.Tensor]) -> None:
    """The same by two processes with half of each batch, their states in `folder`/0 and 1."""
    mp.spawn(_process, (folder, batches), nprocs=2)


def _process(index: int, folder: Path, batches: list[torch.Tensor]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=index, world_size=2)
    train_alone(folder / str(index), [batch[index::2] for batch in batches])
    dist.destroy_process_group()
