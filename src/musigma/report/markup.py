"""HTML pages of one file: their style is inside, they run no script and fetch nothing.

Their content security policy says so too.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Html", "element", "join", "page", "table"]


class Html(str):
    """Text that is HTML already; any other text is escaped on its way into an element."""


def element(tag: str, *content: Any, **attributes: Any) -> Html:
    """An element; in names of attributes, _ stands for -, and a last one is dropped.

    >>> print(element("a", "R&D", " ", element("b", 1), href="#x", class_="y"))
    <a href="#x" class="y">R&amp;D <b>1</b></a>
    """
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in ("img", "source"):
        return Html(f"<{tag}{named}>")
    return Html(f"<{tag}{named}>{join(content)}</{tag}>")


def join(content: Iterable[Any]) -> Html:
    """Pieces in a row; text that is no HTML is escaped."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in content))


def page(title: str, content: Sequence[Html], footer: str) -> str:
    """A whole page, which fetches nothing and runs no script."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{element('title', title)}\n<style>{STYLE}</style>\n"
    )
    body = element(
        "main",
        element("header", element("h1", title)),
        *content,
        element("footer", footer),
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}</head>\n<body>{body}</body>\n</html>\n'
    )


def table(head: Sequence[Any], body: Iterable[Sequence[Any]], foot: Sequence[Any] = ()) -> Html:
    """A table that scrolls sideways where it is too wide."""
    parts = [
        element("thead", element("tr", *(element("th", c, scope="col") for c in head))),
        element("tbody", *(element("tr", *(element("td", c) for c in row)) for row in body)),
    ]
    if foot:
        parts.append(element("tfoot", element("tr", *(element("td", c) for c in foot))))
    return element("div", element("table", *parts), class_="scroll", tabindex="0")


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1f2328; --muted: #656d76; --line: #e6e8eb;
  --accent: #c8502d; --blue: #5b84b8; --code: #f3f4f5; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #111418; --card: #171b20; --ink: #e4e6ea; --muted: #98a0ab; --line: #2b3038;
    --accent: #f08a64; --blue: #7fa9de; --code: #1d2228; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 28px; font-weight: 650; letter-spacing: -.015em; margin: 0 0 24px; }
h2 { font-size: 21px; font-weight: 650; letter-spacing: -.01em; margin: 0;
  overflow-wrap: anywhere; }
h3 { font-size: 15px; font-weight: 600; margin: 30px 0 8px; }
h4 { font-size: 13px; font-weight: 600; margin: 0 0 6px; color: var(--muted); }
p { margin: 0; }
a { color: inherit; text-decoration-color: var(--muted); text-underline-offset: 3px; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  padding: 28px 32px 32px; margin: 0 0 24px; scroll-margin-top: 16px;
}
.overview { padding: 14px 32px; }
.subtitle, .about, .note, footer, figcaption { color: var(--muted); }
.subtitle { margin-top: 2px; overflow-wrap: anywhere; }
.note, footer, figcaption { font-size: 14px; }
.note { margin-top: 10px; }
.warning { color: var(--bad); margin-top: 6px; }
footer { padding: 4px 2px; }
.headline { margin-top: 22px; }
.figure { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 10px; line-height: 1.1; }
.figure, td, dd { font-variant-numeric: tabular-nums; }
.value { font-size: 54px; font-weight: 650; letter-spacing: -.03em; }
.unit { font-size: 22px; }
.error { font-size: 18px; color: var(--muted); }
.about { margin-top: 6px; max-width: 100ch; text-wrap: pretty; }
dl { margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
dt { color: var(--muted); font-size: 13px; }
.terms { display: flex; flex-wrap: wrap; gap: 10px 36px; margin-top: 16px; }
.panels {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 28px 36px; margin-top: 28px; align-items: start;
}
figure { margin: 0; min-width: 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: 8px; }
.pictures { columns: 2 380px; column-gap: 36px; margin-top: 28px; }
.plots { margin-top: 28px; }
.pictures figure { break-inside: avoid; padding-bottom: 22px; }
.curve img { width: 100%; } .pixels img { border-radius: 4px; }
@media (prefers-color-scheme: dark) {
  .plot img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; }
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 7px 18px 7px 0; white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
tbody tr, tfoot tr { border-top: 1px solid var(--line); }
tfoot { font-weight: 600; }
.account td:nth-child(3), .account th:nth-child(3) { text-align: right; }
.account td:nth-child(4) { width: 40%; min-width: 110px; padding-right: 0; }
.kind { color: var(--muted); }
.bar { display: block; position: relative; height: 9px; }
.bar.signed { background: linear-gradient(var(--line), var(--line)) 50% 0 / 1px 100% no-repeat; }
.bar i { position: absolute; top: 0; bottom: 0; border-radius: 2px; }
.more { background: var(--accent); } .less { background: var(--blue); }
details { margin-top: 24px; }
summary { cursor: pointer; font-size: 15px; font-weight: 600; }
details > :not(summary) { margin-top: 14px; }
.account details { margin-top: 12px; }
.account summary { font-weight: 500; font-size: 14px; color: var(--muted); }
.configuration { display: grid; gap: 24px 32px;
  grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); font-size: 14px; }
.configuration dl > div { display: flex; justify-content: space-between; gap: 16px;
  border-top: 1px solid var(--line); padding: 4px 0; }
.configuration dd { text-align: right; }
pre {
  margin: 0; padding: 14px 16px; background: var(--code); border-radius: 8px; overflow-x: auto;
  font: 13px/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (max-width: 600px) {
  main { padding: 24px 0 40px; }
  header, footer { padding: 0 18px; }
  h1 { font-size: 24px; }
  section { border-radius: 0; border-width: 1px 0; padding: 22px 18px 26px; margin-bottom: 14px; }
  .overview { padding: 8px 18px; }
  .value { font-size: 46px; }
}
"""
