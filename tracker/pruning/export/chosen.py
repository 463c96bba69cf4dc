"""What a results folder knows of a choice of layers: the searches that made it, and their runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tracker.core.changes import Change
from tracker.core.extent import Extent
from tracker.core.formats import counted
from tracker.core.identities import ModelIdentity
from tracker.core.prune_records import Calibrated, PruneRecord, PruneStep, Tested
from tracker.core.records import CellRecord
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Contents, Ledger
from tracker.measuring.derive import all_records
from tracker.pruning.export.facts import Accuracy, Pruning


def chosen(ledger: Ledger, model: ModelIdentity, removed: tuple[int, ...]) -> Pruning:
    """Say which searches chose some layers of a model.

    Args:
        ledger: The results folder.
        model: The model.
        removed: The layers.

    Returns:
        What is known of the searches that ended there, or else came by; those that looked at
        documents, where there are any; the layers alone where none did.
    """
    contents = ledger.contents()
    found = [
        (record, step)
        for record in contents.searches
        if record.unit == "layer" and record.model.key == model.key
        for step in record.steps
        if step.removed == tuple(sorted(removed))
    ]
    if not found:
        return Pruning(removed)
    ranks = [(r.steps[-1] == step, bool(r.calibration)) for r, step in found]
    best = [each for each, rank in zip(found, ranks, strict=True) if rank == max(ranks)]
    return _pruning(contents, best)


def tried(ledger: Ledger, model: ModelIdentity, stretch: Change) -> Pruning:
    """Say on which calibration documents a stretch of a model was passed again: they may choose."""
    found = []
    for store in ledger.cells():
        benchmark = store.identity.benchmark
        part = benchmark.settings.get("part")
        if store.identity.model.key != model.key or part != "calibration":
            continue
        frame = store.read(columns=["task", "doc", "ablation"])
        rows = frame[frame["ablation"] == str(stretch)]
        numbers = {str(task): tuple(map(int, some)) for task, some in rows.groupby("task")["doc"]}
        if numbers:
            one = Calibrated(
                key=store.identity.key,
                benchmark=benchmark.name,
                metric=benchmark.primary_metric,
                n=len(rows),
                part=part,
                documents=numbers,
            )
            found.append(one)
    said = ", ".join(map(_documents, found)) or None
    return Pruning((), calibration=said, documents=tuple(found), repeated=stretch)


def chosen_by(ledger: Ledger, record: PruneRecord, decided_on: Calibrated | None) -> Pruning:
    """Say what is known of the choice that a search ended with.

    `decided_on` are documents that decided between it and others; None where none did.
    """
    known = _pruning(ledger.contents(), [(record, record.steps[-1])])
    more = () if decided_on is None else (decided_on,)
    return replace(known, documents=(*known.documents, *more))


def _pruning(contents: Contents, found: Sequence[tuple[PruneRecord, PruneStep]]) -> Pruning:
    records = [record for record, _ in found]
    record, step = found[0]
    order = record.order[: len(step.removed)]
    return Pruning(
        removed=order if sorted(order) == list(step.removed) else step.removed,
        strategy=", ".join(dict.fromkeys(_strategy(*each) for each in found)),
        calibration="; ".join(dict.fromkeys(filter(None, map(_calibration, records)))) or None,
        tested=tuple(_accuracy(r, s.test) for r, s in found if s.test is not None),
        chosen_by=_cells(contents, records),
        documents=tuple(each for record in records for each in record.calibration),
    )


def _strategy(record: PruneRecord, step: PruneStep) -> str:
    number = record.steps.index(step) + 1
    whole = number == len(record.steps)
    return record.label if whole else f"{record.label}, step {number} of {len(record.steps)}"


def _cells(contents: Contents, records: Sequence[PruneRecord]) -> tuple[CellRecord, ...]:
    """The tracked cells of the searches' steps."""
    places = {place for r in records for place in r.rests_on}
    keys = {key for key, *_ in places}
    views = [each for each in contents.views if each[0].identity.key in keys]
    cells = all_records(replace(contents, views=views))
    return tuple(cell for cell in cells if cell.place in places)


def _calibration(record: PruneRecord) -> str:
    return ", ".join(map(_documents, record.calibration))


def _documents(each: Calibrated) -> str:
    part = f" ({each.part})" if each.part else ""
    return f"{counted(each.n, 'document')} of {each.benchmark}{part}"


def _accuracy(record: PruneRecord, tested: Tested) -> Accuracy:
    return Accuracy(
        benchmark=record.benchmark.title,
        num_fewshot=record.benchmark.num_fewshot,
        metric=record.metric,
        documents=f"{counted(tested.n, 'document')} that chose nothing",
        n=tested.n,
        before=record.baseline.level,
        after=tested.level,
        unit="%" if record.higher_is_better else "",
    )


def that_chose(ledger: Ledger, pruning: Pruning, store: CellStore, extent: Extent) -> int:
    """Count the documents of a cell, as many as are meant, that chose the layers themselves."""
    cells = {each.identity.key: each for each in ledger.cells()}
    chose = {
        place
        for each in pruning.documents
        if each.key in cells
        for place in _places(cells[each.key], each.documents)
    }
    return len(chose & _places(store, store.wanted(extent)))


def _places(store: CellStore, documents: Mapping[str, Sequence[int]]) -> set[tuple[str, str, int]]:
    """Task, split and number of documents: with the split they are the same in every cell."""
    splits = {task.name: task.split for task in store.identity.benchmark.tasks}
    return {(task, splits[task], n) for task, some in documents.items() for n in some}
