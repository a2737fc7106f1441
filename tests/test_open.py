"""Extensions by a user need no change in the library: layer, map, head, model, objective.

All are defined in this file only. They are trained, resumed, evaluated, saved and loaded,
compressed, compiled, examined for saturation, and obey the laws.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

import musigma
from musigma import Dataset, TrainConfig, coding, fit, objectives
from musigma.coding import rules as coding_rules
from musigma.coding.laws import SHARPNESS, Weights
from musigma.coding.rules import STEPS, ratio
from musigma.distributions import StandardNormal, StandardUniform
from musigma.evaluation import evaluate, ledger, saturation, score
from musigma.gaussian import GaussianHead
from musigma.layers import (
    ActNorm,
    Autoregressive,
    Coupling,
    Dequantize,
    Elementwise,
    Logit,
    Rescale,
)
from musigma.layers.maps import Map
from musigma.model import Bijection, Chain, Model, Prior
from musigma.nets import MADE, MLP
from musigma.testing import check_head, check_layer, check_model
from musigma.trace import Evidence
from musigma.training.step import ObjectivePass
from musigma.zoo import architecture

D, LEVELS = 6, 8


# -- a layer


class Stretch(Bijection):
    """The first half of the features scales the second: y2 = x2 exp(tanh(h(x1)))."""

    repeated = True

    def __init__(self, features: int, context: int = 0):
        super().__init__()
        kept = features // 2
        self.net = MLP(kept, features - kept, hidden=[8], context=context)

    def _halves(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        first, second = x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)
        return first, second, self.net(first, context).tanh()

    def forward(self, x, context=None):
        first, second, log_scale = self._halves(x, context)
        return torch.cat([first, second * log_scale.exp()], 1), log_scale.sum(1)

    def inverse(self, y, context=None):
        first, second, log_scale = self._halves(y, context)
        return torch.cat([first, second * (-log_scale).exp()], 1), -log_scale.sum(1)

    def emitters(self):
        yield self.net, lambda h: (h.abs() > 3).float().mean()

    def condition_number(self):
        return 1.0


class StretchRule(coding.Rule):
    """Codes the scale as a ratio of integers."""

    def _parts(self, x):
        half = x.shape[1] // 2
        given = self.tensor(x[:, :half], self.below)
        log_scale = self.layer.net(given, self.context).tanh()
        return x[:, :half], x[:, half:], ratio(self.integers(log_scale, STEPS, 0))

    def up(self, x):
        first, second, ratio = self._parts(x)
        return np.concatenate([first, self.scale(second, *ratio)], 1)

    def down(self, y):
        first, second, ratio = self._parts(y)
        return np.concatenate([first, self.unscale(second, *ratio)], 1)


# -- a map


class SinhArcsinh(Map):
    """y = sinh(asinh(x) + t): adds skew, and keeps the weight of the tails."""

    @property
    def outputs(self) -> int:
        return 1

    @staticmethod
    def _moved(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        angle = x.asinh() + shift
        return angle.sinh(), angle.cosh().log() - 0.5 * (1 + x.square()).log()

    def forward(self, x, h):
        return self._moved(x, h.tanh())

    def inverse(self, y, h):
        return self._moved(y, -h.tanh())

    def saturation(self, h):
        return (h.abs() > 3).float().mean()


# -- a distribution, and a head


class Geometric(Distribution):
    """Levels 0 .. levels - 1 with log p(k) = k l - log Σ exp(k l), independent."""

    has_rsample = False

    def __init__(self, logits: Tensor, levels: int):
        self.steps = torch.arange(levels, dtype=logits.dtype).reshape(
            -1, *(1,) * (logits.ndim - 1)
        )
        self.log_probs = (logits[:, None] * self.steps).log_softmax(1)
        super().__init__(logits.shape[:1], logits.shape[1:], validate_args=False)

    arg_constraints = {}  # noqa: RUF012

    @property
    def support(self):
        return constraints.independent(constraints.nonnegative_integer, len(self.event_shape))

    @property
    def mean(self):
        return (self.log_probs.exp() * self.steps).sum(1)

    @property
    def mode(self):
        return self.log_probs.argmax(1).to(self.log_probs)

    def sample(self, sample_shape=(), *, temperature=1.0):
        logits = self.log_probs.expand(*sample_shape, *self.log_probs.shape)
        noise = -torch.empty_like(logits).exponential_().log()
        if isinstance(temperature, Tensor):
            temperature = temperature.reshape(-1, *(1,) * (logits.ndim - 1))
        return (logits + temperature * noise).argmax(len(sample_shape) + 1).to(logits)

    def log_prob(self, value):
        chosen = self.log_probs.gather(1, value.long()[:, None])[:, 0]
        return chosen.flatten(1).sum(1)


def geometric_rule(dist: Geometric, quantizer):
    return Weights(quantizer.integers(dist.log_probs.clamp(min=-60), SHARPNESS, 0))


class GeometricHead(nn.Module):
    def __init__(self, net: nn.Module, levels: int):
        super().__init__()
        self.net, self.levels = net, levels

    def forward(self, given, context=None):
        return Geometric(self.net(given, context), self.levels)


# -- a model


class Pair(Model):
    """Two latents; the second is inferred from the data and the first."""

    def __init__(self, dims: int, levels: int, context: int = 0):
        super().__init__()

        def head(inputs: int, outputs: int) -> GaussianHead:
            net = MLP(inputs, 2 * outputs, hidden=[9], context=context)
            return GaussianHead(net, event_ndims=1)

        self.first, self.second = Prior(StandardNormal((3,))), Prior(head(3, 2))
        self.q_first, self.q_second = head(dims, 3), head(dims + 3, 2)
        self.decoder = GeometricHead(MLP(5, dims, hidden=[9], context=context), levels)

    def infer(self, x, trace, context=None):
        scaled = x / LEVELS
        a = trace.latent(self.first, self.q_first(scaled, context), self.first.head())
        q = self.q_second(torch.cat([scaled, a], 1), context)
        b = trace.latent(self.second, q, self.second.head(a, context))
        trace.p(self, self.decoder(torch.cat([a, b], 1), context), x)

    def generate(self, trace, context=None):
        a = trace.p(self.first, self.first.head())
        b = trace.p(self.second, self.second.head(a, context))
        x = trace.p(self, self.decoder(torch.cat([a, b], 1), context))
        if trace.scoring:
            scaled = x / LEVELS
            q = self.q_second(torch.cat([scaled, a], 1), context)
            trace.q(self.second, q, b)
            trace.q(self.first, self.q_first(scaled, context), a)
        return x

    def variables(self):
        yield from (self.first, self.second, self)

    def latents(self):
        yield from (self.first, self.second)


@architecture
def open_pair(shape, *, bits: int | None = 3, context: int = 0) -> Model:
    """A model of this file."""
    return Pair(shape[0], 2 ** (bits or 3), context)


@architecture
def open_flow(shape, *, bits: int | None = 3, depth: int = 2, context: int = 0) -> Chain:
    """A flow of this file's layer and map."""
    d, levels = shape[0], 2 ** (bits or 3)
    layers = [Dequantize(StandardUniform(shape), levels), Rescale(1 / levels), Logit(1e-3)]
    skew = SinhArcsinh()
    for _ in range(depth):
        half = d // 2
        made = MADE(skew.owners(d), hidden=[12], context=context)
        net = MLP(half, d - half, hidden=[8], context=context)
        layers += [ActNorm(d), Stretch(d, context), Coupling(net, map=skew)]
        layers += [Autoregressive(made, map=skew), Elementwise((d,), map=skew)]
    return Chain(layers, Prior(StandardNormal((d,))))


