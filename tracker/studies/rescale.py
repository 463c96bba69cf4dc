"""Is what a removal costs only missing scale? Each layer removed, and replaced by what was fitted.

In the layer's place stands a factor of its input (if that helps, the layer was missed for the size
of the state alone), its mean update (a constant), or a linear map (all that a layer without
nonlinearity and without other tokens could do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from tracker.core.changes import Change
from tracker.core.config import CellRequest
from tracker.core.estimates import Estimate
from tracker.core.findings import Line, LineChart
from tracker.core.formats import Measure, counted, fixed, measure_of
from tracker.core.grouping import grouped
from tracker.core.kinds import Intervention
from tracker.core.tables import Column, Table, table
from tracker.ledger.aligned import AlignedOutcomes
from tracker.stats.accuracy import accuracy_drop
from tracker.stats.arrays import Array
from tracker.stats.combined import recovered
from tracker.stats.resampling import RESAMPLES
from tracker.stats.support import holm
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    amount,
    refuse_removed,
    removing_whole_layers,
    side,
)

WAYS: tuple[Intervention, ...] = ("scale", "mean", "linear")
"""What stands in for a layer, from the least to the most that it can do."""
NAMES = {
    "remove": "nothing",
    "scale": "a factor",
    "mean": "its mean update",
    "linear": "a linear map",
}
EVERY: tuple[Intervention, ...] = ("remove", *WAYS)
_ASSUMED = (
    "Factors, mean updates and linear maps are fitted by least squares on other "
    "documents of the benchmark where there are enough (the table says on which), over "
    "all tokens but each text's first; a linear map has a bias.",
    f"Intervals: percentile bootstrap over documents, {RESAMPLES:,} resamples, within "
    "tasks; documents are independent, layers are taken as they are.",
    "Significance: exact McNemar test of each stand-in against nothing in the layer's "
    "place, over the documents, where these are right or wrong; Holm's adjustment over all "
    "layers and benchmarks of a stand-in that are tested (S. Holm, Scand. J. Statist. 6, 1979).",
)
_NOT_FINITE = "a drop is not a finite number"
_NO_TEST = "McNemar's test needs outcomes that are right or wrong, and there are none"


class Rescale(Study):
    """See the module."""

    question = "Is what a removal costs only missing scale?"

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Ask for each cell twice: a linear map that cannot be fitted leaves the rest alone.

        RequestError where layers are removed beneath: every term would hold what they cost.
        """
        ways: tuple[tuple[Intervention, ...], ...] = (("remove", "scale", "mean"), ("linear",))
        cells = asked.experiment.cells()
        for cell in cells:
            refuse_removed(cell, "rescale replaces the layers of the intact model", asked)
        return [removing_whole_layers(cell, interventions=some) for cell in cells for some in ways]

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer; see the module."""
        # The parts of each cell: without layers, and with linear maps.
        parts = grouped(subjects, lambda one: one.request.model_copy(update={"interventions": ()}))
        cells = [cell for mine in parts.values() if (cell := costs(mine)) is not None]
        if not cells:
            why = "no benchmark was measured with layers removed; run it again"
            return StudyResult((), lacking=[why])
        # Bits and fractions have no sum.
        alike = grouped(cells, lambda cell: cell.measure).values()
        result = StudyResult(_ASSUMED, tables=[*map(summary, alike), significant(cells)])
        for some in alike:
            by = f"By {some[0].measure.level} in {some[0].measure.unit}: " if len(alike) > 1 else ""
            result.answers += [f"{by}{line}" for line in _answers(some)]
        result.tables += map(layer_table, cells)
        result.charts += map(drop_chart, cells)
        return result


def _answers(cells: Sequence[Costs]) -> list[str]:
    """Say it over all cells of one measure, each weighing the same."""
    ways = [way for way in WAYS if all(way in cell.drops for cell in cells)]
    replaced = "".join(f", {_cost(cells, way)} with {NAMES[way]}" for way in ways)
    documents = sum(cell.n for cell in cells)
    where = f"over {counted(len(cells), 'benchmark')} ({counted(documents, 'document')})"
    answers = [f"A layer costs {_cost(cells, 'remove')} when it is removed{replaced}; {where}."]
    verdicts = []
    for what, nats in (
        (f"the {cells[0].measure.change}", False),
        ("the loss of gold log-probability", True),
    ):
        shares = {way: won_back(cells, way, nats) for way in ways}
        texts = {NAMES[way]: _share(share) for way, share in shares.items()}
        (only, *others) = dict.fromkeys(texts.values())
        text = only if not others else ", ".join(f"{name} {said}" for name, said in texts.items())
        answers.append(f"Won back of {what}: {text}.")
        if shares["scale"].low is not None:
            part = {1: "mostly", -1: "not only", 0: "perhaps"}[side(shares["scale"], 0.5)]
            verdicts.append(f"So {what} is {part} missing scale.")
    return answers + verdicts


def _cost(cells: Sequence[Costs], way: Intervention) -> str:
    """The mean drop of a layer, or why there is none."""
    measure = cells[0].measure
    if bad := sum(int((~np.isfinite(cell.drops[way].mean)).sum()) for cell in cells):
        of = sum(len(cell.layers) for cell in cells)
        return f"an undefined amount (not finite for {bad} of {of} layers)"
    mean = float(np.mean([cell.drops[way].mean.mean() for cell in cells]))
    drawn = np.mean([cell.drops[way].drawn.mean(axis=1) for cell in cells], axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return amount(Estimate(mean, float(low), float(high)), measure)


def won_back(cells: Sequence[Costs], way: Intervention, nats: bool) -> Estimate:
    """Put the layers of all cells together, in nats or by accuracy."""
    means, drawn = [], []
    for stands_in in ("remove", way):
        parts = [(cell.nats if nats else cell.drops)[stands_in] for cell in cells]
        means.append(np.concatenate([part.mean for part in parts]))
        drawn.append(np.concatenate([part.drawn for part in parts], axis=1))
    return recovered(*means, *drawn)


def _share(share: Estimate) -> str:
    if share.value is None or share.low is None or share.high is None:
        return f"undefined ({share.reason})"
    low, value, high = (fixed(100 * figure, 0) for figure in (share.low, share.value, share.high))
    return f"{value} % (95 % interval {low} to {high})"


class Drops(NamedTuple):
    """What each layer costs with something in its place.

    Attributes:
        mean: `[layers]`.
        drawn: `[resamples, layers]`, the same in each resample of the documents.
    """

    mean: Array
    drawn: Array


@dataclass(frozen=True)
class Costs:
    """What one cell's layers cost, removed and replaced.

    Attributes:
        name: The cell's title.
        n: Documents.
        layers: The layers that are removed, ascending.
        measure: What a drop is, and its unit.
        fitted_on: On what the stand-ins were fitted; empty where that is not known.
        drops: Way → what each layer costs.
        nats: Way → what each layer takes of the gold answer's log-probability.
        better: Way → for each layer, the p-value of doing otherwise than without the layer; None
            where no test could be made.
    """

    name: str
    n: int
    layers: tuple[int, ...]
    measure: Measure
    fitted_on: str
    drops: dict[Intervention, Drops] = field(default_factory=dict)
    nats: dict[Intervention, Drops] = field(default_factory=dict)
    better: dict[Intervention, list[float | None]] = field(default_factory=dict)


def costs(subjects: Sequence[Subject]) -> Costs | None:
    """Compute it from the parts of a cell; None where no layer is measured without a stand-in."""
    first, *rest = subjects
    outcomes = AlignedOutcomes(first.store, first.view.joined(*(part.view for part in rest)))
    layers = tuple(sorted({run.layer for run in outcomes.runs if run.intervention == "remove"}))
    if not layers:
        return None
    fitted_on = [part.record.fitted_on for part in subjects if part.record.fitted_on]
    cell = Costs(
        first.record.title,
        len(outcomes.tasks),
        layers,
        measure_of(first.record),
        "; ".join(dict.fromkeys(fitted_on)),
    )
    removed: list[Array] = []
    for way in EVERY:
        runs = [Change(layers=(layer,), intervention=way) for layer in layers]
        ablations = list(map(outcomes.ablation, runs))
        if not all(map(outcomes.has, ablations)):
            continue
        metric, gold = outcomes.by_metric(ablations), outcomes.by_gold_logprob(ablations)
        for by_way, paired in ((cell.drops, metric), (cell.nats, gold)):
            drawn = outcomes.resampled(paired.drops, paired.weights)
            by_way[way] = Drops(paired.mean_drops, drawn)
        after = list(metric.ablated.T)
        removed = removed or after
        if way != "remove":
            pairs = zip(after, removed, strict=True)
            cell.better[way] = [accuracy_drop(*pair, metric.weights).p_value for pair in pairs]
    return cell


def in_unit(measure: Measure) -> str:
    """Name the unit of a drop behind what it is; nothing where its form says it."""
    return "" if measure.form == "points" else f", {measure.unit}"


def summary(cells: Sequence[Costs]) -> Table:
    """Say of each cell of one measure how much of the drop each stand-in wins back."""
    measure = cells[0].measure

    def column(way: Intervention, nats: bool) -> Column[Costs]:
        what = "the gold log-probability" if nats else f"the {measure.level}"

        def value(cell: Costs) -> Estimate | None:
            return won_back([cell], way, nats) if way in cell.drops else None

        label = f"{NAMES[way]} wins back, of {what}"
        return Column(label, "percent", value, "not measured; what is lacking says why")

    def mean(cell: Costs) -> float:
        return float(cell.drops["remove"].mean.mean())

    label = f"mean {measure.change} of a removal{in_unit(measure)}"
    return table(
        "What stands in for a layer, and how much of the drop it wins back",
        [
            Column("model and benchmark", "text", lambda cell: cell.name),
            Column("documents", "count", lambda cell: cell.n),
            Column(label, measure.form, mean, _NOT_FINITE),
            *(column(way, nats) for nats in (False, True) for way in WAYS),
            Column("fitted on", "text", lambda cell: cell.fitted_on or None, "it is not known"),
        ],
        cells,
        "Won back: 1 − (sum of the drops with the stand-in) / (sum of the drops of "
        "removals), over all layers, with 95 % intervals from resampling documents. "
        "Below 0: worse than nothing in the layer's place.",
    )


class _Tested(NamedTuple):
    """A row: a stand-in, and in how many layers it was tested and does better or worse.

    None where no test was made.
    """

    way: Intervention
    made: int
    better: int | None
    worse: int | None


def significant(cells: Sequence[Costs]) -> Table:
    """Count the layers where a stand-in does significantly better, or worse, than nothing."""
    rows = []
    for way in WAYS:
        some = [cell for cell in cells if way in cell.drops]
        if not some:
            continue
        p = holm([value for cell in some for value in cell.better[way]])
        gain = np.concatenate([cell.drops["remove"].mean - cell.drops[way].mean for cell in some])
        sure = np.array([value is not None and value < SIGNIFICANT for value in p])
        made = sum(value is not None for value in p)
        better, worse = (
            int((sure & over).sum()) if made else None for over in (gain > 0, gain < 0)
        )
        rows.append(_Tested(way, made, better, worse))
    columns: tuple[Column[_Tested], ...] = (
        Column("stand-in", "text", lambda row: NAMES[row.way]),
        Column("layers × benchmarks tested", "count", lambda row: row.made),
        Column("significantly better", "count", lambda row: row.better, _NO_TEST),
        Column("significantly worse", "count", lambda row: row.worse, _NO_TEST),
    )
    return table(
        "Layers where a stand-in does otherwise than nothing",
        columns,
        rows,
        "Exact McNemar tests, Holm's adjustment within each row, 5 %; layers of metrics that "
        "are not right or wrong a document are not tested.",
    )


def layer_table(cell: Costs) -> Table:
    """List what each layer costs with something in its place."""

    def column(way: Intervention) -> Column[int]:
        return Column(NAMES[way], cell.measure.form, partial(_drop, cell, way))

    return table(
        f"{cell.name}: {cell.measure.change} of each layer with something in its place"
        f"{in_unit(cell.measure)}",
        [
            Column("layer", "count", lambda place: cell.layers[place]),
            *(column(way) for way in EVERY if way in cell.drops),
        ],
        range(len(cell.layers)),
    )


def _drop(cell: Costs, way: Intervention, place: int) -> Estimate:
    """Find what a layer costs with something in its place."""
    mean, drawn = cell.drops[way]
    low, high = np.quantile(drawn[:, place], [0.025, 0.975])
    found = Estimate(float(mean[place]), float(low), float(high))
    return found if np.isfinite(mean[place]) else Estimate(None, reason=_NOT_FINITE)


def drop_chart(cell: Costs) -> LineChart:
    """Draw the drops of all layers, a line each way."""
    return LineChart(
        title=f"{cell.name}: {cell.measure.change} with something in the layer's place",
        x="layer (0-based)",
        y=f"{cell.measure.change}{in_unit(cell.measure)}",
        unit=cell.measure.form,
        places=cell.layers,
        lines=tuple(
            Line.of(NAMES[way], (_drop(cell, way, place) for place in range(len(cell.layers))))
            for way in cell.drops
        ),
    )
