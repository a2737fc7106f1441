"""The search for what returns a loss, among the methods of an object and what stands beside it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.audit.batches import (
    THE_OUTPUTS,
    Bound,
    bindings,
    forms,
    fresh,
    input_of,
    leaves,
    losses,
    meaning,
    member,
    named_outputs,
    required,
    signature_of,
)
from musigma.audit.findings import AuditError, name_of
from musigma.audit.sandbox import Sandbox, TooSlowError
from musigma.audit.training_loop import STUBBED, of_users, run_step

__all__ = [
    "Search", "Users", "accepts_nothing", "functions", "is_loss", "is_routine",
    "methods", "model_beside",
]  # fmt: skip

Users = Literal["loss", "terms", "map"]

FUNCTIONS = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "training": r"_?train(ing)?_step",
        "loss": r"((compute|get|calc(ulate)?|vae|total|elbo|nll)_)?(loss|objective)|"
        r"loss_(function|fn)|neg(ative)?_(elbo|log_likelihood)|nelbo|nll|forward_kld",
        "step": r"_?(shared_)?step|train_batch|training_forward",
        "bound": r"elbo|free_energy",
        "any loss": r"(?!__|.*(kl|rec|bce|mse|mmd|adv|disc|perc|gan|valid|test|eval|track|metric|"
        r"weight|hist|name))(.*(loss|elbo|criterion|objective).*|nll.*)",
        "density": r"log_?(prob|density|likelihood)s?|logp",
        "reconstruction": r"rec(on|onst|onstruction)?_(loss|error)",
        "kl": r"(compute_)?kl_?(d|div|divergence|loss|term)?(_loss)?|latent_loss|loss_kld?",
        "encode": r"encoder?|inference|recognition(_model)?",
        "sample": r"reparam(etri[sz])?(e|ation)?|reparameteri[sz](e|ation)|sample(r|_z|_latent)?|"
        r"sampling",
        "generate": r"sample_prior(_z)?|prior_sample|generate_z",
        "inverse": r"inverse|reverse|invert|inverse_transform|inv",
    }.items()
}
STEPS = ("training", "loss", "step", "bound")  # what they return is a loss
MAXIMIZED = re.compile(
    r"(?!.*(loss|neg|nll|nelbo|minus)).*(elbo|bound|log_?(prob|dens|lik)).*|logp"
)
KL_LEFT = re.compile(r"kl|diverg|latent_loss|loss", re.IGNORECASE)
NORMAL = "the loss is minus the mean log-density under a standard normal, supplied here"
SQUARED = "the reconstruction is supplied here: squared errors, summed over each example"
WRAPPER = """\
def make_step():
    {model}batch = ...  # as your data loader gives it

    def step():
        {body}

    return step

musigma audit {file}:make_step"""
OF_LATENT_DIST = [
    "posterior = model.encode(batch).latent_dist",
    "recon = model.decode(posterior.sample()).sample",
    "return ((recon - batch) ** 2).sum() + posterior.kl().sum()",
]


# --- functions of an object ---------------------------------------------------------------------


def is_routine(obj: Any) -> bool:
    """Whether it is a function or a method, maybe with some arguments."""
    return inspect.isroutine(obj) or isinstance(obj, functools.partial)


def accepts_nothing(fn: Any) -> bool:
    """Whether a function can be called without arguments."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters)


def methods(obj: Any, *kinds: str) -> Iterator[tuple[str, Any]]:
    """The callables of an object that `FUNCTIONS` names as one of some kinds, in their order."""
    for name in (name for what in kinds for name in dir(obj) if _is(name, what)):
        fn = member(obj, name)
        if callable(fn) and not type(fn).__module__.startswith("torch."):
            yield name, fn


def functions(obj: Any, what: str) -> Iterator[tuple[str, Any]]:
    """As `methods`; then functions, and modules of a loss, beside the class of an object."""
    yield from methods(obj, what)
    beside: dict[str, Any] = {}
    for cls in filter(of_users, reversed(type(obj).__mro__)):
        beside |= getattr(sys.modules.get(cls.__module__), "__dict__", {})
    for name, thing in beside.items():
        if not _is(name, what):
            continue
        if inspect.isfunction(thing) and signature_of(thing).parameters:
            yield name, thing
        is_module = inspect.isclass(thing) and issubclass(thing, nn.Module) and of_users(thing)
        if is_module and what == "any loss" and not required(thing):
            yield name, thing()


