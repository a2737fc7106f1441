"""Two Dense heads, `z_mean` and `z_log_sigma`: Keras inside a musigma VAE, and natively.

    python examples/04_two_heads_keras.py [STEPS [PICTURE.png]]

The VAE of the Keras blog: two Dense layers on one hidden layer, z = z_mean + exp(z_log_sigma) ·
epsilon, and a KL of -0.5 · sum(1 + z_log_sigma - z_mean² - exp(z_log_sigma)). Are two layers and
one concatenated layer the same? And is that the KL of the Gaussian that is drawn from?
"""

import math
import os
import sys
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from torch import nn

import musigma
from musigma import Format, GaussianHead

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
picture = sys.argv[2] if len(sys.argv) > 2 else None
D, HIDDEN, Z = 64, 128, 8
TWO_HEADS = Format("two-heads", scale="log_std")

data = musigma.data.load("digits", preprocess=musigma.Preprocess(binarize="threshold"))


def images(part):
    some = data.split(part)
    return torch.from_numpy(some.take(range(len(some)))).float().flatten(1)


train, test = images("train"), images("held-out")

# -- Keras models as the networks of a musigma VAE

keras.utils.set_random_seed(0)
inputs = keras.Input((D,))
hidden = keras.layers.Dense(HIDDEN, activation="relu", name="hidden")(inputs)
z_mean = keras.layers.Dense(Z, name="z_mean")(hidden)
z_log_sigma = keras.layers.Dense(Z, name="z_log_sigma")(hidden)
encoder = keras.Model(inputs, [z_mean, z_log_sigma])
decoder = keras.Sequential(
    [
        keras.Input((Z,)),
        keras.layers.Dense(HIDDEN, activation="relu"),
        keras.layers.Dense(D),  # logits: the sigmoid is in the likelihood
    ]
)


def vae_of(encoder_net, decoder_net, format=TWO_HEADS):
    return musigma.VAE(
        GaussianHead(encoder_net, event_ndims=1, format=format),
        musigma.likelihood("bernoulli", (D,), lambda channels: decoder_net, levels=2),
        musigma.Prior(musigma.StandardNormal((Z,))),
    )


vae = vae_of(encoder, decoder)
optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
for _ in range(steps):
    x = train[torch.randint(len(train), (64,))]
    loss = musigma.objectives.elbo(vae(x))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def figure(model):
    torch.manual_seed(1)
    return model.elbo(test)


elbo = figure(vae)
print(
    f"Keras on torch in a musigma VAE: -ELBO {-elbo.mean():.2f} nats, {len(test)} held-out digits"
)

with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    encoder.save(folder / "encoder.keras")
    decoder.save(folder / "decoder.keras")
    loaded = [keras.saving.load_model(folder / f"{n}.keras") for n in ("encoder", "decoder")]
    print("  loaded from .keras:      off by", (figure(vae_of(*loaded)) - elbo).abs().max().item())
    encoder.save_weights(folder / "encoder.weights.h5")
    decoder.save_weights(folder / "decoder.weights.h5")
    fresh = [keras.models.clone_model(model) for model in (encoder, decoder)]
    fresh[0].load_weights(folder / "encoder.weights.h5")
    fresh[1].load_weights(folder / "decoder.weights.h5")
    print("  loaded from .weights.h5: off by", (figure(vae_of(*fresh)) - elbo).abs().max().item())

# -- the same natively


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(D, HIDDEN)
        self.z_mean, self.z_log_sigma = nn.Linear(HIDDEN, Z), nn.Linear(HIDDEN, Z)

    def forward(self, x):
        h = self.hidden(x).relu()
        return self.z_mean(h), self.z_log_sigma(h)


@torch.no_grad()
def carry(dense, linear):
    """A Dense kernel is (inputs, outputs), a Linear weight is (outputs, inputs)."""
    kernel, bias = (torch.from_numpy(w) for w in dense.get_weights())
    linear.weight.copy_(kernel.T)
    linear.bias.copy_(bias)


heads = TwoHeads()
native = nn.Sequential(nn.Linear(Z, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, D))
for name in ("hidden", "z_mean", "z_log_sigma"):
    carry(encoder.get_layer(name), getattr(heads, name))
for dense, linear in zip(decoder.layers, (native[0], native[2]), strict=True):
    carry(dense, linear)
apart = (figure(vae_of(heads, native)) - elbo).abs().max().item()
print(f"  the same in torch, with the weights carried over: off by {apart:.1e} nats")

# -- two heads, one layer, and R's concatenation

h = heads.hidden(test).relu()
mean, log_std = TWO_HEADS.split(heads(test))
print("two Dense heads against")
for words in ("halves log_std", "interleaved log_std", "halves log_var"):
    one = nn.Linear(HIDDEN, 2 * Z)
    to = Format.parse(words)
    weight, bias = (
        tuple(getattr(layer, part) for layer in (heads.z_mean, heads.z_log_sigma))
        for part in ("weight", "bias")
    )
    with torch.no_grad():
        for rows, kept in zip(TWO_HEADS.permute(weight, bias, to), one.parameters(), strict=True):
            kept.copy_(rows)
        again = to.split(one(h))
    off = max((a - b).abs().max().item() for a, b in zip(again, (mean, log_std), strict=True))
    print(f"  one Dense({2 * Z}) read as '{words}': off by {off:.1e}")
