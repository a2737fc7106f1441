"""Requests that the schema of `musigma explore` allows, and others, get no server error."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import musigma
from musigma.explore import Explorer
from musigma.spec import Spec
from musigma.testing import randomized

RANGES = {"index": 40, "label": 2, "seed": 9, "count": 4, "along": 4, "level": 2, "first": 40,
          "temperature": 2, "rate": 1, "noise": 2}  # fmt: skip
CHOICES = {
    "set": ["", "0:1.5", "0:1,1:-2", "9:9", "x"],
    "move": ["", "0:1", "1:-2,0:1", "99:1", "0"],
    "places": ["0,0", "1,-1;2,2", "0", "1,x", ";"],
    "axes": ["components", "0,1", "1,0", "0,0", "umap", "z"],
    "start": ["prior", "example", "here"],
    "color": ["", "score", "label", "column u", "red"],
    "upload": ["", "0123456789ab"],
    "format": ["halves", "interleaved log_var", "per-feature softplus", "x"],
    "sampler": ["log_std", "tanh", "x"],
    "kl": ["log_std", "log_var", "x"],
    "numbers": ["1,2,3,4,5,6", "1", "nan,0,0,0,0,0"],
}


def explorer_of(kind):
    """The page of a tiny model."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    if kind == "rows":
        x = random.normal(size=(40, 2)).astype(np.float32)
        model = musigma.build("maf", Spec((2,), columns=("u", "v")), hidden=8, depth=1)
        return Explorer(randomized(model), musigma.data.Dataset(x, columns=("u", "v")))
    x = random.integers(0, 256, (40, 1, 8, 8), np.uint8)
    options = {"glow": {"levels": 2, "depth": 1, "hidden": 8}}
    options = options.get(kind, {"net": "mlp", "latents": 4, "width": 16})
    model = musigma.build(kind, Spec((1, 8, 8), 256), **options)
    labels = np.arange(40) % 2
    data = musigma.data.Dataset(x, labels=labels, label_names=("a", "b"))
    return Explorer(randomized(model), data)


def fuzz(kind, examples):
    """Ask one thing after another; every answer has a status below 500, and a message if bad."""
    pytest.importorskip("fastapi", reason="pip install 'musigma[explore]'")
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    from fastapi.testclient import TestClient
    from schemathesis.generation import GenerationMode

    from musigma.explore import server

    app = server.application(explorer_of(kind))
    schema = schemathesis.openapi.from_dict(app.openapi())
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    cases = st.one_of(*(schema.as_strategy(generation_mode=mode) for mode in modes))
    statuses = set()

    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=cases, data=st.data())
        def ask(case, data):
            query = {k: v if isinstance(v, str | int | float) else str(v)
                     for k, v in (case.query or {}).items()}  # fmt: skip
            for name, known in RANGES.items():
                if name in query and data.draw(st.booleans()):
                    query[name] = data.draw(st.integers(0, known))
            for name, known in CHOICES.items():
                if name in query and data.draw(st.booleans()):
                    query[name] = data.draw(st.sampled_from(known))
            body = case.body if isinstance(case.body, bytes) else str(case.body).encode()
            response = client.request(
                case.method, case.formatted_path, params=query, content=body[:10_000]
            )
            assert response.status_code < 500, (case.formatted_path, query)
            if response.status_code >= 400:
                assert response.json()["message"]
            statuses.add((case.path, response.status_code < 400))

        ask()
        assert client.get("/api/one").status_code == 200  # it lives on
    return statuses


@pytest.mark.parametrize("kind", ["rows", "vae"])
def test_no_request_of_the_schema_is_a_server_error(kind):
    statuses = fuzz(kind, 40)
    assert {True, False} == {fine for _, fine in statuses}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "vae", "glow"])
def test_no_request_of_many_is_a_server_error(kind):
    statuses = fuzz(kind, 1000)
    paths = {path for path, _ in statuses}
    assert len(paths) >= 14
    assert all((path, False) in statuses for path in paths - {"/api/about", "/api/order"})
