"""Densities, outliers, latents, missing values and synthetic rows as scikit-learn estimators.

    >>> import numpy as np
    >>> from musigma.sklearn import FlowDensity
    >>> x = np.random.default_rng(0).normal(size=(300, 3))
    >>> density = FlowDensity(options={"hidden": 16}, steps=5, random_state=0)
    >>> density.fit(x).score_samples(x[:2]).shape
    (2,)

An array is rows of real numbers. A pandas, polars or Arrow table has columns of all types
(`musigma.schema`), inferred from their values unless `schema` says otherwise; what comes out is a
table of the same library, with the same names and types.

An estimator stores no rows. It is pickled as plain data and the bytes of a checkpoint
(`musigma.checkpoint`), so loading it, by joblib too, runs no code from the file but that of
scikit-learn and of pickle itself.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    OneToOneFeatureMixin,
    OutlierMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from musigma import anomaly, checkpoint, data, evaluation, questions, zoo
from musigma.any_order import AnyOrder
from musigma.data import Dataset, columns
from musigma.frames import as_kind, kind_of, replaced
from musigma.model import Model
from musigma.schema import Column, Schema
from musigma.scorer import BLOCK, nats, padded
from musigma.spec import Spec
from musigma.training import TrainConfig, fit

__all__ = [
    "Estimator",
    "FlowDensity",
    "Imputer",
    "OutlierDetector",
    "Synthesizer",
    "VAETransformer",
]

GROUPS = ("options", "training")
"""Parameters that are mappings, whose entries have names of their own: options__hidden."""


@dataclass(eq=False, repr=False, kw_only=True)
class Estimator(BaseEstimator, ABC):
    """What the estimators share: parameters, training, and how they are stored.

    Args:
        options: Options of the architecture, as `musigma.build` takes them. Each is also a
            parameter of its own for `set_params` and grid search: ``options__hidden``.
        schema: The types of the columns: `infer`, a `Schema`, or the path of a file that
            `musigma schema` wrote. Columns of an array are continuous unless it says otherwise.
        missing: Whether a missing value has a probability of its own, or is left out of the
            density.
        minutes: Budget of training in minutes.
        epochs: Budget in passes over the training rows; 20 if no budget is given.
        steps: Budget in optimizer steps.
        training: Other options of `musigma.TrainConfig`, such as ``{"lr": 1e-3, "patience": 3}``;
            also ``training__lr``.
        validation_fraction: Share of the rows that chooses the best weights.
        random_state: Seed of weights, batches and the choice of rows, as in scikit-learn.
        device: Name of a torch device; by default the best one available.
        verbose: 0: silent; 1: a line on stderr for each note, evaluation and warning; 2: also for
            training steps.
        watch: Called with each of these, and with every row of the log of training, as in
            `musigma.fit`.

    Attributes:
        model_: The trained `musigma.Model`: the weights that were best on validation rows.
        schema_: The types of the columns, and their cells.
        history_: A dict for each note about the table (columns that are left out, say), each
            evaluation on validation rows, and each warning of training.
        n_features_in_: Number of columns.
        feature_names_in_: Their names, if they are all text.
    """

    options: Mapping[str, Any] | None = None
    schema: Any = "infer"
    missing: Literal["model", "ignore"] = "model"
    minutes: float | None = None
    epochs: float | None = None
    steps: int | None = None
    training: Mapping[str, Any] | None = None
    validation_fraction: float = 0.1
    random_state: Any = None
    device: str | None = None
    verbose: int = 0
    watch: Callable[[Mapping[str, Any]], None] | None = None

    @abstractmethod
    def _architecture(self) -> tuple[str, dict[str, Any]]:
        """The name of the architecture, and options that follow from parameters."""

    # -- parameters

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters; if `deep`, also each entry of `options` and `training`."""
        params = super().get_params(deep=False)
        if deep:
            for group in GROUPS:
                inside = params[group] if isinstance(params[group], Mapping) else {}
                params |= {f"{group}__{key}": value for key, value in inside.items()}
        return params

    def set_params(self, **params: Any) -> Estimator:
        """Set parameters, or single entries of `options` and `training`."""
        whole = {k: v for k, v in params.items() if k.partition("__")[0] not in GROUPS}
        groups = {group: params[group] for group in GROUPS if group in params}
        super().set_params(**whole, **groups)
        for name in params.keys() - whole.keys() - groups.keys():
            group, _, key = name.partition("__")
            setattr(self, group, {**(getattr(self, group) or {}), key: params[name]})
        return self

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self._architecture()[0] == "table"
        tags.input_tags.string = False
        return tags

    # -- training

    def _split(self, X: Any, kept: float = 0.0) -> _Parts:
        """The rows of `fit` in parts, and a seed for all that follows."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        return _parts(self._read(X, reset=True), self.validation_fraction, kept, seed)

    def _train(self, parts: _Parts) -> None:
        """Train a model; its best weights are `model_`."""
        train, validation, _, seed = parts
        budget = {name: getattr(self, name) for name in ("minutes", "epochs", "steps")}
        config = TrainConfig(**budget, seed=seed, **(self.training or {}))
        name, options = self._architecture()
        assert train.schema is not None  # `_read` has read the rows with one
        spec = Spec(train.shape, schema=train.schema.measure(train.x))
        with (
            torch.random.fork_rng(devices=[]),
            tempfile.TemporaryDirectory(prefix="musigma-") as folder,
        ):
            torch.manual_seed(seed)
            model = zoo.build(name, spec, **options, **(self.options or {}))
            self._check(model)
            run = fit(
                model, train, validation, config, folder, device=self.device, watch=self._log
            )
            if run.signal:  # Ctrl-C, say, which `fit` has handled
                signal.raise_signal(run.signal)
            best = checkpoint.load(Path(folder) / "model.safetensors")
        self.model_: Any = best.to(next(run.model.parameters()).device)

    def _check(self, model: Model) -> None:
        """Refuse models that this estimator cannot use."""

    def _log(self, row: Mapping[str, Any]) -> None:
        """Take a row of the log of training."""
        if row["kind"] != "train":
            self.history_.append(dict(row))
        if self.verbose > (row["kind"] == "train"):
            text = row.get("message") or f"{row['nats']:.4f} nats per row"
            where = f", step {row['step']}, {row['seconds']:.0f} s" if "step" in row else ""
            sys.stderr.write(f"{type(self).__name__}: {row['kind']}{where}: {text}\n")
        if self.watch:
            self.watch(row)

    # -- rows in

    @property
    def schema_(self) -> Schema:
        """The types of the columns, and their cells."""
        return self.model_.spec.schema

    def _read(self, X: Any, *, reset: bool = False) -> Dataset:
        """The rows of an array or a table, which is that of `fit` if `reset`."""
        if not reset:
            check_is_fitted(self, "model_")
        schema = self.schema if reset else self.schema_
        kind = kind_of(X)
        if kind:
            validate_data(self, X, reset=reset, skip_check_array=True)
            rows = X
        else:
            finite = "allow-nan" if self.__sklearn_tags__().input_tags.allow_nan else True
            least = 2 if reset else 1
            how = {"dtype": np.float64, "ensure_all_finite": finite, "ensure_min_samples": least}
            rows: Any = validate_data(self, X, reset=reset, **how)
        if reset:
            self.kind_, self.history_ = kind, []
        if not kind and self.schema == "infer":
            if reset:
                names = getattr(self, "feature_names_in_", [f"x{j}" for j in range(rows.shape[1])])
                missing = (np.isnan(rows).any(0) & (self.missing == "model")).tolist()
                schema = Schema(tuple(map(_number, names, missing)))
            return Dataset(rows, columns=schema.names, schema=schema)
        found = data.load(
            rows,
            schema=schema,
            missing=self.missing,
            unseen="probability",
            allow_constant=not reset,
        )
        for note in found.notes if reset else ():
            self._log({"kind": "note", "message": note})
        return found

    # -- rows out

    def _table(self, rows: np.ndarray, like: Any = None) -> Any:
        """Rows as a table like the one of `fit`, or as an array if there was none."""
        schema = self.schema_
        if self.kind_ is None and not any(c.has_levels for c in schema.columns):
            return rows
        table = columns.decode(rows, schema)
        if self.kind_ is None:
            return np.stack([c.to_numpy().astype(np.float64) for c in table.columns], 1)
        return as_kind(table, self.kind_, like)

    @torch.no_grad()
    def _sample(self, n: int, random_state: Any, draw: Callable[[int], Any]) -> np.ndarray:
        """Rows (n, D) that `draw(k)` gives in blocks, from a seed."""
        if n < 0:
            raise ValueError(f"n_samples: expected 0 or more; got {n}")
        parts = [np.empty((0, self.model_.spec.dims))]
        with self._seeded(random_state):
            for start in range(0, n, questions.DRAWN):
                parts.append(draw(min(questions.DRAWN, n - start)).double().numpy(force=True))
        return np.concatenate(parts)

    @contextlib.contextmanager
    def _seeded(self, random_state: Any) -> Iterator[None]:
        """Seed torch's generators; afterwards restore their state."""
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        with evaluation.evaluating(self.model_):
            evaluation.noise(seed, 0)
            yield

    # -- storage

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "model_" in state:
            with tempfile.TemporaryDirectory(prefix="musigma-") as folder:
                file = Path(folder) / "model.safetensors"
                checkpoint.save(state["model_"], file)
                state["model_"] = file.read_bytes()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "model_" in state:
            with tempfile.TemporaryDirectory(prefix="musigma-") as folder:
                file = Path(folder) / "model.safetensors"
                file.write_bytes(state["model_"])
                state = {**state, "model_": checkpoint.load(file)}
        super().__setstate__(state)


