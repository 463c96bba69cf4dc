"""Study: compare the joint drop of two removed layers with the sum of their single drops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, combinations, islice

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tracker.analysis.aligned import TaskNames
from tracker.analysis.paired import PairedOutcomes
from tracker.schema.changes import Ablation
from tracker.schema.config import CellRequest
from tracker.schema.estimates import Estimate, FigureUnit
from tracker.schema.findings import LineChart, MapChart, line_chart
from tracker.schema.formats import UNIT_FORMATS, figure_text, metric_format
from tracker.schema.records import CellRecord
from tracker.schema.tables import Column, Table, build_table
from tracker.stats.accuracy import mean_interval
from tracker.stats.arrays import Array
from tracker.stats.effects import additivity, interactions
from tracker.stats.resampling import RESAMPLES, SEED, resampled_means
from tracker.stats.support import count_pairs, possible_ranks, widen
from tracker.studies.base import SIGNIFICANT, Study, StudyContext, StudyResult, Subject, study_texts
from tracker.studies.layout import rank_estimate
from tracker.studies.registry import JointSettings

LayerPair = tuple[int, int]
MAX_PAIRS_LISTED = 10
"""Maximum number of pairs of each sign that a table lists."""
DISCOVERY_RATE = f"{100 * SIGNIFICANT:.0f} %"
JOINT_TEXTS = study_texts("joint", rate=DISCOVERY_RATE)


class Joint(Study[JointSettings]):
    """Study that removes each pair of layers of the experiment file together."""

    name = "joint"
    question = "Is the drop from removing two layers the sum of their single drops?"
    intact = True
    layers = 2
    texts = JOINT_TEXTS

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield one request to remove single layers, then requests to remove pairs of layers."""
        layers = cell.changes.whole_layers
        yield cell.with_changes(layers=layers)
        for n, layer in enumerate(layers[:-1], 1):
            yield replace(cell, removed=(layer,)).with_changes(layers=layers[n:])

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Compare the drop of each pair of layers with the sum of the two single drops."""
        result = StudyResult()
        measured: list[PairInteractions] = []
        for subject in subjects:
            if not subject.record.removed:
                interactions, reasons = measure_pairs(subject)
                result.lack(subject.record.title, *reasons)
                measured += interactions
        if not measured:
            result.add("Each pair of layers lacks its joint drop or a single drop.")
            return result
        adjust_interactions(measured)
        result.add(_summary_table(measured))
        for pairs in measured:
            tables = (strongest_table(pairs, sign) for sign in (1, -1))
            result.add(joint_answer(pairs), *(table for table in tables if table.rows))
            result.add(_interaction_map(pairs), _distance_chart(pairs))
        return result


# Figures


@dataclass
class PairInteractions:
    """Interactions of layer pairs: drop of both layers minus the sum of their single drops.

    Args:
        record: Record of the model and benchmark.
        measure: Name of the quantity that drops, e.g. accuracy or gold log-probability.
        unit: Unit of the drops.
        paired: Outcomes with each single layer removed, then with each pair removed.
        layers: Layers that are removed alone.
        pairs: Measured pairs of layers; the lower layer comes first.
        strata: `[documents]`, each document's task; None for one task.
        max_loss: The largest possible loss; None if the loss is unbounded.

    Attributes:
        documents: Number of documents.
        alone: Layer → drop if this layer alone is removed.
        together: `[pairs]`, drop if both layers are removed.
        interactions: For each pair, the joint drop minus the sum of the two single drops.
        q: `[pairs]`, p-values adjusted by Benjamini and Hochberg. NaN for pairs with `floor`.
        floor: `[pairs]`, True if a single drop, or the sum of both single drops, exceeds the
            largest possible loss. Means leave out pairs with `floor`, which tables call "at the
            floor".
        indices: Indices of the pairs whose `floor` is false.
        mean: Mean interaction over the pairs in `indices`.
        by_distance: Distance of the two layers → mean interaction of the pairs with this distance.
        rank: Spearman correlation between the sum of the single drops and the joint drop.
        explained: R² when the sum of the single drops predicts the joint drop.
    """

    record: CellRecord
    measure: str
    unit: FigureUnit
    paired: PairedOutcomes
    layers: Sequence[int]
    pairs: Sequence[LayerPair]
    strata: TaskNames | None
    max_loss: float | None

    def __post_init__(self) -> None:
        """Compute the interactions and their summaries."""
        drops, weights, n = self.paired.drops, self.paired.weights, len(self.layers)
        numbers = {layer: number for number, layer in enumerate(self.layers)}
        first, second = np.array([[numbers[layer] for layer in pair] for pair in self.pairs]).T

        def sums(figures: Array) -> Array:
            return figures[..., first] + figures[..., second]

        values, means = drops[:, n:] - sums(drops), weights @ drops
        alone, self.together = means[:n], means[n:]
        self.documents, self.alone = len(drops), dict(zip(self.layers, alone.tolist(), strict=True))
        self.interactions = interactions(values, weights, SEED)
        self.q = np.full(len(self.pairs), np.nan)
        # Rounding alone can make a sum of fractions exceed the largest possible loss.
        limit = np.inf if self.max_loss is None else self.max_loss + 1e-9
        self.floor = np.max([alone[first], alone[second], sums(alone)], axis=0) > limit
        summed = np.flatnonzero(~self.floor)
        self.indices: list[int] = summed.tolist()
        resamples = resampled_means(drops, RESAMPLES, SEED, self.strata, weights)
        pair_resamples = sums(resamples)[:, summed], resamples[:, n + summed]
        single_sums, joint_drops = sums(alone)[summed], self.together[summed]
        self.rank, self.explained = additivity(single_sums, joint_drops, pair_resamples)

        def mean_over(indices: NDArray[np.int64]) -> Estimate:
            if not len(indices):
                return Estimate(
                    None, reason="chance accuracy limits the drops of every pair of layers"
                )
            per_document = values[:, indices].mean(axis=1)
            return Estimate(float(weights @ per_document), *mean_interval(per_document, weights))

        self.mean = mean_over(summed)
        apart = np.array([j - i for i, j in self.pairs])
        distances = np.unique(apart).tolist()
        self.by_distance = {d: mean_over(summed[apart[summed] == d]) for d in distances}

    @cached_property
    def at_once(self) -> dict[int, Estimate]:
        """Interactions with simultaneous intervals, for the pairs in `indices`."""
        return dict(zip(self.indices, self._simultaneous(len(self.indices)), strict=True))

    @cached_property
    def ranks(self) -> dict[int, tuple[int, int]]:
        """Index of a pair → best and worst rank that its interaction can have; 1 = largest."""
        estimates = self._simultaneous(count_pairs(len(self.indices)))
        return dict(zip(self.indices, possible_ranks(estimates), strict=True))

    def _simultaneous(self, n_statements: int) -> list[Estimate]:
        """Return the interactions of the pairs in `indices`, with simultaneous intervals.

        `n_statements` is the number of statements for which the intervals hold at once.
        """
        estimates = [replace(self.interactions[n], p_value=None) for n in self.indices]
        return widen(estimates, [self.documents] * len(estimates), n_statements)

    def strongest(self, sign: int) -> int | None:
        """Return the index of the significantly strongest pair, or None.

        `sign` 1 selects the most positive interaction, and −1 the most negative interaction.
        """
        end = 1 if sign > 0 else len(self.indices)
        firsts = [index for index, ranks in self.ranks.items() if ranks == (end, end)]
        return next((n for n in firsts if sign * self.at_once[n].side() > 0), None)

    def write(self, drop: Estimate | float) -> str:
        """Format a drop as text with its unit, and with its interval if it has one."""
        form = UNIT_FORMATS[self.unit]
        estimate = Estimate(drop) if isinstance(drop, float) else drop
        return figure_text(estimate, form.write, f" {form.name}" if form.name else "")

    def significant(self, sign: int) -> list[int]:
        """Return the indices of the pairs with a significant interaction of the given sign."""
        with np.errstate(invalid="ignore"):
            indices = np.flatnonzero(self.q <= SIGNIFICANT).tolist()
        return [n for n in indices if sign * (self.value(n) or 0) > 0]

    def value(self, index: int) -> float | None:
        """Return the interaction of the pair with this index.

        The result is None if the interaction is undefined, or if `floor` is true for the pair.
        """
        return None if self.floor[index] else self.interactions[index].value


def measure_pairs(subject: Subject) -> tuple[list[PairInteractions], list[str]]:
    """Compute interactions of layer pairs; also return sentences about missing results."""
    record = subject.record
    requested = list(combinations([run.layer for run in subject.view.runs], 2))
    outcomes = subject.outcomes([Ablation.from_changes(removed=pair) for pair in requested])
    pairs = list(combinations([run.layer for run in outcomes.runs], 2))
    pairs = [p for p in pairs if outcomes.is_measured(Ablation.from_changes(removed=p))]
    if not pairs or len(outcomes.tasks) < 2:
        return [], [f"too few measured pairs ({len(pairs)}) or documents ({len(outcomes.tasks)})"]
    reasons, absent = [], len(requested) - len(pairs)
    if absent:
        reasons.append(f"{absent} of {len(requested)} pairs of layers have no measured joint drop")
    layers = sorted({*chain.from_iterable(pairs)})
    sets = [*((layer,) for layer in layers), *pairs]
    ablations = [Ablation.from_changes(removed=removed) for removed in sets]
    level, chance, form = record.baseline.value, record.chance_accuracy, metric_format(record)
    room = None if level is None or chance is None else level - chance
    measured: list[PairInteractions] = []
    for name, unit, paired, max_loss in (
        (form.change, form.form, outcomes.metric_outcomes(ablations), room),
        ("gold log-prob drop", "nats", outcomes.gold_outcomes(ablations), None),
    ):
        if bad := int((~np.isfinite(paired.drops).all(axis=1)).sum()):
            reasons.append(f"{name}: {bad} of {len(paired.drops)} documents have no finite score")
        elif max_loss is not None and max_loss <= 0:
            reasons.append(JOINT_TEXTS.render("no_room", name))
        else:
            drops = (paired, layers, pairs, outcomes.strata, max_loss)
            measured.append(PairInteractions(record, name, unit, *drops))
    return measured, reasons


def adjust_interactions(measured: Sequence[PairInteractions]) -> None:
    """Adjust the p-values of all pairs by Benjamini and Hochberg's method; store them in `q`."""
    p_values = [pairs.interactions[n].p_value for pairs in measured for n in pairs.indices]
    q_values = iter(stats.false_discovery_control(p_values) if p_values else [])
    for pairs in measured:
        pairs.q[pairs.indices] = [*islice(q_values, len(pairs.indices))]


