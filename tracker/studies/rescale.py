"""Study: test by how much fitted replacements of removed layers reduce the accuracy drop.

The layer's output is replaced by its input times a factor, by its input plus the mean update (a
constant), or by a linear map of its input. If a layer can be replaced by its input times a factor
without any drop, the layer is needed only because it changes the scale of the hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from tracker.analysis.aligned import AlignedOutcomes
from tracker.schema.changes import Change
from tracker.schema.config import CellRequest, Changes
from tracker.schema.estimates import Estimate
from tracker.schema.findings import LineChart, line_chart
from tracker.schema.formats import MetricFormat, fixed_point, metric_format
from tracker.schema.grouping import group_by
from tracker.schema.kinds import Intervention
from tracker.schema.tables import Column, Table, build_table
from tracker.stats.accuracy import accuracy_drop
from tracker.stats.arrays import Array
from tracker.stats.resampling import RESAMPLES
from tracker.stats.support import holm, recovered_share
from tracker.studies.base import SIGNIFICANT, Study, StudyContext, StudyResult, Subject, study_texts
from tracker.studies.layout import figure_table, labelled
from tracker.studies.registry import RescaleSettings

STAND_INS: dict[Intervention, str] = {
    "remove": "nothing",
    "scale": "a factor",
    "mean": "its mean update",
    "linear": "a linear map",
}
"""Replacement of a layer → its name in texts, from the least to the most powerful."""
REPLACEMENTS = (*STAND_INS,)[1:]
RESCALE_TEXTS = study_texts("rescale", resamples=RESAMPLES)
_NOT_FINITE = "the drop of a layer is not a finite number"
_NO_TEST = "McNemar's test needs outcomes that are right or wrong; this metric has other values"
_NOT_MEASURED = "not measured; for the reason, see the list of missing results"


class Rescale(Study[RescaleSettings]):
    """Study that tests by how much replacements of removed layers reduce the accuracy drop."""

    name = "rescale"
    question = "Is a layer needed only because it changes the scale of the hidden state?"
    intact = True
    texts = RESCALE_TEXTS

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield two requests that remove and replace each layer.

        Replacements by linear maps have their own request, because fitting a linear map can fail.
        """
        groups: tuple[tuple[Intervention, ...], ...] = (("remove", "scale", "mean"), ("linear",))
        for interventions in groups:
            yield cell.with_changes(layers=cell.changes.layers, interventions=interventions)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Report by what share each replacement reduces the accuracy drop."""
        result = StudyResult()
        # The parts of each cell: without layers, and with linear maps.
        parts = group_by(subjects, lambda subject: replace(subject.request, changes=Changes()))
        cells = [*filter(None, map(measure_costs, parts.values()))]
        if not cells:
            result.lacking.append("no removal of layers was measured; run the study again")
            return result
        # Bits and fractions have no sum.
        measures = group_by(cells, lambda cell: cell.measure)
        for measure, group in measures.items():
            prefix = f"By {measure.level} in {measure.unit}: " if len(measures) > 1 else ""
            result.add(*(f"{prefix}{answer}" for answer in _write_answers(group)))
        result.add(*map(_summary_table, measures.values()), significance_table(cells))
        result.add(*map(_layer_table, cells), *map(_drop_chart, cells))
        return result


class LayerDrops(NamedTuple):
    """Drops of all layers under one intervention, such as removing or rescaling a layer.

    Attributes:
        mean: `[layers]`, mean drop over documents when only this layer is changed.
        drawn: `[resamples, layers]`, mean drop on each bootstrap resample of the documents.
    """

    mean: Array
    drawn: Array


@dataclass(frozen=True)
class CellCosts:
    """Drops on one model and benchmark when single layers are removed or replaced.

    Attributes:
        name: Title of the model and benchmark.
        n: Number of documents.
        layers: Removed layers, ascending.
        measure: Format of the metric, with its unit.
        fitted_on: Text that describes the documents on which the replacements were fitted; empty if
            unknown.
        drops: Intervention → drop of the metric for each layer.
        nats: Intervention → decrease of the gold answer's log-probability for each layer.
        p_values: Intervention → p-value for each layer; the test compares the accuracy of
            replacement and removal. None if documents are not simply right or wrong.
    """

    name: str
    n: int
    layers: tuple[int, ...]
    measure: MetricFormat
    fitted_on: str
    drops: dict[Intervention, LayerDrops] = field(default_factory=dict)
    nats: dict[Intervention, LayerDrops] = field(default_factory=dict)
    p_values: dict[Intervention, list[float | None]] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """Text with the unit, to append to a label; empty if the formatted values show the unit."""
        return "" if self.measure.form == "points" else f", {self.measure.unit}"

    def estimates(self, name: Intervention) -> list[Estimate]:
        """Return the drop of each layer under the intervention `name`, with bootstrap intervals."""
        mean, drawn = self.drops[name]
        return [
            Estimate(float(value), *_middle(drawn[:, n]))
            if np.isfinite(value)
            else Estimate(None, reason=_NOT_FINITE)
            for n, value in enumerate(mean)
        ]


def _middle(drawn: Array) -> tuple[float, float]:
    """Return the 2.5 % and 97.5 % quantiles of resampled values."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def measure_costs(subjects: Sequence[Subject]) -> CellCosts | None:
    """Compute each layer's drop under each intervention; None if no removal is measured."""
    first, *others = subjects
    view = first.view.merge(*(subject.view for subject in others))
    outcomes = AlignedOutcomes(first.store, view)
    layers = tuple(sorted({run.layer for run in outcomes.runs if run.intervention == "remove"}))
    if not layers:
        return None
    fitted_on = dict.fromkeys(subject.record.fitted_on for subject in subjects)
    measure, documents = metric_format(first.record), "; ".join(filter(None, fitted_on))
    cell = CellCosts(first.record.title, len(outcomes.tasks), layers, measure, documents)
    removed: list[Array] = []
    for name in STAND_INS:
        runs = [Change(layers=(layer,), intervention=name) for layer in layers]
        ablations = [*map(outcomes.ablation, runs)]
        if not all(map(outcomes.is_measured, ablations)):
            continue
        metric, gold = outcomes.metric_outcomes(ablations), outcomes.gold_outcomes(ablations)
        for drops, paired in ((cell.drops, metric), (cell.nats, gold)):
            drops[name] = LayerDrops(*outcomes.drop_series(paired))
        replaced = [*metric.ablated.T]
        removed = removed or replaced
        if name != "remove":
            pairs = zip(replaced, removed, strict=True)
            p_values = [accuracy_drop(*pair, metric.weights).p_value for pair in pairs]
            cell.p_values[name] = p_values
    return cell


