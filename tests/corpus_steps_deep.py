"""Several latents that depend on each other, and flows on the posterior or the prior."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from corpus_steps_base import B, Built, D, Encoder, H, L, data, decoder, entry, mlp
from corpus_steps_vae import bce, sse

L2 = 3  # the upper latent


def draw(mu, log_std):
    return mu + log_std.exp() * torch.randn_like(mu)


def kl_between(mu, s, m, p):
    """KL of N(mu, e^2s) and N(m, e^2p), by latent."""
    return p - s + ((2 * s).exp() + (mu - m) ** 2) / (2 * (2 * p).exp()) - 0.5  # kl


def kl_standard(mu, s):
    return kl_between(mu, s, torch.zeros_like(mu), torch.zeros_like(s))


def log_normal(z, mu, log_std):
    return -0.5 * math.log(2 * math.pi) - log_std - 0.5 * ((z - mu) / log_std.exp()) ** 2


# --- hierarchies ---------------------------------------------------------------------------------


def bottom_up(kl1, kl2=kl_standard):
    """q(z1|x) q(z2|z1), p(z1|z2) p(z2)."""
    q1, q2, p1 = Encoder(), Encoder(L, L2), Encoder(L2, L)
    decode, x = decoder(), data()

    def step():
        mu1, s1 = q1(x)
        z1 = draw(mu1, s1)
        mu2, s2 = q2(z1)
        z2 = draw(mu2, s2)
        m1, p = p1(z2)
        return (bce(decode(z1), x) + kl1(mu1, s1, m1, p).sum() + kl2(mu2, s2).sum()) / B

    return Built(step, (q1, q2, p1, decode, x))


def without_width(mu, s, m, p):
    return p - s + ((2 * s).exp() + (mu - m) ** 2) / 2 - 0.5


@entry("correct")
def two_levels():
    return bottom_up(kl_between)


@entry("correct")
def two_levels_by_draws():
    q1, q2, p1 = Encoder(), Encoder(L, L2), Encoder(L2, L)
    decode, x = decoder(), data()

    def step():
        mu1, s1 = q1(x)
        z1 = draw(mu1, s1)
        mu2, s2 = q2(z1)
        z2 = draw(mu2, s2)
        log_q = log_normal(z1, mu1, s1).sum() + log_normal(z2, mu2, s2).sum()  # kl
        zero = torch.zeros(())
        log_p = log_normal(z1, *p1(z2)).sum() + log_normal(z2, zero, zero).sum()  # kl
        return (bce(decode(z1), x) + log_q - log_p) / B

    return Built(step, (q1, q2, p1, decode, x))


@entry("bug", "kl_mismatch")
def two_levels_whose_kl_forgets_a_width():
    return bottom_up(without_width)


@entry("bug|incomplete")
def two_levels_without_the_upper_kl():
    return bottom_up(kl_between, lambda mu, s: 0 * mu)


@entry("bug", "kl_mismatch")
def two_levels_with_the_upper_square_missing():
    return bottom_up(kl_between, lambda mu, s: 0.5 * ((2 * s).exp() - 1) - s)


class TopDown(nn.Module):
    """Ladder: z2 above, then z1 given z2, whose posterior and prior share the way down."""

    def __init__(self, kl, residual=False):
        super().__init__()
        self.kl, self.residual = kl, residual
        self.up, self.upper = mlp(D, H), Encoder(H, L2)
        self.down, self.prior = mlp(L2, H), nn.Linear(H, 2 * L)
        self.posterior, self.out = nn.Linear(2 * H, 2 * L), decoder(latents=L + L2)

    def forward(self, x):
        h = self.up(x).tanh()
        mu2, s2 = self.upper(h)
        z2 = draw(mu2, s2)
        d = self.down(z2).tanh()
        m, p = self.prior(d).chunk(2, 1)
        mu, s = self.posterior(torch.cat([h, d], 1)).chunk(2, 1)
        if self.residual:  # the posterior is the prior, moved
            kl = self.kl(mu, s, m, p)
            mu, s = m + mu, p + s
        else:
            kl = self.kl(mu, s, m, p)
        z = draw(mu, s)
        recon = F.mse_loss(self.out(torch.cat([z, z2], 1)), x, reduction="none").sum(1)
        return (recon + kl.sum(1) + kl_standard(mu2, s2).sum(1)).mean()


def ladder(kl, residual=False):
    net, x = TopDown(kl, residual), data()
    return Built(lambda: net(x), (net, x), net, x)


@entry("correct")
def top_down():
    return ladder(kl_between)


@entry("bug", "kl_mismatch")
def top_down_that_forgets_a_width():
    return ladder(without_width)


@entry("bug", "kl_mismatch")
def top_down_that_forgets_a_log_width():
    return ladder(lambda mu, s, m, p: -s + ((2 * s).exp() + (mu - m) ** 2) / (2 * (2 * p).exp()))


@entry("bug")
def top_down_log_std_read_as_log_var():
    return ladder(
        lambda mu, s, m, p: 0.5 * (p - s + (s.exp() + (mu - m) ** 2) / p.exp() - 1),
    )


@entry("correct")
def residual_posterior():
    return ladder(
        lambda d, s, m, p: 0.5 * (d**2 / (2 * p).exp() + (2 * s).exp() - 1) - s,  # kl
        residual=True,
    )


@entry("bug", "kl_mismatch")
def residual_posterior_that_forgets_the_width():
    return ladder(lambda d, s, m, p: 0.5 * (d**2 + (2 * s).exp() - 1) - s, residual=True)


# --- sequences -----------------------------------------------------------------------------------


def vrnn(kl, every=True):
    """Chung et al.: at each time a prior and a posterior given the state."""
    times = 4
    prior, posterior, out = Encoder(H, L2), Encoder(D + H, L2), decoder(latents=L2 + H)
    cell, x = nn.GRUCell(D + L2, H), torch.rand(times, B, D)

    def step():
        h, total = torch.zeros(B, H), 0.0
        for t in range(times):
            m, p = prior(h)
            mu, s = posterior(torch.cat([x[t], h], 1))
            z = draw(mu, s)
            total = total + sse(out(torch.cat([z, h], 1)), x[t])
            if every or t == times - 1:
                total = total + kl(mu, s, m, p).sum()
            h = cell(torch.cat([x[t], z], 1), h)
        return total / B

    return Built(step, (prior, posterior, out, cell, x))


@entry("correct")
def sequence():
    return vrnn(kl_between)


@entry("correct")
def sequence_by_distributions():
    return vrnn(lambda mu, s, m, p: kl_divergence(Normal(mu, s.exp()), Normal(m, p.exp())))


@entry("bug", "kl_mismatch")
def sequence_whose_kl_forgets_a_width():
    return vrnn(without_width)


@entry("bug|incomplete")
def sequence_whose_kl_is_the_last_one():
    return vrnn(kl_between, every=False)


@entry("correct")
def state_space():
    """A deep Markov model: q(z_t | z_{t-1}, x_t), p(z_t | z_{t-1})."""
    x = torch.rand(3, B, D)
    q, p, out = Encoder(D + L2, L2), Encoder(L2, L2), decoder(latents=L2)

    def step():
        z, loss = torch.zeros(B, L2), []
        for x_t in x:
            ours, theirs = q(torch.cat([x_t, z], 1)), p(z)
            z = draw(*ours)
            loss.append(bce(out(z), x_t) + kl_between(*ours, *theirs).sum())
        return torch.stack(loss).sum() / B

    return Built(step, (q, p, out, x))


@entry("correct")
def padded_sequences():
    """The KLs of all times are joined, and those of the padding are left out."""
    x, there = torch.rand(3, B, D), torch.arange(3)[:, None] < torch.tensor([3, 3, 2, 2, 1, 1])
    q, p, out = Encoder(D + L2, L2), Encoder(L2, L2), decoder(latents=L2)

    def step():
        z, heads, nll = torch.zeros(B, L2), [], []
        for x_t in x:
            ours, theirs = q(torch.cat([x_t, z], 1)), p(z)
            z = draw(*ours)
            heads.append((*ours, *theirs))
            nll.append(F.binary_cross_entropy_with_logits(out(z), x_t, reduction="none").sum(1))
        kl = kl_between(*(torch.stack(h) for h in zip(*heads, strict=True))).sum(-1)
        return (torch.stack(nll) + kl)[there].mean()

    return Built(step, (q, p, out, x))


# --- flows on the posterior ----------------------------------------------------------------------


class Planar(nn.Module):
    """f(z) = z + u tanh(w z + b), with u moved such that it is invertible."""

    def __init__(self, dim=L):
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.b = nn.Parameter(torch.randn(()))

    def forward(self, z):
        wu = self.w @ self.u
        u = self.u + (F.softplus(wu) - 1 - wu) * self.w / self.w.square().sum()
        t = torch.tanh(z @ self.w + self.b)
        logdet = torch.log((1 + (1 - t**2) * (self.w @ u)).abs())  # logdet
        return z + t[..., None] * u, logdet


class Autoregressive(nn.Module):
    """An inverse autoregressive step, gated as in Kingma et al."""

    def __init__(self, dim=L, missing_gate=False):
        super().__init__()
        self.shift, self.gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.register_buffer("mask", torch.ones(dim, dim).tril(-1))

    def forward(self, z):
        shift = F.linear(z, self.shift.weight * self.mask, self.shift.bias)
        gate = torch.sigmoid(F.linear(z, self.gate.weight * self.mask, self.gate.bias + 1))
        z = gate * z + (1 - gate) * shift
        logdet = gate.log().sum(-1)  # logdet
        return z.flip(-1), logdet


def flow_posterior(flows, kl):
    """`kl(log_q0, z0, zk, logdets)` of the flows after the draw."""
    encode, decode, flows, x = Encoder(), decoder(), nn.ModuleList(flows), data()

    def step():
        mu, log_std = encode(x)
        z0 = z = draw(mu, log_std)
        logdets = []
        for flow in flows:
            z, logdet = flow(z)
            logdets.append(logdet)
        log_q0 = log_normal(z0, mu, log_std).sum(-1)
        return (bce(decode(z), x) + kl(log_q0, z0, z, logdets).sum()) / B

    return Built(step, (encode, decode, flows, x))


def planar_posterior(kl):
    return flow_posterior([Planar(), Planar()], kl)


def log_prior(z):
    return Normal(0.0, 1.0).log_prob(z).sum(-1)


def flow_kl(log_q0, z0, zk, logdets):
    return log_q0 - sum(logdets) - log_prior(zk)  # kl


@entry("correct")
def planar_flow_posterior():
    return planar_posterior(flow_kl)


@entry("correct")
def autoregressive_flow_posterior():
    return flow_posterior([Autoregressive(), Autoregressive()], flow_kl)


@entry("correct")
def flow_as_a_part_of_the_decoder():
    # the KL is that of z0, which the flow and the decoder decode together
    return planar_posterior(lambda q, z0, zk, ld: q - log_prior(z0))


@entry("correct|incomplete")
def flow_posterior_with_the_entropy_in_closed_form():
    encode, decode, flow, x = Encoder(), decoder(), Planar(), data()

    def step():
        mu, log_std = encode(x)
        z, logdet = flow(draw(mu, log_std))
        entropy = log_std.sum() + logdet.sum()  # kl
        return (bce(decode(z), x) - entropy + 0.5 * z.square().sum() - 0.5 * B * L) / B  # kl

    return Built(step, (encode, decode, flow, x))


@entry("bug")
def flow_posterior_without_its_logdet():
    return planar_posterior(lambda q, z0, zk, ld: q - log_prior(zk))


@entry("bug")
def flow_posterior_with_the_sign_of_the_logdet():
    return planar_posterior(lambda q, z0, zk, ld: q + sum(ld) - log_prior(zk))


@entry("bug")
def flow_posterior_with_one_logdet_of_two():
    return planar_posterior(lambda q, z0, zk, ld: q - ld[-1] - log_prior(zk))


@entry("bug|incomplete")
def flow_posterior_with_the_prior_before_the_flow():
    return planar_posterior(lambda q, z0, zk, ld: q - sum(ld) - log_prior(z0))


@entry("bug", "kl_mismatch|cross_sample|logdet_mismatch|kl_negative|reduction_imbalance")
def flow_posterior_with_the_logdets_of_the_batch():
    return planar_posterior(lambda q, z0, zk, ld: q - sum(d.sum() for d in ld) - log_prior(zk))


class Ungated(Autoregressive):
    def forward(self, z):
        z, logdet = super().forward(z)
        return z, logdet / z.shape[-1]  # a mean in place of the sum


@entry("bug")
def autoregressive_flow_posterior_with_a_mean_of_the_logdet():
    return flow_posterior([Ungated(), Autoregressive()], flow_kl)


class FromIdentity(Autoregressive):
    """Starts as the identity, so that its log-determinant is zero at first."""

    def __init__(self):
        super().__init__()
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, z):
        log_scale = F.linear(z, self.gate.weight * self.mask, self.gate.bias).tanh()
        shift = F.linear(z, self.shift.weight * self.mask, self.shift.bias)
        return (z * log_scale.exp() + shift).flip(-1), log_scale.sum(-1)  # logdet


@entry("correct")
def flow_posterior_that_starts_as_the_identity():
    return flow_posterior([FromIdentity(), FromIdentity()], flow_kl)


@entry("bug")
def flow_posterior_that_starts_as_the_identity_without_its_logdet():
    return flow_posterior(
        [FromIdentity(), FromIdentity()], lambda q, z0, zk, ld: q - log_prior(zk)
    )


# --- flows as the prior --------------------------------------------------------------------------


class Coupling(nn.Module):
    """(x1, x2) -> (x1, x2 e^s + t)."""

    def __init__(self, dim, bound=2.0):
        super().__init__()
        self.half, self.bound = dim // 2, bound
        self.net = mlp(self.half, 2 * (dim - self.half))

    def forward(self, x):
        a, b = x[..., : self.half], x[..., self.half :]
        s, t = self.net(a).chunk(2, -1)
        s = self.bound * torch.tanh(s / self.bound)
        logdet = s.sum(-1)  # logdet
        return torch.cat([b * s.exp() + t, a], -1), logdet


def flow_prior(sign):
    encode, decode, x = Encoder(), decoder(), data()
    flows = nn.ModuleList([Coupling(L), Coupling(L), Coupling(L)])

    def step():
        mu, log_std = encode(x)
        z = draw(mu, log_std)
        e, total = z, 0.0
        for flow in flows:
            e, logdet = flow(e)
            total = total + logdet
        log_p = Normal(0.0, 1.0).log_prob(e).sum(-1) + sign * total  # kl
        log_q = Normal(mu, log_std.exp()).log_prob(z).sum(-1)  # kl
        return (bce(decode(z), x) + (log_q - log_p).sum()) / B

    return Built(step, (encode, decode, flows, x))


@entry("correct")
def prior_by_a_flow():
    return flow_prior(1)


@entry("bug")
def prior_by_a_flow_with_the_sign_of_its_logdet():
    return flow_prior(-1)


@entry("bug")
def prior_by_a_flow_without_its_logdet():
    return flow_prior(0)


# --- discrete latents beside Gaussian ones -------------------------------------------------------


@entry("incomplete|correct|warning")
def clusters_summed_over():
    """VaDE-like: q(c|x) enumerated, p(z|c) learned, q(z|x) Gaussian."""
    encode, decode, assign, x = Encoder(), decoder(), nn.Linear(H, 4), data()
    centers = nn.Parameter(torch.randn(4, L))

    def step():
        mu, log_std = encode(x)
        z = draw(mu, log_std)
        log_c = assign(encode.body(x)).log_softmax(-1)
        spread = torch.zeros(4, L)
        kl_z = kl_between(mu[:, None], log_std[:, None], centers, spread).sum(-1)
        kl = (log_c.exp() * (kl_z + log_c + math.log(4))).sum(-1)
        return (bce(decode(z), x) + kl.sum()) / B

    return Built(step, (encode, decode, assign, centers, x))


@entry("incomplete|correct")
def gumbel_beside_a_gaussian():
    encode, decode, x = Encoder(), decoder(latents=L + 4), data()
    assign = nn.Linear(D, 4)

    def step():
        mu, log_std = encode(x)
        logits = assign(x)
        z = torch.cat([draw(mu, log_std), F.gumbel_softmax(logits, tau=0.7)], 1)
        log_c = logits.log_softmax(-1)
        kl_c = (log_c.exp() * (log_c + math.log(4))).sum()
        return (bce(decode(z), x) + kl_standard(mu, log_std).sum() + kl_c) / B

    return Built(step, (encode, decode, assign, x))
