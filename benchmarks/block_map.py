"""Draws the block maps of a layer of SpriteWan's teacher: one square for each head.

    python benchmarks/block_map.py --out docs/block-map.png

A cell stands for a block of queries (its row) and a block of keys (its column). It is the
darker the more attention the queries pay to the keys, and orange where a top-k ratio keeps it.
Prints what share of all attention the kept blocks hold, head by head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from PIL import Image

from turbodit.attention.block_map import topk_block_map
from turbodit.pipeline import Pipeline

PROMPT = "a big red fox runs to the right through the snow"
KEPT, LEFT_OUT = torch.tensor([214.0, 90.0, 0.0]), torch.tensor([40.0, 60.0, 90.0])
CELL, GAP = 10, 20  # pixels


@dataclass(frozen=True)
class Options:
    out: Path
    layer: int = 4
    step: int = 10
    steps: int = 20
    ratio: float = 0.25
    block: int = 16


def recorded(options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k (1, L, H, D) of one layer at one step of making a clip."""
    pipe = Pipeline.from_pretrained("spritewan-teacher", device="cpu")
    (model,) = pipe.transformers.values()
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.blocks[options.layer].self_attn.attn_op.register_forward_pre_hook(
        lambda _, qkv: calls.append((qkv[0][:1].clone(), qkv[1][:1].clone()))
    )
    pipe(PROMPT, steps=options.steps, seed=0)
    return calls[options.step * len(calls) // options.steps]


def attention_of_blocks(q: torch.Tensor, k: torch.Tensor, block: int) -> torch.Tensor:
    """(H, M, M): how much of its attention a block of queries pays to each block of keys."""
    scores = torch.einsum("qhd,khd->hqk", q[0], k[0]) * q.shape[-1] ** -0.5
    # An average times the number of keys is a sum.
    return F.avg_pool2d(scores.softmax(-1), block) * block


def draw(share: torch.Tensor, kept: torch.Tensor) -> Image.Image:
    """share and kept (H, M, M) -> the heads side by side."""
    shade = (share / share.amax(dim=-1, keepdim=True)).sqrt()
    shade = torch.where(kept, shade.clamp(min=0.3), shade)[..., None]
    cells = 255 + shade * (torch.where(kept[..., None], KEPT, LEFT_OUT) - 255)
    squares = cells.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
    row = F.pad(squares, (0, 0, 0, GAP), value=255).transpose(0, 1).flatten(1, 2)[:, :-GAP]
    return Image.fromarray(row.round().byte().numpy())


def main(options: Options) -> None:
    q, k = recorded(options)
    blocks = {"block_q": options.block, "block_k": options.block}
    kept = topk_block_map(q, k, options.ratio, **blocks)[0]
    share = attention_of_blocks(q, k, options.block)
    draw(share, kept).save(options.out, optimize=True)
    held = (share * kept).sum((1, 2)) / share.sum((1, 2))
    print(f"{kept.float().mean():.1%} of the blocks hold", *(f"{x:.1%}" for x in held))


if __name__ == "__main__":
    main(tyro.cli(Options))
