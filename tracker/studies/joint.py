"""What do two layers cost together, beside the sum of what each costs alone?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tracker.ablations import INTACT, Ablation
from tracker.config import CellRequest
from tracker.errors import RequestError
from tracker.findings import Entry, FoundChart, FoundTable, Heading, Line, LineChart, MapChart, Unit
from tracker.ledger.viewed import Viewed, gold_logprobs
from tracker.metrics.accuracy import LEVEL, Estimate, mean_interval, weights_by_task
from tracker.metrics.interaction import additivity, interactions
from tracker.metrics.resampling import resampled_means
from tracker.records import WHOLE_LAYER, CellRecord
from tracker.reporting.formats import fixed, interval, p_value, points, two_digits
from tracker.studies.base import Asked, Said, Subject, whole_layers

Array = NDArray[np.float64]
Pair = tuple[int, int]
RESAMPLES = 2000
SEED = 0
STRONGEST = 10
"""Pairs of each sign that a table lists."""
_ASSUMED = (
    "Interaction of i and j: drop(i, j) − drop(i) − drop(j), from the same documents. Above 0 the "
    "two are called redundant: together they cost more than the sum, because each alone was stood "
    "in for. Below 0 they are called sub-additive: the second costs less once the first is gone.",
    "A pair is at the floor where a drop, or the sum of both, is more than the baseline has above "
    "chance: two layers that each destroy a model cannot add up. Such pairs are left out of maps "
    "of accuracy, summaries and tests. The gold answer's log-probability has no floor.",
    "Intervals: of a pair from paired documents, for outcomes that are right or wrong with one "
    "document of +1 and one of −1 added (after Bonett and Price 2012), otherwise Student's t; of "
    "summaries Student's t over documents' own means; of coefficients from resampled documents. "
    "They hold the layers, and which pairs are at the floor, as they are.",
    "Tests: sign flips of the documents' interactions (exact where they are whole numbers), as if "
    "each were as likely to be x as −x; over all pairs of a cell that are not at the floor, "
    f"Benjamini-Hochberg at a false discovery rate of {1 - LEVEL:.0%}.",
    "R² is that of the sum itself as the prediction of the joint drop; no line is fitted.",
)


@dataclass(frozen=True)
class Pairs:
    """The interactions of all pairs of one cell, by one measure.

    Attributes:
        measure: What is lost.
        unit: How it is written.
        pairs: The pairs that are measured, first < second.
        alone: `[layers]`, what each layer costs, by its number.
        together: `[pairs]`, what both cost.
        found: Each pair's interaction.
        q: `[pairs]`, its p-value after Benjamini and Hochberg; NaN at the floor.
        floor: `[pairs]`, whether there is too little to lose for a sum.
        mean: The mean interaction over pairs that are not at the floor.
        by_distance: Layers apart → the same for these pairs, and how many these are.
        rank: Spearman's coefficient of sums and joint drops, over these pairs.
        explained: R² of the sums as predictions.
    """

    measure: str
    unit: Unit
    pairs: tuple[Pair, ...]
    alone: Mapping[int, float]
    together: Array
    found: Sequence[Estimate]
    q: Array
    floor: NDArray[np.bool_]
    mean: Estimate
    by_distance: Mapping[int, tuple[Estimate, int]]
    rank: Estimate
    explained: Estimate

    def write(self, value: float) -> str:
        """Write a drop without its unit."""
        return points(value) if self.unit == "points" else fixed(value, 3)

    def said(self, found: Estimate | float) -> str:
        """Write a drop with its unit, and its interval where it has one."""
        unit = {"points": " pp", "nats": " nats"}.get(self.unit, "")
        if isinstance(found, float):
            return self.write(found) + unit
        assert found.value is not None
        ends = interval(found.low, found.high, self.write)
        return self.write(found.value) + unit + (f" ({ends})" if ends else "")

    def significant(self, sign: int) -> list[int]:
        """Which interactions of a sign are significant, by their places."""
        with np.errstate(invalid="ignore"):
            (few,) = np.nonzero(self.q <= 1 - LEVEL)
        return [n for n in map(int, few) if sign * (self.value(n) or 0) > 0]

    def value(self, place: int) -> float | None:
        """The interaction of a pair; None where it is undefined or at the floor."""
        return None if self.floor[place] else self.found[place].value


class Joint:
    """Removes every two layers of a file together."""

    name = "joint"
    question = "Do the drops of two layers add up when both are removed?"

    def requests(self, asked: Asked) -> list[CellRequest]:
        """Ask for the file's cells, and for each layer with all later ones.

        RequestError where the file has fewer than two whole layers, or layers that are removed.
        """
        found = []
        for cell in asked.experiment.cells():
            if cell.removed:
                raise RequestError(
                    f"{cell.title}: pairs are compared with the intact model; leave 'removed' out"
                )
            layers = whole_layers(cell)
            if len(layers) < 2:
                raise RequestError(
                    f"{cell.title}: the file removes {len(layers)} whole single layers, and a pair "
                    "needs two; write layer: {min: 0, max: 29} for all of a model that has 30"
                )
            alone = {
                "components": (WHOLE_LAYER.component,),
                "spans": (WHOLE_LAYER.span,),
                "interventions": (WHOLE_LAYER.intervention,),
                "only": None,
            }
            found.append(cell.model_copy(update={**alone, "layers": layers}))
            found += [
                cell.model_copy(update={**alone, "removed": (i,), "layers": layers[n + 1 :]})
                for n, i in enumerate(layers[:-1])
            ]
        return found

    def say(self, asked: Asked, subjects: list[Subject]) -> Said:
        """Set the joint drops of each cell beside the sums."""
        answers: list[str] = []
        lacking: list[str] = []
        tables: list[FoundTable] = []
        charts: list[FoundChart] = []
        rows: list[tuple[Entry, ...]] = []
        for subject in subjects:
            record = subject.record
            if record.removed:
                continue
            measures, why = _measured(subject)
            lacking += [f"{record.title}: {each}" for each in why]
            for one in measures:
                rows.append(_summary_row(record, one))
                charts += [_map(record, one), _distance_chart(record, one)]
                tables += [_strongest(record, one, sign) for sign in (1, -1)]
                answers.append(_answer(record, one))
        if not subjects or not answers:
            answers = ["No pair could be compared with the sum of its layers."]
        if rows:
            tables.insert(0, _summary(rows))
        return Said(answers, tables, charts, lacking, _ASSUMED)


def _measured(subject: Subject) -> tuple[list[Pairs], list[str]]:
    """Derive the interactions of a cell by every measure, and say what is lacking."""
    record, store = subject.record, subject.store
    view = store.views.of(subject.request)
    wanted = list(combinations((run.layer for run in view.runs), 2))
    outcomes = Viewed(store, view, besides=[Ablation(pair) for pair in wanted])
    pairs = [
        pair
        for pair in wanted
        if all(outcomes.has(Ablation(part)) for part in (pair, pair[:1], pair[1:]))
    ]
    if not pairs or len(outcomes.tasks) < 2:
        return [], [f"{len(pairs)} pairs on {len(outcomes.tasks)} documents are measured"]
    why = []
    if len(pairs) < len(wanted):
        why.append(f"{len(wanted) - len(pairs)} of {len(wanted)} pairs are not measured")
    layers = sorted({layer for pair in pairs for layer in pair})
    shown = [Ablation((layer,)) for layer in layers] + [Ablation(pair) for pair in pairs]
    by_size = record.benchmark.weight_by_size
    sign = 1.0 if record.higher_is_better else -1.0
    metric = sign * np.stack(
        [outcomes.metric(each, view.metric) for each in (INTACT, *shown)], axis=1
    )
    gold = np.stack([gold_logprobs(outcomes.of(each)) for each in (INTACT, *shown)], axis=1)
    weights = weights_by_task(outcomes.tasks, by_size, outcomes.units(view.metric))
    left = None
    if record.baseline_accuracy is not None and record.chance_accuracy is not None:
        left = record.baseline_accuracy - record.chance_accuracy
    name = "accuracy drop" if record.higher_is_better else "loss increase"
    found = []
    unit: Unit
    for measure, unit, scores, shares, room in (
        (name, "points" if record.higher_is_better else "score", metric, weights, left),
        ("gold_logprob_drop", "nats", gold, weights_by_task(outcomes.tasks, by_size), None),
    ):
        drops = scores[:, :1] - scores[:, 1:]
        if bad := int((~np.isfinite(drops).all(axis=1)).sum()):
            why.append(f"{measure}: {bad} of {len(drops)} documents have no finite score")
        elif room is not None and room <= 0:
            why.append(
                f"{measure}: the baseline is at or below chance, so there is nothing to lose; "
                "gold_logprob_drop has no floor"
            )
        else:
            strata = None if len(set(outcomes.tasks)) == 1 else np.array(outcomes.tasks)
            found.append(_pairs((measure, unit), drops, (layers, pairs), shares, strata, room))
    return found, why


def _pairs(
    measure: tuple[str, Unit],
    drops: Array,
    what: tuple[Sequence[int], Sequence[Pair]],
    weights: Array,
    strata: NDArray[np.str_] | None,
    room: float | None,
) -> Pairs:
    """Compare joint drops with sums.

    `drops` is `[documents, layers and pairs]`, `what` these layers and pairs, and `room` what can
    be lost at most; None where that is not bounded.
    """
    layers, pairs = what
    first, second = (np.array([layers.index(pair[end]) for pair in pairs]) for end in (0, 1))
    single, both = drops[:, : len(layers)], drops[:, len(layers) :]
    values = both - single[:, first] - single[:, second]
    found = interactions(values, weights, SEED)
    alone, together = weights @ single, weights @ both
    most = np.max([alone[first], alone[second], alone[first] + alone[second]], axis=0)
    # A sum of fractions may pass what there is to lose by rounding alone.
    floor = np.zeros(len(pairs), bool) if room is None else most > room + 1e-9
    (open_,) = np.nonzero(~floor)
    q = np.full(len(pairs), np.nan)
    if len(open_):
        q[open_] = stats.false_discovery_control([found[n].p_value for n in open_])
    apart = np.array([j - i for i, j in pairs])
    drawn = resampled_means(drops, RESAMPLES, SEED, strata, weights)
    alone_drawn, both_drawn = drawn[:, : len(layers)], drawn[:, len(layers) :]
    rank, explained = additivity(
        (alone[first] + alone[second])[open_],
        together[open_],
        ((alone_drawn[:, first] + alone_drawn[:, second])[:, open_], both_drawn[:, open_]),
    )

    def mean_over(chosen: NDArray[np.int64]) -> Estimate:
        if not len(chosen):
            return Estimate(None, reason="all such pairs are at the floor")
        per_document = values[:, chosen].mean(axis=1)
        return Estimate(float(weights @ per_document), *mean_interval(per_document, weights))

    distances = sorted(set(apart.tolist()))
    by_distance = {d: open_[apart[open_] == d] for d in distances}
    return Pairs(
        *measure,
        tuple(pairs),
        dict(zip(layers, alone.tolist(), strict=True)),
        together,
        found,
        q,
        floor,
        mean_over(open_),
        {d: (mean_over(chosen), len(chosen)) for d, chosen in by_distance.items()},
        rank,
        explained,
    )


def _entry(found: Estimate) -> Entry:
    if found.value is None or not math.isfinite(found.value):
        return Entry(reason=found.reason or "undefined")
    return Entry(value=found.value, low=found.low, high=found.high)


def _answer(record: CellRecord, one: Pairs) -> str:
    """Say whether sums predict joint drops, and what interacts most."""
    inside = [n for n in range(len(one.pairs)) if not one.floor[n]]
    said = f"{record.model.name}, {record.benchmark.name}, n = {record.n:,}, {one.measure}: "
    if not inside:
        return said + f"all {len(one.pairs):,} pairs are at the floor, so no sum can be reached."
    if one.rank.value is not None and one.explained.value is not None:
        said += (
            f"the sum of single drops ranks the joint drops of {len(inside):,} pairs with Spearman "
            f"{_coefficient(one.rank)}, and as a prediction has R² {_coefficient(one.explained)}. "
        )
    if one.mean.value is not None:
        more = "more" if one.mean.value >= 0 else "less"
        said += (
            f"On average two layers cost {one.said(abs(one.mean.value))} {more} together than the "
            f"sum (interaction {one.said(one.mean)}). "
        )
    said += (
        f"Significant after Benjamini-Hochberg: {len(one.significant(1))} redundant and "
        f"{len(one.significant(-1))} sub-additive pairs"
    )
    for word, sign in (("redundant", 1), ("sub-additive", -1)):
        if few := one.significant(sign):
            place = max(few, key=lambda n: abs(one.value(n) or 0))
            i, j = one.pairs[place]
            said += f"; the most {word} is {i} with {j}, by {one.said(one.found[place])}"
    if at_floor := len(one.pairs) - len(inside):
        said += f". {at_floor:,} of {len(one.pairs):,} pairs are at the floor and left out"
    return said + "."


def _coefficient(found: Estimate) -> str:
    assert found.value is not None
    ends = interval(found.low, found.high, two_digits)
    return f"{two_digits(found.value)} ({ends})" if ends else two_digits(found.value)


def _summary_row(record: CellRecord, one: Pairs) -> tuple[Entry, ...]:
    # Nats and percentage points stand in one column, as text.
    mean = one.mean
    return (
        Entry(value=record.title),
        Entry(value=one.measure),
        Entry(value=record.n),
        Entry(value=len(one.pairs)),
        Entry(value=int(one.floor.sum())),
        Entry(value=one.said(mean))
        if mean.value is not None
        else Entry(reason=mean.reason or "undefined"),
        Entry(value=len(one.significant(1))),
        Entry(value=len(one.significant(-1))),
        _entry(one.rank),
        _entry(one.explained),
    )


def _summary(rows: Sequence[tuple[Entry, ...]]) -> FoundTable:
    return FoundTable(
        title="How well the drops of two layers add up",
        headings=(
            Heading(label="cell"),
            Heading(label="measure"),
            Heading(label="documents", unit="count"),
            Heading(label="pairs", unit="count"),
            Heading(label="at the floor", unit="count"),
            Heading(label="mean interaction"),
            Heading(label="redundant", unit="count"),
            Heading(label="sub-additive", unit="count"),
            Heading(label="Spearman of sum and joint drop", unit="coefficient"),
            Heading(label="R² of the sum", unit="coefficient"),
        ),
        rows=tuple(rows),
        notes=(
            "Interaction: drop of both minus the sum of both drops, over pairs that are not at the "
            "floor. Redundant (above 0) and sub-additive (below 0): significant after "
            f"Benjamini-Hochberg at {1 - LEVEL:.0%}. In brackets 95 % intervals over documents.",
        ),
    )


def _strongest(record: CellRecord, one: Pairs, sign: int) -> FoundTable:
    """List the pairs whose interaction of a sign is the largest."""
    values = [(sign * (one.value(n) or 0), n) for n in range(len(one.pairs))]
    chosen = sorted((each for each in values if each[0] > 0), reverse=True)[:STRONGEST]
    rows = []
    for _, n in chosen:
        found, (i, j) = one.found[n], one.pairs[n]
        rows.append(
            (
                Entry(value=f"{i}, {j}"),
                Entry(value=j - i),
                _entry(found),
                Entry(value=float(one.together[n])),
                Entry(value=one.alone[i]),
                Entry(value=one.alone[j]),
                Entry(value=found.p_value),
                Entry(value=float(one.q[n])),
            )
        )
    word = "redundant: together they cost more" if sign > 0 else "sub-additive: they cost less"
    return FoundTable(
        title=f"{record.title}: the most {word} than the sum, by {one.measure}",
        headings=(
            Heading(label="layers"),
            Heading(label="apart", unit="count"),
            Heading(label="interaction", unit=one.unit),
            Heading(label="both", unit=one.unit),
            Heading(label="the first", unit=one.unit),
            Heading(label="the second", unit=one.unit),
            Heading(label="p", unit="p"),
            Heading(label="p, Benjamini-Hochberg", unit="p"),
        ),
        rows=tuple(rows),
        notes=(
            f"The largest of {int((~one.floor).sum()):,} interactions, which are therefore larger "
            "here than other documents would show.",
        ),
    )


def _map(record: CellRecord, one: Pairs) -> MapChart:
    """Draw all interactions, each in both halves; pairs at the floor are gaps."""
    layers = sorted(one.alone)
    places = {pair: n for n, pair in enumerate(one.pairs)}
    values: list[list[float | None]] = []
    hovers: list[list[str]] = []
    for i in layers:
        found = [places.get((min(i, j), max(i, j))) for j in layers]
        values.append([None if n is None else one.value(n) for n in found])
        hovers.append(["" if n is None else _hover(one, n) for n in found])
    left_out = f", {int(one.floor.sum())} at the floor" if one.floor.any() else ""
    return MapChart(
        title=f"{record.title}: interaction of two layers by {one.measure}, "
        f"{len(one.pairs):,} pairs{left_out}",
        x="layer (0-based)",
        y="layer",
        name="interaction",
        unit=one.unit,
        columns=tuple(layers),
        rows=tuple(map(str, layers)),
        values=tuple(map(tuple, values)),
        hovers=tuple(map(tuple, hovers)),
    )


def _hover(one: Pairs, place: int) -> str:
    (i, j), found = one.pairs[place], one.found[place]
    assert found.value is not None
    said = (
        f"{i} with {j}: {one.said(found)} · both {one.said(float(one.together[place]))}"
        f" · {i} {one.said(one.alone[i])} · {j} {one.said(one.alone[j])}"
    )
    if one.floor[place]:
        return f"{said} · at the floor"
    return f"{said} · p {p_value(one.q[place])} (Benjamini-Hochberg)"


def _distance_chart(record: CellRecord, one: Pairs) -> LineChart:
    distances = sorted(one.by_distance)
    means = [one.by_distance[d][0] for d in distances]
    return LineChart(
        title=f"{record.title}: mean interaction by distance, {one.measure}",
        x="distance |i − j|",
        y="interaction",
        unit=one.unit,
        places=tuple(distances),
        lines=(
            Line(
                name="pairs that are not at the floor" if one.floor.any() else "all pairs",
                values=tuple(mean.value for mean in means),
                low=tuple(mean.low for mean in means),
                high=tuple(mean.high for mean in means),
            ),
        ),
    )
