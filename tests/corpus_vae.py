"""Small VAEs, correct and wrong, each with the expected verdict.

An entry is a function that returns the arguments of `audit_vae`; `ENTRIES` maps its name to the
verdict, convention, reading of the KL and codes that the audit must report: these and no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import (
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    StudentT,
    kl_divergence,
)

D = 6


@dataclass(frozen=True)
class Entry:
    build: Callable[[], dict[str, Any]]
    verdict: str
    convention: str | None
    read_as: str | None
    codes: tuple[str, ...]
    text: str | None  # part of the convention's text
    layout: str | None


ENTRIES: dict[str, Entry] = {}
AGGREGATES: dict[str, tuple[Callable[[], tuple], str]] = {}


def entry(convention, read_as=None, *codes, verdict=None, text=None, layout=None):
    """Register a builder: "correct" if no codes are given, else "bug" unless said otherwise."""
    verdict = verdict or ("bug" if codes else "correct")

    def register(build):
        ENTRIES[build.__name__] = Entry(
            build, verdict, convention, read_as, codes, text, layout
        )  # fmt: skip
        return build

    return register


# --- building blocks -----------------------------------------------------------------------------


def sampler(sigma):
    return lambda mean, b: mean + sigma(b) * torch.randn_like(mean)


def kl_of(sigma, prior=(0.0, 1.0)):
    def kl(mean, b):
        s, (m0, s0) = sigma(b), prior
        return (0.5 * ((s**2 + (mean - m0) ** 2) / s0**2 - 1) - (s / s0).log()).sum()

    return kl


def pair(sigma, prior=(0.0, 1.0)):
    """A sampler and the KL of what it samples."""
    return {"sample": sampler(sigma), "kl": kl_of(sigma, prior), "prior": prior}


def half(b):
    return (0.5 * b).exp()


def kl_log_var(mean, log_var):
    return -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()


def by_example(mean, log_var):
    return -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1)


class Net(nn.Module):
    """An MLP with two heads; both are zero at first, as in many codebases."""

    def __init__(self, d=D, zero=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.mu, self.sigma = nn.Linear(16, d), nn.Linear(16, d)
        self.out = nn.Sequential(nn.Linear(d, 16), nn.ReLU(), nn.Linear(16, 8), nn.Sigmoid())
        if zero:
            for p in self.sigma.parameters():
                nn.init.zeros_(p)

    def encode(self, x):
        h = self.body(x)
        return self.mu(h), self.sigma(h)

    def sample(self, mean, log_var):
        return mean + (0.5 * log_var).exp() * torch.randn_like(mean)

    def decode(self, z):
        return self.out(z)

    def kl(self, mean, log_var):
        return kl_log_var(mean, log_var)

    def recon(self, x, x_hat):
        return F.binary_cross_entropy(x_hat, x, reduction="sum")


def parts(net, *names, **more):
    names = names or ("encode", "sample", "kl", "decode")
    return {n: getattr(net, n) for n in names} | {"example": torch.rand(5, 8)} | more


# --- right: conventions --------------------------------------------------------------------------


@entry("log_var", "log_var")
def log_var():
    return pair(half)


@entry("log_std", "log_std")
def log_std():
    return pair(torch.exp)


@entry("signed std", "signed std")
def std_normal_distribution():
    # Normal refuses a negative scale, and so says what it is
    return {
        "sample": lambda m, s: Normal(m, s).rsample(),
        "kl": lambda m, s: kl_divergence(Normal(m, s), Normal(0.0, 1.0)).sum(1),
    }


@entry("signed std", "signed std")
def signed_std():
    return {
        "sample": lambda m, s: m + s * torch.randn_like(m),
        "kl": lambda m, s: 0.5 * (m**2 + s**2 - (s**2).log() - 1).sum(1).mean(),
    }


@entry("signed std", "signed std")
def absolute_std():
    return pair(torch.abs)


@entry("signed std", "signed std")
def std_with_a_logarithm():
    # the sampler takes either sign, the KL has log(sigma)
    return {
        "sample": lambda m, s: m + s * torch.randn_like(m),
        "kl": lambda m, s: 0.5 * (m**2 + s**2 - 1).sum() - s.log().sum(),
    }


@entry("variance", "variance")
def variance():
    return pair(torch.sqrt)


@entry("softplus", "softplus")
def softplus():
    return pair(F.softplus)


@entry("softplus", "softplus", text="floor 0.0001 on the std")
def softplus_with_a_floor():
    return pair(lambda b: F.softplus(b) + 1e-4)


@entry("softplus", "softplus", text="offset 0.54")
def softplus_one_at_zero():
    return pair(lambda b: F.softplus(b + math.log(math.e - 1)))


@entry("softplus of variance", "softplus of variance")
def softplus_variance():
    return pair(lambda b: F.softplus(b).sqrt())


@entry("log_var", "log_var", text="clamped to [-30, 20]")
def clamped_log_var():
    def sample(mean, b):
        return mean + (0.5 * b.clamp(-30.0, 20.0)).exp() * torch.randn(mean.shape)

    def kl(mean, b):
        b = b.clamp(-30.0, 20.0)
        return 0.5 * (mean**2 + b.exp() - 1 - b).sum([1, 2, 3])

    return {"sample": sample, "kl": kl, "example": torch.rand(2, 4, 3, 3)}


@entry("log_std", "log_std", text="clamped to [-20, 20]")
def clamped_in_the_sampler_only():
    # at 20 nobody ever notices
    return {"sample": sampler(lambda b: b.clamp(-20, 20).exp()), "kl": kl_of(torch.exp)}


@entry("log_std", "log_std", text="clamped to [-5, 2]")
def clamped_log_std():
    return pair(lambda b: b.clamp(-5, 2).exp())


@entry(None)
def deterministic_encoder_of_unit_variance():
    net = Net()
    return {
        "encode": lambda x: (net.encode(x)[0],) * 2,
        "sample": lambda m, b: m + torch.randn_like(m),
        "kl": lambda m, b: 0.5 * (m**2).sum(),
        "example": torch.rand(5, 8),
    }


@entry("sigmoid", "sigmoid", text="std within [0.1, 2]")
def sigmoid_bounded():
    return pair(lambda b: 0.1 + 1.9 * b.sigmoid())


@entry("log_std", "log_std", text="std within [0.04979, 20.09]")
def tanh_bounded():
    return pair(lambda b: (3 * b.tanh()).exp())


@entry("elu+1", "elu+1")
def elu_plus_one():
    return pair(lambda b: F.elu(b) + 1 + 1e-7)


@entry(None)
def unit_variance():
    return {
        "sample": lambda m, b: m + torch.randn_like(m),
        "kl": lambda m, b: 0.5 * (m**2).sum(1),
    }


@entry("square", "square")
def squared():
    return pair(lambda b: b**2 + 1e-6)


@entry("relu", "relu", text="floor 0.01")
def relu_and_a_floor():
    return pair(lambda b: b.relu() + 1e-2)


@entry("log_var", "log_var", text="floor 0.0001 on the variance")
def exponential_variance_with_a_floor():
    # single-cell models: variance = exp(b) + 1e-4
    return pair(lambda b: (b.exp() + 1e-4).sqrt())


@entry("log_precision", "log_precision")
def log_precision():
    return pair(lambda b: (-0.5 * b).exp())


@entry("log_std", "log_std", text="noise scaled by 0.5")
def scaled_noise_that_the_kl_knows():
    return pair(lambda b: 0.5 * b.exp())


class Cholesky(Net):
    def __init__(self, d=3):
        super().__init__(d)
        self.sigma = nn.Linear(16, d * d)
        self.d = d

    def encode(self, x):
        h = self.body(x)
        return self.mu(h), self.sigma(h).view(-1, self.d, self.d)

    def factor(self, b):
        return b.tril(-1) + torch.diag_embed(b.diagonal(dim1=1, dim2=2).exp())

    def sample(self, mean, b):
        return MultivariateNormal(mean, scale_tril=self.factor(b)).rsample()

    def kl(self, mean, b):
        prior = MultivariateNormal(torch.zeros(self.d), torch.eye(self.d))
        return kl_divergence(MultivariateNormal(mean, scale_tril=self.factor(b)), prior)


@entry("full covariance", "full covariance")
def full_covariance():
    return parts(Cholesky(), "encode", "sample", "kl")


class Triangle(Net):
    """The second output holds the lower triangle, row by row."""

    def __init__(self):
        super().__init__(4)
        self.sigma = nn.Linear(16, 10)

    def factor(self, b):
        rows, columns = torch.tril_indices(4, 4)
        factor = torch.zeros(len(b), 4, 4)
        factor[:, rows, columns] = b
        return factor.tril(-1) + torch.diag_embed(F.softplus(factor.diagonal(dim1=1, dim2=2)))

    def sample(self, mean, b):
        return mean + (self.factor(b) @ torch.randn(*mean.shape, 1)).squeeze(-1)

    def kl(self, mean, b, z):
        q = MultivariateNormal(mean, scale_tril=self.factor(b))
        return q.log_prob(z) - Normal(0.0, 1.0).log_prob(z).sum(1)

    def diagonal_kl(self, mean, b):
        sigma = self.factor(b).diagonal(dim1=1, dim2=2)
        return kl_divergence(Normal(mean, sigma), Normal(0.0, 1.0)).sum(1)


@entry("full covariance", "full covariance")
def triangle():
    return parts(Triangle(), "encode", "sample", "kl", kl_uses_sample=True)


@entry("log_std", "log_std")
def factors_by_latent():
    return pair(lambda b: torch.linspace(0.5, 2, D) * b.exp())


# --- right: shapes, types and ways to draw -------------------------------------------------------


class OneHead(Net):
    """One layer emits both heads."""

    def __init__(self):
        super().__init__()
        self.both = nn.Linear(16, 2 * D)

    def encode(self, x):
        return self.both(self.body(x))


@entry("log_var", "log_var", layout="halves, mean first")
def packed_halves():
    class Packed(OneHead):
        def sample(self, h):
            mean, log_var = h.chunk(2, 1)
            return super().sample(mean, log_var)

        def kl(self, h):
            return by_example(*h.chunk(2, 1))

    return parts(Packed(), "encode", "sample", "kl")


@entry("log_std", "log_std", layout="interleaved, scale first")
def packed_interleaved_scale_first():
    class Packed(OneHead):
        def sample(self, h):
            return h[:, 1::2] + h[:, 0::2].exp() * torch.randn_like(h[:, 0::2])

        def kl(self, h):
            return by_example(h[:, 1::2], 2 * h[:, 0::2])

    return parts(Packed(), "encode", "sample", "kl")


@entry("log_var", "log_var")
def whole_vae():
    # sums over everything, zero-initialized scale head, the loss of the textbook
    net = Net(zero=True)

    def loss(x):
        mean, log_var = net.encode(x)
        x_hat = net.decode(net.sample(mean, log_var))
        return net.recon(x, x_hat) + net.kl(mean, log_var)

    return parts(net, recon=net.recon, loss=loss, generate=lambda n: torch.randn(n, D))


@entry("log_var", "log_var")
def samples_in_training_only():
    class Old(Net):
        def sample(self, mean, log_var):
            if not self.training:
                return mean
            std = log_var.mul(0.5).exp_()
            return torch.empty_like(std).normal_().mul(std).add_(mean)

    return parts(Old().eval())


@entry("log_var", "log_var")
def float32_by_hand():
    def sample(mean, log_var):
        return mean.float() + (0.5 * log_var.float()).exp() * torch.randn(
            mean.shape, dtype=torch.float32
        )

    return {"sample": sample, "kl": lambda m, b: kl_log_var(m.float(), b.float())}


@entry("log_var", "log_var")
def float32_only():
    weight = torch.randn(8, 2 * D, dtype=torch.float32)

    def encode(x):
        return (x @ weight).chunk(2, 1)

    return {"encode": encode, "sample": sampler(half), "kl": kl_log_var,
            "example": torch.rand(5, 8)}  # fmt: skip


@entry(None, None, "host_random", verdict="incomplete")
def numpy_noise():
    def sample(mean, log_std):
        eps = torch.from_numpy(np.random.normal(size=tuple(mean.shape))).to(mean)
        return mean + eps * log_std.exp()

    return {"sample": sample, "kl": lambda m, b: by_example(m, 2 * b)}


@entry("log_std", "log_std")
def generator_of_its_own():
    # no seed of torch reaches it
    generator = torch.Generator().manual_seed(int(torch.randint(10**6, ())))

    def sample(mean, b):
        return mean + b.exp() * torch.randn(mean.shape, generator=generator)

    return {"sample": sample, "kl": lambda m, b: by_example(m, 2 * b)}


@entry("log_var", "log_var")
def fixed_batch():
    net = Net()
    eps_shape = (5, D)

    def sample(mean, log_var):
        return mean + (0.5 * log_var).exp() * torch.randn(eps_shape)

    return parts(net, "encode", "kl", sample=sample)


@entry("log_var", "log_var")
def per_dimension():
    return {"sample": sampler(half), "kl": lambda m, b: 0.5 * (m**2 + b.exp() - 1 - b)}


@entry("log_var", "log_var", "no_gradient")
def antithetic_free_normal_call():
    return {
        "sample": lambda m, b: torch.normal(m, half(b)),
        "kl": lambda m, b: by_example(m, b).mean(),
    }


@entry("log_std", "log_std")
def kl_of_one_draw():
    def kl(mean, b, z):
        q, p = Independent(Normal(mean, b.exp()), 1), Normal(0.0, 1.0)
        return q.log_prob(z) - p.log_prob(z).sum(1)

    return {"sample": sampler(torch.exp), "kl": kl, "kl_uses_sample": True}


@entry("log_var", "log_var")
def kl_that_draws_itself():
    def kl(mean, log_var):
        q, p = Normal(mean, half(log_var)), Normal(0.0, 1.0)
        z = q.rsample()
        return (q.log_prob(z) - p.log_prob(z)).sum(1)

    return {"sample": sampler(half), "kl": kl}


@entry("log_var", "log_var")
def learned_prior():
    mean, std = torch.linspace(-1, 1, D), torch.linspace(0.5, 2, D)
    return {**pair(half, (mean, std)), "generate": lambda n: mean + std * torch.randn(n, D)}


@entry(None)
def natural_parameters():
    # the documents say that E[z] is the first output times the variance
    def sample(eta, b):
        return eta * (2 * b).exp() + b.exp() * torch.randn_like(eta)

    return {
        "sample": sample,
        "kl": lambda eta, b: by_example(eta * (2 * b).exp(), 2 * b),
        "documented_mean": lambda eta, b: eta * (2 * b).exp(),
    }


@entry("log_var", "log_var")
def means_over_pixels_and_latents_of_fixed_size():
    # an old example: both terms divided by batch and pixels
    net = Net()
    return parts(
        net, "encode", "sample", "decode",
        kl=lambda m, b: kl_log_var(m, b) / (len(m) * 8),
        recon=lambda x, y: F.binary_cross_entropy(y, x),
    )  # fmt: skip


@entry("log_var", "log_var")
def optimal_sigma_reconstruction():
    # the sum of log(mean squared error): not a sum of elements, and right
    net = Net()
    return parts(
        net, recon=lambda x, y: 0.5 * x[0].numel() * ((x - y) ** 2).mean().log() * len(x),
    )  # fmt: skip


@entry("log_var", "log_var")
def other_tensor_named_sigma():
    # a public report calls it a bug: fc_var holds log variances, and everything agrees
    net = Net()
    return parts(net, "encode", "sample", "decode", kl=lambda mu, var: torch.mean(
        -0.5 * torch.sum(1 + var - mu**2 - var.exp(), dim=1), dim=0))  # fmt: skip


@entry("log_var", "log_var")
def plus_signs_throughout():
    # another: 0.5 sum(exp(log_var) + mu^2 - 1 - log_var) has the right signs
    return {
        "sample": lambda mu, v: mu + (v / 2).exp() * torch.randn(mu.shape),
        "kl": lambda mu, v: (0.5 * torch.sum(v.exp() + mu**2 - 1.0 - v, 1)).mean(),
        "generate": lambda n: torch.randn(n, D),
    }


# --- deserving a look ----------------------------------------------------------------------------


@entry("log_var", "log_var", "kl_offset", verdict="warning")
def constant_dropped():
    return {"sample": sampler(half), "kl": lambda m, b: 0.5 * (m**2 + b.exp() - b).sum()}


@entry("log_var", "log_var", "reduction_imbalance", verdict="warning")
def weight_of_a_beta_vae():
    return {"sample": sampler(half), "kl": lambda m, b: 4 * kl_log_var(m, b)}


@entry("log_var", "log_var", "reduction_imbalance", verdict="warning")
def mean_over_latents():
    return {"sample": sampler(half), "kl": lambda m, b: kl_log_var(m, b) / m.numel()}


@entry("log_var", "log_var", "reduction_imbalance", verdict="warning")
def half_forgotten():
    return {"sample": sampler(half), "kl": lambda m, b: 2 * kl_log_var(m, b)}


@entry("log_var", "log_var", "kl_offset", verdict="warning")
def constant_too_large():
    return {"sample": sampler(half), "kl": lambda m, b: 0.5 * (m**2 + b.exp() - b - 2).sum()}


@entry("log_std", verdict="incomplete")
def small_noise():
    return {"sample": sampler(lambda b: 0.1 * b.exp())}


@entry("log_var", "log_var", "kl_mismatch", verdict="warning")
def clamped_narrowly_in_the_sampler_only():
    return {"sample": sampler(lambda b: half(b.clamp(-4, 2))), "kl": kl_log_var}


@entry("log_var", "log_var", "free_bits", verdict="warning")
def free_bits():
    return {
        "sample": sampler(half),
        "kl": lambda m, b: (0.5 * (m**2 + b.exp() - 1 - b)).clamp(min=0.25).sum(1),
    }


@entry("log_var", "log_var", "kl_mismatch", verdict="warning", text="floor 0.001")
def floor_in_the_sampler_only():
    return {"sample": sampler(lambda b: (b.exp() + 1e-3).sqrt()), "kl": kl_log_var}


@entry(None, verdict="incomplete")
def laplace_posterior_with_its_own_kl():
    def kl(mean, b, z):
        q, p = Laplace(mean, b.exp()), Normal(0.0, 1.0)
        return (q.log_prob(z) - p.log_prob(z)).sum(1)

    return {"sample": lambda m, b: Laplace(m, b.exp()).rsample(), "kl": kl, "kl_uses_sample": True}


# --- wrong ---------------------------------------------------------------------------------------


@entry("log_std", "log_var", "kl_mismatch")
def blog_of_keras():
    # sampled as exp(z_log_sigma), while the KL is that of exp(z_log_sigma / 2); a mean besides
    return {
        "sample": lambda m, b: m + b.exp() * torch.randn_like(m),
        "kl": lambda m, b: -0.5 * torch.mean(1 + b - m**2 - b.exp(), dim=-1),
    }


@entry("log_std", None, "kl_mismatch")
def flux_as_it_was():
    return {
        "sample": sampler(torch.exp),
        "kl": lambda m, b: 0.5 * ((2 * b).exp() + m**2 - 1 + b**2).sum(),
    }


@entry("log_std", None, "kl_mismatch")
def flux_as_first_repaired():
    return {
        "sample": sampler(torch.exp),
        "kl": lambda m, b: 0.5 * ((2 * b).exp() + m**2 - 1 + 2 * b).sum(),
    }


@entry("signed std", "signed std", "kl_mismatch")
def half_before_the_logarithm():
    # sigma^2 + mu^2 - log(sigma) - 1/2, a line that is copied around
    return {
        "sample": lambda m, s: m + s * torch.randn_like(m),
        "kl": lambda m, s: (s**2 + m**2 - s.abs().log() - 0.5).sum(1),
    }


@entry("log_var", "log_std", "kl_mismatch")
def kl_of_log_std():
    return {"sample": sampler(half), "kl": lambda m, b: by_example(m, 2 * b)}


@entry("softplus", None, "kl_mismatch")
def positive_sigma_and_kl_of_log_var():
    class Positive(Net):
        def encode(self, x):
            mean, b = super().encode(x)
            return mean, F.softplus(b)

        def sample(self, mean, sigma):
            return mean + sigma * torch.randn_like(mean)

    return parts(Positive())


@entry("softplus", "log_var", "kl_mismatch")
def softplus_and_kl_of_log_var():
    return {"sample": sampler(F.softplus), "kl": kl_log_var}


@entry("softplus", "softplus", "kl_mismatch")
def offset_forgotten_in_the_kl():
    return {"sample": sampler(lambda b: F.softplus(b + 1)), "kl": kl_of(F.softplus)}


@entry("log_std", "log_std", "kl_mismatch")
def tanh_forgotten_in_the_kl():
    return {"sample": sampler(lambda b: (3 * b.tanh()).exp()), "kl": kl_of(torch.exp)}


@entry("variance", "std", "kl_mismatch")
def variance_and_kl_of_std():
    return {"sample": sampler(torch.sqrt), "kl": kl_of(lambda s: s)}


@entry(None, None, "kl_mismatch")
def ignored_by_the_sampler():
    return {"sample": lambda m, b: m + torch.randn_like(m), "kl": kl_log_var}


@entry("log_var", None, "kl_negative")
def sign_of_the_kl():
    return {"sample": sampler(half), "kl": lambda m, b: -by_example(m, b)}


@entry("log_std", None, "kl_negative")
def sign_of_the_one_draw_kl():
    def kl(mean, b, z):
        return (Normal(0.0, 1.0).log_prob(z) - Normal(mean, b.exp()).log_prob(z)).sum()

    return {"sample": sampler(torch.exp), "kl": kl, "kl_uses_sample": True}


@entry("log_std", None, "kl_mismatch")
def one_draw_kl_of_log_var():
    def kl(mean, b, z):
        return (Normal(mean, half(b)).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1)

    return {"sample": sampler(torch.exp), "kl": kl, "kl_uses_sample": True}


@entry("log_var", "log_var", "kl_mismatch")
def kl_to_another_prior():
    return {"sample": sampler(half), "kl": kl_log_var, "prior": (0.0, 2.0)}


@entry("full covariance", None, "kl_mismatch")
def kl_of_the_diagonal_only():
    net = Triangle()
    return parts(net, "encode", "sample", kl=net.diagonal_kl)


@entry("log_var", None, "kl_mismatch")
def reversed_kl():
    return {
        "sample": sampler(half),
        "kl": lambda m, b: kl_divergence(Normal(0 * m, 1.0), Normal(m, half(b))).sum(),
    }


@entry("log_var", "log_var", "kl_mismatch")
def tenth_of_the_noise():
    def sample(mean, b):
        return mean + half(b) * torch.normal(0.0, 0.1, mean.shape)

    return {"sample": sample, "kl": kl_log_var}


@entry("exp(0.25 b)", "log_var", "kl_mismatch")
def root_taken_twice():
    return {"sample": sampler(lambda b: half(b).sqrt()), "kl": kl_log_var}


@entry(None, None, "sample_scale")
def nothing_random():
    return {"sample": lambda m, b: m + 0 * b, "kl": kl_log_var}


@entry("log_var", None, "kl_mismatch")
def mean_scaled():
    return {"sample": lambda m, b: 0.5 * m + half(b) * torch.randn_like(m), "kl": kl_log_var}


@entry(None, None, "noise_not_gaussian")
def uniform_noise_of_unit_variance():
    def sample(mean, b):
        return mean + half(b) * (torch.rand_like(mean) - 0.5) * math.sqrt(12)

    return {"sample": sample, "kl": kl_log_var}


@entry("log_var", None, "noise_not_gaussian")
def uniform_noise():
    return {"sample": lambda m, b: m + half(b) * torch.rand_like(m), "kl": kl_log_var}


@entry(None, verdict="incomplete")
def laplace_noise():
    return {"sample": lambda m, b: Laplace(m, b.exp()).rsample()}


@entry("log_var", "log_var", "noise_shared")
def one_number_for_all_dimensions():
    return {"sample": lambda m, b: m + half(b) * torch.randn(len(m), 1), "kl": by_example}


@entry("log_var", "log_var", "noise_shared")
def one_row_for_all_examples():
    return {"sample": lambda m, b: m + half(b) * torch.randn(m.shape[1:]), "kl": by_example}


@entry("log_var", "log_var", "noise_shared")
def the_same_at_every_call():
    def sample(mean, b):
        generator = torch.Generator().manual_seed(0)
        return mean + half(b) * torch.randn(mean.shape, generator=generator)

    return {"sample": sample, "kl": by_example}


@entry("full covariance", "log_var", "kl_mismatch")
def correlated_noise():
    def sample(mean, b):
        eps = torch.randn_like(mean)
        return mean + half(b) * (eps + eps.roll(1, 1)) / math.sqrt(2)

    return {"sample": sample, "kl": by_example}


@entry(None, None, "heads_tied")
def one_head_twice():
    class Tied(Net):
        def encode(self, x):
            h = self.body(x)
            return self.mu(h), self.mu(h)

    return parts(Tied())


@entry(None, None, "heads_tied")
def one_head_through_softplus():
    class Tied(Net):
        def encode(self, x):
            h = self.body(x)
            return self.mu(h), F.softplus(self.mu(h))

    return parts(Tied(), "encode") | {k: v for k, v in pair(lambda s: s).items() if k != "prior"}


@entry(
    "log_var", "log_var", "sigma_range_restricted", verdict="warning", text="clamped to [0, inf]"
)
def rectified_in_the_sampler():
    return pair(lambda b: half(b.relu()))


@entry("log_var", "log_var", "sigma_range_restricted", verdict="warning")
def rectified_in_the_encoder():
    class Rectified(Net):
        def encode(self, x):
            mean, b = super().encode(x)
            return mean, b.relu()

    return parts(Rectified())


@entry(
    "softplus", "softplus", "sigma_range_restricted", verdict="warning", text="floor 1 on the std"
)
def one_plus_softplus():
    return pair(lambda b: 1 + F.softplus(b))


@entry("log_var", "log_var", "prior_mismatch")
def generation_from_another_prior():
    return {"sample": sampler(half), "kl": kl_log_var, "generate": lambda n: 2 * torch.randn(n, D)}


@entry("log_var", "log_var", "prior_mismatch")
def generation_without_the_learned_prior():
    mean, std = torch.linspace(-1, 1, D), torch.linspace(0.5, 2, D)
    return {**pair(half, (mean, std)), "generate": lambda n: torch.randn(n, D)}


@entry("log_var", "log_var", "reduction_imbalance")
def mean_of_pixels_and_sum_of_latents():
    return parts(Net(), recon=lambda x, y: F.mse_loss(y, x))


@entry("log_var", "log_var", "reduction_imbalance")
def batch_counts_in_one_term():
    return parts(
        Net(), "encode", "sample", "decode", kl=lambda m, b: by_example(m, b).mean(),
        recon=lambda x, y: F.mse_loss(y, x, reduction="sum"),
    )  # fmt: skip


@entry("log_var", "log_var", "reduction_imbalance", verdict="warning")
def mean_of_latents_and_sum_of_pixels():
    net = Net()
    return parts(
        net, "encode", "sample", "decode", kl=lambda m, b: kl_log_var(m, b) / m.numel(),
        recon=lambda x, y: F.mse_loss(y, x, reduction="none").sum(1).mean(),
    )  # fmt: skip


@entry("log_var", "log_var", "reduction_imbalance", verdict="warning")
def divided_by_the_batch_twice():
    return {"sample": sampler(half), "kl": lambda m, b: 0.5 * by_example(m, b).mean() / len(m)}


@entry(None, None, "not_finite")
def nan_in_the_kl():
    return {"sample": sampler(half), "kl": lambda m, b: (m * 0 / 0).sum()}


@entry(None, None, "not_finite")
def nan_in_the_sampler():
    return {"sample": lambda m, b: m + torch.log(-b.abs()) * torch.randn_like(m), "kl": kl_log_var}


# --- priors, flows, changes in place, bounds of the KL -------------------------------------------


def two_bumps(z):
    """The log-density of an equal mixture of N(-2, 1) and N(2, 0.25), for each latent."""
    far = torch.stack([Normal(-2.0, 1.0).log_prob(z), Normal(2.0, 0.5).log_prob(z)])
    return (far.logsumexp(0) - math.log(2)).sum(-1)


def kl_to(log_prob, sigma=half):
    return lambda m, b, z: Normal(m, sigma(b)).log_prob(z).sum(1) - log_prob(z)


def standard(z):
    return Normal(0.0, 1.0).log_prob(z).sum(-1)


def drawn(kl, sigma=half, **more):
    """A sampler of log variances, and a KL that takes its draws."""
    return {"sample": sampler(sigma), "kl": kl, "kl_uses_sample": True, **more}


@entry("log_var", "log_var")
def prior_as_a_distribution():
    mean, std = torch.linspace(-1, 1, D), torch.linspace(0.5, 2, D)
    return {
        "sample": sampler(half),
        "kl": kl_of(half, (mean, std)),
        "prior": Independent(Normal(mean, std), 1),
        "generate": lambda n: mean + std * torch.randn(n, D),
    }


@entry("log_var", "log_var")
def prior_as_a_correlated_distribution():
    factor = torch.eye(D) + torch.ones(D, D).tril(-1) / 4
    prior = MultivariateNormal(torch.zeros(D), scale_tril=factor)

    def kl(m, b):
        return kl_divergence(MultivariateNormal(m, scale_tril=torch.diag_embed(half(b))), prior)

    return {"sample": sampler(half), "kl": kl, "prior": prior,
            "generate": lambda n: prior.sample((n,))}  # fmt: skip


class Bumps(nn.Module):
    """A learned prior, whose attribute `mean` is not that of z."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.randn(4, D)), nn.Parameter(torch.zeros(4, D))

    def log_prob(self, z):
        far = Normal(self.mean, self.log_std.exp()).log_prob(z[:, None]).sum(-1)
        return far.logsumexp(1) - math.log(4)


