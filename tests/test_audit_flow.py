"""The audit of flows: the expected verdict and codes on a corpus, and no others."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import AbsTransform, SigmoidTransform

from corpus_flow import FLOWS, ActNorm, Conv1x1, Coupling, conv, images, made
from musigma.audit import AuditError, audit_flow, sandbox
from musigma.zoo import build

SEEDS = [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 20))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FLOWS)
def test_corpus(name, seed):
    report = audit_flow(**made(name, seed))
    said = [(f.code, f.severity, f.message) for f in report.findings]
    assert sorted(report.codes) == sorted(FLOWS[name].codes), said
    assert report.verdict == FLOWS[name].verdict, said


def test_half_of_the_corpus_is_correct():
    verdicts = [case.verdict for case in FLOWS.values()]
    assert len(verdicts) >= 80
    assert verdicts.count("correct") >= 0.45 * len(verdicts)


def test_a_flow_that_asserts_float32():
    def forward(x):
        assert x.dtype == torch.float32
        return 2 * x, torch.full((len(x),), 3 * 0.6931472)

    report = audit_flow(forward, lambda z: z / 2, torch.randn(8, 3))
    assert report.verdict == "correct"
    assert "it computes in float32 only: tolerances are wider" in report.assumed


# --- what cannot be looked at -------------------------------------------------------------------


def raises(x):
    raise KeyError("no such layer")


def endless(x):
    while True:
        pass


def test_a_forward_that_raises_is_named():
    with pytest.raises(AuditError, match=r"forward: given \(\d, 4\), it raises KeyError"):
        audit_flow(raises, example=torch.randn(8, 4))


def test_a_forward_that_does_not_end_is_named(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    with pytest.raises(AuditError, match=r"forward: .* did not end within 0.3 s"):
        audit_flow(endless, example=torch.randn(8, 4))
    with pytest.raises(AuditError, match=r"inverse: .* did not end within 0.3 s"):
        audit_flow(lambda x: (x, 0.0), endless, torch.randn(8, 4))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: None, "expected .z, log_det.; got NoneType"),
        (lambda x: "z", "expected .z, log_det.; got str"),
        (lambda x: (x[:, :2], 0.0), "2 numbers for each example, and x 4"),
        (lambda x: (torch.cat([x, x], 1), 0.0), "8 numbers for each example, and x 4"),
        (lambda x: (x.sum(), 0.0), "expected 5 examples|expected 8 examples"),
        (3, "expected a callable; got int"),
    ],
)
def test_objects_that_are_not_flows(forward, message):
    with pytest.raises(AuditError, match=message):
        audit_flow(forward, example=torch.randn(8, 4))


@pytest.mark.parametrize("example", [None, torch.zeros(0, 3), torch.tensor(1.0), [1.0]])
def test_an_example_is_needed(example):
    with pytest.raises(AuditError, match="example: "):
        audit_flow(lambda x: (x, 0.0), example=example)


def test_an_example_with_nan_is_refused():
    with pytest.raises(AuditError, match="finite"):
        audit_flow(lambda x: (x, 0.0), example=torch.full((4, 3), torch.nan))


def test_transforms_say_that_they_are_no_bijections():
    with pytest.raises(AuditError, match="not bijective"):
        audit_flow(AbsTransform(), example=torch.randn(8, 3))


def test_an_example_outside_of_the_domain_of_a_transform():
    with pytest.raises(AuditError, match="expected the transform's domain"):
        audit_flow(SigmoidTransform().inv, example=torch.randn(8, 3))


def test_the_error_of_an_iterative_inverse_is_named():
    (finding,) = audit_flow(**made("newton_steps", 0)).findings
    assert "the inverse iterates and stops early" in finding.message
    assert 1e-8 < finding.numbers["error"] < 1e-3


def test_rounding_is_no_finding():
    report = audit_flow(**made("rotation_stored_in_float32", 0))
    (line,) = [line for line in report.checked if line.startswith("round trip")]
    assert "by rounding" in line


def test_what_is_missing_is_named():
    report = audit_flow(lambda x: 2 * x, lambda z: z / 2, torch.randn(8, 3))
    assert report.verdict == "incomplete"
    assert report.missing == ("the log-determinant: forward returns none",)
    assert any("round trip" in line for line in report.checked)


def test_an_inverse_of_another_shape():
    report = audit_flow(lambda x: (x, 0.0), lambda z: z[:, :2], torch.randn(8, 4))
    assert report.codes == ("inverse_mismatch",)


@pytest.mark.parametrize(
    "name",
    ["actnorm", "batch_norm_training", "conv1x1_cached", "coupling_affine", "sequence_of_layers"],
)
def test_the_flow_is_unchanged_afterwards(name):
    torch.manual_seed(3)
    arguments = made(name, 0)
    module = arguments["forward"]
    module.training = True
    before = {k: v.clone() for k, v in module.state_dict().items()}
    plain = {k: dict(m.__dict__) for k, m in module.named_modules()}
    random = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    audit_flow(**arguments)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(v.dtype == before[k].dtype for k, v in module.state_dict().items())
    for k, m in module.named_modules():
        assert m.__dict__.keys() == plain[k].keys()
        assert m.training == plain[k]["training"]
        for key, value in plain[k].items():
            if not isinstance(value, (dict, torch.Tensor)):
                assert m.__dict__[key] is value
    assert torch.equal(random[0], torch.random.get_rng_state())
    assert (random[1] == np.random.get_state()[1]).all()
    assert torch.get_default_dtype() == torch.float32


def test_the_wrong_layer_is_named():
    report = audit_flow(**made("sequence_with_a_wrong_layer", 0))
    (finding,) = report.findings
    assert finding.numbers["layer"].startswith("1 (Conv1x1)")
    assert "the number of pixels" in finding.message


def test_the_layer_that_does_not_invert_is_named():
    torch.manual_seed(0)
    layers = [ActNorm(4), Conv1x1(4, wrong="transpose"), Coupling(conv(2, 4))]
    report = audit_flow(nn.Sequential(*layers), example=images(4))
    (finding,) = report.findings
    assert finding.code == "inverse_mismatch"
    assert finding.numbers["layer"] == "1 (Conv1x1)"


class Wide(nn.Module):
    """A step of Glow."""

    def __init__(self, wrong=""):
        super().__init__()
        self.norm, self.mix = ActNorm(12), Conv1x1(12, wrong=wrong)
        self.couple = Coupling(conv(6, 12, hidden=32))

    def forward(self, x):
        x, a = self.norm(x)
        x, b = self.mix(x)
        x, c = self.couple(x)
        return x, a + b + c

    def inverse(self, z):
        return self.norm.inverse(self.mix.inverse(self.couple.inverse(z)))


class Unshuffle(nn.Module):
    def forward(self, x):
        return F.pixel_unshuffle(x, 2), torch.zeros(len(x))

    def inverse(self, z):
        return F.pixel_shuffle(z, 2)


@pytest.mark.slow
def test_the_one_wrong_step_of_32_on_3x32x32_is_named():
    torch.manual_seed(0)
    steps = [Wide("one side" if i == 17 else "") for i in range(32)]
    report = audit_flow(nn.Sequential(Unshuffle(), *steps), example=images(3, 32, 4))
    assert "logdet_mismatch" in report.codes
    mismatch = next(f for f in report.findings if f.code == "logdet_mismatch")
    assert mismatch.numbers["layer"] == "18.mix (Conv1x1)"


def test_steps_of_this_library_with_channels_last_weights():
    torch.manual_seed(0)
    glow = build("glow", (3, 8, 8), bits=None, levels=1, depth=2, hidden=6)
    report = audit_flow(list(glow.layers), example=images(3, 8, 4))
    assert report.verdict == "correct", report.findings


@pytest.mark.slow
def test_32_correct_steps():
    torch.manual_seed(0)
    steps = [Wide() for _ in range(32)]
    report = audit_flow(nn.Sequential(Unshuffle(), *steps), example=images(3, 32, 4))
    assert report.verdict != "bug", report.findings
    assert len(report.details["conditions"]) > 32
