"""Which modules are on the device: all, one at a time, or the DiT block by block.

Weights do not change during inference, so a module that leaves the device is not copied
back: its host copy never went away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import nn

OffloadMode = Literal["none", "model", "sequential"]


def check_mode(mode: str) -> None:
    """Raise a ValueError unless `mode` is one of OffloadMode."""
    if mode not in get_args(OffloadMode):
        raise ValueError(
            f"unknown offload mode {mode!r}; supported: {', '.join(get_args(OffloadMode))}"
        )


class _Visitor:
    """Weights that live in host memory and visit the device."""

    def __init__(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        self._home = [(tensor, tensor.data) for tensor in tensors]
        self._device = device

    def enter(self) -> None:
        for tensor, home in self._home:
            tensor.data = home.to(self._device, copy=True)

    def leave(self) -> None:
        for tensor, home in self._home:
            tensor.data = home


class Residence:
    """Brings modules to the device when they are used.

    Args:
        modules: by name. Those with `blocks` (DiTs) go block by block in "sequential" mode.
        device: where they compute.
        mode: "none" keeps all modules on the device, "model" one at a time, "sequential"
            one at a time and of a DiT one block at a time.

    Raises:
        ValueError: unknown mode.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], device: torch.device, mode: OffloadMode
    ) -> None:
        check_mode(mode)
        self._visitors: dict[str, _Visitor] = {}
        self._inside: str | None = None
        for name, module in modules.items():
            blocks = getattr(module, "blocks", None)
            if mode == "none":
                module.to(device)
            elif mode == "sequential" and isinstance(blocks, nn.ModuleList):
                self._visitors[name] = _by_block(module, blocks, device)
            else:
                self._visitors[name] = _Visitor(_tensors(module), device)

    def bring(self, name: str) -> None:
        """Have module `name` on the device; the one that was there before leaves first."""
        if self._inside == name or name not in self._visitors:
            return
        self.clear()
        self._inside = name  # first: an interrupted move can then be undone
        self._visitors[name].enter()

    def clear(self) -> None:
        """Have no offloaded module on the device."""
        if self._inside is not None:
            self._visitors[self._inside].leave()
            self._inside = None


def _by_block(module: nn.Module, blocks: nn.ModuleList, device: torch.device) -> _Visitor:
    """Hooks that bring each block in for its own forward pass; a visitor for all the rest."""
    for block in blocks:
        visitor = _Visitor(_tensors(block), device)
        block.register_forward_pre_hook(lambda *_, visitor=visitor: visitor.enter())
        block.register_forward_hook(lambda *_, visitor=visitor: visitor.leave(), always_call=True)
    apart = {id(tensor) for tensor in _tensors(blocks)}
    return _Visitor([t for t in _tensors(module) if id(t) not in apart], device)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
