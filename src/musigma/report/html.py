"""HTML pages from the templates of this package."""

from __future__ import annotations

from typing import Any

__all__ = ["render"]


def render(template: str, **values: Any) -> str:
    """Fill in a template; every value is escaped.

    Args:
        template: Its file name in `templates`.
        **values: What the template uses; `title` at least. A missing value is an error.

    Returns:
        A whole page in one file, which fetches nothing and runs no script.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("musigma.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"short": short, "plain": plain}
    return environment.get_template(template).render(values)


def plain(value: Any) -> str:
    """A value from JSON as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return f"{value:,}" if isinstance(value, int) else short(value)


def short(value: Any) -> str:
    """A number to six digits; anything else as text."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
