"""Training by an unnormalized density (`train --energy`), and the command `importance`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from musigma.cli.options import USE, Common, Run, app, at_least_one
from musigma.cli.outputs import check_out, write_rows
from musigma.cli.screen import count
from musigma.cli.trained import Trained

if TYPE_CHECKING:
    from musigma.energy import LogDensity, Weighted

RELIABLE = 0.05
"""Share of the effective sample size in all draws below which estimates are doubtful."""


def density(target: str) -> LogDensity:
    """The function that FILE.py:NAME refers to.

    Raises:
        PluginError: If it does not exist.
        ValueError: If it is not a function.
    """
    from musigma import plugins

    function: Any = plugins.load(target, argument="energy")
    if not callable(function):
        raise ValueError(f"energy: expected a function of x; {target} is {function!r}")
    return function  # pyright: ignore[reportReturnType]


@app.command(group=USE)
def importance(
    run: Run,
    *,
    energy: str,
    given: tuple[str, ...] = (),
    n: int = 10_000,
    out: Path | None = None,
    common: Common = Common(),
) -> None:
    """Estimate the evidence of an unnormalized density, and weigh draws of the model by it.

    The draws with their weights stand for the density itself: the weights correct the error of the
    model. The effective sample size says how many draws of the density they are worth. It cannot
    show modes of the density in which the model has no mass.

    Args:
        energy: FILE.py:NAME of a function of x (and of the context, if there is one) that returns
            the log density of each row, by torch; not normalized.
        given: File with a row, the context.
        n: Number of draws.
        out: The .csv or .parquet file to write: draws, and their log weights.
    """
    from musigma.energy import weigh

    at_least_one(n=n)
    if out is not None:
        check_out(out, ".csv", ".parquet")
    trained, function = Trained(run, common), density(energy)
    context = trained.observations(given)[0] if given else trained.context(1)
    weighted = weigh(trained.model, function, n, context)
    answer = figures(weighted)
    lines = [figure_lines(weighted)]
    if out is not None:
        names = list(trained.spec.columns) or [f"x{i}" for i in range(weighted.x.shape[1])]
        columns: dict[str, Any] = dict(zip(names, weighted.x.cpu().numpy().T, strict=True))
        write_rows(out, [columns | {"log_weight": weighted.log_weights.numpy()}])
        answer["out"] = str(out)
        lines.append(f"{count(n, 'draw')} with log weights: {out}")
    trained.screen.result(answer, "\n".join(lines))


def figures(weighted: Weighted) -> dict[str, Any]:
    """The figures of weighted draws, as JSON values."""
    plain = weighted._asdict()
    del plain["x"], plain["log_weights"]
    return {"n": len(weighted.log_weights), **plain}


def figure_lines(weighted: Weighted) -> str:
    """The figures of weighted draws, as text."""
    n = len(weighted.log_weights)
    text = (
        f"log evidence {weighted.log_evidence:.5g} ± {weighted.log_evidence_error:.2g} nats\n"
        f"effective sample size {weighted.ess:,.0f} ± {weighted.ess_error:,.0f} of {n:,} draws"
    )
    if weighted.ess < RELIABLE * n:
        text += (
            f"\nthe largest weight is {weighted.largest:.0%} of all, so these figures are "
            "doubtful: train longer, or with a larger model"
        )
    return text
