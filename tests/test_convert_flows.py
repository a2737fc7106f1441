"""Flows of zuko, nflows and normflows become musigma models of the same density."""

import nflows.flows
import nflows.transforms as nt
import normflows as nf
import pytest
import torch
import zuko
from nflows.distributions import StandardNormal
from nflows.nn.nets import ResidualNet
from torch import nn

from musigma import build, checkpoint
from musigma.audit import audit_step
from musigma.cli import main
from musigma.convert import ForeignError, from_flow
from musigma.testing import check_model, randomized
from tests.families import training_step


def noisy(flow):
    """A copy in float64 with noise on all parameters."""
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow.double().eval()


def nflows_flow(features, *transforms):
    return nflows.flows.Flow(nt.CompositeTransform(list(transforms)), StandardNormal([features]))


def nflows_net(inputs, outputs, context=None):
    return ResidualNet(inputs, outputs, hidden_features=12, context_features=context)


def nsf_coupling(features, even, context=None):
    return nt.PiecewiseRationalQuadraticCouplingTransform(
        torch.arange(features) % 2 == even,
        lambda i, o: nflows_net(i, o, context),
        num_bins=5,
        tails="linear",
        tail_bound=3.0,
    )


def nsf_masked(features, context=None):
    return nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        features, 12, context_features=context, num_bins=4, tails="linear", tail_bound=2.5
    )


def normflow(features, *layers):
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(features), list(layers))


def masked_affine(features, even):
    mask = (torch.arange(features) % 2 == even).float()
    nets = [nf.nets.MLP([features, 10, 8, features]) for _ in range(2)]
    return nf.flows.MaskedAffineFlow(mask, *nets)


SMALL = {"hidden_features": (12, 9)}

FLOWS = {
    "zuko MAF": lambda: zuko.flows.MAF(4, **SMALL),
    "zuko MAF, context": lambda: zuko.flows.MAF(4, 2, randperm=True, **SMALL),
    "zuko MAF, ELU": lambda: zuko.flows.MAF(3, activation=nn.ELU, **SMALL),
    "zuko NSF": lambda: zuko.flows.NSF(5, bins=6, **SMALL),
    "zuko NSF, context": lambda: zuko.flows.NSF(4, 3, randperm=True, slope=1e-2, **SMALL),
    "zuko NSF coupling": lambda: zuko.flows.NSF(5, 2, passes=2, **SMALL),
    "zuko RealNVP": lambda: zuko.flows.RealNVP(5, 2, **SMALL),
    "zuko NICE, random masks": lambda: zuko.flows.NICE(5, randmask=True, **SMALL),
    "nflows MAF": lambda: nflows.flows.MaskedAutoregressiveFlow(4, 12, 2, 2),
    "nflows MAF, batch norm between": lambda: ran(
        nflows.flows.MaskedAutoregressiveFlow(4, 12, 2, 1, batch_norm_between_layers=True), 4
    ),
    "nflows RealNVP": lambda: nflows.flows.SimpleRealNVP(5, 12, 3, 2),
    "nflows NSF coupling": lambda: nflows_flow(
        5, nt.RandomPermutation(5), nsf_coupling(5, 0), nt.LULinear(5), nsf_coupling(5, 1)
    ),
    "nflows NSF coupling, context": lambda: nflows_flow(
        4, nsf_coupling(4, 0, 3), nt.PointwiseAffineTransform(torch.ones(4), 2 * torch.ones(4))
    ),
    "nflows NSF": lambda: nflows_flow(4, nsf_masked(4), nt.ReversePermutation(4), nsf_masked(4)),
    "nflows NSF, context": lambda: nflows_flow(4, nsf_masked(4, 2), nt.ActNorm(4)),
    "normflows NSF": lambda: normflow(
        4,
        nf.flows.AutoregressiveRationalQuadraticSpline(4, 2, 12, num_bins=5),
        nf.flows.LULinearPermute(4),
        nf.flows.AutoregressiveRationalQuadraticSpline(4, 1, 12, permute_mask=True),
    ),
    "normflows NSF coupling": lambda: normflow(
        5,
        nf.flows.CoupledRationalQuadraticSpline(5, 2, 12),
        nf.flows.LULinearPermute(5),
        nf.flows.CoupledRationalQuadraticSpline(5, 1, 12, reverse_mask=True),
    ),
    "normflows MAF": lambda: normflow(
        4,
        nf.flows.MaskedAffineAutoregressive(4, 12),
        nf.flows.Permute(4),
        nf.flows.MaskedAffineAutoregressive(4, 12, num_blocks=1),
    ),
    "normflows RealNVP": lambda: normflow(
        4, masked_affine(4, 0), masked_affine(4, 1), ran(nf.flows.ActNorm(4), 4)
    ),
    "normflows blocks": lambda: normflow(
        5,
        nf.flows.AffineCouplingBlock(nf.nets.MLP([3, 8, 4], leaky=0.1)),
        nf.flows.Permute(5, mode="swap"),
        nf.flows.AffineCouplingBlock(nf.nets.MLP([3, 8, 4]), scale_map="sigmoid"),
        nf.flows.InvertibleAffine(5, use_lu=False),
        nf.flows.AffineCouplingBlock(nf.nets.MLP([3, 8, 2]), scale=False),
        nf.flows.AffineCouplingBlock(nf.nets.MLP([3, 8, 4]), scale_map="sigmoid_inv"),
    ),
}


