"""Embeddings of a context: sets, series, sequences; what they depend on, and what they learn."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import musigma
from musigma import Dataset, Spec, TrainConfig, Variable, build, checkpoint, fit
from musigma.cli import main
from musigma.conditional import Conditional
from musigma.data import Given
from musigma.nets import EMBEDDINGS, DeepSet, Embedding, embedding, embedding_of

NAN = math.nan
EVENTS, AGE, SEX = Variable("events", (9, 2)), Variable("age"), Variable("sex", names=("f", "m"))
PHOTO = Variable("photo", (1, 8, 8), levels=256)
COLUMNS = tuple(Variable(f"x_{i}") for i in range(6))
OF_SEQUENCES = ("set", "conv", "transformer")


def rows(variables, n=5, seed=0):
    """A context of n random rows, without padding."""
    generator = torch.Generator().manual_seed(seed)

    def one(v):
        if v.classes:
            return torch.eye(v.classes)[torch.arange(n) % v.classes]
        if v.levels:
            return torch.randint(0, v.levels, (n, *v.shape), generator=generator).float()
        return 3 + 2 * torch.randn(n, *v.shape, generator=generator)

    return {v.name: one(v) for v in variables}


def made(text, variables):
    """A calibrated embedding with random weights, in float64."""
    torch.manual_seed(1)
    net = musigma.testing.randomized(embedding_of(text, variables), seed=2).double().eval()
    if hasattr(net, "calibrate"):
        net.calibrate({k: t.double() for k, t in rows(variables, 64, seed=3).items()})
    return net


def doubles(context):
    return {name: t.double() for name, t in context.items()}


TAKEN = [
    ("none", (AGE, SEX, PHOTO)),
    ("mlp", (AGE, SEX, PHOTO)),
    ("mlp", (Variable("age", (3,)),)),
    *((kind, (EVENTS,)) for kind in OF_SEQUENCES),
    *((kind, (EVENTS, AGE, SEX, PHOTO)) for kind in OF_SEQUENCES),
    *((kind, (*COLUMNS, SEX)) for kind in OF_SEQUENCES),
    ("conv", (PHOTO, AGE, SEX)),
    ("set", (EVENTS, Variable("more", (4, 1)))),
]


@pytest.mark.parametrize(("kind", "variables"), TAKEN)
def test_an_embedding_is_a_finite_vector_that_depends_on_every_variable(kind, variables):
    net, context = made(kind, variables), doubles(rows(variables))
    for t in context.values():
        t.requires_grad_()
    vector = net(context)
    assert vector.shape == (5, net.features)
    assert vector.isfinite().all()
    weight = torch.randn(net.features, dtype=torch.float64)
    grads = torch.autograd.grad((vector @ weight).sum(), list(context.values()))
    for name, grad in zip(context, grads, strict=True):
        assert grad.flatten(1).abs().sum(1).gt(0).all(), name
    torch.testing.assert_close(net({k: t[2:3] for k, t in context.items()}), vector[2:3])


@pytest.mark.parametrize(("kind", "variables"), [t for t in TAKEN if t[0] != "none"])
def test_the_units_of_the_data_do_not_matter(kind, variables):
    """Numbers and elements are standardized by statistics of their own features."""
    torch.manual_seed(0)
    nets = [embedding_of(kind, variables).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    context = doubles(rows(variables, 20))
    for t in context.values():
        if t.ndim == 3:
            t[:3, -2:] = NAN
    scale = torch.tensor([1e3, 1e-2], dtype=torch.float64)

    def other(v, t):
        if v.classes or v.levels:
            return t
        return t * (scale if v == EVENTS else 40) - 7

    changed = {v.name: other(v, context[v.name]) for v in variables}
    for net, given in zip(nets, (context, changed), strict=True):
        net.calibrate(given)
    torch.testing.assert_close(nets[1](changed), nets[0](context))


@pytest.mark.parametrize("kind", OF_SEQUENCES)
def test_statistics_of_a_sequence_ignore_padding(kind):
    net, events = embedding_of(kind, [EVENTS]), rows([EVENTS], 40)["events"]
    lengths = torch.arange(40) % 10
    events[torch.arange(9) >= lengths[:, None]] = NAN
    net.calibrate({"events": events})
    flat = events.double().reshape(-1, 2).numpy()
    np.testing.assert_allclose(net.elements[0].mean, np.nanmean(flat, 0), rtol=1e-6)
    np.testing.assert_allclose(net.elements[0].std, np.nanstd(flat, 0), rtol=1e-6)
    before = net.state_dict()["elements.0.mean"].clone()
    net.calibrate({"events": 2 * events})
    assert torch.equal(net.elements[0].mean, before)


def test_statistics_of_numbers_that_form_a_set_are_shared_and_those_of_tokens_are_not():
    context = rows(COLUMNS, 50)
    context["x_0"] = 100 * context["x_0"]
    together = torch.cat(list(context.values()), 1).double()
    for kind, dims in (("set", (0, 1)), ("conv", (0, 1)), ("transformer", (0,))):
        net = embedding_of(kind, COLUMNS)
        net.calibrate(context)
        expected = together.std(dims, correction=0).float().reshape(net.elements[0].std.shape)
        torch.testing.assert_close(net.elements[0].std, expected)


@pytest.mark.parametrize("kind", OF_SEQUENCES)
@pytest.mark.parametrize("variables", [(EVENTS,), (EVENTS, AGE, SEX)])
def test_nothing_depends_on_padding(kind, variables):
    net, context = made(kind, variables), doubles(rows(variables))
    lengths = torch.tensor([9, 4, 1, 0, 7])
    context["events"][torch.arange(9) >= lengths[:, None]] = NAN
    vector = net(context)
    assert vector.isfinite().all()
    for i, length in enumerate(lengths.tolist()):
        for room in range(length, 10):
            one = {name: t[i : i + 1] for name, t in context.items()}
            one["events"] = one["events"][:, :room]
            torch.testing.assert_close(net(one), vector[i : i + 1], rtol=1e-10, atol=1e-10)
    context["events"].requires_grad_()
    (grad,) = torch.autograd.grad(net(context).sum(), context["events"])
    inside = torch.arange(9) < lengths[:, None]
    assert grad[~inside].eq(0).all()
    assert grad[inside].isfinite().all()


def test_a_set_does_not_depend_on_order_wherever_its_padding_is():
    net, context = made("set", (EVENTS, AGE)), doubles(rows((EVENTS, AGE)))
    context["events"][0, 6:] = NAN
    vector = net(context)
    for seed in range(3):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        changed = context | {"events": context["events"][:, order]}
        torch.testing.assert_close(net(changed), vector, rtol=1e-10, atol=1e-10)
    net, context = made("set", COLUMNS), doubles(rows(COLUMNS))
    swapped = dict(zip(context, reversed(list(context.values())), strict=True))
    torch.testing.assert_close(net(swapped), net(context), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["conv", "transformer"])
@pytest.mark.parametrize("variables", [(EVENTS,), COLUMNS])
def test_a_series_depends_on_order(kind, variables):
    net, context = made(kind, variables), doubles(rows(variables))
    if variables == COLUMNS:
        other = dict(zip(context, reversed(list(context.values())), strict=True))
    else:
        other = {"events": context["events"].flip(1)}
    assert (net(other) - net(context)).abs().max() > 1e-3


def test_a_set_takes_more_elements_than_training_had():
    net = made("set", (EVENTS,))
    events = torch.randn(3, 50, 2).double()
    assert net(events).shape == (3, 32)
    padded = torch.cat([events, torch.full((3, 7, 2), NAN).double()], 1)
    torch.testing.assert_close(net(padded), net(events))


@pytest.mark.parametrize("kind", ["conv", "transformer"])
def test_others_refuse_more_elements_than_training_had(kind):
    net = made(kind, (EVENTS,))
    with pytest.raises(
        ValueError, match="'events' has 10 elements of 2 numbers per row, and not "
    ):
        net(torch.randn(3, 10, 2))


def test_an_element_that_is_nan_in_part_is_not_padding():
    net, events = made("set", (EVENTS,)), doubles(rows((EVENTS,)))["events"]
    events[1, 4, 0] = NAN
    assert net(events).isfinite().all(1).tolist() == [True, False, True, True, True]


def test_a_set_is_the_statistics_that_it_documents():
    net = DeepSet(2, width=4, blocks=0).double()
    x, mask = torch.randn(1, 6, 2).double(), torch.tensor([[True, True, False, True, False, True]])
    expected = torch.cat([net.enter(x[mask]).mean(0), torch.tensor([math.log(5)])])
    torch.testing.assert_close(net(x, mask)[0], expected)


@pytest.mark.parametrize(
    ("kind", "variables", "message"),
    [
        (
            "none",
            (AGE, EVENTS),
            r"none takes numbers, classes and images; got 'events' of shape \(9, 2\); set",
        ),
        ("mlp", (EVENTS,), r"set, conv and transformer take sequences \(--embed set\)"),
        ("set", (PHOTO, AGE), r"set needs sequences or numbers, and .*'photo' \(images\), 'age'"),
        ("transformer", (SEX,), "transformer needs sequences or numbers, .*; use mlp"),
        ("conv", (SEX,), "conv needs sequences or numbers or images"),
        ("mlp", (Variable("volume", (1, 2, 3, 4)),), "got 'volume' of shape .*; leave it out, or"),
        ("sett", (EVENTS,), "did you mean 'set'.* known are none, .*mlp, set, conv, transformer"),
        ("set widht=3", (EVENTS,), "set takes features=32 width=64 blocks=1; got 'widht=3'"),
        ("set width=big", (EVENTS,), "got 'width=big'"),
        ("set width=0 blocks=1.5 deep", (EVENTS,), "got 'width=0', 'blocks=1.5', 'deep'"),
        ("transformer width=10", (EVENTS,), "heads: expected a divisor of the width 10; got 4"),
        ("conv kernel=4", (EVENTS,), "odd kernel; got 4"),
        ("", (EVENTS,), "known are none"),
    ],
)
def test_what_an_embedding_cannot_take_is_refused_by_name(kind, variables, message):
    with pytest.raises(ValueError, match=message):
        build("nsf", Spec((2,), context=variables), embed=kind)


def test_faults_of_a_context_are_named_together():
    net = made("set", (EVENTS, AGE))
    given = {"events": torch.randn(2, 9, 3), "size": torch.randn(2, 1)}
    with pytest.raises(ValueError, match=r"'size' is unknown; 'events' has 9 elements of 3 .*age"):
        net(given)


def test_an_embedding_without_a_context_is_refused():
    for shape in ((2,), Spec((2,))):
        with pytest.raises(ValueError, match="embed: 'mlp' has no context to embed"):
            build("nsf", shape, bits=None, embed="mlp")
    with pytest.raises(ValueError, match="embed: autoencoder_kl has no such option"):
        build("autoencoder_kl", (3, 16, 16), embed="mlp")


MODELS = [
    ("nsf", (3,), {"depth": 1, "hidden": 8}),
    ("maf", (3,), {"depth": 1, "hidden": 8}),
    ("realnvp", (3,), {"depth": 1}),
    ("vae", (3,), {"width": 8}),
    ("glow", (1, 8, 8), {"levels": 1, "depth": 1, "hidden": 4}),
    ("vae", (1, 8, 8), {"width": 8}),
    ("ladder", (1, 8, 8), {"width": 8}),
]


@pytest.mark.parametrize(("name", "shape", "options"), MODELS)
@pytest.mark.parametrize(
    ("kind", "variables"),
    [
        ("set width=8 features=3", (EVENTS, AGE)),
        ("conv width=8", (PHOTO, SEX)),
        ("mlp width=8", (SEX,)),
        ("transformer width=8", COLUMNS[:3]),
    ],
)
def test_every_architecture_takes_every_embedding_and_is_saved(
    name, shape, options, kind, variables, tmp_path
):
    levels = 256 if len(shape) == 3 else None
    spec = Spec(shape, levels=levels, context=variables)
    model = build(name, spec, embed=kind, **options)
    assert isinstance(model, Conditional)
    assert model.config["options"]["embed"] == kind
    model = musigma.testing.randomized(model, seed=1).float().eval()
    context = rows(variables, 3)
    context = context if len(context) > 1 else context[variables[0].name]
    x = torch.randint(0, 256, (3, *shape)).float() if levels else torch.randn(3, *shape)
    model.calibrate(x, context)
    assert model.spec == spec
    checkpoint.save(model, tmp_path / "m.safetensors")
    again = checkpoint.load(tmp_path / "m.safetensors")
    assert again.config == json.loads(json.dumps(model.config))
    bounds = []
    for each in (model, again):
        torch.manual_seed(0)
        bounds.append(each.elbo(x, context))
    assert bounds[0].isfinite().all()
    assert torch.equal(*bounds)
    assert model.sample(3, context).shape == (3, *shape)


def test_typed_rows_take_an_embedding():
    from musigma.schema import Column, Schema

    rng = np.random.default_rng(0)
    table = rng.normal(size=(200, 2)).round(1)
    schema = Schema([Column("a"), Column("b", step=0.1)]).measure(table)
    model = build("table", Spec((2,), schema=schema, context=(EVENTS,)), embed="set", hidden=16)
    model.eval()
    events = rows([EVENTS])["events"]
    nats = model.log_prob(torch.tensor(table[:5]), events)
    assert nats.shape == (5,)
    with torch.no_grad():
        model = musigma.testing.randomized(model, seed=3).float().eval()
        x = torch.tensor(table[:1]).expand(5, 2)
        assert len(model.log_prob(x, events).unique()) == 5


def test_the_default_is_that_of_files_without_the_option():
    spec = Spec((2,), context=(AGE, SEX))
    torch.manual_seed(0)
    before = build("realnvp", spec, depth=1)
    torch.manual_seed(0)
    after = build("realnvp", spec, depth=1, embed="none")
    assert "embed" not in after.config["options"]
    assert before.config == after.config
    assert list(before.state_dict()) == list(after.state_dict())
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))
    assert isinstance(before.embedding, Embedding)
    names = {name for name in before.state_dict() if name.startswith("embedding.")}
    assert names == {f"embedding.{name}" for name in ("mean0", "std0", "calibrated")}
    assert not isinstance(build("nsf", Spec((2,), context=(SEX,))), Conditional)


def test_a_context_given_as_a_number_of_features_can_be_embedded():
    model = build("nsf", (2,), bits=None, context=4, embed="mlp features=7", depth=1)
    assert model.spec == Spec((2,), context=(Variable("context", (4,)),))
    assert model.config["options"]["context"] == 7
    assert model.log_prob(torch.randn(3, 2), torch.randn(3, 4)).shape == (3,)
    again = checkpoint.rebuild(model.config)
    assert again.config == model.config
    image = build("glow", (1, 8, 8), context=4, embed="mlp", levels=1, depth=1, hidden=4)
    assert image.spec.bits == 8


@pytest.fixture
def registry():
    """Remove the embeddings that a test adds, as a new process would."""
    before = dict(EMBEDDINGS)

    def back() -> None:
        EMBEDDINGS.clear()
        EMBEDDINGS.update(before)

    yield back
    back()


def test_an_embedding_of_ones_own(registry):
    @embedding
    def powers(variables, *, degree=2):
        class Powers(nn.Module):
            features = degree

            def forward(self, context):
                return torch.cat([context ** (k + 1) for k in range(degree)], 1)

        return Powers()

    model = build("nsf", Spec((2,), context=(AGE,)), embed="powers degree=3", depth=1)
    assert model.config["options"]["context"] == 3
    assert model.log_prob(torch.randn(4, 2), torch.randn(4, 1)).isfinite().all()
    with pytest.raises(ValueError, match="powers takes degree=2; got 'power=3'"):
        build("nsf", Spec((2,), context=(AGE,)), embed="powers power=3")


def test_embeddings_of_another_form_are_refused(registry):
    with pytest.raises(TypeError, match=r"form \(variables, \*, option=default"):

        @embedding
        def positional(variables, width):
            return None

    with pytest.raises(ValueError, match="the library has a 'mlp' already"):

        @embedding
        def mlp(variables):
            return None

    @embedding
    def unknown_size(variables):
        return nn.Linear(1, 1)

    with pytest.raises(TypeError, match="must return a torch module with `features`"):
        build("nsf", Spec((2,), context=(AGE,)), embed="unknown_size")


OWN = """
import torch
from torch import nn