def estimate_reduction(cells: Sequence[CellCosts], name: Intervention, nats: bool) -> Estimate:
    """Estimate by what share a replacement reduces the drop of a removal, over all layers.

    Args:
        cells: The drops on several benchmarks.
        name: The replacement.
        nats: True to use the drop of the gold log-probability in nats; False to use the drop of the
            metric.

    Returns:
        The share.
    """
    means, drawn = [], []
    for intervention in ("remove", name):
        drops = [(cell.nats if nats else cell.drops)[intervention] for cell in cells]
        means.append(np.concatenate([drop.mean for drop in drops]))
        drawn.append(np.concatenate([drop.drawn for drop in drops], axis=1))
    return recovered_share(*means, *drawn)


def _write_answers(cells: Sequence[CellCosts]) -> list[str]:
    """Write sentences about the drop with each replacement, for benchmarks with the same metric."""
    names = [name for name in REPLACEMENTS if all(name in cell.drops for cell in cells)]
    costs = {name: _write_mean_cost(cells, name) for name in ("remove", *names)}
    documents = sum(cell.n for cell in cells)
    answers = RESCALE_TEXTS.render_all("costs", costs, STAND_INS, len(cells), documents)
    verdicts = []
    losses = {f"the {cells[0].measure.change}": False, "the drop of gold log-probability": True}
    for loss, nats in losses.items():
        shares = {name: estimate_reduction(cells, name, nats) for name in names}
        texts = {STAND_INS[name]: _write_percent(share) for name, share in shares.items()}
        answers += RESCALE_TEXTS.render_all("won_back", loss, texts)
        verdicts += RESCALE_TEXTS.render_all("verdict", loss, shares["scale"])
    return answers + verdicts


