"""From searches to what is compared: each model, with the ways and benchmarks it was pruned for."""

from __future__ import annotations

import math

from tracker.core.formats import points
from tracker.core.records import CellRecord
from tracker.pruning.search.conduct import Pursued
from tracker.pruning.search.figures import Choices
from tracker.pruning.search.request import SearchRequest
from tracker.stats.accuracy import accuracy
from tracker.studies.prune.figures import OWN, TASKS, TEXT, Compared, PrunedFor, Way


def compared(pursued: Pursued, text: str | None) -> list[Compared]:
    """Put together the searches of each model; `text` is the plain text to calibrate on."""
    groups: dict[object, Compared] = {}
    cells = {cell.place: cell for cell in pursued.outcome.cells}
    for one in pursued.searched:
        asked, record, answered = one.asked, one.record, one.answered
        shots = asked.cell.num_fewshot
        title = record.model.name + ("" if shots is None else f", {shots}-shot")
        group = groups.setdefault(_model_of(asked), Compared(title, record.model.layers))
        way, name = _way(asked, text), asked.cell.benchmark
        if name not in group.benchmarks:
            tested = next((cells[place] for place in record.rests_on if place in cells), None)
            group.benchmarks[name] = PrunedFor(
                accuracy(answered.baseline, answered.weights),
                record.baseline.n,
                record.metric,
                "" if tested is None else _at_chance(tested),
            )
        draws = group.found.get((way, name), Choices((), ()))
        group.found[way, name] = Choices((*draws.records, record), (*draws.answered, answered))
    for asked, why in pursued.failed.items():
        if _model_of(asked) in groups:
            groups[_model_of(asked)].failed[_way(asked, text), asked.cell.benchmark] = why
    return list(groups.values())


def _model_of(asked: SearchRequest) -> object:
    """All that is asked of a search's cell but the benchmark."""
    return asked.cell.model_copy(update={"benchmark": "any"})


def _way(asked: SearchRequest, text: str | None) -> Way:
    calibration = OWN
    if asked.calibrate:
        calibration = TEXT if asked.calibrate == (text,) else TASKS
    return Way(asked.strategy, asked.remove or "", calibration)


def _at_chance(cell: CellRecord) -> str:
    """Say that a model has nothing to lose on the test documents; empty where it has."""
    level, chance = cell.baseline_accuracy, cell.chance_accuracy
    if level is None or chance is None or not math.isfinite(chance) or level > chance + 1e-9:
        return ""
    return f"unpruned it is at {points(level)} %, not above chance, {points(chance)} %"
