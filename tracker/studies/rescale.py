"""Study: test whether a fitted replacement recovers the loss of a removed layer.

The layer is replaced by a factor of its input, its mean update (a constant), or a linear map. If
the factor helps, the layer mattered only for the scale of the state. The linear map is the best
that a layer without nonlinearity and without other tokens could do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from tracker.analysis.aligned import AlignedOutcomes
from tracker.core.changes import Change
from tracker.core.config import CellRequest, Changes
from tracker.core.estimates import Estimate
from tracker.core.findings import LineChart
from tracker.core.formats import Measure, fixed, measure_of
from tracker.core.grouping import grouped
from tracker.core.kinds import Intervention
from tracker.core.tables import Column, Table, table
from tracker.stats.accuracy import accuracy_drop
from tracker.stats.arrays import Array
from tracker.stats.resampling import RESAMPLES
from tracker.stats.support import holm, recovered
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    study_texts,
)
from tracker.studies.layout import figure_table, labelled, line_chart
from tracker.studies.registry import RescaleSettings

NAMES: dict[Intervention, str] = {
    "remove": "nothing",
    "scale": "a factor",
    "mean": "its mean update",
    "linear": "a linear map",
}
"""Replacements of a layer, from the least to the most powerful."""
REPLACEMENTS = (*NAMES,)[1:]
TEXTS = study_texts("rescale", resamples=RESAMPLES)
_NOT_FINITE = "a drop is not a finite number"
_NO_TEST = "McNemar's test needs outcomes that are right or wrong, and there are none"
_NOT_MEASURED = "not measured; what is lacking says why"


class Rescale(Study[RescaleSettings]):
    """See the module."""

    name = "rescale"
    question = "Is what a removal costs only missing scale?"
    intact = True
    texts = TEXTS

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield the cell twice: a linear map that cannot be fitted leaves the rest alone."""
        ways: tuple[tuple[Intervention, ...], ...] = (("remove", "scale", "mean"), ("linear",))
        for interventions in ways:
            yield cell.with_changes(layers=cell.changes.layers, interventions=interventions)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer; see the module."""
        result = StudyResult()
        # The parts of each cell: without layers, and with linear maps.
        parts = grouped(subjects, lambda one: replace(one.request, changes=Changes()))
        cells = [cell for mine in parts.values() if (cell := costs(mine)) is not None]
        if not cells:
            result.lacking.append("no benchmark was measured with layers removed; run it again")
            return result
        # Bits and fractions have no sum.
        measures = grouped(cells, lambda cell: cell.measure)
        for measure, some in measures.items():
            of = f"By {measure.level} in {measure.unit}: " if len(measures) > 1 else ""
            result.add(*(f"{of}{answer}" for answer in answers_of(some)))
        result.add(*map(summary, measures.values()), significance_table(cells))
        result.add(*map(layer_table, cells), *map(drop_chart, cells))
        return result


class Drops(NamedTuple):
    """Drops of all layers with one replacement.

    Attributes:
        mean: `[layers]`, mean drops.
        drawn: `[resamples, layers]`, mean drops in each resample of the documents.
    """

    mean: Array
    drawn: Array


@dataclass(frozen=True)
class Costs:
    """Costs of one cell's layers, removed and replaced.

    Attributes:
        name: Title of the cell.
        n: Number of documents.
        layers: Removed layers, ascending.
        measure: Measured quantity, and its unit.
        fitted_on: Documents on which replacements were fitted; empty if unknown.
        drops: Intervention → drop of each layer.
        nats: Intervention → fall of the gold answer's log-probability for each layer.
        p_values: Intervention → p-value of each layer for a difference from its removal; None if no
            test could be made.
    """

    name: str
    n: int
    layers: tuple[int, ...]
    measure: Measure
    fitted_on: str
    drops: dict[Intervention, Drops] = field(default_factory=dict)
    nats: dict[Intervention, Drops] = field(default_factory=dict)
    p_values: dict[Intervention, list[float | None]] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """The unit of a drop to append to its name; empty if its form includes it."""
        return "" if self.measure.form == "points" else f", {self.measure.unit}"

    def drop(self, intervention: Intervention, index: int) -> Estimate:
        """Return the drop of a layer with one replacement."""
        mean, drawn = self.drops[intervention]
        if not np.isfinite(mean[index]):
            return Estimate(None, reason=_NOT_FINITE)
        return Estimate(float(mean[index]), *_middle(drawn[:, index]))


def _middle(drawn: Array) -> tuple[float, float]:
    """Return the ends of the middle 95 % of resamples."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def costs(subjects: Sequence[Subject]) -> Costs | None:
    """Compute the costs from the parts of a cell; None where no layer is only removed."""
    first, *rest = subjects
    outcomes = AlignedOutcomes(first.store, first.view.joined(*(part.view for part in rest)))
    layers = tuple(sorted({run.layer for run in outcomes.runs if run.intervention == "remove"}))
    if not layers:
        return None
    fitted_on = dict.fromkeys(part.record.fitted_on for part in subjects)
    cell = Costs(
        first.record.title,
        len(outcomes.tasks),
        layers,
        measure_of(first.record),
        "; ".join(text for text in fitted_on if text),
    )
    removed: list[Array] = []
    for intervention in NAMES:
        runs = [Change(layers=(layer,), intervention=intervention) for layer in layers]
        ablations = [*map(outcomes.ablation, runs)]
        if not all(map(outcomes.has, ablations)):
            continue
        metric, gold = outcomes.by_metric(ablations), outcomes.by_gold_logprob(ablations)
        for drops, paired in ((cell.drops, metric), (cell.nats, gold)):
            drawn = outcomes.resampled(paired.drops, paired.weights)
            drops[intervention] = Drops(paired.mean_drops, drawn)
        after = [*metric.ablated.T]
        removed = removed or after
        if intervention != "remove":
            pairs = zip(after, removed, strict=True)
            p_values = [accuracy_drop(*pair, metric.weights).p_value for pair in pairs]
            cell.p_values[intervention] = p_values
    return cell


