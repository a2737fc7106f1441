"""Flows in a recorded step, as a likelihood of data.

A value x is mapped to v, and the loss contains w (-log p(v) - log |det dv/dx|). With v
held, moving x and the parameters of the map leaves -w log |det dv/dx| alone, which is compared
with autograd's Jacobian of the recorded graph. With x held, moving v shows p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Node, Origin
from musigma.audit.latents import frontier
from musigma.audit.probes import Over
from musigma.audit.step_kl import terms

if TYPE_CHECKING:
    from musigma.audit.step import StepAudit

__all__ = [
    "Change",
    "change_of",
    "changes",
    "judge_dequantization",
    "judge_flow",
    "mismatch",
    "outputs",
    "report_flow",
    "report_stops_and_folds",
]

MOST_DIMENSIONS = 1024
EXACT = 1e-3
MOVES = 5


@dataclass
class Change:
    """A map from x to parts of v in a loss.

    `rest` (N,) is the loss with v held and `log_det` (N,) that of the map, at N places, both less
    their first; x is `places` (N + 1) there. `curvature` and `slope` are those of the loss in v,
    by entry, at v = 0. `heads` give the prior of parts.
    """

    x: int
    parts: tuple[int, ...]
    rest: Tensor
    log_det: Tensor
    curvature: Tensor
    slope: Tensor
    quadratic: bool
    places: tuple[Tensor, ...] = ()
    heads: tuple[int, ...] = ()

    @property
    def factor(self) -> float | None:
        """What the log-determinant is multiplied with in the loss; None if it is not in it."""
        size = float(self.log_det.abs().max())
        if size < 1e-7:
            return None
        factor = float(self.rest @ self.log_det / (self.log_det @ self.log_det))
        off = float((self.rest - factor * self.log_det).abs().max())
        return factor if off <= EXACT * max(abs(factor) * size, 1e-300) else None

    @property
    def keeps_volume(self) -> bool:
        """Whether the log-determinant is zero, and none is in the loss."""
        return float(self.log_det.abs().max()) < 1e-9 and self.is_absent

    @property
    def is_absent(self) -> bool:
        """Whether the loss does not change at all while v is held."""
        size = float(self.curvature.abs().max()) * (1 + float(self.log_det.abs().max()))
        return float(self.rest.abs().max()) <= 1e-9 * max(size, 1e-300)


def judge_flow(audit: StepAudit) -> bool:
    """Examine a step without latents as the likelihood of a flow; False if it is none."""
    graph, loss = audit.graph, audit.loss
    wrong: list[Change] = []
    for x in _inputs(graph, loss):
        for change, judged in changes(graph, loss, x):
            factor = change.factor
            if float(change.curvature.abs().max()) == 0:
                continue
            if factor is not None and factor < 0:
                return report_flow(audit, change, factor)
            wrong += [change] if judged else []
    for change in wrong:
        if change.keeps_volume and _is_only(graph, loss, change.x):
            return report_flow(audit, change, -float(change.curvature.mean()))
        if float(change.log_det.abs().max()) > 1e-7 and _is_only(graph, loss, change.x):
            mismatch(audit, change)
            return True
    return False


def changes(graph: Graph, loss: int, x: int) -> Iterator[tuple[Change, bool]]:
    """What x may be mapped to, and whether it must be z: a Gaussian's, given x by v alone."""
    for parts, squared, heads in outputs(graph, loss, x):
        still = {i: graph.get(i) for i in heads}
        change = change_of(graph, loss, x, parts, still, parameters=True)
        if change is None:
            continue
        change = replace(change, heads=heads)
        convex = change.quadratic and float(change.curvature.min()) > 0
        judged = squared and convex and (bool(heads) or _is_apart(graph, loss, change))
        yield change, judged


def _is_apart(graph: Graph, loss: int, change: Change) -> bool:
    """Whether the density of v does not depend on x but by v."""
    v = {i: graph.get(i) for i in change.parts}
    moved = {change.x: change.places[1]}
    found = [_in_v(graph, loss, change.x, v, over)[:2] for over in ({}, moved)]
    pairs = zip(*found, strict=True)
    return all(a is not None and b is not None and torch.allclose(a, b) for a, b in pairs)


