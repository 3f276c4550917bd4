from __future__ import annotations

import torch

from turbodit.attention.linear import linear


def test_linear_attention_with_softmax_features() -> None:
    """With one-hot features, keys are found by their feature alone."""
    key = 50 * torch.eye(4)
    k = torch.stack([key[0], key[1], key[1], key[2]])[None, :, None]
    v = torch.tensor([1.0, 2.0, 4.0, 8.0])[None, :, None, None].expand(1, 4, 1, 4)
    q = torch.stack([key[1], key[2]])[None, :, None]
    want = torch.tensor([3.0, 8.0])[None, :, None, None].expand(1, 2, 1, 4)
    torch.testing.assert_close(linear(q, k, v), want, rtol=1e-4, atol=0)
