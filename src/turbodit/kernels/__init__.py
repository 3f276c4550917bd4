"""Operations in plain PyTorch and in Triton; each package's `reference` is its specification."""

HEAD_DIMS = (64, 128)  # that the attention kernels have tiles for
