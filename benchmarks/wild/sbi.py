"""sbi: the loss of neural posterior estimation for each of its density estimators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sbi.neural_nets.net_builders import (
    build_made,
    build_maf,
    build_maf_rqs,
    build_mdn,
    build_nsf,
    build_zuko_maf,
    build_zuko_nsf,
)

DISTRIBUTION = "sbi"
EXPECTED = dict.fromkeys(["maf", "maf_rqs", "nsf", "zuko_maf", "zuko_nsf"], "correct")
EXPECTED |= {"mdn": "incomplete", "made": "correct"}

Step = Callable[[], torch.Tensor]


def _step(build: Callable[..., torch.nn.Module], **options: object) -> Step:
    torch.manual_seed(0)
    theta, x = 3 * torch.randn(32, 3) + 1, torch.randn(32, 2)
    estimator = build(theta, x, **options).train()
    return lambda: estimator.loss(theta, x).mean()


def make_maf_step() -> Step:
    return _step(build_maf, hidden_features=16, num_transforms=2)


def make_maf_rqs_step() -> Step:
    return _step(build_maf_rqs, hidden_features=16, num_transforms=2)


def make_nsf_step() -> Step:
    return _step(build_nsf, hidden_features=16, num_transforms=2)


def make_zuko_maf_step() -> Step:
    return _step(build_zuko_maf, hidden_features=16, num_transforms=2)


def make_zuko_nsf_step() -> Step:
    return _step(build_zuko_nsf, hidden_features=16, num_transforms=2)


def make_made_step() -> Step:
    return _step(build_made, hidden_features=16, num_mixture_components=2)


def make_mdn_step() -> Step:
    return _step(build_mdn, hidden_features=16)