def _write_mean_cost(cells: Sequence[CellCosts], name: Intervention) -> str:
    drops = [cell.drops[name] for cell in cells]
    if bad := sum(int((~np.isfinite(drop.mean)).sum()) for drop in drops):
        return RESCALE_TEXTS.render("undefined", bad, sum(len(cell.layers) for cell in cells))
    mean = float(np.mean([drop.mean.mean() for drop in drops]))
    ends = _middle(np.mean([drop.drawn.mean(axis=1) for drop in drops], axis=0))
    return cells[0].measure.amount(Estimate(mean, *ends))


def _write_percent(share: Estimate) -> str:
    if share.value is None or share.low is None or share.high is None:
        return f"undefined ({share.reason})"
    low, value, high = (fixed_point(100 * x, 0) for x in (share.low, share.value, share.high))
    return f"{value} % (95 % interval {low} to {high})"


def _summary_table(cells: Sequence[CellCosts]) -> Table:
    """Build the table of the share of the drop that each replacement recovers, by benchmark."""
    measure = cells[0].measure

    def share(name: Intervention, quantity: str, nats: bool) -> Column[CellCosts]:
        def value(cell: CellCosts) -> Estimate | None:
            return estimate_reduction([cell], name, nats) if name in cell.drops else None

        label = f"share of {quantity} drop that {STAND_INS[name]} recovers"
        return Column(label, "percent", value, _NOT_MEASURED)

    def mean(cell: CellCosts) -> float:
        return float(cell.drops["remove"].mean.mean())

    label = f"mean {measure.change} of a removal{cells[0].unit}"
    return build_table(
        "Share of the drop that each replacement of a layer recovers",
        [
            Column("model and benchmark", "text", lambda cell: cell.name),
            Column("documents", "count", lambda cell: cell.n),
            Column(label, measure.form, mean, _NOT_FINITE),
            *(share(name, f"the {measure.level}", False) for name in REPLACEMENTS),
            *(share(name, "the gold log-probability", True) for name in REPLACEMENTS),
            Column("fitted on", "text", lambda cell: cell.fitted_on or None, "it is not known"),
        ],
        cells,
        *RESCALE_TEXTS.render_all("summary_notes"),
    )


@dataclass(frozen=True)
class SignificanceRow:
    """Table row: number of layers where a replacement is significantly better or worse."""

    replacement: str = labelled("replacement")
    tested: int = labelled("layers × benchmarks tested", "count")
    better: int | None = labelled("significantly better", "count", _NO_TEST)
    worse: int | None = labelled("significantly worse", "count", _NO_TEST)


def significance_table(cells: Sequence[CellCosts]) -> Table:
    """Build the table of how often a replacement is significantly better or worse than removal."""
    rows = []
    for name in REPLACEMENTS:
        if not (measured := [cell for cell in cells if name in cell.drops]):
            continue
        p_values = holm([value for cell in measured for value in cell.p_values[name]])
        gain = np.concatenate([c.drops["remove"].mean - c.drops[name].mean for c in measured])
        significant = np.array([value is not None and value < SIGNIFICANT for value in p_values])
        tested = sum(value is not None for value in p_values)
        counts = [int((significant & side).sum()) for side in (gain > 0, gain < 0)]
        rows.append(SignificanceRow(STAND_INS[name], tested, *(counts if tested else (None, None))))
    title = "Number of layers where a replacement costs significantly more or less than removal"
    notes = RESCALE_TEXTS.render_all("significance_notes")
    return figure_table(SignificanceRow, title, rows, *notes)


def _layer_table(cell: CellCosts) -> Table:
    """Build the table of each layer's drop when the layer is removed or replaced."""
    columns: list[Column[int]] = [Column("layer", "count", cell.layers.__getitem__)]
    for name in cell.drops:
        estimates = cell.estimates(name)
        columns.append(Column(STAND_INS[name], cell.measure.form, estimates.__getitem__))
    title = f"{cell.name}: {cell.measure.change} when a layer is removed or replaced"
    return build_table(f"{title}{cell.unit}", columns, range(len(cell.layers)))


def _drop_chart(cell: CellCosts) -> LineChart:
    """Build the chart of each layer's drop, with a line for removal and for each replacement."""
    measure, lines = cell.measure, {STAND_INS[n]: cell.estimates(n) for n in cell.drops}
    title = f"{cell.name}: {measure.change} when a layer is removed or replaced"
    axes = ("layer (0-based)", f"{measure.change}{cell.unit}")
    return line_chart(title, axes, measure.form, cell.layers, lines)
