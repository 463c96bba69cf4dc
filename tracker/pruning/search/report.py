"""What searches found, beside each other: sentences, a table of strategies, and the frontier."""

from __future__ import annotations

import json
import shlex
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tracker.core.config import CellRequest
from tracker.core.estimates import Estimate, Unit
from tracker.core.extent import DEFAULT_SEED
from tracker.core.findings import FindingRecord, Line, LineChart
from tracker.core.formats import WRITTEN, counted, fixed, interval, points, with_interval
from tracker.core.prune_records import PruneRecord, PruneStep, Tested
from tracker.core.tables import Column, Table, estimate, table
from tracker.ledger.paired import Array
from tracker.report.page.studies import SEARCH
from tracker.stats.accuracy import accuracy_drop

Outcomes = Mapping[str, tuple[Array, Array]]
"""Name of a search → what each test document says without all that went (more is better), and its
weight."""
QUESTION = "What can go, and what does the model answer without it?"


def finding_of(
    name: str, records: Sequence[PruneRecord], outcomes: Outcomes, failed: Mapping[str, str]
) -> FindingRecord:
    """Say what searches of one file found."""
    groups = list(grouped(records))
    return FindingRecord(
        study=SEARCH,
        experiment=name,
        command="tracker prune",
        question=QUESTION,
        answers=tuple(line for each in groups for line in _answers(each, outcomes)),
        tables=tuple(made for each in groups for made in (_table(each), _sets(each))),
        charts=tuple(_frontier(each) for each in groups),
        lacking=tuple(f"{title}: {why}" for title, why in failed.items()),
        assumptions=ASSUMED,
        rests_on=tuple(dict.fromkeys(place for r in records for place in r.rests_on)),
    )


ASSUMED = (
    "What chose and what tests are different documents, so that accuracy after pruning is not "
    "flattered by the choice; the intervals of a step are those of the test documents.",
    "Accuracy: Wilson's interval; what is lost, and differences of two prunings: paired documents "
    "(Bonett and Price 2012).",
    "A runner-up is told apart where the 95 % interval of its paired loss to what was chosen, on "
    "the calibration documents, is above 0; of the best of many candidates it is rather hopeful.",
    "Cost: what a search needed, as if it had been alone. Evaluations: sets of removals, each on "
    "all calibration documents, which is what a loop over pruned models would run. Passes: what "
    "was computed for them, in passes of the intact model over these documents.",
)


def grouped(records: Sequence[PruneRecord]) -> Iterator[list[PruneRecord]]:
    """Put together what can be compared: one model, one benchmark and part of it, one unit."""
    groups: dict[object, list[PruneRecord]] = {}
    for one in records:
        key = (
            one.model.key,
            one.benchmark.model_dump_json(),
            one.metric,
            one.unit,
            one.part,
            one.baseline.n,
        )
        groups.setdefault(key, []).append(one)
    yield from groups.values()


