"""Commands about a posterior p(theta | x): its mode, and proposals for further simulations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musigma.cli.options import USE, Common, Run, app, at_least_one
from musigma.cli.outputs import check_out, write_rows
from musigma.cli.screen import count
from musigma.cli.trained import Trained

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 20
"""Number of observations whose modes are printed."""


@app.command(name="map", group=USE)
def map_(
    run: Run,
    *,
    given: tuple[str, ...] = (),
    restarts: int = 20,
    n: int = 1000,
    steps: int = 200,
    out: Path | None = None,
    common: Common = Common(),
) -> None:
    """Find the most probable values: where the density is largest for each observation.

    The best of many draws are improved by gradients, inside the support. `agree` says how many
    restarts end at the same place; few of many are a sign of several modes, or of a density that
    is rough because there were too few training data.

    Args:
        given: File with a row for each observation, as in `sample`.
        restarts: Number of searches for each observation.
        n: Number of draws for each observation, the best of which are improved.
        steps: Number of gradient steps of each search.
        out: The .csv or .parquet file to write, with a row for each observation.
    """
    from musigma.posterior import mode

    at_least_one(restarts=restarts, n=n, steps=steps)
    if out is not None:
        check_out(out, ".csv", ".parquet")
    trained = Trained(run, common)
    names = _columns(trained, "map")
    if given:
        context, labels = trained.observations(given)
    else:
        context, labels = trained.context(1), None
    found = mode(trained.model, context, restarts=restarts, n=n, steps=steps)
    rows = len(found.theta)
    columns: dict[str, Any] = {}
    if rows > 1:
        columns["observation"] = list(labels) if labels else list(range(rows))
    columns |= dict(zip(names, found.theta.cpu().numpy().T, strict=True))
    columns |= {"log_prob": found.log_prob.cpu().numpy(), "agree": found.agree.cpu().numpy()}
    if out is not None:
        write_rows(out, [columns])
    plain = {k: v if isinstance(v, list) else v.tolist() for k, v in columns.items()}
    table = [dict(zip(plain, values, strict=True)) for values in zip(*plain.values(), strict=True)]
    lines = [
        "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        + f" of {restarts}"
        for row in table[:SHOWN]
    ]
    if rows > SHOWN:
        lines.append(f"and {count(rows - SHOWN, 'further observation')}")
    if out is not None:
        lines.append(f"{count(rows, 'mode')}: {out}")
    answer = {} if out is None else {"out": str(out)}
    answer |= {"modes": table, "restarts": restarts, **trained.warnings}
    trained.screen.result(answer, "\n".join(lines))


@app.command(group=USE)
def propose(
    run: Run,
    *,
    given: tuple[str, ...] = (),
    n: int = 1000,
    prior: str | None = None,
    epsilon: float = 1e-4,
    out: Path,
    common: Common = Common(),
) -> None:
    """Draw parameters for further simulations from the region that an observation allows.

    The draws are from the prior, restricted to the region that contains the posterior except for
    a share of EPSILON of its mass. Simulate at these values, and train on the pairs of all rounds
    together (`train ... --observed FILE`, or `finetune`): the loss needs no correction, but the
    result is valid for this observation alone. (Deistler, Goncalves, Macke, 2022,
    arXiv:2210.04815.)

    Args:
        given: File with one row, the observation.
        n: Number of parameter values.
        prior: The prior: a table or an array with draws from it, which are used once each, or
            FILE.py:NAME of a function of n that returns n draws. By default uniform on the bounds
            of the run (`train --bounds`).
        epsilon: Share of the posterior's mass that may lie outside the region.
        out: The .csv, .parquet, .npy or .npz file to write.
    """
    from musigma.posterior import truncated

    at_least_one(n=n)
    trained = Trained(run, common)
    _columns(trained, "propose")
    trained.check_out(out)
    if not given:
        raise ValueError("given: expected a file with the observation (--given observed.csv)")
    if prior is None and trained.spec.support is None:
        raise ValueError(
            "prior: the run has no bounds, on which a prior would be uniform; give draws from the "
            "prior, or a function that returns them (--prior FILE)"
        )
    source = trained.spec.support if prior is None else _prior(prior, trained)
    context, _ = trained.observations(given)
    found = truncated(trained.model, context, source, n, epsilon=epsilon)  # pyright: ignore
    trained.write(found.theta, out)
    answer = {"n": n, "epsilon": epsilon, "log_density_above": found.threshold}
    answer |= {"share_of_prior": found.share, "acceptance": found.acceptance}
    answer |= {"candidates": found.candidates}
    what = f"{count(n, 'draw')} from the prior, within a region of {found.share:.3g} of its mass"
    trained.wrote(out, what, **answer)


def _columns(trained: Trained, command: str) -> list[str]:
    """The names of the elements of a vector."""
    if len(trained.shape) != 1 or trained.spec.schema is not None:
        what = "typed rows" if trained.spec.schema is not None else f"shape {trained.shape}"
        raise ValueError(
            f"{command}: for models of vectors of real numbers; this one is of {what}"
        )
    trained.model.require_exact(command)
    return list(trained.spec.columns) or [f"x{i}" for i in range(trained.shape[0])]


def _prior(prior: str, trained: Trained) -> Callable[[int], Tensor]:
    """A function that returns draws from a prior: that of a file, or the rows of a table."""
    import numpy as np
    import torch

    from musigma import data, plugins

    if ".py:" in prior:
        function, wanted = plugins.load(prior, argument="prior"), trained.shape[0]

        def draw(n: int) -> Tensor:
            theta = torch.as_tensor(np.asarray(function(n)))
            if theta.ndim != 2 or theta.shape[1] != wanted or not bool(theta.isfinite().all()):
                raise ValueError(
                    f"prior: {prior} should return {n:,} rows of {wanted} finite numbers; it "
                    f"returned shape {tuple(theta.shape)}"
                )
            return theta

        return draw
    rows = data.load(prior, columns=trained.spec.columns or None, allow_constant=True)
    if tuple(rows.shape) != tuple(trained.shape):
        raise ValueError(f"prior: expected rows of {trained.shape}; {prior} has {rows.shape}")
    at = 0

    def following(n: int) -> Tensor:
        nonlocal at
        which = np.arange(at, min(at + n, len(rows)))
        at += len(which)
        return torch.from_numpy(np.array(rows.take(which)))

    return following
