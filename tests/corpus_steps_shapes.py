"""Shapes of interface, each once right and once with a mistake.

A builder takes the KL of each latent from the two heads, and is registered twice: with the right
one under its own name, and with a wrong one under that name and ``_wrong``.
"""

from __future__ import annotations

import os
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from corpus_steps_base import B, Built, D, Encoder, H, L, data, decoder, entry

MISTAKES = {
    "log_std": lambda mu, b: 0.5 * (mu**2 + (2 * b).exp() - 1) - b,
    "no_square": lambda mu, b: -0.5 * (1 + b - mu - b.exp()),
    "no_mean": lambda mu, b: -0.5 * (1 + b - b.exp()),
    "sign": lambda mu, b: 0.5 * (1 + b - mu**2 - b.exp()),
    "nonsense": lambda mu, b: b**2 + mu,
    "no_log": lambda mu, b: 0.5 * (mu**2 + b.exp() - 1),
    "detached": lambda mu, b: right(mu, b).detach(),
}


SHAPES: list[str] = []  # the names of the right ones


def right(mu, b):
    return -0.5 * (1 + b - mu**2 - b.exp())


def shape(mistake, *, verdict="correct", convention="log_var", needs=None, lenient=False):
    """Register the builder with the right KL and with a mistake."""
    code = "no_gradient" if mistake == "detached" else "kl_mismatch|kl_negative"

    def register(build):
        def good():
            return build(right)

        def bad():
            return build(MISTAKES[mistake])

        good.__name__, bad.__name__ = build.__name__, f"{build.__name__}_wrong"
        also = "|incomplete" if lenient else ""
        SHAPES.append(build.__name__)
        entry(verdict + also, convention=convention, needs=needs)(good)
        entry("bug" + also, code, needs=needs)(bad)
        return build

    return register


class Net(nn.Module):
    """A VAE whose loss is elsewhere."""

    def __init__(self, kl, d=D):
        super().__init__()
        self.encoder, self.decoder, self.kl_of = Encoder(d), decoder(d), kl

    def reparameterize(self, mu, log_var):
        std = torch.exp(0.5 * log_var)
        return mu + std * torch.randn_like(std)

    def run(self, x):
        mu, log_var = self.encoder(x)
        return self.decoder(self.reparameterize(mu, log_var)), mu, log_var

    def terms(self, x):
        y, mu, log_var = self.run(x)
        recon = F.binary_cross_entropy_with_logits(y, x, reduction="none").sum(1)
        return recon.mean(), self.kl_of(mu, log_var).sum(1).mean()


# --- methods of a module -------------------------------------------------------------------------


@shape("log_std")
def training_step_of_a_batch_with_labels(kl):
    class Model(Net):
        def training_step(self, batch, batch_idx):
            x, _ = batch
            recon, kl = self.terms(x)
            self.log("recon", recon.item())
            return recon + kl

        def log(self, name, value):
            self.logged = {name: value}

    model, batch = Model(kl), (data(), torch.zeros(B, dtype=torch.long))
    return Built(lambda: model.training_step(batch, 0), (model, batch), model, batch)


@shape("sign")
def training_step_that_returns_a_dict(kl):
    class Model(Net):
        def training_step(self, batch, batch_idx):
            recon, kl = self.terms(batch["image"])
            return {"loss": recon + kl, "log": {"recon": recon.detach(), "kl": kl.detach()}}

    model, batch = Model(kl), {"image": data(), "label": torch.arange(B)}
    return Built(lambda: model.training_step(batch, 0), (model, batch), model, batch)


@shape("no_mean")
def loss_of_a_batch(kl):
    class Model(Net):
        def forward(self, x):
            return self.run(x)[0]

        def loss(self, x):
            return sum(self.terms(x))

    model, x = Model(kl), data()
    return Built(lambda: model.loss(x), (model, x), model, x)


@shape("no_square")
def forward_returns_the_loss(kl):
    class Model(Net):
        def forward(self, x):
            recon, kl = self.terms(x)
            return recon + kl

    model, x = Model(kl), data()
    return Built(lambda: model(x), (model, x), model, x)


@shape("detached")
def forward_returns_a_tuple(kl):
    class Model(Net):
        def forward(self, x):
            recon, kl = self.terms(x)
            elbo = -recon - kl
            return -elbo, recon, kl

    model, x = Model(kl), data()
    return Built(lambda: model(x), (model, x), model, x)


@shape("nonsense")
def forward_returns_a_dict(kl):
    class Model(Net):
        def forward(self, pixel_values, return_dict=True):
            y, mu, log_var = self.run(pixel_values)
            nll = F.binary_cross_entropy_with_logits(y, pixel_values, reduction="sum")
            return {"loss": nll + self.kl_of(mu, log_var).sum(), "logits": y, "mu": mu}

    model, batch = Model(kl), {"pixel_values": data()}
    return Built(lambda: model(**batch), (model, batch), model, batch)


