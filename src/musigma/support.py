"""The set in which a vector lies: boxes, half-lines, simplices and ordered vectors."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Part", "Support"]

FEWEST = 1024
"""float32 values that an interval must hold, at least."""
RULES = ("positive", "simplex", "ordered")


class Part(NamedTuple):
    """A factor of a support: the elements of a vector that are constrained together.

    Attributes:
        elements: Their positions, in order.
        low: The least value, which is allowed; -inf if there is none.
        high: The largest value, which is allowed; inf if there is none.
        simplex: Whether they are not negative and sum to 1. Otherwise each is at least as large
            as the one before, if there are several.
    """

    elements: tuple[int, ...]
    low: float
    high: float
    simplex: bool = False

    @property
    def freedom(self) -> int:
        """Degrees of freedom."""
        return len(self.elements) - self.simplex


@dataclass(frozen=True)
class Support:
    """A product of intervals, half-lines, real lines, simplices and ordered vectors.

    Borders belong to it. It is plain data, stored in a model.

    Args:
        low: Least value of each of D elements; -inf (or None) where there is none.
        high: Largest value of each element; inf (or None) where there is none.
        simplex: Groups of positions whose elements are at least 0 and sum to 1.
        ordered: Groups of positions whose elements do not decrease, between bounds that all of
            them share.

    Raises:
        ValueError: If these disagree; all faults are named.

    Example:
        >>> support = Support([0, -1, None], [1, 1, None])
        >>> support.inside(np.array([[0.5, 0.0, 9.0], [1.5, 0.0, 9.0]]))
        array([[ True,  True,  True],
               [False,  True,  True]])
        >>> Support.from_json(support.to_json()) == support
        True
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    simplex: tuple[tuple[int, ...], ...] = ()
    ordered: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        set_ = object.__setattr__
        for name, default in (("low", -math.inf), ("high", math.inf)):
            values = (default if v is None else float(v) for v in getattr(self, name))
            set_(self, name, tuple(values))
        for name in ("simplex", "ordered"):
            set_(self, name, tuple(tuple(map(int, group)) for group in getattr(self, name)))
        if len(self.low) != len(self.high):
            raise ValueError(f"high: expected {len(self.low)} values; got {len(self.high)}")
        faults = self._faults()
        for group in () if faults else self.simplex:
            for name, value in (("low", 0.0), ("high", 1.0)):
                values = list(getattr(self, name))
                for j in group:
                    values[j] = value
                set_(self, name, tuple(values))
        if faults:
            raise ValueError("support: " + "; ".join(faults))

    def _faults(self) -> list[str]:
        """What is wrong with the bounds and groups."""
        faults = [
            f"element {j}: {fault}"
            for j, (low, high) in enumerate(zip(self.low, self.high, strict=True))
            if (fault := _interval_fault(low, high))
        ]
        seen: set[int] = set()
        for name in ("simplex", "ordered"):
            for group in getattr(self, name):
                if len(group) < 2:
                    faults.append(f"{name}: expected groups of 2 or more; got {list(group)}")
                if unknown := [j for j in group if not 0 <= j < len(self.low)]:
                    faults.append(f"{name}: there are {len(self.low)} elements; got {unknown}")
                    continue
                if len(set(group)) < len(group) or seen & set(group):
                    faults.append(f"{name}: an element of {list(group)} is in two places")
                seen |= set(group)
                bounds = {(self.low[j], self.high[j]) for j in group}
                if name == "ordered" and len(bounds) > 1:
                    faults.append(f"ordered: the elements of {list(group)} have different bounds")
                if name == "simplex" and bounds - {(-math.inf, math.inf), (0.0, 1.0)}:
                    faults.append(f"simplex: elements of {list(group)} have bounds of their own")
        return faults

    def __len__(self) -> int:
        return len(self.low)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The factors, in the order of their first elements."""
        grouped = {j for group in (*self.simplex, *self.ordered) for j in group}
        groups = [(group, True) for group in self.simplex]
        groups += [(group, False) for group in self.ordered]
        groups += [((j,), False) for j in range(len(self)) if j not in grouped]
        return tuple(
            Part(group, self.low[group[0]], self.high[group[0]], simplex)
            for group, simplex in sorted(groups)
        )

    @property
    def freedom(self) -> int:
        """Degrees of freedom: one per element, less one for each simplex."""
        return len(self) - len(self.simplex)

    @functools.cached_property
    def limits(self) -> np.ndarray:
        """Both bounds, and both rounded to float32, float64 (4, D)."""
        both = np.array([self.low, self.high])
        return np.concatenate([both, both.astype(np.float32)])

    def inside(self, x: Any, limits: Any = None) -> Any:
        """Whether each element of rows (N, D) is where it may be, given the others, bool (N, D).

        A bound rounded to float32 counts as the bound. If a simplex does not sum to 1 within the
        rounding of float32, its first element is not inside.

        Args:
            x: float64, a NumPy array or a tensor.
            limits: `limits` as an array of the same kind; by default of NumPy.
        """
        low, high, low32, high32 = self.limits if limits is None else limits
        good = ((x >= low) & (x <= high)) | (x == low32) | (x == high32)
        for group in self.ordered:
            for before, after in pairwise(group):
                good[:, after] &= x[:, after] >= x[:, before]
        for group in self.simplex:
            good[:, group[0]] &= abs(x[:, list(group)].sum(1) - 1) <= tolerance(len(group))
        return good

    def expected(self, j: int, columns: Sequence[str] = ()) -> str:
        """What an element may be, in words: ``in [0, 1]``, ``at least 0``."""

        def name(i: int) -> str:
            return columns[i] if columns else str(i)

        low, high = self.low[j], self.high[j]
        for group in self.simplex:
            if j in group:
                return f"at least 0, and the sum of {', '.join(map(name, group))} 1"
        texts = []
        if math.isfinite(low) and math.isfinite(high):
            texts.append(f"in [{low:g}, {high:g}]")
        elif math.isfinite(low):
            texts.append(f"at least {low:g}")
        elif math.isfinite(high):
            texts.append(f"at most {high:g}")
        for group in self.ordered:
            if j in group[1:]:
                texts.append(f"at least {name(group[group.index(j) - 1])}")
        return " and ".join(texts) or "any number"

    def found(self, row: np.ndarray, j: int) -> str:
        """What there is in place of what is `expected`: the element, or the sum of its simplex."""
        for group in self.simplex:
            total = float(row[list(group)].sum(dtype=np.float64))
            if j == group[0] and row[j] >= 0 and abs(total - 1) > tolerance(len(group)):
                return f"the sum is {total:.9g}"
        return str(row[j])

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads back, without empty fields."""
        plain: dict[str, Any] = {
            name: [v if math.isfinite(v) else None for v in getattr(self, name)]
            for name in ("low", "high")
        }
        for name in ("simplex", "ordered"):
            if groups := getattr(self, name):
                plain[name] = [list(group) for group in groups]
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Support:
        """Read what `to_json` made."""
        return cls(**plain)

    @classmethod
    def parse(cls, plain: Mapping[str, Any], columns: Sequence[str]) -> Support:
        """The support that a file of bounds describes, for columns of these names.

        Columns that it does not name are any real numbers.

        Args:
            plain: ``bounds`` maps names to [low, high]; ``positive`` lists names; ``simplex`` and
                ``ordered`` list groups of names. These three may also stand within ``bounds``.
            columns: The names of the columns, in order.

        Raises:
            ValueError: Naming all faults, one a line.

        Example:
            >>> plain = {"bounds": {"a": [0, 1]}, "positive": ["s"], "simplex": [["p", "q"]]}
            >>> Support.parse(plain, ["a", "s", "p", "q"]).to_json()
            {'low': [0.0, 0.0, 0.0, 0.0], 'high': [1.0, None, 1.0, 1.0], 'simplex': [[2, 3]]}
        """
        return _Reader(columns).read(plain)

    def constraint(self) -> Any:
        """A `torch.distributions.constraints.Constraint` of event dimension 1 that this fulfills.

        ``biject_to`` and ``transform_to`` know its bijection once `musigma.layers` is imported.
        """
        return constraint_type()(self)


