"""DeepChem: its sequence-to-sequence model as a VAE, and its normalizing flow."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from deepchem.models.torch_models.seqtoseq import SeqToSeqModel

DISTRIBUTION = "deepchem"
EXPECTED = {"seq_to_seq": "incomplete"}  # no KL ever enters the loss


def make_seq_to_seq_step() -> Callable[[], torch.Tensor]:
    random.seed(0)
    torch.manual_seed(0)
    tokens = list("CNO")
    words = ["".join(random.choices(tokens, k=5)) for _ in range(8)]
    model = SeqToSeqModel(
        tokens,
        tokens,
        6,
        encoder_layers=1,
        decoder_layers=1,
        embedding_dimension=8,
        batch_size=8,
        variational=True,
        annealing_start_step=0,
        annealing_final_step=0,
        dropout=0.0,
        device=torch.device("cpu"),
    )
    model._ensure_built()
    model.model.train()
    batch = next(model._generate_batches((w, w) for w in words))
    inputs, labels, weights = model._prepare_batch(batch)

    def step() -> torch.Tensor:  # as TorchModel.fit_generator
        outputs = model.model(inputs)
        return model._loss_fn([outputs[0]], labels, weights)

    return step
