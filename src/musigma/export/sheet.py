"""The sheet beside exported functions: what goes in, what comes out, and how data are prepared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from musigma import __version__
from musigma.data import Preprocess
from musigma.export.functions import Function, Value
from musigma.gaussian import Format, GaussianHead
from musigma.model import Model
from musigma.spec import Spec

__all__ = ["sheet"]


def sheet(
    model: Model,
    functions: Iterable[Function],
    files: Mapping[str, str],
    preprocess: Preprocess | None = None,
) -> dict[str, Any]:
    """What a program that runs the functions must know, as a dict of JSON values.

    Args:
        model: The model.
        functions: Its functions.
        files: The name of the file of each function, by the function's name.
        preprocess: How images become the levels that the model takes.
    """
    assert model.spec is not None
    heads = [m for m in model.modules() if isinstance(m, GaussianHead) and m.emitted]
    formats = {name: str(head.format) for head, name in _named(model, heads)}
    return {
        "musigma": __version__,
        "architecture": model.config.get("architecture", type(model).__name__),
        "conventions": {
            "batch": "the first dimension of every input and output; of any size from 1",
            "numbers": "densities are in nats per example; bits per dimension are "
            f"nats / ({model.spec.dims} ln 2)",
            "log_std": "the natural logarithm of the standard deviation, after the format below "
            "was applied: a draw is mean + exp(log_std) * noise",
            "formats": formats or {"": str(Format())},
            "noise": "normal: N(0, 1); uniform: on [0, 1); exponential: of mean 1. The same noise "
            "gives the same output",
        },
        "data": _data(model.spec, preprocess),
        "functions": {
            function.name: {
                "file": files[function.name],
                "what": function.what,
                "inputs": [_value(value) for value in function.inputs],
                "outputs": [_value(value) for value in function.outputs],
            }
            for function in functions
        },
    }


def _named(model: Model, heads: Iterable[GaussianHead]) -> Iterable[tuple[GaussianHead, str]]:
    names = model.site_names()
    return ((head, names[head]) for head in heads)


def _value(value: Value) -> dict[str, Any]:
    row = {"name": value.name, "type": value.dtype, "shape": value.shape, "what": value.what}
    return row | {k: v for k, v in (("unit", value.unit), ("law", value.law)) if v}


def _data(spec: Spec, preprocess: Preprocess | None) -> dict[str, Any]:
    """The data, and what raw ones become before they are the input x."""
    steps = ["x is of a floating-point type, whatever its values are"]
    about = {"spec": spec.to_json()}
    if len(spec.shape) == 3:
        preprocess = preprocess or Preprocess()
        about["preprocess"] = preprocess.to_json()
        steps = [*_steps(spec, preprocess), *steps]
    elif spec.schema is not None:
        steps += [
            "numbers as they are; dates and times as numbers; categories as the position of their "
            "text in the levels of the column; a missing value is NaN (spec.schema)"
        ]
    else:
        steps += ["rows as they are in the table, in the order of its columns, without scaling"]
    return {**about, "steps": steps}


def _steps(spec: Spec, preprocess: Preprocess) -> list[str]:
    """What the bytes of an image become, in order."""
    channels, height, width = spec.shape
    steps = []
    if preprocess.size is not None:
        steps.append(
            f"scale the image, antialiased, until it covers {height} x {width} pixels, and crop "
            "its center"
        )
    if preprocess.binarize is not None:
        rule = {
            "threshold": "1 if x >= 128, else 0",
            "dynamic": "1 with probability x / 255, else 0, drawn again each time",
        }[preprocess.binarize]
        steps.append(f"a byte x becomes {rule}")
    elif preprocess.bits < 8:
        steps.append(f"a byte x becomes floor(x / {2 ** (8 - preprocess.bits)})")
    else:
        steps.append("a byte stays as it is: 0 to 255, not divided")
    steps.append(f"channels first: ({channels}, {height}, {width})")
    return steps
