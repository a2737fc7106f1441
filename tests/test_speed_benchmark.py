"""The speed benchmark's bookkeeping, and its exact counts. Times are not tested."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.speed import __main__ as command
from benchmarks.speed import glows, harness, tabular, vaes
from benchmarks.speed import run as library
from benchmarks.speed.counts import counts, flops, kernels, mixed_layouts
from benchmarks.speed.harness import (
    Contender,
    Subject,
    Timing,
    Unavailable,
    Workload,
    interleave,
    ratio,
    time_slice,
)
from benchmarks.speed.machine import describe, peak_kernels, settings
from benchmarks.speed.ours import trainable
from benchmarks.speed.package import kept_bytes
from benchmarks.speed.run import Plan, against, run
from benchmarks.speed.runners import Conditions, InProcess, Subprocess
from benchmarks.speed.tables import BEGIN, END, line, markdown, place
from benchmarks.speed.workloads import WORKLOADS, select
from musigma import objectives
from musigma.distributions.levels import LogisticRead

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SHORT = Plan(seconds=1e-3, rounds=2, threads=1, memory=False, keep_heap=False)


class Clock:
    """Time that passes only while a call works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        def call():
            self.now += seconds

        return call


# --- turns, with a simulated clock -------------------------------------------------------------


@pytest.mark.parametrize(("each", "seconds", "n"), [(1.0, 3.5, 4), (0.5, 2.0, 4), (9.0, 1.0, 1)])
def test_a_slice_repeats_the_call_until_time_is_up_and_at_least_once(each, seconds, n):
    clock = Clock()
    assert time_slice(clock.work(each), seconds, clock) == [each] * n


def turns(seconds_per_call: dict[str, float], clock: Clock, **options):
    slices = {
        name: lambda seconds, each=each: time_slice(clock.work(each), seconds, clock)
        for name, each in seconds_per_call.items()
    }
    return interleave(slices, clock=clock, **options)


def test_every_contender_has_a_slice_in_every_round_in_random_order():
    clock, heard = Clock(), []
    names = {name: 0.25 for name in "abcd"}
    *_, timings = turns(names, clock, rounds=6, seconds=6.0, before_turn=heard.append)
    assert {name: [len(r) for r in t.rounds] for name, t in timings.items()} == dict.fromkeys(
        "abcd", [4] * 6
    )
    orders = [tuple(t.name for t in heard[4 * i : 4 * i + 4]) for i in range(6)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 1
    assert orders[1::2] == [order[::-1] for order in orders[::2]]  # no place in a round is favored
    assert [t.round for t in heard[::4]] == list(range(6))
    again: list = []
    list(turns(names, Clock(), rounds=6, seconds=6.0, before_turn=again.append))
    assert [t.name for t in again] == [t.name for t in heard]  # the order depends on the seed


def test_slow_calls_end_the_rounds_after_two():
    rounds = list(turns({"a": 100.0, "b": 1.0}, Clock(), rounds=9, seconds=9.0))
    assert len(rounds) == 2


def test_a_contender_that_fails_is_left_out_and_the_others_continue():
    clock, failures = Clock(), []

    def fails(seconds: float) -> list[float]:
        if clock.now > 1:
            raise RuntimeError("no more")
        return [0.5]

    slices = {"good": lambda s: time_slice(clock.work(1.0), s, clock), "bad": fails}
    *_, timings = interleave(
        slices,
        rounds=4,
        seconds=8.0,
        clock=clock,
        on_failure=lambda name, error: failures.append((name, str(error))),
    )
    assert failures == [("bad", "no more")]
    assert list(timings) == ["good"]
    assert len(timings["good"].rounds) == 4


times = st.lists(
    st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30), min_size=1, max_size=8
).map(Timing)


@given(times, st.floats(1e-3, 1e3))
def test_a_ratio_to_itself_is_one_and_ratios_scale(timing, factor):
    assert ratio(timing, timing) == (1, 1, 1, 1)
    longer = Timing([[factor * s for s in r] for r in timing.rounds])
    assert ratio(longer, timing) == pytest.approx((factor,) * 4)


@given(times, times)
def test_quartiles_are_ordered_and_the_inverse_ratio_is_the_reciprocal(a, b):
    there, back = ratio(a, b), ratio(b, a)
    assert there.low <= there.median <= there.high
    if min(len(a.rounds), len(b.rounds)) % 2:  # otherwise the median is a mean of two
        assert there.median == pytest.approx(1 / back.median)