def _is_only(graph: Graph, loss: int, x: int) -> bool:
    """Whether a loss is of the data x alone, and compares nothing with data or noise."""
    live = graph.upstream([loss])
    own = graph.upstream([x])
    after = graph.downstream([x])
    if any(graph[i].kind in ("data", "gaussian") and i not in own for i in live):
        return False
    nodes = [n for n in graph.nodes if live.intersection(n.outs)]
    losses = ("mse_loss", "l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits",
              "nll_loss_forward", "smooth_l1_loss", "huber_loss")  # fmt: skip
    return not any(
        n.name in losses or (_is_square(n) and _is_residual(graph, n.ins[0], after)) for n in nodes
    )


def report_flow(audit: StepAudit, change: Change, factor: float) -> bool:
    """Report a right log-determinant, and the density of v; always True."""
    graph = audit.graph
    where = graph.where(change.parts[0])
    at = f" ({where.rsplit('/', 1)[-1]})" if where else ""
    weight = -factor
    report_stops_and_folds(audit, change)
    audit.checked.append(
        f"log-determinant{at}: that of autograd's Jacobian of the recorded step, at {MOVES} places"
    )
    a = change.curvature
    if not change.quadratic:
        audit.unchecked.append(
            f"the density of z{at}: it is not Gaussian, and its weight beside the log-determinant "
            "is not compared"
        )
    elif not bool((a > 0).all()):
        audit.bug("logdet_mismatch", "step prior", where=where, curvature=float(a.min()))
    elif not bool(((a / weight - 1).abs() < 1e-3).all()):
        if float(a.max() - a.min()) > 1e-4 * float(a.max()):
            _learned_prior(audit, change, weight, at)
        elif _scaled_prior(graph, audit.loss, change, weight):
            std = math.sqrt(weight / float(a.mean()))
            audit.checked.append(f"density of z{at}: N(0, {std:.4g}^2)")
        else:
            audit.bug("logdet_mismatch", "step weight", where=where,
                      ratio=weight / float(a.mean()))  # fmt: skip
    else:
        audit.checked.append(f"density of z{at}: N(0, 1)")
        _constant(audit, change, weight, where)
    return True


def _constant(audit: StepAudit, change: Change, weight: float, where: str) -> None:
    """Compare the value of the loss with that of the likelihood of data with noise added."""
    graph = audit.graph
    noisy = any(v.kind == "random" and v.floating for v in graph.values)
    if not noisy or change.x not in graph.downstream([v.id for v in graph.draws("random")]):
        return
    first = min(
        (i for i in _inputs(graph, audit.loss) if graph[i].numel == graph[change.x].numel),
        default=change.x,
    )
    volume = _log_det(graph, first, change.parts, {}, _rows(graph.get(first)))
    if volume is None:
        return
    n = sum(graph[i].numel for i in change.parts)
    square = sum(float((graph.get(i) ** 2).sum()) for i in change.parts) / 2
    left = (float(graph.get(audit.loss)) / weight - square + float(volume.sum())) / n
    if min(abs(left), abs(left - 0.5 * math.log(2 * math.pi))) > 1e-4:
        audit.warn("dequantisation", "step constant", where=where, offset=left
                   - 0.5 * math.log(2 * math.pi))  # fmt: skip


def report_stops_and_folds(audit: StepAudit, change: Change) -> None:
    """Report a log-determinant without a gradient, and a map that folds."""
    where = audit.graph.where(change.parts[0])
    if _is_detached(audit.graph, audit.loss, change):
        audit.bug("no_gradient", "log_det", where=where)
    if _folds(audit.graph, change):
        audit.bug("not_injective", "step", where=where)


def _is_detached(graph: Graph, loss: int, change: Change) -> bool:
    """Whether a term of the log-determinant sends no gradient to the parameters."""
    after = graph.downstream([change.x], stop=change.parts) - set(change.parts)
    own = terms(graph, loss, change.parts)
    reached = graph.connected([loss], stop=own)
    own = [t for t in own if t in after and t not in change.parts]
    own = [t for t in own if graph[t].origin & Origin.PARAMETERS]
    leaves = {v.id for v in graph.values if v.kind == "parameter"}
    return any(t not in reached or not graph.connected([t]) & leaves for t in own)


