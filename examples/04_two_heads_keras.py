"""Two Dense heads, `z_mean` and `z_log_sigma`: Keras in a musigma VAE, and the same in torch.

The VAE of the Keras blog, in its notation:

    h = Dense(relu)(x);  z_mean, z_log_sigma = Dense(z)(h), Dense(z)(h)
    z = z_mean + exp(z_log_sigma) * epsilon, with std epsilon_std
    loss = binary_crossentropy - 0.5 * sum(1 + z_log_sigma - z_mean ** 2 - exp(z_log_sigma))

Questions: Are two Dense layers, one layer that is split, and R's concatenation and slices the
same? Is the last sum the KL divergence of the sampler? If not, what does it cost?

python examples/04_two_heads_keras.py [STEPS [PICTURE.png]]
"""

import math
import os
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("KERAS_TORCH_DEVICE", "cpu")  # otherwise Keras moves to a GPU

import keras
import torch
from torch import nn
from torch.distributions import kl_divergence

import musigma
from musigma import DiagonalGaussian, Format, GaussianHead

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
picture = sys.argv[2] if len(sys.argv) > 2 else None
D, HIDDEN, Z = 64, 128, 8
TWO_HEADS = Format.parse("two-heads log_std")

binarize = musigma.Preprocess(binarize="threshold")
digits = musigma.data.load("digits", preprocess=binarize)
parts = digits.split("train"), digits.split("held-out")
train_x, test_x = (torch.from_numpy(p.take(range(len(p)))).float().flatten(1) for p in parts)


def published_kl(q):
    """The formula of the blog, which reads z_log_sigma as a log variance."""
    return -0.5 * (1 + q.log_std - q.mean.square() - q.log_std.exp()).sum(1)


def train(vae, x, lr, published=False):
    """Train with the ELBO, or with the published formula in place of the KL."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = x[musigma.data.batch_indices(len(x), 64, seed=0, step=step)]
        evidence = vae(batch, closed_form=True)
        loss = musigma.objectives.elbo(evidence).mean()
        if published:
            loss = (published_kl(vae.encoder(batch)) - evidence.log_px).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def true_bound(vae, x=test_x, repeats=1):
    """-ELBO of every example in nats, with the same noise for all models."""
    torch.manual_seed(2)
    return -torch.stack([vae.elbo(x) for _ in range(repeats)]).mean(0)


def largest(a, b):
    """The largest difference between two sequences of tensors."""
    return max((p - q).abs().max().item() for p, q in zip(a, b, strict=True))


# -- 1. Keras models as the networks of a musigma VAE


def keras_nets():
    """The encoder, a model with two outputs, and the decoder, which emits logits."""
    keras.utils.set_random_seed(0)
    x, z = keras.Input((D,)), keras.Input((Z,))
    h = keras.layers.Dense(HIDDEN, activation="relu", name="hidden")(x)
    heads = [keras.layers.Dense(Z, name=name)(h) for name in ("z_mean", "z_log_sigma")]
    h = keras.layers.Dense(HIDDEN, activation="relu", name="hidden")(z)
    return keras.Model(x, heads), keras.Model(z, keras.layers.Dense(D, name="logits")(h))


def vae_of(encoder, decoder):
    """A VAE of two networks."""
    return musigma.VAE(
        GaussianHead(encoder, event_ndims=1, format=TWO_HEADS),
        musigma.likelihood("bernoulli", (D,), lambda channels: decoder, levels=2),
        musigma.Prior(musigma.StandardNormal((Z,))),
    )


encoder, decoder = keras_nets()
vae = vae_of(encoder, decoder)
train(vae, train_x, lr=2e-3)
nats = true_bound(vae)
with tempfile.TemporaryDirectory() as folder:
    whole, fresh = [], keras_nets()
    for name, net, other in zip(("encoder", "decoder"), (encoder, decoder), fresh, strict=True):
        net.save(f"{folder}/{name}.keras")
        whole.append(keras.saving.load_model(f"{folder}/{name}.keras"))  # in safe mode
        net.save_weights(f"{folder}/{name}.weights.h5")
        other.load_weights(f"{folder}/{name}.weights.h5")
    reloaded = [largest(true_bound(vae_of(*nets)), nats) for nets in (whole, fresh)]

with torch.no_grad():
    z_mean, z_log_sigma = encoder(test_x)
    drawn = []
    for epsilon_std in (1.0, 0.5, 0.0):
        torch.manual_seed(3)
        epsilon = epsilon_std * torch.randn_like(z_mean)
        torch.manual_seed(3)
        z = vae.encoder(test_x).rsample(temperature=epsilon_std)
        drawn.append(largest(z_mean + z_log_sigma.exp() * epsilon, z))
    pixels = keras.Sequential([decoder, keras.layers.Activation("sigmoid")])(z)
    crossentropy = D * keras.losses.binary_crossentropy(test_x, pixels)  # Keras averages
    scored = largest(crossentropy, -vae.decoder(z).log_prob(test_x))
print(f"""1. Keras on torch in a musigma VAE: -ELBO {nats.mean():.2f} nats on held-out digits
  differences: loaded from .keras {reloaded[0]}, from .weights.h5 {reloaded[1]}
  z at epsilon_std 1, 0.5, 0 against the same temperatures: {max(drawn)}
  {D} * binary_crossentropy of the sigmoid against -log p(x|z): {scored:.0e} nats""")

# -- 2. the same in torch


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(D, HIDDEN)
        self.z_mean, self.z_log_sigma = nn.Linear(HIDDEN, Z), nn.Linear(HIDDEN, Z)

    def forward(self, x):
        h = self.hidden(x).relu()
        return self.z_mean(h), self.z_log_sigma(h)


@torch.no_grad()
def copy_weights(dense, linear):
    """Copy a Dense kernel (inputs, outputs) into a Linear weight (outputs, inputs)."""
    kernel, bias = map(torch.from_numpy, dense.get_weights())
    linear.weight.copy_(kernel.T)
    linear.bias.copy_(bias)


heads = TwoHeads().requires_grad_(False)
logits = nn.Sequential(nn.Linear(Z, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, D)).requires_grad_(False)
for dense, linear in zip(encoder.layers[1:], heads.children(), strict=True):
    copy_weights(dense, linear)
for dense, linear in zip(decoder.layers[1:], logits[::2], strict=True):
    copy_weights(dense, linear)
with torch.no_grad():
    emitted, decoded = largest(heads(test_x), encoder(test_x)), largest(logits(z), decoder(z))
print(f"""2. The same in torch with the weights copied, float32
  differences: heads {emitted:.0e}, logits {decoded:.0e}, \
