"""Study: measure the cost of rounding each linear map, and the errors that predict it.

Each map alone is stored in a format. Its cost is compared with the errors by which tools choose
bits: of weights, of outputs, and of the model's predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tracker.analysis.claims import shown_runs
from tracker.analysis.paired import PairedOutcomes
from tracker.analysis.runs import ONE_LOOK
from tracker.core.answers import statement
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.estimates import Estimate
from tracker.core.formats import measure_of
from tracker.core.grouping import grouped
from tracker.core.kinds import ENDS, MAPS
from tracker.core.provenance import content_hash
from tracker.core.records import RunRecord
from tracker.core.tables import Table
from tracker.core.weight_formats import FORMATS
from tracker.report.wording import parts_answer
from tracker.search.formats import each_map, errors_of
from tracker.stats.arrays import Array, divided
from tracker.stats.rank_agreement import row_coefficients
from tracker.stats.resampling import bias_corrected_interval
from tracker.stats.support import together
from tracker.studies.base import (
    Study,
    StudyContext,
    StudyResult,
    Subject,
    observe,
    second_roundings,
    study_texts,
)
from tracker.studies.layout import figure_table, labelled
from tracker.studies.registry import PrecisionSettings

TEXTS = study_texts("precision")
DEFAULT = "int4"
"""The format where a file names none."""
Resample = Callable[[Array], Array]
"""Means of columns [documents, k] in each resample of the documents, [resamples, k]."""
MAX_ROWS = 10
"""Maximum number of maps that are listed, those with the largest fall."""
ERRORS = {
    "weight_error": "error of its weights",
    "output_error": "error of its outputs",
    "output_angle": "1 − cosine of its outputs",
    "kl": "KL divergence of the output",
}
"""Errors that tools use to judge a map instead of measuring its cost."""
_UNREACHED = "no token of the documents reaches it"  # as may be of a single expert
_VERDICTS = {"costs": "costs accuracy", "helps": "better so", "open": "open"}


@dataclass(frozen=True)
class RoundedMap:
    """One linear map in a format, with its fall on the documents that all maps share."""

    layer: int | None = labelled("layer (0-based)", "count", "of no layer")
    map: str | None = labelled("linear map")
    fall: Estimate = labelled("fall of gold log-probability", "nats")
    drop: Estimate = labelled("{change}", "change")
    verdict: str = labelled("shown")
    errors: dict[str, float] = labelled(ERRORS, "proxy", _UNREACHED)


@dataclass(frozen=True)
class MapName:
    """All maps of one name: the number of their layers, and their mean cost."""

    name: str = labelled("linear map")
    layers: int | None = labelled("layers", "count", "of no layer")
    fall: Estimate = labelled("fall of gold log-probability", "nats")
    errors: dict[str, float] = labelled(ERRORS, "proxy", _UNREACHED)


@dataclass(frozen=True)
class Order:
    """The agreement of an error with the fall of gold log-probability and with the drop."""

    error: str = labelled("error")
    fall: Estimate = labelled("Spearman with the fall of gold log-probability", "coefficient")
    drop: Estimate = labelled("Spearman with the {change}", "coefficient")


@dataclass(frozen=True)
class RoundedMaps:
    """The maps of one cell in one format, one by one, by name, and in order."""

    subject: Subject
    form: str
    maps: Sequence[RoundedMap]
    names: Sequence[MapName]
    orders: Sequence[Order]


class Precision(Study[PrecisionSettings]):
    """See the module."""

    name = "precision"
    question = "What does it cost to keep one linear map in fewer bits, and which error says so?"
    races = True
    intact = True
    texts = TEXTS

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield every linear map of the cell's layers, or those that it names."""
        if groups := [name for name in cell.changes.maps if name in MAPS]:
            raise RequestError(
                f"{cell.title}: {groups[0]} is several maps, and a study looks at each; leave it "
                "out of 'map'"
            )
        formats = tuple(done for done in cell.changes.interventions if done in FORMATS) or (
            DEFAULT,
        )
        yield each_map(cell, formats, context.options.trust_remote_code)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Compare the cost of each map with its errors, format by format."""
        result = StudyResult()
        for subject in subjects:
            record = subject.record
            sentences = statement(record.answer) if record.answer else "", parts_answer(record)
            result.add(f"{record.title}: {' '.join(filter(None, sentences))}")
            formats = grouped(record.runs, lambda run: str(run.change.intervention))
            for form, runs in formats.items():
                rounded = _rounded_maps(context, subject, form, runs)
                result.add(_answer(rounded), *_tables(rounded))
        result.add(*second_roundings(subjects))
        return result


def _rounded_maps(
    context: StudyContext, subject: Subject, form: str, runs: Sequence[RunRecord]
) -> RoundedMaps:
    """Observe the maps of a format, and order them."""
    maps = [run.change for run in runs]
    kind = f"rounding-{form}-{content_hash([*map(str, maps)])[:8]}"
    outcomes = subject.outcomes()
    observed = observe(
        subject, kind, context, partial(errors_of, maps=maps, kl=True), outcomes.documents
    )
    ablations = [outcomes.ablation(change) for change in maps]
    gold, metric = outcomes.by_gold_logprob(ablations), outcomes.by_metric(ablations)
    errors, resampled = _errors(observed.of(outcomes.documents), outcomes.resampled)
    # Cells that stopped at an answer are left out: their intervals hold for one look only.
    once = _without_interval if subject.record.is_raced else list
    drops = [(p.mean_drops, outcomes.resampled(p.drops, p.weights)) for p in (gold, metric)]
    orders = [
        Order(ERRORS[name], *once([_spearman(values, resampled[name], *drop) for drop in drops]))
        for name, values in errors.items()
    ]
    falls = [run.gold_drop for run in runs]
    if subject.record.is_raced:  # each run's own is of all that was looked at for it
        falls = _without_interval([gold.drop(index) for index in range(len(runs))])
    verdicts = shown_runs(subject.record, runs)
    rows = [
        RoundedMap(
            run.change.first,
            run.change.map,
            fall,
            run.drop,
            _VERDICTS[verdicts[run.change]],
            {name: float(errors[name][index]) for name in errors},
        )
        for index, (run, fall) in enumerate(zip(runs, falls, strict=True))
    ]
    return RoundedMaps(subject, form, rows, _by_name(rows, gold, once), orders)


def _errors(
    figures: dict[str, Array], resample: Resample
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sum errors up over documents, and in each resample of them.

    Name → [maps], and name → [resamples, maps].
    """
    tokens = figures["tokens"][:, None]
    over = {"output_error": figures["output_size"], "output_angle": tokens, "kl": tokens}
    weights = figures["weight_error"][0]
    found, drawn = {"weight_error": weights}, {"weight_error": weights[None]}
    for name, under in over.items():
        found[name] = divided(figures[name].sum(axis=0), under.sum(axis=0))
        drawn[name] = divided(resample(figures[name]), resample(under))
    return found, drawn


