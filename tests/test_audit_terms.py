"""Audits of densities, bits, bounds and terms: the expected codes on a corpus, and no others."""

import math

import numpy as np
import pytest
import torch
from torch import distributions as D

from corpus_terms import CASES, made
from musigma.audit import (
    AuditError,
    audit_bits,
    audit_density,
    audit_importance_bound,
    audit_log_prob_term,
    sandbox,
)
from musigma.audit.terms import is_log_prob_term

SEEDS = [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 20))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_corpus(name, seed):
    report, expected = made(name, seed), CASES[name]
    said = [(f.code, f.severity, f.message) for f in report.findings] or report.unchecked
    assert sorted(report.codes) == sorted(expected.codes), said
    assert report.verdict == expected.verdict, said
    assert report.checked or report.findings, said
    for field, value in expected.expected.items():
        assert getattr(report, field) == value


TERMS = [
    ("fixed", "w", "mu", "rho"),
    ("log_normal_diag", "x", "mean", "log_var"),
    ("gaussian_nll", "mu", "log_var", "x"),
    ("log_prior", "w"),
    ("log_variational_posterior", "w", "mu", "rho"),
    ("normal_logpdf", "sample", "mean", "logvar"),
]
NO_TERMS = [
    ("reparameterize", "mu", "log_var"),
    ("reparam", "eps", "mu", "log_var"),
    ("loss_function", "recon_x", "mu", "logvar"),
    ("kl_divergence", "z", "mu", "std"),
    ("forward", "x"),
    ("compute", "x", "mu", "logvar"),
    ("log_normal", "mu", "sigma"),
]


@pytest.mark.parametrize("words", TERMS + NO_TERMS, ids=" ".join)
def test_terms_are_recognized_by_their_names(words):
    name, *arguments = words
    scope = {}
    exec(f"def {name}({', '.join(arguments)}): ...", scope)
    assert is_log_prob_term(scope[name]) == (words in TERMS)


def test_a_term_of_weights_is_no_density_of_rows():
    weights = D.Normal(torch.randn(4, 5), 1.0)
    with pytest.raises(AuditError, match="not broadcastable"):
        audit_density(lambda w: weights.log_prob(w).sum(), 5)


def raises(*arguments):
    raise KeyError("no such prior")


def endless(*arguments):
    while True:
        pass


AUDITS = {
    "log_prob": lambda f: audit_density(f, 2),
    "bits": lambda f: audit_bits(f, 16, (1, 4, 4)),
    "loss_from_neg_elbos": audit_importance_bound,
    "term": audit_log_prob_term,
}


@pytest.mark.parametrize("name", AUDITS)
def test_a_callable_that_raises_is_named(name):
    with pytest.raises(AuditError, match=rf"{name}: given .*, it raises KeyError"):
        AUDITS[name](raises)


@pytest.mark.parametrize("name", AUDITS)
def test_a_callable_that_does_not_end_is_named(name, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    with pytest.raises(AuditError, match=rf"{name}: .* did not end"):
        AUDITS[name](endless)


@pytest.mark.parametrize("name", AUDITS)
@pytest.mark.parametrize(
    "value", [None, "nats", torch.zeros(3, 5, 7)], ids=["none", "str", "shape"]
)
def test_a_callable_that_returns_something_else_is_named(name, value):
    with pytest.raises(AuditError, match=name):
        AUDITS[name](lambda *a: value)


def test_values_that_are_not_finite():
    assert audit_bits(lambda x: x.flatten(1).sum(1) * math.nan, 16, (1, 4, 4)).codes == (
        "not_finite",
    )
    assert audit_log_prob_term(lambda z: z.sum() * math.nan).codes == ("not_finite",)
    with pytest.raises(AuditError, match="no mass"):
        audit_density(lambda x: x[:, 0] * math.nan, 1)
    density = lambda x: D.Normal(0.0, 1.0).log_prob(x[:, 0]) + 0 * (x[:, 0].abs() - 0.5).log()  # noqa: E731
    hole = lambda x: torch.where((x[:, 0].abs() < 0.5), math.nan, density(x))  # noqa: E731
    assert audit_density(hole, 1).codes == ("not_finite",)


@pytest.mark.parametrize(
    "call",
    [
        lambda: audit_density(D.Normal(0.0, 1.0), 0),
        lambda: audit_bits(lambda x: 8.0, 1),
        lambda: audit_log_prob_term(lambda z: z, sign=0),
    ],
)
def test_arguments_are_checked(call):
    with pytest.raises(AuditError, match="expected"):
        call()


def test_the_random_state_is_unchanged():
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    for name in ("density_mixture_4d", "bits_each", "bound_mean", "term_torch"):
        CASES[name].call()
    assert (states[1] == np.random.get_state()[1]).all()
    assert torch.get_default_dtype() == torch.float32
