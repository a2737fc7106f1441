"""VAEs by their reconstructions: likelihoods that are recognized, and several of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical

from corpus_steps_base import B, Built, D, Encoder, L, data, decoder, entry, mlp
from corpus_steps_vae import bce, weighted


def dead_pixels(kl_weight):
    """Some pixels are ReLUs that are zero: the loss has no slope in the layer before them."""

    def recon(y, x):
        return F.binary_cross_entropy((y - 0.3).relu().sigmoid(), x, reduction="sum")

    return weighted(recon, kl_weight)


@entry("correct", says="weight 1 beside a Bernoulli likelihood")
def relu_before_the_sigmoid():
    return dead_pixels(lambda kl: kl.sum())


@entry("warning", "reduction_imbalance", beta=(1 / L,))
def relu_before_the_sigmoid_beside_mean_of_latents():
    return dead_pixels(lambda kl: kl.sum() / L)


@entry("correct", says="weight 1 beside a Laplace likelihood")
def absolute_error():
    return weighted(lambda y, x: F.l1_loss(y, x, reduction="sum"), lambda kl: kl.sum())


@entry("warning", "reduction_imbalance", beta=(D,))
def mean_absolute_error_beside_sum_of_latents():
    return weighted(F.l1_loss, lambda kl: kl.sum(1).mean())


@entry("correct", says="no known likelihood")
def huber_error():
    return weighted(
        lambda y, x: F.smooth_l1_loss(y, x, reduction="sum", beta=0.1), lambda kl: kl.sum()
    )


def words(log_likelihood, draws=1):
    """A VAE of sentences of D words, of a vocabulary of 7."""
    encode, decode, x = Encoder(), decoder(7 * D), torch.randint(0, 7, (B, D))

    def step():
        mu, b = encode(x / 7)
        z = mu[:, None] + (0.5 * b[:, None]).exp() * torch.randn(B, draws, L)
        kl = -0.5 * (1 + b - mu**2 - b.exp()).sum(1).mean()
        return kl - log_likelihood(decode(z).view(B, -1, 7), x.repeat(1, draws))

    return Built(step, (encode, decode, x))


@entry("correct", says="weight 1 beside a categorical likelihood")
def words_summed():
    return words(lambda y, x: -F.cross_entropy(y.mT, x, reduction="sum") / B)


@entry("correct", says="weight 1 beside a categorical likelihood")
def words_by_distributions():
    return words(lambda y, x: Categorical(logits=y).log_prob(x).sum(1).mean())


@entry("warning", "reduction_imbalance", beta=(D,))
def words_averaged():
    return words(lambda y, x: -F.cross_entropy(y.mT, x))


@entry("correct", says="no known likelihood")
def words_decoded_from_two_draws():
    return words(lambda y, x: -F.cross_entropy(y.mT, x, reduction="sum") / (2 * B), draws=2)


@entry("correct", says="no known likelihood")
def words_with_smoothed_labels():
    return words(lambda y, x: -D * F.cross_entropy(y.mT, x, label_smoothing=0.1))


def two_passes(kl):
    """One image is decoded from two latents, each with a KL."""
    first, second, decode, x = Encoder(), Encoder(), decoder(), data()

    def step():
        loss = torch.zeros(())
        for encode in (first, second):
            mu, b = encode(x)
            z = mu + (0.5 * b).exp() * torch.randn_like(mu)
            loss = loss + bce(decode(z), x) + kl(mu, b)
        return loss

    return Built(step, (first, second, decode, x))


@entry("correct", says="no known likelihood belongs to it alone")
def reconstructions_of_two_passes():
    return two_passes(lambda mu, b: -0.5 * (1 + b - mu**2 - b.exp()).sum())


@entry("bug", "kl_mismatch")
def reconstructions_of_two_passes_wrong():
    return two_passes(lambda mu, b: -0.5 * (1 + 2 * b - mu**2 - (2 * b).exp()).sum())


def beside_classes(beta):
    """A latent class, relaxed, is decoded beside the Gaussian latent."""
    encode, classify, decode, x = Encoder(), mlp(D, 3), decoder(latents=L + 3), data()

    def step():
        mu, b = encode(x)
        z = mu + (0.5 * b).exp() * torch.randn_like(mu)
        log_p = classify(x).log_softmax(1)
        y = decode(torch.cat([z, F.gumbel_softmax(log_p, tau=0.7)], 1))
        kl = -0.5 * (1 + b - mu**2 - b.exp()).sum() + (log_p.exp() * (log_p + math.log(3))).sum()
        return bce(y, x) + beta * kl

    return Built(step, (encode, classify, decode, x))


@entry("correct", says="weight 1 beside a Bernoulli likelihood")
def relaxed_class_beside_a_latent():
    return beside_classes(1)


@entry("warning", "reduction_imbalance", beta=(30.0,))
def relaxed_class_beside_a_latent_with_a_beta():
    return beside_classes(30)


def two_decoders(kl):
    """Each word is drawn by one of two decoders, with equal probabilities."""
    encode, decode, x = Encoder(), decoder(14 * D), torch.randint(0, 7, (B, D))

    def step():
        mu, b = encode(x / 7)
        z = mu + (0.5 * b).exp() * torch.randn_like(mu)
        log_p = decode(z).view(B, 2, D, 7).log_softmax(3)
        of_words = log_p.gather(3, x[:, None, :, None].expand(B, 2, D, 1))
        return kl(mu, b) - torch.logsumexp(of_words, 1).sum()

    return Built(step, (encode, decode, x))


@entry("correct", says="no known likelihood")
def mixture_as_likelihood():
    return two_decoders(lambda mu, b: -0.5 * (1 + b - mu**2 - b.exp()).sum())


@entry("bug", "kl_negative")
def mixture_as_likelihood_with_the_kl_taken_off():
    return two_decoders(lambda mu, b: 0.5 * (1 + b - mu**2 - b.exp()).sum())


def mixture_of_each_latent(total):
    """The prior is a mixture for each latent, with weights that sum to `total`; 80 latents."""
    encode, decode, x = Encoder(), decoder(), data(16)
    means, logits = nn.Parameter(2 * torch.randn(3, 1, L)), nn.Parameter(torch.randn(3, 1, 1))

    def step():
        mu, b = encode(x)
        z = mu + (0.5 * b).exp() * torch.randn_like(mu)
        log_q = -0.5 * (b + (z - mu) ** 2 / b.exp())
        log_p = (-0.5 * (z - means) ** 2 + logits.log_softmax(0)).logsumexp(0) + math.log(total)
        return bce(decode(z), x) + (log_q - log_p).sum()

    return Built(step, (encode, decode, x, means, logits))


@entry("correct")
def mixture_prior_of_each_of_many_latents():
    return mixture_of_each_latent(1.0)


@entry("warning", "kl_offset")
def mixture_prior_of_each_of_many_latents_with_weights_that_sum_to_two():
    return mixture_of_each_latent(2.0)
