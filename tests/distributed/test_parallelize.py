"""Two processes find what one finds: losses, all gradients, weights, tangents."""

from __future__ import annotations

import pytest
import torch
from tests.distributed.two_processes import (
    Case,
    alone,
    random_inputs,
    random_model,
    results,
    tangent,
    together,
    train,
)

from turbodit.distributed import join, leave, parallelize
from turbodit.model.wan import WanModel

CASES = {
    "fsdp": (Case(shard=2), train),
    "fsdp-clip": (Case(shard=2, image=True, policy="block"), train),
    "fsdp-sla-selective": (Case(shard=2, attention="sla", policy="selective"), train),
    "fsdp-proj_l": (
        Case(shard=2, attention="sla", policy="block", trained="proj_l"),
        train,
    ),
    "hsdp": (Case(replicate=2), train),
    "context": (Case(context=2, policy="block"), train),
    "context-time-per-frame": (Case(context=2, per_frame=True), train),
    "context-sla": (Case(context=2, attention="sla"), train),
    "context-clip": (Case(context=2, image=True), train),
    "fsdp-bf16": (
        Case(shard=2, dtype=torch.float32, compute_dtype=torch.bfloat16),
        train,
    ),
    "fsdp-tangent": (Case(shard=2, attention="sdpa-math"), tangent),
    "context-tangent": (
        Case(context=2, attention="sdpa-math", per_frame=True, policy="block"),
        tangent,
    ),
}
# Time embeddings are float32 in a float64 model too.
EXACT = {"rtol": 1e-6, "atol": 1e-6}
HALF = {"rtol": 0.02, "atol": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("two")
    together(path, CASES)
    return path


@pytest.mark.parametrize("name", [name for name, (_, work) in CASES.items() if work is train])
def test_training_step_of_two_processes(folder, name):
    case, work = CASES[name]
    wanted = alone(case, work)
    limits = EXACT if case.compute_dtype is None else HALF
    for rank in (0, 1):
        found = results(folder, name, rank)
        assert found["gradients"].keys() == wanted["gradients"].keys()
        assert found["weights"].keys() == random_model(case).state_dict().keys()
        torch.testing.assert_close(found["loss"], wanted["loss"], **limits)
        torch.testing.assert_close(found["norm"], wanted["norm"], **limits)
        for parameter, gradient in wanted["gradients"].items():
            scale = gradient.abs().max()
            assert scale > 0, parameter
            torch.testing.assert_close(
                found["gradients"][parameter] / scale, gradient / scale, **limits
            )
            torch.testing.assert_close(
                found["weights"][parameter], wanted["weights"][parameter], **limits
            )


@pytest.mark.parametrize("name", [name for name, (_, work) in CASES.items() if work is tangent])
def test_jacobian_vector_product_of_two_processes(folder, name):
    case, work = CASES[name]
    wanted = alone(case, work)
    assert wanted["tangent"].abs().max() > 0.1
    for rank in (0, 1):
        found = results(folder, name, rank)
        own = slice(found["data_rank"], None, case.shard * case.replicate)
        torch.testing.assert_close(found["out"], wanted["out"][own], **EXACT)
        torch.testing.assert_close(found["tangent"], wanted["tangent"][own], **EXACT)


def test_master_weights_compute_as_weights_stored_in_bf16():
    """What Wan keeps in float32 is not rounded, all else is; gradients come in float32."""
    case = Case(dtype=torch.float32)
    latents, t, context, _ = random_inputs(case)
    rounded = random_model(case)
    for name, p in rounded.named_parameters():
        if not WanModel.keep_float32(name):
            p.data = p.data.bfloat16()
    mesh = join("cpu")
    try:
        model = parallelize(random_model(case), mesh, torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        with torch.no_grad():
            found, wanted = model(latents, t, context), rounded(latents, t, context)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wanted)
        model(latents, t, context).float().square().mean().backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    finally:
        leave()


def test_a_lone_process_keeps_its_model_as_it_is():
    mesh = join("cpu")
    try:
        model = random_model(Case())
        assert type(parallelize(model, mesh).blocks[0]).__name__ == "Block"
    finally:
        leave()


def test_trainable_weights_of_several_dtypes_are_refused():
    mesh = join("cpu")
    try:
        model = random_model(Case(dtype=torch.float32))
        model.blocks[0].ffn[0].bfloat16()
        with pytest.raises(ValueError, match=r"torch\.bfloat16.*expected one"):
            parallelize(model, mesh, torch.bfloat16)
    finally:
        leave()
