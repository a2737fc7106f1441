"""Small flows, correct and wrong, each with the expected audit."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

FLOWS: dict = {}


@dataclass
class Case:
    """The arguments of the audit, and the expected result."""

    make: object
    verdict: str
    codes: tuple = ()
    names: tuple = field(default=())


def flow(verdict="correct", *codes):
    def register(make):
        FLOWS[make.__name__] = Case(make, verdict, codes)
        return make

    return register


def vectors(d=4, n=16, scale=1.0):
    return scale * torch.randn(n, d)


def images(c=3, s=4, n=8):
    return torch.randn(n, c, s, s)


def mlp(i, o, zero=False, hidden=16):
    net = nn.Sequential(nn.Linear(i, hidden), nn.Tanh(), nn.Linear(hidden, o))
    if zero:
        nn.init.zeros_(net[-1].weight)
        nn.init.zeros_(net[-1].bias)
    return net


def conv(i, o, zero=False, hidden=8):
    net = nn.Sequential(nn.Conv2d(i, hidden, 3, 1, 1), nn.ReLU(), nn.Conv2d(hidden, o, 3, 1, 1))
    if zero:
        nn.init.zeros_(net[-1].weight)
        nn.init.zeros_(net[-1].bias)
    return net


# --- elementwise --------------------------------------------------------------------------------


class Affine(nn.Module):
    """Exp(s) x + b; variants differ in the line that the name describes."""

    def __init__(self, d=4, wrong=""):
        super().__init__()
        self.s, self.b, self.wrong = nn.Parameter(0.3 * torch.randn(d)), None, wrong
        self.b = nn.Parameter(torch.randn(d))

    def forward(self, x):
        log_det = self.s.sum().expand(len(x))
        if self.wrong == "sign":
            log_det = -log_det
        if self.wrong == "number":
            log_det = self.s.sum()
        if self.wrong == "elements":
            log_det = self.s.expand_as(x)
        if self.wrong == "column":
            log_det = log_det[:, None]
        return x * self.s.exp() + self.b, log_det

    def inverse(self, z):
        if self.wrong == "order":
            return z * (-self.s).exp() - self.b, -self.s.sum().expand(len(z))
        log_det = -self.s.sum().expand(len(z))
        if self.wrong == "back sign":
            log_det = -log_det
        if self.wrong == "back factor":
            log_det = 2 * log_det
        return (z - self.b) * (-self.s).exp(), log_det


def affine_case(wrong, verdict="correct", *codes):
    def make():
        return {"forward": Affine(wrong=wrong), "example": vectors()}

    make.__name__ = f"affine_{wrong.replace(' ', '_') or 'right'}"
    FLOWS[make.__name__] = Case(make, verdict, codes)


affine_case("")
affine_case("column", "warning", "logdet_shape")
affine_case("elements", "warning", "logdet_shape")
affine_case("number", "warning", "logdet_shape")
affine_case("sign", "bug", "logdet_mismatch")
affine_case("order", "bug", "inverse_mismatch")
affine_case("back sign", "bug", "inverse_logdet_sign")
affine_case("back factor", "bug", "inverse_logdet_mismatch")


@flow()
def affine_functions():
    a = torch.rand(3) + 0.5
    return {
        "forward": lambda x: (x * a, a.log().sum().expand(len(x))),
        "inverse": lambda z: z / a,
        "example": vectors(3),
    }


@flow()
def torch_transform():
    from torch.distributions import AffineTransform, ComposeTransform, ExpTransform

    return {
        "forward": ComposeTransform([AffineTransform(0.3, 0.5), ExpTransform()]),
        "example": vectors(3),
    }


@flow()
def leaky_relu():
    return {
        "forward": lambda x: (
            F.leaky_relu(x, 0.2),
            torch.where(x < 0, math.log(0.2), 0.0).sum(1),
        ),
        "inverse": lambda z: F.leaky_relu(z, 5.0),
        "example": vectors(5),
    }


@flow()
def logit():
    a = 0.05

    def forward(x):
        u = a + (1 - 2 * a) * x
        slope = math.log(1 - 2 * a) - u.log() - (1 - u).log()
        return u.logit(), slope.flatten(1).sum(1)

    return {
        "forward": forward,
        "inverse": lambda z: (z.sigmoid() - a) / (1 - 2 * a),
        "example": torch.rand(8, 3, 2, 2),
    }


@flow("bug", "logdet_mismatch")
def logit_forgets_its_slope():
    def forward(x):
        u = 0.05 + 0.9 * x
        return u.logit(), -(u.log() + (1 - u).log()).sum(1)

    return {"forward": forward, "example": torch.rand(8, 4)}


@flow()
def tanh_of_few():
    return {
        "forward": lambda x: (x.tanh(), (1 - x.tanh() ** 2).log().sum(1)),
        "inverse": torch.atanh,
        "example": vectors(3, scale=0.7),
    }


# --- ActNorm and batch norm ---------------------------------------------------------------------


class ActNorm(nn.Module):
    """(x + b) exp(s), set from the first batch."""

    def __init__(self, c=3, wrong="", buffered=True):
        super().__init__()
        self.b, self.s = (
            nn.Parameter(torch.zeros(1, c, 1, 1)),
            nn.Parameter(torch.zeros(1, c, 1, 1)),
        )
        self.wrong, self.buffered, self.done = wrong, buffered, False
        if buffered:
            self.register_buffer("ready", torch.tensor(0))

    @torch.no_grad()
    def initialize(self, x):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True)
        self.b.copy_(-mean)
        std = var if self.wrong == "variance" else var.sqrt()
        self.s.copy_(-(std + 1e-6).log())

    def forward(self, x):
        ready = bool(self.ready) if self.buffered else self.done
        if not ready:
            self.initialize(x)
            self.done = True
            if self.buffered:
                self.ready.fill_(1)
        b = 0.0 if self.wrong == "mean" else self.b
        pixels = 1 if self.wrong == "pixels" else x[0, 0].numel()
        return (x + b) * self.s.exp(), (pixels * self.s.sum()).expand(len(x))

    def inverse(self, z):
        b = 0.0 if self.wrong == "mean" else self.b
        return z * (-self.s).exp() - b


@flow()
def actnorm():
    return {"forward": ActNorm(), "example": 3 + 2 * images()}


@flow("bug", "ddi_wrong")
def actnorm_variance():
    return {"forward": ActNorm(wrong="variance"), "example": 3 + 2 * images()}


@flow("bug", "ddi_wrong")
def actnorm_mean():
    return {"forward": ActNorm(wrong="mean"), "example": 3 + 2 * images()}


@flow("bug", "ddi_reinit")
def actnorm_attribute():
    return {"forward": ActNorm(buffered=False), "example": 3 + 2 * images()}


@flow("bug", "logdet_mismatch")
def actnorm_pixels():
    return {"forward": ActNorm(wrong="pixels"), "example": 3 + 2 * images()}


@flow()
def actnorm_of_musigma():
    from musigma.layers import ActNorm as Ours

    return {"forward": Ours(3), "example": images()}


class BatchNorm(nn.Module):
    """A batch norm flow with running statistics."""

    def __init__(self, d=4, wrong=""):
        super().__init__()
        self.g, self.b, self.wrong = (
            nn.Parameter(torch.zeros(d)),
            nn.Parameter(torch.zeros(d)),
            wrong,
        )
        self.register_buffer("running_mean", torch.zeros(d))
        self.register_buffer("running_var", torch.ones(d))

    def stats(self, x):
        if self.training or self.wrong == "always":
            mean, var = x.mean(0), x.var(0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var, 0.1)
            return mean, var
        return self.running_mean, self.running_var

    def forward(self, x):
        mean, var = self.stats(x)
        z = self.g.exp() * (x - mean) / (var + 1e-5).sqrt() + self.b
        log_det = (self.g - 0.5 * (var + 1e-5).log()).sum().expand(len(x))
        if self.wrong == "half":
            log_det = (self.g - (var + 1e-5).log()).sum().expand(len(x))
        return z, log_det

    def inverse(self, z):
        return (z - self.b) * (-self.g).exp() * (
            self.running_var + 1e-5
        ).sqrt() + self.running_mean


@flow()
def batch_norm_eval():
    return {"forward": BatchNorm().eval(), "example": vectors()}


@flow("warning", "cross_sample")
def batch_norm_training():
    return {"forward": BatchNorm(), "example": vectors()}


@flow("bug", "cross_sample")
def batch_norm_always():
    layer = BatchNorm(wrong="always").eval()
    return {"forward": layer.forward, "inverse": None, "state": layer, "example": vectors()}


@flow("bug", "logdet_mismatch")
def batch_norm_half():  # hidden as long as the running variance is one
    return {"forward": BatchNorm(wrong="half").eval(), "example": vectors()}


# --- linear -------------------------------------------------------------------------------------


class Conv1x1(nn.Module):
    """A plain matrix of the channels."""

    def __init__(self, c=3, wrong="", determinant=1):
        super().__init__()
        w = torch.linalg.qr(torch.randn(c, c))[0]
        if torch.det(w) * determinant < 0:
            w[:, 0] *= -1
        self.w, self.wrong = nn.Parameter(w), wrong
        if wrong == "stored":
            self.register_buffer("back", w.inverse())
        self.kept = None

    def forward(self, x):
        log_det = torch.linalg.slogdet(self.w)[1]
        if self.wrong == "logdet":
            log_det = torch.logdet(self.w)
        if self.wrong == "orthogonal":
            log_det = 0 * log_det
        pixels = 1 if self.wrong == "pixels" else x.shape[2] * x.shape[3]
        if self.wrong == "one side":
            pixels = x.shape[2]
        z = F.conv2d(x, self.w[:, :, None, None])
        return z, (pixels * log_det).expand(len(x))

    def inverse(self, z):
        if self.wrong == "cached" and self.kept is None:
            self.kept = self.w.detach().inverse()
        w = self.kept if self.wrong == "cached" else self.w.inverse()
        if self.wrong == "stored":
            w = self.back
        if self.wrong == "transpose":
            w = self.w.T
        return F.conv2d(z, w[:, :, None, None])


def conv_case(wrong, verdict="correct", *codes, determinant=1, name=None):
    def make():
        return {"forward": Conv1x1(wrong=wrong, determinant=determinant), "example": images()}

    make.__name__ = name or f"conv1x1_{wrong.replace(' ', '_') or 'right'}"
    FLOWS[make.__name__] = Case(make, verdict, codes)


conv_case("")
conv_case("", determinant=-1, name="conv1x1_negative")
conv_case("logdet", "bug", "logdet_nan")
conv_case("logdet", "bug", "logdet_nan", determinant=-1, name="conv1x1_logdet_negative")
conv_case("pixels", "bug", "logdet_mismatch")
conv_case("one side", "bug", "logdet_mismatch")
conv_case("orthogonal", "bug", "logdet_mismatch")
conv_case("cached", "bug", "stale_inverse")
conv_case("stored", "bug", "stale_inverse")
conv_case("transpose", "bug", "inverse_mismatch")


class LU(nn.Module):
    """P L (U + diag(exp s))."""

    def __init__(self, d=4):
        super().__init__()
        self.l, self.u = (
            nn.Parameter(0.2 * torch.randn(d, d)),
            nn.Parameter(0.2 * torch.randn(d, d)),
        )
        self.s = nn.Parameter(torch.zeros(d))
        self.register_buffer("order", torch.randperm(d))

    def matrix(self):
        eye = torch.eye(len(self.s)).to(self.s)
        return (self.l.tril(-1) + eye) @ (self.u.triu(1) + torch.diag(self.s.exp()))

    def forward(self, x):
        return (x @ self.matrix().T)[:, self.order], self.s.sum().expand(len(x))

    def inverse(self, z):
        return torch.linalg.solve(self.matrix(), z[:, self.order.argsort()].T).T


@flow()
def lu_linear():
    return {"forward": LU(), "example": vectors()}


class Cached(LU):
    """Keeps its inverse in evaluation mode; train() drops it."""

    kept = None

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def inverse(self, z):
        if self.kept is None or self.training:
            self.kept = self.matrix().detach().inverse()
        return z[:, self.order.argsort()] @ self.kept.T


@flow()
def lu_cached_until_train():
    return {"forward": Cached().eval(), "example": vectors()}


@flow()
def householder():
    layer = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(3)])

    def turn(x, vs):
        for v in vs:
            x = x - 2 * torch.outer(x @ v, v) / v.dot(v)
        return x

    return {
        "forward": lambda x: (turn(x, layer), torch.zeros(len(x))),
        "inverse": lambda z: turn(z, list(layer)[::-1]),
        "example": vectors(),
    }


@flow("warning", "ill_conditioned")
def nearly_singular():
    w = torch.linalg.qr(torch.randn(4, 4))[0] @ torch.diag(torch.tensor([1.0, 1, 1, 1e-9]))
    w = (w.double() @ torch.linalg.qr(torch.randn(4, 4))[0].double()).requires_grad_()
    return {
        "forward": lambda x: (x @ w.to(x), torch.linalg.slogdet(w)[1].expand(len(x)).to(x)),
        "inverse": lambda z: z @ w.inverse().to(z),
        "example": vectors(),
    }


# --- couplings ----------------------------------------------------------------------------------


class Coupling(nn.Module):
    """The first half of the features moves the second."""

    def __init__(self, net, kind="affine", wrong=""):
        super().__init__()
        self.net, self.kind, self.wrong = net, kind, wrong

    def parts(self, a, x):
        h = self.net(a)
        if self.kind == "additive":
            return h, torch.zeros_like(x)
        t, r = h.chunk(2, 1)
        return t, F.logsigmoid(r + 2) if self.kind == "sigmoid" else 1.5 * r.tanh()

    def forward(self, x):
        a, b = x.chunk(2, 1)
        t, s = self.parts(a, b)
        z = torch.cat([a, (b + t) * s.exp()], 1)
        log_det = s.flatten(1).sum(1)
        if self.wrong == "sign":
            log_det = -log_det
        if self.wrong == "batch":
            log_det = s.sum()
        if self.wrong == "mean":
            log_det = s.flatten(1).mean(1)
        if self.wrong == "axis":
            log_det = s.sum(0).sum()[None]
        if self.wrong == "noise":
            z = z + 0.1 * torch.randn_like(z)
        return z, log_det

    def inverse(self, z):
        a, b = z.chunk(2, 1)
        t, s = self.parts(a, b)
        if self.wrong == "inverse sign":
            return torch.cat([a, b * s.exp() - t], 1)
        if self.wrong == "shape":
            raise ValueError("not enough values to unpack")
        return torch.cat([a, b * (-s).exp() - t], 1)


@flow()
def coupling_affine():
    return {"forward": Coupling(mlp(2, 4)), "example": vectors()}


@flow()
def coupling_affine_from_zero():
    return {"forward": Coupling(mlp(2, 4, zero=True)), "example": vectors()}


@flow()
def coupling_sigmoid():
    return {"forward": Coupling(mlp(3, 6), "sigmoid"), "example": vectors(6)}


@flow()
def coupling_additive():
    return {"forward": Coupling(mlp(2, 2), "additive"), "example": vectors()}


@flow()
def coupling_images():
    return {"forward": Coupling(conv(2, 4, zero=True)), "example": images(4)}


@flow("bug", "logdet_mismatch")
def coupling_sign_from_zero():
    return {"forward": Coupling(mlp(2, 4, zero=True), wrong="sign"), "example": vectors()}


@flow("bug", "inverse_mismatch")
def coupling_inverse_sign_from_zero():
    return {"forward": Coupling(mlp(2, 4, zero=True), wrong="inverse sign"), "example": vectors()}


@flow("bug", "logdet_shape")
def coupling_summed_over_batch():
    return {"forward": Coupling(mlp(2, 4), wrong="batch"), "example": vectors()}


@flow("bug", "logdet_mismatch")
def coupling_mean():
    return {"forward": Coupling(mlp(2, 4), wrong="mean"), "example": vectors()}


@flow("bug", "stochastic")
def coupling_noise():
    return {"forward": Coupling(mlp(2, 4), wrong="noise"), "example": vectors()}


@flow("bug", "inverse_raises")
def coupling_raises():
    return {"forward": Coupling(mlp(2, 4), wrong="shape"), "example": vectors()}


@flow("warning", "stochastic")
def coupling_dropout_training():
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
    return {"forward": Coupling(net), "example": vectors()}


@flow()
def coupling_dropout_eval():
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
    return {"forward": Coupling(net).eval(), "example": vectors()}


@flow()
def coupling_batch_norm_net_eval():
    net = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    return {"forward": Coupling(net).eval(), "example": vectors()}


@flow("bug", "inverse_raises")
def inverse_works_once():
    layer = Affine()
    calls = []

    def inverse(z):
        if calls:
            raise RuntimeError("already inverted")
        calls.append(1)
        return layer.inverse(z)[0]

    return {"forward": layer.forward, "inverse": inverse, "state": layer, "example": vectors()}


@flow("bug", "inverse_mismatch")
def inverse_remembers_the_last_call():
    kept = {}

    def forward(x):
        kept["half"] = x[:, 2:]
        return torch.cat([x[:, :2] * 2, x[:, 2:]], 1), torch.full((len(x),), 2 * math.log(2))

    def inverse(z):
        return torch.cat([z[:, :2] / 2, kept["half"]], 1)

    return {"forward": forward, "inverse": inverse, "example": vectors()}


# --- reshaping ----------------------------------------------------------------------------------


@flow()
def squeeze():
    return {
        "forward": lambda x: (F.pixel_unshuffle(x, 2), torch.zeros(len(x))),
        "inverse": lambda z: F.pixel_shuffle(z, 2),
        "example": images(3, 4),
    }


@flow("bug", "inverse_mismatch")
def squeeze_wrong_way():
    return {
        "forward": lambda x: (F.pixel_unshuffle(x, 2), torch.zeros(len(x))),
        "inverse": lambda z: z.reshape(len(z), 3, 4, 4),
        "example": images(3, 4),
    }


@flow()
def permutation():
    order = torch.randperm(6)
    return {
        "forward": lambda x: (x[:, order], 0.0),
        "inverse": lambda z: z[:, order.argsort()],
        "example": vectors(6),
    }


@flow("bug", "inverse_mismatch")
def split_off_and_drawn_anew():
    def inverse(z):
        return torch.cat([z / 2, torch.randn_like(z)], 1)

    return {
        "forward": lambda x: (2 * x[:, :2], torch.full((len(x),), 2 * math.log(2))),
        "inverse": inverse,
        "example": vectors(),
    }


@flow()
def several_scales():
    def forward(x):
        return [2 * x[:, :2], x[:, 2:] + 1], torch.full((len(x),), 2 * math.log(2))

    return {
        "forward": forward,
        "inverse": lambda zs: torch.cat([zs[0] / 2, zs[1] - 1], 1),
        "example": vectors(5),
    }


# --- planar, residual, autoregressive, splines --------------------------------------------------


class Planar(nn.Module):
    """X + u tanh(w x + b)."""

    def __init__(self, d=3, constrained=True):
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(d)), nn.Parameter(torch.randn(d))
        self.b, self.constrained = nn.Parameter(torch.zeros(())), constrained

    def forward(self, x):
        w, u = self.w, self.u
        if self.constrained:
            wu = w.dot(u)
            u = u + (F.softplus(wu) - 1 - wu) * w / w.dot(w)
        h = torch.tanh(x @ w + self.b)
        return x + torch.outer(h, u), (1 + (1 - h**2) * w.dot(u)).abs().log()


@flow()
def planar():
    return {"forward": Planar(), "example": vectors(3)}


@flow("bug", "not_injective")
def planar_unconstrained():
    return {"forward": Planar(constrained=False), "example": vectors(3)}


class Residual(nn.Module):
    """X + g(x) with |g|_Lip < 1, inverted by iteration; its log-determinant by brute force."""

    def __init__(self, d=3):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(16, d)), nn.Parameter(torch.randn(d, 16))

    def g(self, x):
        a, b = (0.8 * w / torch.linalg.matrix_norm(w, 2).clamp(min=0.8) for w in (self.a, self.b))
        return torch.tanh(x @ a.T) @ b.T

    def forward(self, x):
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            g = self.g(leaf)
            rows = [
                torch.autograd.grad(g[:, i].sum(), leaf, create_graph=True)[0]
                for i in range(x.shape[1])
            ]
        jacobian = torch.stack(rows, 1) + torch.eye(x.shape[1]).to(x)
        return x + g, torch.linalg.slogdet(jacobian)[1]

    def inverse(self, z):
        x = z
        for _ in range(200):
            x = z - self.g(x)
        return x


@flow()
def residual():
    return {"forward": Residual(), "example": vectors(3)}


class Autoregressive(nn.Module):
    """MAF; with `inverted` the fast direction is the other one, IAF."""

    def __init__(self, d=4, wrong=""):
        super().__init__()
        self.d, self.wrong = d, wrong
        self.w = nn.Parameter(0.3 * torch.randn(2, d, d))
        self.c = nn.Parameter(0.3 * torch.randn(2, d))
        diagonal = 0 if wrong == "mask" else -1
        self.register_buffer("mask", torch.ones(d, d).tril(diagonal))

    def parts(self, x):
        m, s = torch.einsum("kij,nj->kni", self.w * self.mask, torch.tanh(x)) + self.c[:, None]
        return m, s.tanh()

    def forward(self, x):
        m, s = self.parts(x)
        return (x - m) * (-s).exp(), -s.sum(1)

    def inverse(self, z):
        x = torch.zeros_like(z)
        for _ in range(self.d):
            m, s = self.parts(x)
            x = z * s.exp() + m
        return x, self.parts(x)[1].sum(1)


@flow()
def maf():
    return {"forward": Autoregressive(), "example": vectors()}


@flow()
def iaf():
    layer = Autoregressive()
    return {
        "forward": layer.inverse,
        "inverse": layer.forward,
        "state": layer,
        "example": vectors(),
    }


@flow("bug", "inverse_logdet_mismatch", "inverse_mismatch", "logdet_mismatch")
def maf_sees_itself():
    return {"forward": Autoregressive(wrong="mask"), "example": vectors()}


@flow()
def spline():
    from musigma.layers import Coupling as Ours
    from musigma.layers import Spline

    return {"forward": Ours(mlp(2, 46), map=Spline()), "example": vectors()}


@flow("warning", "stochastic")
def residual_by_trace_estimate():
    w = 0.15 * torch.randn(3, 3)

    def forward(x):
        g = torch.tanh(x @ w.to(x).T)
        v = torch.randn_like(x)
        total, term = 0.0, v
        slope = 1 - g**2
        for k in range(1, 12):
            term = slope * (term @ w.to(x).T)
            total = total + (-1) ** (k + 1) / k * (v * term).sum(1)
        return x + g, total

    return {"forward": forward, "example": vectors(3)}


@flow("warning", "stochastic")
def dequantization():
    return {
        "forward": lambda x: (
            (x + torch.rand_like(x)) / 8,
            torch.full((len(x),), -12 * math.log(8)),
        ),
        "inverse": lambda z: (8 * z).floor(),
        "example": torch.randint(0, 8, (8, 3, 2, 2)).float(),
    }


@flow("bug", "not_finite")
def not_finite():
    return {"forward": lambda x: (x.log(), -x.log().sum(1)), "example": vectors()}


@flow()
def volume_preserving_number():
    return {
        "forward": lambda x: (x.flip(1), 0),
        "inverse": lambda z: z.flip(1),
        "example": vectors(),
    }


@flow()
def log_determinant_first():
    return {
        "forward": lambda x: (torch.full((len(x),), 4 * math.log(3)), 3 * x),
        "inverse": lambda z: z / 3,
        "example": vectors(),
    }


@flow()
def one_dimension():
    return {
        "forward": lambda x: (x.sinh(), x.cosh().log().sum(1)),
        "inverse": torch.asinh,
        "example": vectors(1),
    }


@flow()
def one_number():
    return {
        "forward": lambda x: (x.sinh(), x.cosh().log()),
        "inverse": torch.asinh,
        "example": torch.randn(16),
    }


@flow()
def cubic_with_a_bisection():
    def inverse(z):
        low, high = -10 - z.abs(), 10 + z.abs()
        for _ in range(30):
            middle = (low + high) / 2
            below = middle**3 + middle < z
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    return {
        "forward": lambda x: (x**3 + x, (3 * x**2 + 1).log().sum(1)),
        "inverse": inverse,
        "example": vectors(),
    }


@flow("bug", "not_injective", "inverse_mismatch")
def a_fold():
    return {
        "forward": lambda x: (torch.cat([x[:, :1] ** 2, x[:, 1:]], 1), (2 * x[:, 0]).abs().log()),
        "inverse": lambda z: torch.cat([z[:, :1].sqrt(), z[:, 1:]], 1),
        "example": vectors(3),
    }


@flow("bug", "inverse_logdet_mismatch")
def inverse_states_half():
    net = mlp(2, 2)

    def forward(x):
        a, b = x.chunk(2, 1)
        s = net(a).tanh()
        return torch.cat([a, b * s.exp()], 1), s.sum(1)

    def inverse(z):
        a, b = z.chunk(2, 1)
        s = net(a).tanh()
        return torch.cat([a, b * (-s).exp()], 1), -s[:, 0]

    return {"forward": forward, "inverse": inverse, "example": vectors()}


@flow("bug", "logdet_mismatch")
def numpy_inside():
    def forward(x):
        z = torch.from_numpy(3 * x.detach().numpy())
        return z, torch.zeros(len(x))

    return {"forward": forward, "inverse": lambda z: z / 3, "example": vectors(3)}


@flow()
def numpy_inside_and_right():
    def forward(x):
        z = torch.from_numpy(3 * x.detach().numpy())
        return z, torch.full((len(x),), 3 * math.log(3))

    return {"forward": forward, "inverse": lambda z: z / 3, "example": vectors(3)}


@flow("bug", "logdet_shape")
def log_scales_of_no_batch():
    layer = Affine()
    return {"forward": lambda x: (layer(x)[0], layer.s), "state": layer, "example": vectors()}


# --- of layers ----------------------------------------------------------------------------------


@flow()
def sequence_of_layers():
    return {
        "forward": nn.Sequential(ActNorm(4), Conv1x1(4), Coupling(conv(2, 4, zero=True))),
        "example": images(4),
    }


class Step(nn.Module):
    """A normalization and a coupling that starts at the same scale for all."""

    def __init__(self):
        super().__init__()
        self.norm, self.coupling = ActNorm(4), Coupling(conv(2, 4, zero=True), "sigmoid")

    def forward(self, x):
        x, a = self.norm(x)
        x, b = self.coupling(x)
        return x, a + b

    def inverse(self, z):
        return self.norm.inverse(self.coupling.inverse(z))


@flow()
def step_that_starts_as_a_scale():
    return {"forward": Step(), "example": 3 + 2 * images(4)}


class Gain(Affine):
    """A scale of each channel that no batch sets."""

    def forward(self, x):
        pixels = x[0, 0].numel()
        s, b = (t[:, None, None] for t in (self.s, self.b))
        return x * s.exp() + b, pixels * self.s.sum().expand(len(x))

    def inverse(self, z):
        s, b = (t[:, None, None] for t in (self.s, self.b))
        return (z - b) * (-s).exp()


@flow()
def normalization_before_a_gain():
    return {"forward": nn.Sequential(ActNorm(4), Gain()), "example": 3 + 2 * images(4)}


@flow("bug", "ddi_wrong")
def wrong_normalization_before_a_gain():
    return {
        "forward": nn.Sequential(ActNorm(4, "variance"), Gain()),
        "example": 3 + 2 * images(4),
    }


@flow("bug", "logdet_mismatch")
def sequence_with_a_wrong_layer():
    layers = [Coupling(conv(2, 4, zero=True)), Conv1x1(4, wrong="pixels"), ActNorm(4)]
    return {"forward": nn.Sequential(*layers), "example": images(4)}


class Glow(nn.Module):
    """Accumulates log-determinants by an argument, as some do."""

    def __init__(self, c=4, steps=2, wrong=""):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(steps):
            self.layers += [Conv1x1(c), Coupling(conv(c // 2, c, zero=True))]
        self.wrong = wrong

    def forward(self, x, logdet=0.0, reverse=False):
        if reverse:
            for layer in list(self.layers)[::-1]:
                x = layer.inverse(x)
            return x, logdet
        for i, layer in enumerate(self.layers):
            x, own = layer(x)
            logdet = own if self.wrong == "last" or (i == 0 and logdet == 0.0) else logdet + own
        return x, logdet


@flow()
def glow_with_a_keyword():
    return {"forward": Glow(), "example": images(4)}


@flow("bug", "logdet_mismatch")
def glow_keeps_the_last():
    layer = Glow(wrong="last")
    return {
        "forward": layer,
        "inverse": lambda z: layer(z, reverse=True)[0],
        "example": images(4),
    }


# --- log-determinants that are added to an argument ---------------------------------------------


class Threaded(nn.Module):
    """A coupling that is called as ``layer(z, ldj, reverse=False)``."""

    def __init__(self, wrong=""):
        super().__init__()
        self.net, self.wrong = mlp(2, 4), wrong

    def forward(self, z, ldj, reverse=False):
        a, b = z.chunk(2, 1)
        t, s = self.net(a).chunk(2, 1)
        s = s.tanh()
        if reverse:
            return torch.cat([a, b * (-s).exp() - t], 1), ldj - s.sum(1)
        own = s.sum(1, keepdim=self.wrong == "column")
        return torch.cat([a, (b + t) * s.exp()], 1), own if self.wrong == "forgets" else ldj + own


class Defaulting(Threaded):
    def forward(self, z, ldj=0.0, reverse=False):
        return super().forward(z, ldj, reverse)


def threaded_case(name, kind, wrong="", verdict="correct", *codes):
    FLOWS[name] = Case(lambda: {"forward": kind(wrong), "example": vectors()}, verdict, codes)


threaded_case("threaded", Threaded)
threaded_case("threaded_with_a_default", Defaulting)
threaded_case("threaded_forgets_what_came", Threaded, "forgets", "bug", "logdet_mismatch")
threaded_case("threaded_forgets_the_default", Defaulting, "forgets", "bug", "logdet_mismatch")
threaded_case("threaded_adds_a_column", Threaded, "column", "bug", "logdet_shape")


class ThreadedChain(nn.Module):
    """Layers that thread, inside a flow that does not."""

    def __init__(self, wrong=""):
        super().__init__()
        self.layers = nn.ModuleList([Threaded(), Threaded(wrong)])

    def forward(self, x):
        ldj = torch.zeros(len(x))
        for layer in self.layers:
            x, ldj = layer(x.flip(1), ldj)
        return x, ldj

    def inverse(self, z):
        for layer in list(self.layers)[::-1]:
            z = layer(z, torch.zeros(len(z)), reverse=True)[0].flip(1)
        return z


@flow()
def chain_of_threaded_layers():
    return {"forward": ThreadedChain(), "example": vectors()}


@flow()
def sequence_of_threaded_layers():
    return {"forward": nn.Sequential(Threaded(), Defaulting(), Affine()), "example": vectors()}


@flow()
def transforms_in_a_sequence():
    from torch.distributions import AffineTransform, SigmoidTransform

    layers = [AffineTransform(0.1, torch.tensor([2.0, 0.5, 1.0, 1.5])), SigmoidTransform()]
    return {"forward": layers, "example": vectors()}


@flow("bug", "logdet_mismatch")
def chain_of_threaded_layers_one_forgets():
    return {"forward": ThreadedChain("forgets"), "example": vectors()}


@flow("bug", "logdet_shape")
def a_column_and_a_row_in_a_sequence():
    return {"forward": nn.Sequential(Affine(wrong="column"), Affine()), "example": vectors()}


@flow()
def a_number_and_a_row_in_a_sequence():
    return {"forward": nn.Sequential(Affine(wrong="number"), Affine()), "example": vectors()}


# --- inverses that are almost right -------------------------------------------------------------


class Logit(nn.Module):
    """Data squeezed into (alpha / 2, 1 - alpha / 2), then the logit."""

    def __init__(self, alpha, undone):
        super().__init__()
        self.alpha, self.undone = alpha, undone

    def forward(self, x):
        u = self.alpha / 2 + (1 - self.alpha) * x
        slope = math.log(1 - self.alpha) - u.log() - (1 - u).log()
        return u.logit(), slope.flatten(1).sum(1)

    def inverse(self, z):
        u = z.sigmoid()
        return (u - self.alpha / 2) / (1 - self.alpha) if self.undone else u


@flow()
def logit_of_a_small_alpha():
    return {"forward": Logit(1e-5, True), "example": torch.rand(8, 3, 4, 4)}


@flow("warning", "inverse_mismatch")
def logit_that_forgets_a_small_alpha():
    return {"forward": Logit(1e-5, False), "example": torch.rand(8, 3, 4, 4)}


@flow("bug", "inverse_mismatch")
def logit_that_forgets_its_alpha():
    return {"forward": Logit(0.05, False), "example": torch.rand(8, 3, 4, 4)}


class Scaled(nn.Module):
    """Division by a stored standard deviation with an eps."""

    def __init__(self, eps):
        super().__init__()
        self.register_buffer("var", torch.rand(4) + 0.5)
        self.eps = eps

    def forward(self, x):
        log_std = 0.5 * (self.var + 1e-6).log()
        return x * (-log_std).exp(), -log_std.sum().expand(len(x))

    def inverse(self, z):
        return z * (self.var + self.eps).sqrt()


@flow()
def batch_norm_inverse_with_eps():
    return {"forward": Scaled(1e-6), "example": vectors()}


@flow("warning", "inverse_mismatch")
def batch_norm_inverse_without_eps():
    return {"forward": Scaled(0.0), "example": vectors()}


class Newton(nn.Module):
    """X + 0.5 tanh(x), inverted by a few steps of Newton's method."""

    def forward(self, x):
        return x + 0.5 * x.tanh(), (1.5 - 0.5 * x.tanh() ** 2).log().sum(1)

    def inverse(self, z):
        x = z
        for _ in range(14):  # to about 1e-6
            x = x - 0.6 * (x + 0.5 * x.tanh() - z) / (1.5 - 0.5 * x.tanh() ** 2)
        return x


