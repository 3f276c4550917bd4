from __future__ import annotations

import errno

import pytest
import torch
from torch import nn

from turbodit.prompt_cache import PromptCache, fingerprint


def test_stores_and_loads_by_prompt_and_identity(tmp_path):
    cache = PromptCache(tmp_path / "cache", "encoder A")
    embedding = torch.randn(1, 4, 8).bfloat16()
    assert cache.load("a fox") is None
    cache.store("a fox", embedding)
    loaded = cache.load("a fox")
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(loaded, embedding, rtol=0, atol=0)
    assert cache.load("a cat") is None
    assert PromptCache(tmp_path / "cache", "encoder B").load("a fox") is None
    assert [path.suffix for path in cache.folder.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("damage", [b"", b"\x00" * 4, b"\xff" * 64])
def test_a_damaged_entry_warns_and_can_be_replaced(tmp_path, damage):
    cache = PromptCache(tmp_path, "encoder")
    cache.path("a fox").write_bytes(damage)
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.load("a fox") is None
    cache.store("a fox", torch.ones(1, 2, 3))
    assert cache.load("a fox").sum() == 6


def test_a_truncated_entry_is_damaged(tmp_path):
    cache = PromptCache(tmp_path, "encoder")
    cache.store("a fox", torch.ones(1, 2, 3))
    whole = cache.path("a fox").read_bytes()
    cache.path("a fox").write_bytes(whole[:-4])
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.load("a fox") is None


def test_a_full_disk_names_the_cache(tmp_path, monkeypatch):
    def fail(*names: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match=r"cannot write the prompt cache .*: No space left"):
        PromptCache(tmp_path, "encoder").store("a fox", torch.ones(1, 2, 3))
    assert not list(tmp_path.iterdir())


def test_fingerprint_tells_weights_apart():
    torch.manual_seed(0)
    one, two = nn.Linear(100, 10), nn.Linear(100, 10)
    assert fingerprint(one) != fingerprint(two)
    two.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(one) != fingerprint(two.bfloat16())
