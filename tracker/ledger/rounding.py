"""Which judgements of a view hang on rounding, by the documents that were computed twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from tracker.core.ablations import Ablation
from tracker.ledger.aligned import AlignedOutcomes
from tracker.ledger.options import divisors, needs_texts, side_by_side
from tracker.ledger.outcomes import AGAIN
from tracker.ledger.paired import Array
from tracker.ledger.texts import KeptText
from tracker.stats.decisions import choices
from tracker.stats.rounding import movement, turning

Texts = Callable[[], Mapping[tuple[str, int], KeptText]]
"""Reads what a cell's documents say."""


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
    counts = rows["choices"].to_numpy(dtype=int)
    if not counts.max():
        return Chances(None, "there are no options that a margin could lie between")
    places = zip(rows["task"], rows["doc"], strict=True)
    metric = outcomes.metric
    kept = texts() if needs_texts(metric) else {}
    lengths, why = divisors(metric, counts, [kept.get((str(t), int(d))) for t, d in places])
    if why:
        return Chances(None, why)
    scores = side_by_side(rows["loglikelihoods"], counts) / lengths
    gold = rows["gold"].to_numpy(dtype=np.float64)
    if not np.array_equal(choices(scores) == gold, outcomes.values(ablation)):
        return Chances(None, f"{metric} is not whether the best option is the gold one")
    twice = rows[AGAIN].notna().to_numpy()
    again = side_by_side(rows[AGAIN].where(twice, rows["loglikelihoods"]), counts) / lengths
    moved = movement(scores[twice], again[twice])
    if moved is None:
        return Chances(None, "what was computed twice came out the same, to the last bit")
    return Chances(turning(scores, gold, moved))