class Squares(nn.Module):
    def __init__(self, variables, *, scale=1.0):
        super().__init__()
        self.scale, self.names = scale, [v.name for v in variables]
        self.features = 2 * len(variables)

    def forward(self, context):
        h = torch.cat([context[name] for name in self.names], 1)
        return torch.cat([h, self.scale * h**2], 1)
"""


def test_an_embedding_from_a_file(tmp_path, monkeypatch, capsys, registry):
    def call(words):
        try:
            main(shlex.split(words))
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    rng = np.random.default_rng(0)
    np.savez("given.npz", a=rng.normal(size=60), b=rng.normal(size=60))
    np.save("theta.npy", rng.normal(size=(60, 2)).astype(np.float32))
    words = "--given given.npz --depth 1 --hidden 4 --batch-size 8 --evaluations 1 --device cpu"
    words = f"train nsf theta.npy --out run --steps 2 {words}"
    assert call(f"{words} --embed './own.py:Squares scale=0.5'") == 0
    options = json.loads(Path("run/config.json").read_text())["model"]["options"]
    assert options["embed"] == "Squares scale=0.5"
    assert options["context"] == 4
    registry()
    asked = "sample run --n 1 --given given.npz --out s.npy"
    for again in (asked, "train --resume run"):
        capsys.readouterr()
        assert call(again) == 2
        assert "--plugin FILE.py:Squares" in capsys.readouterr().err
    assert call(f"{asked} --plugin own.py:Squares") == 0
    registry()
    assert call("train --resume run --plugin own.py:Squares") == 0
    assert call(f"{words}2 --embed own.py:square") == 2
    assert "own.py defines no 'square'; it has Squares" in capsys.readouterr().err
    assert call(f"{words.replace('run', 'other')} --embed sett") == 2
    assert "did you mean 'set'" in capsys.readouterr().err
    assert not Path("other").exists()


def test_training_standardizes_by_all_rows(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_cauchy((3000, 4, 1)).astype(np.float32)
    x[::3, 2:] = NAN
    theta = rng.normal(size=(3000, 2)).astype(np.float32)
    data = Dataset(theta, given={"x": Given(x)})
    model = build("nsf", data.spec(["x"]), embed="set width=4", depth=1, hidden=4)
    config = TrainConfig(steps=1, batch_size=8, evaluations=1, evaluate_on=8)
    fit(model, data, data.subset(range(50)), config, tmp_path)
    found = musigma.load(tmp_path / "last.safetensors").embedding.elements[0]
    flat = x.astype(np.float64).ravel()
    np.testing.assert_allclose([found.mean], [[np.nanmean(flat)]], rtol=1e-5)
    np.testing.assert_allclose([found.std], [[np.nanstd(flat)]], rtol=1e-5)


def test_lists_in_a_file_of_parquet_are_sets(tmp_path, monkeypatch, capsys, registry):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)

    def write(name, n, low, high):
        theta = rng.normal(size=(n, 2))
        x = [rng.normal(t, size=(rng.integers(low, high + 1), 2)).tolist() for t in theta]
        columns = {"theta_0": theta[:, 0], "theta_1": theta[:, 1], "x": x}
        pq.write_table(pa.table(columns), name)

    def call(words):
        capsys.readouterr()
        main([*shlex.split(words), "--json"])
        return json.loads(capsys.readouterr().out)

    monkeypatch.chdir(tmp_path)
    write("sims.parquet", 300, 1, 6)
    write("observed.parquet", 3, 9, 12)  # more than in training
    words = "train nsf sims.parquet --of theta_* --given x --steps 3 --depth 1 --hidden 8"
    words += " --batch-size 32 --evaluations 1 --device cpu"
    call(f"{words} --out run --embed 'set width=16'")
    model = checkpoint.load("run/model.safetensors")
    assert model.spec.context == (Variable("x", (6, 2)),)
    assert bool(model.embedding.elements[0].calibrated)
    call("sample run --given observed.parquet --n 2 --out draws.csv")
    assert len(Path("draws.csv").read_text().splitlines()) == 7
    call("score run observed.parquet --out scores.csv")
    assert len(Path("scores.csv").read_text().splitlines()) == 4
    call(f"{words} --out other --embed conv")
    for wrong, message in [
        (f"{words} --out none", "set, conv and transformer take sequences"),
        (
            "score other observed.parquet --out s.csv",
            "elements of 2 numbers per row, and not up to 6",
        ),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(wrong))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not Path("none").exists()
    assert not Path("s.csv").exists()


# --- what is learned -----------------------------------------------------------------------------


def gaussian_means(n, most, seed, low=1):
    """θ ~ N(0, 1)², and 1 .. `most` observations N(θ, 1.5²): (θ, x with NaN rows)."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(n, 2)).astype(np.float32)
    x = (theta[:, None] + 1.5 * rng.normal(size=(n, most, 2))).astype(np.float32)
    counts = rng.integers(low, most + 1, n)
    x[np.arange(most) >= counts[:, None]] = NAN
    return torch.from_numpy(theta), torch.from_numpy(x)