@dataclass
class Output:
    loss: torch.Tensor
    recon: torch.Tensor
    kl: torch.Tensor
    z: torch.Tensor | None = None


@shape("log_std")
def forward_returns_a_dataclass(kl):
    class Model(Net):
        def forward(self, x):
            recon, kl = self.terms(x)
            return Output(recon + kl, recon, kl)

    model, x = Model(kl), data()
    return Built(lambda: model(x), (model, x), model, x)


Losses = namedtuple("Losses", "total reconstruction divergence")


@shape("no_log")
def forward_returns_a_named_tuple(kl):
    class Model(Net):
        def forward(self, x):
            recon, kl = self.terms(x)
            return Losses(recon + kl, recon, kl)

    model, x = Model(kl), data()
    return Built(lambda: model(x), (model, x), model, x)


@shape("sign")
def forward_returns_terms_without_their_sum(kl):
    class Model(Net):
        def forward(self, x):
            return self.terms(x)

    model, x = Model(kl), data()
    return Built(lambda: model(x), (model, x), model, x)


@shape("no_square")
def forward_and_loss_function(kl):
    class Model(Net):
        def forward(self, x, **kwargs):
            y, mu, log_var = self.run(x)
            return [y, x, mu, log_var]

        def loss_function(self, *args, **kwargs):
            y, x, mu, log_var = args
            recon = F.mse_loss(y, x, reduction="sum") / len(x)
            kld = self.kl_of(mu, log_var).sum(dim=1).mean()
            return {"loss": recon + kwargs["M_N"] * kld, "Reconstruction_Loss": recon.detach()}

    model, x = Model(kl), data()

    def step():
        return model.loss_function(*model(x), M_N=1.0)

    return Built(step, (model, x), model, x)


@shape("log_std")
def forward_and_a_function_beside_it(kl):
    class Model(Net):
        def forward(self, x):
            return self.run(x)

    def criterion(y, x, mu, log_var):
        return F.binary_cross_entropy(y.sigmoid(), x, reduction="sum") + kl(mu, log_var).sum()

    model, x = Model(kl), data()

    def step():
        y, mu, log_var = model(x)
        return criterion(y, x, mu, log_var)

    return Built(step, (model, x))


@shape("no_mean")
def kl_left_in_an_attribute(kl):
    class Sampler(nn.Module):
        def forward(self, mu, log_var):
            self.kl = kl(mu, log_var).sum(-1)
            return mu + (0.5 * log_var).exp() * torch.randn_like(mu)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.sampler, self.decoder = Encoder(), Sampler(), decoder()

        def forward(self, x):
            return self.decoder(self.sampler(*self.encoder(x)))

    model, x = Model(), data()

    def step():
        recon = ((model(x) - x) ** 2).sum(-1)
        return (recon + model.sampler.kl).mean()

    return Built(step, (model, x))


@shape("log_std")
def one_loss_for_each_example(kl):
    class Model(Net):
        def loss(self, x):
            y, mu, log_var = self.run(x)
            nll = F.binary_cross_entropy_with_logits(y, x, reduction="none").sum(-1)
            return nll + self.kl_of(mu, log_var).sum(-1)

    model, x = Model(kl), data()
    return Built(lambda: model.loss(x), (model, x), model, x)


@shape("no_log")
def conditional_on_a_label(kl):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = Encoder(D + 3), decoder(latents=L + 3)

        def forward(self, x, y):
            mu, log_var = self.encoder(torch.cat([x, y], 1))
            z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)
            return self.decoder(torch.cat([z, y], 1)), mu, log_var

        def loss(self, x, y):
            out, mu, log_var = self(x, y)
            return F.mse_loss(out, x, reduction="sum") + kl(mu, log_var).sum()

    model, batch = Model(), (data(), F.one_hot(torch.arange(B) % 3, 3).float())
    return Built(lambda: model.loss(*batch), (model, batch), model, batch)


# --- steps that train ----------------------------------------------------------------------------


@shape("sign", lenient=True)
def step_of_an_optimizer(kl):
    model, x = Net(kl), data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def train():
        optimizer.zero_grad()
        recon, kl = model.terms(x)
        loss = recon + kl
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return Built(train, (model, optimizer, x))


@shape("no_mean", lenient=True)
def backward_inside_and_a_number_out(kl):
    model, x = Net(kl), data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def train():
        recon, kl = model.terms(x)
        loss = recon + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Built(train, (model, optimizer, x))


