"""Pictures of shapes whose factors are known: shape, scale, rotation and position."""

from __future__ import annotations

import numpy as np

from musigma.data.dataset import Dataset, Given
from musigma.data.raw import Request

__all__ = ["shapes"]

SIDE, FINE = 32, 20  # pixels of an image, and of each pixel that is averaged
NAMES = ("half disc", "ell", "triangle")
SCALES = (5.0, 6.0, 7.0, 8.0)  # radii in pixels
ANGLES = tuple(range(0, 360, 45))
PLACES = tuple(range(8))


def shapes(request: Request) -> Dataset:
    """All 6,144 combinations of five factors, as images (1, 32, 32), the same every time.

    The factors are in `given`: `shape` (3 classes without symmetry under rotation), `scale` (4
    radii in pixels), `rotation` (8 angles in degrees), `x` and `y` (8 places each, from left and
    top). Every combination of values occurs once, so factors are independent.
    """
    levels = np.meshgrid(*map(range, (3, 4, 8, 8, 8)), indexing="ij")
    shape, scale, angle, x, y = (level.ravel() for level in levels)
    sprites = np.stack([_sprite(s, r, a) for s in range(3) for r in SCALES for a in ANGLES])
    images = np.zeros((len(x), 1, SIDE, SIDE), np.uint8)
    size, which = sprites.shape[1], (shape * 4 + scale) * 8 + angle
    for i, (column, row) in enumerate(zip(2 * x, 2 * y, strict=True)):
        images[i, 0, row : row + size, column : column + size] = sprites[which[i]]
    given = {
        "shape": Given(shape.astype(np.int64), NAMES),
        "scale": Given(np.asarray(SCALES, np.float32)[scale]),
        "rotation": Given(np.asarray(ANGLES, np.float32)[angle]),
        "x": Given(x.astype(np.float32)),
        "y": Given(y.astype(np.float32)),
    }
    return Dataset(images, given=given)


def _sprite(shape: int, radius: float, degrees: float) -> np.ndarray:
    """A shape within a circle, antialiased: levels (18, 18)."""
    size = SIDE - 2 * PLACES[-1]
    axis = (np.arange(size * FINE) + 0.5) / FINE - size / 2
    column, row = np.meshgrid(axis / radius, axis / radius)
    turn = np.deg2rad(degrees)
    a = np.cos(turn) * column + np.sin(turn) * row
    b = np.cos(turn) * row - np.sin(turn) * column
    inside = (
        (a**2 + b**2 <= 1) & (b <= 0),
        (np.maximum(abs(a), abs(b)) <= 0.7) & ((a <= -0.15) | (b >= 0.15)),
        (b <= 0.6) & (abs(a) <= 0.45 * (b + 1)),
    )[shape]
    shares = inside.reshape(size, FINE, size, FINE).mean((1, 3))
    return np.rint(255 * shares).astype(np.uint8)
