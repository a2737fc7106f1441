"""Results in sections, as text and as a page: paragraphs, tables and pictures under a title."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from musigma.report.axes import PlotsMissing
from musigma.report.html import Picture, render, themed

__all__ = ["Section", "as_page", "as_text"]

MOST_LINES = 40
"""Lines of a table in text; a page has all."""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Head and rows."""


class Section(NamedTuple):
    """A part of a result.

    Attributes:
        title: Its title.
        lines: Paragraphs.
        tables: Tables.
        pictures: Functions of a path and of whether the page is dark, by the text that says what
            they show.
    """

    title: str
    lines: Sequence[str]
    tables: Sequence[Table] = ()
    pictures: Mapping[str, Callable[[Path, bool], None]] = {}


def as_text(sections: Iterable[Section]) -> str:
    """Sections as text, without pictures; of a long table, its first rows.

    >>> table = ["name", "share"], [["a", "1 %"]]
    >>> print(as_text([Section("Shares", ["Shares of all rows."], [table])]))
    Shares
      Shares of all rows.
      name  share
      a     1 %
    """
    return "\n".join(
        line
        for title, lines, tables, _ in sections
        for line in ("", title, *(f"  {each}" for each in lines), *_aligned(tables))
    ).lstrip("\n")


def as_page(title: str, sections: Iterable[Section], footer: str = "") -> str:
    """Sections as one HTML page; without matplotlib, it says so in place of pictures."""
    found = []
    for name, lines, tables, drawn in sections:
        pictures: list[Picture] = []
        try:
            pictures = [themed(draw, alt) for alt, draw in drawn.items()]
        except PlotsMissing as error:
            lines = [*lines, f"No pictures: {error}"]
        plain = [{"head": head, "rows": rows} for head, rows in tables]
        found.append({"title": name, "text": lines, "tables": plain, "pictures": pictures})
    return render("sections.html.jinja", title=title, sections=found, footer=footer)


def _aligned(tables: Sequence[Table]) -> Iterator[str]:
    """Tables as lines of text in columns."""
    for head, rows in tables:
        cells = [head, *rows[:MOST_LINES]]
        widths = [max(len(row[j]) for row in cells) for j in range(len(head))]
        for row in cells:
            yield "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        if len(rows) > MOST_LINES:
            yield f"  and {len(rows) - MOST_LINES} more"