def test_ratios_within_rounds_are_independent_of_drift():
    drift = np.array([1.0, 3.0, 2.0, 0.5, 7.0])
    fast, slow = (Timing([[k * d] * 3 for d in drift]) for k in (1.0, 2.0))
    assert ratio(slow, fast)[:3] == (2, 2, 2)


def test_the_best_decile_is_the_tenth_of_a_hundred():
    shuffled = np.random.default_rng(0).permutation(100).astype(float)
    assert harness.best_decile(list(shuffled)) == 10


# --- a whole run, of a tiny workload -----------------------------------------------------------


def tiny(bias: bool = True, note: str = "") -> Subject:
    net, x = nn.Linear(3, 2, bias=bias), torch.randn(5, 3)

    def loss():
        return net(x).square().sum()

    return Subject(
        {"step": lambda: loss().backward(), "sample": lambda: net(x)},
        model=net,
        loss=loss,
        parameters=trainable(net.parameters()),
        note=note,
    )


def breaks() -> Subject:
    raise ZeroDivisionError("in setup")


def unavailable() -> Subject:
    raise Unavailable("it is elsewhere")


def breaks_later(after: int = 6) -> Subject:
    left = iter(range(after))
    subject = tiny()
    step = subject.calls["step"]
    subject.calls = {"step": lambda: (next(left), step())}
    return subject


TINY = Workload(
    "tiny",
    "a tiny layer",
    5,
    ("step", "sample"),
    (
        Contender("musigma", tiny, "ours"),
        Contender("musigma, other", tiny, "variant"),
        Contender("musigma@abc", tiny, "baseline"),
        Contender("peer", partial(tiny, note="a peer"), needs=("torch",)),
        Contender("narrow", partial(tiny, bias=False)),
        Contender("not installed", tiny, needs=("no-such-distribution",)),
        Contender("elsewhere", unavailable),
        Contender("broken", breaks),
        Contender("breaks later", breaks_later),
        Contender("musigma, fast", tiny, "fast"),
    ),
    parameters=8,
)


@pytest.fixture(scope="module")
def result():
    *_, result = run([TINY], SHORT)
    return json.loads(json.dumps(result))


def test_contenders_that_cannot_run_are_listed_with_the_reason(result):
    record = result["workloads"]["tiny"]
    reasons = record["skipped"]
    assert set(reasons) == {"narrow", "not installed", "elsewhere", "broken", "breaks later"}
    assert reasons["not installed"] == "no-such-distribution is not installed"
    assert reasons["elsewhere"] == "it is elsewhere"
    assert reasons["narrow"] == "ValueError: the model has 6 parameters; expected 8"
    assert reasons["broken"] == "ZeroDivisionError: in setup"
    assert set(record["contenders"]) == {"musigma", "musigma, other", "musigma@abc", "peer"}


def test_a_result_records_times_counts_ratios_and_conditions(result):
    record = result["workloads"]["tiny"]
    assert set(record) >= {"about", "batch", "machine", "settings", "plan", "seconds"}
    assert record["settings"]["threads"] == 1
    assert record["settings"]["heap_kept"] is False
    assert record["machine"]["torch"] == torch.__version__
    assert record["contenders"]["peer"]["versions"] == {"torch": torch.__version__}
    for operation in ("step", "sample"):
        summary = record["operations"][operation]
        assert set(summary["times"]) == set(record["contenders"])
        assert summary["best_peer"] == "peer"
        assert set(summary["faster"]) == {"musigma"}
        assert summary["against"]["musigma"]["name"] == "musigma@abc"
        for row in summary["times"].values():
            assert 0 < row["best_ms"] <= row["median_ms"]
            assert row["n"] >= len(row["rounds_ms"])
            assert set(row["ratio"]) == {"median", "low", "high", "best"}
        assert summary["times"]["musigma"]["ratio"]["median"] == 1
    step = record["operations"]["step"]["times"]["peer"]
    assert step["flops"] == 2 * 2 * (5 * 3 * 2)  # forward, and the gradient of the weight
    assert step["saved_bytes"] == 4 * (5 * 3 + 5 * 2)  # x, and the squared output
    assert "saved_bytes" not in record["operations"]["sample"]["times"]["peer"]