# -- an objective with a critic


class Adversarial(nn.Module):
    """The ELBO, and a critic that separates draws of the first latent from draws of its prior."""

    def __init__(self, width: int = 3, weight: float = 0.1):
        super().__init__()
        self.critic, self.weight = MLP(width, 1, hidden=[8]), weight

    def forward(self, record):
        z = record.values[next(iter(record.paired))]
        fooled = F.softplus(-self.critic(z)[:, 0])
        return objectives.elbo(record) + self.weight * fooled

    def critic_loss(self, record):
        z = record.values[next(iter(record.paired))].detach()
        real = torch.randn_like(z)
        return F.softplus(self.critic(z)[:, 0]) + F.softplus(-self.critic(real)[:, 0])

    def critic_optimizer(self):
        return torch.optim.Adam(self.critic.parameters(), lr=1e-2)


# -- the laws


def test_the_laws_of_the_layer_and_the_map():
    check_layer(Stretch(5), (5,), compiled=True)
    check_layer(Stretch(5, context=2), (5,), context=2)
    check_layer(Coupling(MLP(2, 3, hidden=[6]), map=SinhArcsinh()), (5,), compiled=True)
    made = MADE(SinhArcsinh().owners(4), hidden=[9])
    check_layer(Autoregressive(made, map=SinhArcsinh()), (4,))
    check_layer(Elementwise((3,), map=SinhArcsinh()), (3,))


