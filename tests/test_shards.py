"""Several processes write a shard each; concatenated, they are what one would write."""

import csv
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from musigma.cli import main, outputs
from musigma.cli.outputs import Share
from musigma.cli.screen import launched_processes
from musigma.cli.trained import device_named
from musigma.data import load
from musigma.processes import Processes

DATA = "written --split all --batch-size 16"  # 150 examples: nine batches, and six examples


def call(*words: object) -> None:
    main([word for some in words for word in str(some).split(" ")])


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher started the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A conditional Glow of handwritten digits: whatever it encodes and scores is drawn."""
    home = tmp_path_factory.mktemp("home")
    digits = load("digits")
    assert digits.labels is not None
    for i in range(150):
        path = home / "written" / digits.label_names[digits.labels[i]] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.take([i])[0, 0]).save(path)
    options = "--levels 2 --depth 1 --hidden 8 --steps 3 --batch-size 16 --evaluate-on 20"
    call("train glow", home / "written", "--conditional", options, "--out", home / "run")
    return home


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """An empty working directory with the run and its data in it."""
    for name in ("written", "run"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(path: Path) -> dict[str, list]:
    """The columns of a file, every value as its bytes or its text."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        return {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}
    if path.suffix == ".npy":
        return {"x": [row.tobytes() for row in np.load(path)]}
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return {n: [row.tobytes() for row in archive[n]] for n in archive if archive[n].ndim}
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = parquet.read_table(path).to_pydict()
    return {n: [v.hex() if isinstance(v, float) else v for v in c] for n, c in columns.items()}


def shard_of(out: str, rank: int, count: int) -> Path:
    stem, _, suffix = out.partition(".")
    return Path(f"{stem}-{rank:05}-of-{count:05}.{suffix}")


