"""The number of threads that training uses on a busy machine."""

import json

import numpy as np
import pytest
import torch

from musigma.cli import main, threads
from musigma.cli.threads import CHOSEN_BY_USER, Threads


class Machine:
    """A clock, and CPU seconds of other processes that use a given number of cores."""

    def __init__(self, monkeypatch, most: int):
        self.now, self.used, self.cores, self.threads = 0.0, 0.0, 0.0, most
        monkeypatch.setattr(threads, "_seconds", lambda: (self.now, self.used))
        monkeypatch.setattr(threads.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(threads.time, "sleep", self.wait)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", self.set)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.used += seconds * self.cores

    def set(self, number: int) -> None:
        self.threads = number


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch, most=4)


@pytest.mark.parametrize(
    ("cores", "expected"), [(0.0, 4), (0.3, 4), (1.0, 3), (1.9, 2), (4.0, 1), (9.0, 1)]
)
def test_training_begins_with_one_thread_for_each_free_core(machine, cores, expected):
    machine.cores = cores
    assert Threads({}).choose() == machine.threads == expected


def test_the_number_follows_the_load_during_training(machine):
    used = Threads({})
    assert used.choose() == 4
    numbers = []
    for cores in (0.0, 2.0, 2.0, 0.1):
        machine.cores = cores
        machine.wait(threads.WINDOW + 1)
        assert used.adapt(1) is False
        numbers.append(machine.threads)
    assert numbers == [4, 2, 2, 4]
    machine.cores = 3.0
    machine.wait(threads.WINDOW / 2)
    used.adapt(2)
    assert machine.threads == 4  # too early to say


def test_a_run_continues_with_the_number_it_began_with(machine):
    machine.cores = 4.0
    assert Threads({}).choose(2) == 2
    assert Threads({}).choose(64) == 1  # begun on a larger machine


@pytest.mark.parametrize("name", CHOSEN_BY_USER)
def test_the_number_that_a_user_or_launcher_chose_is_kept(machine, name):
    machine.cores = 3.0
    used = Threads({name: "4"})
    assert used.choose() == used.choose(2) == 4
    machine.wait(10)
    used.adapt()
    assert machine.threads == 4


def test_nothing_changes_on_a_system_that_does_not_report_its_load(machine, monkeypatch):
    monkeypatch.setattr(threads, "_seconds", lambda: None)
    used = Threads({})
    assert used.choose() == 4
    used.adapt()
    assert machine.threads == 4


def test_the_work_of_this_process_is_not_the_work_of_others():
    work = Threads({})
    if work.last is None:
        pytest.skip("this system does not report its load")
    sum(range(3_000_000))
    (_, before), (_, after) = work.last, threads._seconds()
    assert after - before >= -0.1  # of a tick or two


def test_a_run_records_its_number_of_threads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32))
    main(["train", "maf", "x.npy", "--steps", "2", "--evaluations", "1", "--out", "run"])
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["threads"] == torch.get_num_threads()
