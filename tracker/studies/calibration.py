"""How many documents until the ranking of layers is stable?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tracker.ablations import INTACT
from tracker.config import CellRequest
from tracker.errors import RequestError
from tracker.findings import Entry, FoundTable, Heading, Line, LineChart
from tracker.ledger.outcomes import PROXY_SUMS
from tracker.ledger.viewed import Viewed, gold_logprobs
from tracker.metrics.accuracy import Estimate, weights_by_task
from tracker.metrics.correlation import row_coefficients
from tracker.metrics.reliability import (
    disjoint_means,
    documents_needed,
    jackknife,
    spearman_brown,
    top_overlap,
)
from tracker.records import WHOLE_LAYER
from tracker.reporting.formats import interval, two_digits
from tracker.studies.base import Asked, Said, Subject, whole_layers

Array = NDArray[np.float64]
Documents = NDArray[np.int64]
DRAWS = 400
"""Pairs of samples behind each figure."""
JACKKNIFE_DRAWS = 100
"""The same where a tenth of the documents is left out."""
SEED = 0
FEWEST = 3
"""Layers that can be ranked."""
RELIABILITY = 0.9
_SIZES = sorted({math.ceil(s * 10**p) for p in range(6) for s in (1, 1.5, 2, 3, 5, 7)})
_SHOWN = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""The sizes that a table has, besides half of the documents."""
_PROXIES = {
    # A mean of 1 - cosine ranks as that of -cosine does.
    "cosine_score": (PROXY_SUMS[0], -1.0),
    "angular_distance": (PROXY_SUMS[1], 1.0),
    "relative_update": (PROXY_SUMS[2], 1.0),
}
_DISAGREE = "two halves agree no better than chance, so nothing can be extrapolated"
_TIED = "in most samples of this size all layers are tied"
_TOO_FEW = "two samples of this size would share documents"
_ASSUMED = (
    "Two samples share no document, and each holds every task by its share. A sample beside all "
    "documents, of which it is a part, agrees better than two samples do (part-whole).",
    "Spreads are the middle 95 % of random draws from the documents at hand: no confidence "
    "intervals, since draws overlap and other documents were never seen. The mean over draws is "
    "unbiased, but near half of the documents it is one more figure of this one set of documents: "
    "it may fall below chance by accident.",
    "Beyond half of the documents nothing is measured: what is said there is extrapolated from "
    "two halves by the formula of Spearman and Brown (1910), as if all documents were drawn alike. "
    "It is exact for a ratio of variances, and approximate for a mean of rank correlations.",
    "The interval of the number of documents is a jackknife over ten groups of documents, on the "
    "logarithm (Quenouille 1956); that the formula is approximate is not in it.",
    "Rank correlations are Spearman's with midranks and Kendall's tau-b. The overlap of the top k "
    "layers breaks ties at random, in each ranking for itself, and is the expected one; by chance "
    "it is k / layers.",
)


@dataclass(frozen=True)
class Ranked:
    """What ranks the layers: figures of every document.

    Attributes:
        name: What the figures are.
        values: `[documents, layers]`; larger ranks higher.
        weights: `[documents]`, how much each counts in a layer's mean.
        strata: `[documents]`, each one's task, and its cell where there are several.
        reason: Why they rank nothing; empty where they do.
    """

    name: str
    values: Array
    weights: Array
    strata: NDArray[np.generic]
    reason: str = ""


@dataclass(frozen=True)
class Curve:
    """How well samples agree on the order of the layers.

    Attributes:
        name: What ranks the layers.
        documents: How many there are.
        layers: How many are ranked.
        sizes: Sizes of samples, ascending.
        apart: Two samples without a common document: each statistic of every draw, by name,
            `[draws, sizes]`; NaN for more than half of the documents.
        within: A sample beside all documents, likewise.
        needed: How many documents reach the wanted reliability.
        extrapolated: Whether these are more than half of the documents.
    """

    name: str
    documents: int
    layers: int
    sizes: tuple[int, ...]
    apart: dict[str, Array]
    within: dict[str, Array]
    needed: Estimate
    extrapolated: bool

    @property
    def half(self) -> int:
        """Half of the documents: the largest size of which there are two samples."""
        return self.documents // 2

    def agreement(self, n: int, statistic: str = "spearman", apart: bool = True) -> Entry:
        """The mean statistic at a size, with the middle 95 % of the draws."""
        if apart and n > self.half:
            return Entry(reason=_TOO_FEW)
        drawn = (self.apart if apart else self.within)[statistic][:, self.sizes.index(n)]
        mean = _mean(drawn)
        if math.isnan(mean):
            return Entry(reason=_TIED)
        low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
        return Entry(value=mean, low=float(low), high=float(high))

    def predicted(self, n: float) -> float | None:
        """The rank correlation of two samples of any size, by Spearman and Brown."""
        measured = self.agreement(self.half).value
        if not isinstance(measured, float) or measured <= 0:
            return None
        return spearman_brown(measured, n / self.half)


