"""Is what a removal costs only missing scale? Each layer removed, and replaced by what was fitted.

In the layer's place stands a factor of its input (if that helps, the layer was missed for the size
of the state alone), its mean update (a constant), or a linear map (all that a layer without
nonlinearity and without other tokens could do).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracker.ablations import INTACT, Ablation, ablation_of
from tracker.config import CellRequest, Intervention
from tracker.findings import Entry, FoundTable, Heading, Line, LineChart
from tracker.ledger.viewed import Array, Viewed, gold_logprobs
from tracker.metrics.accuracy import Estimate, accuracy_drop, weights_by_task
from tracker.metrics.multiple import holm
from tracker.metrics.recovered import recovered
from tracker.metrics.resampling import resampled_means
from tracker.records import RunIdentity
from tracker.reporting.formats import fixed, points
from tracker.studies.base import Asked, Said, Subject

WAYS: tuple[Intervention, ...] = ("scale", "mean", "linear")
"""What stands in for a layer, from the least to the most that it can do."""
NAMES = {
    "remove": "nothing",
    "scale": "a factor",
    "mean": "its mean update",
    "linear": "a linear map",
}
EVERY: tuple[Intervention, ...] = ("remove", *WAYS)
RESAMPLES, SEED = 2000, 0
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class _Cell:
    """What one cell's layers cost: way → mean drop of each layer, and of each resample."""

    name: str
    n: int
    layers: tuple[int, ...]
    drops: dict[Intervention, Array]
    drawn: dict[Intervention, Array]
    nats: dict[Intervention, Array]
    drawn_nats: dict[Intervention, Array]
    better: dict[Intervention, list[float]]
    """Way → for each layer, the p-value of doing otherwise than without the layer."""


class Rescale:
    """See the module."""

    name = "rescale"
    question = "Is what a removal costs only missing scale?"

    def requests(self, asked: Asked) -> list[CellRequest]:
        """Ask for each cell twice: a linear map that cannot be fitted leaves the rest alone."""
        plain = {"components": ("layer",), "spans": (1,), "only": None}
        ways: tuple[tuple[Intervention, ...], ...] = (("remove", "scale", "mean"), ("linear",))
        return [
            cell.model_copy(update={**plain, "interventions": some})
            for cell in asked.experiment.cells()
            for some in ways
        ]

    def say(self, asked: Asked, subjects: list[Subject]) -> Said:
        """Answer; see the module."""
        found = [cell for mine in _by_cell(subjects) if (cell := _cell(mine)) is not None]
        if not found:
            return Said([], lacking=["no cell was measured with layers removed; run it again"])
        rows, lacking = [], []
        for cell in found:
            row = [Entry(value=cell.name), Entry(value=cell.n)]
            row.append(Entry(value=float(cell.drops["remove"].mean())))
            for drops, drawn in ((cell.drops, cell.drawn), (cell.nats, cell.drawn_nats)):
                row += [_recovered(drops, drawn, way) for way in WAYS]
            rows.append(tuple(row))
            lacking += [e.reason for e in row if e.reason and "linear map" in e.reason]
        heads = [Heading(label="cell"), Heading(label="documents", unit="count")]
        heads.append(Heading(label="mean drop of a removal", unit="points"))
        for what in ("of the accuracy", "of the gold log-probability"):
            heads += [
                Heading(label=f"{NAMES[way]} wins back, {what}", unit="percent") for way in WAYS
            ]
        summary = FoundTable(
            title="What stands in for a layer, and how much of the drop it wins back",
            headings=tuple(heads),
            rows=tuple(rows),
            notes=(
                "Won back: 1 − (sum of the drops with the stand-in) / (sum of the drops of "
                "removals), over all layers, with 95 % intervals from resampling documents. "
                "Below 0: worse than nothing in the layer's place.",
            ),
        )
        return Said(
            answers=_answers(found),
            tables=[summary, _significant(found), *map(_layers, found)],
            charts=[_chart(cell) for cell in found],
            lacking=list(dict.fromkeys(lacking)),
            assumptions=(
                "Factors, mean updates and linear maps are fitted by least squares on other "
                "documents of the benchmark where there are enough (each cell says on which), over "
                "all tokens but each text's first; a linear map has a bias.",
                f"Intervals: percentile bootstrap over documents, {RESAMPLES:,} resamples, within "
                "tasks; documents are independent, layers are taken as they are.",
                "Significance: exact McNemar test of each stand-in against nothing in the layer's "
                "place, over the documents; Holm's adjustment over all layers and cells of a "
                "stand-in (S. Holm, Scand. J. Statist. 6, 1979).",
            ),
        )


