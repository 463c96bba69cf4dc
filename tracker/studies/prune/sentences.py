"""What the study `prune` says of one model."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from tracker.core.estimates import Estimate
from tracker.core.formats import p_value, points, two_digits, with_interval
from tracker.pruning.search.figures import calibration_documents
from tracker.pruning.search.report import unsure_sentence
from tracker.stats.rank_agreement import rounded
from tracker.studies.base import SIGNIFICANT
from tracker.studies.prune.figures import ACCURACY, COSINES, OWN, Beside, Compared, Way
from tracker.studies.prune.tables import (
    HOURS_OF_THE_PAPER,
    OF_THE_PAPER,
    PAPER,
    SHARE_OF_THE_PAPER,
    how_many,
)


def answers_of(group: Compared) -> Iterator[str]:
    """Say which strategy is best, whether accuracy beats cosine, and what it cost."""
    nearest = min(group.amounts, key=lambda each: abs(group.share(each) - SHARE_OF_THE_PAPER))
    for amount in group.amounts:
        yield _best(group, amount)
        paired = _against_cosine(group, amount) if group.counted else []
        for each, on in paired:
            paper = f" {_against_paper(each)}" if amount == nearest else ""
            yield f"With {amount} removed{on}, {_verdict(each)}.{paper}"
        yield from _unsure(group, amount)
    yield from _cost(group)


def _against_cosine(group: Compared, amount: str) -> list[tuple[Beside, str]]:
    """List what accuracy is held against, with what is said of the calibration."""
    beside = group.beside(amount)
    own = [each for name in COSINES for each in beside if each.other.strategy == name][:1]
    others = [each for each in group.calibrated(amount) if each.one.calibration != OWN]
    return [
        *((each, "") for each in own),
        *((each, f", calibrated on {each.one.calibration}") for each in others),
    ]


def _level(found: Estimate) -> str:
    return f"{with_interval(found, points, ' %')}"


def _best(group: Compared, amount: str) -> str:
    ranked = []
    for name in group.strategies(amount):
        level = group.level_mean(Way(name, amount))
        if level.value is not None:
            ranked.append((level.value, name, level))
    said = f"{group.title}, {how_many(group, amount)}"
    if not ranked:
        why = group.level_mean(Way(group.strategies(amount)[0], amount)).reason
        return f"{said}: no strategy can be judged ({why})."
    value, name, level = max(ranked, key=lambda each: each[0])
    level_too = [o for v, o, _ in ranked if rounded(v) == rounded(value) and o != name]
    ties = f", level with {', '.join(level_too)}" if level_too else ""
    said += (
        f", {group.over}: of {len(ranked)} strategies {name} leaves the most, a test accuracy of "
        f"{_level(level)}{ties}; unpruned {_level(group.unpruned_mean)}."
    )
    beside = group.beside(amount)
    if not beside:
        return said
    won, lost = (
        [one.other.strategy for one in beside if _is_significant(one) and _sign(one) == sign]
        for sign in (1, -1)
    )
    said += f" Accuracy is significantly better than {', '.join(won) or 'no other'}"
    return said + (f", and significantly worse than {', '.join(lost)}." if lost else ".")


def _sign(each: Beside) -> int:
    return 1 if (each.found.value or 0.0) > 0 else -1


def _is_significant(each: Beside) -> bool:
    return each.p is not None and each.p < SIGNIFICANT


def _verdict(each: Beside) -> str:
    """Say which of two ways answers more: `accuracy beats cosine by 3.1 pp (1.0 to 5.2)`."""
    one, other = each.one.strategy, each.other.strategy
    if each.found.value is None:
        return f"{one} and {other} cannot be compared ({each.found.reason})"
    by = with_interval(each.found, points, " pp")
    p = f"; p = {p_value(each.p)} after Holm" if each.p is not None else ""
    if not _is_significant(each):
        return f"{one} and {other} are not told apart, their difference is {by}{p}"
    if each.found.value > 0:
        return f"{one} beats {other} by {by}{p}"
    turned = Estimate(
        -each.found.value,
        None if each.found.high is None else -each.found.high,
        None if each.found.low is None else -each.found.low,
    )
    return f"{other} beats {one} by {with_interval(turned, points, ' pp')}{p}"


def _against_paper(each: Beside) -> str:
    """Say whether a difference has the sign of the paper's."""
    ours, cosine = OF_THE_PAPER[each.one.calibration]
    theirs = f"{two_digits(100 * ours)} against {two_digits(100 * cosine)} % ({PAPER})"
    if each.found.value is None or not _is_significant(each):
        return f"The paper has {theirs}; these documents neither agree nor contradict."
    agrees = (each.found.value > 0) == (ours > cosine)
    return f"This {'agrees with' if agrees else 'contradicts'} the paper: {theirs}."


def _unsure(group: Compared, amount: str) -> Iterator[str]:
    """Say where the calibration documents were too few to choose by accuracy."""
    searches = group.searches(Way(ACCURACY, amount))
    if searches:
        for sentence in unsure_sentence(searches, "what accuracy chose", " a benchmark"):
            yield f"With {amount} removed, {sentence}"


def _cost(group: Compared) -> Iterator[str]:
    """Say what choosing by accuracy took."""
    said = []
    for amount in group.amounts:
        searches = group.searches(Way(ACCURACY, amount))
        if searches:
            seconds = statistics.fmean(one.cost.seconds for one in searches)
            evaluations = statistics.fmean(one.cost.evaluations for one in searches)
            passes = statistics.fmean(one.cost.passes for one in searches)
            said.append(
                f"{seconds:,.0f} s for {amount} ({evaluations:,.0f} evaluations "
                f"for the price of {passes:,.0f} passes through "
                f"{calibration_documents(searches):,.0f} documents)"
            )
    if said:
        yield (
            f"A search by accuracy took {', '.join(said)}; the paper's took about "
            f"{HOURS_OF_THE_PAPER} h, of another model on another machine."
        )
