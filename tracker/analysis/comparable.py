"""What may be ranked together, and what counts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

from tracker.analysis.editions import outdated
from tracker.analysis.labels import benchmark_labels, model_labels
from tracker.core.grouping import grouped
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord, RunRecord

Pick = Callable[[CellRecord], Sequence[RunRecord]]
"""Which runs of a cell a ranking is about."""
_WHOLE_LAYERS: Pick = attrgetter("whole_layers")


def models_of(cells: Iterable[CellRecord]) -> list[list[CellRecord]]:
    """Group cells by model: name, weights and dtype."""
    return list(grouped(cells, lambda cell: cell.model.key).values())


def named_models(cells: Iterable[CellRecord]) -> dict[str, list[CellRecord]]:
    """Group cells by model: its label among these models → its cells."""
    groups = models_of(cells)
    return dict(zip(model_labels([group[0].model for group in groups]), groups, strict=True))


def setting(cell: CellRecord) -> str:
    """Make a key of all that must be equal before two models' figures may be compared.

    How documents are put to the model, the metric, how many documents, and which were drawn.
    """
    benchmark = cell.benchmark.model_dump(
        mode="json", exclude={"data", "primary_metric", "found_by"}
    )
    # As many documents as others have are not theirs while they are not all that was asked for.
    growing = cell.key if cell.unfinished is not None else ""
    return content_hash([benchmark, cell.metric, cell.n, cell.sample_seed, cell.removed, growing])


def countable(
    cells: Sequence[CellRecord], of: Pick = _WHOLE_LAYERS
) -> tuple[list[CellRecord], dict[str, str]]:
    """Choose the cells of one model that count, one a benchmark, in their order.

    Besides: benchmark → why it, or another cell of it, does not count.
    """
    labels = dict(zip(map(id, cells), benchmark_labels(cells), strict=True))
    later = outdated(cell for cell in cells if not unusable(cell, of))
    left_out: dict[str, str] = {}
    usable: list[CellRecord] = []
    for cell in cells:
        if why := unusable(cell, of):
            left_out[labels[id(cell)]] = why
        elif latest := later.get(id(cell)):
            label = labels[id(latest)]
            why = f"its task was edited since: what was measured last counts, {label}"
            left_out[labels[id(cell)]] = why
        else:
            usable.append(cell)
    best: dict[str, CellRecord] = {}
    for cell in usable:
        name = cell.benchmark.name
        best[name] = max(best.get(name, cell), cell, key=lambda cell: worth(cell, of))
    for cell in usable:
        if (counts := best[cell.benchmark.name]) is not cell:
            left_out[labels[id(cell)]] = f"the benchmark counts once, as {labels[id(counts)]}"
    return [cell for cell in usable if best[cell.benchmark.name] is cell], left_out


def worth(cell: CellRecord, of: Pick = _WHOLE_LAYERS) -> tuple[int, int, bool, bool]:
    """Of two cells on one benchmark the larger counts: runs, documents, its own metric.

    Of as many documents those that were drawn at random: the first ones are no sample.
    """
    return len(of(cell)), cell.n, not cell.other_metric, bool(cell.drawn)


def unusable(cell: CellRecord, of: Pick = _WHOLE_LAYERS) -> str | None:
    """Say why a cell has no place in a ranking; None where it has one."""
    if cell.removed:
        return f"measured {cell.beneath}"
    if cell.is_raced:
        return cell.unfinished
    if not (runs := of(cell)):
        return "no whole single layer was removed"
    if all(run.accuracy_relevance is None for run in runs):
        return cell.reason_of("accuracy_relevance", runs[0])
    return None
