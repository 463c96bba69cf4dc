"""What does it cost to keep a linear map of a layer in fewer bits, and which error says so?

Each map is given the weights of a format, alone. What that costs is set beside the errors by which
tools choose bits: of the weights, of the outputs, of what the model says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tracker.core.answers import statement
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, listed, measure_of, three_digits, with_interval
from tracker.core.grouping import grouped
from tracker.core.kinds import ENDS, MAPS
from tracker.core.provenance import content_hash
from tracker.core.records import RunRecord
from tracker.core.tables import Column, Table, table
from tracker.core.weight_formats import FORMATS
from tracker.ledger.paired import PairedOutcomes
from tracker.ledger.runs import ONE_LOOK
from tracker.report.leaderboard.claims import parts_answer, shown_in
from tracker.search.format_requests import each_map, errors_of
from tracker.stats.arrays import Array, divided
from tracker.stats.rank_agreement import row_coefficients
from tracker.stats.resampling import bias_corrected_interval
from tracker.stats.support import Verdict, together
from tracker.studies.base import (
    Study,
    StudyContext,
    StudyResult,
    Subject,
    lined_up,
    observe,
    refuse_removed,
    second_roundings,
    side,
)

DEFAULT = "int4"
"""The format where a file names none."""
Resample = Callable[[Array], Array]
"""Means of columns [documents, k] in each resample of the documents, [resamples, k]."""
MOST = 10
"""So many maps are listed, those of the largest fall."""
ERRORS = {
    "weight_error": "error of its weights",
    "output_error": "error of its outputs",
    "output_angle": "1 − cosine of its outputs",
    "kl": "KL divergence of the output",
}
"""What a map is judged by where nobody measures what it costs, and what people call it."""
_ASSUMED = (
    "A map's weights are those that a file in the format gives back; activations stay as they are, "
    "and all other maps.",
    "Error of weights and of outputs: the squared distance over the squared size, of outputs over "
    "all tokens of the documents (what activation-aware methods weigh by). KL: of the next token's "
    "distribution from that of the intact model, in nats a token.",
    "Spearman's coefficients are over the maps of a format; their intervals say what other "
    "documents would give for the same maps.",
    "With 'until', maps are measured until the question is answered, and only the intervals of "
    "accuracy drops hold then. Errors, falls and coefficients are of the documents that all maps "
    "share, with no interval: how many these are was decided by looking.",
)


class RoundedMap(NamedTuple):
    """One linear map in a format: its run, what is shown of it, its fall of gold log-probability on
    the documents that all maps share, and its errors by name."""

    run: RunRecord
    verdict: Verdict
    fall: Estimate
    errors: dict[str, float]


class MapName(NamedTuple):
    """All maps of one name: in how many layers, and what one of them costs on average."""

    name: str
    layers: int | None
    gold: Estimate
    errors: dict[str, float]


class Order(NamedTuple):
    """How well an error orders the maps by the fall of gold log-probability, and by accuracy."""

    error: str
    gold: Estimate
    drop: Estimate


@dataclass(frozen=True)
class InFormat:
    """What one cell says of one format."""

    subject: Subject
    word: str
    maps: Sequence[RoundedMap]
    names: Sequence[MapName]
    orders: Sequence[Order]

    @property
    def title(self) -> str:
        """The model, the benchmark and the format."""
        record = self.subject.record
        return f"{record.model.name}, {record.benchmark.name}, {FORMATS[self.word].label}"

    def note(self, intervals: str) -> str:
        """Say what a table's intervals are."""
        if not self.subject.record.is_raced:
            return intervals
        shared = counted(self.subject.record.n, "document")
        return (
            f"Stopped at an answer: of {shared} that all maps share, without intervals; those of "
            "accuracy drops are of all that were looked at, and hold at every look."
        )


