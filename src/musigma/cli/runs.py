"""Run folders: where a run is written, what it may replace, and whether it can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from musigma.cli.options import FIRST, OUTPUT

if TYPE_CHECKING:
    from musigma.processes import Processes


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of a run.

    Args:
        out: Run folder to create. By default runs/ARCH-DATA.
        overwrite: Replace an existing run.
        auto_resume: Continue the run if it already exists with the same options. A cluster or
            `torchrun --max-restarts` can then repeat an interrupted command unchanged.
    """

    out: Annotated[Path | None, Parameter(group=FIRST)] = None
    overwrite: bool = False
    auto_resume: bool = False

    def choose(self, name: str, source: str) -> tuple[Path, bool]:
        """The folder of a run, and whether it holds a run to continue.

        Raises:
            ValueError: If the folder is not empty and must not be replaced, or is not a run.
        """
        from musigma.files import LOCK, is_draft
        from musigma.training import saved_state

        out = self.out or Path("runs") / f"{name}-{data_name(source)}"
        if self.auto_resume:
            if self.overwrite:
                raise ValueError("auto_resume: cannot be combined with --overwrite; choose one")
            with contextlib.suppress(ValueError):
                saved_state(out)
                return out, True
        is_run = (out / "config.json").is_file()
        inside = out.iterdir() if out.is_dir() else [out] if out.exists() else []
        empty = all(is_draft(p) or p.name == LOCK for p in inside)  # a killed process leaves these
        replace = self.overwrite or (self.auto_resume and is_run)
        if not (empty or replace):
            raise ValueError(
                f"out: {out} already exists; pass --resume {out}, --overwrite or another --out"
            )
        if not (empty or is_run):
            raise ValueError(
                f"out: {out} is not a run, so it is not replaced; choose another --out"
            )
        return out, False


def data_name(source: str) -> str:
    """The name of the data in the name of a run folder.

    >>> data_name("photos.zip"), data_name("shards-{00..31}.tar"), data_name("https://host/x?k=1")
    ('photos', 'shards', 'x')
    """
    from musigma.data import readers

    whole = readers.plain(source) if readers.is_url(source) else source
    name = re.sub(r"[-_]?\{\d+\.\.\d+\}", "", Path(whole).name)
    return name.split(".")[0] or "data"


def refuse_other_run(out: Path, saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse to continue a run with options other than those that it began with.

    Args:
        out: The run folder.
        saved: The present options in the form of config.json: `model`, `data` and `train`.
        defaults: Defaults of the architecture, for options that the saved run does not have yet.

    Raises:
        ValueError: Naming every option that differs.
    """
    before = _options(json.loads((out / "config.json").read_text()), defaults)
    now = _options(json.loads(json.dumps(saved)), defaults)  # as it was saved: lists, no tuples
    if differing := [name for name in now if before.get(name) != now[name]]:
        what = "; ".join(f"{name} {before.get(name)}, not {now[name]}" for name in differing)
        raise ValueError(
            f"auto_resume: {out} began with {what}; pass --overwrite or another --out"
        )


def _options(saved: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run by their names on the command line."""
    from musigma.data import Preprocess

    model, data, asked = saved["model"], saved["data"], saved.get("asked", {})
    options, training = asked.get("options", model["options"]), asked.get("train", saved["train"])
    labels = ["label"] if model["options"].get("context") else []  # of runs before --given
    return {
        "ARCH": model["architecture"],
        "DATA": data["source"],
        **{name: options.get(name, value) for name, value in defaults.items()},
        **dataclasses.asdict(Preprocess.from_json(data["preprocess"])),
        "skip_bad": data["skip_bad"],
        "of": data.get("of", []),
        "given": data.get("given", labels),
        "bounds": data.get("bounds"),
        **training,
    }


def decided_by_main(processes: Processes, decide: Callable[[], Any]) -> Any:
    """The decision of the main process, on all processes; if it raises an error, all do."""
    answer: Any = None
    if processes.is_main:
        try:
            answer = decide()
        except (ValueError, OSError) as error:
            answer = error
    answer = processes.gather(answer)[0]
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextlib.contextmanager
def reserved(out: Path, processes: Processes, *, empty: bool) -> Iterator[None]:
    """Reserve a folder for this process; create it if needed, and empty it if asked."""
    from musigma.files import LOCK, lock_run

    def enter() -> None:
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock_run(out))
        for inside in out.iterdir() if empty else ():  # the folder may be a link or a mount point
            if inside.is_dir() and not inside.is_symlink():
                shutil.rmtree(inside)
            elif inside.name != LOCK:
                inside.unlink()

    with contextlib.ExitStack() as stack:
        decided_by_main(processes, enter)
        yield
