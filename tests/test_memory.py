"""Memory modes: less is kept for the backward pass, and gradients are the same."""

import pytest
import torch
from torch import nn

import musigma
from musigma import memory
from musigma.data import Dataset
from musigma.distributions import StandardNormal
from musigma.layers import ActNorm, Coupling, InvertibleConv, Permutation
from musigma.memory import fallbacks, set_fallbacks, set_memory
from musigma.model import VAE, Bijection, Chain, Prior
from musigma.nets import MLP
from musigma.testing import randomized
from musigma.training import TrainConfig, check_run
from musigma.training.hardware import saved_bytes

MODELS = {
    "glow": ("published_glow", (3, 16, 16), {"depth": 3, "levels": 2, "hidden": 12, "edge": True}),
    "glow, conditional": ("glow", (3, 8, 8), {"depth": 2, "levels": 2, "hidden": 8, "context": 3}),
    "glow, learned noise": ("glow", (3, 8, 8), {"depth": 2, "hidden": 8, "dequantize": "learned"}),
    "glow, plain": ("glow", (3, 8, 8), {"depth": 2, "hidden": 8, "permutation": "conv"}),
    "realnvp": ("realnvp", (2, 8, 8), {"depth": 2, "hidden": 8}),
    "realnvp, vectors": ("realnvp", (7,), {"depth": 6, "hidden": 16}),
    "nsf": ("nsf", (5,), {"bits": 8, "depth": 2, "hidden": 8}),
    "nsf, autoregressive": (
        "nsf",
        (5,),
        {"bits": 8, "kind": "autoregressive", "depth": 2, "hidden": 8, "context": 3},
    ),
    "vae, flow prior": ("vae", (1, 8, 8), {"prior": "flow", "width": 8}),
}


def build_model(name, dtype=torch.float64):
    kind, shape, options = MODELS[name]
    torch.manual_seed(0)
    model = randomized(musigma.build(kind, shape, **options), scale=0.3).to(dtype)
    x = torch.randint(0, 256, (6, *shape))
    context = torch.randn(6, 3, dtype=dtype) if options.get("context") else None
    model.calibrate(x, context)
    return model, x, context


def gradients(model, mode, x, context=None, cast=False):
    set_memory(model, mode)
    model.zero_grad()
    torch.manual_seed(1)
    given = None if context is None else context.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        loss = model(x, given).elbo.sum()
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([g.flatten() for g in [*found, *([] if given is None else [given.grad])]])


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_store(name):
    model, x, context = build_model(name)
    truth = gradients(model, "store", x, context)
    assert torch.equal(gradients(model, "checkpoint", x, context), truth)
    assert relative_error(gradients(model, "reversible", x, context), truth) < 1e-12
    assert fallbacks(model) == {}


@pytest.mark.parametrize("name", ["glow", "realnvp, vectors", "vae, flow prior"])
def test_gradients_in_float32_and_under_autocast(name):
    model, x, context = build_model(name, torch.float32)
    truth = gradients(model, "store", x, context)
    assert relative_error(gradients(model, "reversible", x, context), truth) < 1e-5
    assert fallbacks(model) == {}
    low = gradients(model, "store", x, context, cast=True)
    assert torch.equal(gradients(model, "checkpoint", x, context, cast=True), low)
    # bfloat16 has 8 bits: an input that is off in its 23rd bit may be rounded the other way
    assert relative_error(gradients(model, "reversible", x, context, cast=True), low) < 2e-3


