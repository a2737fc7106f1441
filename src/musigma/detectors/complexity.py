"""A score that sets log p against the size of a file."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from musigma.data import Dataset
from musigma.detectors.reference import DETECTORS, Reference

__all__ = ["CODECS", "complexity", "file_bits"]

CODECS: Mapping[str, Mapping[str, Any]] = {
    "png": {"format": "PNG", "optimize": True},
    "webp": {"format": "WEBP", "lossless": True, "quality": 100, "method": 4},
    "jpeg2000": {"format": "JPEG2000", "irreversible": False},
}
"""Lossless codecs by name, as Pillow writes them."""


@DETECTORS.register
def complexity(
    reference: Reference, data: Dataset, *, codecs: str = "png+webp+jpeg2000"
) -> np.ndarray:
    r"""-log p(x) minus the size of x as a file, in bits.

    .. math:: -\log_2 p(x) - L(x)

    L(x) is the size of the smallest lossless file, header included. A simple image is probable
    under most models and has a small file; what remains is how much better a general codec knows
    the image than the model does. (Serrà et al., "Input complexity and out-of-distribution
    detection with likelihood-based generative models", 2020, arXiv:1909.11480.)

    Args:
        reference: The model.
        data: Images.
        codecs: Codecs to choose the smallest file of, joined by +.

    Raises:
        ValueError: If the data are not images of levels, or a codec is unknown or not installed.
    """
    if len(data.shape) != 3 or data.bits is None:
        raise ValueError(
            f"complexity: expected images of integer levels, which have a size as a file; "
            f"{data.name or 'the data'} hold rows of shape {tuple(data.shape)}"
        )
    size = file_bits(codecs.split("+"))
    sizes = [
        [size(image) for image in x.cpu().numpy().astype(np.uint8)]
        for x, _ in reference.batches(data, "compressing")
    ]
    bits = np.array([bits for batch in sizes for bits in batch], np.float64)
    return reference.nats(data) / math.log(2) - bits


def file_bits(codecs: list[str]) -> Callable[[np.ndarray], int]:
    """A function of an image, uint8 (C, H, W), to the bits of its smallest lossless file.

    Images of 1 or 3 channels are gray or color; the channels of others are stacked into one tall
    gray image. Levels of fewer than 8 bits are stored as they are.

    Args:
        codecs: Names in `CODECS`.

    Raises:
        ValueError: If a name is unknown, or Pillow or its codec is missing.

    Example:
        >>> size, noise = file_bits(["png", "webp"]), np.random.default_rng(0)
        >>> size(np.zeros((1, 28, 28), np.uint8)) < 600
        True
        >>> size(noise.integers(0, 256, (1, 28, 28), np.uint8)) > 28 * 28 * 8
        True
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("complexity: needs Pillow: pip install 'musigma[data]'") from error
    for name in codecs:
        if name not in CODECS:
            raise ValueError(f"codecs: expected some of {', '.join(CODECS)}; got {name!r}")
        try:
            Image.new("L", (8, 8)).save(io.BytesIO(), **CODECS[name])
        except (OSError, KeyError, ImportError) as error:
            raise ValueError(
                f"codecs: this Pillow cannot write {name} ({error}); choose others, "
                '--by "complexity codecs=png"'
            ) from error

    def size(image: np.ndarray) -> int:
        channels, _, width = image.shape
        pixels = image.transpose(1, 2, 0) if channels == 3 else image.reshape(-1, width)
        picture, sizes = Image.fromarray(pixels), []
        for name in codecs:
            file = io.BytesIO()
            picture.save(file, **CODECS[name])
            sizes.append(8 * len(file.getvalue()))
        return min(sizes)

    return size
