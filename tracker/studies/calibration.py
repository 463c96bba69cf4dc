"""Study: estimate the number of documents that a reliable ranking of layers needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tracker.schema.estimates import Estimate
from tracker.schema.findings import LineChart, line_chart
from tracker.schema.formats import count_text, metric_format
from tracker.schema.grouping import group_by
from tracker.schema.proxies import OBSERVED, PROXIES
from tracker.schema.records import CellRecord
from tracker.schema.tables import Column, Table, build_table
from tracker.stats.arrays import Array, IntArray, token_means
from tracker.stats.rank_agreement import rounded_values, row_coefficients, top_overlap
from tracker.stats.reliability import (
    disjoint_means,
    documents_to_reach,
    layer_difference_p,
    positive_estimate,
    spearman_brown,
)
from tracker.stats.resampling import SEED
from tracker.stats.support import holm
from tracker.studies.base import (
    MIN_LAYERS_RANKED,
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    study_texts,
)
from tracker.studies.registry import CalibrationSettings

SAMPLE_PAIRS = 400
"""Number of pairs of samples for each figure."""
JACKKNIFE_PAIRS = 100
"""Number of pairs of samples for each jackknife group, which leaves out a tenth."""
SIZES_SHOWN = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Sample sizes that tables and answers show, besides half of the documents."""
SAMPLE_SIZES = sorted({math.ceil(s * 10**p) for p in range(6) for s in (1, 1.5, 2, 3, 5, 7)})
"""Sizes of the samples that are drawn, up to the number of documents."""
HALVES_DISAGREE = "the rankings by two halves of the documents do not agree significantly"
SAMPLES_TOO_LARGE = "a sample of more than half of the documents leaves too few for a second sample"
_ALL_TIED = "in most samples of this size, all layers have the same mean"


def _two_digits(value: float) -> int:
    """Round to two significant digits, but round numbers below 10 up to a whole number."""
    return math.ceil(value - 1e-9) if value < 10 else int(float(f"{value:.1e}"))


CALIBRATION_TEXTS = study_texts("calibration", rounded=_two_digits)


class Calibration(Study[CalibrationSettings]):
    """Study that ranks layers by many random samples of documents and compares the rankings."""

    name = "calibration"
    question = "How many documents are needed for a stable ranking of the layers?"
    layers = MIN_LAYERS_RANKED
    texts = CALIBRATION_TEXTS

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Report how many documents a reliable ranking of the layers needs.

        The layers are ranked by the accuracy drop, and by each proxy.
        """
        reliability = self.settings.reliability
        rankings = [layer_rankings(subject) for subject in subjects]
        result, curves = StudyResult(), []
        groups = [*_benchmark_groups(subjects)]
        groups += [(subject.record.title, [n]) for n, subject in enumerate(subjects)]
        for index, (title, members) in enumerate(groups):
            for ranking in map(join_rankings, zip(*(rankings[n] for n in members), strict=True)):
                if ranking.reason:
                    result.lack(title, f"by {ranking.name}: {ranking.reason}")
                else:
                    curves.append((index, agreement_curve(ranking, reliability)))
        judged = adjust_curves([curve for _, curve in curves])
        pairs = [*zip([index for index, _ in curves], judged, strict=True)]
        for index, group_pairs in group_by(pairs, lambda pair: pair[0]).items():
            (title, members), (drop, *others) = groups[index], [curve for _, curve in group_pairs]
            if drop.name == rankings[members[0]][0].name:
                cells = [subjects[n].record for n in members]
                result.add(_write_answer(cells, [drop, *others], reliability))
                result.add(agreement_table(title, drop), _agreement_chart(title, drop, others))
                result.add(_overlap_chart(title, drop))
        rows = [(groups[index][0], curve) for index, curve in pairs]
        if not result.answers:
            result.add("Nothing could be ranked.")
        if rows:
            result.tables.insert(0, needed_table(rows, reliability))
        return result


def _benchmark_groups(subjects: Sequence[Subject]) -> Iterator[tuple[str, list[int]]]:
    """Group the benchmarks on which the same layers of the same model were removed.

    Yields the title of each group of two or more benchmarks, and their indices in `subjects`.
    """

    def key(n: int) -> object:
        record = subjects[n].record
        layers = tuple(run.change.layer for run in record.whole_layers)
        return record.model.key, record.removed, layers

    accuracies = [n for n, subject in enumerate(subjects) if subject.record.higher_is_better]
    for indices in group_by(accuracies, key).values():
        cells = [subjects[n].record for n in indices]
        # A benchmark that is listed twice would be its own second sample.
        if 1 < len(cells) == len({cell.benchmark.title for cell in cells}):
            yield f"{cells[0].model.name} · mean of {len(cells)} benchmarks", indices


# Figures


@dataclass(frozen=True)
class LayerRanking:
    """Values of one measure (e.g. accuracy drop), which rank the layers by their means.

    Attributes:
        name: Name of the measure.
        values: `[documents, layers]`; the layer with the largest mean is ranked first.
        weights: `[documents]`, weight of each document in a layer's mean.
        strata: `[documents]`, task of each document, and the benchmark if several are joined.
        reason: Reason why the values cannot rank layers, e.g. too few layers; otherwise empty.
    """

    name: str
    values: Array
    weights: Array
    strata: NDArray[np.generic]
    reason: str = ""

    def means(self) -> Array:
        """Return each layer's weighted mean over all documents."""
        counts = self.weights > 0
        return np.average(self.values[counts], axis=0, weights=self.weights[counts])