class Precision(Study):
    """See the module."""

    question = "What does it cost to keep one linear map in fewer bits, and which error says so?"
    races = True

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Ask for every linear map of the file's layers, or those that it names.

        RequestError where layers are removed.
        """
        return [self._request(cell, asked) for cell in asked.experiment.cells()]

    def _request(self, cell: CellRequest, asked: StudyContext) -> CellRequest:
        refuse_removed(cell, "the maps of the intact model are rounded", asked)
        if groups := [name for name in cell.maps if name in MAPS]:
            raise RequestError(
                f"{cell.title}: {groups[0]} is several maps, and a study looks at each; leave it "
                "out of 'map'"
            )
        formats = tuple(done for done in cell.interventions if done in FORMATS) or (DEFAULT,)
        return each_map(cell, formats, asked.options.trust_remote_code)

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Set what each map costs beside its errors, format by format."""
        result = StudyResult(_ASSUMED)
        for subject in subjects:
            by_format = grouped(subject.record.runs, lambda run: str(run.change.intervention))
            answered = statement(subject.record.answer) if subject.record.answer else ""
            said = " ".join(filter(None, (answered, parts_answer(subject.record))))
            result.answers.append(f"{subject.record.title}: {said}")
            for word, runs in by_format.items():
                one = _in_format(asked, subject, word, runs)
                result.answers += _answers(one)
                result.tables += [_names_table(one), _most_table(one), _orders_table(one)]
        result.answers += second_roundings(subjects)
        return result


def _in_format(
    asked: StudyContext, subject: Subject, word: str, runs: Sequence[RunRecord]
) -> InFormat:
    """Observe the maps of a format, and order them."""
    maps = [run.change for run in runs]
    kind = f"rounding-{word}-{content_hash([*map(str, maps)])[:8]}"
    outcomes = subject.outcomes()
    begin = partial(errors_of, maps=maps, kl=True)
    seen = observe(subject, kind, asked, begin, outcomes.documents)
    ablations = [outcomes.ablation(change) for change in maps]
    gold, metric = outcomes.by_gold_logprob(ablations), outcomes.by_metric(ablations)
    figures = lined_up(seen, outcomes)
    errors, resampled = _errors(figures, outcomes.resampled)
    # What stopped at an answer holds for one look, and many were taken.
    seen_once = _without_interval if subject.record.is_raced else list
    drops = [(p.mean_drops, outcomes.resampled(p.drops, p.weights)) for p in (gold, metric)]
    orders = [
        Order(name, *seen_once([_spearman(values, resampled[name], *drop) for drop in drops]))
        for name, values in errors.items()
    ]
    verdicts = shown_in(subject.record, runs)
    falls = [run.gold for run in runs]
    if subject.record.is_raced:  # each run's own is of all that was looked at for it
        falls = _without_interval([gold.drop(place) for place in range(len(runs))])
    rows = [
        RoundedMap(run, verdict, fall, {name: float(errors[name][place]) for name in errors})
        for place, (run, verdict, fall) in enumerate(zip(runs, verdicts, falls, strict=True))
    ]
    names = _by_name(rows, gold, seen_once)
    return InFormat(subject, word, rows, names, orders)


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
    """Spearman's coefficient of an error and a drop over maps, with other documents' interval."""
    (value,) = row_coefficients(error[None], drop[None], "spearman").tolist()
    if not np.isfinite(value):
        return Estimate(None, reason="one of the two is undefined, or the same for all maps")
    rows = row_coefficients(errors, drops, "spearman")
    return Estimate(value, *bias_corrected_interval(value, rows, -1, 1))


def _without_interval(figures: Sequence[Estimate]) -> list[Estimate]:
    return [Estimate(each.value, reason=each.reason or ONE_LOOK) for each in figures]


