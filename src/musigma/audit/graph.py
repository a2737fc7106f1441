"""A recorded step as a graph of tensor operations, and its replay with changed values.

`musigma.audit.record` makes the graph. Its values are in single assignment: an operation that
writes in place makes a new value. Values that no operation of the step made are leaves:
parameters, buffers, data, constants and random draws. A replay computes in float64, whatever
the types of the step, from the values that are replaced to those that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["LOW_PRECISION", "Graph", "Kind", "Node", "Origin", "Ref", "Value"]

LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)

DRAWS = ("gaussian", "mask", "random", "other")
"""Kinds of random draws; `random` is uniform, and `other` is another law, a gamma for instance."""
Kind = Literal[
    "", "parameter", "buffer", "data", "constant", "gaussian", "mask", "random", "other", "opaque"
]


class Origin(Flag):
    """What a value was computed from."""

    NOTHING = 0
    PARAMETERS = auto()
    DATA = auto()


@dataclass(frozen=True)
class Ref:
    """A tensor argument of an operation: the number of a value."""

    id: int


@dataclass
class Node:
    """An operation.

    Args:
        fn: The operation.
        flat: Its arguments, flattened; tensors are references.
        spec: The structure of the arguments; None if `flat` holds them as they are.
        name: The name of the operation.
        outs: The numbers of its results.
        writes: Positions of arguments that it writes to.
        pointwise: Each entry of the result depends on the same entry of the arguments.
        view: It only moves, copies or selects entries.
        grads: For each reference, whether its tensor required a gradient.
        tracked: Whether gradients were enabled.
        where: The user's line, as "path:line".
    """

    fn: Callable[..., Any]
    flat: list[Any]
    spec: Any
    name: str
    outs: list[int] = field(default_factory=list)
    writes: tuple[int, ...] = ()
    pointwise: bool = False
    view: bool = False
    grads: tuple[bool, ...] = ()
    tracked: bool = True
    where: str = ""

    @property
    def ins(self) -> list[int]:
        """The numbers of its tensor arguments."""
        return [a.id for a in self.flat if isinstance(a, Ref)]

    @property
    def moved(self) -> list[int]:
        """The tensor arguments that autograd gives a gradient to."""
        if not (self.tracked and self.grads):
            return self.ins
        return [i for i, needs in zip(self.ins, self.grads, strict=False) if needs]

    def run(self, value: Callable[[Any], Any], stops: bool = False) -> list[Tensor]:
        """Its results, with arguments from a function of an entry of `flat`.

        With `stops`, the tensors that required no gradient in the step get none.
        """
        flat = [value(a) for a in self.flat]
        if stops and self.tracked and self.grads:
            refs = [k for k, a in enumerate(self.flat) if isinstance(a, Ref)]
            for k, needs in zip(refs, self.grads, strict=False):
                flat[k] = flat[k] if needs else flat[k].detach()
        if self.spec is None:
            out = self.fn(*flat)
        else:
            args, kwargs = tree_unflatten(flat, self.spec)
            if self.writes:
                args = [
                    a.clone() if i in self.writes and isinstance(a, Tensor) else a
                    for i, a in enumerate(args)
                ]
            if isinstance(written := kwargs.get("out"), Tensor):
                kwargs = kwargs | {"out": written.clone()}
            if kwargs.get("device") is not None:
                kwargs = kwargs | {"device": "cpu"}
            out = self.fn(*args, **kwargs)
        if isinstance(out, Tensor):
            return [out]
        return [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]


@dataclass
class Value:
    """A tensor at one moment of the step.

    Args:
        id: Its number.
        shape: Its shape.
        floating: Whether it holds floating-point numbers.
        origin: What it was computed from.
        draws: The numbers of the random draws that it depends on, as a bit mask.
        node: The operation that made it; None for a leaf.
        kind: Of a leaf.
        leaf: The content of a leaf, as it was when it was first used.
        source: The user's tensor of a leaf.
        users: The operations that use it.
    """

    id: int
    shape: tuple[int, ...]
    floating: bool
    origin: Origin = Origin.NOTHING
    draws: int = 0
    node: Node | None = None
    kind: Kind = ""
    leaf: Tensor | None = None
    source: Tensor | None = None
    users: list[Node] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def depends_on(self, draw: int) -> bool:
        """Whether it depends on the draw with a number."""
        return bool(self.draws >> draw & 1)


class Graph:
    """A recorded step.

    Attributes:
        values: All values; a value's number is its place.
        nodes: All operations, in order.
        result: What the step returned.
        returned: The number of a tensor's value; None if the step did not compute it.
        backward_calls: The numbers of the values on which the step called backward().
        hosts: Whose random numbers the step used besides torch's.

    Example:
        >>> from musigma.audit.record import record
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> graph = record(lambda: (w * torch.randn(3)).sum())
        >>> (draw,) = graph.draws("gaussian")
        >>> loss = graph.returned(graph.result)
        >>> graph.run({draw.id: torch.ones(3, dtype=torch.float64)}, [loss])[loss].item()
        3.0
    """

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.result: Any = None
        self.returned: Callable[[Tensor], int | None] = lambda t: None
        self.backward_calls: list[int] = []
        self.hosts: tuple[str, ...] = ()
        self._base: dict[int, Tensor] = {}
        self._plans: dict[Any, list[Node]] = {}

    def __getitem__(self, i: int) -> Value:
        return self.values[i]

    def draws(self, *kinds: Kind) -> list[Value]:
        """The random draws of some kinds, in order."""
        return [v for v in self.values if v.kind in (kinds or DRAWS)]

    # --- making it ----------------------------------------------------------------------------

    def leaf(self, t: Tensor, **how: Any) -> Value:
        """A new value that no operation made, with the content of a tensor."""
        leaf = t.detach().clone().cpu()
        v = Value(len(self.values), tuple(t.shape), t.is_floating_point(), leaf=leaf, **how)
        self.values.append(v)
        return v

    def add(self, node: Node, like: Sequence[Tensor]) -> list[Value]:
        """The results of a new operation, of the shapes and types of some tensors."""
        origin, draws = Origin.NOTHING, 0
        for i in node.ins:
            origin |= self[i].origin
            draws |= self[i].draws
            self[i].users.append(node)
        start = len(self.values)
        self.values += [
            Value(start + k, tuple(t.shape), t.is_floating_point(), origin, draws, node)
            for k, t in enumerate(like)
        ]
        node.outs = list(range(start, len(self.values)))
        self.nodes.append(node)
        return self.values[start:]

    def derive(self, fn: Callable[..., Tensor], ids: Sequence[int], name: str) -> int:
        """The number of a scalar that the step did not compute itself, of values that it did."""
        node = Node(fn, [Ref(i) for i in ids], None, name, grads=(True,) * len(ids))
        return self.add(node, [torch.zeros(())])[0].id

    def merge_repeated(self) -> None:
        """Let operations that are repeated on the same values be one: an encoder called twice."""
        first: dict[Any, Node] = {}
        same: dict[int, int] = {}
        for node in self.nodes:
            node.flat = [Ref(same.get(a.id, a.id)) if isinstance(a, Ref) else a for a in node.flat]
            arguments = tuple((type(a), a) for a in node.flat)
            twin = first.setdefault((node.fn, arguments, repr(node.spec), node.grads), node)
            same |= dict(zip(node.outs, twin.outs, strict=True)) if twin is not node else {}
        lookup, self.nodes = self.returned, list(first.values())
        self.returned = lambda t: None if (i := lookup(t)) is None else same.get(i, i)
        self.backward_calls = [same.get(i, i) for i in self.backward_calls]
        for v in self.values:
            v.users = []
        for node in self.nodes:
            for i in node.ins:
                self.values[i].users.append(node)

    def demote_constants(self) -> None:
        """Make those data constants that are one number, an identity, or masks of parameters."""

        def is_constant(v: Value) -> bool:
            t = v.leaf
            if t is None or t.layout != torch.strided or t.is_complex():
                return False
            if bool((t == t.reshape(-1)[0]).all()):
                return True
            if t.ndim == 2 and torch.equal(t, torch.eye(*t.shape, dtype=t.dtype)):
                return True
            if not bool(((t == 0) | (t == t.max())).all()):
                return False
            masks = [n.name == "mul" and len(n.ins) == 2 for n in v.users]
            others = [self.values[i].origin for n in v.users for i in n.ins if i != v.id]
            return all(masks) and bool(others) and all(o == Origin.PARAMETERS for o in others)

        found = [v for v in self.values if v.kind == "data" and is_constant(v)]
        for v in found:
            v.kind, v.origin = "constant", Origin.NOTHING
        for node in self.nodes if found else ():
            origin = Origin.NOTHING
            for i in node.ins:
                origin |= self.values[i].origin
            for i in node.outs:
                self.values[i].origin = origin

    def where(self, i: int) -> str:
        """The line that made a value, or that first used it."""
        v = self.values[i]
        node = v.node or (v.users[0] if v.users else None)
        return node.where if node is not None else ""

    # --- reachability -------------------------------------------------------------------------

    def upstream(self, ids: Iterable[int], stop: Collection[int] = ()) -> set[int]:
        """Some values and all that they were computed from; not beyond those in `stop`."""
        return _reach(ids, stop, lambda i: node.ins if (node := self[i].node) else ())

    def downstream(self, ids: Iterable[int], stop: Collection[int] = ()) -> set[int]:
        """Some values and all that were computed from them; not beyond those in `stop`."""
        return _reach(ids, stop, lambda i: [o for n in self[i].users for o in n.outs])

    def connected(self, ids: Iterable[int], stop: Collection[int] = ()) -> set[int]:
        """Some values and all that autograd would give a gradient of them to.

        Not beyond those in `stop`.
        """
        return _reach(ids, stop, lambda i: node.moved if (node := self[i].node) else ())

    # --- replay -------------------------------------------------------------------------------

    def get(self, i: int) -> Tensor:
        """A value as it was in the step, in float64."""
        if i not in self._base:
            v = self.values[i]
            if v.node is None:
                self._base[i] = _double(v.leaf)
            else:
                self._base.update(self._replay({}, self._plan([i], self._base.__contains__)))
        return self._base[i]

    def run(
        self, over: Mapping[int, Tensor], wants: Sequence[int], stops: bool = False
    ) -> dict[int, Tensor]:
        """The values `wants` if those in `over` were others; differentiable in them.

        With `stops`, gradients stop where they did in the step.
        """
        key = (frozenset(over), tuple(wants))
        if key not in self._plans:
            touched = self.downstream(over)
            self._plans[key] = self._plan(wants, lambda i: i in over or i not in touched)
        env = self._replay(over, self._plans[key], stops)
        return {i: env[i] if i in env else self.get(i) for i in wants}

    def value(self, over: Mapping[int, Tensor], want: int) -> Tensor:
        """As `run`, of one value and without gradients."""
        with torch.no_grad():
            return self.run(over, [want])[want]

    def _plan(self, wants: Iterable[int], known: Callable[[int], bool]) -> list[Node]:
        """The operations, in order, that give some values from those that are known."""
        need: dict[int, Node] = {}
        todo = list(wants)
        while todo:
            i = todo.pop()
            node = self.values[i].node
            if node is None or known(i) or id(node) in need:
                continue
            need[id(node)] = node
            todo += node.ins
        return sorted(need.values(), key=lambda n: n.outs[0])

    def _replay(
        self, over: Mapping[int, Tensor], plan: list[Node], stops: bool = False
    ) -> dict[int, Tensor]:
        env = dict(over)

        def value(a: Any) -> Any:
            if isinstance(a, Ref):
                return env[a.id] if a.id in env else self.get(a.id)
            return torch.float64 if isinstance(a, torch.dtype) and a in LOW_PRECISION else a

        for node in plan:
            for i, t in zip(node.outs, node.run(value, stops), strict=False):
                if i not in over:
                    env[i] = _double(t)
        return env


def _reach(
    ids: Iterable[int], stop: Collection[int], following: Callable[[int], Iterable[int]]
) -> set[int]:
    """Some values and all that follow them, not beyond those in `stop`."""
    seen: set[int] = set()
    todo = list(ids)
    while todo:
        i = todo.pop()
        if i not in seen:
            seen.add(i)
            todo += following(i) if i not in stop else ()
    return seen


def _double(t: Tensor | None) -> Tensor:
    if t is None:
        raise ValueError("a leaf without content")
    return t.double() if t.dtype in LOW_PRECISION else t
