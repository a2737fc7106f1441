"""Flows of vectors: spline couplings, autoregressive splines and MAF, in 8 and 43 dimensions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.speed.harness import Contender, Subject, Unavailable, Workload, peer_module
from benchmarks.speed.ours import contenders, subject, trainable
from musigma import Model, build

__all__ = ["WORKLOADS", "model", "ours"]

Flow = Literal["nsf-c", "nsf-ar", "maf"]
FLOWS: dict[Flow, str] = {
    "nsf-c": "NSF coupling",
    "nsf-ar": "NSF autoregressive",
    "maf": "MAF",
}
BATCH, TRANSFORMS, HIDDEN, BINS, LR = 512, 5, 128, 8, 1e-3


def model(flow: Flow, dims: int) -> Model:
    """musigma's model as the peers have it: reversals between transforms, no normalization."""
    options: dict[str, Any] = {"bits": None, "depth": TRANSFORMS, "hidden": HIDDEN}
    options |= {"permutation": "reverse", "norm": False}
    if flow == "maf":
        return build("maf", (dims,), **options)
    kind = "coupling" if flow == "nsf-c" else "autoregressive"
    return build("nsf", (dims,), kind=kind, bins=BINS, **options)


def ours(flow: Flow, dims: int, *, fast: bool = False) -> Subject:
    """musigma."""
    return subject(
        model(flow, dims),
        torch.randn(BATCH, dims),
        lr=LR,
        fast=fast,
        draws=BATCH,
        density=True,
    )


def peer(
    model: nn.Module,
    dims: int,
    log_prob: Callable[[Tensor], Tensor],
    sample: Callable[[int], object],
    note: str = "",
) -> Subject:
    """A peer's model in a plain loop."""
    x = torch.randn(BATCH, dims)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def loss() -> Tensor:
        return -log_prob(x).mean()

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    calls = {"step": step, "log_prob": lambda: log_prob(x), "sample": lambda: sample(BATCH)}
    parameters = trainable(model.parameters())
    return Subject(calls, model=model, loss=loss, parameters=parameters, note=note)


def zuko(flow: Flow, dims: int) -> Subject:
    """zuko: masked perceptrons, in couplings too."""
    flows = peer_module("zuko").flows
    options = {"transforms": TRANSFORMS, "hidden_features": (HIDDEN, HIDDEN)}
    if flow == "maf":
        m = flows.MAF(dims, **options)
    else:
        passes = {"passes": 2} if flow == "nsf-c" else {}
        m = flows.NSF(dims, bins=BINS, **passes, **options)
    return peer(m, dims, lambda x: m().log_prob(x), lambda n: m().sample((n,)))


def nflows(flow: Flow, dims: int) -> Subject:
    """nflows: residual networks with one block (two layers of the same width)."""
    transforms, nets = peer_module("nflows.transforms"), peer_module("nflows.nn.nets")
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": 5.0}

    def net(inputs: int, outputs: int) -> nn.Module:
        return nets.ResidualNet(inputs, outputs, HIDDEN, num_blocks=1)

    parts = []
    for i in range(TRANSFORMS):
        parts.append(transforms.ReversePermutation(dims))
        if flow == "nsf-ar":
            kind = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
            parts.append(kind(dims, HIDDEN, num_blocks=1, **spline))
        elif flow == "maf":
            parts.append(
                transforms.MaskedAffineAutoregressiveTransform(dims, HIDDEN, num_blocks=1)
            )
        else:
            mask = peer_module("nflows.utils").create_alternating_binary_mask(
                dims, even=i % 2 == 0
            )
            kind = transforms.PiecewiseRationalQuadraticCouplingTransform
            parts.append(kind(mask, net, **spline))
    base = peer_module("nflows.distributions").StandardNormal([dims])
    m = peer_module("nflows.flows").Flow(transforms.CompositeTransform(parts), base)
    return peer(m, dims, m.log_prob, m.sample, "residual networks")


def normflows(flow: Flow, dims: int) -> Subject:
    """normflows: residual networks; its MAF computes densities sequentially and is left out."""
    if flow == "maf":
        raise Unavailable("its MAF is an inverse autoregressive flow: log_prob is sequential")
    nf = peer_module("normflows")
    spline = {"num_bins": BINS, "tail_bound": 5}
    parts = []
    for i in range(TRANSFORMS):
        if flow == "nsf-ar":
            parts.append(nf.flows.AutoregressiveRationalQuadraticSpline(dims, 1, HIDDEN, **spline))
            parts.append(nf.flows.Permute(dims, mode="swap"))
        else:
            kind = nf.flows.CoupledRationalQuadraticSpline
            parts.append(kind(dims, 1, HIDDEN, reverse_mask=i % 2 == 1, **spline))
    m = nf.NormalizingFlow(nf.distributions.DiagGaussian(dims, trainable=False), parts)
    return peer(m, dims, m.log_prob, lambda n: m.sample(n), "residual networks")


def _workload(flow: Flow, dims: int, about: str) -> Workload:
    peers = [
        Contender(setup.__name__, functools.partial(setup, flow, dims), needs=(setup.__name__,))
        for setup in (zuko, nflows, normflows)
    ]
    return Workload(
        f"{flow}-{dims}",
        f"{about}, D={dims}, batch {BATCH}, {TRANSFORMS} transforms, hidden ({HIDDEN}, {HIDDEN})"
        + (f", {BINS} bins" if flow != "maf" else ""),
        BATCH,
        ("step", "log_prob", "sample"),
        (*contenders(functools.partial(ours, flow, dims)), *peers),
    )


WORKLOADS = tuple(
    _workload(flow, dims, about) for flow, about in FLOWS.items() for dims in (8, 43)
)
