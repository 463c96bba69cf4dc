"""Study: count the documents that make the ranking of layers stable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tracker.core.estimates import Estimate
from tracker.core.findings import LineChart
from tracker.core.formats import counted, measure_of
from tracker.core.grouping import grouped
from tracker.core.proxies import OBSERVED, PROXIES
from tracker.core.records import CellRecord
from tracker.core.tables import Column, Table, table
from tracker.stats.arrays import Array, Numbers, per_token
from tracker.stats.rank_agreement import overlap, rounded, row_coefficients
from tracker.stats.reliability import (
    differ,
    disjoint_means,
    documents_needed,
    positive_estimate,
    spearman_brown,
)
from tracker.stats.resampling import SEED
from tracker.stats.support import holm
from tracker.studies.base import (
    FEWEST,
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    study_texts,
)
from tracker.studies.layout import line_chart
from tracker.studies.registry import CalibrationSettings

SAMPLE_PAIRS = 400
"""Pairs of samples behind each figure."""
JACKKNIFE_PAIRS = 100
"""Number of pairs of samples for each jackknife group, which leaves out a tenth."""
SIZES_SHOWN = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Sample sizes that tables and answers show, besides half of the documents."""
SIZES = sorted({math.ceil(s * 10**p) for p in range(6) for s in (1, 1.5, 2, 3, 5, 7)})
"""The sizes that are drawn, as far as there are documents."""
DISAGREE = "two halves agree no surer than chance"
TOO_FEW = "two samples of this size would share documents"
_TIED = "in most samples of this size all layers are tied"


def _rounded(value: float) -> int:
    """Round to two significant digits; a document is never half."""
    return math.ceil(value - 1e-9) if value < 10 else int(float(f"{value:.1e}"))


TEXTS = study_texts("calibration", rounded=_rounded)


class Calibration(Study[CalibrationSettings]):
    """Ranks layers by parts of the documents, again and again."""

    name = "calibration"
    question = "How many documents until the ranking of layers is stable?"
    layers = FEWEST
    texts = TEXTS

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer by the drop and by measures that could replace it."""
        reliability = self.settings.reliability
        rankings = [rankings_of(subject) for subject in subjects]
        alone = [(subject.record.title, [n]) for n, subject in enumerate(subjects)]
        result, groups = StudyResult(), []
        for title, members in [*_together(subjects), *alone]:
            parts = [joined(parts) for parts in zip(*(rankings[n] for n in members), strict=True)]
            result.lack(title, *(f"by {r.name}: {r.reason}" for r in parts if r.reason))
            curves = [curve_of(ranking, reliability) for ranking in parts if not ranking.reason]
            groups.append((title, members, not parts[0].reason, curves))
        every = iter(judged([curve for *_, curves in groups for curve in curves]))
        rows = []
        for title, members, ranked, undecided in groups:
            curves = [next(every) for _ in undecided]
            rows += [(title, curve) for curve in curves]
            if ranked:
                cells = [subjects[n].record for n in members]
                result.add(answer_of(cells, curves[0], curves[1:], reliability))
                result.add(agreement_table(title, curves[0]), agreement_chart(title, curves))
                result.add(overlap_chart(title, curves[0]))
        if not result.answers:
            result.add("Nothing could be ranked.")
        if rows:
            result.tables.insert(0, needed_table(rows, reliability))
        return result


def _together(subjects: Sequence[Subject]) -> Iterator[tuple[str, list[int]]]:
    """Group the benchmarks of each model on which its accuracy ranks the same layers."""

    def alike(n: int) -> object:
        record = subjects[n].record
        layers = tuple(run.change.layer for run in record.whole_layers)
        return record.model.key, record.removed, layers

    accuracies = [n for n, subject in enumerate(subjects) if subject.record.higher_is_better]
    for members in grouped(accuracies, alike).values():
        cells = [subjects[n].record for n in members]
        # A benchmark that is listed twice would be its own second sample.
        if 1 < len(cells) == len({cell.benchmark.title for cell in cells}):
            yield f"{cells[0].model.name} · mean of {len(cells)} benchmarks", members


# Figures


@dataclass(frozen=True)
class Ranking:
    """Figures of every document that rank the layers.

    Attributes:
        name: Name of the figures.
        values: `[documents, layers]`; larger ranks higher.
        weights: `[documents]`, weight of each in a layer's mean.
        strata: `[documents]`, task of each, and its cell if there are several.
        reason: Reason why they rank nothing; empty if they do.
    """

    name: str
    values: Array
    weights: Array
    strata: NDArray[np.generic]
    reason: str = ""

    def means(self) -> Array:
        """Return the layers' figures from all documents."""
        counts = self.weights > 0
        return np.average(self.values[counts], axis=0, weights=self.weights[counts])


