"""Flows between the draw of a latent and its prior, or on data that a latent is added to."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Origin
from musigma.audit.latents import Latent, holds
from musigma.audit.probes import Prober
from musigma.audit.step_flow import (
    Change,
    change_of,
    changes,
    mismatch,
    outputs,
    report_flow,
    report_stops_and_folds,
)
from musigma.audit.step_kl import View, data_terms

if TYPE_CHECKING:
    from musigma.audit.step import StepAudit

__all__ = ["judge_dequantized_flow", "judge_posterior_flow", "layers_before_prior"]


def layers_before_prior(graph: Graph, latent: Latent, latents: list[Latent], loss: int) -> bool:
    """Whether layers get z whose results reach the loss, but are not compared with data.

    So it is with a flow on the posterior, or in the prior. Steps with several latents are not
    looked at.
    """
    if len(latents) > 1:
        return False
    held = _held(graph, latent, latents, loss)
    slopes = []
    for over in (held, held | holds(graph, latent)):
        heads = {i: graph.get(i) for i in latent.heads}
        z = graph.get(latent.z).clone().requires_grad_()
        value = graph.run({**over, **heads, latent.z: z}, [loss])[loss].sum()
        (slope,) = torch.autograd.grad(value, z) if value.requires_grad else (0 * z.detach(),)
        slopes.append(slope)
    return not torch.allclose(*slopes, rtol=1e-6, atol=1e-9)


def _held(graph: Graph, latent: Latent, latents: list[Latent], loss: int) -> dict[int, Tensor]:
    """The terms with data, and the layers whose results go straight into such a term."""
    data = data_terms(graph, latents, loss)
    decoder = holds(graph, latent)
    above = graph.upstream(data, stop=decoder)
    return {i: graph.get(i) for i in (*data, *(i for i in decoder if i in above))}


def judge_posterior_flow(
    audit: StepAudit, latent: Latent, latents: list[Latent], view: View
) -> bool:
    """Examine a flow between the draw of a latent and its prior; False if there is none."""
    graph, loss = audit.graph, audit.loss
    prober = Prober(graph, latent)
    if not latent.diagonal or not prober.usable:
        return False
    held = _held(graph, latent, latents, loss)
    log_q = View(prober, loss, held).log_q
    if log_q is None:
        return _is_prior_at_start(audit, latent, held, view)
    weight, drawn = log_q.weight, log_q.drawn
    heads = {i: graph.get(i) for i in latent.heads}
    mean, sigma = latent.moments(graph, {})
    wrong: list[Change] = []
    for parts, squared, _ in outputs(graph, loss, latent.z):
        change = change_of(graph, loss, latent.z, parts, {**held, **heads}, parameters=False)
        if change is None or float(change.log_det.abs().max()) < 1e-9:
            continue
        if drawn:
            log_density = [
                -0.5 * (((z - mean) / sigma) ** 2).sum().detach() for z in change.places
            ]
            moved = torch.stack(log_density)
            change = replace(change, rest=change.rest - weight * (moved[1:] - moved[0]))
        factor = change.factor
        gaussian = change.quadratic and bool(((change.curvature / weight - 1).abs() < 1e-3).all())
        if factor is not None and abs(factor / weight + 1) < 1e-3 and gaussian:
            where = graph.where(parts[0])
            audit.checked.append(
                "the log-determinant of the flow on z is that of autograd's Jacobian, and its "
                f"prior is N(0, 1) ({where.rsplit('/', 1)[-1]})"
            )
            report_stops_and_folds(audit, change)
            return True
        if squared and gaussian:
            wrong.append(change)
    for change in wrong:
        mismatch(audit, change)
        return True
    return False


def judge_dequantized_flow(audit: StepAudit, latent: Latent, weight: float) -> bool:
    """Examine a flow of data to which a latent is added; False if there is none.

    With the sum as the flow's input, log q of the latent is a constant; the log-determinant must
    have its weight.
    """
    graph, loss = audit.graph, audit.loss
    after = graph.downstream([latent.z]) & graph.upstream([loss])
    wrong: list[Change] = []
    for v in graph.values:
        if v.id not in after or v.node is None or v.numel != graph[latent.z].numel:
            continue
        if not any(graph[i].origin == Origin.DATA and graph[i].numel > 1 for i in v.node.ins):
            continue
        for change, judged in changes(graph, loss, v.id):
            factor = change.factor
            if float(change.log_det.abs().max()) < 1e-9:
                continue
            if factor is not None and abs(factor / weight + 1) < 1e-3:
                return report_flow(audit, change, factor)
            wrong += [change] if judged else []
    for change in wrong:
        mismatch(audit, change)
        return True
    return False


def _is_prior_at_start(
    audit: StepAudit, latent: Latent, held: dict[int, Tensor], view: View
) -> bool:
    """Report a closed KL of z to N(0, 1) beside the log-determinant of a flow on z."""
    graph, loss = audit.graph, audit.loss
    if view.by_draws or not view.fit.is_kl:
        return False
    heads = {i: graph.get(i) for i in latent.heads}
    for parts, *_ in outputs(graph, loss, latent.z):
        change = change_of(graph, loss, latent.z, parts, {**held, **heads}, parameters=False)
        if change is not None and change.factor is not None and change.factor < 0:
            audit.bug("kl_mismatch", "step flow", where=graph.where(parts[0]))
            return True
    return False
