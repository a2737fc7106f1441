"""``musigma explore``: a local page about a trained model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from musigma.cli.options import DATA, INSPECT, Common, DataOptions, Run, app
from musigma.cli.trained import Trained
from musigma.cli.watch import WatchedRun

if TYPE_CHECKING:
    from musigma.data import Dataset
    from musigma.explore import Explorer


@app.command(group=INSPECT)
def explore(
    run: Run,
    *,
    source: Annotated[str | None, Parameter(name="--data", group=DATA)] = None,
    host: str = "127.0.0.1",
    port: int = 8765,
    options: DataOptions = DataOptions(),
    common: Common = Common(),
) -> None:
    """Show a trained model in a local page: its latents, what they do, and where the data are.

    It serves the page until Ctrl-C. Needs FastAPI: pip install 'musigma[explore]'.

    Args:
        source: Data to look at. By default those that the model was trained on.
        host: Address to listen on. Other machines can reach the page only at another address than
            the default, 0.0.0.0 for example; its URL then holds a random token.
        port: Port to listen on; 0 for any that is free.
    """
    try:
        from musigma.explore import server
    except ImportError as error:
        raise ValueError(
            f"explore: the page needs FastAPI ({error}); pip install 'musigma[explore]'"
        ) from error
    if not 0 <= port < 2**16:
        raise ValueError(f"port: expected 0 to 65535; got {port}")
    trained = Trained(run, common)
    explorer = explorer_of(trained, source, options)

    def announce(address: str) -> None:
        trained.screen.result({"url": address}, f"{address}   (Ctrl-C ends)")
        sys.stdout.flush()

    server.serve(explorer, host, port, announce)


def explorer_of(trained: Trained, source: str | None, options: DataOptions) -> Explorer:
    """The explorer of a run, with the Python lines that load it."""
    from musigma.explore import Explorer

    trained.check_latents("explore")
    source = source or trained.about_data.get("source")
    if source is None:
        raise ValueError("data: the checkpoint does not say what it was trained on; give --data")
    found, watched = trained.data(source, options), None
    training = {}
    if trained.folder and (trained.folder / "metrics.jsonl").is_file():
        watched = WatchedRun(trained.folder)
        training = {"training": lambda: progress(watched), "training_lines": _watching(watched)}
    return Explorer(
        trained.model,
        found,
        loading=_loading(trained, source, found),
        path=trained.path,
        seed=trained.common.seed,
        **training,
    )


def progress(watched: WatchedRun) -> dict[str, Any]:
    """The state of a training, from the rows of its log that are new, and from those before."""
    while watched.read():
        pass
    return watched.summary()


def _watching(watched: WatchedRun) -> str:
    """Python lines that read the state of a training."""
    return (
        f"run = WatchedRun(Path({str(watched.folder)!r}))\n"
        "while run.read():\n    pass\nsummary = run.summary()"
    )


def _loading(trained: Trained, source: str, found: Dataset) -> str:
    """Python lines that load the model and the data as `Trained` does."""
    spec, how = trained.spec, []
    if found.preprocess != type(found.preprocess)():
        how.append(f"preprocess=datasets.{found.preprocess!r}")
    if trained.given:
        how.append(f"given={list(trained.given)!r}")
    if spec.columns:
        how.append("columns=model.spec.columns")
    if spec.schema is not None:
        how.append("schema=model.spec.schema")
    if trained.is_image and spec.shape[0] == 3:
        how.append("channels=3")
    if not trained.is_image:
        how.append("allow_constant=True")
    arguments = ", ".join([repr(source), *how])
    part = "" if trained.part == "all" else f".split({trained.part!r})"
    plugin, device = trained.common.plugin, str(trained.device)
    return "\n".join(
        [
            *([f"musigma.plugins.register({plugin!r})"] if plugin else []),
            "torch.set_grad_enabled(False)",
            f"model = musigma.load({str(trained.path)!r})",
            *([] if device == "cpu" else [f"model = model.to({device!r})"]),
            f"data = datasets.load({arguments}){part}",
        ]
    )
