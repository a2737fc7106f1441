"""Calling other people's code: guarded, in float64, and without leaving a trace in it.

An audit asks a callable for numbers on inputs that its author never thought of. So every call has
a name, a limit of time and a check of what comes back; whatever modules lie behind the callables
are put into evaluation mode and float64 meanwhile, and are afterwards what they were, to the bit:
parameters, buffers, plain attributes, modes, gradients, and torch's random state.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import signal
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musigma.audit.findings import AuditError

__all__ = ["Guest", "TooSlowError", "about_types", "behind"]

SECONDS = 20.0  # that one call may take


def behind(*objects: Any) -> list[nn.Module]:
    """The modules that callables use: their own, and those in closures, arguments and globals."""
    return _find(objects)[0]


def _find(objects: Sequence[Any]) -> tuple[list[nn.Module], list[Any]]:
    """The modules behind some objects, and the other objects with attributes of their own."""
    found: dict[int, nn.Module] = {}
    holders: dict[int, Any] = {}
    seen: set[int] = set()

    def look(thing: Any, depth: int) -> None:
        if id(thing) in seen or depth > 6:
            return
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found.setdefault(id(thing), thing)
        elif isinstance(thing, types.MethodType):
            look(thing.__self__, depth + 1)
            look(thing.__func__, depth + 1)
        elif isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                look(part, depth + 1)
        elif isinstance(thing, types.FunctionType):
            cells = thing.__closure__ or ()
            for cell in cells:
                with contextlib.suppress(ValueError):  # an empty cell
                    look(cell.cell_contents, depth + 1)
            for value in thing.__defaults__ or ():
                look(value, depth + 1)
            for name in thing.__code__.co_names:
                value = thing.__globals__.get(name)
                if isinstance(value, (nn.Module, types.MethodType, functools.partial)) or (
                    isinstance(value, types.FunctionType) and value.__module__ == thing.__module__
                ):
                    look(value, depth + 1)
        elif isinstance(thing, (list, tuple, set)):
            for part in list(thing)[:100]:
                look(part, depth + 1)
        elif isinstance(thing, dict):
            for part in list(thing.values())[:100]:
                look(part, depth + 1)
        elif hasattr(thing, "__dict__") and not isinstance(
            thing, (type, types.ModuleType, Tensor, types.BuiltinFunctionType)
        ):
            holders[id(thing)] = thing
            for part in list(vars(thing).values())[:100]:
                look(part, depth + 1)

    for thing in objects:
        look(thing, 0)
    inner = {id(m) for root in found.values() for m in root.modules() if m is not root}
    return [module for key, module in found.items() if key not in inner], list(holders.values())


def about_types(error: AuditError) -> bool:
    """Whether a callable refused what it was given for its floating-point type."""
    words = ("dtype", "Float", "Double", "float64", "float32", "scalar type", "double")
    return any(word in str(error) for word in words)


class Guest:
    """The modules behind some callables, borrowed: restored to the bit when the block ends.

    Args:
        objects: Callables, modules, or objects that hold them; None are left out.
        seed: Of everything random in the block.
        seconds: That one call may take; by default 20.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> with Guest(layer) as guest:
        ...     guest.randomise()
        ...     y = guest.call("layer", layer, torch.zeros(2, 3, dtype=guest.dtype))
        >>> y.dtype, layer.weight.dtype
        (torch.float64, torch.float32)
    """

    def __init__(self, *objects: Any, seed: int = 0, seconds: float | None = None):
        self.modules, self.holders = _find([o for o in objects if o is not None])
        self.seed, self.seconds = seed, SECONDS if seconds is None else seconds
        self.dtype = torch.float64
        self.device = torch.device("cpu")

    def __enter__(self) -> Guest:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(torch.random.fork_rng())
        for keep in (_numpy_random, _python_random, _default_dtype):
            self._stack.enter_context(keep())
        self._stack.callback(self.snapshot())
        self._modes = [(m, m.training) for root in self.modules for m in root.modules()]
        self.reseed()
        for module in self.modules:
            module.eval()
        self.use(torch.float64)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def use(self, dtype: torch.dtype) -> None:
        """Have the modules compute in a type, and new tensors be of it."""
        self.dtype = dtype
        torch.set_default_dtype(dtype)
        for module in self.modules:
            module.to(dtype)
        own = {id(p) for module in self.modules for p in module.parameters()}
        for owner in [*(m for root in self.modules for m in root.modules()), *self.holders]:
            for name, value in list(vars(owner).items()):
                if not isinstance(value, Tensor) or id(value) in own:
                    continue
                if value.is_floating_point() and value.is_leaf:
                    wants = value.requires_grad
                    with contextlib.suppress(AttributeError):  # frozen dataclasses
                        setattr(owner, name, value.detach().to(dtype).requires_grad_(wants))

    def as_given(self) -> None:
        """Put the modules back into the modes, training or evaluation, that they came in."""
        for module, mode in self._modes:
            module.training = mode

    def snapshot(self) -> Callable[[], None]:
        """What brings everything borrowed back to how it is now; may be called again and again."""
        return _restorer(self.modules, self.holders)

    def reseed(self, seed: int | None = None) -> None:
        """Begin the random numbers of torch, NumPy and Python anew."""
        seed = self.seed if seed is None else seed
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    @torch.no_grad()
    def randomise(self, std: float = 0.3, seed: int = 1) -> None:
        """Move what is trained by Gaussian noise, scaled to its fan-in: nothing stays at zero."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.trained():
            fan_in = max(1, p[0].numel()) if p.ndim > 1 else 1
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_((noise * std / fan_in**0.5).to(p))

    def trained(self) -> list[Tensor]:
        """Every parameter that wants a gradient: others are fixed, and may have to be."""
        own = [p for module in self.modules for p in module.parameters()]
        held = [t for holder in self.holders for t in vars(holder).values()]
        leaves = [t for t in held if isinstance(t, Tensor) and t.is_leaf]
        return list({id(t): t for t in [*own, *leaves] if t.requires_grad}.values())

    def call(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        """What a callable returns; it is named in the error if it raises, or does not end.

        Raises:
            AuditError: With the callable's name, the shapes it was given, and what it did.
        """
        given = ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else repr(a) for a in args)
        try:
            with _limited(self.seconds), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return fn(*args)
        except _TooSlow:
            raise TooSlowError(
                f"{name}: given {given}, it did not end within {self.seconds:g} s; make it faster "
                "or give it smaller inputs"
            ) from None
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            words = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
            reason = f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__
            raise AuditError(f"{name}: given {given}, it raises {reason}") from error

    def given(self, t: Tensor) -> Tensor:
        """A tensor as the callables are given it: of the type and on the device of the model."""
        return t.to(self.device, self.dtype)

    def tensor(self, name: str, value: Any) -> Tensor:
        """A callable's answer as a tensor, detached, in float64 on the CPU.

        Raises:
            AuditError: If it is none.
        """
        if isinstance(value, (int, float, np.ndarray, np.number)):
            value = torch.as_tensor(np.asarray(value))
        if not isinstance(value, Tensor):
            raise AuditError(f"{name}: expected a tensor; got {type(value).__name__}")
        return value.detach().cpu().to(torch.float64)

    def tensors(self, name: str, value: Any, count: Sequence[int]) -> tuple[Tensor, ...]:
        """A callable's answer as so many tensors.

        Raises:
            AuditError: If there are more or fewer of them.
        """
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if len(parts) not in count:
            wanted = " or ".join(map(str, count))
            raise AuditError(f"{name}: expected {wanted} tensors; got {len(parts)}")
        return tuple(self.tensor(name, part) for part in parts)


