"""Findings, the report that holds them, and the codes that they have.

``codes.toml`` has each code's title, messages and repairs, and ``docs/findings`` a page about it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any, Literal, NamedTuple

from torch import Tensor

from musigma.files import finite, parsed_toml
from musigma.report.html import render, short

__all__ = [
    "CODES",
    "Assumed",
    "AuditError",
    "AuditReport",
    "Code",
    "Facts",
    "Failed",
    "Finding",
    "Missing",
    "Note",
    "Outcome",
    "Passed",
    "Severity",
    "Skipped",
    "bug",
    "check_codes",
    "distance",
    "has",
    "name_of",
    "warning",
]

Severity = Literal["bug", "warning"]
Verdict = Literal["correct", "warning", "incomplete", "bug"]


class AuditError(ValueError):
    """An object cannot be audited: which callable, what it did, and what was expected."""


class Message(NamedTuple):
    """What is wrong and what to do, as templates of `str.format` over a finding's numbers."""

    text: str
    repair: str


class Code(NamedTuple):
    """One kind of finding: what it means, and its messages by name; "" is the usual one."""

    title: str
    variants: Mapping[str, Message]


CODES: dict[str, Code] = {
    code: Code(row.pop("title"), {name: Message(**message) for name, message in row.items()})
    for code, row in parsed_toml(
        (resources.files("musigma.audit") / "codes.toml").read_text("utf-8")
    ).items()
}
"""Every code, in the order of the index in ``docs/findings``."""


def check_codes(allow: Iterable[str]) -> None:
    """Refuse a name that is neither a code nor "incomplete".

    Raises:
        ValueError: If there is one.

    Example:
        >>> check_codes(["kl_offset", "incomplete"])
    """
    if unknown := [code for code in allow if code not in CODES and code != "incomplete"]:
        raise ValueError(
            f"allow: unknown code {', '.join(map(repr, unknown))}; the codes are incomplete, "
            f"{', '.join(CODES)}"
        )


@dataclass(frozen=True)
class Finding:
    """One fault, or one thing to check.

    Args:
        code: One of `musigma.audit.CODES`.
        severity: "bug": a figure or a sample is wrong; "warning": it may be intended.
        message: What is wrong.
        numbers: The numbers that show it.
        repair: What to do.
        where: The line of the audited code as "path/model.py:41"; "" if it is not known.

    Raises:
        ValueError: If the code is unknown, or there is no repair.
    """

    code: str
    severity: Severity
    message: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    repair: str = ""
    where: str = ""

    def __post_init__(self):
        if self.code not in CODES:
            raise ValueError(f"code: {self.code!r} is none of musigma.audit.CODES")
        if not self.repair:
            raise ValueError(f"repair: a finding of {self.code} needs one")

    @classmethod
    def of(
        cls,
        code: str,
        severity: Severity,
        variant: str = "",
        where: str = "",
        /,
        **numbers: Any,
    ) -> Finding:
        """A finding with a message of `CODES`.

        Args:
            code: One of `musigma.audit.CODES`.
            severity: "bug" or "warning".
            variant: Which of the messages of the code.
            where: As the field; a path below the working directory becomes relative to it.
            **numbers: The fields of the message, and further numbers. A tensor holds one.

        Raises:
            KeyError: If there is no such code or message, or a field of the message is missing.
        """
        numbers = {n: v.item() if isinstance(v, Tensor) else v for n, v in numbers.items()}
        text, repair = (t.format(**numbers) for t in CODES[code].variants[variant])
        where = where.removeprefix(f"{os.getcwd()}{os.sep}")
        return cls(code, severity, text, numbers, repair, where)

    @property
    def title(self) -> str:
        """What the code means."""
        return CODES[self.code].title

    @property
    def figures(self) -> dict[str, str]:
        """The numbers as text, without words that the message or the repair has already."""
        text = f"{self.message} {self.repair}"
        said = {n for n, v in self.numbers.items() if isinstance(v, str) and v in text}
        return {n: short(v) for n, v in self.numbers.items() if n not in said}


@dataclass(frozen=True)
class Note:
    """A line of a report: what a check found that is no fault."""

    line: str


class Passed(Note):
    """What was checked and is right, with its numbers."""


class Skipped(Note):
    """What could not be checked, and why."""


class Missing(Note):
    """An essential part, such as the KL of a VAE, that was not examined, and why."""


class Failed(Missing):
    """An essential part whose examination raised an error."""


class Assumed(Note):
    """What was assumed about the object."""


@dataclass(frozen=True)
class Facts:
    """What was measured besides, as fields of `AuditReport`."""

    convention: str | None = None
    read_as: str | None = None
    layout: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


Outcome = Finding | Note | Facts
"""What a check returns. Checks are functions of a measurement; `AuditReport.of` collects them."""


def bug(code: str, variant: str = "", /, *, where: str = "", **numbers: Any) -> Finding:
    """A finding of severity "bug", by `Finding.of`."""
    return Finding.of(code, "bug", variant, where, **numbers)


def warning(code: str, variant: str = "", /, *, where: str = "", **numbers: Any) -> Finding:
    """A finding of severity "warning", by `Finding.of`."""
    return Finding.of(code, "warning", variant, where, **numbers)


