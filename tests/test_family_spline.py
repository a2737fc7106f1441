"""Neural spline flows and masked autoregressive flows, as families."""

import pytest

from tests.families import check_flow_family


@pytest.mark.parametrize(
    ("name", "below", "options"),
    [
        ("maf", 2.9, {}),
        ("nsf", 2.3, {}),
        ("nsf", 2.3, {"kind": "autoregressive"}),
    ],
    ids=["maf", "nsf", "nsf-autoregressive"],
)
def test_family(name, below, options):
    check_flow_family(name, below=below, depth=3, hidden=16, **options)
