import torch

from turbodit.model.layers import (
    RMSNorm,
    patchify,
    timestep_embedding,
    unpatchify,
)


def test_patchify_equals_the_strided_convolution() -> None:
    torch.manual_seed(0)
    patch = (1, 2, 2)
    conv = torch.nn.Conv3d(5, 7, kernel_size=patch, stride=patch).double()
    x = torch.randn(2, 5, 3, 4, 6, dtype=torch.float64)
    tokens = torch.nn.functional.linear(patchify(x, patch), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(tokens, conv(x).flatten(2).transpose(1, 2))


def test_unpatchify_puts_channels_innermost() -> None:
    x = torch.randn(2, 3 * 2 * 3, 4 * 5)  # 5 channels, patches of (1, 2, 2)
    video = unpatchify(x, (3, 2, 3), (1, 2, 2))
    assert video.shape == (2, 5, 3, 4, 6)
    token = 1 * 6 + 1 * 3 + 2  # t=1, h=1, w=2
    assert torch.equal(video[0, :, 1, 3, 4], x[0, token].unflatten(0, (2, 2, 5))[1, 0])


def test_rms_norm_of_bf16_keeps_float32_statistics() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(1000, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = (100 * torch.randn(1, 3, 1000)).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
    got = norm(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)


def test_timestep_embedding_separates_neighbouring_timesteps() -> None:
    near = timestep_embedding(torch.tensor([999.0, 999.001]), 256)
    assert near.shape == (2, 256)
    assert not torch.equal(near[0], near[1])
    torch.testing.assert_close(near[0, 0], torch.tensor(999.0, dtype=torch.float64).cos().float())
    torch.testing.assert_close(near[0, 128], torch.tensor(999.0, dtype=torch.float64).sin().float())
