"""Work in latent space: directions that stand for attributes, mixing, temperature.

Everything here is done in *whitened* latents, (z - mean) / std under each latent's own prior:
there a model that fits has standard noise at every level, steps at one level are of one size, and
a level's latents can be moved under another image's upper ones. OpenAI's Glow calls them eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from musigma.data import Dataset
from musigma.data.readers import Progress
from musigma.evaluation import batch, batches, evaluating
from musigma.files import replacing
from musigma.model import Model
from musigma.trace import Trace

__all__ = ["Direction", "direction", "edit", "mix", "temperatures"]


@dataclass(frozen=True)
class Direction:
    """A step in whitened latents that stands for an attribute.

    Attributes:
        latents: One tensor for each latent of the model, top first, zero at levels left alone. A
            step of 1 goes from where examples without the attribute are on average, along the
            direction, to where those with it are.
        attribute: Its name.
        method: How it was found.
        auc: How well its projection tells the attribute on examples it was not made from: the area
            under the ROC curve, 0.5 for none; NaN if there were too few of them.
    """

    latents: tuple[Tensor, ...]
    attribute: str
    method: str
    auc: float

    def save(self, path: str | Path) -> None:
        """Write an .npz file, whole or not at all."""
        arrays = {f"z{i}": t.cpu().numpy() for i, t in enumerate(self.latents)}
        about = {"attribute": self.attribute, "method": self.method, "auc": self.auc}
        with replacing(path) as draft, draft.open("wb") as file:
            np.savez_compressed(file, **arrays, **about)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(cls, path: str | Path) -> Direction:
        """Read what `save` wrote.

        Raises:
            ValueError: If the file is another, or damaged.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
            count = sum(name[0] == "z" for name in found)
            latents = tuple(torch.from_numpy(found[f"z{i}"]) for i in range(count))
            said = str(found["attribute"]), str(found["method"]), float(found["auc"])
        except Exception as error:  # whatever a parser throws at a damaged file
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"direction: {path} is no file of a direction ({reason})") from error
        if not latents or not all(bool(t.isfinite().all()) for t in latents):
            raise ValueError(f"direction: {path} holds no latents, or some that are not finite")
        return cls(latents, *said)


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
    r"""The direction of an attribute, from examples with and without it.

    .. math:: d = \bar z_{with} - \bar z_{without}, \quad\text{or}\quad
        d = w \, (w \cdot (\bar z_{with} - \bar z_{without})) / |w|^2

    for `mean` (Kingma & Dhariwal, "Glow", 2018, arXiv:1807.03039), and for a linear `probe` with
    weights w: a logistic regression, regularised by a penalty that is chosen on held-back examples
    (Alain & Bengio, "Understanding intermediate layers using linear classifier probes", 2016,
    arXiv:1610.01644). A probe ignores what merely goes along with the attribute; the mean
    difference moves it as well.

    Args:
        model: Any model.
        data: Examples; a fourth is kept to measure the direction by.
        has: For each of them whether it has the attribute, shape (n,).
        attribute: Its name.
        method: `mean` or `probe`.
        levels: Latents to use, top first from 0; None: all.
        at_most: How many examples to look at, spread over the data: their latents are held in
            memory, and fewer are taken where these would fill more than 1 GB.
        batch_size: Examples at a time.
        seed: Of which examples are kept aside, and of the draws of binarization, if any.
        progress: Called with (done, total).

    Raises:
        ValueError: For an unknown method or level; if fewer than two examples have the attribute,
            or lack it; or if the latents are the same for all of them.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        raise ValueError(
            "direction: measuring one needs scikit-learn: pip install 'musigma[data]'"
        ) from None
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
    kept = np.unique(np.linspace(0, len(data) - 1, at_most).astype(int))
    data, has = data.subset(kept), has[kept]
    test = _every(4, has, seed)
    counts = [int((has[~test] == value).sum()) for value in (True, False)]
    if min(counts) < 2:
        raise ValueError(
            f"has: expected at least 2 examples with and without the attribute; got {counts[0]} "
            f"and {counts[1]} of the {int((~test).sum())} that a direction is made from"
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
    made, y = flat[~test], torch.from_numpy(has[~test])
    step = made[y].mean(0) - made[~y].mean(0)
    if bool((step == 0).all()):
        raise ValueError("model: its latents are the same whether or not the attribute is there")
    if method == "probe":
        w = _probe(made.numpy(), has[~test], seed)
        step = w * (w @ step) / (w @ w)
    rest = has[test]
    known = 0 < rest.sum() < len(rest)
    auc = float(roc_auc_score(rest, (flat[test] @ step).numpy())) if known else float("nan")
    pieces = iter(step.split([shapes[i].numel() for i in chosen]))
    latents = tuple(
        next(pieces).reshape(shape) if i in chosen else torch.zeros(shape)
        for i, shape in enumerate(shapes)
    )
    return Direction(latents, attribute, method, auc)


def _every(n: int, has: np.ndarray, seed: int) -> np.ndarray:
    """One in n examples, drawn evenly from those with the attribute and those without it."""
    chosen, random = np.zeros(len(has), bool), np.random.default_rng(seed)
    for value in (True, False):
        rows = random.permutation(np.flatnonzero(has == value))
        chosen[rows[: len(rows) // n]] = True
    return chosen


def _probe(x: np.ndarray, y: np.ndarray, seed: int) -> Tensor:
    """Weights of a logistic regression, in the coordinates of x."""
    from sklearn.linear_model import LogisticRegression

    third = _every(3, y, seed)
    enough = min(np.bincount(y[third], minlength=2).min(), np.bincount(y[~third]).min()) > 1
    best, penalty = -np.inf, 1e-2
    for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0) if enough else ():
        fitted = LogisticRegression(C=c, max_iter=500).fit(x[~third], y[~third])
        logits = fitted.decision_function(x[third])
        log_q = -np.logaddexp(0, np.where(y[third], -logits, logits)).mean()
        if log_q > best:
            best, penalty = log_q, c
    fitted = LogisticRegression(C=penalty, max_iter=500).fit(x, y)
    return torch.from_numpy(fitted.coef_[0]).float()


@torch.no_grad()
def edit(
    model: Model,
    x: Tensor,
    step: Direction,
    strengths: Sequence[float],
    context: Tensor | None = None,
) -> Tensor:
    """Examples with more and less of an attribute: (B, strengths, *event).

    ``decode(encode(x) + s · direction)`` in whitened latents; at strength 0 it is `reconstruct`,
    which of a flow is x.

    Args:
        model: The one that the direction was found in.
        x: Data, shape (B, *event).
        step: The direction.
        strengths: 1 is the step from examples without the attribute to examples with it.
        context: One row per example, or None.

    Raises:
        ValueError: If the direction is of another model's latents.
    """
    z = model.encode(x, context, mode=True, whiten=True)
    wanted, got = [tuple(t.shape[1:]) for t in z], [tuple(t.shape) for t in step.latents]
    if wanted != got:
        raise ValueError(f"direction: expected latents of shapes {wanted}, top first; got {got}")
    moved = [t.to(z[0]) for t in step.latents]
    frames = [
        model.decode([a + s * b for a, b in zip(z, moved, strict=True)], context, whiten=True)
        for s in strengths
    ]
    return torch.stack(frames, 1)


@torch.no_grad()
def mix(
    model: Model,
    x: Tensor,
    style: Tensor,
    levels: Sequence[int],
    context: Tensor | None = None,
    style_context: Tensor | None = None,
) -> Tensor:
    """Every example of x with some levels' latents from every example of `style`: (B, S, *event).

    As in the style mixing of Karras et al., "A Style-Based Generator Architecture", 2019,
    arXiv:1812.04948, with the latents of an encoder. The upper levels hold what an image is on the
    whole, the lower ones its detail.

    Args:
        model: Any model with more than one latent.
        x: What the other levels are taken from, shape (B, *event).
        style: What the chosen levels are taken from, shape (S, *event).
        levels: Which latents, top first from 0.
        context: One row per example of x, or None; it conditions the result.
        style_context: Of `style`.

    Raises:
        ValueError: For a level that there is not, or if all or none are chosen.
    """
    chosen = checked_levels(model, levels)
    if not 0 < len(chosen) < len(list(model.latents())):
        count = len(list(model.latents()))
        raise ValueError(f"levels: expected some of {count} and not all; got {list(levels)}")
    own = model.encode(x, context, mode=True, whiten=True)
    other = model.encode(style, style_context, mode=True, whiten=True)
    columns = []
    for j in range(len(style)):
        pairs = enumerate(zip(own, other, strict=True))
        z = [b[j].expand_as(a) if i in chosen else a for i, (a, b) in pairs]
        columns.append(model.decode(z, context, whiten=True))
    return torch.stack(columns, 1)


@torch.no_grad()
def temperatures(
    model: Model, n: int, values: Sequence[float], context: Tensor | None = None
) -> Tensor:
    """The same n draws at several temperatures: (len(values), n, *event).

    Noise is drawn once, for the latents, and multiplied; of a model with a likelihood the centre
    of p(x | latents) is returned.
    """
    trace = Trace(generating=True, n=n, whiten=True, scoring=False)
    model.generate(trace, context)
    noise = [trace.values[site] for site in model.latents()]
    drawn = [model.decode([t * z for z in noise], context, whiten=True) for t in values]
    return torch.stack(drawn)


def checked_levels(model: Model, levels: Sequence[int] | None) -> list[int]:
    """Levels in order, all of them if None.

    Raises:
        ValueError: For one that there is not.
    """
    count = len(list(model.latents()))
    chosen = sorted(set(range(count) if levels is None else levels))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"levels: expected some of 0 to {count - 1}, the top first; got {chosen}")
    return chosen
