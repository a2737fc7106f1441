"""Autoregressive priors of categorical latents."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from musigma import build
from musigma.distributions import AutoregressivePrior
from musigma.testing import check_head, check_model, randomized


def every(variables, classes):
    codes = torch.cartesian_prod(*[torch.arange(classes)] * variables)
    return F.one_hot(codes, classes).double()


def prior():
    torch.manual_seed(0)
    return randomized(AutoregressivePrior(3, 4, hidden=8), scale=3.0)()


def test_its_mass_is_one_and_its_draws_have_it():
    p, values = prior(), every(3, 4)
    with torch.no_grad():
        mass = p.log_prob(values).exp()
        assert abs(float(mass.sum()) - 1) < 1e-12
        marginals = torch.einsum("n,nlk,nmj->lkmj", mass, values, values)
        first, second = marginals[0, :, 0].diagonal(), marginals[2, :, 2].diagonal()
        assert (marginals[0, :, 2] - torch.outer(first, second)).abs().max() > 0.003  # dependent
        torch.manual_seed(1)
        codes = (p.sample((20_000,)).argmax(-1) * torch.tensor([16, 4, 1])).sum(-1)
    counts = torch.bincount(codes, minlength=64).numpy()
    assert stats.chisquare(counts, 20_000 * mass.numpy()).pvalue > 1e-3
    assert stats.chisquare(counts, 20_000 * mass.flip(0).numpy()).pvalue < 1e-3


@pytest.mark.parametrize("context", [0, 2])
def test_laws(context):
    torch.manual_seed(0)
    head = AutoregressivePrior(3, 4, hidden=8, context=context)
    if not context:
        check_head(head, None, (3, 4))
    options = {"posterior": "categorical classes=4", "prior": "autoregressive hidden=8"}
    model = build("vae", (5,), bits=None, latents=3, width=8, context=context, **options)
    check_model(model, (5,), context=context, pathwise=False)


def test_other_latents_are_refused():
    with pytest.raises(ValueError, match="for real vectors use 'maf'"):
        build("vae", (5,), bits=None, prior="autoregressive")