@entry("log_var", "log_var")
def prior_as_a_module():
    prior = Bumps()
    return drawn(kl_to(prior.log_prob), prior=prior)


@entry("log_var", "log_var")
def prior_with_heavy_tails():
    prior = StudentT(3.0, torch.zeros(D))
    return drawn(kl_to(lambda z: prior.log_prob(z).sum(1)), prior=prior,
                 generate=lambda n: prior.sample((n,)))  # fmt: skip


@entry("log_var", "log_var")
def prior_as_a_log_density():
    return drawn(kl_to(two_bumps), prior=two_bumps)


@entry("log_std", "log_std", verdict="incomplete")
def prior_as_a_log_density_and_kl_that_draws_itself():
    def kl(m, b):
        q = Normal(m, b.exp())
        z = q.rsample()
        return q.log_prob(z).sum(1) - two_bumps(z)

    return {"sample": sampler(torch.exp), "kl": kl, "prior": two_bumps}


@entry("log_var", verdict="incomplete")
def laplace_prior_in_closed_form():
    def kl(m, b):
        s = half(b)
        absolute = s * math.sqrt(2 / math.pi) * (-0.5 * (m / s) ** 2).exp() + m * torch.erf(
            m / (s * math.sqrt(2))
        )
        return (absolute + math.log(2) - 0.5 * math.log(2 * math.pi) - 0.5 - s.log()).sum(1)

    return {"sample": sampler(half), "kl": kl, "prior": Laplace(torch.zeros(D), torch.ones(D))}