@shape("detached", lenient=True)
def gradients_accumulated(kl):
    model, x = Net(kl), data(2 * B)

    def train():
        total = 0.0
        for part in x.split(B):
            loss = sum(model.terms(part)) / 2
            loss.backward()
            total = total + loss.detach()
        return total

    return Built(train, (model, x))


@shape("no_square")
def adversary_beside(kl):
    model, x = Net(kl), data()
    judge = nn.Sequential(nn.Linear(D, H), nn.LeakyReLU(0.2), nn.Linear(H, 1))

    def step():
        y, mu, log_var = model.run(x)
        recon = F.mse_loss(y, x, reduction="sum")
        fool = F.softplus(-judge(y)).sum()
        return (recon + fool + kl(mu, log_var).sum()) / B

    return Built(step, (model, judge, x))


@shape("log_std", lenient=True)
def functional_call(kl):
    model, x = Net(kl), data()
    model.forward = model.terms
    parameters = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}

    def step():
        return sum(torch.func.functional_call(model, parameters, (x,)))

    return Built(step, (model, parameters, x))


@shape("sign", lenient=True)
def vmapped(kl):
    model, x = Net(kl), data()

    def of_one(x):
        y, mu, log_var = model.run(x)
        nll = F.binary_cross_entropy_with_logits(y, x, reduction="sum")
        return nll + model.kl_of(mu, log_var).sum()

    def step():
        return torch.vmap(of_one, randomness="different")(x).mean()

    return Built(step, (model, x))


@shape("no_mean")
def one_example_at_a_time(kl):
    model, x = Net(kl), data(4)

    def step():
        losses = [sum(model.terms(row[None])) for row in x]
        return torch.stack(losses).mean()

    return Built(step, (model, x))


@shape("log_std")
def trainer_around_a_model(kl):
    class Trainer:
        def __init__(self, model):
            self.model, self.history, self.calls = model, [], 0

        def training_step(self, batch):
            self.calls += 1
            recon, kl = self.model.terms(batch)
            self.history.append(recon.item())
            return {"loss": recon + kl, "recon": recon, "kl": kl}

    trainer, x = Trainer(Net(kl)), data()
    return Built(lambda: trainer.training_step(x), (trainer, trainer.model, x), trainer, x)


# --- graphs --------------------------------------------------------------------------------------


@shape("no_log")
def graph(kl):
    nodes = 9

    class Encode(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.mu, self.log_var = nn.Linear(D, H), nn.Linear(H, L), nn.Linear(H, L)

        def forward(self, x, adjacency):
            h = torch.relu(adjacency @ self.first(x))
            return adjacency @ self.mu(h), adjacency @ self.log_var(h)

    class VGAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = Encode()

        def loss(self, g):
            mu, log_var = self.encode(g.x, g.adjacency)
            z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)
            nll = F.binary_cross_entropy_with_logits(z @ z.T, g.edges, reduction="sum")
            return nll + kl(mu, log_var).sum()

    edges = torch.rand(nodes, nodes) < 0.3
    edges = (edges | edges.T).float().fill_diagonal_(1.0)
    g = SimpleNamespace(
        x=torch.randn(nodes, D), edges=edges, adjacency=edges / edges.sum(1)[:, None]
    )
    model = VGAE()
    return Built(lambda: model.loss(g), (model, g.x, g.edges, g.adjacency), model, g)


# --- Keras ---------------------------------------------------------------------------------------


@shape("log_std", needs="keras")
def keras_model(kl):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras
    from keras import layers, ops

    class Sampling(layers.Layer):
        def __init__(self):
            super().__init__()
            self.seeds = keras.random.SeedGenerator(int(torch.randint(0, 1000, ())))

        def call(self, mu, log_var):
            return mu + ops.exp(0.5 * log_var) * keras.random.normal(
                ops.shape(mu), seed=self.seeds
            )

    class VAE(keras.Model):
        def __init__(self):
            super().__init__()
            self.body = layers.Dense(H, activation="tanh")
            self.mu, self.log_var, self.sampling = layers.Dense(L), layers.Dense(L), Sampling()
            self.out = keras.Sequential([layers.Dense(H, activation="relu"), layers.Dense(D)])

        def call(self, x):
            h = self.body(x)
            mu, log_var = self.mu(h), self.log_var(h)
            self.add_loss(ops.mean(ops.sum(kl(mu, log_var), axis=1)))
            return self.out(self.sampling(mu, log_var))

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            recon = ops.mean(ops.sum(ops.square(y - y_pred), axis=1))
            return recon + ops.sum(ops.stack(self.losses))

    model, x = VAE(), data()
    model.compile("adam")
    model(x)
    for layer in model.modules():  # Keras makes them on the first call
        list(layer.parameters())

    def step():
        return model.compute_loss(x, x, model(x, training=True))

    return Built(step, (model, x), model, x)
