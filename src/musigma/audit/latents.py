"""Latents of a recorded step: where Gaussian noise enters as mean + sigma * noise.

A draw is followed along the values that are affine in it to the first in which something that
depends on parameters has been added: z. Its heads are the values, made by layers, that z is
computed from by pointwise operations: what the encoder emits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Node, Origin, Value

__all__ = [
    "Latent",
    "find_latents",
    "frontier",
    "holds",
    "meetings",
    "own_values",
    "stray_draws",
    "trace_noise",
]

PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "_sparse_mm", "addbmm",
    "linear", "matmul", "einsum", "_trilinear", "addr", "ger", "outer", "vdot",
}  # fmt: skip
SELECTIONS = {"index", "index_select", "gather", "embedding"}
REDUCTIONS = {"sum", "mean", "logsumexp", "amax", "amin", "prod", "var", "std", "norm",
              "linalg_vector_norm", "var_mean", "cumsum", "_softmax", "_log_softmax"}  # fmt: skip


@dataclass
class Latent:
    """A latent of a step.

    Args:
        draws: The numbers of its Gaussian draws.
        z: The number of mean + sigma * noise.
        heads: The numbers of the values that mean and sigma are computed from, pointwise.
        diagonal: Each entry of z has an entry of the noise of its own.
        where: The user's line that makes z.
        shared: Several entries of z have one entry of the noise.
        noise_shape: The shape of the noise.
        uniform: The noise is drawn by a uniform distribution.
        siblings: Further draws from the same heads, each with its z.
    """

    draws: tuple[int, ...]
    z: int
    heads: tuple[int, ...]
    diagonal: bool
    where: str
    shared: bool = False
    noise_shape: tuple[int, ...] = ()
    uniform: bool = False
    siblings: tuple[tuple[int, int], ...] = ()

    @property
    def zs(self) -> list[int]:
        """The numbers of z, and of those of further draws."""
        return [self.z, *(z for _, z in self.siblings)]

    @property
    def noise(self) -> list[int]:
        """The numbers of all draws."""
        return [*self.draws, *(d for d, _ in self.siblings)]

    def at(self, graph: Graph, over: Mapping[int, Tensor], noise: float | Tensor) -> Tensor:
        """The value of z for some noise; differentiable in the values replaced."""
        e = {d: torch.zeros_like(graph.get(d)) + noise for d in self.draws}
        return graph.run({**over, **e}, [self.z])[self.z]

    def moments(self, graph: Graph, over: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and sigma of z, if it is diagonal, with some values replaced."""
        mean = self.at(graph, over, 0.0)
        return mean, self.at(graph, over, 1.0) - mean


def find_latents(graph: Graph, loss: int) -> list[Latent]:
    """The latents that a loss depends on, in the order of their draws."""
    live = graph.upstream([loss]) - graph.upstream(trace_noise(graph, loss))
    latents: list[Latent] = []
    for draw in graph.draws("gaussian", "random"):
        latent = _latent(graph, draw, live, latents) if draw.id in live and draw.floating else None
        if latent is None:
            continue
        beside = draw.id in graph.upstream([loss], stop=[latent.z])
        if not (latent.uniform and beside):  # a distribution function that is inverted
            latents.append(latent)
    return _joined(graph, latents)


def stray_draws(graph: Graph, loss: int, latents: list[Latent]) -> list[int]:
    """Gaussian draws that parameters scale, but that are in no latent."""
    live = graph.upstream([loss])
    zs = [z for latent in latents for z in latent.zs]
    inside = graph.upstream([*zs, *trace_noise(graph, loss)])
    found = []
    for draw in graph.draws("gaussian"):
        scaling = [n for n in draw.users if n.name.rstrip("_") in ("mul", *PRODUCTS)]
        scaled = {o for n in scaling if not _weighs(graph, n, draw.id) for o in n.outs} & live
        if draw.id not in inside and any(graph[o].origin & Origin.PARAMETERS for o in scaled):
            found.append(draw.id)
    return found


def trace_noise(graph: Graph, loss: int) -> list[int]:
    """Noise of which a loss is a quadratic form, as of an estimated trace, and not of a draw."""
    live, found = graph.upstream([loss]), []
    for v in graph.values:
        met = any(graph[o].origin for n in v.users for o in n.outs)
        if not (v.draws and not v.origin and v.floating and v.id in live and met):
            continue

        def change(k: float, v: Value = v) -> float:
            noise = {v.id: k * graph.get(v.id)}, {v.id: 0 * graph.get(v.id)}
            return float((graph.value(noise[0], loss) - graph.value(noise[1], loss)).sum())

        try:
            once = change(1)
            exact = 1e-9 * abs(once) + 1e-15 * float(graph.get(loss).abs().sum())
            even = abs(once) > 4 * exact and abs(change(-1) - once) < exact
            if even and abs(change(2) - 4 * once) < 4 * exact:
                found.append(v.id)
        except RuntimeError:  # it does not take other noise
            continue
    return found


