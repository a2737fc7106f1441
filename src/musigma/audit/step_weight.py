"""The weight of a KL divergence in a loss, relative to that of the reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Origin
from musigma.audit.latents import Latent, frontier, holds, meetings
from musigma.audit.probes import gradient
from musigma.audit.step_kl import View

__all__ = [
    "Beta",
    "effective_beta",
    "mixed_examples",
    "reconstruction_slopes",
    "slope_in_log_weights",
]

SQUARED = "a Gaussian likelihood with variance 1"
BERNOULLI = "a Bernoulli likelihood"
LAPLACE = "a Laplace likelihood with scale 1"
CATEGORICAL = "a categorical likelihood"
FAR = 100.0  # beyond what is decoded
EVENTS = "the logarithms of the probabilities of events"


@dataclass(frozen=True)
class Beta:
    """The weight of the KL of one latent, relative to that of one number of the data.

    Args:
        value: The effective beta: 1 for a bound on the likelihood.
        against: The kind of likelihood.
        explained: What it is made of, such as " = 20 / 4: pixels / latents"; "" if unknown.
        negated: Both weights are negative: the loss is a bound to be maximized.
        opposed: One of them is negative.
    """

    value: float
    against: str
    explained: str
    negated: bool
    opposed: bool = False

    @property
    def text(self) -> str:
        """The weight in words."""
        plain = f" ({2 * self.value:.4g} beside the plain squared error)"
        return f"{self.value:.4g} beside {self.against}{plain if self.against == SQUARED else ''}"

    @property
    def is_one(self) -> bool:
        """Whether the loss is a bound; a squared error may stand for a variance of 1 or 1/2."""
        bounds = (1.0, 0.5) if self.against == SQUARED else (1.0,)
        return any(abs(self.value - b) <= 1e-3 * b for b in bounds)


def effective_beta(view: View, latents: list[Latent], loss: int, weight: float) -> Beta | None:
    """The effective beta, or None if no known likelihood belongs to this latent alone."""
    graph, latent = view.graph, view.latent
    if not meetings(graph, latents, loss) and (k := _of_events(graph, latents, loss)) is not None:
        return Beta(abs(weight / k), EVENTS, "", False)
    found = _likelihood(graph, latents, latent, loss)
    several = view.fit.copies > 1 or bool(latent.siblings)
    if found is None or (several and found.kind == CATEGORICAL):
        return None  # of several draws, each has a share of the weight
    rows = found.rows
    x, z = (n // max(1, rows) for n in (found.numbers, graph[latent.z].numel))
    beta = weight / found.weight
    explained = _explain(abs(beta), x, z, rows)
    return Beta(abs(beta), found.kind, explained, weight < 0 and found.weight < 0, beta < 0)


class Likelihood(NamedTuple):
    """A likelihood: its weight, its kind, and how many numbers of data, of how many examples."""

    weight: float
    kind: str
    numbers: int
    rows: int


def _likelihood(
    graph: Graph, latents: list[Latent], latent: Latent, loss: int
) -> Likelihood | None:
    """The likelihood of the data that are decoded from a latent."""
    met = meetings(graph, latents, loss)
    after = graph.downstream([latent.z, *(z for _, z in latent.siblings)])
    for root in dict.fromkeys(root for d, root in met if d in after):
        decoded = [d for d, r in met if r == root]
        if not after.issuperset(decoded):
            return None  # another pass, with a KL of its own, decodes the same data
        if not graph[root].floating or any(_classes(graph, d) is not None for d in decoded):
            continue
        k = _weight_of(graph, latents, loss, decoded, root)
        if k is not None:
            shape = graph[root].shape
            return Likelihood(*k, graph[root].numel, shape[0] if shape else 1)
        if graph[root].origin == Origin.DATA:
            return None
    return _categorical(graph, latent, loss, after)


def _categorical(graph: Graph, latent: Latent, loss: int, after: set[int]) -> Likelihood | None:
    """The likelihood of one class of several, by the slopes of a loss in log-probabilities."""
    rows = graph[latent.z].shape[0] if graph[latent.z].shape else 1
    for i in sorted(after & graph.upstream([loss])):
        dim, node = _classes(graph, i), graph[i].node
        if dim is None or node is None or node.view:
            continue
        slopes = []
        for shift in (0.0, 0.5):
            log_p = (graph.get(i) - shift).requires_grad_()
            value = graph.run({i: log_p}, [loss])[loss].sum()
            if not value.requires_grad:
                return None
            slopes.append(torch.autograd.grad(value, log_p)[0])
        scored = slopes[0] != 0
        w = -slopes[0][scored]
        one = bool((scored.sum(dim) <= 1).all()) and w.numel() > 0
        if one and _close(slopes[0] / w[0], slopes[1] / w[0]) and _close(w / w[0], w / w):
            return Likelihood(float(w[0]), CATEGORICAL, w.numel(), rows)
    return None


def _classes(graph: Graph, i: int) -> int | None:
    """The dimension along which a value holds the log-probabilities of classes."""
    if not graph[i].floating or graph[i].numel < 2:
        return None
    log_p = graph.get(i)
    for dim in reversed(range(log_p.ndim)):
        total = log_p.logsumexp(dim)
        if log_p.shape[dim] > 1 and bool((total.abs() < 1e-6).all()):
            return dim
    return None


def reconstruction_slopes(graph: Graph, latents: list[Latent], loss: int) -> list[float]:
    """The largest slopes of a loss in what is decoded, at one value of it and of the data.

    Whatever the reconstruction, it is multiplied by what its weight is multiplied by.
    """
    met = meetings(graph, latents, loss)
    fronts = frontier(graph, [d for d, _ in met])
    own = {i for latent in latents for i in (latent.z, *latent.heads)}
    shape = graph[met[0][1]].shape if met else ()
    fronts = [i for i in fronts if i not in own and graph[i].node is not None]
    fronts = [i for i in fronts if graph[i].shape or not shape]  # no mean over the examples
    if not fronts:
        return []
    over = {i: graph.get(i) for i in own}
    over |= {r: torch.full_like(graph.get(r), 0.7) for _, r in met if graph[r].floating}
    leaves = {i: torch.full_like(graph.get(i), 0.3).requires_grad_() for i in fronts}
    try:
        value = graph.run({**over, **leaves}, [loss])[loss].sum()
    except RuntimeError:  # values that the reconstruction does not take
        return []
    if not value.requires_grad:
        return []
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return [0.0 if g is None else float(g.abs().max()) for g in found]


def _explain(beta: float, x: int, z: int, b: int) -> str:
    forms = {
        f" = {x}, the numbers in one example": x,
        f" = {x} / {z}: numbers in one example / latents": x / max(z, 1),
        f" = 1 / {z}: one / latents": 1 / max(z, 1),
        f" = {x} * {b}: numbers in one example * examples in the batch": x * b,
        f" = {b}: examples in the batch": b,
        f" = 1 / {b}: one / examples in the batch": 1 / max(b, 1),
    }
    for text, value in forms.items():
        for factor, words in ((1.0, ""), (0.5, ", and 1/2")):
            if value != 1 and abs(beta - factor * value) <= 1e-4 * value:
                return text + words
    return ""


def _weight_of(
    graph: Graph, latents: list[Latent], loss: int, decoded: list[int], root: int
) -> tuple[float, str] | None:
    """The weight of the likelihood of a number of the data, and the kind of likelihood.

    Found by moving a few numbers of the data, with what is decoded held: a squared error bends
    by twice its weight; a Bernoulli likelihood is straight in them, an absolute error on both
    sides of what is decoded.
    """
    x = graph.get(root)
    held = {i: graph.get(i) for latent in latents for i in (*latent.heads, latent.z)}
    cuts = list(_cuts(graph, decoded))
    by_networks = graph.downstream([root]) - graph.downstream(cuts[0]) - {root}
    by_networks = {i for i in by_networks if graph[i].origin & Origin.PARAMETERS}
    held |= {i: graph.get(i) for i in (*cuts[0], *by_networks)}
    if root not in graph.upstream([loss], stop=held):
        return None
    found = []
    generator = torch.Generator().manual_seed(19)
    for k in torch.randperm(x.numel(), generator=generator)[:3].tolist():

        def moved(v: float, k: int = k) -> Tensor:
            return x.reshape(-1).index_fill(0, torch.tensor([k]), v).reshape(x.shape)

        def at(v: float, moved: Callable[[float], Tensor] = moved) -> float:
            return float(graph.value({**held, root: moved(v)}, loss).double().sum())

        f = torch.tensor([at(v) for v in (0.0, 1 / 3, 2 / 3, 1.0)], dtype=torch.float64)
        if not f.isfinite().all():
            return None
        bends = 9 * f.diff(n=2)
        bend, other = bends.tolist()
        bent = float(bends.abs().max()) > max(1e-6 * abs(float(f[3] - f[0])), 1e-12)
        if bent and abs(other - bend) <= 1e-4 * abs(bend):
            found.append((bend, SQUARED))
        elif not bent and (weight := _bernoulli(graph, held, loss, cuts, root, moved)) is not None:
            found.append((weight, BERNOULLI))
        elif (weight := _laplace(at)) is not None:
            found.append((weight, LAPLACE))
        else:
            return None
    weights = [v for v, _ in found]
    kinds = {kind for _, kind in found}
    if len(kinds) > 1 or max(weights) - min(weights) > 1e-4 * abs(weights[0]):
        return None
    learned = BERNOULLI not in kinds and _scale_is_learned(graph, held, loss, root)
    return None if learned else found[0]


def _cuts(graph: Graph, decoded: list[int]) -> Iterator[list[int]]:
    """Values that all that is decoded is pointwise made of: outputs of layers, then any other."""
    fronts = frontier(graph, decoded)
    yield fronts
    for i in sorted(graph.downstream(fronts) & graph.upstream(decoded, stop=fronts), reverse=True):
        if not graph.upstream(decoded, stop=[i]).intersection(fronts):
            yield [i]


def _bernoulli(
    graph: Graph, held: dict[int, Tensor], loss: int, cuts: list[list[int]], root: int,
    moved: Callable[[float], Tensor],
) -> float | None:  # fmt: skip
    """The weight of -x log p - (1 - x) log(1 - p), by its slopes where one x is 0 and 1."""
    for cut in cuts:
        slopes = []
        for x in (moved(0.0), moved(1.0)):
            y = {i: graph.get(i).clone().requires_grad_() for i in cut}
            value = graph.run({**held, **y, root: x}, [loss])[loss].sum()
            if not value.requires_grad:
                return None
            found = torch.autograd.grad(value, list(y.values()), materialize_grads=True)
            slopes.append(torch.cat([g.reshape(-1) for g in found]))
        change = slopes[0] - slopes[1]  # k of its logits; k / (p (1 - p)) of its probabilities
        at = change.abs() > 1e-12 * float(change.abs().max())
        p = torch.cat([graph.get(i).reshape(-1) for i in cut])[at]
        if not at.any():
            continue  # such as behind a ReLU that is zero
        if _close(slopes[0][at] / change[at], p.sigmoid()):
            return float(change[at].sum())
        if bool(((p > 0) & (p < 1)).all()) and _close(slopes[0][at] / change[at], p):
            return float((change[at] * p * (1 - p)).sum())
    return None


def _laplace(at: Callable[[float], float]) -> float | None:
    """The weight w of w |x - d|, from a loss as a function of one x; None if it is another."""
    try:
        below, above, beyond = at(-FAR), at(FAR), at(2 * FAR)
    except RuntimeError:  # it takes probabilities only
        return None
    w = (beyond - above) / FAR
    if w == 0:
        return None
    d, least = (below - above) / (2 * w), (above + below) / 2 - w * FAR
    return w if abs(d) < FAR and abs(at(d) - least) <= 1e-6 * abs(w) else None


def _of_events(graph: Graph, latents: list[Latent], loss: int) -> float | None:
    """The weight of -log p and -log(1 - p) of events, such as edges that are drawn.

    Their slopes in the logit of p are w (p - 1) and w p.
    """
    own = {i for latent in latents for i in (latent.z, *latent.heads)}
    decoded = graph.downstream([latent.z for latent in latents]) & graph.upstream([loss]) - own
    weights = []
    for node in graph.nodes:
        if node.name not in ("sigmoid", "log_sigmoid_forward", "softplus"):
            continue
        if not decoded.issuperset((node.ins[0], node.outs[0])):
            continue
        slopes = []
        for at in (-1.0, 0.5, 1.0):
            logit = torch.full_like(graph.get(node.ins[0]), at).requires_grad_()
            value = graph.run({node.ins[0]: logit}, [loss])[loss].sum()
            slopes.append(torch.autograd.grad(value, logit)[0])
        p = torch.tensor((-1.0, 0.5, 1.0)).sigmoid().double()
        w = (slopes[2] - slopes[0]) / (p[2] - p[0])
        happened = p[2] - slopes[2] / w
        exact = (slopes[1] - w * (p[1] - happened)).abs() <= 1e-6 * w.abs()
        if not bool((exact & (torch.minimum(happened, 1 - happened).abs() < 1e-6)).all()):
            return None
        weights.append(w.reshape(-1))
    w = torch.cat(weights) if weights else torch.zeros(1)
    return float(w[0]) if bool((w > 0).all() and (w - w[0]).abs().max() < 1e-4 * w[0]) else None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() < 1e-3).all())


def _scale_is_learned(graph: Graph, held: dict[int, Tensor], loss: int, raw: int) -> bool:
    """Whether parameters other than the decoder's change the weight of the likelihood."""
    above = graph.upstream([loss], stop={*held, raw})
    free = [i for i in above if graph[i].kind == "parameter" and i not in held]
    if not free:
        return False
    x = graph.get(raw)

    def bend(over: dict[int, Tensor]) -> float:
        at = [{**held, **over, raw: x + v} for v in (-FAR, 0.0, FAR)]
        a, b, c = (float(graph.value(o, loss)) for o in at)
        return a - 2 * b + c

    generator = torch.Generator().manual_seed(23)
    moved = {i: graph.get(i) + 0.3 * torch.rand(graph[i].shape, generator=generator) for i in free}
    before, after = bend({}), bend(moved)
    return abs(after - before) > 1e-6 * (abs(before) + 1e-12)


