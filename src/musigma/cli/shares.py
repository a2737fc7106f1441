"""The work of a command, divided among processes.

Each process works on some of the batches and writes them into a file of its own, a shard; none
waits for another. What is drawn depends on the seed and the number of the batch alone, so the
shards, one after the other, are what a single process writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from musigma.processes import Processes

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Share:
    """The rows that one process works on, of n rows in whole batches.

    >>> from musigma.processes import Processes
    >>> [Share(Processes(rank, 3), 10, 4).rows for rank in range(3)]
    [range(0, 4), range(4, 8), range(8, 10)]
    >>> Share(Processes(2, 4), 10, 4).path(Path("scores.csv")).name
    'scores-00002-of-00004.csv'
    """

    processes: Processes
    n: int
    batch_size: int

    @property
    def rows(self) -> range:
        """The numbers of the rows."""
        batches = self.processes.share(math.ceil(self.n / self.batch_size))
        start, stop = (min(i * self.batch_size, self.n) for i in (batches.start, batches.stop))
        return range(start, stop)

    def path(self, out: Path) -> Path:
        """The file of this process; of a single process, the file itself."""
        rank, count = self.processes.rank, self.processes.count
        name = f"{out.stem}-{rank:05}-of-{count:05}{out.suffix}"
        return out if count == 1 else out.with_name(name)

    def progress(self, report: Progress | None) -> Progress | None:
        """Progress through all rows, reported as progress through these."""
        return report and (lambda done, _: report(done - self.rows.start, len(self.rows)))

    @property
    def fields(self) -> dict[str, int]:
        """What a JSON answer says about the share; nothing if it is everything."""
        process = {"process": self.processes.rank, "processes": self.processes.count}
        return {} if self.processes.count == 1 else process

    def __str__(self) -> str:
        rank, count = self.processes.rank, self.processes.count
        return "" if count == 1 else f", the share of process {rank} of {count}"
