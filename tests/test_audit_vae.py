"""The audit of VAEs: verdicts on the corpus, bad input, and no side effects."""

import copy
import random
import time
from collections import Counter, OrderedDict, deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from corpus_vae import AGGREGATES, ENTRIES, D, Net, half, kl_log_var, kl_of, parts, sampler
from musigma.audit import AuditError, audit_aggregate, audit_vae
from musigma.audit.sandbox import Sandbox


def judge(name: str, seed: int) -> None:
    expected = ENTRIES[name]
    torch.manual_seed(seed)
    np.random.seed(seed)
    report = audit_vae(**expected.build())
    told = "\n".join(f"{f.code} ({f.severity}): {f.message} {f.numbers}" for f in report.findings)
    assert set(report.codes) == set(expected.codes), told
    assert report.verdict == expected.verdict, told
    assert report.convention == expected.convention
    assert report.read_as == expected.read_as
    if expected.text:
        assert expected.text in report.details["convention"]["text"]
    if expected.layout:
        assert report.layout == expected.layout
    assert all(f.repair and f.message for f in report.findings)
    report.to_json()


FORMS = {  # of callables; a step has none of them
    "packed_halves", "packed_interleaved_scale_first", "samples_in_training_only", "fixed_batch",
    "float32_by_hand", "per_dimension", "each_example_over_the_batch", "the_same_at_every_call",
    "means_of_everything", "nan_in_the_sampler", "kl_of_the_diagonal_only", "full_covariance",
}  # fmt: skip


def shown_by_steps():
    """Entries beside one with the same verdict, codes, callables and kind of prior.

    They differ in a formula, of which the corpus of steps has an example.
    """
    seen = set()
    for name, entry in ENTRIES.items():
        given = entry.build()
        arguments = set(given) - {"encode", "decode", "recon", "example"}
        kind = entry.verdict, entry.codes, frozenset(arguments), type(given.get("prior"))
        if kind in seen and name not in FORMS:
            yield name
        seen.add(kind)


REPEATED = set(shown_by_steps())


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in REPEATED)) for n in ENTRIES],
)
def test_corpus(name):
    judge(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 20))
@pytest.mark.parametrize("name", ENTRIES)
def test_corpus_at_twenty_seeds(name, seed):
    judge(name, seed)


@pytest.mark.parametrize("name", AGGREGATES)
def test_the_aggregate_posterior(name):
    build, code = AGGREGATES[name]
    for seed in range(5):
        torch.manual_seed(seed)
        report = audit_aggregate(*build())
        assert report.codes == ((code,) if code else ())
    assert "off" in report.checked[0]


def test_the_repair_of_log_std_read_as_log_var():
    (finding,) = audit_vae(sample=sampler(torch.exp), kl=kl_log_var).findings
    assert finding.repair == (
        "the sampler treats the second output as log sigma, the KL as log variance: replace "
        "exp(b) by exp(2 b) and b by 2 b in the KL, or exp(b) by exp(b/2) in the sampler"
    )
    assert finding.numbers["read_as"] == "log_var"


# --- what it leaves behind -----------------------------------------------------------------------


def state(net):
    return {
        "tensors": {k: v.clone() for k, v in net.state_dict().items()},
        "types": {k: (v.dtype, v.data_ptr()) for k, v in net.state_dict().items()},
        "modes": [m.training for m in net.modules()],
        "grads": [p.grad is None for p in net.parameters()],
        "attributes": copy.copy(net.__dict__.get("calls")),
    }


