"""Reports of audits in SARIF 2.1.0, the format in which code scanning takes its results."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from musigma import __version__
from musigma.audit.findings import CODES, AuditReport, Code
from musigma.files import finite

__all__ = ["to_sarif"]

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
LEVELS = {"bug": "error", "warning": "warning", "incomplete": "note"}
FIELD = re.compile(r"{(\w+)[^}]*}")
INCOMPLETE = Code("an essential part was not examined", {})


def to_sarif(report: AuditReport, *, where: str = "", allow: Iterable[str] = ()) -> dict[str, Any]:
    """A report as a SARIF log: an error for each bug, a warning, or a note for what is missing.

    Paths of files below the working directory are relative to it.

    Args:
        report: The report.
        where: The line for findings whose own line is not known, such as that of the audited
            object: "path/model.py:41".
        allow: Codes whose results are marked as suppressed.

    Returns:
        The log as JSON values.

    Example:
        >>> report = AuditReport("VAE", missing=("the KL: no loss was given",))
        >>> log = to_sarif(report, where="model.py:12")
        >>> [(r["ruleId"], r["level"]) for r in log["runs"][0]["results"]]
        [('incomplete', 'note')]
    """
    found = [(f.code, f.severity, f"{f.message}\nRepair: {f.repair}.", f) for f in report.findings]
    found += [("incomplete", "incomplete", f"Not examined: {m}", None) for m in report.missing]
    codes = list(dict.fromkeys(code for code, *_ in found))
    allow, results = set(allow), []
    for code, severity, text, finding in found:
        result: dict[str, Any] = {
            "ruleId": code,
            "ruleIndex": codes.index(code),
            "level": LEVELS[severity],
            "message": {"text": f"{report.subject}: {text}"},
        }
        own = finding.where if finding else _line_in(text, where)
        if location := _location(own or where):
            result["locations"] = [location]
        if finding and finding.numbers:
            result["properties"] = {"numbers": finite(dict(finding.numbers))}
        if code in allow:
            result["suppressions"] = [{"kind": "external", "justification": "allowed"}]
        results.append(result)
    driver = {"name": "musigma", "version": __version__, "rules": [_rule(code) for code in codes]}
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(code: str) -> dict[str, Any]:
    """The description of a code, with its page and its repairs."""
    row, page = CODES.get(code, INCOMPLETE), f"docs/findings/{code}.md"
    if row is INCOMPLETE:
        page = "docs/audit.md"
    repairs = [FIELD.sub(r"<\1>", message.repair) for message in row.variants.values()]
    lines = [f"Repair: {repair}." for repair in dict.fromkeys(repairs)]
    return {
        "id": code,
        "shortDescription": {"text": row.title},
        "fullDescription": {"text": f"{row.title[0].upper()}{row.title[1:]}."},
        "help": {"text": "\n".join([f"{row.title}; see {page} of musigma.", *lines])},
    }


def _line_in(text: str, where: str) -> str:
    """The line of code that a text names, perhaps without the folder, which `where` has."""
    found, near = re.search(r"([^\s()]+\.py):(\d+)", text), where.rpartition(":")[0]
    if found is None:
        return ""
    return f"{near}:{found[2]}" if Path(near).name == found[1] else found[0]


def _location(where: str) -> dict[str, Any] | None:
    """A line "path/model.py:41" as a location; None if there is none."""
    file, _, line = where.rpartition(":")
    if not (file and line.isdecimal()):
        return None
    path, root = Path(file).resolve(), Path.cwd().resolve()
    artifact = {"uri": path.as_uri()}
    if path.is_relative_to(root):
        artifact = {"uri": quote(path.relative_to(root).as_posix()), "uriBaseId": "%SRCROOT%"}
    region = {"startLine": max(int(line), 1)}
    return {"physicalLocation": {"artifactLocation": artifact, "region": region}}