@flow("warning", "inverse_mismatch")
def newton_steps():
    return {"forward": Newton(), "example": vectors()}


class Rotation(nn.Module):
    """An orthogonal matrix, made and stored in float32."""

    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.linalg.qr(torch.randn(6, 6))[0])

    def forward(self, x):
        return x @ self.w, torch.zeros(len(x))

    def inverse(self, z):
        return z @ self.w.T


class Contraction(nn.Module):
    """X + 0.5 tanh(x W), inverted by 20 fixed-point iterations."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(3) + 0.1 * torch.randn(3, 3))

    def g(self, x):
        return 0.4 * (x @ (self.w / torch.linalg.matrix_norm(self.w, 2))).tanh()

    def forward(self, x):
        w = self.w / torch.linalg.matrix_norm(self.w, 2)
        slope = 0.4 * (1 - (x @ w).tanh() ** 2)
        return x + self.g(x), torch.linalg.slogdet(torch.eye(3) + slope[:, :, None] * w.T)[1]

    def inverse(self, z):
        x = z
        for _ in range(20):
            x = z - self.g(x)
        return x


@flow()
def fixed_point_iterations():
    return {"forward": Contraction(), "example": vectors(3)}


@flow()
def rotation_stored_in_float32():
    return {"forward": Rotation(), "example": vectors(6)}


@flow()
def computed_in_float32():
    return {
        "forward": lambda x: (x.float().sinh().double(), x.float().cosh().log().sum(1).double()),
        "inverse": lambda z: z.float().asinh().double(),
        "example": vectors(),
    }


# --- noise inside -------------------------------------------------------------------------------


class Dequantize(nn.Module):
    """Integers to reals, by noise and a logit; flooring on the way back."""

    def __init__(self, wrong=""):
        super().__init__()
        self.logit, self.wrong = Logit(1e-5, wrong != "alpha"), wrong

    def forward(self, x):
        z, ldj = self.logit((x + torch.rand_like(x)) / 256)
        return z, ldj - (0 if self.wrong == "bins" else x[0].numel() * math.log(256))

    def inverse(self, z):
        return (256 * self.logit.inverse(z)).floor().clamp(0, 255)


def pixels():
    return torch.randint(0, 256, (8, 3, 4, 4)).float()


@flow("warning", "stochastic")
def dequantization_with_a_logit():
    return {"forward": Dequantize(), "example": pixels()}


@flow("warning", "stochastic")
def dequantization_of_other_data():
    return {"forward": Dequantize(), "example": 255 * torch.rand(8, 3, 4, 4)}


@flow("warning", "stochastic")
def dequantization_without_an_inverse():
    return {"forward": Dequantize().forward, "inverse": None, "example": pixels()}


@flow("warning", "stochastic", "inverse_mismatch")
def dequantization_that_forgets_a_small_alpha():
    return {"forward": Dequantize("alpha"), "example": pixels()}


@flow("bug", "stochastic", "logdet_mismatch")
def dequantization_without_the_bins():
    return {"forward": Dequantize("bins"), "example": pixels()}


@flow("incomplete")
def noise_on_integers():  # no inverse shows whether it is a dequantization
    return {
        "forward": lambda x: (x + 0.1 * torch.randn_like(x), torch.zeros(len(x))),
        "example": torch.randint(0, 8, (8, 4)).float(),
    }


# --- constraints of planar flows ----------------------------------------------------------------


class Constrained(Planar):
    """A planar flow whose u is moved along w by a factor over |w|^power."""

    def __init__(self, power, small=False):
        super().__init__(2)
        self.power = power
        if small:
            self.w.data, self.u.data = self.w.data.tanh() / 2, self.u.data.tanh() / 2

    def forward(self, x):
        w, wu = self.w, self.w.dot(self.u)
        u = self.u + (F.softplus(wu) - 1 - wu) * w / w.norm() ** self.power
        h = torch.tanh(x @ w + self.b)
        return x + torch.outer(h, u), (1 + (1 - h**2) * w.dot(u)).abs().log()


class OnlyIf(Constrained):
    def forward(self, x):
        if self.w.dot(self.u) >= -1:
            return Planar.forward(self, x)
        return super().forward(x)


for power, verdict, codes in ((2, "correct", ()), (1, "bug", ("not_injective",))):
    for kind in (Constrained, OnlyIf):
        FLOWS[f"planar_{kind.__name__.lower()}_{power}"] = Case(
            lambda kind=kind, power=power: {"forward": kind(power, True), "example": vectors(2)},
            verdict,
            codes,
        )


@flow()
def leaky_relu_of_a_learned_slope():
    p = nn.ParameterList([nn.Parameter(torch.randn(3))])

    def forward(x):
        slope = torch.where(x < 0, F.softplus(p[0]), 1.0)
        return x * slope, slope.log().sum(1)

    return {"forward": forward, "state": p, "example": vectors(3)}


@flow("bug", "not_injective")
def leaky_relu_of_any_slope():
    p = nn.ParameterList([nn.Parameter(torch.full((3,), 0.25))])

    def forward(x):
        slope = torch.where(x < 0, p[0], 1.0)
        return x * slope, slope.abs().log().sum(1)

    return {"forward": forward, "state": p, "example": vectors(3)}


class Cosine(nn.Module):
    """A bijection of (0, pi) only."""

    def forward(self, x):
        return x.cos(), x.sin().log().sum(1)

    def inverse(self, z):
        return z.acos()


@flow()
def cosine_on_its_domain():
    return {"forward": Cosine(), "example": 0.1 + 2.9 * torch.rand(16, 3)}


class Orthogonal(nn.Module):
    """A matrix that a hook keeps orthogonal after each gradient step."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])
        self.register_full_backward_hook(self.project)

    @staticmethod
    def project(module, *_):
        with torch.no_grad():
            u, _, vh = torch.linalg.svd(module.w)
            module.w.copy_(u @ vh)

    def forward(self, x):
        return x @ self.w, torch.zeros(len(x))

    def inverse(self, z):
        return z @ self.w.T