def tolerance(k: int) -> float:
    """How far from 1 the sum of a simplex of k elements may be, by rounding to float32."""
    return max(8, k) * 2.0**-23


def _interval_fault(low: float, high: float) -> str:
    """What is wrong with two bounds, or nothing."""
    if not low < high:
        return f"expected low < high; got [{low:g}, {high:g}]"
    if math.isfinite(low) and math.isfinite(high):
        with np.errstate(over="ignore"):
            ends = np.array([low, high], np.float32)
        if not np.isfinite(ends).all():
            return f"float32 has no {low:g} or {high:g}: change the unit"
        if np.spacing(np.abs(ends).max()) * FEWEST > high - low:
            return f"float32 has few values in [{low:g}, {high:g}]: subtract an offset"
    return ""


@functools.cache
def constraint_type() -> Any:
    """The class of `Support.constraint`; PyTorch is imported when it is first needed."""
    import torch
    from torch.distributions import constraints

    class Within(constraints.Constraint):
        """Rows in a `Support`."""

        is_discrete, event_dim = False, 1

        def __init__(self, support: Support):
            self.support = support
            super().__init__()

        def check(self, value: Any) -> Any:
            flat = value.double().reshape(-1, len(self.support))
            limits = torch.as_tensor(self.support.limits, device=value.device)
            good = self.support.inside(flat, limits).all(1)
            return good.reshape(value.shape[:-1])

        def __repr__(self) -> str:
            return f"Within({self.support})"

    return Within


