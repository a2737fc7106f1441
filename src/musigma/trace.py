"""What a pass through a model is doing: how choices are made, and what is kept of them.

For an observation x, latents z, an inference distribution q and bijections f,

    log w(x, z) = Σ log p(site | above) - Σ log q(draw | below) + Σ log |det ∂f/∂x|
    E_q[log w] = ELBO ≤ log p(x),     E log (1/k) Σ w_i = IWAE_k ≤ log p(x)

and log w = log p(x), exactly, where nothing is drawn. Every part of a model states its terms of
that sum once per direction, by two verbs which are mirror images:

    infer:      p scores a known value      q draws           (data -> latents)
    generate:   p draws                     q scores          (latents -> data)

A `Trace` decides what "draw" and "score" mean. The one here serves training, evaluation,
sampling, encoding, decoding and interpolation; a subclass may serve another purpose, as
`musigma.coding.Coder` does, for which a draw takes bits off a stack and a score puts them there.
So a part of a model states its terms in an order that can be undone: what it generates from z
is scored before z itself is, and q is scored, while generating, in the reverse of the order in
which it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from musigma.gaussian import DiagonalGaussian

__all__ = ["Evidence", "Trace"]

Site = nn.Module
"""A variable is known by the module that generates it, so layers need no names for latents."""


class Evidence(NamedTuple):
    """The terms of log w, in nats: tensors only.

    Attributes:
        log_px: log p(x | latents), shape (B,), with the terms of any layers between x and the
            likelihood (dequantisation, change of units); zero for a pure flow.
        kl: One column per latent, top first, shape (B, latents): KL(q || p) where q and p are
            paired and the closed form was asked for, log q - log p of the draw where it was not,
            and -log p where no q belongs to the latent (the latents of a flow).
        log_q: log q of all other draws (dequantisation noise, a posterior under a flow), (B,).
        log_det: Sum of log |det| of all bijections, data to latents, (B,).
        aside: What a model is to be trained for besides (a classifier's log q(y | z)), nats, (B,);
            no part of log w, of the ELBO, or of any figure.
    """

    log_px: Tensor
    kl: Tensor
    log_q: Tensor
    log_det: Tensor
    aside: Tensor = torch.zeros(())

    @property
    def rate(self) -> Tensor:
        """What the latents cost: everything but log p(x | latents), nats, shape (B,)."""
        return self.kl.sum(1) + self.log_q - self.log_det

    @property
    def elbo(self) -> Tensor:
        """log_px - rate: log w where no closed form was used, and its expectation, (B,)."""
        return self.log_px - self.rate


def _once(terms: dict[Site, Tensor], site: Site) -> dict[Site, Tensor]:
    """The terms, if the site has none among them yet."""
    if site in terms:
        raise ValueError(
            f"layers: one {type(site).__name__} stands at two places, so its terms would be "
            "counted once; make a second instance (its networks may be shared)"
        )
    return terms


class Trace:
    """One pass through a model.

    Args:
        generating: The direction: latents to data if true, data to latents otherwise.
        n: How many examples to draw, where no given latent and no context tells.
        given: Values of sites that are not to be drawn while generating.
        temperature: Multiplies the standard deviation of every draw: a number, one number per
            example (B,), or a mapping from sites to either (1 for those it lacks). At 0 a draw is
            the distribution's centre: its mode if discrete, its mean otherwise.
        whiten: Values of Gaussian sites are kept, and taken, as (value - mean) / std.
        scoring: Whether terms are recorded; sampling does without.
        closed_form: Whether a paired q and p give their KL divergence instead of log q - log p.
    """

    def __init__(
        self,
        *,
        generating: bool = False,
        n: int | None = None,
        given: Mapping[Site, Tensor] | None = None,
        temperature: float | Tensor | Mapping[Site, float | Tensor] = 1.0,
        whiten: bool = False,
        scoring: bool = True,
        closed_form: bool = False,
    ):
        self.generating, self.n, self.whiten = generating, n, whiten
        self.given: Mapping[Site, Tensor] = given or {}
        self.temperature, self.scoring, self.closed_form = temperature, scoring, closed_form
        self.values: dict[Site, Tensor] = {}
        self.log_p: dict[Site, Tensor] = {}
        self.kl: dict[Site, Tensor] = {}
        self.log_q: dict[Site, Tensor] = {}
        self.log_det: dict[Site, Tensor] = {}
        self.asides: dict[Site, Tensor] = {}
        self.below: set[Site] = set()  # layers between the data and a likelihood

    def p(self, site: Site, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """A term of the generative model: scores `value` while inferring, makes it otherwise."""
        if self.generating:
            value = self._choose(site, dist, self.given.get(site))
        if value is None:
            raise ValueError(f"value: {type(site).__name__} must give p a value while inferring")
        self._keep(site, dist, value)
        if self.scoring:
            _once(self.log_p, site)[site] = dist.log_prob(value)
        return value

    def q(self, site: Site, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """A term of the inference model: makes a value while inferring, scores it otherwise."""
        if not self.generating:
            value = self._choose(site, dist, None)
        if value is None:
            raise ValueError(f"value: {type(site).__name__} must give q a value while generating")
        if self.scoring:
            _once(self.log_q, site)[site] = dist.log_prob(value)
        return value

    def latent(self, site: Site, q: Distribution, p: Distribution) -> Tensor:
        """Draw a latent from q, while inferring, and state both its terms.

        Only legal where p was known before the draw (a prior without a chain below it, a block of
        a top-down ladder): elsewhere the closed-form KL would be biased.
        """
        value = self._choose(site, q, None)
        self._keep(site, p, value)
        if self.scoring:
            self.kl[site] = (
                kl_divergence(q, p) if self.closed_form else q.log_prob(value) - p.log_prob(value)
            )
        return value

    def bijection(self, layer: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
        """An exact change of variables by a `Bijection`, in the direction of this trace."""
        if self.generating:
            value, log_det = layer.inverse(x, context)  # pyright: ignore[reportCallIssue]
            log_det = -log_det
        else:
            value, log_det = layer(x, context)
        if self.scoring:
            _once(self.log_det, layer)[layer] = log_det
        return value

    def bijections(
        self,
        layers: Sequence[nn.Module],
        x: Tensor,
        context: Tensor | None,
        run: Callable[..., tuple[Tensor, Sequence[Tensor]]],
    ) -> Tensor:
        """Several bijections in a row, while inferring, by ``run(layers, x, context)``."""
        x, log_dets = run(layers, x, context)
        if self.scoring:
            for layer, log_det in zip(layers, log_dets, strict=True):
                _once(self.log_det, layer)[layer] = log_det
        return x

    def aside(self, site: Site, term: Tensor) -> None:
        """State nats (B,) that training should raise, and that are no part of log w."""
        if self.scoring:
            _once(self.asides, site)[site] = term

    def evidence(self, latents: Iterable[Site]) -> Evidence:
        """The terms that were recorded, with one column for each of `latents`."""
        latents = list(latents)
        terms = [*self.log_p.values(), *self.kl.values(), *self.log_q.values()]
        zero = torch.zeros_like(terms[0])
        log_px = sum((v for s, v in self.log_p.items() if s not in latents), zero)
        log_px = log_px + sum(v for s, v in self.log_det.items() if s in self.below)
        log_px = log_px - sum(v for s, v in self.log_q.items() if s in self.below)
        columns = [self.kl[s] if s in self.kl else -self.log_p[s] for s in latents]
        return Evidence(
            log_px=log_px,
            kl=torch.stack(columns, 1) if columns else zero.new_zeros(len(zero), 0),
            log_q=sum((v for s, v in self.log_q.items() if s not in self.below), zero),
            log_det=sum((v for s, v in self.log_det.items() if s not in self.below), zero),
            aside=sum(self.asides.values(), zero),
        )

    def _choose(self, site: Site, dist: Distribution, given: Tensor | None) -> Tensor:
        if given is not None:
            if self.whiten and isinstance(dist, DiagonalGaussian):
                return dist.unwhiten(given)
            return given
        shape = () if dist.batch_shape or self.n is None else (self.n,)
        temperature = self.temperature
        if isinstance(temperature, Mapping):
            temperature = temperature.get(site, 1.0)
        if not isinstance(temperature, Tensor) and temperature == 0.0:
            discrete = dist.support is not None and dist.support.is_discrete
            centre = dist.mode if discrete else dist.mean
            return centre.expand(*shape, *centre.shape)
        draw = dist.rsample if dist.has_rsample else dist.sample
        if not isinstance(temperature, Tensor) and temperature == 1.0:
            return draw(shape)
        try:
            return draw(shape, temperature=temperature)  # pyright: ignore[reportCallIssue]
        except TypeError:
            raise ValueError(
                f"temperature: {type(dist).__name__} draws at temperatures 0 and 1 only; give its "
                "sample an argument `temperature` to do more"
            ) from None

    def _keep(self, site: Site, dist: Distribution, value: Tensor) -> None:
        if self.whiten and isinstance(dist, DiagonalGaussian):
            value = dist.whiten(value)
        self.values[site] = value
