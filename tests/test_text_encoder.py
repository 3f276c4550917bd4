from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from tests.native_models import native_text_encoder
from tests.tiny_models import (
    TEXT_DIM,
    tiny_diffusers_folder,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
)

from turbodit.text_encoder import TextEncoder, clean_prompt

PROMPTS = ["a red  cat &amp;amp; a fox\njumps left", "", "snow â€” ZÃ¼rich " * 40]


@pytest.fixture
def encoder() -> TextEncoder:
    return TextEncoder(tiny_text_encoder(), tiny_tokenizer(), max_length=32)


def test_matches_diffusers(encoder: TextEncoder) -> None:
    pipeline = WanPipeline(
        tokenizer=encoder.tokenizer,
        text_encoder=encoder.model,
        vae=tiny_vae(),
        scheduler=UniPCMultistepScheduler(),
    )
    with torch.no_grad():
        expected = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=32)

    embeddings = encoder.encode(PROMPTS)

    assert embeddings.shape == (3, 32, TEXT_DIM)
    torch.testing.assert_close(embeddings, expected)


def test_zeros_past_the_end(encoder: TextEncoder) -> None:
    lengths = [min(encoder.count_tokens(prompt), 32) for prompt in PROMPTS]
    assert lengths[1:] == [1, 32]
    for embedding, length in zip(encoder.encode(PROMPTS), lengths, strict=True):
        assert embedding[:length].norm(dim=-1).min() > 0
        assert not embedding[length:].any()


def test_a_prompt_does_not_depend_on_its_neighbours(encoder: TextEncoder) -> None:
    together, alone = encoder.encode(PROMPTS), encoder.encode(PROMPTS[:1])
    torch.testing.assert_close(together[:1], alone)


def test_what_is_cut_off_has_no_effect(encoder: TextEncoder) -> None:
    prompt = clean_prompt(PROMPTS[2])
    cut = encoder.truncated(prompt)
    assert cut is not None and prompt.endswith(cut)
    kept = prompt.removesuffix(cut)
    assert encoder.truncated(kept) is None
    torch.testing.assert_close(encoder.encode([kept]), encoder.encode([prompt]))
    assert encoder.truncated(PROMPTS[0]) is None
    assert encoder.truncated("") is None


def test_very_long_prompt(encoder: TextEncoder) -> None:
    prompt = "a red cat " * 5000
    assert encoder.count_tokens(prompt) == 15001
    cut = encoder.truncated(prompt)
    assert cut is not None and len(cut) > 49_000
    assert encoder.encode([prompt]).shape == (1, 32, TEXT_DIM)


def test_clean_prompt() -> None:
    assert clean_prompt(" a  &amp;lt;b&amp;gt;\t\nâ€œcâ€\x9d ") == 'a <b> "c"'


def test_folder(tmp_path: Path, encoder: TextEncoder) -> None:
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")

    loaded = TextEncoder.from_pretrained(tmp_path / "text_encoder", tmp_path / "tokenizer", 32)

    torch.testing.assert_close(loaded.encode(PROMPTS), encoder.encode(PROMPTS), rtol=0, atol=0)
    half = TextEncoder.from_pretrained(
        tmp_path / "text_encoder", tmp_path / "tokenizer", 32, dtype=torch.bfloat16
    )
    assert half.encode(PROMPTS).dtype == torch.bfloat16


def test_original_file(tmp_path: Path, encoder: TextEncoder) -> None:
    torch.save(native_text_encoder(encoder.model.state_dict()), tmp_path / "t5.pth")
    encoder.tokenizer.save_pretrained(tmp_path)

    loaded = TextEncoder.from_pretrained(tmp_path / "t5.pth", tmp_path, 32)

    encoder.model.bfloat16().float()  # the file is in bfloat16
    torch.testing.assert_close(loaded.encode(PROMPTS), encoder.encode(PROMPTS))


def test_files_that_do_not_fit(tmp_path: Path, encoder: TextEncoder) -> None:
    encoder.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        TextEncoder.from_pretrained(tmp_path / "none", tmp_path)
    with pytest.raises(FileNotFoundError, match="in tokenizer folder"):
        TextEncoder.from_pretrained(tmp_path, tmp_path / "none")
    state = native_text_encoder(encoder.model.state_dict())
    del state["blocks.1.ffn.fc2.weight"]
    state["blocks.1.extra.weight"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(TEXT_DIM + 1)
    torch.save(state, tmp_path / "t5.pth")
    with pytest.raises(ValueError, match=r"1 missing.*wo.*1 unexpected.*extra.*final_layer_norm"):
        TextEncoder.from_pretrained(tmp_path / "t5.pth", tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected Wan's umT5 file"):
        TextEncoder.from_pretrained(tmp_path / "other.pth", tmp_path)


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    folder = tiny_diffusers_folder(tmp_path / "model")
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match=r"cannot load the tokenizer in .*tokenizer"):
        TextEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json or spiece\.model in"):
        TextEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer")
