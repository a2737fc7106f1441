"""Running a step for an audit: a recorded run, its loss, and a second run to compare."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from musigma.audit.findings import (
    Assumed,
    AuditError,
    Missing,
    Note,
    Outcome,
    Skipped,
    bug,
    warning,
)
from musigma.audit.graph import Graph, Node, Origin, Ref
from musigma.audit.record import record
from musigma.audit.sandbox import Sandbox

__all__ = ["Run", "Runner", "at", "short_place", "unexamined"]

Noise = Sequence[Tensor | None]  # in place of the first draws of a run
MOST_BRANCHES = 8  # that are taken the other way
ORDER = ("gt", "ge", "lt", "le")
FAR = 3.0  # standard deviations of draws that are not expected
LOSS_KEYS = ("loss", "total_loss", "loss_total", "nelbo", "neg_elbo", "elbo")


@dataclasses.dataclass
class Run:
    """A recorded run of a step.

    Args:
        graph: The recorded step.
        loss: The number of its loss.
        differentiable: Whether what the step returned requires a gradient.
        notes: What was assumed of it.
    """

    graph: Graph
    loss: int
    differentiable: bool = True
    notes: tuple[Note, ...] = ()

    @property
    def operations(self) -> list[str]:
        """The names of the operations, in order."""
        return [node.name for node in self.graph.nodes]


class Runner:
    """Runs a step.

    Args:
        sandbox: Restores the modules of the step.
        step: The step.
    """

    def __init__(self, sandbox: Sandbox, step: Callable[[], Any]):
        self.sandbox, self.step = sandbox, step
        importlib.import_module("torch._dynamo")  # a recording would, in the time of a call

    def first(self) -> tuple[Run | None, list[Outcome]]:
        """The first run, None if it has no loss that can be examined; and what is said of it."""
        run = self._run(0)
        if isinstance(run, Missing):
            return None, [run]
        found: list[Outcome] = [*run.notes]
        if run.graph.hosts:
            hosts = " and ".join(run.graph.hosts)
            found.append(Skipped(f"random numbers of {hosts}: they are constants to the audit"))
        if useless := _useless(run):
            return None, found + useless
        if not run.differentiable:
            why = "nothing in the loss requires one; the step runs under no_grad(), or on detached"
            found.append(Missing(f"the gradient: {why} tensors"))
        second = self._run(1)
        if isinstance(second, Missing):
            return run, [*found, Missing("a second run of the step: it fails, or returns no loss")]
        if second.operations != run.operations:
            run = self.again() or run  # what the first run computed may be kept by the step
        found += self._check_noise(run.graph, second.graph)
        found += _compare(run, second)
        if second.operations == run.operations:
            found += self._check_branches(run)
        return run, found

    def again(self) -> Run | None:
        """A run with the seed of the first, for a step whose data were changed."""
        run = self._run(0)
        return run if isinstance(run, Run) else None

    def _run(self, seed: int, times: int = 1, noise: Noise = ()) -> Run | Missing:
        """A recorded run: the last of several, with what the step changes restored after it."""
        undo = self.sandbox.snapshot()
        try:
            self._leave_zero()
            for _ in range(times - 1):
                self.sandbox.call("step", self.step)
            graph = self.sandbox.call(
                "step", lambda: record(self.step, seed=seed, sandbox=self.sandbox, noise=noise)
            )
        except AuditError as error:
            return Missing(f"the loss: {error}{_raised_at(error)}")
        finally:
            undo()
        return _find_loss(graph)

    def _check_branches(self, run: Run) -> Iterator[Outcome]:
        """Whether a run is another one where a comparison of its draws has another result."""
        for noise in islice(_turns(run.graph), MOST_BRANCHES):
            other = self._run(0, noise=noise)
            if isinstance(other, Run) and other.operations != run.operations:
                yield from _compare(run, other)
                return

    def _leave_zero(self) -> None:
        """Give small numbers to parameters that start at zero, as these may hide a fault."""
        generator = torch.Generator().manual_seed(37)
        for p in self.sandbox.trainable():
            if p.numel() > 1 and not p.any():
                p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))

    def _check_noise(self, a: Graph, b: Graph) -> Iterator[Outcome]:
        """Whether the draws of a second run, under another seed, are others."""
        fixed = _fixed_draws(a, b)
        if fixed:  # a generator of the step's own, which was restored between the runs
            later = self._run(1, times=2)
            fixed = [] if isinstance(later, Missing) else _fixed_draws(a, later.graph)
        if fixed:
            yield Missing(
                f"the noise: a draw{at(a.where(fixed[0]))} is the same in two runs under "
                "different seeds; draw it without a fixed seed"
            )


def _raised_at(error: BaseException) -> str:
    """The user's line that raised the cause of an error, in words."""
    cause, place = error.__cause__, ""
    trace = cause.__traceback__ if cause is not None else None
    here = os.path.dirname(os.path.abspath(__file__))
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if not path.startswith((here, os.path.dirname(torch.__file__))):
            place = f" ({short_place(f'{path}:{trace.tb_lineno}')})"
        trace = trace.tb_next
    return place


