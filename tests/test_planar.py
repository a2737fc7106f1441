"""Planar, radial and Sylvester bijections, and the flows made of them."""

import pytest
import torch

from musigma import build
from musigma.layers import Planar, Radial, Sylvester
from musigma.model import Inverse
from musigma.testing import check_layer, check_model, jacobian, randomized
from tests.families import check_flow_family, parts

LAYERS = {
    "planar": lambda c: Planar(4, context=c, hidden=[6]),
    "radial": lambda c: Radial(4, context=c, hidden=[6]),
    "sylvester": lambda c: Sylvester(4, context=c, hidden=[2]),
    "sylvester of rank 2": lambda c: Sylvester(4, rank=2, context=c, hidden=[2]),
    "sylvester by reflections": lambda c: Sylvester(
        4, rank=3, reflections=2, context=c, hidden=[2]
    ),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_laws(name, context):
    check_layer(LAYERS[name](context), (4,), context=context)


@parts
@pytest.mark.parametrize(
    ("name", "below", "options"),
    [
        ("planar", 2.9, {"depth": 6}),
        ("radial", 2.9, {"depth": 6}),
        ("sylvester", 3.1, {"depth": 4}),
    ],
    ids=["planar", "radial", "sylvester"],
)
def test_family(name, below, options, part):
    check_flow_family(name, part, below=below, hidden=8, train={"lr": 0.02}, **options)


def test_sylvester_by_reflections_is_a_family():
    model = build("sylvester", (5,), bits=None, depth=2, rank=2, reflections=3, context=2)
    x, given = torch.randn(4, 5), torch.randn(4, 2)
    z = model.encode(x, given)
    assert torch.allclose(model.decode(z, given), x, atol=1e-4)


@pytest.mark.parametrize("text", ["planar", "radial", "sylvester reflections=2"])
def test_posteriors_of_these_flows(text):
    """Their parameters come from the encoder, and draws take one pass."""
    options = {"latents": 3, "width": 6, "posterior": f"{text} depth=2"}
    model = build("vae", (4,), bits=None, **options)
    check_model(model, (4,))
    inverted = [layer for layer in model.modules() if isinstance(layer, Inverse)]
    assert bool(inverted) is (text != "radial")
    assert not any(layer.slow_inverse for layer in inverted)


def test_a_new_planar_flow_neither_contracts_nor_expands_on_average():
    """Without the shift of u, each transform multiplies densities at its center by 0.7."""
    x = torch.zeros(1, 3)
    starts = torch.cat([Planar(3)(x)[1] for _ in range(300)])
    assert abs(starts.mean()) < 3 * starts.std() / 300**0.5 + 0.03
    assert starts.std() > 0.05


@pytest.mark.parametrize("product", [-300.0, -30.0, -1.0, 0.0, 30.0, 300.0])
def test_planar_layers_are_invertible_whatever_their_parameters(product):
    """The product w^T u is far beyond the condition; normflows' form overflows at 300."""
    layer = Planar(3).double()
    w = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    u = product * w / w.square().sum() + torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    layer.numbers.constants.data = torch.cat([w, u, torch.tensor([0.1], dtype=torch.float64)])
    x = 3 * torch.randn(20, 3, dtype=torch.float64)
    y, log_det = layer(x)
    again, back = layer.inverse(y)
    assert torch.allclose(layer(again)[0], y, atol=1e-11)
    truth = torch.linalg.slogdet(jacobian(lambda t: layer(t)[0], x))
    assert (truth.sign > 0).all()
    if product > -20:  # at -1 + 1e-6 the slope near the center is all rounding
        assert torch.allclose(again, x, atol=1e-6)
        assert torch.allclose(truth.logabsdet, log_det, atol=1e-7)
        assert torch.allclose(log_det, -back, atol=1e-7)


@pytest.mark.parametrize("diagonal", [-40.0, 40.0])
def test_sylvester_layers_are_invertible_at_the_ends_of_their_diagonals(diagonal):
    layer = randomized(Sylvester(3))
    _, r_diagonal, s_diagonal, *_ = layer.numbers.constants.data.split(layer.sizes)
    r_diagonal.fill_(diagonal)
    s_diagonal.fill_(40.0)
    x = torch.randn(20, 3, dtype=torch.float64)
    y, log_det = layer(x)
    assert log_det.isfinite().all()
    assert torch.allclose(layer(layer.inverse(y)[0])[0], y, atol=1e-11)


def test_radial_layers_are_inverted_at_their_center_and_far_away():
    layer = randomized(Radial(3))
    center = layer.numbers.constants[:3].detach()
    x = center + torch.tensor([0.0, 1e-12, 1e-6, 1.0, 1e6]).double()[:, None] * torch.ones(3)
    y, log_det = layer(x)
    again, back = layer.inverse(y)
    assert torch.allclose(again, x, rtol=1e-12, atol=1e-14)
    assert torch.allclose(log_det, -back, atol=1e-9)
    (gradient,) = torch.autograd.grad(layer(x.requires_grad_())[1].sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_the_inverse(name):
    layer = randomized(LAYERS[name](3))
    given = torch.randn(2, 3, dtype=torch.float64)
    y = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def inverse(y, *values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(Inverse(layer), named_in(named), (y, given))

    def named_in(named):
        return {f"bijection.{k}": v for k, v in named.items()}

    leaves = [p.detach().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(inverse, (y, *leaves), atol=1e-6, fast_mode=True)


# -- parity with other libraries, from the same weights


def test_planar_parity():
    nf = pytest.importorskip("normflows")
    pyro = pytest.importorskip("pyro.distributions.transforms.planar")
    layer, x = randomized(Planar(5)), torch.randn(7, 5, dtype=torch.float64)
    w, u, b = layer.numbers.constants.detach().split([5, 5, 1])
    theirs = nf.flows.Planar((5,), u=u[None], w=w[None], b=b).double()
    y, log_det = layer(x)
    assert torch.allclose(theirs(x)[0], y, atol=1e-10)
    assert torch.allclose(theirs(x)[1], log_det, atol=1e-10)
    theirs = pyro.ConditionedPlanar((b, u, w))
    assert torch.allclose(theirs(x), y, atol=1e-10)
    assert torch.allclose(theirs.log_abs_det_jacobian(x, theirs(x)), log_det, atol=1e-10)


def test_radial_parity():
    nf = pytest.importorskip("normflows")
    pyro = pytest.importorskip("pyro.distributions.transforms.radial")
    layer, x = randomized(Radial(5)), torch.randn(7, 5, dtype=torch.float64)
    center, alpha, k = layer.numbers.constants.detach().split([5, 1, 1])
    y, log_det = layer(x)
    theirs = pyro.ConditionedRadial((center, alpha, k))
    assert torch.allclose(theirs(x), y, atol=1e-10)
    assert torch.allclose(theirs.log_abs_det_jacobian(x, theirs(x)), log_det, atol=1e-10)
    theirs = nf.flows.Radial((5,), z_0=center[None]).double()
    theirs.alpha.data, theirs.beta.data = torch.nn.functional.softplus(alpha), k
    assert torch.allclose(theirs(x)[0], y, atol=1e-10)
    assert torch.allclose(theirs(x)[1], log_det, atol=1e-10)


def test_sylvester_parity_where_pyro_agrees_with_its_own_jacobian():
    """pyro multiplies rows by Q, R and S as if they were columns.

    Its log-determinant is then that of its map only if Q is the identity, as for two equal
    reflections; R and S of its map are the transposed ones, so features are reversed.
    """
    pyro = pytest.importorskip("pyro.distributions.transforms.sylvester")
    theirs = randomized(pyro.Sylvester(4, count_transforms=2), scale=4)
    x = torch.randn(6, 4, dtype=torch.float64)

    def error():
        truth = torch.linalg.slogdet(jacobian(lambda t: theirs._call(t), x)).logabsdet
        theirs._call(x)
        return float((theirs._cached_logDetJ - truth).detach().abs().max())

    assert error() > 1e-3
    theirs.u_unnormed.data[1] = theirs.u_unnormed.data[0]
    assert error() < 1e-7
    layer = Sylvester(4, reflections=2).double()
    i, j = torch.triu_indices(4, 4, 1)
    turned = [m.detach().T.flip(0, 1)[i, j] for m in (theirs.R(), theirs.S())]
    diagonals = [theirs.R_diag.detach().flip(0), theirs.S_diag.detach().flip(0)]
    reflections = torch.tensor([1.0, 0, 0, 0, 1.0, 0, 0, 0])
    parts = [reflections, *diagonals, theirs.b.detach().flip(0), *turned]
    layer.numbers.constants.data = torch.cat(parts).double()
    y, log_det = layer(x.flip(1))
    assert torch.allclose(y.flip(1), theirs._call(x), atol=2e-6)
    assert torch.allclose(log_det, theirs._cached_logDetJ, atol=2e-6)
