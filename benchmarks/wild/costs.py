"""What the faults that docs/wild.md lists cost, in numbers.

python -m benchmarks.wild.costs [NAME ...]
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import sys
import warnings

import torch
from torch import nn
from torch.nn import functional as F


def load(name: str):
    """A module of a library; not one of this folder."""
    return importlib.import_module(name)


def kl(mean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)), for each latent."""
    return 0.5 * (mean**2 + sigma**2 - 1) - sigma.log()


def pythae_hvae() -> None:
    """A linear decoder, whose best Gaussian posteriors are known; one free posterior a row."""
    models, base = load("pythae.models"), load("pythae.models.nn")
    output = load("pythae.models.base.base_utils").ModelOutput
    width, latents, rows = 16, 2, 64
    weight = torch.randn(width, latents)

    class Encoder(base.BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(rows, latents))
            self.log_var = nn.Parameter(torch.zeros(rows, latents))

        def forward(self, x):
            return output(embedding=self.mean, log_covariance=self.log_var)

    class Decoder(base.BaseDecoder):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.register_buffer("weight", scale * weight)

        def forward(self, z):
            return output(reconstruction=z @ self.weight.T)

    for scale in (0.0, 1.0):
        loading = scale * weight
        precision = loading.T @ loading + torch.eye(latents)
        covariance = loading @ loading.T + torch.eye(width)
        x = torch.randn(rows, width) @ torch.linalg.cholesky(covariance).T
        config = models.HVAEConfig(input_dim=(width,), latent_dim=latents)
        model = models.HVAE(config, encoder=Encoder(), decoder=Decoder(scale)).train()
        optimizer = torch.optim.Adam(model.encoder.parameters(), lr=0.02)
        for step in range(3000):
            optimizer.param_groups[0]["lr"] = 0.02 if step < 2000 else 0.002
            optimizer.zero_grad()
            model({"data": x}).loss.backward()
            optimizer.step()
        sigma = F.softplus(model.encoder.log_var.detach())
        excess = (0.5 * model.encoder.log_var.detach() - sigma.log()).sum(1).mean()
        out = model({"data": x})
        print(
            f"  weights x {scale:g}: sigma learned {sigma.mean():.3f}, best "
            f"{precision.diag().rsqrt().mean():.3f}; log q(z) of the loss too small by "
            f"{excess:.2f} nats; variance of the last momentum {out.rho.var():.2f} (tempered: 1)"
        )


def pythae_miwae() -> None:
    """With one outer estimate, MIWAE is the IWAE of all draws; here it is the ELBO."""
    models = load("pythae.models")
    x = torch.rand(256, 1, 4, 4)
    values = {}
    for options in (
        {"number_gradient_estimates": 1, "number_samples": 50},
        {"number_gradient_estimates": 50, "number_samples": 1},
    ):
        torch.manual_seed(0)
        model = models.MIWAE(models.MIWAEConfig(input_dim=(1, 4, 4), latent_dim=4, **options))
        with torch.no_grad():
            model.encoder.log_var.bias.fill_(-2.0)
        names = [n for n, _ in model.named_parameters()]
        total = dict.fromkeys(names, 0.0)
        for seed in range(30):
            torch.manual_seed(seed)
            model.zero_grad()
            model({"data": x}).loss.backward()
            for name, p in model.named_parameters():
                total[name] = total[name] + p.grad / 30
        values[options["number_samples"]] = total["encoder.log_var.bias"]
    many, one = values[50], values[1]
    print(f"  gradient by the log variance: number_samples 50, 1 estimate: {many.tolist()}")
    print(f"  number_samples 1, 50 estimates (should be the ELBO's): {one.tolist()}")
    print(f"  the ELBO's: {[round(0.5 * (math.exp(-2.0) - 1), 3)] * 4} + the reconstruction's")


