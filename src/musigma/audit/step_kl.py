r"""The divergence in a loss: how it depends on the Gaussian that a step draws its latent from.

The heads of one latent are moved at random, with the decoder held. Then the gradient of the loss
in them is compared with those of the moments of z = mean + sigma * noise, both by autograd on the
replayed graph:

.. math::
    F = \sum_i A_i \tfrac12 \mu_i^2 + B_i \mu_i + C_i \tfrac12 \sigma_i^2 + D_i \log \sigma_i,

which is a KL divergence to N(-B / A, -D / C), of weight -D, if and only if A = C > 0 > D. A KL by
draws is averaged over noise first, exactly, as it is of second degree in it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Node
from musigma.audit.latents import Latent, holds
from musigma.audit.probes import Over, Prober, Probes, gradient
from musigma.audit.scales import READINGS, Curve, name_curve

__all__ = [
    "Divergence",
    "Fit",
    "data_terms",
    "entropy",
    "find_divergence",
    "fit_moments",
    "sampled_scale",
    "terms",
]

EXACT = 1e-6  # relative error of gradients up to which two formulas are one
NEAR = 1e-3  # up to which they differ by a floor or an offset


@dataclass
class Fit:
    """The coefficients of a loss by entries of the heads that move means, and that move scales.

    `mean` holds A and B (2, m), `scale` C and D (2, s). `residual` is relative to the largest
    gradient, `size` that gradient; `copies` counts the draws of each mean.
    """

    mean: Tensor
    scale: Tensor
    residual: float
    size: float
    copies: float = 1.0

    @property
    def weight(self) -> float:
        """The weight of log sigma, per latent of one example."""
        weights = -self.scale[1]
        counted = weights[weights.abs() > _zero(weights)]  # a padding is not
        return self.copies * float(counted.nanmedian()) if counted.numel() else math.nan

    @property
    def is_kl(self) -> bool:
        """Whether it is a KL divergence to Gaussians."""
        if self.residual > NEAR or not self.mean.numel() or not self.scale.numel():
            return False
        a, c, d = self.mean[0], self.scale[0], -self.scale[1]
        masked = (c.abs() <= _zero(c)) & (d.abs() <= _zero(d))
        if not bool(a.isfinite().any()):  # it says nothing of the means
            a = c
        elif bool(masked.any()):
            a = a[~(a.abs() <= _zero(a))]
        a, c, d = a[a.isfinite()], c[~masked], d[~masked & d.isfinite()]
        if not (a.numel() and d.numel()) or not (
            min(float(a.min()), float(c.min()), float(d.min())) > 0
        ):
            return False
        if len(a) == len(c) and not _same(a.sort().values, c.sort().values):
            return False
        return _same(a.min(), c.min()) and _same(a.max(), c.max())

    @property
    def prior(self) -> tuple[Tensor, Tensor]:
        """Means, and standard deviations, of the prior, by entry."""
        known = self.scale[:, -self.scale[1] > 1e-9 * (-self.scale[1]).nan_to_num().max()]
        means = self.mean[:, self.mean[0] > 1e-9 * self.mean[0].nan_to_num().max()]
        return -means[1] / means[0], (-known[1] / known[0]).clamp(min=0).sqrt()

    @property
    def is_standard(self) -> bool:
        """Whether the prior is N(0, 1)."""
        mean, std = self.prior
        return bool(std.numel()) and bool(
            (mean.abs() < NEAR).all() and ((std - 1).abs() < NEAR).all()
        )


def _zero(t: Tensor) -> Tensor:
    """What counts as zero among some coefficients."""
    return 1e-9 * t.nan_to_num().abs().amax().clamp(min=1e-300) if t.numel() else t.new_zeros(())


@dataclass
class Divergence:
    """What the loss has of a latent's divergence.

    Args:
        kind: "kl"; "function of the kl" (`form` says which); "constant": the loss does not depend
            on the heads, though a term of it was computed from them; "absent"; "other prior": the
            entropy of q is right, and the prior is no Gaussian; "wrong"; "unknown".
        fit: The coefficients.
        form: Of a function of the KL: "capacity", "free bits", "other".
        weight: Of the KL in the loss, per latent of one example; NaN if it is not known.
        by_draws: It is estimated from z.
        read_as: How the KL reads the second head; None if it reads what is sampled, or unknown.
        importance: It is in the log weights of an importance-weighted bound.
        held: The values that were held to see it.
        where: The line of its operation that is nearest to the heads.
    """

    kind: str
    fit: Fit | None = None
    form: str = ""
    weight: float = math.nan
    by_draws: bool = False
    read_as: str | None = None
    importance: bool = False
    muted: bool = False
    held: dict[int, Tensor] = field(default_factory=dict)
    heads: tuple[int, ...] = ()
    where: str = ""


# --- reading the gradients ----------------------------------------------------------------------


def _same(a: Tensor, b: Tensor, tolerance: float = NEAR) -> bool:
    return bool(((a - b).abs() <= tolerance * (a.abs() + b.abs())).all())


def fit_moments(p: Probes, copies: float = 1.0) -> Fit:
    """The coefficients of a loss by entry of the heads."""
    means, scales = p.moving
    size, worst = float(p.loss.abs().max()), 0.0
    parts: dict[str, list[Tensor]] = {"mean": [], "scale": []}
    for at, rows in (
        (means & ~scales, {"mean": (0, 1)}),
        (scales & ~means, {"scale": (2, 3)}),
        (means & scales, {"mean": (0, 1), "scale": (2, 3)}),
    ):
        columns = [k for pair in rows.values() for k in pair]
        found, error = _solve(p.moments[columns][:, :, at], p.loss[:, at])
        for n, name in enumerate(rows):
            parts[name].append(found[2 * n : 2 * n + 2])
        worst = max(worst, error)
    others = p.loss[:, ~(means | scales)].abs()
    worst = max(worst, float(others.max()) if others.numel() else 0.0)
    mean, scale = (torch.cat(parts[name], 1) for name in ("mean", "scale"))
    fixed = (p.moments[0].abs() <= 1e-12).all(0)  # means whose squares have a constant sum
    order = [torch.cat([torch.arange(len(means))[at] for at in rows]) for rows in (
        (means & ~scales, means & scales), (scales & ~means, means & scales))]  # fmt: skip
    none = 1e-11 * float(p.moments[3].abs().max())
    lone = (p.moments[3].abs() <= none).all(0)[order[1]]  # no part in log sigma
    scale = torch.stack([scale[0], torch.where(lone, math.nan, scale[1])])
    mean = torch.stack([torch.where(fixed[order[0]], math.nan, mean[0]), mean[1]])
    return Fit(mean, scale, worst / max(size, 1e-300), size, copies)


def _solve(rows: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Coefficients (k, n) of rows (k, T, n) in y (T, n) by entry, and the largest residual."""
    if y.shape[1] == 0:
        return rows.new_zeros(len(rows), 0), 0.0
    a = rows.permute(2, 1, 0)
    size = a.abs().amax(1, keepdim=True).clamp(min=1e-300)
    found = torch.linalg.lstsq(a / size, y.T[..., None], driver="gelsd").solution
    error = float((a / size @ found - y.T[..., None]).abs().max())
    return (found / size.mT)[..., 0].T, error


