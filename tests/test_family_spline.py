"""Neural spline flows and masked autoregressive flows, as families."""

import pytest

from tests.families import check_flow_family, parts


@parts
@pytest.mark.parametrize(
    ("name", "below", "options"),
    [
        ("maf", 2.6, {}),
        ("nsf", 2.2, {}),
        ("nsf", 2.2, {"kind": "autoregressive"}),
    ],
    ids=["maf", "nsf", "nsf-autoregressive"],
)
def test_family(name, below, options, part):
    check_flow_family(name, part, below=below, depth=3, hidden=16, **options)
