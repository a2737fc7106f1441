"""The command line: parses arguments, calls the library, and prints results."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Iterator, Sequence

from cyclopts import CycloptsError

# their commands
from musigma.cli import (  # noqa: F401
    audit,
    calibrate,
    compare,
    compress,
    convert,
    energy,
    explore,
    export,
    fit_prior,
    inspect,
    names,
    posteriors,
    quality,
    scores,
    use,
    watch,
)
from musigma.cli.options import AUDIT, TRAIN, app
from musigma.cli.screen import rank_and_count

UserError = (ValueError, TypeError, OSError)

app.command(
    "musigma.cli.train:train_app",
    name="train",
    group=TRAIN,
    sort_key=0,
    help="Train a model (`musigma train ARCH DATA`), or continue a run (`--resume RUN`).",
)
app.command(
    "musigma.cli.train:finetune",
    name="finetune",
    group=TRAIN,
    help="Train a model further, on other data or with another objective, as a new run.",
)
app.command(
    "musigma.cli.server:mcp",
    name="mcp",
    group=AUDIT,
    help="Serve the audit to coding assistants, by the Model Context Protocol.",
)


@contextlib.contextmanager
def _without_pydantic() -> Iterator[None]:
    """Hide pydantic while arguments are read: Cyclopts would check our dataclasses by it."""
    hidden = sys.modules.pop("pydantic", None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules["pydantic"] = hidden


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. An error is a message on standard error, and exit code 2.

    The message has one line, and one more for each of several faults in data. `decompress` has
    further exit codes: see `musigma.coding.errors`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] in (["train"], ["finetune"]):
            from musigma.cli.train import prepare_words

            words = prepare_words(words)
        elif words and not words[0].startswith("-") and words[0] not in app:
            raise ValueError(_unknown_command(words[0]))
        with _without_pydantic():
            command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        command(*bound.args, **bound.kwargs)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (CycloptsError, *UserError, RuntimeError) as error:
        if "--debug" in words or not _is_explained(error):
            raise
        text = str(error).rstrip()  # lists of faults in data keep their lines
        text = text if isinstance(error, UserError) else " ".join(text.split())
        print(f"{_prefix()}: {text}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))


def _unknown_command(word: str) -> str:
    """The message for an unknown command; cyclopts would import every command for its own."""
    near = difflib.get_close_matches(word, [name for name in app if name[0] != "-"], 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown command {word!r}; {hint}`musigma --help` lists the commands"


def _prefix() -> str:
    """The name of the program, with the number of this process if there are several."""
    try:
        rank, count = rank_and_count()
    except ValueError:  # the error that is about to be printed
        return "musigma"
    return "musigma" if count == 1 else f"musigma (process {rank})"


def _is_explained(error: Exception) -> bool:
    """Whether the message of an error suffices for a user, without a traceback."""
    if not isinstance(error, RuntimeError):
        return True
    from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

    from musigma.training import TrainingError

    return isinstance(error, (TrainingError, LinAlgError))
