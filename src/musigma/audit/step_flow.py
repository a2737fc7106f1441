"""Flows in a recorded step: as a likelihood of data, and on the draw of a latent.

In both, a value x is mapped to v, and the loss contains w (-log p(v) - log |det dv/dx|). With v
held, moving x and the parameters of the map leaves -w log |det dv/dx| alone, which is compared
with autograd's Jacobian of the recorded graph. With x held, moving v shows p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Node, Origin
from musigma.audit.latents import Latent
from musigma.audit.probes import Over
from musigma.audit.step_kl import Divergence

if TYPE_CHECKING:
    from musigma.audit.step import StepAudit

__all__ = ["judge_flow", "judge_posterior_flow"]

MOST_DIMENSIONS = 1024
EXACT = 1e-5
MOVES = 5


@dataclass
class Change:
    """A map from x to parts of v in a loss.

    `rest` (N,) is the loss with v held and `log_det` (N,) that of the map, at N places, both less
    their first. `curvature` and `slope` are those of the loss in v, by entry, at v = 0.
    """

    x: int
    parts: tuple[int, ...]
    rest: Tensor
    log_det: Tensor
    curvature: Tensor
    slope: Tensor
    quadratic: bool

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
    def is_absent(self) -> bool:
        """Whether the loss does not change at all while v is held."""
        size = float(self.curvature.abs().max()) * (1 + float(self.log_det.abs().max()))
        return float(self.rest.abs().max()) <= 1e-9 * max(size, 1e-300)


def judge_flow(audit: StepAudit) -> bool:
    """Examine a step without latents as the likelihood of a flow; False if it is none."""
    graph, loss = audit.graph, audit.loss
    found: list[Change] = []
    for x in _inputs(graph, loss):
        for parts in _outputs(graph, loss, x):
            change = _change(graph, loss, x, parts, {}, parameters=True)
            if change is None:
                continue
            found.append(change)
            factor = change.factor
            if factor is not None and factor < 0:
                return _report(audit, change, factor)
    squares = [c for c in found if c.quadratic and float(c.curvature.min()) > 0]
    for change in squares:
        if float(change.log_det.abs().max()) < 1e-7:
            continue
        _mismatch(audit, change)
        return True
    return False


def _report(audit: StepAudit, change: Change, factor: float) -> bool:
    graph = audit.graph
    where = graph.where(change.parts[0])
    at = f" ({where.rsplit('/', 1)[-1]})" if where else ""
    weight = -factor
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
            audit.checked.append(f"density of z{at}: a Gaussian whose scale varies")
        elif _scaled_prior(graph, audit.loss, change, weight):
            std = math.sqrt(weight / float(a.mean()))
            audit.checked.append(f"density of z{at}: N(0, {std:.4g}^2)")
        else:
            audit.bug("logdet_mismatch", "step weight", where=where,
                      ratio=weight / float(a.mean()))  # fmt: skip
    else:
        audit.checked.append(f"density of z{at}: N(0, 1)")
    return True


def _scaled_prior(graph: Graph, loss: int, change: Change, weight: float) -> bool:
    """Whether the value of the loss has the log sigma of a prior N(0, sigma^2) in it."""
    zeros = {i: torch.zeros_like(graph.get(i)) for i in change.parts}
    with torch.no_grad():
        x = graph.get(change.x)
        at_zero = float(graph.value(zeros, loss)) / weight
        rows = _rows(x)
        log_det = float(_log_det(graph, change.x, change.parts, {}, rows).sum())
    n = sum(graph[i].numel for i in change.parts)
    log_std = 0.5 * math.log(weight / float(change.curvature.mean()))
    left = (at_zero + log_det) / n
    return any(abs(left - log_std - c) < 1e-4 for c in (0.0, 0.5 * math.log(2 * math.pi)))


def _mismatch(audit: StepAudit, change: Change) -> None:
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


def _outputs(graph: Graph, loss: int, x: int) -> list[tuple[int, ...]]:
    """Values that may be what x is mapped to: squared ones first, then all of the size of x."""
    after = graph.downstream([x]) & graph.upstream([loss])
    numel = graph[x].numel
    squared: list[int] = []
    for node in graph.nodes:
        if _is_square(node) and node.ins[0] in after and node.ins[0] != x:
            i = _unscaled(graph, node.ins[0], after)
            if not _is_residual(graph, i, after):
                squared.append(i)
    squared = list(dict.fromkeys(reversed(squared)))
    found: list[tuple[int, ...]] = [(i,) for i in squared if graph[i].numel == numel]
    smaller = [i for i in squared if graph[i].numel < numel]
    if smaller and sum(graph[i].numel for i in smaller) == numel:
        found.append(tuple(smaller))
    rest = [
        v.id
        for v in reversed(graph.values)
        if v.id in after and v.numel == numel and v.floating and v.origin & Origin.PARAMETERS
        and v.node is not None and not v.node.view and (v.id,) not in found
    ]  # fmt: skip
    return found + [(i,) for i in rest[:6]]


def _is_square(node: Node) -> bool:
    if node.name == "pow":
        return len(node.flat) > 1 and node.flat[1] == 2
    return node.name == "square" or (node.name == "mul" and len(node.ins) == 2
                                     and node.ins[0] == node.ins[1])  # fmt: skip


def _unscaled(graph: Graph, i: int, after: set[int]) -> int:
    """A value before it is shifted and scaled by what does not depend on x."""
    while True:
        node = graph[i].node
        if node is None or node.name not in ("sub", "add", "div", "mul"):
            return i
        moving = [k for k in node.ins if k in after]
        rest = [k for k in node.ins if k not in after]
        if len(moving) != 1 or graph[moving[0]].numel != graph[i].numel:
            return i
        if any(graph[k].origin & Origin.DATA or graph[k].draws for k in rest):
            return i
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


def _change(
    graph: Graph, loss: int, x: int, parts: Sequence[int], held: Over, parameters: bool
) -> Change | None:
    """Move x, and the map's parameters, with v held; and v with x held."""
    base = graph.get(x)
    rows = _rows(base)
    if base.numel() // rows > MOST_DIMENSIONS or any(graph[i].numel % rows for i in parts):
        return None
    above = graph.upstream(parts, stop=[x])
    if x not in above:
        return None
    free = [i for i in above if graph[i].kind == "parameter"] if parameters else []
    free = [i for i in free if i not in held]
    generator = torch.Generator().manual_seed(31)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64)

    v = {i: graph.get(i) for i in parts}
    spread = 0.3 * float(base.std()) if base.numel() > 1 and float(base.std()) > 0 else 0.3
    places: list[dict[int, Tensor]] = [{}]
    for k in range(MOVES):
        place = {x: base + spread * noise(base)}
        if k % 2:
            place |= {i: graph.get(i) * (1 + 0.1 * noise(graph.get(i))) for i in free}
        places.append(place)
    rest, log_det = [], []
    for place in places:
        over = {**held, **place}
        value = graph.value({**over, **v}, loss).sum()
        volume = _log_det(graph, x, parts, over, rows)
        if volume is None:
            return None
        rest.append(value)
        log_det.append(volume.sum())
    rest_, log_det_ = torch.stack(rest), torch.stack(log_det)
    if not (rest_.isfinite().all() and log_det_.isfinite().all()):
        return None
    slopes = []
    for size in (0.0, 1.0, 2.0):
        at = {i: (size * torch.ones_like(t)).requires_grad_() for i, t in v.items()}
        value = graph.run({**held, **at, x: base}, [loss])[loss].sum()
        if not value.requires_grad:
            return None
        found = torch.autograd.grad(value, list(at.values()), allow_unused=True)
        slopes.append(torch.cat([torch.zeros_like(t).reshape(-1) if g is None else g.reshape(-1)
                                 for g, t in zip(found, at.values(), strict=True)]))  # fmt: skip
    curvature = slopes[1] - slopes[0]
    bent = (slopes[2] - slopes[1] - curvature).abs().max()
    quadratic = bool(bent <= 1e-6 * (curvature.abs().max() + 1e-300))
    return Change(x, tuple(parts), rest_[1:] - rest_[0], log_det_[1:] - log_det_[0], curvature,
                  slopes[0], quadratic)  # fmt: skip


