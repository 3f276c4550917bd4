"""A small training run with everything that a checkpoint holds; alone, in two processes, killed."""

from __future__ import annotations

import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from turbodit.config import TransformerConfig
from turbodit.distributed import Mesh, join, leave, parallelize
from turbodit.model.wan import WanModel
from turbodit.training.checkpoint import Checkpoints, TrainState, export_transformer
from turbodit.training.ema import PowerEMA

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=1, text_dim=8, text_len=4, freq_dim=16
)
SHAPE = (4, 16, 1, 4, 4)  # latents of all processes together


@dataclass
class Counter:
    """A reader of data that knows its position."""

    position: int = 0

    def __next__(self) -> torch.Tensor:
        self.position += 1
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(self.position))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


def new_state(mesh: Mesh, seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = WanModel(CONFIG, "sla", {"block_q": 16, "block_k": 16})
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.2)
    parallelize(model, mesh)
    return TrainState(
        models={"student": model},
        optimizers={"student": torch.optim.AdamW(model.parameters(), lr=1e-2)},
        averages={"0.1": PowerEMA(model, 0.1), "0.2": PowerEMA(model, 0.2)},
        generators={"times": torch.Generator().manual_seed(seed)},
        common={"sides": torch.Generator().manual_seed(seed)},
        data=Counter(),
    )


def update(state: TrainState, mesh: Mesh, draws: bool = True) -> float:
    """One step on this process's samples; its loss. `draws`: with random numbers of all kinds."""
    assert isinstance(state.data, Counter)
    model, optimizer = state.models["student"], state.optimizers["student"]
    latents = next(state.data)[mesh.data_rank :: mesh.data_count]
    t, noise = torch.full((len(latents),), 0.5), torch.ones_like(latents)
    if draws:
        t = torch.rand(len(latents), generator=state.generators["times"])
        t = t * torch.rand((), generator=state.common["sides"])
        noise = torch.randn_like(latents) + random.random() + np.random.rand()
    context = torch.linspace(-1, 1, 32).sin().view(1, 4, 8).expand(len(latents), -1, -1)
    loss = (model(latents + noise, t, context) - noise).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    for average in state.averages.values():
        average.update(model, state.step)
    state.step += 1
    return loss.item()


def run(folder: Path, steps: int, save_every: int = 3) -> list[float]:
    """Losses of the steps until `steps`, from the last checkpoint on, alone."""
    mesh = join("cpu")
    try:
        state = new_state(mesh, seed=0)
        checkpoints = Checkpoints(folder, mesh)
        checkpoints.load(state)
        losses = []
        while state.step < steps:
            losses.append(update(state, mesh))
            if state.step % save_every == 0:
                checkpoints.save(state)
        checkpoints.close()
        return losses
    finally:
        leave()


def whole(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of tensors, whole where they are sharded."""
    return {
        name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
        for name, x in tensors.items()
    }


def reshard(folder: Path) -> None:
    """Two processes go on from `folder`/one and save to `folder`/two."""
    mp.spawn(_process, (folder,), nprocs=2)


def go_on(folder: Path, mesh: Mesh) -> dict[str, Any]:
    """Load, make an update without random numbers, and tell everything."""
    state = new_state(mesh, seed=1 + mesh.rank)
    found = Checkpoints(folder, mesh).load(state)
    assert isinstance(state.data, Counter)
    told = {
        "found": found,
        "step": state.step,
        "position": state.data.position,
        "draw": torch.rand(()),
        "common": torch.rand((), generator=state.common["sides"]),
    }
    update(state, mesh, draws=False)
    told["weights"] = whole(state.models["student"].state_dict())
    told["average"] = whole(state.averages["0.2"].state_dict())
    return told | {"state": state}


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = join("cpu")
    told = go_on(folder / "one", mesh)
    state = told.pop("state")
    torch.save(told, folder / f"told-{rank}.pt")
    checkpoints = Checkpoints(folder / "two", mesh)
    checkpoints.save(state)
    checkpoints.close()
    export_transformer(state.models["student"], folder / "exported", mesh)
    with state.averages["0.2"].applied(state.models["student"]):
        export_transformer(state.models["student"], folder / "average", mesh, torch.float32)
    leave()


def _die_in_second_save() -> None:
    """Patch what a checkpoint's files end with: the second one's kills the process."""
    fsync, calls = os.fsync, 0

    def dying(file: Any) -> None:
        nonlocal calls
        fsync(file)
        calls += 1
        if (Path(sys.argv[1]) / "latest").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = dying


if __name__ == "__main__":
    torch.set_num_threads(1)
    _die_in_second_save()
    for loss in run(Path(sys.argv[1]), steps=9):
        print(loss)
