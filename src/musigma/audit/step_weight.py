"""The weight of a KL divergence in a loss, relative to that of the reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from musigma.audit.graph import Graph, Origin
from musigma.audit.latents import PRODUCTS, Latent, frontier, holds, meetings, own_values
from musigma.audit.probes import gradient
from musigma.audit.runs import Run, Runner
from musigma.audit.step_kl import View

__all__ = [
    "Beta",
    "effective_beta",
    "mixed_examples",
    "run_of_half",
    "slope_in_log_weights",
]

SQUARED = "a Gaussian likelihood with variance 1"
BERNOULLI = "a Bernoulli likelihood"
LAPLACE = "a Laplace likelihood with scale 1"
CATEGORICAL = "a categorical likelihood"
EVENTS = "the logarithms of the probabilities of events"
SUPPORT: dict[str, Callable[[Tensor], Tensor]] = {
    SQUARED: torch.isfinite,
    BERNOULLI: lambda x: (x > -1e-4) & (x < 1 + 1e-4),
    CATEGORICAL: lambda x: torch.minimum(x, 1 - x).abs() < 1e-4,
}
LOGITS = dict.fromkeys(("sigmoid", "log_sigmoid_forward", "softplus"), EVENTS) | dict.fromkeys(
    ("_softmax", "_log_softmax", "logsumexp"), CATEGORICAL
)
"""What is done with logits, and their likelihood where data choose entries, such as edges."""
FAR = 100.0  # beyond any number of the data


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
    opposed: bool

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
    found = _likelihood(view.graph, latents, view.latent, loss)
    several = view.fit.copies > 1 or bool(view.latent.siblings)
    if found is None or (several and found.kind == CATEGORICAL):
        return None  # of several draws, each has a share of the weight
    z = view.graph[view.latent.z]
    rows = z.shape[0] if z.shape else 1
    beta = weight / found.weight
    explained = _explain(abs(beta), found.numbers // rows, z.numel // rows, rows)
    return Beta(abs(beta), found.kind, explained, weight < 0 and found.weight < 0, beta < 0)


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


# --- likelihoods --------------------------------------------------------------------------------


class Likelihood(NamedTuple):
    """A likelihood: its weight, its kind, and how many numbers of data, of how many examples."""

    weight: float
    kind: str
    numbers: int
    rows: int = 1


def _likelihood(
    graph: Graph, latents: list[Latent], latent: Latent, loss: int
) -> Likelihood | None:
    """The likelihood of the data that are decoded from a latent."""
    met = meetings(graph, latents, loss)
    after = graph.downstream(latent.zs)
    own = {i: graph.get(i) for i in own_values(latents)}
    for root in dict.fromkeys(root for d, root in met if d in after):
        decoded, x = [d for d, r in met if r == root], graph[root]
        if not after.issuperset(decoded):
            return None  # another pass, with a KL of its own, decodes the same data
        held = {**own, root: graph.get(root)}
        found = (_in_decoded(graph, held, loss, cut) for cut in _cuts(graph, decoded))
        if (first := next(filter(None, found), None)) is not None:
            draws = max(1, first.numbers // max(1, x.numel))
            rows = x.shape[0] if x.shape else 1
            return Likelihood(first.weight * draws, first.kind, first.numbers // draws, rows)
        if x.floating and x.origin == Origin.DATA:
            return None
    live = after & graph.upstream([loss])
    rows = graph[latent.z].shape[0] if graph[latent.z].shape else 1
    for node in graph.nodes:
        if node.name in LOGITS and node.ins[0] in live:
            found = _in_decoded(graph, own, loss, [node.ins[0]])
            if found is not None and found.kind in (BERNOULLI, CATEGORICAL):
                return found._replace(kind=LOGITS[node.name], rows=rows)
    return None


def _cuts(graph: Graph, decoded: list[int]) -> Iterator[list[int]]:
    """Values that all that is decoded is pointwise made of: outputs of layers, then any other."""
    fronts = frontier(graph, decoded) or decoded
    yield fronts
    for i in sorted(graph.downstream(fronts) & graph.upstream(decoded, stop=fronts), reverse=True):
        if not graph.upstream(decoded, stop=[i]).intersection(fronts):
            yield [i]


def _in_decoded(
    graph: Graph, held: Mapping[int, Tensor], loss: int, ids: list[int]
) -> Likelihood | None:
    r"""The likelihood of data x, given decoded values y.

    The slopes of an exponential family in its natural parameter y are :math:`w (m(y) - x)`, with
    the mean m of x.
    """
    places = list(_places(graph, held, loss, ids))
    if len(places) < 3:
        return None
    y, slopes = (torch.stack(t) for t in zip(*places[:3], strict=True))
    beyond = [slope for _, slope in places[3:]]
    used = (slopes.abs() > 1e-12 * slopes.abs().max()).any(0)
    if not used.any() or not slopes.isfinite().all():
        return None
    n, shape = y.shape[1], graph[ids[0]].shape if len(ids) == 1 else ()
    means = [
        (SQUARED, n, y, slopes),
        (BERNOULLI, n, y.sigmoid(), slopes),
        (BERNOULLI, n, y, slopes * y * (1 - y)),  # y is a probability
        *(
            (CATEGORICAL, n // size, y.view(3, *shape).softmax(k + 1).view(3, n), slopes)
            for k, size in reversed(list(enumerate(shape)))
        ),
    ]
    for kind, numbers, mean, slope in means:
        mean, slope = mean[:, used], slope[:, used]
        w = (slope[0] - slope[1]) / (mean[0] - mean[1])
        x = mean[0] - slope[0] / w
        exact = (slope - w * (mean - x)).abs() < 1e-4 * w.abs()
        chosen = kind != CATEGORICAL or float((mean[0] - x).sum().abs()) < 1e-3  # one each
        if _is_one(w) and exact.all() and chosen and SUPPORT[kind](x).all():
            of_class = kind == BERNOULLI and bool((x > 1 - 1e-4).all())  # -log p where x is one
            return Likelihood(float(w[0]), CATEGORICAL if of_class else kind, numbers)
    if len(beyond) == 2:
        above, below = (t[used] for t in beyond)
        sizes = torch.stack([*slopes[:, used], above]).abs()
        if _is_one(torch.stack([above, -below])) and _is_one(sizes):
            return Likelihood(float(above[0]), LAPLACE, n)
    return None


def _places(
    graph: Graph, held: Mapping[int, Tensor], loss: int, ids: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decoded values at three places, far above and far below the data, and slopes in them.

    What networks make of them is held, as of an adversary; parameters of the likelihood, such as
    a learned scale, are moved as well.
    """
    generator, after = torch.Generator().manual_seed(19), graph.downstream(ids)
    layers = [n for n in graph.nodes if n.name in PRODUCTS and after.intersection(n.ins)]
    layers = [n for n in layers if any(graph[i].origin == Origin.PARAMETERS for i in n.ins)]
    held = {**held, **{o: graph.get(o) for n in layers for o in n.outs}}
    free = graph.upstream([loss], stop={*held, *ids})
    free = [i for i in free if graph[i].kind == "parameter"]
    for k, far in enumerate((0.0, 0.0, 0.0, FAR, -FAR)):
        place = {}
        for i in ids:
            y = 0.1 + 0.8 * torch.rand(graph[i].shape, generator=generator, dtype=torch.float64)
            place[i] = (y + far).requires_grad_()
        moved = {i: graph.get(i) + 0.1 * k for i in free}
        try:
            value = graph.run({**held, **moved, **place}, [loss])[loss].sum()
        except RuntimeError:  # y must be a probability, say
            return
        yield torch.cat([t.detach().reshape(-1) for t in place.values()]), gradient(value, place)


