from __future__ import annotations

import pytest
import torch
from tests.benchmark.tiny import CPU

from turbodit.benchmark import measure
from turbodit.benchmark.measure import Times, attempt, milliseconds, significant
from turbodit.benchmark.profile import KERNEL_CLASSES, kernel_class, longest, shares


def test_times():
    times = Times.of([3.0, 1.0, 8.0])
    assert times.summary() == {"min": 1.0, "median": 3.0, "max": 8.0, "n": 3}
    assert times.scaled(10) == Times(10.0, 30.0, 80.0, 3)


def test_small_numbers_keep_their_digits():
    assert significant(0.000123456) == 0.0001235
    assert significant(1234.56) == 1235.0


def test_calls_are_warmed_up_and_counted():
    calls = []
    assert milliseconds(lambda: calls.append(1), CPU, repeats=3, warm_up=2).n == 3
    assert len(calls) == 5


def test_out_of_memory_frees_and_gives_none(monkeypatch):
    freed = []
    monkeypatch.setattr(measure, "free", lambda: freed.append(True))

    def fail() -> None:
        raise torch.OutOfMemoryError("too large")

    assert attempt(fail) is None
    assert freed
    assert attempt(lambda: 5) == 5


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...>>", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        (
            "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>",
            "attention",
        ),
        ("_select_topk_kernel", "attention"),
        ("_key_value_sums_kernel", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernel>", "rest"),
        ("_matmul_kernel", "GEMM"),
        ("_quantize_keys_kernel", "attention"),
        ("_quantize_rows_kernel", "rest"),
        ("_norm_kernel", "rest"),
    ],
)
def test_kernels_have_classes(kernel, expected):
    assert kernel_class(kernel) == expected


def test_rules_are_in_lower_case():
    assert all(part == part.lower() for parts, _ in KERNEL_CLASSES for part in parts)


def test_shares_add_up():
    kernels = {"nvjet_a": 6.0, "flash_fwd": 3.0, "copy": 0.5, "norm": 0.5}
    assert shares(kernels) == {"GEMM": 0.6, "attention": 0.3, "rest": 0.1}
    assert shares({}) == {"GEMM": 0.0, "attention": 0.0, "rest": 0.0}


def test_longest_kernels_come_first_and_long_names_are_one():
    name = "k" * 80
    assert longest({"a": 1.0, f"{name}x": 2.0, f"{name}y": 3.0, "b": 0.1}, 2) == {
        name: 5.0,
        "a": 1.0,
    }
