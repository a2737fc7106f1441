"""Exported functions give the numbers of the model, in PyTorch's and in ONNX's runtime."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import musigma
from musigma import context as contexts
from musigma import export
from musigma.checkpoint import save
from musigma.cli import main
from musigma.distributions import LikelihoodHead
from musigma.export import writing
from musigma.export.draws import Draws
from musigma.export.functions import KINDS
from musigma.export.programs import difference
from musigma.gaussian import GaussianHead
from musigma.model import VAE, Prior
from musigma.schema import Column, Schema
from musigma.spec import Spec, Variable
from musigma.testing import randomized
from musigma.zoo.parts import StandardNormal

# --- noise ---------------------------------------------------------------------------------------


def test_noise_is_what_torch_would_draw():
    def drawn():
        z = torch.randn(3, 2), torch.rand_like(torch.zeros(3)), torch.empty(3).exponential_()
        return [*z, torch.randn_like(z[0]), torch.zeros(2).normal_()]

    torch.manual_seed(5)
    wanted = drawn()
    torch.manual_seed(5)
    with Draws() as draws:
        drawn()
    with Draws([draw.noise for draw in draws.asked]):
        got = drawn()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert [d.law for d in draws.asked] == ["normal", "uniform", "exponential", *["normal"] * 2]


def test_discrete_draws_have_their_probabilities():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    torch.manual_seed(0)
    with Draws() as draws:
        ones = torch.bernoulli(p.expand(20_000, 4)).mean(0)
        chosen = torch.multinomial(p.expand(20_000, 4), 1)[:, 0]
    assert (ones - p).abs().max() < 0.015
    assert (torch.bincount(chosen, minlength=4) / 20_000 - p).abs().max() < 0.015
    assert {draw.law for draw in draws.asked} == {"uniform"}


# --- equality ------------------------------------------------------------------------------------


def built(kind):
    """A small model of a kind."""
    torch.manual_seed(0)
    image, label = Spec((1, 8, 8), 256), Variable("label", names=("a", "b"))
    mlp = {"net": "mlp", "latents": 4, "width": 16}
    vectors = Spec((3,), columns=("u", "v", "w"))
    models = {
        "vae": lambda: musigma.build("vae", image, **mlp),
        "conv": lambda: musigma.build("vae", image, net="conv", latents=4, width=8),
        "bernoulli": lambda: musigma.build("vae", Spec((1, 8, 8), 2), **mlp),
        "conditional": lambda: musigma.build(
            "vae", Spec((1, 8, 8), 256, context=(label, Variable("age"))), **mlp
        ),
        "flow-prior": lambda: musigma.build(
            "vae", vectors, latents=2, width=8, prior="flow", prior_depth=2
        ),
        "table": lambda: musigma.build("vae", vectors, latents=2, width=8, standardize=True),
        "glow": lambda: musigma.build("glow", image, levels=2, depth=1, hidden=8),
        "realnvp": lambda: musigma.build("realnvp", vectors, depth=2),
        "nsf": lambda: musigma.build("nsf", vectors, depth=2),
        "maf": lambda: musigma.build("maf", vectors, depth=2),
    }
    return randomized(models[kind]()).float().eval()


def near(got, wanted):
    """Whether numbers differ by 1e-5 at most, relative where they are above one."""
    wanted = wanted.numpy(force=True)
    error = np.abs(got - wanted) / np.maximum(np.abs(wanted), 1)
    return got.shape == wanted.shape and error.max() < 1e-5


def inputs_of(model, function, n):
    """New inputs of a function for n examples, and the seed of their noise."""
    laws = {
        "normal": torch.randn,
        "uniform": torch.rand,
        "exponential": lambda *s: torch.empty(*s).exponential_(),
    }
    found = {}
    torch.manual_seed(11)
    for value in function.inputs:
        shape = (n, *value.tensor.shape[1:])
        if value.law:
            continue
        if value.name == "x" and model.spec.levels:
            found[value.name] = torch.randint(model.spec.levels, shape).float()
        elif value.name == "label":
            found[value.name] = torch.eye(2)[torch.randint(2, (n,))]
        elif value.name == "temperature":
            found[value.name] = torch.rand(n)
        else:
            found[value.name] = torch.randn(shape)
    torch.manual_seed(12)  # the draws of torch, in their order
    for value in function.inputs:
        if value.law:
            found[value.name] = laws[value.law](n, *value.tensor.shape[1:])
    return found


def answers(model, function, given):
    """What the methods of the model say of these inputs."""
    named = {v.name: given[v.name] for v in model.spec.context}
    context = named if len(named) > 1 else None
    torch.manual_seed(12)
    n = len(next(iter(given.values())))
    if function.name == "log_prob":
        return {function.outputs[0].name: model.elbo(given["x"], context)}
    if function.name == "sampler":
        return {"x": model.sample(n, context, temperature=given["temperature"])}
    if function.name == "decoder":
        z = [t for name, t in given.items() if name.startswith("z")]
        return {"x": model.decode(z, context)}
    z = model.encode(given["x"], context, mode=True)
    if function.outputs[0].name == "mean" and len(function.outputs) == 2:
        return {"mean": z[0]}
    return {f"z{i}" if len(z) > 1 else "z": t for i, t in enumerate(z)}


KINDS_OF_MODELS = ["vae", "conv", "bernoulli", "conditional", "flow-prior", "table"]
KINDS_OF_MODELS += ["glow", "realnvp", "nsf", "maf"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_MODELS)
def test_onnx_runtime_gives_the_numbers_of_the_model(kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'musigma[export]'")
    model = built(kind)
    functions = export.functions_of(model)
    assert [function.name for function in functions] == list(export.NAMES)
    about = export.write(model, functions, tmp_path / "files")
    assert json.loads((tmp_path / "files" / "sheet.json").read_text()) == about
    for function in functions:
        row = about["functions"][function.name]
        assert row["largest_difference"] < 1e-5
        session = runtime.InferenceSession(tmp_path / "files" / row["file"])
        assert [v.name for v in session.get_inputs()] == [v["name"] for v in row["inputs"]]
        assert [v.name for v in session.get_outputs()] == [v["name"] for v in row["outputs"]]
        assert [v.shape[0] for v in session.get_inputs()] == ["batch"] * len(function.inputs)
        for n in (1, 2, 6):
            given = inputs_of(model, function, n)
            arrays = {name: t.numpy() for name, t in given.items()}
            names = [v["name"] for v in row["outputs"]]
            got = dict(zip(names, session.run(None, arrays), strict=True))
            if (kind, function.name) == ("bernoulli", "sampler"):
                assert set(np.unique(got["x"])) <= {0.0, 1.0}
                continue
            for name, wanted in answers(model, function, given).items():
                assert near(got[name], wanted), (function.name, name, n)


@pytest.mark.slow
def test_typed_columns_are_exported_by_torch(tmp_path):
    random = np.random.default_rng(0)
    rows = np.stack([random.normal(size=200), random.integers(0, 3, 200)], 1)
    columns = Column("height"), Column("kind", "category", ("a", "b", "c"))
    schema = Schema(columns).measure(rows)
    model = musigma.build("nsf", Spec((2,), schema=schema), depth=1)
    model = randomized(model).float().eval()
    functions = export.functions_of(model, ["log_prob"])
    export.write(model, functions, tmp_path / "log_prob.pt2", "torch")
    program = torch.export.load(tmp_path / "log_prob.pt2").module()
    x = torch.from_numpy(rows[:5])
    torch.manual_seed(3)
    noise = torch.rand(5, 2)
    torch.manual_seed(3)
    assert near(program(x, noise)[0].numpy(force=True), model.elbo(x))


class Vectors(nn.Module):
    """The smallest VAE of vectors."""

    @staticmethod
    def model(read=None):
        torch.manual_seed(0)
        encoder = GaussianHead(nn.Linear(3, 4), event_ndims=1)
        decoder = GaussianHead(nn.Linear(2, 6), event_ndims=1)
        if read is not None:
            decoder = LikelihoodHead(nn.Linear(2, 3), read)
        model = VAE(encoder, decoder, Prior(StandardNormal((2,)))).eval()
        model.spec = Spec((3,))
        return model


@pytest.mark.slow
def test_a_program_of_torch_gives_the_elbo_for_its_noise(tmp_path):
    model = Vectors.model()
    functions = export.functions_of(model, ["log_prob"])
    about = export.write(model, functions, tmp_path / "elbo.pt2", "torch")
    assert json.loads((tmp_path / "elbo.json").read_text()) == about
    program = torch.export.load(tmp_path / "elbo.pt2").module()
    for n in (1, 5):
        x = torch.randn(n, 3)
        torch.manual_seed(1)
        noise = torch.randn(n, 2)
        torch.manual_seed(1)
        assert near(program(x, noise)[0].numpy(force=True), model.elbo(x))
    row = about["functions"]["log_prob"]
    assert row["outputs"][0]["unit"] == "nats per example"
    assert row["inputs"][1] == {
        "name": "noise",
        "type": "float32",
        "shape": ["batch", 2],
        "what": "normal noise of DiagonalGaussian",
        "law": "normal",
    }


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.slow
def test_all_functions_that_cannot_be_exported_are_named():
    from musigma.distributions import FactorizedPoisson

    model = Vectors.model(FactorizedPoisson)
    with pytest.raises(ValueError, match="poisson") as error:
        export.functions_of(model, ["decoder", "sampler"])
    assert "decoder can be exported: choose with --function" in str(error.value)


def test_layers_that_round_are_refused():
    rounding = musigma.build("idf", (1, 4, 4), bits=8)
    with pytest.raises(ValueError, match="round to integers") as error:
        export.functions_of(rounding)
    assert all(name in str(error.value) for name in export.NAMES)


@pytest.mark.slow
def test_loops_that_depend_on_the_data_are_refused():
    model = randomized(musigma.build("planar", (2,), depth=1)).float()
    with pytest.raises(ValueError, match=r"Planar.*steps that depend on the values") as error:
        export.functions_of(model)
    assert "encoder, log_prob can be exported" in str(error.value)
    ode = randomized(musigma.build("cnf", (2,))).float()
    with pytest.raises(ValueError, match="NeuralODE"):
        export.functions_of(ode)


def test_names_and_models_are_checked():
    model = Vectors.model()
    with pytest.raises(ValueError, match="function: expected encoder, decoder"):
        export.functions_of(model, ["density"])
    model.spec = None
    with pytest.raises(ValueError, match=r"model\.spec"):
        export.functions_of(model)


def test_rounding_errors_of_levels_are_those_of_the_largest():
    wanted = torch.tensor([0.01, 200.0])
    assert difference([wanted + 1e-3], [wanted]) == pytest.approx(1e-3, rel=0.02)
    assert difference([wanted + 1e-3], [wanted], [256]) == pytest.approx(1e-3 / 255, rel=0.02)
    levels = torch.arange(200.0)
    assert difference([levels + (levels == 3)], [levels], [256]) == 0.0  # a tie, rounded up
    assert difference([levels + (levels == 3)], [levels]) == pytest.approx(1 / 3)
    assert difference([levels + 2 * (levels == 3)], [levels], [256]) == pytest.approx(2 / 255)
    assert difference([levels + 1], [levels], [256]) == pytest.approx(1 / 255)
    assert difference([levels * torch.nan], [levels], [256]) == torch.inf


@pytest.mark.slow
def test_columns_with_types_are_refused_by_onnx_and_no_other_way(tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install 'musigma[export]'")
    rows = np.stack([np.arange(40.0), np.arange(40) % 3], 1)
    columns = Column("height"), Column("kind", "category", ("a", "b", "c"))
    spec = Spec((2,), columns=("height", "kind"), schema=Schema(columns).measure(rows))
    model = musigma.build("vae", spec, latents=2, width=4)
    functions = export.functions_of(model, ["encoder"])
    with pytest.raises(ValueError, match=r"encoder: ONNX has no .*typed columns.*--torch-export"):
        export.write(model, functions, tmp_path / "files")
    assert not list(tmp_path.iterdir())
    export.write(model, functions, tmp_path / "encoder.pt2", "torch")


def test_a_file_that_cannot_be_run_is_not_kept(tmp_path, monkeypatch):
    def load(path):
        raise RuntimeError("there is no Erf of float64\nand a trace")

    how = writing.KINDS["torch"]._replace(load=load)
    monkeypatch.setitem(writing.KINDS, "torch", how)
    model = Vectors.model()
    functions = export.functions_of(model, ["decoder"])
    with pytest.raises(ValueError, match=r"decoder: .* \(there is no Erf of float64\); nothing"):
        export.write(model, functions, tmp_path / "decoder.pt2", "torch")
    assert not list(tmp_path.iterdir())


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    model = musigma.build("vae", Spec((3,), columns=("u", "v", "w")), latents=2, width=4)
    folder = tmp_path / "run"
    folder.mkdir()
    save(randomized(model), folder / "model.safetensors")
    return folder


def test_the_command_writes_a_folder_and_keeps_what_is_there(run, tmp_path, capsys):
    out = tmp_path / "files"
    words = ["export", str(run), "--torch-export", str(out), "--function", "decoder", "--json"]
    main(words)
    answer = json.loads(capsys.readouterr().out)
    assert answer["largest_difference"]["decoder"] < 1e-5
    assert sorted(path.name for path in out.iterdir()) == ["decoder.pt2", "sheet.json"]
    about = json.loads((out / "sheet.json").read_text())
    assert about["data"]["spec"]["columns"] == ["u", "v", "w"]
    assert about["functions"]["decoder"]["file"] == "decoder.pt2"
    for more, text in (
        ([], "already exists; pass --overwrite"),
        (["--onnx", str(out)], "one of --onnx, --torch-export and --static"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*words, *more])
        assert end.value.code == 2
        assert text in capsys.readouterr().err
    main([*words, "--overwrite"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "run"]


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ("nowhere/files", "there is no folder"),
        ("all.pt2", "a file holds one function"),
        ("all.onnx", "expected a folder, or a .pt2 file"),
        ("run", "no folder of an earlier export"),
    ],
)
def test_paths_are_checked_first(run, tmp_path, out, text, capsys):
    with pytest.raises(SystemExit):
        main(["export", str(run), "--torch-export", str(tmp_path / out), "--overwrite"])
    assert text in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_of_other_files_is_not_replaced(run):
    with pytest.raises(ValueError, match=r"no folder of an earlier export \(it has no sheet.json"):
        export.write(Vectors.model(), [], run, "torch")
    assert [path.name for path in run.iterdir()] == ["model.safetensors"]


def test_missing_libraries_are_named(run, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["export", str(run), "--onnx", str(run / "files")])
    assert "it needs onnx, onnxscript, onnxruntime: pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_of_other_numbers_is_not_written(tmp_path, monkeypatch):
    model = Vectors.model()
    functions = export.functions_of(model, ["encoder"])
    how = writing.KINDS["torch"]
    load = lambda path: lambda inputs: [t + 1e-3 for t in how.load(path)(inputs)]  # noqa: E731
    monkeypatch.setitem(writing.KINDS, "torch", how._replace(load=load))
    with pytest.raises(ValueError, match="encoder: the exported function differs"):
        export.write(model, functions, tmp_path / "files", "torch")
    assert not list(tmp_path.iterdir())


def test_context_is_an_input_of_every_function():
    label = Variable("label", names=("a", "b"))
    model = musigma.build("vae", Spec((3,), context=(label,)), latents=2, width=4)
    for kind in KINDS.values():
        values = kind(model).inputs()
        assert values[-1].name == "label"
        assert contexts.length(values[-1].tensor) == len(values[0].tensor)
