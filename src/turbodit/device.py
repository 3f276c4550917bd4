"""Which device to compute on."""

from __future__ import annotations

import torch


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device asked for; None: a GPU where there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    count = torch.cuda.device_count()
    if device is None:
        return torch.device("cuda" if count else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; supported: cpu, cuda, cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported; supported: cpu, cuda, cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ValueError(
            f"device {str(device)!r} was asked for, but PyTorch {torch.__version__} finds "
            f"{count} CUDA devices"
        )
    return chosen
