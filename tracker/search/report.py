"""Report the results of searches: levels, differences, sentences, tables, and the frontier."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tracker.analysis.paired import PairedOutcomes
from tracker.core.config import KEYS, CellRequest, CellSettings, ChangeGrid
from tracker.core.estimates import Estimate, Unit
from tracker.core.extent import DEFAULT_SEED
from tracker.core.findings import SEARCH, FindingRecord, Line, LineChart
from tracker.core.formats import (
    NO_SCORE,
    WRITTEN,
    counted,
    level_text,
    listed,
    with_interval,
)
from tracker.core.grouping import grouped
from tracker.core.kinds import NUMBERED, Component
from tracker.core.prune_records import PruneRecord, PruneStep, Tested
from tracker.core.search_parts import many_of
from tracker.core.tables import Column, Row, Table, table
from tracker.search.request import Goal
from tracker.search.search import Recommended
from tracker.search.settings import in_words
from tracker.search.strategies import NULL
from tracker.stats.accuracy import accuracy, accuracy_drop
from tracker.stats.arrays import Array
from tracker.stats.support import together

if TYPE_CHECKING:
    from tracker.search.request import SearchRequest


def tested(step: PruneStep) -> Tested:
    """Return the test documents' outcome of a step."""
    assert step.test is not None  # a search is stored once its steps are tested
    return step.test


def end(record: PruneRecord) -> Tested:
    """Return the test documents' outcome of all that a search removed."""
    return tested(record.steps[-1])


@dataclass(frozen=True)
class Searched:
    """Result of one draw of a search, and the test documents' outcomes.

    Attributes:
        asked: The search.
        record: Its record.
        answered: Outcomes of the test documents after each step, more being better.
        request: The request of the last step that is a run; None if none is.
    """

    asked: SearchRequest
    record: PruneRecord
    answered: PairedOutcomes
    request: CellRequest | None


@dataclass(frozen=True)
class Choices:
    """Results of one strategy for one benchmark, one per draw.

    Attributes:
        records: The searches; several if the strategy draws.
        answered: Outcomes of the test documents after each step of each, more being better.
    """

    records: tuple[PruneRecord, ...]
    answered: tuple[PairedOutcomes, ...]

    @property
    def weights(self) -> Array:
        """The weights of the test documents."""
        return self.answered[0].weights

    @property
    def outcomes(self) -> Array:
        """The final outcome of each test document, averaged over draws."""
        outcomes: Array = np.stack([paired.ablated[:, -1] for paired in self.answered]).mean(axis=0)
        return outcomes

    @property
    def level(self) -> Estimate:
        """The final test accuracy."""
        return accuracy(self.outcomes, self.weights)

    def at(self, removed: int) -> Estimate:
        """Return the test accuracy with a number of layers removed; None if no step ends there."""
        outcomes = []
        for record, paired in zip(self.records, self.answered, strict=True):
            by_count = {0: paired.baseline} | {
                len(step.removed): after
                for step, after in zip(record.steps, paired.ablated.T, strict=True)
            }
            if removed not in by_count:
                return Estimate(None, reason="no step removes so many")
            outcomes.append(by_count[removed])
        return accuracy(np.stack(outcomes).mean(axis=0), self.weights)

    def above(self, other: Choices) -> Estimate:
        """Estimate the difference from other choices, on the same documents."""
        return accuracy_drop(self.outcomes, other.outcomes, self.weights)


@dataclass(frozen=True)
class Separated:
    """Steps at which the calibration documents separate the choice from the runner-up, or not.

    Attributes:
        compared: Number of steps that had a runner-up.
        unsure: Steps at which the 95 % interval of the margin reaches 0.
    """

    compared: int
    unsure: tuple[PruneStep, ...]

    @property
    def level(self) -> int:
        """The number of unsure steps at which both score the same."""
        return sum(step.margin.value == 0 for step in self.unsure)

    @property
    def enough(self) -> int | None:
        """About how many documents would separate half of the others; None without others."""
        needed = [step.separates for step in self.unsure if step.separates is not None]
        return statistics.median_high(needed) if needed else None


