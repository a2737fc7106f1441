"""nflows: its ready flows and two built from its transforms; the negative log-likelihood."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nflows import transforms
from nflows.distributions.normal import ConditionalDiagonalNormal, StandardNormal
from nflows.flows import Flow, MaskedAutoregressiveFlow, SimpleRealNVP

DISTRIBUTION = "nflows"
EXPECTED = dict.fromkeys(
    ["real_nvp", "real_nvp_batch_norm", "maf", "spline_coupling", "lu_householder", "conditional"],
    "correct",
)

Step = Callable[[], torch.Tensor]


def _step(flow: Flow, context: int = 0) -> Step:
    data = torch.randn(32, 4)
    given = torch.randn(32, context) if context else None
    flow.train()
    return lambda: -flow.log_prob(data, context=given).mean()


def make_real_nvp_step() -> Step:
    torch.manual_seed(0)
    return _step(SimpleRealNVP(4, 16, 3, 1))


def make_real_nvp_batch_norm_step() -> Step:
    torch.manual_seed(0)
    return _step(SimpleRealNVP(4, 16, 3, 1, batch_norm_between_layers=True))


def make_maf_step() -> Step:
    torch.manual_seed(0)
    return _step(MaskedAutoregressiveFlow(4, 16, 2, 1))


def make_spline_coupling_step() -> Step:
    torch.manual_seed(0)
    spline = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        4, 16, num_bins=5, tails="linear", tail_bound=3.0
    )
    stack = [spline, transforms.RandomPermutation(4), transforms.ActNorm(4)]
    return _step(Flow(transforms.CompositeTransform(stack), StandardNormal([4])))


def make_lu_householder_step() -> Step:
    torch.manual_seed(0)
    stack = [
        transforms.LULinear(4),
        transforms.LeakyReLU(),
        transforms.HouseholderSequence(4, 3),
        transforms.SVDLinear(4, 2),
    ]
    return _step(Flow(transforms.CompositeTransform(stack), StandardNormal([4])))


def make_conditional_step() -> Step:
    torch.manual_seed(0)
    transform = transforms.MaskedAffineAutoregressiveTransform(4, 16, context_features=2)
    base = ConditionalDiagonalNormal([4], context_encoder=torch.nn.Linear(2, 8))
    return _step(Flow(transform, base), context=2)
