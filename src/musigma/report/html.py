"""HTML pages from the templates of this package."""

from __future__ import annotations

import base64
import shlex
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from musigma.files import number

__all__ = ["Picture", "picture", "render", "themed"]


class Picture(NamedTuple):
    """An image as a data URL, for light and for dark pages."""

    alt: str
    light: str
    dark: str | None
    width: int
    height: int


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
    environment.filters |= {"short": short, "plain": plain, "duration": duration}
    environment.filters |= {"number": number, "quoted": lambda value: shlex.quote(str(value))}
    return environment.get_template(template).render(values)


def plain(value: Any) -> str:
    """A value from JSON as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return f"{value:,}" if isinstance(value, int) else short(value)


def duration(seconds: float) -> str:
    """Seconds as text, in suitable units.

    >>> duration(42.3), duration(300.5), duration(8100)
    ('42 s', '5 min', '2 h 15 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def short(value: Any) -> str:
    """A number to six digits; anything else as text."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def picture(png: Path, alt: str, *, density: int, dark: Path | None = None) -> Picture:
    """A PNG file with `density` pixels to one pixel of the page."""
    content = png.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        raise ValueError(f"runs: {png} is not a PNG file")
    width, height = struct.unpack(">II", content[16:24])
    dark_url = None if dark is None else _url(dark.read_bytes())
    return Picture(alt, _url(content), dark_url, round(width / density), round(height / density))


def _url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def themed(draw: Callable[[Path, bool], None], alt: str) -> Picture:
    """A picture that `draw` writes to a path twice: for light pages, and (True) for dark ones."""
    with tempfile.TemporaryDirectory() as folder:
        light, dark = (Path(folder) / f"{name}.png" for name in ("light", "dark"))
        draw(light, False)
        draw(dark, True)
        return picture(light, alt, density=2, dark=dark)
