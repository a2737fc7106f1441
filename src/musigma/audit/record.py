"""Recording a step: one run of it, as a graph of tensor operations.

A `TorchDispatchMode` sees every operation on tensors, below autograd, wherever it is called from:
modules, `torch.distributions`, Keras on torch, custom autograd functions. Values are known by
their memory (storage, offset, shape, strides, type), so that views of one tensor share writes.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from musigma.audit.graph import Graph, Kind, Node, Origin, Ref, Value
from musigma.audit.sandbox import Sandbox

__all__ = ["record"]

OTHER_LAWS = ("_standard_gamma", "_sample_dirichlet", "multinomial", "exponential", "binomial",
              "poisson", "geometric", "cauchy", "log_normal")  # fmt: skip
VIEWS = {
    "clone", "_to_copy", "cat", "stack", "repeat", "_unsafe_view", "copy", "copy_", "diag_embed",
    "constant_pad_nd", "lift_fresh", "contiguous", "index_put", "slice_scatter", "select_scatter",
    "as_strided_scatter", "fill", "unsafe_split", "split", "split_with_sizes", "unbind", "chunk",
    "roll", "flip", "masked_fill", "tril", "triu", "index", "index_select", "gather",
    "repeat_interleave", "_reshape_copy", "view_copy", "squeeze", "unsqueeze", "t", "transpose",
}  # fmt: skip
FACTORIES = {
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full",
    "new_empty", "zeros", "ones", "full", "empty", "arange", "linspace", "eye", "scalar_tensor",
    "empty_strided", "new_empty_strided", "zero_",
}  # fmt: skip
HERE = os.path.dirname(os.path.abspath(__file__))
LIBRARIES = (os.path.dirname(os.path.abspath(torch.__file__)), HERE)


def record(step: Callable[[], Any], *, seed: int = 0, sandbox: Sandbox | None = None) -> Graph:
    """Run a step once, and record it.

    Args:
        step: A callable without arguments.
        seed: Seed of the random numbers during the run.
        sandbox: Knows the modules of the step: their buffers are no data.

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
    recorder = _Recorder([b for m in modules for b in m.buffers(recurse=False)])
    if sandbox is not None:
        sandbox.reseed(0)
    torch.manual_seed(seed)
    before = _host_states()
    with _readable(), recorder.following_backward(), torch.enable_grad(), recorder:
        result = step()
    recorder.restore()
    recorder.mark_regions()
    graph = recorder.graph
    graph.result, graph.returned = result, recorder.lookup
    graph.merge_repeated()
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