def _is(name: str, *kinds: str) -> bool:
    return any(FUNCTIONS[kind].fullmatch(name) for kind in kinds)


def is_loss(value: Any) -> bool:
    """Whether it has a number that requires a gradient, or is such a number for each example."""
    rows = isinstance(value, Tensor) and value.ndim == 1 and value.requires_grad
    return bool(losses(value)) or rows


# --- looking ------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """What may return a loss for a batch.

    `is_step`: its name says that what it returns is a loss; otherwise, a number that it returns
    must depend on all parameters that its other outputs depend on.
    `users`: as in `FoundStep`.
    """

    name: str
    call: Callable[[Any], Any]
    notes: tuple[str, ...] = ()
    is_step: bool = True
    users: Users = "loss"
    in_loop: bool = False

    def then(
        self, change: Callable[[Any, Any], Any], *notes: str, to: str = "", users: Users = "loss"
    ) -> Candidate:
        """A function of the batch and of what this returns."""

        def call(batch: Any) -> Any:
            before = fresh(batch)
            return change(before, self.call(batch))

        name, notes = self.name + to, (*self.notes, *notes)
        return self._replace(name=name, call=call, notes=notes, is_step=True, users=users)


class Term(NamedTuple):
    """A term of a loss: a function of the batch, and of what forward returned for it."""

    text: str
    call: Callable[[Any, Any], Any]


class Search:
    """The search for the step of one object, which is restored after each call.

    Args:
        obj: The object.
        sandbox: Restores it.
        model: What a function takes as its first argument.
    """

    def __init__(self, obj: Any, sandbox: Sandbox, model: nn.Module | None = None):
        self.obj, self.sandbox, self.model = obj, sandbox, model
        self.kind = name_of(obj) if is_routine(obj) else type(obj).__name__
        self.undo = sandbox.snapshot()
        self.is_given, self.reasons, self.slow = True, dict[str, str](), set[str]()
        self.outputs: dict[str, Tensor] = {}
        self.encoded: Any = None

    def look(self, batch: Any) -> tuple[Candidate, Callable[[], Any]] | None:
        """The first candidate that returns a loss, also as a function without arguments."""
        has_loop = of_users(type(self.obj)) and hasattr(self.obj, "__dict__")
        types = (p.dtype for p in self.sandbox.trainable() if p.is_floating_point())
        for prepared, note in forms(batch, next(types, None)):
            self.is_given = not note
            for found in self.candidates(prepared):
                if found.name in self.slow:
                    continue
                value = self.run(found, prepared)
                if value is None and found.is_step and has_loop:
                    found = found._replace(in_loop=True, notes=(*found.notes, STUBBED))
                    value = self.run(found, prepared)
                if value is not None and self.is_whole(value, found):
                    found = self.oriented(found, prepared, value)
                    notes = [*note, *found.notes, *self.passed_over(found)]
                    return found._replace(notes=tuple(notes)), self.step(found, prepared)
        return None

    def step(self, of: Candidate, batch: Any) -> Callable[[], Any]:
        """A candidate, for copies of one batch."""
        owner = self.obj if of.in_loop else None
        return functools.partial(run_step, of.call, batch, in_loop_of=owner)

    def run(self, of: Candidate, batch: Any, seed: int = 0) -> Any:
        """What a candidate returns; None if it raises, which is noted."""
        self.sandbox.reseed(seed)
        try:
            return self.sandbox.call(of.name, self.step(of, batch))
        except AuditError as error:
            self.slow |= {of.name} if isinstance(error, TooSlowError) else set()
            told = error.__cause__ or error
            words = " ".join(str(told).split())[:200]
            self.note(of, f"raises {type(told).__name__}: {words}")
            return None
        finally:
            self.undo()

    def is_whole(self, value: Any, of: Candidate) -> bool:
        """Whether what a candidate returned is a loss; otherwise, the reason is noted."""
        numbers, tensors = losses(value), leaves(value)
        if is_loss(value):
            if of.is_step or any("loss" in name.lower() for name in numbers):
                return True
            others = [t for name, t in tensors.items() if name not in numbers]
            return not numbers or self.reached(numbers.values()) >= self.reached(others)
        what = ", ".join(str(tuple(t.shape)) for t in tensors.values())
        graded = any(t.requires_grad for t in tensors.values())
        why = "none is one number" if graded else "nothing requires a gradient"
        what = f"tensors {what}, of which {why}" if what else type(value).__name__
        self.note(of, f"returns {what}")
        return False

    def note(self, of: Candidate, reason: str) -> None:
        """Why a candidate is no step, for the batch as the user gives it."""
        if self.is_given:
            self.reasons.setdefault(of.name, reason)

    def reached(self, tensors: Iterable[Tensor]) -> set[int]:
        """The parameters that tensors depend on."""
        total = sum((t.sum() for t in tensors if t.requires_grad), torch.zeros(()))
        if not total.requires_grad:
            return set()
        if not (parameters := self.sandbox.trainable()):
            return {-1}  # they are out of sight
        grads = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        return {i for i, grad in enumerate(grads) if grad is not None}

    def oriented(self, found: Candidate, batch: Any, value: Any) -> Candidate:
        """A candidate; minus it if it may be a bound and falls where parameters are random."""
        name = found.name.rpartition(".")[2]
        is_bound = MAXIMIZED.fullmatch(name.lower()) is not None
        unsure = not found.is_step and not losses(value)
        if not isinstance(found.call, Bound) or not (is_bound or unsure):
            return found

        def total(value: Any) -> float:
            tensors = losses(value) or leaves(value)
            return float(next(iter(tensors.values()), torch.tensor(math.nan)).detach().mean())

        def changed(std: float) -> float:
            self.sandbox.randomize(std)
            return total(self.run(found, batch)) - total(value)

        changes = filter(math.isfinite, map(changed, (3.0, 1.0, 0.3)))
        change = next(changes, -1.0 if is_bound else 0.0)

        def minus(_batch: Any, value: Any) -> Any:
            tensors = {key or name: -t for key, t in leaves(value).items()}
            return tensors if len(tensors) > 1 else next(iter(tensors.values()))

        note = f"{name} is maximized: the loss is minus it"
        return found.then(minus, note) if change < 0 else found

    # --- candidates -----------------------------------------------------------------------------

    def called(
        self, fn: Any, batch: Any, name: str = "", is_step: bool = True, given: Any = None
    ) -> Iterator[Candidate]:
        """A function of a batch, by each way to call it."""
        for bound in bindings(fn, batch, given=given):
            note = () if bound.is_plain(batch) else (f"{name or self.kind}({bound.text})",)
            full = f"{self.kind}.{name}" if name else self.kind
            yield Candidate(full, bound, note, is_step)

    def candidates(self, batch: Any) -> Iterator[Candidate]:
        """What may return a loss for a batch, the likeliest first."""
        obj, model = self.obj, self.model
        if is_routine(obj):
            named = re.search("loss|elbo|step", self.kind, re.IGNORECASE) is not None
            given = {} if model is None else {required(obj)[0]: model}
            yield from self.called(obj, batch, is_step=named, given=given)
            return
        if not isinstance(obj, Distribution):
            yield from self.of_methods(batch)
            yield from self.of_keras(batch)
            if callable(obj):
                yield from self.of_outputs("forward", obj, batch)
        yield from self.of_density(batch)
        if callable(encode := member(obj, "encode")):
            yield from self.of_outputs("encode", encode, batch)

    def of_methods(self, batch: Any) -> Iterator[Candidate]:
        """The user's methods that are named as steps or losses, or that call backward."""
        fns = dict(methods(self.obj, *STEPS))
        every = {name: member(self.obj, name) for name in dir(self.obj)}
        for name, fn in (fns | {n: fn for n, fn in every.items() if _calls_backward(fn)}).items():
            owners = [cls for cls in type(self.obj).__mro__ if name in vars(cls)]
            is_own = inspect.isroutine(fn) and (not owners or of_users(owners[0]))
            if is_own and not accepts_nothing(fn):
                yield from self.called(fn, batch, name)

    def of_density(self, batch: Any) -> Iterator[Candidate]:
        """Minus the mean of a log-density."""
        for name, fn in methods(self.obj, "density"):
            note = f"the loss is minus the mean of {name}"
            for found in self.called(fn, batch, name):
                yield found.then(lambda _, log_p: -log_p.mean(), note)

    def of_keras(self, batch: Any) -> Iterator[Candidate]:
        """The losses of `compile` and `add_loss` of Keras 3."""
        model = self.obj
        if not any(cls.__module__.startswith("keras.") for cls in type(model).__mro__):
            return
        answer = Candidate(self.kind, lambda batch: model(input_of(batch), training=True))

        def compiled(batch: Any, y: Any) -> Any:
            x = input_of(batch)
            return model.compute_loss(x=x, y=x, y_pred=y, training=True)

        def added(batch: Any, y: Any) -> Any:
            return _squared_error(batch, next(iter(leaves(y).values()))) + sum(model.losses)

        if getattr(model, "loss", None):
            yield answer.then(compiled, "the data are their own target", to=".compute_loss")
        note = "the loss is that of add_loss, which is not weighted here"
        yield answer.then(added, SQUARED, note, to=".losses", users="terms")

    def of_outputs(self, name: str, fn: Any, batch: Any) -> Iterator[Candidate]:
        """forward or encode, alone or with functions that take what it returns."""
        for found in self.called(fn, batch, name, is_step=False):
            seen = self.seen(found, fn, "reconstruction" if name == "forward" else "z")
            shown = self.run(seen, batch)
            if shown is None:
                continue
            value = shown.pop(THE_OUTPUTS)
            if isinstance(value, Distribution):
                note = "the loss is minus the mean log_prob of what it returns"
                yield found.then(lambda batch, q: -q.log_prob(input_of(batch)).mean(), note)
            elif name == "encode":
                self.encoded = value
                yield from self.of_terms(seen, shown, batch)
            elif self.is_flow(found, shown, batch):
                self.outputs = self.outputs or shown
                yield from self.of_flow(seen, shown, batch)
            else:
                self.outputs = self.outputs or shown
                yield found
                for term in self.terms("any loss", shown, batch):
                    yield _sum_of(seen, term)
                yield from self.of_terms(seen, shown, batch)

    def seen(self, found: Candidate, fn: Any, alone: str) -> Candidate:
        """What a function returns, by its names, and the KLs that it leaves in modules."""
        modules = self.sandbox.modules

        def call(batch: Any) -> dict[str, Any]:
            before = _left(modules)
            value = found.call(batch)
            shown = named_outputs(value, fn, alone)
            old = {id(t) for t in (*before.values(), *shown.values())}
            left = {name: t for name, t in _left(modules).items() if id(t) not in old}
            return {**shown, **left, THE_OUTPUTS: value}

        return found._replace(call=call)

    def terms(self, what: str, outputs: Mapping[str, Tensor], batch: Any) -> Iterator[Term]:
        """The functions of a kind, by each way to give outputs to them."""
        for name, fn in functions(self.obj, what):
            for bound in bindings(fn, batch, outputs):
                yield Term(f"{name}({bound.text})" if bound.text else name, bound)

    def of_flow(
        self, seen: Candidate, outputs: Mapping[str, Tensor], batch: Any
    ) -> Iterator[Candidate]:
        """Losses of z and a log-determinant, and a log-density beside forward."""
        for term in self.terms("any loss", outputs, batch):
            if isinstance(term.call, Bound) and "log_det" in map(meaning, term.call.keys):
                yield _sum_of(seen, term)
        yield from self.of_density(batch)
        yield seen.then(_log_density, NORMAL, users="map")

    def is_flow(self, found: Candidate, outputs: Mapping[str, Tensor], batch: Any) -> bool:
        """Whether outputs are z, of as many numbers as the data, and a log-determinant."""
        x, tensors = input_of(batch), list(outputs.values())
        if len(tensors) < 2 or not isinstance(x, Tensor):
            return False
        sizes = [t.numel() for t in tensors]
        if sum(sizes[:-1]) != x.numel() or sizes[-1] not in (1, len(x), x.numel()):
            return False
        if any(methods(self.obj, "inverse")) or meaning(list(outputs)[-1]) == "log_det":
            return True
        again = list(leaves(self.run(found, batch, seed=1)).values())
        return sizes[-1] == len(x) and bool(again) and torch.equal(again[0], tensors[0])

    def of_terms(
        self, seen: Candidate, outputs: Mapping[str, Tensor], batch: Any
    ) -> Iterator[Candidate]:
        """A reconstruction and a KL: what is returned, left in a module, or that of a function.

        Of a flow, log p(z) and a log-determinant.
        """
        terms = [[n for n in outputs if meaning(n) == role] for role in ("log_p", "log_det")]
        if all(len(names) == 1 for names in terms):
            both = _total_of(*terms[0], *terms[1])
            note = f"the loss is minus the mean of {both.text}"
            yield seen.then(lambda *shown: -both.call(*shown), note, users="terms")
        graded = {name: t for name, t in outputs.items() if t.requires_grad}
        kls = [n for n, t in graded.items() if KL_LEFT.search(n) or t.numel() == 1]
        if not kls and len(outputs) == 2:
            kls = [n for n, t in graded.items() if t.ndim == 1]
        left = [name for name in kls if "." in name]
        whole = self.reached(outputs[name] for name in left)
        if left and whole >= self.reached(outputs.values()):
            yield _sum_of(seen, _total_of(*left))
            return
        named = [_total_of(*kls)] if 0 < len(kls) < len(outputs) else []
        size = getattr(input_of(batch), "numel", int)()
        errors = list(self.terms("reconstruction", outputs, batch))
        same = [name for name, t in graded.items() if t.numel() == size]
        same = [name for name in same if meaning(name) not in ("scale", "mean", "z")]
        if same:
            errors.append(Term(SQUARED, lambda b, shown: _squared_error(b, shown[same[0]])))
        for error, kl in product(errors, [*named, *self.terms("kl", outputs, batch)]):
            yield _sum_of(seen, error, kl)

    # --- what was not found ---------------------------------------------------------------------

    def failed(self, which: Callable[[str], Any]) -> list[str]:
        """What was tried and why it is no step, by its last name."""
        reasons = self.reasons.items()
        return [f"{name} {why}" for name, why in reasons if which(re.split(r"[. ]", name)[-1])]

    def passed_over(self, found: Candidate) -> list[str]:
        """Notes on training steps that were tried before what was found."""
        others = self.failed(lambda n: _is(n, "training") and not found.name.endswith(f".{n}"))
        return [f"it was not used: {line}" for line in others]

    def failed_losses(self) -> list[str]:
        """The methods of the object that are named as losses, and why they are no step."""
        return self.failed(lambda n: hasattr(self.obj, n) and _is(n, *STEPS, "any loss"))

    def refusal(self) -> str:
        """Why nothing was found."""
        what = "it is neither a flow, nor a density, nor a VAE with a sampler and a KL"
        if is_routine(self.obj):
            what += "; a function that makes a model must take no arguments"
        tried = [f"\n  {line}" for line in self.failed(bool)[:8]]
        return f"{self.kind}: nothing in it returns a loss, and {what}{''.join(tried)}"

    def wrapper(self) -> str:
        """A step factory for the object, filled in with the names that were seen."""
        obj, kind = self.obj, self.kind
        given = ", ".join(f"{name}=..." for name in required(type(obj)))
        makes = "" if is_routine(obj) else f"model = {kind}({given})\n    "
        named = [(f"model.{n}", fn) for n, fn in methods(obj, *STEPS) if is_routine(fn)]
        steps = [(kind, obj)] if is_routine(obj) else named
        beside = list(functions(obj, "any loss"))
        names = [re.sub(r"\W", "_", name) for name in self.outputs]
        names[:1] = [re.sub("output_1", "recon", name) for name in names[:1]]
        call = f"{', '.join(names)} = model(batch)"
        if hasattr(self.encoded, "latent_dist"):
            body = OF_LATENT_DIST
        elif steps and not (names and len(required(steps[0][1])) > 2):
            name, fn = steps[0]
            given = ", ".join(required(fn)) or "batch"
            body = [f"return {name}({given})  # one number that requires a gradient"]
        elif names and beside:
            name, fn = beside[0]
            owner = "" if inspect.isfunction(fn) else "model."
            body = [call, f"return {owner}{name}({', '.join(required(fn))})"]
        elif names:
            kl = f"kl = ...  # of {', '.join(names[1:]) or 'mean and scale of z'}, summed"
            body = [call, kl, f"return (({names[0]} - batch) ** 2).sum() + kl"]
        else:
            body = ["outputs = model(batch)", "return ...  # the loss, one number"]
        return WRAPPER.format(model=makes, body="\n        ".join(body), file=_file_of(obj))