def test_the_plan_selects_peers_and_operations():
    *_, result = run([TINY], replace(SHORT, operations=("sample",), peers=()))
    record = result["workloads"]["tiny"]
    assert set(record["contenders"]) == {"musigma", "musigma, other", "musigma@abc"}
    assert list(record["operations"]) == ["sample"]
    assert "best_peer" not in record["operations"]["sample"]


def test_a_run_that_is_stopped_early_has_the_results_so_far():
    rounds = run([TINY], SHORT)
    result = next(rounds)
    rounds.close()
    assert "musigma" in result["workloads"]["tiny"]["operations"]["step"]["times"]
    assert "step" in markdown(result)


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with settings(threads=before + 1, keep_heap=False) as applied:
        assert applied["threads"] == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("option", [{"seconds": 0.0}, {"rounds": 0}, {"threads": 0}])
def test_plans_that_measure_nothing_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Plan(**option)


# --- Markdown ----------------------------------------------------------------------------------


def test_the_tables_show_ratios_commits_notes_and_reasons(result):
    text = markdown(result)
    step = result["workloads"]["tiny"]["operations"]["step"]
    for ratio_ in (step["faster"]["musigma"], step["against"]["musigma"]):
        assert f"{ratio_['median']:.2f}x ({ratio_['low']:.2f} to {ratio_['high']:.2f})" in text
    assert "| tiny | step | musigma@abc |" in text
    assert "musigma, other" in text
    assert "not installed (tiny): no-such-distribution is not installed" in text
    assert "a peer" in text
    width = 0
    for row in text.splitlines():
        if row.startswith("| "):
            assert width in (0, row.count("|"))
        width = row.count("|") if row.startswith("|") else 0


def test_a_page_keeps_its_own_text():
    page = f"# Title\n\n{place('', 'old table')}\nBelow.\n"
    again = place(page, "new table")
    assert again.startswith("# Title")
    assert again.endswith("\nBelow.\n")
    assert "new table" in again
    assert "old" not in again
    assert place(again, "old table") == page
    with pytest.raises(ValueError, match="no lines"):
        place("other text", "table")


def test_a_line_names_ours_the_peer_and_the_commit(result):
    text = line("tiny", "step", result["workloads"]["tiny"]["operations"]["step"])
    assert text.startswith("tiny step: musigma ")
    assert "peer" in text
    assert "the time of musigma@abc" in text


# --- counts ------------------------------------------------------------------------------------


def test_kernels_are_dispatched_operations_without_views():
    x = torch.randn(4, 6)
    assert kernels(lambda: x.t().reshape(2, 12)) == 1  # a copy
    assert kernels(lambda: x.t().unflatten(0, (2, 3))) == 0
    assert kernels(lambda: torch.empty(3)) == 0


def test_onednn_products_count_the_same_flops():
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.fail("this torch has no oneDNN linear operator: count its replacement")
    x, w = torch.randn(3, 7, 4), torch.randn(5, 4)
    linear = torch.ops.mkldnn._linear_pointwise
    assert flops(lambda: linear(x, w, None, "none", [], "")) == flops(lambda: x @ w.t()) == 840


def test_peak_kernels_have_the_flops_they_claim():
    for dtype in (torch.float32, torch.bfloat16):
        calls = peak_kernels(dtype)
        assert len(calls) >= 3
        for call, expected in calls.values():
            assert flops(call) == expected
    assert describe()["cpu"]


GROWING = """
import torch
from benchmarks.speed.counts import peak_growth
kept = []
print(peak_growth(lambda: kept.append(torch.ones(25 * 2**18)), times=2))
"""


def test_memory_grows_by_what_is_allocated():
    done = subprocess.run(  # this process may reuse freed memory
        [sys.executable, "-c", GROWING], capture_output=True, text=True, check=True, cwd=ROOT
    )
    grown = done.stdout.strip()
    assert grown == "None" or 50 * 2**20 <= int(grown) < 80 * 2**20


# --- separate processes ------------------------------------------------------------------------

ALONE = Conditions(threads=1, keep_heap=False)