def short_place(where: str) -> str:
    """A line of code, without its folder."""
    return where.rsplit(os.sep, 1)[-1] if where else "an unknown line"


def at(where: str) -> str:
    """A line of code, in brackets; nothing if it is not known."""
    return f" ({short_place(where)})" if where else ""


def unexamined(what: str, where: str, why: str) -> Missing:
    """An essential part, on a line of code, that was not examined."""
    return Missing(f"{what}{at(where)}: {why}")


def _leaves(result: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of what a step returns, with their names."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    if hasattr(result, "_asdict"):
        result = result._asdict()  # pyright: ignore
    if isinstance(result, Mapping):
        for key, value in result.items():
            yield from _leaves(value, str(key))
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from _leaves(value, name)
    elif isinstance(result, Tensor) or not hasattr(result, "__dict__"):
        yield name, result
    else:
        for key, value in vars(result).items():
            if isinstance(value, Tensor):
                yield key, value


def _find_loss(graph: Graph) -> Run | Missing:
    """The run with its loss, if it has one."""
    if graph.backward_calls:
        called = list(dict.fromkeys(graph.backward_calls))
        note = f"the step calls backward() on {len(called)} losses: their sum is audited"
        notes = (Assumed(note),) if len(called) > 1 else ()
        return Run(graph, _scalar(graph, *called), notes=notes)
    entries = list(_leaves(graph.result))
    tensors = [(name.lower(), t) for name, t in entries if isinstance(t, Tensor)]
    needs = any(t.requires_grad for _, t in tensors)
    known = [(n, i) for n, t in tensors if (i := graph.returned(t)) is not None]
    known = [(n, i) for n, i in known if graph[i].floating]
    names = {n: i for n, i in known if graph[i].numel == 1 and graph[i].origin}
    for key in LOSS_KEYS:
        if key in names:
            return Run(graph, names[key], needs)
    scalars = list(dict.fromkeys(i for _, i in known if graph[i].numel == 1 and graph[i].origin))
    above = {i: len(graph.upstream([i]).intersection(scalars)) for i in scalars}
    if len(scalars) > 1 and max(above.values()) > 1:
        note = Assumed(
            f"of {len(scalars)} scalars that the step returns, the loss is the one that is "
            "computed from the others"
        )
        return Run(graph, max(scalars, key=lambda i: above[i]), needs, (note,))
    if scalars:
        note = Assumed(
            f"the step returns {len(scalars)} scalars, and none is computed from the others: "
            "their sum is audited; return what you call backward() on"
        )
        return Run(graph, _scalar(graph, *scalars), needs, (note,) if len(scalars) > 1 else ())
    vectors = [i for _, i in known if graph[i].origin & Origin.PARAMETERS]
    column = [i for i in vectors if graph[i].numel == (graph[i].shape or (0,))[0]]
    if len(column) == 1 and len(known) == 1:
        shape = tuple(graph[column[0]].shape)
        note = Assumed(f"the step returns a loss of shape {shape}: its mean is audited")
        loss = graph.derive(lambda t: t.double().mean(), column, "mean")
        return Run(graph, loss, needs, (note,))
    return Missing(f"the loss: {_no_loss(graph, entries)}")


def _no_loss(graph: Graph, entries: list[tuple[str, Any]]) -> str:
    numbers = [v for _, v in entries if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if numbers:
        return (
            "the step returns a Python number, as .item() makes it; return the tensor on which "
            "you call backward()"
        )
    tensors = [v for _, v in entries if isinstance(v, Tensor)]
    if not tensors:
        kind = type(graph.result).__name__
        return f"the step returns {kind}; return the tensor on which you call backward()"
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:4])
    if any(t.numel() == 1 for t in tensors):
        return "the scalar that the step returns does not depend on any parameter"
    return f"the step returns tensors of shapes {shapes}, and no scalar"