def _number(name: str, missing: bool) -> Column:
    """A column of an array."""
    return Column(name, missing=missing)


class _Parts(NamedTuple):
    """Rows to train on, to choose weights by, and to keep; and a seed."""

    train: Dataset
    validation: Dataset
    kept: Dataset
    seed: int


def _parts(found: Dataset, validation: float, kept: float, seed: int) -> _Parts:
    """Divide rows at random; equal rows are in one part."""
    for name, share in (("validation_fraction", validation), ("holdout", kept)):
        if not 0 < share < 1 and (name, share) != ("holdout", 0):
            raise ValueError(f"{name}: expected a number between 0 and 1; got {share}")
    _, first, which = np.unique(found.content(), return_index=True, return_inverse=True)
    n, which = len(first), np.argsort(np.argsort(first))[which]  # numbered as they come
    chosen, spare = (int(np.ceil(share * n)) for share in (validation, kept))
    if n <= chosen + spare:
        raise ValueError(
            f"X: {n} different rows (n_samples = {len(found)}) are too few to train on, to choose "
            "the best weights by, and to keep: give more"
        )
    place = np.random.default_rng(seed).permutation(n)[which]
    train, choosing = place >= chosen + spare, place < chosen
    rest = ~train & ~choosing
    return _Parts(found.subset(train), found.subset(choosing), found.subset(rest), seed)