def test_a_separate_process_answers_as_this_process_does():
    plain = next(c for c in WORKLOADS["conv-vae-28"].contenders if c.name == "plain loop")
    child = Subprocess("conv-vae-28", plain, ALONE)
    try:
        local = InProcess(plain)
        assert child.about() == local.about()
        assert child.growth("step") > 10 * 2**20  # weights, moments, and 13 MB of activations
        assert child.counts("step") == local.counts("step")
        assert len(child.time("step", 0.0)) == 1
        with pytest.raises(RuntimeError, match="KeyError"):
            child.time("nothing", 0.0)
        child.warm("step")  # the process continues after an error
        child.child.kill()
        with pytest.raises(RuntimeError, match="the process ended with code -9"):
            child.warm("step")
    finally:
        child.close()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_another_commit_runs_from_its_own_folder(tmp_path):
    commit = command.extract("HEAD", tmp_path)
    workload = against(WORKLOADS["maf-8"], commit, str(tmp_path / "src"))
    names = [c.name for c in workload.contenders]
    assert names[:2] == ["musigma", f"musigma@{commit}"]
    assert all(c.environment is not None for c in workload.contenders[:2])
    plan = Plan(seconds=1e-3, rounds=2, threads=1, operations=("sample",), peers=(), memory=False)
    *_, result = run([workload], plan)
    record = result["workloads"]["maf-8"]
    assert not record["skipped"]
    assert set(record["operations"]["sample"]["times"]) == set(names[:2])


@pytest.mark.slow
def test_contenders_in_processes_of_their_own_run_in_several(monkeypatch):
    restarted = []
    monkeypatch.setattr(Subprocess, "restart", lambda child: restarted.append(child.contender))
    workload = against(WORKLOADS["maf-8"], "abc", str(ROOT / "src"))
    plan = Plan(
        seconds=1.0, rounds=4, processes=2, threads=1, operations=("sample",), peers=(),
        memory=False, counts=False,
    )  # fmt: skip
    *_, result = run([workload], plan)
    assert not result["workloads"]["maf-8"]["skipped"]
    assert sorted(restarted) == ["musigma", "musigma@abc"]  # before the third of four rounds


@pytest.mark.slow
def test_a_contender_continues_in_a_new_process():
    child = Subprocess("maf-8", WORKLOADS["maf-8"].contenders[0], ALONE)
    try:
        first = child.child.pid
        child.restart()
        assert child.child.pid != first
        assert child.time("sample", 1e-3)
    finally:
        child.close()


def test_a_package_that_is_imported_from_elsewhere_is_not_timed(tmp_path):
    workload = against(WORKLOADS["maf-8"], "abc", str(tmp_path))  # without a package
    with pytest.raises(RuntimeError, match=f"expected musigma from {tmp_path}"):
        Subprocess(workload.name, workload.contenders[1], ALONE)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_an_unknown_commit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a commit of this repository; got 'nothing'"):
        command.extract("nothing", tmp_path)


def test_cpu_time_excludes_sleep():
    sleeper = Contender("sleeper", lambda: Subject({"nap": lambda: time.sleep(0.1)}))
    (cpu,) = InProcess(sleeper, clock="cpu").time("nap", 0.0)
    (wall,) = InProcess(sleeper).time("nap", 0.0)
    assert cpu < 0.1 <= wall


def test_a_separate_process_reports_an_unavailable_contender(monkeypatch):
    monkeypatch.delenv(glows.CLONES, raising=False)
    clone = next(c for c in WORKLOADS["glow-128"].contenders if c.name == "rosinality")
    with pytest.raises(Unavailable, match=glows.CLONES):
        Subprocess("glow-128", clone, ALONE)


@pytest.mark.slow
def test_keras_builds_a_model_of_the_same_size():
    workload = WORKLOADS["conv-vae-28"]
    keras = next(c for c in workload.contenders if c.name == "keras (torch)")
    child = Subprocess(workload.name, keras, ALONE)
    try:
        assert child.about()["parameters"] == workload.parameters
    finally:
        child.close()


# --- the workloads: the same model, the same loss ----------------------------------------------


def test_workloads_are_selected_by_prefix():
    assert [w.name for w in select(["conv-vae", "maf"])] == [
        "conv-vae-28",
        "conv-vae-64",
        "maf-8",
        "maf-43",
    ]
    assert select([]) == list(WORKLOADS.values())
    with pytest.raises(ValueError, match="got 'mlp-vea'; did you mean 'mlp-vae'"):
        select(["mlp-vea"])


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_begins_with_musigma(name):
    assert (WORKLOADS[name].parameters is not None) == ("vae" in name)  # flows differ a little
    contenders = WORKLOADS[name].contenders
    assert contenders[0].kind == "ours"
    assert contenders[0].name == "musigma"
    assert len({c.name for c in contenders}) == len(contenders)
    assert sum(c.kind == "peer" for c in contenders) >= 2