@dataclass(frozen=True)
class AgreementCurve:
    """Agreement of two layer rankings from random samples of documents, for each sample size.

    Attributes:
        name: Name of the measure that ranks the layers.
        documents: Number of documents.
        layers: Number of layers.
        sizes: Numbers of documents in a sample, ascending.
        apart: Name of an agreement statistic → values `[draws, sizes]` that compare the rankings by
            two disjoint samples. A value is NaN if a sample has more than half of the documents.
        within: Name of an agreement statistic → values `[draws, sizes]` that compare the ranking by
            a sample with the ranking by all documents.
        needed: Number of documents with which the layer ranking reaches the target reliability.
            Undefined if the rankings by two halves of the documents do not agree.
        p_value: p-value of the hypothesis that all layers have the same mean.
        extrapolated: Whether `needed` exceeds half of the documents.
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
        """Half of the number of documents, which is the largest size of two disjoint samples."""
        return self.documents // 2

    @property
    def tops(self) -> list[tuple[str, str, int]]:
        """Overlap statistics of the k highest-ranked or lowest-ranked layers.

        An overlap statistic is a tuple of its name, "top" or "bottom", and k.
        """
        parts = ((name, *name.split()) for name in self.apart if " " in name)
        return [(name, end, int(k)) for name, end, k in parts]

    def agreement(self, n: int, statistic: str = "spearman", disjoint: bool = True) -> Estimate:
        """Return how well layer rankings by random samples of `n` documents agree.

        Args:
            n: Number of documents in a sample.
            statistic: Name of the agreement statistic.
            disjoint: True to compare the rankings by two disjoint samples. False to compare the
                ranking by one sample with the ranking by all documents.

        Returns:
            The mean of the statistic over random samples, with the range from the 2.5 % to the
            97.5 % quantile.
        """
        if disjoint and n > self.half:
            return Estimate(None, reason=SAMPLES_TOO_LARGE)
        draws = (self.apart if disjoint else self.within)[statistic][:, self.sizes.index(n)]
        mean = _defined_mean(draws)
        if math.isnan(mean):
            return Estimate(None, reason=_ALL_TIED)
        low, high = np.quantile(draws[np.isfinite(draws)], [0.025, 0.975])
        return Estimate(mean, low=float(low), high=float(high))

    @property
    def doubt(self) -> str:
        """Text that says why rankings by two halves of the documents disagree, or an empty text."""
        halves = self.agreement(self.half)
        if halves.low is None:
            return halves.reason or ""
        return "" if halves.side() > 0 and self.p_value < SIGNIFICANT else HALVES_DISAGREE

    def predicted(self, n: float) -> float | None:
        """Predict the correlation of rankings by two samples of `n` documents.

        The prediction uses the Spearman-Brown formula.
        """
        halves = self.agreement(self.half).value
        return None if self.doubt or halves is None else spearman_brown(halves, n / self.half)

    def with_p_value(self, p_value: float) -> AgreementCurve:
        """Return a copy of the curve with another p-value.

        If the text `doubt` of the new curve is not empty, `needed` becomes undefined.
        """
        curve = replace(self, p_value=p_value)
        return replace(curve, needed=Estimate(None, reason=curve.doubt)) if curve.doubt else curve


def layer_rankings(subject: Subject) -> list[LayerRanking]:
    """Rank the layers by the accuracy drop, and by each proxy."""
    cell = subject.outcomes()
    layers = [run.layer for run in cell.whole_layers]
    strata = np.array(cell.tasks)
    reason = ""
    if len(strata) < 2 or len(layers) < MIN_LAYERS_RANKED:
        counts = f"{count_text(len(strata), 'document')} and {count_text(len(layers), 'layer')}"
        reason = f"too little is measured to rank layers: {counts}"
    ablations = [cell.ablation(run) for run in cell.whole_layers]
    metric, gold = cell.metric_outcomes(ablations), cell.gold_outcomes(ablations)
    names = metric_format(subject.record).change, PROXIES["gold_logprob_drop"].label
    pairs = zip(names, (metric, gold), strict=True)
    rankings = [LayerRanking(name, p.drops, p.weights, strata) for name, p in pairs]
    weights = cell.tokens / max(cell.tokens.sum(), 1)
    for proxy in OBSERVED:
        means = proxy.from_observed(token_means(cell.proxy_sums(proxy)[:, layers], cell.tokens))
        unobserved = cell.unobserved_reason(proxy)
        rankings.append(LayerRanking(proxy.label, means, weights, strata, unobserved))
    return [replace(r, reason=reason or r.reason or _unusable_reason(r)) for r in rankings]


def _unusable_reason(ranking: LayerRanking) -> str:
    values = ranking.values[ranking.weights > 0]
    if bad := int((~np.isfinite(values).all(axis=1)).sum()):
        return f"{bad} of {len(ranking.values)} documents have no finite value"
    if not len(values):
        return "no document counts"
    if np.ptp(rounded_values(ranking.means())) == 0:
        return f"all {values.shape[1]} layers have the same mean value, so they have no ranking"
    return ""


def join_rankings(rankings: Sequence[LayerRanking]) -> LayerRanking:
    """Join the values of one measure on several benchmarks, all with equal weight."""
    reason = next((ranking.reason for ranking in rankings if ranking.reason), "")
    if len(rankings) == 1 or reason:
        return replace(rankings[0], reason=reason)
    strata = [[f"{n}/{task}" for task in r.strata] for n, r in enumerate(rankings)]
    values = np.concatenate([ranking.values for ranking in rankings])
    weights = np.concatenate([ranking.weights for ranking in rankings]) / len(rankings)
    return LayerRanking(rankings[0].name, values, weights, np.concatenate(strata))


def agreement_curve(ranking: LayerRanking, reliability: float) -> AgreementCurve:
    """Compute, for each sample size, how well rankings by random samples of documents agree."""
    documents, layers = ranking.values.shape
    sizes = tuple(sorted({*(n for n in SAMPLE_SIZES if n < documents), documents // 2}))
    values, weights, strata = ranking.values, ranking.weights, ranking.strata
    first, second = disjoint_means(values, weights, strata, sizes, SAMPLE_PAIRS, SEED)
    means = np.broadcast_to(ranking.means(), first.shape)
    # Correlations, and the overlaps of the top and bottom five layers, or quarter of all.
    ks = sorted({k for k in (5, math.ceil(layers / 4)) if k < layers})
    statistics = ["spearman", "kendall", *(f"{end} {k}" for end in ("top", "bottom") for k in ks)]

    def needed(indices: IntArray) -> tuple[float, bool]:
        half = len(indices) // 2
        small = [n for n in sizes if n < half] + [half]
        subset = values[indices], weights[indices], strata[indices]
        samples = disjoint_means(*subset, small, JACKKNIFE_PAIRS, SEED)
        means = [_defined_mean(draws) for draws in _sample_statistic("spearman", *samples).T]
        return documents_to_reach(small, means, reliability)

    estimate = positive_estimate(lambda indices: needed(indices)[0], strata, SEED)
    if estimate.value is None:
        estimate = Estimate(None, reason=HALVES_DISAGREE)
    p_value = layer_difference_p(values, weights, SEED)
    apart = {name: _sample_statistic(name, first, second) for name in statistics}
    within = {name: _sample_statistic(name, first, means) for name in statistics}
    figures = (sizes, apart, within, estimate, p_value, needed(np.arange(documents))[1])
    return AgreementCurve(ranking.name, documents, layers, *figures).with_p_value(p_value)


def adjust_curves(curves: Sequence[AgreementCurve]) -> list[AgreementCurve]:
    """Adjust the p-values of all agreement curves by Holm's method.

    If the text `doubt` of a curve is not empty, `needed` becomes undefined.
    """
    adjusted = holm([curve.p_value for curve in curves])
    rows = zip(curves, adjusted, strict=True)
    return [curve.with_p_value(p) for curve, p in rows if p is not None]


def _sample_statistic(name: str, first: Array, second: Array) -> Array:
    """Compute how well two rankings of layers agree, for each random draw and sample size.

    Args:
        name: Name of the agreement statistic.
        first: Means `[draws, sizes, layers]` by which the first ranking orders the layers.
        second: Means `[draws, sizes, layers]` by which the second ranking orders the layers.

    Returns:
        The agreement statistic, as an array `[draws, sizes]`.
    """
    a, b = (means.reshape(-1, means.shape[2]) for means in (first, second))
    end, _, k = name.partition(" ")
    sign = -1 if end == "bottom" else 1
    values = top_overlap(sign * a, sign * b, int(k)) if k else row_coefficients(a, b, name)
    return values.reshape(first.shape[:2])


def _defined_mean(values: Array) -> float:
    """Return the mean of the finite values; NaN if fewer than half of the values are finite."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if 2 * len(defined) >= len(values) else math.nan


