"""What the page asks of a model and its data: every answer is a dict of JSON values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma.any_order import AnyOrder
from musigma.context import Context
from musigma.data import Dataset
from musigma.evaluation import bound, evaluating
from musigma.explore import answers
from musigma.explore.columns import DRAWS, Columns
from musigma.explore.examples import Choice, Examples, planes
from musigma.explore.lines import lines
from musigma.explore.places import Places, read_pairs
from musigma.explore.ranking import Ranking
from musigma.explore.survey import STEPS as COMPONENTS
from musigma.explore.survey import Moments, Survey, Turns
from musigma.gaussian import Format, GaussianHead
from musigma.model import Model
from musigma.questions import explain
from musigma.spec import bits_per_dim
from musigma.trace import Recorder

__all__ = ["Explorer", "moments_of"]

SHOWN = 48
"""Elements of the latents that an answer lists, those with the largest cost."""

STEPS = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
"""Values along one element of the latents, in standard deviations of its prior."""

UMAP = "umap"
"""The axes of a map by UMAP."""

PATCHED = 50_000
"""Elements of images of a flow up to which their nats are mapped, by a pass for each patch."""

SIDE = 72
"""Points of a side of the grid on which a density of the plane is computed."""

DOTS = 1000
"""Examples, and draws of the model, that are shown on a plane of data."""


class Explorer:
    """A trained model and data of its kind. Its methods may be called from several threads.

    Args:
        model: Any model.
        data: Examples of its kind.
        loading: Python lines that define `model` and `data`.
        normal: Normal examples that the model was not trained on, with which the scores of the
            data are compared; None if `data` are such examples.
        normal_lines: Python lines that define `normal`.
        path: The file of the model; an answer says when it has changed.
        training: Returns the state of the training, as `musigma watch --json` shows it.
        training_lines: Python lines that do the same.
        seed: Random seed of binarization.

    Raises:
        ValueError: If there are no data.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        *,
        loading: str = "",
        normal: Dataset | None = None,
        normal_lines: str = "",
        path: Path | None = None,
        training: Callable[[], dict[str, Any]] | None = None,
        training_lines: str = "",
        seed: int = 0,
    ):
        if not len(data):
            raise ValueError(f"data: {data.name or 'the set'} holds no examples to explore")
        self.model, self.path, self.turns = model, path, Turns()
        self.training, self.training_lines = training, training_lines
        self.examples, self.normal_lines = Examples(model, data, loading, seed), normal_lines
        self.stamp, self.shapes, self.moments = self._stamp(), [], None
        with self._using():
            x, context, _ = self.examples[Choice()]
            if not model.no_latents:
                latents = model.encode(x, context, mode=True)
                self.shapes = [tuple(t.shape[1:]) for t in latents]
                self.moments = moments_of(model, x, context)
        self.places, self.columns = Places(self.shapes), Columns(model, self.examples)
        self.survey = Survey(model, data, self.turns, self.moments, answers.scored, normal)
        self.ranking = Ranking(self.survey)

    def notice(self) -> str:
        """What the user must know about the file of the model; empty if nothing."""
        now = self._stamp()
        if now == self.stamp:
            return ""
        what = "was deleted" if now is None else "has changed"
        return f"{self.path} {what} since this page was started, which shows what it held then."

    def about(self) -> dict[str, Any]:
        """What the page must know before it shows anything."""
        heads = [m for m in self.model.modules() if isinstance(m, GaussianHead) and m.emitted]
        data, spec = self.examples.data, self.examples.spec
        return {
            "architecture": self.model.config.get("architecture", type(self.model).__name__),
            "data": data.name,
            "examples": len(data),
            "shape": list(spec.shape),
            "columns": self.examples.columns,
            "labeled": data.labels is not None,
            "classes": self.examples.classes,
            "dims": sum(map(math.prod, self.shapes)),
            "moments": self.moments.__name__ if self.moments else "",
            "conditionals": self.columns.how,
            "flat": self.examples.flat,
            "context": bool(spec.context),
            "colors": self.examples.colors(),
            "umap": has_umap(),
            "levels": len(self.shapes) > 1 and all(len(s) == 3 for s in self.shapes),
            "format": str(heads[0].format if heads else Format()),
            "training": self.training is not None,
        }

    # --- one example -----------------------------------------------------------------------------

    def one(
        self, of: Choice, seed: int, count: int, temperature: float, changes: str
    ) -> dict[str, Any]:
        """An example, its posterior, draws of it, and what they decode to."""
        _check(count, 64, temperature)
        given, shown = self.places.changes(changes), self.examples.shown
        if self.moments is None:
            return self._scored(of)
        arguments = {"seed": seed, "count": count, "temperature": temperature}
        with self._using():
            x, context, begin = self.examples[of]
            mean, std, cost = (t[0].double().cpu() for t in self.moments(self.model, x, context))
            z = answers.from_example(self.model, x, context)
            again = self.model.reconstruct(x, context)
            follows = answers.decoded(self.model, z, context, given)
            drawn = answers.draws(self.model, x, context, **arguments)
            flat = _flat(drawn).double().cpu()
            pictures = answers.decoded(self.model, drawn, context, given)
            nats = float(-self.model.elbo(x, context))
        order = cost.argsort(descending=True)[:SHOWN].tolist()
        return {
            **self.examples.about(of),
            "input": shown(x),
            "reconstruction": shown(again),
            "follows": shown(follows),
            "draws": shown(pictures),
            **self._figures(x, nats),
            "cost": float(cost.sum()),
            "latents": [
                {
                    "place": i,
                    "name": self.places.name(i),
                    "mean": float(mean[i]),
                    "std": float(std[i]),
                    "cost": float(cost[i]),
                    "draws": flat[:, i].tolist(),
                }
                for i in order
            ],
            "python": lines(
                *begin,
                "again = model.reconstruct(x, context)",
                (self.moments, {}),
                (answers.draws, arguments),
                (answers.decoded, {"changes": given}),
            ),
        }

    def _scored(self, of: Choice) -> dict[str, Any]:
        """An example of a model without latents."""
        with self._using():
            x, context, begin = self.examples[of]
            nats = float(-self.model.elbo(x, context))
        return {
            **self.examples.about(of),
            "input": self.examples.shown(x),
            **self._figures(x, nats),
            "latents": [],
            "python": lines(*begin, "nats = -model.elbo(x, context)"),
        }

    def _figures(self, x: Tensor, nats: float) -> dict[str, Any]:
        """What an example costs; and its cells, with all their digits, if it is a row."""
        bits = bits_per_dim(nats, self.examples.spec.dims)
        cells = self.examples.cells(x)[0] if x.ndim == 2 else []
        return {"nats": nats, "bits_per_dim": bits, "bound": bound(self.model), "cells": cells}

    def conditionals(self, of: Choice) -> dict[str, Any]:
        """How probable each value of a row is, given the others."""
        if not self.columns.how:
            raise ValueError("columns: the examples of this model are not rows of several numbers")
        with self._using():
            x, context, begin = self.examples[of]
            columns, parts = self.columns(x, context)
        return {"columns": columns, "how": self.columns.how, "python": lines(*begin, *parts)}

    def plane(self, of: Choice) -> dict[str, Any]:
        """Data in two dimensions, draws of the model, and its density."""
        if not self.examples.flat:
            raise ValueError("plane: the examples of this model are not two numbers each")
        data = self.examples.sample(DOTS)
        low, high = np.quantile(data, [0.002, 0.998], axis=0)
        margin = 0.15 * (high - low) + 1e-6
        box = np.stack([low - margin, high + margin], 1).round(6).flatten().tolist()
        count = 1 if self.model.exact else DRAWS
        arguments = {"box": box, "side": SIDE, "count": count}
        with self._using():
            _, context, begin = self.examples[of]
            log_p = answers.landscape(self.model, context, **arguments)
            y = answers.samples(self.model, context, seed=0, count=DOTS)
        return {
            "box": box,
            "names": self.examples.columns,
            "side": SIDE,
            "log_p": log_p.double().cpu().flatten().tolist(),
            "bound": bound(self.model, count),
            "data": data.tolist(),
            "samples": y.tolist(),
            "python": lines(
                *begin,
                (answers.landscape, arguments),
                (answers.samples, {"seed": 0, "count": DOTS}),
            ),
        }

    def decode(
        self, of: Choice, start: str, changes: str, along: int | None, moves: str = ""
    ) -> dict[str, Any]:
        """Latents with some of their elements set, decoded; or several values of one of them."""
        self._latents()
        if start not in ("example", "prior"):
            raise ValueError(f"start: expected 'example' or 'prior'; got {start!r}")
        given = self.places.changes(changes)
        place = None if along is None else self.places.place(along)
        steps = self._moves(moves)  # which waits for the survey, and that for the model
        answer: dict[str, Any] = {}
        with self._using():
            x, context, parts = self.examples[of]
            if start == "example":
                z = answers.from_example(self.model, x, context)
                parts.append((answers.from_example, {}))
            else:
                z = answers.from_prior(self.model, self.shapes)
                parts.append((answers.from_prior, {"shapes": self.shapes}))
            if steps:
                parts[1:1] = self._directions()
                z = answers.moved(z, self.survey.steps, steps)
                parts.append((answers.moved, {"moves": steps}))
            y = answers.decoded(self.model, z, context, given)
            parts.append((answers.decoded, {"changes": given}))
            if place is not None:
                row = answers.strip(self.model, z, context, place, STEPS)
                answer |= {"strip": self.examples.shown(row), "steps": STEPS}
                parts.append((answers.strip, {"place": place, "steps": STEPS}))
        if self.survey.known:
            flat = _flat(z)[0]
            answer["values"] = {str(i): float(flat[i]) for i in self.survey.top}
        return {**answer, "picture": self.examples.shown(y), "python": lines(*parts)}

    def order(self) -> dict[str, Any]:
        """The elements of the latents that cost most over the data."""
        self._latents()
        cost, name = self.survey.wait().cost, self.places.name
        rows = [{"place": i, "name": name(i), "cost": float(cost[i])} for i in self.survey.top]
        return {
            "examples": len(self.survey.sample),
            "total": float(cost.sum()),
            "latents": rows,
            "directions": self.survey.named,
        }

    # --- the map ---------------------------------------------------------------------------------

    def map(self, axes: str, color: str, first: int) -> dict[str, Any]:
        """The places of examples, of all that are known from number `first` on."""
        if axes == UMAP:
            return self._embedded(color)
        survey = self.survey
        pair = self._axes(axes)
        columns = survey.columns(pair)
        part = slice(max(0, first), survey.done)
        rows = survey.rows[part]
        xy = survey.places[part][:, columns].round(4)
        return {
            "first": part.start,
            "done": part.stop,
            "total": len(survey.rows),
            "error": survey.error,
            "index": rows.tolist(),
            "x": xy[:, 0].tolist(),
            "y": xy[:, 1].tolist(),
            **self._colors(color, rows, survey.scores[part]),
            "axes": ["component 1", "component 2"]
            if pair is None
            else [*map(self.places.name, pair)],
        }

    def _colors(self, color: str, rows: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        """Values by which examples are colored."""
        color = color or ("score" if self.examples.data.labels is None else "label")
        values, names = scores, []
        if color != "score":
            values, names = self.examples.color(color, rows)
        return {"color": values.tolist(), "colored": color, "names": names}

    def _embedded(self, color: str) -> dict[str, Any]:
        """The places of examples by UMAP, once they are known."""
        self._axes("components")
        found, survey = self.survey.embed(), self.survey
        known = found.drawn is not None
        rows = found.rows if known else found.rows[:0]
        xy = found.known().double().cpu().numpy().round(4) if known else np.empty((0, 2))
        at = np.searchsorted(survey.rows, rows)
        scores = np.where(survey.rows[at] == rows, survey.scores[at], np.nan)
        note = "UMAP is being computed \u2026"
        if known:
            note = (
                f"{len(rows):,} examples. UMAP has no inverse: a point decodes the mean of the "
                "latents of its 8 nearest examples, weighted by inverse squared distance."
            )
        return {
            "first": 0,
            "done": len(rows),
            "total": len(found.rows),
            "error": found.error,
            "note": note,
            "index": rows.tolist(),
            "x": xy[:, 0].tolist(),
            "y": xy[:, 1].tolist(),
            **self._colors(color, rows, scores),
            "axes": ["UMAP 1", "UMAP 2"],
        }

    def hover(self, of: Choice, axes: str) -> dict[str, Any]:
        """An example, its place on the map, and the covariance of its posterior there."""
        if axes == UMAP:
            return self._near(of)
        pair = self._axes(axes)
        with self._using():
            x, context, _ = self.examples[of]
            _, std, _ = self._latents()(self.model, x, context)
            center = answers.centers(self.model, [(x, context)])
            _, directions = self.survey.axes(pair)
        root = directions * std
        return {
            **self.examples.about(of),
            "input": self.examples.shown(x),
            "place": (center @ directions.T)[0].tolist(),
            "covariance": (root @ root.T).tolist() if bool((std > 0).any()) else None,
        }

    def _near(self, of: Choice) -> dict[str, Any]:
        """An example, and its place by UMAP, if it was mapped."""
        self._axes("components")
        found = self.survey.embed()
        at = int(np.searchsorted(found.rows, of.index))
        if of.upload or at == len(found.rows) or found.rows[at] != of.index:
            raise ValueError(f"index: example {of.index} is not among those that UMAP maps")
        place = found.known()[at].tolist()
        with self._using():
            x, _, _ = self.examples[of]
        shown = self.examples.shown(x)
        return {**self.examples.about(of), "input": shown, "place": place, "covariance": None}

    def at(self, of: Choice, axes: str, places: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Decode points of the map."""
        if not 1 <= len(places) <= 32 or not all(len(place) == 2 for place in places):
            raise ValueError(f"places: expected 1 to 32 pairs of numbers; got {len(places)}")
        if not all(abs(value) < 1e6 for place in places for value in place):
            raise ValueError("places: expected coordinates below 1e6")
        where, shapes = {"places": [list(p) for p in places]}, {"shapes": self.shapes}
        plane: list[Any]
        if axes == UMAP:
            self._axes("components")
            found = self.survey.embed()
            drawn = found.known()
            flat = answers.between(found.points, drawn, places)
            plane = [*self._sample(found.rows), (answers.embedded, {}), (answers.between, where)]
        else:
            pair = self._axes(axes)
            middle, directions = self.survey.axes(pair)
            flat = answers.on_plane(middle, directions, places)
            chosen = (
                (answers.components, {}) if pair is None else (answers.elements, {"pair": pair})
            )
            plane = [*self._sample(self.survey.sample), chosen, (answers.on_plane, where)]
        with self._using():
            _, context, (loading, *example) = self.examples[of]
            y = answers.from_flat(self.model, context, flat, self.shapes)
        python = lines(loading, *plane, *example, (answers.from_flat, shapes))
        return {"pictures": self.examples.shown(y), "python": python}

    # --- anomalies -------------------------------------------------------------------------------

    def anomalies(self, rate: float, first: int, count: int) -> dict[str, Any]:
        """The strangest examples, and what a false-positive rate flags."""
        if not (first >= 0 and 1 <= count <= 64):
            raise ValueError(
                f"first, count: expected 0 or more and 1 to 64; got {first} and {count}"
            )
        self.survey.start()
        answer = self.ranking(rate, first, count)
        for row in answer["rows"]:
            row |= self.examples.about(Choice(row["index"]))
        index, shown, reasons = [row["index"] for row in answer["rows"]], {}, []
        if index:
            with self._using():
                x, context = self.examples.batch(index)
                why, reasons = self._reasons(index, x, context)
                shown = {"shown": self.examples.shown(x), **why}
        own, at_once = self.survey, self.survey.at_once
        batches = f"musigma.evaluation.batches(model, {{}}, batch_size={at_once})"
        parts: list[Any] = [
            self.examples.loading,
            f"{_spread(own.rows)}\nbatches = {batches.format('data.subset(rows)')}",
            (answers.scored, {}),
        ]
        if own.normal is None:
            parts.append((answers.among, {}))
        else:
            again = f"{self.normal_lines}\nbatches = {batches.format('normal')}"
            parts[1:1] = [again, (answers.scored, {}), "known = scores"]
            parts.append((answers.compared, {}))
        unit = "\u2212log p" if self.model.exact else "bound of \u2212log p"
        return {**answer, **shown, "unit": unit, "python": lines(*parts, *reasons)}

    def _reasons(
        self, rows: list[int], x: Tensor, context: Context
    ) -> tuple[dict[str, Any], list[Any]]:
        """What makes examples strange, and the lines: nats of pixels, or the columns of a row."""
        data, shape = self.examples.data, self.examples.spec.shape
        if len(shape) == 3 and min(shape[1:]) > 4:
            if self.model.is_flow and x.numel() > PATCHED:
                return {}, []
            arguments = {"rows": rows, "patch": max(1, min(shape[1:]) // 4), "draws": 1}
            nats = torch.from_numpy(answers.mapped(self.model, data, **arguments))
            return {"maps": planes(nats[None], len(nats))}, [(answers.mapped, arguments)]
        if self.columns.how == "conditional":
            inner, given = self.model.given(context)
            assert isinstance(inner, AnyOrder)
            found = explain(inner, x, context=given)  # pyright: ignore[reportArgumentType]
            return {"because": found.because}, []
        return {}, []

    # --- levels, training ------------------------------------------------------------------------

    def levels(
        self, of: Choice, level: int, seed: int, count: int, temperature: float
    ) -> dict[str, Any]:
        """The priors of the latents given those above, and draws of one of them."""
        self._latents()
        if not all(len(shape) == 3 for shape in self.shapes):
            raise ValueError("levels: the latents of this model are vectors, not images")
        if not 0 <= level < len(self.shapes):
            raise ValueError(f"level: expected 0 to {len(self.shapes) - 1}; got {level}")
        _check(count, 16, temperature)
        arguments = {"level": level, "seed": seed, "count": count, "temperature": temperature}
        with self._using():
            x, context, begin = self.examples[of]
            mean, log_std = answers.priors(self.model, x, context)
            y = answers.redrawn(self.model, x, context, **arguments)
        return {
            **self.examples.about(of),
            "input": self.examples.shown(x),
            "levels": [
                {"shape": list(a.shape[1:]), "mean": planes(a), "log_std": planes(b)}
                for a, b in zip(mean, log_std, strict=True)
            ],
            "redrawn": self.examples.shown(y),
            "python": lines(*begin, (answers.priors, {}), (answers.redrawn, arguments)),
        }

    def progress(self) -> dict[str, Any]:
        """The curves and the warnings of the training."""
        if self.training is None:
            raise ValueError("training: this is a file of a model, not a run folder with a log")
        with self.turns.first():  # the reader of the log keeps its place
            return {**self.training(), "python": lines(self.training_lines)}

    # --- parts of answers ------------------------------------------------------------------------

    def _latents(self) -> Moments:
        """How the posterior is described.

        Raises:
            ValueError: If the model has no latents.
        """
        if self.moments is None:
            raise ValueError(f"latents: {self.model.no_latents}")
        return self.moments

    def _sample(self, some: np.ndarray) -> list[Any]:
        """Lines of the centers of some examples, which are spread over the data."""
        batches = "musigma.evaluation.batches(model, data.subset(rows))"
        return [f"{_spread(some)}\nbatches = {batches}", (answers.centers, {})]

    def _directions(self) -> list[Any]:
        """Lines of the directions of the sliders."""
        masks = f"masks = [data.labels[rows] == k for k in {self.survey.classes}]"
        last = (answers.directions, {"count": COMPONENTS})
        return [*self._sample(self.survey.sample), masks, last]

    def _moves(self, text: str) -> dict[int, float]:
        """Steps along directions, from text such as 0:1.5,4:-1."""
        moves = read_pairs(text, "move")
        for k in moves:
            if not 0 <= k < len(self.survey.wait().named):
                raise ValueError(
                    f"move: expected directions 0 to {len(self.survey.named) - 1}; got {k}"
                )
        return moves

    def _axes(self, text: str) -> tuple[int, int] | None:
        """The elements that are the axes of the map; None: principal components."""
        self._latents()
        examples, dims = self.survey.wait().points.shape
        if min(examples, dims) < 2:
            raise ValueError(
                "axes: a plane needs two examples and two latent numbers; there are "
                f"{examples} and {dims}"
            )
        if text == "components":
            return None
        try:
            first, second = map(int, text.split(","))
        except ValueError:
            raise ValueError(f"axes: expected 'components' or 3,7; got {text[:40]!r}") from None
        self.survey.columns((first, second))
        return first, second

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """Use the model, alone, without gradients, in a random state of its own."""
        with self.turns.first(), torch.no_grad(), evaluating(self.model):
            yield

    def _stamp(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            if self.path is not None:
                about = self.path.stat()
                return about.st_size, about.st_mtime_ns
        return None


def has_umap() -> bool:
    """Whether umap-learn is installed."""
    return find_spec("umap") is not None


def _spread(rows: np.ndarray) -> str:
    """The line of examples that are spread over the data."""
    return f"rows = np.unique(np.linspace(0, len(data) - 1, {len(rows)}).astype(int))"


def _flat(z: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten(1) for t in z], 1)


def _check(count: int, most: int, temperature: float) -> None:
    if not (1 <= count <= most and 0 <= temperature <= 10):
        raise ValueError(
            f"count, temperature: expected 1 to {most} and 0 to 10; got {count}, {temperature:g}"
        )


def moments_of(model: Model, x: Tensor, context: Any) -> Moments:
    """How the posterior of this model is described: exactly, as a flow's values, or by draws."""
    record = Recorder(temperature=0.0)
    model(x, context, trace=record)
    drawn = any(not getattr(site, "is_preprocessing", False) for site in record.qs)
    kind = answers.posterior if drawn else answers.values
    try:
        kind(model, x, context)
    except (KeyError, AttributeError, NotImplementedError, TypeError):
        return answers.estimated
    return kind
