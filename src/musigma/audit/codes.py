"""The codes of findings, with their titles, messages and repairs, which are in ``codes.toml``.

``docs/findings`` has a page for every code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

from musigma.files import parsed_toml

__all__ = ["CODES", "Code", "Message", "check_codes"]


class Message(NamedTuple):
    """What is wrong and what to do, as templates of `str.format` over a finding's numbers."""

    text: str
    repair: str


@dataclass(frozen=True)
class Code:
    """One kind of finding.

    Args:
        title: What it means, as in the index of ``docs/findings``.
        variants: Its messages by name; "" is the usual one.
    """

    title: str
    variants: Mapping[str, Message]


def _table() -> dict[str, Code]:
    """The rows of codes.toml."""
    rows = parsed_toml((resources.files("musigma.audit") / "codes.toml").read_text("utf-8"))
    return {
        code: Code(row.pop("title"), {name: Message(**message) for name, message in row.items()})
        for code, row in rows.items()
    }


CODES: dict[str, Code] = _table()
"""Every code, in the order of the index in ``docs/findings``."""


def check_codes(allow: Iterable[str]) -> None:
    """Refuse a name that is neither a code nor "incomplete".

    Raises:
        ValueError: If there is one.

    Example:
        >>> check_codes(["kl_scale", "incomplete"])
    """
    if unknown := [code for code in allow if code not in CODES and code != "incomplete"]:
        raise ValueError(
            f"allow: unknown code {', '.join(map(repr, unknown))}; the codes are incomplete, "
            f"{', '.join(CODES)}"
        )
