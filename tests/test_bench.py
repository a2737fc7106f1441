"""The benchmark's bookkeeping, and what is exact: bytes, FLOPs and kernels. No time is a gate."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from benchmarks.speed import (
    WORKS,
    Contender,
    Plan,
    Subject,
    Unavailable,
    Work,
    glows,
    harness,
    ours,
    run,
    select,
    tabular,
    vaes,
)
from benchmarks.speed.children import Apart, Here
from benchmarks.speed.counts import counts, flops, kernels
from benchmarks.speed.harness import Timing, interleave, ratio, slice_of
from benchmarks.speed.machine import describe, peak_kernels, settings
from benchmarks.speed.tables import BEGIN, END, line, markdown, placed
from hypothesis import given
from hypothesis import strategies as st
from musigma.cli.bench import bench
from torch import nn

from musigma.cli import main
from musigma.training.machine import kept_bytes

SMALL = Plan(seconds=1e-3, rounds=2, threads=1, memory=False, keep_heap=False)


class Clock:
    """Time that passes only when someone works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        def call():
            self.now += seconds

        return call


# --- turns, by a clock of our own --------------------------------------------------------------


@pytest.mark.parametrize(("each", "seconds", "n"), [(1.0, 3.5, 4), (0.5, 2.0, 4), (9.0, 1.0, 1)])
def test_a_slice_calls_until_its_time_is_over_and_once_at_least(each, seconds, n):
    clock = Clock()
    assert slice_of(clock.work(each), seconds, clock) == [each] * n


def turns(order: dict[str, float], clock: Clock, **options):
    slices = {
        name: lambda seconds, each=each: slice_of(clock.work(each), seconds, clock)
        for name, each in order.items()
    }
    return interleave(slices, clock=clock, **options)


