"""Strategies that choose the parts to remove: each takes a search and yields its steps in order.

All of them minimise a loss. Among sets with equal losses, the one with the smaller loss by the
other measure comes first (for `accuracy` that is `gold_logprob`, and the reverse). Among sets still
equal, it is the one whose parts are later.

Some of them do not score every candidate on every document after each removal.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tracker.analysis.stopping import CandidateRace
from tracker.core.errors import CellError
from tracker.core.grouping import grouped
from tracker.core.proxies import PROXIES
from tracker.core.prune_records import PruneStep, Rescoring
from tracker.measuring.fill import CellWork, fill
from tracker.search.scores import NO_FINITE, Scores, Set, grown
from tracker.search.settings import Budget, out_of_reach
from tracker.stats.rank_agreement import rounded

BATCH = 6
"""Number of candidates that a lazy search scores in one engine call; at least one layer's parts."""


@dataclass(frozen=True)
class Search:
    """The input of a strategy.

    Attributes:
        scores: The scores on calibration documents.
        budget: The budget, which ends the search.
        seed: Seed of random draws.
        draw: Number of the draw.
        rescoring: How greedy searches by outcomes score candidates again.
    """

    scores: Scores
    budget: Budget
    seed: int = 0
    draw: int = 1
    rescoring: Rescoring = "full"

    def lots(self, strategy: str) -> random.Random:
        """Return a strategy's random generator, the same for the same seed and draw everywhere."""
        return random.Random(f"{strategy}/{self.seed}/{self.draw}")


Strategy = Callable[[Search], Iterator[PruneStep]]


def _stepwise(budget: Budget, choose: Callable[[Set], PruneStep]) -> Iterator[PruneStep]:
    """Yield steps until the budget is met, each chosen by the parts removed before it."""
    removed: Set = ()
    while not budget.enough(removed):
        step = choose(removed)
        yield step
        removed = step.removed


def by_outcomes(search: Search, by: str) -> Iterator[PruneStep]:
    """Remove the part that costs least with all removed before; score again after each removal."""
    ways = {"full": _fully, "lazy": _lazily, "race": _by_races}
    return _stepwise(search.budget, ways[search.rescoring](search, by))


def _fully(search: Search, by: str) -> Callable[[Set], PruneStep]:
    """Return a function that chooses a step by scoring all candidates."""

    def choose(removed: Set) -> PruneStep:
        sets = [grown(removed, part) for part in search.budget.left(removed)]
        return search.scores.losses(by, sets).step(removed)

    return choose


def _lazily(search: Search, by: str) -> Callable[[Set], PruneStep]:
    """Return a function that scores candidates again only while they can still win.

    It assumes that costs only grow: the cost of a part at its last scoring is taken as its minimum
    cost now. That holds if removals are redundant (together they cost more than the sum). Otherwise
    a part that became cheaper is overlooked.
    """
    scores, loss = search.scores, 0.0
    costs = dict.fromkeys(range(scores.parts.total), -np.inf)

    def choose(removed: Set) -> PruneStep:
        nonlocal loss
        fresh: list[Set] = []
        left = sorted(search.budget.left(removed), key=lambda part: (costs[part], -part))
        while left:
            # All of them at first, when no costs are known.
            size = max(BATCH, scores.parts.per_layer) if removed else len(left)
            batch, left = left[:size], left[size:]
            fresh += [grown(removed, part) for part in batch]
            losses = scores.losses(by, fresh)
            if left and float(losses.means.min()) < loss + costs[left[0]]:
                break
        step = losses.step(removed)
        for each, mean in zip(fresh, losses.means, strict=True):
            (part,) = set(each) - set(removed)
            costs[part] = float(mean) - loss
        loss = float(step.score or 0.0)
        return step

    return choose


def _by_races(search: Search, by: str) -> Callable[[Set], PruneStep]:
    """Return a function that drops candidates once documents show that they will not win.

    With 95 % confidence, the removed part costs at most one percentage point more than the best one
    by accuracy (each step is the question `prune 1 within 1 pp`). By log-probability it costs at
    most 0.01 nats more (see `SmallestMean` for the assumptions). Documents come in random blocks
    of 32.
    """
    scores = search.scores
    (cell,) = scores.cells

    def choose(removed: Set) -> PruneStep:
        left = search.budget.left(removed)
        if len(left) == 1:
            alone = dict.fromkeys(("score", "margin"), "nothing else may go")
            return PruneStep(removed=grown(removed, *left), layer=left[0], reasons=alone)
        sets = [grown(removed, part) for part in left]
        ablations = [scores.ablation(each) for each in sets]
        beneath = [scores.ablation(removed)] if removed else []
        racing = CandidateRace(
            cell.store, cell.view, by, cell.request.documents.seed, ablations, beneath
        )
        if racing.lacking is not None:
            meter = cell.opened([*beneath, *ablations], candidates=True)
            work = CellWork(cell.store, meter.facts, cell.progress, race=racing)
            fill(work, meter.measure, cell.progress)
        seen, means = racing.deciding.seen, rounded(racing.deciding.means)
        scores.raced(cell, beneath, ablations, seen, racing.measured_for(seen), racing.order)
        # If all documents leave several open, they are level: the later one is removed.
        winners = sorted(racing.winners, key=lambda number: (means[number], -left[number]))
        if not winners:
            raise CellError(NO_FINITE)
        best, why = winners[0], "a race does not look at every candidate on all documents"
        score, reasons = float(means[best]), {"margin": why}
        return PruneStep(removed=sets[best], layer=left[best], score=score, reasons=reasons)

    return choose