@dataclass
class _Case:
    """One way of looking at a divergence: heads that are moved, values that are held, a target."""

    prober: Prober
    target: int
    held: dict[int, Tensor]
    importance: bool = False
    muted: bool = False

    def __post_init__(self) -> None:
        graph, latent = self.prober.graph, self.prober.latent
        self.by_draws = self.target in graph.downstream(latent.draws, stop=self.held)
        self.probes = self.prober.measure(self.target, self.held, self.by_draws)
        if self.probes is not None:
            means = int(self.probes.moving[0].sum())
            copies = graph[latent.z].numel / max(1, means)
            self.fit = fit_moments(self.probes, copies if copies >= 1 else 1.0)

    @property
    def flat(self) -> bool:
        """Whether the target does not depend on the heads."""
        if self.probes is None:
            return False
        return self.fit.size <= 1e-9 * (1 + max(abs(v) for v in self.probes.values))

    def found(self, kind: str, **more: object) -> Divergence:
        """The divergence seen from here."""
        sign = -1.0 if self.importance else 1.0
        weight = sign * self.fit.weight if self.probes is not None else math.nan
        answer = Divergence(
            kind, self.fit if self.probes is not None else None, weight=weight,
            by_draws=self.by_draws, importance=self.importance, muted=self.muted,
            held=self.held, heads=self.prober.heads, where=self.where,
        )  # fmt: skip
        return replace(answer, **more) if more else answer  # pyright: ignore

    @property
    def where(self) -> str:
        """The line of the first operation on the heads that is no part of z."""
        graph, latent = self.prober.graph, self.prober.latent
        before = graph.upstream([latent.z])
        live = graph.upstream([self.target], stop=self.held)
        after = graph.downstream([*self.prober.heads, latent.z], stop=self.held)
        for node in graph.nodes:
            outs = set(node.outs)
            own = live & outs and not before & outs and not outs <= set(self.held)
            if own and node.where and after.intersection(node.ins):
                return node.where
        return ""


