"""Study: measure the cost of rounding each linear map, and which errors predict the cost.

The study rounds one linear map at a time to a low-bit format. The study compares the lost accuracy
with errors of the weights, of the map's outputs, and of the model's predictions. Quantisation tools
choose the number of bits of each map by rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tracker.analysis.claims import run_verdicts
from tracker.analysis.paired import PairedOutcomes
from tracker.analysis.runs import ONE_LOOK_REASON
from tracker.report.wording import parts_answer
from tracker.schema.answers import statement
from tracker.schema.config import CellRequest
from tracker.schema.errors import RequestError
from tracker.schema.estimates import Estimate
from tracker.schema.formats import metric_format
from tracker.schema.grouping import group_by
from tracker.schema.kinds import MAP_GROUPS, OUTER_MATRICES
from tracker.schema.provenance import content_hash
from tracker.schema.records import CellRecord, RunRecord
from tracker.schema.tables import Table
from tracker.schema.weight_formats import FORMATS
from tracker.search.formats import build_error_observer, map_formats_request
from tracker.stats.arrays import Array, safe_divide
from tracker.stats.correlation import resampled_spearman
from tracker.stats.support import widen
from tracker.studies.base import (
    Study,
    StudyContext,
    StudyResult,
    Subject,
    observe_subject,
    second_rounding_notes,
    study_texts,
)
from tracker.studies.layout import figure_table, labelled
from tracker.studies.registry import PrecisionSettings

PRECISION_TEXTS = study_texts("precision")
DEFAULT_FORMAT = "int4"
"""Format that is used if the experiment file names no format."""
MAX_MAPS_LISTED = 10
"""Maximum number of maps in the table of maps with the largest fall."""
ERROR_LABELS = {
    "weight_error": "error of its weights",
    "output_error": "error of its outputs",
    "output_angle": "1 − cosine of its outputs",
    "kl": "KL divergence of the output",
}
"""Labels of the errors that tools use to judge a map instead of measuring its cost."""
_UNREACHED = "this linear map processes no token of the documents"  # as may be of a single expert
_VERDICT_WORDS = {"costs": "costs accuracy", "helps": "better so", "open": "open"}


@dataclass(frozen=True)
class RoundedMap:
    """Cost and errors of rounding one linear map to a format, as a table row."""

    layer: int | None = labelled("layer (0-based)", "count", "of no layer")
    map: str | None = labelled("linear map")
    fall: Estimate = labelled("drop of gold log-probability", "nats")
    drop: Estimate = labelled("{change}", "change")
    verdict: str = labelled("shown")
    errors: dict[str, float] = labelled(ERROR_LABELS, "proxy", _UNREACHED)


@dataclass(frozen=True)
class MapNameRow:
    """Cost of rounding the linear maps with the same name, averaged over layers."""

    name: str = labelled("linear map")
    layers: int | None = labelled("layers", "count", "of no layer")
    fall: Estimate = labelled("drop of gold log-probability", "nats")
    errors: dict[str, float] = labelled(ERROR_LABELS, "proxy", _UNREACHED)


@dataclass(frozen=True)
class ErrorOrder:
    """Correlations of one rounding error with two costs: log-probability drop and accuracy drop."""

    error: str = labelled("error")
    fall: Estimate = labelled(
        "Spearman correlation with the drop of gold log-probability", "coefficient"
    )
    drop: Estimate = labelled("Spearman correlation with the {change}", "coefficient")


@dataclass(frozen=True)
class RoundedMaps:
    """Costs and errors of rounding each linear map to one format, on one benchmark."""

    record: CellRecord
    title: str
    maps: Sequence[RoundedMap]
    names: Sequence[MapNameRow]
    orders: Sequence[ErrorOrder]


class Precision(Study[PrecisionSettings]):
    """Study that measures the cost of rounding each linear map (weight matrix) of a model."""

    name = "precision"
    question = "What does rounding one linear map cost, and which rounding error predicts the cost?"
    races = True
    intact = True
    texts = PRECISION_TEXTS

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield the request that rounds each linear map alone."""
        if groups := [name for name in cell.changes.maps if name in MAP_GROUPS]:
            raise RequestError(PRECISION_TEXTS.render("several_maps", cell, groups[0]))
        formats = tuple(name for name in cell.changes.interventions if name in FORMATS)
        trust = context.options.trust_remote_code
        yield map_formats_request(cell, formats or (DEFAULT_FORMAT,), trust)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Compare the cost of rounding each map with the map's rounding errors."""
        result = StudyResult()
        for subject in subjects:
            record = subject.record
            sentences = statement(record.answer) if record.answer else "", parts_answer(record)
            result.add(f"{record.title}: {' '.join(filter(None, sentences))}")
            formats = group_by(record.runs, lambda run: str(run.change.intervention))
            for name, runs in formats.items():
                rounded = _observe_maps(context, subject, name, runs)
                result.add(_write_answer(rounded), *_build_tables(rounded))
        result.add(*second_rounding_notes(subjects))
        return result


