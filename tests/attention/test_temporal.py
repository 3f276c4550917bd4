"""Heads whose tokens are sorted place by place."""

from __future__ import annotations

import pytest
import torch

from turbodit.attention.temporal import by_frame, by_place, check_temporal_heads


def test_tokens_of_the_chosen_heads_go_place_by_place():
    """Tokens 10 * frame + place, three frames of four places, in five heads."""
    tokens = torch.tensor([[10 * t + place for place in range(4)] for t in range(3)]).flatten()
    x = tokens[None, :, None, None].expand(2, -1, 5, 6)
    found = by_place(x, (0, 2, 3), 3)
    placed = tokens.view(3, 4).T.flatten()
    assert placed[:4].tolist() == [0, 10, 20, 1]
    for head in range(5):
        want = placed if head in (0, 2, 3) else tokens
        assert torch.equal(found[1, :, head, 5], want)
    assert torch.equal(by_frame(found, (0, 2, 3), 3), x)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("all", "must be a list for each layer, got 'all'"),
        ([[0]], "are of 1 layers, but the model has 2"),
        ([[0], 1], "of layer 1 must be a list of integers, got 1"),
        ([[0], ["1"]], "of layer 1 must be a list of integers"),
        ([[0], [True]], "of layer 1 must be a list of integers"),
        ([[0, 0], []], "of layer 0 must differ and be from 0 to 2"),
        ([[], [3]], "of layer 1 must differ and be from 0 to 2"),
        ([[], [-1]], "of layer 1 must differ and be from 0 to 2"),
    ],
)
def test_impossible_heads_are_refused(heads, message):
    with pytest.raises(ValueError, match=message):
        check_temporal_heads(heads, 2, 3)
    check_temporal_heads([[2, 0], []], 2, 3)
