"""Commands and Python blocks of the README and the documentation run without errors."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import musigma
from musigma.cli import app, main
from tools import notebook, pages

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SIMULATORS = ROOT / "docs" / "simulators.md"
OTHERS = ROOT / "docs" / "other-libraries.md"  # in its own test
COMING_FROM = sorted((ROOT / "docs" / "coming-from").glob("[!R]*.md"))
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("[!R]*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of images of two classes, with several sizes and formats, and a table."""
    random = np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / "photos" / ("cats" if i % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (40 + i % 3, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.{'png' if i % 3 else 'jpg'}")
    rows = random.normal(size=(1500, 3))
    text = "\n".join(",".join(f"{value:.6f}" for value in row) for row in rows)
    (tmp_path / "table.csv").write_text(f"height,width,weight\n{text}\n")
    theta = random.uniform(0, 1, (1500, 2))
    pairs = np.concatenate([theta, theta + 0.1 * random.normal(size=(1500, 2))], 1)
    for name, n, columns in ("sims", 1500, slice(0, 4)), ("observed", 1, slice(2, 4)):
        head = ",".join(["theta_a", "theta_b", "x_a", "x_b"][columns])
        np.savetxt(
            tmp_path / f"{name}.csv", pairs[:n, columns], "%.6f", ",", header=head, comments=""
        )
    (tmp_path / "prior.toml").write_text("[bounds]\ntheta_a = [0, 1]\ntheta_b = [0, 1]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_commands(page: Path, folder: Path) -> list[str]:
    """Run the commands of a page, unchanged except for the budget and the size of images."""
    commands = [line for block in blocks(page, "sh") for line in block.splitlines()]
    for command in commands:
        words = re.sub(r"--(minutes|steps) \d+", "--steps 4 --evaluations 1", command)
        words = shlex.split(words.replace("--size 32", "--size 16"))
        assert words[0] == "musigma"
        main(words[1:])
        if "--out" in words:
            assert (folder / words[words.index("--out") + 1]).stat().st_size > 100, command
    return commands


def test_every_command_of_the_readme(photos, capsys):
    mine = next(b for b in blocks(ROOT / "README.md", "python") if b.startswith("# mine.py"))
    (photos / "mine.py").write_text(mine)
    commands = run_commands(ROOT / "README.md", photos)
    assert len(commands) == 16
    out = capsys.readouterr().out
    # each door ends in a figure with its error
    figures = re.findall(r"^-?[\d.]+ ± [\d.]+ (?:bits|nats).*; held-out", out, re.MULTILINE)
    doors = [c for c in commands if c.startswith("musigma evaluate")]
    assert len(figures) == len(doors) == 4
    assert commands[3::4] == doors
    assert (photos / "new-rows.csv").read_text().startswith("height,width,weight\n")


def test_every_command_of_the_tour(photos, capsys):
    commands = run_commands(ROOT / "docs" / "commands.md", photos)
    assert len(commands) > 15
    out = capsys.readouterr().out
    assert "bits/dim" in out
    table = (photos / "scores.csv").read_text().splitlines()
    assert len(table) == 31
    assert table[0].startswith("index,id,label,bits_per_dim,nats")


def test_every_command_of_the_page_on_anomalies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name, n in (("payments", 1200), ("new", 200), ("labeled", 200)):
        lines = ["country,amount" + ",is_fraud" * (name == "labeled")]
        for i in range(n):
            odd = name != "payments" and i % 9 == 0
            amount = 9999 if odd else random.lognormal(3, 1)
            lines.append(f"{'FD'[i % 2]},{amount:.2f}" + f",{int(odd)}" * (name == "labeled"))
        Path(f"{name}.csv").write_text("\n".join(lines))
    block, _ = blocks(ROOT / "docs" / "anomalies.md", "sh")
    for command in block.splitlines():
        words = command.replace("--minutes 5", "--steps 20 --evaluations 1 --hidden 16").split()
        main(words[1:])
    out = capsys.readouterr().out
    assert len(Path("scores.csv").read_text().splitlines()) == 201
    assert "amount = 9999.00 (expected" in Path("scores.csv").read_text()
    assert "drift: p = " in out
    assert re.search(r"AUROC .*; anomalies: is_fraud = 1, 23 of 200 rows", out)


def test_every_command_of_the_page_on_strange_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for folder, n in (("photos", 300), ("new", 20)):
        Path(folder).mkdir()
        for i in range(n):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{i:03}.png")
    Path("runs").mkdir()
    _, block = blocks(ROOT / "docs" / "anomalies.md", "sh")
    for command in block.splitlines():
        words = command.replace("--minutes 5", "--steps 2 --evaluations 1 --depth 1 --hidden 8")
        main(shlex.split(words.replace("--size 32", "--size 8"))[1:])
    table = Path("images.csv").read_text().splitlines()
    assert len(table) == 21
    assert "complexity,p_value_complexity,flag_complexity,typicality,p_value_typ" in table[0]
    assert len(list(Path("maps").glob("*.png"))) == 16
    assert "4 x 4 patch replaced" in capsys.readouterr().out


def test_every_command_of_the_page_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    people = ["age,sex,height,weight"]
    for i in range(60):
        age, height, weight = random.normal(size=3) * (10, 8, 9) + (40, 170, 70)
        people.append(f"{age},{'fm'[i % 2]},{height},{weight}")
    Path("people.csv").write_text("\n".join(people))
    Path("two.csv").write_text("age,sex\n30,f\n50,m\n")
    (block,) = blocks(ROOT / "docs" / "command-line.md", "sh")
    for command in block.splitlines():
        words = command.replace("--minutes 1", "--steps 2 --evaluations 1").split()
        main(words[1:])
    samples = Path("samples.csv").read_text().splitlines()
    assert (samples[0], len(samples)) == ("observation,height,weight", 201)


def test_every_command_of_the_page_on_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    page = ROOT / "docs" / "tables.md"
    exec(blocks(page, "python")[0], names)
    names["people"].to_csv("people.csv", index=False)
    run_commands(page, tmp_path)
    lines = "\n".join(musigma.data.summary(musigma.data.load("people.csv", schema="infer"))[:7])
    assert lines in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_on_simulators_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = SIMULATORS.read_text(encoding="utf-8")
    names: dict = {}
    for language, block in re.findall(r"```(python|sh)\n(.*?)```", page, re.DOTALL):
        if language == "python":
            exec(compile(block, "simulators.md", "exec"), names)
            continue
        for command in block.splitlines():
            quick = "--steps 30 --evaluations 2 --hidden 16"
            quick = re.sub(r"--minutes \d", quick, command)
            quick = quick.replace(" --out calibration.html", " --pairs 100 --out calibration.html")
            main(shlex.split(quick)[1:])
    assert len(names["pd"].read_parquet("draws.parquet")) == 10_000
    assert "Highest-density regions of 50, 80 and 95 % hold" in capsys.readouterr().out
    assert Path("calibration.html").stat().st_size > 10_000


def test_the_page_on_the_command_line_lists_all_commands():
    listed = " ".join(re.findall(r"`([^`]*)`", (ROOT / "docs/command-line.md").read_text()))
    for name in app:
        assert name.startswith("-") or re.search(rf"\b{name}\b", listed), name


def test_the_makefile_has_the_commands_that_the_readme_names():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^    make (\w+)", text, re.MULTILINE)
    assert named == ["demo", "docs", "test"]
    assert set(named) <= set(targets)


@pytest.mark.filterwarnings("ignore")  # of these libraries
def test_the_page_on_other_libraries(tmp_path, monkeypatch, capsys):
    for library in ("arviz", "bilby", "corner", "pyro", "sbi"):
        pytest.importorskip(library, reason="pip install 'musigma[dev]'")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {"__name__": "docs"}
    text = OTHERS.read_text(encoding="utf-8")
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(compile(block, str(OTHERS), "exec"), names)
            continue
        for command in block.splitlines():
            words = re.sub(r"--minutes \d+", "--steps 60 --evaluations 1", command)
            main(shlex.split(words)[1:])
    out = capsys.readouterr().out
    assert re.search(r"^mass +\d", out, re.MULTILINE)  # the summary of ArviZ
    assert names["share"] > 0.01
    assert abs(names["result"].posterior.mass.median() - 6) < 1
    assert Path("corner.png").stat().st_size > 1000 < Path("bilby.png").stat().st_size


@pytest.mark.parametrize("path", notebook.NOTEBOOKS.values(), ids=lambda path: path.stem)
def test_notebooks_of_the_tour_run_in_jupyter(path, tmp_path):
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    assert not notebook.differences(path, tmp_path)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda p: p.stem)
def test_the_code_of_a_page_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="pip install 'musigma[data]'")
    monkeypatch.chdir(tmp_path)
    assert not pages.differences(page)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda p: p.stem)
