"""Kernels run in Triton's interpreter, unless the tests that need a GPU were asked for."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Triton reads the variable when a kernel is defined: before test modules import any."""
    if "not gpu" in config.option.markexpr or not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
