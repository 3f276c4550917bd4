"""Prompts to text embeddings: umT5, on transformers' UMT5EncoderModel."""

from __future__ import annotations

import hashlib
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from turbodit.weights import Weights, load_transformers_model, read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

# Names in models_t5_umt5-xxl-enc-bf16.pth -> names in UMT5EncoderModel.
RENAMES = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
}
BLOCK_RENAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


VOCABULARIES = ("tokenizer.json", "spiece.model")  # a tokenizer folder has one or both


class TextEncoder:
    """Cleans, tokenises and encodes prompts as Wan does.

    Args:
        model: the network.
        tokenizer: its tokenizer.
        max_length: tokens per prompt, the end token included; longer prompts are cut.
    """

    def __init__(
        self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_length: int = 512
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length

    @classmethod
    def from_pretrained(
        cls,
        encoder: Path | str,
        tokenizer: Path | str,
        max_length: int = 512,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> TextEncoder:
        """Load a transformers folder or `models_t5_umt5-xxl-enc-bf16.pth`, and a tokenizer folder.

        Raises:
            FileNotFoundError: no such folder or file, no weights or no vocabulary in it.
            ValueError: truncated file, weights that do not fit, or a broken tokenizer.
        """
        from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

        encoder, tokenizer = Path(encoder), Path(tokenizer)
        if not any((tokenizer / name).is_file() for name in VOCABULARIES):
            # transformers would go on with a vocabulary of its own making
            raise FileNotFoundError(
                f"no {' or '.join(VOCABULARIES)} in tokenizer folder {tokenizer}"
            )
        weights = read_weights(encoder)
        if encoder.is_dir():
            config = UMT5Config.from_pretrained(encoder, local_files_only=True)
        else:
            config, weights = _from_native(weights)
        model = load_transformers_model(UMT5EncoderModel, config, weights, encoder, dtype)
        try:
            words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        except Exception as error:  # of many kinds, and few name the file
            raise ValueError(f"cannot load the tokenizer in {tokenizer}: {error}") from error
        return cls(model.to(device), words, max_length)

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.model.config.d_model

    def vocabulary_fingerprint(self) -> str:
        """Hash of the tokenizer's tokens and their numbers."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()

    def to(self, *args: Any, **kwargs: Any) -> TextEncoder:
        """Move or cast the network, as `torch.nn.Module.to` does."""
        self.model.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Embeddings (B, max_length, dim) in the network's dtype, zeros past each prompt's end.

        Prompts of one call are padded to the longest of them, so that in half precision an
        embedding can differ in its last bits from that of the same prompt encoded alone.
        """
        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.model.device)
        mask = tokens.attention_mask
        hidden = self.model(tokens.input_ids, attention_mask=mask).last_hidden_state
        hidden = hidden.masked_fill(mask[..., None] == 0, 0)
        return F.pad(hidden, (0, 0, 0, self.max_length - hidden.shape[1]))

    def count_tokens(self, prompt: str) -> int:
        """Tokens of the whole prompt, the end token included."""
        return len(self.tokenizer(clean_prompt(prompt), verbose=False).input_ids)

    def truncated(self, prompt: str) -> str | None:
        """The end of the (cleaned) prompt that `encode` cuts off; None where all of it fits."""
        prompt = clean_prompt(prompt)
        tokens = self.tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        offsets = tokens.offset_mapping
        if len(offsets) <= self.max_length:
            return None
        first_cut, _ = offsets[self.max_length - 1]  # the last place is the end token's
        return prompt[first_cut:]


def clean_prompt(prompt: str) -> str:
    """Mended encoding, HTML entities resolved (twice, as in Wan), single spaces."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def _from_native(weights: Weights) -> tuple[Any, Weights]:
    """UMT5's configuration and weights from those of Wan's original file."""
    from transformers import UMT5Config

    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if "token_embedding.weight" not in weights or not blocks:
        raise ValueError(
            "expected Wan's umT5 file (with token_embedding.weight), "
            f"found names such as {', '.join(list(weights)[:5])}"
        )
    vocab_size, dim = weights["token_embedding.weight"].shape
    buckets, heads = weights["blocks.0.pos_embedding.embedding.weight"].shape
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=dim,
        d_kv=weights["blocks.0.attn.q.weight"].shape[0] // heads,
        d_ff=weights["blocks.0.ffn.fc1.weight"].shape[0],
        num_layers=len(blocks),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    return config, {_rename(name): weights[name] for name in weights}


def _rename(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    if not name.startswith("blocks."):
        return f"{RENAMES.get(module, module)}.{parameter}"
    _, index, module = module.split(".", 2)
    return f"encoder.block.{index}.{BLOCK_RENAMES.get(module, module)}.{parameter}"
