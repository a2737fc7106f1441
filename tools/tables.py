"""Put stored figures into the tables of the documentation: `python -m tools.tables`.

A table is found by its header. A row whose first cells are in a file gets the figures of the file;
its further cells, and rows that are in no file, stay. A row that the table lacks is added after
the one before it in the file. `--check` only reports tables that differ.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"

Row = Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of a page, and the files that its figures come from."""

    page: str
    header: str
    stores: Sequence[str]
    rows: Callable[..., Iterator[tuple[Row, Row]]]
    """Of what the files hold: the first cells of each row, by which it is found, and the next."""

    def filled(self, text: str) -> str:
        """The page with the figures of the files.

        Raises:
            ValueError: If the page lacks the table, or has a row twice.
        """
        stored = [json.loads((DOCS / file).read_text(encoding="utf-8")) for file in self.stores]
        lines = text.splitlines()
        if self.header not in lines:
            raise ValueError(f"{self.page}: there is no table with the header {self.header}")
        width = self.header.count("|") - 1
        start = end = lines.index(self.header) + 2
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        after = start
        for key, figures in self.rows(*stored):
            begin = f"| {' | '.join(key)} |"
            found = [i for i in range(start, end) if lines[i].startswith(begin)]
            if len(found) > 1:
                raise ValueError(f"{self.page}: expected one row that begins with {begin}")
            if not found:
                lines.insert(after, begin + " |" * (width - len(key)))
                found, end = [after], end + 1
            (at,) = found
            rest = lines[at][len(begin) :].split("|")[len(figures) : -1]
            lines[at] = begin + "".join(f" {cell} |" for cell in figures)
            lines[at] += "".join(f"{cell}|" for cell in rest)
            after = at + 1
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


PEERS = {"pythae on mnist": "pythae's VAE, residual networks, 16 latents, on binarized MNIST"}


def quality(stored: Any) -> Iterator[tuple[Row, Row]]:
    yield from _own(stored, 2)


def quality_of_one_core(stored: Any) -> Iterator[tuple[Row, Row]]:
    yield from _own(stored, 1)


def _own(stored: Any, cores: int) -> Iterator[tuple[Row, Row]]:
    for run in stored.values():
        if run["run"] not in PEERS and run.get("cores", 2) == cores:
            name = f"`{run['run'].removeprefix('musigma train ')}`"
            yield (name, str(run["minutes"])), (f"{run['steps']:,}", _tested(run))


def quality_of_peers(stored: Any) -> Iterator[tuple[Row, Row]]:
    for run in stored.values():
        if run["run"] in PEERS:
            key = PEERS[run["run"]], str(run["minutes"])
            yield key, (f"{run['steps']:,}", _tested(run))


def _tested(run: Any) -> str:
    """Bounds of images with one bit; bits per dimension of others."""
    bounds = {name: f"{nats:.1f}" for name, nats in run.get("bounds, nats", {}).items()}
    if not bounds:
        test = run["test"]
        return f"{test['bits_per_dim']:.3f} ± {test['standard_error']:.3f} bits/dim"
    elbo, first, iw = (
        bounds[f"{name} images"] for name in ("1 draws, 10,000", "1 draws, 500", "1000 draws, 500")
    )
    return f"ELBO {elbo} nats, {first} (the first 500); IW-1000 {iw} (the first 500)"


def codecs(stored: Any) -> Iterator[tuple[Row, Row]]:
    sets = [stored["general"][name] for name in SETS]
    best = [min(codec["bits_per_dim"] for codec in of.values()) for of in sets]
    ours: dict[str, float] = {}  # the best of each set
    for run in stored["ours"].values():
        bits = run["net_bits_per_dim"]
        ours[run["set"]] = min(bits, ours.get(run["set"], bits))
    for name, first in sets[0].items():
        label = first["codec"].replace("optimize", "optimized")
        if first["n"] < 10_000:
            label += f" ({first['n']:,} images)"
        cells = []
        for of, least, which in zip(sets, best, SETS, strict=True):
            bits = of[name]["bits_per_dim"]
            bold = bits == least < ours.get(which, math.inf)
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


def binarized_mnist(stored: Any) -> Iterator[tuple[Row, Row]]:
    for run in stored:
        yield (
            (run["name"], run["kind"]),
            (
                f"{run['parameters']:,}",
                f"{run['steps']:,}",
                f"{run['elbo']:.2f}",
                f"{run['iw-1000']:.2f} ± {run['error']:.2f}",
                f"{run['images']:,}",
            ),
        )


METRICS = {
    "mig": "MIG",
    "sap": "SAP",
    "disentanglement": "disentanglement",
    "factor_score": "FactorVAE",
    "modularity": "modularity",
    "bits_per_dim": "bits/dim",
}


def disentanglement(stored: Any) -> Iterator[tuple[Row, Row]]:
    for objective in dict.fromkeys(run["objective"] for run in stored):
        runs = [run for run in stored if run["objective"] == objective]
        cells = [str(len(runs))]
        for name in METRICS:
            values = [run[name] for run in runs]
            cells.append(f"{mean(values):.3f} ± {error_of_mean(values):.3f}")
        yield (f"`{objective}`",), cells