def pythae_iwae_value() -> None:
    """The number that is reported as the loss of IWAE, beside the bound."""
    models = load("pythae.models")
    torch.manual_seed(0)
    x = torch.rand(256, 1, 4, 4)
    for draws in (10, 100):
        config = models.IWAEConfig(input_dim=(1, 4, 4), latent_dim=4, number_samples=draws)
        model = models.IWAE(config)
        with torch.no_grad():
            model.encoder.log_var.bias.fill_(-3.0)
            torch.manual_seed(1)
            loss = model({"data": x}).loss.item()
            torch.manual_seed(1)
            out = model.encoder(x)
            mean, log_var = out.embedding, out.log_covariance
            mean, log_var = (t.unsqueeze(1).repeat(1, draws, 1) for t in (mean, log_var))
            z, _ = model._sample_gauss(mean, (0.5 * log_var).exp())
            recon = model.decoder(z.reshape(-1, 4))["reconstruction"].reshape(256, draws, 16)
            log_w = -0.5 * (recon - x.reshape(256, 1, 16)).square().sum(-1)
            log_w = log_w - 0.5 * z.square().sum(-1)
            log_w = log_w + 0.5 * (log_var + (z - mean) ** 2 / log_var.exp()).sum(-1)
            bound = (log_w.logsumexp(1) - math.log(draws)).mean().item()
        print(f"  {draws} draws: reported {-loss:.3f}, the bound {bound:.3f}, of the same draws")


def pythae_planar() -> None:
    """How often the planar layers fold at initialization, and while they train."""
    models = load("pythae.models")
    for latents in (2, 10):
        folds = []
        for seed in range(200):
            torch.manual_seed(seed)
            config = models.VAE_LinNF_Config(input_dim=(1, 4, 4), latent_dim=latents)
            layers = models.VAE_LinNF(config).net
            folds.append(any((layer.w @ layer.u.T).item() < -1 for layer in layers))
        print(f"  {latents} latents: {sum(folds) / 200:.0%} of 200 new models fold (w.u < -1)")
    w, u = torch.tensor([1.5, 0.0]), torch.tensor([-2.0, 0.0])  # log q of the folded posterior
    z = torch.randn(200000, 2)
    a = z @ w
    out = z[:, 0] + u[0] * torch.tanh(a)
    log_det = (1 + (1 - torch.tanh(a) ** 2) * (w @ u)).abs().log()
    claimed = (-0.5 * z[:, 0] ** 2 - 0.5 * math.log(2 * math.pi) - log_det).mean()
    hist = torch.histc(out, 400, -6, 6) / len(z)
    p = hist[hist > 0]
    entropy = -(p * (p / 0.03).log()).sum()
    print(
        f"  w.u = -3: E[log q] that the loss counts {claimed:.3f}, true {-entropy:.3f}: "
        f"the KL is {-claimed - entropy:.2f} nats too small"
    )


def pythae_rhvae() -> None:
    """The momentum that is drawn, beside the metric whose determinant is in the loss."""
    models = load("pythae.models")
    model = models.RHVAE(models.RHVAEConfig(input_dim=(1, 4, 4), latent_dim=3)).train()
    x = torch.rand(64, 1, 4, 4)
    factor = model.metric(x)["L"]
    drawn = (factor @ factor.mT).diagonal(dim1=-2, dim2=-1).mean().item()
    metric = torch.linalg.inv(model({"data": x}).G_inv).diagonal(dim1=-2, dim2=-1).mean().item()
    print(
        f"  mean variance of the momentum before tempering: drawn {drawn:.3f}, by G {metric:.3f}"
    )
    entropy = 0.5 * torch.logdet(factor @ factor.mT).mean()
    grad = torch.autograd.grad(entropy, list(model.metric.parameters()), allow_unused=True)
    norm = sum(g.square().sum() for g in grad if g is not None) ** 0.5
    print(
        f"  its entropy is not in the loss; norm of its gradient by the metric network {norm:.2f}"
    )


