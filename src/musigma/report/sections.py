"""Results in sections: paragraphs, tables and pictures under a title, as text and as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from musigma.files import replacing
from musigma.report.axes import PlotsMissing
from musigma.report.html import Picture, render, themed

__all__ = ["SUFFIXES", "Document", "Section"]

SUFFIXES = (".html", ".md", ".tex")
"""Suffixes of the files that a document can be written to."""

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


@dataclass(frozen=True)
class Document:
    r"""A result in sections, as text and as a file of several forms.

    Attributes:
        title: What all of it is about.
        sections: The sections, in order.
        footer: What belongs to all of them, below a page.

    Example:
        >>> table = ["name", "share"], [["a_1", "1 %"]]
        >>> found = Document("Shares", [Section("Rows", ["All rows."], [table])])
        >>> print(found)
        Rows
          All rows.
          name  share
          a_1   1 %
        >>> print(found.to_latex().splitlines()[-2])
        a\_1 & 1 \% \\
    """

    title: str
    sections: Sequence[Section]
    footer: str = ""

    def write(self, path: Path) -> None:
        """Write a file whose suffix, one of `SUFFIXES`, is the form."""
        forms = {".html": self.to_html, ".md": self.to_markdown, ".tex": self.to_latex}
        with replacing(path) as draft:
            draft.write_text(forms[path.suffix](), encoding="utf-8")

    def __str__(self) -> str:
        """All as text, without pictures; of a long table, its first rows."""
        return "\n".join(
            line
            for title, lines, tables, _ in self.sections
            for line in ("", title, *(f"  {each}" for each in lines), *_aligned(tables))
        ).lstrip("\n")

    def to_html(self) -> str:
        """One page with pictures; without matplotlib, it says so in place of them."""
        found = []
        for name, lines, tables, drawn in self.sections:
            pictures: list[Picture] = []
            try:
                pictures = [themed(draw, alt) for alt, draw in drawn.items()]
            except PlotsMissing as error:
                lines = [*lines, f"No pictures: {error}"]
            plain = [{"head": head, "rows": rows} for head, rows in tables]
            found.append({"title": name, "text": lines, "tables": plain, "pictures": pictures})
        return render("sections.html.jinja", title=self.title, sections=found, footer=self.footer)

    def to_markdown(self) -> str:
        """Sections with tables of Markdown, without pictures."""
        blocks = [f"# {_marked(self.title)}"]
        for title, lines, tables, _ in self.sections:
            blocks += [f"## {_marked(title)}", *map(_marked, lines)]
            for head, rows in tables:
                top, *cells = (f"| {' | '.join(map(_marked, row))} |" for row in [head, *rows])
                blocks.append("\n".join([top, f"|{'---|' * len(head)}", *cells]))
        return "\n\n".join([*blocks, *([_marked(self.footer)] if self.footer else [])]) + "\n"

    def to_latex(self) -> str:
        """A fragment of LaTeX that needs no package, without pictures."""
        blocks = [f"% {self.title}"]
        for title, lines, tables, _ in self.sections:
            blocks += [rf"\subsection*{{{_escaped(title)}}}", *map(_escaped, lines)]
            for head, rows in tables:
                top, *cells = (f"{' & '.join(map(_escaped, row))} \\\\" for row in [head, *rows])
                begin = rf"\begin{{tabular}}{{{'l' * len(head)}}}"
                blocks.append("\n".join([begin, top, r"\hline", *cells, r"\end{tabular}"]))
        return "\n\n".join([*blocks, *([_escaped(self.footer)] if self.footer else [])]) + "\n"


_LATEX = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"}
    | {c: f"${m}$" for c, m in {"±": r"\pm", "−": "-", "<": "<", ">": ">", "≤": r"\le"}.items()}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)


def _escaped(text: str) -> str:
    return text.translate(_LATEX)


def _marked(text: str) -> str:
    """Text for Markdown, in which no character has a meaning of its own."""
    return "".join(f"\\{c}" if c in r"\`*_[]<>|#" else c for c in text)


def _aligned(tables: Sequence[Table]) -> Iterator[str]:
    """Tables as lines of text in columns."""
    for head, rows in tables:
        cells = [head, *rows[:MOST_LINES]]
        widths = [max(len(row[j]) for row in cells) for j in range(len(head))]
        for row in cells:
            yield "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        if len(rows) > MOST_LINES:
            yield f"  and {len(rows) - MOST_LINES} more"
