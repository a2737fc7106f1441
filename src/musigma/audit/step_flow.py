"""Flows in a recorded step: as a likelihood of data, on a posterior, or as a prior."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from musigma.audit.change_of_variables import (
    EXACT,
    MOVES,
    ROUNDING,
    Change,
    Output,
    ends,
    is_residual,
    measure,
    outputs,
    squared,
)
from musigma.audit.findings import Finding, Missing, Outcome, Passed, Skipped, bug, warning
from musigma.audit.graph import Graph, Origin, Value
from musigma.audit.latents import Latent, holds
from musigma.audit.probes import Prober, gradient
from musigma.audit.runs import at, unexamined
from musigma.audit.step_kl import View, data_terms, terms
from musigma.audit.step_prior import log_integral

__all__ = [
    "check_dequantization",
    "check_dequantized_flow",
    "check_flow",
    "check_flow_of_noise",
    "check_posterior_flow",
    "layers_before_prior",
]

MOST_ERROR = 0.1  # of the change of the log-determinant by a differential equation's solver
UNSEEN = 0.01 * math.log(2)  # nats per dimension: figures in bits have two decimals
LOSSES = ("mse_loss", "l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits",
          "nll_loss_forward", "smooth_l1_loss", "huber_loss")  # fmt: skip


def check_flow(graph: Graph, loss: int) -> list[Outcome]:
    """Examine a step without latents as the likelihood of a flow; nothing if it is none."""
    return _explain(c for x in _inputs(graph, loss) for c in _changes(graph, loss, x))


def _changes(graph: Graph, loss: int, x: int) -> Iterator[Change]:
    """What x may be mapped to."""
    for output in outputs(graph, loss, x):
        change = measure(graph, loss, x, output, {i: graph.get(i) for i in output.heads})
        if change is not None:
            yield change


def _explain(found: Iterable[Change]) -> list[Outcome]:
    """What is said of the first map whose log-determinant is in the loss; else of a wrong one.

    Nothing if there is neither.
    """
    wrong: list[Change] = []
    for change in found:
        factor = change.factor
        if factor and abs(factor / (change.weight or abs(factor)) + 1) < EXACT:
            return list(_check_change(change, -factor))
        if change.is_gaussian and _is_clear(change):
            wrong.append(change)
    for change in wrong:
        known = change.weight is not None or _is_only(change)
        nearly = change.is_right_in_x or (change.factor or 0) > 0
        if known and change.is_absent and not change.moves_volume:
            weight = change.weight or float(change.curvature.mean())
            return list(_check_change(change, weight))
        if change.moves_volume and (known or nearly):
            return [_mismatch(change)]
    return []


def _is_clear(change: Change) -> bool:
    """Whether v has the weight that is known, or the log-determinant has another one or none."""
    known = change.weight
    if known is None or change.is_absent or change.factor is not None:
        return True
    return bool(((change.curvature / known - 1).abs() < EXACT).all())


def _is_only(change: Change) -> bool:
    """Whether a loss is of the data x alone, and compares nothing with data or noise."""
    graph = change.graph
    live = graph.upstream([change.loss])
    own, after = graph.upstream([change.x]), graph.downstream([change.x])
    if any(graph[i].kind in ("data", "gaussian") and i not in own for i in live):
        return False
    nodes = [n for n in graph.nodes if live.intersection(n.outs)]
    errors = [i for n in nodes if (i := squared(graph, n, after)) is not None]
    return not (
        any(n.name in LOSSES for n in nodes) or any(is_residual(graph, i, after) for i in errors)
    )


def check_flow_of_noise(graph: Graph, loss: int) -> list[Outcome]:
    """Examine a flow of noise x to v, fitted to a density; nothing if there is none.

    The loss has -log |det dv/dx|, and perhaps log q(x), beside the density at v.
    """
    draws = [v.id for v in graph.draws("gaussian") if v.id in graph.upstream([loss])]
    for x, output in ((draw, end) for draw in draws for end in ends(graph, loss, draw)):
        change = measure(graph, loss, x, output, {})
        if change is None or not change.moves_volume:
            continue
        square = torch.stack([(p.get(x, graph.get(x)) ** 2).sum() / 2 for p in change.places])
        parts = torch.stack([change.volume, square[1:] - square[0]], 1)
        factor, own = torch.linalg.lstsq(parts, change.rest).solution
        if not float((factor * change.volume).abs().max()) > 1e-9:
            continue
        change = replace(change, rest=change.rest - own * parts[:, 1])
        known = min(abs(own), abs(own / abs(factor) + 1)) < EXACT  # left out, or log q(x)
        if known and change.fit[1] <= ROUNDING:
            at_density = Skipped(f"the density of v{at(change.where)}: it is given")
            return [_mismatch(change)] if factor > 0 else [*_check_map(change), at_density]
    return []


# --- flows beside a latent -----------------------------------------------------------------------


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
    return _explain(_maps(prober, loss))


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

        def drawn(z: Tensor, weight: float = log_q.weight) -> Tensor:
            return -0.5 * weight * (((z - mean) / sigma) ** 2).sum()

        beside = drawn if log_q.drawn else None
        change = measure(graph, loss, latent.z, output, {**held, **heads}, True, beside)
        if change is None or not change.quadratic:
            continue
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
    found = (replace(c, weight=weight) for x in joined for c in _changes(graph, loss, x))
    return _explain(c for c in found if c.moves_volume)


# --- the log-determinant and the prior ----------------------------------------------------------


def _check_change(change: Change, weight: float) -> Iterator[Outcome]:
    """Examine a map with a right log-determinant, and the density of v."""
    yield from (found := list(_check_map(change)))
    if any(isinstance(outcome, Passed) for outcome in found):
        yield from _check_density(change, weight)


def _check_map(change: Change) -> Iterator[Outcome]:
    """Examine the gradient of a right log-determinant, and whether the map is injective."""
    place, factor = at(change.where), change.factor
    if _is_detached(change):
        yield bug("no_gradient", "log_det", where=change.where)
    if _is_stopped(change):
        why = "a part of it is stopped between the parameters of the map and z"
        yield unexamined("the gradient of the map", change.where, why)
    if change.folds():
        yield bug("not_injective", "step", where=change.where)
    if change.is_estimate:
        why = "an estimate by random noise, which is near that of autograd's Jacobian"
        yield Missing(f"log-determinant{place}: {why}; its expectation is not known")
        return
    masked = len(change.mapped) - int(change.mapped.sum())
    off = error = 0.0
    if factor and change.fit[1] > EXACT:
        off = float((change.rest / factor - change.volume).abs().max())
        error = off / float(change.volume.abs().max())
    if error > MOST_ERROR and off > UNSEEN * int(change.mapped.sum()):
        yield Missing(
            f"log-determinant{place}: a solver's, and off by {error:.0%} from that of autograd's "
            "Jacobian of its steps: take more of them"
        )
        return
    yield Passed(
        f"log-determinant{place}: that of autograd's Jacobian of the recorded step, at {MOVES} "
        "places"
        + (f", but for {error:.2%}, the error of a solver" if error else "")
        + (f", without {masked} masked entries" if masked else "")
    )


def _check_density(change: Change, weight: float) -> Iterator[Outcome]:
    """Compare the density of v with N(0, 1), or with another."""
    place, a = at(change.where), change.curvature
    if not change.quadratic:
        yield _check_other_prior(change, weight)
    elif not bool((a > 0).all()):
        yield bug("logdet_mismatch", "step prior", where=change.where, curvature=float(a.min()))
    elif bool(((a / weight - 1).abs() < 1e-3).all()):
        yield Passed(f"density of z{place}: N(0, 1)")
        if change.weight is None:
            yield from _check_constant(change, weight)
    elif float(a.max() - a.min()) > 1e-4 * float(a.max()):
        yield from _check_learned_prior(change, weight)
    elif change.weight is not None:
        yield unexamined("the prior of z", change.where, "its log-density has not the weight of "
                         "the log-determinant, or its standard deviation is not one")  # fmt: skip
    elif _scaled_prior(change, weight):
        std = math.sqrt(weight / float(a.mean()))
        yield Passed(f"density of z{place}: N(0, {std:.4g}^2)")
    else:
        ratio = weight / float(a.mean())
        yield bug("logdet_mismatch", "step weight", where=change.where, ratio=ratio)


def _mismatch(change: Change) -> Finding:
    """What is wrong with a log-determinant."""
    if change.is_absent:
        return bug("logdet_mismatch", "step absent", where=change.where)
    if (change.factor or 0) > 0:
        return bug("logdet_mismatch", "step sign", where=change.where)
    off = (change.rest / float(change.curvature.mean()) + change.volume).abs().max()
    most = change.volume.abs().max()
    return bug("logdet_mismatch", "step", where=change.where, error=off, change=most)


def _is_detached(change: Change) -> bool:
    """Whether a term of the log-determinant sends no gradient to the parameters."""
    graph = change.graph
    after = graph.downstream([change.x], stop=change.parts) - set(change.parts)
    own = terms(graph, change.loss, change.parts)
    trained = graph.connected([change.loss])
    fixed = {i: t for i, t in change.held.items() if i not in trained}  # to v as well
    reached = graph.connected([change.loss], stop=own)
    own = [t for t in own if t in after and graph[t].origin & Origin.PARAMETERS]
    leaves = {v.id: graph.get(v.id) for v in graph.values if v.kind == "parameter"}
    moved = {i: t * (1 + 1e-7) if t.is_floating_point() else t for i, t in leaves.items()}

    def is_constant(term: int) -> bool:  # as a sum of the slopes of leaky ReLUs
        return torch.equal(graph.value({**moved, **fixed}, term), graph.get(term))

    cut = [t for t in own if t not in reached or not graph.connected([t]) & leaves.keys()]
    return not all(map(is_constant, cut))


def _is_stopped(change: Change) -> bool:
    """Whether the step stops a part of the gradient of v in the parameters that map x."""
    graph = change.graph
    after = graph.downstream([change.x])
    path = graph.upstream(change.parts, stop=[change.x]) & after - {change.x}
    given = {k for i in path if (node := graph[i].node) for k in node.ins} - after
    trained = {v.id for v in graph.values if v.kind == "parameter"}
    trained &= graph.connected([change.loss])
    place = change.places[-1]
    leaves = {
        i: graph.value(place, i).requires_grad_()
        for i in given
        if graph[i].floating and graph.upstream([i]) & trained
    }
    fixed = {**change.held, change.x: place.get(change.x, graph.get(change.x))}
    found = []
    for stops in (False, True):
        v = graph.run({**fixed, **leaves}, change.parts, stops)
        flat = torch.cat([v[i].reshape(-1) for i in change.parts])
        order = torch.linspace(0.5, 1.5, len(flat), dtype=torch.float64)
        found.append(gradient((order * flat).sum(), leaves))
    return not torch.allclose(*found, rtol=1e-3, atol=1e-9 * (1 + float(found[0].abs().max())))


def _check_other_prior(change: Change, weight: float) -> Outcome:
    """Integrate the density of v over one entry, or one example, at a time."""
    graph, v = change.graph, change.v
    fixed = {**change.held, change.x: graph.get(change.x)}
    log_det = weight * float(change.own.log_det.sum())
    base = torch.cat([t.reshape(-1) for t in v.values()])
    is_whole = len(v) == 1 and bool(change.mapped.all())
    shape = graph[change.parts[0]].shape if is_whole else (int(change.mapped.sum()),)

    def log_p(z: Tensor) -> Tensor:
        flat = base.index_put((change.mapped,), z.reshape(-1))
        parts = flat.split([t.numel() for t in v.values()])
        at = {i: p.reshape(t.shape) for p, (i, t) in zip(parts, v.items(), strict=True)}
        return -graph.run({**fixed, **at}, [change.loss])[change.loss].sum() - log_det

    what = "the density of z", change.where
    found = log_integral(log_p, torch.full(shape, weight, dtype=torch.float64))
    if found is None:
        return Skipped(f"the density of z{at(change.where)}: it is not Gaussian, and its weight "
                       "beside the log-determinant is not compared")  # fmt: skip
    log, accuracy = found
    if math.isinf(log):
        return bug("logdet_mismatch", "step improper", where=change.where)
    levels = log / math.log(2)  # a constant of dequantization, or of bits
    if abs(levels - round(levels)) > accuracy:
        why = "it has another weight than the log-determinant, or a constant is left out"
        return unexamined(*what, f"its integral is exp({log:.4g}): {why}")
    return Passed(f"density of z{at(change.where)}: not Gaussian, and it integrates to one")


def _check_learned_prior(change: Change, weight: float) -> Iterator[Outcome]:
    """Compare the loss at the prior's mean with log sigma while its parameters are moved."""
    graph, loss = change.graph, change.loss
    above = graph.upstream(change.parts)
    own = [i for i in graph.upstream([loss]) if graph[i].kind == "parameter" and i not in above]
    own = [*change.output.heads] or own
    generator = torch.Generator().manual_seed(41)
    moved = {
        i: graph.get(i) + 0.2 * torch.rand(graph[i].shape, generator=generator).double()
        for i in own
    }
    fixed = {**change.held, change.x: graph.get(change.x)}
    flat = torch.cat([t.reshape(-1) for t in change.v.values()])
    values, scales = [], []
    for over in ({}, moved):
        curvature, slope = (t[change.mapped] for t in change.in_v(over)[:2])
        flat[change.mapped] = -slope / curvature
        scales.append(-0.5 * weight * float(curvature.log().sum()))
        parts = flat.split([t.numel() for t in change.v.values()])
        v = {i: p.reshape(graph[i].shape) for i, p in zip(change.v, parts, strict=True)}
        values.append(float(graph.value({**fixed, **over, **v}, loss).sum()))
    off = abs(values[1] - values[0] - scales[1] + scales[0])
    slopes = []
    for stops in (False, True):
        leaves = {i: graph.get(i).clone().requires_grad_() for i in own}
        value = graph.run({**fixed, **change.v, **leaves}, [loss], stops)[loss].sum()
        slopes.append(torch.autograd.grad(value, list(leaves.values()), materialize_grads=True))
    what = "the prior of z", change.where
    if not off <= 1e-3 * abs(scales[1] - scales[0]) + 1e-9 * (1 + abs(values[0])):
        yield unexamined(*what, "when its own mean and scale are moved, the loss is off by "
                         f"{off:.3g} of the change of a Gaussian log-density: log sigma is missing"
                         ", say")  # fmt: skip
    elif not all(torch.allclose(a, b) for a, b in zip(*slopes, strict=True)):
        yield unexamined(*what, "a part of the gradient of its own mean and scale is stopped")
    else:
        yield Passed(f"density of z{at(change.where)}: a Gaussian with learned mean or scale")


