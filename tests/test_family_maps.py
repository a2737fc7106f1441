"""Flows that differ in the map of each feature, as families."""

import pytest

from musigma.zoo import build
from tests.families import check_flow_family, parts

SMALL = {"depth": 2, "hidden": 16, "features": 3}


@parts
@pytest.mark.parametrize(
    ("name", "below", "options"),
    [
        ("bernstein", 2.65, {"degree": 8}),
        ("sos", 2.35, {}),
        ("naf", 2.4, {"units": 4, "layers": 1}),
        ("umnn", 2.35, {"width": 8, "bins": 16}),
        pytest.param("nsf", 2.4, {"spline": "quadratic"}, marks=pytest.mark.slow),
        pytest.param("nsf", 2.4, {"spline": "cubic"}, marks=pytest.mark.slow),
        pytest.param("nsf", 3.0, {"spline": "linear"}, marks=pytest.mark.slow),
        pytest.param("naf", 2.4, {"kind": "coupling"}, marks=pytest.mark.slow),
    ],
)
def test_family(name, below, options, part):
    check_flow_family(name, part, below=below, **SMALL, **options)


def test_the_spline_of_nsf_is_in_its_config_only_if_it_is_not_the_usual_one():
    """So files that identify a model by the digest of its config can still be read."""
    assert "spline" not in build("nsf", (2,)).config["options"]
    assert build("nsf", (2,), spline="cubic").config["options"]["spline"] == "cubic"
    with pytest.raises(
        ValueError, match=r"spline: expected rational-quadratic or linear or .*bent"
    ):
        build("nsf", (2,), spline="bent")
    for name in ("nsf", "bernstein"):
        with pytest.raises(ValueError, match="kind: expected 'coupling' or 'autoregressive'"):
            build(name, (2,), kind="both")
