"""What trains, and LoRA put around the layers of a model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.tiny_models import TEXT_DIM

from turbodit.checkpoints import load_transformer, save_transformer
from turbodit.checkpoints.merge import merge_loras
from turbodit.config import TransformerConfig
from turbodit.model.wan import WanModel
from turbodit.quantization import quantize_linears
from turbodit.training.parameters import (
    LoRA,
    LoRALinear,
    merge_lora,
    save_lora,
    select_trainable,
)

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=TEXT_DIM, text_len=8, freq_dim=32
)
BLOCKS = {"block_q": 16, "block_k": 16}


def model_with(attention: str = "sla", seed: int = 0) -> WanModel:
    torch.manual_seed(seed)
    settings = {"ratio": 0.3, **BLOCKS} if attention == "sla" else None
    model = WanModel(CONFIG, attention, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj_l" in name or name.startswith("head"):
                parameter.normal_(std=0.2)
    return model.eval()


def inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, 3, 8, 8, generator=generator)
    t = torch.rand(batch, generator=generator)
    return latents, t, torch.randn(batch, 8, TEXT_DIM, generator=generator)


def test_parts() -> None:
    model = model_with()
    names = dict(model.named_parameters()).keys()
    assert select_trainable(model, "full").keys() == names
    assert select_trainable(model, "attention").keys() == {n for n in names if ".self_attn." in n}
    branch = {n for n in names if "proj_l" in n}
    assert len(branch) == 4 and select_trainable(model, "proj_l").keys() == branch
    assert {n for n, p in model.named_parameters() if p.requires_grad} == branch
    assert select_trainable(model_with("sdpa"), "attention").keys() < names
    model(*inputs()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in branch), name
        assert name not in branch or parameter.grad.abs().max() > 0, name


def test_lora_leaves_the_base_as_it_is() -> None:
    model = model_with()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    velocity = model(*inputs())

    trained = select_trainable(model, LoRA(rank=4))

    state = model.state_dict()
    added = state.keys() - before.keys()
    assert all(state[name].equal(tensor) for name, tensor in before.items())
    assert added == {
        f"blocks.{block}.{layer}.{matrix}"
        for block in range(2)
        for layer in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
                      "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o",
                      "ffn.0", "ffn.2")
        for matrix in ("lora_A", "lora_B")
    }  # fmt: skip
    assert trained.keys() == added | {name for name in before if "proj_l" in name}
    assert model(*inputs()).equal(velocity)  # up is zero


def test_lora_trains() -> None:
    model = model_with()
    generator = torch.Generator().manual_seed(3)
    trained = select_trainable(model, LoRA(rank=4, targets=("q", "ffn.2")), generator)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    losses = []
    for _ in range(3):
        loss = model(*inputs()).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    state = model.state_dict()
    assert all(state[name].equal(tensor) for name, tensor in frozen.items())
    other = model_with()
    select_trainable(other, LoRA(rank=4, targets=("q", "ffn.2")), generator.manual_seed(3))
    first = "blocks.0.ffn.2.lora_A"
    assert other.state_dict()[first].std() == pytest.approx((3 * 40) ** -0.5, rel=0.2)
    assert trained.keys() == {n for n, p in other.named_parameters() if p.requires_grad}


@pytest.fixture
def tuned() -> WanModel:
    """A model with a LoRA that changes something."""
    model = model_with()
    select_trainable(model, LoRA(rank=4, alpha=2.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    return model.eval()


def test_merging_in_memory(tuned: WanModel) -> None:
    base = model_with()
    with torch.no_grad():
        expected, plain = tuned(*inputs()), base(*inputs())
        merge_lora(tuned)
        got = tuned(*inputs())
    assert tuned.state_dict().keys() == base.state_dict().keys()
    # As far as the products of float32 matrices go, which are summed in another order.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).norm() > 0.05 * plain.norm()
    with pytest.raises(ValueError, match="has no LoRA to merge"):
        merge_lora(tuned)


@pytest.mark.parametrize("names", ["diffusers", "native"])
def test_the_merged_file_is_the_model_with_lora(
    names: str, tuned: WanModel, tmp_path: Path
) -> None:
    save_transformer(model_with("sdpa"), tmp_path / "base")
    plain = load_transformer(tmp_path / "base", dtype=torch.float32).state_dict()
    tuned.load_state_dict(plain, strict=False)
    stated = {"attention": "sla", "attention_settings": {"ratio": 0.3}}
    lora = LoRA(rank=4, alpha=2.0)
    save_lora(tuned.state_dict(), lora, tmp_path / "lora.safetensors", names, stated)

    report = merge_loras(
        tmp_path / "base", [(tmp_path / "lora.safetensors", 1.0)], tmp_path / "out"
    )

    assert len(report.merged) == 20 and len(report.copied) == 4
    merged = load_transformer(
        tmp_path / "out",
        dtype=torch.float32,
        attention="sla",
        attention_settings={"ratio": 0.3, **BLOCKS},
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(*inputs()), tuned(*inputs()), rtol=1e-4, atol=1e-5)


def test_forward_mode(tuned: WanModel) -> None:
    """The Jacobian-vector product of a layer with LoRA, beside the linear map that it is."""
    layer = tuned.blocks[0].self_attn.q
    assert isinstance(layer, LoRALinear)
    x, tangent = torch.randn(2, 3, 24, dtype=torch.float64).unbind(0)
    layer.double()
    out, out_tangent = torch.func.jvp(layer, (x,), (tangent,))
    weight = layer.weight + 0.5 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(out, x @ weight.T + layer.bias)
    torch.testing.assert_close(out_tangent, tangent @ weight.T)


def test_bfloat16() -> None:
    model = model_with().bfloat16()
    select_trainable(model, LoRA(rank=4))
    assert model.blocks[0].ffn[0].lora_A.dtype == torch.bfloat16
    assert model(*inputs()).dtype == torch.bfloat16


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"cannot train 'norms'; supported: full"):
        select_trainable(model_with(), "norms")
    with pytest.raises(ValueError, match="no linear branch; supported: attention 'sla'"):
        select_trainable(model_with("sdpa"), "proj_l")
    with pytest.raises(ValueError, match="no layer for a LoRA of k_img"):
        select_trainable(model_with(), LoRA(targets=("k_img",)))
    model = model_with()
    select_trainable(model, LoRA(rank=2))
    with pytest.raises(ValueError, match="has a LoRA already"):
        select_trainable(model, LoRA(rank=2))
    model = model_with()
    quantize_linears(model, "int8-channel")
    with pytest.raises(ValueError, match=r"quantised \(blocks\.0\.self_attn\.q and 19 more"):
        select_trainable(model, "full")
    model = copy.deepcopy(model_with())
    model.pack_projections()
    with pytest.raises(ValueError, match="packed for inference"):
        select_trainable(model, "full")
    with pytest.raises(ValueError, match="rank of a LoRA must be positive, got 0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="alpha of a LoRA must be positive and finite, got nan"):
        LoRA(alpha=float("nan"))
    with pytest.raises(ValueError, match=r"got the targets q, norm; supported: q, k"):
        LoRA(targets=("q", "norm"))
    with pytest.raises(ValueError, match="got the targets none"):
        LoRA(targets=())
