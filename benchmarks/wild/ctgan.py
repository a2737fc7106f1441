"""SDV's ctgan: TVAE."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from ctgan.data_transformer import DataTransformer
from ctgan.synthesizers import tvae

DISTRIBUTION = "ctgan"
EXPECTED = {"tvae": "correct"}  # loss_factor 2 on a Gaussian with its own sigma: beta 0.5


def make_tvae_step() -> Callable[[], torch.Tensor]:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "age": rng.normal(40, 10, 500),
            "pay": rng.gamma(2.0, 1000.0, 500),
            "kind": rng.choice(list("abc"), 500, p=[0.6, 0.3, 0.1]),
        }
    )
    transformer = DataTransformer()
    transformer.fit(table, ["kind"])
    real = torch.from_numpy(transformer.transform(table).astype("float32"))[:50]
    torch.manual_seed(0)
    width = transformer.output_dimensions
    encoder = tvae.Encoder(width, (32, 32), 8)
    decoder = tvae.Decoder(8, (32, 32), width)

    def step() -> torch.Tensor:  # the body of the loop of TVAE.fit
        mean, std, log_var = encoder(real)
        rec, sigmas = decoder(torch.randn_like(std) * std + mean)
        first, second = tvae._loss_function(
            rec, real, sigmas, mean, log_var, transformer.output_info_list, 2
        )
        return first + second

    return step
