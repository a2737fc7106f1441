"""The search for what returns a loss, among the methods of an object and what stands beside it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.audit.batches import (
    arguments,
    fresh,
    input_of,
    member,
    required,
    signature_of,
    with_input,
)
from musigma.audit.callables import KL, find, inverts
from musigma.audit.findings import AuditError, name_of
from musigma.audit.outputs import (
    LOSS,
    Picks,
    is_answer,
    loss_functions,
    matches,
    named_outputs,
)
from musigma.audit.sandbox import Sandbox
from musigma.audit.training_loop import STUBBED, leaves, losses, of_users, run_step

__all__ = ["Search", "Users", "Way", "accepts_nothing", "is_loss", "wrapper"]

Users = Literal["loss", "terms", "map"]

STEPS = (
    "training_step", "train_step", "_train_step", "compute_loss", "get_loss", "calculate_loss",
    "calc_loss", "loss", "loss_function", "loss_fn", "vae_loss", "total_loss", "elbo_loss",
    "neg_elbo", "negative_elbo", "nelbo", "nll", "nll_loss", "neg_log_likelihood", "forward_kld",
    "step", "_step", "shared_step", "_shared_step", "train_batch", "training_forward", "elbo",
    "free_energy",
)  # fmt: skip
DENSITIES = ("log_prob", "log_density", "log_likelihood", "logp")
RECONSTRUCTION = (
    "recon_loss", "reconstruction_loss", "rec_loss", "reconst_loss", "reconstruction_error",
)  # fmt: skip
SECONDS = 60.0  # limit of one call
MAXIMIZED = re.compile(r"elbo|bound|log_?(prob|density|lik)|^logp$", re.IGNORECASE)
MINIMIZED = re.compile(r"loss|neg|nll|nelbo|minus", re.IGNORECASE)
LOG_P = re.compile(r"log_?(p|q|prob|z)|prior", re.IGNORECASE)
LOG_DET = re.compile(r"det|jac|ldj|ladj", re.IGNORECASE)
KL_LEFT = re.compile(r"kl|diverg|latent_loss|loss", re.IGNORECASE)
MODEL = re.compile(r"(\w+_)?(model|net|vae|network|flow|module)")
NORMAL = "the loss is minus the mean log-density under a standard normal, supplied here"
SQUARED = "the reconstruction is supplied here: squared errors, summed over each example"


def accepts_nothing(fn: Any) -> bool:
    """Whether a function can be called without arguments."""
    try:
        inspect.signature(fn).bind()
    except (TypeError, ValueError):
        return False
    return not any(p.kind is p.VAR_POSITIONAL for p in signature_of(fn))


def is_loss(value: Any) -> bool:
    """Whether it has a number that requires a gradient, or is such a number for each example."""
    rows = isinstance(value, Tensor) and value.ndim == 1 and value.requires_grad
    return bool(losses(value)) or rows


# --- looking ------------------------------------------------------------------------------------


class Way(NamedTuple):
    """A way to get a loss from a batch.

    `is_loss`: its name says that what it returns is a loss; otherwise, a number among its outputs
    must depend on all parameters that the other outputs depend on. `users`: as in `FoundStep`.
    """

    name: str
    call: Callable[[Any], Any]
    notes: tuple[str, ...] = ()
    is_loss: bool = True
    users: Users = "loss"


def _called(fn: Any, way: Any) -> Callable[[Any], Any]:
    """A function of a batch, by one of the ways to make arguments of it."""

    def call(batch: Any) -> Any:
        args, named = way.of(batch)
        return fn(*args, **named)

    return call


_Term = tuple[str, Callable[..., Any], Picks]
"""A term of a loss: its name, its function, and the arguments."""


class Search:
    """The search for the step of one object, which is restored after each call.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> with Search(lambda x: layer(x).square().sum()) as search:
        ...     way, step = search.look(torch.ones(4, 3))
        >>> step().requires_grad
        True
    """

    def __init__(self, obj: Any):
        kind: str = type(obj).__name__
        self.is_function = inspect.isroutine(obj) or isinstance(obj, functools.partial)
        self.obj, self.kind = obj, name_of(obj) if self.is_function else kind
        first = next(iter(required(obj)), "") if self.is_function else ""
        self.model = _model_beside(obj) if MODEL.fullmatch(first) else None
        self.sandbox = Sandbox(obj, self.model, seconds=SECONDS, as_is=True)
        self.reasons: dict[str, str] = {}
        self.outputs: dict[str, Tensor] = {}
        self.encoded: Any = None

    def __enter__(self) -> Search:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self.sandbox)
        self._stack.enter_context(torch.enable_grad())
        self._undo = self.sandbox.snapshot()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def prepared(self, batch: Any) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """The batch as it is; with its data in the type of the parameters; and flattened."""
        yield batch, ()
        x = input_of(batch)
        wanted = next((p.dtype for p in self.sandbox.trainable() if p.is_floating_point()), None)
        if isinstance(x, Tensor) and wanted not in (None, x.dtype):
            divisor = 255 if x.dtype == torch.uint8 else 1
            note = f"the data are converted from {x.dtype} to {wanted}"
            note += ", and divided by 255" * (divisor > 1)
            yield with_input(batch, lambda x: x.to(wanted) / divisor), (note,)
        if isinstance(x, Tensor) and x.ndim > 2:
            yield with_input(batch, lambda x: x.flatten(1)), ("the data are flattened",)

    def look(self, batch: Any) -> tuple[Way, Callable[[], Any]] | None:
        """The first way that returns a loss, also as a function without arguments."""
        has_loop = of_users(type(self.obj)) and hasattr(self.obj, "__dict__")
        for way in self.ways(batch):
            for in_loop in (False, True) if has_loop and way.is_loss else (False,):
                value = self.run(way, batch, in_loop)
                if value is not None and self.whole(value, way):
                    notes = (*way.notes, *[STUBBED] * in_loop, *self.passed_over(way))
                    return way._replace(notes=notes), self.step(way, batch, in_loop)
                if value is not None:
                    break
        return None

    def step(self, way: Way, batch: Any, in_loop: bool) -> Callable[[], Any]:
        """A way, for copies of one batch."""
        owner = self.obj if self.model is None else self.model
        return functools.partial(run_step, way.call, batch, owner=owner, in_loop=in_loop)

    def run(
        self,
        way: Way,
        batch: Any,
        in_loop: bool = False,
        look: Callable[[Any], Any] = lambda value: value,
    ) -> Any:
        """What `look` finds in what a way returns; None if it raises, with the reason noted."""
        self.sandbox.reseed()
        try:
            return look(self.sandbox.call(way.name, self.step(way, batch, in_loop)))
        except (AuditError, SystemExit) as error:
            told = error.__cause__ or error
            words = " ".join(str(told).split())[:200]
            self.reasons.setdefault(way.name, f"raises {type(told).__name__}: {words}")
            return None
        finally:
            self._undo()

    def whole(self, value: Any, way: Way) -> bool:
        """Whether what a way returned is a loss; otherwise, the reason is noted."""
        numbers, tensors = losses(value), leaves(value)
        if way.is_loss and is_loss(value):
            return True
        if not numbers:
            what = ", ".join(str(tuple(t.shape)) for t in tensors.values())
            graded = any(t.requires_grad for t in tensors.values())
            why = "none is one number" if graded else "nothing requires a gradient"
            what = f"tensors {what}, of which {why}" if what else type(value).__name__
            self.reasons.setdefault(way.name, f"returns {what}")
            return False
        others = [t for name, t in tensors.items() if name not in numbers and t.requires_grad]
        named = any("loss" in name.lower() for name in numbers)
        return named or self.reached(numbers.values()) >= self.reached(others)

    def reached(self, tensors: Any) -> set[int]:
        """The parameters that tensors depend on."""
        total = sum((t.sum() for t in tensors if t.requires_grad), torch.zeros(()))
        if not isinstance(total, Tensor) or not total.requires_grad:
            return set()
        if not (parameters := self.sandbox.trainable()):
            return {-1}  # they are out of sight
        grads = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        return {i for i, grad in enumerate(grads) if grad is not None}

    def passed_over(self, way: Way) -> list[str]:
        """Notes on training steps that were tried before the way that was taken."""
        others = self.failed(lambda name: name in STEPS[:3] and name != _last(way.name))
        return [f"it was not used: {line}" for line in others]

    def ways(self, batch: Any) -> Iterator[Way]:
        """Ways to get a loss from a batch, the likeliest first."""
        obj = self.obj
        if self.is_function:
            yield from self.of_function(batch)
            return
        if not isinstance(obj, Distribution):
            yield from (
                _keras_ways(obj, self.kind, batch) if _is_keras(obj) else self.of_methods(batch)
            )
            if callable(obj):
                yield from self.of_forward(batch)
        yield from self.of_density(batch)
        if callable(encode := member(obj, "encode")):
            for way in arguments(encode, batch):
                first = Way(f"{self.kind}.encode", _called(encode, way), way.notes)
                value = self.run(first, batch)
                if value is not None:
                    self.encoded = value
                    yield from self.of_terms(first, named_outputs(value, encode, "z"), batch, {})

    def of_function(self, batch: Any) -> Iterator[Way]:
        """A function of a batch, or of a model and a batch."""
        notes, given = (), {}
        if self.model is not None:
            first = required(self.obj)[0]
            notes, given = (f"{first} is {name_of(self.model)}()",), {first: self.model}
        is_loss = bool(LOSS.search(self.kind) or "step" in self.kind.lower())
        for way in arguments(self.obj, batch, given):
            yield Way(self.kind, _called(self.obj, way), (*notes, *way.notes), is_loss)

    def of_methods(self, batch: Any) -> Iterator[Way]:
        """Methods that are named as steps or losses, and take a batch."""
        others = [name for name, fn in loss_functions(self.obj) if member(self.obj, name) == fn]
        for name in dict.fromkeys([*STEPS, *others]):
            fn = member(self.obj, name)
            if not inspect.isroutine(fn) or accepts_nothing(fn):
                continue
            for arg in arguments(fn, batch):
                way = Way(f"{self.kind}.{name}", _called(fn, arg), arg.notes)
                if name in STEPS or self.reaches_forward(way, batch):
                    yield self.oriented(way, batch)

    def reaches_forward(self, way: Way, batch: Any) -> bool:
        """Whether a loss depends on all parameters that what forward returns depends on."""

        def reach(value: Any) -> set[int]:
            return self.reached(leaves(value).values())

        own = self.run(way, batch, look=reach)
        for arg in arguments(self.obj, batch) if own and callable(self.obj) else ():
            forward = Way("forward", _called(self.obj, arg))
            return own >= (self.run(forward, batch, look=reach) or set())
        return bool(own)

    def oriented(self, way: Way, batch: Any, unsure: bool = False) -> Way:
        """A way; minus it if it may be a bound and falls where parameters are random."""
        name = way.name.rpartition(".")[2]
        if MINIMIZED.search(name) or not (unsure or MAXIMIZED.search(name)):
            return way

        def total(value: Any) -> float:
            found = losses(value) or leaves(value)
            return float(next(iter(found.values())).detach().mean()) if found else 0.0

        falls = not unsure
        before = self.run(way, batch, look=total)
        for std in (3.0, 1.0, 0.3) if before is not None else ():
            self.sandbox.randomize(std)
            after = self.run(way, batch, look=total)
            if after is not None and math.isfinite(after):
                falls = after < before
                break
        if before is None or not falls:
            return way

        def minus(batch: Any) -> Any:
            value = way.call(batch)
            if isinstance(value, Tensor):
                return -value
            return {name or "value": -t for name, t in leaves(value).items()}

        return way._replace(
            call=minus, notes=(*way.notes, f"{name} is maximized: the loss is minus it")
        )

    def of_density(self, batch: Any) -> Iterator[Way]:
        """Minus the mean of a log-density."""
        for name in DENSITIES:
            fn = member(self.obj, name)
            for way in arguments(fn, batch) if inspect.isroutine(fn) else ():
                call = _called(fn, way)
                note = f"the loss is minus the mean of {name}"

                def minus(batch: Any, call: Callable[[Any], Any] = call) -> Tensor:
                    return -call(batch).mean()

                yield Way(f"{self.kind}.{name}", minus, (*way.notes, note))

    def of_forward(self, batch: Any) -> Iterator[Way]:
        """forward, alone or with functions that take what it returns."""
        for arg in arguments(self.obj, batch):
            way = Way(f"{self.kind}.forward", _called(self.obj, arg), arg.notes, is_loss=False)
            old = {id(t) for t in _left(self.sandbox.modules).values()}
            seen = self.run(way, batch, look=lambda v: (v, _left(self.sandbox.modules)))
            if seen is None:
                continue
            value, left = seen
            if isinstance(value, Distribution):
                yield way._replace(
                    call=lambda batch, call=way.call: (
                        -call(batch).log_prob(input_of(batch)).mean()
                    ),
                    notes=(*arg.notes, "the loss is minus the mean log_prob of what it returns"),
                    is_loss=True,
                )
                continue
            outputs = named_outputs(value, self.obj, "reconstruction")
            self.outputs = self.outputs or outputs
            yield from self.of_flow(way, outputs, batch)
            if self.is_flow(way, outputs, batch):
                continue
            rows = isinstance(value, Tensor) and value.shape == input_of(batch).shape[:1]
            yield self.oriented(way._replace(is_loss=True), batch, True) if rows else way
            for name, fn in loss_functions(self.obj):
                for picks in matches(fn, outputs, batch):
                    yield self.sum_of(way, [(name, fn, picks)])
            left = {name: t for name, t in left.items() if id(t) not in old}
            yield from self.of_terms(way, outputs, batch, left)

    def of_flow(self, way: Way, outputs: Mapping[str, Tensor], batch: Any) -> Iterator[Way]:
        """Losses of z, its log-density and a log-determinant that forward returns."""
        is_flow = self.is_flow(way, outputs, batch)
        log_dets = [name for name in outputs if LOG_DET.search(name)]
        for name, fn in loss_functions(self.obj) if is_flow or log_dets else ():
            if any(LOG_DET.search(parameter) for parameter in required(fn)):
                for picks in matches(fn, outputs, batch):
                    yield self.sum_of(way, [(name, fn, picks)])
        log_ps = [name for name in outputs if LOG_P.search(name) and name not in log_dets]
        if len(log_ps) == len(log_dets) == 1:
            names = [*log_ps, *log_dets]
            at = [list(outputs).index(name) for name in names]

            def loss(batch: Any) -> Any:
                found = list(leaves(way.call(batch)).values())
                return -_sum_of_means(*(found[i] for i in at))

            note = f"the loss is minus the mean of {' + '.join(names)}"
            yield Way(way.name, loss, (*way.notes, note), users="terms")
        elif is_flow:
            yield Way(way.name, _log_density(way.call), (*way.notes, NORMAL), users="map")

    def is_flow(self, way: Way, outputs: Mapping[str, Tensor], batch: Any) -> bool:
        """Whether outputs are z, of as many numbers as the data, and a log-determinant."""
        x, tensors = input_of(batch), list(outputs.values())
        if len(tensors) < 2 or not isinstance(x, Tensor):
            return False
        sizes = [t.numel() for t in tensors]
        if sum(sizes[:-1]) != x.numel() or sizes[-1] not in (1, len(x), x.numel()):
            return False
        if inverts(self.obj) or LOG_DET.search(list(outputs)[-1]):
            return True
        if sizes[-1] != len(x):
            return False
        seed = Way(way.name, lambda batch: (torch.manual_seed(1), way.call(batch))[1])
        again = self.run(seed, batch, look=lambda value: next(iter(leaves(value).values())))
        return again is not None and torch.equal(again, tensors[0])

    # --- losses in parts ------------------------------------------------------------------------

    def of_terms(
        self, way: Way, outputs: Mapping[str, Tensor], batch: Any, left: Mapping[str, Tensor]
    ) -> Iterator[Way]:
        """A reconstruction, and a KL that a function returns or that a call leaves somewhere."""
        kls: list[_Term] = []
        if left:
            kls.append((" + ".join(left), _sum_of_means, _left_in(self.sandbox.modules, left)))
            if self.reached(left.values()) >= self.reached(outputs.values()):
                yield self.sum_of(way, kls)
                return
        graded = {name: t for name, t in outputs.items() if t.requires_grad}
        names = [n for n, t in graded.items() if KL_LEFT.search(n) or t.numel() == 1]
        if not names and len(outputs) == 2:
            names = [n for n, t in graded.items() if t.ndim == 1]
        if names and len(names) < len(outputs):
            kls.append((" + ".join(names), _sum_of_means, _take(outputs, names)))
        if (match := find(self.obj, KL)) is not None:
            kls += [(*match, picks) for picks in matches(match[1], outputs, batch)]
        reconstructions: list[_Term] = []
        if (match := find(self.obj, RECONSTRUCTION)) is not None:
            reconstructions += [(*match, picks) for picks in matches(match[1], outputs, batch)]
        size = getattr(input_of(batch), "numel", lambda: 0)()
        if same := [n for n, t in graded.items() if t.numel() == size and is_answer(n)]:
            reconstructions.append((SQUARED, _squared_error, _take(outputs, same[:1], data=True)))
        for reconstruction, kl in product(reconstructions, kls):
            yield self.sum_of(way, [reconstruction, kl])

    def sum_of(self, way: Way, terms: list[_Term]) -> Way:
        """A way that gives what another returns to functions, and adds what they return."""

        def run(batch: Any) -> Any:
            before, value = fresh(batch), way.call(batch)
            found = []
            for _, fn, picks in terms:
                args, named = picks.of(value, before)
                found.append(fn(*args, **named))
            return found[0] if len(found) == 1 else _sum_of_means(*found)

        notes = [f"{name}({picks.text})" if picks.text else name for name, _, picks in terms]
        if len(terms) > 1:
            notes.append("the sum of both is supplied here, so that the KL's weight is not judged")
        users: Users = "loss" if len(terms) == 1 else "terms"
        return Way(f"{way.name} and {terms[-1][0]}", run, (*way.notes, *notes), users=users)

    def refusal(self) -> str:
        """Why nothing was found."""
        what = "it is neither a flow, nor a density, nor a VAE with a sampler and a KL"
        if self.is_function:
            what += "; a function that makes a model must take no arguments"
        tried = [f"\n  {line}" for line in self.failed(lambda name: True)[:8]]
        return f"{self.kind}: nothing in it returns a loss, and {what}{''.join(tried)}"

    def failed(self, which: Callable[[str], Any]) -> list[str]:
        """What was tried and why it is no step, by its last name."""
        reasons = self.reasons.items()
        return [f"{name} {reason}" for name, reason in reasons if which(_last(name))]

    def failed_losses(self) -> list[str]:
        """The methods of the object that are named as losses, and why they are no step."""
        own = {name for name in dir(self.obj) if name in STEPS or LOSS.search(name)}
        return self.failed(own.__contains__)


def _last(name: str) -> str:
    return re.split(r"[. ]", name)[-1]


def wrapper(search: Search) -> str:
    """A step factory for the object of a search, filled in with the names that were seen."""
    obj, kind = search.obj, search.kind
    setup = ["batch = ...  # as your data loader gives it"]
    if type(obj).__module__ == "builtins" and not search.is_function:
        setup.insert(0, "model = ...")
    elif not search.is_function:
        needed = ", ".join(f"{name}=..." for name in required(type(obj)))
        setup.insert(0, f"model = {kind}({needed})")
    methods = [name for name in STEPS if inspect.isroutine(member(obj, name))]
    beside = list(loss_functions(obj))
    names = [re.sub(r"\W", "_", name) for name in search.outputs]
    names[:1] = [re.sub("output_1", "recon", name) for name in names[:1]]
    if search.is_function:
        body = [f"return {kind}({', '.join(required(obj))})  # one number"]
    elif hasattr(search.encoded, "latent_dist"):
        body = [
            "posterior = model.encode(batch).latent_dist",
            "recon = model.decode(posterior.sample()).sample",
            "return ((recon - batch) ** 2).sum() + posterior.kl().sum()",
        ]
    elif methods:
        given = ", ".join(required(getattr(obj, methods[0]))) or "batch"
        body = [f"return model.{methods[0]}({given})  # one number that requires a gradient"]
    elif names and beside:
        name, fn = beside[0]
        owner = "" if inspect.isfunction(fn) else "model."
        body = [f"{', '.join(names)} = model(batch)",
                f"return {owner}{name}({', '.join(required(fn))})"]  # fmt: skip
    elif names:
        body = [
            f"{', '.join(names)} = model(batch)",
            f"kl = ...  # of {', '.join(names[1:]) or 'mean and scale of z'}, summed",
            f"return (({names[0]} - batch) ** 2).sum() + kl",
        ]
    else:
        body = ["outputs = model(batch)", "return ...  # the loss, one number"]
    lines = [*setup, "", "def step():", *(f"    {line}" for line in body), "", "return step"]
    code = "\n".join(f"    {line}".rstrip() for line in lines)
    return f"def make_step():\n{code}\n\nmusigma audit {_file_of(obj)}:make_step"


def _file_of(obj: Any) -> str:
    """The name of the file that defines an object, if it is not a library's."""
    try:
        path = inspect.getsourcefile(obj if inspect.isroutine(obj) else type(obj)) or ""
    except TypeError:
        path = ""
    is_own = path and "site-packages" not in path and of_users(type(obj))
    return Path(path).name if is_own else "model.py"


