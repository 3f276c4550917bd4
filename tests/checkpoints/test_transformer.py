from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tests.native_models import native_transformer, save_native_transformer
from tests.tiny_models import IMAGE_DIM, IMAGE_TOKENS, TEXT_DIM, Variant, tiny_transformer

from turbodit.checkpoints import load_transformer, save_transformer, transformer_config
from turbodit.config import PRESETS, TransformerConfig
from turbodit.model.wan import WanModel

State = dict[str, torch.Tensor]

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=TEXT_DIM, freq_dim=32
)


@pytest.fixture
def state() -> State:
    """A tiny T2V model under original names."""
    return native_transformer(tiny_transformer())


def assert_holds(model: WanModel, state: State) -> None:
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["t2v", "i2v", "flf2v", "i2v-a14b", "ti2v"])
@pytest.mark.parametrize("layout", ["diffusers", "native"])
def test_folders(variant: Variant, layout: str, tmp_path: Path) -> None:
    if layout == "diffusers":
        tiny_transformer(variant).save_pretrained(tmp_path)
    else:
        save_native_transformer(tmp_path, variant, seed=0)

    model = load_transformer(tmp_path, dtype=torch.float32)

    assert_holds(model, native_transformer(tiny_transformer(variant)))
    channels = 48 if variant == "ti2v" else 16
    assert model.config == TransformerConfig(
        dim=24,
        ffn_dim=40,
        num_heads=2,
        num_layers=2,
        in_dim=channels + (20 if "i2v" in variant[:3] or variant == "flf2v" else 0),
        out_dim=channels,
        text_dim=TEXT_DIM,
        freq_dim=32,
        image_dim=IMAGE_DIM if variant in ("i2v", "flf2v") else None,
        image_positions=2 * IMAGE_TOKENS if variant == "flf2v" else None,
    )
    assert transformer_config(tmp_path) == model.config
    assert not model.training


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def linear_patches(state: State) -> State:
    return {**state, "patch_embedding.weight": state["patch_embedding.weight"].flatten(1)}


def checkpointed(state: State) -> State:
    trace = "._checkpoint_wrapped_module."
    return {
        ".".join(name.split(".")[:2]) + trace + name.split(".", 2)[2]
        if name.startswith("blocks.")
        else name: tensor
        for name, tensor in state.items()
    }