COMMANDS = {
    "score": (f"score run {DATA}", "s.csv"),
    "score in a table": (f"score run {DATA} --seed 3", "s.parquet"),
    "score by more draws": (f"score run {DATA} --k 3", "s.csv"),
    "encode": (f"encode run {DATA}", "z.npz"),
    "encode in a table": (f"encode run {DATA} --whiten", "z.parquet"),
    "encode by draws": (f"encode run {DATA} --draw --seed 3", "z.npz"),
    "sample": ("sample run --n 300 --seed 3", "x.npy"),
    "sample of a class": ("sample run --n 300 --label 7 --temperature 0.5,0.8", "x.npz"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_shards_one_after_the_other_are_what_one_process_writes(here, monkeypatch, name):
    words, out = COMMANDS[name]
    call(words, "--out", out)
    whole = content(Path(out))
    assert all(len(set(map(str, values))) > 9 for n, values in whole.items() if n[0] in "bzx")
    for count in (2, 3, 12):  # 12: more than there are batches, or blocks of samples
        monkeypatch.setenv("WORLD_SIZE", str(count))
        parts = []
        for rank in range(count):
            monkeypatch.setenv("RANK", str(rank))
            call(words, "--out", out)
            parts.append(content(shard_of(out, rank, count)))
        assert [list(part) for part in parts] == [list(whole)] * count
        assert {n: [v for part in parts for v in part[n]] for n in whole} == whole
    lengths = [len(next(iter(part.values()))) for part in parts]
    assert min(lengths) == 0, "of so many processes some have nothing to do"


def test_empty_shards_of_a_table_have_the_types_of_the_others(here, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for words, out in (COMMANDS["score in a table"], COMMANDS["encode in a table"]):
        monkeypatch.setenv("WORLD_SIZE", "11")
        for rank in range(11):
            monkeypatch.setenv("RANK", str(rank))
            call(words, "--out", out)
        tables = [parquet.read_table(shard_of(out, rank, 11)) for rank in range(11)]
        assert arrow.concat_tables(tables).num_rows == 150  # it refuses unlike schemas
        assert any(t.num_rows == 0 for t in tables)


def test_a_process_without_a_share_has_no_scores(here, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "11")
    call(f"score run {DATA}", "--out", "s.csv")
    own = shard_of("s.csv", 0, 11)
    assert capsys.readouterr().out == f"0 scores, the share of process 0 of 11: {own}\n"


def environment(rank: int, count: int, **more: str) -> dict[str, str]:
    """Of one process of several, that computes with as many threads as this one."""
    own = {"RANK": str(rank), "WORLD_SIZE": str(count)}
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **own, **more}


def start(words: str, **how) -> subprocess.Popen:
    command = [sys.executable, "-m", "musigma", *words.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes, **how)


@pytest.mark.slow
def test_processes_that_know_of_each_other_only_from_the_environment(here):
    words = COMMANDS["score"][0] + " --out s.csv --json"
    started = [start(words, env=environment(rank, 2)) for rank in range(2)]
    call(words)
    (out, err), (other, _) = (process.communicate() for process in started)
    assert [process.returncode for process in started] == [0, 0], err
    parts = [content(shard_of("s.csv", rank, 2)) for rank in range(2)]
    assert {n: [v for part in parts for v in part[n]] for n in parts[0]} == content(Path("s.csv"))
    answer = json.loads(out)  # the main process's, and that of no other
    assert other == ""
    assert (answer["n"], answer["process"], answer["processes"]) == (len(parts[0]["nats"]), 0, 2)


def test_evaluate_is_one_figure_whatever_the_number_of_processes(here, capsys):
    words = f"evaluate run {DATA} --seed 3 --json --device cpu"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    started = [
        start(words, env=environment(rank, 2, LOCAL_RANK=str(rank), **meeting))
        for rank in range(2)
    ]
    capsys.readouterr()
    call(words)
    alone = json.loads(capsys.readouterr().out)
    (out, err), (other, _) = (process.communicate() for process in started)
    assert [process.returncode for process in started] == [0, 0], err
    assert (json.loads(out), other) == (alone, "")
    assert alone["n"] == 150


# -- whole files or none


KILLED = """
import os, signal, sys
from musigma import evaluation
from musigma.cli import main

batches = evaluation.batches

def three(*given, **how):
    for i, batch in enumerate(batches(*given, **how)):
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

evaluation.batches = three
main(sys.argv[1:])
"""


def test_a_killed_process_leaves_the_file_that_was_there(here):
    words, out = COMMANDS["encode"]
    words = f"{words} --out {out}"
    Path("z-00000-of-00002.npz").write_bytes(b"an older one")
    done = subprocess.run([sys.executable, "-c", KILLED, *words.split()], env=environment(0, 2))
    assert done.returncode == -signal.SIGKILL
    assert Path("z-00000-of-00002.npz").read_bytes() == b"an older one"
    left = {path.name for path in here.iterdir() if path.name[0] != "."}  # drafts are hidden
    assert left == {"run", "written", "z-00000-of-00002.npz"}


@pytest.mark.parametrize("suffix", ["npz", "parquet", "csv"])
def test_a_file_that_cannot_be_finished_is_not_left_behind(tmp_path, suffix):
    out = tmp_path / f"a.{suffix}"

    def failing():
        yield {"a": np.zeros(3)}
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        outputs.write_rows(out, failing())
    assert not list(tmp_path.iterdir())
    outputs.write_rows(out, [{"a": np.ones(2)}])
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(OSError, match="no space"):
        outputs.write_rows(out, failing())
    assert len(content(out)["a"]) == 2


# -- files in pieces


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3))
TYPES = st.sampled_from(["float32", "float64", "int64", "uint8"])


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), shape=SHAPES, dtype=TYPES)
def test_arrays_in_pieces_are_the_array(tmp_path_factory, lengths, shape, dtype):
    random = np.random.default_rng(sum(lengths))
    pieces = [random.normal(0, 50, (n, *shape)).astype(dtype) for n in lengths]
    out = tmp_path_factory.mktemp("pieces") / "a.npz"
    parts = ({"a": piece[:, :, ::-1], "n": np.arange(len(piece))} for piece in pieces)
    outputs.write_rows(out, parts, whitened=True)
    with np.load(out, allow_pickle=False) as archive:
        whole = np.concatenate(pieces)[:, :, ::-1]
        assert archive["a"].dtype == whole.dtype
        np.testing.assert_array_equal(archive["a"], whole)
        assert len(archive["n"]) == sum(lengths)
        assert archive["whitened"].item() is True


