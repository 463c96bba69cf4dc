"""Is what a removal costs only missing scale? Each layer removed, and replaced by what was fitted.

In the layer's place stands a factor of its input (if that helps, the layer was missed for the size
of the state alone), its mean update (a constant), or a linear map (all that a layer without
nonlinearity and without other tokens could do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tracker.core.ablations import ablation_of
from tracker.core.config import CellRequest
from tracker.core.estimates import Estimate
from tracker.core.findings import Line, LineChart, gaps
from tracker.core.formats import Measure, counted, fixed, measure_of
from tracker.core.kinds import Intervention
from tracker.core.records import RunIdentity
from tracker.core.tables import Column, Table, estimate, table
from tracker.ledger.aligned import AlignedOutcomes
from tracker.ledger.paired import Array
from tracker.stats.accuracy import accuracy_drop
from tracker.stats.multiple import holm
from tracker.stats.recovered import recovered
from tracker.stats.resampling import RESAMPLES
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    grouped,
    refuse_removed,
    removing_whole_layers,
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
_NOT_MEASURED = "not measured; what is lacking says why"
_NOT_FINITE = "a drop is not a finite number"
_NO_TEST = "McNemar's test needs outcomes that are right or wrong, and there are none"


class Rescale(Study):
    """See the module."""

    name = "rescale"
    question = "Is what a removal costs only missing scale?"
    about = """
    Each layer in EXPERIMENT is removed, and replaced by a factor of its input, by its mean update
    and by a linear map of its input, all fitted on other documents. The study says how much of the
    drop each of these wins back, whatever 'intervention' the file names: if a factor does, the
    layer was missed for the size of the hidden state alone. About four times the work of removing
    the layers.

    \b
    Examples:
      tracker study rescale experiments/replaced.yaml
      tracker study rescale experiments/demo.yaml --results results --track none
    """
    settings = ()

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
        found = [cell for mine in parts if (cell := costs(mine)) is not None]
        if not found:
            return StudyResult(
                [], lacking=["no benchmark was measured with layers removed; run it again"]
            )
        # Bits and fractions have no sum.
        alike = grouped(found, lambda cell: cell.measure)
        return StudyResult(
            answers=[
                f"By {cells[0].measure.level} in {cells[0].measure.unit}: {line}"
                if len(alike) > 1
                else line
                for cells in alike
                for line in _answers(cells)
            ],
            tables=[*map(summary, alike), significant(found), *map(layer_table, found)],
            charts=[drop_chart(cell) for cell in found],
            assumptions=_ASSUMED,
        )


def _answers(cells: Sequence[Costs]) -> list[str]:
    """Say it over all cells of one measure, each weighing the same."""
    answers = []
    measure = cells[0].measure
    ways = [way for way in WAYS if all(way in cell.drops for cell in cells)]
    said = "".join(f", {_cost(cells, way)} with {NAMES[way]}" for way in ways)
    documents = sum(cell.n for cell in cells)
    where = f"over {counted(len(cells), 'benchmark')} ({counted(documents, 'document')})"
    answers.append(f"A layer costs {_cost(cells, 'remove')} when it is removed{said}; {where}.")
    shares = {
        what: {way: _won_back(cells, way, nats) for way in ways}
        for what, nats in (
            (f"the {measure.change}", False),
            ("the loss of gold log-probability", True),
        )
    }
    for what, by_way in shares.items():
        text = ", ".join(f"{NAMES[way]} {_share(found)}" for way, found in by_way.items())
        answers.append(f"Won back of {what}: {text}.")
    for what, by_way in shares.items():
        scale = by_way["scale"]
        if scale.low is not None and scale.high is not None:
            part = "not only" if scale.high < 0.5 else "mostly" if scale.low > 0.5 else "perhaps"
            answers.append(f"So {what} is {part} missing scale.")
    return answers


def _cost(cells: Sequence[Costs], way: Intervention) -> str:
    """The mean drop of a layer, or why there is none."""
    measure = cells[0].measure
    if bad := sum(int((~np.isfinite(cell.drops[way])).sum()) for cell in cells):
        of = sum(len(cell.layers) for cell in cells)
        return f"an undefined amount (not finite for {bad} of {of} layers)"
    mean = float(np.mean([cell.drops[way].mean() for cell in cells]))
    return f"{measure.write(mean)} {measure.unit}"


def _won_back(cells: Sequence[Costs], way: Intervention, nats: bool) -> Estimate:
    """Put the layers of all cells together, in nats or by accuracy."""
    drops = [cell.nats if nats else cell.drops for cell in cells]
    drawn = [cell.drawn_nats if nats else cell.drawn for cell in cells]
    return recovered(
        np.concatenate([each["remove"] for each in drops]),
        np.concatenate([each[way] for each in drops]),
        np.concatenate([each["remove"] for each in drawn], axis=1),
        np.concatenate([each[way] for each in drawn], axis=1),
    )


def _share(found: Estimate) -> str:
    if found.value is None or found.low is None or found.high is None:
        return f"undefined ({found.reason})"
    low, value, high = (fixed(100 * each, 0) for each in (found.low, found.value, found.high))
    return f"{value} % (95 % interval {low} to {high})"


@dataclass(frozen=True)
class Costs:
    """What one cell's layers cost, removed and replaced.

    Attributes:
        name: The cell's title.
        n: Documents.
        layers: The layers that are removed, ascending.
        drops: Way → mean drop of each layer.
        drawn: The same in each resample of the documents.
        nats: Way → what each layer takes of the gold answer's log-probability.
        drawn_nats: The same in each resample.
        better: Way → for each layer, the p-value of doing otherwise than without the layer; None
            where no test could be made.
        measure: What a drop is, and its unit.
        fitted_on: On what the stand-ins were fitted; empty where that is not known.
    """

    name: str
    n: int
    layers: tuple[int, ...]
    drops: dict[Intervention, Array]
    drawn: dict[Intervention, Array]
    nats: dict[Intervention, Array]
    drawn_nats: dict[Intervention, Array]
    better: dict[Intervention, list[float | None]]
    measure: Measure
    fitted_on: str


def costs(subjects: Sequence[Subject]) -> Costs | None:
    """Compute it from the parts of a cell; None where no layer is measured without a stand-in."""
    first, *rest = subjects
    view = first.store.views.of(first.request)
    view = view.joined(*(one.store.views.of(one.request) for one in rest))
    outcomes = AlignedOutcomes(first.store, view)
    layers = tuple(sorted({run.layer for run in outcomes.runs if run.intervention == "remove"}))
    if not layers:
        return None
    drops: dict[Intervention, Array] = {}
    drawn: dict[Intervention, Array] = {}
    nats: dict[Intervention, Array] = {}
    drawn_nats: dict[Intervention, Array] = {}
    better: dict[Intervention, list[float | None]] = {}
    removed: list[Array] = []
    for way in EVERY:
        runs = [RunIdentity(layer=layer, intervention=way) for layer in layers]
        ablations = [ablation_of(run, view.removed) for run in runs]
        if not all(map(outcomes.has, ablations)):
            continue
        paired, gold = outcomes.by_metric(ablations), outcomes.by_gold_logprob(ablations)
        weights = paired.weights
        drops[way] = paired.mean_drops
        drawn[way] = outcomes.resampled(paired.drops, weights)
        nats[way] = gold.mean_drops
        drawn_nats[way] = outcomes.resampled(gold.drops, gold.weights)
        after = list(paired.ablated.T)
        if way == "remove":
            removed = after
        else:
            pairs = zip(after, removed, strict=True)
            better[way] = [accuracy_drop(mine, theirs, weights).p_value for mine, theirs in pairs]
    if "remove" not in drops:
        return None
    return Costs(
        name=first.record.title,
        n=len(outcomes.tasks),
        layers=layers,
        drops=drops,
        drawn=drawn,
        nats=nats,
        drawn_nats=drawn_nats,
        better=better,
        measure=measure_of(first.record),
        fitted_on="; ".join(
            dict.fromkeys(filter(None, (one.record.fitted_on for one in subjects)))
        ),
    )


def in_unit(measure: Measure) -> str:
    """Name the unit of a drop behind what it is; nothing where its form says it."""
    return "" if measure.form == "points" else f", {measure.unit}"


def summary(cells: Sequence[Costs]) -> Table:
    """Say of each cell of one measure how much of the drop each stand-in wins back."""
    measure = cells[0].measure

    def won_back(way: Intervention, nats: bool) -> Column[Costs]:
        what = "the gold log-probability" if nats else f"the {measure.level}"

        def value(cell: Costs) -> Estimate:
            drops, drawn = (cell.nats, cell.drawn_nats) if nats else (cell.drops, cell.drawn)
            if way not in drops:
                return Estimate(None, reason=_NOT_MEASURED)
            return recovered(drops["remove"], drops[way], drawn["remove"], drawn[way])

        return Column(f"{NAMES[way]} wins back, of {what}", "percent", value)

    def mean(cell: Costs) -> Estimate:
        return estimate(float(cell.drops["remove"].mean()), _NOT_FINITE)

    label = f"mean {measure.change} of a removal{in_unit(measure)}"
    return table(
        "What stands in for a layer, and how much of the drop it wins back",
        [
            Column("model and benchmark", "text", lambda cell: cell.name),
            Column("documents", "count", lambda cell: cell.n),
            Column(label, measure.form, mean),
            *(won_back(way, nats) for nats in (False, True) for way in WAYS),
            Column("fitted on", "text", lambda cell: cell.fitted_on or None, "it is not known"),
        ],
        cells,
        (
            "Won back: 1 − (sum of the drops with the stand-in) / (sum of the drops of "
            "removals), over all layers, with 95 % intervals from resampling documents. "
            "Below 0: worse than nothing in the layer's place.",
        ),
    )


class _Tested(NamedTuple):
    """A row: a stand-in, and in how many layers it was tested and does better or worse."""

    way: Intervention
    made: int
    better: int
    worse: int


def significant(cells: Sequence[Costs]) -> Table:
    """Count the layers where a stand-in does significantly better, or worse, than nothing."""
    rows = []
    for way in WAYS:
        some = [cell for cell in cells if way in cell.drops]
        if not some:
            continue
        p = holm([value for cell in some for value in cell.better[way]])
        gain = np.concatenate([cell.drops["remove"] - cell.drops[way] for cell in some])
        sure = np.array([value is not None and value < SIGNIFICANT for value in p])
        made = sum(value is not None for value in p)
        counts = (int((sure & (gain > 0)).sum()), int((sure & (gain < 0)).sum()))
        rows.append(_Tested(way, made, *counts))
    columns: tuple[Column[_Tested], ...] = (
        Column("stand-in", "text", lambda row: NAMES[row.way]),
        Column("layers × benchmarks tested", "count", lambda row: row.made),
        Column(
            "significantly better", "count", lambda row: row.better if row.made else None, _NO_TEST
        ),
        Column(
            "significantly worse", "count", lambda row: row.worse if row.made else None, _NO_TEST
        ),
    )
    return table(
        "Layers where a stand-in does otherwise than nothing",
        columns,
        rows,
        (
            "Exact McNemar tests, Holm's adjustment within each row, 5 %; layers of metrics that "
            "are not right or wrong a document are not tested.",
        ),
    )


def layer_table(cell: Costs) -> Table:
    """List what each layer costs with something in its place."""

    def column(way: Intervention) -> Column[int]:
        def value(place: int) -> Estimate:
            low, high = np.quantile(cell.drawn[way][:, place], [0.025, 0.975])
            return estimate(float(cell.drops[way][place]), _NOT_FINITE, float(low), float(high))

        return Column(NAMES[way], cell.measure.form, value)

    return table(
        f"{cell.name}: {cell.measure.change} of each layer with something in its place"
        f"{in_unit(cell.measure)}",
        [
            Column("layer", "count", lambda place: cell.layers[place]),
            *(column(way) for way in EVERY if way in cell.drops),
        ],
        range(len(cell.layers)),
    )


def drop_chart(cell: Costs) -> LineChart:
    """Draw the drops of all layers, a line each way."""
    return LineChart(
        title=f"{cell.name}: {cell.measure.change} with something in the layer's place",
        x="layer (0-based)",
        y=f"{cell.measure.change}{in_unit(cell.measure)}",
        unit=cell.measure.form,
        places=cell.layers,
        lines=tuple(Line(name=NAMES[way], values=gaps(cell.drops[way])) for way in cell.drops),
    )
