"""normflows: densities by maximum likelihood, and its own VAE with a flow."""

from __future__ import annotations

from collections.abc import Callable

import normflows as nf
import torch

DISTRIBUTION = "normflows"
EXPECTED = dict.fromkeys(
    ["real_nvp", "neural_spline", "residual", "glow", "maf", "vae", "vae_planar"], "correct"
)
EXPECTED["residual"] = "incomplete"  # its log-determinant is a stochastic estimate

Step = Callable[[], torch.Tensor]


def _density(flows: list[nf.flows.Flow], size: int = 4) -> Step:
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(size), flows).train()
    data = torch.randn(32, size)
    return lambda: model.forward_kld(data)


def make_real_nvp_step() -> Step:
    torch.manual_seed(0)
    flows: list[nf.flows.Flow] = []
    for _ in range(3):
        flows += [nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 16, 4])), nf.flows.Permute(4)]
    return _density(flows)


def make_neural_spline_step() -> Step:
    torch.manual_seed(0)
    flows = [nf.flows.AutoregressiveRationalQuadraticSpline(4, 1, 16), nf.flows.LULinearPermute(4)]
    return _density(flows)


def make_residual_step() -> Step:
    torch.manual_seed(0)
    net = nf.nets.LipschitzMLP([4, 16, 4], init_zeros=False, lipschitz_const=0.9)
    return _density([nf.flows.Residual(net, reduce_memory=False), nf.flows.ActNorm(4)])


def make_maf_step() -> Step:
    torch.manual_seed(0)
    return _density([nf.flows.MaskedAffineAutoregressive(4, 16), nf.flows.Permute(4)])


def make_glow_step() -> Step:
    torch.manual_seed(0)
    flows = [[nf.flows.GlowBlock(4, 8, split_mode="channel"), nf.flows.Squeeze()]]
    base = [nf.distributions.DiagGaussian((4, 2, 2))]
    model = nf.MultiscaleFlow(base, flows, [], class_cond=False).train()
    data = torch.rand(8, 1, 4, 4)
    return lambda: model.forward_kld(data)


def _vae(flows: list[nf.flows.Flow]) -> Step:
    encoder = nf.distributions.NNDiagGaussian(nf.nets.MLP([12, 16, 6]))
    decoder = nf.distributions.NNDiagGaussianDecoder(nf.nets.MLP([3, 16, 24]))
    prior = nf.distributions.DiagGaussian(3, trainable=False)
    model = nf.NormalizingFlowVAE(prior, encoder, flows, decoder).train()
    data = torch.rand(16, 12)

    def step() -> torch.Tensor:  # as its example vae_with_flow
        _, log_q, log_p = model(data, 1)
        return torch.mean(log_q) - torch.mean(log_p)

    return step


def make_vae_step() -> Step:
    torch.manual_seed(0)
    return _vae([])


def make_vae_planar_step() -> Step:
    torch.manual_seed(0)
    return _vae([nf.flows.Planar((3,)) for _ in range(2)])
