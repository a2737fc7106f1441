"""Draws as .nc files: InferenceData of ArviZ."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import musigma
from musigma import Spec, Variable, testing
from musigma.cli import main
from musigma.coding.archive import model_digest

pytest.importorskip("xarray", reason="pip install 'musigma[arviz]'")
pytest.importorskip("h5netcdf", reason="pip install 'musigma[arviz]'")


@pytest.fixture(scope="module")
def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its next version
        return pytest.importorskip("arviz", reason="pip install 'musigma[arviz]'")


@pytest.fixture
def run(capsys):
    """Run a command; its JSON answer, or its message if it is refused."""

    def call(words: str):
        capsys.readouterr()
        code = 0
        try:
            main([*words.split(), "--json"])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        if code == 2:
            assert out == ""
            return err.splitlines()[-1]
        assert code in (0, None), err
        return json.loads(out)

    return call


def saved(spec, path="model.safetensors", seed=0):
    model = testing.randomized(musigma.build("nsf", spec, depth=1, hidden=8), seed=seed).float()
    musigma.save(model, path)
    return model


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_one_observation_as_arviz_reads_it(run, arviz):
    spec = Spec(
        (2,),
        columns=("mass", "spin"),
        context=(Variable("snr"), Variable("event", names=("BBH", "BNS"))),
    )
    model = saved(spec)
    Path("observed.csv").write_text("event,snr\nBNS,8.5\n")
    answer = run("sample model.safetensors --given observed.csv --n 130 --out draws.nc --seed 3")
    assert answer == {"out": "draws.nc", "n": 130, "temperature": "1"}
    data = arviz.from_netcdf("draws.nc")
    assert data.groups() == ["posterior", "observed_data"]
    assert dict(data.posterior.sizes) == {"chain": 1, "draw": 130}
    assert list(data.posterior.data_vars) == ["mass", "spin"]
    assert data.posterior.mass.dims == ("chain", "draw")
    assert float(data.observed_data.snr) == 8.5
    assert str(data.observed_data.event.values) == "BNS"
    for attributes in (data.attrs, data.posterior.attrs, data.observed_data.attrs):
        assert attributes["inference_library"] == "musigma"
        assert attributes["inference_library_version"] == musigma.__version__
        assert attributes["model_digest"] == model_digest(model)
        assert attributes["seed"] == 3
    # the draws are those of every other kind of file
    run("sample model.safetensors --given observed.csv --n 130 --out draws.npy --seed 3")
    drawn = np.stack([data.posterior.mass[0], data.posterior.spin[0]], 1)
    assert np.array_equal(drawn, np.load("draws.npy"))
    assert len(set(drawn[:, 0])) == 130
    table = arviz.summary(data, kind="stats", round_to="none")
    assert table.loc["mass", "mean"] == pytest.approx(drawn[:, 0].mean(), rel=1e-5)


def test_several_observations_have_a_dimension(run, arviz):
    spec = Spec((2,), columns=("mass", "spin"), context=(Variable("x", (3,)),))
    saved(spec)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    np.save("x.npy", x)
    run("sample model.safetensors --given x.npy --n 70 --out draws.nc")
    data = arviz.from_netcdf("draws.nc")
    assert data.posterior.spin.dims == ("chain", "draw", "observation")
    assert data.posterior.spin.shape == (1, 70, 4)
    assert data.observed_data.x.dims == ("observation", "x_dim_0")
    assert np.array_equal(data.observed_data.x, x)
    run("sample model.safetensors --given x.npy --n 70 --out draws.npy")
    rows = np.load("draws.npy").reshape(4, 70, 2)
    assert np.array_equal(data.posterior.spin[0].T, rows[..., 1])
    assert list(arviz.summary(data, kind="stats").index)[:2] == ["mass[0]", "mass[1]"]


def test_observations_keep_their_names(run, arviz):
    saved(Spec((2,), columns=("mass", "spin"), context=(Variable("a"), Variable("b"))))
    Path("observed.csv").write_text("id,b,a\nGW15,1,2\nGW17,3,4\n")
    run("sample model.safetensors --given observed.csv --n 9 --out draws.nc")
    data = arviz.from_netcdf("draws.nc")
    assert data.observed_data.a.sel(observation="GW17") == 4
    assert data.posterior.mass.sel(observation="GW15").shape == (1, 9)


def test_without_names_all_elements_are_one_variable(run, arviz):
    saved(Spec((3,), context=(Variable("label", names=("a", "b")),)))
    run("sample model.safetensors --label b --n 5 --out draws.nc")
    data = arviz.from_netcdf("draws.nc")
    assert data.posterior.x.dims == ("chain", "draw", "x_dim_0")
    assert data.posterior.x.shape == (1, 5, 3)
    assert str(data.observed_data.label.values) == "b"
    saved(Spec((2,)))
    run("sample model.safetensors --n 5 --out draws.nc")
    assert arviz.from_netcdf("draws.nc").groups() == ["posterior"]


def test_what_cannot_be_written_is_refused_before_anything_is_drawn(run, monkeypatch):
    def fail(*_, **__):
        pytest.fail("it draws")

    monkeypatch.setattr(musigma.Chain, "generate", fail)
    saved(Spec((2,), columns=("draw", "a/b")))
    message = run("sample model.safetensors --n 5 --out draws.nc")
    assert "cannot be called 'draw', 'a/b': rename" in message
    message = run("sample model.safetensors --n 5 --out nowhere/draws.nc")
    assert "there is no folder nowhere" in message
    saved(Spec((2,), context=(Variable("label", names=("a", "b")),)))
    assert "choose it (--label)" in run("sample model.safetensors --n 5 --out draws.nc")
    message = run("sample model.safetensors --label a --out draws.nc --temperatures 0.5,1")
    assert "at one temperature" in message
    monkeypatch.setitem(sys.modules, "xarray", None)
    message = run("sample model.safetensors --label a --out draws.nc")
    assert "pip install 'musigma[arviz]'" in message
    assert not Path("draws.nc").exists()


def test_a_file_is_written_whole_or_not_at_all(run, monkeypatch):
    import xarray

    saved(Spec((2,)))
    Path("draws.nc").write_text("earlier")
    real, calls = xarray.Dataset.to_netcdf, []

    def interrupted(self, *args, **kwargs):
        calls.append(kwargs.get("group"))
        if len(calls) == 2:
            raise OSError("No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(xarray.Dataset, "to_netcdf", interrupted)
    assert "No space left" in run("sample model.safetensors --n 5 --out draws.nc")
    assert Path("draws.nc").read_text() == "earlier"
    assert sorted(map(str, Path().iterdir())) == ["draws.nc", "model.safetensors"]


def test_draws_that_are_not_finite_are_refused(run):
    saved(Spec((2,)))
    message = run("sample model.safetensors --n 5 --temperature 1e39 --out draws.nc")
    assert "5 of 5 examples are not finite" in message
    assert not Path("draws.nc").exists()