@flow()
def orthogonal_by_a_hook():
    return {"forward": Orthogonal(), "example": vectors()}


@flow()
def radial():
    p = nn.ParameterList([nn.Parameter(torch.randn(n)) for n in (3, 1, 1)])

    def forward(x):
        alpha = F.softplus(p[1])
        beta = F.softplus(p[2]) - alpha
        d = x - p[0]
        r = d.norm(dim=1, keepdim=True)
        h = 1 / (alpha + r)
        slope = 2 * (1 + beta * h).log() + (1 + beta * h - beta * r * h**2).log()
        return x + beta * h * d, slope[:, 0]

    return {"forward": forward, "state": p, "example": vectors(3)}


# --- the input is changed -----------------------------------------------------------------------


@flow("warning", "inplace")
def forward_changes_x():
    def forward(x):
        x *= 2
        return x + 1, torch.full((len(x),), 4 * math.log(2))

    return {"forward": forward, "inverse": lambda z: (z - 1) / 2, "example": vectors()}


@flow("warning", "inplace")
def inverse_changes_z():
    return {
        "forward": lambda x: (2 * x, torch.full((len(x),), 4 * math.log(2))),
        "inverse": lambda z: z.div_(2),
        "example": vectors(),
    }


@flow()
def changes_what_it_made():
    def forward(x):
        z = x.clone()
        z[:, 1:] *= 2
        return z, torch.full((len(x),), 3 * math.log(2))

    def inverse(z):
        x = z.clone()
        x[:, 1:] /= 2
        return x

    return {"forward": forward, "inverse": inverse, "example": vectors()}


