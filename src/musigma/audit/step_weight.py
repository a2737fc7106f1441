"""The weight of a KL divergence in a loss, relative to that of the reconstruction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from musigma.audit.graph import Graph
from musigma.audit.latents import Latent, meetings

__all__ = ["Beta", "effective_beta", "root_of"]

SQUARED = "a squared error, as of a Gaussian with variance 1"
BERNOULLI = "a Bernoulli likelihood"


@dataclass(frozen=True)
class Beta:
    """The weight of the KL of one latent, relative to that of one number of the data.

    Args:
        value: The effective beta: 1 for a bound on the likelihood.
        against: The kind of likelihood.
        explained: What it is made of, such as " = 20 / 4: pixels / latents"; "" if unknown.
        negated: Both weights are negative: the loss is a bound to be maximized.
    """

    value: float
    against: str
    explained: str
    negated: bool

    @property
    def is_one(self) -> bool:
        """Whether the loss is a bound; a squared error may stand for a variance of 1 or 1/2."""
        bounds = (1.0, 0.5) if self.against == SQUARED else (1.0,)
        return any(abs(self.value - b) <= 1e-3 * b for b in bounds)


def effective_beta(
    graph: Graph, latents: list[Latent], latent: Latent, loss: int, weight: float
) -> Beta | None:
    """The effective beta, or None if the reconstruction is no known likelihood."""
    for _, decoded, raw in meetings(graph, latents, loss):
        k = _weight_of(graph, latents, loss, decoded, raw)
        if k is None:
            continue
        value, against = k
        root = root_of(graph, raw)
        value *= graph[decoded].numel / max(1, graph[root].numel)
        beta = weight / value
        rows = graph[root].shape[0] if graph[root].shape else 1
        numbers = {
            "numbers in an example": graph[root].numel // max(1, rows),
            "latents": graph[latent.z].numel // max(1, rows),
            "examples": rows,
        }
        return Beta(abs(beta), against, _explain(abs(beta), numbers), weight < 0 and value < 0)
    return None


def root_of(graph: Graph, raw: int) -> int:
    """The data that a value repeats, expands or reshapes."""
    node = graph[raw].node
    while node is not None and node.view and len(set(node.ins)) == 1:
        if graph[node.ins[0]].numel > graph[raw].numel:
            break
        raw = node.ins[0]
        node = graph[raw].node
    return raw


def _explain(beta: float, numbers: dict[str, int]) -> str:
    x, z, b = numbers.values()
    forms = {
        f" = {x}, the numbers in one example": x,
        f" = {x} / {z}: numbers in one example / latents": x / max(z, 1),
        f" = 1 / {z}: one / latents": 1 / max(z, 1),
        f" = {x} * {b}: numbers in one example * examples in the batch": x * b,
        f" = {b}: examples in the batch": b,
        f" = 1 / {b}: one / examples in the batch": 1 / max(b, 1),
    }
    for text, value in forms.items():
        if value != 1 and abs(beta - value) <= 1e-4 * value:
            return text
    return ""


def _weight_of(
    graph: Graph, latents: list[Latent], loss: int, decoded: int, raw: int
) -> tuple[float, str] | None:
    """The weight of the likelihood of a number of the data, and the kind of likelihood.

    Found by moving a few numbers of the data where they meet what is decoded: a squared error
    bends by twice its weight; a Bernoulli likelihood is straight in them.
    """
    x, y = graph.get(raw), graph.get(decoded)
    if not x.is_floating_point() or x.numel() != y.numel():
        return None
    held = {i: graph.get(i) for latent in latents for i in (*latent.heads, latent.z)}
    held[decoded] = y
    found = []
    generator = torch.Generator().manual_seed(19)
    for k in torch.randperm(x.numel(), generator=generator)[:3].tolist():
        at = {}
        for v in (0.0, 0.5, 1.0):
            moved = x.clone().reshape(-1)
            moved[k] = v
            at[v] = moved.reshape(x.shape)
        values = [float(graph.value({**held, raw: t}, loss)) for t in at.values()]
        if not all(math.isfinite(v) for v in values):
            return None
        bend = (values[2] - 2 * values[1] + values[0]) / 0.25
        slope = abs(values[2] - values[0])
        if abs(bend) > 1e-9 * (1e-12 + slope) and abs(bend) > 1e-12:
            found.append((bend, SQUARED))
            continue
        k_bernoulli = _bernoulli(graph, held, loss, decoded, raw, k, at)
        if k_bernoulli is None:
            return None
        found.append((k_bernoulli, BERNOULLI))
    values = [v for v, _ in found]
    if not values or values[0] == 0 or max(values) - min(values) > 1e-4 * abs(values[0]):
        return None
    if _scale_is_learned(graph, held, loss, raw):
        return None
    return values[0], found[0][1]


def _bernoulli(
    graph: Graph, held: dict[int, Tensor], loss: int, decoded: int, raw: int, k: int,
    at: dict[float, Tensor],
) -> float | None:  # fmt: skip
    """The weight of -x log p - (1 - x) log(1 - p), from its slopes in p, or in its logit."""
    slopes = []
    for v in (0.0, 1.0):
        y = held[decoded].clone().requires_grad_()
        value = graph.run({**held, raw: at[v], decoded: y}, [loss])[loss]
        if not value.requires_grad:
            return None
        slopes.append(float(torch.autograd.grad(value, y)[0].reshape(-1)[k]))
    zero, one = slopes  # k p and -k (1 - p) in the logit; k / (1 - p) and -k / p in p
    y = float(held[decoded].reshape(-1)[k])
    if zero * one >= 0:
        return None
    p = 1 / (1 + math.exp(-y))
    logit, direct = zero - one, 1 / (1 / zero - 1 / one)
    if abs(zero / logit - p) < 1e-3:
        return logit
    if 0 < y < 1 and abs(zero * (1 - y) / direct - 1) < 1e-2:
        return direct
    return None


def _scale_is_learned(graph: Graph, held: dict[int, Tensor], loss: int, raw: int) -> bool:
    """Whether parameters other than the decoder's change the weight of the likelihood."""
    above = graph.upstream([loss], stop={*held, raw})
    free = [i for i in above if graph[i].kind == "parameter" and i not in held]
    if not free:
        return False
    x = graph.get(raw)

    def bend(over: dict[int, Tensor]) -> float:
        at = [{**held, **over, raw: x + v} for v in (-0.5, 0.0, 0.5)]
        a, b, c = (float(graph.value(o, loss)) for o in at)
        return a - 2 * b + c

    generator = torch.Generator().manual_seed(23)
    moved = {i: graph.get(i) + 0.3 * torch.rand(graph[i].shape, generator=generator) for i in free}
    before, after = bend({}), bend(moved)
    return abs(after - before) > 1e-6 * (abs(before) + 1e-12)
