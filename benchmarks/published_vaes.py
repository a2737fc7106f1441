"""Evaluate the VAEs that bits-back published, converted, on the 10,000 test images of MNIST.

    MUSIGMA_DATA=... python benchmarks/published_vaes.py FOLDER

FOLDER is `torch_vae/saved_params` of github.com/bits-back/bits-back. The paper (Townsend, Bird,
Barber, 2019, arXiv:1901.04866) reports rates of the coder of 0.19 bits per dimension for binarized
digits and 1.41 for raw ones.
"""

import sys
from pathlib import Path

import torch

import musigma
from musigma.convert import convert

folder = Path(sys.argv[1])
for name in (
    "torch_binary_vae_params",
    "torch_binary_vae_params_random",
    "torch_vae_beta_binomial_params",
):
    model = convert(folder / name).model
    kinds = ["dynamic", "threshold"] if "binary" in name else [None]
    for binarize in kinds:
        treat = musigma.Preprocess(binarize=binarize)
        test = musigma.data.load("mnist", preprocess=treat).split("held-out")
        torch.manual_seed(0)
        one = musigma.evaluate(model, test, batch_size=200)
        many = musigma.evaluate(model, test, k=100, batch_size=200)
        print(
            f"{name}, {binarize or 'raw'}: "
            f"{one['bits_per_dim']:.4f} ± {one['standard_error']:.4f} ({one['bound']}), "
            f"{many['bits_per_dim']:.4f} ({many['bound']}), n = {one['n']:,}"
        )
