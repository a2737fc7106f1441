"""A Real NVP of two moons: exact densities and an exact inverse.

python examples/01_two_moons.py [STEPS]
"""

import sys
import tempfile

import torch

import musigma

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1500

data = musigma.data.load("two-moons")
torch.manual_seed(0)
model = musigma.build("realnvp", data.shape, bits=data.bits, depth=8, hidden=64)
with tempfile.TemporaryDirectory() as folder:
    run = musigma.fit(
        model,
        data.split("train"),
        data.split("validation"),
        musigma.TrainConfig(steps=steps, batch_size=256),
        folder,
        device="cpu",
    )

held_out = data.split("held-out")
figure = musigma.evaluate(run.model, held_out)
print(f"log p(x) = {-figure['nats']:.3f} ± {figure['standard_error_nats']:.3f} nats per point")
print(f"({figure['bound']}, n = {figure['n']}; a Gaussian with the same moments: ", end="")
x = torch.from_numpy(held_out.x)
gaussian = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
print(f"{gaussian.log_prob(x).mean():.3f})")

z = run.model.encode(x[:5], whiten=True)
print(
    "encode, decode:",
    (run.model.decode(z, whiten=True) - x[:5]).abs().max().item(),
    "largest error",
)
