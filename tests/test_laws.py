"""Every layer, head and model obeys all laws. Each is one entry in a table below."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from musigma.distributions import (
    LearnedNormal,
    LogitNormalHead,
    OptimalGaussianHead,
    StandardNormal,
    StandardUniform,
    likelihood,
)
from musigma.gaussian import DiagonalGaussian, Format, GaussianHead
from musigma.layers import (
    MADE,
    ActNorm,
    Additive,
    Affine,
    Autoregressive,
    Checkerboard,
    Coupling,
    Dequantize,
    Elementwise,
    InvertibleConv,
    Logit,
    Map,
    Marginals,
    Permutation,
    Rescale,
    Spline,
    Split,
    Squeeze,
    Standardize,
)
from musigma.model import VAE, Bijection, Chain, Inverse, Layer, Prior
from musigma.nets import MLP, ConvEncoder, CouplingNet, ResNet, ZeroConv2d
from musigma.schema import Column, Schema
from musigma.spec import Spec, Variable
from musigma.testing import check_head, check_layer, check_model
from musigma.zoo import build

IMAGE, VECTOR = (4, 4, 6), (5,)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def conv(inputs, outputs, context=0):
    return CouplingNet(inputs, outputs, hidden=6, context=context)


def mlp(inputs, outputs, context=0):
    return MLP(inputs, outputs, hidden=[7], context=context)


def masked(features, map, **options):
    return Autoregressive(MADE(map.owners(features), **options), map=map)


def standardized(features):
    layer = Standardize(features)
    layer.set(3 * torch.randn(features), torch.randn(features).exp())
    return layer


def typed(real=False):
    """A layer of measured columns (only real numbers, if wanted), and rows in float64."""
    rows = torch.randn(200, 4)
    columns = [Column("a"), Column("b"), Column("c"), Column("d")]
    if not real:
        rows[:, 1] = rows[:, 1].clamp(min=0)  # with an atom
        rows[:, 2] = rows[:, 2].abs().floor()
        rows[:, 3] = (4 * rows[:, 3]).round() / 4
        columns[2:] = Column("c", "count"), Column("d", step=0.25)
    schema = Schema(columns).measure(rows.double().numpy(), 16)
    return Marginals(schema), (4,), {"x": rows[:4], "compiled": not real}


def quantiles():
    layer = Marginals(3)
    layer.calibrate(torch.randn(100, 3) ** 3)
    return layer, (3,), {}


class Sinh(Map):
    """A map from outside the library: y = sinh(asinh(x) + h)."""

    outputs = 1

    def forward(self, x, h):
        y = (x.asinh() + h).sinh()
        return y, 0.5 * ((1 + y**2) / (1 + x**2)).log()

    def inverse(self, y, h):
        return self.forward(y, -h)


class Recurrent(nn.Module):
    """A recurrent autoregressive network: `unroll` carries its state along."""

    def __init__(self, features, map):
        super().__init__()
        self.owners = map.owners(features)
        self.cell, self.out = nn.GRUCell(1, 7), nn.Linear(7, map.outputs)

    def start(self, x):
        return x.new_zeros(len(x), 1), x.new_zeros(len(x), 7)

    def unroll(self, fill, like, context=None):
        last, state = self.start(like)
        for i in range(max(self.owners) + 1):
            state = self.cell(last, state)
            last = fill(i, self.out(state))

    def forward(self, x, context=None):
        outputs = []
        self.unroll(lambda i, h: outputs.append(h) or x[:, i : i + 1], x)
        return torch.stack(outputs, -1).flatten(1)


class Attention(nn.Module):
    """One layer of causal attention; `unroll` keeps the keys and values of earlier features."""

    def __init__(self, features, map, context):
        super().__init__()
        self.owners, self.place = map.owners(features), nn.Parameter(torch.zeros(features, 6))
        self.enter, self.given = nn.Linear(1, 6), nn.Linear(context, 6)
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, map.outputs)

    def token(self, i, last, context):
        if context is None:
            raise ValueError("context: needed; got none")
        first = torch.zeros_like(last) if i == 0 else self.enter(last)
        return first + self.place[i] + self.given(context)

    def forward(self, x, context=None):
        before = F.pad(x, (1, 0))[:, :-1, None]
        tokens = [self.token(i, before[:, i], context) for i in range(x.shape[1])]
        q, k, v = self.qkv(torch.stack(tokens, 1)).chunk(3, -1)
        h = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return h.transpose(1, 2).flatten(1)

    def unroll(self, fill, like, context=None):
        last, cache = like[:, :1] * 0, []
        for i in range(like.shape[1]):
            q, *pair = self.qkv(self.token(i, last, context)).unsqueeze(1).chunk(3, -1)
            cache.append(pair)
            k, v = (torch.cat(parts, 1) for parts in zip(*cache, strict=True))
            last = fill(i, self.out(F.scaled_dot_product_attention(q, k, v))[:, 0])


MAPS = {"affine": Affine(), "additive": Additive(), "spline": Spline(), "sinh": Sinh()}
LAYERS = {
    "actnorm image": lambda: (ActNorm(4), IMAGE, {"compiled": True}),
    "actnorm vector": lambda: (ActNorm(5), VECTOR, {}),
    "rescale": lambda: (Rescale(1 / 256, -0.5), IMAGE, {}),
    "rescale, negative": lambda: (Rescale(-3.0, 2.0), VECTOR, {}),
    "standardize": lambda: (standardized(5), VECTOR, {"compiled": True}),
    "marginals": typed,
    "marginals, real": lambda: typed(real=True),
    "marginals, no schema": quantiles,
    "logit": lambda: (Logit(0.05), IMAGE, {"x": torch.rand(4, *IMAGE)}),
    "logit, narrow": lambda: (Logit(1e-5), VECTOR, {"x": torch.rand(4, *VECTOR)}),
    "inverse of squeeze": lambda: (Inverse(Squeeze()), (8, 2, 1), {}),
    "inverse of conv": lambda: (Inverse(InvertibleConv(5)), VECTOR, {}),
    "conv plain": lambda: (InvertibleConv(4, lu=False), IMAGE, {"compiled": True}),
    "conv lu": lambda: (InvertibleConv(4), IMAGE, {"compiled": True}),
    "conv plain, vector": lambda: (InvertibleConv(5, lu=False), VECTOR, {}),
    "conv lu, vector": lambda: (InvertibleConv(5), VECTOR, {}),
    "conv lu, sequence": lambda: (InvertibleConv(4), (4, 3), {}),
    "reverse": lambda: (Permutation.reverse(4), IMAGE, {}),
    "shuffle": lambda: (Permutation.shuffle(5), VECTOR, {}),
    "squeeze": lambda: (Squeeze(), (3, 4, 2), {}),
    "checkerboard": lambda: (Checkerboard(), IMAGE, {}),
    "checkerboard, white": lambda: (Checkerboard(white=True), (3, 3, 4), {}),
    "inverse": lambda: (Inverse(Coupling(conv(2, 4))), IMAGE, {}),
    "coupling image": lambda: (Coupling(conv(2, 4)), IMAGE, {"compiled": True}),
    "coupling, odd channels": lambda: (Coupling(conv(1, 4)), (3, 2, 2), {}),
    "coupling vector": lambda: (Coupling(mlp(2, 6)), VECTOR, {}),
    "coupling, context": lambda: (Coupling(conv(2, 4, 3)), IMAGE, {"context": 3}),
    "coupling vector, context": lambda: (Coupling(mlp(2, 6, 3)), VECTOR, {"context": 3}),
    "coupling, spline": lambda: (Coupling(mlp(2, 69), map=Spline()), VECTOR, {"compiled": True}),
    "coupling, spline, image": lambda: (
        Coupling(conv(2, 22), map=Spline(bins=4, bound=3.0)),
        IMAGE,
        {},
    ),
    **{
        f"autoregressive {name}, {d}": lambda map=map, d=d: (
            masked(d, map, hidden=[9, 8]),
            (d,),
            {"compiled": d == 2 and map is not MAPS["sinh"]},
        )
        for name, map in MAPS.items()
        for d in (1, 2, 5)
        if name != "sinh" or d == 2
    },
    "autoregressive, context": lambda: (
        masked(4, Affine(), hidden=[9, 8], context=2),
        (4,),
        {"context": 2},
    ),
    "autoregressive spline, context": lambda: (
        masked(3, Spline(), hidden=[16, 16], context=2),
        (3,),
        {"context": 2},
    ),
    "autoregressive, format": lambda: (
        masked(5, Affine(Format.parse("interleaved sigmoid+2 scale-first"))),
        VECTOR,
        {},
    ),
    "autoregressive, no hidden layer": lambda: (masked(4, Affine(), hidden=[]), (4,), {}),
    "inverse of autoregressive": lambda: (Inverse(masked(5, Spline(), hidden=[9])), VECTOR, {}),
    "autoregressive, recurrent network": lambda: (
        Autoregressive(Recurrent(4, Spline(bins=3)), map=Spline(bins=3)),
        (4,),
        {},
    ),
    "autoregressive, causal attention": lambda: (
        Autoregressive(Attention(4, Affine(), context=2), map=Affine()),
        (4,),
        {"context": 2},
    ),
    **{
        f"elementwise {name}, {shape}": lambda name=name, shape=shape: (
            Elementwise(shape, map=MAPS[name]),
            (shape,) if isinstance(shape, int) else IMAGE,
            {"compiled": name == "spline"},
        )
        for name, shape in (
            ("spline", 5),
            ("affine", IMAGE),
            ("spline", (IMAGE[0], 1, 1)),
            ("additive", (IMAGE[0], 1, IMAGE[2])),
            ("sinh", 5),
        )
    },
    "additive": lambda: (Coupling(conv(2, 2), map=Additive()), IMAGE, {}),
    "additive, context": lambda: (Coupling(mlp(2, 3, 2), map=Additive()), VECTOR, {"context": 2}),
    "coupling, sinh": lambda: (Coupling(conv(2, 2), map=Sinh()), IMAGE, {"compiled": True}),
    **{
        f"coupling {text}": lambda text=text: (
            Coupling(conv(2, 4), map=Affine(Format.parse(text))),
            IMAGE,
            {},
        )
        for text in (
            "cross sigmoid+2",
            "halves scale-first sigmoid+2 floor=1e-3",
            "halves 2*sigmoid",
            "interleaved atan",
            "softclip scale-first",
            "halves softplus floor=1e-3",
            "log_var",
        )
    },
    "split": lambda: (
        Split(GaussianHead(ZeroConv2d(2, 4), event_ndims=3)),
        IMAGE,
        {"compiled": True},
    ),
    "split, cross": lambda: (
        Split(GaussianHead(ZeroConv2d(2, 4), event_ndims=3, format=Format("interleaved"))),
        IMAGE,
        {},
    ),
    "split, context": lambda: (
        Split(GaussianHead(ResNet(2, 4, width=4, context=3), event_ndims=3)),
        IMAGE,
        {"context": 3},
    ),
    "split, edge": lambda: (
        Split(GaussianHead(ZeroConv2d(2, 4, edge=True), event_ndims=3)),
        IMAGE,
        {"compiled": True},
    ),
    "split vector": lambda: (Split(GaussianHead(mlp(3, 6), event_ndims=1)), (6,), {}),
    "dequantize": lambda: (
        Dequantize(StandardUniform((2, 3, 3)), 16),
        (2, 3, 3),
        {"bits": 4, "compiled": True},
    ),
    "dequantize, learned": lambda: (
        Dequantize(LogitNormalHead(GaussianHead(ResNet(2, 4, width=4), event_ndims=3), 16), 16),
        (2, 3, 3),
        {"bits": 4},
    ),
}

Z = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
FEATURES = torch.randn(4, 6, 3, 2, generator=torch.Generator().manual_seed(4))


def pixels(name, **options):
    channels = options.pop("channels", 2)
    return (
        likelihood(name, (channels, 3, 2), lambda c: nn.Conv2d(6, c, 1), **options),
        FEATURES,
        (channels, 3, 2),
        {},
    )


HEADS = {
    "standard normal": lambda: (StandardNormal((3, 2)), None, (3, 2), {}),
    "standard uniform": lambda: (StandardUniform((3, 2)), None, (3, 2), {}),
    "learned normal": lambda: (LearnedNormal((3, 2, 2)), None, (3, 2, 2), {}),
    "learned normal, pixels, context": lambda: (
        LearnedNormal((3, 2, 2), each="pixel", context=4),
        None,
        (3, 2, 2),
        {"context": 4},
    ),
    "learned normal, context": lambda: (
        LearnedNormal((3, 2, 2), context=4),
        None,
        (3, 2, 2),
        {"context": 4},
    ),
    "gaussian": lambda: (GaussianHead(mlp(6, 8), event_ndims=1), Z, (4,), {}),
    "gaussian, context": lambda: (
        GaussianHead(mlp(6, 8, 2), event_ndims=1),
        Z,
        (4,),
        {"context": 2},
    ),
    "gaussian, two heads": lambda: (
        GaussianHead(TwoHeads(6, 4), event_ndims=1, format=Format("two-heads", scale="log_var")),
        Z,
        (4,),
        {},
    ),
    "gaussian, fixed": lambda: (GaussianHead(mlp(6, 4), event_ndims=1, log_std=-1.0), Z, (4,), {}),
    "gaussian, shared": lambda: (
        GaussianHead(mlp(6, 4), event_ndims=1, log_std=torch.zeros(4)),
        Z,
        (4,),
        {},
    ),
    "gaussian, optimal": lambda: (
        OptimalGaussianHead(nn.Conv2d(6, 2, 1), event_ndims=3),
        FEATURES,
        (2, 3, 2),
        {},
    ),
    "logit-normal": lambda: (
        LogitNormalHead(GaussianHead(nn.Conv2d(6, 4, 1), event_ndims=3), 16),
        FEATURES.abs(),
        (2, 3, 2),
        {},
    ),
    "bernoulli": lambda: pixels("bernoulli", levels=2),
    "categorical": lambda: pixels("categorical", levels=5),
    "logistic": lambda: pixels("logistic", levels=256),
    "logistic, 2 levels": lambda: pixels("logistic", levels=2),
    "beta-binomial": lambda: pixels("beta-binomial", levels=16),
    "beta-binomial, 2 levels": lambda: pixels("beta-binomial", levels=2),
    "logistic mixture": lambda: pixels("logistic-mixture", levels=16, components=3, channels=3),
    "logistic mixture, gray": lambda: pixels("logistic-mixture", components=4, channels=1),
    "continuous bernoulli": lambda: pixels("continuous-bernoulli"),
    "gaussian pixels": lambda: pixels("gaussian"),
    "gaussian, per channel": lambda: pixels("gaussian", std="channel"),
    "gaussian, per pixel": lambda: pixels("gaussian", std="pixel"),
    "gaussian, number": lambda: pixels("gaussian", std=0.1),
}


class TwoHeads(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.first(x), self.second(x)


def zoo(name, shape, bits=8, *, context=0, compiled=False, **options):
    """A small model of the zoo, and the arguments of its check."""
    if context:
        options["context"] = context
    laws = {"bits": bits, "context": context, "compiled": compiled}
    return build(name, shape, bits=bits, **options), shape, laws


def nested():
    """A VAE whose prior is a VAE."""
    inner = VAE(
        GaussianHead(mlp(4, 6), event_ndims=1),
        GaussianHead(mlp(3, 8), event_ndims=1),
        Prior(StandardNormal((3,))),
    )
    outer = VAE(
        GaussianHead(mlp(6, 8), event_ndims=1), GaussianHead(mlp(4, 12), event_ndims=1), inner
    )
    return outer, (6,), {"compiled": True}


SMALL = {"width": 6, "components": 2}
KL = {"latents": 2, "embedded": 3}
GLOW = {"bits": 4, "depth": 1, "hidden": 5}

MODELS = {
    "prior": lambda: (Prior(LearnedNormal((3, 2, 2))), (3, 2, 2), {}),
    "nested vae": nested,
    "vae mlp": lambda: zoo("vae", (1, 6, 5), net="mlp", latents=3, compiled=True, **SMALL),
    "vae mlp, vectors": lambda: zoo("vae", (5,), None, latents=3, width=6),
    **{
        f"{name} standardized": lambda name=name, more=more: zoo(
            name, (3,), None, standardize=True, **more
        )
        for name, more in {
            "vae": {"latents": 2, "width": 6},
            "mlp_vae": {"latents": 2, "hidden": 6},
            "maf": {"depth": 2, "hidden": 8},
            "nsf": {"depth": 2, "hidden": 8},
            "realnvp": {"depth": 2, "hidden": 8},
        }.items()
    },
    "nsf quantile": lambda: zoo("nsf", (3,), None, standardize="quantile", depth=1, hidden=8),
    "vae conv": lambda: zoo("vae", (3, 9, 10), 4, net="conv", latents=3, **SMALL),
    "vae binary": lambda: zoo("vae", (1, 8, 8), 1, latents=3, width=6),
    "vae cross log_var": lambda: zoo(
        "vae", (1, 5, 5), 1, net="mlp", width=6, latents=3, format="cross log_var"
    ),
    "vae context": lambda: zoo("vae", (1, 8, 8), 1, context=3, latents=3, width=6),
    **{
        f"vae flow prior, {depth}": lambda depth=depth: zoo(
            "vae",
            (1, 5, 5),
            1,
            latents=4,
            width=6,
            prior="flow",
            prior_depth=depth,
            compiled=depth == 1,
        )
        for depth in (1, 2)
    },
    "vae flow prior, context": lambda: zoo(
        "vae", (1, 5, 5), 1, context=3, latents=5, width=6, prior="flow", prior_depth=1
    ),
    "vae gaussian": lambda: zoo("vae", (1, 5, 5), 4, latents=3, width=6, likelihood="gaussian"),
    "vae gaussian, optimal": lambda: zoo(
        "vae", (1, 5, 5), 4, latents=3, width=6, likelihood="gaussian", std="optimal"
    ),
    "vae continuous bernoulli": lambda: zoo(
        "vae", (1, 5, 5), 4, latents=3, width=6, likelihood="continuous-bernoulli"
    ),
    "vae categorical": lambda: zoo(
        "vae", (1, 5, 5), 4, latents=3, width=6, likelihood="categorical"
    ),
    **{
        f"nsf coupling, {depth}": lambda depth=depth: zoo(
            "nsf", (5,), None, depth=depth, hidden=6, compiled=depth == 1
        )
        for depth in (1, 2)
    },
    "nsf coupling, bits, context": lambda: zoo("nsf", (3,), 3, depth=2, hidden=6, context=2),
    "nsf autoregressive": lambda: zoo(
        "nsf", (3,), None, kind="autoregressive", depth=2, hidden=6, permutation="reverse"
    ),
    **{
        f"maf, {d}": lambda d=d: zoo("maf", (d,), None, depth=2, hidden=6, compiled=d == 2)
        for d in (2, 5)
    },
    "maf, bits, context": lambda: zoo("maf", (3,), 3, depth=2, hidden=6, context=2),
    **{
        f"ladder, {levels}": lambda levels=levels, shape=shape: zoo(
            "ladder", shape, 4, latents=2, levels=levels, **SMALL, compiled=levels == 2
        )
        for levels, shape in ((2, (2, 7, 8)), (3, (2, 15, 16)))
    },
    "ladder context": lambda: zoo("ladder", (1, 8, 8), 1, context=3, latents=2, levels=3, width=4),
    "ladder gaussian": lambda: zoo(
        "ladder", (1, 8, 8), 4, latents=2, levels=3, width=4, likelihood="gaussian", std="channel"
    ),
    "realnvp": lambda: zoo("realnvp", (1, 8, 8), 4, levels=2, depth=1, hidden=4),
    **{
        f"realnvp vectors, {depth}": lambda depth=depth: zoo(
            "realnvp", (5,), None, depth=depth, hidden=6, compiled=depth == 1
        )
        for depth in (1, 3)
    },
    "realnvp context": lambda: zoo("realnvp", (5,), None, context=2, depth=2, hidden=6),
    "mlp vae": lambda: zoo("mlp_vae", (1, 5, 5), 1, hidden=6, latents=3),
    "mlp vae, beta-binomial": lambda: zoo(
        "mlp_vae", (2, 5, 4), hidden=6, latents=3, likelihood="beta-binomial"
    ),
    "mlp vae, squashed": lambda: zoo(
        "mlp_vae", (1, 5, 5), 4, hidden=6, latents=3, likelihood="gaussian", squash=True
    ),
    "autoencoder kl": lambda: zoo("autoencoder_kl", (3, 8, 12), widths=[4, 8], groups=2, **KL),
    "autoencoder kl, continuous": lambda: zoo(
        "autoencoder_kl", (1, 8, 8), None, widths=[4], groups=4, attend=[0], **KL
    ),
    "autoencoder kl, bare": lambda: zoo(
        "autoencoder_kl",
        (1, 8, 8),
        widths=[4, 4],
        groups=2,
        attend_middle=False,
        quant=False,
        post_quant=False,
        latents=2,
    ),
    "glow": lambda: zoo("glow", (2, 8, 8), levels=2, compiled=True, **GLOW),
    "glow learned, shuffle": lambda: zoo(
        "glow", (1, 8, 8), dequantize="learned", permutation="shuffle", **GLOW
    ),
    "glow additive, reverse": lambda: zoo(
        "glow", (1, 8, 8), coupling="additive", permutation="reverse", learn_top=False, **GLOW
    ),
    "glow as published": lambda: zoo(
        "glow", (1, 8, 8), alpha=None, format="cross sigmoid+2", permutation="conv", **GLOW
    ),
    "glow context": lambda: zoo("glow", (1, 8, 8), context=3, **GLOW),
    "glow of openai": lambda: zoo(
        "published_glow",
        (1, 8, 8),
        levels=2,
        edge=True,
        top_each="pixel",
        split_format="halves log_std",
        compiled=True,
        **GLOW,
    ),
    "glow with a classifier": lambda: zoo(
        "published_glow", (1, 8, 8), context=3, classifier="softmax", low=0.0, **GLOW
    ),
    "glow with a classifier of many labels": lambda: zoo(
        "published_glow",
        (1, 8, 8),
        context=3,
        classifier="sigmoid",
        conditioned="all",
        dequantize="learned",
        alpha=1e-5,
        **GLOW,
    ),
    "glow continuous": lambda: zoo("glow", (3, 8, 8), **{**GLOW, "bits": None}),
}


MAP = torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(5))
VECTOR_CONTEXT = torch.randn(4, 3, generator=torch.Generator().manual_seed(6))
NAMED = {
    "age": torch.randn(4, 1, generator=torch.Generator().manual_seed(8)),
    "kind": torch.eye(3)[[0, 2, 1, 2]],
    "mask": torch.rand(4, 1, 9, 9, generator=torch.Generator().manual_seed(9)) * 255,
}
NAMED_VARIABLES = (
    Variable("age"),
    Variable("kind", classes=3),
    Variable("mask", shape=(1, 9, 9), levels=256),
)


def given(name, spec_shape, bits, context, **options):
    """A model whose context is a map, or named variables that are embedded."""
    spec = Spec(spec_shape, None if bits is None else 2**bits, context=NAMED_VARIABLES)
    if context is NAMED:
        model = build(name, spec, **options)
    else:
        model = build(name, spec_shape, bits=bits, context=3, **options)
    return model, spec_shape, {"bits": bits, "context": context}


CONDITIONED = {
    "vae mlp": ("vae", (5,), None, {"latents": 3, "width": 6}),
    "vae conv": ("vae", (1, 8, 8), 1, {"latents": 3, "width": 6}),
    "vae flow prior": ("vae", (5,), None, {"latents": 4, "width": 6, "prior": "flow"}),
    "ladder": ("ladder", (1, 8, 8), 1, {"latents": 2, "levels": 2, "width": 4}),
    "glow": ("glow", (1, 8, 8), 4, {"depth": 1, "hidden": 5, "levels": 2}),
    "realnvp": ("realnvp", (1, 8, 8), 4, {"levels": 2, "depth": 1, "hidden": 4}),
    "nsf": ("nsf", (3,), None, {"depth": 2, "hidden": 6}),
    "maf": ("maf", (3,), None, {"depth": 2, "hidden": 6}),
}

CONTEXTS = {
    f"{name}, {kind}": lambda name=name, context=context: given(
        *CONDITIONED[name][:3], context, **CONDITIONED[name][3]
    )
    for name in (
        "vae mlp",
        "vae conv",
        "vae flow prior",
        "ladder",
        "glow",
        "realnvp",
        "nsf",
        "maf",
    )
    for kind, context in (("map", MAP), ("named", NAMED))
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_models_with_any_context(name):
    model, event, laws = CONTEXTS[name]()
    check_model(model, event, **laws)


def test_every_network_of_a_conditional_model_takes_the_context():
    """Each network of a conditional Glow, Real NVP and ladder has inputs for the context."""
    for name in ("glow", "realnvp", "ladder"):
        architecture, shape, bits, options = CONDITIONED[name]
        sizes = []
        for context in (0, 3):
            model = build(architecture, shape, bits=bits, context=context, **options)
            sizes.append({n: p.numel() for n, p in model.named_parameters()})
        plain, conditional = sizes
        parts = {
            "glow": (".net.enter.weight", ".prior.net.conv.weight"),
            "realnvp": (".net.enter.weight", ".prior.net.conv.weight"),
            "ladder": (
                ".prior.net.enter.weight",
                ".posterior.net.enter.weight",
                ".project.weight",
            ),
        }[name]
        for part in parts:
            found = [n for n in plain if n.endswith(part)]
            assert found
            assert all(conditional[n] > plain[n] for n in found), (name, part)


def test_an_overridden_infer_of_a_bijection_is_called():
    class Counting(ActNorm):
        calls = 0

        def infer(self, x, trace, context=None):
            Counting.calls += 1
            return super().infer(x, trace, context)

    flow = Chain([ActNorm(3), Counting(3), ActNorm(3)], Prior(StandardNormal((3,))))
    x = torch.randn(4, 3)
    flow(x)
    assert Counting.calls == 1
    check_model(flow, (3,))


def test_the_embedding_runs_once_per_pass_and_reports_every_fault():
    model = build("glow", Spec((1, 8, 8), 16, context=NAMED_VARIABLES), depth=1, hidden=4)
    calls = []
    model.embedding.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randint(0, 16, (4, 1, 8, 8))
    model.calibrate(x, NAMED)
    calls.clear()
    model(x, NAMED)
    assert len(calls) == 1
    model.sample(4, NAMED)
    assert len(calls) == 2
    wrong = {"age": torch.zeros(4, 2), "kind": NAMED["kind"], "height": torch.zeros(4, 1)}
    with pytest.raises(
        ValueError, match=r"'height' is unknown; 'age' has shape \(2,\).*'mask' is"
    ):
        model(x, wrong)
    with pytest.raises(
        ValueError, match="expected a mapping with age, kind, mask; got one tensor"
    ):
        model(x, VECTOR_CONTEXT)


SOONER = ("coupling image", "marginals", "realnvp vectors, 1")
"""What is compiled in the default run; the rest of what compiles is slow."""


def without_compiling(name, laws):
    """The laws of a test, but for compilation, unless it is one of few."""
    return laws if name in SOONER else {**laws, "compiled": False}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    layer, event, laws = LAYERS[name]()
    check_layer(layer, event, **without_compiling(name, laws))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in (*LAYERS, *MODELS) if name not in SOONER])
def test_what_compiles(name):
    module, event, laws = (LAYERS | MODELS)[name]()
    if laws.get("compiled"):
        (check_layer if name in LAYERS else check_model)(module, event, **laws)


@pytest.mark.parametrize("name", HEADS)
def test_head(name):
    head, given, event, laws = HEADS[name]()
    check_head(head, given, event, **laws)


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    model, event, laws = MODELS[name]()
    check_model(model, event, **without_compiling(name, laws))


# -- faults that the laws must detect


class Broken(Bijection):
    """A scaling with one fault at a time."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.s = fault, nn.Parameter(torch.zeros(3))
        self.unused = nn.Parameter(torch.zeros(2)) if fault == "gradients" else None

    def forward(self, x, context=None):
        log_det = self.s.sum().expand(len(x))
        if self.fault == "autograd's Jacobian":
            log_det = 2 * log_det
        if self.fault == "log_det has shape":
            log_det = self.s.sum()
        return x * self.s.exp(), log_det

    def inverse(self, y, context=None):
        log_det = -self.s.sum().expand(len(y))
        if self.fault == "log-determinants cancel":
            log_det = -log_det
        if self.fault == "autograd's Jacobian":
            log_det = 2 * log_det
        x = y * (-self.s).exp()
        if self.fault == "inverse of forward":
            x = x + 1e-6
        return x, log_det


