"""Models of this library pass their own audit; broken and badly trained ones do not."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from musigma.audit import AuditError, audit_model
from musigma.distributions import StandardNormal, StandardUniform
from musigma.gaussian import DiagonalGaussian
from musigma.layers import ActNorm, Dequantize, InvertibleConv, Rescale
from musigma.model import Bijection, Chain, Prior
from musigma.spec import Spec, Variable
from musigma.zoo import ARCHITECTURES, build
from tests.test_any_order import small_schema

SMALL = {
    "autoencoder_kl": [((3, 8, 8), {"widths": [8, 8], "groups": 4})],
    "flowpp": [
        ((2, 4, 4), {"bits": None, "depth": 1, "hidden": 8, "components": 2, "context": 2}),
        ((1, 2, 4), {"depth": 1, "hidden": 8, "components": 2, "dequantize": "learned"}),
    ],
    "glow": [
        ((3, 8, 8), {"levels": 2, "depth": 2, "hidden": 8}),
        ((2, 4, 4), {"bits": None, "depth": 2, "hidden": 8, "permutation": "conv"}),
        ((1, 4, 4), {"bits": 5, "dequantize": "learned", "alpha": None, "hidden": 8, "depth": 1}),
        ((3, 4, 4), {"context": 3, "depth": 1, "hidden": 8}),
    ],
    "idf": [
        ((1, 8, 8), {"bits": 4, "levels": 2, "depth": 1, "hidden": 8}),
        ((4,), {"bits": 3, "depth": 2, "hidden": 8, "context": 2}),
    ],
    "ladder": [((1, 8, 8), {"levels": 2, "latents": 2, "width": 8, "components": 2})],
    "maf": [((4,), {"depth": 2, "hidden": 8})],
    "mlp_vae": [((1, 4, 4), {"hidden": 8, "latents": 3, "bits": 1})],
    "published_glow": [((3, 4, 4), {"context": 3, "classifier": "softmax", "depth": 1})],
    "nsf": [((4,), {"depth": 2, "hidden": 8})],
    "realnvp": [
        ((4,), {"bits": None, "depth": 2, "hidden": 8}),
        ((1, 8, 8), {"depth": 1, "hidden": 8}),
    ],
    "table": [(Spec((4,), schema=small_schema()[0]), {"hidden": 8})],
    "vflow": [((3,), {"depth": 2, "hidden": 8}), ((2,), {"extra": 3, "depth": 2, "context": 2})],
    "vae": [
        ((1, 8, 8), {"width": 8, "latents": 3, "components": 2}),
        ((6,), {"bits": None, "width": 8, "latents": 4, "prior": "flow"}),
        ((1, 4, 4), {"width": 8, "latents": 3, "likelihood": "gaussian"}),
    ],
}
MODELS = [(name, shape, options) for name in SMALL for shape, options in SMALL[name]]


def test_every_architecture_is_tested():
    """Here, or in a file of its own."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    built_in = [name for name, b in ARCHITECTURES.items() if b.__module__.startswith("musigma")]
    assert [name for name in built_in if f'"{name}"' not in text] == []


@pytest.mark.parametrize(("name", "shape", "options"), MODELS)
def test_the_zoo_passes_its_own_audit(name, shape, options):
    torch.manual_seed(0)
    model = build(name, shape, **options)
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    report = audit_model(model)
    assert report.verdict == "correct", report.findings
    assert report.checked
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_of_any_context_is_audited():
    spec = Spec((3,), context=(Variable("age"), Variable("sex", classes=2)))
    model = build("nsf", spec, depth=1, hidden=8)
    assert audit_model(model).verdict == "correct"
    given = {"age": torch.randn(9, 1), "sex": torch.eye(2)[torch.arange(9) % 2]}
    report = audit_model(model, torch.randn(9, 3), given)
    assert not [f for f in report.findings if f.severity == "bug"]
    assert "the latents of 9 examples" in report.checked
    with pytest.raises(AuditError, match="model: it raises ValueError"):
        audit_model(model, torch.randn(9, 3), torch.randn(9, 3))


def flow(*layers):
    return Chain(layers, Prior(StandardNormal((4,))))


class Wrong(ActNorm):
    """An activation normalization with a mistake."""

    def __init__(self, mistake):
        super().__init__(4)
        self.mistake = mistake

    def forward(self, x, context=None):
        y, log_det = super().forward(x)
        return y, 2 * log_det if self.mistake == "log_det" else log_det

    def inverse(self, y, context=None):
        x, log_det = super().inverse(y)
        if self.mistake == "log_det":
            return x, 2 * log_det
        if self.mistake == "sign":
            return x, -log_det
        return (x + self.bias, log_det) if self.mistake == "inverse" else (x, log_det)


