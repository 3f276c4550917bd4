"""Images as users give them: read, turned upright, fitted to the video's size."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

ImageInput = Image.Image | str | Path


def load_image(image: ImageInput) -> Image.Image:
    """An RGB image, upright as its EXIF orientation says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as an image.
    """
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    path = Path(image)
    if not path.is_file():
        raise FileNotFoundError(f"image not found: {path}")
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {path}: {error}") from error


def fit_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """`image` resized and centre-cropped to width x height pixels."""
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