def scvi_peakvi() -> None:
    """The weight of the KL against the size of the batch, and what training makes of it."""
    import anndata
    import numpy as np

    scvi = load("scvi")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rng = np.random.default_rng(0)
    cells, regions = 2000, 300
    logits = rng.normal(size=(cells, 4)) @ rng.normal(size=(4, regions)) - 2
    peaks = (rng.random((cells, regions)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    for fixed in (False, True):
        scvi.settings.seed = 0
        data = anndata.AnnData(peaks)
        scvi.model.PEAKVI.setup_anndata(data)
        model = scvi.model.PEAKVI(data, n_latent=10, n_hidden=64)
        if fixed:
            plain = model.module.loss

            def loss(*args, kl_weight=1.0, plain=plain, **kwargs):
                out = plain(*args, kl_weight=kl_weight, **kwargs)
                each = out.dict_sum(out.reconstruction_loss) + kl_weight * out.dict_sum(
                    out.kl_local
                )
                out.loss = each.mean()
                return out

            model.module.loss = loss
        model.train(
            max_epochs=150,
            early_stopping=False,
            batch_size=128,
            enable_progress_bar=False,
            accelerator="cpu",
            logger=False,
            plan_kwargs={"n_epochs_kl_warmup": 20},
        )
        model.module.eval()
        with torch.no_grad():
            rec, div = [], []
            for batch in model._make_data_loader(data, batch_size=128):
                _, _, out = model.module(batch, loss_kwargs={"kl_weight": 1.0})
                rec.append(out.dict_sum(out.reconstruction_loss).reshape(-1))
                div.append(out.dict_sum(out.kl_local).reshape(-1))
            rec, div = torch.cat(rec).mean(), torch.cat(div).mean()
        name = "mean over cells" if fixed else "as released"
        print(f"  {name}: KL {div:.1f}, -log p(x|z) {rec:.1f}, -ELBO {rec + div:.1f} nats a cell")


def scvi_sysvi() -> None:
    """The scale of a fitted Gaussian, and of the components of the mixture that is the prior."""
    rng_scale = 0.5
    x = rng_scale * torch.randn(4096, 1)
    v = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([v], lr=0.05)
    for _ in range(
        800
    ):  # SysVAE.loss: GaussianNLLLoss(loc, x, px.scale), px.scale = sqrt(softplus)
        scale = F.softplus(v).sqrt()
        loss = nn.GaussianNLLLoss()(torch.zeros_like(x), x, scale.expand_as(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"  residuals of standard deviation {rng_scale}: px.scale is {scale.item():.3f}")
    priors = load("scvi.external.sysvi._priors")
    distribution = torch.distributions.Normal(torch.zeros(1, 3), torch.full((1, 3), 0.1))
    prior = priors.VampPrior.__new__(priors.VampPrior)
    nn.Module.__init__(prior)
    prior.w = nn.Parameter(torch.zeros(1, 1, 1))
    prior.get_params = lambda: (distribution.loc, distribution.scale)
    z = torch.zeros(1, 3)
    sigma = (-(prior.log_prob(z) + 0.5 * math.log(2 * math.pi))).exp()
    print(f"  q(z | pseudo-input) has sigma 0.1, the component of the prior {sigma[0, 0]:.3f}")
    draws = distribution.sample((100000,)).reshape(-1, 3)
    gap = (distribution.log_prob(draws) - prior.log_prob(draws)).sum(-1).mean()
    print(
        f"  KL of that posterior to its own component: {gap:.2f} nats for 3 latents (should be 0)"
    )


def pyod_vae() -> None:
    """The KL of a fitted detector, by default and with a capacity."""
    import numpy as np

    vae = load("pyod.models.vae").VAE
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 3)) @ rng.normal(size=(3, 12)) + 0.1 * rng.normal(size=(1000, 12))
    for options in ({}, {"beta": 100.0}, {"capacity": 5.0}, {"capacity": 1e9}):
        detector = vae(
            epoch_num=60, verbose=0, dropout_rate=0.0, device=torch.device("cpu"), **options
        )
        detector.fit(x.astype(np.float32))
        scaled = (x - x.mean(0)) / x.std(0)
        with torch.no_grad():
            mean, log_var = detector.model.encode(torch.tensor(scaled, dtype=torch.float32))
        divergence = kl(mean, (0.5 * log_var).exp()).sum(1).mean()
        print(
            f"  {options or 'default'}: KL {divergence:.1f} nats, std of the means "
            f"{mean.std(0).mean():.2f}, sigma {(0.5 * log_var).exp().mean():.3f}"
        )


def recbole_multi_vae() -> None:
    """What the KL is where the loss says that it is zero."""
    at = kl(torch.zeros(1), torch.tensor([0.01])).item()
    print(
        f"  the term is 0 at log_var = 0, mean 0; of what is drawn there: {at:.3f} nats a latent"
    )
    print(f"  the default has 64 latents: {64 * at:.0f} nats a user")


def recbole_rec_vae() -> None:
    """How far log q(z) is off."""
    e = torch.randn(1000000)
    off = (-0.5 * (0.01 * e) ** 2 - (-0.5 * e**2 - math.log(0.01))).mean().item()
    print(f"  log q(z) of the loss minus that of the draws: {off:.3f} nats a latent, a constant")


def multivae_telbo() -> None:
    """The posterior of one modality after the second stage."""
    models = load("multivae.models")
    data = load("multivae.data.datasets.base").MultimodalBaseDataset
    shared = torch.randn(512, 2)
    views = {
        "a": shared @ torch.randn(2, 8) + 0.3 * torch.randn(512, 8),
        "b": shared @ torch.randn(2, 6) + 0.3 * torch.randn(512, 6),
    }
    for fixed in (False, True):
        torch.manual_seed(0)
        config = models.TELBOConfig(
            n_modalities=2,
            latent_dim=2,
            input_dims={"a": (8,), "b": (6,)},
            decoders_dist={"a": "normal", "b": "normal"},
            warmup=1,
        )
        model = models.TELBO(config).train()
        if fixed:
            source = inspect.getsource(type(model).forward)
            source = source.replace("1 + log_var - mod_mu", "1 + mod_log_var - mod_mu")
            source = inspect.cleandoc("\n" + source).replace("super().forward(inputs)", "pass")
            space = dict(vars(inspect.getmodule(type(model))))
            exec(source, space)
            model.forward = space["forward"].__get__(model)
        for epoch, steps in ((1, 400), (2, 800)):
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(parameters, lr=3e-3)
            for _ in range(steps):
                optimizer.zero_grad()
                model(data(views), epoch=epoch).loss.backward()
                optimizer.step()
        sigma = (0.5 * model.encoders["a"](views["a"]).log_covariance).exp().detach()
        print(
            f"  {'log_var -> mod_log_var' if fixed else 'as released'}: "
            f"median sigma of q(z | a) {sigma.median():.4f}"
        )


def ivae_scale() -> None:
    """What is drawn where the KL of iVAE is smallest, and where it reads a small scale."""
    for s in (0.0, -4.0):
        drawn = F.softplus(torch.tensor(s))
        read = math.exp(s / 2)
        told, true = kl(torch.zeros(1), torch.tensor([read])), kl(torch.zeros(1), drawn)
        print(
            f"  output {s:g}: drawn with sigma {drawn:.3f}, scored as {read:.3f}; "
            f"KL {told.item():.3f} in the loss, {true.item():.3f} of what is drawn"
        )


def deepchem_seq_to_seq() -> None:
    """The loss of the variational model beside the KL that its layer computes."""
    deep = load("benchmarks.wild.deepchem")
    step = deep.make_seq_to_seq_step()
    model = inspect.getclosurevars(step).nonlocals["model"]
    optimizer = torch.optim.Adam(model.model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        loss = step()
        loss.backward()
        optimizer.step()
    terms = model.model.randomizer.loss_list
    extra = sum(model.model.randomizer.loss_list[-2:-1]).item()
    recon = loss.item()
    grad = torch.autograd.grad(step(), model.model.randomizer.dense_stddev.weight)[0].norm().item()
    print(
        f"  after 300 steps: loss {recon:.4f}; the KL term of that step, {extra:.3f}, is not in it"
    )
    print(
        f"  terms kept in loss_list, each with its graph: {len(terms)}; gradient left: {grad:.1e}"
    )


def move_vae() -> None:
    """Which columns of the continuous data sets the loss sees."""
    wild = load("benchmarks.wild.move")
    step = wild.make_vae_step()
    model = inspect.getclosurevars(step).nonlocals["model"]
    step().backward()
    norms = model.out.weight.grad.norm(dim=1)[-9:]
    print(
        f"  gradient of the output layer, data sets of 4 and 5 columns: "
        f"{[round(v, 4) for v in norms.tolist()]}"
    )


def disent_dip_vae() -> None:
    """The penalty at the posterior it is meant to be smallest at: q(z|x) = N(0, 1)."""
    vae = load("disent.frameworks.vae")
    dip = vae.DipVae.__new__(vae.DipVae)
    object.__setattr__(dip, "cfg", vae.DipVae.cfg(optimizer="adam"))
    for latents in (6, 10):
        q = torch.distributions.Normal(torch.zeros(64, latents), torch.ones(64, latents))
        loss, _ = vae.DipVae._dip_compute_loss(dip, q)
        print(f"  {latents} latents: {float(loss):.1f} (should be 0)")


def beta_tc_weights() -> None:
    """log q(z) by minibatch stratified sampling, with pythae's weights and with the right ones."""
    models = load("pythae.models")
    model = models.BetaTCVAE(models.BetaTCVAEConfig(input_dim=(4,), latent_dim=2))
    size, batch, width = 5000, 64, 2
    means = torch.randn(size, width)
    sigma = 0.05
    log_var = torch.full((size, width), math.log(sigma**2))

    def density(z, m, v):
        return model._compute_log_gauss_density(z[:, None], m[None], v[None]).sum(-1)

    weights = model._log_importance_weight_matrix(batch, size)
    others = (size - 1) / (size * (batch - 1))  # unbiased: own term 1/N, each other (N-1)/(N(M-1))
    right = torch.full((batch, batch), others).fill_diagonal_(1 / size).log()
    told, good, exact = [], [], []
    for _ in range(500):
        index = torch.randperm(size)[:batch]
        z = means[index] + sigma * torch.randn(batch, width)
        log_q = density(z, means[index], log_var[index])
        told.append(torch.logsumexp(weights + log_q, 1))
        good.append(torch.logsumexp(right + log_q, 1))
        exact.append(torch.logsumexp(density(z, means, log_var), 1) - math.log(size))
    told, good, exact = (torch.cat(t) for t in (told, good, exact))
    print(
        f"  mean of the estimate of q(z) / mean of q(z), 5000 rows, batches of 64: "
        f"pythae {(told.exp().mean() / exact.exp().mean()):.2f}, "
        f"own row weighted 1/N {(good.exp().mean() / exact.exp().mean()):.2f}"
    )
    print(f"  mean of log q(z): pythae {told.mean():.2f}, exact {exact.mean():.2f}")


def gd_vae_likelihood() -> None:
    """`get_statistic_LL` of data and of other data."""
    vae = load("gd_vae_pytorch.vae")
    torch.manual_seed(0)
    theta = {"model_mu": nn.Linear(2, 5), "model_log_sigma_sq": nn.Linear(2, 5)}
    phi = {
        "model_mu": lambda x: torch.zeros(len(x), 2),
        "model_log_sigma_sq": lambda x: torch.zeros(len(x), 2),
        "nu": torch.tensor(1.0),
    }
    for scale in (1.0, 1000.0):
        torch.manual_seed(1)
        x = scale * torch.randn(20, 5)
        torch.manual_seed(2)
        value = vae.get_statistic_LL(theta, phi, x, m=1000, num_dim_z=2)
        print(
            f"  log-likelihood of N(0, {scale:g}^2) data: "
            f"{float(torch.as_tensor(value).mean()):.4f}"
        )


def ctgan_tvae() -> None:
    """A column of two values, 80 % and 20 %, independent of the other column."""
    import numpy as np
    import pandas as pd

    tvae = load("ctgan").TVAE
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"x": rng.normal(size=3000), "c": rng.choice(["a", "b"], 3000, p=[0.8, 0.2])}
    )
    torch.manual_seed(0)
    model = tvae(epochs=300, enable_gpu=False)
    model.fit(table, ["c"])
    share = (model.sample(20000)["c"] == "b").mean()
    with torch.no_grad():
        decoded, _ = model.decoder(torch.randn(20000, model.embedding_dim))
    names = model.transformer._column_transform_info_list[-1].transform.dummies
    drawn = decoded[:, -2:].softmax(1).mean(0)[list(names).index("b")]
    print(
        f"  b: 20 % of the rows, {100 * share:.1f} % of what is generated (the mode of each row)"
    )
    print(f"  drawn from the decoder's probabilities: {100 * drawn:.1f} %")


def main() -> None:
    """Run the measurements that are named, or all."""
    warnings.simplefilter("ignore")
    wanted = sys.argv[1:]
    here = {
        name: value
        for name, value in globals().items()
        if inspect.isfunction(value) and name not in ("main", "load", "kl")
    }
    for name in wanted or here:
        print(f"{name}: {inspect.getdoc(here[name]).splitlines()[0]}", flush=True)
        torch.manual_seed(0)
        try:
            here[name]()
        except ModuleNotFoundError as e:
            print(f"  skipped: {e}")


if __name__ == "__main__":
    main()