def _scaled_prior(change: Change, weight: float) -> bool:
    """Whether the value of the loss has the log sigma of a prior N(0, sigma^2) in it."""
    graph = change.graph
    zeros = {i: torch.zeros_like(t) for i, t in change.v.items()}
    log_det = float(change.volume_at({}).log_det.sum())
    log_std = 0.5 * math.log(weight / float(change.curvature.mean()))
    at_zero = float(graph.value(zeros, change.loss)) / weight
    left = (at_zero + log_det) / int(change.mapped.sum())
    return any(abs(left - log_std - c) < 1e-4 for c in (0.0, 0.5 * math.log(2 * math.pi)))


# --- dequantization -----------------------------------------------------------------------------


def check_dequantization(graph: Graph, loss: int) -> Iterator[Outcome]:
    """Compare uniform noise that is added to data with the spacing of their levels."""
    for draw in graph.draws("random"):
        found = _levels(graph, loss, draw)
        if found is None:
            continue
        i, width, spacing, number = found
        if abs(width / spacing - 1) > 1e-3 and number > 2:
            where = graph.where(i)
            yield bug("dequantisation", "step", where=where, width=width, spacing=spacing)
        else:
            yield Passed("dequantization: noise as wide as the levels of the data")


def _levels(graph: Graph, loss: int, draw: Value) -> tuple[int, float, float, int] | None:
    """Where noise is added to data of levels; its width, their spacing and their number."""
    live = graph.upstream([loss])
    if draw.id not in live or not draw.floating or not float(graph.get(draw.id).min()) >= 0:
        return None
    zero = torch.zeros_like(graph.get(draw.id))
    for i in sorted(graph.downstream([draw.id]) & live):
        v = graph[i]
        if v.origin != Origin.DATA or v.numel != draw.numel or not v.floating:
            continue
        values, moved = (graph.value({draw.id: e}, i) for e in (zero, zero + 1))
        levels = values.unique()
        spacing = float(levels.diff().min()) if 2 <= len(levels) <= 1024 else 0.0
        steps = levels.diff() / max(spacing, 1e-300)
        if spacing and bool(((steps - steps.round()).abs() < 1e-4).all()):
            return i, float((moved - values).mean()), spacing, len(levels)
        return None
    return None