def _is_one(w: Tensor) -> bool:
    """Whether all weights are the same number, and not zero."""
    first = w.flatten()[0]
    return bool((w - first).abs().max() <= 1e-4 * first.abs()) and float(first) != 0


# --- what a weight depends on -------------------------------------------------------------------


def _count(graph: Graph, met: list[tuple[int, int]]) -> int:
    """How many examples are compared with what is decoded."""
    shape = graph[met[0][1]].shape if met else ()
    return shape[0] if shape else 1


def run_of_half(
    runner: Runner, graph: Graph, latents: list[Latent], loss: int
) -> tuple[int, Run] | None:
    """The examples of a step, and its run with half of them; None if it does not run so."""
    rows = _count(graph, meetings(graph, latents, loss))
    data = [v for v in graph.values if v.kind == "data" and v.shape[:1] == (rows,)]
    tensors = [v.source for v in data if v.source is not None]
    usable = all(t.layout == torch.strided and not t.requires_grad for t in tensors)
    if rows < 2 or not tensors or not usable:
        return None
    whole = [t.data for t in tensors]
    try:
        for t in tensors:
            t.data = t.data[: rows // 2]
        again = runner.again()
    finally:
        for t, own in zip(tensors, whole, strict=True):
            t.data = own
    return None if again is None else (rows, again)


def mixed_examples(graph: Graph, latents: list[Latent], loss: int) -> str | None:
    """The line of a log-sum-exp over the examples of a batch; None if there is none.

    Copies of an example, one for each draw, are one.
    """
    met = meetings(graph, latents, loss)
    x = graph.get(met[0][1]) if met else torch.zeros(1, 1)
    while x.ndim > 1 and bool((x == x[:1]).all()):
        x = x[0]
    rows, live = len(x.unique(dim=0)), graph.upstream([loss])
    for node in graph.nodes:
        if node.name != "logsumexp" or not live.intersection(node.outs):
            continue
        if graph[node.outs[0]].numel % rows and graph[node.ins[0]].numel % rows == 0:
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
        for kind, weights in {"bound": share.detach(), "undetached": share}.items():
            expected = gradient((weights * w).sum(), leaves)
            c = (found @ expected) / (expected @ expected)
            if float((found - c * expected).norm()) <= 1e-5 * float(found.norm()):
                return kind
    return None
