"""Reports of audits: verdicts, messages by code, exit codes, SARIF, the fixture and the server."""

import ast
import asyncio
import json
import re
import shlex
import string
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import musigma.audit
from musigma.audit import CODES, AuditError, AuditReport, Finding, audit
from musigma.audit.findings import Assumed, Facts, Missing, Passed, Skipped, bug, warning
from musigma.audit.sarif import to_sarif
from musigma.cli import main

BUG = Finding("kl_mismatch", "bug", "wrong", repair="mend", where="m.py:7")
WARNING = Finding("kl_offset", "warning", "twice", {"slope": 2.0}, "halve")
NO_KL = "the KL: only the decoder depends on the heads of z (net/model.py:41)"


@pytest.mark.parametrize(
    ("findings", "missing", "allow", "verdict"),
    [
        ((), (), (), "correct"),
        ((WARNING,), (), (), "warning"),
        ((WARNING,), (), ("kl_offset",), "correct"),
        ((WARNING,), (NO_KL,), (), "incomplete"),
        ((WARNING,), (NO_KL,), ("incomplete",), "warning"),
        ((BUG, WARNING), (NO_KL,), (), "bug"),
        ((BUG,), (NO_KL,), ("kl_mismatch",), "incomplete"),
        ((BUG,), (NO_KL,), ("kl_mismatch", "incomplete"), "correct"),
    ],
)
def test_verdicts(findings, missing, allow, verdict):
    report = AuditReport("it", findings=findings, checked=("z",), missing=missing)
    assert report.judge(allow) == verdict
    assert allow or report.verdict == verdict
    assert report.to_dict()["verdict"] == report.verdict


def test_what_is_missing_is_in_every_form():
    report = AuditReport("it", missing=(NO_KL,))
    assert report.verdict == "incomplete"
    assert str(report) == f"it: incomplete\n  not examined: {NO_KL}"
    for text in (str(report), report.to_json(), report.to_html()):
        assert NO_KL in text
    with pytest.raises(AuditError, match="it: nothing could be checked: there was nothing"):
        AuditReport("it")


def test_findings_fill_in_the_messages_of_the_table():
    finding = bug("kl_negative", "step", weight=torch.tensor(-0.25).double(), where="a.py:3")
    assert finding.message.startswith("the loss contains the KL with the weight -0.25:")
    assert (finding.numbers, finding.where) == ({"weight": -0.25}, "a.py:3")
    report = AuditReport.of("it", [finding])
    assert "where: a.py:3" in str(report)
    assert "a.py:3" in report.to_html()


def test_a_report_has_the_worst_finding_of_a_code_and_line():
    report = AuditReport.of(
        "it",
        [
            warning("free_bits", "step", held_at=0.5),
            bug("free_bits", "step", held_at=1.5),
            warning("free_bits", "step", held_at=2.5),
            warning("free_bits", "step", held_at=2.5, where="a.py:3"),
            warning("free_bits", "step", held_at=3.5, where=str(Path.cwd() / "a.py:3")),
        ],
    )
    assert [f.numbers["held_at"] for f in report.findings] == [1.5, 2.5]


def test_a_report_collects_what_checks_return():
    def check():
        yield Passed("z")
        yield Facts(read_as="std", details={"beta": 1.0})
        yield Skipped("the weight: there is no loss")

    later = [Facts("log_var", "variance", details={"beta": 2.0, "n": 3}), Assumed("a batch")]
    report = AuditReport.of("it", [*check(), *later, Missing(NO_KL), Missing(NO_KL)])
    assert (report.convention, report.read_as, report.layout) == ("log_var", "std", None)
    assert report.details == {"beta": 1.0, "n": 3}
    assert (report.checked, report.missing) == (("z",), (NO_KL,))
    assert (report.unchecked, report.assumed) == (("the weight: there is no loss",), ("a batch",))


def test_words_of_a_message_are_not_repeated_among_its_numbers():
    finding = bug("no_gradient", head="mean", layer="enc.out", depth=3)
    assert finding.figures == {"layer": "enc.out", "depth": "3"}
    assert finding.numbers["head"] == "mean"


