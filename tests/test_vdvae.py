"""The very deep VAE."""

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from musigma import Dataset, Preprocess, TrainConfig, build, fit
from musigma.audit import audit_model
from musigma.testing import check_model, randomized
from musigma.trace import Trace

SMALL = {"latents": 2, "width": 8}


@pytest.mark.parametrize("context", [0, 2])
def test_laws_at_any_size(context):
    torch.manual_seed(0)
    model = build("vdvae", (1, 5, 6), bits=2, components=2, context=context, **SMALL)
    check_model(model, (1, 5, 6), bits=2, context=context)
    assert len(list(model.latents())) == 1 + 2 * 3
    if not context:
        report = audit_model(model)
        assert report.verdict == "correct", report


def test_the_published_structure():
    text = {"encoder": "8x2,8d2,4x1,4d4,1x1", "decoder": "1x1,4m1,4x2,8m4,8x3"}
    model = build("vdvae", (3, 8, 8), **SMALL, **text)
    shapes = [tuple(z.shape[1:]) for z in model.encode(torch.zeros(2, 3, 8, 8))]
    assert shapes == [(2, 1, 1)] + [(2, 4, 4)] * 3 + [(2, 8, 8)] * 4
    for option, word in (("encoder", "8y2"), ("encoder", "4x1"), ("decoder", "1x1,4m1")):
        with pytest.raises(ValueError, match=f"{option}: "):
            build("vdvae", (3, 8, 8), **SMALL, **(text | {option: word}))
    cifar = {
        "encoder": "32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
        "decoder": "1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21",
    }
    with torch.device("meta"):
        deep = build("vdvae", (3, 32, 32), width=384, **cifar)
    assert len(deep.blocks) == 43
    assert abs(sum(p.numel() for p in deep.parameters()) / 39e6 - 1) < 0.05  # 39M in the paper


def test_a_block_is_that_of_the_paper():
    """The state passes prior, latent, residual block and unpooling as written out here."""
    torch.manual_seed(0)
    text = {"encoder": "2d2,1x1", "decoder": "1x1,2m1"}
    model = randomized(build("vdvae", (1, 2, 2), bits=1, **SMALL, **text))
    x = torch.randint(0, 2, (3, 1, 2, 2)).double()
    trace = Trace()
    with torch.no_grad():
        model.infer(x, trace)
        up, (top, bottom) = model.bottom_up.net, model.blocks
        h = up.enter(2 * x - 1)
        acts = {2: h}
        h = avg_pool2d(h + up.blocks[0](h), 2)
        acts[1] = h + up.blocks[1](h)
        state = model.top.expand(3, -1, -1, -1)
        for block, size in ((top, 1), (bottom, 2)):
            z, out = trace.values[block], block.prior.net(state)
            q = block.posterior(torch.cat([state, acts[size]], 1))
            p = torch.distributions.Normal(out[:, :2], out[:, 2:4].exp())
            kl = torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, q.stddev), p)
            ours = torch.distributions.kl_divergence(q, block.propose(state)[0])
            torch.testing.assert_close(ours, kl.sum((1, 2, 3)))
            state = state + out[:, 4:] + block.merge.enter(z)
            state = state + block.merge.block(state)
            if size == 1:
                state = block.merge.start + state.repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(model.decoder(state).log_prob(x), trace.log_p[model])


@pytest.mark.slow
def test_training_on_bars(tmp_path):
    torch.manual_seed(0)

    def bars(n, seed):
        random, x = np.random.default_rng(seed), np.zeros((n, 1, 4, 4), np.uint8)
        x[np.arange(n), 0, random.integers(0, 4, n)] = 255
        x[np.arange(n), 0, :, random.integers(0, 4, n)] = 255
        return Dataset(x, preprocess=Preprocess(binarize="threshold"))

    blocks = {"encoder": "4x2,4d4,1x2", "decoder": "1x2,4m1,4x1"}
    model = build("vdvae", (1, 4, 4), bits=1, latents=2, width=32, bottleneck=1.0, **blocks)
    config = TrainConfig(steps=500, batch_size=32, lr=3e-3, ema=0.98, evaluations=1, kl_warmup=0.4)
    run = fit(model, bars(1024, 0), bars(128, 2), config, tmp_path)
    with torch.no_grad():
        nats = float(-run.model.elbo(torch.from_numpy(bars(500, 1).x).float()).mean())
    assert nats < 6.0  # the truth is 2 log 4 = 2.8; independent pixels have 11.0
