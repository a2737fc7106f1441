"""Models as people write them: where the loss is, and what it is when computed by hand.

Each case is the source of a file with `target`, `batch` and `by_hand(target, batch)`, all after
the same head. `found` is the name of the step that must be found.
"""

HEAD = """
import math
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


class Parts(nn.Module):
    def __init__(self, d=12, k=3):
        super().__init__()
        self.enter, self.mu, self.lv = nn.Linear(d, 8), nn.Linear(8, k), nn.Linear(8, k)
        self.leave = nn.Linear(k, d)

    def heads(self, x):
        h = self.enter(x).tanh()
        return self.mu(h), self.lv(h)

    def draw(self, m, s):
        return m + (0.5 * s).exp() * torch.randn_like(m)


def nats(m, s):
    return -0.5 * (1 + s - m**2 - s.exp()).sum(1)


def value(model, x):
    m, s = model.heads(x)
    x_hat = model.leave(model.draw(m, s))
    return ((x_hat - x) ** 2).sum(1).mean() + nats(m, s).mean()


batch = torch.rand(5, 12, generator=torch.Generator().manual_seed(1))


def by_hand(model, batch):
    return value(model, batch)
"""

CASES = {
    # --- functions
    "function of nothing": (
        "step",
        """
        model = Parts()
        batch, x = None, batch
        def step():
            return value(model, x)
        target = step
        def by_hand(target, batch):
            return value(model, x)
        """,
    ),
    "step factory": (
        "make_step.<locals>.step",
        """
        batch, x, seen = None, batch, []
        def make_step():
            model = Parts()
            seen.append(model)
            def step():
                return {"loss": value(model, x)}
            return step
        target = make_step
        def by_hand(target, batch):
            return value(seen[-1], x)
        """,
    ),
    "function that calls backward": (
        "step",
        """
        model = Parts()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        batch, x = None, batch
        def step():
            optimizer.zero_grad()
            loss = value(model, x)
            loss.backward()
            optimizer.step()
            return loss.item()
        target = step
        def by_hand(target, batch):
            return value(model, x)
        """,
    ),
    "function of a batch": (
        "objective",
        """
        model = Parts()
        def objective(images):
            return value(model, images)
        target, batch = objective, (batch, torch.arange(5))
        def by_hand(target, batch):
            return value(model, batch[0])
        """,
    ),
    "function of a model and a batch": (
        "loss_of",
        """
        vae = Parts()
        def loss_of(model, x, epoch):
            return value(model, x) * epoch
        target = loss_of
        def by_hand(target, batch):
            return value(vae, batch)
        """,
    ),
    "a training loop over a loader": (
        "train",
        """
        class Encoder(nn.Linear):
            def __init__(self):
                super().__init__(2, 2)
        class Model(Parts):
            pass
        def train(model, device, train_loader, optimizer, epoch):
            model.train()
            total = 0
            for i, (data, _) in enumerate(train_loader):
                optimizer.zero_grad()
                loss = value(model, data.to(device))
                loss.backward()
                total += loss.item()
                optimizer.step()
            return total / len(train_loader.dataset)
        target = train
        def by_hand(target, batch):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = Model()
            return value(model, batch)
        """,
    ),
    "partial": (
        "partial",
        """
        import functools
        def run(model, scale, x):
            return scale * value(model, x)
        vae = Parts()
        target = functools.partial(run, vae, 2.0)
        def by_hand(target, batch):
            return 2 * value(vae, batch)
        """,
    ),
    # --- methods
    "class with training_step": (
        "VAE.training_step",
        """
        class VAE(Parts):
            def training_step(self, batch, batch_idx):
                x, y = batch
                return value(self, x)
        target, batch = VAE(), (batch, torch.zeros(5))
        def by_hand(model, batch):
            return value(model, batch[0])
        """,
    ),
    "training_step that unpacks a batch of a tensor": (
        "VAE.training_step",
        """
        class VAE(Parts):
            def training_step(self, batch, batch_idx):
                x, _ = batch
                return value(self, x)
        target = VAE()
        """,
    ),
    "training_step of Lightning without Lightning": (
        "VAE.training_step",
        """
        class VAE(Parts):
            def training_step(self, batch, batch_idx):
                loss = value(self, batch.to(self.device))
                self.log("loss", loss, prog_bar=True)
                self.logger.experiment.add_scalar("loss", loss, self.global_step)
                return {"loss": loss * self.current_epoch / self.trainer.max_epochs}
        target = VAE()
        """,
    ),
    "manual optimization of Lightning": (
        "VAE.training_step",
        """
        class VAE(Parts):
            automatic_optimization = False
            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                loss = value(self, batch)
                self.manual_backward(loss)
                optimizer.step()
        target = VAE()
        """,
    ),
    "train_step with an optimizer": (
        "VAE.train_step",
        """
        class VAE(Parts):
            def __init__(self):
                super().__init__()
                self.optimizer = torch.optim.Adam(self.parameters())
                self.steps = 0
            def train_step(self, x):
                self.steps += 1
                self.optimizer.zero_grad()
                loss = value(self, x)
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), 1.0)
                self.optimizer.step()
                return {"loss": loss.item()}
        target = VAE()
        """,
    ),
    "a method of any name that calls backward on several losses": (
        "Agent.update",
        """
        class Buffer:
            def __init__(self, x):
                self.rows = x.numpy()
            def draw(self, size):
                return torch.from_numpy(self.rows[:size])
        class Agent:
            def __init__(self):
                self.vae, self.critic = Parts(), nn.Linear(12, 1)
                self.optimizers = [torch.optim.Adam(m.parameters()) for m in vars(self).values()]
            def losses(self, x):
                return value(self.vae, x), self.critic(x).square().mean()
            def update(self, buffer, iterations, size=100, verbose=True):
                for _ in range(iterations):
                    for loss, optimizer in zip(self.losses(buffer.draw(size)), self.optimizers):
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
        target, batch = Agent(), (Buffer(batch), 1, 4)
        def by_hand(agent, batch):
            return agent.losses(batch[0].draw(batch[2]))[0]
        """,
    ),
    "a step that minimizes with a closure": (
        "VAE.train_step",
        """
        class VAE(Parts):
            def __init__(self):
                super().__init__()
                self.optimizer = torch.optim.LBFGS(self.parameters())
            def train_step(self, x):
                def closure():
                    self.optimizer.zero_grad()
                    loss = value(self, x)
                    loss.backward()
                    return loss
                return self.optimizer.step(closure).item()
        target = VAE()
        """,
    ),
    "trainer that is no module": (
        "Trainer.compute_loss",
        """
        class Trainer:
            def __init__(self):
                self.model, self.seen = Parts(), []
            def compute_loss(self, inputs):
                self.seen.append(1)
                return value(self.model, inputs)
        target = Trainer()
        def by_hand(trainer, batch):
            return value(trainer.model, batch)
        """,
    ),
    "loss of a dict that is filled in place": (
        "VAE.loss",
        """
        class VAE(Parts):
            def forward(self, batch):
                batch["mu"], batch["lv"] = self.heads(batch["pose"])
                batch["out"] = self.leave(self.draw(batch["mu"], batch["lv"]))
                return batch
            def loss(self, batch):
                assert "mu" not in batch
                out = self(batch)
                error = ((out["out"] - out["pose"]) ** 2).sum(1).mean()
                return error + nats(out["mu"], out["lv"]).mean()
        target, batch = VAE(), {"pose": batch, "label": torch.zeros(5)}
        def by_hand(model, batch):
            return value(model, batch["pose"])
        """,
    ),
    "loss(x, edge_index) of a graph": (
        "VGAE.loss",
        """
        class VGAE(Parts):
            def loss(self, x, edge_index):
                source, target = edge_index
                return value(self, x + x[target].mean(0))
        target = VGAE()
        batch = SimpleNamespace(x=batch, edge_index=torch.tensor([[0, 1, 2], [1, 2, 4]]), y=None)
        def by_hand(model, graph):
            return value(model, graph.x + graph.x[graph.edge_index[1]].mean(0))
        """,
    ),
    "loss(data) of a graph": (
        "VGAE.loss",
        """
        class VGAE(Parts):
            def loss(self, data):
                return value(self, data.x + data.x[data.edge_index[1]].mean(0))
        target = VGAE()
        batch = SimpleNamespace(x=batch, edge_index=torch.tensor([[0, 1, 2], [1, 2, 4]]))
        def by_hand(model, graph):
            return value(model, graph.x + graph.x[graph.edge_index[1]].mean(0))
        """,
    ),
    "a dict whose keys are read": (
        "VAE.loss",
        """
        class VAE(Parts):
            def loss(self, inputs):
                assert inputs["label"].dtype == torch.long
                return value(self, inputs["data"])
        target = VAE()
        """,
    ),
    "elbo that is maximized": (
        "VAE.elbo",
        """
        class VAE(Parts):
            def elbo(self, x, n_samples):
                return -value(self, x)
        target = VAE()
        """,
    ),
    "elbo that is minimized": (
        "VAE.elbo",
        """
        class VAE(Parts):
            def elbo(self, x):
                return value(self, x)
        target = VAE()
        """,
    ),
    "losses of each example": (
        "VAE.neg_elbo",
        """
        class VAE(Parts):
            def neg_elbo(self, x):
                m, s = self.heads(x)
                return ((self.leave(self.draw(m, s)) - x) ** 2).sum(1) + nats(m, s)
        target, batch = VAE, batch
        def by_hand(target, batch):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = VAE()
            return value(model, batch)
        """,
    ),
    "a conditional loss": (
        "CVAE.get_loss",
        """
        class CVAE(Parts):
            def get_loss(self, x, y, beta):
                return beta * value(self, x + y[:, None])
        target, batch = CVAE(), (batch, torch.ones(5))
        def by_hand(model, batch):
            return value(model, batch[0] + 1)
        """,
    ),
    "images of bytes": (
        "VAE.loss",
        """
        class VAE(Parts):
            def loss(self, x):
                return value(self, x.flatten(1))
        target = VAE()
        batch = torch.randint(0, 256, (5, 3, 2, 2), dtype=torch.uint8)
        def by_hand(model, batch):
            return value(model, batch.flatten(1) / 255)
        """,
    ),
    # --- forward returns the loss
    "forward returns one number": (
        "VAE.forward",
        """
        class VAE(Parts):
            def forward(self, x):
                return value(self, x)
        target = VAE()
        """,
    ),
    "forward returns a loss among others": (
        "VAE.forward",
        """
        class VAE(Parts):
            def forward(self, x, y=None):
                m, s = self.heads(x)
                x_hat = self.leave(self.draw(m, s))
                error = ((x_hat - x) ** 2).sum(1).mean()
                return x_hat, error + nats(m, s).mean(), m, s
        target = VAE()
        """,
    ),
    "forward of (x, y) returns terms and their sum": (
        "CVAE.forward",
        """
        class CVAE(Parts):
            def forward(self, x, y):
                m, s = self.heads(x + y)
                x_hat = self.leave(self.draw(m, s))
                error = ((x_hat - x - y) ** 2).sum(1).mean()
                return x_hat, error + nats(m, s).mean(), error, nats(m, s).mean()
        target, batch = CVAE(), (batch, torch.ones(5, 1))
        def by_hand(model, batch):
            return value(model, batch[0] + 1)
        """,
    ),
    "forward returns a loss for each example": (
        "VAE.forward",
        """
        class VAE(Parts):
            def forward(self, x):
                m, s = self.heads(x)
                return ((self.leave(self.draw(m, s)) - x) ** 2).sum(1) + nats(m, s)
        target = VAE()
        """,
    ),
    "forward returns a bound for each example": (
        "VAE.forward",
        """
        class VAE(Parts):
            def forward(self, x):
                m, s = self.heads(x)
                return -((self.leave(self.draw(m, s)) - x) ** 2).sum(1) - nats(m, s)
        target = VAE()
        """,
    ),
    "forward returns a dict": (
        "VAE.forward",
        """
        class VAE(Parts):
            def forward(self, x):
                m, s = self.heads(x)
                x_hat = self.leave(self.draw(m, s))
                error = ((x_hat - x) ** 2).sum(1).mean()
                return {"recon": x_hat, "loss": error + nats(m, s).mean(), "mse": error}
        target = VAE()
        """,
    ),
    "forward by keywords returns an output with a loss": (
        "Model.forward",
        """
        @dataclass
        class Output:
            loss: torch.Tensor = None
            logits: torch.Tensor = None
        class Model(Parts):
            def forward(self, pixel_values=None, labels=None, return_dict=None):
                logits = self.leave(self.heads(pixel_values)[0])
                loss = None if labels is None else value(self, pixel_values)
                return Output(loss, logits)
        target, batch = Model(), {"pixel_values": batch, "labels": torch.zeros(5)}
        def by_hand(model, batch):
            return value(model, batch["pixel_values"])
        """,
    ),
    "forward returns a named tuple": (
        "VAE.forward",
        """
        Answer = namedtuple("Answer", "x_hat loss")
        class VAE(Parts):
            def forward(self, x):
                m, s = self.heads(x)
                x_hat = self.leave(self.draw(m, s))
                return Answer(x_hat, ((x_hat - x) ** 2).sum(1).mean() + nats(m, s).mean())
        target = VAE()
        """,
    ),
    # --- forward, and a loss that takes what it returns
    "loss_function beside the class": (
        "VAE.forward and loss_function",
        """
        class VAE(Parts):
            def forward(self, x):
                mu, logvar = self.heads(x.view(-1, 12))
                return self.leave(self.draw(mu, logvar)), mu, logvar
        def loss_function(recon_x, x, mu, logvar):
            return ((recon_x - x.view(-1, 12)) ** 2).sum(1).mean() + nats(mu, logvar).mean()
        target = VAE()
        """,
    ),
    "data that have to be flattened": (
        "VAE.forward and loss_function",
        """
        class VAE(Parts):
            def forward(self, x):
                mu, logvar = self.heads(x.flatten(1))
                return self.leave(self.draw(mu, logvar)), mu, logvar
        def loss_function(recon_x, x, mu, logvar):
            return F.mse_loss(recon_x, x, reduction="sum") / 5 + nats(mu, logvar).mean()
        target, batch = VAE(), batch.reshape(5, 3, 2, 2)
        def by_hand(model, batch):
            return value(model, batch.flatten(1))
        """,
    ),
    "outputs and parameters in different orders": (
        "VAE.forward and elbo_loss",
        """
        class VAE(Parts):
            def forward(self, x):
                mean, log_var = self.heads(x)
                z = self.draw(mean, log_var)
                return z, log_var, mean, self.leave(z)
        def elbo_loss(inputs, mean, log_var, x_hat):
            return ((x_hat - inputs) ** 2).sum(1).mean() + nats(mean, log_var).mean()
        target = VAE()
        """,
    ),
    "loss_function of *args and **kwargs": (
        "VAE.forward and loss_function",
        """
        class VAE(Parts):
            def forward(self, input, **kwargs):
                mu, log_var = self.heads(input)
                return [self.leave(self.draw(mu, log_var)), input, mu, log_var]
            def loss_function(self, *args, **kwargs):
                recons, input, mu, log_var = args
                weight = kwargs["M_N"] * kwargs.get("more", 1)
                error = ((recons - input) ** 2).sum(1).mean()
                return {"loss": error + weight * nats(mu, log_var).mean(), "error": error}
        target = VAE()
        """,
    ),
    "a module of the loss": (
        "VAE.forward and VAELoss",
        """
        class VAE(Parts):
            def forward(self, x):
                mu, logvar = self.heads(x)
                return self.leave(self.draw(mu, logvar)), mu, logvar
        class VAELoss(nn.Module):
            def __init__(self, beta=1.0):
                super().__init__()
                self.beta = beta
            def forward(self, output, target, mu, logvar):
                error = ((output - target) ** 2).sum(1).mean()
                return error + self.beta * nats(mu, logvar).mean()
        target = VAE()
        """,
    ),
    "loss_fn(x, outputs)": (
        "VAE.forward and loss_fn",
        """
        class VAE(Parts):
            def forward(self, x):
                m, s = self.heads(x)
                return {"m": m, "s": s, "x_hat": self.leave(self.draw(m, s))}
            def loss_fn(self, x, outputs):
                error = ((outputs["x_hat"] - x) ** 2).sum(1).mean()
                return error + nats(outputs["m"], outputs["s"]).mean()
        target = VAE()
        """,
    ),
    "a loss of what forward has stored": (
        "VAE.forward and loss",
        """
        class VAE(Parts):
            def forward(self, x):
                self.x, (self.m, self.s) = x, self.heads(x)
                self.answer = self.leave(self.draw(self.m, self.s))
                return self.answer
            def loss(self):
                error = ((self.answer - self.x) ** 2).sum(1).mean()
                return error + nats(self.m, self.s).mean()
        target = VAE()
        """,
    ),
    "loss_function(y, x, ...) with labels in the batch": (
        "VAE.forward and loss_func",
        """
        class VAE(Parts):
            def forward(self, x):
                z_mu, z_logvar = self.heads(x)
                return self.leave(self.draw(z_mu, z_logvar)), z_mu, z_logvar
        def loss_func(y, x, z_mu, z_logvar):
            return ((y - x) ** 2).sum(1).mean() + nats(z_mu, z_logvar).mean()
        target, batch = VAE(), (batch, torch.ones(5, 1))
        def by_hand(model, batch):
            return value(model, batch[0])
        """,
    ),
    "heads that are returned as calls": (
        "VAE.forward and loss_function",
        """
        class VAE(Parts):
            def forward(self, x):
                h = self.enter(x).tanh()
                z = self.draw(self.mu(h), self.lv(h))
                return self.lv(h), self.mu(h), self.leave(z)
        def loss_function(mu, logvar, x, x_hat):
            return ((x_hat - x) ** 2).sum(1).mean() + nats(mu, logvar).mean()
        target = VAE()
        """,
    ),
    "names that say nothing": (
        "VAE.forward and loss_function",
        """
        class VAE(Parts):
            def forward(self, a):
                b, c = self.heads(a)
                return self.leave(self.draw(b, c)), b, c
        def loss_function(p, q, r, t):
            return ((p - q) ** 2).sum(1).mean() + nats(r, t).mean()
        target = VAE()
        """,
    ),
    # --- losses in parts
    "a KL that is left in an attribute": (
        "VAE.forward and VAE.kl_divergence",
        """
        class VAE(Parts):
            def __init__(self):
                super().__init__()
                self.kl_divergence = 0
            def forward(self, x):
                m, s = self.heads(x)
                self.kl_divergence = nats(m, s)
                return self.leave(self.draw(m, s))
        target = VAE()
        """,
    ),
    "KLs that layers are left with": (
        "VAE.forward and one.kl + two.kl",
        """
        class Latent(Parts):
            def forward(self, x):
                m, s = self.heads(x)
                self.kl = nats(m, s).mean()
                return self.leave(self.draw(m, s))
        class VAE(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = Latent(), Latent()
            def forward(self, x):
                return self.two(self.one(x).tanh())
        target = VAE()
        def by_hand(model, x):
            y = model(x)
            return ((y - x) ** 2).sum(1).mean() + model.one.kl + model.two.kl
        """,
    ),
    "forward returns a reconstruction and a KL": (
        "VAE.forward and kl",
        """
        class VAE(Parts):
            def forward(self, x):
                m, s = self.heads(x)
                kl = nats(m, s).mean()
                return self.leave(self.draw(m, s)), kl
        target = VAE()
        """,
    ),
    "forward returns a KL for each example": (
        "VAE.forward and output 2",
        """
        class VAE(Parts):
            def forward(self, x):
                m, s = self.heads(x)
                return self.leave(self.draw(m, s)), nats(m, s) + 0
        target = VAE()
        """,
    ),
    "a KL and an error that are methods": (
        "VAE.forward and kl_divergence",
        """
        class VAE(Parts):
            def forward(self, x):
                mu, logvar = self.heads(x)
                return self.leave(self.draw(mu, logvar)), mu, logvar
            def kl_divergence(self, mu, logvar):
                return nats(mu, logvar)
            def reconstruction_loss(self, x, x_hat):
                return 3 * ((x_hat - x) ** 2).sum(1).mean()
        target = VAE()
        def by_hand(model, x):
            mu, logvar = model.heads(x)
            y = model.leave(model.draw(mu, logvar))
            return 3 * ((y - x) ** 2).sum(1).mean() + nats(mu, logvar).mean()
        """,
    ),
    "encode, recon_loss and kl_loss of a graph in one object": (
        "VGAE.encode and kl_loss",
        """
        class VGAE(Parts):
            def encode(self, *args, **kwargs):
                x, edge_index = args
                self.m, self.s = self.heads(x + x[edge_index[1]].mean(0))
                return self.draw(self.m, self.s)
            def recon_loss(self, z, pos_edge_index):
                a, b = pos_edge_index
                return -F.logsigmoid((z[a] * z[b]).sum(1)).mean()
            def kl_loss(self):
                return nats(self.m, self.s).mean()
        target = VGAE()
        batch = SimpleNamespace(x=batch, edge_index=torch.tensor([[0, 1, 2], [1, 2, 4]]))
        def by_hand(model, graph):
            z = model.encode(graph.x, graph.edge_index)
            return model.recon_loss(z, graph.edge_index) + model.kl_loss()
        """,
    ),
    "encode, recon_loss and kl_loss of graphs": (
        "VGAE.encode and kl_loss",
        """
        class VGAE(Parts):
            def encode(self, *args):
                x, edge_index = args
                self.m, self.s = self.heads(x + x[edge_index[1]].mean(0))
                return self.draw(self.m, self.s)
            def recon_loss(self, z, pos_edge_index):
                a, b = pos_edge_index
                return -F.logsigmoid((z[a] * z[b]).sum(1)).mean()
            def kl_loss(self, m=None, s=None):
                m, s = (self.m, self.s) if m is None else (m, s)
                return nats(m, s).mean()
        target, batch = VGAE(), (batch, torch.tensor([[0, 1, 2], [1, 2, 4]]))
        def by_hand(model, batch):
            z = model.encode(*batch)
            return model.recon_loss(z, batch[1]) + model.kl_loss()
        """,
    ),
    # --- densities and flows
    "log_prob": (
        "Flow.log_prob",
        """
        class Flow(nn.Linear):
            def __init__(self):
                super().__init__(12, 12)
            def log_prob(self, inputs, context=None):
                z = self(inputs)
                return -0.5 * (z**2).sum(1) + self.weight.slogdet()[1]
        target = Flow()
        def by_hand(flow, x):
            return -flow.log_prob(x).mean()
        """,
    ),
    "forward returns a distribution": (
        "Model.forward",
        """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.mean = nn.Parameter(torch.zeros(12))
            def forward(self, context=None):
                normal = torch.distributions.Normal(self.mean, 1.0)
                return torch.distributions.Independent(normal, 1)
        target = Model()
        def by_hand(model, x):
            return -model().log_prob(x).mean()
        """,
    ),
    "a flow that returns (z, log_det)": (
        "Flow.forward",
        """
        class Flow(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.full((12,), 0.1))
            def forward(self, x):
                z = x * self.scale.exp()
                return z, self.scale.sum().expand(len(x))
        target = Flow()
        def by_hand(flow, x):
            z, log_det = flow(x)
            return (0.5 * z**2).sum(1).mean() + 6 * math.log(2 * math.pi) - log_det.mean()
        """,
    ),
    "a flow that returns (z, log_det), and its log-density": (
        "Flow.log_probs",
        """
        class Flow(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.full((12,), 0.1))
            def forward(self, inputs, mode="direct", logdets=None):
                sign = 1 if mode == "direct" else -1
                log_det = self.scale.sum() * torch.ones(len(inputs), 1)
                return inputs * (sign * self.scale).exp(), sign * log_det
            def log_probs(self, inputs):
                z, log_det = self(inputs)
                return (-0.5 * (z**2 + math.log(2 * math.pi))).sum(1, keepdim=True) + log_det
        target = Flow()
        def by_hand(flow, x):
            return -flow.log_probs(x).mean()
        """,
    ),
    "a flow that returns log p(z) and log_det": (
        "Flow.forward",
        """
        class Flow(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.full((12,), 0.1))
            def forward(self, x):
                zs = [x, x * self.scale.exp()]
                log_det = self.scale.sum().expand(len(x))
                prior_logprob = -0.5 * (zs[-1] ** 2).sum(1)
                return zs, prior_logprob, log_det
        target = Flow()
        def by_hand(flow, x):
            zs, log_p, log_det = flow(x)
            return -(log_p + log_det).mean()
        """,
    ),
    "a flow and its loss beside it": (
        "Flow.forward and FlowLoss",
        """
        class Flow(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.full((12,), 0.1))
            def forward(self, x, reverse=False):
                return x * self.scale.exp(), self.scale.sum().expand(len(x))
        class FlowLoss(nn.Module):
            def forward(self, z, sldj):
                return -(-0.5 * (z**2).sum(1) + sldj).mean()
        target = Flow()
        def by_hand(flow, x):
            return FlowLoss()(*flow(x))
        """,
    ),
}
