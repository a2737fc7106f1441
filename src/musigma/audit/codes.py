"""The table of findings: for each code its title, and its messages with their repairs.

``docs/findings`` has a page for every code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["CODES", "Code", "Message", "check_codes"]


class Message(NamedTuple):
    """What is wrong and what to do, as templates of `str.format` over a finding's numbers."""

    text: str
    repair: str


@dataclass(frozen=True)
class Code:
    """One kind of finding.

    Args:
        title: What it means, as in the index of ``docs/findings``.
        variants: Its messages by name; "" is the usual one.
    """

    title: str
    variants: Mapping[str, Message] = field(default_factory=dict)


_LOG_DET = "{what} returns {stated[0]:.6g} nats, and log |det J| is {log_det[0]:.6g} {when}"
_PER_EXAMPLE = "return (B,), by a sum over all axes but the first: log_det.flatten(1).sum(1)"

CODES: dict[str, Code] = {
    # what is sampled
    "sample_mean": Code("the mean of z is not the encoder's mean"),
    "sample_scale": Code(
        "the standard deviation of z is not a known function of the second output"
    ),
    "noise_not_gaussian": Code(
        "the injected noise is not standard normal",
        {
            "step": Message(
                "the noise of z is uniform, and its KL is that of a Gaussian",
                "draw the noise with torch.randn_like",
            ),
        },
    ),
    "noise_shared": Code(
        "dimensions, examples or calls share one draw of noise",
        {
            "step": Message(
                "noise of shape {noise} is used for z of shape {shape}: entries of z share it",
                "draw noise of the shape of z: torch.randn_like(mean)",
            ),
        },
    ),
    "heads_tied": Code(
        "mean and scale come from the same numbers",
        {
            "step": Message(
                "mean and sigma of z are computed from the same numbers",
                "give each head a layer of its own, or one half of a layer's output",
            ),
        },
    ),
    "sigma_range_restricted": Code("standard deviations below 0.9 cannot be reached"),
    "no_gradient": Code(
        "the loss depends on the posterior, but sends it no gradient",
        {
            "kl": Message(
                "the KL depends on the posterior, but sends it no gradient: it is computed under "
                "no_grad() or from detached tensors",
                "compute the KL from the encoder's outputs themselves",
            ),
            "": Message(
                "the loss depends on the {head} of z, but its gradient does not reach it",
                "draw with rsample(), or as mean + std * torch.randn_like(std); between the "
                "encoder and z, remove sample(), torch.normal(), detach() and no_grad()",
            ),
        },
    ),
    "inplace": Code(
        "a callable changes its arguments in place",
        {
            "": Message(
                "{name} changes its argument {argument} in place",
                "compute a new tensor, as in mean + std * eps: no add_(), no += and no out=",
            ),
            "flow": Message(
                "{name} changes its argument {argument} in place",
                "compute a new tensor: no add_(), no +=, no x[:, i] = ..., and no inplace=True on "
                "a view of {argument}",
            ),
        },
    ),
    # the KL
    "kl_mismatch": Code(
        "the KL is not the KL of what is sampled",
        {
            "step reading": Message(
                "z is drawn with the second output as {sampled}, and the KL reads it as {read}",
                "use the same reading in both: one function that makes the standard deviation "
                "from the output",
            ),
            "step coefficients": Message(
                "the divergence in the loss is {a:.4g} mean^2/2 + {c:.4g} sigma^2/2 + {d:.4g} "
                "log sigma, of the sigma that z is drawn with; a KL has the coefficients w, w, -w",
                "write 0.5 * (mean^2 + sigma^2 - log sigma^2 - 1), with the sigma that z is "
                "drawn with, times one weight",
            ),
            "step factor": Message(
                "the divergence in the loss is the KL to N(0, {std:.4g}^2), a prior of variance "
                "{variance:.4g}: one of its terms has a factor 2 or 1/2 too many",
                "write 0.5 * (mean^2 + sigma^2 - log sigma^2 - 1), with the factor before the "
                "bracket",
            ),
            "step": Message(
                "the term of the loss that depends on mean and sigma of z is no KL divergence of "
                "what is sampled: its gradients differ by {residual:.2g} of the largest",
                "write 0.5 * (mean^2 + sigma^2 - log sigma^2 - 1), with the sigma that z is "
                "drawn with; or use torch.distributions.kl_divergence",
            ),
        },
    ),
    "kl_offset": Code("the KL is right up to an additive constant"),
    "kl_scale": Code("the KL is right up to a constant factor"),
    "kl_negative": Code(
        "the KL is below zero",
        {
            "step": Message(
                "the loss contains the KL with the weight {weight:.4g}: training draws the "
                "posterior away from the prior",
                "add the KL to the negative log-likelihood: loss = reconstruction + kl",
            ),
        },
    ),
    "kl_min_off_prior": Code("the KL is smallest where the posterior is not the prior"),
    "kl_constant": Code(
        "the KL is a constant, whatever the posterior is",
        {
            "step": Message(
                "a term of the loss is computed from the posterior, but is constant whatever the "
                "posterior is, so nothing draws the posterior to the prior",
                "remove the clamp of the KL, or give it bounds that the KL can be between",
            ),
            "": Message(
                "the KL is {value:.5g} whatever the posterior is, so nothing draws the posterior "
                "to the prior",
                "remove the clamp of the KL, or give it bounds that the KL can be between",
            ),
        },
    ),
    "kl_capacity": Code(
        "the loss draws the KL to a target above zero",
        {
            "step": Message(
                "the loss contains |KL - C|: it is smallest where the KL is C, not where it is "
                "zero",
                "if the capacity C is intended, report the bound with the KL itself",
            ),
            "function": Message(
                "the loss contains a function of the KL that is not a multiple of it",
                "if it is intended, report the bound with the KL itself",
            ),
            "": Message(
                "the loss contains |KL - {capacity:.5g}|: it is smallest where the KL is "
                "{capacity:.5g}, not where it is zero",
                "if the capacity is intended, report the bound with the KL itself",
            ),
        },
    ),
    "free_bits": Code(
        "the KL is raised to a least value where it is smaller",
        {
            "step": Message(
                "the KL counts only where it is above a least value (free bits)",
                "if the free bits are intended, report the bound with the KL itself",
            ),
            "": Message(
                "the KL is raised to {held_at:.5g} where it is smaller (free bits), and right "
                "where it is larger",
                "if the free bits are intended, report the bound with the KL itself",
            ),
        },
    ),
    "prior_mismatch": Code("generation and KL use different priors"),
    "reduction_imbalance": Code(
        "the weight of the KL depends on batch, latent or data size",
        {
            "step": Message(
                "the KL has the effective weight beta = {beta:.4g}{explained} beside {against}",
                "if this beta is not intended, sum both over the numbers of one example, and "
                "average both over the batch",
            ),
            "muted": Message(
                "the KL is multiplied with 0 in this step, so nothing draws the posterior to the "
                "prior",
                "if the weight is raised during training (annealing), audit a later step as well",
            ),
            "batch": Message(
                "the effective weight of the KL is beta = {beta:.4g} with {n} examples and "
                "{half:.4g} with {m}: it depends on the batch size",
                "reduce the KL and the reconstruction over the batch in the same way",
            ),
        },
    ),
    # bijections
    "inverse_mismatch": Code(
        "the inverse does not recover the input of forward",
        {
            "": Message(
                "inverse(forward(x)) differs from x by {error:.3g} {when}",
                "invert forward's operations in reverse order, with the same constants",
            ),
            "layer": Message(
                "inverse(forward(x)) differs from x by {error:.3g} {when}; {layer} does not "
                "invert itself",
                "invert that layer's operations in reverse order, with the same constants",
            ),
            "small": Message(
                "inverse(forward(x)) differs from x by {error:.2g} {when}, more than rounding "
                "explains, and the inverse does not iterate",
                "one direction adds, clamps or scales by a small constant (an eps, an alpha) that "
                "the other does not undo",
            ),
            "iteration": Message(
                "inverse(forward(x)) differs from x by {error:.2g} {when}: the inverse iterates, "
                "and stops early",
                "take more steps, or a smaller tolerance",
            ),
            "split": Message(
                "inverse(forward(x)) differs from x by {error:.3g} {when}",
                "return what is split off, and take it back: drawing it again is sampling",
            ),
            "shape": Message("{reason}", "return x, in the shape that it had"),
            "grid": Message(
                "the inverse removes the noise of forward, but returns another value than x in "
                "{share:.2%} of the elements",
                "one direction adds, clamps or scales by a constant (an alpha) that the other "
                "does not undo",
            ),
        },
    ),
    "inverse_raises": Code(
        "the inverse raises an error",
        {
            "": Message(
                "{reason}",
                "the inverse must accept the output of forward, in any state, on every call",
            ),
        },
    ),
    "stochastic": Code(
        "two calls on the same input differ",
        {
            "bijection": Message(
                "two calls on the same input differ by {difference:.2g}",
                "a bijection draws nothing: move the noise out of it, or count its log-density",
            ),
            "training": Message(
                "in training mode, the present mode of the flow, two calls on one input differ by "
                "{difference:.2g}; in evaluation mode they do not",
                "call .eval() before likelihoods are compared; without dropout in the networks of "
                "a flow, its training density is that of evaluation too",
            ),
            "dequantization": Message(
                "two calls on the same input differ by {difference:.2g}, and x can be recovered "
                "from each: dequantization, or another surjection, which draws by design",
                "log p(x) >= log p(z) + log_det - log q(noise | x): report it as a bound",
            ),
            "log_prob": Message(
                "log_prob of the same points is {value:.6g} in one call and {again:.6g} in the "
                "next, so figures differ from run to run",
                "use no random numbers in log_prob, or report the mean of many calls",
            ),
            "estimate": Message(
                "the log-determinant is an estimate with a standard deviation of {std:.2g} nats",
                "average several draws when likelihoods are reported",
            ),
        },
    ),
    "stale_inverse": Code(
        "the inverse uses old parameters after an update",
        {
            "": Message(
                "after an update of the parameters the inverse is off by {error:.3g}: it was "
                "computed before the update and cached",
                "compute the inverse from the parameters on each call, or drop the cache when "
                "they change (compare their ._version)",
            ),
        },
    ),
    "logdet_mismatch": Code(
        "the log-determinant is not log |det J|",
        {
            "": Message(
                _LOG_DET,
                "sum the logarithms of the absolute slopes of this forward over all elements",
            ),
            "sign": Message(f"{_LOG_DET}: it has the wrong sign", "negate it"),
            "batch": Message(
                f"{_LOG_DET}: it is summed over the batch", "sum over all axes but the first"
            ),
            "zero": Message(
                f"{_LOG_DET}: it is always zero",
                "add the logarithms of the slopes of what forward does",
            ),
            "missing factor": Message(
                f"{_LOG_DET}: a factor of {{factor:g}} ({{meaning}}) is missing",
                "multiply it by {factor:g}",
            ),
            "extra factor": Message(
                f"{_LOG_DET}: a factor of {{factor:g}} ({{meaning}}) is too much",
                "divide it by {factor:g}",
            ),
            "accumulated": Message(
                "forward does not add its log-determinant to the one that it is given as "
                "{argument}",
                "return {argument} + log_det, both of shape (B,)",
            ),
            "layers": Message(
                "the whole flow returns {stated[0]:.6g} nats, and its layers together "
                "{log_det[0]:.6g}",
                "add up the log-determinants of all layers, each once",
            ),
            "estimate": Message(
                "the estimate is {stated[0]:.4g} nats on average, and log |det J| is "
                "{log_det[0]:.4g}",
                "the estimator is biased: use more terms, or an unbiased number of them",
            ),
        },
    ),
    "logdet_shape": Code(
        "the log-determinant is not one number per example",
        {
            "elements": Message(
                "the log-determinant has several numbers for each example; their sum is right",
                _PER_EXAMPLE,
            ),
            "column": Message(
                "the log-determinant has the shape (B, 1), which is right only where all that it "
                "is added to has it too: with (B,) it makes (B, B)",
                _PER_EXAMPLE,
            ),
            "number": Message(
                "the log-determinant is one number for the whole batch; it is right for each "
                "example",
                "expand it to one number per example: log_det.expand(len(x))",
            ),
            "outer": Message(
                "the log-determinant has the shape (B, B): (B,) and (B, 1) were added",
                _PER_EXAMPLE,
            ),
            "reduced": Message(
                "the log-determinant is one number: the {reduction} over the batch", _PER_EXAMPLE
            ),
            "other": Message(
                "the log-determinant has a shape that does not fit the batch",
                "return one number per example, shape (B,)",
            ),
        },
    ),
    "logdet_nan": Code(
        "the log-determinant is not a number where the layer is invertible",
        {
            "": Message(
                "the log-determinant is NaN or infinite {when}, where z is finite",
                "take log |det|: torch.linalg.slogdet(W)[1], and abs() before log",
            ),
            "negative": Message(
                "the log-determinant is NaN or infinite where a matrix is invertible and has a "
                "negative determinant",
                "take log |det W|: torch.linalg.slogdet(W)[1], not logdet(W) or log(det(W))",
            ),
        },
    ),
    "inverse_logdet_sign": Code(
        "the inverse returns the log-determinant with the wrong sign",
        {
            "": Message(
                "the inverse returns the log-determinant of forward, with the same sign",
                "return the negative: log |det dx/dz| = -log |det dz/dx|",
            ),
        },
    ),
    "inverse_logdet_mismatch": Code(
        "the inverse's log-determinant is wrong",
        {
            "": Message(
                "the log-determinants of both directions add up to {difference:.3g}, not zero",
                "return the negative of what forward returns at the same x",
            ),
        },
    ),
    "cross_sample": Code(
        "an example's output depends on the others in its batch",
        {
            "bijection": Message(
                "an example's z changes by {difference:.2g} when the others of its batch are "
                "replaced",
                "compute statistics over the axes of one example, or use stored ones",
            ),
            "log_prob": Message(
                "log_prob of one point is {alone:.6g} by itself, {batch:.6g} in a batch of {n} "
                "points, and {among:.6g} among other points: there is no density of one point",
                "use no statistics of the batch, and sum over the dimensions of a point only",
            ),
            "term": Message(
                "log_prob of one point is {alone:.6g} by itself and {batch:.6g} in a batch of {n} "
                "points: all points share a term that is summed or averaged over the batch",
                "sum over the dimensions of a point only: a log-determinant is one number per "
                "point, (B,); of a torch Transform that returns (B,), domain and codomain are "
                "constraints.independent(constraints.real, 1)",
            ),
            "training": Message(
                "in training mode, the present mode of the flow, an example's z changes by "
                "{difference:.2g} with the other examples of its batch; in evaluation mode it "
                "does not",
                "batch statistics couple examples, so log p(x) in training mode is not a density; "
                "evaluate with .eval(), or use activation normalization",
            ),
        },
    ),
    "not_injective": Code(
        "the determinant changes sign, so this is not a bijection",
        {
            "": Message(
                "det J is positive at {positive} points and negative at {negative}{parameters}",
                "constrain the parameters so that f stays monotone (planar flow: w'u >= -1, by "
                "u + (softplus(w'u) - 1 - w'u) w / |w|^2)",
            ),
        },
    ),
    "ddi_wrong": Code(
        "data-dependent initialization does not standardize its output",
        {
            "": Message(
                "after its first batch, {layer} has channel means up to {mean:.3g} from zero and "
                "standard deviations from {least:.3g} to {largest:.3g}",
                "set the shift to -mean and the scale to 1 / std of the batch, over all axes but "
                "the channels, in the order in which forward applies them",
            ),
        },
    ),
    "ddi_reinit": Code(
        "a reloaded layer initializes itself again",
        {
            "": Message(
                "saved after its first batch and loaded again, it initializes itself again: the "
                "same input gives another z, by {difference:.2g}",
                "make the flag a buffer: self.register_buffer('initialized', torch.tensor(False))",
            ),
        },
    ),
    # densities and figures
    "log_prob_shape": Code(
        "log_prob does not return one number per point",
        {
            "": Message(
                "log_prob of {n} points has the shape {shape}, not ({n},): which number belongs "
                "to which point is open",
                "sum over the dimensions of a point, and over nothing else",
            ),
            "column": Message(
                "log_prob of {n} points has the shape ({n}, 1): added to a log-determinant of "
                "shape ({n},), it becomes ({n}, {n})",
                "return ({n},): sum without keepdim, or squeeze(1)",
            ),
            "each_dimension": Message(
                "log_prob of {n} points has the shape {shape}, one number per dimension: its mean "
                "is {dim} times too small, and added to a log-determinant ({n}, 1) it counts that "
                "{dim} times",
                "sum over the dimensions: log_prob(x).sum(1), or torch.distributions.Independent",
            ),
            "pairs": Message(
                "log_prob of {n} points has the shape {shape}: terms of shape ({n}, 1) and ({n},) "
                "were added, so each point gets the terms of all",
                "give all terms the shape ({n},): sum without keepdim",
            ),
            "total": Message(
                "log_prob of {n} points is one number, their {how}: points cannot be told apart, "
                "and a term ({n},) that is added to it gets the {how} of all points",
                "sum over the dimensions of a point, and average over points in the loss",
            ),
            "other_total": Message(
                "log_prob of {n} points is one number, {total:.6g}, which is neither the sum nor "
                "the mean of their own",
                "sum over the dimensions of a point, and average over points in the loss",
            ),
            "raises": Message(
                "log_prob takes one point and raises for {n} of them: {error}",
                "sum every term over the dimensions of a point, so that all have the shape (B,)",
            ),
        },
    ),
    "not_normalised": Code(
        "the density does not integrate to one",
        {
            "": Message(
                "it integrates to {integral:.5g} ± {error:.1g}, by {how}, not to one{factor}",
                "add the missing logarithm: the normalizing constant, or a log |det|",
            ),
        },
    ),
    "bpd_below_entropy": Code("the reported bits are below the entropy of the data"),
    "bpd_wrong": Code("the bits per dimension of the uniform model are wrong"),
    "bpd_batch": Code("bits per dimension depend on the batch size"),
    "iw_gradient": Code("the gradient is not that of the importance-weighted bound"),
    "iw_value": Code("the value is not that of the importance-weighted bound"),
    "prior_term_mismatch": Code("the term is not a multiple of a Gaussian's log-density"),
    "prior_term_sign": Code("the term rewards distance from the mean"),
    "aggregate_cov": Code("the claimed covariance is not that of the draws"),
    # after training
    "posterior_collapse": Code("a latent carries no information"),
    "dead_units": Code("some units of a latent carry no information"),
    "saturated_units": Code("scales are at the limit of their format"),
    "aggregate_prior": Code("the aggregate posterior is not the prior"),
    "ill_conditioned": Code(
        "inverting a layer loses digits",
        {
            "round_trip": Message(
                "a round trip is off by {error:.2g} in float32, and right in float64; the largest "
                "condition number is {condition:.2g}, of {layer}",
                "decode in float64, or bound the scales and the matrices' singular values",
            ),
        },
    ),
    "miscalibrated": Code("whitened latents of the data are not standard normal"),
    "dequantisation": Code("dequantization and scaling are accounted for incorrectly"),
    # what could not be checked
    "not_finite": Code(
        "a callable returns NaN or infinity",
        {
            "step": Message(
                "the loss is not a finite number; the first such value is made in {line}",
                "find out which argument of that operation is out of its range",
            ),
            "density": Message(
                "log_prob is NaN at points between others that have mass",
                "keep arguments of logarithms above zero, and those of inverses in their range",
            ),
            "latents": Message(
                "{share:.0%} of the numbers of z are NaN or infinite at the example",
                "find the first layer whose output is not finite, at an input of this range",
            ),
        },
    ),
    "host_random": Code(
        "random numbers come from outside of torch",
        {
            "": Message(
                "two runs with the same seed of torch differ: random numbers come from {source}",
                "draw with torch: torch.randn_like, torch.rand, torch.randint",
            ),
        },
    ),
}


def check_codes(allow: Iterable[str]) -> None:
    """Refuse a name that is neither a code nor "incomplete".

    Raises:
        ValueError: If there is one.

    Example:
        >>> check_codes(["kl_scale", "incomplete"])
    """
    if unknown := [code for code in allow if code not in CODES and code != "incomplete"]:
        raise ValueError(
            f"allow: unknown code {', '.join(map(repr, unknown))}; the codes are incomplete, "
            f"{', '.join(CODES)}"
        )