def _file_of(obj: Any) -> str:
    """The name of the file that defines an object, if it is not a library's."""
    path = None
    with contextlib.suppress(TypeError):
        path = inspect.getsourcefile(obj if is_routine(obj) else type(obj))
    return "model.py" if not path or "site-packages" in path else Path(path).name


def _calls_backward(fn: Any) -> bool:
    code = getattr(inspect.unwrap(fn), "__code__", None) if inspect.isroutine(fn) else None
    return code is not None and "backward" in code.co_names


def model_beside(fn: Any) -> nn.Module | None:
    """The model that a function takes: one in its globals, or the largest that is made there."""
    if not is_routine(fn) or meaning(next(iter(required(fn)), "")) != "model":
        return None
    there = list(getattr(fn, "__globals__", {}).values())
    own = [c for c in there if inspect.isclass(c) and c.__module__ == fn.__module__]
    modules = [thing for thing in there if isinstance(thing, nn.Module)]
    if not modules:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            modules = [c() for c in own if issubclass(c, nn.Module) and not required(c)]
    return max(modules, key=lambda m: len(list(m.modules())), default=None)


# --- losses in parts ----------------------------------------------------------------------------


def _sum_of(found: Candidate, *terms: Term) -> Candidate:
    """A candidate that gives what another returns to functions, and adds what they return."""

    def total(batch: Any, value: Any) -> Any:
        values = [term.call(batch, value) for term in terms]
        return values[0] if len(values) == 1 else _total(values)

    notes, is_whole = [term.text for term in terms], len(terms) == 1
    if not is_whole:
        notes.append("the sum of both is supplied here, so that the KL's weight is not judged")
    name = terms[-1].text.partition("(")[0]
    return found.then(total, *notes, to=f" and {name}", users="loss" if is_whole else "terms")


