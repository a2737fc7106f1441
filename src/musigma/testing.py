"""The laws that every layer, head and model obeys: for this library's tests, and for yours.

Each check works on a copy in float64 whose parameters are random, never zero: a layer that starts
at the identity hides most of what can be wrong with it. A broken law is an AssertionError that
names it, with the figure that was measured.

    >>> from musigma.layers import ActNorm
    >>> check_layer(ActNorm(3), (3, 2, 2))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.gaussian import DiagonalGaussian
from musigma.heads import StandardNormal
from musigma.model import Bijection, Chain, Layer, Model, Prior
from musigma.trace import Trace

__all__ = ["check_head", "check_layer", "check_model", "randomized"]

BATCH = 4


def randomized(module: nn.Module, *, seed: int = 0) -> Any:
    """A copy in float64 with noise on every parameter, small enough to stay well conditioned."""
    module = copy.deepcopy(module).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 1
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(noise * (0.4 / math.sqrt(fan_in) if p.ndim > 1 else 0.1))
    return module


def check_layer(
    layer: Layer,
    event: Sequence[int],
    *,
    context: int = 0,
    levels: int = 0,
    compiled: bool = False,
) -> None:
    """All laws of a layer.

    A `Bijection` is inverted, and its log-determinant compared with autograd's Jacobian. Any layer
    is put into a chain, and that chain is checked as a model.

    Args:
        layer: The layer.
        event: Shape of one example.
        context: Features of the context; 0 if the layer takes none.
        levels: For layers of integer data: how many levels there are.
        compiled: Also compile it, as one graph.

    Raises:
        AssertionError: If a law is broken.
    """
    x, given = _inputs(event, context, levels)
    exact = randomized(layer)
    if isinstance(exact, Bijection):
        _inverse(exact, x, given, 1e-10)
        _jacobian(exact, x, given)
        _inverse(copy.deepcopy(exact).float(), x.float(), _float(given), 1e-4)
    with torch.no_grad():
        left = exact.infer(x, Trace(scoring=False), given)
    chain = Chain([layer], Prior(StandardNormal(left.shape[1:])))
    check_model(chain, event, context=context, levels=levels, compiled=compiled)


def check_head(
    head: nn.Module,
    given: Tensor | None,
    event: Sequence[int],
    *,
    context: int = 0,
    value: Callable[[Distribution], Tensor] | None = None,
) -> None:
    """All laws of a head: shapes, gradients, temperature, independence of the batch, state.

    Args:
        head: The head.
        given: What it is conditioned on (B, ...); None for a prior.
        event: Shape of one example.
        context: Features of the context; 0 if the head takes none.
        value: What is scored; by default a draw.

    Raises:
        AssertionError: If a law is broken.
    """
    head = randomized(head)
    given = None if given is None else given.double()
    rows = BATCH if given is None else len(given)
    extra = _noise(rows, context) if context else None

    def dist_of(of: nn.Module, keep: Any = slice(None)) -> Distribution:
        parts = [None if given is None else given[keep]]
        return of(*parts, *([] if extra is None else [extra[keep]]))

    dist = dist_of(head)
    batch = dist.batch_shape
    _say(tuple(dist.event_shape) == tuple(event), f"event shape is {tuple(dist.event_shape)}")
    _say(batch in ((), (rows,)), f"batch shape is {tuple(batch)}, not () or ({rows},)")
    torch.manual_seed(0)
    draw = dist.sample(() if batch else (rows,))
    _say(draw.shape == (rows, *event), f"a draw has shape {tuple(draw.shape)}")
    x = draw if value is None else value(dist)
    log_prob = dist.log_prob(x)
    _say(log_prob.shape == (rows,), f"log_prob has shape {tuple(log_prob.shape)}, not ({rows},)")
    _say(bool(log_prob.isfinite().all()), "log_prob of a draw is not finite")
    _gradients(head, lambda: dist_of(head).log_prob(x))
    if batch:
        alone = torch.cat(
            [dist_of(head, slice(i, i + 1)).log_prob(x[i : i + 1]) for i in range(rows)]
        )
        _near(alone, log_prob, 1e-9, "batch independence: log_prob of a row by itself")
    if isinstance(dist, DiagonalGaussian):
        _near(dist.unwhiten(dist.whiten(x)), x, 1e-9, "whiten and unwhiten")
    _state(head, lambda of: dist_of(of).log_prob(x))


def check_model(
    model: Model,
    event: Sequence[int],
    *,
    context: int = 0,
    levels: int = 0,
    compiled: bool = False,
) -> None:
    """All laws of a model.

    Duality (infer and generate state the same log w for the same values), exact decoding of
    flows, temperature, partial decoding, batch independence, context, gradients, state, and
    optionally compilation as one graph.

    Args:
        model: The model.
        event: Shape of one example.
        context: Features of the context; 0 if the model takes none.
        levels: For models of integer data: how many levels there are; 0 for continuous data.
        compiled: Also compile it, as one graph.

    Raises:
        AssertionError: If a law is broken.
    """
    model = randomized(model)
    x, given = _inputs(event, context, levels)
    with torch.no_grad():
        _duality(model, x, given)
        _decoding(model, x, given)
        _sampling(model, event, given)
        _independence(model, x, given)
    if context:
        _context(model, x, given)
    elif _centred(model, x, None).shape == (BATCH,):
        ignored = _centred(model, x, None)
        _say(ignored.shape == (BATCH,), f"log w has shape {tuple(ignored.shape)}")
    _gradients(model, lambda: model(x, given).elbo)
    _state(model, lambda of: _centred(of, x, given))
    if compiled:
        _compiles(model, x, given)


# --- the laws ----------------------------------------------------------------------------------


def _say(true: bool, otherwise: str) -> None:
    if not true:
        raise AssertionError(otherwise)


def _near(a: Tensor, b: Tensor, tolerance: float, law: str) -> None:
    """Equal up to the tolerance, relative where the values are above one."""
    off = float(((a - b).abs() / b.abs().clamp(min=1)).max()) if a.numel() else 0.0
    _say(off <= tolerance, f"{law}: off by {off:.3g}, more than {tolerance:g}")


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


def _inputs(event: Sequence[int], context: int, levels: int) -> tuple[Tensor, Tensor | None]:
    x = _noise(BATCH, *event)
    if levels:
        x = ((x.sigmoid() * levels).floor()).clamp(0, levels - 1)
    return x, _noise(BATCH, context) if context else None


def _unit(bijection: Bijection, x: Tensor, context: Tensor | None) -> Tensor:
    """Data on which a bijection is defined: moved into (0, 1) if it is not on the real line."""
    return x if bool(bijection(x, context)[0].isfinite().all()) else x.sigmoid()


def _inverse(layer: Bijection, x: Tensor, context: Tensor | None, tolerance: float) -> None:
    with torch.no_grad():
        x = _unit(layer, x, context)
        y, forward = layer(x, context)
        again, backward = layer.inverse(y, context)
    _say(forward.shape == (len(x),), f"log_det has shape {tuple(forward.shape)}, not ({len(x)},)")
    _say(backward.shape == (len(x),), f"inverse log_det has shape {tuple(backward.shape)}")
    _near(again, x, tolerance, f"inverse of forward, {x.dtype}")
    _near(-backward, forward, 10 * tolerance, f"log-determinants cancel, {x.dtype}")


def _jacobian(layer: Bijection, x: Tensor, context: Tensor | None) -> None:
    x = _unit(layer, x, context)
    log_det = layer(x, context)[1]
    for i in range(len(x)):
        row = None if context is None else context[i : i + 1]

        def one(value: Tensor, row: Tensor | None = row) -> Tensor:
            return layer(value[None], row)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(one, x[i])
        assert isinstance(jacobian, Tensor)
        truth = torch.linalg.slogdet(jacobian.reshape(-1, x[i].numel()))[1]
        _near(log_det[i].detach(), truth, 1e-9, "log_det against autograd's Jacobian")


def _centred(model: Model, x: Tensor, context: Tensor | None) -> Tensor:
    """Log w where every draw is its distribution's centre: a function, shape (B,)."""
    trace = Trace(temperature=0.0)
    model.infer(x, trace, context)
    return trace.evidence(model.latents()).elbo


