"""Densities, figures and terms, correct and wrong, each with the expected audit."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributions as D
from torch import nn

from musigma.audit import (
    audit_bits,
    audit_density,
    audit_importance_bound,
    audit_log_prob_term,
)


@dataclass
class Case:
    """The call of the audit, and the expected result."""

    call: Callable
    verdict: str
    codes: tuple
    expected: dict


CASES: dict[str, Case] = {}
HALF = 0.5 * math.log(2 * math.pi)


def case(audit, name, make, verdict="correct", codes=(), expected=None, **arguments):
    def call():
        return audit(make(), **arguments)

    CASES[name] = Case(call, verdict, codes, expected or {})


# --- densities ----------------------------------------------------------------------------------


def density(name, make, dim, wrong=False, verdict="correct", codes=()):
    if wrong:
        verdict, codes = "bug", ("not_normalised",)
    case(audit_density, f"density_{name}", make, verdict, codes, dim=dim)


def normal(d, mean=0.0, std=1.0):
    return D.Independent(D.Normal(mean * torch.ones(d), std * torch.ones(d)), 1)


def mixture(d, spread=6.0, k=4):
    means = spread * torch.randn(k, d)
    return D.MixtureSameFamily(
        D.Categorical(torch.rand(k)), D.Independent(D.Normal(means, 0.3 + torch.rand(k, d)), 1)
    )


density("normal", lambda: D.Normal(0.0, 1.0), 1)
density("normal_far_and_narrow", lambda: D.Normal(1000 * torch.randn(()), 1e-3), 1)
density("normal_function", lambda: lambda x: -0.5 * x[:, 0] ** 2 - 0.5 * math.log(2 * math.pi), 1)
density("normal_of_numpy", lambda: _numpy_normal, 1)
density("cauchy", lambda: D.Cauchy(torch.randn(()), 3.0), 1)
density("student", lambda: D.StudentT(1.5, 0.0, 0.2), 1)
density("uniform_box", lambda: D.Uniform(0.2, 0.7 + torch.rand(())), 1)
density("exponential", lambda: D.Exponential(3.0), 1)
density("beta", lambda: D.Beta(2.0, 3.0), 1)
density("mixture", lambda: mixture(1), 1)
density("normal_2d", lambda: normal(2, 3.0, 0.01), 2)
density(
    "correlated_2d",
    lambda: D.MultivariateNormal(torch.randn(2), torch.tensor([[1.0, 0.99], [0.99, 1.0]])),
    2,
)
density("box_2d", lambda: D.Independent(D.Uniform(torch.zeros(2), torch.ones(2)), 1), 2)
density("mixture_2d", lambda: mixture(2), 2)
density("flow_2d", lambda: _flow(2), 2)
density("normal_5d", lambda: normal(5, 2.0, 0.5), 5)
density("mixture_4d", lambda: mixture(4, 3.0, 3), 4)
density("correlated_6d", lambda: _correlated(6), 6)
density("flow_8d", lambda: _flow(8), 8)
density("no_constant", lambda: lambda x: -0.5 * x[:, 0] ** 2, 1, wrong=True)
density(
    "wrong_power_of_std",
    lambda: lambda x: D.Normal(0.0, 2.0).log_prob(x[:, 0]) - math.log(2),
    1,
    wrong=True,
)
density("truncated_without_mass", lambda: _truncated, 1, wrong=True)
density("flow_with_wrong_sign", lambda: _flow(2, -1.0), 2, wrong=True)
density(
    "mixture_without_weights",
    lambda: (
        lambda x: torch.logsumexp(
            torch.stack([normal(2, m).log_prob(x.float()) for m in (0.0, 4.0)]), 0
        )
    ),
    2,
    wrong=True,
)
density("no_constant_5d", lambda: lambda x: -0.5 * x.square().sum(1), 5, wrong=True)
density(
    "constant_once_6d",
    lambda: lambda x: -0.5 * x.square().sum(1) - 0.5 * math.log(2 * math.pi),
    6,
    wrong=True,
)

# of single points, or not
density("rows_keepdim_1d", lambda: lambda x: D.Normal(0.0, 1.0).log_prob(x), 1)
density("rows_last_axis_1d", lambda: lambda x: -0.5 * (x**2).sum(-1) - HALF, 1)
density("rows_squeezed", lambda: lambda x: normal(3).log_prob(x).squeeze(), 3)
density("rows_batch_norm_in_eval", lambda: _normalized(nn.BatchNorm1d(2)), 2)
density("rows_event_dim_1", lambda: _transformed(1), 2)
density("rows_elementwise_transform", lambda: _transformed(0, summed=False), 2)
density("rows_one_at_a_time", lambda: _loop, 1)
SHAPE, ROWS = ("log_prob_shape",), ("cross_sample",)
density("rows_event_dim_0", lambda: _transformed(0), 2, verdict="bug", codes=ROWS)
density("rows_constant_log_det_summed", lambda: _scaled_by_all, 2, verdict="bug", codes=ROWS)
density("rows_batch_statistics", lambda: _normalized(_standardized), 2, verdict="bug", codes=ROWS)
density("rows_softmax_over_batch", lambda: _softmax_over_rows, 2, verdict="bug", codes=ROWS)
density("rows_pairs", lambda: _keepdim(pairs=True), 2, verdict="bug", codes=SHAPE)
density("rows_wrong_axis", lambda: lambda x: each(2).log_prob(x).sum(0), 2, False, "bug", SHAPE)
density("rows_raise", lambda: _transformed(0, independent=False), 2, verdict="bug", codes=SHAPE)
density("rows_column", lambda: _keepdim(), 2, verdict="warning", codes=SHAPE)
density("rows_each_dimension", lambda: each(3), 3, verdict="warning", codes=SHAPE)
density("rows_sum", lambda: lambda x: normal(2).log_prob(x).sum(), 2, False, "warning", SHAPE)
density("rows_mean", lambda: lambda x: normal(1).log_prob(x).mean(), 1, False, "warning", SHAPE)
density(
    "rows_random",
    lambda: lambda x: normal(2).log_prob(x) + 0.1 * torch.randn(len(x)),
    2,
    verdict="incomplete",
    codes=("stochastic",),
)


def each(d):
    return D.Normal(torch.zeros(d), torch.ones(d))


class Squashed(D.Transform):
    """z + 0.5 tanh(z), with a log-determinant of each row or of each element."""

    bijective = True
    sign = 1

    def __init__(self, event_dim, summed):
        super().__init__()
        real = D.constraints.real
        self.domain = self.codomain = D.constraints.independent(real, 1) if event_dim else real
        self.summed = summed

    def _call(self, z):
        return z + 0.5 * z.tanh()

    def _inverse(self, y):
        z = y.clone()
        for _ in range(60):
            z = z - (z + 0.5 * z.tanh() - y) / (1 + 0.5 * (1 - z.tanh() ** 2))
        return z

    def log_abs_det_jacobian(self, z, y):
        each = torch.log1p(0.5 * (1 - z.tanh() ** 2))
        return each.sum(1) if self.summed else each


def _transformed(event_dim, summed=True, independent=True):
    return D.TransformedDistribution(
        normal(2) if independent else each(2), [Squashed(event_dim, summed)]
    )


def _standardized(x):
    return x - x.mean(0)


def _normalized(layer):
    if isinstance(layer, nn.Module):
        layer.running_var.fill_(1 - layer.eps)
        layer.running_mean.uniform_()
    return lambda x: normal(2).log_prob(layer(x))


def _loop(x):
    return torch.stack([normal(1, 0.5).log_prob(row) for row in x])


def _scaled_by_all(x):
    log_det = math.log(2.0) * torch.ones(len(x), 2)
    return normal(2).log_prob(2 * x) + log_det.sum()


def _softmax_over_rows(x):
    weights = x.square().sum(1).neg().softmax(0)
    return normal(2).log_prob(x) - weights.log()


def _keepdim(pairs=False):
    def log_prob(x):
        log_p = each(2).log_prob(2 * x).sum(1, keepdim=True)
        log_det = 2 * math.log(2.0) * torch.ones(len(x))
        return log_p + (log_det if pairs else log_det[:, None])

    return log_prob


def _numpy_normal(x):
    x = x.numpy()
    return torch.from_numpy(-0.5 * np.log(2 * np.pi) - 0.5 * x[:, 0] ** 2)


def _truncated(x):
    return torch.where(x[:, 0] > 0, D.Normal(0.0, 1.0).log_prob(x[:, 0]), -math.inf)


def _correlated(d):
    root = torch.randn(d, d)
    return D.MultivariateNormal(torch.randn(d), root @ root.T / d + 0.2 * torch.eye(d))


def _flow(d, sign=1.0):
    net = nn.Sequential(nn.Linear(d // 2, 16), nn.Tanh(), nn.Linear(16, d))

    def log_prob(x):
        a, b = x.chunk(2, 1)
        t, s = net(a).chunk(2, 1)
        s = s.tanh()
        z = torch.cat([a, (b + t) * s.exp()], 1)
        return D.Normal(0.0, 1.0).log_prob(z).sum(1) + sign * s.sum(1)

    return log_prob


# --- bits ---------------------------------------------------------------------------------------


def bits(name, function, levels=256, shape=(3, 8, 8), verdict="correct", codes=()):
    case(audit_bits, f"bits_{name}", lambda: function, verdict, codes, levels=levels, shape=shape)


def _elements(x):
    return x[0].numel()


def _nats_of_unit_cube(x):  # the uniform density of y = (x + u) / 256 is one
    y = (x + torch.rand_like(x)) / 256
    return torch.where((y >= 0) & (y < 1), 0.0, math.inf).flatten(1).sum(1)


def _bits_each(x):
    return (_nats_of_unit_cube(x) + _elements(x) * math.log(256)) / (_elements(x) * math.log(2))


def _categorical(x):
    log_p = torch.full((256,), -math.log(256))
    return -log_p[x].flatten(1).sum(1) / (_elements(x) * math.log(2))


class Histogram(nn.Module):
    """Levels with uneven probabilities, which correctly cost more bits."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1, 1, 256))

    def forward(self, x):
        nats = -F.log_softmax(self.logits, 0)[x.long()].flatten(1).sum(1)
        return nats / (_elements(x) * math.log(2))


