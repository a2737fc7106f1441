"""The architecture of the package: imports point downwards, and importing is fast."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import musigma

SOURCE = Path(musigma.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# A module imports only from lower ranks. Imports within a package (layers, zoo, cli) are free.
RANKS = {
    "gaussian": 1,
    "files": 0,
    "frames": 0,
    "memory": 0,
    "named": -1,
    "solvers": 0,
    "processes": 0,
    "spec": 0,
    "schema": -1,
    "support": -1,
    "conditions": 0,
    "tensors": -1,
    "context": 0,
    "nets": 1,
    "distributions": 2,
    "trace": 1,
    "layer": 2,
    "model": 3,
    "conditional": 4,
    "ensemble": 4,
    "posterior": 5,
    "ladder": 4,
    "quantized": 4,
    "imputation": 4,
    "any_order": 4,
    "questions": 5,
    "anomaly": 8,
    "objectives": 2,
    "layers": 4,
    "testing": 5,
    "zoo": 5,
    "checkpoint": 6,
    "data": 6,
    "plugins": 6,
    "evaluation": 7,
    "editing": 8,
    "comparison": 8,
    "convert": 8,
    "audit": 8,
    "coding": 8,
    "training": 8,  # it evaluates during training, so evaluation has a lower rank
    "report": 6,
    "detectors": 9,
    "scorer": 9,
    "energy": 9,
    "coverage": 9,
    "explore": 10,
    "export": 8,
    "cli": 11,
    "sklearn": 10,
    "sbi": 10,
    "pyod": 11,
    "__init__": 10,
    "__main__": 12,
}

# The one module that owns a library that is heavy or optional; it imports it inside functions.
OWNERS = {
    "accelerate": {"training"},
    "cyclopts": {"cli"},
    "rich": {"cli"},
    "docstring_parser": {"cli"},
    "PIL": {"data", "report", "coding", "detectors"},
    "constriction": {"coding"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "safetensors": {"checkpoint", "training", "convert"},
    "pooch": {"data", "explore"},
    "anndata": {"data"},
    "sklearn": {"comparison", "data", "editing", "evaluation", "pyod", "sklearn"},
    "pyod": {"pyod"},
    "pyarrow": {"cli", "data", "frames", "scorer"},
    "fsspec": {"data"},
    "filelock": {"files"},
    "sbi": {"sbi"},
    "xarray": {"cli"},
    "mcp": {"cli"},
    "fastapi": {"explore"},
    "starlette": {"explore"},
    "uvicorn": {"explore"},
    "onnxruntime": {"export"},
    "umap": {"explore"},
}

# Modules that serve one library, so nothing is gained if they import it later.
FRONTS = {"cli", "explore", "pyod", "sbi", "sklearn"}


def room(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def imports(path: Path):
    """(module, line, inside a function) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "musigma":
            for name in node.names:
                if name.name != "__version__":
                    yield f"musigma.{name.name}", node.lineno, node in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module, node.lineno, node in inside
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno, node in inside


def test_every_module_has_a_rank():
    assert {room(path) for path in MODULES} == set(RANKS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path):
    for name, line, _ in imports(path):
        if name.startswith("musigma."):
            target = name.split(".")[1]
            assert target == room(path) or RANKS[target] < RANKS[room(path)], (
                f"{path.relative_to(SOURCE)}:{line} imports {name}, which is not below it"
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_libraries_stay_with_their_owners(path):
    for name, line, inside in imports(path):
        top = name.split(".")[0]
        if top in OWNERS:
            where = f"{path.relative_to(SOURCE)}:{line} imports {name}"
            assert room(path) in OWNERS[top], f"{where}, which {OWNERS[top]} own"
            assert inside or room(path) in FRONTS, f"{where} at the top of the module"


def test_importing_musigma_imports_no_heavy_library():
    heavy = [*OWNERS, "torch", "numpy", "pandas", "scipy"]
    code = f"import sys, musigma; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_lazy_names_are_those_that_type_checkers_see():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(musigma.__all__)
    for name, module in seen.items():
        value = (
            importlib.import_module(f"{module}.{name}")
            if module == "musigma"
            else getattr(importlib.import_module(module), name)
        )
        assert getattr(musigma, name) is value


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'musigma' has no attribute 'nothing_of_this_name'"):
        musigma.nothing_of_this_name  # noqa: B018


def test_public_names_exist_and_are_few():
    assert len(musigma.__all__) <= 45
    for name in musigma.__all__:
        assert getattr(musigma, name) is not None


@pytest.mark.parametrize("package", ["", ".distributions", ".layers", ".nets"])
def test_no_public_name_means_something_else_in_torch_distributions(package):
    import torch.distributions

    module = importlib.import_module(f"musigma{package}")
    for name in module.__all__:
        theirs = getattr(torch.distributions, name, None)
        assert theirs is None or theirs is getattr(module, name), name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_modules_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 700
    assert path.stem not in ("utils", "common", "helpers")


def test_library_code_neither_prints_nor_exits():
    for path in MODULES:
        if room(path) in ("cli", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "exit", "breakpoint"), f"{path}:{node.lineno}"


def test_the_core_sets_no_seeds_and_touches_no_files():
    core = {name for name, rank in RANKS.items() if rank <= 5} - {"files", "testing"}
    for path in MODULES:
        if room(path) in core:
            text = path.read_text(encoding="utf-8")
            for word in ("manual_seed", "open(", "os.environ", "set_default", "Path("):
                assert word not in text, f"{path.relative_to(SOURCE)}: {word}"