def _folds(graph: Graph, change: Change) -> bool:
    """Whether the sign of the Jacobian's determinant differs between places."""
    base = graph.get(change.x)
    generator = torch.Generator().manual_seed(37)
    signs, volumes = [], []
    above = graph.upstream(change.parts, stop=[change.x])
    still = _batch_statistics(graph, change.x, above, _rows(base))
    for size in (0.0, 1.0, 2.0, 4.0):
        noise = torch.randn(base.shape, generator=generator, dtype=torch.float64)
        over = {**still, change.x: base + size * float(base.std()) * noise}
        try:
            jacobian = _jacobian(graph, change.x, change.parts, over, _rows(base))
        except RuntimeError:  # it does not take data so far out
            continue
        if jacobian is not None:
            sign, volume = torch.linalg.slogdet(jacobian)
            signs.append(sign)
            volumes.append(volume)
    if not signs:
        return False
    sign, volume = torch.cat(signs), torch.cat(volumes)
    clear = volume > volume.median() - 4  # else its sign may be rounding
    return bool((sign[clear] > 0).any()) and bool((sign[clear] < 0).any())


def _learned_prior(audit: StepAudit, change: Change, weight: float, at: str) -> None:
    """Compare the loss with a Gaussian log-density while the prior's parameters are moved."""
    graph, loss = audit.graph, audit.loss
    above = graph.upstream(change.parts)
    own = [i for i in graph.upstream([loss]) if graph[i].kind == "parameter" and i not in above]
    own = [*change.heads] or own
    generator = torch.Generator().manual_seed(41)
    moved = {
        i: graph.get(i) + 0.2 * torch.rand(graph[i].shape, generator=generator).double()
        for i in own
    }
    v = {i: graph.get(i) for i in change.parts}
    flat = torch.cat([t.reshape(-1) for t in v.values()])
    values, densities = [], []
    for over in ({}, moved):
        curvature, slope, _ = _in_v(graph, loss, change.x, v, over)
        if curvature is None or slope is None or not bool((curvature > 0).all()):
            return
        mean, std = -slope / curvature, (weight / curvature).sqrt()
        densities.append((std.log() + 0.5 * ((flat - mean) / std) ** 2).sum() * weight)
        values.append(graph.value({**over, **v, change.x: graph.get(change.x)}, loss).sum())
    off = abs(float(values[1] - values[0] - densities[1] + densities[0]))
    if off > 1e-3 * abs(float(densities[1] - densities[0])) + 1e-9:
        audit.missing.append(
            f"the prior of z{at}: when its own mean and scale are moved, the loss is off by "
            f"{off:.3g} of the change of a Gaussian log-density: log sigma is missing, say"
        )
    else:
        audit.checked.append(f"density of z{at}: a Gaussian with learned mean or scale")


def _scaled_prior(graph: Graph, loss: int, change: Change, weight: float) -> bool:
    """Whether the value of the loss has the log sigma of a prior N(0, sigma^2) in it."""
    zeros = {i: torch.zeros_like(graph.get(i)) for i in change.parts}
    with torch.no_grad():
        x = graph.get(change.x)
        at_zero = float(graph.value(zeros, loss)) / weight
        rows = _rows(x)
        volume = _log_det(graph, change.x, change.parts, {}, rows)
    log_det = 0.0 if volume is None else float(volume.sum())
    n = sum(graph[i].numel for i in change.parts)
    log_std = 0.5 * math.log(weight / float(change.curvature.mean()))
    left = (at_zero + log_det) / n
    return any(abs(left - log_std - c) < 1e-4 for c in (0.0, 0.5 * math.log(2 * math.pi)))