class Calibration:
    """Ranks layers by parts of the documents, again and again; `reliability` is what is wanted."""

    name = "calibration"
    question = "How many documents until the ranking of layers is stable?"

    def __init__(self, reliability: float = RELIABILITY) -> None:
        if not 0 < reliability < 1:
            raise RequestError(
                f"--reliability {reliability:g} is no rank correlation between 0 and 1; try 0.9"
            )
        self._wanted = reliability

    def requests(self, asked: Asked) -> list[CellRequest]:
        """Take the file's cells; RequestError where they rank fewer than three whole layers."""
        cells = asked.experiment.cells()
        for cell in cells:
            layers = whole_layers(cell)
            if not layers:
                raise RequestError(
                    f"{cell.title}: whole single layers are ranked, and the file removes none; "
                    "leave 'component', 'span' and 'intervention' out, or add 'layer', 1 and "
                    "'remove' to them"
                )
            if len(set(layers) - set(cell.removed)) < FEWEST:
                raise RequestError(
                    f"{cell.title}: a ranking needs {FEWEST} layers; write layer: "
                    "{min: 0, max: 29} for all layers of a model that has 30"
                )
        return cells

    def say(self, asked: Asked, subjects: list[Subject]) -> Said:
        """Say how well samples agree, by the drop and by what could stand in for it."""
        measured = [_measures(subject) for subject in subjects]
        alone = [(subject.record.title, [n]) for n, subject in enumerate(subjects)]
        groups = [*_together(subjects), *alone]
        answers, tables, charts, lacking, rows = [], [], [], [], []
        for title, members in groups:
            joined = [_joined(each) for each in zip(*(measured[n] for n in members), strict=True)]
            lacking += [f"{title}, by {one.name}: {one.reason}" for one in joined if one.reason]
            curves = [self._curve(one) for one in joined if not one.reason]
            rows += [self._row(title, curve) for curve in curves]
            if not joined[0].reason:
                cells = [subjects[n] for n in members]
                answers.append(self._answer(cells, curves[0], curves[1:]))
                tables.append(_table(title, curves[0]))
                charts += [_agreement_chart(title, curves), _overlap_chart(title, curves[0])]
        if not answers:
            answers = ["Nothing could be ranked."]
        if rows:
            tables.insert(0, self._needed(rows))
        return Said(answers, tables, charts, lacking, _ASSUMED)

    def _curve(self, ranked: Ranked) -> Curve:
        """Draw samples of every size."""
        documents, layers = ranked.values.shape
        half = documents // 2
        sizes = tuple(sorted({*(n for n in _SIZES if n < documents), half}))
        first, second = _samples(ranked, sizes, DRAWS)
        whole = np.broadcast_to(_mean_figures(ranked), first.shape)
        tops = _tops(layers)
        halved = [n for n in sizes if n <= half]

        def needed(chosen: Documents, draws: int) -> tuple[float, bool]:
            part = replace(
                ranked,
                values=ranked.values[chosen],
                weights=ranked.weights[chosen],
                strata=ranked.strata[chosen],
            )
            few = [*(n for n in halved if 2 * n < len(chosen)), len(chosen) // 2]
            pair = _samples(part, sorted(set(few)), draws)
            means = [_mean(each) for each in _statistic("spearman", *pair).T]
            return documents_needed(sorted(set(few)), means, self._wanted)

        estimate = jackknife(lambda chosen: needed(chosen, JACKKNIFE_DRAWS)[0], documents, SEED)
        _, extrapolated = needed(np.arange(documents), JACKKNIFE_DRAWS)
        if estimate.value is None:
            estimate = Estimate(None, reason=_DISAGREE)
        return Curve(
            ranked.name,
            documents,
            layers,
            sizes,
            {name: _statistic(name, first, second) for name in tops},
            {name: _statistic(name, first, whole) for name in tops},
            estimate,
            extrapolated,
        )

    def _answer(self, cells: Sequence[Subject], drop: Curve, others: Sequence[Curve]) -> str:
        n = max((n for n in _SHOWN if n in drop.sizes and n <= drop.half), default=drop.half)
        names = [cell.record.benchmark.name for cell in cells]
        what = names[0] if len(names) == 1 else f"{len(names)} benchmarks together"
        agreed, (top, bottom) = drop.agreement(n), _ends(drop)
        said = (
            f"With n = {n:,} documents of {what}, two samples that share none rank the "
            f"{drop.layers} layers of {cells[0].record.model.name} by {drop.name} with "
        )
        if isinstance(agreed.value, float):
            said += (
                f"rank correlation {two_digits(agreed.value)} (middle 95 % of draws "
                f"{interval(agreed.low, agreed.high, two_digits)}); {self._until(drop, cells)}. "
                "They share "
                f"{_percent(drop, n, f'top {top}')} of the {top} that matter most (by chance "
                f"{top / drop.layers:.0%}), and {_percent(drop, n, f'bottom {bottom}')} of the "
                f"{bottom} that matter least "
                f"({bottom / drop.layers:.0%})."
            )
        else:
            said += f"no rank correlation: {agreed.reason}."
        quick = [
            f"{one.name} {_rounded(one.needed.value):,}"
            for one in others
            if one.needed.value is not None
        ]
        if quick:
            said += f" Documents for {self._wanted:g} by other figures: {', '.join(quick)}."
        return said

    def _until(self, drop: Curve, cells: Sequence[Subject]) -> str:
        """Say how many documents are needed."""
        found = drop.needed
        if found.value is None:
            return f"how many reach {self._wanted:g} is unknown: {found.reason}"
        said = f"{self._wanted:g} needs about {_rounded(found.value):,}"
        how = "extrapolated by Spearman-Brown" if drop.extrapolated else "measured"
        if found.low is not None and found.high is not None:
            how += f", 95 % interval {_rounded(found.low):,} to {_rounded(found.high):,}"
        there = sum(t.documents for c in cells for t in c.record.benchmark.tasks)
        more = f", more than the {there:,} that there are" if found.value > there else ""
        return f"{said} ({how}){more}"

    def _row(self, title: str, curve: Curve) -> tuple[Entry, ...]:
        whole, found = curve.predicted(curve.documents), curve.needed
        unknown = Entry(reason=found.reason or _DISAGREE)
        how = "extrapolated" if curve.extrapolated else "measured"
        return (
            Entry(value=title),
            Entry(value=curve.name),
            Entry(value=curve.documents),
            curve.agreement(curve.half),
            Entry(value=whole) if whole is not None else Entry(reason=_DISAGREE),
            unknown
            if found.value is None
            else Entry(value=found.value, low=found.low, high=found.high),
            unknown if found.value is None else Entry(value=how),
        )

    def _needed(self, rows: Sequence[tuple[Entry, ...]]) -> FoundTable:
        return FoundTable(
            title=f"How many documents rank the layers with a reliability of {self._wanted:g}",
            headings=(
                Heading(label="cell"),
                Heading(label="ranked by"),
                Heading(label="documents", unit="count"),
                Heading(label="two halves agree", unit="coefficient"),
                Heading(label="all agree with as many others", unit="coefficient"),
                Heading(label=f"documents for {self._wanted:g}", unit="count"),
                Heading(label="how"),
            ),
            rows=tuple(rows),
            notes=(
                "Agreement is the mean Spearman correlation of two samples; in brackets the middle "
                "95 % of random draws. That of all documents with as many others is extrapolated "
                "by Spearman-Brown. The interval of the number is a jackknife over documents.",
            ),
        )


def _measures(subject: Subject) -> list[Ranked]:
    """What can rank the layers of a cell; the drop comes first."""
    record = subject.record
    view = subject.store.views.of(subject.request)
    outcomes = Viewed(subject.store, view)
    ablations = [outcomes.ablation(run) for run in outcomes.runs if run.kind == WHOLE_LAYER]
    layers = [run.layer for run in outcomes.runs if run.kind == WHOLE_LAYER]
    strata = np.array(outcomes.tasks)
    names = ("accuracy drop" if record.higher_is_better else "loss increase", "gold_logprob_drop")
    if len(strata) < 2 or len(layers) < FEWEST:
        why = f"{len(strata)} documents and {len(layers)} layers are measured: too few to rank"
        none = np.empty((0, 0))
        return [Ranked(name, none, none, strata, why) for name in (*names, *_PROXIES)]
    base = outcomes.of(INTACT)
    tokens = base["proxy_tokens"].to_numpy(dtype=np.float64)
    by_size = record.benchmark.weight_by_size
    by_document = weights_by_task(outcomes.tasks, by_size)
    weights = weights_by_task(outcomes.tasks, by_size, outcomes.units(view.metric))
    before = outcomes.metric(INTACT, view.metric)
    drops = np.stack([before - outcomes.metric(each, view.metric) for each in ablations], axis=1)
    gold = gold_logprobs(base)
    golds = np.stack([gold - gold_logprobs(outcomes.of(each)) for each in ablations], axis=1)
    found = [
        Ranked(names[0], drops if record.higher_is_better else -drops, weights, strata),
        Ranked(names[1], golds, by_document, strata),
    ]
    for name, (column, sign) in _PROXIES.items():
        sums = sign * np.stack(base[column].to_list())[:, layers]
        means = sums / np.maximum(tokens, 1)[:, None]
        found.append(Ranked(name, means, tokens / max(tokens.sum(), 1), strata))
    return [replace(each, reason=_unusable(each)) for each in found]


def _unusable(ranked: Ranked) -> str:
    counted = ranked.values[ranked.weights > 0]
    if bad := int((~np.isfinite(counted).all(axis=1)).sum()):
        return f"{bad} of {len(ranked.values)} documents have no finite figure"
    if not len(counted):
        return "no document counts"
    if np.ptp(np.round(_mean_figures(ranked), 12)) == 0:
        return f"it is the same in all {ranked.values.shape[1]} layers"
    return ""


def _together(subjects: Sequence[Subject]) -> list[tuple[str, list[int]]]:
    """Group the benchmarks of each model on which its accuracy ranks the same layers."""
    groups: dict[object, list[int]] = {}
    for n, subject in enumerate(subjects):
        record = subject.record
        layers = tuple(run.layer for run in record.whole_layers)
        if record.higher_is_better:
            groups.setdefault((record.model.key, record.removed, layers), []).append(n)
    found = []
    for members in groups.values():
        cells = [subjects[n].record for n in members]
        # A benchmark that stands there twice would be its own second sample.
        if 1 < len(cells) == len({cell.benchmark.name for cell in cells}):
            found.append((f"{cells[0].model.name} · mean of {len(cells)} benchmarks", members))
    return found


def _joined(parts: Sequence[Ranked]) -> Ranked:
    """Put cells together, so that each counts alike."""
    reason = next((part.reason for part in parts if part.reason), "")
    if len(parts) == 1 or reason:
        return replace(parts[0], reason=reason)
    return Ranked(
        parts[0].name,
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.weights / len(parts) for part in parts]),
        np.concatenate([[f"{n}/{task}" for task in p.strata] for n, p in enumerate(parts)]),
    )


