"""Layers and models: every one states its terms to a `Trace`, once per direction.

A `Layer` consumes x and leaves z; a `Bijection` is a layer that is a pure function. A `Model`
consumes everything, and has training, scoring, sampling, encoding, decoding, reconstruction and
interpolation for free. There are four: `Prior`, `Chain` (flows), `VAE` and `Ladder`. The prior of
a chain or of a VAE is itself a model, so depth is recursion.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.distributions import ModelDistribution
from musigma.gaussian import channels_last
from musigma.memory import Keeper
from musigma.trace import Evidence, Trace

__all__ = [
    "VAE",
    "Bijection",
    "Chain",
    "Inverse",
    "Ladder",
    "LadderBlock",
    "Layer",
    "Model",
    "Prior",
]

Temperature = float | Tensor | Sequence[float | Tensor]


def conditioned(net: nn.Module, given: Tensor, context: Tensor | None) -> Any:
    """``net(given, context)``, or ``net(given)`` where there is no context."""
    return net(given) if context is None else net(given, context)


class Layer(nn.Module, ABC):
    """A part of a chain: consumes x on the way up, and gives it back on the way down.

    To write one, implement `infer` and `generate` as mirror images: whatever one direction draws,
    the other scores. A layer that generates a variable names itself as the site and yields itself
    from `variables`. `musigma.testing.check_layer` proves the result.

    Attributes:
        exact: False if inference draws anything that the generative direction does not determine.
        units: True if the layer speaks of how data are stored (levels, range), and not of them.
    """

    exact: bool = True
    units: bool = False

    @abstractmethod
    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Data to latents."""

    @abstractmethod
    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Latents to data."""

    def variables(self) -> Iterator[nn.Module]:
        """The sites of the variables that this layer generates, in the order of generation."""
        return iter(())

    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set data-dependent parameters from one batch; most layers have none."""


