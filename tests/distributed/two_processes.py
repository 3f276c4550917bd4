"""Passes of a tiny DiT, alone or by two processes, each of which imports this file anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.attention import SDPBackend, sdpa_kernel

from turbodit.config import TransformerConfig
from turbodit.distributed import (
    Mesh,
    checkpoint_blocks,
    gradient_norm,
    join,
    leave,
    parallelize,
)
from turbodit.distributed.activation_checkpointing import Policy
from turbodit.model.wan import WanModel

CONFIG = TransformerConfig(
    dim=48, ffn_dim=40, num_heads=4, num_layers=2, text_dim=24, text_len=8, freq_dim=16
)
BATCH = 2
GRID = (3, 4, 8)  # tokens along time, height, width
SLA = {"ratio": 0.4, "block_q": 16, "block_k": 16, "temporal_heads": [[0, 2], [3]]}


@dataclass(frozen=True)
class Case:
    """One way to share a pass: sizes of the mesh's axes (of two processes), and what is passed."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    attention: str = "sdpa"
    per_frame: bool = False
    policy: Policy = "none"
    image: bool = False
    dtype: torch.dtype = torch.float64
    compute_dtype: torch.dtype | None = None
    trained: str = ""  # part of the names of all parameters that train


def random_model(case: Case) -> WanModel:
    torch.manual_seed(0)
    config = replace(CONFIG, image_dim=12) if case.image else CONFIG
    model = WanModel(config, case.attention, SLA if case.attention == "sla" else None)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.2)
    return model.to(case.dtype)


def random_inputs(case: Case) -> tuple[torch.Tensor, ...]:
    """latents, t, context, for models with CLIP image features, target."""
    generator = torch.Generator().manual_seed(1)
    t, h, w = GRID
    shape = (BATCH, 16, t, 2 * h, 2 * w)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(case.dtype)

    times = torch.rand((BATCH, t) if case.per_frame else (BATCH,), generator=generator)
    image = (randn(BATCH, 5, 12),) if case.image else ()
    return randn(*shape), times, randn(BATCH, 8, 24), *image, randn(*shape)


def share(inputs: tuple[torch.Tensor, ...], mesh: Mesh) -> tuple[torch.Tensor, ...]:
    return tuple(x[mesh.data_rank :: mesh.data_count] for x in inputs)


def train(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Loss, gradients and their norm, and the weights, after two updates.

    Each makes passes with and without a gradient in turn, as distillation does, and adds up the
    gradients of two losses.
    """
    model = random_model(case)
    for name, p in model.named_parameters():
        p.requires_grad_(case.trained in name)
    checkpoint_blocks(model, case.policy)
    parallelize(model, mesh, case.compute_dtype)
    latents, t, *context, target = share(random_inputs(case), mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.no_grad():
            other = model(latents, t, *context)
        outs = model(latents, t, *context), model(other.to(case.dtype), t, *context)
        loss = sum((out.to(case.dtype) - target).square().mean() for out in outs)
        loss.backward()
        model(target, t, *context).square().mean().backward()
        norm = gradient_norm(model.parameters())
        optimizer.step()
    losses = [torch.zeros_like(loss) for _ in range(mesh.size)]
    dist.all_gather(losses, loss.detach())
    return {
        "loss": torch.stack(losses).mean(),
        "gradients": {n: full(p.grad) for n, p in model.named_parameters() if p.requires_grad},
        "norm": norm,
        "weights": {name: full(p) for name, p in model.state_dict().items()},
    }


def tangent(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Output and Jacobian-vector product, of this process's samples."""
    model = random_model(case)
    checkpoint_blocks(model, case.policy)
    parallelize(model, mesh, case.compute_dtype)
    latents, t, context, direction = share(random_inputs(case), mesh)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        out, out_tangent = torch.func.jvp(
            lambda x, t: model(x, t, context), (latents, t), (direction, 0.5 * torch.ones_like(t))
        )
    return {"out": out, "tangent": out_tangent, "data_rank": mesh.data_rank}


def full(x: Any) -> torch.Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def alone(case: Case, work: Any) -> dict[str, Any]:
    """`work` by this process alone."""
    mesh = join("cpu")
    try:
        return work(case, mesh)
    finally:
        leave()


def together(folder: Path, cases: dict[str, tuple[Case, Any]]) -> None:
    """Each case by two processes, for `results`."""
    mp.spawn(_process, (folder, cases), nprocs=2)


def results(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """What process `rank` found in case `name`."""
    return torch.load(folder / f"{name}-{rank}.pt")


def _process(rank: int, folder: Path, cases: dict[str, tuple[Case, Any]]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for name, (case, work) in cases.items():
        mesh = join("cpu", replicate=case.replicate, shard=case.shard, context=case.context)
        torch.save(work(case, mesh), folder / f"{name}-{rank}.pt")
    leave()