def find_divergence(graph: Graph, latent: Latent, latents: list[Latent], loss: int) -> Divergence:
    """The divergence of a latent in a loss, as the first way of looking at it that explains it."""
    whole = Prober(graph, latent)
    decoder = holds(graph, latent)
    data = {t: graph.get(t) for t in data_terms(graph, latents, loss)}
    mixed = _mixed(graph, latent, latents)
    views = [decoder, decoder | mixed, decoder | data, decoder | data | mixed]
    views = [v for k, v in enumerate(views) if v.keys() not in [w.keys() for w in views[:k]]]
    cases: list[_Case] = []
    after = _after(graph, latent, decoder)
    weights = [i for i in _log_weights(graph, latent, loss) if i in after]
    if whole.usable:
        for held in views:
            case = _Case(whole, loss, held)
            cases.append(case)
            if case.probes is not None and case.fit.is_kl:
                if weights:
                    break
                return case.found("kl")
        for target in weights or _log_weights(graph, latent, loss):
            case = _Case(whole, target, decoder, importance=True)
            negative = case.probes is not None and replace(
                case.fit, mean=-case.fit.mean, scale=-case.fit.scale
            )
            if negative and negative.is_kl:
                return case.found("kl", fit=negative, weight=negative.weight)
        if weights:
            return cases[0].found("unknown", form="it stands in weights of the draws")
        for case in cases:
            if (target := _muted(case)) is not None:
                case = _Case(whole, target, case.held, muted=True)
                if case.probes is not None and case.fit.is_kl:
                    return case.found("kl", weight=0.0)
        for case in cases:
            if (form := _function_of_kl(case)) is not None:
                return case.found("function of the kl", form=form[0], weight=form[1])
            if (gated := _gated(case)) is not None:
                return case.found("function of the kl", form="free bits", fit=gated)
    pairs = _pairs(graph, latent) if len(latent.heads) > 1 else []
    for heads in pairs:
        prober = Prober(graph, latent, heads)
        for held in views if prober.usable else []:
            case = _Case(prober, loss, held)
            if case.probes is not None and case.fit.is_kl:
                return case.found("kl")
    if not whole.usable:
        return Divergence("unknown", form="its heads could not be moved", held=decoder)
    for case in cases:
        if case.by_draws and (answer := _other_prior(case)) is not None:
            return answer
    case = cases[-1]
    if case.probes is None:
        return case.found("unknown", form="the loss is not finite where the heads are moved")
    if case.flat and cases[0].probes is not None and not cases[0].flat:
        case = cases[0]
    if case.flat:
        return case.found("constant" if _clamped(case) else "absent")
    if (reading := _reading(case)) is not None:
        return case.found("wrong", read_as=reading)
    above, below = graph.upstream(latent.heads), graph.downstream(latent.heads)
    beside = [o for o in latents if o is not latent and o.z not in graph.downstream([latent.z])]
    beside = [o for o in beside if latent.z not in graph.downstream([o.z])]
    if any({*above, *below}.intersection(o.heads) for o in beside):
        return case.found("unknown", form="its heads are those of another latent as well")
    means, scales = case.probes.moving if case.probes is not None else (torch.zeros(0),) * 2
    if not latent.uniform and bool((means.bool() & scales.bool()).any()):
        return case.found("unknown", form="one head moves both its mean and its sigma")
    if graph.upstream(data).intersection(mixed):
        return case.found("unknown", form="it is decoded together with another latent")
    if case.by_draws and _clamped(case):
        return case.found("unknown", form="a part of it is clamped")
    if not _additive(case):
        return case.found(
            "unknown", form="no function of the entries of mean and sigma by themselves"
        )
    f = case.fit
    if f.residual <= NEAR and f.mean.numel() and f.scale.numel():
        a, c, d = (float(t.nanmedian()) for t in (f.mean[0], f.scale[0], f.scale[1]))
        if a < 0 and c < 0 and d > 0 and abs(a - c) <= NEAR * abs(a):
            return case.found("negative")
    return case.found("wrong")