def separated(searches: Sequence[PruneRecord]) -> Separated:
    """Find the steps of some searches at which their documents are too few to choose."""
    compared = [s for search in searches for s in search.steps if s.margin.value is not None]
    unsure = [s for s in compared if s.margin.low is None or s.margin.low <= 0]
    return Separated(len(compared), tuple(unsure))


def calibration_documents(searches: Sequence[PruneRecord]) -> float:
    """Return the mean number of calibration documents of searches."""
    return statistics.fmean(sum(cell.n for cell in search.calibration) for search in searches)


QUESTION = "What can go, and what does the model answer without it?"


def finding_of(
    name: str,
    searched: Sequence[Searched],
    recommended: Mapping[Goal, Recommended],
    failed: Mapping[str, str],
) -> FindingRecord:
    """Return the finding of the searches of one file."""
    # One model, one set of test documents and one unit share one table.
    groups = grouped(searched, lambda one: one.asked.goal[:2]).values()
    records = [[one.record for one in some] for some in groups]
    return FindingRecord(
        study=SEARCH,
        experiment=name,
        command="tracker prune",
        question=QUESTION,
        answers=tuple(line for some in groups for line in _answers(some, recommended)),
        tables=tuple(made for each in records for made in (_table(each), _sets(each))),
        charts=tuple(map(_frontier_of, records)),
        lacking=tuple(f"{title}: {why}" for title, why in failed.items()),
        assumptions=ASSUMED,
        rests_on=tuple(dict.fromkeys(place for one in searched for place in one.record.rests_on)),
    )


COST = (
    "Cost: what a search needed, as if it had been alone. Evaluations: sets of removals, each on "
    "all calibration documents, which is what a loop over pruned models would run. Passes: what "
    "was computed for them, in passes of the intact model over these documents."
)
ASSUMED = (
    "What chose and what tests are different documents, so that accuracy after pruning is not "
    "flattered by the choice; the intervals of a step are those of the test documents.",
    "What is recommended chose on calibration documents: of the sets of all strategies but random, "
    "the one that loses least on them. Test documents choose nothing.",
    "Accuracy: Wilson's interval; what is lost, and differences of two prunings: paired documents "
    "(Bonett and Price 2012), of the sentences for all their differences at once (Bonferroni). Of "
    "several random draws the mean counts, document by document.",
    "A runner-up is told apart where the interval of its paired loss to what was chosen, on the "
    "calibration documents, is above 0; with 95 % it holds beside every other candidate of the "
    "step (Bonferroni).",
    COST,
)


def _level(record: PruneRecord, level: Estimate) -> str:
    return level_text(level, "%" if record.higher_is_better else "")


def _answers(
    searched: Sequence[Searched], recommended: Mapping[Goal, Recommended]
) -> Iterator[str]:
    labels = _labels([one.record for one in searched])
    for goal in dict.fromkeys(one.asked.goal for one in searched):
        some = [one for one in searched if one.asked.goal == goal]
        chosen = chosen_of(some, recommended[goal])
        first = some[0].record
        head = f"{first.model.name} on {_benchmark(first)}, {first.amount}"
        if chosen:
            text = f"{head}: {_set(chosen, labels)}{_why(some, recommended[goal], labels)}"
        else:
            text = (
                f"{head}: nothing is recommended, since {recommended[goal].reason}. Unpruned it "
                f"has a test {_metric(first)} of {_level(first, first.baseline.level)}, "
                f"n = {first.baseline.n:,}."
            )
        yield " ".join((text, *constrained(first)))
        yield from _beside(some, chosen)
        for one in some:
            for sentence in unsure_sentence([one.record], "the choice"):
                yield f"{labels[one.record.name]}: {sentence}"