def _level(record: PruneRecord, value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{points(value)} %" if record.higher_is_better else fixed(value, 3)


def _tested(record: PruneRecord, tested: Tested) -> str:
    write, unit = (points, " %") if record.higher_is_better else (WRITTEN["score"].write, "")
    return with_interval(tested.level, write, unit) if tested.accuracy is not None else "undefined"


def _end(record: PruneRecord) -> Tested:
    tested = record.steps[-1].test
    assert tested is not None
    return tested


def _rank(record: PruneRecord) -> float:
    """The larger, the worse the pruned model."""
    lost = _end(record).drop
    return float("inf") if lost is None else lost


def _answers(records: Sequence[PruneRecord], outcomes: Outcomes) -> Iterator[str]:
    first = records[0]
    metric = first.metric if first.metric != first.benchmark.primary_metric else "accuracy"
    metric = metric if first.higher_is_better else "loss"
    labels = _labels(records)
    for amount in dict.fromkeys(one.amount for one in records):
        some = sorted((one for one in records if one.amount == amount), key=_rank)
        best = some[0]
        yield (
            f"{first.model.name} on {_benchmark(first)}, {amount}: by {labels[best.name]} it goes "
            f"without {first.unit}s {', '.join(map(str, best.removed))} ({len(best.removed)} of "
            f"{first.model.layers}) and has a test {metric} of {_tested(best, _end(best))}, "
            f"unpruned {_tested(best, best.baseline)}, n = {best.baseline.n:,}. It is the best of "
            f"{counted(len(some), 'pruning')} by these documents."
        )
        for name in ("cosine_oneshot", "cosine", "random"):
            others = [one for one in some if one.strategy == name and one is not best]
            if others:
                yield _beside(best, others, outcomes)
        for one in some:
            if (said := _unsure(one)) is not None:
                yield f"{labels[one.name]}: {said}"


def _beside(best: PruneRecord, others: Sequence[PruneRecord], outcomes: Outcomes) -> str:
    """Say how much better a pruning is than those of another strategy."""
    levels = [_end(one).accuracy for one in others]
    defined = [value for value in levels if value is not None]
    what = others[0].strategy
    mean = statistics.fmean(defined) if defined else None
    draws = f", the mean of {counted(len(others), 'draw')}" if len(others) > 1 else ""
    text = f"By {what} it is {_level(best, mean)}{draws}"
    if len(others) == 1:
        (after, weights), (other, _) = outcomes[best.name], outcomes[others[0].name]
        apart = accuracy_drop(after, other, weights)
        if apart.value is not None:
            write = points if best.higher_is_better else (lambda v: fixed(v, 3))
            unit = " pp" if best.higher_is_better else ""
            between = interval(apart.low, apart.high, write)
            text += (
                f", {write(apart.value)}{unit} less"
                if best.higher_is_better
                else (f", {write(apart.value)} more")
            )
            text += f" ({between})" if between else ""
    return f"{text}."


def _unsure(record: PruneRecord) -> str | None:
    """Say where the calibration documents were too few to choose."""
    compared = [step for step in record.steps if step.margin is not None]
    unsure = [step for step in compared if not is_sure(step)]
    if not unsure:
        return None
    n = sum(each.n for each in record.calibration)
    enough = sorted(step.separates for step in unsure if step.separates is not None)
    text = (
        f"{counted(n, 'calibration document')} are too few to separate the choice "
        f"from the runner-up at {len(unsure)} of {counted(len(compared), 'step')}"
    )
    if enough:
        text += f"; about {enough[len(enough) // 2]:,} would at half of these"
    level = sum(step.margin == 0 for step in unsure)
    if level:
        text += f"; at {level} both are level"
    return text + "."


def is_sure(step: PruneStep) -> bool:
    """Whether the calibration documents tell the choice from the runner-up."""
    return step.margin_low is not None and step.margin_low > 0


def _table(records: Sequence[PruneRecord]) -> Table:
    first = records[0]
    part = f" of the {first.part} part" if first.part else ""
    labels = _labels(records)
    gone = "nothing is removed"

    def level(one: PruneRecord | None) -> Estimate:
        return (_end(one) if one else first.baseline).level

    def lost(one: PruneRecord | None) -> Estimate:
        return _end(one).lost if one else Estimate(None, reason=gone)

    def seconds(one: PruneRecord | None) -> Estimate:
        why = "measured by a tracker that did not say" if one else gone
        return estimate(one.cost.seconds if one else None, why)

    columns: tuple[Column[PruneRecord | None], ...] = (
        Column("strategy", "text", lambda one: labels[one.name] if one else "unpruned"),
        Column("amount", "text", lambda one: one.amount if one else ""),
        Column("removed", "text", lambda one: ", ".join(map(str, one.removed)) if one else ""),
        Column(
            "test accuracy" if first.higher_is_better else "test loss",
            _unit(first),
            level,
            _NO_SCORE,
        ),
        Column("lost", _unit(first, "points"), lost, _NO_SCORE),
        Column("evaluations", "count", lambda one: one.cost.evaluations if one else None, gone),
        Column("passes", "times", lambda one: one.cost.passes if one else None, gone),
        Column("seconds", "count", seconds),
    )
    return table(
        f"{first.model.name} · {_benchmark(first)}: pruned by each strategy, on "
        f"{counted(first.baseline.n, 'test document')}{part}",
        columns,
        [None, *sorted(records, key=_rank)],
        dict.fromkeys(_chosen_by(one) for one in records if one.calibration),
    )


_NO_SCORE = "a document has no finite score"


def _unit(record: PruneRecord, unit: Unit = "percent") -> Unit:
    """Say how a level, or a change in `points`, is written."""
    return unit if record.higher_is_better else "score"


def _chosen_by(record: PruneRecord) -> str:
    return f"calibration documents: {_calibration(record)}"


def _calibration(record: PruneRecord) -> str:
    return ", ".join(
        f"{each.n:,} of {each.benchmark}{f' ({each.part})' if each.part else ''}"
        for each in record.calibration
    )


def _labels(records: Sequence[PruneRecord]) -> dict[str, str]:
    """Name searches by their strategies, and by what they were calibrated on where that differs."""
    alike = Counter((one.label, one.amount) for one in records)
    return {
        one.name: f"{one.label}, {_calibration(one)}"
        if alike[one.label, one.amount] > 1 and one.calibration
        else one.label
        for one in records
    }


def _benchmark(record: PruneRecord) -> str:
    """Name the benchmark, with the seed that drew its halves where it is none of the usual."""
    seed = record.benchmark.seed
    return record.benchmark.name + ("" if seed in (None, DEFAULT_SEED) else f" (seed {seed})")


class _Step(NamedTuple):
    """A row: a step of a search, from 1."""

    search: PruneRecord
    number: int
    step: PruneStep


def _sets(records: Sequence[PruneRecord]) -> Table:
    """A row a step of each search that compared something."""
    first, labels = records[0], _labels(records)

    def score(row: _Step) -> Estimate:
        return estimate(row.step.score, row.step.reasons.get("score") or _NO_SCORE)

    def margin(row: _Step) -> Estimate:
        step = row.step
        why = step.reasons.get("margin") or "nothing was compared"
        return estimate(step.margin, why, step.margin_low, step.margin_high)

    def lost(row: _Step) -> Estimate:
        test = row.step.test
        assert test is not None
        return test.lost

    columns: tuple[Column[_Step], ...] = (
        Column("strategy", "text", lambda row: labels[row.search.name]),
        Column("step", "count", lambda row: row.number),
        Column(
            *(first.unit, "count", lambda row: row.step.layer, "the step chose all of its set"),
        ),
        Column("score", "times", score),
        Column("runner-up worse by", "times", margin),
        Column(
            "test accuracy lost" if first.higher_is_better else "test loss added",
            *(_unit(first, "points"), lost, _NO_SCORE),
        ),
    )
    return table(
        f"{first.model.name} · {_benchmark(first)}: step by step",
        columns,
        [_Step(one, number, step) for one in records for number, step in enumerate(one.steps, 1)],
        ["score: what the strategy makes small, on the calibration documents, in its unit"],
    )


def _frontier(records: Sequence[PruneRecord]) -> LineChart:
    """Test accuracy against how many parts are gone, a line a strategy."""
    first = records[0]
    longest: dict[str, PruneRecord] = {}
    labels = _labels(records)
    for one in sorted(records, key=lambda each: len(each.removed)):
        longest[labels[one.name]] = one  # several amounts of one strategy: the last has all steps
    most = max(len(one.removed) for one in records)
    lines = []
    for label, one in longest.items():
        at = {0: one.baseline, **{len(s.removed): s.test for s in one.steps if s.test}}
        tested = [at.get(count) for count in range(most + 1)]
        lines.append(Line.of(label, (each.level if each else None for each in tested)))
    return LineChart(
        title=f"{first.model.name} · {_benchmark(first)}: what is left, the more goes",
        x=f"{first.unit}s removed",
        y="test accuracy" if first.higher_is_better else "test loss",
        unit="percent" if first.higher_is_better else "score",
        places=tuple(range(most + 1)),
        lines=tuple(lines),
    )


def best(
    records: Sequence[PruneRecord], requests: Sequence[CellRequest | None]
) -> tuple[PruneRecord, CellRequest] | None:
    """Choose the pruning that tests best, with the request of its last step's run.

    None where none can be saved.
    """
    some = [
        (one, request)
        for one, request in zip(records, requests, strict=True)
        if one.unit == "layer" and request is not None
    ]
    return min(some, key=lambda each: _rank(each[0]), default=None)


def export_line(record: PruneRecord, asked: CellRequest, results: Path) -> str:
    """What to type to save a pruning, held against the documents that tested it."""
    words = ["tracker", "export", asked.model, "--dtype", asked.dtype]
    words += ["--remove", ",".join(map(str, record.removed)), "--output", "lighter"]
    for name, field in CellRequest.model_fields.items():
        value = getattr(asked, name)
        if name not in _SAID and (value != field.default or name == "benchmark"):
            words += [f"--{name}", _typed(value)]
    words += ["--results", str(results)] if results != Path("results") else []
    return shlex.join(words)


_SAID = ("model", "dtype", "layers", "components", "spans", "interventions", "only", "removed")


def _typed(value: object) -> str:
    """Write a setting as the command takes it."""
    if isinstance(value, tuple):
        return str(value[0]) if len(value) == 1 else json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