def _log_det(graph: Graph, x: int, parts: Sequence[int], over: Over, rows: int) -> Tensor | None:
    """log |det dv/dx| by example (rows,); None if the Jacobian is not square or is singular."""
    with torch.enable_grad():
        leaf = over.get(x, graph.get(x)).detach().clone().requires_grad_()
        found = graph.run({**over, x: leaf}, list(parts))
        v = torch.cat([found[i].reshape(rows, -1) for i in parts], 1)
        if not v.requires_grad or v.shape[1] != leaf.numel() // rows:
            return None
        lines = []
        try:
            eye = torch.eye(v.shape[1], dtype=v.dtype)[:, None, :].expand(-1, rows, -1)
            for chunk in eye.split(64):
                (j,) = torch.autograd.grad(
                    v, leaf, chunk, retain_graph=True, is_grads_batched=True
                )
                lines.append(j.reshape(len(chunk), rows, -1))
            jacobian = torch.cat(lines)
        except RuntimeError:  # an operation without a rule for vmap
            lines = [
                torch.autograd.grad(v[:, k].sum(), leaf, retain_graph=True)[0].reshape(rows, -1)
                for k in range(v.shape[1])
            ]
            jacobian = torch.stack(lines)
    sign, volume = torch.linalg.slogdet(jacobian.transpose(0, 1))
    return volume if bool((sign != 0).all()) and bool(volume.isfinite().all()) else None


# --- a flow on the draw of a latent -------------------------------------------------------------


def judge_posterior_flow(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence
) -> bool:
    """Examine a flow between the draw of a latent and its prior; False if there is none."""
    return False
