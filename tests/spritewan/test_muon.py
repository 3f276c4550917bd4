from __future__ import annotations

import torch
from torch import nn

from turbodit.spritewan.muon import Muon, matrices, orthogonalize


def test_singular_values_come_near_one_and_singular_vectors_stay() -> None:
    torch.manual_seed(0)
    for shape in ((3, 20, 50), (2, 50, 20), (1, 32, 32)):
        x = torch.randn(shape)
        y = orthogonalize(x)
        values = torch.linalg.svdvals(y)
        assert y.shape == x.shape
        # The quintic iteration trades exactness for speed: values end between 0.5 and 1.3.
        assert values[:, : min(shape[1:]) // 2].min() > 0.5 and values.max() < 1.3
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        rotated = u.mT @ y @ v.mT  # diagonal where the singular vectors are kept
        off_diagonal = rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
        assert off_diagonal.abs().max() < 1e-3


def test_one_step_has_adamw_s_size_and_goes_down() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    before = layer.weight.detach().clone()
    (layer(torch.randn(8, 64)).square().sum()).backward()
    Muon(layer.parameters(), lr=0.01, weight_decay=0.0).step()
    change = layer.weight.detach() - before
    # 0.2 * lr is the usual root mean square of an AdamW step (arXiv:2502.16982); a gradient
    # of rank 8 moves only 8 of 32 directions.
    assert 0.25 * 0.2 * 0.01 < change.square().mean().sqrt() < 1.3 * 0.2 * 0.01
    assert (change * layer.weight.grad).sum() < 0


def test_it_takes_linear_and_convolution_weights_of_some_size() -> None:
    model = nn.Sequential(
        nn.Embedding(100, 32),
        nn.Linear(32, 32),
        nn.LayerNorm(32),
        nn.Conv3d(4, 16, 3),
        nn.Linear(32, 8),
    )
    assert [p.shape for p in matrices(model)] == [(32, 32), (16, 4, 3, 3, 3)]
