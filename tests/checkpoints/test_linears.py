"""8-bit linear layers in checkpoints: read, written, and quantised while they are read."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from turbodit.checkpoints import load_transformer, save_transformer, transformer_config
from turbodit.checkpoints.keys import to_diffusers
from turbodit.config import TransformerConfig
from turbodit.kernels.quantized_linear import quantize_weight
from turbodit.kernels.quantized_linear.reference import dequantize
from turbodit.model.wan import WanModel
from turbodit.quantization import FORMATS, QuantizedLinear, quantize_linears

State = dict[str, torch.Tensor]

# Neither width is a multiple of 128, and both have more than one block.
CONFIG = TransformerConfig(
    dim=144, ffn_dim=200, num_heads=2, num_layers=2, text_dim=32, freq_dim=32
)
FP8 = torch.float8_e4m3fn
PROJ_L = "self_attn.attn_op.local_attn.proj_l"
CROSS_K = "blocks.1.cross_attn.k"


@pytest.fixture(scope="module")
def plain() -> WanModel:
    torch.manual_seed(0)
    model = WanModel(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model.eval()


def quantized(model: WanModel, format: str) -> WanModel:
    model = copy.deepcopy(model)
    quantize_linears(model, format)
    return model


def linear_names(state: State) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name, tensor in state.items()
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2
    ]


def in_blocks_of_128(state: State) -> State:
    """A state dict as TurboDiffusion writes it, quantised block after block."""
    state = dict(state)
    for layer in linear_names(state):
        weight = state.pop(f"{layer}.weight")
        values = torch.empty(weight.shape, dtype=torch.int8)
        scale = torch.empty([(size + 127) // 128 for size in weight.shape])
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                here = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scale[i, j] = weight[here].abs().max() / 128
                values[here] = (weight[here] / scale[i, j]).round().clamp(-128, 127)
        state |= {f"{layer}.int8_weight": values, f"{layer}.scale": scale}
    return state


def scaled_fp8(state: State) -> State:
    """A state dict as ComfyUI writes it."""
    state = {"scaled_fp8": torch.empty(2, dtype=FP8)} | state
    for layer in linear_names(state):
        scale = state[f"{layer}.weight"].abs().max() / 448
        state[f"{layer}.weight"] = (state[f"{layer}.weight"] / scale).to(FP8)
        state[f"{layer}.scale_weight"] = scale if ".ffn." in layer else scale.reshape(1)
    state["blocks.0.ffn.0.scale_input"] = torch.ones(1)
    return {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}


def save(state: State, path: Path) -> Path:
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return path


def assert_same(model: nn.Module, other: nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.float().equal(expected[name].float()), name


def output(model: WanModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator)
    context = torch.randn(1, 6, 32, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([0.7]), context)


# Files of others.


def checkpointed(state: State) -> State:
    trace = "_attn._checkpoint_wrapped_module."
    return {name.replace("_attn.", trace): tensor for name, tensor in state.items()}


WRITERS: dict[str, Callable[[State], State]] = {
    "original": dict,
    "diffusers": lambda state: {to_diffusers(name): state[name] for name in state},
    "net": lambda state: {f"net.{name}": state[name] for name in state},
    "checkpointed": checkpointed,
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_turbodiffusion(writer: str, suffix: str, plain: WanModel, tmp_path: Path) -> None:
    content = WRITERS[writer](in_blocks_of_128(plain.state_dict()))
    path = save(content, tmp_path / f"model{suffix}")
    expected = quantized(plain, "int8-block")
    model = load_transformer(path, CONFIG, dtype=torch.float32)
    assert_same(model, expected)
    assert output(model).equal(output(expected))


def test_a_wrapped_file_with_sparse_linear_attention(plain: WanModel, tmp_path: Path) -> None:
    state = in_blocks_of_128(copy.deepcopy(plain).bfloat16().state_dict())
    size = CONFIG.head_dim
    for block in range(CONFIG.num_layers):
        state[f"blocks.{block}.{PROJ_L}.weight"] = torch.randn(size, size)
        state[f"blocks.{block}.{PROJ_L}.bias"] = torch.randn(size)
    torch.save({"state_dict": state}, tmp_path / "model.pth")

    model = load_transformer(tmp_path / "model.pth", CONFIG, attention="sla")

    loaded = model.state_dict()
    assert loaded[f"blocks.1.{PROJ_L}.weight"].equal(state[f"blocks.1.{PROJ_L}.weight"])
    assert loaded[f"{CROSS_K}.int8_weight"].dtype == torch.int8
    assert loaded[f"{CROSS_K}.scale"].dtype == torch.float32
    assert loaded[f"{CROSS_K}.bias"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="trained with sparse-linear attention"):
        load_transformer(tmp_path / "model.pth", CONFIG)


def test_the_shape_shows_in_quantised_files(plain: WanModel, tmp_path: Path) -> None:
    path = save(in_blocks_of_128(plain.state_dict()), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"fits no known model \(width 144, 2 layers, 16 input"):
        transformer_config(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_scaled_fp8(suffix: str, plain: WanModel, tmp_path: Path) -> None:
    content = scaled_fp8(plain.state_dict())
    path = save(content, tmp_path / f"model{suffix}")
    prefix = f"model.diffusion_model.{CROSS_K}"
    exact = content[f"{prefix}.weight"].float() * content[f"{prefix}.scale_weight"]

    loaded = load_transformer(path, CONFIG, dtype=torch.bfloat16).state_dict()
    assert loaded[f"{CROSS_K}.weight"].equal(exact.bfloat16())
    assert loaded["head.head.weight"].equal(plain.head.head.weight.bfloat16())

    model = load_transformer(path, CONFIG, dtype=torch.bfloat16, linear="int8-channel")
    layer = model.get_submodule(CROSS_K)
    assert layer.int8_weight.equal(quantize_weight(exact, "int8-channel").values)
    assert layer.scale.equal(quantize_weight(exact, "int8-channel").scale)


def test_plain_fp8_weights_are_cast(plain: WanModel, tmp_path: Path) -> None:
    state = dict(plain.state_dict())
    state |= {f"{n}.weight": state[f"{n}.weight"].to(FP8) for n in linear_names(state)}
    path = save(state, tmp_path / "model.safetensors")
    loaded = load_transformer(path, CONFIG, dtype=torch.float32).get_submodule(CROSS_K)
    assert loaded.weight.equal(state[f"{CROSS_K}.weight"].float())


# Our own.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_saving_and_loading_changes_no_bit(
    format: str, dtype: torch.dtype, plain: WanModel, tmp_path: Path
) -> None:
    save_transformer(plain, tmp_path / "plain")
    model = load_transformer(tmp_path / "plain", dtype=dtype, linear=format)

    save_transformer(model, tmp_path / "saved", 100_000)

    assert_same(load_transformer(tmp_path / "saved", dtype=dtype), model)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["linear"] == format
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 3
    with safe_open(shards[0], "pt") as file:
        assert json.loads(file.metadata()["turbodit"])["linear"] == format
    names = {name for shard in shards for name in load_file(shard)}
    assert f"blocks.0.attn1.to_q.{QuantizedLinear.weight_name(format)}" in names


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [*FORMATS, "fp8"])
def test_quantising_while_loading_is_quantising_afterwards(
    format: str, stored: torch.dtype, plain: WanModel, tmp_path: Path
) -> None:
    model = copy.deepcopy(plain).to(stored)
    path = save(model.state_dict(), tmp_path / "model.safetensors")
    expected = load_transformer(path, CONFIG, dtype=torch.float32)
    quantize_linears(expected, "fp8-channel" if format == "fp8" else format)

    loaded = load_transformer(path, CONFIG, dtype=torch.float32, linear=format)

    assert_same(loaded, expected)
    assert output(loaded).equal(output(expected))
    assert not loaded.training


def test_quantising_while_loading_holds_one_weight_at_a_time(
    plain: WanModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import turbodit.weights

    alive: set[int] = set()
    most = 0
    read_at = turbodit.weights._read_at

    def watched(*args: object) -> torch.Tensor:
        nonlocal most
        tensor = read_at(*args)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most = max(most, len(alive))
        return tensor

    path = save(copy.deepcopy(plain).bfloat16().state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(turbodit.weights, "_read_at", watched)
    load_transformer(path, CONFIG, dtype=torch.float32, linear="int8-block")
    assert 0 < most <= 2


@pytest.mark.parametrize("old", FORMATS)
@pytest.mark.parametrize("new", FORMATS)
def test_another_format_when_asked_for(old: str, new: str, plain: WanModel, tmp_path: Path) -> None:
    model = quantized(plain, old)
    save_transformer(model, tmp_path)

    loaded = load_transformer(tmp_path, dtype=torch.float32, linear=new)

    if old == new:
        assert_same(loaded, model)
    weight = model.get_submodule(CROSS_K).weight
    twice = quantize_weight(dequantize(*weight, old), new) if old != new else weight
    layer = loaded.get_submodule(CROSS_K)
    assert layer.format == new
    assert layer.weight.values.float().equal(twice.values.float())
    assert layer.weight.scale.equal(twice.scale)


# What is wrong.


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown 8-bit format 'int4'; supported: int8-block"):
        load_transformer(tmp_path / "no matter", linear="int4")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_cannot_be_quantised(bad: float, plain: WanModel, tmp_path: Path) -> None:
    state = copy.deepcopy(plain).state_dict()
    state[f"{CROSS_K}.weight"][3, 4] = bad
    path = save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=rf"model\.pth: {CROSS_K}: .*NaN or infinite"):
        load_transformer(path, CONFIG, linear="int8-block")


def broken(state: State, change: str) -> None:
    """Change a quantised state dict in place."""
    if change == "no scale":
        del state[f"{CROSS_K}.scale"]
    elif change == "shape of scale":
        state[f"{CROSS_K}.scale"] = torch.ones(1, 2)
    elif change == "dtype of scale":
        state[f"{CROSS_K}.scale"] = state[f"{CROSS_K}.scale"].half()
    elif change == "dtype of values":
        state[f"{CROSS_K}.int8_weight"] = state[f"{CROSS_K}.int8_weight"].float()
    elif change == "another format":
        state[f"{CROSS_K}.scale"] = torch.ones(CONFIG.dim, 1)
    elif change == "not quantised":
        del state[f"{CROSS_K}.scale"]
        state[f"{CROSS_K}.weight"] = state.pop(f"{CROSS_K}.int8_weight").float()
    elif change == "no layer":
        for part in ("int8_weight", "scale", "bias"):
            del state[f"{CROSS_K}.{part}"]
    else:
        state["head.head.int8_weight"] = state.pop("head.head.weight").to(torch.int8)
        state["head.head.scale"] = torch.ones(1, 2)


LAYER = CROSS_K.replace(".", r"\.")


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "no scale": rf"of 1 layers are of no 8-bit format: {LAYER} \(int8_weight.*, no scale\)",
        "shape of scale": rf"{LAYER} \(int8_weight int8 \(144, 144\), scale float32 \(1, 2\)\)",
        "dtype of scale": rf"{LAYER} .*scale float16 \(2, 2\)\).*float32 scale for 128 x 128",
        "dtype of values": rf"of 1 layers are of no 8-bit format: {LAYER} \(int8_weight float32",
        "another format": rf"mixes formats.*{LAYER} is int8-channel",
        "not quantised": rf"mixes formats.*{LAYER} is not quantised",
        "no layer": rf"3 missing: {LAYER}\.bias, {LAYER}\.int8_weight, {LAYER}\.scale$",
        "head": r"missing: head\.head\.weight; 2 unexpected: head\.head\.int8_weight",
    }.items(),
)
def test_broken_files(change: str, message: str, plain: WanModel, tmp_path: Path) -> None:
    state = in_blocks_of_128(plain.state_dict())
    broken(state, change)
    path = save(state, tmp_path / "model.pth")
    for linear in (None, "int8-channel"):
        with pytest.raises(ValueError, match=message):
            load_transformer(path, CONFIG, linear=linear)


def test_a_config_that_says_another_format(plain: WanModel, tmp_path: Path) -> None:
    save_transformer(quantized(plain, "int8-channel"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"linear": "int8-block"}))
    with pytest.raises(ValueError, match="layers are int8-block, but they are int8-channel"):
        load_transformer(tmp_path)
    save_transformer(plain, tmp_path)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layers are int8-channel, but they are not quantised"):
        load_transformer(tmp_path)


def test_scales_of_fp8_that_do_not_fit(plain: WanModel, tmp_path: Path) -> None:
    content = scaled_fp8(plain.state_dict())
    name = f"model.diffusion_model.{CROSS_K}.scale_weight"
    path = save(content | {name: torch.ones(144)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=rf"{LAYER}\.scale_weight \(144,\) is expected to be one"):
        load_transformer(path, CONFIG)


def test_a_model_of_two_formats_is_not_saved(plain: WanModel, tmp_path: Path) -> None:
    model = quantized(plain, "int8-block")
    model.set_submodule(
        CROSS_K, QuantizedLinear.from_linear(plain.get_submodule(CROSS_K), "int8-channel")
    )
    with pytest.raises(ValueError, match="mixes formats of linear layers: int8-block, int8-chan"):
        save_transformer(model, tmp_path)
