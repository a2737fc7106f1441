"""The functions of a model that are exported: encoder, decoder, log_prob, sampler."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.context import Context
from musigma.evaluation import evaluating
from musigma.export.draws import Draw, Draws
from musigma.export.programs import program
from musigma.layer import Layer
from musigma.model import Model
from musigma.spec import Spec, Variable
from musigma.trace import Recorder, Trace

__all__ = ["NAMES", "Call", "Function", "Value", "functions_of", "parameters", "traced"]

BATCH = 3
"""Number of examples in the batch that is traced."""

MOST_DRAWS = 256
"""Largest number of noise inputs."""

DESCRIBED = {
    "mean": "mean",
    "location": "mean before rounding, in units of the data, which may lie outside their range",
    "log_std": "natural logarithm of the standard deviation",
    "log_scale": "natural logarithm of the scale",
    "logits": "logits",
    "log_weights": "natural logarithm of the weights of the components",
    "log_probs": "natural logarithm of the probabilities",
}


@dataclass(frozen=True)
class Value:
    """An input or an output.

    Attributes:
        name: Its name.
        tensor: An example of it, whose first dimension is the batch.
        what: What it is, in a sentence.
        unit: Its unit, if it has one.
        law: The law of an input that is noise: `normal`, `uniform` or `exponential`.
        levels: The number of levels, if its values count in the levels of the data.
    """

    name: str
    tensor: Tensor
    what: str
    unit: str = ""
    law: str = ""
    levels: int | None = None

    @property
    def shape(self) -> list[int | str]:
        """The shape; its first dimension is called "batch"."""
        return ["batch", *self.tensor.shape[1:]]

    @property
    def dtype(self) -> str:
        """Name of the type."""
        return str(self.tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Function:
    """A function of tensors that was traced.

    Attributes:
        name: One of `NAMES`.
        what: What it computes, in a sentence.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        program: The program of `torch.export`.
    """

    name: str
    what: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    program: torch.export.ExportedProgram = field(repr=False)


def functions_of(
    model: Model,
    names: Sequence[str] = (),
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Function]:
    """Trace the functions of a model.

    Every draw is an input, so all functions are deterministic: the noise of log_prob is that of
    q(z | x) and of dequantization, the noise of the sampler that of p. The first dimension of all
    inputs and outputs is the batch, of any size.

    Args:
        model: A model with a `spec`, in any mode. It is traced in evaluation mode.
        names: Some of `NAMES`; by default all that the model has.
        progress: Called with the number of functions that are traced, and their number.

    Raises:
        ValueError: If a function cannot be exported; the message names all that cannot, and why.

    Example:
        >>> import musigma
        >>> model = musigma.build("vae", (5,), bits=None, latents=2, width=8)
        >>> (decoder,) = functions_of(model, ["decoder"])
        >>> [(value.name, value.shape) for value in decoder.inputs]
        [('z', ['batch', 2])]
        >>> [value.name for value in decoder.outputs]
        ['x', 'mean', 'log_std']
    """
    if unknown := [name for name in names if name not in KINDS]:
        raise ValueError(f"function: expected {', '.join(KINDS)}; got {', '.join(unknown)}")
    if model.spec is None:
        raise ValueError("model: it does not say what its data are; set model.spec = Spec(shape)")
    missing = [name for name in names or () if KINDS[name].latent and model.no_latents]
    faults = [f"{name}: {model.no_latents}" for name in missing]
    wanted = list(dict.fromkeys(names)) or [
        name for name, kind in KINDS.items() if not (kind.latent and model.no_latents)
    ]
    calls = [KINDS[name] for name in wanted if name not in missing]
    advice = ": choose with --function"
    return traced(model, calls, faults=faults, advice=advice, progress=progress)


def traced(
    model: Model,
    calls: Sequence[type[Call]],
    *,
    faults: Sequence[str] = (),
    advice: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Function]:
    """Trace calls of a model, as `functions_of` does.

    Args:
        model: A model with a `spec`.
        calls: What to trace.
        faults: Faults that are known, which the message names too.
        advice: What the message says after those that can be exported.
        progress: Called with the number of functions that are traced, and their number.

    Raises:
        ValueError: If a call cannot be exported; the message names all that cannot, and why.
    """
    made, faults, whole = list[Function](), list(faults), _rounding(model)
    with torch.random.fork_rng(), torch.no_grad(), evaluating(model):
        torch.manual_seed(0)
        for i, call in enumerate(calls):
            progress(i, len(calls))
            try:
                if whole:
                    raise ValueError(whole)
                made.append(_traced(call(model)))
            except (ValueError, NotImplementedError, TypeError) as error:
                faults.append(f"{call.name}: {error}")
        progress(len(calls), len(calls))
    if faults:
        rest = ", ".join(function.name for function in made)
        rest = f"\n{rest} can be exported{advice}" if made else ""
        raise ValueError(
            "function: this model cannot be exported as it is:\n  " + "\n  ".join(faults) + rest
        )
    return made


def _rounding(model: Model) -> str:
    """Why a model whose layers round is refused; empty for other models."""
    rounding = [
        name
        for module, name in model.site_names().items()
        if isinstance(module, Layer) and getattr(module, "straight_through", False)
    ]
    if not rounding:
        return ""
    return (
        f"{', '.join(rounding[:3])}{', ...' * (len(rounding) > 3)} round to integers, where the "
        "last digit of another runtime's arithmetic may change all that follows"
    )


def _traced(kind: Call) -> Function:
    model, inputs = kind.model, kind.inputs()
    given = [value.tensor for value in inputs]
    draws, shapes = _drawn(kind, given), _drawn(kind, [t[:-1] for t in given])
    if len(draws) > MOST_DRAWS:
        raise ValueError(f"it draws {len(draws)} times, more than {MOST_DRAWS}")
    if [d.noise.shape[1:] for d in draws] != [d.noise.shape[1:] for d in shapes] or any(
        (len(a.noise), len(b.noise)) != (BATCH, BATCH - 1)
        for a, b in zip(draws, shapes, strict=True)
    ):
        raise ValueError("a draw is not one for each example, so noise cannot be an input")
    many = len(draws) > 1
    noise = [
        Value(
            f"noise{i}" if many else "noise",
            draw.noise,
            f"{draw.law} noise{f' of {draw.by}' * bool(draw.by)}",
            law=draw.law,
        )
        for i, draw in enumerate(draws)
    ]
    traced = program(_Drawing(kind), model, [*given, *(draw.noise for draw in draws)])
    outputs = kind.outputs(*given, noise=[draw.noise for draw in draws])
    return Function(kind.name, kind.what, (*inputs, *noise), tuple(outputs), traced)


def _drawn(kind: Call, given: Sequence[Tensor]) -> list[Draw]:
    """The draws of a call."""
    with Draws() as draws:
        kind(*given)
    return draws.asked


class _Drawing(nn.Module):
    """A function whose last inputs are noise."""

    def __init__(self, kind: Call):
        super().__init__()
        self.kind, self.count = kind, kind.count

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        with Draws(values[self.count :]):
            return tuple(self.kind(*values[: self.count]).values())


class Call(nn.Module, ABC):
    """A function of a model, whose draws are still torch's.

    Attributes:
        name: Its name.
        what: What it computes, in a sentence.
        latent: Whether it needs latents.
    """

    name: str
    what: str
    latent = False

    def __init__(self, model: Model):
        super().__init__()
        assert model.spec is not None
        self.model, self.spec, self.count = model, model.spec, 0

    @abstractmethod
    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """Outputs by name."""

    @abstractmethod
    def first(self) -> Iterator[Value]:
        """The inputs that are not context."""

    def inputs(self) -> list[Value]:
        """All inputs but noise."""
        first = list(self.first())
        found = [*first, *_context(self.spec, {value.name for value in first})]
        self.count, self.firsts = len(found), len(first)
        return found

    def described(self, name: str) -> tuple[str, str]:
        """What an output is, and its unit."""
        what = DESCRIBED.get(name.rstrip("0123456789"))
        return what or f"parameter {name}", ""

    def outputs(self, *given: Tensor, noise: Sequence[Tensor]) -> Iterator[Value]:
        """The outputs of a call."""
        with Draws(noise):
            results = self(*given)
        for name, tensor in results.items():
            what, unit = self.described(name)
            levels = self.spec.levels if name in ("x", "location") else None
            levels = levels if isinstance(levels, int) else None
            yield Value(name, tensor, what, unit, levels=levels)

    def split(self, values: Sequence[Tensor]) -> tuple[Sequence[Tensor], Context]:
        """The first inputs, and the context as the model takes it."""
        variables, given = self.spec.context, values[self.firsts :]
        if len(variables) < 2:
            return values[: self.firsts], given[0] if variables else None
        named = {v.name: t for v, t in zip(variables, given, strict=True)}
        return values[: self.firsts], named

    def latents(self) -> tuple[Tensor, ...]:
        """Latents of an example batch, top first."""
        values = [example(self.model), *(v.tensor for v in _context(self.spec, set()))]
        self.firsts = 1
        (x,), context = self.split(values)
        return self.model.encode(x, context, mode=True)

    def data(self) -> Value:
        """The data as an input."""
        return Value("x", example(self.model), "data, as `data` says", _unit(self.spec))


class LogProb(Call):
    """log p(x), or its lower bound."""

    name = "log_prob"

    def __init__(self, model: Model):
        super().__init__(model)
        self.output = "log_prob" if model.exact else "elbo"
        self.what = (
            "log p(x), exactly"
            if model.exact
            else "the ELBO, a lower bound of log p(x), for the draw that the noise makes"
        )

    def first(self) -> Iterator[Value]:
        """The data."""
        yield self.data()

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """Nats of each example."""
        (x,), context = self.split(values)
        trace = Recorder(closed_form=not self.model.exact)
        self.model.infer(self.model.floating(x), trace, context)
        return {self.output: trace.evidence(self.model.latents()).elbo}

    def described(self, name: str) -> tuple[str, str]:
        """The only output."""
        return self.what, "nats per example"


class Encoder(Call):
    """Parameters of q(z | x), and latents."""

    name = "encoder"
    what = (
        "the parameters of q(z | x), at the centers of the latents above; or, for latents of a "
        "flow, their values"
    )
    latent = True

    def first(self) -> Iterator[Value]:
        """The data."""
        yield self.data()

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """Parameters of every q; values of latents that have none."""
        (x,), context = self.split(values)
        trace = Recorder(temperature=0.0, scoring=False)
        self.model.infer(self.model.floating(x), trace, context)
        sites = list(self.model.latents())
        qs = {s: q for s, q in trace.qs.items() if not getattr(s, "is_preprocessing", False)}
        found: dict[str, Tensor] = {}
        for i, q in enumerate(qs.values()):
            number = str(i) if len(qs) > 1 else ""
            found |= {f"{key}{number}": t for key, t in parameters(q).items()}
        if not all(site in qs for site in sites):
            found |= {_z(i, sites): trace.values[site] for i, site in enumerate(sites)}
        return found

    def described(self, name: str) -> tuple[str, str]:
        """Parameters of q, or latents."""
        if name.startswith("z"):
            return "latent, as the decoder takes it", ""
        what, unit = super().described(name)
        return f"{what} of q(z | x)", unit


class Decoder(Call):
    """Parameters of p(x | z), and its center."""

    name = "decoder"
    what = "the center of p(x | z) in units of the data, and the parameters of p(x | z)"
    latent = True

    def first(self) -> Iterator[Value]:
        """The latents."""
        sites, z = list(self.model.latents()), self.latents()
        for i, t in enumerate(z):
            yield Value(_z(i, sites), t, "latent, not whitened" + ", top first" * (len(z) > 1))

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """The center of p(x | z), and its parameters."""
        z, context = self.split(values)
        sites = list(self.model.latents())
        trace = Recorder(
            generating=True,
            n=z[0].shape[0],
            given=dict(zip(sites, z, strict=True)),
            scoring=False,
            temperature=0.0,
        )
        x = self.model.generate(trace, context)
        found = {"x": x}
        for site in self.model.variables():
            if site not in sites and site in trace.ps:
                found |= parameters(trace.ps[site])
        return found

    def described(self, name: str) -> tuple[str, str]:
        """The center, or parameters of p."""
        if name == "x":
            return "center of p(x | z), as `musigma decode` writes it", _unit(self.spec)
        what, unit = super().described(name)
        return f"{what} of p(x | z), before the layers between it and the data", unit


class Sampler(Call):
    """Draws of x."""

    name = "sampler"
    what = "a draw of x"

    def first(self) -> Iterator[Value]:
        """The temperature."""
        t = torch.full((BATCH,), 0.7, dtype=_dtype(self.model), device=_device(self.model))
        yield Value("temperature", t, "factor of the standard deviation of every draw; 1 is p(x)")

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """Draws."""
        (t,), context = self.split(values)
        trace = Trace(generating=True, n=t.shape[0], scoring=False, temperature=t)
        return {"x": self.model.generate(trace, context)}

    def described(self, name: str) -> tuple[str, str]:
        """The only output."""
        return "draw of x", _unit(self.spec)


KINDS: Mapping[str, type[Call]] = {k.name: k for k in (Encoder, Decoder, LogProb, Sampler)}
NAMES = tuple(KINDS)
"""Names of the functions."""


# --- what they share -----------------------------------------------------------------------------


def parameters(dist: Distribution, most: int = 3) -> dict[str, Tensor]:
    """The tensors of which a distribution consists, by their names; and its mean, if it is none.

    Example:
        >>> from musigma.gaussian import DiagonalGaussian
        >>> list(parameters(DiagonalGaussian(torch.zeros(2, 3), torch.zeros(2, 3), 1)))
        ['mean', 'log_std']
    """
    found: dict[str, Tensor] = {}
    for name, value in vars(dist).items():
        if isinstance(value, Tensor) and value.ndim:
            found[name.lstrip("_")] = value
        elif isinstance(value, Distribution) and most:
            inner = parameters(value, most - 1)
            found |= {key: t for key, t in inner.items() if key not in found}
    for name in ("mean", "location"):
        with contextlib.suppress(NotImplementedError, AttributeError):
            if "mean" not in found:
                found[name] = getattr(dist, name)
    return found


def example(model: Model) -> Tensor:
    """A batch of data that a model could have seen."""
    spec, dtype = model.spec, _dtype(model)
    assert spec is not None
    like: Any = {"dtype": dtype, "device": _device(model)}
    if isinstance(spec.levels, int):
        return torch.randint(spec.levels, (BATCH, *spec.shape), device=like["device"]).to(dtype)
    rows = torch.randn(BATCH, *spec.shape, **like)
    if spec.schema is None and spec.support is None and spec.levels is None:
        return rows
    context = [value.tensor for value in _context(spec, set())]
    named = {v.name: t for v, t in zip(spec.context, context, strict=True)}
    given = named if len(context) > 1 else next(iter(named.values()), None)
    return model.sample(BATCH, given)


def _context(spec: Spec, taken: set[str]) -> Iterator[Value]:
    for variable in spec.context:
        name = variable.name if variable.name not in taken else f"given_{variable.name}"
        yield Value(name, _rows(variable), _about(variable))


def _rows(variable: Variable) -> Tensor:
    if variable.classes:
        return torch.eye(variable.classes)[torch.arange(BATCH) % variable.classes]
    if variable.levels is not None:
        return torch.randint(variable.levels, (BATCH, *variable.shape)).float()
    return torch.randn(BATCH, *variable.shape)


def _about(variable: Variable) -> str:
    if variable.classes:
        names = ", ".join(variable.names) or f"0 to {variable.classes - 1}"
        return f"one-hot rows of the classes {names}"
    kind = "numbers" if variable.levels is None else f"integer levels below {variable.levels}"
    return f"{kind} that the model is conditioned on"


def _z(i: int, sites: Sequence[nn.Module]) -> str:
    return f"z{i}" if len(sites) > 1 else "z"


def _unit(spec: Spec) -> str:
    if isinstance(spec.levels, int):
        return f"integer levels 0 to {spec.levels - 1}"
    return "the columns of the table" if math.prod(spec.shape) and spec.columns else "the data's"


def _dtype(model: Model) -> torch.dtype:
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def _device(model: Model) -> torch.device:
    return next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
