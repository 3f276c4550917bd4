"""The fp8 product with GELU for Hopper: that it compiles, and how it reads the weights."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.compile_only import assert_compiles

hopper = pytest.importorskip("turbodit.kernels.quantized_linear.hopper")


def tiles(shape: list[int]) -> str:
    return f"tensordesc<fp8e4nv{shape},{hopper._layout(len(shape))!r}>"


@pytest.mark.parametrize("bias", ["*bf16", "*fp32"])
def test_kernel_compiles(bias: str) -> None:
    names = ("x_scale_ptr", "bound_ptr", "w_scale_ptr", "scale_ptr")
    compute, copy, start = hopper.REGISTERS
    report = assert_compiles(
        hopper.__name__,
        "_gelu_linear_kernel",
        dict.fromkeys(names, "*fp32")
        | {"x_desc": tiles([64, 128]), "w_desc": tiles([4, 8, 4, 2, 128])}
        | {"bias_ptr": bias, "out_ptr": "*fp8e4nv"}
        | {"M": "i32", "N": "i32:16", "length_k": "i32:16", "tiles": "i32"},
        {"COMPUTE": compute, "COPY": copy},
        architectures=(90,),
        maxnreg=start,
    )
    tile = hopper.WARPGROUPS * hopper.ROWS + hopper.COLUMNS
    assert report[90]["shared"] > hopper.STAGES * tile * hopper.K


def test_registers_are_those_of_a_multiprocessor() -> None:
    compute, copy, start = hopper.REGISTERS
    warpgroups = hopper.WARPGROUPS + 1  # with the copying warp's
    assert 128 * warpgroups * start <= 65_536
    assert hopper.WARPGROUPS * compute + copy <= warpgroups * start


@pytest.mark.parametrize("shape", [(64, 16), (320, 144)])
def test_a_thread_has_neighbours_of_the_output(shape: tuple[int, int]) -> None:
    """A thread has of every eight rows of weights in shared memory two, four threads all eight."""
    torch.manual_seed(0)
    weight = torch.randint(256, shape, dtype=torch.uint8)
    descriptor = hopper._described_weight(weight.view(torch.float8_e4m3fn))
    assert descriptor.base.data_ptr() == weight.data_ptr()
    assert descriptor.block_shape == [4, 8, 4, 2, 128]
    in_memory = descriptor.base.view(torch.uint8).reshape(-1, shape[1])
    of_threads = in_memory.view(-1, 8, 4, 2, shape[1]).transpose(1, 2).reshape(shape)
    assert of_threads.equal(weight)
    assert in_memory[2:4].equal(weight[16:18])