joined = torch.cat(heads(test), 1)  # layer_concatenate(list(z_mean, z_log_var)); x[, 1:d]
sliced = Format.parse("halves log_std").split(joined)
off = max((a - b).abs().max().item() for a, b in zip(sliced, (mean, log_std), strict=True))
print(f"  R's concatenation, sliced by [, 1:d] and [, (d + 1):(2 * d)]: off by {off:.1e}")

# -- the published KL


def published_kl(mean, s):
    return -0.5 * (1 + s - mean**2 - s.exp()).sum(1)


with torch.no_grad():
    q = vae.encoder(test)
    p = musigma.DiagonalGaussian(torch.zeros(Z), torch.zeros(Z), 1)
    z = q.rsample((2000,))
    drawn = q.log_prob(z) - p.log_prob(z)
    error = drawn.mean(1).std() / math.sqrt(len(drawn))
    print(f"KL of what is drawn, sampled: {drawn.mean():.4f} ± {error:.4f} nats")
    print(f"  its closed form:            {torch.distributions.kl_divergence(q, p).mean():.4f}")
    print(f"  the published formula:      {published_kl(q.mean, q.log_std).mean():.4f}")

# -- what it costs, where the truth is known: x = W z + noise, with orthogonal columns

torch.manual_seed(0)
K, N, NOISE = 6, 20, 0.5
scales = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.25, 0.1], dtype=torch.float64)
W = torch.linalg.qr(torch.randn(N, K, dtype=torch.float64))[0] * scales
precision = scales**2 / NOISE**2  # of x about each z
x = torch.randn(2000, K, dtype=torch.float64) @ W.T + NOISE * torch.randn(2000, N).double()
log_px = torch.distributions.MultivariateNormal(
    torch.zeros(N).double(), W @ W.T + NOISE**2 * torch.eye(N).double()
).log_prob(x)
truth = 1 / (1 + precision).sqrt()
predicted = (-0.5 + (0.25 + 2 * precision).sqrt()) / (2 * precision)


class Linear(nn.Module):
    """The decoder, which is known."""

    def forward(self, z):
        return z @ W.T


linear = musigma.VAE(
    GaussianHead(nn.Linear(N, K).double(), event_ndims=1, log_std=torch.zeros(K).double()),
    GaussianHead(Linear(), event_ndims=1, log_std=math.log(NOISE)),
    musigma.Prior(musigma.StandardNormal((K,))),
).double()
learned = {}
for name in ("true", "published"):
    with torch.no_grad():
        linear.encoder.net.weight.zero_()
        linear.encoder.log_std.zero_()
    optimizer = torch.optim.Adam(linear.encoder.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        e, q = linear(x), linear.encoder(x)
        kl = e.kl.sum(1) if name == "true" else published_kl(q.mean, q.log_std)
        loss = (kl - e.log_px).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        q = linear.encoder(x)
        gap = -0.5 * ((x - q.mean @ W.T) ** 2).sum(1) / NOISE**2
        gap = gap - 0.5 * (precision * q.variance).sum(1) - N * math.log(NOISE)
        bound = (
            gap
            - 0.5 * N * math.log(2 * math.pi)
            - torch.distributions.kl_divergence(
                q, musigma.DiagonalGaussian(torch.zeros(K).double(), torch.zeros(K).double(), 1)
            )
        )
    learned[name] = linear.encoder.log_std.detach().exp(), (log_px - bound).mean().item()

print("probabilistic PCA: standard deviation of q(z|x) in every dimension")
for label, values in (
    ("of the true posterior", truth),
    ("learned with the true KL", learned["true"][0]),
    ("learned with the published KL", learned["published"][0]),
    ("  predicted for it", predicted),
):
    print(f"  {label:<32}", "  ".join(f"{v:.3f}" for v in values.tolist()))
lost = 0.5 * (precision * predicted**2 + predicted**2 - 1) - predicted.log()
best = 0.5 * (precision * truth**2 + truth**2 - 1) - truth.log()
print(f"log p(x) - bound, nats: {learned['true'][1]:.4f} with the true KL,")
print(f"  {learned['published'][1]:.4f} with the published; predicted {(lost - best).sum():.4f}")
if not picture:
    sys.exit()

import matplotlib.pyplot as plt  # noqa: E402

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
a = torch.logspace(-2, 3, 200)
left.plot(a, 1 / (1 + a).sqrt(), color="black", lw=1, label="true posterior")
left.plot(
    a, (-0.5 + (0.25 + 2 * a).sqrt()) / (2 * a), "--", color="C3", label="optimum, published KL"
)
left.plot(precision, learned["true"][0], "o", color="C0", label="learned, true KL")
left.plot(precision, learned["published"][0], "s", color="C3", label="learned, published KL")
left.set_xscale("log")
left.set_xlabel("precision of x about this dimension of z")
left.set_ylabel("standard deviation of q(z|x)")
left.set_title("probabilistic PCA: the published KL, too narrow")
left.legend(frameon=False)
t, s = (-0.5 + (0.25 + 2 * a).sqrt()) / (2 * a), 1 / (1 + a).sqrt()
cost = 0.5 * ((a + 1) * t**2) - t.log() - 0.5 * ((a + 1) * s**2) + s.log()
right.plot(a, cost, color="C3")
right.set_xscale("log")
right.set_xlabel("precision of x about a dimension of z")
right.set_ylabel("nats lost in that dimension")
right.set_title("what the published KL costs")
fig.tight_layout()
fig.savefig(picture, dpi=110)
