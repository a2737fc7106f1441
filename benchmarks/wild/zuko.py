"""zuko: the negative log-likelihood of its flows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import zuko

DISTRIBUTION = "zuko"
EXPECTED = dict.fromkeys(["maf", "nsf", "nice", "naf", "gmm", "bpf", "sospf", "cnf"], "correct")
EXPECTED["gmm"] = "incomplete"

Step = Callable[[], torch.Tensor]


def _step(flow: zuko.lazy.LazyDistribution) -> Step:
    data, given = torch.randn(32, 3), torch.randn(32, 2)
    flow.train()
    return lambda: -flow(given).log_prob(data).mean()


def _make(kind: str, **options: object) -> Step:
    torch.manual_seed(0)
    return _step(getattr(zuko.flows, kind)(3, 2, **options))


def make_maf_step() -> Step:
    return _make("MAF", transforms=2, hidden_features=(16,))


def make_nsf_step() -> Step:
    return _make("NSF", transforms=2, hidden_features=(16,))


def make_nice_step() -> Step:
    return _make("NICE", transforms=2, hidden_features=(16,))


def make_naf_step() -> Step:
    return _make("NAF", transforms=2, hidden_features=(16,))


def make_bpf_step() -> Step:
    return _make("BPF", transforms=2, hidden_features=(16,))


def make_sospf_step() -> Step:
    return _make("SOSPF", transforms=2, hidden_features=(16,))


def make_gmm_step() -> Step:
    return _make("GMM", components=3, hidden_features=(16,))


def make_cnf_step() -> Step:
    return _make("CNF", hidden_features=(16,))