def constrained(record: PruneRecord) -> Iterator[str]:
    """Yield a sentence for each constraint of a search."""
    unit = record.unit
    if record.protected:
        verb = "was" if len(record.protected) == 1 and unit not in NUMBERED else "were"
        words = _parts(unit, record.protected)
        yield f"{words[0].upper()}{words[1:]} {verb} protected."
    if record.among is not None:
        yield f"Only {_parts(unit, record.among)} could go."
    for kind, said in record.at_least.items():
        count, _, width = said.partition(" of ")
        some = f"any {width} {unit}s in a row" if width else f"all {unit}s"
        yield f"Of {some} at least {count} of kind {kind} had to stay."


def _parts(unit: Component, layers: Sequence[int]) -> str:
    of = f"{many_of(unit)} of layer" if unit in NUMBERED else unit
    return f"{of}{'s' if len(layers) > 1 else ''} {listed(in_words(layers))}"


def chosen_of(searched: Sequence[Searched], found: Recommended) -> list[Searched]:
    """Return the searches with one goal that chose the recommended set."""
    return [
        one
        for one in searched
        if one.asked.strategy != NULL and one.record.removed == found.removed
    ]


def _metric(record: PruneRecord) -> str:
    if not record.higher_is_better:
        return "loss"
    return "accuracy" if record.metric == record.benchmark.primary_metric else record.metric


def _set(chosen: Sequence[Searched], labels: Mapping[str, str]) -> str:
    """Describe a set, and the test documents' outcome."""
    record = chosen[0].record
    by = listed([labels[one.record.name] for one in chosen])
    return (
        f"by {by} it goes without {many_of(record.unit)} {record.names} "
        f"({len(record.removed)} of {record.there or record.model.layers}) and has a test "
        f"{_metric(record)} of {_level(record, end(record).level)}, unpruned "
        f"{_level(record, record.baseline.level)}, n = {record.baseline.n:,}."
    )


def _why(searched: Sequence[Searched], found: Recommended, labels: Mapping[str, str]) -> str:
    """Describe why a set is recommended, with a leading space; empty if it is the only one."""
    if found.step is None or found.decided_on is None:
        return ""
    step, count = found.step, counted(found.decided_on.n, "calibration document")
    text = f" Of {found.of} sets none loses less on {count}, so that this is recommended"
    if step.margin.value is None or (step.margin.low is not None and step.margin.low > 0):
        return f"{text}."
    second = (one.record for one in searched if one.record.removed == step.runner_up)
    next_ = listed([labels[one.name] for one in second if one.strategy != NULL])
    return f"{text}; they are too few to tell it from that of {next_}."


def _beside(searched: Sequence[Searched], chosen: Sequence[Searched]) -> Iterator[str]:
    """Yield comparisons of other strategies with the recommended set, tested simultaneously."""
    others = []
    for name in ("cosine_oneshot", "cosine", NULL):
        own = [one for one in searched if one.asked.strategy == name and one not in chosen]
        if own:
            others.append(own)
    apart = [
        _choices(chosen[:1]).above(_choices(some)) if chosen else Estimate(None) for some in others
    ]
    documents = [some[0].record.baseline.n for some in others]
    yield from map(_other, others, together(apart, documents))


def _choices(searched: Sequence[Searched]) -> Choices:
    records, answered = zip(*((one.record, one.answered) for one in searched), strict=True)
    return Choices(records, answered)


def _other(searched: Sequence[Searched], found: Estimate) -> str:
    """Describe the result of a strategy, and its difference from the recommended set."""
    record = searched[0].record
    levels = [end(one.record).level.value for one in searched]
    known = [level for level in levels if level is not None]
    mean = statistics.fmean(known) if len(known) == len(levels) else None
    draws = f", the mean of {counted(len(levels), 'draw')}" if len(levels) > 1 else ""
    text = f"By {record.strategy} it is {_level(record, Estimate(mean))}{draws}"
    if found.value is None or found.low is None or found.high is None:
        return f"{text}."
    write = WRITTEN[_unit(record, "points")].write
    less = (found.value >= 0) == record.higher_is_better
    size = found if found.value >= 0 else -found
    unit = f"{' pp' if record.higher_is_better else ''} {'less' if less else 'more'}"
    chance = "" if (size.low or 0.0) > 0 else ", which may be chance"
    return f"{text}: {with_interval(size, write, unit)}{chance}."