def _mixed(graph: Graph, latent: Latent, latents: list[Latent]) -> dict[int, Tensor]:
    """Values of z together with what is decoded from another latent, entry by entry."""
    after = graph.downstream([latent.z])
    others = graph.downstream([o.z for o in latents if o is not latent]) - after
    return {
        o: graph.get(o)
        for n in graph.nodes
        if n.pointwise and after.intersection(n.ins) and others.intersection(n.ins)
        for o in n.outs
        if graph[o].floating
    }


def _after(graph: Graph, latent: Latent, held: Over) -> set[int]:
    """What depends on the latent, not by its decoder."""
    return graph.downstream([latent.z, *latent.heads], stop=held) - set(held)


# --- where to look ------------------------------------------------------------------------------

LINEAR = {"add", "add_", "sub", "sub_", "rsub", "neg", "neg_", "sum", "mean", "_to_copy", "stack",
          "cat", "view", "_unsafe_view", "squeeze", "unsqueeze", "expand", "select", "t",
          "transpose", "permute", "clone", "lift_fresh", "copy_"}  # fmt: skip
SCALED = {"mul", "mul_", "div", "div_"}


def terms(graph: Graph, loss: int, stop: Collection[int] = ()) -> list[int]:
    """The values that a loss is a linear combination of, none beyond those in `stop`."""
    found, seen = [], set()
    todo = [loss]
    while todo:
        i = todo.pop()
        if i in seen:
            continue
        seen.add(i)
        node = graph[i].node if i not in stop else None
        inputs = [j for j in node.ins if graph[j].floating] if node is not None else []
        if node is not None and node.name in LINEAR:
            todo += inputs
        elif node is not None and node.name in SCALED:
            moving = [j for j in inputs if graph[j].origin or graph[j].draws]
            scaled = len(moving) == 1 and (node.name[:3] != "div" or moving[0] == inputs[0])
            todo += moving if scaled else []
            found += [] if scaled else [i]
        else:
            found.append(i)
    return found


def data_terms(graph: Graph, latents: list[Latent], loss: int) -> list[int]:
    """The terms of a loss in which data take part that do not come by the latents."""
    stop = {i for latent in latents for i in (latent.z, *latent.heads)}
    return [
        t
        for t in terms(graph, loss, stop)
        if t not in stop
        and any(
            graph[i].kind in ("data", "random") and graph[i].node is None
            for i in graph.upstream([t], stop=stop)
        )
    ]


