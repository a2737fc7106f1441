"""Bounds of log p(x) on the command line: their draws, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from musigma.cli.options import numbers
from musigma.cli.screen import count

if TYPE_CHECKING:
    from musigma.evaluation import Annealing


def draws(k: str, anneal: int | None) -> tuple[tuple[int, ...], Annealing | None]:
    """The numbers of draws that --k lists, and how --anneal moves them."""
    from musigma.evaluation import Annealing
    from musigma.evaluation.bounds import draws_of

    ks = numbers(k, "k", "numbers of draws, such as 16 or 1,10,100", least=-math.inf)
    if anneal is not None and anneal < 1:
        raise ValueError(f"anneal: expected 1 or more steps; got {anneal}")
    return draws_of(ks), None if anneal is None else Annealing(steps=anneal)


def lines(figure: Mapping[str, Any], nats_first: bool) -> Iterator[str]:
    """What a figure says of its bound, for people."""
    name, error, unit = (
        ("nats", "standard_error_nats", "nats")
        if nats_first
        else ("bits_per_dim", "standard_error", "bits/dim")
    )
    for row in figure.get("curve", ()):
        yield f"k = {row['k']:,}: {_with_error(row[name], row[error])} {unit}"
    if "ess" in figure:
        text = f"effective sample size {figure['ess']:.1f}, at least {figure['ess_lowest']:.1f}"
        moved = figure.get("acceptance", math.nan)
        yield text + ("" if math.isnan(moved) else f"; {moved:.1%} of moves accepted")
    if (gap := figure.get("gap")) is not None:
        ends = [_with_error(gap[x], gap[f"standard_error_{x}"]) for x in ("low", "high", "gap")]
        yield (
            f"log p(x) of {count(gap['n'], 'simulated example')}: from {ends[0]} to {ends[1]} "
            f"nats, gap {ends[2]}"
        )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
