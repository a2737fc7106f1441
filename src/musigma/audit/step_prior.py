"""The prior in a KL divergence whose mean and scale are computed, and the constants of a KL."""

from __future__ import annotations

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Origin
from musigma.audit.latents import REDUCTIONS, Latent, frontier
from musigma.audit.probes import Over, Prober, Probes
from musigma.audit.step_kl import LINEAR, Divergence, Fit, data_terms, fit_moments, terms

__all__ = ["kl_offset", "prior_error"]


def prior_error(graph: Graph, latent: Latent, loss: int, d: Divergence) -> float | None:
    r"""How far the loss is from a KL to the prior when the heads of the prior are moved.

    The loss as a function of the heads of q has shown the prior's mean c and scale p. With other
    values for the prior's own heads, these become c' and p', and the loss must change by
    KL(q | N(c', p')) - KL(q | N(c, p)): a loss without log p, say, does not.

    Returns:
        The error relative to the change; None if the prior has no heads, or if more than the
        prior changes.
    """
    if d.fit is None or not latent.diagonal:
        return None
    own = _prior_heads(graph, latent, loss, d)
    if not own:
        return None
    generator = torch.Generator().manual_seed(29)
    moved = {
        i: graph.get(i) + 0.6 * torch.rand(graph[i].shape, generator=generator).double()
        for i in own
    }
    found = []
    for fixed in ({i: graph.get(i) for i in own}, moved):
        prober = Prober(graph, latent, d.heads, fixed)
        probes = prober.measure(loss, d.held, d.by_draws) if prober.usable else None
        if probes is None:
            return None
        fit = fit_moments(probes, d.fit.copies)
        if not fit.is_kl:
            return None
        found.append((prober, probes, fit))
    weights = [-fit.scale[1] for _, _, fit in found]
    if not torch.allclose(weights[0], weights[1], rtol=1e-4):
        return None
    values = [_divergences(*each) for each in found]
    if values[0] is None or values[1] is None:
        return None
    losses = [torch.tensor(probes.values) for _, probes, _ in found]
    expected = values[1] - values[0]
    error = (losses[1] - losses[0] - expected).abs().max()
    size = expected.abs().max() + (losses[1] - losses[0]).abs().max()
    return float(error / size) if float(size) > 1e-9 else 0.0


def _prior_heads(graph: Graph, latent: Latent, loss: int, d: Divergence) -> list[int]:
    """The values by layers, or parameters, that meet the heads of q entry by entry."""
    live = graph.upstream([loss], stop=d.held)
    own = {latent.z, *latent.heads}
    region, todo = set(own), list(own)
    sides: list[int] = []
    met: list[int] = []
    after = graph.downstream(own, stop=d.held) - set(d.held)
    while todo:
        i = todo.pop()
        for node in graph[i].users:
            outs = [o for o in node.outs if o in live and o not in d.held]
            if not outs or not (node.pointwise or node.view) or node.name in REDUCTIONS:
                continue
            beside = [k for k in node.ins if k not in after]
            sides += beside
            met += outs if beside else []
            todo += [o for o in outs if o not in region]
            region.update(outs)
    sides = [i for i in dict.fromkeys(sides) if graph[i].origin & Origin.PARAMETERS]
    found = [i for i in frontier(graph, sides, stops=own | set(d.held)) if i not in own]
    return [i for i in found if _meets(graph, d, i, met)]


def _meets(graph: Graph, d: Divergence, i: int, met: list[int]) -> bool:
    """Whether a value moves an entry of some values that the heads of q move as well."""
    moved = {h: graph.get(h) + 0.37 for h in d.heads}
    for o in met:
        base = graph.get(o)
        by_heads, by_it = (graph.value({**d.held, **over}, o) != base
                           for over in (moved, {i: graph.get(i) + 0.37}))  # fmt: skip
        if bool((by_heads & by_it).any()):
            return True
    return False


def _divergences(prober: Prober, probes: Probes, fit: Fit) -> Tensor | None:
    """The weighted KL at each place, by the prior that the fit has found."""
    entries = prober.latents().round().long()
    means, scales = probes.moving
    order = [entries[means & ~scales], entries[scales & ~means]]
    if (means & scales).any() or not all(len(o) for o in order):
        return None
    c, p = fit.prior
    values = []
    for place in prober.places:
        over: Over = {**prober.fixed, **place}
        with torch.no_grad():
            mean, sigma = prober.latent.moments(prober.graph, over)
        mean, sigma = mean.reshape(-1), sigma.abs().reshape(-1)
        n = mean.numel()
        centre, width, weight = mean.new_zeros(n), mean.new_ones(n), mean.new_zeros(n)
        if max(len(o) for o in order) != n or len(order[0]) != len(order[1]):
            return None
        centre[order[0]], width[order[1]], weight[order[1]] = c, p, -fit.scale[1]
        square = (sigma**2 + (mean - centre) ** 2) / (2 * width**2)
        values.append((weight * (square + (width / sigma).log() - 0.5)).sum())
    return torch.stack(values)


def kl_offset(graph: Graph, latent: Latent, loss: int, d: Divergence) -> float | None:
    """What is left of the KL where q is the prior N(0, 1), in nats; None if it is not known."""
    if d.fit is None or not latent.diagonal or d.by_draws or not d.fit.is_standard:
        return None
    after = graph.downstream([latent.z, *d.heads], stop=d.held)
    parts = _subtotals(graph, latent, loss, after, d)
    if not parts:
        return None
    leaves = {i: graph.get(i).double().clone().requires_grad_() for i in parts}
    value = graph.run({**d.held, **leaves}, [loss])[loss]
    if not value.requires_grad:
        return None
    slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    if any(s is None for s in slopes):
        return None
    prober = Prober(graph, latent, d.heads)
    place = prober.places[0]
    now = graph.run({**d.held, **{i: t.detach() for i, t in place.items()}}, parts)
    got = sum(float((s * now[i]).sum()) for s, i in zip(slopes, parts, strict=True))
    with torch.no_grad():
        mean, sigma = latent.moments(graph, place)
    weight = -float(d.fit.scale[1].nanmedian())
    if float((-d.fit.scale[1] - weight).abs().max()) > 1e-6 * weight:
        return None
    kl = 0.5 * (mean**2 + sigma**2 - 1) - sigma.abs().log()
    return (got - weight * float(kl.sum())) / weight


def _subtotals(
    graph: Graph, latent: Latent, loss: int, after: set[int], d: Divergence
) -> list[int]:
    """The largest sums in a loss whose terms all depend on the heads, with the decoder held."""
    found: list[int] = []
    todo = [loss]
    stop = {*d.heads, *d.held}
    data = set(data_terms(graph, [latent], loss))
    while todo:
        i = todo.pop()
        parts = [t for t in terms(graph, i, stop) if graph[t].origin or graph[t].draws]
        own = [t for t in parts if t in after and t not in d.held]
        if data.intersection(own):
            return []
        if not own:
            continue
        node = graph[i].node
        if len(own) == len(parts):
            found.append(i)
        elif node is not None and (node.name in LINEAR or node.name in ("mul", "div")):
            todo += [j for j in node.ins if graph[j].floating]
        else:
            return []
    return list(dict.fromkeys(found))