def test_a_page_of_questions_has_an_answer_with_its_output(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert text.partition("\n")[0].endswith("?")
    assert "```text\n" in text
    assert "## How to read it" in text


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs" / "systems").glob("*.md")), ids=lambda p: p.stem
)
def test_a_page_of_a_system_has_the_question_a_picture_and_code(page):
    text = page.read_text(encoding="utf-8")
    assert "\n> *" in text
    assert "![" in text
    assert blocks(page, "python")


@pytest.mark.filterwarnings("ignore")  # of the other libraries
@pytest.mark.parametrize("page", COMING_FROM, ids=lambda p: p.stem)
@pytest.mark.parametrize(
    "languages", ["python", pytest.param("python|py", marks=pytest.mark.slow)]
)
def test_both_sides_of_a_page_for_users_of_another_library(page, languages, tmp_path, monkeypatch):
    """Our side; with theirs if the library is installed, which takes long to import."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    if "py" in languages.split("|") or page.stem == "sbi":
        pytest.importorskip(page.stem, reason="the other library is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {"__name__": "docs"}
    text = page.read_text(encoding="utf-8")
    for block in re.findall(rf"```(?:{languages})\b.*?\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize(
    "page",
    [
        p
        for p in PAGES
        if p not in (OTHERS, SIMULATORS, *notebook.NOTEBOOKS, *HOW_TO, *COMING_FROM)
    ],
    ids=lambda p: p.name,
)
def test_python_in_the_documents(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {"__name__": "docs"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_are_not_broken(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


AUDITED = """
import sys
from pathlib import Path
from musigma.audit import audit_model
from musigma.model import Model

sys.argv = sys.argv[1:]
names = {"__name__": "__main__", "__file__": sys.argv[0]}
try:
    exec(compile(Path(sys.argv[0]).read_text(), sys.argv[0], "exec"), names)
except SystemExit as end:  # before it draws what so few steps make
    assert not end.code
models = {name: value for name, value in names.items() if isinstance(value, Model)}
assert models, "no model is left to look at"
for name, model in models.items():
    report = audit_model(model)
    assert report.verdict == "correct", f"{name}: {report}"
"""


EXAMPLES = [
    script
    if script.stem[:2] in ("01", "03", "07")
    else pytest.param(script, marks=pytest.mark.slow)
    for script in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs_and_its_models_pass_the_audit(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, script, "20"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