# --- densities -----------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class _Density(Estimator):
    """An estimator with an exact density."""

    architecture: str = "table"

    def _architecture(self) -> tuple[str, dict[str, Any]]:
        return self.architecture, {}

    def _check(self, model: Model) -> None:
        if not model.exact:
            raise ValueError(
                "architecture: expected one with an exact density, such as table; "
                f"{self.architecture} has a bound of it for these columns (flows are exact if all "
                "are continuous and no value is missing or in many rows)"
            )

    def score_samples(self, X: Any) -> np.ndarray:
        """log p(x) of each row in nats, float64 (n_samples,); low for unusual rows.

        It is the log of a density for continuous columns, so it depends on their units and may be
        positive; discrete columns have probabilities.
        """
        found = self._read(X)
        return -nats(self.model_, found)


@dataclass(eq=False, repr=False)
class FlowDensity(DensityMixin, _Density):
    """A density of rows that is exact and can be drawn from.

    Args:
        architecture: `table` (columns of all types, missing values), `nsf`, `maf`, or another
            exact one of vectors.

    Further parameters and the attributes are those of `Estimator`.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(300, 3))
        >>> density = FlowDensity(steps=5, options={"hidden": 16}, random_state=0).fit(x)
        >>> density.sample(2, random_state=0).shape
        (2, 3)
    """

    def fit(self, X: Any, y: Any = None) -> FlowDensity:
        """Train on rows (n_samples, n_features), an array or a table.

        Raises:
            ValueError: If the rows cannot be used, or an option is unknown.
        """
        self._train(self._split(X))
        return self

    def score(self, X: Any, y: Any = None) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The mean of `score_samples`, nats per row: higher is better, as in grid search."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Any:
        """Draw rows: an array, or a table like the one of `fit`."""
        check_is_fitted(self, "model_")
        return self._table(self._sample(n_samples, random_state, self.model_.sample))


