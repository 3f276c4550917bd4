"""One process among those that train together, as torchrun starts them: one for each device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Rank:
    """This process's number and how many there are; alone by default."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all share."""
        return self.index == 0

    def agree(self, seconds: float, device: torch.device) -> float:
        """The time on process 0's clock: all must take the same rate and stop together."""
        if self.count == 1:
            return seconds
        said = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.broadcast(said, src=0)
        return said.item()


def join(device: str) -> tuple[Rank, torch.device]:
    """Join the other processes that torchrun started, if it did; this one's rank and device."""
    if not dist.is_torchelastic_launched():
        return Rank(), torch.device(device)
    dist.init_process_group()
    rank = Rank(dist.get_rank(), dist.get_world_size())
    if device != "cuda":
        return rank, torch.device(device)
    own = torch.device("cuda", rank.index)
    torch.cuda.set_device(own)
    return rank, own


def leave() -> None:
    """End the company that `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
