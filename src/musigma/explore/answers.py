"""What the page computes. It shows the bodies of these functions, so they are its Python lines.

The names of their arguments are those of the lines around them (`musigma.explore.lines`): `model`,
`data`, and one example, `x` (1, *event) with its `context`. Latents are whitened,
(z - mean) / std under their prior, as in `musigma.editing`; "flat" ones are all latents of an
example in one row (B, D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import nan
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.distributions import kl_divergence

import musigma
import musigma.detectors
from musigma import context as contexts
from musigma import data as datasets
from musigma.context import Context
from musigma.data.readers import images
from musigma.gaussian import DiagonalGaussian, Format
from musigma.model import Model
from musigma.questions import log_prob_given
from musigma.trace import Recorder

__all__: list[str] = []

Place = tuple[int, ...]
"""An element of the latents: the number of a latent, and its index in it, such as (0, 3)."""

# --- the example ---------------------------------------------------------------------------------


def example(model: Model, data: datasets.Dataset, index: int, seed: int) -> tuple[Tensor, Context]:
    """An example of the data."""
    x, context = musigma.evaluation.batch(data, np.array([index]), model, seed=seed)
    return x, context


def of_class(context: Any, number: int) -> Tensor:
    """The context of another class."""
    context = torch.eye(context.shape[1])[[number]].to(context)
    return context


def picture(opener: Callable[[], BinaryIO], x: Tensor, data: datasets.Dataset) -> Tensor:
    """An image file as the model takes it."""
    pixels = images.pixels(opener, x.shape[1], (x.shape[2], x.shape[3]))
    one = datasets.Dataset(pixels[None], preprocess=data.preprocess)
    x = torch.from_numpy(one.take([0])).to(x)
    return x


def row(numbers: Sequence[float], x: Tensor) -> Tensor:
    """A row of numbers."""
    x = torch.tensor([numbers]).to(x)
    return x


def typed_row(cells: Mapping[str, Sequence[str]], model: Any, x: Tensor) -> Tensor:
    """A row of a table with typed columns."""
    one = datasets.load(cells, schema=model.spec.schema, unseen="probability", allow_constant=True)
    x = torch.from_numpy(one.take([0])).to(x)
    return x


# --- its posterior -------------------------------------------------------------------------------


def posterior(model: Model, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of q(z | x), and its KL in nats, for Gaussian latents."""
    record = Recorder(temperature=0.0, closed_form=True)
    model(x, context, trace=record)
    pairs = [(record.qs[site], record.ps[site]) for site in model.latents()]
    mean = torch.cat([p.whiten(q.mean).flatten(1) for q, p in pairs], 1)  # pyright: ignore
    std = torch.cat([(q.stddev / p.stddev).flatten(1) for q, p in pairs], 1)
    kl = [kl_divergence(q.base_dist, p.base_dist) for q, p in pairs]  # pyright: ignore
    cost = torch.cat([t.flatten(1) for t in kl], 1)
    return mean, std, cost