class Broken(Histogram):
    """The log-probabilities are not normalized."""

    def forward(self, x):
        nats = -(self.logits + 1.5)[x.long()].flatten(1).sum(1)
        return nats / (_elements(x) * math.log(2))


bits("each", _bits_each)
bits("mean", lambda x: _bits_each(x).mean())
bits("number", lambda x: float(_bits_each(x).mean()))
bits("gray", _bits_each, shape=(1, 6, 6))
bits("five_bits", lambda x: torch.full((len(x),), math.log2(32)), levels=32)
bits("integers", _categorical)
bits("other_model", Histogram())
case(
    audit_bits,
    "bits_half_range",
    lambda: lambda x: 8.0 + 0 * _bits_each(x),
    levels=256,
    shape=(3, 4, 4),
)
bits(
    "no_scaling",
    lambda x: _nats_of_unit_cube(x) / (_elements(x) * math.log(2)),
    verdict="bug",
    codes=("bpd_below_entropy",),
)
bits("nats", lambda x: _bits_each(x) * math.log(2), verdict="bug", codes=("bpd_below_entropy",))
bits(
    "255",
    lambda x: _bits_each(x) - math.log2(256 / 255),
    levels=256,
    verdict="bug",
    codes=("bpd_below_entropy",),
)
bits("per_pixel", lambda x: _bits_each(x) * 3, verdict="bug", codes=("bpd_wrong",))
bits("scaling_once_more", lambda x: _bits_each(x) + 8, verdict="bug", codes=("bpd_wrong",))
bits("summed", lambda x: _bits_each(x).sum(), verdict="bug", codes=("bpd_batch",))
bits(
    "fixed_batch",
    lambda x: _bits_each(x).sum() / 1.0 / max(1, len(x) // 2),
    verdict="bug",
    codes=("bpd_batch",),
)
bits("not_a_model", Broken(), verdict="bug", codes=("bpd_below_entropy",))
bits(
    "infinite",
    lambda x: torch.where(x[:, 0, 0, 0] > 40, math.inf, 8.0),
    verdict="bug",
    codes=("not_finite",),
)


# --- importance-weighted bounds -----------------------------------------------------------------


def bound(name, function, verdict="correct", codes=(), **expected):
    case(audit_importance_bound, f"bound_{name}", lambda: function, verdict, codes, expected)


def _right(n, k=1):
    return -(torch.logsumexp(-n, k) - math.log(n.shape[k]))


bound("mean", lambda n: _right(n).mean(), layout="(B, K)")
bound("sum", lambda n: _right(n).sum(), layout="(B, K)")
bound("each", lambda n: _right(n), layout="(B, K)")
bound("draws_first", lambda n: _right(n, 0).mean(), layout="(K, B)")
bound(
    "log_mean_exp_by_hand",
    lambda n: -((-n).amax(1) + (-n - (-n).amax(1, keepdim=True)).exp().mean(1).log()).mean(),
)
bound("naive", lambda n: -torch.log(torch.exp(-n).mean(1)).mean(), "warning", ("not_finite",))
bound("without_log_k", lambda n: -torch.logsumexp(-n, 1).mean(), "warning", ("iw_value",))
bound(
    "detached_weights",
    lambda n: (F.softmax(-n, 1).detach() * n).sum(1).mean(),
    "warning",
    ("iw_value",),
)
bound(
    "attached_weights",
    lambda n: (F.softmax(-n, 1) * n).sum(1).mean(),
    "bug",
    ("iw_gradient", "iw_value"),
)
bound(
    "worst_draws",
    lambda n: (F.softmax(n, 1).detach() * n).sum(1).mean(),
    "bug",
    ("iw_gradient", "iw_value"),
)
bound("mean_of_draws", lambda n: n.mean(), "bug", ("iw_gradient", "iw_value"))
bound(
    "detached_inside", lambda n: _right(n).detach().mean() + 0 * n.sum(), "bug", ("iw_gradient",)
)
bound(
    "averaged_over_draws",
    lambda n: (F.softmax(-n, 1).detach() * n).mean(),
    "warning",
    ("iw_gradient", "iw_value"),
)


# --- terms --------------------------------------------------------------------------------------


def term(name, function, sign=1, verdict="correct", codes=(), **expected):
    case(
        audit_log_prob_term, f"term_{name}", lambda: function, verdict, codes, expected, sign=sign
    )


def wrong_term(name, function, sign=1, codes=("prior_term_mismatch",)):
    term(name, function, sign, "bug", codes)


term("torch", lambda z: D.Normal(0.0, 1.0).log_prob(z))
term("sum", lambda z: (-0.5 * z**2 - HALF).sum(1))
term("mean", lambda z: (-0.5 * z**2).mean())
term("squared_loss", lambda z: (z**2).sum(), -1)
term("wide_prior", lambda z: D.Normal(1.0, 3.0).log_prob(z))
term(
    "glow_log_std",
    lambda z, m, s: (-HALF - s - 0.5 * (z - m) ** 2 / torch.exp(2 * s)).sum(),
    read_as="log_std",
)
term("log_var", lambda z, m, v: -0.5 * (v + (z - m) ** 2 / v.exp()).sum(1), read_as="log_var")
term("std", lambda z, m, s: D.Normal(m, s).log_prob(z).sum(1), read_as="std")
term("variance", lambda z, m, v: D.Normal(m, v.sqrt()).log_prob(z).mean(), read_as="variance")
term("loss", lambda z, m, s: -D.Normal(m, s.exp()).log_prob(z).sum(), -1, read_as="log_std")
term(
    "loss_as_density",
    lambda z, m, s: -D.Normal(m, s.exp()).log_prob(z).sum(),
    1,
    "bug",
    ("prior_term_sign",),
)
term("square_as_density", lambda z: 0.5 * (z**2).sum(), 1, "bug", ("prior_term_sign",))
term(
    "parenthesis",
    lambda z, m, v: -0.5 * ((v + (z - m) ** 2) / v.exp()).sum(1),
    1,
    "bug",
    ("prior_term_mismatch",),
)
term(
    "no_log_scale",
    lambda z, m, s: -0.5 * ((z - m) / s.exp()).square().sum(),
    1,
    "bug",
    ("prior_term_mismatch",),
)
term(
    "quadratic_sign",
    lambda z, m, s: (-HALF - s + 0.5 * ((z - m) / s.exp()) ** 2).sum(),
    1,
    "bug",
    ("prior_term_mismatch", "prior_term_sign"),
)
term("laplace", lambda z: -z.abs().sum(), 1, "bug", ("prior_term_mismatch",))
term(
    "absolute_loss",
    lambda z, m, s: ((z - m).abs() / s.exp() + s).sum(),
    -1,
    "bug",
    ("prior_term_mismatch",),
)


# readings of the second parameter
term("softplus", lambda w, m, r: D.Normal(m, F.softplus(r)).log_prob(w).sum(), read_as="softplus")
term("log1p_exp", lambda w, m, r: _bayes(w, m, torch.log1p(r.exp())), read_as="softplus")
term("floor", lambda w, m, r: _bayes(w, m, F.softplus(r) + 1e-3))
term("small_number", lambda w, m, r: _bayes(w, m, r.exp(), 1e-6), read_as="log_std")
term("clamped", lambda x, m, v: _bayes(x, m, (v.clamp(-4, 3) / 2).exp()), read_as="log_var")
term("elu", lambda w, m, r: _bayes(w, m, F.elu(r) + 1), read_as="elu+1")
term("precision", lambda x, m, p: D.Normal(m, p.rsqrt()).log_prob(x).sum(), read_as="precision")
term("scaled", lambda w, m, r: _bayes(w, m, 0.1 * r.exp()), read_as="log_std")
term("weighted", lambda w, m, r: 0.1 * _bayes(w, m, F.softplus(r)), read_as="softplus")
term("batch_mean", lambda x, m, v: D.Normal(m, v.exp()).log_prob(x).sum(1).mean())
term("one_sigma", lambda x, m, s: D.Normal(m, 0.5).log_prob(x).sum())
term("torch_loss", lambda x, m, v: F.gaussian_nll_loss(m, x, v), -1, read_as="variance")
term("order", lambda mu, log_var, x: _bayes(x, mu, (log_var / 2).exp()), read_as="log_var")


def gaussian_nll(x, mu, log_var):  # the sign is in the name
    return (0.5 * log_var + 0.5 * (x - mu) ** 2 / log_var.exp()).sum()


def log_prob(mu, rho, w):
    return _bayes(w, mu, F.softplus(rho))


term("sign_by_name", gaussian_nll, None, read_as="log_var")
term("order_by_name", log_prob, None, read_as="softplus")

# other densities, as priors of weights are
term("laplace_with_constant", lambda w: D.Laplace(0.0, 0.3).log_prob(w).sum())
term("student", lambda w: D.StudentT(3.0).log_prob(w))
term("laplace_posterior", lambda w, m, s: D.Laplace(m, s).log_prob(w).sum())
term("bayes_by_backprop", lambda w: _mixture_prior(w, 0.5, 1.0, math.exp(-6)).sum())
term("bayes_by_backprop_mean", lambda w: _mixture_prior(w, 0.25, 1.0, 0.1))
term(
    "torch_mixture",
    lambda w: D.MixtureSameFamily(
        D.Categorical(torch.tensor([0.3, 0.7])),
        D.Normal(torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 1.5])),
    ).log_prob(w),
)