@pytest.fixture
def silent(monkeypatch):
    """No noise: every draw is the mean."""
    monkeypatch.setattr(torch, "randn_like", lambda t, **_: torch.zeros_like(t))
    monkeypatch.setattr(torch, "randn", lambda *shape, **named: torch.zeros(*shape, **named))


def copy_weights(source: vaes.PlainVAE, encoder: nn.Module, heads, decoder: nn.Module) -> None:
    """From a plain VAE to ours; ours may have both heads in one layer."""
    layers = [m for m in source.encoder.modules() if list(m.parameters(recurse=False))]
    ours = [m for m in encoder.modules() if list(m.parameters(recurse=False))]
    back = [m for m in source.decoder.modules() if list(m.parameters(recurse=False))]
    ours_back = [m for m in decoder.modules() if list(m.parameters(recurse=False))]
    assert len(back) == len(ours_back)
    for a, b in [*zip(layers, ours, strict=False), *zip(back, ours_back, strict=True)]:
        b.load_state_dict(a.state_dict())
    for name in ("weight", "bias"):
        values = [getattr(head, name).data for head in (source.mean, source.log_var)]
        if len(heads) == 1:
            getattr(heads[0], name).data.copy_(torch.cat(values))
        else:
            for head, value in zip(heads, values, strict=True):
                getattr(head, name).data.copy_(value)


def assert_same_loss_and_gradients(model, plain, x, constant=0.0):
    ours, theirs = objectives.elbo(model(x)).mean(), plain(x)
    assert ours.item() - constant == pytest.approx(theirs.item(), rel=1e-4)
    ours.backward()
    theirs.backward()
    norms = [
        math.sqrt(sum(p.grad.square().sum().item() for p in m.parameters()))
        for m in (model, plain)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_the_mlp_vae_has_the_loss_of_the_plain_loop(silent):
    model, plain = vaes.mlp_model(), vaes.mlp_plain_model()
    net, head = model.encoder.net, model.decoder.net
    copy_weights(plain, nn.Sequential(net.enter), [net.mean, net.scale], head)
    assert_same_loss_and_gradients(model, plain, vaes.grays(16))


@pytest.mark.parametrize(("size", "pixels"), [(28, 0), (64, 3 * 64 * 64)])
def test_the_convolutional_vaes_have_the_loss_of_the_plain_loop(silent, size, pixels):
    torch.manual_seed(0)
    model, plain = vaes.conv_model(size), vaes.conv_plain_model(size)
    encoder, last = model.encoder.net
    copy_weights(plain, encoder, [last], model.decoder.net)
    constant = 0.5 * pixels * math.log(math.pi)  # of a Gaussian of variance 1/2
    assert_same_loss_and_gradients(model, plain, vaes.conv_x(size)[:8], constant)


def test_an_epoch_uses_the_whole_trainer(monkeypatch):
    few, fits = vaes.images()[:300], []

    def fit(model, data, validation, config, out, **options):
        before = [p.clone() for p in model.parameters()]
        vaes_fit(model, data, validation, config, out, **options)
        trained = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        fits.append((len(data), all(trained), (out / "model.safetensors").exists()))

    vaes_fit = vaes.fit
    monkeypatch.setattr(vaes, "images", lambda: few)
    monkeypatch.setattr(vaes, "fit", fit)
    vaes.mlp_ours().calls["epoch"]()
    assert fits == [(300, True, True)]


# --- gates on exact counts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (vaes.mlp_ours, partial(vaes.mlp_plain, "tensors")),
        (partial(vaes.conv_ours, 28), partial(vaes.conv_plain, 28)),
    ],
    ids=["mlp", "conv 28"],
)
def test_a_step_costs_no_more_than_the_plain_loop(ours, plain, monkeypatch):
    few = vaes.images()[:128]
    monkeypatch.setattr(vaes, "images", lambda: few)
    monkeypatch.setattr(vaes, "EXAMPLES", 128)
    a, b = counts(ours(), "step"), counts(plain(), "step")
    assert a["flops"] == b["flops"]
    assert a["kernels"] <= 0.7 * b["kernels"]  # a fused optimizer, and likelihoods of logits
    assert a["saved_bytes"] <= 1.35 * b["saved_bytes"]


