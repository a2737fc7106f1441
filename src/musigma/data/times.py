"""Dates and times as text: their formats, and seconds since 1970."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

__all__ = ["DAY", "ISO", "Format", "example", "format_of", "seconds", "written"]

DAY = 86_400
EPOCH = datetime(1970, 1, 1)

# Formats of ISO 8601, which NumPy reads, and others
ISO = [
    f"%Y-%m-%d{clock}{zone}"
    for clock in ("", *(f"{t}%H:%M{s}" for t in " T" for s in ("", ":%S", ":%S.%f")))
    for zone in ("", "Z")
]
DATES = (
    *("%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y"),
    *("%d.%m.%y", "%d/%m/%y", "%m/%d/%y", "%d %b %Y", "%d-%b-%Y", "%b %d, %Y"),
    *("%d %B %Y", "%B %d, %Y"),
)
CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p")
OTHERS = [date + clock for date in DATES for clock in CLOCKS]


class Format(NamedTuple):
    """How dates, or dates with times, are written: a format of `datetime.strptime`."""

    kind: Literal["date", "datetime"]
    format: str


def format_of(texts: Sequence[str]) -> Format | None:
    """The format in which all texts are dates, if there is one.

    Raises:
        ValueError: If they are other dates with the day first than with the month first.

    >>> format_of(["2026-02-28 13:00", "2026-03-01 00:00"])
    Format(kind='datetime', format='%Y-%m-%d %H:%M')
    >>> format_of(["31/12/2026", "01/02/2027"]).format, format_of(["1", "2"])
    ('%d/%m/%Y', None)
    """
    if not texts or not any(character.isdigit() for character in texts[0]):
        return None
    fitting = [form for form in ISO if all(map(_pattern(form).fullmatch, texts))][:1]
    if fitting and np.isnan(seconds(texts, fitting[0])).any():
        return None
    if not fitting:
        fitting = [f for f in OTHERS if all(_parsed(text, f) is not None for text in texts)]
    if len(fitting) > 1:
        text = next((t for t in texts if len({_parsed(t, f) for f in fitting}) > 1), None)
        if text is not None:
            raise ValueError(
                f"holds dates such as {text!r}, which may be read in two ways ({fitting[0]} and "
                f"{fitting[1]}): give the format in a schema, or write dates as 2026-12-31"
            )
    if not fitting:
        return None
    return Format("datetime" if "%H" in fitting[0] or "%I" in fitting[0] else "date", fitting[0])


@cache
def _pattern(form: str) -> re.Pattern[str]:
    """The text of a format of ISO 8601; digits of a fraction are optional."""
    text = re.escape(form).replace("%Y", r"\d{4}").replace(r"\.%f", r"(\.\d{1,6})?")
    return re.compile(re.sub("%[a-zA-Z]", r"\\d\\d", text))


def _parsed(text: str, form: str) -> datetime | None:
    try:
        return datetime.strptime(text, form)
    except ValueError:
        return None


def seconds(texts: Sequence[str], form: str) -> np.ndarray:
    """Seconds from 1970 to each date, float64 (N,); NaN where a text does not have the format.

    >>> seconds(["1970-01-02", "2026-02-31"], "%Y-%m-%d").tolist()
    [86400.0, nan]
    """
    if form in ISO:
        fits = np.array(list(map(_pattern(form).fullmatch, texts)), bool)
        found = [text.rstrip("Z") for text, fit in zip(texts, fits, strict=True) if fit]
        try:
            x = np.full(len(texts), np.nan)
            x[fits] = np.array(found, "datetime64[us]").astype(np.int64) / 1e6
            return x
        except ValueError:
            pass  # one of them is no day of the calendar
    days = [_parsed(text, form) or _parsed(text, form.replace(".%f", "")) for text in texts]
    return np.array([np.nan if d is None else (d - EPOCH).total_seconds() for d in days])


def written(x: np.ndarray, form: str) -> list[str | None]:
    """Seconds since 1970 as text, None where they are NaN.

    >>> written(np.array([86400.0, np.nan]), "%d.%m.%Y")
    ['02.01.1970', None]
    """
    days = [None if np.isnan(s) else EPOCH + timedelta(seconds=s) for s in x.tolist()]
    form = form.replace("%Y", "{:04}") if "%Y" in form else form
    return [None if d is None else d.strftime(form).format(d.year) for d in days]


def example(form: str) -> str:
    """The last day of 2026 in a format."""
    return datetime(2026, 12, 31, 17, 30).strftime(form)
