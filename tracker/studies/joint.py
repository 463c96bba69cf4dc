"""Study: compare the joint drop of two layers with the sum of their single drops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tracker.analysis.aligned import Strata
from tracker.analysis.paired import PairedOutcomes
from tracker.core.changes import Ablation
from tracker.core.config import CellRequest
from tracker.core.estimates import Estimate, Unit
from tracker.core.findings import LineChart, MapChart
from tracker.core.formats import WRITTEN, measure_of, with_interval
from tracker.core.records import CellRecord
from tracker.core.tables import Column, Table, table
from tracker.stats.accuracy import mean_interval
from tracker.stats.arrays import Array
from tracker.stats.effects import additivity, interactions
from tracker.stats.resampling import RESAMPLES, SEED, resampled_means
from tracker.stats.support import pairs as pairs_among
from tracker.stats.support import ranks, together
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    study_texts,
)
from tracker.studies.layout import line_chart, rank_estimate
from tracker.studies.registry import JointSettings

Pair = tuple[int, int]
STRONGEST = 10
"""Pairs of each sign that a table lists."""
RATE = f"{100 * SIGNIFICANT:.0f} %"
TEXTS = study_texts("joint", rate=RATE)


class Joint(Study[JointSettings]):
    """Removes every two layers of a file together."""

    name = "joint"
    question = "Do the drops of two layers add up when both are removed?"
    intact = True
    layers = 2
    texts = TEXTS

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield the cell, and each layer with all later ones."""
        layers = cell.changes.whole_layers
        yield cell.with_changes(layers=layers)
        for n, layer in enumerate(layers[:-1], 1):
            yield replace(cell, removed=(layer,)).with_changes(layers=layers[n:])

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Compare the joint drops of each cell with the sums."""
        result = StudyResult()
        measured: list[Pairs] = []
        for subject in subjects:
            if not subject.record.removed:
                measures, reasons = measures_of(subject)
                result.lack(subject.record.title, *reasons)
                measured += measures
        if not (rows := adjusted(measured)):
            result.add("No pair could be compared with the sum of its layers.")
            return result
        result.add(summary(rows))
        for pairs in rows:
            tables = (strongest_table(pairs, sign) for sign in (1, -1))
            result.add(answer_of(pairs), *(table for table in tables if table.rows))
            result.add(interaction_map(pairs), distance_chart(pairs))
        return result


# Figures


@dataclass(frozen=True)
class Pairs:
    """Interactions of all pairs of one cell, by one measure.

    Attributes:
        record: Record of the cell.
        measure: Name of the measure.
        unit: Unit of its values.
        pairs: Measured pairs, first < second.
        alone: Layer → its drop alone.
        together: `[pairs]`, joint drops.
        interactions: Interaction of each pair.
        q: `[pairs]`, p-values after Benjamini and Hochberg; NaN at the floor, and before
            `adjusted`.
        floor: `[pairs]`, whether too little is left to lose for a sum.
        mean: Mean interaction over pairs that are not at the floor.
        by_distance: Distance of layers → mean interaction of these pairs.
        rank: Spearman correlation of sums and joint drops, over these pairs.
        explained: R² of the sums as predictions.
        documents: Number of documents.
    """

    record: CellRecord
    measure: str
    unit: Unit
    pairs: tuple[Pair, ...]
    alone: Mapping[int, float]
    together: Array
    interactions: Sequence[Estimate]
    q: Array
    floor: NDArray[np.bool_]
    mean: Estimate
    by_distance: Mapping[int, Estimate]
    rank: Estimate
    explained: Estimate
    documents: int

    @property
    def open(self) -> list[int]:
        """The pairs that are not at the floor, by their places."""
        return [index for index, at in enumerate(self.floor) if not at]

    @cached_property
    def at_once(self) -> dict[int, Estimate]:
        """Place → its interaction, with an interval that holds for all pairs off the floor."""
        return dict(zip(self.open, self._wide(len(self.open)), strict=True))

    @cached_property
    def ranks(self) -> dict[int, tuple[int, int]]:
        """The possible ranks of the interactions by index, simultaneous; 1 for the largest."""
        wide = self._wide(pairs_among(len(self.open)))
        return dict(zip(self.open, ranks(wide), strict=True))

    def _wide(self, family: int) -> list[Estimate]:
        """Return the interactions off the floor, with intervals for a family of statements.

        All are widened as t intervals. Those of 0/1 outcomes are normal intervals, which become
        a little too wide.
        """
        open_ = [replace(self.interactions[index], p_value=None) for index in self.open]
        return together(open_, [self.documents] * len(open_), family)

    def strongest(self, sign: int) -> int | None:
        """Return the index of the pair that is shown to interact most; None if open."""
        end = (1, 1) if sign > 0 else (len(self.open), len(self.open))
        for index, between in self.ranks.items():
            if between == end and sign * self.at_once[index].side() > 0:
                return index
        return None

    def write(self, drop: Estimate | float) -> str:
        """Write a drop with its unit, and its interval where it has one."""
        form = WRITTEN[self.unit]
        unit = f" {form.name}" if form.name else ""
        return with_interval(Estimate(drop) if isinstance(drop, float) else drop, form.write, unit)

    def significant(self, sign: int) -> list[int]:
        """Return the indexes of the significant interactions of a sign."""
        with np.errstate(invalid="ignore"):
            (few,) = np.nonzero(self.q <= SIGNIFICANT)
        return [n for n in map(int, few) if sign * (self.value(n) or 0) > 0]

    def value(self, index: int) -> float | None:
        """Return the interaction of a pair; None if it is undefined or at the floor."""
        return None if self.floor[index] else self.interactions[index].value


def measures_of(subject: Subject) -> tuple[list[Pairs], list[str]]:
    """Return the interactions of a cell by every measure, and the reasons of missing ones."""
    record = subject.record
    all_pairs = list(combinations([run.layer for run in subject.view.runs], 2))
    outcomes = subject.outcomes(besides=[Ablation.of(removed=pair) for pair in all_pairs])
    layers = [run.layer for run in outcomes.runs]
    pairs = [pair for pair in combinations(layers, 2) if outcomes.has(Ablation.of(removed=pair))]
    if not pairs or len(outcomes.tasks) < 2:
        return [], [f"{len(pairs)} pairs on {len(outcomes.tasks)} documents are measured"]
    reasons = []
    if len(pairs) < len(all_pairs):
        reasons.append(f"{len(all_pairs) - len(pairs)} of {len(all_pairs)} pairs are not measured")
    layers = sorted({layer for pair in pairs for layer in pair})
    ablations = [
        Ablation.of(removed=layers) for layers in [*((layer,) for layer in layers), *pairs]
    ]
    room = None
    if record.baseline.value is not None and record.chance_accuracy is not None:
        room = record.baseline.value - record.chance_accuracy
    measure_names, metric = measure_of(record), outcomes.by_metric(ablations)
    by_measure: list[Pairs] = []
    for measure, unit, paired, most in (
        (measure_names.change, measure_names.form, metric, room),
        ("gold log-prob drop", "nats", outcomes.by_gold_logprob(ablations), None),
    ):
        if bad := int((~np.isfinite(paired.drops).all(axis=1)).sum()):
            reasons.append(
                f"{measure}: {bad} of {len(paired.drops)} documents have no finite score"
            )
        elif most is not None and most <= 0:
            reasons.append(
                f"{measure}: the baseline is at or below chance, so there is nothing to lose; "
                "the gold log-prob drop has no floor"
            )
        else:
            drops = (paired, layers, pairs, outcomes.strata, most)
            by_measure.append(pairs_of(record, measure, unit, *drops))
    return by_measure, reasons


def pairs_of(
    record: CellRecord,
    measure: str,
    unit: Unit,
    paired: PairedOutcomes,
    layers: Sequence[int],
    pairs: Sequence[Pair],
    strata: Strata | None,
    room: float | None,
) -> Pairs:
    """Compare joint drops with sums; `adjusted` tests them.

    `paired` has the layers' ablations, then those of the pairs. `room` is the largest possible
    loss; None if it is unbounded.
    """
    drops, weights = paired.drops, paired.weights
    first, second = (np.array([layers.index(pair[end]) for pair in pairs]) for end in (0, 1))

    def sums(figures: Array) -> Array:
        return figures[..., first] + figures[..., second]

    single, both = drops[:, : len(layers)], drops[:, len(layers) :]
    values = both - sums(single)
    alone, together = weights @ single, weights @ both
    most = np.max([alone[first], alone[second], sums(alone)], axis=0)
    # A sum of fractions can exceed the accuracy that there is to lose by rounding alone.
    floor = np.zeros(len(pairs), bool) if room is None else most > room + 1e-9
    (open_,) = np.nonzero(~floor)
    drawn = resampled_means(drops, RESAMPLES, SEED, strata, weights)
    drawn_both = sums(drawn)[:, open_], drawn[:, len(layers) + open_]
    rank, explained = additivity(sums(alone)[open_], together[open_], drawn_both)

    def mean_over(chosen: NDArray[np.int64]) -> Estimate:
        if not len(chosen):
            return Estimate(None, reason="all such pairs are at the floor")
        per_document = values[:, chosen].mean(axis=1)
        return Estimate(float(weights @ per_document), *mean_interval(per_document, weights))

    apart = np.array([j - i for i, j in pairs])
    return Pairs(
        record,
        measure,
        unit,
        pairs=tuple(pairs),
        alone=dict(zip(layers, alone.tolist(), strict=True)),
        together=together,
        interactions=interactions(values, weights, SEED),
        q=np.full(len(pairs), np.nan),
        floor=floor,
        mean=mean_over(open_),
        by_distance={d: mean_over(open_[apart[open_] == d]) for d in sorted({*apart.tolist()})},
        rank=rank,
        explained=explained,
        documents=len(drops),
    )


def adjusted(every: Sequence[Pairs]) -> list[Pairs]:
    """Adjust the p-values of all pairs of a study that are off the floor (Benjamini-Hochberg)."""
    p_values = [pairs.interactions[index].p_value for pairs in every for index in pairs.open]
    q = iter(stats.false_discovery_control(p_values) if p_values else [])
    return [
        replace(pairs, q=np.array([np.nan if at else next(q) for at in pairs.floor]))
        for pairs in every
    ]


# Sentences, tables and charts


def answer_of(pairs: Pairs) -> str:
    """Describe whether sums predict joint drops, and which pairs interact most."""
    return TEXTS.one("answer", pairs, pairs.record, int(pairs.floor.sum()))


def summary(rows: Sequence[Pairs]) -> Table:
    """Build the table that summarises each cell by each measure."""

    def mean(pairs: Pairs) -> Estimate | str:
        # Nats and percentage points share one column, as text.
        return pairs.mean if pairs.mean.value is None else pairs.write(pairs.mean)

    return table(
        "How well the drops of two layers add up",
        [
            Column("model and benchmark", "text", lambda pairs: pairs.record.title),
            Column("measure", "text", lambda pairs: pairs.measure),
            Column("documents", "count", lambda pairs: pairs.record.n),
            Column("pairs", "count", lambda pairs: len(pairs.pairs)),
            Column("at the floor", "count", lambda pairs: int(pairs.floor.sum())),
            Column("mean interaction", "text", mean),
            Column("redundant", "count", lambda pairs: len(pairs.significant(1))),
            Column("sub-additive", "count", lambda pairs: len(pairs.significant(-1))),
            Column("Spearman of sum and joint drop", "coefficient", lambda pairs: pairs.rank),
            Column("R² of the sum", "coefficient", lambda pairs: pairs.explained),
        ],
        rows,
        *TEXTS.all("summary_notes"),
    )


def strongest_table(pairs: Pairs, sign: int) -> Table:
    """Build the table of the pairs whose measured interaction of a sign is the largest."""
    values = [(sign * (pairs.value(n) or 0), n) for n in range(len(pairs.pairs))]
    chosen = [n for value, n in sorted(values, reverse=True)[:STRONGEST] if value > 0]
    word = "redundant: together they cost more" if sign > 0 else "sub-additive: they cost less"
    return table(
        f"{pairs.record.title}: the most {word} than the sum, by {pairs.measure}",
        [
            Column("layers", "text", lambda n: "{}, {}".format(*pairs.pairs[n])),
            Column("apart", "count", lambda n: pairs.pairs[n][1] - pairs.pairs[n][0]),
            Column("interaction", pairs.unit, pairs.at_once.__getitem__),
            Column("its rank", "count", lambda n: rank_estimate(pairs.ranks[n]), interval=True),
            Column("both", pairs.unit, lambda n: float(pairs.together[n])),
            Column("the first", pairs.unit, lambda n: pairs.alone[pairs.pairs[n][0]]),
            Column("the second", pairs.unit, lambda n: pairs.alone[pairs.pairs[n][1]]),
            Column("p", "p", lambda n: pairs.interactions[n].p_value),
            Column("p, Benjamini-Hochberg", "p", lambda n: float(pairs.q[n])),
        ],
        chosen,
        *TEXTS.all("strongest_notes", len(pairs.open)),
    )


def interaction_map(pairs: Pairs) -> MapChart:
    """Build the map of all interactions, each in both halves; pairs at the floor are gaps."""
    layers = sorted(pairs.alone)
    indexes = {pair: n for n, pair in enumerate(pairs.pairs)}
    grid = [[indexes.get((min(i, j), max(i, j))) for j in layers] for i in layers]
    sure = {index for sign in (1, -1) for index in pairs.significant(sign)}
    left_out = f", {int(pairs.floor.sum())} at the floor" if pairs.floor.any() else ""
    return MapChart(
        title=f"{pairs.record.title}: interaction of two layers by {pairs.measure}, "
        f"{len(pairs.pairs):,} pairs{left_out}",
        x="layer (0-based)",
        y="layer",
        name="interaction",
        unit=pairs.unit,
        columns=tuple(layers),
        rows=tuple(map(str, layers)),
        values=tuple(tuple(None if n is None else pairs.value(n) for n in row) for row in grid),
        hovers=tuple(tuple("" if n is None else _hover(pairs, n) for n in row) for row in grid),
        shown=tuple(tuple(n in sure for n in row) for row in grid),
        shown_by=f"significant after Benjamini-Hochberg at {RATE}",
    )


def _hover(pairs: Pairs, index: int) -> str:
    return TEXTS.one("hover", pairs, index, *pairs.pairs[index])


def distance_chart(pairs: Pairs) -> LineChart:
    """Build the chart of the mean interaction of pairs by their distance in layers."""
    name = "pairs that are not at the floor" if pairs.floor.any() else "all pairs"
    return line_chart(
        f"{pairs.record.title}: mean interaction by distance, {pairs.measure}",
        ("distance |i − j|", "interaction"),
        pairs.unit,
        pairs.by_distance,
        {name: pairs.by_distance.values()},
    )
