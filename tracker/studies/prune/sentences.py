"""What the study `prune` says of one model."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from tracker.core.estimates import Estimate
from tracker.core.formats import (
    level_text,
    listed,
    p_value,
    points,
    three_digits,
    two_digits,
    with_interval,
)
from tracker.search.figures import calibration_documents
from tracker.search.report import unsure_sentence
from tracker.studies.prune.figures import ACCURACY, COSINES, OWN, Beside, Compared, Way
from tracker.studies.prune.layout import (
    HOURS_OF_THE_PAPER,
    OF_THE_PAPER,
    PAPER,
    SHARE_OF_THE_PAPER,
    how_many,
)

_MANY = 1000
"""So many times as many test documents nobody has."""


def answers_of(group: Compared) -> Iterator[str]:
    """Say which strategy is best, whether accuracy beats cosine, and what it cost."""
    shares = {amount: group.removed(amount)[-1] / group.layers for amount in group.amounts}
    nearest = min(shares, key=lambda amount: abs(shares[amount] - SHARE_OF_THE_PAPER))
    for amount in group.amounts:
        yield _best(group, amount)
        paired = _against_cosine(group, amount) if group.counted else []
        for pair in paired:
            chosen_by = pair.one.calibration
            on = "" if chosen_by == OWN else f", calibrated on {chosen_by}"
            paper = f" {_against_paper(pair)}" if amount == nearest else ""
            yield f"With {amount} removed{on}, {_verdict(pair, group.growth)}.{paper}"
        # Where the calibration documents were too few to choose by accuracy.
        if searches := group.searches(Way(ACCURACY, amount)):
            for sentence in unsure_sentence(searches, "what accuracy chose", " a benchmark"):
                yield f"With {amount} removed, {sentence}"
    yield from _cost(group)


def _against_cosine(group: Compared, amount: str) -> list[Beside]:
    """List what accuracy is held against: cosine, then the same by other documents."""
    beside = group.beside(amount)
    own = [pair for name in COSINES for pair in beside if pair.other.strategy == name][:1]
    return own + [pair for pair in group.calibrated(amount) if pair.one.calibration != OWN]


def _level(level: Estimate) -> str:
    return level_text(level, "%")


def _best(group: Compared, amount: str) -> str:
    """Say which strategy leaves the most, where that is shown in comparison with all others."""
    sentence = f"{group.title}, {how_many(group, amount)}"
    places = group.places(amount)
    levels = {name: group.level_mean(Way(name, amount)) for name in places}
    if not places:
        every = (group.level_mean(Way(name, amount)) for name in group.strategies(amount))
        why = next((level.reason for level in every if level.reason), "all draw at random")
        return f"{sentence}: no strategy can be judged ({why})."
    first = [name for name, (best, _) in places.items() if best == 1]
    values = [level.value or 0.0 for level in levels.values()]
    unpruned = f"unpruned {_level(group.level_mean(None))}"
    if len(places) == 1:
        what = f"{first[0]} leaves a test accuracy of {_level(levels[first[0]])}"
    elif len(first) == 1:
        what = (
            f"{first[0]} leaves the most of {len(places)} strategies, a test accuracy of "
            f"{_level(levels[first[0]])}"
        )
    else:
        which = "each of them" if len(first) == len(places) else listed(first, "or")
        what = (
            f"which of {len(places)} strategies leaves the most is open, it may be {which}; they "
            f"leave test accuracies of {points(min(values))} to {points(max(values))} %"
        )
    sentence += f", {group.over}: {what}; {unpruned}."
    beside = group.beside(amount)
    if not beside:
        return sentence
    won, lost = (
        ", ".join(pair.other.strategy for pair in beside if pair.sign == sign) for sign in (1, -1)
    )
    sentence += f" Accuracy is significantly better than {won or 'no other'}"
    return sentence + (f", and significantly worse than {lost}." if lost else ".")


def _verdict(pair: Beside, growth: float) -> str:
    """Write which of two ways answers more: `accuracy beats cosine by 3.1 pp (1.0 to 5.2)`."""
    one, other, found = pair.one.strategy, pair.other.strategy, pair.found
    if found.value is None:
        return f"{one} and {other} cannot be compared ({found.reason})"
    p = f"; p = {p_value(pair.p)} after Holm" if pair.p is not None else ""
    if pair.sign < 0:
        one, other, found = other, one, -found
    by = with_interval(found, points, " pp")
    if pair.sign == 0:
        times = pair.settled_by or 0.0
        more = f"; about {three_digits(times)} times as many test documents would tell"
        more += ", more than there are" if times > growth else ""
        more = more if 1 < times < _MANY else ""
        return f"{one} and {other} are not told apart, their difference is {by}{p}{more}"
    return f"{one} beats {other} by {by}{p}"


def _against_paper(pair: Beside) -> str:
    """Say whether a difference has the sign of the paper's."""
    ours, cosine = OF_THE_PAPER[pair.one.calibration]
    theirs = f"{two_digits(100 * ours)} against {two_digits(100 * cosine)} % ({PAPER})"
    if pair.sign == 0:
        return f"The paper has {theirs}; these documents neither agree nor contradict."
    agrees = (pair.sign > 0) == (ours > cosine)
    return f"This {'agrees with' if agrees else 'contradicts'} the paper: {theirs}."


def _cost(group: Compared) -> Iterator[str]:
    """Say what choosing by accuracy took."""
    took = []
    for amount in group.amounts:
        if searches := group.searches(Way(ACCURACY, amount)):
            costs = [search.cost for search in searches]
            took.append(
                f"{statistics.fmean(cost.seconds for cost in costs):,.0f} s for {amount} "
                f"({statistics.fmean(cost.evaluations for cost in costs):,.0f} evaluations "
                f"for the price of {statistics.fmean(cost.passes for cost in costs):,.0f} passes "
                f"through {calibration_documents(searches):,.0f} documents)"
            )
    if took:
        yield (
            f"A search by accuracy took {', '.join(took)}; the paper's took about "
            f"{HOURS_OF_THE_PAPER} h, of another model on another machine."
        )
