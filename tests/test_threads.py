"""How the command line lets OpenMP threads wait."""

import os
import subprocess
import sys

import pytest

from musigma.cli.threads import CHOICES, WAITING, configure


def test_waiting_threads_sleep_unless_the_user_decides():
    environment = {"PATH": "/bin"}
    configure(environment)
    assert environment == {"PATH": "/bin", **WAITING}


@pytest.mark.parametrize("name", CHOICES)
def test_variables_of_the_user_are_respected(name):
    environment = {name: "1"}
    configure(environment)
    assert environment == {name: "1"}


ENTRY = """
import os, sys
from musigma.cli import main
loaded = "torch" in sys.modules
main(["--version"])
print(loaded, os.environ["GOMP_SPINCOUNT"])
"""


@pytest.mark.parametrize("chosen", [None, "7"])
def test_the_command_line_decides_before_torch_is_loaded(chosen):
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    if chosen:
        environment["GOMP_SPINCOUNT"] = chosen
    done = subprocess.run(
        [sys.executable, "-c", ENTRY], capture_output=True, text=True, check=True, env=environment
    )
    expected = chosen or WAITING["GOMP_SPINCOUNT"]
    assert done.stdout.splitlines()[-1] == f"False {expected}"
