"""What a metric makes of the options of documents, and which judgements of them hang on rounding.

An option's score is its log-likelihood, or what the metric divides that to; the largest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from tracker.analysis.aligned import AlignedOutcomes
from tracker.core.changes import Ablation
from tracker.ledger.outcomes import AGAIN
from tracker.ledger.texts import KeptText
from tracker.stats.arrays import Array
from tracker.stats.decisions import choices, movement, turning

Texts = Callable[[], Mapping[tuple[str, int], KeptText]]
"""Reads what a cell's documents say."""
_LENGTHS: dict[str, Callable[[str], int]] = {
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}
"""By what lm-eval divides an option's log-likelihood, by metric."""


class OptionScores:
    """The options of documents, as a metric sees them.

    Args:
        rows: The documents, under any ablation.
        metric: The metric.
        texts: What they say; read where the metric divides by the lengths of options.

    Attributes:
        counts: How many options each document has.
        most: How many there are at most; 0 for open answers.
        gold: The number of each document's gold option; NaN where there is none.
        lengths: By what each log-likelihood is divided [documents, options]; NaN where unknown.
        why: Why one of them is not known; empty where all are.
    """

    def __init__(self, rows: pd.DataFrame, metric: str, texts: Texts) -> None:
        name = metric.partition(",")[0]
        self.counts = rows["choices"].to_numpy(dtype=int)
        self.most = int(self.counts.max())
        gold = rows["gold"].to_numpy(dtype=np.float64)
        self.gold = np.where(gold < self.counts, gold, np.nan)  # also where there are no options
        self.lengths, self.why = np.ones((len(rows), self.most)), ""
        if name == "acc_mutual_info":
            self.lengths[:] = np.nan
            self.why = f"{metric} compares more than the options"
        if name in _LENGTHS:
            self.lengths[:] = np.nan
            known = texts()
            places = zip(rows["task"], rows["doc"], strict=True)
            for row, (task, doc) in enumerate(places):
                said = known[task, doc].text.choices if (task, doc) in known else ()
                if len(said) == self.counts[row]:
                    self.lengths[row, : len(said)] = [_LENGTHS[name](choice) for choice in said]
            if lacking := int(np.isnan(self.lengths[:, :1]).sum()):
                self.why = (
                    f"{metric} divides by the lengths of options, which are not known of {lacking} "
                    "documents"
                )

    def scores(self, loglikelihoods: Iterable[Sequence[float]]) -> Array:
        """Set the scores of the options side by side, NaN where a document has fewer."""
        found = np.full(self.lengths.shape, np.nan)
        counted = zip(loglikelihoods, self.counts, strict=True)
        values = np.concatenate([[], *(row[:count] for row, count in counted)])
        found[np.arange(found.shape[1]) < self.counts[:, None]] = values
        return found / self.lengths


class Chances(NamedTuple):
    """How likely rounding judges each document otherwise; None with a reason where not known.

    In single precision there is neither: rounding decides next to nothing, and it is not measured.
    """

    chances: Array | None
    reason: str = ""


def judged(outcomes: AlignedOutcomes, ablation: Ablation, texts: Texts) -> Chances:
    """Hold the margins of an ablation's documents against how far rounding moves them.

    Args:
        outcomes: The documents.
        ablation: The ablation.
        texts: What they say; read where the metric divides by that.

    Returns:
        The chances, in the documents' order.
    """
    if not outcomes.identity.model.is_half:
        return Chances(None)
    rows = outcomes.of(ablation)
    if AGAIN not in rows or rows[AGAIN].isna().all():
        return Chances(None, "none of these documents was computed twice")
    options = OptionScores(rows, outcomes.metric, texts)
    if not options.most:
        return Chances(None, "there are no options that a margin could lie between")
    if options.why:
        return Chances(None, options.why)
    scores = options.scores(rows["loglikelihoods"])
    if not np.array_equal(choices(scores) == options.gold, outcomes.values(ablation)):
        why = f"{outcomes.metric} is not whether the best option is the gold one"
        return Chances(None, why)
    twice = rows[AGAIN].notna().to_numpy()
    again = options.scores(rows[AGAIN].where(twice, rows["loglikelihoods"]))
    moved = movement(scores[twice], again[twice])
    if moved is None:
        return Chances(None, "what was computed twice came out the same, to the last bit")
    return Chances(turning(scores, options.gold, moved))
