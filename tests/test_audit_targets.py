"""What is audited: the step that is found in an object, or its callables; and the command."""

import ast
import json
import re
import sys
import textwrap
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.distributions import Exponential, Independent, Normal
from torch.utils.data import DataLoader, TensorDataset

import musigma
from interfaces_of_steps import CASES, HEAD
from musigma.audit import CODES, AuditError, AuditReport, Finding, NoStepError, audit, find_step
from musigma.audit.batches import losses
from musigma.cli import main
from musigma.layers import ActNorm, InvertibleConv
from musigma.plugins import PluginError, load

MODELS = """
    import torch, torch.nn.functional as F
    from torch import nn

    class VAE(nn.Module):
        factor = 0.5

        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(48, 10)
            self.mu, self.logvar = nn.Linear(10, 3), nn.Linear(10, 3)
            self.leave = nn.Linear(3, 48)

        def encode(self, x):
            h = self.enter(x.flatten(1)).relu()
            return self.mu(h), self.logvar(h)

        def reparameterize(self, mu, logvar):
            std = torch.exp(self.factor * logvar)
            return mu + std * torch.randn_like(std)

        def decode(self, z):
            return self.leave(z).sigmoid()

        def forward(self, x):
            mu, logvar = self.encode(x)
            return self.decode(self.reparameterize(mu, logvar)), mu, logvar

    class Squared(VAE):
        factor = 1.0

    class Turned(VAE):
        def reparameterize(self, logvar, mu):
            return super().reparameterize(mu, logvar)

        def forward(self, x):
            mu, logvar = self.encode(x)
            return self.decode(self.reparameterize(logvar, mu)), mu, logvar

    def loss_function(recon_x, x, mu, logvar):
        kl = -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())
        return F.binary_cross_entropy(recon_x, x, reduction="sum") + kl

    class Sampling(nn.Module):
        def forward(self, inputs):
            mean, log_var = inputs
            return mean + (0.5 * log_var).exp() * torch.randn_like(mean)

    class British(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(7, 4)

        def encode(self, x):
            return self.enter(x).chunk(2, 1)

        def reparametrise(self, mu, logvar):
            return mu + (0.5 * logvar).exp() * torch.randn_like(mu)

        def kl(self, mu, logvar):
            return -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())

        def forward(self, x):
            return x

    class Plain(nn.Module):  # the function below is not its inverse
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(7, 7)

        def forward(self, x):
            return self.net(x)

    def inverse(matrix):
        return torch.linalg.inv(matrix)

    class WithLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.sampling = nn.Sequential(nn.Linear(7, 8)), Sampling()

        def forward(self, x):
            mean, log_var = self.encoder(x).chunk(2, 1)
            return self.sampling([mean, log_var]), mean, log_var

        def encode(self, x):
            return self.encoder(x).chunk(2, 1)

        def kl_divergence(self, mean, log_var):
            return -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1)

    class Coupled(nn.Module):
        sign = 1

        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 4)

        def forward(self, x):
            a, b = x.chunk(2, 1)
            t, s = self.net(a).chunk(2, 1)
            return torch.cat([a, b * s.tanh().exp() + t], 1), self.sign * s.tanh().sum(1)

        def inverse(self, z):
            a, b = z.chunk(2, 1)
            t, s = self.net(a).chunk(2, 1)
            return torch.cat([a, (b - t) * (-s.tanh()).exp()], 1)

    class Signed(Coupled):
        sign = -1

    class Hidden(nn.Module):  # what it draws cannot be had
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(7, 4), nn.Linear(2, 7)

        def forward(self, x):
            mu, logvar = self.enter(x).chunk(2, 1)
            z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
            return self.leave(z), mu, logvar

    def needs(width):
        return nn.Linear(width, width)

    class Needs(nn.Module):
        def __init__(self, width):
            super().__init__()

    def broken():
        raise RuntimeError("no such luck")

    nothing = 3
"""


# --- the step -----------------------------------------------------------------------------------


def loss_of(value):
    """The loss in what a step returned, by its name or as the first number."""
    numbers = losses(value)
    return next((numbers[n] for n in ("loss", *numbers) if n in numbers), None)


def modules_in(namespace):
    things = [*namespace.values(), *(getattr(t, "model", None) for t in namespace.values())]
    return [m for root in things if isinstance(root, nn.Module) for m in root.modules()]


