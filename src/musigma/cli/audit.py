"""Commands that audit: `musigma audit`, and `musigma mcp` for coding assistants."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from musigma.cli.options import (
    ARGUMENTS,
    AUDIT,
    OUTPUT,
    Argument,
    Common,
    DataOptions,
    app,
    numbers,
)
from musigma.cli.outputs import check_out
from musigma.cli.screen import Screen
from musigma.cli.trained import Trained

if TYPE_CHECKING:
    from musigma.audit import AuditReport

EXIT_CODES = {"bug": 1, "incomplete": 3}


@app.command(group=AUDIT)
def audit(
    target: Annotated[str, Argument],
    source: Annotated[str | None, Parameter(name="data", group=ARGUMENTS)] = None,
    *,
    example: str | None = None,
    shape: str | None = None,
    allow: tuple[str, ...] = (),
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    sarif: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    options: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Run a VAE, a flow or a training step, and check what it computes.

    The exit code is 0 if the verdict is correct or warning, 1 if there is a bug, 2 if the target
    cannot be audited, and 3 if the audit is incomplete. What the audited code prints goes to
    standard error.

    Args:
        target: PATH.py:NAME or module:NAME of a class, an instance, or a function that returns a
            loss or makes a model; the file is executed. Or a run folder or checkpoint of this
            library.
        source: Data for checking the latents of a run. By default the data that it was trained on.
        example: PATH.py:NAME of a batch, as the model takes it in training: a tensor, a tuple, a
            dict; or of a function that returns one.
        shape: Shape of one example, such as 1x28x28. By default shapes are tried until one fits.
        allow: Code of a finding to accept, or incomplete. May be given several times.
        out: A .html, .json or .txt file to write the report to as well.
        sarif: A .sarif file to write the findings to, for code scanning.
    """
    from musigma.audit.findings import check_codes
    from musigma.audit.sarif import to_sarif
    from musigma.files import replacing, write_json

    check_codes(allow)
    if out is not None:
        check_out(out, ".html", ".json", ".txt")
    if sarif is not None:
        check_out(sarif, ".sarif", ".json", name="sarif")
    with _code_of_others(common.debug):
        if ":" in target and not Path(target).exists():
            report, where = _audit_object(target, example, shape)
        elif example is not None:
            raise ValueError("example: a run is audited with data; give them as DATA instead")
        else:
            report, where = _audit_run(target, source, options, common), ""
    if out is not None:
        forms = {".html": report.to_html, ".json": report.to_json, ".txt": report.__str__}
        with replacing(out) as draft:
            draft.write_text(forms[out.suffix]() + "\n", encoding="utf-8")
    if sarif is not None:
        write_json(sarif, to_sarif(report, where=where, allow=allow))
    Screen(common).result(report.to_dict(), str(report))
    if code := EXIT_CODES.get(report.judge(allow)):
        sys.exit(code)


@contextmanager
def _code_of_others(debug: bool) -> Iterator[None]:
    """While the audited code runs: it prints on standard error, and its errors exit with 2."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SystemExit as error:
        raise ValueError(
            f"target: the code ends the program with exit code {error.code}; put what a script "
            'does under `if __name__ == "__main__":`'
        ) from error
    except (ValueError, TypeError, OSError):
        raise
    except Exception as error:
        if debug:
            raise
        text = f"target: the audit stops with {type(error).__name__}: {error}"
        raise ValueError(f"{text}; --debug shows where") from error


def _audit_object(target: str, example: str | None, shape: str | None) -> tuple[AuditReport, str]:
    """The report on what a target refers to, and the line where that is defined."""
    from musigma import plugins
    from musigma.audit import audit

    sizes = None
    if shape is not None:
        sizes = numbers(shape, "shape", "sizes such as 1x28x28", by="x", least=1)
    place = target.rpartition(":")[0]
    named = {"target": target} if example is None else {"target": target, "example": example}
    with _imports_from(Path(place).resolve().parent if place.endswith(".py") else Path.cwd()):
        loaded = plugins.load_all(named)
        batch, obj = loaded.get("example"), loaded["target"]
        if inspect.isroutine(batch):
            try:
                batch = batch()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"example: {example} cannot be called: {reason}") from error
        return audit(obj, example=batch, shape=sizes), _line_of(obj, place)


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """While functions of a file may import modules from its folder, in which they were written."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))


def _line_of(obj: Any, place: str) -> str:
    """The line where an object or its class is defined; the file's first if it is elsewhere."""
    kind = obj if inspect.isroutine(obj) or inspect.isclass(obj) else type(obj)
    is_file = place.endswith(".py")
    with suppress(TypeError, OSError):
        file, line = inspect.getsourcefile(kind), inspect.getsourcelines(kind)[1]
        if file and (not is_file or Path(file).resolve() == Path(place).resolve()):
            return f"{file}:{line}"
    return f"{place}:1" if is_file else ""


def _audit_run(
    target: str, source: str | None, options: DataOptions, common: Common
) -> AuditReport:
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