# Sentences, tables and charts


def _write_answer(
    cells: Sequence[CellRecord], curves: Sequence[AgreementCurve], reliability: float
) -> str:
    """Describe how well the rankings by two samples of documents agree.

    The text also states how many documents a reliable ranking needs.
    """
    drop, *others = curves
    n = max((n for n in SIZES_SHOWN if n in drop.sizes and n <= drop.half), default=drop.half)
    total = sum(task.documents for cell in cells for task in cell.benchmark.tasks)
    needed = {curve.name: curve.needed.value for curve in others}
    numbers = {name: _two_digits(value) for name, value in needed.items() if value is not None}
    figures = (drop, drop.agreement(n), reliability, total, numbers)
    return CALIBRATION_TEXTS.render("answer", cells, n, *figures)


def needed_table(rows: Sequence[tuple[str, AgreementCurve]], reliability: float) -> Table:
    """Build the table of how many documents each measure needs to rank layers reliably."""

    def full_agreement(row: tuple[str, AgreementCurve]) -> Estimate:
        return Estimate(row[1].predicted(row[1].documents), reason=row[1].doubt)

    def source(row: tuple[str, AgreementCurve]) -> Estimate | str:
        if row[1].needed.value is None:
            return row[1].needed
        return "extrapolated" if row[1].extrapolated else "measured"

    return build_table(
        f"Number of documents needed to rank the layers with a reliability of {reliability:g}",
        [
            Column("model and benchmark", "text", lambda row: row[0]),
            Column("ranked by", "text", lambda row: row[1].name),
            Column("documents", "count", lambda row: row[1].documents),
            Column(
                "agreement of two halves", "coefficient", lambda row: row[1].agreement(row[1].half)
            ),
            Column(
                "expected agreement of the ranking with a ranking by as many new documents",
                "coefficient",
                full_agreement,
            ),
            Column(f"documents for {reliability:g}", "count", lambda row: row[1].needed),
            Column("how", "text", source),
        ],
        rows,
        *CALIBRATION_TEXTS.render_all("needed_notes"),
    )