def state_of(module):
    """Everything that a call may change, as values or by identity."""
    found = {"random": torch.get_rng_state(), "batch": str(vars(module).get("batch"))}
    for i, m in enumerate(modules_in(vars(module))):
        found |= {f"{i} {name}": t.detach().clone() for name, t in m.named_parameters()}
        found |= {f"{i} {name} grad": t.grad is None for name, t in m.named_parameters()}
        found |= {f"{i} vars": {name: id(value) for name, value in vars(m).items()}}
        found |= {f"{i} class": type(m)}
        if hasattr(m, "optimizer"):
            found[f"{i} optimizer"] = str(vars(m)["optimizer"].state_dict())
    return found


def same(a, b):
    equal = {k: torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items()}
    return a.keys() == b.keys() and all(equal.values())


def executed(source, path):
    (path / "model.py").write_text(HEAD + textwrap.dedent(source))
    torch.manual_seed(5)
    load(f"{path}/model.py:{'by_hand'}")
    return sys.modules["musigma_plugin_model"]


@pytest.mark.parametrize("case", CASES)
def test_the_step_of_each_interface(case, tmp_path):
    found, source = CASES[case]
    module = executed(source, tmp_path)
    before = state_of(module)
    step = find_step(module.target, module.batch)
    if case != "step factory":  # it makes its model
        assert same(before, state_of(module))
    assert step.name == found
    torch.manual_seed(3)
    values = [step.call(), step.call()]
    torch.manual_seed(3)
    right = [module.by_hand(module.target, module.batch) for _ in range(2)]
    for value, expected in zip(values, right, strict=True):
        loss = loss_of(value)
        torch.testing.assert_close(value.mean() if loss is None else loss, expected)