class TooSlowError(AuditError):
    """A callable did not end within its limit of time: there is no use in trying it again."""


class _TooSlow(BaseException):
    """A call that ran into its limit of time; no `except Exception` on the way swallows it."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """End what runs too long; only the main thread can, and where there are such signals."""
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


@contextlib.contextmanager
def _numpy_random() -> Iterator[None]:
    state = np.random.get_state()
    yield
    np.random.set_state(state)


@contextlib.contextmanager
def _python_random() -> Iterator[None]:
    state = random.getstate()
    yield
    random.setstate(state)


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _restorer(roots: Sequence[nn.Module], holders: Sequence[Any] = ()) -> Callable[[], None]:
    """What brings modules, and other objects with attributes, back to how they are now."""
    undo: list[Callable[[], None]] = [_plain_restorer(holder) for holder in holders]
    for module in {id(m): m for root in roots for m in root.modules()}.values():
        undo.append(_plain_restorer(module))
        for p in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            undo.append(_tensor_restorer(p))

    def restore() -> None:
        for step in undo:
            step()

    return restore


def _plain_restorer(module: Any) -> Callable[[], None]:
    attributes = dict(module.__dict__)
    inner = [_content_restorer(value) for value in attributes.values()]

    def restore() -> None:
        _refill(module.__dict__, attributes)
        for step in inner:
            step()

    return restore


def _content_restorer(own: Any) -> Callable[[], None]:
    """What brings an attribute's content back, where a call may change it in place."""
    if isinstance(own, Tensor):
        tensor = own.detach().clone()
        return lambda: _put(own.data, tensor)
    if isinstance(own, np.ndarray):
        array = own.copy()
        return lambda: own.__setitem__(..., array)
    if isinstance(own, dict):
        table = dict(own.items())
        return lambda: _refill(own, table)
    if isinstance(own, (list, set)):
        parts = list(own)
        return lambda: _reset(own, parts)
    if _plain_object(own):
        known = dict(vars(own))
        return lambda: _refill(vars(own), known)
    return lambda: None


def _refill(own: Any, kept: dict[Any, Any]) -> None:
    """Give a dictionary its old content, if it has another."""
    if list(own) != list(kept) or any(own[key] is not value for key, value in kept.items()):
        own.clear()
        own.update(kept)


def _reset(own: Any, kept: list[Any]) -> None:
    """Give a list or a set its old content, if it has another."""
    now = list(own)
    if len(now) != len(kept) or any(a is not b for a, b in zip(now, kept, strict=True)):
        own.clear()
        (own.update if isinstance(own, set) else own.extend)(kept)


def _plain_object(value: Any) -> bool:
    """Whether something has attributes of its own that a call may change: a cache, say."""
    functions = (types.FunctionType, types.MethodType, functools.partial)
    return hasattr(value, "__dict__") and not isinstance(
        value, (type, types.ModuleType, nn.Module, Tensor, *functions)
    )


def _tensor_restorer(t: Tensor) -> Callable[[], None]:
    data, gradient, wants = t.data, t.grad, t.requires_grad
    kept = data.clone()

    def restore() -> None:
        _put(data, kept)
        t.data = data
        t.grad = gradient
        if t.is_leaf:
            t.requires_grad_(wants)

    return restore


def _put(home: Tensor, value: Tensor) -> None:
    """Write values back; an expanded tensor has one place for many, and nobody wrote to it."""
    if not torch._debug_has_internal_overlap(home):  # pyright: ignore[reportPrivateImportUsage]
        home.copy_(value)