def _bayes(w, mu, sigma, small=0.0):
    return (-HALF - (sigma + small).log() - 0.5 * ((w - mu) / sigma) ** 2).sum()


def _mixture_prior(w, share, wide, narrow, weights=True):
    parts = [D.Normal(0.0, s).log_prob(w).exp() for s in (wide, narrow)]
    shares = (share, 1 - share) if weights else (1.0, 1.0)
    return (shares[0] * parts[0] + shares[1] * parts[1]).log()


class Weights:
    """The posterior of a layer's weights, as in many copies of Bayes by Backprop."""

    def __init__(self, wrong=False):
        self.mu = torch.randn(2, 3).requires_grad_()
        self.rho = torch.randn(2, 3).requires_grad_()
        self.wrong = wrong

    def log_prob(self, w):
        sigma = torch.log1p(self.rho.exp())
        entropy = -sigma if self.wrong else -sigma.log()
        return (-HALF + entropy - (w - self.mu) ** 2 / (2 * sigma**2)).sum()


case(
    audit_log_prob_term,
    "term_of_a_layer",
    lambda: Weights().log_prob,
    example=torch.zeros(2, 3),
)
case(
    audit_log_prob_term,
    "term_of_a_layer_without_log",
    lambda: Weights(wrong=True).log_prob,
    "bug",
    ("prior_term_mismatch",),
    example=torch.zeros(2, 3),
)

