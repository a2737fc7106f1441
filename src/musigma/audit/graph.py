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
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

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
        name: The name of the operation.
        spec: The structure of the arguments; None if `flat` holds them as they are.
        outs: The numbers of its results.
        writes: Whether it writes to an argument.
        pointwise: Each entry of the result depends on the same entry of the arguments.
        view: It only moves, copies or selects entries.
        grads: For each reference, whether its tensor required a gradient; () if autograd did not
            see the operation.
        where: The user's line, as "path:line".
    """

    fn: Callable[..., Any]
    flat: list[Any]
    name: str
    spec: Any = None
    outs: list[int] = field(default_factory=list)
    writes: bool = False
    pointwise: bool = False
    view: bool = False
    grads: tuple[bool, ...] = ()
    where: str = ""

    @property
    def ins(self) -> list[int]:
        """The numbers of its tensor arguments."""
        return [a.id for a in self.flat if isinstance(a, Ref)]

    @property
    def moved(self) -> list[int]:
        """The tensor arguments that autograd gives a gradient to."""
        return list(compress(self.ins, self.grads)) if self.grads else self.ins

    def run(self, value: Callable[[Any], Any], stops: bool = False) -> list[Tensor]:
        """Its results, with arguments from a function of an entry of `flat`.

        With `stops`, the tensors that required no gradient in the step get none.
        """
        flat, needs = [value(a) for a in self.flat], iter(self.grads if stops else ())
        for k, a in enumerate(self.flat):
            if isinstance(a, Ref) and not next(needs, True):
                flat[k] = flat[k].detach()
        if self.writes:
            flat = [t.clone() if isinstance(t, Tensor) else t for t in flat]
        args, kwargs = (flat, {}) if self.spec is None else tree_unflatten(flat, self.spec)
        out = self.fn(*args, **kwargs)
        return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


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
        self._first: dict[Any, Node] = {}
        self._base: dict[int, Tensor] = {}
        self._plans: dict[Any, list[Node]] = {}

    def __getitem__(self, i: int) -> Value:
        return self.values[i]

    def draws(self, *kinds: Kind) -> list[Value]:
        """The random draws of some kinds, in order."""
        return [v for v in self.values if v.kind in (kinds or DRAWS)]

    # --- making it ----------------------------------------------------------------------------

    def leaf(self, t: Tensor, kind: Kind, **how: Any) -> Value:
        """A new value that no operation made, with the content of a tensor."""
        i, leaf = len(self.values), t.detach().clone().cpu()
        v = Value(i, tuple(t.shape), t.is_floating_point(), kind=kind, leaf=leaf, **how)
        v.draws |= (kind in DRAWS) << i
        self.values.append(v)
        return v

    def add(self, node: Node, like: Sequence[Tensor]) -> list[Value]:
        """The results of an operation, of the shapes and types of some tensors.

        They are not new if it is the repetition of another: an encoder that is called twice.
        """
        arguments = tuple((type(a), a) for a in node.flat)
        key = (node.fn, arguments, repr(node.spec), node.grads)
        first = self._first.setdefault(key, node)
        if first is node:
            self.nodes.append(node)
            for t in like:
                node.outs.append(len(self.values))
                v = Value(node.outs[-1], tuple(t.shape), t.is_floating_point(), node=node)
                self.values.append(v)
            self._inherit(node)
            for i in node.ins:
                self[i].users.append(node)
        return [self[i] for i in first.outs]

    def _inherit(self, node: Node) -> None:
        """Give the results of an operation the origin and the draws of its arguments."""
        origin, draws = Origin.NOTHING, 0
        for i in node.ins:
            origin, draws = origin | self[i].origin, draws | self[i].draws
        for i in node.outs:
            self[i].origin, self[i].draws = origin, draws

    def derive(self, fn: Callable[..., Tensor], ids: Sequence[int], name: str) -> int:
        """The number of a scalar that the step did not compute itself, of values that it did."""
        node = Node(fn, [Ref(i) for i in ids], name, grads=(True,) * len(ids))
        return self.add(node, [torch.zeros(())])[0].id

    def demote_constants(self) -> None:
        """Make those data constants that hold nothing of an example.

        They are one number, a permutation, an identity, or a mask of parameters.
        """

        def is_constant(v: Value) -> bool:
            t = v.leaf
            if t is None or t.layout != torch.strided or t.is_complex():
                return False
            if t.numel() <= 1 or bool((t == t.reshape(-1)[0]).all()):
                return True
            order = t.sort().values.long() if t.ndim == 1 and not t.is_floating_point() else None
            if order is not None and torch.equal(order, torch.arange(len(t))):
                return True
            if t.ndim == 2 and torch.equal(t, torch.eye(*t.shape, dtype=t.dtype)):
                return True
            if not bool(((t == 0) | (t == t.max())).all()):
                return False
            masks = [n.name == "mul" and len(n.ins) == 2 for n in v.users]
            others = [self[i].origin for n in v.users for i in n.ins if i != v.id]
            return all(masks) and bool(others) and all(o == Origin.PARAMETERS for o in others)

        for v in [v for v in self.values if v.kind == "data" and is_constant(v)]:
            v.kind, v.origin = "constant", Origin.NOTHING
        for node in self.nodes:
            self._inherit(node)

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
            if (leaf := self[i].leaf) is not None:
                self._base[i] = _double(leaf)
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
            if isinstance(a, torch.device):
                return torch.device("cpu")
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


def _double(t: Tensor) -> Tensor:
    return t.double() if t.dtype in LOW_PRECISION else t
