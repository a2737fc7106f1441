"""VAEs of one latent with one realistic mistake each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

from corpus_steps_base import B, Built, D, Encoder, L, data, decoder, entry, mlp, vae
from corpus_steps_vae import Full, bce, of_std, sse, vamp


def half(mu, b):
    return mu + (0.5 * b).exp() * torch.randn_like(mu)


def kl_log_var(mu, b):
    return -0.5 * torch.sum(1 + b - mu.pow(2) - b.exp())


# --- one tensor, read in two ways ----------------------------------------------------------------


@entry("bug", "kl_mismatch", convention="log_std")
def log_std_scored_as_log_var():
    return vae(lambda mu, b: mu + b.exp() * torch.randn_like(mu), kl_log_var, bce)


@entry("bug", "kl_mismatch")
def log_var_that_no_draw_uses():
    return vae(lambda mu, b: mu + torch.randn_like(mu), kl_log_var, bce)


@entry("correct")
def output_that_no_draw_and_no_kl_uses():
    return vae(
        lambda mu, b: mu + torch.randn_like(mu),
        lambda mu, b: 0.5 * (mu**2).sum() + 1e-3 * (b**2).sum(),
        bce,
    )


@entry("bug", "kl_mismatch", convention="log_var")
def log_var_scored_as_log_std():
    return vae(half, lambda mu, b: (0.5 * (mu**2 + (2 * b).exp() - 1) - b).sum(), sse)


@entry("bug", "kl_mismatch")
def log_var_used_as_std():
    return vae(lambda mu, b: mu + b * torch.randn_like(mu), kl_log_var, bce)


@entry("bug", "kl_mismatch", convention="softplus")
def softplus_scored_as_log_var():
    return vae(of_std(F.softplus)[0], kl_log_var, bce)


@entry("bug", "kl_mismatch", convention="softplus")
def softplus_is_taken_for_a_variance():
    return vae(
        of_std(F.softplus)[0],
        lambda mu, b: 0.5 * (mu**2 + F.softplus(b) - 1 - F.softplus(b).log()).sum(),
        bce,
    )


@entry("bug", "kl_mismatch")
def variance_given_to_normal():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_var = encode(x)
        z = Normal(mu, log_var.exp()).rsample()
        return sse(decode(z), x) + kl_log_var(mu, log_var)

    return Built(step, (encode, decode, x))


@entry("bug", "kl_mismatch|sample_scale")
def noise_scaled_twice():
    def sample(mu, b):
        std = (0.5 * b).exp()
        return mu + std * (std * torch.randn_like(std))

    return vae(sample, kl_log_var, bce)


@entry("bug|warning", "kl_mismatch")
def clamped_in_the_sampler_only():
    return vae(lambda mu, b: half(mu, b.clamp(-0.2, 0.2)), kl_log_var, bce)


@entry("bug", "kl_mismatch")
def autocast_log_std_scored_as_log_var():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            mu, b = encode(x)
            z = mu + b.exp() * torch.randn_like(mu)
            y = decode(z)
        return bce(y.float(), x) + kl_log_var(mu.float(), b.float())

    return Built(step, (encode, decode, x))


@entry("bug", "kl_mismatch")
def compiled_log_std_scored_as_log_var():
    encode, decode, x = Encoder(), decoder(), data()

    @torch.compile(backend="eager")
    def forward(x):
        mu, b = encode(x)
        return mu, b, decode(mu + b.exp() * torch.randn_like(mu))

    def step():
        mu, b, y = forward(x)
        return bce(y, x) + kl_log_var(mu, b)

    return Built(step, (encode, decode, x))


@entry("bug", "kl_mismatch")
def checkpointed_variance_as_std():
    encode, decode, x = Encoder(), decoder(), data()

    def forward(x):
        mu, b = encode(x)
        return mu, b, decode(mu + b.exp() * torch.randn_like(mu))

    def step():
        mu, b, y = checkpoint(forward, x, use_reentrant=False)
        return bce(y, x) + kl_log_var(mu, b)

    return Built(step, (encode, decode, x))


@entry("bug", "kl_mismatch")
def scale_changed_in_place_before_the_kl():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_var = encode(x)
        std = log_var.mul_(0.5).exp_()
        z = torch.addcmul(mu, std, torch.randn_like(std))
        return bce(decode(z), x) + kl_log_var(mu, log_var)

    return Built(step, (encode, decode, x))


# --- the formula of the KL -----------------------------------------------------------------------


@entry("bug", "kl_mismatch|kl_negative")
def sign_of_the_kl():
    return vae(half, lambda mu, b: 0.5 * torch.sum(1 + b - mu.pow(2) - b.exp()), bce)


@entry("bug", "kl_mismatch|kl_negative")
def kl_subtracted():
    return vae(half, lambda mu, b: -kl_log_var(mu, b), sse)


@entry("bug", "kl_mismatch")
def square_of_the_mean_missing():
    return vae(half, lambda mu, b: -0.5 * (1 + b - b.exp()).sum(), bce)


@entry("bug", "kl_mismatch")
def mean_not_squared():
    return vae(half, lambda mu, b: -0.5 * (1 + b - mu - b.exp()).sum(), bce)


@entry("bug", "kl_mismatch")
def half_before_the_squares_only():
    return vae(half, lambda mu, b: 0.5 * (mu**2 + b.exp()).sum() - b.sum() - L * B / 2, bce)


@entry("bug", "kl_mismatch")
def log_var_squared():
    return vae(half, lambda mu, b: -0.5 * (1 + b - mu**2 - b.pow(2)).sum(), sse)


@entry("bug", "kl_mismatch")
def log_missing():
    return vae(half, lambda mu, b: -0.5 * (1 + b.exp() - mu**2 - b.exp()).sum(), bce)


@entry("bug", "kl_mismatch")
def kl_from_prior_to_posterior():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q, p = Normal(mu, b.exp()), Normal(torch.zeros_like(mu), 1.0)
        return bce(decode(q.rsample()), x) + kl_divergence(p, q).sum()

    return Built(step, (encode, decode, x))


@entry("bug", "kl_mismatch|kl_negative")
def draws_scored_with_the_wrong_sign():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q = Normal(mu, b.exp())
        z = q.rsample()
        kl = Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)
        return (bce(decode(z), x) + kl.sum()) / B

    return Built(step, (encode, decode, x))


@entry("bug", "kl_mismatch")
def log_q_without_its_scale():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_var = encode(x)
        std = (log_var / 2).exp()
        z = mu + std * torch.randn_like(mu)
        log_q = (-0.5 * ((z - mu) / std) ** 2).sum()
        return bce(decode(z), x) + log_q + 0.5 * (z**2).sum()

    return Built(step, (encode, decode, x))


@entry("bug")
def prior_alone():  # -log p(z) is not a KL: the entropy of q is missing
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_var = encode(x)
        z = half(mu, log_var)
        return bce(decode(z), x) + 0.5 * (z**2).sum()

    return Built(step, (encode, decode, x))


@entry("bug|incomplete")
def kl_of_the_mean_of_the_batch():
    return vae(half, lambda mu, b: B * kl_log_var(mu.mean(0), b.mean(0)), bce)


@entry("bug|incomplete", "kl_mismatch")
def full_covariance_without_its_logdet():
    net, x = Full(), data()

    def step():
        mu, tril = net(x)
        z = mu + (tril @ torch.randn(B, L, 1)).squeeze(-1)
        kl = 0.5 * (tril.square().sum((1, 2)) + mu.square().sum(1) - L)
        return bce(net.decode(z), x) / B + kl.mean()

    return Built(step, (net, x))


@entry("bug", "kl_mismatch")
def full_covariance_scored_by_its_diagonal():
    net, x = Full(), data()

    def step():
        mu, tril = net(x)
        z = MultivariateNormal(mu, scale_tril=tril).rsample()
        var = tril.diagonal(dim1=1, dim2=2).square()
        return (bce(net.decode(z), x) + kl_log_var(mu, var.log())) / B

    return Built(step, (net, x))


# --- heads ---------------------------------------------------------------------------------------


@entry("bug", "heads_tied")
def one_head_for_both():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        h = encode.body(x)
        mu, log_var = encode.mu(h), encode.mu(h)
        return bce(decode(half(mu, log_var)), x) + kl_log_var(mu, log_var)

    return Built(step, (encode, decode, x))


@entry("bug", "heads_tied")
def one_half_for_both():
    encode, decode, x = mlp(D, 2 * L), decoder(), data()

    def step():
        out = encode(x)
        mu, log_var = out[:, :L], out[:, :L]
        return bce(decode(half(mu, log_var)), x) + kl_log_var(mu, log_var)

    return Built(step, (encode, decode, x))


@entry("bug", "kl_mismatch")
def scale_of_the_other_latent():
    first, second, decode, x = Encoder(), Encoder(), decoder(latents=2 * L), data()

    def step():
        (m1, s1), (m2, s2) = first(x), second(x)
        y = decode(torch.cat([half(m1, s1), half(m2, s2)], 1))
        return bce(y, x) + kl_log_var(m1, s1) + kl_log_var(m2, s1)

    return Built(step, (first, second, decode, x))


@entry("bug|incomplete")
def second_latent_without_a_kl():
    first, second, decode, x = Encoder(), Encoder(), decoder(latents=2 * L), data()

    def step():
        (m1, s1), (m2, s2) = first(x), second(x)
        y = decode(torch.cat([half(m1, s1), half(m2, s2)], 1))
        return bce(y, x) + kl_log_var(m1, s1)

    return Built(step, (first, second, decode, x))


@entry("bug|incomplete|warning")
def dropout_between_sampler_and_kl():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_var = encode(x)
        z = half(F.dropout(mu, 0.5), log_var)
        return bce(decode(z), x) + kl_log_var(mu, log_var)

    return Built(step, (encode, decode, x))


@entry("bug|incomplete|warning")
def mean_decoded_in_place_of_the_draw():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_var = encode(x)
        z = half(mu, log_var)
        assert z.shape == mu.shape
        return bce(decode(mu), x) + kl_log_var(mu, log_var)

    return Built(step, (encode, decode, x))


@entry("bug", "sample_mean|kl_mismatch")
def noise_without_the_mean():
    return vae(lambda mu, b: (0.5 * b).exp() * torch.randn_like(mu), kl_log_var, bce)


# --- gradients -----------------------------------------------------------------------------------


@entry("bug", "no_gradient")
def kl_detached():
    return vae(half, lambda mu, b: kl_log_var(mu, b).detach(), bce)


@entry("bug", "no_gradient")
def kl_without_grad():
    @torch.no_grad()
    def kl(mu, b):
        return kl_log_var(mu, b)

    return vae(half, kl, sse)


@entry("bug", "no_gradient")
def sample_in_place_of_rsample():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q = Normal(mu, b.exp())
        kl = kl_divergence(q, Normal(torch.zeros_like(mu), 1.0))
        return (sse(decode(q.sample()), x) + kl.sum()) / B

    return Built(step, (encode, decode, x))


@entry("bug", "no_gradient")
def torch_normal_of_the_heads():
    return vae(lambda mu, b: torch.normal(mu, (0.5 * b).exp()), kl_log_var, bce)


@entry("bug", "no_gradient")
def scale_detached():
    return vae(
        lambda mu, b: mu + (0.5 * b).exp().detach() * torch.randn_like(mu),
        kl_log_var,
        bce,
    )


@entry("bug", "no_gradient")
def sampled_without_grad():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        with torch.no_grad():
            z = half(mu, b)
        return bce(decode(z), x) + kl_log_var(mu, b)

    return Built(step, (encode, decode, x))


# --- noise ---------------------------------------------------------------------------------------


@entry("bug", "noise_not_gaussian")
def uniform_noise():
    return vae(lambda mu, b: mu + (0.5 * b).exp() * torch.rand_like(mu), kl_log_var, bce)


@entry("bug", "noise_not_gaussian|sample_scale|kl_mismatch")
def uniform_noise_of_mean_zero():
    return vae(lambda mu, b: mu + (0.5 * b).exp() * (2 * torch.rand_like(mu) - 1), kl_log_var, bce)


@entry("bug", "noise_shared")
def one_row_of_noise_for_all_examples():
    return vae(lambda mu, b: mu + (0.5 * b).exp() * torch.randn(L), kl_log_var, bce)


@entry("bug", "noise_shared")
def one_number_of_noise_for_all_latents():
    return vae(lambda mu, b: mu + (0.5 * b).exp() * torch.randn(B, 1), kl_log_var, bce)


@entry("bug|incomplete", "noise_shared|stochastic")
def the_same_noise_at_every_call():
    def sample(mu, b):
        generator = torch.Generator().manual_seed(0)
        return mu + (0.5 * b).exp() * torch.randn(mu.shape, generator=generator)

    return vae(sample, kl_log_var, bce)


# --- a KL that is constant, weights, priors ------------------------------------------------------


@entry("bug", "kl_constant")
def capacity_of_zero():
    return vae(half, lambda mu, b: kl_log_var(mu, b).clamp(0, 0), sse)


@entry("bug", "kl_constant")
def clamped_far_above():
    return vae(half, lambda mu, b: kl_log_var(mu, b).clamp(min=1e4), bce)


@entry("bug|warning", "kl_constant|reduction_imbalance")
def weight_of_zero():
    return vae(half, lambda mu, b: 0.0 * kl_log_var(mu, b), bce)


def learned_prior(kl):
    encode, decode, x = Encoder(), decoder(), data()
    prior = nn.ParameterDict({"mean": torch.randn(L), "log_std": 0.7 * torch.randn(L)})

    def step():
        mu, s = encode(x)
        z = mu + s.exp() * torch.randn_like(mu)
        return (bce(decode(z), x) + kl(s, mu - prior["mean"], prior["log_std"]).sum()) / B

    return Built(step, (encode, decode, prior, x))


@entry("bug", "kl_mismatch")
def width_of_the_learned_prior_forgotten():
    return learned_prior(lambda s, d, p: p - s + 0.5 * ((2 * s).exp() + d**2) - 0.5)


@entry("bug", "kl_mismatch")
def log_width_of_the_learned_prior_forgotten():
    return learned_prior(lambda s, d, p: -s + 0.5 * ((2 * s).exp() + d**2) / (2 * p).exp() - 0.5)


@entry("bug", "kl_mismatch")
def logarithm_to_a_learned_prior_doubled():
    return learned_prior(
        lambda s, d, p: 2 * (p - s) + 0.5 * ((2 * s).exp() + d**2) / (2 * p).exp() - 0.5
    )


@entry("warning", "kl_offset")
def half_forgotten_in_the_kl_to_a_learned_prior():
    return learned_prior(lambda s, d, p: p - s + 0.5 * ((2 * s).exp() + d**2) / (2 * p).exp())


@entry("warning|incomplete|bug")
def vamp_prior_of_weights_that_sum_to_four():
    return vamp(lambda: torch.tensor(0.0))


@entry("warning|incomplete|bug", "kl_offset")
def vamp_prior_of_exponentials_that_are_not_normalized():
    log_w = nn.Parameter(torch.randn(4))
    return vamp(lambda: log_w)


@entry("bug", "kl_mismatch")
def log_var_divided_by_the_variance_too():
    encode, decode, x = Encoder(), decoder(), data()
    pseudo = nn.Parameter(torch.rand(4, D))

    def log_normal(z, mu, log_var):
        return (-0.5 * (log_var + (z - mu) ** 2) / log_var.exp()).sum(-1)

    def step():
        mu, log_var = encode(x)
        z = half(mu, log_var)
        m, s = encode(pseudo)
        log_p = torch.logsumexp(log_normal(z.unsqueeze(1), m, s) - math.log(4), 1)
        return (bce(decode(z), x) + (log_normal(z, mu, log_var) - log_p).sum()) / B

    return Built(step, (encode, decode, pseudo, x))


# --- importance weights --------------------------------------------------------------------------


def importance(combine):
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_var = encode(x)
        q = Normal(mu, (0.5 * log_var).exp())
        z = q.rsample((4,))
        log_p = Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_q = q.log_prob(z).sum(-1)
        logits, target = decode(z), x.expand(4, B, D)
        log_x = -F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        return combine(log_x, log_p, log_q)

    return Built(step, (encode, decode, x))


@entry("bug|incomplete")
def importance_weights_without_log_q():
    return importance(
        lambda log_x, log_p, log_q: -(torch.logsumexp(log_x + log_p, 0) - math.log(4)).mean()
    )


@entry("bug|incomplete")
def importance_weights_with_the_wrong_sign():
    return importance(
        lambda log_x, log_p, log_q: -torch.logsumexp(log_x - log_p + log_q, 0).mean()
    )


@entry("bug", "kl_negative")
def softmax_of_the_loss_in_place_of_its_negative():
    def combine(log_x, log_p, log_q):
        loss = log_q - log_p - log_x
        return (loss.softmax(0) * loss).sum(0).mean()

    return importance(combine)


@entry("bug|incomplete|warning")
def importance_weights_over_the_batch():
    return importance(
        lambda log_x, log_p, log_q: -torch.logsumexp(log_x + log_p - log_q, 1).mean()
    )


@entry("bug", "iw_gradient")
def importance_weights_that_are_not_detached():
    def combine(log_x, log_p, log_q):
        log_w = log_x + log_p - log_q
        return -(log_w.softmax(0) * log_w).sum(0).mean()

    return importance(combine)


@entry("correct")
def importance_weights_that_are_detached():
    def combine(log_x, log_p, log_q):
        log_w = log_x + log_p - log_q
        return -(log_w.softmax(0).detach() * log_w).sum(0).mean()

    return importance(combine)


def weighted_copies(draws):
    """The examples are copied before the encoder, once for each draw."""
    encode, decode = Encoder(), decoder()
    x = data().expand(draws, B, D)

    def step():
        mu, log_var = encode(x)
        q = Normal(mu, (0.5 * log_var).exp())
        z = q.rsample()
        log_x = -F.binary_cross_entropy_with_logits(decode(z), x, reduction="none").sum(-1)
        log_w = log_x + (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(-1)
        most = log_w.amax(0)
        return -((log_w - most).exp().mean(0).log() + most).mean()

    return Built(step, (encode, decode, x))


@entry("correct")
def importance_weights_of_copies():
    return weighted_copies(4)


@entry("correct")
def importance_weight_of_one_draw():
    return weighted_copies(1)


@entry("bug", "iw_value")
def importance_weights_with_the_kl_in_closed_form():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, b = encode(x)
        q = Normal(mu, F.softplus(b))
        logits, target = decode(q.rsample((4,))), x.expand(4, B, D)
        log_x = -F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        kl = kl_divergence(q, Normal(0.0, 1.0)).sum(-1)
        return -(torch.logsumexp(log_x - kl, 0) - math.log(4)).mean()

    return Built(step, (encode, decode, x))


@entry("correct|incomplete")
def squares_of_importance_weights():
    def combine(log_x, log_p, log_q):
        log_w = log_x + log_p - log_q
        return -(log_w.softmax(0).detach() ** 2 * log_w).sum(0).mean()

    return importance(combine)


@entry("correct|incomplete")
def renyi_bound():
    def combine(log_x, log_p, log_q):
        return -torch.logsumexp(0.5 * (log_x + log_p - log_q), 0).mean() / 0.5

    return importance(combine)


# --- Bayes by backprop ---------------------------------------------------------------------------


@entry("bug|incomplete", "kl_mismatch|prior_term_mismatch")
def weights_scored_with_sigma_for_its_log():
    x, y = torch.randn(B, 4), torch.randn(B, 1)
    w = nn.ParameterDict({"mu": torch.randn(5, 4), "rho": torch.randn(5, 4) - 1})
    out = nn.Linear(5, 1)

    def step():
        sigma = F.softplus(w["rho"])
        a = w["mu"] + sigma * torch.randn_like(sigma)
        log_q = (-0.5 * math.log(2 * math.pi) - sigma - (a - w["mu"]) ** 2 / (2 * sigma**2)).sum()
        log_p = Normal(0.0, 1.0).log_prob(a).sum()
        return 0.5 * (out((x @ a.T).tanh()) - y).square().sum() + log_q - log_p

    return Built(step, (w, out, x, y))