def test_the_laws_of_the_head_and_the_models():
    head = GeometricHead(MLP(4, D, hidden=[7], context=2), LEVELS)
    check_head(head, torch.randn(4, 4), (D,), context=2)
    for name in ("open_pair", "open_flow"):
        model = musigma.build(name, (D,), bits=3, context=2)
        check_model(model, (D,), bits=3, context=2)


# -- the rest of the library


@pytest.fixture
def data():
    random = np.random.default_rng(0)
    base = random.integers(0, LEVELS, (300, 1, 1, 1))
    x = (base + random.integers(0, 3, (300, D, 1, 1))).clip(0, LEVELS - 1)
    given = {"age": musigma.data.Given(random.normal(size=300).astype(np.float32))}
    levels = (x * 32).astype(np.uint8)
    preprocess = musigma.Preprocess(bits=3)
    return Dataset(levels, preprocess=preprocess, given=given, name="levels")


@architecture
def open_images(shape, *, bits: int | None = 3, context: int = 0) -> Chain:
    """`open_flow`, or `open_pair`, of images of one pixel's height and width."""
    return _Flat.chain(open_flow, shape, bits, context)


class _Flat(Bijection):
    """(D, 1, 1) to (D,)."""

    def forward(self, x, context=None):
        return x.flatten(1), x.new_zeros(len(x))

    def inverse(self, y, context=None):
        return y[:, :, None, None], y.new_zeros(len(y))

    @staticmethod
    def chain(builder, shape, bits, context):
        inner = builder((shape[0],), bits=bits, context=context)
        return Chain([_Flat()], inner)


@architecture
def open_image_pair(shape, *, bits: int | None = 3, context: int = 0) -> Chain:
    """`open_pair` of images of one pixel's height and width."""
    return _Flat.chain(open_pair, shape, bits, context)


class FlatRule(coding.Rule):
    def up(self, x):
        return x.reshape(len(x), -1)

    def down(self, y):
        return y[:, :, None, None]


CONFIG = {"batch_size": 32, "evaluate_on": 30, "evaluations": 2, "warmup": 2}


def halves(data):
    return data.split("train"), data.split("validation")


