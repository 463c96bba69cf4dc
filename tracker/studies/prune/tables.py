"""The tables of the study `prune`, of one model."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import counted
from tracker.core.prune_records import PruneRecord
from tracker.core.tables import Table
from tracker.studies.layout import Row, entry, estimated, table
from tracker.studies.prune.figures import OWN, TASKS, TEXT, Compared, Way

PAPER = "LLaMA3-8B, 25 % removed, in arXiv 2605.14075"
SHARE_OF_THE_PAPER = 0.25
HOURS_OF_THE_PAPER = 4.6
OF_THE_PAPER = {OWN: (0.6749, 0.5954), TASKS: (0.6504, 0.6010), TEXT: (0.5023, 0.5969)}
"""Mean test accuracies there, chosen by accuracy and by cosine; the plain text is C4."""
_NO_MEAN = "a mean needs two benchmarks that are above chance unpruned"


def tables_of(group: Compared) -> list[Table]:
    """Every table of the model."""
    found = []
    for amount in group.amounts:
        found.append(_accuracies(group, amount))
        if group.counted:
            found += [*_differences(group, amount), *_calibrations(group, amount)]
    return [*found, _costs(group)]


def how_many(group: Compared, amount: str) -> str:
    """Say how much goes: `25 % removed (8 of 32 layers)`."""
    gone = group.removed(amount)
    layers = "–".join(str(count) for count in dict.fromkeys((gone[0], gone[-1])))
    return f"{amount} removed ({layers} of {group.layers} layers)"


def _columns(group: Compared, unit: Unit) -> list[tuple[str, Unit]]:
    return [*((name, unit) for name in group.benchmarks), ("mean", unit)]


def _with_mean(group: Compared, each: Iterable[Estimate], mean: Estimate) -> list[Estimate]:
    last = estimated(mean) if len(group.counted) > 1 else Estimate(None, reason=_NO_MEAN)
    return [*map(estimated, each), last]


def _accuracies(group: Compared, amount: str) -> Table:
    rows: list[Row] = [
        ("unpruned", *_with_mean(group, group.unpruned.values(), group.unpruned_mean))
    ]
    for name in group.strategies(amount):
        way = Way(name, amount)
        levels = [group.level(way, each) for each in group.benchmarks]
        rows.append((name, *_with_mean(group, levels, group.level_mean(way))))
    measured = ", ".join(
        f"{name} {group.metrics[name]} (n = {group.n[name]:,})" for name in group.benchmarks
    )
    left_out = [
        f"{name} is left out of means and differences: {why}"
        for name, why in group.at_chance.items()
    ]
    return table(
        f"{group.title}: test accuracy, {how_many(group, amount)}, each benchmark pruned for by "
        "its own calibration documents",
        [("strategy", "text"), *_columns(group, "percent")],
        rows,
        [f"Test documents: {measured}.", *left_out, *_draws(group, amount)],
    )


def _draws(group: Compared, amount: str) -> list[str]:
    drawn = {
        way.strategy: len(one.records)
        for (way, _), one in group.found.items()
        if way.amount == amount and len(one.records) > 1
    }
    return [f"{name}: the mean of {counted(times, 'draw')}" for name, times in drawn.items()]


def _differences(group: Compared, amount: str) -> list[Table]:
    rows: list[Row] = []
    for each in group.beside(amount):
        apart = [group.apart(each.one, each.other, name) for name in group.benchmarks]
        rows.append(
            (
                each.other.strategy,
                *_with_mean(group, apart, each.found),
                entry(each.p, each.found.reason),
            )
        )
    if not rows:
        return []
    found = table(
        f"{group.title}: by how much pruning by accuracy answers more, {how_many(group, amount)}",
        [("than by", "text"), *_columns(group, "points"), ("p (Holm)", "p")],
        rows,
        [
            f"p: of the difference on {group.over}, by sign flips of the test documents, adjusted "
            "over the rows. Intervals are not adjusted."
        ],
    )
    return [found]


def _calibrations(group: Compared, amount: str) -> list[Table]:
    pairs = group.calibrated(amount)
    if not any(each.one.calibration != OWN for each in pairs):
        return []
    rows: list[Row] = [
        (
            each.one.calibration,
            estimated(group.level_mean(each.one)),
            estimated(group.level_mean(each.other)),
            estimated(each.found),
            entry(each.p, each.found.reason),
        )
        for each in pairs
    ]
    theirs = ", ".join(
        f"on {name} {100 * ours:.2f} and {100 * cosine:.2f}"
        for name, (ours, cosine) in OF_THE_PAPER.items()
    )
    found = table(
        f"{group.title}: what calibrates, {how_many(group, amount)}, {group.over}",
        [
            ("calibrated on", "text"),
            ("by accuracy", "percent"),
            (f"by {pairs[0].other.strategy}", "percent"),
            ("difference", "points"),
            ("p (Holm)", "p"),
        ],
        rows,
        [f"{PAPER}: {theirs} %, by accuracy and by cosine; plain text there is C4."],
    )
    return [found]


def _costs(group: Compared) -> Table:
    rows = [_cost(group, way) for way in group.ways if group.searches(way)]
    return table(
        f"{group.title}: what a search cost",
        [
            ("strategy", "text"),
            ("amount", "text"),
            ("calibrated on", "text"),
            ("searches", "count"),
            ("documents", "count"),
            ("evaluations", "count"),
            ("passes", "times"),
            ("seconds", "times"),
            ("choices not told apart", "text"),
        ],
        rows,
        [
            "Means of the searches: one a benchmark and draw, or one for all of them. "
            "Evaluations and passes are of all of a search's calibration documents; not told "
            "apart: steps at which these do not separate the choice from the runner-up.",
            f"{PAPER}, by accuracy: 228 evaluations in about {HOURS_OF_THE_PAPER} h, another model "
            "on another machine.",
        ],
    )


def _cost(group: Compared, way: Way) -> Row:
    searches = group.searches(way)
    unsure, compared = group.unsure(way)
    seconds = [record.cost.seconds for record in searches]
    known = [each for each in seconds if each is not None]
    return (
        way.strategy,
        way.amount,
        way.calibration if documents(searches) else "no documents",
        len(searches),
        documents(searches),
        statistics.fmean(record.cost.evaluations for record in searches),
        statistics.fmean(record.cost.passes for record in searches),
        statistics.fmean(known)
        if len(known) == len(seconds)
        else Estimate(None, reason="measured by a tracker that did not say"),
        f"{len(unsure)} of {compared}"
        if compared
        else Estimate(None, reason="nothing was compared document by document"),
    )


def documents(searches: Sequence[PruneRecord]) -> float:
    """How many calibration documents a search has on average."""
    return statistics.fmean(sum(each.n for each in one.calibration) for one in searches)