def values(model: Model, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """The latents of a flow, which have no posterior, and their -log p in nats."""
    record = Recorder(temperature=0.0)
    model(x, context, trace=record)
    pairs = [(record.values[site], record.ps[site]) for site in model.latents()]
    mean = torch.cat([p.whiten(z).flatten(1) for z, p in pairs], 1)  # pyright: ignore
    std = torch.zeros_like(mean)
    nats = [-p.base_dist.log_prob(z) for z, p in pairs]  # pyright: ignore
    cost = torch.cat([t.flatten(1) for t in nats], 1)
    return mean, std, cost


def estimated(model: Model, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of 64 draws of any posterior, and the KL of a Gaussian that has them."""
    torch.manual_seed(0)
    z = model.encode(x.repeat_interleave(64, 0), contexts.repeat(context, 64), whiten=True)
    flat = torch.cat([t.flatten(1) for t in z], 1).reshape(len(x), 64, -1)
    mean, std = flat.mean(1), flat.std(1)
    cost = 0.5 * (mean**2 + std**2 - 1) - std.clamp(min=1e-6).log()
    return mean, std, cost


def draws(
    model: Model, x: Tensor, context: Context, seed: int, count: int, temperature: float
) -> list[Tensor]:
    """Draws of q(z | x); the temperature multiplies their distance from its center."""
    torch.manual_seed(seed)
    center = model.encode(x, context, mode=True, whiten=True)
    many = x.repeat_interleave(count, 0), contexts.repeat(context, count)
    drawn = model.encode(*many, whiten=True)
    z = [a + temperature * (b - a) for a, b in zip(center, drawn, strict=True)]
    return z


# --- the columns of a row ------------------------------------------------------------------------


def cells(model: Any, count: int) -> list[list[float]]:
    """The middle of each cell of the first columns, and NaN where values may be missing."""
    columns = model.spec.schema.columns[:count]
    edges = [np.array(c.measured.edges) for c in columns]
    middles = [(a[:-1] + np.diff(a) / 2).tolist() for a in edges]
    values = [m + [nan] * c.missing for m, c in zip(middles, columns, strict=True)]
    return values


def grids(
    spans: Sequence[tuple[float, float, int]], atoms: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Values of the first columns: start, end and number, and others."""
    values = [[*np.linspace(*s).tolist(), *a] for s, a in zip(spans, atoms, strict=True)]
    return values


def variants(x: Tensor, values: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """The row with other values of one column after another."""
    column = torch.arange(len(values)).repeat_interleave(torch.tensor([len(v) for v in values]))
    rows = x.cpu().repeat(len(column), 1)
    rows[range(len(column)), column] = torch.tensor([t for v in values for t in v]).to(rows)
    rows = rows.to(x.device)
    return column, rows


def conditional(model: Model, context: Context, column: Tensor, rows: Tensor) -> Tensor:
    """log p of the value of one column given all the others, in nats."""
    inner, given = model.given(contexts.repeat(context, len(rows)))
    seen = column[:, None] != torch.arange(rows.shape[1])
    nats = log_prob_given(inner, rows, seen, given)  # pyright: ignore
    log_p = torch.from_numpy(nats)[range(len(rows)), column]
    return log_p


def sliced(model: Model, context: Context, rows: Tensor, count: int) -> Tensor:
    """log p of whole rows, or a bound from so many draws, in nats."""
    torch.manual_seed(0)
    log_p = model.iwae(rows, count, contexts.repeat(context, len(rows)), at_once=2**14)
    return log_p


# --- a plane of data -----------------------------------------------------------------------------


def landscape(
    model: Model, context: Context, box: Sequence[float], side: int, count: int
) -> Tensor:
    """log p, or a bound from so many draws, on a grid (side, side) from the lower left."""
    torch.manual_seed(0)
    left, right, low, high = box
    x, y = torch.linspace(left, right, side), torch.linspace(low, high, side)
    rows = torch.cartesian_prod(y, x).flip(1).to(next(model.parameters()))
    given = contexts.repeat(context, len(rows))
    log_p = model.iwae(rows, count, given, at_once=2**14).reshape(side, side)
    return log_p


def samples(model: Model, context: Context, seed: int, count: int) -> Tensor:
    """Draws of the model."""
    torch.manual_seed(seed)
    y = model.sample(count, contexts.repeat(context, count))
    return y


# --- scores --------------------------------------------------------------------------------------


def scored(model: Model, batches: Iterable[tuple[Tensor, Any]]) -> np.ndarray:
    """-log p(x) of many examples, or its upper bounds from one draw, in nats."""
    parts = [-model.elbo(x, context) for x, context in batches]
    scores = torch.cat(parts).double().numpy(force=True)
    scores = np.where(np.isnan(scores), np.inf, scores)
    return scores


def compared(scores: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The p-value of each score among the known scores of others."""
    p = musigma.anomaly.p_values(scores, known)
    return p


def among(scores: np.ndarray) -> np.ndarray:
    """The p-value of each score among all the others."""
    p = musigma.anomaly.p_values(scores, scores)  # each has also met itself
    p = (p * (len(scores) + 1) - 1) / len(scores)
    return p


def mapped(
    model: Model, data: datasets.Dataset, rows: Sequence[int], patch: int, draws: int
) -> np.ndarray:
    """Where the nats of images come from, (n, H, W)."""
    reference = musigma.detectors.Reference(model)
    maps = musigma.detectors.maps(reference, data.subset(rows), patch=patch, draws=draws)
    nats = maps.nats
    return nats


# --- latents to data -----------------------------------------------------------------------------


def from_example(model: Model, x: Tensor, context: Context) -> list[Tensor]:
    """The center of the posterior."""
    z = list(model.encode(x, context, mode=True, whiten=True))
    return z


def from_prior(model: Model, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The center of the prior."""
    z = [torch.zeros(1, *shape).to(next(model.parameters())) for shape in shapes]
    return z


def moved(z: Sequence[Tensor], steps: Tensor, moves: Mapping[int, float]) -> list[Tensor]:
    """Go some steps along directions."""
    flat = torch.stack([size * steps[k] for k, size in moves.items()]).sum(0)
    parts = flat.split([t[0].numel() for t in z])
    z = [t + part.reshape(t.shape[1:]) for t, part in zip(z, parts, strict=True)]
    return z


def decoded(
    model: Model, z: Sequence[Tensor], context: Context, changes: Mapping[Place, float]
) -> Tensor:
    """Set some elements of the latents, and decode."""
    for (latent, *where), value in changes.items():
        z[latent][(slice(None), *where)] = value
    y = model.decode(z, contexts.repeat(context, len(z[0])), whiten=True)
    return y


def strip(
    model: Model, z: Sequence[Tensor], context: Context, place: Place, steps: Sequence[float]
) -> Tensor:
    """Decode several values of one element."""
    latent, *where = place
    z = [t.repeat_interleave(len(steps), 0) for t in z]
    z[latent][(slice(None), *where)] = torch.tensor(steps).to(z[latent]).reshape(-1)
    y = model.decode(z, contexts.repeat(context, len(steps)), whiten=True)
    return y


# --- the plane of the map ------------------------------------------------------------------------


def centers(model: Model, batches: Iterable[tuple[Tensor, Any]]) -> Tensor:
    """The flat centers of the posteriors of many examples, (n, D)."""
    parts = []
    for x, context in batches:
        z = model.encode(x, context, mode=True, whiten=True)
        parts.append(torch.cat([t.flatten(1) for t in z], 1))
    points = torch.cat(parts)
    return points


def components(points: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of points, and the two directions in which they differ most, (2, D)."""
    middle = points.mean(0)
    axes = torch.linalg.svd(points - middle, full_matrices=False)[2][:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return middle, axes


def directions(points: Tensor, masks: Sequence[np.ndarray], count: int) -> Tensor:
    """Steps of one standard deviation along components, and between means of classes, (K, D)."""
    _, scale, axes = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    along = axes[:count] * scale[:count, None] / max(len(points) - 1, 1) ** 0.5
    between = [points[mask].mean(0) - points[~mask].mean(0) for mask in masks]
    steps = torch.stack([*along, *between])
    return steps


def elements(points: Tensor, pair: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean of points, and two elements as directions, (2, D)."""
    middle = points.mean(0)
    axes = torch.zeros(2, points.shape[1]).to(points)
    axes[[0, 1], list(pair)] = 1
    return middle, axes


def on_plane(middle: Tensor, axes: Tensor, places: Sequence[Sequence[float]]) -> Tensor:
    """The flat latents of points of a plane; off it they are at the mean of the data."""
    flat = middle + (torch.tensor(places).to(middle) - middle @ axes.T) @ axes
    return flat


def embedded(points: Tensor) -> Tensor:
    """Points in two dimensions by UMAP, (n, 2) (McInnes, Healy, Melville, arXiv:1802.03426)."""
    from umap import UMAP  # pyright: ignore

    drawn = UMAP(random_state=0, n_jobs=1).fit_transform(points.numpy(force=True))
    drawn = torch.from_numpy(drawn).to(points)
    return drawn


def between(points: Tensor, drawn: Tensor, places: Sequence[Sequence[float]]) -> Tensor:
    """The means of the flat latents of the 8 nearest examples, by inverse squared distance."""
    distance = torch.cdist(torch.tensor(places).to(drawn), drawn)
    least, nearest = distance.topk(min(8, len(drawn)), largest=False)
    weight = 1 / (least**2 + 1e-9)
    flat = (weight[..., None] * points[nearest]).sum(1) / weight.sum(1, keepdim=True)
    return flat


def from_flat(
    model: Model, context: Context, flat: Tensor, shapes: Sequence[Sequence[int]]
) -> Tensor:
    """Decode flat latents."""
    parts = flat.split([math.prod(shape) for shape in shapes], 1)
    z = [t.reshape(-1, *shape) for t, shape in zip(parts, shapes, strict=True)]
    y = model.decode(z, contexts.repeat(context, len(flat)), whiten=True)
    return y


# --- levels --------------------------------------------------------------------------------------


def priors(model: Model, x: Tensor, context: Context) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and log-scale of the prior of each latent, given the latents above it."""
    record = Recorder(temperature=0.0)
    model(x, context, trace=record)
    laws = [record.ps[site] for site in model.latents()]
    mean = [p.mean.reshape(1, *p.event_shape) for p in laws]
    log_std = [p.stddev.log().reshape(1, *p.event_shape) for p in laws]
    return mean, log_std


def redrawn(
    model: Model,
    x: Tensor,
    context: Context,
    level: int,
    seed: int,
    count: int,
    temperature: float,
) -> Tensor:
    """Draw one latent from its prior, and keep the others."""
    torch.manual_seed(seed)
    z = model.encode(x, context, mode=True, whiten=True)
    z = [t.repeat_interleave(count, 0) for t in z]
    z[level] = temperature * torch.randn_like(z[level])
    y = model.decode(z, contexts.repeat(context, count), whiten=True)
    return y


# --- the head ------------------------------------------------------------------------------------


def read(text: str, numbers: Sequence[float]) -> tuple[Format, Tensor, Tensor]:
    """Read the output of a network as mean and log-scale."""
    form, h = Format.parse(text), torch.tensor([numbers])
    layouts = {"two-heads": h.chunk(2, 1), "per-feature": h.reshape(1, -1, 2)}
    mean, log_std = form.split(layouts.get(form.layout, h))
    return form, mean, log_std


def mismatch(
    sampler: str, charged: str, noise: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A loss whose sampler and KL read the same number r, each in its own way.

    Data x = 0 are z plus noise of known scale, and z ~ N(0, 1), so the true posterior is known.
    """
    r = torch.linspace(-6, 4, 501)[:, None]
    drawn, zero = Format.parse(sampler).log_std(r), torch.zeros_like(r)
    prior = DiagonalGaussian(zero, zero, 1)
    scale = math.log(noise * math.sqrt(2 * math.pi))
    error = (2 * drawn[:, 0]).exp() / (2 * noise**2) + scale  # E -log p(x | z)
    kl = kl_divergence(DiagonalGaussian(zero, Format.parse(charged).log_std(r), 1), prior)
    right = kl_divergence(DiagonalGaussian(zero, drawn, 1), prior)
    loss, bound = error + kl, error + right
    return r, drawn, loss, bound, kl
