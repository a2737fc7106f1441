"""The Python lines that the page shows: how the model and the data are loaded, then `answers`."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

__all__ = ["body", "lines"]

IMPORTS = {
    "io": "import io",
    "math": "import math",
    "Path": "from pathlib import Path",
    "np": "import numpy as np",
    "torch": "import torch",
    "kl_divergence": "from torch.distributions import kl_divergence",
    "musigma": "import musigma",
    "detectors": "import musigma.detectors",
    "contexts": "from musigma import context as contexts",
    "datasets": "from musigma import data as datasets",
    "WatchedRun": "from musigma.cli.watch import WatchedRun",
    "images": "from musigma.data.readers import images",
    "DiagonalGaussian": "from musigma.gaussian import DiagonalGaussian",
    "Format": "from musigma.gaussian import Format",
    "log_prob_given": "from musigma.questions import log_prob_given",
    "nan": "from math import nan",
    "Recorder": "from musigma.trace import Recorder",
}


@cache
def body(function: Callable[..., Any]) -> str:
    """The source of a function between its docstring and its last line, which returns.

    Example:
        >>> import textwrap
        >>> print(body(textwrap.fill))
        w = TextWrapper(width=width, **kwargs)
    """
    text = textwrap.dedent(inspect.getsource(function))
    (definition,) = ast.parse(text).body
    assert isinstance(definition, ast.FunctionDef)
    statements = definition.body[ast.get_docstring(definition) is not None : -1]
    first, last = statements[0].lineno, statements[-1].end_lineno
    shown = textwrap.dedent("\n".join(text.splitlines()[first - 1 : last]))
    return re.sub(r"  # pyright: .*$", "", shown, flags=re.MULTILINE)


def lines(*parts: str | tuple[Callable[..., Any], dict[str, Any]]) -> str:
    """A program of statements, and of functions with the arguments that are not yet defined.

    Example:
        >>> from musigma.explore import answers
        >>> print(lines((answers.row, {"numbers": [1.0, 2.0]})), end="")
        import torch
        <BLANKLINE>
        numbers = [1.0, 2.0]
        x = torch.tensor([numbers]).to(x)
    """
    blocks = []
    for part in parts:
        if isinstance(part, str):
            blocks.append(part)
            continue
        function, arguments = part
        given = [f"{name} = {value!r}" for name, value in arguments.items()]
        blocks.append("\n".join([*given, body(function)]))
    program = "\n\n".join(block for block in blocks if block)
    used = [line for name, line in IMPORTS.items() if re.search(rf"\b{name}\b(?! =)", program)]
    return "\n".join(used) + "\n\n" + program + "\n"
