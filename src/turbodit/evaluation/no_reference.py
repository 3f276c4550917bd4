"""What can be said of a video without another to compare it with.

None of these is a measure of quality by itself: noise is sharp, and a still picture does not
flicker. They show what changes between models that should make the same kind of video.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of R, G, B: ITU-R BT.601
FLOW_SIDE = 256  # pixels: the shorter side of the frames that flow is found in, at most
FASTEST = 0.05  # share of pixels that the dynamic degree is about
FARNEBACK = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}


def describe(frames: Iterable[np.ndarray], *, flow: bool = True) -> dict[str, float]:
    """All measures of one video, from one pass over it; two frames are in memory at a time.

    Args:
        frames: at least two, (H, W, 3) uint8 RGB.
        flow: measure the dynamic degree too, which needs OpenCV.

    Returns:
        frames: how many there are.
        flicker: mean of `flicker` over neighbouring frames. Motion is part of it.
        colour_drift: largest distance of a frame's mean colour from the first frame's, in
            bytes (Euclidean, R, G, B).
        sharpness: mean of `sharpness` over all frames.
        dynamic_degree: mean of `dynamic_degree` over neighbouring frames, in percent.

    Raises:
        ValueError: fewer than two frames; OpenCV is needed and missing.
    """
    opencv = load_opencv() if flow else None
    flickers, sharpnesses, colours, degrees = [], [], [], []
    previous = None
    for frame in frames:
        sharpnesses.append(sharpness(frame))
        colours.append(frame.mean(axis=(0, 1), dtype=np.float64))
        if previous is not None:
            flickers.append(flicker(previous, frame))
            if opencv is not None:
                degrees.append(dynamic_degree(previous, frame, opencv))
        previous = frame
    if not flickers:
        raise ValueError(f"got {len(colours)} frame(s), expected at least 2")
    measures = {
        "frames": len(colours),
        "flicker": float(np.mean(flickers)),
        "colour_drift": float(np.linalg.norm(np.array(colours) - colours[0], axis=1).max()),
        "sharpness": float(np.mean(sharpnesses)),
    }
    return measures | ({"dynamic_degree": float(np.mean(degrees))} if degrees else {})


def flicker(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two frames (H, W, 3) uint8, in bytes."""
    return float(np.abs(one.astype(np.int16) - other).mean())


def sharpness(frame: np.ndarray) -> float:
    """Variance of the luma's Laplacian, of a frame (H, W, 3) uint8.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000; with four
    neighbours, and edges mirrored.
    """
    luma = np.pad(frame @ LUMA, 1, mode="reflect")
    across, down = luma[1:-1], luma[:, 1:-1]
    sums = across[:, :-2] + across[:, 2:] + down[:-2] + down[2:]
    return float((sums - 4 * luma[1:-1, 1:-1]).var(dtype=np.float64))


def dynamic_degree(one: np.ndarray, other: np.ndarray, opencv: ModuleType) -> float:
    """How far the fastest twentieth of the pixels moves from one frame to the next.

    Mean length of Farneback's optical flow (SCIA 2003) over those pixels, in percent of the
    frame's shorter side: it does not depend on the size, but on the frame rate. That the
    fastest pixels count, and not all, is VBench's choice (arXiv:2311.17982).

    Args:
        one, other: (H, W, 3) uint8 RGB.
        opencv: `load_opencv()`.
    """
    flow = opencv.calcOpticalFlowFarneback(
        _small_grey(one, opencv), _small_grey(other, opencv), None, **FARNEBACK
    )
    lengths = np.linalg.norm(flow, axis=-1).ravel()
    count = max(1, round(FASTEST * lengths.size))
    return float(100 * np.partition(lengths, -count)[-count:].mean() / min(flow.shape[:2]))


def _small_grey(frame: np.ndarray, opencv: ModuleType) -> np.ndarray:
    grey = opencv.cvtColor(frame, opencv.COLOR_RGB2GRAY)
    scale = FLOW_SIDE / min(grey.shape)
    if scale >= 1:
        return grey
    size = [round(scale * side) for side in (grey.shape[1], grey.shape[0])]
    return opencv.resize(grey, size, interpolation=opencv.INTER_AREA)


def load_opencv() -> ModuleType:
    """The module `cv2`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise ValueError(
            "the dynamic degree needs the package opencv-python-headless: "
            "pip install 'turbodit[eval]'"
        ) from error