@pytest.mark.parametrize(
    "fault",
    [
        "inverse of forward",
        "log-determinants cancel",
        "autograd's Jacobian",
        "log_det has shape",
        "gradients",
    ],
)
def test_a_broken_bijection_fails_the_laws(fault):
    with pytest.raises(AssertionError, match=fault):
        check_layer(Broken(fault), (3,))


class Forgetful(Layer):
    """A split that generates with another draw, or with its latent times 1.5."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.prior = fault, GaussianHead(nn.Linear(2, 4), event_ndims=1)

    def variables(self):
        yield self

    def infer(self, x, trace, context=None):
        trace.p(self, self.prior(x[:, :2]), x[:, 2:])
        return x[:, :2]

    def generate(self, z, trace, context=None):
        dist = self.prior(z)
        drawn = trace.p(self, dist)
        return torch.cat([z, dist.sample() if self.fault == "resamples" else 1.5 * drawn], 1)


@pytest.mark.parametrize("fault", ["resamples", "scales"])
def test_a_broken_split_fails_the_laws(fault):
    with pytest.raises(AssertionError, match="generate returns the data"):
        check_layer(Forgetful(fault), (4,))


class Remembering(OptimalGaussianHead):
    """A head whose running value changes when it scores a batch."""

    def forward(self, given, context=None):
        dist = super().forward(given, context)
        self.log_std.add_(0.1 * self.training)
        return dist


class Drifting(GaussianHead):
    """A head that returns another distribution at every call."""

    calls = 0

    def forward(self, given, context=None):
        self.calls += self.training
        dist = super().forward(given, context)
        return DiagonalGaussian(dist.mean + self.calls, dist.log_std, 1)


@pytest.mark.parametrize("kind", [Remembering, Drifting])
def test_a_head_changed_by_scoring_fails_the_laws(kind):
    with pytest.raises(AssertionError, match="purity"):
        check_head(kind(mlp(6, 4), event_ndims=1), Z, (4 if kind is Remembering else 2,))


def test_batch_statistics_fail_the_laws():
    encoder = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 6))
    model = VAE(
        GaussianHead(encoder, event_ndims=1),
        GaussianHead(nn.Linear(3, 8), event_ndims=1),
        Prior(StandardNormal((3,))),
    )
    with pytest.raises((AssertionError, ValueError), match=r"batch independence|Expected more"):
        check_model(model, (4,))


def test_a_module_used_twice_is_refused():
    layer = ActNorm(3)
    with pytest.raises(ValueError, match="is used in two places"):
        Chain([layer, Permutation.reverse(3), layer], Prior(StandardNormal((3,))))


def test_encoders_take_images_of_any_size():
    for height, width in ((5, 7), (28, 28), (33, 20)):
        net = ConvEncoder((2, height, width), 6, width=4, halvings=3)
        assert net(torch.randn(2, 2, height, width)).shape == (2, 6)


def test_checkerboards_put_either_color_first():
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    black = (torch.arange(4)[:, None] + torch.arange(6)) % 2 == 0
    first, second = Checkerboard()(x)[0].chunk(2, 1)
    assert torch.equal(first.flatten(), x[0, 0][black])
    assert torch.equal(second.flatten(), x[0, 0][~black])
    white = Checkerboard(white=True)(x)[0]
    assert torch.equal(white, torch.cat([second, first], 1))


@pytest.mark.parametrize("context", [0, 2])
def test_features_are_inverted_one_by_one_under_autocast(context):
    layer = masked(3, Affine(), hidden=[6], context=context)
    x, given = torch.randn(5, 3), torch.randn(5, context) if context else None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, log_det = layer.inverse(x, given)
    with torch.no_grad():
        expected, expected_log_det = layer.inverse(x, given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(log_det, expected_log_det)