def _duality(model: Model, x: Tensor, context: Tensor | None) -> None:
    torch.manual_seed(0)
    up = Trace()
    model.infer(x, up, context)
    down = Trace(generating=True, n=len(x), given=up.values)
    again = model.generate(down, context)
    _near(again, x, 1e-8, "generate returns the data that infer saw")
    a, b = (t.evidence(model.latents()).elbo for t in (up, down))
    _near(b, a, 1e-7, "duality: log w of infer and of generate")


def _decoding(model: Model, x: Tensor, context: Tensor | None) -> None:
    latents = model.encode(x, context, mode=True)
    whitened = model.encode(x, context, mode=True, whiten=True)
    decoded = model.decode(latents, context)
    _near(model.decode(whitened, context, whiten=True), decoded, 1e-7, "decoding whitened latents")
    if set(model.latents()) == set(model.variables()):
        _near(decoded, x, 1e-8, "decode(encode(x))")
    torch.manual_seed(0)
    top = model.decode(latents[:1], context)
    _say(top.shape == x.shape, f"decoding the top latent gives shape {tuple(top.shape)}")
    trace = Trace(generating=True, n=len(x), given={next(iter(model.latents())): latents[0]})
    model.generate(trace, context)
    kept = trace.values[next(iter(model.latents()))]
    _say(bool((kept == latents[0]).all()), "partial decoding keeps the latent that is given")


