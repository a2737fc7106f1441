"""Flows of zuko, nflows and normflows as musigma models, from the objects themselves.

Each function `_read_*` takes a module of one of these libraries, and yields `Part`s in the order
from the data to the latents: descriptions of layers for the architecture `imported`, with their
weights. Modules are recognized by the names of their classes, and none of the libraries is
imported here. What is not known is refused by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from musigma.convert.reading import ForeignError
from musigma.model import Model
from musigma.spec import Spec, Variable
from musigma.zoo import build

__all__ = ["from_flow"]

LogProb = Callable[[Any, Tensor, Tensor | None], Tensor]

CHECKED = 256
"""Number of draws on which densities are compared."""


def from_flow(flow: Any, *, columns: Sequence[str] = ()) -> Model:
    """The musigma model with the density of a flow of zuko, nflows or normflows.

    Known are flows of vectors of affine maps and rational-quadratic splines, by couplings and
    autoregressive, with or without a context:

    - zuko: `MAF`, `NSF`, `NICE`, `RealNVP`;
    - nflows: `MaskedAutoregressiveFlow`, `SimpleRealNVP`, and flows of its affine and spline
      transforms, linear transforms, permutations and norms;
    - normflows: flows of `AutoregressiveRationalQuadraticSpline`,
      `CoupledRationalQuadraticSpline`, `MaskedAffineAutoregressive`, `MaskedAffineFlow`,
      `AffineCouplingBlock`, `LULinearPermute`, `InvertibleAffine`, `ActNorm` and `Permute`.

    The result can be trained further, saved, sampled and scored as any model of the zoo. It has no
    dropout, which does not affect a density.

    Args:
        flow: The flow, a torch module.
        columns: Names of the features.

    Returns:
        The model, in evaluation mode, in the type of the flow.

    Raises:
        ForeignError: If the flow has a part that is not known, or if the densities of both differ
            on draws of the model.

    Example:
        >>> import zuko
        >>> flow = zuko.flows.NSF(3, context=2, transforms=2, hidden_features=[16])
        >>> model, x, c = from_flow(flow), torch.randn(4, 3), torch.randn(4, 2)
        >>> torch.allclose(model.log_prob(x, c), flow(c).log_prob(x), atol=1e-4)
        True
    """
    library = type(flow).__module__.partition(".")[0]
    bases = [cls.__module__.partition(".")[0] for cls in type(flow).__mro__]
    library = next((name for name in LIBRARIES if name in bases), library)
    if library not in LIBRARIES:
        raise ForeignError(
            f"flow: expected one of {', '.join(LIBRARIES)}; got a {type(flow).__name__} of "
            f"{library}"
        )
    was_training = flow.training
    flow.eval()
    try:
        read, log_prob = LIBRARIES[library]
        with torch.no_grad():
            parts = list(read(flow))
        model = _assembled(parts, columns, next(iter(_tensors(flow))).dtype)
        _compare(model, flow, log_prob)
    finally:
        flow.train(was_training)
    return model


class Part(NamedTuple):
    """A layer: its description for the architecture `imported`, and its weights."""

    described: dict[str, Any]
    weights: dict[str, Tensor]
    features: int
    context: int = 0


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())


def _assembled(parts: Sequence[Part], columns: Sequence[str], dtype: torch.dtype) -> Model:
    features, context = parts[0].features, max(part.context for part in parts)
    spec = Spec(
        (features,),
        columns=tuple(columns),
        context=(Variable("context", (context,)),) if context else (),
    )
    model = build("imported", spec, layers=[part.described for part in parts]).to(dtype)
    state = model.state_dict()
    for i, part in enumerate(parts):
        inner = "bijection." if part.described.get("inverse") else ""
        for name, tensor in part.weights.items():
            key = f"layers.{i}.{inner}{name}"
            if key not in state or state[key].shape != tensor.shape:
                raise ForeignError(f"flow: {key} of shape {tuple(tensor.shape)} has no place")
            state[key] = tensor.to(state[key])
    model.load_state_dict(state)
    return model.eval()


def _compare(model: Model, flow: Any, log_prob: LogProb) -> None:
    """Refuse a model whose density differs from that of the flow on its own draws.

    Both are computed in float64, where they agree but for errors of conversion.
    """
    flow, model = copy.deepcopy(flow).double(), copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(0)
    context = None
    assert model.spec is not None
    if model.spec.context:
        size = (CHECKED, *model.spec.context[0].shape)
        context = torch.randn(size, generator=generator, dtype=torch.float64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = model.sample(CHECKED, context)
        ours = model.log_prob(x, context)
        theirs = log_prob(flow, x, context)
    error = float((ours - theirs).abs().max())
    if not error < 1e-6 * max(1.0, float(theirs.abs().max())):
        raise ForeignError(
            f"flow: the density of the converted model differs by {error:.3g} nats, so a part of "
            f"this {type(flow).__name__} is not what it seems; please report it"
        )


# --- pieces --------------------------------------------------------------------------------------


def _permutation(order: Tensor | Sequence[int]) -> Part:
    order = [int(i) for i in order]
    return Part({"layer": "permutation", "order": order}, {}, len(order))


def _scale(scale: Tensor, shift: Tensor) -> Part:
    """y = x · scale + shift, of positive scales."""
    scale, shift = scale.reshape(-1), shift.reshape(-1)
    size = max(scale.numel(), shift.numel())
    scale, shift = scale.expand(size), shift.expand(size)
    weights = {"log_scale": scale.log(), "bias": shift / scale}
    weights["calibrated"] = torch.tensor(True)
    return Part({"layer": "scale"}, weights, size)


def _linear(weight: Tensor) -> Part:
    """y = W x."""
    return Part({"layer": "linear"}, {"weight": weight}, len(weight))


def _between(order: Sequence[int], *parts: Part) -> Iterator[Part]:
    """Layers between a permutation of their features and the inverse of that."""
    back = torch.tensor(list(order)).argsort()
    natural = list(order) == sorted(order)
    yield from [] if natural else [_permutation(order)]
    yield from parts
    yield from [] if natural else [_permutation(back)]


class Read(NamedTuple):
    """A network: its options for `imported.Network`, and its weights."""

    options: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def last(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, bias and mask of the last layer."""
        return tuple(self.weights[f"net.out.{n}"] for n in ("weight", "bias", "mask"))  # pyright: ignore

    def change_last(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to the rows of the last layer."""
        for name in ("weight", "bias", "mask"):
            self.weights[f"net.out.{name}"] = change(self.weights[f"net.out.{name}"])


def _masked(
    name: str, layer: Any, columns: Sequence[int] | None = None, inputs: int | None = None
) -> dict[str, Tensor]:
    """The weights of a layer; `columns` are chosen of its first `inputs`, in their order."""
    weight, mask = layer.weight, getattr(layer, "mask", None)
    mask = torch.ones_like(weight) if mask is None else mask.to(weight)
    if columns is not None:
        at = [*columns, *range(len(columns) if inputs is None else inputs, weight.shape[1])]
        weight, mask = weight[:, at], mask[:, at]
    bias = torch.zeros_like(weight[:, 0]) if layer.bias is None else layer.bias
    return {f"{name}.weight": weight, f"{name}.bias": bias, f"{name}.mask": mask}


def _activation(module: Any) -> dict[str, Any]:
    """The options that name an activation: a torch module, or a function."""
    name = getattr(module, "__name__", type(module).__name__)
    by_function = {"relu": "ReLU", "elu": "ELU", "tanh": "Tanh", "silu": "SiLU", "gelu": "GELU"}
    name = by_function.get(name, name)
    if isinstance(module, nn.LeakyReLU):
        return {"activation": "LeakyReLU", "slope": module.negative_slope}
    plain = ("ReLU", "ELU", "Tanh", "SiLU", "GELU", "Sigmoid", "Softplus", "SELU", "CELU")
    if name not in plain:
        raise ForeignError(f"flow: an activation {name!r} is not known")
    if repr(module).replace("()", "").replace("(alpha=1.0)", "") not in (name, repr(module)):
        raise ForeignError(f"flow: an activation {module!r} with these options is not known")
    return {"activation": name}


def _perceptron(
    modules: Sequence[nn.Module],
    columns: Sequence[int] | None = None,
    inputs: int | None = None,
) -> Read:
    """Linear layers with activations between them; the context is concatenated to the input."""
    linears: list[Any] = [m for m in modules if hasattr(m, "weight")]
    others = [m for m in modules if m not in linears and not isinstance(m, nn.Dropout)]
    if len({repr(m) for m in others}) > 1 or len(others) != len(linears) - 1:
        raise ForeignError(
            f"flow: a network of {[type(m).__name__ for m in modules]} is not known"
        )
    weights: dict[str, Tensor] = {}
    for i, layer in enumerate(linears):
        name = "net.out" if i == len(linears) - 1 else f"net.layers.{i}"
        weights |= _masked(name, layer, columns if i == 0 else None, inputs)
    options = {"hidden": [len(m.weight) for m in linears[:-1]]}
    return Read(options | (_activation(others[0]) if others else {}), weights)


def _residual(net: Any, columns: Sequence[int] | None = None, *, activated: bool = False) -> Read:
    """A residual network of nflows or normflows, masked or not.

    Args:
        net: The network.
        columns: The order of its inputs.
        activated: Whether a masked network's context is added after an activation.
    """
    masked = type(net).__name__ == "MADE"
    if getattr(net, "preprocessing", None) is not None and not isinstance(
        net.preprocessing, nn.Identity
    ):
        raise ForeignError("flow: a network with preprocessing of its input is not known")
    blocks = list(net.blocks)
    if any(getattr(b, "use_batch_norm", False) or getattr(b, "batch_norm", None) for b in blocks):
        raise ForeignError("flow: a network with batch normalization is not known")
    if any(not hasattr(b, "linear_layers") for b in blocks):
        raise ForeignError("flow: a masked network without residual blocks is not known")
    weights = _masked("net.layers.0", net.initial_layer, columns) | _masked(
        "net.out", net.final_layer
    )
    options: dict[str, Any] = {"hidden": [len(net.initial_layer.weight)], "blocks": len(blocks)}
    options |= _activation(blocks[0].activation) if blocks else {}
    if masked and hasattr(net, "context_layer"):
        options["enters"] = "activated" if activated else "added"
        weights |= _plain("net.context", net.context_layer)
    for i, block in enumerate(blocks):
        weights |= _masked(f"net.blocks.{i}.enter", block.linear_layers[0])
        weights |= _masked(f"net.blocks.{i}.leave", block.linear_layers[1])
        if hasattr(block, "context_layer"):
            options["mixing"] = "add" if masked and activated else "gate"
            weights |= _plain(f"net.blocks.{i}.context", block.context_layer)
    return Read(options, weights)


def _plain(name: str, layer: nn.Linear) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


def _by_parameter(elements: int, each: int, order: Sequence[int] | None = None) -> list[int]:
    """Rows of a layer that emits all parameters of one element after another, parameter-major."""
    order = range(elements) if order is None else order
    return [element * each + p for p in range(each) for element in order]


def _spline_rows(read: Read, bins: int, elements: int, width: int, least: float) -> None:
    """Change the last layer of a network of nflows' splines to the parameters of `Spline`.

    nflows divides the logits of sizes by the square root of the width, and the raw slopes of
    `Spline` are smaller by a constant.
    """
    scale = torch.ones(3 * bins - 1, dtype=torch.float64)
    scale[: 2 * bins] /= math.sqrt(width)
    scale = scale.repeat_interleave(elements)
    offset = torch.zeros(3 * bins - 1, dtype=torch.float64)
    offset[2 * bins :] = math.log(math.expm1(1 - least))
    offset = offset.repeat_interleave(elements)
    weight, bias, _ = read.last
    read.weights["net.out.weight"] = (weight.double() * scale[:, None]).to(weight)
    read.weights["net.out.bias"] = (bias.double() * scale - offset).to(bias)


def _spline_of(transform: Any) -> dict[str, Any]:
    """The map of a spline of nflows or normflows."""
    least = {transform.min_bin_width, transform.min_bin_height, transform.min_derivative}
    bound = transform.tail_bound
    if transform.tails != "linear" or len(least) != 1 or isinstance(bound, Tensor):
        raise ForeignError(
            "flow: splines are known that are the identity outside one interval (tails='linear'), "
            f"with one minimum of sizes and slopes; got tails={transform.tails!r}"
        )
    return {
        "map": "spline",
        "bins": transform.num_bins,
        "bound": float(bound),
        "least": least.pop(),
    }


# --- zuko ----------------------------------------------------------------------------------------


def _read_zuko(flow: Any) -> Iterator[Part]:
    transforms = getattr(flow.transform, "transforms", [flow.transform])
    for transform in transforms:
        yield from _zuko_transform(transform)
    base = flow.base(None) if callable(flow.base) else flow.base
    loc, scale = getattr(base, "loc", None), getattr(base, "scale", None)
    base = getattr(base, "base_dist", base)
    loc, scale = getattr(base, "loc", loc), getattr(base, "scale", scale)
    if loc is None or scale is None:
        raise ForeignError(f"flow: a base distribution {type(base).__name__} is not known")
    if not bool((loc == 0).all() and (scale == 1).all()):
        yield _scale(1 / scale, -loc / scale)


def _zuko_transform(transform: Any) -> Iterator[Part]:
    kind = type(transform).__name__
    if kind not in ("MaskedAutoregressiveTransform", "GeneralCouplingTransform"):
        raise ForeignError(f"flow: a transform {kind} of zuko is not known")
    univariate = transform.univariate
    keywords = dict(getattr(univariate, "keywords", {}))
    univariate = getattr(univariate, "func", univariate)
    name = getattr(univariate, "__name__", type(univariate).__name__)
    each, slope = transform.total, keywords.pop("slope", 1e-3)
    if name == "MonotonicRQSTransform":
        bound = float(keywords.pop("bound", 5.0))
        map = {"map": "softclip-spline", "bins": (each + 1) // 3, "bound": bound, "slope": slope}
    elif name == "MonotonicAffineTransform":
        map = {"map": "scale-shift", "scale": "softclip", "least": slope}
    else:
        raise ForeignError(f"flow: a map {name} of zuko is not known")
    if keywords:
        raise ForeignError(f"flow: options {sorted(keywords)} of {name} are not known")
    modules = list(transform.hyper)
    if kind == "GeneralCouplingTransform":
        mask = transform.mask
        first, second = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        read = _perceptron(modules)
        read.change_last(lambda rows: rows[_by_parameter(len(second), each)])
        context = modules[0].weight.shape[1] - len(first)
        described = {"layer": "coupling", "map": map, "kept": len(first), **read.options}
        order = [*first.tolist(), *second.tolist()]
    else:
        if transform.order is None:
            raise ForeignError("flow: an autoregressive transform by an adjacency is not known")
        order = transform.order.argsort(stable=True).tolist()
        read = _perceptron(modules, order)
        read.change_last(lambda rows: rows[_by_parameter(len(order), each, order)])
        context = modules[0].weight.shape[1] - len(order)
        described = {"layer": "autoregressive", "map": map, **read.options}
    yield from _between(order, Part(described, read.weights, len(order), context))


# --- nflows --------------------------------------------------------------------------------------


def _read_nflows(flow: Any) -> Iterator[Part]:
    if not isinstance(flow._embedding_net, nn.Identity):
        raise ForeignError(
            "flow: a flow with an embedding network is not known; convert the flow with "
            "nn.Identity() in its place, and embed the context yourself (musigma.Conditional)"
        )
    if type(flow._distribution).__name__ != "StandardNormal":
        raise ForeignError(
            f"flow: a base distribution {type(flow._distribution).__name__} is not known"
        )
    yield from _nflows_transform(flow._transform)


def _nflows_transform(transform: Any) -> Iterator[Part]:
    kind = type(transform).__name__
    if kind == "CompositeTransform":
        for each in transform._transforms:
            yield from _nflows_transform(each)
    elif kind in ("Permutation", "RandomPermutation", "ReversePermutation"):
        yield _permutation(transform._permutation)
    elif kind in ("PointwiseAffineTransform", "AffineTransform"):
        yield _scale(transform._scale, transform._shift)
    elif kind == "ActNorm":
        yield _scale(transform.scale, transform.shift)
    elif kind == "BatchNorm":
        scale = transform.weight / (transform.running_var + transform.eps).sqrt()
        yield _scale(scale, transform.bias - transform.running_mean * scale)
    elif callable(getattr(transform, "weight", None)) and hasattr(transform, "bias"):
        yield _linear(transform.weight())
        yield _scale(torch.ones_like(transform.bias), transform.bias)
    elif "Coupling" in kind:
        yield from _nflows_coupling(transform)
    elif "Autoregressive" in kind:
        yield from _nflows_autoregressive(transform, activated=True, scale="softplus")
    else:
        raise ForeignError(f"flow: a transform {kind} of nflows is not known")


def _nflows_coupling(transform: Any) -> Iterator[Part]:
    """A coupling of nflows or normflows, by splines or affine."""
    first = transform.identity_features.tolist()
    second = transform.transform_features.tolist()
    net, order = transform.transform_net, [*first, *second]
    read = _residual(net)
    context = net.initial_layer.weight.shape[1] - len(first)
    kind = type(transform).__name__
    if "RationalQuadratic" in kind:
        map = _spline_of(transform)
        each = 3 * map["bins"] - 1
        read.change_last(lambda rows: rows[_by_parameter(len(second), each)])
        width = net.hidden_features
        _spline_rows(read, map["bins"], len(second), width, map["least"])
    elif kind == "AffineCouplingTransform":
        map = {"map": "scale-shift", "scale": "sigmoid", "least": 1e-3}
    else:
        raise ForeignError(f"flow: a transform {kind} is not known")
    described = {"layer": "coupling", "map": map, "kept": len(first), **read.options}
    parts = [Part(described, read.weights, len(order), context)]
    if transform.unconditional_transform is not None:
        parts += _unconditional(transform.unconditional_transform, map, len(first), len(second))
    yield from _between(order, *parts)


def _unconditional(spline: Any, map: dict[str, Any], first: int, second: int) -> Iterator[Part]:
    """A spline of the kept features whose parameters are constants: a coupling the other way."""
    raw = [
        spline.unnormalized_widths,
        spline.unnormalized_heights,
        spline.unnormalized_derivatives,
    ]
    bins, least = map["bins"], map["least"]
    rows = torch.cat(raw, 1).t().clone()  # (parameters, features)
    rows[2 * bins :] -= math.log(math.expm1(1 - least))
    zeros = rows.new_zeros(rows.numel(), second)
    weights = {"net.out.weight": zeros, "net.out.bias": rows.flatten(), "net.out.mask": zeros}
    swapped = [*range(first, first + second), *range(first)]
    described = {"layer": "coupling", "map": map, "kept": second, "hidden": []}
    yield from _between(swapped, Part(described, weights, first + second))


def _nflows_autoregressive(transform: Any, *, activated: bool, scale: str) -> Iterator[Part]:
    """An autoregressive transform of nflows or normflows, by splines or affine."""
    net, kind = transform.autoregressive_net, type(transform).__name__
    reached = net.initial_layer.mask.sum(0)  # an input of a high degree reaches fewer units
    order = reached.argsort(descending=True, stable=True).tolist()
    read, features = _residual(net, order, activated=activated), len(order)
    if "RationalQuadratic" in kind:
        map = _spline_of(transform)
        each = 3 * map["bins"] - 1
        read.change_last(lambda rows: rows[_by_parameter(features, each, order)])
        width = getattr(net, "hidden_features", 1)
        _spline_rows(read, map["bins"], features, width, map["least"])
    elif kind in ("MaskedAffineAutoregressiveTransform", "MaskedAffineAutoregressive"):
        map = {"map": "scale-shift", "scale": scale, "least": 1e-3}
        rows = _by_parameter(features, 2, order)
        read.change_last(lambda t: t[[*rows[features:], *rows[:features]]])  # the shift first
    else:
        raise ForeignError(f"flow: a transform {kind} is not known")
    context = net.context_layer.weight.shape[1] if hasattr(net, "context_layer") else 0
    described = {"layer": "autoregressive", "map": map, **read.options}
    yield from _between(order, Part(described, read.weights, features, context))


# --- normflows -----------------------------------------------------------------------------------


def _read_normflows(flow: Any) -> Iterator[Part]:
    for each in reversed(flow.flows):
        yield from _normflows_layer(each)
    base = flow.q0
    if type(base).__name__ != "DiagGaussian":
        raise ForeignError(f"flow: a base distribution {type(base).__name__} is not known")
    scale = (-base.log_scale).exp()
    yield _scale(scale, -base.loc * scale)


def _normflows_layer(layer: Any) -> Iterator[Part]:
    """The inverse of a layer, which maps data to latents."""
    kind = type(layer).__name__
    if kind == "CoupledRationalQuadraticSpline":
        yield from _nflows_coupling(layer.prqct)
    elif kind == "AutoregressiveRationalQuadraticSpline":
        yield from _nflows_autoregressive(layer.mprqat, activated=False, scale="sigmoid")
    elif kind == "MaskedAffineAutoregressive":
        parts = list(_nflows_autoregressive(layer, activated=False, scale="sigmoid"))
        for part in parts:
            if part.described["layer"] == "autoregressive":
                part.described["inverse"] = True
        yield from parts
    elif kind == "LULinearPermute":
        yield _permutation(layer.permutation._permutation)
        yield _linear(layer.linear.weight())
        yield _scale(torch.ones_like(layer.linear.bias), layer.linear.bias)
    elif kind == "InvertibleAffine":
        yield _linear((layer._assemble_W() if layer.use_lu else layer.W).t())
    elif kind in ("ActNorm", "AffineConstFlow"):
        scale = (-layer.s).exp()
        yield _scale(scale, -layer.t * scale)
    elif kind == "Permute":
        yield _permutation(layer.inverse(torch.arange(layer.num_channels)[None])[0][0])
    elif kind == "AffineCouplingBlock":
        yield from _normflows_block(layer)
    elif kind == "MaskedAffineFlow":
        yield from _normflows_masked(layer)
    else:
        raise ForeignError(f"flow: a layer {kind} of normflows is not known")


def _normflows_block(layer: Any) -> Iterator[Part]:
    """A coupling of two halves, whose network emits shifts and raw scales in turn."""
    split, coupling, _ = layer.flows
    if split.mode not in ("channel", "channel_inv"):
        raise ForeignError(f"flow: a split by {split.mode!r} is not known")
    read = _perceptron(list(coupling.param_map.net))
    first = read.weights["net.layers.0.weight"].shape[1]
    if coupling.scale:
        scale = {"exp": "exp", "sigmoid": "inverse-sigmoid", "sigmoid_inv": "sigmoid"}
        map = {"map": "scale-shift", "scale": scale[coupling.scale_map]}
        read.change_last(lambda t: torch.cat([t[0::2], t[1::2]]))
    else:
        map = {"map": "scale-shift", "scale": "exp"}
        read.change_last(lambda t: torch.cat([t, torch.zeros_like(t)]))
    features = first + len(read.weights["net.out.bias"]) // 2
    described = {"layer": "coupling", "map": map, "kept": first, "inverse": True}
    order = [*range(features)]
    if split.mode == "channel_inv":
        order = [*order[features - first :], *order[: features - first]]
    yield from _between(order, Part(described | read.options, read.weights, features))


def _normflows_masked(layer: Any) -> Iterator[Part]:
    """A coupling by a mask, with one network for shifts and one for log scales."""
    mask = layer.b.flatten().bool()
    first, second = mask.nonzero().flatten().tolist(), (~mask).nonzero().flatten().tolist()

    def read(net: Any) -> Read | None:
        modules: Any = getattr(net, "net", None)  # a function in place of a network gives zeros
        if modules is None:
            return None
        found = _perceptron(list(modules), first, inputs=len(mask))
        found.change_last(lambda t: t[second])
        return found

    shift, scale = read(layer.t), read(layer.s)
    shift, scale = shift or _silent(scale), scale or _silent(shift)
    net = _beside(shift, scale)
    described = {"layer": "coupling", "map": {"map": "scale-shift", "scale": "exp"}}
    described |= {"kept": len(first), "inverse": True, **net.options}
    yield from _between([*first, *second], Part(described, net.weights, len(mask)))


def _silent(like: Read | None) -> Read:
    """A network like another whose outputs are zero."""
    if like is None:
        raise ForeignError(
            "flow: a MaskedAffineFlow with neither a shift nor a scale is not known"
        )
    zero = {n: torch.zeros_like(t) if "out" in n else t for n, t in like.weights.items()}
    return Read(like.options, zero)


def _beside(first: Read, second: Read) -> Read:
    """Two networks of one input as one, whose hidden layers are block diagonal."""
    hidden = [
        a + b for a, b in zip(first.options["hidden"], second.options["hidden"], strict=True)
    ]
    if first.options | {"hidden": 0} != second.options | {"hidden": 0}:
        raise ForeignError("flow: networks with different activations in one layer are not known")
    weights: dict[str, Tensor] = {}
    for name, a in first.weights.items():
        b = second.weights[name]
        whole = name.endswith("bias") or name.startswith("net.layers.0")
        weights[name] = torch.cat([a, b]) if whole else torch.block_diag(a, b)
    return Read(first.options | {"hidden": hidden}, weights)


def _of_zuko(flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    return (flow() if context is None else flow(context)).log_prob(x)


def _of_methods(flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    return flow.log_prob(x) if context is None else flow.log_prob(x, context)


LIBRARIES: dict[str, tuple[Callable[[Any], Iterator[Part]], LogProb]] = {
    "zuko": (_read_zuko, _of_zuko),
    "nflows": (_read_nflows, _of_methods),
    "normflows": (_read_normflows, _of_methods),
}
"""How the flows of each library are read, and how they are scored, (flow, x, context)."""