def mixed_examples(graph: Graph, latents: list[Latent], loss: int) -> str | None:
    """The line of a log-sum-exp over the examples of a batch; None if there is none."""
    met = meetings(graph, latents, loss)
    shape = graph[met[0][1]].shape if met else ()
    rows = shape[0] if shape else 1
    live = graph.upstream([loss])
    for node in graph.nodes:
        if node.name == "logsumexp" and live.intersection(node.outs):
            (out, *_), (given, *_) = node.outs, node.ins
            mixes = graph[out].numel % rows and graph[given].numel % rows == 0
            if mixes:
                return node.where
    return None


def slope_in_log_weights(graph: Graph, latent: Latent, loss: int, log_w: int) -> str | None:
    """How a loss sends its gradient to log weights, by what reaches the decoder.

    Returns:
        "bound" for a multiple of softmax(log w), as of the log of a mean of weights;
        "undetached" for the gradient of sum(softmax(log w) * log w); None for any other.
    """
    leaves = {i: t.clone().requires_grad_() for i, t in holds(graph, latent).items()}
    found = gradient(graph.run(leaves, [loss], stops=True)[loss].sum(), leaves)
    w = graph.run(leaves, [log_w])[log_w]
    for axis in (k for k, size in enumerate(w.shape) if size > 1):
        share = w.softmax(axis)
        kinds = {"bound": share.detach(), "undetached": share}
        for kind, weights in kinds.items():
            expected = gradient((weights * w).sum(), leaves)
            c = (found @ expected) / (expected @ expected)
            if float((found - c * expected).norm()) <= 1e-5 * float(found.norm()):
                return kind
    return None