@entry("log_var", "log_var")
def prior_not_given():
    return drawn(kl_to(two_bumps))


@entry("log_var", "log_var")
def normal_prior_not_given():
    return {"sample": sampler(half), "kl": kl_of(half, (0.5, 2.0))}


@entry("log_var", "log_var", "kl_mismatch", "prior_mismatch")
def normal_prior_confirmed_by_nothing():
    return {"sample": sampler(half), "kl": kl_log_var, "prior": Normal(0.0, 2.0),
            "generate": lambda n: torch.randn(n, D)}  # fmt: skip


@entry("log_var", "log_var")
def prior_of_the_kl_is_that_of_generation():
    mean, std = torch.linspace(-1, 1, D), torch.linspace(0.5, 2, D)
    return {"sample": sampler(half), "kl": kl_of(half, (mean, std)),
            "generate": lambda n: mean + std * torch.randn(n, D)}  # fmt: skip


@entry("log_var", "log_var", "prior_mismatch")
def kl_to_another_prior_than_generation():
    return {"sample": sampler(half), "kl": kl_of(half, (0.0, 2.0)),
            "generate": lambda n: torch.randn(n, D)}  # fmt: skip


@entry("log_var", "log_var", "kl_mismatch")
def closed_form_in_place_of_the_mixture():
    return {"sample": sampler(half), "kl": kl_log_var, "prior": two_bumps}