def _sampling(model: Model, event: Sequence[int], context: Tensor | None) -> None:
    torch.manual_seed(0)
    drawn = model.sample(BATCH, context)
    _say(drawn.shape == (BATCH, *event), f"a sample has shape {tuple(drawn.shape)}")
    _say(drawn.dtype == torch.float64, f"a sample of a float64 model is {drawn.dtype}")
    cold = [model.sample(BATCH, context, temperature=0.0) for _ in range(2)]
    _say(bool((cold[0] == cold[1]).all()), "samples at temperature 0 differ")
    each = model.sample(BATCH, context, temperature=torch.tensor([0.0, 0.5, 1.0, 0.0]))
    _near(each[0], cold[0][0], 1e-9, "a sample whose own temperature is 0")
    count = len(list(model.latents()))
    levels = model.sample(BATCH, context, temperature=[0.0] * count, mode=True)
    _near(
        levels, cold[0], 1e-9, "every latent at temperature 0, and the observation at its centre"
    )


def _independence(model: Model, x: Tensor, context: Tensor | None) -> None:
    whole = _centred(model, x, context)
    order = torch.arange(len(x) - 1, -1, -1)
    turned = None if context is None else context[order]
    _near(_centred(model, x[order], turned), whole[order], 1e-9, "batch independence: reordered")
    row = None if context is None else context[1:2]
    _near(_centred(model, x[1:2], row), whole[1:2], 1e-9, "batch independence: one row by itself")


def _context(model: Model, x: Tensor, context: Tensor | None) -> None:
    assert context is not None
    with torch.no_grad():
        a, b = _centred(model, x, context), _centred(model, x, context + 1)
        _say(bool((a != b).all()), "another context changes nothing")
        try:
            _centred(model, x, None)
        except ValueError as error:
            _say(str(error).startswith("context:"), f"a missing context is reported as: {error}")
        else:
            raise AssertionError("a missing context is not noticed")


def _gradients(module: nn.Module, loss: Callable[[], Tensor]) -> None:
    module.zero_grad(set_to_none=True)
    if not list(module.parameters()):
        return
    torch.manual_seed(0)
    loss().sum().backward()
    for name, p in module.named_parameters():
        _say(p.grad is not None, f"gradients: none reaches {name}")
        assert p.grad is not None
        _say(bool(p.grad.isfinite().all()), f"gradients: that of {name} is not finite")
        _say(bool((p.grad != 0).any()), f"gradients: that of {name} is zero")
    module.zero_grad(set_to_none=True)


def _state(module: Any, answer: Callable[[Any], Tensor]) -> None:
    repr(module)
    with torch.no_grad():
        truth = answer(module)
        other = copy.deepcopy(module)
        for t in [*other.parameters(), *other.buffers()]:
            if t.is_floating_point():
                t.add_(1e-3)
        other.load_state_dict(module.state_dict())
        for name, t in other.named_buffers():  # those that are not part of the state are constants
            if name not in module.state_dict():
                t.copy_(module.get_buffer(name))
        _say(bool((answer(other) == truth).all()), "state: a reloaded copy answers differently")


def _compiles(model: Model, x: Tensor, context: Tensor | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        once = torch.compile(
            lambda a, c: _centred(model, a, c), fullgraph=True, backend="aot_eager"
        )
        _near(once(x, context), _centred(model, x, context), 1e-9, "compiled log w")
        for name, call in {
            "forward": lambda: model(x, context).elbo,
            "sample": lambda: model.sample(BATCH, context),
        }.items():
            result = torch.compile(call, fullgraph=True, backend="aot_eager")()
            _say(bool(result.isfinite().all()), f"compiled {name} is not finite")
    torch._dynamo.reset()
