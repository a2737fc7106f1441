"""Audit the training steps of released libraries.

    python -m benchmarks.wild [LIBRARY[.STEP] ...] [--json FILE] [--markdown FILE]

A library that is not installed is skipped, with a note. `--run` only takes each step and its
gradient, without an audit.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FOLDER = Path(__file__).parent


def modules(wanted: list[str]) -> Iterator[tuple[str, ModuleType | None, str]]:
    """Every library here that is wanted: its name, its module, or why that is missing."""
    for path in sorted(FOLDER.glob("[a-z]*.py")):
        if path.stem == "costs":
            continue
        if wanted and path.stem not in {w.split(".")[0] for w in wanted}:
            continue
        try:
            yield path.stem, importlib.import_module(f"benchmarks.wild.{path.stem}"), ""
        except Exception as e:  # a library may fail in any way at its import
            yield path.stem, None, f"{type(e).__name__}: {e}"


def makers(name: str, module: ModuleType, wanted: list[str]) -> dict[str, Callable[[], Any]]:
    """The functions `make_step` and `make_<name>_step` of a module, by <name>."""
    found = {
        attribute.removeprefix("make_").removesuffix("step").rstrip("_") or name: value
        for attribute, value in vars(module).items()
        if attribute.startswith("make_") and attribute.endswith("step")
    }
    only = {w.split(".")[1] for w in wanted if w.startswith(f"{name}.")}
    return {k: v for k, v in found.items() if not only or k in only}


def scalars(result: Any) -> list[torch.Tensor]:
    """The tensors in what a step returns."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        return [t for v in result.values() for t in scalars(v)]
    if isinstance(result, (tuple, list)):
        return [t for v in result for t in scalars(v)]
    return (
        [t for v in vars(result).values() for t in scalars(v)]
        if hasattr(result, "__dict__")
        else []
    )


def run(step: Callable[[], Any]) -> dict[str, Any]:
    """Take a step and its gradient once."""
    torch.manual_seed(0)
    values = [t for t in scalars(step()) if t.requires_grad]
    if values:
        sum(v.sum() for v in values).backward()
    return {
        "verdict": "ran",
        "codes": [],
        "text": f"{[round(float(v.detach().mean()), 4) for v in values]}",
    }


def audited(step: Callable[[], Any]) -> dict[str, Any]:
    """What the audit says of a step."""
    from musigma.audit import audit_step

    report = audit_step(step)
    return {
        "verdict": report.verdict,
        "codes": list(report.codes),
        "findings": [
            {"code": f.code, "severity": f.severity, "message": f.message, "where": f.where}
            for f in report.findings
        ],
        "checked": list(report.checked),
        "missing": list(report.missing),
        "unchecked": list(report.unchecked),
        "assumed": list(report.assumed),
        "text": str(report),
    }


def main() -> None:
    """Audit, print a line for each step, write the table."""
    p = argparse.ArgumentParser("python -m benchmarks.wild", description=__doc__)
    p.add_argument("wanted", nargs="*", metavar="LIBRARY[.STEP]")
    p.add_argument("--run", action="store_true", help="only take each step and its gradient")
    p.add_argument("--verbose", action="store_true", help="print each report")
    p.add_argument("--json", type=Path)
    p.add_argument("--markdown", type=Path)
    args = p.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    for name, module, why in modules(args.wanted):
        if module is None:
            print(f"{name}: skipped, {why}")
            rows.append({"library": name, "verdict": "skipped", "text": why})
            continue
        version = importlib.metadata.version(module.DISTRIBUTION)
        for step_name, maker in makers(name, module, args.wanted).items():
            began = time.perf_counter()
            try:
                row = (run if args.run else audited)(maker())
            except Exception as e:
                row = {"verdict": f"raised {type(e).__name__}", "codes": [], "text": str(e)}
                if args.verbose:
                    traceback.print_exc()
            row |= {
                "library": module.DISTRIBUTION,
                "version": version,
                "step": step_name,
                "expected": module.EXPECTED.get(step_name, ""),
                "seconds": round(time.perf_counter() - began, 2),
            }
            rows.append(row)
            print(
                f"{module.DISTRIBUTION} {version} {step_name}: {row['verdict']} "
                f"{' '.join(row['codes'])} (expected {row['expected']}) {row['seconds']} s"
            )
            if args.verbose or args.run:
                print("   ", row["text"].replace("\n", "\n    "))
            sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.markdown:
        lines = ["| library | step | verdict | codes |", "|---|---|---|---|"]
        for r in rows:
            if r["verdict"] != "skipped":
                name, codes = f"{r['library']} {r['version']}", " ".join(r["codes"])
                lines.append(f"| {name} | {r['step']} | {r['verdict']} | {codes} |")
        args.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
