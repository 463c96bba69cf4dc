"""Derive metrics from several sampled texts of a document, and from their beginnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from lm_eval.api.registry import get_filter

from tracker.benchmarks.base import MetricValue
from tracker.schema.errors import BenchmarkError
from tracker.schema.identities import CUT_OFF, TaskIdentity, filter_name
from tracker.stats.accuracy import expected_best, majority_value

NOISE = "gumbel-1"
"""Version of the random numbers of sampled texts; part of a cell's key."""


class JudgedText(NamedTuple):
    """The metrics of one generated text, and the answer that each filter extracts from it."""

    metrics: Mapping[str, MetricValue]
    answers: Mapping[str, Any]


@dataclass(frozen=True)
class TextMetrics:
    """Rules that derive further metrics from the metrics of a generation task.

    Attributes:
        samples: Number of texts per document.
        budgets: Additional token limits, smaller than the task's own limit. The task also judges
            the beginning of each text, once for each limit.
        joint: Names of the filters that use all samples at once, such as a majority vote.
    """

    samples: int = 1
    budgets: tuple[int, ...] = ()
    joint: frozenset[str] = frozenset()

    @property
    def _draws(self) -> list[int]:
        """The values of k for which pass@k is computed.

        The powers of two up to the number of samples, and the number of samples.
        """
        powers = (2**n for n in range(1, self.samples.bit_length()))
        return sorted({*powers, self.samples} - {1})

    def extend_task(self, task: TaskIdentity) -> TaskIdentity:
        """Add the derived metrics to the metrics of a task.

        Raises BenchmarkError if `samples` or `budgets` is set, but no metric of the task is a mean
        over documents.
        """
        means = [name for name, kind in task.metrics.items() if kind == "mean"]
        kinds = dict.fromkeys(means, "mean") if self.samples > 1 else task.metrics
        key = "samples" if self.samples > 1 else "budgets" if self.budgets else ""
        if key and not means:
            raise BenchmarkError(
                f"{key}: {task.name} has only metrics that are computed over all documents at once "
                f"({', '.join(task.metrics)}); leave {key} out"
            )
        variants = {variant: name for name in means for variant in self._variants(name)}
        directions = {name: task.higher_is_better.get(name, True) for name in kinds}
        directions |= {variant: directions[name] for variant, name in variants.items()}
        update = {
            "metrics": kinds | dict.fromkeys((*variants, CUT_OFF), "mean"),
            "higher_is_better": {**directions, CUT_OFF: False},
        }
        return task.model_copy(update=update)

    def _variants(self, metric: str) -> list[str]:
        """Return the names of a metric's derived metrics, such as pass@k and majority vote."""
        suffixes = [f"@{budget}tok" for budget in self.budgets]
        if self.samples > 1 and filter_name(metric) not in self.joint:
            passes = [f"_pass@{draws}" for draws in self._draws]
            suffixes = [*passes, f"_majority@{self.samples}", *suffixes]
        return [_variant(metric, suffix) for suffix in suffixes]

    def combine(
        self, texts: Sequence[JudgedText], task: TaskIdentity, budget: int | None = None
    ) -> dict[str, MetricValue]:
        """Compute the metrics of a document's sampled texts.

        `budget` is the token limit to which the texts were shortened; None for whole texts.
        """
        suffix = "" if budget is None else f"@{budget}tok"
        if self.samples == 1 and not suffix:
            return dict(texts[0].metrics)
        values: dict[str, MetricValue] = {}
        means = [name for name, kind in task.metrics.items() if kind == "mean"]
        for name in filter(texts[0].metrics.__contains__, means):
            scores = [float(text.metrics[name]) for text in texts]
            values[_variant(name, suffix)] = fmean(scores)
            if suffix or filter_name(name) in self.joint:
                continue
            sign = 1 if task.higher_is_better.get(name, True) else -1
            for draws in self._draws:
                best = expected_best([sign * score for score in scores], draws)
                values[_variant(name, f"_pass@{draws}")] = sign * best
            answers = [repr(text.answers[filter_name(name)]) for text in texts]
            values[_variant(name, f"_majority@{self.samples}")] = majority_value(answers, scores)
        return values


def _variant(metric: str, suffix: str) -> str:
    """Append a suffix to a metric's name, before the name of its filter."""
    name, comma, filter_name = metric.partition(",")
    return f"{name}{suffix}{comma}{filter_name}"


def count_joint_samples(ensemble: Any) -> int:
    """Count how many sampled texts of a document the filters in `ensemble` read together.

    Returns 0 if the filters process each text separately.
    """
    joint = {get_filter("majority_vote"): 1, get_filter("take_first_k"): 0}
    counts = [0]
    for component in ensemble.filters:
        kind, settings = getattr(component, "func", component), getattr(component, "keywords", {})
        if kind in joint:
            counts.append(max(joint[kind], int(settings.get("k", 0))))
    return max(counts)
