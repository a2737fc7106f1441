"""Integer discrete flows: masses of integers, their gradients, and their own rate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from musigma import build
from musigma.coding import Codec, Quantizer, compress, decompress
from musigma.coding.densities import law_of
from musigma.coding.numerics import Rounding
from musigma.distributions import IntegerLogisticHead, IntegerLogisticMixture
from musigma.layers import Coupling, IntegerShift
from musigma.nets import MLP, Constant
from musigma.tensors import rounded
from musigma.testing import check_head, check_layer, check_model, randomized
from tests.families import nats_after
from tests.test_coding import exact, put, undone


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mixture(*shape, components=3):
    shape = (shape[0], components, *shape[1:])
    parts = torch.randn(shape, dtype=torch.float64), 4 * torch.randn(shape, dtype=torch.float64)
    return IntegerLogisticMixture(*parts, torch.randn(shape, dtype=torch.float64), len(shape) - 2)


def logistic_mass(n, mean, scale):
    """The mass of the cell of n by SciPy, by the smaller of both tails."""
    low, high = ((n + side - mean) / scale for side in (-0.5, 0.5))
    upper = stats.logistic.sf(low) - stats.logistic.sf(high)
    return np.where(n > mean, upper, stats.logistic.cdf(high) - stats.logistic.cdf(low))


def test_masses_are_those_of_logistic_cells():
    dist, n = mixture(2, 5), torch.arange(-60, 61, dtype=torch.float64)
    found = dist.log_prob(n[:, None, None].expand(-1, 2, 5)).exp()
    cells = logistic_mass(
        n.numpy()[:, None, None, None], dist.means.numpy(), dist.log_scale.exp().numpy()
    )
    true = (dist.log_weights.exp().numpy() * cells).sum(2).prod(-1)
    np.testing.assert_allclose(found.numpy(), true, rtol=1e-9)


def test_masses_far_away_are_finite_and_differentiable():
    mean = torch.zeros(1, 1, 3, requires_grad=True)
    log_scale = torch.tensor([[[-9.0, 0.0, 5.0]]], requires_grad=True)
    far = IntegerLogisticMixture(torch.zeros(1, 1, 3), mean, log_scale, 1)
    nats = far.log_prob(torch.tensor([[4000.0, -4000.0, 4000.0]]))
    nats.sum().backward()
    for t in (nats, mean.grad, log_scale.grad):
        assert t.isfinite().all()


def test_draws_have_the_masses():
    torch.manual_seed(0)
    dist = mixture(1, 1)
    drawn = dist.sample((20_000,))[:, 0, 0]
    for n in drawn.unique()[::3]:
        p = float(dist.log_prob(n.reshape(1, 1)).exp())
        share = float((drawn == n).double().mean())
        assert share == pytest.approx(p, abs=5 * math.sqrt(p / 20_000) + 1e-4)


@pytest.mark.parametrize("context", [0, 3])
def test_heads_obey_all_laws(context):
    prior = IntegerLogisticHead(Constant((6 * 2, 3, 2), context=context), 2, components=2)
    check_head(prior, None, (2, 3, 2), context=context)
    net = MLP(5, 6 * 4, hidden=[6], context=context)
    head = IntegerLogisticHead(net, 4, components=2, event_ndims=1)
    check_head(head, torch.randn(4, 5), (4,), context=context)


def test_calibration_begins_near_the_data_and_happens_once():
    x = torch.randint(90, 110, (500, 1, 4, 4)).float()
    model = build("idf", (1, 4, 4), depth=1, hidden=8, levels=2)
    with torch.no_grad():
        before = float(model.bits_per_dim(x).mean())
        model.calibrate(x)
        after = float(model.bits_per_dim(x).mean())
        model.calibrate(5 * x)
        assert float(model.bits_per_dim(x).mean()) == after
    assert math.log2(20) < after < math.log2(20) + 0.6 < before
    again = build("idf", (1, 4, 4), depth=1, hidden=8, levels=2)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.log_prob(x), model.log_prob(x))


def test_a_missing_context_is_named():
    with pytest.raises(ValueError, match="context: this prior needs 3 features"):
        Constant((2,), context=3)()


@settings(max_examples=60, deadline=None)
@given(st.floats(-(2.0**21), 2.0**21, width=32), st.sampled_from([torch.float32, torch.float64]))
def test_rounding_is_exact_and_passes_the_gradient(value, dtype):
    t = torch.tensor(value, dtype=dtype, requires_grad=True)
    y = rounded(t)
    assert y == t.detach().round()
    y.backward()
    assert t.grad == 1


@pytest.mark.parametrize("context", [0, 2])
def test_the_integer_coupling_obeys_all_laws(context):
    coupling = Coupling(MLP(2, 3, hidden=[7], context=context), map=IntegerShift(40.0))
    check_layer(coupling, (5,), context=context, compiled=not context)
    check_layer(coupling, (5,), context=context, bits=3)


def test_a_straight_through_gradient_is_held_to_its_own_law():
    """What a map does not declare is compared with the differences of the function as it is."""

    class Undeclared(IntegerShift):
        straight_through = False

    with pytest.raises(AssertionError, match="gradients: against finite differences"):
        check_layer(Coupling(MLP(2, 3, hidden=[7]), map=Undeclared(4.0)), (5,))


def test_the_flow_maps_integers_to_integers_and_back_far_from_the_data():
    model = randomized(build("idf", (4,), bits=4, depth=6, hidden=8), scale=3.0).float()
    x = torch.randint(-500, 500, (200, 4)).float()
    (z,) = model.encode(x)
    assert torch.equal(z, z.round())
    assert not torch.equal(z, x)
    assert torch.equal(model.decode([z]), x)


@pytest.mark.parametrize("depth", [1, 5])
def test_the_mass_of_two_integers_sums_to_one(depth):
    model = randomized(build("idf", (2,), bits=2, depth=depth, hidden=8, components=2), scale=2.0)
    side = torch.arange(-150, 151, dtype=torch.float64)
    with torch.no_grad():
        masses = model.log_prob(torch.cartesian_prod(side, side)).exp()
    assert masses.max() > 1e-3
    assert float(masses.sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4,), {"depth": 3, "hidden": 8}),
        ((1, 8, 8), {"levels": 2, "depth": 1, "hidden": 8}),
        ((3, 4, 8), {"levels": 1, "depth": 2, "hidden": 8, "context": 3}),
    ],
)
def test_models_obey_all_laws(shape, options):
    model = build("idf", shape, bits=3, **options)
    assert model.exact
    check_model(model, shape, bits=3, context=options.get("context", 0))


@pytest.mark.parametrize(
    ("shape", "bits", "message"),
    [((4,), None, "bits: an integer discrete flow needs"), ((1,), 8, "at least 2 elements")],
)
def test_what_it_cannot_model_is_refused(shape, bits, message):
    with pytest.raises(ValueError, match=message):
        build("idf", shape, bits=bits)


def curved(n, seed=0):
    """Two integers: the second is a curve of the first, plus a little noise."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 32, n)
    second = (first - 16) ** 2 // 10 + rng.choice(3, n, p=[0.2, 0.6, 0.2])
    return np.stack([first, second], 1)