def _scalar(graph: Graph, *ids: int) -> int:
    """The number of the sum of all entries of some values."""
    if len(ids) == 1 and graph[ids[0]].numel == 1:
        return ids[0]
    return graph.derive(lambda *ts: sum(t.double().sum() for t in ts), ids, "add")  # pyright: ignore


def _useless(run: Run) -> list[Outcome]:
    """Why a loss cannot be examined: it is not finite, or computed from no parameters."""
    graph, loss = run.graph, run.loss
    if not graph[loss].origin & Origin.PARAMETERS:
        return [Missing("the loss: it does not depend on any parameter")]
    value = float(graph.get(loss))
    if math.isfinite(value):
        return []
    made = [i for i in sorted(graph.upstream([loss])) if graph[i].node and graph[i].floating]
    where = graph.where(next((i for i in made if not graph.get(i).isfinite().all()), loss))
    return [
        bug("not_finite", "step", where=where, line=short_place(where)),
        Missing(f"the loss: it is {value}{at(where)}"),
    ]


def _fixed_draws(a: Graph, b: Graph) -> list[int]:
    """The draws that are the same in two runs."""
    live = a.upstream(range(len(a.values)))
    return [
        v.id
        for v in a.draws("gaussian", "random", "other")
        if v.id in live and v.numel > 1 and v.floating and torch.equal(a.get(v.id), b.get(v.id))
    ]


def _turns(graph: Graph) -> Iterator[Noise]:
    """Draws under which what the step reads, as `if` does, may be another.

    A truth value is made of comparisons of numbers. From the draws of the step, Newton's steps
    lead to where the sides of one are equal, and beyond. What Python compares is not seen; a
    uniform draw that it reads is moved to both ends.
    """
    numbers = {v.id for v in graph.values if v.floating}
    draws = graph.draws()
    own = [v.id for v in draws if v.floating and v.kind in ("gaussian", "random")]
    reads = [n.ins[0] for n in graph.nodes if n.name == "_local_scalar_dense"]
    for read in dict.fromkeys(i for i in reads if graph[i].draws):
        if read in numbers:
            above = [v for v in draws if graph[read].depends_on(v.id)]
            if all(v.kind == "random" and v.numel == 1 for v in above):
                for end in (0.0, 1 - 1e-6):
                    yield [torch.full(v.shape, end) if v in above else None for v in draws]
            continue
        parts = (graph[i].node for i in graph.upstream([read], stop=numbers))
        for node in [n for n in parts if n is not None and n.name in ORDER]:
            with contextlib.suppress(RuntimeError):
                found = _turned(graph, read, node, own)
                if found is not None:
                    yield [found.get(v.id) for v in draws]
                    break


