"""VAEs of one latent: scales, layouts, ways to compute the KL, reconstructions, weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import (
    Categorical,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from corpus_steps_base import B, Built, D, Encoder, H, L, data, decoder, entry, mlp, vae


def bce(logits, x):
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum")


def sse(y, x):
    return F.mse_loss(y, x, reduction="sum")


def of_std(std):
    """A draw and a KL of one standard deviation."""
    return (
        lambda mu, b: mu + std(b) * torch.randn_like(mu),
        lambda mu, b: (0.5 * (mu**2 + std(b) ** 2 - 1) - std(b).log()).sum(),
    )


# --- right: scales -------------------------------------------------------------------------------


@entry("correct", convention="log_var")
def log_var():
    return vae(
        lambda mu, b: mu + torch.exp(0.5 * b) * torch.randn_like(mu),  # draw
        lambda mu, b: -0.5 * torch.sum(1 + b - mu.pow(2) - b.exp()),  # kl
        bce,
    )


@entry("correct", convention="log_std")
def log_std():
    return vae(
        lambda mu, b: mu + torch.randn_like(mu) * b.exp(),  # draw
        lambda mu, b: torch.sum(0.5 * (mu**2 + torch.exp(2 * b)) - b - 0.5),  # kl
        bce,
    )


@entry("correct", convention="softplus")
def softplus_with_a_floor():
    return vae(*of_std(lambda b: F.softplus(b) + 1e-4), sse)


@entry("correct", convention="sigmoid")
def sigmoid():
    return vae(*of_std(lambda b: 0.1 + 1.9 * torch.sigmoid(b)), sse)


@entry("correct")
def squareplus():
    return vae(*of_std(lambda b: 0.5 * (b + (b * b + 4).sqrt())), bce)


@entry("correct", convention="log_precision")
def log_precision():
    return vae(
        lambda mu, b: mu + torch.rsqrt(b.exp()) * torch.randn_like(mu),  # draw
        lambda mu, b: 0.5 * (mu.square() + (-b).exp() - 1 + b).sum(),  # kl
        bce,
    )


@entry("correct")
def precision_by_softplus():
    return vae(
        lambda mu, b: mu + F.softplus(b).rsqrt() * torch.randn_like(mu),  # draw
        lambda mu, b: 0.5 * (mu**2 + 1 / F.softplus(b) - 1 + F.softplus(b).log()).sum(),  # kl
        bce,
    )


@entry("correct", convention="elu+1")
def elu_plus_one():
    return vae(*of_std(lambda b: F.elu(b) + 1 + 1e-6), bce)


@entry("correct", convention="softplus of variance")
def variance_by_softplus():
    return vae(
        lambda mu, b: mu + F.softplus(b).sqrt() * torch.randn_like(mu),  # draw
        lambda mu, b: 0.5 * (mu**2 + F.softplus(b) - 1 - F.softplus(b).log()).sum(),  # kl
        bce,
    )


@entry("correct", convention="log_var")
def log_var_clamped_for_both():
    return vae(
        lambda mu, b: mu + (0.5 * b.clamp(-6, 2)).exp() * torch.randn_like(mu),  # draw
        lambda mu, b: -0.5 * (1 + b.clamp(-6, 2) - mu**2 - b.clamp(-6, 2).exp()).sum(),  # kl
        bce,
    )


@entry("correct")
def log_var_bounded_by_tanh():
    return vae(
        lambda mu, b: mu + (2 * (b / 4).tanh()).exp() * torch.randn_like(mu),  # draw
        lambda mu, b: -0.5 * (1 + 4 * (b / 4).tanh() - mu**2 - (4 * (b / 4).tanh()).exp()).sum(),
        bce,
    )


def encoder_called_twice(scale):
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        recon = bce(decode(mu + (scale * b).exp() * torch.randn_like(mu)), x)
        mu, b = encode(x)
        return recon - 0.5 * (1 + b - mu**2 - b.exp()).sum()

    return Built(step, (encode, decode, x))


@entry("correct", convention="log_var")
def one_pass_for_z_and_one_for_the_kl():
    return encoder_called_twice(0.5)


@entry("bug", "kl_mismatch", convention="log_std")
def one_pass_for_z_and_one_for_the_kl_wrong():
    return encoder_called_twice(1.0)


# --- right: ways to draw and to score ------------------------------------------------------------


@entry("correct")
def distributions():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q = Normal(mu, b.exp())
        p = Normal(torch.zeros_like(mu), torch.ones_like(mu))
        z = q.rsample()
        likelihood = Independent(torch.distributions.Bernoulli(logits=decode(z)), 1)
        x_bin = (x > 0.5).float()
        return (kl_divergence(q, p).sum(1) - likelihood.log_prob(x_bin)).mean()  # kl

    return Built(step, (encode, decode, x))


@entry("correct")
def kl_by_one_draw():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q, p = Normal(mu, F.softplus(b) + 1e-3), Normal(0.0, 1.0)
        z = q.rsample()
        kl = q.log_prob(z) - p.log_prob(z)  # kl
        return sse(decode(z), x) + kl.sum()

    return Built(step, (encode, decode, x))


@entry("correct")
def kl_by_one_draw_written_out():
    encode, decode, x = Encoder(), decoder(), data()
    half_log_2pi = 0.5 * math.log(2 * math.pi)

    def step():
        mu, log_var = encode(x)
        eps = torch.randn(mu.shape)
        z = mu + (log_var / 2).exp() * eps  # draw
        log_q = -0.5 * eps**2 - log_var / 2 - half_log_2pi  # kl
        log_p = -0.5 * z**2 - half_log_2pi  # kl
        elbo = -bce(decode(z), x) + (log_p - log_q).sum()
        return -elbo / B

    return Built(step, (encode, decode, x))


def weighted_draws(reduce=torch.sum):
    encode, decode, x = Encoder(), decoder(), data()
    draws = 4

    def step():
        mu, log_var = encode(x)
        q = Normal(mu, (0.5 * log_var).exp())
        z = q.rsample((draws,))
        log_p = reduce(Normal(0.0, 1.0).log_prob(z), -1)  # kl
        log_q = q.log_prob(z).sum(-1)  # kl
        target = x.expand(draws, B, D)
        log_x = -F.binary_cross_entropy_with_logits(decode(z), target, reduction="none").sum(-1)
        log_w = log_x + log_p - log_q  # kl
        return -(torch.logsumexp(log_w, 0) - math.log(draws)).mean()

    return Built(step, (encode, decode, x))


@entry("correct")
def importance_weights():
    return weighted_draws()


@entry("warning", "kl_offset")
def importance_weights_with_the_mean_of_log_p():
    return weighted_draws(torch.mean)


@entry("correct")
def importance_weights_less_the_largest():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q = Normal(mu, b.exp())
        z = q.rsample((4,))
        target = x.expand(4, B, D)
        log_x = -F.binary_cross_entropy_with_logits(decode(z), target, reduction="none").sum(-1)
        log_w = log_x + (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(-1)
        largest = log_w.max(0, keepdim=True).values
        return -((log_w - largest).exp().mean(0).log() + largest).mean()

    return Built(step, (encode, decode, x))


@entry("correct")
def several_draws():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q = Independent(Normal(mu, b.exp()), 1)
        z = q.rsample((3,))
        recon = (decode(z) - x).square().sum(-1).mean(0)
        prior = Independent(Normal(torch.zeros(L), torch.ones(L)), 1)
        return (recon + kl_divergence(q, prior)).mean()  # kl

    return Built(step, (encode, decode, x))


def draws_on_a_second_axis(constant):
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_var = encode(x)
        eps = torch.randn(B, 4, L)
        z = mu.unsqueeze(1) + (0.5 * log_var).exp().unsqueeze(1) * eps  # draw
        recon = bce(decode(z.flatten(0, 1)), x.repeat_interleave(4, 0)) / 4
        kl = -0.5 * (constant + log_var - mu**2 - log_var.exp()).sum()  # kl
        return (recon + kl) / B

    return Built(step, (encode, decode, x))


@entry("correct")
def several_draws_on_a_second_axis():
    return draws_on_a_second_axis(1)


@entry("warning", "kl_offset")
def several_draws_without_the_constant_of_the_kl():
    return draws_on_a_second_axis(0)


@entry("correct|incomplete")
def antithetic_draws():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_var = encode(x)
        noise = (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        recon = 0.5 * (bce(decode(mu + noise), x) + bce(decode(mu - noise), x))
        return recon - 0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()  # kl

    return Built(step, (encode, decode, x))


def matrix(raw):
    """A lower triangle with a positive diagonal, of L (L + 1) / 2 numbers."""
    rows, columns = torch.tril_indices(L, L)
    tril = raw.new_zeros(*raw.shape[:-1], L, L)
    tril[..., rows, columns] = 0.5 * raw
    diagonal = F.softplus(tril.diagonal(dim1=-2, dim2=-1)) + 0.01
    return tril.tril(-1) + torch.diag_embed(diagonal)


class Full(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.decode = mlp(D, H), decoder()
        self.mu, self.raw = nn.Linear(H, L), nn.Linear(H, L * (L + 1) // 2)

    def forward(self, x):
        h = self.body(x).tanh()
        return self.mu(h), matrix(self.raw(h))


@entry("correct")
def full_covariance():
    net, x = Full(), data()

    def step():
        mu, tril = net(x)
        q = MultivariateNormal(mu, scale_tril=tril)
        p = MultivariateNormal(torch.zeros(L), torch.eye(L))
        return (sse(net.decode(q.rsample()), x) + kl_divergence(q, p).sum()) / B  # kl

    return Built(step, (net, x))


@entry("correct")
def full_covariance_written_out():
    net, x = Full(), data()

    def step():
        mu, tril = net(x)
        z = mu + (tril @ torch.randn(B, L, 1)).squeeze(-1)
        trace = tril.square().sum((1, 2))  # kl
        logdet = 2 * tril.diagonal(dim1=1, dim2=2).log().sum(1)  # kl
        kl = 0.5 * (trace + mu.square().sum(1) - L - logdet)  # kl
        return bce(net.decode(z), x) / B + kl.mean()

    return Built(step, (net, x))


@entry("correct|incomplete")
def low_rank_covariance():
    encode, decode, x = Encoder(), decoder(), data()
    factor = mlp(D, L * 2)

    def step():
        mu, b = encode(x)
        q = LowRankMultivariateNormal(mu, 0.5 * factor(x).reshape(B, L, 2), b.exp())
        p = MultivariateNormal(torch.zeros(L), torch.eye(L))
        return (bce(decode(q.rsample()), x) + kl_divergence(q, p).sum()) / B  # kl

    return Built(step, (encode, decode, factor, x))


# --- right: priors -------------------------------------------------------------------------------


@entry("correct")
def learned_prior():
    encode, decode, x = Encoder(), decoder(), data()
    prior = nn.ParameterDict({"mean": 0.3 * torch.randn(L), "log_std": 0.3 * torch.randn(L)})

    def step():
        mu, log_std = encode(x)
        z = mu + log_std.exp() * torch.randn_like(mu)  # draw
        m, s = prior["mean"], prior["log_std"]
        kl = s - log_std + ((2 * log_std).exp() + (mu - m) ** 2) / (2 * (2 * s).exp()) - 0.5  # kl
        return bce(decode(z), x) / B + kl.sum(1).mean()

    return Built(step, (encode, decode, prior, x))


@entry("correct")
def prior_given_a_label():
    x, y = data(), F.one_hot(torch.arange(B) % 4, 4).float()
    encode, decode, prior = Encoder(D + 4), decoder(latents=L + 4), nn.Linear(4, 2 * L)

    def step():
        mu, b = encode(torch.cat([x, y], 1))
        m, s = prior(y).chunk(2, 1)
        q, p = Normal(mu, (0.5 * b).exp()), Normal(m, (0.5 * s).exp())
        kl = kl_divergence(q, p).sum(1)  # kl
        recon = F.mse_loss(decode(torch.cat([q.rsample(), y], 1)), x, reduction="none").sum(1)
        return (recon + kl).mean()

    return Built(step, (encode, decode, prior, x, y))


def own_categorical(read):
    """Classes 0, ..., 3 of each pixel, as one-hot vectors times log p, and a KL by draws."""
    encode, decode, x = Encoder(), decoder(4 * D), torch.randint(0, 4, (B, D)).float()

    def step():
        mu, b = encode(x)
        z = mu + (0.5 * b).exp() * torch.randn_like(mu)  # draw
        p = decode(z).view(B, D, 4).softmax(2)
        log_likelihood = (F.one_hot(x.long(), 4) * p.clamp(1e-5, 1 - 1e-5).log()).sum((1, 2))
        kl = Normal(mu, read(b)).log_prob(z) - Normal(0.0, 1.0).log_prob(z)  # kl
        return -(log_likelihood - kl.sum(1)).mean()

    return Built(step, (encode, decode, x))


@entry("correct", convention="log_var")
def categorical_likelihood_of_its_own():
    return own_categorical(lambda b: (0.5 * b).exp())


@entry("bug", "kl_mismatch", convention="log_var")
def categorical_likelihood_of_its_own_and_another_sigma():
    return own_categorical(lambda b: b.exp())


@entry("correct|warning")
def prior_of_another_width():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q, p = Normal(mu, b.exp()), Normal(0.0, 2.0)
        return bce(decode(q.rsample()), x) + kl_divergence(q, p).sum()  # kl

    return Built(step, (encode, decode, x))


@entry("correct")
def mixture_prior():
    encode, decode, x = Encoder(), decoder(), data()
    prior = nn.ParameterDict(
        {"w": torch.randn(3), "mean": torch.randn(3, L), "log_std": 0.2 * torch.randn(3, L)}
    )

    def step():
        mu, b = encode(x)
        q = Independent(Normal(mu, (b / 2).exp()), 1)
        parts = Independent(Normal(prior["mean"], prior["log_std"].exp()), 1)
        p = MixtureSameFamily(Categorical(logits=prior["w"]), parts)
        z = q.rsample()
        kl = q.log_prob(z) - p.log_prob(z)  # kl
        return (bce(decode(z), x) + kl.sum()) / B

    return Built(step, (encode, decode, prior, x))


def mixture_prior_by_draws(draw, reduce=torch.mean):
    encode, decode, x = Encoder(), decoder(), data()
    means = nn.Parameter(torch.randn(3, L))

    def step():
        mu, b = encode(x)
        q = Normal(mu, (b / 2).exp())
        p = MixtureSameFamily(
            Categorical(logits=torch.zeros(3)), Independent(Normal(means, 1.0), 1)
        )
        recon = bce(decode(q.rsample()), x)
        z = draw(q, (10,))
        kl = reduce(q.log_prob(z).sum(-1) - p.log_prob(z), 0)  # kl
        return (recon + kl.sum()) / B

    return Built(step, (encode, decode, means, x))


@entry("correct")
def mixture_prior_by_ten_draws():
    return mixture_prior_by_draws(Normal.rsample)


@entry("warning", "reduction_imbalance", beta=(10,))
def mixture_prior_by_the_sum_of_ten_draws():
    return mixture_prior_by_draws(Normal.rsample, torch.sum)


@entry("correct")
def adversary_of_permuted_draws():
    """An adversary gets a draw of other examples, detached; backward is called for both."""
    encode, decode, judge = Encoder(), decoder(), mlp(L, 2)
    x, others = data(), data()

    def draw(x):
        mu, b = encode(x)
        return mu + (0.5 * b).exp() * torch.randn_like(mu), 0.5 * (mu**2 + b.exp() - b - 1)

    def step():
        z, kl = draw(x)
        scores = judge(z)
        loss = bce(decode(z), x) + kl.sum() + (scores[:, 0] - scores[:, 1]).sum()
        loss.backward(retain_graph=True)
        permuted = torch.stack([t[torch.randperm(B)] for t in draw(others)[0].unbind(1)], 1)
        judged = torch.cat([scores, judge(permuted.detach())])
        F.cross_entropy(judged, torch.arange(2).repeat_interleave(B)).backward()
        return loss

    return Built(step, (encode, decode, judge, x, others))


@entry("bug", "no_gradient")
def mixture_prior_by_ten_draws_without_gradient():
    return mixture_prior_by_draws(Normal.sample)


@entry("correct|incomplete")
def mixture_of_two_posteriors():
    first, second, decode, x = Encoder(), Encoder(), decoder(), data()

    def step():
        parts = [first(x), second(x)]
        mu, b = (torch.stack(t) for t in zip(*parts, strict=True))
        half = B // 2
        own_mu, own_b = (torch.cat([t[0, :half], t[1, half:]]) for t in (mu, b))
        z = own_mu + (0.5 * own_b).exp() * torch.randn_like(own_mu)  # draw
        kl = 0.5 * (mu**2 + b.exp() - b - 1).sum((1, 2)).mean()  # kl
        return (bce(decode(z), x) + kl) / B

    return Built(step, (first, second, decode, x))


@entry("correct")
def product_of_means_over_the_batch():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        z = mu + (0.5 * b).exp() * torch.randn_like(mu)  # draw
        y = decode(z).sigmoid()
        alike = (2 * x * y + 0.1) / (x**2 + y**2 + 0.1)
        means = torch.stack([alike.mean(), alike.sqrt().mean()])
        recon = 1 - (means ** torch.tensor([0.3, 0.7])).prod()
        return recon + 0.5 * (mu**2 + b.exp() - b - 1).sum(1).mean()  # kl

    return Built(step, (encode, decode, x))


def vamp(log_weights):
    """The step with a VampPrior of four components, by their log weights."""
    encode, decode, x = Encoder(), decoder(), data()
    pseudo = nn.Parameter(torch.rand(4, D))

    def log_normal(z, mu, log_var):
        return -0.5 * (math.log(2 * math.pi) + log_var + (z - mu) ** 2 / log_var.exp()).sum(-1)

    def step():
        mu, log_var = encode(x)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        m, s = encode(pseudo)
        log_p = torch.logsumexp(log_normal(z.unsqueeze(1), m, s) + log_weights(), 1)  # kl
        kl = log_normal(z, mu, log_var) - log_p  # kl
        return (bce(decode(z), x) + kl.sum()) / B

    return Built(step, (encode, decode, pseudo, x))


@entry("correct")
def vamp_prior():
    return vamp(lambda: torch.tensor(-math.log(4)))


@entry("correct")
def vamp_prior_of_learned_weights():
    logits = nn.Parameter(torch.randn(4))
    return vamp(lambda: logits.softmax(0).log())


@entry("warning", "reduction_imbalance")
def mixture_prior_of_each_latent_and_a_weight_of_each_example():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q = Normal(mu, (b / 2).exp())
        z = q.rsample()
        parts = [Normal(0.0, 1.0).log_prob(z), Normal(1.0, 0.3).log_prob(z)]
        log_p = torch.logsumexp(torch.stack(parts), 0) - math.log(2)
        kl = (q.log_prob(z) - log_p).sum(1)
        return (bce(decode(z), x) + (x.sum(1) * kl).sum()) / B

    return Built(step, (encode, decode, x))


@entry("warning", "free_bits")
def free_bits_of_draws():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q = Normal(mu, (b / 2).exp())
        z = q.rsample()
        kl = (q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1)
        return (bce(decode(z), x) + kl.clamp(min=0.5).sum()) / B

    return Built(step, (encode, decode, x))


# --- weights: constant ones are warnings ---------------------------------------------------------


def weighted(recon, kl_weight):
    def kl(mu, b):
        return kl_weight(-0.5 * (1 + b - mu**2 - b.exp()))

    return vae(lambda mu, b: mu + (0.5 * b).exp() * torch.randn_like(mu), kl, recon)


@entry("warning", "reduction_imbalance", beta=(4.0,))
def beta_of_four():
    return weighted(bce, lambda kl: 4 * kl.sum())


@entry("warning", "reduction_imbalance", beta=(0.3,))
def annealing():
    epoch = 3
    return weighted(bce, lambda kl: min(1.0, epoch / 10) * kl.sum())


@entry("warning", "reduction_imbalance", beta=(D / L,))
def two_means():
    return weighted(lambda y, x: bce(y, x) / x.numel(), lambda kl: kl.mean())


@entry("warning", "reduction_imbalance", beta=(D, D / 2))
def mean_of_pixels_beside_sum_of_latents():
    return weighted(F.mse_loss, lambda kl: kl.sum(1).mean())


@entry("warning", "reduction_imbalance", beta=(1 / L, 0.5 / L))
def sum_of_pixels_beside_mean_of_latents():
    return weighted(lambda y, x: sse(y, x) / len(x), lambda kl: kl.mean())


@entry("warning", "reduction_imbalance", beta=(2.0,))
def half_forgotten_in_the_kl():
    return weighted(bce, lambda kl: 2 * kl.sum())


@entry("warning", "free_bits")
def free_bits():
    return weighted(bce, lambda kl: kl.clamp(min=0.2).sum())


@entry("warning", "free_bits")
def free_bits_of_the_batch():
    return weighted(bce, lambda kl: torch.maximum(kl.mean(0), torch.tensor(0.25)).sum() * B)


@entry("warning", "kl_capacity")
def capacity():
    return weighted(bce, lambda kl: (kl.sum(1).mean() - 3.0).abs() * B)


@entry("warning", "kl_offset")
def constant_dropped():
    return vae(
        lambda mu, b: mu + (0.5 * b).exp() * torch.randn_like(mu),
        lambda mu, b: 0.5 * (mu**2 + b.exp() - b).sum(),
        bce,
    )


# --- weights: those that move with the batch are bugs --------------------------------------------


@entry("bug", "reduction_imbalance")
def mean_of_all_beside_sum_over_the_batch():
    return weighted(F.mse_loss, lambda kl: kl.sum())


@entry("bug", "reduction_imbalance")
def sum_over_the_batch_beside_mean_of_latents():
    return weighted(bce, lambda kl: kl.mean())


@entry("bug", "reduction_imbalance")
def divided_by_the_batch_twice():
    return weighted(lambda y, x: bce(y, x) / len(x), lambda kl: kl.sum(1).mean() / len(kl))


@entry("bug", "reduction_imbalance")
def summed_over_the_wrong_axis():
    return weighted(lambda y, x: bce(y, x) / len(x), lambda kl: kl.sum(0).mean())