def _check_constant(change: Change, weight: float) -> Iterator[Outcome]:
    """Compare the value of the loss with that of the likelihood of levels, with noise added.

    The likelihood of a level is that of the noise in [0, 1) that is added to it.
    """
    graph, loss = change.graph, change.loss
    above = graph.upstream(change.parts)
    noise = [d for d in graph.draws("random") if d.id in above and d.floating]
    if len(noise) != 1 or _levels(graph, loss, noise[0]) is None:
        return
    log_det = change.volume_at({}, start=noise[0].id).log_det
    square = sum(float((t**2).sum()) for t in change.v.values()) / 2
    left = float(graph.get(loss)) / weight - square + float(log_det.sum())
    left /= int(change.mapped.sum())
    offset = left - 0.5 * math.log(2 * math.pi)
    if min(abs(left), abs(offset)) > 1e-4:
        yield warning("dequantisation", "step constant", where=change.where, offset=offset)


# --- candidates ---------------------------------------------------------------------------------


def _inputs(graph: Graph, loss: int) -> list[int]:
    """Values of data alone that a map with parameters begins with, earliest first."""
    live = graph.upstream([loss])

    def begins(v: Value) -> bool:
        given = [graph[i] for i in v.node.ins] if v.node is not None else []
        noisy = any(u.draws and not u.origin for u in given)
        later = any(u.origin == Origin.DATA and u.floating for u in given)
        mapped = any(graph[o].origin & Origin.PARAMETERS for n in v.users for o in n.outs)
        return noisy or mapped or not later

    data = (v for v in graph.values if v.id in live and v.floating and v.origin == Origin.DATA)
    return [v.id for v in data if v.numel > 1 and begins(v)]
