"""The command line: parse, call, print. Nothing is computed here that the library cannot do."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from musigma import __version__
from musigma.cli import audit, compress, convert, latents, shards, use, watch
from musigma.cli.shared import register_plugin, told
from musigma.cli.train import add_architecture, finetune, train_app

UserError = (ValueError, TypeError, OSError)

app = App(
    name="musigma",
    version=__version__,
    help="Gaussian latent-variable models: VAEs and normalizing flows whose numbers are true.",
)
app.command(train_app)
app.command(finetune)
app.update(use.commands)
app.update(latents.commands)
app.update(convert.commands)
app.update(shards.commands)
app.update(watch.commands)
app.update(audit.commands)
app.update(compress.commands)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake is one line on standard error, and exit code 2.

    Compressed files have codes of their own: see `musigma.coding.errors`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["train"]:
            words = _train_words(words)
        app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except KeyboardInterrupt:
        sys.exit(130)
    except (CycloptsError, *UserError, RuntimeError) as error:
        if "--debug" in words or not _explained(error):
            raise
        print(f"{_speaker()}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))


def _speaker() -> str:
    """Who speaks: of several processes, which."""
    try:
        process = told()
    except ValueError:  # that may be the very error
        return "musigma"
    return "musigma" if process.count == 1 else f"musigma (process {process.rank})"


def _explained(error: Exception) -> bool:
    """Whether the message tells a user what happened: training, or weights, gone astray."""
    if not isinstance(error, RuntimeError):
        return True
    from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

    from musigma.training import TrainingError

    return isinstance(error, (TrainingError, LinAlgError))


def _train_words(words: list[str]) -> list[str]:
    """Make the architectures' commands, and put a name where a FILE.py:NAME stands."""
    from musigma.zoo import ARCHITECTURES

    if len(words) > 1 and ".py:" in words[1]:
        words = [words[0], register_plugin(words[1]), *words[2:]]
    elif len(words) > 1 and not words[1].startswith("-") and words[1] not in ARCHITECTURES:
        from musigma.zoo import build

        build(words[1], ())
    for name in ARCHITECTURES:
        if name not in train_app:
            add_architecture(name)
    return words
