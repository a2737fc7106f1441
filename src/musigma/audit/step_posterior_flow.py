"""Flows between the draw of a latent and its prior, or on data that a latent is added to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from musigma.audit.change_of_variables import Change, Output, measure, outputs
from musigma.audit.findings import Outcome
from musigma.audit.graph import Graph, Origin
from musigma.audit.latents import Latent, holds
from musigma.audit.probes import Prober
from musigma.audit.step_flow import changes, explain
from musigma.audit.step_kl import View, data_terms

__all__ = ["check_dequantized_flow", "check_posterior_flow", "layers_before_prior"]


def layers_before_prior(prober: Prober, loss: int) -> bool:
    """Whether layers get z whose results reach the loss, but are not compared with data.

    So it is with a flow on the posterior, or in the prior.
    """
    graph, latent = prober.graph, prober.latent
    held, layers = _held(graph, latent, loss), holds(graph, latent)
    slopes = []
    for over in (held, held | layers):
        heads = {i: graph.get(i) for i in latent.heads}
        z = graph.get(latent.z).clone().requires_grad_()
        value = graph.run({**over, **heads, latent.z: z}, [loss])[loss].sum()
        (slope,) = torch.autograd.grad(value, z) if value.requires_grad else (0 * z.detach(),)
        slopes.append(slope)
    return not torch.allclose(*slopes, rtol=1e-6, atol=1e-9) or any(
        change.is_gaussian and graph.upstream(change.parts, stop=[latent.z]).intersection(layers)
        for change in _maps(prober, loss)
    )


def _held(graph: Graph, latent: Latent, loss: int) -> dict[int, Tensor]:
    """The terms with data, and the layers whose results go straight into such a term."""
    data = data_terms(graph, [latent], loss)
    decoder = holds(graph, latent)
    above = graph.upstream(data, stop=decoder)
    return {i: graph.get(i) for i in (*data, *(i for i in decoder if i in above))}


def _outside(graph: Graph, latent: Latent, output: Output) -> dict[int, Tensor]:
    """The layers that z or the heads are given to, but those of a map that begins at z."""
    above = graph.upstream(output.parts, stop=[latent.z])
    weights = {i for i in above if graph[i].kind == "parameter"}
    after = graph.downstream([latent.z])
    found = {}
    for i, t in holds(graph, latent).items():
        node = graph[i].node
        if node is None or node.view:
            continue
        beside = graph.upstream([k for k in node.ins if k not in after])
        if i not in after or (i not in above and not weights & beside):
            found[i] = t
    return found


def check_posterior_flow(prober: Prober, loss: int) -> list[Outcome]:
    """Examine a flow between the draw of a latent and its prior; nothing if there is none."""
    return explain(_maps(prober, loss))


def _maps(prober: Prober, loss: int) -> Iterator[Change]:
    """What z may be mapped to, in a loss that has log q(z), whose change is taken off."""
    graph, latent = prober.graph, prober.latent
    found = [output for output in outputs(graph, loss, latent.z) if output.squared]
    if not found or not latent.diagonal or not prober.usable:
        return
    heads = {i: graph.get(i) for i in latent.heads}
    mean, sigma = latent.moments(graph, {})
    for output in found:
        held = _outside(graph, latent, output)
        log_q = View(prober, loss, held).log_q
        if log_q is None:
            continue
        change = measure(graph, loss, latent.z, output, {**held, **heads}, parameters=False)
        if change is None or not change.quadratic:
            continue
        if log_q.drawn:
            moved = torch.stack([-0.5 * (((z - mean) / sigma) ** 2).sum() for z in change.places])
            rest = change.rest - log_q.weight * (moved[1:] - moved[0]).detach()
            change = replace(change, rest=rest)
        yield replace(change, weight=log_q.weight)


def check_dequantized_flow(
    graph: Graph, loss: int, latent: Latent, weight: float
) -> list[Outcome]:
    """Examine a flow of data to which a latent is added or appended; nothing if there is none.

    With the sum, or both together, as the flow's input, log q of the latent is a constant; the
    log-determinant must have its weight.
    """
    after = graph.downstream([latent.z]) & graph.upstream([loss])
    size = graph[latent.z].numel
    joined: list[int] = []
    for v in graph.values:
        if v.id in after and v.node is not None:
            data = [graph[i].numel for i in v.node.ins if graph[i].origin == Origin.DATA]
            sizes = (size, size + sum(data))
            if max(data, default=0) > 1 and v.numel in sizes:
                joined.append(v.id)
    found = (replace(c, weight=weight) for x in joined for c in changes(graph, loss, x))
    return explain(c for c in found if c.moves_volume)
