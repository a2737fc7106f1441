"""The callables of a VAE, put together to training steps; and its prior."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from musigma.audit.batches import required
from musigma.audit.findings import AuditError
from musigma.audit.sandbox import Sandbox, first, first_form

__all__ = ["Heads", "Moments", "Parts", "Prior"]

Heads = tuple[Tensor, ...]  # mean and second output, or one packed tensor
Moments = Sequence[Tensor]  # a mean and a standard deviation, each (D,)
ROWS = 7  # of a batch, without an example: the size of no latent
SIZES = (6, 2, 4, 8, 16, 20, 32, 10, 64, 3, 5, 128, 1)  # of a latent, where nothing gives it


class Parts:
    """The callables of a VAE, put together to steps.

    Attributes:
        latent: The shape of one z.
        rows: Examples in a batch.
        prior: The given prior of z, with the flow; None without either.
        power: n identical examples have n^power times the KL of one; None if it is not known.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        functions: Mapping[str, Callable[..., Any]],
        example: Any,
        prior: Any,
        kl_uses_sample: bool,
    ):
        self.sandbox, self.functions, self.kl_uses_sample = sandbox, functions, kl_uses_sample
        self.x = None if example is None else torch.as_tensor(example).detach().clone()
        self.rows = ROWS if self.x is None else len(self.x)
        self.notes: list[str] = []
        self.leaves: Heads = ()  # the heads, where there is no encoder
        self.layer: list[nn.Parameter] = []
        self.units = torch.eye(self.rows)
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.Parameter(torch.randn(4096, 11, generator=generator) / 8)
        self.target = torch.randn(max(self.rows, ROWS), 11, generator=generator)
        if not self.has("sample"):
            return
        if self.has("encode"):
            self._try()
        else:
            forms = ((shape,) for shape in dict.fromkeys(self._shapes()))
            first_form(forms, self._try)
            self.notes.append(f"a latent of shape {self.latent}")
        given = prior is not None or self.has("flow")
        self.prior = Prior(prior, self.latent, self.pushed) if given else None
        if self.prior is not None:
            self.prior.log_prob(torch.zeros(self.rows, *self.latent))
        self.power = self._power() if self.has("kl") else None

    def has(self, *names: str) -> bool:
        """Whether all these callables were given."""
        return all(name in self.functions for name in names)

    def call(self, name: str, *args: Any) -> Any:
        """The result of a callable, which may change its arguments."""
        copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
        return self.sandbox.call(name, self.functions[name], *copies)

    def _shapes(self) -> Iterator[tuple[int, ...]]:
        """Shapes that a latent may have, likely ones first, where there is no encoder."""
        if self.has("generate"):
            with contextlib.suppress(AuditError):
                yield tuple(first(self.call("generate", 3)).shape[1:])
        if self.x is not None:
            yield tuple(self.x.shape[1:])
        yield from ((n,) for n in SIZES)
        yield 4, 2, 3

    def _try(self, shape: tuple[int, ...] = ()) -> None:
        """Call everything once, so that what a callable raises is said of that callable.

        Without an encoder, the heads are parameters of this shape.
        """
        if not self.has("encode"):
            generator = torch.Generator().manual_seed(2)
            mean = torch.randn(self.rows, *shape, generator=generator)
            second = 0.3 + torch.rand(self.rows, *shape, generator=generator)
            self.leaves, self.layer = (mean, second), []
        z = self.z(self.heads())
        self.latent = tuple(z.shape[1:])
        self.answer(z)
        if self.has("kl"):
            self.divergence(self.heads(), z)

    def heads(self) -> Heads:
        """The mean and the second output, or one packed tensor, for the example."""
        if not self.has("encode"):
            return self._as_outputs(self.leaves)
        value = self.call("encode", self.x)
        value = tuple(value.values()) if isinstance(value, dict) else value
        heads = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if len(heads) > 2:
            self._note(f"encode returns {len(heads)} values: the first two are mean and second")
        heads = heads[:2]
        if not all(isinstance(t, Tensor) for t in heads) or len({len(t) for t in heads}) > 1:
            raise AuditError(
                "encode: expected (mean, second), or a packed tensor (B, 2 D, ...); got "
                f"{[tuple(getattr(t, 'shape', ())) for t in heads]}"
            )
        if not any(t.requires_grad for t in heads):
            return self._as_outputs(heads)
        return heads

    def _as_outputs(self, heads: Heads) -> Heads:
        """Numbers as outputs of a layer: its weights, where its inputs are the unit vectors."""
        if not self.layer:
            self.layer = [nn.Parameter(t.detach().flatten(1)) for t in heads]
        outputs = [self.units @ weight for weight in self.layer]
        return tuple(y.reshape(-1, *t.shape[1:]) for y, t in zip(outputs, heads, strict=True))

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _given(self, name: str, heads: Heads, more: int = 0) -> Heads:
        """The heads as a callable takes them, which takes `more` arguments besides."""
        if len(heads) == 1 and len(required(self.functions[name])) - more == 2:
            self._note("the packed output is split in halves, mean first")
            return heads[0].chunk(2, 1)
        return heads

    def z(self, heads: Heads) -> Tensor:
        """What is sampled."""
        given = self._given("sample", heads)
        value = self.call("sample", *given)
        shape = given[0].shape
        if isinstance(value, (tuple, list)):
            value = next((t for t in value if getattr(t, "shape", None) == shape), value[0])
        if not isinstance(value, Tensor):
            raise AuditError(f"sample: expected a tensor; got {type(value).__name__}")
        if value.ndim == len(shape) + 1 and value.shape[1:] == shape:
            self._note("sample returns several draws for each example; the first is used")
            value = value[0]
        if len(given) == 2 and value.numel() != shape.numel():
            raise AuditError(
                f"sample: given mean {tuple(shape)} and second {tuple(given[1].shape)}, expected "
                f"z of shape {tuple(shape)}; got {tuple(value.shape)}"
            )
        return value

    def pushed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z_K and the log-determinants (B,) of the flow; z and zeros without one."""
        if not self.has("flow"):
            return z, z.new_zeros(len(z))
        answer = self.call("flow", z)
        if not isinstance(answer, (tuple, list)) or len(answer) < 2:
            raise AuditError(f"flow: expected (z_K, log_det); got {type(answer).__name__}")
        end, log_det = answer[:2]
        if end.shape != z.shape or log_det.numel() not in (1, len(z), z.numel()):
            raise AuditError(
                f"flow: given z {tuple(z.shape)}, expected z_K of that shape and log_det "
                f"({len(z)},); got {tuple(end.shape)} and {tuple(log_det.shape)}"
            )
        return end, log_det if log_det.numel() == 1 else log_det.reshape(len(z), -1).sum(1)

    def divergence(self, heads: Heads, z: Tensor) -> Tensor:
        """The KL, as it is returned."""
        count = 2 + self.kl_uses_sample
        if self.has("flow"):
            count = len(required(self.functions["kl"])) or 3
            if count not in (3, 5):
                raise AuditError(
                    "kl: with `flow`, expected kl(mean, second, z) or kl(mean, second, z, z_K, "
                    f"log_det), where z is what sample returns; it takes {count} arguments"
                )
        more = (z, *(self.call("flow", z)[:2] if count == 5 else ()))[: count - 2]
        value = first(self.call("kl", *self._given("kl", heads, len(more)), *more))
        if not isinstance(value, Tensor):
            raise AuditError(f"kl: expected a tensor; got {type(value).__name__}")
        if value.numel() not in (1, len(z), z.numel(), math.prod(z.shape[1:])):
            raise AuditError(
                f"kl: given {len(z)} examples of {math.prod(z.shape[1:])} latents, expected a "
                "scalar, one number per example or one per dimension; got shape "
                f"{tuple(value.shape)}"
            )
        return value

    def answer(self, z: Tensor) -> tuple[Tensor, bool]:
        """The reconstruction term of z; and whether it is the given one."""
        end = self.pushed(z)[0]
        x_hat = first(self.call("decode", end)) if self.has("decode") else None
        if self.has("recon") and self.x is not None:
            if x_hat is None:
                self._note("there is no `decode`: recon is given an x_hat that is supplied here")
                x_hat = self._mixed(end)[:, :1].sigmoid().expand(-1, self.x[0].numel())
                x_hat = x_hat.reshape(self.x.shape)
            forms = [(x_hat,)]
            if x_hat.numel() == self.x.numel():
                forms.append((x_hat.reshape(self.x.shape),))
            return first(first_form(forms, lambda hat: self.call("recon", self.x, hat))[1]), True
        off = self._mixed(end if x_hat is None else x_hat) - self.target[: len(z)]
        return 0.5 * (off**2).sum(1), False

    def _mixed(self, t: Tensor) -> Tensor:
        """Linear combinations (B, 11) of at most the first 4096 numbers of each example."""
        flat = t.flatten(1)[:, : len(self.weights)]
        return flat @ self.weights[: flat.shape[1]]

    def step(self) -> Tensor:
        """The loss, of a reconstruction that is supplied unless it was given."""
        heads = self.heads()
        z = self.z(heads)
        recon, given = self.answer(z)
        if not self.has("kl"):
            return recon.sum()
        kl = self.divergence(heads, z)
        if given or self.power is None:
            return recon.sum() + kl.sum()
        return recon.sum() * len(z) ** (self.power - 1) + kl.sum()

    def loss(self) -> Any:
        """The given loss."""
        return self.call("loss", self.x)

    def kl_to_normal(self, weight: float) -> Tensor:
        """The KL, to N(0, 1) in place of the given prior, if it has that weight."""
        heads = self.heads()
        z = self.z(heads)
        kl = self.divergence(heads, z).sum() + 0.0 * z.sum()
        if not weight or self.prior is None:
            return kl
        return kl + weight * (self.prior.log_prob(z) - _standard(z)).sum()

    def _power(self) -> float | None:
        with torch.no_grad():
            heads = [t.detach()[:1] for t in self.heads()]
            z = self.z(self.heads())[:1]

            def kl(n: int) -> float:
                self.sandbox.reseed()
                copies = [t.expand(n, *t.shape[1:]) for t in (*heads, z)]
                return float(self.divergence(tuple(copies[:-1]), copies[-1]).sum())

            undo = self.sandbox.snapshot()
            values = []
            with contextlib.suppress(AuditError):  # it may take one size of batch only
                for n in (1, 2, 4):
                    values.append(kl(n))
                    undo()
        if len(values) < 3 or not all(v * values[0] > 0 for v in values):
            return None
        two, four = math.log2(values[1] / values[0]), math.log2(values[2] / values[0]) / 2
        return round(two, 3) + 0.0 if abs(two - four) < 1e-3 else None


def _standard(z: Tensor) -> Tensor:
    return Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1)


class Prior:
    """The prior of z (B, ...): its log-density, and its mean and std as far as they are known.

    Args:
        given: A mean and a standard deviation, a distribution, a callable ``log_prob(z)``, or
            None for N(0, 1).
        latent: Shape of one z.
        flow: z -> (z_K, log_det); its density is log p(z_K) + log_det.

    Raises:
        AuditError: If it is none of these, or its standard deviation is not positive.
    """

    moments: Moments | None = None

    def __init__(self, given: Any, latent: tuple[int, ...], flow: Any = None):
        self.flow = flow
        given = (0.0, 1.0) if given is None else given
        if isinstance(given, (tuple, list)) and len(given) == 2:
            try:
                tensors = [torch.as_tensor(t).detach() for t in given]
                mean, std = (t.float().expand(latent) for t in tensors)
            except (RuntimeError, TypeError, ValueError):
                shapes = [tuple(getattr(t, "shape", ())) for t in given]
                raise AuditError(
                    f"prior: expected numbers or tensors of shape {latent}; got {shapes}"
                ) from None
            if not (std > 0).all():
                raise AuditError(f"prior: expected a positive standard deviation; got {given[1]}")
            given = Normal(mean, std)
        self.is_product = isinstance(given, Normal) or (
            isinstance(given, Independent) and isinstance(given.base_dist, Normal)
        )
        self._log_prob: Any = getattr(given, "log_prob", given)
        if not callable(self._log_prob):
            raise AuditError(
                "prior: expected (mean, std), a distribution or a callable log_prob(z); got "
                f"{type(given).__name__}"
            )
        if isinstance(given, Distribution):
            with contextlib.suppress(NotImplementedError, RuntimeError):
                moments = [t.detach().expand(latent).flatten() for t in (given.mean, given.stddev)]
                self.moments = moments if all(t.isfinite().all() for t in moments) else None

    def log_prob(self, z: Tensor) -> Tensor:
        """The log-density at z (B, ...), in nats."""
        end, log_det = (z, 0.0) if self.flow is None else self.flow(z)
        value = first(self._log_prob(end))
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(z):
            raise AuditError(
                f"prior: given z {tuple(z.shape)}, expected one log-density for each example; got "
                f"shape {tuple(getattr(value, 'shape', ()))}"
            )
        return value.reshape(len(z), -1).sum(1) + log_det
