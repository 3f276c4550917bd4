"""Train SpriteWan's text encoder: a small umT5 encoder and its tokenizer, on captions.

    python -m turbodit.spritewan.train_text_encoder --out runs/text --minutes 4 --device cpu

The encoder learns to let throw-away heads read a caption's labels (objects, motion,
background, size if it is named) from its outputs, and each token from its own output, so
that cross attention finds both the whole and the parts there. A share of the captions has
typing errors. Then the output is scaled to unit size, channel by channel, and frozen.

A run that was stopped and started again goes on as if it never stopped. Writes
`<out>/text_encoder` and `<out>/tokenizer` (diffusers folders), `<out>/state` and
`<out>/log.jsonl`.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from turbodit.config import PRESETS
from turbodit.spritewan.captions import SIZE_WORDS
from turbodit.spritewan.state import Clock, StageLog
from turbodit.spritewan.trainer import Trainer, learning_rate, save_pretrained
from turbodit.spritewan.world import (
    BACKGROUNDS,
    HELD_OUT,
    MOTIONS,
    OBJECTS,
    Scene,
    paraphrases,
    scene,
)

MAX_TOKENS = PRESETS["spritewan"].transformer.text_len
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2
BYTES = [f"<0x{value:02X}>" for value in range(256)]
PARTS_OF_WORDS = 512
PART_PENALTY = 10.0  # of log probability: a whole word beats any of its parts
ENCODER = {
    "d_model": PRESETS["spritewan"].transformer.text_dim,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,  # fresh captions are cheaper
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "use_cache": False,
    "is_encoder_decoder": False,
}
TOKEN_WEIGHT = 0.1
WARMUP_STEPS = 50


@dataclass(frozen=True)
class Options:
    """Settings of one training run."""

    out: Path
    minutes: float = 2.0  # of this run; a later run with the same command goes on
    total_minutes: float = 2.0  # over all runs: the learning rate falls along them
    scenes: int = 12_000
    captions_per_scene: int = 4
    misspelt_share: float = 0.3
    batch: int = 128
    lr: float = 2e-3
    evaluation_captions: int = 2048
    save_minutes: float = 2.0
    log_steps: int = 50
    device: str = "cuda"


class Examples(NamedTuple):
    """Tokenized captions and what they say.

    ids, mask: (N, L) int64; objects: (N, number of objects) float32, the same share for each
    object named, together 1; two, motion, background, size: (N,) int64, whether there are two
    objects, and a size one past the last where the caption names none.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    objects: torch.Tensor
    two: torch.Tensor
    motion: torch.Tensor
    background: torch.Tensor
    size: torch.Tensor

    def rows(self, index: torch.Tensor, device: torch.device) -> Examples:
        """Some of the examples, without columns that only hold padding."""
        length = int(self.mask[index].sum(dim=1).max())
        ids, mask, *labels = (tensor[index].to(device) for tensor in self)
        return Examples(ids[:, :length], mask[:, :length], *labels)


def build_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """A lower-casing unigram tokenizer (arXiv:1804.10959) of umT5's conventions.

    Its pieces are the captions' words and, for other words, learned parts of words;
    characters that the captions never had become bytes. A leading "▁" marks the start of a
    word, `</s>` ends every text, `<pad>` is 0.
    """
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    special = [PAD, END, UNKNOWN]
    trainer = UnigramTrainer(
        vocab_size=PARTS_OF_WORDS,
        special_tokens=special,
        unk_token=UNKNOWN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["vocab"]
    log_probability = {
        piece: score - PART_PENALTY for piece, score in learned if piece not in special
    }
    words = Counter(
        word
        for caption in captions
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
            tokenizer.normalizer.normalize_str(caption)
        )
    )
    log_probability |= {word: math.log(count / words.total()) for word, count in words.items()}
    # Bytes are only reached by falling back, whatever their score.
    vocabulary = [(token, 0.0) for token in special] + [(byte, -100.0) for byte in BYTES]
    vocabulary += log_probability.items()
    tokenizer.model = Unigram(vocabulary, special.index(UNKNOWN), byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, special.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=MAX_TOKENS,
        padding_side="right",
        truncation_side="right",
    )


