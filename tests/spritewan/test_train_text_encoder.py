"""The text encoder's training: tokenizer, labels, exact resume, and an export that loads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5EncoderModel

from turbodit.spritewan import train_text_encoder
from turbodit.spritewan.train_text_encoder import (
    MAX_TOKENS,
    Options,
    build_tokenizer,
    misspell,
    named_size,
)
from turbodit.spritewan.world import OBJECTS, scene


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer([scene(i).caption for i in range(200)])


@pytest.fixture
def step_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that last `minutes` steps."""

    class StepClock:
        def __init__(self, minutes: float) -> None:
            self.steps = int(minutes)
            self.seconds = 0.0

        @property
        def over(self) -> bool:
            self.seconds += 1
            return self.seconds > self.steps

    monkeypatch.setattr(train_text_encoder, "Clock", StepClock)


def options(out: Path, steps: int) -> Options:
    """So many minutes in all that the seconds used do not move the learning rate."""
    return Options(
        out,
        minutes=steps,
        total_minutes=1e12,
        scenes=100,
        captions_per_scene=2,
        batch=8,
        evaluation_captions=16,
        device="cpu",
    )


@pytest.mark.parametrize(
    "text", ["a red fox runs", "füchse 🦊 im schnee", "狐狸", "l'éléphant, 42 fois!", ""]
)
def test_every_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_words_of_captions_are_single_tokens_in_any_case(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    expected = tokenizer.convert_tokens_to_ids(["▁the", "▁night", ",", "</s>"])
    assert tokenizer("The \n Night,").input_ids == expected


def test_tokenizer_pads_with_0_and_cuts_at_the_end(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == MAX_TOKENS == 64
    tokens = loaded(["a cat " * 100, "a cat"], padding="max_length", truncation=True)
    long, short = tokens.input_ids
    assert len(long) == len(short) == MAX_TOKENS
    assert long[-1] == 1 and long[:-1] == tokenizer("a cat " * 100).input_ids[: MAX_TOKENS - 1]
    length = sum(tokens.attention_mask[1])
    assert short[length - 1] == 1 and set(short[length:]) == {0}
    assert loaded("Füchse 🦊").input_ids == tokenizer("Füchse 🦊").input_ids


@pytest.mark.parametrize(
    ("caption", "size"),
    [("A tiny cat grows larger.", 0), ("huge cat, sits", 1), ("a cat gets smaller", 2)],
)
def test_named_size_is_an_adjectives(caption: str, size: int) -> None:
    assert named_size(caption) == size


def test_misspelling_is_slight_and_repeatable() -> None:
    caption = "A small elephant is circling around on a checkerboard"
    texts = [misspell(caption, random.Random(seed)) for seed in range(20)]
    assert texts == [misspell(caption, random.Random(seed)) for seed in range(20)]
    assert len(set(texts)) > 5 and caption not in texts
    assert all(abs(len(text) - len(caption)) <= 3 for text in texts)


def test_labels_of_examples(tokenizer: PreTrainedTokenizerFast) -> None:
    scenes = [scene(i) for i in range(20)]
    examples = train_text_encoder.make_examples(scenes, [s.caption for s in scenes], tokenizer)
    for row, one in enumerate(scenes):
        assert set(examples.objects[row].nonzero().flatten().tolist()) == set(one.objects)
        assert examples.two[row] == len(one.objects) - 1
        assert examples.motion[row] == one.motion
    assert examples.objects.shape == (20, len(OBJECTS))
    torch.testing.assert_close(examples.objects.sum(dim=1), torch.ones(20))
    few = examples.rows(torch.tensor([3]), torch.device("cpu"))
    assert few.ids.shape == (1, int(examples.mask[3].sum()))


def test_export_loads_and_padding_does_not_matter(step_clock: None, tmp_path: Path) -> None:
    train_text_encoder.train(options(tmp_path, 12))
    encoder = UMT5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert encoder.dtype == torch.bfloat16
    encoder = encoder.float().eval()
    captions = [scene(i).caption for i in range(32)]
    padded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    real = padded.attention_mask == 1
    with torch.no_grad():
        outputs = encoder(padded.input_ids, padded.attention_mask).last_hidden_state
        alone = tokenizer(captions[:1], return_tensors="pt")
        expected = encoder(alone.input_ids, alone.attention_mask).last_hidden_state[0]
    torch.testing.assert_close(outputs[0, : len(expected)], expected, rtol=1e-4, atol=1e-5)
    assert outputs[real].square().mean().sqrt().item() == pytest.approx(1.0, abs=0.15)


def test_loss_falls(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    scenes = [scene(i) for i in range(8)]
    examples = train_text_encoder.make_examples(scenes, [s.caption for s in scenes], tokenizer)
    model = train_text_encoder.LabelReader(len(tokenizer))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model.loss(examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_stopped_run_goes_on_bit_for_bit(step_clock: None, tmp_path: Path) -> None:
    train_text_encoder.train(options(tmp_path / "whole", 4))
    for _ in range(2):
        train_text_encoder.train(options(tmp_path / "halves", 2))
    whole, halves = (
        load_file(tmp_path / name / "state" / "state-000.safetensors")
        for name in ("whole", "halves")
    )
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