def unsure_sentence(searches: Sequence[PruneRecord], chosen: str, each: str = "") -> Iterator[str]:
    """Describe steps at which the calibration documents were too few to choose, if any.

    `chosen` names the choice that they had to separate from the runner-up. `each` is appended to
    the number of documents.
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
    """Return the columns of the mean cost of a row's searches; undefined without any."""
    gone = "nothing is removed"

    def column(name: str, unit: Unit) -> Column[Row]:
        def mean(row: Row) -> Estimate:
            costs = [getattr(one.cost, name) for one in searches(row)]
            return Estimate(statistics.fmean(costs) if costs else None, reason=gone)

        return Column(name, unit, mean)

    return (column("evaluations", "count"), column("passes", "times"), column("seconds", "count"))


def frontier(
    title: str, unit: Component, better: bool, levels: Mapping[str, Sequence[Estimate | None]]
) -> LineChart:
    """Draw levels against the number of removed parts: a line per strategy, from 0 parts on.

    `unit` is the kind of parts, and `better` whether a higher level is better.
    """
    return LineChart(
        title=title,
        x=f"{many_of(unit)} removed",
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
        Column("removed", "text", lambda one: one.names if one else "none"),
        Column(_tested(first.higher_is_better), _unit(first), level, NO_SCORE),
        Column("lost", _unit(first, "points"), drop, NO_SCORE),
        *cost_columns(lambda one: [one] if one else []),
    )
    return table(
        f"{first.model.name} · {_benchmark(first)}: pruned by each strategy, on "
        f"{counted(first.baseline.n, 'test document')}{part}",
        columns,
        [None, *records],
        *_numbered(first),
        *dict.fromkeys(
            f"calibration documents: {_calibration(one)}" for one in records if one.calibration
        ),
    )


def _numbered(record: PruneRecord) -> Iterator[str]:
    """Explain names such as 12.5 by the first one."""
    if record.unit in NUMBERED:
        parts, first = record.parts, record.removed[0]
        name, layer, number = parts.name(first), parts.layer_of(first), parts.number_of(first)
        yield f"{name}: {record.unit} {number} of layer {layer}, both counted from 0"


def _tested(higher_is_better: bool) -> str:
    return "test accuracy" if higher_is_better else "test loss"


def _unit(record: PruneRecord, unit: Unit = "percent") -> Unit:
    """Return the unit of a level, or of a change in `points`."""
    return unit if record.higher_is_better else "score"


def _calibration(record: PruneRecord) -> str:
    return ", ".join(
        f"{each.n:,} of {each.benchmark}{f' ({each.part})' if each.part else ''}"
        for each in record.calibration
    )


def _labels(records: Sequence[PruneRecord]) -> dict[str, str]:
    """Return labels of searches: their strategies, and other differences between equal ones.

    That is the calibration benchmarks and the constraints.
    """
    found = {}
    for alike in grouped(records, lambda one: (one.label, one.amount)).values():
        for one in alike:
            words = [text(one) for text in (_calibration, _stays) if len(set(map(text, alike))) > 1]
            found[one.name] = ", ".join(filter(None, (one.label, *words)))
    return found


def _stays(record: PruneRecord) -> str:
    """Describe the constraints as a part of a label."""
    among = "" if record.among is None else f"among {listed(in_words(record.among))}"
    protected = f"without {listed(in_words(record.protected))}" if record.protected else ""
    least = (f"{said} {kind} left" for kind, said in record.at_least.items())
    return ", ".join(filter(None, (among, protected, *least)))


def _benchmark(record: PruneRecord) -> str:
    """Return the benchmark's name, with the seed of its halves unless it is the default."""
    seed = record.benchmark.seed
    return record.benchmark.name + ("" if seed in (None, DEFAULT_SEED) else f" (seed {seed})")