def _log_weights(graph: Graph, latent: Latent, loss: int) -> list[int]:
    """Values of which a log-sum-exp or a softmax is taken on the way to the loss."""
    way = graph.downstream([latent.z, *latent.heads]) & graph.upstream([loss])
    found = []
    for node in graph.nodes:
        if not way.intersection(node.outs):
            continue
        given = node.ins[0] if node.ins else -1
        weights = node.name in ("logsumexp", "_softmax", "_log_softmax")
        weights = weights or (node.name == "exp" and _summed_then_logged(graph, node))
        if weights and given in way:
            found.append(given)
    return [i for i in dict.fromkeys(found) if i not in latent.heads]


def _summed_then_logged(graph: Graph, node: Node) -> bool:
    """Whether exponentials are summed, and then a logarithm is taken."""
    todo = [(o, False) for o in node.outs]
    for _ in range(16):
        if not todo:
            return False
        i, summed = todo.pop(0)
        for user in graph[i].users:
            if user.name.rstrip("_") == "log" and summed:
                return True
            if user.name in ("sum", "mean") or (
                summed and user.name in ("div", "view", "squeeze", "mul", "add")
            ):
                todo += [(o, True) for o in user.outs]
    return False


def _muted(case: _Case) -> int | None:
    """A value that depends on the heads and that a zero is multiplied with."""
    graph = case.prober.graph
    if not case.flat:
        return None
    live = graph.upstream([case.target], stop=case.held)
    after = graph.downstream([*case.prober.heads, case.prober.latent.z], stop=case.held)
    for node in reversed(graph.nodes):
        if node.name not in SCALED or not (live & after).intersection(node.outs):
            continue
        moving = [i for i in node.ins if i in after]
        rest = [a for a in node.flat if isinstance(a, (int, float))]
        rest += [float(graph.get(i).abs().max()) for i in node.ins if i not in after]
        if len(moving) == 1 and any(abs(x) < 1e-12 for x in rest):
            return moving[0]
    return None


def _pairs(graph: Graph, latent: Latent) -> list[tuple[int, ...]]:
    """Pairs of a head that moves the mean and one that moves sigma; and single heads."""
    prober = Prober(graph, latent)
    if not prober.usable:
        return []
    movers = prober.movers
    if len(movers[0]) * len(movers[1]) > 36:
        return []
    found = dict.fromkeys((m,) if m == s else (m, s) for m, s in itertools.product(*movers))
    return [pair for pair in found if set(pair) != set(latent.heads)]


# --- what else it may be ------------------------------------------------------------------------


def _function_of_kl(case: _Case) -> tuple[str, float] | None:
    """The form, and the weight, if the loss is a function of the KL to N(0, 1)."""
    p = case.probes
    if p is None or case.flat:
        return None
    kl = p.moments[0] + p.moments[2] - p.moments[3]
    there = kl.abs() > 1e-3 * kl.abs().max()
    away = p.loss[:, ~p.moved].abs()
    if away.numel() and float(away.max()) > EXACT * case.fit.size:
        return None
    ratio = torch.where(there, p.loss / torch.where(there, kl, 1.0), math.nan)
    known = ratio[there]
    if not known.numel():
        return None
    largest = float(known.abs().max())
    near = 1e-4 * largest
    if float((p.loss.abs() - largest * kl.abs()).max()) > NEAR * case.fit.size:
        return None  # it moves where the KL does not
    reached = (ratio.abs() > near) & there
    if not all(bool(reached[:, moving].any()) for moving in p.moving):
        return None
    steady = all(
        float(r[t].max() - r[t].min()) <= near
        for r, t in zip(ratio, there, strict=True)
        if t.any()
    )
    levels = (known.abs() - largest).abs() <= near
    copies = case.fit.copies
    mixed = bool((known > 0).any())
    if bool(levels.all()) and bool((known < 0).any()) and (mixed or _passes(case, "abs")):
        return "capacity", largest * copies
    diagonal = case.prober.latent.diagonal
    zeros = known.abs() <= near
    two_levels = bool((levels | zeros).all()) and bool((known >= -near).all())
    if diagonal and two_levels and bool(zeros.any()):
        size = kl[there].abs()
        if float(size[zeros].mean()) > float(size[~zeros].mean()):
            return "capped", largest * copies
    if diagonal and two_levels:
        return "free bits", largest * copies
    if steady and bool((known >= -near).all()):
        return "other", math.nan
    if steady and bool((known.sign() != known.sign()[0]).any()):
        return "capacity" if _passes(case, "abs", "pow", "mul") else "other", math.nan
    return None


