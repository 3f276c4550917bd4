from __future__ import annotations

import os

import pytest

# Set before any test imports torch: for tiny models threads cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Kernels run in Triton's interpreter, unless the tests that need a GPU were asked for.

    Triton reads the variable when it is imported, which torch's compiler also does.
    """
    import torch

    if "not gpu" in config.option.markexpr or not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need GPUs are skipped, with the reason, where there are too few of them."""
    needed = 2 if item.get_closest_marker("multi_gpu") else 1
    if item.get_closest_marker("gpu") or item.get_closest_marker("multi_gpu"):
        import torch

        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} CUDA device(s), found {torch.cuda.device_count()}")