def test_the_model_and_all_random_states_are_restored():
    net = Net().train()
    net.body.append(nn_with_buffers := torch.nn.BatchNorm1d(16))
    net.calls = [0]
    keep = net.sample

    def sample(mean, second):
        net.calls.append(1)
        return keep(mean, second)

    given = parts(net, sample=sample, recon=net.recon)
    given["loss"] = lambda x: net.recon(x, net.decode(sample(*net.encode(x))))
    example = given["example"].clone()
    before = state(net)
    rng = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    audit_vae(**given)
    after = state(net)
    assert before["types"] == after["types"]
    assert before["modes"] == after["modes"]
    assert before["attributes"] == after["attributes"]
    assert all(torch.equal(before["tensors"][k], after["tensors"][k]) for k in before["tensors"])
    assert torch.equal(example, given["example"])
    assert nn_with_buffers.num_batches_tracked == 0
    assert torch.equal(rng[0], torch.get_rng_state())
    assert (rng[1] == np.random.get_state()[1]).all()
    assert rng[2] == random.getstate()
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


class Fixed(dict):
    """A dictionary that refuses to be changed."""

    def clear(self):
        raise TypeError("it is fixed")

    update = clear


@pytest.mark.parametrize("kind", [dict, OrderedDict, Counter])
def test_containers_of_the_model_are_restored(kind):
    net = Net()
    net.memory, net.fixed = kind(a=1), Fixed(a=1)
    with Sandbox(net):
        net.memory["b"] = 2
        net.body.register_forward_hook(lambda *_: None)
    assert net.memory == net.fixed == {"a": 1}
    assert not net.body._forward_hooks


def test_what_a_step_changes_is_restored():
    net = Net()
    net.more, net.optimizer = [torch.nn.Linear(2, 2)], torch.optim.Adam(net.parameters())
    net.recent, net.generator = deque([1], maxlen=3), torch.Generator().manual_seed(3)
    closure = {"calls": [0]}

    def step():
        net.more[0].weight.data += 1
        loss = net.kl(*net.encode(torch.rand(3, 8)))
        net.optimizer.zero_grad()
        loss.backward()
        net.optimizer.step()
        net.recent.append(loss.item())
        torch.rand(3, generator=net.generator)
        closure["calls"].append(1)

    step()
    before = copy.deepcopy((net.optimizer.state_dict(), net.state_dict(), closure))
    weight, drawn = net.more[0].weight.clone(), net.generator.get_state()
    recent = net.recent.copy()
    with Sandbox(step, as_is=True) as sandbox:
        sandbox.call("step", step)
    after = (net.optimizer.state_dict(), net.state_dict(), closure)
    assert str(after) == str(before)
    assert torch.equal(net.more[0].weight, weight)
    assert torch.equal(net.generator.get_state(), drawn)
    assert net.recent == recent


# --- bad input -----------------------------------------------------------------------------------


FLOW = {
    "sample": sampler(half),
    "kl": lambda mean, b, z: kl_log_var(mean, b),
    "flow": lambda z: (z, torch.zeros(len(z))),
}


def broken(*_):
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("name", ["encode", "sample", "kl", "recon", "decode", "generate", "loss"])
def test_a_callable_that_raises_is_named(name):
    net = Net()
    given = parts(net, recon=net.recon, generate=lambda n: torch.randn(n, D), loss=net.recon)
    given["loss"] = lambda x: (
        net.recon(x, net.decode(net.sample(*net.encode(x)))) + net.kl(*net.encode(x))
    )
    given[name] = broken
    if name == "loss":  # nothing else hangs on it
        assert "on purpose" in " ".join(audit_vae(**given).missing)
        return
    with pytest.raises(AuditError, match=rf"{name}: given .*on purpose"):
        audit_vae(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample": lambda m, b: (m + b)[:, 1:]}, r"sample: .*expected z of shape"),
        ({"sample": lambda m, b: None}, r"sample: expected a tensor"),
        ({"sample": sampler(half), "kl": lambda m, b: m @ m.T}, r"kl: .*got shape \(7, 7\)"),
        ({"sample": sampler(half), "kl": lambda m, b: "none"}, r"kl: expected a tensor"),
        ({"sample": 3}, r"sample: expected a callable"),
        ({}, r"expected at least `sample`"),
        ({"sample": sampler(half), "prior": (0.0, -1.0)}, r"prior: expected a positive"),
        ({"sample": sampler(half), "prior": (torch.zeros(5), 1.0)}, r"prior: expected numbers"),
        ({"encode": lambda x: x, "sample": sampler(half)}, r"example: encode needs one"),
        ({"sample": sampler(half), "prior": "normal"}, r"prior: expected \(mean, std\), a dist"),
        ({"sample": sampler(half), "prior": torch.sum}, r"prior: .*one log-density for each"),
        ({**FLOW, "flow": torch.exp}, r"flow: expected \(z_K, log_det\); got Tensor"),
        ({**FLOW, "flow": lambda z: (z, z[:4, 0])}, r"flow: .*log_det \(7,\); got .*\(4,\)"),
        ({**FLOW, "kl": kl_log_var}, r"kl: with `flow`, .* it takes 2 arguments"),
    ],
)
def test_wrong_shapes_and_arguments_are_named(given, message):
    with pytest.raises(AuditError, match=message):
        audit_vae(**given)


