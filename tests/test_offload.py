"""The CPU plays the accelerator too: weights that are there are copies in other memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from turbodit.offload import Residence


class Stack(nn.Module):
    """A DiT's outline: something before the blocks, and the blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.register_buffer("table", torch.ones(4))
        self.seen = []

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def addresses(module):
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


@pytest.fixture
def is_there():
    """Tells whether all of a module's tensors are away from where they were first seen."""
    homes = {}

    def check(module):
        home = homes.setdefault(module, addresses(module))
        moved = {now != before for now, before in zip(addresses(module), home, strict=True)}
        assert len(moved) == 1
        return moved.pop()

    return check


def test_mode_none_has_everything_there():
    module = Stack()
    residence = Residence({"a": module}, torch.device("meta"), "none")
    residence.bring("a")
    residence.clear()
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def test_mode_model_has_one_there_at_a_time(is_there):
    one, two = nn.Linear(2, 2), Stack()
    weights = one.weight.clone()
    residence = Residence({"one": one, "two": two}, torch.device("cpu"), "model")
    assert (is_there(one), is_there(two)) == (False, False)
    residence.bring("one")
    assert (is_there(one), is_there(two)) == (True, False)
    residence.bring("two")
    assert (is_there(one), is_there(two)) == (False, True)
    residence.clear()
    assert (is_there(one), is_there(two)) == (False, False)
    torch.testing.assert_close(one.weight, weights)


def test_mode_sequential_has_one_block_there_at_a_time(is_there):
    stack, other = Stack(), nn.Linear(2, 2)
    x = torch.randn(1, 4)
    expected = stack(x)
    for module in (*stack.blocks, stack.embed, other):
        is_there(module)
    residence = Residence({"stack": stack, "other": other}, torch.device("cpu"), "sequential")
    during = []
    for block in stack.blocks:
        block.register_forward_hook(
            lambda *_: during.append([is_there(b) for b in stack.blocks]), prepend=True
        )
    table = stack.table.data_ptr()
    residence.bring("stack")
    assert is_there(stack.embed)
    assert stack.table.data_ptr() != table
    torch.testing.assert_close(stack(x), expected, rtol=0, atol=0)
    assert during == [[True, False, False], [False, True, False], [False, False, True]]
    residence.bring("other")
    assert (is_there(stack.embed), is_there(other)) == (False, True)


def test_a_block_that_fails_leaves_the_device(is_there):
    stack = Stack()
    is_there(stack.blocks)
    residence = Residence({"stack": stack}, torch.device("cpu"), "sequential")
    residence.bring("stack")
    with pytest.raises(RuntimeError):
        stack.blocks[0](torch.ones(1, 5))
    assert not is_there(stack.blocks)


def test_unknown_mode():
    with pytest.raises(ValueError, match="supported: none, model, sequential"):
        Residence({}, torch.device("cpu"), "disk")