def won_back(cells: Sequence[Costs], intervention: Intervention, nats: bool) -> Estimate:
    """Estimate the share of all layers' drops that a replacement wins back."""
    means, drawn = [], []
    for stands_in in ("remove", intervention):
        parts = [(cell.nats if nats else cell.drops)[stands_in] for cell in cells]
        means.append(np.concatenate([part.mean for part in parts]))
        drawn.append(np.concatenate([part.drawn for part in parts], axis=1))
    return recovered(*means, *drawn)


def answers_of(cells: Sequence[Costs]) -> list[str]:
    """Return sentences over all cells of one measure, each weighing the same."""
    ways = [way for way in REPLACEMENTS if all(way in cell.drops for cell in cells)]
    costs = {way: _mean_cost(cells, way) for way in ("remove", *ways)}
    documents = sum(cell.n for cell in cells)
    answers = TEXTS.all("costs", costs, NAMES, len(cells), documents)
    verdicts = []
    for loss, nats in (
        (f"the {cells[0].measure.change}", False),
        ("the loss of gold log-probability", True),
    ):
        shares = {way: won_back(cells, way, nats) for way in ways}
        texts = {NAMES[way]: _percent(share) for way, share in shares.items()}
        answers += TEXTS.all("won_back", loss, texts)
        verdicts += TEXTS.all("verdict", loss, shares["scale"])
    return answers + verdicts


def _mean_cost(cells: Sequence[Costs], intervention: Intervention) -> str:
    drops = [cell.drops[intervention] for cell in cells]
    if bad := sum(int((~np.isfinite(drop.mean)).sum()) for drop in drops):
        return TEXTS.one("undefined", bad, sum(len(cell.layers) for cell in cells))
    mean = float(np.mean([drop.mean.mean() for drop in drops]))
    ends = _middle(np.mean([drop.drawn.mean(axis=1) for drop in drops], axis=0))
    return cells[0].measure.amount(Estimate(mean, *ends))