def test_every_message_is_a_template_over_names():
    """No field is positional, and every repair is one clause: the printers add the full stop."""
    for code, row in CODES.items():
        for name, message in row.variants.items():
            for text in message:
                fields = [f for _, f, _, _ in string.Formatter().parse(text) if f is not None]
                named = [re.fullmatch(r"[a-z_]\w*(\[\d+\])?", f) for f in fields]
                assert all(named), (code, name, fields)
                assert text
                assert not text.endswith("."), (code, name)


def test_messages_that_checks_name_are_in_the_table_and_each_is_named():
    said, words = set(), set()
    for path in Path(musigma.audit.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        words |= {n.value for n in nodes if isinstance(n, ast.Constant)}
        for node in nodes:
            if not isinstance(node, ast.Call):
                continue
            verb, given = ast.unparse(node.func), node.args
            if verb in ("bug", "warning", "finding", "Finding.of") and given:
                code, *variant = [given[0], *given[2 if verb == "Finding.of" else 1 :]]
                names = [a.value for a in (code, *variant) if isinstance(a, ast.Constant)]
                if len(names) == 1 + len(variant):
                    said.add((names[0], (*names[1:], "")[0]))
    table = {(code, variant) for code, row in CODES.items() for variant in row.variants}
    assert said <= table, said - table
    assert not [(code, variant) for code, variant in table if not {code, variant} <= words]
    assert all(row.variants for row in CODES.values())
    assert len(said) > 80


# --- SARIF --------------------------------------------------------------------------------------


def run_of(report: AuditReport, **how) -> dict:
    """The one run of a log, after the checks that the schema of SARIF 2.1.0 makes of it."""
    log = json.loads(json.dumps(to_sarif(report, **how), allow_nan=False))
    assert set(log) == {"$schema", "version", "runs"}
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["shortDescription"]["text"]
        assert rule["fullDescription"]["text"].endswith(".")
        assert "docs/" in rule["help"]["text"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("none", "note", "warning", "error")
        assert result["message"]["text"]
        for location in result.get("locations", []):
            physical = location["physicalLocation"]
            assert physical["region"]["startLine"] >= 1
            assert "\\" not in physical["artifactLocation"]["uri"]
    return run


def lines_of(run: dict) -> list[tuple[str, str, str]]:
    """(code, level, line) of each result."""
    rows = []
    for result in run["results"]:
        where = ""
        for location in result.get("locations", []):
            physical = location["physicalLocation"]
            where = f"{physical['artifactLocation']['uri']}:{physical['region']['startLine']}"
        rows.append((result["ruleId"], result["level"], where))
    return rows


def test_sarif_has_a_result_for_each_finding_and_for_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Finding("kl_offset", "warning", "a", {"x": float("nan")}, "b", f"{tmp_path}/a b.py:3")
    report = AuditReport("it", findings=(WARNING, BUG, own), missing=(NO_KL, "the prior"))
    run = run_of(report, where="top.py:12", allow=("kl_mismatch",))
    assert lines_of(run) == [
        ("kl_mismatch", "error", "m.py:7"),
        ("kl_offset", "warning", "top.py:12"),
        ("kl_offset", "warning", "a%20b.py:3"),
        ("incomplete", "note", "net/model.py:41"),
        ("incomplete", "note", "top.py:12"),
    ]
    assert len(run["tool"]["driver"]["rules"]) == 3
    first, second, third, *_ = run["results"]
    assert "Repair: mend." in first["message"]["text"]
    assert first["suppressions"][0]["kind"] == "external"
    assert "suppressions" not in second
    assert second["properties"]["numbers"] == {"slope": 2.0}
    assert third["properties"]["numbers"] == {"x": None}


def test_sarif_finds_the_folder_of_a_line_without_one():
    report = AuditReport("it", missing=("the KL: only the decoder sees the heads (top.py:4)",))
    assert lines_of(run_of(report, where="net/top.py:12")) == [
        ("incomplete", "note", "net/top.py:4")
    ]
    assert lines_of(run_of(report, where="net/other.py:1"))[0][2] == "top.py:4"


def test_sarif_of_files_elsewhere_and_of_nothing(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    far = Finding("kl_offset", "warning", "a", {}, "b", f"{tmp_path}/far.py:3")
    run = run_of(AuditReport("it", findings=(far, BUG)), where="")
    assert lines_of(run)[1][2] == f"{(tmp_path / 'far.py').resolve().as_uri()}:3"
    assert run_of(AuditReport("it", findings=(WARNING,)))["results"][0].get("locations") is None
    assert run_of(AuditReport("it", checked=("z",)))["results"] == []


def test_sarif_describes_every_code():
    found = [Finding(code, "bug", "m", repair="r") for code in CODES]
    rules = run_of(AuditReport("it", findings=tuple(found)))["tool"]["driver"]["rules"]
    assert {rule["id"]: rule["shortDescription"]["text"] for rule in rules} == {
        code: row.title for code, row in CODES.items()
    }


# --- the command --------------------------------------------------------------------------------

MODEL = """
import torch
from torch import nn

print("a script that prints")


class VAE(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(4, 6)
        self.factor = factor

    def encode(self, x):
        return self.encoder(x).chunk(2, -1)

    def reparameterize(self, mean, log_var):
        return mean + (0.5 * log_var).exp() * torch.randn_like(mean)

    def kl(self, mean, log_var):
        return -0.5 * (1 + log_var - mean**2 - (self.factor * log_var).exp()).sum()


class Wrong(VAE):
    def __init__(self):
        super().__init__(3.0)


def batch():
    return torch.rand(8, 6)


small = torch.rand(8, 5)
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A file of models, in the working directory; it prints when it is executed."""
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    return "model.py"


def exit_code(*words: str) -> int:
    """The exit code of `musigma audit`."""
    with pytest.raises(SystemExit) as left:
        sys.exit(main(["audit", *words]))
    return left.value.code or 0


def test_a_bug_exits_with_1_and_its_line_is_in_the_sarif(model, capsys):
    assert exit_code("model.py:Wrong", "--example", "model.py:batch", "--sarif", "a.sarif") == 1
    log = json.loads(Path("a.sarif").read_text())
    line = next(i for i, text in enumerate(MODEL.splitlines(), 1) if "-0.5 * (1 + log_var" in text)
    assert lines_of(log["runs"][0])[0] == ("kl_mismatch", "error", f"model.py:{line}")
    assert exit_code("model.py:VAE", "--sarif", "b.sarif") == 0
    assert json.loads(Path("b.sarif").read_text())["runs"][0]["results"] == []


def test_what_the_audited_code_prints_does_not_mix_with_the_report(model, capsys):
    assert exit_code("model.py:VAE", "--example", "model.py:batch", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["verdict"] == "correct"
    assert err.count("a script that prints") == 1  # a file of both is executed once


def test_functions_may_import_from_the_folder_of_their_file(model, tmp_path, monkeypatch):
    """When they are called; the console script does not look in the working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    late = "def sample(mean, log_var):\n    from model import VAE\n    "
    late += "return VAE().reparameterize(mean, log_var)\n\n\nmodel = {'sample': sample}\n"
    (tmp_path / "late.py").write_text(late)
    before = list(sys.path)
    assert exit_code("../late.py:model", "--allow", "incomplete") == 0
    assert sys.path == before


def test_an_incomplete_audit_exits_with_3(model, monkeypatch, capsys):
    module = sys.modules["musigma.audit"]
    monkeypatch.setattr(module, "audit", lambda *_, **__: AuditReport("it", missing=(NO_KL,)))
    assert exit_code("model.py:VAE") == 3
    assert NO_KL in capsys.readouterr().out
    assert exit_code("model.py:VAE", "--allow", "incomplete") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.py:VAE", "--example", "model.py:none"], "example: model.py defines no 'none'"),
        (["model.py:VAE", "--example", "model.py:small"], "example: "),
        (["model.py:VAE", "--example", "breaks.py:take"], "breaks.py:take cannot be called: Typ"),
        (["model.py:VAE", "--sarif", "a.xml"], "sarif: expected a .sarif or .json file"),
        (["model.py:VAE", "--sarif", "no/a.sarif"], "sarif: no/a.sarif cannot be written"),
        (["model.py:VAE", "--allow", "kl"], "allow: unknown code 'kl'; the codes are incomplete"),
        (["ends.py:VAE"], "target: the code ends the program with exit code 0"),
        (["breaks.py:make"], "target: the audit stops with KeyError: 'x'"),
        (["nowhere", "--example", "model.py:batch"], "example: a run is audited with data"),
    ],
)  # fmt: skip
def test_what_cannot_be_audited_exits_with_2(model, monkeypatch, capsys, words, message):
    Path("ends.py").write_text("import sys\nsys.exit(0)\n")
    Path("breaks.py").write_text("def make(): pass\n\ndef take(x): pass\n")
    if words == ["breaks.py:make"]:

        def breaks(*_, **__):
            raise KeyError("x")

        monkeypatch.setattr(sys.modules["musigma.audit"], "audit", breaks)
    assert exit_code(*words) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def blocks_of(page: str, *languages: str) -> list[str]:
    """The code blocks of a page in one of the languages."""
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", page, re.DOTALL)


def test_the_commands_of_the_page(request, tmp_path, monkeypatch, capsys):
    """Also those of the action and the hook; all are about the file that the page shows."""
    yaml = pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    page = (request.config.rootpath / "docs" / "audit.md").read_text(encoding="utf-8")
    Path("train.py").write_text(blocks_of(page, "python")[0])
    action, hook = map(yaml.safe_load, blocks_of(page, "yaml"))
    (step,) = (s["run"] for s in action["jobs"]["audit"]["steps"] if "--sarif" in s.get("run", ""))
    upload = next(s for s in action["jobs"]["audit"]["steps"] if "upload" in s.get("uses", ""))
    commands = [line for block in blocks_of(page, "bash") for line in block.splitlines()]
    commands += [step, hook["repos"][0]["hooks"][0]["entry"]]
    for command in commands:
        name, verb, *words = shlex.split(command)
        assert (name, verb) == ("musigma", "audit")
        assert exit_code(*words) == (0 if "--allow" in words else 1), command
        assert "kl_mismatch" in capsys.readouterr().out
    assert len(commands) == 5
    assert "kl_mismatch" in Path("report.html").read_text()
    log = json.loads(Path(upload["with"]["sarif_file"]).read_text())
    (found,) = lines_of(log["runs"][0])
    lines = Path("train.py").read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "kl = " in text)
    assert found == ("kl_mismatch", "error", f"train.py:{line}")


# --- the fixture --------------------------------------------------------------------------------


def sampled(mean, log_var):
    return mean + (0.5 * log_var).exp() * torch.randn_like(mean)


def divergence(mean, log_var):
    return 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum()


def test_the_fixture_refuses_unknown_codes(assert_audited):
    parts = {"sample": sampled, "kl": divergence}
    assert assert_audited(parts).verdict == "correct"
    with pytest.raises(ValueError, match="allow: unknown code 'kl'; the codes are incomplete, "):
        assert_audited(parts, allow=("kl",))


def test_the_fixture_fails_on_an_incomplete_audit(assert_audited, monkeypatch):
    module = sys.modules["musigma.audit"]
    monkeypatch.setattr(module, "audit", lambda *_, **__: AuditReport("it", missing=(NO_KL,)))
    with pytest.raises(AssertionError, match="it: incomplete"):
        assert_audited({"sample": sampled})
    assert assert_audited({"sample": sampled}, allow=("incomplete",)).missing == (NO_KL,)
    assert audit({"sample": sampled, "kl": divergence}).verdict == "correct"


@pytest.mark.parametrize("right", [True, False])
def test_the_fixture_audits_a_step(assert_audited, right):
    encoder, decoder, x = nn.Linear(8, 6), nn.Linear(3, 8), torch.randn(16, 8)

    def step():
        mean, log_var = encoder(x).chunk(2, 1)
        z = mean + (log_var / 2 if right else log_var).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var)
        return ((decoder(z) - x).square().sum(1) / 2 + kl.sum(1)).mean()

    if right:
        assert assert_audited(step).verdict == "correct"
        return
    with pytest.raises(AssertionError, match=r"bug kl_mismatch: .*\n(.*\n)*  where: .*\.py:\d+"):
        assert_audited(step)


# --- the server ---------------------------------------------------------------------------------

LOUD = (
    MODEL
    + """
import os

os.write(1, b"straight to standard output" + bytes([10]))
assert os.read(0, 1) == b"", "it reads what the client says"
"""
)


def asked(transport, *arguments: dict) -> list:
    """What the tool answers to a client, in one session."""
    client = pytest.importorskip("mcp.client", reason="pip install 'musigma[mcp]'")

    async def session():
        async with client.Client(transport) as opened:
            assert [tool.name for tool in (await opened.list_tools()).tools] == ["audit"]
            return [await opened.call_tool("audit", each) for each in arguments]

    return asyncio.run(session())


def test_the_server_audits_over_standard_input_and_output(model, request):
    """In a file that writes to both, and whose session goes on after each refusal."""
    stdio = pytest.importorskip("mcp.client.stdio", reason="pip install 'musigma[mcp]'")
    Path("loud.py").write_text(LOUD)
    Path("dies.py").write_text("import os\nos._exit(0)\n")
    source = str(request.config.rootpath / "src")
    how = stdio.StdioServerParameters(
        command=sys.executable,
        args=["-m", "musigma", "mcp"],
        env={"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
    )
    wrong, dead, right = asked(
        stdio.stdio_client(how),
        {"target": "loud.py:Wrong", "example": "loud.py:batch"},
        {"target": "dies.py:VAE"},
        {"target": "loud.py:VAE", "shape": "6"},
    )
    assert wrong.structured_content["verdict"] == "bug"
    assert "bug kl_mismatch: " in wrong.content[0].text
    assert (dead.is_error, dead.structured_content) == (True, None)
    assert dead.content[0].text == "the audit ended with exit code 0"
    assert right.structured_content["verdict"] == "correct"
    assert not right.is_error


@pytest.mark.slow
def test_the_server_refuses_in_words(model):
    from musigma.cli.server import server

    unknown, option = asked(server(), {"target": "model.py:Vae"}, {"target": "--version"})
    assert "model.py defines no 'Vae'; it has VAE, Wrong, batch" in unknown.content[0].text
    assert "--version" in option.content[0].text
    assert unknown.is_error
    assert option.is_error


@pytest.mark.slow
def test_a_changed_file_is_read_anew(model):
    from musigma.cli.server import server

    Path("parts.py").write_text(MODEL)
    Path("whole.py").write_text("from parts import VAE\n")
    made, how = server(), {"target": "whole.py:VAE", "shape": "6"}
    assert asked(made, how)[0].structured_content["verdict"] == "correct"
    Path("parts.py").write_text(MODEL.replace("factor=1.0", "factor=3.0"))
    assert asked(made, how)[0].structured_content["verdict"] == "bug"


def test_an_audit_without_end_is_stopped(model, monkeypatch):
    from musigma.cli import server

    monkeypatch.setattr(server, "MINUTES", 0.05)
    Path("waits.py").write_text("import time\ntime.sleep(600)\n")
    (answer,) = asked(server.server(), {"target": "waits.py:VAE"})
    assert answer.is_error
    assert answer.content[0].text == "the audit did not end within 0.05 minutes"


def test_without_the_package_the_server_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    with pytest.raises(SystemExit) as left:
        main(["mcp"])
    assert left.value.code == 2
    assert "pip install 'musigma[mcp]'" in capsys.readouterr().err
