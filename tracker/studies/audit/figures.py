"""Compute the statistics of the study `audit`: how well proxies agree with accuracy drops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

import numpy as np

from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.records import OUTER_LAYERS
from tracker.engine.observers.layer_proxies import output_proxies
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import DocumentArrays
from tracker.measuring.observing import Observations, ObserveDocument
from tracker.schema.documents import Document
from tracker.schema.estimates import Estimate
from tracker.schema.findings import chart_values
from tracker.schema.formats import count_text
from tracker.schema.proxies import LAYER_PROXIES, OBSERVED, proxy_cost
from tracker.stats.arrays import Array, token_means
from tracker.stats.correlation import correlate
from tracker.stats.rank_agreement import (
    Disagreement,
    compare_ranks,
    mean_spearman_p,
    row_coefficients,
    top_overlap,
)
from tracker.stats.reliability import LayerMeasure, prediction_by_budget
from tracker.stats.resampling import RESAMPLES, SEED, bias_corrected_interval, resampled_means
from tracker.stats.support import count_pairs, holm, ranks_by_comparison, widen
from tracker.stats.task_dependence import (
    BenchmarkSample,
    VarianceComparison,
    benchmark_variance,
    compare_variances,
    estimate_profile,
    profile_reliability,
    variance_difference,
)
from tracker.studies.base import MIN_LAYERS_RANKED, StudyContext, Subject, observe_subject

OBSERVATION_KIND = "output-proxies-1"
"""Kind of the stored observations that are not outcomes: the sums of `output_proxies`."""
DROP = "accuracy drop"
_UNDEFINED = {
    "gate_gradient": "autograd cannot differentiate this model, or its loss is not finite",
    "gold_logprob_drop": "the right answer of a document is missing or has no finite score",
}
TOP_LAYERS = 5
"""Number of layers that are called the most, or the least, relevant layers."""
MAJOR_SHARE = 1 / 4
"""Two ranks differ majorly if they differ by more than this share of the layers."""
MIN_RELIABILITY = 0.5
"""Noise is subtracted only for benchmarks with at least this share of signal in their drops."""


@dataclass(frozen=True)
class ProxyAgreement:
    """Correlations of one proxy with the accuracy drop over the layers, on one benchmark.

    Attributes:
        spearman: Spearman correlation with interval and p-value. If the Spearman correlation is
            undefined, `inner`, `kendall` and `pearson` are None, and `resampled` contains NaN.
        inner: Spearman correlation over the inner layers, without the first and last layers of the
            model.
        kendall: Kendall's tau-b.
        pearson: Pearson's r.
        resampled: Spearman correlation for each bootstrap resample of the documents.
    """

    spearman: Estimate
    inner: float | None
    kendall: float | None
    pearson: float | None
    resampled: Array


class AuditedCell:
    """Accuracy drops and proxies of removed layers, for one model and benchmark."""

    def __init__(self, context: StudyContext, subject: Subject, label: str) -> None:
        """Compute proxies that are not stored, and join drops and proxies of the same documents."""
        self.record = subject.record
        self.label = label
        cell = subject.outcomes()
        layers = self.layers = [run.layer for run in cell.whole_layers]
        self.tasks = cell.tasks
        self.strata = cell.strata
        self.not_observed = {proxy.name: cell.unobserved_reason(proxy) for proxy in OBSERVED}
        total = subject.record.model.layers
        observations = observe_subject(subject, OBSERVATION_KIND, context, _begin_observing)
        outer = range(OUTER_LAYERS, total - OUTER_LAYERS)
        self.inner = [index for index, layer in enumerate(layers) if layer in outer]
        ablations = [cell.ablation(run) for run in cell.whole_layers]
        metric, gold = cell.metric_outcomes(ablations), cell.gold_outcomes(ablations)
        pairs = {DROP: metric, "gold_logprob_drop": gold}
        figures = {name: (paired.drops, paired.weights) for name, paired in pairs.items()}
        for name, values, weights in _proxy_figures(cell, observations):
            figures[name] = values[:, layers], weights
        costs = {name: proxy_cost(name, total, is_shared=True) for name in figures}
        self.measures = {n: LayerMeasure(*pair, costs[n]) for n, pair in figures.items()}

    @property
    def drop(self) -> LayerMeasure:
        """The accuracy drop of each document and removed layer."""
        return self.measures[DROP]

    @property
    def relevance(self) -> Array:
        """The relevance of each layer: drop divided by the intact model's accuracy above chance."""
        return np.array([run.accuracy_relevance for run in self.record.whole_layers], float)

    def resample(self, name: str) -> Array:
        """Return each layer's mean of a measure, by bootstrap resample: `[resamples, layers]`."""
        measure = self.measures[name]
        return resampled_means(measure.values, RESAMPLES, SEED, self.strata, measure.weights)

    @cached_property
    def agreements(self) -> dict[str, ProxyAgreement]:
        """Correlations of each proxy with the accuracy drop, by name of the proxy."""
        drops = self.resample(DROP)
        return {name: self._agreement(name, drops) for name in LAYER_PROXIES}

    def _agreement(self, name: str, drops: Array) -> ProxyAgreement:
        x, y, resamples = self.measures[name].means(), self.drop.means(), self.resample(name)
        spearman = correlate(x, y, coefficient="spearman", resamples=(resamples, drops))
        if spearman.value is None:
            reason = spearman.reason or ""
            if reason.startswith("the proxy is undefined"):
                default = _UNDEFINED.get(name, "a hidden state or a logit is not finite")
                reason = self.not_observed.get(name) or default
            undefined = np.full(RESAMPLES, np.nan)
            return ProxyAgreement(Estimate(None, reason=reason), None, None, None, undefined)
        inner = _coefficient(x[self.inner], y[self.inner], "spearman")
        kendall, pearson = (_coefficient(x, y, kind) for kind in ("kendall", "pearson"))
        resampled = row_coefficients(resamples, drops, "spearman")
        return ProxyAgreement(spearman, inner, kendall, pearson, resampled)


