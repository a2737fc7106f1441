"""Mutants of the corpus: each right step with one mistake, made from its source.

The lines that end in ``# kl``, ``# draw``, ``# logdet`` or ``# prior`` are changed: a sign, a
factor, a reduction, a function or a term left out, two heads swapped, a gradient stopped.
`mutants` yields those whose loss or gradient differs from the original's by more than a factor.
Some of these are as right as the original, and are left out.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

import corpus_steps_base
from corpus_steps_base import Built, Entry

MARK = re.compile(r"# (kl|draw|logdet|prior)$")
HEADS = ("mu", "m1", "m2", "b", "log_var", "log_std", "d", "s")
SWAPS = {("mu", h) for h in HEADS[3:]} | {("m1", "log_var"), ("m2", "log_std"), ("d", "s")}
REDUCTIONS = {"sum": "mean", "mean": "sum"}
LEFT_OUT = ("exp", "log", "sqrt", "square", "rsqrt")
FUNCTIONS = ("torch.exp", "torch.rsqrt", "F.softplus", "Exp.apply", "torch.log")
AS_RIGHT = {
    "flow_posterior_that_starts_as_the_identity": {
        "sign of z * log_scale.exp() + shift": "another flow, with the same log-determinant",
        "z * log_scale.exp() + shift without shift": "another flow, with the same log-determinant",
    },
    "flow_of_padded_sequences": {
        "sign of z - mean": "minus the output of a layer is the mean of the prior",
        "z - mean without mean": "a prior of mean zero",
        "0.5 tripled in 0.5 * ((z - mean) / log_std.exp()) ** 2": "another reading of the scale",
    },
    "speech_with_a_flow_that_keeps_volume": {
        "sign of zp - mean": "minus the output of a layer is the mean of the prior",
        "zp - mean without mean": "a prior of mean zero",
        "0.5 tripled in 0.5 * ((zp - mean) / log_width.exp()) ** 2": "another reading of it",
    },
    "padded_sequences": {"2 tripled in 2 * (2 * p).exp()": "another reading of the scale"},
}
SCORES = ("Normal", "log_normal")  # of a draw: a stopped gradient of theirs is right on average


def marked(module: ModuleType) -> dict[int, str]:
    lines = inspect.getsource(module).splitlines()
    return {i: m.group(1) for i, line in enumerate(lines, 1) if (m := MARK.search(line))}


def executed(module: ModuleType, entry: Entry) -> set[int]:
    """The lines of the module that the step of an entry runs."""
    lines: set[int] = set()

    def trace(frame, event, argument):
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            lines.add(frame.f_lineno)
        return trace

    built = fresh(entry)
    sys.settrace(trace)
    try:
        built.step()
    finally:
        sys.settrace(None)
    return lines


def fresh(entry: Entry, seed: int = 0) -> Built:
    torch.manual_seed(seed)
    return entry.build()


def changes(node: ast.AST, parents: dict, kind: str) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in place of a node."""
    parent = parents[node]
    text = ast.unparse(node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        if kind != "draw" and text != "mu - m":  # noise is symmetric, and m is the prior's own
            other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            yield f"sign of {text}", ast.BinOp(node.left, other, node.right)
        for side, rest in ((node.left, node.right), (node.right, node.left)):
            if text == "mu - m" and side is node.right:
                continue
            if not re.search("decode|recon|nll|bce|sse|log_x|likelihood", ast.unparse(side)):
                yield f"{text} without {ast.unparse(side)}", rest
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inside = ast.unparse(parent) if not isinstance(parent, ast.Return) else ""
        if isinstance(node.operand, ast.Constant) and isinstance(parent, ast.Call):
            return
        yield f"sign of {text} in {inside}", node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Pow):
            yield f"{ast.unparse(parent)} to the power 1", ast.Constant(1)
        elif isinstance(parents.get(parent), ast.Call) and isinstance(parent, ast.UnaryOp):
            return  # the number of an axis
        elif isinstance(parent, ast.BinOp | ast.UnaryOp):
            yield f"{text} tripled in {ast.unparse(parent)}", ast.Constant(3 * node.value)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if isinstance(node.func, ast.Attribute):
            attribute, value = node.func.attr, node.func.value
            if attribute in REDUCTIONS and not isinstance(value, ast.Name | ast.Constant):
                swapped = copy.deepcopy(node)
                swapped.func.attr = REDUCTIONS[attribute]
                yield f"{text} by {REDUCTIONS[attribute]}", swapped
            if attribute in LEFT_OUT and name not in FUNCTIONS:
                yield f"{text} without {attribute}", value
            if attribute == "exp" and name not in FUNCTIONS and not scored(node, parents):
                yield f"{text} detached", detached(node)
        if name in FUNCTIONS:
            yield f"{text} without {name}", node.args[0]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in HEADS:
        if scored(node, parents):
            return
        if not (isinstance(parent, ast.Call) and ast.unparse(parent.func) == "torch.randn_like"):
            yield f"{text} detached in {ast.unparse(parent)}", detached(node)


def scored(node: ast.AST, parents: dict) -> bool:
    """Whether a node is a parameter of the density of a draw."""
    while not isinstance(node, ast.stmt):
        node = parents[node]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SCORES:
            return True
    return False


def detached(node: ast.AST) -> ast.AST:
    return ast.Call(ast.Attribute(node, "detach", ast.Load()), [], [])


