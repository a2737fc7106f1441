"""Calls of the code under audit: guarded, in float64, and without side effects on it.

An audit calls code on inputs that its author did not expect. Therefore every call has a name, a
time limit and a check of its result. The modules that the callables use are in evaluation mode and
float64 meanwhile, and restored to the bit afterwards: parameters, buffers, plain attributes,
modes, gradients, and the random states.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import signal
import sys
import threading
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musigma.audit.findings import AuditError

__all__ = [
    "FLOATS", "Sandbox", "TooSlowError", "about_types", "first", "first_form", "forward_hooks",
]  # fmt: skip

FLOATS = torch.float64, torch.float32  # the types that are tried
SECONDS = 20.0  # limit of one call
DEPTH, MANY = 8, 20_000  # limits of the search for what a call may change
ATOMS = (int, float, complex, str, bytes, type, types.ModuleType, type(None))
CONTAINERS = (dict, list, set, deque)


def _reachable(objects: Sequence[Any]) -> list[Any]:
    """What a call of objects may use or change: modules, plain objects, containers and tensors.

    It is found in closures, arguments, globals of the same module, attributes and containers.
    """
    found: dict[int, Any] = {}
    todo = deque((thing, 0) for thing in objects)
    while todo and len(found) < MANY:  # the nearest first
        thing, depth = todo.popleft()
        if isinstance(thing, ATOMS) or id(thing) in found:
            continue
        found[id(thing)] = thing
        if depth < DEPTH:
            todo.extend((part, depth + 1) for part in _parts(thing))
    for root in [thing for thing in found.values() if isinstance(thing, nn.Module)]:
        for m in root.modules():
            state = (m, m._parameters, m._buffers, m._modules)
            tensors = (*m._parameters.values(), *m._buffers.values())
            found |= {id(thing): thing for thing in (*state, *tensors) if thing is not None}
    return list(found.values())


def _parts(thing: Any) -> list[Any]:
    """The objects that a call of something may use."""
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.FunctionType):
        parts: list[Any] = list(thing.__defaults__ or ())
        for cell in thing.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                parts.append(cell.cell_contents)
        home, kinds = thing.__module__, (nn.Module, types.MethodType, functools.partial)
        for value in map(thing.__globals__.get, thing.__code__.co_names):
            local = isinstance(value, types.FunctionType) and value.__module__ == home
            if local or isinstance(value, kinds):
                parts.append(value)
        return parts
    if isinstance(thing, nn.Module):
        return [*thing.modules(), *(v for m in thing.modules() for v in vars(m).values())]
    if isinstance(thing, (*CONTAINERS, tuple)):
        return list(thing.values() if isinstance(thing, dict) else thing)
    return list(vars(thing).values()) if _plain_object(thing) else []


def first(value: Any) -> Any:
    """The first entry of a tuple or a list; anything else as it is."""
    return value[0] if isinstance(value, (tuple, list)) and value else value


def about_types(error: AuditError) -> bool:
    """Whether a callable refused its input because of the floating-point type."""
    words = ("dtype", "Float", "Double", "float64", "float32", "scalar type", "double")
    return any(word in str(error) for word in words)


class Sandbox:
    """The modules that some callables use, in float64; restored to the bit when the block ends.

    Args:
        objects: Callables, modules, or objects that hold them; None are left out.
        seconds: Limit of one call; by default 20.
        as_is: The modules keep their modes and types.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> with Sandbox(layer) as sandbox:
        ...     sandbox.randomize()
        ...     y = sandbox.call("layer", layer, torch.zeros(2, 3, dtype=sandbox.dtype))
        >>> y.dtype, layer.weight.dtype
        (torch.float64, torch.float32)
    """

    def __init__(self, *objects: Any, seconds: float | None = None, as_is: bool = False):
        self._objects = objects
        found = _reachable(objects)
        modules = [thing for thing in found if isinstance(thing, nn.Module)]
        inner = {id(m) for root in modules for m in root.modules() if m is not root}
        self.modules = [module for module in modules if id(module) not in inner]
        self.seconds, self.as_is = SECONDS if seconds is None else seconds, as_is
        self.dtype = torch.float64
        self.changed: set[tuple[str, int]] = set()  # arguments that calls changed in place

    def __enter__(self) -> Sandbox:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(torch.random.fork_rng())
        self._stack.callback(np.random.set_state, np.random.get_state())
        self._stack.callback(random.setstate, random.getstate())
        self._stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        self._stack.callback(self.snapshot())
        for thing in _reachable(self._objects):
            self._stack.callback(_random_state_restorer(thing))
        self.reseed()
        if not self.as_is:
            for module in self.modules:
                module.eval()
            self.use_dtype(torch.float64)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def use_dtype(self, dtype: torch.dtype) -> None:
        """Make the modules, and all that the callables hold, compute in a type."""
        self.dtype = dtype
        torch.set_default_dtype(dtype)
        for t in self.leaves():
            if t.is_floating_point():
                t.data = t.data.to(dtype)

    def leaves(self) -> list[Tensor]:
        """Every tensor that a call can reach and that is not computed from others."""
        return [t for t in _reachable(self._objects) if isinstance(t, Tensor) and t.is_leaf]

    def layers(self) -> list[nn.Module]:
        """Every module, with those inside it."""
        return list({id(m): m for root in self.modules for m in root.modules()}.values())

    def snapshot(self) -> Callable[[], None]:
        """A function that restores everything to its present state, as often as it is called."""
        undo = [_content_restorer(thing) for thing in _reachable(self._objects)]

        def restore() -> None:
            for step in undo:
                step()

        return restore

    def reseed(self, seed: int = 0) -> None:
        """Seed the random numbers of torch, NumPy and Python."""
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    @torch.no_grad()
    def randomize(self, std: float = 0.3, seed: int = 1) -> None:
        """Add Gaussian noise, scaled to the fan-in, to all trainable parameters."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.trainable():
            fan_in = max(1, p[0].numel()) if p.ndim > 1 else 1
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_((noise * std / fan_in**0.5).to(p))

    def trainable(self) -> list[Tensor]:
        """Every parameter that requires a gradient; others may have to stay fixed."""
        return [t for t in self.leaves() if t.requires_grad]

    def call(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        """The result of a callable.

        Raises:
            AuditError: If it raises or exceeds the time limit; with its name and input shapes.
        """
        shapes = ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else repr(a) for a in args)
        given = f"{name}: given {shapes}," if args else f"{name}:"
        versions = [a._version if isinstance(a, Tensor) else 0 for a in args]
        try:
            with _limited(self.seconds), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer = fn(*args)
            for i, (a, version) in enumerate(zip(args, versions, strict=True)):
                if isinstance(a, Tensor) and a._version != version:
                    self.changed.add((name, i))
            return answer
        except _TooSlow:
            raise TooSlowError(
                f"{given} it did not end within {self.seconds:g} s; make it faster "
                "or give it smaller inputs"
            ) from None
        except (Exception, SystemExit) as error:
            words = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
            reason = f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__
            raise AuditError(f"{given} it raises {reason}") from error

    def as_tensor(self, name: str, value: Any) -> Tensor:
        """The result of a callable as a tensor, detached, in float64 on the CPU.

        Raises:
            AuditError: If it is neither a tensor, nor an array, nor a number.
        """
        if isinstance(value, (int, float, np.ndarray, np.number)):
            value = torch.as_tensor(np.asarray(value))
        if not isinstance(value, Tensor):
            raise AuditError(f"{name}: expected a tensor; got {type(value).__name__}")
        return value.detach().cpu().to(torch.float64)

    def ask(self, name: str, fn: Callable[..., Any], *args: Any) -> Tensor:
        """The result of a callable, by `call` and `as_tensor`."""
        return self.as_tensor(name, self.call(name, fn, *args))