def _proxy_figures(
    cell: AlignedOutcomes, observations: Observations
) -> Iterator[tuple[str, Array, Array]]:
    """Yield each proxy's name, its values [documents, layers], and the weights of the documents."""
    for proxy in OBSERVED:
        means = token_means(cell.proxy_sums(proxy), cell.tokens)
        yield proxy.name, proxy.from_observed(means), cell.tokens
    sums = observations.select(cell.documents)
    tokens, predicted = sums["tokens"], sums["predicted"]
    for name in ("lens_changes", "kl", "js"):
        yield name, token_means(sums[name], tokens), tokens
    yield "loss_increase", token_means(sums["loss_increase"], predicted), predicted
    # Use the absolute derivative of each document, so that opposite signs do not cancel.
    derivatives = np.abs(token_means(sums["gate_gradient"], predicted))
    yield "gate_gradient", derivatives, cell.plain_weights


def _coefficient(x: Array, y: Array, name: str) -> float | None:
    if len(x) < MIN_LAYERS_RANKED:
        return None
    value = float(row_coefficients(x[None], y[None], name)[0])
    return value if np.isfinite(value) else None


def _begin_observing(engine: Engine) -> ObserveDocument:
    def observe_document(document: Document) -> DocumentArrays:
        return {name: array.numpy() for name, array in output_proxies(engine, document).items()}

    return observe_document


class ProxySummary:
    """Mean correlation of one proxy with the accuracy drop, over the benchmarks of one model.

    Args:
        proxy: Name of the proxy, a key of `LAYER_PROXIES`.
        cells: Drops and proxies on each benchmark on which the proxy is defined.

    Attributes:
        spearman: Mean Spearman coefficient with a bootstrap interval over documents.
        inner: Mean Spearman coefficient over the inner layers, without the first and last layers of
            the model.
        kendall: Mean of Kendall's tau-b.
        p_value: p-value of the mean Spearman coefficient, not adjusted for the number of proxies.
        resampled: Mean Spearman coefficient for each bootstrap resample of the documents.
    """

    def __init__(self, proxy: str, cells: tuple[AuditedCell, ...]) -> None:
        self.proxy, self.cells = proxy, cells
        agreements = [cell.agreements[proxy] for cell in cells]
        value = float(np.mean([agreement.spearman.value for agreement in agreements]))
        self.resampled = np.mean([agreement.resampled for agreement in agreements], axis=0)
        ends = bias_corrected_interval(value, self.resampled, -1, 1)
        self.spearman = Estimate(value, *ends)
        inner = [agreement.inner for agreement in agreements if agreement.inner is not None]
        self.inner = float(np.mean(inner)) if inner else None
        self.kendall = float(np.mean([a.kendall for a in agreements if a.kendall is not None]))
        self.p_value = mean_spearman_p(mean_profiles(proxy, cells), mean_profiles(DROP, cells))

    @cached_property
    def overlaps(self) -> tuple[float, float, float]:
        """Overlap of the ranking of layers by proxy with the ranking of layers by drop.

        The tuple contains the shared fraction of the top layers, the shared fraction of the bottom
        layers, and the fraction that is expected by chance.
        """
        rows = []
        for cell in self.cells:
            count = min(TOP_LAYERS, len(cell.layers))
            x, y = cell.measures[self.proxy].means()[None], cell.drop.means()[None]
            top, bottom = (float(top_overlap(sign * x, sign * y, count)[0]) for sign in (1, -1))
            rows.append((top, bottom, count / len(cell.layers)))
        top, bottom, chance = np.mean(rows, axis=0).tolist()
        return top, bottom, chance


