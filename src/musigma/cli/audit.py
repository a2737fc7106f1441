"""``musigma audit``: what does this model really compute?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from musigma.cli.shared import (
    USUAL,
    USUAL_DATA,
    CommonOptions,
    Data,
    Screen,
    Trained,
    check_out,
    sides,
)

commands = App()


@commands.command
def audit(
    target: str,
    data: str | None = None,
    *,
    shape: str | None = None,
    allow: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    out: Path | None = None,
    options: Data = USUAL_DATA,
    common: CommonOptions = USUAL,
) -> None:
    """Check a model by its numbers: which convention it has, and whether its parts agree on it.

    The exit code is 0 where no bug was found, and 1 where one was.

    Args:
        target: PATH.py:NAME or module:NAME of a class, an instance or a function that makes one,
            of anyone's; the file is run. Or a run, or a checkpoint, of this library.
        data: For a run: what to look at its latents with; by default what it was trained on.
        shape: Of one example, as 1x28x28; by default it is tried out.
        allow: Codes of findings that are known and meant.
        out: Also write the report to this .html, .json or .txt file.
        options: Which data.
        common: Shared options.
    """
    from musigma.audit import CODES
    from musigma.audit import audit as audited
    from musigma.files import replacing

    if out is not None:
        check_out(out, ".html", ".json", ".txt")
    if unknown := [code for code in allow if code not in CODES]:
        raise ValueError(f"allow: {unknown[0]!r} is no code; they are {', '.join(CODES)}")
    screen = Screen(common)
    if ":" in target and not Path(target).exists():
        from musigma.audit import named

        event = None if shape is None else sides(shape, "shape", "sizes, as 1x28x28")
        report = audited(named(target), shape=event)
    else:
        report = _of_run(target, data, options, common, screen)
    if out is not None:
        forms = {".html": report.to_html, ".json": report.to_json, ".txt": report.__str__}
        with replacing(out) as draft:
            draft.write_text(forms[out.suffix]() + "\n", encoding="utf-8")
    screen.result(report.to_dict(), str(report))
    if any(f.severity == "bug" and f.code not in allow for f in report.findings):
        sys.exit(1)


def _of_run(target: str, source: str | None, options: Any, common: Any, screen: Screen) -> Any:
    """Of a model of this library, with data if they are there."""
    from musigma.audit import audit_model

    trained = Trained(target, common)
    source = source or trained.extra.get("data", {}).get("source")
    found = None
    if source:
        try:
            found = trained.data(source, options, screen)
        except (ValueError, OSError) as error:
            if source != trained.extra.get("data", {}).get("source"):
                raise
            screen.say(f"without data: {error}")
    return audit_model(trained.model, found)