def _latent(graph: Graph, draw: Value, live: set[int], known: list[Latent]) -> Latent | None:
    """The latent of a draw; None if its noise is no part of mean + sigma * noise."""
    zero = torch.zeros_like(graph.get(draw.id))
    generator = torch.Generator().manual_seed(3)
    unit = 10 * torch.randn(zero.shape, generator=generator, dtype=zero.dtype)
    todo, seen = [draw.id], set()
    unshifted: int | None = None  # sigma * noise, given to a layer without a mean
    while todo:
        i = todo.pop(0)
        for node in graph[i].users:
            if id(node) in seen or not live.intersection(node.outs):
                continue
            if _weighs(graph, node, i):
                unshifted = i if graph[i].origin & Origin.PARAMETERS else unshifted
                continue
            seen.add(id(node))
            for o in live.intersection(node.outs):
                if not graph[o].floating or node.name in REDUCTIONS:
                    continue
                try:
                    at = [graph.value({draw.id: e}, o) for e in (zero, unit, 2 * unit)]
                except RuntimeError:  # it does not take other noise
                    continue
                if not _affine(*at):
                    continue
                sides = [k for k in node.ins if not graph[k].depends_on(draw.id)]
                origin = Origin.NOTHING
                for k in sides:
                    origin |= graph[k].origin
                if float(at[0].abs().max()) == 0 or not origin:
                    todo.append(o)
                elif origin & Origin.PARAMETERS:
                    return _at_site(graph, draw, o, unit, known)
    return None if unshifted is None else _at_site(graph, draw, unshifted, unit, known)


def _weighs(graph: Graph, node: Node, i: int) -> bool:
    """Whether a layer's weights multiply a value: then it is an input, and not noise."""
    if node.name not in PRODUCTS:
        return False
    others = [j for j in node.ins if j != i]
    return any(not graph[j].origin & Origin.DATA and _is_weight(graph, j) for j in others)


def _is_weight(graph: Graph, i: int) -> bool:
    """Whether a value is a parameter, or a view of one."""
    v = graph[i]
    while v.node is not None and v.node.view and v.node.ins:
        v = graph[v.node.ins[0]]
    return v.kind == "parameter"


def _affine(zero: Tensor, one: Tensor, two: Tensor) -> bool:
    """Whether a value depends on noise, and is affine in it."""
    if not all(t.isfinite().all() for t in (zero, one, two)):
        return False
    bent = float((two - 2 * one + zero).abs().max())
    moved = float((one - zero).abs().max())
    return bent <= 1e-9 * (1 + float(one.abs().max())) and moved > 1e-12 * (
        1 + float(zero.abs().max())
    )


def _at_site(
    graph: Graph, draw: Value, z: int, unit: Tensor, known: list[Latent]
) -> Latent | None:
    domain = graph.upstream([z])
    sides = [
        i
        for node in graph.nodes
        if domain.intersection(node.outs) and any(graph[o].depends_on(draw.id) for o in node.outs)
        for i in node.ins
        if not graph[i].depends_on(draw.id)
    ]
    heads = frontier(graph, sides, {latent.z for latent in known})
    if not heads or set(heads) <= {latent.z for latent in known}:
        return None
    zero = torch.zeros_like(unit)
    base = graph.value({draw.id: zero}, z)
    full = graph.value({draw.id: unit}, z) - base
    shared = diagonal = False
    if graph[z].numel == unit.numel():
        half = torch.rand(unit.shape, generator=torch.Generator().manual_seed(5)) < 0.5
        moved = graph.value({draw.id: unit * half}, z) - base
        same = ((moved - full).abs() <= 1e-12) | (moved.abs() <= 1e-12)
        diagonal = bool(same.all())
    elif graph[z].numel > unit.numel():
        ratio = full / (graph.value({draw.id: torch.ones_like(unit)}, z) - base)
        shared = bool(torch.isin(ratio.mul(1e9).round(), unit.mul(1e9).round()).all())
        if shared and not _scales_by(graph, heads, z, draw.id):
            return None
    return Latent(
        (draw.id,), z, tuple(heads), diagonal or shared, graph.where(z), shared,
        tuple(unit.shape), draw.kind == "random",
    )  # fmt: skip


def _scales_by(graph: Graph, heads: list[int], z: int, draw: int) -> bool:
    """Whether sigma depends on the heads: else it may be a distance between draws."""
    moved = {i: graph.get(i) * 1.1 + 0.1 for i in heads}
    slopes = []
    for over in ({}, moved):
        at = [graph.value({**over, draw: torch.full_like(graph.get(draw), e)}, z) for e in (0, 1)]
        slopes.append(at[1] - at[0])
    return not torch.allclose(*slopes)


