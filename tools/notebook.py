"""The pages of the tour as notebooks: `python -m tools.notebook`. With `--check`, only compare.

Text becomes cells of Markdown; blocks of Python, and of commands, cells of code; a block of text
after one, its output. `differences` runs a notebook in Jupyter.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.pages import BLOCK, agree

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {
    ROOT / "docs" / f"{name}.md": ROOT / "examples" / f"{name}.ipynb"
    for name in ("tour", "tour-tables")
}
"""The pages of the tour, and the notebooks that they become."""

LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def notebook(page: Path, at: Path) -> dict[str, Any]:
    """A page as a notebook of format 4.5 that lies at a path."""
    cells = list(_cells(page, at.parent))
    for i, cell in enumerate(cells):
        text = f"{i} {cell['source']}".encode()
        cell["id"] = hashlib.blake2b(text, digest_size=4).hexdigest()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _cells(page: Path, folder: Path) -> Iterator[dict[str, Any]]:
    text = page.read_text(encoding="utf-8")
    end, code = 0, None
    for block in BLOCK.finditer(text):
        words = text[end : block.start()].strip()
        if words or block[1] != "text":
            yield from [code] if code else []
            code = None
        if words:
            yield _markdown(words, page, folder)
        end = block.end()
        if block[1] == "text":
            assert code is not None, f"{page.name}: text that no block before it prints"
            output = {"output_type": "stream", "name": "stdout", "text": _lines(block[2])}
            code["outputs"] = [output]
            continue
        source = (
            block[2] if block[1] == "python" else re.sub("^", "!", block[2].strip(), flags=re.M)
        )
        code = {
            "cell_type": "code",
            "execution_count": None,
            "metadata": {},
            "outputs": [],
            "source": _lines(source.strip()),
        }
    yield from [code] if code else []
    if words := text[end:].strip():
        yield _markdown(words, page, folder)


def _markdown(words: str, page: Path, folder: Path) -> dict[str, Any]:
    def moved(link: re.Match[str]) -> str:
        return Path(os.path.relpath(page.parent / link[1], folder)).as_posix()

    return {"cell_type": "markdown", "metadata": {}, "source": _lines(LINK.sub(moved, words))}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def written(page: Path) -> str:
    """The notebook of a page of the tour, as its file should be."""
    return json.dumps(notebook(page, NOTEBOOKS[page]), indent=1, ensure_ascii=False) + "\n"


def differences(path: Path, folder: Path) -> list[str]:
    """Run a notebook by Jupyter in a folder, and compare what its cells print with what they show.

    Returns:
        For each cell that prints something else, what it shows and what it prints.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    import nbclient
    import nbformat

    book = nbformat.read(path, as_version=4)
    shown = [_printed(cell) for cell in book.cells]
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(book, timeout=300, resources=resources).execute()
    printed = [_printed(cell) for cell in book.cells]
    return [
        f"a cell shows\n{a}\nbut prints\n{b}"
        for a, b in zip(shown, printed, strict=True)
        if not agree(a, b)
    ]


def _printed(cell: Any) -> str:
    return "".join(o["text"] for o in cell.get("outputs", []) if o.get("name") == "stdout")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="Only compare.")
    check = parser.parse_args().check
    stale = []
    for page, path in NOTEBOOKS.items():
        text = written(page)
        if not check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            stale.append(f"{path.name} differs from {page.name}: run python -m tools.notebook")
    sys.exit("\n".join(stale) or None)


if __name__ == "__main__":
    main()
