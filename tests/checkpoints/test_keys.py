from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from tests.tiny_models import Variant, tiny_transformer

from turbodit.checkpoints.keys import to_diffusers, to_native
from turbodit.checkpoints.transformer import _from_diffusers
from turbodit.model.wan import WanModel


@pytest.mark.parametrize("variant", ["t2v", "i2v", "flf2v", "i2v-a14b", "ti2v"])
def test_all_names_of_both_models(variant: Variant) -> None:
    theirs = tiny_transformer(variant)
    with torch.device("meta"):
        ours = WanModel(_from_diffusers(dict(theirs.config)))

    shapes = {to_diffusers(name): tensor.shape for name, tensor in ours.state_dict().items()}

    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {to_native(name) for name in theirs.state_dict()} == ours.state_dict().keys()


def test_agrees_with_the_converter_of_diffusers() -> None:
    names = [to_native(name) for name in tiny_transformer("i2v").state_dict()]
    converted = convert_wan_transformer_to_diffusers({name: name for name in names})
    assert {to_diffusers(name): name for name in names} == converted


def test_unknown_names_stay() -> None:
    for name in ("blocks.0.extra.weight", "norm3.weight", "vae.conv.bias", "blocks.1.ffn.1.weight"):
        assert to_native(name) == to_diffusers(name) == name
