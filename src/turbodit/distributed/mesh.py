"""The processes that train together, and what each of them has of the model and of the data.

Three axes, from the slowest link to the fastest:

- replicate: each replica has the whole model, sharded over the other two axes (HSDP).
- shard: other samples, and a shard of the weights (FSDP).
- context: the same samples, each process with a share of their tokens (Ulysses,
  arXiv:2309.14509), and a shard of the weights too.

Rank = (replicate index * shard + shard index) * context + context index, so that the processes
of a context group, which talk most, are neighbours.

A plain `python` is a mesh of one process, with a process group of its own: nothing else differs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True, eq=False)
class Mesh:
    """This process's place among all.

    Attributes:
        device: of this process.
        replicate, shard, context: sizes of the axes.
        fsdp: what the weights are sharded over: (shard * context,), or with several replicas
            (replicate, shard * context).
        context_group: the processes that share this one's samples.
        rank: number of this process.
    """

    device: torch.device
    replicate: int
    shard: int
    context: int
    fsdp: DeviceMesh
    context_group: dist.ProcessGroup
    rank: int

    @property
    def size(self) -> int:
        return self.replicate * self.shard * self.context

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the `data_count` parts of the data this process sees."""
        return self.rank // self.context

    @property
    def data_count(self) -> int:
        return self.replicate * self.shard


def join(
    device: torch.device | str, *, replicate: int = 1, shard: int | None = None, context: int = 1
) -> Mesh:
    """Join the processes that torchrun started, if it did, and lay out the mesh.

    Args:
        device: "cpu" or "cuda"; each process of a node takes a GPU of its own.
        replicate, shard, context: sizes of the axes; `shard` None: what the others leave.

    Raises:
        ValueError: sizes whose product is not the number of processes, another device, or
            more processes on a node than it has GPUs.
    """
    device = torch.device(device)
    if device.type not in BACKENDS:
        raise ValueError(
            f"training runs on {' and '.join(BACKENDS)}, got a device of type {device.type!r}"
        )
    own = _own_device(device)
    if not dist.is_initialized():
        _init_process_group(BACKENDS[device.type])
    shard = _check_sizes(dist.get_world_size(), replicate, shard, context)
    grid = init_device_mesh(
        device.type, (replicate * shard, context), mesh_dim_names=("data", "context")
    )
    return Mesh(
        own,
        replicate,
        shard,
        context,
        _fsdp_mesh(device.type, replicate, shard * context),
        grid.get_group("context"),
        dist.get_rank(),
    )


def leave() -> None:
    """Leave the process group that `join` made."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int, mesh: Mesh) -> None:
    """Seed torch, Python and NumPy: alike in a context group, differently elsewhere."""
    own = np.random.SeedSequence([seed, mesh.data_rank]).generate_state(1, np.uint32).item()
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own)


def _own_device(device: torch.device) -> torch.device:
    """The GPU of this process among those of its node."""
    if device.type != "cuda":
        return device
    index = dist.get_node_local_rank(fallback_rank=device.index or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"process {index} of this node has no GPU of its own: {torch.cuda.device_count()} "
            "found; start as many processes as there are GPUs"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _init_process_group(backend: str) -> None:
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _check_sizes(world: int, replicate: int, shard: int | None, context: int) -> int:
    """The size of the shard axis."""
    sizes = {"replicate": replicate, "shard": shard, "context": context}
    wrong = {axis: size for axis, size in sizes.items() if size is not None and size < 1}
    if wrong:
        raise ValueError(f"sizes of mesh axes are at least 1, got {wrong}")
    found = shard or max(1, world // (replicate * context))
    if replicate * found * context != world:
        wanted = "a divisor of it" if shard is None else "it"
        raise ValueError(
            f"there are {world} processes; replicate {replicate} x "
            f"{'' if shard is None else f'shard {shard} x '}context {context} must be {wanted}"
        )
    return found


def _fsdp_mesh(device_type: str, replicate: int, shard: int) -> DeviceMesh:
    if replicate == 1:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(device_type, (replicate, shard), mesh_dim_names=names)
