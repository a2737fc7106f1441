"""Layers and models: each reports its terms to a `Trace`, once per direction.

A `Layer` maps x to z; a `Bijection` is a layer that is an invertible function. A `Model` is a
complete model of x, and inherits scoring, sampling, encoding, decoding, reconstruction and
interpolation. There are four models: `Prior`, `Chain` (flows), `VAE`, and `musigma.ladder.Ladder`.
The prior of a chain or a VAE is itself a model, so models nest to any depth.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from musigma import context as contexts
from musigma.context import Context, conditioned
from musigma.distributions import ModelDistribution
from musigma.layer import Bijection, Inverse, Layer
from musigma.memory import Runner
from musigma.spec import Spec, bits_per_dim
from musigma.tensors import channels_last, slerp
from musigma.trace import Evidence, Recorder, Trace, check_enumerable, refuse_twins

__all__ = [
    "VAE",
    "Bijection",
    "Chain",
    "Inverse",
    "Layer",
    "Model",
    "Prior",
]

Temperature = float | Tensor | Sequence[float | Tensor]

AT_ONCE = 8192
"""Vectors that are scored together without gradients; more would not stay in the caches."""


class Model(nn.Module, ABC):
    """A generative model of x, with its inference.

    The first dimension of every tensor is the batch. In every method, `x` is data, of shape
    (B, *event), and `context` has one row per example; without a context it is None. Densities are
    in nats per example, shape (B,). Latents are a tuple, top first (in the order of generation).

    Attributes:
        config: Architecture, shape and options from which the zoo built this model, for
            checkpoints; empty for a model that was composed by hand.
        spec: The shape and levels of the data, and the context; None if it was not set.
        former_digest: The digest that `.mus` files of an earlier version hold for this model, if
            it was loaded from a checkpoint of that version.
        exact: Whether log w is log p(x): true for flows without dequantization.
        no_latents: Why this model has no latents to encode; empty if it has.
    """

    config: Mapping[str, Any] = {}
    spec: Spec | None = None
    former_digest: str | None = None
    exact: bool = False
    no_latents: str = ""

    # -- what a model implements

    @abstractmethod
    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """Map data to latents, and report every term to the trace."""

    @abstractmethod
    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """Map latents to data, report every term to the trace, and return x."""

    @abstractmethod
    def variables(self) -> Iterator[nn.Module]:
        """The sites of all variables, in the order of generation."""

    @abstractmethod
    def latents(self) -> Iterator[nn.Module]:
        """The sites of the variables that `encode` returns: all but the observation."""

    def calibrate(self, x: Tensor, context: Any = None) -> None:
        """Set data-dependent parameters from one batch, once, before training.

        Only this method calibrates layers; a layer that is not calibrated is the identity.
        """

    @property
    def is_flow(self) -> bool:
        """Whether every variable is a latent, so the model has no likelihood."""
        return set(self.latents()) == set(self.variables())

    def site_names(self) -> dict[nn.Module, str]:
        """The dotted name of every module; `model` for this one."""
        return {module: name or "model" for name, module in self.named_modules()}

    # -- scoring

    def forward(
        self,
        x: Tensor,
        context: Context = None,
        *,
        closed_form: bool = True,
        trace: Trace | None = None,
    ) -> Evidence:
        """The terms of log w for x, from which objectives are computed.

        If a distribution names `enumerate` as its gradient, all of its values are scored, and
        each term is its exact expectation under q.

        Args:
            closed_form: Whether to use closed-form KL divergences where torch has them.
            trace: The trace that records the terms (for example, a `Recorder`). Its own
                `closed_form` applies. By default a new one.

        Raises:
            ValueError: If a draw carries no gradient to the encoder and names no estimator, or if
                there are too many values to enumerate.
        """
        contexts.check(self.spec, context, len(x))
        trace = trace if trace is not None else Trace(closed_form=closed_form)
        self.infer(self.floating(x), trace, context)
        evidence = trace.evidence(self.latents())
        if trace.supports:
            evidence = self._enumerated(x, context, trace)
        if isinstance(trace, Recorder):
            trace.finish(self, x, context, evidence)
        return evidence

    def _enumerated(self, x: Tensor, context: Context, trace: Trace) -> Evidence:
        """The expectation of the evidence over all values of the draws that are enumerated."""
        sizes = [len(support) for support in trace.supports.values()]
        n, k = len(x), math.prod(sizes)
        check_enumerable(k)
        which = torch.cartesian_prod(*map(torch.arange, sizes)).reshape(k, -1).unbind(1)
        given = {}  # (n k, *event): all values of an example in a row
        for (site, support), index in zip(trace.supports.items(), which, strict=True):
            values = support[index].expand(k, n, *support.shape[2:])
            given[site] = values.transpose(0, 1).flatten(0, 1)
        again = Trace(given=given, closed_form=trace.closed_form)
        self.infer(self.floating(x).repeat_interleave(k, 0), again, contexts.repeat(context, k))
        evidence = again.evidence(self.latents())
        log_q = torch.stack([again.scores.pop(site) for site in given]).sum(0)
        weights = log_q.reshape(n, k).exp()

        def expected(term: Tensor) -> Tensor:
            each = term.reshape(n, k, *term.shape[1:])
            return torch.einsum("bk,bk...->b...", weights.to(each), each)

        score = sum(again.scores.values(), 0 * evidence.score)
        return evidence._replace(
            **{name: expected(getattr(evidence, name)) for name in evidence._fields[:5]},
            score=score.reshape(n, k).sum(1),  # every draw affects the expectation
            kl_sampled=evidence.kl_sampled[::k],
        )

    def elbo(self, x: Tensor, context: Context = None) -> Tensor:
        """A lower bound of log p(x) in nats, from one draw and closed-form KLs, shape (B,)."""
        return self(x, context).elbo

    def iwae(self, x: Tensor, k: int, context: Context = None, *, at_once: int = 256) -> Tensor:
        """The importance-weighted bound log (1/k) Σ w_i of log p(x), in nats, shape (B,).

        It rises with k, and converges to log p(x) (Burda, Grosse, Salakhutdinov, "Importance
        Weighted Autoencoders", 2016, arXiv:1509.00519).

        Args:
            k: The number of draws per example.
            at_once: Number of (example, draw) pairs per pass.

        Raises:
            ValueError: If k is below 1.
        """
        parts = self.log_weights(x, k, context, at_once=at_once)
        return reduce(torch.logaddexp, (part.logsumexp(1) for part in parts)) - math.log(k)

    def log_weights(
        self, x: Tensor, k: int, context: Context = None, *, at_once: int = 256
    ) -> Iterator[Tensor]:
        """log w of k draws for each example, in nats: parts (B, m) whose m add up to k.

        A pass has at most `at_once` pairs of an example and a draw, and at least one draw of each
        example. The encoder of a `VAE` or a ladder runs for the first pass, not for every draw.

        Args:
            x: Data, shape (B, *event).
            k: The number of draws per example.
            context: One row per example, or None.
            at_once: Number of (example, draw) pairs per pass.

        Raises:
            ValueError: If k is below 1.
        """
        if k < 1:
            raise ValueError(f"k: expected 1 or more draws; got {k}")
        x, most = self.floating(x), max(1, at_once // len(x))
        encodings, rows, given = {}, x[:0], context
        for start in range(0, k, most):
            draws = min(most, k - start)
            if len(rows) != draws * len(x):  # in the first pass, and perhaps in the last
                rows, given = x.repeat_interleave(draws, 0), contexts.repeat(context, draws)
            trace = Trace(encodings=encodings)
            yield self(rows, given, trace=trace).elbo.reshape(len(x), draws)

    def log_prob(self, x: Tensor, context: Context = None) -> Tensor:
        """log p(x) in nats, shape (B,): a density for continuous data, so it may be positive.

        Raises:
            TypeError: If this model is not `exact`, so it has only bounds of log p(x).
        """
        self.require_exact("log_prob")
        if x.ndim == 2 and len(x) > AT_ONCE and not torch.is_grad_enabled():
            parts = contexts.in_parts(x, context, AT_ONCE)
            return torch.cat([self.log_prob(*part) for part in parts])
        return self(x, context, closed_form=False).elbo

    def log_prob_each(self, x: Tensor, context: Context = None) -> Tensor | None:
        """log p(x) under each of the densities that this model mixes in equal parts, nats (B, R).

        None if this model is no such mixture.
        """
        return None

    def require_exact(self, name: str) -> None:
        """Refuse a method or an option of a name for a model that is not `exact`.

        Raises:
            TypeError: If it is not.
        """
        if not self.exact:
            raise TypeError(
                f"{name}: this {type(self).__name__} draws noise or latents in inference, so it "
                "has no exact log p(x); use elbo(x), or iwae(x, k) for a tighter bound"
            )

    def bits_per_dim(self, x: Tensor, context: Context = None, *, k: int = 1) -> Tensor:
        """-log p(x) / (D ln 2), or an upper bound of it if the model is not exact, shape (B,).

        D is the number of elements of one example. With k > 1 the bound is `iwae`'s.
        """
        nats = self.elbo(x, context) if self.exact or k == 1 else self.iwae(x, k, context)
        return bits_per_dim(-nats, x[0].numel())

    # -- latents

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Context = None,
        *,
        temperature: Temperature = 1.0,
        mode: bool = False,
    ) -> Tensor:
        """Draw n examples, shape (n, *event).

        Args:
            n: Number of examples.
            temperature: Multiplies the standard deviation of every draw: a number, a tensor (n,)
                with one for each sample, or a sequence with one for each latent, top first.
            mode: Return the center of p(x | latents) rather than a draw from it.

        Raises:
            ValueError: If the context does not have n rows, the number of temperatures is wrong,
                or a distribution supports only temperatures 0 and 1.
        """
        contexts.check(self.spec, context, n)
        trace = Trace(
            generating=True, n=n, scoring=False, temperature=self._temperatures(temperature, mode)
        )
        return self.generate(trace, context)

    @torch.no_grad()
    def sample_and_log_prob(self, n: int, context: Context = None) -> tuple[Tensor, Tensor]:
        """Draw n examples, and score them in the same pass: x (n, *event), and log p(x) (n,).

        Args:
            n: Number of examples.
            context: As in `sample`.

        Raises:
            TypeError: As `log_prob`.

        Example:
            >>> import musigma
            >>> model = musigma.testing.randomized(musigma.build("nsf", (3,), depth=2))
            >>> x, log_prob = model.sample_and_log_prob(4)
            >>> torch.allclose(log_prob, model.log_prob(x))
            True
        """
        return self.rsample_and_log_prob(n, context)

    def rsample_and_log_prob(self, n: int, context: Context = None) -> tuple[Tensor, Tensor]:
        """As `sample_and_log_prob`, with gradients where the draws are reparameterized."""
        self.require_exact("sample_and_log_prob")
        contexts.check(self.spec, context, n)
        trace = Trace(generating=True, n=n)
        return self.generate(trace, context), trace.evidence(self.latents()).elbo

    def encode(
        self,
        x: Tensor,
        context: Context = None,
        *,
        mode: bool = False,
        whiten: bool = False,
    ) -> tuple[Tensor, ...]:
        """The latents of x, top first: a draw from the posterior, or its center.

        Args:
            mode: Use the center of every q (posterior mean, middle of a dequantization cell)
                instead of a draw.
            whiten: Return (z - mean) / std under each latent's prior, which is standard normal if
                the model fits. `interpolate` works on these values.
        """
        contexts.check(self.spec, context)
        trace = Trace(temperature=0.0 if mode else 1.0, whiten=whiten, scoring=False)
        with torch.autocast(x.device.type, enabled=False):  # decode must see the same numbers
            self.infer(self.floating(x), trace, context)
        return tuple(trace.values[site] for site in self.latents())

    def decode(
        self,
        latents: Sequence[Tensor],
        context: Context = None,
        *,
        whiten: bool = False,
        temperature: Temperature = 1.0,
        mode: bool = True,
    ) -> Tensor:
        """Generate x from given latents, top first; latents that are not given are drawn.

        For a flow, ``decode(encode(x))`` is x up to rounding. For integer data,
        ``decode(encode(x, mode=True))`` is exactly x; drawn dequantization noise can lie within
        rounding error of the edge of its cell. For a VAE the result is the center of
        p(x | latents), or a draw from it if `mode` is false. `encode` and `decode` disable
        autocast.

        Args:
            latents: As `encode` returns them; at least the first.
            whiten: Whether the latents are (z - mean) / std under their priors.
            temperature: As in `sample`.
            mode: As in `sample`.

        Raises:
            ValueError: If there are no latents, or too many.
        """
        contexts.check(self.spec, context)
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

    def reconstruct(self, x: Tensor, context: Context = None) -> Tensor:
        """Decode the center of the posterior of x."""
        return self.decode(self.encode(x, context, mode=True), context)

    def interpolate(
        self,
        x0: Tensor,
        x1: Tensor,
        steps: int,
        context: Context = None,
        context1: Context = None,
        *,
        path: Literal["spherical", "linear"] = "spherical",
    ) -> Tensor:
        """Interpolate between x0 and x1 in whitened latents: (B, steps, *event).

        On a `spherical` path the direction of every latent changes at a constant angular rate and
        its length changes linearly, so it stays where the prior has its mass (White, "Sampling
        Generative Networks", 2016, arXiv:1609.04468). A `linear` path is a straight line.

        Args:
            x0: Data, shape (B, *event).
            x1: Data of the same shape.
            steps: Number of examples on each path, with both ends.
            context: Context of x0, one row per example, or None.
            context1: Context of x1; by default that of x0. Contexts are interpolated linearly.
            path: `spherical` or `linear`.

        Raises:
            ValueError: For another path.
        """
        if path not in ("spherical", "linear"):
            raise ValueError(f"path: expected 'spherical' or 'linear'; got {path!r}")
        context1 = context if context1 is None else context1
        first = self.encode(x0, context, mode=True, whiten=True)
        last = self.encode(x1, context1, mode=True, whiten=True)
        between = slerp if path == "spherical" else torch.lerp
        frames = []
        for t in torch.linspace(0, 1, steps, dtype=torch.float64).tolist():
            latents = [between(a, b, t) for a, b in zip(first, last, strict=True)]
            frames.append(self.decode(latents, contexts.lerp(context, context1, t), whiten=True))
        return torch.stack(frames, 1)

    def given(self, context: Context) -> tuple[Model, Context]:
        """A model and a context that are equivalent to this model given this context.

        All that depends on the context alone is computed, once for each row. To draw k examples
        for each row, or to score k, repeat the rows of the result instead of those of the context.
        """
        return self, context

    def as_distribution(self, context: Context = None) -> ModelDistribution:
        """This model as a `torch.distributions.Distribution`.

        Whatever depends on the context alone is computed once for each of its rows.

        Raises:
            TypeError: If the model is not `exact`.
        """
        self.require_exact("as_distribution")
        contexts.check(self.spec, context)
        return ModelDistribution(*self.given(context), spec=self.spec)

    # -- conversions

    def continuous(self) -> Model:
        """The same model without its preprocessing layers (dequantization, scaling to a range).

        Its input is that of the next layer, for example images in [-0.5, 0.5]; for a flow its
        `log_prob` is exact. Parameters are shared. Other models are returned unchanged.
        """
        return self

    def floating(self, x: Tensor) -> Tensor:
        """Integer data in the floating-point type of this model; other data unchanged."""
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


# --- models ------------------------------------------------------------------------------------


class Prior(Model):
    """A distribution as a model: x ~ head(context).

    Args:
        head: A module whose ``forward(context)`` is a distribution over events.
    """

    exact = True

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """Score x under p."""
        trace.p(self, self.head(context), x)

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """Draw x from p."""
        return trace.p(self, self.head(context))

    def variables(self) -> Iterator[nn.Module]:
        """This module itself."""
        yield self

    latents = variables

    def calibrate(self, x: Tensor, context: Any = None) -> None:
        """Calibrate the head, if it has a `calibrate(x)`."""
        if (calibrate := getattr(self.head, "calibrate", None)) is not None:
            calibrate(x)


class Chain(Model):
    """Layers over a prior: a normalizing flow if the prior is a `Prior`.

    x passes through the layers in order, and the prior scores the result. log w includes the
    log-determinant of every bijection, the latents of every `Split`, and the noise of a
    `Dequantize`.

    Args:
        layers: From the data upwards.
        prior: A model of the output of the last layer.

    Raises:
        ValueError: If one module is used in two places.
    """

    layers: Any  # a ModuleList of layers

    def __init__(self, layers: Iterable[Layer], prior: Model):
        super().__init__()
        self.layers, self.prior = nn.ModuleList(layers), prior
        self.runner = Runner()
        refuse_twins([*self.layers, *prior.variables()])
        self.exact = prior.exact and all(layer.exact for layer in self.layers)
        self.over_likelihood = not prior.is_flow

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Start and end of each run of bijections; one that overrides `infer` ends a run."""
        at = 0
        for end, layer in enumerate([*self.layers, None]):
            if layer is None or type(layer).infer is not Bijection.infer:
                yield at, end
                at = end + 1

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """Every layer, then the prior; runs of bijections by `runner`."""
        layers = list(self.layers)
        for at, end in self._runs():
            if end > at:
                x = trace.bijections(layers[at:end], x, context, partial(self.runner, start=at))
            if end < len(layers):
                x = layers[end].infer(x, trace, context)
        if self.over_likelihood:
            trace.below.update(self.layers)
        self.prior.infer(x, trace, context)

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """The prior, then every layer from the last to the first."""
        x = channels_last(self.prior.generate(trace, context))
        if self.over_likelihood:
            trace.below.update(self.layers)
        for layer in reversed(self.layers):
            x = layer.generate(x, trace, context)
        return x

    def variables(self) -> Iterator[nn.Module]:
        """Those of the prior, then those of the layers from the last to the first."""
        yield from self.prior.variables()
        yield from self._layer_variables()

    def latents(self) -> Iterator[nn.Module]:
        """Those of the prior, then the variables of the layers from the last to the first."""
        yield from self.prior.latents()
        yield from self._layer_variables()

    def continuous(self) -> Model:
        """Without the leading preprocessing layers; only the prior if all layers are."""
        rest = list(itertools.dropwhile(lambda layer: layer.is_preprocessing, self.layers))
        if len(rest) == len(self.layers):
            return self
        return Chain(rest, self.prior).train(self.training) if rest else self.prior

    def _layer_variables(self) -> Iterator[nn.Module]:
        for layer in reversed(self.layers):
            yield from layer.variables()

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: Any = None) -> None:
        """Calibrate every layer on the output of the layers below it, then the prior."""
        x = self.floating(x)
        for layer in self.layers:
            layer.calibrate(x, context)
            parts = contexts.in_parts(x, context)
            x = torch.cat([layer.infer(part, Trace(scoring=False), rows) for part, rows in parts])
        self.prior.calibrate(x, context)


class VAE(Model):
    r"""A variational autoencoder: z ~ prior, x ~ decoder(z), with q(z | x) = encoder(x).

    .. math:: \mathrm{ELBO} = E_q[\log p(x|z)] - KL(q(z|x) \| p(z))

    The KL is in closed form, if there is one, when the prior is a `Prior`; it is sampled when the
    prior is another model, such as a flow (a `Chain`) or another `VAE`. (Kingma & Welling,
    "Auto-Encoding Variational Bayes", 2014, arXiv:1312.6114.)

    Args:
        encoder: A head: x, and the context if there is one, to the distribution of z.
        decoder: A head: z, and the context if there is one, to the distribution of x.
        prior: A model of z.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: Model):
        super().__init__()
        self.encoder, self.decoder, self.prior = encoder, decoder, prior

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """z ~ q(z | x), then p(x | z) and p(z)."""
        q = trace.encoding(self.encoder, x, context)
        if isinstance(self.prior, Prior):
            z = trace.latent(self.prior, q, self.prior.head(context))
            trace.p(self, conditioned(self.decoder, z, context), x)
        else:
            z = trace.q(self, q)
            trace.p(self, conditioned(self.decoder, z, context), x)
            self.prior.infer(z, trace, context)

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """z ~ p(z), then x ~ p(x | z)."""
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
        """The variables of the prior: z, or the latents of a flow prior."""
        return self.prior.variables()

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: Any = None) -> None:
        """Calibrate the prior on x, if its head has `calibrate_on_data`, or draws of q(z | x)."""
        x = self.floating(x)
        if on_data := getattr(getattr(self.prior, "head", None), "calibrate_on_data", None):
            on_data(x)
        parts = contexts.in_parts(x, context)
        z = torch.cat([conditioned(self.encoder, *part).sample() for part in parts])
        self.prior.calibrate(z, context)
