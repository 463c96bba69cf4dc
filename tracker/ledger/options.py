"""What a metric makes of the options of documents: the scores of which the largest one is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tracker.ledger.paired import Array
from tracker.ledger.texts import KeptText

_LENGTHS: dict[str, Callable[[str], int]] = {
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}
"""By what lm-eval divides an option's log-likelihood, by metric."""
_OTHERWISE = ("acc_mutual_info",)


def needs_texts(metric: str) -> bool:
    """Say whether a metric looks at what the options say."""
    return metric.partition(",")[0] in _LENGTHS


def divisors(metric: str, counts: Array, texts: Sequence[KeptText | None]) -> tuple[Array, str]:
    """Say by what each option's log-likelihood is divided, NaN where unknown, and why it is.

    Args:
        metric: The metric.
        counts: How many options each document has.
        texts: What each says; None where it is not known. Read where `needs_texts`.

    Returns:
        The divisors [documents, options], and why one is not known; empty where all are.
    """
    name = metric.partition(",")[0]
    shape = (len(counts), int(counts.max()))
    if name in _OTHERWISE:
        return np.full(shape, np.nan), f"{metric} compares more than the options"
    length = _LENGTHS.get(name)
    if length is None:
        return np.ones(shape), ""
    found = np.full(shape, np.nan)
    for row, text in enumerate(texts):
        if text is not None and len(text.text.choices) == counts[row]:
            found[row, : counts[row]] = [length(choice) for choice in text.text.choices]
    lacking = int(np.isnan(found[:, :1]).sum())
    why = f"{metric} divides by the lengths of options, which are not known of {lacking} documents"
    return found, why if lacking else ""


def side_by_side(rows: Iterable[Sequence[float]], counts: Array) -> Array:
    """Set the log-likelihoods of the options side by side, NaN where a document has fewer."""
    found = np.full((len(counts), int(counts.max())), np.nan)
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        found[number, :count] = row[:count]
    return found