class Source:
    """A module's source, which is changed in one place at a time."""

    def __init__(self, module: ModuleType):
        self.module, self.lines = module, marked(module)
        self.tree = ast.parse(inspect.getsource(module))
        self.parents = {c: n for n in ast.walk(self.tree) for c in ast.iter_child_nodes(n)}

    def put(self, old: ast.AST, new: ast.AST) -> None:
        parent = self.parents[old]
        for field, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, field, new)
            elif isinstance(value, list) and any(v is old for v in value):
                setattr(parent, field, [new if v is old else v for v in value])

    def changed(self, ran: set[int]) -> Iterator[tuple[str, dict[str, Entry]]]:
        """What was changed in a line that ran, and the entries of the changed module."""
        nodes = [n for n in self.parents if getattr(n, "lineno", None) in ran]
        for node in nodes:
            if isinstance(node, ast.Attribute) and node.attr == "rsample":
                yield f"line {node.lineno}: sample", self.entries(node, "attr", "sample")
            if node.lineno not in self.lines:
                continue
            scored = {
                n.id
                for n in nodes
                if isinstance(n, ast.Name) and self.lines.get(n.lineno, "draw") != "draw"
            }
            for what, new in list(changes(node, self.parents, self.lines[node.lineno])):
                dropped = what.split(" without ")[-1]
                if dropped in HEADS and dropped not in scored:
                    continue  # a posterior of mean zero, rightly scored
                text = f"line {node.lineno}: {what}"
                self.put(node, new)
                try:
                    yield text, self.entries()
                finally:
                    self.put_back(node, new)
        for line in ran & set(self.lines):
            names = [n for n in nodes if isinstance(n, ast.Name) and n.lineno == line]
            names = [n for n in names if isinstance(n.ctx, ast.Load)]
            for pair in SWAPS:
                if {n.id for n in names} >= set(pair):
                    other = dict([pair, pair[::-1]])
                    before = [n.id for n in names]
                    for n in names:
                        n.id = other.get(n.id, n.id)
                    entries = self.entries()
                    for n, name in zip(names, before, strict=True):
                        n.id = name
                    yield f"line {line}: {' and '.join(pair)} swapped", entries

    def put_back(self, old: ast.AST, new: ast.AST) -> None:
        self.parents[new], kept = self.parents[old], self.parents.get(new)
        self.put(new, old)
        if kept is not None:
            self.parents[new] = kept
        else:
            del self.parents[new]

    def entries(self, node=None, field="", value=None) -> dict[str, Entry]:
        """The entries as the tree has them now, with one field of a node changed."""
        if node is not None:
            before = getattr(node, field)
            setattr(node, field, value)
            try:
                return self.entries()
            finally:
                setattr(node, field, before)
        kept, corpus_steps_base.ENTRIES = corpus_steps_base.ENTRIES, {}
        try:
            tree = ast.fix_missing_locations(self.tree)
            code = compile(tree, self.module.__file__, "exec", dont_inherit=True)
            exec(code, {"__name__": self.module.__name__, "__file__": self.module.__file__})
            return corpus_steps_base.ENTRIES
        finally:
            corpus_steps_base.ENTRIES = kept


def measured(entry: Entry, seed: int) -> tuple[float, torch.Tensor]:
    """The loss, and all gradients in a row."""
    built = fresh(entry, seed)
    loss = built.step()
    leaves = [p for thing in built.objects for p in parameters(thing) if p.requires_grad]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    flat = [
        (torch.zeros_like(p) if g is None else g).flatten()
        for p, g in zip(leaves, grads, strict=True)
    ]
    return loss.item(), torch.cat(flat)


def parameters(thing):
    if isinstance(thing, torch.Tensor):
        return [thing]
    return list(thing.parameters()) if hasattr(thing, "parameters") else []


def differences(one: Entry, other: Entry) -> tuple[bool, bool]:
    """Whether the gradient is another one, and whether the loss is, but for its size.

    A constant that is added is a difference of the loss, and none of the gradient.
    """
    pairs = [(measured(one, seed), measured(other, seed)) for seed in range(3)]
    a, b = (torch.stack([pair[i][1] for pair in pairs]).double() for i in (0, 1))
    scale = (a * b).sum() / a.square().sum()
    if not torch.allclose(b, scale * a, rtol=1e-4, atol=1e-5 * float(a.abs().max())):
        return True, True
    gaps = torch.tensor([pair[1][0] - float(scale) * pair[0][0] for pair in pairs])
    size = max(abs(pair[0][0]) for pair in pairs)
    off, uneven = ((t.abs() > 1e-4 * size).any() for t in (gaps, gaps - gaps.mean()))
    return bool(scale <= 0) or bool(uneven), bool(off)


def mutants(module: ModuleType, name: str, entry: Entry) -> Iterator[tuple[str, Built, bool]]:
    """What was changed, the step with the change, and whether its gradient is another one."""
    source, ran = Source(module), executed(module, entry)
    kinds = {source.lines[line] for line in ran & set(source.lines)}
    for what, entries in source.changed(ran):
        if what.partition(": ")[2] in AS_RIGHT.get(name, {}):
            continue
        try:
            moves, is_off = differences(entry, entries[name])
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, IndexError):
            continue  # it does not run
        if moves or (is_off and not kinds & {"logdet", "prior"}):
            yield what, fresh(entries[name]), moves
