"""Other people's flows, as functions of tensors: x to (z, log-determinant), and back.

Every code base has its own way to write a bijection: a module with `inverse` or `reverse`, a
keyword that turns `forward` round, a pair of functions, a `torch.distributions.Transform`, a list
of layers; latents as one tensor or as one for each scale; a log-determinant that comes second,
first, or is accumulated from an argument. `Map` makes one thing of them.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from musigma.audit.findings import AuditError
from musigma.audit.probes import Guest
from musigma.model import Bijection, Chain

__all__ = ["Image", "Map", "Visit", "flatten", "inverse_of", "log_det_of", "visits"]

INVERSES = ("inverse", "reverse", "backward", "invert", "inv", "inverse_transform", "_inverse")
TURNS = ("reverse", "rev", "inverse", "invert", "inv")
TOTALS = ("logdet", "log_det", "ldj", "sldj", "logdets", "log_dets", "objective", "log_det_jac")
MODES = {"direct": "inverse", "forward": "inverse", "encode": "decode"}


def flatten(tree: Any) -> Tensor:
    """All numbers of an example, of all tensors of a structure: (B, D)."""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in _leaves(tree)], 1)


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _leaves(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from _leaves(part)


def _numbers(tree: Any) -> int:
    return sum(leaf.numel() for leaf in _leaves(tree))


def _copied(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, (tuple, list)):
        return type(tree)(_copied(part) for part in tree)
    return {k: _copied(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


class Image:
    """What a flow makes of a batch.

    Attributes:
        tree: The latents, as they came.
        raw: The log-determinant, as it came; None if there was none.
    """

    def __init__(self, tree: Any, raw: Any):
        self.tree, self.raw = tree, raw

    @property
    def flat(self) -> Tensor:
        """The latents, (B, D)."""
        return flatten(self.tree)


def log_det_of(raw: Any, rows: int) -> tuple[Tensor, str]:
    """A log-determinant as numbers (B,), and what it was.

    Returns:
        The numbers in float64, and "example": one each; "number": a tensor of one for all;
        "literal": a number of Python; "elements": many for each example, here summed; "other":
        anything else, here summed for all.
    """
    value = torch.as_tensor(raw).detach().double()
    if not isinstance(raw, Tensor):
        return value.expand(rows), "literal"
    if value.ndim and value.shape[0] == rows and value.numel() == rows:
        return value.reshape(rows), "example"
    if value.numel() == 1:
        return value.reshape(1).expand(rows), "number"
    if value.ndim > 1 and value.shape[0] == rows:
        return value.reshape(rows, -1).sum(1), "elements"
    return value.sum().expand(rows), "other"


def _read(value: Any, x: Tensor, name: str, notes: list[str]) -> Image:
    """An answer as latents and log-determinant."""
    if isinstance(value, Tensor):
        return Image(value, None)
    if isinstance(value, dict):
        keys = {
            k.lower().replace("_", "").replace(" ", ""): k for k in value if isinstance(k, str)
        }
        dets = [k for s, k in keys.items() if "det" in s or s in ("ldj", "ladj", "logjac")]
        rest = [k for k in value if k not in dets]
        if rest:
            return Image(value[rest[0]], value[dets[0]] if dets else None)
    if not isinstance(value, (tuple, list)) or not value:
        raise AuditError(f"{name}: expected (z, log_det); got {type(value).__name__}")
    first, *others = value
    wanted = x.numel()
    if len(value) == 1:
        return Image(first, None)
    if len(value) == 2 and _numbers(first) != wanted and _numbers(others[0]) == wanted:
        notes.append(f"{name} returns the log-determinant first")
        return Image(others[0], first)
    if len(value) > 2:
        notes.append(f"of {len(value)} answers of {name}, the first is z and the last the log-det")
    if isinstance(first, (tuple, list)) and _numbers(first) > wanted:
        parts = [part for part in first if _numbers(part) == wanted]
        if parts:
            notes.append(f"{name} returns all intermediate values; the last is z")
            first = parts[-1]
    if not list(_leaves(first)):
        raise AuditError(f"{name}: expected (z, log_det); the first is {type(first).__name__}")
    raw = others[-1]
    if isinstance(raw, (tuple, list)):
        raw = raw[0] if len(raw) == 1 else None
    if isinstance(raw, bool) or not isinstance(raw, (Tensor, int, float)):
        raw = None
    return Image(first, raw)


def inverse_of(owner: Any) -> Callable[..., Any] | None:
    """The other direction of a module: a method, or its forward turned round by a keyword."""
    for name in INVERSES:
        method = getattr(owner, name, None)
        if callable(method) and not isinstance(method, nn.Module):
            return method
    call = owner.forward if isinstance(owner, nn.Module) else owner
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return None
    for name in TURNS:
        if name in parameters and parameters[name].default in (False, True, None):
            return functools.partial(owner, **{name: not parameters[name].default})
    if "mode" in parameters and parameters["mode"].default in MODES:
        return functools.partial(owner, mode=MODES[parameters["mode"].default])
    return None


def _counting(call: Any) -> Any:
    """A callable that adds to a log-determinant is given one of zero, where it must be."""
    target = call.func if isinstance(call, functools.partial) else call
    try:
        parameters = inspect.signature(
            target.forward if isinstance(target, nn.Module) else target
        ).parameters
    except (TypeError, ValueError):
        return call
    for name in TOTALS:
        if name in parameters and parameters[name].default in (None, inspect.Parameter.empty):
            return lambda x: call(x, **{name: torch.zeros(len(x))})
    return call


class Map:
    """A flow, whoever wrote it.

    Args:
        guest: What calls it.
        forward: x to (z, log_det); a module, a transform, or a sequence of layers.
        inverse: z to x, or to (x, log_det); None: looked for on `forward`.

    Raises:
        AuditError: If `forward` cannot be called.
    """

    def __init__(self, guest: Guest, forward: Any, inverse: Any = None):
        self.guest, self.notes = guest, []
        self.elementwise = False  # a log-determinant for each element is this kind's convention
        self.listed = False
        if isinstance(forward, Chain):
            if not all(isinstance(layer, Bijection) for layer in forward.layers):
                raise AuditError(
                    "forward: this chain draws or factors out variables; audit_model looks at "
                    "whole models"
                )
            forward = list(forward.layers)
        layered = type(forward) is nn.Sequential or isinstance(
            forward, (nn.ModuleList, list, tuple)
        )
        if layered:
            layers = list(forward)
            self._forward = functools.partial(_through, [_caller(layer) for layer in layers], self)
            backs = [back for layer in reversed(layers) if (back := _back(layer)) is not None]
            if inverse is None and len(backs) == len(layers):
                inverse = functools.partial(_through, backs, self)
        elif isinstance(forward, Transform):
            self.elementwise = True
            self._forward = _caller(forward)
            inverse = _back(forward) if inverse is None else inverse
        elif callable(forward):
            owner: Any = forward
            if isinstance(forward, types.MethodType) and forward.__name__ == "forward":
                owner = forward.__self__
            if inverse is None and (isinstance(owner, nn.Module) or owner is not forward):
                inverse = inverse_of(owner)
                if inverse is not None:
                    self.notes.append(f"the inverse is {_name(inverse)}")
                if isinstance(inverse, functools.partial):  # forward may be turned round itself
                    turned = {k: v for k, v in inverse.keywords.items() if v is False}
                    if turned:
                        forward = functools.partial(owner, **{k: False for k in turned})
                        inverse = functools.partial(owner, **{k: True for k in turned})
            self._forward = _counting(forward)
        else:
            raise AuditError(f"forward: expected a callable; got {type(forward).__name__}")
        if isinstance(inverse, Transform):
            inverse = _caller(inverse)
        self._inverse = None if inverse is None else _counting(inverse)

    @property
    def invertible(self) -> bool:
        """Whether there is anything to call for the other direction."""
        return self._inverse is not None

    def give_up_inverse(self) -> None:
        """Go on with one direction."""
        self._inverse = None

    def forward(self, x: Tensor) -> Image:
        """What the flow makes of x.

        Raises:
            AuditError: If it raises, or returns what is no (z, log_det).
        """
        try:
            value = self.guest.call("forward", self._forward, [x] if self.listed else x)
        except AuditError:
            if self.listed or isinstance(self._forward, functools.partial):
                raise
            value = self.guest.call("forward", self._forward, x.clone())
        return _rows_checked(_read(value, x, "forward", []), x, "forward")

    def inverse(self, tree: Any, x: Tensor) -> tuple[Tensor, Any]:
        """What the inverse makes of latents, with the log-determinant that it states or None.

        Raises:
            AuditError: If it raises, or returns something else than an x of the shape given.
        """
        if self._inverse is None:
            raise AuditError("inverse: there is none")
        given = _copied(tree)  # a copy: caches that know a tensor again do not count
        image = _read(self.guest.call("inverse", self._inverse, given), x, "inverse", [])
        flat = _rows_checked(image, x, "inverse").flat
        if flat.numel() != x.numel():
            raise AuditError(
                f"inverse: given what forward returned for {tuple(x.shape)}, it returns "
                f"{tuple(flat.shape)} numbers"
            )
        raw = image.raw
        if raw is not None and not torch.as_tensor(raw).any():
            raw = None  # what was given is passed through: nothing is stated
        return flat.detach().reshape(x.shape), raw

    def find_form(self, x: Tensor) -> Image:
        """The first call: finds out how this flow wants to be given its x.

        Raises:
            AuditError: If it takes x neither as a tensor nor in a list.
        """
        try:
            value = self.guest.call("forward", self._forward, x.clone())
        except AuditError as error:
            try:
                value = self.guest.call("forward", self._forward, [x.clone()])
            except AuditError:
                raise error from error.__cause__
            self.listed = True
        return _rows_checked(_read(value, x, "forward", self.notes), x, "forward")


def _rows_checked(image: Image, x: Tensor, name: str) -> Image:
    for part in _leaves(image.tree):
        if part.ndim == 0 or len(part) != len(x):
            raise AuditError(
                f"{name}: given {tuple(x.shape)}, it returns {tuple(part.shape)}; expected "
                f"{len(x)} examples"
            )
    return image


def _name(call: Any) -> str:
    if isinstance(call, functools.partial):
        return f"forward with {', '.join(f'{k}={v!r}' for k, v in call.keywords.items())}"
    return getattr(call, "__name__", type(call).__name__)


def _caller(layer: Any) -> Callable[..., Any]:
    if isinstance(layer, Transform):
        return functools.partial(_transform, layer)
    return layer


def _transform(transform: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def _back(layer: Any) -> Callable[..., Any] | None:
    if isinstance(layer, Transform):
        return functools.partial(_transform, layer.inv)
    return inverse_of(layer)


def _through(calls: Sequence[Callable[..., Any]], whole: Map, x: Any) -> tuple[Any, Any]:
    """One call after another; the log-determinants are added up, where all state one."""
    total: Any = None
    stated = True
    for call in calls:
        rows = len(next(_leaves(x)))
        image = _read(call(x), x if isinstance(x, Tensor) else flatten(x), "a layer", [])
        x = image.tree
        if image.raw is None:
            stated = False
        else:
            value = torch.as_tensor(image.raw)
            if value.ndim > 1 and value.shape[0] == rows:
                value = value.reshape(rows, -1).sum(1)
            total = value if total is None else total + value
    return x, total if stated else None


class Visit:
    """A layer inside a flow, and what it was given in a pass.

    Attributes:
        name: Its name in the flow.
        module: The layer.
        x: What it was given, (B, ...).
    """

    def __init__(self, name: str, module: nn.Module, x: Tensor, args: tuple, kwargs: dict):
        self.name, self.module, self.x, self.args, self.kwargs = name, module, x, args, kwargs
        self.z, self.log_det = x, torch.zeros(())

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer alone, without what was accumulated before it."""
        args = tuple(_zeroed(a, len(self.x)) for a in self.args)
        kwargs = {k: _zeroed(v, len(self.x)) for k, v in self.kwargs.items()}
        image = _read(self.module(x, *args, **kwargs), x, self.name, [])
        return image.tree, image.raw

    @property
    def back(self) -> Callable[..., Any] | None:
        """The layer's inverse, if it is simple to call."""
        return None if self.args or self.kwargs else inverse_of(self.module)