class _Recorder(TorchDispatchMode):
    """Records the operations on tensors as nodes of a graph."""

    def __init__(self, buffers: list[Tensor]):
        super().__init__()
        self.graph = Graph()
        self._at: dict[Any, int] = {}  # the value in some memory
        self._on: dict[Any, dict[Any, None]] = {}  # the views of a storage
        self._alive: list[Any] = []  # so that no memory is used twice
        self._buffers = {_key(b)[0] for b in buffers}

    # --- values -------------------------------------------------------------------------------

    def lookup(self, t: Tensor) -> int | None:
        """The number of a tensor's value; None if it was not seen."""
        return self._at.get(_key(t))

    def _bind(self, t: Tensor, v: Value) -> None:
        key = _key(t)
        self._at[key] = v.id
        self._alive += [t, t.untyped_storage()] if len(key) > 1 else [t]
        self._on.setdefault(key[0], {})[key] = None

    def _draw(self, t: Tensor, kind: Kind) -> Value:
        v = self.graph.leaf(t, kind=kind)
        v.draws = 1 << v.id
        return v

    def _ref(self, t: Tensor) -> Ref:
        """A reference to a tensor's value; a new leaf if it comes from outside the step."""
        key = _key(t)
        if key not in self._at:
            base = next((k for k in self._on.get(key[0], ()) if _whole(k, t)), None)
            if base is not None and len(key) > 1:  # a view that was made out of sight
                self._bind(t, self._alias(base, key, t))
            else:
                self._bind(t, self._outside(t))
        return Ref(self._at[key])

    def _outside(self, t: Tensor) -> Value:
        kind, origin = "data", Origin.DATA
        if isinstance(t, torch.nn.Parameter) or (t.requires_grad and t.is_leaf):
            kind, origin = "parameter", Origin.PARAMETERS
        elif _key(t)[0] in self._buffers:
            kind, origin = "buffer", Origin.NOTHING
        elif t.numel() <= 1 or _is_permutation(t):
            kind, origin = "constant", Origin.NOTHING
        return self.graph.leaf(t, kind=kind, origin=origin, source=t)

    def _add(
        self, fn: Any, flat: list[Any], outs: list[Tensor], name: str, spec: Any = None, **how: Any
    ) -> list[Value]:
        """The results of a new operation."""
        return self.graph.add(Node(fn, flat, spec, name, where=_line(), **how), outs)

    # --- memory that is shared ------------------------------------------------------------------

    def _alias(self, base: Any, key: Any, like: Tensor) -> Value:
        """The value of a view, computed from that of its whole storage."""
        flat = [Ref(self._at[base]), key[2], key[3], key[1]]
        return self._add(_take, flat, [_like(like, key[2])], "view of", view=True)[0]

    def _written(self, t: Tensor, v: Value) -> None:
        """Give a tensor a new value, and new values to all other views of its memory."""
        key = _key(t)
        others = [k for k in self._on.get(key[0], ()) if k != key]
        self._bind(t, v)
        if not others or len(key) == 1:
            return
        base = key if _whole(key, t) else next((k for k in others if _whole(k, t)), None)
        if base is None:
            for k in others:  # each as its memory is now
                now = torch.as_strided(t.detach(), k[2], k[3], k[1])
                self._at[k] = self.graph.leaf(
                    now, kind="opaque", origin=v.origin, draws=v.draws
                ).id
            return
        if base != key:
            flat = [Ref(self._at[base]), Ref(v.id), key[2], key[3], key[1]]
            put = self._add(_put, flat, [_like(t, base[2])], "write to", view=True)[0]
            self._at[base] = put.id
        for k in others:
            if k != base and k[4] == base[4]:
                self._at[k] = self._alias(base, k, t).id

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
            inside = node.tracked and node.grads and not any(node.grads) and node.fn is not _affine
            if inside and needed.intersection(node.outs):
                node.tracked = False
            if node.grads or not node.tracked:
                needed |= set(node.moved)

    # --- operations -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def following_backward(self) -> Iterator[None]:
        """Note on which tensors the step calls backward(), and do not record what that does."""
        tensor_backward, backward = Tensor.backward, torch.autograd.backward

        def note(tensors: Any) -> None:
            for t in [tensors] if isinstance(tensors, Tensor) else tensors:
                if (i := self.lookup(t)) is not None:
                    self.graph.backward_calls.append(i)

        def of_tensor(t: Tensor, *args: Any, **kwargs: Any) -> None:
            note(t)
            with _unrecorded():
                tensor_backward(t, *args, **kwargs)

        def of_tensors(tensors: Any, *args: Any, **kwargs: Any) -> None:
            with _unrecorded():
                backward(tensors, *args, **kwargs)

        with (
            mock.patch.object(Tensor, "backward", of_tensor),
            mock.patch.object(torch.autograd, "backward", of_tensors),
        ):
            yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        flat, spec = tree_flatten((args, kwargs))
        tensors = [a for a in flat if isinstance(a, Tensor)]
        refs = [self._ref(a) if isinstance(a, Tensor) else a for a in flat]
        out = func(*args, **kwargs)
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        self._alive += outs
        writes = tuple(
            i
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        )
        if name in ("detach", "alias"):  # the same memory, and so the same value
            return out
        if not outs:
            self._opaque_writes(writes, args)
            return out
        if name == "set_":  # the tensor gets other memory
            self._bind(outs[0], self._outside(outs[0]))
            return out
        in_place = writes == (0,) and name.endswith("_")
        idle_dropout = name == "native_dropout" and args[2] is False
        if torch.Tag.nondeterministic_seeded in func.tags and not idle_dropout:
            self._random(func, name, refs, args, kwargs, outs, in_place)
            return out
        if name in FACTORIES:  # of the tensor arguments, only the shape counts
            for t in outs:
                v = self.graph.leaf(t, kind="constant")
                self._written(t, v) if in_place else self._bind(t, v)
            return out
        aliases = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if "batch_norm" in name:
            writes = (*writes, 3, 4)  # running statistics, whether the schema says so or not
        apart = _out_of_place(func) if in_place else None
        made = self._add(
            apart or func, refs, outs, name, spec,
            writes=() if apart else writes,
            pointwise=torch.Tag.pointwise in func.tags,
            view=aliases or name.rstrip("_") in VIEWS,
            grads=tuple(t.requires_grad for t in tensors),
            tracked=torch.is_grad_enabled(),
        )  # fmt: skip
        for t, v in zip(outs, made, strict=True):
            self._written(t, v) if in_place else self._bind(t, v)
        if not in_place:
            self._opaque_writes(writes, args, but=outs)
        return out

    def _opaque_writes(self, writes: tuple[int, ...], args: Any, but: Any = ()) -> None:
        """Tensors written to by an operation that does not return them, as they are now."""
        written = [args[i] for i in writes if i < len(args)]
        for t in [t for t in tree_flatten(written)[0] if isinstance(t, Tensor)]:
            if all(t is not other for other in but):
                origin = self.graph[self._at[_key(t)]].origin
                self._written(t, self.graph.leaf(t, kind="opaque", origin=origin))

    def _random(
        self, func: Any, name: str, refs: Any, args: Any, kwargs: Any, outs: Any, in_place: bool
    ) -> None:
        """Record a random draw: normal and uniform ones as standard noise, scaled and shifted."""
        if name == "native_dropout":
            mask = self._draw(outs[1], "mask")
            self._bind(outs[1], mask)
            flat = [refs[0], Ref(mask.id), 1 / (1 - args[1])]
            dropped = self._add(_drop, flat, outs[:1], "dropout", pointwise=True)[0]
            self._bind(outs[0], dropped)
            return
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        kind, shift, scale = _law(name, given)
        numbers = [a for a in (shift, scale) if not isinstance(a, Tensor)]
        flat = [self._ref(a) if isinstance(a, Tensor) else a for a in (shift, scale)]
        for t in outs:
            if numbers == [0, 1]:
                v = self._draw(t, kind)
            else:
                noise = ((t.detach().double() - shift) / scale).nan_to_num()  # of a scale of zero
                v = self._draw(noise, kind)
                grads = (False,) * (3 - len(numbers))  # no gradient reaches the arguments
                v = self._add(
                    _affine, [Ref(v.id), *flat], [t], "draw", pointwise=True, grads=grads
                )[0]
            self._written(t, v) if in_place else self._bind(t, v)


