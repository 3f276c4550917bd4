"""The mesh of a lone process, seeds, and sizes that do not fit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from turbodit.distributed import join, leave, seed_everything
from turbodit.distributed.mesh import Mesh


@pytest.fixture
def mesh():
    yield join("cpu")
    leave()


def test_plain_python_is_a_mesh_of_one(mesh):
    assert (mesh.size, mesh.rank, mesh.data_rank, mesh.data_count) == (1, 0, 0, 1)
    assert mesh.is_first
    assert mesh.device == torch.device("cpu")
    leave()
    assert not dist.is_initialized()
    leave()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"context": 2}, "1 processes; replicate 1 x context 2 must be a divisor of it"),
        ({"shard": 2}, "1 processes; replicate 1 x shard 2 x context 1 must be it"),
        ({"replicate": 0}, "at least 1, got {'replicate': 0}"),
    ],
)
def test_sizes_that_do_not_fit(mesh, sizes, message):
    with pytest.raises(ValueError, match=message):
        join("cpu", **sizes)


def test_devices_that_do_not_train():
    with pytest.raises(ValueError, match="cpu and cuda, got a device of type 'mps'"):
        join("mps")


def draws(rank: int, context: int) -> tuple[float, float, float]:
    mesh = Mesh(torch.device("cpu"), 1, 4 // context, context, None, None, rank)
    seed_everything(3, mesh)
    return torch.rand(()).item(), random.random(), np.random.rand()


def test_seeds_are_alike_only_in_a_context_group():
    assert draws(0, 2) == draws(1, 2)
    assert draws(2, 2) == draws(3, 2)
    assert not set(draws(0, 2)) & set(draws(2, 2))
    assert len({draws(rank, 1) for rank in range(4)}) == 4