def _by_cell(subjects: Sequence[Subject]) -> list[list[Subject]]:
    """Put the parts of each cell together: without layers, and with linear maps."""
    groups: dict[object, list[Subject]] = {}
    for subject in subjects:
        request = subject.request.model_copy(update={"interventions": ()})
        groups.setdefault(request, []).append(subject)
    return list(groups.values())


def _cell(subjects: Sequence[Subject]) -> _Cell | None:
    first, *rest = subjects
    view = first.store.views.of(first.request)
    view = view.joined(*(one.store.views.of(one.request) for one in rest))
    outcomes = Viewed(first.store, view)
    layers = tuple(sorted({run.layer for run in outcomes.runs if run.intervention == "remove"}))
    if not layers:
        return None
    metric = view.metric
    weights = weights_by_task(
        outcomes.tasks, first.record.benchmark.weight_by_size, outcomes.units(metric)
    )
    sign = 1.0 if outcomes.higher_is_better(metric) else -1.0
    gold = gold_logprobs(outcomes.of(INTACT))
    strata = None if len(set(outcomes.tasks)) == 1 else np.array(outcomes.tasks)
    drops: dict[Intervention, Array] = {}
    drawn: dict[Intervention, Array] = {}
    nats: dict[Intervention, Array] = {}
    drawn_nats: dict[Intervention, Array] = {}
    better: dict[Intervention, list[float]] = {}
    after: dict[Intervention, list[Array]] = {}

    def ablation(way: Intervention, layer: int) -> Ablation:
        run = RunIdentity(layer=layer, intervention=way)
        return ablation_of(run, view.removed)

    for way in EVERY:
        if not all(outcomes.has(ablation(way, layer)) for layer in layers):
            continue
        before = outcomes.metric(INTACT, metric)
        after[way] = [outcomes.metric(ablation(way, layer), metric) for layer in layers]
        each = sign * (before[:, None] - np.stack(after[way], axis=1))
        lost = [gold - gold_logprobs(outcomes.of(ablation(way, layer))) for layer in layers]
        drops[way] = weights @ each
        drawn[way] = resampled_means(each, RESAMPLES, SEED, strata, weights)
        nats[way] = weights @ np.stack(lost, axis=1)
        drawn_nats[way] = resampled_means(np.stack(lost, axis=1), RESAMPLES, SEED, strata, weights)
        if way != "remove":
            pairs = zip(after[way], after["remove"], strict=True)
            found = [accuracy_drop(mine, theirs, weights).p_value for mine, theirs in pairs]
            better[way] = [1.0 if p is None else p for p in found]
    if "remove" not in drops:
        return None
    name = first.record.title
    n = len(outcomes.tasks)
    return _Cell(name, n, layers, drops, drawn, nats, drawn_nats, better)


def _recovered(
    drops: dict[Intervention, Array], drawn: dict[Intervention, Array], way: Intervention
) -> Entry:
    if way not in drops:
        return Entry(reason="no linear map could be fitted, because the calibration text is short")
    return _entry(recovered(drops["remove"], drops[way], drawn["remove"], drawn[way]))


def _entry(found: Estimate) -> Entry:
    if found.value is None:
        return Entry(reason=found.reason or "undefined")
    return Entry(value=found.value, low=found.low, high=found.high)