class LabelReader(nn.Module):
    """The encoder and the heads that only training needs.

    One learned query for each kind of label looks through the outputs of all tokens.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.encoder = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **ENCODER))
        dim = self.encoder.config.d_model
        counts = (len(OBJECTS), 2, len(MOTIONS), len(BACKGROUNDS), len(SIZE_WORDS) + 1)
        self.queries = nn.Parameter(torch.randn(len(counts), dim))
        self.attention = nn.MultiheadAttention(dim, num_heads=4, batch_first=True)
        self.labels = nn.ModuleList(nn.Linear(dim, count) for count in counts)
        self.token = nn.Linear(dim, vocabulary)

    def read(self, outputs: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Logits of every kind of label, in the order of Examples, from the outputs (B,L,D)."""
        queries = self.queries.expand(len(outputs), -1, -1)
        found, _ = self.attention(
            queries, outputs, outputs, key_padding_mask=mask == 0, need_weights=False
        )
        return [head(found[:, i]) for i, head in enumerate(self.labels)]

    def loss(self, batch: Examples) -> torch.Tensor:
        """Scalar: cross entropies of the labels and, lightly, of every token's own id."""
        outputs = self.encoder(batch.ids, batch.mask).last_hidden_state
        real = batch.mask == 1
        loss = TOKEN_WEIGHT * F.cross_entropy(self.token(outputs[real]), batch.ids[real])
        for logits, labels in zip(self.read(outputs, batch.mask), batch[2:], strict=True):
            loss = loss + F.cross_entropy(logits, labels)
        return loss


def named_size(caption: str) -> int:
    """The index in SIZES that the caption names, or one past the last."""
    words = caption.lower().replace(",", " ").replace(".", " ").split()
    for index, names in enumerate(SIZE_WORDS.values()):
        if any(name in words for name in names):
            return index
    return len(SIZE_WORDS)


def misspell(caption: str, chance: random.Random) -> str:
    """A typing error: a short word left out, a letter lost, doubled or swapped with the next.

    The letters belong to words of at least five, which stay recognizable.
    """
    words = caption.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 5]
    short = [i for i, word in enumerate(words) if len(word) <= 2 and word not in ("up", "at")]
    error = chance.choice(("leave out", "lose", "double", "swap"))
    if error == "leave out":
        if short:
            del words[chance.choice(short)]
    elif long:
        i = chance.choice(long)
        word, at = words[i], chance.randrange(1, len(words[i]) - 1)
        middle = {"lose": "", "double": 2 * word[at], "swap": word[at + 1] + word[at]}[error]
        words[i] = word[:at] + middle + word[at + (2 if error == "swap" else 1) :]
    return " ".join(words)


