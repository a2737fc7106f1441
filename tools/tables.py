"""Put stored figures into the tables of the documentation: `python -m tools.tables`.

A table is found by its header. A row whose first cells are in the file gets the figures of the
file; its further cells, and rows that are not in the file, stay. `--check` only reports tables
that differ.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"

Row = Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of a page, and the file that its figures come from."""

    page: str
    header: str
    store: str
    rows: Callable[[Any], Iterator[tuple[Row, Row]]]
    """The first cells of each row, by which it is found, and the cells after them."""

    def filled(self, text: str) -> str:
        """The page with the figures of the file.

        Raises:
            ValueError: If the page lacks the table or a row.
        """
        stored = json.loads((DOCS / self.store).read_text(encoding="utf-8"))
        lines = text.splitlines()
        if self.header not in lines:
            raise ValueError(f"{self.page}: there is no table with the header {self.header}")
        start = end = lines.index(self.header) + 2
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        for key, figures in self.rows(stored):
            begin = f"| {' | '.join(key)} |"
            (at, *more) = [i for i in range(start, end) if lines[i].startswith(begin)] or [-1]
            if at < 0 or more:
                raise ValueError(f"{self.page}: expected one row that begins with {begin}")
            rest = lines[at][len(begin) :].split("|")[len(figures) : -1]
            lines[at] = begin + "".join(f" {cell} |" for cell in figures)
            lines[at] += "".join(f"{cell}|" for cell in rest)
        return "\n".join(lines) + "\n"


def five_minutes(stored: Any) -> Iterator[tuple[Row, Row]]:
    for run in stored["runs"]:
        figure = f"{run['bits_per_dim']:.3f} ± {run['standard_error']:.3f}"
        yield (run["data"], run["architecture"]), (figure, f"{run['steps']:,}")


def long_runs(stored: Any) -> Iterator[tuple[Row, Row]]:
    by = {(run["architecture"], run["precision"]): run for run in stored}
    for name in dict.fromkeys(run["architecture"] for run in stored):
        runs = by[name, "fp32"], by[name, "bf16"]
        error = runs[0]["round_trip"]
        yield (
            (name,),
            (
                *(f"{run['nats']:.1f}" for run in runs),
                str(sum(run["not_finite"] + run["non_finite_test_examples"] for run in runs)),
                str(sum(run["skipped_as_too_long"] for run in runs)),
                "" if error is None else f"{error:.1g}",
            ),
        )


WAYS = {"file": "each a file", "tile": "one picture of all", "archive": "bytes in a row"}
SETS = {
    "mnist": "MNIST",
    "mnist-binarized": "MNIST, binarized",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10, from JPEG",
}


def codecs(stored: Any) -> Iterator[tuple[Row, Row]]:
    sets = [stored["general"][name] for name in SETS]
    best = [min(codec["bits_per_dim"] for codec in of.values()) for of in sets]
    ours = {run["set"] for run in stored["ours"].values()}  # better than every codec
    for name, first in sets[0].items():
        label = first["codec"].replace("optimize", "optimized")
        if first["n"] < 10_000:
            label += f" ({first['n']:,} images)"
        cells = []
        for of, least, which in zip(sets, best, SETS, strict=True):
            bits = of[name]["bits_per_dim"]
            bold = bits == least and which not in ours
            cells.append(f"**{bits:.3f}**" if bold else f"{bits:.3f}")
        yield (label, WAYS[first["way"]]), cells


def archives(stored: Any) -> Iterator[tuple[Row, Row]]:
    for run in stored["all"].values():
        yield (
            (SETS[run["set"]], run["numerics"]),
            (
                *(f"{run[name]:,}" for name in ("n", "raw_bytes", "data_bytes")),
                *(f"{run[name]:.4f}" for name in ("net_bits_per_dim", "file_bits_per_dim")),
                *(f"{run[name]:.0f}" for name in ("write_seconds", "read_seconds")),
            ),
        )


TABLES = (
    Table(
        "figures.md",
        "| data | architecture | bits/dim (test) | steps |",
        "figures/five-minutes.json",
        five_minutes,
    ),
    Table(
        "figures.md",
        "| architecture | nats, fp32 | nats, bf16 | not finite | skipped | round trip, fp32 |",
        "figures/long-runs.json",
        long_runs,
    ),
    Table(
        "compression.md",
        f"| codec | images | {' | '.join(SETS.values())} |",
        "figures/compression.json",
        codecs,
    ),
    Table(
        "compression.md",
        "| set | numerics | images | bytes before | bytes after | net | file "
        "| write, s | read, s |",
        "figures/compression.json",
        archives,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="Only report tables that differ.")
    check = parser.parse_args().check
    stale = []
    for table in TABLES:
        page = DOCS / table.page
        text = page.read_text(encoding="utf-8")
        if (filled := table.filled(text)) != text:
            stale.append(f"{table.page}: the figures of {table.store} differ")
            if not check:
                page.write_text(filled, encoding="utf-8")
    sys.exit("\n".join(stale) if check and stale else None)


if __name__ == "__main__":
    main()
