"""Compare results of searches: levels, differences, and how sure choices are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tracker.analysis.paired import PairedOutcomes
from tracker.core.config import CellRequest
from tracker.core.estimates import Estimate
from tracker.core.prune_records import PruneRecord, PruneStep, Tested
from tracker.stats.accuracy import accuracy, accuracy_drop
from tracker.stats.arrays import Array

if TYPE_CHECKING:  # it knows the strategies, and they need torch
    from tracker.search.request import SearchRequest


def tested(step: PruneStep) -> Tested:
    """Return the test documents' outcome of a step."""
    assert step.test is not None  # a search is kept once its steps are tested
    return step.test


def end(record: PruneRecord) -> Tested:
    """Return the test documents' outcome of all that a search removed."""
    return tested(record.steps[-1])


@dataclass(frozen=True)
class Searched:
    """Result of one draw of a search, and the test documents' outcomes.

    Attributes:
        asked: The search.
        record: What it found.
        answered: What the test documents come to after each step, more being better.
        request: The request of the last step that is a run; None where none is.
    """

    asked: SearchRequest
    record: PruneRecord
    answered: PairedOutcomes
    request: CellRequest | None


@dataclass(frozen=True)
class Choices:
    """Results of one way of choosing for one benchmark, one a draw.

    Attributes:
        records: The searches; several where the strategy draws.
        answered: What the test documents come to after each step of each, more being better.
    """

    records: tuple[PruneRecord, ...]
    answered: tuple[PairedOutcomes, ...]

    @property
    def weights(self) -> Array:
        """The weights of the test documents."""
        return self.answered[0].weights

    @property
    def outcomes(self) -> Array:
        """The outcome of each test document in the end, averaged over draws."""
        found: Array = np.stack([one.ablated[:, -1] for one in self.answered]).mean(axis=0)
        return found

    @property
    def level(self) -> Estimate:
        """The test accuracy in the end."""
        return accuracy(self.outcomes, self.weights)

    def at(self, removed: int) -> Estimate:
        """Return the test accuracy with a number of layers gone; None where no step ends there."""
        found = []
        for record, one in zip(self.records, self.answered, strict=True):
            known = {0: one.baseline} | {
                len(step.removed): after
                for step, after in zip(record.steps, one.ablated.T, strict=True)
            }
            if removed not in known:
                return Estimate(None, reason="no step removes so many")
            found.append(known[removed])
        return accuracy(np.stack(found).mean(axis=0), self.weights)

    def above(self, other: Choices) -> Estimate:
        """Estimate how much more these answer than others, on the same documents."""
        return accuracy_drop(self.outcomes, other.outcomes, self.weights)


@dataclass(frozen=True)
class Separated:
    """Steps at which the calibration documents separate the choice from the runner-up, or not.

    Attributes:
        compared: How many steps had a runner-up.
        unsure: Those at which the 95 % interval of its margin reaches 0.
    """

    compared: int
    unsure: tuple[PruneStep, ...]

    @property
    def level(self) -> int:
        """The number of the unsure steps at which both score the same."""
        return sum(step.margin.value == 0 for step in self.unsure)

    @property
    def enough(self) -> int | None:
        """About how many documents would tell at half of the others; None where there are none."""
        needed = [step.separates for step in self.unsure if step.separates is not None]
        return statistics.median_high(needed) if needed else None


def separated(searches: Sequence[PruneRecord]) -> Separated:
    """Count the steps of some searches at which their documents are too few to choose."""
    compared = [s for one in searches for s in one.steps if s.margin.value is not None]
    unsure = [s for s in compared if s.margin.low is None or s.margin.low <= 0]
    return Separated(len(compared), tuple(unsure))


def calibration_documents(searches: Sequence[PruneRecord]) -> float:
    """Return the mean number of calibration documents of searches."""
    return statistics.fmean(sum(each.n for each in one.calibration) for one in searches)
