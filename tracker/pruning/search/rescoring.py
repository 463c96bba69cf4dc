"""Greedy searches that do not score every candidate on every document after each removal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tracker.core.prune_records import PruneStep
from tracker.core.records import RunIdentity
from tracker.core.views import Until
from tracker.ledger.early_stopping import CellRace
from tracker.measuring.fill import fill_until
from tracker.pruning.search.budgets import Budget
from tracker.pruning.search.scores import Scores, Set, grown
from tracker.stats.rank_agreement import rounded

BATCH = 6
"""Candidates that a lazy search scores in one engine call."""
QUESTION = "prune 1 within 1 pp"
"""What a race answers at each step."""


def lazy(scores: Scores, budget: Budget, by: str) -> Iterator[PruneStep]:
    """Score candidates again only while they can still win, if costs only ever grow.

    What a part cost when it was scored last, beside what was gone then, is taken for the least
    that it costs now. That holds where removals are redundant (together they cost more than the
    sum), and is an assumption otherwise: a part that became cheaper is overlooked.
    """
    removed: Set = ()
    loss, costs = 0.0, dict.fromkeys(range(scores.layers), -np.inf)
    while not budget.enough(removed):
        fresh: list[Set] = []
        left = sorted(budget.left(removed), key=lambda part: (costs[part], -part))
        while left:
            # All of them at first: nothing is known.
            size = BATCH if removed else len(left)
            batch, left = left[:size], left[size:]
            fresh += [grown(removed, part) for part in batch]
            losses = scores.losses(by, fresh)
            best = float(losses.means.min())
            if left and best < loss + costs[left[0]]:
                break
        step = losses.step(removed)
        for each, mean in zip(fresh, losses.means, strict=True):
            (part,) = set(each) - set(removed)
            costs[part] = float(mean) - loss
        yield step
        removed, loss = step.removed, float(step.score or 0.0)
        assert step.layer is not None
        del costs[step.layer]


def race(scores: Scores, budget: Budget) -> Iterator[PruneStep]:
    """Let candidates leave as soon as the documents so far tell that they will not win.

    Each step is the question `prune 1 within 1 pp`: with 95 % confidence the part that goes costs
    at most a percentage point more than the best one. Documents come in blocks of 32, at random.
    """
    (cell,) = scores.cells
    removed: Set = ()
    while not budget.enough(removed):
        left = budget.left(removed)
        runs = tuple(RunIdentity(layer=part) for part in left)
        until = Until(question=QUESTION, seed=cell.request.seed, runs=runs)
        view = cell.view.model_copy(update={"removed": removed, "runs": runs, "until": until})
        racing = CellRace(cell.store, view)
        sets = [grown(removed, part) for part in left]
        ablations = [scores.ablation(each) for each in sets]
        beneath = [scores.ablation(removed)] if removed else []
        if racing.lacking is not None:
            meter = cell.opened([*beneath, *ablations], candidates=True)
            fill_until(racing, cell.store, meter, cell.progress)
        seen = racing.race.seen
        scores.raced(cell, beneath, ablations, seen, racing.measured_for(seen), racing.order)
        bounds, standing = racing.race.bounds, racing.race.standing
        # Where all documents leave several open, they are level: the later one goes.
        may_go = np.flatnonzero(standing.chosen if standing.chosen.any() else standing.open)
        means = rounded((bounds.low + bounds.high) / 2)
        best = min(may_go.tolist(), key=lambda place: (means[place], -left[place]))
        removed = sets[best]
        score, why = float(means[best]), "a race does not look at every candidate on all documents"
        yield PruneStep(removed=removed, layer=left[best], score=score, reasons={"margin": why})