def test_everyone_has_a_slice_in_every_round_and_the_order_changes():
    clock, heard = Clock(), []
    names = {name: 0.25 for name in "abcd"}
    *_, timings = turns(names, clock, rounds=6, seconds=6.0, on_turn=heard.append)
    assert {name: [len(r) for r in t.rounds] for name, t in timings.items()} == dict.fromkeys(
        "abcd", [4] * 6
    )
    orders = [tuple(t.name for t in heard[4 * i : 4 * i + 4]) for i in range(6)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 1
    assert [t.round for t in heard[::4]] == list(range(6))
    again: list = []
    list(turns(names, Clock(), rounds=6, seconds=6.0, on_turn=again.append))
    assert [t.name for t in again] == [t.name for t in heard]  # a seed decides


def test_slow_calls_end_the_rounds_after_two():
    clock = Clock()
    rounds = list(turns({"a": 100.0, "b": 1.0}, clock, rounds=9, seconds=9.0))
    assert len(rounds) == 2


def test_who_fails_is_left_out_and_the_others_go_on():
    clock, failures = Clock(), []

    def fails(seconds: float) -> list[float]:
        if clock.now > 1:
            raise RuntimeError("no more")
        return [0.5]

    slices = {"good": lambda s: slice_of(clock.work(1.0), s, clock), "bad": fails}
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
def test_a_ratio_is_one_with_oneself_and_scales(timing, factor):
    assert ratio(timing, timing) == (1, 1, 1, 1)
    longer = Timing([[factor * s for s in r] for r in timing.rounds])
    assert ratio(longer, timing) == pytest.approx((factor,) * 4)


@given(times, times)
def test_quartiles_of_ratios_are_in_order_and_turn_around(a, b):
    there, back = ratio(a, b), ratio(b, a)
    assert there.low <= there.median <= there.high
    if min(len(a.rounds), len(b.rounds)) % 2:  # the middle one is one of them
        assert there.median == pytest.approx(1 / back.median)


def test_ratios_within_rounds_do_not_see_the_machine_drift():
    drift = np.array([1.0, 3.0, 2.0, 0.5, 7.0])
    fast, slow = (Timing([[k * d] * 3 for d in drift]) for k in (1.0, 2.0))
    assert ratio(slow, fast)[:3] == (2, 2, 2)


def test_the_best_decile_is_the_tenth_of_a_hundred():
    shuffled = np.random.default_rng(0).permutation(100).astype(float)
    assert harness.best_decile(list(shuffled)) == 10


# --- a whole run, of works of our own ----------------------------------------------------------


def tiny(bias: bool = True, note: str = "") -> Subject:
    net, x = nn.Linear(3, 2, bias=bias), torch.randn(5, 3)

    def loss():
        return net(x).square().sum()

    return Subject(
        {"step": lambda: loss().backward(), "sample": lambda: net(x)},
        model=net,
        loss=loss,
        parameters=ours.trainable(net.parameters()),
        note=note,
    )


def breaks() -> Subject:
    raise ZeroDivisionError("in setup")


def away() -> Subject:
    raise Unavailable("it is elsewhere")


def worn(after: int = 6) -> Subject:
    left = iter(range(after))
    found = tiny()
    step = found.calls["step"]
    found.calls = {"step": lambda: (next(left), step())}
    return found


WORK = Work(
    "tiny",
    "a tiny layer",
    5,
    ("step", "sample"),
    (
        Contender("musigma", tiny, "ours"),
        Contender("musigma, other", tiny, "variant"),
        Contender("peer", partial(tiny, note="a peer"), needs=("torch",)),
        Contender("narrow", partial(tiny, bias=False)),
        Contender("not here", tiny, needs=("no-such-distribution",)),
        Contender("elsewhere", away),
        Contender("broken", breaks),
        Contender("worn", worn),
        Contender("musigma, best", tiny, "best"),
    ),
    parameters=8,
)


@pytest.fixture(scope="module")
def result():
    *_, result = run([WORK], SMALL)
    return json.loads(json.dumps(result))


def test_who_cannot_take_part_is_named_with_the_reason(result):
    work = result["works"]["tiny"]
    reasons = work["skipped"]
    assert set(reasons) == {"narrow", "not here", "elsewhere", "broken", "worn"}
    assert reasons["not here"] == "no-such-distribution is not installed"
    assert reasons["elsewhere"] == "it is elsewhere"
    assert "6 parameters" in reasons["narrow"]
    assert "ZeroDivisionError: in setup" in reasons["broken"]
    assert set(work["contenders"]) == {"musigma", "musigma, other", "peer"}


def test_a_result_says_all_that_is_needed_to_judge_it(result):
    work = result["works"]["tiny"]
    assert set(work) >= {"about", "batch", "machine", "settings", "plan", "seconds", "whats"}
    assert work["settings"]["threads"] == 1
    assert work["settings"]["heap_kept"] is False
    assert work["machine"]["torch"] == torch.__version__
    assert work["contenders"]["peer"]["versions"] == {"torch": torch.__version__}
    for what in ("step", "sample"):
        found = work["whats"][what]
        assert set(found["times"]) == set(work["contenders"])
        assert found["best_peer"] == "peer"
        assert set(found["faster"]) == {"musigma"}
        for row in found["times"].values():
            assert 0 < row["best_ms"] <= row["median_ms"]
            assert row["n"] == sum(1 for _ in row["rounds_ms"]) or row["n"] > 2
            assert set(row["ratio"]) == {"median", "low", "high", "best"}
        assert found["times"]["musigma"]["ratio"]["median"] == 1
    step = work["whats"]["step"]["times"]["peer"]
    assert step["flops"] == 2 * 2 * (5 * 3 * 2)  # forward, and the gradient of the weight
    assert step["saved_bytes"] == 4 * (5 * 3 + 5 * 2)  # x, and what is squared
    assert "saved_bytes" not in work["whats"]["sample"]["times"]["peer"]


def test_peers_and_whats_are_chosen_by_the_plan():
    plan = Plan(seconds=1e-3, rounds=2, whats=("sample",), peers=(), memory=False, keep_heap=False)
    *_, result = run([WORK], plan)
    work = result["works"]["tiny"]
    assert set(work["contenders"]) == {"musigma", "musigma, other"}
    assert list(work["whats"]) == ["sample"]
    assert "best_peer" not in work["whats"]["sample"]


def test_whoever_stops_early_has_what_is_known():
    rounds = run([WORK], SMALL)
    result = next(rounds)
    rounds.close()
    assert "musigma" in result["works"]["tiny"]["whats"]["step"]["times"]
    assert "step" in markdown(result)


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with settings(threads=before + 1, keep_heap=False) as chosen:
        assert chosen["threads"] == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("option", [{"seconds": 0.0}, {"rounds": 0}, {"threads": 0}])
def test_plans_that_measure_nothing_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Plan(**option)


# --- as Markdown -------------------------------------------------------------------------------


def test_the_tables_have_every_figure_and_every_reason(result):
    text = markdown(result)
    step = result["works"]["tiny"]["whats"]["step"]
    faster = step["faster"]["musigma"]
    assert f"{faster['median']:.2f}x ({faster['low']:.2f} to {faster['high']:.2f})" in text
    assert "musigma, other" in text
    assert "not here (tiny): no-such-distribution is not installed" in text
    assert "a peer" in text
    for row in text.splitlines():
        if row.startswith("|---"):
            wide = row.count("|")
        if row.startswith("| "):
            head = row.count("|")
    assert wide == head


def test_a_page_keeps_its_own_text():
    page = f"# Title\n\n{placed('', 'old table')}\nBelow.\n"
    again = placed(page, "new table")
    assert again.startswith("# Title")
    assert again.endswith("\nBelow.\n")
    assert "new table" in again
    assert "old" not in again
    assert placed(again, "old table") == page
    with pytest.raises(ValueError, match="no lines"):
        placed("a text of someone's", "table")


def test_a_line_says_who_was_faster(result):
    said = line("tiny", "step", result["works"]["tiny"]["whats"]["step"])
    assert said.startswith("tiny step: musigma ")
    assert "peer" in said


# --- what is counted ---------------------------------------------------------------------------


def test_kernels_are_what_is_dispatched_less_views():
    x = torch.randn(4, 6)
    assert kernels(lambda: x.t().reshape(2, 12)) == 1  # a copy
    assert kernels(lambda: x.t().unflatten(0, (2, 3))) == 0
    assert kernels(lambda: torch.empty(3)) == 0


def test_products_of_the_fast_path_count_as_any_other():
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.fail("this torch has no oneDNN: count what stands in its place")
    x, w = torch.randn(3, 7, 4), torch.randn(5, 4)
    fast = torch.ops.mkldnn._linear_pointwise
    assert flops(lambda: fast(x, w, None, "none", [], "")) == flops(lambda: x @ w.t()) == 840


def test_the_machine_tells_its_peak_in_either_type():
    for dtype in (torch.float32, torch.bfloat16):
        found = peak_kernels(dtype)
        assert len(found) >= 3
        for call, expected in found.values():
            assert flops(call) == expected
    assert describe()["cpu"]


GROWING = """
import torch
from benchmarks.speed.counts import peak_growth
kept = []
print(peak_growth(lambda: kept.append(torch.ones(25 * 2**18)), times=2))
"""


def test_memory_grows_by_what_is_allocated():
    done = subprocess.run(  # in this process freed memory may serve
        [sys.executable, "-c", GROWING], capture_output=True, text=True, check=True
    )
    grown = done.stdout.strip()
    assert grown == "None" or 50 * 2**20 <= int(grown) < 80 * 2**20


# --- processes of their own --------------------------------------------------------------------


def test_a_process_of_its_own_answers_as_this_one_does():
    plain = next(c for c in WORKS["conv-vae-28"].contenders if c.name == "plain loop")
    apart = Apart("conv-vae-28", plain, threads=1, keep_heap=False, device="cpu", clock="wall")
    try:
        here = Here(plain)
        assert apart.about() == here.about()
        assert apart.growth("step") > 10 * 2**20  # weights, moments, and 13 MB of activations
        assert apart.counts("step") == here.counts("step")
        assert len(apart.time("step", 0.0)) == 1
        with pytest.raises(RuntimeError, match="KeyError"):
            apart.time("nothing", 0.0)
        apart.warm("step")  # it goes on
        apart.child.kill()
        with pytest.raises(RuntimeError, match="its process ended with code -9"):
            apart.warm("step")
    finally:
        apart.close()


def test_the_clock_of_computing_stands_still_while_nothing_is_computed():
    sleeper = Contender("sleeper", lambda: Subject({"nap": lambda: time.sleep(0.1)}))
    (cpu,) = Here(sleeper, clock="cpu").time("nap", 0.0)
    (wall,) = Here(sleeper).time("nap", 0.0)
    assert cpu < 0.1 <= wall


def test_who_cannot_take_part_says_so_from_a_process_of_its_own(monkeypatch):
    monkeypatch.delenv(glows.CLONES, raising=False)
    clone = next(c for c in WORKS["glow-128"].contenders if c.name == "rosinality")
    with pytest.raises(Unavailable, match=glows.CLONES):
        Apart("glow-128", clone, threads=1, keep_heap=False, device="cpu", clock="wall")


def test_keras_builds_what_the_others_have():
    work = WORKS["conv-vae-28"]
    keras = next(c for c in work.contenders if c.name == "keras (torch)")
    apart = Apart(work.name, keras, threads=1, keep_heap=False, device="cpu", clock="wall")
    try:
        assert apart.about()["parameters"] == work.parameters
    finally:
        apart.close()


# --- the works: the same model, the same loss --------------------------------------------------


def test_works_are_found_by_the_beginnings_of_their_names():
    assert [w.name for w in select(["conv-vae", "maf"])] == [
        "conv-vae-28",
        "conv-vae-64",
        "maf-8",
        "maf-43",
    ]
    assert select([]) == list(WORKS.values())
    with pytest.raises(ValueError, match="did you mean 'mlp-vae'"):
        select(["mlp-vea"])


@pytest.mark.parametrize("name", WORKS)
def test_every_work_begins_with_ours(name):
    assert (WORKS[name].parameters is not None) == ("vae" in name)  # the flows' differ a little
    contenders = WORKS[name].contenders
    assert contenders[0].kind == "ours"
    assert contenders[0].name == "musigma"
    assert len({c.name for c in contenders}) == len(contenders)
    assert sum(c.kind == "peer" for c in contenders) >= 2


@pytest.fixture
def silent(monkeypatch):
    """No noise: what is drawn is the mean."""
    monkeypatch.setattr(torch, "randn_like", lambda t, **_: torch.zeros_like(t))
    monkeypatch.setattr(torch, "randn", lambda *shape, **named: torch.zeros(*shape, **named))


def copied(source: vaes.PlainVAE, encoder: nn.Module, heads, decoder: nn.Module) -> None:
    """The weights of a plain VAE, into ours: two heads may be one layer of two halves."""
    layers = [m for m in source.encoder.modules() if list(m.parameters(recurse=False))]
    mine = [m for m in encoder.modules() if list(m.parameters(recurse=False))]
    back = [m for m in source.decoder.modules() if list(m.parameters(recurse=False))]
    own = [m for m in decoder.modules() if list(m.parameters(recurse=False))]
    assert len(back) == len(own)
    for a, b in [*zip(layers, mine, strict=False), *zip(back, own, strict=True)]:
        b.load_state_dict(a.state_dict())
    for name in ("weight", "bias"):
        values = [getattr(head, name).data for head in (source.mean, source.log_var)]
        if len(heads) == 1:
            getattr(heads[0], name).data.copy_(torch.cat(values))
        else:
            for head, value in zip(heads, values, strict=True):
                getattr(head, name).data.copy_(value)


def assert_same_loss_and_gradients(model, plain, x, constant=0.0):
    mine, theirs = ours.objectives.elbo(model(x)), plain(x)
    assert mine.item() - constant == pytest.approx(theirs.item(), rel=1e-4)
    mine.backward()
    theirs.backward()
    norms = [
        math.sqrt(sum(p.grad.square().sum().item() for p in m.parameters()))
        for m in (model, plain)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_the_mlp_vae_has_the_loss_of_the_plain_loop(silent):
    model, plain = vaes.mlp_model(), vaes.mlp_plain_model()
    net, head = model.encoder.net, model.decoder.net
    copied(plain, nn.Sequential(net.enter), [net.mean, net.scale], head)
    assert_same_loss_and_gradients(model, plain, vaes.greys(16))


@pytest.mark.parametrize(("size", "pixels"), [(28, 0), (64, 3 * 64 * 64)])
def test_the_convolutional_vaes_have_the_loss_of_the_plain_loop(silent, size, pixels):
    torch.manual_seed(0)
    model, plain = vaes.conv_model(size), vaes.conv_plain_model(size)
    encoder, last = model.encoder.net
    copied(plain, encoder, [last], model.decoder.net)
    constant = 0.5 * pixels * math.log(math.pi)  # of a Gaussian of variance 1/2
    assert_same_loss_and_gradients(model, plain, vaes.conv_x(size)[:8], constant)


def test_an_epoch_goes_through_the_whole_trainer(monkeypatch):
    few = vaes.images()[:300]
    monkeypatch.setattr(vaes, "images", lambda: few)
    found = vaes.mlp_ours()
    before = [p.clone() for p in found.model.parameters()]
    found.calls["epoch"]()
    assert all(torch.equal(a, b) for a, b in zip(before, found.model.parameters(), strict=True))


# --- the gates: what can be counted ------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "plain"),
    [
        (vaes.mlp_ours, partial(vaes.mlp_plain, "tensors")),
        (partial(vaes.conv_ours, 28), partial(vaes.conv_plain, 28)),
    ],
    ids=["mlp", "conv 28"],
)
def test_a_step_costs_no_more_than_the_plain_loop(mine, plain, monkeypatch):
    few = vaes.images()[:128]
    monkeypatch.setattr(vaes, "images", lambda: few)
    monkeypatch.setattr(vaes, "EXAMPLES", 128)
    a, b = counts(mine(), "step"), counts(plain(), "step")
    assert a["flops"] == b["flops"]
    assert a["kernels"] <= 0.7 * b["kernels"]  # a fused optimiser, and likelihoods on logits
    assert a["saved_bytes"] <= 1.35 * b["saved_bytes"]


def mlp_flops(inputs: int, outputs: int) -> int:
    """Of one pass of a batch through two hidden layers."""
    h = tabular.HIDDEN
    return 2 * tabular.BATCH * (inputs * h + h * h + h * outputs)


@pytest.mark.parametrize("dims", [8, 43])
def test_spline_couplings_pay_for_half_a_network(dims):
    found = tabular.own("nsf-c", dims)
    kept, bent = dims // 2, dims - dims // 2
    half = tabular.TRANSFORMS * mlp_flops(kept, bent * (3 * tabular.BINS - 1))
    assert counts(found, "log_prob")["flops"] <= half
    assert counts(found, "sample")["flops"] <= half
    assert counts(found, "step")["flops"] <= 3 * half


def test_couplings_of_images_pay_for_half_a_network():
    depth, hidden = 2, 16
    found, expected = glows.own(depth, hidden), 0
    for c, side in ((12, 16), (24, 8), (48, 4)):
        pixels = 2 * glows.BATCH * side**2
        net = 9 * (c // 2) * hidden + hidden**2 + 9 * hidden * c
        expected += depth * pixels * (net + c * c)
        expected += depth * 2 * 2 * c**3  # L U, and P (L U)
        if side > 4:
            expected += pixels * 9 * (c // 2) * c  # the prior of a split
    assert flops(lambda: found.loss()) <= expected


@pytest.mark.parametrize("flow", ["nsf-ar", "maf"])
@pytest.mark.parametrize("dims", [8, 43])
def test_sampling_feature_by_feature_computes_each_hidden_unit_once(flow, dims):
    found = tabular.own(flow, dims)
    assert counts(found, "sample")["flops"] <= counts(found, "log_prob")["flops"]


def kept(depth: int, hidden: int, **options) -> int:
    found = glows.own(depth, hidden, **options)
    with found.ready("step"):
        found.warm()
        return kept_bytes(found.loss, [*found.model.parameters()])


def test_reversible_glow_keeps_the_same_whatever_its_depth():
    shallow, deep = kept(2, 32, memory="reversible"), kept(6, 32, memory="reversible")
    assert deep <= 4 * 2**20
    assert deep <= 1.2 * shallow
    assert kept(6, 32) > 2.5 * kept(2, 32)


FREIA = 110_791_296
"""Bytes that FrEIA 0.2's all-in-one blocks keep of a batch, at 8 steps with 128 channels."""


def test_glow_keeps_little_besides_its_hidden_layers():
    assert kept(8, 128) <= 1.15 * FREIA


# --- clones ------------------------------------------------------------------------------------


def test_clones_are_looked_for_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.delenv(glows.CLONES, raising=False)
    with pytest.raises(Unavailable, match=f"set {glows.CLONES}"):
        glows.clone("owner+name")
    monkeypatch.setenv(glows.CLONES, str(tmp_path))
    with pytest.raises(Unavailable, match="without owner"):
        glows.clone("owner+name")
    (tmp_path / "owner+name").mkdir()
    assert glows.clone("owner+name") == tmp_path / "owner+name"


def test_a_clone_is_imported_under_a_name_of_its_own(tmp_path):
    (tmp_path / "parts.py").write_text("WIDTH = 7\n")
    (tmp_path / "model.py").write_text("from .parts import WIDTH\n")
    assert glows.load("musigma_bench_test", tmp_path, "model").WIDTH == 7
    with pytest.raises(Unavailable, match="cannot be imported"):
        glows.load("musigma_bench_test", tmp_path, "missing")


# --- the command -------------------------------------------------------------------------------

WORDS = {"what": "step", "peers": "plain", "seconds": 1e-3, "rounds": 2, "memory": False}


def test_the_command_writes_a_page_and_its_figures_and_keeps_what_was_there(tmp_path, capsys):
    page = tmp_path / "speed.md"
    page.write_text(f"# Speed\n\n{BEGIN}\n{END}\nBelow.\n")
    bench("maf-8", out=page, **{**WORDS, "peers": "none"})
    bench("nsf-c-8", out=page, **{**WORDS, "peers": "none"})
    stored = json.loads((tmp_path / "speed.json").read_text())
    assert list(stored["works"]) == ["nsf-c-8", "maf-8"]
    text = page.read_text()
    assert text.startswith("# Speed")
    assert text.endswith("Below.\n")
    assert "### maf-8" in text
    assert "### nsf-c-8" in text
    assert "maf-8 step: musigma" in capsys.readouterr().err


def test_the_command_answers_in_json(capsys):
    words = "maf-8 --json --what step --peers none --seconds 0.001 --rounds 2 --no-memory"
    main(["bench", *words.split()])
    found = json.loads(capsys.readouterr().out)
    assert found["stopped"] is False
    assert found["works"]["maf-8"]["whats"]["step"]["times"]["musigma"]["n"] >= 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("speed.txt", None, "expected a .json or .md file"),
        ("speed.md", "someone's text", "no lines"),
        ("speed.json", "[]", "no result"),
    ],
)
def test_what_could_not_be_written_is_refused_before_anything_is_measured(
    tmp_path, name, text, message
):
    out = tmp_path / name
    if text:
        out.write_text(text)
    with pytest.raises(ValueError, match=message):
        bench("maf-8", out=out, **WORDS)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"what": "step,nothing"}, "what: known are epoch, log_prob, sample, step; got 'nothing'"),
        ({"peers": "nobody"}, "peers: known are .*zuko; got 'nobody'"),
        ({"seconds": 0.0}, "seconds: expected a positive number"),
        ({"rounds": 0}, "rounds: expected a positive number"),
    ],
)
def test_what_measures_nothing_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        bench("maf-8", **WORDS | option)


def test_ctrl_c_shows_what_is_known(monkeypatch, capsys, tmp_path):
    from musigma import bench as library

    def interrupted(works, plan, say):
        yield from run([WORK], SMALL)
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench("maf-8", **WORDS)
    said = capsys.readouterr()
    assert "stopped" in said.err
    assert "### tiny" in said.out
