"""From searches to what is compared: each model, with the ways and benchmarks it was pruned for."""

from __future__ import annotations

import math

from tracker.core.formats import points
from tracker.core.prune_records import PruneRecord
from tracker.core.records import CellRecord
from tracker.pruning.search.conduct import Pursued
from tracker.pruning.search.figures import Choices
from tracker.pruning.search.request import SearchRequest
from tracker.stats.accuracy import accuracy
from tracker.studies.prune.figures import OWN, TASKS, TEXT, Compared, Way


def compared(pursued: Pursued, text: str | None) -> list[Compared]:
    """Put together the searches of each model; `text` is the plain text to calibrate on."""
    groups: dict[object, Compared] = {}
    places: dict[tuple[object, Way, str], list[int]] = {}
    cells = {cell.place: cell for cell in pursued.outcome.cells}
    for number, (asked, record) in enumerate(zip(pursued.searches, pursued.records, strict=True)):
        key = _model_of(asked)
        group = groups.setdefault(key, Compared(_title(asked, record), record.model.layers))
        name = asked.cell.benchmark
        if name not in group.unpruned:
            answered = pursued.tests[number]
            group.unpruned[name] = accuracy(answered.baseline, answered.weights)
            group.n[name] = record.baseline.n
            group.metrics[name] = record.metric
            tested = next((cells[place] for place in record.rests_on if place in cells), None)
            if tested is not None and (why := _at_chance(tested)):
                group.at_chance[name] = why
        places.setdefault((key, _way(asked, text), name), []).append(number)
    for (key, way, name), numbers in places.items():
        groups[key].found[way, name] = Choices(
            tuple(pursued.records[n] for n in numbers), tuple(pursued.tests[n] for n in numbers)
        )
    for asked, why in pursued.failed.items():
        if (group_of := groups.get(_model_of(asked))) is not None:
            group_of.failed[_way(asked, text), asked.cell.benchmark] = why
    return list(groups.values())


def _model_of(asked: SearchRequest) -> object:
    """All that is asked of a search's cell but the benchmark."""
    return asked.cell.model_copy(update={"benchmark": "any"})


def _title(asked: SearchRequest, record: PruneRecord) -> str:
    shots = asked.cell.num_fewshot
    return record.model.name + ("" if shots is None else f", {shots}-shot")


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
