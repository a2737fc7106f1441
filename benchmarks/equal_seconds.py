"""Training for a number of processor seconds, which other work on the machine hardly changes."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import torch

import musigma
from musigma import TrainConfig, fit
from musigma.data import Dataset
from musigma.model import Model


def train_for(
    seconds: float,
    make: Callable[[], Model],
    train: Dataset,
    validation: Dataset,
    config: TrainConfig,
) -> tuple[Model, int]:
    """The best weights after as many steps as take `seconds`, and the number of steps.

    Short runs tell what a step takes, without evaluations; `make` builds the model, each time with
    the seed of `config`.
    """

    def trained(steps: int, evaluations: int = 1) -> tuple[Model, float]:
        torch.manual_seed(config.seed)
        model = make()
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            budget = replace(config, epochs=None, steps=steps, evaluations=evaluations)
            fit(model, train, validation, budget, folder, device="cpu")
            spent = time.process_time() - start
            return musigma.load(f"{folder}/model.safetensors"), spent

    trained(5)  # the first run of a process loads and compiles
    start = trained(5)[1]  # what a run costs beside its steps, and a few of them
    each = (trained(15)[1] - start) / 10
    if 200 * each < seconds:
        each = (trained(105)[1] - start) / 100
    if each <= 0:
        raise RuntimeError(f"a step seems to take {each:.2g} seconds: the machine is too busy")
    steps = max(10, int(seconds / each))
    return trained(steps, config.evaluations)[0], steps