def _samples(ranked: Ranked, sizes: Sequence[int], draws: int) -> tuple[Array, Array]:
    return disjoint_means(ranked.values, ranked.weights, ranked.strata, sizes, draws, SEED)


def _mean_figures(ranked: Ranked) -> Array:
    """The layers' figures from all documents."""
    counted = ranked.weights > 0
    return np.average(ranked.values[counted], axis=0, weights=ranked.weights[counted])


def _tops(layers: int) -> list[str]:
    """Name the statistics: correlations, and the top and bottom five layers, or quarter of all."""
    ks = sorted({k for k in (5, math.ceil(layers / 4)) if k < layers})
    return ["spearman", "kendall", *(f"{end} {k}" for end in ("top", "bottom") for k in ks)]


def _ends(curve: Curve) -> tuple[int, int]:
    """How many layers the smallest top and the largest bottom have."""
    tops = [name.split() for name in curve.apart if " " in name]
    return (
        min(int(k) for end, k in tops if end == "top"),
        max(int(k) for end, k in tops if end == "bottom"),
    )


def _statistic(name: str, first: Array, second: Array) -> Array:
    """Compare rankings `[draws, sizes, layers]`: `[draws, sizes]`."""
    a, b = (each.reshape(-1, each.shape[2]) for each in (first, second))
    end, _, k = name.partition(" ")
    if k:
        sign = 1 if end == "top" else -1
        return top_overlap(sign * a, sign * b, int(k)).reshape(first.shape[:2])
    return row_coefficients(a, b, name).reshape(first.shape[:2])


