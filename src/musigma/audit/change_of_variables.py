"""Maps in a recorded step, and what the change of variables by them adds to its loss.

A value x is mapped to v, and the loss contains w (-log p(v) - log |det dv/dx|). With v held,
moving x and the parameters of the map leaves -w log |det dv/dx| alone, which is compared with
autograd's Jacobian of the recorded graph. With x held, moving v shows p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Node, Origin
from musigma.audit.jacobian import Volume
from musigma.audit.latents import frontier, trace_noise
from musigma.audit.probes import Over
from musigma.audit.step_kl import terms
from musigma.testing import jacobian

__all__ = [
    "EXACT",
    "MOVES",
    "ROUNDING",
    "Change",
    "Output",
    "ends",
    "is_residual",
    "measure",
    "outputs",
    "squared",
]

MOST_DIMENSIONS = 1024
SECONDS = 60.0  # for one Jacobian
EXACT, ROUNDING = 1e-3, 1e-6  # relative errors of a log-determinant
MOVES = 5
# By how many of its standard deviations x is moved, and by how much parameters
NEAR, FAR = ((0.3, 0.05), (0.01, 0.05), (1e-4, 0.05)), ((1.0, 2.0), (1.0, 0.5), (0.3, 0.5))
CHOICES = 30  # of random parameters
STEPS, REACH = 4, 1.0  # towards a determinant of zero, each of at most so many standard deviations
STATISTICS = ("mean", "var", "std", "sum", "var_mean", "std_mean")
SIZES = ("abs", "pow", "square", "mul", "linalg_vector_norm", "norm")
FAILURES = (RuntimeError, TimeoutError)  # of an operation that does not take other values


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


@dataclass
class Map:
    """A map from x to v in a loss.

    Args:
        graph: The recorded step.
        loss: The number of its loss.
        x: The number of the input.
        output: The parts of v.
        held: Values that stay as they were.
        rows: The number of examples, if the map takes them one by one; else one.
        parameters: Whether those of the map are moved.
        beside: What x adds to the loss besides its log-determinant, while v is held.
        noise: The draws by which a trace is estimated.
    """

    graph: Graph
    loss: int
    x: int
    output: Output
    held: Over
    rows: int
    parameters: bool
    beside: Callable[[Tensor], Tensor] | None
    noise: list[int]

    @property
    def parts(self) -> tuple[int, ...]:
        """The numbers of the values that v consists of."""
        return self.output.parts

    @property
    def v(self) -> dict[int, Tensor]:
        """The parts of v, as they were."""
        return {i: self.graph.get(i) for i in self.parts}

    @property
    def where(self) -> str:
        """The line that makes v."""
        return self.graph.where(self.parts[0])

    def of(self, over: Over) -> Tensor:
        """v by example (rows, D), with some values replaced."""
        found = self.graph.run({**self.held, **over}, self.parts)
        return torch.cat([found[i].reshape(self.rows, -1) for i in self.parts], 1)

    def jacobian(self, over: Over, start: int | None = None) -> Tensor:
        """dv/dx by example (rows, D, D); from `start`, if not from x."""
        i = self.x if start is None else start
        at = over.get(i, self.graph.get(i))
        return jacobian(lambda t: self.of({**over, i: t}), at, seconds=SECONDS)

    def volume_at(self, over: Over, start: int | None = None) -> Volume:
        """That of dv/dx by example, without rows and columns of zeros, as a mask makes them."""
        matrices = self.jacobian(over, start)
        masked = (matrices == 0).all(2), (matrices == 0).all(1)
        is_mask = bool((masked[0].sum(1) == masked[1].sum(1)).all())
        return Volume.of(matrices, *masked) if is_mask else Volume.of(matrices)

    def rest_at(self, over: Over) -> Tensor:
        """The loss with v held, without what is beside the log-determinant."""
        value = self.graph.run({**self.held, **over, **self.v}, [self.loss])[self.loss].sum()
        x = over.get(self.x, self.graph.get(self.x))
        return value if self.beside is None else value - self.beside(x)

    def in_v(self, over: Over) -> tuple[Tensor, Tensor, bool]:
        """Curvature and slope of the loss in v at v = 0, with x held; whether it is quadratic."""
        slopes = []
        over = {self.x: self.graph.get(self.x), **self.held, **over}
        for size in (0.0, 1.0, 2.0):
            at = {i: torch.full_like(t, size).requires_grad_() for i, t in self.v.items()}
            value = self.graph.run({**over, **at}, [self.loss])[self.loss].sum()
            found = torch.autograd.grad(value, list(at.values()), materialize_grads=True)
            slopes.append(torch.cat([g.reshape(-1) for g in found]))
        curvature = slopes[1] - slopes[0]
        bent = (slopes[2] - slopes[1] - curvature).abs().max()
        return curvature, slopes[0], bool(bent <= 1e-6 * (curvature.abs().max() + 1e-300))

    def _couples_examples(self) -> bool:
        """Whether v of the first example depends on x of others."""
        with torch.enable_grad():
            x = self.graph.get(self.x).clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.of({self.x: x})[0].sum(), x)
        return bool(slope[1:].any())


@dataclass
class Change(Map):
    """A map that was moved, and what that does to a loss.

    Args:
        rest: The loss with v held, at other places less that at the step's own.
        volume: The log-determinant of the map, likewise.
        own: The log-determinant at the step's own place, by example.
        places: The values that are replaced at each place; none at the step's own.
        mapped: The entries of v that depend on x; the others are masked.
        curvature: That of the loss by entry of v.
        quadratic: Whether the loss is quadratic in v.
        weight: That of log p(v) in the loss, if it is known beforehand.
    """

    rest: Tensor
    volume: Tensor
    own: Volume
    places: list[dict[int, Tensor]]
    mapped: Tensor
    curvature: Tensor
    quadratic: bool
    weight: float | None = None

    @cached_property
    def factor(self) -> float | None:
        """What the log-determinant is multiplied with in the loss; None if it is not in it."""
        factor, error = self.fit
        if error <= ROUNDING:
            return factor
        if self.is_gaussian and self._limit is not None:
            return self._limit
        nearly = error <= EXACT and (self._is_so_far_away or bool(self.noise))
        return factor if nearly else None

    @property
    def is_estimate(self) -> bool:
        """Whether it is nearly in the loss, by a series that ends after a random term, say."""
        near = ROUNDING < self.fit[1] <= EXACT and bool(self.noise)
        return near and self._limit is None and not self._is_so_far_away

    @cached_property
    def _is_so_far_away(self) -> bool:
        """Whether an error that is small, but not of rounding, is as small far away."""
        found = self._again(self.held, self.parameters, far=True)
        if found is None:
            return True
        return found.fit[1] <= EXACT and abs(found.fit[0] / self.fit[0] - 1) < EXACT

    def _again(self, held: Over, parameters: bool, far: bool = False) -> Change | None:
        """The map, measured with other values held, or at other places."""
        where = self.graph, self.loss, self.x, self.output
        return measure(*where, held, parameters, self.beside, far)

    def folds(self) -> bool:
        """Whether the sign of the Jacobian's determinant differs between places.

        These are random, or where steps towards a smaller determinant end; or those of the step
        itself, with other parameters, if all are vectors, as of a planar flow.
        """
        base, found = self.graph.get(self.x), [self.own]
        generator, std = torch.Generator().manual_seed(37), float(base.std())
        noise = torch.randn(base.shape, generator=generator, dtype=torch.float64)
        far = 4 ** torch.linspace(0, 1, self.rows).double()
        path = [base + std * (far[:, None] * noise.reshape(self.rows, -1)).reshape(base.shape)]
        with suppress(*FAILURES):
            for _ in range(STEPS if self.fit[1] < ROUNDING else 0):
                path.append(self._towards_zero(path[-1], REACH * std))
        for x in path[-2:]:
            with suppress(*FAILURES):  # so far out
                found.append(self.volume_at({self.x: x}))
        choices = self._parameters(generator)
        others = (self.volume_at(p) for p in choices if self.rest_at(p).isfinite())
        return all(Volume(*map(torch.cat, zip(*found, strict=True))).signs()) or any(
            all(volume.signs()) for volume in others
        )

    def _parameters(self, generator: torch.Generator) -> Iterator[dict[int, Tensor]]:
        """Random parameters of the map; none if one is a matrix, or if the step branches on it."""
        graph, above = self.graph, self.graph.upstream(self.parts, stop=[self.x])
        own = [v for i in above if (v := graph[i]).kind == "parameter"]
        read = graph.upstream(n.ins[0] for n in graph.nodes if n.name == "_local_scalar_dense")
        vectors = all(v.numel == max(v.shape, default=1) and v.id not in read for v in own)
        for _ in range(CHOICES if vectors and own and self.fit[1] < ROUNDING else 0):
            sizes = 10 ** (2 * torch.rand(len(own), generator=generator) - 1).double()
            noise = (torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in own)
            yield {v.id: s * e for v, s, e in zip(own, sizes, noise, strict=True)}

    def _towards_zero(self, x: Tensor, most: float) -> Tensor:
        """x after a step to where a linear determinant is as large, with the other sign."""
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.rest_at({self.x: x}), x)
        slope = slope.reshape(self.rows, -1) / (self.factor or 1.0)  # of log |det|
        size = slope.norm(dim=1, keepdim=True)
        step = slope / size * (2 / size).clamp(max=most)
        return x.detach() - step.nan_to_num().reshape(x.shape)

    @property
    def fit(self) -> tuple[float, float]:
        """The best factor of the log-determinant in the loss, and the relative error of it."""
        return _fit(self.rest, self.volume)

    @property
    def is_right_in_x(self) -> bool:
        """Whether the log-determinant is in the loss as long as no parameter is moved."""
        factor, error = _fit(self.rest[::2], self.volume[::2])
        return factor < 0 and error <= EXACT

    @property
    def moves_volume(self) -> bool:
        """Whether the log-determinant is no constant."""
        return float(self.volume.abs().max()) > 1e-7

    @property
    def is_absent(self) -> bool:
        """Whether the loss does not change at all while v is held."""
        size = float(self.curvature.abs().max()) * (1 + float(self.volume.abs().max()))
        return float(self.rest.abs().max()) <= 1e-9 * max(size, 1e-300)

    @property
    def is_gaussian(self) -> bool:
        """Whether v is squared, as by a Gaussian whose parameters depend on x by v alone."""
        convex = self.output.squared and self.quadratic and float(self.curvature.min()) > 0
        if not convex or self.output.heads:
            return convex
        x = self.places[-1].get(self.x, self.graph.get(self.x))
        found = [self.in_v(over)[:2] for over in ({}, {self.x: x})]
        return all(torch.allclose(a, b) for a, b in zip(*found, strict=True))

    @cached_property
    def _limit(self) -> float | None:
        """The factor near the identity, of the solver of a differential equation.

        Its log-determinant is an approximation, and the better, the smaller the weights that it
        uses again and again.
        """
        graph, above = self.graph, self.graph.upstream(self.parts, stop=[self.x])
        moved = above & graph.downstream([self.x])
        weights = [i for i in above if graph[i].kind == "parameter" and _uses(graph, i, moved) > 2]
        for size in (0.3, 0.1, 0.03, 0.01) if weights else ():
            held = {**self.held, **{i: size * graph.get(i) for i in weights}}
            near = self._again(held, parameters=False)
            factor, error = near.fit if near is not None else (0.0, math.inf)
            if error < EXACT / 3:
                return factor
        return None


def _fit(rest: Tensor, volume: Tensor) -> tuple[float, float]:
    size = float(volume.abs().max())
    if size < 1e-9:
        return 0.0, math.inf
    factor = float(rest @ volume / (volume @ volume))
    off = float((rest - factor * volume).abs().max())
    return factor, off / max(abs(factor) * size, 1e-300)


def _uses(graph: Graph, i: int, moved: set[int]) -> int:
    """By how many operations with moved results a value is used, as it is or viewed."""
    return sum(
        _uses(graph, n.outs[0], moved) if n.view else bool(moved.intersection(n.outs))
        for n in graph[i].users
    )


def measure(
    graph: Graph, loss: int, x: int, output: Output, held: Over, parameters: bool = True,
    beside: Callable[[Tensor], Tensor] | None = None, far: bool = False,
) -> Change | None:  # fmt: skip
    """Move x, and the map's parameters, with v held; and v with x held.

    None if they cannot be moved, or if the loss has no curvature in v.
    """
    above = graph.upstream(output.parts, stop=[x])
    noise = [i for i in trace_noise(graph, loss) if i not in above]
    shape, base = graph[x].shape, graph.get(x)
    rows = shape[0] if len(shape) > 1 else 1
    if x not in above or any(graph[i].shape[-len(shape) :] != shape for i in noise):
        return None
    held = {**held, **_batch_statistics(graph, above & graph.downstream([x]), rows)}
    held |= _penalties(graph, loss)
    found = Map(graph, loss, x, output, held, rows, parameters, beside, noise)
    try:
        curvature, _, quadratic = found.in_v({})
        if not bool(curvature.any()):
            return None
        if any(t.numel() % rows for t in found.v.values()) or found._couples_examples():
            found.rows = 1
        if base.numel() // found.rows > MOST_DIMENSIONS:
            return None
        mapped = (found.jacobian({}) != 0).any(2).reshape(-1)
    except FAILURES:
        return None
    leaves = [graph[i] for i in above if graph[i].kind == "parameter" and i not in held]
    free = [v.id for v in leaves if parameters and v.source is not None and v.source.requires_grad]
    units = _units(graph, noise, base.numel() // rows)
    size = float(base.std()) if base.numel() > 1 and float(base.std()) > 0 else 1.0
    sizes = [_places(graph, x, free, s * size, p, far) for s, p in (FAR if far else NEAR)]
    for places in [_least_singular(found, sizes)] if far else sizes:
        try:
            volumes = [found.volume_at(p) for p in places]
            with torch.no_grad():
                values = [[found.rest_at({**p, **e}) for e in units] for p in places]
        except FAILURES:
            continue
        rest = torch.tensor(values, dtype=torch.float64).mean(1)
        volume = torch.stack([v.log_det.sum() for v in volumes])
        if mapped.any() and volume.isfinite().all() and rest.isfinite().all():
            return Change(
                **vars(found), rest=rest[1:] - rest[0], volume=volume[1:] - volume[0],
                own=volumes[0],
                places=places, mapped=mapped,
                curvature=curvature[mapped], quadratic=quadratic,
            )  # fmt: skip
    return None


def _least_singular(found: Map, sizes: list[list[dict[int, Tensor]]]) -> list[dict[int, Tensor]]:
    """The places with the largest determinants: a small number that is added shows least."""

    def least(place: dict[int, Tensor]) -> float:
        try:
            return float(found.volume_at(place).log_det.min().nan_to_num(-math.inf))
        except FAILURES:
            return -math.inf

    own, *others = sizes[0]
    others += [place for more in sizes[1:] for place in more[1:]]
    return [own, *sorted(others, key=least)[-MOVES:]]


def _places(
    graph: Graph, x: int, free: list[int], spread: float, moved: float, far: bool
) -> list[dict[int, Tensor]]:
    """The values as they were, and others: of x alone, and of the parameters as well."""
    generator = torch.Generator().manual_seed(31)

    def near(i: int, size: float) -> Tensor:
        t = graph.get(i)
        return t + size * torch.randn(t.shape, generator=generator, dtype=torch.float64)

    places: list[dict[int, Tensor]] = [{}]
    for k in range(MOVES):
        places.append({x: near(x, spread)})
        places[-1] |= {i: near(i, moved) for i in free if far or k % 2}
    return places


def _units(graph: Graph, noise: list[int], n: int) -> list[dict[int, Tensor]]:
    """Values of noise over which the mean of a quadratic form is its trace, for each example."""
    units = math.sqrt(n) * torch.eye(n, dtype=torch.float64) if noise else torch.zeros(1, 1)
    return [
        {i: u.expand(graph[i].numel // n, n).reshape(graph[i].shape) for i in noise} for u in units
    ]


def _penalties(graph: Graph, loss: int) -> dict[int, Tensor]:
    """The terms of a loss that are the size of parameters, as they were."""
    own = (graph[i] for i in terms(graph, loss))
    fixed = (v for v in own if v.origin == Origin.PARAMETERS and not v.draws)
    return {v.id: graph.get(v.id) for v in fixed if v.node and v.node.name in SIZES}


def _batch_statistics(graph: Graph, among: set[int], rows: int) -> dict[int, Tensor]:
    """Means and variances over the batch, as they were: constants to a change of variables."""
    nodes = [n for n in graph.nodes if n.name in STATISTICS and rows in graph[n.ins[0]].shape]
    over = [o for n in nodes for o in n.outs if o in among and rows not in graph[o].shape]
    return {o: graph.get(o) for o in over if rows > 1}


# --- candidates ---------------------------------------------------------------------------------


def outputs(graph: Graph, loss: int, x: int) -> list[Output]:
    """Values that x may be mapped to: squared ones first, then others of the size of x."""
    after = graph.downstream([x]) & graph.upstream([loss])
    numel = graph[x].numel
    found: dict[int, list[int]] = {}
    answer: dict[int, Output] = {}
    for node in reversed(graph.nodes):
        i = squared(graph, node, after)
        if i is None or i == x or is_residual(graph, i, after):
            continue
        z, heads = _conditional(graph, i, after)
        found.setdefault(z, heads)
        whole = next(k for k in node.ins if k in after)  # its shift may be that of a map
        for k in (_unscaled(graph, z, after, given=True), z, i, whole):
            if graph[k].numel == numel and k != x:
                given = tuple(heads) if k not in (i, whole) else ()
                answer.setdefault(k, Output((k,), True, given))
    smaller = [i for i in found if graph[i].numel < numel]
    if smaller and sum(graph[i].numel for i in smaller) == numel:
        heads = dict.fromkeys(h for i in smaller for h in found[i])
        answer[-1] = Output(tuple(smaller), True, tuple(heads))
    return list(answer.values()) or ends(graph, loss, x)


def ends(graph: Graph, loss: int, x: int) -> list[Output]:
    """Values of the size of x that layers end in."""
    after, numel = graph.downstream([x]) & graph.upstream([loss]), graph[x].numel

    def is_made(node: Node | None) -> bool:  # and not a view of another of that size
        return node is not None and not (
            node.view and any(graph[k].numel == numel for k in node.ins)
        )

    found = [
        v.id
        for v in reversed(graph.values)
        if v.id in after and v.numel == numel and v.floating and is_made(v.node)
        and v.origin & Origin.PARAMETERS and _is_last(graph, v.id)
    ]  # fmt: skip
    return [Output((i,), False) for i in found[:6]]


def squared(graph: Graph, node: Node, after: set[int]) -> int | None:
    """The value that an operation squares, before it is shifted and scaled."""
    name, moving = node.name.rstrip("_"), [i for i in node.ins if i in after]
    power = name == "pow" and len(node.flat) > 1 and node.flat[1] == 2
    product = name in ("mul", "dot", "bmm") and len(moving) == 2
    if not (moving and (power or product or name in ("square", "linalg_vector_norm"))):
        return None
    found = {_unscaled(graph, i, after) for i in moving}
    return found.pop() if len(found) == 1 else None


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


def _unscaled(graph: Graph, i: int, after: set[int], given: bool = False) -> int:
    """A value before it is shifted and scaled by what does not depend on x.

    If `given`, also by what layers give for other data.
    """
    linear = ("sub", "add", "div", "mul", "neg", "linalg_solve_triangular", "mm", "bmm")
    while True:
        node = graph[i].node
        if node is None or not (node.name in linear or node.view):
            return i
        moving = [k for k in node.ins if k in after]
        rest = [k for k in node.ins if k not in after]
        if len(moving) != 1 or graph[moving[0]].numel != graph[i].numel:
            return i
        beside = [graph[k].origin for k in rest]
        if any(graph[k].draws for k in rest) or Origin.DATA in beside:
            return i
        if not given and any(o & Origin.DATA for o in beside):
            return i
        if node.name in ("mm", "bmm") and any(graph[k].origin for k in rest):
            return i  # a layer of the map
        i = moving[0]


def is_residual(graph: Graph, i: int, after: set[int]) -> bool:
    """Whether a value is a difference to data, or to a draw: an error that is squared."""
    node = graph[i].node
    if node is None or node.name not in ("sub", "sub_", "rsub"):
        return False
    return any(
        (graph[k].origin == Origin.DATA or (graph[k].draws and not graph[k].origin))
        and graph[k].numel == graph[i].numel
        for k in node.ins
    )