class _Reader:
    """Reads a file of bounds, and collects its faults."""

    def __init__(self, columns: Sequence[str]):
        self.columns, self.faults = list(columns), []
        self.bounds: dict[int, tuple[float, float]] = {}
        self.groups: dict[str, list[tuple[int, ...]]] = {"simplex": [], "ordered": []}
        self.place: dict[int, str] = {}

    def read(self, plain: Mapping[str, Any]) -> Support:
        rules = {k: v for k, v in plain.items() if k != "bounds"}
        bounds = plain.get("bounds", {})
        if not isinstance(bounds, Mapping):
            self.faults.append(f"bounds: expected a table of name = [low, high]; got {bounds!r}")
            bounds = {}
        for key, value in bounds.items():
            if key in RULES and key not in rules and not _is_interval(value):
                rules[key] = value
            else:
                self._interval(key, value)
        for key, value in rules.items():
            if key not in RULES:
                known = ", ".join(("bounds", *RULES))
                self.faults.append(f"{key}: expected one of {known}")
            elif key == "positive" and isinstance(value, list):
                self._positive(value)
            elif not isinstance(value, list) or not all(isinstance(v, list) for v in value):
                example = '["a", "b"]' if key == "positive" else '[["a", "b"]]'
                self.faults.append(f"{key}: expected a list such as {example}; got {value!r}")
        for key in ("simplex", "ordered"):
            value = rules.get(key, [])
            for group in value if isinstance(value, list) else []:
                if isinstance(group, list):
                    self._group(key, group)
        if self.faults:
            what = f"{len(self.faults)} faults" if len(self.faults) > 1 else "1 fault"
            raise ValueError("\n  ".join([f"{what}:", *self.faults]))
        low, high = [-math.inf] * len(self.columns), [math.inf] * len(self.columns)
        for j, interval in self.bounds.items():
            low[j], high[j] = interval
        return Support(tuple(low), tuple(high), **{k: tuple(v) for k, v in self.groups.items()})

    def _find(self, where: str, name: Any) -> int | None:
        """The position of a column, which has no other rule."""
        if name not in self.columns:
            close = difflib.get_close_matches(str(name), self.columns, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"they are {_some(self.columns)}"
            self.faults.append(f"{where}: there is no column {name!r}; {hint}")
            return None
        j = self.columns.index(name)
        before = self.place.setdefault(j, where)
        if before != where and not (where.startswith("ordered") and j in self.bounds):
            self.faults.append(f"{where}: {name!r} is in {before} already")
            return None
        return j

    def _interval(self, name: str, value: Any) -> None:
        if (j := self._find("bounds", name)) is None:
            return
        if not _is_interval(value):
            self.faults.append(f"bounds: {name}: expected [low, high]; got {value!r}")
        elif fault := _interval_fault(*map(float, value)):
            self.faults.append(f"bounds: {name}: {fault}")
        else:
            self.bounds[j] = float(value[0]), float(value[1])

    def _positive(self, names: list[Any]) -> None:
        for name in names:
            if (j := self._find("positive", name)) is not None:
                self.bounds[j] = 0.0, math.inf

    def _group(self, rule: str, names: list[Any]) -> None:
        if len(names) < 2:
            self.faults.append(f"{rule}: expected groups of 2 names or more; got {names!r}")
            return
        where = f"{rule} {', '.join(map(str, names))}"
        if len(set(map(str, names))) < len(names):
            self.faults.append(f"{where}: a name is there twice")
            return
        found = [self._find(where, name) for name in names]
        group = tuple(j for j in found if j is not None)
        if len(group) < len(names):
            return
        if taken := [self.columns[j] for g in self.groups["ordered"] for j in g if j in group]:
            self.faults.append(f"{where}: {_some(taken)} is in another group")
        elif len({self.bounds.get(j) for j in group}) > 1:
            self.faults.append(f"{where}: give all of them the same bounds, or none")
        else:
            self.groups[rule].append(group)


def _is_interval(value: Any) -> bool:
    """Whether a value is two numbers."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    )


def _some(names: Sequence[str], most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest
