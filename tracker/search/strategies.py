"""Define search strategies: generators of steps that remove parts of a model.

The strategies `last` and `random` use no documents. Every other strategy minimises a loss, which is
the drop of `accuracy`, the drop of `gold_logprob`, or a proxy. If two sets of parts have equal
losses of `accuracy`, the strategy chooses the set with the smaller loss of `gold_logprob`. If two
sets have equal losses of `gold_logprob`, the strategy chooses the set with the smaller loss of
`accuracy`.

The setting `rescoring` can save time: a search then measures fewer candidates or fewer documents.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np

from tracker.analysis.stopping import CandidateRace
from tracker.measuring.fill import CellWork, fill_cell
from tracker.schema.errors import CellError
from tracker.schema.grouping import group_by
from tracker.schema.proxies import PROXIES
from tracker.schema.prune_records import PruneStep, Rescoring
from tracker.search.scores import NO_FINITE_SCORE, PartSet, Scores, add_parts
from tracker.search.settings import Budget, MixedBudget, unmet_budget_error
from tracker.stats.rank_agreement import rounded_values

_NO_SCORE = {"score": "the strategy uses no document", "margin": "nothing is compared"}
"""Reasons of a random step."""
LAZY_BATCH = 6
"""Minimum number of candidates per engine call of a lazy search; at least one layer's parts."""


@dataclass(frozen=True)
class Search:
    """Input of a search strategy: scores, budget and random seed.

    Attributes:
        scores: Scores of sets of parts on calibration documents.
        budget: Budget of the search.
        seed: Seed of random draws.
        draw: Number of the random draw, from 1.
        rescoring: Method of scoring candidates again after each removal, for the strategies
            `accuracy` and `gold_logprob`.
    """

    scores: Scores
    budget: Budget
    seed: int = 0
    draw: int = 1
    rescoring: Rescoring = "full"

    def random_generator(self, strategy: str) -> random.Random:
        """Return a random generator that depends only on the strategy's name, seed and draw."""
        return random.Random(f"{strategy}/{self.seed}/{self.draw}")


Strategy = Callable[[Search], Iterator[PruneStep]]
StepChooser = Callable[[PartSet], PruneStep]
"""Function that chooses the next step, given the parts removed so far."""


def _yield_steps(budget: Budget, choose: StepChooser) -> Iterator[PruneStep]:
    """Yield the steps of a search, until enough parts are removed.

    The function `choose` takes the parts that are removed so far, and returns the next step.
    """
    removed: PartSet = ()
    while not budget.is_finished(removed):
        step = choose(removed)
        yield step
        removed = step.removed


def remove_by_outcome(search: Search, outcome: str) -> Iterator[PruneStep]:
    """Yield steps that each remove the part with the smallest loss."""
    if isinstance(search.budget, MixedBudget):
        yield from _yield_steps(search.budget, _mixed_chooser(search, search.budget, outcome))
        return
    rescorings = {"full": _full_chooser, "lazy": _lazy_chooser, "race": _race_chooser}
    yield from _yield_steps(search.budget, rescorings[search.rescoring](search, outcome))


def _full_chooser(search: Search, outcome: str) -> StepChooser:
    """Return a function that removes the remaining part with the smallest loss."""

    def choose(removed: PartSet) -> PruneStep:
        sets = [add_parts(removed, part) for part in search.budget.next_parts(removed)]
        return search.scores.losses(outcome, sets).choose_step(removed)

    return choose


def _mixed_chooser(search: Search, budget: MixedBudget, outcome: str) -> StepChooser:
    """Return a function that picks the removal of least added loss per parameter or millisecond.

    A step removes one whole layer, or equally many parts (e.g. heads) of every layer. In each
    layer, the parts are removed in a fixed order: by their loss if removed alone, the smallest
    first.
    """
    scores = search.scores
    single_losses = scores.losses(outcome, [(part,) for part in budget.numbered_parts])
    order = [budget.numbered_parts[index] for index in single_losses.order]

    def choose(removed: PartSet) -> PruneStep:
        candidates = chain.from_iterable(budget.candidates(removed, order))
        sets = [removed, *(add_parts(removed, *(c.difference(removed))) for c in candidates)]
        sizes = np.array([budget.size_of(part_set) for part_set in sets]) / budget.price_unit
        return scores.losses(outcome, sets).per_added_size(sizes).choose_step(removed)

    return choose


def _lazy_chooser(search: Search, outcome: str) -> StepChooser:
    """Return a function that removes the best part without scoring hopeless parts again.

    A part is hopeless if its added loss in an earlier step exceeds the best added loss of this
    step. The method assumes that the added loss of a part never decreases from step to step.
    """
    scores, total_loss = search.scores, 0.0
    costs = dict.fromkeys(range(scores.parts.total), -np.inf)

    def choose(removed: PartSet) -> PruneStep:
        nonlocal total_loss
        rescored: list[PartSet] = []
        parts = search.budget.next_parts(removed)
        parts.sort(key=lambda part: (costs[part], -part))
        while parts:
            # All of them at first, when no costs are known.
            size = max(LAZY_BATCH, scores.parts.per_layer) if removed else len(parts)
            batch, parts = parts[:size], parts[size:]
            rescored += [add_parts(removed, part) for part in batch]
            losses = scores.losses(outcome, rescored)
            if parts and float(losses.means.min()) < total_loss + costs[parts[0]]:
                break
        step = losses.choose_step(removed)
        for part_set, mean in zip(rescored, losses.means, strict=True):
            (part,) = set(part_set) - set(removed)
            costs[part] = float(mean) - total_loss
        total_loss = float(step.score or 0.0)
        return step

    return choose