@dataclass(frozen=True)
class RelevanceVariance:
    """Variation of the layers' relevance over benchmarks, for one measure of relevance.

    Attributes:
        raw: Variance over benchmarks of a layer's z-score, averaged over layers.
        test: Result of testing whether the accuracy drop varies more over benchmarks than this
            measure.
        noisy: Same as `raw`, but only over the benchmarks with reliable drops.
        clean: The variance `noisy` without the part that is due to sampling noise.
        excess: Variance `clean` of the accuracy drop minus the variance `clean` of this measure.
        reason: Reason why `clean` is None, e.g. too few reliable benchmarks.
    """

    raw: float
    test: VarianceComparison | None = None
    noisy: float | None = None
    clean: float | None = None
    excess: Estimate | None = None
    reason: str = ""


class ModelAudit:
    """Comparison of proxies with accuracy drops for one model, over all its benchmarks."""

    def __init__(self, name: str, cells: Sequence[AuditedCell]) -> None:
        self.name = name
        self.cells = cells
        self.total = cells[0].record.model.layers

    @property
    def on(self) -> str:
        """Text with the numbers of benchmarks and documents.

        An example is "2 benchmarks, 900 documents".
        """
        cells = self.comparable
        documents = count_text(sum(cell.record.n for cell in cells), "document")
        return f"{count_text(len(cells), 'benchmark')}, {documents}"

    @property
    def drop(self) -> str:
        """Name of what a removal causes: accuracy drop, loss increase, or both names."""
        kinds = sorted({cell.record.higher_is_better for cell in self.cells}, reverse=True)
        return " or ".join(DROP if accuracy else "loss increase" for accuracy in kinds)

    @cached_property
    def comparable(self) -> list[AuditedCell]:
        """Benchmarks over which means are computed, all with the same set of removed layers.

        This set of layers is the most frequent one among the benchmarks of the model.
        """
        cells = distinct_cells(self.cells)
        sets = [tuple(cell.layers) for cell in cells]
        common = max(sets, key=lambda layers: (sets.count(layers), len(layers)))
        return [cell for cell in cells if tuple(cell.layers) == common]

    @property
    def left_out(self) -> list[str]:
        """Reasons why `comparable` leaves out benchmarks; one text for each such benchmark."""
        distinct, reasons = distinct_cells(self.cells), []
        reference = self.comparable[0]
        for cell in self.cells:
            if cell not in distinct:
                same = next(other for other in distinct if {*other.tasks} & {*cell.tasks})
                reasons.append(f"{cell.label} has documents of {same.label}")
            elif cell not in self.comparable:
                reasons.append(
                    f"{cell.label} removes {count_text(len(cell.layers), 'layer')}, but "
                    f"{reference.label} removes {len(reference.layers)}"
                )
        return reasons

    @cached_property
    def summaries(self) -> dict[str, ProxySummary]:
        """Name of each proxy → its mean correlation with the drop; the highest mean is first."""
        summaries = []
        for proxy in LAYER_PROXIES:
            defined = (c.agreements[proxy].spearman.value is not None for c in self.comparable)
            if cells := tuple(compress(self.comparable, defined)):
                summaries.append(ProxySummary(proxy, cells))
        summaries.sort(key=lambda summary: -(summary.spearman.value or 0.0))
        return {summary.proxy: summary for summary in summaries}

    def compare_proxies(self, summary: ProxySummary, other: ProxySummary) -> Estimate:
        """Estimate how much better one proxy correlates with the accuracy drop than another proxy.

        The value is the difference of the two mean Spearman coefficients. The interval is widened,
        so that the intervals of all pairs of proxies hold simultaneously.
        """
        a, b = summary.spearman.value, other.spearman.value
        if summary.cells != other.cells or a is None or b is None:
            return Estimate(None, reason="one of the two proxies is undefined on some benchmarks")
        ends = bias_corrected_interval(a - b, summary.resampled - other.resampled)
        documents = sum(cell.record.n for cell in summary.cells)
        n_pairs = count_pairs(len(self.summaries))
        (difference,) = widen([Estimate(a - b, *ends)], [documents], n_pairs)
        return difference

    @cached_property
    def ranks(self) -> dict[str, tuple[int, int]]:
        """Name of each proxy → best and worst rank that the proxy can have among all proxies.

        Rank 1 is the highest correlation with the accuracy drop. The two ranks differ where
        correlations do not differ significantly.
        """
        summaries = list(self.summaries.values())
        lows = [[self.compare_proxies(a, b).low or 0.0 for b in summaries] for a in summaries]
        ranks = ranks_by_comparison(np.array(lows) > 0)
        return dict(zip(self.summaries, ranks, strict=True))

    @cached_property
    def adjusted(self) -> dict[str, float]:
        """Holm-adjusted p-value of the mean Spearman coefficient, by name of the proxy."""
        p_values = holm([summary.p_value for summary in self.summaries.values()])
        return {n: p for n, p in zip(self.summaries, p_values, strict=True) if p is not None}

    @cached_property
    def disagreements(self) -> dict[str, tuple[Disagreement, Disagreement]]:
        """Name of each proxy → two comparisons of the ranks by proxy and by accuracy drop.

        The first comparison counts every layer whose two ranks differ. The second counts layers
        whose ranks differ by more than `MAJOR_SHARE` of the number of layers.
        """
        disagreements = {}
        for name, summary in self.summaries.items():
            x, y = (mean_profiles(measure, summary.cells) for measure in (name, DROP))
            majorly = compare_ranks(x, y, MAJOR_SHARE * x.shape[1])
            disagreements[name] = compare_ranks(x, y, 0), majorly
        return disagreements

    @cached_property
    def above_chance(self) -> list[AuditedCell]:
        """Benchmarks where the model is better than chance and the layers' drops are not all equal.

        The list is empty if only one benchmark meets the two conditions.
        """
        finite = [cell for cell in self.comparable if np.isfinite(cell.relevance).all()]
        cells = [cell for cell in finite if np.ptp(cell.drop.means()) > 0]
        return cells if len(cells) > 1 else []

    @cached_property
    def reliabilities(self) -> dict[str, float]:
        """Name of each benchmark → reliability of the measured drops.

        Reliability: share of the variance of the layers' drops that is not sampling noise.
        """
        drops = {c.label: (c.drop.values, c.drop.weights, c.strata) for c in self.cells}
        return {name: profile_reliability(*estimate_profile(*d)) for name, d in drops.items()}

    @cached_property
    def reliable(self) -> list[AuditedCell]:
        """Benchmarks in `above_chance` whose drops reach the reliability `MIN_RELIABILITY`."""
        return [c for c in self.above_chance if self.reliabilities[c.label] >= MIN_RELIABILITY]

    @cached_property
    def spreads(self) -> dict[str, RelevanceVariance]:
        """Name of a measure of relevance → how much a layer's relevance varies over benchmarks.

        The dict is empty if `above_chance` is empty.
        """
        cells = self.above_chance
        if not cells:
            return {}
        spreads = {}
        relevance = np.array([cell.relevance for cell in cells])
        if (np.ptp(relevance, axis=1) > 0).all():
            mean = float(benchmark_variance(relevance).mean())
            reason = (
                "sampling noise is computed for the accuracy drop, but not for accuracy relevance"
            )
            spreads["accuracy relevance"] = RelevanceVariance(mean, reason=reason)
        drop = benchmark_variance(mean_profiles(DROP, cells))
        spreads[DROP] = self._spread(DROP, drop, None)
        for name in LAYER_PROXIES:
            if all(cell.agreements[name].spearman.value is not None for cell in cells):
                proxy = benchmark_variance(mean_profiles(name, cells))
                spreads[name] = self._spread(name, proxy, compare_variances(drop, proxy))
        return spreads

    def _spread(
        self, name: str, variances: Array, test: VarianceComparison | None
    ) -> RelevanceVariance:
        mean, cells = float(variances.mean()), self.reliable
        if len(cells) < 2:
            return RelevanceVariance(mean, test, reason=self.noisy_text)
        samples = [_benchmark_sample(name, cell) for cell in cells]
        estimates = [estimate_profile(*sample) for sample in samples]
        for cell, estimate in zip(cells, estimates, strict=True):
            if not profile_reliability(*estimate) >= MIN_RELIABILITY:
                reason = f"on {cell.label}, over half of the variance of layers is sampling noise"
                return RelevanceVariance(mean, test, reason=reason)
        profiles, noise = map(np.array, zip(*estimates, strict=True))
        drops = [_benchmark_sample(DROP, cell) for cell in cells]
        both = benchmark_variance(profiles), benchmark_variance(profiles, noise)
        noisy, clean = (float(variance.mean()) for variance in both)
        excess = None if name == DROP else variance_difference(drops, samples)
        return RelevanceVariance(mean, test, noisy, clean, excess)

    @cached_property
    def prediction_by_cost(
        self,
    ) -> tuple[list[float], dict[str, tuple[float | None, ...]], float | None]:
        """Correlation of each measure with the drops on other documents, by computing budget.

        The first item lists the budgets, in forward passes for one benchmark. The second gives the
        mean Spearman correlations of each measure at these budgets. The third is the mean
        correlation between the drops on two halves of the documents.
        """
        passes = proxy_cost(DROP, self.total, is_shared=True)
        most = max(len(cell.tasks) for cell in self.comparable) // 2 * passes
        budgets = [float(2**i) for i in range(int(np.log2(max(most, 1))) + 1)]
        by_cell = []
        for cell in self.comparable:
            if len(cell.tasks) < 4 or np.ptp(cell.drop.means()) == 0:
                continue
            defined = [n for n, a in cell.agreements.items() if a.spearman.value is not None]
            usable = {name: cell.measures[name] for name in (DROP, *defined)}
            half = len(cell.tasks) // 2 * passes
            by_cell.append(prediction_by_budget(usable, cell.drop, [*budgets, half]))
        if not by_cell:
            return budgets, {}, None
        undefined = [np.nan] * (len(budgets) + 1)
        curves = {}
        for name in (*LAYER_PROXIES, DROP):
            rows = [curve.get(name, undefined) for curve in by_cell]
            curves[name] = chart_values(np.mean(rows, axis=0))
        return budgets, {name: row[:-1] for name, row in curves.items()}, curves[DROP][-1]

    @property
    def noisy_text(self) -> str:
        """Text that lists the benchmarks with too few documents for reliable drops.

        An example is `copa needs about 400 documents, and has 48`.
        """
        needs = []
        for cell in self.above_chance:
            share, n = self.reliabilities[cell.label], cell.record.n
            if not share >= MIN_RELIABILITY:
                needed = n * (1 - share) / share if share > 0 else 0.0
                more = f"about {np.ceil(needed):,.0f}" if needed else "many more"
                needs.append(f"{cell.label} needs {more} documents, and has {n:,}")
        return "; ".join(needs)


