"""Errors about data: a line that says what to do, and a line for each of several faults."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

SHOWN = 20  # faults named in an error
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class DataError(ValueError):
    """Data that cannot be used as they are.

    The first line of the message says what is wrong and what to do; where there are several
    faults, each has a line of its own.
    """


@contextmanager
def damage(where: str) -> Iterator[None]:
    """Turn any exception of a parser into a `DataError`."""
    try:
        yield
    except (DataError, PermissionError):
        raise
    except Exception as error:
        raise DataError(
            f"{where}: is damaged, truncated or not what its name says ({first_line(error)}): "
            "make or fetch it again"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or what the operating system says."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(text.splitlines()[0])


def printable(name: str) -> str:
    r"""A name that can be printed, and written as UTF-8, on one line.

    >>> printable("a\nb"), printable("caf\udce9"), printable("café")
    ('a\\nb', 'caf\\xe9', 'café')
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else repr(match[0])[1:-1]

    return UNPRINTABLE.sub(escape, name)


def named(names: Sequence[str], most: int = 5) -> str:
    """Names in a list, shortened if they are many.

    >>> named(["a", "b"]), named(list("abcdefg"), 3)
    ('a, b', 'a, b, c and 4 more')
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + rest


def called(columns: Sequence[str], column: int) -> str:
    """The name of a column in messages, or its number if columns have no names."""
    return f"column {columns[column]!r}" if columns else f"column {column} (from 0)"


def counted(kinds: Counter[str]) -> str:
    """The most frequent kinds with their counts.

    >>> counted(Counter(["a", "b", "b"]))
    '2 b, 1 a'
    """
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4) if count)


def listing(faults: Mapping[str, str]) -> str:
    """The first twenty faults, one a line, and the number of the others."""
    lines = [f"  {name} {faults[name]}" for name in list(faults)[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  and {len(faults) - SHOWN} more")
    return "\n".join(lines)


def all_faults(faults: Mapping[str, str], what: str, total: int, bad: int | None = None) -> str:
    """One fault in a sentence, or many in a list.

    >>> all_faults({"a.png": "is empty: remove it"}, "images", 9)
    'a.png is empty: remove it; or pass --skip-bad to leave it out'
    >>> print(all_faults({"a.png": "is empty", "b.png": "is empty"}, "images", 9))
    2 of 9 images cannot be used; repair them, or pass --skip-bad to leave them out:
      a.png is empty
      b.png is empty
    """
    if len(faults) == 1:
        ((name, reason),) = faults.items()
        return f"{name} {reason}; or pass --skip-bad to leave it out"
    return (
        f"{bad or len(faults)} of {total} {what} cannot be used; repair them, or pass --skip-bad "
        f"to leave them out:\n{listing(faults)}"
    )


def missing(what: str, package: str, extra: str) -> DataError:
    """The error about an optional library that is not installed."""
    return DataError(f"{what} needs {package}: pip install 'musigma[{extra}]'")