# Sentences, tables and charts


def joint_answer(pairs: PairInteractions) -> str:
    """Describe how well sums of single drops predict joint drops, and which pairs interact most."""
    return JOINT_TEXTS.render("answer", pairs, pairs.record, int(pairs.floor.sum()))


def _summary_table(rows: Sequence[PairInteractions]) -> Table:
    """Build the summary table, with one row for each benchmark and measure of the drop."""

    def mean(pairs: PairInteractions) -> Estimate | str:
        # Nats and percentage points share one column, as text.
        return pairs.mean if pairs.mean.value is None else pairs.write(pairs.mean)

    return build_table(
        "How well the sum of two single drops predicts the joint drop of two layers",
        [
            Column("model and benchmark", "text", lambda pairs: pairs.record.title),
            Column("measure", "text", lambda pairs: pairs.measure),
            Column("documents", "count", lambda pairs: pairs.record.n),
            Column("pairs", "count", lambda pairs: len(pairs.pairs)),
            Column("at the floor", "count", lambda pairs: int(pairs.floor.sum())),
            Column("mean interaction", "text", mean),
            Column("redundant", "count", lambda pairs: len(pairs.significant(1))),
            Column("sub-additive", "count", lambda pairs: len(pairs.significant(-1))),
            Column(
                "Spearman correlation of the sum of single drops with the joint drop",
                "coefficient",
                lambda pairs: pairs.rank,
            ),
            Column("R² of the sum", "coefficient", lambda pairs: pairs.explained),
        ],
        rows,
        *JOINT_TEXTS.render_all("summary_notes"),
    )