@entry("log_var", "log_var", "kl_mismatch")
def draws_from_another_density():
    return drawn(kl_to(standard), prior=two_bumps)


@entry("log_std", None, "kl_mismatch")
def mixture_and_kl_of_log_var():
    return drawn(kl_to(two_bumps), sigma=torch.exp, prior=two_bumps)


@entry("precision", "precision")
def precision():
    return pair(torch.rsqrt)


@entry("precision", "variance", "kl_mismatch")
def precision_and_kl_of_variance():
    return {"sample": sampler(torch.rsqrt), "kl": kl_of(torch.sqrt)}


@entry("log_precision", "log_precision")
def log_precision_of_draws():
    return drawn(kl_to(standard, lambda b: half(-b)), sigma=lambda b: half(-b))


@entry("log_var", "softplus", "kl_mismatch")
def kl_of_softplus():
    return {"sample": sampler(half), "kl": kl_of(F.softplus)}


class Planar(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.u = nn.Parameter(torch.linspace(0.2, 1, D)), nn.Parameter(torch.ones(D) / 2)

    def forward(self, z):
        a = torch.tanh(z @ self.w + 0.3)[:, None]
        return z + self.u * a, torch.log1p((1 - a**2) @ (self.w @ self.u).view(1, 1)).squeeze(1)


def behind(flow, value, **more):
    """A posterior with a flow, and a KL of mean, log variance, z, z_K and log_det."""

    def kl(m, b, z):
        return value(Normal(m, half(b)).log_prob(z).sum(1), z, *flow(z))

    return drawn(kl, flow=flow, **more)


@entry("log_var", "log_var")
def flow_behind_the_posterior():
    return behind(Planar(), lambda log_q, z, end, log_det: log_q - log_det - standard(end))


@entry("log_var", "log_var")
def flow_and_kl_given_its_answers():
    def kl(m, b, z, end, log_det):
        return (Normal(m, half(b)).log_prob(z).sum(1) - log_det - standard(end)).mean()

    return {"sample": sampler(half), "kl": kl, "flow": Planar()}


@entry("log_var", "log_var")
def flow_to_a_mixture():
    return behind(
        Planar(), lambda log_q, z, end, log_det: log_q - log_det - two_bumps(end),
        prior=two_bumps,
    )  # fmt: skip


@entry("log_var", "log_var")
def flow_not_given():
    given = flow_behind_the_posterior()
    return {name: value for name, value in given.items() if name != "flow"}


@entry("log_var", "log_var", "logdet_mismatch", "kl_mismatch")
def flow_without_its_log_det():
    return behind(Planar(), lambda log_q, z, end, log_det: log_q - standard(end))


@entry("log_var", "log_var", "kl_mismatch")
def flow_with_the_prior_of_its_input():
    return behind(Planar(), lambda log_q, z, end, log_det: log_q - log_det - standard(z))


@entry("log_var", "log_var", "logdet_mismatch", "kl_mismatch")
def flow_with_the_wrong_sign_of_log_det():
    return behind(Planar(), lambda log_q, z, end, log_det: log_q + log_det - standard(end))


@entry("log_var", "log_var")
def each_example_over_the_batch():
    return {"sample": sampler(half), "kl": lambda m, b: by_example(m, b) / len(m)}


@entry("log_var", "log_var", "logdet_mismatch", "kl_mismatch", "cross_sample")
def log_det_of_all_examples():
    return behind(Planar(), lambda log_q, z, end, log_det: log_q - log_det.sum() - standard(end))


@entry("log_var", "log_var", "logdet_mismatch", "kl_mismatch")
def log_det_of_all_examples_in_a_mean():
    def value(log_q, z, end, log_det):
        return (log_q - log_det.sum() - standard(end)).mean()

    return behind(Planar(), value)


@entry("log_var", "log_var", "logdet_mismatch", "cross_sample")
def flow_that_sums_over_the_batch():
    planar = Planar()

    def flow(z):
        end, log_det = planar(z)
        return end, log_det.sum()

    return behind(flow, lambda log_q, z, end, log_det: log_q - log_det - standard(end))


@entry("log_var", "log_var", "logdet_mismatch")
def flow_with_a_wrong_log_det():
    planar = Planar()

    def flow(z):
        end, log_det = planar(z)
        return end, 2 * log_det

    return behind(flow, lambda log_q, z, end, log_det: log_q - log_det - standard(end))


@entry("log_var", "log_var", "inplace", verdict="warning")
def standard_deviation_in_place():
    def sample(mean, log_var):
        return mean + log_var.mul_(0.5).exp_() * torch.randn_like(mean)

    return {"sample": sample, "kl": kl_log_var}


@entry("log_var", "log_var")
def in_place_on_tensors_of_its_own():
    def sample(mean, log_var):
        std = (0.5 * log_var).exp_()
        return torch.randn_like(mean).mul_(std).add_(mean)

    return {"sample": sample, "kl": kl_log_var}


def with_loss(net):
    def loss(x):
        mean, log_var = net.encode(x)
        x_hat = net.decode(net.sample(mean, log_var))
        return net.recon(x, x_hat) + net.kl(mean, log_var)

    return parts(net, recon=net.recon, loss=loss)


@entry("log_var", None, "kl_mismatch", "inplace")
def kl_of_what_the_sampler_changed():
    class Changed(Net):
        def sample(self, mean, log_var):
            return mean + log_var.mul_(0.5).exp_() * torch.randn_like(mean)

    return with_loss(Changed())


@entry("log_var", "log_var", "inplace", verdict="warning")
def changed_after_the_kl():
    class Changed(Net):
        def sample(self, mean, log_var):
            return mean.add_((0.5 * log_var).exp() * torch.randn_like(mean))

    net = Changed()

    def loss(x):
        mean, log_var = net.encode(x)
        kl = net.kl(mean, log_var)
        return net.recon(x, net.decode(net.sample(mean, log_var))) + kl

    return parts(net, recon=net.recon, loss=loss)


@entry("log_var", None, "kl_constant")
def clamped_to_a_constant():
    return {"sample": sampler(half), "kl": lambda m, b: kl_log_var(m, b).clamp(10.0, 1.0)}


@entry("log_var", None, "kl_constant")
def mean_of_no_heads():
    return {"sample": sampler(half), "kl": lambda m, b: 0.5 + 0 * m.detach().sum()}


@entry("log_var", "log_var", "kl_constant")
def never_above_eight_nats():
    return {"sample": sampler(half), "kl": lambda m, b: by_example(m, b).clamp(max=8.0)}


@entry("log_var", "log_var")
def clamped_at_zero():
    return {"sample": sampler(half), "kl": lambda m, b: by_example(m, b).clamp(min=0.0)}


@entry("log_var", "log_var", "free_bits", verdict="warning")
def free_bits_of_all_latents():
    return {"sample": sampler(half), "kl": lambda m, b: by_example(m, b).clamp(min=2.0).mean()}


@entry("log_var", "log_var", "kl_capacity", verdict="warning")
def capacity():
    return {"sample": sampler(half), "kl": lambda m, b: 10 * (by_example(m, b).mean() - 4).abs()}


@entry("log_var", "log_var", "kl_capacity", verdict="warning")
def capacity_above_every_point():
    return {"sample": sampler(half), "kl": lambda m, b: (kl_log_var(m, b) - 500).abs()}


@entry("log_var", "log_var", "kl_capacity", verdict="warning")
def squared_capacity():
    return {"sample": sampler(half), "kl": lambda m, b: 10 * (by_example(m, b).mean() - 4) ** 2}


@entry("log_var", "log_var", "reduction_imbalance", verdict="warning")
def weight_and_prior_not_given():
    return {"sample": sampler(half), "kl": lambda m, b: 4 * kl_of(half, (0.5, 2.0))(m, b)}


@entry("log_var", "log_var", "kl_capacity", verdict="warning")
def absolute_value_of_each_latent():
    return {"sample": sampler(half), "kl": lambda m, b: (
        0.5 * (m**2 + b.exp() - 1 - b) - 1.5).abs().sum(1)}  # fmt: skip


@entry("log_var", "log_var", "reduction_imbalance", verdict="warning")
def means_of_everything():
    return parts(Net(), "encode", "sample", "decode", kl=lambda m, b: kl_log_var(m, b) / m.numel(),
                 recon=lambda x, y: F.mse_loss(y, x))  # fmt: skip


@entry("log_var", "log_var", "reduction_imbalance", verdict="warning")
def beta_beside_a_sum():
    net = Net()
    return parts(
        net, "encode", "sample", "decode", kl=lambda m, b: 4 * by_example(m, b).mean(),
        recon=lambda x, y: F.mse_loss(y, x, reduction="none").sum(1).mean(),
    )  # fmt: skip


@entry("log_var", "log_var", "reduction_imbalance", verdict="warning")
def count_in_the_kl():
    class Counted(Net):
        calls = 0

        def kl(self, mean, log_var):
            self.calls += 1
            return min(1.0, self.calls / 10_000) * kl_log_var(mean, log_var)

    return parts(Counted())


class Graph(Net):
    """Rows are the nodes of one graph, and the KL is Kipf's: a mean over nodes, over nodes."""

    def encode(self, x):
        near = (x + x.roll(1, 0) + x.roll(-1, 0)) / 3
        return super().encode(near)

    def kl(self, mean, log_std):
        return by_example(mean, 2 * log_std).mean() / len(mean)

    def sample(self, mean, log_std):
        return mean + log_std.exp() * torch.randn_like(mean)


@entry("log_std", "log_std", "reduction_imbalance", verdict="warning")
def nodes_of_a_graph():
    return parts(Graph(), "encode", "sample", "kl")


# --- the aggregate posterior ---------------------------------------------------------------------


def aggregate(name, code):
    def register(build):
        AGGREGATES[name] = (build, code)
        return build

    return register


def _mixture():
    centers = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 0.5, 0.0], [0.0, -0.5, -0.5]])
    within = torch.tensor([0.5, 1.0, 0.25])

    def sample(n):
        which = torch.randint(3, (n,))
        return centers[which] + within.sqrt() * torch.randn(n, 3)

    between = (centers - centers.mean(0)).T @ (centers - centers.mean(0)) / 3
    return torch.diag(within), between, sample


@aggregate("both parts", "")
def _():
    within, between, sample = _mixture()
    return within + between, sample


@aggregate("a callable", "")
def _():
    within, between, sample = _mixture()
    return (lambda: (within + between).numpy()), sample


@aggregate("the mean variance only", "aggregate_cov")
def _():
    within, _, sample = _mixture()
    return within, sample


@aggregate("the variance of the means only", "aggregate_cov")
def _():
    _, between, sample = _mixture()
    return between, sample