def _by_name(
    maps: Sequence[RoundedMap], gold: PairedOutcomes, seen_once: Callable[..., list[Estimate]]
) -> list[MapName]:
    """Average what maps cost over layers, name by name, the costliest first."""
    places = grouped(range(len(maps)), lambda place: str(maps[place].run.change.map))
    falls = [
        replace(gold, ablated=gold.ablated[:, mine].mean(axis=1, keepdims=True)).drop(0)
        for mine in places.values()
    ]
    wide = seen_once(together(falls, [len(gold.weights)] * len(falls)))
    found = [
        MapName(
            name,
            None if name in ENDS else len(mine),
            fall,
            {key: float(np.mean([maps[place].errors[key] for place in mine])) for key in ERRORS},
        )
        for (name, mine), fall in zip(places.items(), wide, strict=True)
    ]
    return sorted(found, key=lambda one: -(one.gold.value or 0.0))


def _answers(one: InFormat) -> list[str]:
    """Return which name costs most, where that is shown, and how the errors order the maps."""
    first, *others = one.names
    sign, change = side(first.gold), "the log-probability of the right answer"
    if not others:
        does = {1: "is shown to lower", -1: "is shown to raise", 0: "is not shown to change"}[sign]
        text = f"{first.name} {does} {change}"
    elif sign > 0 and all(side(other.gold, first.gold.low or 0.0) < 0 for other in others):
        text = f"{first.name} lowers {change} most"
    else:
        text = f"which name lowers {change} most is open; the largest fall is that of {first.name}"
    where = "" if first.layers is None else "on average over layers, "
    fall = with_interval(first.gold, three_digits, " nats")
    text = f"{one.title}: {where}{text} (fall {fall})."
    said = [
        f"{ERRORS[order.error]} {with_interval(order.gold)}"
        for order in one.orders
        if order.gold.value is not None
    ]
    if said:
        text += f" By that fall the errors order the {len(one.maps)} maps (Spearman): "
        text += f"{listed(said)}."
    return [text]


def _error_columns() -> list[Column[Any]]:
    def column(name: str) -> Column[Any]:
        why = "no token of the documents reaches it"  # as may be of a single expert
        return Column(ERRORS[name], "proxy", lambda row: row.errors[name], why, name)

    return [column(name) for name in ERRORS]


def _names_table(one: InFormat) -> Table:
    columns: tuple[Column[MapName], ...] = (
        Column("linear map", "text", lambda row: row.name),
        Column("layers", "count", lambda row: row.layers, otherwise="of no layer"),
        Column("fall of gold log-probability", "nats", lambda row: row.gold),
        *_error_columns(),
    )
    return table(
        f"{one.title}: linear maps by name, one at a time, on average over layers.",
        columns,
        one.names,
        one.note("95 % intervals hold for all rows at once."),
    )


def _most_table(one: InFormat) -> Table:
    measure = measure_of(one.subject.record)
    rows = sorted(one.maps, key=lambda row: -(row.fall.value or 0.0))[:MOST]
    columns: tuple[Column[RoundedMap], ...] = (
        Column(
            "layer (0-based)", "count", lambda row: row.run.change.first, otherwise="of no layer"
        ),
        Column("linear map", "text", lambda row: row.run.change.map),
        Column("fall of gold log-probability", "nats", lambda row: row.fall),
        Column(measure.change, measure.form, lambda row: row.run.drop),
        Column("shown", "text", lambda row: _SHOWN[row.verdict]),
        *_error_columns(),
    )
    return table(
        f"{one.title}: the {len(rows)} of {len(one.maps)} maps that lower the right answer's "
        "log-probability most.",
        columns,
        rows,
        one.note(
            "95 % intervals, each for itself; what is shown holds for all maps of the format at "
            "once."
        ),
    )


_SHOWN = {"costs": "costs accuracy", "helps": "better so", "open": "open"}


def _orders_table(one: InFormat) -> Table:
    columns: tuple[Column[Order], ...] = (
        Column("error", "text", lambda row: ERRORS[row.error]),
        Column("Spearman with the fall of gold log-probability", "coefficient", lambda r: r.gold),
        Column(
            f"Spearman with the {measure_of(one.subject.record).change}",
            "coefficient",
            lambda row: row.drop,
        ),
    )
    return table(
        f"{one.title}: how errors order the {len(one.maps)} maps.",
        columns,
        one.orders,
        one.note("95 % intervals over documents, of the same maps."),
    )
