"""Recording a step: one run of it, as a graph of tensor operations.

A `TorchDispatchMode` sees every operation on tensors, below autograd, wherever it is called from:
modules, `torch.distributions`, Keras on torch, custom autograd functions. Values are known by
their memory (storage, offset, shape, strides, type), so that views of one tensor share writes.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from musigma.audit.graph import Graph, Node, Origin, Ref, Value
from musigma.audit.sandbox import Sandbox

__all__ = ["record"]

MOVES = {  # operations that copy or select entries; those that share memory say so themselves
    "clone", "_to_copy", "cat", "stack", "repeat", "_unsafe_view", "copy", "diag_embed",
    "constant_pad_nd", "index_put", "slice_scatter", "select_scatter", "as_strided_scatter",
    "fill", "unsafe_split", "roll", "flip", "masked_fill", "tril", "triu", "index",
    "index_select", "gather", "repeat_interleave",
}  # fmt: skip
LIBRARIES = tuple(os.path.dirname(os.path.abspath(f)) for f in (torch.__file__, __file__))
BACKWARD = torch.autograd.backward


def record(
    step: Callable[[], Any],
    *,
    seed: int = 0,
    sandbox: Sandbox | None = None,
    noise: Sequence[Tensor | None] = (),
) -> Graph:
    """Run a step once, and record it.

    Args:
        step: A callable without arguments.
        seed: Seed of the random numbers during the run.
        sandbox: Knows the modules of the step: their buffers are no data.
        noise: In place of the first draws, in order; None for those that the seed gives.

    Returns:
        The graph, with what the step returned as its `result`. Tensors that the step changed in
        place are as they were before.

    Raises:
        Exception: What the step raises.

    Example:
        >>> graph = record(lambda: torch.randn(3).sum())
        >>> [node.name for node in graph.nodes]
        ['sum']
    """
    modules = sandbox.layers() if sandbox is not None else []
    recorder = _Recorder([b for m in modules for b in m.buffers(recurse=False)], noise)
    if sandbox is not None:
        sandbox.reseed(0)
    torch.manual_seed(seed)
    before = _host_states()
    backward = mock.patch.object(torch.autograd, "backward", recorder.backward)
    with _readable(), backward, torch.enable_grad(), recorder:
        result = step()
    recorder.restore()
    recorder.mark_regions()
    graph = recorder.graph
    graph.demote_constants()
    graph.result, graph.returned = result, recorder.lookup
    graph.hosts = tuple(name for name, state in _host_states().items() if state != before[name])
    return graph


def _host_states() -> dict[str, object]:
    """The states of random generators besides torch's."""
    return {"NumPy": str(np.random.get_state()), "Python": random.getstate()}


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Run fused and compiled operations by their parts."""
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of hardware that is not there
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        stack.enter_context(torch.jit.optimized_execution(False))  # pyright: ignore
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Memory(NamedTuple):
    """Where a tensor's content is, and how it is read."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_whole: bool  # all of its storage, in order

    @classmethod
    def of(cls, t: Tensor) -> _Memory:
        if t.layout != torch.strided:  # a sparse tensor shares no memory
            return cls(id(t), 0, tuple(t.shape), (), t.dtype, is_whole=False)
        storage, offset = t.untyped_storage(), int(t.storage_offset())
        fills = t.is_contiguous() and t.numel() * t.element_size() == storage.nbytes()
        whole = offset == 0 and fills
        return cls(storage._cdata, offset, tuple(t.shape), t.stride(), t.dtype, whole)

    @property
    def like(self) -> Tensor:
        """A tensor of this shape and type, without content."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class _Recorder(TorchDispatchMode):
    """Records the operations on tensors as nodes of a graph."""

    def __init__(self, buffers: list[Tensor], noise: Sequence[Tensor | None]):
        super().__init__()
        self._noise = iter(noise)
        self.graph = Graph()
        self._at: dict[_Memory, int] = {}  # the value in some memory
        self._on: dict[int, list[_Memory]] = {}  # the views of a storage
        self._alive: list[Any] = []  # so that no memory is used twice
        self._buffers = {_Memory.of(b).storage for b in buffers}

    # --- values -------------------------------------------------------------------------------

    def lookup(self, t: Tensor) -> int | None:
        """The number of a tensor's value; None if it was not seen."""
        return self._at.get(_Memory.of(t))

    def _bind(self, t: Tensor, v: Value) -> None:
        m = _Memory.of(t)
        if m not in self._at:
            self._alive.append(t.untyped_storage() if t.layout == torch.strided else t)
            self._on.setdefault(m.storage, []).append(m)
        self._at[m] = v.id

    def _ref(self, t: Tensor) -> Ref:
        """A reference to a tensor's value; a new leaf if it comes from outside the step."""
        m = _Memory.of(t)
        if m not in self._at:  # a view that was made out of sight, or a new leaf
            base = self._base(m)
            self._bind(t, self._outside(t) if base is None else self._alias(base, m))
        return Ref(self._at[m])

    def _outside(self, t: Tensor) -> Value:
        kind, origin = "data", Origin.DATA
        if isinstance(t, torch.nn.Parameter) or (t.requires_grad and t.is_leaf):
            kind, origin = "parameter", Origin.PARAMETERS
        elif _Memory.of(t).storage in self._buffers:
            kind, origin = "buffer", Origin.NOTHING
        return self.graph.leaf(t, kind=kind, origin=origin, source=t)

    def _add(
        self, fn: Any, flat: list[Any], outs: Sequence[Tensor], name: str, **how: Any
    ) -> list[Value]:
        """The results of an operation."""
        return self.graph.add(Node(fn, flat, name, where=_line(), **how), outs)

    # --- memory that is shared ------------------------------------------------------------------

    def _base(self, m: _Memory) -> _Memory | None:
        """The view of the whole storage of some memory, if there is one."""
        views = self._on.get(m.storage, ())
        return next((v for v in views if v.is_whole and v.dtype == m.dtype), None)

    def _alias(self, base: _Memory, m: _Memory) -> Value:
        """The value of a view, computed from that of its whole storage."""
        flat = [Ref(self._at[base]), m.shape, m.stride, m.offset]
        return self._add(_take, flat, [m.like], "view of", view=True)[0]

    def _written(self, t: Tensor, v: Value) -> None:
        """Give a tensor a new value, and new values to all other views of its memory."""
        m = _Memory.of(t)
        self._bind(t, v)
        others = [k for k in self._on[m.storage] if k != m]
        if not others:
            return
        base = m if m.is_whole else self._base(m)
        if base is None:
            for k in others:  # each as its memory is now
                now = torch.as_strided(t.detach(), k.shape, k.stride, k.offset)
                how = {"origin": v.origin, "draws": v.draws}
                self._at[k] = self.graph.leaf(now, kind="opaque", **how).id
            return
        if base != m:
            flat = [Ref(self._at[base]), Ref(v.id), m.shape, m.stride, m.offset]
            self._at[base] = self._add(_put, flat, [base.like], "write to", view=True)[0].id
        for k in others:
            if k != base and k.dtype == base.dtype:
                self._at[k] = self._alias(base, k).id

    def restore(self) -> None:
        """Restore the content of tensors that the step changed in place."""
        with torch.no_grad():
            for v in self.graph.values:
                if v.source is None or v.leaf is None or v.source.layout != torch.strided:
                    continue
                now, before = v.source.detach(), v.leaf.to(v.source.device)
                changed = (now != before) & ((now == now) | (before == before))  # NaN stays NaN
                if changed.any():
                    now.copy_(before)

    def mark_regions(self) -> None:
        """Mark operations inside custom gradients, whose tensors require none though they get one.

        Their results are used as tensors that require a gradient: scripted code and
        `torch.autograd.Function` run their operations apart from autograd.
        """
        needed: set[int] = set()
        for node in reversed(self.graph.nodes):
            used = needed.intersection(node.outs)
            if used and not any(node.grads) and node.fn is not _affine:
                node.grads = ()
            if used or any(node.grads):
                needed |= set(node.moved)

    # --- operations -----------------------------------------------------------------------------

    def backward(self, tensors: Any, *args: Any, **kwargs: Any) -> None:
        """Note on which tensors the step calls this, and do not record what it does."""
        called = map(self.lookup, [tensors] if isinstance(tensors, Tensor) else tensors)
        self.graph.backward_calls += [i for i in called if i is not None]
        with _disable_current_modes():
            BACKWARD(tensors, *args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name == "native_dropout" and args[2] is not False:  # by its parts
            with self:
                mask = torch.empty_like(args[0]).bernoulli_(1 - args[1])
                return args[0] * (mask / (1 - args[1])), mask.bool()
        flat, spec = tree_flatten((args, kwargs))
        refs = [self._ref(a) if isinstance(a, Tensor) else a for a in flat]
        out = func(*args, **kwargs)
        if name in ("detach", "alias"):  # the same memory, and so the same value
            return out
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        known = func._schema.arguments
        given = dict(zip((a.name for a in known), args, strict=False)) | kwargs
        written = (a.name for a in known if a.alias_info and a.alias_info.is_write)
        writes = [given[name] for name in written if given.get(name) is not None]
        in_place = name.endswith("_") and len(writes) == 1 and writes[0] is args[0]
        tensors = [a for a in flat if isinstance(a, Tensor)]
        is_factory = name == "zero_" or name.endswith("_like") or name.startswith("new_")
        if torch.Tag.nondeterministic_seeded in func.tags and name != "native_dropout":
            made = [self._draw(name, given, t) for t in outs]
        elif is_factory or not tensors:  # of the arguments, only the shape counts
            made = [self.graph.leaf(t, kind="constant") for t in outs]
        else:
            apart = _out_of_place(func, name) if in_place else None
            returns = (r.alias_info for r in func._schema.returns)
            made = self._add(
                apart or func, refs, outs, name,
                spec=spec,
                writes="batch_norm" in name or (bool(writes) and apart is None),
                pointwise=torch.Tag.pointwise in func.tags,
                view=name.rstrip("_") in MOVES or any(r and not r.is_write for r in returns),
                grads=tuple(t.requires_grad for t in tensors) * torch.is_grad_enabled(),
            )  # fmt: skip
        for t, v in zip(outs, made, strict=True):
            self._written(t, v) if in_place else self._bind(t, v)
        if not in_place:
            for t in tree_flatten(writes)[0]:  # also what it does not return, as it is now
                if isinstance(t, Tensor) and all(t is not o for o in outs):
                    origin = self.graph[self._ref(t).id].origin
                    self._written(t, self.graph.leaf(t, kind="opaque", origin=origin))
        return out

    def _draw(self, name: str, given: dict[str, Any], t: Tensor) -> Value:
        """A random draw: a normal or uniform one as standard noise, scaled and shifted."""
        kind, shift, scale = "other", 0.0, 1.0
        if name.startswith("normal"):
            kind, shift, scale = "gaussian", given.get("mean", 0.0), given.get("std", 1.0)
        elif name.startswith("uniform"):
            kind, shift = "random", given.get("from", 0.0)
            scale = given.get("to", 1.0) - shift
        elif name.startswith("bernoulli"):
            kind = "mask"
        elif name.startswith("rand"):
            kind = "gaussian" if name.startswith("randn") else "random"
        other = next(self._noise, None)
        if other is not None and other.shape == t.shape:
            t.copy_(shift + scale * other)
        arguments = [self._ref(a) if isinstance(a, Tensor) else a for a in (shift, scale)]
        if arguments == [0, 1]:
            return self.graph.leaf(t, kind=kind)
        noise = ((t.detach().double() - shift) / scale).nan_to_num()  # of a scale of zero
        flat = [Ref(self.graph.leaf(noise, kind=kind).id), *arguments]
        grads = tuple(False for a in flat if isinstance(a, Ref))  # they get no gradient
        return self._add(_affine, flat, [t], "draw", pointwise=True, grads=grads)[0]


def _out_of_place(func: Any, name: str) -> Any:
    """The operation that does not write, of one that writes to its first argument; or None."""
    if name == "copy_":
        return _copied
    packet = getattr(torch.ops.aten, name.rstrip("_"), None)
    types = [str(a.type) for a in func._schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        if [str(a.type) for a in found._schema.arguments] == types:
            return found
    return None


def _line() -> str:
    """The line of the user's code that runs now; of a library's, if there is none."""
    frame, fallback = sys._getframe(1), ""
    while frame is not None and frame.f_code is not record.__code__:
        path = frame.f_code.co_filename
        if not path.startswith(LIBRARIES) and not path.startswith("<"):
            place = f"{path}:{frame.f_lineno}"
            if "site-packages" not in path and f"{os.sep}lib{os.sep}python" not in path:
                return place
            fallback = fallback or place
        frame = frame.f_back
    return fallback


# --- operations of the graph that are not torch's -----------------------------------------------


def _copied(base: Tensor, new: Tensor, *_: Any) -> Tensor:
    return new.to(base.dtype).expand(base.shape)


def _affine(noise: Tensor, mean: Any, std: Any) -> Tensor:
    return mean + std * noise


def _positions(n: int, size: Any, stride: Any, offset: int) -> Tensor:
    return torch.arange(n).as_strided(size, stride, offset)


def _take(base: Tensor, size: Any, stride: Any, offset: int) -> Tensor:
    return base.reshape(-1)[_positions(base.numel(), size, stride, offset)]


def _put(base: Tensor, new: Tensor, size: Any, stride: Any, offset: int) -> Tensor:
    at = _positions(base.numel(), size, stride, offset).reshape(-1)
    return base.reshape(-1).index_copy(0, at, new.reshape(-1).to(base.dtype)).view(base.shape)
