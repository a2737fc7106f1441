"""Models and batches as their owners have them, without a wrapper, and the verdicts on them."""

import sys
import textwrap

import pytest
import torch

from interfaces_of_steps import HEAD
from musigma.audit import audit
from musigma.plugins import load

MODELS = {
    "dict_with_one_head": (
        "bug",
        ("heads_tied",),
        """
        class CVAE(Parts):
            def forward(self, batch):
                h = self.enter(batch["motion"] + batch["label"][:, None]).tanh()
                batch.update(mu=self.mu(h), logvar=self.mu(h))
                batch["out"] = self.leave(self.draw(batch["mu"], batch["logvar"]))
                return batch
            def loss(self, batch):
                out = self(batch)
                error = ((out["out"] - out["motion"]) ** 2).sum(1).mean() / 2
                return error + nats(out["mu"], out["logvar"]).mean()
        target, batch = CVAE(), {"motion": batch, "label": torch.arange(5)}
        """,
    ),
    "graph_divided_once_more": (
        "warning",
        ("reduction_imbalance",),
        """
        class VGAE(Parts):
            def encode(self, x, edge_index):
                self.m, self.s = self.heads(x + x[edge_index[1]].mean(0))
                return self.m + self.s.exp() * torch.randn_like(self.m)
            def kl_loss(self):
                return -0.5 * (1 + 2 * self.s - self.m**2 - (2 * self.s).exp()).sum(1).mean()
            def loss(self, x, edge_index):
                z = self.encode(x, edge_index)
                return ((self.leave(z) - x) ** 2).sum(1).mean() / 2 + self.kl_loss() / len(x)
        target = VGAE()
        batch = SimpleNamespace(x=batch, edge_index=torch.tensor([[0, 1, 2], [1, 2, 4]]))
        """,
    ),
    "lightning_with_two_means": (
        "warning",
        ("reduction_imbalance",),
        """
        class VAE(Parts):
            def step(self, batch, batch_idx):
                x, y = batch
                m, s = self.heads(x)
                p = torch.distributions.Normal(torch.zeros_like(m), torch.ones_like(m))
                q = torch.distributions.Normal(m, (s / 2).exp())
                z = q.rsample()
                kl = 0.1 * (q.log_prob(z) - p.log_prob(z)).mean()
                error = F.mse_loss(self.leave(z), x)
                return kl + error, {"kl": kl, "loss": kl + error}
            def training_step(self, batch, batch_idx):
                loss, logs = self.step(batch, batch_idx)
                self.log_dict(logs)
                return loss
        target, batch = VAE(), (batch, torch.zeros(5))
        """,
    ),
    "conditional_with_softplus": (
        "correct",
        (),
        """
        class CVAE(Parts):
            def forward(self, x, y):
                m, b = self.heads(x + y)
                s = 1e-6 + F.softplus(b)
                p = self.leave(m + s * torch.randn_like(m)).sigmoid().clamp(1e-8, 1 - 1e-8)
                ll = (x * p.log() + (1 - x) * (1 - p).log()).sum(1).mean()
                kl = 0.5 * (m**2 + s**2 - (1e-8 + s**2).log() - 1).sum(1).mean()
                elbo = ll - kl
                return p, -elbo, -ll, kl
        target, batch = CVAE(), (batch, torch.ones(5, 1))
        """,
    ),
    "capacity_in_kwargs": (
        "warning",
        ("kl_capacity",),
        """
        class BetaVAE(Parts):
            calls = 0
            def forward(self, input, **kwargs):
                mu, log_var = self.heads(input)
                return [self.leave(self.draw(mu, log_var)), input, mu, log_var]
            def loss_function(self, *args, **kwargs):
                self.calls += 1
                recons, input, mu, log_var = args
                error = F.mse_loss(recons, input)
                kl = nats(mu, log_var).mean()
                loss = error + 4 * kwargs["M_N"] * (kl - 5.0).abs()
                return {"loss": loss, "error": error, "KLD": kl}
        target = BetaVAE()
        """,
    ),
    "most_copied": (
        "correct",
        (),
        """
        class VAE(Parts):
            def reparameterize(self, mu, logvar):
                return self.draw(mu, logvar)
            def forward(self, x):
                mu, logvar = self.heads(x.view(-1, 12))
                return self.leave(self.reparameterize(mu, logvar)).sigmoid(), mu, logvar
        def loss_function(recon_x, x, mu, logvar):
            bce = F.binary_cross_entropy(recon_x, x.view(-1, 12), reduction="sum")
            return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        target, batch = VAE(), batch.reshape(5, 3, 2, 2)
        """,
    ),
    "nonsense_inside": (
        "bug",
        ("kl_mismatch",),
        """
        class VAE(Parts):
            def reparameterize(self, mu, logvar):
                return self.draw(mu, logvar)
            def kl(self, mu, logvar):
                return nats(mu, logvar).sum()
            def training_step(self, batch, batch_idx):
                mu, logvar = self.heads(batch)
                error = F.mse_loss(self.leave(self.reparameterize(mu, logvar)), batch)
                return error + (logvar**2 + mu).sum()
        target = VAE()
        """,
    ),
    "planar_flow_of_short_w": (
        "bug",
        ("not_injective",),
        """
        class Planar(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.tensor([0.3, 0.2]))
                self.u = nn.Parameter(torch.tensor([-14.0, -12.0]))
                self.b = nn.Parameter(torch.tensor(0.1))
            def forward(self, z):
                wu = self.w @ self.u
                u = self.u + (-1 + F.softplus(wu) - wu) * self.w / self.w.norm()
                a = z @ self.w + self.b
                psi = (1 - a.tanh() ** 2)[:, None] * self.w
                return z + u * a.tanh()[:, None], (1 + psi @ u).abs().log()
        target, batch = Planar, torch.randn(8, 2)
        """,
    ),
    "transform_that_sums_over_the_batch": (
        "bug",
        ("cross_sample",),
        """
        class Scale(nn.Module, torch.distributions.Transform):
            domain = codomain = torch.distributions.constraints.real
            bijective = True
            def __init__(self):
                nn.Module.__init__(self)
                torch.distributions.Transform.__init__(self)
                self.s = nn.Parameter(torch.tensor([0.3, -0.5]))
            __hash__ = nn.Module.__hash__
            def __eq__(self, other):
                return self is other
            def __call__(self, x):
                return x * (self.s * x.tanh().detach().sum(1, keepdim=True) * 0 + self.s).exp()
            def _inverse(self, y):
                return y * (-self.s).exp()
            def log_abs_det_jacobian(self, x, y):
                return self.s.sum() * torch.ones(len(x))
        def target():
            base = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
            return torch.distributions.TransformedDistribution(base, [Scale()])
        batch = torch.randn(6, 2)
        """,
    ),
    "layer_that_forgets_alpha": (
        "bug",
        ("inverse_mismatch",),
        """
        class Logit(nn.Module):
            alpha = 0.05
            def forward(self, z, ldj, reverse=False):
                if not reverse:
                    z = z * (1 - self.alpha) + 0.5 * self.alpha
                    ldj = ldj + math.log(1 - self.alpha) * z[0].numel()
                    ldj = ldj - (z.log() + (1 - z).log()).sum(1)
                    return z.log() - (1 - z).log(), ldj
                ldj = ldj - (F.softplus(z) + F.softplus(-z)).sum(1)
                return z.sigmoid(), ldj
        target = Logit
        """,
    ),
    "posterior_flow_of_the_whole_batch": (
        "bug",
        ("logdet_mismatch",),
        """
        class VAE(Parts):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.tensor([0.5, -0.2, 0.3]))
                self.kl_divergence = 0
            def forward(self, x):
                m, s = self.heads(x)
                z = self.draw(m, s)
                a = z * self.scale
                f, log_det = z + a.tanh(), (1 + self.scale * (1 - a.tanh() ** 2)).log().sum(1)
                log_q = (-0.5 * (s + (z - m) ** 2 / s.exp() + math.log(2 * math.pi))).sum(1)
                log_p = (-0.5 * (f**2 + math.log(2 * math.pi))).sum(1)
                self.kl_divergence = log_q - log_det.sum() - log_p
                return self.leave(f)
        target = VAE()
        """,
    ),
    "posterior_flow_of_each_example": (
        "correct",
        (),
        """
        class VAE(Parts):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.tensor([0.5, -0.2, 0.3]))
                self.kl_divergence = 0
            def forward(self, x):
                m, s = self.heads(x)
                z = self.draw(m, s)
                a = z * self.scale
                f, log_det = z + a.tanh(), (1 + self.scale * (1 - a.tanh() ** 2)).log().sum(1)
                log_q = (-0.5 * (s + (z - m) ** 2 / s.exp() + math.log(2 * math.pi))).sum(1)
                log_p = (-0.5 * (f**2 + math.log(2 * math.pi))).sum(1)
                self.kl_divergence = log_q - log_det - log_p
                return self.leave(f)
        target = VAE()
        """,
    ),
    "decoder_with_a_learned_scale": (
        "correct",
        (),
        """
        class VAE(Parts):
            def __init__(self):
                super().__init__()
                self.log_sigma = nn.Parameter(torch.zeros(1))
            def forward(self, x):
                mu, logvar = self.heads(x)
                return self.leave(self.draw(mu, logvar)), mu, logvar
            def loss_function(self, recon_x, x, mu, logvar):
                s = -6 + F.softplus(self.log_sigma + 6)
                rec = (((x - recon_x) / s.exp()) ** 2 / 2 + s + 0.5 * math.log(2 * math.pi)).sum()
                return rec, nats(mu, logvar).sum()
        target = VAE()
        """,
    ),
    "term_of_a_bayesian_layer": (
        "bug",
        ("prior_term_mismatch",),
        """
        def log_posterior(w, mu, rho):
            s = F.softplus(rho)
            return (-0.5 * math.log(2 * math.pi) - s - (w - mu) ** 2 / (2 * s**2)).sum()
        target, batch = log_posterior, None
        """,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_and_batches_as_their_owners_have_them(name, tmp_path):
    verdict, codes, source = MODELS[name]
    (tmp_path / f"{name}.py").write_text(HEAD + textwrap.dedent(source))
    torch.manual_seed(5)
    target = load(f"{tmp_path}/{name}.py:target")
    report = audit(target, sys.modules[f"musigma_plugin_{name}"].batch)
    assert report.verdict == verdict, report
    assert set(codes) <= set(report.codes), report
    if verdict == "correct":
        assert not report.missing
