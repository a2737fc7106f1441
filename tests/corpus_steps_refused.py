"""Steps that cannot be judged, and what is right to say of them. None of them is "correct"."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Laplace, Normal, kl_divergence

from corpus_steps_base import B, Built, D, Encoder, H, L, data, decoder, entry, mlp
from corpus_steps_vae import bce, sse


def kl_log_var(mu, b):
    return -0.5 * torch.sum(1 + b - mu.pow(2) - b.exp())


def half(mu, b):
    return mu + (0.5 * b).exp() * torch.randn_like(mu)


def around(after):
    """A right VAE whose loss goes through `after`."""
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        return after(bce(decode(half(mu, b)), x) + kl_log_var(mu, b))

    return Built(step, (encode, decode, x))


# --- no loss -------------------------------------------------------------------------------------


def fails(loss):
    raise ZeroDivisionError("on purpose")


@entry("incomplete|refused", says="on purpose")
def raises():
    return around(fails)


@entry("incomplete|refused", says="None")
def returns_none():
    return around(lambda loss: None)


@entry("incomplete|refused", says="str|'done'")
def returns_text():
    return around(lambda loss: "done")


@entry("incomplete|refused")
def returns_an_image():
    return around(lambda loss: torch.zeros(B, D) + loss)


@entry("incomplete|refused|bug", says="(?i)nan|not finite|not_finite")
def returns_nan():
    return around(lambda loss: loss * float("nan"))


@entry("incomplete|refused|bug", says="(?i)inf")
def returns_infinity():
    return around(lambda loss: loss + math.inf)


@entry("incomplete|refused", says="float|number")
def returns_a_number():
    return around(lambda loss: loss.item())


@entry("incomplete|refused", says="(?i)grad")
def returns_a_loss_without_gradient():
    return around(torch.Tensor.detach)


@entry("incomplete|refused", says="(?i)grad")
def runs_without_grad():
    encode, decode, x = Encoder(), decoder(), data()

    @torch.no_grad()
    def step():
        mu, b = encode(x)
        return bce(decode(half(mu, b)), x) + kl_log_var(mu, b)

    return Built(step, (encode, decode, x))


@entry("incomplete|refused")
def returns_a_constant():
    return Built(lambda: torch.tensor(1.0, requires_grad=True) * 2)


@entry("incomplete|refused")
def returns_an_empty_dict():
    return around(lambda loss: {})


@entry("refused", says="callable|step")
def is_not_callable():
    return Built(3)


@entry("refused|incomplete", says="argument|batch")
def needs_an_argument():
    return Built(lambda batch: batch.sum())


# --- not the same twice --------------------------------------------------------------------------


@entry("incomplete|warning")
def counts_its_calls():
    encode, decode, x, calls = Encoder(), decoder(), data(), [0]

    def step():
        calls[0] += 1
        mu, b = encode(x)
        return bce(decode(half(mu, b)), x) + min(1.0, calls[0] / 100) * kl_log_var(mu, b)

    return Built(step, (encode, decode, x, calls))


@entry("correct", convention="log_var")
def counts_its_calls_for_the_log_only():
    encode, decode, x, log = Encoder(), decoder(), data(), []

    def step():
        mu, b = encode(x)
        loss = bce(decode(half(mu, b)), x) + kl_log_var(mu, b)
        log.append(loss.item())
        return loss

    return Built(step, (encode, decode, x, log))


@entry("incomplete")
def noise_of_numpy():
    encode, decode, x = Encoder(), decoder(), data()
    rng = np.random.default_rng(0)

    def step():
        mu, b = encode(x)
        eps = torch.from_numpy(rng.standard_normal((B, L)).astype("float32"))
        return bce(decode(mu + (0.5 * b).exp() * eps), x) + kl_log_var(mu, b)

    return Built(step, (encode, decode, x))


@entry("incomplete")
def noise_of_the_global_numpy():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        eps = torch.as_tensor(np.random.randn(B, L), dtype=torch.float32)
        return bce(decode(mu + b.exp() * eps), x) + kl_log_var(mu, b)  # wrong besides

    return Built(step, (encode, decode, x))


@entry("incomplete")
def noise_drawn_before_the_step():
    encode, decode, x, eps = Encoder(), decoder(), data(), torch.randn(B, L)

    def step():
        mu, b = encode(x)
        return bce(decode(mu + (0.5 * b).exp() * eps), x) + kl_log_var(mu, b)

    return Built(step, (encode, decode, x, eps))


@entry("incomplete|bug")
def jumps_by_its_draw():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        z = half(mu, b)
        kl = kl_log_var(mu, b) if z.sum() > 0 else (b**2 + mu).sum()
        return bce(decode(z), x) + kl

    return Built(step, (encode, decode, x))


@entry("correct|incomplete")
def jumps_to_what_is_right_too():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        z = half(mu, b)
        if z.sum() > 0:
            kl = kl_log_var(mu, b)
        else:
            kl = kl_divergence(Normal(mu, (b / 2).exp()), Normal(0.0, 1.0)).sum()
        return bce(decode(z), x) + kl

    return Built(step, (encode, decode, x))


def forgetful(forgets):
    """A right VAE that leaves out the KL in some steps."""
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        z = half(mu, b)
        return bce(decode(z), x) + (0.0 if forgets(z) else kl_log_var(mu, b))

    return Built(step, (encode, decode, x))


@entry("incomplete")
def forgets_the_kl_once_in_a_hundred_steps():
    return forgetful(lambda z: torch.rand(()) < 0.01)


@entry("incomplete")
def forgets_the_kl_by_a_number_that_python_compares():
    return forgetful(lambda z: torch.rand(1).item() < 0.01)


@entry("incomplete")
def forgets_the_kl_where_a_latent_is_large():
    return forgetful(lambda z: (z > 2.5).any())


@entry("correct", convention="log_var")
def refuses_what_no_draw_is():
    """Guards against numbers that are not finite, or far too large, never act."""

    def refused(z):
        if not z.isfinite().all() or (z.abs() > 100).any():
            raise ValueError("z is too large")
        return False

    return forgetful(refused)


@entry("correct", convention="log_var")
def compares_no_number_of_a_draw():
    return forgetful(lambda z: (z[:0] > 1).any())


@entry("incomplete|warning|bug")
def forgets_the_kl_now_and_then():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        keep = float(torch.rand(()) < 0.5)
        return bce(decode(half(mu, b)), x) + keep * kl_log_var(mu, b)

    return Built(step, (encode, decode, x))


# --- other models --------------------------------------------------------------------------------


@entry("incomplete")
def autoencoder():
    encode, decode, x = mlp(D, L), decoder(), data()
    return Built(lambda: sse(decode(encode(x)), x), (encode, decode, x))


@entry("incomplete")
def denoising_autoencoder():
    encode, decode, x = mlp(D, L), decoder(), data()
    return Built(
        lambda: sse(decode(encode(x + 0.2 * torch.randn_like(x))), x), (encode, decode, x)
    )


@entry("incomplete")
def classifier_with_dropout():
    net = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.5), nn.Linear(H, 4))
    x, y = data(), torch.arange(B) % 4
    return Built(lambda: F.cross_entropy(net(x), y, label_smoothing=0.1), (net, x, y))


def kernel(a, b):
    return (-(a[:, None] - b).square().sum(-1) / L).exp().mean()


@entry("incomplete|warning")
def mmd_vae():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        z = half(*encode(x))
        p = torch.randn_like(z)
        mmd = kernel(z, z) + kernel(p, p) - 2 * kernel(z, p)
        return F.mse_loss(decode(z), x, reduction="sum") / B + 10 * mmd

    return Built(step, (encode, decode, x))


@entry("incomplete|warning")
def wasserstein_autoencoder():
    encode, decode, x = mlp(D, L), decoder(), data()

    def step():
        z = encode(x)
        p = torch.randn_like(z)
        mmd = kernel(z, z) + kernel(p, p) - 2 * kernel(z, p)
        return sse(decode(z), x) / B + 10 * mmd

    return Built(step, (encode, decode, x))


@entry("incomplete|warning")
def beta_tc_vae():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        z = half(mu, b)
        pairs = Normal(mu[None], (0.5 * b).exp()[None]).log_prob(z[:, None])  # B, B, L
        log_qz_x = Normal(mu, (0.5 * b).exp()).log_prob(z).sum(1)
        log_pz = Normal(0.0, 1.0).log_prob(z).sum(1)
        size = math.log(B * 100)
        log_qz = pairs.sum(2).logsumexp(1) - size
        log_prod = (pairs.logsumexp(1) - size).sum(1)
        kl = (log_qz_x - log_qz) + 6 * (log_qz - log_prod) + (log_prod - log_pz)
        return bce(decode(z), x) / B + kl.mean()

    return Built(step, (encode, decode, x))


@entry("incomplete")
def vq_vae():
    encode, decode, x = mlp(D, L), decoder(), data()
    book = nn.Embedding(7, L)

    def step():
        z = encode(x)
        e = book(torch.cdist(z, book.weight).argmin(1))
        y = decode(z + (e - z).detach())
        commit = F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(e.detach(), z)
        return F.mse_loss(y, x) + commit

    return Built(step, (encode, decode, book, x))


@entry("incomplete|warning")
def gumbel_vae():
    encode, decode, x = mlp(D, L * 4), decoder(latents=L * 4), data()

    def step():
        logits = encode(x).view(B, L, 4)
        z = F.gumbel_softmax(logits, tau=0.8, dim=-1)
        log_q = logits.log_softmax(-1)
        kl = (log_q.exp() * (log_q + math.log(4))).sum()
        return (bce(decode(z.flatten(1)), x) + kl) / B

    return Built(step, (encode, decode, x))


@entry("incomplete|warning", says="(?i)gauss|normal|laplace")
def laplace_posterior():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q, p = Laplace(mu, b.exp()), Laplace(0.0, 1.0)
        return (bce(decode(q.rsample()), x) + kl_divergence(q, p).sum()) / B

    return Built(step, (encode, decode, x))


@entry("incomplete|warning")
def generator_of_an_adversary():
    net, judge = mlp(L, D), mlp(D, 1)
    return Built(lambda: F.softplus(-judge(net(torch.randn(B, L)))).mean(), (net, judge))


@entry("incomplete|warning")
def diffusion():
    net, x = mlp(D + 1, D), data()
    keep = torch.linspace(0.99, 0.1, 10)

    def step():
        t = torch.randint(0, 10, (B,))
        a, eps = keep[t][:, None], torch.randn_like(x)
        noisy = a.sqrt() * x + (1 - a).sqrt() * eps
        return F.mse_loss(net(torch.cat([noisy, t[:, None] / 10], 1)), eps)

    return Built(step, (net, x))


@entry("incomplete|warning|bug")
def kl_is_not_there():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        return bce(decode(half(mu, b)), x)

    return Built(step, (encode, decode, x))


@entry("incomplete")
def linear_regression():
    net, x = nn.Linear(D, 1), data()
    return Built(lambda: net(x).square().mean(), (net, x))


@entry("incomplete|correct")
def draw_by_an_inverse_distribution():
    """As the cosine of a von Mises-Fisher draw in three dimensions."""
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        k = F.softplus(encode(x)[1]) + 1
        u = torch.rand_like(k)
        z = 1 + torch.log(u + (1 - u) * torch.exp(-2 * k)) / k
        return bce(decode(z), x) + (k / k.tanh() - 1 + torch.log(k / k.sinh())).sum()

    return Built(step, (encode, decode, x))
