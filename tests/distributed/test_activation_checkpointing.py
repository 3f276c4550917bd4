"""What is computed again, under which policy, and that nothing else changes."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from tests.distributed.two_processes import Case, random_inputs, random_model
from torch.utils._python_dispatch import TorchDispatchMode

from turbodit.distributed import checkpoint_blocks


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def passes(policy: str, attention: str):
    """Gradients, operators of the backward pass, and bytes kept for it."""
    case = Case(attention=attention, dtype=torch.float32)
    model = random_model(case)
    names = set(model.state_dict())
    checkpoint_blocks(model, policy)
    assert set(model.state_dict()) == names
    latents, t, context, target = random_inputs(case)
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = (model(latents, t, context) - target).square().mean()
    with Calls() as calls:
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, calls.counts, sum(kept.values())


ATTENTION = {
    "sdpa": "aten::_scaled_dot_product_flash_attention_for_cpu",
    "sla": "turbodit::sparse_attention",
}


@pytest.mark.parametrize("attention", ATTENTION)
def test_policies_give_the_same_gradients(attention):
    layers = len(random_model(Case()).blocks)
    wanted, plain, plain_bytes = passes("none", attention)
    block, again, block_bytes = passes("block", attention)
    selective, few, _ = passes("selective", attention)
    for name, gradient in wanted.items():
        assert torch.equal(block[name], gradient), name
        assert torch.equal(selective[name], gradient), name
    op = ATTENTION[attention]
    assert (plain[op], few[op]) == (0, 0)
    assert again[op] >= layers
    assert few["aten::addmm"] == plain["aten::addmm"] < again["aten::addmm"]
    assert block_bytes < plain_bytes / 3


def test_a_copy_of_a_checkpointed_model_is_apart():
    model = random_model(Case(dtype=torch.float32))
    checkpoint_blocks(model, "block")
    twin = copy.deepcopy(model)
    latents, t, context, target = random_inputs(Case(dtype=torch.float32))
    (twin(latents, t, context) - target).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())


def test_unknown_policy():
    with pytest.raises(ValueError, match="unknown policy 'all'; supported: none, block, selective"):
        checkpoint_blocks(random_model(Case()), "all")
