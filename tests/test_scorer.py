"""Scores of batches: every kind of table, blocks, other processes, and the engines."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch

import musigma
from musigma import Scorer, Spec, anomaly, cli, data


def people(n, seed=0):
    """Rows with columns of all types, of which one names them."""
    random = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "key": [f"k{seed}-{i}" for i in range(n)],
            "country": random.choice(["FR", "DE", "IT"], n, p=[0.5, 0.3, 0.2]),
            "age": random.poisson(40, n).astype(float),
            "income": random.lognormal(3, 0.3, n).round(2),
            "paid": random.random(n) < 0.4,
        }
    )
    frame.loc[random.random(n) < 0.2, "age"] = np.nan
    return frame


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a model with random weights."""
    rows = data.load(people(800), schema="infer")
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = musigma.build("table", rows.spec(), hidden=16, blocks=1)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    musigma.save(model, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def scorer(run):
    return Scorer(run, fpr=0.05, calibrate=people(500, seed=1), keep=["key"], threads=1)


@pytest.fixture(scope="module")
def expected(run):
    """Scores of `people(1000, seed=2)`, row by row in float64."""
    model = musigma.load(run / "model.safetensors").double()
    rows = data.load(people(1000, seed=2), schema=model.spec.schema)
    with torch.no_grad():
        return -model.log_prob(torch.from_numpy(rows.x)).numpy()


def column(table, name):
    """A column of any kind of table as an array."""
    return np.asarray(table[name])


KINDS = {
    "pandas": lambda frame: frame,
    "polars": pl.from_pandas,
    "table": lambda frame: pa.Table.from_pandas(frame, preserve_index=False),
    "batch": lambda frame: pa.RecordBatch.from_pandas(frame, preserve_index=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_has_the_same_scores(kind, scorer, expected):
    rows = KINDS[kind](people(1000, seed=2))
    scores = scorer(rows)
    assert type(scores) is type(rows)
    assert column(scores, "nats") == pytest.approx(expected, abs=1e-4)
    assert column(scores, "key").tolist() == people(1000, seed=2).key.tolist()
    p = anomaly.p_values(column(scores, "nats"), scorer.calibration)
    assert np.array_equal(column(scores, "p_value"), p)
    assert np.array_equal(column(scores, "flag"), p <= 0.05)
    assert 0 < (p <= 0.05).sum() < 1000
    empty = scorer(rows[:0] if kind in ("pandas", "polars") else rows.slice(0, 0))
    assert len(empty) == 0
    if kind in ("pandas", "polars"):
        assert list(empty.dtypes) == list(scores.dtypes)
    else:
        assert empty.schema == scores.schema


def test_the_index_of_a_frame_is_kept_and_other_columns_and_orders_do_not_matter(scorer):
    frame = people(50, seed=2)
    other = frame.assign(more=1)[["paid", "more", "income", "age", "country", "key"]]
    other.index = [f"row {i}" for i in range(50)]
    scores = scorer(other)
    assert scores.index.equals(other.index)
    assert np.array_equal(scores.nats, scorer(frame).nats)


def test_scores_do_not_depend_on_blocks(run, scorer):
    rows = KINDS["table"](people(300, seed=2))
    small = Scorer(**scorer.arguments | {"block": 37})
    assert small(rows).equals(scorer(rows))
    parts = [scorer(rows.slice(at, 11)) for at in range(0, 300, 11)]
    assert pa.concat_tables(parts).combine_chunks().equals(scorer(rows).combine_chunks())


def test_rows_are_read_in_blocks(run, monkeypatch):
    sizes = []
    load = data.load

    def counting(source, **how):
        found = load(source, **how)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(data, "load", counting)
    Scorer(run, block=64)(people(200, seed=2))
    assert sizes == [64, 64, 64, 8]


def test_streams_are_scored_one_batch_at_a_time(scorer, tmp_path):
    rows = KINDS["table"](people(400, seed=2))
    pq.write_table(rows, tmp_path / "rows.parquet")
    taken = []

    def source():
        for batch in rows.to_batches(100):
            taken.append(len(batch))
            yield batch

    stream = scorer.reader(source())
    assert isinstance(stream, pa.RecordBatchReader)
    first = stream.read_next_batch()
    assert len(first) == 100
    assert sum(taken) <= 200
    whole = pa.concat_tables([pa.Table.from_batches([first]), stream.read_all()])
    assert whole.combine_chunks().equals(scorer(rows).combine_chunks())
    for again in (
        pa.RecordBatchReader.from_batches(rows.schema, source()),
        pyarrow.dataset.dataset(tmp_path / "rows.parquet"),
        pq.ParquetFile(tmp_path / "rows.parquet").iter_batches(70),
    ):
        assert scorer.reader(again).read_all().equals(whole)
    assert list(scorer.batches(source()))[1].num_rows == 100
    with pytest.raises(ValueError, match="source: expected batches; got none"):
        scorer.reader([])


def test_a_pickle_is_small_and_scores_in_another_process(run, scorer):
    content = pickle.dumps(scorer)
    assert len(content) < 10_000
    rows = people(100, seed=2)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        there = pool.submit(pickle.loads(content), rows).result()
    assert there.equals(scorer(rows))


def test_no_model_is_loaded_before_the_first_batch():
    scorer = pickle.loads(pickle.dumps(Scorer("nowhere", keep=["a"])))
    assert scorer.arguments["keep"] == ("a",)
    with pytest.raises(musigma.CheckpointError, match="no such file"):
        scorer(people(3).assign(a=1))


def test_p_values_come_from_what_was_held_out_of_the_training_data(tmp_path):
    people(2000).drop(columns="key").to_parquet(tmp_path / "rows.parquet")
    rows = data.load(tmp_path / "rows.parquet", schema="infer")
    model = musigma.build("table", rows.spec(), hidden=8, blocks=1)
    about = {"source": data.identity(tmp_path / "rows.parquet"), "digest": data.digest(rows)}
    musigma.save(model, tmp_path / "model.safetensors", extra={"data": about})
    scorer = Scorer(tmp_path / "model.safetensors", fpr=0.02)
    held_out = rows.split("held-out")
    assert len(scorer.calibration) == len(held_out)
    nats = musigma.score(model, held_out)["nats"]
    assert scorer.calibration == pytest.approx(np.sort(nats), abs=1e-4)
    with pytest.raises(ValueError, match=r"rate: 0\.001 cannot be guaranteed by"):
        Scorer(tmp_path / "model.safetensors", fpr=0.001)
    people(1500).drop(columns="key").to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="has changed since the run was trained on it"):
        Scorer(tmp_path / "model.safetensors", fpr=0.02)


def test_what_cannot_be_scored_is_refused(run, scorer, tmp_path):
    with pytest.raises(ValueError, match="batch: expected an Arrow batch or table"):
        scorer(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="keep: expected columns of the batch"):
        scorer(people(3).drop(columns="key"))
    with pytest.raises(ValueError, match="income"):
        scorer(people(3).drop(columns="income"))
    with pytest.raises(ValueError, match="calibrate: the run does not say what it was trained on"):
        Scorer(run, fpr=0.05)
    with pytest.raises(ValueError, match="block: expected 1 or more rows; got 0"):
        Scorer(run, block=0)
    image = musigma.build("vae", (1, 8, 8), bits=1, latents=2, width=8)
    musigma.save(image, tmp_path / "image.safetensors")
    with pytest.raises(ValueError, match="a model of images"):
        Scorer(tmp_path / "image.safetensors")(people(3))


def test_models_of_plain_numbers_are_scored_too(tmp_path):
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    model = musigma.build("nsf", Spec((3,), columns=("a", "b", "c")), depth=1, hidden=8).eval()
    musigma.save(model, tmp_path / "model.safetensors")
    frame = pd.DataFrame(x, columns=["a", "b", "c"])
    nats = Scorer(tmp_path / "model.safetensors")(frame[["c", "a", "b"]])
    assert list(nats.columns) == ["nats"]
    with torch.no_grad():
        assert nats.nats.to_numpy() == pytest.approx(-model.log_prob(torch.tensor(x)), abs=1e-4)


def test_the_command_scores_rows_in_large_batches_and_hashes_no_other_data(tmp_path, monkeypatch):
    """No figure of an exact density depends on the batch."""
    x = np.random.default_rng(0).normal(size=(3000, 2))
    pd.DataFrame(x, columns=["a", "b"]).to_parquet(tmp_path / "rows.parquet")
    model = musigma.build("nsf", Spec((2,), columns=("a", "b")), depth=1, hidden=8)
    about = {"source": "elsewhere.parquet", "digest": "00", "n": 2999}
    musigma.save(model, tmp_path / "model.safetensors", extra={"data": about})
    sizes, forward = [], type(model).forward

    def recorded(model, x, *rest, **named):
        sizes.append(len(x))
        return forward(model, x, *rest, **named)

    def hashed(*_):
        raise AssertionError("rows are hashed")

    monkeypatch.setattr(type(model), "forward", recorded)
    monkeypatch.setattr(data.dataset, "content_hashes", hashed)
    words = ["score", f"{tmp_path}/model.safetensors", f"{tmp_path}/rows.parquet"]
    cli.main([*words, "--out", f"{tmp_path}/scores.parquet", "--device", "cpu"])
    assert sizes == [1024, 1024, 952]
    monkeypatch.undo()
    nats = pq.read_table(tmp_path / "scores.parquet").column("nats").to_numpy()
    with torch.no_grad():
        log_prob = model.eval().log_prob(torch.tensor(x, dtype=torch.float32))
    assert nats == pytest.approx(-log_prob.numpy(), abs=1e-4)


def test_unknown_levels_have_a_probability(scorer):
    rows = people(20, seed=2)
    assert (scorer(rows.assign(country="ES")).nats > scorer(rows).nats).all()


# --- engines -------------------------------------------------------------------------------------

NOISY = pytest.mark.filterwarnings("ignore")  # of the engines


@NOISY
@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_dask_scores_partitions(scorer, scheduler):
    dask = pytest.importorskip("dask.dataframe", reason="needs pip install 'musigma[dask]'")
    frame = people(500, seed=2)
    rows = dask.from_pandas(frame, npartitions=4)
    scores = rows.map_partitions(scorer, meta=scorer(rows._meta)).compute(scheduler=scheduler)
    assert np.array_equal(scores.nats, scorer(frame).nats)
    assert scores.key.tolist() == frame.key.tolist()


@NOISY
def test_ray_scores_batches(scorer, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs pip install 'musigma[ray]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    frame = people(500, seed=2)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    try:
        rows = ray.data.from_arrow(KINDS["table"](frame))
        how = {"batch_format": "pyarrow", "batch_size": 200}
        tasks = rows.map_batches(scorer, **how)
        actors = rows.map_batches(
            Scorer, fn_constructor_kwargs=scorer.arguments, concurrency=1, **how
        )
        for scores in (tasks.to_pandas(), actors.to_pandas()):
            found = scores.set_index("key").nats.loc[frame.key]
            assert np.array_equal(found, scorer(frame).nats)
    finally:
        ray.shutdown()


@NOISY
def test_duckdb_scores_queries(scorer):
    duckdb = pytest.importorskip("duckdb", reason="needs pip install duckdb")
    frame = people(500, seed=2)
    connection = duckdb.connect()
    cursor = connection.cursor()
    cursor.register("everyone", frame)
    scores = scorer.reader(cursor.sql("from everyone where paid"))
    connection.register("scores", scores)
    flagged = connection.sql("select key from scores where flag").fetchall()
    paid = scorer(frame[frame.paid])
    assert sorted(key for (key,) in flagged) == sorted(paid.key[paid.flag])


def test_spark_takes_the_batches_of_a_partition(scorer):
    """`mapInArrow` calls a function of an iterator of batches, in a process of its own."""
    function = pickle.loads(pickle.dumps(scorer.batches))
    rows = KINDS["table"](people(300, seed=2))
    scores = pa.Table.from_batches(function(iter(rows.to_batches(100))))
    assert scores.combine_chunks().equals(scorer(rows).combine_chunks())