def mismatch(audit: StepAudit, change: Change) -> None:
    """Report what is wrong with a log-determinant."""
    graph = audit.graph
    where = graph.where(change.parts[0])
    if change.is_absent:
        audit.bug("logdet_mismatch", "step absent", where=where)
        return
    factor = change.factor
    if factor is not None and factor > 0:
        audit.bug("logdet_mismatch", "step sign", where=where)
        return
    weight = float(change.curvature.mean())
    off = (change.rest / weight + change.log_det).abs().max()
    audit.bug("logdet_mismatch", "step", where=where, error=float(off),
              change=float(change.log_det.abs().max()))  # fmt: skip


def judge_dequantization(audit: StepAudit) -> None:
    """Compare uniform noise that is added to data with the spacing of their levels."""
    graph = audit.graph
    live = graph.upstream([audit.loss])
    for draw in graph.draws("random"):
        if draw.id not in live or not draw.floating or not float(graph.get(draw.id).min()) >= 0:
            continue
        zero = torch.zeros_like(graph.get(draw.id))
        for i in sorted(graph.downstream([draw.id]) & live):
            v = graph[i]
            if v.origin != Origin.DATA or v.numel != draw.numel or not v.floating:
                continue
            values, moved = (graph.value({draw.id: e}, i) for e in (zero, zero + 1))
            levels = values.unique()
            spacing = float(levels.diff().min()) if 2 <= len(levels) <= 1024 else 0.0
            steps = levels.diff() / max(spacing, 1e-300)
            slope = float((moved - values).mean())
            if spacing and bool(((steps - steps.round()).abs() < 1e-4).all()):
                if abs(slope / spacing - 1) > 1e-3 and len(levels) > 2:
                    audit.bug("dequantisation", "step", where=graph.where(i), width=slope,
                              spacing=spacing)  # fmt: skip
                else:
                    audit.checked.append("dequantization: noise as wide as the levels of the data")
            break


# --- candidates ---------------------------------------------------------------------------------


def _inputs(graph: Graph, loss: int) -> list[int]:
    """Values of data alone that a map with parameters begins with, earliest first."""
    live = graph.upstream([loss])
    found = []
    for v in graph.values:
        if v.id not in live or not v.floating or v.numel < 2 or v.origin != Origin.DATA:
            continue
        if v.draws and v.node is None:
            continue
        first = v.node is None or not any(
            graph[i].origin == Origin.DATA and graph[i].floating for i in v.node.ins
        )
        begins = any(graph[o].origin & Origin.PARAMETERS for n in v.users for o in n.outs)
        if (
            first
            or begins
            or any(graph[i].kind == "random" for i in (v.node.ins if v.node else ()))
        ):
            found.append(v.id)
    return found


class Output(NamedTuple):
    """What x may be mapped to.

    Args:
        parts: The values.
        squared: They are squared, as by a Gaussian.
        heads: What layers give the prior of a part: its mean and scale, given another part.
    """

    parts: tuple[int, ...]
    squared: bool
    heads: tuple[int, ...] = ()


def outputs(graph: Graph, loss: int, x: int) -> list[Output]:
    """Values that x may be mapped to: squared ones first, then others of the size of x."""
    after = graph.downstream([x]) & graph.upstream([loss])
    numel = graph[x].numel
    squared: dict[int, list[int]] = {}
    for node in graph.nodes:
        if _is_square(node) and node.ins[0] in after and node.ins[0] != x:
            i = _unscaled(graph, node.ins[0], after)
            if _is_residual(graph, i, after):
                continue
            z, heads = _conditional(graph, i, after)
            squared[z] = heads
    last = list(reversed(squared))
    found = [Output((i,), True, tuple(squared[i])) for i in last if graph[i].numel == numel]
    smaller = [i for i in last if graph[i].numel < numel]
    if smaller and sum(graph[i].numel for i in smaller) == numel:
        heads = dict.fromkeys(h for i in smaller for h in squared[i])
        found.append(Output(tuple(smaller), True, tuple(heads)))
    if found:
        return found
    rest = [
        v.id
        for v in reversed(graph.values)
        if v.id in after and v.numel == numel and v.floating and v.origin & Origin.PARAMETERS
        and v.node is not None and not v.node.view and _is_last(graph, v.id)
    ]  # fmt: skip
    return [Output((i,), False) for i in rest[:6]]


