"""The Glows of chaiyujin, rosinality and OpenAI, as a `published_glow`."""

from __future__ import annotations

import contextlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from musigma.convert.reading import ForeignError, read_json
from musigma.convert.weights import Family, Options, Tensors, Weights
from musigma.gaussian import Format
from musigma.model import Model
from musigma.nets import edge_bias

__all__ = ["CHAIYUJIN", "OPENAI", "ROSINALITY"]

OURS = Format("interleaved")


class Glow(ABC):
    """A checkpoint of a Glow, read layer by layer; a layer is a mapping from our names to tensors.

    A subclass holds the names and layouts of a codebase, and code for what no table can say.
    """

    parts: ClassVar[Mapping[str, tuple[str, str]]]
    """The name of each tensor after that of its layer, and its axes:
    outputs, inputs, height, width, or 1."""

    first: str
    """The first step."""

    nets: Sequence[str]
    """The three convolutions of a step's network."""

    top = ""
    """The convolution of zeros that emits the top prior, if it is learned."""

    by_class = ("", "")
    """The linear layers that shift the top prior by class, and that predict the class."""

    coupling = split = OURS
    """How the rows of the last convolutions of couplings and of split priors are laid out."""

    logs_factor = 1
    edge_is_input = padded_with_ones = False
    always_learns_top = may_lack_classifier = False
    bits = 8, "the default of its training script"
    low = -0.5  # of the range of width 1 that images were brought to

    def __init__(self, weights: Weights, options: Options):
        self.weights, self.options = weights, options

    @abstractmethod
    def _scales(self) -> list[list[str]]:
        """The steps at each scale, from the data upwards."""

    @abstractmethod
    def _split_after(self, step: str) -> str:
        """The split prior after the last step of a scale."""

    @abstractmethod
    def _mix(self, at: str, c: int) -> Tensors:
        """How a step mixes its channels."""

    def _sides(self, scales: int) -> tuple[int, int]:
        """Height and width of the images."""
        size = self.options.size
        if size is None:
            path = self.weights.path
            raise ForeignError(f"{path}: does not hold the image size; give it (--size 64)")
        if size[0] % 2**scales or size[1] % 2**scales:
            raise ForeignError(f"size: {size[0]}x{size[1]} cannot be halved {scales} times")
        return size

    def _labels(self, shape: Sequence[int]) -> dict[str, Any]:
        """The options of a classifier."""
        return {"classifier": "softmax"}

    def _length(self, part: str, at: str, axis: str) -> int:
        name, axes = self.parts[part]
        return self.weights.size(at + name, axes.index(axis))

    def _read(self, part: str, at: str, **lengths: int) -> Tensor:
        """A tensor of a layer, its axes in the order of torch."""
        name, axes = self.parts[part]
        tensor = self.weights.take(at + name, *(lengths.get(axis, 1) for axis in axes))
        letters = axes.replace("1", "")
        tensor = tensor.reshape([lengths[axis] for axis in letters])
        return tensor.permute([letters.index(axis) for axis in "oihw" if axis in letters])

    def _norm(self, at: str, c: int) -> Tensors:
        logs = self.logs_factor * self._read("norm logs", at, o=c)
        return {"bias": self._read("norm bias", at, o=c), "log_scale": logs}

    def _kernel(self, part: str, at: str, inputs: int, outputs: int, side: int) -> Tensors:
        """A convolution without its bias; the edge bias may be the kernel of a last input."""
        more = int(self.edge_is_input and side > 1)
        weight = self._read(part, at, o=outputs, i=inputs + more, h=side, w=side)
        edge = {"edge": weight[:, inputs:]} if more else {}
        return {"weight": weight[:, :inputs]} | edge

    def _conv(self, at: str, inputs: int, outputs: int, side: int) -> Tensors:
        """A hidden convolution; an activation norm in place of its bias is folded into it."""
        conv = self._kernel("conv", at, inputs, outputs, side)
        if "conv bias" in self.parts:
            return conv | {"bias": self._read("conv bias", at, o=outputs)}
        norm = self._norm(at, outputs)
        gain = norm["log_scale"].exp()
        folded = {name: tensor * gain.reshape(-1, 1, 1, 1) for name, tensor in conv.items()}
        return folded | {"bias": norm["bias"] * gain}

    def _zeros(self, at: str, inputs: int, outputs: int) -> Tensors:
        """A convolution that begins at zero."""
        conv = self._kernel("zeros", at, inputs, outputs, 3)
        if self.padded_with_ones:
            conv["edge"] = conv["weight"].sum(1, keepdim=True)
        conv["bias"] = self._read("zeros bias", at, o=outputs)
        logs = self._read("zeros logs", at, o=outputs).reshape(-1, 1, 1)
        return {"logs": logs} | under("conv", conv)

    def _linear(self, at: str, inputs: int, outputs: int) -> Tensors:
        gain = (3 * self._read("linear logs", at, o=outputs)).exp()
        weight = self._read("linear", at, o=outputs, i=inputs) * gain.unsqueeze(1)
        return {"weight": weight, "bias": self._read("linear bias", at, o=outputs) * gain}

    def _factors(self, at: str, c: int) -> Tensors:
        """The LU factors of a 1x1 convolution."""
        factors = {name: self._read(name, at, o=c) for name in ("sign", "log_scale")}
        matrices = "permutation", "lower", "upper"
        factors |= {name: self._read(name, at, o=c, i=c) for name in matrices}
        lower, upper = factors["lower"].tril(-1), factors["upper"].triu(1)
        return factors | {"lower": lower, "upper": upper}

    def _check(self, at: str, mix: Tensors) -> None:
        """Refuse a matrix that is not invertible, and an order that is not a permutation."""
        if "weight" in mix:
            stretch = torch.linalg.svdvals(mix["weight"].nan_to_num())
            if not bool(stretch[-1] > 1e-12 * stretch[0]):
                self.weights.refuse(f"{at}{self.parts['matrix'][0]} holds a singular matrix")
        if "sign" in mix and bool((mix["sign"].abs() != 1).any()):
            name = at + self.parts["sign"][0]
            self.weights.refuse(f"{name} holds signs that are not 1 or -1")
        if "permutation" in mix:
            p = mix["permutation"]
            ones = ((p == 0) | (p == 1)).all() & (p.sum(0) == 1).all() & (p.sum(1) == 1).all()
            if not bool(ones):
                name = at + self.parts["permutation"][0]
                self.weights.refuse(f"{name} holds something other than a permutation")

    def _step(self, at: str, c: int, hidden: int, affine: bool) -> list[Tensors]:
        """Activation norm, mixing of channels, coupling."""
        norm, mix = self._norm(at, c), self._mix(at, c)
        self._check(at, mix)
        enter, middle, leave = (at + net for net in self.nets)
        last = self._zeros(leave, hidden, c if affine else c // 2)
        net = under("enter", self._conv(enter, c // 2, hidden, 3))
        net |= under("mix", self._conv(middle, hidden, hidden, 1))
        net |= under("leave", relaid(last, self.coupling) if affine else last)
        return [norm | {"calibrated": torch.tensor(True)}, mix, under("net", net)]

    def _prior(self, c: int, size: Sequence[int]) -> Tensors:
        """Mean and log_std at the top; of zeros, only the bias and the edge bias count."""
        if not (self.always_learns_top or self.weights.any(self.top)):
            return {}
        inputs = c if self.always_learns_top else 2 * c
        conv = self._zeros(self.top, inputs, 2 * c)
        raw, gain = conv["conv.bias"].reshape(-1, 1, 1), (3 * conv["logs"]).exp()
        if "conv.edge" not in conv:
            return {"raw": (raw * gain).flatten()}
        return {"raw": (edge_bias(conv["conv.edge"], size)[0] + raw) * gain}

    @cached_property
    def steps(self) -> dict[str, int]:
        """The channels of each step."""
        squeezed = self._length("norm bias", self.first, "o")
        if squeezed % 4:
            name = self.first + self.parts["norm bias"][0]
            raise ForeignError(
                f"{self.weights.path}: {name} has {squeezed} channels, which is not a multiple "
                "of 4"
            )
        return {at: squeezed * 2**i for i, steps in enumerate(self._scales()) for at in steps}

    def build(self) -> Model:
        """The model in float64, once `Weights.finish` has passed."""
        weights, c, scales = self.weights, self.steps[self.first], self._scales()
        depths = [len(steps) for steps in scales]
        if len(set(depths)) != 1:
            raise ForeignError(
                f"{weights.path}: the scales have {depths} steps, where all need the same number"
            )
        hidden = self._length("conv", self.first + self.nets[1], "o")
        rows = self._length("zeros", self.first + self.nets[2], "o")
        if rows not in (c, c // 2):
            name = self.first + self.nets[2] + self.parts["zeros"][0]
            weights.refuse(f"{name} emits {rows} channels, not {c} or {c // 2}")
        affine = rows != c // 2
        height, width = self._sides(len(scales))
        shape = c // 4, height, width

        layers: list[Tensors] = [{}, {}]  # dequantization and the range
        for steps in scales:
            layers.append({})  # the squeeze
            for at in steps:
                layers += self._step(at, c, hidden, affine)
            if steps is not scales[-1]:
                prior = self._zeros(self._split_after(steps[-1]), c // 2, c)
                layers.append(under("prior.net", relaid(prior, self.split)))
                c = 2 * c
        head = self._prior(c, (height >> len(scales), width >> len(scales)))
        classes, about_labels = 0, {}
        shift, classifier = self.by_class
        if shift and (weights.any(shift) or weights.any(classifier)):
            classes = self._length("linear", shift, "i")
            linear = self._linear(shift, classes, 2 * c)
            raw = head.get("raw", torch.zeros(2 * c, dtype=torch.float64))
            bias = linear["bias"].reshape(-1, *[1] * (raw.ndim - 1))
            head = {"raw": raw + bias, "from_context.weight": linear["weight"]}
        if classes and (weights.any(classifier) or not self.may_lack_classifier):
            layers.append(under("linear", self._linear(classifier, c, classes)))
            about_labels = self._labels(shape)

        tensors = under("prior.head", head)
        for i, layer in enumerate(layers):
            tensors |= under(f"layers.{i}", layer)
        bits, why = self.bits
        kinds = {"lower": "lu", "weight": "conv", "order": "reverse"}
        return weights.model(
            "published_glow",
            shape,
            tensors,
            bits=weights.assume("bits", self.options.bits, bits, why),
            levels=len(scales),
            depth=depths[0],
            hidden=hidden,
            coupling="affine" if affine else "additive",
            format="interleaved sigmoid+2 bounds=none",
            split_format="interleaved log_std bounds=none",
            permutation=next(kind for name, kind in kinds.items() if name in layers[4]),
            edge=self.edge_is_input or self.padded_with_ones,
            learn_top=bool(head),
            top_each="pixel" if head and head["raw"].ndim > 1 else "channel",
            low=self.low,
            context=classes,
            **about_labels,
        )


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors, named as those of a part."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def relaid(conv: Tensors, layout: Format) -> Tensors:
    """A convolution with its rows interleaved, the mean or shift first."""
    return {name: layout.relayout(rows, OURS) for name, rows in conv.items()}  # pyright: ignore


class Chaiyujin(Glow):
    """Images in [0, 1]; interleaved split priors, halves at the top."""

    first, nets = "flow.layers.1", (".f.0", ".f.2", ".f.4")
    top, by_class = "learn_top", ("project_ycond", "project_class")
    bits, low = (8, "as in its code"), 0.0
    parts: ClassVar = {
        "norm bias": (".actnorm.bias", "1o11"),
        "norm logs": (".actnorm.logs", "1o11"),
        "matrix": (".invconv.weight", "oi"),
        "permutation": (".invconv.p", "oi"),
        "lower": (".invconv.l", "oi"),
        "upper": (".invconv.u", "oi"),
        "sign": (".invconv.sign_s", "o"),
        "log_scale": (".invconv.log_s", "o"),
        "conv": (".weight", "oihw"),
        "zeros": (".weight", "oihw"),
        "zeros bias": (".bias", "o"),
        "zeros logs": (".logs", "o11"),
        "linear": (".weight", "oi"),
        "linear bias": (".bias", "o"),
        "linear logs": (".logs", "o"),
    }

    def _scales(self) -> list[list[str]]:
        numbers = self.weights.numbers(r"flow\.layers\.(\d+)\.(?:actnorm|invconv|f)\..*")
        runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
        return [[f"flow.layers.{number}" for _, number in run] for _, run in runs]

    def _split_after(self, step: str) -> str:
        return f"flow.layers.{int(step.rpartition('.')[2]) + 1}.conv"

    def _sides(self, scales: int) -> tuple[int, int]:
        shape = [self.weights.size("prior_h", axis) for axis in range(4)]
        if bool((self.weights.take("prior_h", *shape) != 0).any()):
            self.weights.refuse("prior_h is not zero, as its code sets it")
        return shape[2] << scales, shape[3] << scales

    def _mix(self, at: str, c: int) -> Tensors:
        if self._some("matrix"):
            return {"weight": self._read("matrix", at, o=c, i=c)}
        if self._some("lower"):
            return self._factors(at, c)
        return {"order": torch.tensor(self.orders[at])}

    def _some(self, part: str) -> bool:
        """Whether any step has this part."""
        return any(step + self.parts[part][0] in self.weights for step in self.steps)

    @cached_property
    def orders(self) -> dict[str, Sequence[int]]:
        """How each step orders its channels."""
        said = self._setting("Glow", "flow_permutation")
        orders = self.options.permutation or (said if isinstance(said, str) else None)
        lengths = list(self.steps.values())
        if orders == "reverse":
            orders = [range(c)[::-1] for c in lengths]
        if orders is None or isinstance(orders, str):
            raise ForeignError(
                f"{self.weights.path}: {self.first}.invconv is missing, so the permutation was "
                "'reverse' or 'shuffle', and checkpoints do not hold the order of a shuffle: give "
                "--permutation reverse, or a .json file with the order (`indices`) of each of the "
                f"{len(lengths)} steps; got {orders!r}"
            )
        if [sorted(order) for order in orders] != [list(range(c)) for c in lengths]:
            raise ForeignError(
                f"permutation: expected {len(lengths)} orders of {lengths} channels"
            )
        return dict(zip(self.steps, orders, strict=True))

    def _labels(self, shape: Sequence[int]) -> dict[str, Any]:
        """The kind of the labels, and the weight in nats for each nat of log p(x)."""
        kinds = {"multi-classes": "sigmoid", "single-class": "softmax"}
        said = str(self._setting("Criterion", "y_condition"))
        labels = self.options.labels or kinds.get(said)
        if labels is None:
            raise ForeignError(
                f"{self.weights.path}: project_class predicts one label or several, and the file "
                "does not say which: give --labels softmax or sigmoid, or put the training's "
                "settings (.json) beside it"
            )
        weight = self._setting("Train", "weight_y")
        if not (isinstance(weight, (int, float)) and 0 <= weight < 1e6):
            weight = 0.5
        # there: nats of a class (their mean over several) for each bit of a pixel of all channels
        mean_over = self._length("linear", "project_class", "o") if labels == "sigmoid" else 1
        nats = weight * math.log(2) * (shape[1] * shape[2]) / mean_over
        return {"classifier": labels, "classifier_weight": nats}

    def _setting(self, section: str, name: str) -> Any:
        """An entry of the settings that its trainer saves."""
        inside = self.settings.get(section)
        return inside.get(name) if isinstance(inside, dict) else None

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The settings beside the checkpoint, or in the folder above."""
        folder = self.weights.path.resolve().parent
        for path in sorted([*folder.glob("*.json"), *folder.parent.glob("*.json")]):
            with contextlib.suppress(ForeignError):  # other files may lie there
                found = read_json(path) or {}
                if isinstance(found.get("Glow"), dict):
                    return found
        return {}


class Rosinality(Glow):
    """Images in [-0.5, 0.5]; halves everywhere, the scale first in couplings.

    Its scales may be negative: the sign moves into the 1x1 convolution that follows.
    """

    first = "blocks.0.flows.0"
    nets = ".coupling.net.0", ".coupling.net.2", ".coupling.net.4"
    coupling, split = Format("halves", "scale-first"), Format("halves")
    padded_with_ones = always_learns_top = True
    bits = 5, "the default of its training script"
    parts: ClassVar = {
        "norm bias": (".actnorm.loc", "1o11"),
        "norm scale": (".actnorm.scale", "1o11"),
        "matrix": (".invconv.weight", "oi11"),
        "permutation": (".invconv.w_p", "oi"),
        "lower": (".invconv.w_l", "oi"),
        "upper": (".invconv.w_u", "oi"),
        "sign": (".invconv.s_sign", "o"),
        "log_scale": (".invconv.w_s", "o"),
        "conv": (".weight", "oihw"),
        "conv bias": (".bias", "o"),
        "zeros": (".conv.weight", "oihw"),
        "zeros bias": (".conv.bias", "o"),
        "zeros logs": (".scale", "1o11"),
    }

    def _scales(self) -> list[list[str]]:
        blocks = self.weights.numbers(r"blocks\.(\d+)\..*")
        self.top = f"blocks.{max(blocks, default=0)}.prior"
        flows = [self.weights.numbers(rf"blocks\.{b}\.flows\.(\d+)\..*") for b in blocks]
        return [[f"blocks.{b}.flows.{k}" for k in ks] for b, ks in zip(blocks, flows, strict=True)]

    def _split_after(self, step: str) -> str:
        return step.partition(".flows.")[0] + ".prior"

    def _norm(self, at: str, c: int) -> Tensors:
        scale = self._read("norm scale", at, o=c)
        if bool((scale == 0).any()):
            self.weights.refuse(f"{at}.actnorm.scale holds a zero, which has no inverse")
        if not bool(self.weights.take(f"{at}.actnorm.initialized", integer=True)):
            self.weights.refuse(f"{at}.actnorm.initialized is 0: the model was never initialized")
        return {"bias": self._read("norm bias", at, o=c), "log_scale": scale.abs().log()}

    def _mix(self, at: str, c: int) -> Tensors:
        sign = torch.where(self._read("norm scale", at, o=c) < 0, -1.0, 1.0).double()
        plain = any(name.endswith("invconv.weight") for name in self.weights.tensors)
        if plain and self._split_after(at) != self.top:
            return {"weight": self._read("matrix", at, o=c, i=c) * sign}
        ones = torch.ones(c, c)
        constants = {"u_mask": ones.triu(1), "l_mask": ones.tril(-1), "l_eye": torch.eye(c)}
        for name, constant in constants.items():
            if bool((self.weights.take(f"{at}.invconv.{name}", c, c) != constant).any()):
                self.weights.refuse(f"{at}.invconv.{name} is not the constant of its code")
        mix = self._factors(at, c)
        mix |= {"sign": mix["sign"] * sign, "upper": mix["upper"] * sign}
        if not plain:
            return mix
        # the last block always has factors
        diagonal = torch.diag(mix["sign"] * mix["log_scale"].exp())
        lower = mix["lower"] + torch.eye(c, dtype=torch.float64)
        return {"weight": mix["permutation"] @ lower @ (mix["upper"] + diagonal)}


class OpenAI(Glow):
    """Images in [-0.5, 0.5], NHWC; edge biases, interleaved split priors, halves at the top."""

    first, nets = "model/0/0", ("/f1/l_1", "/f1/l_2", "/f1/l_last")
    top, by_class = "model/prior/p", ("model/prior/y_emb", "model/classifier")
    logs_factor, edge_is_input, may_lack_classifier = 3, True, True
    parts: ClassVar = {
        "norm bias": ("/actnorm_center/b", "111o"),
        "norm logs": ("/actnorm_scale/logs", "111o"),
        "matrix": ("/invconv/W", "io"),  # there pixels are rows
        "conv": ("/W", "hwio"),
        "zeros": ("/W", "hwio"),
        "zeros bias": ("/b", "111o"),
        "zeros logs": ("/logs", "1o"),
        "linear": ("/W", "io"),
        "linear bias": ("/b", "1o"),
        "linear logs": ("/logs", "1o"),
    }

    def _scales(self) -> list[list[str]]:
        scales = self.weights.numbers(r"model/(\d+)/\d+/.*")
        steps = [self.weights.numbers(rf"model/{i}/(\d+)/.*") for i in scales]
        return [[f"model/{i}/{j}" for j in js] for i, js in zip(scales, steps, strict=True)]

    def _split_after(self, step: str) -> str:
        return f"model/pool{step.split('/')[1]}/conv"

    def _mix(self, at: str, c: int) -> Tensors:
        if any(name.endswith("invconv/W") for name in self.weights.tensors):
            return {"weight": self._read("matrix", at, o=c, i=c)}
        if not any(name.endswith("shuffle/indices") for name in self.weights.tensors):
            return {"order": torch.arange(c - 1, -1, -1)}
        order, inverse = (
            self.weights.take(f"{at}/shuffle/{name}", c, integer=True).long()
            for name in ("indices", "indices_inverse")
        )
        ordered = order.sort().values.tolist() == list(range(c))
        if not ordered or bool((order.argsort() != inverse).any()):
            self.weights.refuse(
                f"{at}/shuffle/indices is not a permutation, or not the inverse of indices_inverse"
            )
        return {"order": order}


CHAIYUJIN = Family(
    "chaiyujin/glow-pytorch, a Glow",
    (
        "prior_h",
        r"flow\.layers\.\d+\.actnorm\.(bias|logs)",
        r"flow\.layers\.\d+\.invconv\.(weight|p|sign_s|l|log_s|u)",
        r"flow\.layers\.\d+\.f\.[02]\.(weight|actnorm\.(bias|logs))",
        r"flow\.layers\.\d+\.(f\.4|conv)\.(weight|bias|logs)",
        r"(learn_top|project_ycond|project_class)\.(weight|bias|logs)",
    ),
    lambda weights, options: Chaiyujin(weights, options).build(),
    ("permutation", "labels", "bits"),
)
ROSINALITY = Family(
    "rosinality/glow-pytorch, a Glow",
    (
        r"blocks\.\d+\.flows\.\d+\.actnorm\.(loc|scale|initialized)",
        r"blocks\.\d+\.flows\.\d+\.invconv\.(weight|w_[plsu]|[ul]_mask|s_sign|l_eye)",
        r"blocks\.\d+\.flows\.\d+\.coupling\.net\.[02]\.(weight|bias)",
        r"blocks\.\d+\.(flows\.\d+\.coupling\.net\.4|prior)\.(scale|conv\.(weight|bias))",
    ),
    lambda weights, options: Rosinality(weights, options).build(),
    ("size", "bits"),
)
OPENAI = Family(
    "openai/glow, its variables as .npz",
    (
        r"model/\d+/\d+/actnorm_(center/b|scale/logs)",
        r"model/\d+/\d+/(invconv/W|shuffle/indices|shuffle/indices_inverse)",
        r"model/\d+/\d+/f1/l_[12]/(W|actnorm_center/b|actnorm_scale/logs)",
        r"model/(\d+/\d+/f1/l_last|pool\d+/conv|prior/p)/(W|b|logs)",
        r"model/(prior/y_emb|classifier)/(W|b|logs)",
    ),
    lambda weights, options: OpenAI(weights, options).build(),
    ("size", "bits"),
    (r"Variable(_\d+)?|global_step|beta\d_power",),
)