def ran(flow, features):
    """A flow after a pass of training, which sets running averages and initializes layers."""
    flow.train()
    if hasattr(flow, "log_prob"):
        flow.log_prob(2 * torch.randn(64, features) + 1)
    else:
        flow(2 * torch.randn(64, features) + 1)
    return flow


def density(flow, x, context):
    if isinstance(flow, zuko.lazy.Flow):
        return flow(context).log_prob(x)
    return flow.log_prob(x) if context is None else flow.log_prob(x, context)


@pytest.mark.parametrize("name", FLOWS)
def test_the_density_is_that_of_the_flow(name):
    torch.manual_seed(0)
    flow = noisy(FLOWS[name]())
    model = from_flow(flow)
    features = model.spec.shape[0]
    context = None
    if model.spec.context:
        context = torch.randn(50, *model.spec.context[0].shape, dtype=torch.float64)
    x = 2 * torch.randn(50, features, dtype=torch.float64)
    with torch.no_grad():
        expected = density(flow, x, context)
        torch.testing.assert_close(model.log_prob(x, context), expected, rtol=1e-9, atol=1e-8)
        z = model.encode(x, context)
        torch.testing.assert_close(model.decode(z, context), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["zuko NSF, context", "nflows NSF coupling", "normflows blocks"])
def test_converted_models_obey_the_laws(name):
    torch.manual_seed(0)
    model = from_flow(noisy(FLOWS[name]()))
    context = model.config["options"]["context"]
    check_model(randomized(model, scale=0.3), model.spec.shape, context=context)


def test_converted_models_are_saved_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch, zuko\n"
        "torch.manual_seed(0)\n"
        "flow = zuko.flows.NSF(3, transforms=2, hidden_features=[16])\n"
    )
    main(["convert", "mine.py:flow", "model.safetensors"])
    assert "imported" in capsys.readouterr().out
    main(["info", "model.safetensors"])
    assert "converted from mine.py:flow (zuko)" in capsys.readouterr().out
    model = checkpoint.load("model.safetensors")
    torch.manual_seed(0)
    flow = zuko.flows.NSF(3, transforms=2, hidden_features=[16])
    x = torch.randn(20, 3)
    torch.testing.assert_close(model.log_prob(x), flow().log_prob(x), rtol=1e-5, atol=1e-5)
    assert from_flow(flow, columns=("a", "b", "c")).spec.columns == ("a", "b", "c")


def test_the_training_step_of_a_converted_flow_passes_the_audit():
    torch.manual_seed(0)
    model = from_flow(noisy(FLOWS["normflows NSF coupling"]()))
    report = audit_step(training_step(model.float()))
    assert not report.findings, report
    assert any("log-determinant" in line for line in report.checked), report
    with pytest.raises(ValueError, match="musigma convert"):
        build("imported", (3,))


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (lambda: zuko.flows.UNAF(3), "UMNN"),
        (lambda: zuko.flows.GF(3), "is not known"),
        (lambda: zuko.flows.NCSF(3), "CircularRQSTransform"),
        (lambda: nflows_flow(3, nt.Sigmoid()), "Sigmoid"),
        (
            lambda: nflows.flows.MaskedAutoregressiveFlow(
                4, 12, 1, 2, batch_norm_within_layers=True
            ),
            "batch normalization",
        ),
        (lambda: normflow(2, nf.flows.Planar((2,))), "Planar"),
        (lambda: nn.Linear(2, 2), "zuko, nflows, normflows"),
    ],
)
def test_what_is_not_known_is_refused_by_name(flow, message):
    with pytest.raises(ForeignError, match=message):
        from_flow(flow())