def distinct_cells(cells: Sequence[AuditedCell]) -> list[AuditedCell]:
    """Keep only one of several benchmarks that contain the same task.

    A benchmark with an accuracy is preferred to a benchmark with a loss. The next criteria are the
    number of removed layers and the number of documents.
    """
    best = sorted(cells, key=lambda c: (-c.record.higher_is_better, -len(c.layers), -c.record.n))
    distinct: list[AuditedCell] = []
    for cell in best:
        if not any({*cell.tasks} & {*other.tasks} for other in distinct):
            distinct.append(cell)
    return [cell for cell in cells if cell in distinct]


def mean_profiles(name: str, cells: Sequence[AuditedCell]) -> Array:
    """Return each layer's mean of a measure, by benchmark: `[benchmarks, layers]`."""
    return np.array([cell.measures[name].means() for cell in cells])


def _benchmark_sample(name: str, cell: AuditedCell) -> BenchmarkSample:
    measure = cell.measures[name]
    return np.nan_to_num(measure.values), measure.weights, cell.strata


def pooled_correlation(cells: Sequence[AuditedCell]) -> Estimate | None:
    """Compute Pearson's r of cosine score and accuracy drop, over inner layers of all benchmarks.

    Benchmarks that measure a loss are left out.
    """
    cells = [cell for cell in cells if cell.inner and cell.record.higher_is_better]
    if sum(len(cell.inner) for cell in cells) < MIN_LAYERS_RANKED:
        return None
    names = ("cosine_score", DROP)
    x, y = (np.concatenate([c.measures[name].means()[c.inner] for c in cells]) for name in names)
    xs, ys = (np.concatenate([c.resample(n)[:, c.inner] for c in cells], axis=1) for n in names)
    value = float(row_coefficients(x[None], y[None], "pearson")[0])
    low, high = bias_corrected_interval(value, row_coefficients(xs, ys, "pearson"), -1, 1)
    return None if low is None else Estimate(value, low, high)
