"""Residual and continuous flows: contractions, Runge-Kutta steps, and their log-determinants."""

import itertools

import pytest
import torch
from torch import nn

from musigma import build
from musigma.audit import audit_model, audit_step
from musigma.layers import NeuralODE, Residual
from musigma.layers.residual import estimated, step_forward
from musigma.model import Inverse
from musigma.nets import MLP, LipschitzMLP
from musigma.nets.lipschitz import spectral_bound
from musigma.solvers import ConvergenceError, fixed_point
from musigma.testing import check_layer, randomized
from tests.families import check_flow_family, parts, training_step

LAYERS = {
    "residual": lambda c: Residual(LipschitzMLP(3, 3, hidden=[6, 6], context=c)),
    "ode": lambda c: NeuralODE(MLP(4, 3, hidden=[6], context=c), steps=2),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_laws(name, context):
    check_layer(LAYERS[name](context), (3,), context=context)


@parts
@pytest.mark.parametrize(
    ("name", "below", "options"),
    [
        ("residual", 3.0, {"depth": 3, "hidden": 16}),
        ("cnf", 2.3, {"time_steps": 3, "hidden": 32}),
    ],
    ids=["residual", "cnf"],
)
def test_family(name, below, options, part):
    check_flow_family(name, part, below=below, train={"steps": 200, "lr": 0.02}, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("residual", {"depth": 6, "hidden": 32}), ("cnf", {"time_steps": 4, "hidden": 32})],
    ids=["residual", "cnf"],
)
def test_family_in_500_steps(name, options):
    check_flow_family(name, "training", below=2.2, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("residual", {"depth": 2, "hidden": 8}), ("cnf", {"time_steps": 2, "hidden": 8})],
    ids=["residual", "cnf"],
)
def test_models_and_steps_with_estimates_pass_the_audit(name, options):
    assert audit_model(build(name, (4,), bits=None, **options)).verdict == "correct"
    step = training_step(build(name, (4,), bits=None, exact=2, **options))
    torch.manual_seed(0)
    values = [float(step().detach()) for _ in range(2)]
    assert values[0] != values[1]
    report = audit_step(step)
    assert not report.findings, report
    assert any("log-determinant" in line for line in report.checked), report


# -- the Lipschitz bound


def test_the_spectral_bound_is_above_and_near_the_norm():
    for shape in ((5, 3), (3, 5), (1, 4), (40, 40)):
        w = torch.randn(shape, dtype=torch.float64)
        ratio = spectral_bound(w) / torch.linalg.matrix_norm(w, 2)
        assert 1 - 1e-12 < ratio < min(shape) ** (1 / 128) + 1e-12
    assert torch.allclose(spectral_bound(torch.eye(9)), torch.tensor(9 ** (1 / 128)))
    for size in (0.0, 1e-25, 1e15):
        bound = spectral_bound(size * torch.eye(2))
        assert torch.allclose(bound, torch.tensor(size * 2 ** (1 / 128)), rtol=1e-4)
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spectral_bound, w)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_lipschitz_networks_are_contractions_whatever_their_weights(scale):
    net = randomized(LipschitzMLP(4, 4, hidden=[8, 8], bound=0.9), scale=scale)
    x = 10 * torch.randn(200, 4, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda t: net(t[None])[0]))(x)
    assert torch.linalg.matrix_norm(jacobians, 2).max() <= 0.9
    near = x + 1e-3 * torch.randn_like(x)
    assert ((net(near) - net(x)).norm(dim=1) <= 0.9 * (near - x).norm(dim=1)).all()


# -- log-determinants


def test_the_estimate_is_unbiased_and_so_is_its_gradient():
    """Its expectation, over all signs and numbers of terms, is the exact log-determinant."""
    net = randomized(LipschitzMLP(3, 3, hidden=[5], bound=0.6), scale=3.0)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *net.parameters()]
    log_det = step_forward(net, x)[1]
    truth = [log_det, *torch.autograd.grad(log_det.sum(), leaves, materialize_grads=True)]
    mean = [torch.zeros_like(t) for t in truth]
    for signs in itertools.product([-1.0, 1.0], repeat=3):
        noise = torch.tensor(signs, dtype=torch.float64).expand(2, 3)
        for further in range(1, 20):
            y, value = estimated(net, x, noise, further)
            assert torch.equal(y, x + net(x))
            found = [value, *torch.autograd.grad(value.sum(), leaves, materialize_grads=True)]
            mean = [m + 2.0 ** -(3 + further) * f for m, f in zip(mean, found, strict=True)]
    for m, t in zip(mean, truth, strict=True):
        assert torch.allclose(m, t, atol=1e-5)
    assert any(t.abs().max() > 1e-2 for t in truth[1:])