def _observe_maps(
    context: StudyContext, subject: Subject, name: str, runs: Sequence[RunRecord]
) -> RoundedMaps:
    """Correlate the rounding errors of all maps in one format with the costs of rounding.

    `name` is the name of the format, and each of `runs` rounds one map.
    """
    maps, record, outcomes = [run.change for run in runs], subject.record, subject.outcomes()
    kind = f"rounding-{name}-{content_hash([*map(str, maps)])[:8]}"
    begin = partial(build_error_observer, maps=maps, kl=True)
    observations = observe_subject(subject, kind, context, begin, outcomes.documents)
    ablations = [outcomes.ablation(change) for change in maps]
    gold, metric = outcomes.gold_outcomes(ablations), outcomes.metric_outcomes(ablations)
    errors = _rounding_errors(observations.select(outcomes.documents), outcomes.resample)
    # Cells that stopped at an answer are left out: their intervals hold for one look only.
    hide_intervals = _without_interval if record.is_raced else list
    drops = [outcomes.drop_series(paired) for paired in (gold, metric)]
    orders = []
    for error, figures in errors.items():
        pair = hide_intervals([resampled_spearman(*figures, *drop) for drop in drops])
        orders.append(ErrorOrder(ERROR_LABELS[error], *pair))
    falls = [run.gold_drop for run in runs]
    if record.is_raced:  # a run's own fall also rests on documents that other runs lack
        falls = _without_interval([gold.drop(index) for index in range(len(runs))])
    verdicts = run_verdicts(record, runs)
    rows = []
    for index, (run, fall) in enumerate(zip(runs, falls, strict=True)):
        change, verdict = run.change, _VERDICT_WORDS[verdicts[run.change]]
        values = {name: float(means[index]) for name, (means, _) in errors.items()}
        row = RoundedMap(change.first_layer, change.map, fall, run.drop, verdict, values)
        rows.append(row)
    title = f"{subject.name}, {FORMATS[name].label}"
    return RoundedMaps(record, title, rows, _mean_costs(rows, gold, hide_intervals), orders)


def _rounding_errors(
    figures: dict[str, Array], resample: Callable[[Array], Array]
) -> dict[str, tuple[Array, Array]]:
    """Compute the rounding errors of each linear map over all documents.

    Args:
        figures: Name of a measured quantity → array `[documents, maps]`.
        resample: Function that returns the column means of an array in each bootstrap resample.

    Returns:
        Kind of error → (errors over all documents `[maps]`, errors in each bootstrap resample
        `[resamples, maps]`).
    """
    tokens = figures["tokens"][:, None]
    sizes = {"output_error": figures["output_size"], "output_angle": tokens, "kl": tokens}
    weights = figures["weight_error"][0]
    errors = {"weight_error": (weights, weights[None])}
    for name, size in sizes.items():
        error = safe_divide(figures[name].sum(axis=0), size.sum(axis=0))
        errors[name] = error, safe_divide(resample(figures[name]), resample(size))
    return errors


def _without_interval(estimates: Sequence[Estimate]) -> list[Estimate]:
    return [Estimate(e.value, reason=e.reason or ONE_LOOK_REASON) for e in estimates]


def _mean_costs(
    maps: Sequence[RoundedMap], gold: PairedOutcomes, hide_intervals: Callable[..., list[Estimate]]
) -> list[MapNameRow]:
    """Average the rounding costs of all linear maps that have the same name.

    Args:
        maps: The costs and errors of each linear map.
        gold: Log-probabilities of the right answers, with a column for each map.
        hide_intervals: Function that removes the intervals from estimates if the measurement
            stopped early; otherwise it returns the estimates unchanged.

    Returns:
        A row for each name of a map; the row with the largest mean cost is first.
    """
    by_name = group_by(range(len(maps)), lambda index: str(maps[index].map))
    means = [gold.ablated[:, rows].mean(axis=1, keepdims=True) for rows in by_name.values()]
    falls = [replace(gold, ablated=mean).drop(0) for mean in means]
    falls = hide_intervals(widen(falls, [len(gold.weights)] * len(falls)))
    rows = []
    for (name, indices), fall in zip(by_name.items(), falls, strict=True):
        errors = {e: float(np.mean([maps[i].errors[e] for i in indices])) for e in ERROR_LABELS}
        layers = None if name in OUTER_MATRICES else len(indices)
        rows.append(MapNameRow(name, layers, fall, errors))
    return sorted(rows, key=lambda row: -(row.fall.value or 0.0))


def _write_answer(rounded: RoundedMaps) -> str:
    """Write which linear maps cost most, and how well rounding errors predict the costs."""
    first, *others = rounded.names
    is_first = all(row.fall.side(first.fall.low or 0.0) < 0 for row in others)
    orders = [order for order in rounded.orders if order.fall.value is not None]
    figures = (first, others, is_first, orders, rounded.maps)
    return PRECISION_TEXTS.render("answer", rounded.title, *figures)


def _build_tables(rounded: RoundedMaps) -> Iterator[Table]:
    """Yield three tables: costs by map name, the costliest maps, and correlations of the errors."""
    record, title, n_maps = rounded.record, rounded.title, len(rounded.maps)
    costliest = sorted(rounded.maps, key=lambda row: -(row.fall.value or 0.0))[:MAX_MAPS_LISTED]
    names = f"{title}: mean cost, over layers, of rounding one linear map, by name of the map."
    maps = f"{title}: the {len(costliest)} of {n_maps} maps that cost most log-probability."
    orders = f"{title}: rank correlation of rounding errors and costs over {n_maps} linear maps."
    for kind, heading, rows, macro in (
        (MapNameRow, names, rounded.names, "name_notes"),
        (RoundedMap, maps, costliest, "map_notes"),
        (ErrorOrder, orders, rounded.orders, "order_notes"),
    ):
        note = PRECISION_TEXTS.render("raced_notes" if record.is_raced else macro, record)
        yield figure_table(kind, heading, rows, note, measure=metric_format(record))