-ELBO at most {largest(true_bound(vae_of(heads, logits)), nats):.0e} of {nats.mean():.0f} nats""")

# -- 3. two heads, one layer, R's concatenation

h, pair = heads.hidden(test_x).relu(), heads(test_x)
both = TWO_HEADS.split(pair)
weights = heads.z_mean.weight, heads.z_log_sigma.weight
biases = heads.z_mean.bias, heads.z_log_sigma.bias
print("3. Differences between two Dense heads, read as (mean, log_std), and")
for words in ("halves log_std", "interleaved log_std", "halves log_var", "interleaved log_var"):
    to = Format.parse(words)
    tensors = largest(to.split(to.join(*both)), both)
    one_layer = nn.functional.linear(h, *TWO_HEADS.permute(weights, biases, to))
    layers = largest(to.split(one_layer), both)
    print(f"  '{words}': tensors {tensors}, one Dense({2 * Z}) {layers:.0e} (rounding)")
x = torch.cat(pair, 1)  # R: layer_concatenate(list(z_mean, z_log_var)), then x[, 1:d] and
sliced = x[:, :Z], x[:, Z:] / 2  # x[, (d + 1):(2 * d)], sampled with exp(z_log_var / 2)
r = largest(Format.parse("halves log_var").split(x), sliced)
print(f"  R's concatenation and slices, read as 'halves log_var': {r}")

# -- 4. the published KL

with torch.no_grad():
    q, p = vae.encoder(test_x), DiagonalGaussian(torch.zeros(Z), torch.zeros(Z), 1)
    z = q.rsample((2000,))
    each = (q.log_prob(z) - p.log_prob(z)).mean(1)  # one estimate per draw
    error = each.std() / math.sqrt(len(each))
other = vae_of(*keras_nets())
train(other, train_x, lr=2e-3, published=True)
worse = true_bound(other, repeats=100) - true_bound(vae, repeats=100)
print(f"""4. KL of the sampler, nats per digit
  sampled                {each.mean():.4f} ± {error:.4f}
  closed form            {kl_divergence(q, p).mean():.4f}
  the published formula  {published_kl(q).mean():.4f}
  a VAE trained with the published formula has a true bound that is worse by \
{worse.mean():.2f} ± {worse.std() / len(worse) ** 0.5:.2f}""")

# -- 5. the cost in a model with a known posterior: x = W z + noise, orthogonal columns of W

torch.manual_seed(0)
K, N, NOISE = 6, 20, 0.5
lengths = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.25, 0.1])
W = torch.linalg.qr(torch.randn(N, K)).Q * lengths
a = (lengths / NOISE) ** 2  # precision of x about each z
x = torch.randn(5000, K) @ W.T + NOISE * torch.randn(5000, N)
true_std = (1 + a).rsqrt()
posterior = DiagonalGaussian(x @ W / NOISE**2 * true_std**2, true_std.log(), 0)
log_px = torch.distributions.MultivariateNormal(
    torch.zeros(N), W @ W.T + NOISE**2 * torch.eye(N)
).log_prob(x)


def narrow(a):
    """The std that the published KL leads to, the minimum of a t² / 2 + (t - log t) / 2."""
    return ((1 + 8 * a).sqrt() - 1) / (4 * a)


def lost(a, t):
    """Nats lost in a dimension: KL(N(m, t²) || true posterior) for the same mean."""
    return ((1 + a) * t**2 - 1 - ((1 + a) * t**2).log()) / 2


stds, gaps, sampled = {}, {}, {}
for kind in ("true", "published"):
    known, guess = nn.Linear(K, N, bias=False), nn.Linear(N, K)
    known.weight = nn.Parameter(W.clone(), requires_grad=False)
    pca = musigma.VAE(
        GaussianHead(guess, event_ndims=1, log_std=torch.zeros(K)),
        GaussianHead(known, event_ndims=1, log_std=math.log(NOISE)),
        musigma.Prior(musigma.StandardNormal((K,))),
    )
    train(pca, x, lr=0.03, published=kind == "published")
    with torch.no_grad():
        q = pca.encoder(x)
    stds[kind] = q.stddev[0]
    gaps[kind] = kl_divergence(DiagonalGaussian(q.mean, q.log_std, 0), posterior).mean(0)
    gap = log_px + true_bound(pca, x, repeats=20)
    sampled[kind] = f"{gap.mean():.4f} ± {gap.std() / len(gap) ** 0.5:.4f}"


def row(values):
    return "  ".join(f"{value:6.3f}" for value in values.tolist())


print(f"""5. Probabilistic PCA, with a known posterior; one column for each of {K} dimensions
  precision a                {row(a)}
  std of the true posterior  {row(true_std)}
  learned, true KL           {row(stds["true"])}
  learned, published KL      {row(stds["published"])}
  predicted                  {row(narrow(a))}
  nats lost, true KL         {row(gaps["true"])}
  nats lost, published KL    {row(gaps["published"])}
  predicted                  {row(lost(a, narrow(a)))}
  log p(x) minus the true bound:
    {gaps["true"].sum():.4f} with the true KL (sampled {sampled["true"]}),
    {gaps["published"].sum():.4f} with the published (sampled {sampled["published"]}), \
predicted {lost(a, narrow(a)).sum():.4f}""")

if picture:
    from matplotlib.figure import Figure

    figure = Figure((9.6, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    line = torch.logspace(-1.7, 2, 200)
    left.plot(line, (1 + line).rsqrt(), color="C0", lw=1.2, label="true posterior")
    left.plot(line, narrow(line), "--", color="C3", lw=1.2, label="predicted, published KL")
    right.plot(line, 0 * line, color="C0", lw=1.2)
    right.plot(line, lost(line, narrow(line)), "--", color="C3", lw=1.2)
    for ax, learned in ((left, stds), (right, gaps)):
        for kind, marker, color in (("true", "o", "C0"), ("published", "s", "C3")):
            ax.plot(a, learned[kind], marker, color=color, label=f"learned, {kind} KL")
        ax.set(xscale="log", xlabel="precision of x about a dimension of z")
        ax.spines[["top", "right"]].set_visible(False)
    left.set(ylabel="standard deviation of q(z|x)", title="The published KL makes q too narrow")
    right.set(ylabel="nats lost by the true bound", title="The cost in each dimension")
    left.legend(frameon=False)
    figure.savefig(picture, metadata={"Software": None})