def _race_chooser(search: Search, outcome: str) -> StepChooser:
    """Return a function that removes the best part, and measures bad parts on fewer documents.

    The measurement of a part ends when the part is significantly worse than another part. With 95 %
    confidence, the loss of the removed part exceeds the smallest loss by at most one percentage
    point of accuracy (or 0.01 nats).
    """
    scores = search.scores
    (cell,) = scores.cells

    def choose(removed: PartSet) -> PruneStep:
        parts = search.budget.next_parts(removed)
        sets = [add_parts(removed, part) for part in parts]
        if len(parts) == 1:
            reasons = dict.fromkeys(("score", "margin"), "no other removal is possible")
            return PruneStep(removed=sets[0], layer=parts[0], reasons=reasons)
        candidates = [scores.ablation(part_set) for part_set in sets]
        start = [scores.ablation(removed)] if removed else []
        seed = cell.request.documents.seed
        race = CandidateRace(cell.store, cell.view, outcome, seed, candidates, start)
        if race.next_block is not None:
            meter = cell.open_meter([*start, *candidates], are_candidates=True)
            work = CellWork(cell.store, meter.facts, cell.progress, race=race)
            fill_cell(work, meter.measure, cell.progress)
        scores.record_race(race, candidates, start)
        if not race.winners:
            raise CellError(NO_FINITE_SCORE)
        means = rounded_values(race.rule.means)
        # If all documents leave several open, they are level: the later one is removed.
        best = min(race.winners, key=lambda index: (means[index], -parts[index]))
        reasons = {"margin": "'rescoring: race' does not measure all candidates on all documents"}
        score = float(means[best])
        return PruneStep(removed=sets[best], layer=parts[best], score=score, reasons=reasons)

    return choose


def remove_by_proxy(search: Search, name: str) -> Iterator[PruneStep]:
    """Yield steps that each remove the layer with the smallest value of a proxy."""

    def choose(removed: PartSet) -> PruneStep:
        losses = search.scores.proxy(name, removed)
        # Without those after which the budget could not be met any more.
        order = [index for index in losses.order if search.budget.can_reach(losses.sets[index])]
        return losses.choose_step(removed, order)

    return _yield_steps(search.budget, choose)


def remove_one_shot(search: Search, outcome: str = "", proxy: str = "") -> Iterator[PruneStep]:
    """Yield steps that remove parts in the order of their scores, the smallest first.

    All scores are measured once, in the intact model.

    Args:
        search: Input of the strategy.
        outcome: Outcome whose loss is the score of a part: `accuracy` or `gold_logprob`.
        proxy: Name of the proxy whose value is the score; empty to use `outcome`.

    Returns:
        An iterator over the steps.
    """
    scores = search.scores
    sets = [(part,) for part in search.budget.free_parts]
    losses = scores.proxy(proxy, ()) if proxy else scores.losses(outcome, sets)
    order = losses.order

    def choose(removed: PartSet) -> PruneStep:
        parts = set(search.budget.next_parts(removed))
        step = losses.choose_step((), [index for index in order if losses.sets[index][0] in parts])
        updates = {"removed": add_parts(removed, *step.removed)}
        if step.runner_up:
            updates["runner_up"] = add_parts(removed, *step.runner_up)
        return step.model_copy(update=updates)

    if search.budget.is_uniform:
        return _remove_in_order(search, (losses.sets[index][0] for index in order))
    return _yield_steps(search.budget, choose)


def remove_span(search: Search) -> Iterator[PruneStep]:
    """Yield steps that remove consecutive layers with the smallest angular distance.

    Step n removes the best n consecutive layers (the method of PruneMe). The removed layers of step
    n need not include the removed layers of step n - 1.
    """
    budget, n = search.budget, search.scores.layers
    spans = (range(start, end) for start in range(n) for end in range(start + 1, n + 1))
    spans_by_length = group_by(filter(budget.allows, spans), len)
    # The last step is at the greatest length of which a span is enough.
    lengths = [k for k, runs in spans_by_length.items() if k < n and any(map(budget.is_met, runs))]
    if not lengths:
        raise unmet_budget_error("the strategy 'angular' removes one span of removable layers")
    removed: PartSet = ()
    longest = max(lengths)
    for length in range(1, longest + 1):
        candidates = spans_by_length[length]
        if length == longest:
            candidates = list(filter(budget.is_met, candidates))
        step = search.scores.proxy("angular_distance", (), candidates).choose_step(None)
        added = set(step.removed) - set(removed)
        is_nested = set(removed) < set(step.removed)
        removed = step.removed
        yield step.model_copy(update={"layer": min(added) if is_nested else None})
        if budget.is_finished(removed):
            return


