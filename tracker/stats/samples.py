"""Compute figures of several sampled answers to one document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from math import comb


def expected_best(values: Sequence[float], draws: int) -> float:
    """Compute the expected maximum of some of the values, drawn without replacement.

    For values 0 and 1, this is the unbiased estimator of pass@k: the probability that at least one
    of `draws` sampled answers is right.

    Args:
        values: Value of each sampled answer.
        draws: Number of values that are drawn, at most all.

    Returns:
        The expected maximum.

    References:
        M. Chen et al., Evaluating Large Language Models Trained on Code (2021), equation 1.

    Examples:
        Two of four answers are right. One of the six pairs has no right answer.

        >>> expected_best([0, 1, 0, 1], 2)
        0.8333333333333334
    """
    # The n-th smallest value is the maximum if all other draws are among the n smaller values.
    sums = (comb(n, draws - 1) * value for n, value in enumerate(sorted(values)))
    return sum(sums) / comb(len(values), draws)


def majority_value(answers: Sequence[Hashable], values: Sequence[float]) -> float:
    """Return the value of the most frequent answer; the mean over answers that tie.

    Args:
        answers: The sampled answers.
        values: Value of each answer.

    Returns:
        The value.

    Examples:
        >>> majority_value(["7", "8", "7"], [1, 0, 1])
        1.0
        >>> majority_value(["7", "8"], [1, 0])
        0.5
    """
    by_answer = defaultdict[Hashable, list[float]](list)
    for answer, value in zip(answers, values, strict=True):
        by_answer[answer].append(value)
    most = max(map(len, by_answer.values()))
    tied = [sum(group) / most for group in by_answer.values() if len(group) == most]
    return sum(tied) / len(tied)
