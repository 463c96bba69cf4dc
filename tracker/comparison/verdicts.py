"""Compare models on the same documents: differences in metrics, and verdicts such as `worse`.

The function `compare_models` compares each model with the first model. The 95 % confidence
intervals of all differences between the models are simultaneous (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from statistics import NormalDist
from typing import Literal

import numpy as np

from tracker.analysis.paired import PairedOutcomes
from tracker.comparison.answers import (
    CLUSTER,
    PROMPT_SETTINGS,
    BenchmarkAnswers,
    ModelAnswers,
    PairedTables,
    pair_documents,
)
from tracker.schema.errors import RequestError, did_you_mean
from tracker.schema.estimates import Estimate, FigureUnit
from tracker.schema.formats import count_text
from tracker.schema.identities import CHOICE_PROBABILITIES, CHOICE_PROBABILITY
from tracker.stats.accuracy import (
    ALPHA,
    OutcomeVariance,
    bernstein_half_width,
    drop_below_p,
    effective_number,
    weights_by_task,
)
from tracker.stats.support import decide_verdicts, widen

ModelVerdict = Literal["better", "worse", "equivalent", "equivalent or better", "open"]
WORSE_CODE, OPEN_CODE = 3, 4
"""Exit codes of a gate that is not passed."""
ALL_BENCHMARKS = ""
"""Key of the margin of all benchmarks without their own."""
MAX_NAMED_DOCUMENTS = 5
"""Maximum number of documents that a note names."""


@dataclass(frozen=True)
class Difference:
    """Difference between two models in one metric of one benchmark.

    Attributes:
        model: Name of the model that is compared with the first one.
        benchmark: Name of the task or group.
        metric: Name of the metric.
        n: Number of common documents.
        first: Metric of the first model; the unit is `metric` if the values are not fractions.
        second: Metric of the other model.
        won: Number of documents on which the other model is better.
        lost: Number of documents on which the first model is better.
        difference: Metric of the other model minus the metric of the first model. If lower
            values are better, the sign is reversed: positive means that the other model is better.
            The interval is simultaneous. The p-value is from the exact McNemar test.
        choice: Difference of the models in the probability of the right option. The interval of
            this difference is not adjusted for multiple comparisons.
        margin: Largest acceptable difference; None if the user gave no margin.
        verdict: Statement about the other model that the interval supports.
        needed: Number of documents that would probably decide a verdict that is now `open`.
        lost_documents: For each document on which the first model is better, its task, its number
            in the first model's answers, and its number in the other model's answers.
        n_clusters: Effective number of clusters; None if documents are independent.
        spread: Standard deviation of the documents' differences. The value is None if equivalence
            cannot be tested, for example because documents have unequal weights or form clusters.
    """

    model: str
    benchmark: str
    metric: str
    n: int
    first: Estimate
    second: Estimate
    won: int
    lost: int
    difference: Estimate
    choice: Estimate
    margin: float | None = None
    verdict: ModelVerdict = "open"
    needed: int | None = None
    lost_documents: Sequence[tuple[str, int, int]] = ()
    n_clusters: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class ModelComparison:
    """Results of a comparison of models with the first model.

    Attributes:
        models: The models' answers.
        differences: Difference from the first model for each model, benchmark and metric.
        notes: Messages about results that are left out, with reasons.
        unmatched: `BENCHMARK: MODEL, not MODEL` → the documents that only the former answered.
        has_gaps: True if some results of the first model are not compared.
    """

    models: Sequence[ModelAnswers]
    differences: Sequence[Difference]
    notes: Sequence[str]
    unmatched: Mapping[str, Sequence[str]]
    has_gaps: bool = False

    @property
    def is_gate(self) -> bool:
        """True if the user gave a margin, so that verdicts decide the exit code."""
        return any(row.margin is not None for row in self.differences)

    @property
    def exit_code(self) -> int:
        """Exit code of `tracker compare`: 0 (passed), 3 (a model is worse) or 4 (undecided).

        The code is 0 if the user gave no margin. The code is 4 if the results do not show whether a
        model is worse, or if some results of the first model are not compared.
        """
        if not self.is_gate:
            return 0
        if any(row.verdict == "worse" for row in self.differences):
            return WORSE_CODE
        gated = [row.verdict for row in self.differences if row.margin is not None]
        return OPEN_CODE if self.has_gaps or "open" in gated else 0


def compare_models(
    models: Sequence[ModelAnswers],
    metrics: Collection[str] = (),
    margins: Mapping[str, float] = {},
    allowed: Collection[str] = (),
) -> ModelComparison:
    """Compare the answers of each model with the answers of the first model.

    Args:
        models: The models' answers; two or more.
        metrics: Names of the metrics to compare; empty for all logged metrics.
        margins: Benchmark → largest acceptable difference. The key `ALL_BENCHMARKS` stands for all
            benchmarks without their own margin.
        allowed: Names of settings in which the models may differ.

    Returns:
        The differences with simultaneous intervals and verdicts.

    Raises:
        RequestError: The models differ in settings outside `allowed`, or have no benchmark, metric
            or document in common.
    """
    for name, margin in margins.items():
        if not 0 < margin < 1:
            text = f"{name}={margin}" if name else str(margin)
            allowed_text = "expected a fraction between 0 and 1, e.g. 0.01"
            raise RequestError(f"within: invalid margin {text}; {allowed_text}")
    settings = {name for m in models for a in m.benchmarks.values() for name in a.settings}
    _refuse_unknown("--allow-different", allowed, settings | PROMPT_SETTINGS)
    first, *others = models
    unmatched: dict[str, list[str]] = {}
    differences: list[Difference] = []
    for other in others:
        common = [name for name in first.benchmarks if name in other.benchmarks]
        if not common:
            names = [", ".join(model.benchmarks) for model in (first, other)]
            sources = f"{first.source} and {other.source} have no benchmark in common"
            raise RequestError(f"{sources}: {names[0]} against {names[1]}")
        for benchmark in common:
            answers = first.benchmarks[benchmark], other.benchmarks[benchmark]
            pairs = pair_documents(benchmark, *answers, allowed)
            differences += _compare_benchmark(other.name, benchmark, answers[0], pairs)
            unmatched[f"{benchmark}: {first.name}, not {other.name}"] = pairs.only_first
            unmatched[f"{benchmark}: {other.name}, not {first.name}"] = pairs.only_second
    logged = {row.metric for row in differences}
    _refuse_unknown("--metric", metrics, logged)
    shown = metrics or logged.difference(CHOICE_PROBABILITIES)
    differences = [row for row in differences if row.metric in shown]
    if not differences:
        raise RequestError("the models have no metric in common that is a mean over documents")
    _refuse_unknown("--within", {*margins} - {ALL_BENCHMARKS}, {r.benchmark for r in differences})
    differences = [*_decide(differences, margins)]
    unmatched = {case: docs for case, docs in unmatched.items() if docs}
    gaps = [*_gap_notes(models, differences, unmatched, metrics)]
    notes = dict.fromkeys([*gaps, *_notes(models, differences)])
    return ModelComparison(models, differences, [*notes], unmatched, bool(gaps))


def _refuse_unknown(option: str, names: Iterable[str], valid_names: Collection[str]) -> None:
    """Raise RequestError if the user gave an unknown name for an option.

    Args:
        option: Name of the option, for the error message.
        names: Names that the user gave, such as names of metrics.
        valid_names: Names that the user may give.

    Raises:
        RequestError: A name is not in `valid_names`.
    """
    for name in names:
        if name not in valid_names:
            known_names = ", ".join(sorted(valid_names))
            suggestion = did_you_mean(name, valid_names)
            raise RequestError(f"{option}: {name!r} is not one of {known_names}.{suggestion}")


def _gap_notes(
    models: Sequence[ModelAnswers],
    differences: Sequence[Difference],
    unmatched: Mapping[str, Sequence[str]],
    metrics: Collection[str],
) -> Iterator[str]:
    """Yield notes on results of the first model that another model lacks.

    Further notes name the documents that only one of two models answered.
    """
    compared = {(row.model, row.benchmark, row.metric) for row in differences}
    for other in models[1:]:
        for benchmark, answers in models[0].benchmarks.items():
            usual = [name for name in answers.higher_is_better if name not in CHOICE_PROBABILITIES]
            logged = {*answers.higher_is_better, *answers.left_out}
            names = [name for name in metrics if name in logged] if metrics else usual
            lacking = [n for n in names if (other.name, benchmark, n) not in compared]
            if lacking or not (names or metrics):
                text = ", ".join(lacking) or (
                    f"{models[0].name} has no metric that is a mean over documents"
                )
                yield f"{benchmark} of {other.name} is not compared: {text}"
    for case, docs in unmatched.items():
        names = [*docs[:MAX_NAMED_DOCUMENTS]] + ["…"] * (len(docs) > MAX_NAMED_DOCUMENTS)
        yield f"{case}: {count_text(len(docs), 'document')} left out: {', '.join(names)}"


def _notes(models: Sequence[ModelAnswers], differences: Sequence[Difference]) -> Iterator[str]:
    """Yield notes on left-out results and tests, and on intervals for clustered documents."""
    for model in models[1:]:
        if names := [name for name in model.benchmarks if name not in models[0].benchmarks]:
            yield f"{model.name} has results of {', '.join(names)}, but {models[0].name} has none"
    for model in models:
        for benchmark, answers in model.benchmarks.items():
            for metric, reason in answers.left_out.items():
                yield f"{benchmark}: {metric} of {model.name} is left out: {reason}"
    for row in differences:
        if row.margin is not None and row.spread is None:
            reason = "documents have unequal weights or form clusters"
            yield f"{row.benchmark} ({row.metric}): equivalence is not tested, because {reason}"
        if row.n_clusters:
            yield f"{row.benchmark}: intervals are robust to dependence within clusters"


def _compare_benchmark(
    model: str, benchmark: str, answers: BenchmarkAnswers, pairs: PairedTables
) -> Iterator[Difference]:
    """Yield the difference between two models on a benchmark for each common metric."""
    first, second = pairs.first, pairs.second
    weights = weights_by_task(first["task"].tolist(), answers.by_size)
    clusters = next((t[CLUSTER].to_numpy() for t in (first, second) if CLUSTER in t), None)
    outcomes = {}
    for name in [name for name in answers.higher_is_better if name in second]:
        values = np.column_stack([first[name], second[name]])
        is_better = answers.higher_is_better[name]
        outcomes[name] = PairedOutcomes(values[:, 0], values, weights, is_better, clusters)
    choice = Estimate(None, reason="the log-likelihood of a right option is unknown")
    if CHOICE_PROBABILITY in outcomes:
        choice = -outcomes[CHOICE_PROBABILITY].drop(1)
    for name, result in outcomes.items():
        drops, values = result.drops[:, 1], result.ablated
        is_fraction = result.higher_is_better and ((values >= 0) & (values <= 1)).all()
        unit: FigureUnit | None = None if is_fraction else "metric"
        has_spread = clusters is None and np.ptp(weights) < 1e-12 and is_fraction and len(drops) > 1
        docs = zip(first["task"], first["doc"], second["doc"], strict=True)
        yield Difference(
            model=model,
            benchmark=benchmark,
            metric=name,
            n=len(drops),
            first=replace(result.level(0), unit=unit),
            second=replace(result.level(1), unit=unit),
            won=int((drops < 0).sum()),
            lost=int((drops > 0).sum()),
            difference=replace(-result.drop(1), unit=unit),
            choice=choice,
            lost_documents=[*compress(docs, drops > 0)],
            n_clusters=None if clusters is None else effective_number(weights, clusters),
            spread=float(drops.std(ddof=1)) if has_spread else None,
        )


def _decide(
    differences: Sequence[Difference], margins: Mapping[str, float]
) -> Iterator[Difference]:
    """Yield each difference again, with a simultaneous interval and a verdict."""
    family = max(sum(row.difference.low is not None for row in differences), 1)
    counts = [row.n_clusters or row.n for row in differences]
    drops = widen([-row.difference for row in differences], counts, family)
    words: dict[str, ModelVerdict] = {"costs": "worse", "helps": "better", "open": "open"}
    for row, drop, statement in zip(differences, drops, decide_verdicts(drops), strict=True):
        margin = margins.get(row.benchmark, margins.get(ALL_BENCHMARKS))
        verdict, difference = words[statement], -drop
        if verdict != "better" and _is_below(drop, margin, row.lost, row.won, row, family):
            is_equivalent = _is_below(difference, margin, row.won, row.lost, row, family)
            verdict = "equivalent" if is_equivalent else "equivalent or better"
        needed = _documents_needed(row, drop, margin, family) if verdict == "open" else None
        yield replace(row, difference=difference, margin=margin, verdict=verdict, needed=needed)


def _is_below(
    drop: Estimate, margin: float | None, lost: int, won: int, row: Difference, family: int
) -> bool:
    """Return whether a drop is significantly smaller than the margin.

    The interval of the drop must lie below the margin, and a second test must be significant. The
    second test is Tango's test for outcomes of 0 or 1, and Bernstein's bound for other outcomes.
    The interval alone finds equivalence too often if the models disagree on few documents.

    Args:
        drop: The drop, with its simultaneous interval.
        margin: Largest acceptable drop; None if the user gave no margin.
        lost: Number of documents with a positive drop.
        won: Number of documents with a negative drop.
        row: The compared metric, with the number of documents and the spread of their differences.
        family: Number of simultaneous comparisons (Bonferroni).

    Returns:
        True if both tests are significant.
    """
    if margin is None or row.spread is None or drop.value is None:
        return False
    if drop.high is None or drop.high >= margin:
        return False
    alpha = ALPHA / (2 * family)
    if drop.p_value is not None:
        return drop_below_p(lost, won, row.n, margin) <= alpha
    return drop.value + bernstein_half_width(row.spread, row.n, alpha) < margin


def _documents_needed(
    row: Difference, drop: Estimate, margin: float | None, family: int
) -> int | None:
    """Estimate how many documents would settle a comparison with the verdict `open`.

    The estimate assumes that the true difference equals the observed difference. The result is None
    if no number of documents would suffice. `family` is the number of simultaneous comparisons.
    """
    if drop.value is None or drop.low is None or drop.high is None:
        return None
    size, is_binary = abs(drop.value), drop.p_value is not None
    # As in the interval of Bonett and Price, one more document is lost and one more won.
    share = (row.lost + row.won + 2) / (row.n + 2)
    error = (drop.high - drop.low) / (2 * NormalDist().inv_cdf(1 - ALPHA / (2 * family)))
    variance = OutcomeVariance(share if is_binary else error**2 * row.n, is_binary)
    counts = [variance.count_documents(size, family)] if size > 0 else []
    if margin is not None and size < margin and row.spread is not None:
        counts.append(variance.count_equivalence_documents(margin - size, family))
    return max(min(counts), row.n + 1) if counts else None