def _spearman(error: Array, errors: Array, drop: Array, drops: Array) -> Estimate:
    """Compute Spearman's coefficient of an error and a drop over maps, with its interval."""
    (value,) = row_coefficients(error[None], drop[None], "spearman").tolist()
    if not np.isfinite(value):
        return Estimate(None, reason="one of the two is undefined, or the same for all maps")
    rows = row_coefficients(errors, drops, "spearman")
    return Estimate(value, *bias_corrected_interval(value, rows, -1, 1))


def _without_interval(figures: Sequence[Estimate]) -> list[Estimate]:
    return [Estimate(each.value, reason=each.reason or ONE_LOOK) for each in figures]


def _by_name(
    maps: Sequence[RoundedMap], gold: PairedOutcomes, once: Callable[..., list[Estimate]]
) -> list[MapName]:
    """Average the costs of maps over layers, name by name, the costliest first."""
    by_name = grouped(range(len(maps)), lambda index: str(maps[index].map))
    falls = [
        replace(gold, ablated=gold.ablated[:, mine].mean(axis=1, keepdims=True)).drop(0)
        for mine in by_name.values()
    ]
    wide = once(together(falls, [len(gold.weights)] * len(falls)))
    names = [
        MapName(
            name,
            None if name in ENDS else len(mine),
            fall,
            {key: float(np.mean([maps[index].errors[key] for index in mine])) for key in ERRORS},
        )
        for (name, mine), fall in zip(by_name.items(), wide, strict=True)
    ]
    return sorted(names, key=lambda row: -(row.fall.value or 0.0))


def _title(rounded: RoundedMaps) -> str:
    return f"{rounded.subject.name}, {FORMATS[rounded.form].label}"


def _answer(rounded: RoundedMaps) -> str:
    """Return which name costs most, where that is shown, and how the errors order the maps."""
    first, *others = rounded.names
    is_first = all(other.fall.side(first.fall.low or 0.0) < 0 for other in others)
    orders = [order for order in rounded.orders if order.fall.value is not None]
    return TEXTS.one("answer", _title(rounded), first, others, is_first, orders, rounded.maps)


def _tables(rounded: RoundedMaps) -> Iterator[Table]:
    """Yield the tables of a format: by name, the costliest maps, and how errors order them."""
    record, title = rounded.subject.record, _title(rounded)
    measure, of = measure_of(record), len(rounded.maps)

    def note(macro: str) -> str:
        return TEXTS.one("raced_notes" if record.is_raced else macro, record)

    yield figure_table(
        MapName,
        f"{title}: linear maps by name, one at a time, on average over layers.",
        rounded.names,
        note("name_notes"),
    )
    most = sorted(rounded.maps, key=lambda row: -(row.fall.value or 0.0))[:MAX_ROWS]
    yield figure_table(
        RoundedMap,
        f"{title}: the {len(most)} of {of} maps that lower the right answer's log-probability "
        "most.",
        most,
        note("map_notes"),
        measure=measure,
    )
    yield figure_table(
        Order,
        f"{title}: how errors order the {of} maps.",
        rounded.orders,
        note("order_notes"),
        measure=measure,
    )
