"""Converted checkpoints compute what their own code computed: see golden/*.md."""

import io
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import musigma
from musigma.cli import main
from musigma.convert import FAMILIES, ForeignError, Options, autoencoder_kl, convert, export
from musigma.convert.reading import Contents, read
from musigma.layers import Classifier

GOLDEN = Path(__file__).parent / "golden"
FILES = {"chaiyujin": "save_0k0.pkg", "rosinality": "model_000001.pt", "openai": "model.npz"}
FILES |= {"compvis": "model.ckpt", "diffusers": "", "pythae": ""}
ALL = sorted(path.parent for path in GOLDEN.glob("*/*/expected.npz"))
GLOWS = [p for p in ALL if p.parent.name in ("chaiyujin", "rosinality", "openai")]
VAES = [p for p in ALL if p not in GLOWS]
ids = lambda path: f"{path.parent.name} {path.name}"  # noqa: E731
NEAR = 1e-10


def expected(folder):
    with np.load(folder / "expected.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def source(folder):
    if folder.parent.name == "bitsback":
        return next(p for p in folder.iterdir() if p.name.startswith("torch_"))
    return folder / FILES[folder.parent.name]


def options_for(folder, want):
    options = {}
    if folder.parent.name in ("rosinality", "openai", "diffusers", "compvis"):
        options["size"] = tuple(want["x"].shape[2:])
    if folder.parent.name == "compvis" and folder.name != "groups32":
        options["groups"] = 4
    if folder.name == "binary":
        options["format"] = "log_std"
    if folder.name == "affine_shuffle" and folder.parent.name == "chaiyujin":
        options["permutation"] = [want[f"shuffle_{i}"].tolist() for i in range(4)]
    return Options(**options)


def converted(folder, **more):
    want = expected(folder)
    return convert(source(folder), options=options_for(folder, want), **more), want


def off(a, b):
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


# -- parity


@pytest.mark.parametrize("folder", GLOWS, ids=ids)
def test_a_glow_agrees_with_its_own_code(folder):
    (model, family, _), want = converted(folder)
    assert family == {"openai": "openai-glow"}.get(folder.parent.name, folder.parent.name)
    flow, y = model.continuous(), want.get("y")
    levels = len(list(flow.latents()))
    assert flow.exact
    assert {p.dtype for p in flow.parameters()} == {torch.float64}
    with torch.no_grad():
        assert off(flow.log_prob(want["x"], y), want["log_p"]) < NEAR
        latents = flow.encode(want["x"], y)
        assert len(latents) == levels == sum(n[0] == "z" and n[1:].isdigit() for n in want)
        for i, z in enumerate(latents):
            assert off(z, want[f"z{i}"]) < NEAR
        assert off(flow.decode(latents, y), want["x"]) < NEAR
        noise = [want[f"eps{i}"] for i in range(levels)]
        assert off(flow.decode(noise, y, whiten=True), want["sample"]) < NEAR
        cooler = [0.7 * eps for eps in noise]
        assert off(flow.decode(cooler, y, whiten=True), want["sample_07"]) < NEAR
        if "z_eps0" in want:
            for i, z in enumerate(flow.encode(want["x"], y, whiten=True)):
                assert off(z, want[f"z_eps{i}"]) < NEAR
    if y is not None:
        (classifier,) = (m for m in model.modules() if isinstance(m, Classifier))
        logits = classifier.logits(latents[0])
        assert off(logits, want["y_logits"]) < NEAR
        assert classifier.labels == ("sigmoid" if folder.name == "y_multi" else "softmax")
        if family == "chaiyujin":  # 0.5 for a nat of the class, beside a bit of each pixel
            classes = y.shape[1] if folder.name == "y_multi" else 1
            assert abs(classifier.weight - 0.5 * math.log(2) * 96 / classes) < 1e-12
        if "bits_y" in want:
            assert off(-classifier.log_q(latents[0], y) / math.log(2), want["bits_y"]) < NEAR


@pytest.mark.parametrize("folder", GLOWS, ids=ids)
def test_the_figure_that_its_code_reports_follows_from_ours(folder):
    (model, family, _), want = converted(folder)
    bits, (c, *_) = model.config["options"]["bits"], want["x"].shape[1:]
    per_dim = -want["log_p"] / (math.log(2) * want["x"][0].numel()) + bits
    if family == "chaiyujin":  # bits per pixel of all channels, with the constant of one
        assert off(want["nll"] / c + 8 * (c - 1) / c, per_dim) < NEAR
        assert c == 1 or off(want["nll"] / c, per_dim) > 1
    else:
        assert off(want["nll"], per_dim) < NEAR
    # and ours, of integers, is that figure at the noise that was drawn
    torch.manual_seed(0)
    x = torch.randint(0, 2**bits, want["x"].shape)
    y = want.get("y")
    torch.manual_seed(1)
    ours = model.bits_per_dim(x, y)
    torch.manual_seed(1)
    u = torch.rand_like(want["x"])
    low = 0.0 if family == "chaiyujin" else -0.5
    log_p = model.continuous().log_prob((x + u) / 2**bits + low, y)
    assert off(ours, -log_p / (math.log(2) * x[0].numel()) + bits) < NEAR


@pytest.mark.parametrize("folder", VAES, ids=ids)
def test_a_vae_agrees_with_its_own_code(folder):
    (model, _, _), want = converted(folder)
    vae = model.continuous().double()  # one file is in float32
    assert isinstance(vae, musigma.VAE)
    x = want["x"].reshape(len(want["x"]), *model.config["shape"])
    with torch.no_grad():
        q = vae.encoder(x)
        assert off(q.mean, want["mean"]) < NEAR
        assert off(q.log_std, want["log_std"]) < NEAR
        assert off(q.unwhiten(want["eps"]), want["z"]) < NEAR
        p = vae.decoder(want["z"])
        size = want["kl"].abs().clamp(min=1)  # 1e10 nats where a scale is far out
        assert off(vae(x).kl.sum(1) / size, want["kl"] / size) < NEAR
        if "recon" in want:
            assert off(p.mean.reshape(want["recon"].shape), want["recon"]) < NEAR
        if "recon_alpha" in want:
            assert off(p.alpha.flatten(1), want["recon_alpha"]) < NEAR
            assert off(p.beta.flatten(1), want["recon_beta"]) < NEAR
        if "log_px" in want:
            assert off(p.log_prob(x), want["log_px"]) < NEAR
        if "recon_at_mean" in want:
            assert off(vae.reconstruct(x), want["recon_at_mean"]) < NEAR


@pytest.mark.parametrize("name", ["binary", "beta_binomial"])
def test_the_loss_of_bits_back_with_the_same_draw(name):
    folder = GOLDEN / "bitsback" / name
    (model, _, _), want = converted(folder)
    x = want["x"].reshape(-1, 1, 28, 28)
    torch.manual_seed(0)
    trace = musigma.Trace(given={})
    trace._choose = lambda site, dist: dist.unwhiten(want["eps"])  # its draw
    model.infer(x, trace)
    log_w = trace.evidence(model.latents()).elbo
    assert off(-log_w.mean() / (784 * math.log(2)), want["loss"]) < NEAR


def test_the_loss_of_pythae_up_to_its_constant():
    for name, beta in (("vae_mse", 1.0), ("vae_bce", 1.0), ("beta_vae", 4.0)):
        (model, _, _), want = converted(GOLDEN / "pythae" / name)
        vae = model.continuous()
        log_px = vae.decoder(want["z"]).log_prob(want["x"])
        kl = vae(want["x"]).kl.sum(1)
        constant = 15 * math.log(2 * math.pi) if name == "vae_mse" else 0.0
        assert off((beta * kl - log_px).mean() - constant, want["loss"]) < NEAR


# -- the same weights in other wrappings


@pytest.fixture
def first_stage(tmp_path):
    """The autoencoder as part of a checkpoint of a whole diffusion model."""
    file = torch.load(source(GOLDEN / "compvis" / "plain"), weights_only=True)
    state = {f"first_stage_model.{name}": t for name, t in file["state_dict"].items()}
    state |= {"betas": torch.rand(7), "model_ema.decay": torch.tensor(0.9)}
    state |= {"model.diffusion_model.time_embed.0.weight": torch.rand(4, 2)}
    state |= {f"model.diffusion_model.blocks.{i}.weight": torch.rand(2) for i in range(900)}
    state["cond_stage_model.transformer.weight"] = torch.rand(5, 4)
    torch.save({"state_dict": state, "global_step": 7, "epoch": 1}, tmp_path / "sd.ckpt")
    return tmp_path / "sd.ckpt"


def test_the_first_stage_of_a_diffusion_model(first_stage):
    options = Options(size=(16, 16), groups=4)
    model, family, _ = convert(first_stage, options=options)
    (plain, _, _), _ = converted(GOLDEN / "compvis" / "plain")
    assert family == "compvis"
    same(model, plain)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert bool((a[name] == b[name]).all()), name


def test_old_pickles_and_old_names_of_diffusers(tmp_path):
    folder = GOLDEN / "diffusers" / "plain"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    shutil.copy(folder / "config.json", tmp_path)
    same(convert(tmp_path).model, convert(folder).model)
    same(convert(GOLDEN / "diffusers" / "old_attention").model, convert(folder).model)


def test_signs_of_rosinalitys_scales(tmp_path):
    """A scale and a column of the plain convolution after it, both negated: the same flow."""
    folder = GOLDEN / "rosinality" / "affine_plain"
    (model, _, _), want = converted(folder)
    state = state_of(folder)
    state["blocks.0.flows.1.actnorm.scale"][0, ::2] *= -1
    state["blocks.0.flows.1.invconv.weight"][:, ::2] *= -1
    torch.save(state, tmp_path / "signs.pt")
    again = convert(tmp_path / "signs.pt", options=Options(size=tuple(want["x"].shape[2:])))
    same(again.model, model)


def test_parallel_wrappers_and_tensorflow_names(tmp_path):
    folder = GOLDEN / "chaiyujin" / "affine_lu"
    file = torch.load(source(folder), weights_only=True)
    file["graph"] = {f"module.{name}": t for name, t in file["graph"].items()}
    torch.save(file, tmp_path / "parallel.pkg")
    same(convert(tmp_path / "parallel.pkg").model, convert(source(folder)).model)
    folder = GOLDEN / "openai" / "learntop"
    with np.load(source(folder)) as arrays:
        named = {f"{name}:0": arrays[name] for name in arrays.files}
    named |= {"Variable_3:0": np.zeros(3), "global_step:0": np.array(5)}
    named["model/0/0/invconv/W/ExponentialMovingAverage:0"] = np.zeros((4, 4))
    np.savez(tmp_path / "tf.npz", **named)
    options = Options(size=(8, 12))
    same(convert(tmp_path / "tf.npz", options=options).model, converted(folder)[0].model)


# -- names that two codebases share


class ExamplesVAE(torch.nn.Module):
    """The VAE of pytorch/examples, rewritten for these tests."""

    def __init__(self, pixels=784, hidden=6, latents=3):
        super().__init__()
        self.fc1 = torch.nn.Linear(pixels, hidden)
        self.fc21, self.fc22 = (torch.nn.Linear(hidden, latents) for _ in range(2))
        self.fc3, self.fc4 = torch.nn.Linear(latents, hidden), torch.nn.Linear(hidden, pixels)

    def kl(self, x, scale):
        """KL(q || N(0, I)) in nats, by how the second head is read."""
        h = self.fc1(x.flatten(1)).relu()
        mean, raw = self.fc21(h), self.fc22(h)
        std = {"log_var": (raw / 2).exp(), "log_std": raw.exp(), "softplus": raw.exp().log1p()}
        return (mean**2 / 2 + std[scale] ** 2 / 2 - 0.5 - std[scale].log()).sum(1)


@pytest.fixture
def examples_vae():
    torch.manual_seed(0)
    return ExamplesVAE().double()


@pytest.mark.parametrize(
    ("words", "family", "scale"),
    [
        (["--format", "log_var"], "pytorch-examples", "log_var"),
        (["--format", "log_std"], "bits-back", "log_std"),
        (["--from", "pytorch-examples"], "pytorch-examples", "log_var"),
        (["--from", "bits-back"], "bits-back", "log_std"),
        (["--from", "pytorch-examples", "--format", "softplus"], "pytorch-examples", "softplus"),
    ],
)
def test_the_scale_of_shared_names_must_be_given(
    words, family, scale, examples_vae, tmp_path, capsys
):
    torch.save(examples_vae.state_dict(), tmp_path / "vae.pth")
    convert_to = ["convert", str(tmp_path / "vae.pth"), str(tmp_path / "vae.safetensors")]
    with pytest.raises(SystemExit):
        main(convert_to)
    error = capsys.readouterr().err
    assert "names of bits-back and of pytorch-examples" in error
    assert "--format log_std" in error
    assert "--format log_var" in error
    assert not (tmp_path / "vae.safetensors").exists()
    main([*convert_to, *words, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["from"] == family
    assert any(f"fc22 is read as {scale}" in note for note in said["notes"])
    model = musigma.load(tmp_path / "vae.safetensors")
    x = torch.randint(0, 2, (5, 1, 28, 28)).double()
    assert off(model(x).kl.sum(1), examples_vae.kl(x, scale)) < NEAR


def test_the_size_of_other_images_must_be_given(tmp_path):
    torch.save(ExamplesVAE(3 * 6 * 4).state_dict(), tmp_path / "vae.pth")
    with pytest.raises(ForeignError, match=r"fc1\.weight takes 72 numbers; give .*--size"):
        convert(tmp_path / "vae.pth", options=Options(format="log_var"))
    with pytest.raises(ForeignError, match=r"size: fc1\.weight takes 72 numbers, not .* 5x5"):
        convert(tmp_path / "vae.pth", options=Options(format="log_var", size=(5, 5)))
    model = convert(tmp_path / "vae.pth", options=Options(format="log_var", size=(6, 4))).model
    assert model.config["shape"] == [3, 6, 4]


def test_assumptions_are_noted(tmp_path):
    folder = GOLDEN / "rosinality" / "affine_lu"
    notes = convert(source(folder), options=Options(size=(16, 8))).notes
    assert [note for note in notes if note.startswith("bits: took 5")]
    notes = convert(source(folder), options=Options(size=(16, 8), bits=5)).notes
    assert not [note for note in notes if note.startswith("bits")]
    about = converted(GOLDEN / "compvis" / "groups32")[0].about
    assert [note for note in about["foreign"]["notes"] if note.startswith("groups: took 32")]


# -- wrappers, averages, and files with more than a state dict


def restated(state, change):
    return {change(name): t for name, t in state.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "vae.", "module.", "net._orig_mod.a."])
@pytest.mark.parametrize(
    "name", ["bitsback/beta_binomial", "compvis/plain", "rosinality/affine_lu"]
)
def test_prefixes_of_wrappers_are_removed(prefix, name, tmp_path):
    folder = GOLDEN / name
    state = restated(state_of(folder), lambda name: prefix + name)
    torch.save({"epoch": 3, "state_dict": state, "lr": torch.tensor(0.1)}, tmp_path / "w.pt")
    result = convert(tmp_path / "w.pt", options=options_for(folder, expected(folder)))
    same(result.model, converted(folder)[0].model)
    notes = "\n".join(result.notes)
    assert ("_orig_mod.' and 'module.' of wrappers" in notes) == (
        "_orig_mod" in prefix or "module" in prefix
    )
    assert "left out tensors that are not part of the model: lr" in notes


def test_wrappers_inside_and_parts_saved_apart(tmp_path):
    folder = GOLDEN / "compvis" / "plain"
    options = options_for(folder, expected(folder))
    state = state_of(folder)
    compiled = restated(state, lambda n: n.replace("encoder.", "encoder._orig_mod."))
    torch.save(compiled, tmp_path / "compiled.pt")
    parts = {}
    for name, t in state.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = t
    torch.save(parts, tmp_path / "parts.pt")
    for file in ("compiled.pt", "parts.pt"):
        same(convert(tmp_path / file, options=options).model, converted(folder)[0].model)
    twice = state | {f"module.{name}": t for name, t in state.items()}
    torch.save(twice, tmp_path / "twice.pt")
    with pytest.raises(ForeignError, match=r"two tensors are named .* without the wrappers"):
        convert(tmp_path / "twice.pt", options=options)


def wrappings(raw, mean):
    """Files that hold raw weights and averages, as several libraries write them."""
    lit = restated(mean, lambda n: "model_ema." + n.replace(".", ""))
    average = torch.optim.swa_utils.AveragedModel
    return {
        "two keys": {"model": raw, "model_ema": mean, "epoch": 1},
        "one dict": raw | restated(mean, lambda n: f"ema.{n}") | {"ema.decay": torch.tensor(0.9)},
        "CompVis": {"state_dict": raw | lit | {"model_ema.num_updates": torch.tensor(7)}},
        "lucidrains": {
            "ema": restated(raw, lambda n: f"online_model.{n}")
            | restated(mean, lambda n: f"ema_model.{n}")
            | {"ema.initted": torch.tensor(True)}
        },
        "Lightning": {"state_dict": mean, "current_model_state": raw},
        "a list": {"net": raw, "ema": {"decay": 0.9, "shadow_params": list(mean.values())}},
        average.__name__: {
            "raw": raw,
            "mine": restated(mean, lambda n: f"module.{n}") | {"n_averaged": torch.tensor(3)},
        },
    }


@pytest.mark.parametrize("how", wrappings({}, {}))
def test_averaged_and_raw_weights(how, examples_vae, tmp_path, capsys):
    raw = examples_vae.state_dict()
    mean = {name: t + 1 for name, t in raw.items()}
    options, models = Options(format="log_var"), {}
    for name, state in (("raw", raw), ("averaged", mean)):
        torch.save(state, tmp_path / "alone.pt")
        models[name] = convert(tmp_path / "alone.pt", options=options).model
    torch.save(wrappings(raw, mean)[how], tmp_path / "both.pt")
    default = convert(tmp_path / "both.pt", options=options)
    same(default.model, models["raw"])
    assert any("took the raw ones" in n and "(averaged)" in n for n in default.notes), (
        default.notes
    )
    for name, model in models.items():
        result = convert(tmp_path / "both.pt", options=options, weights=name)
        same(result.model, model)
        assert any(f"took the {name} ones" in note for note in result.notes)
    words = ["convert", str(tmp_path / "both.pt"), str(tmp_path / "m.safetensors")]
    main([*words, "--format", "log_var", "--weights", "averaged"])
    same(musigma.load(tmp_path / "m.safetensors"), models["averaged"])
    assert "took the averaged ones" in capsys.readouterr().err


def test_averages_of_tensorflow_and_those_that_are_missing(tmp_path):
    folder = GOLDEN / "openai" / "affine_shuffle"  # the order of a shuffle has no average
    options = options_for(folder, expected(folder))
    state = state_of(folder)
    mean = {n: t / 2 for n, t in state.items() if t.is_floating_point()}
    named = state | restated(mean, lambda n: f"{n}/ExponentialMovingAverage")
    np.savez(tmp_path / "both.npz", **{n: t.numpy() for n, t in named.items()})
    np.savez(tmp_path / "mean.npz", **{n: t.numpy() for n, t in (state | mean).items()})
    result = convert(tmp_path / "both.npz", options=options, weights="averaged")
    same(result.model, convert(tmp_path / "mean.npz", options=options).model)
    assert any("have no average and are the raw ones" in note for note in result.notes)
    same(convert(tmp_path / "both.npz", options=options).model, converted(folder)[0].model)


def test_one_of_several_sets_of_weights_must_be_named(examples_vae, tmp_path):
    state, options = examples_vae.state_dict(), Options(format="log_var")
    other = {name: t + 1 for name, t in state.items()}
    torch.save({"student": state, "teacher": other, "copy": dict(state)}, tmp_path / "two.pt")
    with pytest.raises(ForeignError, match=r"sets of weights: student \(raw\), teacher \(raw\)"):
        convert(tmp_path / "two.pt", options=options)
    torch.save(other, tmp_path / "other.pt")
    result = convert(tmp_path / "two.pt", options=options, weights="teacher")
    same(result.model, convert(tmp_path / "other.pt", options=options).model)
    with pytest.raises(ForeignError, match=r"no weights 'averaged'; it holds student \(raw\)"):
        convert(tmp_path / "two.pt", options=options, weights="averaged")
    torch.save({"swa": other, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
               tmp_path / "averages.pt")  # fmt: skip
    result = convert(tmp_path / "averages.pt", options=options)
    assert "weights: these are averages; the file holds no raw ones" in result.notes


# -- pickles that name classes


class Callback:
    """Stands for a class of a library that is not installed."""


class Settings(dict):
    """A dictionary with a state of its own, as those of omegaconf are."""


def without_classes(path):
    """Rename this module inside a pickle, so that its classes cannot be imported."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            gone = __name__[::-1].encode()
            changed = content.replace(__name__.encode(), gone) if name.endswith("pkl") else content
            archive.writestr(name, changed)


@pytest.mark.parametrize("zipped", [True, False])
def test_classes_that_are_not_installed(zipped, examples_vae, tmp_path):
    import enum

    settings = Settings(lr=1e-3)
    settings.parent = enum.auto
    file = {
        "state_dict": examples_vae.state_dict(),
        "callbacks": {Callback: {"best": torch.tensor(0.1)}, "other": Callback()},
        "hyper_parameters": settings,
        "loops": [np.float64(3.0), {1, 2}, slice(2), Path("somewhere")],
    }
    path = tmp_path / "model.ckpt"
    torch.save(file, path, _use_new_zipfile_serialization=zipped)
    if zipped:
        without_classes(path)
    result = convert(path, options=Options(format="log_var"))
    torch.save(examples_vae.state_dict(), tmp_path / "alone.pt")
    same(result.model, convert(tmp_path / "alone.pt", options=Options(format="log_var")).model)
    assert any("classes that were not loaded" in note for note in result.notes)


def test_a_whole_pickled_module(examples_vae, tmp_path):
    torch.save(examples_vae, tmp_path / "module.pt")
    without_classes(tmp_path / "module.pt")
    torch.save(examples_vae.state_dict(), tmp_path / "alone.pt")
    models = [
        convert(tmp_path / name, options=Options(format="log_var")).model
        for name in ("module.pt", "alone.pt")
    ]
    same(*models)


def test_torchscript_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", pickle.dumps(()))
        archive.writestr("script/data.pkl", pickle.dumps({}))
    with pytest.raises(ForeignError, match="a TorchScript archive, which is code"):
        convert(tmp_path / "script.pt")


# -- what is lost by conversion: nothing


def test_the_type_is_the_narrowest_without_rounding(tmp_path):
    exact, _ = converted(GOLDEN / "compvis" / "groups32")
    assert {p.dtype for p in exact.model.parameters()} == {torch.float32}
    state = torch.load(source(GOLDEN / "rosinality" / "affine_lu"), weights_only=True)
    torch.save(
        {n: t.float() if t.is_floating_point() else t for n, t in state.items()},
        tmp_path / "f32.pt",
    )
    options = Options(size=(16, 8))
    rounded = convert(tmp_path / "f32.pt", options=options)  # scales became logarithms
    assert next(rounded.model.parameters()).dtype == torch.float64
    single = convert(tmp_path / "f32.pt", options=options, dtype=torch.float32)
    assert next(single.model.parameters()).dtype == torch.float32
    halves = {
        n: t.half()
        for n, t in load_file(
            GOLDEN / "diffusers/plain/diffusion_pytorch_model.safetensors"
        ).items()
    }
    save_file(halves, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    shutil.copy(GOLDEN / "diffusers" / "plain" / "config.json", tmp_path)
    half = convert(tmp_path)
    assert next(half.model.parameters()).dtype == torch.float32
    export(half.model, half.about, tmp_path / "again", family="diffusers")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(
    "name", ["plain", "three_blocks", "no_quant", "single_channel", "clamped"]
)
def test_diffusers_to_musigma_and_back_gives_the_same_bytes(name, tmp_path, capsys):
    folder, out = GOLDEN / "diffusers" / name, tmp_path / "model.safetensors"
    main(["convert", str(folder), str(out)])
    main(["convert", str(out), str(tmp_path / "back"), "--to", "diffusers"])
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (folder / file).read_bytes(), file
    capsys.readouterr()


def test_diffusers_loads_an_exported_model(tmp_path):
    """Its own code, in a process of its own, computes what ours does."""
    torch.manual_seed(0)
    model = musigma.build(
        "autoencoder_kl", (3, 16, 16), widths=[8, 16], groups=4, attend=[1], latents=3
    )
    export(model, {}, tmp_path / "ours", family="diffusers")
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    vae = model.continuous()
    q = vae.encoder(x)
    np.savez(tmp_path / "x.npz", x=x.numpy())
    code = (
        "import sys, numpy, torch\n"
        "from diffusers import AutoencoderKL\n"
        "there, x = sys.argv[1:]\n"
        "model = AutoencoderKL.from_pretrained(there).eval()\n"
        "x = torch.from_numpy(numpy.load(x)['x'])\n"
        "with torch.no_grad():\n"
        "    q = model.encode(x).latent_dist\n"
        "    again = model.decode(q.mean).sample\n"
        "numpy.savez(there + '/out.npz', mean=q.mean, std=q.std, again=again)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ours"), str(tmp_path / "x.npz")],
        check=True,
        capture_output=True,
    )
    with np.load(tmp_path / "ours" / "out.npz") as theirs, torch.no_grad():
        assert off(q.mean, torch.from_numpy(theirs["mean"])) < 1e-5
        assert off(q.stddev, torch.from_numpy(theirs["std"])) < 1e-5
        assert off(vae.decoder(q.mean).mean, torch.from_numpy(theirs["again"])) < 1e-5


def test_options_that_diffusers_cannot_represent(tmp_path):
    (wide, _, about), _ = converted(GOLDEN / "compvis" / "attn")
    with pytest.raises(ValueError, match=r"embedded: .* 3 channels of z beside 4"):
        export(wide, about, tmp_path / "out", family="diffusers")
    (plain, _, about), want = converted(GOLDEN / "compvis" / "plain")
    export(plain, about, tmp_path / "out", family="diffusers")  # CompVis to diffusers
    again = convert(tmp_path / "out").model.continuous()
    assert off(again.encoder(want["x"]).mean, want["mean"]) < NEAR
    glow = musigma.build("glow", (1, 4, 4), levels=1, depth=1, hidden=4)
    with pytest.raises(ValueError, match="is musigma's autoencoder_kl; got glow"):
        export(glow, {}, tmp_path / "glow", family="diffusers")
    with pytest.raises(ValueError, match="to: the only format"):
        export(plain, {}, tmp_path / "other", family="pythae")


# -- a converted model is a model


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("chaiyujin/affine_invconv", []),
        ("rosinality/additive_lu", ["--size", "8x12"]),
        ("openai/affine_reverse", ["--size", "8x12"]),
        ("pythae/vae_bce", []),
        ("pythae/vae_mse", []),
        ("diffusers/three_blocks", ["--size", "8x12"]),
        ("bitsback/beta_binomial", []),
    ],
)
def test_every_command_takes_a_converted_model(folder, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["convert", str(source(GOLDEN / folder)), "model.safetensors", *words, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["from"] in FAMILIES
    shape = said["shape"]
    bits = musigma.load("model.safetensors").config["options"]["bits"]
    random = np.random.default_rng(0)
    np.save("data.npy", random.integers(0, 256, (6, *shape), np.uint8))
    run = "model.safetensors"
    main(["sample", run, "--n", "4", "--out", "s.npy"])
    main(["encode", run, "data.npy", "--out", "z.npz"])
    main(["decode", run, "z.npz", "--out", "x.npy"])
    main(["score", run, "data.npy", "--out", "scores.csv"])
    main(["evaluate", run, "data.npy", "--k", "3", "--json"])
    main(["inspect", run, "data.npy"])
    main(["info", run, "--ledger", "--data", "data.npy"])
    main(["reconstruct", run, "data.npy", "--out", "r.npy"])
    main(["interpolate", run, "data.npy", "--pairs", "2", "--steps", "3", "--out", "w.npy"])
    assert np.load("s.npy").shape == (4, *shape)
    if said["architecture"] == "published_glow":
        assert (np.load("x.npy") == np.load("data.npy") >> (8 - bits)).all()
    assert len(Path("scores.csv").read_text().splitlines()) == 7


def test_a_converted_model_trains_on(tmp_path):
    (model, _, _), want = converted(GOLDEN / "chaiyujin" / "y_single")
    x = torch.randint(0, 256, want["x"].shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        loss = musigma.objectives.elbo(model(x, want["y"])).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 10


# -- bad input


def state_of(folder):
    path = source(folder)
    if path.is_dir():
        found = next(p for p in path.iterdir() if p.suffix in (".safetensors", ".pt"))
        return (
            load_file(found)
            if found.suffix == ".safetensors"
            else torch.load(found)["model_state_dict"]
        )
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    file = torch.load(path, weights_only=True)
    state = dict(file.get("graph", file.get("state_dict", file)))
    return {name.removeprefix("module."): t for name, t in state.items()}


def written(state, folder, tmp_path):
    """The state in the family's own file, with what lies beside it."""
    path = source(folder)
    if path.is_dir():
        shutil.copytree(path, tmp_path / "copy", dirs_exist_ok=True)
        if folder.parent.name == "diffusers":
            save_file(
                {n: t.contiguous() for n, t in state.items()},
                tmp_path / "copy" / "diffusion_pytorch_model.safetensors",
            )
        else:
            torch.save({"model_state_dict": state}, tmp_path / "copy" / "model.pt")
        return tmp_path / "copy"
    if path.suffix == ".npz":
        np.savez(tmp_path / "copy.npz", **{n: t.numpy() for n, t in state.items()})
        return tmp_path / "copy.npz"
    torch.save(state, tmp_path / "copy.pt")
    return tmp_path / "copy.pt"


ONE_EACH = [
    GOLDEN / name
    for name in (
        "chaiyujin/affine_lu",
        "rosinality/affine_lu",
        "openai/learntop",
        "diffusers/plain",
        "compvis/attn",
        "bitsback/beta_binomial",
        "pythae/vae_bce",
    )
]


LARGE = {"affine_lu", "plain", "attn"}


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(folder, marks=pytest.mark.slow) if folder.name in LARGE else folder
        for folder in ONE_EACH
    ],
    ids=ids,
)
def test_missing_and_wrong_parameters_are_named(folder, tmp_path, monkeypatch):
    """Every parameter is missing once; the first of each kind is wrong in all ways."""
    state, options = state_of(folder), options_for(folder, expected(folder))
    path = read(written(state, folder, tmp_path)).path
    build, built = autoencoder_kl.build, {}

    def once(*given, **options):  # sizes alone, most of them the same
        key = repr((given, options))
        if key not in built:
            built[key] = build(*given, **options)
        return built[key]

    monkeypatch.setattr(autoencoder_kl, "build", once)

    def refusal(changed):
        monkeypatch.setattr("musigma.convert.read", lambda _: Contents(path, dict(changed)))
        with pytest.raises(ForeignError) as error:
            convert(path, options=options)
        return str(error.value)

    floats = [n for n, t in state.items() if t.is_floating_point() and t.numel() > 1]
    floats = [n for n in floats if "loss" not in n and n not in ("prior_h", "n")]
    kinds = set()
    for name in floats:
        others, tensor = {n: t for n, t in state.items() if n != name}, state[name]
        changes = [others]
        kind = re.sub(r"\d+", "", name)
        if kind not in kinds:
            kinds.add(kind)
            rows = tensor[: max(1, len(tensor) // 2)]
            shapes = [torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)]
            shapes += [torch.cat([rows, tensor, tensor])] + [rows] * (len(rows) < len(tensor))
            bad = torch.full_like(tensor, math.nan)
            changes += [state | {name: t} for t in (*shapes, bad)]
        for changed in changes:
            said = refusal(changed)
            assert (
                name in said
                or "but only" in said
                or "and not" in said
                or "size is unknown" in said
            ), (name, said)
        if len(changes) > 1:
            assert "not finite" in said or "is not" in said or "singular" in said
    said = refusal(state | {"some.other.weight": torch.ones(3)})
    assert "some.other.weight is not part of it" in said


@pytest.mark.parametrize("folder", ONE_EACH, ids=ids)
def test_truncated_and_damaged_files(folder, tmp_path):
    where = written(state_of(folder), folder, tmp_path)
    options = options_for(folder, expected(folder))
    path = where
    if where.is_dir():
        path = next(p for p in where.iterdir() if p.suffix in (".safetensors", ".pt"))
    whole = path.read_bytes()
    for cut in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ForeignError, match=re_path(path)):
            convert(where, options=options)
    path.write_bytes(b"\x00" * 400)
    with pytest.raises(ForeignError, match=re_path(path)):
        convert(where, options=options)


@pytest.mark.parametrize("folder", ONE_EACH, ids=ids)
def test_a_flipped_bit_is_noticed_where_the_format_has_checksums(folder, tmp_path):
    where = written(state_of(folder), folder, tmp_path)
    options = options_for(folder, expected(folder))
    path = where
    if where.is_dir():
        path = next(p for p in where.iterdir() if p.suffix in (".safetensors", ".pt"))
    whole, good = path.read_bytes(), convert(where, options=options).model
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        bad = bytearray(whole)
        bad[random.integers(len(bad))] ^= 1 << int(random.integers(8))
        path.write_bytes(bad)
        try:
            model = convert(where, options=options).model
        except ForeignError:
            refused += 1
        else:
            if path.suffix != ".safetensors":  # which has none
                same(model, good)
    assert refused > (0 if path.suffix == ".safetensors" else 30)


def test_files_that_claim_more_than_they_hold(tmp_path):
    """Terabytes by stride zero, a pickle that holds itself, an archive of nothing but zeros."""
    state = state_of(GOLDEN / "chaiyujin" / "affine_lu")
    for name, shape in (
        ("flow.layers.1.f.2.weight", (10**6, 10**6, 1, 1)),
        ("prior_h", (1, 32, 10**5, 10**5)),
        ("flow.layers.1.actnorm.bias", (1, 10**9, 1, 1)),
    ):
        torch.save(state | {name: torch.zeros(()).expand(shape)}, tmp_path / "wide.pt")
        with pytest.raises(ForeignError, match="not a plain tensor with all of its elements"):
            convert(tmp_path / "wide.pt")
    within: dict = {}
    within["model"] = within
    torch.save(within, tmp_path / "self.pt")
    with pytest.raises(ForeignError, match="holds no tensors"):
        convert(tmp_path / "self.pt")
    np.savez_compressed(tmp_path / "zeros.npz", **{"model/0/0/a": np.zeros(5 * 10**7, np.int8)})
    with pytest.raises(ForeignError, match="claims to hold far more"):
        convert(tmp_path / "zeros.npz")
    torch.save({"fc1.weight": torch.ones(3).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(ForeignError, match=r"fc1\.weight is not a plain tensor"):
        convert(tmp_path / "sparse.pt")
    np.savez(tmp_path / "twice.npz", **{"a": np.zeros(3), "a:0": np.ones(3)})
    with pytest.raises(ForeignError, match="two arrays of one name"):
        convert(tmp_path / "twice.npz")


def test_sources_that_are_not_models(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(ForeignError, match="is neither a file nor a folder"):
        convert(tmp_path / "pipe.pt")
    state = state_of(GOLDEN / "rosinality" / "affine_plain")
    state["blocks.0.flows.0.actnorm.loc"] = torch.zeros(1, 6, 1, 1)
    torch.save(state, tmp_path / "six.pt")
    with pytest.raises(ForeignError, match="has 6 channels, which is not a multiple of 4"):
        convert(tmp_path / "six.pt", options=Options(size=(8, 12)))
    state["blocks.0.flows.0.actnorm.loc"] = torch.zeros(1, 0, 1, 1)
    torch.save(state, tmp_path / "none.pt")
    with pytest.raises(ForeignError, match="so the model's size is unknown"):
        convert(tmp_path / "none.pt", options=Options(size=(8, 12)))


@pytest.mark.parametrize("kind", [torch.complex128, torch.int64, torch.bool])
def test_parameters_of_a_wrong_type(kind, tmp_path):
    state = state_of(GOLDEN / "bitsback" / "binary")
    torch.save(state | {"fc3.weight": state["fc3.weight"].to(kind)}, tmp_path / "kind.pt")
    with pytest.raises(ForeignError, match=r"fc3\.weight is \w+ and not floating"):
        convert(tmp_path / "kind.pt", family="bits-back")


@pytest.mark.parametrize(
    ("folder", "name", "change"),
    [
        ("chaiyujin/affine_lu", "flow.layers.1.invconv.sign_s", lambda t: t * 0),
        ("chaiyujin/affine_lu", "flow.layers.1.invconv.p", lambda t: t * 0 + 0.3),
        ("chaiyujin/affine_invconv", "flow.layers.1.invconv.weight", lambda t: t * 0),
        ("openai/additive_invconv", "model/0/1/invconv/W", lambda t: t * 0),
        ("openai/affine_shuffle", "model/0/1/shuffle/indices_inverse", lambda t: t.flip(0)),
        ("rosinality/affine_lu", "blocks.0.flows.1.actnorm.scale", lambda t: t * 0),
        ("rosinality/affine_lu", "blocks.0.flows.1.invconv.l_mask", lambda t: t * 0),
        ("rosinality/affine_lu", "blocks.0.flows.1.actnorm.initialized", lambda t: t * 0),
        ("chaiyujin/learn_top", "prior_h", lambda t: t + 1),
        ("bitsback/beta_binomial", "n", lambda t: t + 1),
    ],
)
def test_parts_with_impossible_values(folder, name, change, tmp_path):
    folder = GOLDEN / folder
    state, options = state_of(folder), options_for(folder, expected(folder))
    state[name] = change(state[name])
    with pytest.raises(ForeignError, match=re.escape(name.rsplit(".", 1)[0].rsplit("/", 1)[0])):
        convert(written(state, folder, tmp_path), options=options)


def test_parts_of_a_glow_that_are_missing_whole(tmp_path):
    folder = GOLDEN / "rosinality" / "affine_lu"
    state, options = state_of(folder), options_for(folder, expected(folder))

    def refusal(prefix):
        left = {name: t for name, t in state.items() if not name.startswith(prefix)}
        with pytest.raises(ForeignError) as error:
            convert(written(left, folder, tmp_path), options=options)
        return str(error.value)

    assert "blocks.2.prior.conv.weight is missing" in refusal("blocks.2.prior.")
    assert "the scales have [2, 0, 2] steps" in refusal("blocks.1.flows.")
    assert "the scales have [2, 2, 1] steps" in refusal("blocks.2.flows.1.")


def test_training_settings_in_the_parent_folder(tmp_path):
    folder = GOLDEN / "chaiyujin" / "y_multi"
    (tmp_path / "log" / "checkpoints").mkdir(parents=True)
    kept = shutil.copy(source(folder), tmp_path / "log" / "checkpoints" / "save_0k0.pkg")
    with pytest.raises(ForeignError, match="project_class predicts one label or several"):
        convert(kept)
    assert convert(kept, options=Options(labels="softmax")).model.layers[-1].labels == "softmax"
    shutil.copy(folder / "hparams.json", tmp_path / "log" / "run_celeba.json")
    same(convert(kept).model, converted(folder)[0].model)
    assert convert(kept).model.layers[-1].labels == "sigmoid"


def test_shards_and_half_precision_of_diffusers(tmp_path):
    folder = GOLDEN / "diffusers" / "plain"
    state = state_of(folder)
    (tmp_path / "shards").mkdir()
    names = list(state)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({n: state[n] for n in part}, tmp_path / "shards" / file)
        index |= dict.fromkeys(part, file)
    path = tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    shutil.copy(folder / "config.json", tmp_path / "shards")
    same(convert(tmp_path / "shards").model, convert(folder).model)
    path.write_text(json.dumps({"weight_map": {n: "../" + f for n, f in index.items()}}))
    with pytest.raises(ForeignError, match="names shards that are not"):
        convert(tmp_path / "shards")
    (tmp_path / "half").mkdir()
    halves = {n: t.half() for n, t in state.items()}
    save_file(halves, tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(folder / "config.json", tmp_path / "half")
    assert next(convert(tmp_path / "half").model.parameters()).dtype == torch.float32
    (tmp_path / "pipe").mkdir()
    shutil.copytree(folder, tmp_path / "pipe" / "vae")
    with pytest.raises(ForeignError, match="name its folder vae"):
        convert(tmp_path / "pipe")


def test_a_checkpoint_of_musigma_is_refused(tmp_path):
    musigma.save(musigma.build("mlp_vae", (4,), bits=None), tmp_path / "mine.safetensors")
    with pytest.raises(ForeignError, match="is already a checkpoint of musigma"):
        convert(tmp_path / "mine.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0},
        {"bits": 9},
        {"groups": 0},
        {"std": math.nan},
        {"size": (0, 4)},
        {"labels": "x"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        Options(**options)


def re_path(path):
    return re.escape(path.name)


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self):
        import os

        return os.system, ("touch was-here",)


def test_nothing_in_a_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc1.weight": Evil()}, "evil.pt")
    state = {f"fc{i}.weight": torch.ones(2, 2) for i in (1, 21, 22, 3, 4)}
    torch.save({"state_dict": state, "callbacks": [Evil(), {"a": Evil()}]}, "more.pt")
    torch.save(state | {"fc1.bias": Evil()}, "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez("evil.npz", x=np.array([Evil()], dtype=object))
    for name in ("evil.pt", "evil.pkl", "evil.npz", "more.pt", "old.pt"):
        with pytest.raises(ForeignError, match=name):
            convert(name)
    assert not (tmp_path / "was-here").exists()


def test_a_custom_network_of_pythae_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "pythae" / "vae_mse", tmp_path / "mine")
    said = json.loads((tmp_path / "mine" / "model_config.json").read_text())
    for key, value in (
        ("uses_default_encoder", False),
        ("name", "VQVAEConfig"),
        ("reconstruction_loss", "huber"),
        ("input_dim", "784"),
        ("input_dim", []),
        ("input_dim", [True, 6, 5]),
        ("latent_dim", 10**9),
        ("latent_dim", 0),
    ):
        (tmp_path / "mine" / "model_config.json").write_text(json.dumps(said | {key: value}))
        with pytest.raises(ForeignError, match=f"{key} in model_config.json is"):
            convert(tmp_path / "mine")
    (tmp_path / "mine" / "model_config.json").unlink()
    with pytest.raises(ForeignError, match=r"has a model_config\.json, and this one lacks it"):
        convert(tmp_path / "mine")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "relu"),
        ("_class_name", "VQModel"),
        ("down_block_types", ["DownEncoderBlock2D", "CrossAttnDownBlock2D"]),
        ("down_block_types", ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
        ("norm_num_groups", 3),
        ("norm_num_groups", None),
        ("norm_num_groups", 4.0),
        ("layers_per_block", "2"),
        ("layers_per_block", 10**9),
        ("in_channels", "3"),
        ("block_out_channels", None),
        ("block_out_channels", [10**9, 10**9]),
        ("latent_channels", 10**12),
        ("sample_size", 0),
        ("sample_size", -16),
        ("sample_size", 10**6),
        ("use_quant_conv", "no"),
        ("out_channels", 4),
        ("block_out_channels", [8, 24]),
        ("layers_per_block", 2),
    ],
)
def test_a_config_of_diffusers_that_cannot_be_represented(key, value, tmp_path):
    shutil.copytree(GOLDEN / "diffusers" / "plain", tmp_path / "mine")
    said = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps(said | {key: value}))
    with pytest.raises(ForeignError, match=r"copy|mine"):
        convert(tmp_path / "mine")


def test_weights_of_an_unknown_kind(tmp_path):
    torch.save({f"layer{i}.weight": torch.rand(2, 2) for i in range(4)}, tmp_path / "mine.pt")
    with pytest.raises(
        ForeignError, match=r"not a known kind of checkpoint; it holds 4 tensors, .* layer0.weight"
    ):
        convert(tmp_path / "mine.pt")
    with pytest.raises(ForeignError, match="missing"):
        convert(tmp_path / "mine.pt", family="bits-back")
    state = state_of(GOLDEN / "bitsback" / "binary")
    state |= {name: t[:, :-1] for name, t in state.items() if t.ndim == 2 and name != "fc1.weight"}
    state |= {f"more{i}": torch.ones(2) for i in range(4)}
    torch.save(state, tmp_path / "eight.pt")
    with pytest.raises(ForeignError) as error:
        convert(tmp_path / "eight.pt", family="bits-back")
    assert str(error.value).count(";") == 4  # the first five of eight
    assert re.search(r"more0 is not part of it, and 3 more\. The nearest known", str(error.value))
    with pytest.raises(ValueError, match=r"from: expected one of .* got 'zuko'"):
        convert(tmp_path / "mine.pt", family="zuko")
    rosinality = source(GOLDEN / "rosinality" / "affine_lu")
    with pytest.raises(ForeignError, match=r"missing.*; blocks.*The nearest known format is rosi"):
        convert(rosinality, family="chaiyujin")
    with pytest.raises(ForeignError, match="does not hold the image size"):
        convert(rosinality)
    with pytest.raises(ForeignError, match="size: 8x9 cannot be halved 3 times"):
        convert(rosinality, options=Options(size=(8, 9)))
    with pytest.raises(ValueError, match="std: does not apply to a checkpoint of rosinality"):
        convert(rosinality, options=Options(size=(16, 8), std=0.3))


def test_conversion_into_a_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pickled = str(source(GOLDEN / "chaiyujin" / "learn_top"))
    main(["convert", pickled, "run"])
    main(["sample", "run", "--n", "2", "--out", "s.npy"])
    with pytest.raises(SystemExit):
        main(["convert", pickled, "run"])
    assert "already exists" in capsys.readouterr().err
    main(["convert", pickled, "run", "--overwrite"])


def test_the_order_of_a_shuffle_must_be_given(tmp_path):
    folder = GOLDEN / "chaiyujin" / "affine_shuffle"
    with pytest.raises(ForeignError, match="got 'shuffle'"):
        convert(source(folder))
    shutil.copy(source(folder), tmp_path / "alone.pkg")  # without the settings beside it
    with pytest.raises(ForeignError, match="got None"):
        convert(tmp_path / "alone.pkg")
    for unknown in (5, True, [3], {"order": 1}):
        (tmp_path / "settings.json").write_text(
            json.dumps({"Glow": {"flow_permutation": unknown}})
        )
        with pytest.raises(ForeignError, match="got None"):
            convert(tmp_path / "alone.pkg")
    with pytest.raises(ForeignError, match="permutation: expected 4 orders"):
        convert(source(folder), options=Options(permutation=[[0, 1]]))
    orders = [expected(folder)[f"shuffle_{i}"].tolist() for i in range(4)]
    (tmp_path / "orders.json").write_text(json.dumps(orders))
    out = tmp_path / "m.safetensors"
    main(
        ["convert", str(source(folder)), str(out), "--permutation", str(tmp_path / "orders.json")]
    )
    same(musigma.load(out), converted(folder)[0].model)


def test_bad_arguments_of_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    glow = str(source(GOLDEN / "rosinality" / "affine_lu"))
    (tmp_path / "there.safetensors").write_text("mine")
    for words, reason in (
        (
            [glow, "x.safetensors", "--size", "eight"],
            "size: expected a side such as 32, or height x width",
        ),
        ([glow, "there.safetensors", "--size", "16x8"], "already exists"),
        ([glow, "x.pt", "--size", "16x8"], "expected a .safetensors file"),
        ([glow, "no/x.safetensors", "--size", "16x8"], "expected a .safetensors file"),
        ([glow, "x.safetensors", "--from", "zuko"], "from: expected one of"),
        (["nothing.pt", "x.safetensors"], "there is no such file or folder"),
        ([glow, "x.safetensors", "--permutation", "no.json"], "permutation: expected 'reverse'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", *words])
        assert stop.value.code == 2
        assert reason in capsys.readouterr().err
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there.safetensors"]


def test_a_converted_model_is_finetuned_stopped_and_resumed(tmp_path, capsys, monkeypatch):
    """In float64, on images in a folder; ends in the same bytes as without the stop."""
    from PIL import Image

    import musigma.training

    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(40):
        pixels = random.integers(0, 256, (8, 12, 3), np.uint8)
        Image.fromarray(pixels).save(f"photos/{i:02}.png")
    main(["convert", str(source(GOLDEN / "chaiyujin" / "affine_invconv")), "start.safetensors"])
    words = ["finetune", "start.safetensors", "photos", "--steps", "12", "--warmup", "2"]
    words += ["--ema", "0.5"]
    main([*words, "--out", "whole", "--json"])
    said = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert said["finished"]
    before = musigma.evaluate(musigma.load("start.safetensors"), musigma.data.load("photos"))
    assert said["evaluation"]["bits_per_dim"] < before["bits_per_dim"] - 0.1
    fit = musigma.training.fit
    halted = lambda *a, **k: fit(*a, **k, stop=lambda step: step == 5)  # noqa: E731
    monkeypatch.setattr(musigma.training, "fit", halted)
    main([*words, "--out", "parts"])
    monkeypatch.setattr(musigma.training, "fit", fit)
    main(["train", "--resume", "parts"])
    for file in ("model.safetensors", "last.safetensors"):
        assert Path("parts", file).read_bytes() == Path("whole", file).read_bytes()
    extra = musigma.checkpoint.read("parts/last.safetensors")[1]
    assert extra["foreign"]["family"] == "chaiyujin"  # so that it can be written back
    assert next(musigma.load("parts/last.safetensors").parameters()).dtype == torch.float64
    with pytest.raises(SystemExit):
        main([*words, "--out", "whole"])
    assert "already exists" in capsys.readouterr().err


def test_a_format_that_is_given_is_the_nearest_of_those_with_its_names(tmp_path):
    shapes = {"fc1": (16, 64), "fc21": (3, 16), "fc22": (3, 16), "fc3": (16, 3), "fc4": (64, 16)}
    tensors = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    torch.save(tensors, tmp_path / "x.pt")
    options = Options(format="log_var", size=(8, 8))
    with pytest.raises(ForeignError, match=r"pytorch-examples .*fc1.bias is missing") as error:
        convert(tmp_path / "x.pt", options=options)
    assert "The nearest known format is pytorch-examples" in str(error.value)
    torch.save({"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, tmp_path / "y.pt")
    with pytest.raises(ForeignError, match=r"not a known kind .*; it holds no tensors of a model"):
        convert(tmp_path / "y.pt")


def test_pointers_and_pages_are_no_checkpoints(tmp_path):
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
        with pytest.raises(ForeignError, match=f"{name}: is a pointer of Git LFS .*git lfs pull"):
            convert(tmp_path / name)
        (tmp_path / name).write_text("<!DOCTYPE html><p>404")
        with pytest.raises(ForeignError, match=f"{name}: is a web page or XML: fetch it again"):
            convert(tmp_path / name)
