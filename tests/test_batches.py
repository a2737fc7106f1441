"""Batches in time: the same for any number of workers and parts; dead processes block nobody."""

import atexit
import contextlib
import json
import os
import signal
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from musigma.data import Dataset, Preprocess, batch_indices, load
from musigma.data.batches import in_order, stream
from musigma.data.readers import LazyImages
from test_data import GRAY, fails, save_folder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def many(tmp_path):
    """Binarized at random, decoded when they are asked for, with labels."""
    folder = save_folder(tmp_path / "images", np.concatenate([GRAY, 255 - GRAY]), "{k}/{i}.png")
    return load(folder, preprocess=Preprocess(binarize="dynamic"), in_memory=False)


def expected(data: Dataset, size: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    indices = batch_indices(len(data), size, seed=3, step=step)
    return data.take(indices, seed=3, step=step), indices


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (5, 6), (4, 4)])
def test_a_stream_is_a_function_of_seed_and_step(many, workers, start, stop):
    batches = list(
        stream(many, 7, seed=3, start=start, stop=stop, workers=workers, ahead=1 + workers % 2)
    )
    assert len(batches) == stop - start
    for step, batch in enumerate(batches, start):
        for got, wanted in zip(batch, expected(many, 7, step), strict=True):
            np.testing.assert_array_equal(got, wanted, strict=True)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 5, 9])
def test_parts_are_the_batch_and_nothing_else_is_decoded(many, workers, ranks, monkeypatch):
    edges = [rank * 7 // ranks for rank in range(ranks + 1)]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    seen, decode = [], LazyImages.decode
    monkeypatch.setattr(LazyImages, "decode", lambda *at: seen.append(at) or decode(*at))
    streams = [stream(many, 7, seed=3, stop=3, part=p, workers=workers) for p in parts]
    for step, batches in enumerate(zip(*streams, strict=True)):
        if not workers:
            assert len(seen) == 7
        for got, wanted in zip(zip(*batches, strict=True), expected(many, 7, step), strict=True):
            np.testing.assert_array_equal(np.concatenate(got), wanted, strict=True)
        seen.clear()


def test_streams_do_not_end_by_default(many):
    with contextlib.closing(stream(many, 5, seed=3, start=10**12, workers=2)) as batches:
        for step in range(10**12, 10**12 + 9):
            np.testing.assert_array_equal(next(batches)[0], expected(many, 5, step)[0])


@pytest.mark.parametrize("steps", [None, range(1, 3), range(3, 3)])
def test_batches_in_order_are_those_that_another_process_takes(many, steps, monkeypatch):
    monkeypatch.setattr("musigma.data.batches.WORTH_A_PROCESS", 2)
    before = children()
    batches = in_order(many, 5, seed=3, steps=steps)
    steps = range(-(-len(many) // 5)) if steps is None else steps
    for step in steps:
        x, indices = next(batches)
        assert len(children() - before) == 1
        wanted = np.arange(5 * step, min(5 * step + 5, len(many)))
        np.testing.assert_array_equal(indices, wanted, strict=True)
        np.testing.assert_array_equal(x, many.take(wanted, seed=3, step=step), strict=True)
    assert next(batches, None) is None
    assert children() == before


def test_no_process_takes_what_is_in_memory(many):
    before, data = children(), Dataset(many.array[:])
    for x, indices in in_order(data, 3):
        assert children() == before
        np.testing.assert_array_equal(x, data.take(indices))


def test_batches_stay_as_they_were_given(many):
    with contextlib.closing(stream(many, 5, seed=3, workers=1, ahead=1)) as batches:
        first = next(batches)[0]
        kept = first.copy()
        for _ in range(3):
            next(batches)
        np.testing.assert_array_equal(first, kept)
        first[:] = 7  # and are the caller's own


def children() -> set[int]:
    task = Path(f"/proc/self/task/{os.getpid()}/children")
    return set(map(int, task.read_text().split()))


def gone(pids: set[int]) -> bool:
    """Whether processes end within some seconds."""
    for _ in range(200):
        left = set()
        for pid in pids:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    left.add(pid)
        if not left:
            return True
        time.sleep(0.05)
    return False


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_workers_end_with_their_stream(many):
    before = children()
    for end in ("close", "stop", "error", "drop"):
        batches = stream(many, 5, seed=3, workers=2, stop=4)
        next(batches)
        workers = children() - before
        assert len(workers) == 2
        if end == "close":
            batches.close()
        elif end == "stop":
            assert len(list(batches)) == 3
        elif end == "error":
            with pytest.raises(ZeroDivisionError), contextlib.closing(batches):
                raise ZeroDivisionError
        del batches
        assert children() == before, end


@linux
def test_a_worker_that_dies_is_reported(many):
    before = children()
    batches = stream(many, 5, seed=3, workers=2)
    next(batches)
    victim = max(children() - before)
    os.kill(victim, signal.SIGTERM)  # is for the parent to act on, and so is Ctrl-C
    os.kill(victim, signal.SIGINT)
    time.sleep(0.1)
    next(batches)
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    with fails("workers: a process that takes batches of .*images died .killed by SIGKILL"):
        for _ in range(9):
            next(batches)
    assert time.monotonic() - began < 5
    assert children() == before


@linux
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, None])
def test_workers_end_with_their_parent(many, sent):
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        pid = os.fork()
    if not pid:
        code = 1
        try:
            batches = stream(many, 5, seed=3, workers=2)
            next(batches)
            os.write(theirs, json.dumps(sorted(children())).encode())
            for _ in batches if sent else ():
                pass
        except KeyboardInterrupt:
            code = 7
        finally:
            if sent is None:
                atexit._run_exitfuncs()  # as at the end of a program that kept its stream
            os._exit(code)
    workers = set(json.loads(os.read(ours, 1000)))
    assert len(workers) == 2
    if sent:
        os.kill(pid, sent)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == {signal.SIGINT: 7, None: 1}.get(sent, -9)
    assert gone(workers)
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_reported(many, workers):
    (Path(many.name) / "a" / "4.png").unlink()
    with fails("images: a/4.png has changed since this source was indexed"):
        list(stream(many, 5, seed=3, stop=4, workers=workers))


def test_workers_can_be_spawned(many, monkeypatch):
    monkeypatch.setattr("musigma.data.batches.METHOD", "spawn")
    with contextlib.closing(stream(many, 5, seed=3, workers=1)) as batches:
        np.testing.assert_array_equal(next(batches)[0], expected(many, 5, 0)[0])


def test_streams_refuse(many, tmp_path, monkeypatch):
    for name, value in {"batch_size": 0, "start": -1, "workers": -1, "ahead": 0}.items():
        with fails(f"{name} is {value}: give"):
            stream(many, **{"batch_size": 3, "seed": 0, name: value})
    with fails("part is slice"):
        stream(many, 3, seed=0, part=slice(0, 3, 2))
    with fails("images: holds no examples"):
        stream(many.subset([]), 3, seed=0)
    np.save(tmp_path / "x.npy", GRAY)
    monkeypatch.setattr("musigma.data.batches.METHOD", "spawn")
    with fails("workers: .* would get a copy of .*x.npy memory-mapped array"):
        next(stream(load(tmp_path / "x.npy"), 3, seed=0, workers=1))
