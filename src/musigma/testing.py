"""The laws that every layer, head and model must obey, for the tests of this library and yours.

Each check works on a copy in float64 whose parameters are random and not zero, because most faults
of a layer do not show at the identity. A violation raises an AssertionError with the name of the
law and the measured error.

    >>> from musigma.layers import ActNorm
    >>> check_layer(ActNorm(3), (3, 2, 2))
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from musigma import context as contexts
from musigma.context import Context
from musigma.distributions import StandardNormal
from musigma.gaussian import DiagonalGaussian
from musigma.model import Bijection, Chain, Layer, Model, Prior
from musigma.trace import Evidence, Trace

__all__ = [
    "BothWays",
    "both_ways_of_layer",
    "both_ways_of_model",
    "check_head",
    "check_layer",
    "check_model",
    "jacobian",
    "randomized",
    "vector_products",
]

BATCH = 4
T = TypeVar("T")


def randomized(module: nn.Module, *, scale: float = 1.0, seed: int = 0) -> Any:
    """A copy in float64 with noise on every parameter, so that none of them is zero.

    Args:
        module: The module. It does not change.
        scale: Factor of the noise. At 1 single layers stay well conditioned; chains of dozens of
            layers need about 0.25.
        seed: Random seed of the noise.

    Returns:
        The copy, in evaluation mode.
    """
    module = copy.deepcopy(module).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            size = scale * (0.4 / math.sqrt(fan_in) if fan_in > 1 else 0.1)
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def jacobian(
    function: Callable[[Tensor], Tensor], x: Tensor, *, seconds: float = math.inf
) -> Tensor:
    """The Jacobian of each example of a batch, by autograd.

    Args:
        function: From x to (B, D'), differentiable; no example may depend on another.
        x: The batch; one example if it has a single axis and `function` returns one row.
        seconds: Limit of CPU time.

    Returns:
        The Jacobians (B, D', D).

    Raises:
        RuntimeError: If the output does not depend on x in autograd's graph.
        TimeoutError: If it would take longer than `seconds`.

    Example:
        >>> jacobian(lambda x: x**2, torch.tensor([[1.0, 3.0]]))
        tensor([[[2., 0.],
                 [0., 6.]]])
    """
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = function(x)
    vectors = torch.eye(y.shape[1], dtype=y.dtype)[:, None].expand(-1, *y.shape)
    parts = vectors.split(max(1, 2_000_000 // y.numel()) if seconds == math.inf else 32)
    products, began = [], time.process_time()
    for i, part in enumerate(parts):
        products.append(vector_products(y, x, part))
        if (time.process_time() - began) * len(parts) > seconds * (i + 1):
            raise TimeoutError
    return torch.cat(products).transpose(0, 1)


def vector_products(y: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """Products v^T J of several vectors (N, B, D') with the Jacobian of y in x, (N, B, D)."""
    gradient = partial(torch.autograd.grad, y, x, retain_graph=True)
    try:
        (products,) = gradient(vectors, is_grads_batched=True)
    except RuntimeError:  # operations that cannot be batched go one by one
        products = torch.stack([gradient(v)[0] for v in vectors])
    return products.detach().reshape(len(vectors), len(y), -1)


@torch.random.fork_rng(devices=[])
def check_layer(
    layer: Layer,
    event: Sequence[int],
    *,
    context: int | Context = 0,
    bits: int | None = None,
    x: Tensor | None = None,
    compiled: bool = False,
) -> None:
    """Check all laws of a layer.

    A `Bijection` is inverted, and its log-determinant is compared with autograd's Jacobian. Every
    layer is also put into a chain, which is checked as a model.

    Args:
        layer: The layer.
        event: Shape of one example.
        context: Number of features of the context, 0 if the layer takes none; or a context of 4
            rows, a tensor or a mapping.
        bits: For layers of integer data: the bits of each element.
        x: Data (B, *event), for layers that take only particular values; by default noise.
        compiled: Also compile the layer, as one graph.

    Raises:
        AssertionError: If a law is broken.
    """
    data, given = _inputs(event, context, bits, x)
    exact = randomized(layer)
    if isinstance(exact, Bijection):
        _inverse(exact, data, given, 1e-10)
        _jacobian(exact, data, given)
        _inverse(*_single(exact, data, given), 1e-4)
    with torch.no_grad():
        left = exact.infer(data, Trace(scoring=False), given)
    chain = Chain([layer], Prior(StandardNormal(left.shape[1:])))
    check_model(chain, event, context=context, bits=bits, x=x, compiled=compiled)


@torch.random.fork_rng(devices=[])
def check_head(
    head: nn.Module,
    given: Tensor | None,
    event: Sequence[int],
    *,
    context: int | Context = 0,
    compiled: bool = False,
) -> None:
    """Check all laws of a head: shapes, gradients, temperature, independence, context, state.

    Args:
        head: The head.
        given: Its first argument, (B, ...); None for a prior.
        event: As in `check_layer`.
        context: As in `check_layer`.
        compiled: As in `check_layer`.

    Raises:
        AssertionError: If a law is broken.
    """
    head = randomized(head)
    given = None if given is None else given.double()
    rows = BATCH if given is None else len(given)
    extra = _given(context, rows)

    def dist_of(head: nn.Module, index: Any = slice(None), extra: Any = extra) -> Any:
        conditions = [contexts.rows(t, index) for t in (given, extra)]
        return head(*conditions[: 1 if extra is None else 2])

    dist = dist_of(head)
    batch = dist.batch_shape
    _say(tuple(dist.event_shape) == tuple(event), f"event shape is {tuple(dist.event_shape)}")
    _say(batch in ((), (rows,)), f"batch shape is {tuple(batch)}, not () or ({rows},)")
    torch.manual_seed(0)
    x = dist.sample(() if batch else (rows,))
    log_prob = dist.log_prob(x)
    _say(log_prob.shape == (rows,), f"log_prob has shape {tuple(log_prob.shape)}, not ({rows},)")
    _say(log_prob.isfinite(), "log_prob of a draw is not finite")
    _gradients(head, lambda: dist_of(head).log_prob(x))
    dist = dist_of(head)  # again: _gradients has moved the parameters
    with torch.no_grad():
        _sampling(Prior(_Known(dist_of(head))), (rows, *event), None)
    if batch:
        single = [dist_of(head, slice(i, i + 1)).log_prob(x[i : i + 1]) for i in range(rows)]
        _near(torch.cat(single), log_prob, 1e-9, "batch independence: log_prob of a single row")
    if isinstance(dist, DiagonalGaussian):
        _near(dist.unwhiten(dist.whiten(x)), x, 1e-9, "whiten and unwhiten")
    _context(lambda c: dist_of(head, extra=c).log_prob(x), rows, context)
    _state(head, lambda of: dist_of(of).log_prob(x))
    _purity(head, lambda of: dist_of(of).log_prob(x))
    if compiled:
        _compiles(lambda: dist_of(head).log_prob(x), "log_prob")


@torch.random.fork_rng(devices=[])
def check_model(
    model: Model,
    event: Sequence[int],
    *,
    context: int | Context = 0,
    bits: int | None = None,
    x: Tensor | None = None,
    compiled: bool = False,
    pathwise: bool = True,
) -> None:
    """Check all laws of a model.

    They are duality (`infer` and `generate` give the same log w for the same values), exact
    decoding of flows, temperature, partial decoding, batch independence, context, gradients, state
    and precision. `pathwise` is false for a model whose gradient is an estimate that is right on
    average, rather than the derivative of the draws; it is not checked then. The other arguments
    are those of `check_layer`.

    Raises:
        AssertionError: If a law is broken.
    """
    model = randomized(model)
    data, given = _inputs(event, context, bits, x)
    with torch.no_grad():
        _duality(model, data, given)
        _decoding(model, data, given)
        _sampling(model, (len(data), *event), given)
        _independence(model, data, given)
        _scores(model, data, given, bits)
    _context(lambda c: _centered(model, data, c), len(data), context)
    if pathwise:
        _gradients(model, lambda: _trained_for(model(data, given)))
    _state(model, lambda of: _centered(of, data, given))
    if compiled:
        latents = [z.detach() for z in model.encode(data, given, mode=True)]
        _compiles(lambda: _centered(model, data, given), "log w")
        _compiles(lambda: model(data, given).elbo, "forward")
        _compiles(lambda: model.sample(len(data), given), "sample")
        _compiles(lambda: model.decode(latents, given), "decode")


# --- the laws ----------------------------------------------------------------------------------


def _say(true: bool | Tensor, otherwise: str) -> None:
    if not bool(torch.as_tensor(true).all()):
        raise AssertionError(otherwise)


def _near(a: Tensor, b: Tensor, tolerance: float, law: str) -> None:
    """Equal up to the tolerance, relative where the values are above one."""
    error = float(((a - b).abs() / b.abs().clamp(min=1)).detach().max())
    _say(error <= tolerance, f"{law}: off by {error:.3g}, more than {tolerance:g}")


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _inputs(
    event: Sequence[int], context: int | Context, bits: int | None, x: Tensor | None
) -> tuple[Tensor, Any]:
    data = _noise(BATCH, *event) if x is None else x.double()
    if x is None and bits is not None:
        data = (data.sigmoid() * 2**bits).floor()
    return data, _given(context, len(data))


def _given(context: int | Context, n: int) -> Any:
    """A context of n rows in float64; None for 0 features."""
    if isinstance(context, int):
        return _noise(n, context) if context else None
    return contexts.apply(lambda t: t[:n].double(), context)


def _single(module: Any, x: Tensor, context: Context) -> tuple[Any, Tensor, Context]:
    """The module, the data and the context in float32."""
    return copy.deepcopy(module).float(), x.float(), contexts.apply(Tensor.float, context)


class BothWays(NamedTuple):
    """Data that come back, and the nats (B,) of the same values by each direction."""

    again: Tensor
    forward: Tensor
    backward: Tensor


def both_ways_of_layer(layer: Bijection, x: Tensor, context: Any = None) -> BothWays:
    """The inverse of forward, and the log-determinants of forward's map: both are to be equal."""
    y, forward = layer(x, context)
    again, backward = layer.inverse(y, context)
    return BothWays(again, forward, -backward)


def both_ways_of_model(model: Model, x: Tensor, context: Any = None) -> BothWays:
    """Data by `generate` from the values of `infer`, and log w of either."""
    up = Trace()
    model.infer(x, up, context)
    down = Trace(generating=True, n=len(x), given=up.values)
    again = model.generate(down, context)
    return BothWays(again, *(t.evidence(model.latents()).elbo for t in (up, down)))


def _inverse(layer: Bijection, x: Tensor, context: Any, tolerance: float) -> None:
    with torch.no_grad():
        again, forward, backward = both_ways_of_layer(layer, x, context)
    shapes = [tuple(log_det.shape) for log_det in (forward, backward)]
    _say(shapes == [(len(x),)] * 2, f"log_det has shape {shapes}, not ({len(x)},) both ways")
    _near(again, x, tolerance, f"inverse of forward, {x.dtype}")
    _near(backward, forward, tolerance, f"log-determinants cancel, {x.dtype}")


def _jacobian(layer: Bijection, x: Tensor, context: Any) -> None:
    truth = torch.linalg.slogdet(jacobian(lambda x: layer(x, context)[0].flatten(1), x))[1]
    _near(layer(x, context)[1], truth, 1e-10, "log_det against autograd's Jacobian")


def _centered(model: Model, x: Tensor, context: Any) -> Tensor:
    """Log w with the center of each distribution in place of a draw, shape (B,)."""
    trace = Trace(temperature=0.0)
    model.infer(x, trace, context)
    return trace.evidence(model.latents()).elbo


def _trained_for(evidence: Evidence) -> Tensor:
    return evidence.elbo + evidence.auxiliary


def _duality(model: Model, x: Tensor, context: Any) -> None:
    torch.manual_seed(0)
    again, log_w, other = both_ways_of_model(model, x, context)
    _near(again, x, 1e-9, "generate returns the data that infer saw")
    _say(log_w.shape == (len(x),), f"log w has shape {tuple(log_w.shape)}, not ({len(x)},)")
    _near(other, log_w, 1e-9, "duality: log w of infer and of generate")
    if model.exact:
        down = Trace(generating=True, n=len(x))
        log_p = model.log_prob(model.generate(down, context), context)
        _near(log_p, down.evidence(model.latents()).elbo, 1e-9, "log_prob of a sample")


def _decoding(model: Model, x: Tensor, context: Any) -> None:
    latents = model.encode(x, context, mode=True)
    whitened = model.encode(x, context, mode=True, whiten=True)
    decoded = model.decode(latents, context)
    _near(model.decode(whitened, context, whiten=True), decoded, 1e-9, "decoding whitened latents")
    if set(model.latents()) == set(model.variables()):
        _near(decoded, x, 1e-9, "decode(encode(x))")
    site = next(iter(model.latents()))
    trace = Trace(generating=True, n=len(x), given={site: latents[0]})
    decoded = model.generate(trace, context)
    _say(trace.values[site] == latents[0], "partial decoding changes a given latent")
    if model.exact:
        again = model.encode(decoded, context)[0]
        _near(again, latents[0], 1e-9, "partial decoding, encoded again")


class _Known(nn.Module):
    """A head that returns one distribution."""

    def __init__(self, dist: Distribution):
        super().__init__()
        self.forward = lambda given=None: dist


def _sampling(model: Model, shape: Sequence[int], context: Any) -> None:
    n = shape[0]

    def drawn(temperature: Any, *, seed: int = 0, mode: bool = False) -> Tensor:
        sample = partial(model.sample, n, context, temperature=temperature, mode=mode)
        return _seeded(sample, seed)

    x, count = drawn(1.0), len(list(model.latents()))
    _say(x.shape == tuple(shape), f"a sample has shape {tuple(x.shape)}, not {tuple(shape)}")
    _say(x.dtype == torch.float64, f"a sample of a float64 model is {x.dtype}")
    cold = drawn(0.0)
    _say(drawn(0.0, seed=1) == cold, "samples at temperature 0 differ")
    try:
        warm, each = drawn(0.75), drawn(torch.tensor([0.0, *[0.75] * (n - 1)]))
    except ValueError as error:  # torch's own distributions have no temperature
        _say(str(error).startswith("temperature:"), f"temperature 0.75 is refused by: {error}")
    else:
        _near(each[0], cold[0], 1e-9, "one temperature per sample: 0")
        _near(each[1:], warm[1:], 1e-9, "one temperature per sample: 0.75")
    _near(drawn([1.0] * count), x, 1e-9, "each latent at temperature 1")
    _near(drawn([0.0] * count, mode=True), cold, 1e-9, "each latent and the data at their centers")
    cooled: dict[nn.Module, float] = {}
    for site in model.latents():
        cooled[site] = 0.0
        a, b = (Trace(generating=True, n=n, temperature=cooled, whiten=True) for _ in range(2))
        for seed, trace in enumerate((a, b)):
            _seeded(partial(model.generate, trace, context), seed)
        fixed = {s for s in model.latents() if torch.equal(a.values[s], b.values[s])}
        law = f"{len(fixed)} latents do not depend on the seed; {len(cooled)} have temperature 0"
        _say(fixed == set(cooled), law)


def _independence(model: Model, x: Tensor, context: Any) -> None:
    whole, latents = _centered(model, x, context), model.encode(x, context, mode=True)
    decoded = model.decode(latents, context)
    reverse = torch.arange(len(x) - 1, -1, -1)
    for law, index in [("reordered", reverse), *((f"only row {i}", [i]) for i in range(len(x)))]:
        rows = contexts.rows(context, torch.as_tensor(index))
        _near(_centered(model, x[index], rows), whole[index], 1e-9, f"batch independence: {law}")
        again = model.decode([z[index] for z in latents], rows)
        _near(again, decoded[index], 1e-9, f"batch independence: decoded, {law}")


def _scores(model: Model, x: Tensor, context: Any, bits: int | None) -> None:
    elbo = _seeded(lambda: model.elbo(x, context))
    _say(elbo.shape == (len(x),), f"elbo has shape {tuple(elbo.shape)}, not ({len(x)},)")
    if model.exact:
        _near(model.log_prob(x, context), elbo, 1e-12, "log_prob of an exact model against elbo")
    if bits is not None:
        again = _seeded(lambda: model.elbo(x.long(), context))
        _near(again, elbo, 1e-12, "integers against the same floats")
    single = _centered(*_single(model, x, context))
    _say(single.dtype == torch.float32, f"log w of a float32 model is {single.dtype}")
    _near(single.double(), _centered(model, x, context), 1e-4, "log w in float32")


def _context(score: Callable[[Any], Tensor], rows: int, context: int | Context) -> None:
    given = _given(context, rows)
    with torch.no_grad():
        if given is None:
            with contextlib.suppress(TypeError):  # a torch module that takes no context
                _near(score(_noise(rows, 3)), score(None), 0.0, "context: used but not declared")
            return
        a, b = score(given), score(contexts.apply(_other, given))
        _say(a != b, "context: declared but not used")
        try:
            score(None)
        except ValueError as error:
            _say(str(error).startswith("context:"), f"a missing context is reported as: {error}")
        else:
            raise AssertionError("context: no ValueError if it is missing")


def _other(t: Tensor) -> Tensor:
    """Another context: another class in one-hot rows, and t + 1 elsewhere."""
    if t.ndim != 2:
        return t + 1
    one_hot = ((t == 0) | (t == 1)).all(1, keepdim=True) & (t.sum(1, keepdim=True) == 1)
    return torch.where(one_hot, t.roll(1, 1), t + 1)


def _gradients(module: nn.Module, loss: Callable[[], Tensor]) -> None:
    parameters = dict(module.named_parameters())

    if not parameters:
        return
    held = _Held(any(getattr(m, "straight_through", False) for m in module.modules()))
    with held:
        _seeded(loss).sum().backward()
    slope = torch.zeros((), dtype=torch.float64)
    directions = {name: _noise(*p.shape) for name, p in parameters.items()}
    for name, p in parameters.items():
        if p.grad is None:
            raise AssertionError(f"gradients: {name} has none")
        _say(p.grad.isfinite(), f"gradients: {name} has one that is not finite")
        _say(bool(p.grad.any()), f"gradients: {name} has a zero gradient")
        slope = slope + (directions[name] * p.grad).sum()
    module.zero_grad(set_to_none=True)
    ends, state = [], copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for name, p in parameters.items():
                p.add_(step * directions[name])
            with held:
                ends.append(_seeded(loss).sum())
        module.load_state_dict(state)
    _near(slope, (ends[0] - ends[1]) / 2e-6, 1e-5, "gradients: against finite differences")


class _Held(TorchFunctionMode):
    """If `active`, `detach` returns what it returned when the mode was entered first.

    Straight-through gradients hold it constant, so finite differences have to.
    """

    def __init__(self, active: bool):
        super().__init__()
        self.active, self.values, self.left = active, [], None

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.left = iter(self.values)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Keep, or return, what `detach` returns."""
        if not self.active or func not in (Tensor.detach, torch.detach):
            return func(*args, **(kwargs or {}))
        if self.left is not None:
            return next(self.left)
        self.values.append(func(*args, **(kwargs or {})))
        return self.values[-1]


def _state(module: nn.Module, answer: Callable[[Any], Tensor]) -> None:
    repr(module)
    with torch.no_grad():
        truth = answer(module)
        _say(answer(copy.deepcopy(module)) == truth, "state: a deepcopy differs")
        other = randomized(module, seed=1)
        other.load_state_dict(module.state_dict())
        _say(answer(other) == truth, "state: a reloaded copy gives another result")


def _purity(head: nn.Module, score: Callable[[nn.Module], Tensor]) -> None:
    """Check that scoring in training mode changes neither the state nor the next score."""
    head = copy.deepcopy(head).train()
    before = copy.deepcopy(head.state_dict())
    first, second = (_seeded(lambda: score(head)) for _ in range(2))
    _say(first == second, "purity: the same score differs in training mode")
    for name, t in head.state_dict().items():
        _say(t == before[name], f"purity: scoring in training mode changes {name}")


def _compiles(call: Callable[[], Tensor], name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    _near(_seeded(compiled), _seeded(call), 1e-9, f"compiled {name}")
    torch._dynamo.reset()


def _seeded(call: Callable[[], T], seed: int = 0) -> T:
    """What a call returns, with the same draws every time."""
    torch.manual_seed(seed)
    return call()
