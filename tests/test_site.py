"""What `make docs` does to pages before MkDocs reads them."""

from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="pip install 'musigma[docs]'")
from mkdocs.exceptions import PluginError

from benchmarks import stored
from tools import docstrings, notebook, pages, site, tables

ROOT = Path(__file__).parent.parent


def test_links_of_the_front_page_and_to_files_outside_docs_are_moved():
    text = "[a](docs/data.md#labels) [b](examples/07_audit_sigma.py) [c](https://a.b/c)"
    assert site.moved(text, ROOT / "README.md", ROOT / "docs" / "index.md") == (
        "[a](data.md#labels) [b](files/examples/07_audit_sigma.py.md) [c](https://a.b/c)"
    )
    page = ROOT / "docs" / "systems" / "textbook.md"
    text = "```\n[b](../../README.md)\n``` [b](../../README.md) [d](two-halves.md)"
    assert site.moved(text, page, page).endswith("``` [b](../index.md) [d](two-halves.md)")
    assert "[b](../../README.md)" in site.moved(text, page, page)


def test_every_public_module_is_in_the_reference():
    pages = site.reference()
    assert {"model", "layers", "zoo", "README"} < set(pages)
    assert not {"cli", "__main__", "py"} & set(pages)
    assert "[`musigma.model`](model.md)" in pages["README"]
    documented = pages["zoo.flows"] + pages["zoo.vaes"]
    for name in ("glow", "nsf", "maf", "vae", "ladder", "vdvae"):
        assert f".{name}\n" in documented


def test_examples_and_formulas_of_docstrings_become_markdown():
    text = "Sum.\n\n.. math:: a +\n    b\n\nExample:\n    >>> 1\n    1\n\nMore."
    assert docstrings.markdown(text) == (
        "Sum.\n\n$$a + b$$\n\nExample:\n    ```pycon\n    >>> 1\n    1\n    ```\n\nMore."
    )


def test_formulas_become_mathml():
    html = site.on_page_content(r'<p><span class="arithmatex">\(x &lt; y\)</span></p>')
    assert "<math" in html
    assert "arithmatex" not in html
    assert 'display="inline"' in html


def test_a_page_that_loads_from_another_host_is_refused():
    class Page:
        class file:
            src_uri = "a.md"

    fine = '<a href="https://arxiv.org">a</a><link rel="canonical" href="https://a.b">'
    assert site.on_post_page(fine, page=Page) == fine
    with pytest.raises(PluginError, match=r"a.md loads from another host.*unpkg"):
        site.on_post_page('<script src="https://unpkg.com/x"></script>', page=Page)


def test_a_folder_in_the_navigation_stands_for_its_pages():
    nav = ["a.md", {"B": "b/"}]
    assert site.expanded(nav, ["a.md", "b/README.md", "b/c.md"]) == [
        "a.md",
        {"B": ["b/README.md", "b/c.md"]},
    ]


@pytest.mark.parametrize("table", tables.TABLES, ids=lambda table: table.rows.__name__)
def test_tables_have_the_figures_of_their_files(table):
    page = (ROOT / "docs" / table.page).read_text(encoding="utf-8")
    assert table.filled(page) == page


def test_a_figure_that_was_edited_by_hand_is_found():
    table = tables.TABLES[0]
    page = (ROOT / "docs" / table.page).read_text(encoding="utf-8")
    assert "1.234 ± 0.003" in page
    assert table.filled(page.replace("1.234 ± 0.003", "1.134 ± 0.003")) == page
    row = next(line for line in page.splitlines() if line.startswith("| mnist | glow |"))
    assert table.filled(page.replace(f"{row}\n", "")) == page  # a row that is new
    with pytest.raises(ValueError, match="one row that begins with"):
        table.filled(page.replace(row, f"{row}\n{row}"))


def test_rows_of_a_benchmark_are_merged(tmp_path):
    path = tmp_path / "figures" / "a.json"
    stored.merge(path, [{"name": "b", "steps": 1}, {"name": "c", "steps": 2}], ["name"])
    stored.merge(path, [{"name": "b", "steps": 3}, {"name": "a", "steps": 4}], ["name"])
    assert [tuple(row.values()) for row in stored.rows(path)] == [("b", 3), ("c", 2), ("a", 4)]
    stored.merge(path, [], ["name"], order=lambda row: row["name"])
    assert [row["name"] for row in stored.rows(path)] == ["a", "b", "c"]


@pytest.mark.parametrize("page", notebook.NOTEBOOKS, ids=lambda page: page.stem)
def test_notebooks_of_the_tour_are_those_of_its_pages(page):
    assert notebook.NOTEBOOKS[page].read_text(encoding="utf-8") == notebook.written(page)


def test_a_page_becomes_a_notebook(tmp_path):
    page = tmp_path / "docs" / "a.md"
    page.parent.mkdir()
    page.write_text(
        "# A\n\n[b](b.md)\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n"
        "```sh\nmusigma list\n```\n"
    )
    cells = notebook.notebook(page, tmp_path / "examples" / "a.ipynb")["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "code"]
    assert "".join(cells[0]["source"]) == "# A\n\n[b](../docs/b.md)"
    assert (cells[1]["source"], cells[1]["outputs"][0]["text"]) == (["print(1)"], ["1\n"])
    assert (cells[2]["source"], cells[2]["outputs"]) == (["!musigma list"], [])
    assert len({cell["id"] for cell in cells}) == 3


def test_what_a_page_prints_is_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "a.md"
    page.write_text("```python\nprint('loss', 1.02)\n```\n\n```text\nloss 1.05\n```\n")
    assert pages.differences(page) == []
    pages.rewrite(page)
    assert "loss 1.02" in page.read_text()
    page.write_text(page.read_text().replace("loss 1.02", "loss 1.35"))
    (found,) = pages.differences(page)
    assert "loss 1.35" in found
    assert "but its code prints\nloss 1.02" in found
    page.write_text("```sh\nmusigma evaluate none\n```\n\n```text\n```\n")
    pages.rewrite(page)
    assert "none" in page.read_text()


def test_every_page_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert f"{name}\n" in listed or f": {name.partition('/')[0]}/\n" in listed, name