def test_a_deep_model_and_its_gradients_are_as_before():
    class Deep(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.inner = Deep(depth - 1) if depth else nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def elbo(self, x):
            return -self(x).square().mean()

        def forward(self, x):
            return self.inner(x) * self.scale

    model, x = Deep(12), torch.rand(5, 3)
    model.elbo(x).backward()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    assert find_step(model, x).name == "Deep.elbo"
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert torch.equal(p.grad, before[name][1])


def test_notes_of_a_step(tmp_path):
    for case, note in {
        "conditional loss": "beta=1",
        "training_step that unpacks a batch of a tensor": "labels y of zeros",
        "training_step of Lightning without Lightning": "is a stub: 1",
        "elbo that is maximized": "elbo is maximized: the loss is minus it",
        "images of bytes": "converted from torch.uint8 to torch.float32, and divided by 255",
        "loss_function of *args and **kwargs": "M_N=1",
        "loss_function beside the class": "recon_x=output 1, x=the data, mu=mu, logvar=logvar",
        "a KL that is left in an attribute": "the KL's weight is not judged",
    }.items():
        key = next(name for name in CASES if name.endswith(case))
        module = executed(CASES[key][1], tmp_path)
        assert any(note in line for line in find_step(module.target, module.batch).assumed), case


def test_a_step_without_a_batch(tmp_path):
    module = executed(CASES["loss_function beside the class"][1], tmp_path)
    step = find_step(module.target)
    assert step.call().requires_grad
    assert "a batch of shape (4, 12) was drawn" in step.assumed
    step = find_step(type(module.target), shape=(3, 2, 2))
    assert "VAE() was called to make the object" in step.assumed


WITHOUT = {
    "forward": (
        """
        class VAE(Parts):
            def forward(self, x):
                mu, logvar = self.heads(x)
                return self.leave(self.draw(mu, logvar)), mu, logvar
        target = VAE()
        """,
        ("model = VAE()", "recon, mu, logvar = model(batch)", "kl = ...  # of mu, logvar"),
    ),
    "a loss that fails": (
        """
        class VAE(Parts):
            def forward(self, x):
                mu, logvar = self.heads(x)
                return self.leave(self.draw(mu, logvar)), mu, logvar
            def loss_function(self, recon, x, mu, logvar):
                raise KeyError("no such weight")
        target = VAE()
        """,
        ("return model.loss_function(", "raises KeyError: 'no such weight'"),
    ),
    "a training_step that fails": (
        """
        class VAE(Parts):
            def __init__(self, width=8):
                super().__init__()
            def training_step(self, batch, batch_idx):
                return self.leave(batch["missing"]).mean()
        target = VAE()
        """,
        ("model.training_step(batch, batch_idx)", "VAE.training_step raises"),
    ),
    "a loss without a gradient": (
        """
        class VAE(Parts):
            @torch.no_grad()
            def loss(self, x):
                return value(self, x)
        target = VAE()
        """,
        ("VAE.loss returns tensors (), of which nothing requires a gradient",),
    ),
    "a latent_dist": (
        """
        class Coder(Parts):
            def encode(self, x):
                return SimpleNamespace(latent_dist=self.heads(x))
            def decode(self, z):
                return SimpleNamespace(sample=self.leave(z))
            def forward(self, x):
                return self.decode(self.encode(x).latent_dist[0])
        target = Coder()
        """,
        ("posterior = model.encode(batch).latent_dist", "posterior.kl().sum()"),
    ),
    "a function": (
        """
        def score(a, b):
            return a + b
        target = score
        """,
        ("return score(a, b)", "a function that makes a model must take no arguments"),
    ),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_a_refusal_ends_with_a_wrapper(case, tmp_path):
    source, words = WITHOUT[case]
    module = executed(source, tmp_path)
    for call in (find_step, audit):
        with pytest.raises(NoStepError) as refused:
            call(module.target, module.batch)
        message = str(refused.value)
        assert not [word for word in words if word not in message], message
        code, _, command = refused.value.wrapper.rpartition("\n\n")
        assert command == "musigma audit model.py:make_step"
        assert [getattr(node, "name", "") for node in ast.parse(code).body] == ["make_step"]
        assert message.endswith(refused.value.wrapper)


def test_functions_that_are_no_step():
    for function, message in (
        (lambda: None, r"it returns None that requires no gradient"),
        (lambda: torch.ones(3), r"it returns a tensor that requires no gradient"),
        (lambda: 1 / 0, r"it raises ZeroDivisionError"),
        (nn.Linear, r"Linear: it needs in_features, out_features"),
    ):
        with pytest.raises(AuditError, match=message):
            find_step(function)


Named = namedtuple("Named", "image label")


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


X = torch.rand(5, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "batch",
    [
        X.numpy(),
        X.double(),
        X.half(),
        X.clone().requires_grad_(),
        Named(X, torch.zeros(5)),
        OrderedDict(x=X),
        UserDict(x=X),
        Frozen(X, torch.zeros(5)),
        DataLoader(TensorDataset(X, torch.zeros(5)), batch_size=5),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_kinds_of_batches(batch, steps):
    report = audit(steps.VAE, batch)
    assert (report.verdict, report.convention) == ("correct", "log_var")


def test_batches_that_are_none(steps):
    for batch, message in (
        (X[:0], "expected some numbers; got the shape (0, 12)"),
        (X / 0, "expected finite numbers"),
    ):
        with pytest.raises(AuditError, match=re.escape(message)):
            audit(steps.VAE, batch)
    for batch in ("text", [], {"a": 1}, iter([X]), X[:, :3]):
        report = audit(steps.VAE, batch)  # its callables take no batch; its loss refuses this one
        assert report.verdict == "incomplete"
        assert report.missing[0].startswith("the step: VAE.loss raises ")


def test_modules_without_parameters_yet():
    class Bare(nn.Module):
        def __init__(self):
            pass

    for model, message in (
        (nn.LazyLinear(3), "has lazy layers without parameters; call it on a batch"),
        (Bare, r"its __init__ does not call super\(\)"),
    ):
        with pytest.raises(AuditError, match=message):
            audit(model, X)


# --- libraries ----------------------------------------------------------------------------------


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    library = pytest.importorskip("keras")
    if library.backend.backend() != "torch":
        pytest.skip("keras was imported with another backend")
    return library


def keras_model(keras, call, **members):
    def build(self):
        keras.Model.__init__(self)
        self.enter, self.leave = keras.layers.Dense(6), keras.layers.Dense(12)

    def answer(self, x, training=False):
        return call(self, *keras.ops.split(self.enter(x), 2, axis=1))

    model = type("VAE", (keras.Model,), {"__init__": build, "call": answer, **members})()
    model(torch.zeros(2, 12))
    return model


def nats(m, s):
    return -0.5 * (1 + s - m**2 - s.exp()).sum(1)


def keras_draw(self, m, s):
    self.add_loss(nats(m, s).mean())
    return self.leave(m + (0.5 * s).exp() * torch.randn_like(m))


def test_keras_by_its_compiled_loss_or_by_its_added_losses(keras):
    x = torch.rand(5, 12)
    for compiled in (True, False):
        model = keras_model(keras, keras_draw)
        if compiled:
            model.compile("adam", loss="mse")
        before = [w.value.detach().clone() for w in model.weights]
        step = find_step(model, x)
        assert all(map(torch.equal, [w.value for w in model.weights], before))
        torch.manual_seed(3)
        value = step.call()
        torch.manual_seed(3)
        error = (model(x) - x) ** 2
        error = error.mean() if compiled else error.sum(1).mean()
        torch.testing.assert_close(value, error + model.losses[0])
        assert step.name == ("VAE.compute_loss" if compiled else "VAE.losses")
        assert step.users == ("loss" if compiled else "terms")


def test_keras_by_a_train_step_of_its_own(keras):
    def train_step(self, data):
        m, s = keras.ops.split(self.enter(data), 2, axis=1)
        z = m + (0.5 * s).exp() * torch.randn_like(m)
        loss = ((self.leave(z) - data) ** 2).sum(1).mean() + nats(m, s).mean()
        self.zero_grad()
        loss.backward()
        weights = self.trainable_weights
        with torch.no_grad():
            self.optimizer.apply([w.value.grad for w in weights], weights)
        return {"loss": loss.item()}

    model = keras_model(keras, lambda self, m, s: self.leave(m), train_step=train_step)
    model.compile("adam")
    x = torch.rand(5, 12)
    before = [w.value.detach().clone() for w in model.weights]
    step = find_step(model, x)
    assert step.name == "VAE.train_step"
    torch.manual_seed(3)
    value = step.call()
    assert all(map(torch.equal, [w.value for w in model.weights], before))
    assert int(model.optimizer.iterations.value) == 0
    torch.manual_seed(3)
    m, s = keras.ops.split(model.enter(x), 2, axis=1)
    y = model.leave(m + (0.5 * s).exp() * torch.randn_like(m))
    torch.testing.assert_close(value, ((y - x) ** 2).sum(1).mean() + nats(m, s).mean())


def test_diffusers_has_no_loss():
    diffusers = pytest.importorskip("diffusers")
    sizes = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 2}
    model = diffusers.AutoencoderKL(**sizes)
    with pytest.raises(NoStepError, match="nothing in it returns a loss") as refused:
        find_step(model, torch.rand(2, 3, 8, 8))
    code = refused.value.wrapper.rpartition("\n\n")[0]
    code = code.replace("AutoencoderKL()", "given").replace("...  #", "x  #")
    scope = {"given": model, "x": torch.rand(2, 3, 8, 8)}
    exec(code, scope)
    assert scope["make_step"]()().requires_grad


# --- audits -------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "models.py"
    path.write_text(textwrap.dedent(MODELS))
    return path


@pytest.mark.parametrize(
    ("name", "verdict", "convention", "codes"),
    [
        ("VAE", "correct", "log_var", ()),
        ("Squared", "bug", "log_std", ("kl_mismatch",)),
        ("Turned", "correct", "log_var", ()),
        ("WithLayer", "correct", "log_var", ()),
        ("British", "correct", "log_var", ()),
        ("Coupled", "correct", None, ()),
        ("Signed", "bug", None, ("logdet_mismatch",)),
    ],
)
def test_models_of_a_file(file, name, verdict, convention, codes):
    report = audit(load(f"{file}:{name}"))
    assert (report.verdict, report.convention, report.codes) == (verdict, convention, codes)
    assert report.checked
    assert any("was called to make" in line for line in report.assumed)
    assert report.subject == name


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Needs", "it needs width; give an instance"),
        ("needs", "a function that makes a model must take no arguments"),
        ("broken", r"broken\(\): it raises RuntimeError: no such luck"),
        ("nothing", "int: nothing in it returns a loss"),
        ("Hidden", "Hidden: nothing in it returns a loss, and it is neither a flow, nor"),
        ("Plain", "it returns no log-determinant, and there is no inverse"),
    ],
)
def test_objects_that_cannot_be_audited(file, target, message):
    with pytest.raises(AuditError, match=message):
        audit(load(f"{file}:{target}"))


def test_targets_that_cannot_be_loaded(tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0")
    for target, message in (
        ("models.py", "expected FILE.py:NAME"),
        (f"{tmp_path}/none.py:X", "there is no .*none.py"),
        (f"{tmp_path}/bad.py:X", "fails: ZeroDivisionError"),
        ("torch.nn:absent", "defines no 'absent'; it has"),
        ("no_such_module_at_all:X", "fails: ModuleNotFoundError"),
    ):
        with pytest.raises(PluginError, match=message):
            load(target, argument="target")
    assert load("torch.nn:ReLU") is nn.ReLU


STEP = """
    class VAE(Parts):
        def reparameterize(self, mu, logvar):
            return mu + (0.5 * logvar).exp() * torch.randn_like(mu)

        def kl(self, mu, logvar):
            return nats(mu, logvar).sum()

        def loss(self, x):
            mu, logvar = self.heads(x)
            error = ((self.leave(self.reparameterize(mu, logvar)) - x) ** 2).sum()
            return 0.5 * error + self.divergence(mu, logvar)

        def divergence(self, mu, logvar):
            return self.kl(mu, logvar)

    class Own(VAE):
        def divergence(self, mu, logvar):
            return nats(mu, logvar).sum()

    class Minus(VAE):
        def divergence(self, mu, logvar):
            return -self.kl(mu, logvar)

    class Wide(VAE):
        def sample_prior(self, n):
            return 3 * torch.randn(n, 3)

    class Left(VAE):
        loss = kl = None
        def forward(self, x):
            mu, logvar = self.heads(x)
            self.kl_loss = 0.01 * nats(mu, logvar)
            return self.leave(self.reparameterize(mu, logvar))

    class Turned(Left):
        def forward(self, x):
            mu, logvar = self.heads(x)
            self.kl_loss = -nats(mu, logvar)
            return self.leave(self.reparameterize(mu, logvar))

    def make_step():
        model = VAE()
        def step():
            return model.loss(batch)
        return step

    def log_posterior(w, mu, rho):
        s = F.softplus(rho)
        return (-0.5 * math.log(2 * math.pi) - s - (w - mu) ** 2 / (2 * s**2)).sum()

    class Density(nn.Module):
        def __init__(self, volume=1.0):
            super().__init__()
            self.scale, self.volume = nn.Parameter(torch.tensor([0.2, -0.1])), volume

        def log_prob(self, x):
            z = x.double() * self.scale.exp()
            log_z = -0.5 * (z**2 + math.log(2 * math.pi)).sum(1)
            return log_z + self.volume * self.scale.sum()

    class Leaky(Density):
        def __init__(self):
            super().__init__(-1.0)
"""


@pytest.fixture
def steps(tmp_path):
    return executed(STEP, tmp_path)


def test_an_audit_of_a_step(steps):
    report = audit(steps.VAE, steps.batch)
    assert (report.verdict, report.convention, report.subject) == ("correct", "log_var", "VAE")
    assert "the step is VAE.loss" in report.assumed
    assert audit(steps.make_step).verdict == "correct"
    assert audit(steps.make_step()).subject.endswith("step")
    assert audit(steps.Minus, steps.batch).verdict == "bug"


def test_what_a_step_does_not_show(steps):
    report = audit(steps.Wide, steps.batch)
    assert report.codes == ("prior_mismatch",)
    assert any("in closed form" in line for line in report.checked)


def test_what_is_missing_in_a_step_is_not_made_good_by_the_callables(steps, monkeypatch):
    targets = sys.modules["musigma.audit.targets"]
    blind = AuditReport("step", checked=("z",), missing=("the KL: not seen",))
    monkeypatch.setattr(targets, "audit_step", lambda *_, **__: blind)
    for kind in (steps.VAE, steps.Own, steps.Minus):
        assert audit(kind, steps.batch).missing == blind.missing


def test_the_weight_of_a_kl_that_is_left_in_a_module_is_not_judged(steps):
    for kind in (steps.Left, steps.Turned):
        report = audit(kind, steps.batch)
        assert (report.verdict, report.convention, report.codes) == ("correct", "log_var", ())
        assert any(line.startswith("weight and sign of the KL") for line in report.unchecked)


def test_terms_and_densities(steps):
    assert audit(steps.log_posterior).codes == ("prior_term_mismatch",)
    assert audit(steps.Density, torch.randn(6, 2)).verdict == "correct"
    assert audit(steps.Leaky, torch.randn(6, 2)).verdict == "bug"


def test_models_distributions_and_mappings():
    assert audit(musigma.build("realnvp", (4,), bits=None, depth=2, hidden=8)).verdict == "correct"
    assert audit(ActNorm(3), example=torch.randn(8, 3)).verdict == "correct"
    several = [ActNorm(4), InvertibleConv(4)]
    assert audit(several, example=torch.randn(8, 4)).verdict == "correct"
    with pytest.raises(AuditError, match="list: nothing in it returns a loss"):
        audit([nn.Linear(4, 4)], example=torch.randn(8, 4))
    assert audit(Independent(Normal(torch.zeros(2), 1.0), 1)).verdict == "correct"
    assert audit(Exponential(torch.tensor(2.0))).verdict == "correct"
    flow = {"forward": lambda x: (2 * x, torch.zeros(len(x))), "inverse": lambda z: z / 2}
    assert audit(flow, example=torch.randn(8, 3)).codes == ("logdet_mismatch",)
    with pytest.raises(AuditError, match="speed: expected arguments of audit_vae"):
        audit({"speed": 3})


def wrong(mean, second):
    return -0.5 * (1 + second - mean**2 - second.exp()).sum()


def sampled(mean, second):
    return mean + second.exp() * torch.randn_like(mean)


def test_assert_audited(assert_audited):
    alone = assert_audited(None, sample=sampled, allow=("incomplete",))
    assert alone.convention == "log_std"
    with pytest.raises(AssertionError, match=r"bug kl_mismatch: .*\n.*\n  repair: "):
        assert_audited({"sample": sampled, "kl": wrong})
    assert assert_audited(None, sample=sampled, kl=wrong, allow=("kl_mismatch",)).verdict == "bug"


def test_the_fixture_is_the_function(assert_audited):
    assert assert_audited is sys.modules["musigma.audit"].assert_audited


def test_a_report_as_text_json_and_page():
    report = audit({"sample": sampled, "kl": wrong})
    assert json.loads(report.to_json())["findings"][0]["code"] == "kl_mismatch"
    page = report.to_html()
    assert "<script" not in page
    assert "kl_mismatch" in page
    assert "log_std" in str(report)
    odd = Finding("kl_offset", "warning", "<b>&", {"x": float("nan")}, "none")
    report = AuditReport("<i>", findings=(odd, Finding("kl_negative", "bug", "m", repair="r")))
    assert (report.verdict, report.codes) == ("bug", ("kl_negative", "kl_offset"))
    assert json.loads(report.to_json())["findings"][1]["numbers"]["x"] is None
    assert "<i>" not in report.to_html()
    with pytest.raises(ValueError, match=r"none of musigma\.audit\.CODES"):
        Finding("kl", "bug", "m", repair="r")
    with pytest.raises(ValueError, match="repair: a finding of kl_offset needs one"):
        Finding("kl_offset", "bug", "m")


def test_each_code_has_a_page_a_picture_and_a_line_in_the_index(request):
    docs = request.config.rootpath / "docs"
    pages = {page.stem: page.read_text() for page in (docs / "findings").glob("*.md")}
    index = pages.pop("README")
    assert set(pages) == set(CODES)
    for code, row in CODES.items():
        meaning = row.title
        assert pages[code].startswith(f"# `{code}`: {meaning}\n")
        assert f"](../figures/findings/{code}.svg)" in pages[code]
        assert (docs / "figures" / "findings" / f"{code}.svg").is_file()
        assert f"[`{code}`]({code}.md) | {meaning.replace('|', chr(92) + '|')} |" in index


def test_the_command(file, tmp_path, capsys):
    main(["audit", f"{file}:VAE", "--json"])
    assert json.loads(capsys.readouterr().out)["convention"] == "log_var"
    with pytest.raises(SystemExit) as left:
        main(["audit", f"{file}:Squared", "--out", str(tmp_path / "a.html")])
    assert left.value.code == 1
    assert "bug kl_mismatch: " in capsys.readouterr().out
    assert "kl_mismatch" in (tmp_path / "a.html").read_text()
    main(["audit", f"{file}:Squared", "--allow", "kl_mismatch"])
    main(["audit", f"{file}:VAE", "--shape", "3x4x4"])
    for words, message in (
        ([f"{file}:VAE", "--shape", "3xq"], "shape: expected sizes"),
        ([f"{file}:VAE", "--allow", "nothing"], "allow: unknown code 'nothing'"),
        ([f"{file}:VAE", "--out", "a.pdf"], "out: expected a .html"),
        ([f"{file}:VAE", "--shape", "3x5x5"], "no shape that was tried is accepted"),
        (["nowhere"], "RUN: there is no run folder"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["audit", *words])
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_the_command_on_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--steps", "5", "--evaluations", "1", "--device", "cpu", "--out", "run"]
    main(["train", "vae", "digits", "--net", "mlp", "--width", "8", *quick])
    capsys.readouterr()
    main(["audit", "run", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] in ("correct", "warning")  # after five steps latents are empty
    assert not any(f["severity"] == "bug" for f in report["findings"])
