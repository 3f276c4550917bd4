"""Which heads look along time."""

from __future__ import annotations

import torch

from turbodit.config import TransformerConfig
from turbodit.model.wan import SelfAttention, WanModel
from turbodit.training.temporal_heads import choose_temporal_heads

FRAMES, HEIGHT, WIDTH = 16, 4, 4
CONFIG = TransformerConfig(
    dim=64, ffn_dim=32, num_heads=4, num_layers=2, text_dim=8, text_len=4, freq_dim=16
)


def test_heads_that_look_along_time_are_chosen(monkeypatch):
    """Queries and keys that say where a token is: of heads 1 and 2 its place, of the others its
    frame, and the other way round in the second layer. Values are random."""
    frame = torch.eye(16)[torch.arange(FRAMES).repeat_interleave(HEIGHT * WIDTH)]
    place = torch.eye(16)[torch.arange(HEIGHT * WIDTH).repeat(FRAMES)]

    def forward(self, x, angles, frames):
        first = self is model.blocks[0].self_attn
        looks = [place if (head in (1, 2)) == first else frame for head in range(4)]
        q = 9 * torch.stack(looks, 1)[None]
        v = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
        return self.attn_op(q, q, v, frames=frames).flatten(2)

    monkeypatch.setattr(SelfAttention, "forward", forward)
    model = WanModel(CONFIG).eval()

    def ask():
        model(
            torch.randn(1, 16, FRAMES, 2 * HEIGHT, 2 * WIDTH), torch.ones(1), torch.randn(1, 4, 8)
        )

    # The one block that is kept is a frame, or a place over all frames.
    settings = {"ratio": 1 / 16, "block_q": 16, "block_k": 16}
    assert choose_temporal_heads(model, settings, ask) == [[1, 2], [0, 3]]
    assert not any(block.self_attn.attn_op._forward_pre_hooks for block in model.blocks)
