"""What searches found, beside each other: sentences, a table of strategies, and the frontier."""

from __future__ import annotations

import json
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from tracker.core.config import CellRequest
from tracker.core.estimates import Estimate, Unit
from tracker.core.extent import DEFAULT_SEED
from tracker.core.findings import FindingRecord, Line, LineChart
from tracker.core.formats import WRITTEN, counted, ends
from tracker.core.prune_records import PruneRecord, PruneStep
from tracker.core.tables import Column, Table, estimate, table
from tracker.ledger.paired import PairedOutcomes
from tracker.pruning.search.figures import (
    Choices,
    Searched,
    calibration_documents,
    end,
    level_text,
    lost,
    separated,
    tested,
)
from tracker.report.page.studies import SEARCH

Row = TypeVar("Row")
QUESTION = "What can go, and what does the model answer without it?"


def finding_of(name: str, searched: Sequence[Searched], failed: Mapping[str, str]) -> FindingRecord:
    """Say what searches of one file found."""
    records = [one.record for one in searched]
    groups = grouped(records)
    answered = {one.record.name: one.answered for one in searched}
    return FindingRecord(
        study=SEARCH,
        experiment=name,
        command="tracker prune",
        question=QUESTION,
        answers=tuple(line for each in groups for line in _answers(each, answered)),
        tables=tuple(made for each in groups for made in (_table(each), _sets(each))),
        charts=tuple(_frontier_of(each) for each in groups),
        lacking=tuple(f"{title}: {why}" for title, why in failed.items()),
        assumptions=ASSUMED,
        rests_on=tuple(dict.fromkeys(place for r in records for place in r.rests_on)),
    )


COST = (
    "Cost: what a search needed, as if it had been alone. Evaluations: sets of removals, each on "
    "all calibration documents, which is what a loop over pruned models would run. Passes: what "
    "was computed for them, in passes of the intact model over these documents."
)
ASSUMED = (
    "What chose and what tests are different documents, so that accuracy after pruning is not "
    "flattered by the choice; the intervals of a step are those of the test documents.",
    "Accuracy: Wilson's interval; what is lost, and differences of two prunings: paired documents "
    "(Bonett and Price 2012).",
    "A runner-up is told apart where the 95 % interval of its paired loss to what was chosen, on "
    "the calibration documents, is above 0; of the best of many candidates it is rather hopeful.",
    COST,
)


def grouped(records: Sequence[PruneRecord]) -> list[list[PruneRecord]]:
    """Put together what can be compared: one model, one benchmark and part of it, one unit."""
    groups: dict[object, list[PruneRecord]] = {}
    for one in records:
        benchmark = one.benchmark.model_dump_json()
        key = (one.model.key, benchmark, one.metric, one.unit, one.part, one.baseline.n)
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _level(record: PruneRecord, level: Estimate) -> str:
    if level.value is None:
        return f"undefined ({level.reason or _NO_SCORE})"
    return level_text(level, "%" if record.higher_is_better else "")


def _answers(
    records: Sequence[PruneRecord], answered: Mapping[str, PairedOutcomes]
) -> Iterator[str]:
    first = records[0]
    metric = first.metric if first.metric != first.benchmark.primary_metric else "accuracy"
    metric = metric if first.higher_is_better else "loss"
    labels = _labels(records)
    for amount in dict.fromkeys(one.amount for one in records):
        some = sorted((one for one in records if one.amount == amount), key=lost)
        best = some[0]
        yield (
            f"{first.model.name} on {_benchmark(first)}, {amount}: by {labels[best.name]} it goes "
            f"without {first.unit}s {', '.join(map(str, best.removed))} ({len(best.removed)} of "
            f"{first.model.layers}) and has a test {metric} of {_level(best, end(best).level)}, "
            f"unpruned {_level(best, best.baseline.level)}, n = {best.baseline.n:,}. It is the "
            f"best of {counted(len(some), 'pruning')} by these documents."
        )
        for name in ("cosine_oneshot", "cosine", "random"):
            others = [one for one in some if one.strategy == name and one is not best]
            if others:
                yield _beside(best, others, answered)
        for one in some:
            for sentence in unsure_sentence([one], "the choice"):
                yield f"{labels[one.name]}: {sentence}"


def _beside(
    best: PruneRecord, others: Sequence[PruneRecord], answered: Mapping[str, PairedOutcomes]
) -> str:
    """Say how much better a pruning is than those of another strategy."""
    levels = [end(one).accuracy for one in others]
    defined = [value for value in levels if value is not None]
    mean = statistics.fmean(defined) if defined else None
    draws = f", the mean of {counted(len(others), 'draw')}" if len(others) > 1 else ""
    text = f"By {others[0].strategy} it is {_level(best, Estimate(mean))}{draws}"
    mine, theirs = (
        Choices(tuple(some), tuple(answered[one.name] for one in some)) for some in ([best], others)
    )
    apart = mine.above(theirs)
    if len(others) == 1 and apart.value is not None:
        write = WRITTEN[_unit(best, "points")].write
        text += f", {write(apart.value)}{' pp less' if best.higher_is_better else ' more'}"
        text += ends(apart.low, apart.high, write)
    return f"{text}."