class _Step(NamedTuple):
    """A row: a step of a search, counted from 1."""

    search: str
    number: int
    step: PruneStep


def _sets(records: Sequence[PruneRecord]) -> Table:
    """Build the table of the steps of searches, one row each."""
    first, labels = records[0], _labels(records)

    def name(row: _Step) -> str | None:
        return None if row.step.layer is None else first.parts.name(row.step.layer)

    def score(row: _Step) -> Estimate:
        return Estimate(row.step.score, reason=row.step.reasons.get("score") or NO_SCORE)

    def margin(row: _Step) -> Estimate:
        why = row.step.reasons.get("margin") or "nothing was compared"
        return replace(row.step.margin, reason=why)

    lost = "test accuracy lost" if first.higher_is_better else "test loss added"
    whole = "the step chose all of its set"
    of_steps: Column[_Step] = Column(first.unit, "count", lambda row: row.step.layer, whole)
    if first.unit in NUMBERED:
        of_steps = Column(first.unit, "text", name, whole)
    columns: tuple[Column[_Step], ...] = (
        Column("strategy", "text", lambda row: row.search),
        Column("step", "count", lambda row: row.number),
        of_steps,
        Column("score", "times", score),
        Column("runner-up worse by", "times", margin),
        Column(lost, _unit(first, "points"), lambda row: tested(row.step).lost, NO_SCORE),
    )
    return table(
        f"{first.model.name} · {_benchmark(first)}: step by step",
        columns,
        [_Step(labels[one.name], *step) for one in records for step in enumerate(one.steps, 1)],
        "score: what the strategy makes small, on the calibration documents, in its unit",
    )


def _frontier_of(records: Sequence[PruneRecord]) -> LineChart:
    first = records[0]
    labels = _labels(records)
    ascending = sorted(records, key=lambda record: len(record.removed))
    # Of several amounts of one strategy, the last has all steps.
    longest = {labels[record.name]: record for record in ascending}
    most = len(ascending[-1].removed)
    levels: dict[str, list[Estimate | None]] = {}
    for label, one in longest.items():
        at = {0: one.baseline, **{len(s.removed): s.test for s in one.steps if s.test}}
        levels[label] = [at[n].level if n in at else None for n in range(most + 1)]
    title = f"{first.model.name} · {_benchmark(first)}: what is left, the more goes"
    return frontier(title, first.unit, first.higher_is_better, levels)


def savable(
    searched: Sequence[Searched], recommended: Mapping[Goal, Recommended]
) -> tuple[Searched, CellRequest] | None:
    """Find the first recommended set that can be saved, with the request of its last step's run.

    It belongs to the first model, benchmark and amount of the file; None if none can be saved.
    """
    for goal, found in recommended.items():
        some = [one for one in searched if one.asked.goal == goal]
        for one in chosen_of(some, found):
            if one.asked.unit == "layer" and one.request is not None:
                return one, one.request
    return None


def export_line(record: PruneRecord, asked: CellRequest, results: Path) -> str:
    """Return the command that saves a pruning, proved on the documents that tested it."""
    removed = ["--remove", ",".join(map(str, record.removed)), "--output", "lighter"]
    return saving_line(removed, asked, results)


def saving_line(change: Sequence[str], asked: CellRequest, results: Path) -> str:
    """Return the command that saves a changed model, proved on a request's documents."""
    settings = asked.settings
    words = ["tracker", "export", settings.model, "--dtype", settings.dtype, *change]
    for name in KEYS.values():
        value = getattr(settings, name)
        if name not in _SAID and value != CellSettings.model_fields[name].default:
            words += [f"--{name}", _typed(value)]
    words += ["--results", str(results)] if results != Path("results") else []
    return shlex.join(words)


_SAID = {*ChangeGrid.model_fields, "model", "dtype", "removed"}


def _typed(value: object) -> str:
    """Format a setting as the command takes it."""
    if isinstance(value, tuple):
        return str(value[0]) if len(value) == 1 else json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
