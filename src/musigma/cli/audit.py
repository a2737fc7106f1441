"""``musigma audit``: what a model computes, found out by numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from musigma.cli.options import (
    ARGUMENTS,
    AUDIT,
    Common,
    CommonOptions,
    Data,
    DataOptions,
    app,
    sides,
)
from musigma.cli.outputs import check_out
from musigma.cli.screen import Screen
from musigma.cli.trained import Trained


@app.command(group=AUDIT)
def audit(
    target: Annotated[str, Parameter(group=ARGUMENTS)],
    source: Annotated[str | None, Parameter(name="data", group=ARGUMENTS)] = None,
    *,
    shape: str | None = None,
    allow: tuple[str, ...] = (),
    out: Path | None = None,
    options: Data = DataOptions(),
    common: CommonOptions = Common(),
) -> None:
    """Run any VAE or flow and check its numbers: its convention, and whether its parts agree.

    The exit code is 1 if a bug is found, and 0 otherwise.

    Args:
        target: PATH.py:NAME or module:NAME of a class, an instance, or a function that returns
            one; the file is executed. Or a run folder or checkpoint of this library.
        source: Data to look at the latents of a run with. By default the data that it was trained
            on.
        shape: Shape of one example, as 1x28x28. By default shapes are tried until one fits.
        allow: Code of a finding to accept. May be given several times.
        out: A .html, .json or .txt file to write the report to as well.
    """
    from musigma import audit as library
    from musigma import plugins
    from musigma.files import replacing

    if out is not None:
        check_out(out, ".html", ".json", ".txt")
    if unknown := [code for code in allow if code not in library.CODES]:
        raise ValueError(
            f"allow: unknown code {', '.join(map(repr, unknown))}; the codes are "
            f"{', '.join(library.CODES)}"
        )
    if ":" in target and not Path(target).exists():
        event = None if shape is None else sides(shape, "shape", "sizes, as 1x28x28")
        report = library.audit(plugins.load(target, argument="target"), shape=event)
    else:
        report = _audit_run(target, source, options, common)
    if out is not None:
        forms = {".html": report.to_html, ".json": report.to_json, ".txt": report.__str__}
        with replacing(out) as draft:
            draft.write_text(forms[out.suffix]() + "\n", encoding="utf-8")
    Screen(common).result(report.to_dict(), str(report))
    if any(f.severity == "bug" and f.code not in allow for f in report.findings):
        sys.exit(1)


def _audit_run(target: str, source: str | None, options: DataOptions, common: Common) -> Any:
    """The audit of a run, with its training data if they can still be read."""
    from musigma.audit import audit_model

    trained = Trained(target, common)
    if source:
        return audit_model(trained.model, trained.data(source, options))
    found = None
    if source := trained.about_data.get("source"):
        try:
            found = trained.data(source, options)
        except (ValueError, OSError) as error:
            trained.screen.note(f"audited without data: {error}")
    return audit_model(trained.model, found)