def _percent(share: Estimate) -> str:
    if share.value is None or share.low is None or share.high is None:
        return f"undefined ({share.reason})"
    low, value, high = (fixed(100 * figure, 0) for figure in (share.low, share.value, share.high))
    return f"{value} % (95 % interval {low} to {high})"


def summary(cells: Sequence[Costs]) -> Table:
    """Build the table of the share of the drop that each replacement recovers, by one measure."""
    measure = cells[0].measure

    def share(way: Intervention, of: str, nats: bool) -> Column[Costs]:
        def value(cell: Costs) -> Estimate | None:
            return won_back([cell], way, nats) if way in cell.drops else None

        return Column(f"{NAMES[way]} wins back, of {of}", "percent", value, _NOT_MEASURED)

    def mean(cell: Costs) -> float:
        return float(cell.drops["remove"].mean.mean())

    label = f"mean {measure.change} of a removal{cells[0].unit}"
    return table(
        "What stands in for a layer, and how much of the drop it wins back",
        [
            Column("model and benchmark", "text", lambda cell: cell.name),
            Column("documents", "count", lambda cell: cell.n),
            Column(label, measure.form, mean, _NOT_FINITE),
            *(share(way, f"the {measure.level}", False) for way in REPLACEMENTS),
            *(share(way, "the gold log-probability", True) for way in REPLACEMENTS),
            Column("fitted on", "text", lambda cell: cell.fitted_on or None, "it is not known"),
        ],
        cells,
        *TEXTS.all("summary_notes"),
    )


@dataclass(frozen=True)
class Significance:
    """Number of layers in which a replacement is significantly better or worse than a removal."""

    replacement: str = labelled("stand-in")
    tested: int = labelled("layers × benchmarks tested", "count")
    better: int | None = labelled("significantly better", "count", _NO_TEST)
    worse: int | None = labelled("significantly worse", "count", _NO_TEST)


def significance_table(cells: Sequence[Costs]) -> Table:
    """Build the table of the layers where a replacement differs from the removal."""
    rows = []
    for way in REPLACEMENTS:
        if not (some := [cell for cell in cells if way in cell.drops]):
            continue
        p_values = holm([value for cell in some for value in cell.p_values[way]])
        gain = np.concatenate([cell.drops["remove"].mean - cell.drops[way].mean for cell in some])
        sure = np.array([value is not None and value < SIGNIFICANT for value in p_values])
        tested = sum(value is not None for value in p_values)
        counts = [int((sure & over).sum()) if tested else None for over in (gain > 0, gain < 0)]
        rows.append(Significance(NAMES[way], tested, *counts))
    return figure_table(
        Significance,
        "Layers where a stand-in does otherwise than nothing",
        rows,
        *TEXTS.all("significance_notes"),
    )


def layer_table(cell: Costs) -> Table:
    """Build the table of the drop of each layer with each replacement."""
    columns = [Column(NAMES[way], cell.measure.form, partial(cell.drop, way)) for way in cell.drops]
    title = f"{cell.name}: {cell.measure.change} of each layer with something in its place"
    layer: Column[int] = Column("layer", "count", cell.layers.__getitem__)
    return table(f"{title}{cell.unit}", [layer, *columns], range(len(cell.layers)))


def drop_chart(cell: Costs) -> LineChart:
    """Build the chart of all layers' drops, a line for each replacement."""
    return line_chart(
        f"{cell.name}: {cell.measure.change} with something in the layer's place",
        ("layer (0-based)", f"{cell.measure.change}{cell.unit}"),
        cell.measure.form,
        cell.layers,
        {
            NAMES[way]: [cell.drop(way, index) for index in range(len(cell.layers))]
            for way in cell.drops
        },
    )