def unsure_sentence(searches: Sequence[PruneRecord], chosen: str, each: str = "") -> Iterator[str]:
    """Say where the calibration documents were too few to choose; nothing where they were not.

    `chosen` is what they had to tell from the runner-up, and `each` what has so many of them.
    """
    found = separated(searches)
    if not found.unsure:
        return
    text = (
        f"{counted(round(calibration_documents(searches)), 'calibration document')}{each} are too "
        f"few to separate {chosen} from the runner-up at {len(found.unsure)} of "
        f"{counted(found.compared, 'step')}"
    )
    if found.level:
        text += f", at {found.level} of which both are level"
    if found.enough is not None:
        half = "the others" if found.level else "these"
        text += f"; about {found.enough:,} would at half of {half}"
    yield text + "."


def cost_columns(searches: Callable[[Row], Sequence[PruneRecord]]) -> tuple[Column[Row], ...]:
    """State the columns of what a row's searches cost on average; nothing without any."""
    gone = "nothing is removed"

    def column(name: str, unit: Unit) -> Column[Row]:
        def mean(row: Row) -> Estimate:
            costs = [getattr(one.cost, name) for one in searches(row)]
            return estimate(statistics.fmean(costs) if costs else None, gone)

        return Column(name, unit, mean)

    return (column("evaluations", "count"), column("passes", "times"), column("seconds", "count"))


def frontier(
    title: str, unit: str, better: bool, levels: Mapping[str, Sequence[Estimate | None]]
) -> LineChart:
    """Draw what is left, the more goes: a line a strategy, of its level with 0, 1, … parts gone.

    `unit` is what goes, and `better` whether more of the level is.
    """
    return LineChart(
        title=title,
        x=f"{unit}s removed",
        y=_tested(better),
        unit="percent" if better else "score",
        places=tuple(range(max(map(len, levels.values())))),
        lines=tuple(Line.of(name, each) for name, each in levels.items()),
    )


def _table(records: Sequence[PruneRecord]) -> Table:
    first = records[0]
    part = f" of the {first.part} part" if first.part else ""
    labels = _labels(records)

    def level(one: PruneRecord | None) -> Estimate:
        return (end(one) if one else first.baseline).level

    def drop(one: PruneRecord | None) -> Estimate:
        return end(one).lost if one else Estimate(None, reason="nothing is removed")

    columns: tuple[Column[PruneRecord | None], ...] = (
        Column("strategy", "text", lambda one: labels[one.name] if one else "unpruned"),
        Column("amount", "text", lambda one: one.amount if one else "nothing"),
        Column("removed", "text", lambda one: ", ".join(map(str, one.removed)) if one else "none"),
        Column(_tested(first.higher_is_better), _unit(first), level, _NO_SCORE),
        Column("lost", _unit(first, "points"), drop, _NO_SCORE),
        *cost_columns(lambda one: [one] if one else []),
    )
    return table(
        f"{first.model.name} · {_benchmark(first)}: pruned by each strategy, on "
        f"{counted(first.baseline.n, 'test document')}{part}",
        columns,
        [None, *sorted(records, key=lost)],
        dict.fromkeys(
            f"calibration documents: {_calibration(one)}" for one in records if one.calibration
        ),
    )


_NO_SCORE = "a document has no finite score"


def _tested(higher_is_better: bool) -> str:
    return "test accuracy" if higher_is_better else "test loss"


def _unit(record: PruneRecord, unit: Unit = "percent") -> Unit:
    """Say how a level, or a change in `points`, is written."""
    return unit if record.higher_is_better else "score"


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

    search: str
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

    lost = "test accuracy lost" if first.higher_is_better else "test loss added"
    whole = "the step chose all of its set"
    columns: tuple[Column[_Step], ...] = (
        Column("strategy", "text", lambda row: row.search),
        Column("step", "count", lambda row: row.number),
        Column(first.unit, "count", lambda row: row.step.layer, whole),
        Column("score", "times", score),
        Column("runner-up worse by", "times", margin),
        Column(lost, _unit(first, "points"), lambda row: tested(row.step).lost, _NO_SCORE),
    )
    return table(
        f"{first.model.name} · {_benchmark(first)}: step by step",
        columns,
        [_Step(labels[one.name], *step) for one in records for step in enumerate(one.steps, 1)],
        ["score: what the strategy makes small, on the calibration documents, in its unit"],
    )


def _frontier_of(records: Sequence[PruneRecord]) -> LineChart:
    first = records[0]
    labels = _labels(records)
    ascending = sorted(records, key=lambda record: len(record.removed))
    # Several amounts of one strategy: the last has all steps.
    longest = {labels[record.name]: record for record in ascending}
    most = len(ascending[-1].removed)
    levels: dict[str, list[Estimate | None]] = {}
    for label, one in longest.items():
        at = {0: one.baseline, **{len(s.removed): s.test for s in one.steps if s.test}}
        levels[label] = [at[n].level if n in at else None for n in range(most + 1)]
    title = f"{first.model.name} · {_benchmark(first)}: what is left, the more goes"
    return frontier(title, first.unit, first.higher_is_better, levels)


def best(searched: Sequence[Searched]) -> tuple[PruneRecord, CellRequest] | None:
    """Choose the pruning that tests best, with the request of its last step's run.

    None where none can be saved.
    """
    some = [
        (one.record, one.request)
        for one in searched
        if one.record.unit == "layer" and one.request is not None
    ]
    return min(some, key=lambda chosen: lost(chosen[0]), default=None)


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