def _sum_of_means(*values: Any) -> Any:
    """The sum of terms; of each, the mean over examples of the sum over the rest."""
    tensors = [next(iter(leaves(value).values())) for value in values]
    return sum(t.flatten(1).sum(1).mean() if t.ndim > 1 else t.mean() for t in tensors)


def _left(modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The KLs and losses that modules hold as attributes, by their paths."""
    return {
        f"{path or type(m).__name__}.{name}": value
        for root in modules
        for path, m in root.named_modules()
        for name, value in vars(m).items()
        if isinstance(value, Tensor) and value.grad_fn is not None and KL_LEFT.search(name)
    }


def _left_in(modules: list[nn.Module], wanted: Iterable[str]) -> Picks:
    """What modules are left with, as arguments."""
    names = list(wanted)

    def of(value: Any, batch: Any) -> tuple[list[Any], dict[str, Any]]:
        found = _left(modules)
        return [found[name] for name in names], {}

    return Picks("", of)


def _take(outputs: Iterable[str], names: Iterable[str], data: bool = False) -> Picks:
    """Some of the outputs as arguments, and the data after them."""
    order = list(outputs)
    at = [order.index(name) for name in names]

    def of(value: Any, batch: Any) -> tuple[list[Any], dict[str, Any]]:
        found = list(leaves(value).values())
        return [*(found[i] for i in at), *[input_of(batch)] * data], {}

    return Picks("", of)


def _squared_error(answer: Tensor, x: Tensor) -> Tensor:
    return (answer.reshape(x.shape) - x).square().flatten(1).sum(1).mean()


def _log_density(call: Callable[[Any], Any]) -> Callable[[Any], Tensor]:
    """Minus the mean log-density under a standard normal of what forward maps to (z, log_det)."""

    def loss(batch: Any) -> Tensor:
        *z, log_det = leaves(call(batch)).values()
        flat = torch.cat([part.flatten(1) for part in z], 1)
        if log_det.ndim > 1:
            log_det = log_det.flatten(1).sum(1)
        log_z = -0.5 * (flat.square() + math.log(2 * math.pi)).sum(1)
        return -(log_z + log_det).mean()

    return loss


def _model_beside(fn: Any) -> nn.Module | None:
    """A module in the globals of a function, or the largest that a class there makes."""
    there = list(getattr(fn, "__globals__", {}).values())
    own = [c for c in there if inspect.isclass(c) and c.__module__ == fn.__module__]
    kinds = [c for c in own if issubclass(c, nn.Module) and not required(c)]
    modules = [thing for thing in there if isinstance(thing, nn.Module)]
    if not modules:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            modules = [kind() for kind in kinds]
    return max(modules, key=lambda m: len(list(m.modules())), default=None)


def _is_keras(obj: Any) -> bool:
    is_keras = any(cls.__module__.startswith("keras.") for cls in type(obj).__mro__)
    return is_keras and hasattr(obj, "compute_loss")


def _keras_ways(model: Any, kind: str, batch: Any) -> Iterator[Way]:
    """Keras 3: a train_step of one's own, or the losses of `compile` and `add_loss`."""
    x = input_of(batch)
    if any("train_step" in vars(cls) and of_users(cls) for cls in type(model).__mro__):
        for note, form in {
            "": lambda batch: batch,
            "train_step is given (x,)": lambda batch: (input_of(batch),),
            "train_step is given (x, x)": lambda batch: (input_of(batch),) * 2,
        }.items():

            def step(batch: Any, form: Callable[[Any], Any] = form) -> Any:
                return model.train_step(form(batch))

            yield Way(f"{kind}.train_step", step, (note,) if note else ())

    def answer(batch: Any) -> Any:
        return model(input_of(batch), training=True)

    def compiled(batch: Any) -> Any:
        x = input_of(batch)
        return model.compute_loss(x=x, y=x, y_pred=answer(batch), training=True)

    def added(batch: Any) -> Any:
        error = _squared_error(next(iter(leaves(answer(batch)).values())), input_of(batch))
        return error + sum(model.losses)

    if getattr(model, "loss", None):
        yield Way(f"{kind}.compute_loss", compiled, ("the data are their own target",))
    if isinstance(x, Tensor):
        note = "the loss is that of add_loss, which is not weighted here"
        yield Way(f"{kind}.losses", added, (SQUARED, note), users="terms")