def _zeroed(value: Any, rows: int) -> Any:
    """An accumulated log-determinant starts anew; anything else is given again."""
    if isinstance(value, Tensor) and (value.ndim == 0 or value.shape == (rows,)):
        return torch.zeros_like(value)
    return value


def visits(flow: Map, modules: Sequence[nn.Module], x: Tensor) -> list[Visit]:
    """The innermost layers that return (z, log_det) while a flow is called, in their order."""
    seen: list[Visit] = []
    names = {m: name for root in modules for name, m in root.named_modules()}
    hooks = []

    def leave(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if not args or not isinstance(args[0], Tensor) or len(args[0]) != len(x):
            return
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            return
        (z, raw), given = out, args[0]
        if not (isinstance(z, Tensor) and isinstance(raw, Tensor)) or z.numel() != given.numel():
            return
        if raw.numel() not in (1, len(given)) or (raw.shape == z.shape and len(given) > 1):
            return
        inside = set(module.modules())
        if any(visit.module in inside and visit.module is not module for visit in seen):
            return  # its parts were seen
        before = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, Tensor)]
        before = [a for a in before if a.ndim == 0 or a.shape == (len(given),)]
        name = f"{names.get(module) or 'flow'} ({type(module).__name__})"
        visit = Visit(name, module, given.detach(), args[1:], kwargs)
        visit.z = z.detach()
        visit.log_det = raw.detach() - (before[0].detach() if before else 0.0)
        seen.append(visit)

    for module in names:
        hooks.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        flow.forward(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