def _conditional(graph: Graph, i: int, after: set[int]) -> tuple[int, list[int]]:
    """The value z of z - mean, and the heads of a mean and a scale that depend on x as well."""
    node = graph[i].node
    if node is None or node.name not in ("sub", "sub_"):
        return i, []
    moving = [k for k in node.ins if k in after and graph[k].numel == graph[i].numel]
    if len(moving) != 2:
        return i, []
    z, mean = moving
    own = graph.downstream([i])
    sides = [mean]
    todo = [i]
    while todo:
        for user in graph[todo.pop()].users:
            if user.pointwise and all(graph[o].numel == graph[i].numel for o in user.outs):
                sides += [k for k in user.ins if k in after and k not in own]
                todo += user.outs
    return z, [k for k in frontier(graph, sides) if k in after]


def _is_last(graph: Graph, i: int) -> bool:
    """Whether no operation of the size of a value takes parameters after it."""
    after = graph.downstream([i]) - {i}
    size = graph[i].numel
    return not any(
        graph[k].origin & Origin.PARAMETERS and k not in after and k != i
        for n in graph.nodes
        if any(o in after and graph[o].numel >= size for o in n.outs)
        for k in n.ins
    )


def _is_square(node: Node) -> bool:
    if node.name == "pow":
        return len(node.flat) > 1 and node.flat[1] == 2
    return node.name == "square" or (node.name == "mul" and len(node.ins) == 2
                                     and node.ins[0] == node.ins[1])  # fmt: skip


def _unscaled(graph: Graph, i: int, after: set[int]) -> int:
    """A value before it is shifted and scaled by what does not depend on x."""
    linear = ("sub", "add", "div", "mul", "linalg_solve_triangular", "mm", "bmm")
    while True:
        node = graph[i].node
        if node is None or not (node.name in linear or node.view):
            return i
        moving = [k for k in node.ins if k in after]
        rest = [k for k in node.ins if k not in after]
        if len(moving) != 1 or graph[moving[0]].numel != graph[i].numel:
            return i
        if any(graph[k].origin & Origin.DATA or graph[k].draws for k in rest):
            return i
        if node.name in ("mm", "bmm") and any(graph[k].origin for k in rest):
            return i  # a layer of the map
        i = moving[0]


def _is_residual(graph: Graph, i: int, after: set[int]) -> bool:
    """Whether a value is a difference to data, or to a draw: an error that is squared."""
    node = graph[i].node
    if node is None or node.name not in ("sub", "sub_", "rsub"):
        return False
    return any(
        (graph[k].origin == Origin.DATA or (graph[k].draws and not graph[k].origin))
        and graph[k].numel == graph[i].numel
        for k in node.ins
    )


# --- measuring ----------------------------------------------------------------------------------


def _rows(t: Tensor) -> int:
    return t.shape[0] if t.ndim > 1 else 1


def change_of(
    graph: Graph, loss: int, x: int, parts: Sequence[int], held: Over, parameters: bool
) -> Change | None:
    """Move x, and the map's parameters, with v held; and v with x held. None if they cannot."""
    try:
        return _moved(graph, loss, x, parts, held, parameters)
    except RuntimeError:  # an operation that does not take other values
        return None


def _moved(
    graph: Graph, loss: int, x: int, parts: Sequence[int], held: Over, parameters: bool
) -> Change | None:
    base = graph.get(x)
    rows = _rows(base)
    if base.numel() // rows > MOST_DIMENSIONS or any(graph[i].numel % rows for i in parts):
        return None
    above = graph.upstream(parts, stop=[x])
    if x not in above:
        return None
    held = {**held, **_batch_statistics(graph, x, above, rows)}
    leaves = [graph[i] for i in above if graph[i].kind == "parameter" and i not in held]
    free = [v.id for v in leaves if parameters and v.source is not None and v.source.requires_grad]
    generator = torch.Generator().manual_seed(31)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64)

    v = {i: graph.get(i) for i in parts}
    size = float(base.std()) if base.numel() > 1 and float(base.std()) > 0 else 1.0
    for spread in (0.3 * size, 0.01 * size, 1e-4 * size):
        places: list[dict[int, Tensor]] = [{}]
        for k in range(MOVES):
            place = {x: base + spread * noise(base)}
            if k % 2:
                place |= {i: graph.get(i) + 0.05 * noise(graph.get(i)) for i in free}
            places.append(place)
        rest, log_det = [], []
        for place in places:
            over = {**held, **place}
            volume = _log_det(graph, x, parts, over, rows)
            if volume is not None:
                rest.append(graph.value({**over, **v}, loss).sum())
                log_det.append(volume.sum())
        if len(rest) == len(places) and torch.stack(rest).isfinite().all():
            break
    else:
        return None
    rest_, log_det_ = torch.stack(rest), torch.stack(log_det)
    curvature, slope, quadratic = _in_v(graph, loss, x, v, held)
    if curvature is None or slope is None:
        return None
    return Change(x, tuple(parts), rest_[1:] - rest_[0], log_det_[1:] - log_det_[0], curvature,
                  slope, quadratic, tuple(p.get(x, base) for p in places))  # fmt: skip