def _mean(values: Array) -> float:
    """Average what is defined; NaN where less than half is."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if 2 * len(defined) >= len(values) else math.nan


def _percent(curve: Curve, n: int, statistic: str) -> str:
    value = curve.agreement(n, statistic).value
    return f"{value:.0%}" if isinstance(value, float) else "–"


def _rounded(value: float) -> int:
    """Keep two significant digits; a document is never half."""
    return math.ceil(value - 1e-9) if value < 10 else int(float(f"{value:.1e}"))


def _table(title: str, drop: Curve) -> FoundTable:
    tops = [name for name in drop.apart if " " in name]
    shown = [n for n in drop.sizes if n in _SHOWN or n == drop.half]
    rows = []
    for n in shown:
        predicted = drop.predicted(n)
        rows.append(
            (
                Entry(value=n),
                drop.agreement(n),
                Entry(value=predicted) if predicted is not None else Entry(reason=_DISAGREE),
                drop.agreement(n, apart=False),
                drop.agreement(n, "kendall"),
                *(drop.agreement(n, name) for name in tops),
            )
        )
    chance = ", ".join(
        f"{int(name.split()[1]) / drop.layers:.0%} of the {name}"
        for name in tops
        if name.startswith("top")
    )
    return FoundTable(
        title=f"{title}: agreement of random samples on the order by {drop.name}",
        headings=(
            Heading(label="n", unit="count"),
            Heading(label="two samples", unit="coefficient"),
            Heading(label="by Spearman-Brown", unit="coefficient"),
            Heading(label=f"a sample with all {drop.documents:,}", unit="coefficient"),
            Heading(label="two samples, Kendall", unit="coefficient"),
            *(Heading(label=f"{name} shared", unit="percent") for name in tops),
        ),
        rows=tuple(rows),
        notes=(
            f"In brackets the middle 95 % of {DRAWS} random draws. By chance two orders share "
            f"{chance}, and as many of the bottom. A sample is part of all documents, which is why "
            "it agrees better with them than with another sample.",
        ),
    )


def _agreement_chart(title: str, curves: Sequence[Curve]) -> LineChart:
    drop = curves[0]
    known = [one.needed.value for one in curves[:1] if one.needed.value is not None]
    end = max([drop.documents, *known])
    places = sorted({*drop.sizes, *(n for n in _SIZES if n <= 2 * end)})

    def line(curve: Curve, name: str, apart: bool, band: bool) -> Line:
        entries = [
            curve.agreement(n, apart=apart) if n in curve.sizes else Entry(reason=_TOO_FEW)
            for n in places
        ]
        return Line(
            name=name,
            values=tuple(e.value if isinstance(e.value, float) else None for e in entries),
            low=tuple(e.low for e in entries) if band else (),
            high=tuple(e.high for e in entries) if band else (),
        )

    predicted = Line(
        name=f"{drop.name}, Spearman-Brown from two halves",
        values=tuple(drop.predicted(n) for n in places),
    )
    within = line(drop, f"{drop.name}, a sample with all {drop.documents:,}", False, False)
    return LineChart(
        title=f"{title}: how well samples of documents agree on the order of {drop.layers} layers",
        x="documents in a sample",
        y="rank correlation",
        unit="coefficient",
        places=tuple(places),
        lines=(
            line(drop, f"{drop.name}, two samples", True, True),
            predicted,
            within,
            *(line(one, f"{one.name}, two samples", True, False) for one in curves[1:]),
        ),
        log_x=True,
    )


def _overlap_chart(title: str, drop: Curve) -> LineChart:
    places = [n for n in drop.sizes if n <= drop.half]
    lines = []
    for name in (name for name in drop.apart if " " in name):
        end, k = name.split()
        values = tuple(drop.agreement(n, name).value for n in places)
        lines.append(
            Line(
                name=f"the {k} that matter {'most' if end == 'top' else 'least'}",
                values=tuple(v if isinstance(v, float) else None for v in values),
            )
        )
    for count in sorted({int(name.split()[1]) for name in drop.apart if " " in name}):
        chance = (count / drop.layers,) * len(places)
        lines.append(Line(name=f"{count} by chance", values=chance))
    return LineChart(
        title=f"{title}: layers that two samples have in common, by {drop.name}",
        x="documents in a sample",
        y="shared",
        unit="percent",
        places=tuple(places),
        lines=tuple(lines),
        log_x=True,
    )