def has(outcomes: Iterable[Outcome], *codes: str) -> bool:
    """Whether there is a finding with one of these codes."""
    return any(isinstance(o, Finding) and o.code in codes for o in outcomes)


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit.

    Args:
        subject: The name of the audited object.
        convention: How the sampler reads the second tensor: "log_std", "log_var", "std", …
        read_as: How the KL reads it; None without a KL.
        layout: The layout of a packed tensor; None without one.
        findings: What is wrong, bugs first.
        checked: A line for each check, with its numbers.
        unchecked: What could not be checked, and why.
        missing: Essential parts that were not examined, such as the KL of a VAE or the
            log-determinant of a flow, each with the reason.
        assumed: What was assumed about the object.
        details: Further numbers: bounds, floors, factors, conditions by layer.

    Raises:
        AuditError: If there is no finding, nothing was checked and nothing is missing, so that
            there is no verdict.

    Example:
        >>> report = AuditReport("VAE", checked=("z",), missing=("the KL: no loss was given",))
        >>> report.verdict, report.judge(allow=("incomplete",))
        ('incomplete', 'correct')
    """

    subject: str
    convention: str | None = None
    read_as: str | None = None
    layout: str | None = None
    findings: tuple[Finding, ...] = ()
    checked: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "findings", tuple(sorted(self.findings, key=_rank)))
        if not (self.findings or self.checked or self.missing):
            reasons = "; ".join(self.unchecked) or "there was nothing to check"
            raise AuditError(f"{self.subject}: nothing could be checked: {reasons}")

    @classmethod
    def of(cls, subject: str, outcomes: Iterable[Outcome]) -> AuditReport:
        """The report of what checks returned.

        Of the findings of one code and line, the first of the most severe is kept; of the lines,
        each is once; of each fact, the first.

        Example:
            >>> outcomes = [warning("free_bits", "step"), Passed("z"), Facts(convention="std")]
            >>> report = AuditReport.of("VAE", outcomes)
            >>> report.verdict, report.checked, report.convention
            ('warning', ('z',), 'std')
        """
        outcomes = list(outcomes)

        def lines(kind: type[Note]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(o.line for o in outcomes if isinstance(o, kind)))

        findings = dict[tuple[str, str], Finding]()
        found = (o for o in outcomes if isinstance(o, Finding))
        for finding in sorted(found, key=_rank):
            findings.setdefault((finding.code, finding.where), finding)
        facts, details = dict[str, str](), dict[str, Any]()
        for fact in reversed([o for o in outcomes if isinstance(o, Facts)]):
            facts |= {n: v for n, v in vars(fact).items() if isinstance(v, str)}
            details |= fact.details
        return cls(
            subject, **facts, findings=tuple(findings.values()), checked=lines(Passed),
            unchecked=lines(Skipped), missing=lines(Missing), assumed=lines(Assumed),
            details=details,
        )  # fmt: skip

    @property
    def verdict(self) -> Verdict:
        """A "bug" if a finding is one; else "incomplete" if an essential part is missing.

        Else a "warning" if there is a finding, and "correct" if there is none.
        """
        return self.judge()

    def judge(self, allow: Iterable[str] = ()) -> Verdict:
        """The verdict without the findings that are intended.

        Args:
            allow: Their codes; and "incomplete" to accept that essential parts are missing.
        """
        allow = set(allow)
        left = {finding.severity for finding in self.findings if finding.code not in allow}
        if "bug" in left:
            return "bug"
        if self.missing and "incomplete" not in allow:
            return "incomplete"
        return "warning" if left else "correct"

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings."""
        return tuple(finding.code for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return finite({"verdict": self.verdict, **asdict(self)})

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """The report as plain text."""
        lines = [f"{self.subject}: {self.verdict}", *(f"  {a}: {b}" for a, b in self._facts())]
        for finding in self.findings:
            lines += ["", f"{finding.severity} {finding.code}: {finding.message}"]
            numbers = [f"{name} {value}" for name, value in finding.figures.items()]
            lines += [f"  {', '.join(numbers)}"] if numbers else []
            lines += [f"  repair: {finding.repair}"]
            lines += [f"  where: {finding.where}"] if finding.where else []
        for title, what in self._lists():
            lines += ["", f"{title}:", *(f"  {line}" for line in what)]
        return "\n".join(lines)

    def to_html(self) -> str:
        """The report as a self-contained HTML page."""
        return render(
            "audit.html.jinja",
            title=f"Audit of {self.subject}",
            report=self,
            facts=self._facts(),
            lists=self._lists(),
        )

    def _facts(self) -> list[tuple[str, str]]:
        facts = {
            "the sampler reads the second output as": self.convention,
            "the KL reads it as": self.read_as,
            "layout": self.layout,
        }
        known = [(name, value) for name, value in facts.items() if value]
        return known + [("not examined", part) for part in self.missing]

    def _lists(self) -> list[tuple[str, tuple[str, ...]]]:
        lists = {
            "checked": self.checked,
            "could not be checked": self.unchecked,
            "assumed": self.assumed,
        }
        return [(title, what) for title, what in lists.items() if what]


def _rank(finding: Finding) -> bool:
    """Bugs before warnings."""
    return finding.severity != "bug"


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative where the values are above one."""
    a, b = a.detach().double(), b.detach().double()
    off = float(((a - b).abs() / (1 + b.abs())).max()) if a.numel() else 0.0
    return math.inf if math.isnan(off) else off


def name_of(thing: Any) -> str:
    """The name of a callable, or of an object's class."""
    return getattr(thing, "__qualname__", None) or type(thing).__name__
