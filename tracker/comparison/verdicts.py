"""Compute the differences between models on the same documents, and decide verdicts.

All differences of one call are one family: their intervals hold together with 95 % confidence
(Bonferroni), for all metrics of all benchmarks of all models against the first one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from tracker.analysis.paired import PairedOutcomes
from tracker.comparison.answers import AnswerText, ModelAnswers, TaskGroup
from tracker.comparison.lm_eval_files import find_samples, read_answers
from tracker.comparison.pairing import MAX_NAMED, PairedTask, pair_task
from tracker.comparison.stored_runs import find_run, read_run
from tracker.measuring.progress import Progress, Silent, report_work
from tracker.schema.errors import RequestError, did_you_mean
from tracker.schema.estimates import Estimate
from tracker.schema.formats import count_text
from tracker.schema.identities import CHOICE_PROBABILITIES, CHOICE_PROBABILITY
from tracker.stats.accuracy import (
    ALPHA,
    OutcomeVariance,
    accuracy,
    drop_below_p,
    weights_by_task,
)
from tracker.stats.arrays import Array
from tracker.stats.support import decide_verdicts, widen

Verdict = Literal["better", "worse", "equivalent", "equivalent or better", "open"]
PASSING: tuple[Verdict, ...] = ("better", "equivalent", "equivalent or better")
WORSE_CODE, OPEN_CODE = 3, 4
"""Exit codes of a gate that is not passed."""
MIN_SHOWN_SIZE = 20
"""Size of files in megabytes from which a progress bar is shown."""
ALL_BENCHMARKS = ""
"""Key of the margin of all benchmarks without their own."""
MAX_LOST = 30
"""Maximum number of lost documents that are kept for display."""


@dataclass(frozen=True)
class LostDocument:
    """Document that the first model answers better than another model."""

    task: str
    doc: int
    first: AnswerText
    second: AnswerText


@dataclass(frozen=True)
class Difference:
    """Difference between two models in one metric of one benchmark.

    Attributes:
        model: Name of the model that is compared with the first one.
        benchmark: Name of the task or group.
        metric: Name of the metric.
        n: Number of common documents.
        first: Metric of the first model.
        second: Metric of the other model.
        won: Number of documents on which the other model is better.
        lost: Number of documents on which the first model is better.
        difference: Metric of the other model minus the metric of the first one, or its negative for
            a loss; positive = the other model is better. The interval is simultaneous. The p-value
            is from the exact McNemar test.
        choice: The same difference in the probability of the right option, with a single interval.
        higher_is_better: Whether higher values of the metric are better.
        margin: Largest acceptable difference; None without a gate.
        verdict: Supported statement about the other model.
        needed: Number of documents that would probably settle an open verdict.
        lost_documents: The first lost documents with their texts.
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
    higher_is_better: bool
    margin: float | None = None
    verdict: Verdict = "open"
    needed: int | None = None
    lost_documents: tuple[LostDocument, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Comparison of several models with the first one.

    Attributes:
        first: Name of the first model.
        differences: Differences of each metric, benchmark and model.
        notes: What was left out, and why.
        unmatched: Benchmark, task and models → numbers of the documents that only one model
            answered.
    """

    first: str
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    unmatched: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def is_gate(self) -> bool:
        """True if margins were given."""
        return any(row.margin is not None for row in self.differences)

    @property
    def exit_code(self) -> int:
        """0 without a gate or if it is passed, 3 if a model is worse, 4 if anything is open."""
        failing = {row.verdict for row in self.differences if row.verdict not in PASSING}
        if not self.is_gate or not failing:
            return 0
        return WORSE_CODE if "worse" in failing else OPEN_CODE


def read_models(sources: Sequence[str], progress: Progress) -> list[ModelAnswers]:
    """Read the answers of all models; refuse fewer than two, and a file that is given twice."""
    if len(sources) < 2:
        raise RequestError("give at least two models, for example: tracker compare A B")
    runs = {source: run for source in sources if (run := find_run(source))}
    files = {source: find_samples(Path(source)) for source in sources if source not in runs}
    seen: dict[object, str] = {}
    for source in sources:
        keys: list[object] = [path.resolve() for path in files.get(source, {}).values()]
        for key in keys or [runs[source]]:
            if key in seen:
                raise RequestError(f"{seen[key]} and {source} are the same answers; give another")
        seen |= dict.fromkeys(keys or [runs[source]], source)
    sizes = (path.stat().st_size for paths in files.values() for path in paths.values())
    size = sum(sizes) // 1_000_000
    progress = progress if size >= MIN_SHOWN_SIZE else Silent()
    with report_work(progress, "reading", size, "MB"):
        models = [
            read_run(source, *runs[source])
            if source in runs
            else read_answers(source, files[source], progress)
            for source in sources
        ]
    names = [model.name for model in models]
    return [replace(m, name=m.source) if names.count(m.name) > 1 else m for m in models]


def compare_models(
    models: Sequence[ModelAnswers],
    metrics: Collection[str] = (),
    margins: Mapping[str, float] = {},
    allowed: Collection[str] = (),
) -> Comparison:
    """Compare all models with the first one.

    Args:
        models: The models' answers; two or more.
        metrics: Metrics to compare; empty for all logged ones.
        margins: Benchmark → largest acceptable difference; the key `ALL_BENCHMARKS` stands for all
            others.
        allowed: Settings that may differ.

    Raises:
        RequestError: Settings differ, or there is nothing in common.
    """
    first, *others = models
    notes: list[str] = []
    unmatched: dict[str, Sequence[int]] = {}
    differences: list[Difference] = []
    for other in others:
        benchmarks = _benchmarks(first, other)
        for name, group in benchmarks.items():
            paired = {
                task: pair_task(f"{name}: {task}" if task != name else name, *pair, allowed)
                for task in group.tasks
                if (pair := (first.tasks[task], other.tasks[task]))
            }
            for task, pairs in paired.items():
                _note_unmatched(task, pairs, (first.name, other.name), notes, unmatched)
            differences += _compare_benchmark(other.name, name, group, paired, metrics)
        _note_left_out(first, other, benchmarks, notes)
    _refuse_absent(metrics, differences, models)
    names = dict.fromkeys(row.benchmark for row in differences)
    for benchmark in margins:
        if benchmark not in (ALL_BENCHMARKS, *names):
            near = did_you_mean(benchmark, names)
            raise RequestError(f"--within {benchmark}: compared are {', '.join(names)}.{near}")
    return Comparison(
        first.name, tuple(_decide(differences, margins)), tuple(dict.fromkeys(notes)), unmatched
    )


def _benchmarks(first: ModelAnswers, other: ModelAnswers) -> dict[str, TaskGroup]:
    """Return the common benchmarks: groups, and tasks of no group."""
    common = [task for task in first.tasks if task in other.tasks]
    if not common:
        raise RequestError(
            f"{first.source} and {other.source} have no task in common: "
            f"{', '.join(first.tasks)} against {', '.join(other.tasks)}"
        )
    groups = {
        name: TaskGroup(tasks, group.by_size)
        for name, group in (dict(other.groups) | dict(first.groups)).items()
        if (tasks := [task for task in group.tasks if task in common])
    }
    grouped = {task for group in groups.values() for task in group.tasks}
    return groups | {task: TaskGroup([task]) for task in common if task not in grouped}


def _compare_benchmark(
    model: str,
    benchmark: str,
    group: TaskGroup,
    paired: Mapping[str, PairedTask],
    metrics: Collection[str],
) -> Iterator[Difference]:
    """Yield the difference of each metric that all tasks of a benchmark have."""
    pairs = [pair for pair in paired.values() if len(pair.first_rows)]
    if not pairs:
        raise RequestError(f"{benchmark}: the models have no document in common")
    names = [
        name
        for name in pairs[0].first.metrics
        if all(name in p.first.metrics and name in p.second.metrics for p in pairs)
    ]
    tasks = [task for task, pair in paired.items() for _ in pair.first_rows]
    weights = weights_by_task(tasks, group.by_size)

    def outcomes(metric: str) -> PairedOutcomes:
        columns = zip(*(pair.values(metric) for pair in pairs), strict=True)
        first, second = map(np.concatenate, columns)
        is_higher_better = pairs[0].first.higher_is_better.get(metric, True)
        return PairedOutcomes(first, second[:, None], weights, is_higher_better)

    choice = Estimate(None, reason="no log-likelihoods of options, or no single right one")
    if CHOICE_PROBABILITY in names:
        choice = -outcomes(CHOICE_PROBABILITY).drop(0)
    for metric in names:
        if metric in metrics if metrics else metric not in CHOICE_PROBABILITIES:
            result = outcomes(metric)
            drop, drops = result.drop(0), result.drops[:, 0]
            yield Difference(
                model=model,
                benchmark=benchmark,
                metric=metric,
                n=len(drops),
                first=accuracy(result.baseline, weights),
                second=result.level(0),
                won=int((drops < 0).sum()),
                lost=int((drops > 0).sum()),
                difference=replace(-drop, p_value=drop.p_value),
                choice=choice,
                higher_is_better=result.higher_is_better,
                lost_documents=tuple(_lost_documents(paired, drops)),
            )


def _lost_documents(paired: Mapping[str, PairedTask], drops: Array) -> Iterator[LostDocument]:
    """Yield the first lost documents."""
    numbers = [(task, n) for task, pair in paired.items() for n in range(len(pair.first_rows))]
    for index in np.flatnonzero(drops > 0)[:MAX_LOST]:
        task, number = numbers[index]
        yield LostDocument(task, *paired[task].read_texts(number))


def _decide(
    differences: Sequence[Difference], margins: Mapping[str, float]
) -> Iterator[Difference]:
    """Yield the differences with simultaneous intervals and verdicts."""
    drops = [replace(-row.difference, p_value=row.difference.p_value) for row in differences]
    family = max(sum(drop.low is not None for drop in drops), 1)
    drops = widen(drops, [row.n for row in differences], family)
    words: dict[str, Verdict] = {"costs": "worse", "helps": "better", "open": "open"}
    for row, drop, statement in zip(differences, drops, decide_verdicts(drops), strict=True):
        margin = margins.get(row.benchmark, margins.get(ALL_BENCHMARKS))
        verdict = words[statement]
        if verdict != "better" and margin is not None and _is_below(row, drop, margin, family):
            is_equivalent = _is_below(row, drop, margin, family, sign=-1)
            verdict = "equivalent" if is_equivalent else "equivalent or better"
        needed = _documents_needed(row, drop, margin, family) if verdict == "open" else None
        difference = replace(-drop, p_value=drop.p_value)
        yield replace(row, difference=difference, margin=margin, verdict=verdict, needed=needed)


def _is_below(
    row: Difference, drop: Estimate, margin: float, family: int, sign: Literal[1, -1] = 1
) -> bool:
    """Return whether the drop (or the gain, for sign −1) is shown to be below the margin."""
    low, high = (drop.low, drop.high) if sign == 1 else ((-drop).low, (-drop).high)
    if low is None or high is None or high >= margin:
        return False
    if drop.p_value is None:
        return True
    counts = (row.lost, row.won) if sign == 1 else (row.won, row.lost)
    return drop_below_p(*counts, row.n, margin) <= ALPHA / (2 * family)


def _documents_needed(
    row: Difference, drop: Estimate, margin: float | None, family: int
) -> int | None:
    """Return how many documents would probably settle a verdict, if the difference is as observed.

    None means that no number would, because the models do not differ and there is no margin.
    """
    if drop.value is None or drop.low is None or drop.high is None:
        return None
    is_binary = drop.p_value is not None
    size = abs(drop.value)
    # As in the interval of Bonett and Price, one more document is lost and one more won.
    share = (row.lost + row.won + 2) / (row.n + 2)
    half_width = (drop.high - drop.low) / 2
    variance = OutcomeVariance(share if is_binary else half_width**2 * row.n, is_binary)
    counts = [variance.count_documents(size, family)] if size > 0 else []
    if margin is not None and size < margin:
        counts.append(variance.count_equivalence_documents(margin - size, family))
    return max(min(counts), row.n + 1) if counts else None


def _note_unmatched(
    task: str,
    pairs: PairedTask,
    names: tuple[str, str],
    notes: list[str],
    unmatched: dict[str, Sequence[int]],
) -> None:
    """Add a note about the documents that only one of two models answered."""
    for (name, other), docs in zip((names, names[::-1]), pairs.unmatched, strict=True):
        if docs:
            numbers = ", ".join(map(str, docs[:MAX_NAMED])) + (", …" if docs[MAX_NAMED:] else "")
            count = count_text(len(docs), "document")
            notes.append(f"{task}: {count} of {name} left out, absent in {other}: {numbers}")
            unmatched[f"{task}: {name}, not {other}"] = docs


def _note_left_out(
    first: ModelAnswers,
    other: ModelAnswers,
    benchmarks: Mapping[str, TaskGroup],
    notes: list[str],
) -> None:
    """Add notes about tasks and metrics that cannot be compared."""
    for model, counterpart in ((first, other), (other, first)):
        missing = [task for task in model.tasks if task not in counterpart.tasks]
        if missing:
            notes.append(f"only {model.name} has {', '.join(missing)}")
        for task, answers in model.tasks.items():
            for metric, reason in answers.left_out.items():
                notes.append(f"{task}: {metric} of {model.name} is left out: {reason}")


def _refuse_absent(
    metrics: Collection[str], differences: Sequence[Difference], models: Sequence[ModelAnswers]
) -> None:
    """Raise RequestError if a metric is absent, or if no metric is common."""
    logged = dict.fromkeys(
        name for model in models for task in model.tasks.values() for name in task.metrics
    )
    known = f"logged are {', '.join(logged) or 'none'}"
    for metric in metrics:
        if metric not in {row.metric for row in differences}:
            near = did_you_mean(metric, logged)
            raise RequestError(
                f"--metric: the models have no metric {metric!r} in common; {known}{near}"
            )
    if not differences:
        raise RequestError(f"the models have no metric in common; {known}")
