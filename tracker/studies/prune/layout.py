"""The tables and charts of the study `prune`, of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tracker.core.estimates import Estimate, Unit
from tracker.core.findings import LineChart
from tracker.core.formats import counted
from tracker.core.tables import Column, Row, Table, table
from tracker.search.figures import calibration_documents, separated
from tracker.search.report import cost_columns, frontier
from tracker.studies.prune.figures import OWN, TASKS, TEXT, Beside, Compared, Way

PAPER = "LLaMA3-8B, 25 % removed, in arXiv 2605.14075"
SHARE_OF_THE_PAPER = 0.25
HOURS_OF_THE_PAPER = 4.6
OF_THE_PAPER = {OWN: (0.6749, 0.5954), TASKS: (0.6504, 0.6010), TEXT: (0.5023, 0.5969)}
"""Mean test accuracies there, chosen by accuracy and by cosine; the plain text is C4."""


def tables_of(group: Compared) -> list[Table]:
    """Every table of the model."""
    tables = []
    for amount in group.amounts:
        tables.append(_accuracies(group, amount))
        if group.counted:
            tables += [*_differences(group, amount), *_calibrations(group, amount)]
    return [*tables, _costs(group)]


def how_many(group: Compared, amount: str) -> str:
    """Say how much goes: `25 % removed (8 of 32 layers)`."""
    gone = group.removed(amount)
    layers = "–".join(str(count) for count in dict.fromkeys((gone[0], gone[-1])))
    return f"{amount} removed ({layers} of {group.layers} layers)"


def _with_mean(
    group: Compared, unit: Unit, of: Callable[[Row, str], Estimate], mean: Callable[[Row], Estimate]
) -> Iterator[Column[Row]]:
    """State a column for each benchmark, and the mean."""

    def column(name: str) -> Column[Row]:
        return Column(name, unit, lambda row: of(row, name))

    yield from map(column, group.benchmarks)
    none = Estimate(None, reason="a mean needs two benchmarks that are above chance unpruned")
    yield Column("mean", unit, lambda row: mean(row) if len(group.counted) > 1 else none)


def _accuracies(group: Compared, amount: str) -> Table:
    strategy: Column[Way | None] = Column(
        "strategy", "text", lambda way: way.strategy if way else "unpruned"
    )
    measured = ", ".join(
        f"{name} {benchmark.metric} (n = {benchmark.n:,})"
        for name, benchmark in group.benchmarks.items()
    )
    left_out = [
        f"{name} is left out of means and differences: {benchmark.at_chance}"
        for name, benchmark in group.benchmarks.items()
        if benchmark.at_chance
    ]
    drawn = {
        way.strategy: f"{way.strategy}: the mean of {counted(len(choices.records), 'draw')}"
        for (way, _), choices in group.found.items()
        if way.amount == amount and len(choices.records) > 1
    }
    return table(
        f"{group.title}: test accuracy, {how_many(group, amount)}, each benchmark pruned for by "
        "its own calibration documents",
        [strategy, *_with_mean(group, "percent", group.level, group.level_mean)],
        [None, *(Way(name, amount) for name in group.strategies(amount))],
        f"Test documents: {measured}.",
        *left_out,
        *drawn.values(),
    )


def _differences(group: Compared, amount: str) -> Iterator[Table]:
    pairs = group.beside(amount)
    if not pairs:
        return

    def apart(row: Beside, name: str) -> Estimate:
        return group.apart(row.one, row.other, name)

    yield table(
        f"{group.title}: by how much pruning by accuracy answers more, {how_many(group, amount)}",
        [
            Column("than by", "text", lambda row: row.other.strategy),
            *_with_mean(group, "points", apart, lambda row: row.found),
            Column("p (Holm)", "p", _p),
        ],
        pairs,
        f"p: of the difference on {group.over}, by sign flips of the test documents, "
        "adjusted over the rows. Intervals of the mean hold for all rows at once "
        "(Bonferroni), those of a benchmark each for itself.",
    )


def _p(row: Beside) -> Estimate:
    return Estimate(row.p, reason=row.found.reason)


def _calibrations(group: Compared, amount: str) -> Iterator[Table]:
    pairs = group.calibrated(amount)
    if not any(each.one.calibration != OWN for each in pairs):
        return
    theirs = ", ".join(
        f"on {name} {100 * ours:.2f} and {100 * cosine:.2f}"
        for name, (ours, cosine) in OF_THE_PAPER.items()
    )
    by_other = f"by {pairs[0].other.strategy}"
    columns: tuple[Column[Beside], ...] = (
        Column("calibrated on", "text", lambda row: row.one.calibration),
        Column("by accuracy", "percent", lambda row: group.level_mean(row.one)),
        Column(by_other, "percent", lambda row: group.level_mean(row.other)),
        Column("difference", "points", lambda row: row.found),
        Column("p (Holm)", "p", _p),
    )
    yield table(
        f"{group.title}: what calibrates, {how_many(group, amount)}, {group.over}",
        columns,
        pairs,
        f"{PAPER}: {theirs} %, by accuracy and by cosine; plain text there is C4.",
    )


def _costs(group: Compared) -> Table:
    def unsure(way: Way) -> str | None:
        found = separated(group.searches(way))
        return f"{len(found.unsure)} of {found.compared}" if found.compared else None

    def documents(way: Way) -> float:
        return calibration_documents(group.searches(way))

    def calibrated(way: Way) -> str:
        return way.calibration if documents(way) else "no documents"

    nothing = "nothing was compared document by document"
    columns: list[Column[Way]] = [
        Column("strategy", "text", lambda way: way.strategy),
        Column("amount", "text", lambda way: way.amount),
        Column("calibrated on", "text", calibrated),
        Column("searches", "count", lambda way: len(group.searches(way))),
        Column("documents", "count", documents),
        *cost_columns(group.searches),
        Column("choices not told apart", "text", unsure, nothing),
    ]
    return table(
        f"{group.title}: what a search cost",
        columns,
        [way for way in group.ways if group.searches(way)],
        "Means of the searches: one a benchmark and draw, or one for all of them. "
        "Evaluations and passes are of all of a search's calibration documents; not told "
        "apart: steps at which these do not separate the choice from the runner-up.",
        f"{PAPER}, by accuracy: 228 evaluations in about {HOURS_OF_THE_PAPER} h, another model "
        "on another machine.",
    )


def charts_of(group: Compared) -> list[LineChart]:
    """Draw what is left of the accuracy, the more layers go, a line a strategy."""
    if not group.counted:
        return []
    most = max(count for amount in group.amounts for count in group.removed(amount))
    names = dict.fromkeys(way.strategy for way in group.ways if way.calibration == OWN)
    levels = {name: [_at(group, name, removed) for removed in range(most + 1)] for name in names}
    return [
        frontier(f"{group.title}: what is left, the more goes, {group.over}", "layer", True, levels)
    ]


def _at(group: Compared, strategy: str, removed: int) -> Estimate:
    """The mean accuracy at a place, from the first amount that has it."""
    levels = [group.level_mean(Way(strategy, amount), removed) for amount in group.amounts]
    return next((level for level in levels if level.value is not None), levels[0])