def strongest_table(pairs: PairInteractions, sign: int) -> Table:
    """Build the table of pairs with the strongest interactions of one sign.

    `sign` selects positive (1) or negative (−1) interactions.
    """
    values = [(sign * (pairs.value(n) or 0), n) for n in range(len(pairs.pairs))]
    rows = [n for value, n in sorted(values, reverse=True)[:MAX_PAIRS_LISTED] if value > 0]
    kind = (
        "redundant pairs, which cost more than the sum of both drops"
        if sign > 0
        else "sub-additive pairs, which cost less than the sum of both drops"
    )
    return build_table(
        f"{pairs.record.title}: strongest interactions of {kind}, measured by {pairs.measure}",
        [
            Column("layers", "text", lambda n: "{}, {}".format(*pairs.pairs[n])),
            Column("distance", "count", lambda n: pairs.pairs[n][1] - pairs.pairs[n][0]),
            Column("interaction", pairs.unit, pairs.at_once.__getitem__),
            Column("its rank", "count", lambda n: rank_estimate(pairs.ranks[n]), interval=True),
            Column("both", pairs.unit, lambda n: float(pairs.together[n])),
            Column("the first", pairs.unit, lambda n: pairs.alone[pairs.pairs[n][0]]),
            Column("the second", pairs.unit, lambda n: pairs.alone[pairs.pairs[n][1]]),
            Column("p", "p", lambda n: pairs.interactions[n].p_value),
            Column("p, Benjamini-Hochberg", "p", lambda n: float(pairs.q[n])),
        ],
        rows,
        *JOINT_TEXTS.render_all("strongest_notes", len(pairs.indices)),
    )


