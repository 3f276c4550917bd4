"""What files say about a model's use: read, checked, written, and what becomes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from tests.tiny_models import TEXT_DIM

from turbodit.checkpoints import load_transformer, quantize_file, save_transformer
from turbodit.checkpoints.lora import write_lora
from turbodit.checkpoints.merge import merge_loras
from turbodit.checkpoints.stated import agreed, check_stated, choose_attention
from turbodit.checkpoints.transformer import open_transformer, stated_use
from turbodit.config import PRESETS, TransformerConfig
from turbodit.model.wan import WanModel
from turbodit.training.parameters import LoRA, merge_lora, select_trainable

CONFIG = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=TEXT_DIM, freq_dim=32
)
SLA = {"attention": "sla", "attention_settings": {"ratio": 0.3, "block_q": 16, "block_k": 32}}
STATED = SLA | {"sampling": {"solver": "few-step", "steps": 3, "sigma_max": 120}}


def tiny(attention: str = "sla") -> WanModel:
    torch.manual_seed(0)
    return WanModel(CONFIG, attention)


# Through files.


def test_it_goes_with_the_weights(tmp_path: Path) -> None:
    save_transformer(tiny(), tmp_path / "saved", stated=STATED)
    assert open_transformer(tmp_path / "saved").stated == STATED
    load_transformer(tmp_path / "saved", attention="sla")
    config = WanTransformer3DModel.load_config(tmp_path / "saved")
    assert config["attention_settings"] == SLA["attention_settings"]  # diffusers reads on

    for name in ("out", "out.safetensors"):
        quantize_file(tmp_path / "saved", tmp_path / name, "int8-channel")
        stored = open_transformer(tmp_path / name)
        assert (stored.stated, stored.format) == (STATED, "int8-channel")
    quantize_file(tmp_path / "out.safetensors", tmp_path / "again", "int8-channel")
    assert stated_use(tmp_path / "again") == STATED


def test_nothing_is_stated_unasked(tmp_path: Path) -> None:
    save_transformer(tiny("sdpa"), tmp_path / "saved")
    assert stated_use(tmp_path / "saved") == {}
    torch.save(tiny("sdpa").state_dict(), tmp_path / "model.pth")
    assert stated_use(tmp_path / "model.pth") == {}
    assert stated_use(tmp_path / "none.safetensors") == {}  # loading it says what is wrong


def test_a_merged_lora_is_checked(tmp_path: Path) -> None:
    save_transformer(tiny("sdpa"), tmp_path / "base", stated={"sampling": {"steps": 7}})
    factors = {"blocks.0.self_attn.q": (torch.ones(2, 24), torch.ones(24, 2))}
    branch = {n: p for n, p in tiny().state_dict().items() if "proj_l" in n}
    path = tmp_path / "lora.safetensors"
    write_lora(path, factors, 2.0, "native", branch, SLA)
    merge_loras(tmp_path / "base", [(path, 1.0)], tmp_path / "out")
    assert stated_use(tmp_path / "out") == SLA | {"sampling": {"steps": 7}}
    write_lora(path, factors, 2.0, "native", branch, {"attention": "psychic"})
    with pytest.raises(ValueError, match=r"lora\.safetensors: unknown .*'psychic'; supported: sd"):
        merge_loras(tmp_path / "base", [(path, 1.0)], tmp_path / "other")


@pytest.mark.parametrize("single", [False, True])
def test_what_is_unknown_names_the_file(single: bool, tmp_path: Path) -> None:
    save_transformer(tiny("sdpa"), tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    content = json.loads(path.read_text()) | {"attention": "psychic"}
    path.write_text(json.dumps(content))
    place = r"saved/config\.json"
    source = tmp_path / "saved"
    if single:
        source, place = source / "diffusion_pytorch_model.safetensors", r"metadata of .*safetens"
        data = source.read_bytes().replace(b'\\"eps\\"', b'\\"sampling\\": 4, \\"eps\\"')
        length = int.from_bytes(data[:8], "little") + len(b'\\"sampling\\": 4, ')
        source.write_bytes(length.to_bytes(8, "little") + data[8:])
    with pytest.raises(ValueError, match=place):
        load_transformer(source)


def test_models_with_a_lora_are_not_saved(tmp_path: Path) -> None:
    model = tiny()
    select_trainable(model, LoRA(rank=2))
    with pytest.raises(ValueError, match=r"LoRA .*20 layers, such as blocks\.0.*merge it first"):
        save_transformer(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    for layer in (m for m in model.modules() if hasattr(m, "lora_B")):
        layer.reset_parameters()
    merge_lora(model)
    save_transformer(model, tmp_path / "saved")


# What is checked.


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"linear": "fp8"}, "it states linear; supported: attention, attention_settings, sampling"),
        ({"attention": "psychic"}, "it: unknown attention back-end 'psychic'; supported: sdpa"),
        ({"attention": ["sla"]}, r"it: attention \['sla'\] does not take \{\}"),
        ({"attention_settings": {"ratio": 0.1}}, "it states attention_settings, but not attention"),
        (
            {"attention": "sagesla", "attention_settings": {"variant": "paper"}},
            "it: attention 'sagesla' has no setting variant; supported: ratio",
        ),
        ({"attention": "sla", "attention_settings": {"ratio": 3}}, r"it: .*\(0, 1\], got 3"),
        ({"attention": "sla", "attention_settings": {"ratio": "3"}}, "not take {'ratio': '3'}"),
        (
            {"attention": "sla", "attention_settings": [0.1]},
            r"settings is \[0\.1\], expected names",
        ),
        ({"sampling": 4}, "it: sampling is 4, expected names and their values"),
        ({"sampling": {"speed": 4}}, "it: sampling has no speed; supported: steps, shift, guid"),
        ({"sampling": {"steps": 4.0}}, r"it: sampling steps is 4\.0, expected int"),
        ({"sampling": {"steps": True}}, "it: sampling steps is True, expected int"),
        ({"sampling": {"shift": "5"}}, "it: sampling shift is '5', expected float"),
        ({"sampling": {"boundary": "5"}}, "boundary is '5', expected float or NoneType"),
        ({"sampling": {"solver": "ddim"}}, "is 'ddim', expected 'unipc' or 'euler' or"),
    ],
)
def test_what_is_refused(stated: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check_stated(stated, "it")
    with pytest.raises(ValueError):
        save_transformer(tiny("sdpa"), tmp_path / "saved", stated=stated)
    assert not (tmp_path / "saved").exists()


def test_checking_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    check_stated(STATED, "it")
    choose_attention(PRESETS["spritewan"], STATED, "sagesla", {})
    assert torch.get_rng_state().equal(before)


def test_experts_agree() -> None:
    high, low = Path("high"), Path("low")
    assert agreed({high: STATED, low: dict(STATED)}) == STATED
    assert agreed({high: {}}) == {}
    with pytest.raises(ValueError, match=r"same attention; high states sla, low none"):
        agreed({high: SLA, low: {}})
    with pytest.raises(ValueError, match=r"same attention_settings; high states .*0\.3.*0\.2"):
        agreed({high: SLA, low: SLA | {"attention_settings": {"ratio": 0.2}}})
    with pytest.raises(ValueError, match=r"same sampling; high states none, low .*'steps': 3"):
        agreed({high: SLA, low: STATED})


# What is chosen.

PLAIN = PRESETS["Wan2.1-T2V-1.3B"]
SPRITE = replace(PLAIN, attention_blocks=(16, 16))
BLOCKS = {"block_q": 16, "block_k": 16}
OWN = SLA["attention_settings"]


@pytest.mark.parametrize(
    ("model", "stated", "name", "given", "expected"),
    [
        (PLAIN, {}, None, {}, ("sdpa", {})),
        (SPRITE, {}, None, {}, ("sdpa", {})),
        (SPRITE, {}, "sparge", {}, ("sparge", BLOCKS)),
        (PLAIN, SLA, None, {}, ("sla", OWN)),
        (SPRITE, SLA, None, {}, ("sla", OWN)),
        (SPRITE, {"attention": "sla"}, None, {}, ("sla", BLOCKS)),
        (PLAIN, SLA, "sagesla", {}, ("sagesla", OWN)),
        (PLAIN, SLA, "sagesla", {"ratio": 0.2}, ("sagesla", OWN | {"ratio": 0.2})),
        (PLAIN, SLA, None, {"block_k": 64}, ("sla", OWN | {"block_k": 64})),
        (PLAIN, SLA, "sdpa", {}, ("sdpa", {})),
        (PLAIN, SLA, "linear", {}, ("linear", {})),
        (
            PLAIN,
            {"attention": "sla", "attention_settings": {"variant": "released"}},
            "sagesla",
            {},
            ("sagesla", {}),
        ),
    ],
)
def test_what_is_asked_for_wins(model, stated, name, given, expected) -> None:
    assert choose_attention(model, stated, name, given) == expected


def test_what_cannot_be_chosen() -> None:
    paper = {"attention": "sla", "attention_settings": {"variant": "paper"}}
    assert choose_attention(PLAIN, paper, None, {}) == ("sla", {"variant": "paper"})
    with pytest.raises(ValueError, match=r"variant 'paper' of .*'sagesla'.*supported: 'sla'"):
        choose_attention(PLAIN, paper, "sagesla", {})
    with pytest.raises(ValueError, match="unknown attention back-end 'psychic'; supported: sdpa"):
        choose_attention(PLAIN, SLA, "psychic", {})
    with pytest.raises(ValueError, match="attention 'sdpa' has no setting ratio"):
        choose_attention(PLAIN, {}, None, {"ratio": 0.2})
