"""One pass through a model: how values are chosen, and which terms are recorded.

For an observation x, latents z, an inference distribution q and bijections f,

    log w(x, z) = Σ log p(site | above) - Σ log q(draw | below) + Σ log |det ∂f/∂x|
    E_q[log w] = ELBO ≤ log p(x),     E log (1/k) Σ w_i = IWAE_k ≤ log p(x)

If nothing is drawn, log w = log p(x) exactly. Every part of a model reports its terms of this
sum once per direction, with two operations that mirror each other:

    infer:      p scores a known value      q draws           (data -> latents)
    generate:   p draws                     q scores          (latents -> data)

A `Trace` decides what "draw" and "score" mean. `Trace` itself serves training, evaluation,
sampling, encoding, decoding and interpolation. A `Recorder` also keeps the distributions, for
objectives and diagnostics. Other subclasses give the operations another meaning: in
`musigma.coding.Coder` a draw pops bits from a stack, and a score pushes bits onto it. Therefore a
model reports its terms in an order that can be reversed: it scores a value generated from z before
it scores z, and while generating it scores q in the reverse of the order of its draws.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl, kl_divergence

from musigma.context import conditioned
from musigma.tensors import frozen

__all__ = ["Evidence", "Recorder", "Trace", "with_gradient"]

Site = nn.Module
"""A site is the module that generates a variable, and identifies it: latents need no names."""


class Evidence(NamedTuple):
    """The terms of log w, in nats: tensors only.

    Attributes:
        log_px: log p(x | latents), shape (B,), with the terms of any layers between x and the
            likelihood (dequantization, rescaling); zero for a flow.
        kl: One column per latent, top first, shape (B, latents). If q and p are paired, this is
            KL(q || p) in closed form, if that was requested and exists, or log q - log p of the
            draw. If the latent has no q (the latents of a flow), it is -log p.
        log_q: log q of all other draws (dequantization noise, a posterior under a flow), (B,).
        log_det: Sum of log |det| of all bijections, data to latents, (B,).
        auxiliary: Additional terms that training maximizes (a classifier's log q(y | z)), (B,).
            They are not part of log w, of the ELBO, or of any figure.
        score: log q of the draws whose gradient is the score-function estimator, (B,); zero if
            every draw is reparameterized. `musigma.objectives.surrogate` uses it.
        kl_sampled: Whether a column of `kl` is a single-draw estimate, bool (B, latents); false
            for a flow in which nothing is drawn.
    """

    log_px: Tensor
    kl: Tensor
    log_q: Tensor
    log_det: Tensor
    auxiliary: Tensor = torch.zeros(())
    score: Tensor = torch.zeros(())
    kl_sampled: Tensor = torch.zeros((), dtype=torch.bool)

    @property
    def rate(self) -> Tensor:
        """The cost of the latents: all terms except log p(x | latents), nats, shape (B,)."""
        return self.kl.sum(1) + self.log_q - self.log_det

    @property
    def elbo(self) -> Tensor:
        """log_px - rate: log w, with closed-form KLs replaced by their expectation, (B,)."""
        return self.log_px - self.rate


GRADIENTS = ("score", "enumerate")
MOST_ENUMERATED = 4096
"""Largest number of combinations of values that the gradient `enumerate` evaluates."""


def check_enumerable(combinations: int) -> None:
    """Refuse more values than the gradient `enumerate` goes through.

    Raises:
        ValueError: If there are more than `MOST_ENUMERATED`.
    """
    if combinations > MOST_ENUMERATED:
        raise ValueError(
            f"gradient: enumeration goes through {combinations:,} combinations of values, more "
            f"than {MOST_ENUMERATED:,}; use 'score', or fewer values"
        )


def with_gradient(dist: Distribution, gradient: str) -> Distribution:
    """Name the gradient estimator of a distribution that cannot be reparameterized.

    Args:
        dist: A posterior whose draws carry no gradient (for example, a categorical).
        gradient: `score`: the score-function estimator with a leave-one-out baseline over the
            batch (Williams, 1992; Mnih & Rezende, 2016, arXiv:1602.06725). `enumerate`: the exact
            expectation over the finite support, which `dist.enumerate_support` lists; if no
            closed forms are requested (the importance-weighted bound), the same as `score`.

    Returns:
        `dist` itself.

    Raises:
        ValueError: For another name. For relaxed and straight-through draws, use a distribution
            with `rsample` (`musigma.distributions.OneHotLatents`).
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient: expected {' or '.join(GRADIENTS)}; got {gradient!r}")
    dist.gradient = gradient  # pyright: ignore[reportAttributeAccessIssue]
    return dist


def refuse_twins(modules: Iterable[nn.Module]) -> None:
    """Refuse a module that occurs twice, because its terms would be counted only once.

    Raises:
        ValueError: If a module occurs twice.
    """
    seen: set[nn.Module] = set()
    for module in modules:
        if module in seen:
            raise ValueError(
                f"layers: one {type(module).__name__} is used in two places, so its terms would "
                "be counted once; make a second instance (they may share their networks)"
            )
        seen.add(module)


def center_of(dist: Distribution) -> Tensor:
    """What draws at temperature 0 are: `center`, else the mode if discrete, else the mean."""
    center = getattr(dist, "center", None)
    if center is not None:
        return center
    discrete = dist.support is not None and dist.support.is_discrete
    return dist.mode if discrete else dist.mean


def closed_kl(q: Distribution, p: Distribution) -> Tensor | None:
    """KL(q || p) in nats, or None if torch knows no closed form for the pair."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError as error:
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        if at is not None and at.tb_frame.f_globals.get("__name__") == kl.__name__:
            return None  # for this pair, or for what it contains
        raise


class Trace:
    """One pass through a model.

    Args:
        generating: The direction: latents to data if true, data to latents otherwise.
        n: Number of examples to draw, if neither a given latent nor a context determines it.
        given: Values of sites that are not drawn: latents while generating, draws of q while
            inferring.
        temperature: Factor of the standard deviation of every draw: a number, one number per
            example (B,), or a mapping from sites to either (1 for sites it lacks). At 0 a draw is
            the center of the distribution: its `center` if it has one, its mode if it is discrete,
            and its mean otherwise.
        whiten: Whether `values` and `given` hold (value - mean) / std instead of the value, for
            sites whose distribution has `whiten` and `unwhiten` (a Gaussian).
        scoring: Whether terms are recorded. Sampling does not need them.
        closed_form: Whether to use the KL divergence of a paired q and p, instead of
            log q - log p.
        encodings: A mapping that passes over the same data share, so that networks that see only
            the data run once. By default they run in every pass.
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
        encodings: dict[nn.Module, tuple[Tensor, Any]] | None = None,
    ):
        self.generating, self.n, self.whiten = generating, n, whiten
        self.encodings = encodings
        self.given: Mapping[Site, Tensor] = given or {}
        self.temperature, self.scoring, self.closed_form = temperature, scoring, closed_form
        self.values: dict[Site, Tensor] = {}
        self.log_p: dict[Site, Tensor] = {}
        self.kl: dict[Site, Tensor] = {}
        self.log_q: dict[Site, Tensor] = {}
        self.log_det: dict[Site, Tensor] = {}
        self.auxiliaries: dict[Site, Tensor] = {}
        self.figures: dict[str, Tensor] = {}
        self.scores: dict[Site, Tensor] = {}  # log q of draws by the score-function estimator
        self.supports: dict[Site, Tensor] = {}  # all values of draws that are enumerated
        self.closed: set[Site] = set()  # latents with a closed-form KL
        self.below: set[Site] = set()  # layers between the data and a likelihood

    # -- called by models

    def encoding(self, net: nn.Module, x: Tensor, context: Any = None) -> Any:
        """What a network makes of the data alone, by an earlier pass if `encodings` has it."""
        if self.encodings is None:
            return conditioned(net, x, context)
        seen, output = self.encodings.get(net, (None, None))
        if seen is None or not torch.equal(seen, x):
            output = conditioned(net, x, context)
            self.encodings[net] = x, output
        return output

    def p(self, site: Site, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """A term of the generative model: scores `value` while inferring, draws otherwise."""
        if self.generating:
            value = self._choose(site, dist)
        if value is None:
            raise ValueError(f"value: {type(site).__name__} must give p a value while inferring")
        self._store(site, dist, value)
        if self.scoring:
            self._record(self.log_p, site, dist.log_prob(value))
        return value

    def q(self, site: Site, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """A term of the inference model: draws while inferring, scores `value` otherwise."""
        if not self.generating:
            value = self._infer_draw(site, dist)
        if value is None:
            raise ValueError(f"value: {type(site).__name__} must give q a value while generating")
        if self.scoring:
            self._record(self.log_q, site, dist.log_prob(value))
        return value

    def latent(self, site: Site, q: Distribution, p: Distribution) -> Tensor:
        """Draw a latent from q while inferring, and record both of its terms.

        Call this only if p is known before the draw (a prior that is a single distribution, a
        block of a top-down ladder); otherwise the closed-form KL would be biased. If torch has no
        closed form for the pair, the KL is estimated from the draw (`Evidence.kl_sampled`).
        """
        value = self._infer_draw(site, q)
        self._store(site, p, value)
        if self.scoring:
            nats = closed_kl(q, p) if self.closed_form else None
            if nats is None:
                nats = q.log_prob(value) - p.log_prob(value)
            else:
                self.closed.add(site)
            self._record(self.kl, site, nats)
        return value

    def bijection(self, layer: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Apply a `Bijection` in the direction of this trace, and record its log-determinant."""
        apply = layer.inverse if self.generating else layer
        value, log_det = apply(x, context)  # pyright: ignore[reportCallIssue]
        if self.scoring:
            self._record(self.log_det, layer, -log_det if self.generating else log_det)
        return value

    def bijections(
        self,
        layers: Sequence[nn.Module],
        x: Tensor,
        context: Tensor | None,
        run: Callable[..., tuple[Tensor, Sequence[Tensor]]],
    ) -> Tensor:
        """Apply several bijections while inferring, by ``run(layers, x, context)``."""
        x, log_dets = run(layers, x, context)
        if self.scoring:
            for layer, log_det in zip(layers, log_dets, strict=True):
                self._record(self.log_det, layer, log_det)
        return x

    def auxiliary(self, site: Site, term: Tensor) -> None:
        """Record a term (B,), in nats, that training maximizes but that is not part of log w."""
        if self.scoring:
            self._record(self.auxiliaries, site, term)

    def figure(self, name: str, values: Tensor) -> None:
        """Report a number for each example (B,), NaN where there is none, for evaluations only."""
        if self.scoring:
            self.figures[name] = values.detach()

    # -- results

    def entries(self) -> Iterator[tuple[Site, str, Tensor]]:
        """The ledger: every recorded term of -log w, as (site, name of the term, nats (B,)).

        Their sum is minus the ELBO of `evidence`.
        """
        for name, sign in (("log_det", -1), ("log_q", 1), ("kl", 1), ("log_p", -1)):
            for site, nats in getattr(self, name).items():
                yield site, name, sign * nats

    def evidence(self, latents: Iterable[Site]) -> Evidence:
        """The recorded terms, with one column for each of `latents`."""
        latents = list(latents)
        terms = [*self.log_p.values(), *self.kl.values(), *self.log_q.values()]
        zero = torch.zeros_like(terms[0])

        def total(terms: Iterable[Tensor]) -> Tensor:
            terms = [*terms]
            return torch.stack(terms).sum(0) if terms else zero

        def split(terms: Mapping[Site, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            """Those of layers below a likelihood, and the others."""
            below, above = [], []
            for site, term in terms.items():
                (below if site in self.below else above).append(term)
            return below, above

        (det_below, det), (q_below, q) = split(self.log_det), split(self.log_q)
        log_px = [v for s, v in self.log_p.items() if s not in latents]
        columns = [self.kl[s] if s in self.kl else -self.log_p[s] for s in latents]
        columns = torch.stack(columns, 1) if columns else zero.new_zeros(len(zero), 0)
        drawn = bool(self.kl or self.log_q)
        sampled = torch.tensor([drawn and s not in self.closed for s in latents], dtype=torch.bool)
        return Evidence(
            log_px=total([*log_px, *det_below, *(-v for v in q_below)]),
            kl=columns,
            log_q=total(q),
            log_det=total(det),
            auxiliary=total(self.auxiliaries.values()),
            score=total(self.scores.values()),
            kl_sampled=sampled.to(zero.device).expand(columns.shape),
        )

    # -- how

    def _choose(self, site: Site, dist: Distribution) -> Tensor:
        """A value for a site: the given one, the center, or a draw."""
        given = self.given.get(site)
        if given is not None:
            whitens = self.whiten and hasattr(dist, "unwhiten")
            return dist.unwhiten(given) if whitens else given  # pyright: ignore
        shape = () if dist.batch_shape or self.n is None else (self.n,)
        temperature = self.temperature
        if isinstance(temperature, Mapping):
            temperature = temperature.get(site, 1.0)
        if not isinstance(temperature, Tensor) and temperature == 0.0:
            center = center_of(dist)
            return center.expand(*shape, *center.shape)
        draw = dist.rsample if dist.has_rsample else dist.sample
        if not isinstance(temperature, Tensor) and temperature == 1.0:
            return draw(shape)
        if "temperature" not in inspect.signature(draw).parameters:
            raise ValueError(
                f"temperature: {type(dist).__name__} draws at temperatures 0 and 1 only; give its "
                "sample an argument `temperature` to use others"
            )
        return draw(shape, temperature=temperature)  # pyright: ignore[reportCallIssue]

    def _infer_draw(self, site: Site, q: Distribution) -> Tensor:
        """A draw from q, with a reparameterized gradient or a named estimator."""
        value = self._choose(site, q)
        if q.has_rsample or not self.scoring:
            return value
        gradient = getattr(q, "gradient", None)
        enumerated = gradient == "enumerate" and self.closed_form
        if not (enumerated or torch.is_grad_enabled()):
            return value
        log_q = q.log_prob(value)
        if gradient in GRADIENTS:
            self._record(self.scores, site, log_q)
            if enumerated and site not in self.given:
                self.supports[site] = q.enumerate_support(expand=False)
        elif log_q.requires_grad:
            raise ValueError(
                f"gradient: a draw of {type(q).__name__} carries no gradient to the encoder, so "
                "training would ignore it; name an estimator with "
                "musigma.trace.with_gradient(q, 'score' or 'enumerate'), or use a q with rsample, "
                "such as musigma.distributions.OneHotLatents(gradient='relaxed' or "
                "'straight-through')"
            )
        return value

    def _store(self, site: Site, dist: Distribution, value: Tensor) -> None:
        if self.whiten and hasattr(dist, "whiten"):
            value = dist.whiten(value)  # pyright: ignore[reportAttributeAccessIssue]
        self.values[site] = value

    @staticmethod
    def _record(terms: dict[Site, Tensor], site: Site, term: Tensor) -> None:
        if site in terms:
            refuse_twins([site, site])
        if getattr(term, "ndim", 0) != 1:
            raise ValueError(
                f"{type(site).__name__}: expected a term of shape (B,), one number per example; "
                f"got {tuple(getattr(term, 'shape', ()))}; sum over the event, as "
                "torch.distributions.Independent does for the dimensions of a distribution"
            )
        terms[site] = term


class Recorder(Trace):
    """A trace that also keeps the distributions, for objectives and diagnostics.

    Attributes:
        qs: The distribution q at each site that has one.
        ps: The distribution p at each site.
        draws: The value of q at each site that has one: what it drew, or scored.
        paired: The sites whose q and p were given together, to `latent`, in order.
        values: The value at each site (of `Trace`); a single draw, also where the gradient is
            `enumerate` and the terms are expectations over all values.
        terms: The evidence of the pass, from `Model.forward`, which also sets the next three.
        model: The model of the pass.
        x: Its data.
        context: Their context.
        share: The share of the training budget that is spent, from 0 to 1; 1 outside of training.
        examples: Number of examples of the training data; None outside of training.

    Example:
        >>> import musigma
        >>> model = musigma.build("vae", (5,), bits=None, latents=3, width=8)
        >>> record = Recorder(closed_form=True)
        >>> evidence = model(torch.randn(4, 5), trace=record)
        >>> site = next(model.latents())
        >>> record.qs[site].mean.shape, record.values[site].shape
        (torch.Size([4, 3]), torch.Size([4, 3]))
    """

    model: Any
    x: Tensor
    context: Any

    def __init__(self, **options):
        super().__init__(**options)
        self.qs: dict[Site, Distribution] = {}
        self.ps: dict[Site, Distribution] = {}
        self.draws: dict[Site, Tensor] = {}
        self.paired: list[Site] = []
        self.terms: Evidence | None = None
        self.share: float = 1.0
        self.examples: int | None = None
        self._precision: torch.dtype | None = None

    def p(self, site: Site, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """As `Trace.p`."""
        self.ps[site] = dist
        return super().p(site, dist, value)

    def q(self, site: Site, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """As `Trace.q`."""
        self.qs[site] = dist
        self.draws[site] = super().q(site, dist, value)
        return self.draws[site]

    def latent(self, site: Site, q: Distribution, p: Distribution) -> Tensor:
        """As `Trace.latent`."""
        self.qs[site], self.ps[site] = q, p
        self.paired.append(site)
        self.draws[site] = super().latent(site, q, p)
        return self.draws[site]

    # -- further passes

    def finish(self, model: nn.Module, x: Tensor, context: Any, terms: Evidence) -> None:
        """Keep what the pass was about; `Model.forward` calls this."""
        self.model, self.x, self.context, self.terms = model, x, context, terms
        kind = x.device.type
        self._precision = (
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        )

    def again(
        self,
        x: Tensor | None = None,
        *,
        given: Mapping[Site, Tensor] | None = None,
        fixed: bool = False,
    ) -> Recorder:
        """Another pass of data to latents through the model, without closed-form KLs.

        Args:
            x: The data, with as many rows as those of this pass; by default the same.
            given: Values of sites that are not drawn, such as `draws`.
            fixed: Whether the model's parameters are constants, so that a gradient flows through
                `given` and `x` only.

        Raises:
            ValueError: If `fixed`, and the model recomputes parts of itself in its backward pass.
        """
        if fixed and any(getattr(m, "recompute", False) for m in self.model.modules()):
            raise ValueError(
                "memory: this objective needs a pass with constant parameters, which a model that "
                "recomputes its parts does not have; use the memory mode store"
            )
        record = Recorder(given=given)
        with frozen(self.model.parameters() if fixed else ()), self.autocast():
            self.model(self.x if x is None else x, self.context, trace=record)
        return record

    def dream(self) -> Recorder:
        """A pass of latents to data: as many draws from the model as this pass has examples.

        `draws` of the result are values of the latents, and `x` the data, without gradients.
        """
        record = Recorder(generating=True, n=len(self.x))
        with torch.no_grad(), self.autocast():
            record.x = self.model.generate(record, self.context)
        record.model, record.context = self.model, self.context
        return record

    def autocast(self) -> torch.autocast:
        """A context in which networks compute as in this pass, in half precision or not."""
        kind, precision = self.x.device.type, self._precision
        return torch.autocast(kind, precision, enabled=precision is not None)
