import torch

from turbodit.kernels.norm import rms_norm
from turbodit.model.rope import rope_table


def complex_rotation(x: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """RoPE from its definition, a complex multiplication in float64; x (B, L, H, D)."""
    d = x.shape[-1]
    side = d // 6
    counts = (d // 2 - 2 * side, side, side)
    out = torch.empty_like(x, dtype=torch.float64)
    token = 0
    for t in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                angles = torch.cat(
                    [
                        position * 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
                        for position, n in zip((t, h, w), counts, strict=True)
                    ]
                )
                pairs = torch.view_as_complex(x[:, token].double().unflatten(-1, (-1, 2)))
                turned = pairs * torch.polar(torch.ones_like(angles), angles)
                out[:, token] = torch.view_as_real(turned).flatten(-2)
                token += 1
    return out


def test_rope_is_the_complex_rotation_of_each_axis() -> None:
    torch.manual_seed(0)
    grid = (3, 5, 2)
    x = torch.randn(2, 30, 3, 64)
    x = x / x.flatten(2).square().mean(-1).sqrt()[..., None, None]  # the norm leaves it alone
    angles = rope_table(grid, 64, torch.device("cpu"))
    got = rms_norm(x.flatten(2), torch.ones(3 * 64), 0.0, angles).unflatten(-1, (3, 64))
    torch.testing.assert_close(got.double(), complex_rotation(x, grid), rtol=1e-5, atol=1e-5)


def test_rope_scores_depend_on_relative_position_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 24, dtype=torch.float64)
    cos, sin = (part.double() for part in rope_table((8, 1, 1), 24, torch.device("cpu")))
    # Everything in float64 up to the float32 tables.
    rows = [
        (apply_rope_double(q, cos[i], sin[i]), apply_rope_double(k, cos[i], sin[i]))
        for i in range(8)
    ]
    scores = [(rows[i + 3][0] * rows[i][1]).sum().item() for i in range(5)]
    assert max(scores) - min(scores) < 1e-5


def apply_rope_double(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def test_cached_table_made_in_inference_mode_can_be_trained_through() -> None:
    rope_table.cache_clear()
    with torch.inference_mode():
        table = rope_table((2, 2, 2), 12, torch.device("cpu"))
    weight = torch.ones(12, requires_grad=True)
    x = torch.randn(1, 8, 12)
    rms_norm(x, weight, 0.0, table).square().sum().backward()
    # A rotation keeps lengths, and the norm of each token is sqrt(12).
    torch.testing.assert_close(weight.grad.sum(), torch.tensor(2 * 8 * 12.0))