@pytest.mark.parametrize("name", ["open_images", "open_image_pair"])
@pytest.mark.parametrize("context", [(), ("age",)], ids=["plain", "given"])
def test_models_are_trained_resumed_evaluated_saved_and_loaded(name, context, data, tmp_path):
    torch.manual_seed(0)
    objective = Adversarial if name == "open_image_pair" else None
    config = TrainConfig(steps=12, **CONFIG)
    spec = data.spec(context)
    for folder, stop in (("whole", 99), ("parts", 5), ("parts", 99)):
        torch.manual_seed(1)
        model = musigma.build(name, spec)
        made = {} if objective is None else {"objective": objective()}
        resume = (folder, stop) == ("parts", 99)
        run = fit(
            model, *halves(data), config, tmp_path / folder,
            device="cpu", resume=resume, stop=lambda step, stop=stop: step >= stop, **made,
        )  # fmt: skip
    for file in ("last.safetensors", "model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    again = musigma.load(tmp_path / "whole" / "last.safetensors")
    assert again.spec == spec
    held = data.split("held-out")
    assert evaluate(again, held) == evaluate(run.model, held)
    total = sum(row["bits_per_dim"] for row in ledger(again, held))
    assert total == pytest.approx(evaluate(again, held)["bits_per_dim"])
    assert len(score(again, held)["nats"]) == len(held)


def test_the_critic_learns_and_is_saved(data, tmp_path):
    torch.manual_seed(0)
    objective = Adversarial(weight=0.0)
    before = [p.clone() for p in objective.parameters()]
    model = musigma.build("open_image_pair", data.spec())
    fit(model, *halves(data), TrainConfig(steps=5, **CONFIG), tmp_path, objective=objective)
    assert all(not torch.equal(a, b) for a, b in zip(before, objective.parameters(), strict=True))
    fresh, other = Adversarial(weight=0.0), musigma.build("open_image_pair", data.spec())
    fit(
        other, *halves(data), TrainConfig(steps=5, **CONFIG), tmp_path,
        objective=fresh, resume=True,
    )  # fmt: skip
    state = objective.state_dict()
    assert all(torch.equal(t, state[k]) for k, t in fresh.state_dict().items())
    with pytest.raises(ValueError, match=r"objective: .* give fit the objective that the run was"):
        fit(other, *halves(data), TrainConfig(steps=5, **CONFIG), tmp_path, resume=True)


def test_a_users_optimizer(data, tmp_path):
    used = []

    def sgd(parameters):
        used.append(torch.optim.SGD(parameters, lr=1e-3, momentum=0.9))
        return used[-1]

    model = musigma.build("open_images", data.spec())
    run = fit(model, *halves(data), TrainConfig(steps=4, **CONFIG), tmp_path, optimizer=sgd)
    assert run.finished
    assert len(used) == 1
    assert all("momentum_buffer" in state for state in used[-1].state.values())


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda parameters: None, "optimizer: expected a function .* it returned NoneType"),
        (torch.optim.LBFGS, "optimizer: a step of LBFGS needs a closure"),
        (WithoutRate, "optimizer: WithoutRate has groups of parameters without a learning rate"),
    ],
    ids=["none", "closure", "rate"],
)
def test_an_optimizer_that_cannot_be_used_is_refused_at_once(optimizer, message, data, tmp_path):
    model = musigma.build("open_images", data.spec())
    config = TrainConfig(steps=4, **CONFIG)
    with pytest.raises(ValueError, match=message):
        fit(model, *halves(data), config, tmp_path / "run", optimizer=optimizer)
    assert not (tmp_path / "run").exists()


class NoCriticGradient(Adversarial):
    def critic_loss(self, record):
        return super().critic_loss(record).detach()


class Unreachable(Adversarial):
    """Its value has a gradient for the critic, and none for the model."""

    def forward(self, record):
        z = record.values[next(iter(record.paired))].detach()
        return self.critic(z)[:, 0]


