"""``musigma explore``: a local page about a trained model."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from musigma.cli.calibration import Calibration
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
    """Show a trained model in a local page: its latents, what they do, and strange examples.

    It serves the page until Ctrl-C. Needs FastAPI: pip install 'musigma[explore]'.

    Args:
        source: Data to look at. By default those that the model was trained on.
        host: Address to listen on. The default serves this machine only. 0.0.0.0 serves other
            machines, too; the URL then contains a random token.
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
        every = host in ("0.0.0.0", "::")
        also = f"; on other machines, with {socket.gethostname()} in place of {host}" * every
        trained.screen.result({"url": address}, f"{address}   (Ctrl-C ends{also})")
        sys.stdout.flush()

    server.serve(explorer, host, port, announce)


def explorer_of(trained: Trained, source: str | None, options: DataOptions) -> Explorer:
    """The explorer of a run, with the Python lines that load it."""
    from musigma.explore import Explorer

    (source, found), watched = data_of(trained, source, options), None
    training = {}
    if trained.folder and (trained.folder / "metrics.jsonl").is_file():
        watched = WatchedRun(trained.folder)
        training = {"training": lambda: progress(watched), "training_lines": _watching(watched)}
    loading = f"{_model(trained)}\ndata = {_loading(trained, source, found)}"
    normal = None if trained.seen and trained.part == "held-out" else _normal(trained, options)
    compared = {"normal": normal[0], "normal_lines": normal[1]} if normal else {}
    return Explorer(
        trained.model,
        found,
        loading=loading,
        **compared,
        path=trained.path,
        seed=trained.common.seed,
        **training,
    )


def data_of(trained: Trained, source: str | None, options: DataOptions) -> tuple[str, Dataset]:
    """The data to look at, by default those that the model was trained on, and where they are."""
    source = source or trained.about_data.get("source")
    if source is None:
        raise ValueError("data: the checkpoint does not say what it was trained on; give --data")
    return source, trained.data(source, options)


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


def _normal(trained: Trained, options: DataOptions) -> tuple[Dataset, str] | None:
    """Normal rows that the model was not trained on, and the lines that load them.

    None if they cannot be read, which is said.
    """
    try:
        calibration = Calibration.read(trained, None, options)
    except ValueError:
        trained.screen.note(
            "the held-out training data cannot be read, so scores are compared among the data "
            "that are shown"
        )
        return None
    rows, source = calibration.rows, trained.about_data["source"]
    lines = f"normal = {_loading(trained, source, rows)}"
    kept = "musigma.anomaly.calibration_rows(normal.content())"
    return rows, f"{lines}\nnormal = normal.subset({kept})"


def _model(trained: Trained) -> str:
    """Python lines that load the model."""
    plugin, device = trained.common.plugin, str(trained.device)
    return "\n".join(
        [
            *([f"musigma.plugins.register({plugin!r})"] if plugin else []),
            "torch.set_grad_enabled(False)",
            f"model = musigma.load({str(trained.path)!r})",
            *([] if device == "cpu" else [f"model = model.to({device!r})"]),
        ]
    )


def _loading(trained: Trained, source: str, found: Dataset) -> str:
    """A Python expression that loads the data that `Trained` returned last."""
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
    return f"datasets.load({arguments}){part}"