def averaged_and_raw(state: State) -> State:
    raw = {f"net.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    return {**raw, **prefixed("net_ema.")(state)}


def with_other_networks(state: State) -> State:
    return {**prefixed("model.diffusion_model.")(state), "first_stage_model.w": torch.zeros(1)}


def with_unused_norms(_: State) -> State:
    state = dict(tiny_transformer().state_dict())
    return {**state, "blocks.0.attn2.norm_added_q.weight": torch.zeros(24)}


WRITERS: dict[str, Callable[[State], State]] = {
    "original": dict,
    "diffusers": lambda _: dict(tiny_transformer().state_dict()),
    "older diffusers": with_unused_norms,
    "net": prefixed("net."),
    "net_ema and net": averaged_and_raw,
    "ComfyUI": prefixed("diffusion_model."),
    "ComfyUI with all networks": with_other_networks,
    "checkpointed": checkpointed,
    "compiled": prefixed("_orig_mod."),
    "linear patches": linear_patches,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_single_files(writer: str, state: State, tmp_path: Path) -> None:
    content = WRITERS[writer](state)
    save_file(content, tmp_path / "model.safetensors")
    torch.save(content, tmp_path / "model.pth")
    for path in (tmp_path / "model.safetensors", tmp_path / "model.pth"):
        assert_holds(load_transformer(path, CONFIG, dtype=torch.float32), state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapped_state_dicts(wrapper: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({wrapper: prefixed("net.")(state), "iteration": 3}, path)
    assert_holds(load_transformer(path, CONFIG, dtype=torch.float32), state)


def test_single_file_takes_the_shape_of_a_preset(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(
        ValueError, match=r"fits no known model \(width 24, 2 layers.*give its config"
    ):
        load_transformer(tmp_path / "model.pth")
    tiny = replace(PRESETS["Wan2.1-T2V-1.3B"], transformer=replace(CONFIG, text_len=64))
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    assert transformer_config(tmp_path / "model.pth") == tiny.transformer


def test_half_precision_keeps_what_wan_keeps_in_float32(tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    model = load_transformer(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        small = model.keep_float32(name)
        assert parameter.dtype == (torch.float32 if small else torch.bfloat16), name
    assert model.blocks[0].self_attn.q.weight.dtype == torch.bfloat16
    assert model.blocks[0].modulation.dtype == torch.float32


@pytest.mark.parametrize("max_shard_size", ["5GB", 20_000])
def test_saved_in_the_layout_of_diffusers(max_shard_size: int | str, tmp_path: Path) -> None:
    reference = tiny_transformer("flf2v")
    reference.save_pretrained(tmp_path / "original")
    model = load_transformer(tmp_path / "original", dtype=torch.float32)

    for size in (30_000, max_shard_size):  # the second replaces the first
        save_transformer(model, tmp_path / "saved", size)

    files = sorted((tmp_path / "saved").iterdir())
    shards = [path for path in files if path.suffix == ".safetensors"]
    assert len(files) == (2 if len(shards) == 1 else len(shards) + 2)
    assert len(shards) == 1 if max_shard_size == "5GB" else len(shards) > 3
    assert_holds(load_transformer(tmp_path / "saved", dtype=torch.float32), model.state_dict())
    config = WanTransformer3DModel.load_config(tmp_path / "saved")
    expected = dict(WanTransformer3DModel.load_config(tmp_path / "original"))
    assert expected.pop("_diffusers_version")
    assert {name: config[name] for name in expected} == expected
    written = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=0)


def test_text_length_survives_saving(tmp_path: Path) -> None:
    config = replace(CONFIG, text_len=64)
    save_transformer(WanModel(config), tmp_path)
    assert transformer_config(tmp_path) == config


def test_failed_saving_keeps_the_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = WanModel(CONFIG)
    save_transformer(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("turbodit.checkpoints.write._bytes", no_space)
    with pytest.raises(OSError, match=r"cannot write .*no space left; it has .* bytes are free"):
        save_transformer(model, tmp_path, 20_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_packed_model_is_not_saved(tmp_path: Path) -> None:
    model = WanModel(CONFIG)
    model.pack_projections()
    with pytest.raises(ValueError, match=r"cannot be saved, it has no blocks\.0\.cross_attn\.k"):
        save_transformer(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_kinds_that_are_refused(state: State, tmp_path: Path) -> None:
    torch.save({**state, "blocks.0.self_attn.q.lora_A.weight": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is a LoRA.*turbodit merge --lora"):
        load_transformer(tmp_path / "a.pth", CONFIG)


def test_weights_that_do_not_fit(state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    for layer in (0, 1):
        for part in ("weight", "bias"):
            for linear in "qkv":
                del state[f"blocks.{layer}.self_attn.{linear}.{part}"]
    state["extra"] = torch.zeros(1)
    state["head.modulation"] = torch.zeros(1, 3, 24)
    torch.save(state, path)
    with pytest.raises(ValueError) as error:
        load_transformer(path, CONFIG)
    message = str(error.value)
    assert "12 missing: blocks.0.self_attn.k.bias" in message and "and 2 more" in message
    assert "1 unexpected: extra" in message
    assert "head.modulation (1, 3, 24), expected (1, 2, 24)" in message


def test_something_else(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"holds no Wan transformer.*conv\.weight"):
        load_transformer(tmp_path / "model.pth", CONFIG)


def test_folders_with_other_configs(tmp_path: Path) -> None:
    save_transformer(WanModel(CONFIG), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"_class_name": "FluxTransformer2DModel"}, "architecture Flux.*supported: WanModel, Wan"),
        ({"cross_attn_norm": False}, "without cross_attn_norm"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_transformer(tmp_path)
    del config["ffn_dim"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json does not say 'ffn_dim'"):
        load_transformer(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is truncated"):
        load_transformer(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_transformer(tmp_path)


# Sparse-linear attention: its files name the linear branch as TurboDiffusion does.

PROJ_L = "self_attn.attn_op.local_attn.proj_l"


@pytest.fixture
def sla_state(state: State) -> State:
    dim = CONFIG.head_dim
    return state | {
        f"blocks.{i}.{PROJ_L}.{name}": torch.randn(shape)
        for i in range(CONFIG.num_layers)
        for name, shape in (("weight", (dim, dim)), ("bias", (dim,)))
    }


@pytest.mark.parametrize("attention", ["sla", "sagesla"])
def test_a_trained_linear_branch_is_read_and_written(
    sla_state: State, attention: str, tmp_path: Path
) -> None:
    save_file(sla_state, tmp_path / "sla.safetensors")
    model = load_transformer(tmp_path / "sla.safetensors", CONFIG, attention=attention)
    name = f"blocks.1.{PROJ_L}.weight"
    loaded = model.state_dict()[name]
    assert loaded.dtype == torch.float32 and torch.equal(loaded, sla_state[name])
    save_transformer(model, tmp_path / "saved")
    again = load_transformer(tmp_path / "saved", attention=attention)
    assert torch.equal(again.state_dict()[name], loaded)


def test_a_model_without_a_linear_branch_gets_one_that_adds_nothing(
    state: State, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "dense.safetensors")
    with pytest.warns(UserWarning, match="was not trained with sparse-linear attention: 'sla'"):
        model = load_transformer(tmp_path / "dense.safetensors", CONFIG, attention="sla")
    branches = [p for name, p in model.named_parameters() if "proj_l" in name]
    assert len(branches) == 2 * CONFIG.num_layers
    assert all(not p.any() and p.dtype == torch.float32 for p in branches)


def test_a_trained_linear_branch_is_not_dropped(sla_state: State, tmp_path: Path) -> None:
    save_file(sla_state, tmp_path / "sla.safetensors")
    with pytest.raises(ValueError, match="supported: attention 'sla' or 'sagesla', got 'sdpa'"):
        load_transformer(tmp_path / "sla.safetensors", CONFIG)
    del sla_state[f"blocks.0.{PROJ_L}.bias"]
    save_file(sla_state, tmp_path / "torn.safetensors")
    with pytest.raises(ValueError, match=r"proj_l\.bias"):
        load_transformer(tmp_path / "torn.safetensors", CONFIG, attention="sla")


def test_settings_reach_the_attention(sla_state: State, tmp_path: Path) -> None:
    save_file(sla_state, tmp_path / "sla.safetensors")
    model = load_transformer(
        tmp_path / "sla.safetensors",
        CONFIG,
        attention="sla",
        attention_settings={"ratio": 0.3, "block_k": 16},
    )
    op = model.blocks[1].self_attn.attn_op.local_attn
    assert (op.ratio, op.block_k) == (0.3, 16)