def by_proxy(search: Search, name: str) -> Iterator[PruneStep]:
    """Remove the layer with the smallest proxy in the remaining model; measure it each time."""

    def choose(removed: Set) -> PruneStep:
        losses = search.scores.proxy(name, removed)
        # Without those after which the budget could not be met any more.
        order = [number for number in losses.order if search.budget.reachable(losses.sets[number])]
        return losses.step(removed, order)

    return _stepwise(search.budget, choose)


def one_shot(search: Search, by: str = "", proxy: str = "") -> Iterator[PruneStep]:
    """Score each part once, alone, and remove those with the smallest scores.

    This assumes that scores add up. Parts of unequal size are ordered by score alone too. They are
    scored `by` an outcome, or by a `proxy`.
    """
    scores = search.scores
    sets = [(part,) for part in search.budget.free]
    losses = scores.proxy(proxy, ()) if proxy else scores.losses(by, sets)
    order = losses.order

    def choose(removed: Set) -> PruneStep:
        left = set(search.budget.left(removed))
        step = losses.step((), [number for number in order if losses.sets[number][0] in left])
        second = grown(removed, *step.runner_up) if step.runner_up else ()
        return step.model_copy(
            update={"removed": grown(removed, *step.removed), "runner_up": second}
        )

    return _stepwise(search.budget, choose)


def contiguous(search: Search) -> Iterator[PruneStep]:
    """Remove the span of layers over which the residual stream turns least (PruneMe).

    For each length it is the best span of all; the spans need not lie within each other.
    """
    within, total = search.budget, search.scores.layers
    every = (range(first, end) for first in range(total) for end in range(first + 1, total + 1))
    stretches = grouped(filter(within.allows, every), len)
    lengths = [n for n, some in stretches.items() if n < total and any(map(within.enough, some))]
    longest = max(lengths, default=0)
    if longest == 0:
        raise out_of_reach("angular removes a stretch of layers, each of which may go")
    length = 0
    removed: Set = ()
    while not within.enough(removed):
        length += 1
        spans = stretches[length]
        if length == longest:
            spans = [span for span in spans if within.enough(span)]
        losses = search.scores.proxy("angular_distance", (), spans)
        step = losses.step(None)
        nested = set(removed) < set(step.removed)
        added = next(iter(set(step.removed) - set(removed))) if nested else None
        removed = step.removed
        yield step.model_copy(update={"layer": added})


def last(search: Search) -> Iterator[PruneStep]:
    """Remove layers from the end, except the very last one, which feeds the head."""
    within, parts = search.budget, search.scores.parts
    within = replace(within, fixed=within.fixed | {*parts.of_layers([parts.layers - 1])})
    if not within.reachable(()):
        raise out_of_reach("last leaves the very last layer")
    yield from _in_order(search, _fitting(reversed(within.free), within))


def at_random(search: Search) -> Iterator[PruneStep]:
    """Remove in a random order."""
    order = list(range(search.scores.parts.total))
    search.lots("random").shuffle(order)
    yield from _in_order(search, _fitting(order, search.budget))


def _fitting(order: Iterable[int], within: Budget) -> Iterator[int]:
    """Yield the parts of an order that may go together with those before them."""
    found: list[int] = []
    for part in order:
        if within.reachable((*found, part)):
            found.append(part)
            yield part


def _in_order(search: Search, order: Iterable[int]) -> Iterator[PruneStep]:
    removed: Set = ()
    reasons = {"score": "the strategy looks at no document", "margin": "it compares nothing"}
    for part in order:
        removed = grown(removed, part)
        yield PruneStep(removed=removed, layer=part, reasons=reasons)
        if search.budget.enough(removed):
            return


NULL = "random"
"""The strategy of random removal: the reference for the others."""
_BY_PROXY = {proxy.strategy: proxy.name for proxy in PROXIES.values() if proxy.strategy}
OUTCOMES = ("accuracy", "gold_logprob")
STRATEGIES: Mapping[str, Strategy] = {
    **{name: partial(by_outcomes, by=name) for name in OUTCOMES},
    **{f"{name}_oneshot": partial(one_shot, by=name) for name in OUTCOMES},
    **{name: partial(by_proxy, name=proxy) for name, proxy in _BY_PROXY.items()},
    **{f"{name}_oneshot": partial(one_shot, proxy=proxy) for name, proxy in _BY_PROXY.items()},
    "angular": contiguous,
    "last": last,
    NULL: at_random,
}
"""Every strategy by its name."""
OF_LAYERS = (*_BY_PROXY, *(f"{name}_oneshot" for name in _BY_PROXY), "angular")
"""Strategies by figures that only whole layers have."""
SCORED = (*OUTCOMES, *(f"{name}_oneshot" for name in OUTCOMES))
"""Strategies that remove one part after the other, any that may go."""
BLIND = ("last", NULL)
"""Strategies that use no documents."""
DRAWN = (NULL,)
"""Strategies that draw at random."""
RESCORED = OUTCOMES
"""Strategies to which `rescoring` applies."""
