"""Where the score of an image comes from: nats of each pixel, or of each patch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.context import Context
from musigma.data import Dataset
from musigma.detectors.reference import Reference
from musigma.evaluation import check, evaluating, noise
from musigma.model import Model
from musigma.trace import Trace

__all__ = ["Maps", "colored", "maps"]

RING = 2
"""Pixels around a patch whose mean replaces it."""
FULL = 0.99
"""Share of the pixels whose color is not at its limit."""


Renew = Callable[[], None]
"""Seeds the noise of a draw again."""


class Maps(NamedTuple):
    """Maps of images.

    Attributes:
        nats: The nats of each pixel, float64 (N, H, W); below zero where an image is less strange.
        what: What they are, in words.
    """

    nats: np.ndarray
    what: str


def maps(reference: Reference, data: Dataset, *, patch: int = 4, draws: int = 8) -> Maps:
    r"""Where in each image -log p comes from, or what it has beyond the background model.

    If the likelihood is a product over pixels (VAEs), the map is -log p(x_ij | z) of each pixel,
    the mean over draws of the posterior. It adds up to the reconstruction term of the bound; the
    cost of the latents is in no pixel.

    Otherwise (flows) it is the change of -log p by replacement: -log p(x) minus that of the image
    in which one square patch is the mean of the pixels around it, at each pixel of the patch. It
    is above zero where something makes the image less probable than a smooth patch would. Patches
    do not add up to -log p. (As by occlusion: Zeiler & Fergus, "Visualizing and Understanding
    Convolutional Networks", 2014, arXiv:1311.2901.)

    With a background model, its map is subtracted: that of `likelihood_ratio`.

    Args:
        reference: The models.
        data: Images; a few (`Dataset.subset`), since a flow takes a pass for each patch.
        patch: Side of a patch, in pixels.
        draws: Draws of the posterior, or of the noise of dequantization.

    Raises:
        ValueError: If the data are no images, the background model is of others, or a number is
            out of range.
    """
    if len(data.shape) != 3:
        raise ValueError(
            f"maps: expected images; {data.name or 'the data'} hold rows of shape "
            f"{tuple(data.shape)}"
        )
    if draws < 1 or not 1 <= patch < min(data.shape[1:]):
        raise ValueError(
            f"maps: expected 1 or more draws, and patches smaller than the images; got {draws}, "
            f"and {patch} for images of shape {tuple(data.shape)}"
        )
    models = [reference.model]
    if reference.background is not None:
        check(reference.background, data)
        models.append(reference.background)
    parts, map_of = [], None
    for x, context in reference.batches(data, "maps"):
        if map_of is None:
            by_pixel = all(_of_pixels(model, x, context) is not None for model in models)
            map_of = _Likelihood() if by_pixel else _Replacement(patch, data.bits is not None)
        each = [_mean(map_of, model, x, context, draws, reference.seed) for model in models]
        parts.append((each[0] - each[1] if each[1:] else each[0]).cpu().numpy())
    if map_of is None:
        raise ValueError(f"maps: {data.name or 'the data'} hold no examples")
    beyond = ", minus the same of the background model" if models[1:] else ""
    return Maps(np.concatenate(parts), f"{map_of.what}{beyond}")


def colored(nats: np.ndarray) -> np.ndarray:
    """Maps as pictures: red where nats are above zero, blue where they are below, white at zero.

    All maps have one scale; one pixel in a hundred has a color at its end.

    Args:
        nats: Shape (N, H, W).

    Returns:
        uint8 (N, 3, H, W).

    Example:
        >>> colored(np.array([[[1.0, 0.0, -1.0]]]))[0, :, 0].T.tolist()
        [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    """
    most = float(np.quantile(np.abs(nats), FULL)) or 1.0
    share = np.clip(nats / most, -1, 1)
    red, blue = 1 + np.minimum(share, 0), 1 - np.maximum(share, 0)
    return np.rint(255 * np.stack([red, np.minimum(red, blue), blue], 1)).astype(np.uint8)


class _Map(Protocol):
    """The map of one draw."""

    what: str

    def __call__(self, model: Model, x: Tensor, context: Context, renew: Renew) -> Tensor:
        """Nats (B, H, W); every pass over the model that is to have the same noise renews it."""
        ...


def _mean(
    map_of: _Map, model: Model, x: Tensor, context: Context, draws: int, seed: int
) -> Tensor:
    """The mean of the maps of several draws, (B, H, W)."""
    with torch.no_grad(), evaluating(model):
        each = (map_of(model, x, context, partial(noise, seed, draw)) for draw in range(draws))
        return sum(t.double() for t in each) / draws  # pyright: ignore[reportReturnType]


class _Likelihood:
    """-log p(x_ij | z) of each pixel."""

    what = "-log p(pixel | latents) in nats"

    def __call__(self, model: Model, x: Tensor, context: Context, renew: Renew) -> Tensor:
        renew()
        found = _of_pixels(model, x, context)
        assert found is not None  # it is only asked where there is one
        return found


@torch.no_grad()
def _of_pixels(model: Model, x: Tensor, context: Context) -> Tensor | None:
    """-log p of each pixel given the latents, (B, H, W), if the likelihood is a product."""
    trace = _Elements(set(model.variables()) - set(model.latents()))
    with evaluating(model):
        model(x, context, trace=trace)
    if trace.nats is None:
        return None
    return trace.nats.sum(1) if trace.nats.ndim == 4 else trace.nats


class _Elements(Trace):
    """A pass that keeps the terms of the likelihood of each element."""

    def __init__(self, observed: set[nn.Module]):
        super().__init__()
        self.observed, self.nats = observed, None

    def p(self, site: nn.Module, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """As `Trace.p`."""
        value = super().p(site, dist, value)
        of_elements = getattr(dist, "log_prob_of_elements", None)
        if site in self.observed and of_elements is not None:
            self.nats = -of_elements(value)
        return value


class _Replacement:
    """The change of -log p if a patch is replaced by the mean of the pixels around it."""

    def __init__(self, side: int, rounded: bool):
        self.side, self.rounded = side, rounded
        self.what = (
            f"-log p minus that with the {side} x {side} patch replaced by the mean around it, in "
            "nats"
        )

    def __call__(self, model: Model, x: Tensor, context: Context, renew: Renew) -> Tensor:
        renew()
        whole = -model(x, context).elbo
        found = whole.new_zeros(len(x), *x.shape[2:])
        for top in range(0, x.shape[2], self.side):
            for left in range(0, x.shape[3], self.side):
                rows, columns = (slice(at, at + self.side) for at in (top, left))
                renew()
                without = -model(self._without(x, rows, columns), context).elbo
                found[:, rows, columns] = (whole - without)[:, None, None]
        return found

    def _without(self, x: Tensor, rows: slice, columns: slice) -> Tensor:
        """Images whose patch is the mean of the pixels around it, of each channel."""
        high, wide = (slice(max(0, s.start - RING), s.stop + RING) for s in (rows, columns))
        window, patch = x[:, :, high, wide], x[:, :, rows, columns]
        inside = patch.shape[2] * patch.shape[3]
        pixels = window.shape[2] * window.shape[3] - inside
        mean = (window.sum((2, 3)) - patch.sum((2, 3))) / pixels
        replaced = x.clone()
        replaced[:, :, rows, columns] = (mean.round() if self.rounded else mean)[..., None, None]
        return replaced
