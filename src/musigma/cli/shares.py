"""The work of a command, divided among processes.

Each process works on some of the batches and writes them into a file of its own, a shard; none
waits for another. What is drawn depends on the seed and the number of the batch alone, so the
shards, one after the other, are what a single process writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from musigma.processes import Processes


def shard_path(out: Path, processes: Processes) -> Path:
    """The file of one process of several; of a single process, the file itself.

    >>> from musigma.processes import Processes
    >>> shard_path(Path("scores.csv"), Processes(2, 4)).name
    'scores-00002-of-00004.csv'
    """
    if processes.count == 1:
        return out
    number = f"{processes.rank:05}-of-{processes.count:05}"
    return out.with_name(f"{out.stem}-{number}{out.suffix}")


def rows_of(processes: Processes, n: int, batch_size: int) -> range:
    """The rows of one process, of n rows in whole batches.

    >>> from musigma.processes import Processes
    >>> [rows_of(Processes(rank, 3), 10, 4) for rank in range(3)]
    [range(0, 4), range(4, 8), range(8, 10)]
    """
    batches = processes.share(math.ceil(n / batch_size))
    return range(min(batches.start * batch_size, n), min(batches.stop * batch_size, n))


def share_fields(processes: Processes) -> dict[str, int]:
    """What the JSON answer of one process of several says about its share."""
    if processes.count == 1:
        return {}
    return {"process": processes.rank, "processes": processes.count}


def share_text(processes: Processes) -> str:
    """The same for people."""
    if processes.count == 1:
        return ""
    return f", the share of process {processes.rank} of {processes.count}"


def share_progress(
    progress: Callable[[int, int], None] | None, rows: range
) -> Callable[[int, int], None] | None:
    """Progress through all rows, as progress through those of one process."""
    return progress and (lambda done, _: progress(done - rows.start, len(rows)))