# mistakes of each
wrong_term("log_var_not_halved", lambda x, m, v: (-v - 0.5 * (x - m) ** 2 / v.exp()).sum())
wrong_term("variance_not_squared", lambda x, m, s: (-s.log() - 0.5 * (x - m) ** 2 / s).sum())
wrong_term("squared_twice", lambda x, m, v: (-v / 2 - 0.5 * (x - m) ** 2 / v.exp() ** 2).sum())
wrong_term("log_of_rho", lambda w, m, r: (-r - 0.5 * ((w - m) / F.softplus(r)) ** 2).sum())
wrong_term("std_without_log", lambda w, m, s: (-s - 0.5 * ((w - m) / s) ** 2).sum())
wrong_term("plus_log", lambda x, m, s: (s - 0.5 * (x - m) ** 2 * (-2 * s).exp()).sum())
wrong_term("mean_and_sum", lambda x, m, s: -s.mean() - 0.5 * (((x - m) / s.exp()) ** 2).sum())
wrong_term(
    "mean_over_batch_only",
    lambda x, m, s: -s.sum(1).mean() - 0.5 * (((x - m) / s.exp()) ** 2).sum(),
)
wrong_term("log_of_sum", lambda x, m, s: -s.exp().sum().log() - 0.5 * ((x - m) / s.exp()).norm())
wrong_term("mean_added", lambda x, m, s: D.Normal(-m, s.exp()).log_prob(x).sum())
wrong_term("mean_and_scale_exchanged", lambda x, m, s: D.Normal(s, m.exp()).log_prob(x).sum())
wrong_term("nll_without_log", lambda x, m, v: F.mse_loss(x, m) / v.exp(), -1)
wrong_term("mixture_without_shares", lambda w: _mixture_prior(w, 0.5, 1.0, 0.1, False).sum())
wrong_term(
    "mixture_without_constants",
    lambda w: (0.5 * (-0.5 * w**2).exp() + 0.5 * (-0.5 * (w / 0.1) ** 2).exp()).log().sum(),
)
wrong_term("student_without_constant", lambda w: -2 * torch.log1p(w**2 / 3).sum())

# --- reports in public that were wrong: all of these are right ----------------------------------

# wiseodd's VAE repository, issue 43: a loss below zero is none of a mistake's signs
term("wiseodd_density_above_one", lambda z: D.Normal(0.0, 0.1).log_prob(z).sum(1))
# tensorflow/probability, issue 189: the bound of several draws is no mean of their bounds
bound(
    "tfp_189_csiszar",
    lambda n: -(torch.logsumexp(-n, 0) - math.log(len(n))).mean(),
    layout="(K, B)",
)


def made(name: str, seed: int):
    torch.manual_seed(2000 + seed)
    return CASES[name].call()
