"""Hooks of MkDocs: what the site has besides docs/*.md.

- The front page is the README, with its links moved.
- A file outside docs/ that a page links to becomes a page too, under files/.
- Each public module becomes a page of the reference, under reference/. It is read, not imported.
- A folder in the navigation stands for its pages.
- Formulas between dollars become MathML, which browsers draw without scripts or fonts.
- A page that would load anything from another host is refused.
"""

import ast
import html
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "musigma"

LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
CODE = re.compile(r"(```.*?```)", re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
LOADED = re.compile(
    r"<(?:script|img|iframe|link(?! rel=.canonical))[^>]*(?:src|href)=.?https?://[^>]*>"
)
INTERNAL = {"cli", "explore", "files", "frames", "memory", "named", "schema", "tensors"}
"""Modules that only the library itself uses."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page, the files that pages link to, and the reference."""
    pages = {"index.md": ROOT / "README.md"}
    waiting = [ROOT / "README.md", *DOCS.rglob("*.md")]
    while waiting:
        page = waiting.pop()
        for target in sorted(outside(page)):
            name = place(target).as_posix()
            if name not in pages:
                pages[name] = target
                waiting += [target] if target.suffix == ".md" else []
    for name, path in pages.items():
        files.append(File.generated(config, name, content=as_page(path, DOCS / name)))
    for name, content in reference().items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    config.nav = expanded(config.nav, sorted(file.src_uri for file in files.documentation_pages()))
    return files


def expanded(nav: Any, pages: list[str]) -> Any:
    """A navigation in which each `folder/` is the list of its pages, README.md first."""
    if isinstance(nav, str):
        return [page for page in pages if page.startswith(nav)] if nav.endswith("/") else nav
    if isinstance(nav, dict):
        return {title: expanded(entry, pages) for title, entry in nav.items()}
    return [expanded(entry, pages) for entry in nav]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links of the pages in docs/ to the pages made here."""
    path = DOCS / page.file.src_uri
    return moved(markdown, path, path) if path.exists() else markdown


def on_page_content(html_text: str, **_: Any) -> str:
    """Formulas as MathML."""
    return FORMULA.sub(lambda found: mathml(found[2], found[1]), html_text)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse what a browser would fetch elsewhere."""
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output


def mathml(formula: str, tag: str) -> str:
    r"""MathML of what arithmatex leaves: `\(...\)` inside of a span, `\[...\]` inside of a div."""
    text = html.unescape(formula).strip()[2:-2]
    return convert(text, display="inline" if tag == "span" else "block")


def outside(page: Path) -> set[Path]:
    """The files of the repository outside docs/ that a page links to."""
    if page.suffix != ".md":
        return set()
    found = {target(page, link) for link in LINK.findall(page.read_text(encoding="utf-8"))}
    return {path for path in found if path.is_file() and DOCS not in path.parents}


def target(page: Path, link: str) -> Path:
    return Path(os.path.normpath(page.parent / link))


def place(path: Path) -> Path:
    """Where a file outside docs/ is in the site: `files/examples/01.py.md`."""
    if path == ROOT / "README.md":
        return Path("index.md")
    name = path.relative_to(ROOT)
    as_it_is = path.suffix in (".md", ".ipynb")
    return "files" / (name if as_it_is else name.with_name(name.name + ".md"))


def as_page(path: Path, at: Path) -> str:
    """A file as a page: Markdown with moved links, other text as code. Notebooks stay files."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return text
    if path.suffix == ".md":
        return moved(text, path, at)
    return f"# {path.relative_to(ROOT)}\n\n```{path.suffix[1:]}\n{text}```\n"


def moved(markdown: str, origin: Path, at: Path) -> str:
    """The same links, of a page that was written as `origin` and is shown as `at`."""

    def link(found: re.Match[str]) -> str:
        path = target(origin, found[1])
        if not path.exists():
            return found[1]
        inside = path if DOCS in path.parents else DOCS / place(path)
        return Path(os.path.relpath(inside, at.parent)).as_posix()

    parts = CODE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def summary(module: Path) -> str:
    """The first line of a module's docstring."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").split("\n")[0]


def decorated(module: Path) -> list[str]:
    """The functions that a module registers by a decorator, as architectures are."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return [
        item.name
        for item in tree.body
        if isinstance(item, ast.FunctionDef) and item.decorator_list and item.name[0] != "_"
    ]


def reference() -> dict[str, str]:
    """A page for each public module, and the list of them."""
    pages, rows = {}, []
    for path in sorted(PACKAGE.iterdir()):
        source = path / "__init__.py" if path.is_dir() else path
        name = path.stem
        if name.startswith("_") or name in INTERNAL or source.suffix != ".py":
            continue
        pages[name] = f"# musigma.{name}\n\n::: musigma.{name}\n"
        rows.append(f"| [`musigma.{name}`]({name}.md) | {summary(source)} |")
    for kind in ("flows", "vaes"):
        name, source = f"zoo.{kind}", PACKAGE / "zoo" / kind / "__init__.py"
        pages[name] = (
            f"# musigma.{name}\n\nOptions of `build(NAME, ...)` and of `musigma train`.\n"
        )
        for path in sorted(source.parent.glob("[!_]*.py")):
            for function in decorated(path):
                pages[name] += f"\n::: musigma.{name}.{path.stem}.{function}\n"
                pages[name] += (
                    "    options: {show_root_heading: true, show_root_toc_entry: true,"
                    " heading_level: 2}\n"
                )
        rows.append(f"| [`musigma.{name}`]({name}.md) | {summary(source)} |")
    head = "# Reference\n\nFrom the docstrings. Names in `musigma` itself are those of `gaussian`,"
    head += " `trace`, `model`, `data`, `training`, `evaluation`, `checkpoint` and others.\n\n"
    pages["README"] = head + "| module | |\n|---|---|\n" + "\n".join(rows) + "\n"
    return pages
