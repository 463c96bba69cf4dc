"""What the study `joint` computes of one cell: the interactions of its pairs of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tracker.core.changes import Ablation
from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import WRITTEN, measure_of, with_interval
from tracker.ledger.aligned import Strata
from tracker.ledger.paired import PairedOutcomes
from tracker.stats.accuracy import mean_interval
from tracker.stats.arrays import Array
from tracker.stats.interaction import additivity, interactions
from tracker.stats.resampling import RESAMPLES, SEED, resampled_means
from tracker.stats.support import pairs as pairs_among
from tracker.stats.support import ranks, together
from tracker.studies.base import SIGNIFICANT, Subject, side

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
        q: `[pairs]`, its p-value after Benjamini and Hochberg; NaN at the floor, and before
            `adjusted`.
        floor: `[pairs]`, whether there is too little to lose for a sum.
        mean: The mean interaction over pairs that are not at the floor.
        by_distance: Layers apart → the same for these pairs.
        rank: Spearman's coefficient of sums and joint drops, over these pairs.
        explained: R² of the sums as predictions.
        documents: How many documents all of it rests on.
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
    by_distance: Mapping[int, Estimate]
    rank: Estimate
    explained: Estimate
    documents: int

    @property
    def open(self) -> list[int]:
        """The pairs that are not at the floor, by their places."""
        return [place for place, at in enumerate(self.floor) if not at]

    @cached_property
    def at_once(self) -> dict[int, Estimate]:
        """Place → its interaction, with an interval that holds for all pairs off the floor."""
        return dict(zip(self.open, self._wide(len(self.open)), strict=True))

    @cached_property
    def ranks(self) -> dict[int, tuple[int, int]]:
        """Place → between which ranks its interaction lies, all at once; 1 for the largest."""
        wide = self._wide(pairs_among(len(self.open)))
        return dict(zip(self.open, ranks(wide), strict=True))

    def _wide(self, family: int) -> list[Estimate]:
        """The interactions off the floor, with intervals that hold for so many statements.

        They are widened as those of Student's distribution; of outcomes that are right or wrong
        they have the normal one, and are a little too wide then.
        """
        found = [replace(self.found[place], p_value=None) for place in self.open]
        return together(found, [self.documents] * len(found), family)

    def strongest(self, sign: int) -> int | None:
        """The place of the pair that is shown to interact most, by sign; None where it is open."""
        at_the_end = (1, 1) if sign > 0 else (len(self.open), len(self.open))
        for place, between in self.ranks.items():
            if between == at_the_end and sign * side(self.at_once[place]) > 0:
                return place
        return None

    def write(self, drop: Estimate | float) -> str:
        """Write a drop with its unit, and its interval where it has one."""
        form = WRITTEN[self.unit]
        unit = f" {form.name}" if form.name else ""
        return with_interval(Estimate(drop) if isinstance(drop, float) else drop, form.write, unit)

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
    wanted = list(combinations([run.layer for run in subject.view.runs], 2))
    outcomes = subject.outcomes(besides=[Ablation.of(removed=pair) for pair in wanted])
    layers = [run.layer for run in outcomes.runs]
    pairs = [pair for pair in combinations(layers, 2) if outcomes.has(Ablation.of(removed=pair))]
    if not pairs or len(outcomes.tasks) < 2:
        return [], [f"{len(pairs)} pairs on {len(outcomes.tasks)} documents are measured"]
    why = []
    if len(pairs) < len(wanted):
        why.append(f"{len(wanted) - len(pairs)} of {len(wanted)} pairs are not measured")
    layers = sorted({layer for pair in pairs for layer in pair})
    ablations = [
        Ablation.of(removed=layers) for layers in [*((layer,) for layer in layers), *pairs]
    ]
    room = None
    if record.baseline_accuracy is not None and record.chance_accuracy is not None:
        room = record.baseline_accuracy - record.chance_accuracy
    own = measure_of(record)
    found = []
    for measure, unit, paired, most in (
        (own.change, own.form, outcomes.by_metric(ablations), room),
        ("gold log-prob drop", "nats", outcomes.by_gold_logprob(ablations), None),
    ):
        if bad := int((~np.isfinite(paired.drops).all(axis=1)).sum()):
            why.append(f"{measure}: {bad} of {len(paired.drops)} documents have no finite score")
        elif most is not None and most <= 0:
            why.append(
                f"{measure}: the baseline is at or below chance, so there is nothing to lose; "
                "the gold log-prob drop has no floor"
            )
        else:
            found.append(pairs_of(measure, unit, paired, layers, pairs, outcomes.strata, most))
    return found, why


def pairs_of(
    measure: str,
    unit: Unit,
    paired: PairedOutcomes,
    layers: Sequence[int],
    pairs: Sequence[Pair],
    strata: Strata | None,
    room: float | None,
) -> Pairs:
    """Compare joint drops with sums; `adjusted` tests them.

    `paired` has the layers' ablations, then those of the pairs; `room` is what can be lost at most,
    None where that is not bounded.
    """
    drops, weights = paired.drops, paired.weights
    first, second = (np.array([layers.index(pair[end]) for pair in pairs]) for end in (0, 1))

    def sums(figures: Array) -> Array:
        return figures[..., first] + figures[..., second]

    single, both = drops[:, : len(layers)], drops[:, len(layers) :]
    values = both - single[:, first] - single[:, second]
    found = interactions(values, weights, SEED)
    alone, together = weights @ single, weights @ both
    most = np.max([alone[first], alone[second], sums(alone)], axis=0)
    # A sum of fractions may pass what there is to lose by rounding alone.
    floor = np.zeros(len(pairs), bool) if room is None else most > room + 1e-9
    (open_,) = np.nonzero(~floor)
    drawn = resampled_means(drops, RESAMPLES, SEED, strata, weights)
    drawn_sums, drawn_both = sums(drawn)[:, open_], drawn[:, len(layers) + open_]
    rank, explained = additivity(sums(alone)[open_], together[open_], (drawn_sums, drawn_both))

    def mean_over(chosen: NDArray[np.int64]) -> Estimate:
        if not len(chosen):
            return Estimate(None, reason="all such pairs are at the floor")
        per_document = values[:, chosen].mean(axis=1)
        return Estimate(float(weights @ per_document), *mean_interval(per_document, weights))

    apart = np.array([j - i for i, j in pairs])
    return Pairs(
        measure,
        unit,
        tuple(pairs),
        dict(zip(layers, alone.tolist(), strict=True)),
        together,
        found,
        np.full(len(pairs), np.nan),
        floor,
        mean_over(open_),
        {d: mean_over(open_[apart[open_] == d]) for d in sorted(set(apart.tolist()))},
        rank,
        explained,
        len(drops),
    )


def adjusted(every: Sequence[Pairs]) -> list[Pairs]:
    """Adjust the p-values of all pairs of a study that are off the floor (Benjamini-Hochberg)."""
    p_values = [one.found[place].p_value for one in every for place in one.open]
    q = iter(stats.false_discovery_control(p_values) if p_values else [])
    return [
        replace(one, q=np.array([np.nan if at else next(q) for at in one.floor])) for one in every
    ]