def first_form(
    forms: Iterable[tuple[Any, ...]], attempt: Callable[..., Any]
) -> tuple[tuple[Any, ...], Any]:
    """The first arguments for which an attempt raises no `AuditError`, and what it returned.

    If it raises for all, so does this: the first error that is not about the number of arguments.
    """
    reasons: list[AuditError] = []
    for form in forms:
        try:
            return form, attempt(*form)
        except TooSlowError:
            raise
        except AuditError as error:
            reasons.append(error)
    told = [error for error in reasons if "argument" not in str(error.__cause__)]
    raise (told or reasons[-1:] or [AuditError("nothing was tried")])[0]


@contextlib.contextmanager
def forward_hooks(modules: Iterable[nn.Module], hook: Any, **how: Any) -> Iterator[None]:
    """Run a forward hook on some modules while the block runs."""
    handles = [module.register_forward_hook(hook, **how) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TooSlowError(AuditError):
    """A callable exceeded its time limit, so that it is not tried again."""


class _TooSlow(BaseException):
    """A call exceeded its time limit; not an Exception, so that no handler swallows it."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Interrupt what runs too long: in the main thread, on systems with timer signals."""
    usable = hasattr(signal, "setitimer")
    if not usable or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _content_restorer(thing: Any) -> Callable[[], None]:
    """A function that restores the content of an object that a call may change in place."""
    if isinstance(thing, Tensor):
        return _tensor_restorer(thing)
    if isinstance(thing, np.ndarray) and thing.flags.writeable:
        return functools.partial(np.copyto, thing, thing.copy())
    has_attributes = isinstance(thing, nn.Module) or _plain_object(thing)
    if not has_attributes and not isinstance(thing, CONTAINERS):
        return lambda: None
    container: Any = vars(thing) if has_attributes else thing
    content, before = container.copy(), _entries(container)

    def restore() -> None:
        now = _entries(container)
        if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
            container.clear()
            add = container.extend if hasattr(container, "extend") else container.update
            add(content)

    return restore


def _random_state_restorer(thing: Any) -> Callable[[], object]:
    """A function that restores the state of a random number generator."""
    if isinstance(thing, (torch.Generator, np.random.RandomState)):
        return functools.partial(thing.set_state, thing.get_state())
    if isinstance(thing, random.Random):
        return functools.partial(thing.setstate, thing.getstate())
    if isinstance(thing, np.random.Generator):
        return functools.partial(setattr, thing.bit_generator, "state", thing.bit_generator.state)
    return lambda: None


def _entries(container: Any) -> list[Any]:
    """The objects in a container: the keys and the values of a dictionary."""
    if isinstance(container, dict):
        return [*container.keys(), *container.values()]
    return list(container)


def _plain_object(value: Any) -> bool:
    """Whether an object has attributes that a call may change: a cache, say.

    Objects of the standard library, such as locks and loggers, are left alone.
    """
    others = (*ATOMS, *CONTAINERS, nn.Module, Tensor)
    home = type(value).__module__.partition(".")[0]
    foreign = home in sys.stdlib_module_names and home not in ("types", "argparse", "collections")
    return hasattr(value, "__dict__") and not foreign and not isinstance(value, others)


def _tensor_restorer(t: Tensor) -> Callable[[], None]:
    data, requires_grad, gradient = t.data, t.requires_grad, t.grad if t.is_leaf else None
    values, slope = data.clone(), None if gradient is None else gradient.clone()
    # Nothing can write to expanded tensors.
    writable = not torch._debug_has_internal_overlap(data)  # pyright: ignore[reportPrivateImportUsage]

    def restore() -> None:
        if writable:
            data.copy_(values)
        t.data = data
        if t.is_leaf:
            t.grad = gradient
            if gradient is not None and slope is not None:
                gradient.data.copy_(slope)
            t.requires_grad_(requires_grad)

    return restore