@contextlib.contextmanager
def _unrecorded() -> Iterator[None]:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def _law(name: str, given: dict[str, Any]) -> tuple[Kind, Any, Any]:
    """The kind of a draw, and the shift and the scale of its standard noise."""
    if name.startswith("normal"):
        return "gaussian", given.get("mean", 0.0), given.get("std", 1.0)
    if name.startswith("uniform"):
        low = given.get("from", 0.0)
        return "random", low, given.get("to", 1.0) - low
    if name.startswith("randn"):
        return "gaussian", 0.0, 1.0
    kind = "mask" if name.startswith("bernoulli") else "random"
    return "other" if name.startswith(OTHER_LAWS) else kind, 0.0, 1.0


def _out_of_place(func: Any) -> Any:
    """The operation that does not write, of one that writes to its first argument; or None."""
    name = func._schema.name.split("::")[1].rstrip("_")
    if name == "copy":
        return _copied
    packet = getattr(torch.ops.aten, name, None)
    types = [str(a.type) for a in func._schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        if [str(a.type) for a in found._schema.arguments] == types:
            return found
    return None


def _line() -> str:
    """The line of the user's code that runs now; of a library's, if there is none."""
    frame, fallback = sys._getframe(2), ""
    while frame is not None and frame.f_code is not record.__code__:
        path = frame.f_code.co_filename
        if not path.startswith(LIBRARIES) and not path.startswith("<"):
            place = f"{path}:{frame.f_lineno}"
            if "site-packages" not in path and f"{os.sep}lib{os.sep}python" not in path:
                return place
            fallback = fallback or place
        frame = frame.f_back
    return fallback


# --- memory -------------------------------------------------------------------------------------


def _key(t: Tensor) -> Any:
    """Where a tensor's content is in memory, and how it is read."""
    if t.layout != torch.strided:
        return (id(t),)
    storage = t.untyped_storage()._cdata
    return (storage, t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)


def _is_permutation(t: Tensor) -> bool:
    if t.ndim != 1 or t.is_floating_point() or t.dtype == torch.bool:
        return False
    return torch.equal(
        t.detach().sort().values, torch.arange(len(t), dtype=t.dtype, device=t.device)
    )


def _whole(key: Any, like: Tensor) -> bool:
    """Whether a view is dense and has its whole storage."""
    if len(key) == 1 or key[1] != 0:
        return False
    size = math.prod(key[2]) * like.element_size()
    dense = [math.prod(key[2][i + 1 :]) for i in range(len(key[2]))]
    rows = all(n == 1 or a == b for n, a, b in zip(key[2], key[3], dense, strict=True))
    return rows and key[4] == like.dtype and size == like.untyped_storage().nbytes()


def _like(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=t.dtype, device="meta")


# --- operations of the graph that are not torch's -----------------------------------------------


def _copied(base: Tensor, new: Tensor, *_: Any) -> Tensor:
    return new.to(base.dtype).expand(base.shape)


def _affine(noise: Tensor, mean: Any, std: Any) -> Tensor:
    return mean + std * noise


def _drop(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return x * mask * scale


def _positions(n: int, size: Any, stride: Any, offset: int) -> Tensor:
    return torch.arange(n).as_strided(size, stride, offset)


def _take(base: Tensor, size: Any, stride: Any, offset: int) -> Tensor:
    return base.reshape(-1)[_positions(base.numel(), size, stride, offset)]


def _put(base: Tensor, new: Tensor, size: Any, stride: Any, offset: int) -> Tensor:
    at = _positions(base.numel(), size, stride, offset).reshape(-1)
    return base.reshape(-1).index_copy(0, at, new.reshape(-1).to(base.dtype)).view(base.shape)