def _interaction_map(pairs: PairInteractions) -> MapChart:
    """Build the heat map of the interactions of all pairs of layers (layer × layer).

    The map leaves out pairs whose drops are limited by chance accuracy (`pairs.floor`).
    """
    layers = sorted(pairs.alone)
    indices = {pair: n for n, pair in enumerate(pairs.pairs)}
    grid = [[indices.get((min(i, j), max(i, j))) for j in layers] for i in layers]
    significant = {*pairs.significant(1), *pairs.significant(-1)}
    left_out = f", {int(pairs.floor.sum())} at the floor" if pairs.floor.any() else ""

    def hover(n: int | None) -> str:
        return "" if n is None else JOINT_TEXTS.render("hover", pairs, n, *pairs.pairs[n])

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
        hovers=tuple(tuple(map(hover, row)) for row in grid),
        shown=tuple(tuple(n in significant for n in row) for row in grid),
        shown_by=f"significant after Benjamini-Hochberg at {DISCOVERY_RATE}",
    )


def _distance_chart(pairs: PairInteractions) -> LineChart:
    """Build the chart of the mean interaction by distance of the two layers."""
    name = "pairs whose drops are not limited by chance" if pairs.floor.any() else "all pairs"
    title = f"{pairs.record.title}: mean interaction by distance of the layers ({pairs.measure})"
    axes, lines = ("distance |i − j|", "interaction"), {name: pairs.by_distance.values()}
    return line_chart(title, axes, pairs.unit, pairs.by_distance, lines)
