"""A step outside its training loop: what it calls backward on, and stubs of the loop."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.audit.batches import Stub, fresh, named_parts

__all__ = ["STUBBED", "leaves", "losses", "of_users", "replaced", "run_step"]

LOOP = (
    "log", "log_dict", "logger", "trainer", "optimizers", "lr_schedulers", "toggle_optimizer",
    "untoggle_optimizer", "clip_gradients", "current_epoch", "global_step", "manual_backward",
    "device",
)  # fmt: skip
STUBBED = "what a training loop gives (self.log, self.trainer, self.current_epoch) is a stub: 1"
LIBRARIES = ("torch", "builtins", "lightning", "pytorch_lightning", "lightning_fabric", "keras")


def leaves(value: Any, depth: int = 2) -> dict[str, Tensor]:
    """The tensors in what was returned, by their names or positions; "" if it is one.

    Example:
        >>> leaves({"loss": torch.zeros(()), "parts": (torch.ones(2), 3)})
        {'loss': tensor(0.), 'parts.0': tensor([1., 1.])}
    """
    if isinstance(value, Tensor):
        return {"": value}
    found: dict[str, Tensor] = {}
    if depth and not isinstance(value, (nn.Module, Distribution, str, bytes)):
        for name, part in named_parts(value).items():
            for inner, leaf in leaves(part, depth - 1).items():
                found[f"{name}.{inner}".rstrip(".")] = leaf
    return found


def losses(value: Any) -> dict[str, Tensor]:
    """The single numbers in what was returned that require a gradient."""
    return {n: t for n, t in leaves(value).items() if t.requires_grad and t.numel() == 1}


def of_users(cls: type) -> bool:
    """Whether a class is not one of torch, Lightning or Keras."""
    return cls.__module__.split(".")[0] not in LIBRARIES


def run_step(
    call: Callable[..., Any], *batch: Any, owner: Any = None, in_loop: bool = False
) -> Any:
    """What a step returns for a copy of the batch.

    A step that calls backward itself, and returns no loss, gives what it called backward on.
    Optimizers change nothing meanwhile.

    Args:
        call: The step.
        *batch: Its batch, or nothing.
        owner: The object whose step it is.
        in_loop: Whether the object gets stubs of its training loop, such as `self.log`.
    """
    with _training_loop(owner if in_loop else None), _optimizers_at_rest(), _backward() as found:
        value = call(*[fresh(each) for each in batch])
    if found and not losses(value):
        return found[0] if len(found) == 1 else tuple(found)
    return value


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a class or an object with another value."""
    has, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if has:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def _backward() -> Iterator[list[Tensor]]:
    """The tensors on which backward is called."""
    found: list[Tensor] = []
    original = Tensor.backward

    @functools.wraps(original)
    def backward(self: Tensor, *args: Any, **how: Any) -> None:
        found.append(self)
        if len(args) < 2:  # the graph is read afterwards
            how["retain_graph"] = True
        original(self, *args, **how)

    with replaced(Tensor, "backward", backward):
        yield found


@contextlib.contextmanager
def _optimizers_at_rest() -> Iterator[None]:
    """All optimizers of torch and Keras change nothing; a closure is called."""

    def step(_self: Any, closure: Any = None, *_more: Any) -> Any:
        return closure() if callable(closure) else None

    kinds: list[type] = []
    todo: list[type] = [torch.optim.Optimizer]
    while todo:
        kinds.append(kind := todo.pop())
        todo += kind.__subclasses__()
    if keras := sys.modules.get("keras"):
        kinds += keras.optimizers.Optimizer.__mro__
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            for name in ("step", "apply"):
                if name in vars(kind):
                    stack.enter_context(replaced(kind, name, step))
        yield


@contextlib.contextmanager
def _training_loop(obj: Any) -> Iterator[None]:
    """An object with stubs of what its training loop gives; None is left alone."""
    if obj is None:
        yield
        return
    kind = type(obj)
    own = {n for cls in kind.__mro__ if of_users(cls) for n in vars(cls)} | set(vars(obj))
    stubs: dict[str, Any] = dict.fromkeys((name for name in LOOP if name not in own), Stub(1))
    if "manual_backward" in stubs:
        stubs["manual_backward"] = lambda self, loss, *args, **how: loss.backward(*args, **how)
    if "device" in stubs:
        parameters = obj.parameters() if isinstance(obj, nn.Module) else ()
        stubs["device"] = next((p.device for p in parameters), torch.device("cpu"))
    stubbed: Any = type(kind.__name__, (kind,), {**stubs, "__module__": kind.__module__})
    obj.__class__ = stubbed
    try:
        yield
    finally:
        obj.__class__ = kind