@flow("incomplete")
def no_log_determinant():
    return {"forward": lambda x: 2 * x, "inverse": lambda z: z / 2, "example": vectors()}


# --- reports in public that were wrong: all of these are right ----------------------------------


@flow()
def real_nvp_checkerboard_scale():
    """Chrischute/real-nvp, issue 15: s is rescaled and masked; its sum is the log-determinant."""
    net, rescale = conv(3, 6), nn.Parameter(torch.ones(3, 1, 1))
    board = nn.ParameterDict({"rescale": rescale})
    state = nn.ModuleList([net, board])
    mask = (torch.arange(4)[:, None] + torch.arange(4)[None]) % 2

    def parts(x):
        m = mask.to(x)
        s, t = net(x * m).chunk(2, 1)
        s = board["rescale"] * s.tanh()
        return s * (1 - m), t * (1 - m)

    def forward(x):
        s, t = parts(x)
        return (x + t) * s.exp(), s.flatten(1).sum(1)

    def inverse(z):
        s, t = parts(z)
        return z * (-s).exp() - t

    return {"forward": forward, "inverse": inverse, "state": state, "example": images(3)}


@flow()
def style_gestures_time():
    """StyleGestures, issue 33: the log-determinant of a 1x1 over time has a factor of T."""
    w = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0] + 0.1 * torch.randn(4, 4))
    state = nn.ParameterList([w])

    def forward(x):
        z = F.conv1d(x, state[0][:, :, None])
        return z, (x.shape[2] * torch.linalg.slogdet(state[0])[1]).expand(len(x))

    return {
        "forward": forward,
        "inverse": lambda z: F.conv1d(z, state[0].inverse()[:, :, None]),
        "example": torch.randn(8, 4, 7),
    }


@flow()
def tensorflow_models_masked_log():
    """Tensorflow/models, issue 7465: log-scales are summed over what is moved alone."""
    net = mlp(2, 2)

    def forward(x):
        a, b = x[:, ::2], x[:, 1::2]
        s = net(a).tanh()
        return torch.stack([a, b * s.exp()], 2).flatten(1), s.sum(-1)

    def inverse(z):
        a, b = z[:, ::2], z[:, 1::2]
        return torch.stack([a, b * (-net(a).tanh()).exp()], 2).flatten(1)

    return {"forward": forward, "inverse": inverse, "example": vectors()}


def made(name: str, seed: int) -> dict:
    torch.manual_seed(1000 + seed)
    return FLOWS[name].make()