def _total(values: Iterable[Any]) -> Any:
    """The sum of terms; of each, the mean over examples of the sum over the rest."""
    tensors = [next(iter(leaves(value).values())) for value in values]
    return sum(t.flatten(1).sum(1).mean() if t.ndim > 1 else t.mean() for t in tensors)


def _total_of(*names: str) -> Term:
    """The sum of some of what was returned."""
    return Term(" + ".join(names), lambda _, shown: _total(shown[name] for name in names))


def _left(modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The KLs and losses that modules hold as attributes, by their paths."""
    return {
        f"{path or type(m).__name__}.{name}": value
        for root in modules
        for path, m in root.named_modules()
        for name, value in vars(m).items()
        if isinstance(value, Tensor) and value.grad_fn is not None and KL_LEFT.search(name)
    }


def _squared_error(batch: Any, answer: Tensor) -> Tensor:
    x = input_of(batch)
    return (answer.reshape(x.shape) - x).square().flatten(1).sum(1).mean()


def _log_density(_batch: Any, shown: Mapping[str, Any]) -> Tensor:
    """Minus the mean log-density under a standard normal of (z, log_det)."""
    *z, log_det = leaves(shown[THE_OUTPUTS]).values()
    flat = torch.cat([part.flatten(1) for part in z], 1)
    log_z = -0.5 * (flat.square() + math.log(2 * math.pi)).sum(1)
    return -(log_z + (log_det.flatten(1).sum(1) if log_det.ndim > 1 else log_det)).mean()