@dataclass(frozen=True)
class Curve:
    """Agreement of samples on the order of the layers.

    Attributes:
        name: Name of the measure that ranks the layers.
        documents: Number of documents.
        layers: Number of layers.
        sizes: Sizes of samples, ascending.
        apart: Statistics of two samples without a common document, by name: `[draws, sizes]`; NaN
            for more than half of the documents.
        within: The same for a sample and all documents.
        needed: Number of documents that reach the wanted reliability; undefined if two halves agree
            no better than chance.
        p_value: p-value of a test whether the layers differ at all.
        extrapolated: Whether `needed` is more than half of the documents.
    """

    name: str
    documents: int
    layers: int
    sizes: tuple[int, ...]
    apart: dict[str, Array]
    within: dict[str, Array]
    needed: Estimate
    p_value: float
    extrapolated: bool

    @property
    def half(self) -> int:
        """Half of the documents: the largest size of which there are two samples."""
        return self.documents // 2

    @property
    def tops(self) -> list[tuple[str, str, int]]:
        """The overlaps among the statistics: name, its end (top or bottom), how many layers."""
        parted = ((name, *name.split()) for name in self.apart if " " in name)
        return [(name, end, int(k)) for name, end, k in parted]

    def agreement(self, n: int, statistic: str = "spearman", apart: bool = True) -> Estimate:
        """Return the mean statistic at a size, with the middle 95 % of the draws."""
        if apart and n > self.half:
            return Estimate(None, reason=TOO_FEW)
        drawn = (self.apart if apart else self.within)[statistic][:, self.sizes.index(n)]
        mean = _mean(drawn)
        if math.isnan(mean):
            return Estimate(None, reason=_TIED)
        low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
        return Estimate(mean, low=float(low), high=float(high))

    @property
    def doubt(self) -> str:
        """Why nothing follows from how well two halves agree; empty where something does."""
        halves = self.agreement(self.half)
        if halves.low is None:
            return halves.reason or ""
        return "" if halves.side() > 0 and self.p_value < SIGNIFICANT else DISAGREE

    def predicted(self, n: float) -> float | None:
        """Return the rank correlation of two samples of any size, by Spearman and Brown."""
        halves = self.agreement(self.half).value
        return None if self.doubt or halves is None else spearman_brown(halves, n / self.half)


def rankings_of(subject: Subject) -> list[Ranking]:
    """Return the measures that can rank the layers of a cell; the drop comes first."""
    cell = subject.outcomes()
    layers = [run.layer for run in cell.whole_layers]
    strata = np.array(cell.tasks)
    few = ""
    if len(strata) < 2 or len(layers) < FEWEST:
        measured = f"{counted(len(strata), 'document')} and {counted(len(layers), 'layer')}"
        few = f"{measured} are measured: too few to rank"
    ablations = [cell.ablation(run) for run in cell.whole_layers]
    metric, gold = cell.by_metric(ablations), cell.by_gold_logprob(ablations)
    rankings = [
        Ranking(measure_of(subject.record).change, metric.drops, metric.weights, strata),
        Ranking(PROXIES["gold_logprob_drop"].label, gold.drops, gold.weights, strata),
    ]
    for proxy in OBSERVED:
        means = proxy.of(per_token(cell.proxy_sums(proxy)[:, layers], cell.tokens))
        weights = cell.tokens / max(cell.tokens.sum(), 1)
        rankings.append(Ranking(proxy.label, means, weights, strata, cell.not_observed(proxy)))
    return [replace(r, reason=few or r.reason or _unusable(r)) for r in rankings]


