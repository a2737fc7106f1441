"""A pytest plugin: the fixture `assert_audited`, for the tests of one's own model.

It imports nothing before a test asks for it.
"""

import pytest


@pytest.fixture
def assert_audited():
    """`musigma.audit.assert_audited`: fails where an audit finds a bug or is incomplete."""
    from musigma.audit import assert_audited

    return assert_audited