def _answers(cells: Sequence[_Cell]) -> list[str]:
    """Say it over all cells, each weighing the same."""
    answers = []
    mean = {
        way: float(np.mean([cell.drops[way].mean() for cell in cells]))
        for way in EVERY
        if all(way in cell.drops for cell in cells)
    }
    said = ", ".join(f"{points(mean[way])} pp with {NAMES[way]}" for way in WAYS if way in mean)
    documents = sum(cell.n for cell in cells)
    where = f"over {len(cells)} cell{'s' * (len(cells) > 1)} ({documents:,} documents)"
    answers.append(
        f"A layer costs {points(mean['remove'])} pp when it is removed, {said}; {where}."
    )
    for way in WAYS:
        if way not in mean:
            continue
        found = recovered(
            np.concatenate([c.drops["remove"] for c in cells]),
            np.concatenate([c.drops[way] for c in cells]),
            np.concatenate([c.drawn["remove"] for c in cells], axis=1),
            np.concatenate([c.drawn[way] for c in cells], axis=1),
        )
        if found.value is None or found.low is None or found.high is None:
            answers.append(f"What {NAMES[way]} wins back is undefined: {found.reason}.")
            continue
        share = (
            f"{fixed(100 * found.value, 0)} % (95 % interval {fixed(100 * found.low, 0)} to "
            f"{fixed(100 * found.high, 0)})"
        )
        verdict = ""
        if way == "scale":
            verdict = (
                "; so the drop is not only missing scale"
                if found.high < 0.5
                else "; so most of the drop is missing scale"
                if found.low > 0.5
                else "; whether most of the drop is missing scale is open"
            )
        subject = NAMES[way][0].upper() + NAMES[way][1:]
        answers.append(f"{subject} in the layer's place wins back {share} of the drop{verdict}.")
    return answers


def _significant(cells: Sequence[_Cell]) -> FoundTable:
    """Count the layers where a stand-in does significantly better, or worse, than nothing."""
    rows = []
    for way in WAYS:
        some = [cell for cell in cells if way in cell.drops]
        if not some:
            continue
        p = holm([value for cell in some for value in cell.better[way]])
        gain = np.concatenate([cell.drops["remove"] - cell.drops[way] for cell in some])
        sure = np.array([value is not None and value < SIGNIFICANT for value in p])
        rows.append(
            (
                Entry(value=NAMES[way]),
                Entry(value=len(p)),
                Entry(value=int((sure & (gain > 0)).sum())),
                Entry(value=int((sure & (gain < 0)).sum())),
            )
        )
    return FoundTable(
        title="Layers where a stand-in does otherwise than nothing",
        headings=(
            Heading(label="stand-in"),
            Heading(label="layers × cells", unit="count"),
            Heading(label="significantly better", unit="count"),
            Heading(label="significantly worse", unit="count"),
        ),
        rows=tuple(rows),
        notes=("Exact McNemar tests, Holm's adjustment within each row, 5 %.",),
    )


def _layers(cell: _Cell) -> FoundTable:
    ways = [way for way in EVERY if way in cell.drops]
    rows = []
    for place, layer in enumerate(cell.layers):
        row = [Entry(value=layer)]
        for way in ways:
            low, high = np.quantile(cell.drawn[way][:, place], [0.025, 0.975])
            row.append(Entry(value=float(cell.drops[way][place]), low=low, high=high))
        rows.append(tuple(row))
    return FoundTable(
        title=f"{cell.name}: accuracy drop of each layer with something in its place",
        headings=(
            Heading(label="layer", unit="count"),
            *(Heading(label=NAMES[way], unit="points") for way in ways),
        ),
        rows=tuple(rows),
    )


def _chart(cell: _Cell) -> LineChart:
    return LineChart(
        title=f"{cell.name}: accuracy drop with something in the layer's place",
        x="layer (0-based)",
        y="accuracy drop",
        unit="points",
        places=cell.layers,
        lines=tuple(
            Line(name=NAMES[way], values=tuple(cell.drops[way].tolist())) for way in cell.drops
        ),
    )
