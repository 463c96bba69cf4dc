"""Loops that evaluate all documents once per ablation: what the engine is timed against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tracker.benchmarks.encoder import score_with_lm_eval
from tracker.core.changes import Ablation
from tracker.core.documents import Document
from tracker.core.grouping import grouped
from tracker.engine.scoring.sweep import DocumentScores
from tracker.measuring.progress import Progress

T = TypeVar("T")
Evaluation = tuple[float, list[tuple[float, bool]]]
"""Seconds, and the log-likelihood and greedy flag of every request, in order."""
MEASURED = 4
"""Number of ablations of each component that are evaluated; the others are taken to cost as much on
average."""


@dataclass(frozen=True)
class LoopTiming:
    """Seconds of a loop, and how far its answers are from the engine's.

    Attributes:
        settings: Settings of the loop that bear on its speed.
        seconds: Seconds of all ablations, extrapolated from `evaluations`.
        evaluations: Ablation → seconds of its evaluation.
        ratio: `seconds` divided by the engine's.
        largest_difference: Largest difference of a log-likelihood, in nats.
        greedy_disagreements: Number of requests whose greedy flags differ.
        requests_compared: Number of requests behind both.
    """

    settings: str
    seconds: float
    evaluations: dict[str, float]
    ratio: float
    largest_difference: float
    greedy_disagreements: int
    requests_compared: int

    def text(self, name: str) -> str:
        """Render it for the terminal."""
        evaluations = ", ".join(f"{k} {v:.1f} s" for k, v in self.evaluations.items())
        return (
            f"{name + ' loop':<14}{self.seconds:8.1f} s   (extrapolated, {self.settings}; "
            f"measured: {evaluations})\nratio         {self.ratio:8.1f}\n"
            f"agreement     largest log-likelihood difference {self.largest_difference:.1e} nats, "
            f"{self.greedy_disagreements} of {self.requests_compared} greedy flags differ"
        )


@dataclass(frozen=True)
class Loop:
    """Evaluations with one of lm-eval's models, without one ablation after another.

    Attributes:
        name: The name of the program.
        settings: Settings that bear on its speed.
        model_without: Function that returns lm-eval's model without what an ablation removes.
        evaluations: Ablation → its last evaluation.
    """

    name: str
    settings: str
    model_without: Callable[[Ablation], Any]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    def evaluate(self, ablation: Ablation, documents: Sequence[Document]) -> Evaluation:
        """Score documents without what an ablation removes."""
        model = self.model_without(ablation)
        self.evaluations[ablation.name] = timed(lambda: score_with_lm_eval(model, documents))
        return self.evaluations[ablation.name]

    def run(
        self, documents: Sequence[Document], ablations: Sequence[Ablation], progress: Progress
    ) -> None:
        """Evaluate the baseline and some ablations of each component."""
        for ablation in (ablations[0], *_measured(ablations)):
            progress.say(f"{self.name}: {ablation.name}")
            self.evaluate(ablation, documents)

    def timing(
        self, ablations: Sequence[Ablation], scores: Sequence[DocumentScores], engine_seconds: float
    ) -> LoopTiming:
        """Extrapolate to all ablations, and compare every answer with the engine's."""
        timings = {name: seconds for name, (seconds, _) in self.evaluations.items()}
        baseline, *removed = timings.values()
        # A model of one layer has nothing to remove.
        total = baseline + (len(ablations) - 1) * statistics.mean(removed or [0.0])
        numbers = {ablation.name: number for number, ablation in enumerate(ablations)}
        answers = [answer for _, answers in self.evaluations.values() for answer in answers]
        responses = [r for n in timings for score in scores for r in score.responses[numbers[n]]]
        pairs = list(zip(responses, answers, strict=True))
        return LoopTiming(
            settings=self.settings,
            seconds=total,
            evaluations=timings,
            ratio=total / engine_seconds,
            largest_difference=max(abs(ours.loglikelihood - theirs) for ours, (theirs, _) in pairs),
            greedy_disagreements=sum(ours.greedy != theirs for ours, (_, theirs) in pairs),
            requests_compared=len(pairs),
        )


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Measure the seconds that some work takes; return them, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _measured(ablations: Sequence[Ablation]) -> list[Ablation]:
    """Choose evenly spaced ablations of each component, the first and last among them."""
    chosen = []
    for group in grouped(ablations[1:], lambda ablation: ablation.name.partition(":")[0]).values():
        numbers = {round(i * (len(group) - 1) / (MEASURED - 1)) for i in range(MEASURED)}
        chosen += [group[number] for number in sorted(numbers)]
    return chosen