def test_a_callable_that_does_not_end_is_named(monkeypatch):
    monkeypatch.setattr("musigma.audit.sandbox.SECONDS", 0.2)

    def sample(mean, second):
        while True:
            time.sleep(0.01)

    with pytest.raises(AuditError, match=r"sample: given .*did not end within"):
        audit_vae(sample=sample, kl=kl_log_var)


def test_unchecked_parts_are_listed():
    report = audit_vae(sample=sampler(half))
    assert report.verdict == "incomplete"
    assert report.missing == ("the KL: there is no `kl`",)
    told = " ".join(report.unchecked)
    assert all(word in told for word in ("`recon`", "`generate`"))
    net = Net()
    heads_only = audit_vae(**parts(net, "encode", "kl"))
    assert heads_only.missing == ("what is sampled: there is no `sample`",)
    packed = audit_vae(
        encode=lambda x: x.repeat(1, 2), sample=sampler(half), example=torch.rand(4, D)
    )
    assert packed.assumed[-1] == "the packed output is split in halves, mean first"
    net = Net()
    odd = audit_vae(**parts(net, recon=net.recon, loss=lambda x: (x**3).sum()))
    assert any(line.startswith("the loss: ") for line in odd.missing)


def test_the_weight_in_the_loss_of_a_beta_vae():
    net = Net()

    def loss(x):
        heads = net.encode(x)
        return net.recon(x, net.decode(net.sample(*heads))) + 4 * net.kl(*heads)

    report = audit_vae(**parts(net, recon=net.recon, loss=loss))
    assert (report.verdict, report.codes) == ("warning", ("reduction_imbalance",))
    assert report.details["beta"] == pytest.approx(4)
    assert "the effective weight beta = 4 " in report.findings[0].message

    def rewarded(x):
        heads = net.encode(x)
        return net.recon(x, net.decode(net.sample(*heads))) - net.kl(*heads)

    wrong = audit_vae(**parts(net, recon=net.recon, loss=rewarded))
    assert wrong.codes == ("kl_negative",)
    assert wrong.verdict == "bug"


def test_two_means_that_the_loss_compensates():
    net = Net()

    def recon(x, x_hat):
        return F.mse_loss(x_hat, x)

    def loss(x):
        heads = net.encode(x)
        return x.numel() * recon(x, net.decode(net.sample(*heads))) + net.kl(*heads)

    assert audit_vae(**parts(net, recon=recon)).codes == ("reduction_imbalance",)
    assert audit_vae(**parts(net, recon=recon, loss=loss)).verdict == "correct"


def test_a_sigma_without_a_name_and_a_kl_of_softplus():
    kl = kl_of(F.softplus, (0.5, 2.0))
    report = audit_vae(sample=sampler(lambda b: b.sin() + 2), kl=kl, prior=(0.5, 2.0))
    assert report.details["convention"]["name"] == "unnamed"
    assert report.codes == ("kl_mismatch", "sigma_range_restricted")
