"""Editing in latent space: directions of attributes, mixing of levels, temperatures.

All functions work on *whitened* latents, (z - mean) / std under the prior of each latent. If a
model fits its data, they are standard normal at every level, so steps have comparable sizes, and
lower levels stay valid when upper levels change. OpenAI's Glow calls them eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from musigma.context import Context
from musigma.data import Dataset
from musigma.evaluation import batch, batches, evaluating
from musigma.evaluation.inputs import Progress
from musigma.files import replacing
from musigma.model import Model
from musigma.trace import Trace

__all__ = ["Direction", "direction", "edit", "mix", "temperatures"]


@dataclass(frozen=True)
class Direction:
    """A step in whitened latents that adds an attribute.

    Attributes:
        latents: One tensor for each latent of the model, top first; zero at unused levels. A step
            of 1 covers the distance between the means of examples without and with the attribute.
        attribute: Name of the attribute.
        method: Method of `direction`.
        auc: Area under the ROC curve of the projection on held-out examples: 1 if it separates
            them, 0.5 if it is no better than chance, NaN if there were too few of them.
    """

    latents: tuple[Tensor, ...]
    attribute: str
    method: str
    auc: float

    def save(self, path: str | Path) -> None:
        """Write an .npz file, completely or not at all."""
        arrays = {f"z{i}": t.cpu().numpy() for i, t in enumerate(self.latents)}
        metadata = {"attribute": self.attribute, "method": self.method, "auc": self.auc}
        with replacing(path) as draft, draft.open("wb") as file:
            np.savez_compressed(file, **arrays, **metadata)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read a file that `save` wrote.

        Raises:
            ValueError: If the file is of another kind, or damaged.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            count = sum(name[0] == "z" for name in arrays)
            latents = tuple(torch.from_numpy(arrays[f"z{i}"]) for i in range(count))
            metadata = str(arrays["attribute"]), str(arrays["method"]), float(arrays["auc"])
        except Exception as error:  # parsers raise anything on a damaged file
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"direction: {path} is not a direction file ({reason})") from error
        if not latents or not all(bool(t.isfinite().all()) for t in latents):
            raise ValueError(f"direction: {path} has no latents, or values that are not finite")
        return cls(latents, *metadata)


@torch.no_grad()
def direction(
    model: Model,
    data: Dataset,
    has: np.ndarray,
    *,
    attribute: str = "",
    method: Literal["mean", "probe"] = "mean",
    levels: Sequence[int] | None = None,
    at_most: int = 10_000,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Direction:
    r"""Find the direction of an attribute from examples with and without it.

    .. math:: d = \bar z_{with} - \bar z_{without}, \quad\text{or}\quad
        d = w \, (w \cdot (\bar z_{with} - \bar z_{without})) / |w|^2

    for `mean` (Kingma & Dhariwal, "Glow", 2018, arXiv:1807.03039), and for a linear `probe` with
    weights w: a logistic regression whose penalty is chosen on held-out examples (Alain & Bengio,
    "Understanding intermediate layers using linear classifier probes", 2016, arXiv:1610.01644).
    The mean difference also contains whatever correlates with the attribute; a probe leaves out
    what does not help to predict it.

    Args:
        model: Any model.
        data: Examples; a quarter is held out to measure the direction.
        has: Whether each example has the attribute, shape (n,).
        attribute: Name of the attribute.
        method: `mean` or `probe`.
        levels: Latents to use, counted from 0 at the top; None: all.
        at_most: Largest number of examples, spread over the data. Their latents are held in
            memory; if they would take more than 1 GB, fewer examples are used.
        batch_size: Examples per batch.
        seed: Random seed of the held-out examples, and of binarization if there is any.
        progress: Called with (done, total).

    Raises:
        ValueError: For an unknown method or level; if fewer than two examples have the attribute
            or fewer than two lack it; or if all latents are the same.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        raise ValueError("direction: needs scikit-learn: pip install 'musigma[data]'") from None
    if method not in ("mean", "probe"):
        raise ValueError(f"method: expected 'mean' or 'probe'; got {method!r}")
    has = np.asarray(has, bool)
    if has.shape != (len(data),):
        raise ValueError(f"has: expected {len(data)} truth values; got shape {has.shape}")
    chosen = checked_levels(model, levels)
    with evaluating(model):
        one, context = batch(data, np.arange(1), model, seed=seed)
        dims = sum(z.numel() for z in model.encode(one, context, mode=True))
    at_most = min(len(data), at_most, max(200, 250_000_000 // dims))
    spread = np.unique(np.linspace(0, len(data) - 1, at_most).astype(int))
    data, has = data.subset(spread), has[spread]
    test = _held_out(4, has, seed)
    counts = [int((has[~test] == value).sum()) for value in (True, False)]
    if min(counts) < 2:
        raise ValueError(
            f"has: expected at least 2 examples with and without the attribute; got {counts[0]} "
            f"and {counts[1]} among the {int((~test).sum())} that are not held out"
        )
    parts: list[Tensor] = []
    shapes: list[torch.Size] = []
    with evaluating(model):
        for x, context in batches(
            model, data, batch_size=batch_size, seed=seed, progress=progress
        ):
            z = model.encode(x, context, mode=True, whiten=True)
            shapes = [t.shape[1:] for t in z]
            parts.append(torch.cat([z[i].flatten(1).cpu().float() for i in chosen], 1))
    flat = torch.cat(parts)
    train, y = flat[~test], torch.from_numpy(has[~test])
    step = train[y].mean(0) - train[~y].mean(0)
    if bool((step == 0).all()):
        raise ValueError("model: its latents are the same with and without the attribute")
    if method == "probe":
        w = _probe(train.numpy(), has[~test], seed)
        step = w * (w @ step) / (w @ w)
    both = len(set(has[test])) == 2
    auc = float(roc_auc_score(has[test], (flat[test] @ step).numpy())) if both else float("nan")
    pieces = iter(step.split([shapes[i].numel() for i in chosen]))
    latents = tuple(
        next(pieces).reshape(shape) if i in chosen else torch.zeros(shape)
        for i, shape in enumerate(shapes)
    )
    return Direction(latents, attribute, method, auc)


def _held_out(n: int, has: np.ndarray, seed: int) -> np.ndarray:
    """A mask of one in n examples, drawn separately from those with and without the attribute."""
    chosen, random = np.zeros(len(has), bool), np.random.default_rng(seed)
    for value in (True, False):
        rows = random.permutation(np.flatnonzero(has == value))
        chosen[rows[: len(rows) // n]] = True
    return chosen


def _probe(x: np.ndarray, y: np.ndarray, seed: int) -> Tensor:
    """Weights of a logistic regression (features,), with the best of some penalties."""
    from sklearn.linear_model import LogisticRegression

    third = _held_out(3, y, seed)
    enough = min(np.bincount(y[third], minlength=2).min(), np.bincount(y[~third]).min()) > 1
    best, best_c = -np.inf, 1e-2
    for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0) if enough else ():
        fitted = LogisticRegression(C=c, max_iter=500).fit(x[~third], y[~third])
        logits = fitted.decision_function(x[third])
        log_q = -np.logaddexp(0, np.where(y[third], -logits, logits)).mean()
        if log_q > best:
            best, best_c = log_q, c
    fitted = LogisticRegression(C=best_c, max_iter=500).fit(x, y)
    return torch.from_numpy(fitted.coef_[0]).float()


@torch.no_grad()
def edit(
    model: Model,
    x: Tensor,
    step: Direction,
    strengths: Sequence[float],
    context: Context = None,
) -> Tensor:
    """Examples with more or less of an attribute: (B, strengths, *event).

    Computes ``decode(encode(x) + s · direction)`` in whitened latents. At strength 0 this is
    `Model.reconstruct`; for a flow it is x.

    Args:
        model: The model that the direction was found with.
        x: Data, shape (B, *event).
        step: The direction.
        strengths: Multiples of the step; 1 is the distance between the means of examples without
            and with the attribute.
        context: One row per example, or None.

    Raises:
        ValueError: If the shapes of the model's latents differ from those of the direction.
    """
    z = model.encode(x, context, mode=True, whiten=True)
    wanted, got = [tuple(t.shape[1:]) for t in z], [tuple(t.shape) for t in step.latents]
    if wanted != got:
        raise ValueError(f"direction: expected latents of shapes {wanted}, top first; got {got}")
    pairs = [(a, b.to(a)) for a, b in zip(z, step.latents, strict=True)]
    edited = [model.decode([a + s * b for a, b in pairs], context, whiten=True) for s in strengths]
    return torch.stack(edited, 1)


@torch.no_grad()
def mix(
    model: Model,
    x: Tensor,
    style: Tensor,
    levels: Sequence[int],
    context: Context = None,
    style_context: Context = None,
) -> Tensor:
    """Combine every example of x with chosen levels of every example of `style`: (B, S, *event).

    This is the style mixing of Karras et al., "A Style-Based Generator Architecture", 2019,
    arXiv:1812.04948, with latents from an encoder. Upper levels determine the overall image, lower
    levels its details.

    Args:
        model: Any model with more than one latent.
        x: Source of all other levels, shape (B, *event).
        style: Source of the chosen levels, shape (S, *event).
        levels: The chosen levels, counted from 0 at the top.
        context: One row per example of x, or None; the result is conditioned on it.
        style_context: One row per example of `style`, or None.

    Raises:
        ValueError: For a level that does not exist, or if all are chosen.
    """
    chosen, count = checked_levels(model, levels), len(list(model.latents()))
    if len(chosen) == count:
        raise ValueError(f"levels: expected fewer than all {count} levels; got {list(levels)}")
    content = model.encode(x, context, mode=True, whiten=True)
    other = model.encode(style, style_context, mode=True, whiten=True)
    columns = []
    for j in range(len(style)):
        pairs = enumerate(zip(content, other, strict=True))
        z = [b[j].expand_as(a) if i in chosen else a for i, (a, b) in pairs]
        columns.append(model.decode(z, context, whiten=True))
    return torch.stack(columns, 1)


@torch.no_grad()
def temperatures(model: Model, n: int, values: Sequence[float], context: Context = None) -> Tensor:
    """Decode the same n draws at several temperatures: (len(values), n, *event).

    The noise of the latents is drawn once, and multiplied by each temperature. A likelihood
    returns its center.
    """
    trace = Trace(generating=True, n=n, whiten=True, scoring=False)
    model.generate(trace, context)
    noise = [trace.values[site] for site in model.latents()]
    return torch.stack(
        [model.decode([t * z for z in noise], context, whiten=True) for t in values]
    )


def checked_levels(model: Model, levels: Sequence[int] | None) -> list[int]:
    """Levels in order; None: all of them.

    Raises:
        ValueError: For a level that does not exist, or if there are none.
    """
    count = len(list(model.latents()))
    chosen = sorted(set(range(count) if levels is None else levels))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"levels: expected numbers from 0 (top) to {count - 1}; got {chosen}")
    return chosen
