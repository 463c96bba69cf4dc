"""What a race says, and what it saved, in words."""

from __future__ import annotations

import numpy as np

from tracker.config import CellRequest
from tracker.ledger.cells import CellStore
from tracker.ledger.races import CellRace, race_of
from tracker.metrics.races import Mask


def answer(store: CellStore, request: CellRequest) -> str | None:
    """Say what a measured cell answers; None where nothing was asked of it."""
    if request.until is None:
        return None
    race = race_of(store, request)
    seen = race.race.bounds.seen
    passes = seen.sum() / (len(seen) * race.population)
    cost = (
        f"{race.looked:,} of {race.population:,} documents, "
        f"{100 * passes:.0f} % of the layer passes"
    )
    text = f"{race.asked}: {_said(race)} ({100 * race.asked.level:g} % confidence; {cost})"
    if race.looked < race.population:
        text += (
            ". The intervals and p-values of single runs are those of one look, and too narrow for "
            "a cell that was stopped by what it showed"
        )
    return text


def contending(race: CellRace) -> str:
    """Name the runs that are open."""
    return f"{_named(race, race.race.standing.open)} open"


def _said(race: CellRace) -> str:
    standing, asked = race.race.standing, race.asked
    if not standing.answered:
        return f"not answered by all documents, which leave {contending(race)}"
    if asked.kind == "drop":
        return f"each drop is known within {100 * (asked.within or 0):g} pp"
    if asked.kind == "sign":
        low, high = race.race.bounds.low, race.race.bounds.high
        costs = _named(race, standing.chosen & (low > 0))
        gains = _named(race, standing.chosen & (high < 0))
        return f"the drops above 0 are those of {costs}, below 0 {gains}"
    which = "the largest drops" if asked.kind == "top" else "the smallest drops"
    return f"{which} are those of {_named(race, standing.chosen)}"


def _named(race: CellRace, which: Mask) -> str:
    """Name some runs; whole layers by their numbers alone."""
    runs = [race.runs[place] for place in np.flatnonzero(which)]
    if not runs:
        return "none"
    if all(run.kind == ("layer", 1, "remove") for run in runs):
        numbers = ", ".join(str(run.layer) for run in runs)
        return f"layer{'s' * (len(runs) > 1)} {numbers}"
    return ", ".join(run.label() for run in runs)
