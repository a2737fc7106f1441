"""The command that fits another prior to the latents of a trained VAE."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from musigma.cli.options import (
    ARGUMENTS,
    TRAIN,
    WHAT_DATA,
    Common,
    DataOptions,
    Run,
    app,
    at_least_one,
)
from musigma.cli.outputs import check_out
from musigma.cli.trained import Trained


@app.command(group=TRAIN)
def fit_prior(
    run: Run,
    source: Annotated[str | None, Parameter(name="data", group=ARGUMENTS, help=WHAT_DATA)] = None,
    *,
    prior: str,
    out: Path,
    steps: int = 2000,
    options: DataOptions = DataOptions(batch_size=512),
    common: Common = Common(),
) -> None:
    """Fit another prior to the latents of a trained VAE, and write the model with it.

    All but the prior is unchanged. DATA are by default the training part of what the model was
    trained on. The figures are those of the data that the prior is fitted to.

    Args:
        prior: The new prior, as `train vae --prior` takes it: 'mixture components=10', by
            expectation-maximization; 'nsf depth=3' or any other, by gradients.
        out: The .safetensors file to write.
        steps: Number of steps of priors that are fitted by gradients.
    """
    from musigma import checkpoint
    from musigma.evaluation import evaluate
    from musigma.training import fit_prior as fitted

    at_least_one(steps=steps)
    check_out(out, ".safetensors")
    trained = Trained(run, common)
    source = source or trained.about_data.get("source")
    if source is None:
        raise ValueError("DATA: the checkpoint does not say what it was trained on; give the data")
    data = trained.data(source, options)
    if trained.part == "held-out":
        data = trained.data(source, dataclasses.replace(options, split="train"))
    size = options.batch_size
    new = fitted(trained.model, data, prior, steps=steps, batch_size=size, seed=common.seed)
    nats = [evaluate(m, data, seed=common.seed)["nats"] for m in (trained.model, new)]
    extra = {name: value for name, value in trained.extra.items() if name != "weights"}
    checkpoint.save(new, out, extra=extra)
    answer = {"out": str(out), "prior": prior, "n": len(data), "before": nats[0], "after": nats[1]}
    text = f"{nats[0]:.4f} nats per example before, {nats[1]:.4f} with the prior {prior!r}: {out}"
    trained.screen.result(answer, text)