def frontier(graph: Graph, ids: Collection[int], stops: Collection[int] = ()) -> list[int]:
    """The values made by layers, or the parameters, that some values are pointwise made of."""
    found, seen = [], set()
    todo = list(dict.fromkeys(ids))
    while todo:
        i = todo.pop(0)
        if i in seen:
            continue
        seen.add(i)
        v = graph[i]
        if not v.origin & Origin.PARAMETERS or not v.floating:
            continue
        if (
            i in stops
            or v.node is None
            or not (v.node.pointwise or v.node.view)
            or _adds_bias(graph, v.node)
        ):
            found.append(i)
        else:
            todo += v.node.ins
    return found


def _adds_bias(graph: Graph, node: Node) -> bool:
    """Whether an operation adds a parameter to the output of a layer."""
    if node.name.rstrip("_") != "add" or len(node.ins) != 2:
        return False
    origins = [graph[i].origin for i in node.ins]
    return (
        Origin.PARAMETERS in origins and Origin.PARAMETERS | Origin.DATA in origins
        and graph[node.ins[origins.index(Origin.PARAMETERS)]].kind == "parameter"
    )  # fmt: skip


def _joined(graph: Graph, latents: list[Latent]) -> list[Latent]:
    """Draws of one z that is their sum become one latent, and those of the same heads siblings."""
    found: list[Latent] = []
    for latent in latents:
        for k, first in enumerate(found):
            depends = first.z != latent.z and graph[latent.z].depends_on(first.draws[0])
            if depends and set(first.heads) <= set(latent.heads):  # as in a low-rank covariance
                draws = (*first.draws, *latent.draws)
                found[k] = Latent(draws, latent.z, latent.heads, False, latent.where)
                break
            if latent.diagonal and first.heads == latent.heads:
                more = (latent.draws[0], latent.z)
                found[k] = replace(first, siblings=(*first.siblings, more))
                break
        else:
            found.append(latent)
    return found


# --- where the decoder begins -------------------------------------------------------------------


def holds(graph: Graph, latent: Latent) -> dict[int, Tensor]:
    """The results, as they were, of layers and selections that z or the heads are given to.

    With these held, a loss depends on the heads by its KL alone.
    """
    after_z = graph.downstream(latent.zs)
    after = graph.downstream([*latent.zs, *latent.heads])
    before = graph.upstream(latent.zs)
    of_network = all(graph[i].kind == "parameter" for i in latent.heads)
    held: dict[int, Tensor] = {}
    for node in graph.nodes:
        if not after.intersection(node.outs) or before.intersection(node.outs):
            continue
        given = [i for i in node.ins if i in after]
        uses = of_network and node.name in PRODUCTS
        uses = uses and any(graph[i].origin & Origin.DATA for i in node.ins)
        if given and (uses or _begins_decoder(graph, node, after_z)):
            held |= {o: graph.get(o) for o in node.outs if graph[o].floating}
    return held


def _begins_decoder(graph: Graph, node: Node, after_z: set[int]) -> bool:
    if node.name in SELECTIONS:
        given = [i for i in node.ins[1:] if graph[i].kind != "constant"]
        selects = any(graph.get(i).dtype != torch.bool for i in given)  # no padding
        return node.ins[0] in after_z and selects and node.name != "embedding"
    if node.pointwise or node.view or node.name in REDUCTIONS:
        return False
    fixed = [graph[i].origin for i in node.ins if not graph[i].draws and graph[i].numel > 1]
    pairs = sum(i in after_z for i in node.ins) == 2
    product = node.name in PRODUCTS and (Origin.DATA in fixed or pairs)
    return Origin.PARAMETERS in fixed or product


def own_values(latents: Collection[Latent]) -> set[int]:
    """The numbers of z and of the heads of some latents."""
    return {i for latent in latents for i in (latent.z, *latent.heads)}


def meetings(graph: Graph, latents: list[Latent], loss: int) -> list[tuple[int, int]]:
    """Values that are decoded, each with the data that an operation compares it with."""
    own = own_values(latents)
    after = graph.downstream(own)
    live = graph.upstream([loss])
    found = []
    for node in graph.nodes:
        if not live.intersection(node.outs) or node.name in (*SELECTIONS, *PRODUCTS):
            continue
        decoded = [i for i in node.ins if i in after]
        data = [i for i in node.ins if i not in after and graph[i].origin & Origin.DATA]
        data = [i for i in data if graph[i].numel > 1]
        if not (data and decoded) or own.intersection(frontier(graph, decoded, own)):
            continue  # of these, the heads meet data in a prior
        found.append((decoded[0], _root(graph, data[0])))
    return found


def _root(graph: Graph, data: int) -> int:
    """The data that a value repeats, expands or reshapes."""
    node = graph[data].node
    while node is not None and node.view and len(set(node.ins)) == 1:
        if graph[node.ins[0]].numel > graph[data].numel:
            break
        data = node.ins[0]
        node = graph[data].node
    return data