@pytest.mark.parametrize("name", LAYERS)
def test_estimates_are_made_in_training_only(name):
    layer = LAYERS[name](0).double()
    layer.exact_features = 2
    x = torch.randn(4, 3, dtype=torch.float64)
    exact, (y, estimate) = layer.eval()(x), layer.train()(x)
    assert torch.allclose(y, exact[0])
    assert (estimate != exact[1]).all()
    again, back = layer.inverse(y)
    assert torch.allclose(again, x, atol=1e-10)
    assert (back != -exact[1]).all()
    with torch.no_grad():
        assert layer(x)[1].shape == (4,)
    layer.exact_features = 3
    assert torch.equal(layer(x)[1], exact[1])


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_the_inverse(name):
    layer = randomized(LAYERS[name](0))
    parameters = dict(layer.named_parameters())

    def inverse(y, *values):
        named = {f"bijection.{k}": v for k, v in zip(parameters, values, strict=True)}
        return torch.func.functional_call(Inverse(layer), named, (y,))

    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    leaves = [p.detach().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(inverse, (y, *leaves), atol=1e-6, fast_mode=True)


# -- what does not converge


def test_maps_that_are_not_invertible_are_refused():
    layer = Residual(nn.Linear(2, 2)).double()
    layer.net.weight.data = torch.tensor([[0.0, 3.0], [3.0, 0.0]])  # |det| = 8, with sign -1
    x = torch.randn(3, 2)
    layer.float()
    with pytest.raises(ConvergenceError, match="not invertible here"):
        layer(x)
    with pytest.raises(ConvergenceError, match="no contraction here"):
        layer.inverse(x)
    fast = NeuralODE(nn.Linear(3, 2), steps=1)
    fast.net.weight.data = torch.tensor([[0.0, 40.0, 0.0], [-30.0, 0.0, 0.0]])
    with pytest.raises(ConvergenceError, match="no contraction here"):
        fast.inverse(x)


def test_fixed_points():
    x = fixed_point(lambda x: 0.9 * x + 1, torch.zeros(3, 2, dtype=torch.float64))
    assert torch.allclose(x, torch.full_like(x, 10.0), rtol=1e-11)
    with pytest.raises(ConvergenceError, match=r"after 1000 steps.*moves by 2"):
        fixed_point(lambda x: -x, torch.ones(1, 1))
    with pytest.raises(ConvergenceError, match="moves by nan"):
        fixed_point(lambda x: x * torch.nan, torch.ones(1, 1))


# -- parity with other libraries, from the same weights


def test_residual_parity():
    residual = pytest.importorskip("normflows.flows.residual")
    net = randomized(LipschitzMLP(2, 2, hidden=[6], bound=0.8), scale=3.0)
    layer, theirs = Residual(net), residual.iResBlock(net, brute_force=True).eval()
    x = torch.randn(5, 2, dtype=torch.float64)
    y, log_det = layer(x)
    expected, minus_log_det = theirs(x.clone(), 0)
    assert torch.allclose(y, expected, atol=1e-12)
    assert torch.allclose(log_det, -minus_log_det[:, 0], atol=1e-12)
    with torch.no_grad():
        error = theirs._inverse_fixed_point(y, atol=1e-12, rtol=1e-12) - layer.inverse(y)[0]
    assert error.abs().max() < 1e-6


def field():
    net = randomized(MLP(4, 3, hidden=[8]), scale=2.0)
    return net, torch.randn(5, 3, dtype=torch.float64)


def test_continuous_parity_with_torchdiffeq():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    net, x = field()
    with torch.no_grad():
        y, log_det = NeuralODE(net, steps=40)(x)

    def slope(t, state):
        at, _ = state
        joined = torch.cat([at, t.expand(len(at), 1)], 1)
        rows = torch.func.vmap(torch.func.jacrev(lambda v: net(v[None])[0]))(joined)
        return net(joined), rows[:, :, :3].diagonal(dim1=1, dim2=2).sum(1)

    with torch.no_grad():
        path, traces = torchdiffeq.odeint(
            slope, (x, torch.zeros_like(log_det)), torch.tensor([0.0, 1.0]).double(),
            rtol=1e-10, atol=1e-10, method="dopri5",
        )  # fmt: skip
    assert torch.allclose(path[-1], y, atol=1e-6)
    assert torch.allclose(traces[-1], log_det, atol=1e-6)


def test_continuous_parity_with_zuko():
    zuko = pytest.importorskip("zuko.transforms")
    net, x = field()
    theirs = zuko.FreeFormJacobianTransform(
        f=lambda t, v: net(torch.cat([v, t.expand(*v.shape[:-1], 1)], -1)),
        t0=x.new_tensor(0.0), t1=x.new_tensor(1.0), phi=tuple(net.parameters()),
        atol=1e-10, rtol=1e-9, exact=True,
    )  # fmt: skip
    with torch.no_grad():
        expected, trace = theirs.call_and_ladj(x)
        y, log_det = NeuralODE(net, steps=40)(x)
    assert torch.allclose(expected, y, atol=1e-6)
    assert torch.allclose(trace, log_det, atol=1e-6)


def test_the_error_of_the_steps_is_of_fourth_order():
    net, x = field()
    with torch.no_grad():
        truth = NeuralODE(net, steps=128)(x)
        errors = [
            [
                float((a - b).abs().max())
                for a, b in zip(NeuralODE(net, steps=n)(x), truth, strict=True)
            ]
            for n in (4, 8)
        ]
    for coarse, fine in zip(*errors, strict=True):
        assert 11 < coarse / fine < 22