def agreement_table(title: str, drop: AgreementCurve) -> Table:
    """Build the table of how well layer rankings by two samples agree.

    The table has a row for each sample size.
    """

    def overlap(name: str) -> Column[int]:
        return Column(f"{name} shared", "percent", lambda n: drop.agreement(n, name))

    with_all = f"rankings by one sample and by all {drop.documents:,} documents"
    return build_table(
        f"{title}: agreement of layer rankings by random samples of documents, ranked by "
        f"{drop.name}",
        [
            Column("n", "count", lambda n: n),
            Column("two samples", "coefficient", drop.agreement),
            Column("by Spearman-Brown", "coefficient", drop.predicted, drop.doubt),
            Column(with_all, "coefficient", lambda n: drop.agreement(n, disjoint=False)),
            Column("two samples, Kendall", "coefficient", lambda n: drop.agreement(n, "kendall")),
            *(overlap(name) for name, _, _ in drop.tops),
        ],
        [n for n in drop.sizes if n in SIZES_SHOWN or n == drop.half],
        *CALIBRATION_TEXTS.render_all("agreement_notes", drop, SAMPLE_PAIRS),
    )


def _agreement_chart(title: str, drop: AgreementCurve, others: list[AgreementCurve]) -> LineChart:
    """Build the chart of the correlation of rankings by two samples, by sample size.

    The chart has a line for each measure that ranks the layers.
    """
    end = max(drop.documents, drop.needed.value or 0)
    positions = sorted({*drop.sizes, *(n for n in SAMPLE_SIZES if n <= 2 * end)})

    def line(curve: AgreementCurve, disjoint: bool = True) -> list[Estimate | None]:
        sizes = curve.sizes
        return [curve.agreement(n, disjoint=disjoint) if n in sizes else None for n in positions]

    def values(curve: AgreementCurve, disjoint: bool = True) -> list[float | None]:
        return [None if figure is None else figure.value for figure in line(curve, disjoint)]

    return line_chart(
        f"{title}: agreement of rankings of {drop.layers} layers by samples of documents",
        ("documents in a sample", "rank correlation"),
        "coefficient",
        positions,
        {
            f"{drop.name}, two samples": line(drop),
            f"{drop.name}, prediction by Spearman-Brown": map(drop.predicted, positions),
            f"{drop.name}, one sample compared with all {drop.documents:,} documents": values(
                drop, disjoint=False
            ),
            **{f"{curve.name}, two samples": values(curve) for curve in others},
        },
        log_x=True,
    )


def _overlap_chart(title: str, drop: AgreementCurve) -> LineChart:
    """Build the chart of how many top and bottom layers two rankings have in common.

    The two rankings use disjoint samples of the documents.
    """
    positions = [n for n in drop.sizes if n <= drop.half]
    lines = {}
    for name, end, k in drop.tops:
        label = f"the {k} that matter {'most' if end == 'top' else 'least'}"
        lines[label] = [drop.agreement(n, name).value for n in positions]
    for k in sorted({k for _, _, k in drop.tops}):
        lines[f"{k} by chance"] = [k / drop.layers] * len(positions)
    title = f"{title}: overlap of top or bottom layers in rankings by two samples ({drop.name})"
    axes = ("documents in a sample", "shared")
    return line_chart(title, axes, "percent", positions, lines, log_x=True)