ENTROPY = math.log(32) - 0.6 * math.log(0.6) - 0.4 * math.log(0.2)


def trained(data, bits, steps, lr=5e-3, **options):
    """An integer flow after some steps on all rows of the data."""
    model = build("idf", data.shape[1:], bits=bits, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = torch.from_numpy(data).float()
    model.calibrate(rows[:512])
    for _ in range(steps):
        optimizer.zero_grad()
        (-model.log_prob(rows[torch.randint(len(rows), (128,))]).mean()).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def test_training_comes_close_to_the_entropy():
    """Logistic components cannot be uniform on 32 levels, and cost 0.1 nats."""
    model = trained(curved(4096), 5, 500, lr=1e-2, depth=3, hidden=32)
    with torch.no_grad():
        nats = -float(model.log_prob(torch.from_numpy(curved(2000, 1)).float()).mean())
    assert ENTROPY < nats < ENTROPY + 0.5


# -- coding


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 9999))
def test_the_law_of_integers_is_invertible_and_has_the_masses(seed):
    torch.manual_seed(seed)
    dist = mixture(2, 3)
    law = law_of(dist, Quantizer(Rounding(), 0, 2, drawn=False))
    undone(law, seed)
    values = dist.sample()
    put(law, values.long().numpy())
    n = torch.arange(-20, 20, 3).reshape(-1, 1, 1).expand(-1, 2, 3)
    found = np.stack([exact(law, v.numpy()) for v in n])
    parts = (t.movedim(1, -1) for t in (dist.log_weights, dist.means, dist.log_scale))
    terms = IntegerLogisticMixture(*parts, event_ndims=0)
    np.testing.assert_allclose(found, terms.log_prob(n.double()).exp().numpy(), atol=3e-3)


def test_a_value_without_mass_is_refused():
    law = law_of(mixture(1, 2), Quantizer(Rounding(), 0, 1, drawn=False))
    with pytest.raises(OverflowError, match="too far"):
        put(law, np.array([[0, law.half]]))


@pytest.mark.parametrize(
    ("shape", "bits", "options"),
    [((4,), 5, {"depth": 2}), ((1, 8, 8), 4, {"levels": 2, "depth": 1})],
)
def test_compression_reaches_the_rate_of_the_model(shape, bits, options, tmp_path):
    """Without loss, and within one percent."""
    rng = np.random.default_rng(0)
    walk = rng.integers(-1, 2, (12_000 // math.prod(shape), *shape)).cumsum(-1) + 2 ** (bits - 1)
    x = walk.clip(0, 2**bits - 1)
    model = trained(x, bits, 30, hidden=16, **options)
    codec = Codec(model, numerics="exact", latents=[])
    coded = codec.pack(x, None, b"")
    assert (codec.unpack(coded, shape, None, b"") == x).all()
    with torch.no_grad():
        own = -float(model.log_prob(torch.from_numpy(x).float()).sum()) / math.log(2)
    assert coded.bits == pytest.approx(own, rel=0.01)
    compress(model, x, tmp_path / "x.mus")
    assert (decompress(tmp_path / "x.mus", model).levels == x).all()


def test_the_trainer_trains_it():
    def images(n, seed=0):
        return curved(2 * n, seed).reshape(n, 1, 2, 2).astype(np.uint8)

    model = build("idf", (1, 2, 2), bits=8, levels=1, depth=2, hidden=16)
    assert nats_after(model, data=images, steps=50, lr=3e-2) < 4 * math.log(200)


def test_a_network_that_is_not_finite_is_reported():
    model = build("idf", (2,), bits=2, depth=1, hidden=4)
    nn.init.constant_(next(model.parameters()), math.nan)
    assert model.log_prob(torch.ones(3, 2)).isnan().all()