def test_an_objective_of_several_draws(data, tmp_path):
    """The bound of `iwae`, written as an objective, takes the same steps."""

    def bound(record):
        log_w = record.terms.elbo.reshape(-1, 3)
        return np.log(3) - log_w.logsumexp(1)

    losses = []
    for objective in (None, bound):
        torch.manual_seed(0)
        model = musigma.build("open_image_pair", data.spec())
        config = TrainConfig(steps=3, k=3, **CONFIG)
        rows = []
        fit(
            model, *halves(data), config, tmp_path / str(objective is None), device="cpu",
            objective=objective, watch=rows.append,
        )  # fmt: skip
        losses.append([row["loss"] for row in rows if row["kind"] == "train"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class Scored(nn.Module):
    """A model whose evidence has a score: draws that are not reparameterized."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, context, *, closed_form=True, trace=None):
        zero = torch.zeros(len(x))
        value = -(x - self.weight).square()
        evidence = Evidence(value, zero[:, None], zero, zero, zero, self.weight * x)
        if trace is not None:
            trace.terms = evidence
        return evidence


def test_the_score_is_added_once_whatever_calls_an_objective():
    x = torch.randn(5)
    gradients = []
    for objective in (None, objectives.elbo, lambda record: objectives.elbo(record) * 1.0):
        model = Scored()
        forward = ObjectivePass(model, TrainConfig(), objective)
        forward(x, None, 0.0)[0].mean().backward()
        gradients.append(model.weight.grad)
    plain = Scored()
    (-plain(x, None).elbo).mean().backward()
    assert gradients[0] != plain.weight.grad
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda record: objectives.elbo(record).mean(), r"shape \(\).*expected \(32,\)"),
        (lambda record: objectives.elbo(record) * float("nan"), "not finite"),
        (lambda record: objectives.elbo(record).detach(), "no gradient"),
        (Unreachable(), "no gradient for the parameters that it trains"),
        (NoCriticGradient(), "no gradient for the parameters that it trains"),
    ],
    ids=["shape", "nan", "detached", "unreachable", "critic"],
)
def test_an_unsuitable_objective_is_refused_before_training(objective, message, data, tmp_path):
    model = musigma.build("open_image_pair", data.spec())
    with pytest.raises(ValueError, match=f"objective.*: .*{message}"):
        fit(
            model, *halves(data), TrainConfig(steps=4, **CONFIG), tmp_path / "run",
            objective=objective,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_users_layer_compiles_as_a_block(data, tmp_path):
    model = musigma.build("open_images", data.spec())
    run = fit(model, *halves(data), TrainConfig(steps=2, fast=True, **CONFIG), tmp_path)
    assert run.finished
    blocks = [m for m in model.modules() if isinstance(m, Stretch)]
    assert (
        all(b._compiled_call_impl is not None for b in blocks)
        or "not compiled" in (tmp_path / "metrics.jsonl").read_text()
    )


def test_models_are_examined_for_saturation(data):
    torch.manual_seed(0)
    model = musigma.build("open_images", data.spec())
    x = torch.from_numpy(data.x[:20]).float()
    model.calibrate(x)
    stretch = next(m for m in model.modules() if isinstance(m, Stretch))
    with torch.no_grad():
        stretch.net.layers[-1].bias.fill_(50.0)
    name = model.site_names()[stretch]
    shares = saturation(model, x)
    assert shares[name] == 1.0
    couplings = [n for n, m in model.named_modules() if isinstance(m, Coupling)]
    assert all(shares[n] < 0.5 for n in couplings)
    assert any(isinstance(m, Autoregressive) and n in shares for n, m in model.named_modules())


@pytest.mark.parametrize("name", ["open_images", "open_image_pair"])
def test_models_are_compressed_with_registered_rules(name, data, tmp_path, monkeypatch):
    monkeypatch.setattr(coding_rules, "_RULES", dict(coding_rules._RULES))
    torch.manual_seed(0)
    model = musigma.build(name, data.spec())
    model.calibrate(torch.from_numpy(data.x).float())
    images = data.x[:20]
    rules = {Stretch: StretchRule, SinhArcsinh: coding.Intervals, Geometric: geometric_rule}
    rules[_Flat] = FlatRule
    needed = [Stretch, SinhArcsinh, _Flat] if name == "open_images" else [Geometric, _Flat]
    for kind in needed:
        with pytest.raises(ValueError, match=r"has no coding rule; register one"):
            coding.compress(model, images, tmp_path / "refused.mus")
        assert not (tmp_path / "refused.mus").exists()
        coding.register(kind)(rules[kind])
    report = coding.compress(model, images, tmp_path / "images.mus")
    again = coding.decompress(tmp_path / "images.mus", model=model)
    assert (again.levels == images).all()
    assert report.images == 20


class Center(Bijection):
    """y = x - the mean of all training rows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calibrated", torch.tensor(False))

    def measure(self, data):
        self.mean.copy_(torch.as_tensor(data.moments()[0]))
        self.calibrated.fill_(True)

    def forward(self, x, context=None):
        return x - self.mean, x.new_zeros(len(x))

    def inverse(self, y, context=None):
        return y + self.mean, y.new_zeros(len(y))


class Mean(torch.nn.Module):
    """A context, and how many rows it was calibrated on."""

    features, calibrates_on_all, rows = 1, True, 0

    def calibrate(self, context):
        self.rows = max(self.rows, len(context))

    def forward(self, context):
        return context


@architecture
def open_centered(shape, *, context: int = 0):
    coupling = Coupling(MLP(1, 4, hidden=[8], context=context))
    return Chain([Center(), coupling], Prior(StandardNormal(shape)))


@musigma.nets.embedding
def open_mean(variables):
    return Mean()


def test_a_first_layer_and_an_embedding_of_the_user_see_all_training_rows(tmp_path):
    random = np.random.default_rng(0)
    x, given = random.normal(3, 2, (700, 3)).astype("f"), random.normal(size=(700, 1)).astype("f")
    data = musigma.Dataset(x, given={"a": musigma.data.Given(given)})
    model = musigma.build("open_centered", data.spec(["a"]), embed="open_mean")
    config = musigma.TrainConfig(steps=1, evaluations=1)
    musigma.fit(model, data, data.subset(range(20)), config, tmp_path / "run")
    mean = model.model.layers[0].mean
    torch.testing.assert_close(mean, torch.from_numpy(x.mean(0)), rtol=1e-5, atol=1e-5)
    assert model.embedding.rows == 700
