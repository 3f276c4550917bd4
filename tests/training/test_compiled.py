"""Compiled blocks whose activations are computed again."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from tests.distributed.two_processes import Case, random_inputs, random_model

from turbodit.distributed import Policy
from turbodit.training.compiled import prepare_blocks


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("policy", ["none", "block", "selective"])
def test_gradients_are_those_of_eager_blocks(policy: Policy) -> None:
    """Compiled code reuses buffers: what is kept must not be one that is written over."""
    case = Case(attention="sla", dtype=torch.float32)
    eager = random_model(case)
    model = copy.deepcopy(eager)
    prepare_blocks(model, policy, compiled=True)
    latents, t, context, target = random_inputs(case)
    for network in (eager, model):
        (network(latents, t, context) - target).square().mean().backward()
    wanted = dict(eager.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-6)
