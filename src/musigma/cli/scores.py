"""Commands that compute figures: of every example, and of data as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musigma.cli import bounds
from musigma.cli.calibration import (
    RATES,
    Calibration,
    Labeled,
    calibrates,
    detection_lines,
    drift_of,
    false_positive_rates,
)
from musigma.cli.detection import Detection, Scores, check_maps, write_maps
from musigma.cli.options import USE, RunOnData, app, at_least_one
from musigma.cli.outputs import Columns, Share, check_out, write_rows
from musigma.cli.screen import count, figure_text, launched_processes
from musigma.cli.trained import Trained
from musigma.cli.use import example_columns, shared

if TYPE_CHECKING:
    import numpy as np

    from musigma.data import Dataset
    from musigma.evaluation import Record
    from musigma.processes import Processes


@app.command(group=USE)
def score(
    on: RunOnData,
    *,
    out: Path | None = None,
    k: int = 1,
    fpr: float | None = None,
    calibrate: str | None = None,
    explain: int = 0,
    drift: bool = False,
    maps: Path | None = None,
    orders: int | None = None,
    detection: Detection = Detection(),
) -> None:
    """Score every example in nats, -log p, and in bits per dimension; outliers score highest.

    For an exact density of vectors given a context, the column log_prob has log p(x | context).

    With one draw per example (k = 1) a score depends a little on the batch that the example is in;
    a larger k reduces this. All of the data are scored unless --split says otherwise.

    With --fpr or --calibrate, p_value is the share of calibration rows with at least that score.
    These are held-out rows of the training data, or the rows of a file. The p-values are valid
    for examples that the model was not trained on.

    With --by, each of the named scores has a column, a p-value and a flag of its own, such as
    typicality, p_value_typicality and flag_typicality. The strangest examples have the highest
    score. Scores that are NaN are counted, and rank as the strangest.

    Args:
        out: A .csv or .parquet table. Each of several processes writes a shard. May be left out
            with --drift or --maps.
        k: Draws per example; more draws give a tighter bound.
        fpr: False-positive rate: the largest share of normal examples to flag, such as 0.01.
        calibrate: Normal rows to calibrate on, which the model was not trained on. By default the
            held-out part of the training data.
        explain: Number of columns of a table to name in the column `because`, the most surprising
            first; with --fpr, for flagged rows only.
        drift: Test whether the data as a whole, and each column of a table, have the distribution
            of the calibration rows.
        maps: A folder for pictures of the 16 strangest images, each above a map of its nats: those
            of each pixel (VAEs), or the change if a patch is replaced (flows).
        orders: Number of orders of the columns whose mixture is scored, for a model that has many
            (`table`). By default as in training.
    """
    from musigma import evaluation

    if out is not None:
        check_out(out, ".csv", ".parquet")
    elif not drift and maps is None:
        raise ValueError("out: expected a .csv or .parquet file to write (--out scores.csv)")
    rates = () if fpr is None else false_positive_rates(str(fpr))
    at_least_one(explain=explain or None)
    processes = launched_processes()
    if drift and processes.count > 1:
        raise ValueError(
            f"drift: it is a test of all examples together, and there are {processes.count} "
            "processes; run it in one"
        )
    _in_one_process(processes, by=detection.by, maps=maps)
    trained = Trained(on.run, on.common)
    options = trained.sized(on.options.everything())
    _mix_orders(trained, orders)
    if maps is not None:
        check_maps(maps, trained)
    scores = Scores(trained, detection, k, options, maps=maps is not None)
    reasons = None if not explain else trained.any_order("explain")
    by = None
    if rates or calibrate is not None or drift:
        by = Calibration.read(trained, calibrate, on.options, rates)
    found, share = shared(trained, on.source, options, processes)
    if by is not None and trained.seen:
        if drift:
            raise ValueError(f"drift: {on.source} is what the model was trained on; give new data")
        trained.screen.note(
            f"{on.source} is what the model was trained on; p-values of rows that it has seen are "
            "larger than those of new rows"
        )
    if by is not None:
        by = by.scored(scores)
    columns = _evaluated(evaluation.score, trained, found, share, "scoring", k=k)
    if not len(share.rows):  # more processes than batches: a table with columns and no rows
        one = evaluation.score(trained.model, found.subset([0]), k=k)
        columns = {name: values[:0] for name, values in one.items()}
    lines, answer = _summary(trained, columns, evaluation.bound(trained.model, k), share)
    raw = scores(found, columns["nats"]) if scores.named else {"nats": columns["nats"]}
    ranked = scores.strangest(raw)
    beside, more, fields = _compared(scores, raw, ranked, by, fpr)
    lines, answer = lines + more, answer | fields
    if by is not None and fpr is None and not drift:
        lines.append(f"p-values by {by}")
    if reasons is not None:
        first = beside.get(scores.of("flag", scores.labels[0]))
        beside["because"] = _because(trained, found, share, explain, first)
    if by is not None and drift:
        tests = scores.drift(found, by.rows, ranked, by.scores)
        answer["drift"], more = drift_of(trained, found, tests, by)
        lines += more
    if maps is not None:
        answer["maps"], more = write_maps(maps, scores, found, ranked)
        lines.append(more)
    if out is not None:
        out = share.path(out)
        lines[0], answer = f"{lines[0]}: {out}", {"out": str(out), **answer}
        table = example_columns(found, share.rows)
        if trained.of_pairs and trained.model.exact:
            table["log_prob"] = -columns["nats"]
        for name, values in columns.items():
            if trained.spec.schema is None or name in ("nats", "spread"):  # not those terms
                table |= {name: values} | (beside if name == "nats" else {})
        write_rows(out, [table])
    trained.screen.result(answer, "\n".join(lines))


def _summary(
    trained: Trained, columns: Columns, bound: str, share: Share
) -> tuple[list[str], dict[str, Any]]:
    """Number, mean and extremes of scores, for people and as fields."""
    import numpy as np

    name, unit = "bits_per_dim", "bits/dim"
    if trained.spec.schema is not None:
        name, unit = "nats", "nats"
    n, mean, highest, lowest, figures = len(columns[name]), None, None, None, ""
    if n:
        mean, highest, lowest = (float(f(columns[name])) for f in (np.mean, np.max, np.min))
        figures = f", {lowest:.4f} to {highest:.4f} {unit}, mean {mean:.4f} ({bound})"
    fields = {name: mean, "highest": highest, "lowest": lowest, "bound": bound}
    if trained.of_pairs and n:
        nats = columns["nats"]
        low, high = float(nats.min()), float(nats.max())
        fields["nats"] = mean = float(nats.mean())
        figures = f", {low:.4f} to {high:.4f} nats, mean {mean:.4f} ({bound})"
    if "spread" in columns:
        fields["spread"] = float(np.mean(columns["spread"])) if n else None
        figures += f", differing by {fields['spread']:.4f} {trained.mixed}" if n else ""
    if trained.spec.support is not None:
        fields["outside"] = trained.outside
    fields |= trained.warnings
    return [f"{count(n, 'score')}{figures}{share}"], {"n": n, **share.fields, **fields}


def _compared(
    scores: Scores,
    raw: Mapping[str, np.ndarray],
    ranked: Mapping[str, np.ndarray],
    by: Calibration | None,
    fpr: float | None,
) -> tuple[Columns, list[str], dict[str, Any]]:
    """Columns of scores, p-values and flags; lines and fields about them.

    Args:
        scores: What was computed.
        raw: The scores by name.
        ranked: The same, in which NaN is the strangest.
        by: Rows that calibrate, if any.
        fpr: Largest share of normal examples to flag, if examples are flagged.
    """
    from musigma import anomaly

    columns: Columns = {}
    lines: list[str] = []
    each: dict[str, dict[str, Any]] = {}
    for label, values in raw.items():
        text, each[label] = _described(label, values)
        if scores.named:
            lines.append(text)
            columns |= {} if label == "nats" else {label: values}
        if by is None:
            continue
        p = columns[scores.of("p_value", label)] = anomaly.p_values(
            ranked[label], by.scores[label]
        )
        if fpr is not None:
            columns[scores.of("flag", label)] = p <= fpr
            unit = label if scores.named else "nats"
            text, fields = _flagged(p <= fpr, fpr, by.scores[label], unit)
            lines.append(text)
            each[label] |= fields
    answer: dict[str, Any] = {"scores": each} if scores.named else {"nan": each["nats"]["nan"]}
    if by is not None:
        answer |= by.fields
    if by is not None and fpr is not None:
        if not scores.named:
            answer |= {name: each["nats"][name] for name in ("threshold", "flagged")}
        low, high = anomaly.rate_interval(len(by.rows), fpr)
        lines.append(
            f"by {by}; with a threshold from so many rows, {low:.2%} to {high:.2%} of normal "
            "examples are flagged"
        )
        answer |= {"fpr": fpr, "rate_interval": [low, high]}
    return columns, lines, answer


def _described(label: str, values: np.ndarray) -> tuple[str, dict[str, Any]]:
    """The range of a score, for people and as fields; a mean of NaN is NaN."""
    import numpy as np

    n, missing = len(values), int(np.isnan(values).sum())
    lowest, mean, highest = (float(f(values)) if n else None for f in (np.min, np.mean, np.max))
    text = f": {lowest:.4f} to {highest:.4f}, mean {mean:.4f}" if n else ""
    fields = {"mean": mean, "highest": highest, "lowest": lowest, "nan": missing}
    return f"{label}{text}{f', {missing:,} NaN' * (missing > 0)}", fields


def _flagged(
    flag: np.ndarray, fpr: float, known: np.ndarray, unit: str
) -> tuple[str, dict[str, Any]]:
    """Number of flags by a score, and their threshold, for people and as fields."""
    from musigma import anomaly

    n, flagged, limit = len(flag), int(flag.sum()), anomaly.threshold(known, fpr)
    text = (
        f"{flagged:,} of {count(n, 'example')} flagged{f' ({flagged / n:.2%})' * (n > 0)}: more "
        f"than {limit:.4f} {unit}, p-value at most {fpr:g}"
    )
    return text, {"threshold": limit, "flagged": flagged}


def _in_one_process(processes: Processes, **given: Any) -> None:
    """Refuse options that need all examples in one process."""
    for name, value in given.items():
        if value is not None and processes.count > 1:
            raise ValueError(
                f"{name}: it needs all examples in one process, and there are {processes.count}; "
                "run it in one"
            )


def _mix_orders(trained: Trained, orders: int | None) -> None:
    """Score the mixture of so many orders of the columns."""
    from musigma import questions

    if orders is not None:
        model = trained.any_order("orders")
        model.orders = questions.orders(model, orders)


def _because(
    trained: Trained, found: Dataset, share: Share, most: int, flag: np.ndarray | None
) -> list[str]:
    """Reasons of the rows of a share: of flagged rows if there are flags, otherwise of all."""
    import numpy as np

    from musigma import evaluation, questions

    model, rows = trained.any_order("explain"), np.arange(share.rows.start, share.rows.stop)
    embedded = getattr(trained.model, "embedded", lambda context: context)
    asked = np.arange(len(rows)) if flag is None else np.flatnonzero(flag)
    texts = [""] * len(rows)
    if not len(asked):
        return texts
    reasons: list[list[str]] = []
    for x, context in evaluation.batches(trained.model, found.subset(rows[asked])):
        given = None if context is None else embedded(context)
        reasons += questions.explain(model, x, most, given).because
    for i, reason in zip(asked.tolist(), reasons, strict=True):
        texts[i] = "; ".join(reason)
    return texts


# --- a figure of data ----------------------------------------------------------------------------


@app.command(group=USE)
def evaluate(
    on: RunOnData,
    *,
    k: str = "1",
    anneal: int | None = None,
    gap: bool = False,
    out: Path | None = None,
    labels: str | None = None,
    anomaly: tuple[str, ...] = (),
    fpr: str | None = None,
    calibrate: str | None = None,
    orders: int | None = None,
    detection: Detection = Detection(),
) -> None:
    """Compute the mean bits per dimension of data, with its standard error.

    The answer says whether the figure is exact or an upper bound. With --out, it becomes a record,
    and `musigma compare` compares records. With --labels the answer also says how well the scores
    tell anomalies from normal rows, with 95 % intervals: the area under the ROC curve, average
    precision, and the shares of anomalies and of normal rows that are flagged at a promised
    false-positive rate; with --by, for each of the scores that it names.

    Args:
        k: Draws per example; more draws give a tighter bound for models that are not exact. The
            bound of each of several numbers is printed: 1,10,100,1000.
        anneal: Steps of annealed importance sampling, for a bound that is tighter yet: 200.
        gap: Also bound log p(x) from both sides, on examples that the model simulates.
        out: The .json file to write a record to: the figure, the data and weights that it is of,
            and the score of every example.
        labels: Which rows are anomalies: a column that is not one of the model's, `label`, or a
            file with a row for each example.
        anomaly: The label of anomalies. May be given several times. By default 1, true, yes,
            anomaly or outlier, where there are two labels and one of them is that.
        fpr: False-positive rates to promise: 0.01, or 0.01,0.001. By default those of 0.05, 0.01
            and 0.001 that the calibration rows allow.
        calibrate: Normal rows to calibrate on, which are not among the data and which the model
            was not trained on. By default the held-out part of the training data: half of it, if
            the other half is evaluated.
        orders: Number of orders of the columns whose mixture is scored, for a model that has many
            (`table`). By default as in training.
    """
    from musigma import evaluation
    from musigma.training import join, leave

    if out is not None:
        check_out(out, ".json")
    ks, annealing = bounds.draws(k, anneal)
    if labels is None:
        given = {"anomaly": anomaly, "fpr": fpr, "calibrate": calibrate}
        given |= dataclasses.asdict(detection)
        if unused := [name for name, value in given.items() if value]:
            raise ValueError(f"{', '.join(unused)}: for labeled data alone; give --labels, too")
    rates = None if fpr is None else false_positive_rates(fpr)
    processes = launched_processes()
    _in_one_process(processes, by=detection.by)
    if processes.count > 1:
        processes = join(on.common.device)
    trained = Trained(on.run, on.common)
    _mix_orders(trained, orders)
    lines, more = [], {}
    if labels is None:
        rows, share = shared(trained, on.source, on.options, processes)
        how: dict[str, Any] = {"k": ks, "annealing": annealing}
        found = _recorded(trained, rows, share, "evaluating", **how)
        if gap:
            how["k"] = ks[-1]
            both = _evaluated(evaluation.gap, trained, rows, share, "simulating", **how)
            found = found.with_fields(gap=both)
        lines = [*bounds.lines(found.fields, trained.of_pairs)]
    else:
        if len(ks) > 1 or annealing or gap:
            raise ValueError(
                "labels: they are compared with the scores of one number of draws; leave out "
                "--anneal, --gap and the other numbers of --k"
            )
        scores = Scores(trained, detection, max(ks), on.options)
        labeled = Labeled.read(trained, on.source, on.options, labels, anomaly)
        part, seen = trained.part, trained.seen
        half = seen and part == "held-out" and calibrate is None
        by = Calibration.read(trained, calibrate, on.options, rates or (), half)
        trained.part, trained.seen = part, seen
        if half:
            others = calibrates(labeled.rows)
            if strange := int(labeled.anomaly[others].sum()):
                trained.screen.note(
                    f"{strange:,} of {count(int(others.sum()), 'calibration row')} are anomalies, "
                    "so fewer rows are flagged than was promised"
                )
            labeled = labeled.subset(~others)
        found, lines, more = _detected(scores, labeled, by, rates, processes)
    leave()
    if orders is not None:
        found = found.with_fields(orders=orders)
    lines = [
        f"{figure_text(found.fields, trained.of_pairs)}; {trained.part} of {on.source}",
        *lines,
    ]
    answer = {"run": on.run, **found.fields, **more, **trained.warnings}
    if out is not None and processes.is_main:
        found.write(out)
        answer["out"], lines = str(out), [*lines, f"record: {out}"]
    trained.screen.result(answer, "\n".join(lines))


def _detected(
    scores: Scores,
    labeled: Labeled,
    by: Calibration,
    rates: tuple[float, ...] | None,
    processes: Processes,
) -> tuple[Record, list[str], dict[str, Any]]:
    """The figure of labeled rows, and how well scores tell anomalies from normal ones."""
    from musigma import anomaly

    trained = scores.trained
    if rates is None:
        for rate in RATES:
            if reason := by.refusal(rate):
                trained.screen.note(f"fpr: {reason}")
        rates = tuple(rate for rate in RATES if not by.refusal(rate))
    by = by.scored(scores)
    share = Share(processes, len(labeled.rows), scores.options.batch_size)
    record = _recorded(trained, labeled.rows, share, "scoring", k=scores.k)
    raw = scores(labeled.rows, record.nats) if scores.named else {"nats": record.nats}
    found = {
        label: anomaly.detection(
            values,
            labeled.anomaly,
            calibration=by.scores[label],
            rates=rates,
            seed=trained.common.seed,
        )
        for label, values in scores.strangest(raw).items()
    }
    lines = detection_lines(found, labeled, by, scores.named)
    plain = {label: _as_json(one) for label, one in found.items()}
    fields: dict[str, Any] = {**by.fields, "anomaly": labeled.what}
    if not scores.named:
        return record, lines, {**fields, "detection": plain["nats"]}
    fields["scores"] = {label: _described(label, raw[label])[1] for label in raw}
    for label, one in plain.items():
        fields["scores"][label]["detection"] = one
    return record, lines, fields


def _as_json(found: dict[str, Any]) -> dict[str, Any]:
    """What `anomaly.detection` returned, as JSON values."""
    plain = {name: _plain(value) for name, value in found.items()}
    plain["at"] = [{name: _plain(v) for name, v in at.items()} for at in found.get("at", ())]
    return plain


def _plain(value: Any) -> Any:
    """An interval as a mapping with names; anything else as it is."""
    return value._asdict() if hasattr(value, "_asdict") else value


def _recorded(trained: Trained, found: Dataset, share: Share, title: str, **how: Any) -> Record:
    """The record of a figure."""
    from musigma.evaluation import record

    function = partial(record, **trained.evaluated)
    return _evaluated(function, trained, found, share, title, **how)


def _evaluated(
    function: Callable[..., Any],
    trained: Trained,
    found: Dataset,
    share: Share,
    title: str,
    **options: Any,
) -> Any:
    """A function of `musigma.evaluation` on a share of data."""
    with trained.screen.progress(title) as progress:
        return function(
            trained.model,
            found,
            **options,
            batch_size=share.batch_size,
            seed=trained.common.seed,
            progress=share.progress(progress),
            processes=share.processes,
        )