def remove_last(search: Search) -> Iterator[PruneStep]:
    """Yield steps that remove layers from the end, but keep the very last layer."""
    budget, parts = search.budget, search.scores.parts
    if not budget.is_uniform:
        budget = replace(budget, fixed=budget.fixed | {*parts.parts_of_layers([parts.layers - 1])})
    if not budget.can_reach(()):
        raise unmet_budget_error("the strategy 'last' keeps the final layer")
    yield from _remove_in_order(search, _filter_removable(reversed(budget.free_parts), budget))


def remove_at_random(search: Search) -> Iterator[PruneStep]:
    """Yield steps that remove parts in a random order."""
    if isinstance(search.budget, MixedBudget):
        yield from _yield_steps(search.budget, _random_chooser(search, search.budget))
        return
    order = list(range(search.scores.parts.total))
    search.random_generator("random").shuffle(order)
    yield from _remove_in_order(search, _filter_removable(order, search.budget))


def _random_chooser(search: Search, budget: MixedBudget) -> StepChooser:
    """Return a function that removes a random layer, or random parts of every layer.

    The function first draws the kind of parts, such as layers or heads, and then the parts.
    """
    order, generator = list(budget.numbered_parts), search.random_generator("random")
    generator.shuffle(order)

    def choose(removed: PartSet) -> PruneStep:
        parts = generator.choice(generator.choice(budget.candidates(removed, order)))
        return PruneStep(removed=add_parts(removed, *parts.difference(removed)), reasons=_NO_SCORE)

    return choose


def _filter_removable(order: Iterable[int], budget: Budget) -> Iterator[int]:
    """Yield parts in order, but skip a part if the search could then not remove enough."""
    removed: list[int] = []
    for part in order:
        if budget.can_reach((*removed, part)):
            removed.append(part)
            yield part


def _remove_in_order(search: Search, order: Iterable[int]) -> Iterator[PruneStep]:
    """Yield steps that remove parts in a given order, until enough parts are removed.

    A step removes one part, or one part of each block if blocks must lose equally many parts.
    """
    budget = search.budget
    removed: PartSet = ()
    reasons = _NO_SCORE
    steps: Iterable[tuple[int, ...]] = ((part,) for part in order)
    if budget.is_uniform:
        steps = zip(*group_by(order, budget.block_of).values(), strict=False)
        reasons = dict.fromkeys(reasons, "each step removes one part from every layer")
    for parts in steps:
        removed = add_parts(removed, *parts)
        layer = None if budget.is_uniform else parts[0]
        yield PruneStep(removed=removed, layer=layer, reasons=reasons)
        if budget.is_finished(removed):
            return


RANDOM_STRATEGY = "random"
"""The strategy of random removal, a reference for the other strategies."""
OUTCOME_STRATEGIES = ("accuracy", "gold_logprob")
_BY_OUTCOME: dict[str, Strategy] = {
    **{name: partial(remove_by_outcome, outcome=name) for name in OUTCOME_STRATEGIES},
    **{f"{name}_oneshot": partial(remove_one_shot, outcome=name) for name in OUTCOME_STRATEGIES},
}
_PROXIES = {proxy.strategy: proxy.name for proxy in PROXIES.values() if proxy.strategy}
_BY_PROXY: dict[str, Strategy] = {
    **{name: partial(remove_by_proxy, name=p) for name, p in _PROXIES.items()},
    **{
        f"{name}_oneshot": partial(remove_one_shot, proxy=proxy) for name, proxy in _PROXIES.items()
    },
    "angular": remove_span,
}
STRATEGIES: Mapping[str, Strategy] = {
    **_BY_OUTCOME,
    **_BY_PROXY,
    "last": remove_last,
    RANDOM_STRATEGY: remove_at_random,
}
"""All strategies by name."""
LAYER_STRATEGIES = tuple(_BY_PROXY)
"""Strategies that use proxies, which only whole layers have."""
STEPWISE_STRATEGIES = tuple(_BY_OUTCOME)
"""Strategies that remove one part at a time, in any order."""
UNIFORM_STRATEGIES = (*(f"{name}_oneshot" for name in OUTCOME_STRATEGIES), "last", RANDOM_STRATEGY)
"""Strategies that can remove one part of every layer in each step."""
MIXED_STRATEGIES = (*OUTCOME_STRATEGIES, RANDOM_STRATEGY)
"""Strategies that can remove several units."""
BLIND_STRATEGIES = ("last", RANDOM_STRATEGY)
"""Strategies that use no documents."""
DRAWN_STRATEGIES = (RANDOM_STRATEGY,)
"""Strategies that draw at random."""
RESCORED_STRATEGIES = OUTCOME_STRATEGIES
"""Strategies to which `rescoring` applies."""
