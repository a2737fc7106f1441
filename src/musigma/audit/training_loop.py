"""A step outside its training loop: what it calls backward on, and stubs of the loop."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from musigma.audit.batches import Stub, fresh

__all__ = ["STUBBED", "of_users", "run_step"]

LOOP = (
    "log", "log_dict", "logger", "trainer", "optimizers", "lr_schedulers", "toggle_optimizer",
    "untoggle_optimizer", "clip_gradients", "current_epoch", "global_step",
)  # fmt: skip
STUBBED = "what a training loop gives (self.log, self.trainer, self.current_epoch) is a stub: 1"
LIBRARIES = (
    "torch", "builtins", "abc", "typing", "lightning", "pytorch_lightning", "lightning_fabric",
    "keras",
)  # fmt: skip


def of_users(cls: type) -> bool:
    """Whether a class is not one of the libraries."""
    return cls.__module__.split(".")[0] not in LIBRARIES


def run_step(call: Callable[..., Any], *batch: Any, in_loop_of: Any = None) -> Any:
    """What a step returns for a copy of the batch, or what it calls backward on.

    Optimizers change nothing meanwhile.

    Args:
        call: The step.
        *batch: Its batch, or nothing.
        in_loop_of: The object that gets stubs of its training loop, such as `self.log`.
    """
    loop = _training_loop(in_loop_of) if in_loop_of is not None else contextlib.nullcontext()
    with loop, _optimizers_at_rest(), _backward() as found:
        value = call(*[fresh(each) for each in batch])
    if len(found) > 1:
        return tuple(found)
    return found[0] if found else value


@contextlib.contextmanager
def _backward() -> Iterator[list[Tensor]]:
    """The tensors on which backward is called."""
    found: list[Tensor] = []
    original = torch.autograd.backward

    def backward(tensors: Any, grad: Any = None, retain: Any = None, *more: Any, **how: Any):
        found.extend([tensors] if isinstance(tensors, Tensor) else tensors)
        how.pop("retain_graph", None)
        original(tensors, grad, True, *more, **how)  # the graph is read afterwards

    with mock.patch.object(torch.autograd, "backward", backward):
        yield found


@contextlib.contextmanager
def _optimizers_at_rest() -> Iterator[None]:
    """All optimizers of torch and Keras change nothing; a closure is called."""

    def hook(optimizer: Any, args: tuple[Any, ...], how: dict[str, Any]) -> Any:
        def without_gradients(closure: Any = lambda: None) -> Any:
            value = closure()
            torch.optim.Optimizer.zero_grad(optimizer)
            return value

        without_gradients()
        closures = filter(callable, [*args[1:], *how.values()])
        given = [functools.partial(without_gradients, closure) for closure in closures]
        return ((optimizer, *given), {}) if given else None

    handle = register_optimizer_step_pre_hook(hook)
    with contextlib.ExitStack() as stack:
        stack.callback(handle.remove)
        if (keras := sys.modules.get("keras")) is not None:
            stack.enter_context(mock.patch.object(keras.optimizers.Optimizer, "apply"))
        yield


@contextlib.contextmanager
def _training_loop(obj: Any) -> Iterator[None]:
    """An object with stubs of what its training loop gives."""
    kind: Any = type(obj)
    own = {n for cls in kind.__mro__ if of_users(cls) for n in vars(cls)} | set(vars(obj))
    parameters = obj.parameters() if isinstance(obj, nn.Module) else ()
    stubs: dict[str, Any] = dict.fromkeys(LOOP, Stub(1)) | {
        "manual_backward": lambda self, loss, *args, **how: loss.backward(*args, **how),
        "device": next((p.device for p in parameters), torch.device("cpu")),
    }
    missing = {name: stub for name, stub in stubs.items() if name not in own}
    obj.__class__ = type(kind.__name__, (kind,), {**missing, "__module__": kind.__module__})
    try:
        yield
    finally:
        obj.__class__ = kind