def _batch_statistics(graph: Graph, x: int, above: set[int], rows: int) -> dict[int, Tensor]:
    """Means and variances over the batch, as they were: constants to a change of variables."""
    after = graph.downstream([x])
    found = {}
    for node in graph.nodes:
        if node.name not in ("mean", "var", "std", "sum", "var_mean", "std_mean"):
            continue
        for o in node.outs:
            shape = graph[o].shape
            if o in above and o in after and rows > 1 and rows not in shape:
                found[o] = graph.get(o)
    return found


def _in_v(
    graph: Graph, loss: int, x: int, v: Over, over: Over
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Curvature and slope of a loss in v at zero, with x held; and whether it is quadratic."""
    slopes = []
    for size in (0.0, 1.0, 2.0):
        at = {i: (size * torch.ones_like(t)).requires_grad_() for i, t in v.items()}
        value = graph.run({x: graph.get(x), **over, **at}, [loss])[loss].sum()
        if not value.requires_grad:
            return None, None, False
        found = torch.autograd.grad(value, list(at.values()), allow_unused=True)
        parts = [torch.zeros_like(t) if g is None else g
                 for g, t in zip(found, at.values(), strict=True)]  # fmt: skip
        slopes.append(torch.cat([g.reshape(-1) for g in parts]))
    curvature = slopes[1] - slopes[0]
    bent = (slopes[2] - slopes[1] - curvature).abs().max()
    return curvature, slopes[0], bool(bent <= 1e-6 * (curvature.abs().max() + 1e-300))


def _log_det(graph: Graph, x: int, parts: Sequence[int], over: Over, rows: int) -> Tensor | None:
    """log |det dv/dx| by example (rows,); None if the Jacobian is not square or is singular."""
    jacobian = _jacobian(graph, x, parts, over, rows)
    if jacobian is None:
        return None
    sign, volume = torch.linalg.slogdet(jacobian)
    return volume if bool((sign != 0).all()) and bool(volume.isfinite().all()) else None


def _jacobian(graph: Graph, x: int, parts: Sequence[int], over: Over, rows: int) -> Tensor | None:
    """dv/dx by example (rows, D, D); None if it is not square."""
    with torch.enable_grad():
        leaf = over.get(x, graph.get(x)).detach().clone().requires_grad_()
        found = graph.run({**over, x: leaf}, list(parts))
        v = torch.cat([found[i].reshape(rows, -1) for i in parts], 1)
        n = v.shape[1]
        if not v.requires_grad or n != leaf.numel() // rows:
            return None
        try:
            eye = torch.eye(n, dtype=v.dtype)[:, None, :].expand(-1, rows, -1)
            lines = [
                torch.autograd.grad(v, leaf, chunk, retain_graph=True, is_grads_batched=True)[0]
                for chunk in eye.split(64)
            ]
            jacobian = torch.cat([t.reshape(-1, rows, n) for t in lines])
        except RuntimeError:  # an operation without a rule for vmap
            lines = [
                torch.autograd.grad(v[:, k].sum(), leaf, retain_graph=True)[0].reshape(rows, n)
                for k in range(n)
            ]
            jacobian = torch.stack(lines)
    return jacobian.transpose(0, 1)