def test_large_arrays_are_not_held(tmp_path):
    piece = np.zeros((1000, 128))  # about a megabyte
    tracemalloc.start()
    outputs.write_rows(tmp_path / "a.npz", ({"a": piece} for _ in range(40)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * piece.nbytes
    assert np.load(tmp_path / "a.npz")["a"].shape == (40_000, 128)


def test_large_tables_are_written_in_groups_of_rows(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(outputs, "ROW_GROUP", 10**5)
    values, before, held = (
        np.random.default_rng(0).normal(size=10**5),
        arrow.total_allocated_bytes(),
        [],
    )

    def parts():
        for piece in values.reshape(100, -1):
            yield {"a": piece, "id": ["x"] * len(piece)}
            held.append(arrow.total_allocated_bytes() - before)

    outputs.write_rows(tmp_path / "a.parquet", parts(), whitened=False)
    table = parquet.ParquetFile(tmp_path / "a.parquet")
    np.testing.assert_array_equal(table.read()["a"].to_numpy(), values)
    assert table.num_row_groups > 5
    assert max(held) < 4 * 10**5 < values.nbytes


def test_columns_of_a_table_are_the_elements_of_the_arrays(here):
    parquet = pytest.importorskip("pyarrow.parquet")
    for suffix in ("npz", "parquet"):
        call(f"encode run {DATA} --whiten --out z.{suffix}")
    table, data = parquet.read_table("z.parquet"), load("written")
    assert data.labels is not None
    with np.load("z.npz") as archive:
        for name in ("z0", "z1"):
            flat = archive[name].reshape(150, -1)
            columns = [c for c in table.column_names if c.startswith(f"{name}_")]
            assert columns == [f"{name}_{j}" for j in range(flat.shape[1])]
            found = np.stack([table[c].to_numpy() for c in columns], 1)
            assert found.dtype == flat.dtype
            np.testing.assert_array_equal(found, flat)
        np.testing.assert_array_equal(archive["labels"], data.labels)
    assert table.column_names[:3] == ["index", "id", "label"]
    assert table["id"].to_pylist() == list(data.ids or ())
    assert table["label"].to_pylist() == [data.label_names[i] for i in data.labels]
    assert json.loads(table.schema.metadata[b"whitened"]) is True


# -- who does what


@given(n=st.integers(0, 500), size=st.integers(1, 70), count=st.integers(1, 20))
def test_shares_are_whole_batches_in_their_order(n, size, count):
    shares = [Share(Processes(rank, count), n, size).rows for rank in range(count)]
    assert [i for share in shares for i in share] == list(range(n))
    assert all(share.start % size == 0 for share in shares if share)
    batches = [math.ceil(len(share) / size) for share in shares]
    assert max(batches) - min(batches) <= 1


def test_the_environment_of_a_launcher(monkeypatch):
    assert launched_processes() == Processes(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launched_processes() == Processes(2, 3)
    for rank, count in (("3", "3"), ("-1", "3"), ("x", "3"), ("0", ""), ("0", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", count)
        with pytest.raises(ValueError, match=r"RANK, WORLD_SIZE: expected .*; got .*unset"):
            launched_processes()


def test_processes_take_a_gpu_each(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "zeros", lambda n, device: asked.append(device) or torch.ones(n))
    for own, name, device in (
        ("5", "cuda", "cuda:1"),
        ("3", "cuda", "cuda:3"),
        ("3", "cuda:0", "cuda:0"),
        ("3", "cpu", "cpu"),
        (None, "cuda", "cuda"),
    ):
        monkeypatch.setenv("LOCAL_RANK", own) if own else monkeypatch.delenv("LOCAL_RANK")
        assert device_named(name) == asked[-1] == torch.device(device)


@pytest.mark.parametrize("words", ["sample run", "encode run written", "info run"])
def test_only_the_main_process_prints(here, monkeypatch, capfd, words):
    out = {"sample": "--n 2 --out x.npy", "encode": "--out z.npz"}.get(words.split()[0], "")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        for json_or_text in ("--debug", "--json"):
            capfd.readouterr()
            call(words, *out.split(), json_or_text)
            printed = capfd.readouterr()
            assert bool(printed.out) == (rank == 0)
            assert printed.err == ""


@pytest.mark.parametrize("words", ["--out x.png", "--temperatures 0,1 --out x.npy"])
def test_several_processes_draw_no_picture(here, monkeypatch, capsys, words):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        call("sample run", words)
    assert "out: 2 processes write arrays in shards; name an .npy" in capsys.readouterr().err
    assert not list(here.glob("x*"))
    call("sample run --n 65")  # named by itself, it is an array
    assert np.load("samples-00001-of-00002.npy").shape == (1, 1, 8, 8)


# -- docs/running.md


PAGE = Path(__file__).parent.parent / "docs/running.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_every_command_of_the_page_on_running(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) > 8
    for command in commands:
        words = command.split()
        with monkeypatch.context() as patch:
            while "=" in words[0]:
                patch.setenv(*words.pop(0).split("="))
            if words[0] == "musigma":
                call(*words[1:])
                continue
        assert words[0] == "torchrun"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
        launcher += ["--rdzv-endpoint", "localhost:0", *words[1:]]
        done = subprocess.run(launcher, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, command
    assert len(list(tmp_path.glob("scores-*-of-00002.csv"))) == 2
    assert len(list(tmp_path.glob("latents-*-of-00003.parquet"))) == 3
    assert (tmp_path / "runs/profile/profile.json").stat().st_size > 1000
    assert '"finished"' in capsys.readouterr().out


def test_options_of_the_recipes_are_options(capsys):
    recipes = [block.replace("\\\n", " ") for block in blocks("bash")]
    recipes += [" ".join(re.sub(r"#.*|[\[\],=]", " ", b).split()) for b in blocks("yaml")]
    found = 0
    for line in [line for recipe in recipes for line in recipe.splitlines()]:
        if match := re.search(r"(?:-m|srun) musigma (train \w+|\w+)\b(.*)", line):
            capsys.readouterr()
            call(match[1], "--help")
            text = capsys.readouterr().out
            for option in re.findall(r"--[\w-]+", match[2].split(" resources:")[0]):
                assert re.search(rf"{option}\b", text), f"{option} of {match[1]}"
                found += 1
    assert found > 10


BATCH = {
    "srun": 'exec "$@"',
    "torchrun": 'echo "$@" > told; trap "sleep 0.3; echo saved > saved; exit 1" TERM; '
    "touch started; while :; do sleep 0.05; done",
    "scontrol": 'echo "$@" >> asked; [ "$1" = requeue ] || printf "node7\\nnode8\\n"',
}


def test_the_batch_script_saves_the_run_and_requeues_itself(tmp_path):
    """As SLURM runs it: the script gets the signal, the tasks do not."""
    script = next(block for block in blocks("bash") if "scontrol" in block)
    (tmp_path / "run.sh").write_text(script)
    for name, text in BATCH.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", "SLURM_NNODES": "2"}
    process = subprocess.Popen(["bash", "run.sh"], cwd=tmp_path, env={**os.environ, **own})
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    told = re.search(r"--signal=B:(\w+)@", script)
    assert told
    process.send_signal(signal.Signals[f"SIG{told[1]}"])
    process.wait(timeout=30)
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "requeue 5"
    assert "--rdzv-endpoint node7:29500" in (tmp_path / "told").read_text()


def test_the_manifest_is_valid():
    yaml = pytest.importorskip("yaml")
    service, job = (document for block in blocks("yaml") for document in yaml.safe_load_all(block))
    pods = job["spec"]["template"]["spec"]
    (container,) = pods["containers"]
    words = dict(word.split("=") for word in container["command"] if "=" in word)
    name = service["metadata"]["name"]
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert words["--rdzv-endpoint"].startswith(f"{job['metadata']['name']}-0.{name}:")
    assert container["env"] == [{"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"}]
    assert pods["subdomain"] == name
    assert int(words["--nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert {v["name"] for v in pods["volumes"]} == {m["name"] for m in container["volumeMounts"]}