def _gated(case: _Case) -> Fit | None:
    """The coefficients where the loss moves, if it is a KL there and constant elsewhere."""
    p = case.probes
    if p is None or case.flat or not case.prober.latent.diagonal:
        return None
    moves = p.loss.abs() > 1e-12 * case.fit.size
    if bool(moves[:, p.moved].all()) or not bool((moves.sum(0) >= 4)[p.moved].all()):
        return None
    found = fit_moments(replace(p, moments=p.moments * moves), case.fit.copies)
    return found if found.is_kl else None


def _passes(case: _Case, *names: str) -> bool:
    """Whether the heads reach the target by an operation of one of these names."""
    graph = case.prober.graph
    live = graph.upstream([case.target], stop=case.held)
    after = graph.downstream([*case.prober.heads, case.prober.latent.z], stop=case.held)
    way = live & after
    return any(n.name in names and way.intersection(n.outs) for n in graph.nodes)


def _clamped(case: _Case) -> bool:
    clamps = ("clamp", "clamp_", "clamp_min", "clamp_max", "minimum", "maximum", "min", "max",
              "threshold", "relu", "where", "hardtanh", "floor", "round", "sign")  # fmt: skip
    return _passes(case, *clamps)


def _other_prior(case: _Case) -> Divergence | None:
    """A KL by draws to a prior that is not Gaussian: log q is right, the rest a function of z."""
    found = entropy(case.prober, case.target, case.held)
    if found is None:
        return None
    return case.found("other prior", weight=found[0] * case.fit.copies)


def entropy(prober: Prober, target: int, held: Over) -> tuple[float, bool] | None:
    """The weight of log q(z) in a loss, with z held; and whether it is log q of the draw.

    None if the loss depends on the heads otherwise than by log q(z), or by the entropy of q.
    """
    graph, latent = prober.graph, prober.latent
    if not latent.diagonal:
        return None
    rows, features = [], []
    generator = torch.Generator().manual_seed(13)
    draws = {latent.z: latent.draws[0], **{z: d for d, z in latent.siblings}}
    number = len(draws)
    for place in prober.places:
        over = {**prober.fixed, **place}
        fixed = {}
        for z, draw in draws.items():
            noise = torch.rand(graph[draw].shape, generator=generator).double() - 0.5
            fixed[z] = graph.value({**over, draw: noise}, z)
        f = graph.run({**held, **over, **fixed}, [target])[target].sum()
        rows.append(gradient(f, place))
        mean, sigma = latent.moments(graph, over)
        square = sum((0.5 * ((z - mean) / sigma) ** 2).sum() for z in fixed.values())
        log = number * sigma.abs().log().sum()
        features.append(torch.stack([gradient(t, place) for t in (square, log)]))  # pyright: ignore
    y, x = torch.stack(rows), torch.stack(features, 1)
    size = float(y.abs().max())
    found, error = _solve(x, y)
    moved = (x.abs() > 1e-14).any(0).any(0)
    if size == 0 or not y.isfinite().all() or error > NEAR * size or not moved.any():
        return None
    scales = (x[1].abs() > 1e-14).any(0)
    square, weights = -found[0], -found[1][scales]
    weight = float(weights.median()) * number
    if not bool((weights > 0).all()):
        return None
    if _same(square[scales], weights) and bool((square[moved] > 0).all()):
        return weight, True
    level = EXACT * float(weights.max())
    return (weight, False) if float(square[moved].abs().max()) <= level else None