def _unusable(ranking: Ranking) -> str:
    values = ranking.values[ranking.weights > 0]
    if bad := int((~np.isfinite(values).all(axis=1)).sum()):
        return f"{bad} of {len(ranking.values)} documents have no finite figure"
    if not len(values):
        return "no document counts"
    if np.ptp(rounded(ranking.means())) == 0:
        return f"it is the same in all {values.shape[1]} layers"
    return ""


def joined(parts: Sequence[Ranking]) -> Ranking:
    """Join the rankings of cells with equal weights."""
    reason = next((part.reason for part in parts if part.reason), "")
    if len(parts) == 1 or reason:
        return replace(parts[0], reason=reason)
    return Ranking(
        parts[0].name,
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.weights / len(parts) for part in parts]),
        np.concatenate([[f"{n}/{task}" for task in p.strata] for n, p in enumerate(parts)]),
    )


def curve_of(ranking: Ranking, reliability: float) -> Curve:
    """Draw samples of every size, and find which reaches the wanted reliability."""
    documents, layers = ranking.values.shape
    sizes = tuple(sorted({*(n for n in SIZES if n < documents), documents // 2}))
    values, weights, strata = ranking.values, ranking.weights, ranking.strata
    first, second = disjoint_means(values, weights, strata, sizes, SAMPLE_PAIRS, SEED)
    whole = np.broadcast_to(ranking.means(), first.shape)
    # Correlations, and the overlaps of the top and bottom five layers, or quarter of all.
    ks = sorted({k for k in (5, math.ceil(layers / 4)) if k < layers})
    statistics = ["spearman", "kendall", *(f"{end} {k}" for end in ("top", "bottom") for k in ks)]

    def needed(chosen: Numbers) -> tuple[float, bool]:
        half = len(chosen) // 2
        few = [n for n in sizes if n < half] + [half]
        part = values[chosen], weights[chosen], strata[chosen]
        samples = disjoint_means(*part, few, JACKKNIFE_PAIRS, SEED)
        means = [_mean(drawn) for drawn in _statistic("spearman", *samples).T]
        return documents_needed(few, means, reliability)

    estimate = positive_estimate(lambda chosen: needed(chosen)[0], strata, SEED)
    curve = Curve(
        ranking.name,
        documents,
        layers,
        sizes,
        {name: _statistic(name, first, second) for name in statistics},
        {name: _statistic(name, first, whole) for name in statistics},
        Estimate(None, reason=DISAGREE) if estimate.value is None else estimate,
        differ(values, weights, SEED),
        needed(np.arange(documents))[1],
    )
    return _doubted(curve)


def judged(curves: Sequence[Curve]) -> list[Curve]:
    """Keep numbers of documents where layers differ in all of a study's tests (Holm)."""
    adjusted = holm([curve.p_value for curve in curves])
    return [
        _doubted(replace(curve, p_value=p))
        for curve, p in zip(curves, adjusted, strict=True)
        if p is not None
    ]


def _doubted(curve: Curve) -> Curve:
    return replace(curve, needed=Estimate(None, reason=curve.doubt)) if curve.doubt else curve


def _statistic(name: str, first: Array, second: Array) -> Array:
    """Compare rankings `[draws, sizes, layers]`: `[draws, sizes]`."""
    a, b = (means.reshape(-1, means.shape[2]) for means in (first, second))
    end, _, k = name.partition(" ")
    sign = -1 if end == "bottom" else 1
    values = overlap(sign * a, sign * b, int(k)) if k else row_coefficients(a, b, name)
    return values.reshape(first.shape[:2])


def _mean(values: Array) -> float:
    """Average the defined values; NaN if fewer than half are defined."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if 2 * len(defined) >= len(values) else math.nan


# Sentences, tables and charts


def answer_of(
    cells: Sequence[CellRecord], drop: Curve, others: Sequence[Curve], reliability: float
) -> str:
    """Return how well two samples of a size agree, and how many documents are needed."""
    n = max((n for n in SIZES_SHOWN if n in drop.sizes and n <= drop.half), default=drop.half)
    total = sum(task.documents for cell in cells for task in cell.benchmark.tasks)
    needed = {curve.name: curve.needed.value for curve in others}
    quick = {name: _rounded(value) for name, value in needed.items() if value is not None}
    return TEXTS.one("answer", cells, n, drop, drop.agreement(n), reliability, total, quick)


def needed_table(rows: Sequence[tuple[str, Curve]], reliability: float) -> Table:
    """Build the table of the documents that each ranking needs, from titles and curves."""

    def alike(row: tuple[str, Curve]) -> Estimate:
        return Estimate(row[1].predicted(row[1].documents), reason=row[1].doubt)

    def source(row: tuple[str, Curve]) -> Estimate | str:
        if row[1].needed.value is None:
            return row[1].needed
        return "extrapolated" if row[1].extrapolated else "measured"

    return table(
        f"How many documents rank the layers with a reliability of {reliability:g}",
        [
            Column("model and benchmark", "text", lambda row: row[0]),
            Column("ranked by", "text", lambda row: row[1].name),
            Column("documents", "count", lambda row: row[1].documents),
            Column("two halves agree", "coefficient", lambda row: row[1].agreement(row[1].half)),
            Column("all agree with as many others", "coefficient", alike),
            Column(f"documents for {reliability:g}", "count", lambda row: row[1].needed),
            Column("how", "text", source),
        ],
        rows,
        *TEXTS.all("needed_notes"),
    )


def agreement_table(title: str, drop: Curve) -> Table:
    """Build the table of the agreement of samples of each size."""

    def shared(name: str) -> Column[int]:
        return Column(f"{name} shared", "percent", lambda n: drop.agreement(n, name))

    with_all = f"a sample with all {drop.documents:,}"
    return table(
        f"{title}: agreement of random samples on the order by {drop.name}",
        [
            Column("n", "count", lambda n: n),
            Column("two samples", "coefficient", drop.agreement),
            Column("by Spearman-Brown", "coefficient", drop.predicted, drop.doubt),
            Column(with_all, "coefficient", lambda n: drop.agreement(n, apart=False)),
            Column("two samples, Kendall", "coefficient", lambda n: drop.agreement(n, "kendall")),
            *(shared(name) for name, _, _ in drop.tops),
        ],
        [n for n in drop.sizes if n in SIZES_SHOWN or n == drop.half],
        *TEXTS.all("agreement_notes", drop, SAMPLE_PAIRS),
    )


def agreement_chart(title: str, curves: Sequence[Curve]) -> LineChart:
    """Build the chart of the agreement of samples, by the drop and by its replacements."""
    drop = curves[0]
    end = max(drop.documents, drop.needed.value or 0)
    positions = sorted({*drop.sizes, *(n for n in SIZES if n <= 2 * end)})

    def line(curve: Curve, apart: bool = True, band: bool = False) -> list[Estimate | None]:
        figures = (curve.agreement(n, apart=apart) if n in curve.sizes else None for n in positions)
        return [f if band or f is None else Estimate(f.value) for f in figures]

    return line_chart(
        f"{title}: how well samples of documents agree on the order of {drop.layers} layers",
        ("documents in a sample", "rank correlation"),
        "coefficient",
        positions,
        {
            f"{drop.name}, two samples": line(drop, band=True),
            f"{drop.name}, Spearman-Brown from two halves": map(drop.predicted, positions),
            f"{drop.name}, a sample with all {drop.documents:,}": line(drop, apart=False),
            **{f"{curve.name}, two samples": line(curve) for curve in curves[1:]},
        },
        log_x=True,
    )


def overlap_chart(title: str, drop: Curve) -> LineChart:
    """Build the chart of the most and least relevant layers that two samples share."""
    positions = [n for n in drop.sizes if n <= drop.half]
    lines = {
        f"the {k} that matter {'most' if end == 'top' else 'least'}": [
            drop.agreement(n, name).value for n in positions
        ]
        for name, end, k in drop.tops
    }
    for count in sorted({k for _, _, k in drop.tops}):
        lines[f"{count} by chance"] = [count / drop.layers] * len(positions)
    return line_chart(
        f"{title}: layers that two samples have in common, by {drop.name}",
        ("documents in a sample", "shared"),
        "percent",
        positions,
        lines,
        log_x=True,
    )