TABLES_OF_FAMILIES = ("breast-cancer", "diamonds", "bikeshare", "randhie", "shuttle", "wage")


def families(stored: Any) -> Iterator[tuple[Row, Row]]:
    nats = {(run["set"], run["seed"], run["name"]): run["nats"] for run in stored}
    names = [*dict.fromkeys(run["name"] for run in stored)]
    seeds = sorted({run["seed"] for run in stored})

    def cell(of: str, name: str) -> str:
        sign = "" if name == names[0] else "+"
        gaps = [
            nats[of, seed, name] - (nats[of, seed, names[0]] if sign else 0)
            for seed in seeds
            if {(of, seed, name), (of, seed, names[0])} <= nats.keys()
        ]
        some = "" if len(gaps) == len(seeds) else f" ({len(gaps)})"
        return f"{mean(gaps):{sign}.2f} ± {error_of_mean(gaps):.2f}{some}"

    for name in names:
        yield (name,), [cell(of, name) for of in TABLES_OF_FAMILIES]


def color_set(stored: Any, files: Any) -> Iterator[tuple[Row, Row]]:
    ours = {run["run"]: run for run in files["ours"].values()}
    for run in stored:
        file = ours[f"color-set/{run['name']}"]
        yield (
            (run["name"],),
            (
                f"{run['parameters']:,}",
                f"{run['steps']:,}",
                f"{run['bits_per_dim']:.3f} ± {run['standard_error']:.3f}",
                f"{file['net_bits_per_dim']:.4f}",
                f"{file['model_bits_per_dim']:.4f}",
                f"{file['n']}",
            ),
        )


PAIRS = ("fashion", "mnist", "color", "gray")


def strange_images(stored: Any) -> Iterator[tuple[Row, Row]]:
    names = {"glow": "Glow", "vae": "VAE"}
    found = {(r["model"], r["detector"], r["set"]): r["auroc"] for r in stored}
    for model, detector in sorted({key[:2] for key in found}):
        cells = [found.get((model, detector, pair)) for pair in PAIRS]
        yield (
            (names[model], f"`{detector.replace('_', '-')}`"),
            ["-" if c is None else "{:.3f} ({:.3f}–{:.3f})".format(*c) for c in cells],
        )


def error_of_mean(values: Sequence[float]) -> float:
    """The standard error of the mean of independent values; NaN of one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


TABLES = (
    Table(
        "figures.md",
        "| data | architecture | bits/dim (test) | steps |",
        ["figures/five-minutes.json"],
        five_minutes,
    ),
    Table(
        "figures.md",
        "| architecture | nats, fp32 | nats, bf16 | not finite | skipped | round trip, fp32 |",
        ["figures/long-runs.json"],
        long_runs,
    ),
    Table(
        "figures.md",
        "| model | binarized | parameters | steps | -ELBO | IW-1000 | images | published |",
        ["figures/binarized-mnist.json"],
        binarized_mnist,
    ),
    Table(
        "figures.md",
        "| run | minutes | steps | test | goal | reached |",
        ["figures/quality.json"],
        quality,
    ),
    Table(
        "figures.md",
        "| run on one core | minutes | steps | test | goal | reached |",
        ["figures/quality.json"],
        quality_of_one_core,
    ),
    Table(
        "figures.md",
        "| library | minutes | steps | test | musigma |",
        ["figures/quality.json"],
        quality_of_peers,
    ),
    Table(
        "figures.md",
        "| model | parameters | steps | bits/dim | in files | the model's figure for those | "
        "images in files |",
        ["figures/color-set.json", "figures/compression.json"],
        color_set,
    ),
    Table(
        "anomalies.md",
        "| model | score | Fashion-MNIST → MNIST | MNIST → Fashion-MNIST | color → gray "
        "| gray → color |",
        ["figures/strange-images.json"],
        strange_images,
    ),
    Table(
        "families.md",
        f"| | {' | '.join(TABLES_OF_FAMILIES)} |",
        ["figures/families.json"],
        families,
    ),
    Table(
        "objectives.md",
        f"| objective | seeds | {' | '.join(METRICS.values())} |",
        ["figures/disentanglement.json"],
        disentanglement,
    ),
    Table(
        "compression.md",
        f"| codec | images | {' | '.join(SETS.values())} |",
        ["figures/compression.json"],
        codecs,
    ),
    Table(
        "compression.md",
        "| set | numerics | images | bytes before | bytes after | net | file "
        "| write, s | read, s |",
        ["figures/compression.json"],
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
            stale.append(f"{table.page}: the figures of {' and '.join(table.stores)} differ")
            if not check:
                page.write_text(filled, encoding="utf-8")
    sys.exit("\n".join(stale) if check and stale else None)


if __name__ == "__main__":
    main()