def _turned(graph: Graph, read: int, node: Node, draws: list[int]) -> dict[int, Tensor] | None:
    """Draws under which a truth value is another, as the sides of a comparison change places.

    None if they are not expected: they are in the tails of a Gaussian.
    """
    was = bool(graph.get(read))
    start = torch.cat([graph.get(i).reshape(-1) for i in draws])
    uniform = torch.cat([torch.full((graph[i].numel,), graph[i].kind == "random") for i in draws])
    sizes, at = [graph[i].numel for i in draws], start

    def given(flat: Tensor) -> dict[int, Tensor]:
        parts = zip(draws, flat.split(sizes), strict=True)
        return {i: t.reshape(graph[i].shape) for i, t in parts}

    def tail(flat: Tensor) -> float:
        moved = flat - start
        return float(((flat @ moved).abs() / moved.norm()).nan_to_num(math.inf))

    for _ in range(3):
        with torch.enable_grad():
            leaf = at.clone().requires_grad_()
            sides = graph.run(given(leaf), node.ins)
            left, right = (sides[a.id] if isinstance(a, Ref) else a for a in node.flat[:2])
            margin = (left - right).reshape(-1)
        if not margin.numel():
            return None
        moves = list[Tensor]()
        for i in margin.abs().argsort()[:3]:  # those that are nearest to zero
            (slope,) = torch.autograd.grad(margin[i], leaf, retain_graph=True)
            moves.append(at - 1.05 * margin[i].detach() * slope / slope.square().sum())
        where = (torch.where(uniform, t.clamp(0, 1 - 1e-6), t) for t in moves)
        at = min(where, key=tail)
        if not tail(at) <= FAR:
            return None
        if bool(graph.value(given(at), read)) != was:
            return given(at)
    return None


def _elsewhere(a: Graph, b: Graph, draws: dict[int, Tensor]) -> dict[int, Tensor]:
    """What a run gives, with the draws of another, where it reads other positions of a tensor."""
    found: dict[int, Tensor] = {}
    for node, twin in zip(a.nodes, b.nodes, strict=True):
        pairs = zip(node.flat, twin.flat, strict=True)
        moved = any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in pairs)
        if moved and node.view and all(a[i].shape == b[i].shape for i in node.outs):
            with torch.no_grad():
                given = a.run(draws | found, node.ins)
            out = twin.run(lambda x, given=given: given[x.id] if isinstance(x, Ref) else x)
            found |= dict(zip(node.outs, out, strict=True))
    return found


def _compare(first: Run, second: Run) -> Iterator[Outcome]:
    """Whether a second run, under another seed, is the first with other draws."""
    a, loss, b = first.graph, first.loss, second.graph
    live = a.upstream([loss])
    names = first.operations, second.operations
    draws = a.draws()
    if names[0] != names[1] or any(b[v.id].shape != v.shape for v in draws):
        i = next((k for k, (x, y) in enumerate(zip(*names, strict=False)) if x != y), -1)
        yield Missing(
            "the step as one graph: it branches on its draws, as its operations differ between "
            f"two runs{at(a.nodes[i].where)}; it was audited as it ran"
        )
        return
    others = {v.id: b.get(v.id) for v in draws}
    moved, other = _elsewhere(a, b, others), b.get(second.loss)
    off = float((a.value(others | moved, loss) - other).abs())
    if off <= 1e-9 * (1 + float(other.abs())):
        if moved:
            yield Assumed(
                f"the step reads entries at random positions{at(a.where(min(moved)))}: it is "
                "audited at those of one run"
            )
        return
    for node, twin in zip(a.nodes, b.nodes, strict=True):
        if not live.intersection(node.outs):
            continue
        for x, y in zip(node.flat, twin.flat, strict=True):
            if isinstance(x, float) and isinstance(y, float) and x != y:
                yield Missing(
                    f"a number that is computed outside torch, or by .item(), is {x:.6g} in one "
                    f"run and {y:.6g} in the next{at(node.where)}; its gradient is lost"
                )
                return
    for v, w in zip(a.values, b.values, strict=True):
        outside = v.id in live and v.kind in ("data", "constant", "opaque")
        if not outside or v.leaf is None or w.leaf is None or torch.equal(v.leaf, w.leaf):
            continue
        where = a.where(v.id)
        yield Missing(
            "a tensor that no operation of torch made differs between two runs"
            f"{at(where)}: random numbers of NumPy or Python; draw noise with torch"
        )
        yield warning("host_random", "line", where=where, line=short_place(where))
        return
    yield Missing("the step as one graph: a replay differs from a second run")