def _reading(case: _Case) -> str | None:
    """The reading of the second head of which the loss is the KL."""
    p = case.probes
    if p is None or not p.moving[1].any():
        return None
    means, scales = p.moving
    means, scales = means & ~scales, scales & ~means
    a = _solve(p.moments[:2][:, :, means], p.loss[:, means])
    if not means.any() or a[1] > NEAR * case.fit.size:
        return None
    weight = float(a[0][0].median())
    if weight <= 0 or not _same(a[0][0], a[0][0].median()):
        return None
    for name, reading in READINGS.items():
        b = p.heads[:, scales].clone().requires_grad_()
        s = reading.sigma(b)
        if name == "unit variance" or not s.isfinite().all() or not (s > 0).all():
            continue
        rows = torch.stack(
            [torch.autograd.grad(t.sum(), b, retain_graph=True)[0] for t in (0.5 * s**2, s.log())]
        )
        found, error = _solve(rows, p.loss[:, scales])
        fits = error <= NEAR * case.fit.size and _same(found[0], torch.tensor(weight))
        if fits and _same(-found[1], torch.tensor(weight)):
            return name
    return None


def _additive(case: _Case) -> bool:
    """Whether the gradient in the heads of one latent does not depend on those of others."""
    prober, p = case.prober, case.probes
    if p is None or not prober.latent.diagonal:
        return False
    entries = prober.latents().round().long()
    size = prober.graph[prober.latent.z].numel
    chosen = torch.rand(size, generator=torch.Generator().manual_seed(17)) < 0.5
    kept = chosen[entries.clamp(0, size - 1)] & (entries >= 0) & (entries < size)
    if not kept.any() or kept.all():
        return False
    sizes = [t.numel() for t in prober.places[0].values()]
    place = {
        i: torch.where(keep.view(t.shape), t, prober.places[1][i]).detach().requires_grad_()
        for (i, t), keep in zip(prober.places[0].items(), kept.split(sizes), strict=True)
    }
    now = prober.measure(case.target, case.held, case.by_draws, [place])
    if now is None:
        return False
    change = (now.loss[0] - p.loss[0])[kept].abs().max()
    return float(change) <= EXACT * case.fit.size


# --- what is sampled ----------------------------------------------------------------------------


def _slope(graph: Graph, latent: Latent, over: Over) -> Tensor:
    """Sigma, as the derivative of z in its noise: exact beside a large mean."""
    (draw,) = latent.draws
    e = torch.zeros_like(graph.get(draw)).requires_grad_()
    z = graph.run({**over, draw: e}, [latent.z])[latent.z]
    return torch.autograd.grad(z.sum(), e)[0]


def sampled_scale(graph: Graph, latent: Latent, heads: Sequence[int] = ()) -> Curve | None:
    """The name of sigma as a function of the head that moves it; None if no one head does."""
    if not latent.diagonal:
        return None
    prober = Prober(graph, latent, heads)
    if not prober.usable:
        return None
    moments = torch.stack(prober.moments, 1)
    scales = (moments[3].abs() > 1e-14).any(0) & ~(moments[1].abs() > 1e-14).any(0)
    if not scales.any():
        return None
    b = torch.linspace(-60, 60, 121, dtype=torch.float64)
    sizes = [graph[i].numel for i in prober.heads]
    masks = scales.split(sizes)
    sigma, base = [], graph.value({}, latent.z)
    reference = prober.places[0]
    entry = None
    for x in b:
        over = {
            i: torch.where(mask.view(graph[i].shape), x, reference[i].detach())
            for i, mask in zip(prober.heads, masks, strict=True)
        }
        sigma.append(_slope(graph, latent, over).reshape(-1))
    rows = torch.stack(sigma)
    if not rows.isfinite().any() or base is None:
        return None
    spread = (rows.amax(0) - rows.amin(0)).nan_to_num(0.0)
    entry = int(spread.argmax())
    column = rows[:, entry].abs()
    usable = column.isfinite()
    return name_curve(b[usable], column[usable], 1e-6)
