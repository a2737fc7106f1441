"""Programs of torch.export: traced, with what depends on parameters alone computed."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.node import map_arg

from musigma.export.draws import symbolic_sizes
from musigma.model import Model

__all__ = ["TOLERANCE", "difference", "program", "quiet"]

TOLERANCE = 1e-5
"""Largest difference from PyTorch that is accepted; see `difference`."""


def program(
    function: nn.Module, model: Model, inputs: Sequence[Tensor]
) -> torch.export.ExportedProgram:
    """Trace a function of tensors whose first dimension is the batch.

    Args:
        function: The function, of all inputs in order; it returns a tuple.
        model: The model that it uses.
        inputs: Examples of its inputs.

    Raises:
        ValueError: If it cannot be traced; the message says why.
    """
    with quiet():
        try:
            with symbolic_sizes(model):
                traced = _exported(function, inputs).run_decompositions({})
        except Exception as error:  # tracing raises anything
            raise ValueError(_reason(error, model)) from error
        graph = traced.module(check_guards=False)
        assert isinstance(graph, fx.GraphModule)
        _refuse_draws(graph)
        _fold(graph)
        folded = _exported(graph, inputs)
        for node in folded.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        return folded


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and log lines of the exporters, which are about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # a graph that could not be traced whole is printed on standard error
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def difference(
    got: Sequence[Tensor], wanted: Sequence[Tensor], levels: Sequence[int | None] = ()
) -> float:
    """The largest difference of two sequences of tensors, relative where values are above 1.

    Values that count in levels are compared relative to the largest level. Where they are rounded
    to levels, rounding errors decide ties, so a few may be off by one.

    Args:
        got: What was computed.
        wanted: What should be.
        levels: The number of levels, for each tensor whose values count in them.
    """
    errors = [
        _error(a.double(), b.double(), n)
        for a, b, n in zip(got, wanted, levels or [None] * len(wanted), strict=True)
        if b.numel()
    ]
    return float(torch.stack(errors).max().detach()) if errors else 0.0


def _error(a: Tensor, b: Tensor, levels: int | None) -> Tensor:
    scale, same = 1, (a == b) | (a.isnan() & b.isnan())
    if levels is not None:
        scale, ties = levels - 1, (a - b).abs() == 1
        # of numbers that differ by `TOLERANCE`, as many are rounded differently
        if (b == b.round()).all() and ties.sum() <= 1 + 2 * TOLERANCE * scale * b.numel():
            same |= ties
    error = (a - b).abs() / b.abs().clamp(min=scale)
    return error.nan_to_num(torch.inf).masked_fill(same, 0.0).amax()


def _exported(function: nn.Module, inputs: Sequence[Tensor]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    shapes: Any = tuple({0: batch} for _ in inputs)
    starred = not isinstance(function, fx.GraphModule)  # whose inputs have names
    shapes = (shapes,) if starred else shapes
    return torch.export.export(function, tuple(inputs), dynamic_shapes=shapes, strict=False)


def _refuse_draws(graph: fx.GraphModule) -> None:
    """Refuse draws that are not made of noise inputs.

    Raises:
        ValueError: Naming them.
    """
    random = {
        str(node.target).removeprefix("aten.").partition(".")[0]
        for node in graph.graph.nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    }
    if random:
        raise ValueError(
            f"it draws by {', '.join(sorted(random))}, which is no function of a fixed amount of "
            "noise"
        )


def _fold(module: fx.GraphModule) -> None:
    """Compute the nodes of a graph that depend on constants and parameters alone.

    They become constants: inverses of matrices, masked and normalized weights.
    """
    known: dict[fx.Node, Any] = {}
    graph = module.graph
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            known[node] = operator.attrgetter(str(node.target))(module)
        elif node.op == "call_function" and inputs and all(n in known for n in inputs):
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    for node in list(graph.nodes):
        needed = any(user not in known for user in node.users)
        value = known.get(node)
        if node.op != "call_function" or not needed or not isinstance(value, Tensor):
            continue
        name = f"folded_{node.name}"
        module.register_buffer(name, value.detach().clone().contiguous())
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    for node in reversed(list(graph.nodes)):
        if node in known and not node.users:  # assertions too, which are no dead code
            graph.erase_node(node)
    module.recompile()


# --- why a function cannot be traced -------------------------------------------------------------


def _reason(error: BaseException, model: Model) -> str:
    """What prevents tracing, and where, in plain words."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    where = next((w for e in reversed(causes) if (w := _where(e.__traceback__, model))), "")
    text = " ".join(str(e) for e in causes)
    if any(isinstance(e, GuardOnDataDependentSymNode) for e in causes) or "data-dependent" in text:
        return f"{where}takes steps that depend on the values of the data"
    first = next((line for line in str(causes[-1]).splitlines() if line.strip()), "")
    return f"{where}PyTorch cannot trace it ({type(causes[-1]).__name__}: {first[:160]})"


def _where(at: TracebackType | None, model: Model) -> str:
    """The innermost module of the model, and the function, in which an error was raised."""
    names, found, function = model.site_names(), "", ""
    for frame, line in traceback.walk_tb(at):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names:
            found = f"{names[owner]} ({type(owner).__name__})"
        if _is_ours(frame):
            function = f"{frame.f_code.co_name} in {Path(frame.f_code.co_filename).name}:{line}"
    return f"{found}, {function}, ".lstrip(", ") if function else ""


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name.startswith("musigma.") and not name.startswith("musigma.export")