def true_posterior(x):
    """N(mean, variance) of θ given its observations."""
    n = (~x.isnan().any(2)).sum(1, keepdim=True)
    precision = 1 + n / 1.5**2
    mean = x.nan_to_num().sum(1) / 1.5**2 / precision
    return torch.distributions.Independent(
        torch.distributions.Normal(mean, precision.rsqrt().expand_as(mean)), 1
    )


def trained(model, theta, x, steps, *, batch_size=128, lr=4e-3):
    """Minimize the nats on rows of simulations, with a cosine schedule."""
    model.calibrate(theta[:2000], x[:2000])
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        which = torch.randint(len(theta), (batch_size,), generator=generator)
        optimizer.zero_grad()
        (-model.log_prob(theta[which], x[which]).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def divergence(model, x, draws=50):
    """KL(truth, model) in nats, averaged over observations."""
    truth = true_posterior(x)
    theta = truth.sample((draws,))
    nats = [truth.log_prob(one) - model.log_prob(one, x) for one in theta]
    return float(torch.stack(nats).mean())


@pytest.mark.slow
def test_a_set_learns_the_posterior_of_a_mean_for_any_number_of_observations():
    torch.manual_seed(0)
    theta, x = gaussian_means(20_000, 10, seed=1)
    spec = Spec((2,), context=(Variable("x", tuple(x.shape[1:])),))
    model = build("maf", spec, embed="set width=32", depth=2, hidden=32, standardize=True)
    before = divergence(model, gaussian_means(500, 10, seed=2)[1])
    trained(model, theta, x, 400)
    after = divergence(model, gaussian_means(500, 10, seed=2)[1])
    assert before > 0.5
    assert after < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maf", "nsf"])
def test_a_set_learns_the_posterior_of_a_mean_at_the_default_sizes(name):
    torch.manual_seed(0)
    theta, x = gaussian_means(20_000, 20, seed=1)
    spec = Spec((2,), context=(Variable("x", tuple(x.shape[1:])),))
    model = build(name, spec, embed="set", standardize=True)
    trained(model, theta, x, 1000, lr=2e-3)
    assert divergence(model, gaussian_means(1000, 20, seed=2)[1]) < 0.03


def autoregressions(n, length, seed):
    """φ ~ U(-0.95, 0.95), and x_t = φ x_{t-1} + N(0, 1)."""
    rng = np.random.default_rng(seed)
    phi = rng.uniform(-0.95, 0.95, (n, 1))
    x = rng.normal(size=(n, length))
    for t in range(1, length):
        x[:, t] += phi[:, 0] * x[:, t - 1]
    return torch.from_numpy(phi.astype(np.float32)), torch.from_numpy(x.astype(np.float32))


@torch.no_grad()
def divergence_of_phi(model, x, context, draws=20):
    """KL(truth, model) in nats; given x, φ is normal within its bounds."""
    before, after = x[:, :-1].double(), x[:, 1:].double()
    precision = (before**2).sum(1)
    free = torch.distributions.Normal((before * after).sum(1) / precision, precision.rsqrt())
    low, high = (free.cdf(torch.tensor(end, dtype=torch.float64)) for end in (-0.95, 0.95))
    torch.manual_seed(5)
    phi = free.icdf(low + torch.rand(draws, len(x), dtype=torch.float64) * (high - low))
    phi = phi.clamp(-0.95, 0.95)
    nats = [
        free.log_prob(one) - (high - low).log() - model.log_prob(one[:, None].float(), context)
        for one in phi
    ]
    return float(torch.stack(nats).mean())


@pytest.mark.slow
def test_a_series_tells_its_coefficient_to_convolutions_and_transformers():
    """And, after as many steps, not to a network of all numbers."""
    length, found = 50, {}
    variables = tuple(Variable(f"x_{i}") for i in range(length))

    def columns(x):
        return dict(zip((v.name for v in variables), x[:, None].unbind(2), strict=True))

    class OfColumns(nn.Module):
        def __init__(self, kind):
            super().__init__()
            spec = Spec((1,), context=variables)
            self.model = build("maf", spec, embed=kind, standardize=True, hidden=64, depth=3)

        def log_prob(self, phi, x):
            return self.model.log_prob(phi, columns(x))

        def calibrate(self, phi, x):
            self.model.calibrate(phi, columns(x))

    phi, x = autoregressions(20_000, length, seed=1)
    test = autoregressions(1000, length, seed=2)[1]
    for kind in ("none", "mlp", "conv", "transformer"):
        torch.manual_seed(0)
        model = trained(OfColumns(kind), phi, x, 500, lr=3e-3)
        found[kind] = divergence_of_phi(model, test, test)
    assert found["none"] > 0.12
    assert found["mlp"] > 0.12
    assert found["conv"] < 0.08
    assert found["transformer"] < 0.1


def test_the_help_names_every_embedding(capsys):
    main(["train", "nsf", "--help"])
    text = capsys.readouterr().out.split("--embed")[1].split("--ensemble")[0]
    assert all(kind in text for kind in ("none", "quantile", "mlp", "set", "conv", "transformer"))
