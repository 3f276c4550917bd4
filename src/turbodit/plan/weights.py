"""Parameters of the networks, counted from their shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from turbodit.config import VAE_21, VAE_22, VAE_SPRITE, ModelConfig, TransformerConfig

Linear = Literal["int8-block", "int8-channel", "fp8"]
Trained = Literal["full", "attention", "proj_l", "lora"]

BLOCK = 128  # rows and columns that share a scale in "int8-block"
HALF, FULL = 2, 4  # bytes of bfloat16 and of float32
# Encoder of umT5-xxl, CLIP ViT-H/14, and the VAEs (encoder and decoder), as their public
# configurations have them; SpriteWan's from its files.
TEXT_ENCODERS = {4096: 5_680_910_336, 128: 621_056}  # by the width of the embeddings
CLIP = 630_766_080
VAES = {VAE_21: 126_892_531, VAE_22: 704_688_668, VAE_SPRITE: 6_170_592}


@dataclass(frozen=True)
class Counts:
    """Parameters of one DiT, by how they are stored.

    Attributes:
        matrices: weights of the linear layers in the blocks, which 8-bit formats replace.
        biases: of these layers; as many as there are output channels.
        scales: that "int8-block" has for these layers.
        others: embeddings, patches and head, in bfloat16.
        kept: norms, modulation, time embedding and proj_l, which stay float32.
    """

    matrices: int
    biases: int
    scales: int
    others: int
    kept: int

    @property
    def total(self) -> int:
        return self.matrices + self.biases + self.others + self.kept

    def bytes(self, linear: Linear | None = None) -> int:
        """With bfloat16 or 8-bit linear layers, as `load_transformer` has them by default."""
        rest = HALF * (self.biases + self.others) + FULL * self.kept
        if linear is None:
            return HALF * self.matrices + rest
        scales = self.scales if linear == "int8-block" else self.biases
        return self.matrices + FULL * scales + rest


def count(config: TransformerConfig, linear_branch: bool) -> Counts:
    """Parameters of a DiT, with SLA's proj_l in every block or without."""
    block = count_block(config, linear_branch)
    d, layers, patch = config.dim, config.num_layers, math.prod(config.patch_size)
    time = _linear(config.freq_dim, d) + _linear(d, d) + _linear(d, 6 * d)
    others = (
        _linear(config.in_dim * patch, d)
        + _linear(config.text_dim, d)
        + _linear(d, d)
        + _linear(d, config.out_dim * patch)
    )
    if config.image_dim is not None:
        i = config.image_dim
        others += 2 * i + _linear(i, i) + _linear(i, d) + 2 * d + (config.image_positions or 0) * i
    return Counts(
        layers * block.matrices,
        layers * block.biases,
        layers * block.scales,
        others,
        layers * block.kept + time + 2 * d,
    )


def count_block(config: TransformerConfig, linear_branch: bool) -> Counts:
    """Parameters of one block."""
    shapes = block_linears(config)
    d = config.dim
    norms = 7 * d if config.image_dim is not None else 6 * d  # q, k twice, norm3; of image keys
    return Counts(
        matrices=sum(rows * columns for rows, columns in shapes),
        biases=sum(rows for rows, _ in shapes),
        scales=sum(-(-rows // BLOCK) * -(-columns // BLOCK) for rows, columns in shapes),
        others=0,
        kept=norms + 6 * d + linear_branch * _linear(config.head_dim, config.head_dim),
    )


def block_linears(config: TransformerConfig) -> list[tuple[int, int]]:
    """(out, in) of a block's linear layers: two attentions, image keys and values, feed-forward."""
    d, f = config.dim, config.ffn_dim
    square = 8 if config.image_dim is None else 10
    return [(d, d)] * square + [(f, d), (d, f)]


def trained_parameters(config: TransformerConfig, part: Trained, sla: bool, rank: int) -> int:
    """How many parameters train (`training.parameters.select_trainable`).

    Args:
        sla: whether self attention has a linear branch, which trains in any case.
        rank: of a LoRA around the layers of both attentions and of the feed-forward.

    Raises:
        ValueError: proj_l alone, of a model without a linear branch.
    """
    d = config.dim
    branch = config.num_layers * sla * _linear(config.head_dim, config.head_dim)
    if part == "proj_l":
        if not sla:
            raise ValueError("only proj_l is to train, but the attention has none; supported: sla")
        return branch
    if part == "attention":
        return branch + config.num_layers * (4 * _linear(d, d) + 2 * d)
    if part == "lora":
        shapes = [(d, d)] * 8 + [(config.ffn_dim, d), (d, config.ffn_dim)]
        return branch + config.num_layers * rank * sum(map(sum, shapes))
    return count(config, sla).total


def encoders_bytes(model: ModelConfig) -> int:
    """Text encoder, and CLIP where the model has it, in bfloat16."""
    clip = 0 if model.transformer.image_dim is None else CLIP
    return HALF * (TEXT_ENCODERS[model.transformer.text_dim] + clip)


def vae_bytes(model: ModelConfig) -> int:
    """In bfloat16."""
    return HALF * VAES[model.vae]


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
