"""What the study `joint` computes of one cell: the interactions of its pairs of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tracker.core.ablations import Ablation
from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import fixed, points, with_interval
from tracker.ledger.aligned import AlignedOutcomes, Strata
from tracker.ledger.paired import Array
from tracker.stats.accuracy import mean_interval
from tracker.stats.interaction import additivity, interactions
from tracker.stats.resampling import RESAMPLES, SEED, resampled_means
from tracker.studies.base import SIGNIFICANT, Subject

Pair = tuple[int, int]


@dataclass(frozen=True)
class Pairs:
    """The interactions of all pairs of one cell, by one measure.

    Attributes:
        measure: What is lost.
        unit: How it is written.
        pairs: The pairs that are measured, first < second.
        alone: `[layers]`, what each layer costs, by its number.
        together: `[pairs]`, what both cost.
        found: Each pair's interaction.
        q: `[pairs]`, its p-value after Benjamini and Hochberg; NaN at the floor.
        floor: `[pairs]`, whether there is too little to lose for a sum.
        mean: The mean interaction over pairs that are not at the floor.
        by_distance: Layers apart → the same for these pairs, and how many these are.
        rank: Spearman's coefficient of sums and joint drops, over these pairs.
        explained: R² of the sums as predictions.
    """

    measure: str
    unit: Unit
    pairs: tuple[Pair, ...]
    alone: Mapping[int, float]
    together: Array
    found: Sequence[Estimate]
    q: Array
    floor: NDArray[np.bool_]
    mean: Estimate
    by_distance: Mapping[int, tuple[Estimate, int]]
    rank: Estimate
    explained: Estimate

    def write(self, value: float) -> str:
        """Write a drop without its unit."""
        return points(value) if self.unit == "points" else fixed(value, 3)

    def said(self, found: Estimate | float) -> str:
        """Write a drop with its unit, and its interval where it has one."""
        unit = {"points": " pp", "nats": " nats"}.get(self.unit, "")
        return with_interval(
            Estimate(found) if isinstance(found, float) else found, self.write, unit
        )

    def significant(self, sign: int) -> list[int]:
        """Which interactions of a sign are significant, by their places."""
        with np.errstate(invalid="ignore"):
            (few,) = np.nonzero(self.q <= SIGNIFICANT)
        return [n for n in map(int, few) if sign * (self.value(n) or 0) > 0]

    def value(self, place: int) -> float | None:
        """The interaction of a pair; None where it is undefined or at the floor."""
        return None if self.floor[place] else self.found[place].value


def measured(subject: Subject) -> tuple[list[Pairs], list[str]]:
    """Derive the interactions of a cell by every measure, and say what is lacking."""
    record = subject.record
    view = subject.store.views.of(subject.request)
    layers = [run.layer for run in view.runs]
    wanted = list(combinations(layers, 2))
    outcomes = AlignedOutcomes(subject.store, view, besides=[Ablation(pair) for pair in wanted])
    pairs = [
        pair
        for pair in combinations([run.layer for run in outcomes.runs], 2)
        if outcomes.has(Ablation(pair))
    ]
    if not pairs or len(outcomes.tasks) < 2:
        return [], [f"{len(pairs)} pairs on {len(outcomes.tasks)} documents are measured"]
    why = []
    if len(pairs) < len(wanted):
        why.append(f"{len(wanted) - len(pairs)} of {len(wanted)} pairs are not measured")
    layers = sorted({layer for pair in pairs for layer in pair})
    shown = [Ablation((layer,)) for layer in layers] + [Ablation(pair) for pair in pairs]
    left = None
    if record.baseline_accuracy is not None and record.chance_accuracy is not None:
        left = record.baseline_accuracy - record.chance_accuracy
    name = "accuracy drop" if record.higher_is_better else "loss increase"
    found = []
    unit: Unit
    own: Unit = "points" if record.higher_is_better else "score"
    for measure, unit, paired, room in (
        (name, own, outcomes.by_metric(shown), left),
        ("gold_logprob_drop", "nats", outcomes.by_gold_logprob(shown), None),
    ):
        drops = paired.drops
        if bad := int((~np.isfinite(drops).all(axis=1)).sum()):
            why.append(f"{measure}: {bad} of {len(drops)} documents have no finite score")
        elif room is not None and room <= 0:
            why.append(
                f"{measure}: the baseline is at or below chance, so there is nothing to lose; "
                "gold_logprob_drop has no floor"
            )
        else:
            found.append(
                pairs_of(
                    (measure, unit), drops, (layers, pairs), paired.weights, outcomes.strata, room
                )
            )
    return found, why


def pairs_of(
    measure: tuple[str, Unit],
    drops: Array,
    what: tuple[Sequence[int], Sequence[Pair]],
    weights: Array,
    strata: Strata | None,
    room: float | None,
) -> Pairs:
    """Compare joint drops with sums.

    `drops` is `[documents, layers and pairs]`, `what` these layers and pairs, and `room` what can
    be lost at most; None where that is not bounded.
    """
    layers, pairs = what
    first, second = (np.array([layers.index(pair[end]) for pair in pairs]) for end in (0, 1))
    single, both = drops[:, : len(layers)], drops[:, len(layers) :]
    values = both - single[:, first] - single[:, second]
    found = interactions(values, weights, SEED)
    alone, together = weights @ single, weights @ both
    most = np.max([alone[first], alone[second], alone[first] + alone[second]], axis=0)
    # A sum of fractions may pass what there is to lose by rounding alone.
    floor = np.zeros(len(pairs), bool) if room is None else most > room + 1e-9
    (open_,) = np.nonzero(~floor)
    q = np.full(len(pairs), np.nan)
    if len(open_):
        q[open_] = stats.false_discovery_control([found[n].p_value for n in open_])
    apart = np.array([j - i for i, j in pairs])
    drawn = resampled_means(drops, RESAMPLES, SEED, strata, weights)
    alone_drawn, both_drawn = drawn[:, : len(layers)], drawn[:, len(layers) :]
    rank, explained = additivity(
        (alone[first] + alone[second])[open_],
        together[open_],
        ((alone_drawn[:, first] + alone_drawn[:, second])[:, open_], both_drawn[:, open_]),
    )

    def mean_over(chosen: NDArray[np.int64]) -> Estimate:
        if not len(chosen):
            return Estimate(None, reason="all such pairs are at the floor")
        per_document = values[:, chosen].mean(axis=1)
        return Estimate(float(weights @ per_document), *mean_interval(per_document, weights))

    distances = sorted(set(apart.tolist()))
    by_distance = {d: open_[apart[open_] == d] for d in distances}
    return Pairs(
        *measure,
        tuple(pairs),
        dict(zip(layers, alone.tolist(), strict=True)),
        together,
        found,
        q,
        floor,
        mean_over(open_),
        {d: (mean_over(chosen), len(chosen)) for d, chosen in by_distance.items()},
        rank,
        explained,
    )
