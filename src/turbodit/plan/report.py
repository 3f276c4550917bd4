"""What a plan says: bytes of each stage by part, seconds, and which cards have the memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30
# GiB that PyTorch sees of cards, by the size they are sold with, roughly: RTX 4090, RTX 5090, L40S,
# H100, H200.
CARDS = {"24 GB": 23.5, "32 GB": 31.3, "48 GB": 44.4, "80 GB": 79.1, "141 GB": 139.7}
RESERVE = GIB  # for the CUDA context and gaps between tensors: assumed, not measured

Parts = Mapping[str, int]  # bytes


@dataclass(frozen=True)
class Plan:
    """Bytes on one GPU, and seconds.

    Attributes:
        stages: by name, what is in memory at the stage's peak.
        ways: by name, the stages that a way to run goes through.
        seconds: by name.
        notes: what the numbers leave out, and what they rest on.
    """

    title: str
    stages: Mapping[str, Parts]
    ways: Mapping[str, tuple[str, ...]]
    seconds: Mapping[str, float]
    notes: tuple[str, ...]

    def peak(self, way: str) -> int:
        """Bytes of a way's largest stage."""
        return max(sum(self.stages[stage].values()) for stage in self.ways[way])

    def fits(self, way: str) -> dict[str, bool]:
        """Whether cards have the memory for it, and RESERVE."""
        needed = self.peak(way) + RESERVE
        return {card: needed <= size * GIB for card, size in CARDS.items()}

    def summary(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "title": self.title,
            "bytes": {stage: dict(parts) for stage, parts in self.stages.items()},
            "peak_gib": {way: round(self.peak(way) / GIB, 2) for way in self.ways},
            "fits": {way: self.fits(way) for way in self.ways},
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
        }