def make_examples(
    scenes: Sequence[Scene],
    captions: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    edit: Callable[[str], str] = str,
) -> Examples:
    """Examples of captions, one for each scene, edited before they are tokenized."""
    tokens = tokenizer(
        [edit(caption) for caption in captions],
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    objects = torch.zeros(len(scenes), len(OBJECTS))
    for row, one in enumerate(scenes):
        objects[row, list(one.objects)] = 1 / len(one.objects)
    return Examples(
        tokens.input_ids,
        tokens.attention_mask,
        objects,
        torch.tensor([len(one.objects) - 1 for one in scenes]),
        torch.tensor([one.motion for one in scenes]),
        torch.tensor([one.background for one in scenes]),
        torch.tensor([named_size(caption) for caption in captions]),
    )


def train(options: Options) -> None:
    """Train for `options.minutes`, then evaluate and export.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    clock = Clock(options.minutes)
    log = StageLog(options.out / "log.jsonl")
    device = torch.device(options.device)
    torch.manual_seed(0)
    scenes = [scene(i) for i in range(options.scenes)]
    captions = [text for one in scenes for text in paraphrases(one, options.captions_per_scene)]
    scenes = [one for one in scenes for _ in range(options.captions_per_scene)]
    tokenizer = load_or_build_tokenizer(options.out / "tokenizer", captions)
    chance = random.Random(0)
    examples = make_examples(
        scenes,
        captions,
        tokenizer,
        lambda text: misspell(text, chance) if chance.random() < options.misspelt_share else text,
    )
    model = LabelReader(len(tokenizer)).to(device)
    trainer = Trainer(model, options.out / "state", betas=(0.9, 0.98), ema=0.99)
    seconds_before = trainer.info.get("seconds", 0.0)
    settings = {name: str(value) for name, value in asdict(options).items()}
    log.write(event="start", step=trainer.step, options=settings)
    log.write(event="tokenized", vocabulary=len(tokenizer), examples=len(captions))
    last_save = clock.seconds
    while not clock.over:
        step = trainer.step
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(len(captions), (options.batch,), generator=generator)
        loss = model.loss(examples.rows(index, device))
        share = (seconds_before + clock.seconds) / (60 * options.total_minutes)
        lr = learning_rate(options.lr, step, WARMUP_STEPS, share)
        norm = trainer.update(loss, lr)
        if step % options.log_steps == 0:
            if not loss.isfinite():
                raise FloatingPointError(f"loss is {loss.item()} at step {step}")
            now = clock.seconds
            log.write(step=step, loss=loss.detach(), gradient_norm=norm, lr=lr, seconds=now)
            if now - last_save > 60 * options.save_minutes:
                trainer.save(seconds=seconds_before + now)
                last_save = now
    trainer.save(seconds=seconds_before + clock.seconds)
    finish(trainer.averaged(), tokenizer, options, log)
    log.write(event="stop", step=trainer.step, seconds=clock.seconds)


def load_or_build_tokenizer(folder: Path, captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """The tokenizer that an earlier run wrote to `folder`, else a new one, written there."""
    if not folder.exists():
        save_pretrained(build_tokenizer(captions), folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@torch.no_grad()
def finish(
    model: LabelReader,
    tokenizer: PreTrainedTokenizerFast,
    options: Options,
    log: StageLog,
) -> None:
    """Scale the encoder's output to unit size, round to bf16, evaluate and export."""
    ids = range(HELD_OUT, HELD_OUT + options.evaluation_captions)
    scenes = [scene(i) for i in ids]
    captions = [one.caption for one in scenes]
    chance = random.Random(1)
    held_out = {
        "held out": make_examples(scenes, captions, tokenizer),
        "misspelt": make_examples(scenes, captions, tokenizer, lambda t: misspell(t, chance)),
    }
    scale = output_scale(model, held_out["held out"], options)
    # Without bias, the last norm's weight is the only thing between a channel and unit size.
    model.encoder.encoder.final_layer_norm.weight.div_(scale)
    model.encoder.bfloat16()
    for name, examples in held_out.items():
        log.write(event="evaluation", captions=name, **evaluate(model, scale, examples, options))
    save_pretrained(model.encoder, options.out / "text_encoder")


def _batches(examples: Examples, options: Options) -> Iterable[Examples]:
    for index in torch.arange(len(examples.ids)).split(options.batch):
        yield examples.rows(index, torch.device(options.device))


def output_scale(model: LabelReader, examples: Examples, options: Options) -> torch.Tensor:
    """Root mean square (D,) of every output channel over all tokens."""
    outputs = [
        model.encoder(batch.ids, batch.mask).last_hidden_state[batch.mask == 1]
        for batch in _batches(examples, options)
    ]
    return torch.cat(outputs).square().mean(dim=0).sqrt()


def evaluate(
    model: LabelReader, scale: torch.Tensor, examples: Examples, options: Options
) -> dict[str, Any]:
    """Share of captions whose label is read rightly from the scaled bf16 outputs."""
    names = ("objects", "motion", "background", "size")
    right = dict.fromkeys(names, 0)
    for batch in _batches(examples, options):
        outputs = model.encoder(batch.ids, batch.mask).last_hidden_state.float()
        objects, two, motion, background, size = model.read(outputs * scale, batch.mask)
        best = objects.topk(2).indices
        second = torch.where(two.argmax(dim=1) == 1, best[:, 1], best[:, 0])
        found = F.one_hot(best[:, 0], len(OBJECTS)) | F.one_hot(second, len(OBJECTS))
        matches = (
            (found == (batch.objects > 0)).all(dim=1),
            motion.argmax(dim=1) == batch.motion,
            background.argmax(dim=1) == batch.background,
            size.argmax(dim=1) == batch.size,
        )
        for name, match in zip(names, matches, strict=True):
            right[name] += int(match.sum())
    return {name: count / len(examples.ids) for name, count in right.items()}


if __name__ == "__main__":
    train(tyro.cli(Options))