def mlp_flops(inputs: int, outputs: int) -> int:
    """Of one pass of a batch through two hidden layers."""
    h = tabular.HIDDEN
    return 2 * tabular.BATCH * (inputs * h + h * h + h * outputs)


@pytest.mark.parametrize("dims", [8, 43])
def test_spline_couplings_compute_half_a_network(dims):
    subject = tabular.ours("nsf-c", dims)
    unchanged, transformed = dims // 2, dims - dims // 2
    outputs = transformed * (3 * tabular.BINS - 1)
    half = tabular.TRANSFORMS * mlp_flops(unchanged, outputs)
    assert counts(subject, "log_prob")["flops"] <= half
    assert counts(subject, "sample")["flops"] <= half
    assert counts(subject, "step")["flops"] <= 3 * half


def test_image_couplings_compute_half_a_network():
    depth, hidden = 2, 16
    subject, expected = glows.ours(depth, hidden), 0
    for c, side in ((12, 16), (24, 8), (48, 4)):
        pixels = 2 * glows.BATCH * side**2
        net = 9 * (c // 2) * hidden + hidden**2 + 9 * hidden * c
        expected += depth * pixels * (net + c * c)
        expected += depth * 2 * 2 * c**3  # L U, and P (L U)
        if side > 4:
            expected += pixels * 9 * (c // 2) * c  # the prior of a split
    assert flops(lambda: subject.loss()) <= expected


@pytest.mark.parametrize("flow", ["nsf-ar", "maf"])
@pytest.mark.parametrize("dims", [8, 43])
def test_autoregressive_sampling_computes_each_hidden_unit_once(flow, dims):
    subject = tabular.ours(flow, dims)
    assert counts(subject, "sample")["flops"] <= counts(subject, "log_prob")["flops"]


@pytest.mark.parametrize("flow", ["nsf-c", "nsf-ar", "maf"])
def test_flows_of_vectors_have_one_memory_layout(flow):
    subject = tabular.ours(flow, 43)
    with subject.mode("step"):
        subject.initialize()
        subject.calls["step"]()
        data = mixed_layouts(lambda: subject.model.layers[0](torch.randn(tabular.BATCH, 43)))
        assert mixed_layouts(subject.calls["step"]) <= data + 1


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_likelihood_of_color_images_computes_on_planes_of_pixels(memory):
    read = LogisticRead(3, 256, components=5, coupled=True)
    h = torch.randn(2, read.outputs, 8, 8).contiguous(memory_format=memory).requires_grad_()
    x = torch.randint(0, 256, (2, 3, 8, 8)).float().contiguous(memory_format=memory)
    assert read(h).means.stride()[-2:] == read(h).log_scale.stride()[-2:] == (8, 1)
    copies = 4 if memory is torch.channels_last else 0
    assert kernels(lambda: read(h).log_prob(x).sum().backward()) <= 89 + copies


KERNELS = {
    ("maf-43", "log_prob"): 105,
    ("maf-43", "step"): 286,
    ("maf-43", "sample"): 2840,
    ("glow-128", "step"): 2156,
    ("glow-128", "sample"): 1021,
}


@pytest.mark.parametrize(("name", "operation"), KERNELS)
def test_flows_take_no_more_kernels(name, operation):
    subject = WORKLOADS[name].contenders[0].setup()
    with subject.mode("step"):
        subject.initialize()
    with subject.mode(operation):
        subject.calls[operation]()  # the optimizer's state
        assert kernels(subject.calls[operation]) <= KERNELS[name, operation]


def glow_bytes(depth: int, hidden: int, **options) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    subject = glows.ours(depth, hidden, **options)
    with subject.mode("step"):
        subject.initialize()
        return kept_bytes(subject.loss, [*subject.model.parameters()])


def test_reversible_glow_keeps_the_same_bytes_at_any_depth():
    shallow, deep = (glow_bytes(depth, 32, memory="reversible") for depth in (2, 6))
    assert deep <= 4 * 2**20
    assert deep <= 1.2 * shallow
    assert glow_bytes(6, 32) > 2.5 * glow_bytes(2, 32)


FREIA = 110_791_296
"""Bytes that FrEIA 0.2's all-in-one blocks keep of a batch, at 8 steps with 128 channels."""


def test_glow_keeps_little_more_than_its_hidden_layers():
    assert glow_bytes(8, 128) <= 1.15 * FREIA


# --- clones ------------------------------------------------------------------------------------


def test_clones_are_found_in_the_folder_of_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv(glows.CLONES, raising=False)
    with pytest.raises(Unavailable, match=f"set {glows.CLONES}"):
        glows.clone("owner+name")
    monkeypatch.setenv(glows.CLONES, str(tmp_path))
    with pytest.raises(Unavailable, match="no clone named owner"):
        glows.clone("owner+name")
    (tmp_path / "owner+name").mkdir()
    assert glows.clone("owner+name") == tmp_path / "owner+name"


def test_a_clone_is_imported_under_its_own_package_name(tmp_path):
    (tmp_path / "parts.py").write_text("WIDTH = 7\n")
    (tmp_path / "model.py").write_text("from .parts import WIDTH\n")
    assert glows.load("speed_benchmark_test", tmp_path, "model").WIDTH == 7
    with pytest.raises(Unavailable, match="cannot be imported"):
        glows.load("speed_benchmark_test", tmp_path, "missing")


# --- the command line --------------------------------------------------------------------------

WORDS = [
    "--operations",
    "step",
    "--peers",
    "none",
    "--seconds",
    "0.001",
    "--rounds",
    "2",
    "--no-memory",
]


@pytest.fixture
def speed(monkeypatch):
    """The command line, with its environment variable restored afterwards."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")

    def speed(*words: object) -> None:
        command.main([str(word) for word in words])

    return speed


def test_a_page_and_its_figures_are_written_and_other_workloads_are_kept(speed, tmp_path, capsys):
    page = tmp_path / "speed.md"
    page.write_text(f"# Speed\n\n{BEGIN}\n{END}\nBelow.\n")
    speed("maf-8", *WORDS, "--out", page)
    speed("nsf-c-8", *WORDS, "--out", page)
    stored = json.loads((tmp_path / "speed.json").read_text())
    assert list(stored["workloads"]) == ["nsf-c-8", "maf-8"]
    text = page.read_text()
    assert text.startswith("# Speed")
    assert text.endswith("Below.\n")
    assert "### maf-8" in text
    assert "### nsf-c-8" in text
    assert "maf-8 step: musigma" in capsys.readouterr().err
    speed("maf-8", "--resume", *WORDS, "--out", page)
    assert json.loads((tmp_path / "speed.json").read_text()) == stored


def test_the_result_is_printed_as_json(speed, capsys):
    speed("maf-8", "--json", *WORDS)
    result = json.loads(capsys.readouterr().out)
    assert result["interrupted"] is False
    step = result["workloads"]["maf-8"]["operations"]["step"]
    assert step["times"]["musigma"]["n"] >= 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("speed.txt", None, "expected a .json or .md file"),
        ("speed.md", "other text", "no lines"),
        ("speed.json", "[]", "holds no results"),
        ("no/speed.md", None, "there is no folder"),
    ],
)
def test_a_file_that_could_not_be_written_is_refused_before_measuring(
    speed, tmp_path, capsys, name, text, message
):
    out = tmp_path / name
    if text:
        out.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        speed("maf-8", *WORDS, "--out", out)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--operations", "step,nothing"], "epoch, log_prob, sample, step; got 'nothing'"),
        (["--peers", "nobody"], "zuko; got 'nobody'"),
        (["--seconds", "-1"], "seconds: expected a positive number"),
        (["--rounds", "-1"], "rounds: expected a positive number"),
        (["--resume"], "--resume: expected --out"),
        (["--against", "nothing"], "--against: expected a commit"),
    ],
)
def test_options_that_measure_nothing_are_refused(speed, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        speed("maf-8", *WORDS, *words)
    assert message in capsys.readouterr().err


def test_ctrl_c_shows_the_results_so_far(speed, monkeypatch, capsys):
    def interrupted(workloads, plan, status):
        yield from run([TINY], SHORT)
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        speed("maf-8", *WORDS)
    output = capsys.readouterr()
    assert "interrupted" in output.err
    assert "### tiny" in output.out