def trained_and_ill_conditioned(condition):
    """A flow fitted to ill-conditioned data, with mixings of a given condition number."""
    torch.manual_seed(0)
    layers = []
    for _ in range(6):
        layers += [ActNorm(8), InvertibleConv(8), Coupling(MLP(4, 8, hidden=[32]))]
    model = Chain(layers, Prior(StandardNormal((8,))))
    mixing = torch.randn(8, 8) @ torch.diag(torch.logspace(0, -2, 8))
    x = torch.randn(256, 8) @ mixing
    model.calibrate(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (-model.log_prob(x).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        for layer in layers[1::3]:
            spread = torch.linspace(-0.5, 0.5, 8) * torch.log(torch.tensor(float(condition)))
            layer.log_scale.add_(spread[torch.randperm(8)])
    return model, x


@pytest.mark.parametrize("condition", [1, 2, 10, 1e5])
def test_an_ill_conditioned_flow_falls_back_before_its_gradients_are_wrong(condition):
    model, x = trained_and_ill_conditioned(condition)
    truth = gradients(model, "store", x)
    assert relative_error(gradients(model, "reversible", x), truth) < 1e-5
    assert relative_error(gradients(model, "checkpoint", x), truth) < 1e-5
    assert bool(fallbacks(model)) == (condition >= 10)


class Lossy(Bijection):
    """A bijection whose inverse is wrong."""

    def __init__(self, error):
        super().__init__()
        self.scale, self.error = nn.Parameter(torch.tensor(0.3)), error

    def forward(self, x, context=None):
        return x * self.scale.exp(), self.scale * x[0].numel() * x.new_ones(len(x))

    def inverse(self, y, context=None):
        return y * (-self.scale).exp() + self.error, -self.scale * y.new_ones(len(y))


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_a_wrong_inverse_is_detected_and_gradients_are_still_right(error):
    torch.manual_seed(0)
    layers = [Coupling(MLP(2, 6, hidden=[8])), Lossy(error), Coupling(MLP(2, 6, hidden=[8]))]
    model = Chain([Permutation.reverse(5), *layers], Prior(StandardNormal((5,)))).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    truth = gradients(model, "store", x)
    assert torch.equal(gradients(model, "reversible", x), truth)
    ((name, reason),) = fallbacks(model).items()
    assert name == "layers.0"
    assert reason.startswith("inverted, ")
    restored = Chain([Permutation.reverse(5), *layers], Prior(StandardNormal((5,))))
    set_fallbacks(restored, {name: reason})
    assert fallbacks(restored) == {name: reason}


@pytest.mark.parametrize("noise", ["uniform", "learned"])
def test_reversible_memory_does_not_grow_with_depth(noise):
    kept = {}
    for mode in ("store", "checkpoint", "reversible"):
        for depth in (2, 8):
            options = {"levels": 2, "depth": depth, "hidden": 32, "dequantize": noise}
            model = musigma.build("glow", (3, 16, 16), **options)
            x = torch.randint(0, 256, (8, 3, 16, 16))
            set_memory(model, mode)
            kept[mode, depth] = saved_bytes(lambda: model(x), list(model.parameters()))  # noqa: B023
    grown = {mode: kept[mode, 8] - kept[mode, 2] for mode in ("store", "checkpoint", "reversible")}
    assert grown["checkpoint"] < grown["store"] / 8
    assert grown["reversible"] < grown["checkpoint"] / 50
    assert kept["reversible", 8] < kept["store", 8] / 10


def test_a_reversible_glow_of_any_depth_keeps_less_than_4_mb():
    """32x32x3, three levels, 32 images, hidden 128: `store` keeps some 15 MB for each step."""
    for depth in (4, 8):
        model = musigma.build("glow", (3, 32, 32), bits=None, levels=3, depth=depth)
        set_memory(model, "reversible")
        x = torch.randn(32, 3, 32, 32)
        assert saved_bytes(lambda: model(x), list(model.parameters())) < 4e6  # noqa: B023


def test_a_frozen_flow_is_reversible_for_the_gradient_of_its_context():
    model = musigma.build("realnvp", (8,), depth=12, hidden=64, context=5).requires_grad_(False)
    context, kept = torch.randn(64, 5, requires_grad=True), {}
    for mode in ("store", "reversible"):
        set_memory(model, mode)
        x = torch.randn(64, 8)
        kept[mode] = saved_bytes(lambda x=x: model(x, context), list(model.parameters()))
    assert kept["reversible"] < 0.25 * kept["store"]


def test_blocks_of_networks_are_recomputed():
    for name, shape in (("ladder", (1, 16, 16)), ("vae", (1, 16, 16))):
        torch.manual_seed(0)
        model = musigma.build(name, shape, blocks=2)
        x = torch.randint(0, 256, (4, *shape))
        truth = gradients(model, "store", x)
        before = saved_bytes(lambda: model(x), list(model.parameters()))  # noqa: B023
        assert torch.equal(gradients(model, "checkpoint", x), truth)
        assert saved_bytes(lambda: model(x), list(model.parameters())) < 0.75 * before  # noqa: B023


def test_without_gradients_nothing_is_kept_and_figures_do_not_change():
    model, x, _ = build_model("glow")
    with torch.no_grad():
        torch.manual_seed(0)
        truth = model(x).elbo
        for mode in ("checkpoint", "reversible"):
            set_memory(model, mode)
            torch.manual_seed(0)
            assert torch.equal(model(x).elbo, truth)


def test_modes_without_effect_are_refused():
    vae = musigma.build("vae", (1, 8, 8), net="mlp")
    for mode in ("checkpoint", "reversible"):
        with pytest.raises(ValueError, match="does nothing for this VAE, which has no bij"):
            set_memory(vae, mode)
    with pytest.raises(ValueError, match=r"'reversible' does nothing .*use checkpoint or store"):
        set_memory(musigma.build("ladder", (1, 8, 8)), "reversible")
    with pytest.raises(ValueError, match="memory: expected store, checkpoint, reversible"):
        set_memory(vae, "none")
    set_memory(vae, "store")
    assert memory.fallbacks(VAE(vae.encoder, vae.decoder, vae.prior)) == {}


def test_a_refused_run_leaves_no_mode_behind():
    model, config = build_model("glow, plain")[0], TrainConfig(memory="reversible", steps=1)
    train = Dataset(torch.zeros(8, 3, 8, 8).byte().numpy())
    with pytest.raises(ValueError, match="optimizer: expected"):
        check_run(model, train, config, optimizer=lambda parameters: None)
    assert {m.runner.mode for m in model.modules() if hasattr(m, "runner")} == {"store"}


@pytest.mark.parametrize("name", ["glow", "vae"])
def test_calibration_runs_networks_on_few_examples_at_a_time(name):
    options = {"vae": {"prior": "flow"}}.get(name, {})
    model = musigma.build(name, (1, 8, 8), **options)
    seen = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    model.calibrate(torch.randint(0, 256, (150, 1, 8, 8)).float())
    assert seen
    assert max(seen) <= 64
