"""What is known about a VAE during its audit: its callables, its prior, and what it samples."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder
from musigma.audit.sampler import Sampler
from musigma.audit.sandbox import Sandbox, arguments, refusals_ignored
from musigma.audit.scales import Curve

__all__ = ["FullPosterior", "Points", "Posterior", "Prior", "VAEAudit", "exchanged"]

Heads = tuple[Tensor, Tensor]
ARGUMENTS = {"sample": ("mean", "second"), "kl": ("mean", "second", "z"), "decode": ("z",),
             "encode": ("x",), "recon": ("x", "x_hat")}  # fmt: skip


def exchanged(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A callable of (second, mean, …) as one of (mean, second, …)."""
    return lambda mean, second, *more: fn(second, mean, *more)


class VAEAudit(ReportBuilder):
    """The report of one VAE under construction, with its callables and what is known about them.

    Once the order of arguments and the layout of a packed tensor are known, `functions` holds
    callables of (mean, second), whatever the given ones take.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        functions: Mapping[str, Callable[..., Any] | None],
        example: Tensor | None,
        prior: Any,
        kl_uses_sample: bool,
    ):
        super().__init__("VAE")
        self.sandbox = sandbox
        self.functions = {name: fn for name, fn in functions.items() if fn is not None}
        self.has_example = example is not None
        self.example = torch.empty(0) if example is None else torch.as_tensor(example).detach()
        self.example = self.example.clone()
        if self.example.is_floating_point():
            self.example = self.example.to(sandbox.dtype)
        sandbox.device = self.example.device
        self.given_prior, self.kl_uses_sample = prior, kl_uses_sample
        self.prior: Prior  # once the shape of the latents is known
        self.prior_known = "flow" not in self.functions  # its width where z is sampled
        self.convention: str | None = None
        self.read_as: str | None = None
        self.layout: str | None = None
        self.heads: Heads | None = None  # of the example
        self.latents: int | None = None  # numbers in one z
        self.coupled = False  # the rows of the example are parts of one: nodes of a graph, say
        self.swapped = False  # the first argument of the given sample is the scale
        self.kl_fits = False  # the KL is a multiple of that of what is sampled, plus a constant
        self.kl_slope = math.nan
        self.kl_growth: dict[int, float] | None = None

    def has(self, *names: str) -> bool:
        """Whether all these callables were given."""
        return all(name in self.functions for name in names)

    def call(self, name: str, *args: Any) -> Any:
        """The result of a callable, as `Sandbox.call`."""
        return self.sandbox.call(name, self.functions[name], *args)

    def ask(self, name: str, *args: Any) -> Tensor:
        """The result of a callable as a tensor, as `Sandbox.ask_first`."""
        return self.sandbox.ask_first(name, self.functions[name], *args)

    def encoded(self, x: Tensor | None = None) -> Heads:
        """Both heads (B, ...) for a batch, by default the example; mean first."""
        return self.heads_of(self.call("encode", (self.example if x is None else x).clone()))

    def random_heads(self, scales: Iterable[float]) -> list[Heads]:
        """The heads of the example under random parameters, by the scales of their changes.

        It ends where they are not finite; the parameters are restored.
        """
        restore, found = self.sandbox.snapshot(), []
        with refusals_ignored():
            for i, scale in enumerate(scales, 1):
                self.sandbox.randomize(scale, seed=i)
                heads = self.encoded()
                if not all(bool(head.isfinite().all()) for head in heads):
                    break
                found.append(heads)
        restore()
        return found

    def heads_of(self, value: Any) -> Heads:
        """Both heads in what `encode` returns."""
        value = tuple(value.values()) if isinstance(value, dict) else value
        value = value if isinstance(value, (tuple, list)) else (value,)
        parts = [self.sandbox.as_tensor("encode", part) for part in value[:2]]
        if len(value) > 2:
            self.assumed.append(
                f"encode returns {len(value)} values: the first two are mean and second"
            )
        if len(parts) == 1 and parts[0].ndim > 1 and parts[0].shape[1] % 2 == 0:
            parts = parts[0].chunk(2, 1)
        if len(parts) == 1 or parts[0].ndim == 0 or len(parts[0]) != len(parts[1]):
            raise AuditError(
                "encode: expected (mean, second), or a packed tensor (B, 2 D, ...); got shapes "
                f"{[tuple(part.shape) for part in parts]}"
            )
        return parts[0], parts[1]

    @property
    def kl_arguments(self) -> int:
        """How many arguments the KL takes: (mean, second[, z[, z_K, log_det]])."""
        if not self.has("flow"):
            return 2 + self.kl_uses_sample
        needed = arguments(self.functions["kl"]) or 3
        if needed not in (3, 5):
            raise AuditError(
                "kl: with `flow`, expected kl(mean, second, z) or kl(mean, second, z, z_K, "
                f"log_det), where z is what sample returns; it takes {needed} arguments"
            )
        return needed

    @property
    def rows(self) -> int | None:
        """Examples in the given batch."""
        batch = self.example if self.heads is None else self.heads[0]
        return len(batch) if self.has_example else None

    def build(self, **more: Any) -> AuditReport:
        """The report, with the convention."""
        if self.sandbox.dtype != torch.float64:
            self.assumed.append("float32 throughout, as it does not compute in float64")
        narrow = self.findings.get("sigma_range_restricted")
        if narrow and not self.prior_known:
            self.findings[narrow.code] = replace(narrow, severity="warning")
        for name, i in sorted(self.sandbox.changed):
            if i < len(ARGUMENTS.get(name, ())):
                self.warn("inplace", name=name, argument=ARGUMENTS[name][i])
        return super().build(
            convention=self.convention, read_as=self.read_as, layout=self.layout, **more
        )


class Prior:
    """The prior of flat latents z (n, D): its log-density, and its mean and std as far as known.

    A flow behind z is a part of the density: log p(f(z)) + log |det J|.

    Args:
        given: A mean and a standard deviation, a distribution, a callable ``log_prob(z)``, or
            None for N(0, 1).
        latent: Shape of one z.
        sandbox: For the calls.
        flow: z -> (z_K, log_det).

    Attributes:
        mean: Its mean (D,), or zeros where it is not known.
        std: Its standard deviation (D,), or ones where it is not known.
        known: Whether both are known.
        normal: Whether it is N(mean, std²) without a flow.

    Raises:
        AuditError: If it is none of these, or its standard deviation is not positive.
    """

    def __init__(
        self,
        given: Any,
        latent: Sequence[int],
        sandbox: Sandbox,
        flow: Callable[[Tensor], Heads] | None = None,
    ):
        self.latent, self.sandbox, self.flow = tuple(latent), sandbox, None
        moments: Any = (0.0, 1.0) if given is None else given
        self.normal = isinstance(moments, (tuple, list)) and len(moments) == 2
        self._density: Any = getattr(moments, "log_prob", moments)
        if not self.normal:
            if not callable(self._density):
                raise AuditError(
                    "prior: expected (mean, std), a distribution or a callable log_prob(z); got "
                    f"{type(given).__name__}"
                )
            moments = math.nan, math.nan
            if isinstance(given, Distribution):
                with contextlib.suppress(NotImplementedError):
                    moments = given.mean, given.stddev
        try:
            self.mean, self.std = (self._per_latent(t) for t in moments)
        except (RuntimeError, TypeError, ValueError):
            raise AuditError(
                f"prior: expected numbers or tensors of shape {self.latent}; got "
                f"{[tuple(t.shape) if isinstance(t, Tensor) else t for t in moments]}"
            ) from None
        self.known = bool(self.mean.isfinite().all() and self.std.isfinite().all())
        if self.known and not (self.std > 0).all():
            raise AuditError(f"prior: expected a positive standard deviation; got {moments[1]}")
        if not self.known:
            self.mean, self.std = torch.zeros_like(self.mean), torch.ones_like(self.std)
        if self.normal:
            mean, std = self.mean.reshape(self.latent), self.std.reshape(self.latent)
            self._density = Normal(mean, std).log_prob
        else:
            self._recognize()
        self.flow, self.normal = flow, self.normal and flow is None

    def _per_latent(self, moment: Any) -> Tensor:
        """A mean or a standard deviation for each flat latent."""
        t = torch.as_tensor(moment).detach().double().clone()
        d = math.prod(self.latent)
        if t.numel() == d:
            return t.reshape(d)
        while t.ndim > len(self.latent) and len(t) == 1:
            t = t[0]
        return t.expand(self.latent).reshape(d)

    def _recognize(self) -> None:
        """Find out whether a density is that of independent normals, from its curvature."""
        d = len(self.mean)
        if d > 256:
            return
        steps = torch.eye(d, dtype=torch.float64)
        center = self.log_prob(0 * self.mean[None])
        up, down = self.log_prob(steps) - center, self.log_prob(-steps) - center
        curvature = -(up + down)
        if not (curvature > 0).all():
            return
        mean, std = (up - down) / 2 / curvature, curvature.rsqrt()
        generator = torch.Generator().manual_seed(8)
        z = 2 * torch.randn(16, d, generator=generator, dtype=torch.float64)
        off = self.log_prob(z) - Normal(mean, std).log_prob(z).sum(1)
        self.normal = bool(off.std() < 1e-4 * (1 + d))
        if self.normal:
            self.mean, self.std, self.known = mean, std, True

    @property
    def even(self) -> bool:
        """Whether all latents have the same mean and standard deviation."""
        return all(bool((t - t[0]).abs().max() < 1e-6) for t in (self.mean, self.std))

    def pushed(self, z: Tensor) -> Heads:
        """z_K and the log-determinants (n,) of the flow at z (n, D)."""
        assert self.flow is not None
        given = self.sandbox.to_input(z).reshape(-1, *self.latent)
        answer = self.sandbox.call("flow", self.flow, given)
        if not isinstance(answer, (tuple, list)) or len(answer) < 2:
            raise AuditError(
                f"flow: expected (z_K, log_det); got {type(answer).__name__}; log_det is one "
                "number for each example"
            )
        end, log_det = (self.sandbox.as_tensor("flow", part) for part in answer[:2])
        if end.shape != given.shape or log_det.numel() not in (1, len(z), z.numel()):
            raise AuditError(
                f"flow: given z {tuple(given.shape)}, expected z_K of that shape and log_det "
                f"({len(z)},); got {tuple(end.shape)} and {tuple(log_det.shape)}"
            )
        log_det = log_det.reshape(len(z) if log_det.numel() > 1 else 1, -1).sum(1).expand(len(z))
        return end.flatten(1), log_det

    def log_prob(self, z: Tensor) -> Tensor:
        """The log-density at z (..., D), in nats."""
        flat = z.reshape(-1, z.shape[-1])
        log_det: Tensor | float = 0.0
        if self.flow is not None:
            flat, log_det = self.pushed(flat)
        given = self.sandbox.to_input(flat).reshape(-1, *self.latent)
        value = self.sandbox.ask("prior", self._density, given)
        if value.ndim == 0 or len(value) != len(given):
            raise AuditError(
                f"prior: given z {tuple(given.shape)}, expected one log-density for each example; "
                f"got shape {tuple(value.shape)}"
            )
        return (value.reshape(len(given), -1).sum(1) + log_det).reshape(z.shape[:-1])


@dataclass
class Points:
    """Heads mean (P, D) and second (P, E), and what is sampled there: loc + scale e.

    `scale` is (P, D), or (P, D, D) for a full covariance. At the points `inside`, sigma is not
    clamped and neither tiny nor large. At the first `single` points one latent differs from
    `base`, where the posterior is nearest to the prior.
    """

    mean: Tensor
    second: Tensor
    loc: Tensor
    scale: Tensor
    inside: Tensor
    single: int = 0
    base: Heads | None = None

    def __getitem__(self, where: Tensor) -> Points:
        chosen = {f.name: getattr(self, f.name)[where] for f in fields(self)[:5]}
        kept = where[: self.single].sum() if where.dtype == torch.bool else 0
        return replace(self, **chosen, single=int(kept))

    def draws(self, e: Tensor) -> Tensor:
        """z (N, P, D) for noise e (N, D)."""
        if self.scale.ndim == 2:
            return self.loc + self.scale * e[:, None]
        return self.loc + torch.einsum("pij,nj->npi", self.scale, e)

    def log_q(self, e: Tensor) -> Tensor:
        """The log-density (N, P) of normal noise e (N, D) at those draws."""
        full = self.scale.ndim == 3
        log_det = torch.linalg.slogdet(self.scale)[1] if full else self.scale.abs().log().sum(-1)
        return (-0.5 * (e**2).sum(-1) - LOG_2PI / 2 * e.shape[-1])[:, None] - log_det


LOG_2PI = math.log(2 * math.pi)


@dataclass
class Posterior:
    """The measured posterior, z = loc + sigma e: the sampler, and sigma by the second output.

    `b` are second outputs (n,), ascending, and `sigma` is measured there; `even` is true if all
    latents have the same, `unbiased` if loc is the mean head.
    """

    sampler: Sampler
    b: Tensor
    sigma: Tensor
    curve: Curve
    even: bool = True
    unbiased: bool = True
    error: float = 0.0

    def at(self, mean: Tensor, second: Tensor) -> Heads:
        """Location and sigma (P, D) at points: measured, or by the curve if that is exact."""
        known = self.sampler.mode != "known" and self.curve.named and self.even
        if known and self.unbiased:
            return mean, self.curve.sigma(second).abs().expand_as(mean)
        loc, sigma, _ = self.sampler.measure(mean, second)
        return loc, self.curve.sigma(second).abs().expand_as(mean) if known else sigma.abs()

    def points_at(self, mean: Tensor, second: Tensor) -> Points:
        """What is sampled at heads (P, ...)."""
        return Points(mean, second, *self.at(mean, second), torch.ones(len(mean)).bool())

    def points(self, prior: Prior) -> Points:
        """Points with one latent moved at a time, and with all at random."""
        s, b, std, means = self.sampler, self.b, float(prior.std[0]), prior.mean
        far = (self.sigma.clamp(min=1e-300) / std).log().abs()
        base = b[far <= far.min() + 1e-12][-1].expand(s.e)  # the positive one of two
        inside = (b.abs() <= 8) & (self.sigma > 0.05 * std) & (self.sigma < 8 * std)
        flat = torch.zeros_like(inside)
        if self.curve.name == "unit variance":
            inside = b.abs() <= 3
        else:
            same = (self.sigma[1:] / self.sigma[:-1].clamp(min=1e-300) - 1).abs() < 1e-9
            flat[1:] |= same
            flat[:-1] |= same
        if int((inside & ~flat).sum()) < 3:
            inside = (b.abs() <= 8) & (self.sigma > 0)
        values = _spread(b[inside & ~flat], 9)

        def rows(latent: int, values: Tensor, offsets: list[float]) -> Heads:
            value, offset = torch.cartesian_prod(values, values.new_tensor(offsets)).T
            mean, second = means.repeat(len(value), 1), base.repeat(len(value), 1)
            mean[:, latent] += offset * prior.std[latent]
            second[:, latent if s.e == s.d else 0] = value
            return mean, second

        generator = torch.Generator().manual_seed(9)
        which = torch.randint(len(values), (10, s.e), generator=generator)
        noise = torch.randn(10, s.d, generator=generator, dtype=torch.float64)
        one = rows(0, values, [-2.0, -1.0, -0.3, 0.5, 1.5, 3.0])
        last = rows(s.d - 1, values[::3], [-1.0, 0.7])
        clamped = rows(0, _spread(b[flat & (b.abs() <= 9.5) & (self.sigma > 0)], 3), [0.0, 1.0])
        groups = one, last, (means + prior.std * noise, values[which]), clamped
        mean, second = (torch.cat(heads) for heads in zip(*groups, strict=True))
        free = torch.arange(len(mean)) < len(mean) - len(clamped[0])
        base_heads = means[None], base[None]
        return Points(mean, second, *self.at(mean, second), free, len(one[0]), base_heads)


def _spread(values: Tensor, count: int) -> Tensor:
    n = len(values)
    return values[torch.linspace(0, n - 1, min(n, count)).round().long()]


@dataclass
class FullPosterior:
    """The measured posterior if the second output is a matrix: z = loc + A e, at heads (P, ...).

    `factor` is A (P, D, D), and `error` the relative error of both.
    """

    sampler: Sampler
    heads: Heads
    loc: Tensor
    factor: Tensor
    error: float
    curve: None = None

    def points(self, prior: Prior) -> Points:
        """The heads at which it was measured."""
        mean, second = (t.flatten(1) for t in self.heads)
        return Points(mean, second, self.loc, self.factor, torch.ones(len(mean), dtype=torch.bool))