class Bijection(Layer):
    """A layer that is a pure function and has an inverse: it never sees the trace.

    Implement `forward` and `inverse`, each returning the value and the log |det| of its own
    direction, in nats per example, shape (B,).
    """

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to latents: ``(y, log |det dy/dx|)``."""

    @abstractmethod
    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents to data: ``(x, log |det dx/dy|)``."""

    def retrace(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, y, log_det)`` from y: x is a leaf, and the others are computed from it again.

        What a reversible backward pass goes by; work that both directions share may be done once.
        """
        with torch.no_grad():
            x, _ = self.inverse(y, context)
        x = x.detach().requires_grad_()
        return x, *self(x, context)

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """States its log-determinant, and nothing else."""
        return trace.bijection(self, x, context)

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """States its log-determinant, and nothing else."""
        return trace.bijection(self, z, context)


class Inverse(Bijection):
    """Another bijection, the other way round; it is not calibrated.

    Args:
        bijection: Its `inverse` becomes `forward`.
    """

    def __init__(self, bijection: Bijection):
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse of the bijection."""
        return self.bijection.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The bijection."""
        return self.bijection(y, context)


class Model(nn.Module, ABC):
    """A generative model of x with its inference: everything that can be asked of one.

    Batches come first; densities are in nats per example, shape (B,); latents are a tuple, the one
    that is generated first (the top) first. `context`, if any, has one row per example.

    Attributes:
        config: What the zoo built this model from, for checkpoints; empty for one made by hand.
        exact: Whether log w is log p(x): true of flows without dequantisation.
    """

    config: Mapping[str, Any] = {}
    exact: bool = False

    # -- what a model has to say

    @abstractmethod
    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> None:
        """Data to latents: state every term."""

    @abstractmethod
    def generate(self, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Latents to data: state every term, and return x."""

    @abstractmethod
    def variables(self) -> Iterator[nn.Module]:
        """The sites of all variables, in the order of generation."""

    @abstractmethod
    def latents(self) -> Iterator[nn.Module]:
        """The sites of the variables that `encode` returns: all but the observation."""

    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set data-dependent parameters from one batch: once, before training.

        An uncalibrated layer is the identity; nothing is ever set behind one's back.
        """

    # -- scoring

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, closed_form: bool = True
    ) -> Evidence:
        """The terms of log w for x (B, *event): what objectives are functions of."""
        trace = Trace(closed_form=closed_form)
        self.infer(self.floating(x), trace, context)
        return trace.evidence(self.latents())

    def elbo(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """A lower bound of log p(x) in nats, by one draw and closed-form KLs, shape (B,)."""
        return self(x, context).elbo

    def iwae(
        self, x: Tensor, k: int, context: Tensor | None = None, *, at_once: int = 256
    ) -> Tensor:
        """The importance-weighted bound log (1/k) Σ w_i of log p(x), in nats, shape (B,).

        It rises with k, and converges to log p(x) (Burda, Grosse, Salakhutdinov, "Importance
        Weighted Autoencoders", 2016, arXiv:1509.00519).

        Args:
            x: Data, shape (B, *event).
            k: The number of draws per example.
            context: One row per example, or None.
            at_once: How many (example, draw) pairs go through the networks together.
        """
        if k < 1:
            raise ValueError(f"k: expected 1 or more draws; got {k}")
        weights, left = [], k
        while left:
            c = min(left, max(1, at_once // len(x)))
            again = None if context is None else context.repeat_interleave(c, 0)
            log_w = self(x.repeat_interleave(c, 0), again, closed_form=False).elbo
            weights.append(log_w.reshape(len(x), c))
            left -= c
        return torch.cat(weights, 1).logsumexp(1) - math.log(k)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, shape (B,): a density for continuous data, so it may be positive.

        Raises:
            TypeError: If this model has only bounds of it.
        """
        if not self.exact:
            raise TypeError(
                f"log_prob: this {type(self).__name__} draws noise or latents in inference, so it "
                "has no exact log p(x); use elbo(x), or iwae(x, k) for a tighter bound"
            )
        return self(x, context, closed_form=False).elbo

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None, *, k: int = 1) -> Tensor:
        """-log p(x) / (D ln 2), or an upper bound of it where the model is not exact: (B,).

        D is the number of elements of one example. With k > 1 the bound is `iwae`'s.
        """
        nats = self.elbo(x, context) if self.exact or k == 1 else self.iwae(x, k, context)
        return -nats / (math.log(2) * x[0].numel())

    # -- latents

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: Temperature = 1.0,
        mode: bool = False,
    ) -> Tensor:
        """Draw n examples, shape (n, *event).

        Args:
            n: How many.
            context: One row for each of them, or None.
            temperature: Multiplies the standard deviation of every draw: a number, a tensor (n,)
                with one for each sample, or a sequence with one for each latent, top first.
            mode: Return the centre of p(x | latents) rather than a draw from it.
        """
        if context is not None and len(context) != n:
            raise ValueError(
                f"context: expected {n} rows, one for each sample; got {len(context)}"
            )
        trace = Trace(
            generating=True, n=n, scoring=False, temperature=self._temperatures(temperature, mode)
        )
        return self.generate(trace, context)

    def encode(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mode: bool = False,
        whiten: bool = False,
    ) -> tuple[Tensor, ...]:
        """The latents of x, top first: a draw from the posterior, or its centre.

        Args:
            x: Data, shape (B, *event).
            context: One row per example, or None.
            mode: Take the centre of every q (posterior mean, middle of a dequantised cell).
            whiten: Return (z - mean) / std under each latent's prior: standard noise if the model
                fits, and what interpolation is done in.
        """
        trace = Trace(temperature=0.0 if mode else 1.0, whiten=whiten, scoring=False)
        with torch.autocast(x.device.type, enabled=False):  # decode must see the same numbers
            self.infer(self.floating(x), trace, context)
        return tuple(trace.values[site] for site in self.latents())

    def decode(
        self,
        latents: Sequence[Tensor],
        context: Tensor | None = None,
        *,
        whiten: bool = False,
        temperature: Temperature = 1.0,
        mode: bool = True,
    ) -> Tensor:
        """The x of given latents; fewer than all of them, top first, draw the rest.

        For a flow ``decode(encode(x))`` is x, up to rounding; of integer data it is x to the
        letter from ``encode(x, mode=True)``, while a drawn dequantisation may lie within rounding
        of the edge of its cell. For a VAE it is the centre of p(x | latents), or a draw from it
        where `mode` is false. Both directions leave autocast.
        """
        sites = list(self.latents())
        if not 1 <= len(latents) <= len(sites):
            raise ValueError(f"latents: expected 1 to {len(sites)}, top first; got {len(latents)}")
        trace = Trace(
            generating=True,
            n=len(latents[0]),
            given=dict(zip(sites, latents, strict=False)),
            whiten=whiten,
            scoring=False,
            temperature=self._temperatures(temperature, mode),
        )
        with torch.autocast(latents[0].device.type, enabled=False):
            return self.generate(trace, context)

    def reconstruct(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Decode the centre of the posterior of x: what the latents know of it."""
        return self.decode(self.encode(x, context, mode=True), context)

    def interpolate(
        self,
        x0: Tensor,
        x1: Tensor,
        steps: int,
        context: Tensor | None = None,
        context1: Tensor | None = None,
        *,
        path: Literal["spherical", "linear"] = "spherical",
    ) -> Tensor:
        """Examples between x0 and x1, by way of their whitened latents: (B, steps, *event).

        On a `spherical` path every latent turns from one direction to the other at an even angle
        while its length changes evenly, so it stays where the prior has its mass (White, "Sampling
        Generative Networks", 2016, arXiv:1609.04468); a `linear` one cuts through the middle.
        `context` is that of x0, and `context1` of x1 where it differs; between them it is mixed.
        """
        if path not in ("spherical", "linear"):
            raise ValueError(f"path: expected 'spherical' or 'linear'; got {path!r}")
        if context is not None and context1 is None:
            context1 = context
        first = self.encode(x0, context, mode=True, whiten=True)
        last = self.encode(x1, context1, mode=True, whiten=True)
        between = _spherical if path == "spherical" else torch.lerp
        frames = []
        for t in torch.linspace(0, 1, steps, dtype=torch.float64).tolist():
            mixed = None
            if context is not None and context1 is not None:
                mixed = torch.lerp(context, context1, t)
            latents = [between(a, b, t) for a, b in zip(first, last, strict=True)]
            frames.append(self.decode(latents, mixed, whiten=True))
        return torch.stack(frames, 1)

    def as_distribution(self, context: Tensor | None = None) -> Distribution:
        """This model as a torch distribution, for use in others' code; exact models only."""
        if not self.exact:
            self.log_prob(torch.empty(0))
        return ModelDistribution(self, context)

    # -- the rest

    def continuous(self) -> Model:
        """The same model of continuous data: without dequantisation and the scaling to a range.

        Its input is what the first layer after those takes: for a flow of images in [-0.5, 0.5],
        such images. Where that is all there was to draw, its `log_prob` is exact, in nats. The
        parameters are shared. A model that has neither is returned as it is.
        """
        return self

    def floating(self, x: Tensor) -> Tensor:
        """Integer data in the type that this model computes in."""
        if x.is_floating_point():
            return x
        tensors = [*self.parameters(), *self.buffers()]
        dtypes = [t.dtype for t in tensors if t.is_floating_point()]
        return x.to(dtypes[0] if dtypes else torch.get_default_dtype())

    def _temperatures(
        self, temperature: Temperature, mode: bool
    ) -> dict[nn.Module, float | Tensor]:
        latents = list(self.latents())
        if isinstance(temperature, (int, float, Tensor)):
            by_site: dict[nn.Module, float | Tensor] = dict.fromkeys(self.variables(), temperature)
        elif len(temperature) == len(latents):
            by_site = dict(zip(latents, temperature, strict=True))
        else:
            raise ValueError(
                f"temperature: expected a number, a tensor of one per sample, or {len(latents)} "
                f"numbers, one per latent; got {len(temperature)} of them"
            )
        observed = [site for site in self.variables() if site not in latents]
        return by_site | dict.fromkeys(observed, 0.0) if mode else by_site


def _spherical(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate direction and length of two batches of whitened latents."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    length_a, length_b = (v.norm(dim=1, keepdim=True) for v in (flat_a, flat_b))
    unit_a, unit_b = (v / n.clamp(min=1e-12) for v, n in ((flat_a, length_a), (flat_b, length_b)))
    angle = torch.acos((unit_a * unit_b).sum(1, keepdim=True).clamp(-1, 1))
    sine = angle.sin()
    turned = (((1 - t) * angle).sin() * unit_a + (t * angle).sin() * unit_b) / sine
    straight = torch.lerp(unit_a, unit_b, t)
    direction = torch.where(sine > 1e-4, turned, straight)
    return (direction * torch.lerp(length_a, length_b, t)).view_as(a)


# --- the four models ---------------------------------------------------------------------------


class Prior(Model):
    """A distribution as a model: x ~ head(context).

    Args:
        head: A module whose ``forward(context)`` is a distribution over events.
    """

    exact = True

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> None:
        """P(x)."""
        trace.p(self, self.head(context), x)

    def generate(self, trace: Trace, context: Tensor | None = None) -> Tensor:
        """X ~ p."""
        return trace.p(self, self.head(context))

    def variables(self) -> Iterator[nn.Module]:
        """Itself."""
        yield self

    latents = variables


class Chain(Model):
    """Layers over a prior: a normalizing flow if the prior is a `Prior`.

    x passes the layers in order, and the prior scores what is left; log w has the log-determinant
    of every bijection, the factored-out latents of every `Split`, and the noise of a `Dequantize`.

    Args:
        layers: From the data upwards.
        prior: A model of what the last layer leaves.

    Raises:
        ValueError: If one module stands at two places: its terms would be counted once.
    """

    def __init__(self, layers: Iterable[Layer], prior: Model):
        super().__init__()
        self.layers, self.prior = nn.ModuleList(layers), prior
        self.keeper = Keeper()
        _refuse_twins([*self.layers, *prior.variables()])
        self.exact = prior.exact and all(layer.exact for layer in self._layers())
        self.over_likelihood = set(prior.latents()) != set(prior.variables())

    def _layers(self) -> Iterator[Layer]:
        return (cast(Layer, layer) for layer in self.layers)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """From where to where there are bijections, before each other layer and at the end."""
        at = 0
        for end, layer in enumerate([*self._layers(), None]):
            if not isinstance(layer, Bijection):
                yield at, end
                at = end + 1

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> None:
        """Every layer, then the prior; runs of bijections as `keeper` has it."""
        layers = list(self._layers())
        for at, end in self._runs():
            if end > at:
                x = trace.bijections(layers[at:end], x, context, partial(self.keeper, start=at))
            if end < len(layers):
                x = layers[end].infer(x, trace, context)
        if self.over_likelihood:
            trace.below.update(self.layers)
        self.prior.infer(x, trace, context)

    def generate(self, trace: Trace, context: Tensor | None = None) -> Tensor:
        """The prior, then every layer from the last to the first."""
        x = channels_last(self.prior.generate(trace, context))
        if self.over_likelihood:
            trace.below.update(self.layers)
        for layer in reversed(list(self._layers())):
            x = layer.generate(x, trace, context)
        return x

    def variables(self) -> Iterator[nn.Module]:
        """Those of the prior, then those of the layers from the last to the first."""
        yield from self.prior.variables()
        yield from self._own_variables()

    def latents(self) -> Iterator[nn.Module]:
        """Those of the prior, then the layers': what x is made from."""
        yield from self.prior.latents()
        yield from self._own_variables()

    def continuous(self) -> Model:
        """Without the leading layers that are but units; the prior alone if all are."""
        rest = list(itertools.dropwhile(lambda layer: layer.units, self._layers()))
        if len(rest) == len(self.layers):
            return self
        return Chain(rest, self.prior).train(self.training) if rest else self.prior

    def _own_variables(self) -> Iterator[nn.Module]:
        for layer in reversed(list(self._layers())):
            yield from layer.variables()

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """Every layer on what the layers below it make of x, then the prior."""
        x = self.floating(x)
        for layer in self._layers():
            layer.calibrate(x, context)
            parts = _in_parts(x, context)
            x = torch.cat([layer.infer(few, Trace(scoring=False), given) for few, given in parts])
        self.prior.calibrate(x, context)


def _in_parts(x: Tensor, context: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Some examples at a time, with their context: inside networks they take far more memory."""
    given = itertools.repeat(None) if context is None else context.split(64)
    return zip(x.split(64), given, strict=False)


class VAE(Model):
    r"""A variational autoencoder: z ~ prior, x ~ decoder(z), with q(z | x) = encoder(x).

    .. math:: \mathrm{ELBO} = E_q[\log p(x|z)] - KL(q(z|x) \| p(z))

    The KL is in closed form where the prior is a `Prior`, and sampled where it is another model:
    a flow (a `Chain`), or a further `VAE`. (Kingma & Welling, "Auto-Encoding Variational Bayes",
    2014, arXiv:1312.6114.)

    Args:
        encoder: A head: x, and the context if there is one, to the distribution of z.
        decoder: A head: z, and the context if there is one, to the distribution of x.
        prior: A model of z.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Model):
        super().__init__()
        self.encoder, self.decoder, self.prior = encoder, decoder, prior

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> None:
        """Z ~ q(z | x), then p(x | z) and p(z)."""
        q = conditioned(self.encoder, x, context)
        if isinstance(self.prior, Prior):
            z = trace.latent(self.prior, q, self.prior.head(context))
            trace.p(self, conditioned(self.decoder, z, context), x)
        else:
            z = trace.q(self, q)
            trace.p(self, conditioned(self.decoder, z, context), x)
            self.prior.infer(z, trace, context)

    def generate(self, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Z ~ p(z), then x ~ p(x | z)."""
        z = self.prior.generate(trace, context)
        x = trace.p(self, conditioned(self.decoder, z, context))
        if trace.scoring:
            site = self.prior if isinstance(self.prior, Prior) else self
            trace.q(site, conditioned(self.encoder, x, context), z)
        return x

    def variables(self) -> Iterator[nn.Module]:
        """Those of the prior, then the observation."""
        yield from self.prior.variables()
        yield self

    def latents(self) -> Iterator[nn.Module]:
        """The variables of the prior: z, or what a flow makes of it."""
        yield from self.prior.variables()

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """The prior, on draws from the posterior."""
        parts = _in_parts(self.floating(x), context)
        z = torch.cat([conditioned(self.encoder, *few).sample() for few in parts])
        self.prior.calibrate(z, context)


class LadderBlock(nn.Module):
    """One latent of a `Ladder`: its prior, its posterior, and what it does to the state.

    Args:
        prior: A head: the state (B, C, H, W) to p(z | state).
        posterior: A head: the state and the bottom-up features, joined on axis 1, to q(z | ...).
        merge: ``merge(state, z)`` to the state of the next block.
    """

    def __init__(self, prior: nn.Module, posterior: nn.Module, merge: nn.Module):
        super().__init__()
        self.prior, self.posterior, self.merge = prior, posterior, merge


class Ladder(Model):
    r"""A top-down hierarchical VAE: every posterior sees the data and the state from above.

    .. math:: p(x, z) = p(x | h_L) \prod_l p(z_l | h_{l-1}), \quad h_l = merge(h_{l-1}, z_l)

    with q(z_l | h_{l-1}, x), so each KL is between two Gaussians that share their state, and has a
    closed form (Sønderby et al., "Ladder Variational Autoencoders", 2016, arXiv:1602.02282; Child,
    "Very Deep VAEs", 2021, arXiv:2011.10650).

    Args:
        bottom_up: x to a sequence of features, one for each block, top first.
        blocks: The latents, top first.
        decoder: A head: the last state to the distribution of x.
        state: The shape (C, H, W) of the first state, which is a learned constant.
    """

    def __init__(
        self,
        bottom_up: nn.Module,
        blocks: Iterable[LadderBlock],
        decoder: nn.Module,
        state: Sequence[int],
    ):
        super().__init__()
        self.bottom_up, self.blocks, self.decoder = bottom_up, nn.ModuleList(blocks), decoder
        self.top = nn.Parameter(torch.zeros(1, *state))
        _refuse_twins(list(self.blocks))

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> None:
        """From the top: z ~ q(z | state, x), paired with p(z | state); at last p(x | state)."""
        state = self._start(len(x))
        for block, seen in zip(self._rungs(), self._features(x, context), strict=True):
            q = block.posterior(torch.cat([state, seen], 1))
            z = trace.latent(block, q, conditioned(block.prior, state, context))
            state = block.merge(state, z)
        trace.p(self, conditioned(self.decoder, state, context), x)

    def generate(self, trace: Trace, context: Tensor | None = None) -> Tensor:
        """From the top: z ~ p(z | state); at last x ~ p(x | state)."""
        n = trace.n if context is None else len(context)
        if n is None:
            raise ValueError("n: a ladder must be told how many examples to generate")
        state = self._start(n)
        passed = []
        for block in self._rungs():
            z = trace.p(block, conditioned(block.prior, state, context))
            passed.append((block, state, z))
            state = block.merge(state, z)
        x = trace.p(self, conditioned(self.decoder, state, context))
        if trace.scoring:
            pairs = zip(passed, self._features(x, context), strict=True)
            for (block, state, z), seen in reversed(list(pairs)):
                trace.q(block, block.posterior(torch.cat([state, seen], 1)), z)
        return x

    def _start(self, n: int) -> Tensor:
        return self.top.expand(n, *self.top.shape[1:])

    def _rungs(self) -> Iterator[LadderBlock]:
        return (cast(LadderBlock, block) for block in self.blocks)

    def _features(self, x: Tensor, context: Tensor | None) -> Sequence[Tensor]:
        return conditioned(self.bottom_up, x, context)

    def variables(self) -> Iterator[nn.Module]:
        """The blocks from the top, then the observation."""
        yield from self.blocks
        yield self

    def latents(self) -> Iterator[nn.Module]:
        """The blocks from the top."""
        yield from self.blocks


def _refuse_twins(modules: list[nn.Module]) -> None:
    seen: set[int] = set()
    for module in modules:
        if id(module) in seen:
            raise ValueError(
                f"layers: one {type(module).__name__} stands at two places, so its terms would be "
                "counted once; make a second instance (its networks may be shared)"
            )
        seen.add(id(module))