@dataclass(eq=False, repr=False)
class OutlierDetector(OutlierMixin, _Density):
    r"""Outliers by an exact density, with a promised rate of false positives.

    A row is an outlier if its conformal p-value is at most `fpr`:

    .. math:: p = \frac{1 + \#\{i : \log p(x_i) \le \log p(x)\}}{n + 1}

    over n rows x_i that were kept from training. Of rows that are exchangeable with those, at most
    a share `fpr` is flagged, on average over the choice of the n rows (`musigma.anomaly`).

    The sign is that of scikit-learn: `decision_function` is negative, and `predict` -1, for an
    outlier. It is opposite to that of PyOD, in which outliers are high (`musigma.pyod`).

    Args:
        architecture: As in `FlowDensity`.
        fpr: The promised share of false positives.
        holdout: Share of the rows that is kept from training, for the threshold.

    Further parameters are those of `Estimator`.

    Attributes:
        calibration_: -log p of the rows that were kept, nats (n,), in increasing order.
        offset_: log p below which a row is an outlier.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(400, 3))
        >>> options = {"hidden": 16}
        >>> detector = OutlierDetector(fpr=0.05, steps=5, options=options, random_state=0).fit(x)
        >>> detector.predict([[0, 0, 0], [40, -40, 40]])
        array([ 1, -1])
    """

    fpr: float = 0.01
    holdout: float = 0.2

    def fit(self, X: Any, y: Any = None) -> OutlierDetector:
        """Train on rows (n_samples, n_features), an array or a table.

        Raises:
            ValueError: If too few rows are kept to promise the rate, or as `FlowDensity.fit`.
        """
        parts = self._split(X, self.holdout)
        try:
            anomaly.rate_interval(len(parts.kept), self.fpr)
        except ValueError as error:
            raise ValueError(
                f"fpr{str(error).removeprefix('rate')}, or a larger holdout"
            ) from None
        self._train(parts)
        self.calibration_ = np.sort(nats(self.model_, parts.kept))
        self.offset_ = -anomaly.threshold(self.calibration_, self.fpr)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """``score_samples(X) - offset_``, nats (n_samples,): negative for outliers."""
        check_is_fitted(self, "model_")
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """-1 for outliers, 1 for other rows, int (n_samples,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def p_values(self, X: Any) -> np.ndarray:
        """Conformal p-values, (n_samples,): at most `fpr` for outliers."""
        check_is_fitted(self, "model_")
        return anomaly.p_values(-self.score_samples(X), self.calibration_)


# --- latents -------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class VAETransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Estimator):
    """Latents of rows: the means of the posteriors of a variational autoencoder.

    Args:
        n_components: Dimensions of the latent space.

    Further parameters and the attributes are those of `Estimator`; options are those of the
    architecture `vae`.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(300, 5))
        >>> vae = VAETransformer(2, steps=5, options={"width": 16}, random_state=0)
        >>> vae.set_output(transform="pandas").fit_transform(x).columns.tolist()
        ['vaetransformer0', 'vaetransformer1']
    """

    n_components: int = 2

    def _architecture(self) -> tuple[str, dict[str, Any]]:
        return "vae", {"latents": self.n_components}

    def fit(self, X: Any, y: Any = None) -> VAETransformer:
        """Train on rows (n_samples, n_features), an array or a table.

        Raises:
            ValueError: If the rows cannot be used, or an option is unknown.
        """
        self._train(self._split(X))
        return self

    @property
    def _n_features_out(self) -> int:
        return self.n_components

    def transform(self, X: Any) -> np.ndarray:
        """The mean of q(z | x) for each row, float64 (n_samples, n_components)."""
        found = self._read(X)
        parts = [np.empty((0, self.n_components))]
        with torch.no_grad(), evaluation.evaluating(self.model_):
            for x, _ in evaluation.batches(self.model_, padded(found), batch_size=BLOCK):
                (z,) = self.model_.encode(x, mode=True)
                parts.append(z.double().numpy(force=True))
        return np.concatenate(parts)[: len(found)]

    def inverse_transform(self, X: Any) -> Any:
        """The center of p(x | z) for latents (n_samples, n_components): rows like those of `fit`.

        Raises:
            ValueError: If the number of components is another.
        """
        check_is_fitted(self, "model_")
        z = check_array(X, dtype="float64")
        if z.shape[1] != self.n_components:
            raise ValueError(
                f"X: expected {self.n_components} latents for each row; got {z.shape[1]}"
            )
        home = next(self.model_.parameters())
        with torch.no_grad(), evaluation.evaluating(self.model_):
            parts = [
                self.model_.decode([torch.tensor(z[at : at + BLOCK]).to(home)])
                for at in range(0, len(z), BLOCK)
            ]
        return self._table(torch.cat(parts).double().numpy(force=True), X)


# --- missing values ------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Imputer(OneToOneFeatureMixin, TransformerMixin, Estimator):
    """Missing values filled in given the other values of the row, by the density `table`.

    Args:
        strategy: `mean`: the mean of the draws, rounded to the grid of a column that has one, and
            the most frequent level of a column of levels. `draw`: a single draw, which keeps the
            spread of the column.
        n_draws: Draws of each missing value for the mean.

    Further parameters and the attributes are those of `Estimator`; options are those of the
    architecture `table`.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(300, 3))
        >>> x[::7, 1] = np.nan
        >>> imputer = Imputer(steps=5, options={"hidden": 16}, random_state=0)
        >>> bool(np.isnan(imputer.fit_transform(x)).any())
        False
    """

    strategy: Literal["mean", "draw"] = "mean"
    n_draws: int = 20

    def _architecture(self) -> tuple[str, dict[str, Any]]:
        return "table", {}

    def fit(self, X: Any, y: Any = None) -> Imputer:
        """Train on rows (n_samples, n_features) with or without missing values.

        Raises:
            ValueError: If the rows cannot be used, or an option is unknown.
        """
        if self.strategy not in ("mean", "draw"):
            raise ValueError(f"strategy: expected 'mean' or 'draw'; got {self.strategy!r}")
        self._train(self._split(X))
        return self

    def transform(self, X: Any) -> Any:
        """X without missing values: an array, or a table of the same library and types."""
        draws = self._draws(X, self.n_draws if self.strategy == "mean" else 1, self.random_state)
        return self._filled(X, draws, draws.center())

    def sample(self, X: Any, n_draws: int | None = None, random_state: Any = None) -> list[Any]:
        """Several completions of X, each with draws of its own, for multiple imputation.

        Args:
            X: Rows with missing values.
            n_draws: Number of completions; by default that of the estimator.
            random_state: Seed.
        """
        n = self.n_draws if n_draws is None else n_draws
        draws = self._draws(X, n, random_state)
        return [self._filled(X, draws, draws.filled(i)) for i in range(n)]

    def _draws(self, X: Any, n: int, random_state: Any) -> questions.Imputation:
        rows = self._read(X).x
        with self._seeded(random_state):
            return questions.impute(self.model_, rows, n)

    def _filled(self, X: Any, draws: questions.Imputation, rows: np.ndarray) -> Any:
        """X with the values of rows where it has none, and nothing else changed."""
        if self.kind_ is None:
            at, schema = tuple(draws.cells.T), self.schema_
            whole = [c.on_grid(v) for c, v in zip(schema.columns, rows.T, strict=True)]
            rows[at] = np.stack(whole, 1)[at]
            return self._table(rows)
        values, cells = columns.decode(rows, self.schema_), draws.cells
        for j in np.unique(cells[:, 1]).tolist():
            holes = np.zeros(len(rows), bool)
            holes[cells[cells[:, 1] == j, 0]] = True
            name = self.schema_.names[j]
            X = replaced(X, name, holes, values[name])
        return X


# --- synthetic rows ------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Synthesizer(Estimator):
    """Synthetic rows with the columns, types and missing values of real ones.

    Args:
        architecture: `table`, or another that takes columns of all types; only `table` takes
            conditions.

    Further parameters and the attributes are those of `Estimator`.
    """

    architecture: str = "table"

    def _architecture(self) -> tuple[str, dict[str, Any]]:
        return self.architecture, {}

    def fit(self, X: Any, y: Any = None) -> Synthesizer:
        """Train on rows (n_samples, n_features), an array or a table."""
        self._train(self._split(X))
        return self

    def sample(
        self, n_samples: int = 1, *, where: Mapping[str, Any] | str = "", random_state: Any = None
    ) -> Any:
        """Draw rows: a table like the one of `fit`, or an array.

        Args:
            n_samples: Number of rows.
            where: A condition that all rows satisfy, drawn without rejection: text, as
                `musigma.conditions.Condition` takes it (``"country == 'FR' and age >= 65"``), or
                values by column: one, a list of them, or None for a missing value.
                `musigma.questions.sample_where`, with `model_`, also returns its probability.
            random_state: Seed.

        Raises:
            ValueError: If the condition names what is not there, or has no probability.
        """
        check_is_fitted(self, "model_")
        if not where:
            return self._table(self._sample(n_samples, random_state, self.model_.sample))
        if not isinstance(self.model_, AnyOrder):
            raise ValueError(
                f"where: only the architecture table takes conditions; this is {self.architecture}"
            )
        text = where if isinstance(where, str) else _condition(where)
        with self._seeded(random_state):
            found = questions.sample_where(self.model_, text, n_samples)
        return self._table(found.rows)


def _condition(where: Mapping[str, Any]) -> str:
    """Values by column as the text of a condition.

    >>> _condition({"country": ["FR", "DE"], "age": 65, "vat no": None})
    '`country` in ("FR", "DE") and `age` == 65 and `vat no` is missing'
    """

    def literal(value: Any) -> str:
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, date):
            value = value.isoformat()
        return json.dumps(value, ensure_ascii=False)

    def part(name: str, value: Any) -> str:
        if value is None:
            return f"`{name}` is missing"
        if isinstance(value, (list, tuple, set, frozenset)):
            return f"`{name}` in ({', '.join(map(literal, value))})"
        return f"`{name}` == {literal(value)}"

    return " and ".join(part(name, value) for name, value in where.items())
