"""The choice of the audit: from objects, names and files to verdicts, reports and exit codes."""

import json
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.distributions import Exponential, Independent, Normal

import musigma
from musigma.audit import CODES, AuditError, AuditReport, Finding, audit
from musigma.cli import main
from musigma.layers import ActNorm, InvertibleConv
from musigma.plugins import PluginError, load

MODELS = """
    import torch, torch.nn.functional as F
    from torch import nn

    class VAE(nn.Module):
        factor = 0.5

        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(48, 10)
            self.mu, self.logvar = nn.Linear(10, 3), nn.Linear(10, 3)
            self.leave = nn.Linear(3, 48)

        def encode(self, x):
            h = self.enter(x.flatten(1)).relu()
            return self.mu(h), self.logvar(h)

        def reparameterize(self, mu, logvar):
            std = torch.exp(self.factor * logvar)
            return mu + std * torch.randn_like(std)

        def decode(self, z):
            return self.leave(z).sigmoid()

        def forward(self, x):
            mu, logvar = self.encode(x)
            return self.decode(self.reparameterize(mu, logvar)), mu, logvar

    class Squared(VAE):
        factor = 1.0

    class Turned(VAE):
        def reparameterize(self, logvar, mu):
            return super().reparameterize(mu, logvar)

    def loss_function(recon_x, x, mu, logvar):
        kl = -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())
        return F.binary_cross_entropy(recon_x, x, reduction="sum") + kl

    class Sampling(nn.Module):
        def forward(self, inputs):
            mean, log_var = inputs
            return mean + (0.5 * log_var).exp() * torch.randn_like(mean)

    class British(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(7, 4)

        def encode(self, x):
            return self.enter(x).chunk(2, 1)

        def reparametrise(self, mu, logvar):
            return mu + (0.5 * logvar).exp() * torch.randn_like(mu)

        def kl(self, mu, logvar):
            return -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())

        def forward(self, x):
            return x

    class Plain(nn.Module):  # the function below is not its inverse
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(7, 7)

        def forward(self, x):
            return self.net(x)

    def inverse(matrix):
        return torch.linalg.inv(matrix)

    class WithLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.sampling = nn.Sequential(nn.Linear(7, 8)), Sampling()

        def forward(self, x):
            mean, log_var = self.encoder(x).chunk(2, 1)
            return self.sampling([mean, log_var]), mean, log_var

        def encode(self, x):
            return self.encoder(x).chunk(2, 1)

        def kl_divergence(self, mean, log_var):
            return -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1)

    class Coupled(nn.Module):
        sign = 1

        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 4)

        def forward(self, x):
            a, b = x.chunk(2, 1)
            t, s = self.net(a).chunk(2, 1)
            return torch.cat([a, b * s.tanh().exp() + t], 1), self.sign * s.tanh().sum(1)

        def inverse(self, z):
            a, b = z.chunk(2, 1)
            t, s = self.net(a).chunk(2, 1)
            return torch.cat([a, (b - t) * (-s.tanh()).exp()], 1)

    class Signed(Coupled):
        sign = -1

    class Hidden(nn.Module):  # what it draws cannot be had
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(7, 4), nn.Linear(2, 7)

        def forward(self, x):
            mu, logvar = self.enter(x).chunk(2, 1)
            z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
            return self.leave(z), mu, logvar

    def needs(width):
        return nn.Linear(width, width)

    class Needs(nn.Module):
        def __init__(self, width):
            super().__init__()

    def broken():
        raise RuntimeError("no such luck")

    nothing = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "models.py"
    path.write_text(textwrap.dedent(MODELS))
    return path


@pytest.mark.parametrize(
    ("name", "verdict", "convention", "codes"),
    [
        ("VAE", "correct", "log_var", ()),
        ("Squared", "bug", "log_std", ("kl_mismatch",)),
        ("Turned", "correct", "log_var", ()),
        ("WithLayer", "correct", "log_var", ()),
        ("British", "correct", "log_var", ()),
        ("Coupled", "correct", None, ()),
        ("Signed", "bug", None, ("logdet_mismatch",)),
    ],
)
def test_models_of_a_file(file, name, verdict, convention, codes):
    report = audit(load(f"{file}:{name}"))
    assert (report.verdict, report.convention, report.codes) == (verdict, convention, codes)
    assert report.checked
    assert any("was called to make" in line for line in report.assumed)
    assert report.subject == name


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Needs", "it needs width; give an instance"),
        ("needs", "a function that makes a model must take no arguments"),
        ("broken", r"broken\(\): it raises RuntimeError: no such luck"),
        ("nothing", "int: neither a VAE"),
        ("Hidden", "Hidden: neither a VAE"),
        ("Plain", "Plain: neither a VAE"),
    ],
)
def test_objects_that_cannot_be_audited(file, target, message):
    with pytest.raises(AuditError, match=message):
        audit(load(f"{file}:{target}"))


def test_targets_that_cannot_be_loaded(tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0")
    for target, message in (
        ("models.py", "expected FILE.py:NAME"),
        (f"{tmp_path}/none.py:X", "there is no .*none.py"),
        (f"{tmp_path}/bad.py:X", "fails: ZeroDivisionError"),
        ("torch.nn:absent", "defines no 'absent'; it has"),
        ("no_such_module_at_all:X", "fails: ModuleNotFoundError"),
    ):
        with pytest.raises(PluginError, match=message):
            load(target, argument="target")
    assert load("torch.nn:ReLU") is nn.ReLU


def test_models_distributions_and_mappings():
    assert audit(musigma.build("realnvp", (4,), bits=None, depth=2, hidden=8)).verdict == "correct"
    assert audit(ActNorm(3), example=torch.randn(8, 3)).verdict == "correct"
    several = [ActNorm(4), InvertibleConv(4)]
    assert audit(several, example=torch.randn(8, 4)).verdict == "correct"
    with pytest.raises(AuditError, match="list: neither a VAE"):
        audit([nn.Linear(4, 4)], example=torch.randn(8, 4))
    assert audit(Independent(Normal(torch.zeros(2), 1.0), 1)).verdict == "correct"
    assert audit(Exponential(torch.tensor(2.0))).verdict == "correct"
    flow = {"forward": lambda x: (2 * x, torch.zeros(len(x))), "inverse": lambda z: z / 2}
    assert audit(flow, example=torch.randn(8, 3)).codes == ("logdet_mismatch",)
    with pytest.raises(AuditError, match="speed: expected arguments of audit_vae"):
        audit({"speed": 3})


def wrong(mean, second):
    return -0.5 * (1 + second - mean**2 - second.exp()).sum()


def sampled(mean, second):
    return mean + second.exp() * torch.randn_like(mean)


def test_assert_audited(assert_audited):
    alone = assert_audited(None, sample=sampled, allow=("incomplete",))
    assert alone.convention == "log_std"
    with pytest.raises(AssertionError, match=r"bug kl_mismatch: .*\n.*\n  repair: "):
        assert_audited({"sample": sampled, "kl": wrong})
    assert assert_audited(None, sample=sampled, kl=wrong, allow=("kl_mismatch",)).verdict == "bug"


def test_the_fixture_is_the_function(assert_audited):
    assert assert_audited is sys.modules["musigma.audit"].assert_audited


def test_a_report_as_text_json_and_page():
    report = audit({"sample": sampled, "kl": wrong})
    assert json.loads(report.to_json())["findings"][0]["code"] == "kl_mismatch"
    page = report.to_html()
    assert "<script" not in page
    assert "kl_mismatch" in page
    assert "log_std" in str(report)
    odd = Finding("kl_scale", "warning", "<b>&", {"x": float("nan")}, "none")
    report = AuditReport("<i>", findings=(odd, Finding("kl_negative", "bug", "m", repair="r")))
    assert (report.verdict, report.codes) == ("bug", ("kl_negative", "kl_scale"))
    assert json.loads(report.to_json())["findings"][1]["numbers"]["x"] is None
    assert "<i>" not in report.to_html()
    with pytest.raises(ValueError, match=r"none of musigma\.audit\.CODES"):
        Finding("kl", "bug", "m", repair="r")
    with pytest.raises(ValueError, match="repair: a finding of kl_scale needs one"):
        Finding("kl_scale", "bug", "m")


def test_each_code_has_a_page_a_picture_and_a_line_in_the_index(request):
    docs = request.config.rootpath / "docs"
    pages = {page.stem: page.read_text() for page in (docs / "findings").glob("*.md")}
    index = pages.pop("README")
    assert set(pages) == set(CODES)
    for code, row in CODES.items():
        meaning = row.title
        assert pages[code].startswith(f"# `{code}`: {meaning}\n")
        assert f"](../figures/findings/{code}.svg)" in pages[code]
        assert (docs / "figures" / "findings" / f"{code}.svg").is_file()
        assert f"[`{code}`]({code}.md) | {meaning.replace('|', chr(92) + '|')} |" in index


def test_the_command(file, tmp_path, capsys):
    main(["audit", f"{file}:VAE", "--json"])
    assert json.loads(capsys.readouterr().out)["convention"] == "log_var"
    with pytest.raises(SystemExit) as left:
        main(["audit", f"{file}:Squared", "--out", str(tmp_path / "a.html")])
    assert left.value.code == 1
    assert "replace exp(b) by exp(2 b)" in capsys.readouterr().out
    assert "kl_mismatch" in (tmp_path / "a.html").read_text()
    main(["audit", f"{file}:Squared", "--allow", "kl_mismatch"])
    main(["audit", f"{file}:VAE", "--shape", "3x4x4"])
    for words, message in (
        ([f"{file}:VAE", "--shape", "3xq"], "shape: expected sizes"),
        ([f"{file}:VAE", "--allow", "nothing"], "allow: unknown code 'nothing'"),
        ([f"{file}:VAE", "--out", "a.pdf"], "out: expected a .html"),
        ([f"{file}:VAE", "--shape", "3x5x5"], "no shape that was tried is accepted"),
        (["nowhere"], "RUN: there is no run folder"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["audit", *words])
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_the_command_on_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--steps", "5", "--evaluations", "1", "--device", "cpu", "--out", "run"]
    main(["train", "vae", "digits", "--net", "mlp", "--width", "8", *quick])
    capsys.readouterr()
    main(["audit", "run", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] in ("correct", "warning")  # after five steps latents are empty
    assert not any(f["severity"] == "bug" for f in report["findings"])