@pytest.mark.parametrize(
    ("mistake", "codes"),
    [
        ("log_det", {"logdet_mismatch"}),
        ("sign", {"inverse_logdet_mismatch"}),
        ("inverse", {"inverse_mismatch"}),
    ],
)
def test_a_wrong_layer_is_found(mistake, codes):
    report = audit_model(flow(ActNorm(4), Wrong(mistake)), torch.randn(8, 4))
    assert set(report.codes) == codes
    assert report.verdict == "bug"
    assert any("layers.1" in finding.message for finding in report.findings)


def test_preprocessing_is_counted():
    model = Chain(
        [Dequantize(StandardUniform((4,)), 8), Rescale(1 / 8)], Prior(StandardNormal((4,)))
    )
    model.config = {"options": {"bits": 3}}
    assert audit_model(model, torch.randint(0, 8, (8, 4))).verdict == "correct"
    model.config = {"options": {"bits": 4}}
    assert "dequantisation" in audit_model(model, torch.randint(0, 8, (8, 4))).codes


class Halved(Rescale):
    """Counts half of its log-determinant."""

    def _log_det(self, x):
        return 0.5 * super()._log_det(x)


def test_miscounted_preprocessing():
    model = Chain(
        [Dequantize(StandardUniform((4,)), 8), Halved(1 / 8)], Prior(StandardNormal((4,)))
    )
    report = audit_model(model, torch.randint(0, 8, (8, 4)))
    assert report.codes == ("logdet_mismatch",)
    assert "layers.1" in report.findings[0].message


def test_a_collapsed_posterior_and_dead_units():
    torch.manual_seed(0)
    model = build("mlp_vae", (6,), bits=None, hidden=8, latents=3)
    encoder = model.encoder.net
    for head in (encoder.mean, encoder.scale):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    x = torch.randn(256, 6)
    assert audit_model(model, x).codes == ("posterior_collapse",)
    with torch.no_grad():
        encoder.mean.weight[0] = 0.2
        encoder.scale.bias[0] = -1.0
    assert "dead_units" in audit_model(model, x).codes
    with torch.no_grad():
        encoder.mean.bias[1] = 3.0
        encoder.mean.bias[2] = 3.0
    assert "aggregate_prior" in audit_model(model, x).codes


def test_saturated_scales():
    model = build("mlp_vae", (6,), bits=None, hidden=8, latents=3)
    with torch.no_grad():
        model.encoder.net.scale.bias.fill_(-100.0)
    assert "saturated_units" in audit_model(model, torch.randn(64, 6)).codes


def test_miscalibrated_latents_of_a_flow():
    model, x = flow(ActNorm(4)), 1 + 3 * torch.randn(512, 4)
    assert audit_model(model, x).codes == ("miscalibrated",)
    model.calibrate(x)
    assert audit_model(model, x).verdict == "correct"


def test_an_ill_conditioned_matrix():
    torch.manual_seed(0)
    conv = InvertibleConv(4, lu=False)
    with torch.no_grad():
        turned = torch.linalg.qr(torch.randn(4, 4))[0]
        conv.weight.copy_(turned @ torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-6])) @ turned.T)
    report = audit_model(flow(conv), torch.randn(8, 4))
    assert "ill_conditioned" in report.codes
    assert report.details["conditions"]["layers.0"] > 1e5


class NotFinite(Bijection):
    """A logarithm of anything."""

    def forward(self, x, context=None):
        return x.log(), -x.log().sum(1)

    def inverse(self, y, context=None):
        return y.exp(), y.sum(1)


def test_values_that_are_not_finite():
    assert "not_finite" in audit_model(flow(NotFinite()), torch.randn(8, 4)).codes


def test_a_wrong_closed_form(monkeypatch):
    from musigma.audit import models

    right = models.closed_kl
    monkeypatch.setattr(models, "closed_kl", lambda q, p: 2 * right(q, p) + 0.1)
    model = build("mlp_vae", (6,), bits=None, hidden=8, latents=3)
    assert "kl_mismatch" in audit_model(model).codes


def test_objects_that_are_not_models():
    with pytest.raises(AuditError, match="expected a model of musigma"):
        audit_model(nn.Linear(2, 2))
    with pytest.raises(AuditError, match="it raises"):
        audit_model(flow(ActNorm(4)), torch.randn(8, 5))
    assert isinstance(StandardNormal((4,))(), DiagonalGaussian)


@pytest.mark.parametrize("name", ["table", "nsf", "vae"])
def test_rows_with_missing_values(name):
    schema, rows = small_schema()
    model = build(name, Spec((4,), schema=schema))
    first = rows[np.isnan(rows).any(1).argsort()[::-1]]
    for x in (first, np.where(np.arange(4) == 3, np.nan, first)):  # a probability, and none
        report = audit_model(model, torch.tensor(x[:40]))
        assert not [f for f in report.findings if f.severity == "bug"], report
