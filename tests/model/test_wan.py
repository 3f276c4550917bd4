"""The DiT against diffusers' WanTransformer3DModel with the same random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from diffusers import WanTransformer3DModel

from turbodit.attention import BACKENDS
from turbodit.checkpoints.keys import to_diffusers
from turbodit.config import TransformerConfig
from turbodit.model.rope import rope_table
from turbodit.model.wan import WanModel

TEXT_DIM = 24
SHAPE = {"dim": 72, "ffn_dim": 104, "num_heads": 3, "num_layers": 3, "text_dim": TEXT_DIM}
VARIANTS = {
    "t2v": TransformerConfig(**SHAPE),
    "i2v-clip": TransformerConfig(**SHAPE, in_dim=36, image_dim=40),
    "flf2v": TransformerConfig(**SHAPE, in_dim=36, image_dim=40, image_positions=514),
    "i2v-a14b": TransformerConfig(**SHAPE, in_dim=36),
    "ti2v": TransformerConfig(**SHAPE, in_dim=48, out_dim=48),
}
GRID = (3, 5, 7)  # tokens along time, height, width: odd on purpose
BATCH = 3


@dataclass
class Inputs:
    latents: torch.Tensor
    t: torch.Tensor  # (B,), or (B, T) where each latent frame has its own
    context: torch.Tensor
    image_context: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        image = None if self.image_context is None else self.image_context.to(dtype)
        return Inputs(self.latents.to(dtype), self.t, self.context.to(dtype), image)


def random_model(config: TransformerConfig) -> WanModel:
    torch.manual_seed(0)
    model = WanModel(config).eval()
    for name, p in model.named_parameters():
        # Norm weights near one; everything else large enough to matter.
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.1)
    return model


def random_inputs(variant: str) -> Inputs:
    config = VARIANTS[variant]
    generator = torch.Generator().manual_seed(1)
    t, h, w = GRID
    context = torch.randn(BATCH, config.text_len, TEXT_DIM, generator=generator)
    context[:, 17:] = 0
    time = torch.tensor([0.912, 0.3, 0.047])
    if variant == "ti2v":
        time = time[:, None].repeat(1, t)
        time[:, 0] = 0
    image = None
    if config.image_dim:
        tokens = config.image_positions or 257
        image = torch.randn(BATCH, tokens, config.image_dim, generator=generator)
    latents = torch.randn(BATCH, config.in_dim, t, 2 * h, 2 * w, generator=generator)
    return Inputs(latents, time, context, image)


def run(model: WanModel, x: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(x.latents, x.t, x.context, x.image_context)


def diffusers_twin(model: WanModel) -> WanTransformer3DModel:
    c = model.config
    twin = WanTransformer3DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim,
        in_channels=c.in_dim,
        out_channels=c.out_dim,
        text_dim=c.text_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.num_layers,
        image_dim=c.image_dim,
        added_kv_proj_dim=c.dim if c.image_dim else None,
        pos_embed_seq_len=c.image_positions,
    )
    twin.load_state_dict({to_diffusers(name): p for name, p in model.state_dict().items()})
    return twin.eval()


def run_diffusers(twin: WanTransformer3DModel, x: Inputs) -> torch.Tensor:
    timestep = 1000 * x.t
    if x.t.ndim == 2:  # diffusers wants one per token
        timestep = timestep.repeat_interleave(GRID[1] * GRID[2], dim=1)
    image = x.image_context
    if image is not None and image.shape[1] == 514:  # diffusers stacks the two images
        image = image.reshape(2 * BATCH, 257, -1)
    with torch.no_grad():
        return twin(x.latents, timestep, x.context, image, return_dict=False)[0]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_diffusers(variant: str) -> None:
    model = random_model(VARIANTS[variant])
    inputs = random_inputs(variant)
    want = run_diffusers(diffusers_twin(model), inputs)
    assert relative_error(run(model, inputs), want) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_error_is_within_twice_that_of_diffusers(variant: str) -> None:
    model = random_model(VARIANTS[variant])
    inputs = random_inputs(variant)
    exact = run(model.double(), inputs.to(torch.float64))
    model.float()
    twin = diffusers_twin(model)
    for name, p in twin.named_parameters():
        if not set(name.split(".")) & set(twin._keep_in_fp32_modules):
            p.data = p.data.bfloat16()
    for name, p in model.named_parameters():
        if not model.keep_float32(name):
            p.data = p.data.bfloat16()
    half = inputs.to(torch.bfloat16)
    theirs = relative_error(run_diffusers(twin, half), exact)
    assert relative_error(run(model, half), exact) <= 2 * theirs


def test_time_per_latent_frame_equals_time_per_token() -> None:
    model = random_model(VARIANTS["ti2v"])
    x = random_inputs("ti2v")
    per_token = Inputs(x.latents, x.t.repeat_interleave(35, dim=1), x.context, None)
    torch.testing.assert_close(run(model, x), run(model, per_token))


def sparse_twin(model: WanModel, **settings: object) -> WanModel:
    """The same weights, with sparse-linear attention in blocks of 16 tokens."""
    blocks = {"block_q": 16, "block_k": 16}
    twin = WanModel(model.config, "sla", {**blocks, **settings}).to(model.head.head.weight.dtype)
    twin.load_state_dict(model.state_dict(), strict=False)  # but proj_l, which starts at zero
    return twin.eval()


def layers_heads(model: WanModel, *layers: Sequence[int]) -> dict[str, object]:
    """Temporal heads of the first layers; the others have none."""
    others = [()] * (model.config.num_layers - len(layers))
    return {"temporal_heads": [*layers, *others]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_temporal_heads_are_nothing_to_attention_that_sees_all(variant: str) -> None:
    model, inputs = random_model(VARIANTS[variant]), random_inputs(variant)
    want = run(model, inputs)
    for heads in ([0], [1], [0, 1]):
        got = run(sparse_twin(model, ratio=1.0, **layers_heads(model, heads, [1])), inputs)
        assert relative_error(got, want) <= 1e-5, heads


def test_blocks_of_temporal_heads_go_over_time() -> None:
    model, inputs = random_model(VARIANTS["ti2v"]), random_inputs("ti2v")
    rows = sparse_twin(model, ratio=0.3)
    want = run(sparse_twin(model, ratio=0.3, **layers_heads(model, [1])), inputs)
    assert relative_error(run(rows, inputs), want) > 1e-3
    order = torch.arange(3 * 5 * 7).view(3, 35).T.flatten()
    op = rows.blocks[0].self_attn.attn_op
    attend = op.local_attn.forward

    def of_heads(q, k, v):
        plain, placed = attend(q, k, v), attend(q[:, order], k[:, order], v[:, order])
        placed = placed[:, order.argsort()]
        plain[:, :, 1] = placed[:, :, 1]
        return plain

    op.local_attn.forward = of_heads
    assert relative_error(run(rows, inputs), want) <= 1e-5


def test_tangents_and_gradients_pass_temporal_heads() -> None:
    """The tangent against a central difference, and the gradient against the tangent."""
    model, inputs = random_model(VARIANTS["t2v"]), random_inputs("t2v")
    twin = sparse_twin(model, ratio=0.3, **layers_heads(model, [1], [0])).double()
    x = inputs.latents.double().requires_grad_()
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)

    def f(x: torch.Tensor) -> torch.Tensor:
        return twin(x, inputs.t.double(), inputs.context.double())

    with torch.no_grad():
        _, tangent = torch.func.jvp(f, (x.detach(),), (step,))
        difference = (f(x + 1e-6 * step) - f(x - 1e-6 * step)) / 2e-6
    assert relative_error(tangent, difference) <= 1e-5
    (gradient,) = torch.autograd.grad(f(x).sum(), x)
    torch.testing.assert_close((gradient * step).sum(), tangent.sum(), rtol=1e-6, atol=1e-8)


def test_impossible_temporal_heads_are_refused() -> None:
    config = VARIANTS["t2v"]
    layers, heads = config.num_layers, config.num_heads
    with pytest.raises(ValueError, match=f"of {layers + 1} layers, but the model has {layers}"):
        WanModel(config, "sla", {"temporal_heads": [[0]] * (layers + 1)})
    with pytest.raises(ValueError, match=f"must differ and be from 0 to {heads - 1}"):
        WanModel(config, "sla", {"temporal_heads": [[heads]] * layers})
    with pytest.raises(ValueError, match="'sdpa' has no setting temporal_heads"):
        WanModel(config, "sdpa", {"temporal_heads": [[0]] * layers})


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    model = random_model(VARIANTS["t2v"]).double()
    x = random_inputs("t2v").to(torch.float64)
    alone = run(model, Inputs(x.latents[1:2], x.t[1:2], x.context[1:2], None))
    torch.testing.assert_close(run(model, x)[1:2], alone)


def test_fresh_weights_predict_zero_and_reach_every_parameter_after_one_step() -> None:
    model = WanModel(VARIANTS["i2v-clip"])
    model.init_weights(torch.Generator().manual_seed(0))
    x = random_inputs("i2v-clip")
    out = model(x.latents, x.t, x.context, x.image_context)
    assert torch.count_nonzero(out) == 0
    torch.nn.init.normal_(model.head.head.weight)
    model(x.latents, x.t, x.context, x.image_context).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(3, 15, 3, 10, 14)}, r"expected \(B, 16, T, H, W\)"),
        ({"latents": torch.zeros(3, 16, 3, 11, 14)}, "not a multiple of patch"),
        ({"context": torch.zeros(3, 512, TEXT_DIM + 1)}, "expected .*text_len, 24"),
        ({"t": torch.zeros(3, 4)}, "n dividing 105 tokens"),
        ({"t": torch.zeros(2)}, r"expected \(3,\)"),
        ({"image_context": torch.zeros(3, 257, 40)}, "has no use for image_context"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    model = random_model(VARIANTS["t2v"])
    x = random_inputs("t2v")
    for name, value in change.items():
        setattr(x, name, value)
    with pytest.raises(ValueError, match=message):
        run(model, x)


def test_missing_clip_features_and_wrong_number_of_images_are_named() -> None:
    x = random_inputs("flf2v")
    with pytest.raises(ValueError, match="needs image_context"):
        run(random_model(VARIANTS["flf2v"]), Inputs(x.latents, x.t, x.context, None))
    one = x.image_context[:, :257]
    with pytest.raises(ValueError, match="got 257 image features, this model expects 514"):
        run(random_model(VARIANTS["flf2v"]), Inputs(x.latents, x.t, x.context, one))


def test_unknown_attention_back_end_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"unknown attention .*{', '.join(BACKENDS)}"):
        WanModel(VARIANTS["t2v"], attention="flash9")


def test_angles_are_one_table_for_a_size() -> None:
    """A CUDA graph reads the table that its recording saw: the model has to give the same one."""
    model, x = random_model(VARIANTS["t2v"]), random_inputs("t2v")
    rope_table.cache_clear()
    run(model, x)
    assert rope_table.cache_info().misses == 1
    assert model.angles(x.latents)[0].shape == (3 * 5 * 7, 12)
    assert rope_table.cache_info().misses == 1
