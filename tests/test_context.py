"""A context reaches the networks, or is refused by name; it is never silently ignored."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import musigma
from musigma import VAE, Chain, Dataset, Prior, Spec, TrainConfig, Variable, build, fit
from musigma.conditional import Conditional
from musigma.context import conditioned, takes_context
from musigma.data import Given
from musigma.distributions import StandardNormal
from musigma.gaussian import GaussianHead
from musigma.layers import ActNorm, Coupling
from musigma.memory import fallbacks, set_memory
from musigma.nets import MLP, Embedding
from musigma.zoo import architecture

AGE, SEX = Variable("age"), Variable("sex", names=("f", "m"))


class ByKeyword(nn.Module):
    def forward(self, x, *, context=None):
        return x if context is None else x + context


class WithOption(nn.Module):
    def forward(self, x, scale=2.0):
        return scale * x


class ByOtherName(nn.Module):
    def forward(self, x, y=None):
        return x if y is None else x + y


class AfterAnOption(nn.Module):
    def forward(self, x, scale=1.0, context=None):
        return scale * (x if context is None else x + context)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        (ByKeyword, "keyword"),
        (AfterAnOption, "keyword"),
        (ByOtherName, "position"),
        (MLP, "position"),
        (WithOption, None),
        (nn.Linear, None),
        (nn.Sequential, None),
    ],
)
def test_how_a_network_takes_a_context(kind, way):
    assert takes_context(kind, 2) == way


@pytest.mark.parametrize(
    "wrap", [lambda net: net, lambda net: torch.compile(net, backend="eager"), nn.DataParallel]
)
@pytest.mark.parametrize("net", [ByKeyword(), ByOtherName(), AfterAnOption(), nn.Linear(3, 3)])
def test_wrapped_networks_take_what_they_hold_takes(net, wrap):
    x, context = torch.randn(2, 3), torch.randn(2, 3)
    expected = net(x) if isinstance(net, nn.Linear) else x + context
    assert torch.equal(conditioned(wrap(net), x, context), expected)


@pytest.mark.parametrize("ask", ["log_prob", "elbo", "encode", "sample", "decode"])
def test_an_unconditional_model_refuses_a_context(ask):
    model = build("realnvp", (4,), bits=None, depth=1)
    given = {"sample": 3, "decode": (torch.randn(3, 4),)}.get(ask, torch.randn(3, 4))
    with pytest.raises(ValueError, match="context: this model is not conditioned on anything"):
        getattr(model, ask)(given, torch.randn(3, 2))


class Lookup(nn.Module):
    """Looks the class up, so no gradient reaches the context."""

    def __init__(self):
        super().__init__()
        self.table, self.net = nn.Embedding(2, 3), nn.Linear(2, 4)

    def forward(self, x, context):
        return self.net(x) + self.table(context.argmax(1)).sum(1, keepdim=True)


@architecture
def ignoring(shape, *, bits: int | None = None, context: int = 0) -> Chain:
    return Chain([Coupling(nn.Sequential(nn.Linear(2, 4)))], Prior(StandardNormal(shape)))


@architecture
def looking_up(shape, *, bits: int | None = None, context: int = 0) -> Chain:
    return Chain([Coupling(Lookup())], Prior(StandardNormal(shape)))


@architecture
def half_ignoring(shape, *, bits: int | None = None, context: int = 0) -> Conditional:
    class First(nn.Module):
        def forward(self, given):
            return given["age"]

    return Conditional(build("nsf", shape, bits=None, depth=1, hidden=4, context=1), First())


def table(n=60):
    random = np.random.default_rng(0)
    given = {
        "age": Given(random.normal(size=n).astype(np.float32)),
        "sex": Given(np.arange(n) % 2, names=("f", "m")),
    }
    x = random.normal(size=(n, 4)).astype(np.float32)
    data = Dataset(x, given=given, name="rows")
    return data.subset(range(40)), data.subset(range(40, n))


CONFIG = {"batch_size": 16, "evaluate_on": 20, "evaluations": 1}


@pytest.mark.parametrize(
    ("name", "context", "named"),
    [("ignoring", (AGE, SEX), "'age', 'sex'"), ("ignoring", (SEX,), "'sex'")],
)
def test_training_refuses_a_context_that_no_network_takes(name, context, named, tmp_path):
    model = build(name, Spec((4,), context=context))
    with pytest.raises(ValueError, match=f"context: no network of this .* takes {named}"):
        fit(model, *table(), TrainConfig(steps=2, **CONFIG), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_names_the_variable_that_is_ignored(tmp_path):
    model = build("half_ignoring", (4,))
    model.spec = Spec((4,), context=(AGE, SEX))
    with pytest.raises(ValueError, match="no network of this Conditional takes 'sex', so"):
        fit(model, *table(), TrainConfig(steps=2, **CONFIG), tmp_path / "run")


def test_a_context_without_a_gradient_may_be_looked_up(tmp_path):
    model = build("looking_up", Spec((4,), context=(SEX,)))
    assert fit(model, *table(), TrainConfig(steps=2, **CONFIG), tmp_path / "run").finished


def test_training_refuses_a_model_of_which_no_file_can_be_made(tmp_path):
    model = Chain([ActNorm(4)], Prior(StandardNormal((4,))))
    with pytest.raises(ValueError, match="model: this one was composed by hand"):
        fit(model, *table(), TrainConfig(steps=2, **CONFIG), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_conditional_prior_below_layers_in_every_memory_mode():
    torch.manual_seed(0)
    inner = build("nsf", Spec((4,), context=(AGE, SEX)), depth=1, hidden=4)
    model = musigma.testing.randomized(Chain([ActNorm(4), Coupling(MLP(2, 4))], inner), seed=1)
    x = torch.randn(5, 4).double()
    given = {"age": torch.randn(5, 1).double(), "sex": torch.eye(2)[[0, 1, 1, 0, 0]].double()}
    assert model.sample(5, given).shape == (5, 4)
    found = {}
    for mode in ("store", "checkpoint", "reversible"):
        set_memory(model, mode)
        grads = torch.autograd.grad(model(x, given).elbo.sum(), list(model.parameters()))
        found[mode] = torch.cat([g.flatten() for g in grads])
    torch.testing.assert_close(found["checkpoint"], found["store"], rtol=0, atol=0)
    torch.testing.assert_close(found["reversible"], found["store"])
    assert fallbacks(model) == {
        "layers.0": "its context is a mapping; embed it in a tensor (Conditional)"
    }


def test_a_conditional_distribution_broadcasts_like_those_of_torch():
    model = build("nsf", Spec((3,), context=(AGE, SEX)), depth=1, hidden=32)
    given = {"age": torch.randn(5, 1), "sex": torch.eye(2)[[0, 1, 1, 0, 0]]}
    dist = musigma.testing.randomized(model, seed=2).float().as_distribution(given)
    x = torch.randn(3)
    one, many = dist.log_prob(x), dist.log_prob(x.expand(7, 5, 3))
    assert one.shape == (5,)
    torch.testing.assert_close(many, one.expand(7, 5))
    assert len(one.unique()) == 5
    assert dist.log_prob(x[None]).shape == (5,)


def test_names_of_variables_may_hold_commas():
    embed = Embedding([Variable("height, cm"), SEX])
    given = {"height, cm": torch.randn(2, 1), "sex": torch.eye(2)}
    assert embed(given).shape == (2, 3)
    with pytest.raises(ValueError, match="'cm' is unknown"):
        embed(given | {"cm": torch.randn(2, 1)})


def test_images_of_integers_are_embedded_as_their_levels():
    embed = Embedding([Variable("photo", (1, 8, 8), levels=256)]).eval()
    image = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(embed({"photo": image}), embed({"photo": image.float()}))
    assert embed.double()({"photo": image}).dtype == torch.float64


@pytest.mark.parametrize("value", [0.1, 1e8 / 3, -7e-6, 0.0])
@pytest.mark.parametrize("n", [1, 500])
def test_a_constant_column_is_not_divided_by_its_rounding(value, n):
    embed, column = Embedding([AGE]), torch.full((n, 1), value)
    embed.calibrate({"age": column})
    assert float(embed.get_buffer("std0")) == 1
    torch.testing.assert_close(
        embed({"age": column + 1}), torch.ones(n, 1), rtol=0, atol=max(1e-6, abs(value) * 1e-6)
    )


def test_terms_that_are_not_one_number_per_example_are_refused():
    """A likelihood over elements instead of events would broadcast against the KL."""

    class Elements(nn.Module):
        def forward(self, z, context=None):
            return Normal(z, 1.0)

    model = VAE(
        GaussianHead(nn.Linear(2, 4), event_ndims=1), Elements(), Prior(StandardNormal((2,)))
    )
    with pytest.raises(ValueError, match=r"VAE: expected a term of shape \(B,\).* got \(2, 2\)"):
        model(torch.randn(2, 2))


def test_a_context_of_arrays_or_of_another_kind_is_refused_by_name():
    model = build("maf", Spec((2,), context=(Variable("x_0"),)))
    with pytest.raises(ValueError, match=r"'x_0': expected a tensor \(.*\); got ndarray"):
        model.log_prob(torch.randn(1, 2), {"x_0": np.ones((1, 1), np.float32)})  # pyright: ignore
    with pytest.raises(ValueError, match=r"expected a tensor, or a mapping .*; got list"):
        model.sample(1, context=[1.0])  # pyright: ignore


def test_rows_of_a_context_that_differ_in_number_are_counted():
    model = build("maf", Spec((2,), context=(Variable("x_0"), Variable("x_1"))))
    context = {"x_0": torch.randn(3, 1), "x_1": torch.randn(1, 1)}
    with pytest.raises(ValueError, match="rows differ, 3 of x_0, 1 of x_1: make them equal"):
        model.log_prob(torch.randn(3, 2), context)
